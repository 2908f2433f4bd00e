"""Token compression (VMTC) and attention inhibition (CMAI) for vision-language models, on torch and transformers.

    model = redux.ReduxForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf", vmtc=redux.VMTC(tokens=64))
    redux.inhibit(another_model_of_transformers, redux.CMAI())

A name is imported when it is first used, so that readers of conversations and images do without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redux.configuration import ReduxConfig as ReduxConfig
    from redux.kernels import set_kernels as set_kernels
    from redux.model import ReduxForConditionalGeneration as ReduxForConditionalGeneration
    from redux.plugin import inhibit as inhibit
    from redux.presets import PRESETS as PRESETS
    from redux.presets import Preset as Preset
    from redux.pretrained import assemble as assemble
    from redux.settings import CMAI as CMAI
    from redux.settings import VMTC as VMTC
    from redux.settings import Reduction as Reduction

_MODULES_BY_NAME = {
    "CMAI": "settings",
    "PRESETS": "presets",
    "Preset": "presets",
    "Reduction": "settings",
    "ReduxConfig": "configuration",
    "ReduxForConditionalGeneration": "model",
    "VMTC": "settings",
    "assemble": "pretrained",
    "inhibit": "plugin",
    "set_kernels": "kernels",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES_BY_NAME:
        raise AttributeError(f"module 'redux' has no attribute {name!r}")
    return getattr(import_module(f"redux.{_MODULES_BY_NAME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES_BY_NAME]
