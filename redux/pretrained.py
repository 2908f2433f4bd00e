"""A LLaVA from parts that were trained apart: the image tower of a CLIP or SigLIP, and a LLaMA.

transformers loads both parts and the whole, so whatever it reads is a source: folders, hub ids, GGUF files (with the
packages gguf and accelerate).  The parts' own weights are taken bit for bit; new are the projector, as random as
torch's seed makes it, and the token `<image>`.  Everything is held in one dtype, float32 unless told otherwise: it
holds exactly what is stored in half precision, and training starts from it.  It costs 28 GB for a Vicuna-7B, in
bfloat16 half of that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from redux.cmai import CMAI
from redux.conversation import IMAGE
from redux.model import ReduxConfig, ReduxForConditionalGeneration
from redux.reduction import Reduction
from redux.remote import fetched
from redux.vmtc import VMTC

TOWERS = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
"""Image towers by the model_type of the checkpoint that holds them, beside a text tower or alone."""

LANGUAGES = {"llama": LlamaForCausalLM}
"""Language models by model_type; CMAI is an attention function of LLaMA's."""


def assemble(
    tower: str | Path,
    language: str | Path,
    *,
    gguf_file: str | None = None,
    vmtc: VMTC | None = None,
    cmai: CMAI | None = None,
    reduction: Reduction | None = None,
    feature_layer: int = -2,
    dtype: torch.dtype = torch.float32,
) -> tuple[ReduxForConditionalGeneration, PreTrainedTokenizerBase]:
    """A model whose projector is still to be trained (seed torch before), and its tokenizer.

    tower, language: folder, hub id or URL (s3://).
    gguf_file: the file in `language` that holds language model and tokenizer.
    feature_layer: the tower's layer that LLaVA reads, as transformers counts: 0 is what enters the first block.
    """
    with fetched(tower) as folder:
        eye = load("tower", folder, TOWERS, dtype)
    layers = eye.config.num_hidden_layers
    if not -layers - 1 <= feature_layer <= layers:
        raise ValueError(f"feature_layer: got {feature_layer}, allowed: {-layers - 1} to {layers}")
    with fetched(language) as folder:
        voice = load("language", folder, LANGUAGES, dtype, gguf_file)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    prepare(tokenizer)
    grow(voice, len(tokenizer))
    config = ReduxConfig(
        vision_config=eye.config.to_dict(),
        text_config=voice.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=feature_layer,
        # "default" leaves out the class token, which SigLIP's tower does not have
        vision_feature_select_strategy="default" if isinstance(eye, CLIPVisionModel) else "full",
        vmtc=vmtc,
        cmai=cmai,
        reduction=reduction,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    parts = {"model.vision_tower": eye, "model.language_model": voice.model, "lm_head": voice.lm_head}
    weights = {f"{part}.{name}": weight for part in parts for name, weight in parts[part].state_dict().items()}
    # takes the tensors themselves, not copies, and draws what is missing: the projector
    model = ReduxForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model, tokenizer


def load(
    name: str, path: str | Path, kinds: Mapping[str, Any], dtype: torch.dtype, gguf_file: str | None = None
) -> Any:
    """The model of one of `kinds` in `path`; ValueError that says so where there is none, or not all of it."""
    allowed = f"folder or hub id of a checkpoint of model_type {', '.join(kinds)}"
    try:
        kind = PreTrainedConfig.get_config_dict(path, gguf_file=gguf_file)[0].get("model_type")
        if kind not in kinds:
            raise ValueError(f"{name}: got {path} of model_type {kind}, allowed: {allowed}")
        model, loading = kinds[kind].from_pretrained(path, gguf_file=gguf_file, dtype=dtype, output_loading_info=True)
    except OSError as error:
        if gguf_file:
            raise ValueError(f"gguf_file: got {gguf_file}, allowed: a file in {path}") from error
        raise ValueError(f"{name}: got {path}, allowed: {allowed}") from error
    if missing := loading["missing_keys"]:
        raise ValueError(f"{name}: got {path} without {min(missing)}, allowed: a checkpoint with all weights")
    if gguf_file:
        # it says that the weights are packed: they no longer are, and packed ones can neither be saved nor trained
        del model.config.quantization_config
    return model


def prepare(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer `<image>`, and a token to pad with: the unknown one as in LLaVA, or else the end of text."""
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def grow(language: LlamaForCausalLM, size: int) -> None:
    """Room for `size` tokens where there is less; a new row is the mean of the old ones, an unremarkable token."""
    old = language.config.vocab_size
    if size <= old:
        return
    language.resize_token_embeddings(size, mean_resizing=False)
    for table in (language.get_input_embeddings().weight.data, language.get_output_embeddings().weight.data):
        table[old:] = table[:old].mean(dim=0)
