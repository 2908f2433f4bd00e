"""Batch inference over the questions of benchmarks, and their scores.

One Ray Data pipeline runs all tasks. A batch has questions of one task with similar length; the longest come first. The
answers of a batch are on disk before its actor returns the next one. An interrupted evaluation continues: questions
with an answer on disk are not asked again.

rows in:   a batch and its number
rows out:  one block per batch: the responses, and the time they took
resources: `num_actors` actors share the CPUs, or take a GPU each

answers/TASK.jsonl    {"id", "unit", "prompt", …, "response"}, one line per question in the order of the benchmark: all
                      that scoring needs, with "attention" where it was measured. Until it is complete it is
                      .TASK.jsonl, in the order of the answers.
answers/speed.jsonl   {"task", "questions", "tokens", "prefill_s", "decode_s", "peak_bytes", "is_warm_up"}, one line per
                      batch
answers/provenance.json  the model and the settings that gave the answers; answers of other models are never reused
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import ray.data
import torch
from PIL import Image
from ray.data._internal.execution.operators.map_operator import MapOperator
from tqdm import tqdm

from pipelines.core import cluster, failures, interrupts, jsonl, storage
from pipelines.data.images import check_image, is_image
from pipelines.evaluation.answer_files import ANSWERS_FOLDER, PROVENANCE_FILE, find_partial_file
from pipelines.evaluation.tasks import (
    Evaluate,
    TaskName,
    TaskSettings,
    count_new_tokens,
    find_image_folder,
    find_task,
    load_questions,
    spread_evenly,
)
from pipelines.training.metrics import measure_peak_bytes
from redux import answering
from redux.answering import Answerer, TrainedLlava
from redux.benchmarks import BENCHMARKS, Metric, Question
from redux.benchmarks import compute_scores as benchmark_scores
from redux.generation import Answers
from redux.image import load_pixels
from redux.kernels import set_kernels
from redux.model import ReduxForConditionalGeneration, normalize_pixels
from redux.pretrained import configure_checkpoint
from redux.sentences import choose_splitter
from redux.settings import METHODS, ImageAspectRatio, KernelChoice, TemplateName
from redux.trace import ImageTrace, measure_attention

SPEED_FILE = "speed.jsonl"

ANSWER_FIELDS = ("response", "attention")
"""Fields of a row that are of the answer, not of the question."""

MAX_EXAMPLES = 3
"""Number of images that an error names."""


@dataclass(frozen=True)
class QuestionBatch:
    """Questions of one task that are answered together.

    Args:
        task: name of the task.
        questions: the questions.
        images: folder or URL of their images.
        max_new_tokens: maximum length of an answer in tokens.
        measured: ids of questions whose answers' attention is measured.
    """

    task: TaskName
    questions: list[Question]
    images: str
    max_new_tokens: int
    measured: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """The model that answers, and how it is loaded.

    Args:
        model: folder, Hugging Face Hub id or URL.
        template: conversation template, as `redux.answering.load` takes it.
        image_aspect_ratio: "pad" or "crop", as `redux.answering.load` takes it.
        allow_mismatch: allow a template or an image_aspect_ratio that differs from the training.
        methods: settings of vmtc, cmai and reduction that replace those of the model.
        kernels: choice between fused kernels and plain code.
    """

    model: str
    template: TemplateName | None = None
    image_aspect_ratio: ImageAspectRatio | None = None
    allow_mismatch: bool = False
    methods: Mapping[str, Any] = field(default_factory=dict)
    kernels: KernelChoice = "auto"


class EvaluationActor:
    """Ray actor that loads the model at its first batch and answers batches with greedy decoding."""

    def __init__(self, evaluated: EvaluatedModel, settings: Evaluate, actors: int) -> None:
        # Actors on a CPU share its cores; more threads than cores slow all of them down.
        if not torch.cuda.is_available():
            torch.set_num_threads(max(cluster.count_local_cpus() // actors, 1))
        self.evaluated = evaluated
        self.settings = settings
        self.model: Answerer | None = None
        self.sizes = set[int]()  # Numbers of questions of earlier batches

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list]:
        """Answer a batch: one row per question, or a single row with "error" if it cannot be answered.

        The error is a value, not an exception: Ray would retry the task and wrap the message in a traceback.
        """
        [number], [batch] = rows["number"], rows["batch"]
        try:
            answers, attention = self._answer(batch)
        except (OSError, ValueError, ImportError, torch.OutOfMemoryError) as error:
            answers, attention = Answers([""], [0], 0.0, 0.0), [""]
            problem = failures.classify_error(error).text
            if broken_image := _find_broken_image(batch):
                problem += f"; the image is {broken_image}"
        else:
            problem = ""
        # The first batch of a size compiles kernels, allocates memory and captures a graph, so its times are others.
        is_warm_up = len(batch.questions) not in self.sizes
        self.sizes.add(len(batch.questions))
        # Values of the whole batch are repeated in each row, since Ray Data has columns of equal length.
        count = len(answers.texts)
        return {
            "batch": [int(number)] * count,
            "response": answers.texts,
            "attention": attention,
            "tokens": answers.tokens,
            "prefill_s": [answers.prefill_s] * count,
            "decode_s": [answers.decode_s] * count,
            "peak_bytes": [measure_peak_bytes()] * count,
            "is_warm_up": [is_warm_up] * count,
            "error": [problem] * count,
        }

    def _answer(self, batch: QuestionBatch) -> tuple[Answers, list[str]]:
        """Answer a batch, and measure the attention of some answers, as JSON; "" for the others."""
        # The model is loaded here, not in __init__: an error in __init__ would make Ray start the actor again.
        if self.model is None:
            evaluated = self.evaluated
            set_kernels(evaluated.kernels)
            self.model = answering.load(
                evaluated.model,
                template=evaluated.template,
                image_aspect_ratio=evaluated.image_aspect_ratio,
                allow_mismatch=evaluated.allow_mismatch,
                image_input=self.settings.image_input,
                **evaluated.methods,
            )
        images = _read_images(batch)
        answers = self.model([question.prompt for question in batch.questions], images, batch.max_new_tokens)
        attention = [
            json.dumps(asdict(measure_attention(self.model, question.prompt, image, text)))
            if question.id in batch.measured and image is not None and isinstance(self.model, TrainedLlava)
            else ""
            for question, image, text in zip(batch.questions, images, answers.texts, strict=True)
        ]
        return answers, attention


def _read_images(batch: QuestionBatch) -> list[bytes | None]:
    """Read the image of each question; an image with several questions is read once."""
    names = {question.image for question in batch.questions if isinstance(question.image, str)}
    content = {name: storage.read(storage.join(batch.images, name)) for name in names}
    images = [question.image for question in batch.questions]
    return [content[image] if isinstance(image, str) else image for image in images]


def _find_broken_image(batch: QuestionBatch) -> str:
    """Find the path of the first image of a batch that cannot be decoded; "" if all can."""
    for question in batch.questions:
        if isinstance(question.image, str):
            path = storage.join(batch.images, question.image)
            # An image that cannot be read is named by the error itself.
            with suppress(OSError, ValueError):
                content = storage.read(path)
                try:
                    check_image(content)
                except ValueError:
                    return path
    return ""


def evaluate(evaluated: EvaluatedModel, run: Path, settings: Evaluate, gpu_share: float = 1) -> dict[str, float]:
    """Answer all questions without an answer in run/answers/, and return all scores by name.

    Args:
        evaluated: the model that answers.
        run: the run folder.
        settings: tasks and resources.
        gpu_share: share of a GPU for each actor.

    Raises:
        ValueError: the files of a task cannot be used, or the folder has answers of another model or other settings.
    """
    folder = run / ANSWERS_FOLDER
    folder.mkdir(exist_ok=True)
    # The check comes before any answer is written, because answers do not say which model gave them.
    _check_provenance(folder, evaluated, settings)
    questions = {name: load_questions(name, task) for name, task in settings.tasks.items()}
    measured = {
        name: _select_measured(task_questions, settings.attention if _measures_attention(evaluated, settings) else 0)
        for name, task_questions in questions.items()
    }
    remaining = {
        name: _find_unanswered(folder, name, task_questions, measured[name])
        for name, task_questions in questions.items()
    }
    jsonl.drop_partial_line(folder / SPEED_FILE)
    if any(remaining.values()):
        total = sum(len(task_questions) for task_questions in questions.values())
        _run_inference(evaluated, folder, settings, remaining, measured, total, gpu_share)
    for name, task_questions in questions.items():
        _write_in_order(folder, name, task_questions)
    return compute_scores(run, list(questions)) | compute_speed(run)


def has_answers(run: Path) -> bool:
    """Return True if an evaluation in the run folder has written an answer."""
    return any(path.stat().st_size for path in (run / ANSWERS_FOLDER).glob("*.jsonl"))


def has_new_questions(run: Path, settings: Evaluate) -> bool:
    """Return True if the file of a user's task has other questions than those that were answered."""
    for name, task in settings.tasks.items():
        if task.file:
            # All of them in their order, or the file has changed.
            questions, rows = load_questions(name, task), read_answers(run, name)
            if len(questions) != len(rows) or not all(map(_is_answer, questions, rows)):
                return True
    return False


