"""The computed cost of a configuration equals that of the model, to the last FLOP and byte.

The models are small, but every term counts: 64 patches against a width of 24, and no two sizes equal, so that no
two terms can be taken for each other.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

import redux.tower
from redux.cmai import Inhibition
from redux.configuration import ReduxConfig
from redux.cost import Cost, compute_cost, compute_step_cost
from redux.decoding import DecodingStep
from redux.focus_cache import FocusCache
from redux.model import ReduxForConditionalGeneration, ReduxModel
from redux.settings import CMAI, VMTC, Reduction
from redux.tower import CompressingBlock

TEXT = 11
PREAMBLE = 3

TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 33,  # A column and a row of pixels are left over
    "patch_size": 4,
}
LANGUAGE = {
    "vocab_size": 50,
    "hidden_size": 30,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 36,
    "pad_token_id": 0,
}


def fused_attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of the CPU's kernel, as torch counts the GPU's; its registry has every fused kernel but the CPU's."""
    return sdpa_flop_count(query, key, value)


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_attention}


def configuration(siglip: bool = False, language: dict[str, Any] | None = None, **changes: Any) -> ReduxConfig:
    tower = (SiglipVisionConfig if siglip else CLIPVisionConfig)(**TOWER)
    if siglip:
        changes = {"vision_feature_select_strategy": "full", **changes}
    text = LlamaConfig(**LANGUAGE | (language or {}))
    return ReduxConfig(vision_config=tower, text_config=text, image_token_index=49, **changes)


