"""Run a training step on shapes alone and count the bytes of its tensors.

The modules, their backward passes and VMTC and CMAI run as in training, but tensors of floats are on torch's device
"meta", which has no memory. Integers and booleans that follow from token ids keep their values, since image tokens and
learned tokens decide the shapes of later tensors. So no formula repeats what a model computes, and each language model
of transformers, each option of the method and each adapter has its own count.

Cost: five seconds of CPU for a step of a 7B model with recomputed activations, for any micro-batch.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from redux.attention import ATTENTION_NAME, inhibited_attention
from redux.conversation import IGNORE_INDEX
from redux.rounding import round_up

Device = Literal["cpu", "cuda"]

aten: Any = torch.ops.aten

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations whose boolean indices decide a shape."""

CUDA_BLOCK_BYTES = 512
"""torch's allocator for GPUs rounds sizes up to a multiple of this."""


class SampleShape(NamedTuple):
    """Sizes of a sample that decide the memory of a step.

    Args:
        length: tokens, image tokens included.
        learned: tokens with a label.
        has_image: True with an image.
    """

    length: int
    learned: int
    has_image: bool


class StepTrace(NamedTuple):
    """Bytes that a training step needs besides the weights and the state of the optimizer.

    Args:
        saved_bytes: tensors that are kept for the backward pass when it begins: the activations.
        forward_peak_bytes: largest sum of activations and temporary tensors in the forward pass.
        backward_peak_bytes: the same in the backward pass, with gradients that were not yet taken away.
    """

    saved_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int


