"""Nested settings, such as those of a job file."""

from collections.abc import Iterable, Mapping
from typing import Any

KEYS_WITHOUT_EFFECT = (
    "data.max_bad_fraction", "num_workers", "gpu_share", "recovery", "trackers", "model.kernels",
    "evaluate.batch_size", "evaluate.num_actors",
)  # fmt: skip
"""Keys of a job that change no result of a finished step."""


def is_in_sections(key: str, sections: Iterable[str]) -> bool:
    """Return True if a dotted path is one of these sections or lies in one.

    >>> is_in_sections("recovery.restarts", KEYS_WITHOUT_EFFECT), is_in_sections("evaluate.limit", KEYS_WITHOUT_EFFECT)
    (True, False)
    """
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted names; an empty dictionary stays a value.

    >>> flatten_dict({"a": {"b": 1, "c": {}}, "d": [2]})
    {'a.b': 1, 'a.c': {}, 'd': [2]}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_dict(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
