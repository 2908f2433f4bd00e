"""Questions that lead to a first job file (`redux init`); `first_job.py` writes the file.

Each question shows its default; a wrong answer is explained and asked again. Paths are checked while the user is there
to correct them. Importing this module loads neither torch nor Ray.
"""

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from jobs import schema
from jobs.first_job import EASY_VQA, LARGE_MODELS, SMALL_MODEL, InitAnswers, write_job
from pipelines.core import storage
from pipelines.data import records, shard_index
from pipelines.data.options import SetSource
from pipelines.data.sources.opened import RecordSource
from pipelines.data.sources.rows import SourceRecord
from pipelines.evaluation import tasks
from redux.benchmarks import custom, instructions
from redux.benchmarks.custom import AnswerMetric
from redux.hub import describe_missing, is_hub_id

ParsedAnswer = TypeVar("ParsedAnswer")

NO_QUESTIONS = "none"

RUNS = Path("runs")
"""Default folder of the run folders of `redux run`."""

DEFAULT_CHECKPOINT = "llava-hf/llava-1.5-7b-hf"
DEFAULT_METRIC: AnswerMetric = "contains"
MAX_CHECKED_RECORDS = 20_000
MAX_CHECKED_URLS = 20


class Dialog:
    """Questions on the terminal.

    Args:
        takes_defaults: answer every question by its default.
        read: reads a line of the user.
    """

    def __init__(self, takes_defaults: bool, read: Callable[[str], str] = input) -> None:
        self.takes_defaults, self.read = takes_defaults, read

    def ask(self, question: str, default: str, parse: Callable[[str], ParsedAnswer]) -> ParsedAnswer:
        """Ask until the answer is right.

        Args:
            question: the question.
            default: answer of an empty line.
            parse: turns the answer into its value; a ValueError explains a wrong one.

        Raises:
            ValueError: the input ends, or a default is wrong and defaults are taken.
        """
        if self.takes_defaults:
            return parse(default)
        offered = default
        while True:
            try:
                answer = self.read(f"{question} [{offered}]: " if offered else f"{question}: ").strip() or offered
                if answer:
                    return parse(answer)
            except EOFError:
                raise ValueError("init: got the end of the input, allowed: an answer to each question") from None
            except ValueError as error:
                print(f"  {error}")
                if answer == offered:
                    offered = ""  # A default that was refused is not offered again


def init(path: Path, takes_defaults: bool) -> None:
    """Ask the questions and write the job file.

    Args:
        path: job file, which must not exist.
        takes_defaults: answer every question by its default.

    Raises:
        ValueError: the file exists or cannot be written, or there is no terminal.
    """
    if path.exists():
        raise ValueError(f"{path}: exists, allowed: a new file")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: {path.parent} is not a folder, allowed: a file in a folder that exists")
    if not takes_defaults and not sys.stdin.isatty():
        raise ValueError("init: got an input that is not a terminal, allowed: a terminal, or --yes for all defaults")
    if not takes_defaults:
        print("Enter takes the answer in brackets.")
    answers = ask_all(Dialog(takes_defaults))
    text = write_job(answers)
    with path.open("x", encoding="utf-8") as file:  # Never over a file that appeared meanwhile
        file.write(text)
    schema.load(path)
    print(f"{path}: written. Look for mistakes, which takes a minute:\n    redux check {path}")
    print(f"Train, score and write a report:\n    redux run {path}")
    print(f'Then ask the model:\n    redux ask runs/{answers.name} IMAGE "question"')


def ask_all(dialog: Dialog) -> InitAnswers:
    """Ask all questions."""
    data = dialog.ask(
        "Data: easy-vqa, a file or folder of records or captions, or a folder of shards", EASY_VQA, parse_data
    )
    about_data = ask_about_data(dialog, data)
    about_questions = {} if data == EASY_VQA else ask_about_questions(dialog, about_data.get("images"))
    gpus = dialog.ask("Number of GPUs", str(count_local_gpus()), parse_gpus)
    model = dialog.ask(
        f"Model: {SMALL_MODEL} (from random weights), {' or '.join(LARGE_MODELS)} (CLIP and Vicuna, as LLaVA-1.5), "
        "folder or hub id of a LLaVA, or those of an image tower and a language model with a blank between",
        DEFAULT_CHECKPOINT if gpus and data != EASY_VQA else SMALL_MODEL,
        lambda text: parse_model(text, gpus),
    )
    name = dialog.ask("Name of the run", find_free_name(EASY_VQA if data == EASY_VQA else "mine"), parse_name)
    return InitAnswers(name=name, data=data, gpus=gpus, model=model, **about_data, **about_questions)


