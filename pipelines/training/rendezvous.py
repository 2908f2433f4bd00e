"""Rendezvous of the workers of a stage: PyTorch's store, at the address by which Ray knows the machine of rank 0.

PyTorch's own store listens on every address of the machine. The store has no password, and anyone who writes to it
tells workers which address to connect to and which bytes to unpickle. So this store listens on one address only.

The module imports torch in workers only. Ray Train's controller imports the module at every start, and torch would take
it seconds of CPU that workers need at the same time.
"""

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import ray
from ray._common.network_utils import build_address
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

OPEN_STORES: list["TCPStore"] = []
"""Stores of the process of rank 0. A store closes with its last reference."""

TIMEOUT_S = 1800
"""Seconds until a collective fails."""

SHUTDOWN_TIMEOUT_S = 30
"""Seconds that workers get to leave their process group."""


class Rendezvous(BackendConfig):
    """Configuration of Ray Train that sets up process groups with a store on one address."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _StoreBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[Any]]:
        """Context of the train function, as in Ray's TorchConfig: it sets the GPU of the worker."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager


class _StoreBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Called by Ray Train's controller for each new group of workers. Follows _TorchBackend of Ray 2.60."""
        # Open the store in the process of rank 0 before any rank connects to it.
        host, port = worker_group.execute_single(0, open_store)
        workers = len(worker_group)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        # init_process_group returns when all ranks have joined, so start it on all of them before waiting.
        start = worker_group.execute_single_async
        ray.get([start(rank, _join_process_group, host, port, backend, rank, workers) for rank in range(workers)])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Called by Ray Train's controller at the end of a group of workers."""
        try:
            ray.get(worker_group.execute_async(_leave_process_group), timeout=SHUTDOWN_TIMEOUT_S)
        except GetTimeoutError:
            # Ray ends the processes anyway.
            return


def _join_process_group(host: str, port: int, backend: str, rank: int, workers: int) -> None:
    """Join the process group, in a worker. The controller, which pickles this function, does not import torch."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    _set_torch_distributed_env_vars()
    _set_master_address(host, port)
    _setup_torch_process_group(
        backend=backend,
        world_rank=rank,
        world_size=workers,
        init_method=format_url(host, port),
        timeout_s=TIMEOUT_S,
    )


def _leave_process_group() -> None:
    """Leave the process group, in a worker."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=True)


def _set_master_address(host: str, port: int) -> None:
    """Set the variables that libraries read, DeepSpeed among them."""
    os.environ["MASTER_ADDR"] = host
    os.environ["MASTER_PORT"] = str(port)


def open_store() -> tuple[str, int]:
    """Open a store in the process that will be rank 0, and return its host and port.

    PyTorch finds the store of its own process by the port and does not open another one (multi_tenant).
    """
    from torch._C._distributed_c10d import TCPStore

    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Bind a socket to the one address, and hand its file descriptor to the store.
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        listening.listen(1024)
        port = int(listening.getsockname()[1])
        store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listening.detach()
        )
    OPEN_STORES.append(store)
    return host, port


def format_url(host: str, port: int) -> str:
    """Return the init_method of torch.distributed for a store."""
    return f"tcp://{build_address(host, port)}"
