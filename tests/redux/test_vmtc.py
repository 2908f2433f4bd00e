"""VMTC keeps, clusters and merges as equations 5 to 8 say, token by token, and says where each patch went."""

import math
import random
import re
from itertools import pairwise
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from redux.kmeans import kmeans
from redux.settings import VMTC, CompressionStage
from redux.vmtc import (
    PatchAssignment,
    compress_tokens,
    discount_sinks,
    importance_score,
    mean_received_attention,
)

WEIGHTS: list[Any] = ["normalized", "raw", "total"]
ORDERS: list[Any] = ["spatial", "rank"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(patches: int = 20, batch: int = 3, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens and importance scores whose sum is below one, as those of a softmax without the class token."""
    return noise(batch, patches, dim), noise(batch, patches + 1, seed=1).softmax(dim=-1)[:, 1:]


def slow(
    tokens: Tensor, ips: Tensor, stage: CompressionStage, vmtc: VMTC
) -> tuple[Tensor, list[list[int]], list[bool]]:
    """Equations 5-8 of one image: the output tokens, the input tokens that each holds, and which are clusters."""
    ranked = sorted(range(len(tokens)), key=lambda patch: (-float(ips[patch]), patch))
    primary, redundant = ranked[: stage.kept], ranked[stage.kept :]  # Eq. 5, 6
    outputs = [(tokens[patch], [patch], False) for patch in primary]
    if stage.clusters:
        label = kmeans(tokens[redundant].unsqueeze(0), stage.clusters, vmtc.iterations)[0].tolist()
        for cluster in range(stage.clusters):
            members = [patch for patch, number in zip(redundant, label, strict=True) if number == cluster]
            shared = {"normalized": members, "total": redundant}.get(vmtc.weights)
            total = sum(float(ips[patch]) for patch in shared) if shared else 1.0
            merged = torch.stack([ips[patch] * tokens[patch] for patch in members]).sum(dim=0) / total  # Eq. 7
            outputs.append((merged, members, True))
    if vmtc.order == "spatial":
        outputs.sort(key=lambda output: min(output[1]))
    values, members, cluster = zip(*outputs, strict=True)  # Eq. 8
    return torch.stack(values), list(members), list(cluster)


def test_half_of_576_patches_in_three_stages() -> None:
    stages = VMTC().plan_stages(576, 23)
    assert [stage.block for stage in stages] == [5, 11, 17]
    assert [stage.kept + stage.clusters for stage in stages] == [457, 363, 288]
    assert [stage.clusters for stage in stages] == [round(out / 6) for out in (457, 363, 288)]
    assert VMTC().count_tokens_left(576, 23) == 288


@pytest.mark.parametrize(("tokens", "outs"), [(288, [457, 363, 288]), (64, [277, 133, 64]), (36, [229, 91, 36])])
def test_the_papers_budgets_of_tokens(tokens: int, outs: list[int]) -> None:
    assert [stage.num_tokens_out for stage in VMTC(tokens=tokens).plan_stages(576, 23)] == outs


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("budget_schedule", ["geometric", "linear"])
@pytest.mark.parametrize("stages", [1, 2, 6, (0, 22), (-3, -1)], ids=str)
def test_a_ratio_is_met_however_it_is_spread(ratio: float, budget_schedule: Any, stages: Any) -> None:
    schedule = VMTC(ratio=ratio, budget_schedule=budget_schedule, stages=stages).plan_stages(576, 23)
    assert schedule[-1].num_tokens_out == round(576 * (1 - ratio))
    assert all(
        stage.num_tokens_out >= following.num_tokens_out and stage.block < following.block
        for stage, following in pairwise(schedule)
    )


def test_a_geometric_fall_keeps_the_same_share_and_a_linear_one_removes_the_same_number() -> None:
    assert [stage.num_tokens_out for stage in VMTC(tokens=10, stages=2).plan_stages(1000, 23)] == [100, 10]
    assert [
        stage.num_tokens_out for stage in VMTC(tokens=10, stages=3, budget_schedule="linear").plan_stages(1000, 23)
    ] == [
        670,
        340,
        10,
    ]


def test_stages_by_number_of_the_block() -> None:
    assert [stage.block for stage in VMTC(stages=(1, 7, -1)).plan_stages(576, 23)] == [1, 7, 22]


def test_kept_and_clusters_of_each_stage() -> None:
    vmtc = VMTC(kept=(300, 100, 50), clusters=(30, 0, 14))
    assert vmtc.plan_stages(576, 23) == (
        CompressionStage(5, 300, 30),
        CompressionStage(11, 100, 0),
        CompressionStage(17, 50, 14),
    )
    assert vmtc.count_tokens_left(576, 23) == 64


@pytest.mark.parametrize("clusters", [0, 1, 7, (9, 0, 2)], ids=str)
def test_a_number_of_clusters_is_taken_from_the_budget(clusters: Any) -> None:
    schedule = VMTC(tokens=64, clusters=clusters).plan_stages(576, 23)
    assert tuple(stage.clusters for stage in schedule) == (clusters if isinstance(clusters, tuple) else (clusters,) * 3)
    assert [stage.num_tokens_out for stage in schedule] == [277, 133, 64]


def test_half_of_64_patches_in_three_stages_of_a_small_tower() -> None:
    assert [stage.kept + stage.clusters for stage in VMTC().plan_stages(64, 4)] == [51, 40, 32]


@pytest.mark.parametrize("patches", [16, 64, 576])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.89])
@pytest.mark.parametrize("share", [0.0, 1 / 6, 1.0])
def test_a_stage_never_makes_more_clusters_than_it_has_redundant_tokens(
    patches: int, ratio: float, share: float
) -> None:
    vmtc = VMTC(ratio=ratio, cluster_share=share)
    before = patches
    for stage in vmtc.plan_stages(patches, 23):
        assert 0 <= stage.clusters <= before - stage.kept
        before = stage.kept + stage.clusters
    assert before == round(patches * (1 - ratio))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "stage",
    [
        CompressionStage(0, 9, 4),
        CompressionStage(0, 9, 1),
        CompressionStage(0, 9, 11),
        CompressionStage(0, 9, 0),
        CompressionStage(0, 0, 5),
    ],
)
def test_compress_equals_equations_5_to_8_token_by_token(weights: Any, order: Any, stage: CompressionStage) -> None:
    vmtc = VMTC(weights=weights, order=order)
    tokens, ips = example()
    outputs, slot, cluster = compress_tokens(tokens, ips, stage, vmtc)
    for image in range(len(tokens)):
        expected, members, merged = slow(tokens[image], ips[image], stage, vmtc)
        torch.testing.assert_close(outputs[image], expected, rtol=1e-5, atol=1e-6)
        assert cluster[image].tolist() == merged
        members_by_token = [[patch for patch in range(20) if slot[image, patch] == out] for out in range(len(expected))]
        assert members_by_token == [sorted(patches) for patches in members]


@pytest.mark.parametrize("seed", range(20))
def test_compress_equals_the_equations_at_random_shapes_and_settings(seed: int) -> None:
    draw = random.Random(seed)
    patches, batch, dim = draw.randint(2, 60), draw.randint(1, 4), draw.randint(2, 16)
    kept = draw.randint(0, patches)
    clusters = draw.randint(0 if kept else 1, patches - kept) if kept < patches else 0
    vmtc = VMTC(weights=draw.choice(WEIGHTS), order=draw.choice(ORDERS), iterations=draw.randint(1, 6))
    tokens, ips = noise(batch, patches, dim, seed=seed), noise(batch, patches + 1, seed=seed + 1).softmax(dim=-1)[:, 1:]
    outputs, slot, cluster = compress_tokens(tokens, ips, CompressionStage(0, kept, clusters), vmtc)
    for image in range(batch):
        expected, members, merged = slow(tokens[image], ips[image], CompressionStage(0, kept, clusters), vmtc)
        torch.testing.assert_close(outputs[image], expected, rtol=1e-4, atol=1e-5)
        assert cluster[image].tolist() == merged
        members_by_token = [
            [patch for patch in range(patches) if slot[image, patch] == out] for out in range(len(expected))
        ]
        assert members_by_token == [sorted(patches) for patches in members]


@pytest.mark.parametrize("seeds", ["strided", "farthest", "random"])
def test_clusters_are_made_by_what_is_to_be_alike(seeds: Any) -> None:
    (tokens, ips), keys = example(), noise(3, 20, 5, seed=7)
    _, slot, _ = compress_tokens(tokens, ips, CompressionStage(0, 9, 4), VMTC(order="rank", seeds=seeds), keys)
    redundant = ips.argsort(dim=-1, descending=True)[:, 9:]
    label = kmeans(keys.gather(1, redundant.unsqueeze(-1).expand(-1, -1, 5)), 4, 10, seeds)
    assert torch.equal(slot.gather(1, redundant), label + 9)


@pytest.mark.parametrize("weights", ["normalized", "total"])
def test_bfloat16_comes_close(weights: Any) -> None:
    """Stated bound: tokens that both keep or merge alike differ by 2 %, and that is most of them."""
    tokens, ips = noise(4, 100, 32), noise(4, 101, seed=1).softmax(dim=-1)[:, 1:]
    vmtc = VMTC(weights=weights)
    full, slot, _ = compress_tokens(tokens, ips, CompressionStage(0, 60, 1), vmtc)
    half, slot_of_half, _ = compress_tokens(tokens.bfloat16(), ips.bfloat16(), CompressionStage(0, 60, 1), vmtc)
    alike = torch.stack([(slot == out).eq(slot_of_half == out).all(dim=1) for out in range(61)], dim=1)
    assert alike.float().mean() > 0.5
    torch.testing.assert_close(half.float()[alike], full[alike], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("order", ORDERS)
def test_every_output_holds_an_input_and_every_input_is_held(order: Any) -> None:
    tokens, ips = example()
    _, slot, _ = compress_tokens(tokens, ips, CompressionStage(0, 9, 4), VMTC(order=order))
    for row in slot.tolist():
        assert set(row) == set(range(13))


def test_without_clusters_redundant_tokens_are_dropped() -> None:
    tokens, ips = example()
    outputs, slot, cluster = compress_tokens(tokens, ips, CompressionStage(0, 9, 0), VMTC(cluster_share=0.0))
    assert (slot >= 0).sum(dim=1).tolist() == [9, 9, 9]
    assert not cluster.any()
    lowest_kept = torch.where(slot >= 0, ips, torch.inf).amin(dim=1)
    assert (torch.where(slot < 0, ips, -torch.inf).amax(dim=1) <= lowest_kept).all()
    for image in range(3):
        assert torch.equal(outputs[image], tokens[image][slot[image] >= 0])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("weight", [1 / 21, 0.0])
def test_a_constant_image_gives_numbers(weights: Any, weight: float) -> None:
    tokens = torch.ones(2, 20, 8, requires_grad=True)
    ips = torch.full((2, 20), weight, requires_grad=True)
    outputs, slot, _ = compress_tokens(tokens, ips, CompressionStage(0, 9, 4), VMTC(weights=weights))
    outputs.square().sum().backward()
    assert outputs.isfinite().all()
    assert tokens.grad is not None
    assert ips.grad is not None
    assert tokens.grad.isfinite().all()
    assert ips.grad.isfinite().all()
    assert slot.unique().tolist() == list(range(13))


def test_normalized_merging_of_equal_tokens_gives_that_token() -> None:
    _, ips = example()
    outputs, _, _ = compress_tokens(torch.full((3, 20, 8), 2.5), ips, CompressionStage(0, 9, 4), VMTC())
    torch.testing.assert_close(outputs, torch.full((3, 13, 8), 2.5))


def test_nothing_removed_is_nothing_changed() -> None:
    vmtc = VMTC(ratio=0.0)
    tokens, ips = example()
    for stage in vmtc.plan_stages(20, 4):
        outputs, slot, cluster = compress_tokens(tokens, ips, stage, vmtc)
        assert torch.equal(outputs, tokens)
        assert torch.equal(slot, torch.arange(20).expand(3, -1))
        assert not cluster.any()


def test_one_raw_cluster_is_the_fused_token_of_evit() -> None:
    """EViT (Liang et al. 2022), evit.py: sum of non_topk x non_topk_attn, behind the tokens kept by rank."""
    tokens, ips = example()
    outputs, _, _ = compress_tokens(tokens, ips, CompressionStage(0, 9, 1), VMTC(weights="raw", order="rank"))
    _, top = ips.topk(9)
    others = torch.ones_like(ips, dtype=torch.bool).scatter(1, top, False)
    fused = (tokens * (ips * others).unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(outputs[:, -1], fused)
    torch.testing.assert_close(outputs[:, :-1], tokens.gather(1, top.unsqueeze(-1).expand(-1, -1, 8)))


def test_merging_carries_a_gradient_to_tokens_and_importance() -> None:
    tokens, ips = (value.requires_grad_() for value in example())
    outputs, slot, cluster = compress_tokens(tokens, ips, CompressionStage(0, 9, 4), VMTC())
    outputs[cluster].square().sum().backward()
    merged = cluster.gather(1, slot)
    assert tokens.grad is not None
    assert ips.grad is not None
    assert torch.equal(tokens.grad.abs().sum(dim=-1) > 0, merged)
    assert (ips.grad[~merged] == 0).all()
    assert (ips.grad != 0).any()


def test_importance_is_the_class_tokens_row_of_the_full_attention_map() -> None:
    query, keys = noise(2, 4, 21, 8), noise(2, 4, 21, 8, seed=1)
    full = (query @ keys.transpose(-1, -2) * 0.3).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(importance_score(query[:, :, :1], keys, 0.3), full[:, 0, 1:])


def test_what_a_patch_receives_is_the_mean_of_its_column_of_the_full_attention_map() -> None:
    query, keys = noise(2, 4, 21, 8), noise(2, 4, 21, 8, seed=1)
    full = (query @ keys.transpose(-1, -2) * 0.3).softmax(dim=-1).mean(dim=(1, 2))
    torch.testing.assert_close(mean_received_attention(query, keys, 0.3), full)


def test_in_bfloat16_importance_hardly_ties() -> None:
    """Its own 8 bits would leave some 80 values among 576 patches."""
    query, keys = noise(1, 16, 577, 8).bfloat16() * 0.3, noise(1, 16, 577, 8, seed=1).bfloat16()
    for ips in (importance_score(query[:, :, :1], keys, 0.3), mean_received_attention(query, keys, 0.3)):
        assert ips.unique().numel() > 550


@pytest.mark.parametrize("sink_norm", [1.0, 1.5, 3.0])
def test_sinks_are_patches_of_a_norm_far_above_the_median(sink_norm: float) -> None:
    tokens, ips = example()
    tokens[0, 3] *= 30
    tokens[1, [2, 5]] *= -30
    found = discount_sinks(tokens, ips, sink_norm)
    for image, patches in enumerate(tokens):
        norms = [math.sqrt(sum(float(value) ** 2 for value in patch)) for patch in patches]
        median = sorted(norms)[(len(norms) - 1) // 2]
        for patch, norm in enumerate(norms):
            factor = 1e-6 if norm > sink_norm * median else 1.0
            assert float(found[image, patch]) == pytest.approx(float(ips[image, patch]) * factor)
    if sink_norm == 3.0:
        assert (found < 1e-6).nonzero().tolist() == [[0, 3], [1, 2], [1, 5]]


@pytest.mark.parametrize("clusters", [0, 1, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_sink_is_a_primary_token_while_another_patch_is_left(weights: Any, clusters: int) -> None:
    tokens, ips = example()
    tokens[:, [3, 8]] *= 30
    ips[:, [3, 8]] = 0.4  # Sinks draw most of the attention
    stage, vmtc = CompressionStage(0, 12, clusters), VMTC(order="rank", weights=weights)
    _, kept, _ = compress_tokens(tokens, ips, stage, vmtc)
    assert (kept[:, [3, 8]] < 2).all()
    merged, kept, _ = compress_tokens(tokens, discount_sinks(tokens, ips, 3.0), stage, vmtc)
    assert ((kept[:, [3, 8]] >= 12) | (kept[:, [3, 8]] == -1)).all()
    assert merged.isfinite().all()


def test_without_sinks_importance_stays_as_it_is() -> None:
    tokens, ips = example()
    assert discount_sinks(tokens, ips, None) is ips
    assert torch.equal(discount_sinks(tokens, ips, 1e9), ips)


def test_a_bias_of_log_two_counts_a_key_twice() -> None:
    query, keys = noise(1, 2, 6, 4), noise(1, 2, 6, 4, seed=1)
    bias = torch.zeros(1, 6)
    bias[0, -1] = math.log(2)
    doubled = torch.cat([keys, keys[:, :, -1:]], dim=2)
    once, twice = importance_score(query[:, :, :1], keys, 0.5, bias), importance_score(query[:, :, :1], doubled, 0.5)
    torch.testing.assert_close(once[:, :-1], twice[:, :-2])
    torch.testing.assert_close(once[:, -1], twice[:, -2:].sum(dim=1))
    full = (query @ doubled.transpose(-1, -2) * 0.5).softmax(dim=-1).mean(dim=(1, 2))
    torch.testing.assert_close(mean_received_attention(query, keys, 0.5, bias)[:, :-1], full[:, :-2])


def test_sizes_count_the_patches_that_each_token_holds() -> None:
    assignment = PatchAssignment(
        torch.tensor([[0, 0, 2, -1, 2, 2], [1, 1, 1, 0, 2, -1]]), torch.zeros(2, 6, dtype=torch.bool)
    )
    assert assignment.count_patches(3).tolist() == [[2, 0, 3], [1, 3, 1]]


def test_assignment_follows_every_patch_through_all_stages() -> None:
    vmtc = VMTC(ratio=0.7, cluster_share=0.3)
    assignment = PatchAssignment.untouched(3, 20, torch.device("cpu"))
    where, merged = [[list(range(20)) for _ in range(3)], [[False] * 20 for _ in range(3)]]
    tokens, _ = example()
    for number, stage in enumerate([CompressionStage(0, 10, 5), CompressionStage(1, 11, 0), CompressionStage(2, 3, 4)]):
        ips = noise(3, tokens.shape[1], seed=number).softmax(dim=-1)
        tokens, slot, cluster = compress_tokens(tokens, ips, stage, vmtc)
        assignment = assignment.then(slot, cluster)
        for image in range(3):
            for patch in range(20):
                if where[image][patch] >= 0:
                    where[image][patch] = int(slot[image, where[image][patch]])
                if where[image][patch] >= 0:
                    merged[image][patch] |= bool(cluster[image, where[image][patch]])
    assert (assignment.token_of_patch.tolist(), assignment.merged.tolist()) == (where, merged)
    assert (assignment.token_of_patch == -1).any()
    assert assignment.merged.any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"stages": 0},
        {"cluster_share": 1.1},
        {"cluster_share": -0.1},
        {"iterations": 0},
        {"tokens": 0},
        {"clusters": -1},
        {"clusters": (4, 4)},
        {"kept": (8, 4)},
        {"kept": (8, 4, -1)},
        {"stages": ()},
        {"stages": [1, 2]},
        {"stages": True},
        {"stages": (1.5, 2)},
        {"stages": "3"},
        {"tokens": 1.5},
        {"tokens": True},
        {"ratio": "0.5"},
        {"ratio": math.nan},
        {"clusters": 1.5},
        {"iterations": math.inf},
        {"proportional": "no"},
        {"budget_schedule": "square"},
        {"similarity": "values"},
        {"seeds": "plusplus"},
        {"weights": "mean"},
        {"order": "random"},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # It would name some of these first
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}: got {value!r}, allowed: ")):
        VMTC(**wrong)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 0.5, "tokens": 64}, "tokens: got 64 besides ratio, allowed: one of the two"),
        ({"tokens": 64, "kept": (9, 9, 9), "clusters": 0}, r"kept: got \(9, 9, 9\) besides tokens"),
        ({"kept": (9, 9, 9)}, "clusters: got None, allowed: a number, or one for each block, because kept is given"),
    ],
    ids=str,
)
def test_a_budget_is_given_once(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VMTC(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": 5}, "stages: got 5, allowed: 1 to 4, the blocks in use"),
        ({"stages": (1, 4)}, r"stages: got \(1, 4\), allowed: ascending numbers up to 3, the last block in use"),
        ({"stages": (-5,)}, r"stages: got \(-5,\), allowed: ascending numbers up to 3"),
        ({"stages": (2, 1)}, r"stages: got \(2, 1\), allowed: ascending numbers up to 3"),
        ({"ratio": 0.99}, r"ratio: got 0\.99, allowed: one that leaves at least 1 of 16"),
        ({"tokens": 17}, "tokens: got 17, allowed: 1 to 16, the patch tokens of an image"),
        ({"tokens": 4, "clusters": 5}, "clusters: got 5, allowed: up to 4, all tokens that leave block 3"),
        ({"kept": (16, 9, 2), "clusters": 1}, r"kept: got \(16, 9, 2\), with 1 clusters at block 1, allowed: 1 to 16"),
        ({"kept": (9, 9, 2), "clusters": (1, 2, 1)}, r"with 2 clusters at block 2, allowed: 1 to 10 tokens in all"),
        ({"kept": (9, 2, 0), "clusters": 0}, r"with 0 clusters at block 3, allowed: 1 to 2"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_tower_of_16_patches_and_4_blocks_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VMTC(**settings).plan_stages(16, 4)
