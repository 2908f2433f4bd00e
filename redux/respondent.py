"""Who answers questions about images: one interface to every image-text-to-text model of transformers.

Numbers of two models compare only where both were asked in the same way: greedily, in batches in which padding changes
nothing, with the tokens counted and the time taken at the same places.  A LLaVA, ours or a plain one, is asked with
redux's own templates and pixels, as it was trained; any other model with its processor and chat template, or, where it
is older than those, with the prompt that its authors give.

The paper's upper limit (Table 1) shows what image tokens cost in following instructions: the model first describes the
image, then answers from the description without seeing anything.  The paper gives neither prompt nor length; here both
are arguments, and the description stands where the image stood, before the question.

Cost: one generation for a batch; of a model that is not LLaVA two where prompts with and without images are mixed; for
the upper limit one more, for images that were not described yet.  Timing adds two waits for the device to a batch.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from redux.conversation import IMAGE, TEMPLATES, Template, encode, pad
from redux.hub import fetched
from redux.image import pixels, rgb
from redux.loading import check_image_token, check_layout, load_model, load_tokenizer
from redux.model import ReduxForConditionalGeneration, normalise
from redux.pretrained import TOWERS
from redux.settings import Fit, TemplateName

DESCRIBE = "Describe the image in detail."

ImageInput = Literal["pixels", "caption"]
"""How an image is known to who answers: by itself, or by a description that the model gave of it beforehand."""

PROMPTS = {
    "blip-2": "Question: {} Answer:",  # Li et al. 2023, arXiv 2301.12597, section 4.1, of those with OPT
    "instructblip": "{}",  # Dai et al. 2023, arXiv 2305.06500: instructions in free words, no template around them
    "paligemma": "<image>answer en {}",  # google-research/big_vision, big_vision/configs/proj/paligemma/README.md
}
"""How models without a chat template are asked, by model_type.  None of them answers without an image."""


@dataclass(frozen=True)
class Answers:
    """What was said to a batch of prompts, and what it took.

    texts: the answers, stripped, in the order of the prompts.
    tokens: new tokens of each, the one that ends it counted.
    prefill_s: wall seconds of the batch until its first new token, the image tower included; the inputs are on the
        device before.
    decode_s: from there to its end.
    """

    texts: list[str]
    tokens: list[int]
    prefill_s: float
    decode_s: float


@runtime_checkable
class Respondent(Protocol):
    """Answers prompts about images."""

    def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
        """Greedy answers; an image is an encoded file, None where the prompt has none.

        ValueError for an image that cannot be read, and for None where the model answers only about images.
        """

    def length(self, prompt: str) -> int:
        """Tokens of the prompt by itself, by which batches of similar lengths are made."""


@dataclass(frozen=True)
class Llava:
    """A LLaVA, ours or a plain one.  A batch may mix prompts with and without images.

    template, fit: of conversations and images, as the model was trained.
    """

    model: ReduxForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    template: Template
    image_aspect_ratio: Fit = "pad"

    def __post_init__(self) -> None:
        _ensure_padding(self.tokenizer)

    def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
        """As `Respondent`'s."""
        _check(prompts, images)
        if torn := next((prompt for prompt in prompts if IMAGE in prompt), None):
            raise ValueError(f"prompt: got {torn!r}, allowed: one without {IMAGE}, which the template puts in front")
        rows = [
            self._encoded(prompt if image is None else f"{IMAGE}\n{prompt}")
            for prompt, image in zip(prompts, images, strict=True)
        ]
        inputs = {
            "input_ids": torch.from_numpy(pad(rows, self.tokenizer.pad_token_id, left=True)),
            "attention_mask": torch.from_numpy(pad([np.ones_like(row) for row in rows], 0, left=True)),
        }
        if shown := [image for image in images if image is not None]:
            size = self.model.config.vision_config.image_size
            squares = {image: pixels(image, size, self.image_aspect_ratio) for image in set(shown)}
            inputs["pixel_values"] = torch.from_numpy(np.stack([squares[image] for image in shown]))
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if shown:
            inputs["pixel_values"] = normalise(inputs["pixel_values"]).to(self.model.dtype)
        # what the templates end with, whatever the checkpoint's own settings say
        return generate(self.model, self.tokenizer, inputs, [self.tokenizer.eos_token_id], max_new_tokens)

    def length(self, prompt: str) -> int:
        """As `Respondent`'s."""
        return len(self.tokenizer(prompt)["input_ids"])

    def _encoded(self, text: str) -> np.ndarray:
        turns = [{"from": "human", "value": text}]
        return encode(self.tokenizer, turns, self.template, self.model.config.image_seq_length)[0]