def list_metric_names(settings: Evaluate) -> set[str]:
    """List the names of all metrics that `evaluate` returns.

    Raises:
        ValueError: the files of a task cannot be used.
    """
    speed = {"decode_tokens_per_s", "prefill_s_per_question", "peak_bytes"}
    names = {f"speed.{name}" for name in speed}
    for task, task_settings in settings.tasks.items():
        # Held-out samples become questions only in a run, so their types are not known yet.
        metrics = (
            ["accuracy"] if task_settings.held_out else _list_task_metrics(task, load_questions(task, task_settings))
        )
        names |= {f"{task}.questions", *(f"{task}.{metric}" for metric in metrics)}
    return names


def _list_task_metrics(name: TaskName, questions: Sequence[Question]) -> list[str]:
    """List the metrics of a task; ValueError if it has none and no server scores its answers."""
    metrics = find_task(name).metrics([_make_row(question) | {"response": ""} for question in questions])
    return list(_score_metrics(name, metrics))


def _score_metrics(name: TaskName, metrics: Mapping[str, Metric]) -> dict[str, float]:
    if not metrics and name in BENCHMARKS and BENCHMARKS[name].build_submission:
        return {}  # A server scores these answers; `redux score --submission` writes the file for it
    return benchmark_scores(metrics, f"evaluate.tasks.{name}.files")


