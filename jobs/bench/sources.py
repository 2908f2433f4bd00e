"""Measure records per second and memory of `redux shards make` for each form of data.

    python jobs/bench/sources.py --records 200000

Each record has its own JPEG of 64 pixels, so that reading counts and decoding does not. The data of a form is written,
made into shards on a local Ray, and removed. Memory is anonymous memory: of the process that reads the source, in the
first and in the second half of its records, and of the largest worker. Files that appear beside the shards are counted.
The script prints the results and appends them to sources.jsonl.

Memory does not grow with the records: of 200,000, the reading process has 205 and 207 MB in the two halves of an image
folder, 203 and 203 of a CSV file, 150 and 151 of WebDataset tars with keys; a worker has 113 or 114.
"""

import argparse
import base64
import csv
import io
import itertools
import json
import re
import shutil
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
from PIL import Image
from pyarrow import ipc, parquet

from jobs.bench.record import add_out_option, append_record, measure_variants
from pipelines.core import cluster
from pipelines.core.imports import import_without
from pipelines.data.options import SetSource, ShardOptions
from pipelines.data.shard_writer import make_shards
from pipelines.data.sources.opened import RecordSource
from pipelines.data.sources.rows import SourceRecord

SOURCE_IMAGE_SIDE = 64
DISTINCT_IMAGES = 256
SAMPLES_PER_TAR = 10_000
ROWS_PER_GROUP = 100
SAMPLING_SECONDS = 0.2
MAX_READ_ALONE = 20_000
"""Records that are read without a writer."""

CAPTION_QUESTION = "What is this?"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=200_000, help="default: %(default)s")
    parser.add_argument("--forms", nargs="+", choices=SOURCE_WRITERS, default=list(SOURCE_WRITERS))
    parser.add_argument("--variant", choices=SOURCE_WRITERS, help=argparse.SUPPRESS)
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    if arguments.variant:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure_form(arguments.variant, Path(folder), arguments.records)))
        return
    for form, result in measure_variants(__file__, arguments.forms, records=arguments.records):
        print(f"{form:24} {result}", flush=True)
        append_record(arguments.out, versions={"ray": ray.__version__, "pyarrow": pa.__version__}, form=form, **result)


