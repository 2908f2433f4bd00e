"""Tests of the tables: they agree with the answers, rows match by settings, and missing rows have commands."""

import csv
import io
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs import command as command_line
from jobs import schema
from jobs.tables import find_scorer, format_csv, write_tables
from pipelines.evaluation import statistics
from pipelines.evaluation.answer_files import PROVENANCE_FILE
from pipelines.report import columns as columns_module
from pipelines.report.paper import TABLE_1, TABLE_3
from pipelines.report.runs import Family, group_families, read_finished_runs, read_run, select_changed_fields
from pipelines.report.table_rows import TABLE_ROWS, matches, rescale_budget, write_command
from pipelines.report.tables import (
    ResultRow,
    ResultTable,
    build_tables,
    compare_prompts,
    drop_empty_columns,
    name_model,
)
from pipelines.report.variants import group_variants
from pipelines.training.files import MANIFEST
from redux.benchmarks import Metric, Outcome, Row
from redux.configuration import ReduxConfig
from redux.cost import compute_cost
from redux.instructions import INSTRUCTIONS
from redux.presets import PRESETS, Preset, build_llava_config
from tests.pipelines.report.test_run_report import ATTACK, Page

ROOT = Path(__file__).parents[3]
QUESTIONS = 30
JOB = schema.dump(schema.load(ROOT / "jobs/recipes/quickstart.yaml"))
SMALL = {"stages": 3, "iterations": 4}


def instructions(rows: Sequence[Row]) -> dict[str, Metric]:
    """Score responses that contain "follows" and "right"."""
    groups = {row["task"] for row in rows}

    def metric(words: Sequence[str]) -> Metric:
        return Metric(
            [Outcome(row["task"], row["unit"], float(all(word in row["response"] for word in words))) for row in rows],
            1 / len(groups),
        )

    whole = {"strict": metric(["follows"]), "right": metric(["right"]), "both": metric(["follows", "right"])}
    for each in INSTRUCTIONS.values():
        own = [outcome for outcome in whole["strict"].outcomes if outcome.group == f"T{each.task}"]
        whole[f"strict.{each.name}"] = Metric(own)
    return whole


def easy_vqa(rows: Sequence[Row]) -> dict[str, Metric]:
    return {"accuracy": Metric([Outcome("", row["unit"], float(row["response"] == row["answer"])) for row in rows])}


FIND_SCORER = {"instructions": instructions, "easy_vqa": easy_vqa}.get


def find_families(paths: list[Path]) -> tuple[list[Family], list[str]]:
    """Group the finished runs of folders into families, as `redux tables` does."""
    runs, notes = read_finished_runs(paths, FIND_SCORER)
    return group_families(runs, notes), notes


