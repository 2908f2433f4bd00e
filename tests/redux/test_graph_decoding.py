"""Static steps, of which a CUDA graph is made, choose the tokens of `generate`, and never wait for the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from redux import graph_decoding
from redux.generation import generate_greedily
from redux.graph_decoding import GreedySteps, PrefilledPrompt, decode_prompt, find_obstacle, use_graph
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI

Tiny = Callable[..., ReduxForConditionalGeneration]
Sample = Callable[..., dict[str, Tensor]]
NEW, PAD, NEVER = 12, 0, -5
METHODS: dict[str, dict[str, Any]] = {
    "llava": {"vmtc": None, "cmai": None},
    "vmtc": {"cmai": None},
    "vmtc+cmai": {},
    "sum": {"cmai": CMAI(gamma_max=0.8, focus="sum", scores="scaled")},
    "tia": {"cmai": CMAI(gamma_max=0.8, focus="tia", quantile="linear")},
    "discounted": {"cmai": CMAI(gamma_max=0.8, focus="discounted", quantile="count")},
    "prompt alone": {"cmai": CMAI(generated=False)},
    "training alone": {"cmai": CMAI(active="training")},
}


def build_batch(model: Any, sample: Sample, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left; of images, one each, several or none."""
    rows, pixels = [], []
    for number in range(3):
        one = sample(model, text=6 + 3 * number, seed=seed + number)
        ids = one["input_ids"][0]
        if kind == "several" and number:
            ids = torch.cat([ids, sample(model, text=4, seed=seed + 9)["input_ids"][0, 1:]])
            pixels.append(one["pixel_values"].flip(3))
        if kind == "none":
            ids = ids[ids != model.config.image_token_id]
        else:
            pixels.append(one["pixel_values"])
        rows.append(ids)
    length = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"pixel_values": torch.cat(pixels)} if pixels else {})


@torch.inference_mode()
def compare(model: Any, inputs: dict[str, Tensor], eos: list[int], new: int = NEW) -> Tensor:
    """Check that static steps choose the tokens of `generate`, and return them."""
    expected = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=PAD
    )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    assert not find_obstacle(model, inputs)
    tokens = decode_prompt(model, PrefilledPrompt.run(model, inputs), eos, PAD, new)
    # The steps look for the end now and then, so padding may follow.
    assert torch.equal(tokens[:, : expected.shape[1]], expected)
    assert (tokens[:, expected.shape[1] :] == PAD).all()
    assert tokens.shape[1] <= new
    return expected


