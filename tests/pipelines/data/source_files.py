"""Ten samples in each form that is read, written by the original package where there is one.

Captions say what an image shows; conversations have several rounds, a system message and text without an image.
"""

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import webdataset
import yaml
from PIL import Image
from pyarrow import parquet

PROMPT = "What is this?"


class CaptionSample(NamedTuple):
    """Image and caption."""

    key: str
    image: bytes
    caption: str


def draw_samples(count: int = 10) -> list[CaptionSample]:
    """Draw JPEGs of several sizes with a caption each."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        pixels = rng.integers(0, 256, (8 + number, 20 - number, 3), dtype=np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "JPEG")
        samples.append(CaptionSample(f"{number:09d}", sink.getvalue(), f"a picture of number {number}."))
    return samples


def make_llava(samples: list[CaptionSample]) -> list[dict[str, Any]]:
    """Make the records in LLaVA's form."""
    return [
        {
            "id": key,
            "image": f"photos/{key}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{PROMPT}"},
                {"from": "gpt", "value": caption},
            ],
        }
        for key, _, caption in samples
    ]


def make_conversations(samples: list[CaptionSample]) -> list[dict[str, Any]]:
    """Make records in LLaVA's form with several rounds, a system message, and text alone."""
    records = make_llava(samples)
    records[1]["conversations"].insert(0, {"from": "system", "value": "Answer in one word."})
    records[3] = {
        "id": "text",
        "conversations": [{"from": "human", "value": "Is 2 even?"}, {"from": "gpt", "value": "yes"}],
    }
    records[5]["conversations"] += [{"from": "human", "value": "Which number?"}, {"from": "gpt", "value": "5"}]
    records[7]["conversations"][0]["value"] = f"{PROMPT}\n<image>"
    return records


def write_photos(folder: Path, samples: list[CaptionSample]) -> None:
    """Write the images to photos/."""
    (folder / "photos").mkdir(parents=True)
    for key, image, _ in samples:
        (folder / "photos" / f"{key}.jpg").write_bytes(image)


