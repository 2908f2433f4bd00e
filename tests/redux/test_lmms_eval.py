"""lmms-eval runs the sixteen instructions through our adapter, and its scores are ours."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers import PreTrainedTokenizerFast

from redux.answering import load
from redux.benchmarks.instructions import (
    ImageQuestion,
    build_pair_questions,
    build_questions,
    compute_metrics,
    read_questions,
    write_questions,
)
from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instructions import INSTRUCTIONS, follows_loosely, follows_strictly
from redux.lmms_eval import TASKS_FOLDER
from redux.model import ReduxForConditionalGeneration

installed = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason='lmms-eval is not installed: pip install -e ".[lmms-eval]", in an environment of its own',
)
NAMES = {id: f"redux_{each.name.replace(' ', '_')}" for id, each in INSTRUCTIONS.items()}
HELD_OUT_NAMES = {id: f"redux_{each.name.replace(' ', '_')}" for id, each in HELD_OUT_INSTRUCTIONS.items()}


def plain(path: Path) -> dict[str, Any]:
    """The YAML, `!function` as text."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load(path.read_text(), Loader)


def test_each_instruction_is_a_task_and_two_groups_have_them_all() -> None:
    files = {path.stem: plain(path) for path in TASKS_FOLDER.glob("*.yaml")}
    group, held_out = files.pop("instructions"), files.pop("instructions_held_out")
    pairs = files.pop("instruction_pairs")
    assert (pairs["include"], pairs["task"], pairs["dataset_name"]) == (
        "_instruction", "redux_instruction_pairs", "pairs",
    )  # fmt: skip
    assert {each["dataset_name"]: each["task"] for each in files.values()} == NAMES | HELD_OUT_NAMES
    assert all(each["include"] == "_instruction" and f"redux_{stem}" == each["task"] for stem, each in files.items())
    assert group["task"] == list(NAMES.values())
    assert held_out["task"] == list(HELD_OUT_NAMES.values())
    shared = plain(TASKS_FOLDER / "_instruction")
    for function in (shared["class"], shared["process_results"]):
        module, name = function.rsplit(".", 1)
        found = importlib.util.find_spec(module)
        assert found
        assert found.origin
        assert f" {name}(" in Path(found.origin).read_text()


