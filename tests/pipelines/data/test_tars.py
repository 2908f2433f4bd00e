"""Tests of tars: samples are those that WebDataset reads, and every member is used, ignored or rejected."""

import gzip
import io
import json
import mmap
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.data.tars import Tar, make_index_rows, read_tar
from tests.pipelines.odd_tars import PICTURES, Entry, odd_tar, pack, picture, record

JPG, WEBP = PICTURES["jpg"], PICTURES["webp"]
METADATA = json.dumps({"url": "https://example.org/1.jpg", "caption": "a thing", "status": "success"}).encode()


def webdataset_samples(data: bytes) -> list[dict]:
    """Read the samples with WebDataset."""
    return list(group_by_keys(tar_file_expander([{"url": "a.tar", "stream": io.BytesIO(data)}])))


def read(data: bytes) -> tuple[Tar | None, str]:
    """Read a tar. Returns its content, or None and the error."""
    try:
        return read_tar(data, "a.tar"), ""
    except ValueError as error:
        return None, str(error)


def listed(*entries: Entry) -> tuple[Tar, bytes]:
    data = pack(list(entries))
    return read_tar(data, "a.tar"), data


def parts(*entries: Entry) -> list[tuple[str, str | None, str | None, str | None]]:
    """Return (key, suffix of the record, suffix of the image, rejection reason) of each sample."""
    return [
        (
            sample.key,
            sample.record.suffix if sample.record else None,
            sample.image.suffix if sample.image else None,
            sample.rejection_reason,
        )
        for sample in listed(*entries)[0].samples
    ]


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_odd_and_damaged_tars_are_read_as_webdataset_reads_them_or_refused_in_one_line(start: int):
    kept = 0
    for seed in range(start, start + 100):
        data = odd_tar(seed)
        tar, refusal = read(data)
        if not tar:
            assert re.fullmatch(r"a\.tar: .*allowed: .*", refusal), (seed, refusal)
            continue
        theirs = webdataset_samples(data)  # raises where we should have refused
        assert [sample["__key__"] for sample in theirs] == [sample.key for sample in tar.samples], seed
        for sample, their in zip(tar.samples, theirs, strict=True):
            ours = {member.suffix: data[member.content] for member in sample.members}
            assert ours == {name: value for name, value in their.items() if not name.startswith("__")}, seed
        assert tar.used.total() + tar.ignored.total() + tar.rejected == tar.members, seed
        with tarfile.open(fileobj=io.BytesIO(data)) as opened:
            assert len(opened.getmembers()) == tar.members, seed
        for row, good in zip(make_index_rows(tar, data, "a.tar"), tar.good_samples, strict=True):
            part = data[row["offset"] : row["offset"] + row["length"]]
            assert good.record
            assert json.loads(part[row["record_at"] :][: row["record_size"]])["conversations"], seed
            row["key"].encode()
            kept += 1
    assert kept > 50


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([("0.json", record(0)), ("0.txt", b"a red thing"), ("0.webp", WEBP)], ("0", "json", "webp", None)),
        ([("0.cls", b"7"), ("0.jpg", JPG), ("0.json", record(0))], ("0", "json", "jpg", None)),
        ([("0.info.json", METADATA), ("0.jpg", JPG), ("0.json", record(0))], ("0", "json", "jpg", None)),
        ([("0.depth.png", picture("PNG")), ("0.jpg", JPG), ("0.json", record(0))], ("0", "json", "jpg", None)),
        ([("0.JPG", JPG), ("0.JSON", record(0))], ("0", "json", "jpg", None)),
        ([("0.jpg", JPG), ("0.jpg.json", record(0))], ("0", "jpg.json", "jpg", None)),
        ([("0.left.jpg", JPG), ("0.json", record(0))], ("0", "json", "left.jpg", None)),
        ([("0.picture", JPG), ("0.json", record(0))], ("0", "json", "picture", None)),
        ([("0.txt", JPG), ("0.json", record(0))], ("0", "json", None, "tag without image")),
        ([("0.json", record(0, image=False))], ("0", "json", None, None)),
        ([("v1.0/7.jpg", JPG), ("v1.0/7.json", record(0))], ("v1.0/7", "json", "jpg", None)),
        ([("../../7.jpg", JPG), ("../../7.json", record(0))], ("../../7", "json", "jpg", None)),
        ([("/etc/7.jpg", JPG), ("/etc/7.json", record(0))], ("/etc/7", "json", "jpg", None)),
        ([("0.jpg", JPG), ("0.json", METADATA)], ("0", "json", None, "wrong fields")),
        ([("0.jpg", JPG), ("0.json", b"[" * 100_000)], ("0", "json", None, "not JSON")),
        ([("0.jpg", JPG), ("0.txt", b"a red thing")], ("0", None, None, "no record")),
        ([("0.jpg", JPG), ("0.json", record(0, image=False))], ("0", "json", "jpg", "image without tag")),
        ([("0.left.jpg", JPG), ("0.right.jpg", JPG), ("0.json", record(0))], ("0", "json", None, "several images")),
        ([("0.jpg", JPG), ("0.png", JPG), ("0.json", record(0))], ("0", "json", None, "several images")),
        (
            [("a.0.jpg", JPG), ("a.0.json", record(0)), ("a.1.jpg", JPG), ("a.1.json", record(1))],
            ("a", None, None, "several records"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else " ".join(name for name, _ in value)[:40],
)
def test_the_record_and_the_image_are_found_by_their_names_and_bytes(entries: list[Entry], expected: tuple):
    assert parts(*entries) == [expected]


def test_of_two_plain_images_the_record_tells_which():
    said = json.dumps({**json.loads(record(0)), "image": "photos/0.PNG"}).encode()
    assert parts(("0.jpg", JPG), ("0.png", JPG), ("0.json", said)) == [("0", "json", "png", None)]


def test_a_record_with_an_image_that_the_tar_lacks_is_refused():
    said = json.dumps({**json.loads(record(0)), "image": "0.jpg"}).encode()
    assert parts(("0.json", said)) == [("0", "json", None, "missing image")]


@pytest.mark.parametrize("text", [True, False])
def test_members_apart_are_refused_whatever_of_them_could_stand_alone(text: bool):
    """A record without its image would be trained as text."""
    records = [(f"{number}.json", record(number, image=not text)) for number in range(3)]
    images = [(f"{number}.jpg", JPG) for number in range(3)]
    for entries in (records + images, images + records):
        assert {rejection_reason for *_, rejection_reason in parts(*entries)} == {"split sample"}


def test_a_key_that_comes_again_with_whole_samples_keeps_both_and_says_so():
    one, other = [("a.json", record(0, image=False))], [("b.json", record(1, image=False))]
    tar, _ = listed(*one, *other, *one)
    assert [sample.key for sample in tar.good_samples] == ["a", "b", "a"]
    assert tar.notes == ["a.tar: 2 samples have the key a; all are kept"]


def test_each_member_is_counted_once():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, body, kind in (
            ("__meta__/a.json", b"{}", tarfile.REGTYPE),
            ("__info__", b"{}", tarfile.REGTYPE),
            ("README", b"of all", tarfile.REGTYPE),
            ("train", b"", tarfile.DIRTYPE),
            ("train/0.jpg", JPG, tarfile.REGTYPE),
            ("train/0.png", b"", tarfile.SYMTYPE),
            ("train/0.TXT", b"a thing", tarfile.REGTYPE),
            ("train/0.json", record(0), tarfile.REGTYPE),
            ("train/1.jpg", b"", tarfile.LNKTYPE),
            ("train/1.json", record(1), tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(body), kind, "train/0.jpg" if not body else ""
            tar.addfile(member, io.BytesIO(body) if body else None)
    found = read_tar(buffer.getvalue(), "a.tar")
    assert found.members == 10
    assert found.used == Counter(jpg=1, json=1)
    assert found.ignored == Counter(
        {"metadata": 2, "no suffix": 1, "folder": 1, "symbolic link": 1, "hard link": 1, "txt": 1}
    )
    assert (found.rejected, [sample.rejection_reason for sample in found.samples]) == (1, [None, "tag without image"])


def whole() -> bytes:
    return pack([(f"{number}.{suffix}", body) for number in range(3) for suffix, body in _pair(number)])


SAMPLE = 512 + -(-len(JPG) // 512) * 512 + 1024
"""Bytes of one sample of it: two headers, the image and a record of one block."""


def _pair(number: int) -> list[Entry]:
    return [("jpg", JPG), ("json", record(number))]


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (lambda: b"", "cut, damaged or no tar"),
        (lambda: b"not a tar" * 1000, "cut, damaged or no tar"),
        (lambda: gzip.compress(whole()), "compressed by gzip"),
        (lambda: whole()[: SAMPLE + 100], f"stops at byte {SAMPLE}, and there is more"),
        (lambda: whole()[: SAMPLE + 612], "cut, damaged or no tar (unexpected end of data)"),
        (lambda: whole() + whole(), "WebDataset reads 6 members and stops at byte"),
        (
            lambda: whole()[:SAMPLE] + b"\xff" * 512 + whole()[SAMPLE + 512 :],
            f"reads 2 members and stops at byte {SAMPLE}",
        ),
        (lambda: pack([("a.jpg", JPG), ("a.JPG", JPG)]), "member a.JPG: got a second .jpg of one sample"),
        (lambda: pack([("a.pkl", b"x")]), "member a.pkl, allowed: what can be read without unpickling"),
        (lambda: pack([("a.__bad__", b"x")]), "member a.__bad__, allowed: a suffix that WebDataset does not reserve"),
        (lambda: pack([("a\n\udcff.pkl", b"x")]), r"member a\n\udcff.pkl, allowed: "),
    ],
    ids=range(11),
)
def test_a_tar_that_webdataset_would_not_read_whole_is_refused_in_one_line(damaged, said: str):
    with pytest.raises(ValueError, match=r"^a\.tar: ") as error:
        read_tar(damaged(), "a.tar")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_tar_has_no_samples():
    assert read_tar(pack([]), "a.tar").samples == []


def test_a_tar_without_an_end_is_read_and_noted():
    data = whole().rstrip(b"\0")
    data += b"\0" * (-len(data) % 512)
    tar = read_tar(data, "a.tar")
    assert len(tar.good_samples) == len(webdataset_samples(data)) == 3
    assert tar.notes == ["a.tar: ends without the two blocks of zeros that end a tar: it may have been cut"]


def test_names_of_any_encoding_and_length_have_keys_in_utf_8():
    names = ["ä/é", "caf\udce9", "x" * 300, "a\nb"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = pack([(f"{name}.json", record(0, image=False)) for name in names], form)
        tar = read_tar(data, "a.tar")
        assert [sample.key for sample in tar.good_samples] == names
        assert [row["key"] for row in make_index_rows(tar, data, "a.tar")] == ["ä/é", r"caf\udce9", "x" * 300, "a\nb"]


def test_a_sparse_image_is_refused():
    member = tarfile.TarInfo("a.jpg")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, len(JPG)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, len(JPG))
    header[483:495] = b"%011o\0" % (len(JPG) + 4096)
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    data = bytes(header) + JPG.ljust(-len(JPG) // 512 * -512, b"\0") + pack([("a.json", record(0))])
    (sample,) = read_tar(data, "a.tar").samples
    assert sample.rejection_reason == "sparse member"


def test_samples_behind_ten_gigabytes_are_found_where_they_are(tmp_path: Path):
    """The file is sparse, so neither disk nor test reads the empty part."""
    size, head, tail = 10 * 2**30, pack([("a.json", record(0, image=False))])[:1024], pack([*_named("b")])
    large = tarfile.TarInfo("README")
    large.size = size
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(head + large.tobuf(tarfile.GNU_FORMAT))
        file.seek(size, io.SEEK_CUR)
        file.write(tail)
    with (tmp_path / "a.tar").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        tar = read_tar(data, "a.tar")
        found = make_index_rows(tar, data, "a.tar")
        assert [row["offset"] for row in found] == [0, 1024 + 512 + size]
        start = found[1]["offset"] + found[1]["image_at"]
        assert data[start : start + found[1]["image_size"]] == JPG
    assert tar.ignored == Counter({"no suffix": 1})


def _named(key: str) -> list[Entry]:
    return [(f"{key}.{suffix}", body) for suffix, body in _pair(0)]
