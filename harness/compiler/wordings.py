"""What calibration prompts say, all of it our own: evaluation formats must stay unseen by what is calibrated.

In a template `{key}` is who or what owns a value, `{source}` the owner before it, `{value}` the value.
"""

from random import Random
from typing import NamedTuple

INTROS = (
    "",
    "Here is some prose.\n\n",
    "What follows is part of a longer work.\n\n",
    "Please go through these lines first.\n\n",
)
ASIDES = ("", "Think back to these pages. ", "One thing only: ", "A reader wants to know: ")

NAMES = (
    *("Ingrid", "Leopold", "Marguerite", "Anselm", "Winifred", "Casimir", "Odette", "Bertrand", "Philippa", "Horatio"),
    *("Rosalind", "Ulric"),
)
PLACES = (
    *("boathouse", "bakery", "tollgate", "granary", "tannery", "lighthouse", "ropewalk", "dairy", "smithy", "quarry"),
)
COLOURS = ("red", "blue", "green", "yellow", "brown", "grey", "white", "black", "purple", "orange")

OPENERS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "st", "tr")
VOWELS = ("a", "e", "i", "o", "u", "au", "ei")
CLOSERS = ("n", "r", "l", "k", "m", "sk", "nt")


def invented(draws: Random) -> str:
    """Return a word of two syllables that no language has, such as `trausonk`, in lower case."""
    syllables = (draws.choice(OPENERS) + draws.choice(VOWELS) for _ in range(2))
    return "".join(syllables) + draws.choice(CLOSERS)


class Fact(NamedTuple):
    """One value of one owner. prefix: how the reply begins. words: the value is an invented word, else a number.

    passes: of a value that is handed on, says so of each later owner.
    """

    says: str
    question: str
    prefix: str
    owners: tuple[str, ...]
    words: bool = False
    passes: str = ""


COPIES = (  # question, and how the reply begins, up to and with the words that are given
    ("Write out again, word for word, the sentence that begins: {opening}", "{opening}"),
    ("One sentence of this starts with the words: {opening}\nPlease give all of it.", "It reads: {opening}"),
    ("How does the sentence go on that opens like this? {opening} ...", "{opening}"),
    ("Copy out in full the one sentence whose first words are these: {opening}", "Here it is. {opening}"),
)

FACTS = (
    Fact(
        "The spare key of the {key} hangs on hook {value}.",
        "On which hook does the spare key of the {key} hang?",
        "It hangs on hook",
        PLACES,
    ),
    Fact(
        "{key} paid {value} crowns for the old piano.",
        "How many crowns did {key} pay for the old piano?",
        "{key} paid",
        NAMES,
    ),
    Fact(
        "Whoever calls at the {key} has to say {value} at the door.",
        "What has a caller to say at the door of the {key}?",
        "At the door one says",
        PLACES,
        words=True,
    ),
    Fact(
        "At home {key} had a parrot called {value}.",
        "What was the parrot called that {key} had at home?",
        "The parrot was called",
        NAMES,
        words=True,
    ),
    Fact(
        "The crate with the {key} label weighs {value} ounces.",
        "What is the weight of the crate with the {key} label, in ounces?",
        "It weighs",
        COLOURS,
    ),
)

TRAILS = (
    Fact(
        "Somebody counted {value} beads into the {key} jar.",
        "How many beads does the {key} jar hold?",
        "The {key} jar holds",
        COLOURS,
        passes="Just as many beads as the {source} jar holds went into the {key} jar.",
    ),
    Fact(
        "{key} was promised a pension of {value} florins.",
        "What pension was {key} promised, in florins?",
        "{key} was promised",
        NAMES,
        passes="{key} was promised the same pension as {source}.",
    ),
    Fact(
        "The watchman of the {key} uses the signal {value}.",
        "Which signal does the watchman of the {key} use?",
        "The signal is",
        PLACES,
        words=True,
        passes="The watchman of the {key} has taken over the signal of the {source}.",
    ),
    Fact(
        "{key} named the new boat {value}.",
        "What is the name of the boat that belongs to {key}?",
        "Its name is",
        NAMES,
        words=True,
        passes="{key} liked the name that {source} had given, and took it for another boat.",
    ),
)

LEDGERS = (  # of lines; `{clock}`, `{colour}` and `{place}` are drawn for each and decide nothing
    Fact(
        "{clock} {place} gauge {key} reads {value}, all quiet",
        "What does the gauge {key} read?",
        "It reads",
        (),
    ),
    Fact(
        "| {key} | {colour} | {value} | {place} |",
        "Which number is in the row of {key}?",
        "The row of {key} has",
        (),
    ),
    Fact(
        "- {key} ({colour}, as before): {value}",
        "Which figure comes after {key}?",
        "After {key} comes",
        (),
    ),
    Fact(
        'stock.add(name="{key}", shelf="{place}", count={value})',
        "With which count was {key} added to the stock?",
        "The count is",
        (),
    ),
    Fact(
        '"Any news of {key}?" "None, it still stands at {value}, and good {clock} to you."',
        "At what does {key} still stand?",
        "{key} still stands at",
        (),
    ),
)
