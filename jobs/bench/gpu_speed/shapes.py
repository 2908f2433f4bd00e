"""Sizes of the models and inputs of the GPU benchmark: full, and tiny for a check of the script on a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of the models and of the inputs.

    Args:
        tower: fields of CLIPVisionConfig.
        language: fields of LlamaConfig.
        images: images in a batch of the tower.
        half, few, fewest: visual tokens after VMTC, of 576.
        layer_sequences: (image tokens, text tokens) of the layer's inputs.
        layer_batch, train_batch, decode_batches: sequences in a batch.
        prefix: text tokens before the image.
        train_layers, decode_layers, compiled_layers: language layers.
        train_text, decode_text: text tokens behind the image.
        new_tokens: decoded tokens.
        product: side of the matrices whose product gives the card's peak.
        section_s: seconds after which a group of variants starts no further round.
        rounds: smallest number of rounds.
    """

    tower: dict[str, int]
    language: dict[str, int]
    images: int = 32
    half: int = 288
    few: int = 64
    fewest: int = 36
    layer_sequences: tuple[tuple[int, int], ...] = ((288, 512), (576, 1472))
    layer_batch: int = 8
    train_batch: int = 8
    decode_batches: tuple[int, ...] = (1, 16)
    prefix: int = 35
    train_layers: int = 8
    decode_layers: int = 32
    compiled_layers: int = 8
    train_text: int = 400
    decode_text: int = 64
    new_tokens: int = 33
    product: int = 8192
    section_s: float = 25
    rounds: int = 3


FULL_SHAPES = Shapes(
    tower={
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    language={"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32064},
)
TINY_SHAPES = Shapes(
    tower={
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 32,
    },
    language={"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64},
    images=2,
    half=8,
    few=4,
    fewest=3,
    layer_sequences=((8, 12), (16, 12)),
    layer_batch=2,
    train_batch=2,
    decode_batches=(1, 2),
    prefix=3,
    train_layers=2,
    decode_layers=2,
    compiled_layers=2,
    train_text=12,
    decode_text=6,
    new_tokens=4,
    product=64,
    section_s=0.2,
    rounds=2,
)
