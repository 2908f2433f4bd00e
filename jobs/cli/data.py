"""`redux shards`: make, index and verify WebDataset shards, and store features of their images."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.cli.arguments import build_pair_parser, parse_count, parse_fraction


def add_parsers(verbs: Any) -> None:
    """Add the parsers of this group."""
    shards = verbs.add_parser(
        "shards",
        help="make, index or verify WebDataset shards, or store features of their images",
        description="Make WebDataset shards from common forms of data, index tars of another program, verify shards, "
        "or store features of their images. Folders are local, or any URL that fsspec opens, such as s3://bucket/folder.",
    ).add_subparsers(metavar="ACTION", required=True)
    _add_make(shards)
    _add_index(shards)
    _add_verify(shards)
    _add_features(shards)


def _add_make(shards: Any) -> None:
    make = shards.add_parser(
        "make",
        help="make shards from records or captions and their images",
        description="Write records with their images as shards with an index. The source is a file or folder of "
        "records in the form of LLaVA, ShareGPT or OpenAI messages (JSON, JSON Lines, parquet, Arrow, CSV), an entry "
        "of LLaMA-Factory's dataset_info.json, images with captions, WebDataset tars, or an Energon folder. Rejected "
        "records are explained, and listed in quarantine.jsonl. The same command resumes after an interruption.",
        epilog="examples: redux shards make --source llava_v1_5_mix665k.json --images data --out s3://bucket/mix665k "
        "--max-bad-fraction 0.001; redux shards make --source 'data/train-*.parquet' --out shards/mine",
    )
    _add_source(make)
    make.add_argument("--out", metavar="URI", required=True, help="folder of the shards")
    make.add_argument(
        "--samples-per-shard",
        metavar="N",
        type=parse_count,
        default=1000,
        help="records per shard (default: %(default)s)",
    )
    make.add_argument(
        "--max-words", metavar="N", type=parse_count, help="reject records with more words (default: no limit)"
    )
    make.add_argument(
        "--image-size",
        metavar="N",
        type=parse_count,
        help="store images as squares of N x N pixels. They decode twenty times faster and take 340 kB each for N=336",
    )
    make.add_argument(
        "--image-aspect-ratio",
        choices=("pad", "crop"),
        default="pad",
        help="how --image-size makes squares (default: %(default)s)",
    )
    _add_max_bad_fraction(make)
    make.set_defaults(verb=_call("make_set"))


def _add_source(make: argparse.ArgumentParser) -> None:
    """Add what the shards are made of."""
    source = make.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--source",
        metavar="PATH",
        help="file, folder or URL of the data; a pattern in quotes for several files; or FOLDER/dataset_info.json:NAME",
    )
    source.add_argument("--easy-vqa", choices=("train", "test"), help="conversations of easy-VQA instead of a source")
    make.add_argument(
        "--images", metavar="DIR", help="folder of the images that records name (default: the folder of the source)"
    )
    make.add_argument(
        "--columns",
        metavar="COLUMN=NAME",
        nargs="+",
        type=build_pair_parser("COLUMN=NAME"),
        default=[],
        help="names of columns that differ from the usual ones, such as conversations=chat or question=prompt "
        "answer=reply; `redux explain 'data.make.*.columns'` lists the columns",
    )
    make.add_argument("--image-key", metavar="NAME", help="column, or suffix in tars, of the image")
    make.add_argument("--text-key", metavar="NAME", help="column, or suffix in tars, of the caption")
    make.add_argument("--prompt", metavar="TEXT", help="question of captions (default: empty)")
    make.add_argument(
        "--fix",
        action="store_true",
        help="repair records where only one repair is possible, and list them in repaired.jsonl",
    )


def _add_max_bad_fraction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad-fraction",
        metavar="FRACTION",
        type=parse_fraction,
        default=0.0,
        help="fail if a larger fraction of the records is rejected (default: %(default)s)",
    )


def _add_index(shards: Any) -> None:
    index = shards.add_parser(
        "index",
        help="write the index of tars of another program",
        description="Write the index of WebDataset tars that another program made: the samples that WebDataset reads. "
        "A sample needs KEY.json, a record in LLaVA's form, and KEY.jpg (or png, webp, ...) or no image. A key ends at "
        "the first dot of a file name, and the members of a sample must be adjacent (tar --sort=name). Rejected "
        "samples are listed in quarantine.jsonl with a reason. The summary counts every member as used, ignored or "
        "rejected. An index of an earlier version of Redux is written in its present form.",
        epilog="example: redux shards index s3://bucket/tars",
    )
    _add_max_bad_fraction(index)
    index.add_argument("folder", metavar="URI", help="folder of the tars")
    index.set_defaults(verb=_call("index_set"))


def _add_verify(shards: Any) -> None:
    verify = shards.add_parser(
        "verify",
        help="check shards against their index, or against the samples that a run used",
        description="Check shards against their index, byte for byte. With --consumed, check instead in "
        "RUN/consumed.jsonl that each stage used each sample once per epoch.",
        epilog="example: redux shards verify runs/quickstart/shards/captions --consumed runs/quickstart",
    )
    verify.add_argument("--decode", action="store_true", help="also decode every image")
    verify.add_argument("--consumed", metavar="RUN", type=Path, help="folder of a run that trained on the shards")
    verify.add_argument("folder", metavar="URI", help="folder of the shards")
    verify.set_defaults(verb=_call("verify_shards"))


def _add_features(shards: Any) -> None:
    features = shards.add_parser(
        "features",
        help="store the outputs of a frozen image tower",
        description="Encode each image of a set once with the image tower of a model and its VMTC, and store the "
        "features that the projector takes. Stages with a frozen tower read them in place of images, if the job names "
        "them in data.features. The same command resumes after an interruption.",
        epilog="example: redux shards features shards/mine --model runs/mine/assembled --precision bf16 --out "
        "shards/mine-features; redux run job.yaml data.features.mine=shards/mine-features",
    )
    features.add_argument("folder", metavar="URI", help="folder of the shards")
    features.add_argument(
        "--model", metavar="MODEL", required=True, help="folder, hub id or URL of a LLaVA, or folder of a run"
    )
    features.add_argument("--out", metavar="URI", required=True, help="folder of the features")
    features.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of the stage that reads the features (default: %(default)s)",
    )
    features.add_argument(
        "--image-aspect-ratio", choices=("pad", "crop"), help="how images become squares (default: that of the model)"
    )
    features.add_argument(
        "--image-backend", choices=("exact", "fast"), default="exact", help="decoder of images (default: %(default)s)"
    )
    features.set_defaults(verb=_call("store_features"))


def _call(function: str) -> Callable[[argparse.Namespace], None]:
    """Build a handler that calls a function of jobs.shards."""

    def call(arguments: argparse.Namespace) -> None:
        from jobs import shards

        getattr(shards, function)(arguments)

    return call
