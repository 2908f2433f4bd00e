"""inhibit does in models of transformers what equations 9 to 11 say, however they are decoded, and leaves no trace."""

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    T5Config,
)

from redux.focus_cache import FocusCache
from redux.plugin import inhibit
from redux.settings import CMAI
from tests.redux.families import (
    BOS,
    IMAGE,
    SIZE,
    SPECIAL,
    STRONG,
    VIDEO,
    WORDS,
    build,
    every_family,
    llama,
    llava,
    logits,
    q_former,
    sample,
    state,
    vision,
    whole,
)


@every_family
def test_a_maximum_of_zero_is_no_inhibition(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
    before = logits(model, **inputs)
    inhibit(model, CMAI(gamma_max=0.0))
    is_token = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(model, **inputs)[is_token], before[is_token], rtol=1e-5, atol=1e-5)


@every_family
def test_off_again_the_model_is_what_it_was(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
    then, before = logits(model, **inputs), state(model)  # transformers itself leaves things on a model that ran
    inhibit(model, STRONG)
    inhibit(model, CMAI(gamma_max=0.3))  # Other settings take the place of the first
    on = logits(model, **inputs)
    assert not torch.allclose(on, then, atol=1e-3)
    inhibit(model, None)
    assert state(model) == before
    assert torch.equal(logits(model, **inputs), then)
    inhibit(model, CMAI(gamma_max=0.3))
    assert torch.equal(logits(model, **inputs), on)


def slow_keep(weights: list[list[float]], image: list[bool], visible: Tensor, ratio: float) -> Tensor:
    """Compute the pairs of one sequence that stay; equations 9 to 11 as loops, then the quantile of each row."""
    keep, length = visible.clone(), len(image)
    for j in range(length):
        columns = [k for k in range(length) if image[k] and visible[j, k]]
        if image[j] or not columns:
            continue
        text = [h for h in range(j) if not image[h]]  # Eq. 9: A_t2n is zero unless j > h
        focus = {k: sum(weights[j][h] * weights[h][k] for h in text) + weights[j][k] for k in columns}  # Eq. 10, 11
        for k in sorted(columns, key=focus.__getitem__)[: int(ratio * (len(columns) - 1))]:
            keep[j, k] = False
    return keep


def slowly(model: Any, cmai: CMAI, images: tuple[int, ...], **inputs: Any) -> Tensor:
    """Logits of eager attention whose layers, one after the other, get the mask of `slow_keep`; plain transformers."""
    decoder = model.get_decoder().get_decoder()  # BLIP-2's is a whole OPTForCausalLM
    decoder.set_attn_implementation("eager")
    image, is_token = torch.isin(inputs["input_ids"], torch.tensor(images)), inputs["attention_mask"].bool()
    visible = is_token.unsqueeze(1) & torch.ones(is_token.shape[1], is_token.shape[1], dtype=torch.bool).tril()
    for number, ratio in enumerate(cmai.compute_gammas(len(decoder.layers))):
        weights: list[Tensor] = []
        attention = decoder.layers[number].self_attn
        seeing = attention.register_forward_hook(lambda module, args, output, to=weights: to.append(output[1]))
        logits(model, **inputs, use_cache=False)
        seeing.remove()
        kept = torch.stack(
            [
                slow_keep(row.tolist(), line.tolist(), sight, ratio)
                for row, line, sight in zip(weights[0].mean(dim=1).double(), image, visible, strict=True)
            ]
        )
        assert kept.sum() < visible.sum()
        bias = torch.zeros(kept.shape).masked_fill(~kept, torch.finfo(torch.float32).min).unsqueeze(1)
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias}), with_kwargs=True
        )
    return logits(model, **inputs, use_cache=False)[is_token]


