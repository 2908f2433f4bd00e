"""Loading of the served model, if wanted twice with one set of weights."""

import os

import torch

from pipelines.serving.settings import ServedModel
from redux.chat import ChatModel, choose_methods, load_chat_model
from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration


def load_models(served: ServedModel) -> dict[str, ChatModel]:
    """Load the models of a server by name.

    Raises:
        ValueError: the path has no LLaVA, or the settings do not fit it.
    """
    if not torch.cuda.is_available():
        # Ray gives each actor one thread; the cores are shared by the replicas of this machine.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    methods = choose_methods(served.path, served.image_tokens, served.gamma)
    model = load_chat_model(served.path, device=served.device, **methods)
    models = {served.name: model}
    if served.compares:
        models[served.names[1]] = ChatModel(
            share_weights_without_methods(model.model), model.tokenizer, model.template, model.image_aspect_ratio
        )
    return models


def share_weights_without_methods(model: ReduxForConditionalGeneration) -> ReduxForConditionalGeneration:
    """Build a plain LLaVA with the weights of a model, in the same memory."""
    config = ReduxConfig(**{**model.config.to_dict(), "vmtc": None, "cmai": None, "reduction": None})
    with torch.device("meta"):
        plain = ReduxForConditionalGeneration(config)
    plain.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    # Buffers outside of the state dict, such as rotary frequencies, are on the meta device.
    own_buffers = dict(model.named_buffers())
    for name, _ in list(plain.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        plain.get_submodule(parent).register_buffer(leaf, own_buffers[name], persistent=False)
    plain.generation_config = model.generation_config
    return plain.eval()
