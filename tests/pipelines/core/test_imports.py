"""A module is imported without a package that it can do without; the package can be imported afterwards."""

import sys
from pathlib import Path

import pytest

from pipelines.core.imports import import_without


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module that imports another one if it exists; both can be imported."""
    (tmp_path / "costly_module.py").write_text("")
    (tmp_path / "frugal_module.py").write_text(
        "try:\n    import costly_module\nexcept ImportError:\n    costly_module = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("costly_module", "frugal_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "frugal_module"


def test_the_package_is_absent_during_the_import_only(package: str) -> None:
    module = import_without(package, "costly_module")
    assert module.costly_module is None
    assert "costly_module" not in sys.modules
    import costly_module  # type: ignore[import-not-found]

    assert import_without(package, "costly_module") is module
    assert sys.modules["costly_module"] is costly_module


def test_a_package_that_is_imported_already_stays(package: str) -> None:
    import costly_module

    assert import_without(package, "costly_module").costly_module is costly_module


def test_an_error_restores_the_package() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_without("no_such_module", "absent_module")
    assert "absent_module" not in sys.modules
