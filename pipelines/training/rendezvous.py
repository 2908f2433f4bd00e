"""Rendezvous of the workers of a stage: PyTorch's store, at the address by which Ray knows the machine of rank 0.

PyTorch's own store listens on every address of the machine. The store has no password, and anyone who writes to it
tells workers which address to connect to and which bytes to unpickle. So this store listens on one address only.
"""

import os
import socket
from typing import Any

import ray
from ray._common.network_utils import build_address
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from torch._C._distributed_c10d import TCPStore

OPEN_STORES: list[TCPStore] = []
"""Stores of the process of rank 0. A store closes with its last reference."""


class Rendezvous(TorchConfig):
    """Configuration of TorchTrainer that sets up process groups with a store on one address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _StoreBackend


class _StoreBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Called by Ray Train's controller for each new group of workers. Follows _TorchBackend of Ray 2.60."""
        # Open the store in the process of rank 0 before any rank connects to it.
        host, port = worker_group.execute_single(0, open_store)
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_set_master_address, host=host, port=port)
        workers = len(worker_group)
        arguments = {
            "backend": "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo",
            "world_size": workers,
            "init_method": format_url(host, port),
            "timeout_s": backend_config.timeout_s,
        }
        # init_process_group returns when all ranks have joined, so start it on all of them before waiting.
        start = worker_group.execute_single_async
        ray.get([start(rank, _setup_torch_process_group, world_rank=rank, **arguments) for rank in range(workers)])


def _set_master_address(host: str, port: int) -> None:
    """Set the variables that libraries read, DeepSpeed among them."""
    os.environ["MASTER_ADDR"] = host
    os.environ["MASTER_PORT"] = str(port)


def open_store() -> tuple[str, int]:
    """Open a store in the process that will be rank 0, and return its host and port.

    PyTorch finds the store of its own process by the port and does not open another one (multi_tenant).
    """
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
