"""Decoding on preallocated rows gives the tokens of the full pass: grown, static, with generated images."""

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from redux.cmai import Inhibition
from redux.decoding import DecodingStep
from redux.focus_cache import FREE_COLUMNS, FocusCache
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI

Tiny = Callable[..., ReduxForConditionalGeneration]
Sample = Callable[..., dict[str, Tensor]]
HINTS = get_type_hints(CMAI)
VARIANTS = [
    CMAI(gamma_max=0.8, gamma_min=0.5, scores=scores, focus=focus)
    for scores in get_args(HINTS["scores"])
    for focus in get_args(HINTS["focus"])
] + [
    CMAI(gamma_max=0.8, quantile="linear"),
    CMAI(gamma_max=0.8, quantile="count"),
    CMAI(gamma_max=0.8, preamble=False),
    CMAI(gamma_max=0.8, generated=False),
]
NEW = 6
TEXT = torch.zeros(2, 1, dtype=torch.bool)


def padded(sample: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """Two sequences, the second one padded on a side."""
    ids = sample["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": sample["pixel_values"].repeat(2, 1, 1, 1)}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, suppress_tokens=[model.config.image_token_id], **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cmai", VARIANTS, ids=str)
def test_a_static_cache_gives_the_tokens_of_a_growing_one(tiny: Tiny, sample: Sample, cmai: CMAI, side: str) -> None:
    model = tiny(cmai=cmai)
    inputs = padded(sample(model), side)
    static = generate(model, inputs, cache_implementation="static")
    assert torch.equal(static, generate(model, inputs))


def test_a_static_cache_that_is_reset_serves_another_prompt(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    first, second = (padded(sample(model, seed=seed), "left") for seed in (0, 1))
    cache = StaticCache(config=model.config.text_config, max_cache_len=first["input_ids"].shape[1] + NEW)
    for inputs in (first, second):
        assert torch.equal(generate(model, inputs, past_key_values=cache), generate(model, inputs))
        cache.reset()


def test_a_static_cache_filled_without_cmai_is_refused(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    inputs = sample(model)
    tokens = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.text_config, max_cache_len=2 * tokens)
    tiny(cmai=None)(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match=f"past_key_values: got StaticCache of {tokens} tokens, allowed: "):
        model(**inputs, past_key_values=cache)


def test_beams_on_a_static_cache(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    inputs = padded(sample(model), "left")
    static, growing = (generate(model, inputs, num_beams=3, cache_implementation=kind) for kind in ("static", None))
    assert torch.equal(static, growing)


class Copies(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def prompt_with_image(cmai: CMAI = VARIANTS[0]) -> FocusCache:
    """A cache after four tokens of an image and two of text."""
    cache, image = FocusCache(), torch.tensor([[True, True, True, True, False, False]] * 2)
    inhibition = Inhibition.for_forward(cmai, 2, image, cache, training=False)
    assert isinstance(inhibition, Inhibition)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    inhibition.compute_mask(1, query, key, torch.ones(2, 1, 6, 6, dtype=torch.bool).tril(), 1.0)
    return cache


def test_a_decoded_token_neither_copies_rows_nor_waits_for_the_device() -> None:
    cache = prompt_with_image()
    with Copies() as copies:
        step = Inhibition.for_forward(VARIANTS[0], 2, TEXT, cache, training=False)
        assert isinstance(step, DecodingStep)
        visible = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        step.compute_mask(1, torch.randn(2, 4, 1, 8), torch.randn(2, 4, 7, 8), visible, 1.0)
    assert not [name for name in copies.names if name.startswith(("cat", "_local_scalar_dense", "nonzero", "item"))]


def test_rows_grow_rarely() -> None:
    cache, sizes = prompt_with_image(), set()
    for keys in range(7, 400):
        Inhibition.for_forward(VARIANTS[0], 2, TEXT, cache, training=False)
        rows = cache.prepare_rows(1, keys, TEXT)
        assert rows.shape[1] == keys - cache.start
        sizes.add(rows.untyped_storage().nbytes())
    assert len(sizes) <= 4


@pytest.mark.parametrize("count", [1, FREE_COLUMNS - 1, 2 * FREE_COLUMNS])
def test_generated_image_tokens_get_columns(count: int) -> None:
    cache = prompt_with_image()
    for _ in range(count):
        Inhibition.for_forward(VARIANTS[0], 2, ~TEXT, cache, training=False)
    step = Inhibition.for_forward(VARIANTS[0], 2, TEXT, cache, training=False)
    columns, valid = (
        (step.columns, step.valid)
        if isinstance(step, DecodingStep)
        else (cache.columns, torch.arange(cache.columns.shape[1]) < cache.count)  # type: ignore[union-attr, operator]
    )
    expected = [0, 1, 2, 3, *range(6, 6 + count)]
    assert [row[seen].tolist() for row, seen in zip(columns, valid, strict=True)] == [expected] * 2  # type: ignore[arg-type]
