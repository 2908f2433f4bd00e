"""CMAI inhibits the pairs of equations 9 to 11, no others, and never holds a map of every head."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import causal_mask_function, sdpa_mask

from redux.attention import _build_mask, inhibited_attention
from redux.cmai import Inhibition, build_causal_mask
from redux.focus import (
    MAX_WEIGHTS_AT_ONCE,
    focus_score,
    mean_attention_scores,
    mean_attention_weights,
    select_above_quantile,
)
from redux.focus_cache import FocusCache
from redux.model import ReduxForConditionalGeneration
from redux.plugin import inhibit
from redux.settings import CMAI

Tiny = Callable[..., ReduxForConditionalGeneration]

KEYS = 14
DEFAULT = CMAI()
IMAGE = torch.zeros(2, KEYS, dtype=torch.bool)
IMAGE[0, 3:8] = True  # Text before and after one image
IMAGE[1, [1, 2, 9, 10]] = True  # Two images, fewer tokens


SCORES, FOCUS = get_args(get_type_hints(CMAI)["scores"]), get_args(get_type_hints(CMAI)["focus"])


def name(cmai: CMAI) -> str:
    """Name a setting by its values that differ from the defaults."""
    changed = (getattr(cmai, field.name) for field in fields(CMAI) if getattr(cmai, field.name) != field.default)
    return "-".join(map(str, changed)) or "default"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(rows: int = KEYS, keys: int = KEYS, batch: int = 2) -> Tensor:
    return torch.ones(batch, 1, rows, keys, dtype=torch.bool).tril(keys - rows)


def eager(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention weights of every head, (batch, heads, rows, keys)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query @ key.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def slow_attention(query: Tensor, key: Tensor, image: Tensor, visible: Tensor, scale: float, cmai: CMAI) -> Tensor:
    """A of one sequence, pair by pair: query (heads, rows, head_dim), key (kv_heads, keys, head_dim)."""
    heads, rows, _ = query.shape
    first = int(image.nonzero()[0]) if not cmai.preamble else 0
    result = torch.zeros(rows, rows)
    for head in range(heads):
        keys = key[head * len(key) // heads]
        for j in range(rows):
            seen = [k for k in range(rows) if visible[j, k] and k >= first]
            scores = {k: float(query[head, j] @ keys[k]) * (1.0 if cmai.scores == "scores" else scale) for k in seen}
            if cmai.scores == "weights":
                before = sum(math.exp(float(query[head, j] @ keys[k]) * scale) for k in range(rows) if visible[j, k])
                scores = {k: math.exp(score) / before for k, score in scores.items()}
            for k, score in scores.items():
                result[j, k] += score / heads
    if not cmai.preamble:
        result /= result.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return result


def slow_focus(attention: Tensor, image: Tensor, cmai: CMAI = DEFAULT) -> dict[tuple[int, int], float]:
    """F_t2i of one sequence by (text row, image key), with the loops that equations 9-11 and Table 5 write."""
    text = [position for position in range(len(image)) if not image[position]]
    columns = [position for position in range(len(image)) if image[position]]
    result = {}
    for j in text:
        for k in columns:
            others = 0.0
            for h in text:
                if j > h:
                    count = {
                        "neighbourhood": float(attention[j, h]),  # Eq. 9
                        "tia": 0.0,
                        "sum": 1.0,
                        "discounted": cmai.discount ** (text.index(j) - text.index(h)),
                    }[cmai.focus]
                    others += count * float(attention[h, k])  # Eq. 10
            result[j, k] = others + float(attention[j, k])  # Eq. 11
    return result


def inhibition(cmai: CMAI, image: Tensor = IMAGE, cache: FocusCache | None = None) -> Inhibition:
    result = Inhibition.for_forward(cmai, 2, image, cache, training=False)
    assert result is not None
    return result


def slow_keep(focus: dict[tuple[int, int], float], visible: Tensor, image: Tensor, ratio: float, kind: str) -> Tensor:
    """Compute the pairs of one sequence that stay: all but pairs whose focus is below the quantile of its row."""
    keep = torch.ones_like(visible)
    for row in range(len(image)):
        keys = sorted((k for j, k in focus if j == row and visible[row, k]), key=lambda k: focus[row, k])
        place = ratio * (len(keys) - 1)
        if kind == "count":
            below = math.floor(ratio * len(keys))
        else:  # Between two ranks everything up to the lower one falls
            below = math.floor(place) if kind == "lower" else math.ceil(place)
        for key in keys[:below]:
            keep[row, key] = False
    return keep


@pytest.mark.parametrize("rows", [KEYS, 3, 1])
def test_focus_score_equals_the_loops_of_equations_9_to_11(rows: int) -> None:
    weights = eager(noise(2, 4, KEYS, 8), noise(2, 4, KEYS, 8, seed=1), causal(), 1.0).mean(dim=1)
    for sequence, image in zip(weights, IMAGE, strict=True):
        t2i = (sequence[:, image] * ~image.unsqueeze(1)).unsqueeze(0)
        focus = focus_score(sequence[-rows:].unsqueeze(0), t2i[:, -rows:], t2i)[0]
        columns = image.nonzero()[:, 0].tolist()
        for (j, k), expected in slow_focus(sequence, image).items():
            if j >= KEYS - rows:
                assert float(focus[j - (KEYS - rows), columns.index(k)]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", [KEYS, 3])
@pytest.mark.parametrize("at_once", [0, MAX_WEIGHTS_AT_ONCE], ids=["head by head", "at once"])
def test_mean_weights_equal_the_mean_of_every_heads_softmax(
    kv_heads: int, rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redux.focus.MAX_WEIGHTS_AT_ONCE", at_once)
    query, key = noise(2, 4, rows, 8), noise(2, kv_heads, KEYS, 8, seed=1)
    visible = causal(rows)
    visible[1, :, :, :4] = False  # Padding on the left: with all rows here, the first ones see nothing
    weights = mean_attention_weights(query, key, visible[:, 0], 0.7)
    torch.testing.assert_close(weights, eager(query, key, visible, 0.7).mean(dim=1))
    assert (weights[~visible[:, 0]] == 0).all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", [KEYS, 3])
def test_mean_scores_equal_the_mean_of_every_heads_product(kv_heads: int, rows: int) -> None:
    query, key = noise(2, 4, rows, 8), noise(2, kv_heads, KEYS, 8, seed=1)
    seen = causal(rows)[:, 0]
    product = (query @ key.repeat_interleave(4 // kv_heads, dim=1).transpose(2, 3) * 0.7).mean(dim=1)
    torch.testing.assert_close(mean_attention_scores(query, key, seen, 0.7), product * seen)


@pytest.mark.parametrize(("ratio", "count"), [(0.525, 121), (0.6, 466), (0.6, 776), (0.3, 11)])
@pytest.mark.parametrize("quantile", ["lower", "linear"])
def test_a_rank_that_is_whole_on_paper_is_not_rounded_below(ratio: float, count: int, quantile: Any) -> None:
    focus = torch.arange(count).float().reshape(1, 1, count)
    kept = select_above_quantile(focus, torch.ones(1, 1, count, dtype=torch.bool), ratio, quantile)
    assert int((~kept).sum()) == round(ratio * (count - 1) * 1000) // 1000


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_distinct_scores_lose_the_floor_of_ratio_times_one_less_than_their_number(ratio: float, count: int) -> None:
    focus = torch.randperm(count, generator=torch.Generator().manual_seed(0)).float().reshape(1, 1, count)
    kept = select_above_quantile(focus, torch.ones(1, 1, count, dtype=torch.bool), ratio)
    assert torch.equal(kept, focus >= int(ratio * (count - 1)))


def test_equal_scores_are_all_kept() -> None:
    assert select_above_quantile(torch.full((1, 2, 9), 0.25), torch.ones(1, 2, 9, dtype=torch.bool), 0.9).all()


def test_ties_with_the_threshold_are_kept() -> None:
    focus = torch.tensor([[[0.1, 0.2, 0.2, 0.2, 0.3]]])
    kept = select_above_quantile(focus, torch.ones(1, 1, 5, dtype=torch.bool), 0.75)  # Rank 3 of 0..4
    assert kept.tolist() == [[[False, True, True, True, True]]]


def test_keys_out_of_sight_do_not_count_for_the_quantile() -> None:
    focus = torch.tensor([[[0.0, 0.0, 0.0, 0.1, 0.2, 0.3]]])
    seen = torch.tensor([[[False, False, False, True, True, True]]])
    assert select_above_quantile(focus, seen, 0.5)[seen].tolist() == [False, True, True]


VARIANTS = [
    DEFAULT,
    *(
        CMAI(scores=scores, focus=focus)
        for scores in SCORES
        for focus in FOCUS
        if (scores, focus) != (SCORES[0], FOCUS[0])
    ),
    CMAI(focus="discounted", discount=0.3),
    CMAI(quantile="linear"),
    CMAI(quantile="count"),
    CMAI(preamble=False),
]


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.95])
@pytest.mark.parametrize("cmai", VARIANTS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keep_equals_the_slow_loop(cmai: CMAI, ratio: float, dtype: torch.dtype) -> None:
    cmai = replace(cmai, gamma_max=ratio)
    query, key = (value.to(dtype) for value in (noise(2, 4, KEYS, 8), noise(2, 2, KEYS, 8, seed=1)))
    keep = inhibition(cmai).compute_mask(1, query, key, causal(), 0.7)[:, 0]
    visible = causal()[0, 0]
    for sequence, image in enumerate(IMAGE):
        attention = slow_attention(query[sequence], key[sequence], image, visible, 0.7, cmai)
        expected = slow_keep(slow_focus(attention, image, cmai), visible, image, ratio, cmai.quantile)
        assert not expected.all()
        assert torch.equal(keep[sequence] & visible, expected & visible)


@pytest.mark.parametrize("seed", range(20))
def test_keep_equals_the_slow_loop_at_random_shapes_and_settings(seed: int) -> None:
    """Heads that share keys, images anywhere, padding on either side."""
    draw = random.Random(seed)
    keys, kv_heads, groups, dim = draw.randint(4, 24), draw.randint(1, 3), draw.randint(1, 3), draw.randint(2, 8)
    cmai = replace(draw.choice(VARIANTS), gamma_max=draw.uniform(0.3, 0.95))
    image = torch.tensor([[draw.random() < 0.5 for _ in range(keys)] for _ in range(2)])
    image[:, 1], image[:, -1] = True, False
    visible = causal(keys, keys)
    left, right = draw.randint(0, 1), draw.randint(0, 2)
    visible[1, :, :, :left] = False
    visible[1, :, :, keys - right :] = False
    query, key = (noise(2, n, keys, dim, seed=seed + n) for n in (kv_heads * groups, kv_heads))
    keep = inhibition(cmai, image).compute_mask(1, query, key, visible, 0.7)[:, 0]
    for row in range(2):
        seen = visible[row, 0]
        attention = slow_attention(query[row], key[row], image[row], seen, 0.7, cmai)
        focus = slow_focus(attention, image[row], cmai)
        expected = slow_keep(focus, seen, image[row], cmai.gamma_max, cmai.quantile)
        assert torch.equal(keep[row] & seen, expected & seen)


@pytest.mark.parametrize("cmai", VARIANTS, ids=name)
def test_in_bfloat16_few_pairs_change_sides(cmai: CMAI) -> None:
    """Scores that differ by less than bfloat16 can tell may swap: stated bound, 5 % of the text-image pairs."""
    keys, batch = 160, 4
    image = ((torch.arange(keys) >= 8) & (torch.arange(keys) < 72)).expand(batch, -1)
    query, key = noise(batch, 8, keys, 32), noise(batch, 4, keys, 32, seed=1)
    full, half = (
        inhibition(cmai, image).compute_mask(1, query.to(dtype), key.to(dtype), causal(keys, keys, batch), 32**-0.5)
        for dtype in (torch.float32, torch.bfloat16)
    )
    pairs = (~image).unsqueeze(2) & image.unsqueeze(1) & causal(keys, keys, batch)[:, 0]
    assert 0 < (~full[:, 0][pairs]).float().mean() < 1
    assert (full != half)[:, 0][pairs].float().mean() < 0.05


def test_each_layer_has_its_own_ratio() -> None:
    query, key = noise(2, 4, KEYS, 8), noise(2, 4, KEYS, 8, seed=1)
    kept = [
        inhibition(CMAI(gamma_min=0.4, gamma_max=0.95)).compute_mask(layer, query, key, causal(), 1.0)
        for layer in (0, 1)
    ]
    for ratio, keep in zip((0.4, 0.95), kept, strict=True):
        assert torch.equal(keep, inhibition(CMAI(gamma_max=ratio)).compute_mask(1, query, key, causal(), 1.0))
    assert not torch.equal(*kept)


@pytest.mark.parametrize("cmai", VARIANTS, ids=name)
@pytest.mark.parametrize("pieces", [(8, 1, 1, 1, 1, 1, 1), (2, 3, 9), (1,) * KEYS, (10, 4)], ids=str)
def test_keep_piece_by_piece_equals_keep_at_once(pieces: tuple[int, ...], cmai: CMAI) -> None:
    """Wherever the sequence is cut: in the text before an image, within one, between two."""
    query, key = noise(2, 4, KEYS, 8), noise(2, 2, KEYS, 8, seed=1)
    full_mask = inhibition(cmai).compute_mask(1, query, key, causal(), 1.0)[:, 0]
    cache, start = FocusCache(), 0
    for rows in pieces:
        end = start + rows
        now = Inhibition.for_forward(cmai, 2, IMAGE[:, start:end], cache, training=False)
        visible = causal(rows, end)
        if now is None:
            assert full_mask[:, start:end, :end].all()
        else:
            kept = now.compute_mask(1, query[:, :, start:end], key[:, :, :end], visible, 1.0)
            assert torch.equal((kept & visible)[:, 0], full_mask[:, start:end, :end] & visible[:, 0])
        start = end


HEADS = [
    CMAI(heads="each"),
    CMAI(heads="each", focus="sum", scores="scaled"),
    CMAI(heads="each", focus="discounted", quantile="count"),
    CMAI(heads="each", focus="tia"),
    CMAI(heads="each", preamble=False),
    CMAI(heads=(4, 7, 1)),
    CMAI(heads=(6,), scores="scores"),
]
"""Settings with masks of single heads, for layers of four heads; layer 1 has the numbers 4 to 7."""


@pytest.mark.parametrize("cmai", HEADS, ids=name)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_mask_of_a_head_equals_the_slow_loop_of_a_layer_with_that_head_alone(cmai: CMAI, kv_heads: int) -> None:
    query, key = noise(2, 4, KEYS, 8), noise(2, kv_heads, KEYS, 8, seed=1)
    visible = causal()[0, 0]
    keep = inhibition(cmai).compute_mask(1, query, key, causal(), 0.7)
    inhibited = {number - 4 for number in cmai.heads if number >= 4} if cmai.heads != "each" else set(range(4))
    assert keep.shape[1] == 4
    for head in range(4):
        if head not in inhibited:
            assert keep[:, head].all()
            continue
        for sequence, image in enumerate(IMAGE):
            shared = key[sequence, head * kv_heads // 4].unsqueeze(0)
            attention = slow_attention(query[sequence, head].unsqueeze(0), shared, image, visible, 0.7, cmai)
            expected = slow_keep(slow_focus(attention, image, cmai), visible, image, 0.6, cmai.quantile)
            assert not expected.all()
            assert torch.equal(keep[sequence, head] & visible, expected & visible)


@pytest.mark.parametrize("cmai", HEADS, ids=name)
@pytest.mark.parametrize("pieces", [(8, 1, 1, 1, 1, 1, 1), (2, 3, 9), (10, 4)], ids=str)
def test_masks_of_heads_piece_by_piece_equal_those_at_once(pieces: tuple[int, ...], cmai: CMAI) -> None:
    query, key = noise(2, 4, KEYS, 8), noise(2, 2, KEYS, 8, seed=1)
    full_mask = inhibition(cmai).compute_mask(1, query, key, causal(), 1.0)
    cache, start = FocusCache(), 0
    for rows in pieces:
        end = start + rows
        now = Inhibition.for_forward(cmai, 2, IMAGE[:, start:end], cache, training=False)
        visible = causal(rows, end)
        if now is None:
            assert full_mask[:, :, start:end, :end].all()
        else:
            kept = now.compute_mask(1, query[:, :, start:end], key[:, :, :end], visible, 1.0)
            assert torch.equal(kept & visible, full_mask[:, :, start:end, :end] & visible)
        start = end


def test_of_one_head_the_mean_is_that_head() -> None:
    query, key = noise(2, 1, KEYS, 8), noise(2, 1, KEYS, 8, seed=1)
    mean, each, numbered = (
        inhibition(CMAI(heads=heads)).compute_mask(1, query, key, causal(), 1.0) for heads in ("mean", "each", (1,))
    )
    assert torch.equal(mean, each)
    assert torch.equal(mean, numbered)


def test_a_layer_without_a_chosen_head_loses_nothing() -> None:
    now = inhibition(CMAI(gamma_min=0.5, heads=(4, 5)))
    assert now.compute_mask(0, noise(2, 4, KEYS, 8), noise(2, 4, KEYS, 8, seed=1), causal(), 1.0).all()


@pytest.mark.parametrize("heads", ["one", (), (1, 1), (-1,), (1.0,)])
def test_wrong_heads_are_named(monkeypatch: pytest.MonkeyPatch, heads: Any) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"heads: got .*, allowed: "):
        CMAI(heads=heads)


def test_heads_that_a_model_does_not_have_are_refused(tiny: Tiny) -> None:
    model = tiny(cmai=CMAI(heads=(11,)))  # Three layers of four heads
    with pytest.raises(ValueError, match="heads: got 12, allowed: 0 to 11, the heads of all layers"):
        inhibit(model, CMAI(heads=(0, 12)))


def test_text_keys_and_image_rows_are_never_inhibited() -> None:
    strong = inhibition(CMAI(gamma_max=0.95))
    keep = strong.compute_mask(1, noise(2, 4, KEYS, 8), noise(2, 4, KEYS, 8, seed=1), causal(), 1.0)[:, 0]
    assert not keep.all()
    for sequence, image in zip(keep, IMAGE, strict=True):
        assert sequence[:, ~image].all()
        assert sequence[image].all()


def test_equal_scores_fall_from_the_first_by_count() -> None:
    kept = select_above_quantile(torch.full((1, 1, 5), 0.25), torch.ones(1, 1, 5, dtype=torch.bool), 0.5, "count")
    assert kept.tolist() == [[[False, False, True, True, True]]]


def test_without_an_image_in_sight_there_is_nothing_to_inhibit() -> None:
    assert Inhibition.for_forward(DEFAULT, 2, torch.zeros(2, 5, dtype=torch.bool), None, training=False) is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("active", "when"), [("always", (True, False)), ("training", (True,)), ("inference", (False,))]
)
def test_it_is_active_when_it_shall_be(active: Any, when: tuple[bool, ...], training: bool) -> None:
    assert (Inhibition.for_forward(CMAI(active=active), 2, IMAGE, None, training) is not None) == (training in when)


@pytest.mark.parametrize("generated", [True, False])
def test_generated_tokens_are_inhibited_if_they_shall_be(generated: bool) -> None:
    cache, text = FocusCache(), torch.zeros(2, 1, dtype=torch.bool)
    assert Inhibition.for_forward(CMAI(generated=generated), 2, IMAGE, cache, training=False) is not None
    assert (Inhibition.for_forward(CMAI(generated=generated), 2, text, cache, training=False) is not None) == generated


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("cmai", VARIANTS, ids=name)
def test_no_map_of_every_head_is_made(cmai: CMAI) -> None:
    heads, keys = 8, 500
    assert heads * keys * (keys - 16) > MAX_WEIGHTS_AT_ONCE
    query, key = noise(1, heads, keys, 4), noise(1, heads, keys, 4, seed=1)
    image = (torch.arange(keys) < 16).unsqueeze(0)
    with Largest() as largest:
        inhibition(cmai, image).compute_mask(1, query, key, causal(keys, keys, 1), 1.0)
    assert keys * (keys - 16) <= largest.elements < 2 * keys * keys


@pytest.mark.parametrize(
    ("schedule", "ratios"),
    [
        ("linear", (0.1, 0.225, 0.35, 0.475, 0.6)),
        ("constant", (0.6, 0.6, 0.6, 0.6, 0.6)),
        ("cosine", (0.1, 0.173223, 0.35, 0.526777, 0.6)),
        ("step", (0.1, 0.1, 0.6, 0.6, 0.6)),
    ],
)
def test_the_ratio_goes_from_minimum_to_maximum_as_scheduled(schedule: Any, ratios: tuple[float, ...]) -> None:
    assert CMAI(gamma_max=0.6, gamma_min=0.1, schedule=schedule).compute_gammas(5) == pytest.approx(ratios, abs=1e-6)


def test_a_single_layer_is_the_first_of_a_rising_schedule() -> None:
    assert CMAI(gamma_max=0.6).compute_gammas(1) == (0.0,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma_max": 1.0},
        {"gamma_max": -0.1},
        {"gamma_min": 0.7},
        {"discount": 0.0},
        {"scores": "logits"},
        {"focus": "mean"},
        {"schedule": "square"},
        {"quantile": "upper"},
        {"active": "never"},
        {"gamma_max": "0.6"},
        {"gamma_max": math.nan},
        {"gamma_max": True},
        {"preamble": None},
        {"generated": "x"},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # It would name some of these first
    ((field, value),) = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{field}: got {value!r}, allowed: ")):
        CMAI(**wrong)


def test_a_maximum_of_zero_is_no_inhibition_bit_for_bit(tiny: Tiny, sample: Callable[..., dict]) -> None:
    zero, off = tiny(cmai=CMAI(gamma_max=0.0)), tiny(cmai=None)
    inputs = sample(zero)
    with torch.no_grad():
        assert torch.equal(zero(**inputs).logits, off(**inputs).logits)


def test_inhibition_reaches_text_behind_the_image_alone(tiny: Tiny, sample: Callable[..., dict]) -> None:
    """Layer 0 has ratio 0, so with two layers the image rows of layer 1 see what they saw without CMAI."""
    strong, none = (tiny(cmai=CMAI(gamma_max=maximum), layers=2) for maximum in (0.9, 0.0))
    inputs = sample(strong)
    with torch.no_grad():
        difference = (strong(**inputs).logits - none(**inputs).logits).abs().amax(dim=-1)[0]
    image = inputs["input_ids"][0] == strong.config.image_token_id
    before, behind = image.long().cumsum(dim=0) == 0, ~image & (image.long().cumsum(dim=0) > 0)
    assert (difference[image] == 0).all()
    assert (difference[before] == 0).all()
    assert (difference[behind] > 1e-4).all()


def test_text_before_an_image_stays_as_it_is_however_deep(tiny: Tiny, sample: Callable[..., dict]) -> None:
    strong, none = (tiny(cmai=CMAI(gamma_max=maximum)) for maximum in (0.9, 0.0))
    inputs = sample(strong)
    with torch.no_grad():
        assert torch.equal(strong(**inputs).logits[:, :2], none(**inputs).logits[:, :2])


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, "none"),
        ({"attention_mask": torch.ones(2, 6, dtype=torch.bool)}, "none"),
        ({"attention_mask": torch.arange(6).expand(2, -1) > 1}, "padding"),
        ({"q_length": 2, "q_offset": 4}, "pairs"),
        ({"kv_length": 9}, "pairs"),
        ({"q_offset": torch.tensor(0)}, "pairs"),
        ({"mask_function": lambda batch, head, row, key: key >= 0}, "pairs"),
        ({"allow_is_causal_skip": False}, "pairs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "none",
)
def test_a_mask_is_short_if_it_is_causal(changes: dict[str, Any], form: str) -> None:
    arguments = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": causal_mask_function} | changes
    mask = _build_mask(**arguments)
    if form == "none":
        assert mask is None
        return
    assert mask is not None
    explicit = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    if form == "padding":
        assert (mask.dtype, mask.shape) == (torch.uint8, (2, 1, 1, 6))
        mask = build_causal_mask(mask[:, 0, 0], 6, mask.device)
    assert torch.equal(mask, explicit)


def test_a_causal_layer_that_inhibits_nothing_has_nobuild_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that PyTorch's flash kernel serves it."""
    masks: list[Any] = []
    monkeypatch.setattr(
        "redux.attention.sdpa_attention_forward",
        lambda *args, **kwargs: masks.append(args[4]) or (args[1].transpose(1, 2), None),
    )
    module: Any = torch.nn.Module()
    query = noise(2, 4, KEYS, 8)
    none = inhibition(CMAI(gamma_max=0.6))  # Layer 0 has ratio 0
    for layer, now in ((0, none), (0, None), (1, None), (1, none)):
        module.layer_idx = layer
        inhibited_attention(module, query, query, query, None, now)
    assert [mask is None for mask in masks] == [True, True, True, False]
