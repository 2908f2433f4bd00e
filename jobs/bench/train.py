"""What Ray and checkpoints cost a step, what a fault costs, and the goodput of a large run that follows.

    python jobs/bench/train.py

One run has all of it, on a LLaVA of 8 million parameters whose step takes 0.6 s, two workers: the stage as it
is trained under Ray (checkpoints every 10 steps); the same loop under torchrun and DeepSpeed without Ray, its batches
made in the process; and the stage again with a worker killed by SIGKILL.  The result is printed and added to
driver.jsonl.

Steps are compared by their median, the first ones left out, in which readers still work beside the trainers.
"""

import argparse
import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.bench.record import append

STEPS, EVERY, KILLED, WARM = 60, 10, 35, 20
"""Of a run; between checkpoints; after which a worker is killed; left out of medians."""

NODES, HOURS = 1000, 3
"""Of the large run: nodes, and hours between two faults."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bare", metavar="FOLDER", help="what torchrun calls: the loop without Ray")
    arguments = parser.parse_args()
    if arguments.bare:
        bare(Path(arguments.bare))
        return
    from pipelines.core import cluster
    from pipelines.training import driver

    with tempfile.TemporaryDirectory() as folder:
        with cluster.session():
            plan = small(Path(folder))
            driver.train_stage(plan)
            killed = renamed(plan, "killed")
            at = killed.run / "killed-at"
            driver.train_stage(killed, [Kill(KILLED, at)])
        append(
            __file__, **measured(seconds(plan), by_torchrun(plan), events(plan), events(killed), float(at.read_text()))
        )


def small(folder: Path) -> Any:
    """The plan of a stage on images and texts of noise."""
    import numpy as np
    from PIL import Image

    from pipelines.data.options import Making
    from pipelines.data.shards import make
    from pipelines.training.plan import Plan
    from pipelines.training.stage import Stage
    from redux.architecture import LanguageSizes, ModelSettings, TowerSizes, count_image_tokens
    from redux.conversation import IMAGE_TOKEN, TEMPLATES, train_word_tokenizer

    noise = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number in range(64):
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [("human", f"{IMAGE_TOKEN}\nwhich is it?"), ("gpt", f"number {number} of all")]
        told = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": told})
    make(records, str(folder), str(folder / "set"), Making(samples_per_shard=16))
    template = TEMPLATES["vicuna_bare"]
    texts = ["".join(piece for piece, _ in template.split_spans(record["conversations"])) for record in records]
    train_word_tokenizer(texts, 512).save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 768}
    model = ModelSettings(
        tower=TowerSizes(image_size=64, patch_size=8, num_hidden_layers=6, **sizes),
        language=LanguageSizes(num_hidden_layers=6, **sizes),
    )
    stage = Stage(
        objective="language",
        data="set",
        template="vicuna_bare",
        steps=STEPS,
        global_batch_size=16,
        micro_batch_size=4,
        learning_rate={"tower": 1e-4, "projector": 1e-4, "language": 1e-4},
        save_steps=EVERY,
    )
    plan = Plan(
        name="stage",
        stage=stage,
        model=model,
        seed=0,
        workers=(2, 2),
        run=folder,
        checkpoints=str(folder / "checkpoints"),
        sets={"set": str(folder / "set")},
        tolerance=0,
        tokenizer=folder / "tokenizer",
        start=None,
        image_size=64,
        image_tokens=count_image_tokens(model),
    )
    return renamed(plan, "undisturbed")


def renamed(plan: Any, name: str) -> Any:
    """The plan of another run beside it."""
    run = plan.tokenizer.parent / name
    run.mkdir()
    return replace(plan, run=run, checkpoints=str(run / "checkpoints"))


@dataclass(frozen=True)
class Kill:
    """A hook: SIGKILL of rank 1 after a step, once; the file `at` then holds the time."""

    step: int
    at: Path

    def __call__(self, engine: Any, plan: Any) -> Any:
        from pipelines.training.hooks import Hook, Step

        kill = self

        class Now(Hook):
            def __call__(self, step: Step) -> None:
                if step.number == kill.step and engine.global_rank == 1 and not kill.at.exists():
                    kill.at.write_text(str(time.time()))
                    os.kill(os.getpid(), signal.SIGKILL)

        return Now()


def events(plan: Any) -> list[dict[str, Any]]:
    from pipelines.training import ledger

    return [json.loads(line) for line in (plan.run / ledger.FILE).read_text().splitlines()]


def seconds(plan: Any) -> list[float]:
    """Of each step after the first ones, apart from what it stood still for checkpoints."""
    steps = [event for event in events(plan) if event["event"] == "step"]
    pairs = zip(steps[WARM - 1 :], steps[WARM:], strict=False)
    return [after["at"] - before["at"] - after["stall_s"] for before, after in pairs]


def by_torchrun(plan: Any) -> list[float]:
    """The same steps in two processes of torchrun's."""
    folder = renamed(plan, "bare").run
    (folder / "plan.pickle").write_bytes(pickle.dumps(plan))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--bare", str(folder)]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "bare.json").read_text())


