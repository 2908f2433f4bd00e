"""A checkpoint is loaded with all of its weights or refused in one line, and `convert` mends what can be mended."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionModel, PreTrainedTokenizerFast

from redux import answering
from redux.conversation import IMAGE_TOKEN
from redux.conversion import convert_checkpoint
from redux.loading import UnmappedWeightsError, load_model, load_tokenizer, strip_wrappers
from redux.model import ReduxForConditionalGeneration
from redux.pretrained import check_checkpoint
from redux.settings import CMAI, VMTC

Tiny = Callable[..., ReduxForConditionalGeneration]
Sample = Callable[..., dict[str, Any]]
Weights = dict[str, Tensor]
PROJECTOR = "model.multi_modal_projector.linear_1.weight"


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Callable[[Callable[[Weights], Weights]], Path]:
    """Folder of the model with other weights in its file."""

    def change(edit: Callable[[Weights], Weights]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(whole, folder)
        weights = {name: weight.contiguous() for name, weight in edit(load_file(whole / "model.safetensors")).items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


INCOMPLETE = {
    "no projector": (without("projector"), r"without model.multi_modal_projector.linear_1.bias and 3 more"),
    "one lost": (without("layers.1.mlp.up_proj"), r"without model.language_model.layers.1.mlp.up_proj.weight, allowed"),
    "one more": (lambda weights: weights | {"extra": torch.zeros(1)}, "with unknown extra, allowed"),
    "other shape": (
        lambda weights: {n: w[:, :24] if PROJECTOR.endswith(n) else w for n, w in weights.items()},
        rf"with {PROJECTOR} of shape \[32, 24\] for \[32, 32\]",
    ),
    "DDP": (prefixed("module."), r"saved by DistributedDataParallel: redux export .* --out DIR"),
    "torch.compile": (prefixed("_orig_mod."), r"saved by torch.compile: redux export"),
    "PEFT": (prefixed("base_model.model."), r"saved by PEFT: redux export"),
    "adapters": (
        lambda weights: weights | {f"base_model.model.{PROJECTOR[:-7]}.lora_A.default.weight": torch.zeros(1)},
        "merge them first",
    ),
}

LOADERS: dict[str, Callable[[Path], Any]] = {
    "from_pretrained": ReduxForConditionalGeneration.from_pretrained,
    "asked": answering.load,
    "checked": check_checkpoint,
    "foreign": lambda folder: load_model(AutoModelForImageTextToText, folder, label="model"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", INCOMPLETE)
def test_incomplete_weights_are_refused_in_one_line(
    changed: Callable[[Callable[[Weights], Weights]], Path], kind: str, loader: str
) -> None:
    edit, message = INCOMPLETE[kind]
    with pytest.raises(ValueError, match=message) as caught:
        LOADERS[loader](changed(edit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged weights"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "is a git-lfs pointer"),
        (lambda data: b"", "damaged weights"),
    ],
    ids=["cut", "pointer", "empty"],
)
def test_damaged_files_are_named(
    whole: Path, tmp_path: Path, loader: str, content: Callable[[bytes], bytes], message: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        LOADERS[loader](folder)


def test_a_file_that_cannot_be_mapped_is_no_damaged_one(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"unable to mmap 99 bytes from file <{whole}>: Cannot allocate memory (12)\nmore")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", refuse)
    with pytest.raises(
        UnmappedWeightsError, match=r"^model: got .*, whose weights cannot be mapped into mem"
    ) as caught:
        LOADERS["foreign"](whole)
    assert "\n" not in str(caught.value)


def test_what_was_asked_to_be_random_may_be(changed: Callable[[Callable[[Weights], Weights]], Path]) -> None:
    folder = changed(INCOMPLETE["other shape"][0])
    model = ReduxForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.get_parameter(PROJECTOR).shape == (32, 32)


def test_a_tower_of_a_llava_without_its_weights_is_refused(whole: Path) -> None:
    """A LLaVA holds an image tower, under names that a tower alone does not have."""
    with pytest.raises(ValueError, match=r"tower: got .* without "):
        load_model(CLIPVisionModel, whole, label="tower")


@pytest.mark.parametrize("content", [None, "{", "version https://git-lfs.github.com/spec/v1"])
def test_a_tokenizer_that_cannot_be_read_is_named(whole: Path, tmp_path: Path, content: str | None) -> None:
    folder = shutil.copytree(whole, tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    if content is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"model: got {folder}, allowed: a folder with a tokenizer"):
        load_tokenizer(folder, "model")


@pytest.mark.parametrize("loader", ["asked", "checked"])
def test_a_tokenizer_without_the_image_token_is_refused(whole: Path, tmp_path: Path, loader: str) -> None:
    """The image's place would be an unknown word, and the model would not see it."""
    folder = shutil.copytree(whole, tmp_path / "blind")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 7, "image_token_index": 7}))
    with pytest.raises(ValueError, match=f"got {folder} with 4 in its tokenizer, allowed: <image> as token 7"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_names_of_wrappers_are_converted(
    changed: Callable[[Callable[[Weights], Weights]], Path], tiny: Tiny, prefix: str
) -> None:
    model, tokenizer = convert_checkpoint(changed(prefixed(prefix)))
    expected = tiny().state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == model.config.image_token_id


def test_a_name_that_only_looks_like_a_wrappers_stays() -> None:
    assert strip_wrappers("model.module.weight") == "model.module.weight"


@pytest.mark.parametrize("with_tower", [True, False])
def test_the_layout_of_the_llava_repository_is_converted(
    tiny: Tiny, sample: Sample, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, with_tower: bool
) -> None:
    """Its configuration is flat, its projector a Sequential, its tower named or within, and `<image>` no token."""
    model = tiny(vmtc=None, cmai=None)
    tower, original = tmp_path / "tower", tmp_path / "original"
    model.model.vision_tower.save_pretrained(tower)
    names = {
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
    }
    stored = {}
    for name, weight in model.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        if with_tower or "vision_tower" not in name:
            stored[names[prefix] + name.removeprefix(prefix)] = weight.clone()
    original.mkdir()
    torch.save(stored, original / "pytorch_model.bin")
    tokenizer.save_pretrained(original)
    config = {
        **model.config.text_config.to_dict(),
        "model_type": "llava_llama",
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    (original / "config.json").write_text(json.dumps(config))
    for load in (ReduxForConditionalGeneration.from_pretrained, answering.load):
        with pytest.raises(ValueError, match=r"in the layout of the LLaVA repository.* redux export"):
            load(original)

    converted, _ = convert_checkpoint(original)
    inputs = sample(model)
    with torch.no_grad():
        assert torch.equal(converted.eval()(**inputs).logits, model(**inputs).logits)
    assert (converted.config.conversation_template, converted.config.image_aspect_ratio) == ("vicuna_v1", "pad")


def test_both_methods_can_be_given_to_a_whole_checkpoint(whole: Path) -> None:
    model = ReduxForConditionalGeneration.from_pretrained(whole, vmtc=VMTC(tokens=4), cmai=CMAI())
    assert model.config.image_seq_length == 4
