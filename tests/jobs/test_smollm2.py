"""The study on SmolLM2: its recipe in small from end to end, through the command line; its shares; its training text.

A small study is a file of the recipe itself with tiny parts, few steps and few questions.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import study
from jobs.model_parts import locate_parts
from jobs.run import list_phases, plan_stages, run, train_tokenizer
from jobs.schema import Job
from jobs.study import Share, Study
from pipelines.core import jsonl
from pipelines.data import easy_vqa
from pipelines.training import engine
from redux.chat_template import find_template
from redux.heads import select_heads
from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instructions import INSTRUCTIONS, draw_arguments, render_instruction
from tests.jobs.command_line import run_command

FOLDER = Path(__file__).parents[2] / "jobs" / "recipes" / "reproduce"
RECIPE, PILOT = FOLDER / "smollm2.yaml", FOLDER / "smollm2-pilot.yaml"

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Chat template of SmolLM2's form; the end of an answer is the end token of the tokenizer."""


SMALL_APPLIED = (
    "llava-with-cmai-60",
    "llava-with-cmai-60-decisive-heads",
    "both-without",
    "upper-limit",
    "bare-language-model",
)


@pytest.fixture(scope="module")
def language(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny language model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "language"
    shutil.copytree(parts["language"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token
    tokenizer.chat_template = CHAT.replace("<|im_start|>", "[").replace("<|im_end|>", end)
    tokenizer.save_pretrained(folder)
    return folder


def write_small_study(path: Path, language: Path, out: Path, variants: tuple[str, ...]) -> Path:
    """Write a small twin of a file of the recipe: tiny parts, two steps a stage, one question a task."""
    tree = yaml.safe_load(path.read_text())
    tree["seeds"] = tree["seeds"][:2]
    tree["variants"] = {name: tree["variants"][name] for name in variants}
    tree["applied"] = {name: tree["applied"][name] for name in SMALL_APPLIED}
    tree["repeated"] = ["llava"]
    tree["decisive_heads"] |= {"variants": ["llava-with-cmai-60-decisive-heads"], "samples": 2}
    job = tree["job"]
    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    job["model"] |= {
        "tower": {"image_size": 32, "patch_size": 8, **sizes},
        "language": str(language),
        "gguf_file": None,
    }
    for stage in job["train"].values():
        stage.pop("epochs", None)
        stage |= {"steps": 2, "global_batch_size": 4, "micro_batch_size": 4}
    tasks = job["evaluate"]["tasks"]
    job["evaluate"] |= {
        "tasks": {name: {"limit": 1, "max_new_tokens": 4} for name in tasks if name != "instructions_held_out"},
        "attention": 1,
        "num_actors": 1,
    }
    for applied in tree["applied"].values():
        if "evaluate.tasks" in applied["changes"]:
            applied["changes"]["evaluate.tasks"] = {"instructions_without_image": {"limit": 1, "max_new_tokens": 4}}
    out.write_text(yaml.safe_dump(tree, sort_keys=False))
    return out


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Study:
    return study.load(RECIPE)


def test_main_rows_have_three_seeds_and_the_others_one(recipe: Study, tmp_path: Path) -> None:
    jobs = study.list_jobs(recipe, tmp_path)
    assert recipe.repeated is not None
    for variant in recipe.variants:
        seeds = [seed for seed in recipe.seeds if f"{variant}-{seed}" in jobs]
        assert seeds == ([0, 1, 2] if variant in recipe.repeated else [0])
    assert {"llava", "both", "spd-75", "random-50", "vmtc-50", "cmai-60"} <= set(recipe.repeated)


def test_the_pilot_is_the_recipe_with_fewer_steps_and_questions() -> None:
    whole, pilot = yaml.safe_load(RECIPE.read_text()), yaml.safe_load(PILOT.read_text())
    assert {name: whole["variants"][name] for name in pilot["variants"]} == pilot["variants"]
    assert len(pilot["variants"]) == 3
    assert pilot["job"]["model"] == whole["job"]["model"]
    lengths = {"epochs", "steps", "save_total_limit"}
    for name, stage in pilot["job"]["train"].items():
        of_whole = whole["job"]["train"][name]
        assert {key for key in stage | of_whole if stage.get(key) != of_whole.get(key)} <= lengths
    assert pilot["job"]["evaluate"]["tasks"].keys() == whole["job"]["evaluate"]["tasks"].keys()


def test_an_applied_variant_evaluates_the_model_of_its_variant(recipe: Study, tmp_path: Path) -> None:
    jobs = study.list_jobs(recipe, tmp_path)
    for name, applied in recipe.applied.items():
        seeds = recipe.seeds[:1] if applied.variant == study.SHARED else recipe.list_seeds(applied.variant)
        for seed in seeds:
            job = jobs[f"{name}-{seed}"]
            run, stage = (
                ("shared", "pretrain") if applied.variant == study.SHARED else (f"{applied.variant}-{seed}", "instruct")
            )
            assert job.model.checkpoint == str(tmp_path / run / "checkpoints" / stage / "model")
            assert not job.train
    without = jobs["both-without-0"]
    assert (without.model.vmtc, without.model.cmai, without.model.reduction) == (None, None, "checkpoint")
    # An evaluation comes after the run whose model it needs.
    names = list(jobs)
    assert all(
        names.index(f"{applied.variant}-0") < names.index(f"{name}-0")
        for name, applied in recipe.applied.items()
        if applied.variant != study.SHARED
    )


WITHOUT_OTHERS: dict[str, Any] = {"repeated": None, "applied": {}, "decisive_heads": None}
"""Changes for a study whose variants are others."""


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_shares_divide_the_runs_and_keep_evaluations_with_their_models(
    recipe: Study, tmp_path: Path, total: int
) -> None:
    jobs = [name for name in study.list_jobs(recipe, tmp_path) if name != study.SHARED]
    shares = [Share(number, total).select_runs(recipe) for number in range(1, total + 1)]
    assert sorted(name for share in shares for name in share) == sorted(jobs)
    assert shares == [Share(number, total).select_runs(recipe) for number in range(1, total + 1)]
    for name, applied in recipe.applied.items():
        if applied.variant != study.SHARED:
            for seed in recipe.list_seeds(applied.variant):
                [holder] = [share for share in shares if f"{name}-{seed}" in share]
                assert f"{applied.variant}-{seed}" in holder
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 + max(
        sum(applied.variant == variant for applied in recipe.applied.values()) for variant in recipe.variants
    )


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "/", "a/b", "1/2/3", "-1/2", "1.0/2", "²/3", "1 /2"])
def test_a_wrong_share_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^got .*, allowed: K/N with 1 <= K <= N, such as 2/3$"):
        Share.parse(text)
    done = run_command("run", RECIPE, f"--share={text}")
    assert done.code == 2
    assert "--share: got " in done.err.splitlines()[-1]


def test_a_share_that_cannot_be_is_refused_before_a_run(tmp_path: Path) -> None:
    small = {"seeds": [0], "variants": {"llava": {}}, **WITHOUT_OTHERS}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | small, sort_keys=False))
    done = run_command("run", path, "--share", "2/2", "--runs-dir", tmp_path / "runs")
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("--share: got 2/2, allowed: at most 1 shares, one for each trained run")
    assert not (tmp_path / "runs").exists()
    job = run_command("run", FOLDER.parent / "quickstart.yaml", "--share", "1/2", "--runs-dir", tmp_path / "runs")
    assert job.code == 2
    assert "--share: got one with" in job.err
    assert "allowed: a study" in job.err


