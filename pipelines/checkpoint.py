"""Checkpoints: a directory with a manifest that was written last.  Without a valid manifest it does not exist.

Ray Train uploads the engine's files of all ranks into one directory; when every rank is done, rank 0 lists them with
sizes and checksums.  A crash at any moment leaves the newest complete checkpoint the newest one.

    step-000100/
      engine/…        DeepSpeed's own files, one part a rank
      manifest.json   {"cursor": 100, "workers": 2, "files": {"engine/…": [bytes, sha256], …}}
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed

MANIFEST = "manifest.json"
TAG = "engine"


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.  cursor: global batches done; workers: ranks that wrote it."""

    path: Path
    cursor: int
    workers: int


def newest(folder: Path) -> Saved | None:
    """The complete checkpoint with the highest cursor; what is incomplete or damaged is passed over."""
    for path in sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True):
        if (saved := _verified(path)) is not None:
            return saved
        print(f"checkpoint {path} is incomplete or damaged: passed over")
    return None


def _verified(path: Path) -> Saved | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["files"] != _listing(path) or path.name != _name(manifest["cursor"]):
            return None
        return Saved(path, manifest["cursor"], manifest["workers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _name(cursor: int) -> str:
    return f"step-{cursor:06d}"


def _listing(path: Path) -> dict[str, list]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.endswith(MANIFEST))
    return {str(file.relative_to(path)): [file.stat().st_size, _checksum(file)] for file in files}


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save(engine: Any, folder: Path, cursor: int) -> None:
    """Save the engine after `cursor` global batches.  Every rank calls it; `folder` is the run's storage."""
    name = _name(cursor)
    with tempfile.TemporaryDirectory() as temporary:
        engine.save_checkpoint(temporary, tag=TAG)
        ray.train.report(
            {"cursor": cursor}, checkpoint=ray.train.Checkpoint.from_directory(temporary), checkpoint_dir_name=name
        )
    torch.distributed.barrier()  # every rank's part is there
    if engine.global_rank == 0:
        manifest = {"cursor": cursor, "workers": engine.dp_world_size, "files": _listing(folder / name)}
        unfinished = folder / name / f".{MANIFEST}"
        unfinished.write_text(json.dumps(manifest))
        os.replace(unfinished, folder / name / MANIFEST)


def restore(engine: Any, saved: Saved) -> None:
    """Load a checkpoint into an engine of the same number of workers; ValueError for another number."""
    if saved.workers != engine.dp_world_size:
        raise ValueError(f"workers: got {engine.dp_world_size}, allowed: {saved.workers}, as {saved.path} was written")
    engine.load_checkpoint(str(saved.path), tag=TAG)
