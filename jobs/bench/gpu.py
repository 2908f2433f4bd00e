"""Speed of VMTC and CMAI on one GPU, plain and fused, as ratios to LLaVA; the tests marked `gpu` run before.

    python jobs/bench/gpu.py [--out FILE] [--tiny] [--only SECTION ...] [--limit SECONDS] [--profile FOLDER]

It runs from a checkout, without an installed package and without downloads: torch, transformers and what `import redux`
needs are enough.  Weights and data are random, in bf16; shapes are those of CLIP-L/14-336 and LLaMA-7B.  Variants are
timed in turn, round after round, so that clocks and order affect all of them alike; a ratio is the median over rounds,
with its quartiles.  The record is a dated line of gpu.jsonl beside this file, written again after each section.
"""

import argparse
import gc
import logging
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, MaxLengthCriteria, StoppingCriteriaList  # noqa: E402

from jobs.bench.record import append_record  # noqa: E402
from redux.configuration import ReduxConfig  # noqa: E402
from redux.graph_decoding import Prompt, decode_prompt, release_graphs  # noqa: E402
from redux.kernels import set_kernels  # noqa: E402
from redux.model import ReduxForConditionalGeneration  # noqa: E402
from redux.settings import CMAI, VMTC  # noqa: E402

Choice = str
"""Column of the table: "plain", or "fused" for what the library chooses on this machine ("auto")."""

CHOICES: dict[Choice, Any] = {"plain": "plain", "fused": "auto"}
MAX_ROUNDS = 15
TEST_LIMIT_S = 150


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


