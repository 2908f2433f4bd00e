"""Data nodes: machines without GPUs read for a training node, and the death of one changes no micro-batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

from pipelines.data.ingest import Reader, make_conversation_encoder
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from redux.conversation import TEMPLATES
from tests.pipelines.data_nodes import EPOCHS, WORKERS


@pytest.mark.slow
def test_a_data_node_that_dies_costs_no_sample_and_changes_no_order(
    stored: Shards,
    tokenizer: Path,
    short_folder: Path,
) -> None:
    order = Order(samples=(len(stored),), global_batch_size=8, seed=3)
    reader = Reader(
        sources={"set": stored},
        order=order,
        micro_batch_size=2,
        image_size=16,
        tokenizer=tokenizer,
        encode=make_conversation_encoder(TEMPLATES["vicuna_bare"], 2),
    )
    (short_folder / "reader.pickle").write_bytes(cloudpickle.dumps(reader))
    for name in ("tmp", "ray"):
        (short_folder / name).mkdir()
    folders = {"TMPDIR": str(short_folder / "tmp"), "RAY_TMPDIR": str(short_folder / "ray")}
    command = [sys.executable, "-m", "tests.pipelines.data_nodes", str(short_folder)]
    with (short_folder / "output.txt").open("w") as output:
        code = subprocess.run(command, env=os.environ | folders, stdout=output, stderr=output, timeout=500).returncode
    assert code == 0, (short_folder / "output.txt").read_text()[-4000:]
    found = json.loads((short_folder / "stream.json").read_text())
    assert found["killed"] in found["nodes"], "it had read samples"
    # All micro-batches of all ranks, in their order, as one reader computes them.
    numbers = order.count_batches(EPOCHS) * 4
    for rank, batches in enumerate(found["ranks"]):
        expected = [reader(number) for number in range(rank, numbers, WORKERS)]
        assert [batch["number"] for batch in batches] == [batch["number"] for batch in expected]
        for name in ("source", "sample", "input_ids"):
            assert [batch[name] for batch in batches] == [batch[name].tolist() for batch in expected]
    used = [sample for pair in zip(*found["ranks"], strict=True) for batch in pair for sample in batch["sample"]]
    epochs = [used[start : start + len(stored)] for start in range(0, EPOCHS * len(stored), len(stored))]
    assert all(sorted(epoch) == list(range(len(stored))) for epoch in epochs)
