"""DeepSpeed is imported without MLflow and Inductor. test_layouts.py and test_worker.py train with the engine."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.training import engine
from pipelines.training.plan import StagePlan
from tests.pipelines import ranks


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


def train_a_step(plan: StagePlan) -> bool:
    """Train a step on this rank, and tell if Inductor is imported."""
    deepspeed_engine = engine.build_engine(plan, 1)
    next(ranks.run_steps(deepspeed_engine, plan, 0, 1))
    return "torch._inductor.compile_fx" in sys.modules


@pytest.mark.integration
def test_training_does_not_import_inductor(new_plan: Callable[..., StagePlan], tmp_path: Path) -> None:
    assert ranks.run_on_ranks(tmp_path, 1, train_a_step, new_plan(zero_stage=2)) == [False]
