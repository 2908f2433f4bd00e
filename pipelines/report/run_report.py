"""Report of a run: one HTML file that needs neither the run folder nor a network, for mail and archives.

Images are data URIs, plots are SVG. The page runs no script, and its content security policy forbids any. Texts from
questions and answers are escaped. The report shows what the run folder has and leaves out the rest.

Cost: every line of `metrics.jsonl` and `answers/easy_vqa.jsonl` is read into memory. A run of 10,000 steps and 10,000
questions takes about two seconds, mostly in matplotlib. Importing this module is cheap: job files are validated against
`Report`, so heavy packages are imported by the functions that need them.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import math
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from annotated_types import Ge

from pipelines.core import jsonl
from pipelines.evaluation.answer_files import ANSWERS_FOLDER, PROVENANCE_FILE
from pipelines.report import page
from pipelines.report.page import format_number
from pipelines.report.plots import ACCENT, FAINT, INK, STYLE, style_axes, to_svg
from pipelines.training import ledger
from pipelines.training.ledger import Account, LoopTime
from pipelines.training.metrics import VALIDATION_LOSS
from redux.extras import write_install_command

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from markupsafe import Markup
    from matplotlib.axes import Axes

    from pipelines.evaluation.evaluate import Example

PACKAGES = ("redux-vlm", "torch", "ray", "transformers", "deepspeed")
STAGE_TITLES = {"tower": "Image tower", "pretrain": "Pretraining", "instruct": "Instruction tuning"}
# parts of the wall time by their name in the ledger: title, colour and opacity
TIME_PARTS = {
    "productive": ("computing", "good", 1.0),
    "evaluation": ("evaluating", "accent", 1.0),
    "data": ("waiting for data", "accent", 0.6),
    "checkpoint": ("checkpoints", "accent", 0.35),
    "startup": ("starting up", "faint", 0.7),
    "other": ("other", "faint", 0.35),
    "restart": ("restarting", "bad", 0.5),
    "lost": ("repeated steps", "bad", 1.0),
}
OVERALL_TITLES = {"strict": "all, strict", "loose": "all, loose", "both": "all, and correct"}
MAX_CONFUSIONS = 8


@dataclass(frozen=True, kw_only=True)
class Report:
    """Settings of the HTML report.

    Args:
        examples: number of test images that are shown with their patches, question and answers.
    """

    examples: Annotated[int, Ge(0)] = 5


class Score(NamedTuple):
    """Accuracy with its Wilson 95 % interval."""

    name: str
    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.questions)


class BootstrapScore(NamedTuple):
    """Accuracy with a bootstrap interval, for prompts that depend on each other because they share a question."""

    name: str
    questions: int
    correct: int
    accuracy: float
    interval: tuple[float, float]


class Confusion(NamedTuple):
    """A wrong response, its count, and its share of the questions with the same reference answer."""

    answer: str
    response: str
    times: int
    share: float


class Throughput(NamedTuple):
    """Sums over the steps of a stage, without repeated ones; seconds are those of the ledger."""

    stage: str
    steps: int
    samples: float
    tokens: float
    loop: LoopTime

    def per_second(self, amount: float) -> float:
        return amount / self.loop.total if self.loop.total else math.nan

    @property
    def waiting(self) -> float:
        """Share of the training loop that waits for data."""
        return self.loop.data / self.loop.total if self.loop.total else math.nan


class TimePart(NamedTuple):
    """A part of the wall time, as a segment of a bar.

    Args:
        name: title.
        seconds: its length.
        share: its share of the wall time.
        before: share of all parts before it.
        colour: CSS variable of its colour.
        opacity: opacity of its colour.
    """

    name: str
    seconds: float
    share: float
    before: float
    colour: str
    opacity: float


class LossPlot(NamedTuple):
    """Loss curve of a stage."""

    stage: str
    last: float
    steps: int
    svg: Markup


class ExamplePanel(NamedTuple):
    """An example with its images as data URIs.

    Args:
        example: question and answers.
        original: the image as the model sees it.
        patches: the image with its patches marked.
        before: number of patches.
        after: number of tokens.
        kept: number of patches with a token of their own.
        merged: number of patches in clusters.
        clusters: number of clusters.
        dropped: number of patches without a token.
    """

    example: Example
    original: str
    patches: str
    before: int
    after: int
    kept: int
    merged: int
    clusters: int
    dropped: int


def write_report(run: Path, examples: Sequence[Example]) -> Path:
    """Write `run/report.html` in one atomic step, and return its path.

    Reads, if they exist: job.yaml, metrics.json (dotted name -> number), metrics.jsonl (one step per line), answers/
    (one question per line) and ledger.jsonl (one event per line).
    """
    return page.write(run / "report.html", _render(run, examples))


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute the score interval of a share (E. B. Wilson 1927, JASA 22, p. 209-212).

    Unlike share ± z·sd, the interval stays within 0..1 and does not vanish for 0 or n successes. For n = 0 it is
    (0, 1).

    Args:
        successes: number of successes.
        n: number of trials.
        z: quantile of the normal distribution; 1.96 gives 95 %.
    """
    if not n:
        return 0.0, 1.0
    fraction = successes / n
    centre = fraction + z * z / (2 * n)
    half = z * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _render(run: Path, examples: Sequence[Example]) -> str:
    # every file may be missing: the report then leaves out its section
    job = _read_text(run / "job.yaml")
    metrics = json.loads(_read_text(run / "metrics.json") or "{}")
    provenance = json.loads(_read_text(run / ANSWERS_FOLDER / PROVENANCE_FILE) or "{}")
    stages = _group_by_stage(jsonl.read(run / "metrics.jsonl"))
    answers = _judge_answers(run / ANSWERS_FOLDER / "easy_vqa.jsonl")
    book = ledger.read_ledger(run)
    return page.render(
        "report.html.j2",
        # header
        name=_read_name(job) or run.resolve().name,
        total=_compute_total(metrics, answers),
        wall_s=metrics.get("wall_s"),
        # answers
        scores=_score_by_type(answers),
        overall=Score("all", sum(row["correct"] for row in answers), len(answers)),
        confusions=_count_confusions(answers),
        wrong=sum(not row["correct"] for row in answers),
        followed=_score_instructions(jsonl.read(run / ANSWERS_FOLDER / "instructions.jsonl")),
        splitter=provenance.get("splitter"),
        punkt_command=write_install_command("instructions"),
        panels=[_make_panel(example) for example in examples],
        # training and time
        plots=[_plot_loss(stage, rows) for stage, rows in stages.items()],
        throughput=[
            _sum_throughput(stage, rows, book.loops[stage]) for stage, rows in stages.items() if stage in book.loops
        ],
        spans=_split_wall_time(metrics),
        account=book.account,
        parts=_make_time_parts(book.account),
        # provenance
        job=job,
        metrics=metrics,
        versions=_read_versions(),
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _judge_answers(path: Path) -> list[dict[str, Any]]:
    from pipelines.data import easy_vqa

    return [row | {"correct": easy_vqa.is_correct(row)} for row in jsonl.read(path)]


def _read_name(job: str) -> str | None:
    import yaml

    values = yaml.safe_load(job)
    return str(values["name"]) if isinstance(values, Mapping) and values.get("name") else None


def _group_by_stage(steps: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group steps by stage, in the order of the record."""
    stages: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for step in steps:
        stages[step["stage"]].append(step)
    return dict(stages)


def _compute_total(metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> Score | None:
    """Compute the accuracy of the header: from the metrics, or from the answers if the metrics lack it."""
    questions = int(metrics.get("easy_vqa.questions", len(answers)))
    if not questions:
        return None
    accuracy = metrics.get("easy_vqa.accuracy")
    correct = sum(row["correct"] for row in answers) if accuracy is None else round(accuracy * questions)
    return Score("all", correct, questions)


def _score_by_type(answers: Iterable[Mapping[str, Any]]) -> list[Score]:
    """Compute the accuracy of each type of question, the most frequent type first."""
    questions = Counter[str]()
    correct = Counter[str]()
    for row in answers:
        questions[row["type"]] += 1
        correct[row["type"]] += row["correct"]
    return [Score(name, correct[name], count) for name, count in questions.most_common()]


def _score_instructions(rows: Sequence[Mapping[str, Any]]) -> list[BootstrapScore]:
    """Compute how often each instruction is followed (strict), then the scores over all instructions."""
    if not rows:
        return []
    from pipelines.evaluation import statistics
    from redux.benchmarks import instructions

    metrics = instructions.compute_metrics(rows)
    prefix = "strict."
    titles = {name: name.removeprefix(prefix) for name in metrics if name.startswith(prefix)}
    titles |= {name: title for name, title in OVERALL_TITLES.items() if name in metrics}
    scores = []
    for name, title in titles.items():
        interval = statistics.bootstrap_interval([metrics[name]])
        count = len(metrics[name].outcomes)
        # the score is a mean over instructions, so the count is recovered from it
        correct = round(interval.value * count)
        scores.append(BootstrapScore(title, count, correct, interval.value, (interval.low, interval.high)))
    return scores


def _count_confusions(answers: Iterable[Mapping[str, Any]]) -> list[Confusion]:
    questions = Counter[str]()
    wrong = Counter[tuple[str, str]]()
    for row in answers:
        # the share of a confusion is relative to all questions with the same reference answer
        questions[row["answer"]] += 1
        if not row["correct"]:
            wrong[row["answer"], row["response"].strip()] += 1
    return [
        Confusion(answer, response, times, times / questions[answer])
        for (answer, response), times in wrong.most_common(MAX_CONFUSIONS)
    ]


def _sum_throughput(stage: str, rows: Sequence[Mapping[str, Any]], loop: LoopTime) -> Throughput:
    samples, tokens = (sum(row.get(key) or 0.0 for row in rows) for key in ("samples", "tokens"))
    return Throughput(STAGE_TITLES.get(stage, stage), len(rows), samples, tokens, loop)


def _split_wall_time(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """List the seconds of each step of the job ("wall_s.tower"), and the seconds between steps."""
    prefix = "wall_s."
    # time outside the steps is shown from half a second on
    spans = [(name.removeprefix(prefix), seconds) for name, seconds in metrics.items() if name.startswith(prefix)]
    unassigned_s = metrics.get("wall_s", 0.0) - sum(seconds for _, seconds in spans)
    return [*spans, ("between steps", unassigned_s)] if spans and unassigned_s >= 0.5 else spans


def _make_time_parts(account: Account) -> list[TimePart]:
    """Make the segments of the wall time; an empty list if no time has passed."""
    total = account.total
    if not total:
        return []
    parts = []
    before = 0.0
    for key, (name, colour, opacity) in TIME_PARTS.items():
        seconds = getattr(account, key)
        parts.append(TimePart(name, seconds, seconds / total, before, colour, opacity))
        before += seconds / total
    return parts


def _plot_loss(stage: str, rows: Sequence[Mapping[str, Any]]) -> LossPlot:
    """Plot the loss over steps, raw and smoothed, with the learning rate in the background."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    name = STAGE_TITLES.get(stage, stage)
    step = np.array([row["step"] for row in rows])
    loss = _read_column(rows, "loss")
    smoothed = smooth_curve(loss)
    last = float(smoothed[-1])
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7, 2.6), layout="constrained")
        axes = figure.add_subplot()
        _plot_learning_rate(axes, step, _read_column(rows, "learning_rate"))
        marker = "o" if len(rows) == 1 else ""  # a single step has no line
        axes.plot(step, loss, color=ACCENT, linewidth=0.6, alpha=0.4)
        axes.plot(step, smoothed, color=ACCENT, linewidth=1.8, marker=marker, markersize=4)
        validated = _read_column(rows, VALIDATION_LOSS)
        shown = np.isfinite(validated)
        label = f"{name}: loss over {len(rows)} steps, at the end {format_number(last)}"
        if shown.any():
            points = (step[shown], validated[shown])
            axes.plot(*points, color=INK, linewidth=1, linestyle="--", marker="o", markersize=3, label="validation")
            axes.legend(frameon=False, fontsize=8, loc="lower left")
            label += f"; validation loss {format_number(float(points[1][-1]))}"
        _scale_loss_axis(axes, np.concatenate([loss, validated]))
        return LossPlot(name, last, len(rows), to_svg(figure, f"{stage}-", label))


