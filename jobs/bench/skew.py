"""Train ranks whose micro-batches have 0, 1 or 4 images, and measure the share of a token of a blank image.

    python jobs/bench/skew.py

A micro-batch of text alone encodes the first token of a blank image, so that its rank runs all modules of the image
tower and has their gradients, zeros. The share of that pass is measured with one thread in CPU time, in turns with a
whole blank image and with none, on the model of the quickstart.

Then three ranks train 1,000 steps at each ZeRO stage. Each rank draws its number of images in each step, and every
tenth step is text alone on all ranks. ZeRO 3 keeps no parameter whole, so each module is gathered. The script prints
the result and appends it to skew.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.bench.record import add_out_option, append_record

if TYPE_CHECKING:
    from pipelines.data.ingest import Batch
    from pipelines.training.engine import LlavaWithLoss
    from pipelines.training.plan import StagePlan

SKEWED_RANKS, ROWS, ROW_WORDS, REPEATS = 3, 4, 30, 30
IMAGE_COUNTS = (0, 1, 4)
TEXT_STEP = 10
"""Every so many steps, all ranks have text alone."""

WORDS = [f"word{number}" for number in range(200)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps at each ZeRO stage, default: %(default)s")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # Of a rank that torchrun starts
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=0, help=argparse.SUPPRESS)
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    if arguments.folder:
        train_rank(build_plan(arguments.folder, arguments.steps, arguments.zero_stage), arguments.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder)
        plan = build_plan(folder, arguments.steps)
        shares = {
            "tower trained": measure_passes(plan, is_trained=True),
            "tower frozen": measure_passes(plan, is_trained=False),
        }
        for kind, passes in shares.items():
            print(f"{kind}: " + ", ".join(f"{key} {value:.4g}" for key, value in passes.items()), flush=True)
        runs = {}
        for zero_stage in (0, 1, 2, 3):
            runs[f"ZeRO {zero_stage}"] = train_by_torchrun(folder, arguments.steps, zero_stage)
            print(f"ZeRO {zero_stage}: {runs[f'ZeRO {zero_stage}']}", flush=True)
    append_record(arguments.out, steps=arguments.steps, ranks=SKEWED_RANKS, text_rank=shares, runs=runs)


def train_tokenizer(folder: Path) -> None:
    """Train the tokenizer of the words of all batches, which ranks read."""
    from redux.conversation import train_word_tokenizer

    train_word_tokenizer([" ".join(WORDS)], 512).save_pretrained(folder / "tokenizer")


def build_plan(folder: Path, steps: int, zero_stage: Any = 0) -> "StagePlan":
    """Build the plan of a stage with the model of the quickstart; the folder has its tokenizer."""
    from pipelines.training.plan import StagePlan
    from pipelines.training.stage import Stage
    from redux.architecture import LanguageSizes, ModelSettings, TowerSizes, count_image_tokens
    from redux.settings import CMAI, VMTC

    # The sizes of jobs/recipes/quickstart.yaml.
    tower = {"hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 192}
    language = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 352}
    model = ModelSettings(
        tower=TowerSizes(image_size=64, patch_size=8, **tower),
        language=LanguageSizes(**language),
        vmtc=VMTC(ratio=0.5, stages=3, iterations=4),
        cmai=CMAI(gamma_max=0.6),
    )
    stage = Stage(
        objective="language",
        data="set",
        steps=steps,
        global_batch_size=ROWS * SKEWED_RANKS,
        micro_batch_size=ROWS,
        learning_rate={"tower": 1e-4, "projector": 1e-4, "language": 1e-4},
        zero_stage=zero_stage,
    )
    return StagePlan(
        name="stage",
        stage=stage,
        model=model,
        seed=0,
        workers=(SKEWED_RANKS, SKEWED_RANKS),
        run=folder,
        checkpoints=str(folder),
        sets={},
        max_bad_fraction=0,
        tokenizer=folder / "tokenizer",
        start=None,
        image_size=64,
        image_tokens=count_image_tokens(model),
    )


def make_batch(plan: "StagePlan", number: int, images: int, image_id: int) -> "Batch":
    """Make a micro-batch of random words as `ingest.Reader` does, of which the first rows have images."""
    from pipelines.data.ingest import pad_columns

    rng = np.random.default_rng((number, images))
    rows = []
    for row in range(ROWS):
        words = rng.integers(image_id + 1, image_id + len(WORDS), ROW_WORDS)
        ids = np.concatenate([np.full(plan.image_tokens * (row < images), image_id), words])
        rows.append({"input_ids": ids, "labels": np.where(ids == image_id, -100, ids)})
    size = (images, plan.image_size, plan.image_size, 3)
    return {"number": number, "pixel_values": rng.integers(0, 256, size, dtype=np.uint8), **pad_columns(rows, 0)}


def measure_passes(plan: "StagePlan", is_trained: bool) -> dict[str, float]:
    """Measure forward and backward passes of a micro-batch in milliseconds of CPU; medians.

    Returns:
        images: with four images. text, whole_image, no_tower: text alone, with the first token of a blank image, with
        all of its tokens, and without the tower. share, whole_image_share: share of the first two of these that the
        tower takes.
    """
    import torch

    from pipelines.training import engine

    torch.set_num_threads(1)
    module, parts = engine.build_module(plan)
    assert isinstance(module, engine.LlavaWithLoss)
    stage = plan.stage if is_trained else replace(plan.stage, learning_rate={"projector": 1e-4, "language": 1e-4})
    engine.select_trained(module, parts, stage)
    times: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        for kind in ("images", "text", "whole_image", "no_tower"):
            times.setdefault(kind, []).append(measure_pass(plan, module, kind))
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    shares = {
        name: 1 - medians["no_tower"] / medians[kind]
        for name, kind in (("share", "text"), ("whole_image_share", "whole_image"))
    }
    return {name: round(value, 3) for name, value in {**medians, **shares}.items()}


def measure_pass(plan: "StagePlan", module: "LlavaWithLoss", kind: str) -> float:
    """Measure one pass of a kind of `measure_passes`."""
    from types import SimpleNamespace
    from unittest.mock import patch

    import torch

    from pipelines.training.engine import move_to_device
    from redux.model import ReduxModel

    batch = make_batch(plan, 0, ROWS if kind == "images" else 0, module.llava.config.image_token_index)
    engine: Any = SimpleNamespace(module=module, device=torch.device("cpu"))
    tensors = move_to_device(batch, engine)
    if kind == "no_tower":
        del tensors["pixel_values"]
    encode = ReduxModel.encode_images
    start = time.process_time()
    if kind == "whole_image":
        with patch.object(ReduxModel, "encode_images", lambda model, pixels, first_token_only: encode(model, pixels)):
            loss = module(**tensors, weight=torch.full((ROWS,), 1e-3))
    else:
        loss = module(**tensors, weight=torch.full((ROWS,), 1e-3))
    loss.backward()
    milliseconds = 1000 * (time.process_time() - start)
    module.zero_grad()
    return milliseconds


def train_by_torchrun(folder: Path, steps: int, zero_stage: int) -> dict[str, Any]:
    """Train the stage in processes of torchrun, and return what rank 0 measured."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SKEWED_RANKS}", __file__]
    options = ["--folder", str(folder), "--steps", str(steps), "--zero-stage", str(zero_stage)]
    subprocess.run([sys.executable, *launch, *options], check=True, stdout=subprocess.DEVNULL)
    measured: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return measured


