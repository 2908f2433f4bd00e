"""Tests of the evaluation: each question is answered once, also after a crash, and scores depend on the files alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipelines.data import easy_vqa
from pipelines.evaluation import evaluate
from pipelines.evaluation.answer_files import ANSWERS_FOLDER
from pipelines.evaluation.evaluate import EvaluatedModel, read_answers, trace_compression
from pipelines.evaluation.statistics import bootstrap_interval
from pipelines.evaluation.tasks import (
    EVALUATION_TASKS,
    Evaluate,
    TaskName,
    TaskSettings,
    count_new_tokens,
    find_task,
    load_questions,
)
from redux import answering
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.benchmarks import Question
from redux.benchmarks.instructions import write_questions
from redux.conversation import train_word_tokenizer
from redux.image import load_pixels
from redux.model import build_model
from redux.settings import CMAI, VMTC
from redux.trace import measure_attention
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

InProcess = Callable[[], AbstractContextManager[None]]

TEMPLATE = "vicuna_bare"
PATCHES = 16
LIMIT = TaskSettings(limit=6, max_new_tokens=5)
FEW = TaskSettings(limit=4, max_new_tokens=9)
TASK_SETTINGS: dict[TaskName, TaskSettings] = {"easy_vqa": LIMIT, "instructions": FEW}
ASKED = len(load_questions("easy_vqa", LIMIT))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with both modules on and random weights, large enough that answers differ."""
    folder = tmp_path_factory.mktemp("model")
    words = train_word_tokenizer((question.prompt for question in easy_vqa.load_test_questions()), 160)
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    llava = build_model(
        ModelSettings(
            tower=TowerSizes(image_size=16, patch_size=4, num_hidden_layers=4, **size),
            language=LanguageSizes(num_hidden_layers=2, max_position_embeddings=160, **size),
            vmtc=VMTC(ratio=0.5, stages=2),
            cmai=CMAI(gamma_max=0.6),
        ),
        words,
    )
    with torch.no_grad():
        for parameter in llava.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    llava.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def evaluated(model: Path) -> EvaluatedModel:
    return EvaluatedModel(model=str(model), template=TEMPLATE)


def settings(**tasks: TaskSettings) -> Evaluate:
    return Evaluate(
        tasks={cast(TaskName, name): task for name, task in tasks.items()} or {"easy_vqa": LIMIT}, batch_size=7
    )


