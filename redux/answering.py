"""One interface to ask image-text-to-text models of transformers about images.

Numbers of two models compare only if both are asked in the same way: greedily, in batches whose padding changes
nothing, with the same counts and times (`redux.generation`). A LLaVA is asked with redux's own templates and pixels,
as it was trained. Any other model is asked through its processor (`redux.adapters`).

The paper's upper limit (Table 1) shows the price of image tokens in following instructions: the model first describes
the image, then answers from the description without the image. The paper gives neither prompt nor length. Here both
are arguments, and the description stands before the question, where the image stood.

Cost: one generation for a batch. The upper limit adds one for images that have no description yet.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from redux.adapters import TransformersModel
from redux.chat_template import find_template, set_end_token
from redux.conversation import IMAGE_TOKEN, Template, encode_conversation, pad_rows
from redux.generation import Answers, check_batch, ensure_pad_token, generate_greedily
from redux.hub import local_copy
from redux.image import load_pixels
from redux.loading import check_image_token, check_layout, load_model, load_tokenizer
from redux.model import ReduxForConditionalGeneration, normalize_pixels
from redux.pretrained import TOWER_CLASSES
from redux.settings import ImageAspectRatio, TemplateName

CAPTION_PROMPT = "Describe the image in detail."

ImageInput = Literal["pixels", "caption"]
"""Input that stands for an image: its pixels, or a caption that the model generates first."""


@runtime_checkable
class Answerer(Protocol):
    """A model that answers prompts about images."""

    def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
        """Answer a batch greedily.

        Args:
            prompts: questions without any template.
            images: an encoded image file for each prompt, None for a prompt without an image.
            max_new_tokens: limit for each answer.

        Raises:
            ValueError: an image cannot be read, or is None and the model answers only about images.
        """

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt without its image, so that prompts of similar lengths share a batch."""


def build_inputs(
    model: ReduxForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[np.ndarray],
    pixels: Sequence[np.ndarray],
) -> dict[str, torch.Tensor]:
    """Build a LLaVA's inputs for a batch of prompts, on the model's device.

    Args:
        model: the LLaVA.
        tokenizer: its tokenizer, with a pad token.
        rows: token ids of each prompt.
        pixels: images in the order of their tokens, each (3, size, size) uint8; none for text alone.
    """
    # Decoding continues the last token of each row, so padding goes left.
    inputs = {
        "input_ids": torch.from_numpy(pad_rows(rows, tokenizer.pad_token_id, left=True)),
        "attention_mask": torch.from_numpy(pad_rows([np.ones_like(row) for row in rows], 0, left=True)),
    }
    if pixels:
        inputs["pixel_values"] = torch.from_numpy(np.stack(pixels))
    # uint8 pixels go to the device and become floats there: a quarter of the bytes to copy.
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if pixels:
        inputs["pixel_values"] = normalize_pixels(inputs["pixel_values"]).to(model.dtype)
    return inputs


@dataclass(frozen=True)
class TrainedLlava:
    """A LLaVA with what its training fixed about its inputs.

    Args:
        model: the LLaVA.
        tokenizer: its tokenizer.
        template: conversation template of its training.
        image_aspect_ratio: "pad" or "crop", as in its training.
    """

    model: ReduxForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    template: Template
    image_aspect_ratio: ImageAspectRatio = "pad"

    def __post_init__(self) -> None:
        ensure_pad_token(self.tokenizer)
        set_end_token(self.tokenizer, self.template)