FULL = Shapes(
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
TINY = Shapes(
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


class Goal(NamedTuple):
    """One row of the table: a ratio of two variants of a group.

    Args:
        group: key of the results.
        variant: the variant; its plain and fused versions are two columns.
        base: the variant to which it is compared.
        goal: ratio to reach; None without one.
        floor: what fewer tokens allow; None if unknown.
        is_speed: True for base time ÷ variant time, where more is better.
    """

    group: str
    variant: str
    base: str
    goal: float | None
    floor: float | None
    is_speed: bool = False


def list_goals(shapes: Shapes) -> list[Goal]:
    """List the rows of the table; counts of tokens in names are those of the full shapes."""
    floors = {"288": 0.74, "64": 0.47, "36": 0.41}
    goals = {"288": 0.80, "64": 0.55, "36": 0.50}
    rows = [Goal("tower inference", tokens, "off", goals[tokens], floors[tokens]) for tokens in floors]
    rows += [Goal("tower inference", tokens, "transformers", None, None) for tokens in floors]
    rows += [Goal("tower forward+backward", tokens, "off", None, floors[tokens]) for tokens in floors]
    limits = ((1.06, 1.04, 1.02), (1.10, 1.06, 1.03))
    for (image, text), (weights, scores, floor) in zip(shapes.layer_sequences, limits, strict=True):
        group = f"layer {image}+{text}"
        rows.append(Goal(group, "masked SDPA", "causal SDPA", None, None))
        rows.append(Goal(group, "CMAI weights", "causal SDPA", weights, floor))
        rows.append(Goal(group, "CMAI scores", "causal SDPA", scores, floor))
    for group, half in (("train", 0.78), ("train checkpointing", 0.80)):
        rows.append(Goal(group, "VMTC 288", "LLaVA", None, 0.72))
        rows.append(Goal(group, "CMAI 576", "LLaVA", None, 1.0))
        rows.append(Goal(group, "VMTC+CMAI 288", "LLaVA", half, 0.72))
        rows.append(Goal(group, "VMTC+CMAI 288 scores", "LLaVA", None, 0.72))
        rows.append(Goal(group, "VMTC+CMAI 64", "LLaVA", 0.56, 0.50))
    # the floors of decoding are VMTC alone, as measured on an H200
    for batch, speed, speed_floor in zip(shapes.decode_batches, (1.2, 1.4), (1.47, 1.59), strict=True):
        for group in (f"batch {batch}", f"graph batch {batch}"):
            for variant in ("VMTC 288", "VMTC+CMAI 288", "VMTC+CMAI 64"):
                is_goal = variant == "VMTC+CMAI 288"
                bounds: tuple[float | None, float | None] = (speed, speed_floor) if is_goal else (None, None)
                rows.append(Goal(f"decode {group}", variant, "LLaVA", bounds[0], bounds[1], is_speed=True))
                bounds = (0.9, 0.7) if is_goal and batch == 1 else (None, None)
                rows.append(Goal(f"prefill {group}", variant, "LLaVA", bounds[0], bounds[1]))
    for variant in ("VMTC 288", "VMTC+CMAI 288"):
        rows.append(Goal("decode compiled", variant, "LLaVA", None, None, is_speed=True))
    return rows


class Variant(NamedTuple):
    """One thing to time.

    Args:
        name: name, without the choice of kernels.
        choice: key of `CHOICES`.
        run: the timed call.
    """

    name: str
    choice: Choice
    run: Callable[[], object]

    @property
    def label(self) -> str:
        """Key in the results."""
        return f"{self.name}/{self.choice}"


@dataclass
class Bench:
    """State of one run of the script.

    Args:
        shapes: sizes.
        device: "cuda" or "cpu".
        profiles: folder for the profiles of single calls; None for none.
        results: by group, {"ms": {variant: milliseconds of each round}, "errors": {variant: text}, ...}.
    """

    shapes: Shapes
    device: str
    profiles: Path | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def time_call(self, run: Callable[[], object]) -> float:
        """Return the milliseconds of one call, from an idle device to an idle device."""
        if self.device == "cpu":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def time_variants(
        self, group: str, variants: Sequence[Variant], warm_calls: int = 2, settles: bool = True, **extra: Any
    ) -> None:
        """Time variants in turn, round after round, and put the times into the results.

        Args:
            group: key of the results.
            variants: the variants. One that fails is left out of the further rounds.
            warm_calls: calls of each variant before the first round, in which kernels are compiled and tuned.
            settles: call each variant twice in a round and time the second call, as the first one follows another
                variant.
            extra: further values for the results.
        """
        result: dict[str, Any] = {"ms": {}, "errors": {}, **extra}
        self.results[group] = result
        remaining = list(variants)

        def attempt(variant: Variant) -> float | None:
            set_kernels(CHOICES[variant.choice])
            try:
                return self.time_call(variant.run)
            except Exception as error:
                traceback.print_exc()
                result["errors"][variant.label] = describe_error(error)
                remaining.remove(variant)
                self.free_memory()
                return None

        for variant in variants:
            for _ in range(warm_calls):
                if attempt(variant) is None:
                    break
        started = time.perf_counter()
        for number in range(MAX_ROUNDS):
            if number >= self.shapes.rounds and time.perf_counter() - started > self.shapes.section_s:
                break
            # every round begins with another variant
            first = number % max(len(remaining), 1)
            for variant in [*remaining[first:], *remaining[:first]]:
                times = [attempt(variant) for _ in range(1 + settles) if variant in remaining]
                if times[-1] is not None:
                    result["ms"].setdefault(variant.label, []).append(round(times[-1], 4))
        set_kernels("auto")
        print(f"{group}: {format_medians(result)}", flush=True)
        if self.profiles:
            for variant in remaining:
                self.profile_call(group, variant)

    def profile_call(self, group: str, variant: Variant) -> None:
        """Write the operations of one call, by time, into a file."""
        from torch.profiler import ProfilerActivity, profile

        assert self.profiles
        is_gpu = self.device == "cuda"
        set_kernels(CHOICES[variant.choice])
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as profiler:
            self.time_call(variant.run)
        set_kernels("auto")
        averages = profiler.key_averages()
        table = averages.table(sort_by="cuda_time_total" if is_gpu else "cpu_time_total", row_limit=30)
        self.profiles.mkdir(parents=True, exist_ok=True)
        name = f"{group} {variant.name} {variant.choice}".replace(" ", "-")
        (self.profiles / f"{name}.txt").write_text(table)

    def free_memory(self) -> None:
        """Release memory that no tensor uses."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def measure_peak_gib(self, run: Callable[[], object]) -> float:
        """Return GiB that one call adds at its peak; 0 on a CPU."""
        if self.device == "cpu":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def describe_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def both(name: str, run: Callable[[], object]) -> list[Variant]:
    """Return the plain and the fused variant of a call."""
    return [Variant(name, choice, run) for choice in CHOICES]


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
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16), torch.device(bench.device):
        return ReduxForConditionalGeneration(config)


def share_weights(base: nn.Module, config: ReduxConfig) -> ReduxForConditionalGeneration:
    """Build a model of another configuration on the weights of one that exists: VMTC and CMAI add none."""
    with default_dtype(torch.bfloat16), torch.device("meta"):
        model = ReduxForConditionalGeneration(config)
    modules = dict(base.named_modules())
    for name, module in model.named_modules():
        module._parameters.update(modules[name]._parameters)
        module._buffers.update(modules[name]._buffers)
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build floating-point tensors in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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


# --- Sections --------------------------------------------------------------------------------------------------------


def run_tests(bench: Bench) -> None:
    """Run the tests marked `gpu` in a process of their own, and record the summary."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        bench.results["tests"] = {"summary": "no tests"}
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_LIMIT_S)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        output = f"{(expired.stdout or b'').decode()}\nstopped after {TEST_LIMIT_S} s"
    print(output[-6000:], flush=True)
    lines = output.strip().splitlines()
    bench.results["tests"] = {
        "summary": lines[-1] if lines else "",
        "failed": [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def time_tower(bench: Bench) -> None:
    """Time the image tower, inference and forward + backward."""
    shapes, batch = bench.shapes, bench.shapes.images
    budgets = {"288": shapes.half, "64": shapes.few, "36": shapes.fewest}
    base = build_model(bench, build_config(shapes, 1))
    side = shapes.tower["image_size"]
    pixels = torch.randn(batch, 3, side, side, device=bench.device, dtype=torch.bfloat16)
    towers = {"off": base} | {
        name: share_weights(base, build_config(shapes, 1, VMTC(tokens=tokens))) for name, tokens in budgets.items()
    }

    def build_run(name: str, trains: bool) -> Callable[[], object]:
        def run() -> None:
            with torch.set_grad_enabled(trains):
                if name == "transformers":
                    features = base.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
                else:
                    features = towers[name].model.encode_images(pixels)[0]
                if trains:
                    features.float().mean().backward()
                    base.zero_grad(set_to_none=True)

        return run

    for group, trains in (("tower inference", False), ("tower forward+backward", True)):
        # compressing blocks are patched at the first encoding, so the tower of transformers is `off`'s
        variants = [Variant(name, "plain", build_run(name, trains)) for name in ("transformers", "off")]
        for name in budgets:
            variants += both(name, build_run(name, trains))
        bench.time_variants(group, variants)


def time_layer(bench: Bench) -> None:
    """Time the last of 32 decoder layers, forward + backward, by its attention."""
    for image, text in bench.shapes.layer_sequences:
        bench.free_memory()
        time_layer_of_length(bench, image, text)


def time_layer_of_length(bench: Bench, image: int, text: int) -> None:
    """Time the layer on sequences of image and text tokens, `prefix` of the text before the image."""
    shapes, batch = bench.shapes, bench.shapes.layer_batch
    length = image + text
    ids = torch.full((batch, length), 3, device=bench.device)
    ids[:, shapes.prefix : shapes.prefix + image] = shapes.language["vocab_size"] - 1
    hidden = torch.randn(
        batch, length, shapes.language["hidden_size"], device=bench.device, dtype=torch.bfloat16, requires_grad=True
    )
    methods = {"causal SDPA": None, "CMAI weights": CMAI(), "CMAI scores": CMAI(scores="scores")}
    decoders = {name: build_last_layer(bench, cmai) for name, cmai in methods.items()}
    for decoder in decoders.values():
        decoder.layers[0].load_state_dict(decoders["causal SDPA"].layers[0].state_dict())
    visible = torch.ones(length, length, dtype=torch.bool, device=bench.device).tril().expand(batch, 1, -1, -1)

    def build_run(name: str, choice: Choice, **changes: Any) -> Callable[[], object]:
        set_kernels(CHOICES[choice])
        layer = decoders[name].layers[0]
        arguments = capture_arguments(decoders[name], ids) | changes

        def run() -> None:
            output = layer(hidden, **arguments)
            output = output[0] if isinstance(output, tuple) else output
            output.float().mean().backward()
            hidden.grad = None
            layer.zero_grad(set_to_none=True)

        return run

    variants = [
        Variant("causal SDPA", "plain", build_run("causal SDPA", "plain")),
        Variant("masked SDPA", "plain", build_run("causal SDPA", "plain", attention_mask=visible)),
    ]
    for name in ("CMAI weights", "CMAI scores"):
        variants += [Variant(name, choice, build_run(name, choice)) for choice in CHOICES]
    peaks = {variant.label: bench.measure_peak_gib(variant.run) for variant in variants[:2]}
    bench.time_variants(f"layer {image}+{text}", variants, peak_gib=peaks)


def build_last_layer(bench: Bench, cmai: CMAI | None) -> Any:
    """Build a language model of 32 layers of which only the last one exists."""
    config = build_config(bench.shapes, 32, None, cmai)
    with default_dtype(torch.bfloat16), torch.device("meta"):
        model = ReduxForConditionalGeneration(config)
    decoder: Any = model.model.language_model
    decoder.layers = nn.ModuleList([decoder.layers[-1]])
    decoder.to_empty(device=bench.device)
    # buffers that are computed, not stored
    with torch.device(bench.device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config.text_config)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.02)
    nn.init.ones_(decoder.layers[0].input_layernorm.weight)
    nn.init.ones_(decoder.layers[0].post_attention_layernorm.weight)
    return decoder.train()


def capture_arguments(decoder: Any, ids: Tensor) -> dict[str, Any]:
    """Capture the keyword arguments with which a language model calls its layers."""
    captured: dict[str, Any] = {}

    def capture(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.update(kwargs)

    handle = decoder.layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    with torch.no_grad():
        decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    handle.remove()
    return captured


def time_training(bench: Bench) -> None:
    """Time a training step with the tower frozen: forward, backward and AdamW, with and without recomputation."""
    shapes = bench.shapes
    base = build_model(bench, build_config(shapes, shapes.train_layers)).train()
    base.model.vision_tower.requires_grad_(False)
    models = {"LLaVA": base} | {
        name: share_weights(base, build_config(shapes, shapes.train_layers, *settings)).train()
        for name, settings in list_methods(shapes).items()
    }
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=bench.device == "cuda")
    steps = {name: build_step(bench, model, optimizer) for name, model in models.items()}
    peak = measure_matmul_peak(bench)
    flops = {name: count_step_flops(bench, model) for name, model in models.items()}
    for group, recomputes in (("train", False), ("train checkpointing", True)):
        for model in models.values():
            if recomputes:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        variants = [Variant("LLaVA", "plain", steps["LLaVA"])]
        for name in list_methods(shapes):
            variants += both(name, steps[name])
        bench.time_variants(group, variants, matmul_tflops=round(peak / 1e12, 1))
        result = bench.results[group]
        result["utilisation"] = {
            label: round(flops[label.partition("/")[0]] / (statistics.median(times) / 1e3) / peak, 4)
            for label, times in result["ms"].items()
        }
        result["peak_gib"] = {
            variant.label: bench.measure_peak_gib(variant.run) for variant in variants if variant.label in result["ms"]
        }


def build_step(
    bench: Bench, model: ReduxForConditionalGeneration, optimizer: torch.optim.Optimizer
) -> Callable[[], object]:
    """Build a function that does one training step, with labels on the last half of the text."""
    text = bench.shapes.train_text
    inputs = build_inputs(bench, model, bench.shapes.train_batch, text)
    labels = inputs["input_ids"][:, 1:].clone()
    labels[:, : -text // 2] = -100
    learned = labels != -100

    def step() -> None:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][learned]).float(), labels[learned])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count_step_flops(bench: Bench, model: ReduxForConditionalGeneration) -> float:
    """Count the model FLOPs of the language layers in a training step, as for causal attention, none recomputed."""
    shapes, batch = bench.shapes, bench.shapes.train_batch
    length = shapes.prefix + model.config.image_seq_length + shapes.train_text
    weights = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    attention = 6 * shapes.train_layers * shapes.language["hidden_size"] * length**2 * batch
    return 6.0 * batch * length * weights + attention


