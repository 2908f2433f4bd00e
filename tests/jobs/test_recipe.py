"""LLaVA-1.5's recipe: its numbers in the files that ship, and runs of these files in small, from end to end.

A twin is the file itself with tiny parts, tiny sets, smaller batches and two steps a stage; ZeRO, precision, template,
fit, grouping and what trains are the file's own.
"""

import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import schema
from jobs.run import list_phases
from pipelines.data import shard_writer
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from redux.settings import CMAI, VMTC
from tests.jobs.command_line import run_command

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[2] / "jobs" / "recipes"
FILES = sorted(FOLDER.glob("llava-1.5-*.yaml"))
SAMPLES = {"llava-pretrain": 558_128, "mix665k": 665_298}
"""Records of LLaVA's two files."""

BATCH = {"global_batch_size": 8, "micro_batch_size": 2, "epochs": "null", "steps": 2}

all_recipes = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read_lora_overrides(path: Path) -> list[str]:
    """Read the overrides that the file's header gives for adapters."""
    lines = re.findall(r"^# +(.*)$", path.read_text().partition("\n\n")[0], re.MULTILINE)
    [command] = re.findall(r"redux run (?:.|\n)*?[^\\]$", "\n".join(lines), re.MULTILINE)
    program, action, file, *overrides = shlex.split(command.replace("\\\n", " "))
    assert (program, action, file) == ("redux", "run", f"jobs/recipes/{path.name}")
    return overrides


@all_recipes
def test_the_numbers_are_those_of_llavas_scripts(path: Path) -> None:
    """scripts/v1_5/pretrain.sh and finetune.sh of haotian-liu/LLaVA, c121f043."""
    job = schema.load(path)
    first, second = job.train.values()
    size = re.search(r"\d+b", path.stem)
    assert size
    assert job.model.tower == "openai/clip-vit-large-patch14-336"
    assert job.model.language == f"lmsys/vicuna-{size[0]}-v1.5"
    assert [stage.count_accumulation_steps(8) for stage in job.train.values()] == [
        1,
        1,
    ]  # on 8 GPUs, as the scripts have it
    assert (first.template, first.image_aspect_ratio, first.group_by_length, first.learning_rate) == (
        "plain",
        "crop",
        None,
        {"projector": 1e-3},
    )
    rates = {"projector": 2e-5, "language": 2e-5}
    assert (second.template, second.image_aspect_ratio, second.group_by_length, second.learning_rate) == (
        "vicuna_v1",
        "pad",
        1,
        rates,
    )
    assert [stage.zero_stage for stage in (first, second)] == [2, 3]
    assert [stage.global_batch_size for stage in (first, second)] == [256, 128]
    assert [stage.max_length for stage in (first, second)] == [2048, 2048]
    assert [stage.micro_batch_size for stage in (first, second)] == [32, 16]
    for stage in (first, second):
        assert stage.count_accumulation_steps(8) == 1
        assert (stage.epochs, stage.warmup_ratio, stage.weight_decay, stage.beta2, stage.max_grad_norm) == (
            1,
            0.03,
            0,
            0.999,
            1,
        )
        assert (stage.precision, stage.activation_checkpointing, stage.image_backend) == ("bf16", True, "exact")
        assert not stage.random_flip
        assert stage.max_rounds is None
    methods = (VMTC(), CMAI()) if "redux" in path.stem else (None, None)
    assert (job.model.vmtc, job.model.cmai, job.model.reduction) == (*methods, None)


@all_recipes
def test_an_epoch_has_the_steps_that_llava_reports(path: Path) -> None:
    counted = {}
    for name, stage in schema.load(path).train.items():
        [source] = stage.mixture
        order = Order(samples=(SAMPLES[source],), global_batch_size=stage.global_batch_size, seed=0)
        counted[name] = order.count_batches(stage.epochs or 0)
    assert counted == {"pretrain": 2181, "instruct": 5198}


@all_recipes
def test_the_adapters_in_the_header_are_those_of_llavas_script(path: Path) -> None:
    job = schema.load(path, read_lora_overrides(path))
    stage = job.train["instruct"]
    assert stage.lora
    assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout) == (128, 256, 0.05)
    assert stage.learning_rate == {"projector": 2e-5, "language": 2e-4}
    assert job.name == f"{path.stem}-lora"