class LlavaAnswerer(TrainedLlava):
    """An `Answerer` for a LLaVA of this package or a plain one. A batch may mix prompts with and without images."""

    def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
        """Answer a batch, see `Answerer`."""
        check_batch(prompts, images)
        if invalid := next((prompt for prompt in prompts if IMAGE_TOKEN in prompt), None):
            raise ValueError(
                f"prompt: got {invalid!r}, allowed: one without {IMAGE_TOKEN}, which the template puts in front"
            )
        rows = [
            self._encode(prompt if image is None else f"{IMAGE_TOKEN}\n{prompt}")
            for prompt, image in zip(prompts, images, strict=True)
        ]
        # An image that several prompts share is decoded once.
        present = [image for image in images if image is not None]
        size = self.model.config.vision_config.image_size
        squares = {image: load_pixels(image, size, self.image_aspect_ratio) for image in set(present)}
        inputs = build_inputs(self.model, self.tokenizer, rows, [squares[image] for image in present])
        # Answers end with the template's end token, whatever the checkpoint's generation settings are.
        return generate_greedily(self.model, self.tokenizer, inputs, [self.tokenizer.eos_token_id], max_new_tokens)

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt, see `Answerer`."""
        return len(self.tokenizer(prompt)["input_ids"])

    def _encode(self, text: str) -> np.ndarray:
        turns = [{"from": "human", "value": text}]
        return encode_conversation(self.tokenizer, turns, self.template, self.model.config.image_seq_length)[0]


@dataclass(frozen=True)
class CaptionThenAnswer:
    """The paper's upper limit: an `Answerer` that answers from its own caption of the image, without the pixels.

    The time of captioning counts as prefill, in the batch in which an image is new.

    Args:
        answerer: the model.
        caption_prompt: prompt for the caption.
        caption_tokens: limit for the caption.
        captions: captions so far, by SHA-256 of the image; kept for the lifetime of this object.
    """

    answerer: Answerer
    caption_prompt: str = CAPTION_PROMPT
    caption_tokens: int = 256
    captions: dict[bytes, str] = field(default_factory=dict, repr=False)

    def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
        """Answer a batch, see `Answerer`."""
        check_batch(prompts, images)
        # By content: an image that several questions share is captioned once.
        digests = [None if image is None else hashlib.sha256(image).digest() for image in images]
        # First generation: captions of new images.
        new_images = {
            digest: image
            for digest, image in zip(digests, images, strict=True)
            if digest and digest not in self.captions
        }
        caption_s = 0.0
        if new_images:
            captions = self.answerer(
                [self.caption_prompt] * len(new_images), list(new_images.values()), self.caption_tokens
            )
            self.captions.update(zip(new_images, captions.texts, strict=True))
            caption_s = captions.prefill_s + captions.decode_s
        # Second generation: the caption in the place of the image.
        captioned_prompts = [
            f"{self.captions[digest]}\n{prompt}" if digest else prompt
            for prompt, digest in zip(prompts, digests, strict=True)
        ]
        answers = self.answerer(captioned_prompts, [None] * len(prompts), max_new_tokens)
        return Answers(answers.texts, answers.tokens, caption_s + answers.prefill_s, answers.decode_s)

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt without the caption, which does not exist yet; see `Answerer`."""
        return self.answerer.count_tokens(prompt)


def load(
    path: str | PathLike,
    *,
    template: TemplateName | None = None,
    image_aspect_ratio: ImageAspectRatio | None = None,
    allow_mismatch: bool = False,
    image_input: ImageInput = "pixels",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **methods: Any,
) -> Answerer:
    """Load a model that is asked as it was trained.

    Args:
        path: folder, hub id or URL (s3://).
        template: conversation template of a LLaVA: vicuna_v1, vicuna_bare, or chat, that of its tokenizer. None takes
            that of its training; if its configuration has none, LLaVA-1.5's `vicuna_v1`. Other models have their own.
        image_aspect_ratio: "pad" or "crop" for a LLaVA. None takes that of its training; if its configuration has
            none, LLaVA-1.5's `pad`.
        allow_mismatch: allow another template or aspect ratio than in training.
        image_input: "pixels", or "caption" for answers from the model's own captions.
        dtype: None takes that of the checkpoint.
        device: None takes CUDA if there is a GPU.
        methods: settings of the method that replace a LLaVA's own, by their names in `redux.settings.METHODS`. Other
            models can have none.

    Raises:
        ValueError: the path has no image-text-to-text model of transformers, weights are missing, or the model was
            trained with another template or aspect ratio.
    """
    if image_input not in get_args(ImageInput):
        raise ValueError(f"image_input: got {image_input!r}, allowed: {', '.join(get_args(ImageInput))}")
    # Refuse unknown names before anything is read.
    resolve_format({}, template, image_aspect_ratio)
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    # Files of a bucket exist on this disk only inside the with block.
    with local_copy(path, label="model") as folder:
        answerer: Answerer
        if is_llava(folder):
            resolved_template, resolved_aspect_ratio = resolve_format(
                read_config(folder), template, image_aspect_ratio, allow_mismatch
            )
            llava = ReduxForConditionalGeneration.from_pretrained(folder, **options, **methods).eval().to(torch_device)
            tokenizer = load_tokenizer(folder, "model")
            check_image_token(tokenizer, llava.config, path, "model")
            answerer = LlavaAnswerer(
                llava, tokenizer, find_template(resolved_template, tokenizer), resolved_aspect_ratio
            )
        else:
            if unsupported := [name for name, value in methods.items() if value is not None]:
                raise ValueError(f"{unsupported[0]}: got one, allowed: None, because {path} is not a LLaVA")
            model = load_model(AutoModelForImageTextToText, folder, label="model", **options)
            answerer = TransformersModel(model.eval().to(torch_device), _load_processor(folder))
    return CaptionThenAnswer(answerer) if image_input == "caption" else answerer


