"""Set of digests in a scratch file, to find copies among records of any number.

A hash table with open addressing: 16 bytes a slot, and 1.5 to 3 slots a digest. The file is in the machine's temporary
folder, has no name, and is mapped into memory, so that the system may write its pages back when memory is short. A
Python set takes 110 bytes of memory a digest.
"""

import mmap
import tempfile
from typing import Self

DIGEST_BYTES = 16
FIRST_SLOTS = 2**12
MAX_LOAD = 2 / 3
"""Share of the slots that may be taken: above it, look-ups visit many slots."""

_FREE = bytes(DIGEST_BYTES)
_ZEROS = bytes(2**20)


class DigestSet:
    """Set of digests of DIGEST_BYTES bytes. Used as a context, which removes its file."""

    def __init__(self) -> None:
        self._length = 0
        self._open(FIRST_SLOTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()

    def __len__(self) -> int:
        return self._length

    def add(self, digest: bytes) -> bool:
        """Add a digest. Returns False if it is there already."""
        offset = self._find(digest)
        if self._table[offset : offset + DIGEST_BYTES] != _FREE:
            return False
        self._table[offset : offset + DIGEST_BYTES] = digest
        self._length += 1
        if self._length > MAX_LOAD * self._num_slots:
            self._grow()
        return True

    def _find(self, digest: bytes) -> int:
        """Return the byte offset of a digest, or of the free slot where it belongs."""
        table, mask = self._table, self._num_slots - 1
        slot = int.from_bytes(digest[:8], "little") & mask
        while table[(offset := slot * DIGEST_BYTES) : offset + DIGEST_BYTES] not in (_FREE, digest):
            slot = (slot + 1) & mask
        return offset

    def _open(self, num_slots: int) -> None:
        """Make an empty table."""
        with tempfile.TemporaryFile() as file:
            # A file with holes would end the process if the disk is full later.
            for _ in range(0, num_slots * DIGEST_BYTES, len(_ZEROS)):
                file.write(_ZEROS)
            file.flush()
            self._table = mmap.mmap(file.fileno(), num_slots * DIGEST_BYTES)
        self._num_slots = num_slots

    def _grow(self) -> None:
        """Move the digests to a table of twice the size. Those of near slots stay near each other."""
        former = self._table
        self._open(2 * self._num_slots)
        for start in range(0, len(former), DIGEST_BYTES):
            digest = former[start : start + DIGEST_BYTES]
            if digest != _FREE:
                offset = self._find(digest)
                self._table[offset : offset + DIGEST_BYTES] = digest
        former.close()
