"""The model of a stage in a DeepSpeed engine, for every ZeRO stage and precision.

A model is loaded on the device of the rank. Under ZeRO 3 each rank keeps only its share of every layer from the moment
the layer is made, so the ranks of a machine never hold a copy of the model each. A model that is built from sizes is
drawn on the CPU, because its random weights must be the same on every device.

The optimizer keeps and updates weights in fp32 in every precision. Random numbers of a micro-batch (dropout of LoRA)
are seeded by its number, and the learning rate follows from the step. Both are therefore no state of a checkpoint and
do not depend on the number of workers.
"""

import gc
import importlib
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from pipelines.core import cluster
from pipelines.core.imports import import_without
from pipelines.data import ingest
from pipelines.training.checkpoint import RefusedError
from pipelines.training.feature_writer import compute_tower_digest
from pipelines.training.plan import LearningRateSchedule, StagePlan
from pipelines.training.stage import ModelPart, Stage
from redux import contrastive, model
from redux.architecture import TowerSizes
from redux.contrastive import ContrastiveClip
from redux.conversation import IGNORE_INDEX
from redux.hub import local_copy
from redux.loading import load_model
from redux.model import ReduxForConditionalGeneration, normalize_pixels

if not torch.cuda.is_available():
    # DeepSpeed reads this variable when it is imported, and accelerate imports DeepSpeed to save a model.
    os.environ["DS_ACCELERATOR"] = "cpu"

TORCH_LINEAR = F.linear
"""Linear layer of torch. ZeRO 3 of DeepSpeed replaces it in the whole process, which rounds gradients otherwise."""

MAX_REDUCE_BUCKET_SIZE = 500_000_000
"""Gradients that are summed over ranks at a time, at most: DeepSpeed's default."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LlavaWithLoss(torch.nn.Module):
    """LLaVA with a forward pass that returns the loss."""

    def __init__(self, llava: ReduxForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava

    def forward(
        self,
        labels: Int[Tensor, "rows length"],
        weight: Float[Tensor, " samples"],
        sample_index: Int[Tensor, "rows length"] | None = None,
        image_features: Float[Tensor, "images tokens width"] | None = None,
        **batch: Any,
    ) -> Float[Tensor, ""]:
        """Return the sum over samples of the sample's weight times the cross-entropy of its labelled tokens.

        `sample_index` is the sample of each token of packed rows; None if each row is a sample. `image_features` are
        outputs of the tower, in place of pixels.

        Logits are computed for labelled tokens only. For all 2,048 tokens of a sample and 32,000 words they would take
        262 MB.
        """
        if image_features is not None:
            batch["mm_encoder_outputs"] = {"image": self.llava.model.project_features(image_features)}
        hidden = self.llava.model(**batch, use_cache=False).last_hidden_state
        is_labelled = labels[:, 1:] != IGNORE_INDEX
        logits = self.llava.lm_head(hidden[:, :-1][is_labelled]).float()
        losses = F.cross_entropy(logits, labels[:, 1:][is_labelled], reduction="none")
        # Each token has the weight of its sample.
        token_weight = weight[:, None].expand_as(is_labelled) if sample_index is None else weight[sample_index[:, 1:]]
        return (losses * token_weight[is_labelled]).sum()


class ClipWithLoss(torch.nn.Module):
    """CLIP with a forward pass that returns the contrastive loss, times the summed weight of the samples."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.pairs = ContrastiveClip(clip)

    def forward(self, weight: Float[Tensor, " samples"], **batch: Tensor) -> Float[Tensor, ""]:
        return self.pairs(**batch) * weight.sum()


ModuleWithLoss = LlavaWithLoss | ClipWithLoss


class DeepSpeedEngineProtocol(Protocol):
    """Members of deepspeed.DeepSpeedEngine that this package uses. DeepSpeed itself has no type annotations.

    `optimizer` is torch's optimizer or one of DeepSpeed's wrappers, whose attributes depend on the ZeRO stage.
    `basic_optimizer` is torch's optimizer in every case.
    """

    module: torch.nn.Module
    optimizer: Any
    basic_optimizer: torch.optim.Optimizer
    device: torch.device
    global_rank: int
    dp_world_size: int

    def __call__(self, **batch: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor) -> Any: ...

    def step(self) -> None: ...

    def was_step_applied(self) -> bool: ...

    def get_global_grad_norm(self) -> Any: ...

    def zero_optimization_stage(self) -> int: ...

    def destroy(self) -> None: ...


