"""transformers' Auto classes and pipelines open a saved folder and answer as `redux.answering` does."""

import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    pipeline,
)

from redux import answering
from redux.model import ReduxForConditionalGeneration
from redux.processor import build_processor, record_training_format
from redux.settings import CMAI, VMTC

Tiny = Callable[..., ReduxForConditionalGeneration]

QUESTIONS = ("Is it a red circle?", "What colour is the shape?", "a blue square", "No, green triangle!")
MAX_NEW_TOKENS = 12


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (37, 50, 3), dtype=np.uint8))


def as_file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def ask(text: str, image: Image.Image) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Import `redux.auto`, and undo its registrations afterwards: other tests open models in plain transformers."""
    mapping = AutoModelForImageTextToText._model_mapping
    before = dict(mapping._extra_content)
    importlib.import_module("redux.auto")
    yield
    mapping._extra_content = before
    del sys.modules["redux.auto"]


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with both methods: 8 of 16 patches."""
    model = tiny(vmtc=VMTC(), cmai=CMAI())
    record_training_format(model, tokenizer, "vicuna_v1", "pad")
    path = tmp_path_factory.mktemp("model")
    build_processor(model.config, tokenizer).save_pretrained(path)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    """Answers of `redux.answering`."""
    images = [as_file(picture(number)) for number in range(len(QUESTIONS))]
    return answering.load(folder)(QUESTIONS, images, MAX_NEW_TOKENS).texts


def test_auto_classes_give_the_answers_of_answering(folder: Path, expected: list[str]) -> None:
    assert len(set(expected)) > 1
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, ReduxForConditionalGeneration)
    assert (model.config.vmtc, model.config.cmai) != (None, None)
    for number, (question, answer) in enumerate(zip(QUESTIONS, expected, strict=True)):
        inputs = processor.apply_chat_template(
            ask(question, picture(number)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == answer


def test_the_pipeline_gives_the_answers_of_answering(
    folder: Path, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    ask_model = pipeline("image-text-to-text", model=str(folder))
    conversations = [ask(question, picture(number)) for number, question in enumerate(QUESTIONS)]
    answers = [
        ask_model(text=conversation, max_new_tokens=MAX_NEW_TOKENS, return_full_text=False)[0]["generated_text"].strip()
        for conversation in conversations
    ]
    assert answers == expected
    assert "not supported" not in caplog.text


def test_other_llavas_open_as_before(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny(vmtc=None, cmai=None)
    plain.config.architectures = ["LlavaForConditionalGeneration"]
    config = LlavaConfig(**{**plain.config.to_dict(), "vmtc": None})
    built = AutoModelForImageTextToText.from_config(config)
    assert type(built) is LlavaForConditionalGeneration
    built.save_pretrained(tmp_path)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(opened) is LlavaForConditionalGeneration
    assert all(torch.equal(weight, opened.state_dict()[name]) for name, weight in built.state_dict().items())
    config.architectures = None
    assert type(AutoModelForImageTextToText.from_config(config)) is LlavaForConditionalGeneration


def test_plain_transformers_refuses_compressed_prompts(folder: Path) -> None:
    """Without the import, Auto classes take LLaVA's class. It finds too few image tokens, so no answer is wrong."""
    processor, model = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
    inputs = processor(images=picture(0), text=processor.image_token, return_tensors="pt")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model.generate(**inputs, max_new_tokens=1)