def check_task(name: TaskName, task: TaskSettings) -> None:
    """Check the files of a task before any model is loaded.

    Raises:
        ValueError: a file cannot be read, is not of this task, or has nothing to score; or a local image is missing, or
            one of a user's is not an image; or the first image cannot be read.
    """
    questions = load_questions(name, task)
    _list_task_metrics(name, questions)
    folder = find_image_folder(name, task)
    try:
        if storage.is_local(folder):
            names = dict.fromkeys(question.image for question in questions if isinstance(question.image, str))
            _check_local_images(folder, list(names), reads_headers=task.file is not None)
        _read_images(QuestionBatch(name, questions[:1], folder, 0))
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluate.tasks.{name}.images: {error}") from None


def _check_local_images(folder: str, names: Sequence[str], reads_headers: bool) -> None:
    """Check that all images exist; ValueError with their number and some examples.

    Args:
        folder: folder of the images.
        names: paths in it.
        reads_headers: also check that Pillow knows the format of each. It takes a few milliseconds in a hundred files.
    """
    missing = [name for name in names if not Path(folder, name).is_file()]
    if missing:
        raise ValueError(f"{_describe_images(missing, len(names), folder)}, allowed: files that exist")
    unknown = [name for name in names if reads_headers and not is_image(Path(folder, name))]
    if unknown:
        raise ValueError(f"{_describe_images(unknown, len(names), folder)}, allowed: images that Pillow reads")


def _describe_images(names: Sequence[str], total: int, folder: str) -> str:
    """Describe images that cannot be used, with a few of their names."""
    examples = ", ".join(map(repr, names[:MAX_EXAMPLES])) + (", …" if len(names) > MAX_EXAMPLES else "")
    return f"got {len(names)} of {total} images in {folder}: {examples}"