@pytest.fixture(scope="module")
def sets(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of captions, and of conversations; from number 12 on these are text alone."""
    folder = tmp_path_factory.mktemp("sets")
    for number in range(24):
        colour = np.random.default_rng(number).integers(0, 256, (20, 28, 3), np.uint8)
        Image.fromarray(colour).save(folder / f"{number}.png")
    with_images = [make_record(number, f"{number}.png", "Is there a red shape?") for number in range(24)]
    text_only = [make_record(number, None, "Is the user polite?") for number in range(24, 48)]
    for name, records in {"llava-pretrain": with_images, "mix665k": with_images[:12] + text_only}.items():
        shard_writer.make_shards(records, str(folder), str(folder / name), ShardOptions(samples_per_shard=10))
    return {name: str(folder / name) for name in SAMPLES}


def make_record(number: int, image: str | None, question: str) -> dict[str, Any]:
    turns = [("human", f"<image>\n{question}" if image else question), ("gpt", "yes, it is." if number % 2 else "no")]
    image_field = {"image": image} if image else {}
    return {"id": number, **image_field, "conversations": [{"from": role, "value": text} for role, text in turns]}


def list_small_overrides(parts: dict[str, str], sets: dict[str, str]) -> list[str]:
    """List the overrides that make the twin of a file."""
    return [
        "num_workers=2",
        f"data.sets={json.dumps(sets)}",
        *(f"model.{part}={folder}" for part, folder in parts.items()),
        *(f"train.{stage}.{key}={value}" for stage in ("pretrain", "instruct") for key, value in BATCH.items()),
    ]


@all_recipes
def test_a_twin_is_assembled_with_the_settings_of_the_file(
    path: Path, parts: dict[str, str], sets: dict[str, str], tmp_path: Path
) -> None:
    from redux.model import ReduxForConditionalGeneration

    job = schema.load(path, list_small_overrides(parts, sets))
    list_phases(job, tmp_path)["assemble"]()
    model = ReduxForConditionalGeneration.from_pretrained(tmp_path / "assembled", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.image_seq_length == (8 if "redux" in path.stem else 16)
    assert (model.config.method_settings("vmtc"), model.config.method_settings("cmai")) == (
        job.model.vmtc,
        job.model.cmai,
    )


def run_job(path: Path, overrides: list[str], runs: Path) -> Path:
    """Run a job to its end on the Ray of this process, and return its run folder."""
    name = schema.load(path, overrides).name
    done = run_command("run", path, *overrides, "--runs-dir", runs)
    assert done.code == 0, done.err
    return runs / name


def load_weights(folder: Path) -> dict[str, Any]:
    """Load the weights of a model by part, in float32."""
    from redux.model import ReduxForConditionalGeneration

    model = ReduxForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {part: [weight.detach() for weight in tensors] for part, tensors in model.parameters_by_part().items()}


def are_equal(first: list[Any], second: list[Any]) -> bool:
    return all(map(torch.equal, first, second))


# In small, those of 13b differ from those of 7b in their name alone.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(path, marks=[] if "redux" in path.stem else pytest.mark.slow, id=path.stem)
        for path in FILES
        if "7b" in path.stem
    ],
)
def twin(
    request: pytest.FixtureRequest,
    parts: dict[str, str],
    sets: dict[str, str],
    ray_cluster: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The run folder of the twin of a file."""
    return run_job(request.param, list_small_overrides(parts, sets), tmp_path_factory.mktemp("twin"))


def test_a_twin_runs_to_its_end(twin: Path) -> None:
    lines = [json.loads(line) for line in (twin / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ("pretrain", "instruct") for step in (1, 2)
    ]
    assert all(math.isfinite(line["loss"]) and line["samples"] == 8 and not line["replaced"] for line in lines)
    assert (twin / "report.html").stat().st_size > 10_000
    assert not (twin / "answers").exists()
    assert "wall_s.instruct" in json.loads((twin / "metrics.json").read_text())


def test_a_twin_trains_on_batches_of_text_alone(twin: Path) -> None:
    """Its first batch is, whole, since batches are of one modality; so the tower sees no image on any worker."""
    lines = [json.loads(line) for line in (twin / "consumed.jsonl").read_text().splitlines()]
    batches = [line["samples"]["mix665k"] for line in lines if line["stage"] == "instruct"]
    assert [{number >= 12 for number in batch} for batch in batches] == [{True}, {False}]


def test_a_stage_of_a_twin_trains_the_parts_with_a_learning_rate(twin: Path) -> None:
    before = load_weights(twin / "assembled")
    first, second = (load_weights(twin / "checkpoints" / stage / "model") for stage in ("pretrain", "instruct"))
    assert are_equal(first["tower"], before["tower"])
    assert are_equal(second["tower"], before["tower"])
    assert are_equal(first["language"], before["language"])
    assert not are_equal(first["projector"], before["projector"])
    assert not are_equal(second["language"], first["language"])


def test_the_model_of_a_twin_answers(twin: Path) -> None:
    from redux.answering import load

    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    answers = load(twin / "checkpoints" / "instruct" / "model")(["Is there a red shape?"], [file.getvalue()], 3)
    assert 1 <= answers.tokens[0] <= 3


@pytest.mark.slow
def test_a_twin_with_adapters_gives_a_plain_model(
    parts: dict[str, str], sets: dict[str, str], ray_cluster: Any, tmp_path: Path
) -> None:
    """With the overrides of the header, at a smaller rank: the language model has learned, and no adapter is left."""
    path = FOLDER / "llava-1.5-7b-redux.yaml"
    overrides = [*list_small_overrides(parts, sets), *read_lora_overrides(path), "train.instruct.lora.rank=4"]
    folder = run_job(path, overrides, tmp_path)
    first, second = (load_weights(folder / "checkpoints" / stage / "model") for stage in ("pretrain", "instruct"))
    assert [weight.shape for weight in second["language"]] == [weight.shape for weight in first["language"]]
    assert not are_equal(second["language"], first["language"])


def test_a_model_is_evaluated_as_it_was_trained(
    parts: dict[str, str], sets: dict[str, str], ray_cluster: Any, tmp_path: Path
) -> None:
    """A job with only the model gives the answers and scores of its run; LLaVA's format gives other answers."""
    from redux.answering import load

    path, images = FOLDER / "llava-1.5-7b-redux.yaml", Path(sets["mix665k"]).parent
    questions = {
        str(number): {"imageId": str(number), "question": "Is there a red shape?", "answer": "yes"}
        for number in range(0, 24, 3)
    }
    for number in questions:
        Image.open(images / f"{number}.png").save(tmp_path / f"{number}.jpg")
    (tmp_path / "gqa.json").write_text(json.dumps(questions))
    task = {"files": [str(tmp_path / "gqa.json")], "images": str(tmp_path), "max_new_tokens": 6}
    evaluate = f"evaluate={json.dumps({'tasks': {'gqa': task}})}"
    training = ["num_workers=1", "train.instruct.template=vicuna_bare", "train.instruct.image_aspect_ratio=crop"]
    folder = run_job(path, [*list_small_overrides(parts, sets), *training, evaluate], tmp_path)

    model = folder / "checkpoints" / "instruct" / "model"
    job = tmp_path / "again.yaml"
    job.write_text(f"name: again\ndata: {{source: null}}\nmodel: {{checkpoint: {model}}}\nevaluate: {{}}\n")
    again = run_job(job, [evaluate], tmp_path)
    answers = [(run_folder / "answers" / "gqa.jsonl").read_text() for run_folder in (folder, again)]
    assert answers[0] == answers[1]
    scores = [json.loads((run_folder / "scores.json").read_text()) for run_folder in (folder, again)]
    for metric in ("gqa.questions", "gqa.accuracy"):
        assert scores[0][metric] == scores[1][metric]

    rows = [json.loads(line) for line in answers[0].splitlines()]
    photos = [(tmp_path / f"{row['id']}.jpg").read_bytes() for row in rows]
    other_format = load(model, template="vicuna_v1", image_aspect_ratio="pad", allow_mismatch=True)
    other_answers = other_format([row["prompt"] for row in rows], photos, max_new_tokens=6)
    assert other_answers.texts != [row["response"] for row in rows]
