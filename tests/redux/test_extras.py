"""An installation hint is a command that works."""

import json
import shlex
import subprocess
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from redux import extras
from redux.extras import write_install_command

ROOT = Path(__file__).parents[2]


def test_no_text_names_a_package_that_is_on_no_index() -> None:
    """The name stands in pyproject.toml, where extras name each other, and in code that looks the package up."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {name: (ROOT / name).read_text(errors="ignore") for name in listing if (ROOT / name).is_file()}
    hints = [name for name, text in texts.items() if f"{extras.PACKAGE}[" in text and name != "pyproject.toml"]
    assert hints == []


@pytest.mark.parametrize("folder", ["/srv/redux", "/home/me/my models/redux"])
def test_the_command_names_the_folder_that_pip_installed(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"url": Path(folder).as_uri(), "dir_info": {"editable": True}}
    (tmp_path / "direct_url.json").write_text(json.dumps(record))
    monkeypatch.setattr(extras, "distribution", lambda name: PathDistribution(tmp_path))
    assert shlex.split(write_install_command("lora")) == ["pip", "install", "-e", f"{folder}[lora]"]


def test_without_a_folder_a_clone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "distribution", lambda name: PathDistribution(tmp_path))
    assert write_install_command("s3") == 'pip install -e ".[s3]" in a clone of the repository'