@dataclass(frozen=True)
class Foreign:
    """Any other model, asked through its processor.  Its generation settings are the checkpoint's own, but greedy."""

    model: Any
    processor: Any

    def __post_init__(self) -> None:
        if not self.processor.chat_template and self.kind not in PROMPTS:
            raise ValueError(
                f"model_type: got {self.kind} without a chat template, allowed without: {', '.join(PROMPTS)}"
            )
        tokenizer = self.processor.tokenizer
        # an encoder's padding is nowhere in the way at the end, but amid BLIP-2's image and text shifts T5's positions
        tokenizer.padding_side = "right" if self.model.config.get_text_config().is_encoder_decoder else "left"
        # if it was saved, processors force it on InstructBLIP's Q-Former, too, whose positions count from the left
        tokenizer.init_kwargs.pop("padding_side", None)
        _ensure_padding(tokenizer)

    @property
    def kind(self) -> str:
        """The model_type."""
        return self.model.config.model_type

    def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
        """As `Respondent`'s; prompts with and without images are two batches, as not every processor mixes them."""
        _check(prompts, images)
        order, parts = [], []
        for blind in (False, True):
            if rows := [row for row, image in enumerate(images) if (image is None) == blind]:
                inputs = self._inputs([prompts[row] for row in rows], [images[row] for row in rows])
                parts.append(generate(self.model, self.processor.tokenizer, inputs, self._ends, max_new_tokens))
                order += rows
        places = np.argsort(order)
        texts = [text for part in parts for text in part.texts]
        tokens = [count for part in parts for count in part.tokens]
        return Answers(
            texts=[texts[place] for place in places],
            tokens=[tokens[place] for place in places],
            prefill_s=sum(part.prefill_s for part in parts),
            decode_s=sum(part.decode_s for part in parts),
        )

    def length(self, prompt: str) -> int:
        """As `Respondent`'s."""
        return len(self.processor.tokenizer(prompt)["input_ids"])

    @property
    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.processor.tokenizer.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends)

    def _inputs(self, prompts: Sequence[str], images: Sequence[bytes | None]) -> Mapping[str, Tensor]:
        """What the model takes; the images are there for all prompts or for none."""
        shown = [Image.fromarray(rgb(image)) for image in images if image is not None]
        if self.processor.chat_template:
            inputs = self.processor.apply_chat_template(
                [
                    [{"role": "user", "content": [*picture, {"type": "text", "text": prompt}]}]
                    for prompt, picture in zip(prompts, _contents(shown, len(prompts)), strict=True)
                ],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        elif shown:
            texts = [PROMPTS[self.kind].format(prompt) for prompt in prompts]
            inputs = self.processor(images=shown, text=texts, padding=True, return_tensors="pt")
        else:
            raise ValueError(f"image: got None, allowed for {self.kind}: an image with each prompt")
        return inputs.to(self.model.device, self.model.dtype)


def _check(prompts: Sequence[str], images: Sequence[bytes | None]) -> None:
    if not prompts or len(prompts) != len(images):
        raise ValueError(f"images: got {len(images)}, allowed: as many as prompts, {len(prompts)}, and at least one")


def _ensure_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Any token pads, as attention is masked there."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _contents(images: Sequence[Image.Image], count: int) -> list[list[dict[str, Any]]]:
    """What stands before the text of each of `count` messages."""
    return [[{"type": "image", "image": image}] for image in images] or [[] for _ in range(count)]


@dataclass(frozen=True)
class Described:
    """The upper limit: answers from a description that the model itself gave of the image, once, before.

    Describing counts as prefill, where a description was not given yet.
    """

    respondent: Respondent
    describe: str = DESCRIBE
    description_tokens: int = 256
    descriptions: dict[bytes, str] = field(default_factory=dict, repr=False)
    """By SHA-256 of the image; they stay as long as who answers."""

    def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
        """As `Respondent`'s."""
        _check(prompts, images)
        keys = [None if image is None else hashlib.sha256(image).digest() for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key and key not in self.descriptions}
        spent = 0.0
        if new:
            said = self.respondent([self.describe] * len(new), list(new.values()), self.description_tokens)
            self.descriptions.update(zip(new, said.texts, strict=True))
            spent = said.prefill_s + said.decode_s
        told = [
            f"{self.descriptions[key]}\n{prompt}" if key else prompt for prompt, key in zip(prompts, keys, strict=True)
        ]
        answers = self.respondent(told, [None] * len(told), max_new_tokens)
        return Answers(answers.texts, answers.tokens, spent + answers.prefill_s, answers.decode_s)

    def length(self, prompt: str) -> int:
        """As `Respondent`'s; the description, not known before, apart."""
        return self.respondent.length(prompt)


class _Start(StoppingCriteria):
    """Never stops; notes when the first new token is there, and at which place.

    generate returns new tokens alone, or behind the prompt, or behind a decoder's start token: the place tells.
    """

    def __init__(self) -> None:
        self.place, self.time = 0, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.time:
            self.place, self.time = input_ids.shape[1] - 1, _now(input_ids.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    ends: Sequence[int],
    max_new_tokens: int,
) -> Answers:
    """Greedy answers of any generating model to a padded batch of inputs on its device.

    ends: tokens that end an answer.
    """
    begin, first = _now(model.device), _Start()
    sequences = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends),
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([first]),
    )
    end = _now(model.device)
    new = sequences[:, first.place :]
    ended = torch.isin(new, torch.tensor(ends, device=new.device)).int()
    tokens = (ended.cumsum(dim=1) - ended == 0).sum(dim=1).tolist()  # those before which none was the end
    own = [row[:count] for row, count in zip(new.tolist(), tokens, strict=True)]
    texts = [text.strip() for text in tokenizer.batch_decode(own, skip_special_tokens=True)]
    return Answers(texts, tokens, first.time - begin, end - first.time)


