"""Compression runs within the forward pass of tower and blocks, whatever is hung on them and wherever they lie."""

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionModel

from redux.cmai import Inhibition
from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI, VMTC, Reduction

Tiny = Callable[..., ReduxForConditionalGeneration]
Sample = Callable[..., dict[str, Any]]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def reduced(tiny: Tiny, method: Any = "prumerge") -> ReduxForConditionalGeneration:
    config = {**tiny(vmtc=None).config.to_dict(), "reduction": Reduction(method=method, tokens=4)}
    torch.manual_seed(0)
    return ReduxForConditionalGeneration(ReduxConfig(**config)).eval()


def test_hooks_of_tower_and_blocks_run_once_each(tiny: Tiny, sample: Sample) -> None:
    model = tiny(vmtc=VMTC(stages=(1, 3)))
    tower: Any = model.model.vision_tower
    called = []
    for name, module in [("tower", tower), *enumerate(tower.encoder.layers)]:
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    logits(model, **sample(model))
    assert called == ["tower", 0, 1, 2, 3]


def test_prumerge_asks_the_last_block_by_its_own_forward_pass(tiny: Tiny, sample: Sample) -> None:
    model = reduced(tiny)
    tower: Any = model.model.vision_tower
    called = []
    tower.encoder.layers[-1].register_forward_hook(lambda *_: called.append("last"))
    tower.encoder.layers[-1].mlp.register_forward_hook(lambda *_: called.append("mlp"))
    logits(model, **sample(model))
    assert called == ["last"]


@pytest.mark.parametrize(
    "methods",
    [
        {},
        {"vmtc": None},
        {"vmtc": VMTC(stages=(1, 3), proportional=True, similarity="keys")},
        {"vmtc": None, "reduction": Reduction(method="prumerge", tokens=4)},
        {"vmtc": None, "reduction": Reduction(method="average", tokens=4)},
    ],
    ids=str,
)
def test_text_alone_runs_the_modules_of_an_image_in_their_order(
    methods: dict[str, Any], tiny: Tiny, sample: Sample
) -> None:
    """ZeRO 3 gathers weights module by module on all ranks, and some of them may have no image."""
    model = tiny(**methods).train()
    projector = model.model.multi_modal_projector.named_modules(prefix="projector")
    called: list[str] = []
    for name, module in [*model.model.vision_tower.named_modules(), *projector]:
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    inputs = sample(model)
    text = {"input_ids": inputs["input_ids"][:, -6:]}
    results = []
    for images in (inputs["pixel_values"], inputs["pixel_values"][:0]):
        ids = inputs["input_ids"] if len(images) else text["input_ids"]
        called.clear()
        output = model(input_ids=ids, pixel_values=images, labels=ids)
        output.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((called.copy(), gradients, output.logits))
        model.zero_grad()
    (order, gradients, _), (text_order, text_gradients, text_logits) = results
    assert order == text_order
    assert len(order) > 20
    assert gradients.keys() == text_gradients.keys()
    image_parameters = [name for name in gradients if "vision_tower" in name or "projector" in name]
    assert image_parameters
    assert not any(text_gradients[name].any() for name in image_parameters)
    assert torch.equal(text_logits, model(**text).logits)