def measure_matmul_peak(bench: Bench) -> float:
    """Measure the FLOPs per second of a large bf16 product, the median of ten."""
    side = bench.shapes.product
    left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    times = [bench.time_call(lambda: left @ right) for _ in range(13)][3:]
    return 2 * side**3 / (statistics.median(times) / 1e3)


def time_decoding(bench: Bench) -> None:
    """Time the prefill, and the tokens after it, with the cache that `generate` makes."""
    shapes = bench.shapes
    base = build_model(bench, build_config(shapes, shapes.decode_layers)).eval()
    methods = {name: list_methods(shapes)[name] for name in ("VMTC 288", "VMTC+CMAI 288", "VMTC+CMAI 64")}
    models = {"LLaVA": base} | {
        name: share_weights(base, build_config(shapes, shapes.decode_layers, *settings)).eval()
        for name, settings in methods.items()
    }
    for batch in shapes.decode_batches:
        variants = []
        for name, model in models.items():
            inputs = build_inputs(bench, model, batch, shapes.decode_text)
            for phase, tokens in (("prefill", 1), ("all", shapes.new_tokens)):
                run = build_generation(model, inputs, tokens)
                both_choices = both(f"{name}|{phase}", run)
                variants += both_choices[:1] if name == "LLaVA" else both_choices
        bench.time_variants("generation", variants, warm_calls=1, settles=False)
        split_generation(bench, f"batch {batch}")
        time_graphs(bench, models, batch)


