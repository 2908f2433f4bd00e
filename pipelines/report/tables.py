"""The paper's tables over finished runs: each score with its interval, beside the paper's own, and what is missing.

Every score is a mean over training seeds with a 95 % interval over items, and is compared with LLaVA, the row with
neither module, of the same family.  The paper's numbers stand in lines of their own: they are of other sizes and other
data.  A row that no run fills comes with the command that would.

The paper counts instructions that were followed, not whether the answer was right, and a model that ignores the image
can follow them; so besides its columns there are "right" and "both".

Cost: a bootstrap for each score and one for each difference, see `pipelines.evaluation.statistics`; some ten seconds
for twenty runs of 3,488 instructions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.core import jsonl
from pipelines.evaluation import statistics
from pipelines.evaluation.statistics import Difference, Interval
from pipelines.report import paper
from pipelines.report.runs import Family, Model, changes
from pipelines.report.table_rows import Slot, command, fills, kind
from redux.benchmarks import Metric
from redux.cost import compute_cost, compute_step_cost
from redux.instructions import INSTRUCTIONS
from redux.presets import PRESETS, Preset
from redux.settings import METHODS, SPATIAL_METHODS, VMTC, Reduction

TEXT = 64
"""Text tokens of the prompt whose cost is told."""

PROMPTS = 6
"""Of Figure 4."""


@dataclass(frozen=True)
class Column:
    """A column of our tables.

    source: a metric of the model's answers, or a name in COSTS.  factor: from it to what is shown; 100 for per cent.
    paper: what the paper's table calls it.  about: what it is, where the name does not say.
    """

    name: str
    source: str
    factor: float = 100.0
    paper: str | None = None
    show: str = "{:.1f}"
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """A number as shown.  interval, difference: None where there are no answers to draw from.  ratio: of a cost to
    LLaVA's."""

    value: float
    interval: Interval | None = None
    difference: Difference | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Line:
    """A model's cells, the paper's, or a row that is missing.

    source: "ours", "paper" or "missing".  about: seeds and tokens, or whose numbers these are.
    command: what would fill a missing row.  kind, removed: of a model, see `slots.kind`, and its tokens left out.
    """

    label: str
    source: str
    about: str = ""
    cells: tuple[Cell | None, ...] = ()
    command: str = ""
    kind: str | None = None
    removed: float | None = None


