"""Measure how a stage is fed: a set of 100 million samples in a bucket, and machines with CPUs only.

    python jobs/bench/feeding.py

    open-*    A process opens a set of so many samples in a bucket, describes the blocks of an epoch, and makes the
              first micro-batch. The time is that of its CPU, the memory what it takes above its imports.
    start     Seconds from the start of a stage to its first micro-batch of 16 photos at 336 pixels, in a Ray that runs:
              three stages after each other, each with readers of its own. The samples lie in shards on this machine.
    nodes     One training node without CPUs for readers, and data nodes of one CPU each, all on this machine. The
              bucket answers after a latency that is long against the work on a sample, so that readers wait and the
              cores of this machine are not the limit: what is measured is the coordination of the nodes. One stream
              runs all the time while nodes are added. At the end a node is killed. Micro-batches are checked to be
              those of the order, each once.

The bucket is simulated (simulated_bucket.py). The script prints the results and appends them to feeding.jsonl.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from tokenizers import Tokenizer

from jobs.bench.record import add_out_option, append_record
from jobs.bench.simulated_bucket import SET_URL, serve_bucket, simulate_set
from pipelines.data import ingest
from pipelines.data.ingest import Batch, Reader, Segment, make_conversation_encoder
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.data.shard_writer import make_shards
from pipelines.data.text_tokenizer import TextTokenizer, load_text_tokenizer
from redux.conversation import IMAGE_TOKEN, TEMPLATES, train_word_tokenizer

OPENED_SAMPLES = (1_280_000, 12_800_000, 102_400_000)
OPEN_BATCH, OPEN_WORKERS = 16, 8

START_STAGES, START_SAMPLES, START_MICRO_BATCHES = 3, 640, 40

NODE_COUNTS = (1, 2, 4)
NODE_IMAGE_SIZE, NODE_BATCH, NODE_SAMPLES = 32, 16, 160_000

OPEN_PROGRAM = "from jobs.bench.feeding import open_set; open_set()"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="open,start,nodes", help="default: %(default)s")
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=OPENED_SAMPLES,
        help="of the opened sets, default: %(default)s",
    )
    parser.add_argument("--latency-s", type=float, default=0.5, help="of the bucket of the nodes, default: %(default)s")
    parser.add_argument("--micro-batches", type=int, default=24, help="of each node, default: %(default)s")
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    measured: dict[str, Any] = {"load": [round(value, 1) for value in os.getloadavg()]}
    with tempfile.TemporaryDirectory(prefix="feed-", dir="/tmp") as folder:
        tokenizer = Path(folder, "tokenizer")
        train_word_tokenizer(["photo"], 32).save_pretrained(tokenizer)
        if "open" in parts:
            measured["open"] = [measure_open(samples, Path(folder)) for samples in arguments.samples]
        if "start" in parts:
            measured["start"] = measure_start(Path(folder))
        if "nodes" in parts:
            measured["nodes"] = measure_nodes(Path(folder), arguments.latency_s, arguments.micro_batches)
    append_record(arguments.out, versions={"ray": ray.__version__}, **measured)


def build_reader(shards: Shards, tokenizer: Path, text: TextTokenizer, image_size: int, batch: int) -> Reader:
    """Build a reader of a set, with rows of a few words."""
    return Reader(
        sources={"simulated": shards},
        order=Order(samples=(len(shards),), global_batch_size=batch * OPEN_WORKERS, seed=0),
        micro_batch_size=batch,
        image_size=image_size,
        tokenizer=tokenizer,
        encode=make_conversation_encoder(TEMPLATES["plain"], image_tokens=1),
        text_tokenizer=text,
    )


# --- a large set ------------------------------------------------------------------------------------------------------


def measure_open(samples: int, folder: Path) -> dict[str, float]:
    """Measure the first micro-batch of a new process from a set of so many samples."""
    from jobs.bench.pixels import make_photo  # Imports torch, which readers do not

    files = simulate_set((make_photo(0), "photo"), samples)
    # The text of the tokenizer is loaded here, since the readers of a stage get it, too.
    text = load_text_tokenizer(folder / "tokenizer")
    assert text
    inputs = {"tokenizer": str(folder / "tokenizer"), "text": {**vars(text), "backend": text.backend.to_str()}}
    with serve_bucket(files) as bucket:
        command, environment = [sys.executable, "-c", OPEN_PROGRAM], os.environ | bucket.environment
        output = subprocess.run(
            command, input=json.dumps(inputs), stdout=subprocess.PIPE, check=True, text=True, env=environment
        ).stdout
        traffic = {"requests": bucket.requests, "megabytes": round(bucket.bytes_sent / 1e6, 2)}
    measured = {"samples": samples, **json.loads(output), **traffic}
    print(
        f"{samples:11,} samples: first micro-batch after {measured['cpu_s']:.2f} s of CPU, "
        f"{measured['wall_s']:.1f} s, {measured['memory_mb']:.0f} MB above {measured['imports_mb']:.0f} MB of imports, "
        f"{traffic['requests']} requests, {traffic['megabytes']} MB",
        flush=True,
    )
    return measured


def open_set() -> None:
    """Open the simulated set, describe the blocks of an epoch and make a micro-batch; print what it took."""
    importlib.import_module("s3fs")  # Counted as an import

    inputs = json.load(sys.stdin)
    text = TextTokenizer(**{**inputs["text"], "backend": Tokenizer.from_str(inputs["text"]["backend"])})
    Path("/proc/self/clear_refs").write_text("5")  # Linux resets the peak
    imports = read_peak_mb()
    cpu, wall = time.process_time(), time.perf_counter()
    reader = build_reader(Shards(SET_URL), Path(inputs["tokenizer"]), text, 336, OPEN_BATCH)
    reader.fingerprint_sources()
    stop = reader.order.count_batches(1) * OPEN_WORKERS
    blocks = ingest.BlockSequence([Segment(reader, 0, stop).lay_out_blocks(OPEN_WORKERS)])
    blocks[len(blocks) - 1]
    blocks_cpu_s = time.process_time() - cpu
    reader(0)
    measured = {
        "blocks": len(blocks),
        "before_batch_cpu_s": blocks_cpu_s,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "imports_mb": imports,
        "memory_mb": read_peak_mb() - imports,
    }
    print(json.dumps({name: round(value, 3) for name, value in measured.items()}))


def read_peak_mb() -> float:
    """Read the peak memory of this process."""
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024 / 1e6


# --- the start of a stage ---------------------------------------------------------------------------------------------


def measure_start(folder: Path) -> list[float]:
    """Measure the seconds to the first micro-batch of each of START_STAGES stages, which have readers of their own."""
    from jobs.bench.pixels import make_photo
    from pipelines.core import cluster  # The private Ray of a run

    images = folder / "photos"
    images.mkdir()
    for number in range(START_SAMPLES):
        (images / f"{number}.jpg").write_bytes(make_photo(number))
    records = [
        {
            "id": number,
            "image": f"{number}.jpg",
            "conversations": [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": "photo"}],
        }
        for number in range(START_SAMPLES)
    ]
    text = load_text_tokenizer(folder / "tokenizer")
    assert text
    measured = []
    with cluster.open_session():
        make_shards(records, str(images), str(folder / "shards"), ShardOptions())
        shards = Shards(folder / "shards")
        ingest.start_shared_actors()  # As the workers of a run do before their first stage
        await_idle()
        for stage in range(START_STAGES):
            start = time.perf_counter()
            reader = build_reader(shards, folder / "tokenizer", text, 336, OPEN_BATCH)
            [stream] = ingest.make_streams([Segment(reader, 0, START_MICRO_BATCHES)], workers=1)
            batches = check_order(ingest.read_stream(stream, prefetched_blocks=4))
            next(batches)
            seconds = time.perf_counter() - start
            print(f"stage {stage + 1}: first micro-batch after {seconds:.2f} s", flush=True)
            measured.append(round(seconds, 2))
            for _ in batches:  # To the end, so that the readers end before the next stage
                pass
            await_idle()
    return measured


def await_idle() -> None:
    """Wait until the processes below this one use less than a tenth of a core for a second."""
    while True:
        start_s = measure_children_cpu()
        time.sleep(1)
        if measure_children_cpu() - start_s < 0.1:
            return


def measure_children_cpu() -> float:
    """Measure the CPU seconds of the processes below this one."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


