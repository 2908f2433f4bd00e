"""x"""

from pathlib import Path


def write(runs: list[Path], out: Path) -> None:
    """x."""