@dataclass(frozen=True)
class Table:
    """key: for names of files.  blocks: lines by family."""

    key: str
    title: str
    columns: tuple[Column, ...]
    blocks: dict[str, list[Line]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt of Figure 4 and what each model said: (label, response, followed)."""

    text: str
    said: tuple[tuple[str, str, bool], ...]


IF = Column("IF", "instructions.strict", paper="IF")
OURS = (Column("right", "instructions.right"), Column("both", "instructions.both"))
TASKS = tuple(
    Column(
        f"T{each.task}", f"instructions.strict.{each.name}", paper=f"T{each.task}", about=paper.TASKS[f"T{each.task}"]
    )
    for each in INSTRUCTIONS.values()
)
BENCHMARKS = (
    Column("GQA", "gqa.accuracy", paper="GQA"),
    Column("VQAv2", "vqav2.accuracy", paper="VQAv2"),
    Column("TextVQA", "textvqa.accuracy", paper="TextVQA"),
    Column("MME", "mme.perception", 1.0, "MME"),
    Column("MMB", "mmbench.accuracy", paper="MMB"),
    Column("easy-VQA", "easy_vqa.accuracy"),
)
UNDERSTANDING = {column.name: column for column in BENCHMARKS}
PILOT = (Column("JSON", "instructions.T9"), Column("Keywords", "instructions.T7"))
ABLATION = (UNDERSTANDING["GQA"], Column("TQA", "textvqa.accuracy", paper="TQA"), UNDERSTANDING["MME"], IF)

LLAVA = Slot("LLaVA-1.5", PRESETS["llava"], "LLaVA-1.5-{size}")
BOTH = Slot("VMTC + CMAI", PRESETS["default"], "Ours-{size}")
SLOTS = {
    "table-1": (
        LLAVA,
        Slot("SPD", PRESETS["spd"], "SPD-{size}"),
        Slot("Upper limit", PRESETS["llava"], "Upper Limit-{size}", described=True),
        BOTH,
    ),
    "table-2": (
        *(Slot(name, None, name) for name in list(paper.TABLE_2.rows)[:9]),
        LLAVA,
        BOTH,
        Slot("InstructBLIP", None, "InstructBLIP-7B, 64 tokens", checkpoint="Salesforce/instructblip-vicuna-7b"),
        Slot("InstructBLIP", None, "InstructBLIP-13B, 64 tokens", checkpoint="Salesforce/instructblip-vicuna-13b"),
        Slot("VMTC + CMAI, 64 of 576 tokens", PRESETS["tokens-64"], "Ours-{size}, 64 tokens"),
        Slot("BLIP-2-13B", None, "BLIP-2-13B, 36 tokens"),
        Slot("PruMerge, 36 of 576 tokens", PRESETS["prumerge"], "LLaVA-Prumerge-{size}, 36 tokens"),
        Slot("VMTC + CMAI, 36 of 576 tokens", PRESETS["tokens-36"], "Ours-{size}, 36 tokens"),
        Slot("Random places", PRESETS["random"]),
    ),
    "table-3": (
        Slot("neither", PRESETS["llava"], "neither"),
        Slot("VMTC", PRESETS["vmtc"], "VMTC"),
        Slot("CMAI", PRESETS["cmai"], "CMAI"),
        Slot("VMTC + CMAI", PRESETS["default"], "VMTC, CMAI"),
    ),
    "table-4": (
        Slot("no VMTC", PRESETS["cmai"], "none"),
        Slot("LLP", PRESETS["llp"], "LLP"),
        Slot("LWP", PRESETS["lwp"], "LWP"),
        Slot("LWP + MG", PRESETS["lwp-mg"], "LWP, MG"),
        Slot("LWP + MG + CLST", PRESETS["lwp-mg-clst"], "LWP, MG, CLST"),
    ),
    "table-5": (
        Slot("no CMAI", PRESETS["vmtc"], "No CMAI"),
        Slot("TIA", PRESETS["tia"], "+ TIA"),
        Slot("Sum TIA", PRESETS["sum-tia"], "+ Sum TIA"),
        Slot("Discounted Sum TIA", PRESETS["discounted-sum-tia"], "+ Discounted Sum TIA"),
        Slot("Neighbourhood", PRESETS["default"], "Ours"),
    ),
}
COLUMNS = {
    "table-1": (*TASKS, Column("AVG", IF.source, paper="AVG"), *OURS, UNDERSTANDING["GQA"]),
    "table-2": (IF, *(UNDERSTANDING[name] for name in ("VQAv2", "GQA", "TextVQA", "MME", "MMB")), OURS[1]),
    **dict.fromkeys(("table-3", "table-4", "table-5"), (*ABLATION, *OURS)),
}
KINDS = {
    "llava": "LLaVA-1.5",
    "both": "VMTC + CMAI",
    "vmtc": "VMTC",
    "cmai": "CMAI",
    "average": "SPD, average",
    "stride": "SPD, stride",
    "bilinear": "SPD, bilinear",
    "random": "Random places",
    "prumerge": "PruMerge",
    "llp": "LLP + CMAI",
    "lwp": "LWP + CMAI",
    "lwp-mg": "LWP + MG + CMAI",
    "tia": "VMTC + TIA",
    "sum": "VMTC + Sum TIA",
    "discounted": "VMTC + Discounted Sum TIA",
    "upper-limit": "Upper limit",
}
SPD_RATIOS = (0.25, 0.5, 0.75, 0.9)
SWEEP = tuple(round(0.1 * tenth, 1) for tenth in range(10))


class Comparison:
    """A family's scores, each drawn once, beside those of its LLaVA."""

    def __init__(self, family: Family, samples: int) -> None:
        self.family, self.samples = family, samples
        self.base = next((model for model in family.models if fills(model, LLAVA)), None)
        self.known: dict[tuple[Model, str], Cell | None] = {}

    def cell(self, model: Model, column: Column) -> Cell | None:
        """None where the model was not asked."""
        if (model, column.source) not in self.known:
            self.known[model, column.source] = self._cell(model, column)
        return self.known[model, column.source]

    def _cell(self, model: Model, column: Column) -> Cell | None:
        if column.source in COSTS:
            return self._spent(model, COSTS[column.source])
        metrics = model.metrics(column.source)
        if not metrics:
            number = model.number(column.source)
            return None if number is None else Cell(number * column.factor)
        base = self.base.metrics(column.source) if self.base and self.base is not model else []
        try:
            own = statistics.interval(metrics, self.samples).scaled(column.factor)
            more = statistics.difference(metrics, base, self.samples).scaled(column.factor) if base else None
        except ValueError as error:
            folders = [str(run.folder) for each in (model, self.base) if each for run in each.runs]
            raise ValueError(f"{column.source} of {', '.join(folders)}: {error}") from None
        return Cell(own.value, own, more)

    def _spent(self, model: Model, spent: Callable[[Model], float | None]) -> Cell | None:
        value, base = spent(model), spent(self.base) if self.base else None
        return None if value is None else Cell(value, ratio=value / base if base and self.base is not model else None)


def build(families: Sequence[Family], samples: int = 10_000) -> list[Table]:
    """All models; Tables 1 to 5 and Figure 2; the sweep of ratios; what is spent.

    samples: draws of each bootstrap.
    Raises ValueError where models of a family were not asked the same.
    """
    compared = [Comparison(family, samples) for family in families]
    asked = {name for family in families for model in family.models for run in model.runs for name in run.metrics}
    beside = tuple(column for column in BENCHMARKS if column.source in asked)
    scores = _with((IF, *OURS), beside)
    whole = _everything("models", "All models", scores, compared)
    printed = [
        _table(key, each.title, _with(COLUMNS[key], beside), compared, SLOTS[key], each)
        for key, each in paper.TABLES.items()
    ]
    pilot = ("llava", *SPATIAL_METHODS)
    kinds = ("llava", "both", "vmtc", *SPATIAL_METHODS, "random", "prumerge")
    return [
        whole,
        *printed,
        _ladder("figure-2", "Figure 2: spatial down-sampling", _with(PILOT, beside), compared, _spd(), pilot),
        _ladder("ratios", "How much can be left out", scores, compared, _sweep(), kinds),
        _everything("spent", "What it costs", SPENT, compared),
    ]


def _with(columns: Sequence[Column], beside: Sequence[Column]) -> tuple[Column, ...]:
    """And what else was asked, under the table's own names."""
    return (*columns, *(column for column in beside if column.source not in {each.source for each in columns}))


def _table(
    key: str,
    title: str,
    columns: tuple[Column, ...],
    compared: Sequence[Comparison],
    slots: Sequence[Slot],
    printed: paper.Table,
) -> Table:
    blocks = {
        each.family.label: [line for slot in slots for line in _slot(slot, each, columns, printed)] for each in compared
    }
    return Table(key, title, columns, blocks, printed.notes)


def _slot(slot: Slot, compared: Comparison, columns: Sequence[Column], printed: paper.Table | None) -> Iterator[Line]:
    """The models that fill a row, or the command that makes one, and the paper's own."""
    models = [model for model in compared.family.models if fills(model, slot)]
    for model in models:
        label = slot.label if len(models) == 1 else f"{slot.label} ({_options(model, models) or 'defaults'})"
        yield _line(label, model, compared, columns)
    if not models and (slot.preset or slot.checkpoint):
        yield Line(slot.label, "missing", "missing", command=command(slot, compared.family))
    for size, name in _printed_as(slot, compared.family, printed):
        assert printed is not None
        values = [printed.cell(name, column.paper) if column.paper else None for column in columns]
        if any(value is not None for value in values):
            cells = tuple(None if value is None else Cell(value) for value in values)
            yield Line(slot.label, "paper", f"paper, {size}, other data" if size else "paper", cells)


def _printed_as(slot: Slot, family: Family, printed: paper.Table | None) -> list[tuple[str, str]]:
    """Sizes, and names in the paper's table, of its like of a row."""
    if printed is None or slot.paper is None:
        return []
    if "{size}" in slot.paper:
        return [(size, slot.paper.format(size=size)) for size in ([family.size] if family.size else ["7B", "13B"])]
    return [("7B" if slot.preset else "", slot.paper)]  # Tables 3 to 5 are of one size


def _line(label: str, model: Model, compared: Comparison, columns: Sequence[Column]) -> Line:
    seeds = f"{model.seeds} seed" + "s" * (model.seeds > 1)
    cells = tuple(compared.cell(model, column) for column in columns)
    if model.foreign:
        return Line(label, "ours", "not trained here", cells)
    about = f"{seeds}, {model.tokens} of {model.patches} tokens"
    own = kind(model.methods, model.described) if model.trained else None
    return Line(label, "ours", about, cells, kind=own, removed=removed(model))


def _options(model: Model, beside: Sequence[Model]) -> str:
    """The settings in which a model differs from others, where they are not at their defaults."""

    def told(each: Model) -> dict[str, Any]:
        parts = {name: part for name, part in each.methods.methods.items() if part}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in changes(part).items()}

    others = [told(each) for each in beside if each is not model]
    return ", ".join(
        f"{key} = {value}" for key, value in told(model).items() if any(other.get(key) != value for other in others)
    )


