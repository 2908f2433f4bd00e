"""Times of the prefill and of a decoded token: by `generate`, by CUDA graph, and compiled."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteriaList

from jobs.bench.gpu_speed.models import build_config, build_inputs, build_model, list_methods, share_weights
from jobs.bench.gpu_speed.timing import Bench, TimedVariant, build_variants
from redux.graph_decoding import PrefilledPrompt, decode_prompt, release_graphs
from redux.model import ReduxForConditionalGeneration


def time_decoding(bench: Bench) -> None:
    """Time the prefill, and the tokens after it, with the cache that `generate` makes."""
    shapes = bench.shapes
    base = build_model(bench, build_config(shapes, shapes.decode_layers)).eval()
    methods = {name: list_methods(shapes)[name] for name in ("VMTC 288", "VMTC+CMAI 288", "VMTC+CMAI 64")}
    models = {"LLaVA": base} | {
        name: share_weights(base, build_config(shapes, shapes.decode_layers, *settings)).eval()
        for name, settings in methods.items()
    }
    for batch in shapes.decode_batches:
        variants = []
        for name, model in models.items():
            inputs = build_inputs(bench, model, batch, shapes.decode_text)
            for phase, tokens in (("prefill", 1), ("all", shapes.new_tokens)):
                run = build_generation(model, inputs, tokens)
                # LLaVA has no fused code.
                choices = build_variants(f"{name}|{phase}", run)
                variants += choices[:1] if name == "LLaVA" else choices
        bench.time_variants("generation", variants, warm_calls=1, settles=False)
        split_generation(bench, f"batch {batch}")
        time_graphs(bench, models, batch)


def time_graphs(bench: Bench, models: dict[str, ReduxForConditionalGeneration], batch: int) -> None:
    """Time the prefill, and the tokens after it, by CUDA graph; the graph of LLaVA, too, is the base of the ratios."""
    variants = []
    for name, model in models.items():
        inputs = build_inputs(bench, model, batch, bench.shapes.decode_text)
        # A model keeps one graph, so it has one choice of kernels; LLaVA's tower, too, runs as a graph.
        for phase, tokens in (("prefill", 1), ("all", bench.shapes.new_tokens)):
            variants.append(TimedVariant(f"{name}|{phase}", "fused", build_graph_generation(model, inputs, tokens)))
    bench.time_variants("generation", variants, warm_calls=1, settles=False)
    split_generation(bench, f"graph batch {batch}")
    # A graph holds the memory of its cache.
    release_graphs()
    bench.free_memory()


def build_graph_generation(
    model: ReduxForConditionalGeneration, inputs: dict[str, Tensor], tokens: int
) -> Callable[[], object]:
    """Build a function that generates greedily by CUDA graph, without an end token; on a CPU, by the same steps."""

    def run() -> object:
        with torch.inference_mode():
            return decode_prompt(model, PrefilledPrompt.run(model, inputs), [], 0, tokens)

    return run


def build_generation(
    model: ReduxForConditionalGeneration, inputs: dict[str, Tensor], tokens: int, **options: Any
) -> Callable[[], object]:
    """Build a function that generates greedily, without an end token."""

    def run() -> object:
        with torch.no_grad():
            return model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
            )

    return run


def split_generation(bench: Bench, group: str) -> None:
    """Turn times of whole generations into times of the prefill and of one decoded token."""
    batch = int(group.split()[-1])
    # A generation of one token is the prefill, and that of many adds their decoding in the same round.
    result = bench.results.pop("generation")
    prefill: dict[str, list[float]] = {}
    decode: dict[str, list[float]] = {}
    for label, times in result["ms"].items():
        name, _, rest = label.partition("|")
        phase, _, choice = rest.partition("/")
        if phase == "prefill":
            totals = result["ms"].get(f"{name}|all/{choice}", [])
            prefill[f"{name}/{choice}"] = times
            decode[f"{name}/{choice}"] = [
                (total - prefill_ms) / (bench.shapes.new_tokens - 1)
                for prefill_ms, total in zip(times, totals, strict=False)
            ]
    bench.results[f"prefill {group}"] = {"ms": prefill, "errors": result["errors"]}
    bench.results[f"decode {group}"] = {
        "ms": decode,
        "errors": result["errors"],
        "tokens_per_s": {
            label: round(batch * 1e3 / statistics.median(times), 1) for label, times in decode.items() if times
        },
    }


def time_compiled_decoding(bench: Bench) -> None:
    """Time a decoded token with StaticCache, which transformers compiles on a GPU; each variant is compiled."""
    shapes = bench.shapes
    methods = {name: list_methods(shapes)[name] for name in ("VMTC 288", "VMTC+CMAI 288")}
    base = build_model(bench, build_config(shapes, shapes.compiled_layers)).eval()
    result: dict[str, Any] = {"ms": {}, "errors": {}, "layers": shapes.compiled_layers}
    for name, settings in {"LLaVA": (None, None), **methods}.items():
        model = share_weights(base, build_config(shapes, shapes.compiled_layers, *settings)).eval()
        inputs = build_inputs(bench, model, 1, shapes.decode_text)
        choice = "plain" if name == "LLaVA" else "fused"
        # The cache has the length of max_new_tokens, so the short call stops early instead of asking for fewer.
        short = StoppingCriteriaList([MaxLengthCriteria(max_length=inputs["input_ids"].shape[1] + 2)])
        variants = [
            TimedVariant(
                f"{name}|{phase}",
                choice,
                build_generation(model, inputs, shapes.new_tokens + 1, cache_implementation="static", **options),
            )
            for phase, options in (("prefill", {"stopping_criteria": short}), ("all", {}))
        ]
        # Compiled code of earlier variants would count towards Dynamo's limit of recompilations.
        torch.compiler.reset()
        bench.time_variants("generation", variants, warm_calls=2)
        part = bench.results.pop("generation")
        result["errors"] |= part["errors"]
        prefills, totals = (part["ms"].get(variant.label, []) for variant in variants)
        pairs = zip(prefills, totals, strict=False)
        per_token = [(total - prefill_ms) / (shapes.new_tokens - 1) for prefill_ms, total in pairs]
        if per_token:
            result["ms"][f"{name}/{choice}"] = per_token
        bench.results["decode compiled"] = result
