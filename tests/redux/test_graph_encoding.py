"""A CUDA graph of the image tower gives its results, and replaces it only where nothing observes its operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from redux import graph_encoding
from redux.graph_encoding import MAX_SHAPES, find_tower_obstacle
from redux.kernels import set_kernels
from redux.model import ReduxForConditionalGeneration
from redux.settings import VMTC, Reduction

Tiny = Callable[..., ReduxForConditionalGeneration]
METHODS: dict[str, dict[str, Any]] = {
    "llava": {"vmtc": None},
    "vmtc": {},
    "proportional": {"vmtc": VMTC(tokens=6, proportional=True)},
    "keys": {"vmtc": VMTC(tokens=6, similarity="keys", seeds="random", order="rank")},
    "average": {"vmtc": None, "reduction": Reduction(method="average", tokens=4)},
    "random": {"vmtc": None, "reduction": Reduction(method="random", tokens=4)},
    "prumerge": {"vmtc": None, "reduction": Reduction(method="prumerge", tokens=4)},
}


def draw_pixels(model: Any, images: int, seed: int = 0) -> Tensor:
    side = model.config.vision_config.image_size
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return pixels.to(model.device)


def test_a_frozen_tower_and_inference_have_no_obstacle(tiny: Tiny) -> None:
    model = tiny()
    tower, pixels = model.model.vision_tower, draw_pixels(model, 2)
    assert find_tower_obstacle(tower, pixels) == "gradients are needed"
    with torch.inference_mode():
        assert not find_tower_obstacle(tower, pixels)
    tower.requires_grad_(False)
    assert not find_tower_obstacle(tower, pixels)
    assert find_tower_obstacle(tower, pixels.clone().requires_grad_()) == "gradients are needed"


@torch.no_grad()
def test_observers_see_the_operations_of_the_tower(tiny: Tiny) -> None:
    model = tiny()
    tower, pixels = model.model.vision_tower, draw_pixels(model, 2)
    block: Any = tower.encoder.layers[1]
    hook = block.mlp.register_forward_hook(lambda *_: None)
    assert find_tower_obstacle(tower, pixels) == "modules have hooks"
    hook.remove()
    block.mlp.forward = block.mlp.forward  # As accelerate replaces it
    assert find_tower_obstacle(tower, pixels) == "modules have hooks"
    del block.mlp.forward
    with FlopCounterMode(display=False):
        assert find_tower_obstacle(tower, pixels) == "the operations are observed"
    with torch.autocast("cpu", torch.bfloat16):
        assert find_tower_obstacle(tower, pixels) == "autocast is on"
    assert find_tower_obstacle(tower, pixels.to("meta")).startswith("weights are not plain tensors")
    assert not find_tower_obstacle(tower, pixels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_a_graph_of_the_tower_gives_its_results(
    tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = tiny(**METHODS[name]).cuda()
    tower = model.model.vision_tower
    caplog.set_level("INFO", logger="redux")

    def encode(pixels: Tensor, graph: bool = True) -> tuple[Tensor, ...]:
        with monkeypatch.context() as patch:
            if not graph:
                patch.setattr(graph_encoding, "find_tower_obstacle", lambda *_: "not wanted")
            features, assignment = model.model.encode_images(pixels)
            return features, *assignment

    def check(count: int, seed: int) -> None:
        pixels = draw_pixels(model, count, seed)
        expected = encode(pixels, graph=False)
        for result, want in zip(encode(pixels), expected, strict=True):
            assert torch.equal(result, want)

    with torch.inference_mode():
        for seed, count in enumerate([2, 3, 2, 3, 2, 3]):
            check(count, seed)
    # The same graphs serve training with a frozen tower, and later results leave earlier ones alone.
    tower.requires_grad_(False)
    first, pixels = encode(draw_pixels(model, 2)), draw_pixels(model, 2)
    second = encode(draw_pixels(model, 2, seed=1))
    assert torch.equal(first[0], encode(pixels, graph=False)[0])
    assert not torch.equal(first[0], second[0])
    model.model.multi_modal_projector(first[0]).sum().backward()
    # Changed weights, in place and replaced.
    with torch.no_grad():
        tower.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
    check(2, 7)
    tower.encoder.layers[0].mlp.fc1.weight = torch.nn.Parameter(
        tower.encoder.layers[0].mlp.fc1.weight.detach() * 0.5, requires_grad=False
    )
    for seed in range(3):
        check(2, seed)
    graphs = graph_encoding._graphs_by_tower[tower].graphs
    # Random patches come from the host, which a graph cannot read.
    assert (name == "random") == ("without a CUDA graph" in caplog.text) == (not graphs)
    for count in range(1, MAX_SHAPES + 3):
        for seed in range(3):
            check(count, seed)
    assert len(graphs) <= MAX_SHAPES
    set_kernels("plain")
    try:
        check(2, 3)
    finally:
        set_kernels("auto")
