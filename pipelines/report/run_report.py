"""The report of a run: one HTML file that can be mailed, archived and read without the run folder or a network.

Everything is inside it: images as data URIs, plots as SVG.  It runs no script and, by its content security policy,
could not; texts from questions and answers are escaped.  It shows what the run folder holds and leaves out what it
does not.

Cost: every line of `metrics.jsonl` and `answers/easy_vqa.jsonl` is read into memory; a run of 10,000 steps and 10,000
questions takes about two seconds, most of it matplotlib.  Importing this module costs nothing: job files are validated
against `Report`, so whatever is heavy is imported by the function that needs it.
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
from pipelines.report import page
from pipelines.report.page import ACCENT, FAINT, INK, STYLE, number, quiet, svg
from pipelines.training import ledger
from pipelines.training.ledger import Account, Loop
from redux.extras import write_install_command

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from markupsafe import Markup
    from matplotlib.axes import Axes

    from pipelines.evaluation.evaluate import Example

PACKAGES = ("redux-vlm", "torch", "ray", "transformers", "deepspeed")
STAGES = {"tower": "Image tower", "pretrain": "Pretraining", "instruct": "Instruction tuning"}
# parts of the wall time: what they are called, their colour and its opacity
PARTS = {
    "productive": ("computing", "good", 1.0),
    "evaluation": ("evaluating", "accent", 1.0),
    "data": ("waiting for data", "accent", 0.6),
    "checkpoint": ("checkpoints", "accent", 0.35),
    "startup": ("starting up", "faint", 0.7),
    "other": ("anything else", "faint", 0.35),
    "restart": ("restarting", "bad", 0.5),
    "lost": ("done twice", "bad", 1.0),
}
TOGETHER = {"strict": "all, strictly", "loose": "all, loosely", "both": "all, and right"}
CONFUSIONS = 8


@dataclass(frozen=True, kw_only=True)
class Report:
    """Settings of the report.

    examples: test images shown with their patches, question and answers.
    """

    examples: Annotated[int, Ge(0)] = 5


class Score(NamedTuple):
    """Share of right answers with its Wilson 95 % interval."""

    name: str
    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.questions)


class Share(NamedTuple):
    """As Score, with an interval that was drawn: prompts about one question depend on each other."""

    name: str
    questions: int
    correct: int
    accuracy: float
    interval: tuple[float, float]


class Confusion(NamedTuple):
    """A wrong answer, how often it was given, and its share of all questions with that reference answer."""

    answer: str
    response: str
    times: int
    share: float


class Throughput(NamedTuple):
    """Sums over the steps of a stage that stand; seconds are the ledger's, as in the account of the wall time."""

    stage: str
    steps: int
    samples: float
    tokens: float
    loop: Loop

    def per_second(self, amount: float) -> float:
        return amount / self.loop.total if self.loop.total else math.nan

    @property
    def waiting(self) -> float:
        """Share of the loop that was spent waiting for data."""
        return self.loop.data / self.loop.total if self.loop.total else math.nan


class Part(NamedTuple):
    """A part of the wall time, its share of all, and the share of those before it."""

    name: str
    seconds: float
    share: float
    before: float
    colour: str
    opacity: float


class Plot(NamedTuple):
    """A stage's loss curve, drawn."""

    stage: str
    last: float
    steps: int
    svg: Markup


class Panel(NamedTuple):
    """An example, its images as data URIs, its patches counted."""

    example: Example
    original: str
    patches: str
    before: int
    after: int
    kept: int
    merged: int
    clusters: int
    dropped: int


