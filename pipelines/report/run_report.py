"""Report of a run: one HTML file that needs neither the run folder nor a network, for mail and archives.

Images are data URIs, plots are SVG. The page runs no script, and its content security policy forbids any: filters are
radio buttons of CSS. Texts from questions and answers are escaped. The report shows what the run folder has and leaves
out the rest, so an unfinished run and a run of an earlier version have one too.

Cost: every line of `metrics.jsonl` and of the answers is read into memory and scored, see `pipelines.report.scores`. A
run of 10,000 steps and 10,000 questions takes about five seconds. Patches cost the loading of the model. Importing this
module is cheap: job files are validated against `Report`, so heavy packages are imported by the functions that need
them.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from annotated_types import Ge

from pipelines.core import jsonl
from pipelines.evaluation.answer_files import ANSWERS_FOLDER, PROVENANCE_FILE
from pipelines.report import environment, page
from pipelines.report.page import format_number
from pipelines.report.plots import ACCENT, FAINT, INK, STYLE, style_axes, to_svg
from pipelines.training import ledger
from pipelines.training.files import JOB_FILE, METRICS_FILE, PROGRESS_FILE, RESULT_FILE
from pipelines.training.ledger import Account, LoopTime
from redux.extras import write_install_command

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from markupsafe import Markup
    from matplotlib.axes import Axes

    from pipelines.evaluation.tasks import TaskSettings
    from pipelines.report.cost_section import CostComparison
    from pipelines.report.gallery import ImageReader
    from pipelines.report.scores import JudgedRow, TaskResult
    from redux.configuration import ReduxConfig
    from redux.trace import ImageTrace

STAGE_TITLES = {"tower": "Image tower", "pretrain": "Pretraining", "instruct": "Instruction tuning"}
"""Titles of the stages of the recipes; other stages have their name."""

TIME_PARTS = {
    "productive": ("computing", "good", 1.0),
    "evaluation": ("evaluating", "accent", 1.0),
    "data": ("waiting for data", "accent", 0.6),
    "checkpoint": ("checkpoints", "accent", 0.35),
    "startup": ("starting up", "faint", 0.7),
    "other": ("other", "faint", 0.35),
    "restart": ("starting again", "bad", 0.5),
    "lost": ("repeated steps", "bad", 1.0),
    "outside": ("before and after training", "faint", 0.15),
}
"""Parts of the wall time by their name in the ledger: title, colour and opacity."""

REPORT_FILE = "report.html"

PATCH_IMAGES = 4
"""Images of a task whose patches are shown."""

CAPTION_LENGTH = 500
"""Longest caption of a picture for a tracker, in characters."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Settings of the HTML report.

    Args:
        examples: number of questions of each task that are shown with image, question and answers.
    """

    examples: Annotated[int, Ge(0)] = 24


@dataclass(frozen=True, kw_only=True)
class ReportedModel:
    """The model of a run.

    Args:
        path: folder, hub id or URL.
        config: its configuration, with the settings of the evaluation; None for a model that is not a LLaVA.
        trace: function from encoded images to the tokens of their patches; an empty list if it keeps all tokens.
    """

    path: str
    config: ReduxConfig | None = None
    trace: Callable[[Sequence[bytes]], list[ImageTrace]] | None = None


class Picture(NamedTuple):
    """A picture of a question for a tracker."""

    task: str
    caption: str
    image: PIL.Image.Image


class WrittenReport(NamedTuple):
    """A report that was written.

    Args:
        path: the HTML file.
        pictures: some images of each task, with their patches if tokens are merged or dropped.
    """

    path: Path
    pictures: list[Picture]


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
        start: share of all parts before it.
        colour: CSS variable of its colour.
        opacity: opacity of its colour.
    """

    name: str
    seconds: float
    share: float
    start: float
    colour: str
    opacity: float


class LossPlot(NamedTuple):
    """Loss curve of a stage."""

    stage: str
    last: float
    steps: int
    svg: Markup


