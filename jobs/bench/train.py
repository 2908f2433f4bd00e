"""Measure the cost per step of Ray and checkpoints and the cost of a fault; compute the goodput of a large run.

    python jobs/bench/train.py

All of it is measured with two workers on a LLaVA of 8 million parameters, whose step takes 0.6 s: the stage under Ray
with a checkpoint every 10 steps; the same loop under torchrun and DeepSpeed without Ray, with micro-batches that are
read before the loop; and the stage again with a worker killed by SIGKILL. The script prints the result and appends it
to train.jsonl.

Steps are compared by their median. The first ones are left out, because readers still work beside the trainers then.
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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.bench.record import add_out_option, append_record

if TYPE_CHECKING:
    from pipelines.training.engine import DeepSpeedEngineProtocol
    from pipelines.training.hooks import Hook
    from pipelines.training.plan import StagePlan
    from redux.settings import TemplateName

TEMPLATE: "TemplateName" = "vicuna_bare"
"""Conversation template of the stage."""

NODES = 1000
"""Nodes of the large run."""

HOURS_BETWEEN_FAULTS = 3
"""Mean time between two faults of the large run."""


@dataclass(frozen=True)
class RunSteps:
    """Steps of a run, in the proportions of 60: a checkpoint every 10, a kill after 35, a warm-up of 20.

    Args:
        total: all steps.
    """

    total: int

    @property
    def save(self) -> int:
        """Steps between checkpoints."""
        return self.total // 6

    @property
    def killed(self) -> int:
        """Step after which a worker is killed: between two checkpoints."""
        return self.total * 7 // 12

    @property
    def warmup(self) -> int:
        """First steps, which are left out of medians."""
        return self.total // 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of a run, at least 6, default: %(default)s")
    parser.add_argument("--bare", metavar="FOLDER", help="called by torchrun: run the loop without Ray")
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    if arguments.steps < 6:
        parser.error(f"--steps: got {arguments.steps}, allowed: at least 6")
    if arguments.bare:
        train_without_ray(Path(arguments.bare))
        return
    from pipelines.core import cluster
    from pipelines.training import driver

    # Train the same stage twice under Ray: undisturbed, and with a killed worker. Then once without Ray, after the
    # cluster has ended, so that its processes take no CPU.
    with tempfile.TemporaryDirectory() as folder:
        with cluster.open_session():
            make_data(Path(folder))
            plan = build_plan(Path(folder), RunSteps(arguments.steps))
            driver.train_stage(plan)
            killed_plan = move_run(plan, "killed")
            kill_time_file = killed_plan.run / "killed-at"
            driver.train_stage(killed_plan, [KillWorker(RunSteps(arguments.steps).killed, kill_time_file)])
        append_record(
            arguments.out,
            **summarize(
                RunSteps(arguments.steps),
                measure_steps(plan),
                train_by_torchrun(plan),
                read_events(plan),
                read_events(killed_plan),
                float(kill_time_file.read_text()),
            ),
        )


def make_data(folder: Path) -> None:
    """Make the set of the stage, 64 images of random noise in shards of 16, and a tokenizer of its words."""
    import numpy as np
    from PIL import Image

    from pipelines.data.options import ShardOptions
    from pipelines.data.shard_writer import make_shards
    from redux.conversation import IMAGE_TOKEN, TEMPLATES, train_word_tokenizer

    noise = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number in range(64):
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        conversation = [
            {"from": "human", "value": f"{IMAGE_TOKEN}\nwhich is it?"},
            {"from": "gpt", "value": f"number {number} of all"},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    make_shards(records, str(folder), str(folder / "set"), ShardOptions(samples_per_shard=16))
    template = TEMPLATES[TEMPLATE]
    texts = ["".join(piece for piece, _ in template.split_spans(record["conversations"])) for record in records]
    train_word_tokenizer(texts, 512).save_pretrained(folder / "tokenizer")


def build_plan(folder: Path, steps: RunSteps) -> "StagePlan":
    """Build the plan of a stage that trains all parts, on the data of `make_data` in the folder."""
    from pipelines.training.plan import StagePlan
    from pipelines.training.stage import Stage
    from redux.architecture import LanguageSizes, ModelSettings, TowerSizes, count_image_tokens

    # A model whose steps are long enough to be compared.
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 768}
    model = ModelSettings(
        tower=TowerSizes(image_size=64, patch_size=8, num_hidden_layers=6, **sizes),
        language=LanguageSizes(num_hidden_layers=6, **sizes),
    )
    stage = Stage(
        objective="language",
        data="set",
        template=TEMPLATE,
        steps=steps.total,
        global_batch_size=16,
        micro_batch_size=4,
        learning_rate={"tower": 1e-4, "projector": 1e-4, "language": 1e-4},
        save_steps=steps.save,
    )
    plan = StagePlan(
        name="stage",
        stage=stage,
        model=model,
        seed=0,
        workers=(2, 2),
        run=folder,
        checkpoints=str(folder / "checkpoints"),
        sets={"set": str(folder / "set")},
        max_bad_fraction=0,
        tokenizer=folder / "tokenizer",
        start=None,
        image_size=64,
        image_tokens=count_image_tokens(model),
    )
    return move_run(plan, "undisturbed")


def move_run(plan: "StagePlan", name: str) -> "StagePlan":
    """Return the plan with a new run folder beside its tokenizer."""
    run = plan.tokenizer.parent / name
    run.mkdir()
    return replace(plan, run=run, checkpoints=str(run / "checkpoints"))


@dataclass(frozen=True)
class KillWorker:
    """Factory of a hook that kills rank 1 after a step, once, and writes the time into a file."""

    step: int
    time_file: Path

    def __call__(self, engine: "DeepSpeedEngineProtocol", plan: "StagePlan") -> "Hook":
        from pipelines.training.hooks import Hook, StepResult

        kill = self

        class KillHook(Hook):
            def on_step_end(self, step: StepResult) -> None:
                if step.number == kill.step and engine.global_rank == 1 and not kill.time_file.exists():
                    kill.time_file.write_text(str(time.time()))
                    os.kill(os.getpid(), signal.SIGKILL)

        return KillHook()


def read_events(plan: "StagePlan") -> list[dict[str, Any]]:
    """Read the events of the run's ledger."""
    from pipelines.training import ledger

    return [json.loads(line) for line in (plan.run / ledger.LEDGER_FILE).read_text().splitlines()]