def bare(folder: Path) -> None:
    """A rank: the loop on batches that are made before it starts."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed as dist

    from pipelines.data.ingest import Batch, Reader
    from pipelines.training import driver, engine

    dist.init_process_group("gloo")

    def made(trained: Any, reader: Reader, done: int, stop: int, spare: bool) -> Iterator[Batch]:
        return iter([reader(turn * 2 + trained.global_rank) for turn in range(done, stop)])

    driver._batches = made
    plan = pickle.loads((folder / "plan.pickle").read_bytes())
    trained = engine.build(plan, 2)
    times = []
    for _ in driver.training_steps(trained, plan, plan.reader(), 0, STEPS, [], set()):
        times.append(time.time())
    if trained.global_rank == 0:
        (folder / "bare.json").write_text(
            json.dumps([after - before for before, after in zip(times[WARM - 1 :], times[WARM:], strict=False)])
        )


def measured(
    ours: list[float], without: list[float], undisturbed: list[dict[str, Any]], killed: list[dict[str, Any]], at: float
) -> dict[str, Any]:
    """The figures, printed too."""
    step, plain = statistics.median(ours), statistics.median(without)
    steps = [event for event in undisturbed if event["event"] == "step"]
    stalls = [event["stall_s"] for event in steps if event["step"] > WARM and (event["step"] - 1) % EVERY == 0]
    stall = statistics.median(stalls)
    fault = next(event for event in killed if event["event"] == "fault")
    start = next(event for event in killed if event["event"] == "start" and event["at"] > fault["at"])
    first = next(event for event in killed if event["event"] == "step" and event["at"] > start["at"])
    entered = start["at"] - start["restore_s"]
    spans = {
        "detection": fault["at"] - at,
        "start": entered - fault["at"],
        "restore": start["restore_s"],
        "first_batch_and_step": first["at"] - start["at"],
    }
    recovery = sum(spans.values())
    # per fault: half an interval is lost, and the recovery; an interval costs a stall.  The interval that loses least
    # is that of Young (1974): sqrt(2 x stall x time between faults)
    between = HOURS * 3600
    interval = max((2 * stall * between) ** 0.5, step)
    predicted = 1 - stall / interval - (interval / 2 + recovery) / between
    print(f"step: {step:.3f} s under Ray, {plain:.3f} s under torchrun: {step / plain:.3f}")
    print(f"checkpoint: {stall:.3f} s of standing still, {stall / step:.2f} steps")
    print("SIGKILL to next step: " + ", ".join(f"{name} {span:.1f} s" for name, span in spans.items()))
    print(
        f"{NODES} nodes with one fault in {HOURS} h: with a checkpoint every {interval:.0f} s, "
        f"goodput = 1 - {stall:.2f} / {interval:.0f} - ({interval:.0f} / 2 + {recovery:.1f}) / {between} "
        f"= {predicted:.4f}"
    )
    return {
        "step_s": round(step, 4),
        "torchrun_step_s": round(plain, 4),
        "ratio": round(step / plain, 4),
        "stall_s": round(stall, 4),
        "stall_steps": round(stall / step, 3),
        "recovery_s": {name: round(span, 2) for name, span in spans.items()},
        "goodput": round(predicted, 4),
    }


if __name__ == "__main__":
    main()