def ask_about_data(dialog: Dialog, data: str) -> dict[str, Any]:
    """Count the records, and ask for their images if they are not in the source. Returns fields of `InitAnswers`."""
    if data == EASY_VQA:
        return {}
    if shard_index.is_finished(data):
        number = len(shard_index.Shards(data))
        print(f"  {number:,} samples")
        return {"num_records": number}
    images, rejected, number, checked = ask_images(dialog, data)
    listing = "".join(f", {count} with {reason}" for reason, count in rejected.most_common())
    print(f"  {number:,} records, {checked:,} of them checked: {rejected.total():,} rejected{listing}")
    return {"images": images, "num_records": number, "bad_fraction": rejected.total() / checked}


def ask_about_questions(dialog: Dialog, images: str | None) -> dict[str, Any]:
    """Ask for questions to score the model, their metric and images. Returns fields of `InitAnswers`."""
    questions = dialog.ask(
        "File of your own questions with answers, to score the model, or none", NO_QUESTIONS, parse_questions
    )
    if not questions:
        return {}
    metric = dialog.ask(
        f"How to score them: {', '.join(get_args(AnswerMetric))}",
        DEFAULT_METRIC,
        lambda text: parse_metric(text, questions),
    )
    question_images = ask_question_images(dialog, questions, metric, images)
    return {"questions": questions, "metric": metric, "question_images": question_images}


def ask_images(dialog: Dialog, data: str) -> tuple[str, Counter[str], int, int]:
    """Ask for the folder of the images, if they are not in the source.

    Returns:
        The folder, counts of rejected records by reason, number of records, and number of those that were checked.
    """
    source = RecordSource(SetSource(source=data))
    entries = list(itertools.islice(source, MAX_CHECKED_RECORDS))
    images, rejected = source.images, count_rejections(entries, source.images)[0]
    if any(entry.image is None for entry in entries):
        images, rejected = dialog.ask("Folder of the images", images, lambda text: check_images(text, entries))
    return images, rejected, sum(1 for _ in source), len(entries)


def parse_data(text: str) -> str:
    """Check the source of the data."""
    if text == EASY_VQA:
        return text
    data = expand_home(text)
    if shard_index.is_finished(data):
        return data
    try:
        source = RecordSource(SetSource(source=data))
    except ValueError as error:
        # The set easy-vqa is allowed here as well; the error may end with advice.
        raise ValueError(str(error).replace(", allowed: ", f", allowed: {EASY_VQA}, ", 1)) from None
    entries = list(itertools.islice(source, MAX_CHECKED_RECORDS))
    rejections = [entry.rejection or records.find_rejection(entry.record, None) for entry in entries]
    if all(rejections):
        reason = f"{rejections[0].field} {rejections[0].explanation}" if rejections[0] else "it has no records"
        raise ValueError(
            f"{data}: every record is rejected, allowed: conversations, questions with answers, or captions; the "
            f"first: {reason}"
        )
    return data


def expand_home(text: str) -> str:
    """Replace ~ at the start of a path by the home folder; a URL stays as it is."""
    return str(Path(text.removeprefix("file://")).expanduser()) if storage.is_local(text) else text


def count_rejections(entries: list[SourceRecord], folder: str) -> tuple[Counter[str], str]:
    """Count the rejected records by reason, and describe the first one.

    Args:
        entries: the records.
        folder: folder or URL of their images. In a bucket, only the first MAX_CHECKED_URLS are looked for.
    """
    rejected = Counter[str]()
    example = ""
    remaining = len(entries) if storage.is_local(folder) else MAX_CHECKED_URLS
    for entry in entries:
        rejection = entry.rejection or records.find_rejection(entry.record, None)
        if rejection:
            rejected[rejection.reason] += 1
            example = example or f"{rejection.field} {rejection.value}: {rejection.explanation}"
        elif entry.image is None and (name := entry.record.get("image")) and remaining:
            remaining -= 1
            path = storage.join(folder, name)
            if not (Path(path).is_file() if storage.is_local(path) else storage.exists(path)):
                rejected["missing image"] += 1
                example = example or f"{path} does not exist"
    return rejected, example


def check_images(text: str, entries: list[SourceRecord]) -> tuple[str, Counter[str]]:
    """Check a folder of images against the records.

    Returns:
        The folder, and counts of the rejected records by reason.

    Raises:
        ValueError: it is not a folder, or every record is rejected.
    """
    folder = expand_home(text)
    if storage.is_local(folder) and not Path(folder).is_dir():
        raise ValueError(f"{folder}: no folder, allowed: the folder in which the images of the records are")
    rejected, example = count_rejections(entries, folder)
    if rejected.total() == len(entries):
        raise ValueError(f"{folder}: every record is rejected, allowed: at least one that is right; {example}")
    return folder, rejected