def measure_steps(plan: "StagePlan") -> list[float]:
    """Return the seconds of each step after the warm-up, without its pause for a checkpoint."""
    steps = [event for event in read_events(plan) if event["event"] == "step"]
    assert plan.stage.steps
    warmup = RunSteps(plan.stage.steps).warmup
    # From the end of a step to the end of the next, because Ray's part lies between them.
    pairs = zip(steps[warmup - 1 :], steps[warmup:], strict=False)
    return [step["at"] - previous["at"] - step["stall_s"] for previous, step in pairs]


def train_by_torchrun(plan: "StagePlan") -> list[float]:
    """Run the same steps in two processes of torchrun, and return the seconds of each step after the warm-up."""
    folder = move_run(plan, "bare").run
    (folder / "plan.pickle").write_bytes(pickle.dumps(plan))
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--bare", str(folder)]
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "bare.json").read_text())


def train_without_ray(folder: Path) -> None:
    """Run the training loop in this rank of torchrun, on micro-batches that are read before it starts."""
    # DeepSpeed reads this variable when it is imported.
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed as dist

    from pipelines.training.engine import build_engine
    from pipelines.training.worker import run_training_steps

    dist.init_process_group("gloo")
    plan = pickle.loads((folder / "plan.pickle").read_bytes())
    steps = RunSteps(plan.stage.steps)
    engine = build_engine(plan, 2)
    # All batches are read before, so that this loop waits for no data.
    reader, accumulation_steps = plan.build_reader(), plan.stage.count_accumulation_steps(2)
    batches = iter([reader(turn * 2 + engine.global_rank) for turn in range(steps.total * accumulation_steps)])
    times = []
    for _ in run_training_steps(engine, plan, batches, 0, steps.total, [], set()):
        times.append(time.time())
    if engine.global_rank == 0:
        pairs = zip(times[steps.warmup - 1 :], times[steps.warmup :], strict=False)
        (folder / "bare.json").write_text(json.dumps([end - start for start, end in pairs]))


