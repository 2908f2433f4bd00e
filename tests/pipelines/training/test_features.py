"""Stored features train as images do with a frozen tower, and are refused where they would differ."""

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from pipelines.core import storage
from pipelines.core.storage import Retry
from pipelines.data.features import StoredFeatures, name_file, read_format
from pipelines.data.packing import Packing
from pipelines.data.shard_index import Shards
from pipelines.training import checkpoint, engine, feature_writer, memory, worker
from pipelines.training.plan import StagePlan
from pipelines.training.step_trace import SampleShape
from redux import model
from redux.conversation import IGNORE_INDEX
from redux.model import ReduxForConditionalGeneration
from redux.settings import VMTC
from tests.pipelines import ranks, small
from tests.pipelines.training import memory_cases
from tests.pipelines.training.measured import measure_all

CPU = torch.device("cpu")
PIXELS: dict[str, Any] = {"image_aspect_ratio": "pad", "image_backend": "exact"}
FROZEN = {"projector": 1e-3, "language": 1e-3}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

NewPlan = Callable[..., StagePlan]
InProcess = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def plan(new_plan: NewPlan) -> StagePlan:
    return new_plan(learning_rate=FROZEN, micro_batch_size=4, loss_reduction="sample")


@pytest.fixture(scope="module")
def llava(plan: StagePlan) -> ReduxForConditionalGeneration:
    torch.manual_seed(0)
    return model.build_model(small.MODEL, AutoTokenizer.from_pretrained(plan.tokenizer))


@pytest.fixture(autouse=True)
def one_actor(monkeypatch: pytest.MonkeyPatch, local_ray_data: None) -> None:
    """Count no resources, since no Ray runs."""
    monkeypatch.setattr(feature_writer.cluster, "count_model_processes", lambda: 1)
    monkeypatch.setattr(feature_writer.cluster, "count_gpus", lambda: 0)
    monkeypatch.setattr(feature_writer.ray, "put", pickle.dumps)
    monkeypatch.setattr(feature_writer.ray, "get", pickle.loads)


def write(plan: StagePlan, llava: ReduxForConditionalGeneration, folder: Path) -> str:
    """Write the features of the plan's set."""
    form = feature_writer.describe_format(llava.model, **PIXELS)
    feature_writer.write_features(plan.sets["set"], str(folder), llava.model, form)
    return str(folder)


def compute(plan: StagePlan, llava: ReduxForConditionalGeneration, number: int) -> tuple[float, dict[str, Tensor]]:
    """Compute loss and gradients of a micro-batch."""
    module = engine.LlavaWithLoss(llava)
    engine.select_trained(module, llava.parameters_by_part(), plan.stage)
    batch = plan.build_reader()(number)
    stand_in: Any = SimpleNamespace(module=module, device=CPU)
    [weight] = worker.compute_sample_weights([batch], plan, CPU)
    loss = module(**engine.move_to_device(batch, stand_in), weight=weight)
    loss.backward()
    gradients = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    module.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("packs", [False, True])
