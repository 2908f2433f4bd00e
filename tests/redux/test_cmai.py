"""CMAI inhibits the pairs of equations 9 to 11, no others, and never holds a map of every head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redux.cmai import CMAI, FocusCache, Inhibition, above_quantile, focus_score, mean_weights
from redux.model import ReduxForConditionalGeneration

KEYS = 14
IMAGE = torch.zeros(2, KEYS, dtype=torch.bool)
IMAGE[0, 3:8] = True  # text before and after one image
IMAGE[1, [1, 2, 9, 10]] = True  # two images, fewer tokens


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(rows: int = KEYS, keys: int = KEYS, batch: int = 2) -> Tensor:
    return torch.ones(batch, 1, rows, keys, dtype=torch.bool).tril(keys - rows)


def eager(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention weights of every head, (batch, heads, rows, keys)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query @ key.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def slow_focus(weights: Tensor, image: Tensor) -> dict[tuple[int, int], float]:
    """F_t2i of one sequence by (text row, image key), with the loops that equations 9-11 write."""
    text = [position for position in range(len(image)) if not image[position]]
    columns = [position for position in range(len(image)) if image[position]]
    result = {}
    for j in text:
        for k in columns:
            neighbours = 0.0
            for h in text:
                t2n = float(weights[j, h]) if j > h else 0.0  # eq. 9
                neighbours += t2n * float(weights[h, k])  # eq. 10
            result[j, k] = neighbours + float(weights[j, k])  # eq. 11
    return result


def inhibition(ratio: float, image: Tensor = IMAGE, cache: FocusCache | None = None) -> Inhibition:
    result = Inhibition.of((ratio,), image, cache)
    assert result is not None
    return result


def slow_keep(weights: Tensor, image: Tensor, ratio: float) -> Tensor:
    """Which pairs of one sequence stay: by text row, all but the lowest floor(ratio (n - 1)) of its n image keys."""
    focus = slow_focus(weights, image)
    keep = torch.ones_like(weights, dtype=torch.bool)
    for row in range(len(image)):
        keys = sorted((k for j, k in focus if j == row and k < row), key=lambda k: focus[row, k])
        for key in keys[: int(ratio * (len(keys) - 1))] if keys else []:
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
def test_mean_weights_equal_the_mean_of_every_heads_softmax(kv_heads: int, rows: int) -> None:
    query, key = noise(2, 4, rows, 8), noise(2, kv_heads, KEYS, 8, seed=1)
    visible = causal(rows)
    visible[1, :, :, :4] = False  # padding on the left: with all rows here, the first ones see nothing
    weights = mean_weights(query, key, visible, 0.7)
    torch.testing.assert_close(weights, eager(query, key, visible, 0.7).mean(dim=1))
    assert (weights[~visible[:, 0]] == 0).all()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_distinct_scores_lose_the_floor_of_ratio_times_one_less_than_their_number(ratio: float, count: int) -> None:
    focus = torch.randperm(count, generator=torch.Generator().manual_seed(0)).float().reshape(1, 1, count)
    kept = above_quantile(focus, torch.ones(1, 1, count, dtype=torch.bool), ratio)
    assert torch.equal(kept, focus >= int(ratio * (count - 1)))


def test_equal_scores_are_all_kept() -> None:
    assert above_quantile(torch.full((1, 2, 9), 0.25), torch.ones(1, 2, 9, dtype=torch.bool), 0.9).all()


def test_ties_with_the_threshold_are_kept() -> None:
    focus = torch.tensor([[[0.1, 0.2, 0.2, 0.2, 0.3]]])
    kept = above_quantile(focus, torch.ones(1, 1, 5, dtype=torch.bool), 0.75)  # rank 3 of 0..4
    assert kept.tolist() == [[[False, True, True, True, True]]]


def test_keys_out_of_sight_do_not_count_for_the_quantile() -> None:
    focus = torch.tensor([[[0.0, 0.0, 0.0, 0.1, 0.2, 0.3]]])
    seen = torch.tensor([[[False, False, False, True, True, True]]])
    assert above_quantile(focus, seen, 0.5)[seen].tolist() == [False, True, True]


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.95])
def test_keep_equals_the_slow_loop(ratio: float) -> None:
    query, key = noise(2, 4, KEYS, 8), noise(2, 2, KEYS, 8, seed=1)
    keep = inhibition(ratio).keep(0, query, key, causal(), 1.0)[:, 0]
    weights = eager(query, key, causal(), 1.0).mean(dim=1)
    visible = causal()[0, 0]
    for sequence in range(2):
        expected = slow_keep(weights[sequence], IMAGE[sequence], ratio)
        assert not expected.all()
        assert torch.equal(keep[sequence] & visible, expected & visible)


def test_each_layer_has_its_own_ratio() -> None:
    query, key = noise(2, 4, KEYS, 8), noise(2, 4, KEYS, 8, seed=1)
    layers = Inhibition.of((0.4, 0.95), IMAGE, None)
    assert layers is not None
    kept = [layers.keep(layer, query, key, causal(), 1.0) for layer in (0, 1)]
    for ratio, keep in zip((0.4, 0.95), kept, strict=True):
        assert torch.equal(keep, inhibition(ratio).keep(0, query, key, causal(), 1.0))
    assert not torch.equal(*kept)


@pytest.mark.parametrize("pieces", [(8, 1, 1, 1, 1, 1, 1), (2, 3, 9), (1,) * KEYS, (10, 4)], ids=str)
def test_keep_piece_by_piece_equals_keep_at_once(pieces: tuple[int, ...]) -> None:
    """Wherever the sequence is cut: in the text before an image, within one, between two."""
    query, key = noise(2, 4, KEYS, 8), noise(2, 2, KEYS, 8, seed=1)
    whole = inhibition(0.6).keep(0, query, key, causal(), 1.0)[:, 0]
    cache, start = FocusCache(), 0
    for rows in pieces:
        end = start + rows
        now = Inhibition.of((0.6,), IMAGE[:, start:end], cache)
        visible = causal(rows, end)
        if now is None:
            assert whole[:, start:end, :end].all()
        else:
            kept = now.keep(0, query[:, :, start:end], key[:, :, :end], visible, 1.0)
            assert torch.equal((kept & visible)[:, 0], whole[:, start:end, :end] & visible[:, 0])
        start = end


def test_text_keys_and_image_rows_are_never_inhibited() -> None:
    keep = inhibition(0.95).keep(0, noise(2, 4, KEYS, 8), noise(2, 4, KEYS, 8, seed=1), causal(), 1.0)[:, 0]
    assert not keep.all()
    for sequence, image in zip(keep, IMAGE, strict=True):
        assert sequence[:, ~image].all()
        assert sequence[image].all()


def test_without_an_image_in_sight_there_is_nothing_to_inhibit() -> None:
    assert Inhibition.of((0.6,), torch.zeros(2, 5, dtype=torch.bool), None) is None


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_map_of_every_head_is_made() -> None:
    heads, keys = 8, 40
    query, key = noise(1, heads, keys, 4), noise(1, heads, keys, 4, seed=1)
    image = (torch.arange(keys) < 16).unsqueeze(0)
    with Largest() as largest:
        inhibition(0.6, image).keep(0, query, key, causal(keys, keys, 1), 1.0)
    assert keys * keys <= largest.elements < 2 * keys * keys


def test_the_ratio_rises_linearly_to_the_maximum() -> None:
    assert CMAI(maximum=0.6).ratios(4) == pytest.approx((0.0, 0.2, 0.4, 0.6))
    assert CMAI(maximum=0.6).ratios(1) == (0.0,)


@pytest.mark.parametrize("maximum", [-0.1, 1.0])
def test_a_wrong_maximum_is_named(maximum: float) -> None:
    with pytest.raises(ValueError, match=f"maximum: got {maximum}, allowed: 0 <= maximum < 1"):
        CMAI(maximum=maximum)


Tiny = Callable[..., ReduxForConditionalGeneration]


def test_a_maximum_of_zero_is_no_inhibition_bit_for_bit(tiny: Tiny, sample: Callable[..., dict]) -> None:
    zero, off = tiny(cmai=CMAI(maximum=0.0)), tiny(cmai=None)
    inputs = sample(zero)
    with torch.no_grad():
        assert torch.equal(zero(**inputs).logits, off(**inputs).logits)


def test_inhibition_reaches_text_behind_the_image_alone(tiny: Tiny, sample: Callable[..., dict]) -> None:
    """Layer 0 has ratio 0, so with two layers the image rows of layer 1 see what they saw without CMAI."""
    strong, none = (tiny(cmai=CMAI(maximum=maximum), layers=2) for maximum in (0.9, 0.0))
    inputs = sample(strong)
    with torch.no_grad():
        difference = (strong(**inputs).logits - none(**inputs).logits).abs().amax(dim=-1)[0]
    image = inputs["input_ids"][0] == strong.config.image_token_id
    before, behind = image.long().cumsum(dim=0) == 0, ~image & (image.long().cumsum(dim=0) > 0)
    assert (difference[image] == 0).all()
    assert (difference[before] == 0).all()
    assert (difference[behind] > 1e-4).all()


def test_text_before_an_image_stays_as_it_is_however_deep(tiny: Tiny, sample: Callable[..., dict]) -> None:
    strong, none = (tiny(cmai=CMAI(maximum=maximum)) for maximum in (0.9, 0.0))
    inputs = sample(strong)
    with torch.no_grad():
        assert torch.equal(strong(**inputs).logits[:, :2], none(**inputs).logits[:, :2])