def write_run(
    runs: Path, name: str, seed: int = 0, skill: float = 0.4, response_prefix: str = "", **changes: Any
) -> Path:
    """Write a finished run with random answers; `changes` are keys of its job, with __ for dots."""
    folder = runs / name
    (folder / "answers").mkdir(parents=True)
    job = yaml.safe_load(JOB) | {"name": name, "seed": seed}
    for dotted, value in changes.items():
        section = job
        *path, last = dotted.split("__")
        for key in path:
            section = section[key]
        section[last] = value
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    random = np.random.default_rng([seed, *name.encode()])
    luck = random.random((QUESTIONS, len(INSTRUCTIONS), 2)) < skill
    rows = [
        {
            "id": f"{task}-{unit}", "unit": f"q{unit}", "task": task, "instruction_id": each.id, "kwargs": {},
            "prompt": f"Question {unit}? {task} & more", "question": f"Question {unit}?", "answer": "right",
            "response": response_prefix + " ".join(np.array(["follows", "right"])[luck[unit, place]]),
        }
        for place, each in enumerate(INSTRUCTIONS.values())
        for task in [f"T{each.task}"]
        for unit in range(QUESTIONS)
    ]  # fmt: skip
    jsonl(folder / "answers/instructions.jsonl", rows)
    seen = random.random(200) < skill + 0.4
    rows = [
        {
            "id": str(n),
            "unit": str(n // 5),
            "prompt": "what?",
            "type": "shape",
            "answer": "a",
            "response": "ba"[int(right)],
        }
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


def job_changes(methods: Preset) -> dict[str, Any]:
    """Make the changes of the job for a preset on the small tower."""
    small = rescale_budget(methods, 64)
    contents = {name: part and select_changed_fields(part) for name, part in small.methods.items()}
    if contents["vmtc"] is not None and "stages" not in contents["vmtc"]:
        contents["vmtc"] = SMALL | contents["vmtc"]
    return {f"model__{name}": part for name, part in contents.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write runs of LLaVA and of both modules with two seeds, and one of each other kind except SPD."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_run(folder, f"a{seed}", seed, 0.35, **job_changes(PRESETS["llava"]))
        write_run(folder, f"b{seed}", seed, 0.55, **job_changes(PRESETS["default"]))
    for number, name in enumerate(("vmtc", "cmai", "lwp", "tia", "tokens-64", "prumerge", "evit")):
        write_run(folder, f"c{number}", 0, 0.3 + number / 20, **job_changes(PRESETS[name]))
    write_run(folder, "d", 0, 0.6, **job_changes(PRESETS["llava"]), evaluate__image_input="caption")
    for tenth in (2, 8):
        ratio = {"vmtc": SMALL | {"ratio": tenth / 10}}
        write_run(folder, f"e{tenth}", 0, 0.5, model__vmtc=ratio["vmtc"])
    return folder


@pytest.fixture(scope="module")
def tables(runs: Path) -> dict[str, ResultTable]:
    return {table.key: table for table in build_tables(find_families([runs])[0], samples=400)}


def line(table: ResultTable, label: str, source: str = "ours") -> ResultRow:
    [family] = table.blocks.values()
    return next(row for row in family if row.label.startswith(label) and row.source == source)


def answered(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / f"answers/{task}.jsonl").read_text().splitlines()]


def place(table: ResultTable, column: str) -> int:
    return [each.name for each in table.columns].index(column)


def test_a_cell_is_the_mean_over_seeds_counted_by_hand(runs: Path, tables: dict[str, ResultTable]) -> None:
    table = tables["table-1"]
    row = line(table, "VMTC + CMAI")
    both = [answered(runs / name, "instructions") for name in ("b0", "b1")]
    for column, wanted in (
        ("AVG", [each for rows in both for each in rows]),
        ("T9", [each for rows in both for each in rows if each["task"] == "T9"]),
    ):
        cell = row.cells[place(table, column)]
        assert cell is not None
        assert cell.value == pytest.approx(100 * np.mean(["follows" in each["response"] for each in wanted]))
    seen = [each for name in ("b0", "b1") for each in answered(runs / name, "easy_vqa")]
    cell = row.cells[place(table, "easy-VQA")]
    assert cell is not None
    assert cell.value == pytest.approx(100 * np.mean([each["response"] == each["answer"] for each in seen]))


def test_every_column_of_instructions_has_a_metric() -> None:
    """A column without one would stay empty."""
    metrics = {"strict", "right", "both"} | {f"strict.{instruction.name}" for instruction in INSTRUCTIONS.values()}
    metrics |= {"loose", "strict_taught", "strict_untaught", "words", "image_mass", "dominance"}
    columns = {column for value in vars(columns_module).values() if isinstance(value, tuple) for column in value}
    named = {column.source for column in columns if isinstance(column, columns_module.Column)}
    assert {f"instructions.{metric}" for metric in metrics} == {
        metric for metric in named if metric.startswith("instructions.")
    }


def test_intervals_and_differences_are_those_of_statistics(runs: Path, tables: dict[str, ResultTable]) -> None:
    ours, base = (
        [instructions(answered(runs / f"{letter}{seed}", "instructions"))["strict"] for seed in (0, 1)]
        for letter in "ba"
    )
    cell = line(tables["table-3"], "VMTC + CMAI").cells[place(tables["table-3"], "IF")]
    assert cell is not None
    assert cell.interval == statistics.bootstrap_interval(ours, 400).scale(100)
    assert cell.difference == statistics.bootstrap_difference(ours, base, 400).scale(100)
    assert not cell.difference.is_noise
    own = line(tables["table-3"], "neither").cells[place(tables["table-3"], "IF")]
    assert own is not None
    assert own.difference is None


def test_each_preset_fills_its_row_and_no_other(tmp_path: Path) -> None:
    rows = {
        "llava": {"LLaVA-1.5", "neither"}, "default": {"VMTC + CMAI", "LWP + MG + CLST", "Neighbourhood"},
        "spd": {"SPD"}, "vmtc": {"VMTC", "no CMAI"}, "cmai": {"CMAI", "no VMTC"}, "llp": {"LLP"}, "lwp": {"LWP"},
        "lwp-mg": {"LWP + MG"}, "tia": {"TIA"}, "sum-tia": {"Sum TIA"}, "discounted-sum-tia": {"Discounted Sum TIA"},
        "tokens-64": {"VMTC + CMAI, 64 of 576 tokens"}, "tokens-36": {"VMTC + CMAI, 36 of 576 tokens"},
        "prumerge": {"PruMerge, 36 of 576 tokens"}, "random": {"Random patches"}, "evit": set(),
    }  # fmt: skip
    rows_of_tables = [row for table in TABLE_ROWS.values() for row in table]
    for name in rows:
        write_run(tmp_path, name, **job_changes(PRESETS[name]))
    write_run(tmp_path, "described", **job_changes(PRESETS["llava"]), evaluate__image_input="caption")
    [family], _ = find_families([tmp_path])
    found = {model.job["name"]: {row.label for row in rows_of_tables if matches(model, row)} for model in family.models}
    assert found == rows | {"described": {"Upper limit"}}


def test_other_ways_of_down_sampling_and_other_names_make_no_difference(tmp_path: Path) -> None:
    for method in ("stride", "bilinear"):
        write_run(tmp_path, f"llava-{method}", **job_changes(PRESETS["llava"]) | {
            "model__reduction": {"method": method, "tokens": 16}
        })  # fmt: skip
    [family], _ = find_families([tmp_path])
    [table] = [table for table in build_tables([family], 100) if table.key == "table-1"]
    labels = [row.label for row in table.blocks[family.label] if row.source == "ours"]
    assert labels == ["SPD (reduction.method = bilinear)", "SPD (reduction.method = stride)"]


def test_runs_that_differ_only_in_seed_are_one_row_and_a_copy_is_left_out(tmp_path: Path) -> None:
    for number, seed in enumerate((0, 1, 1)):
        write_run(tmp_path, f"run-{number}", seed, **job_changes(PRESETS["default"]))
    [family], notes = find_families([tmp_path])
    [model] = family.models
    assert [run.seed for run in model.runs] == [0, 1]
    assert len(notes) == 1
    assert "run-2" in notes[0]


def test_other_sizes_or_data_are_another_family_and_other_machines_are_not(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0, **job_changes(PRESETS["llava"]))
    write_run(tmp_path, "b", 1, **job_changes(PRESETS["llava"]), num_workers=7, gpu_share=0.5, evaluate__num_actors=1)
    write_run(tmp_path, "c", 0, **job_changes(PRESETS["llava"]), train__instruct__epochs=7)
    families, _ = find_families([tmp_path])
    assert sorted(len(family.models[0].runs) for family in families) == [1, 2]
    assert any("train.instruct.epochs = 7" in family.label for family in families)
    table = next(table for table in build_tables(families, 100) if table.key == "table-3")
    assert len(table.blocks) == 2


def test_an_error_of_a_scorer_names_the_file_of_the_answers(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run")

    def refuse(rows: Sequence[Row]) -> dict[str, Metric]:
        raise ValueError("num_words: got nothing, allowed: a whole number")

    with pytest.raises(ValueError, match=r"run/answers/easy_vqa.jsonl: num_words: got nothing"):
        read_run(folder, {"easy_vqa": refuse}.get)


def test_models_are_found_where_the_job_has_its_checkpoints(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run", **job_changes(PRESETS["default"]), checkpoints=f"file://{tmp_path}/store")
    model = tmp_path / "store/run/instruct/model"
    ReduxConfig(vision_config={"image_size": 48, "patch_size": 8}).save_pretrained(model)
    (model / MANIFEST).write_text("{}")
    run = read_run(folder, FIND_SCORER)
    assert run.config is not None
    assert run.config.num_patches == 36
    [family], _ = find_families([folder])
    assert family.models[0].trained_model == f"file://{model}"


def test_a_job_file_in_a_folder_above_a_checkpoint_is_not_the_job_that_trained_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("name: mine\n")
    write_run(tmp_path / "runs", "later", 3, train={}, model__checkpoint="org/llava")
    [family], _ = find_families([tmp_path / "runs"])
    [run] = family.models[0].runs
    assert (run.source_job["model"]["checkpoint"], run.seed) == ("org/llava", 3)


def test_a_run_that_asks_anothers_checkpoint_is_of_its_family_and_seed(tmp_path: Path) -> None:
    write_run(tmp_path, "trained", 5, **job_changes(PRESETS["llava"]))
    checkpoint = str(tmp_path / "trained/checkpoints/instruct/model")
    limit = job_changes(PRESETS["llava"]) | {
        "train": {},
        "model__checkpoint": checkpoint,
        "evaluate__image_input": "caption",
    }
    write_run(tmp_path, "limit", 0, **limit)
    write_run(tmp_path, "later", 0, **job_changes(PRESETS["default"]) | {"train": {}, "model__checkpoint": checkpoint})
    [family], _ = find_families([tmp_path])
    assert {run.seed for model in family.models for run in model.runs} == {5}
    found = {model.job["name"]: model for model in family.models}
    assert matches(found["limit"], TABLE_ROWS["table-1"][2])
    assert not found["later"].trained_as_evaluated
    assert not write_tables([tmp_path], None, FIND_SCORER, 100).partition("##")[0], "no run of VMTC + CMAI to compare"
    assert not any(matches(found["later"], row) for table in TABLE_ROWS.values() for row in table)


@pytest.mark.parametrize("start", ["b0", "c2", "c3", "a0"])
def test_the_command_of_a_missing_row_is_a_job_that_fills_it(runs: Path, tmp_path: Path, start: str) -> None:
    """Every row has a valid command, whichever runs its family has; the shell and the schema parse it."""
    (tmp_path / start).symlink_to(runs / start)
    [family], _ = find_families([tmp_path])
    rows_of_tables = [row for table in TABLE_ROWS.values() for row in table if row.preset]
    for row in rows_of_tables:
        redux, run, job, *overrides, into, paper_rows = shlex.split(write_command(row, family))
        assert (redux, run, into, paper_rows) == ("redux", "run", "--runs-dir", str(tmp_path))
        made = schema.load(Path(job), overrides)
        assert made.name.startswith(f"{start}-")
        other = tmp_path / "made" / made.name
        other.mkdir(parents=True, exist_ok=True)
        (other / "job.yaml").write_text(schema.dump(made))
        (other / "metrics.json").write_text("{}")
        [again], _ = find_families([other])
        assert matches(again.models[0], row), row.label
        if made.model.vmtc and row.preset != PRESETS["llp"] and start != "a0":
            assert made.model.vmtc.iterations == 4, "the family's own option"


def test_a_row_that_several_tables_have_is_made_by_one_command(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "c1").symlink_to(runs / "c1")
    [family], _ = find_families([tmp_path])
    commands = {
        write_command(row, family) for rows_of_tables in TABLE_ROWS.values() for row in rows_of_tables if row.preset
    }
    assert len({shlex.split(each)[3] for each in commands}) == len(commands)


def test_missing_rows_have_commands_and_the_papers_numbers_stand_beside(tables: dict[str, ResultTable]) -> None:
    missing = line(tables["table-1"], "SPD", "missing")
    assert missing.command.startswith("redux run ")
    paper_rows = [row for rows in tables["table-1"].blocks.values() for row in rows if row.source == "paper"]
    assert [row.about for row in paper_rows[:2]] == ["paper, 7B, other data", "paper, 13B, other data"]
    shown = [cell and cell.value for cell in paper_rows[0].cells]
    assert shown[: place(tables["table-1"], "AVG") + 1] == list(TABLE_1.rows["LLaVA-1.5-7B"][1:])
    both = line(tables["table-3"], "VMTC + CMAI", "paper")
    assert [cell.value for cell in both.cells if cell] == list(TABLE_3.rows["VMTC, CMAI"])


def test_all_models_are_listed_in_the_order_of_the_paper(runs: Path, tables: dict[str, ResultTable]) -> None:
    [rows] = tables["models"].blocks.values()
    assert len(rows) == len({row.label for row in rows}) == 12
    assert [row.kind for row in rows[:4]] == ["llava", "both", "both", "both"]
    assert [row.removed for row in rows[1:4]] == sorted(row.removed for row in rows[1:4] if row.removed)
    assert rows[-1].kind is None, "evit, for which the paper has no row"


def test_the_sweep_has_its_runs_by_share_and_names_the_missing_tenths(tables: dict[str, ResultTable]) -> None:
    [rows] = tables["ratios"].blocks.values()
    both = [row.removed for row in rows if row.kind == "both"]
    assert both == sorted(both)
    assert len(both) == 4
    missing = [row.label for row in rows if row.source == "missing"]
    assert missing == [f"VMTC + CMAI {share}" for share in ("0%", "10%", "30%", "40%", "60%", "70%", "90%")]


def test_costs_are_means_over_seeds_and_shares_of_llavas(runs: Path, tables: dict[str, ResultTable]) -> None:
    table = tables["costs"]
    row = line(table, "VMTC + CMAI, 32")
    contents = {column.source: cell for column, cell in zip(table.columns, row.cells, strict=True)}
    assert contents["training"] is not None
    assert contents["training"].value == pytest.approx(6 / 60)
    assert contents["training"].ratio == pytest.approx(1.0)
    assert contents["decode"] is not None
    assert contents["decode"].ratio == pytest.approx(1.55 / 1.35)
    assert contents["prompt"] is None, "no model is in the run folder"


def test_what_a_run_folder_holds_of_its_model_gives_flops(tmp_path: Path) -> None:
    for name in ("llava", "default"):
        folder = write_run(tmp_path, name, **job_changes(PRESETS[name]))
        build_llava_config("7b", PRESETS[name]).save_pretrained(folder / "checkpoints/instruct/model")
    families, _ = find_families([tmp_path])
    table = next(table for table in build_tables(families, 100) if table.key == "costs")
    column = [each.source for each in table.columns].index("prompt")
    flops = {row.label: row.cells[column] for rows in table.blocks.values() for row in rows}
    whole, ours = (compute_cost(build_llava_config("7b", PRESETS[name]), 64).flops for name in ("llava", "default"))
    assert flops["LLaVA-1.5"] is not None
    assert flops["LLaVA-1.5"].value == pytest.approx(whole / 1e9)
    assert flops["VMTC + CMAI"] is not None
    assert flops["VMTC + CMAI"].ratio == pytest.approx(ours / whole)


def test_csv_has_every_cell_and_nothing_is_lost(tables: dict[str, ResultTable]) -> None:
    for table in tables.values():
        rows = list(csv.DictReader(io.StringIO(format_csv(table))))
        contents = [(line, column, cell) for lines in table.blocks.values() for line in lines
                for column, cell in zip(table.columns, line.cells, strict=False) if cell]  # fmt: skip
        read = [row for row in rows if row["column"]]
        assert len(read) == len(contents)
        for row, (line_, column, cell) in zip(read, contents, strict=True):
            assert (row["row"], row["source"], row["column"]) == (line_.label, line_.source, column.name)
            assert float(row["value"]) == cell.value
            if cell.interval:
                assert (float(row["low"]), float(row["high"])) == (cell.interval.low, cell.interval.high)
            if cell.difference:
                assert (float(row["difference"]), row["noise"]) == (
                    cell.difference.value, str(int(cell.difference.is_noise)),
                )  # fmt: skip
        assert [row["command"] for row in rows if row["command"]] == [
            line_.command for lines in table.blocks.values() for line_ in lines if line_.command
        ]


def test_the_page_runs_nothing_and_escapes_what_models_say(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0, 0.4, ATTACK, **job_changes(PRESETS["llava"]))
    write_run(tmp_path, "b", 0, 0.6, ATTACK, **job_changes(PRESETS["default"]))
    text = write_tables([tmp_path], tmp_path / "out", FIND_SCORER, 100)
    assert (tmp_path / "out/tables.md").read_text() == text
    page = (tmp_path / "out/tables.html").read_text()
    read = Page(page)
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in read.tags}
    assert not [name for _, attrs in read.tags for name in attrs if name.startswith("on")]
    assert any("default-src 'none'" in (attrs.get("content") or "") for attrs in read.attributes("meta"))
    assert read.words.count(ATTACK) == 12, "six prompts, two models"
    assert "With VMTC + CMAI: " in read.words
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in read.attributes("svg"))
    assert len(read.attributes("svg")) >= 1


def test_the_page_says_what_the_tables_say(runs: Path, tmp_path: Path) -> None:
    text = write_tables([runs], tmp_path, FIND_SCORER, 100, lists_missing=True)
    read = Page((tmp_path / "tables.html").read_text())
    contents = " ".join(read.words.split())
    [cell] = [row for row in text.splitlines() if row.startswith("| SPD | missing")][:1]
    assert cell
    assert "model.reduction={method: average, ratio: 0.75}" in text
    assert "redux run" not in contents, "rows without a run are in the Markdown file alone"
    assert contents.index("Variants") < contents.index("With VMTC + CMAI") < contents.index("Table 1")
    tables = (*TABLE_ROWS, "models", "measures", "figure-2", "ratios", "costs", "claims")
    assert {path.name for path in tmp_path.iterdir()} == {"tables.md", "tables.html", *(f"{key}.csv" for key in tables)}


def test_rows_without_a_run_are_listed_on_request_alone(runs: Path, tmp_path: Path) -> None:
    """A user's own runs fill few rows of the paper's tables; the others would be most of the output."""
    (tmp_path / "b0").symlink_to(runs / "b0")
    text = write_tables([tmp_path], None, FIND_SCORER, 100)
    assert "redux run" not in text
    assert "missing" not in text
    assert write_tables([tmp_path], None, FIND_SCORER, 100, lists_missing=True).count("redux run") > 20


def test_a_table_of_the_paper_needs_a_number_to_compare(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "b0", tmp_path / "b0")
    assert "## Table 1" in write_tables([tmp_path], None, FIND_SCORER, 100)
    (tmp_path / "b0/answers/instructions.jsonl").unlink()
    text = write_tables([tmp_path], None, FIND_SCORER, 100)
    assert "easy-VQA" in text
    assert "Table" not in text
    assert "paper" not in text


@pytest.mark.parametrize(
    ("trained", "applied", "label"),
    [
        ("default", "default", "VMTC + CMAI"),
        ("default", "vmtc", "VMTC + CMAI, asked with CMAI off"),
        ("default", "llava", "VMTC + CMAI, asked with VMTC off and CMAI off"),
        ("llava", "default", "LLaVA-1.5, asked with VMTC (iterations = 4) and CMAI"),
        ("vmtc", "default", "VMTC, asked with CMAI"),
        ("cmai", "llava", "CMAI, asked with CMAI off"),
        ("evit", "llava", "VMTC, asked with VMTC off"),
    ],
)
def test_a_label_says_what_was_trained_and_what_was_applied(
    tmp_path: Path, trained: str, applied: str, label: str
) -> None:
    """The checkpoint is in its run folder, or was exported to another folder."""
    write_run(tmp_path, "trained", **job_changes(PRESETS[trained]))
    exported = tmp_path / "exported"
    exported.mkdir()
    settings = {name.removeprefix("model__"): value for name, value in job_changes(PRESETS[trained]).items()}
    (exported / "config.json").write_text(json.dumps({"model_type": "llava", **settings}))
    for name, checkpoint in (
        ("asked", str(tmp_path / "trained/checkpoints/instruct/model")),
        ("asked-export", str(exported)),
    ):
        changes = job_changes(PRESETS[applied]) | {"train": {}, "model__checkpoint": checkpoint}
        write_run(tmp_path / name, name, **changes)
        families, _ = find_families([tmp_path / name])
        [[model]] = [family.models for family in families]
        assert name_model(model, families[0]).startswith(label), name


def test_variants_that_were_asked_otherwise_than_trained_stay_apart(tmp_path: Path) -> None:
    """A model trained without CMAI is another variant than one that was asked with CMAI off."""
    write_run(tmp_path, "both", **job_changes(PRESETS["default"]))
    write_run(tmp_path, "vmtc", **job_changes(PRESETS["vmtc"]))
    checkpoint = str(tmp_path / "both/checkpoints/instruct/model")
    write_run(tmp_path, "off", **job_changes(PRESETS["vmtc"]) | {"train": {}, "model__checkpoint": checkpoint})
    runs, _ = read_finished_runs([tmp_path], FIND_SCORER)
    assert [variant.label for variant in group_variants(runs)] == [
        "model.cmai = on",
        "model.cmai = off (trained with on)",
        "model.cmai = off",
    ]


def test_equal_models_are_said_to_be_within_noise(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0, 0.5, **job_changes(PRESETS["llava"]))
    write_run(tmp_path, "b", 0, 0.5, **job_changes(PRESETS["default"]))
    assert "within noise" in write_tables([tmp_path], None, FIND_SCORER, 400).partition("##")[0]


def test_without_llava_the_page_does_not_mention_it_and_without_answers_it_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "b", 0, 0.5, **job_changes(PRESETS["default"]))
    assert "LLaVA" not in write_tables([tmp_path], tmp_path / "alone", FIND_SCORER, 100).partition("##")[0]
    assert "no run of" not in (tmp_path / "alone/tables.html").read_text()
    write_run(tmp_path, "a", 0, 0.5, **job_changes(PRESETS["llava"]))
    for file in (folder / "answers").iterdir():
        file.unlink()
    (folder / "metrics.json").write_text(json.dumps({"easy_vqa.accuracy": 0.875}))
    text = write_tables([tmp_path], tmp_path / "out", FIND_SCORER, 100)
    assert "no answers to the same questions" in text.partition("##")[0]
    assert "87.5" in text, "a number without answers is shown without an interval"
    assert Page((tmp_path / "out/tables.html").read_text())


def test_the_page_of_runs_with_own_questions_has_only_what_has_rows(tmp_path: Path) -> None:
    """Two learning rates of a model of own sizes: variants and costs, no table and no word of the paper."""
    row = {"id": "1", "unit": "1", "prompt": "red?", "image": None, "answers": ["yes"], "type": "all"}
    for name, rate in (("a", 1e-3), ("b", 1e-4)):
        folder = write_run(tmp_path, name, **job_changes(PRESETS["default"]), train__instruct__learning_rate=rate)
        shutil.rmtree(folder / "answers")
        (folder / "answers").mkdir()
        jsonl(folder / "answers/own.jsonl", [row | {"metric": "exact", "response": "yes"}])
    text = write_tables([tmp_path], tmp_path / "out", find_scorer, 100)
    assert text.startswith("## Variants")
    contents = " ".join(Page((tmp_path / "out/tables.html").read_text()).words.split())
    assert "Variants and costs" in contents
    for absent in ("LLaVA-1.5", "of the paper", "Figure", "Table 1", "How to read it"):
        assert absent not in contents, absent


def test_the_prompts_are_the_same_for_all_and_marked_by_the_scorer(runs: Path) -> None:
    [family], _ = find_families([runs])
    contents = compare_prompts(family, instructions)
    assert len(contents) == 6
    for prompt in contents:
        assert len({label for label, *_ in prompt.responses}) == len(prompt.responses) == len(family.models) - 1, (
            "all but evit"
        )
        assert all(followed == ("follows" in response) for _, response, followed in prompt.responses)


def test_what_cannot_be_read_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"runs: found none that is finished, allowed: folders with job.yaml and metrics.json at "
    ) as error:
        write_tables([tmp_path], None, FIND_SCORER)
    assert str(tmp_path) in str(error.value)
    folder = write_run(tmp_path, "a", **job_changes(PRESETS["llava"]))
    (folder / "answers/easy_vqa.jsonl").write_text('{"id": 1}\n{half\n')
    with pytest.raises(ValueError, match=r"easy_vqa.jsonl: line 2: got '\{half', allowed: an object of JSON"):
        write_tables([tmp_path], None, FIND_SCORER)
    (folder / "metrics.json").unlink()
    write_run(tmp_path, "b", **job_changes(PRESETS["default"]))
    assert "is not finished and is left out" in write_tables([tmp_path], None, FIND_SCORER, 100)


