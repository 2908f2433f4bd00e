"""CMAI as an attention function of transformers, registered as "cmai".

On a GPU, prompts and training take fused kernels (`redux.kernels`) if the mask is causal with padding: the same
decisions, and attention that reads a mask only where text meets an image. A decoded token takes the kernels of
`redux.kernels.decoding`. Other calls take plain code.

Shapes: batch, heads, kv_heads, rows (queries of this call), keys (all tokens so far), masks (batch, or 1 if all
sequences share a mask), mask_rows (rows, or 1 for a mask of `_build_mask` in its short form).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from redux.cmai import Inhibition, build_causal_mask, is_recording
from redux.decoding import DecodingStep
from redux.focus import mean_attention_weights
from redux.kernels import use_fused
from redux.packed import PackedInhibition
from redux.parallel import head_mesh
from redux.precision import without_autocast

ATTENTION_NAME = "cmai"

MASKED_SCORE = -1e4
"""Bound of a float mask: a pair whose score it lowers by this much or more has weight zero."""

UNSUPPORTED_ARGUMENTS = ("position_bias", "softcap", "cache", "sliding_window")
"""Arguments of transformers' attention functions that fused kernels do not know."""

MAX_FUSED_LENGTH = 2**15
"""Most tokens of a prompt for the fused kernels, whose offsets within a mask have 32 bits."""

FUSED_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
"""Dtypes of the fused kernels."""