def build_module(
    plan: StagePlan, device: torch.device | None = None, zero_config: Mapping[str, Any] | None = None
) -> tuple[ModuleWithLoss, dict[str, list[torch.nn.Parameter]]]:
    """Build the model before the first step. A pure function of the plan, so frozen parts need no checkpoint.

    Args:
        plan: plan of the stage.
        device: device on which a model is loaded; None is the CPU.
        zero_config: configuration of DeepSpeed, for a model whose parameters are divided among the ranks. None keeps
            them whole.

    Returns:
        The model with its loss, and its parameters by part: tower, projector, language.
    """
    torch.manual_seed(plan.seed)
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)
    start = load_start_model(plan.start, device, zero_config) if plan.start else None

    # The contrastive objective trains CLIP, whose image side becomes the tower.
    if plan.stage.objective == "contrastive":
        assert plan.model is not None
        assert isinstance(plan.model.tower, TowerSizes)
        clip = start if isinstance(start, CLIPModel) else contrastive.build_clip(plan.model.tower, tokenizer)
        module: ModuleWithLoss = ClipWithLoss(clip)
        return module, {"tower": list(module.parameters())}

    # The language objective trains LLaVA: the given one, or a new one with the tower of a given CLIP.
    if isinstance(start, ReduxForConditionalGeneration):
        llava = start
    else:
        assert plan.model is not None
        llava = model.build_model(plan.model, tokenizer)
    if isinstance(start, CLIPModel):
        llava.model.vision_tower.load_state_dict(start.vision_model.state_dict())
    return add_loss(llava, plan)


def add_loss(
    llava: ReduxForConditionalGeneration, plan: StagePlan
) -> tuple[LlavaWithLoss, dict[str, list[torch.nn.Parameter]]]:
    """Prepare a LLaVA for the stage: adapters and checkpoints of activations. Result as of `build_module`."""
    parts = llava.parameters_by_part()
    # Adapters draw from torch's generator, so they are added after everything else is built.
    if plan.stage.lora:
        from pipelines.training import lora

        lora.add_adapters(llava, plan.stage.lora)
        parts["language"] = lora.list_adapter_parameters(llava)
    if plan.stage.activation_checkpointing:
        # transformers 5.23 deprecates it, but 5.19 to 5.22 do not have its successor, activation_checkpointing_enable.
        llava.gradient_checkpointing_enable({"use_reentrant": False})
    return LlavaWithLoss(llava), parts


def load_start_model(
    path: str, device: torch.device | None = None, zero_config: Mapping[str, Any] | None = None
) -> CLIPModel | ReduxForConditionalGeneration:
    """Load the model from which a stage starts, from a folder or URL: a CLIP or a LLaVA.

    With `zero_config` a collective.

    Args:
        path: folder or URL.
        device, zero_config: see `build_module`. A CLIP stays whole, on the CPU: LLaVA's tower is built from it.
    """
    kinds = {"clip": CLIPModel, "llava": ReduxForConditionalGeneration}
    with local_copy(path) as folder:
        model_type = AutoConfig.from_pretrained(folder).model_type
        is_llava = model_type == "llava"
        options: dict[str, Any] = {}
        dividing = None
        if zero_config and is_llava:
            from transformers.integrations import HfDeepSpeedConfig

            # transformers divides the parameters while this object exists. Rank 0 alone reads the weights then.
            dividing = HfDeepSpeedConfig(dict(zero_config))
        elif device and device.type != "cpu" and is_llava:
            options = {"device_map": {"": device}}
        loaded = load_model(kinds[model_type], folder, label="start", **options)
        del dividing
        return loaded


