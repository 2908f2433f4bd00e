"""Every way in which a record or its image cannot be used has its reason, and nothing that can be used has one."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.records import REASONS, fault, image_fault, inside, length, read

ASK = {"from": "human", "value": "<image>\nis it red?"}
SAY = {"from": "gpt", "value": "yes"}
MORE = [{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes, sure"}]
GOOD: dict[str, Any] = {"id": "a", "image": "b/c.jpg", "conversations": [ASK, SAY, *MORE]}
TEXT = {"id": "t", "conversations": MORE}


def turn(number: int, **changes: Any) -> dict[str, Any]:
    """The good record with another turn."""
    turns = [*GOOD["conversations"]]
    turns[number] = {**turns[number], **changes}
    return {**GOOD, "conversations": turns}


@pytest.mark.parametrize(
    "record",
    [
        GOOD,
        TEXT,
        {**GOOD, "id": 7},
        {**TEXT, "model": ""},
        turn(0, value="is it red?\n<image>"),
        turn(0, value="<image>\n"),  # a caption: nothing is asked
        turn(2, value="and <b>this</b>?"),
    ],
    ids=str,
)
def test_what_llavas_mixtures_hold_is_kept(record: dict) -> None:
    assert fault(record, None) is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "malformed"),
        ([GOOD], "malformed"),
        ({**GOOD, "conversations": None}, "malformed"),
        ({"id": "a"}, "malformed"),
        ({"conversations": MORE}, "malformed"),
        ({**GOOD, "image": ["b.jpg"]}, "malformed"),
        (turn(1, value=None), "malformed"),
        ({**GOOD, "conversations": []}, "roles"),
        ({**GOOD, "conversations": [ASK]}, "roles"),
        ({**GOOD, "conversations": [ASK, SAY, MORE[1]]}, "roles"),
        ({**TEXT, "conversations": MORE[::-1]}, "roles"),
        (turn(1, **{"from": "assistant"}), "roles"),
        (turn(1, value=" "), "empty turn"),
        (turn(2, value=""), "empty turn"),
        ({**TEXT, "conversations": [{"from": "human", "value": " "}, SAY]}, "empty turn"),
        (turn(0, value="is it red?"), "image without tag"),
        ({key: value for key, value in GOOD.items() if key != "image"}, "tag without image"),
        (turn(2, value="<image> sure?"), "tags"),
        ({**GOOD, "image": "../c.jpg"}, "outside"),
        ({**GOOD, "image": "b/../../c.jpg"}, "outside"),
        ({**GOOD, "image": "/etc/passwd"}, "outside"),
        ({**GOOD, "image": "s3://other/c.jpg"}, "outside"),
        ({**GOOD, "image": "..\\c.jpg"}, "outside"),
        ({**GOOD, "image": "b\\..\\..\\c.jpg"}, "outside"),
    ],
    ids=str,
)
def test_what_cannot_be_used_has_its_reason(record: Any, reason: str) -> None:
    assert fault(record, None) == reason
    assert reason in REASONS


def test_length_is_the_number_of_words_without_the_image() -> None:
    assert length(GOOD) == 3 + 1 + 1 + 2
    assert fault(GOOD, 7) is None
    assert fault(GOOD, 6) == "too long"


@pytest.mark.parametrize(
    ("path", "within"),
    [("a/b.jpg", "a/b.jpg"), ("./a//b.jpg", "a/b.jpg"), ("a/../b.jpg", "b.jpg"), ("..a/b.jpg", "..a/b.jpg")],
)
def test_a_path_within_the_folder_is_made_plain(path: str, within: str) -> None:
    assert inside(path) == within


def file(kind: str, **how: Any) -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(sink, kind, **how)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.png", "PNG"), ("a.gif", "GIF"), ("a", "PNG"), ("a.x", "PNG")],
)
def test_a_whole_image_of_the_format_of_its_name_is_kept(name: str, kind: str) -> None:
    assert image_fault(name, file(kind)) is None


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_a_file_of_another_format_than_its_name_is_mislabelled(kind: str) -> None:
    assert image_fault("ocr_vqa/images/1.jpg", file(kind)) == "mislabelled image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_file_cut_anywhere_is_broken(kind: str, share: float) -> None:
    whole = file(kind)
    assert image_fault(f"a.{kind.lower()}", whole[: int(len(whole) * share)]) == "broken image"


def test_a_page_of_html_is_broken() -> None:
    assert image_fault("a.jpg", b"<html>404</html>") == "broken image"


def test_a_bomb_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert image_fault("a.png", file("PNG")) == "broken image"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "x.json: not JSON: "),
        (b"\xff", "x.json: not JSON: "),
        (b"{}", "x.json: got dict, allowed: a list of records"),
    ],
)
def test_a_file_that_is_no_list_is_named(text: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(text, "x.json")
    assert read(json.dumps([GOOD]).encode(), "x.json") == [GOOD]
