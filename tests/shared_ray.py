"""The Ray that the tests of a process share."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from tests import forks


@contextmanager
def start_ray(with_forks: bool) -> Iterator[Any]:
    """Start Ray on two CPUs for the length of a with block, and yield the module `ray`.

    Args:
        with_forks: workers are forks, which cannot use a GPU.
    """
    import ray

    from pipelines.core import cluster

    settings = {"num_cpus": 2, "include_dashboard": False, "configure_logging": False, "log_to_driver": False}
    with forks.use_forks() if with_forks else nullcontext():
        for attempt in range(3):
            with cluster.omit_services():
                try:
                    # address="local": a Ray that happens to run on the machine is not a test's to use.
                    ray.init(address="local", **settings)
                    break
                except Exception as error:  # Ray 2.60 gives up after 30 s on a busy machine
                    ray.shutdown()
                    if attempt == 2 or "timed out during startup" not in str(error):
                        raise
        yield ray
        ray.shutdown()
