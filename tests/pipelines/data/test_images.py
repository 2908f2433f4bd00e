"""Tests of images: files in the folder are found by any spelling of their path, and are checked by decoding."""

import io
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.images import ImageFolder, OutsideError, check_image

NAMES = [
    "with space.jpg", "hash#1.jpg", "what?.jpg", "100%25.jpg", "[1].jpg", "a&b+c.jpg", "ä.jpg", "back\\slash.jpg",
    "汉字 😀.jpg", "-rf.jpg", "a:b.jpg", "~.jpg", "a::b.jpg", "..a.jpg", ".hidden", "sub/a.jpg",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "img"
    (images / "sub").mkdir(parents=True)
    for name in [*NAMES, unicodedata.normalize("NFD", "ü.jpg")]:
        (images / name).write_bytes(name.encode())
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return images


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_literally(folder: Path, name: str) -> None:
    for url in (str(folder), f"{folder}/", f"file://{folder}"):
        for path in (name, f"./{name}", f"sub/..//{name}", f"{folder}/{name}", f"file://{folder}/{name}"):
            assert ImageFolder(url).read(path) == name.encode()


def test_a_path_is_read_as_others_write_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageFolder(str(folder))
    for path in ("sub\\a.jpg", ".\\sub\\a.jpg", "SUB/A.JPG", "Sub\\a.jpg"):
        assert images.read(path) == b"sub/a.jpg"
    assert images.read(f"file://{folder}/with%20space.jpg") == b"with space.jpg"
    composed = unicodedata.normalize("NFC", "ü.jpg")
    assert images.read(composed) == images.read("Ü.jpg") == unicodedata.normalize("NFD", "ü.jpg").encode()
    assert images.read(unicodedata.normalize("NFD", "ä.jpg")) == "ä.jpg".encode()
    assert ImageFolder("/").read(f"{folder}/sub/a.jpg") == ImageFolder("/").read(f"{folder}/sub/a.jpg"[1:])
    monkeypatch.chdir(folder)
    assert ImageFolder(".").read("sub/a.jpg") == ImageFolder(".").read(f"{folder}/sub/a.jpg") == b"sub/a.jpg"
    (tmp_path / "link").symlink_to(folder)
    for path in (f"{folder}/sub/a.jpg", f"{tmp_path}/link/sub/a.jpg"):
        assert ImageFolder(str(tmp_path / "link")).read(path) == b"sub/a.jpg"


def test_names_that_differ_in_capitals_are_two_files(folder: Path) -> None:
    for name in ("a.jpg", "A.jpg"):
        (folder / name).write_bytes(name.encode())
        assert ImageFolder(str(folder)).read(name) == name.encode()
    with pytest.raises(FileNotFoundError):
        ImageFolder(str(folder)).read("a.JPG")


@pytest.mark.parametrize(
    "path",
    ["../secret.jpg", "sub/../../secret.jpg", "..\\secret.jpg", "sub\\..\\..\\secret.jpg", "/etc/passwd", "..", ".",
     "s3://other/a.jpg", "file:///etc/passwd", "http://a/b.jpg", "{tmp}/secret.jpg", "{tmp}/img/../secret.jpg",
     "file://{tmp}/secret.jpg", "{tmp}/img2/a.jpg"],
)  # fmt: skip
def test_a_path_that_leads_out_is_kept_out(folder: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(OutsideError):
        ImageFolder(str(folder)).read(path.format(tmp=tmp_path))


@pytest.mark.parametrize(
    "path", ["none.jpg", "", "sub", "a\0.jpg", "a\ud83d.jpg", "x" * 5000, "a/" * 3000 + "b", "pipe"]
)
def test_what_is_no_file_is_missing(folder: Path, path: str) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "circle").symlink_to(folder / "circle")
    for name in (path, "circle"):
        with pytest.raises(FileNotFoundError):
            ImageFolder(str(folder)).read(name)


def test_bytes_that_are_no_utf8_name_their_file(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"latin")
    assert ImageFolder(str(folder)).read("caf\udce9.jpg") == b"latin"


def file(kind: str, mode: str = "RGB", size: tuple[int, int] = (60, 40), **how: Any) -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(sink, kind, **how)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode", "suffix"),
    [("JPEG", "RGB", "jpg"), ("JPEG", "CMYK", "jpg"), ("JPEG", "L", "jpg"), ("PNG", "RGB", "png"), ("PNG", "P", "png"),
     ("PNG", "1", "png"), ("PNG", "LA", "png"), ("PNG", "I;16", "png"), ("GIF", "RGB", "gif"), ("WEBP", "RGBA", "webp"),
     ("BMP", "RGB", "bmp"), ("TIFF", "F", "tif"), ("PPM", "RGB", "ppm"), ("JPEG2000", "RGB", "jp2"),
     ("AVIF", "RGB", "avif"), ("ICO", "RGBA", "ico"), ("TGA", "RGB", "tga"), ("PCX", "RGB", "img")],
)  # fmt: skip
def test_what_decodes_is_an_image_of_its_formats_suffix(kind: str, mode: str, suffix: str) -> None:
    assert check_image(file(kind, mode)) == suffix


def test_a_phones_jpeg_with_a_second_picture_is_a_jpeg() -> None:
    second = Image.new("RGB", (32, 24))
    assert check_image(file("MPO", save_all=True, append_images=[second])) == "jpg"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_file_cut_anywhere_is_broken(kind: str, share: float) -> None:
    whole = file(kind)
    with pytest.raises(ValueError, match=r"\w"):
        check_image(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\0\0\0\x18ftypheic" + b"\0" * 60, b"<svg/>"])
def test_what_is_no_image_is_broken(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^no format that Pillow knows$"):
        check_image(data)


def test_a_bomb_is_broken_and_what_training_takes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        check_image(file("PNG"))
    assert check_image(file("PNG", size=(50, 30))) == "png"
