"""Packed rows: their conversations are found, split and joined, and CMAI computes each as it does alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from redux import attention
from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration
from redux.packed import PackedConversations
from redux.settings import CMAI, VMTC

IMAGE = 60
CMAIS = {
    "weights": CMAI(gamma_max=0.8, gamma_min=0.4),
    "first layer without": CMAI(gamma_max=0.8),
    "scores": CMAI(gamma_max=0.8, gamma_min=0.4, scores="scores"),
    "sum": CMAI(gamma_max=0.8, gamma_min=0.4, focus="sum"),
    "discounted": CMAI(gamma_max=0.8, gamma_min=0.4, focus="discounted"),
    "without preamble": CMAI(gamma_max=0.8, gamma_min=0.4, preamble=False),
    "count": CMAI(gamma_max=0.8, gamma_min=0.4, quantile="count"),
}


@pytest.mark.parametrize("seed", range(20))
def test_conversations_are_split_and_joined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, 30))
    cuts = [np.flatnonzero(rng.random(length - 1) < 0.2) + 1 for _ in range(3)]
    rows = [np.concatenate([np.arange(len(part)) for part in np.split(np.arange(length), cut)]) for cut in cuts]
    sizes = [len(part) for cut in cuts for part in np.split(np.arange(length), cut)]
    conversations = PackedConversations.find(torch.tensor(np.stack(rows)))
    if len(sizes) == 3:
        assert conversations is None
        return
    assert conversations is not None
    assert conversations.padding.sum(dim=1).tolist() == sizes
    values = torch.randn(3, 2, length, 4)
    split = conversations.split(values)
    flat = values.transpose(1, 2).flatten(0, 1)
    kept = split.transpose(1, 2)[conversations.padding.bool()]
    assert torch.equal(kept, flat)
    assert torch.equal(conversations.join(split.transpose(1, 2)), values.transpose(1, 2))
    assert torch.equal(conversations.split_flags(torch.ones(3, length, dtype=torch.bool)), conversations.padding.bool())


def build_model(cmai: CMAI, head_dim: int = 16, layers: int = 3) -> ReduxForConditionalGeneration:
    sizes: dict[str, Any] = {"hidden_size": 2 * head_dim, "intermediate_size": 32, "num_attention_heads": 2}
    tower = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=16, patch_size=4)
    text = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=64, num_key_value_heads=1)
    torch.manual_seed(0)
    config = ReduxConfig(
        vision_config=tower.to_dict(),
        text_config=text.to_dict(),
        image_token_index=IMAGE,
        cmai=cmai,
        vmtc=VMTC(stages=1),
    )
    return ReduxForConditionalGeneration(config).train()


def make_conversations(image_tokens: int) -> list[Tensor]:
    """Conversations with an image, text alone, two images, and an image at the end."""
    image = [IMAGE] * image_tokens
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, IMAGE, size).tolist() for size in (4, 5, 3, 2, 3, 4)]
    parts = [
        [1, *image, *texts[0]],
        [1, *texts[1]],
        [1, *texts[2], *image, *texts[3], *image, *texts[4]],
        [1, *texts[5], *image],
    ]
    return [torch.tensor([part]) for part in parts]


def compare_with_each_alone(model: ReduxForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare hidden states and gradients of packed rows with those of each conversation alone."""
    parts = make_conversations(model.config.image_seq_length)
    counts = [int((part == IMAGE).sum()) // model.config.image_seq_length for part in parts]
    images = torch.rand(sum(counts), 3, 16, 16)
    lengths = []
    attend = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention,
        "sdpa_attention_forward",
        lambda module, query, *args, **kwargs: (lengths.append(query.shape[2]), attend(module, query, *args, **kwargs))[
            1
        ],
    )
    packed = model.model(
        input_ids=torch.cat(parts, dim=1),
        pixel_values=images,
        position_ids=torch.cat([torch.arange(part.shape[1]) for part in parts])[None],
        use_cache=False,
    ).last_hidden_state
    longest = max(part.shape[1] for part in parts)
    assert all(length <= longest for length in lengths), "no pair of two conversations is computed"
    weight = torch.randn(packed.shape)
    (packed * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    alone = [
        model.model(input_ids=part, pixel_values=pixels if len(pixels) else None, use_cache=False).last_hidden_state
        for part, pixels in zip(parts, images.split(counts), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)
    (torch.cat(alone, dim=1) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CMAIS)
def test_packed_conversations_are_computed_as_each_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_with_each_alone(build_model(CMAIS[kind]), monkeypatch)
