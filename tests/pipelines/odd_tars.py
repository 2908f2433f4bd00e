"""Random tars from a seed, with typical names and members, valid and damaged."""

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
    """Make a record in LLaVA's form."""
    turns = [("human", f"{'<image>' if image else ''}what {number}?"), ("gpt", "red")]
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]}).encode()


def pack(entries: list[Entry], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Make a tar of (name, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, body in entries:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def odd_tar(seed: int) -> bytes:
    """Make a tar with odd names, members and order, sometimes damaged."""
    rng = random.Random(seed)
    wild = rng.random()  # half of the tars have next to nothing wrong, so that many are kept
    entries: list[Entry] = []
    folder, stem = rng.choice(FOLDERS), rng.choice(STEMS)
    for number in range(rng.randint(0, 9)):
        if rng.random() < wild / 4:
            folder = rng.choice(FOLDERS)
        if rng.random() < wild / 4:
            stem = rng.choice(STEMS)
        base, image = folder + stem.format(n=number), rng.random() < 0.8
        sample = [(f"{base}.json", record(number, image))]
        if image:
            suffix = rng.choice(["jpg", "jpg", "png", "webp"])
            sample.append((f"{base}.{suffix}", PICTURES[suffix]))
        if rng.random() < wild / 2:
            suffix = rng.choice([*OTHERS, *PICTURES])
            sample.append((f"{base}.{suffix}", PICTURES.get(suffix, b"7" * rng.choice([0, 1, 512, 700]))))
        if rng.random() < wild / 6:
            sample.append((base, b"no suffix"))
        if rng.random() < wild / 6:
            sample.pop(rng.randrange(len(sample)))
        rng.shuffle(sample)
        entries += sample
    if rng.random() < wild / 5:
        rng.shuffle(entries)
    data = _packed(entries, rng, wild)
    for damage in DAMAGES:
        if rng.random() < wild / 12:
            data = damage(data, rng)
    return data


def _packed(entries: list[Entry], rng: random.Random, wild: float) -> bytes:
    buffer = io.BytesIO()
    form = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as tar:
        for name, body in entries:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            if rng.random() < wild / 20:
                member.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
                member.linkname, member.size = rng.choice(entries)[0][:90], 0
            if form == tarfile.PAX_FORMAT and rng.random() < wild / 10:
                member.pax_headers = {"comment": "x" * rng.randint(0, 900)}
            try:
                tar.addfile(member, io.BytesIO(body) if member.size else None)
            except ValueError:  # too long a name for ustar
                continue
    return buffer.getvalue()


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([rng.randrange(len(data) + 1), rng.randrange(len(data) // 512 + 1) * 512])]


def _flip(data: bytes, rng: random.Random) -> bytes:
    """Change bytes in headers, and update the checksum of some."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        block = rng.randrange(max(1, len(data) // 512)) * 512
        place = block + rng.randrange(512)
        if place < len(changed):
            changed[place] = rng.choice([0, 32, 48, 49, 53, 55, 75, 76, 83, 103, 120, 128, 255])
        if rng.random() < 0.7 and block + 512 <= len(changed):
            _sign(changed, block)
    return bytes(changed)


def _resize(data: bytes, rng: random.Random) -> bytes:
    """Change the size in the first header: huge, negative, or off by one."""
    changed = bytearray(data)
    if len(changed) < 512:
        return data
    big = b"\x80" + (2 ** rng.choice([33, 62, 80])).to_bytes(11, "big")
    changed[124:136] = rng.choice([b"77777777777\0", b"\xff" * 12, big, b"1".zfill(11) + b"\0", b"-1".ljust(12, b"\0")])
    _sign(changed, 0)
    return bytes(changed)


def _sign(data: bytearray, block: int) -> None:
    """Update the checksum of the header at this offset."""
    header = data[block : block + 512]
    data[block + 148 : block + 156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut,
    _flip,
    _resize,
    lambda data, rng: data + data,
    lambda data, rng: data.rstrip(b"\0"),
    lambda data, rng: data + b"\0" * rng.choice([1, 512, 5000]),
    lambda data, rng: data + b"more",
    lambda data, rng: b"",
    lambda data, rng: b"no tar at all" * 100,
    lambda data, rng: gzip.compress(data),
)
