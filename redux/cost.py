"""Cost of a configuration: floating-point operations by part, and bytes of the caches.

A search over settings computes this thousands of times, also for models that do not fit on its machine. So no model is
built or run: every number follows from the configuration alone, in about a millisecond.

FLOPs are those that torch's FlopCounterMode counts in the forward pass: two for each multiply-add of matrix products,
convolutions and attention. They are exact; the tests require equality. As in FlopCounterMode, attention under a
causal mask counts in full, and norms, softmax, sorting and gathering count nothing. So FLOPs measure work, not time:
the softmax of each head's map and the sort of each row of focus, two costs of CMAI, are not included.

Towers are CLIP's or SigLIP's ViT. Language models are of LLaMA's build: gated MLPs, keys and values of all tokens in
every layer, and any number of key heads.
"""

from dataclasses import dataclass
from typing import Any

from redux.configuration import ReduxConfig
from redux.focus_cache import FREE_COLUMNS
from redux.settings import VMTC, CompressionStage, Reduction

FOCUS_NUMBER_BYTES = 4
"""Bytes of a number of CMAI's focus, which is float32 for every dtype of the model."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one row of a batch: FLOPs by part, and bytes of the caches.

    Args:
        tower: FLOPs of the image tower on the tokens that VMTC leaves in each block, without those of VMTC.
        compression: FLOPs of VMTC (importance, K-means, merging) or of a reduction.
        projector: FLOPs of the projector between tower and language model.
        language: FLOPs of the language model and its head, without those of CMAI.
        inhibition: FLOPs of CMAI: mean attention over heads, and focus.
        kv_bytes: keys and values of all layers.
        focus_bytes: rows of A_t2i in a `FocusCache`, its `t2i`.
    """

    tower: int = 0
    compression: int = 0
    projector: int = 0
    language: int
    inhibition: int
    kv_bytes: int
    focus_bytes: int

    @property
    def flops(self) -> int:
        """FLOPs of all parts."""
        return self.tower + self.compression + self.projector + self.language + self.inhibition


def compute_cost(
    config: ReduxConfig,
    text: int,
    images: int = 1,
    bytes_per_number: int = 2,
    logits_to_keep: int = 1,
    preamble: int = 0,
) -> Cost:
    """Compute the cost of the forward pass over a whole prompt.

    Args:
        config: configuration of the model.
        text: text tokens of the prompt.
        images: images of the prompt, one after the other.
        bytes_per_number: bytes of a number in keys and values; 2 for bfloat16, 4 for float32.
        logits_to_keep: last positions with logits, as in the model's forward; 0 is all of them, 1 that of generate.
        preamble: text tokens before the images, where CMAI does nothing.

    Raises:
        ValueError: several layers of the tower are read, or a budget does not fit the tower.

    LLaVA-1.5-7B on a question of 64 tokens (other sizes are transformers' defaults), and the share of work that is left
    with the method's defaults:

    >>> sizes = {"text_config": {"model_type": "llama", "intermediate_size": 11008}}
    >>> llava = compute_cost(ReduxConfig(**sizes), text=64)
    >>> f"{llava.flops / 1e12:.1f} TFLOPs, {llava.kv_bytes / 2**20:.0f} MiB"
    '8.9 TFLOPs, 320 MiB'
    >>> ours = compute_cost(ReduxConfig(**sizes, vmtc=VMTC(), cmai={}), text=64)
    >>> f"{ours.flops / llava.flops:.2f}, {ours.kv_bytes / llava.kv_bytes:.2f}"
    '0.55, 0.55'
    """
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer: got {config.vision_feature_layer}, allowed: one layer")
    if not 0 <= preamble <= text:
        raise ValueError(f"preamble: got {preamble}, allowed: 0 to {text}, the text tokens of the prompt")
    stages = tuple(config.compression_stages.values())
    image_tokens = images * _tokens_per_image(config)
    tokens = text + image_tokens
    return Cost(
        tower=images * _tower_flops(config, stages),
        compression=images * _compression_flops(config, stages),
        projector=images * _projector_flops(config),
        language=_language_flops(config, tokens, tokens, logits_to_keep or tokens),
        inhibition=_inhibition_flops(config, text - preamble, tokens, text - preamble, image_tokens),
        kv_bytes=_kv_bytes(config, tokens, bytes_per_number),
        focus_bytes=_focus_bytes(config, text - preamble, image_tokens),
    )