def test_what_counted_sentences_otherwise_than_ifeval_is_told(tmp_path: Path) -> None:
    for name, splitter in (("a", "punkt"), ("b", "regex")):
        folder = write_run(tmp_path, name, **job_changes(PRESETS["llava" if name == "a" else "default"]))
        (folder / "answers" / PROVENANCE_FILE).write_text(json.dumps({"splitter": splitter}))
    assert "T12 of b: sentences were counted by regular expressions" in write_tables([tmp_path], None, FIND_SCORER, 100)


def test_a_checkpoint_from_elsewhere_fills_the_row_that_it_is(tmp_path: Path) -> None:
    """A foreign model matches no row of LLaVA, nor does a model with a method that it was not trained with."""
    given = {"train": {}, "model__tower": None, "model__language": None}
    own = dict.fromkeys(("model__vmtc", "model__cmai", "model__reduction"), "checkpoint")
    for name, kind, more in (
        ("blip", "instructblip", {}),
        ("plain", "llava", {}),
        ("later", "llava", {"model__cmai": {"gamma_max": 0.6}}),
    ):
        checkpoint = {"llava": "hub/llava", "instructblip": "Salesforce/instructblip-vicuna-7b"}[kind]
        folder = write_run(tmp_path, name, model__checkpoint=checkpoint, **{**given, **own, **more})
        methods = {"vmtc": None, "cmai": more.get("model__cmai"), "reduction": None}
        (folder / "answers" / PROVENANCE_FILE).write_text(json.dumps({"model_type": kind, "methods": methods}))
    [family], _ = find_families([tmp_path])
    assert family.label == "llava"
    found = {model.runs[0].folder.name: model for model in family.models}
    rows_of_tables = [row for table in TABLE_ROWS.values() for row in table]
    filled = {name: {row.paper for row in rows_of_tables if matches(model, row)} for name, model in found.items()}
    assert filled["later"] == set()
    assert filled["blip"] == {"InstructBLIP-7B, 64 tokens"}
    assert "LLaVA-1.5-{size}" in filled["plain"]
    assert "| InstructBLIP-7B | not trained here |" in write_tables([tmp_path], None, FIND_SCORER, 100)


