"""Each reduction does what its definition says, patch by patch, and says where each patch went."""

import math
import re
from typing import Any, get_args, get_type_hints

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from redux.reduction import REDUCERS, reduce_tokens, resize_pixels
from redux.settings import SPATIAL_METHODS, Reduction

GRIDS = [(1, 1), (2, 1), (3, 2), (5, 3), (6, 3), (7, 6), (8, 8)]
"""Patches a side, cells a side."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(patches: int = 16, batch: int = 3, dim: int = 8) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Features, and the class token's query and all keys; keys are not as wide as features."""
    return noise(batch, patches, dim), (noise(batch, 12, seed=1), noise(batch, patches + 1, 12, seed=2))


def settings(method: Any, **budget: Any) -> Reduction:
    return Reduction(method=method, **(budget or {"tokens": 9}))


def mean(patches: list[tuple[float, Tensor]]) -> Tensor:
    total = sum(weight for weight, _ in patches)
    return torch.stack([weight / total * patch for weight, patch in patches]).sum(dim=0)


def cells(side: int, out: int) -> list[tuple[float, float]]:
    """Compute the start and the end of each cell along one side, in patches."""
    return [(cell * side / out, (cell + 1) * side / out) for cell in range(out)]


def cell_of(side: int, out: int, place: int) -> int:
    """The cell in which the centre of a patch lies, along one side."""
    (cell,) = (number for number, (start, end) in enumerate(cells(side, out)) if start <= place + 0.5 < end)
    return cell


