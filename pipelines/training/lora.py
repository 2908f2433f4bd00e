"""Low-rank adapters in the linear layers of the language model (arXiv 2106.09685), with the package peft.

Adapters are inserted in place. Tower, projector, hooks and attention functions stay unchanged, so VMTC and CMAI work on
an adapted model. After the adapters are merged, the model consists of plain layers and is saved as usual.

peft is an optional dependency, so functions import it when they need it.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from pipelines.training.stage import Lora
from redux.extras import write_install_command
from redux.model import PART_PREFIXES, ReduxForConditionalGeneration


def require_peft(setting: str = "lora") -> None:
    """Check that peft is installed.

    Args:
        setting: dotted path of the setting that needs it, for the message.

    Raises:
        ValueError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ValueError(f"{setting}: requires the package peft: {write_install_command('lora')}")


def add_adapters(llava: ReduxForConditionalGeneration, lora: Lora) -> None:
    """Add new adapters in the dtype of the model. Of the language part, only they train.

    New adapters do not change outputs. Their random weights follow torch's seed.

    Raises:
        ValueError: the model already has adapters, or peft is not installed.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    if list_adapter_parameters(llava):
        raise ValueError("lora: got a model with adapters, allowed: a model whose adapters are merged")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list_adapted_layers(llava)
    )
    inject_adapter_in_model(config, llava.model.language_model)
    # Of the whole language part, including the head outside of the wrapped module, only the adapters train.
    for parameter in llava.parameters_by_part()["language"]:
        parameter.requires_grad_(False)
    for parameter in list_adapter_parameters(llava):
        parameter.requires_grad_(True)


def list_adapted_layers(llava: ReduxForConditionalGeneration) -> list[str]:
    """List the names of all linear layers of the language model except the head, as in LLaVA."""
    # Names differ between models: Phi-3 has one layer for queries, keys and values.
    modules = llava.model.language_model.named_modules()
    return sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)})


def list_adapter_parameters(llava: ReduxForConditionalGeneration) -> list[nn.Parameter]:
    """List the parameters of the adapters; empty for a model without adapters."""
    return [parameter for name, parameter in llava.named_parameters() if ".lora_" in name]


def merge_adapters(llava: ReduxForConditionalGeneration) -> ReduxForConditionalGeneration:
    """Merge the adapters into the weights: W + alpha / rank B A, rounded to the dtype of W. Changes the model in place.

    Raises:
        ValueError: a merged weight is not finite, or peft is not installed.
    """
    require_peft()
    from peft.tuners.lora import LoraLayer

    # Replace each wrapped layer by its plain layer, with the adapter added to the weight.
    for module in list(llava.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)
                setattr(module, name, layer.get_base_layer())
    # transformers takes every model with this attribute for an adapted one, and saves adapters only.
    if hasattr(llava.model.language_model, "peft_config"):
        del llava.model.language_model.peft_config
    return llava


def save_adapters(
    llava: ReduxForConditionalGeneration, lora: Lora, other_parts: Sequence[str], base: str, folder: Path
) -> None:
    """Save the adapters and other trained parts as `PeftModel.from_pretrained` loads them.

    Args:
        llava: the model with its adapters.
        lora: settings of the adapters.
        other_parts: parts of the model whose weights were trained, too: tower, projector.
        base: folder, hub id or URL of the model without adapters.
        folder: local folder.

    Raises:
        ValueError: peft is not installed.
    """
    require_peft()
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    modules = [PART_PREFIXES[part] for part in other_parts]
    # The tower has layers of the same names, so a pattern names those of the language model.
    adapted = {
        name.rpartition(".")[2]
        for name, layer in llava.model.language_model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    pattern = rf"model\.language_model\..*\.({'|'.join(sorted(adapted))})"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=pattern,
        modules_to_save=modules or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    # PEFT's file has the names of its own wrapper, without the name of the adapter.
    weights = {
        f"base_model.model.{name.replace('.default.', '.')}": parameter.detach().contiguous()
        for name, parameter in llava.named_parameters()
        if ".lora_" in name or name.startswith(tuple(f"{module}." for module in modules))
    }
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
