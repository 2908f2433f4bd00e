"""`redux look`: jobs before and after their run, sets alone and for a model, mistakes, and the page in a browser."""

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from jobs import look, schema
from jobs.dry_run import find_tokenizer, open_stages
from jobs.resolve import resolve_job
from jobs.run import list_phases
from jobs.schema import Job
from pipelines.data.options import ShardOptions
from pipelines.data.preview import draw_samples
from pipelines.data.shard_index import Shards
from pipelines.data.shard_writer import make_shards
from pipelines.data.unmade import UnmadeShards
from pipelines.training.files import JOB_FILE
from redux.model import ReduxForConditionalGeneration, normalize_pixels
from redux.pretrained import load_assembled_tokenizer, load_image_encoder
from redux.trace import ImageTrace
from tests.jobs import chatty
from tests.jobs.command_line import run_command
from tests.pipelines.serving.browser import PROGRAM, open_browser

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
STAGE = {"objective": "language", "data": "talk", "epochs": 1, "global_batch_size": 4, "micro_batch_size": 2}


def make_turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def folder(in_process: Callable[[], AbstractContextManager[None]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with records.json, images, the set `talk`, and the model `m`."""
    folder = tmp_path_factory.mktemp("look")
    noise = np.random.default_rng(0)
    records = []
    for number in range(11):
        turns = [
            {"from": "human", "value": "<image>\nIs it red?"},
            {"from": "gpt", "value": f"yes, a {number} circle."},
        ]
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
        Image.fromarray(noise.integers(0, 256, (20, 30 + number, 3), np.uint8)).save(folder / f"{number}.png")
    records.append(
        {"id": "text", "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "no"}]}
    )
    records.append(records[0])  # rejected as a duplicate
    (folder / "records.json").write_text(json.dumps(records))
    with in_process():
        make_shards(records, str(folder), str(folder / "talk"), ShardOptions(samples_per_shard=5, max_bad_fraction=1))
    chatty.save_model(folder / "m")
    return folder


@pytest.fixture
def write_job(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the file of a job with one stage."""

    def write(model: dict, stage: dict | None = None, data: dict | None = None) -> Path:
        job = {
            "name": "mine",
            "data": {"source": None, "sets": {"talk": str(folder / "talk")}, **(data or {})},
            "model": model,
            "train": {"instruct": STAGE | {"learning_rate": {"projector": 1e-3}} | (stage or {})},
        }
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps(job))
        return path

    return write


def of_sizes(patch_size: int = 4) -> dict:
    return {
        "tower": {**SIZES, "image_size": 16, "patch_size": patch_size, "num_hidden_layers": 4},
        "language": {**SIZES, "num_hidden_layers": 2},
        "vmtc": {"ratio": 0.5},
    }


def open_job(path: Path, folder: Path) -> tuple[Job, Path]:
    return resolve_job(schema.load(path), folder), folder


def test_a_set_that_is_not_made_yet_gives_the_samples_of_the_made_one(
    write_job: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    source = {"source": str(folder / "records.json"), "images": str(folder), "samples_per_shard": 5}
    stage = {"shuffle": "window", "window": 1}
    rows = []
    for data in ({}, {"sets": {"talk": str(tmp_path / "later")}, "make": {"talk": source}}):
        with open_stages(*open_job(write_job(of_sizes(), stage, data), tmp_path / "run")) as stages:
            [work] = stages.values()
            assert isinstance(work.reader.sources["talk"], UnmadeShards) == bool(data)
            assert work.steps == 3
            samples = list(draw_samples(work.reader, "talk", 20, 0, work.steps))
            assert all(sample.encoded is not None for sample in samples)
            rows.append(
                [
                    (sample.stream_position, sample.stored and sample.stored.key, sample.encoded["input_ids"].tolist(),  # type: ignore[index]
                     None if sample.image is None else sample.image.tobytes())
                    for sample in samples
                ]
            )  # fmt: skip
    assert len(rows[0]) == 12
    assert rows[0] == rows[1]
    assert not (tmp_path / "later").exists()
    assert not (tmp_path / "run").exists()


def test_unmade_sets_report_missing_images(folder: Path) -> None:
    records = json.loads((folder / "records.json").read_text())
    records[1]["image"] = "gone.png"
    records[2]["image"] = "records.json"
    shards = UnmadeShards(records, str(folder), ShardOptions(samples_per_shard=5))
    made = Shards(folder / "talk")
    assert len(shards) == len(made) == 12
    for name in ("shard_sizes", "word_counts", "has_image"):
        assert getattr(shards, name).tolist() == getattr(made, name).tolist()
    with pytest.raises(ValueError, match=r"missing image: gone\.png"):
        shards.read_samples([1])
    with pytest.raises(ValueError, match=r"broken image: records\.json"):
        shards.read_samples([2])
    prepared = UnmadeShards(records, str(folder), ShardOptions(image_size=16))
    assert prepared.prepared_format == (16, "pad")
    assert prepared.read_samples([0])[0].image.startswith(b"P6\n16 16")


def test_the_tokenizer_is_that_of_the_assembled_model(
    parts: dict[str, str], write_job: Callable[..., Path], tmp_path: Path
) -> None:
    model = {part: parts[part] for part in ("tower", "language")}
    job, run_folder = open_job(write_job(model), tmp_path)
    early = load_assembled_tokenizer(parts["language"])
    assert find_tokenizer(job, run_folder) is None
    list_phases(job, run_folder)["assemble"]()
    made = find_tokenizer(job, run_folder)
    assert made is not None
    late = AutoTokenizer.from_pretrained(made)
    assert early.get_vocab() == late.get_vocab()
    for name in ("model_max_length", "pad_token", "eos_token", "chat_template"):
        assert getattr(early, name) == getattr(late, name)
    # The pictures before and after assembling are those of the pretrained tower.
    with open_stages(job, run_folder) as stages:
        [work] = stages.values()
        [sample] = draw_samples(work.reader, "talk", 1, 0)
        after = look.find_encoder(job, run_folder, work.plan)
        before = look.find_encoder(job, tmp_path / "nowhere", work.plan)
    assert before.note == after.note == "16 become 8 tokens, by the pretrained tower"
    whole = ReduxForConditionalGeneration.from_pretrained(made, dtype=torch.float32).eval()
    assert sample.image is not None
    with torch.inference_mode():
        values = normalize_pixels(torch.from_numpy(sample.image.transpose(2, 0, 1)[None].copy()))
        _, assignment = whole.model.encode_images(values)
    trace = ImageTrace(
        Image.fromarray(sample.image), assignment.token_of_patch[0].numpy(), assignment.merged[0].numpy()
    )
    expected = np.asarray(trace.draw(look.SET_IMAGE_SIZE))
    for encoder in (before, after):
        [picture] = look.draw_pictures(encoder.model, [sample])
        assert picture is not None
        assert np.array_equal(np.asarray(picture), expected)


def test_a_tower_with_missing_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    model = ReduxForConditionalGeneration.from_pretrained(folder / "m")
    weights = {name: weight for name, weight in model.state_dict().items() if "vision_tower" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"checkpoint: got .* without .*vision_tower"):
        load_image_encoder(model.config, checkpoint=tmp_path)


def test_a_page_of_a_job_that_has_not_run(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_command("look", write_job(of_sizes()), "train.instruct.max_length=24", "--samples", 4)
    assert (result.code, result.out, result.err) == (0, "look-mine.html\n", "")
    html = (tmp_path / "look-mine.html").read_text()
    assert html.count("<article") == 4
    assert "not shown, because the tower is not trained yet" in html
    assert "at most 24 tokens; the rest is cut off" in html
    again = run_command("look", "mine.yaml", "--seed", 0, "--samples", 4, "--text", "train.instruct.max_length=24")
    shown = re.findall(r"^\[\d+\] (\S+), row \d+, (step \d+, sample \d of 4)", again.out, re.M)
    assert len(shown) == 4
    assert all(name in html and place in html for name, place in shown)


def test_a_run_is_shown_with_its_own_tokenizer(write_job: Callable[..., Path], tmp_path: Path) -> None:
    path = write_job(of_sizes())
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    job = resolve_job(schema.load(path), folder)
    (folder / JOB_FILE).write_text(schema.dump(job))
    list_phases(job, folder)["shards"]()
    assert find_tokenizer(job, folder) == folder / "tokenizer"
    texts = [run_command("look", *words, "--text").out.partition("\n\n")[2] for words in ([folder], [path])]
    texts += [run_command("look", path, "--runs-dir", tmp_path / "runs", "--text").out.partition("\n\n")[2]]
    assert texts[0] == texts[1] == texts[2] != ""
    # A job with another seed has another order, and its run folder is another one's.
    other = resolve_job(schema.load(path, ["seed=1"]), folder)
    assert find_tokenizer(other, folder) is None


def test_a_set_is_shown_alone_and_for_a_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run_command("look", folder / "talk", "--out", out).out == f"{out}\n"
    html = out.read_text()
    assert html.count("<article") == 10
    assert "vicuna_v1, the default" in html
    result = run_command("look", folder / "talk", "--model", folder / "m", "--text", "--samples", 99)
    assert result.code == 0, result.err
    assert "16 become 8 tokens, by the checkpoint" in result.out
    assert result.out.count("<image> x 8") == 11
    assert "step" not in result.out
    assert "[unknown:" in result.out  # the model has a word tokenizer of other words


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere"], "JOB|SET: got nowhere, allowed: a job file (.yaml), the folder of a run, or a folder or URL"),
        (["{talk}", "seed=1"], "seed=1: got a value for a set of shards"),
        (["{job}", "--model", "m"], "--model: got m with a job, allowed: with a set of shards"),
        (["{job}", "train.instruct.data=other"], "train.instruct.data: got other, allowed: talk"),
        (["{job}", "data.sets.talk=gone"], "no shards here, index.arrow is missing"),
        (["jobs/recipes/reproduce/mini.yaml"], "got a study, allowed: a job"),
        (["jobs/recipes/search/laptop.yaml"], "got a search, allowed: a job"),
        (["jobs/recipes/evaluate.yaml", "model.checkpoint=m"], "train: got no stages"),
        (["{talk}", "--model", "{talk}"], "no job.yaml or config.json, allowed: the folder of a run or of a model"),
    ],
)
def test_mistakes_are_one_line(words: list[str], error: str, folder: Path, write_job: Callable[..., Path]) -> None:
    known = {"talk": folder / "talk", "job": write_job(of_sizes())}
    result = run_command("look", *(word.format(**known) for word in words))
    assert (result.code, result.out) == (2, "")
    assert error in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="needs chromium")
def test_the_page_fits_a_phone_and_a_desktop(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    run_command("look", folder / "talk", "--model", folder / "m", "--out", out)
    with open_browser() as browser:
        for width in (390, 1280):
            browser.open(out.as_uri(), width, is_dark=width == 390)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")
            assert browser.run("[...document.images].every((image) => image.alt)")
            # A figure beside the tokens on a desktop, above them on a phone.
            boxes = "['.images', '.images ~ div'].map((part) => document.querySelector(`.sample ${part}`)"
            boxes += ".getBoundingClientRect()).map((box) => [box.left, box.top])"
            (left, top), (tokens_left, tokens_top) = browser.run(boxes)
            assert (tokens_left > left, tokens_top > top) == (width == 1280, width == 390)
        assert browser.errors == []
