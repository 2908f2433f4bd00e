"""Measure samples/s from JPEGs to CLIP's pixels: our pipeline, its peers, and the bare work, which is their limit.

    python jobs/bench/ingest.py

Photos of 640 x 480 by jobs/bench/pixels.py, each padded and resized to 336 by redux.image.load_pixels, so that loaders
differ only in reading and transport. Each has two worker processes, and all its processes share two cores with the
process that receives the batches: 16 images of uint8 each, every image once, which a checksum of all of them proves.

    bare, bare-fast     two processes that read files and make pixels; nothing is transported
    webdataset          WebDataset over our shards, on torch's DataLoader
    litdata, mosaicml   their StreamingDataset over their own format, which holds the JPEGs as they are
    energon             Megatron-Energon over our shards
    torchdata           StatefulDataLoader over our shards, any sample by its byte range
    ray                 ray.data.read_webdataset over our shards
    redux-*             pipelines.data.ingest: pixels exact, fast, or prepared before (own shards); PASSES epochs
    redux-texts         as redux-exact, with the conversations: tokenized, labelled and padded

Each measurement runs in a new process, with files in memory, and each round measures every variant once. Time starts
where the loader is imported, so the first batch includes the start of its workers, or of Ray and its workers. The
steady rate is that from the batch that completes a quarter of the images to the last one. Shards and conversions are
made before.

A variant whose package is missing is skipped. Peers are installed without their dependencies, into an environment
beside the project's: mosaicml-streaming requires numpy < 2.2 and transformers < 5, litdata's torchvision another
torch. PEERS lists the packages. Files, 1 MB per image, stay in --folder. The script prints a table and appends all
measurements to ingest.jsonl; only ratios within one run can be compared.
"""

import argparse
import importlib
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from jobs.bench.pixels import make_photo
from jobs.bench.record import add_out_option, append_record, measure_variants
from pipelines.data.ingest import (
    Batch,
    Reader,
    Segment,
    make_conversation_encoder,
    make_streams,
    read_stream,
)
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.data.shard_writer import make_shards
from pipelines.data.text_tokenizer import load_text_tokenizer
from redux.conversation import IMAGE_TOKEN, TEMPLATES, train_word_tokenizer
from redux.image import load_pixels
from redux.rounding import divide_up
from redux.settings import ImageBackend

INGEST_SIZE = 336
INGEST_BATCH = 16
INGEST_WORKERS = 2
INGEST_PARTS = 8
"""Number of shards. They have equal sizes if this divides the images, because loaders give whole shards to workers."""
BUFFER = 100
"""Shuffle buffer, in samples, of loaders that read whole shards."""
PASSES = {"redux-exact": 3, "redux-texts": 3, "redux-fast": 6, "redux-prepared": 12}
"""Epochs of a variant, 1 for the others. More dilute the batches that Ray's workers prepare before the first one."""

PEERS = {
    "bare-fast": ("simplejpeg", "simplejpeg"),
    "webdataset": ("webdataset", "webdataset"),
    "litdata": ("litdata", "litdata lightning-utilities obstore tifffile"),
    "mosaicml": ("streaming", "mosaicml-streaming"),
    "energon": ("megatron.energon", "megatron-energon"),
    "torchdata": ("torchdata.stateful_dataloader", "torchdata"),
    "redux-fast": ("simplejpeg", "simplejpeg"),
}
"""Module that a variant imports, and its packages for `pip install --no-deps`."""

VERSIONS = (
    "litdata",
    "megatron-energon",
    "mosaicml-streaming",
    "pillow",
    "ray",
    "simplejpeg",
    "torch",
    "torchdata",
    "webdataset",
)

IMAGE_BACKENDS = {"bare-fast": "fast", "redux-fast": "fast"}
"""Image backend of the variants that do not use "exact"."""

