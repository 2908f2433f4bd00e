"""K-means gives exactly c clusters, none empty, the same every time, and those of the textbook where it can."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from redux.kmeans import kmeans
from redux.settings import KMeansSeeds

SEEDS = get_args(KMeansSeeds)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(unit: np.ndarray, clusters: int, seeds: KMeansSeeds) -> list[int]:
    """The tokens that K-means starts from."""
    if seeds == "strided":
        return [number * len(unit) // clusters for number in range(clusters)]
    if seeds == "random":
        return torch.randperm(len(unit), generator=torch.Generator().manual_seed(0))[:clusters].tolist()
    places = [0]
    while len(places) < clusters:
        places.append(
            min(range(len(unit)), key=lambda token: max(float(unit[token] @ unit[place]) for place in places))
        )
    return places


def textbook(tokens: np.ndarray, clusters: int, iterations: int, seeds: KMeansSeeds = "strided") -> np.ndarray:
    """Spherical K-means of one image, token by token; refuses to meet an empty cluster."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    centroids = [unit[place] for place in chosen(unit, clusters, seeds)]
    for _ in range(iterations):
        label = np.array([max(range(clusters), key=lambda c: float(token @ centroids[c])) for token in unit])
        assert set(label) == set(range(clusters)), "not an example for the textbook"
        sums = [unit[label == cluster].sum(axis=0) for cluster in range(clusters)]
        centroids = [total / np.linalg.norm(total) for total in sums]
    return np.array([max(range(clusters), key=lambda c: float(token @ centroids[c])) for token in unit])


@pytest.mark.parametrize("clusters", [1, 2, 7, 19, 20])
@pytest.mark.parametrize("kind", ["noise", "constant", "zero", "two kinds"])
@pytest.mark.parametrize("seeds", SEEDS)
def test_every_cluster_holds_a_token(kind: str, clusters: int, seeds: KMeansSeeds) -> None:
    tokens = {
        "noise": noise(3, 20, 8),
        "constant": torch.ones(3, 20, 8),
        "zero": torch.zeros(3, 20, 8),
        "two kinds": F.one_hot(torch.arange(20) % 2, 8).float().expand(3, -1, -1),
    }[kind]
    label = kmeans(tokens, clusters, 10, seeds)
    assert label.shape == (3, 20)
    for row in label.tolist():
        assert set(row) == set(range(clusters))


def test_refilling_leaves_the_tokens_that_fit_best_where_they_are() -> None:
    """Two kinds of tokens in three clusters: the third takes one token, and the kinds do not mix otherwise."""
    kinds = torch.tensor([0] * 6 + [1] * 6)
    label = kmeans(F.one_hot(kinds, 4).float().unsqueeze(0), 3, 10)[0]
    labels_by_kind = [set(label[kinds == kind].tolist()) for kind in (0, 1)]
    assert not labels_by_kind[0] & labels_by_kind[1]


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_same_tokens_give_the_same_clusters(seeds: KMeansSeeds) -> None:
    tokens = noise(2, 30, 8)
    torch.manual_seed(1)
    first = kmeans(tokens, 6, 10, seeds)
    torch.manual_seed(2)
    assert torch.equal(first, kmeans(tokens.clone(), 6, 10, seeds))


@pytest.mark.parametrize("seeds", SEEDS)
def test_images_of_a_batch_do_not_see_each_other(seeds: KMeansSeeds) -> None:
    tokens = noise(4, 30, 8)
    tokens[2] = 1.0
    alone = [kmeans(image.unsqueeze(0), 6, 10, seeds)[0] for image in tokens]
    assert torch.equal(kmeans(tokens, 6, 10, seeds), torch.stack(alone))


def test_clusters_far_apart_are_found() -> None:
    truth = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(3))
    truth[:4] = torch.arange(4)  # Seeds stand at 0, 10, 20, 30: one of each kind
    truth[[0, 10, 20, 30]] = torch.arange(4)
    tokens = F.one_hot(truth, 8).float() * 5 + 0.1 * noise(40, 8)
    assert torch.equal(kmeans(tokens.unsqueeze(0), 4, 5)[0], truth)


def test_length_does_not_matter_only_direction() -> None:
    tokens = noise(1, 30, 8)
    lengths = noise(1, 30, 1, seed=4).exp()
    assert torch.equal(kmeans(tokens, 5, 10), kmeans(tokens * lengths, 5, 10))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("seeds", SEEDS)
def test_equals_the_textbook_where_no_cluster_is_empty(seed: int, iterations: int, seeds: KMeansSeeds) -> None:
    tokens = noise(40, 6, seed=seed)
    label = kmeans(tokens.unsqueeze(0), 4, iterations, seeds)[0]
    assert np.array_equal(label.numpy(), textbook(tokens.double().numpy(), 4, iterations, seeds))


@pytest.mark.parametrize("clusters", [-1, 0, 11])
def test_refuses_more_clusters_than_tokens_and_fewer_than_one(clusters: int) -> None:
    with pytest.raises(ValueError, match=rf"clusters: got {clusters}, allowed: 1 to 10"):
        kmeans(noise(1, 10, 4), clusters, 3)
