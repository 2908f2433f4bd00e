"""Times of what training does: the image tower, one decoder layer, and a whole training step."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.bench.gpu_speed.models import (
    build_config,
    build_inputs,
    build_last_layer,
    build_model,
    list_methods,
    share_weights,
)
from jobs.bench.gpu_speed.timing import CHOICES, Bench, TimedChoice, TimedVariant, build_variants
from redux.kernels import set_kernels
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI, VMTC


def time_tower(bench: Bench) -> None:
    """Time the image tower, inference and forward + backward."""
    shapes, batch = bench.shapes, bench.shapes.images
    budgets = {"288": shapes.half, "64": shapes.few, "36": shapes.fewest}
    base = build_model(bench, build_config(shapes, 1))
    side = shapes.tower["image_size"]
    pixels = torch.randn(batch, 3, side, side, device=bench.device, dtype=torch.bfloat16)
    # Towers share their weights, so that only the compression differs.
    towers = {"off": base} | {
        name: share_weights(base, build_config(shapes, 1, VMTC(tokens=tokens))) for name, tokens in budgets.items()
    }

    def build_run(name: str, trains: bool) -> Callable[[], object]:
        def run() -> None:
            with torch.set_grad_enabled(trains):
                if name == "transformers":
                    features = base.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
                else:
                    features = towers[name].model.encode_images(pixels)[0]
                if trains:
                    features.float().mean().backward()
                    base.zero_grad(set_to_none=True)

        return run

    for group, trains in (("tower inference", False), ("tower forward+backward", True)):
        # Compressing blocks are patched at the first encoding, so the tower of transformers is `off`'s.
        variants = [TimedVariant(name, "plain", build_run(name, trains)) for name in ("transformers", "off")]
        for name in budgets:
            variants += build_variants(name, build_run(name, trains))
        bench.time_variants(group, variants)


def time_layer(bench: Bench) -> None:
    """Time the last of 32 decoder layers, forward + backward, by its attention."""
    for image, text in bench.shapes.layer_sequences:
        bench.free_memory()
        time_layer_of_length(bench, image, text)


def time_layer_of_length(bench: Bench, image: int, text: int) -> None:
    """Time the layer on sequences of image and text tokens, `prefix` of the text before the image."""
    shapes, batch = bench.shapes, bench.shapes.layer_batch
    length = image + text
    ids = torch.full((batch, length), 3, device=bench.device)
    ids[:, shapes.prefix : shapes.prefix + image] = shapes.language["vocab_size"] - 1
    hidden = torch.randn(
        batch, length, shapes.language["hidden_size"], device=bench.device, dtype=torch.bfloat16, requires_grad=True
    )
    methods = {"causal SDPA": None, "CMAI weights": CMAI(), "CMAI scores": CMAI(scores="scores")}
    decoders = {name: build_last_layer(bench, cmai) for name, cmai in methods.items()}
    # Equal weights, so that a sharper attention in one of them makes no difference.
    for decoder in decoders.values():
        decoder.layers[0].load_state_dict(decoders["causal SDPA"].layers[0].state_dict())
    visible = torch.ones(length, length, dtype=torch.bool, device=bench.device).tril().expand(batch, 1, -1, -1)

    def build_run(name: str, choice: TimedChoice, **changes: Any) -> Callable[[], object]:
        # CMAI prepares the arguments of a layer for the kernels that are chosen then.
        set_kernels(CHOICES[choice])
        layer = decoders[name].layers[0]
        arguments = capture_arguments(decoders[name], ids) | changes

        def run() -> None:
            output = layer(hidden, **arguments)
            output = output[0] if isinstance(output, tuple) else output
            output.float().mean().backward()
            hidden.grad = None
            layer.zero_grad(set_to_none=True)

        return run

    variants = [
        TimedVariant("causal SDPA", "plain", build_run("causal SDPA", "plain")),
        TimedVariant("masked SDPA", "plain", build_run("causal SDPA", "plain", attention_mask=visible)),
    ]
    for name in ("CMAI weights", "CMAI scores"):
        variants += [TimedVariant(name, choice, build_run(name, choice)) for choice in CHOICES]
    peaks = {variant.label: bench.measure_peak_gib(variant.run) for variant in variants[:2]}
    bench.time_variants(f"layer {image}+{text}", variants, peak_gib=peaks)


def capture_arguments(decoder: Any, ids: Tensor) -> dict[str, Any]:
    """Capture the keyword arguments with which a language model calls its layers."""
    captured: dict[str, Any] = {}

    def capture(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.update(kwargs)

    handle = decoder.layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    with torch.no_grad():
        decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    handle.remove()
    return captured


def time_training(bench: Bench) -> None:
    """Time a training step with the tower frozen: forward, backward and AdamW, with and without recomputation."""
    shapes = bench.shapes
    base = build_model(bench, build_config(shapes, shapes.train_layers)).train()
    base.model.vision_tower.requires_grad_(False)
    models = {"LLaVA": base} | {
        name: share_weights(base, build_config(shapes, shapes.train_layers, *settings)).train()
        for name, settings in list_methods(shapes).items()
    }
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    # One optimizer for all variants: they share their weights, and a card has no room for more states.
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=bench.device == "cuda")
    steps = {name: build_step(bench, model, optimizer) for name, model in models.items()}
    peak = measure_matmul_peak(bench)
    flops = {name: count_step_flops(bench, model) for name, model in models.items()}
    for group, recomputes in (("train", False), ("train checkpointing", True)):
        for model in models.values():
            if recomputes:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        variants = [TimedVariant("LLaVA", "plain", steps["LLaVA"])]
        for name in list_methods(shapes):
            variants += build_variants(name, steps[name])
        bench.time_variants(group, variants, matmul_tflops=round(peak / 1e12, 1))
        result = bench.results[group]
        result["utilisation"] = {
            label: round(flops[label.partition("/")[0]] / (statistics.median(times) / 1e3) / peak, 4)
            for label, times in result["ms"].items()
        }
        result["peak_gib"] = {
            variant.label: bench.measure_peak_gib(variant.run) for variant in variants if variant.label in result["ms"]
        }


def build_step(
    bench: Bench, model: ReduxForConditionalGeneration, optimizer: torch.optim.Optimizer
) -> Callable[[], object]:
    """Build a function that does one training step, with labels on the last half of the text."""
    text = bench.shapes.train_text
    inputs = build_inputs(bench, model, bench.shapes.train_batch, text)
    labels = inputs["input_ids"][:, 1:].clone()
    labels[:, : -text // 2] = -100
    # Logits are computed only where there is a label, as in a stage.
    learned = labels != -100

    def step() -> None:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][learned]).float(), labels[learned])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count_step_flops(bench: Bench, model: ReduxForConditionalGeneration) -> float:
    """Count the model FLOPs of the language layers in a training step, as for causal attention, none recomputed."""
    shapes, batch = bench.shapes, bench.shapes.train_batch
    length = shapes.prefix + model.config.image_seq_length + shapes.train_text
    weights = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    attention = 6 * shapes.train_layers * shapes.language["hidden_size"] * length**2 * batch
    return 6.0 * batch * length * weights + attention


def measure_matmul_peak(bench: Bench) -> float:
    """Measure the FLOPs per second of a large bf16 product, the median of ten."""
    side = bench.shapes.product
    left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    # The first products load the library and raise the clocks.
    times = [bench.time_call(lambda: left @ right) for _ in range(13)][3:]
    return 2 * side**3 / (statistics.median(times) / 1e3)
