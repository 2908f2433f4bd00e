"""A job that starts from pretrained parts: early errors, the assembled model, the plans of its stages."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from jobs import schema
from jobs.ownership import FolderOwnership
from jobs.resolve import resolve_job
from jobs.run import list_phases, run
from jobs.schema import Job
from jobs.search import TrialJobs
from jobs.search import load as load_search
from pipelines.training import driver
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Recovery
from redux.conversation import TEMPLATES
from redux.model import ReduxForConditionalGeneration
from redux.pretrained import assemble

STAGES = {
    "pretrain": {"template": "plain", "image_aspect_ratio": "crop", "learning_rate": {"projector": 1e-3}},
    "instruct": {"template": "vicuna_v1", "learning_rate": {"projector": 1e-3, "language": 1e-3}},
}
STAGE = {
    "objective": "language",
    "data": "talk",
    "steps": 2,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "precision": "bf16",
}
NO_SETS = ("data.sets={}", "data.source=easy-vqa", *(f"train.{name}.data=captions" for name in STAGES))
"""Overrides by which a job makes its sets itself, so that none has to exist."""


def load_job(parts: dict[str, str], path: Path, overrides: Sequence[str] = ()) -> Job:
    """Write the job of the parts to a file, and load it with overrides."""
    model = {part: parts[part] for part in ("tower", "language")}
    data = {"source": None, "sets": {"talk": "nowhere"}}
    train = {name: STAGE | stage for name, stage in STAGES.items()}
    path.write_text(json.dumps({"name": "parts", "num_workers": 2, "data": data, "model": model, "train": train}))
    return schema.load(path, overrides)


@pytest.fixture
def load(parts: dict[str, str], tmp_path: Path) -> Callable[..., Job]:
    """The job of the parts, with overrides."""
    return lambda *overrides: load_job(parts, tmp_path / "parts.yaml", overrides)


@pytest.fixture
def plan_stages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[StagePlan]]:
    """Return a function that runs the stages of a job without training, and returns their plans."""

    def plan_stages(job: Job, folder: Path, **options: Any) -> list[StagePlan]:
        plans: list[Any] = []
        monkeypatch.setattr(driver, "train_stage", lambda plan, **_: plans.append(plan))
        work = list_phases(job, folder, **options)
        for name in job.train:
            work[name]()
        return plans

    return plan_stages


def test_the_parts_are_assembled_before_the_first_stage(load: Callable[..., Job], tmp_path: Path) -> None:
    assert list(list_phases(load(), tmp_path)) == ["assemble", "pretrain", "instruct", "report"]
    easy = load("data.source=easy-vqa", "train.pretrain.data=captions", "evaluate={}")
    assert list(list_phases(easy, tmp_path)) == ["shards", "assemble", "pretrain", "instruct", "evaluate", "report"]


def test_the_assembled_model_is_that_of_assemble(
    load: Callable[..., Job], parts: dict[str, str], tmp_path: Path
) -> None:
    job = load("seed=3")
    list_phases(job, tmp_path)["assemble"]()
    whole = tmp_path / "assembled"
    model = ReduxForConditionalGeneration.from_pretrained(whole, dtype="auto")
    torch.manual_seed(3)
    expected, _ = assemble(parts["tower"], parts["language"], **job.model.methods, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    assert model.config.to_dict().keys() == expected.config.to_dict().keys()
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert tokenizer.model_max_length == 256  # of the language model's positions; its tokenizer names no limit
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["assembled"]


def test_the_assembled_folder_is_complete_or_missing(
    load: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = list_phases(load(), tmp_path)["assemble"]
    with monkeypatch.context() as patch:
        patch.setattr(ReduxForConditionalGeneration, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step()
    assert not (tmp_path / "assembled").exists()
    step()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "assembled").iterdir()}
    step()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "assembled").iterdir()} == before


def test_a_stage_in_fp32_starts_from_a_model_in_fp32(load: Callable[..., Job], tmp_path: Path) -> None:
    list_phases(load("train.instruct.precision=fp32"), tmp_path)["assemble"]()
    model = ReduxForConditionalGeneration.from_pretrained(tmp_path / "assembled", dtype="auto")
    assert model.dtype == torch.float32


def test_plans_have_the_start_and_the_size_of_images(
    load: Callable[..., Job], plan_stages: Callable[..., list[StagePlan]], tmp_path: Path
) -> None:
    job = load("num_workers=[1, 4]", "recovery.restarts=7", "model.kernels=plain")
    first, second = plan_stages(job, tmp_path, allow_changes=True)
    whole = tmp_path / "assembled"
    assert (first.start, first.tokenizer, first.model) == (str(whole), whole, None)
    assert (second.start, second.tokenizer) == (first.result, whole)
    assert first.checkpoints == str(tmp_path / "checkpoints")
    for plan in (first, second):
        assert (plan.image_size, plan.image_tokens) == (32, 8)
        assert plan.workers == (1, 4)
        assert plan.recovery == Recovery(restarts=7)
        assert plan.kernels == "plain"
        assert plan.allow_changes
        assert plan.job == schema.dump(job)
    [plan, _] = plan_stages(load("model.vmtc=null", "num_workers=2"), tmp_path / "other")
    assert plan.image_tokens == 16
    assert plan.workers == (2, 2)


def test_checkpoints_of_two_jobs_in_a_bucket_have_their_own_folders(
    load: Callable[..., Job], plan_stages: Callable[..., list[StagePlan]], tmp_path: Path
) -> None:
    plans = [plan_stages(load("checkpoints=s3://bucket/all", f"name={name}"), tmp_path) for name in ("a", "b")]
    assert [plan.folder for plan, _ in plans] == ["s3://bucket/all/a/pretrain", "s3://bucket/all/b/pretrain"]
    assert plans[0][1].start == "s3://bucket/all/a/pretrain/model"


def test_packing_is_refused_early_if_the_language_model_mixes_conversations(
    load: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load("train.instruct.packing={max_length: 64}")
    list_phases(job, tmp_path)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(
        ValueError, match=r"^train.instruct.packing: got one with a language model which .*allowed: null$"
    ):
        list_phases(job, tmp_path)


def test_the_parts_are_read_once(load: Callable[..., Job], parts: dict[str, str], tmp_path: Path) -> None:
    """A run with an assembled model continues without its parts."""
    list_phases(load(), tmp_path)["assemble"]()
    gone = load(f"model.tower={tmp_path}/gone")
    list_phases(gone, tmp_path)
    with pytest.raises(ValueError, match=f"^model.tower: got {tmp_path}/gone, allowed: folder or hub id"):
        list_phases(gone, tmp_path / "other")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.tower=LANGUAGE", "model.tower: got LANGUAGE of model_type llama, allowed: "),
        ("model.language=TOWER", "model.language: got TOWER of model_type clip, allowed: "),
        ("model.vmtc.stages=99", "model.vmtc.stages: got 99, allowed: 1 to 4"),
        ("model.gguf_file=no.gguf", "model.gguf_file: got no.gguf, allowed: a file in LANGUAGE"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_the_start(
    load: Callable[..., Job], parts: dict[str, str], tmp_path: Path, override: str, message: str
) -> None:
    """Before Ray starts, before a run folder is made."""
    for part in ("tower", "language"):
        override, message = (text.replace(part.upper(), parts[part]) for text in (override, message))
    job = load(override, *NO_SETS)
    with pytest.raises(ValueError, match="got") as caught:
        run(job, tmp_path / "run")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.language={}"], "model.language: "),
        (["model.tower=TOWER", "model.language=SIZES"], "model.language: got sizes beside a tower of TOWER, allowed: "),
        (
            ["train.pretrain.objective=contrastive", "train.pretrain.learning_rate={tower: 1}"],
            "train: got objectives contrastive, language, allowed: language alone, because model.tower is pretrained",
        ),
        (["num_workers=[3, 2]"], "num_workers: got [3, 2], allowed: the fewest first"),
        (
            ["num_workers=[3]"],
            "num_workers: got [3], allowed: 'auto', a whole number >= 1 or a list of 2 values (each a whole number",
        ),
        (["num_workers=3"], "train.pretrain.global_batch_size: got 8, allowed: a multiple of 6"),
        (["train.pretrain.data=captions"], "train.pretrain.data: got captions, allowed: talk, those of data.sets"),
        (["trackers=[paper]"], "trackers.0: got 'paper', allowed: 'tensorboard', 'mlflow' or 'wandb'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_value_is_refused_with_its_path(load: Callable[..., Job], overrides: list[str], message: str) -> None:
    sizes = "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 16}"
    with pytest.raises(ValueError, match="got") as caught:
        load(*(override.replace("SIZES", sizes) for override in overrides))
    assert str(caught.value).partition(".yaml: ")[2].startswith(message)


def test_a_range_of_workers_need_not_divide_the_batch(load: Callable[..., Job]) -> None:
    job = load("num_workers=[1, 3]", "trackers=[mlflow, wandb]")
    assert job.worker_range == (1, 3)
    assert load("num_workers=2").worker_range == (2, 2)


def test_a_file_of_weights_needs_a_model_from_a_folder() -> None:
    path = Path(__file__).parents[2] / "jobs" / "recipes" / "quickstart.yaml"
    with pytest.raises(
        ValueError, match=r"model\.gguf_file: got a.gguf, allowed: null, because language is built from sizes"
    ):
        schema.load(path, ["model.gguf_file=a.gguf"])


def test_a_model_assembled_of_other_parts_is_not_used(
    load: Callable[..., Job], parts: dict[str, str], tmp_path: Path
) -> None:
    """A run that failed before its first step may continue with other parts."""
    first = resolve_job(load(*NO_SETS), tmp_path)
    FolderOwnership.from_folder(tmp_path, first).enforce()
    list_phases(first, tmp_path)["assemble"]()
    other = load(*NO_SETS, f"model.tower={tmp_path}/gone")
    with pytest.raises(ValueError, match=f"^model.tower: got {tmp_path}/gone, allowed: folder or hub id"):
        list_phases(other, tmp_path)
    assert list_phases(first, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 1}\n')
    assert list_phases(other, tmp_path), (
        "after the first step the model is kept; the changed job is refused unless --allow-changes is given"
    )


def test_folders_become_absolute_and_hub_ids_stay(
    load: Callable[..., Job], parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(parts["tower"]).parent)
    job = load(f"model.tower={Path(parts['tower']).name}", "model.language=some/hub-id", *NO_SETS)
    model = resolve_job(job, tmp_path).model
    assert (model.tower, model.language) == (str(Path(parts["tower"]).resolve()), "some/hub-id")


@pytest.fixture(scope="module")
def assembled(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that a job has assembled; no test writes there."""
    folder = tmp_path_factory.mktemp("made")
    list_phases(load_job(parts, folder / "parts.yaml"), folder)["assemble"]()
    return folder / "assembled"