def prompt(config: ReduxConfig, images: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Images with text before and after them."""
    words = [1] * (TEXT - PREAMBLE)
    ids = PREAMBLE * [2] + images * config.image_seq_length * [config.image_token_id] + words
    side = config.vision_config.image_size
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {"input_ids": torch.tensor([ids])} | ({"pixel_values": pixels} if images else {})


class Measured:
    """A model's own cost, FLOPs attributed by the function that spends them."""

    def __init__(self, config: ReduxConfig, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model: Any = ReduxForConditionalGeneration(config).eval().to(dtype)
        self.counter = FlopCounterMode(display=False, custom_mapping=FUSED)
        self.spent: Counter[str] = Counter()

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.counter.get_total_flops()
            result = function(*args, **kwargs)
            self.spent[part] += self.counter.get_total_flops() - before
            return result

        return call

    def forward(self, cache: Any = None, **inputs: Any) -> tuple[Cost, Any]:
        """Count the FLOPs and cache bytes of one forward pass; also return the cache."""
        self.spent.clear()
        parts = [
            ("compression", redux.tower, name)
            for name in (
                "importance_score",
                "mean_received_attention",
                "compress_tokens",
                "reduce_tokens",
            )
        ]
        parts += [
            ("compression", CompressingBlock, "_class_query_and_keys"),
            ("encoding", ReduxModel, "encode_images"),
            ("images", ReduxModel, "get_image_features"),
            ("inhibition", Inhibition, "compute_mask"),
            ("inhibition", DecodingStep, "compute_mask"),
        ]
        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), self.counter:
            for part, owner, name in parts:
                patch.setattr(owner, name, self.counted(part, getattr(owner, name)))
            cache = self.model(**inputs, past_key_values=cache, use_cache=True).past_key_values
        spent = self.spent
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        rows = list(cache.t2i.values()) if isinstance(cache, FocusCache) else []
        return Cost(
            tower=spent["encoding"] - spent["compression"],
            compression=spent["compression"],
            projector=spent["images"] - spent["encoding"],
            language=self.counter.get_total_flops() - spent["images"] - spent["inhibition"],
            inhibition=spent["inhibition"],
            kv_bytes=sum(tensor.nbytes for tensor in tensors),
            focus_bytes=sum(tensor.nbytes for tensor in rows),
        ), cache


def check(config: ReduxConfig, images: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Cost, Cost]:
    """A prompt and a token after it cost what is said; returns both."""
    measured = Measured(config, dtype)
    first, cache = measured.forward(**prompt(config, images, dtype), logits_to_keep=1)
    assert compute_cost(config, TEXT, images, dtype.itemsize, preamble=PREAMBLE) == first
    after, _ = measured.forward(cache, input_ids=torch.tensor([[4]]))
    assert compute_step_cost(config, TEXT, images, dtype.itemsize, PREAMBLE) == after
    return first, after


BUDGETS = {
    "default": VMTC(),
    "nothing removed": VMTC(ratio=0.0),
    "nine tenths removed": VMTC(ratio=0.9),
    "tokens": VMTC(tokens=7, budget_schedule="linear", weights="raw", order="rank"),
    "kept": VMTC(kept=(30, 11, 5), clusters=(9, 4, 2)),
    "kept, nothing removed at first": VMTC(kept=(20, 0), clusters=(44, 3), stages=(0, 3)),
    "one cluster": VMTC(clusters=1, weights="total"),
    "no cluster": VMTC(clusters=0),
    "clusters alone": VMTC(cluster_share=1.0, iterations=3),
    "one stage": VMTC(ratio=0.6, stages=1),
    "stages by number": VMTC(stages=(1, 2), seeds="random"),
    "farthest": VMTC(seeds="farthest"),
    "farthest, one cluster": VMTC(clusters=1, seeds="farthest"),
    "by keys": VMTC(similarity="keys"),
    "proportional": VMTC(proportional=True),
}


@pytest.mark.parametrize("vmtc", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
def test_compression_in_the_tower(vmtc: VMTC, siglip: bool) -> None:
    first, _ = check(configuration(siglip, vmtc=vmtc))
    assert first.compression > 0


@pytest.mark.parametrize("method", ["average", "stride", "bilinear", "resize", "random", "prumerge"])
@pytest.mark.parametrize("tokens", [4, 25, 64])
def test_a_reduction_after_the_tower(method: Any, tokens: int) -> None:
    first, _ = check(configuration(reduction=Reduction(method=method, tokens=tokens, neighbours=5)))
    assert (first.compression > 0) == (method not in ("stride", "random", "resize"))


@pytest.mark.parametrize("layer", [-1, -2, 2])
@pytest.mark.parametrize("vmtc", [None, VMTC(stages=1)], ids=["whole", "compressed"])
@pytest.mark.parametrize("kind", ["clip", "clip, class token kept", "siglip"])
def test_the_layer_that_is_read_and_what_of_it_is_a_feature(layer: int, vmtc: VMTC | None, kind: str) -> None:
    strategy = "default" if kind == "clip" else "full"
    reading = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    check(configuration(kind == "siglip", vmtc=vmtc, **reading))


@pytest.mark.parametrize("scores", ["weights", "scores", "scaled"])
@pytest.mark.parametrize("focus", ["neighbourhood", "tia", "sum", "discounted"])
def test_inhibition(scores: Any, focus: Any) -> None:
    first, after = check(configuration(cmai=CMAI(scores=scores, focus=focus)))
    assert min(first.inhibition, after.inhibition) > 0
    assert (first.focus_bytes == 0) == (focus == "tia")


@pytest.mark.parametrize(
    ("cmai", "layers"),
    [
        (CMAI(), 3),
        (CMAI(gamma_min=0.1), 4),
        (CMAI(schedule="constant"), 4),
        (CMAI(schedule="cosine"), 3),
        (CMAI(schedule="step", preamble=False, quantile="linear"), 2),
        (CMAI(gamma_max=0.0), 0),
        (CMAI(active="training"), 0),
        (CMAI(active="inference", quantile="count"), 3),
    ],
    ids=["linear", "from the first", "constant", "cosine", "step", "no gamma", "training alone", "inference alone"],
)
def test_layers_that_do_not_inhibit_cost_nothing_more(cmai: CMAI, layers: int) -> None:
    first, _ = check(configuration(cmai=cmai))
    one, _ = check(configuration(cmai=CMAI(schedule="constant"), language={"num_hidden_layers": 1}))
    assert (first.inhibition, first.focus_bytes) == (layers * one.inhibition, layers * one.focus_bytes)


def test_generated_tokens_that_are_not_inhibited_leave_the_focus_as_it_is() -> None:
    first, after = check(configuration(cmai=CMAI(generated=False)))
    assert (after.inhibition, after.focus_bytes) == (0, first.focus_bytes)


@pytest.mark.parametrize("modules", [{}, {"vmtc": VMTC(), "cmai": CMAI()}], ids=["off", "on"])
@pytest.mark.parametrize("images", [0, 3])
def test_no_image_and_several(images: int, modules: dict[str, Any]) -> None:
    check(configuration(**modules), images)


def test_focus_is_in_float32_whatever_keys_and_values_are_in() -> None:
    check(configuration(vmtc=VMTC(), cmai=CMAI()), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "language",
    [
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 1},
    ],
    ids=["a key head each", "one key head", "heads that fill the width"],
)
def test_heads_of_the_language_model(language: dict[str, Any]) -> None:
    for scores in ("weights", "scores"):
        check(configuration(language=language, cmai=CMAI(scores=scores)))


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_logits_of_the_last_positions_or_of_all(kept: int) -> None:
    config = configuration()
    spent, _ = Measured(config).forward(**prompt(config, 1, torch.float32), logits_to_keep=kept)
    assert compute_cost(config, TEXT, 1, 4, logits_to_keep=kept) == spent


def test_several_layers_of_the_tower_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vision_feature_layer: got \[-2, -3\]"):
        compute_cost(configuration(vision_feature_layer=[-2, -3]), TEXT)


def test_the_parts_make_up_the_whole() -> None:
    spent = compute_cost(configuration(vmtc=VMTC(), cmai=CMAI()), TEXT)
    assert spent.flops == sum(value for name, value in asdict(spent).items() if not name.endswith("_bytes"))


def llava(layers: int, hidden: int, heads: int, mlp: int, **modules: Any) -> ReduxConfig:
    """LLaVA-1.5: CLIP ViT-L/14 at 336 px, read one layer below the last, and Vicuna of a given size."""
    tower = CLIPVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=336,
        patch_size=14,
    )
    language = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
    )
    return ReduxConfig(vision_config=tower, text_config=language, image_token_index=31999, **modules)


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "mlp", "parameters"),
    [(32, 4096, 32, 11008, 6_738_415_616), (40, 5120, 40, 13824, 13_015_864_320)],
    ids=["7B", "13B"],
)
def test_llava_whole_by_published_numbers(layers: int, hidden: int, heads: int, mlp: int, parameters: int) -> None:
    spent = compute_cost(llava(layers, hidden, heads, mlp), text=64)
    # Each matrix takes two FLOPs a parameter and token; embeddings and norms are not matrices, the head sees one token.
    matrices = parameters - 2 * 32000 * hidden - (2 * layers + 1) * hidden
    assert spent.language == 2 * 640 * matrices + layers * 4 * 640**2 * hidden + 2 * 32000 * hidden
    # 576 patches and a class token, 12 dim^2 parameters in a block, 23 blocks of 24.
    assert spent.tower == 2 * 576 * 588 * 1024 + 23 * (2 * 577 * 12 * 1024**2 + 4 * 577**2 * 1024)
    assert spent.projector == 2 * 576 * (1024 * hidden + hidden**2)
    assert spent.kv_bytes == 640 * {32: 512, 40: 800}[layers] * 1024
    assert (spent.compression, spent.inhibition, spent.focus_bytes) == (0, 0, 0)


