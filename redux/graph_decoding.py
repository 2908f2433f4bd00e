"""Greedy decoding of LLaVA by a CUDA graph.

In eager mode the host launches every kernel of every layer for each token, which takes longer than the GPU needs
for a small batch. A graph is captured once and then replayed by one call. All of a step is in it: the decoder on a
static cache, the choice of the token, the end of answers and the next position. The host looks at the device only now
and then, to see if all answers have ended.

The prompt runs as in `generate`, into a growing cache, which is then copied into the static one. So prompts take the
same path, whatever decodes after them. The graph of the last shape is kept with the model and serves further batches
of the same size and of about the same length.

Shapes: batch, prompt (tokens of the padded prompt), capacity (tokens of the static cache).
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache
from transformers.cache_utils import Cache

from redux.cuda_graph import WARM_CALLS, capture_graph
from redux.focus_cache import FREE_COLUMNS, FocusCache, StaticFocusCache
from redux.kernels import get_kernels
from redux.rounding import round_up

INPUT_FIELDS = {"input_ids", "attention_mask", "pixel_values"}
"""Inputs of LLaVA that may be given."""

NEUTRAL_FIELDS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "do_sample", "temperature", "top_p",
    "top_k", "min_p", "typical_p", "num_beams", "use_cache", "transformers_version", "_from_model_config",
}  # fmt: skip
"""Fields of a generation configuration that change no greedy token."""

CAPACITY_STEP = 128
"""Tokens in which capacities of static caches grow."""

SPARE_CAPACITY = 3 * CAPACITY_STEP
"""Largest unused capacity with which a graph serves a batch; attention reads all of it."""

IMAGE_ROOM_STEP = 64
"""Image tokens in which the room for them grows, and tokens in which the first row of A_t2i is rounded down."""

CHECK_STEPS = 8
"""Steps between two looks at the device; the first looks come after 1, 2 and 4 steps."""

TokenCallback = Callable[[Int[Tensor, "batch"]], bool]
"""Gets the new token of each sequence; True ends the decoding."""

_logger = logging.getLogger(__name__)
_logged_reasons: set[str] = set()
_steps_lock = threading.Lock()
_steps_by_model: "WeakKeyDictionary[Any, GreedySteps]" = WeakKeyDictionary()


def use_graph(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Decide if a graph decodes a batch, and log each reason against it once."""
    if get_kernels() == "plain" or model.device.type != "cuda":
        return False
    reason = find_obstacle(model, inputs)
    if reason:
        report(reason)
    return not reason


def release_graphs() -> None:
    """Free the graphs that are kept, and their caches."""
    with _steps_lock:
        _steps_by_model.clear()


def report(reason: str) -> None:
    """Log once why `generate` decodes."""
    if reason not in _logged_reasons:
        _logged_reasons.add(reason)
        _logger.warning("greedy decoding: without a CUDA graph, because %s", reason)


def find_obstacle(model: Any, inputs: Mapping[str, Tensor]) -> str:
    """Return why static steps cannot decode a batch, or ""."""
    if not isinstance(model, LlavaForConditionalGeneration):
        return f"{type(model).__name__} is not a LLaVA"
    decoder = model.get_decoder()
    if not decoder._can_compile_fullgraph:
        return f"{type(decoder).__name__} has no static cache"
    if decoder.config._attn_implementation not in ("sdpa", "cmai"):
        return f"attention is {decoder.config._attn_implementation}"
    layers = {type(layer).__name__ for layer in DynamicCache(config=decoder.config).layers} - {"DynamicLayer"}
    if layers:
        return f"the cache has layers {', '.join(sorted(layers))}"
    # Anything beyond greedy search, such as penalties, would choose other tokens than `generate`.
    settings = model.generation_config.to_diff_dict()
    changes = sorted(name for name in settings.keys() - NEUTRAL_FIELDS if settings[name] not in (None, False))
    if changes:
        return f"the generation configuration has {', '.join(changes)}"
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "is_quantized", False):
        return "the model has adapters or quantized weights"
    if len({parameter.device for parameter in model.parameters()}) > 1 or hasattr(model, "hf_device_map"):
        return "the model lies on several devices"
    if model.training:
        return "the model trains"
    if "attention_mask" not in inputs or set(inputs) - INPUT_FIELDS:
        return f"the inputs are {', '.join(sorted(inputs))}"
    return ""


