"""Samples/s from JPEGs to CLIP's pixels: our pipeline, its peers, and the work alone, which is the limit of all.

    python jobs/bench/ingest.py

Photos of 640 x 480 by jobs/bench/pixels.py, each padded and resized to 336 by redux.image.load_pixels, so that loaders
differ in reading and transporting alone.  Each has two worker processes, and all that it starts shares two cores with
the process that takes the batches: 16 images of uint8 each, every image once, which a checksum of all of them shows.

    bare, bare-fast     two processes that read files and make pixels; nothing is transported
    webdataset          WebDataset over our shards, on torch's DataLoader
    litdata, mosaicml   their StreamingDataset over their own format, which holds the JPEGs as they are
    energon             Megatron-Energon over our shards
    torchdata           StatefulDataLoader over our shards, any sample by its byte range
    ray                 ray.data.read_webdataset over our shards
    redux-*             pipelines.data.ingest: pixels exact, fast, or prepared before (own shards); PASSES epochs

Each reading has a process of its own, with files in memory, and each round takes every way once.  Time starts where
the loader is imported, so the first batch takes what starts its workers, or Ray and its workers.  The steady rate is
that from the batch that completes a quarter of the images to the last one.  Shards and conversions are made before.

A way whose package is missing is left out.  Peers are installed without what they depend on, into an environment
beside the project's: mosaicml-streaming would bring numpy < 2.2 and transformers < 5, litdata's torchvision another
torch.  PEERS has the commands.  Files, 1 MB an image, stay in --folder.  The table is printed and all readings are
added to ingest.jsonl beside this file; ratios within one run are what can be compared.
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
from collections.abc import Callable, Iterable, Iterator
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

from jobs.bench.pixels import photo
from jobs.bench.record import append, each
from pipelines.data.ingest import Batch, Reader, iterate_micro_batches, make_dataset
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.data.shard_writer import make_shards
from redux.conversation import IMAGE_TOKEN, train_word_tokenizer
from redux.image import load_pixels
from redux.settings import ImageBackend

INGEST_SIZE = 336
INGEST_BATCH = 16
INGEST_WORKERS = 2
INGEST_PARTS = 8
"""Shards, all of one size where PARTS divides the images: what a loader gives a worker is whole shards."""
BUFFER = 100
"""Samples among which loaders of whole shards shuffle."""
PASSES = {"redux-exact": 3, "redux-fast": 6, "redux-prepared": 12}
"""Epochs, 1 for the others: what Ray's workers make while the first batch is on its way must not count for much."""

PEERS = {
    "bare-fast": ("simplejpeg", "simplejpeg"),
    "webdataset": ("webdataset", "webdataset"),
    "litdata": ("litdata", "litdata lightning-utilities obstore tifffile"),
    "mosaicml": ("streaming", "mosaicml-streaming"),
    "energon": ("megatron.energon", "megatron-energon"),
    "torchdata": ("torchdata.stateful_dataloader", "torchdata"),
    "redux-fast": ("simplejpeg", "simplejpeg"),
}
"""What a way imports, and the packages that `pip install --no-deps` takes for it."""

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

EXPECTED = {"bare-fast": "fast", "redux-fast": "fast"}
"""Pixels of the ways whose pixels are not "exact"."""

