"""Plug-in for vLLM: the stock server serves models with VMTC, with CMAI off.

    pip install -e ".[vllm]"
    vllm serve FOLDER --hf-overrides '{"cmai": null}'

vLLM finds the plug-in by an entry point and the model by `architectures` in its config.json. vLLM's attention cannot
run CMAI, so a model with CMAI is refused, unless the override above turns it off. vLLM needs older transformers than
the newest that Redux allows, so it needs a separate environment.
"""


def register() -> None:
    """Register the model, for vLLM's entry point group `vllm.general_plugins`. vLLM calls it in every process."""
    from vllm import ModelRegistry

    # A text, so that vLLM imports the model where it needs it.
    ModelRegistry.register_model("ReduxForConditionalGeneration", "redux.vllm.model:ServedRedux")