def test_llava_with_the_method_by_hand() -> None:
    spent = compute_cost(llava(32, 4096, 32, 11008, vmtc=VMTC(tokens=64), cmai=CMAI()), text=64)
    stages = ((577, 231, 46), (278, 111, 22), (134, 53, 11))  # Tokens given, k, c, at blocks 5, 11 and 17 from 0
    block = 12 * 1024**2  # Parameters of its matrices, a third of them in front of the compression
    assert spent.tower == (
        2 * 576 * 588 * 1024
        + 5 * sum(2 * block * n + 4 * n**2 * 1024 for n in (577, 278, 134, 65))
        + sum(2 * block * n // 3 + 4 * n**2 * 1024 + 4 * block * (1 + k + c) // 3 for n, k, c in stages)
    )
    # 11 products to assign, 10 to move the centroids, 1 to merge.
    assert spent.compression == sum(2 * n * 1024 + 22 * 2 * (n - 1 - k) * c * 1024 for n, k, c in stages)
    # 64 image and 64 text tokens, gamma 0 in the first of 32 layers.
    assert spent.inhibition == 31 * (2 * 64 * 128 * 4096 + 2 * 64**3)
    assert spent.focus_bytes == 31 * 64 * 64 * 4


@pytest.mark.parametrize("focus", ["neighbourhood", "tia"])
@pytest.mark.parametrize("heads", ["each", (6, 7, 20), (2,)], ids=str)
def test_masks_of_single_heads(heads: Any, focus: Any) -> None:
    first, after = check(configuration(cmai=CMAI(heads=heads, focus=focus)))
    is_inhibited = heads != (2,)  # Gamma is 0 in the layer of head 2
    assert (first.inhibition > 0) == (after.inhibition > 0) == is_inhibited
    assert (first.focus_bytes > 0) == (is_inhibited and focus != "tia")
