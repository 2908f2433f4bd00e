"""Batch inference over the questions of benchmarks, and the scores.

One Ray Data pipeline for all of them: a batch holds questions of one benchmark and similar length, the longest first,
and its answers are on disk before the next batch of its actor is.  What was answered is not asked again: the same call
goes on where an earlier one ended.

rows in:   a batch and its number
rows out:  one block a batch: what the model said to its questions, and how long that took
resources: `actors` actors share the CPUs, or take a GPU each

answers/TASK.jsonl    {"id", "unit", "prompt", …, "response"}, one line a question in the benchmark's order: all that
                      scoring needs.  Until it is complete it is .TASK.jsonl, in the order of the answers.
answers/speed.jsonl   {"task", "questions", "tokens", "prefill_s", "decode_s", "peak_bytes"}, one line a batch
answers/asked.json    who was asked, and how: answers of others are never taken for theirs
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from PIL import Image
from tqdm import tqdm

from pipelines.core import cluster, failures, interrupts, jsonl, storage
from pipelines.data import easy_vqa
from pipelines.evaluation.tasks import TASKS, Asking, Evaluate, Name, questions, spread
from pipelines.training.metrics import peak_bytes
from redux import answering
from redux.answering import Answerer
from redux.benchmarks import BENCHMARKS, Metric, Question
from redux.benchmarks import compute_scores as benchmark_scores
from redux.generation import Answers
from redux.image import load_pixels
from redux.model import ReduxForConditionalGeneration, normalize_pixels
from redux.sentences import choose_splitter
from redux.settings import METHODS, ImageAspectRatio, TemplateName

FOLDER = "answers"
ASKED = "asked.json"
SPEED = "speed.jsonl"


@dataclass(frozen=True)
class Batch:
    """Questions of one task to be answered at once; `images` is the folder of theirs."""

    task: Name
    questions: list[Question]
    images: str
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is asked: folder, hub id or URL.

    template, fit, allow_mismatch: as `redux.answering.load` takes them.
    methods: settings of the method in place of the model's own, by their names in redux.settings.METHODS.
    """

    model: str
    template: TemplateName | None = None
    image_aspect_ratio: ImageAspectRatio | None = None
    allow_mismatch: bool = False
    methods: Mapping[str, Any] = field(default_factory=dict)