def _check_provenance(folder: Path, evaluated: EvaluatedModel, settings: Evaluate) -> None:
    """Write which model answers, with which settings; ValueError if the folder has answers of another model.

    A provenance file without answers is left from an evaluation that failed at its start, and is replaced.
    """
    # Everything that changes an answer or its score.
    config = answering.read_config(evaluated.model)
    # The choice of kernels changes answers by rounding only.
    fields = {name: value for name, value in asdict(evaluated).items() if name != "kernels"}
    current = {
        **fields,
        "model_type": config["model_type"],
        "methods": {name: config.get(name) for name in METHODS} | fields["methods"],
        "splitter": choose_splitter(),
        "weights": _fingerprint_weights(evaluated.model),
        "image_input": settings.image_input,
        **{f"max_new_tokens.{name}": count_new_tokens(name, task) for name, task in settings.tasks.items()},
    }
    # Through JSON, so that tuples equal the lists of the file.
    current = json.loads(json.dumps(current))
    path = folder / PROVENANCE_FILE
    # A task that this call does not evaluate keeps its keys.
    previous = json.loads(path.read_text()) if path.exists() and has_answers(folder.parent) else {}
    for key, value in previous.items():
        if current.setdefault(key, value) != value:
            raise ValueError(
                f"{folder}: its answers have {key} = {value!r}, not {current[key]!r}; move the folder away"
            )
    storage.write(str(path), json.dumps(current, indent=2).encode())


def _fingerprint_weights(model: str) -> dict[str, int]:
    """Measure size and time of the weight files, to notice a replaced model; zeros for a Hub id or URL."""
    files = [] if "://" in model else [path.stat() for path in Path(model).glob("*.safetensors")]
    return {
        "bytes": sum(file.st_size for file in files),
        "changed_ns": max((file.st_mtime_ns for file in files), default=0),
    }


def _run_inference(
    evaluated: EvaluatedModel,
    folder: Path,
    settings: Evaluate,
    remaining: Mapping[TaskName, Sequence[Question]],
    measured: Mapping[TaskName, frozenset[str]],
    total: int,
    gpu_share: float,
) -> None:
    """Answer the remaining questions; append the answers of each batch as soon as it is answered.

    Args:
        evaluated: the model that answers.
        folder: the folder of the answers.
        settings: tasks and resources.
        remaining: questions without an answer, by task.
        measured: ids of questions whose answers' attention is measured, by task.
        total: number of all questions, for the progress bar.
        gpu_share: share of a GPU for each actor.
    """
    batches = [
        replace(batch, measured=measured[name])
        for name, questions in remaining.items()
        for batch in _make_batches(name, questions, settings)
    ]
    actors = count_actors(settings, gpu_share, len(batches))
    _require_actors(actors, gpu_share)
    # The batch is part of its row: large constructor arguments would be in the object store, see `_pass_by_value`.
    rows = [{"number": number, "batch": batch} for number, batch in enumerate(batches)]
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        EvaluationActor,
        fn_constructor_args=(evaluated, settings, actors),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
        num_gpus=gpu_share if cluster.count_gpus() else None,
    )
    # This process writes all answers, so no two actors append to one file.
    num_answered = total - sum(map(len, remaining.values()))
    with _pass_by_value(), tqdm(desc="evaluate", total=total, initial=num_answered, unit="question") as bar:
        bar.set_postfix_str("loading model")
        for block in answers.iter_batches(batch_size=None):
            interrupts.raise_if_interrupted()
            bar.set_postfix_str("", refresh=False)
            batch = batches[int(block["batch"][0])]
            if problem := str(block["error"][0]):
                raise ValueError(f"evaluate.tasks.{batch.task}: {problem}")
            answer_rows = zip(batch.questions, block["response"], block["attention"], strict=True)
            jsonl.append(
                find_partial_file(folder, batch.task),
                (
                    _make_row(question)
                    | {"response": str(response)}
                    | ({"attention": json.loads(attention)} if attention else {})
                    for question, response, attention in answer_rows
                ),
            )
            jsonl.append(folder / SPEED_FILE, [_make_speed_row(batch, block)])
            bar.update(len(batch.questions))


