"""Low-rank adapters in the language model's linear layers (arXiv 2106.09685), by the package peft.

They are put into the model in place: tower, projector, hooks and attention functions stay what they are, so VMTC and
CMAI work on an adapted model as on any other.  Merged again, it is a plain model and is saved as one.

peft is an extra, imported where it is needed.
"""

from importlib.util import find_spec

from torch import nn

from pipelines.training.stage import Lora
from redux.extras import write_install_command
from redux.model import ReduxForConditionalGeneration

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The language model's linear layers but for the head, as LLaVA adapts them."""


def require(what: str = "lora") -> None:
    """ValueError where peft is not installed.  what: the setting that asks for it."""
    if find_spec("peft") is None:
        raise ValueError(f"{what}: got one, allowed: null, or the package peft: {write_install_command('lora')}")


def wrap(llava: ReduxForConditionalGeneration, lora: Lora) -> None:
    """Put new adapters (seed torch before) into the model, in its own dtype; of the language part they alone train.

    They start as nothing: the outputs stay those of the model without them.
    ValueError where the model has adapters, or peft is not installed.
    """
    require()
    from peft import LoraConfig, inject_adapter_in_model

    if adapters(llava):
        raise ValueError("lora: got a model with adapters, allowed: one without, such as merge gives")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=LAYERS)
    inject_adapter_in_model(config, llava.model.language_model)
    for parameter in llava.parameters_by_part()["language"]:
        parameter.requires_grad_(False)
    for parameter in adapters(llava):
        parameter.requires_grad_(True)


def adapters(llava: ReduxForConditionalGeneration) -> list[nn.Parameter]:
    """The adapters' parameters; none where the model was not wrapped."""
    return [parameter for name, parameter in llava.named_parameters() if ".lora_" in name]


def merge(llava: ReduxForConditionalGeneration) -> ReduxForConditionalGeneration:
    """The same model, its adapters added to its weights: W + alpha / rank B A, rounded to the weights' dtype.

    ValueError where that is not finite.
    """
    require()
    from peft.tuners.lora import LoraLayer

    for module in list(llava.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)
                setattr(module, name, layer.get_base_layer())
    if hasattr(llava.model.language_model, "peft_config"):  # by which transformers would take it for an adapted one
        del llava.model.language_model.peft_config
    return llava