class EvaluationActor:
    """An actor with the model: answers batches, greedily."""

    def __init__(self, subject: Subject, settings: Evaluate, actors: int) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(max(len(os.sched_getaffinity(0)) // actors, 1))
        self.subject, self.settings = subject, settings
        self.model: Answerer | None = None

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list]:
        """One row a question; where the model, an image or a prompt cannot be used, one row with the "error"."""
        [number], [batch] = rows["number"], rows["batch"]
        try:
            answers = self._answer(batch)
        except (OSError, ValueError, ImportError, torch.OutOfMemoryError) as error:
            answers = Answers([""], [0], 0.0, 0.0)
            problem = failures.describe(error).text
        else:
            problem = ""
        count = len(answers.texts)
        return {
            "batch": [int(number)] * count,
            "response": answers.texts,
            "tokens": answers.tokens,
            "prefill_s": [answers.prefill_s] * count,
            "decode_s": [answers.decode_s] * count,
            "peak_bytes": [peak_bytes()] * count,
            "error": [problem] * count,
        }

    def _answer(self, batch: Batch) -> Answers:
        if self.model is None:
            of = self.subject
            self.model = answering.load(
                of.model,
                template=of.template,
                image_aspect_ratio=of.image_aspect_ratio,
                allow_mismatch=of.allow_mismatch,
                image_input=self.settings.image_input,
                **of.methods,
            )
        return self.model([each.prompt for each in batch.questions], _images(batch), batch.max_new_tokens)


def _images(batch: Batch) -> list[bytes | None]:
    """Each question's image; one that several ask about is read once."""
    named = {each.image for each in batch.questions if isinstance(each.image, str)}
    read = {name: storage.read(storage.join(batch.images, name)) for name in named}
    return [read[each.image] if isinstance(each.image, str) else each.image for each in batch.questions]


def evaluate(subject: Subject, run: Path, settings: Evaluate, gpu_share: float = 1) -> dict[str, float]:
    """Answer what is not answered yet, into run/answers/; returns all scores by name.

    gpu_share: of a GPU, for each actor.
    ValueError where a task's files cannot be read or do not fit, or answers of another model, or to other settings, are
    there.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    _claim(folder, subject, settings)
    asked = {name: questions(name, asking) for name, asking in settings.tasks.items()}
    left = {name: _left(folder, name, each) for name, each in asked.items()}
    jsonl.mend(folder / SPEED)
    if any(left.values()):
        _answer(subject, folder, settings, left, sum(map(len, asked.values())), gpu_share)
    for name, each in asked.items():
        _complete(folder, name, each)
    return scores(run, list(asked)) | speed(run)


def has_answers(run: Path) -> bool:
    """Return whether an evaluation in the run folder has given an answer."""
    return any(path.stat().st_size for path in (run / FOLDER).glob("*.jsonl"))


def promised(settings: Evaluate) -> set[str]:
    """Names of all that `evaluate` returns.  ValueError where a task's files cannot be read or do not fit."""
    timed = {"decode_tokens_per_s", "prefill_s_per_question", "peak_bytes"}
    result = {f"speed.{name}" for name in timed}
    for name, asking in settings.tasks.items():
        result |= {
            f"{name}.questions",
            *(f"{name}.{metric}" for metric in _metric_names(name, questions(name, asking))),
        }
    return result


def _metric_names(name: Name, asked: Sequence[Question]) -> list[str]:
    """Metrics that the answers will have.  ValueError where there are none, and no server that would score them."""
    metrics = TASKS[name].metrics([_row(question) | {"response": ""} for question in asked])
    return list(_scores(name, metrics))


def _scores(name: Name, metrics: Mapping[str, Metric]) -> dict[str, float]:
    if not metrics and name in BENCHMARKS and BENCHMARKS[name].build_submission:
        return {}  # answers to hand in: `redux score --submission`
    return benchmark_scores(metrics, f"evaluate.tasks.{name}.files")


def check(name: Name, asking: Asking) -> None:
    """ValueError where a task's files cannot be read, do not fit or have nothing to score by, or the first question's
    image is not there.
    """
    asked = questions(name, asking)
    _metric_names(name, asked)
    first = asked[0]
    try:
        _images(Batch(name, [first], _folder(name, asking), 0))
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluate.tasks.{name}.images: {error}") from None


def _folder(name: Name, asking: Asking) -> str:
    """Of the images."""
    return asking.images or TASKS[name].images or "".join(asking.files[:1])


def _claim(folder: Path, subject: Subject, settings: Evaluate) -> None:
    """Note who is asked, how, and what counts sentences; ValueError where answers of others are there.

    A note without answers is of an evaluation that failed at its start, and is replaced.
    """
    config = answering.read_config(subject.model)
    now = {
        **asdict(subject),
        "model_type": config["model_type"],
        "methods": {name: config.get(name) for name in METHODS} | asdict(subject)["methods"],
        "splitter": choose_splitter(),
        "weights": _fingerprint(subject.model),
        "image_input": settings.image_input,
        **{f"max_new_tokens.{name}": _new_tokens(name, asking) for name, asking in settings.tasks.items()},
    }
    now = json.loads(json.dumps(now))
    path = folder / ASKED
    before = json.loads(path.read_text()) if path.exists() and has_answers(folder.parent) else {}
    for key, value in before.items():
        if now.setdefault(key, value) != value:
            raise ValueError(f"{folder}: its answers were given with {key} = {value!r}, not {now[key]!r}; move it away")
    storage.write(str(path), json.dumps(now, indent=2).encode())


def _fingerprint(model: str) -> dict[str, int]:
    """Sizes and times of a model's files, which tell whether it was replaced; nothing of a hub id or a URL."""
    files = [] if "://" in model else [path.stat() for path in Path(model).glob("*.safetensors")]
    return {
        "bytes": sum(file.st_size for file in files),
        "changed_ns": max((file.st_mtime_ns for file in files), default=0),
    }


def _new_tokens(name: Name, asking: Asking) -> int:
    return asking.max_new_tokens or TASKS[name].max_new_tokens


def _answer(
    subject: Subject,
    folder: Path,
    settings: Evaluate,
    left: Mapping[Name, Sequence[Question]],
    total: int,
    gpu_share: float,
) -> None:
    """Ask what is left; each batch's answers are appended as they come."""
    batches = [batch for name, each in left.items() for batch in _batches(name, each, settings)]
    actors = count_actors(settings, gpu_share, len(batches))
    cluster.require({"CPU": actors / 2 + 1}, f"evaluate with actors = {actors}")
    gpus = cluster.gpus()
    if 0 < gpus < actors * gpu_share:
        raise ValueError(
            f"evaluate.num_actors: got {actors}, allowed: up to {gpus / gpu_share:g}, which {gpus:g} GPUs hold"
        )
    # a batch travels in its row: Ray's C++ side warns of actors whose arguments are large objects
    rows = [{"number": number, "batch": batch} for number, batch in enumerate(batches)]
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        EvaluationActor,
        fn_constructor_args=(subject, settings, actors),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
        num_gpus=gpu_share if gpus else None,
    )
    done = total - sum(map(len, left.values()))
    with tqdm(desc="evaluate", total=total, initial=done, unit="question") as bar:
        bar.set_postfix_str("loading model")
        for block in answers.iter_batches(batch_size=None):
            interrupts.check()
            bar.set_postfix_str("", refresh=False)
            batch = batches[int(block["batch"][0])]
            if problem := str(block["error"][0]):
                raise ValueError(f"evaluate.tasks.{batch.task}: {problem}")
            answered = zip(batch.questions, block["response"], strict=True)
            jsonl.append(
                _partial(folder, batch.task),
                (_row(question) | {"response": str(response)} for question, response in answered),
            )
            jsonl.append(folder / SPEED, [_spent(batch, block)])
            bar.update(len(batch.questions))