def _ladder(
    key: str,
    title: str,
    columns: tuple[Column, ...],
    compared: Sequence[Comparison],
    slots: Sequence[Slot],
    kinds: Sequence[str],
) -> Table:
    """Models of some kinds, each by the share of tokens that it leaves out, and the rungs that are missing."""
    blocks = {}
    for each in compared:
        own = [(str(kind(model.methods, model.described)), model) for model in each.family.models if model.trained]
        rungs = sorted(((kinds.index(name), -model.tokens, model) for name, model in own if name in kinds), key=_first)
        blocks[each.family.label] = [
            *(_line(f"{KINDS[kinds[place]]}, {removed(model):.0%}", model, each, columns) for place, _, model in rungs),
            *(line for slot in slots for line in _slot(slot, each, columns, None) if line.source == "missing"),
        ]
    return Table(key, title, columns, blocks)


def _first(rung: tuple[int, int, Model]) -> tuple[int, int]:
    return rung[:2]


def removed(model: Model) -> float:
    """Share of an image's tokens that a model leaves out."""
    return 1 - model.tokens / model.patches


def _spd() -> list[Slot]:
    """The paper does not tell its ratios in words; these are ours."""
    return [
        Slot(
            f"SPD {ratio:.0%}",
            Preset(description="", vmtc=None, cmai=None, reduction=Reduction(method="average", ratio=ratio)),
        )
        for ratio in SPD_RATIOS
    ]


