"""A small random LLaVA in a folder, whose answers end only at their limit, so that tests can interrupt them."""

from pathlib import Path

import torch

from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.conversation import train_word_tokenizer
from redux.model import build_model
from redux.processor import build_processor, record_training_format
from redux.settings import CMAI, VMTC

WORDS = (
    "Is it a red circle? What colour is the shape? yes, a blue square or a green triangle. You are kind. "
    "USER: ASSISTANT:"
)

POSITIONS = 32768
"""Positions of the model: an answer of this length takes minutes."""


def save_model(folder: Path) -> None:
    """Save the model with its tokenizer and processor.  32 px in patches of 8 px: 16 patches, 8 image tokens."""
    tokenizer = train_word_tokenizer([WORDS], POSITIONS)
    tower = TowerSizes(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    language = LanguageSizes(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
    )
    torch.manual_seed(0)
    model = build_model(ModelSettings(tower=tower, language=language, vmtc=VMTC(), cmai=CMAI()), tokenizer).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(0.16 / weight.std())  # logits of different words and images differ visibly
        # No answer has an end or another special token: their logits are 0, and a word's is always higher.
        model.get_output_embeddings().weight[tokenizer.all_special_ids] = 0
    record_training_format(model, tokenizer, "vicuna_v1", "pad")
    model.save_pretrained(folder)
    build_processor(model.config, tokenizer).save_pretrained(folder)
