"""The plan of the house holds: its floors and arrows, its tools, its tree."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("redux", "pipelines", "jobs", "cluster", "tests")
TOP = {*FLOORS, "pyproject.toml", "README.md", "LICENSE"}


def output_of(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-m", "ruff", "check", "--output-format=concise"),
        (sys.executable, "-m", "ruff", "format", "--check"),
        (sys.executable, "-m", "mypy"),
        (str(Path(sysconfig.get_path("scripts"), "lint-imports")),),
    ],
    ids=["ruff-check", "ruff-format", "mypy", "import-linter"],
)
def test_the_tools_have_nothing_to_say(command: tuple[str, ...]) -> None:
    ended = output_of(*command)
    assert ended.returncode == 0, f"\n{ended.stdout}"


def test_the_top_level_holds_the_floors_and_nothing_else() -> None:
    assert {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")} <= TOP


def test_every_python_file_opens_with_why() -> None:
    texts = {str(path): (ROOT / path).read_text() for path in tracked() if path.suffix == ".py"}
    assert texts
    # an empty `__init__.py` says all there is to say
    assert not [name for name, text in texts.items() if text and not text.startswith(('"""', 'r"""'))]


def test_the_library_loads_neither_cluster_nor_job_file() -> None:
    """What import-linter reads from the text, seen when the library really is imported."""
    modules = [".".join(path.with_suffix("").parts) for path in tracked() if path.match("redux/*.py")]
    assert modules
    program = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(*sys.modules)"
    ended = output_of(sys.executable, "-c", program)
    assert ended.returncode == 0, f"\n{ended.stdout}"
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert "redux" in loaded
    assert not loaded & {"ray", "deepspeed", "pydantic", "pipelines", "jobs"}