@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
def test_a_smaller_image_is_encoded_as_transformers_does(tiny: Tiny, siglip: bool) -> None:
    config = {**tiny(vmtc=None).config.to_dict(), "reduction": Reduction(method="resize", tokens=9)}
    if siglip:
        sizes = {name: config["vision_config"][name] for name in SIZES}
        config |= {"vision_config": {"model_type": "siglip_vision_model", **sizes}}
        config |= {"vision_feature_select_strategy": "full"}
    model = ReduxForConditionalGeneration(ReduxConfig(**config)).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, assignment = model.model.encode_images(pixels)
        smaller = F.interpolate(pixels, (24, 24), mode="bilinear", antialias=True)
        whole = model.model.vision_tower(smaller, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(features, whole.hidden_states[-2][:, 0 if siglip else 1 :])
    assert features.shape[1] == 9
    assert assignment.token_of_patch[0].tolist() == [0, 1, 1, 2, 3, 4, 4, 5, 3, 4, 4, 5, 6, 7, 7, 8]
    assert assignment.merged.all()


def test_attention_sinks_of_the_tower_are_no_primary_tokens(tiny: Tiny) -> None:
    """The first block gives some patches a large norm, and the class token attends to them."""
    compressing = VMTC(tokens=6, stages=(2,), clusters=0)
    models = [tiny(vmtc=replace(compressing, sink_norm=sink_norm)) for sink_norm in (None, 2.0)]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sinks = [1, 9]

    def enlarge(block: Any, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = hidden.clone()
        hidden[:, [1 + patch for patch in sinks]] += 40 * hidden[:, :1].sign()
        return hidden

    kept = []
    for model in models:
        model.model.vision_tower.encoder.layers[1].register_forward_hook(enlarge)
        with torch.no_grad():
            _, assignment = model.model.encode_images(pixels)
        kept.append({patch for patch in range(16) if assignment.token_of_patch[0, patch] >= 0})
    assert len(kept[0]) == len(kept[1]) == 6
    assert not kept[1] & set(sinks)


def test_a_compressing_block_is_recomputed(tiny: Tiny, sample: Sample) -> None:
    model = tiny(vmtc=VMTC(stages=(1, 3))).train()
    model.gradient_checkpointing_enable()
    inputs, called = sample(model), []
    for block in (1, 3):
        attention: Any = model.model.vision_tower.encoder.layers[block].self_attn
        attention.q_proj.register_forward_hook(lambda *_, block=block: called.append(block))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert called == [1, 3, 3, 1]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_compress_as_well(tiny: Tiny, sample: Sample, again: Callable[[Any], Any]) -> None:
    for model in (tiny(), reduced(tiny)):
        assert torch.equal(logits(again(model), **sample(model)), logits(model, **sample(model)))


def test_a_tower_and_its_blocks_are_still_transformers_own(tiny: Tiny) -> None:
    """Code that goes by class or by its name finds them: device maps, FSDP's plans, recorded hidden states."""
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    tower: Any = model.model.vision_tower
    assert isinstance(tower, CLIPVisionModel)
    assert isinstance(tower.encoder.layers[1], CLIPEncoderLayer)
    assert {type(block).__name__ for block in tower.encoder.layers} == {"CLIPEncoderLayer"}
    plain: Any = CLIPVisionModel(model.config.vision_config).eval()
    plain.load_state_dict(tower.state_dict())
    with torch.no_grad():
        found, expected = (encoder(images, output_hidden_states=True) for encoder in (tower, plain))
    assert len(found.hidden_states) == len(expected.hidden_states) == 6
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


def test_models_may_share_a_tower(tiny: Tiny, sample: Sample) -> None:
    one, other = tiny(vmtc=VMTC(stages=(1,))), tiny(vmtc=VMTC(stages=(2,)))
    expected = logits(other, **sample(other))
    other.model.vision_tower = one.model.vision_tower
    assert torch.equal(logits(other, **sample(other)), expected)
    other.model.vision_tower = CLIPVisionModel(other.config.vision_config).eval()
    other.model.vision_tower.load_state_dict(one.model.vision_tower.state_dict())
    assert torch.equal(logits(other, **sample(other)), expected)


@pytest.mark.parametrize("layer", [[-2, -3], -2, -3], ids=str)
def test_a_batch_of_text_alone_needs_no_image(tiny: Tiny, layer: Any) -> None:
    config = {**tiny(vmtc=None).config.to_dict(), "vision_feature_layer": layer}
    model, ids = ReduxForConditionalGeneration(ReduxConfig(**config)).eval(), torch.tensor([[1, 7, 8, 9]])
    found = logits(model, input_ids=ids, pixel_values=torch.zeros(0, 3, 32, 32))
    assert torch.equal(found, logits(model, input_ids=ids))


def map_of(model: Any, place: Callable[[int], Any]) -> dict[str, Any]:
    """A device map: of each leaf block of the model, by its number."""
    blocks = ["model.vision_tower.embeddings", "model.vision_tower.pre_layrnorm", "model.vision_tower.post_layernorm"]
    blocks += [f"model.vision_tower.encoder.layers.{number}" for number in range(5)]
    blocks += ["model.multi_modal_projector", "model.language_model.embed_tokens", "model.language_model.rotary_emb"]
    blocks += [f"model.language_model.layers.{number}" for number in range(len(model.get_decoder().layers))]
    blocks += ["model.language_model.norm", "lm_head"]
    return {block: place(number) for number, block in enumerate(blocks)}


@pytest.mark.parametrize("whole", [True, False], ids=["parts", "blocks"])
def test_weights_that_wait_on_a_disk_give_the_same(tiny: Tiny, sample: Sample, tmp_path: Path, whole: bool) -> None:
    """accelerate's hooks load a part's weights when the part is called, and drop them afterwards."""
    for number, model in enumerate((tiny(vmtc=VMTC(stages=(1, 3), proportional=True)), reduced(tiny))):
        inputs, length = sample(model), {"max_new_tokens": 4, "do_sample": False}
        expected, told = logits(model, **inputs), model.generate(**inputs, **length)
        parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
        places = (
            map_of(model, lambda number: "disk" if number % 2 else "cpu") if whole else dict.fromkeys(parts, "disk")
        )
        if not whole:
            places["lm_head"] = "cpu"
        dispatched = dispatch_model(
            model, places, main_device="cpu", offload_dir=tmp_path / str(number), force_hooks=True
        )
        assert torch.equal(logits(dispatched, **inputs), expected)
        assert torch.equal(dispatched.generate(**inputs, **length), told)


def test_a_device_map_is_found_when_a_model_is_loaded(tiny: Tiny, sample: Sample, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    for places in ("auto", map_of(model, lambda number: "disk" if number % 3 else "cpu")):
        loaded = ReduxForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
        )
        assert torch.equal(logits(loaded.eval(), **sample(model)), logits(model, **sample(model)))


@pytest.mark.parametrize("is_baseline", [False, True], ids=["vmtc", "prumerge"])
def test_what_belongs_to_a_call_travels_with_it_to_other_devices(tiny: Tiny, sample: Sample, is_baseline: bool) -> None:
    """The second half of tower and decoder lies on "meta", which computes shapes and refuses other devices."""
    model = reduced(tiny) if is_baseline else tiny(vmtc=VMTC(stages=(1, 3), proportional=True, similarity="keys"))
    tower, decoder = model.model.vision_tower, model.get_decoder()
    away: list[Any] = [*tower.encoder.layers[2:], model.model.multi_modal_projector]
    for module in away:
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta", place_submodules=True))
    with torch.no_grad():
        features, assignment = model.model.encode_images(sample(model)["pixel_values"])
    assert {tensor.device.type for tensor in (features, *assignment)} == {"meta"}
    other = tiny(vmtc=None)
    decoder = other.get_decoder()
    for module in (*decoder.layers[1:], decoder.norm, other.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta", place_submodules=True))
    assert logits(other, **sample(other), use_cache=False).device.type == "meta"


def test_an_inhibition_is_copied_once_to_a_device() -> None:
    inhibition = Inhibition.for_forward(
        CMAI(), 3, torch.tensor([[False, True, True, False, False]]), None, training=False
    )
    assert inhibition is not None
    moved = send_to_device({"inhibition": inhibition}, "meta")["inhibition"]
    assert {tensor.device.type for tensor in (moved.is_image, moved.columns, moved.valid)} == {"meta"}
    assert (moved.gammas, moved.first_text_row, moved.cmai) == (
        inhibition.gammas,
        inhibition.first_text_row,
        inhibition.cmai,
    )
    assert inhibition.to("meta") is moved
    assert inhibition.to("cpu") is inhibition


def replica(model: Any) -> Any:
    """A copy as nn.DataParallel makes it for a thread: it shares hooks and attributes, and has its own weights."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            setattr(twin, name, child if child is None else twins[child])
        for name, weight in module._parameters.items():
            setattr(twin, name, weight if weight is None else weight.detach().clone())
        for name, buffer in module._buffers.items():
            setattr(twin, name, buffer)
    return twins[model]


def test_replicas_in_threads_give_what_the_model_gives(tiny: Tiny, sample: Sample) -> None:
    model = tiny()
    parts = [sample(model, seed=seed) for seed in (0, 1)]
    parts[1]["input_ids"] = parts[1]["input_ids"].flip(1)
    expected = [logits(model, **part) for part in parts]
    both, found = threading.Barrier(2, timeout=60), [torch.empty(0), torch.empty(0)]

    def hold(*_: Any) -> None:
        both.wait()

    model.model.vision_tower.register_forward_hook(hold)
    replicas = [replica(model) for _ in parts]
    for weight in model.parameters():
        torch.nn.init.constant_(weight, torch.nan)  # A replica that reads these is told

    def work(number: int) -> None:
        found[number] = logits(replicas[number], **parts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, alone in zip(found, expected, strict=True):
        assert torch.equal(own, alone)