def load(
    path: str | PathLike,
    *,
    template: TemplateName | None = None,
    image_aspect_ratio: Fit | None = None,
    allow_mismatch: bool = False,
    image_input: ImageInput = "pixels",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **methods: Any,
) -> Respondent:
    """Load the model in a folder, hub id or URL (s3://), to be asked as it was trained.

    Args:
        template, fit: of conversations (a name in TEMPLATES) and images of a LLaVA.  None is how it was trained;
            where it does not say, LLaVA-1.5's `vicuna_v1` and `pad`.  Other models know their own.
        allow_mismatch: ask it in another way than it was trained.
        image: whether it sees images, or answers from its own descriptions of them.
        dtype: None is that of the checkpoint.
        device: None is CUDA where there is one.
        methods: settings of the method in place of a LLaVA's own, by their names in redux.model.METHODS; other models
            can have none.

    Raises:
        ValueError: it is no image-text-to-text model of transformers, lacks weights, or was trained in another way
            than it is to be asked.
    """
    if image_input not in get_args(ImageInput):
        raise ValueError(f"image_input: got {image_input!r}, allowed: {', '.join(get_args(ImageInput))}")
    resolve_format({}, template, image_aspect_ratio)  # unknown names are refused before anything is read
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    with fetched(path, what="model") as folder:
        respondent: Respondent
        if is_llava(folder):
            asked_by, shown_by = resolve_format(settings(folder), template, image_aspect_ratio, allow_mismatch)
            llava = ReduxForConditionalGeneration.from_pretrained(folder, **options, **methods).eval().to(place)
            tokenizer = load_tokenizer(folder, "model")
            check_image_token(tokenizer, llava.config, path, "model")
            respondent = Llava(llava, tokenizer, TEMPLATES[asked_by], shown_by)
        else:
            if wanted := [name for name, value in methods.items() if value is not None]:
                raise ValueError(f"{wanted[0]}: got one, allowed: None, as {path} is no LLaVA")
            other = load_model(AutoModelForImageTextToText, folder, what="model", **options)
            respondent = Foreign(other.eval().to(place), _processor(folder))
    return Described(respondent) if image_input == "caption" else respondent


