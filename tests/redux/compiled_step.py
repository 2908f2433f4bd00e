"""Compile a decoding step on a StaticCache; print by setting if its tokens are those of `generate`, and the graphs."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CLIPVisionConfig, LlamaConfig, StaticCache

sys.path.insert(0, str(Path(__file__).parents[2]))

from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration
from redux.plugin import inhibit
from redux.settings import CMAI

NEW, WORDS, IMAGE = 6, 64, 63
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SETTINGS = [
    CMAI(gamma_max=0.8, gamma_min=0.5),
    CMAI(gamma_max=0.8, scores="scores", focus="discounted", quantile="count", preamble=False),
]


def build() -> Any:
    torch.manual_seed(0)
    config = ReduxConfig(
        vision_config=CLIPVisionConfig(**SIZE, image_size=32, patch_size=8, projection_dim=32).to_dict(),
        text_config=LlamaConfig(**SIZE, num_key_value_heads=2, vocab_size=WORDS).to_dict(),
        image_token_index=IMAGE,
        vmtc=None,
    )
    model = ReduxForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.16) if weight.dim() > 1 else weight
    return model


@torch.no_grad()
def main() -> None:
    model = build()
    ids = torch.randint(3, 60, (2, 30))
    ids[:, 5:21] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32)}
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    for cmai in SETTINGS:
        inhibit(model, cmai)
        expected = model.generate(**inputs, **options, suppress_tokens=[IMAGE])[:, ids.shape[1] :]
        length = ids.shape[1] + NEW
        cache = StaticCache(config=model.config.text_config, max_cache_len=length)
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        step = torch.compile(model, backend=counter, fullgraph=True)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        logits = model(**inputs, position_ids=positions, past_key_values=cache).logits
        positions, tokens = positions[:, -1:], []
        for new in range(NEW):
            logits = logits[:, -1:].clone()
            logits[..., IMAGE] = -torch.inf
            tokens.append(logits.argmax(dim=-1))
            visible = torch.cat([mask, torch.ones(2, new + 1, dtype=torch.long)], dim=1).bool()
            visible = torch.nn.functional.pad(visible, (0, length - visible.shape[1]))[:, None, None]
            positions = positions + 1
            call = {"input_ids": tokens[-1], "attention_mask": visible, "position_ids": positions}
            logits = step(**call, past_key_values=cache).logits
        print(torch.equal(torch.cat(tokens, dim=1), expected), counter.frame_count)


if __name__ == "__main__":
    main()
