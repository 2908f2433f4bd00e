"""Where the workers of a stage meet: PyTorch's store, at the one address by which Ray knows rank 0's machine.

PyTorch itself would have it listen on every address of the machine.  The store asks for no password, and who writes
there tells workers whom to connect to and what to unpickle.
"""

import os
import socket
from typing import Any

import ray
from ray._common.network_utils import build_address
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from torch._C._distributed_c10d import TCPStore

OPENED: list[TCPStore] = []
"""In rank 0's process; a store ends with its last reference."""


class Rendezvous(TorchConfig):
    """What TorchTrainer is to set process groups up by."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Called by Ray Train's controller."""
        host, port = worker_group.execute_single(0, opened)
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_tell, host=host, port=port)
        workers = len(worker_group)
        told = {
            "backend": "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo",
            "world_size": workers,
            "init_method": url(host, port),
            "timeout_s": backend_config.timeout_s,
        }
        meet = worker_group.execute_single_async
        ray.get([meet(rank, _setup_torch_process_group, world_rank=rank, **told) for rank in range(workers)])


def _tell(host: str, port: int) -> None:
    """Libraries read it, DeepSpeed among them."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)


def opened() -> tuple[str, int]:
    """Open a store in this process, for the process group whose rank 0 it will be; returns its host and port.

    PyTorch then finds it by its port instead of opening another.
    """
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        listening.listen(1024)
        port = int(listening.getsockname()[1])
        store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listening.detach()
        )
    OPENED.append(store)
    return host, port


def url(host: str, port: int) -> str:
    return f"tcp://{build_address(host, port)}"
