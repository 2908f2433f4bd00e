"""Fused K-means gives the labels of the plain version, ties aside, and refills empty clusters by the same rule."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from redux.kernels import set_kernels
from redux.kmeans import kmeans
from redux.settings import KMeansSeeds
from tests.redux.kernels.comparison import DEVICE, noise

SEEDS = get_args(KMeansSeeds)


def label_both(tokens: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    set_kernels("plain")
    plain = kmeans(tokens, *arguments)
    set_kernels("fused")
    return plain, kmeans(tokens, *arguments)


@pytest.mark.parametrize(
    ("clusters", "seeds"),
    [(1, "strided"), (2, "farthest"), (7, "random"), (7, "strided"), (19, "farthest"), (20, "random"), (20, "strided")],
)
def test_noise_has_the_labels_of_the_plain_version(clusters: int, seeds: KMeansSeeds) -> None:
    plain, fused = label_both(noise(2, 20, 8, seed=clusters), clusters, 4, seeds)
    assert torch.equal(fused, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tokens_of_several_tiles_have_the_labels_of_the_plain_version(dtype: torch.dtype) -> None:
    tokens = noise(1, 150, 70).to(dtype)
    plain, fused = label_both(tokens, 20, 3, "strided")
    assert torch.equal(fused, plain)


def test_more_than_one_token_is_moved_by_falling_distance_into_empty_clusters() -> None:
    """Seeds of clusters 1 to 4 equal that of cluster 0, which wins the ties and leaves them empty.

    Similarities to the seed are multiples of 1/4, which no order of additions rounds: 1, 1/2, 0, -1/4, -1/2, -3/4, -1.
    """
    seed = [1, 1, 1, 1, 0, 0, 0, 0]
    others = {
        1: [1, 1, 1, -1, 0, 0, 0, 0],
        3: [1, 1, -1, -1, 0, 0, 0, 0],
        5: [0, -1, -1, -1, 1, 0, 0, 0],
        6: [-1, -1, -1, -1, 0, 0, 0, 0],
        8: [0, 1, -1, -1, 0, 1, 0, 0],
        10: [0, 1, 1, 0, 0, 0, 1, 1],
        11: [-1, -1, -1, 1, 0, 0, 0, 0],
    }
    tokens = torch.tensor([[others.get(position, seed) for position in range(12)]], device=DEVICE) / 2
    plain, fused = label_both(tokens, 5, 1, "strided")
    assert torch.equal(fused, plain)
    # Tokens 6, 5, 11 and 8 are the least similar to the seed.
    assert plain[0, [6, 5, 11, 8]].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", ["constant", "zero", "two kinds", "not finite"])
def test_every_cluster_of_a_degenerate_image_holds_a_token(kind: str, seeds: KMeansSeeds) -> None:
    tokens = {
        "constant": torch.ones(1, 12, 8, device=DEVICE),
        "zero": torch.zeros(1, 12, 8, device=DEVICE),
        "two kinds": F.one_hot(torch.arange(12, device=DEVICE) % 2, 8).float().unsqueeze(0),
        "not finite": noise(1, 12, 8).masked_fill(torch.arange(12, device=DEVICE).view(1, 12, 1) % 3 == 0, torch.nan),
    }[kind]
    set_kernels("fused")
    assert kmeans(tokens, 5, 2, seeds).unique().tolist() == list(range(5))


def test_an_image_has_the_same_labels_in_a_batch_and_in_a_view() -> None:
    tokens = noise(3, 21, 8)
    tokens[1] = 1.0
    set_kernels("fused")
    together = kmeans(tokens[:, 1:], 6, 2)
    separate = [kmeans(image.unsqueeze(0).clone(), 6, 2)[0] for image in tokens[:, 1:]]
    assert torch.equal(together, torch.stack(separate))


def test_tokens_without_a_kernel_are_refused_with_the_reason() -> None:
    set_kernels("fused")
    with pytest.raises(ValueError, match=r"allowed for K-means: auto or plain, because tokens are torch\.float64"):
        kmeans(noise(1, 8, 4).double(), 2, 1)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(("count", "clusters"), [(195, 76), (345, 46), (385, 38), (61, 6), (576, 128)])
def test_labels_on_a_gpu_agree_except_where_similarities_are_close(count: int, clusters: int) -> None:
    tokens = noise(8, count, 1024).bfloat16()
    plain, fused = label_both(tokens, clusters, 10, "strided")
    assert (plain == fused).float().mean() > 0.98
    assert torch.equal(fused, kmeans(tokens, clusters, 10))
