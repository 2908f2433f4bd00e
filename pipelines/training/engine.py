"""The stage's model in a DeepSpeed engine, at any ZeRO stage and precision.

Weights are held and updated in fp32 whatever they are computed in.  What is random in a micro-batch (dropout of LoRA)
is drawn by its number, and the learning rate follows from the step: neither is state that a checkpoint must hold, and
neither depends on how many workers there are.
"""

import json
import os
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from pipelines.training.plan import Plan, Schedule
from redux import contrastive, model
from redux.architecture import TowerSizes
from redux.contrastive import ClipWithLoss
from redux.conversation import IGNORE_INDEX
from redux.hub import local_copy
from redux.loading import load_model
from redux.model import ReduxForConditionalGeneration

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed while it is imported, as accelerate does to save a model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Language(torch.nn.Module):
    """LLaVA whose forward gives the loss, so that it trains like every other model."""

    def __init__(self, llava: ReduxForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava

    def forward(
        self, labels: Int[Tensor, "samples length"], weight: Float[Tensor, " samples"], **batch: Tensor
    ) -> Float[Tensor, ""]:
        """Sum over samples of weight times the cross-entropy of their labelled tokens.

        Logits are computed for these alone: of 2,048 tokens and 32,000 words they would take 262 MB a sample.
        """
        hidden = self.llava.model(**batch, use_cache=False).last_hidden_state
        learned = labels[:, 1:] != IGNORE_INDEX
        logits = self.llava.lm_head(hidden[:, :-1][learned]).float()
        losses = F.cross_entropy(logits, labels[:, 1:][learned], reduction="none")
        return (losses * weight[:, None].expand_as(learned)[learned]).sum()


class Pairs(torch.nn.Module):
    """A CLIP that learns: the loss of a micro-batch, whose samples weigh the same, times their weight."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.pairs = ClipWithLoss(clip)

    def forward(self, weight: Float[Tensor, " samples"], **batch: Tensor) -> Float[Tensor, ""]:
        return self.pairs(**batch) * weight.sum()


Trainee = Language | Pairs


def trainee(plan: Plan) -> tuple[Trainee, dict[str, list[torch.nn.Parameter]]]:
    """What the stage trains, as it is before the first step, and its parameters by part.

    A pure function of the plan: parts that stay frozen need not be in checkpoints.
    """
    torch.manual_seed(plan.seed)
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)
    before = load(plan.start) if plan.start else None
    if plan.stage.objective == "contrastive":
        assert plan.model is not None
        assert isinstance(plan.model.tower, TowerSizes)
        clip = before if isinstance(before, CLIPModel) else contrastive.build_clip(plan.model.tower, tokenizer)
        module: Trainee = Pairs(clip)
        return module, {"tower": list(module.parameters())}
    if isinstance(before, ReduxForConditionalGeneration):
        llava = before
    else:
        assert plan.model is not None
        llava = model.build_model(plan.model, tokenizer)
    if isinstance(before, CLIPModel):
        llava.model.vision_tower.load_state_dict(before.vision_model.state_dict())
    parts = llava.parameters_by_part()
    if plan.stage.lora:
        from pipelines.training import lora

        lora.wrap(llava, plan.stage.lora)
        parts["language"] = lora.adapters(llava)
    if plan.stage.activation_checkpointing:
        llava.gradient_checkpointing_enable({"use_reentrant": False})
    return Language(llava), parts


def load(path: str) -> CLIPModel | ReduxForConditionalGeneration:
    """The model in a folder or at a URL, of one of the two kinds that stages make."""
    kinds = {"clip": CLIPModel, "llava": ReduxForConditionalGeneration}
    with local_copy(path) as folder:
        return load_model(kinds[AutoConfig.from_pretrained(folder).model_type], folder, label="start")


def trained(module: Trainee, plan: Plan) -> CLIPModel | ReduxForConditionalGeneration:
    """The model to save, of plain layers."""
    if isinstance(module, Pairs):
        return module.pairs.export_clip()
    if plan.stage.lora:
        from pipelines.training import lora

        return lora.merge(module.llava)
    return module.llava


def build(plan: Plan, workers: int) -> Any:
    """The engine, on this rank of so many: a collective."""
    import deepspeed

    if not torch.cuda.is_available():
        # one core each, or the ranks fight; the shared-memory op would compile for half a minute at first use
        here = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // here, 1))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module, parts = trainee(plan)
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    stage = plan.stage
    groups = [
        {"params": [one.requires_grad_() for one in parts[part]], "lr": 0.0, "peak": rate}
        for part, rate in stage.learning_rate.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, stage.beta2), weight_decay=stage.weight_decay, fused=True)
    half = stage.precision == "bf16"
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "train_batch_size": stage.global_batch_size,
            "train_micro_batch_size_per_gpu": stage.micro_batch_size,
            "gradient_clipping": stage.max_grad_norm,
            "zero_optimization": {"stage": stage.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": half},
            # how many micro-batches a worker adds up depends on the number of workers; in bf16 the sum would, too
            **({"data_types": {"grad_accum_dtype": "fp32"}} if half and stage.zero_stage else {}),
            "steps_per_print": None,
        },
    )
    # with ZeRO 0 in bf16 it has taken a step to make its states, at a rate of 0; it must not count
    for state in optimizer.state.values():
        state["step"].zero_()
    return engine


def identity(engine: Any) -> dict[str, Any]:
    """What a checkpoint of this engine goes with: the model's configuration, and what of it is trained."""
    module = engine.module
    config = (module.pairs.clip if isinstance(module, Pairs) else module.llava).config.to_dict()
    passing = ("transformers_version", "_name_or_path", "dtype")
    shapes = {
        name: list(getattr(one, "ds_shape", one.shape)) for name, one in module.named_parameters() if one.requires_grad
    }
    return json.loads(json.dumps({"config": {**config, **dict.fromkeys(passing)}, "trained": shapes}))


def set_rate(engine: Any, schedule: Schedule, step: int) -> float:
    """Give each part its learning rate for a step (from 1); returns that of the part that learns fastest."""
    share = schedule(step - 1)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return max(group["lr"] for group in engine.optimizer.param_groups)


def update(engine: Any) -> tuple[bool, float]:
    """After the last backward of a global batch: (whether weights changed, norm of the gradient before clipping).

    They do not where the norm is NaN or infinite.  DeepSpeed sees to it, but for ZeRO 0 in fp32.
    """
    if engine.optimizer is engine.basic_optimizer:
        parameters = [one for one in engine.module.parameters() if one.grad is not None]
        norm = torch.nn.utils.get_total_norm([one.grad for one in parameters])
        if not norm.isfinite():
            for one in parameters:
                one.grad = None  # AdamW passes over what has no gradient
        engine.step()
        return bool(norm.isfinite()), norm.item()
    engine.step()
    applied = engine.was_step_applied()
    return applied, float(engine.get_global_grad_norm()) if applied else float("nan")