Marks = list[int]
"""A checksum of each image, by `marks`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help=f"a multiple of {INGEST_BATCH}, default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="readings of each way, default: %(default)s")
    parser.add_argument("--ways", default=",".join(INGEST_WAYS), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "redux-ingest"))
    parser.add_argument("--way", choices=INGEST_WAYS, help="measure one way in this process and print it")
    parser.add_argument("--convert", type=int, default=0, help="1, with --way: only make the files that the way reads")
    arguments = parser.parse_args()
    root = arguments.folder.resolve() / str(arguments.images)
    if arguments.way:
        print(json.dumps(convert(arguments.way, root) if arguments.convert else measure(arguments.way, root)))
        return
    ways = arguments.ways.split(",")
    if unknown := set(ways) - set(INGEST_WAYS):
        parser.error(f"--ways: got {', '.join(sorted(unknown))}, allowed: {', '.join(INGEST_WAYS)}")
    if arguments.images % INGEST_BATCH or arguments.images < INGEST_PARTS * INGEST_BATCH:
        parser.error(
            f"--images: got {arguments.images}, allowed: multiples of {INGEST_BATCH} from "
            f"{INGEST_PARTS * INGEST_BATCH} on"
        )
    run(ways, root, arguments.images, arguments.repeats)


def run(ways: list[str], root: Path, images: int, repeats: int) -> None:
    """Make files, measure round after round, print and add the result."""
    expected = make_files(root, images, squares="redux-prepared" in ways)
    options: dict[str, int | Path] = {"images": images, "folder": root.parent}
    readings: dict[str, dict[str, list[float]]] = {}
    for way, told in each(__file__, ways, convert=1, **options):
        if "missing" in told:
            print(f"{way}: left out, {told['missing']}: pip install --no-deps {PEERS[way][1]}", flush=True)
        else:
            readings[way] = {"steady_per_s": [], "overall_per_s": [], "first_batch_s": []}
    for path in root.rglob("*"):
        if path.is_file():
            path.read_bytes()  # so that the first round finds it in memory, too
    for turn in range(repeats):
        for way, told in each(__file__, readings, **options):
            if told["checksum"] != checksum(expected[EXPECTED.get(way, "exact")] * PASSES.get(way, 1)):
                raise RuntimeError(f"{way}: got {told['samples']} images that are not those of {root}, each as often")
            for name, values in readings[way].items():
                values.append(told[name])
            print(f"{turn + 1}/{repeats} {way:15} {told['steady_per_s']:7.1f} samples/s", flush=True)
    medians = {
        way: {name: round(statistics.median(values), 3) for name, values in kept.items()}
        for way, kept in readings.items()
    }
    limit = medians["bare"]["steady_per_s"] if "bare" in medians else math.nan
    print(f"\n{'':15} samples/s  to bare  overall  first batch")
    for way, told in medians.items():
        steady, overall, first = told.values()
        print(f"{way:15} {steady:9.1f} {steady / limit:8.2f} {overall:8.1f} {first:10.2f} s")
    installed = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
    append(
        __file__,
        versions={name: installed[name] for name in VERSIONS if name in installed},
        images=images,
        size=INGEST_SIZE,
        batch=INGEST_BATCH,
        workers=INGEST_WORKERS,
        ways=medians,
        readings=readings,
    )


def measure(way: str, root: Path) -> dict[str, float]:
    """Samples/s, seconds to the first batch, and what tells whether every image came once and as it should."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:INGEST_WORKERS])
    warnings.simplefilter("ignore")  # what peers say to every reading
    load(way)
    found: Marks = []
    arrivals = []
    with scratch():
        start = time.perf_counter()
        for batch in INGEST_WAYS[way](root):
            found += batch
            arrivals.append((len(found), time.perf_counter() - start))
    quarter, since = next((count, seconds) for count, seconds in arrivals if 4 * count >= len(found))
    end = arrivals[-1][1]
    return {
        "steady_per_s": round((len(found) - quarter) / (end - since), 1),
        "overall_per_s": round(len(found) / end, 1),
        "first_batch_s": round(arrivals[0][1], 3),
        "samples": len(found),
        "checksum": checksum(found),
    }


def load(way: str) -> None:
    """Import what the way uses."""
    if way == "mosaicml":
        # only its classes for torchvision's data sets, unused here, ask for torchvision: an empty module instead
        sys.modules["streaming.vision"] = ModuleType("streaming.vision")
    if way in PEERS:
        importlib.import_module(PEERS[way][0])


@contextmanager
def scratch() -> Iterator[None]:
    """A folder for all temporary files, also of the processes started, that ends with them."""
    before = {name: os.environ[name] for name in ("TMPDIR",) if name in os.environ}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = None  # asks the environment again
            del os.environ["TMPDIR"]
            os.environ.update(before)


def marks(batch: Iterable[np.ndarray]) -> Marks:
    """A checksum of every 48th row and column of each image: soon done, and another for each image and each resize."""
    return [zlib.crc32(image[:, ::48, ::48].tobytes()) for image in batch]


def checksum(found: Marks) -> int:
    """The same in any order; another where an image is missing or comes twice."""
    return zlib.crc32(np.sort(found).tobytes())


# files


