"""Measure peak memory and time of one layer's attention with CMAI, against a version that holds a map of every head.

    python jobs/bench/inhibition.py

LLaVA-1.5-7B's shape by default: 32 heads of 128, 576 image tokens and 512 text tokens, float32. Each variant runs in a
new process; its peak is the growth of the process beyond its inputs (CUDA: the memory that torch allocated). The
script prints the result and appends it to inhibition.jsonl; only ratios within one run can be compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.bench.record import add_out_option, append_record, measure_variants

INHIBITION_VARIANTS = ("plain", "eager", "weights", "scores")
"""Attention without CMAI, with CMAI on maps of all heads, and redux.cmai with its two kinds of score."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--image", type=int, default=576, help="image tokens, default: %(default)s")
    parser.add_argument("--text", type=int, default=512, help="text tokens, default: %(default)s")
    parser.add_argument(
        "--variant", choices=INHIBITION_VARIANTS, help="measure only this one, in this process, and print it"
    )
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments.heads, arguments.image, arguments.text)))
        return
    sizes = {"heads": arguments.heads, "image": arguments.image, "text": arguments.text}
    results = {}
    for variant, measured in measure_variants(__file__, INHIBITION_VARIANTS, **sizes):
        results[variant] = measured
        print(f"{variant:8} {measured['peak_mib']:8.0f} MiB {measured['seconds'] * 1e3:8.0f} ms", flush=True)
    append_record(arguments.out, **sizes, variants=results)


def measure(variant: str, heads: int, image: int, text: int, repeats: int = 5) -> dict[str, float | str]:
    """Measure the peak of memory in MiB and the median time in seconds; returns both and the device."""
    import torch
    from torch import nn

    from redux.attention import inhibited_attention
    from redux.cmai import Inhibition
    from redux.settings import CMAI

    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys, width = image + text, 128
    query, key, value = (torch.randn(1, heads, keys, width, device=device) for _ in range(3))
    visible = torch.ones(1, 1, keys, keys, dtype=torch.bool, device=device).tril()
    is_image = (torch.arange(keys, device=device) < image).unsqueeze(0)
    layer = nn.Module()
    layer.layer_idx, layer.num_key_value_groups, layer.is_causal = 1, 1, True  # type: ignore[assignment]

    def run() -> object:
        if variant == "eager":
            return attend_with_all_maps(query, key, value, visible, image, ratio=0.6)
        cmai = None if variant == "plain" else CMAI(scores="scores" if variant == "scores" else "weights")
        inhibition = Inhibition.for_forward(cmai, 2, is_image, None, training=False) if cmai else None
        return inhibited_attention(layer, query, key, value, visible, inhibition)

    times = []
    with torch.no_grad():
        # A first call, so that libraries which torch loads at first use are not part of the peak.
        torch.nn.functional.scaled_dot_product_attention(query[:, :1], key[:, :1], value[:, :1])
        base_bytes = _reset_peak(device)
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return {
        "peak_mib": (_read_peak(device) - base_bytes) / 2**20,
        "seconds": statistics.median(times),
        "device": device,
    }


def attend_with_all_maps(query, key, value, visible, image: int, ratio: float):  # type: ignore[no-untyped-def]
    """Compute CMAI in the simplest way: weights of all heads, their mean, the mask, and all weights again."""
    import torch

    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1)
    mean = weights.mean(dim=1)
    t2i, t2t = mean[:, image:, :image], mean[:, image:, image:]
    focus = t2t.tril(-1) @ t2i + t2i
    below = focus < focus.quantile(ratio, dim=-1, keepdim=True, interpolation="lower")
    scores[:, :, image:, :image] = scores[:, :, image:, :image].masked_fill(below.unsqueeze(1), -torch.inf)
    return scores.softmax(dim=-1) @ value


def _reset_peak(device: str) -> int:
    """Reset the peak to the memory in use; returns its bytes."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux resets VmHWM to VmRSS
    return _read_status("VmRSS")


def _read_peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else _read_status("VmHWM")


def _read_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
