"""Adapters train in place of the language model's weights, and merging them does not change the outputs."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from pipelines.training import lora
from pipelines.training.stage import Lora
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.conversation import train_word_tokenizer
from redux.extras import write_install_command
from redux.model import ReduxForConditionalGeneration, build_model
from redux.settings import CMAI, VMTC

TOWER = TowerSizes(
    hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
LANGUAGE = LanguageSizes(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
LORA = Lora(rank=4, alpha=8, dropout=0.1)
LINEAR_LAYERS = 7
"""Linear layers of a block of LLaMA: four of attention, three of the MLP."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_word_tokenizer(["is it a red circle ? yes , no"], 64)


def build_llava(tokenizer: PreTrainedTokenizerFast, has_modules: bool = True) -> ReduxForConditionalGeneration:
    """Build a deterministic model, with both modules or neither."""
    torch.manual_seed(0)
    methods: dict[str, Any] = {"vmtc": VMTC(), "cmai": CMAI()} if has_modules else {"vmtc": None, "cmai": None}
    model = build_model(ModelSettings(tower=TOWER, language=LANGUAGE, **methods), tokenizer).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # attention of weights as initialised is all but uniform
                weight.mul_(0.16 / weight.std())
    return model


def make_inputs(model: Any) -> dict[str, Tensor]:
    image = [model.config.image_token_id] * (8 if getattr(model.config, "vmtc", None) else 16)
    ids = torch.tensor([[1, *image, 5, 6, 7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=model.dtype)
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids}


def compute_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**make_inputs(model)).logits