# --- data nodes -------------------------------------------------------------------------------------------------------


def mark_node(encode: Callable[..., Any], marks: Path) -> Callable[..., Any]:
    """Make an encoder that creates a file named after its node."""

    def encode_and_mark(tokenizer: Any, sample: Any) -> Any:
        (marks / ray.get_runtime_context().get_node_id()).touch()
        return encode(tokenizer, sample)

    return encode_and_mark


def measure_nodes(folder: Path, latency_s: float, micro_batches: int) -> dict[str, Any]:
    """Measure samples/s of one stream while data nodes are added, and kill one of them at the end."""
    from jobs.bench.pixels import make_photo

    files = simulate_set((make_photo(0, 64, 48), "photo"), NODE_SAMPLES)
    marks = folder / "marks"
    marks.mkdir()
    with serve_bucket(files, latency_s) as bucket:
        os.environ.update(bucket.environment)  # Nodes and readers inherit it
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 500 * 10**6},
        )
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            text = load_text_tokenizer(folder / "tokenizer")
            assert text
            reader = build_reader(Shards(SET_URL), folder / "tokenizer", text, NODE_IMAGE_SIZE, NODE_BATCH)
            object.__setattr__(reader, "encode", mark_node(reader.encode, marks))
            return _run_nodes(cluster, reader, marks, micro_batches)
        finally:
            ray.shutdown()
            cluster.shutdown()


