"""Assemble a LLaVA from pretrained parts: the image tower of a CLIP or SigLIP, and a language model of LLaMA's build.

transformers loads the parts, so it decides which sources work: folders, hub ids, GGUF files (with the packages gguf and
accelerate). The weights of the parts stay bit-equal. New are the projector, random from torch's seed, and the token
`<image>`. All weights have one dtype, float32 by default: it represents half precision exactly, and training starts
from it. A Vicuna-7B takes 28 GB in float32, half of that in bfloat16.
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
    GgufConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.utils import CONFIG_NAME

from redux.architecture import TowerSizes
from redux.configuration import ReduxConfig, build_vision_config
from redux.conversation import IMAGE_TOKEN
from redux.extras import write_install_command
from redux.hub import local_copy
from redux.language import ALLOWED_LANGUAGE, check_language, drop_idle_window, find_language_class
from redux.loading import (
    check_image_token,
    check_layout,
    check_loading,
    load_model,
    load_tokenizer,
    report_damage,
)
from redux.model import PART_PREFIXES, ReduxForConditionalGeneration, ReduxModel
from redux.settings import CMAI, VMTC, Reduction

TOWER_CLASSES = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
"""Classes of image towers by the model_type of a checkpoint that holds the tower, alone or with a text tower."""

ALLOWED_TOWER = f"folder or hub id of a checkpoint of model_type {', '.join(TOWER_CLASSES)}"

ALLOWED_PART = "folder or hub id of a causal language model of transformers"

TEXT_SIDE_WEIGHTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
"""Prefixes of weights of a whole CLIP or SigLIP that do not belong to its image tower."""


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
    """Assemble a model with an untrained projector, and its tokenizer. Seed torch before.

    Args:
        tower: folder, hub id or URL (s3://) of a CLIP or SigLIP.
        language: folder, hub id or URL (s3://) of a language model that `redux.language` admits.
        gguf_file: file in `language` with language model and tokenizer.
        vmtc, cmai, reduction: settings of the method; None turns a part off.
        feature_layer: layer of the tower that LLaVA reads, as transformers counts: 0 is the input of the first block.
        dtype: dtype of all weights.

    Raises:
        ValueError: a part cannot be loaded completely, or the settings do not fit it.
    """
    with local_copy(tower, label="tower", allowed=ALLOWED_TOWER) as folder:
        vision_tower = load_part("tower", folder, TOWER_CLASSES, dtype)
    with local_copy(language, label="language", allowed=ALLOWED_PART) as folder:
        language_model = load_language(folder, gguf_file, dtype=dtype)
        tokenizer = load_tokenizer(folder, "language", gguf_file=gguf_file)
    prepare_tokenizer(tokenizer, language_model.config, language)
    resize_embeddings(language_model, len(tokenizer))
    config = _join_configs(
        vision_tower.config,
        language_model.config,
        feature_layer,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vmtc=vmtc,
        cmai=cmai,
        reduction=reduction,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    parts = {
        "model.vision_tower": vision_tower,
        "model.language_model": language_model.model,
        "lm_head": language_model.get_output_embeddings(),
    }
    # Names as in a saved LLaVA.
    weights = {f"{part}.{name}": weight for part in parts for name, weight in parts[part].state_dict().items()}
    # from_pretrained takes these tensors without a copy and initialises the missing ones, the projector.
    with report_damage(language, "language"):
        model, loading_info = ReduxForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    projector = {name for name in loading_info["missing_keys"] if name.startswith("model.multi_modal_projector.")}
    # Only the projector may be new; any other missing weight would be random without notice.
    missing = loading_info["missing_keys"] - projector
    check_loading({**loading_info, "missing_keys": missing}, language, "language")
    return model, tokenizer


def load_assembled_tokenizer(language: str | PathLike, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `assemble` returns, without reading weights. Arguments and errors as for `assemble`."""
    with local_copy(language, label="language", skips_weights=not gguf_file, allowed=ALLOWED_PART) as folder:
        tokenizer = load_tokenizer(folder, "language", gguf_file=gguf_file)
        prepare_tokenizer(tokenizer, _load_language_config(folder, gguf_file), language)
    return tokenizer


def load_image_encoder(
    config: ReduxConfig, *, checkpoint: str | PathLike | None = None, tower: str | PathLike | None = None
) -> ReduxModel:
    """Load the image tower with its compression alone: of the model only `encode_images` can be called.

    Args:
        config: configuration of the whole model, with the settings of the method.
        checkpoint: folder, hub id or URL of a LLaVA whose tower is taken; weights of its other parts are not kept.
        tower: folder, hub id or URL of a CLIP or SigLIP, instead of a checkpoint.

    Raises:
        ValueError: the tower cannot be loaded completely.
    """
    # A tiny language model, which is never run.
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    language = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=8)
    config = ReduxConfig(**{**config.to_dict(), "text_config": language.to_dict()})
    model = ReduxForConditionalGeneration(config).model.eval()
    if tower is not None:
        with local_copy(tower, label="tower", allowed=ALLOWED_TOWER) as folder:
            model.vision_tower = load_part("tower", folder, TOWER_CLASSES, torch.float32).eval()
        return model
    assert checkpoint is not None
    with local_copy(checkpoint, label="checkpoint") as folder, report_damage(checkpoint, "checkpoint"):
        # The plain class, because Redux's own refuses weights that the model does not have.
        llava, loading_info = LlavaForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    tower_info = {
        "missing_keys": {name for name in loading_info["missing_keys"] if name.startswith(PART_PREFIXES["tower"])},
        "mismatched_keys": {
            mismatch for mismatch in loading_info["mismatched_keys"] if mismatch[0].startswith(PART_PREFIXES["tower"])
        },
        "unexpected_keys": set(),
    }
    check_loading(tower_info, checkpoint, "checkpoint")
    model.vision_tower = llava.model.vision_tower.eval()
    return model


def configure_assembly(
    tower: str | PathLike | TowerSizes,
    language: str | PathLike,
    *,
    gguf_file: str | None = None,
    vmtc: VMTC | None = None,
    cmai: CMAI | None = None,
    reduction: Reduction | None = None,
    feature_layer: int = -2,
) -> ReduxConfig:
    """Build the configuration of an assembled model without its weights.

    Fields that depend on the tokenizer are missing. Arguments and errors are those of `assemble`; `tower` may also be
    sizes of a tower that is not trained yet. From a bucket only configurations are copied, or a whole GGUF file, which
    contains one.
    """
    if isinstance(tower, TowerSizes):
        vision_config: PreTrainedConfig = build_vision_config(tower)
    else:
        with local_copy(tower, [CONFIG_NAME], "tower", allowed=ALLOWED_TOWER) as folder:
            vision_config = _load_part_config("tower", folder, TOWER_CLASSES)
    with local_copy(language, [gguf_file or CONFIG_NAME], "language", allowed=ALLOWED_PART) as folder:
        text_config = _load_language_config(folder, gguf_file)
    plain = _join_configs(vision_config, text_config, feature_layer)
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
    # A model without memory raises the errors of a real one.
    with torch.device("meta"):
        ReduxForConditionalGeneration(config)
    return config


def check_parts(
    tower: str | PathLike | TowerSizes | None, language: str | PathLike, gguf_file: str | None = None
) -> None:
    """Check that two local folders have all weights and a tokenizer for `assemble`, without reading weights.

    Sources that are not local folders are skipped, and so are sizes of a tower and None. A GGUF file is skipped, too,
    since it cannot be checked without reading it.

    Raises:
        ValueError: as `assemble`.
    """
    if isinstance(tower, str | PathLike) and Path(tower).is_dir():
        load_part("tower", tower, TOWER_CLASSES, device_map="meta")
    if Path(language).is_dir() and not gguf_file:
        language_model = load_language(language, device_map="meta")
        prepare_tokenizer(load_tokenizer(language, "language"), language_model.config, language)


def check_checkpoint(checkpoint: str | PathLike, model_class: Any = ReduxForConditionalGeneration) -> None:
    """Check that a local folder has a whole model and its tokenizer, without reading weights.

    Args:
        checkpoint: folder; other sources are skipped.
        model_class: class that loads it.

    Raises:
        ValueError: weights are missing, unexpected or of another shape, or the tokenizer does not fit.
    """
    if Path(checkpoint).is_dir():
        model = load_model(model_class, checkpoint, label="checkpoint", device_map="meta")
        tokenizer = load_tokenizer(checkpoint, "checkpoint")
        if isinstance(model, ReduxForConditionalGeneration):
            check_image_token(tokenizer, model.config, checkpoint, "checkpoint")


def configure_checkpoint(checkpoint: str | PathLike, **methods: Any) -> ReduxConfig:
    """Read the configuration of a whole LLaVA and replace settings of the method, without reading weights.

    Args:
        checkpoint: folder, hub id or URL (s3://).
        methods: settings by their names in `redux.settings.METHODS`.

    Raises:
        ValueError: the checkpoint is not a LLaVA, or the settings do not fit it.
    """
    with local_copy(checkpoint, [CONFIG_NAME], "checkpoint") as folder:
        try:
            saved, _ = PreTrainedConfig.get_config_dict(folder)
        except OSError as error:
            raise ValueError(f"checkpoint: got {checkpoint}, allowed: folder or hub id of a LLaVA") from error
        check_layout(saved, checkpoint, "checkpoint")
        model_type = saved.get("model_type")
        if model_type != ReduxConfig.model_type:
            raise ValueError(
                f"checkpoint: got {checkpoint} of model_type {model_type}, allowed: {ReduxConfig.model_type}"
            )
        config = ReduxConfig(**{**ReduxConfig.from_pretrained(folder).to_dict(), **methods})
    with torch.device("meta"):
        ReduxForConditionalGeneration(config)
    return config


def _join_configs(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, feature_layer: int, **fields: Any
) -> ReduxConfig:
    """Build a LLaVA's configuration from those of its parts, and further fields."""
    layers = vision_config.num_hidden_layers
    if not -layers - 1 <= feature_layer <= layers:
        raise ValueError(f"feature_layer: got {feature_layer}, allowed: {-layers - 1} to {layers}")
    return ReduxConfig(
        vision_config=vision_config.to_dict(),
        text_config=text_config.to_dict(),
        vision_feature_layer=feature_layer,
        # "default" leaves out the class token, which SigLIP's tower does not have.
        vision_feature_select_strategy="default" if isinstance(vision_config, CLIPVisionConfig) else "full",
        **fields,
    )


def _load_part_config(
    name: str, path: str | PathLike, classes: Mapping[str, Any], gguf_file: str | None = None
) -> PreTrainedConfig:
    """Load the configuration of a part, also from a checkpoint that has more parts.

    Arguments and errors are those of `load_part`.
    """
    with _readable_errors(name, path, classes, gguf_file):
        model_type = PreTrainedConfig.get_config_dict(path, gguf_file=gguf_file)[0].get("model_type")
        if model_type not in classes:
            raise ValueError(f"{name}: got {path} of model_type {model_type}, allowed: {_describe_allowed(classes)}")
        return classes[model_type].config_class.from_pretrained(path, gguf_file=gguf_file)


def load_language(path: str | PathLike, gguf_file: str | None = None, **options: Any) -> Any:
    """Load a language model with all of its weights, after checking that it can be LLaVA's.

    Args:
        path: folder or hub id.
        gguf_file: file in `path` with the weights.
        options: further arguments of `from_pretrained`.

    Raises:
        ValueError: there is no such language model, or weights are missing.
    """
    config = _load_language_config(path, gguf_file)
    classes = {config.model_type: find_language_class(config.model_type)}
    model = load_part("language", path, classes, gguf_file=gguf_file, **options)
    drop_idle_window(model.config)
    return model


def _load_language_config(path: str | PathLike, gguf_file: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a language model and check it. Errors are those of `load_language`."""
    with _readable_errors("language", path, {}, gguf_file):
        model_type = PreTrainedConfig.get_config_dict(path, gguf_file=gguf_file)[0].get("model_type")
    language_class = find_language_class(model_type)
    if language_class is None:
        raise ValueError(f"language: got {path} of model_type {model_type}, allowed: {_describe_allowed({})}")
    config = _load_part_config("language", path, {model_type: language_class}, gguf_file)
    if getattr(config, "quantization_config", None) and not gguf_file:
        raise ValueError(f"language: got {path} with quantized weights, allowed: others, or a GGUF file")
    drop_idle_window(config)
    try:
        check_language(config)
    except ValueError as error:
        raise ValueError(
            f"language: got {path} of model_type {model_type}, {error}, allowed: {ALLOWED_LANGUAGE}"
        ) from None
    return config


@contextmanager
def _readable_errors(
    name: str, path: str | PathLike, classes: Mapping[str, Any], gguf_file: str | None
) -> Iterator[None]:
    """Turn errors of a source that cannot be read into a ValueError that names the source."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{name}: got {path}, which needs another package ({error}); perhaps {write_install_command('pretrained')}"
        ) from error
    except OSError as error:
        if gguf_file:
            raise ValueError(f"gguf_file: got {gguf_file}, allowed: a file in {path}") from error
        raise ValueError(f"{name}: got {path}, allowed: {_describe_allowed(classes)}") from error


def _describe_allowed(classes: Mapping[str, Any]) -> str:
    """Describe the checkpoints of one of these types; without any, those of language models."""
    if not classes:
        return ALLOWED_PART
    return f"folder or hub id of a checkpoint of model_type {', '.join(classes)}"


def load_part(
    name: str,
    path: str | PathLike,
    classes: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    gguf_file: str | None = None,
    **options: Any,
) -> Any:
    """Load a part of a model with all of its weights.

    Args:
        name: name of the part in an error.
        path: folder or hub id.
        classes: classes of transformers by model_type.
        dtype: dtype of the weights; None takes that of transformers.
        gguf_file: file in `path` with the weights.
        options: further arguments of `from_pretrained`.

    Raises:
        ValueError: there is no checkpoint of one of these types, or weights are missing.
    """
    config = _load_part_config(name, path, classes, gguf_file)
    with _readable_errors(name, path, classes, gguf_file):
        # A whole CLIP has a nested configuration: the class follows from the part of it that was loaded.
        model_class: Any = next(
            model_class for model_class in classes.values() if isinstance(config, model_class.config_class)
        )
        if gguf_file:
            # With the package `kernels`, transformers would keep the weights packed, which cannot be trained.
            options["quantization_config"] = GgufConfig(dequantize=True)
        model = load_model(
            model_class, path, label=name, ignored=TEXT_SIDE_WEIGHTS, gguf_file=gguf_file, dtype=dtype, **options
        )
    if gguf_file and hasattr(model.config, "quantization_config"):
        # The weights are unpacked; a model that is called packed can neither be saved nor trained.
        del model.config.quantization_config
    return model


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, language: str | PathLike) -> None:
    """Add `<image>`, a pad token and the limit of positions to a tokenizer.

    The pad token is the unknown token, as in LLaVA, or else the end token.

    Args:
        tokenizer: tokenizer of the language model.
        config: configuration of the language model.
        language: source of the language model, for errors.

    Raises:
        ValueError: the tokenizer has no end token, so that answers would not end; or more tokens than the language
            model has embeddings.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"language: got {language} with {len(tokenizer)} tokens in its tokenizer, allowed: up to "
            f"{config.vocab_size}, the rows of its embeddings"
        )
    if tokenizer.eos_token is None:
        raise ValueError(f"language: got the tokenizer of {tokenizer.name_or_path}, allowed: one with an eos_token")
    # normalized=False: a normalizer could change the text of the token and then never match it.
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    # Many tokenizers have no limit, which transformers represents as 10^30.
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)


def resize_embeddings(language: PreTrainedModel, size: int) -> None:
    """Extend the embeddings and the head to `size` tokens, if they have fewer.

    A new row is the mean of the old ones, which makes the token neither likely nor special. transformers'
    `mean_resizing` would sample it.
    """
    old = language.config.get_text_config().vocab_size
    if size <= old:
        return
    language.resize_token_embeddings(size, mean_resizing=False)
    for table in (language.get_input_embeddings().weight.data, language.get_output_embeddings().weight.data):
        table[old:] = table[:old].mean(dim=0)
