"""Convert a LLaVA checkpoint to the parameter names and the layout of transformers.

Two kinds of checkpoints have the right weights under names that transformers does not know. One kind was saved from a
wrapped model (DDP, torch.compile, PEFT). The other is that of the LLaVA repository, which has one configuration, for
the language model, and mostly no image tower.
"""

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from redux.configuration import ReduxConfig
from redux.conversation import IMAGE_TOKEN
from redux.loading import check_loading, describe_names, load_tokenizer, report_damage, strip_wrappers
from redux.model import ReduxForConditionalGeneration
from redux.pretrained import TOWER_CLASSES, load_part, prepare_tokenizer, resize_embeddings

TOWER_PREFIX = "model.vision_tower.vision_tower."

PREFIX_RENAMES = {
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    f"{TOWER_PREFIX}vision_model.": "model.vision_tower.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}
"""Prefixes of parameter names in the LLaVA repository, and in transformers; the first match counts."""

ASPECT_RATIOS = {"pad": "pad", "square": "crop"}
"""image_aspect_ratio by its name in the LLaVA repository."""


def convert_checkpoint(source: str | PathLike) -> tuple[ReduxForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load a checkpoint with names of any known wrapper or layout.

    Args:
        source: local folder.

    Returns:
        The model and its tokenizer, to be saved by transformers.

    Raises:
        ValueError: it is not a LLaVA, or weights are missing, unexpected or of another shape.
    """
    folder = Path(source)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: got {source}, allowed: a folder with a config.json; {error}") from None
    with report_damage(folder, "checkpoint"):
        weights = {strip_wrappers(name): weight for name, weight in read_weights(folder).items()}
    if hint := describe_names(weights, folder):
        raise ValueError(f"checkpoint: got {source}{hint}")
    tokenizer = load_tokenizer(folder, "checkpoint")
    if "mm_vision_tower" in config:
        return _convert_layout(config, weights, tokenizer, folder), tokenizer
    if config.get("model_type") != ReduxConfig.model_type:
        raise ValueError(
            f"checkpoint: got {source} of model_type {config.get('model_type')}, allowed: {ReduxConfig.model_type}"
        )
    return _build_from_weights(ReduxConfig.from_pretrained(folder), weights, folder), tokenizer


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a folder, from safetensors files or else PyTorch's. ValueError if there are none.

    PyTorch's files are read with `weights_only`, which runs no code.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickled = [] if files else sorted(folder.glob("pytorch_model*.bin"))
    if not files and not pickled:
        raise ValueError(f"checkpoint: got {folder}, allowed: a folder with *.safetensors or pytorch_model*.bin")
    parts: Iterable[Mapping[str, Tensor]] = (
        *(load_file(file) for file in files),
        *(torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in pickled),
    )
    return {name: weight for part in parts for name, weight in part.items()}


def _build_from_weights(config: ReduxConfig, weights: dict[str, Tensor], folder: Path) -> ReduxForConditionalGeneration:
    # Weights keep their dtype.
    dtype = next(iter(weights.values())).dtype
    model, loading_info = ReduxForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loading(loading_info, folder, "checkpoint")
    return model


def _convert_layout(
    config: dict[str, Any], weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> ReduxForConditionalGeneration:
    """Build the model of a checkpoint of the LLaVA repository.

    If the checkpoint has no image tower, the tower is loaded from the source that its configuration names.
    """
    tower = load_part("mm_vision_tower", config["mm_vision_tower"], TOWER_CLASSES, next(iter(weights.values())).dtype)
    # Most checkpoints were trained with a frozen tower and saved without it.
    if not any(name.startswith(TOWER_PREFIX) for name in weights):
        weights |= {f"{TOWER_PREFIX}vision_model.{name}": weight for name, weight in tower.state_dict().items()}
    renamed = {_rename_parameter(name): weight for name, weight in weights.items()}
    # Its config.json is that of the language model, with fields mm_* for all else.
    text_config = LlamaConfig(**{name: value for name, value in config.items() if not name.startswith("mm_")})
    prepare_tokenizer(tokenizer, text_config, folder)
    aspect_ratio = config.get("image_aspect_ratio") or "square"
    if aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"image_aspect_ratio: got {aspect_ratio} in {folder}, allowed: {', '.join(ASPECT_RATIOS)}")
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    redux_config = ReduxConfig(
        vision_config=tower.config.to_dict(),
        text_config={**text_config.to_dict(), "model_type": "llama"},
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if config.get("mm_vision_select_feature") == "cls_patch" else "default",
        conversation_template="vicuna_v1",
        image_aspect_ratio=ASPECT_RATIOS[aspect_ratio],
        tie_word_embeddings=text_config.tie_word_embeddings,
        **special_tokens,
    )
    model = _build_from_weights(redux_config, renamed, folder)
    resize_embeddings(model, len(tokenizer))
    return model


def _rename_parameter(name: str) -> str:
    prefix = next((prefix for prefix in PREFIX_RENAMES if name.startswith(prefix)), "")
    return PREFIX_RENAMES[prefix] + name.removeprefix(prefix) if prefix else name