class PatchPanel(NamedTuple):
    """An image with its patches, as data URIs.

    Args:
        task: title of the task.
        judged: the question and the response.
        original: the image as the model sees it.
        patches: the image with its patches marked.
        num_patches: number of patches.
        num_tokens: number of tokens.
        kept: number of patches with a token of their own.
        merged: number of patches in clusters.
        clusters: number of clusters.
        dropped: number of patches without a token.
    """

    task: str
    judged: JudgedRow
    original: str
    patches: str
    num_patches: int
    num_tokens: int
    kept: int
    merged: int
    clusters: int
    dropped: int


@dataclass(frozen=True)
class Patches:
    """Panels, pictures for trackers, and the reason why panels are missing."""

    panels: list[PatchPanel] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    problem: str = ""


def write_run_report(
    run: Path,
    report: Report = Report(),
    tasks: Mapping[str, TaskSettings] | None = None,
    model: ReportedModel | None = None,
) -> WrittenReport:
    """Write `run/report.html` in one atomic step.

    Reads, if they exist: job.yaml, progress.jsonl, metrics.json (dotted name -> number), metrics.jsonl (one step per
    line), answers/ (one question per line), ledger.jsonl and environment.jsonl (one event per line).

    Args:
        run: run folder.
        report: settings.
        tasks: settings of the tasks, which say where the images are.
        model: the model that was trained or evaluated; None if there is none yet.
    """
    from pipelines.report.gallery import ImageReader, make_gallery
    from pipelines.report.scores import count_confusions, read_results

    # Every file may be missing: the report then leaves out its section.
    job = _read_text(run / JOB_FILE)
    results = read_results(run)
    readers = {result.name: ImageReader(result.name, (tasks or {}).get(result.name)) for result in results}
    galleries = [make_gallery(result, readers[result.name], report.examples) for result in results if report.examples]
    patches = _collect_patches(results, readers, model, min(report.examples, PATCH_IMAGES))
    cost = _compare_cost(model)
    confusions = {result.name: count_confusions(result) for result in results}
    text = page.render(
        "report.html.j2",
        job=job,
        results=results,
        confusions=confusions,
        galleries=galleries,
        patches=patches,
        cost=cost,
        splitter=json.loads(_read_text(run / ANSWERS_FOLDER / PROVENANCE_FILE) or "{}").get("splitter"),
        punkt_command=write_install_command("instructions"),
        next_steps=_list_next_steps(run, job, model, cost, results, readers),
        **_collect_training(run, job),
    )
    return WrittenReport(page.write(run / REPORT_FILE, text), patches.pictures)


def _collect_training(run: Path, job: str) -> dict[str, Any]:
    """Collect the values of the page that come from the records of the training."""
    metrics = json.loads(_read_text(run / RESULT_FILE) or "{}")
    stages = _group_by_stage(jsonl.read(run / METRICS_FILE))
    book = ledger.read_ledger(run)
    described = environment.describe_environment(run)
    # The ledger begins with the first stage; it also has the time between a crash and the next launch.
    wall_s = max(metrics["wall_s"], book.account.total) if "wall_s" in metrics else None
    return {
        "name": _parse_job(job).get("name") or run.resolve().name,
        "metrics": metrics,
        "wall_s": wall_s,
        "is_finished": bool(metrics),
        "finished_phases": [str(entry.get("step")) for entry in jsonl.read(run / PROGRESS_FILE) if "step" in entry],
        "started": described.get("started") or _read_start(run),
        "environment": described,
        "device": described.get(environment.GPUS_TITLE) or described.get(environment.CPUS_TITLE, ""),
        "versions": environment.read_versions(),
        "plots": [_plot_loss(stage, rows) for stage, rows in stages.items()],
        "throughput": [
            _sum_throughput(stage, rows, book.loops[stage]) for stage, rows in stages.items() if stage in book.loops
        ],
        "spans": _split_wall_time(metrics, wall_s),
        "account": book.account,
        "parts": _make_time_parts(book.account, wall_s),
    }


