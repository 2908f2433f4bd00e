"""LLaVAs with random weights in bf16, and inputs for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

from jobs.bench.gpu_speed.shapes import Shapes
from jobs.bench.gpu_speed.timing import Bench
from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI, VMTC


def build_config(shapes: Shapes, layers: int, vmtc: VMTC | None = None, cmai: CMAI | None = None) -> ReduxConfig:
    """Build the configuration of a LLaVA of these shapes; image tokens are the last of the vocabulary."""
    language = LlamaConfig(
        **shapes.language,
        num_key_value_heads=shapes.language["num_attention_heads"],
        num_hidden_layers=layers,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return ReduxConfig(
        vision_config=CLIPVisionConfig(**shapes.tower).to_dict(),
        text_config=language.to_dict(),
        image_token_index=shapes.language["vocab_size"] - 1,
        vmtc=vmtc,
        cmai=cmai,
    )


def build_model(bench: Bench, config: ReduxConfig) -> ReduxForConditionalGeneration:
    """Build a model with random weights in bf16 on the device."""
    # Random numbers for 7B weights are slow on the host, so they are drawn on the device.
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16), torch.device(bench.device):
        return ReduxForConditionalGeneration(config)


def share_weights(base: nn.Module, config: ReduxConfig) -> ReduxForConditionalGeneration:
    """Build a model of another configuration on the weights of one that exists: VMTC and CMAI add none."""
    with default_dtype(torch.bfloat16), torch.device("meta"):
        model = ReduxForConditionalGeneration(config)
    # The modules of both models have the same names, and one card has no room for several 7B models.
    modules = dict(base.named_modules())
    for name, module in model.named_modules():
        module._parameters.update(modules[name]._parameters)
        module._buffers.update(modules[name]._buffers)
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build floating-point tensors in this dtype."""
    former_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former_dtype)


def build_last_layer(bench: Bench, cmai: CMAI | None) -> Any:
    """Build a language model of 32 layers of which only the last one exists."""
    config = build_config(bench.shapes, 32, None, cmai)
    with default_dtype(torch.bfloat16), torch.device("meta"):
        model = ReduxForConditionalGeneration(config)
    decoder: Any = model.model.language_model
    decoder.layers = nn.ModuleList([decoder.layers[-1]])
    decoder.to_empty(device=bench.device)
    # `to_empty` leaves the rotary frequencies, which are computed and not stored, without values.
    with torch.device(bench.device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config.text_config)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.02)
    nn.init.ones_(decoder.layers[0].input_layernorm.weight)
    nn.init.ones_(decoder.layers[0].post_attention_layernorm.weight)
    return decoder.train()


def build_inputs(bench: Bench, model: ReduxForConditionalGeneration, batch: int, text: int) -> dict[str, Tensor]:
    """Build a batch of `prefix` text tokens, an image and `text` text tokens, without padding."""
    config, prefix = model.config, bench.shapes.prefix
    generator = torch.Generator().manual_seed(0)
    image = config.image_seq_length
    ids = torch.randint(3, config.image_token_index - 1, (batch, prefix + image + text), generator=generator)
    ids[:, prefix : prefix + image] = config.image_token_index
    side = config.vision_config.image_size
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {
        "input_ids": ids.to(bench.device),
        "attention_mask": torch.ones_like(ids).to(bench.device),
        "pixel_values": pixels.to(bench.device, torch.bfloat16),
    }


def list_methods(shapes: Shapes) -> dict[str, tuple[VMTC | None, CMAI | None]]:
    """List the settings of the variants of training and decoding, CMAI's being the defaults."""
    return {
        "VMTC 288": (VMTC(tokens=shapes.half), None),
        "CMAI 576": (None, CMAI()),
        "VMTC+CMAI 288": (VMTC(tokens=shapes.half), CMAI()),
        "VMTC+CMAI 288 scores": (VMTC(tokens=shapes.half), CMAI(scores="scores")),
        "VMTC+CMAI 64": (VMTC(tokens=shapes.few), CMAI()),
    }
