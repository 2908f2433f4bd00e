"""Compile models and compare them with themselves; the names of checks are the arguments.

A process of its own, since the checks of shapes in tests cannot be compiled.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration
from redux.plugin import inhibit
from redux.settings import CMAI, VMTC

NEW, WORDS, IMAGE = 6, 64, 63
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **SIZES}
DECODING_SETTINGS = [
    CMAI(gamma_max=0.8, gamma_min=0.5),
    CMAI(gamma_max=0.8, scores="scores", focus="discounted", quantile="count", preamble=False),
]


def build(**methods: Any) -> Any:
    """Build a model whose attention is far from uniform."""
    torch.manual_seed(0)
    text = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": WORDS}
    config = ReduxConfig(vision_config=VISION, text_config=text, image_token_index=IMAGE, **methods)
    model = ReduxForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.16) if weight.dim() > 1 else weight
    return model


def check_tower(backend: str) -> None:
    """A tower is one graph."""
    model = build(vmtc=VMTC(tokens=8, clusters=2, stages=1, iterations=2, proportional=True))
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model.model.encode_images, fullgraph=True, backend=backend)
    (tokens, assignment), (expected, expected_assignment) = compiled(images), model.model.encode_images(images)
    assert tokens.shape == (2, 8, 32)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(assignment.token_of_patch, expected_assignment.token_of_patch)


def check_threads() -> None:
    """A compiled model gives the same in a second thread, at another position of the image."""
    model = build(vmtc=VMTC(tokens=8, stages=1, iterations=2), cmai=CMAI(gamma_max=0.8, gamma_min=0.5))
    compiled = torch.compile(model, backend="eager")
    done = []

    def compare(start: int) -> None:
        ids = torch.tensor([[1] * start + [IMAGE] * 8 + list(range(2, 14 - start))])
        inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32), "use_cache": False}
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
        done.append(start)

    compare(1)
    thread = threading.Thread(target=compare, args=(3,))
    thread.start()
    thread.join()
    assert done == [1, 3]


def check_decoding_step() -> None:
    """A decoding step on a StaticCache is one graph, compiled once, and chooses the tokens of `generate`."""
    model = build(vmtc=None)
    ids = torch.randint(3, 60, (2, 30))
    ids[:, 5:21] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32)}
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    for cmai in DECODING_SETTINGS:
        inhibit(model, cmai)
        expected = model.generate(**inputs, **options, suppress_tokens=[IMAGE])[:, ids.shape[1] :]
        length = ids.shape[1] + NEW
        cache = StaticCache(config=model.config.text_config, max_cache_len=length)
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        step = torch.compile(model, backend=counter, fullgraph=True)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        logits = model(**inputs, position_ids=positions, past_key_values=cache).logits
        positions, tokens = positions[:, -1:], []
        for new in range(NEW):
            logits = logits[:, -1:].clone()
            logits[..., IMAGE] = -torch.inf
            tokens.append(logits.argmax(dim=-1))
            visible = torch.cat([mask, torch.ones(2, new + 1, dtype=torch.long)], dim=1).bool()
            visible = torch.nn.functional.pad(visible, (0, length - visible.shape[1]))[:, None, None]
            positions = positions + 1
            call = {"input_ids": tokens[-1], "attention_mask": visible, "position_ids": positions}
            logits = step(**call, past_key_values=cache).logits
        assert torch.equal(torch.cat(tokens, dim=1), expected)
        assert counter.frame_count == 1


CHECKS: dict[str, Callable[[], None]] = {
    "tower": lambda: check_tower("aot_eager"),
    "tower by Inductor": lambda: check_tower("inductor"),
    "threads": check_threads,
    "decoding step": check_decoding_step,
}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        torch._dynamo.reset()
        with torch.no_grad():
            CHECKS[name]()


if __name__ == "__main__":
    main()
