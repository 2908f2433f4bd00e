"""Peak memory and time of one layer's attention with CMAI, against the version that holds a map of every head.

    python jobs/bench/inhibition.py

LLaVA-1.5-7B's shape by default: 32 heads of 128, 576 image tokens and 512 text tokens, float32.  Each way runs in a
process of its own; its peak is how far the process grew beyond its inputs (CUDA: what torch allocated).  The result is
printed and added to inhibition.jsonl beside this file; ratios within one run are what can be compared.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from jobs.bench.record import append, each

INHIBITION_WAYS = ("plain", "eager", "weights", "scores")
"""Attention without CMAI; with it on maps of all heads; and redux.cmai by its two kinds of score."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--image", type=int, default=576, help="image tokens, default: %(default)s")
    parser.add_argument("--text", type=int, default=512, help="text tokens, default: %(default)s")
    parser.add_argument("--way", choices=INHIBITION_WAYS, help="measure one way in this process and print it")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.heads, arguments.image, arguments.text)))
        return
    sizes, ways = {"heads": arguments.heads, "image": arguments.image, "text": arguments.text}, {}
    for way, told in each(__file__, INHIBITION_WAYS, **sizes):
        ways[way] = told
        print(f"{way:8} {told['peak_mib']:8.0f} MiB {told['seconds'] * 1e3:8.0f} ms", flush=True)
    append(__file__, **sizes, ways=ways)


def measure(way: str, heads: int, image: int, text: int, repeats: int = 5) -> dict[str, float | str]:
    """Peak of the memory in MiB, median time in seconds, and the device."""
    import torch
    from torch import nn

    from redux.cmai import Inhibition, inhibited_attention
    from redux.settings import CMAI

    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys, width = image + text, 128
    query, key, value = (torch.randn(1, heads, keys, width, device=device) for _ in range(3))
    visible = torch.ones(1, 1, keys, keys, dtype=torch.bool, device=device).tril()
    is_image = (torch.arange(keys, device=device) < image).unsqueeze(0)
    layer = nn.Module()
    layer.layer_idx, layer.num_key_value_groups, layer.is_causal = 1, 1, True  # type: ignore[assignment]

    def run() -> object:
        if way == "eager":
            return eager(query, key, value, visible, image, ratio=0.6)
        cmai = None if way == "plain" else CMAI(scores="scores" if way == "scores" else "weights")
        inhibition = Inhibition.for_forward(cmai, 2, is_image, None, training=False) if cmai else None
        return inhibited_attention(layer, query, key, value, visible, inhibition)

    times = []
    with torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :1], key[:, :1], value[:, :1]
        )  # what torch loads once
        before = _now(device)
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return {"peak_mib": (_peak(device) - before) / 2**20, "seconds": statistics.median(times), "device": device}


def eager(query, key, value, visible, image: int, ratio: float):  # type: ignore[no-untyped-def]
    """CMAI as one would write it first: the weights of all heads, their mean, the mask, and all weights once more."""
    import torch

    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1)
    mean = weights.mean(dim=1)
    t2i, t2t = mean[:, image:, :image], mean[:, image:, image:]
    focus = t2t.tril(-1) @ t2i + t2i
    below = focus < focus.quantile(ratio, dim=-1, keepdim=True, interpolation="lower")
    scores[:, :, image:, :image] = scores[:, :, image:, :image].masked_fill(below.unsqueeze(1), -torch.inf)
    return scores.softmax(dim=-1) @ value


def _now(device: str) -> int:
    """Bytes in use; the peak is counted from here."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is in use
    return _status("VmRSS")


def _peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