def count_actors(settings: Evaluate, gpu_share: float, batches: int) -> int:
    """Count the models at work at a time.

    On CPUs two at most: each holds the whole model, and its threads use the other cores.
    """
    if settings.num_actors != "auto":
        return settings.num_actors
    places = cluster.count_places(gpu_share)
    return max(min(places if cluster.gpus() else min(places, 2), batches), 1)


def _batches(name: Name, left: Sequence[Question], settings: Evaluate) -> Iterator[Batch]:
    """Questions of similar length together, so that little is padded; the longest first, as they may not fit."""
    asking = settings.tasks[name]
    longest = sorted(left, key=lambda question: -len(question.prompt))
    for first in range(0, len(longest), settings.batch_size):
        part = longest[first : first + settings.batch_size]
        yield Batch(name, part, _folder(name, asking), _new_tokens(name, asking))


def _spent(batch: Batch, block: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "task": batch.task,
        "questions": len(batch.questions),
        "tokens": int(block["tokens"].sum()),
        **{name: float(block[name][0]) for name in ("prefill_s", "decode_s")},
        "peak_bytes": int(block["peak_bytes"][0]),
    }


def _row(question: Question) -> dict[str, Any]:
    return {"id": question.id, "unit": question.unit, "prompt": question.prompt, **question.reference}


def _partial(folder: Path, name: str) -> Path:
    return folder / f".{name}.jsonl"


def _left(folder: Path, name: str, asked: Sequence[Question]) -> list[Question]:
    """Questions without an answer on file."""
    jsonl.mend(_partial(folder, name))
    done = _answered(folder, name)
    return [question for question in asked if question.id not in done or not _same(question, done[question.id])]


