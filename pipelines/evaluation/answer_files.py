"""Names of the files of an evaluation. This module imports nothing heavy, so that reports load fast."""

from pathlib import Path

ANSWERS_FOLDER = "answers"
"""Folder of the answers in a run folder."""

PROVENANCE_FILE = "provenance.json"
"""File in it with the model and the settings that gave the answers."""


def find_partial_file(folder: Path, task: str) -> Path:
    """Return the file with the answers of a task until all its questions are answered."""
    return folder / f".{task}.jsonl"