def _read_column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    import numpy as np

    return np.array([row.get(key) for row in rows], dtype=float)


def smooth_curve(values: np.ndarray) -> np.ndarray:
    """Smooth a curve by the mean over a window of a twenty-fifth of its length, centred on each step.

    A centred window has no lag, unlike an exponential moving average. NaN is skipped; a window of NaN alone gives NaN.
    """
    import numpy as np

    window = np.ones(2 * (len(values) // 50) + 1)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    counts = np.convolve(finite.astype(float), window, "same")
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0.5)


def _plot_learning_rate(axes: Axes, step: np.ndarray, rate: np.ndarray) -> None:
    """Plot the learning rate behind the loss, on a second y axis without ticks."""
    import numpy as np

    if len(step) < 2 or not np.isfinite(rate).any() or not np.nanmax(rate) > 0:
        return
    twin = axes.twinx()
    twin.fill_between(step, rate, color=FAINT, alpha=0.12, linewidth=0)
    twin.plot(step, rate, color=FAINT, linewidth=0.8, alpha=0.6)
    twin.set_ylim(0, float(np.nanmax(rate)) * 1.15)
    twin.set_axis_off()
    twin.text(0.99, 0.985, f"learning rate, peak {np.nanmax(rate):.2g}", transform=twin.transAxes,
              ha="right", va="top", color=FAINT, fontsize=8)  # fmt: skip
    # matplotlib draws a twin axis on top; move the loss in front, without its background
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)


def _scale_loss_axis(axes: Axes, loss: np.ndarray) -> None:
    """Use a logarithmic axis with plain numbers if the loss spans more than a factor of five."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    finite = loss[np.isfinite(loss)]
    # a linear axis would flatten the end of a curve that falls far
    if finite.size and finite.min() > 0 and finite.max() / finite.min() > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    style_axes(axes)


def _make_panel(example: Example) -> ExamplePanel:
    from redux import picture

    slot = example.slot
    merged = example.merged
    # see Example for the two arrays
    dropped = slot < 0
    clustered = merged & ~dropped
    return ExamplePanel(
        example,
        original=_encode_png(picture.enlarge_image(example.image, slot.size)),
        patches=_encode_png(picture.draw_patches(example.image, slot, merged)),
        before=slot.size,
        after=len(set(slot[~dropped].tolist())),
        kept=int((~merged & ~dropped).sum()),
        merged=int(clustered.sum()),
        clusters=len(set(slot[clustered].tolist())),
        dropped=int(dropped.sum()),
    )


def _encode_png(image: PIL.Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _read_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: _read_version(package) for package in PACKAGES}


def _read_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
