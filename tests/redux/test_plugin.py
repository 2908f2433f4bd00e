"""inhibit does in models of transformers what equations 9 to 11 say, however they are decoded, and leaves no trace."""

import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    DynamicCache,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    T5Config,
)

from redux.focus_cache import FocusCache
from redux.plugin import inhibit
from redux.settings import CMAI

PAD, BOS, EOS, IMAGE, VIDEO, WORDS = 0, 1, 2, 3, 4, 64
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STRONG = CMAI(gamma_max=0.8, gamma_min=0.5)


def llama(**other: Any) -> dict[str, Any]:
    text = LlamaConfig(**SIZE, vocab_size=WORDS, num_hidden_layers=2, num_key_value_heads=2, **SPECIAL, **other)
    return text.to_dict()


def vision(**other: Any) -> dict[str, Any]:
    return {**SIZE, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8, **other}


def llava(text: dict[str, Any] | None = None) -> LlavaConfig:
    tower = CLIPVisionConfig(**vision(), projection_dim=32).to_dict()
    return LlavaConfig(vision_config=tower, text_config=text or llama(), image_token_index=IMAGE)


def qwen() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**SIZE, "vocab_size": WORDS, "num_hidden_layers": 2, "num_key_value_heads": 2, "rope_parameters": rope}
    tower = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLConfig(
        text_config={**text, **SPECIAL}, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO
    )


def idefics(kind: type) -> Any:
    return kind(text_config=llama(), vision_config=vision(patch_size=4), scale_factor=2, image_token_id=IMAGE)


def q_former(kind: type, text: dict[str, Any]) -> Any:
    return kind(
        text_config=text,
        vision_config=vision(num_hidden_layers=1),
        qformer_config={**SIZE, **STEADY, "num_hidden_layers": 2, "vocab_size": WORDS},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


def opt() -> dict[str, Any]:
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "dropout": 0.0,
        "num_hidden_layers": 2,
        "word_embed_proj_dim": 32,
    }
    return OPTConfig(**sizes, vocab_size=WORDS, max_position_embeddings=128, **SPECIAL).to_dict()


