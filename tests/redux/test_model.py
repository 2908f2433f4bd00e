"""The model is LLaVA where the modules are off, and with them the same however its inputs are cut, padded or saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from redux.architecture import LanguageSizes, ModelSettings, TowerSizes, TransformerSizes
from redux.configuration import ReduxConfig
from redux.focus_cache import FocusCache
from redux.model import PART_PREFIXES, ReduxForConditionalGeneration, build_model
from redux.plugin import inhibit
from redux.settings import CMAI, VMTC, Reduction
from redux.vmtc import compress_tokens

Tiny = Callable[..., ReduxForConditionalGeneration]
Sample = Callable[..., dict[str, Any]]


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def chosen(field: str) -> tuple[Any, ...]:
    """Values that a field of CMAI can have."""
    return get_args(get_type_hints(CMAI)[field])


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
    off, cmai, vmtc = tiny(vmtc=None, cmai=None), tiny(vmtc=None), tiny(cmai=None)
    expected = logits(off, **sample(off))
    assert not torch.allclose(logits(cmai, **sample(off)), expected, atol=1e-3)
    assert not torch.allclose(logits(vmtc, **sample(vmtc))[:, -1], expected[:, -1], atol=1e-3)


@pytest.mark.parametrize("vmtc", [VMTC(ratio=0.0), VMTC(tokens=16, stages=(0, 1, -1))], ids=str)
@pytest.mark.parametrize("cmai", [CMAI(gamma_max=0.0), CMAI(gamma_max=0.0, focus="sum", scores="scores")], ids=str)
def test_keeping_all_and_inhibiting_nothing_is_llava_bit_for_bit(
    tiny: Tiny, sample: Sample, vmtc: VMTC, cmai: CMAI
) -> None:
    ours = tiny(vmtc=vmtc, cmai=cmai)
    batch = together([sample(ours), sample(ours, text=7, seed=1)], left=True)
    for inputs in (sample(ours), batch):
        assert torch.equal(logits(ours, **inputs), logits(plain(tiny(vmtc=None, cmai=None)), **inputs))


def test_a_saved_model_comes_back_with_its_modules(tiny: Tiny, sample: Sample, tmp_path: Path) -> None:
    model = tiny(vmtc=VMTC(ratio=0.4, order="rank"), cmai=CMAI(gamma_max=0.3))
    model.save_pretrained(tmp_path)
    again = ReduxForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.method_settings("vmtc") == VMTC(ratio=0.4, order="rank")
    assert again.config.method_settings("cmai") == CMAI(gamma_max=0.3)
    assert again.config.image_seq_length == model.config.image_seq_length
    assert torch.equal(logits(again, **sample(model)), logits(model, **sample(model)))


def test_a_plain_llava_is_given_the_modules_and_they_are_taken_away_again(
    tiny: Tiny, sample: Sample, tmp_path: Path
) -> None:
    plain(tiny(vmtc=None, cmai=None)).save_pretrained(tmp_path / "plain")
    given = ReduxForConditionalGeneration.from_pretrained(tmp_path / "plain", vmtc=VMTC(tokens=4), cmai=CMAI()).eval()
    assert given.config.image_seq_length == 4
    expected = tiny(vmtc=VMTC(tokens=4), cmai=CMAI())
    assert torch.equal(logits(given, **sample(given)), logits(expected, **sample(given)))
    given.save_pretrained(tmp_path / "given")
    taken = ReduxForConditionalGeneration.from_pretrained(tmp_path / "given", vmtc=None, cmai=None).eval()
    assert taken.config.image_seq_length == 16
    assert torch.equal(logits(taken, **sample(taken)), logits(plain(tiny(vmtc=None, cmai=None)), **sample(taken)))


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


VARIANTS = [
    None,
    *(CMAI(focus=focus, scores=scores) for focus in chosen("focus") for scores in chosen("scores")),
    *(CMAI(schedule=schedule) for schedule in chosen("schedule")),
    CMAI(gamma_max=0.95, quantile="count"),
    CMAI(quantile="linear", preamble=False),
    *(CMAI(heads="each", focus=focus) for focus in chosen("focus")),
    CMAI(heads=(9, 6, 11), scores="scaled"),
]


@pytest.mark.parametrize("cmai", VARIANTS, ids=str)
def test_decoding_with_the_caches_equals_the_full_pass_token_by_token(
    tiny: Tiny, sample: Sample, cmai: CMAI | None
) -> None:
    model = tiny(cmai=cmai)
    batch = together([sample(model), sample(model, text=5, seed=1)], left=True)
    image = model.config.image_token_id
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "suppress_tokens": [image]}
    told = model.generate(**batch, **length, return_dict_in_generate=True, output_logits=True)
    start = batch["input_ids"].shape[1]
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(2, 8, dtype=torch.long)], dim=1)
    full_logits = logits(model, **{**batch, "input_ids": told.sequences}, use_cache=False)
    torch.testing.assert_close(torch.stack(told.logits, dim=1), full_logits[:, start - 1 : -1], rtol=1e-4, atol=1e-5)
    # Greedy: each token is the likeliest of the full pass that is neither an image's nor the end of the text.
    full_logits[..., [image, model.config.text_config.eos_token_id]] = -torch.inf
    assert torch.equal(told.sequences[:, start:], full_logits[:, start - 1 : -1].argmax(dim=-1))


@pytest.mark.parametrize("cmai", VARIANTS[1:], ids=str)
def test_behind_padding_on_the_right_decoding_equals_the_full_pass(tiny: Tiny, sample: Sample, cmai: CMAI) -> None:
    """The turns of a batch are fed one after the other, each padded on its right."""
    model = tiny(cmai=cmai)
    batch = together([sample(model), sample(model, text=5, seed=1)], left=False)
    more = torch.tensor([[7, 8, 9], [10, 11, 12]])
    ids = torch.cat([batch["input_ids"], more], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    start = batch["input_ids"].shape[1]
    images = {"pixel_values": batch["pixel_values"]}
    full_logits = logits(model, **images, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    alone = together([sample(model, text=5, seed=1)], left=False)
    ids_alone = torch.cat([alone["input_ids"], more[1:]], dim=1)
    unpadded = logits(model, input_ids=ids_alone, pixel_values=alone["pixel_values"])
    torch.testing.assert_close(full_logits[1, -3:], unpadded[0, -3:], rtol=1e-4, atol=1e-5)
    cache = FocusCache(config=model.config.text_config)
    logits(model, **batch, position_ids=positions[:, :start], past_key_values=cache)
    for place in range(start, ids.shape[1]):
        step = {"input_ids": ids[:, place : place + 1], "position_ids": positions[:, place : place + 1]}
        now = logits(model, **step, attention_mask=mask[:, : place + 1], past_key_values=cache)
        torch.testing.assert_close(now[:, 0], full_logits[:, place], rtol=1e-4, atol=1e-5)


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
    full_logits = logits(model, input_ids=ids, pixel_values=torch.cat([turn["pixel_values"] for turn in turns]))
    torch.testing.assert_close(torch.cat(parts, dim=1), full_logits, rtol=1e-4, atol=1e-5)


def test_a_reset_cache_is_a_new_one(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    cache = FocusCache(config=model.config.text_config)
    first, second = (sample(model, seed=seed) for seed in (0, 1))
    logits(model, **first, past_key_values=cache)
    cache.reset()
    assert torch.equal(logits(model, **second, past_key_values=cache), logits(model, **second))


def test_a_cropped_cache_goes_on_as_if_the_rest_had_not_been(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    inputs = sample(model)
    ids = inputs.pop("input_ids")
    cache = FocusCache(config=model.config.text_config)
    logits(model, **inputs, input_ids=ids, past_key_values=cache)
    cache.crop(-4)
    again = logits(model, input_ids=ids[:, -4:], past_key_values=cache)
    torch.testing.assert_close(again, logits(model, **inputs, input_ids=ids)[:, -4:], rtol=1e-4, atol=1e-5)


def test_after_a_crop_the_next_image_may_come_earlier(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    cache = FocusCache(config=model.config.text_config)
    text = {"input_ids": sample(model)["input_ids"][:, -6:]}
    late = [text, sample(model, seed=0)]
    for piece in late:
        logits(model, **piece, past_key_values=cache)
    cache.crop(-cache.get_seq_length() + 1)
    early = sample(model, seed=1)
    again = logits(model, **early, past_key_values=cache)
    ids = torch.cat([text["input_ids"][:, :1], early["input_ids"]], dim=1)
    full_logits = logits(model, input_ids=ids, pixel_values=early["pixel_values"])
    torch.testing.assert_close(again, full_logits[:, 1:], rtol=1e-4, atol=1e-5)


def test_guesses_from_the_prompt_change_no_token(tiny: Tiny, sample: Sample) -> None:
    """Some of the guessed tokens are image tokens, which the cache must give up again."""
    model = tiny()
    inputs = sample(model, text=14, seed=2)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(**inputs, **options, prompt_lookup_num_tokens=3), model.generate(**inputs, **options)
    )


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("cmai", VARIANTS, ids=str)
def test_a_padded_batch_equals_its_rows_alone(tiny: Tiny, sample: Sample, left: bool, cmai: CMAI | None) -> None:
    model = tiny(cmai=cmai)
    samples = [sample(model, text=text, seed=text) for text in (4, 12, 9)]
    batch = together(samples, left)
    padded = logits(model, **batch)
    for row, alone in enumerate(samples):
        own = padded[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(own, logits(model, **alone)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cmai", [CMAI(focus=focus) for focus in chosen("focus")], ids=str)
def test_the_scores_of_beam_search_are_those_of_the_full_pass(tiny: Tiny, sample: Sample, cmai: CMAI) -> None:
    model = tiny(cmai=cmai)
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


def test_sampling_draws_from_the_full_pass(tiny: Tiny, sample: Sample) -> None:
    """Both of the two likeliest tokens are drawn, at about their odds, and no other."""
    model = tiny()
    inputs = sample(model)
    end = model.config.text_config.eos_token_id
    likely = logits(model, **inputs)[0, -1]
    likely[end] = -torch.inf
    odds, best = likely.softmax(dim=-1).topk(2)
    torch.manual_seed(0)
    draws = model.generate(
        **inputs, do_sample=True, top_k=2, top_p=1.0, max_new_tokens=1, min_new_tokens=1, num_return_sequences=400
    )[:, -1]
    assert set(draws.tolist()) == set(best.tolist())
    expected = float(odds[0] / odds.sum())
    assert float((draws == best[0]).float().mean()) == pytest.approx(expected, abs=0.1)


def test_several_images_text_alone_and_several_turns_go_in_one_batch(tiny: Tiny, sample: Sample) -> None:
    """Each row says what it says alone: two turns with an image each, one image, none."""
    model = tiny()
    one, other = sample(model, text=5), sample(model, text=6, seed=1)
    both = {name: torch.cat([one[name], other[name]], dim=int(name == "input_ids")) for name in one}
    text = {"input_ids": torch.tensor([[1, 7, 8, 9]]), "pixel_values": torch.zeros(0, 3, 32, 32)}
    rows = [both, other, text]
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = together(rows, left=True)
    told = model.generate(**batch, **length)[:, -6:]
    del text["pixel_values"]
    for row, said in zip(rows, told, strict=True):
        assert torch.equal(model.generate(**row, **length)[0, -6:], said)


@pytest.mark.parametrize(
    "vmtc",
    [
        None,
        VMTC(),
        VMTC(ratio=0.7, cluster_share=1.0),
        VMTC(ratio=0.25, stages=1),
        VMTC(tokens=5, clusters=1, stages=(0, -1), budget_schedule="linear"),
        VMTC(kept=(9, 3, 3), clusters=(2, 2, 0), similarity="keys", seeds="farthest", proportional=True),
    ],
    ids=str,
)
def test_image_seq_length_is_the_number_of_tokens_that_come_out(tiny: Tiny, vmtc: VMTC | None) -> None:
    model = tiny(vmtc=vmtc)
    tokens, assignment = model.model.encode_images(torch.randn(3, 3, 32, 32))
    assert tokens.shape == (3, model.config.image_seq_length, 32)
    assert assignment.token_of_patch.shape == (3, 16)
    assert int(assignment.token_of_patch.max()) == model.config.image_seq_length - 1


def test_a_compressing_block_compresses_between_its_attention_and_its_mlp(tiny: Tiny) -> None:
    """Importance here from the full attention map of all heads, the block put together from the tower's own parts."""
    vmtc = VMTC(stages=1)
    model = tiny(vmtc=vmtc)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower: Any = model.model.vision_tower
    (stage,) = vmtc.plan_stages(16, 4)
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
        patches, slot, cluster = compress_tokens(hidden[:, 1:], weights[:, 0, 1:], stage, vmtc)
        hidden = torch.cat([hidden[:, :1], patches], dim=1)
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
    tokens, assignment = model.model.encode_images(images)
    torch.testing.assert_close(tokens, hidden[:, 1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(assignment.token_of_patch, slot)
    assert torch.equal(assignment.merged, cluster.gather(1, slot))


def siglip(tiny: Tiny, **methods: Any) -> ReduxForConditionalGeneration:
    """The tiny model with a tower of SigLIP's, which has no class token."""
    config = tiny(vmtc=None, cmai=None).config.to_dict()
    config["vision_config"]["model_type"] = "siglip_vision_model"
    torch.manual_seed(1)
    return ReduxForConditionalGeneration(
        ReduxConfig(**{**config, "vision_feature_select_strategy": "full", **methods})
    ).eval()


def test_a_tower_without_class_token_is_llavas_bit_for_bit(tiny: Tiny, sample: Sample) -> None:
    ours = siglip(tiny)
    assert ours.config.image_seq_length == 16
    assert torch.equal(logits(ours, **sample(ours)), logits(plain(ours), **sample(ours)))


def test_without_class_token_the_patches_that_receive_most_are_kept(tiny: Tiny) -> None:
    model = siglip(tiny, vmtc=VMTC(stages=(0,), clusters=0))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    block, hidden = model.model.vision_tower.encoder.layers[0], model.model.vision_tower.embeddings(images)
    normed = block.layer_norm1(hidden)
    query, key = (
        project(normed).unflatten(-1, (4, 8)).transpose(1, 2)
        for project in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    weights = (query @ key.transpose(2, 3) / 8**0.5).softmax(dim=-1).mean(dim=(1, 2))
    tokens, assignment = model.model.encode_images(images)
    assert tokens.shape == (3, 8, 32)
    for image in range(3):
        kept = (assignment.token_of_patch[image] >= 0).nonzero()[:, 0]
        assert set(kept.tolist()) == set(weights[image].topk(8).indices.tolist())


def test_with_the_class_token_kept_it_goes_first(tiny: Tiny, sample: Sample) -> None:
    config = tiny(vmtc=None, cmai=None).config.to_dict() | {"vision_feature_select_strategy": "full"}
    ours = ReduxForConditionalGeneration(ReduxConfig(**config)).eval()
    assert ours.config.image_seq_length == 17
    assert torch.equal(logits(ours, **sample(ours)), logits(plain(ours), **sample(ours)))
    fewer = ReduxForConditionalGeneration(ReduxConfig(**{**config, "vmtc": VMTC(stages=1)})).eval()
    assert fewer.config.image_seq_length == 9
    assert logits(fewer, **sample(fewer)).isfinite().all()


def test_other_layers_of_the_tower_are_llavas_bit_for_bit(tiny: Tiny, sample: Sample) -> None:
    for layer in (-1, -3, 2, [-3, -2]):
        config = tiny(vmtc=None, cmai=None).config.to_dict() | {"vision_feature_layer": layer}
        ours = ReduxForConditionalGeneration(ReduxConfig(**config)).eval()
        assert torch.equal(logits(ours, **sample(ours)), logits(plain(ours), **sample(ours)))


def test_a_tower_of_another_build_is_llavas_and_takes_no_compression(tiny: Tiny) -> None:
    config = tiny(vmtc=None, cmai=None).config.to_dict()
    config["vision_config"] = Dinov2Config(**SIZE, image_size=32, patch_size=8).to_dict()
    ours = ReduxForConditionalGeneration(ReduxConfig(**config)).eval()
    images = torch.randn(2, 3, 32, 32)
    theirs = plain(ours).model
    with torch.no_grad():
        one, other = (
            model.get_image_features(images, return_dict=True).pooler_output for model in (ours.model, theirs)
        )
    assert torch.equal(torch.stack(one), torch.stack(other))
    with pytest.raises(ValueError, match="vision_config: got a tower dinov2, allowed with vmtc"):
        ReduxForConditionalGeneration(ReduxConfig(**{**config, "vmtc": VMTC(stages=1)}))


@pytest.mark.parametrize("layer", [-7, 6, [-2, 9]], ids=str)
def test_a_layer_that_is_not_there_is_named(tiny: Tiny, layer: Any) -> None:
    config = tiny(vmtc=None, cmai=None).config.to_dict()
    with pytest.raises(ValueError, match=r"vision_feature_layer: got (-7|6|9), allowed: -6 to 5"):
        ReduxConfig(**{**config, "vision_feature_layer": layer})
    with pytest.raises(ValueError, match=r"vision_feature_layer: got \[-2, -1\], allowed with vmtc or reduction: one"):
        ReduxConfig(**{**config, "vision_feature_layer": [-2, -1], "vmtc": VMTC()})


@pytest.mark.parametrize("wrong", ["default", True, CMAI()], ids=str)
def test_what_is_no_setting_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"vmtc: got .*, allowed: redux\.VMTC, a dictionary of its fields or None"):
        ReduxConfig(vmtc=wrong)
    with pytest.raises(ValueError, match="reduction: missing method, allowed: method, "):
        ReduxConfig(reduction={"tokens": 4})


def test_other_fields_of_the_configuration_may_be_given_along(tiny: Tiny, sample: Sample, tmp_path: Path) -> None:
    theirs = plain(tiny(vmtc=None, cmai=None))
    theirs.save_pretrained(tmp_path)
    for config in (None, LlavaConfig.from_pretrained(tmp_path), str(tmp_path)):
        given = {"vmtc": VMTC(tokens=6), "vision_feature_layer": -3, "config": config, "dtype": torch.bfloat16}
        model = ReduxForConditionalGeneration.from_pretrained(tmp_path, **given)
        assert (model.config.image_seq_length, model.config.num_blocks_used, model.dtype) == (6, 3, torch.bfloat16)
        again = ReduxForConditionalGeneration.from_pretrained(tmp_path, config=config)
        assert again.config.vmtc is None
        assert torch.equal(logits(again.eval(), **sample(again)), logits(theirs, **sample(again)))


def test_inhibition_turned_on_or_off_later_is_saved(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(cmai=None)
    for cmai in (CMAI(gamma_max=0.5), None):
        inhibit(model, cmai)
        model.save_pretrained(tmp_path)
        assert ReduxForConditionalGeneration.from_pretrained(tmp_path).config.method_settings("cmai") == cmai


def test_another_layer_for_one_call_is_read_or_refused(tiny: Tiny, sample: Sample) -> None:
    ours = tiny(vmtc=None, cmai=None)
    expected = logits(plain(ours), **sample(ours), vision_feature_layer=-3)
    assert torch.equal(logits(ours, **sample(ours), vision_feature_layer=-3), expected)
    with pytest.raises(ValueError, match="vision_feature_layer: got -3, allowed with vmtc or reduction: -2"):
        logits(tiny(), **sample(tiny()), vision_feature_layer=-3)


def test_a_baseline_that_needs_a_class_token_says_so(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"reduction\.method: got prumerge, allowed: any other"):
        siglip(tiny, reduction=Reduction(method="prumerge", tokens=4))
    with pytest.raises(ValueError, match="vision_feature_select_strategy: got default, allowed: full"):
        siglip(tiny, vmtc=VMTC(), vision_feature_select_strategy="default")


def test_proportional_attention_counts_a_merged_token_as_the_patches_it_holds(tiny: Tiny) -> None:
    """Equal patches are merged without a loss, if a token counts as often as it holds patches."""
    config = tiny(vmtc=None, cmai=None).config.to_dict() | {"vision_feature_select_strategy": "full"}
    features = {}
    for name, vmtc in {
        "whole": None,
        "fair": VMTC(stages=(0, 1), tokens=4, proportional=True),
        "once": VMTC(stages=(0, 1), tokens=4),
    }.items():
        torch.manual_seed(0)
        model = ReduxForConditionalGeneration(ReduxConfig(**{**config, "vmtc": vmtc})).eval()
        with torch.no_grad():
            for weight in model.model.vision_tower.parameters():
                weight.mul_(2)
            model.model.vision_tower.embeddings.position_embedding.weight.zero_()
            features[name] = model.model.encode_images(torch.ones(1, 3, 32, 32))[0][0, 0]
    fair, once = (float((features[name] - features["whole"]).abs().max()) for name in ("fair", "once"))
    assert fair < 1e-4 < 1e-2 < once


def test_text_alone_gives_the_tower_a_gradient_of_zeros(tiny: Tiny) -> None:
    """On every parameter that images would reach, so that ranks with and without images reduce the same buckets."""
    model = tiny().train()
    ids = torch.tensor([[1, 7, 8, 9], [1, 10, 11, 12]])
    expected = tiny(vmtc=None, cmai=None).train()(input_ids=ids, labels=ids).loss
    loss = model(input_ids=ids, labels=ids, pixel_values=torch.zeros(0, 3, 32, 32)).loss
    loss.backward()
    assert torch.equal(loss, expected)
    core: Any = model.model
    for weight in [*core.vision_tower.encoder.layers[:-1].parameters(), *core.multi_modal_projector.parameters()]:
        assert weight.grad is not None
        assert not weight.grad.any()


@pytest.mark.parametrize("trained", [("projector",), ("projector", "language"), tuple(PART_PREFIXES)], ids=str)
def test_gradients_reach_all_that_is_trained_and_nothing_that_is_frozen(
    tiny: Tiny, sample: Sample, trained: tuple[str, ...]
) -> None:
    """Under LLaVA's first stage, its second, and the quickstart's; the tower's last block is used by none."""
    model = tiny().train()
    unused = {id(weight) for weight in model.model.vision_tower.encoder.layers[-1].parameters()}
    unused |= {id(weight) for weight in model.model.vision_tower.post_layernorm.parameters()}
    for part, weights in model.parameters_by_part().items():
        for weight in weights:
            weight.requires_grad_(part in trained)
    inputs = sample(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, weight in model.named_parameters():
        reached = weight.grad is not None and bool(weight.grad.ne(0).any())
        assert reached == (weight.requires_grad and id(weight) not in unused), name


def test_images_are_encoded_alone_as_in_a_batch(tiny: Tiny) -> None:
    model = tiny()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens, assignment = model.model.encode_images(images)
    for number in range(3):
        alone, own = model.model.encode_images(images[number : number + 1])
        torch.testing.assert_close(alone[0], tokens[number], rtol=1e-5, atol=1e-5)
        assert torch.equal(own.token_of_patch[0], assignment.token_of_patch[number])


@pytest.mark.parametrize("weights", ["normalized", "raw"])
def test_a_zero_image_gives_finite_loss_and_gradients(tiny: Tiny, sample: Sample, weights: Any) -> None:
    model = tiny(vmtc=VMTC(weights=weights)).train()
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
        model = tiny(cmai=CMAI(gamma_max=0.9)).train()
        if recompute:
            model.gradient_checkpointing_enable()
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
    parts = model.parameters_by_part()
    assert parts.keys() == PART_PREFIXES.keys()
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
    model = tiny(vmtc=None)
    with pytest.raises(ValueError, match="input_ids: got None"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    filled = plain(model)(**sample(model)).past_key_values
    with pytest.raises(
        ValueError, match=r"past_key_values: got DynamicCache of 29 tokens, allowed: redux\.focus_cache\.Focus"
    ):
        model(**sample(model), past_key_values=filled)


SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (TransformerSizes, {"num_attention_heads": 5}),
        (LanguageSizes, {"num_attention_heads": 3}),
        (TowerSizes, {"image_size": 32, "patch_size": 7}),
        (TowerSizes, {"image_size": 32, "patch_size": 8, "num_hidden_layers": 1}),
    ],
    ids=str,
)
def test_a_wrong_size_is_named(kind: type, wrong: dict[str, int]) -> None:
    name, value = list(wrong.items())[-1]
    with pytest.raises(ValueError, match=f"{name}: got {value}, allowed: "):
        kind(**{**SIZE, **wrong})


def test_settings_that_do_not_fit_the_tower_are_named() -> None:
    tower = TowerSizes(**SIZE, image_size=32, patch_size=8)
    with pytest.raises(ValueError, match=r"vmtc\.stages: got 3, allowed: 1 to 2"):
        ModelSettings(tower=tower, language=LanguageSizes(**SIZE), vmtc=VMTC())
    with pytest.raises(ValueError, match=r"vmtc\.ratio: got 0\.99, allowed: one that leaves at least 1 of 16"):
        ModelSettings(tower=tower, language=LanguageSizes(**SIZE), vmtc=VMTC(ratio=0.99, stages=2))
    with pytest.raises(ValueError, match=r"ratio: got 2\.0"):
        ReduxConfig(vmtc={"ratio": 2.0})
    with pytest.raises(ValueError, match="cmai: got gamma, allowed: active, "):
        ReduxConfig(cmai={"gamma": 0.6})
    with pytest.raises(ValueError, match="reduction: got one besides vmtc"):
        ReduxConfig(vmtc={}, reduction={"method": "random", "ratio": 0.5})
    with pytest.raises(ValueError, match="reduction: got one besides vmtc"):
        ModelSettings(
            tower=tower,
            language=LanguageSizes(**SIZE),
            vmtc=VMTC(stages=2),
            reduction=Reduction(method="random", ratio=0.5),
        )


@pytest.mark.parametrize("width", [32, 64])
def test_the_language_model_starts_with_small_init(
    tokenizer: PreTrainedTokenizerFast, tower: TowerSizes, width: int
) -> None:
    language = LanguageSizes(hidden_size=width, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256)
    decoder = build_model(ModelSettings(tower=tower, language=language), tokenizer).model.language_model
    for weight in (decoder.embed_tokens.weight[3:], decoder.layers[0].mlp.up_proj.weight):  # The padding's row is zero
        assert float(weight.detach().std()) == pytest.approx((2 / (5 * width)) ** 0.5, rel=0.1)