@contextmanager
def _pass_by_value() -> Iterator[None]:
    """Let Ray Data pass the arguments of actors by value.

    Ray 2.60 passes references to its object store. For each actor that may restart, its C++ side then prints an error:
    a restart fails if the store has lost them.
    """
    with (
        patch.object(MapOperator, "_map_transformer_ref", property(attrgetter("_map_transformer"))),
        patch.object(MapOperator, "_data_context_ref", property(attrgetter("data_context"))),
    ):
        yield


def _require_actors(actors: int, gpu_share: float) -> None:
    """Raise ValueError if the cluster cannot run so many actors: Ray would wait for missing resources without end."""
    cluster.require_resources({"CPU": actors / 2 + 1}, f"evaluate.num_actors = {actors}")
    gpus, capacity = cluster.count_gpus(), cluster.count_processes_on_gpus(gpu_share)
    if gpus and actors > capacity:
        raise ValueError(
            f"evaluate.num_actors: got {actors}, allowed: up to {capacity}, because there are {gpus:g} GPUs"
        )


def count_actors(settings: Evaluate, gpu_share: float, batches: int) -> int:
    """Count the models that answer at the same time.

    "auto" on CPUs is at most two: each model needs its full memory, and its threads use the other cores.
    """
    if settings.num_actors != "auto":
        return settings.num_actors
    processes = cluster.count_model_processes(gpu_share)
    return max(min(processes if cluster.count_gpus() else min(processes, 2), batches), 1)


def _make_batches(name: TaskName, questions: Sequence[Question], settings: Evaluate) -> Iterator[QuestionBatch]:
    """Make batches of similar length, to pad little; the longest first, so that out-of-memory errors come early."""
    task = settings.tasks[name]
    # Length in characters is close enough to length in tokens.
    longest_first = sorted(questions, key=lambda question: -len(question.prompt))
    for start in range(0, len(longest_first), settings.batch_size):
        part = longest_first[start : start + settings.batch_size]
        yield QuestionBatch(name, part, find_image_folder(name, task), count_new_tokens(name, task))


def _make_speed_row(batch: QuestionBatch, block: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "task": batch.task,
        "questions": len(batch.questions),
        "tokens": int(block["tokens"].sum()),
        **{name: float(block[name][0]) for name in ("prefill_s", "decode_s")},
        "peak_bytes": int(block["peak_bytes"][0]),
        "is_warm_up": bool(block["is_warm_up"][0]),
    }


def _make_row(question: Question) -> dict[str, Any]:
    return {"id": question.id, "unit": question.unit, "prompt": question.prompt, **question.reference}


def _measures_attention(evaluated: EvaluatedModel, settings: Evaluate) -> bool:
    """Return True if attention to images can be measured: a LLaVA sees their pixels."""
    return settings.image_input == "pixels" and answering.is_llava(evaluated.model)


def _select_measured(questions: Sequence[Question], count: int) -> frozenset[str]:
    """Select the questions whose answers' attention is measured: those with images, evenly, the same in any run."""
    with_images = [question.id for question in questions if question.image is not None]
    return frozenset(with_images[index] for index in spread_evenly(len(with_images), count))


def _find_unanswered(
    folder: Path, name: str, questions: Sequence[Question], measured: frozenset[str] = frozenset()
) -> list[Question]:
    """Find the questions without an answer on disk, or without an attention that has to be measured."""
    jsonl.drop_partial_line(find_partial_file(folder, name))
    rows = _read_rows_by_id(folder, name)
    return [
        question
        for question in questions
        if question.id not in rows
        or not _is_answer(question, rows[question.id])
        or (question.id in measured and "attention" not in rows[question.id])
    ]