def measure_form(form: str, folder: Path, count: int) -> dict[str, Any]:
    """Write the data of a form, make shards of it, and measure both speed and memory."""
    source = folder / "source"
    source.mkdir()
    settings = SOURCE_WRITERS[form](source, count)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    with cluster.open_session():
        watched_source = _WatchedSource(settings)
        with MemoryMeter() as meter:
            start = time.perf_counter()
            summary = make_shards(watched_source, watched_source.images, str(folder / "shards"), ShardOptions())
            seconds = time.perf_counter() - start
    if summary["samples"] != count:
        raise RuntimeError(f"{form}: got {summary}, allowed: {count} samples")
    extra_files = [
        path.name
        for path in (folder / "shards").rglob("*")
        if path.suffix != ".tar" and path.name not in ("index.arrow", "quarantine.jsonl", "summary.json", "unfinished")
    ]
    # Reading alone, without images that are files of their own.
    read = min(count, MAX_READ_ALONE)
    start = time.process_time()  # Other processes of the machine would count in wall-clock time
    for _ in itertools.islice(RecordSource(settings), read):
        pass
    reading_s = time.process_time() - start
    half_time = watched_source.read_at[count // 2]
    return {
        "records": count,
        "source_mb": round(size / 1e6),
        "records_per_s": round(count / seconds),
        "reading_records_per_cpu_s": round(read / reading_s),
        "driver_mb_halves": [
            meter.peak_mb(meter.driver, 0, half_time),
            meter.peak_mb(meter.driver, half_time, float("inf")),
        ],
        "driver_mb_before": round(meter.driver[0][1] / 1e6),
        "worker_mb_halves": [
            meter.peak_mb(meter.worker, 0, half_time),
            meter.peak_mb(meter.worker, half_time, float("inf")),
        ],
        "other_files": len(extra_files),
        "temporary_files": len([path for path in folder.iterdir() if path.name not in ("source", "shards")]),
    }


class _WatchedSource(RecordSource):
    """Source that notes the time at which each record is read."""

    def __init__(self, settings: SetSource) -> None:
        super().__init__(settings)
        self.read_at = array("d")  # A list would take four times the memory that is measured

    def __iter__(self) -> Iterator[SourceRecord]:
        for record in super().__iter__():
            self.read_at.append(time.perf_counter())
            yield record


class MemoryMeter:
    """Anonymous memory of this process and of the largest Ray worker, as (time, bytes)."""

    def __init__(self) -> None:
        self.driver: list[tuple[float, int]] = []
        self.worker: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "MemoryMeter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            now = time.perf_counter()
            self.driver.append((now, read_anonymous_bytes(psutil.Process().pid)))
            # The other processes of the session belong to Ray itself.
            workers = [process.pid for process in psutil.Process().children(recursive=True) if is_worker(process)]
            self.worker.append((now, max(map(read_anonymous_bytes, workers), default=0)))
            self._stop.wait(SAMPLING_SECONDS)

    @staticmethod
    def peak_mb(samples: list[tuple[float, int]], start: float, end: float) -> int:
        """Return the peak between two times, in MB."""
        return round(max((size for timestamp, size in samples if start <= timestamp < end), default=0) / 1e6)


def is_worker(process: psutil.Process) -> bool:
    """Return True if a process runs Ray tasks."""
    try:
        return (process.cmdline() or [""])[0].startswith("ray::")
    except psutil.Error:
        return False


def read_anonymous_bytes(pid: int) -> int:
    """Read the anonymous memory of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+)", status)
    return 1024 * int(match[1]) if match else 0


# --- data ------------------------------------------------------------------------------------------------------------


def draw_images() -> list[bytes]:
    """Draw JPEGs of noise that is smooth enough for the size of a photo's thumbnail."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(DISTINCT_IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        sink = io.BytesIO()
        small.resize((SOURCE_IMAGE_SIDE, SOURCE_IMAGE_SIDE)).save(sink, "JPEG")
        images.append(sink.getvalue())
    return images


def caption_of(number: int) -> str:
    return f"a picture with the number {number}, which no other picture has."


def write_image_files(folder: Path, count: int) -> None:
    """Write an image file per record, 1,000 in a folder. Equal images are links to one file."""
    images = draw_images()
    (folder / "originals").mkdir()
    for number, image in enumerate(images):
        (folder / "originals" / f"{number}.jpg").write_bytes(image)
    for number in range(count):
        path = folder / image_path(number)
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.hardlink_to(folder / "originals" / f"{number % DISTINCT_IMAGES}.jpg")


def image_path(number: int) -> str:
    return f"photos/{number // 1000:05d}/{number:09d}.jpg"


def make_turns(number: int, roles: tuple[str, str], fields: tuple[str, str], tag: str = "<image>\n") -> list[dict]:
    texts = (f"{tag}{CAPTION_QUESTION}", caption_of(number))
    return [{fields[0]: role, fields[1]: text} for role, text in zip(roles, texts, strict=True)]


LLAVA = (("human", "gpt"), ("from", "value"))
OPENAI = (("user", "assistant"), ("role", "content"))


def write_lines_of(path: Path, rows: Iterable[dict]) -> SetSource:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return SetSource(source=str(path))


def write_llava_list(folder: Path, count: int) -> SetSource:
    write_image_files(folder, count)
    with (folder / "a.json").open("w") as file:
        file.write("[")
        for number in range(count):
            record = {"id": str(number), "image": image_path(number), "conversations": make_turns(number, *LLAVA)}
            file.write((", " if number else "") + json.dumps(record))
        file.write("]")
    return SetSource(source=str(folder / "a.json"))


def write_llava_lines(folder: Path, count: int) -> SetSource:
    write_image_files(folder, count)
    rows = ({"image": image_path(n), "conversations": make_turns(n, *LLAVA)} for n in range(count))
    return write_lines_of(folder / "a.jsonl", rows)


def write_sharegpt(folder: Path, count: int) -> SetSource:
    write_image_files(folder, count)
    roles = (("user", "assistant"), ("from", "value"))
    rows = ({"images": [image_path(n)], "conversations": make_turns(n, *roles)} for n in range(count))
    return write_lines_of(folder / "a.jsonl", rows)


def write_data_urls(folder: Path, count: int) -> SetSource:
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in draw_images()]

    def make_row(number: int) -> dict:
        question, answer = make_turns(number, *OPENAI, tag="")
        image = {"type": "image_url", "image_url": {"url": urls[number % DISTINCT_IMAGES]}}
        parts = [image, {"type": "text", "text": question["content"]}]
        return {"messages": [{**question, "content": parts}, answer]}

    return write_lines_of(folder / "a.jsonl", map(make_row, range(count)))


def write_llama_factory(folder: Path, count: int) -> SetSource:
    write_image_files(folder, count)
    write_lines_of(
        folder / "a.jsonl",
        ({"images": [image_path(n)], "messages": make_turns(n, *OPENAI)} for n in range(count)),
    )
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "a.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}}
    (folder / "dataset_info.json").write_text(json.dumps({"a": {**entry, "tags": tags}}))
    return SetSource(source=f"{folder}/dataset_info.json:a")


def list_batches(count: int, make_row: Callable[[int], dict], size: int = ROWS_PER_GROUP) -> Iterator[pa.Table]:
    for start in range(0, count, size):
        yield pa.Table.from_pylist([make_row(number) for number in range(start, min(start + size, count))])


