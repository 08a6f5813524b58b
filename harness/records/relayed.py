"""What is known of a cache that was sent to another process, which answered from it."""

from harness.records.ranges import Bytes, Seconds
from harness.records.spec import Frozen

HEADER_BYTES = 8192
"""Most bytes of a message that are no cache: of its description for the whole prompt."""
LAYER_BYTES = 2048
"""And for each layer."""


class Relayed(Frozen):
    """A compressed context as it was sent, and what sending its text instead would have taken.

    To the first token: `send_s + receive_s + ask_s` by the cache, `text_s` by the text. The sender has read the
    context in either case. Bytes go over a pipe of one machine, which is faster than most networks.
    """

    sent_bytes: Bytes  # of the message, all of it: cache and description
    text_bytes: Bytes  # of the context as UTF-8 text
    send_s: Seconds  # of the sender: from its cache to the last byte that the receiver took
    receive_s: Seconds  # of the receiver: from the bytes to a cache that can be decoded
    ask_s: Seconds  # of the receiver: the question through the model on that cache, to the first token
    text_s: Seconds | None = None  # of the receiver: text and question through the model, to the first token
    depends: bool | None = None  # whether the same message full of zeros gave another answer; None: not tried
