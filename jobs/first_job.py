"""First job file of a user, from the answers to the questions of `redux init`."""

from dataclasses import dataclass

import yaml

from redux.benchmarks.custom import AnswerMetric

EASY_VQA = "easy-vqa"
OWN_SET = "records"
"""Name of the set of the user's data."""

SMALL_MODEL = "small"
LARGE_MODELS = {"7b": "lmsys/vicuna-7b-v1.5", "13b": "lmsys/vicuna-13b-v1.5"}
"""Language models of LLaVA-1.5 by the answer that chooses them."""

CLIP_TOWER = "openai/clip-vit-large-patch14-336"
EASY_VQA_IMAGES = 4000
"""Training images of easy-VQA, each with one record in each set."""

CPU_WORKERS = 2
"""Workers among which a batch can be shared evenly on CPUs."""

MIN_STEPS_PER_EPOCH = 20
"""Steps of an epoch below which the batches of a small set are made smaller."""


@dataclass(frozen=True, kw_only=True)
class InitAnswers:
    """Answers of the user.

    Args:
        name: name of the run.
        data: "easy-vqa", a source of records in any form that is read, or a folder of shards; paths or URLs.
        images: folder or URL of the images of the records, unless they are in the source.
        num_records: number of records.
        bad_fraction: share of the records that will be rejected.
        questions: file of questions with answers; None for none.
        question_images: folder of their images; None for the folder of the file.
        metric: their metric.
        gpus: number of GPUs.
        model: "small", a name in LARGE_MODELS, folder or hub id of a LLaVA, or those of a tower and a language model.
    """

    name: str
    data: str
    images: str | None = None
    num_records: int = EASY_VQA_IMAGES
    bad_fraction: float = 0.0
    questions: str | None = None
    question_images: str | None = None
    metric: AnswerMetric = "contains"
    gpus: int
    model: str

    @property
    def parts(self) -> tuple[str, str] | None:
        """Tower and language model that are joined by a new projector; None for other models."""
        if self.model in LARGE_MODELS:
            return CLIP_TOWER, LARGE_MODELS[self.model]
        tower, _, language = self.model.partition(" ")
        return (tower, language) if language else None


def write_job(answers: InitAnswers) -> str:
    """Write a job file with comments."""
    lines = [
        "# Job file of Redux, written by `redux init`. `redux explain KEY` explains a key, `redux run` runs the file.",
        "# Relative paths start at the folder where the command runs.",
        "",
        f"name: {_quote(answers.name)}  # the run folder is runs/NAME",
        "seed: 0",
        f"num_workers: {answers.gpus or 'auto'}  # training processes: one for each GPU, or auto",
        "",
        *_write_data(answers),
        "",
        *_write_model(answers),
        "",
        "train:",
        *_write_stages(answers),
        "",
        *_write_evaluation(answers),
    ]
    return "\n".join(lines) + "\n"


def _quote(value: str) -> str:
    """Write a text as YAML on one line."""
    return str(yaml.safe_dump([value], default_flow_style=True, width=100_000, allow_unicode=True)).strip()[1:-1]


def _write_data(answers: InitAnswers) -> list[str]:
    if answers.data == EASY_VQA:
        return ["data:", f"  source: {EASY_VQA}  # images and questions of the package easy-vqa"]
    lines = ["data:", "  source: null"]
    if answers.images is None:
        return [*lines, "  sets:", f"    {OWN_SET}: {_quote(answers.data)}  # folder or URL of shards"]
    lines += [
        "  sets:",
        f"    {OWN_SET}: {_quote(f'shards/{answers.name}')}  # shards that the run makes of the records",
    ]
    lines += [
        "  make:",
        f"    {OWN_SET}:",
        f"      source: {_quote(answers.data)}",
        f"      images: {_quote(answers.images)}",
    ]
    if answers.bad_fraction:
        # Rounded up, because the same records are rejected again.
        share = min(answers.bad_fraction * 1.01 + 0.0001, 1)
        lines.append(f"      max_bad_fraction: {share:.4f}  # share of the records that may be rejected")
    return lines


def _write_model(answers: InitAnswers) -> list[str]:
    lines = ["model:"]
    if answers.model == SMALL_MODEL:
        lines += [
            "  # a small model from random values, for simple images and short answers",
            "  tower: {image_size: 64, patch_size: 8, hidden_size: 96, num_hidden_layers: 5, num_attention_heads: 3, "
            "intermediate_size: 192}",
            "  language: {hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 352, "
            "max_position_embeddings: 512}",
        ]
    elif answers.parts:
        tower, language = answers.parts
        lines += [f"  tower: {_quote(tower)}", f"  language: {_quote(language)}  # a new projector joins both"]
    else:
        lines.append(f"  checkpoint: {_quote(answers.model)}  # a LLaVA, from which training starts")
    lines.append("  vmtc: {ratio: 0.5}      # token compression removes half of the image tokens; null turns it off")
    lines.append("  cmai: {gamma_max: 0.6}  # attention inhibition; null turns it off")
    return lines