def write(run: Path, examples: Sequence[Example]) -> Path:
    """Write `run/report.html` from what the run folder holds, and return its path.

    Read, where present: job.yaml, metrics.json (flat: dotted name -> number), metrics.jsonl (one step a line),
    answers/ (one question a line) and ledger.jsonl (one event a line).  A reader of the old report never sees half of
    the new one.
    """
    return page.write(run / "report.html", _render(run, examples))


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a share (E. B. Wilson 1927, JASA 22, p. 209-212); z = 1.96 gives 95 %.

    Unlike the usual share ± z·sd it stays within 0..1 and does not vanish at either end.  Of no trials: (0, 1).
    """
    if not n:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _render(run: Path, examples: Sequence[Example]) -> str:
    job = _text(run / "job.yaml")
    metrics = json.loads(_text(run / "metrics.json") or "{}")
    stages = _stages(jsonl.read(run / "metrics.jsonl"))
    answers = _judged(run / "answers" / "easy_vqa.jsonl")
    book = ledger.read(run)
    account, loops = book.account, book.loops
    return page.render(
        "report.html.j2",
        name=_name(job) or run.resolve().name,
        job=job,
        metrics=metrics,
        total=_total(metrics, answers),
        scores=_scores(answers),
        followed=_followed(jsonl.read(run / "answers" / "instructions.jsonl")),
        punkt_command=write_install_command("instructions"),
        splitter=json.loads(_text(run / "answers" / "asked.json") or "{}").get("splitter"),
        asked=Score("all", sum(row["correct"] for row in answers), len(answers)),
        confusions=_confusions(answers),
        wrong=sum(not row["correct"] for row in answers),
        plots=[_plot(stage, rows) for stage, rows in stages.items()],
        throughput=[_throughput(stage, rows, loops[stage]) for stage, rows in stages.items() if stage in loops],
        spans=_spans(metrics),
        account=account,
        parts=_parts(account),
        wall_s=metrics.get("wall_s"),
        panels=[_panel(example) for example in examples],
        versions=_versions(),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _judged(path: Path) -> list[dict[str, Any]]:
    from pipelines.data import easy_vqa

    return [row | {"correct": easy_vqa.right(row)} for row in jsonl.read(path)]


def _name(job: str) -> str | None:
    import yaml

    values = yaml.safe_load(job)
    return str(values["name"]) if isinstance(values, Mapping) and values.get("name") else None


def _stages(record: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Steps by stage, in the order of the record."""
    steps: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in record:
        steps[line["stage"]].append(line)
    return dict(steps)