def _read_start(run: Path) -> str:
    """Read when the first stage began, for a run without a record of its environment."""
    first_event = next(iter(jsonl.read(run / ledger.LEDGER_FILE)), {})
    return environment.format_time(first_event["at"]) if "at" in first_event else ""


def _compare_cost(model: ReportedModel | None) -> CostComparison | None:
    if model is None or model.config is None:
        return None
    from pipelines.report.cost_section import compare_cost

    try:
        return compare_cost(model.config)
    except ValueError:
        return None  # A LLaVA whose cost is not computed, such as one that reads several layers of its tower


def _list_next_steps(
    run: Path,
    job: str,
    model: ReportedModel | None,
    cost: CostComparison | None,
    results: Sequence[TaskResult],
    readers: Mapping[str, ImageReader],
) -> list[Any]:
    from pipelines.report.next_steps import list_next_steps, make_sample

    samples = (
        make_sample(readers[result.name].locate(judged.row), str(judged.row.get("prompt") or ""))
        for result in results
        for judged in result.rows[:1]
    )
    return list_next_steps(
        run=run,
        job=_parse_job(job),
        model=model.path if model and model.config else None,
        is_finished=(run / RESULT_FILE).exists(),
        has_cmai=bool(model and model.config and model.config.method_settings("cmai")),
        has_method=bool(cost and cost.has_method),
        sample=next(filter(None, samples), None),
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _parse_job(text: str) -> dict[str, Any]:
    """Parse a job file without a check, since an earlier version may have written it."""
    import yaml

    values = yaml.safe_load(text)
    return values if isinstance(values, dict) else {}


def _group_by_stage(steps: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group steps by stage, in the order of the record."""
    stages: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for step in steps:
        stages[step["stage"]].append(step)
    return dict(stages)


def _sum_throughput(stage: str, rows: Sequence[Mapping[str, Any]], loop: LoopTime) -> Throughput:
    samples, tokens = (sum(row.get(key) or 0.0 for row in rows) for key in ("samples", "tokens"))
    return Throughput(STAGE_TITLES.get(stage, stage), len(rows), samples, tokens, loop)


def _split_wall_time(metrics: Mapping[str, float], wall_s: float | None) -> list[tuple[str, float]]:
    """List the seconds of each phase of the job ("wall_s.tower"), and the seconds between phases."""
    prefix = "wall_s."
    # Time outside the phases is shown from half a second on.
    spans = [(name.removeprefix(prefix), seconds) for name, seconds in metrics.items() if name.startswith(prefix)]
    unassigned_s = (wall_s or 0.0) - sum(seconds for _, seconds in spans)
    return [*spans, ("between steps", unassigned_s)] if spans and unassigned_s >= 0.5 else spans


def _make_time_parts(account: Account, wall_s: float | None) -> list[TimePart]:
    """Make the segments of the wall time; an empty list if no stage has begun.

    Args:
        account: the account from the first stage on.
        wall_s: seconds of the whole job; None for a job that has not finished.
    """
    if not account.total:
        return []
    total = wall_s or account.total
    parts = []
    start = 0.0
    for key, (name, colour, opacity) in TIME_PARTS.items():
        seconds = total - account.total if key == "outside" else getattr(account, key)
        if key == "outside" and not seconds:
            continue
        parts.append(TimePart(name, seconds, seconds / total, start, colour, opacity))
        start += seconds / total
    return parts


def _plot_loss(stage: str, rows: Sequence[Mapping[str, Any]]) -> LossPlot:
    """Plot the loss over steps, raw and smoothed, with the learning rate in the background."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from pipelines.training.metrics import VALIDATION_LOSS

    name = STAGE_TITLES.get(stage, stage)
    step = np.array([row["step"] for row in rows])
    loss = _read_column(rows, "loss")
    smoothed = smooth_curve(loss)
    last = float(smoothed[-1])
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7, 2.6), layout="constrained")
        axes = figure.add_subplot()
        _plot_learning_rate(axes, step, _read_column(rows, "learning_rate"))
        marker = "o" if len(rows) == 1 else ""  # A single step has no line
        axes.plot(step, loss, color=ACCENT, linewidth=0.6, alpha=0.4)
        axes.plot(step, smoothed, color=ACCENT, linewidth=1.8, marker=marker, markersize=4)
        validated = _read_column(rows, VALIDATION_LOSS)
        has_validation = np.isfinite(validated)
        label = f"{name}: loss over {len(rows)} steps, at the end {format_number(last)}"
        if has_validation.any():
            points = (step[has_validation], validated[has_validation])
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
    # Matplotlib draws a twin axis on top; move the loss in front, without its background.
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)