def make_files(root: Path, images: int, squares: bool) -> dict[str, Marks]:
    """Photos and shards, where they are not there yet; returns the marks of exact and of fast pixels."""
    (root / "photos").mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(INGEST_WORKERS, torch.set_num_threads, (1,)) as pool:
        left = [(number, path) for number, path in enumerate(photos(root, images)) if not path.exists()]
        list(tqdm(pool.imap(_photo, left), "photos", len(left), unit="image"))
        both = list(tqdm(pool.imap(_both, photos(root, images)), "pixels", images, unit="image"))
    exact, fast = map(list, zip(*both, strict=True))
    if len({*exact}) < images or len({*fast}) < images:
        raise RuntimeError(f"{root}: images that are equal to `marks`")
    records = [_record(number) for number in range(images)]
    making = ShardOptions(samples_per_shard=-(-images // INGEST_PARTS))
    with scratch(), ray_session():
        make_shards(records, str(root / "photos"), str(root / "shards"), making)
        if squares:
            make_shards(records, str(root / "photos"), str(root / "squares"), replace(making, image_size=INGEST_SIZE))
    return {"exact": exact, "fast": fast}


def photos(root: Path, images: int) -> list[Path]:
    return [root / "photos" / f"{number:05d}.jpg" for number in range(images)]


def _photo(task: tuple[int, Path]) -> None:
    number, path = task
    part = path.with_suffix(".part")
    part.write_bytes(photo(number))
    part.rename(path)


def _both(path: Path) -> tuple[int, int]:
    exact, fast = marks(load_pixels(path.read_bytes(), INGEST_SIZE, "pad", way) for way in ("exact", "fast"))
    return exact, fast


def _record(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": f"photo {number}"}]
    return {"id": number, "image": f"{number:05d}.jpg", "conversations": turns}


def convert(way: str, root: Path) -> dict[str, str]:
    """Make the way's own files, where they are not there yet; returns which package is missing, if one is."""
    try:
        load(way)
    except ImportError as error:
        return {"missing": str(error)}
    if way in INGEST_FORMATS:
        with scratch():
            INGEST_FORMATS[way](root)
    return {}


def to_litdata(root: Path) -> None:
    import litdata  # type: ignore[import-not-found]

    out = root / "litdata"
    if not (out / "index.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        inputs = [str(path) for path in sorted((root / "photos").glob("*.jpg"))]
        litdata.optimize(_bytes, inputs, str(out), chunk_bytes="64MB", num_workers=INGEST_WORKERS, start_method="fork")


def _bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def to_mosaicml(root: Path) -> None:
    from streaming import MDSWriter  # type: ignore[import-not-found]

    out = root / "mosaicml"
    if not (out / "index.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        with MDSWriter(out=str(out), columns={"image": "bytes"}) as writer:
            for path in sorted((root / "photos").glob("*.jpg")):
                writer.write({"image": path.read_bytes()})


def to_energon(root: Path) -> None:
    from megatron.energon.tools.prepare import command  # type: ignore[import-not-found]

    if not (root / "shards" / ".nv-meta" / "dataset.yaml").exists():
        given = ["--non-interactive", "--force-overwrite", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
        command.main([str(root / "shards"), *given, "--num-workers", str(INGEST_WORKERS)], standalone_mode=False)


INGEST_FORMATS: dict[str, Callable[[Path], None]] = {
    "litdata": to_litdata,
    "mosaicml": to_mosaicml,
    "energon": to_energon,
}


# ways: each gives the marks of batch after batch


def bare(root: Path, way: ImageBackend) -> Iterator[Marks]:
    paths = sorted((root / "photos").glob("*.jpg"))
    with multiprocessing.Pool(INGEST_WORKERS, torch.set_num_threads, (1,)) as pool:
        parts = [paths[first : first + INGEST_BATCH] for first in range(0, len(paths), INGEST_BATCH)]
        yield from pool.imap_unordered(partial(_bare, way=way), parts)


def _bare(paths: list[Path], way: ImageBackend) -> Marks:
    return marks(load_pixels(path.read_bytes(), INGEST_SIZE, "pad", way) for path in paths)


def tensor(image: bytes) -> torch.Tensor:
    return torch.from_numpy(load_pixels(image, INGEST_SIZE, "pad"))


def batches(loader: Iterable[torch.Tensor]) -> Iterator[Marks]:
    """Iterate over the batches of a torch loader: its workers use one thread each and collate into shared memory."""
    for batch in loader:
        yield marks(batch.numpy())


def webdataset(root: Path) -> Iterator[Marks]:
    import webdataset as wds

    urls = [str(path) for path in sorted((root / "shards").glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(BUFFER).map(lambda sample: tensor(sample["jpg"]))
    return batches(DataLoader(data, INGEST_BATCH, num_workers=INGEST_WORKERS))


def litdata(root: Path) -> Iterator[Marks]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(root / "litdata"), shuffle=True, drop_last=False, transform=tensor)
    return batches(StreamingDataLoader(data, batch_size=INGEST_BATCH, num_workers=INGEST_WORKERS))


def mosaicml(root: Path) -> Iterator[Marks]:
    from streaming import StreamingDataset

    class Stored(StreamingDataset):
        def __getitem__(self, number: int) -> torch.Tensor:
            return tensor(super().__getitem__(number)["image"])

    data = Stored(local=str(root / "mosaicml"), batch_size=INGEST_BATCH, shuffle=True)
    return batches(DataLoader(data, INGEST_BATCH, num_workers=INGEST_WORKERS))


def energon(root: Path) -> Iterator[Marks]:
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

    @edataclass
    class Photo(Sample):
        image: bytes

    @stateless
    def cook(sample: dict[str, Any]) -> Photo:
        return Photo(**basic_sample_keys(sample), image=sample["jpg"])

    class Encoder(DefaultTaskEncoder):
        """Pixels are made after the shuffle buffer, which holds what was cooked."""

        decoder = None
        cookers = (Cooker(cook),)

        @stateless
        def encode_sample(self, sample: Photo) -> torch.Tensor:
            return tensor(sample.image)

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
    return batches(get_loader(data))


class ByNumber(Dataset):
    """The images of our shards."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitems__(self, numbers: list[int]) -> list[torch.Tensor]:
        """A batch at once, as torch asks for it where it can."""
        return [tensor(sample.image) for sample in self.shards.read_samples(numbers)]


def torchdata(root: Path) -> Iterator[Marks]:
    from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-not-found]

    data = ByNumber(Shards(root / "shards"))
    return batches(StatefulDataLoader(data, INGEST_BATCH, shuffle=True, num_workers=INGEST_WORKERS))


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray of its own with WORKERS cores, quiet, its files among the temporary ones."""
    ray.init(
        address="local",
        num_cpus=INGEST_WORKERS,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=tempfile.gettempdir(),
        _system_config={"worker_niceness": 0},  # like the workers of the other loaders; Ray's own default is 15
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def ray_data(root: Path) -> Iterator[Marks]:
    with ray_session():
        ray.data.DataContext.get_current().target_max_block_size = 16 * 2**20  # a first batch before a shard's last
        paths = [str(path) for path in (root / "shards").glob("*.tar")]
        data = ray.data.read_webdataset(
            paths,
            decoder=None,
            suffixes=["jpg"],
            shuffle="files",
            override_num_blocks=len(paths),  # or pixels were made in tasks of their own, after the files are split
        )
        data = data.map_batches(_pixels, batch_size=INGEST_BATCH)
        for batch in data.iter_batches(batch_size=INGEST_BATCH, prefetch_batches=2):
            yield marks(batch["pixels"])


def _pixels(rows: Batch) -> Batch:
    return {"pixels": np.stack([load_pixels(image, INGEST_SIZE, "pad") for image in rows["jpg"]])}


def redux(root: Path, passes: int, way: ImageBackend = "exact", folder: str = "shards") -> Iterator[Marks]:
    """Epochs of the shards as the only worker of a training takes them, images without texts as for the others."""
    shards = Shards(root / folder)
    reader = Reader(
        sources={"photos": shards},
        order=Order(samples=(len(shards),), global_batch_size=INGEST_BATCH, seed=0),
        micro_batch_size=INGEST_BATCH,
        image_size=INGEST_SIZE,
        tokenizer=root / "tokenizer",
        encode=lambda tokenizer, sample: {"input_ids": np.zeros(1, np.int64)},
        image_backend=way,
    )
    train_word_tokenizer(["photo"], 32).save_pretrained(reader.tokenizer)
    with ray_session():
        data = make_dataset(reader, 0, passes * len(shards) // INGEST_BATCH, workers=1)
        data.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
        [shard] = data.streaming_split(1, equal=True)
        for batch in iterate_micro_batches(shard.iter_batches(batch_size=None, prefetch_batches=2)):
            yield marks(batch["pixel_values"].transpose(0, 3, 1, 2))


INGEST_WAYS: dict[str, Callable[[Path], Iterator[Marks]]] = {
    "bare": partial(bare, way="exact"),
    "bare-fast": partial(bare, way="fast"),
    "webdataset": webdataset,
    "litdata": litdata,
    "mosaicml": mosaicml,
    "energon": energon,
    "torchdata": torchdata,
    "ray": ray_data,
    "redux-exact": partial(redux, passes=PASSES["redux-exact"]),
    "redux-fast": partial(redux, passes=PASSES["redux-fast"], way="fast"),
    "redux-prepared": partial(redux, passes=PASSES["redux-prepared"], folder="squares"),
}


if __name__ == "__main__":
    main()