@dataclass(frozen=True)
class PrefilledPrompt:
    """A prompt after its prefill.

    Args:
        cache: its keys and values.
        visible: False for padding.
        position: position of the next token.
        token: the first new token.
    """

    cache: DynamicCache
    visible: Bool[Tensor, "batch prompt"]
    position: Int[Tensor, "batch 1"]
    token: Int[Tensor, "batch"]

    @classmethod
    def run(cls, model: Any, inputs: Mapping[str, Tensor]) -> "PrefilledPrompt":
        """Run the model on a batch of prompts, with positions as `generate` counts them."""
        mask = inputs["attention_mask"]
        # `generate` counts positions from the first token that is not padding.
        positions = (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
        cache = DynamicCache(config=model.get_decoder().config)
        output = model(
            **{**inputs, "attention_mask": None if bool((mask != 0).all()) else mask},
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cls(cache, mask != 0, positions[:, -1:] + 1, choose_tokens(output.logits))

    @property
    def image_room(self) -> int:
        """Room that the image tokens need."""
        return self.cache.num_columns + FREE_COLUMNS if isinstance(self.cache, FocusCache) else 0

    @property
    def start(self) -> int:
        """Position of the first row of A_t2i."""
        return self.cache.start if isinstance(self.cache, FocusCache) else 0


def choose_tokens(logits: Float[Tensor, "batch rows words"]) -> Int[Tensor, "batch"]:
    """Choose the likeliest tokens, in float32 as `generate` does."""
    return logits[:, -1].float().argmax(dim=-1)


class GreedySteps:
    """Greedy steps on tensors of fixed addresses.

    Args:
        key: all that a captured graph depends on, except the sizes below.
        batch: sequences.
        capacity: tokens of the cache.
        image_room: room for image tokens; 0 without CMAI.
        device: device of the model.
        eos_token_ids: tokens that end an answer.
        pad_token_id: token after the end.
        start: position before which no row of A_t2i is needed.
    """

    def __init__(
        self,
        key: Any,
        batch: int,
        capacity: int,
        image_room: int,
        device: torch.device,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        start: int = 0,
    ) -> None:
        self.key = key
        self.capacity, self.image_room, self.start = capacity, image_room, start
        self.pad_token_id = pad_token_id
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.visible = torch.zeros(batch, 1, 1, capacity, dtype=torch.bool, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
        # By position in the sequence, which is at hand.
        self.tokens = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.cache: Cache | None = None
        self.graph: Any = None
        self.failed = False

    def fits(self, key: Any, needed: int, image_room: int, start: int = 0) -> bool:
        """Return True if the steps serve another batch."""
        has_room = 0 <= self.capacity - needed <= SPARE_CAPACITY and image_room <= self.image_room
        return self.key == key and has_room and (self.image_room > 0) == (image_room > 0) and self.start <= start

    def load(self, prompt: PrefilledPrompt, config: Any) -> None:
        """Begin after a prompt."""
        length = prompt.visible.shape[1]
        if self.cache is None:
            cache_class = StaticFocusCache if self.image_room else StaticCache
            self.cache = cache_class(config=config, max_cache_len=self.capacity)
        copy_cache(self.cache, prompt.cache)
        if isinstance(self.cache, StaticFocusCache):
            assert isinstance(prompt.cache, FocusCache)
            self.cache.copy_tokens(prompt.cache, self.image_room, self.start)
        self.visible.zero_()
        self.visible[:, 0, 0, :length] = prompt.visible
        self.position.copy_(prompt.position)
        self.index.fill_(length)
        self.finished.copy_(self._is_end(prompt.token))
        self.token.copy_(prompt.token.unsqueeze(1))

    def step(self, model: Any) -> None:
        """Feed the last token and choose the next one. Neither waits for the device nor depends on its values."""
        self.visible.index_fill_(3, self.index, True)
        output = model(
            input_ids=self.token,
            attention_mask=self.visible,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        token = choose_tokens(output.logits).masked_fill(self.finished, self.pad_token_id)
        self.tokens.index_copy_(1, self.index, token.unsqueeze(1))
        self.finished.logical_or_(self._is_end(token))
        self.token.copy_(token.unsqueeze(1))
        self.position.add_(1)
        self.index.add_(1)

    def capture(self, model: Any) -> None:
        """Capture a step as a graph. The steps before it spoil the state: load the prompt again."""
        try:
            self.graph, _ = capture_graph(lambda: self.step(model), self.token.device)
        except RuntimeError as error:  # A decoder of another version of transformers may wait for the device
            self.failed = True
            report(f"capturing it failed: {' '.join(str(error).split())}")

    def run(
        self, prompt: PrefilledPrompt, limit: int, step: Callable[[], None], should_stop: TokenCallback | None = None
    ) -> Int[Tensor, "batch new"]:
        """Decode a loaded prompt.

        Args:
            prompt: the prompt.
            limit: most new tokens, with the first one.
            step: runs one step.
            should_stop: see `decode_prompt`; it has seen the first tokens.

        Returns:
            New tokens; after the end of an answer, padding.
        """
        length, steps = prompt.visible.shape[1], 0
        while steps < limit - 1:
            if (steps % CHECK_STEPS == 0 or steps in (1, 2, 4)) and bool(self.finished.all()):
                break
            step()
            steps += 1
            if should_stop and should_stop(self.token.squeeze(1)):
                break
        return torch.cat([prompt.token.unsqueeze(1), self.tokens[:, length : length + steps]], dim=1)

    def _is_end(self, token: Int[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
        return (token.unsqueeze(1) == self.eos).any(dim=1)


def copy_cache(target: StaticCache, source: DynamicCache) -> None:
    """Copy keys and values of a prompt into a static cache, layer by layer."""
    for to, layer in zip(target.layers, source.layers, strict=True):
        if not to.is_initialized:
            to.lazy_initialization(layer.keys, layer.values)
        length = layer.keys.shape[2]
        to.keys[:, :, :length].copy_(layer.keys)
        to.values[:, :, :length].copy_(layer.values)
        to.cumulative_length.fill_(length)


def describe_model(model: Any, batch: int, eos_token_ids: Sequence[int], pad_token_id: int) -> tuple[Any, ...]:
    """Describe all that a captured step depends on: settings, and the addresses of all weights."""
    inhibitor = getattr(model, "_inhibitor", None)
    cmai = None if inhibitor is None else (inhibitor.key, inhibitor.cmai)
    # A graph reads weights at their addresses: a replaced weight needs a new capture.
    weights = tuple(parameter.data_ptr() for parameter in model.parameters())
    buffers = tuple(buffer.data_ptr() for buffer in model.buffers())
    return (batch, tuple(eos_token_ids), pad_token_id, cmai, get_kernels(), model.dtype, weights, buffers)


def decode_prompt(
    model: Any,
    prompt: PrefilledPrompt,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    should_stop: TokenCallback | None = None,
) -> Int[Tensor, "batch new"]:
    """Decode greedily after a prompt: by a CUDA graph on a GPU, elsewhere by the same steps in eager mode.

    Args:
        model: a LLaVA that `find_obstacle` admits.
        prompt: the prompt.
        eos_token_ids: tokens that end an answer.
        pad_token_id: token after the end.
        max_new_tokens: most new tokens of an answer.
        should_stop: gets the new token of each sequence after each step, for which the host waits. True ends the batch.

    Returns:
        New tokens, as `generate` chooses them; after the end of an answer, padding.
    """
    if (should_stop and should_stop(prompt.token)) or max_new_tokens == 1:
        return prompt.token.unsqueeze(1)
    batch, length = prompt.visible.shape
    # The capture, too, needs room.
    needed = length + max(max_new_tokens, WARM_CALLS + 1)
    key = describe_model(model, batch, eos_token_ids, pad_token_id)
    with _steps_lock:
        # Two threads must not replay one graph, which has one set of input tensors.
        steps = _steps_by_model.get(model)
        if steps is None or not steps.fits(key, needed, prompt.image_room, prompt.start):
            _steps_by_model.pop(model, None)  # One graph at a time is in memory
            del steps
            image_room = round_up(prompt.image_room, IMAGE_ROOM_STEP)
            capacity = round_up(needed, CAPACITY_STEP)
            start = prompt.start // IMAGE_ROOM_STEP * IMAGE_ROOM_STEP
            steps = GreedySteps(key, batch, capacity, image_room, model.device, eos_token_ids, pad_token_id, start)
        config = model.get_decoder().config
        steps.load(prompt, config)
        if model.device.type != "cuda" or not is_free_of_waits(prompt.cache):
            prompt.cache.reset()  # Frees its keys and values
            return steps.run(prompt, max_new_tokens, lambda: steps.step(model), should_stop)
        if steps.graph is None and not steps.failed:
            steps.capture(model)
            steps.load(prompt, config)
            _steps_by_model[model] = steps
        prompt.cache.reset()
        step = steps.graph.replay if steps.graph else lambda: steps.step(model)
        return steps.run(prompt, max_new_tokens, step, should_stop)


def is_free_of_waits(cache: Cache) -> bool:
    """Return True if decoding on a cache can do without the host counting image tokens."""
    return not isinstance(cache, FocusCache) or cache.columns is not None