def _write_stages(answers: InitAnswers) -> list[str]:
    """Write the training stages: three for a small model and easy-VQA, two for parts, one otherwise."""
    own_data = answers.data != EASY_VQA
    captions, conversations = (OWN_SET, OWN_SET) if own_data else ("captions", "conversations")
    rates = "{tower: 1e-3, projector: 1e-3, language: 1e-3}"
    # A small model is trained as a whole, from sizes; without easy-VQA there are no captions for its tower.
    if answers.model == SMALL_MODEL and own_data:
        return _write_stage(
            "instruct", answers, conversations, rates, "vicuna_bare", 10, 32, ("max_length: 512", "beta2: 0.95")
        )
    if answers.model == SMALL_MODEL:
        return [
            *_write_stage("tower", answers, captions, "{tower: 1e-3}", None, 7, 64, ("random_flip: true",)),
            *_write_stage("pretrain", answers, captions, rates, "plain", 2, 16, ("beta2: 0.95", "random_flip: true")),
            *_write_stage(
                "instruct",
                answers,
                conversations,
                "{tower: 1e-4, projector: 1e-3, language: 1e-3}",
                "vicuna_bare",
                6,
                8,
                ("beta2: 0.95", "save_steps: 500", "max_rounds: 3"),
            ),
        ]
    # Pretrained parts get a projector first; a LLaVA is only tuned further, with adapters.
    memory = ("precision: bf16", "activation_checkpointing: true") if answers.gpus else ("precision: fp32",)
    if answers.parts:
        sharded_memory = (*memory, "zero_stage: 3") if answers.gpus else memory
        choice = "" if answers.model in LARGE_MODELS else "  # or chat, the chat template of the language model"
        template = f"vicuna_v1{choice}"
        return [
            *_write_stage("pretrain", answers, captions, "{projector: 1e-3}", "plain", 1, 256, memory),
            *_write_stage(
                "instruct",
                answers,
                conversations,
                "{projector: 2e-5, language: 2e-5}",
                template,
                1,
                128,
                sharded_memory,
            ),
        ]
    adapters = ("lora: {rank: 128, alpha: 256}  # adapters instead of all weights; null trains the weights", *memory)
    epochs = 3 if own_data else 1
    return _write_stage(
        "instruct", answers, conversations, "{projector: 2e-5, language: 2e-4}", None, epochs, 128, adapters
    )


def _write_stage(
    name: str,
    answers: InitAnswers,
    data: str,
    rates: str,
    template: str | None,
    epochs: int,
    batch: int,
    others: tuple[str, ...],
) -> list[str]:
    """Write a stage.

    Args:
        name: name of the stage.
        answers: answers of the user.
        data: name of its set.
        rates: learning rate of each trained part, as YAML.
        template: conversation template; None for that of the checkpoint, or for a tower.
        epochs: passes over the data.
        batch: largest batch.
        others: further lines.
    """
    global_batch, micro_batch = choose_batch(answers.num_records, answers.gpus or CPU_WORKERS, batch)
    objective = "contrastive" if name == "tower" else "language"
    lines = [f"objective: {objective}", f"data: {data}"]
    lines += [f"template: {template}"] if template else []
    lines += [
        f"epochs: {epochs}  # passes over the data",
        f"global_batch_size: {global_batch}",
        f"micro_batch_size: {micro_batch}  # samples that a worker computes at a time; smaller needs less memory",
        f"learning_rate: {rates}  # parts without one stay frozen",
        *others,
    ]
    return [f"  {name}:", *(f"    {line}" for line in lines)]


def choose_batch(num_records: int, workers: int, largest: int) -> tuple[int, int]:
    """Choose the batch and the micro-batch, so that an epoch has some steps and the workers share a batch evenly.

    >>> [choose_batch(*case) for case in ((4000, 1, 64), (200, 1, 128), (200, 8, 128), (665_000, 8, 128))]
    [(64, 16), (8, 8), (8, 1), (128, 16)]
    """
    batch = largest
    while batch > 8 and num_records < MIN_STEPS_PER_EPOCH * batch:
        batch //= 2
    micro_batch = max(min(batch // workers, 16), 1)
    return micro_batch * workers * max(batch // (micro_batch * workers), 1), micro_batch


def _write_evaluation(answers: InitAnswers) -> list[str]:
    if answers.data == EASY_VQA:
        return ["evaluate:", "  tasks: {easy_vqa: {}}  # its 9,673 test questions"]
    if answers.questions is None:
        return [
            '# Score the model on your own questions, lines {"image", "question", "answer"} of a JSON file:',
            "# evaluate:",
            "#   tasks: {own: {file: questions.jsonl, images: images, metric: contains}}",
            "# Or ask a share of the data, which is then not trained on: data.hold_out: 0.05 and evaluate: {}",
        ]
    images = f", images: {_quote(answers.question_images)}" if answers.question_images else ""
    return [
        "evaluate:",
        "  tasks:",
        f"    own: {{file: {_quote(answers.questions)}{images}, metric: {answers.metric}}}  # your own questions",
    ]