def write_parquet(folder: Path, count: int) -> SetSource:
    images = draw_images()

    def make_row(number: int) -> dict:
        image = {"bytes": images[number % DISTINCT_IMAGES], "path": f"{number}.jpg"}
        return {"image": image, "conversations": make_turns(number, *LLAVA)}

    tables = list_batches(count, make_row)
    first_table = next(tables)
    with parquet.ParquetWriter(folder / "a.parquet", first_table.schema) as writer:
        writer.write_table(first_table)
        for table in tables:
            writer.write_table(table)
    return SetSource(source=str(folder / "a.parquet"))


def write_arrow(folder: Path, count: int) -> SetSource:
    images = draw_images()

    def make_row(number: int) -> dict:
        image = {"bytes": images[number % DISTINCT_IMAGES], "path": f"{number}.jpg"}
        return {"images": [image], "messages": make_turns(number, *OPENAI)}

    tables = list_batches(count, make_row)
    first_table = next(tables)
    with ipc.new_stream(folder / "data-00000-of-00001.arrow", first_table.schema) as writer:
        writer.write_table(first_table)
        for table in tables:
            writer.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    return SetSource(source=str(folder))


def write_csv(folder: Path, count: int) -> SetSource:
    write_image_files(folder, count)
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows((image_path(number), caption_of(number)) for number in range(count))
    return SetSource(source=str(folder / "a.csv"))


def write_image_folder(folder: Path, count: int) -> SetSource:
    write_image_files(folder, count)
    shutil.rmtree(folder / "originals")
    for number in range(count):
        (folder / image_path(number)).with_suffix(".txt").write_text(caption_of(number))
    return SetSource(source=str(folder / "photos"))


def write_tars(folder: Path, count: int, make_sample: Callable[[int, bytes], dict]) -> list[str]:
    """Write tars of SAMPLES_PER_TAR samples, and return their names."""
    images = draw_images()
    webdataset = import_without("webdataset", "torch")
    names = []
    for start in range(0, count, SAMPLES_PER_TAR):
        names.append(f"{start // SAMPLES_PER_TAR:05d}.tar")
        with webdataset.TarWriter(str(folder / names[-1])) as tar:
            for number in range(start, min(start + SAMPLES_PER_TAR, count)):
                tar.write({"__key__": f"{number:09d}", **make_sample(number, images[number % DISTINCT_IMAGES])})
    return names


def write_caption_tars(folder: Path, count: int) -> SetSource:
    def make_sample(number: int, image: bytes) -> dict:
        caption = caption_of(number)
        metadata = {"url": "https://example.org/a.jpg", "caption": caption, "status": "success", "sha256": "0" * 64}
        return {"jpg": image, "txt": caption, "json": metadata}

    write_tars(folder, count, make_sample)
    return SetSource(source=str(folder))


def write_keyed_tars(folder: Path, count: int) -> SetSource:
    def make_sample(number: int, image: bytes) -> dict:
        return {"photo.jpg": image, "mask.jpg": image, "alt.txt": caption_of(number)}

    write_tars(folder, count, make_sample)
    return SetSource(source=str(folder), columns={"image": "photo.jpg", "text": "alt.txt"})


def write_energon(folder: Path, count: int) -> SetSource:
    def make_sample(number: int, image: bytes) -> dict:
        return {"jpg": image, "json": {"caption": caption_of(number)}}

    names = write_tars(folder, count, make_sample)
    (folder / ".nv-meta").mkdir()
    fields = "field_map: {image: jpg, caption: 'json[caption]'}"
    (folder / ".nv-meta" / "dataset.yaml").write_text(f"sample_type: {{__class__: CaptioningSample}}\n{fields}\n")
    (folder / ".nv-meta" / "split.yaml").write_text(json.dumps({"exclude": [], "split_parts": {"train": names}}))
    return SetSource(source=str(folder))


def write_onevision(folder: Path, count: int) -> SetSource:
    def make_sample(number: int, image: bytes) -> dict:
        return {"0_a.jpg": image, "json": {"texts": make_turns(number, *OPENAI), "media": "image", "name": ["0_a.jpg"]}}

    write_tars(folder, count, make_sample)
    return SetSource(source=str(folder))


SOURCE_WRITERS: dict[str, Callable[[Path, int], SetSource]] = {
    "LLaVA, list": write_llava_list,
    "LLaVA, lines": write_llava_lines,
    "ShareGPT": write_sharegpt,
    "messages, data URLs": write_data_urls,
    "LLaMA-Factory": write_llama_factory,
    "parquet of datasets": write_parquet,
    "Arrow of datasets": write_arrow,
    "CSV": write_csv,
    "image folder": write_image_folder,
    "img2dataset tars": write_caption_tars,
    "WebDataset with keys": write_keyed_tars,
    "Energon": write_energon,
    "LLaVA-OneVision tars": write_onevision,
}
"""Writers of the data of each form."""

if __name__ == "__main__":
    main()