@pytest.fixture(scope="module")
def place(
    tiny: Callable[..., ReduxForConditionalGeneration],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Working folder of lmms-eval: a model, frozen prompts, and their images."""
    folder = tmp_path_factory.mktemp("place")
    tiny().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20 + 8 * number, 24), colour).save(folder / "images" / f"{number}.png")
    encoded = (folder / "images" / "2.png").read_bytes()
    asked = [
        ImageQuestion(id="0", image="0.png", question="Is it a red circle?"),
        ImageQuestion(id="1", image="1.png", question="What colour is the shape?"),
        ImageQuestion(id="2", image=encoded, question="Is it a blue square?"),
    ]
    questions = [*build_questions(asked, per_task=3), *build_pair_questions(asked, per_task=3)]
    write_questions(questions, folder / "instructions.jsonl")
    return folder


@installed
def test_lmms_eval_runs_the_tasks_and_scores_them_as_we_do(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.chdir(place)
    told = simple_evaluate(
        model="redux",
        model_args="pretrained=model,template=vicuna_bare",
        tasks=["redux_instructions", "redux_instruction_pairs"],
        task_manager=TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False),
        gen_kwargs="max_new_tokens=6",
        batch_size="4",
        device="cpu",
        limit=2,
        log_samples=True,
        cli_args=SimpleNamespace(output_path=None, process_with_media=False),
    )
    frozen = {question.id: question for question in read_questions("instructions.jsonl")}
    answerer, means = load("model", template="vicuna_bare", device="cpu"), []
    assert set(told["samples"]) == {*NAMES.values(), "redux_instruction_pairs"}
    for id, name in NAMES.items():
        samples = told["samples"][name]
        assert [sample["doc"]["id"] for sample in samples] == [f"T{INSTRUCTIONS[id].task:02}/{n}" for n in (0, 1)]
        responses = []
        for sample in samples:
            question = frozen[sample["doc"]["id"]]
            assert [[id, question.reference["kwargs"]]] == json.loads(sample["doc"]["instructions"])
            image = (place / "images" / str(question.image)).read_bytes()
            responses.append((id, question.reference["kwargs"], sample["filtered_resps"][0]))
            assert answerer([question.prompt], [image], 6).texts == [sample["filtered_resps"][0]]
        for metric, check in (("strict", follows_strictly), ("loose", follows_loosely)):
            assert told["results"][name][f"{metric},none"] == sum(check(*each) for each in responses) / 2
        means.append(told["results"][name]["strict,none"])
    assert told["results"]["redux_instructions"]["strict,none"] == pytest.approx(sum(means) / 16)
    answered = [
        {"unit": "", "response": sample["filtered_resps"][0], **frozen[sample["doc"]["id"]].reference}
        for sample in told["samples"]["redux_instruction_pairs"]
    ]
    found = compute_metrics(answered)
    for metric in ("strict", "loose", "prompt_strict", "prompt_loose"):
        assert told["results"]["redux_instruction_pairs"][f"{metric},none"] == pytest.approx(found[metric].score)


def requests(tokens: Sequence[int], context: str = "Is it a red circle?", **settings: Any) -> list[Any]:
    """For documents that are colours of an image, or None; each wants so many new tokens."""
    from lmms_eval.api.instance import Instance

    def visual(document: str | None) -> list[Image.Image]:
        return [Image.new("RGB", (24, 16), document)] if document else []

    return [
        Instance(
            request_type="generate_until",
            arguments=(
                context + " no" * (number % 3),
                {"max_new_tokens": count, **settings},
                visual,
                number,
                "task",
                "test",
            ),
            idx=0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number, count in enumerate(tokens)
    ]


@pytest.fixture
def redux(place: Path) -> Any:
    from redux.lmms_eval.model import Redux

    model = Redux(str(place / "model"), template="vicuna_bare", batch_size="2", device="cpu")
    model.task_dict = {"task": {"test": ["red", None, "green", "blue", "red", None]}}
    return model


@installed
def test_answers_come_in_the_order_of_the_requests(redux: Any) -> None:
    asked = requests([6, 3, 6, 6, 3, 6])
    together = redux.generate_until(asked)
    assert together == [redux.generate_until([request])[0] for request in asked]
    assert [answer.token_counts.output_tokens for answer in together] == [6, 3, 6, 6, 3, 6]


@installed
def test_an_answer_is_cut_off_at_the_stops_of_its_task(redux: Any) -> None:
    [whole] = redux.generate_until(requests([6]))
    stop = whole.text.split()[2]
    [cut] = redux.generate_until(requests([6], until=["not said", stop]))
    assert cut.text == whole.text.partition(stop)[0]


@installed
def test_a_place_of_the_image_in_the_prompt_is_that_of_the_template(redux: Any) -> None:
    marked = requests([6], context="<image>\nIs it a red circle?")
    assert redux.generate_until(requests([6])) == redux.generate_until(marked)


@installed
@pytest.mark.parametrize("wrong", [{"temperature": 0.7}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_what_is_not_greedy_is_refused(redux: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"generation_kwargs: got .*, allowed: do_sample false, temperature 0"):
        redux.generate_until(requests([6], **wrong))


@installed
def test_several_images_are_refused(redux: Any) -> None:
    [request] = requests([6])
    context, settings, _, *document = request.arguments
    request.arguments = (context, settings, lambda document: [Image.new("RGB", (8, 8))] * 2, *document)
    with pytest.raises(ValueError, match="task: document 0: got Image, Image, allowed: one image or none"):
        redux.generate_until([request])


@installed
def test_prompts_that_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    tasks = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    with pytest.raises(ValueError, match=r"dataset_path: got instructions\.jsonl, allowed: a file of frozen prompts"):
        tasks.load_task_or_group(["redux_no_comma"])
