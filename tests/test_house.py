"""Rules of the repository: its packages and imports, its tools, its files."""

import ast
import importlib.metadata
import io
import re
import subprocess
import sys
import sysconfig
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("redux", "pipelines", "jobs", "cluster", "tests")
TOP_LEVEL = {*PACKAGES, "pyproject.toml", "README.md", "LICENSE"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def list_tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.integration
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
def test_the_tools_report_no_problem(command: tuple[str, ...]) -> None:
    ended = run(*command)
    assert ended.returncode == 0, f"\n{ended.stdout}"


def test_the_top_level_has_only_the_packages_and_their_pages() -> None:
    assert {path.parts[0] for path in list_tracked_files() if not path.parts[0].startswith(".")} <= TOP_LEVEL


def test_every_entry_point_exists() -> None:
    """Read them from pyproject.toml: an installed package may be older than the tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    points = [
        importlib.metadata.EntryPoint(name, value, group)
        for group, entries in groups.items()
        for name, value in entries.items()
    ]
    assert len(points) >= 2
    assert [point for point in points if not callable(point.load())] == []


def test_every_python_file_opens_with_a_docstring() -> None:
    texts = {str(path): (ROOT / path).read_text() for path in list_tracked_files() if path.suffix == ".py"}
    assert texts
    # An empty `__init__.py` needs none.
    assert not [name for name, text in texts.items() if text and not text.startswith(('"""', 'r"""'))]


@pytest.mark.integration
def test_the_library_imports_neither_ray_nor_pydantic_and_needs_no_triton() -> None:
    """import-linter reads the sources; this test imports the library."""
    modules = [
        ".".join(path.with_suffix("").parts)
        for path in list_tracked_files()
        if path.parent == Path("redux") and path.suffix == ".py"
    ]
    assert modules
    program = (
        "import importlib, sys\nsys.modules['triton'] = None\n"
        f"for name in {modules}: importlib.import_module(name)\nprint(*sys.modules)"
    )
    ended = run(sys.executable, "-c", program)
    assert ended.returncode == 0, f"\n{ended.stdout}"
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert "redux" in loaded
    assert not loaded & {"ray", "deepspeed", "pydantic", "pipelines", "jobs"}


SOURCES = ("redux", "pipelines", "jobs")

CLAUSE_OPENERS = {"What", "Whether", "Of", "Who", "How", "Where", "When", "Which", "Why", "That", "Those", "As", "If"}
"""First words that begin a clause instead of an imperative or a noun phrase."""


def parse_sources() -> dict[Path, ast.Module]:
    paths = [path for path in list_tracked_files() if path.suffix == ".py" and path.parts[0] in SOURCES]
    return {path: ast.parse((ROOT / path).read_text()) for path in paths}


def test_docstrings_open_with_an_imperative_or_a_noun_phrase() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    openers = {
        f"{path}:{getattr(node, 'lineno', 1)}": re.match(r"\W*(\w*)", docstring)[1]  # type: ignore[index]
        for path, tree in parse_sources().items()
        for node in ast.walk(tree)
        if isinstance(node, documented) and (docstring := ast.get_docstring(node))
    }
    assert {place: word for place, word in openers.items() if word in CLAUSE_OPENERS} == {}


def test_names_of_classes_and_public_constants_occur_once() -> None:
    places: dict[str, set[str]] = {}
    for path, tree in parse_sources().items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]
            names = [name for name in names if name.isupper() and len(name) > 1]
            for name in [*names, *([node.name] if isinstance(node, ast.ClassDef) else [])]:
                if not name.startswith("_"):
                    places.setdefault(name, set()).add(str(path))
    assert {name: sorted(found) for name, found in places.items() if len(found) > 1} == {}


def test_pipelines_have_comments_where_a_reader_needs_them() -> None:
    """At least 4 comments per 100 lines: at boundaries of processes, in long functions, at workarounds."""
    lines = comments = 0
    for path in parse_sources():
        if path.parts[0] == "pipelines":
            text = (ROOT / path).read_text()
            lines += sum(bool(line.strip()) for line in text.splitlines())
            comments += sum(
                token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline)
            )
    assert 100 * comments / lines >= 4