def resolve_format(
    config: Mapping[str, Any],
    template: TemplateName | None = None,
    image_aspect_ratio: Fit | None = None,
    allow_mismatch: bool = False,
) -> tuple[TemplateName, Fit]:
    """Return the conversation template and the image fit with which a LLaVA is to be asked.

    Args:
        config: the content of its config.json.
        template, fit: what is wanted; None is how it was trained.
        allow_mismatch: whether both may be others than those of the training.

    Raises:
        ValueError: an unknown name, another one than in training, or a model that was last trained on captions alone.
    """
    trained = {"template": config.get("conversation_template"), "image_aspect_ratio": config.get("image_aspect_ratio")}
    known = {"template": tuple(TEMPLATES), "image_aspect_ratio": get_args(Fit)}
    for name, value in {"template": template, "image_aspect_ratio": image_aspect_ratio}.items():
        if value not in (None, *known[name]):
            raise ValueError(f"{name}: got {value!r}, allowed: {', '.join(known[name])}")
        if value is not None and trained[name] not in (None, value) and not allow_mismatch:
            raise ValueError(
                f"{name}: got {value}, allowed: {trained[name]}, with which the model was trained, or any other with "
                "allow_mismatch"
            )
    chosen = template or trained["template"] or "vicuna_v1"
    if chosen == "plain":
        raise ValueError(
            "template: got plain, which is for captions without questions, allowed: a model that was last trained with "
            "questions, or another template with allow_mismatch"
        )
    return chosen, image_aspect_ratio or trained["image_aspect_ratio"] or "pad"


def is_llava(path: str | PathLike) -> bool:
    """Whether the model in a folder, hub id or URL is a LLaVA that redux runs, or another.  Raises as `settings`."""
    config = settings(path)
    # Pixtral calls itself a LLaVA, too
    tower = config.get("vision_config", {}).get("model_type", "clip_vision_model")
    return bool(config["model_type"] == "llava" and tower in TOWERS)


def settings(path: str | PathLike) -> dict[str, Any]:
    """Read the configuration of the model in a folder, hub id or URL.

    ValueError where it is no image-text-to-text model of transformers, or in the layout of the LLaVA repository.
    """
    with fetched(path, [CONFIG_NAME], "model") as folder:
        try:
            config, _ = PreTrainedConfig.get_config_dict(folder)
        except OSError as error:
            why = " ".join(str(error).split())
            raise ValueError(f"model: got {path}, allowed: a folder, hub id or URL of a model; {why}") from error
    check_layout(config, path, "model")
    if (kind := config.get("model_type")) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"model_type: got {kind} in the config.json of {path}, "
            "allowed: llava or another image-text-to-text model of transformers"
        )
    return config


def _processor(folder: str) -> Any:
    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError as error:  # of Qwen2.5-VL, torchvision
        why = " ".join(str(error).split())
        raise ValueError(f"model: got {folder}, whose processor needs another package: {why}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: got {folder}, allowed: a folder with a processor that can be read; {error}"
        ) from error