def time_graphs(bench: Bench, models: dict[str, ReduxForConditionalGeneration], batch: int) -> None:
    """Time the prefill, and the tokens after it, by CUDA graph; the graph of LLaVA, too, is the base of the ratios."""
    variants = []
    for name, model in models.items():
        inputs = build_inputs(bench, model, batch, bench.shapes.decode_text)
        # a model keeps one graph, so it has one choice of kernels
        choice = "plain" if name == "LLaVA" else "fused"
        for phase, tokens in (("prefill", 1), ("all", bench.shapes.new_tokens)):
            variants.append(Variant(f"{name}|{phase}", choice, build_graph_generation(model, inputs, tokens)))
    bench.time_variants("generation", variants, warm_calls=1, settles=False)
    split_generation(bench, f"graph batch {batch}")
    release_graphs()
    bench.free_memory()


def build_graph_generation(
    model: ReduxForConditionalGeneration, inputs: dict[str, Tensor], tokens: int
) -> Callable[[], object]:
    """Build a function that generates greedily by CUDA graph, without an end token; on a CPU, by the same steps."""

    def run() -> object:
        with torch.inference_mode():
            return decode_prompt(model, Prompt.read(model, inputs), [], 0, tokens)

    return run


def build_generation(
    model: ReduxForConditionalGeneration, inputs: dict[str, Tensor], tokens: int, **options: Any
) -> Callable[[], object]:
    """Build a function that generates greedily, without an end token."""

    def run() -> object:
        with torch.no_grad():
            return model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
            )

    return run


