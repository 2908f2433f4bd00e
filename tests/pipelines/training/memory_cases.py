"""Small configurations whose estimated memory is compared with the measured one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines.training.plan import StagePlan
from pipelines.training.stage import Lora
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes, count_image_tokens
from redux.settings import CMAI, VMTC

TOWER = TowerSizes(
    image_size=48, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256
)
LANGUAGE = LanguageSizes(
    hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=352, max_position_embeddings=512
)
ALL = {"tower": 1e-3, "projector": 1e-3, "language": 1e-3}
STAGE_2 = {"projector": 1e-3, "language": 1e-3}
BF16 = {"precision": "bf16"}

CASES: dict[str, dict[str, Any]] = {
    "zero 0, fp32": {"zero_stage": 0},
    "zero 0, bf16": {"zero_stage": 0, **BF16},
    "zero 1, fp32": {"zero_stage": 1},
    "zero 1, bf16": {"zero_stage": 1, **BF16},
    "zero 2, fp32": {"zero_stage": 2},
    "zero 2, bf16": {"zero_stage": 2, **BF16},
    "zero 3, fp32": {"zero_stage": 3},
    "zero 3, bf16": {"zero_stage": 3, **BF16},
    "stage 1 of LLaVA, zero 2": {
        "zero_stage": 2, "learning_rate": {"projector": 1e-3}, "activation_checkpointing": True, **BF16,
    },
    "stage 2 of LLaVA, zero 3": {
        "zero_stage": 3, "learning_rate": STAGE_2, "activation_checkpointing": True, **BF16,
    },
    "checkpointing, zero 2, fp32": {"zero_stage": 2, "activation_checkpointing": True},
    "checkpointing, zero 0, bf16": {"zero_stage": 0, "activation_checkpointing": True, **BF16},
    "LoRA, zero 2, bf16": {"zero_stage": 2, "learning_rate": STAGE_2, "lora": Lora(rank=8), **BF16},
    "LoRA, zero 0, fp32": {"zero_stage": 0, "learning_rate": STAGE_2, "lora": Lora(rank=8)},
    "LoRA, zero 3, bf16, checkpointing": {
        "zero_stage": 3, "learning_rate": STAGE_2, "lora": Lora(rank=8), "activation_checkpointing": True, **BF16,
    },
    "accumulation, zero 0, fp32": {"zero_stage": 0, "micro_batch_size": 2},
    "accumulation, zero 1, bf16": {"zero_stage": 1, "micro_batch_size": 2, **BF16},
    "accumulation, zero 2, bf16": {"zero_stage": 2, "micro_batch_size": 2, **BF16},
    "accumulation, zero 3, fp32": {"zero_stage": 3, "micro_batch_size": 2},
    "plain LLaVA, zero 2, bf16": {"zero_stage": 2, "methods": {"vmtc": None, "cmai": None}, **BF16},
    "other methods, zero 1, fp32": {
        "zero_stage": 1, "methods": {"vmtc": VMTC(ratio=0.25, stages=1), "cmai": CMAI(focus="tia")},
    },
    "one worker, zero 2, bf16": {"zero_stage": 2, "workers": 1, **BF16},
    "contrastive, zero 0, fp32": {"zero_stage": 0, "objective": "contrastive", "learning_rate": {"tower": 1e-3}},
    "large batch, zero 1, fp32": {"zero_stage": 1, "micro_batch_size": 16, "global_batch_size": 32},
}  # fmt: skip
"""Settings of the stage; methods and workers besides."""


def make_plan(new_plan: Callable[..., StagePlan], name: str) -> StagePlan:
    """Make the plan of a case."""
    settings = {"micro_batch_size": 8, "global_batch_size": 16, "learning_rate": ALL, **CASES[name]}
    methods = settings.pop("methods", {})
    workers = settings.pop("workers", 2)
    model = ModelSettings(tower=TOWER, language=LANGUAGE, **methods)
    changes = {
        "model": model,
        "workers": (workers, workers),
        "image_size": TOWER.image_size,
        "image_tokens": count_image_tokens(model),
        "max_bad_fraction": 1,
    }
    return replace(new_plan(plan=changes, **settings))
