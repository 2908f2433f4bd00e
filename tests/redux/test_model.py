"""The model is LLaVA where the modules are off, and with them the same however its inputs are cut, padded or saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from redux.cmai import CMAI, FocusCache
from redux.model import PARTS, Language, Model, ReduxConfig, ReduxForConditionalGeneration, Tower, Transformer, build
from redux.vmtc import VMTC, compress

Tiny = Callable[..., ReduxForConditionalGeneration]
Sample = Callable[..., dict[str, Any]]


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def together(samples: list[dict[str, Any]], left: bool) -> dict[str, Any]:
    """A batch, padded with token 2."""
    rows = [row["input_ids"][0] for row in samples]
    ids = torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=2, padding_side="left" if left else "right"
    )
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left" if left else "right"
    )
    images = torch.cat([row["pixel_values"] for row in samples])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images}


def plain(model: ReduxForConditionalGeneration) -> LlavaForConditionalGeneration:
    """transformers' own model with the same weights."""
    result = LlavaForConditionalGeneration(model.config).eval()
    result.load_state_dict(model.state_dict())
    return result


def test_with_both_modules_off_it_is_llava_bit_for_bit(tiny: Tiny, sample: Sample) -> None:
    ours = tiny(vmtc=None, cmai=None)
    theirs = plain(ours)
    batch = together([sample(ours), sample(ours, text=7, seed=1)], left=True)
    for inputs in (sample(ours), batch):
        assert torch.equal(logits(ours, **inputs), logits(theirs, **inputs))
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**batch, **length), theirs.generate(**batch, **length))


def test_each_module_changes_what_llava_says(tiny: Tiny, sample: Sample) -> None:
    off, cmai, vmtc = tiny(vmtc=None, cmai=None), tiny(vmtc=None), tiny(vmtc=VMTC(ratio=0.0), cmai=None)
    inputs = sample(off)
    expected = logits(off, **inputs)
    assert not torch.allclose(logits(cmai, **inputs), expected, atol=1e-3)
    # nothing removed: compressing blocks compute what the tower's own do
    torch.testing.assert_close(logits(vmtc, **inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_saved_model_comes_back_with_its_modules(tiny: Tiny, sample: Sample, tmp_path: Path) -> None:
    model = tiny(vmtc=VMTC(ratio=0.4, order="rank"), cmai=CMAI(maximum=0.3))
    model.save_pretrained(tmp_path)
    again = ReduxForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.vmtc_settings == VMTC(ratio=0.4, order="rank")
    assert again.config.cmai == {"maximum": 0.3}
    assert again.config.image_seq_length == model.config.image_seq_length
    assert torch.equal(logits(again, **sample(model)), logits(model, **sample(model)))


def test_a_model_saved_with_its_modules_off_opens_in_plain_transformers(
    tiny: Tiny, sample: Sample, tmp_path: Path
) -> None:
    model = tiny(vmtc=None, cmai=None)
    model.save_pretrained(tmp_path)
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(logits(theirs.eval(), **sample(model)), logits(model, **sample(model)))


@pytest.mark.parametrize("vmtc", [None, VMTC()], ids=["whole", "compressed"])
def test_the_last_block_of_the_tower_is_never_computed(tiny: Tiny, sample: Sample, vmtc: VMTC | None) -> None:
    model = tiny(vmtc=vmtc)
    inputs = sample(model)
    expected = logits(model, **inputs)
    tower: Any = model.model.vision_tower
    for unused in (tower.encoder.layers[-1], tower.post_layernorm):
        for weight in unused.parameters():
            torch.nn.init.constant_(weight, torch.nan)
    assert expected.isfinite().all()
    assert torch.equal(logits(model, **inputs), expected)


@pytest.mark.parametrize("cmai", [None, CMAI(), CMAI(maximum=0.95)], ids=["off", "default", "strong"])
def test_decoding_with_the_caches_equals_the_full_pass_token_by_token(
    tiny: Tiny, sample: Sample, cmai: CMAI | None
) -> None:
    model = tiny(cmai=cmai)
    batch = together([sample(model), sample(model, text=5, seed=1)], left=True)
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    told = model.generate(**batch, **length, return_dict_in_generate=True, output_logits=True)
    start = batch["input_ids"].shape[1]
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(2, 8, dtype=torch.long)], dim=1)
    whole = logits(model, **{**batch, "input_ids": told.sequences}, use_cache=False)
    torch.testing.assert_close(torch.stack(told.logits, dim=1), whole[:, start - 1 : -1], rtol=1e-4, atol=1e-5)
    # greedy: each token is the likeliest of the full pass that is not the end of the text
    whole[..., model.config.text_config.eos_token_id] = -torch.inf
    assert torch.equal(told.sequences[:, start:], whole[:, start - 1 : -1].argmax(dim=-1))


