"""Speed of VMTC and CMAI on one GPU, plain and fused, as ratios to LLaVA; the tests marked `gpu` run before.

    python jobs/bench/gpu.py [--out FILE] [--tiny] [--only SECTION ...] [--limit SECONDS] [--profile FOLDER]

It runs from a checkout, without an installed package and without downloads: torch, transformers and what `import redux`
needs are enough. Weights and data are random, in bf16; shapes are those of CLIP-L/14-336 and LLaMA-7B. Variants are
timed in turn, round after round, so that clocks and order affect all of them alike; a ratio is the median over rounds,
with its quartiles. The record is a dated line of gpu.jsonl beside this file, written again after each section.
"""

import argparse
import logging
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Without an installed package, Python finds the checkout only here.
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from jobs.bench.gpu_speed.decoding import time_compiled_decoding, time_decoding  # noqa: E402
from jobs.bench.gpu_speed.shapes import FULL_SHAPES, TINY_SHAPES  # noqa: E402
from jobs.bench.gpu_speed.table import build_table, print_table  # noqa: E402
from jobs.bench.gpu_speed.timing import Bench, describe_error  # noqa: E402
from jobs.bench.gpu_speed.training import time_layer, time_tower, time_training  # noqa: E402
from jobs.bench.record import add_out_option, append_record  # noqa: E402

TEST_LIMIT_S = 150
"""Seconds after which the tests are stopped, so that time remains for the table."""


def run_tests(bench: Bench) -> None:
    """Run the tests marked `gpu` in a process of their own, and record the summary."""
    # Only files with such tests: others import packages that a machine for benchmarks may lack.
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        bench.results["tests"] = {"summary": "no tests"}
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", *map(str, files)]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_LIMIT_S)
        output = ended.stdout + ended.stderr
    except subprocess.TimeoutExpired as expired:
        # Bytes even with text=True.
        output = f"{(expired.stdout or b'').decode(errors='replace')}\nstopped after {TEST_LIMIT_S} s"
    print(output[-6000:], flush=True)
    lines = output.strip().splitlines()
    bench.results["tests"] = {
        "summary": lines[-1] if lines else "",
        "failed": [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "tests": run_tests,
    "tower": time_tower,
    "layer": time_layer,
    "train": time_training,
    "decode": time_decoding,
    "compiled": time_compiled_decoding,
}


class MessageCollector(logging.Handler):
    """Collect what the library logs about its choice of kernels."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        print(record.getMessage(), flush=True)


def describe_gpu(bench: Bench) -> dict[str, str]:
    """Describe card, versions and commit."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:
        commit = ""  # No git on this machine
    return {
        "card": torch.cuda.get_device_name() if bench.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "commit": commit,
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_out_option(parser, __file__)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to check the script on a CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--limit",
        type=float,
        default=420,
        metavar="SECONDS",
        help="start no section after this time, default: %(default)s",
    )
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write a profile of each variant there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; 1 if one of them failed as a whole."""
    options = parse_arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(TINY_SHAPES if options.tiny else FULL_SHAPES, device, options.profile)
    if device == "cpu":
        torch.set_num_threads(1)  # Tensors of these sizes are slower by threads
    collector = MessageCollector()
    logger = logging.getLogger("redux")
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    machine = describe_gpu(bench)
    start_time = time.perf_counter()
    seconds: dict[str, float] = {}
    length_before = options.out.stat().st_size if options.out.exists() else 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, section in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        section_start = time.perf_counter()
        if section_start - start_time > options.limit:
            bench.results[name] = {"error": f"not started: {options.limit:.0f} s had passed"}
            continue
        try:
            section(bench)
        except Exception as error:
            traceback.print_exc()
            bench.results[name] = {"error": describe_error(error)}
        seconds[name] = round(time.perf_counter() - section_start, 1)
        print(f"{name}: {seconds[name]} s, {time.perf_counter() - start_time:.0f} s in all", flush=True)
        bench.free_memory()
        # The line of this run is replaced after each section.
        if options.out.exists():
            with options.out.open("r+") as file:
                file.truncate(length_before)
        record = {**machine, "tiny": options.tiny, "seconds": seconds, "kernels": collector.messages}
        append_record(options.out, **record, table=build_table(bench), results=bench.results)
    print_table(bench)
    logger.removeHandler(collector)
    return int(any("error" in result for result in bench.results.values()))


if __name__ == "__main__":
    sys.exit(main())
