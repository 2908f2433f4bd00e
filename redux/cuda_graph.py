"""Capture of a CUDA graph: kernels that the host launches once, and then replays by one call."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

WARM_CALLS = 2
"""Calls before the capture: they compile kernels, and let libraries allocate their workspaces."""

GraphOutput = TypeVar("GraphOutput")


def capture_graph(run: Callable[[], GraphOutput], device: torch.device, pool: Any = None) -> tuple[Any, GraphOutput]:
    """Capture the kernels of a call, which reads and writes tensors of fixed addresses.

    Args:
        run: the call. It runs `WARM_CALLS` times before.
        device: its GPU.
        pool: memory pool that the graph shares with others; None for its own.

    Returns:
        (graph, result): `graph.replay()` writes new values into the tensors of the result.

    Raises:
        RuntimeError: the call waits for the device, or does something else that a graph cannot hold.
    """
    # Captures cannot run on the default stream; libraries have workspaces for each stream, so warm calls run there.
    stream = torch.cuda.Stream(device)
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_CALLS):
            run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile.
    capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    with torch.cuda.device(device), capture:
        result = run()
    return graph, result