def extract_model(module: ModuleWithLoss, plan: StagePlan) -> CLIPModel | ReduxForConditionalGeneration:
    """Return the model without its loss, with adapters merged into the weights."""
    if isinstance(module, ClipWithLoss):
        return module.pairs.export_clip()
    if plan.stage.lora:
        from pipelines.training import lora

        return lora.merge_adapters(module.llava)
    return module.llava


def make_config(plan: StagePlan) -> dict[str, Any]:
    """Make the configuration of DeepSpeed for a stage."""
    stage = plan.stage
    is_bf16 = stage.precision == "bf16"
    zero: dict[str, Any] = {"stage": stage.zero_stage}
    if stage.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": stage.global_batch_size,
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_clipping": stage.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on the CPU as well. DeepSpeed's own would be compiled at the first use, and differ.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_bf16},
        # The number of micro-batches that a worker accumulates depends on the number of workers. In bf16 their sum
        # would depend on it, too.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if is_bf16 and stage.zero_stage else {}),
        "steps_per_print": None,
    }


def import_deepspeed() -> Any:
    """Import DeepSpeed without MLflow, which its autotuner imports if it is installed, for a second of CPU."""
    return import_without("deepspeed", "mlflow")


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, as engines do, though it is not used here (DeepSpeed 0.19).

    Its functions stay as they are. To compile them, torch would import Inductor, for two seconds of CPU.
    """
    with patch.object(torch, "compile", importlib.import_module("deepspeed.runtime.compiler").dummy_decorator):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def build_engine(plan: StagePlan, workers: int) -> DeepSpeedEngineProtocol:
    """Build the DeepSpeed engine of this rank. A collective over all workers."""
    deepspeed = import_deepspeed()
    _import_muon()

    if not torch.cuda.is_available():
        # Divide the cores among the ranks of the machine. More threads than cores would slow all ranks down.
        local_workers = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
        torch.set_num_threads(max(cluster.count_local_cpus() // local_workers, 1))
        # DeepSpeed would compile its shared-memory operator for half a minute at the first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    config = make_config(plan)
    device = torch.device(deepspeed.accelerator.get_accelerator().current_device_name())
    module, parts = build_module(plan, device, config if plan.stage.zero_stage == 3 else None)
    stage = plan.stage
    groups = [
        {"params": parameters, "lr": 0.0, "peak": stage.learning_rate[part]}
        for part, parameters in select_trained(module, parts, stage).items()
    ]
    if stage.zero_stage:
        # DeepSpeed allocates a whole bucket in every backward pass: by default 2 GB of fp32, which is mapped anew.
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # ZeRO 3 has divided the parameters and keeps their size in ds_numel.
        elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
        config["zero_optimization"]["reduce_bucket_size"] = min(elements, MAX_REDUCE_BUCKET_SIZE)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, stage.beta2), weight_decay=stage.weight_decay, fused=True)

    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    # With ZeRO 0 in bf16, DeepSpeed takes one step at learning rate 0 to create its states. It must not count.
    for state in optimizer.state.values():
        state["step"].zero_()
    return engine


def select_trained(
    module: torch.nn.Module, parts: Mapping[str, list[torch.nn.Parameter]], stage: Stage
) -> dict[ModelPart, list[torch.nn.Parameter]]:
    """Prepare a module for training: parts with a learning rate train, all others are frozen. Returns the former."""
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    trained = {part: parts[part] for part in stage.learning_rate}
    for parameter in itertools.chain(*trained.values()):
        parameter.requires_grad_()
    return trained


def free_engine(engine: DeepSpeedEngineProtocol) -> None:
    """Free the memory of an engine whose stage is done. It cannot be used again.

    Hooks in autograd's graph keep an engine alive, and destroy() removes them. With ZeRO 3, objects of DeepSpeed 0.19
    stay even then, so their tensors are emptied.
    """
    engine.destroy()
    F.linear = TORCH_LINEAR
    if engine.zero_optimization_stage() == 3:
        optimizer = engine.optimizer
        for parameter in engine.module.parameters():
            parameter.data = parameter.data.new_empty(0)
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.data = parameter.data
        engine.basic_optimizer.state.clear()
        for holder in (optimizer.parameter_offload, optimizer):
            vars(holder).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_model(engine: DeepSpeedEngineProtocol) -> dict[str, Any]:
    """Return the configuration of the model and the shapes of its trained parameters, for the manifest."""
    module = engine.module
    if isinstance(module, ClipWithLoss):
        config = module.pairs.clip.config.to_dict()
    else:
        assert isinstance(module, LlavaWithLoss)
        config = module.llava.config.to_dict()
    # Values that may differ between two starts of the same stage.
    ignored = ("transformers_version", "_name_or_path", "dtype")
    # ZeRO 3 replaces the tensors by partitions and keeps the shape in ds_shape.
    shapes = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    return json.loads(json.dumps({"config": {**config, **dict.fromkeys(ignored)}, "trained": shapes}))


def check_features(engine: DeepSpeedEngineProtocol, plan: StagePlan, reader: ingest.Reader) -> None:
    """Check that stored features are those of the tower of this rank. A collective.

    Raises:
        RefusedError: they are those of another tower.
    """
    if not reader.features:
        return
    module = engine.module
    assert isinstance(module, LlavaWithLoss)
    parameters = list(module.llava.model.vision_tower.parameters())
    deepspeed = import_deepspeed()
    # ZeRO 3 keeps a share of each weight on this rank.
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        digest = compute_tower_digest(module.llava.model)
    for name, stored in reader.features.items():
        if stored.format.tower != digest:
            raise RefusedError(
                f"data.features.{name}: got {stored.folder}, features of another tower or other settings of vmtc than "
                f"those of train.{plan.name}, allowed: features of its model; write them again with "
                "`redux shards features`"
            )


def set_learning_rate(engine: DeepSpeedEngineProtocol, schedule: LearningRateSchedule, step: int) -> float:
    """Set the learning rate of each part for a step, counted from 1. Returns the largest of them."""
    share = schedule(step - 1)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return max(group["lr"] for group in engine.optimizer.param_groups)


def move_to_device(batch: ingest.Batch, engine: DeepSpeedEngineProtocol) -> dict[str, torch.Tensor]:
    """Copy a micro-batch to the device of the rank. Pixels become normalised floats of the model's precision.

    Images travel as uint8 of shape (images, height, width, 3); the model takes (images, 3, height, width). Stored
    features travel as their bytes.
    """
    names = ["pixel_values", "image_features", "input_ids", "labels"]
    # transformers separates conversations of a row where positions restart, but only without an attention mask.
    names += ["position_ids", "sample_index"] if "position_ids" in batch else ["attention_mask"]
    tensors = {name: torch.tensor(batch[name], device=engine.device) for name in names if name in batch}
    dtype = next(engine.module.parameters()).dtype
    if "image_features" in tensors:
        count, tokens, row_bytes = tensors["image_features"].shape
        # torch does not view the bytes of no image in three dimensions.
        values = tensors["image_features"].flatten().view(dtype)
        tensors["image_features"] = values.view(count, tokens, row_bytes // dtype.itemsize)
    else:
        images = tensors["pixel_values"].movedim(-1, 1).contiguous()
        tensors["pixel_values"] = normalize_pixels(images).to(dtype)
    return tensors


def apply_update(engine: DeepSpeedEngineProtocol) -> tuple[bool, float]:
    """Update the weights after the last backward pass of a global batch, unless the gradient is not finite.

    Returns:
        True if the weights changed, and the norm of the gradient before clipping.
    """
    # DeepSpeed checks the norm itself, except with ZeRO 0 in fp32, where it uses torch's optimizer directly.
    if engine.optimizer is engine.basic_optimizer:
        parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        is_finite = bool(norm.isfinite())
        # torch's fused AdamW skips an update for which a gradient scaler reports an infinite gradient. Without any
        # gradient, DeepSpeed 0.19 could not clip.
        optimizer: Any = engine.optimizer
        optimizer.found_inf = None if is_finite else torch.ones((), device=engine.device)
        engine.step()
        return is_finite, norm.item()
    engine.step()
    was_applied = engine.was_step_applied()
    return was_applied, float(engine.get_global_grad_norm()) if was_applied else float("nan")