def _total(metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> Score | None:
    """The accuracy of the header: as scored, or counted where only the answers are there."""
    questions = int(metrics.get("easy_vqa.questions", len(answers)))
    if not questions:
        return None
    accuracy = metrics.get("easy_vqa.accuracy")
    correct = sum(row["correct"] for row in answers) if accuracy is None else round(accuracy * questions)
    return Score("all", correct, questions)


def _scores(answers: Iterable[Mapping[str, Any]]) -> list[Score]:
    """By question type, the most frequent first."""
    asked, right = Counter[str](), Counter[str]()
    for row in answers:
        asked[row["type"]] += 1
        right[row["type"]] += row["correct"]
    return [Score(name, right[name], count) for name, count in asked.most_common()]


def _followed(rows: Sequence[Mapping[str, Any]]) -> list[Share]:
    """Of each instruction how often it was followed, strictly; then of all together, and with the right answer too."""
    if not rows:
        return []
    from pipelines.evaluation import statistics
    from redux.benchmarks import instructions

    metrics = instructions.compute_metrics(rows)
    prefix, result = "strict.", []
    named = {name: name.removeprefix(prefix) for name in metrics if name.startswith(prefix)}
    named |= {name: told for name, told in TOGETHER.items() if name in metrics}
    for name, told in named.items():
        found, asked = statistics.interval([metrics[name]]), len(metrics[name].outcomes)
        result.append(Share(told, asked, round(found.value * asked), found.value, (found.low, found.high)))
    return result


def _confusions(answers: Iterable[Mapping[str, Any]]) -> list[Confusion]:
    asked, wrong = Counter[str](), Counter[tuple[str, str]]()
    for row in answers:
        asked[row["answer"]] += 1
        if not row["correct"]:
            wrong[row["answer"], row["response"].strip()] += 1
    return [
        Confusion(answer, response, times, times / asked[answer])
        for (answer, response), times in wrong.most_common(CONFUSIONS)
    ]


def _throughput(stage: str, rows: Sequence[Mapping[str, Any]], loop: Loop) -> Throughput:
    samples, tokens = (sum(row.get(key) or 0.0 for row in rows) for key in ("samples", "tokens"))
    return Throughput(STAGES.get(stage, stage), len(rows), samples, tokens, loop)


def _spans(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """Seconds of each step of the job ("wall_s.tower"), and what no step accounts for."""
    prefix = "wall_s."
    spans = [(name.removeprefix(prefix), seconds) for name, seconds in metrics.items() if name.startswith(prefix)]
    rest = metrics.get("wall_s", 0.0) - sum(seconds for _, seconds in spans)
    return [*spans, ("between steps", rest)] if spans and rest >= 0.5 else spans


def _parts(account: Account) -> list[Part]:
    """None before any time has passed."""
    total, before = account.total, 0.0
    parts = []
    for key, (name, colour, opacity) in PARTS.items() if total else ():
        seconds = getattr(account, key)
        parts.append(Part(name, seconds, seconds / total, before, colour, opacity))
        before += seconds / total
    return parts


def _plot(stage: str, rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Loss over steps, raw and smoothed, and the learning rate faint behind it."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    name = STAGES.get(stage, stage)
    step = np.array([row["step"] for row in rows])
    loss = _column(rows, "loss")
    smoothed = smooth(loss)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7, 2.6), layout="constrained")
        axes = figure.add_subplot()
        _learning_rate(axes, step, _column(rows, "learning_rate"))
        marker = "o" if len(rows) == 1 else ""  # one step makes no line
        axes.plot(step, loss, color=ACCENT, linewidth=0.6, alpha=0.4)
        axes.plot(step, smoothed, color=ACCENT, linewidth=1.8, marker=marker, markersize=4)
        _plain(axes, loss)
        drawn = svg(
            figure, f"{stage}-", f"{name}: loss over {len(rows)} steps, at the end {number(float(smoothed[-1]))}"
        )
    return Plot(name, float(smoothed[-1]), len(rows), drawn)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    import numpy as np

    return np.array([row.get(key) for row in rows], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a twenty-fifth of the curve around each step: it does not lag, as an exponential mean would.

    Not-a-number is skipped; where a whole window is, so is the result.
    """
    import numpy as np

    window = np.ones(2 * (len(values) // 50) + 1)
    finite = np.isfinite(values)
    sums, counts = (np.convolve(row, window, "same") for row in (np.where(finite, values, 0), finite.astype(float)))
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0.5)


def _learning_rate(axes: Axes, step: np.ndarray, rate: np.ndarray) -> None:
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
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)


def _plain(axes: Axes, loss: np.ndarray) -> None:
    """Logarithmic where the loss spans a factor of five, with plain numbers on the axis."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    finite = loss[np.isfinite(loss)]
    if finite.size and finite.min() > 0 and finite.max() / finite.min() > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    quiet(axes)


def _panel(example: Example) -> Panel:
    from redux import picture

    slot, merged = example.slot, example.merged
    dropped = slot < 0
    clustered = merged & ~dropped
    return Panel(
        example,
        original=_uri(picture.enlarge_image(example.image, slot.size)),
        patches=_uri(picture.draw_patches(example.image, slot, merged)),
        before=slot.size,
        after=len(set(slot[~dropped].tolist())),
        kept=int((~merged & ~dropped).sum()),
        merged=int(clustered.sum()),
        clusters=len(set(slot[clustered].tolist())),
        dropped=int(dropped.sum()),
    )


def _uri(image: PIL.Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