def test_what_need_not_be_trained_is_only_asked(runs: Path, tmp_path: Path) -> None:
    """The upper limit is a trained LLaVA that gets captions; a foreign model is its checkpoint."""
    trained = shutil.copytree(runs / "a0", tmp_path / "a0")
    last = list(yaml.safe_load((trained / "job.yaml").read_text())["train"])[-1]
    model = trained / "checkpoints" / last / "model"
    model.mkdir(parents=True)
    (model / MANIFEST).write_text("{}")
    [family], _ = find_families([tmp_path])
    for row in (TABLE_ROWS["table-1"][2], next(row for row in TABLE_ROWS["table-2"] if row.checkpoint)):
        _, _, job, *overrides, _, _ = shlex.split(write_command(row, family))
        made = schema.load(Path(job), overrides)
        assert not made.train
        folder = tmp_path / made.name
        (folder / "answers").mkdir(parents=True)
        (folder / "job.yaml").write_text(schema.dump(made))
        (folder / "metrics.json").write_text("{}")
        if row.checkpoint:
            (folder / "answers" / PROVENANCE_FILE).write_text('{"model_type": "instructblip"}')
        else:
            assert made.evaluate
            assert made.evaluate.template is None  # the model itself says how it was trained
        [again], _ = find_families([tmp_path])
        assert sum(matches(model, row) for model in again.models) == 1