@pytest.mark.parametrize("kind", ["one", "several", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_static_steps_choose_the_tokens_of_generate(tiny: Tiny, sample: Sample, name: str, kind: str) -> None:
    model = tiny(**METHODS[name])
    compare(model, build_batch(model, sample, kind), [NEVER])


@pytest.mark.parametrize("name", ["llava", "vmtc+cmai"])
def test_answers_end_at_different_steps(tiny: Tiny, sample: Sample, name: str) -> None:
    model = tiny(**METHODS[name])
    inputs = build_batch(model, sample, "one")
    free = compare(model, inputs, [NEVER])
    for ends in ([free[0, 0]], [free[0, 0], free[1, 1], free[2, 2]], [free[1, 5], free[2, 3]], [free[0, -1]]):
        compare(model, inputs, [int(end) for end in ends])


@pytest.mark.parametrize("new", [1, 2, 3])
def test_few_new_tokens(tiny: Tiny, sample: Sample, new: int) -> None:
    model = tiny()
    compare(model, build_batch(model, sample, "one"), [NEVER], new)


def test_a_batch_without_padding_and_one_padded_on_the_right(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    inputs = sample(model)
    mask = torch.ones_like(inputs["input_ids"])
    compare(model, {**inputs, "attention_mask": mask}, [NEVER])
    mask[:, -2:] = 0
    compare(model, {**inputs, "attention_mask": mask}, [NEVER])


@torch.inference_mode()
@pytest.mark.parametrize("name", METHODS)
def test_kept_steps_serve_further_prompts_at_the_same_addresses(tiny: Tiny, sample: Sample, name: str) -> None:
    model = tiny(**METHODS[name])
    steps = GreedySteps(None, 3, 256, 64 * ("cmai" not in METHODS[name] or METHODS[name]["cmai"] is not None),
                        model.device, [NEVER], PAD)  # fmt: skip
    addresses = set()
    for seed, kind in enumerate(["one", "several", "one"]):
        inputs = build_batch(model, sample, kind, seed)
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=NEVER, pad_token_id=PAD)
        prompt = PrefilledPrompt.run(model, inputs)
        assert steps.fits(None, 200, prompt.image_room)
        steps.load(prompt, model.config.text_config)
        for _ in range(2):  # As before a capture
            steps.step(model)
        steps.load(prompt, model.config.text_config)
        tokens = steps.run(prompt, NEW, lambda: steps.step(model))
        assert torch.equal(tokens, expected[:, -NEW:])
        cache: Any = steps.cache
        tensors = [cache.layers[1].keys, cache.layers[1].cumulative_length, steps.visible]
        if steps.image_room:
            tensors += [cache.length, cache.flags, *cache._rows.values()]
            tensors += [] if cache.columns is None else [cache.columns, cache.count]
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
    assert len(addresses) == 1


class Operations(TorchDispatchMode):
    """Records operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vmtc+cmai", "sum"])
def test_rows_begin_where_text_follows_an_image(tiny: Tiny, sample: Sample, name: str) -> None:
    model = tiny(**METHODS[name])
    inputs = build_batch(model, sample, "one")
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=NEVER, pad_token_id=PAD)
    prompt = PrefilledPrompt.run(model, inputs)
    for start in (prompt.start, prompt.start - 3):
        steps = GreedySteps(None, 3, 128, 64, model.device, [NEVER], PAD, start)
        steps.load(prompt, model.config.text_config)
        assert torch.equal(steps.run(prompt, NEW, partial(steps.step, model)), expected[:, -NEW:])


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["one", "none"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "training alone"])
def test_a_step_never_waits_for_the_device(tiny: Tiny, sample: Sample, name: str, kind: str) -> None:
    model = tiny(**METHODS[name])
    prompt = PrefilledPrompt.run(model, build_batch(model, sample, kind))
    assert graph_decoding.is_free_of_waits(prompt.cache)
    steps = GreedySteps(None, 3, 128, prompt.image_room, model.device, [NEVER], PAD)
    steps.load(prompt, model.config.text_config)
    steps.step(model)
    with Operations() as operations:
        steps.step(model)
    waits = ("_local_scalar_dense", "nonzero", "item", "masked_select", "lift_fresh", "unique", "is_nonzero")
    assert not [operation for operation in operations.names if operation.startswith(waits)]


def test_a_graph_needs_a_gpu_and_the_choice_of_kernels(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    assert not use_graph(model, build_batch(model, sample, "one"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model, inputs: inputs.pop("attention_mask"), "the inputs are input_ids, pixel_values"),
        (lambda model, inputs: inputs.update(image_sizes=torch.ones(1)), "the inputs are attention_mask, image_sizes"),
        (
            lambda model, inputs: setattr(model, "generation_config", GenerationConfig(repetition_penalty=1.5)),
            "the generation configuration has repetition_penalty",
        ),
        (lambda model, inputs: model.train(), "the model trains"),
    ],
)
def test_other_batches_are_left_to_generate(tiny: Tiny, sample: Sample, change: Any, reason: str) -> None:
    model = tiny()
    inputs = build_batch(model, sample, "one")
    assert not find_obstacle(model, inputs)
    change(model, inputs)
    assert find_obstacle(model, inputs).startswith(reason)


def test_steps_fit_about_the_same_length(tiny: Tiny) -> None:
    steps = GreedySteps("key", 2, 512, 64, torch.device("cpu"), [1], PAD)
    assert steps.fits("key", 512, 64)
    assert steps.fits("key", 128, 20, start=9)
    for key, needed, slots in (("other", 512, 64), ("key", 513, 64), ("key", 127, 64), ("key", 512, 65), ("key", 9, 0)):
        assert not steps.fits(key, needed, slots)
    later = GreedySteps("key", 2, 512, 64, torch.device("cpu"), [1], PAD, start=64)
    assert later.fits("key", 512, 64, start=64)
    assert not later.fits("key", 512, 64, start=63)


def test_answers_are_the_same_by_static_steps(
    tiny: Tiny, sample: Sample, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    inputs = build_batch(model, sample, "one")
    eos = [int(model.generate(**inputs, max_new_tokens=5, do_sample=False)[1, -2])]
    expected = generate_greedily(model, tokenizer, inputs, eos, NEW)
    monkeypatch.setattr("redux.generation.use_graph", lambda *_: True)
    answers = generate_greedily(model, tokenizer, inputs, eos, NEW)
    assert (answers.texts, answers.tokens) == (expected.texts, expected.tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_a_graph_chooses_the_tokens_of_generate(tiny: Tiny, sample: Sample, name: str) -> None:
    model = tiny(**METHODS[name]).cuda()
    for seed, kind in enumerate(["one", "several", "one"]):
        inputs = {field: tensor.cuda() for field, tensor in build_batch(model, sample, kind, seed).items()}
        assert use_graph(model, inputs)
        free = compare(model, inputs, [NEVER])
        compare(model, inputs, [int(free[0, 1]), int(free[1, 6])])