@pytest.fixture
def checkpoint(assembled: Path, tmp_path: Path) -> Callable[..., str]:
    """Copy a model that records this training format."""

    def checkpoint(template: str | None, image_aspect_ratio: str | None) -> str:
        folder = shutil.copytree(assembled, tmp_path / "made")
        config = folder / "config.json"
        saved_format = {"conversation_template": template, "image_aspect_ratio": image_aspect_ratio}
        config.write_text(json.dumps(json.loads(config.read_text()) | saved_format))
        return str(folder)

    return checkpoint


SAVED_FORMATS = [("vicuna_bare", "crop"), ("vicuna_v1", "pad"), ("plain", "crop"), (None, None)]


@pytest.mark.parametrize(("template", "image_aspect_ratio"), SAVED_FORMATS)
@pytest.mark.parametrize("searched", [False, True])
def test_template_and_aspect_ratio_are_those_of_the_checkpoint(
    load: Callable[..., Job],
    checkpoint: Callable[..., str],
    tmp_path: Path,
    template: str | None,
    image_aspect_ratio: str | None,
    searched: bool,
) -> None:
    model = {"checkpoint": checkpoint(template, image_aspect_ratio)}
    stage = STAGE | {"learning_rate": {"projector": 1e-3}, "data": "captions"}
    tree = {"data": {"source": "easy-vqa"}, "model": model, "train": {"more": stage}, "evaluate": {}}

    def locate(**changes: Any) -> Job:
        whole = tree | changes
        if searched:
            space = {"model.cmai.gamma_max": {"low": 0.0, "high": 0.9}}
            objectives = {"easy_vqa.accuracy": "max"}
            search = {"name": "a", "num_trials": 1, "space": space, "objectives": objectives, "job": whole}
            (tmp_path / "search.yaml").write_text(json.dumps(search))
            return resolve_job(TrialJobs(load_search(tmp_path / "search.yaml")).build({}), tmp_path / "run")
        (tmp_path / "job.yaml").write_text(json.dumps(whole | {"name": "a"}))
        return resolve_job(schema.load(tmp_path / "job.yaml"), tmp_path / "run")

    job = locate()
    expected = ("vicuna_v1" if template in (None, "plain") else template, image_aspect_ratio or "pad")
    assert (job.train["more"].template, job.train["more"].image_aspect_ratio) == expected
    assert job.evaluate
    assert (job.evaluate.template, job.evaluate.image_aspect_ratio) == expected

    other = ("vicuna_v1" if expected[0] == "vicuna_bare" else "vicuna_bare", "pad" if expected[1] == "crop" else "crop")
    job = locate(train={"more": stage | {"template": other[0], "image_aspect_ratio": other[1]}})
    assert (job.train["more"].template, job.train["more"].image_aspect_ratio) == other, (
        "the job file overrides the checkpoint"
    )
    assert job.evaluate
    assert (job.evaluate.template, job.evaluate.image_aspect_ratio) == other, (
        "the evaluation has the format of the last stage"
    )
    with pytest.raises(ValueError, match=rf"evaluate.template: got {other[0]}, allowed: {expected[0]}"):
        locate(evaluate={"template": other[0]})
    with pytest.raises(ValueError, match=rf"evaluate.image_aspect_ratio: got {other[1]}, allowed: {expected[1]}"):
        locate(evaluate={"image_aspect_ratio": other[1]})
    allowed = locate(evaluate={"template": other[0], "image_aspect_ratio": other[1], "allow_mismatch": True}).evaluate
    assert allowed
    assert (allowed.template, allowed.image_aspect_ratio) == other

    if template == "plain":
        with pytest.raises(ValueError, match=r"evaluate.template: got plain, .*a model that was last trained with que"):
            locate(train={})
    else:
        evaluation = locate(train={}).evaluate
        assert evaluation
        assert (evaluation.template, evaluation.image_aspect_ratio) == expected


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role + ': ' + turn.content }}"
    "{{ eos_token if turn.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_a_stage_trains_on_the_chat_template_of_the_language_model(
    load: Callable[..., Job], parts: dict[str, str], plan_stages: Callable[..., list[StagePlan]], tmp_path: Path
) -> None:
    chat = "train.instruct.template=chat"
    with pytest.raises(
        ValueError, match=r"^train.instruct.template: got chat for a tokenizer without a chat template, al"
    ):
        list_phases(load(chat), tmp_path / "none")
    language = tmp_path / "language"
    shutil.copytree(parts["language"], language)
    (language / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    job = load(chat, f"model.language={language}")
    list_phases(job, tmp_path)["assemble"]()
    plain, instruct = plan_stages(job, tmp_path)
    assert plain.load_template() is TEMPLATES["plain"]
    template = instruct.load_template()
    assert (template.human, template.assistant, template.answer, template.end) == ("user: ", " assistant:", " ", "</s>")
