"""VMTC keeps, clusters and merges as equations 5 to 8 say, token by token, and says where each patch went."""

from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from redux.kmeans import kmeans
from redux.vmtc import VMTC, Fate, Stage, compress, importance


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(patches: int = 20, batch: int = 3, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens and importance scores whose sum is below one, as those of a softmax without the class token."""
    return noise(batch, patches, dim), noise(batch, patches + 1, seed=1).softmax(dim=-1)[:, 1:]


def slow(tokens: Tensor, ips: Tensor, stage: Stage, vmtc: VMTC) -> tuple[Tensor, list[list[int]], list[bool]]:
    """Equations 5-8 of one image: the output tokens, the input tokens that each holds, and which are clusters."""
    ranked = sorted(range(len(tokens)), key=lambda patch: (-float(ips[patch]), patch))
    primary, redundant = ranked[: stage.kept], ranked[stage.kept :]  # eq. 5, 6
    outputs = [(tokens[patch], [patch], False) for patch in primary]
    if stage.clusters:
        label = kmeans(tokens[redundant].unsqueeze(0), stage.clusters, vmtc.iterations)[0].tolist()
        for cluster in range(stage.clusters):
            members = [patch for patch, number in zip(redundant, label, strict=True) if number == cluster]
            total = sum(float(ips[patch]) for patch in members) if vmtc.merge == "normalized" else 1.0
            merged = torch.stack([ips[patch] * tokens[patch] for patch in members]).sum(dim=0) / total  # eq. 7
            outputs.append((merged, members, True))
    if vmtc.order == "spatial":
        outputs.sort(key=lambda output: min(output[1]))
    values, members, cluster = zip(*outputs, strict=True)  # eq. 8
    return torch.stack(values), list(members), list(cluster)


def test_half_of_576_patches_in_three_stages() -> None:
    stages = VMTC().schedule(576, 23)
    assert [stage.block for stage in stages] == [5, 11, 17]
    assert [stage.kept + stage.clusters for stage in stages] == [457, 363, 288]
    assert [stage.clusters for stage in stages] == [round(out / 6) for out in (457, 363, 288)]
    assert VMTC().tokens(576, 23) == 288


def test_half_of_64_patches_in_three_stages_of_a_small_tower() -> None:
    assert [stage.kept + stage.clusters for stage in VMTC().schedule(64, 4)] == [51, 40, 32]


@pytest.mark.parametrize("patches", [16, 64, 576])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.89])
@pytest.mark.parametrize("share", [0.0, 1 / 6, 1.0])
def test_a_stage_never_makes_more_clusters_than_it_has_redundant_tokens(
    patches: int, ratio: float, share: float
) -> None:
    vmtc = VMTC(ratio=ratio, cluster_share=share)
    before = patches
    for stage in vmtc.schedule(patches, 23):
        assert 0 <= stage.clusters <= before - stage.kept
        before = stage.kept + stage.clusters
    assert before == round(patches * (1 - ratio))


@pytest.mark.parametrize("merge", ["normalized", "raw"])
@pytest.mark.parametrize("order", ["spatial", "rank"])
@pytest.mark.parametrize("stage", [Stage(0, 9, 4), Stage(0, 9, 1), Stage(0, 9, 11), Stage(0, 9, 0), Stage(0, 0, 5)])
def test_compress_equals_equations_5_to_8_token_by_token(merge: Any, order: Any, stage: Stage) -> None:
    vmtc = VMTC(merge=merge, order=order)
    tokens, ips = example()
    outputs, slot, cluster = compress(tokens, ips, stage, vmtc)
    for image in range(len(tokens)):
        expected, members, merged = slow(tokens[image], ips[image], stage, vmtc)
        torch.testing.assert_close(outputs[image], expected, rtol=1e-5, atol=1e-6)
        assert cluster[image].tolist() == merged
        held = [[patch for patch in range(20) if slot[image, patch] == out] for out in range(len(expected))]
        assert held == [sorted(patches) for patches in members]


@pytest.mark.parametrize("order", ["spatial", "rank"])
def test_every_output_holds_an_input_and_every_input_is_held(order: Any) -> None:
    tokens, ips = example()
    _, slot, _ = compress(tokens, ips, Stage(0, 9, 4), VMTC(order=order))
    for row in slot.tolist():
        assert set(row) == set(range(13))


def test_without_clusters_redundant_tokens_are_dropped() -> None:
    tokens, ips = example()
    outputs, slot, cluster = compress(tokens, ips, Stage(0, 9, 0), VMTC(cluster_share=0.0))
    assert (slot >= 0).sum(dim=1).tolist() == [9, 9, 9]
    assert not cluster.any()
    lowest_kept = torch.where(slot >= 0, ips, torch.inf).amin(dim=1)
    assert (torch.where(slot < 0, ips, -torch.inf).amax(dim=1) <= lowest_kept).all()
    for image in range(3):
        assert torch.equal(outputs[image], tokens[image][slot[image] >= 0])


@pytest.mark.parametrize("merge", ["normalized", "raw"])
@pytest.mark.parametrize("weight", [1 / 21, 0.0])
def test_a_constant_image_gives_numbers(merge: Any, weight: float) -> None:
    tokens = torch.ones(2, 20, 8, requires_grad=True)
    ips = torch.full((2, 20), weight, requires_grad=True)
    outputs, slot, _ = compress(tokens, ips, Stage(0, 9, 4), VMTC(merge=merge))
    outputs.square().sum().backward()
    assert outputs.isfinite().all()
    assert tokens.grad is not None
    assert ips.grad is not None
    assert tokens.grad.isfinite().all()
    assert ips.grad.isfinite().all()
    assert slot.unique().tolist() == list(range(13))


def test_normalized_merging_of_equal_tokens_gives_that_token() -> None:
    _, ips = example()
    outputs, _, _ = compress(torch.full((3, 20, 8), 2.5), ips, Stage(0, 9, 4), VMTC())
    torch.testing.assert_close(outputs, torch.full((3, 13, 8), 2.5))


def test_nothing_removed_is_nothing_changed() -> None:
    vmtc = VMTC(ratio=0.0)
    tokens, ips = example()
    for stage in vmtc.schedule(20, 4):
        outputs, slot, cluster = compress(tokens, ips, stage, vmtc)
        assert torch.equal(outputs, tokens)
        assert torch.equal(slot, torch.arange(20).expand(3, -1))
        assert not cluster.any()


def test_one_raw_cluster_is_the_fused_token_of_evit() -> None:
    """EViT (Liang et al. 2022), evit.py: sum of non_topk x non_topk_attn, behind the tokens kept by rank."""
    tokens, ips = example()
    outputs, _, _ = compress(tokens, ips, Stage(0, 9, 1), VMTC(merge="raw", order="rank"))
    _, top = ips.topk(9)
    others = torch.ones_like(ips, dtype=torch.bool).scatter(1, top, False)
    fused = (tokens * (ips * others).unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(outputs[:, -1], fused)
    torch.testing.assert_close(outputs[:, :-1], tokens.gather(1, top.unsqueeze(-1).expand(-1, -1, 8)))


def test_merging_carries_a_gradient_to_tokens_and_importance() -> None:
    tokens, ips = (value.requires_grad_() for value in example())
    outputs, slot, cluster = compress(tokens, ips, Stage(0, 9, 4), VMTC())
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
    torch.testing.assert_close(importance(query[:, :, :1], keys, 0.3), full[:, 0, 1:])


def test_fate_follows_every_patch_through_all_stages() -> None:
    vmtc = VMTC(ratio=0.7, cluster_share=0.3)
    fate = Fate.untouched(3, 20, torch.device("cpu"))
    where, merged = [[list(range(20)) for _ in range(3)], [[False] * 20 for _ in range(3)]]
    tokens, _ = example()
    for number, stage in enumerate([Stage(0, 10, 5), Stage(1, 11, 0), Stage(2, 3, 4)]):
        ips = noise(3, tokens.shape[1], seed=number).softmax(dim=-1)
        tokens, slot, cluster = compress(tokens, ips, stage, vmtc)
        fate = fate.then(slot, cluster)
        for image in range(3):
            for patch in range(20):
                if where[image][patch] >= 0:
                    where[image][patch] = int(slot[image, where[image][patch]])
                if where[image][patch] >= 0:
                    merged[image][patch] |= bool(cluster[image, where[image][patch]])
    assert (fate.slot.tolist(), fate.merged.tolist()) == (where, merged)
    assert (fate.slot == -1).any()
    assert fate.merged.any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"stages": 0},
        {"cluster_share": 1.1},
        {"cluster_share": -0.1},
        {"iterations": 0},
        {"merge": "mean"},
        {"order": "random"},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would name some of these first
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}: got {value!r}, allowed: "):
        VMTC(**wrong)


def test_a_schedule_needs_blocks_and_tokens() -> None:
    with pytest.raises(ValueError, match="stages: got 3, allowed: 1 to 2"):
        VMTC().schedule(576, 2)
    with pytest.raises(ValueError, match=r"ratio: got 0\.99, allowed: one that leaves at least 1 of 16"):
        VMTC(ratio=0.99).schedule(16, 4)
