"""Tables say what the answers say, put each run in its row by its settings alone, and tell how to fill the others."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs import schema
from pipelines.paper import IFEVAL
from pipelines.runs import find
from pipelines.tables import Table, build
from redux.benchmarks import Metric, Outcome, Row
from redux.presets import PRESETS, Preset

ROOT = Path(__file__).parents[2]
QUESTIONS = 30
JOB = schema.dump(schema.load(ROOT / "jobs/quickstart.yaml"))
SMALL = {"stages": 3, "iterations": 4}


def instructions(rows: Sequence[Row]) -> dict[str, Metric]:
    """A response is followed and right as it says of itself."""
    groups = {row["task"] for row in rows}

    def metric(words: Sequence[str]) -> Metric:
        return Metric(
            [Outcome(row["task"], row["unit"], float(all(word in row["response"] for word in words))) for row in rows],
            1 / len(groups),
        )

    return {"strict": metric(["follows"]), "right": metric(["right"]), "both": metric(["follows", "right"])}


def easy_vqa(rows: Sequence[Row]) -> dict[str, Metric]:
    return {"accuracy": Metric([Outcome("", row["unit"], float(row["response"] == row["answer"])) for row in rows])}


SCORERS = {"instructions": instructions, "easy_vqa": easy_vqa}


def write_run(runs: Path, name: str, seed: int = 0, skill: float = 0.4, said: str = "", **changes: Any) -> Path:
    """A finished run whose model follows and is right by chance; `changes` are dotted names of its job."""
    folder = runs / name
    (folder / "answers").mkdir(parents=True)
    job = yaml.safe_load(JOB) | {"name": name, "seed": seed}
    for dotted, value in changes.items():
        section = job
        *path, last = dotted.split("__")
        for key in path:
            section = section[key]
        section[last] = value
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    random = np.random.default_rng([seed, *name.encode()])
    luck = random.random((QUESTIONS, len(IFEVAL), 2)) < skill
    rows = [
        {
            "id": f"{task}-{unit}", "unit": f"q{unit}", "task": task, "instruction_id": id, "kwargs": {},
            "prompt": f"Question {unit}? {task} & more", "question": f"Question {unit}?", "answer": "right",
            "response": said + " ".join(np.array(["follows", "right"])[luck[unit, place]]),
        }
        for place, (task, id) in enumerate(IFEVAL.items())
        for unit in range(QUESTIONS)
    ]  # fmt: skip
    jsonl(folder / "answers/instructions.jsonl", rows)
    seen = random.random(200) < skill + 0.4
    rows = [
        {"id": str(n), "unit": str(n // 5), "prompt": "what?", "answer": "a", "response": "a" if right else "b"}
        for n, right in enumerate(seen)
    ]
    jsonl(folder / "answers/easy_vqa.jsonl", rows)
    steps = [{"stage": "instruct", "step": n, "compute_s": 2.0, "data_s": 1.0, "stall_s": 0.0} for n in (1, 2)]
    jsonl(folder / "metrics.jsonl", steps)
    numbers = {"wall_s.evaluate": 120.0, "speed.peak_bytes": 2**30, "speed.decode_tokens_per_s": 50.0 * (1 + skill)}
    (folder / "metrics.json").write_text(json.dumps(numbers))
    return folder


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def of(methods: Preset) -> dict[str, Any]:
    """The preset on the small tower, as changes of the job."""
    from pipelines.runs import changes
    from pipelines.slots import fitting

    small = fitting(methods, 64)
    told = {name: part and changes(part) for name, part in small.methods.items()}
    if told["vmtc"] is not None and "stages" not in told["vmtc"]:
        told["vmtc"] = SMALL | told["vmtc"]
    return {f"model__{name}": part for name, part in told.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA and both modules with two seeds; one of each other kind but SPD."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_run(folder, f"a{seed}", seed, 0.35, **of(PRESETS["llava"]))
        write_run(folder, f"b{seed}", seed, 0.55, **of(PRESETS["default"]))
    for number, name in enumerate(("vmtc", "cmai", "lwp", "tia", "tokens-64", "prumerge", "evit")):
        write_run(folder, f"c{number}", 0, 0.3 + number / 20, **of(PRESETS[name]))
    write_run(folder, "d", 0, 0.6, **of(PRESETS["llava"]), evaluate__image="described")
    for tenth in (2, 8):
        ratio = {"vmtc": SMALL | {"ratio": tenth / 10}}
        write_run(folder, f"e{tenth}", 0, 0.5, model__vmtc=ratio["vmtc"])
    return folder


@pytest.fixture(scope="module")
def tables(runs: Path) -> dict[str, Table]:
    return {table.key: table for table in build(find([runs], SCORERS)[0], samples=400)}
