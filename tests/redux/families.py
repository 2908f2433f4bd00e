"""Small models of every family of transformers in which CMAI works, and inputs for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from redux.settings import CMAI

PAD, BOS, EOS, IMAGE, VIDEO, WORDS = 0, 1, 2, 3, 4, 64
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STRONG = CMAI(gamma_max=0.8, gamma_min=0.5)


def llama(**other: Any) -> dict[str, Any]:
    text = LlamaConfig(**SIZE, vocab_size=WORDS, num_hidden_layers=2, num_key_value_heads=2, **SPECIAL, **other)
    return text.to_dict()


def vision(**other: Any) -> dict[str, Any]:
    return {**SIZE, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8, **other}


def llava(text: dict[str, Any] | None = None) -> LlavaConfig:
    tower = CLIPVisionConfig(**vision(), projection_dim=32).to_dict()
    return LlavaConfig(vision_config=tower, text_config=text or llama(), image_token_index=IMAGE)


def qwen() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**SIZE, "vocab_size": WORDS, "num_hidden_layers": 2, "num_key_value_heads": 2, "rope_parameters": rope}
    tower = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLConfig(
        text_config={**text, **SPECIAL}, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO
    )


def idefics(kind: type) -> Any:
    return kind(text_config=llama(), vision_config=vision(patch_size=4), scale_factor=2, image_token_id=IMAGE)


def q_former(kind: type, text: dict[str, Any]) -> Any:
    return kind(
        text_config=text,
        vision_config=vision(num_hidden_layers=1),
        qformer_config={**SIZE, **STEADY, "num_hidden_layers": 2, "vocab_size": WORDS},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


def opt() -> dict[str, Any]:
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "dropout": 0.0,
        "num_hidden_layers": 2,
        "word_embed_proj_dim": 32,
    }
    return OPTConfig(**sizes, vocab_size=WORDS, max_position_embeddings=128, **SPECIAL).to_dict()


FAMILIES: dict[str, tuple[type, Callable[[], Any]]] = {
    "llava": (LlavaForConditionalGeneration, llava),
    "qwen": (Qwen2_5_VLForConditionalGeneration, qwen),
    "idefics3": (Idefics3ForConditionalGeneration, lambda: idefics(Idefics3Config)),
    "smolvlm": (SmolVLMForConditionalGeneration, lambda: idefics(SmolVLMConfig)),
    "instructblip": (InstructBlipForConditionalGeneration, lambda: q_former(InstructBlipConfig, llama())),
    "blip2": (Blip2ForConditionalGeneration, lambda: q_former(Blip2Config, opt())),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(kind: type, config: Any) -> Any:
    """A model of always the same weights, so large that attention is far from uniform."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.16) if weight.dim() > 1 else weight.add_(torch.randn_like(weight), alpha=0.01)
    return model


def pictures(family: str, rows: list[int]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the inputs of a model for rows with these numbers of images, and the tokens of each image."""
    count = sum(rows)
    draw = torch.Generator().manual_seed(0)
    if family == "qwen":
        grid = torch.tensor([(1, 4, 4), (1, 4, 6), (1, 6, 4)])[:count]
        patches = int(grid.prod(dim=1).sum())
        return {
            "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=draw),
            "image_grid_thw": grid,
        }, (grid.prod(dim=1) // 4).tolist()
    images = torch.randn(count, 3, 16, 16, generator=draw)
    if family in ("idefics3", "smolvlm"):
        padded = torch.zeros(len(rows), max(rows), 3, 16, 16)
        for row, own in enumerate(images.split(rows)):
            padded[row, : len(own)] = own
        return {"pixel_values": padded}, [4] * count
    if family == "instructblip":
        question = torch.randint(5, WORDS, (count, 3), generator=draw)
        return {"pixel_values": images, "qformer_input_ids": question}, [4] * count
    return {"pixel_values": images}, [4] * count


def sample(family: str, rows: tuple[int, ...] = (2, 1, 0)) -> dict[str, Tensor]:
    """A batch, padded on the left: rows of so many images, with text around each."""
    inputs, tokens = pictures(family, list(rows))
    draw, blocks, lines = torch.Generator().manual_seed(1), iter(tokens), []
    for row, images in enumerate(rows):
        words = torch.randint(5, WORDS, (images + 1, 5 - row), generator=draw).tolist()
        line = [BOS, *words[0]]
        for text in words[1:]:
            line += [IMAGE] * next(blocks) + text
        lines.append(line)
    width = max(map(len, lines))
    ids = torch.tensor([[PAD] * (width - len(line)) + line for line in lines])
    return whole(family, {**inputs, "input_ids": ids, "attention_mask": (ids != PAD).long()}, ids)


def whole(family: str, inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The same inputs with tokens `ids`, whose first are the old ones."""
    repeats, more = len(ids) // len(inputs["input_ids"]), ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"].repeat_interleave(repeats, dim=0), (0, more), value=1)
    types = {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()} if family == "qwen" else {}
    return {**inputs, **types, "input_ids": ids, "attention_mask": mask}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def state(model: PreTrainedModel) -> list[Any]:
    """Collect what `inhibit` may change: attributes, hooks and attention of every module."""
    return [
        (name, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        + ((module.config._attn_implementation,) if isinstance(module, PreTrainedModel) else ())
        for name, module in model.named_modules()
    ]


LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6, "suppress_tokens": [IMAGE, VIDEO]}  # Words alone