def resolve_format(
    config: Mapping[str, Any],
    template: TemplateName | None = None,
    image_aspect_ratio: ImageAspectRatio | None = None,
    allow_mismatch: bool = False,
) -> tuple[TemplateName, ImageAspectRatio]:
    """Choose the conversation template and the image aspect ratio for a LLaVA.

    Args:
        config: content of its config.json.
        template, image_aspect_ratio: requested values; None takes those of the training.
        allow_mismatch: allow other values than those of the training.

    Raises:
        ValueError: a name is unknown or differs from the training, or the last training had captions alone.
    """
    trained = {"template": config.get("conversation_template"), "image_aspect_ratio": config.get("image_aspect_ratio")}
    choices = {"template": get_args(TemplateName), "image_aspect_ratio": get_args(ImageAspectRatio)}
    for name, value in {"template": template, "image_aspect_ratio": image_aspect_ratio}.items():
        if value not in (None, *choices[name]):
            raise ValueError(f"{name}: got {value!r}, allowed: {', '.join(choices[name])}")
        if value is not None and trained[name] not in (None, value) and not allow_mismatch:
            raise ValueError(
                f"{name}: got {value}, allowed: {trained[name]}, with which the model was trained, or any other with "
                "allow_mismatch"
            )
    # Models whose configuration names no format are LLaVA-1.5's.
    chosen = template or trained["template"] or "vicuna_v1"
    if chosen == "plain":
        raise ValueError(
            "template: got plain, which is for captions without questions, allowed: a model that was last trained with "
            "questions, or another template with allow_mismatch"
        )
    return chosen, image_aspect_ratio or trained["image_aspect_ratio"] or "pad"


def is_llava(path: str | PathLike, label: str = "model") -> bool:
    """Return True if a folder, hub id or URL has a LLaVA that redux runs. Raises as `read_config`."""
    config = read_config(path, label)
    # Pixtral's model_type is "llava" too; its tower is not CLIP's.
    tower = config.get("vision_config", {}).get("model_type", "clip_vision_model")
    return bool(config["model_type"] == "llava" and tower in TOWER_CLASSES)


def read_config(path: str | PathLike, label: str = "model") -> dict[str, Any]:
    """Read the config.json of an image-text-to-text model.

    Args:
        path: folder, hub id or URL (s3://).
        label: name of the model in an error.

    Raises:
        ValueError: there is no such model, or it has the layout of the LLaVA repository.
    """
    with local_copy(path, [CONFIG_NAME], label) as folder:
        try:
            config, _ = PreTrainedConfig.get_config_dict(folder)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{label}: got {path}, allowed: a folder, hub id or URL of a model; {reason}") from error
    check_layout(config, path, label)
    if (model_type := config.get("model_type")) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"model_type: got {model_type} in the config.json of {path}, "
            "allowed: llava or another image-text-to-text model of transformers"
        )
    return config


def _load_processor(folder: str) -> Any:
    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError as error:  # Qwen2.5-VL's needs torchvision
        reason = " ".join(str(error).split())
        raise ValueError(f"model: got {folder}, whose processor needs another package: {reason}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: got {folder}, allowed: a folder with a processor that can be read; {error}"
        ) from error
