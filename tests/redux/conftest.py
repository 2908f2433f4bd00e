"""A word tokenizer and tiny models, shared: every one is random but seeded, so a failure comes again."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.conversation import TEMPLATES, train_word_tokenizer
from redux.model import ReduxForConditionalGeneration, build_model
from redux.settings import CMAI, VMTC, Reduction

TEXTS = (
    "USER: <image>\nIs it a red circle? ASSISTANT: yes, it is.",
    "What colour is the shape? A blue square.\nNo, green triangle!",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower by threads, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_word_tokenizer([*TEXTS, TEMPLATES["vicuna_v1"].system], 128)


@pytest.fixture(scope="session")
def tower() -> TowerSizes:
    """32 px in patches of 8 px: 16 patches, of which VMTC's defaults leave 8."""
    return TowerSizes(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )


@pytest.fixture(scope="session")
def tiny(tokenizer: PreTrainedTokenizerFast, tower: TowerSizes) -> Callable[..., ReduxForConditionalGeneration]:
    """Builds a model of the given modules with always the same weights."""

    on = (VMTC(), CMAI())

    def make(
        vmtc: VMTC | None = on[0], cmai: CMAI | None = on[1], layers: int = 3, reduction: Reduction | None = None
    ) -> ReduxForConditionalGeneration:
        language = LanguageSizes(hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64)
        torch.manual_seed(0)
        settings = ModelSettings(tower=tower, language=language, vmtc=vmtc, cmai=cmai, reduction=reduction)
        model = build_model(settings, tokenizer).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:  # Attention of weights as initialised is all but uniform
                    weight.mul_(0.16 / weight.std())
        return model

    return make


@pytest.fixture(scope="session")
def sample(tokenizer: PreTrainedTokenizerFast) -> Callable[..., dict[str, Any]]:
    """Builds the inputs of one conversation for a model; `seed` chooses image and words, `text` their number."""

    def make(model: ReduxForConditionalGeneration, text: int = 12, seed: int = 0) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        words = torch.randint(5, len(tokenizer), (text,), generator=draw).tolist()
        image = [model.config.image_token_id] * model.config.image_seq_length
        ids = torch.tensor([[tokenizer.bos_token_id, words[0], *image, *words[1:]]])
        side = model.config.vision_config.image_size
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side, generator=draw)}

    return make


@pytest.fixture(scope="session")
def new_model() -> Callable[[str], Any]:
    """Function that returns a new copy of the model of a family; families.py has the families."""
    from tests.redux import families

    models = {family: families.build(kind, config()) for family, (kind, config) in families.FAMILIES.items()}
    return lambda family: copy.deepcopy(models[family])