def test_decoding_without_a_cache_gives_the_same_tokens(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with_cache, without = (model.generate(**sample(model), **length, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_a_conversation_goes_on_from_its_cache_with_another_image(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    turns = [sample(model, seed=0), sample(model, text=5, seed=1)]
    text = {"input_ids": turns[0]["input_ids"][:, -6:]}
    pieces = [text, turns[0], text, turns[1]]
    cache = FocusCache(config=model.config.text_config)
    parts = [logits(model, **piece, past_key_values=cache) for piece in pieces]
    ids = torch.cat([piece["input_ids"] for piece in pieces], dim=1)
    whole = logits(model, input_ids=ids, pixel_values=torch.cat([turn["pixel_values"] for turn in turns]))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_a_cropped_cache_goes_on_as_if_the_rest_had_not_been(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    inputs = sample(model)
    ids = inputs.pop("input_ids")
    cache = FocusCache(config=model.config.text_config)
    logits(model, **inputs, input_ids=ids, past_key_values=cache)
    cache.crop(-4)
    again = logits(model, input_ids=ids[:, -4:], past_key_values=cache)
    torch.testing.assert_close(again, logits(model, **inputs, input_ids=ids)[:, -4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_padded_batch_equals_its_rows_alone(tiny: Tiny, sample: Sample, left: bool) -> None:
    model = tiny()
    samples = [sample(model, text=text, seed=text) for text in (4, 12, 9)]
    batch = together(samples, left)
    padded = logits(model, **batch)
    for row, alone in enumerate(samples):
        own = padded[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(own, logits(model, **alone)[0], rtol=1e-5, atol=1e-5)


def test_the_scores_of_beam_search_are_those_of_the_full_pass(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    inputs = sample(model)
    start, count = inputs["input_ids"].shape[1], 8
    found = model.generate(
        **inputs,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert found.beam_indices[:, :count].diff(dim=1).any(), "no beam ever took another's place"
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        ids = sequence.unsqueeze(0)
        likely = logits(model, input_ids=ids, pixel_values=inputs["pixel_values"]).log_softmax(dim=-1)
        steps = likely[0, start - 1 : -1].gather(1, ids[0, start:].unsqueeze(1))
        assert float(score) == pytest.approx(float(steps.sum()), rel=1e-4)


@pytest.mark.parametrize(
    "vmtc", [None, VMTC(), VMTC(ratio=0.7, cluster_share=1.0), VMTC(ratio=0.25, stages=1)], ids=str
)
def test_image_seq_length_is_the_number_of_tokens_that_come_out(tiny: Tiny, vmtc: VMTC | None) -> None:
    model = tiny(vmtc=vmtc)
    tokens, fate = model.model.encode_images(torch.randn(3, 3, 32, 32))
    assert tokens.shape == (3, model.config.image_seq_length, 32)
    assert fate.slot.shape == (3, 16)
    assert int(fate.slot.max()) == model.config.image_seq_length - 1


def test_a_compressing_block_compresses_between_its_attention_and_its_mlp(tiny: Tiny) -> None:
    """Importance here from the full attention map of all heads, the block put together from the tower's own parts."""
    vmtc = VMTC(stages=1)
    model = tiny(vmtc=vmtc)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower: Any = model.model.vision_tower
    (stage,) = vmtc.schedule(16, 4)
    hidden = tower.pre_layrnorm(tower.embeddings(images))
    for number, block in enumerate(tower.encoder.layers[:4]):
        if number != stage.block:
            hidden = block(hidden, attention_mask=None)
            continue
        normed = block.layer_norm1(hidden)
        hidden = hidden + block.self_attn(normed)[0]
        query, key = (
            project(normed).unflatten(-1, (4, 8)).transpose(1, 2)
            for project in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        weights = (query @ key.transpose(2, 3) / 8**0.5).softmax(dim=-1).mean(dim=1)
        patches, slot, cluster = compress(hidden[:, 1:], weights[:, 0, 1:], stage, vmtc)
        hidden = torch.cat([hidden[:, :1], patches], dim=1)
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
    tokens, fate = model.model.encode_images(images)
    torch.testing.assert_close(tokens, hidden[:, 1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(fate.slot, slot)
    assert torch.equal(fate.merged, cluster.gather(1, slot))


def test_images_are_encoded_alone_as_in_a_batch(tiny: Tiny) -> None:
    model = tiny()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens, fate = model.model.encode_images(images)
    for number in range(3):
        alone, own = model.model.encode_images(images[number : number + 1])
        torch.testing.assert_close(alone[0], tokens[number], rtol=1e-5, atol=1e-5)
        assert torch.equal(own.slot[0], fate.slot[number])


@pytest.mark.parametrize("merge", ["normalized", "raw"])
def test_a_zero_image_gives_finite_loss_and_gradients(tiny: Tiny, sample: Sample, merge: Any) -> None:
    model = tiny(vmtc=VMTC(merge=merge)).train()
    inputs = sample(model)
    loss = model(**{**inputs, "pixel_values": torch.zeros(1, 3, 32, 32)}, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert loss.isfinite()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_recomputed_activations_give_the_same_gradients(tiny: Tiny, sample: Sample) -> None:
    """And so the same masks and the same clusters."""

    def gradients(recompute: bool) -> dict[str, Tensor]:
        model = tiny(cmai=CMAI(maximum=0.9)).train()
        if recompute:
            model.activation_checkpointing_enable()
        inputs = sample(model)
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        assert isinstance(output.past_key_values, FocusCache) != recompute, "written when recomputed, read by nobody"
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    once, twice = gradients(False), gradients(True)
    assert once.keys() == twice.keys()
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], gradient)


def test_every_parameter_belongs_to_one_part(tiny: Tiny) -> None:
    model = tiny()
    parts = model.parts()
    assert parts.keys() == PARTS.keys()
    assert all(parts.values())
    numbers = [id(weight) for part in parts.values() for weight in part]
    assert sorted(numbers) == sorted(id(weight) for weight in model.parameters())
    core: Any = model.model
    assert {id(weight) for weight in parts["tower"]} == {id(weight) for weight in core.vision_tower.parameters()}
    projector = core.multi_modal_projector.parameters()
    assert {id(weight) for weight in parts["projector"]} == {id(weight) for weight in projector}


def test_the_vocabulary_is_the_tokenizers(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny().config
    assert config.text_config.vocab_size == len(tokenizer)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert config.text_config.eos_token_id == tokenizer.eos_token_id


def test_inhibition_needs_token_ids_and_its_own_cache(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="input_ids: got None"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match=r"past_key_values: got DynamicCache, allowed: redux\.cmai\.FocusCache"):
        model(**sample(model), past_key_values=DynamicCache())


SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Transformer, {"num_attention_heads": 5}),
        (Language, {"num_attention_heads": 3}),
        (Tower, {"image_size": 32, "patch_size": 7}),
        (Tower, {"image_size": 32, "patch_size": 8, "num_hidden_layers": 1}),
    ],
    ids=str,
)
def test_a_wrong_size_is_named(kind: type, wrong: dict[str, int]) -> None:
    name, value = list(wrong.items())[-1]
    with pytest.raises(ValueError, match=f"{name}: got {value}, allowed: "):
        kind(**{**SIZE, **wrong})


def test_settings_that_do_not_fit_the_tower_are_named() -> None:
    tower = Tower(**SIZE, image_size=32, patch_size=8)
    with pytest.raises(ValueError, match=r"vmtc\.stages: got 3, allowed: 1 to 2"):
        Model(tower=tower, language=Language(**SIZE), vmtc=VMTC())
    with pytest.raises(ValueError, match=r"vmtc\.ratio: got 0\.99, allowed: one that leaves at least 1 of 16"):
        Model(tower=tower, language=Language(**SIZE), vmtc=VMTC(ratio=0.99, stages=2))
    with pytest.raises(ValueError, match=r"ratio: got 2\.0"):
        ReduxConfig(vmtc={"ratio": 2.0})


@pytest.mark.parametrize("width", [32, 64])
def test_the_language_model_starts_with_small_init(
    tokenizer: PreTrainedTokenizerFast, tower: Tower, width: int
) -> None:
    language = Language(hidden_size=width, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256)
    decoder = build(Model(tower=tower, language=language), tokenizer).model.language_model
    for weight in (decoder.embed_tokens.weight[3:], decoder.layers[0].mlp.up_proj.weight):  # the padding's row is zero
        assert float(weight.detach().std()) == pytest.approx((2 / (5 * width)) ** 0.5, rel=0.1)
