"""What a configuration costs: floating-point operations by part, and the bytes of its caches.

A search over settings asks this thousands of times, and of models that do not fit on its machine; so nothing is built
or run here, every number follows from the configuration alone, in about a millisecond.

FLOPs are those that torch's FlopCounterMode counts in the forward pass: two for each multiply-add of matrix products,
convolutions and attention.  They are exact, the tests ask for equality.  As there, attention under a causal mask counts
in full, and norms, softmax, sorting and gathering count nothing; so they tell how much work there is, not how long it
takes: of CMAI, for one, the softmax of each head's map and the sort of each row of focus are not in them.

Towers are CLIP's or SigLIP's ViT, as everywhere here; language models are of LLaMA's build, that is with gated MLPs,
keys and values of all tokens in every layer, and any number of key heads.
"""

from dataclasses import dataclass
from typing import Any

from redux.configuration import ReduxConfig
from redux.settings import VMTC, CompressionStage, Reduction

FOCUS_NUMBER_BYTES = 4
"""Bytes of a number of CMAI's focus, whatever the model's own are."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one row of a batch: FLOPs by part, and bytes of what lasts until the answer is complete.

    tower: of the image tower, on the tokens that VMTC leaves to each block, without VMTC's own.
    compression: VMTC's own (importance, K-means, merging), or a reduction's.
    projector: between tower and language model.
    language: of the language model and its head, without CMAI's own.
    inhibition: CMAI's own: attention averaged over heads, and focus.
    kv_bytes: keys and values of all layers.
    focus_bytes: what a `FocusCache` holds beside them, its `rows`.
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
        """Of all parts."""
        return self.tower + self.compression + self.projector + self.language + self.inhibition


def compute_cost(
    config: ReduxConfig,
    text: int,
    images: int = 1,
    bytes_per_number: int = 2,
    logits_to_keep: int = 1,
    preamble: int = 0,
) -> Cost:
    """The forward pass over a whole prompt of `text` text tokens and `images` images, one after the other.

    bytes_per_number: of keys and values; 2 for bfloat16, 4 for float32.
    logits_to_keep: at how many of the last positions there are logits, as in the model's forward; 0 for all of them,
        1 as generate has it.
    preamble: how many of the text tokens stand before the images, where CMAI has nothing to do.
    Raises ValueError where several layers of the tower are read, or a budget does not fit the tower.

    LLaVA-1.5-7B on a question of 64 tokens, and the share of the work that is left with the method's defaults:

    >>> sizes = {"text_config": {"model_type": "llama", "intermediate_size": 11008}}  # the others are transformers' own
    >>> whole = cost(ReduxConfig(**sizes), text=64)
    >>> f"{whole.flops / 1e12:.1f} TFLOPs, {whole.kv_bytes / 2**20:.0f} MiB"
    '8.9 TFLOPs, 320 MiB'
    >>> ours = cost(ReduxConfig(**sizes, vmtc=VMTC(), cmai={}), text=64)
    >>> f"{ours.flops / whole.flops:.2f}, {ours.kv_bytes / whole.kv_bytes:.2f}"
    '0.55, 0.55'
    """
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer: got {config.vision_feature_layer}, allowed: one layer")
    if not 0 <= preamble <= text:
        raise ValueError(f"preamble: got {preamble}, allowed: 0 to {text}, the text tokens of the prompt")
    stages, seen = tuple(config.compression_stages.values()), images * _tokens_per_image(config)
    tokens = text + seen
    return Cost(
        tower=images * _tower_flops(config, stages),
        compression=images * _compression_flops(config, stages),
        projector=images * _projector_flops(config),
        language=_language_flops(config, tokens, tokens, logits_to_keep or tokens),
        inhibition=_inhibition_flops(config, text - preamble, tokens, text - preamble, seen),
        kv_bytes=_kv_bytes(config, tokens, bytes_per_number),
        focus_bytes=_focus_bytes(config, text - preamble, seen),
    )


def compute_step_cost(
    config: ReduxConfig, text: int, images: int = 1, bytes_per_number: int = 2, preamble: int = 0
) -> Cost:
    """The first token generated after the prompt of `cost`, on the caches it left; bytes are those held afterwards.

    FLOPs and kv_bytes of a later token are those of a first one after a prompt that ends where the later one begins.
    """
    seen = images * _tokens_per_image(config)
    tokens, behind = text + seen + 1, text - preamble + 1
    cmai = config.method_settings("cmai")
    inhibited = cmai is not None and cmai.generated
    return Cost(
        language=_language_flops(config, 1, tokens, 1),
        inhibition=_inhibition_flops(config, 1, tokens, behind, seen) if inhibited else 0,
        kv_bytes=_kv_bytes(config, tokens, bytes_per_number),
        focus_bytes=_focus_bytes(config, behind if inhibited else behind - 1, seen),
    )


def matmul_flops(rows: int, inner: int, columns: int) -> int:
    """FLOPs of (rows x inner) by (inner x columns)."""
    return 2 * rows * inner * columns


def attention_flops(rows: int, keys: int, width: int) -> int:
    """FLOPs of scaled-dot-product attention: QK^T, and weights by V.  width: of all heads side by side."""
    return matmul_flops(rows, width, keys) + matmul_flops(rows, keys, width)


def _tokens_per_image(config: ReduxConfig) -> int:
    """Tokens of one image in the language model, the class token among them where it is a feature."""
    return config.num_visual_tokens + (config.keeps_class_token and config.has_class_token)


def _tower_flops(config: ReduxConfig, stages: tuple[CompressionStage, ...]) -> int:
    tower, first = config.vision_config, int(config.has_class_token)
    dim, out = tower.hidden_size, {stage.block: stage.out for stage in stages}
    flops = matmul_flops(config.num_patches, tower.num_channels * tower.patch_size**2, dim)  # convolution into patches
    tokens = first + config.num_patches
    for block in range(config.num_blocks_used):
        flops += 4 * matmul_flops(tokens, dim, dim)  # queries, keys, values, output
        flops += attention_flops(tokens, tokens, dim)
        if block in out:
            tokens = first + out[block]
        flops += 2 * matmul_flops(tokens, dim, tower.intermediate_size)  # MLP
    return flops


def _compression_flops(config: ReduxConfig, stages: tuple[CompressionStage, ...]) -> int:
    vmtc, reduction = config.method_settings("vmtc"), config.method_settings("reduction")
    if vmtc:
        given = (config.num_patches, *(stage.out for stage in stages))
        return sum(_stage_flops(config, vmtc, stage, patches) for stage, patches in zip(stages, given, strict=False))
    return _reduction_flops(config, reduction) if reduction else 0


def _stage_flops(config: ReduxConfig, vmtc: VMTC, stage: CompressionStage, patches: int) -> int:
    """VMTC at one block that is given `patches` patch tokens."""
    dim, redundant = config.vision_config.hidden_size, patches - stage.kept
    importance = matmul_flops(1, dim, patches + 1) if config.has_class_token else matmul_flops(patches, dim, patches)
    if not stage.clusters:
        return importance
    seeds = (stage.clusters - 1) * matmul_flops(redundant, dim, 1) if vmtc.seeds == "farthest" else 0
    assigning = (vmtc.iterations + 1) * matmul_flops(redundant, dim, stage.clusters)
    centroids = vmtc.iterations * matmul_flops(stage.clusters, redundant, dim)
    merging = matmul_flops(stage.clusters, redundant, dim)
    return importance + seeds + assigning + centroids + merging


def _reduction_flops(config: ReduxConfig, reduction: Reduction) -> int:
    patches, dim = config.num_patches, config.vision_config.hidden_size
    out = reduction.count_tokens(patches)
    if reduction.method in ("stride", "random"):  # tokens are picked
        return 0
    mixing = matmul_flops(out, patches, dim)
    if reduction.method != "prumerge":
        return mixing
    last = matmul_flops(1, dim, dim) + matmul_flops(patches + 1, dim, dim)  # a query and all keys of the last block
    importance = matmul_flops(1, dim, patches + 1)
    likeness = matmul_flops(out - 1, dim, patches)
    return last + importance + likeness + mixing


def _projector_flops(config: ReduxConfig) -> int:
    width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    return matmul_flops(_tokens_per_image(config), width, hidden) + matmul_flops(
        _tokens_per_image(config), hidden, hidden
    )


def _language_flops(config: ReduxConfig, rows: int, keys: int, logits: int) -> int:
    """rows: tokens of this call; keys: tokens so far, these among them; logits: rows that go through the head."""
    text = config.text_config
    hidden, queries, key_width = text.hidden_size, text.num_attention_heads * _head_dim(text), _key_width(text)
    layer = 2 * matmul_flops(rows, hidden, queries)  # queries, output
    layer += 2 * matmul_flops(rows, hidden, key_width)  # keys, values
    layer += attention_flops(rows, keys, queries)
    layer += 3 * matmul_flops(rows, hidden, text.intermediate_size)  # gate, up, down
    return text.num_hidden_layers * layer + matmul_flops(logits, hidden, text.vocab_size)


def _inhibition_flops(config: ReduxConfig, rows: int, keys: int, behind: int, image: int) -> int:
    """CMAI in all layers that inhibit.  behind: text tokens so far that see an image; image: image tokens."""
    if not (layers := _count_inhibiting_layers(config, image)):
        return 0
    text, cmai = config.text_config, config.method_settings("cmai")
    # weights: QK^T of each head; raw scores: one product of the key heads side by side
    width = text.num_attention_heads * _head_dim(text) if cmai.scores == "weights" else _key_width(text)
    focus = 0 if cmai.focus == "tia" else matmul_flops(rows, behind, image)  # eq. 10
    return layers * (matmul_flops(rows, width, keys) + focus)


def _count_inhibiting_layers(config: ReduxConfig, image: int) -> int:
    """How many layers inhibit at inference: with gamma 0, or without an image, none does."""
    cmai = config.method_settings("cmai")
    if cmai is None or cmai.active == "training" or image == 0:
        return 0
    return sum(ratio > 0 for ratio in cmai.compute_gammas(config.text_config.num_hidden_layers))


def _kv_bytes(config: ReduxConfig, tokens: int, bytes_per_number: int) -> int:
    text = config.text_config
    return 2 * text.num_hidden_layers * tokens * _key_width(text) * bytes_per_number


def _focus_bytes(config: ReduxConfig, behind: int, image: int) -> int:
    """A_t2i of the text that sees an image in every layer that inhibits; "tia" has no use for earlier tokens'."""
    layers = _count_inhibiting_layers(config, image)
    return (
        layers * behind * image * FOCUS_NUMBER_BYTES if layers and config.method_settings("cmai").focus != "tia" else 0
    )


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _key_width(text: Any) -> int:
    """Numbers in one token's keys of a layer."""
    return text.num_key_value_heads * _head_dim(text)