def to_messages(
    record: dict[str, Any], make_image: Callable[[str], dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Make OpenAI's messages of a record; with `make_image`, the text and the image are parts."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = []
    for turn in record["conversations"]:
        content: Any = turn["value"]
        if make_image:
            text = {"type": "text", "text": content.replace("<image>", "").strip()}
            content = [make_image(record["image"]), text] if "<image>" in turn["value"] else [text]
        messages.append({"role": roles[turn["from"]], "content": content})
    return messages


def to_data_url(image: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def write_json(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def write_lines(path: Path, values: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


# --- conversations ---------------------------------------------------------------------------------------------------
# each writer takes a folder, samples and records, and returns the settings of the source

Settings = dict[str, Any]
Writer = Callable[[Path, list[CaptionSample], list[dict[str, Any]]], Settings]


def write_llava_list(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    return {"source": write_json(folder / "a.json", records)}


def write_llava_lines(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    return {"source": write_lines(folder / "a.jsonl", records)}


def write_sharegpt(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    rows = []
    for record in records:
        turns = [{"from": roles[turn["from"]], "value": turn["value"]} for turn in record["conversations"]]
        rows.append({"conversations": turns, "images": [record["image"]] if "image" in record else []})
    return {"source": write_json(folder / "sharegpt.json", rows)}


def write_column_map(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    names = {"human": "U", "gpt": "B", "system": "system"}
    rows = []
    for record in records:
        turns = [{"who": names[turn["from"]], "text": turn["value"]} for turn in record["conversations"]]
        rows.append({"chat": turns, "pic": record.get("image")})
    columns = {"conversations": "chat", "image": "pic", "role": "who", "content": "text", "user": "U", "assistant": "B"}
    return {"source": write_lines(folder / "mapped.jsonl", rows), "columns": columns}


def write_messages(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    rows = [
        {"messages": to_messages(record), "images": [record["image"]] if "image" in record else None}
        for record in records
    ]
    return {"source": write_lines(folder / "messages.jsonl", rows)}


def write_data_urls(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    images = {f"photos/{key}.jpg": image for key, image, _ in samples}

    def make_image(path: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": to_data_url(images[path]), "detail": "low"}}

    return {
        "source": write_lines(
            folder / "openai.jsonl", [{"messages": to_messages(record, make_image)} for record in records]
        )
    }


def write_axolotl(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    images = {f"photos/{key}.jpg": image for key, image, _ in samples}

    def make_image(path: str) -> dict[str, Any]:
        if path.endswith("2.jpg"):
            return {"type": "image", "base64": base64.b64encode(images[path]).decode()}
        return {"type": "image", "path" if path.endswith("4.jpg") else "url": str(folder / path)}

    return {
        "source": write_lines(
            folder / "axolotl.jsonl", [{"messages": to_messages(record, make_image)} for record in records]
        )
    }


def write_llama_factory(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    rows = [
        {"messages": to_messages(record), "images": [record["image"]] if "image" in record else []}
        for record in records
    ]
    write_json(folder / "demo.json", rows)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {
        "file_name": "demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
    }
    info = {"other": {"hf_hub_url": "a/b"}, "demo": {**entry, "tags": tags}}
    return {"source": write_json(folder / "dataset_info.json", info) + ":demo"}


def write_datasets_parquet(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    datasets = pytest.importorskip("datasets")
    images = {f"photos/{key}.jpg": image for key, image, _ in samples}
    rows = {
        "conversations": [record["conversations"] for record in records],
        "image": [
            {"bytes": images[record["image"]], "path": None} if "image" in record else None for record in records
        ],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.to_parquet(str(folder / "train-00000-of-00001.parquet"), batch_size=3)
    return {"source": str(folder / "train-*.parquet")}


def write_datasets_messages(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    """Write messages of parts and a list of images, as HuggingFaceH4/llava-instruct-mix-vsft has them."""
    images = {f"photos/{key}.jpg": image for key, image, _ in samples}
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "messages": to_messages(record, lambda path: {"type": "image"}),
            "images": [{"bytes": images[record["image"]], "path": "a.jpg"}] if "image" in record else [],
        }
        for record in records
    ]
    # All parts have the same fields, and null where they have none.
    for row in rows:
        for message in row["messages"]:
            message["content"] = [{"index": None, "text": None, **part} for part in message["content"]]
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    (folder / "data").mkdir()
    data.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    (folder / "README.md").write_text("---\n---\n")
    return {"source": str(folder / "data")}


def write_datasets_disk(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    datasets = pytest.importorskip("datasets")
    rows = {
        "messages": [to_messages(record) for record in records],
        "image": [str(folder / record["image"]) if "image" in record else None for record in records],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(str(folder / "saved"), num_shards=2)
    return {"source": str(folder / "saved")}


def write_onevision(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    """Write the layout of lmms-lab/LLaVA-558K-Webdataset, with its Energon description."""
    images = {f"photos/{key}.jpg": image for key, image, _ in samples}
    (folder / "ov").mkdir()
    with webdataset.ShardWriter(str(folder / "ov" / "pretrain-%d.tar"), maxcount=4, verbose=0) as tars:
        for number, record in enumerate(records):
            content: dict[str, Any] = {"texts": to_messages(record), "media": "text"}
            sample: dict[str, Any] = {"__key__": f"text_{number}"}
            if "image" in record:
                name = f"0_{Path(record['image']).name}"
                content |= {"media": "image", "name": [name]}
                sample = {"__key__": f"image_{number}", name: images[record["image"]]}
            tars.write({**sample, "json": json.dumps(content).encode()})
    description = {
        "sample_type": {"__module__": "aiak_training_llm.data.multimodal", "__class__": "MultiMixQASample"},
        "part_filter": "sample_loader.py:part_filter",
        "sample_loader": "sample_loader.py:sample_loader",
    }
    names = sorted(path.name for path in (folder / "ov").glob("*.tar"))
    write_energon_files(folder / "ov", description, names)
    (folder / "ov" / ".nv-meta" / "sample_loader.py").write_text("raise SystemExit('this code must not run')\n")
    return {"source": str(folder / "ov")}


def write_turns_beside_images(folder: Path, samples: list[CaptionSample], records: list[dict[str, Any]]) -> Settings:
    images = {f"photos/{key}.jpg": image for key, image, _ in samples}
    (folder / "list").mkdir()
    with webdataset.ShardWriter(str(folder / "list" / "%06d.tar"), maxcount=4, verbose=0) as tars:
        for number, record in enumerate(records):
            image = {"jpg": images[record["image"]]} if "image" in record else {}
            tars.write({"__key__": f"{number:03d}", **image, "json": to_messages(record)})
    return {"source": str(folder / "list")}


CONVERSATION_WRITERS: dict[str, Writer] = {
    "LLaVA, list": write_llava_list,
    "LLaVA, lines": write_llava_lines,
    "ShareGPT": write_sharegpt,
    "column map": write_column_map,
    "messages": write_messages,
    "messages, data URLs": write_data_urls,
    "Axolotl": write_axolotl,
    "LLaMA-Factory": write_llama_factory,
    "parquet of datasets": write_datasets_parquet,
    "parquet of datasets, messages": write_datasets_messages,
    "Arrow of datasets": write_datasets_disk,
    "LLaVA-OneVision tars": write_onevision,
    "tars with lists of turns": write_turns_beside_images,
}


# --- captions --------------------------------------------------------------------------------------------------------
# each writer takes a folder and samples

CaptionWriter = Callable[[Path, list[CaptionSample]], Settings]


def make_metadata(sample: CaptionSample) -> dict[str, Any]:
    """Make the metadata that img2dataset writes for a sample."""
    return {
        "url": f"https://example.org/{sample.key}.jpg",
        "caption": sample.caption,
        "key": sample.key,
        "status": "success",
        "error_message": None,
        "width": 20,
        "height": 8,
        "exif": "{}",
        "sha256": "0" * 64,
    }


def write_energon_files(
    folder: Path, description: dict[str, Any], names: list[str], exclude: tuple[str, ...] = ()
) -> None:
    """Write .nv-meta, as `energon prepare` does."""
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.dump(description, sort_keys=False))
    split = {"exclude": list(exclude), "split_parts": {"train": names, "val": [], "test": []}}
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.dump(split))
    (folder / ".nv-meta" / ".info.yaml").write_text(yaml.dump({"shard_counts": dict.fromkeys(names, 1)}))


def write_caption_files(folder: Path, samples: list[CaptionSample]) -> Settings:
    """Write img2dataset's output format `files`."""
    root = folder / "files"
    for first in (0, 5):
        below = root / f"{first // 5:05d}"
        below.mkdir(parents=True)
        for sample in samples[first : first + 5]:
            (below / f"{sample.key}.jpg").write_bytes(sample.image)
            (below / f"{sample.key}.txt").write_text(sample.caption)
            (below / f"{sample.key}.json").write_text(json.dumps(make_metadata(sample), indent=4))
        parquet.write_table(
            pa.Table.from_pylist([make_metadata(s) for s in samples[first : first + 5]]), root / f"{below.name}.parquet"
        )
        (root / f"{below.name}_stats.json").write_text("{}")
    return {"source": str(root)}


def write_caption_tars(folder: Path, samples: list[CaptionSample]) -> Settings:
    """Write img2dataset's output format `webdataset`."""
    root = folder / "tars"
    root.mkdir()
    for first in (0, 5):
        with webdataset.TarWriter(str(root / f"{first // 5:05d}.tar")) as tar:
            for sample in samples[first : first + 5]:
                metadata = json.dumps(make_metadata(sample), indent=4)
                tar.write(
                    {"__key__": sample.key, "jpg": sample.image, "txt": sample.caption, "json": metadata.encode()}
                )
        parquet.write_table(
            pa.Table.from_pylist([make_metadata(s) for s in samples[first : first + 5]]),
            root / f"{first // 5:05d}.parquet",
        )
        (root / f"{first // 5:05d}_stats.json").write_text("{}")
    return {"source": str(root)}


def write_caption_parquet(folder: Path, samples: list[CaptionSample]) -> Settings:
    """Write img2dataset's output format `parquet`."""
    rows = [{**make_metadata(sample), "txt": sample.caption, "jpg": sample.image} for sample in samples]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet", row_group_size=3)
    return {"source": str(folder / "00000.parquet")}


def write_captioned_tars(folder: Path, samples: list[CaptionSample]) -> Settings:
    """Write foreign tars with two images and two texts in each sample."""
    root = folder / "foreign"
    root.mkdir()
    with webdataset.ShardWriter(str(root / "%04d.tar"), maxcount=3, verbose=0) as tars:
        for sample in samples:
            texts = {"title.txt": "unused", "alt.txt": sample.caption}
            tars.write({"__key__": f"x/{sample.key}", "mask.png": samples[0].image, "photo.jpg": sample.image, **texts})
    return {"source": str(root), "columns": {"image": "photo.jpg", "text": "alt.txt"}}


def write_datasets_captions(folder: Path, samples: list[CaptionSample]) -> Settings:
    datasets = pytest.importorskip("datasets")
    write_photos(folder / "original", samples)
    paths = [str(folder / "original" / "photos" / f"{sample.key}.jpg") for sample in samples]
    rows = {"image": paths, "text": [sample.caption for sample in samples]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(str(folder / "text.parquet"))
    return {"source": str(folder / "text.parquet")}


def write_image_folder(folder: Path, samples: list[CaptionSample]) -> Settings:
    """Write Hugging Face's ImageFolder."""
    root = folder / "train"
    write_photos(root, samples)
    write_lines(root / "metadata.jsonl", [{"file_name": f"photos/{s.key}.jpg", "text": s.caption} for s in samples])
    return {"source": str(root)}


def write_csv(folder: Path, samples: list[CaptionSample]) -> Settings:
    write_photos(folder / "csv", samples)
    with (folder / "csv" / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        writer.writerows((f"photos/{sample.key}.jpg", sample.caption) for sample in samples)
    return {"source": str(folder / "csv" / "captions.csv")}


def write_energon_captions(folder: Path, samples: list[CaptionSample]) -> Settings:
    """Write an Energon folder with another split and excluded samples."""
    root = folder / "energon"
    (root / "shards").mkdir(parents=True)
    other = [CaptionSample(f"other{number}", samples[0].image, "not for training") for number in range(2)]
    for name, part in {"a": [other[0], *samples[:6]], "b": samples[6:], "c": other}.items():
        with webdataset.TarWriter(str(root / "shards" / f"{name}.tar")) as tar:
            for sample in part:
                tar.write({"__key__": sample.key, "jpg": sample.image, "json": {"about": {"caption": sample.caption}}})
    sample_type = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
    description = {"sample_type": sample_type, "field_map": {"image": "jpg", "caption": "json[about][caption]"}}
    write_energon_files(root, description, ["shards/a.tar", "shards/b.tar"], ("shards/a.tar/other0",))
    return {"source": str(root)}


def write_energon_questions(folder: Path, samples: list[CaptionSample]) -> Settings:
    root = folder / "questions"
    root.mkdir()
    with webdataset.TarWriter(str(root / "a.tar")) as tar:
        for sample in samples:
            value = {"q": PROMPT, "a": ["other", sample.caption, sample.caption]}
            tar.write({"__key__": sample.key, "jpg": sample.image, "qa.json": value})
    fields = {"image": "jpg", "context": "qa.json[q]", "answers": "qa.json[a]"}
    write_energon_files(
        root, {"__module__": "megatron.energon", "__class__": "VQAWebdataset", "field_map": fields}, ["a.tar"]
    )
    return {"source": str(root)}


def write_cauldron(folder: Path, samples: list[CaptionSample]) -> Settings:
    """Write questions and answers as HuggingFaceM4/the_cauldron has them."""
    rows = [
        {
            "images": [{"bytes": sample.image, "path": None}],
            "texts": [{"user": PROMPT, "assistant": sample.caption, "source": "x"}],
        }
        for sample in samples
    ]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "cauldron.parquet")
    return {"source": str(folder / "cauldron.parquet")}


def write_alpaca(folder: Path, samples: list[CaptionSample]) -> Settings:
    root = folder / "alpaca"
    write_photos(root, samples)
    rows = [{"instruction": PROMPT, "output": s.caption, "images": [f"photos/{s.key}.jpg"]} for s in samples]
    write_json(root / "demo.json", rows)
    columns = {"prompt": "instruction", "query": "input", "response": "output", "images": "images"}
    return {"source": write_json(root / "dataset_info.json", {"demo": {"file_name": "demo.json", "columns": columns}})}


CAPTION_WRITERS: dict[str, CaptionWriter] = {
    "img2dataset files": write_caption_files,
    "img2dataset tars": write_caption_tars,
    "img2dataset parquet": write_caption_parquet,
    "WebDataset with keys": write_captioned_tars,
    "parquet of datasets, text": write_datasets_captions,
    "ImageFolder": write_image_folder,
    "CSV": write_csv,
    "Energon captions": write_energon_captions,
    "Energon questions": write_energon_questions,
    "the_cauldron": write_cauldron,
    "LLaMA-Factory, alpaca": write_alpaca,
}


# --- several images --------------------------------------------------------------------------------------------------
# each writer writes a first record with two images and a second one with one

SeveralWriter = Callable[[Path, list[CaptionSample]], Settings]


def write_several_rows(make_row: Callable[[list[str]], dict[str, Any]]) -> SeveralWriter:
    """Return a writer of JSON lines. `make_row` gets the paths of the images of a row."""

    def write(folder: Path, samples: list[CaptionSample]) -> Settings:
        paths = [f"photos/{sample.key}.jpg" for sample in samples]
        return {"source": write_lines(folder / "a.jsonl", [make_row(paths[:2]), make_row(paths[2:3])])}

    return write


def make_turns(tag: str = "<image>\n") -> list[dict[str, str]]:
    return [{"from": "human", "value": f"{tag}{PROMPT}"}, {"from": "gpt", "value": "A picture."}]


def make_numbered_row(paths: list[str]) -> dict[str, Any]:
    others = {f"image_{number}": path for number, path in enumerate(paths[1:], start=2)}
    return {"image": paths[0], **others, "conversations": make_turns()}


def make_parts_row(paths: list[str]) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": path}} for path in paths]
    content = [*parts, {"type": "text", "text": PROMPT}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A picture."}]}


def make_axolotl_row(paths: list[str]) -> dict[str, Any]:
    row = make_parts_row(paths)
    row["messages"][0]["content"][:-1] = [{"type": "image", "path": path} for path in paths]
    return row


def write_several_llama_factory(folder: Path, samples: list[CaptionSample]) -> Settings:
    rows = write_several_rows(lambda paths: {"conversations": make_turns(), "images": paths})
    path = rows(folder, samples)["source"]
    entry = {"file_name": Path(path).name, "formatting": "sharegpt", "columns": {"images": "images"}}
    return {"source": write_json(folder / "dataset_info.json", {"demo": entry}) + ":demo"}


def write_several_parquet(folder: Path, samples: list[CaptionSample]) -> Settings:
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": sample.image, "path": None} for sample in samples]
    rows = [
        {"images": images[:2], "conversations": make_turns()},
        {"images": images[2:3], "conversations": make_turns()},
    ]
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    data.to_parquet(str(folder / "a.parquet"))
    return {"source": str(folder / "a.parquet")}


def write_two_image_columns(folder: Path, samples: list[CaptionSample]) -> Settings:
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": sample.image, "path": None} for sample in samples]
    rows = [
        {"image": images[0], "screenshot": images[1], "conversations": make_turns()},
        {"image": images[2], "screenshot": None, "conversations": make_turns()},
    ]
    data = datasets.Dataset.from_list(rows)
    for name in ("image", "screenshot"):
        data = data.cast_column(name, datasets.Image())
    data.to_parquet(str(folder / "a.parquet"))
    return {"source": str(folder / "a.parquet")}


def write_several_disk(folder: Path, samples: list[CaptionSample]) -> Settings:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_parquet(write_several_parquet(folder, samples)["source"]).save_to_disk(str(folder / "saved"))
    return {"source": str(folder / "saved")}


def write_several_members(suffixes: list[str], content: Callable[[list[str]], Any]) -> SeveralWriter:
    """Return a writer of a tar. `content` makes the JSON of a sample of the suffixes of its images."""

    def write(folder: Path, samples: list[CaptionSample]) -> Settings:
        (folder / "tars").mkdir()
        with webdataset.TarWriter(str(folder / "tars" / "a.tar")) as tar:
            for key, part in (("0", samples[:2]), ("1", samples[2:3])):
                images = {suffix: sample.image for suffix, sample in zip(suffixes, part, strict=False)}
                tar.write({"__key__": key, **images, "json": json.dumps(content(list(images))).encode()})
        return {"source": str(folder / "tars")}

    return write


def write_several_list(folder: Path, samples: list[CaptionSample]) -> Settings:
    """Write a tar with one image in each sample, of which the first names two."""
    (folder / "tars").mkdir()
    with webdataset.TarWriter(str(folder / "tars" / "a.tar")) as tar:
        for key, paths in (("0", ["a.jpg", "b.jpg"]), ("1", ["a.jpg"])):
            record = {"conversations": make_turns(), "images": paths}
            tar.write({"__key__": key, "jpg": samples[0].image, "json": record})
    return {"source": str(folder / "tars")}


def write_several_energon(folder: Path, samples: list[CaptionSample]) -> Settings:
    write = write_several_members(
        ["jpg", "2.jpg"], lambda names: {"messages": to_messages({"conversations": make_turns()})}
    )
    settings = write(folder, samples)
    sample_type = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_energon_files(folder / "tars", {"sample_type": sample_type}, ["a.tar"])
    return settings


def write_several_metadata(folder: Path, samples: list[CaptionSample]) -> Settings:
    root = folder / "train"
    write_photos(root, samples)
    paths = [f"photos/{sample.key}.jpg" for sample in samples]
    rows = [{"file_names": paths[:2], "conversations": make_turns("")}, {"file_name": paths[2], "text": "A picture."}]
    write_lines(root / "metadata.jsonl", rows)
    return {"source": str(root)}


SEVERAL_IMAGE_WRITERS: dict[str, tuple[SeveralWriter, str]] = {
    "LLaVA, list of images": (
        write_several_rows(lambda paths: {"image": paths if paths[1:] else paths[0], "conversations": make_turns()}),
        "image[0]",
    ),
    "LLaVA, numbered fields": (write_several_rows(make_numbered_row), "image_2"),
    "ShareGPT": (write_several_rows(lambda paths: {"images": paths, "conversations": make_turns()}), "images[0]"),
    "messages of parts": (write_several_rows(make_parts_row), "messages[0].content[0]"),
    "Axolotl": (write_several_rows(make_axolotl_row), "messages[0].content[0]"),
    "questions and answers": (
        write_several_rows(lambda paths: {"question": PROMPT, "answer": "A.", "images": paths}),
        "images[0]",
    ),
    "captions": (write_several_rows(lambda paths: {"caption": "A picture.", "images": paths}), "images[0]"),
    "LLaMA-Factory": (write_several_llama_factory, "images[0]"),
    "parquet, list of images": (write_several_parquet, "images[0]"),
    "parquet, two columns": (write_two_image_columns, "image and screenshot"),
    "Arrow of datasets": (write_several_disk, "images[0]"),
    "WebDataset, two members": (
        write_several_members(["0.jpg", "1.jpg"], lambda names: {"conversations": make_turns()}),
        "",
    ),
    "WebDataset, a numbered member": (
        write_several_members(["jpg", "2.jpg"], lambda names: {"conversations": make_turns()}),
        "",
    ),
    "WebDataset, a list in the record": (
        write_several_list,
        "images",
    ),
    "LLaVA-OneVision tars": (
        write_several_members(
            ["0_a.jpg", "1_b.jpg"],
            lambda names: {"texts": to_messages({"conversations": make_turns()}), "media": "image", "name": names},
        ),
        "image[0]",
    ),
    "Energon": (write_several_energon, ""),
    "ImageFolder": (write_several_metadata, "file_names"),
}
"""Writers of records with several images, and the field that is named."""
