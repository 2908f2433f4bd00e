"""From a checkpoint to a folder that `from_pretrained` opens: the stage's model, or that after any step.

One way for both: the model as it was before the first step, with the checkpoint's trained weights in place of its own.
It runs without DeepSpeed and at once, so a model of many ZeRO-3 workers needs no gathering, only memory: that of the
model as it is stored, and 4 bytes more for each parameter that is trained.
"""

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoTokenizer

from pipelines.core import failures, storage
from pipelines.training import checkpoint, engine
from pipelines.training.checkpoint import MANIFEST, DamagedError
from pipelines.training.plan import Plan
from redux import processor
from redux.model import ReduxForConditionalGeneration

SHARD = "1GB"
"""Of a file of the model: each is in memory whole on its way to storage, and has its deadline there."""


def model(plan: Plan, cursor: int) -> None:
    """Write the stage's model, as it was after so many steps, and its tokenizer."""
    write(plan, checkpoint.read(storage.join(plan.folder, checkpoint.name(cursor))), plan.result)


def write(plan: Plan, saved: checkpoint.Saved, out: str) -> None:
    """Write the model of a checkpoint to a folder or URL, with all that is needed to ask it as it was trained.

    The weights have the precision in which the stage computed.  ValueError where the checkpoint is damaged.
    """
    module, parts = engine.trainee(plan)
    trained = {id(one) for part in plan.stage.learning_rate for one in parts[part]}
    mine = {name: one for name, one in module.named_parameters() if id(one) in trained}
    try:
        weights = checkpoint.weights(saved, {name: one.shape for name, one in mine.items()})
    except DamagedError as error:
        raise ValueError(str(error)) from None
    with torch.no_grad():
        for name, one in mine.items():
            one.copy_(weights[name])
    whole = engine.trained(module, plan).to(engine.DTYPES[plan.stage.precision])
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)
    with tempfile.TemporaryDirectory() as folder, failures.locate_errors(folder):
        if isinstance(whole, ReduxForConditionalGeneration):
            processor.record_training_format(whole, tokenizer, plan.template, plan.image_aspect_ratio)
            processor.build_processor(whole.config, tokenizer).save_pretrained(folder)
        else:
            tokenizer.save_pretrained(folder)
        whole.save_pretrained(folder, max_shard_size=SHARD)
        upload(Path(folder), out, saved.url)


def upload(folder: Path, out: str, source: str) -> None:
    """Write the files of a local folder to a folder or URL, and last a manifest that names their source.

    Where not all can be written, what is there is removed, so that the same command can be given again.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    try:
        for path in files:
            storage.write(storage.join(out, path.name), path.read_bytes())
        sizes = {path.name: path.stat().st_size for path in files}
        storage.write(storage.join(out, MANIFEST), json.dumps({"from": source, "files": sizes}).encode())
    except BaseException:
        for path in files:
            with suppress(OSError, ValueError):
                storage.remove(storage.join(out, path.name))
        raise


def finished(url: str) -> bool:
    """Whether a model was written there to its end."""
    return storage.exists(storage.join(url, MANIFEST))