def split_generation(bench: Bench, group: str) -> None:
    """Turn times of whole generations into times of the prefill and of one decoded token."""
    batch = int(group.split()[-1])
    result = bench.results.pop("generation")
    prefill: dict[str, list[float]] = {}
    decode: dict[str, list[float]] = {}
    for label, times in result["ms"].items():
        name, _, rest = label.partition("|")
        phase, _, choice = rest.partition("/")
        if phase == "prefill":
            whole = result["ms"].get(f"{name}|all/{choice}", [])
            prefill[f"{name}/{choice}"] = times
            decode[f"{name}/{choice}"] = [
                (total - first) / (bench.shapes.new_tokens - 1) for first, total in zip(times, whole, strict=False)
            ]
    bench.results[f"prefill {group}"] = {"ms": prefill, "errors": result["errors"]}
    bench.results[f"decode {group}"] = {
        "ms": decode,
        "errors": result["errors"],
        "tokens_per_s": {
            label: round(batch * 1e3 / statistics.median(times), 1) for label, times in decode.items() if times
        },
    }


def time_compiled_decoding(bench: Bench) -> None:
    """Time a decoded token with StaticCache, which transformers compiles on a GPU; each variant is compiled."""
    shapes = bench.shapes
    methods = {name: list_methods(shapes)[name] for name in ("VMTC 288", "VMTC+CMAI 288")}
    base = build_model(bench, build_config(shapes, shapes.compiled_layers)).eval()
    result: dict[str, Any] = {"ms": {}, "errors": {}, "layers": shapes.compiled_layers}
    for name, settings in {"LLaVA": (None, None), **methods}.items():
        model = share_weights(base, build_config(shapes, shapes.compiled_layers, *settings)).eval()
        inputs = build_inputs(bench, model, 1, shapes.decode_text)
        choice = "plain" if name == "LLaVA" else "fused"
        # the cache has the length of max_new_tokens, so the short call stops early instead of asking for fewer
        short = StoppingCriteriaList([MaxLengthCriteria(max_length=inputs["input_ids"].shape[1] + 2)])
        variants = [
            Variant(
                f"{name}|{phase}",
                choice,
                build_generation(model, inputs, shapes.new_tokens + 1, cache_implementation="static", **options),
            )
            for phase, options in (("prefill", {"stopping_criteria": short}), ("all", {}))
        ]
        torch.compiler.reset()
        bench.time_variants("generation", variants, warm_calls=2)
        part = bench.results.pop("generation")
        result["errors"] |= part["errors"]
        first, whole = (part["ms"].get(variant.label, []) for variant in variants)
        per_token = [(total - start) / (shapes.new_tokens - 1) for start, total in zip(first, whole, strict=False)]
        if per_token:
            result["ms"][f"{name}/{choice}"] = per_token
        bench.results["decode compiled"] = result


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "tests": run_tests,
    "tower": time_tower,
    "layer": time_layer,
    "train": time_training,
    "decode": time_decoding,
    "compiled": time_compiled_decoding,
}


