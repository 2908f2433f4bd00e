"""Programs that load a saved folder by transformers' own classes ask the model as it was trained."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from redux import answering
from redux.answering import LlavaAnswerer
from redux.conversation import IMAGE_TOKEN, TEMPLATES, encode_conversation
from redux.image import load_pixels
from redux.model import ReduxForConditionalGeneration, normalize_pixels
from redux.processor import build_processor, record_training_format
from redux.settings import VMTC, ImageAspectRatio, TemplateName

Tiny = Callable[..., ReduxForConditionalGeneration]

TURNS = {
    "question": [("user", True, "Is it a red circle?")],
    "without image": [("user", False, "Is it a red circle?")],
    "spaces": [("user", True, "  Is it a red circle? \n")],
    "image alone": [("user", True, "")],
    "several turns": [
        ("user", True, "Is it a red circle?"),
        ("assistant", False, "yes, it is."),
        ("user", False, "Is it a shape?"),
    ],
}


def picture(width: int = 50, height: int = 37) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def as_file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def saved(tiny: Tiny, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Path]:
    """Folder of a model that was trained with a template and an image fit."""

    def save(template: TemplateName, image_aspect_ratio: ImageAspectRatio = "pad", vmtc: VMTC | None = None) -> Path:
        model = tiny(vmtc=vmtc)
        tokenizer.chat_template = "{{ messages }}"  # One that the model did not learn from
        record_training_format(model, tokenizer, template, image_aspect_ratio)
        model.save_pretrained(tmp_path)
        build_processor(model.config, tokenizer).save_pretrained(tmp_path)
        return tmp_path

    return save


def conversation(turns: list[tuple[str, bool, str]]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The same conversation as messages of a chat, and as turns of a LLaVA record."""
    messages, record = [], []
    for role, shows, text in turns:
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture()}] if shows else []
        messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
        value = f"{IMAGE_TOKEN}\n{text.strip()}".strip() if shows else text
        record.append({"from": {"user": "human", "assistant": "gpt"}[role], "value": value})
    return messages, record


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("vmtc", [None, VMTC()], ids=["all tokens", "half"])
@pytest.mark.parametrize("template", ["vicuna_v1", "vicuna_bare"])
def test_the_processor_gives_the_ids_of_training(
    saved: Callable[..., Path], template: TemplateName, vmtc: VMTC | None, kind: str
) -> None:
    folder = saved(template, vmtc=vmtc)
    messages, record = conversation(TURNS[kind])
    processor = AutoProcessor.from_pretrained(folder)
    got = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    count = 8 if vmtc else 16
    expected, _ = encode_conversation(AutoTokenizer.from_pretrained(folder), record, TEMPLATES[template], count)
    assert got["input_ids"][0] == expected.tolist()
    assert sum(token == processor.image_token_id for token in expected) == count * any(
        shows for _, shows, _ in TURNS[kind]
    )


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "crop"])
@pytest.mark.parametrize("size", [(50, 37), (20, 64), (32, 32)])
def test_the_processor_gives_the_pixels_of_training(
    saved: Callable[..., Path], image_aspect_ratio: ImageAspectRatio, size: tuple[int, int]
) -> None:
    processor = AutoProcessor.from_pretrained(saved("vicuna_v1", image_aspect_ratio))
    image = picture(*size)
    got = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    expected = normalize_pixels(torch.from_numpy(load_pixels(as_file(image), 32, image_aspect_ratio)[None].copy()))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # The same grey levels, normalised in another order


def test_generation_is_greedy_and_ends_as_the_template_does(saved: Callable[..., Path]) -> None:
    folder = saved("vicuna_v1")
    tokenizer, settings = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not settings.do_sample


def test_a_system_message_takes_the_place_of_the_templates(saved: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved("vicuna_v1"))
    system = {"role": "system", "content": "Is it red?"}
    text = tokenizer.apply_chat_template([system, {"role": "user", "content": "yes"}], tokenize=False)
    assert text.removeprefix(tokenizer.bos_token) == "Is it red? USER: yes"


def test_captions_leave_no_chat_template(saved: Callable[..., Path]) -> None:
    folder = saved("plain")
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    with pytest.raises(ValueError, match=r"template: got plain, .* allowed: a model that was last trained with que"):
        answering.load(folder)


@pytest.mark.parametrize("template", ["vicuna_v1", "vicuna_bare"])
@pytest.mark.parametrize("image_aspect_ratio", ["pad", "crop"])
def test_a_model_is_asked_as_it_was_trained(
    saved: Callable[..., Path], template: TemplateName, image_aspect_ratio: ImageAspectRatio
) -> None:
    folder = saved(template, image_aspect_ratio)
    asked = answering.load(folder)
    assert isinstance(asked, LlavaAnswerer)
    assert (asked.template, asked.image_aspect_ratio) == (TEMPLATES[template], image_aspect_ratio)
    other_fit: ImageAspectRatio = "crop" if image_aspect_ratio == "pad" else "pad"
    message = f"image_aspect_ratio: got {other_fit}, allowed: {image_aspect_ratio}, with which the model was trained"
    with pytest.raises(ValueError, match=message):
        answering.load(folder, image_aspect_ratio=other_fit)
    other_template: TemplateName = "vicuna_bare" if template == "vicuna_v1" else "vicuna_v1"
    with pytest.raises(ValueError, match=f"template: got {other_template}, allowed: {template}"):
        answering.load(folder, template=other_template)
    mismatched = answering.load(folder, template=other_template, image_aspect_ratio=other_fit, allow_mismatch=True)
    assert isinstance(mismatched, LlavaAnswerer)
    assert (mismatched.template, mismatched.image_aspect_ratio) == (TEMPLATES[other_template], other_fit)


def test_a_model_that_does_not_say_is_asked_as_llava(tiny: Tiny, tokenizer: Any, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = answering.load(tmp_path)
    assert isinstance(asked, LlavaAnswerer)
    assert (asked.template, asked.image_aspect_ratio) == (TEMPLATES["vicuna_v1"], "pad")
