"""Imports of packages without another package that costs them a second of CPU and that is not needed here."""

import importlib
import sys
from types import ModuleType
from typing import Any


def import_without(name: str, absent: str) -> ModuleType:
    """Import a module as if an optional package that it imports were not installed, unless that is imported already.

    Args:
        name: name of the module.
        absent: name of the package.
    """
    # None makes an import of the package fail.
    modules: dict[str, Any] = sys.modules
    modules.setdefault(absent, None)
    try:
        return importlib.import_module(name)
    finally:
        if modules[absent] is None:
            del modules[absent]
