"""Tests of the set of digests: it answers as a set in memory, of any size."""

import random

import pytest

from pipelines.data import digest_set
from pipelines.data.digest_set import DIGEST_BYTES, DigestSet


@pytest.mark.parametrize("slots", [1, 4, 1024])
def test_digests_are_added_once(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_set, "FIRST_SLOTS", slots)
    draw = random.Random(0)
    digests = [draw.randbytes(DIGEST_BYTES) for _ in range(3000)]
    # Many that begin alike meet in neighbouring slots.
    digests += [bytes(8) + draw.randbytes(8) for _ in range(100)]
    asked = digests + draw.choices(digests, k=2000)
    draw.shuffle(asked)
    expected = set[bytes]()
    with DigestSet() as seen:
        for digest in asked:
            assert seen.add(digest) == (digest not in expected)
            expected.add(digest)
        assert len(seen) == len(expected) == len(digests)
        assert not any(map(seen.add, digests))


def test_a_full_disk_is_an_error_before_the_table_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(digest_set.tempfile, "TemporaryFile", FullDisk)
    with pytest.raises(OSError, match="No space left on device"):
        DigestSet()