def draw_image_counts(steps: int) -> Iterator[list[int]]:
    """Draw the number of images of each rank, step by step."""
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        counts: list[int] = rng.choice(IMAGE_COUNTS, SKEWED_RANKS).tolist()
        yield [0] * SKEWED_RANKS if step % TEXT_STEP == 0 else counts


def train_rank(plan: "StagePlan", steps: int) -> None:
    """Train this rank of torchrun, and write the seconds of all steps."""
    # DeepSpeed reads this variable when it is imported.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from unittest.mock import patch

    import torch.distributed as dist

    from pipelines.training import engine, worker
    from pipelines.training.plan import LearningRateSchedule

    dist.init_process_group("gloo")
    config = engine.make_config(plan)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with patch.object(engine, "make_config", lambda plan: config):
        deepspeed_engine = engine.build_engine(plan, SKEWED_RANKS)
    rank = deepspeed_engine.global_rank
    module: Any = deepspeed_engine.module
    image_id = module.llava.config.image_token_index
    schedule = LearningRateSchedule(steps, plan.stage.warmup_ratio)
    losses: list[float] = []
    skewed = 0
    start, start_cpu = time.perf_counter(), time.process_time()
    for number, counts in enumerate(draw_image_counts(steps), start=1):
        # Each rank has its own number of images in a step.
        engine.set_learning_rate(deepspeed_engine, schedule, number)
        batch = make_batch(plan, number * SKEWED_RANKS + rank, counts[rank], image_id)
        update = worker.train_global_batch(deepspeed_engine, plan, [batch])
        losses.append(worker.all_reduce_stats({"loss": update.loss}, deepspeed_engine.device)["loss"])
        skewed += len(set(counts)) > 1
    measured = {
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time() - start_cpu, 1),
        "skewed_steps": skewed,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }
    if rank == 0:
        (plan.run / "result.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
