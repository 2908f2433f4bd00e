"""Measure padding with and without packing, and the tokens that a small model trains per second of CPU.

    python jobs/bench/packing.py

Padding is measured on lengths like those of LLaVA-1.5's mix665k, whose parts have 665,298 samples together. The text
lengths of a part are drawn from a log-normal distribution, whose median and spread are estimates. Micro-batches are
divided by lengths with errors, as the index gives them, and laid out by true ones.

Packers of other projects get the same lengths, without errors. A pack of theirs is a row. Packs come in a random order,
as their samplers draw them, and RANKS ranks compute a micro-batch each at the same time. Two costs are compared: the
padding, if the rows of a micro-batch are padded to the longest, and the share of the time that ranks wait for the one
with the most tokens. Both packages are optional, and only their packers are imported:

    pip install --no-deps binpacking lmms_engine

    ms-swift            its packer, which calls binpacking for 1,000 samples at a time and keeps the last pack
    lmms-engine-*       its online packers with their defaults

The speed is that of forward and backward passes of a LLaVA whose lengths are a ninth of these. One thread computes, and
times are CPU times, which a busy machine changes little. Packed and other steps take turns. The micro-batches of other
packers are trained by the same model: their speed is that of the CPU, and that of RANKS ranks that wait for the slowest
one of each step. The script prints the
result and appends it to packing.jsonl.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jobs.bench.record import add_out_option, append_record
from pipelines.data.packing import divide_evenly, join_rows, lay_rows

if TYPE_CHECKING:
    from pipelines.training.engine import LlavaWithLoss

GLOBAL_BATCH = 128
MAX_TOKENS = 2048
ESTIMATE_ERROR = 0.1
"""Standard deviation of the logarithm of an estimated text length."""

PACKED_LAYOUTS = ((4, 4096), (8, 8192), (16, 4096), (16, 16384))
"""Micro-batch size and packing.max_length."""

SPEED_SCALE = 9
"""Divisor of lengths for the small model, whose images have 288 / 9 tokens."""

SPEED_VOCABULARY, SPEED_IMAGE_ID = 1000, 999
"""Words of the small model, and the token that stands for an image."""

RANKS = 8
SWIFT_SAMPLES = 1000
"""Samples that ms-swift 4.6 packs together (`PackingDataset.PACKING_BATCH_SIZE`)."""

LMMS_STRATEGIES = ("first_fit", "best_fit", "balanced")

Batches = list[dict[str, Any]]
Packer = Callable[[list[int], int], Iterator[list[int]]]
"""Function from lengths and max_length to packs: lists of lengths."""


class PeerLayout(NamedTuple):
    """Layout of micro-batches that have about as many tokens with each packer.

    Args:
        micro_batch_size: samples of a micro-batch of Redux.
        max_length: maximum tokens of a row.
        rows: packs in a micro-batch of the other packers.
    """

    micro_batch_size: int
    max_length: int
    rows: int


PEER_LAYOUTS = (PeerLayout(16, 4096, 3), PeerLayout(8, 8192, 1))


class MixturePart(NamedTuple):
    """Part of the mixture.

    Args:
        samples: number of its conversations.
        median: estimated median of their text tokens.
        spread: estimated standard deviation of the logarithm of their text tokens.
        has_image: False for text only.
    """

    samples: int
    median: int
    spread: float
    has_image: bool = True


MIX665K = {
    "LLaVA-Instruct": MixturePart(157_712, 330, 0.4),
    "ShareGPT": MixturePart(40_688, 1400, 0.6, has_image=False),
    "VQAv2": MixturePart(82_783, 200, 0.5),
    "GQA": MixturePart(72_140, 330, 0.6),
    "OKVQA": MixturePart(8_998, 60, 0.4),
    "OCR-VQA": MixturePart(80_000, 160, 0.4),
    "A-OKVQA": MixturePart(66_160, 110, 0.5),
    "TextCaps": MixturePart(21_953, 70, 0.3),
    "RefCOCO": MixturePart(48_447, 500, 0.6),
    "Visual Genome": MixturePart(86_417, 550, 0.6),
}


class DrawnLengths(NamedTuple):
    """Lengths of conversations.

    Args:
        text: tokens of the text.
        has_image: True for each with an image.
        estimated: tokens of the text as the index tells them.
    """

    text: np.ndarray
    has_image: np.ndarray
    estimated: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="padding,peers,speed,peers-speed", help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=400, help="global batches of the simulation, %(default)s")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each kind, default: %(default)s")
    parser.add_argument("--peer-steps", type=int, default=6, help="global batches of each packer, default: %(default)s")
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    samples = arguments.batches * GLOBAL_BATCH
    measured: dict[str, Any] = {}
    if "padding" in parts:
        measured["padding"] = compare_paddings(samples)
    if "peers" in parts:
        measured["peers"] = compare_packers(samples)
    if "speed" in parts:
        measured["tokens_per_cpu_second"] = compare_speeds(arguments.steps)
    if "peers-speed" in parts:
        measured["peers_speed"] = compare_packer_speeds(arguments.peer_steps * GLOBAL_BATCH)
    append_record(arguments.out, global_batch_size=GLOBAL_BATCH, **measured)


def compare_paddings(samples: int) -> list[dict[str, Any]]:
    """Compare the padding with and without packing, for several layouts."""
    padding = []
    for image_tokens in (576, 288):
        lengths = draw_lengths(samples)
        for micro_batch_size, max_length in PACKED_LAYOUTS:
            shares = measure_padding(lengths, image_tokens, micro_batch_size, max_length)
            padding.append(
                {"image_tokens": image_tokens, "micro_batch_size": micro_batch_size, "max_length": max_length, **shares}
            )
            print(
                f"{image_tokens} image tokens, micro-batch {micro_batch_size:2}, rows of {max_length:5}: "
                f"padding {shares['packed']:6.2%}, without packing {shares['unpacked']:6.2%}; "
                f"largest micro-batch / mean {shares['largest']:.2f}, without packing {shares['largest_unpacked']:.2f}",
                flush=True,
            )
    return padding


def compare_speeds(steps: int) -> dict[str, dict[str, float]]:
    """Compare the tokens per second of CPU with and without packing."""
    speed = {}
    for has_cmai in (True, False):
        name = "CMAI" if has_cmai else "without CMAI"
        speed[name] = measure_speed(steps, has_cmai)
        print(
            f"{name}: {speed[name]['packed']:.0f} tokens/s packed, {speed[name]['unpacked']:.0f} without packing, "
            f"ratio {speed[name]['ratio']:.2f}",
            flush=True,
        )
    return speed


def draw_lengths(samples: int, seed: int = 0) -> DrawnLengths:
    """Draw the lengths of samples of the mixture."""
    rng = np.random.default_rng(seed)
    parts = list(MIX665K.values())
    counts = np.array([part.samples for part in parts])
    part_index = rng.choice(len(parts), samples, p=counts / counts.sum())
    median, spread, has_image = (
        np.array([getattr(part, name) for part in parts])[part_index] for name in ("median", "spread", "has_image")
    )
    text = (median * np.exp(spread * rng.standard_normal(samples))).astype(np.int64) + 8
    estimated = (text * np.exp(ESTIMATE_ERROR * rng.standard_normal(samples))).astype(np.int64)
    return DrawnLengths(text, has_image, estimated)


def count_tokens(lengths: DrawnLengths, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the tokens of samples with their images, and estimate them as the readers do; both up to the maximum."""
    texts = (lengths.text, lengths.estimated)
    tokens, estimated = (np.minimum(text + image_tokens * lengths.has_image, MAX_TOKENS) for text in texts)
    return tokens, estimated