def _scale_loss_axis(axes: Axes, loss: np.ndarray) -> None:
    """Use a logarithmic axis with plain numbers if the loss spans more than a factor of five."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    finite = loss[np.isfinite(loss)]
    # A linear axis would flatten the end of a curve that falls far.
    if finite.size and finite.min() > 0 and finite.max() / finite.min() > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    style_axes(axes)


def _collect_patches(
    results: Sequence[TaskResult], readers: Mapping[str, ImageReader], model: ReportedModel | None, count: int
) -> Patches:
    """Draw the patches of some images of each task; the model is loaded once for all of them.

    The images are evenly spaced and do not depend on the responses.
    """
    from pipelines.report.gallery import make_thumbnail, select_images

    selected = [
        (result.title, judged, image)
        for result in results
        for judged, image in select_images(result.rows, readers[result.name], count)
    ]
    traces: list[ImageTrace] = []
    problem = ""
    try:
        if model and model.trace and selected:
            traces = model.trace([image for _, _, image in selected])
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        problem = f"The patches are not shown: {error}"  # A report without them is better than none
    if not traces:
        pictures = []
        for title, judged, image in selected:
            with contextlib.suppress(ValueError):  # Not an image that can be read
                pictures.append(Picture(title, _write_caption(judged), make_thumbnail(image)))
        return Patches(pictures=pictures, problem=problem)
    panels = [_draw_panel(title, judged, trace) for (title, judged, _), trace in zip(selected, traces, strict=True)]
    return Patches([panel for panel, _ in panels], [picture for _, picture in panels])


def _draw_panel(title: str, judged: JudgedRow, trace: ImageTrace) -> tuple[PatchPanel, Picture]:
    """Draw the image as the model sees it, and with its patches; the tracker gets both side by side."""
    import PIL.Image

    from redux.picture import enlarge_image

    token_of_patch, merged = trace.token_of_patch, trace.merged
    # See ImageTrace for the two arrays.
    dropped = token_of_patch < 0
    clustered = merged & ~dropped
    original, patches = enlarge_image(trace.image, token_of_patch.size), trace.draw()
    panel = PatchPanel(
        title,
        judged,
        original=page.encode_image(original),
        patches=page.encode_image(patches),
        num_patches=token_of_patch.size,
        num_tokens=trace.num_tokens,
        kept=int((~merged & ~dropped).sum()),
        merged=int(clustered.sum()),
        clusters=len(set(token_of_patch[clustered].tolist())),
        dropped=int(dropped.sum()),
    )
    both = PIL.Image.new("RGB", (original.width + patches.width, original.height))
    both.paste(original, (0, 0))
    both.paste(patches, (original.width, 0))
    return panel, Picture(title, _write_caption(judged), both)


def _write_caption(judged: JudgedRow) -> str:
    row = judged.row
    references = ", ".join(judged.references)
    text = f"{row.get('prompt', '')} Response: {row.get('response', '')} Reference: {references}"
    return text[:CAPTION_LENGTH]
