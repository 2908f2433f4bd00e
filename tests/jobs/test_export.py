"""Exports of a run: complete folders that answer as the run's model, and a card that agrees with the run folder."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, GenerationConfig

from jobs import schema
from jobs.export import ExportOptions, export_model
from jobs.run import plan_stages
from pipelines.evaluation.answer_files import ANSWERS_FOLDER
from pipelines.report.environment import ENVIRONMENT_FILE
from pipelines.training import checkpoint, engine, export
from pipelines.training.files import JOB_FILE
from pipelines.training.fragments import STATES, Fragment
from redux import answering
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.conversation import TEMPLATES, train_word_tokenizer
from redux.model import ReduxForConditionalGeneration, build_model
from redux.settings import CMAI, VMTC
from tests.jobs.command_line import run_command

QUESTIONS = ("is it a red circle ?", "what shape is it ?", "is it blue ?", "yes")
WORDS = [*QUESTIONS, "no , a blue square", TEMPLATES["vicuna_v1"].system]
STEPS = 3
STAGE = {
    "objective": "language",
    "data": "talk",
    "template": "vicuna_bare",
    "steps": STEPS,
    "global_batch_size": 8,
    "micro_batch_size": 2,
}


def as_file(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (37, 50, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def save_checkpoint(run: Path, name: str) -> None:
    """Save the checkpoint of a stage that would have moved its weights at random, and its model."""
    job = schema.load(run / JOB_FILE)
    plan = plan_stages(job, run)[name]
    module, parts = engine.build_module(plan)
    trained = {id(parameter) for part in plan.stage.learning_rate for parameter in parts[part]}
    generator = torch.Generator().manual_seed(1)
    fragments = [
        Fragment(
            parameter_name,
            0,
            dict.fromkeys(
                STATES,
                (parameter.detach() + 0.2 * torch.randn(parameter.shape, generator=generator)).flatten(),
            ),
        )
        for parameter_name, parameter in module.named_parameters()
        if id(parameter) in trained
    ]
    url = f"{plan.folder}/{checkpoint.format_step_name(STEPS)}"
    files = checkpoint.Upload(url, 0, fragments).result()
    manifest = checkpoint.Manifest(STEPS, STEPS, 2, 1.0, {}, {}, files)
    checkpoint.commit(url, manifest, schema.dump(job))
    export.export_result(plan, STEPS)


def write_run(folder: Path, name: str, **changes: Any) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    job = {
        "name": name,
        "seed": 3,
        "data": {"source": None, "sets": {"talk": str(folder / "talk|")}},
        "model": {"checkpoint": str(folder / "base")},
        "evaluate": {"tasks": {"easy_vqa": {}}},
        **changes,
    }
    (run / JOB_FILE).write_text(schema.dump(schema.document.build(job, schema.Job, "job")))
    return run


def write_answers(run: Path, right: int, questions: int = 20, methods: dict[str, Any] | None = None) -> None:
    (run / ANSWERS_FOLDER).mkdir()
    rows = [
        {"id": str(number), "unit": str(number // 2), "prompt": "?", "answer": "yes", "type": "yes/no",
         "response": "yes" if number < right else "no"}
        for number in range(questions)
    ]  # fmt: skip
    (run / ANSWERS_FOLDER / "easy_vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / ANSWERS_FOLDER / "provenance.json").write_text(json.dumps({"model_type": "llava", "methods": methods}))
    (run / "metrics.json").write_text(json.dumps({"easy_vqa.accuracy": right / questions, "wall_s": 60.0}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last stage trained adapters and the projector of a checkpoint: 8 of 16 patches."""
    folder = tmp_path_factory.mktemp("runs").resolve()
    torch.manual_seed(0)
    tokenizer = train_word_tokenizer(WORDS, 128)
    size = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    sizes = ModelSettings(
        tower=TowerSizes(image_size=32, patch_size=8, num_hidden_layers=5, **size),
        language=LanguageSizes(num_hidden_layers=2, **size),
        vmtc=None,
        cmai=None,
    )
    model = build_model(sizes, tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rates = {"projector": 2e-5, "language": 2e-4}
    run = write_run(
        folder,
        "mine",
        model={"checkpoint": str(folder / "base"), "vmtc": {"stages": 3}, "cmai": {"gamma_max": 0.6}},
        train={
            "captions": STAGE | {"template": "plain", "learning_rate": {"projector": 1e-3}},
            "instruct": STAGE | {"learning_rate": rates, "lora": {"rank": 4, "alpha": 8}},
        },
    )
    from jobs import model_parts

    model_parts.assemble_parts(schema.load(run / JOB_FILE), run / "assembled")
    for stage in ("captions", "instruct"):
        save_checkpoint(run, stage)
    steps = [
        {
            "stage": stage,
            "step": step,
            "loss": 1.0,
            "samples": 8,
            "tokens": 80,
            "compute_s": 1,
            "data_s": 1,
            "stall_s": 0,
        }
        for stage in ("captions", "instruct")
        for step in range(1, STEPS + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / ENVIRONMENT_FILE).write_text(
        json.dumps({"at": 0, "commit": "abc123", "is_modified": True, "cpus": 2, "cpu": "Toy", "gpus": {},
                    "versions": {"torch": "1.2.3"}}) + "\n"
    )  # fmt: skip
    write_answers(run, right=15)
    return run


@pytest.fixture(scope="module")
def expected(run: Path) -> list[str]:
    """Answers of the run's model."""
    return answer(run / "checkpoints" / "instruct" / "model")


def answer(folder: Path) -> list[str]:
    images = [as_file(number) for number in range(len(QUESTIONS))]
    return answering.load(folder)(QUESTIONS, images, max_new_tokens=8).texts


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_folder_for_transformers_is_complete_and_answers_as_the_run(
    run: Path, expected: list[str], tmp_path: Path
) -> None:
    printed = run_command("export", run, "--out", tmp_path / "out")
    assert printed.code == 0, printed.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja",
        "generation_config.json", "README.md",
    }  # fmt: skip
    assert len(set(expected)) > 1
    assert answer(tmp_path / "out") == expected
    assert not GenerationConfig.from_pretrained(tmp_path / "out").do_sample
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it blue ?"}]}]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor(images=Image.new("RGB", (32, 32)), text=prompt, return_tensors="pt")["input_ids"]
    assert (ids == processor.image_token_id).sum() == 8


def test_adapters_on_their_base_answer_as_the_merged_model(run: Path, expected: list[str], tmp_path: Path) -> None:
    """With the program of the card."""
    out, _ = export_model(run, "instruct", None, str(tmp_path / "adapter"), ExportOptions(adapter=True))
    names = {path.name for path in Path(out).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {name for name in names if name.startswith("model")}
    front, text = read_card(Path(out))
    assert front["library_name"] == "peft"
    [program] = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(program.replace('"MERGED"', repr(str(tmp_path / "merged"))), {})
    assert answer(tmp_path / "merged") == expected
    refused = run_command("ask", out, "is it ?")
    assert refused.code == 2
    assert refused.err.startswith(f"redux: {out}: the folder has LoRA adapters alone, allowed: a whole model")


def test_the_base_of_the_first_stage_is_the_checkpoint_of_the_job(run: Path, tmp_path: Path) -> None:
    base = json.loads((run / "assembled" / "config.json").read_text())
    assert base["vmtc"]
    other = tmp_path / "first"
    first = write_run(
        run.parent,
        "first",
        model={"checkpoint": str(run.parent / "base")},
        train={"tune": STAGE | {"learning_rate": {"language": 2e-4}, "lora": {"rank": 4, "alpha": 8}}},
    )
    (first / "assembled").symlink_to(run / "assembled")
    save_checkpoint(first, "tune")
    export_model(first, None, None, str(other), ExportOptions(adapter=True))
    assert json.loads((other / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        run.parent / "base"
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--adapter", "--stage", "captions"],
         "--adapter: got stage captions, which trained no LoRA adapters, allowed: --stage instruct"),
        (["--adapter", "--to", "vllm"], "--adapter: got --to vllm, allowed: --to hf"),
        (["--to", "vllm", "--stage", "captions"], "--to: got vllm for stage captions, which learns no conversations"),
        (["--stage", "other"], "stage: got other, allowed: captions, instruct"),
    ],
)  # fmt: skip
def test_a_form_that_does_not_fit_is_refused_in_one_line(
    run: Path, words: list[str], error: str, tmp_path: Path
) -> None:
    refused = run_command("export", run, *words, "--out", tmp_path / "out")
    assert refused.code == 2
    assert refused.err.startswith(f"redux: {error}")
    assert len(refused.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_card_agrees_with_the_run(run: Path, tmp_path: Path) -> None:
    printed = run_command("export", run, "--to", "vllm", "--out", tmp_path / "out")
    assert printed.code == 0, printed.err
    front, text = read_card(tmp_path / "out")
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "datasets": ["talk"],
        "tags": ["llava", "redux", "vmtc", "cmai"],
    }, "the base is a folder, which the Hub does not know"
    assert "has 16 patches; 8 image tokens reach the language model" in text
    assert f"    vllm serve {tmp_path / 'out'} --hf-overrides '{{\"cmai\": null}}'" in text
    assert re.search(r"\| easy_vqa \| 75.0 % \| [\d.]+ to [\d.]+ \| 20 \|", text)
    assert "| instruct | talk | 100% | unknown | 24 |" in text
    assert "| instruct | projector 2e-05, language (LoRA, rank 4, alpha 8) 0.0002 | 3 | 8 | vicuna_bare |" in text
    assert "Seed 3." in text
    assert "commit abc123 with changes, torch 1.2.3" in text
    assert re.search(r"\| Image tokens \| 8 \| 16 \| 0.50 \|", text)
    assert "Not evaluated on" not in text, "of the benchmarks that the job does not name"
    assert "- Evaluated on easy_vqa alone." in text
    assert "{{" not in text


def test_the_card_has_the_effect_of_cmai_or_the_command_that_measures_it(run: Path, tmp_path: Path) -> None:
    export_model(run, None, None, str(tmp_path / "before"))
    _, text = read_card(tmp_path / "before")
    [command] = re.findall(r"    (redux run .*)", text)
    _, verb, job, *words = shlex.split(command)
    assert verb == "run"
    overrides = [word for word in words if "=" in word]
    off = schema.load(Path(job), overrides)
    model = run / "checkpoints" / "instruct" / "model"
    assert (off.train, off.model.cmai, off.model.vmtc) == ({}, None, "checkpoint")
    assert off.model.checkpoint == str(model)
    # The evaluation that this command would leave.
    (run_off := run.parent / off.name).mkdir()
    (run_off / JOB_FILE).write_text(schema.dump(off))
    vmtc = ReduxForConditionalGeneration.config_class.from_pretrained(model).vmtc
    write_answers(run_off, right=5, methods={"vmtc": vmtc, "cmai": None, "reduction": None})
    export_model(run, None, None, str(tmp_path / "after"))
    _, text = read_card(tmp_path / "after")
    assert re.search(r"\| easy_vqa \| 75.0 % \| 25.0 % \| \+50.0 \| \+[\d.]+ to \+[\d.]+ \|", text)
    assert "redux run" not in text


def test_scores_belong_to_the_checkpoint_that_the_run_evaluates(run: Path, tmp_path: Path) -> None:
    export_model(run, "captions", None, str(tmp_path / "out"))
    _, text = read_card(tmp_path / "out")
    assert "75.0 %" not in text
    assert "This checkpoint was not evaluated" in text
    assert "answers no questions" in text
    assert "redux ask" not in text


def test_settings_of_a_card_are_those_of_its_model(run: Path, tmp_path: Path) -> None:
    export_model(run, None, None, str(tmp_path / "out"))
    _, text = read_card(tmp_path / "out")
    rows = dict(re.findall(r"^\| ((?:vmtc|cmai)\.\w+) \| (.*) \|$", text, re.M))
    assert rows["cmai.gamma_max"] == str(CMAI(gamma_max=0.6).gamma_max)
    assert rows["vmtc.stages"] == str(VMTC(stages=3).stages)
