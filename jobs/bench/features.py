"""Measure stored features beside images: bytes of a sample, and CPU time of a micro-batch until the projector.

    python jobs/bench/features.py

The tower has the sizes of ViT-B/16 at 224 pixels with random weights, and VMTC's defaults. Images are JPEGs of 640 x
480. Micro-batches of images are decoded and encoded, those of features are read. Both take turns in one thread, and
times are CPU times, which a busy machine changes little. The script prints the result and appends it to features.jsonl.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from jobs.bench.record import add_out_option, append_record

if TYPE_CHECKING:
    from pipelines.training.plan import StagePlan
    from redux.model import ReduxForConditionalGeneration

MICRO_BATCH, HEIGHT, WIDTH = 4, 480, 640

LARGE_TOKENS, LARGE_WIDTH, BF16_BYTES = 288, 1024, 2
"""Tokens of an image of CLIP-ViT-L/14 at 336 pixels with VMTC's defaults, values of a token, and bytes of a value."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24, help="number of images, default: %(default)s")
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    import torch

    from pipelines.core import cluster
    from pipelines.data.shard_index import Shards
    from pipelines.training import feature_writer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, cluster.open_session():
        folder = Path(name)
        make_set(folder, arguments.images)
        plan, llava = build_plan(folder)
        # The features are written by the tower that the other readers then have to run.
        form = feature_writer.describe_format(llava.model, image_aspect_ratio="pad", image_backend="exact")
        feature_writer.write_features(str(folder / "set"), str(folder / "features"), llava.model, form)
        speed = measure_reading(plan, llava, str(folder / "features"), arguments.images // MICRO_BATCH)
        jpeg = float(Shards(folder / "set").image_sizes.mean())
    sizes = {
        "jpeg": round(jpeg),
        "pixels": 3 * form.image_size**2,
        "features": form.record_bytes,
        "features_of_vit_l_bf16": LARGE_TOKENS * LARGE_WIDTH * BF16_BYTES,
    }
    print(f"bytes of an image: {sizes}")
    print(", ".join(f"{kind}: {value:.4g} ms of CPU per image" for kind, value in speed.items()))
    append_record(arguments.out, images=arguments.images, bytes_per_image=sizes, cpu_ms_per_image=speed)


def make_set(folder: Path, images: int) -> None:
    """Make the set of smooth random images, and a tokenizer of its words."""
    from pipelines.data.options import ShardOptions
    from pipelines.data.shard_writer import make_shards
    from redux.conversation import IMAGE_TOKEN, train_word_tokenizer

    noise = np.random.default_rng(0)
    records = []
    for number in range(images):
        # A photo's JPEG is smaller than that of noise: enlarge a small image.
        small = Image.fromarray(noise.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
        sink = io.BytesIO()
        small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(sink.getvalue())
        turns = [
            {"from": "human", "value": f"{IMAGE_TOKEN}\nwhich number?"},
            {"from": "gpt", "value": str(number)},
        ]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    make_shards(records, str(folder), str(folder / "set"), ShardOptions(samples_per_shard=8))
    train_word_tokenizer([json.dumps(records)], 512).save_pretrained(folder / "tokenizer")


def build_plan(folder: Path) -> "tuple[StagePlan, ReduxForConditionalGeneration]":
    """Build a stage with a frozen tower, and its model, whose language model is small."""
    import torch
    from transformers import AutoTokenizer

    from pipelines.training.plan import StagePlan
    from pipelines.training.stage import Stage
    from redux.architecture import LanguageSizes, ModelSettings, TowerSizes, count_image_tokens
    from redux.model import build_model

    # The sizes of ViT-B/16; the language model only has to exist.
    base: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ModelSettings(
        tower=TowerSizes(image_size=224, patch_size=16, intermediate_size=3072, **base),
        language=LanguageSizes(intermediate_size=32, **small),
    )
    stage = Stage(
        objective="language",
        data="set",
        template="plain",
        epochs=1,
        global_batch_size=MICRO_BATCH,
        micro_batch_size=MICRO_BATCH,
        learning_rate={"projector": 1e-4, "language": 1e-4},
    )
    plan = StagePlan(
        name="stage",
        stage=stage,
        model=model,
        seed=0,
        workers=(1, 1),
        run=folder,
        checkpoints=str(folder),
        sets={"set": str(folder / "set")},
        max_bad_fraction=0,
        tokenizer=folder / "tokenizer",
        start=None,
        image_size=224,
        image_tokens=count_image_tokens(model),
    )
    torch.manual_seed(0)
    return plan, build_model(model, AutoTokenizer.from_pretrained(plan.tokenizer)).eval()


def measure_reading(
    plan: "StagePlan", llava: "ReduxForConditionalGeneration", features: str, batches: int
) -> dict[str, float]:
    """Measure the CPU time of an image in milliseconds: medians over micro-batches.

    Returns:
        decode: read and decode. tower: encode. features: read them. ratio: the sum of the first two, divided by the
        third.
    """
    from types import SimpleNamespace

    import torch

    from pipelines.training.engine import move_to_device

    engine: Any = SimpleNamespace(module=llava, device=torch.device("cpu"))
    readers = {"images": plan.build_reader(), "features": replace(plan, features={"set": features}).build_reader()}
    times: dict[str, list[float]] = {"decode": [], "tower": [], "features": []}
    for number in range(batches):
        start = time.process_time()
        batch = readers["images"](number)
        decode_end = time.process_time()
        with torch.no_grad():
            llava.model.encode_images(move_to_device(batch, engine)["pixel_values"])
        encode_end = time.process_time()
        move_to_device(readers["features"](number), engine)
        read_end = time.process_time()
        times["decode"].append(1000 * (decode_end - start) / MICRO_BATCH)
        times["tower"].append(1000 * (encode_end - decode_end) / MICRO_BATCH)
        times["features"].append(1000 * (read_end - encode_end) / MICRO_BATCH)
    medians = {kind: round(statistics.median(values), 3) for kind, values in times.items()}
    return {**medians, "ratio": round((medians["decode"] + medians["tower"]) / medians["features"], 1)}


if __name__ == "__main__":
    main()
