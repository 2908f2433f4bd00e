"""Opening of saved models by transformers' Auto classes and pipelines, after `import redux.auto`.

A model of this package has LLaVA's model_type, so that plain transformers opens its folder, too, without VMTC and CMAI.
After this import, `AutoModelForImageTextToText` and `pipeline("image-text-to-text")` open a LLaVA by the class that its
config.json names under `architectures`: models of this package with their methods, all others as before.
"""

from typing import Any

from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration


class LlavaByArchitecture(LlavaForConditionalGeneration):
    """Stand-in for the class of all LLaVAs, which opens each by its own class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a model as the Auto classes do: with its configuration, and loading information if it is requested."""
        return _choose_class(config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> LlavaForConditionalGeneration:
        return _choose_class(config)._from_config(config, **kwargs)


def _choose_class(config: PreTrainedConfig) -> type[LlavaForConditionalGeneration]:
    is_redux = ReduxForConditionalGeneration.__name__ in (config.architectures or ())
    return ReduxForConditionalGeneration if is_redux else LlavaForConditionalGeneration


# transformers (5.23) would otherwise prefer this class to code that a checkpoint brings along.
LlavaByArchitecture.__module__ = LlavaForConditionalGeneration.__module__

# A tuple of both classes would do, but transformers (5.23) then fails for a configuration without architectures.
AutoModelForImageTextToText.register(LlavaConfig, LlavaByArchitecture, exist_ok=True)
AutoModelForImageTextToText.register(ReduxConfig, ReduxForConditionalGeneration, exist_ok=True)
