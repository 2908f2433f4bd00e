"""Language models of several families are computed as by their own classes, and what would not be is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    DiffLlamaConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    PaliGemmaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    T5Config,
)

from redux.graph_decoding import find_obstacle
from redux.language import check_language, check_packing, drop_idle_window, find_language_class
from redux.model import ReduxForConditionalGeneration
from redux.plugin import inhibit
from redux.pretrained import assemble, configure_assembly
from redux.settings import CMAI, VMTC

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 2,
}
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": lambda **size: Qwen2Config(**size, tie_word_embeddings=True),
    "qwen3": lambda **size: Qwen3Config(**size, head_dim=16),
    "mistral": lambda **size: MistralConfig(**size, sliding_window=None),
    "smollm3": lambda **size: SmolLM3Config(**size, tie_word_embeddings=True),
    "phi3": lambda **size: Phi3Config(**size, sliding_window=128),
    "gemma": lambda **size: GemmaConfig(**size, head_dim=16),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
TIED = {"qwen2", "smollm3", "gemma"}


@pytest.fixture(scope="module")
def parts(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tower and of a language model of each family, with weights large enough to tell tokens apart."""
    tower = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    models = {"tower": lambda: CLIPVisionModel(tower)}
    for name, config in FAMILIES.items():
        models[name] = lambda config=config: AutoModelForCausalLM.from_config(config(**SIZE, vocab_size=len(tokenizer)))
    folders = {}
    for name, make in models.items():
        torch.manual_seed(0)
        model, folders[name] = make(), tmp_path_factory.mktemp(name)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(0.16 / weight.std())
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def join(parts: dict[str, Path], family: str, **methods: Any) -> ReduxForConditionalGeneration:
    torch.manual_seed(0)
    return assemble(parts["tower"], parts[family], **methods)[0].eval()


def inputs_for(model: Any, length: int = 12) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    image = [model.config.image_token_id] * getattr(model.config, "image_seq_length", 16)
    ids = torch.tensor([[1, 7, *image, *torch.randint(5, 30, (length,), generator=draw).tolist()]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=draw)}


@FAMILY
def test_without_the_method_it_computes_what_transformers_computes(
    parts: dict[str, Path], family: str, tmp_path: Path
) -> None:
    ours = join(parts, family)
    ours.save_pretrained(tmp_path)
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    inputs = inputs_for(ours)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs.eval()(**inputs).logits)
        text = torch.tensor([[1, 9, 8, 7, 10]])
        alone = AutoModelForCausalLM.from_pretrained(parts[family]).eval()
        assert torch.equal(ours(input_ids=text).logits, alone(input_ids=text).logits)


@FAMILY
def test_decoding_with_a_cache_inhibits_as_the_whole_sequence_does(parts: dict[str, Path], family: str) -> None:
    model = join(parts, family, vmtc=VMTC(), cmai=CMAI(gamma_max=0.8))
    inputs = inputs_for(model)
    start, cache, steps = inputs["input_ids"].shape[1] - 4, None, []
    with torch.no_grad():
        full_logits = model(**inputs).logits
        for first, last in ((0, start), (start, start + 1), (start + 1, start + 4)):
            part = {"input_ids": inputs["input_ids"][:, first:last]}
            if not first:
                part["pixel_values"] = inputs["pixel_values"]
            output = model(**part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), full_logits, rtol=1e-4, atol=1e-4)
        inhibit(model, None)
        assert not torch.allclose(model(**inputs).logits, full_logits, rtol=1e-3, atol=1e-3)


@FAMILY
def test_a_trained_model_is_saved_and_generates(parts: dict[str, Path], family: str, tmp_path: Path) -> None:
    model = join(parts, family, vmtc=VMTC(), cmai=CMAI())
    inputs = inputs_for(model)
    before = model(**inputs, labels=inputs["input_ids"]).loss
    before.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    # The tower's last block and layer norm are above the layer that LLaVA reads.
    assert all(name.startswith("model.vision_tower.") for name in without)
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    model.save_pretrained(tmp_path)
    again = ReduxForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(**inputs)
        assert torch.equal(again(**inputs).logits, expected.logits)
        assert float(model(**inputs, labels=inputs["input_ids"]).loss) < float(before.detach())
    for llava in (model, again):
        assert (llava.lm_head.weight is llava.get_input_embeddings().weight) == (family in TIED)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(**inputs, **options), model.generate(**inputs, **options))
    padded = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    assert find_obstacle(again, padded) == ""


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "sliding window": (MistralConfig(sliding_window=64), "which does not keep the keys of all tokens"),
    "short window": (Phi3Config(sliding_window=2047), "which does not keep the keys of all tokens"),
    "soft cap": (
        Gemma2Config(layer_types=["full_attention"] * 26),
        r"whose attention scores have a soft cap \(attn_logit_softcapping\)",
    ),
    "final soft cap": (
        Gemma2Config(layer_types=["full_attention"] * 26, attn_logit_softcapping=None),
        "whose logits are more than the product of decoder and head",
    ),
    "factor of embeddings": (GraniteConfig(embedding_multiplier=12.0), "which changes its embeddings before the first"),
    "factor of logits": (GraniteConfig(logits_scaling=8.0), "whose logits are more than the product"),
    "scale of logits": (CohereConfig(), "whose logits are more than the product"),
    "experts": (MixtralConfig(), "whose layers have other products than attention and a gated MLP"),
    "difference of maps": (DiffLlamaConfig(), "whose attention is the difference of two maps"),
    "another build": (GPT2Config(), "whose decoder GPT2Model has other names than LLaMA's"),
    "images of its own": (PaliGemmaConfig(), "which has more parts than a decoder"),
    "an encoder": (T5Config(), "which has more parts than a decoder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_llava_would_compute_otherwise_is_refused_with_the_reason(kind: str) -> None:
    config, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=f"^{reason}"):
        check_language(config)


def test_a_refusal_names_source_reason_and_what_is_allowed(
    parts: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    MistralConfig(**SIZE, sliding_window=64, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    for load in (assemble, configure_assembly):
        with pytest.raises(ValueError, match="got") as caught:
            load(parts["tower"], tmp_path)
        assert str(caught.value) == (
            f"language: got {tmp_path} of model_type mistral, which does not keep the keys of all tokens "
            "(DynamicSlidingWindowLayer), allowed: a dense decoder of LLaMA's build, see redux/README.md"
        )


def test_a_window_over_all_positions_forgets_nothing(parts: dict[str, Path]) -> None:
    assert join(parts, "phi3").config.text_config.sliding_window is None
    short = Phi3Config(sliding_window=2047)
    drop_idle_window(short)
    assert short.sliding_window == 2047


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config, GemmaConfig, SmolLM3Config])
def test_packed_conversations_of_a_language_model_are_apart(config_class: Any) -> None:
    check_packing(config_class())


def test_a_language_model_that_mixes_packed_conversations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ValueError, match=r"^which computes something else with packed conversations \(llama\)$"):
        check_packing(LlamaConfig())


def test_the_check_leaves_the_callers_seed_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_language(Qwen2Config(**SIZE, vocab_size=77))
    assert torch.equal(torch.rand(2), expected)


def test_unknown_types_have_no_class() -> None:
    assert find_language_class("vit") is find_language_class(None) is None


def test_a_soft_cap_is_refused_by_cmai(parts: dict[str, Path]) -> None:
    model = join(parts, "gemma")
    model.config.text_config.attn_logit_softcapping = 50.0
    with pytest.raises(
        ValueError, match=r"attn_logit_softcapping: got 50.0 in the language model of Redux.*, allowed: N"
    ):
        inhibit(model, CMAI())