def train_adapters(
    tokenizer: PreTrainedTokenizerFast, has_modules: bool = True, steps: int = 3
) -> ReduxForConditionalGeneration:
    """Build a model and train its adapters for a few steps."""
    model = build_llava(tokenizer, has_modules)
    lora.add_adapters(model, LORA)
    optimizer = torch.optim.SGD(lora.list_adapter_parameters(model), lr=0.5)
    model.train()
    for _ in range(steps):
        model(**make_inputs(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_only_linear_layers_of_the_language_model_have_adapters(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_llava(tokenizer)
    before = {name for name, _ in model.named_parameters()}
    lora.add_adapters(model, LORA)
    new = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(new) == 2 * LINEAR_LAYERS * LANGUAGE.num_hidden_layers == len(lora.list_adapter_parameters(model))
    assert all(name.startswith("model.language_model.layers.") for name in new)
    assert {name.replace(".base_layer", "") for name, _ in model.named_parameters()} - new == before
    parts = model.parameters_by_part()
    assert {id(weight) for weight in parts["language"] if weight.requires_grad} == {
        id(weight) for weight in lora.list_adapter_parameters(model)
    }
    assert all(parameter.requires_grad for part in ("tower", "projector") for parameter in parts[part])
    assert {parameter.shape[0] if "lora_A" in name else parameter.shape[1]
            for name, parameter in model.named_parameters() if name in new} == {LORA.rank}  # fmt: skip


@pytest.mark.parametrize("has_modules", [True, False], ids=["modules on", "modules off"])
def test_new_adapters_change_nothing(tokenizer: PreTrainedTokenizerFast, has_modules: bool) -> None:
    model = build_llava(tokenizer, has_modules)
    expected = compute_logits(model)
    lora.add_adapters(model, LORA)
    assert torch.equal(compute_logits(model), expected)


def test_training_adapters_changes_no_other_weight(tokenizer: PreTrainedTokenizerFast) -> None:
    before = build_llava(tokenizer)
    model = train_adapters(tokenizer)
    stored = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(stored[name], weight) for name, weight in before.state_dict().items())
    assert not torch.allclose(compute_logits(model), compute_logits(before), atol=1e-2)


def test_both_modules_work_on_an_adapted_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """CMAI changes the logits; decoding with a cache equals the whole pass."""
    import redux

    model = train_adapters(tokenizer)
    expected = compute_logits(model)
    batch = {name: value for name, value in make_inputs(model).items() if name != "labels"}
    with torch.no_grad():
        shorter = {**batch, "input_ids": batch["input_ids"][:, :-1]}
        cache = model(**shorter, use_cache=True).past_key_values
        last = model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last[:, -1], expected[:, -1], atol=1e-5, rtol=1e-5)
    redux.inhibit(model, None)
    assert not torch.allclose(compute_logits(model), expected, atol=1e-3)


@pytest.mark.parametrize("has_modules", [True, False], ids=["modules on", "modules off"])
def test_a_merged_model_has_the_same_outputs_and_loads_as_plain_llava(
    tokenizer: PreTrainedTokenizerFast, has_modules: bool, tmp_path: Path
) -> None:
    """Within 1e-5 in float32, of logits of a size of about 1: the order of additions."""
    model = train_adapters(tokenizer, has_modules)
    expected, names = compute_logits(model), set(build_llava(tokenizer, has_modules).state_dict())
    merged = lora.merge_adapters(model)
    assert merged is model
    assert set(merged.state_dict()) == names
    assert not lora.list_adapter_parameters(merged)
    torch.testing.assert_close(compute_logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    reloaded, loading = ReduxForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(compute_logits(reloaded), compute_logits(merged))
    plain, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    if not has_modules:
        assert torch.equal(compute_logits(plain), compute_logits(merged))


def test_adapters_have_the_dtype_of_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """Merged weights are rounded to 8 bits of mantissa: logits of a size of about 1 move by 0.05 at most."""
    model = train_adapters(tokenizer).to(torch.bfloat16)
    expected = compute_logits(model)
    torch.testing.assert_close(compute_logits(lora.merge_adapters(model)), expected, atol=0.05, rtol=0.05)
    fresh = build_llava(tokenizer).to(torch.bfloat16)
    lora.add_adapters(fresh, LORA)
    assert {parameter.dtype for parameter in lora.list_adapter_parameters(fresh)} == {torch.bfloat16}


def test_a_model_has_adapters_once_and_may_get_new_ones_after_merging(tokenizer: PreTrainedTokenizerFast) -> None:
    model = train_adapters(tokenizer)
    with pytest.raises(ValueError, match="lora: got a model with adapters, allowed: a model whose"):
        lora.add_adapters(model, LORA)
    lora.add_adapters(lora.merge_adapters(model), LORA)
    assert len(lora.list_adapter_parameters(model)) == 2 * LINEAR_LAYERS * LANGUAGE.num_hidden_layers


def test_adapters_depend_on_the_seed_of_torch(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (
        [weight.clone() for weight in lora.list_adapter_parameters(train_adapters(tokenizer, steps=0))]
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_the_error_without_peft_names_the_extra(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    for call in (lambda: lora.add_adapters(build_llava(tokenizer), LORA), lambda: lora.require_peft()):
        with pytest.raises(ValueError, match=re.escape(write_install_command("lora"))):
            call()


@pytest.mark.parametrize("other_parts", [[], ["tower", "projector"]], ids=["adapters alone", "all parts"])
def test_saved_adapters_on_their_base_give_the_outputs_of_the_merged_model(
    tokenizer: PreTrainedTokenizerFast, other_parts: list[str], tmp_path: Path
) -> None:
    """Bit for bit, with PEFT's own loader and merge, and with the trained weights of other parts."""
    from peft import PeftModel

    build_llava(tokenizer).save_pretrained(tmp_path / "base")
    model = train_adapters(tokenizer)
    with torch.no_grad():
        for part in other_parts:
            for weight in model.parameters_by_part()[part]:
                weight.add_(0.01)
    (tmp_path / "adapter").mkdir()
    lora.save_adapters(model, LORA, other_parts, str(tmp_path / "base"), tmp_path / "adapter")
    expected = compute_logits(lora.merge_adapters(model))
    base = ReduxForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert not torch.allclose(compute_logits(base), expected, atol=1e-3)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    assert isinstance(loaded, ReduxForConditionalGeneration)
    assert {name: tuple(weight.shape) for name, weight in loaded.state_dict().items()} == {
        name: tuple(weight.shape) for name, weight in model.state_dict().items()
    }
    assert torch.equal(compute_logits(loaded), expected)
