"""Data is only ever data: nothing that is read can make Python do something, in none of the three floors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve"}
OWN = {
    # what Ray wrote a moment before in a folder that only this process's user opens: why a trial failed
    "pipelines/search/driver.py": ["ray.cloudpickle"],
    # a benchmark's plan for the processes that it starts
    "jobs/bench/train.py": ["import pickle"],
}
"""Pickles of one's own, which nobody else can have put there."""

UNSAFE = {"full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}


def sources() -> list[Path]:
    return [path for floor in ("redux", "pipelines", "jobs") for path in sorted((ROOT / floor).rglob("*.py"))]


def faults(text: str) -> Iterator[str]:
    """What the source does by which a file that it reads could run code."""
    tree = ast.parse(text)
    loaders = set(safe_loaders(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"import {one.name}" for one in names if one.name in FORBIDDEN)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in FORBIDDEN:
                yield f"from {module}"
            case ast.ImportFrom(module="torch" | "numpy" | "yaml", names=names):
                yield from (f"from … import {one.name}" for one in names if "load" in one.name.lower())
            case ast.Attribute(attr=name) if name in UNSAFE | FORBIDDEN:
                yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name)):
                given = {one.arg: ast.unparse(one.value) for one in node.keywords}
                if (module, name) == ("torch", "load") and given.get("weights_only") != "True":
                    yield "torch.load without weights_only=True"
                if module in ("np", "numpy") and given.get("allow_pickle", "False") != "False":
                    yield f"{name} with allow_pickle"
                loader = given.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
                if module == "yaml" and name in ("load", "load_all") and loader not in loaders:
                    yield f"yaml.{name} without a safe loader"


def safe_loaders(tree: ast.AST) -> Iterator[str]:
    """PyYAML's own, and classes of the file that are one."""
    own = ("yaml.SafeLoader", "yaml.CSafeLoader")
    yield from own
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and {ast.unparse(one) for one in node.bases} & set(own):
            yield node.name


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    assert list(faults(path.read_text())) == OWN.get(str(path.relative_to(ROOT)), [])


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
def test_what_can_is_found(text: str) -> None:
    assert len(list(faults(text))) == 1
