"""On two ranks a model gives what it gives on one, however it is split; each is a process of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI, VMTC, Reduction
from tests.pipelines import ranks

pytestmark = pytest.mark.integration

STRONG = CMAI(gamma_max=0.9, gamma_min=0.5)
WHOLE_TOWER = {
    "model.vision_tower.encoder.layers.*.self_attn." + name: "colwise" for name in ("q_proj", "k_proj", "v_proj")
}
WHOLE_TOWER["model.vision_tower.encoder.layers.*.self_attn.out_proj"] = "rowwise"
KEYS = VMTC(stages=2, similarity="keys", proportional=True)
PRUMERGE = Reduction(method="prumerge", tokens=6)


def build(**methods: Any) -> ReduxForConditionalGeneration:
    """A model of always the same weights, so large that attention is far from uniform."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 4, "image_size": 32, "patch_size": 8, **sizes}
    text = LlamaConfig(vocab_size=64, num_hidden_layers=2, num_key_value_heads=2, **sizes, **special)
    config = ReduxConfig(vision_config=vision, text_config=text.to_dict(), image_token_index=63, **methods)
    torch.manual_seed(0)
    model = ReduxForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
    return model


def sample(model: Any, images: tuple[int, ...] = (2, 1, 0)) -> dict[str, Tensor]:
    """A batch, padded on the left: rows of so many images, with text around each."""
    draw, lines = torch.Generator().manual_seed(0), []
    for row, count in enumerate(images):
        line = torch.randint(3, 60, (4 + row,), generator=draw).tolist()
        for _ in range(count):
            words = torch.randint(3, 60, (7 - row,), generator=draw).tolist()
            line += [63] * model.config.image_seq_length + words
        lines.append(line)
    width = max(map(len, lines))
    ids = torch.tensor([[0] * (width - len(line)) + line for line in lines])
    pixels = torch.randn(sum(images), 3, 32, 32, generator=draw)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def answer(model: Any) -> Tensor:
    """Logits of the tokens that are not padding, and those of tokens decoded on a cache."""
    inputs = sample(model)
    with torch.no_grad():
        whole = model(**inputs).logits[inputs["attention_mask"].bool()]
        told = model.generate(
            **inputs,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            suppress_tokens=[63],
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.cat([whole, *told.logits])


def gradients(model: Any, run: Any = None, recompute: bool = False) -> dict[str, Tensor]:
    """The loss of a batch and what it teaches each weight, put together from all ranks."""
    model.train()
    if recompute:
        model.gradient_checkpointing_enable()
    inputs = sample(model)
    loss = (run or model)(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    return {"loss": loss.detach(), **whole}


def split(folder: Path, plan: Any = "auto", train: bool = False, **methods: Any) -> Any:
    """Tensor parallelism over both ranks."""
    if dist.get_rank() == 0:
        build(**methods).save_pretrained(folder)
    dist.barrier()
    model = ReduxForConditionalGeneration.from_pretrained(folder, tp_plan=plan).eval()
    attention: Any = model.get_decoder().layers[0].self_attn
    assert attention.q_proj.weight.to_local().shape == (16, 32) or plan != "auto"
    return gradients(model) if train else answer(model)


def shard(whole_tower: bool = False, recompute: bool = False, **methods: Any) -> Any:
    """FSDP2 of every block."""
    model = build(**methods)
    tower: Any = model.model.vision_tower
    for block in [*tower.encoder.layers, *model.get_decoder().layers]:
        fully_shard(block)
    if whole_tower:
        fully_shard(tower)
    fully_shard(model)
    return gradients(model, recompute=recompute)


def replicate() -> Any:
    """DDP where one rank has no image."""
    model = build(vmtc=VMTC(stages=2), cmai=STRONG).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_("layers.3" not in name and "post_layernorm" not in name)
    inputs = sample(model, (2, 1) if dist.get_rank() == 0 else (0, 0))
    replica = DistributedDataParallel(model)
    replica(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


SPLIT: dict[str, dict[str, Any]] = {
    "weights": {"cmai": STRONG, "vmtc": VMTC(stages=2)},
    "scores": {"cmai": CMAI(gamma_max=0.9, gamma_min=0.5, scores="scaled"), "reduction": PRUMERGE},
    "tower": {"plan": WHOLE_TOWER, "vmtc": KEYS},
    "prumerge": {"plan": WHOLE_TOWER, "reduction": PRUMERGE},
    "train": {"train": True, "cmai": STRONG, "vmtc": VMTC(stages=2)},
    "train tower": {"train": True, "plan": WHOLE_TOWER, "vmtc": VMTC(stages=2)},
}
SHARDED: dict[str, dict[str, Any]] = {
    "vmtc": {"vmtc": VMTC(stages=2), "cmai": STRONG},
    "off": {"whole_tower": True},
    "whole tower": {"whole_tower": True, "vmtc": KEYS, "cmai": STRONG},
    "prumerge": {"reduction": PRUMERGE},
    "recomputed": {"recompute": True, "vmtc": VMTC(stages=2), "cmai": STRONG},
}


def on_rank(folder: Path) -> dict[str, Any]:
    """All that two ranks do together; they start once."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {f"split {name}": split(folder / name, **how) for name, how in SPLIT.items()}
    results |= {f"sharded {name}": shard(**how) for name, how in SHARDED.items()}
    results["replicated"] = replicate()
    return results


@pytest.fixture(scope="module")
def found_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.run_on_ranks(folder, 2, on_rank, folder)


def methods(how: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in how.items() if name in ("cmai", "vmtc", "reduction")}


def same(found: Any, expected: Any, **tolerance: float) -> None:
    """Tensors, or dictionaries of tensors; those that one rank alone has are zeros."""
    if isinstance(found, Tensor):
        found, expected = {"": found}, {"": expected}
    for name in found.keys() | expected.keys():
        zeros = torch.zeros_like(found.get(name, expected.get(name)))
        torch.testing.assert_close(found.get(name, zeros), expected.get(name, zeros), **tolerance, msg=name)


@pytest.mark.parametrize("name", SPLIT)
def test_heads_split_over_ranks_give_what_one_process_gives(found_on_ranks: list[dict[str, Any]], name: str) -> None:
    how = SPLIT[name]
    work: Callable[[Any], Any] = gradients if how.get("train") else answer
    expected = work(build(**methods(how)))
    for found in found_on_ranks:
        same(found[f"split {name}"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_blocks_teach_what_one_process_does(found_on_ranks: list[dict[str, Any]], name: str) -> None:
    expected = gradients(build(**methods(SHARDED[name])))
    for found in found_on_ranks:
        same(found[f"sharded {name}"], expected, rtol=1e-3, atol=1e-4)


def test_a_replica_without_images_takes_part_in_the_mean(found_on_ranks: list[dict[str, Any]]) -> None:
    total: dict[str, Tensor] = {}
    for images in ((2, 1), (0, 0)):
        model = build(vmtc=VMTC(stages=2), cmai=STRONG).train()
        inputs = sample(model, images)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                total[name] = total.get(name, 0) + weight.grad / 2
    for found in found_on_ranks:
        same(found["replicated"], total, rtol=1e-3, atol=1e-5)
