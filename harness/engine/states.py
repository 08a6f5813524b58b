"""What the layers without keys and values carry from token to token: recurrent states and a convolution's last inputs.

They have one size whatever the prompt, no policy sees them, and a token that went in cannot be taken out again: going
back means having kept a copy. So a prompt's are kept as they were before its last token, too, which may be fed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Key = tuple[int, str, int]  # layer of the model, name of the states, their number among those of the name


@dataclass
class States:
    """Of R rows: [R, ...] each. Empty before the first token, and in models whose layers all keep keys and values.

    The seam changes them in place, token by token.
    """

    tensors: dict[Key, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, rows: Sequence[States]) -> States:
        """Copies of the same layers' states, row after row."""
        return cls({key: torch.cat([own.tensors[key] for own in rows]) for key in rows[0].tensors})

    def take(self, rows: Sequence[int]) -> States:
        """Copies of the states of some rows; a row may come more than once."""
        return States({key: x[list(rows)] for key, x in self.tensors.items()})

    def copy(self) -> States:
        """Copies of all of them."""
        return States({key: x.clone() for key, x in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return sum(x.nbytes // len(x) for x in self.tensors.values())
