"""The header of a GGUF file, read without its tensors: whether the file is one, whole, and not a part of several.

Format: ggml-org/ggml, docs/gguf.md. Little-endian; versions 2 and 3.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MOST = 2**24
"""Fields, tensors or entries of a list."""
REMEDY = "fetch the file again"


class Header:
    """The header of a file in memory.

    fields: scalars and strings; of a list its length. tensors: how many there are. bytes: of the whole file, at least.
    Raises struct.error, ValueError, TypeError or ArithmeticError for what is none.
    """

    def __init__(self, data: mmap.mmap) -> None:
        from gguf.constants import GGML_QUANT_SIZES  # takes half a second, for numpy

        self.data, self.at, self.sizes = data, 4, {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        version, tensors, fields = self._take("<I"), self._take("<Q"), self._take("<Q")
        if version not in VERSIONS:
            raise ValueError(f"it has version {version}, {' and '.join(map(str, VERSIONS))} are known")
        self._check(tensors, fields)
        self.fields = {self._string(): self._value(self._take("<I")) for _ in range(fields)}
        ends = [self._end_of_tensor() for _ in range(tensors)]
        step = self.fields.get("general.alignment", 32)
        self.bytes = -(-self.at // step) * step + max(ends, default=0)
        self.tensors = tensors

    def _check(self, *counts: int) -> None:
        for count in counts:
            if count > min(MOST, len(self.data)):
                raise ValueError(f"it tells of {count} entries")

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._take("<Q")
        self._skip(length)
        return self.data[self.at - length : self.at].decode()

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self.data):
            raise ValueError("it ends in its header")

    def _value(self, kind: int) -> Any:
        """A scalar or a string; a list is passed over, and its length returned."""
        if kind in SCALARS:
            return self._take(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise ValueError(f"it has a field of kind {kind}")
        inner, count = self._take("<I"), self._take("<Q")
        self._check(count)
        if inner in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[inner]))
        elif inner == STRING:
            for _ in range(count):
                self._skip(self._take("<Q"))
        else:
            raise ValueError(f"it has a list of kind {inner}")
        return count

    def _end_of_tensor(self) -> int:
        """Where a tensor ends, from where the first begins."""
        self._string()
        rank = self._take("<I")
        self._check(rank)
        numbers = math.prod(self._take("<Q") for _ in range(rank))
        kind, begin = self._take("<I"), self._take("<Q")
        block, block_bytes = self.sizes.get(kind, (1, 0))  # numbers in a block, and its bytes
        return int(begin + numbers // block * block_bytes)


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF, is cut off, or is one part of several. Raises HarnessError."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"it does not begin with {MAGIC.decode()}, it is no GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = Header(data)
                if header.bytes > len(data):
                    raise ValueError(f"it has {len(data):,} bytes, its header tells of {header.bytes:,}")
    except OSError as error:
        raise HarnessError(f"{shown(path.name)} cannot be read ({error.strerror}); {REMEDY}") from None
    except (struct.error, ValueError, TypeError, ArithmeticError) as error:
        why = "it ends in its header" if isinstance(error, struct.error) else error
        raise HarnessError(f"{shown(path.name)} is damaged: {why}; {REMEDY}") from None
    parts = header.fields.get("split.count", 1)
    if parts not in (0, 1):
        part = header.fields.get("split.no", 0)
        one = f"{shown(path.name)} is part {part + 1 if isinstance(part, int) else shown(part)} of {shown(parts)}"
        raise HarnessError(f"{one} of a split model; join them with `gguf-split --merge` and give the whole")
    if not header.tensors:
        raise HarnessError(f"{shown(path.name)} holds no tensors; give the file with the weights")