@every_family
def test_every_layer_inhibits_the_pairs_of_the_slow_loop(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
    inhibit(model, STRONG)
    fast = logits(model, **inputs)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(fast, slowly(new_model(family), STRONG, (IMAGE,), **inputs), rtol=1e-4, atol=1e-4)


def test_tokens_of_a_video_are_image_tokens(new_model: Callable[[str], Any]) -> None:
    inputs = sample("qwen", (2, 1))
    inputs["pixel_values_videos"] = torch.randn(2 * 16, 96, generator=torch.Generator().manual_seed(2))
    inputs["video_grid_thw"] = torch.tensor([(2, 4, 4)])
    ids = torch.cat([inputs["input_ids"], torch.randint(5, WORDS, (2, 12))], dim=1)
    ids[1, -11:-3] = VIDEO
    inputs, model = whole("qwen", inputs, ids), new_model("qwen")
    inhibit(model, STRONG)
    fast = logits(model, **inputs)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(fast, slowly(new_model("qwen"), STRONG, (IMAGE, VIDEO), **inputs), rtol=1e-4, atol=1e-4)


def test_models_that_cmai_cannot_work_in_are_refused_untouched() -> None:
    t5 = T5Config(vocab_size=WORDS, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=1).to_dict()
    sliding = MistralConfig(**SIZE, vocab_size=WORDS, num_hidden_layers=1, num_key_value_heads=2, sliding_window=4)
    refused = [
        (LlamaForCausalLM(LlamaConfig.from_dict(llama())), "image_token_id: got None .* LlamaForCausalLM, allowed: "),
        (
            InstructBlipForConditionalGeneration(q_former(InstructBlipConfig, t5)),
            "is_encoder_decoder: got True .*, allowed: False",
        ),
        (
            LlavaForConditionalGeneration(llava(sliding.to_dict())),
            "cache: got DynamicSlidingWindowLayer, allowed: DynamicLayer",
        ),
    ]
    for model, message in refused:
        before = state(model)
        with pytest.raises(ValueError, match=message):
            inhibit(model, STRONG)
        assert state(model) == before
        inhibit(model, None)


@every_family
def test_embeddings_of_unknown_origin_are_refused(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
    inhibit(model, STRONG)
    model.generate(**inputs, max_new_tokens=2)
    for length in (1, inputs["input_ids"].shape[1]):
        with pytest.raises(ValueError, match="input_ids: got None, allowed: token ids"), torch.no_grad():
            model.get_decoder()(inputs_embeds=torch.zeros(3, length, 32))


@every_family
@pytest.mark.parametrize("kind", [DynamicCache, FocusCache])
def test_a_cache_filled_without_cmai_is_refused(new_model: Callable[[str], Any], family: str, kind: type) -> None:
    model, inputs, filled = new_model(family), sample(family), kind()
    logits(model, **inputs, past_key_values=filled)
    inhibit(model, STRONG)
    tokens = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"past_key_values: got {kind.__name__} of {tokens} tokens, allowed: redux"):
        logits(model, **inputs, past_key_values=filled)


def test_attention_changed_while_on_is_refused_and_not_silently_off(new_model: Callable[[str], Any]) -> None:
    model = new_model("llava")
    inhibit(model, STRONG)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: got sdpa, allowed: cmai while CMAI is on"):
        model(**sample("llava"))


def test_a_decoder_is_inhibited_once(new_model: Callable[[str], Any]) -> None:
    model = new_model("llava")
    inhibit(model, STRONG)
    with pytest.raises(ValueError, match="model: got LlavaModel, allowed: the one in which CMAI was turned on before"):
        inhibit(model.model, STRONG)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -torch.inf, -1e4], ids=str)
@pytest.mark.parametrize("cmai", [STRONG, CMAI(gamma_max=0.8, scores="scores", focus="sum")], ids=["weights", "scores"])
def test_a_mask_of_four_dimensions_is_read(new_model: Callable[[str], Any], low: float, cmai: CMAI) -> None:
    model, inputs = new_model("llava"), sample("llava")
    inhibit(model, cmai)
    is_token = inputs.pop("attention_mask").bool()
    expected = logits(model, **inputs, attention_mask=is_token.long())[is_token]
    visible = is_token[:, None, None] & torch.ones(is_token.shape[1], is_token.shape[1], dtype=torch.bool).tril()
    for mask in (visible, {"full_attention": visible}, torch.zeros(visible.shape).masked_fill(~visible, low)):
        assert torch.equal(logits(model, **inputs, attention_mask=mask)[is_token], expected)
    with pytest.raises(ValueError, match="attention_mask: got sliding_attention, allowed: full_attention"):
        logits(model, **inputs, attention_mask={"sliding_attention": visible})
    for wrong in (visible.expand(-1, 4, -1, -1), visible.long(), visible.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"attention_mask: got torch\..*, allowed: booleans or floats of shape"):
            logits(model, **inputs, attention_mask=wrong)


