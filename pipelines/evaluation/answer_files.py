"""Names of the files of an evaluation. This module imports nothing, so that reports load fast."""

ANSWERS_FOLDER = "answers"
"""Folder of the answers in a run folder."""

PROVENANCE_FILE = "provenance.json"
"""File in it with the model and the settings that gave the answers."""