def _read_rows_by_id(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read all rows of a task, from its complete and its partial file."""
    # Rows of the partial file are newer, so they come last.
    files = (folder / f"{name}.jsonl", find_partial_file(folder, name))
    return {row["id"]: row for path in files for row in jsonl.read(path)}


def _is_answer(question: Question, row: Mapping[str, Any]) -> bool:
    """Return True if a row answers this question; an earlier call may have used the id for another one."""
    return json.loads(json.dumps(_make_row(question))) == {name: row[name] for name in row if name not in ANSWER_FIELDS}


def _write_in_order(folder: Path, name: str, questions: Sequence[Question]) -> None:
    """Write all answers in the order of the benchmark, in one atomic step, then delete the partial file."""
    # The complete file replaces an old one before the partial file is deleted, so no answer is ever lost.
    rows = _read_rows_by_id(folder, name)
    text = "".join(json.dumps(rows[question.id]) + "\n" for question in questions)
    storage.write(str(folder / f"{name}.jsonl"), text.encode())
    find_partial_file(folder, name).unlink(missing_ok=True)


def read_answers(run: Path, name: str) -> list[dict[str, Any]]:
    """Read the answered questions of a task in its order; an empty list if it was not evaluated."""
    return jsonl.read(run / ANSWERS_FOLDER / f"{name}.jsonl")


def compute_scores(run: Path, names: Sequence[TaskName]) -> dict[str, float]:
    """Compute TASK.METRIC and TASK.questions of each task from the answers on disk.

    Raises:
        ValueError: a task has no answer or no score.
    """
    scores = {}
    for name in names:
        rows = read_answers(run, name)
        scores[f"{name}.questions"] = float(len(rows))
        if not rows:
            raise ValueError(
                f"evaluate.tasks.{name}: got no answer in {run / ANSWERS_FOLDER}, allowed: an evaluated task"
            )
        task_scores = _score_metrics(name, find_task(name).metrics(rows))
        scores |= {f"{name}.{metric}": score for metric, score in task_scores.items()}
    return scores


def compute_speed(run: Path) -> dict[str, float]:
    """Compute speed over all batches but those of warm-up, and memory over all.

    If all batches are the first of their size, their times are all there is, and count.

    Returns:
        decode_tokens_per_s (new tokens per second of decoding, of one actor), prefill_s_per_question (seconds to the
        first token) and peak_bytes (most memory of an actor), each with the prefix "speed."; {} without batches.
    """
    batches = jsonl.read(run / ANSWERS_FOLDER / SPEED_FILE)
    if not batches:
        return {}
    # Rows of earlier versions do not name them.
    timed_batches = [batch for batch in batches if not batch.get("is_warm_up")] or batches
    questions, tokens, prefill_s, decode_s = (
        sum(batch[name] for batch in timed_batches) for name in ("questions", "tokens", "prefill_s", "decode_s")
    )
    return {
        # The prefill computes the first token of each answer, so decoding does not count it.
        **({"speed.decode_tokens_per_s": (tokens - questions) / decode_s} if decode_s else {}),
        "speed.prefill_s_per_question": prefill_s / questions,
        "speed.peak_bytes": max(batch["peak_bytes"] for batch in batches),
    }


def trace_compression(evaluated: EvaluatedModel, images: Sequence[bytes]) -> list[ImageTrace]:
    """Encode images as for the answers, and return the tokens of their patches.

    Args:
        evaluated: the model that gave the answers.
        images: encoded image files.

    Returns:
        A trace for each image; none for a model that keeps all tokens or is not a LLaVA.

    Raises:
        ValueError: an image cannot be read.
    """
    if not images or not answering.is_llava(evaluated.model):
        return []
    config = configure_checkpoint(evaluated.model, **evaluated.methods)
    if config.num_visual_tokens == config.num_patches:
        return []  # The weights are not read
    llava = ReduxForConditionalGeneration.from_pretrained(evaluated.model, **evaluated.methods).eval()
    _, image_aspect_ratio = answering.resolve_format(
        config.to_dict(), evaluated.template, evaluated.image_aspect_ratio, evaluated.allow_mismatch
    )
    traces = []
    for image in images:
        pixels = load_pixels(image, config.vision_config.image_size, image_aspect_ratio)
        with torch.inference_mode():
            values = normalize_pixels(torch.from_numpy(pixels[None])).to(llava.dtype)
            _, assignment = llava.model.encode_images(values)
        traces.append(
            ImageTrace(
                Image.fromarray(pixels.transpose(1, 2, 0)),
                assignment.token_of_patch[0].numpy(),
                assignment.merged[0].numpy(),
            )
        )
    return traces
