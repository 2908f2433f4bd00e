"""Columns of the paper's tables: scores of benchmarks and instructions, and costs.

A score is a metric of the answers. A cost is measured (training time, memory, decoding speed) or computed from the
configuration of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.report import paper
from pipelines.report.runs import ComparedModel
from redux.cost import compute_cost, compute_step_cost
from redux.instructions import INSTRUCTIONS

PROMPT_TEXT_TOKENS = 64
"""Number of text tokens in the prompt whose cost is shown."""


@dataclass(frozen=True)
class Column:
    """A column of our tables.

    Args:
        name: heading of the column.
        source: a metric of the answers, or a name in COST_FUNCTIONS.
        factor: factor from the metric to the number that is shown; 100 for per cent.
        paper: name of the column in the paper.
        number_format: format string of the number.
        about: explanation of the name.
    """

    name: str
    source: str
    factor: float = 100.0
    paper: str | None = None
    number_format: str = "{:.1f}"
    about: str = ""

    @property
    def counts_points(self) -> bool:
        """True for a benchmark with points of its own, as MME; the others are shares of correct answers."""
        return self.factor == 1


IF_COLUMN = Column("IF", "instructions.strict", paper="IF")
CORRECTNESS_COLUMNS = (Column("right", "instructions.right"), Column("both", "instructions.both"))
MEASURE_COLUMNS = (
    IF_COLUMN,
    Column("loose", "instructions.loose", about="first and last line, and asterisks, are forgiven as in IFEval"),
    Column("taught", "instructions.strict_taught", about="of the sixteen, those that the training text teaches"),
    Column("untaught", "instructions.strict_untaught", about="of the sixteen, those that no training text teaches"),
    Column("held out", "instructions_held_out.strict", about="constraints of other kinds, in no training text"),
    Column("held out, loose", "instructions_held_out.loose"),
    Column("pairs", "instruction_pairs.strict", about="of two instructions in one prompt, those followed"),
    Column("pairs, both", "instruction_pairs.prompt_strict", about="prompts of which both are followed"),
    Column("no image", "instructions_without_image.strict", about="the sixteen, asked by text alone without the image"),
    *CORRECTNESS_COLUMNS,
    Column("words", "instructions.words", 1.0, about="mean number of words of an answer"),
    Column("image attention", "instructions.image_mass", about="attention of answers to image tokens, per cent"),
    Column(
        "dominance",
        "instructions.dominance",
        1.0,
        number_format="{:.2f}",
        about="attention to a text token over that to an image token, see redux/attention_mass.py",
    ),
)
"""Measures of instruction following beside the paper's."""

INSTRUCTION_COLUMNS = tuple(
    Column(
        f"T{instruction.task}",
        f"instructions.strict.{instruction.name}",
        paper=f"T{instruction.task}",
        about=paper.TASK_TITLES[f"T{instruction.task}"],
    )
    for instruction in INSTRUCTIONS.values()
)
BENCHMARK_COLUMNS = (
    Column("GQA", "gqa.accuracy", paper="GQA"),
    Column("VQAv2", "vqav2.accuracy", paper="VQAv2"),
    Column("TextVQA", "textvqa.accuracy", paper="TextVQA"),
    Column("MME", "mme.perception", 1.0, "MME"),
    Column("MMB", "mmbench.accuracy", paper="MMB"),
    Column("easy-VQA", "easy_vqa.accuracy"),
)
"""Main metric of each benchmark of understanding."""

COLUMN_BY_BENCHMARK = {column.name: column for column in BENCHMARK_COLUMNS}
PILOT_COLUMNS = (Column("JSON", "instructions.strict.json"), Column("Keywords", "instructions.strict.keywords"))
ABLATION_COLUMNS = (
    COLUMN_BY_BENCHMARK["GQA"],
    Column("TQA", "textvqa.accuracy", paper="TQA"),
    COLUMN_BY_BENCHMARK["MME"],
    IF_COLUMN,
)
TABLE_COLUMNS = {
    "table-1": (
        *INSTRUCTION_COLUMNS,
        Column("AVG", IF_COLUMN.source, paper="AVG"),
        *CORRECTNESS_COLUMNS,
        COLUMN_BY_BENCHMARK["GQA"],
    ),
    "table-2": (
        IF_COLUMN,
        *(COLUMN_BY_BENCHMARK[name] for name in ("VQAv2", "GQA", "TextVQA", "MME", "MMB")),
        CORRECTNESS_COLUMNS[1],
    ),
    **dict.fromkeys(("table-3", "table-4", "table-5"), (*ABLATION_COLUMNS, *CORRECTNESS_COLUMNS)),
}
"""Columns of each table of the paper."""


def _mean_training_minutes(model: ComparedModel) -> float | None:
    seconds = [run.training_s for run in model.runs if run.training_s is not None]
    return sum(seconds) / len(seconds) / 60 if seconds else None


def _from_metrics(name: str, factor: float = 1.0) -> Callable[[ComparedModel], float | None]:
    """Make a cost function that reads a number of metrics.json."""

    def read(model: ComparedModel) -> float | None:
        number = model.mean_number(name)
        return None if number is None else number * factor

    return read


def _from_config(compute: Callable[[Any], float]) -> Callable[[ComparedModel], float | None]:
    """Make a cost function of the model's configuration; captions cost a second prompt, so they have no value."""

    def read(model: ComparedModel) -> float | None:
        config = model.runs[0].config
        return compute(config) if config and not model.uses_captions else None

    return read


def _cache_mebibytes(config: Any) -> float:
    prompt = compute_cost(config, PROMPT_TEXT_TOKENS)
    return (prompt.kv_bytes + prompt.focus_bytes) / 2**20


COST_FUNCTIONS: dict[str, Callable[[ComparedModel], float | None]] = {
    "training": _mean_training_minutes,
    "evaluation": _from_metrics("wall_s.evaluate", 1 / 60),
    "peak": _from_metrics("speed.peak_bytes", 2**-30),
    "decode": _from_metrics("speed.decode_tokens_per_s"),
    "prompt": _from_config(lambda config: compute_cost(config, PROMPT_TEXT_TOKENS).flops / 1e9),
    "step": _from_config(lambda config: compute_step_cost(config, PROMPT_TEXT_TOKENS).flops / 1e9),
    "cache": _from_config(_cache_mebibytes),
}
"""Costs of a model: measured ones as means over seeds, others computed from its configuration; None if unknown."""

COST_COLUMNS = (
    Column("training, min", "training"),
    Column("evaluation, min", "evaluation"),
    Column("peak memory, GiB", "peak", number_format="{:.2f}"),
    Column("decoded tokens per second", "decode", number_format="{:,.0f}"),
    Column(f"GFLOPs of a prompt with {PROMPT_TEXT_TOKENS} text tokens", "prompt", number_format="{:,.3g}"),
    Column("GFLOPs of the next token", "step", number_format="{:,.3g}"),
    Column("caches, MiB", "cache", number_format="{:,.3g}"),
)
