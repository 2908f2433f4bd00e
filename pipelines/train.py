"""One training stage: Ray Train workers, each a DeepSpeed rank, fed in order by Ray Data.

    checkpoints/STAGE/step-000100/   to go on from (pipelines/checkpoint.py)
    checkpoints/STAGE/model/         what the stage made, as save_pretrained writes it; its presence ends the stage

The global batch is what is configured; the number of micro-batches that each worker adds up to it is derived from the
number of workers, so order and learning rate do not depend on how many there are.
"""

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import ray
import ray.train
import torch
import torch.distributed
from annotated_types import Ge, Gt, Le, Lt, MinLen
from ray.data import ExecutionOptions
from ray.train.torch import TorchTrainer
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from pipelines import checkpoint, cluster, consumed, ingest, metrics
from pipelines.consumed import Used
from pipelines.grouping import Groups
from pipelines.order import Order, Shuffle
from pipelines.shards import Shards
from redux import contrastive, model
from redux.contrastive import Contrastive
from redux.image import Fit, Way
from redux.model import ReduxForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings of one stage.

    objective: "contrastive" trains the image tower alone, with CLIP's objective on captions; "language" the whole
        LLaVA, with next-token prediction.
    data: the set of shards, or a mixture: names of sets with their shares of each global batch.
    template: of the conversations (objective "language").
    epochs: of all sets together, whatever their shares; or steps: global batches.
    shuffle: "global" takes samples from anywhere; "window" mixes them within `window` shards at a time, which keeps
        reads near each other; "none" leaves them as they are stored.
    groups: batches of one modality and of similar lengths, sorted within so many global batches at a time, as LLaVA
        does for conversations; null mixes them.
    fit: images padded to a square (LLaVA's stage 2) or cropped (its stage 1).
    pixels: "exact" equals LLaVA's to the bit; "fast" does not, by a grey level or two (redux/image.py).
    learning_rate: peak for each part; a part that is not named is frozen.
    warmup: share of the steps over which the rate rises to its peak; from there it falls as a half cosine to 0.
    beta2: of AdamW; 0.95 forgets old gradients sooner and helps small models in small batches over plateaus.
    micro_batch: samples a worker computes at once.  zero: DeepSpeed's ZeRO stage (0 would report no gradient norm).
    checkpoint_every: steps between checkpoints.
    flip: mirror every other image at random.
    rounds: of a conversation, at most so many at a time, drawn anew and in another order each epoch, so that questions
        also come first, without the answers to others before them; null takes conversations as they are.
    """

    objective: Literal["contrastive", "language"]
    data: str | Annotated[dict[str, Annotated[float, Gt(0)]], MinLen(1)]
    template: Literal["plain", "vicuna_v1", "vicuna_bare"] = "vicuna_v1"
    epochs: Annotated[float, Gt(0)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    shuffle: Shuffle = "global"
    window: Annotated[int, Ge(1)] = 8
    groups: Annotated[int, Ge(1)] | None = None
    fit: Fit = "pad"
    pixels: Way = "exact"
    global_batch: Annotated[int, Ge(1)]
    micro_batch: Annotated[int, Ge(1)]
    learning_rate: dict[Literal["tower", "projector", "language"], Annotated[float, Gt(0)]]
    warmup: Annotated[float, Ge(0), Le(1)] = 0.03
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    weight_decay: Annotated[float, Ge(0)] = 0.0
    clip: Annotated[float, Gt(0)] = 1.0
    zero: Literal[1, 2] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: Annotated[int, Ge(1)] = 100
    flip: bool = False
    rounds: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate:
            raise ValueError("learning_rate: got {}, allowed: a rate for at least one of tower, projector, language")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs: got {self.epochs}, and steps {self.steps}, allowed: one of the two")
        if self.groups and (self.shuffle != "global" or len(self.mixture) > 1):
            raise ValueError(
                f"groups: got {self.groups} with shuffle {self.shuffle} and {len(self.mixture)} sets, allowed: groups "
                "with shuffle global and one set"
            )
        if self.objective == "contrastive" and self.micro_batch < 2:
            raise ValueError("micro_batch: got 1, allowed: at least 2, as objective contrastive compares samples")
        if self.objective == "contrastive" and set(self.learning_rate) != {"tower"}:
            raise ValueError(
                f"learning_rate: got {self.learning_rate}, allowed: tower alone, which is all that objective "
                "contrastive trains"
            )

    @property
    def mixture(self) -> dict[str, float]:
        """Shares of the sets by name."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data

    def accumulation(self, workers: int) -> int:
        """Micro-batches that each worker adds up to a global batch.  ValueError where that is no whole number."""
        together = self.micro_batch * workers
        if self.global_batch % together:
            raise ValueError(
                f"global_batch: got {self.global_batch}, allowed: a multiple of {together}, "
                f"{workers} workers x micro_batch {self.micro_batch}"
            )
        return self.global_batch // together


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a worker needs to know of its stage.

    sets: where each set of the mixture lies.  start: the model of the stage before, if there is one.
    tolerance: share of the stage's samples that may be replaced before it stops.
    """

    name: str
    stage: Stage
    model: model.Model
    seed: int
    workers: int
    run: Path
    sets: dict[str, str]
    tolerance: float
    tokenizer: Path
    start: Path | None

    @property
    def folder(self) -> Path:
        """Where this stage's checkpoints lie."""
        return self.run / "checkpoints" / self.name

    @property
    def result(self) -> Path:
        """The model that the stage makes."""
        return self.folder / "model"

    def reader(self) -> ingest.Reader:
        """What Ray Data reads."""
        stage = self.stage
        sources = {name: Shards(self.sets[name]) for name in stage.mixture}
        wanted = (self.model.tower.image_size, stage.fit)
        for name, shards in sources.items():
            if shards.prepared not in (None, wanted):
                raise ValueError(
                    f"train.{self.name}.data: {name} has images prepared as {shards.prepared}, allowed: {wanted}, by "
                    "model.tower.image_size and fit, or images as they came"
                )
        groups = None
        if stage.groups:
            [shards] = sources.values()
            groups = Groups.of(shards.has_image, shards.words, stage.groups)
        order = Order(
            samples=tuple(map(len, sources.values())),
            weights=() if isinstance(stage.data, str) else tuple(stage.data.values()),
            global_batch=stage.global_batch,
            seed=self.seed,
            shuffle=stage.shuffle,
            window=stage.window,
            shards=tuple(shards.sizes for shards in sources.values()) if stage.shuffle == "window" else (),
            groups=groups,
        )
        tokens = model.image_tokens(self.model)
        return ingest.Reader(
            sources=sources,
            order=order,
            size=stage.micro_batch,
            image_size=self.model.tower.image_size,
            tokenizer=self.tokenizer,
            encode=ingest.conversation(stage.template, tokens) if stage.objective == "language" else ingest.caption,
            fit=stage.fit,
            way=stage.pixels,
            flip=stage.flip,
            rounds=stage.rounds,
        )

    def steps(self, order: Order) -> int:
        """Global batches of the stage."""
        return self.stage.steps or order.batches(self.stage.epochs or 0)


def fit(plan: Plan) -> None:
    """Train the stage to its end, from its newest checkpoint if there is one; with a model it is at its end."""
    if plan.result.exists():
        return
    reader = plan.reader()
    accumulation = plan.stage.accumulation(plan.workers)
    samples, steps = sum(reader.order.samples), plan.steps(reader.order)
    per_step = accumulation * plan.workers
    print(
        f"{plan.name}: {steps} steps of {plan.stage.global_batch} = {plan.workers} workers x {plan.stage.micro_batch} "
        f"x {accumulation}: {steps * plan.stage.global_batch / samples:.4g} epochs of {samples} samples"
    )

    folder, workers = plan.folder, plan.workers

    def remaining() -> ray.data.Dataset:
        """Called again at every start of the workers: what the newest checkpoint has not seen.

        Names nothing of this module, so that the process that calls it need not load transformers' models.
        """
        saved = checkpoint.newest(folder)
        return ingest.dataset(reader, (saved.cursor if saved else 0) * per_step, steps * per_step, workers)

    # half a CPU each: what reads and decodes needs one, too
    cluster.require(plan.workers / 2 + 1, f"train.{plan.name} with workers = {plan.workers}")
    gpus = ray.cluster_resources().get("GPU", 0) >= plan.workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan, "steps": steps},
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers, use_gpu=gpus, resources_per_worker={"CPU": 0.5, **({"GPU": 1} if gpus else {})}
        ),
        run_config=ray.train.RunConfig(
            name=plan.name,
            storage_path=str(plan.folder.parent),
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": remaining},
        dataset_config=ray.train.DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    # in a thread of its own: fit() in the main thread takes Ctrl-C for itself and exits with 0
    pool = ThreadPoolExecutor(1)
    future = pool.submit(trainer.fit)
    pool.shutdown(wait=False)
    with tqdm(desc=plan.name, total=steps, unit="step") as bar:
        while not wait([future], timeout=0.5).done:
            bar.set_postfix_str(_progress(plan, bar))
    future.result()


def _progress(plan: Plan, bar: tqdm) -> str:
    """Move the bar to the last step on record; returns its loss."""
    entry = metrics.last(plan.run)
    if entry is None or entry["stage"] != plan.name:
        return ""
    bar.update(entry["step"] - bar.n)
    return f"loss {entry['loss']:.3f}"


def train_worker(config: dict[str, Any]) -> None:
    """One rank: the stage from its newest checkpoint to its end."""
    plan, steps = config["plan"], config["steps"]
    budget = plan.tolerance * steps * plan.stage.global_batch
    if plan.result.exists():
        return  # the workers were started anew after the last step
    engine = _engine(plan, steps)
    saved = checkpoint.newest(plan.folder)
    cursor = saved.cursor if saved else 0
    if saved:
        checkpoint.restore(engine, saved)
    record = metrics.Metrics(plan.run, plan.name, cursor) if engine.global_rank == 0 else None
    for step, values, used in training_steps(engine, plan, cursor, steps):
        if record:
            record.write(step, values, used)
            if used.replaced and record.replaced > budget:
                raise ValueError(
                    f"train.{plan.name}: {record.replaced} samples had to be replaced, allowed: {budget:g}, by "
                    f"data.tolerance; at last {used.replaced[-1]['reason']}; {plan.run / consumed.FILE} lists them"
                )
        if step % plan.stage.checkpoint_every == 0 and step < steps:
            checkpoint.save(engine, plan.folder, step)
    if record:
        _save(engine.module, plan)
        record.close()
    torch.distributed.barrier()  # nobody leaves while rank 0 saves


def training_steps(engine: Any, plan: Plan, cursor: int, steps: int) -> Iterator[tuple[int, dict[str, float], Used]]:
    """Do global batches cursor+1..steps; yields (step, what it was like and which samples it used, over all ranks)."""
    accumulation = plan.stage.accumulation(engine.dp_world_size)
    batches = _batches(engine, cursor * accumulation)
    for step in range(cursor + 1, steps + 1):
        rate = max(group["lr"] for group in engine.optimizer.param_groups)  # of the part that learns fastest
        loss = samples = tokens = data_s = compute_s = 0.0
        mine = []
        for _ in range(accumulation):
            clock = time.perf_counter()
            batch, columns = next(batches)
            data_s += (now := time.perf_counter()) - clock
            output = engine(**batch)
            engine.backward(output)
            engine.step()
            mine.append(columns)
            loss += output.item() / accumulation
            samples += len(batch["input_ids"])
            tokens += batch["attention_mask"].sum().item()
            compute_s += time.perf_counter() - now
        used = consumed.gather(mine, list(plan.stage.mixture), engine.device)
        sums = torch.tensor([loss, samples, tokens, data_s, compute_s], dtype=torch.float64, device=engine.device)
        torch.distributed.all_reduce(sums)
        loss, samples, tokens, data_s, compute_s = sums.tolist()
        world = engine.dp_world_size
        yield (
            step,
            {
                "loss": loss / world,
                "learning_rate": rate,
                "grad_norm": float(engine.get_global_grad_norm()),
                "samples": int(samples),
                "replaced": len(used.replaced),
                "tokens": int(tokens),
                "data_s": data_s / world,
                "compute_s": compute_s / world,
            },
            used,
        )


def _batches(engine: Any, done: int) -> Iterator[tuple[dict[str, torch.Tensor], ingest.Batch]]:
    """This rank's micro-batches after the first `done`, as tensors on its device and as they came.

    Each is checked to be the one whose turn it is.
    """
    blocks = ray.train.get_dataset_shard("train").iter_batches(batch_size=None, prefetch_batches=2)
    for turn, columns in enumerate(ingest.micro_batches(blocks), start=done):
        due = turn * engine.dp_world_size + engine.global_rank
        if columns["number"] != due:
            raise RuntimeError(f"rank {engine.global_rank}: got micro-batch {columns['number']}, due was {due}")
        names = ("pixel_values", "input_ids", "labels", "attention_mask")
        batch = {name: torch.tensor(columns[name], device=engine.device) for name in names if name in columns}
        images = batch["pixel_values"].movedim(-1, 1).contiguous()
        batch["pixel_values"] = model.normalise(images).to(engine.communication_data_type)
        yield batch, columns


class _Language(torch.nn.Module):
    """LLaVA whose forward gives the loss, so that it trains like every other model."""

    def __init__(self, llava: ReduxForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.llava(**batch, use_cache=False).loss


def _engine(plan: Plan, steps: int) -> Any:
    """The stage's model in a DeepSpeed engine."""
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed reads it while it is imported

    import deepspeed

    if cpu:
        # one core each, or the ranks fight; the shared-memory op would compile for half a minute at first use
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // plan.workers, 1))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(plan.seed)
    module, parts = _model(plan)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    rates = plan.stage.learning_rate
    groups = [{"params": [p.requires_grad_() for p in parts[part]], "lr": rate} for part, rate in rates.items()]
    optimizer = torch.optim.AdamW(
        groups, betas=(0.9, plan.stage.beta2), weight_decay=plan.stage.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule(steps, plan.stage.warmup))
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config={
            "train_batch_size": plan.stage.global_batch,
            "train_micro_batch_size_per_gpu": plan.stage.micro_batch,
            "gradient_clipping": plan.stage.clip,
            "zero_optimization": {"stage": plan.stage.zero},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": plan.stage.precision == "bf16"},
        },
    )
    return engine


@dataclass(frozen=True)
class Schedule:
    """Share of the peak learning rate at a step (from 0): linear warm-up, then half a cosine down to 0."""

    steps: int
    warmup: float

    def __call__(self, step: int) -> float:
        rising = max(round(self.steps * self.warmup), 1)
        if step < rising:
            return (step + 1) / rising
        return float(0.5 * (1 + np.cos(np.pi * min((step - rising) / max(self.steps - rising, 1), 1.0))))


def _model(plan: Plan) -> tuple[torch.nn.Module, dict[str, list[torch.nn.Parameter]]]:
    """What the stage trains and its parameters by part: new, or what the stage before left, at plan.start."""
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)
    before = _load(plan.start) if plan.start else None
    if plan.stage.objective == "contrastive":
        clip = before if isinstance(before, CLIPModel) else contrastive.build(plan.model.tower, tokenizer)
        wrapped = Contrastive(clip)
        return wrapped, {"tower": list(wrapped.parameters())}
    llava = before if isinstance(before, ReduxForConditionalGeneration) else model.build(plan.model, tokenizer)
    if isinstance(before, CLIPModel):
        llava.model.vision_tower.load_state_dict(before.vision_model.state_dict())
    return _Language(llava), llava.parts()


def _load(folder: Path) -> CLIPModel | ReduxForConditionalGeneration:
    kinds = {"clip": CLIPModel, "llava": ReduxForConditionalGeneration}
    return kinds[AutoConfig.from_pretrained(folder).model_type].from_pretrained(folder)


def _save(module: torch.nn.Module, plan: Plan) -> None:
    """Write the stage's model and its tokenizer, under its name only when whole."""
    unfinished = plan.folder / ".model"
    shutil.rmtree(unfinished, ignore_errors=True)
    inner: Any = module.trained() if isinstance(module, Contrastive) else module.llava
    inner.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(plan.tokenizer).save_pretrained(unfinished)
    os.replace(unfinished, plan.result)