TRAINED_ELSEWHERE = {"data": {"source": None}, "model": {"checkpoint": "x"}, "train": {}, "evaluate": {"batch_size": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"job": yaml.safe_load(RECIPE.read_text().replace("template: chat  ", "template: plain"))["job"]},
            r"job\.train\.pretrain\.template: got plain before instruct with chat, allowed: chat",
        ),
        (
            {
                "job": yaml.safe_load(
                    RECIPE.read_text()
                    .replace("template: chat  ", "template: plain")
                    .replace("      template: chat\n", "      template: vicuna_v1\n")
                )["job"],
                "variants": {"llava": {}, "chat": {"train.instruct.template": "chat"}},
                **WITHOUT_OTHERS,
            },
            r"variants\.chat: job\.train\.pretrain\.template: got plain before instruct with chat, allowed: chat",
        ),
        (
            {"decisive_heads": {"variants": ["lava"], "data": "half_shown"}},
            r"decisive_heads\.variants: got lava, allowed: llava, .*upper-limit",
        ),
        (
            {"decisive_heads": {"variants": ["llava"], "data": "half_shown"}},
            r"decisive_heads\.variants: got llava, allowed: runs that set model\.cmai",
        ),
        (
            {"decisive_heads": {"variants": ["cmai-60"], "data": "test"}},
            r"decisive_heads\.data: got test, allowed: captions, .*half_shown",
        ),
        (
            {
                **WITHOUT_OTHERS,
                "shared": [],
                "applied": {"x": {"variant": "llava", "changes": {}}},
                "decisive_heads": {"variants": ["cmai-60"], "data": "half_shown"},
            },
            r"decisive_heads\.variants: got cmai-60, allowed: x$",
        ),
        (
            {"decisive_heads": {"variants": ["cmai-60"], "data": "half_shown", "share": 0}},
            r"decisive_heads\.share: got 0",
        ),
        ({"repeated": ["lava"]}, "repeated: got lava, allowed: llava"),
        (
            {"applied": {"x": {"variant": "lava", "changes": {}}}},
            r"applied\.x\.variant: got lava, allowed: llava.*shared",
        ),
        ({"applied": {"llava": {"variant": "llava", "changes": {}}}}, "applied: got llava, which is a variant"),
        (
            {**WITHOUT_OTHERS, "applied": {"x": {"variant": "llava", "changes": {"model.cmai": {"gamma_max": 2}}}}},
            r"applied\.x\.changes: .*gamma_max: got 2",
        ),
        (
            {"applied": {"x": {"variant": "llava", "changes": {}}}, "shared": [], "job": TRAINED_ELSEWHERE},
            "applied: got x, allowed: none, because job.train has no stages",
        ),
        ({"variants": {"shared": {}}, **WITHOUT_OTHERS}, "variants: got shared, allowed: another name"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | changes, sort_keys=False))
    with pytest.raises(ValueError, match=message) as error:
        study.load(path)
    assert "\n" not in str(error.value)


