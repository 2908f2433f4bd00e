"""Models with CMAI generate what a full pass over all tokens chooses, with every search and cache."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
)

from redux.focus_cache import FocusCache
from redux.plugin import inhibit
from tests.redux.families import EOS, IMAGE, LENGTH, STRONG, VIDEO, every_family, logits, sample, whole


@every_family
def test_greedy_decoding_equals_the_full_pass_token_by_token(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
    inhibit(model, STRONG)
    told = model.generate(**inputs, **LENGTH, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert isinstance(told.past_key_values, FocusCache)
    start = inputs["input_ids"].shape[1]
    full = logits(model, **whole(family, inputs, told.sequences), use_cache=False)[:, start - 1 : -1]
    torch.testing.assert_close(torch.stack(told.logits, dim=1), full, rtol=1e-4, atol=1e-4)
    full[..., [EOS, IMAGE, VIDEO]] = -torch.inf  # Forbidden by LENGTH
    assert torch.equal(told.sequences[:, start:], full.argmax(dim=-1))


@every_family
@pytest.mark.parametrize("way", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 0}], ids=str)
def test_the_scores_of_other_searches_are_those_of_the_full_pass(
    new_model: Callable[[str], Any], family: str, way: dict[str, Any]
) -> None:
    model, inputs = new_model(family), sample(family)
    inhibit(model, STRONG)
    torch.manual_seed(0)
    found = model.generate(
        **inputs, **LENGTH, **way, num_return_sequences=2, return_dict_in_generate=True, output_logits=True
    )
    start = inputs["input_ids"].shape[1]
    for copies in (0, 1):  # Each row's first and second answer; inputs that are not repeated fit one of them
        ids = found.sequences[copies::2]
        full = logits(model, **whole(family, inputs, ids), use_cache=False)[:, start - 1 : -1]
        for step, now in enumerate(found.logits):
            from_beam = found.beam_indices[copies::2, step] if "num_beams" in way else torch.arange(copies, len(now), 2)
            torch.testing.assert_close(now[from_beam], full[:, step], rtol=1e-4, atol=1e-4)
    if "num_beams" in way:
        assert found.beam_indices[:, : LENGTH["max_new_tokens"]].diff(dim=1).any(), "no beam took another's place"


# Without a cache, transformers' generate of Q-Former models itself loses the image after the first token.
@pytest.mark.parametrize("family", ["llava", "qwen", "idefics3", "smolvlm"])
def test_beam_search_without_a_cache_gives_the_same_tokens(new_model: Callable[[str], Any], family: str) -> None:
    model, inputs = new_model(family), sample(family)
    inhibit(model, STRONG)
    with_cache, without = (
        model.generate(**inputs, **LENGTH, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_an_empty_cache_becomes_one_that_a_conversation_goes_on_from(new_model: Callable[[str], Any]) -> None:
    model, inputs = new_model("idefics3"), sample("idefics3", (2,))
    inhibit(model, STRONG)
    ids, images, cache = inputs["input_ids"], inputs["pixel_values"][0], DynamicCache()
    cuts = [0, 12, 21, ids.shape[1]]  # In the text behind each image
    parts = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        piece = ids[:, start:end]
        seen = {"pixel_values": images[None, number : number + 1]} if (piece == IMAGE).sum() == 4 else {}
        parts.append(logits(model, input_ids=piece, past_key_values=cache, **seen))
    assert isinstance(cache, FocusCache)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, **inputs), rtol=1e-4, atol=1e-4)
