"""The paper's tables over finished runs: scores with intervals, the paper's numbers, and missing rows.

Each score is a mean over training seeds with a 95 % interval over items. It is compared with LLaVA-1.5 of the same
family, the row with neither module. The numbers of the paper are in lines of their own, since they are of other sizes
and other data. A row without a run has the command that fills it.

The paper counts followed instructions, not correct answers, and a model that ignores the image can follow instructions.
So the tables also have the columns "right" and "both".

Cost: one bootstrap for each score and one for each difference, see `pipelines.evaluation.statistics`; about ten seconds
for twenty runs of 3,488 instructions.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipelines.core import jsonl
from pipelines.core.words import pluralize
from pipelines.evaluation import statistics
from pipelines.evaluation.answer_files import ANSWERS_FOLDER
from pipelines.evaluation.statistics import Difference, Interval
from pipelines.report import paper
from pipelines.report.columns import (
    BENCHMARK_COLUMNS,
    CORRECTNESS_COLUMNS,
    COST_COLUMNS,
    COST_FUNCTIONS,
    IF_COLUMN,
    MEASURE_COLUMNS,
    PILOT_COLUMNS,
    TABLE_COLUMNS,
    Column,
)
from pipelines.report.runs import ComparedModel, Family, select_changed_fields
from pipelines.report.table_rows import (
    KIND_TITLES,
    LLAVA_ROW,
    TABLE_ROWS,
    TableRow,
    find_kind,
    make_spd_rows,
    make_sweep_rows,
    matches,
    write_command,
)
from redux.benchmarks import Metric
from redux.presets import Preset
from redux.settings import SPATIAL_METHODS

METHOD_LABELS = {"vmtc": "VMTC", "cmai": "CMAI", "reduction": "Reduction"}
"""Titles of the methods, by their names in `redux.settings.METHODS`."""

MEASURES_TITLE = "Instruction following: what was taught, answers without image, length and attention"
NUM_COMPARED_PROMPTS = 6
"""Number of prompts in Figure 4."""


@dataclass(frozen=True)
class Cell:
    """A number as it is shown.

    Args:
        value: the number.
        interval: its 95 % interval; None without answers to draw from.
        difference: difference to LLaVA-1.5; None without answers to draw from.
        ratio: ratio of a cost to that of LLaVA-1.5.
    """

    value: float
    interval: Interval | None = None
    difference: Difference | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class ResultRow:
    """A line of a table: a model, numbers of the paper, or a row without a run.

    Args:
        label: name of the row.
        source: "ours", "paper" or "missing".
        about: seeds and tokens of a model, or the origin of the numbers.
        cells: one per column, None for no number.
        command: the command that fills a missing row.
        kind: kind of a model, see `table_rows.find_kind`.
        removed: share of the tokens that a model removes.
    """

    label: str
    source: str
    about: str = ""
    cells: tuple[Cell | None, ...] = ()
    command: str = ""
    kind: str | None = None
    removed: float | None = None


@dataclass(frozen=True)
class ResultTable:
    """A table over all families.

    Args:
        key: name of its CSV file.
        title: heading.
        columns: its columns.
        blocks: rows, by label of the family.
        notes: remarks below the table.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    blocks: dict[str, list[ResultRow]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparedPrompt:
    """A prompt of Figure 4 with the responses of all models.

    Args:
        text: the prompt.
        responses: (label of the model, response, instruction followed).
    """

    text: str
    responses: tuple[tuple[str, str, bool], ...]


class FamilyScores:
    """Scores of a family's models, each bootstrapped once, with their differences to LLaVA-1.5."""

    def __init__(self, family: Family, samples: int) -> None:
        self.family = family
        self.samples = samples
        self.base = next((model for model in family.models if matches(model, LLAVA_ROW)), None)
        self.cells: dict[tuple[ComparedModel, str], Cell | None] = {}

    def cell(self, model: ComparedModel, column: Column) -> Cell | None:
        """Return a cell from the cache, or compute it; None if the model was not evaluated on this task."""
        if (model, column.source) not in self.cells:
            self.cells[model, column.source] = self._compute_cell(model, column)
        return self.cells[model, column.source]

    def _compute_cell(self, model: ComparedModel, column: Column) -> Cell | None:
        # Costs have no answers to draw from, so they have a ratio in place of an interval.
        if column.source in COST_FUNCTIONS:
            return self._compute_cost_cell(model, COST_FUNCTIONS[column.source])
        metrics = model.metrics(column.source)
        if not metrics:
            # A run without answers may still have the score as a number.
            number = model.mean_number(column.source)
            return None if number is None else Cell(number * column.factor)
        # The difference of LLaVA to itself is not shown.
        base = self.base.metrics(column.source) if self.base and self.base is not model else []
        try:
            interval = statistics.bootstrap_interval(metrics, self.samples).scale(column.factor)
            difference = (
                statistics.bootstrap_difference(metrics, base, self.samples).scale(column.factor) if base else None
            )
        except ValueError as error:
            folders = [str(run.folder) for part in (model, self.base) if part for run in part.runs]
            raise ValueError(f"{column.source} of {', '.join(folders)}: {error}") from None
        return Cell(interval.value, interval, difference)

    def _compute_cost_cell(
        self, model: ComparedModel, compute_cost: Callable[[ComparedModel], float | None]
    ) -> Cell | None:
        value = compute_cost(model)
        if value is None:
            return None
        base = compute_cost(self.base) if self.base and self.base is not model else None
        return Cell(value, ratio=value / base if base else None)


def build_tables(families: Sequence[Family], samples: int = 10_000) -> list[ResultTable]:
    """Build all tables: models, measures of instruction following, Tables 1 to 5, Figure 2, sweep of ratios, costs.

    Args:
        families: the families.
        samples: number of draws of each bootstrap.

    Raises:
        ValueError: models of a family have different questions.
    """
    scores = [FamilyScores(family, samples) for family in families]
    # Benchmarks that a run has beyond the columns of a table are added to it.
    evaluated = {name for family in families for model in family.models for run in model.runs for name in run.metrics}
    extra = tuple(column for column in BENCHMARK_COLUMNS if column.source in evaluated)
    score_columns = _add_columns((IF_COLUMN, *CORRECTNESS_COLUMNS), extra)
    measures = tuple(column for column in MEASURE_COLUMNS if column.source in evaluated)
    # The order of the page.
    return [
        _build_full_table("models", "All models", score_columns, scores),
        # Runs of the paper's measures alone need no second table.
        *(
            [_build_full_table("measures", MEASURES_TITLE, measures, scores)]
            if set(measures) - set(score_columns)
            else []
        ),
        # Tables 1 to 5 of the paper.
        *(
            _build_paper_table(key, _add_columns(TABLE_COLUMNS[key], extra), scores, TABLE_ROWS[key], printed)
            for key, printed in paper.TABLES.items()
        ),
        _build_ratio_table(
            "figure-2",
            "Figure 2: spatial down-sampling",
            _add_columns(PILOT_COLUMNS, extra),
            scores,
            make_spd_rows(),
            ("llava", *SPATIAL_METHODS),
        ),
        _build_ratio_table(
            "ratios",
            "Scores by share of removed tokens",
            score_columns,
            scores,
            make_sweep_rows(),
            ("llava", "both", "vmtc", *SPATIAL_METHODS, "random", "prumerge"),
        ),
        _build_full_table("costs", "Costs", COST_COLUMNS, scores),
    ]


def keep_filled(table: ResultTable) -> ResultTable:
    """Keep the rows and columns with numbers, of families that have a run in the table.

    A table of the paper is kept only if a run has a number in one of the paper's columns, since nothing else compares.
    """
    blocks = {}
    for label, rows in table.blocks.items():
        has_paper_rows = any(row.source == "paper" for row in rows)
        cells = [
            cell
            for row in rows
            if row.source == "ours"
            for column, cell in zip(table.columns, row.cells, strict=False)
            if column.paper or not has_paper_rows
        ]
        if any(cells):
            blocks[label] = [row for row in rows if row.source != "missing"]
    return drop_empty_columns(replace(table, blocks=blocks))


def drop_empty_columns(table: ResultTable) -> ResultTable:
    """Leave out the columns in which no row has a number. A table without any number keeps its columns."""
    rows = [row for rows in table.blocks.values() for row in rows]
    # Rows without a run have fewer cells than there are columns.
    padded = itertools.zip_longest(table.columns, *(row.cells for row in rows))
    filled = [any(cells) for _, *cells in padded]
    if not any(filled):
        return table
    blocks = {
        label: [replace(row, cells=tuple(itertools.compress(row.cells, filled))) for row in rows]
        for label, rows in table.blocks.items()
    }
    return replace(table, columns=tuple(itertools.compress(table.columns, filled)), blocks=blocks)


def _add_columns(columns: Sequence[Column], extra: Sequence[Column]) -> tuple[Column, ...]:
    """Add extra columns, except those whose metric the table already has, possibly under another name."""
    sources = {column.source for column in columns}
    return (*columns, *(column for column in extra if column.source not in sources))


def _build_paper_table(
    key: str,
    columns: tuple[Column, ...],
    scores: Sequence[FamilyScores],
    rows: Sequence[TableRow],
    printed: paper.PaperTable,
) -> ResultTable:
    blocks = {
        family_scores.family.label: [line for row in rows for line in _fill_row(row, family_scores, columns, printed)]
        for family_scores in scores
    }
    return ResultTable(key, printed.title, columns, blocks, printed.notes)


def _fill_row(
    row: TableRow, scores: FamilyScores, columns: Sequence[Column], printed: paper.PaperTable | None
) -> Iterator[ResultRow]:
    """Yield the lines of a row: the models that match it, or the command that fills it, then the paper's numbers."""
    models = [model for model in scores.family.models if matches(model, row)]
    for model in models:
        label = row.label
        if len(models) > 1:
            label = f"{row.label} ({_describe_options(model, models) or 'defaults'})"
        yield _make_row(label, model, scores, columns)
    # Rows of models that this project cannot train have only the paper's numbers.
    if not models and (row.preset or row.checkpoint):
        yield ResultRow(row.label, "missing", "missing", command=write_command(row, scores.family))
    for size, name in _find_paper_rows(row, scores.family, printed):
        assert printed is not None
        values = [printed.cell(name, column.paper) if column.paper else None for column in columns]
        if any(value is not None for value in values):
            cells = tuple(None if value is None else Cell(value) for value in values)
            yield ResultRow(row.label, "paper", f"paper, {size}, other data" if size else "paper", cells)


def _find_paper_rows(row: TableRow, family: Family, printed: paper.PaperTable | None) -> list[tuple[str, str]]:
    """Find the rows of the paper's table that correspond to a row, as (size, name in the paper)."""
    if printed is None or row.paper is None:
        return []
    if "{size}" in row.paper:
        sizes = [family.size] if family.size else ["7B", "13B"]
        return [(size, row.paper.format(size=size)) for size in sizes]
    return [("7B" if row.preset else "", row.paper)]  # Tables 3 to 5 have one size


def _make_row(label: str, model: ComparedModel, scores: FamilyScores, columns: Sequence[Column]) -> ResultRow:
    cells = tuple(scores.cell(model, column) for column in columns)
    if model.is_foreign:
        return ResultRow(label, "ours", "not trained here", cells)
    # Foreign models have no seeds and another number of tokens.
    about = f"{pluralize(model.num_seeds, 'seed')}, {model.num_tokens} of {model.num_patches} tokens"
    kind = find_kind(model.methods, model.uses_captions) if model.trained_as_evaluated else None
    return ResultRow(label, "ours", about, cells, kind=kind, removed=removed_share(model))


def _describe_options(model: ComparedModel, models: Sequence[ComparedModel]) -> str:
    """Describe the method settings of a model that are not at their defaults and differ from another model."""

    def changed_options(compared: ComparedModel) -> dict[str, Any]:
        parts = [(name, part) for name, part in compared.methods.methods.items() if part]
        return {f"{name}.{key}": value for name, part in parts for key, value in select_changed_fields(part).items()}

    options = changed_options(model)
    other_options = [changed_options(other) for other in models if other is not model]
    differing = {
        key: value for key, value in options.items() if any(other.get(key) != value for other in other_options)
    }
    return ", ".join(f"{key} = {value}" for key, value in differing.items())


def _build_ratio_table(
    key: str,
    title: str,
    columns: tuple[Column, ...],
    scores: Sequence[FamilyScores],
    rows: Sequence[TableRow],
    kinds: Sequence[str],
) -> ResultTable:
    """Build a table of models by share of removed tokens.

    Args:
        key: name of the CSV file.
        title: heading.
        columns: the columns.
        scores: scores of each family.
        rows: rows that are listed as missing if no model matches them.
        kinds: kinds of models in the table, in this order.
    """
    blocks = {}
    for family_scores in scores:
        # Models of the kinds in question, sorted by kind and tokens.
        models = []
        for model in family_scores.family.models:
            kind = find_kind(model.methods, model.uses_captions)
            if model.trained_as_evaluated and kind in kinds:
                models.append((kinds.index(kind), -model.num_tokens, model))
        models.sort(key=lambda entry: entry[:2])
        # First the models, then the rows without one.
        lines = [
            _make_row(f"{KIND_TITLES[kinds[index]]}, {removed_share(model):.0%}", model, family_scores, columns)
            for index, _, model in models
        ]
        filled = [line for row in rows for line in _fill_row(row, family_scores, columns, None)]
        lines += [line for line in filled if line.source == "missing"]
        blocks[family_scores.family.label] = lines
    return ResultTable(key, title, columns, blocks)


def removed_share(model: ComparedModel) -> float:
    """Compute the share of the image tokens that a model removes."""
    return 1 - model.num_tokens / model.num_patches


def _build_full_table(key: str, title: str, columns: tuple[Column, ...], scores: Sequence[FamilyScores]) -> ResultTable:
    blocks = {}
    for family_scores in scores:
        family = family_scores.family
        blocks[family.label] = [
            _make_row(name_model(model, family), model, family_scores, columns) for model in _sort_models(family.models)
        ]
    return ResultTable(key, title, columns, blocks)


def _sort_models(models: Sequence[ComparedModel]) -> list[ComparedModel]:
    """Sort models in the order of KIND_TITLES, then by number of tokens, the most first."""
    positions = {kind: position for position, kind in enumerate(KIND_TITLES)}

    def sort_key(model: ComparedModel) -> tuple[int, int]:
        kind = str(find_kind(model.methods, model.uses_captions))
        return positions.get(kind, len(positions)), -model.num_tokens

    return sorted(models, key=sort_key)


def name_model(model: ComparedModel, family: Family) -> str:
    """Name a model by the methods of its training, with as much detail as separates it from the others of its family.

    If the evaluation had other methods than the training, the name says in what: "VMTC + CMAI, asked with CMAI off".
    """
    if model.is_foreign:
        return Path(model.checkpoint).name
    name = _name_methods(model)
    # Models that would have the same name without tokens or options.
    alike = [other for other in family.models if not other.is_foreign and _name_methods(other) == name]
    parts = [name]
    kind = find_kind(model.trained_with, model.uses_captions and model.trained_as_evaluated)
    is_unique = len(alike) == 1
    has_unique_tokens = [other.num_tokens for other in alike].count(model.num_tokens) == 1
    # The number of tokens is shorter than the options, if it is enough.
    if is_unique and kind is None:
        parts.append(_describe_options(model, family.models))
    elif not has_unique_tokens:
        parts.append(_describe_options(model, alike))
    elif not is_unique:
        parts.append(f"{model.num_tokens} tokens")
    return ", ".join(filter(None, parts))


def _name_methods(model: ComparedModel) -> str:
    """Name the methods with which a model was trained, and those with which it was asked if they are others."""
    kind = find_kind(model.trained_with, model.uses_captions and model.trained_as_evaluated)
    parts = [KIND_TITLES[kind] if kind else " + ".join(list_method_labels(model.trained_with))]
    changes = describe_changes(model.trained_with, model.methods)
    if kind != "upper-limit" and model.uses_captions:
        changes = ["captions", *changes]
    if changes:
        parts.append(f"asked with {' and '.join(changes)}")
    return ", ".join(parts)


def describe_changes(trained: Preset, applied: Preset) -> list[str]:
    """Describe the methods of an evaluation that differ from those of the training.

    >>> from redux.presets import PRESETS
    >>> describe_changes(PRESETS["default"], PRESETS["vmtc"]), describe_changes(PRESETS["llava"], PRESETS["tokens-64"])
    (['CMAI off'], ['VMTC (tokens = 64)', 'CMAI'])
    >>> describe_changes(PRESETS["default"], PRESETS["tokens-64"])
    ['VMTC (tokens = 64)']
    >>> describe_changes(PRESETS["llava"], PRESETS["prumerge"])
    ['PruMerge (tokens = 36)']
    """
    changes = []
    for part, title in METHOD_LABELS.items():
        trained_settings, applied_settings = trained.methods[part], applied.methods[part]
        if trained_settings == applied_settings:
            continue
        if applied_settings is None:
            changes.append(f"{title} off")
            continue
        values = asdict(applied_settings)
        # Fields of a method that the training did not have are compared with their defaults.
        references = (
            asdict(trained_settings)
            if trained_settings
            else {field.name: field.default for field in fields(applied_settings)}
        )
        # The method of a reduction has a title of its own.
        title = KIND_TITLES.get(values.pop("method", None), title)
        # A field at None follows from the others.
        differing = [
            _write_setting(key, value) for key, value in values.items() if value not in (None, references[key])
        ]
        changes.append(f"{title} ({', '.join(differing)})" if differing else title)
    return changes


def _write_setting(key: str, value: Any) -> str:
    """Write a setting of a method, a long list by its length."""
    return f"{len(value)} {key}" if isinstance(value, tuple) and len(value) > 3 else f"{key} = {value}"


def list_method_labels(methods: Preset) -> list[str]:
    """List the titles of methods that are on."""
    return [title for part, title in METHOD_LABELS.items() if methods.methods[part]]


# --- responses to the same prompts -----------------------------------------------------------------------------------


def compare_prompts(
    family: Family, score_instructions: Callable[[Sequence[Any]], dict[str, Metric]]
) -> list[ComparedPrompt]:
    """Collect the responses of all models to a few prompts, as Figure 4 shows them; each model by its first seed.

    The prompts are at equal distances in the list of all prompts, so they do not depend on the responses.

    Args:
        family: the models.
        score_instructions: the scorer of the task "instructions".
    """
    answers = {}
    for model in family.models:
        rows = jsonl.read(model.runs[0].folder / ANSWERS_FOLDER / "instructions.jsonl")
        if rows and find_kind(model.methods, model.uses_captions) in KIND_TITLES and model.trained_as_evaluated:
            answers[name_model(model, family)] = {row["id"]: row for row in rows}
    if not answers:
        return []
    # Only prompts that every model has answered.
    first_model_answers = next(iter(answers.values()))
    common = [id for id in first_model_answers if all(id in rows for rows in answers.values())]
    selected = common[:: max(len(common) // NUM_COMPARED_PROMPTS, 1)][:NUM_COMPARED_PROMPTS]
    prompts = []
    for id in selected:
        responses = []
        for label, row_by_id in answers.items():
            outcomes = score_instructions([row_by_id[id]])["strict"].outcomes
            responses.append((label, str(row_by_id[id]["response"]), any(outcome.value for outcome in outcomes)))
        prompts.append(ComparedPrompt(str(first_model_answers[id]["prompt"]), tuple(responses)))
    return prompts