@pytest.fixture(scope="module")
def undisturbed(evaluated: EvaluatedModel, ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which two actors of Ray evaluated both built-in tasks."""
    run = tmp_path_factory.mktemp("undisturbed")
    evaluate.evaluate(evaluated, run, settings(easy_vqa=LIMIT, instructions=FEW))
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def count_answered(run: Path, name: str = "easy_vqa") -> int:
    """Count the questions that a model has answered, including repeated ones."""
    path = run / ANSWERS_FOLDER / evaluate.SPEED_FILE
    return sum(row["questions"] for row in lines(path) if row["task"] == name) if path.exists() else 0


# Answers and scores


def test_every_question_is_answered_once_in_the_order_of_the_benchmark(undisturbed: Path) -> None:
    for name, task in TASK_SETTINGS.items():
        unanswered_questions = load_questions(name, task)
        expected = [(row["id"], row["unit"], row["prompt"]) for row in read_answers(undisturbed, name)]
        assert expected == [(question.id, question.unit, question.prompt) for question in unanswered_questions]
        assert count_answered(undisturbed, name) == len(unanswered_questions)
    assert not list((undisturbed / ANSWERS_FOLDER).glob(".*"))


def test_a_batch_gets_the_answers_that_each_question_gets_alone(evaluated: EvaluatedModel, undisturbed: Path) -> None:
    answerer = answering.load(evaluated.model, template=TEMPLATE)
    for name, task in TASK_SETTINGS.items():
        responses = []
        for question in load_questions(name, task):
            assert isinstance(question.image, str)
            assert task.max_new_tokens
            image = (easy_vqa.PACKAGE_IMAGES / question.image).read_bytes()
            responses += answerer([question.prompt], [image], task.max_new_tokens).texts
        assert responses == [row["response"] for row in read_answers(undisturbed, name)]
        assert len(set(responses)) > len(responses) // 4, "answers that differ, or equality says nothing"


def test_scores_are_those_of_the_files_alone(undisturbed: Path) -> None:
    found = evaluate.compute_scores(undisturbed, ["easy_vqa", "instructions"])
    correct = [row["response"] == row["answer"] for row in read_answers(undisturbed, "easy_vqa")]
    assert found["easy_vqa.accuracy"] == sum(correct) / ASKED
    assert found["easy_vqa.questions"] == ASKED
    assert found["instructions.questions"] == 4 * 16
    assert {
        "instructions.strict",
        "instructions.loose",
        "instructions.both",
        "instructions.strict.json",
    } <= found.keys()
    speed = evaluate.compute_speed(undisturbed)
    assert all(value > 0 for value in speed.values()), speed


def test_the_first_batch_of_each_size_of_an_actor_does_not_count_as_speed(undisturbed: Path, tmp_path: Path) -> None:
    rows = lines(undisturbed / ANSWERS_FOLDER / evaluate.SPEED_FILE)
    sizes = {row["questions"] for row in rows}
    # Each of the two actors has at most one for each size.
    assert len(sizes) <= sum(row["is_warm_up"] for row in rows) <= 2 * len(sizes)
    assert all(any(row["is_warm_up"] for row in rows if row["questions"] == size) for size in sizes)
    row = {"task": "easy_vqa", "questions": 4, "tokens": 12, "prefill_s": 2.0, "decode_s": 0.5, "peak_bytes": 5}
    warm_up = row | {"prefill_s": 90.0, "decode_s": 60.0, "peak_bytes": 7, "is_warm_up": True}
    file = tmp_path / ANSWERS_FOLDER / evaluate.SPEED_FILE
    file.parent.mkdir()
    file.write_text("".join(json.dumps(each) + "\n" for each in (warm_up, row, row | {"is_warm_up": False})))
    expected = {"speed.decode_tokens_per_s": 16.0, "speed.prefill_s_per_question": 0.5, "speed.peak_bytes": 7}
    assert evaluate.compute_speed(tmp_path) == expected
    # A single batch has no other times.
    file.write_text(json.dumps(warm_up) + "\n")
    assert evaluate.compute_speed(tmp_path)["speed.prefill_s_per_question"] == 22.5


def test_scores_of_types_count_their_own_questions() -> None:
    counted = {"yes/no": (3, 4), "colour": (1, 5), "shape": (0, 1)}  # right, asked
    answered = [
        {"unit": "a", "type": kind, "answer": "yes", "response": "yes" if number < right else "no"}
        for kind, (right, unanswered_questions) in counted.items()
        for number in range(unanswered_questions)
    ]
    assert {name: metric.score for name, metric in easy_vqa.compute_metrics(answered).items()} == {
        "accuracy": 0.4,
        "accuracy.colour": 0.2,
        "accuracy.shape": 0.0,
        "accuracy.yes/no": 0.75,
    }


def test_a_limit_asks_about_images_from_all_over_and_all_about_each() -> None:
    everything = load_questions("easy_vqa", TaskSettings())
    units = list(dict.fromkeys(question.unit for question in everything))
    some = load_questions("easy_vqa", TaskSettings(limit=90))
    kept = [units.index(unit) for unit in dict.fromkeys(question.unit for question in some)]
    assert (len(everything), len(units), len(kept)) == (9673, 1000, 90)
    assert set(np.diff(kept)) == {11, 12}
    assert some == [question for question in everything if units.index(question.unit) in kept]
    assert load_questions("easy_vqa", TaskSettings(limit=10**6)) == everything


# Attention, and answers without image


def test_attention_is_measured_of_as_many_answers_as_asked_for(
    in_process: InProcess, evaluated: EvaluatedModel, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / ANSWERS_FOLDER, tmp_path / ANSWERS_FOLDER)
    tasks = {"instructions": FEW, "instructions_without_image": FEW}
    before = count_answered(tmp_path, "instructions")
    with in_process():
        found = evaluate.evaluate(evaluated, tmp_path, replace(settings(**tasks), attention=3))
    rows, whole = read_answers(tmp_path, "instructions"), read_answers(undisturbed, "instructions")
    measured = [row for row in rows if "attention" in row]
    assert [row["id"] for row in measured] == [rows[len(rows) * number // 3]["id"] for number in range(3)]
    assert count_answered(tmp_path, "instructions") == before + 3, "only these are asked again"
    assert [{**row, "attention": None} for row in rows] == [{**row, "attention": None} for row in whole]
    answerer = answering.load(evaluated.model, template=TEMPLATE)
    assert isinstance(answerer, answering.TrainedLlava)
    images = {question.id: str(question.image) for question in load_questions("instructions", FEW)}
    for row in measured:
        image = (easy_vqa.PACKAGE_IMAGES / images[row["id"]]).read_bytes()
        expected = measure_attention(answerer, row["prompt"], image, row["response"])
        assert row["attention"]["image"] == pytest.approx(expected.image)
        assert row["attention"]["image_tokens"] == PATCHES // 2
    assert 0 < found["instructions.image_mass"] < 1
    assert found["instructions.dominance"] > 0
    assert "instructions_without_image.image_mass" not in found, "no image, no attention to it"


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_prompts_without_image_are_answered_from_text_alone(
    in_process: InProcess, evaluated: EvaluatedModel, tmp_path: Path
) -> None:
    with in_process():
        evaluate.evaluate(evaluated, tmp_path, settings(instructions_without_image=FEW))
    rows, with_image = read_answers(tmp_path, "instructions_without_image"), load_questions("instructions", FEW)
    assert [(row["id"], row["unit"], row["prompt"]) for row in rows] == [
        (question.id, question.unit, question.prompt) for question in with_image
    ]
    answerer = answering.load(evaluated.model, template=TEMPLATE)
    assert FEW.max_new_tokens
    for row in rows[::9]:
        assert answerer([row["prompt"]], [None], FEW.max_new_tokens).texts == [row["response"]]


# Crashes


def test_questions_with_an_answer_on_disk_are_not_asked_again(
    in_process: InProcess, evaluated: EvaluatedModel, undisturbed: Path, tmp_path: Path
) -> None:
    whole = read_answers(undisturbed, "easy_vqa")
    folder = tmp_path / ANSWERS_FOLDER
    folder.mkdir()
    kept = [row | {"response": "on file"} for row in whole[10:30]]
    (folder / ".easy_vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    with in_process():
        evaluate.evaluate(evaluated, tmp_path, settings())
    assert read_answers(tmp_path, "easy_vqa") == whole[:10] + kept + whole[30:]
    assert count_answered(tmp_path) == ASKED - len(kept)
    evaluate.evaluate(evaluated, tmp_path, settings())
    evaluate.evaluate(replace(evaluated, kernels="plain"), tmp_path, settings())
    assert count_answered(tmp_path) == ASKED - len(kept), "a finished task is not repeated, with any kernels"


def test_another_question_with_the_id_of_an_answered_one_is_asked(
    in_process: InProcess, evaluated: EvaluatedModel, undisturbed: Path, tmp_path: Path
) -> None:
    whole = read_answers(undisturbed, "easy_vqa")
    (tmp_path / ANSWERS_FOLDER).mkdir()
    other = [row | {"prompt": "what was that?"} for row in whole[:4]] + whole[4:]
    (tmp_path / ANSWERS_FOLDER / "easy_vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    with in_process():
        evaluate.evaluate(evaluated, tmp_path, settings())
    assert read_answers(tmp_path, "easy_vqa") == whole
    assert count_answered(tmp_path) == 4


def test_a_question_whose_line_was_cut_off_is_asked_again_and_no_other(undisturbed: Path, tmp_path: Path) -> None:
    """A crash may cut the line at any byte; rows of instructions contain nested braces."""
    first, last = (json.dumps(row) + "\n" for row in read_answers(undisturbed, "instructions")[:2])
    unanswered_questions = load_questions("instructions", FEW)[:2]
    for length in range(len(last) + 1):
        (tmp_path / ".instructions.jsonl").write_text(first + last[:length])
        left = evaluate._find_unanswered(tmp_path, "instructions", unanswered_questions)
        assert left == ([] if length == len(last) else unanswered_questions[1:])
        assert (tmp_path / ".instructions.jsonl").read_text() == first + (last if not left else "")


@pytest.mark.usefixtures("ray_cluster")
def test_answers_of_other_models_and_settings_are_refused(
    evaluated: EvaluatedModel, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    twin = str(shutil.copytree(evaluated.model, tmp_path / "twin"))
    for other, expected in (
        ((replace(evaluated, template="vicuna_v1"), settings()), "template = 'vicuna_bare', not 'vicuna_v1'"),
        ((replace(evaluated, model=twin), settings()), f"not {twin!r}"),
        ((evaluated, settings(easy_vqa=replace(LIMIT, max_new_tokens=6))), "max_new_tokens.easy_vqa = 5, not 6"),
        ((evaluated, replace(settings(), image_input="caption")), "image_input = 'pixels', not 'caption'"),
    ):
        other_model, other_settings = other
        with pytest.raises(ValueError, match=re.escape(expected)):
            evaluate.evaluate(other_model, tmp_path, other_settings)


KILLED = """
import sys
from pathlib import Path
from pipelines.core import cluster
from pipelines.evaluation import evaluate
from pipelines.evaluation.tasks import TaskSettings
with cluster.open_session():
    task = TaskSettings(limit=6, max_new_tokens=5)
    evaluated = evaluate.EvaluatedModel(model=sys.argv[1], template="vicuna_bare")
    settings = evaluate.Evaluate(tasks={"easy_vqa": task}, batch_size=2, num_actors=1)
    evaluate.evaluate(evaluated, Path(sys.argv[2]), settings)
"""


def test_an_evaluation_that_was_killed_continues_to_the_same_answers(
    in_process: InProcess, evaluated: EvaluatedModel, undisturbed: Path, tmp_path: Path, ray_cluster: Any
) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", KILLED, evaluated.model, str(tmp_path)]
    partial = tmp_path / ANSWERS_FOLDER / ".easy_vqa.jsonl"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: partial.exists() and len(partial.read_bytes().splitlines()) > 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [row["id"] for row in lines(partial)]
    assert len(before) < ASKED, "it was killed too late"
    with in_process():
        evaluate.evaluate(evaluated, tmp_path, settings())
    assert (tmp_path / ANSWERS_FOLDER / "easy_vqa.jsonl").read_bytes() == (
        undisturbed / ANSWERS_FOLDER / "easy_vqa.jsonl"
    ).read_bytes()
    # The batch whose answers were written last may have been killed before its time was.
    assert count_answered(tmp_path) in (ASKED, ASKED - 2)


# Errors


@pytest.mark.usefixtures("ray_cluster")
def test_a_missing_image_is_named_in_one_line(in_process: InProcess, evaluated: EvaluatedModel, tmp_path: Path) -> None:
    task = TaskSettings(limit=1, images=str(tmp_path / "nowhere"))
    message = r"evaluate\.tasks\.easy_vqa: .*nowhere/test/images/\d+\.png"
    with in_process(), pytest.raises(ValueError, match=message):
        evaluate.evaluate(evaluated, tmp_path, settings(easy_vqa=task))


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_of_another_type_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type: got bert"):
        evaluate.evaluate(EvaluatedModel(model=str(tmp_path)), tmp_path, settings())


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("gqa", (), r"evaluate\.tasks\.gqa\.files: .*got nothing"),
        ("easy_vqa", ("x",), r"evaluate\.tasks\.easy_vqa\.files: got x, allowed: none"),
        ("gqa", ("nowhere.json",), r"evaluate\.tasks\.gqa\.files: nowhere\.json: cannot be read"),
        ("instructions", ("nowhere.jsonl",), r"evaluate\.tasks\.instructions\.files: .*nowhere\.jsonl"),
    ],
)
def test_files_that_cannot_be_used_are_named(name: TaskName, files: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_questions(name, TaskSettings(files=files))


def test_an_id_that_comes_twice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [Question(id="7", unit="7", image=None, prompt="?", reference={})] * 2
    monkeypatch.setitem(EVALUATION_TASKS, "gqa", EVALUATION_TASKS["gqa"]._replace(questions=lambda: twice))
    with pytest.raises(ValueError, match="2 questions with the id 7"):
        load_questions("gqa", TaskSettings())


# Compression of images


def test_a_traced_image_is_that_of_the_model_and_has_the_token_of_each_patch(evaluated: EvaluatedModel) -> None:
    images = [(easy_vqa.PACKAGE_IMAGES / f"test/images/{number}.png").read_bytes() for number in range(3)]
    traces = trace_compression(evaluated, images)
    assert len(traces) == len(images)
    for image, trace in zip(images, traces, strict=True):
        assert np.array_equal(np.asarray(trace.image).transpose(2, 0, 1), load_pixels(image, 16, "pad"))
        assert trace.token_of_patch.shape == trace.merged.shape == (PATCHES,)
        assert set(trace.token_of_patch) - {-1} == set(range(PATCHES // 2)), (
            "half of the tokens reach the language model"
        )
        kept = trace.token_of_patch[~trace.merged & (trace.token_of_patch >= 0)]
        assert len(kept) == len(set(kept)) > 0, "a kept patch has a token of its own"


def test_a_model_that_keeps_all_tokens_has_no_traces(evaluated: EvaluatedModel) -> None:
    image = (easy_vqa.PACKAGE_IMAGES / "test/images/0.png").read_bytes()
    assert trace_compression(replace(evaluated, methods={"vmtc": None}), [image]) == []


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: threads of a tiny model mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Questions of users


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Folder with a file of eight questions about images in folders below it, and about none."""
    folder = tmp_path / "own"
    rows = [
        {"question": question.prompt, "answer": question.reference["answer"], "type": question.reference["type"]}
        | {"image": question.image, "id": f"q{number}"}
        for number, question in enumerate(load_questions("easy_vqa", TaskSettings(limit=3))[:8])
    ]
    for row in rows:
        (folder / row["image"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(easy_vqa.PACKAGE_IMAGES / row["image"], folder / row["image"])
    rows[7] |= {"image": None, "type": "text"}
    write_lines(folder / "my.jsonl", rows)
    return folder


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_task(folder: Path, **changes: Any) -> TaskSettings:
    return TaskSettings(**{"file": str(folder / "my.jsonl"), "metric": "contains", "max_new_tokens": 5, **changes})


@pytest.mark.usefixtures("local_ray_data", "ray_cluster")
def test_own_questions_are_answered_scored_and_reported_by_type(
    evaluated: EvaluatedModel, own: Path, tmp_path: Path
) -> None:
    tasks = settings(mine=own_task(own), easy_vqa=LIMIT)
    scores = evaluate.evaluate(evaluated, tmp_path, tasks)
    rows = read_answers(tmp_path, "mine")
    assert [row["prompt"] for row in rows] == [row["question"] for row in lines(own / "my.jsonl")]
    # The answers are those of the model to each question alone.
    answerer = answering.load(evaluated.model, template=TEMPLATE)
    for row in rows:
        image = (own / row["image"]).read_bytes() if row["image"] else None
        assert answerer([row["prompt"]], [image], 5).texts == [row["response"]]
    # Scores by type, from the file alone.
    right = [row["answers"][0] in row["response"].lower().split() for row in rows]
    types = {row["type"] for row in rows}
    assert scores["mine.questions"] == 8
    assert scores["mine.accuracy"] == sum(right) / 8
    for type in types:
        of_type = [correct for correct, row in zip(right, rows, strict=True) if row["type"] == type]
        assert scores[f"mine.accuracy.{type}"] == sum(of_type) / len(of_type)
    # A search may optimise each of these.
    assert scores.keys() == evaluate.list_metric_names(tasks)
    # Intervals by type.
    for name, metric in find_task("mine").metrics(rows).items():
        interval = bootstrap_interval([metric], samples=200)
        assert interval.low <= scores[f"mine.{name}"] == interval.value <= interval.high


@pytest.mark.usefixtures("local_ray_data", "ray_cluster")
def test_questions_that_changed_in_the_file_are_asked_again_and_no_other(
    evaluated: EvaluatedModel, own: Path, tmp_path: Path
) -> None:
    tasks = settings(mine=own_task(own))
    evaluate.evaluate(evaluated, tmp_path, tasks)
    assert not evaluate.has_new_questions(tmp_path, tasks)
    answered, rows = read_answers(tmp_path, "mine"), lines(own / "my.jsonl")
    # One question is removed, one has another answer, one another text, one another image; one is new.
    changed = [*rows[1:], {"question": "what is this?", "answer": "red", "id": "new"}]
    changed[0] = changed[0] | {"answer": "something else"}
    changed[1] = changed[1] | {"question": "what colour?"}
    changed[2] = changed[2] | {"image": None}
    write_lines(own / "my.jsonl", changed)
    assert evaluate.has_new_questions(tmp_path, tasks)
    scores = evaluate.evaluate(evaluated, tmp_path, tasks)
    again = read_answers(tmp_path, "mine")
    assert [row["id"] for row in again] == [row["id"] for row in changed]
    assert again[3:-1] == answered[4:]
    assert count_answered(tmp_path, "mine") == 8 + 4
    assert again[0]["response"] == answered[1]["response"]
    assert again[0]["answers"] == ["something else"]
    assert scores == evaluate.compute_scores(tmp_path, ["mine"]) | evaluate.compute_speed(tmp_path)
    assert not evaluate.has_new_questions(tmp_path, tasks)
    # Another metric scores other rows.
    assert evaluate.has_new_questions(tmp_path, settings(mine=own_task(own, metric="exact")))


@pytest.mark.usefixtures("local_ray_data", "ray_cluster")
def test_an_image_that_cannot_be_decoded_is_named(evaluated: EvaluatedModel, own: Path, tmp_path: Path) -> None:
    first, *others = lines(own / "my.jsonl")
    path = own / "cut.png"
    content = (own / first["image"]).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    write_lines(own / "my.jsonl", [*others, first | {"image": "cut.png"}])
    evaluate.check_task("mine", own_task(own))
    with pytest.raises(ValueError, match=rf"^evaluate\.tasks\.mine: .*; the image is {re.escape(str(path))}$"):
        evaluate.evaluate(evaluated, tmp_path, settings(mine=own_task(own)))


def test_all_local_images_are_checked_before_the_start(own: Path, tmp_path: Path) -> None:
    rows = lines(own / "my.jsonl")
    evaluate.check_task("mine", own_task(own))
    evaluate.check_task("easy_vqa", LIMIT)
    # Formats that Pillow does not know.
    (own / "text.png").write_text("no image")
    write_lines(own / "my.jsonl", [*rows, {**rows[0], "id": "x", "image": "text.png"}])
    with pytest.raises(
        ValueError, match=r"tasks\.mine\.images: got 1 of \d images in .*: 'text\.png', allowed: images"
    ):
        evaluate.check_task("mine", own_task(own))
    # Missing files, the first one present; also a folder.
    missing = [{**rows[0], "id": f"m{number}", "image": f"gone/{number}.png"} for number in range(5)]
    write_lines(own / "my.jsonl", [*rows, *missing, {**missing[0], "id": "n"}, {**rows[0], "id": "f", "image": "test"}])
    message = r"got 6 of \d+ images in .*: 'gone/0\.png', 'gone/1\.png', 'gone/2\.png', …, allowed: files that exist"
    with pytest.raises(ValueError, match=rf"^evaluate\.tasks\.mine\.images: {message}$"):
        evaluate.check_task("mine", own_task(own))
    elsewhere = own_task(own, images=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"images in .*nowhere.*allowed: files that exist"):
        evaluate.check_task("mine", elsewhere)
    with pytest.raises(ValueError, match=r"tasks\.easy_vqa\.images: got 6 of 6 images in .*nowhere"):
        evaluate.check_task("easy_vqa", replace(LIMIT, images=str(tmp_path / "nowhere")))


def test_an_image_is_a_path_below_its_folder(own: Path, tmp_path: Path) -> None:
    row = lines(own / "my.jsonl")[0]
    for path in (row["image"], f"./{row['image']}", str(own / row["image"]), row["image"].replace("/", "\\")):
        write_lines(own / "my.jsonl", [{**row, "image": path}])
        [question] = load_questions("mine", own_task(own))
        assert (question.image, question.reference["image"]) == (row["image"], row["image"])
        evaluate.check_task("mine", own_task(own))
    for path in ("../x.png", "a/../../x.png", "/etc/passwd", "https://host/x.png", "file:///x.png", "..", ""):
        write_lines(own / "my.jsonl", [{**row, "image": path}])
        message = (
            rf"evaluate\.tasks\.mine\.file: .*my\.jsonl: line 1: got image {re.escape(repr(path))}, which leads out"
        )
        with pytest.raises(ValueError, match=message):
            load_questions("mine", own_task(own))
    # Images of another folder or a URL are not looked at here.
    write_lines(own / "my.jsonl", [{**row, "image": "a/1.png"}])
    [question] = load_questions("mine", own_task(own, images="s3://bucket/images"))
    assert question.image == "a/1.png"


def test_prompts_with_instructions_are_own_questions_with_long_answers(tmp_path: Path) -> None:
    questions = load_questions("instructions", FEW)
    write_questions(questions, tmp_path / "my.jsonl")
    task = own_task(tmp_path, metric="instructions", images=str(easy_vqa.PACKAGE_IMAGES), max_new_tokens=None)
    assert load_questions("mine", task) == questions
    assert count_new_tokens("mine", task) == count_new_tokens("instructions", TaskSettings()) == 1024
    assert count_new_tokens("mine", own_task(tmp_path, max_new_tokens=None)) == 128
    names = evaluate.list_metric_names(settings(mine=task))
    assert {"mine.strict", "mine.both", "mine.strict.json", "mine.questions"} <= names


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        (
            "mine",
            {},
            "got a task mine without file or held_out, allowed: easy_vqa, instructions, instructions_held_out,",
        ),
        ("gqa", {"file": "a", "metric": "exact"}, "got the name gqa with file"),
        ("speed", {"file": "a", "metric": "exact"}, "got the name speed with file"),
        ("mine", {"file": "a"}, "metric: got null besides file, allowed: file and metric, or held_out and metric"),
        ("mine", {"held_out": "a"}, "metric: got null besides held_out"),
        ("gqa", {"held_out": "a", "metric": "exact"}, "got the name gqa with held_out"),
        (
            "mine",
            {"held_out": "a", "metric": "vqa"},
            "metric: got vqa with held_out, allowed: exact, contains, anls, because a sample has one answer",
        ),
        ("mine", {"held_out": "a", "metric": "anls", "images": "b"}, "images: got b besides held_out, allowed: null"),
        (
            "mine",
            {"held_out": "a", "metric": "anls", "file": "b"},
            "file: got b besides held_out, allowed: one of the two",
        ),
        ("mine", {"metric": "exact"}, "file: got null besides metric"),
        (
            "mine",
            {"file": "a", "metric": "exact", "files": ("b",)},
            "file: got a besides files, allowed: one of the two",
        ),
    ],
)
def test_settings_that_name_no_task_are_refused(name: str, task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**{name: TaskSettings(**task)})


@pytest.mark.parametrize("text", ["", "\n", "[]"])
def test_a_file_without_questions_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "my.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"evaluate\.tasks\.mine\.file: no questions in .*my\.jsonl"):
        load_questions("mine", own_task(tmp_path))