class ByteCounter:
    """Counter of the bytes of living tensors, by their storages."""

    def __init__(self, block_bytes: int = 1) -> None:
        self.block_bytes = block_bytes
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor until its storage is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = round_up(storage.nbytes(), self.block_bytes)
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def ignore(self, tensor: Tensor) -> None:
        """Never count a tensor that exists before the step."""
        self._known[tensor.untyped_storage()._cdata] = 0

    def _remove(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


class ShapeMode(TorchDispatchMode):
    """Runs operations on meta tensors, and those on known integers for real, and counts results."""

    def __init__(self, counter: ByteCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(func, args, kwargs or {})
        for tensor in list_tensors([result]):
            self.counter.add(tensor)
        return result


def list_tensors(values: Iterable[Any]) -> list[Tensor]:
    """List the tensors among arguments or results, which may be lists of tensors."""
    tensors = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += [item for item in value if isinstance(item, Tensor)]
    return tensors


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on meta tensors if one of its tensors is on "meta", else for real."""
    devices = {tensor.device.type for tensor in list_tensors((*args, *kwargs.values()))}
    if "meta" not in devices:
        if str(kwargs.get("device")) == "meta" and not _makes_floats(func, args, kwargs):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)
    if len(devices) == 1:
        return func(*args, **kwargs)
    if func in INDEXING and args[0].device.type == "meta":
        # The shape depends on the values of the index.
        indices = [
            part for index in args[1] for part in (index.nonzero(as_tuple=True) if _is_known_mask(index) else (index,))
        ]
        args = (args[0], indices, *args[2:])
    elif func._schema.is_mutable and isinstance(args[0], Tensor) and args[0].device.type == "cpu":
        return args[0]  # known integers are overwritten by unknown ones; only their size matters from here on
    return func(*map(_to_meta, args), **{name: _to_meta(value) for name, value in kwargs.items()})


def _makes_floats(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if an operation without meta tensors makes floats."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return bool(dtype.is_floating_point)
    tensors = [leaf for leaf in args if isinstance(leaf, Tensor)]
    if tensors:
        return bool(tensors[0].is_floating_point())
    if "arange" in str(func) or "full" in str(func):
        return any(isinstance(leaf, float) for leaf in args)
    return True


def _is_known_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.device.type == "cpu"


def _to_meta(value: Any) -> Any:
    """Move a tensor, or the tensors of a list, to "meta"."""
    if isinstance(value, list | tuple):
        return [_to_meta(item) for item in value]
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input


def _attend(
    device: Device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call the attention that torch chooses on a device."""
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # torch makes a mask of floats; here only its shape and dtype matter.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype, device=query.device).masked_fill(attn_mask, 0.0)
    if device == "cpu":
        out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    elif attn_mask is None and query.dtype != torch.float32:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    else:
        bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    return out


class _FusedAttention(torch.autograd.Function):
    """Tensors of `redux.kernels.masked_attention`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pairs: Tensor | None) -> Tensor:
        batch, heads, length, head_dim = query.shape
        out = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
        lse = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse, pairs)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, lse, _ = ctx.saved_tensors
        torch.empty_like(lse)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _fused_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    inhibition: Any = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Make the tensors of Redux's fused kernels: maps of text and image tokens, and the mask of pairs."""
    active = inhibition is not None and inhibition.gammas[module.layer_idx] > 0
    # Masks of single heads, and weights without the preamble, are plain code on every device.
    is_plain = active and (inhibition.cmai.heads != "mean" or not inhibition.cmai.preamble)
    if is_plain or (not active and attention_mask is None):
        return inhibited_attention(module, query, key, value, attention_mask, inhibition, scaling, **kwargs)
    pairs = None
    if active:
        batch, _, length, _ = query.shape
        rows, columns = length - inhibition.first_text_row, inhibition.columns.shape[1]
        with torch.no_grad():
            t2i = query.new_zeros(batch, rows, columns, dtype=torch.float32)
            t2t = query.new_zeros(batch, rows, rows, dtype=torch.float32) if inhibition.cmai.focus != "tia" else None
            focus = t2i if t2t is None else torch.baddbmm(t2i, t2t, t2i)
            pairs = torch.ones(batch, length, round_up(length, 16), dtype=torch.bool, device="meta")
            del t2i, t2t, focus
    return _FusedAttention.apply(query, key, value, pairs).transpose(1, 2), None


@contextmanager
def _imitate_device(device: Device, is_fused: bool) -> Iterator[None]:
    """Let attention and dropout keep what they keep on a device, within the block.

    For meta tensors torch would take its slowest attention. A mode of torch cannot do it, since recomputed activations
    would not see it (torch 2.13).
    """
    attend, drop = F.scaled_dot_product_attention, F.dropout
    functions: Any = F
    functions.scaled_dot_product_attention = partial(_attend, device)
    if device == "cuda":
        functions.dropout = _drop
    if is_fused:
        AttentionInterface.register(ATTENTION_NAME, _fused_attention)
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, functions.dropout = attend, drop
        AttentionInterface.register(ATTENTION_NAME, inhibited_attention)


def trace_shapes() -> ShapeMode:
    """Return a context in which meta tensors and known integers meet, without a count."""
    return ShapeMode(ByteCounter())


def trace_step(
    module: torch.nn.Module,
    make_batch: Callable[[], dict[str, Tensor]],
    device: Device,
    takes_gradients: bool,
    is_fused: bool = False,
) -> StepTrace:
    """Run forward and backward of a micro-batch on shapes.

    Args:
        module: module on "meta" whose forward returns the loss of the batch.
        make_batch: makes the arguments of its forward.
        device: device whose attention is assumed.
        takes_gradients: gradients are taken away as soon as they are computed, as ZeRO 2 and 3 do.
        is_fused: fused kernels compute CMAI.
    """
    # Weights and buffers count as states, see memory.py.
    counter = ByteCounter(CUDA_BLOCK_BYTES if device == "cuda" else 1)
    for tensor in (*module.parameters(), *module.buffers()):
        counter.ignore(tensor)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    handles = []
    if takes_gradients:
        handles = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
    try:
        with _imitate_device(device, is_fused), ShapeMode(counter):
            loss = module(**make_batch())
            # What the backward pass needs is still alive here.
            saved = counter.live
            forward_peak, counter.peak = counter.peak, counter.live
            loss.backward()
    finally:
        # The module is traced again with other sizes.
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    return StepTrace(saved, forward_peak, counter.peak)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def make_conversation_batch(samples: Sequence[SampleShape], image_tokens: int, image_id: int) -> dict[str, Tensor]:
    """Make a micro-batch of samples of given sizes, padded to the longest, as `move_to_device` does, without images.

    Args:
        samples: sizes of the samples.
        image_tokens: tokens of an image.
        image_id: id of the token `<image>`.
    """
    length = max(sample.length for sample in samples)
    text_id = int(image_id == 0)
    ids = torch.full((len(samples), length), text_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        # The begin token, the image, the text; the last tokens are learned.
        if sample.has_image:
            ids[row, 1 : 1 + image_tokens] = image_id
        labels[row, sample.length - sample.learned : sample.length] = text_id
        mask[row, : sample.length] = 1
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "weight": torch.empty(len(samples), device="meta"),
    }


def make_caption_batch(samples: Sequence[SampleShape], image_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make a micro-batch of captions with images.

    Args:
        samples: sizes of the samples.
        image_size: side of an image in pixels.
        dtype: dtype of the model.
    """
    length = max(sample.length for sample in samples)
    ids = torch.arange(len(samples) * length).view(len(samples), length) % 2
    return {
        "pixel_values": make_pixels(len(samples), image_size, dtype),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "weight": torch.empty(len(samples), device="meta"),
    }


def make_pixels(images: int, size: int, dtype: torch.dtype) -> Tensor:
    """Make normalised pixels, with the tensors that lie in memory meanwhile: twice as bytes, three times as floats."""
    copies = [torch.empty(images, 3, size, size, 2, dtype=torch.uint8, device="meta")]
    copies += [torch.empty(images, 3, size, size, device="meta") for _ in range(3)]
    return copies[-1].to(dtype)