# --- training text ---------------------------------------------------------------------------------------------------


def list_wordings(text: str) -> list[str]:
    """List patterns of an instruction: its parts between arguments of at least three words, or else the whole text."""
    parts = [normalize(part) for part in re.split(r"\{[^}]+\}", text)]
    long = [part for part in parts if len(part.split()) >= 3]
    # An argument has up to three words.
    return long or [r"(?: [\w']+){1,3} ".join(part for part in parts if part)]


def normalize(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


@pytest.fixture(scope="module")
def training_text() -> str:
    """Text of all sets on which a file of the recipe trains, in lower case, with one blank between words."""
    trees = [yaml.safe_load(path.read_text()) for path in (RECIPE, PILOT)]
    names = {name for tree in trees for name in list_sets(tree)}
    assert {"captions", "conversations", "half_formats"} == names
    turns = [
        turn["value"] for name in names for record in easy_vqa.EASY_VQA_SETS[name]() for turn in record["conversations"]
    ]
    return normalize("\n".join(turns))


def list_sets(tree: Mapping[str, Any]) -> set[str]:
    data = [stage["data"] for stage in tree["job"]["train"].values()]
    data += [
        changes["train.instruct.data"] for changes in tree["variants"].values() if "train.instruct.data" in changes
    ]
    return {name for of_stage in data for name in ([of_stage] if isinstance(of_stage, str) else of_stage)}


def test_no_wording_of_the_evaluation_is_in_the_training_text(training_text: str) -> None:
    assert "answer in json" not in training_text, "of the untaught half"
    assert "write in lowercase only" in training_text, "of the taught half"
    for instruction in (*INSTRUCTIONS.values(), *HELD_OUT_INSTRUCTIONS.values()):
        for wording in list_wordings(instruction.text):
            assert not re.search(wording, training_text), f"{instruction.id}: {wording}"


def test_the_patterns_of_wordings_find_every_instruction() -> None:
    """The test above would find a wording of the evaluation in the training text."""
    for id, instruction in (INSTRUCTIONS | HELD_OUT_INSTRUCTIONS).items():
        text = normalize(render_instruction(id, draw_arguments(id, random.Random(0))))
        assert all(re.search(wording, text) for wording in list_wordings(instruction.text)), id


def test_the_text_only_rows_teach_every_second_instruction_and_are_always_the_same() -> None:
    rows = easy_vqa.EASY_VQA_SETS["half_formats"]()
    assert rows == easy_vqa.EASY_VQA_SETS["half_formats"]()
    assert not any("image" in row for row in rows)
    taught = easy_vqa.INSTRUCTIONS_BY_SET["half_formats"]
    assert [INSTRUCTIONS[id].task for id in taught] == [2, 4, 6, 8, 10, 12, 14, 16]


# --- a tower of sizes beside a pretrained language model -------------------------------------------------------------


@pytest.fixture
def shared_job(language: Path, tmp_path: Path) -> Job:
    """The job of the shared stages of the small study."""
    small = study.load(write_small_study(RECIPE, language, tmp_path / "small.yaml", ("llava", "both")))
    return study.list_jobs(small, tmp_path)[study.SHARED]


def test_the_parts_are_joined_after_the_stage_that_trains_the_tower(shared_job: Job, tmp_path: Path) -> None:
    assert list(list_phases(shared_job, tmp_path)) == [
        "shards", "tower", "assemble", "pretrain", "instruct", "evaluate", "report",
    ]  # fmt: skip
    plans = plan_stages(shared_job, tmp_path)
    assembled = tmp_path / "assembled"
    assert [plan.tokenizer for plan in plans.values()] == [tmp_path / "tokenizer", assembled, assembled]
    assert [plan.start for plan in plans.values()] == [None, str(assembled), plans["pretrain"].result]


def test_the_joined_model_has_the_trained_tower_and_the_language_model(
    shared_job: Job, language: Path, tmp_path: Path
) -> None:
    captions = easy_vqa.EASY_VQA_SETS["captions"]()[:50]
    tokenizer = train_tokenizer(shared_job, [captions])
    assert {"red", "circle"} <= tokenizer.get_vocab().keys()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tower = plan_stages(shared_job, tmp_path)["tower"]
    module, _ = engine.build_module(tower)
    clip = engine.extract_model(module, tower)
    clip.save_pretrained(tower.result)
    list_phases(shared_job, tmp_path)["assemble"]()

    pretrain = plan_stages(shared_job, tmp_path)["pretrain"]
    joined, parts = engine.build_module(pretrain)
    assert isinstance(joined, engine.LlavaWithLoss)
    assert set(parts) == {"tower", "projector", "language"}
    in_clip = clip.vision_model.state_dict()
    in_llava = joined.llava.model.vision_tower.state_dict()
    assert in_llava.keys() == in_clip.keys()
    assert all(torch.equal(in_llava[name].to(torch.bfloat16), in_clip[name].to(torch.bfloat16)) for name in in_clip)
    plain = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    head = joined.llava.lm_head.weight[: plain.config.vocab_size]
    assert torch.equal(head.float(), plain.lm_head.weight)
    template = (
        pretrain.load_template() if pretrain.template == "chat" else find_template("chat", load_tokenizer(joined))
    )
    assert template.end.startswith("</s>")


def load_tokenizer(module: engine.LlavaWithLoss) -> Any:
    """Load the tokenizer of an assembled model."""
    return AutoTokenizer.from_pretrained(module.llava.config.name_or_path)


def test_a_missing_package_is_named_with_the_command_that_installs_it(shared_job: Job, tmp_path: Path) -> None:
    missing = replace(shared_job, model=replace(shared_job.model, language="package:no_such_package"))
    with pytest.raises(ValueError, match=r"^model: got package:no_such_package, allowed: an installed package; pip "):
        run(missing, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    package = replace(shared_job.model, language="package:easy_vqa")
    assert locate_parts(package).language == str(easy_vqa.PACKAGE_IMAGES.parent)


def test_a_tower_of_sizes_needs_a_stage_that_trains_it(shared_job: Job, language: Path) -> None:
    stages = {name: stage for name, stage in shared_job.train.items() if name != "tower"}
    with pytest.raises(
        ValueError, match=r"train: got objectives language, language, allowed: a contrastive stage first"
    ):
        replace(shared_job, train=stages)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(language: Path, ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small study whose two shares ran in two folders, as on two machines, and were copied into one."""
    folder = tmp_path_factory.mktemp("study")
    file = write_small_study(RECIPE, language, folder / "small.yaml", ("llava", "both"))
    for number in (1, 2):
        runs = folder / f"machine-{number}"
        done = run_command("run", file, "--share", f"{number}/2", "--runs-dir", runs)
        assert done.code == 0, done.err
        assert f"smollm2: share {number}/2 is finished; " in done.out
        shutil.copytree(runs / "smollm2", folder / "joined", dirs_exist_ok=True)
        shutil.rmtree(runs)
    return folder / "joined"


@pytest.mark.slow
def test_the_tower_is_trained_before_it_is_joined_with_the_language_model(joined: Path) -> None:
    steps = [line["step"] for line in jsonl.read(joined / "shared" / "progress.jsonl")]
    assert steps == ["shards", "tower", "assemble", "pretrain"]
    assert [line["step"] for line in jsonl.read(joined / "llava-1" / "progress.jsonl")] == [
        "assemble", "instruct", "evaluate", "report",
    ]  # fmt: skip


@pytest.mark.slow
def test_answers_end_with_the_end_token_of_the_chat_template(joined: Path) -> None:
    folder = joined / "llava-0" / "checkpoints" / "instruct" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["conversation_template"] == "chat"
    assert find_template("chat", tokenizer).human.startswith("[user")


@pytest.mark.slow
def test_heads_are_chosen_from_training_samples_before_the_run(joined: Path) -> None:
    folder = joined / "llava-with-cmai-60-decisive-heads-0"
    found = json.loads((folder / "heads.json").read_text())
    assert found["settings"]["data"] == "half_shown"
    importance = torch.tensor(found["importance"])
    assert tuple(found["heads"]) == select_heads(importance, 0.05)
    job = yaml.safe_load((folder / "job.yaml").read_text())
    assert job["model"]["cmai"]["heads"] == found["heads"]
    provenance = json.loads((folder / "answers" / "provenance.json").read_text())
    assert provenance["methods"]["cmai"]["heads"] == found["heads"]


@pytest.mark.slow
def test_tables_show_the_whole_study_after_its_shares_are_copied_into_one_folder(joined: Path, tmp_path: Path) -> None:
    tables = run_command("tables", joined, "--out", tmp_path / "tables")
    assert tables.code == 0, tables.err
    text = (tmp_path / "tables" / "tables.md").read_text()
    for name in ("llava", "both", "both-without", "llava-with-cmai-60", "upper-limit", "bare-language-model"):
        assert re.search(rf"^\| {name} \|", text, re.MULTILINE), name
    # Both seeds are one model, although their runs were made in different folders.
    assert "| LLaVA-1.5 | 2 seeds" in text