def compute_step_cost(
    config: ReduxConfig, text: int, images: int = 1, bytes_per_number: int = 2, preamble: int = 0
) -> Cost:
    """Compute the cost of the first generated token after the prompt of `compute_cost`, on its caches.

    Arguments are those of `compute_cost`. Bytes are those after the token. FLOPs and kv_bytes of a later token are
    those of the first token after a longer prompt.
    """
    image_tokens = images * _tokens_per_image(config)
    tokens = text + image_tokens + 1
    text_after_image = text - preamble + 1
    cmai = config.method_settings("cmai")
    is_inhibited = cmai is not None and cmai.generated
    return Cost(
        language=_language_flops(config, 1, tokens, 1),
        inhibition=is_inhibited * _inhibition_flops(config, 1, tokens, text_after_image, image_tokens, FREE_COLUMNS),
        kv_bytes=_kv_bytes(config, tokens, bytes_per_number),
        focus_bytes=_focus_bytes(config, text_after_image if is_inhibited else text_after_image - 1, image_tokens),
    )


def matmul_flops(rows: int, inner: int, columns: int) -> int:
    """FLOPs of the product of (rows x inner) by (inner x columns)."""
    return 2 * rows * inner * columns


def attention_flops(rows: int, keys: int, width: int) -> int:
    """FLOPs of scaled-dot-product attention: QK^T, and weights by V. `width` is that of all heads together."""
    return matmul_flops(rows, width, keys) + matmul_flops(rows, keys, width)


def _tokens_per_image(config: ReduxConfig) -> int:
    """Tokens of one image in the language model, with the class token if it is a feature."""
    return config.num_visual_tokens + (config.keeps_class_token and config.has_class_token)


def _tower_flops(config: ReduxConfig, stages: tuple[CompressionStage, ...]) -> int:
    """FLOPs of the blocks in use, on the tokens that VMTC leaves."""
    tower, prefix = config.vision_config, int(config.has_class_token)
    dim = tower.hidden_size
    out = {stage.block: stage.num_tokens_out for stage in stages}
    reduction = config.method_settings("reduction")
    resizes = reduction is not None and reduction.method == "resize"
    patches = config.num_visual_tokens if resizes else config.num_patches
    flops = matmul_flops(patches, tower.num_channels * tower.patch_size**2, dim)  # Convolution into patches
    tokens = prefix + patches
    for block in range(config.num_blocks_used):
        flops += 4 * matmul_flops(tokens, dim, dim)  # Queries, keys, values, output
        flops += attention_flops(tokens, tokens, dim)
        if block in out:
            tokens = prefix + out[block]  # VMTC works between attention and MLP
        flops += 2 * matmul_flops(tokens, dim, tower.intermediate_size)  # MLP
    return flops


def _compression_flops(config: ReduxConfig, stages: tuple[CompressionStage, ...]) -> int:
    vmtc, reduction = config.method_settings("vmtc"), config.method_settings("reduction")
    if vmtc:
        inputs = (config.num_patches, *(stage.num_tokens_out for stage in stages))
        return sum(_stage_flops(config, vmtc, stage, patches) for stage, patches in zip(stages, inputs, strict=False))
    return _reduction_flops(config, reduction) if reduction else 0


def _stage_flops(config: ReduxConfig, vmtc: VMTC, stage: CompressionStage, patches: int) -> int:
    """FLOPs of VMTC in one block with `patches` patch tokens as input."""
    dim, redundant = config.vision_config.hidden_size, patches - stage.kept
    importance = matmul_flops(1, dim, patches + 1) if config.has_class_token else matmul_flops(patches, dim, patches)
    if not stage.clusters:
        return importance
    seeds = (stage.clusters - 1) * matmul_flops(redundant, dim, 1) if vmtc.seeds == "farthest" else 0
    # K-means assigns once more than it updates centroids.
    assigning = (vmtc.iterations + 1) * matmul_flops(redundant, dim, stage.clusters)
    centroids = vmtc.iterations * matmul_flops(stage.clusters, redundant, dim)
    merging = matmul_flops(stage.clusters, redundant, dim)
    return importance + seeds + assigning + centroids + merging