def measure_recovery(killed: list[dict[str, Any]], killed_at: float) -> dict[str, float]:
    """Return the seconds of each part of a recovery, from the kill to the first step of the new workers."""
    fault_event = next(event for event in killed if event["event"] == "fault")
    start = next(event for event in killed if event["event"] == "start" and event["at"] > fault_event["at"])
    first_step = next(event for event in killed if event["event"] == "step" and event["at"] > start["at"])
    entry_time = start["at"] - start["restore_s"]
    return {
        "detection": fault_event["at"] - killed_at,
        "start": entry_time - fault_event["at"],
        "restore": start["restore_s"],
        "first_batch_and_step": first_step["at"] - start["at"],
    }


def summarize(
    run: RunSteps,
    ray_steps: list[float],
    torchrun_steps: list[float],
    undisturbed: list[dict[str, Any]],
    killed: list[dict[str, Any]],
    killed_at: float,
) -> dict[str, Any]:
    """Compute the figures and print them.

    Args:
        run: steps of each run.
        ray_steps: seconds of steps under Ray.
        torchrun_steps: seconds of steps under torchrun.
        undisturbed: events of the run under Ray.
        killed: events of the run with a killed worker.
        killed_at: unix time of the kill.
    """
    # Steps, and pauses in the steps that follow a checkpoint.
    step, torchrun_step = statistics.median(ray_steps), statistics.median(torchrun_steps)
    steps = [event for event in undisturbed if event["event"] == "step"]
    stalls = [event["stall_s"] for event in steps if event["step"] > run.warmup and (event["step"] - 1) % run.save == 0]
    stall = statistics.median(stalls)

    spans = measure_recovery(killed, killed_at)
    recovery = sum(spans.values())

    # A fault costs half a checkpoint interval and the recovery; an interval costs one pause. The best interval is that
    # of Young (1974): sqrt(2 x pause x time between faults).
    between = HOURS_BETWEEN_FAULTS * 3600
    interval = max((2 * stall * between) ** 0.5, step)
    goodput = 1 - stall / interval - (interval / 2 + recovery) / between
    print(f"step: {step:.3f} s under Ray, {torchrun_step:.3f} s under torchrun: {step / torchrun_step:.3f}")
    print(f"checkpoint: pause of {stall:.3f} s, {stall / step:.2f} steps")
    print("SIGKILL to next step: " + ", ".join(f"{name} {span:.1f} s" for name, span in spans.items()))
    print(
        f"{NODES} nodes with one fault in {HOURS_BETWEEN_FAULTS} h: with a checkpoint every {interval:.0f} s, "
        f"goodput = 1 - {stall:.2f} / {interval:.0f} - ({interval:.0f} / 2 + {recovery:.1f}) / {between} "
        f"= {goodput:.4f}"
    )
    return {
        "step_s": round(step, 4),
        "torchrun_step_s": round(torchrun_step, 4),
        "ratio": round(step / torchrun_step, 4),
        "stall_s": round(stall, 4),
        "stall_steps": round(stall / step, 3),
        "recovery_s": {name: round(span, 2) for name, span in spans.items()},
        "goodput": round(goodput, 4),
    }


if __name__ == "__main__":
    main()
