"""Tars as people have them, whole and damaged, made from a seed."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable

from PIL import Image

Entry = tuple[str, bytes]


def picture(form: str = "JPEG", colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), colour).save(buffer, form)
    return buffer.getvalue()


PICTURES = {"jpg": picture(), "png": picture("PNG"), "webp": picture("WEBP"), "depth.png": picture("PNG", (0, 0, 0))}
FOLDERS = ("", "", "", "a/", "./", "../", "/abs/", "v1.0/", "a.b/", "__meta__/", "ü/", "long" * 40 + "/")
STEMS = ("{n}", "{n:09d}", "shot.{n}", "22.{n:02d}", "", ".{n}", "a b{n}", "é{n}", "{n}\udcff", "{n}\nx", "x" * 120)
OTHERS = ("txt", "cls", "id", "info.json", "JSON", "JPG", "jpg.json", "bin", "", "d", "__bad__", "__key__", "pkl")


def record(number: int, image: bool = True) -> bytes:
    """A record of LLaVA's form."""
    turns = [("human", f"{'<image>' if image else ''}what {number}?"), ("gpt", "red")]
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]}).encode()


def pack(entries: list[Entry], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of files by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, body in entries:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def odd_tar(seed: int) -> bytes:
    """A tar with odd names and members, in an odd order, sometimes damaged."""
    chance = random.Random(seed)
    wild = chance.random()  # half of the tars have next to nothing wrong, so that many are kept
    entries: list[Entry] = []
    folder, stem = chance.choice(FOLDERS), chance.choice(STEMS)
    for number in range(chance.randint(0, 9)):
        if chance.random() < wild / 4:
            folder = chance.choice(FOLDERS)
        if chance.random() < wild / 4:
            stem = chance.choice(STEMS)
        base, image = folder + stem.format(n=number), chance.random() < 0.8
        sample = [(f"{base}.json", record(number, image))]
        if image:
            suffix = chance.choice(["jpg", "jpg", "png", "webp"])
            sample.append((f"{base}.{suffix}", PICTURES[suffix]))
        if chance.random() < wild / 2:
            suffix = chance.choice([*OTHERS, *PICTURES])
            sample.append((f"{base}.{suffix}", PICTURES.get(suffix, b"7" * chance.choice([0, 1, 512, 700]))))
        if chance.random() < wild / 6:
            sample.append((base, b"no suffix"))
        if chance.random() < wild / 6:
            sample.pop(chance.randrange(len(sample)))
        chance.shuffle(sample)
        entries += sample
    if chance.random() < wild / 5:
        chance.shuffle(entries)
    data = _packed(entries, chance, wild)
    for damage in DAMAGES:
        if chance.random() < wild / 12:
            data = damage(data, chance)
    return data


def _packed(entries: list[Entry], chance: random.Random, wild: float) -> bytes:
    buffer = io.BytesIO()
    form = chance.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as tar:
        for name, body in entries:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            if chance.random() < wild / 20:
                member.type = chance.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
                member.linkname, member.size = chance.choice(entries)[0][:90], 0
            if form == tarfile.PAX_FORMAT and chance.random() < wild / 10:
                member.pax_headers = {"comment": "x" * chance.randint(0, 900)}
            try:
                tar.addfile(member, io.BytesIO(body) if member.size else None)
            except ValueError:  # too long a name for ustar
                continue
    return buffer.getvalue()


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.choice([chance.randrange(len(data) + 1), chance.randrange(len(data) // 512 + 1) * 512])]


def _flip(data: bytes, chance: random.Random) -> bytes:
    """Other bytes in headers, some with a checksum that fits them."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        block = chance.randrange(max(1, len(data) // 512)) * 512
        place = block + chance.randrange(512)
        if place < len(changed):
            changed[place] = chance.choice([0, 32, 48, 49, 53, 55, 75, 76, 83, 103, 120, 128, 255])
        if chance.random() < 0.7 and block + 512 <= len(changed):
            _sign(changed, block)
    return bytes(changed)


def _resize(data: bytes, chance: random.Random) -> bytes:
    """Another size in the first header: huge, negative, or one too many."""
    changed = bytearray(data)
    if len(changed) < 512:
        return data
    big = b"\x80" + (2 ** chance.choice([33, 62, 80])).to_bytes(11, "big")
    changed[124:136] = chance.choice(
        [b"77777777777\0", b"\xff" * 12, big, b"1".zfill(11) + b"\0", b"-1".ljust(12, b"\0")]
    )
    _sign(changed, 0)
    return bytes(changed)


def _sign(data: bytearray, block: int) -> None:
    """Give the header at this byte the checksum that fits it."""
    header = data[block : block + 512]
    data[block + 148 : block + 156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut,
    _flip,
    _resize,
    lambda data, chance: data + data,
    lambda data, chance: data.rstrip(b"\0"),
    lambda data, chance: data + b"\0" * chance.choice([1, 512, 5000]),
    lambda data, chance: data + b"more",
    lambda data, chance: b"",
    lambda data, chance: b"no tar at all" * 100,
    lambda data, chance: gzip.compress(data),
)