def test_what_a_mask_adds_to_scores_counts_in_the_weights(new_model: Callable[[str], Any]) -> None:
    """A bias that hides nothing; the slow loop gets it with its own mask."""
    model, inputs = new_model("llava"), sample("llava", (1,))
    tokens = inputs["input_ids"].shape[1]
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    bias = torch.randn(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(3)).masked_fill(
        ~visible, -torch.inf
    )
    cmai = CMAI(gamma_max=0.8, gamma_min=0.8)
    inputs["attention_mask"] = bias
    inhibit(model, cmai)
    fast = logits(model, **inputs, use_cache=False)
    plain = new_model("llava")
    decoder = plain.get_decoder()
    decoder.set_attn_implementation("eager")
    image = (inputs["input_ids"] == IMAGE)[0].tolist()
    for number, ratio in enumerate(cmai.compute_gammas(2)):
        weights: list[Tensor] = []
        attention = decoder.layers[number].self_attn
        seeing = attention.register_forward_hook(lambda module, args, output, to=weights: to.append(output[1]))
        logits(plain, **inputs, use_cache=False)
        seeing.remove()
        kept = slow_keep(weights[0][0].mean(dim=0).double().tolist(), image, visible, ratio)
        assert kept.sum() < visible.sum()
        mask = bias.masked_fill(~kept, torch.finfo(torch.float32).min)
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
    torch.testing.assert_close(fast, logits(plain, **inputs, use_cache=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cmai", [STRONG, CMAI(gamma_max=0.8, preamble=False)], ids=["whole", "without preamble"])
def test_packed_conversations_are_what_each_is_alone(new_model: Callable[[str], Any], cmai: CMAI) -> None:
    model = new_model("llava")
    inhibit(model, cmai)
    alone = [sample("llava", (1,)), sample("llava", (2,))]
    ids, images = (
        torch.cat([part[name] for part in alone], dim=axis) for name, axis in (("input_ids", 1), ("pixel_values", 0))
    )
    sizes = [part["input_ids"].shape[1] for part in alone]
    visible = torch.block_diag(*[torch.ones(size, size).tril() for size in sizes]).bool()[None, None]
    places = torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0)
    packed = logits(
        model, input_ids=ids, pixel_values=images, attention_mask=visible, position_ids=places, use_cache=False
    )
    for part, found in zip(alone, packed.split(sizes, dim=1), strict=True):
        torch.testing.assert_close(found, logits(model, **part), rtol=1e-4, atol=1e-5)


def test_image_tokens_beyond_the_vocabulary_count_though_they_are_never_embedded() -> None:
    """PaliGemma's and Gemma 3's way: the ids are replaced before the embedding."""
    text = {**SIZE, "vocab_size": WORDS, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = PaliGemmaConfig(
        text_config={**text, **SPECIAL, "model_type": "gemma"},
        vision_config={**vision(), "model_type": "siglip_vision_model"},
        image_token_index=WORDS,
        projection_dim=32,
    )
    model = build(PaliGemmaForConditionalGeneration, config)
    ids = torch.tensor([[WORDS] * 4 + [BOS, 5, 6, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids != WORDS).long()}
    off = model(**inputs).logits
    inhibit(model, STRONG)
    assert not torch.allclose(model(**inputs).logits, off, atol=1e-3)


@pytest.mark.parametrize("wrong", [{"gamma_max": 0.3}, "default", {}], ids=str)
def test_what_is_not_cmai_is_named(
    wrong: Any, new_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"cmai: got .*, allowed: redux\.CMAI, or None to turn it off"):
        inhibit(new_model("llava"), wrong)
