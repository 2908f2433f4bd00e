"""A stream of micro-batches from data nodes of which one dies; a script for test_data_nodes.py.

    python -m tests.pipelines.data_nodes FOLDER

The training node has no CPUs for readers. FOLDER contains the reader (reader.pickle). The samples of the stream are
printed as JSON, with the nodes that read them.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import cloudpickle
import ray
from ray.cluster_utils import Cluster

from pipelines.data import ingest
from pipelines.data.ingest import Reader, Segment
from tests.pipelines.cluster_day import FAST_HEALTH_CHECKS, power_off
from tests.pipelines.faults import wait_until

WORKERS = 2
EPOCHS = 300
"""Epochs that are read, more than readers without a limit have finished when the node dies."""

ENDLESS_EPOCHS = 100_000
"""Epochs of the stream: more than readers finish during the test, so that none becomes idle at its end."""


def log_node(encode: Callable[..., Any], log: Path) -> Callable[..., Any]:
    """Make an encoder that leaves a file for its node, and waits until two nodes have left one."""

    def encode_and_log(tokenizer: Any, sample: Any) -> Any:
        (log / ray.get_runtime_context().get_node_id()).touch()
        wait_until(lambda: len(list(log.iterdir())) >= 2)
        return encode(tokenizer, sample)

    return encode_and_log


def read_stream(cluster: Cluster, reader: Reader, log: Path) -> dict[str, Any]:
    """Read the first epochs of a stream on all ranks. A node that has read samples dies, and none replaces it."""
    per_batch = reader.order.global_batch_size // reader.micro_batch_size
    stop = reader.order.count_batches(ENDLESS_EPOCHS) * per_batch
    due = reader.order.count_batches(EPOCHS) * per_batch // WORKERS
    segment = Segment(replace(reader, encode=log_node(reader.encode, log)), 0, stop)
    streams = ingest.make_streams([segment], WORKERS)
    is_reading, is_killed = threading.Event(), threading.Event()

    def read(rank: int) -> list[dict[str, Any]]:
        found = []
        for batch in islice(ingest.read_stream(streams[rank]), due):
            found.append({name: batch[name].tolist() for name in ("source", "sample", "input_ids")})
            found[-1]["number"] = int(batch["number"])
            if rank == 0 and len(found) == 3:
                is_reading.set()
                assert is_killed.wait(timeout=240)
        return found

    with ThreadPoolExecutor(WORKERS) as pool:
        ranks = [pool.submit(read, rank) for rank in range(WORKERS)]
        assert is_reading.wait(timeout=400)
        # A node whose blocks nobody has read yet; the main thread does it, as Ray's nodes handle signals.
        node = min(cluster.worker_nodes, key=lambda node: node.node_id)
        power_off(node)
        cluster.worker_nodes.remove(node)
        is_killed.set()
        return {
            "ranks": [rank.result() for rank in ranks],
            "killed": node.node_id,
            "nodes": sorted(path.name for path in log.iterdir()),
        }


def main(folder: Path) -> None:
    reader = cloudpickle.loads((folder / "reader.pickle").read_bytes())
    log = folder / "nodes"
    log.mkdir()
    # Small blocks: many of them are on the way when the node dies.
    ingest.MAX_BLOCK_SAMPLES = 8
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": FAST_HEALTH_CHECKS},
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        (folder / "stream.json").write_text(json.dumps(read_stream(cluster, reader, log)))
    finally:
        for node in [cluster.head_node, *cluster.worker_nodes]:
            power_off(node)


if __name__ == "__main__":
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    main(Path(sys.argv[1]))
    # Threads still read the stream, from a cluster that is gone.
    sys.stdout.flush()
    os._exit(0)
