"""Pages, recipes, the reference and the examples in docstrings agree with the code."""

import doctest
import importlib
import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest

from jobs import document, reference
from jobs.command import _build_parser
from redux.benchmark_titles import BENCHMARK_TITLES

ROOT = Path(__file__).parents[1]
PAGES = [path for path in sorted(ROOT.rglob("*.md")) if not {"runs", "data"} & set(path.relative_to(ROOT).parts)]
HAND_WRITTEN = [path for path in PAGES if path.name != "REFERENCE.md"]
RECIPES = sorted((ROOT / "jobs" / "recipes").rglob("*.yaml"))

MODULES_WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for top in ("redux", "pipelines", "jobs")
    for path in sorted((ROOT / top).rglob("*.py"))
    if ">>>" in path.read_text()
]

COMMAND = re.compile(r"^ {4}((?:[A-Z_]+=\S+ )?(?:pip|redux) .+?(?:\\\n.+?)*)$", re.M)


def find_commands(page: Path) -> list[str]:
    """Find the commands of a page: indented lines, without their comments."""
    commands = []
    for found in COMMAND.finditer(page.read_text()):
        parts = found[1].replace("\\\n", " ").split("&&")
        commands += [shlex.join(shlex.split(part, comments=True)) for part in parts]
    return [command for command in commands if command.startswith("redux ")]


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_one(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in find_commands(page):
        try:
            arguments, rest = _build_parser().parse_known_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")
        assert not [word for word in rest if word.startswith("-")], command
        job = getattr(arguments, "job", None)
        if job and job.parts[0] == "jobs":
            assert (ROOT / job).exists(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_path_of_a_page_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:jobs|pipelines|redux|cluster|tests)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_and_name_of_a_page_exists(page: Path) -> None:
    """A page may name a module by its file name alone; in "`name` in `file.py`", the file contains the name."""
    text = page.read_text()
    for path in re.findall(r"`(\w+\.py)`", text):
        assert find_module(page, path), path
    for name, path in re.findall(r"`(\w+)`\s(?:in|of)\s+`([\w./-]+\.py)`", text):
        module = find_module(page, path)
        assert module
        assert re.search(rf"\b{name}\b", module.read_text()), f"{name} in {path}"


def find_module(page: Path, path: str) -> Path | None:
    """Find the module that a page names: by its path from the root or from the page, or by its name anywhere."""
    packages = [ROOT / name for name in ("redux", "pipelines", "jobs", "tests")]
    paths = [ROOT / path, page.parent / path, *(found for package in packages for found in package.rglob(path))]
    return next((found for found in paths if found.exists()), None)


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_line_of_a_page_runs(page: Path) -> None:
    for line in re.findall(r"python -c '([^'\n]+)'", page.read_text()):
        exec(line, {})


@pytest.mark.parametrize("name", BENCHMARK_TITLES)
def test_pages_and_the_recipe_name_each_benchmark(name: str) -> None:
    assert BENCHMARK_TITLES[name] in (ROOT / "README.md").read_text()
    assert re.search(rf"# .*\b{name}\b|^ +{name}: ", (ROOT / "jobs" / "README.md").read_text(), re.M)
    assert name in document.read_tree(ROOT / "jobs" / "recipes" / "evaluate.yaml")["evaluate"]["tasks"]


@pytest.mark.parametrize("module", MODULES_WITH_EXAMPLES)
def test_the_examples_in_docstrings_are_true(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed


def test_the_readme_fits_in_200_lines_and_maps_the_packages() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    section = re.search(r"^## Code map\n.*?^```\w*\n(.*?)^```", text, re.M | re.S)
    assert section
    mapped, folder = set(), ""
    for line in section[1].splitlines():
        name, *meaning = line.split()
        assert meaning, f"{name} has no meaning"
        folder = folder if line.startswith(" ") else name
        mapped.add(folder + name if line.startswith(" ") else name)
    assert [path for path in mapped if not (ROOT / path).exists()] == []
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for top in ("redux", "pipelines", "jobs")
        for path in (ROOT / top).glob("*/__init__.py")
    }
    assert packages <= mapped


def test_the_reference_is_that_of_the_code() -> None:
    assert (ROOT / "jobs" / "REFERENCE.md").read_text() == reference.write_reference(), (
        "redux explain > jobs/REFERENCE.md"
    )


@pytest.mark.parametrize("kind", reference.SCHEMAS)
def test_every_key_has_a_meaning(kind: str) -> None:
    assert [entry.path for entry in reference.list_keys(kind) if not entry.meaning] == []


@pytest.mark.parametrize("kind", reference.SCHEMAS)
def test_the_schemas_are_those_of_the_code(kind: str) -> None:
    path = ROOT / "jobs" / "schemas" / f"{kind}.schema.json"
    assert path.read_text() == reference.write_json_schema(kind) + "\n", f"redux schema {kind} > {path}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_names_its_schema_and_fits_it(path: Path) -> None:
    first = path.read_text().partition("\n")[0]
    assert first.startswith("# yaml-language-server: $schema=")
    schema = json.loads((path.parent / first.partition("$schema=")[2]).read_text())
    jsonschema.Draft202012Validator(schema).validate(document.read_tree(path))


def test_a_key_is_explained_under_any_name() -> None:
    text = reference.explain("train.instruct.max_rounds")
    assert text.startswith("train.*.max_rounds (job file)")
    assert "whole number >= 1 or null" in text
    with pytest.raises(ValueError, match=r"KEY: got rounds, allowed: a key of a file"):
        reference.explain("rounds")