FAMILIES: dict[str, tuple[type, Callable[[], Any]]] = {
    "llava": (LlavaForConditionalGeneration, llava),
    "qwen": (Qwen2_5_VLForConditionalGeneration, qwen),
    "idefics3": (Idefics3ForConditionalGeneration, lambda: idefics(Idefics3Config)),
    "smolvlm": (SmolVLMForConditionalGeneration, lambda: idefics(SmolVLMConfig)),
    "instructblip": (InstructBlipForConditionalGeneration, lambda: q_former(InstructBlipConfig, llama())),
    "blip2": (Blip2ForConditionalGeneration, lambda: q_former(Blip2Config, opt())),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(kind: type, config: Any) -> Any:
    """A model of always the same weights, so large that attention is far from uniform."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.16) if weight.dim() > 1 else weight.add_(torch.randn_like(weight), alpha=0.01)
    return model


@pytest.fixture(scope="module")
def fresh() -> Callable[[str], Any]:
    """A copy of a family's model that nobody else has."""
    models = {family: build(kind, config()) for family, (kind, config) in FAMILIES.items()}
    return lambda family: copy.deepcopy(models[family])


def pictures(family: str, rows: list[int]) -> tuple[dict[str, Tensor], list[int]]:
    """What a model needs of the images of rows that have so many of them, and the tokens of each image."""
    count = sum(rows)
    draw = torch.Generator().manual_seed(0)
    if family == "qwen":
        grid = torch.tensor([(1, 4, 4), (1, 4, 6), (1, 6, 4)])[:count]
        patches = int(grid.prod(dim=1).sum())
        return {
            "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=draw),
            "image_grid_thw": grid,
        }, (grid.prod(dim=1) // 4).tolist()
    images = torch.randn(count, 3, 16, 16, generator=draw)
    if family in ("idefics3", "smolvlm"):
        padded = torch.zeros(len(rows), max(rows), 3, 16, 16)
        for row, own in enumerate(images.split(rows)):
            padded[row, : len(own)] = own
        return {"pixel_values": padded}, [4] * count
    if family == "instructblip":
        question = torch.randint(5, WORDS, (count, 3), generator=draw)
        return {"pixel_values": images, "qformer_input_ids": question}, [4] * count
    return {"pixel_values": images}, [4] * count


def sample(family: str, rows: tuple[int, ...] = (2, 1, 0)) -> dict[str, Tensor]:
    """A batch, padded on the left: rows of so many images, with text around each."""
    inputs, tokens = pictures(family, list(rows))
    draw, blocks, lines = torch.Generator().manual_seed(1), iter(tokens), []
    for row, images in enumerate(rows):
        words = torch.randint(5, WORDS, (images + 1, 5 - row), generator=draw).tolist()
        line = [BOS, *words[0]]
        for text in words[1:]:
            line += [IMAGE] * next(blocks) + text
        lines.append(line)
    width = max(map(len, lines))
    ids = torch.tensor([[PAD] * (width - len(line)) + line for line in lines])
    return whole(family, {**inputs, "input_ids": ids, "attention_mask": (ids != PAD).long()}, ids)


def whole(family: str, inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The same inputs with tokens `ids`, whose first are the old ones."""
    repeats, more = len(ids) // len(inputs["input_ids"]), ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"].repeat_interleave(repeats, dim=0), (0, more), value=1)
    types = {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()} if family == "qwen" else {}
    return {**inputs, **types, "input_ids": ids, "attention_mask": mask}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def state(model: PreTrainedModel) -> list[Any]:
    """What inhibit may have touched: attributes, hooks and attention of every module."""
    return [
        (name, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        + ((module.config._attn_implementation,) if isinstance(module, PreTrainedModel) else ())
        for name, module in model.named_modules()
    ]


@every_family
def test_a_maximum_of_zero_is_no_inhibition(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    before = logits(model, **inputs)
    inhibit(model, CMAI(gamma_max=0.0))
    own = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(model, **inputs)[own], before[own], rtol=1e-5, atol=1e-5)


@every_family
def test_off_again_the_model_is_what_it_was(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    then, before = logits(model, **inputs), state(model)  # transformers itself leaves things on a model that ran
    inhibit(model, STRONG)
    inhibit(model, CMAI(gamma_max=0.3))  # other settings take the place of the first
    on = logits(model, **inputs)
    assert not torch.allclose(on, then, atol=1e-3)
    inhibit(model, None)
    assert state(model) == before
    assert torch.equal(logits(model, **inputs), then)
    inhibit(model, CMAI(gamma_max=0.3))
    assert torch.equal(logits(model, **inputs), on)


def slow_keep(weights: list[list[float]], image: list[bool], visible: Tensor, ratio: float) -> Tensor:
    """Which pairs of one sequence stay; equations 9 to 11 as loops, then the quantile of each row."""
    keep, length = visible.clone(), len(image)
    for j in range(length):
        columns = [k for k in range(length) if image[k] and visible[j, k]]
        if image[j] or not columns:
            continue
        text = [h for h in range(j) if not image[h]]  # eq. 9: A_t2n is zero unless j > h
        focus = {k: sum(weights[j][h] * weights[h][k] for h in text) + weights[j][k] for k in columns}  # eq. 10, 11
        for k in sorted(columns, key=focus.__getitem__)[: int(ratio * (len(columns) - 1))]:
            keep[j, k] = False
    return keep


def slowly(model: Any, cmai: CMAI, images: tuple[int, ...], **inputs: Any) -> Tensor:
    """Logits of eager attention whose layers, one after the other, get the mask of `slow_keep`; plain transformers."""
    decoder = model.get_decoder().get_decoder()  # BLIP-2's is a whole OPTForCausalLM
    decoder.set_attn_implementation("eager")
    image, own = torch.isin(inputs["input_ids"], torch.tensor(images)), inputs["attention_mask"].bool()
    visible = own.unsqueeze(1) & torch.ones(own.shape[1], own.shape[1], dtype=torch.bool).tril()
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
    return logits(model, **inputs, use_cache=False)[own]


@every_family
def test_every_layer_inhibits_the_pairs_of_the_slow_loop(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    inhibit(model, STRONG)
    fast = logits(model, **inputs)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(fast, slowly(fresh(family), STRONG, (IMAGE,), **inputs), rtol=1e-4, atol=1e-4)


def test_tokens_of_a_video_are_image_tokens(fresh: Callable[[str], Any]) -> None:
    inputs = sample("qwen", (2, 1))
    inputs["pixel_values_videos"] = torch.randn(2 * 16, 96, generator=torch.Generator().manual_seed(2))
    inputs["video_grid_thw"] = torch.tensor([(2, 4, 4)])
    ids = torch.cat([inputs["input_ids"], torch.randint(5, WORDS, (2, 12))], dim=1)
    ids[1, -11:-3] = VIDEO
    inputs, model = whole("qwen", inputs, ids), fresh("qwen")
    inhibit(model, STRONG)
    fast = logits(model, **inputs)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(fast, slowly(fresh("qwen"), STRONG, (IMAGE, VIDEO), **inputs), rtol=1e-4, atol=1e-4)


LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6, "suppress_tokens": [IMAGE, VIDEO]}  # words alone


@every_family
def test_greedy_decoding_equals_the_full_pass_token_by_token(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    inhibit(model, STRONG)
    told = model.generate(**inputs, **LENGTH, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert isinstance(told.past_key_values, FocusCache)
    start = inputs["input_ids"].shape[1]
    full = logits(model, **whole(family, inputs, told.sequences), use_cache=False)[:, start - 1 : -1]
    torch.testing.assert_close(torch.stack(told.logits, dim=1), full, rtol=1e-4, atol=1e-4)
    full[..., [EOS, IMAGE, VIDEO]] = -torch.inf  # forbidden by LENGTH
    assert torch.equal(told.sequences[:, start:], full.argmax(dim=-1))


@every_family
@pytest.mark.parametrize("way", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 0}], ids=str)
def test_the_scores_of_other_searches_are_those_of_the_full_pass(
    fresh: Callable[[str], Any], family: str, way: dict[str, Any]
) -> None:
    model, inputs = fresh(family), sample(family)
    inhibit(model, STRONG)
    torch.manual_seed(0)
    found = model.generate(
        **inputs, **LENGTH, **way, num_return_sequences=2, return_dict_in_generate=True, output_logits=True
    )
    start = inputs["input_ids"].shape[1]
    for copies in (0, 1):  # each row's first and second answer; inputs that are not repeated fit one of them
        ids = found.sequences[copies::2]
        full = logits(model, **whole(family, inputs, ids), use_cache=False)[:, start - 1 : -1]
        for step, now in enumerate(found.logits):
            from_beam = found.beam_indices[copies::2, step] if "num_beams" in way else torch.arange(copies, len(now), 2)
            torch.testing.assert_close(now[from_beam], full[:, step], rtol=1e-4, atol=1e-4)
    if "num_beams" in way:
        assert found.beam_indices[:, : LENGTH["max_new_tokens"]].diff(dim=1).any(), "no beam took another's place"


# without a cache, transformers' generate of Q-Former models itself loses the image after the first token
@pytest.mark.parametrize("family", ["llava", "qwen", "idefics3", "smolvlm"])
def test_beam_search_without_a_cache_gives_the_same_tokens(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    inhibit(model, STRONG)
    with_cache, without = (
        model.generate(**inputs, **LENGTH, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_an_empty_cache_becomes_one_that_a_conversation_goes_on_from(fresh: Callable[[str], Any]) -> None:
    model, inputs = fresh("idefics3"), sample("idefics3", (2,))
    inhibit(model, STRONG)
    ids, images, cache = inputs["input_ids"], inputs["pixel_values"][0], DynamicCache()
    cuts = [0, 12, 21, ids.shape[1]]  # in the text behind each image
    parts = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        piece = ids[:, start:end]
        seen = {"pixel_values": images[None, number : number + 1]} if (piece == IMAGE).sum() == 4 else {}
        parts.append(logits(model, input_ids=piece, past_key_values=cache, **seen))
    assert isinstance(cache, FocusCache)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, **inputs), rtol=1e-4, atol=1e-4)


@every_family
def test_copies_go_their_own_ways(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    inhibit(model, STRONG)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    on = logits(model, **inputs)
    inhibit(model, None)
    off = logits(model, **inputs)
    for other in (copied, pickled):
        assert torch.equal(logits(other, **inputs), on)
        inhibit(other, CMAI(gamma_max=0.3))
    assert torch.equal(logits(model, **inputs), off)
    inhibit(model, STRONG)
    for other in (copied, pickled):
        assert not torch.allclose(logits(other, **inputs), on, atol=1e-3)
        inhibit(other, None)
        assert torch.equal(logits(other, **inputs), off)
    assert torch.equal(logits(model, **inputs), on)


@every_family
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients(
    fresh: Callable[[str], Any], family: str, reentrant: bool
) -> None:
    inputs = sample(family)
    gradients = []
    for recompute in (False, True):
        model = fresh(family).train()
        inhibit(model, STRONG)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        cache = output.get("language_model_outputs", output).past_key_values
        assert isinstance(cache, FocusCache) != recompute, "written when recomputed, read by nobody"
        language = model.get_decoder().named_parameters()
        gradients.append({name: weight.grad for name, weight in language if weight.grad is not None})
    once, twice = gradients
    assert len(once) > 10
    assert once.keys() == twice.keys()
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], gradient)


class Inside(LlavaForConditionalGeneration):
    """A model that is inhibited from its birth."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        inhibit(self, STRONG)


def test_a_model_that_inhibits_itself_is_loaded_from_its_weights(fresh: Callable[[str], Any], tmp_path: Path) -> None:
    model, inputs = fresh("llava"), sample("llava")
    inhibit(model, STRONG)
    build(Inside, llava()).save_pretrained(tmp_path)
    inside = Inside.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(inside, **inputs), logits(model, **inputs))
    inside.resize_token_embeddings(WORDS + 3)
    assert torch.equal(logits(inside, **inputs)[..., :WORDS], logits(model, **inputs))


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
def test_embeddings_of_unknown_origin_are_refused(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    inhibit(model, STRONG)
    model.generate(**inputs, max_new_tokens=2)
    for length in (1, inputs["input_ids"].shape[1]):
        with pytest.raises(ValueError, match="input_ids: got None, allowed: token ids"), torch.no_grad():
            model.get_decoder()(inputs_embeds=torch.zeros(3, length, 32))


@every_family
@pytest.mark.parametrize("kind", [DynamicCache, FocusCache])
def test_a_cache_filled_without_cmai_is_refused(fresh: Callable[[str], Any], family: str, kind: type) -> None:
    model, inputs, filled = fresh(family), sample(family), kind()
    logits(model, **inputs, past_key_values=filled)
    inhibit(model, STRONG)
    tokens = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"past_key_values: got {kind.__name__} of {tokens} tokens, allowed: redux"):
        logits(model, **inputs, past_key_values=filled)


def test_attention_changed_while_on_is_refused_and_not_silently_off(fresh: Callable[[str], Any]) -> None:
    model = fresh("llava")
    inhibit(model, STRONG)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: got sdpa, allowed: cmai while CMAI is on"):
        model(**sample("llava"))


def test_models_that_share_a_configuration_go_back_to_what_they_were() -> None:
    config = llava()
    one, other = (build(LlavaForConditionalGeneration, config) for _ in range(2))
    before = one(**sample("llava")).logits
    for model in (one, other):
        inhibit(model, STRONG)
    for model in (one, other):
        inhibit(model, None)
    for model in (one, other):
        assert torch.equal(model(**sample("llava")).logits, before)


def test_a_decoder_is_inhibited_once(fresh: Callable[[str], Any]) -> None:
    model = fresh("llava")
    inhibit(model, STRONG)
    with pytest.raises(ValueError, match="model: got LlavaModel, allowed: the one in which CMAI was turned on before"):
        inhibit(model.model, STRONG)


def apart(parts: list[dict[str, Tensor]], run: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor]:
    """What each of several threads, begun at once, gets for its part."""
    results: list[Any] = [None] * len(parts)

    def work(number: int) -> None:
        try:
            results[number] = run(parts[number])
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def two_prompts(family: str) -> list[dict[str, Tensor]]:
    """Prompts of one length, with their images in other places."""
    inputs = sample(family, (1,))
    ids = inputs["input_ids"]
    return [inputs, whole(family, inputs, ids.flip(1))]


@every_family
def test_threads_share_a_model(fresh: Callable[[str], Any], family: str) -> None:
    """Each is stopped where its images are read until the other is there as well."""
    model, parts = fresh(family), two_prompts(family)
    inhibit(model, STRONG)
    expected = [logits(model, **part) for part in parts]
    assert not torch.allclose(*expected, atol=1e-2)
    both = threading.Barrier(2, timeout=60)
    towers = ("vision_tower", "visual", "vision_model")
    tower = next(module for name, module in model.named_modules() if name.endswith(towers))

    def hold(*_: Any) -> None:
        both.wait()

    tower.register_forward_hook(hold)
    for found, alone in zip(apart(parts, lambda part: logits(model, **part)), expected, strict=True):
        assert torch.equal(found, alone)


@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_threads_generate_with_a_model(fresh: Callable[[str], Any], family: str) -> None:
    model, parts = fresh(family), two_prompts(family) * 2
    inhibit(model, STRONG)
    expected = [model.generate(**part, **LENGTH, do_sample=False) for part in parts]
    found = apart(parts, lambda part: model.generate(**part, **LENGTH, do_sample=False))
    for own, alone in zip(found, expected, strict=True):
        assert torch.equal(own, alone)


@every_family
def test_a_call_within_a_call_changes_neither(fresh: Callable[[str], Any], family: str) -> None:
    """Of the same model and of another."""
    parts = two_prompts(family)
    for model, inner in [(fresh(family), None), (fresh(family), fresh("llava"))]:
        inhibit(model, STRONG)
        if inner is not None:
            inhibit(inner, STRONG)
        inner, within = (model, parts[1]) if inner is None else (inner, sample("llava"))
        expected = [logits(model, **parts[0]), logits(inner, **within)]
        found: list[Tensor] = []

        def call(*_: Any, inner: Any = inner, within: Any = within, found: list[Tensor] = found) -> None:
            if not found:
                found.append(torch.empty(0))
                found[0] = logits(inner, **within)

        model.get_input_embeddings().register_forward_hook(call)
        assert torch.equal(logits(model, **parts[0]), expected[0])
        assert torch.equal(found[0], expected[1])


@every_family
def test_a_call_that_fails_tells_the_next_one_nothing(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    inhibit(model, STRONG)
    expected, shape = logits(model, **inputs), inputs["input_ids"].shape
    for part in (model.get_input_embeddings(), model.get_decoder()):
        handle = part.register_forward_hook(lambda *_: 1 / 0)
        for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
            with pytest.raises(ZeroDivisionError):
                call(**inputs)
        handle.remove()
    if family in ("instructblip", "blip2"):
        model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids: got None"):
        model.get_decoder()(inputs_embeds=torch.zeros(*shape, 32))
    assert torch.equal(logits(model, **inputs), expected)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -torch.inf, -1e4], ids=str)
@pytest.mark.parametrize("cmai", [STRONG, CMAI(gamma_max=0.8, scores="scores", focus="sum")], ids=["weights", "scores"])
def test_a_mask_of_four_dimensions_is_read(fresh: Callable[[str], Any], low: float, cmai: CMAI) -> None:
    model, inputs = fresh("llava"), sample("llava")
    inhibit(model, cmai)
    own = inputs.pop("attention_mask").bool()
    expected = logits(model, **inputs, attention_mask=own.long())[own]
    visible = own[:, None, None] & torch.ones(own.shape[1], own.shape[1], dtype=torch.bool).tril()
    for mask in (visible, {"full_attention": visible}, torch.zeros(visible.shape).masked_fill(~visible, low)):
        assert torch.equal(logits(model, **inputs, attention_mask=mask)[own], expected)
    with pytest.raises(ValueError, match="attention_mask: got sliding_attention, allowed: full_attention"):
        logits(model, **inputs, attention_mask={"sliding_attention": visible})
    for wrong in (visible.expand(-1, 4, -1, -1), visible.long(), visible.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"attention_mask: got torch\..*, allowed: booleans or floats of shape"):
            logits(model, **inputs, attention_mask=wrong)


def test_what_a_mask_adds_to_scores_counts_in_the_weights(fresh: Callable[[str], Any]) -> None:
    """A bias that hides nothing; the slow loop gets it with its own mask."""
    model, inputs = fresh("llava"), sample("llava", (1,))
    tokens = inputs["input_ids"].shape[1]
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    bias = torch.randn(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(3)).masked_fill(
        ~visible, -torch.inf
    )
    cmai = CMAI(gamma_max=0.8, gamma_min=0.8)
    inputs["attention_mask"] = bias
    inhibit(model, cmai)
    fast = logits(model, **inputs, use_cache=False)
    plain = fresh("llava")
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
def test_packed_conversations_are_what_each_is_alone(fresh: Callable[[str], Any], cmai: CMAI) -> None:
    model = fresh("llava")
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


@every_family
def test_adapters_and_a_copied_embedding_take_nothing_along(fresh: Callable[[str], Any], family: str) -> None:
    """PEFT copies the embedding alone and calls the model past its hooks."""
    model, inputs = fresh(family), sample(family)
    then = logits(model, **inputs)
    before = state(model)
    inhibit(model, STRONG)
    expected, told = logits(model, **inputs), model.generate(**inputs, **LENGTH, do_sample=False)
    alone = copy.deepcopy(model.get_input_embeddings())
    assert len(pickle.dumps(alone)) < 2 * alone.weight.nbytes
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    torch.testing.assert_close(logits(adapted.eval(), **inputs), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(adapted.generate(**inputs, **LENGTH, do_sample=False), told)
    inhibit(model, None)
    torch.testing.assert_close(logits(adapted, **inputs), then, rtol=1e-4, atol=1e-4)
    restored = adapted.unload()
    assert [hooks for _, _, *hooks in state(restored)] == [hooks for _, _, *hooks in before]


@every_family
def test_another_embedding_takes_the_place_of_the_first(fresh: Callable[[str], Any], family: str) -> None:
    model, inputs = fresh(family), sample(family)
    inhibit(model, STRONG)
    expected, told = logits(model, **inputs), model.generate(**inputs, **LENGTH, do_sample=False)
    other = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach().clone())
    model.set_input_embeddings(other)
    assert torch.equal(logits(model, **inputs), expected)
    if family in ("instructblip", "blip2"):
        with pytest.raises(ValueError, match=r"where input embeddings were replaced, redux\.inhibit"):
            model.generate(**inputs, **LENGTH, do_sample=False)
        inhibit(model, STRONG)
    assert torch.equal(model.generate(**inputs, **LENGTH, do_sample=False), told)


def test_an_embedding_on_the_side_tells_the_next_call_nothing(fresh: Callable[[str], Any]) -> None:
    model = fresh("llava")
    inhibit(model, STRONG)
    inputs = sample("llava")
    model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="input_ids: got None"):
        model(inputs_embeds=torch.zeros(*inputs["input_ids"].shape, 32))


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
def test_what_is_not_cmai_is_named(wrong: Any, fresh: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"cmai: got .*, allowed: redux\.CMAI, or None to turn it off"):
        inhibit(fresh("llava"), wrong)