@dataclass(frozen=True)
class AttentionRecorder:
    """Attention weights of the last rows of a sequence, as the model uses them.

    Args:
        rows: number of the last rows.
        weights: attention of these rows to each key, mean over heads and rows, by layer.
    """

    rows: int
    weights: dict[int, Float[Tensor, "keys"]] = field(default_factory=dict)

    def add(
        self,
        layer: int,
        query: Float[Tensor, "1 heads rows head_dim"],
        key: Float[Tensor, "1 kv_heads keys head_dim"],
        attention_mask: Shaped[Tensor, "1 mask_heads rows keys"],
        scale: float,
    ) -> None:
        """Add a layer; the mask is final, with the inhibition."""
        first_row = query.shape[2] - self.rows
        total = torch.zeros(key.shape[2], device=query.device)
        for head in range(query.shape[1]):
            # A mask for each head, or one for all.
            head_mask = attention_mask[:, head % attention_mask.shape[1], first_row:]
            visible, bias = (
                (head_mask, None) if head_mask.dtype == torch.bool else (head_mask > MASKED_SCORE, head_mask)
            )
            head_keys = key[:, head * key.shape[1] // query.shape[1]].unsqueeze(1)
            weights = mean_attention_weights(query[:, head : head + 1, first_row:], head_keys, visible, scale, bias)
            total += weights[0].mean(dim=0)
        self.weights[layer] = total / query.shape[1]


_recorder: ContextVar[AttentionRecorder | None] = ContextVar("recorded attention", default=None)


@contextmanager
def record_attention(rows: int) -> Iterator[AttentionRecorder]:
    """Record the attention of the last rows in each layer of a forward pass within the block, by plain code.

    The pass must have the attention function "cmai", one sequence without padding, and no cache.
    """
    recorder = AttentionRecorder(rows)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def inhibited_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Shaped[Tensor, "masks one mask_rows keys"] | None,
    inhibition: Inhibition | DecodingStep | PackedInhibition | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch rows heads head_dim"], None]:
    """Scaled-dot-product attention under the causal mask and the layer's inhibition; registered as "cmai".

    Args:
        module: attention module of transformers.
        query, key, value: as transformers passes them.
        attention_mask: mask of `_build_mask`, or a caller's: booleans, or floats to add to the scores.
        inhibition: inhibition of this forward pass; None without one.
        scaling: factor of the scores; None is 1 / sqrt(head_dim).
        kwargs: further arguments of transformers' attention functions.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(inhibition, PackedInhibition):
        # Attend within each conversation; its mask takes the place of that of the rows.
        packed = inhibition.to(query.device)
        conversations, short_mask = packed.conversations, packed.conversations.padding[:, None, None]
        split_query, split_key, split_value = (conversations.split(rows) for rows in (query, key, value))
        output, _ = inhibited_attention(
            module, split_query, split_key, split_value, short_mask, packed.inhibition, scaling, **kwargs
        )
        return conversations.join(output), None
    if isinstance(inhibition, DecodingStep):
        return _attend_decoded(module, layer, query, key, value, attention_mask, inhibition, scaling, **kwargs)
    if inhibition is not None and attention_mask is not None and not _is_short_mask(attention_mask):
        _split_mask(attention_mask)  # Refuse here a mask that only some layers would read
    active = inhibition if inhibition is not None and inhibition.gammas[layer] > 0 else None
    recorder = _recorder.get()
    if active is None and recorder is None and (attention_mask is None or not _is_short_mask(attention_mask)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Fused kernels, if they serve this call.
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    unsupported = _unsupported(module, query, key, value, attention_mask, active, kwargs)
    if use_fused("CMAI" if active else "attention with padding", query.device, unsupported):
        return _fused_attention(module, query, key, value, attention_mask, active, scale)
    # Plain code.
    if attention_mask is None or _is_short_mask(attention_mask):
        padding = None if attention_mask is None else attention_mask[:, 0, 0]
        attention_mask = build_causal_mask(padding, key.shape[2], query.device)[:, :, -query.shape[2] :]
    if active is not None:
        # A StaticCache has keys to come, too.
        length = active.is_image.shape[1]
        key, value, attention_mask = key[:, :, :length], value[:, :, :length], attention_mask[..., :length]
        visible, bias = _split_mask(attention_mask)
        mesh = head_mesh(module, query.shape[1])
        with without_autocast(query.device):
            kept = active.to(query.device).compute_mask(layer, query, key, visible, scale, bias, mesh)
        attention_mask = visible & kept if bias is None else bias.masked_fill(~kept, torch.finfo(bias.dtype).min)
    if recorder is not None:
        recorder.add(layer, query, key, attention_mask, scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _attend_decoded(
    module: nn.Module,
    layer: int,
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Any,
    step: DecodingStep,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch 1 heads head_dim"], None]:
    """Compute the attention of a decoded token: fused where that is possible, else as for many rows."""
    visible, bias = _split_mask(attention_mask)
    if step.gammas[layer] > 0:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mesh = head_mesh(module, query.shape[1])
        step = step.to(query.device)
        unsupported = ""
        if bias is not None:
            unsupported = "the mask has floats"
        elif mesh is not None:
            unsupported = "heads are split over ranks"
        elif kwargs.get("dropout") or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
            unsupported = "attention has dropout, a cap or a position bias"
        output = step.attend_fused(layer, query, key, value, visible, scale, unsupported)
        if output is not None:
            return output, None
        # The decorator torch.no_grad() would break the graph of a compiled step (torch 2.13).
        with torch.no_grad(), without_autocast(query.device):
            kept = step.compute_mask(layer, query, key, visible, scale, bias, mesh)
        attention_mask = visible & kept if bias is None else bias.masked_fill(~kept, torch.finfo(bias.dtype).min)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _fused_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads rows head_dim"],
    value: Float[Tensor, "batch kv_heads rows head_dim"],
    attention_mask: UInt8[Tensor, "masks 1 1 rows"] | None,
    inhibition: Inhibition | None,
    scale: float,
) -> tuple[Float[Tensor, "batch rows heads head_dim"], None]:
    """Compute attention and its inhibition with fused kernels; the mask is None or padding."""
    from redux.kernels.masked_attention import masked_attention

    padding = key_mask = None
    if attention_mask is not None:
        padding = attention_mask.flatten(1)
        if len(padding) != len(query):
            padding = padding.expand(len(query), -1).contiguous()
    if inhibition is not None:
        inhibition = inhibition.to(query.device)
        mesh = head_mesh(module, query.shape[1])
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        with without_autocast(query.device):
            key_mask = inhibition.compute_key_mask(layer, query, key, padding, scale, mesh)
    return masked_attention(query, key, value, scale, padding, key_mask).transpose(1, 2), None


def _unsupported(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    inhibition: Inhibition | None,
    kwargs: dict[str, Any],
) -> str:
    """Return why fused kernels cannot serve a call of `inhibited_attention`, or "" if they can."""
    # In the order of the checks: every layer of every call passes them, so text is made only for a reason.
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal or not (attention_mask is None or _is_short_mask(attention_mask)):
        return "the mask is not causal with padding"
    if query.shape[2] != key.shape[2]:
        return "there are earlier tokens in the cache"
    if query.shape[2] > MAX_FUSED_LENGTH:
        return f"there are more than {MAX_FUSED_LENGTH} tokens"
    if kwargs.get("dropout"):
        return "attention has dropout"
    if others := [name for name in UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]:
        return f"of {', '.join(others)}"
    # The limits of the kernels: dtype, dimensions of a head, and options of CMAI.
    if query.dtype not in FUSED_DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"{query.dtype}, {key.dtype} and {value.dtype} are not one of float16, bfloat16 and float32"
    if query.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != query.dtype:
        return "autocast would change the dtype"
    if not 16 <= query.shape[-1] == value.shape[-1] <= 128:
        return f"heads have {query.shape[-1]} and {value.shape[-1]} dimensions"
    if inhibition is not None and not inhibition.cmai.preamble:
        return "preamble is false"
    if inhibition is not None and inhibition.cmai.heads != "mean":
        return "heads have masks of their own"
    if is_recording():
        return "decisions are recorded"
    if _recorder.get() is not None:
        return "attention is recorded"
    return ""


def _split_mask(
    mask: Shaped[Tensor, "masks one rows keys"],
) -> tuple[Bool[Tensor, "masks one rows keys"], Float[Tensor, "masks one rows keys"] | None]:
    """Split a mask into visible pairs and values to add to scores; ValueError for one that CMAI cannot read."""
    if mask.shape[1] != 1 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask: got {mask.dtype} of shape {tuple(mask.shape)}, "
            "allowed: booleans or floats of shape (batch, 1, rows, keys), one mask for all heads"
        )
    return (mask, None) if mask.dtype == torch.bool else (mask > MASKED_SCORE, mask)


def _is_short_mask(attention_mask: Tensor) -> bool:
    """Return True if a mask has the short form of `_build_mask`: causal, with padding.

    A caller's mask of uint8, which `_split_mask` refuses, has a row for each token.
    """
    return attention_mask.dtype == torch.uint8 and attention_mask.shape[2] == 1


def _build_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build the mask of a forward pass: in a short form if it is causal and there are no earlier tokens.

    Returns:
        None for a causal mask; uint8 of shape (batch, 1, 1, keys) for one with padding, 0 for keys that no row sees;
        else sdpa_mask's booleans of shape (batch, 1, rows, keys).
    """
    # CMAI removes pairs from the mask, so one must exist.
    explicit = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    padding, length = kwargs.get("attention_mask"), kwargs.get("q_length")
    offsets = (kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0))
    if (
        args
        or kwargs.get("mask_function") is not causal_mask_function
        or not kwargs.get("allow_is_causal_skip", True)
        or kwargs.get("local_size") is not None
        or length != kwargs.get("kv_length")
        or any(isinstance(offset, Tensor) or offset != 0 for offset in offsets)
        or (padding is not None and padding.shape[-1] != length)
    ):
        return sdpa_mask(*args, **explicit)
    # transformers finds out if nothing is padded, as for its own attention: one wait for the GPU in a forward pass.
    if padding is None or sdpa_mask(**kwargs) is None:
        return None
    return padding.to(torch.uint8)[:, None, None]


AttentionInterface.register(ATTENTION_NAME, inhibited_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _build_mask)
