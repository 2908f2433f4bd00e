"""Functions and an actor that fail in processes of Ray. They import little, since each process imports this module."""

import errno
import os
from typing import Any


class BrokenActor:
    """Actor whose constructor or methods fail."""

    def __init__(self, where: str) -> None:
        if where == "start":
            raise_refusal()

    def __call__(self, row: dict) -> dict:
        return raise_refusal()


def raise_refusal(*_: Any) -> Any:
    try:
        raise KeyError("beneath")
    except KeyError as error:
        raise ValueError("set: got 1,\n    allowed: 2") from error


def raise_permission_error(row: dict) -> dict:
    raise PermissionError(errno.EACCES, "Permission denied", "/a")


def end_process(row: dict) -> dict:
    os._exit(3)