def _answered(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Rows on file by id, of a task that is complete or not."""
    files = (folder / f"{name}.jsonl", _partial(folder, name))
    return {row["id"]: row for path in files for row in jsonl.read(path)}


def _same(question: Question, row: Mapping[str, Any]) -> bool:
    """Whether the row answers this very question: another may have had its id in an earlier call."""
    return json.loads(json.dumps(_row(question))) == {name: row[name] for name in row if name != "response"}


def _complete(folder: Path, name: str, asked: Sequence[Question]) -> None:
    """All answers in the benchmark's order, in a file that is there whole or not at all."""
    found = _answered(folder, name)
    text = "".join(json.dumps(found[question.id]) + "\n" for question in asked)
    storage.write(str(folder / f"{name}.jsonl"), text.encode())
    _partial(folder, name).unlink(missing_ok=True)


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    """A task's answered questions, in its order; none where it was not evaluated."""
    return jsonl.read(run / FOLDER / f"{name}.jsonl")


def scores(run: Path, names: Sequence[Name]) -> dict[str, float]:
    """TASK.METRIC of each task, and TASK.questions.  ValueError for a task without an answer, or without a score."""
    result = {}
    for name in names:
        answered = rows(run, name)
        result[f"{name}.questions"] = float(len(answered))
        if not answered:
            raise ValueError(f"evaluate.tasks.{name}: got no answer in {run / FOLDER}, allowed: a task that was asked")
        found = _scores(name, TASKS[name].metrics(answered))
        result |= {f"{name}.{metric}": score for metric, score in found.items()}
    return result


def speed(run: Path) -> dict[str, float]:
    """Of all batches: new tokens a second of decoding, of one actor; seconds to the first token of a question; and the
    most memory that an actor had.
    """
    spent = jsonl.read(run / FOLDER / SPEED)
    asked, tokens, first_s, decode_s = (
        sum(each[name] for each in spent) for name in ("questions", "tokens", "prefill_s", "decode_s")
    )
    if not spent:
        return {}
    return {
        # the first token of each answer comes with the prefill
        **({"speed.decode_tokens_per_s": (tokens - asked) / decode_s} if decode_s else {}),
        "speed.prefill_s_per_question": first_s / asked,
        "speed.peak_bytes": max(each["peak_bytes"] for each in spent),
    }


@dataclass
class Example:
    """A test question and the compression of its image; `slot` and `merged` as in `redux.picture.draw_patches`."""

    image: Image.Image
    question: str
    answer: str
    response: str
    correct: bool
    slot: np.ndarray
    merged: np.ndarray


def examples(subject: Subject, run: Path, count: int) -> list[Example]:
    """`count` answered easy-VQA questions on different images, evenly spread, with what VMTC did to each."""
    first = {row["image"]: row for row in reversed(rows(run, "easy_vqa"))}
    by_image = list(reversed(first.values()))
    if not (count and by_image and answering.is_llava(subject.model)):
        return []
    llava = ReduxForConditionalGeneration.from_pretrained(subject.model, **subject.methods).eval()
    of = subject
    _, image_aspect_ratio = answering.resolve_format(
        llava.config.to_dict(), of.template, of.image_aspect_ratio, of.allow_mismatch
    )
    result = []
    for row in (by_image[place] for place in spread(len(by_image), count)):
        image = load_pixels(
            (easy_vqa.FOLDER / row["image"]).read_bytes(), llava.config.vision_config.image_size, image_aspect_ratio
        )
        with torch.inference_mode():
            _, fate = llava.model.encode_images(normalize_pixels(torch.from_numpy(image[None])))
        result.append(
            Example(
                image=Image.fromarray(image.transpose(1, 2, 0)),
                question=row["prompt"],
                answer=row["answer"],
                response=row["response"],
                correct=easy_vqa.right(row),
                slot=fate.slot[0].numpy(),
                merged=fate.merged[0].numpy(),
            )
        )
    return result
