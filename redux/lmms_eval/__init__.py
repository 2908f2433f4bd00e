"""Plugin for lmms-eval: the model `redux`, which answers through `redux.answering`, and instruction tasks.

    pip install -e ".[lmms-eval]"
    lmms-eval --model redux --model_args pretrained=FOLDER --tasks gqa --batch_size 16
    lmms-eval --model redux --model_args pretrained=FOLDER --tasks redux_instructions --batch_size 16 \\
        --include_path "$(python -c 'import redux.lmms_eval; print(redux.lmms_eval.TASKS_FOLDER)')"

`redux_instructions` are the paper's sixteen, `redux_instructions_held_out` the constraints that nothing teaches,
`redux_instruction_pairs` prompts with two of the sixteen each.
lmms-eval finds the model by an entry point and the tasks by their path. It installs about two hundred packages, with
an older W&B than that of the extra `wandb`, so it needs a separate environment.
"""

from pathlib import Path
from typing import Any

TASKS_FOLDER = Path(__file__).with_name("tasks")
"""Path for lmms-eval's --include_path."""


def build_manifest() -> Any:
    """Build the manifest for lmms-eval's entry point group `lmms_eval.models`; the model is imported on first use."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="redux", simple_class_path="redux.lmms_eval.model.Redux")