# --- Table and record ------------------------------------------------------------------------------------------------


def compute_ratio(result: dict[str, Any], goal: Goal, choice: Choice) -> tuple[float, float, float] | None:
    """Compute quartiles of the ratio over rounds: (first, median, third); None if a variant has no times."""
    times = result["ms"].get(f"{goal.variant}/{choice}", [])
    base = result["ms"].get(f"{goal.base}/plain", [])
    pairs = [
        (below / above if goal.is_speed else above / below)
        for above, below in zip(times, base, strict=False)
        if above > 0 and below > 0
    ]
    if not pairs:
        return None
    if len(pairs) == 1:
        return pairs[0], pairs[0], pairs[0]
    first, median, third = statistics.quantiles(pairs, n=4, method="inclusive")
    return first, median, third


def format_ratio(quartiles: tuple[float, float, float] | None) -> str:
    return "" if quartiles is None else "{1:.3f} ({0:.3f}-{2:.3f})".format(*quartiles)


def build_table(bench: Bench) -> list[dict[str, Any]]:
    """Build the rows of the table from the results so far."""
    rows = []
    for goal in list_goals(bench.shapes):
        result = bench.results.get(goal.group, {})
        if "ms" not in result:
            continue
        row: dict[str, Any] = {"row": f"{goal.group}: {goal.variant} {'speed ' if goal.is_speed else ''}/ {goal.base}"}
        for choice in CHOICES:
            if quartiles := compute_ratio(result, goal, choice):
                row[choice] = [round(value, 4) for value in quartiles]
        rows.append({**row, "goal": goal.goal, "floor": goal.floor, "is_speed": goal.is_speed})
    for group in ("train", "train checkpointing"):
        utilisation = bench.results.get(group, {}).get("utilisation", {})
        for name in ("LLaVA", "VMTC+CMAI 288"):
            values = {
                choice: [utilisation[f"{name}/{choice}"]] * 3 for choice in CHOICES if f"{name}/{choice}" in utilisation
            }
            if values:
                goal_value = 0.5 if name != "LLaVA" and group == "train" else None
                rows.append(
                    {"row": f"{group}: {name} model FLOPs utilisation", **values, "goal": goal_value, "floor": None}
                    | {"is_speed": True}
                )
    return rows


