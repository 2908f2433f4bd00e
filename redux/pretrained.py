"""A LLaVA from parts that were trained apart: the image tower of a CLIP or SigLIP, and a LLaMA.

transformers loads both parts and the whole, so whatever it reads is a source: folders, hub ids, GGUF files (with the
packages gguf and accelerate).  The parts' own weights are taken bit for bit; new are the projector, as random as
torch's seed makes it, and the token `<image>`.  Everything is held in one dtype, float32 unless told otherwise: it
holds exactly what is stored in half precision, and training starts from it.  It costs 28 GB for a Vicuna-7B, in
bfloat16 half of that.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.utils import CONFIG_NAME

from redux.configuration import ReduxConfig
from redux.conversation import IMAGE_TOKEN
from redux.extras import write_install_command
from redux.hub import local_copy
from redux.loading import (
    check_image_token,
    check_layout,
    check_loading,
    load_model,
    load_tokenizer,
    report_damage,
)
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI, VMTC, Reduction

TOWER_CLASSES = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
"""Image towers by the model_type of the checkpoint that holds them, beside a text tower or alone."""

OTHER_WEIGHTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
"""Prefixes of weights that a whole CLIP or SigLIP holds besides its image tower."""

LANGUAGE_CLASSES = {"llama": LlamaForCausalLM}
"""Language models by model_type; CMAI is an attention function of LLaMA's."""