def _reduction_flops(config: ReduxConfig, reduction: Reduction) -> int:
    patches, dim = config.num_patches, config.vision_config.hidden_size
    out = reduction.count_tokens(patches)
    if reduction.method in ("stride", "random", "resize"):  # They select tokens or pixels without a product
        return 0
    mixing = matmul_flops(out, patches, dim)
    if reduction.method != "prumerge":
        return mixing
    last = matmul_flops(1, dim, dim) + matmul_flops(patches + 1, dim, dim)  # A query and all keys of the last block
    importance = matmul_flops(1, dim, patches + 1)
    similarity = matmul_flops(out - 1, dim, patches)
    return last + importance + similarity + mixing


def _projector_flops(config: ReduxConfig) -> int:
    width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    return matmul_flops(_tokens_per_image(config), width, hidden) + matmul_flops(
        _tokens_per_image(config), hidden, hidden
    )


def _language_flops(config: ReduxConfig, rows: int, keys: int, logits: int) -> int:
    """FLOPs of the language model.

    Args:
        config: configuration of the model.
        rows: tokens of this call.
        keys: tokens so far, with those of this call.
        logits: rows that go through the head.
    """
    text = config.text_config
    hidden, queries, key_width = text.hidden_size, text.num_attention_heads * _head_dim(text), _key_width(text)
    layer = 2 * matmul_flops(rows, hidden, queries)  # Queries, output
    layer += 2 * matmul_flops(rows, hidden, key_width)  # Keys, values
    layer += attention_flops(rows, keys, queries)
    layer += 3 * matmul_flops(rows, hidden, text.intermediate_size)  # Gate, up, down
    return text.num_hidden_layers * layer + matmul_flops(logits, hidden, text.vocab_size)


def _inhibition_flops(
    config: ReduxConfig, rows: int, keys: int, text_after_image: int, image: int, free_columns: int = 0
) -> int:
    """FLOPs of CMAI in all layers that inhibit, for `rows` text tokens that see an image."""
    if not (layers := _count_inhibiting_layers(config, image)):
        return 0
    text, cmai = config.text_config, config.method_settings("cmai")
    # Eq. 10.
    focus = 0 if cmai.focus == "tia" else matmul_flops(rows, text_after_image, image + free_columns)
    if cmai.heads != "mean":
        return _count_inhibited_heads(config, image) * (matmul_flops(rows, _head_dim(text), keys) + focus)
    # Weights: QK^T of each head; raw scores: one product of the key heads side by side.
    width = text.num_attention_heads * _head_dim(text) if cmai.scores == "weights" else _key_width(text)
    return layers * (matmul_flops(rows, width, keys) + focus)


def _count_inhibited_heads(config: ReduxConfig, image: int) -> int:
    """Count the heads that have masks of their own, in all layers that inhibit at inference."""
    text, cmai = config.text_config, config.method_settings("cmai")
    if not _count_inhibiting_layers(config, image):
        return 0
    gammas = enumerate(cmai.compute_gammas(text.num_hidden_layers))
    return sum(len(cmai.select_heads(layer, text.num_attention_heads)) for layer, gamma in gammas if gamma > 0)


def _count_inhibiting_layers(config: ReduxConfig, image: int) -> int:
    """Count the layers that inhibit at inference. With gamma 0 or without an image there are none."""
    cmai = config.method_settings("cmai")
    if cmai is None or cmai.active == "training" or image == 0:
        return 0
    return sum(ratio > 0 for ratio in cmai.compute_gammas(config.text_config.num_hidden_layers))


def _kv_bytes(config: ReduxConfig, tokens: int, bytes_per_number: int) -> int:
    text = config.text_config
    return 2 * text.num_hidden_layers * tokens * _key_width(text) * bytes_per_number


def _focus_bytes(config: ReduxConfig, text_after_image: int, image: int) -> int:
    """Bytes of A_t2i of all text that sees an image, in layers that inhibit; "tia" needs no earlier rows."""
    layers = _count_inhibiting_layers(config, image)
    if not layers or config.method_settings("cmai").focus == "tia":
        return 0
    rows = layers if config.method_settings("cmai").heads == "mean" else _count_inhibited_heads(config, image)
    return rows * text_after_image * image * FOCUS_NUMBER_BYTES


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _key_width(text: Any) -> int:
    """Width of one token's keys in a layer."""
    return text.num_key_value_heads * _head_dim(text)