def window(side: int, out: int, cell: int) -> dict[int, float]:
    """Adaptive average pooling along one side: from the floor of a cell's start to the ceiling of its end."""
    return dict.fromkeys(range(cell * side // out, math.ceil((cell + 1) * side / out)), 1.0)


def triangle(side: int, out: int, cell: int) -> dict[int, float]:
    """Bilinear weights along one side, the triangle as wide as two cells."""
    centre, width = (cell + 0.5) * side / out, side / out
    return {place: max(0.0, 1 - abs(place + 0.5 - centre) / width) for place in range(side)}


@pytest.mark.parametrize(("side", "out"), GRIDS)
@pytest.mark.parametrize(("method", "weights"), [("average", window), ("bilinear", triangle)])
def test_a_pooled_token_is_the_weighted_mean_of_its_cell(method: str, weights: Any, side: int, out: int) -> None:
    features, _ = example(side**2)
    tokens, slot, cluster = reduce_tokens(features, settings(method, tokens=out**2))
    for image, patches in enumerate(features.unflatten(1, (side, side))):
        expected = [
            mean([(a * b, patches[y, x]) for y, a in rows.items() for x, b in columns.items()])
            for rows in (weights(side, out, cell) for cell in range(out))
            for columns in (weights(side, out, cell) for cell in range(out))
        ]
        torch.testing.assert_close(tokens[image], torch.stack(expected))
    assert cluster.tolist() == [[out < side] * out**2] * 3
    cell = [cell_of(side, out, place) for place in range(side)]
    assert slot.tolist() == [[row * out + column for row in cell for column in cell]] * 3


@pytest.mark.parametrize(("side", "out"), [*GRIDS, (24, 12), (24, 8), (24, 17)])
def test_pooling_is_that_of_torch(side: int, out: int) -> None:
    features, _ = example(side**2)
    image = features.transpose(1, 2).unflatten(2, (side, side))
    averaged = F.adaptive_avg_pool2d(image, out)
    resized = F.interpolate(image, (out, out), mode="bilinear", antialias=True)
    for method, expected in (("average", averaged), ("bilinear", resized)):
        tokens, _, _ = reduce_tokens(features, settings(method, tokens=out**2))
        torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("side", "out"), [*GRIDS, (24, 17)])
def test_stride_takes_the_middle_patch_of_each_cell(side: int, out: int) -> None:
    features, _ = example(side**2)
    tokens, slot, cluster = reduce_tokens(features, settings("stride", tokens=out**2))
    middles = [int((start + end) / 2) for start, end in cells(side, out)]
    taken = [y * side + x for y in middles for x in middles]
    assert torch.equal(tokens, features[:, taken])
    assert slot.tolist() == [[taken.index(patch) if patch in taken else -1 for patch in range(side**2)]] * 3
    assert not cluster.any()
    assert [cell_of(side, out, middle) for middle in middles] == list(range(out))


def test_stride_of_half_a_side_takes_every_second_patch() -> None:
    _, slot, _ = reduce_tokens(noise(1, 576, 1), settings("stride", ratio=0.75))
    taken = (slot.reshape(24, 24) >= 0).nonzero()
    assert taken.tolist() == [[y, x] for y in range(1, 24, 2) for x in range(1, 24, 2)]


def test_random_places_are_those_of_the_seed_in_order_of_place() -> None:
    features, _ = example()
    chosen = {}
    for seed in range(8):
        tokens, slot, cluster = reduce_tokens(features, settings("random", tokens=7, seed=seed))
        taken = (slot[0] >= 0).nonzero().flatten().tolist()
        assert slot.tolist() == [[taken.index(patch) if patch in taken else -1 for patch in range(16)]] * 3
        assert torch.equal(tokens, features[:, taken])
        assert not cluster.any()
        torch.manual_seed(seed + 1)  # The state of the program is not part of it
        again, _, _ = reduce_tokens(features, settings("random", tokens=7, seed=seed))
        assert torch.equal(again, tokens)
        chosen[seed] = taken
    assert len(set(map(tuple, chosen.values()))) == 8


def slow_prumerge(
    features: Tensor, query: Tensor, keys: Tensor, reduction: Reduction
) -> tuple[Tensor, list[int], list[list[int]]]:
    """One image: its tokens, the patches kept, by falling attention, and the neighbours of each."""
    exponents = [math.exp(float(query @ key) / math.sqrt(len(query))) for key in keys]
    attention = [exponent / sum(exponents) for exponent in exponents][1:]
    everything = range(len(features))
    ranked = sorted(everything, key=lambda patch: -attention[patch])
    kept, rest = (
        ranked[: reduction.count_tokens(len(features)) - 1],
        ranked[reduction.count_tokens(len(features)) - 1 :],
    )
    tokens, neighbours = [], []
    for patch in kept:
        cosine = [float(F.cosine_similarity(keys[patch + 1], keys[other + 1], dim=0)) for other in everything]
        others = sorted(set(everything) - {patch}, key=lambda other: -cosine[other])[: reduction.neighbours]
        total = 1 + sum(attention[other] for other in others) if reduction.weights == "normalized" else 1
        tokens.append((features[patch] + sum(attention[other] * features[other] for other in others)) / total)
        neighbours.append(others)
    total = sum(attention[patch] for patch in rest) if reduction.weights == "normalized" else 1
    tokens.append(torch.stack([attention[patch] * features[patch] for patch in rest]).sum(dim=0) / total)
    return torch.stack(tokens), kept, neighbours


@pytest.mark.parametrize("weights", ["raw", "normalized"])
@pytest.mark.parametrize("neighbours", [1, 4, 32])
@pytest.mark.parametrize(("patches", "count"), [(16, 2), (16, 9), (16, 16), (15, 6)])
def test_prumerge_equals_its_definition_token_by_token(weights: Any, neighbours: int, patches: int, count: int) -> None:
    reduction = settings("prumerge", tokens=count, neighbours=neighbours, weights=weights)
    features, last = example(patches)
    tokens, slot, cluster = reduce_tokens(features, reduction, last)
    for image in range(3):
        expected, kept, _ = slow_prumerge(features[image], last[0][image], last[1][image], reduction)
        torch.testing.assert_close(tokens[image], expected, rtol=1e-4, atol=1e-6)
        assert slot[image].tolist() == [kept.index(p) if p in kept else count - 1 for p in range(patches)]
        assert cluster[image].tolist() == [False] * (count - 1) + [True]


def test_prumerge_adds_tokens_that_are_kept_themselves_and_never_itself() -> None:
    reduction = settings("prumerge", tokens=9, neighbours=4)
    features, (query, keys) = example()
    _, kept, neighbours = slow_prumerge(features[0], query[0], keys[0], reduction)
    assert any(set(kept) & set(others) for others in neighbours)
    tokens, _, _ = reduce_tokens(torch.eye(16).expand(3, -1, -1), reduction, (query, keys))
    for number, patch in enumerate(kept):
        assert tokens[0, number, patch] == 1
        assert set(tokens[0, number].nonzero().flatten().tolist()) == {patch, *neighbours[number]}
    assert set(tokens[0, -1].nonzero().flatten().tolist()) == set(range(16)) - set(kept)


@pytest.mark.parametrize("method", REDUCERS)
@pytest.mark.parametrize("count", [4, 9, 16])
def test_every_token_holds_a_patch_and_every_slot_is_a_token(method: str, count: int) -> None:
    features, last = example()
    tokens, slot, cluster = reduce_tokens(features, settings(method, tokens=count), last)
    assert (tokens.shape, slot.shape, cluster.shape) == ((3, count, 8), (3, 16), (3, count))
    for row in slot.tolist():
        assert set(row) - {-1} == set(range(count))
        assert (-1 in row) == (method in ("stride", "random") and count < 16)


@pytest.mark.parametrize("method", ["average", "stride", "bilinear", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_removed_is_nothing_changed(method: str, dtype: torch.dtype) -> None:
    features = noise(2, 576, 5).to(dtype)
    for budget in ({"tokens": 576}, {"ratio": 0.0}):
        tokens, slot, cluster = reduce_tokens(features, settings(method, **budget))
        assert torch.equal(tokens, features)
        assert torch.equal(slot, torch.arange(576).expand(2, -1))
        assert not cluster.any()


@pytest.mark.parametrize("method", REDUCERS)
def test_a_batch_equals_its_single_rows(method: str) -> None:
    features, (query, keys) = example()
    tokens, slot, cluster = reduce_tokens(features, settings(method), (query, keys))
    for image in range(3):
        row = slice(image, image + 1)
        alone = reduce_tokens(features[row], settings(method), (query[row], keys[row]))
        torch.testing.assert_close(alone[0], tokens[row], rtol=1e-6, atol=1e-6)
        assert torch.equal(alone[1], slot[row])
        assert torch.equal(alone[2], cluster[row])


@pytest.mark.parametrize("method", REDUCERS)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_image_gives_constant_numbers(method: str, value: float) -> None:
    features = torch.full((2, 16, 8), value, requires_grad=True)
    query, keys = (torch.full(shape, value, requires_grad=True) for shape in ((2, 12), (2, 17, 12)))
    tokens, _, _ = reduce_tokens(features, settings(method, tokens=9, weights="normalized"), (query, keys))
    torch.testing.assert_close(tokens, torch.full((2, 9, 8), value))
    raw, _, _ = reduce_tokens(features, settings(method, tokens=9), (query, keys))
    (tokens + raw).square().sum().backward()
    for grad in (features.grad, query.grad, keys.grad):
        assert grad is None or grad.isfinite().all()


@pytest.mark.parametrize("method", REDUCERS)
def test_a_gradient_reaches_every_patch_that_a_token_is_made_of(method: str) -> None:
    features, last = (noise(3, 16, 8).requires_grad_(), example()[1])
    last[0].requires_grad_()
    last[1].requires_grad_()
    tokens, slot, _ = reduce_tokens(features, settings(method), last)
    tokens.square().sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad.abs().sum(dim=-1) > 0, slot >= 0)
    for value in last:
        assert (value.grad is not None and (value.grad != 0).any()) == (method == "prumerge")


@pytest.mark.parametrize("method", REDUCERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_and_nothing_else(method: str, dtype: torch.dtype) -> None:
    features, last = example()
    low, (query, keys) = features.to(dtype), [value.to(dtype) for value in last]
    tokens, slot, _ = reduce_tokens(low, settings(method), (query, keys))
    exact, same, _ = reduce_tokens(low.float(), settings(method), (query.float(), keys.float()))
    assert tokens.dtype == dtype
    assert torch.equal(tokens, exact.to(dtype))
    assert torch.equal(slot, same)


@pytest.mark.parametrize("patches", [1, 4, 9, 49, 64, 576])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99])
def test_a_ratio_gives_the_nearest_number_that_a_method_can_leave(patches: int, ratio: float) -> None:
    wanted = patches * (1 - ratio)
    for method in SPATIAL_METHODS:
        count = settings(method, ratio=ratio).count_tokens(patches)
        squares = [number**2 for number in range(1, patches + 1) if number**2 <= patches]
        assert count in squares
        assert abs(count - wanted) == min(abs(square - wanted) for square in squares)
    for method, least in (("random", 1), ("prumerge", 2)):
        reduction = settings(method, ratio=ratio)
        if round(wanted) >= least:
            assert reduction.count_tokens(patches) == round(wanted)
        else:
            with pytest.raises(ValueError, match=f"ratio: got {ratio}, allowed: one that leaves {least} to {patches}"):
                reduction.count_tokens(patches)


@pytest.mark.parametrize("method", REDUCERS)
def test_more_tokens_than_patches_are_refused(method: str) -> None:
    features, last = example()
    assert settings(method, tokens=16).count_tokens(16) == 16
    for run in (
        lambda: settings(method, tokens=25).count_tokens(16),
        lambda: reduce_tokens(features, settings(method, tokens=25), last),
    ):
        with pytest.raises(ValueError, match=r"tokens: got 25, allowed: one that leaves . to 16 of 16 patch tokens"):
            run()


@pytest.mark.parametrize("method", SPATIAL_METHODS)
def test_spatial_methods_need_a_square(method: str) -> None:
    for budget in ({"tokens": 4}, {"ratio": 0.5}):
        with pytest.raises(ValueError, match="patches: got 15, allowed: a square number"):
            settings(method, **budget).count_tokens(15)


def test_prumerge_needs_a_class_token() -> None:
    with pytest.raises(ValueError, match=r"last: got None, allowed: .* a tower with a class token is needed"):
        reduce_tokens(noise(1, 16, 8), settings("prumerge"))


def test_every_method_that_may_be_named_is_there() -> None:
    assert set(get_args(get_type_hints(Reduction)["method"])) == {*REDUCERS, "resize"}


# --- fewer pixels before the tower -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "out"), GRIDS)
def test_a_smaller_image_has_pixels_of_bilinear_weights(side: int, out: int) -> None:
    patch = 4
    pixels = noise(2, 3, side * patch, side * patch)
    resized, slot, cluster = resize_pixels(pixels, settings("resize", tokens=out**2), patch)
    rows = torch.zeros(out * patch, side * patch)
    for cell in range(out * patch):
        for place, weight in triangle(side * patch, out * patch, cell).items():
            rows[cell, place] = weight
    rows /= rows.sum(dim=1, keepdim=True)
    torch.testing.assert_close(resized, rows @ pixels @ rows.T, rtol=1e-4, atol=1e-5)
    cell_numbers = [cell_of(side, out, place) for place in range(side)]
    assert slot.tolist() == [[row * out + column for row in cell_numbers for column in cell_numbers]] * 2
    assert cluster.tolist() == [[out < side] * out**2] * 2


def test_an_image_of_all_patches_stays_as_it_is() -> None:
    pixels = noise(1, 3, 18, 18)  # Pixels that fill no patch stay
    resized, slot, _ = resize_pixels(pixels, settings("resize", ratio=0.0), 4)
    assert resized is pixels
    assert slot.tolist() == [list(range(16))]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, "tokens, ratio: got None, None, allowed: exactly one of the two"),
        ({"tokens": 9, "ratio": 0.5}, "tokens, ratio: got 9, 0.5, allowed: exactly one of the two"),
        ({"tokens": 8}, "tokens: got 8, allowed: a square number"),
        ({"tokens": 8, "method": "stride"}, "tokens: got 8, allowed: a square number"),
        ({"tokens": 8, "method": "bilinear"}, "tokens: got 8, allowed: a square number"),
        ({"tokens": 0}, "tokens: got 0, allowed: a square number"),
        ({"tokens": -4}, "tokens: got -4, allowed: a square number"),
        ({"tokens": 0, "method": "random"}, "tokens: got 0, allowed: at least 1"),
        ({"tokens": 1, "method": "prumerge"}, "tokens: got 1, allowed: at least 2"),
        ({"ratio": 1.0}, "ratio: got 1.0, allowed: 0 <= ratio < 1"),
        ({"ratio": -0.1}, "ratio: got -0.1, allowed: 0 <= ratio < 1"),
        ({"ratio": math.nan}, "ratio: got nan, allowed: a number or None"),
        ({"ratio": 0.5, "neighbours": 0}, "neighbours: got 0, allowed: at least 1"),
        ({"ratio": 0.5, "method": "max"}, "method: got 'max', allowed: 'average', 'stride', "),
        ({"ratio": 0.5, "weights": "total"}, "weights: got 'total', allowed: 'raw' or 'normalized'"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], told: str) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # It would name some of these first
    with pytest.raises(ValueError, match="^" + re.escape(told)):
        Reduction(**{"method": "average", **wrong})
