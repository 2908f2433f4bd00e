"""The configuration of a served model. Does not import vLLM."""

from transformers import LlamaConfig, PreTrainedConfig

from redux.configuration import ReduxConfig
from redux.model import ReduxModel

WITHOUT_CMAI = """--hf-overrides '{"cmai": null}'"""
"""Option of vLLM that turns CMAI off."""


def check_config(config: PreTrainedConfig) -> ReduxConfig:
    """Read the configuration that vLLM loaded, with its overrides.

    Raises:
        ValueError: CMAI is on, or as `ReduxConfig`.
    """
    checked = ReduxConfig(**config.to_dict())
    if checked.cmai:
        raise ValueError(f"cmai: got settings, allowed: null, because vLLM has no CMAI; without CMAI: {WITHOUT_CMAI}")
    return checked


def build_image_encoder(config: ReduxConfig) -> ReduxModel:
    """Build the tower and the projector with random weights, without the language model."""
    # transformers builds all three parts; a language model without layers costs nothing and is dropped.
    width = config.text_config.hidden_size
    language = LlamaConfig(vocab_size=1, hidden_size=width, num_hidden_layers=0, num_attention_heads=1)
    encoder = ReduxModel(ReduxConfig(**{**config.to_dict(), "text_config": language.to_dict()}))
    del encoder.language_model
    return encoder