Checksums = list[int]
"""Checksum of each image, see `compute_checksums`."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help=f"a multiple of {INGEST_BATCH}, default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, default: %(default)s")
    parser.add_argument("--variants", default=",".join(INGEST_VARIANTS), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "redux-ingest"))
    parser.add_argument(
        "--variant", choices=INGEST_VARIANTS, help="measure only this one, in this process, and print it"
    )
    parser.add_argument("--convert", action="store_true", help="with --variant: only convert the photos to its format")
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    root = arguments.folder.resolve() / str(arguments.images)
    if arguments.variant:
        work = convert_photos if arguments.convert else measure
        print(json.dumps(work(arguments.variant, root)))
        return
    variants = arguments.variants.split(",")
    if unknown := set(variants) - set(INGEST_VARIANTS):
        parser.error(f"--variants: got {', '.join(sorted(unknown))}, allowed: {', '.join(INGEST_VARIANTS)}")
    if arguments.images % INGEST_BATCH or arguments.images < INGEST_PARTS * INGEST_BATCH:
        parser.error(
            f"--images: got {arguments.images}, allowed: multiples of {INGEST_BATCH} from "
            f"{INGEST_PARTS * INGEST_BATCH} on"
        )
    run(variants, root, arguments.images, arguments.repeats, arguments.out)


def run(variants: list[str], root: Path, images: int, repeats: int, out: Path) -> None:
    """Make files, measure round after round, print and append the result."""
    # Checksums come from the files themselves, not from a loader that is measured.
    expected = make_files(root, images, squares="redux-prepared" in variants)
    options: dict[str, int | Path] = {"images": images, "folder": root.parent}
    readings: dict[str, dict[str, list[float]]] = {}
    for variant, conversion in measure_variants(__file__, variants, convert=True, **options):
        if "missing" in conversion:
            hint = f"pip install --no-deps {PEERS[variant][1]}"
            print(f"{variant}: skipped, {conversion['missing']}: {hint}", flush=True)
        else:
            readings[variant] = {"steady_per_s": [], "overall_per_s": [], "first_batch_s": []}
    for path in root.rglob("*"):
        if path.is_file():
            path.read_bytes()  # So that the first round finds it in the page cache, like later ones
    # Variants take turns, so that a slow minute of the machine concerns all of them.
    for turn in range(repeats):
        for variant, measured in measure_variants(__file__, readings, **options):
            epochs = expected[IMAGE_BACKENDS.get(variant, "exact")] * PASSES.get(variant, 1)
            if measured["checksum"] != combine_checksums(epochs):
                raise RuntimeError(
                    f"{variant}: got {measured['samples']} images, allowed: those of {root}, each once per epoch"
                )
            for name, values in readings[variant].items():
                values.append(measured[name])
            print(f"{turn + 1}/{repeats} {variant:15} {measured['steady_per_s']:7.1f} samples/s", flush=True)
    medians = {
        variant: {name: round(statistics.median(values), 3) for name, values in columns.items()}
        for variant, columns in readings.items()
    }
    limit = medians["bare"]["steady_per_s"] if "bare" in medians else math.nan
    print(f"\n{'':15} samples/s  to bare  overall  first batch")
    for variant, columns in medians.items():
        steady, overall, first_batch = columns.values()
        print(f"{variant:15} {steady:9.1f} {steady / limit:8.2f} {overall:8.1f} {first_batch:10.2f} s")
    installed = {package.name.lower(): package.version for package in importlib.metadata.distributions()}
    append_record(
        out,
        versions={name: installed[name] for name in VERSIONS if name in installed},
        images=images,
        size=INGEST_SIZE,
        batch=INGEST_BATCH,
        workers=INGEST_WORKERS,
        variants=medians,
        readings=readings,
    )


def measure(variant: str, root: Path) -> dict[str, float]:
    """Measure samples/s and seconds to the first batch, with the number of images and a checksum of all of them."""
    # Child processes inherit the limit, so every loader has the same cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:INGEST_WORKERS])
    warnings.simplefilter("ignore")  # Peers warn in every measurement
    import_peer(variant)
    checksums: Checksums = []
    arrivals = []
    with use_temporary_folder():
        start = time.perf_counter()
        for batch in INGEST_VARIANTS[variant](root):
            checksums += batch
            arrivals.append((len(checksums), time.perf_counter() - start))
    quarter, since = next((count, seconds) for count, seconds in arrivals if 4 * count >= len(checksums))
    end = arrivals[-1][1]
    return {
        "steady_per_s": round((len(checksums) - quarter) / (end - since), 1),
        "overall_per_s": round(len(checksums) / end, 1),
        "first_batch_s": round(arrivals[0][1], 3),
        "samples": len(checksums),
        "checksum": combine_checksums(checksums),
    }


def import_peer(variant: str) -> None:
    """Import the package of a peer; nothing for other variants."""
    if variant == "mosaicml":
        # Version 0.13 imports torchvision for classes that are not used here: an empty module replaces them.
        sys.modules["streaming.vision"] = ModuleType("streaming.vision")
    if variant in PEERS:
        importlib.import_module(PEERS[variant][0])


@contextmanager
def use_temporary_folder() -> Iterator[None]:
    """Put all temporary files, also those of child processes, into a folder that is deleted at the end."""
    former_variables = {name: os.environ[name] for name in ("TMPDIR",) if name in os.environ}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = None  # The module reads the environment again
            del os.environ["TMPDIR"]
            os.environ.update(former_variables)


def compute_checksums(batch: Iterable[np.ndarray]) -> Checksums:
    """Compute a checksum of every 48th row and column of each image: fast, and different for each image and resize."""
    return [zlib.crc32(image[:, ::48, ::48].tobytes()) for image in batch]


def combine_checksums(checksums: Checksums) -> int:
    """Combine checksums of images, independent of their order; a missing or repeated image changes the result."""
    return zlib.crc32(np.sort(checksums).tobytes())


# --- files ------------------------------------------------------------------------------------------------------------


def make_files(root: Path, images: int, squares: bool) -> dict[str, Checksums]:
    """Make missing photos and shards; returns the checksums of exact and of fast pixels.

    Args:
        root: folder of the files.
        images: number of photos.
        squares: also make shards of prepared squares.
    """
    (root / "photos").mkdir(parents=True, exist_ok=True)
    with open_pool() as pool:
        missing = [(number, path) for number, path in enumerate(list_photos(root, images)) if not path.exists()]
        list(tqdm(pool.map(_write_photo, missing), "photos", len(missing), unit="image"))
        pairs = list(tqdm(pool.map(_compute_pair, list_photos(root, images)), "pixels", images, unit="image"))
    exact, fast = map(list, zip(*pairs, strict=True))
    if len({*exact}) < images or len({*fast}) < images:
        raise RuntimeError(f"{root}: got images with equal checksums, allowed: none")
    records = [_build_record(number) for number in range(images)]
    options = ShardOptions(samples_per_shard=divide_up(images, INGEST_PARTS))
    with use_temporary_folder(), open_ray_session():
        make_shards(records, str(root / "photos"), str(root / "shards"), options)
        if squares:
            make_shards(records, str(root / "photos"), str(root / "squares"), replace(options, image_size=INGEST_SIZE))
    return {"exact": exact, "fast": fast}


def open_pool() -> ProcessPoolExecutor:
    """Open a pool of forks of this process, which have imported torch, with one thread each.

    Unlike a `multiprocessing.Pool`, it ends them without a signal. A handler of Ray that they inherit would catch it.
    """
    return ProcessPoolExecutor(INGEST_WORKERS, multiprocessing.get_context("fork"), torch.set_num_threads, (1,))


def list_photos(root: Path, images: int) -> list[Path]:
    return [root / "photos" / f"{number:05d}.jpg" for number in range(images)]


def _write_photo(task: tuple[int, Path]) -> None:
    number, path = task
    # Renamed when complete: an interrupted run leaves no photo that the next one would keep.
    partial_path = path.with_suffix(".part")
    partial_path.write_bytes(make_photo(number))
    partial_path.rename(path)


def _compute_pair(path: Path) -> tuple[int, int]:
    """Compute the checksums of a photo's exact and fast pixels."""
    content = path.read_bytes()
    exact, fast = compute_checksums(load_pixels(content, INGEST_SIZE, "pad", backend) for backend in ("exact", "fast"))
    return exact, fast


