"""DeepSpeed is imported without MLflow. test_layouts.py, test_divided.py and test_worker.py train with the engine."""

import importlib
import sys
from pathlib import Path

import pytest

from pipelines.training import engine


def test_deepspeed_is_imported_without_mlflow_which_can_be_imported_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module in the place of DeepSpeed tries to import MLflow, like the autotuner of DeepSpeed."""
    (tmp_path / "mlflow.py").touch()
    (tmp_path / "deepspeed.py").write_text("try:\n    import mlflow\nexcept ImportError:\n    mlflow = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("deepspeed", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # restored after the test
        del sys.modules[name]
    assert engine.import_deepspeed().mlflow is None
    assert importlib.import_module("mlflow").__file__ == str(tmp_path / "mlflow.py")
    del sys.modules["deepspeed"]
    assert engine.import_deepspeed().mlflow, "an imported MLflow stays"