def measure_padding(
    lengths: DrawnLengths, image_tokens: int, micro_batch_size: int, max_length: int
) -> dict[str, float]:
    """Measure the share of padding among the tokens that are computed, and the largest micro-batch of a step.

    Returns:
        packed, unpacked: share of padding. largest, largest_unpacked: computed tokens of the largest micro-batch of a
        global batch, divided by their mean; a mean over global batches.
    """
    tokens, estimated = count_tokens(lengths, image_tokens)
    packed, unpacked = [], []
    for start in range(0, len(tokens), GLOBAL_BATCH):
        batch = tokens[start : start + GLOBAL_BATCH]
        parts = divide_evenly(estimated[start : start + GLOBAL_BATCH].tolist(), GLOBAL_BATCH // micro_batch_size)
        packed.append([count_computed_tokens(batch[part].tolist(), max_length) for part in parts])
        unpacked.append((batch.reshape(-1, micro_batch_size).max(axis=1) * micro_batch_size).tolist())
    computed = {"packed": np.array(packed), "unpacked": np.array(unpacked)}
    shares = {name: round(1 - float(tokens.sum() / values.sum()), 5) for name, values in computed.items()}
    largest = {name: float((values.max(axis=1) / values.mean(axis=1)).mean()) for name, values in computed.items()}
    return {**shares, "largest": round(largest["packed"], 3), "largest_unpacked": round(largest["unpacked"], 3)}


def count_computed_tokens(lengths: Sequence[int], max_length: int) -> int:
    """Count the tokens of a packed micro-batch with its padding."""
    rows = lay_rows(lengths, max_length)
    return len(rows) * max(sum(lengths[index] for index in row) for row in rows)


# --- packers of other projects ----------------------------------------------------------------------------------------


def compare_packers(samples: int, image_tokens: int = 576) -> list[dict[str, Any]]:
    """Compare the padding and the waiting of packers on the same lengths."""
    lengths = draw_lengths(samples)
    tokens, estimated = count_tokens(lengths, image_tokens)
    results = []
    for layout in PEER_LAYOUTS:
        measured = {}
        for name, micro_batches in iterate_packers(tokens, estimated, layout):
            measured[name] = shares = measure_micro_batches(micro_batches)
            print(
                f"{name:22} rows of {layout.max_length}: padding {shares['padding']:6.2%}, "
                f"waiting {shares['waiting']:6.2%}",
                flush=True,
            )
        results.append({**layout._asdict(), "packers": measured})
    return results


def iterate_packers(
    tokens: np.ndarray, estimated: np.ndarray, layout: PeerLayout
) -> Iterator[tuple[str, list[list[list[int]]]]]:
    """Yield the name of each packer and its micro-batches: lists of rows, which are lists of lengths."""
    yield "redux", pack_global_batches(tokens, estimated, layout)
    for name, packer in load_packers().items():
        packs = list(packer(tokens.tolist(), layout.max_length))
        if sum(map(sum, packs)) != tokens.sum() or any(sum(pack) > layout.max_length for pack in packs):
            raise RuntimeError(
                f"{name}: got packs with other tokens, allowed: each sample once, within {layout.max_length}"
            )
        np.random.default_rng(2).shuffle(packs)
        yield (
            name,
            [packs[start : start + layout.rows] for start in range(0, len(packs) - layout.rows + 1, layout.rows)],
        )


def pack_global_batches(tokens: np.ndarray, estimated: np.ndarray, layout: PeerLayout) -> list[list[list[int]]]:
    """Pack global batches as Redux does. Returns micro-batches, lists of rows, which are lists of lengths."""
    micro_batches = []
    for start in range(0, len(tokens), GLOBAL_BATCH):
        batch = tokens[start : start + GLOBAL_BATCH]
        parts = divide_evenly(estimated[start : start + GLOBAL_BATCH].tolist(), GLOBAL_BATCH // layout.micro_batch_size)
        for part in parts:
            lengths = batch[part].tolist()
            micro_batches.append([[lengths[index] for index in row] for row in lay_rows(lengths, layout.max_length)])
    return micro_batches


def measure_micro_batches(micro_batches: list[list[list[int]]]) -> dict[str, float]:
    """Measure padding and waiting.

    Args:
        micro_batches: lists of rows, which are lists of lengths. Ranks compute RANKS of them at the same time.
    """
    rows = [[sum(row) for row in micro_batch] for micro_batch in micro_batches]
    computed = np.array([len(lengths) * max(lengths) for lengths in rows], float)
    padding = 1 - sum(map(sum, rows)) / computed.sum()
    turns = computed[: len(computed) // RANKS * RANKS].reshape(-1, RANKS)
    waiting = 1 - turns.sum() / (RANKS * turns.max(axis=1).sum())
    return {"padding": round(float(padding), 5), "waiting": round(float(waiting), 5)}


def load_packers() -> dict[str, Packer]:
    """Load the packers of other projects that are installed."""
    packers: dict[str, Packer] = {}
    if importlib.util.find_spec("binpacking"):
        packers["ms-swift"] = pack_like_swift
    engine_spec = importlib.util.find_spec("lmms_engine")
    if engine_spec and engine_spec.submodule_search_locations:
        build = _import_packing(
            Path(engine_spec.submodule_search_locations[0], "datasets", "packing")
        ).build_online_packer
        packers |= {f"lmms-engine-{name}": partial(pack_online, partial(build, name)) for name in LMMS_STRATEGIES}
    return packers


def _import_packing(folder: Path) -> Any:
    """Import a package by its folder: the packages above it import DeepSpeed's peers, which the packers do not need."""
    spec = importlib.util.spec_from_file_location(
        "lmms_engine_packing", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec
    assert spec.loader
    module = sys.modules["lmms_engine_packing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack_like_swift(lengths: list[int], max_length: int) -> Iterator[list[int]]:
    """Pack with binpacking as ms-swift does: chunks of samples, of which the last pack goes on to the next chunk."""
    import binpacking  # type: ignore[import-not-found]

    leftover: list[int] = []
    for start in range(0, len(lengths), SWIFT_SAMPLES):
        *packs, leftover = binpacking.to_constant_volume(
            [*leftover, *lengths[start : start + SWIFT_SAMPLES]], max_length
        )
        yield from packs
    yield leftover


def pack_online(build: Callable[[int], Any], lengths: list[int], max_length: int) -> Iterator[list[int]]:
    """Pack with an online packer of lmms-engine, which `build` makes for a maximum length."""
    packer = build(max_length)
    for length in lengths:
        yield from packer.add(length, length)
    yield from packer.flush()


# --- speed ------------------------------------------------------------------------------------------------------------


def measure_speed(steps: int, has_cmai: bool, micro_batch_size: int = 8, batch_size: int = 32) -> dict[str, float]:
    """Measure the tokens without padding that forward and backward passes compute per second of CPU.

    Returns:
        packed, unpacked: tokens per second; medians over steps. ratio: their ratio.
    """
    import torch

    torch.set_num_threads(1)
    module = build_speed_model(has_cmai)
    image_tokens = module.llava.config.image_seq_length
    all_conversations = make_conversations(steps * batch_size, image_tokens)
    speeds: dict[str, list[float]] = {"packed": [], "unpacked": []}
    for step in range(steps):
        conversations = all_conversations[step * batch_size : (step + 1) * batch_size]
        total = sum(len(conversation["input_ids"]) for conversation in conversations)
        kinds = {"packed": pack(conversations, micro_batch_size), "unpacked": cut(conversations, micro_batch_size)}
        for kind, batches in kinds.items():
            start = time.process_time()
            train_step(module, batches)
            speeds[kind].append(total / (time.process_time() - start))
    speed = {kind: statistics.median(values) for kind, values in speeds.items()}
    return {**speed, "ratio": speed["packed"] / speed["unpacked"]}


def compare_packer_speeds(samples: int) -> list[dict[str, Any]]:
    """Compare the tokens per second that a LLaVA without CMAI trains from the micro-batches of each packer.

    Returns:
        For each layout and packer: cpu_tokens_per_second, tokens per second of CPU; rank_tokens_per_second, the same
        with the time in which RANKS ranks wait for the slowest one of a step.
    """
    import torch

    torch.set_num_threads(1)
    module = build_speed_model(has_cmai=False)
    image_tokens = module.llava.config.image_seq_length
    conversations = make_conversations(samples, image_tokens)
    tokens = np.array([len(conversation["input_ids"]) for conversation in conversations])
    error = np.random.default_rng(3).normal(0, ESTIMATE_ERROR, samples)
    estimated = np.rint(tokens * np.exp(error)).astype(int)
    results = []
    for layout in PEER_LAYOUTS:
        layout = layout._replace(max_length=layout.max_length // SPEED_SCALE)
        measured = {}
        for name, micro_batches in iterate_packers(tokens, estimated, layout):
            measured[name] = speeds = measure_packer_speed(module, conversations, micro_batches)
            print(
                f"{name:22} rows of {layout.max_length}: {speeds['cpu_tokens_per_second']:6.0f} tokens/s of CPU, "
                f"{speeds['rank_tokens_per_second']:6.0f} per rank with waiting",
                flush=True,
            )
        results.append({**layout._asdict(), "packers": measured})
    return results


def measure_packer_speed(
    module: "LlavaWithLoss", conversations: list[dict[str, np.ndarray]], micro_batches: list[list[list[int]]]
) -> dict[str, float]:
    """Measure the speed of the micro-batches of a packer, in whole steps of RANKS ranks."""
    by_length: dict[int, list[dict[str, np.ndarray]]] = {}
    for conversation in conversations:
        by_length.setdefault(len(conversation["input_ids"]), []).append(conversation)
    steps = len(micro_batches) // RANKS
    seconds, tokens = [], 0
    for rows in micro_batches[: steps * RANKS]:
        # Packers see lengths alone, so any conversation of a length will do.
        members = [by_length[length].pop() for row in rows for length in row]
        ends = np.cumsum([len(row) for row in rows]).tolist()
        indices = [list(range(end - len(row), end)) for row, end in zip(rows, ends, strict=True)]
        batch = make_batch(join_rows(members, indices))
        start = time.process_time()
        train_step(module, [batch])
        seconds.append(time.process_time() - start)
        tokens += sum(map(sum, rows))
    slowest = np.reshape(seconds, (steps, RANKS)).max(axis=1)
    return {
        "cpu_tokens_per_second": tokens / sum(seconds),
        "rank_tokens_per_second": tokens / (RANKS * float(slowest.sum())),
    }


def make_conversations(samples: int, image_tokens: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Make conversations of the lengths of the mixture, divided by SPEED_SCALE; text after the maximum is cut."""
    lengths = draw_lengths(samples, seed)
    rng = np.random.default_rng(seed)
    counts = image_tokens * lengths.has_image
    texts = np.minimum(lengths.text // SPEED_SCALE, MAX_TOKENS // SPEED_SCALE - 1 - counts)
    return [make_conversation(int(text), int(count), rng) for text, count in zip(texts, counts, strict=True)]


def build_speed_model(has_cmai: bool) -> "LlavaWithLoss":
    """Build a LLaVA with VMTC whose images have 32 tokens."""
    import torch

    from pipelines.training.engine import LlavaWithLoss
    from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
    from redux.configuration import build_config
    from redux.model import ReduxForConditionalGeneration
    from redux.settings import CMAI

    sizes = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 768}
    settings = ModelSettings(
        tower=TowerSizes(image_size=64, patch_size=8, num_hidden_layers=5, **sizes),
        language=LanguageSizes(num_hidden_layers=6, **sizes),
        cmai=CMAI() if has_cmai else None,
    )
    config = build_config(settings, SPEED_VOCABULARY, bos_token_id=1, eos_token_id=3, pad_token_id=2)
    config.image_token_index = SPEED_IMAGE_ID
    torch.manual_seed(0)
    return LlavaWithLoss(ReduxForConditionalGeneration(config)).train()


def make_conversation(text: int, image_tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make a conversation of random tokens after an image, of which the model learns the second half."""
    ids = np.concatenate([[1], np.full(image_tokens, SPEED_IMAGE_ID), rng.integers(4, SPEED_IMAGE_ID, max(text, 2))])
    labels = np.where(np.arange(len(ids)) < image_tokens + text // 2, -100, ids)
    return {"input_ids": ids, "labels": labels}


def pack(conversations: list[dict[str, np.ndarray]], micro_batch_size: int, max_length: int = 1024) -> Batches:
    """Pack conversations into micro-batches."""
    lengths = [len(conversation["input_ids"]) for conversation in conversations]
    batches = []
    for part in divide_evenly(lengths, len(conversations) // micro_batch_size):
        members = [conversations[index] for index in part]
        batches.append(make_batch(join_rows(members, lay_rows([lengths[index] for index in part], max_length))))
    return batches


def cut(conversations: list[dict[str, np.ndarray]], micro_batch_size: int) -> Batches:
    """Cut conversations into micro-batches without packing."""
    starts = range(0, len(conversations), micro_batch_size)
    return [make_batch(conversations[start : start + micro_batch_size]) for start in starts]


def make_batch(rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Make a micro-batch as `ingest.Reader` does, with black images."""
    import torch

    from pipelines.data.ingest import pad_columns

    columns = pad_columns(rows, pad_token_id=2)
    images = int((columns["input_ids"] == SPEED_IMAGE_ID).sum()) // 32
    if "position_ids" in columns:
        del columns["attention_mask"]
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    return {**tensors, "pixel_values": torch.zeros(images, 3, 64, 64), "weight": torch.full((64,), 1e-3)}


def train_step(module: "LlavaWithLoss", batches: Batches) -> None:
    """Compute the gradient of micro-batches."""
    for batch in batches:
        rows = len(batch["input_ids"])
        weight = batch["weight"] if "sample_index" in batch else batch["weight"][:rows]
        module(**{**batch, "weight": weight}).backward()
    module.zero_grad()


if __name__ == "__main__":
    main()