def _run_nodes(cluster: Cluster, reader: Reader, marks: Path, micro_batches: int) -> dict[str, Any]:
    stop = reader.order.count_batches(1) * OPEN_WORKERS
    [stream] = ingest.make_streams([Segment(reader, 0, stop)], workers=1)
    batches = check_order(ingest.read_stream(stream))
    rates: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for count in NODE_COUNTS:
        while len(cluster.worker_nodes) < count:
            cluster.add_node(num_cpus=1, object_store_memory=200 * 10**6)
        # Until all nodes have worked, and their blocks arrive.
        while len(list(marks.iterdir())) < count:
            next(batches)
        for _ in range(micro_batches):
            next(batches)
        start = time.perf_counter()
        start_cpu_s = measure_cpu(cluster)
        for _ in range(count * micro_batches):
            next(batches)
        seconds = time.perf_counter() - start
        rates[str(count)] = round(count * micro_batches * NODE_BATCH / seconds, 2)
        cpu[str(count)] = round((measure_cpu(cluster) - start_cpu_s) / seconds, 3)
        print(
            f"{count} data nodes: {rates[str(count)]:.1f} samples/s, {rates[str(count)] / rates['1'] / count:.2f} of "
            f"linear; the training node uses {cpu[str(count)]:.0%} of a core",
            flush=True,
        )
    killed = min(cluster.worker_nodes, key=lambda node: node.node_id)
    kill_node(killed)
    cluster.worker_nodes.remove(killed)
    for _ in range(4 * micro_batches):
        next(batches)
    print("a killed node cost no micro-batch: all came in their order", flush=True)
    return {"samples_per_s": rates, "training_node_cores": cpu, "micro_batches_after_kill": 4 * micro_batches}


def check_order(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield micro-batches. RuntimeError if one is not the next one."""
    for number, batch in enumerate(batches):
        if batch["number"] != number:
            raise RuntimeError(f"got micro-batch {batch['number']}, allowed: {number}")
        yield batch


def list_node_processes(node: Any) -> list[psutil.Process]:
    """List the processes of a Ray node, with its workers."""
    parents = [psutil.Process(entry.process.pid) for kind in node.all_processes.values() for entry in kind]
    return parents + [child for parent in parents for child in parent.children(recursive=True)]


def measure_cpu(cluster: Cluster) -> float:
    """Measure the CPU seconds of the training node's processes that serve data: Ray's daemons and the coordinator."""
    total = 0.0
    for process in list_node_processes(cluster.head_node):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def kill_node(node: Any) -> None:
    """Send SIGKILL to all processes of a node."""
    processes = list_node_processes(node)
    # All are suspended first: one that sees another one die would report it, unlike after a power failure.
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                act(process)
    psutil.wait_procs(processes)


if __name__ == "__main__":
    main()