def parse_questions(text: str) -> str | None:
    """Check a file of questions."""
    if text == NO_QUESTIONS:
        return None
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no file, allowed: JSON lines of image, question and answer, or {NO_QUESTIONS}")
    try:
        custom.read_questions(str(path), "exact")
    except ValueError:
        # Prompts that `redux instructions` wrote have another form.
        try:
            instructions.read_questions(str(path))
        except ValueError:
            custom.read_questions(str(path), "exact")
    return str(path)


def ask_question_images(dialog: Dialog, questions: str, metric: AnswerMetric, images: str | None) -> str | None:
    """Find the folder of the images of the questions, or ask for it; None for the folder of the file.

    Args:
        dialog: asks.
        questions: file of the questions.
        metric: their metric.
        images: folder of the training images.
    """
    for folder in (images, None):
        try:
            return check_question_images(folder, questions, metric)
        except ValueError:
            continue
    return dialog.ask(
        "Folder of the images of the questions",
        str(Path(questions).parent),
        lambda text: check_question_images(text, questions, metric),
    )


def check_question_images(folder: str | None, questions: str, metric: AnswerMetric) -> str | None:
    """Check that a folder, by default that of the file, has the images of all questions; ValueError if not."""
    task = tasks.TaskSettings(file=questions, metric=metric, images=folder)
    root = Path(tasks.find_image_folder("own", task)).expanduser()
    names = [question.image for question in tasks.load_questions("own", task) if isinstance(question.image, str)]
    if missing := [name for name in names if not (root / name).is_file()]:
        raise ValueError(
            f"{root}: {len(missing)} of {len(names)} images are missing, allowed: the folder of all; "
            f"the first: {missing[0]}"
        )
    return folder


def parse_metric(text: str, questions: str) -> AnswerMetric:
    """Check the metric against the questions."""
    for metric in get_args(AnswerMetric):
        if text == metric:
            if metric == "instructions":
                instructions.read_questions(questions)
            else:
                custom.read_questions(questions, metric)
            return metric
    raise ValueError(f"metric: got {text}, allowed: {', '.join(get_args(AnswerMetric))}")


def count_local_gpus() -> int:
    """Count the NVIDIA GPUs of this machine by their device files."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def parse_gpus(text: str) -> int:
    """Parse the number of GPUs."""
    if not (text.isascii() and text.isdecimal() and int(text) <= 1024):
        raise ValueError(f"GPUs: got {text}, allowed: a whole number, 0 for training on CPUs")
    return int(text)


def parse_model(text: str, gpus: int) -> str:
    """Check the model."""
    if text in LARGE_MODELS and not gpus:
        raise ValueError(f"model: got {text} without a GPU, allowed: {SMALL_MODEL}, or a LLaVA that fits into memory")
    if text in (SMALL_MODEL, *LARGE_MODELS):
        return text
    sources = text.split()
    if len(sources) not in (1, 2):
        raise ValueError(f"model: got {len(sources)} names, allowed: one LLaVA, or an image tower and a language model")
    return " ".join(_parse_source(source, is_llava=len(sources) == 1) for source in sources)


def _parse_source(text: str, is_llava: bool) -> str:
    """Check a folder, hub id or URL of a model or of a part; folders must have a configuration."""
    path = Path(text).expanduser()
    if path.is_dir():
        try:
            model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            model_type = None
        if model_type is None or (is_llava and model_type != "llava"):
            kind = "model_type llava" if is_llava else "a model_type"
            raise ValueError(f"model: got {path}, allowed: a folder whose config.json has {kind}")
        return str(path)
    is_url = re.fullmatch(r"[a-z0-9]+://\S+", text)
    if not is_url and "/" in text and not is_hub_id(text):
        raise ValueError(f"model: got {text}, allowed: folder, hub id or URL of a model; {describe_missing(path)}")
    if not is_url and "/" not in text:
        allowed = f"{SMALL_MODEL}, {', '.join(LARGE_MODELS)}, or folder, hub id or URL of a LLaVA or of two parts"
        raise ValueError(f"model: got {text}, allowed: {allowed}")
    return text


def find_free_name(name: str) -> str:
    """Find a name of which there is no run folder yet: NAME, or NAME-2, NAME-3 and so on."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(free for free in names if not (RUNS / free).exists())


def parse_name(text: str) -> str:
    """Check the name of the run, which becomes that of its folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise ValueError(f"name: got {text}, allowed: letters, digits, '.', '_' and '-', first a letter or a digit")
    if (RUNS / text).exists():
        raise ValueError(f"name: got {text}, whose folder {RUNS / text} exists, allowed: a new name")
    return text
