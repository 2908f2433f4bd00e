"""Calls of models with CMAI do not influence each other: threads, calls within calls, errors, copies, adapters."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from redux.focus_cache import FocusCache
from redux.plugin import inhibit
from redux.settings import CMAI
from tests.redux.families import LENGTH, STRONG, WORDS, build, every_family, llava, logits, sample, state, whole


@every_family
def test_copies_go_their_own_ways(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
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
    new_model: Callable[[str], Any], family: str, reentrant: bool
) -> None:
    inputs = sample(family)
    gradients = []
    for recompute in (False, True):
        model = new_model(family).train()
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


def test_a_model_that_inhibits_itself_is_loaded_from_its_weights(
    new_model: Callable[[str], Any], tmp_path: Path
) -> None:
    model, inputs = new_model("llava"), sample("llava")
    inhibit(model, STRONG)
    build(Inside, llava()).save_pretrained(tmp_path)
    inside = Inside.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(inside, **inputs), logits(model, **inputs))
    inside.resize_token_embeddings(WORDS + 3)
    assert torch.equal(logits(inside, **inputs)[..., :WORDS], logits(model, **inputs))


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


def apart(parts: list[dict[str, Tensor]], run: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor]:
    """Return the results of several threads that start at once, one for each item."""
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
def test_threads_share_a_model(new_model: Callable[[str], Any], family: str) -> None:
    """Each is stopped where its images are read until the other is there as well."""
    model, parts = new_model(family), two_prompts(family)
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
def test_threads_generate_with_a_model(new_model: Callable[[str], Any], family: str) -> None:
    model, parts = new_model(family), two_prompts(family) * 2
    inhibit(model, STRONG)
    expected = [model.generate(**part, **LENGTH, do_sample=False) for part in parts]
    found = apart(parts, lambda part: model.generate(**part, **LENGTH, do_sample=False))
    for own, alone in zip(found, expected, strict=True):
        assert torch.equal(own, alone)


@every_family
def test_a_call_within_a_call_changes_neither(new_model: Callable[[str], Any], family: str) -> None:
    """Caches of the same model and of another model."""
    parts = two_prompts(family)
    for model, inner in [(new_model(family), None), (new_model(family), new_model("llava"))]:
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
def test_a_call_that_fails_tells_the_next_one_nothing(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
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


@every_family
def test_adapters_and_a_copied_embedding_take_nothing_along(new_model: Callable[[str], Any], family: str) -> None:
    """PEFT copies the embedding alone and calls the model past its hooks."""
    model, inputs = new_model(family), sample(family)
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
def test_another_embedding_takes_the_place_of_the_first(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
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


def test_an_embedding_on_the_side_tells_the_next_call_nothing(new_model: Callable[[str], Any]) -> None:
    model = new_model("llava")
    inhibit(model, STRONG)
    inputs = sample("llava")
    model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="input_ids: got None"):
        model(inputs_embeds=torch.zeros(*inputs["input_ids"].shape, 32))