def assemble(
    tower: str | PathLike,
    language: str | PathLike,
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
    with local_copy(tower, label="tower") as folder:
        eye = load_part("tower", folder, TOWER_CLASSES, dtype)
    with local_copy(language, label="language") as folder:
        voice = load_part("language", folder, LANGUAGE_CLASSES, dtype, gguf_file)
        tokenizer = load_tokenizer(folder, "language", gguf_file=gguf_file)
    prepare_tokenizer(tokenizer, voice.config, language)
    # many tokenizers name no limit, or 10^30
    tokenizer.model_max_length = min(tokenizer.model_max_length, voice.config.max_position_embeddings)
    resize_embeddings(voice, len(tokenizer))
    config = _join_configs(
        eye.config,
        voice.config,
        feature_layer,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vmtc=vmtc,
        cmai=cmai,
        reduction=reduction,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    parts = {"model.vision_tower": eye, "model.language_model": voice.model, "lm_head": voice.lm_head}
    weights = {f"{part}.{name}": weight for part in parts for name, weight in parts[part].state_dict().items()}
    # takes the tensors themselves, not copies, and draws what is missing: the projector
    with report_damage(language, "language"):
        model, found = ReduxForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    drawn = {name for name in found["missing_keys"] if name.startswith("model.multi_modal_projector.")}
    check_loading({**found, "missing_keys": found["missing_keys"] - drawn}, language, "language")
    return model, tokenizer


def configure_assembly(
    tower: str | PathLike,
    language: str | PathLike,
    *,
    gguf_file: str | None = None,
    vmtc: VMTC | None = None,
    cmai: CMAI | None = None,
    reduction: Reduction | None = None,
    feature_layer: int = -2,
) -> ReduxConfig:
    """The configuration that `assemble` would give, but for what the tokenizer decides; no weights are read.

    Takes and refuses what `assemble` does.  Of a bucket only configurations are fetched, and a GGUF file, which is one.
    """
    with local_copy(tower, [CONFIG_NAME], "tower") as folder:
        eye = _load_part_config("tower", folder, TOWER_CLASSES)
    with local_copy(language, [gguf_file or CONFIG_NAME], "language") as folder:
        voice = _load_part_config("language", folder, LANGUAGE_CLASSES, gguf_file)
    plain = _join_configs(eye, voice, feature_layer)
    try:
        config = ReduxConfig(**{**plain.to_dict(), "vmtc": vmtc, "cmai": cmai, "reduction": reduction})
    except ValueError as error:
        raise ValueError(f"{'vmtc' if vmtc else 'reduction'}.{error}") from None
    positions = config.text_config.max_position_embeddings
    if positions <= config.image_seq_length:
        raise ValueError(
            f"language: got {language} of {positions} positions, allowed: more than the {config.image_seq_length} "
            "tokens of an image"
        )
    with torch.device("meta"):  # all that a model refuses when it is built
        ReduxForConditionalGeneration(config)
    return config


def check_parts(tower: str | PathLike, language: str | PathLike, gguf_file: str | None = None) -> None:
    """Check that `assemble` would find all weights and a tokenizer in two local folders; weights are not read.

    What is no local folder is passed over, and so is a GGUF file, which cannot be checked without reading it.
    Raises ValueError as `assemble`.
    """
    if Path(tower).is_dir():
        load_part("tower", tower, TOWER_CLASSES, device_map="meta")
    if Path(language).is_dir() and not gguf_file:
        voice = load_part("language", language, LANGUAGE_CLASSES, device_map="meta")
        prepare_tokenizer(load_tokenizer(language, "language"), voice.config, language)


def check_checkpoint(checkpoint: str | PathLike, kind: Any = ReduxForConditionalGeneration) -> None:
    """Check that a local folder holds a whole model and its tokenizer; weights are not read.

    kind: the class that loads it.  Raises ValueError where weights are missing, unexpected or of another shape.
    """
    if Path(checkpoint).is_dir():
        model = load_model(kind, checkpoint, label="checkpoint", device_map="meta")
        tokenizer = load_tokenizer(checkpoint, "checkpoint")
        if isinstance(model, ReduxForConditionalGeneration):
            check_image_token(tokenizer, model.config, checkpoint, "checkpoint")


def configure_checkpoint(checkpoint: str | PathLike, **methods: Any) -> ReduxConfig:
    """The configuration of a whole LLaVA with these settings of the method in place of its own; no weights are read.

    ValueError where it is none, or cannot have them.
    """
    with local_copy(checkpoint, [CONFIG_NAME], "checkpoint") as folder:
        try:
            saved, _ = PreTrainedConfig.get_config_dict(folder)
        except OSError as error:
            raise ValueError(f"checkpoint: got {checkpoint}, allowed: folder or hub id of a LLaVA") from error
        check_layout(saved, checkpoint, "checkpoint")
        kind = saved.get("model_type")
        if kind != ReduxConfig.model_type:
            raise ValueError(f"checkpoint: got {checkpoint} of model_type {kind}, allowed: {ReduxConfig.model_type}")
        config = ReduxConfig(**{**ReduxConfig.from_pretrained(folder).to_dict(), **methods})
    with torch.device("meta"):  # all that a model refuses when it is built
        ReduxForConditionalGeneration(config)
    return config


def _join_configs(eye: PreTrainedConfig, voice: PreTrainedConfig, feature_layer: int, **others: Any) -> ReduxConfig:
    layers = eye.num_hidden_layers
    if not -layers - 1 <= feature_layer <= layers:
        raise ValueError(f"feature_layer: got {feature_layer}, allowed: {-layers - 1} to {layers}")
    return ReduxConfig(
        vision_config=eye.to_dict(),
        text_config=voice.to_dict(),
        vision_feature_layer=feature_layer,
        # "default" leaves out the class token, which SigLIP's tower does not have
        vision_feature_select_strategy="default" if isinstance(eye, CLIPVisionConfig) else "full",
        **others,
    )


def _load_part_config(
    name: str, path: str | PathLike, kinds: Mapping[str, Any], gguf_file: str | None = None
) -> PreTrainedConfig:
    """The configuration of one of `kinds` in `path`, that of its part where it has several; ValueError for another."""
    with _readable_errors(name, path, kinds, gguf_file):
        kind = PreTrainedConfig.get_config_dict(path, gguf_file=gguf_file)[0].get("model_type")
        if kind not in kinds:
            raise ValueError(f"{name}: got {path} of model_type {kind}, allowed: {_describe_allowed(kinds)}")
        return kinds[kind].config_class.from_pretrained(path, gguf_file=gguf_file)


@contextmanager
def _readable_errors(
    name: str, path: str | PathLike, kinds: Mapping[str, Any], gguf_file: str | None
) -> Iterator[None]:
    """What cannot be read is a ValueError that says where."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{name}: got {path}, which needs another package ({error}); perhaps {write_install_command('pretrained')}"
        ) from error
    except OSError as error:
        if gguf_file:
            raise ValueError(f"gguf_file: got {gguf_file}, allowed: a file in {path}") from error
        raise ValueError(f"{name}: got {path}, allowed: {_describe_allowed(kinds)}") from error


def _describe_allowed(kinds: Mapping[str, Any]) -> str:
    return f"folder or hub id of a checkpoint of model_type {', '.join(kinds)}"


def load_part(
    name: str,
    path: str | PathLike,
    kinds: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    gguf_file: str | None = None,
    **options: Any,
) -> Any:
    """Load the model of one of `kinds` in `path`; ValueError that says so where there is none, or not all of it.

    options: more arguments of `from_pretrained`.
    """
    config = _load_part_config(name, path, kinds, gguf_file)
    with _readable_errors(name, path, kinds, gguf_file):
        kind: Any = next(kind for kind in kinds.values() if isinstance(config, kind.config_class))
        model = load_model(kind, path, label=name, ignored=OTHER_WEIGHTS, gguf_file=gguf_file, dtype=dtype, **options)
    if gguf_file:
        # it says that the weights are packed: they no longer are, and packed ones can neither be saved nor trained
        del model.config.quantization_config
    return model


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, language: str | PathLike) -> None:
    """Give the tokenizer `<image>`, and a token to pad with: the unknown one as in LLaVA, or else the end of text.

    Raises:
        ValueError: it has no token for the end of text, so nobody could tell when an answer is over; or more tokens
            than the language model has rows, which would be random.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"language: got {language} with {len(tokenizer)} tokens in its tokenizer, allowed: up to "
            f"{config.vocab_size}, the rows of its embeddings"
        )
    if tokenizer.eos_token is None:
        raise ValueError(f"language: got the tokenizer of {tokenizer.name_or_path}, allowed: one with an eos_token")
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def resize_embeddings(language: PreTrainedModel, size: int) -> None:
    """Room for `size` tokens where there is less; a new row is the mean of the old ones, an unremarkable token."""
    old = language.config.get_text_config().vocab_size
    if size <= old:
        return
    language.resize_token_embeddings(size, mean_resizing=False)
    for table in (language.get_input_embeddings().weight.data, language.get_output_embeddings().weight.data):
        table[old:] = table[:old].mean(dim=0)