def _sweep() -> list[Slot]:
    presets = {ratio: Preset(description="", vmtc=VMTC(ratio=ratio)) for ratio in SWEEP} | {0.5: PRESETS["default"]}
    return [Slot(f"VMTC + CMAI {ratio:.0%}", preset) for ratio, preset in presets.items()]


def _everything(
    key: str,
    title: str,
    columns: tuple[Column, ...],
    compared: Sequence[Comparison],
) -> Table:
    blocks = {
        each.family.label: [
            _line(name(model, each.family), model, each, columns) for model in _sorted(each.family.models)
        ]
        for each in compared
    }
    return Table(key, title, columns, blocks)


def _sorted(models: Sequence[Model]) -> list[Model]:
    """In the order of KINDS, and those that leave more of an image first."""
    places = {own: place for place, own in enumerate(KINDS)}
    return sorted(models, key=lambda each: (places.get(str(kind(each.methods, each.described)), 99), -each.tokens))


def name(model: Model, family: Family) -> str:
    """What tells a model from the others of its family, in few words."""
    if model.foreign:
        return Path(model.checkpoint).name
    own, parts = kind(model.methods, model.described), _parts(model)
    alike = [
        each for each in family.models if (kind(each.methods, each.described), each.trained) == (own, model.trained)
    ]
    if own is None:
        alike = [each for each in family.models if _parts(each) == parts]
    told = [KINDS[own] if own else " + ".join(parts)]
    told += ["described"] * (own is None and model.described) + ["not trained with it"] * (not model.trained)
    if [each.tokens for each in alike].count(model.tokens) > 1 or (own is None and len(alike) == 1):
        told.append(_options(model, alike if len(alike) > 1 else family.models))
    elif len(alike) > 1:
        told.append(f"{model.tokens} tokens")
    return ", ".join(filter(None, told))


