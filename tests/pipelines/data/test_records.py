"""Tests of records: every unusable record has its reason, and records that LLaVA's trainer reads have none."""

from typing import Any

import pytest

from pipelines.data.records import (
    MISSING,
    RECORD_REASONS,
    count_words,
    find_rejection,
    has_image,
    shorten,
)

ASK = {"from": "human", "value": "<image>\nis it red?"}
SAY = {"from": "gpt", "value": "yes"}
MORE = [{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes, sure"}]
SYSTEM = {"from": "system", "value": "Be brief."}
GOOD: dict[str, Any] = {"id": "a", "image": "b/c.jpg", "conversations": [ASK, SAY, *MORE]}
TEXT = {"id": "t", "conversations": MORE}


def turn(number: int, **changes: Any) -> dict[str, Any]:
    """Make the valid record with another turn."""
    turns = [*GOOD["conversations"]]
    turns[number] = {**turns[number], **changes}
    return {**GOOD, "conversations": turns}


def text_record(question: str, answer: str = "It is.") -> dict[str, Any]:
    """Make a text-only record."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def without_field(name: str, record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    "record",
    [
        GOOD,
        TEXT,
        {**GOOD, "id": 7},
        {**GOOD, "id": 7.5},
        {**GOOD, "id": None},
        {**GOOD, "id": ["a"]},
        without_field("id", GOOD),
        {**TEXT, "model": ""},
        {**TEXT, "image": None},
        {**TEXT, "video": None, "images": [], "audio": ""},
        {**GOOD, "score": float("nan"), "more": {"k\ud83d": [None]}, "": 1},
        {**GOOD, "image_url": "https://a/b.jpg", "images": ["b/c.jpg"], "image_id": 3},
        {**TEXT, "image_id": 3, "video_id": "x", "source": "a.mp4"},
        turn(0, weight=1, name="image"),
        turn(0, value="is it red?\n<image>"),
        turn(0, value="<image>\n"),  # a caption: nothing is asked
        turn(0, value="<image><image>"),  # LLaVA's trainer makes one of them
        {**GOOD, "conversations": [*MORE, {"from": "human", "value": "<image>"}, SAY]},
        {**GOOD, "conversations": [MORE[0], {"from": "gpt", "value": "yes <image>"}]},
        turn(2, value="and <b>this</b>?"),
        {**GOOD, "conversations": [SYSTEM, *GOOD["conversations"]]},
        {**TEXT, "conversations": [SYSTEM, *MORE]},
    ],
    ids=ascii,
)
def test_what_llavas_trainer_reads_is_kept(record: dict) -> None:
    assert find_rejection(record, None) is None


@pytest.mark.parametrize(
    ("record", "reason", "field", "value"),
    [
        (None, "wrong fields", "", "null"),
        ([1], "wrong fields", "", "[1]"),
        ({**GOOD, "conversations": None}, "wrong fields", "conversations", "null"),
        ({"id": "a", "messages": []}, "wrong fields", "conversations", f'{MISSING}; there are ["id", "messages"]'),
        ({**GOOD, "conversations": ["a"]}, "wrong fields", "conversations[0]", "a"),
        (turn(1, value=None), "wrong fields", "conversations[1].value", "null"),
        (turn(1, value=3), "wrong fields", "conversations[1].value", "3"),
        ({**TEXT, "conversations": [{"value": "a"}]}, "wrong fields", "conversations[0].from", MISSING),
        ({**GOOD, "image": ["b.jpg"]}, "unsupported image", "image", '["b.jpg"]'),
        ({**GOOD, "image": 3}, "unsupported image", "image", "3"),
        ({**GOOD, "conversations": []}, "turn order", "conversations", "0 turns"),
        ({**GOOD, "conversations": [ASK]}, "turn order", "conversations", "1 turns"),
        ({**GOOD, "conversations": [ASK, SAY, MORE[1]]}, "turn order", "conversations[2].from", "gpt"),
        ({**TEXT, "conversations": MORE[::-1]}, "turn order", "conversations[0].from", "gpt"),
        (turn(0, **{"from": "Human"}), "turn order", "conversations[0].from", "Human"),
        (turn(1, **{"from": "assistant"}), "turn order", "conversations[1].from", "assistant"),
        ({**TEXT, "conversations": [SYSTEM]}, "turn order", "conversations", "1 turns"),
        ({**TEXT, "conversations": [SYSTEM, *MORE[:1]]}, "turn order", "conversations", "2 turns"),
        ({**TEXT, "conversations": [SYSTEM, SYSTEM, *MORE]}, "turn order", "conversations[1].from", "system"),
        ({**TEXT, "conversations": [SYSTEM, *MORE[::-1]]}, "turn order", "conversations[1].from", "gpt"),
        ({**TEXT, "conversations": [{**SYSTEM, "value": ""}, *MORE]}, "empty turn", "conversations[0].value", ""),
        (
            {**GOOD, "conversations": [{**SYSTEM, "value": "<image>"}, *MORE]},
            "tag in system message",
            "conversations[0].value",
            "<image>",
        ),
        ({**GOOD, "conversations": [SYSTEM, *MORE]}, "image without tag", "conversations[1].value", "sure?"),
        (turn(1, value=" "), "empty turn", "conversations[1].value", " "),
        (turn(1, value="<image>"), "empty turn", "conversations[1].value", "<image>"),
        (turn(2, value=""), "empty turn", "conversations[2].value", ""),
        (text_record(" "), "empty turn", "conversations[0].value", " "),
        (turn(1, value="Great \ud83d"), "broken text", "conversations[1].value", "Great \\ud83d"),
        (turn(0, value="is it red?"), "image without tag", "conversations[0].value", "is it red?"),
        (without_field("image", GOOD), "tag without image", "image", MISSING),
        ({**GOOD, "image": None}, "tag without image", "image", "null"),
        (turn(2, value="<image> sure?"), "several tags", "conversations[2].value", "<image>"),
        (turn(1, value="yes <image>"), "several tags", "conversations[1].value", "<image>"),
        (turn(0, value="<ima<image>ge>?"), "several tags", "conversations[0].value", "<image>"),
    ],
    ids=ascii,
)
def test_what_cannot_be_used_has_its_reason_with_the_field_and_its_value(
    record: Any, reason: str, field: str, value: str
) -> None:
    fault = find_rejection(record, None)
    assert fault is not None
    assert (fault.reason, fault.field, fault.value) == (reason, field, value)
    assert fault.explanation == RECORD_REASONS[reason]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**TEXT, "video": "x.mp4"}, "video"),
        ({**GOOD, "videos": ["x.mp4"]}, "video"),
        ({**TEXT, "video_path": "x.mp4"}, "video"),
        ({**TEXT, "audio": {"path": "x.wav"}}, "audio"),
        ({**TEXT, "speech": "x.wav"}, "audio"),
        ({**TEXT, "point_cloud": "x.ply"}, "point cloud"),
        ({**TEXT, "images": ["a.jpg"]}, "unsupported image"),
        ({**TEXT, "Image": "a.jpg"}, "unsupported image"),
        ({**TEXT, "image_file": "a.jpg"}, "unsupported image"),
        ({**TEXT, "imagePath": "a.jpg"}, "unsupported image"),
        ({"conversations": [{**MORE[0], "image": "a.jpg"}, MORE[1]]}, "unsupported image"),
        ({"conversations": [{**MORE[0], "video": "a.mp4"}, MORE[1]]}, "video"),
        ({"video": "x.mp4", "QA": []}, "video"),
        (text_record("<video>\nWhat happens?"), "video"),
        (text_record("What happens in <video>?"), "video"),
        (turn(0, value="<image>\n<video>"), "video"),
        (text_record("<|video_pad|> What?"), "video"),
        (text_record("<audio>\nWho speaks?"), "audio"),
        (text_record("<|AUDIO|>Who?"), "audio"),
        (text_record("<|audio_bos|>Who?"), "audio"),
        (text_record("<speech>\nAnswer."), "audio"),
        (text_record("<point>\nWhat is it?"), "point cloud"),
        (text_record("<Image>\nWhat?"), "unsupported image"),
        (text_record("<IMAGE>\nWhat?"), "unsupported image"),
        (text_record("<img>a.jpg</img>What?"), "unsupported image"),
        (text_record("Picture 1: <img>a.jpg</img>\nWhat?"), "unsupported image"),
        (text_record("What is in <image 1>?"), "unsupported image"),
        (text_record("<image_1> and <image2>?"), "unsupported image"),
        (text_record("<ImageHere>What?"), "unsupported image"),
        (text_record("<im_start><im_end>What?"), "unsupported image"),
        (text_record("<|vision_start|><|image_pad|><|vision_end|>What?"), "unsupported image"),
        (text_record("[IMG]What?"), "unsupported image"),
        (turn(0, value="<Image><image></Image>\nWhat?"), "unsupported image"),
        (turn(0, value="(<image>./</image>)\nWhat?"), "unsupported image"),
        (text_record("Draw it.", "Here it is:\n<image_token>\nDone."), "unsupported image"),
    ],
    ids=ascii,
)
def test_content_that_is_neither_an_image_nor_text_is_kept_out_under_its_name(record: dict, reason: str) -> None:
    fault = find_rejection(record, None)
    assert fault is not None
    assert fault.reason == reason


@pytest.mark.parametrize(
    "record",
    [
        text_record("What does the <video> tag do?"),
        text_record("What is a <audio> element?"),
        text_record("Explain `<video>`."),
        text_record('What is "<img>" in HTML?'),
        text_record("Mend this:\n```html\n<video>\n</video>\n```"),
        text_record("Mend this: <div><video></video></div>"),
        text_record("What is wrong with <img src='a.jpg'>?"),
        text_record("What is <video controls src='a.mp4'>?"),
        text_record("How do I play a film?", "Use <video> for films, and <audio> for sound."),
        text_record("How do I play a film?", "So:\n```\n<video>\n```"),
        text_record("<|im_start|>user"),
        text_record("List<Image> images = new List<Image>();", "a"),
        text_record("if a<b and c>d: <points to it>, <visually>"),
        text_record("I saw a video. [image]"),
    ],
    ids=ascii,
)
def test_text_about_tags_is_text(record: dict) -> None:
    assert find_rejection(record, None) is None


def test_length_is_the_number_of_words_without_the_image() -> None:
    assert count_words(GOOD) == 3 + 1 + 1 + 2
    assert find_rejection(GOOD, 7) is None
    fault = find_rejection(GOOD, 6)
    assert fault is not None
    assert (fault.reason, fault.value) == ("too long", "7 words")
    assert has_image(GOOD)
    assert not has_image({**TEXT, "image": None})


def test_a_value_is_shown_in_part_and_as_any_file_can_hold_it() -> None:
    assert shorten("a" * 1000) == "a" * 200 + "… (1000 characters)"
    assert shorten("\udc00é") == "\\udc00é"
    assert shorten("a\n\u2028\x1b b") == "a\\n\\u2028\\x1b b"
    assert shorten({"a": float("nan")}) == '{"a": NaN}'
