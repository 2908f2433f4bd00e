"""Load checkpoints completely, or refuse them.

transformers initialises missing weights at random and ignores unknown ones, both with a warning. A model that is
partly random trains and scores like any other, so here both are errors. Weights that transformers itself calls
harmless (tied heads, buffers of older versions) stay harmless.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from redux.conversation import IMAGE_TOKEN

CONVERSION_HINT = "redux export {path} --out DIR writes a copy with the right names"

WRAPPERS = {
    "base_model.model.": "PEFT",
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
}
"""Prefixes of parameter names, and the wrapper that adds each."""

DAMAGE_ERRORS = ("SafetensorError", "UnpicklingError", "EOFError")
"""Names of errors that readers raise for damaged files of weights. Nothing here unpickles."""

GIT_LFS_HEADER = b"version https://git-lfs"

ADAPTER_PARAMETER = re.compile(r"\.(lora_|base_layer\.|modules_to_save\.)")
"""Pattern in parameter names of PEFT adapters that were not merged."""


class UnmappedWeightsError(ValueError):
    """Error of a file of weights that this machine cannot map into memory, though it may be complete."""


def load_model(
    model_class: Any, path: str | os.PathLike, *, label: str, ignored: Collection[str] = (), **options: Any
) -> Any:
    """Load a model of a transformers class with all of its weights.

    Args:
        model_class: the class, whose `from_pretrained` is called.
        path: folder or hub id.
        label: name of the checkpoint in an error.
        ignored: prefixes of weights that the checkpoint may hold besides those of the model.
        options: arguments of `from_pretrained`.

    Raises:
        ValueError: weights are missing, unexpected or of another shape, or files are damaged or cannot be mapped.
        OSError: there is no such checkpoint.
    """
    with report_damage(path, label):
        # Without ignore_mismatched_sizes a weight of another shape is a RuntimeError that does not name it.
        model, loading_info = model_class.from_pretrained(
            path, output_loading_info=True, **{"ignore_mismatched_sizes": True, **options}
        )
    check_loading(loading_info, path, label, ignored)
    return model


@contextmanager
def report_damage(path: str | os.PathLike | None, label: str) -> Iterator[None]:
    """Turn errors of damaged weight files into a ValueError that names the checkpoint.

    transformers' table of missing weights is hidden, as `check_loading` reports them in one line.
    """
    reporter = logging.getLogger("transformers.modeling_utils")
    # A filter, since the level of errors would also hide layers that are not sharded.
    reporter.addFilter(_is_no_report)
    try:
        yield
    except Exception as error:
        # torch raises it for a file that is larger than the address space or the memory that may be committed.
        if isinstance(error, RuntimeError) and "unable to mmap" in str(error):
            raise UnmappedWeightsError(
                f"{label}: got {path}, whose weights cannot be mapped into memory, allowed: a machine with more memory "
                f"({_cut_to_first_sentence(str(error))})"
            ) from error
        if type(error).__name__ not in DAMAGE_ERRORS:
            raise
        # A clone without git-lfs has small text files in place of the weights.
        pointers = [file.name for file in sorted(Path(path or "").glob("*")) if _is_pointer(file)]
        if pointers:
            reason = f"{pointers[0]} is a git-lfs pointer; git lfs pull fetches the file"
        else:
            reason = _cut_to_first_sentence(str(error))
        raise ValueError(f"{label}: got {path} with damaged weights, allowed: complete files ({reason})") from error
    finally:
        reporter.removeFilter(_is_no_report)


def check_loading(
    loading_info: Mapping[str, Any], path: str | os.PathLike | None, label: str, ignored: Collection[str] = ()
) -> None:
    """Check transformers' loading information.

    Args:
        loading_info: second result of `from_pretrained` with `output_loading_info`.
        path, label, ignored: as for `load_model`.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    unexpected = sorted(name for name in loading_info["unexpected_keys"] if not name.startswith(tuple(ignored)))
    shapes = {
        name: f"{name} of shape {list(got)} for {list(expected)}"
        for name, got, expected in loading_info["mismatched_keys"]
    }
    problems = {
        "without": sorted(loading_info["missing_keys"] - shapes.keys()),
        "with unknown": unexpected,
        "with": [shapes[name] for name in sorted(shapes)],
    }
    descriptions = [f"{problem} {_summarize_names(names)}" for problem, names in problems.items() if names]
    if descriptions:
        raise ValueError(
            f"{label}: got {path} {', '.join(descriptions)}, allowed: a checkpoint with exactly the model's weights"
            + describe_names(unexpected, path)
        )


def describe_names(names: Collection[str], path: str | os.PathLike | None) -> str:
    """Describe the origin of unexpected parameter names and the remedy; "" if they show none."""
    # Adapters first: their names carry the prefix of PEFT, too, and need another remedy.
    if any(ADAPTER_PARAMETER.search(f".{name}") for name in names):
        return "; these are PEFT adapters: merge them first, by merge_and_unload"
    for prefix, wrapper in WRAPPERS.items():
        if any(f".{prefix}" in f".{name}" for name in names):
            return f"; these names were saved by {wrapper}: {CONVERSION_HINT.format(path=path)}"
    return ""


def load_tokenizer(folder: str | os.PathLike, label: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder; ValueError if there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except MemoryError:
        raise
    except Exception as error:  # The package tokenizers raises plain Exception for a damaged file
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{label}: got {folder}, allowed: a folder with a tokenizer that can be read; {reason}"
        ) from error


def check_image_token(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, path: str | os.PathLike, label: str
) -> None:
    """Raise a ValueError unless the tokenizer's `<image>` is the token that the model replaces by an image."""
    known = IMAGE_TOKEN in tokenizer.get_vocab()
    if not known or tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
        got = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) if known else f"no {IMAGE_TOKEN}"
        raise ValueError(
            f"{label}: got {path} with {got} in its tokenizer, allowed: {IMAGE_TOKEN} as token "
            f"{config.image_token_id}, which the model's configuration names"
        )


def check_layout(config: Mapping[str, Any], path: str | os.PathLike, label: str) -> None:
    """Raise a ValueError for a checkpoint in the layout of the LLaVA repository, which transformers cannot read.

    Args:
        config: content of its config.json.
        path: folder, hub id or URL, for the error.
        label: name of the checkpoint in the error.
    """
    if "mm_vision_tower" in config and "vision_config" not in config:
        raise ValueError(
            f"{label}: got {path} in the layout of the LLaVA repository, allowed: that of transformers; "
            + CONVERSION_HINT.format(path=path)
        )


def strip_wrappers(name: str) -> str:
    """Remove the parts of a parameter's name that wrappers add.

    >>> strip_wrappers("module._orig_mod.model.language_model._orig_mod.norm.weight")
    'model.language_model.norm.weight'
    """
    # torch.compile may wrap any submodule, the others only the whole model.
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix) if prefix != "_orig_mod." else name.replace(prefix, "")
    return strip_wrappers(name) if name.startswith(tuple(WRAPPERS)) else name


def _summarize_names(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _cut_to_first_sentence(text: str) -> str:
    """Return the first sentence of an error."""
    return " ".join(text.split()).partition(". ")[0]


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _is_pointer(file: Path) -> bool:
    """Return True if a file is a git-lfs pointer in place of its content."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(GIT_LFS_HEADER)) == GIT_LFS_HEADER