def _build_record(number: int) -> dict[str, Any]:
    """Build a conversation of six turns and 150 words, about as long as those of LLaVA's mixture."""
    answer = " ".join(["photo"] * 24 + [str(number)])
    turns = [{"from": ("human", "gpt")[turn % 2], "value": answer} for turn in range(6)]
    turns[0]["value"] = f"{IMAGE_TOKEN}\n{answer}"
    return {"id": number, "image": f"{number:05d}.jpg", "conversations": turns}


def convert_photos(variant: str, root: Path) -> dict[str, str]:
    """Convert the photos to the format of a peer, if that is not done; returns the error if its package is missing."""
    try:
        import_peer(variant)
    except ImportError as error:
        return {"missing": str(error)}
    if variant in INGEST_FORMATS:
        with use_temporary_folder():
            INGEST_FORMATS[variant](root)
    return {}


def convert_to_litdata(root: Path) -> None:
    import litdata  # type: ignore[import-not-found]

    out = root / "litdata"
    if not (out / "index.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        inputs = [str(path) for path in sorted((root / "photos").glob("*.jpg"))]
        litdata.optimize(
            _read_bytes, inputs, str(out), chunk_bytes="64MB", num_workers=INGEST_WORKERS, start_method="fork"
        )


def _read_bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def convert_to_mosaicml(root: Path) -> None:
    from streaming import MDSWriter  # type: ignore[import-not-found]

    out = root / "mosaicml"
    if not (out / "index.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        with MDSWriter(out=str(out), columns={"image": "bytes"}) as writer:
            for path in sorted((root / "photos").glob("*.jpg")):
                writer.write({"image": path.read_bytes()})


def convert_to_energon(root: Path) -> None:
    from megatron.energon.tools.prepare import command  # type: ignore[import-not-found]

    if not (root / "shards" / ".nv-meta" / "dataset.yaml").exists():
        options = [
            "--non-interactive",
            "--force-overwrite",
            "--split-ratio",
            "1,0,0",
            "--sample-type",
            "CrudeWebdataset",
        ]
        command.main([str(root / "shards"), *options, "--num-workers", str(INGEST_WORKERS)], standalone_mode=False)


INGEST_FORMATS: dict[str, Callable[[Path], None]] = {
    "litdata": convert_to_litdata,
    "mosaicml": convert_to_mosaicml,
    "energon": convert_to_energon,
}


# --- variants: functions that yield the checksums of each batch -------------------------------------------------------


def iterate_bare(root: Path, backend: ImageBackend) -> Iterator[Checksums]:
    """Read files and make pixels in two processes, which send only the checksums back."""
    paths = sorted((root / "photos").glob("*.jpg"))
    parts = [paths[start : start + INGEST_BATCH] for start in range(0, len(paths), INGEST_BATCH)]
    with open_pool() as pool:
        yield from pool.map(partial(_load_checksums, backend=backend), parts)


def _load_checksums(paths: list[Path], backend: ImageBackend) -> Checksums:
    return compute_checksums(load_pixels(path.read_bytes(), INGEST_SIZE, "pad", backend) for path in paths)


def load_tensor(image: bytes) -> torch.Tensor:
    return torch.from_numpy(load_pixels(image, INGEST_SIZE, "pad"))


def iterate_batches(loader: Iterable[torch.Tensor]) -> Iterator[Checksums]:
    """Iterate over the batches of a torch loader, whose workers use one thread each and collate into shared memory."""
    for batch in loader:
        yield compute_checksums(batch.numpy())


def iterate_webdataset(root: Path) -> Iterator[Checksums]:
    import webdataset as wds

    urls = [str(path) for path in sorted((root / "shards").glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(BUFFER).map(lambda sample: load_tensor(sample["jpg"]))
    return iterate_batches(DataLoader(data, INGEST_BATCH, num_workers=INGEST_WORKERS))


def iterate_litdata(root: Path) -> Iterator[Checksums]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(root / "litdata"), shuffle=True, drop_last=False, transform=load_tensor)
    return iterate_batches(StreamingDataLoader(data, batch_size=INGEST_BATCH, num_workers=INGEST_WORKERS))


def iterate_mosaicml(root: Path) -> Iterator[Checksums]:
    from streaming import StreamingDataset

    class TensorDataset(StreamingDataset):
        def __getitem__(self, number: int) -> torch.Tensor:
            return load_tensor(super().__getitem__(number)["image"])

    data = TensorDataset(local=str(root / "mosaicml"), batch_size=INGEST_BATCH, shuffle=True)
    return iterate_batches(DataLoader(data, INGEST_BATCH, num_workers=INGEST_WORKERS))


def iterate_energon(root: Path) -> Iterator[Checksums]:
    from megatron.energon import (  # type: ignore[import-not-found]
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_train_dataset,
        stateless,
    )

    # Energon takes a class for its samples, a function from the files of a tar to a sample, and an encoder.
    @edataclass
    class Photo(Sample):
        image: bytes

    @stateless
    def cook(sample: dict[str, Any]) -> Photo:
        return Photo(**basic_sample_keys(sample), image=sample["jpg"])

    class Encoder(DefaultTaskEncoder):
        """Encoder that makes pixels after the shuffle buffer, so that the buffer holds JPEGs."""

        decoder = None
        cookers = (Cooker(cook),)

        @stateless
        def encode_sample(self, sample: Photo) -> torch.Tensor:
            return load_tensor(sample.image)

        @stateless
        def batch(self, samples: list[torch.Tensor]) -> torch.Tensor:
            return default_collate(samples)

    data = get_train_dataset(
        root / "shards",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=INGEST_WORKERS),
        batch_size=INGEST_BATCH,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=BUFFER,
        task_encoder=Encoder(),
        repeat=False,
    )
    return iterate_batches(get_loader(data))


class ShardImages(Dataset):
    """Images of our shards by number."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitems__(self, numbers: list[int]) -> list[torch.Tensor]:
        """Load a batch in one call; torch prefers this method to `__getitem__`."""
        return [load_tensor(sample.image) for sample in self.shards.read_samples(numbers)]


def iterate_torchdata(root: Path) -> Iterator[Checksums]:
    from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-not-found]

    data = ShardImages(Shards(root / "shards"))
    return iterate_batches(StatefulDataLoader(data, INGEST_BATCH, shuffle=True, num_workers=INGEST_WORKERS))


@contextmanager
def open_ray_session() -> Iterator[None]:
    """Start a quiet, private Ray with INGEST_WORKERS CPUs and its files in the temporary folder."""
    ray.init(
        address="local",
        num_cpus=INGEST_WORKERS,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=tempfile.gettempdir(),
        _system_config={"worker_niceness": 0},  # As for the workers of the other loaders; Ray's default is 15
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def iterate_ray_data(root: Path) -> Iterator[Checksums]:
    with open_ray_session():
        # Small blocks give the first batch before the end of a shard.
        ray.data.DataContext.get_current().target_max_block_size = 16 * 2**20
        paths = [str(path) for path in (root / "shards").glob("*.tar")]
        data = ray.data.read_webdataset(
            paths,
            decoder=None,
            suffixes=["jpg"],
            shuffle="files",
            override_num_blocks=len(paths),  # Otherwise Ray splits the files, and other tasks make the pixels
        )
        data = data.map_batches(_load_pixels, batch_size=INGEST_BATCH)
        for batch in data.iter_batches(batch_size=INGEST_BATCH, prefetch_batches=2):
            yield compute_checksums(batch["pixels"])


def _load_pixels(rows: Batch) -> Batch:
    return {"pixels": np.stack([load_pixels(image, INGEST_SIZE, "pad") for image in rows["jpg"]])}


def iterate_redux(
    root: Path, passes: int, backend: ImageBackend = "exact", folder: str = "shards", texts: bool = False
) -> Iterator[Checksums]:
    """Iterate over epochs of the shards as the only training worker does.

    Args:
        root: folder of the files.
        passes: number of epochs.
        backend: image backend.
        folder: folder of the shards in `root`.
        texts: encode the conversations; False is like the other loaders, with images alone.
    """
    shards = Shards(root / folder)
    tokenizer = root / "tokenizer"
    train_word_tokenizer(["photo"], 1024).save_pretrained(tokenizer)
    encode = make_conversation_encoder(TEMPLATES["vicuna_v1"], image_tokens=576)
    reader = Reader(
        sources={"photos": shards},
        order=Order(samples=(len(shards),), global_batch_size=INGEST_BATCH, seed=0),
        micro_batch_size=INGEST_BATCH,
        image_size=INGEST_SIZE,
        tokenizer=tokenizer,
        encode=encode if texts else lambda tokenizer, sample: {"input_ids": np.zeros(1, np.int64)},
        image_backend=backend,
        text_tokenizer=load_text_tokenizer(tokenizer),
    )
    with open_ray_session():
        [stream] = make_streams([Segment(reader, 0, passes * len(shards) // INGEST_BATCH)], workers=1)
        for batch in read_stream(stream, prefetched_blocks=2):
            yield compute_checksums(batch["pixel_values"].transpose(0, 3, 1, 2))


INGEST_VARIANTS: dict[str, Callable[[Path], Iterator[Checksums]]] = {
    "bare": partial(iterate_bare, backend="exact"),
    "bare-fast": partial(iterate_bare, backend="fast"),
    "webdataset": iterate_webdataset,
    "litdata": iterate_litdata,
    "mosaicml": iterate_mosaicml,
    "energon": iterate_energon,
    "torchdata": iterate_torchdata,
    "ray": iterate_ray_data,
    "redux-exact": partial(iterate_redux, passes=PASSES["redux-exact"]),
    "redux-texts": partial(iterate_redux, passes=PASSES["redux-texts"], texts=True),
    "redux-fast": partial(iterate_redux, passes=PASSES["redux-fast"], backend="fast"),
    "redux-prepared": partial(iterate_redux, passes=PASSES["redux-prepared"], folder="squares"),
}


if __name__ == "__main__":
    main()
