"""Encoding of images by a CUDA graph.

A compressing block launches many small kernels. For a few images the host takes longer to launch a tower than the GPU
takes to compute it, and a training step begins with the tower. Image sizes are fixed, so a graph can hold all of the
tower. It serves wherever the tower needs no gradients: in inference, and in training with a frozen tower. Its results
are those of the tower, bit for bit.

A shape is captured when it comes the second time, since a capture takes as long as several passes.
"""

import itertools
import logging
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from redux.cuda_graph import capture_graph
from redux.kernels import get_kernels
from redux.tower import TowerCompression

MAX_SHAPES = 8
"""Shapes of pixel tensors for which a tower keeps graphs; further shapes are encoded without one."""

_logger = logging.getLogger(__name__)
_graphs_lock = threading.Lock()
_graphs_by_tower: "WeakKeyDictionary[nn.Module, TowerGraphs]" = WeakKeyDictionary()


def run_tower(
    tower: Any, pixels: Float[Tensor, "images 3 height width"], compression: TowerCompression
) -> tuple[Tensor, ...]:
    """Run a compressing tower, by a graph if one is at hand.

    Args:
        tower: a tower that `redux.tower.extend_module` extended.
        pixels: normalised pixels.
        compression: the compression.

    Returns:
        (tokens, token_of_patch, merged), as `redux.tower.CompressingTower`.
    """
    is_plain = get_kernels() == "plain" or pixels.device.type != "cuda" or compression.first_token_only
    if is_plain or find_tower_obstacle(tower, pixels):
        return tower(pixels, tower_compression=compression)
    settings = (tower.training, get_kernels(), compression)
    # A graph reads weights at their addresses, so a replaced weight needs a new capture.
    weights = tuple(tensor.data_ptr() for tensor in itertools.chain(tower.parameters(), tower.buffers()))
    with _graphs_lock:
        # Two threads must not replay one graph, which has one set of tensors.
        graphs = _graphs_by_tower.get(tower)
        if graphs is None or graphs.weights != weights or graphs.settings != settings:
            graphs = _graphs_by_tower[tower] = TowerGraphs(settings, weights)
        graph = graphs.find(tower, pixels, compression)
        if graph:
            return graph.encode(pixels)
    return tower(pixels, tower_compression=compression)


def find_tower_obstacle(tower: Any, pixels: Tensor) -> str:
    """Return why a graph cannot stand for a call of a tower, or ""."""
    parameters = list(tower.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (pixels, *parameters)):
        return "gradients are needed"
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return "the operations are observed"  # By torch.compile, or by a counter of operations
    # FSDP2, tensor parallelism and quantization replace tensors by their own; offloading leaves other devices.
    if any(type(tensor) is not nn.Parameter or tensor.device != pixels.device for tensor in parameters):
        return "weights are not plain tensors on the device of the pixels"
    if torch.is_autocast_enabled(pixels.device.type):
        return "autocast is on"
    # Hooks gather weights or move inputs, and callers read values by them.
    if any(has_hooks(module) for module in tower.modules()):
        return "modules have hooks"
    is_capturing = pixels.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return "a graph is being captured" if is_capturing else ""


def has_hooks(module: nn.Module) -> bool:
    """Return True if anything but the forward pass of its class runs in a call of a module."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or "forward" in vars(module)


class TowerGraphs:
    """The graphs of a tower, by shape of the pixels.

    Args:
        settings: all but weights and shape that the graphs depend on.
        weights: addresses of the weights.
    """

    def __init__(self, settings: Any, weights: tuple[int, ...]) -> None:
        self.settings, self.weights = settings, weights
        self.graphs: dict[Any, TowerGraph] = {}
        self.seen: set[Any] = set()
        self.failed = False
        # Graphs run one after the other, so they can share memory; only their results stay.
        self.pool = torch.cuda.graph_pool_handle()

    def find(self, tower: Any, pixels: Tensor, compression: TowerCompression) -> "TowerGraph | None":
        """Find the graph of a shape; capture it when the shape comes the second time."""
        key = pixels.shape, pixels.dtype
        if key in self.graphs or self.failed or len(self.graphs) == MAX_SHAPES:
            return self.graphs.get(key)
        if key not in self.seen:
            self.seen.add(key)
            return None
        try:
            self.graphs[key] = TowerGraph(tower, pixels, compression, self.pool)
        except RuntimeError as error:  # An option may wait for the device
            self.failed = True
            _logger.warning("image tower: without a CUDA graph: %s", " ".join(str(error).split()))
            return None
        if len(self.graphs) == 1:
            _logger.info("image tower: CUDA graph")
        return self.graphs[key]


class TowerGraph:
    """A captured pass of a tower on pixels of one shape.

    Raises:
        RuntimeError: the pass cannot be captured.
    """

    # Tensors of inference mode could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, tower: Any, pixels: Tensor, compression: TowerCompression, pool: Any) -> None:
        self.pixels = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device).copy_(pixels)
        self.graph, self.results = capture_graph(
            lambda: tower(self.pixels, tower_compression=compression), pixels.device, pool
        )

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encode pixels; the next call does not change the results."""
        with torch.no_grad():
            self.pixels.copy_(pixels)
            self.graph.replay()
            return tuple(result.clone() for result in self.results)