def _parts(model: Model) -> list[str]:
    names = {"vmtc": "VMTC", "cmai": "CMAI", "reduction": "Reduction"}
    return [names[part] for part in METHODS if model.methods.methods[part]]


# --- what is spent ---------------------------------------------------------------------------------------------------


def _trained(model: Model) -> float | None:
    seconds = [run.trained_s for run in model.runs if run.trained_s is not None]
    return sum(seconds) / len(seconds) / 60 if seconds else None


def _number(name: str, factor: float = 1.0) -> Callable[[Model], float | None]:
    def spent(model: Model) -> float | None:
        number = model.number(name)
        return None if number is None else number * factor

    return spent


def _computed(of: Callable[[Any], float]) -> Callable[[Model], float | None]:
    return lambda model: of(model.runs[0].config) if model.runs[0].config and not model.described else None


COSTS: dict[str, Callable[[Model], float | None]] = {
    "training": _trained,
    "evaluation": _number("wall_s.evaluate", 1 / 60),
    "peak": _number("speed.peak_bytes", 2**-30),
    "decode": _number("speed.decode_tokens_per_s"),
    "prompt": _computed(lambda config: compute_cost(config, TEXT).flops / 1e9),
    "step": _computed(lambda config: compute_step_cost(config, TEXT).flops / 1e9),
    "cache": _computed(
        lambda config: (compute_cost(config, TEXT).kv_bytes + compute_cost(config, TEXT).focus_bytes) / 2**20
    ),
}
"""Means over seeds of what was measured, and what follows from the configuration; None where it is not known."""

SPENT = (
    Column("training, min", "training"),
    Column("evaluation, min", "evaluation"),
    Column("peak memory, GiB", "peak", show="{:.2f}"),
    Column("tokens decoded a second", "decode", show="{:,.0f}"),
    Column(f"GFLOPs of a prompt of {TEXT} text tokens", "prompt", show="{:,.3g}"),
    Column("GFLOPs of a token after it", "step", show="{:,.3g}"),
    Column("caches, MiB", "cache", show="{:,.3g}"),
)


# --- answers side by side --------------------------------------------------------------------------------------------


def prompts(family: Family, followed: Callable[[Sequence[Any]], dict[str, Metric]]) -> list[Prompt]:
    """Figure 4: what the models answered to the same few prompts, each by its first seed.

    The prompts are those at equal distances in the list of all, chosen by place and not by what was answered.
    followed: the scorer of instructions.
    """
    answers = {}
    for model in family.models:
        rows = jsonl.read(model.runs[0].folder / "answers" / "instructions.jsonl")
        if rows and kind(model.methods, model.described) in KINDS and model.trained:
            answers[name(model, family)] = {row["id"]: row for row in rows}
    if not answers:
        return []
    first = next(iter(answers.values()))
    common = [id for id in first if all(id in rows for rows in answers.values())]
    places = range(0, len(common), max(len(common) // PROMPTS, 1)) if common else ()
    return [
        Prompt(
            str(first[id]["prompt"]),
            tuple(
                (label, str(rows[id]["response"]), any(o.value for o in followed([rows[id]])["strict"].outcomes))
                for label, rows in answers.items()
            ),
        )
        for id in [common[place] for place in places][:PROMPTS]
    ]