def test_columns_without_a_number_are_left_out(tmp_path: Path) -> None:
    """Runs without instructions have no columns of instruction following, in text and on the page."""
    for name, preset in (("a", "llava"), ("b", "default")):
        folder = write_run(tmp_path / "runs", name, **job_changes(PRESETS[preset]))
        (folder / "answers/instructions.jsonl").unlink()
    [family], _ = find_families([tmp_path / "runs"])
    [models] = [table for table in build_tables([family], 100) if table.key == "models"]
    shown = drop_empty_columns(models)
    assert {"IF", "right", "both"} <= {column.name for column in models.columns}
    assert [column.name for column in shown.columns] == ["easy-VQA"]
    # The cells stay below their columns.
    position = [column.name for column in models.columns].index("easy-VQA")
    for before, after in zip(models.blocks[family.label], shown.blocks[family.label], strict=True):
        assert after.cells == before.cells[position : position + 1]
    text = write_tables([tmp_path / "runs"], tmp_path / "out", FIND_SCORER, 100)
    assert "| | | easy-VQA |" in text
    assert '<th scope="col">IF' not in (tmp_path / "out/tables.html").read_text()


def test_models_that_were_asked_other_things_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "a", **job_changes(PRESETS["llava"]))
    folder = write_run(tmp_path, "b", **job_changes(PRESETS["default"]))
    jsonl(folder / "answers/easy_vqa.jsonl", answered(folder, "easy_vqa")[:-5])
    with pytest.raises(ValueError, match=r"easy_vqa.accuracy of .*b, .*a: .* of unit '39'"):
        write_tables([tmp_path], None, FIND_SCORER, 100)


def test_the_verb_writes_the_tables_and_tells_where_it_found_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "runs", "a", **job_changes(PRESETS["llava"]))
    (folder / "answers/instructions.jsonl").unlink()  # of no instruction that there is
    assert command_line.main(["tables", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (tmp_path / "out/tables.md").read_text()
    assert command_line.main(["tables", str(tmp_path / "nowhere")]) == 2
    contents = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in contents
    assert contents.count("\n") == 1
