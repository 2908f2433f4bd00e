"""No file that the packages read can run code: no pickle, no unsafe loader of YAML, torch or NumPy."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve"}
ALLOWED = {
    # The error of a trial, which Ray has just written in a folder that only this user opens.
    "pipelines/search/driver.py": ["ray.cloudpickle"],
    # A benchmark's plan for the processes that it starts.
    "jobs/bench/train.py": ["import pickle"],
}
"""Pickles that only our processes can have written."""

UNSAFE = {"full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}


def list_sources() -> list[Path]:
    return [path for package in ("redux", "pipelines", "jobs") for path in sorted((ROOT / package).rglob("*.py"))]


def find_unsafe_code(text: str) -> Iterator[str]:
    """Find the imports and calls with which a file that is read could run code."""
    tree = ast.parse(text)
    loaders = set(find_safe_loaders(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"import {alias.name}" for alias in names if alias.name in FORBIDDEN)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in FORBIDDEN:
                yield f"from {module}"
            case ast.ImportFrom(module="torch" | "numpy" | "yaml", names=names):
                yield from (f"from … import {alias.name}" for alias in names if "load" in alias.name.lower())
            case ast.Attribute(attr=name) if name in UNSAFE | FORBIDDEN:
                yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name)):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if (module, name) == ("torch", "load") and keywords.get("weights_only") != "True":
                    yield "torch.load without weights_only=True"
                if module in ("np", "numpy") and keywords.get("allow_pickle", "False") != "False":
                    yield f"{name} with allow_pickle"
                loader = keywords.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
                if module == "yaml" and name in ("load", "load_all") and loader not in loaders:
                    yield f"yaml.{name} without a safe loader"


def find_safe_loaders(tree: ast.AST) -> Iterator[str]:
    """Find the safe loaders of PyYAML, and subclasses of them in the file."""
    loaders = ("yaml.SafeLoader", "yaml.CSafeLoader")
    yield from loaders
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & set(loaders):
            yield node.name


@pytest.mark.parametrize("path", list_sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_that_is_read_can_run_code(path: Path) -> None:
    assert list(find_unsafe_code(path.read_text())) == ALLOWED.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import ray\nray.cloudpickle.load(file)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.load(text, yaml.FullLoader)",
        "import yaml\nyaml.unsafe_load(text)",
    ],
)
def test_unsafe_code_is_found(text: str) -> None:
    assert len(list(find_unsafe_code(text))) == 1