def test_loss_and_gradient_are_those_of_images(
    precision: str, packs: bool, plan: StagePlan, llava: ReduxForConditionalGeneration, tmp_path: Path
) -> None:
    """Bit for bit if each image is encoded alone; encoded together, the tower itself rounds otherwise in fp32."""
    llava = llava.to(PRECISIONS[precision])
    packing = Packing(max_length=256) if packs else None
    for micro_batch_size in (1, 4):
        stage = replace(plan.stage, precision=precision, packing=packing, micro_batch_size=micro_batch_size)
        pixels = replace(plan, stage=stage)
        features = replace(pixels, features={"set": write(pixels, llava, tmp_path / "features")})
        for number in range(8 // micro_batch_size):
            assert "pixel_values" not in features.build_reader()(number)
            loss, gradients = compute(features, llava, number)
            expected, reference = compute(pixels, llava, number)
            assert gradients.keys() == reference.keys()
            if micro_batch_size == 1:
                assert loss == expected
                assert all(gradient.equal(reference[name]) for name, gradient in gradients.items())
            else:
                assert loss == pytest.approx(expected, rel=1e-6)
                for name, gradient in gradients.items():
                    assert (gradient - reference[name]).norm() <= 1e-5 * reference[name].norm() + 1e-8
    llava.float()


@pytest.mark.integration
def test_the_estimated_memory_is_that_of_features(new_plan: NewPlan, tmp_path: Path) -> None:
    plan = memory_cases.make_plan(new_plan, "stage 2 of LLaVA, zero 3")
    assert plan.model
    llava = model.build_model(plan.model, AutoTokenizer.from_pretrained(plan.tokenizer)).to(torch.bfloat16)
    stored = replace(plan, features={"set": write(plan, llava, tmp_path / "features")})
    [measured] = ranks.run_on_ranks(tmp_path, 2, measure_all, [stored])[:1]
    [peak] = [found.peak for found in measured]
    samples = [
        SampleShape(int(mask.sum()), int((labels[1:] != IGNORE_INDEX).sum()), True)
        for labels, mask in zip(
            *[plan.build_reader()(2 * 2)[name] for name in ("labels", "attention_mask")], strict=True
        )
    ]
    features = stored.open_features(stored.open_sources())
    with_features, with_pixels = (
        memory.estimate_memory(memory.build_shape(plan, None, found), samples, 2, "cpu") for found in (features, None)
    )
    assert with_features.total == pytest.approx(peak, rel=0.1)
    assert with_features.activations < with_pixels.activations


def test_an_interrupted_run_continues_with_the_missing_shards(
    plan: StagePlan, llava: ReduxForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(write(plan, llava, tmp_path / "whole"))
    written: list[str] = []
    put = storage.write

    def write_some(url: str, data: bytes) -> None:
        if url.endswith(".features"):
            written.append(Path(url).name)
            if len(written) == 3:
                raise KeyboardInterrupt
        put(url, data)

    monkeypatch.setattr(storage, "write", write_some)
    folder = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        write(plan, llava, folder)
    found = read_format(str(folder))
    assert found
    assert not found[2]
    with pytest.raises(ValueError, match=r"features are unfinished, allowed: start `redux shards features` again"):
        StoredFeatures(str(folder), Shards(plan.sets["set"]))
    write(plan, llava, folder)
    assert written == [name_file(number) for number in (0, 1, 2, 2, 3, 4)]
    for path in sorted(whole.iterdir()):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_features_of_other_images_or_another_tower_are_refused(
    plan: StagePlan, llava: ReduxForConditionalGeneration, stored: Shards, tmp_path: Path
) -> None:
    folder = write(plan, llava, tmp_path / "features")
    named = replace(plan, features={"set": folder})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"random_flip": True}, "train.small.random_flip: got true with data.features, allowed: false"),
        ({"image_aspect_ratio": "crop"}, "got features with image_aspect_ratio pad, allowed for train.small: crop"),
        ({"precision": "bf16"}, "got features with precision fp32, allowed for train.small: bf16"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            replace(named, stage=replace(plan.stage, **changes)).build_reader()
    with pytest.raises(ValueError, match=r"got features with tokens 8, allowed for train\.small: 16"):
        replace(named, image_tokens=16).build_reader()
    with pytest.raises(ValueError, match="got features of another set than"):
        replace(named, sets={"set": stored.folder}).build_reader()
    with pytest.raises(ValueError, match=r"got none for set, which train\.small mixes with other"):
        replace(plan, features={"other": folder}).build_reader()
    # A stage that trains the tower reads images.
    assert not replace(named, stage=small.STAGE).build_reader().features
    # A writer does not mix features of two towers.
    with torch.no_grad():
        other = model.build_model(small.MODEL, AutoTokenizer.from_pretrained(plan.tokenizer))
    with pytest.raises(ValueError, match="contains features of another set, tower or form of images"):
        write(plan, other, tmp_path / "features")
    # The loaded tower decides.
    reader = named.build_reader()
    settings = replace(small.MODEL, vmtc=VMTC(ratio=0.5, iterations=1))
    clustered = model.build_model(settings, AutoTokenizer.from_pretrained(plan.tokenizer))
    clustered.load_state_dict(llava.state_dict())
    for loaded, is_refused in ((llava, False), (other, True), (clustered, True)):
        stand_in: Any = SimpleNamespace(module=engine.LlavaWithLoss(loaded), zero_optimization_stage=lambda: 0)
        if is_refused:
            with pytest.raises(checkpoint.RefusedError, match="features of another tower or other settings of vmtc"):
                engine.check_features(stand_in, named, reader)
        else:
            engine.check_features(stand_in, named, reader)


def test_a_damaged_record_is_a_replaced_sample(
    plan: StagePlan, llava: ReduxForConditionalGeneration, tmp_path: Path
) -> None:
    folder = Path(write(plan, llava, tmp_path / "features"))
    file = folder / name_file(0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    named = replace(plan, features={"set": str(folder)}, stage=replace(plan.stage, shuffle="none"))
    reader = named.build_reader()
    replaced = [reader(number)["replaced"] for number in range(2)]
    assert "features differ from their checksum" in "".join(replaced)


def test_features_in_a_bucket_are_those_in_a_folder(
    plan: StagePlan, llava: ReduxForConditionalGeneration, bucket: str, fast: Retry, tmp_path: Path
) -> None:
    shards = Shards(plan.sets["set"])
    numbers = np.flatnonzero(shards.has_image).tolist()
    form = feature_writer.describe_format(llava.model, **PIXELS)
    found = []
    for folder in (str(tmp_path / "features"), bucket):
        feature_writer.write_features(plan.sets["set"], folder, llava.model, form)
        found.append(StoredFeatures(folder, shards).read(numbers))
    assert len(numbers) > 10
    assert found[0] == found[1]