def format_medians(result: dict[str, Any]) -> str:
    medians = {label: statistics.median(times) for label, times in result["ms"].items() if times}
    return ", ".join(f"{label} {milliseconds:.3f} ms" for label, milliseconds in medians.items())


def print_table(bench: Bench) -> None:
    """Print the table, then the milliseconds of each variant and the errors."""
    print(f"\n{'':60} {'plain':>22} {'fused':>22} {'goal':>7} {'floor':>6}")
    for row in build_table(bench):
        sign = ">=" if row["is_speed"] else "<="
        goal = "" if row["goal"] is None else f"{sign}{row['goal']:.2f}"
        floor = "" if row["floor"] is None else f"{row['floor']:.2f}"
        plain, fused = (format_ratio(tuple(row[choice]) if choice in row else None) for choice in CHOICES)
        best = row.get("fused", row.get("plain"))
        is_met = (
            best is not None and row["goal"] is not None and (best[1] - row["goal"]) * (1 if sign == ">=" else -1) >= 0
        )
        print(f"{row['row']:60} {plain:>22} {fused:>22} {goal:>7} {floor:>6} {'met' if is_met else ''}")
    for group, result in bench.results.items():
        details = {name: value for name, value in result.items() if name != "ms" and value}
        print(f"\n{group}: {format_medians(result) if 'ms' in result else ''}")
        for name, value in details.items():
            print(f"  {name}: {value}")
    print(flush=True)


class MessageCollector(logging.Handler):
    """Collect what the library logs about its choice of kernels."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        print(record.getMessage(), flush=True)


def describe_machine(bench: Bench) -> dict[str, str]:
    """Describe card, versions and commit."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:
        commit = ""  # no git on this machine
    return {
        "card": torch.cuda.get_device_name() if bench.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "commit": commit,
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to check the script on a CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--limit",
        type=float,
        default=420,
        metavar="SECONDS",
        help="start no section after this time, default: %(default)s",
    )
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write a profile of each variant there")
    parsed = parser.parse_args(arguments)
    parsed.out = parsed.out.with_suffix(".jsonl")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; 1 if one of them failed as a whole."""
    options = parse_arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(TINY if options.tiny else FULL, device, options.profile)
    if device == "cpu":
        torch.set_num_threads(1)  # tensors of these sizes are slower by threads
    collector = MessageCollector()
    logger = logging.getLogger("redux")
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    machine, begun, seconds = describe_machine(bench), time.perf_counter(), {}
    length_before = options.out.stat().st_size if options.out.exists() else 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, section in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        started = time.perf_counter()
        if started - begun > options.limit:
            bench.results[name] = {"error": f"not started: {options.limit:.0f} s had passed"}
            continue
        try:
            section(bench)
        except Exception as error:
            traceback.print_exc()
            bench.results[name] = {"error": describe_error(error)}
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {seconds[name]} s, {time.perf_counter() - begun:.0f} s in all", flush=True)
        bench.free_memory()
        # the line of this run is replaced after each section
        if options.out.exists():
            with options.out.open("r+") as file:
                file.truncate(length_before)
        record = {**machine, "tiny": options.tiny, "seconds": seconds, "kernels": collector.messages}
        append_record(str(options.out), **record, table=build_table(bench), results=bench.results)
    print_table(bench)
    logger.removeHandler(collector)
    return int(any("error" in result for result in bench.results.values()))


if __name__ == "__main__":
    sys.exit(main())
