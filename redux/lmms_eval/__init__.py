"""lmms-eval, plugged in: models that answer through `redux.respondent`, and the sixteen instructions as its tasks.

    pip install -e ".[lmms-eval]"
    lmms-eval --model redux --model_args pretrained=FOLDER --tasks gqa --batch_size 16
    lmms-eval --model redux --model_args pretrained=FOLDER --tasks redux_instructions --batch_size 16 \\
        --include_path "$(python -c 'import redux.lmms_eval; print(redux.lmms_eval.TASKS)')"

lmms-eval finds the model by an entry point, the tasks by the path.  It brings some two hundred packages, among them a
W&B older than that of the extra `wandb`, so it wants an environment of its own.
"""

from pathlib import Path
from typing import Any

TASKS_FOLDER = Path(__file__).with_name("tasks")
"""What lmms-eval's --include_path takes."""


def build_manifest() -> Any:
    """What lmms-eval's entry point group `lmms_eval.models` asks for; the model itself is imported when it is used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="redux", simple_class_path="redux.lmms_eval.model.Redux")
