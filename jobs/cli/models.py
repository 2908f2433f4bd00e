"""`redux export`, `cost`, `score` and `instructions`: models, their cost, and answers to benchmarks."""

import argparse
from pathlib import Path
from typing import Any

from jobs.cli.arguments import parse_count
from redux.benchmark_titles import BENCHMARK_TITLES

INSTRUCTIONS_TASK = "instructions"
OWN_METRICS = ("exact", "contains", "vqa", "anls", "choice")


def add_parsers(verbs: Any) -> None:
    """Add the parsers of this group."""
    _add_export(verbs)
    _add_cost(verbs)
    _add_score(verbs)
    _add_instructions(verbs)


def _add_export(verbs: Any) -> None:
    export = verbs.add_parser(
        "export",
        help="write a model folder for transformers or vLLM, with a model card",
        description="Write the model at a checkpoint as a complete folder: weights, tokenizer, processor, chat "
        "template, generation settings, and a model card with data, recipe, scores and cost. Weights that the stage "
        "trained come from the checkpoint and are verified. The others are those at the start of the stage. For a "
        "model FOLDER, the names that DDP, torch.compile, PEFT and the LLaVA repository give to weights are changed to "
        "those of transformers.",
        epilog="example: redux export runs/quickstart --out quickstart-model",
    )
    export.add_argument("run", metavar="FOLDER", type=Path, help="folder of a run or of a model")
    export.add_argument(
        "--to",
        choices=("hf", "vllm"),
        default="hf",
        help="hf writes a folder for transformers; vllm the same folder, with checks and vLLM's command "
        "(default: %(default)s)",
    )
    form = export.add_mutually_exclusive_group()
    form.add_argument("--merge-lora", action="store_true", help="merge LoRA adapters into the weights (the default)")
    form.add_argument(
        "--adapter", action="store_true", help="write LoRA adapters and other trained parts in PEFT's format instead"
    )
    export.add_argument("--stage", metavar="NAME", help="training stage (default: the last one)")
    export.add_argument("--step", metavar="N", type=parse_count, help="step of the checkpoint (default: the newest)")
    export.add_argument(
        "--out",
        metavar="URI",
        help="folder or URL that is empty or does not exist (default for a run: exports/ in its folder)",
    )
    export.set_defaults(verb=_export)


def _export(arguments: argparse.Namespace) -> None:
    from jobs import export

    options = export.ExportOptions(to=arguments.to, adapter=arguments.adapter)
    out, url = export.export_model(arguments.run, arguments.stage, arguments.step, arguments.out, options)
    print(f"{out}: the model of {url}")


def _add_cost(verbs: Any) -> None:
    cost = verbs.add_parser(
        "cost",
        help="show image tokens, FLOPs and KV cache of the paper's configurations",
        description="Show for each preset of redux.presets: image tokens, kept tokens and clusters of each compressing "
        "block, and for a prompt with one image the FLOPs, the share of LLaVA's FLOPs and the size of the KV cache. "
        "Everything is computed from the configuration; no model runs.",
        epilog="example: redux cost default tokens-64 --model runs/quickstart/checkpoints/instruct/model",
    )
    cost.add_argument("presets", metavar="PRESET", nargs="*", default=[], help="a name in the table (default: all)")
    cost.add_argument(
        "--model", default="7b", help="7b or 13b for LLaVA-1.5, or the folder of a LLaVA (default: %(default)s)"
    )
    cost.add_argument(
        "--text", metavar="N", type=parse_count, default=64, help="text tokens of the prompt (default: %(default)s)"
    )
    cost.set_defaults(verb=_cost)


def _cost(arguments: argparse.Namespace) -> None:
    from jobs import cost

    print(cost.format_costs(arguments.presets, arguments.model, arguments.text))


def _add_score(verbs: Any) -> None:
    score = verbs.add_parser(
        "score",
        help="score a file of answers to a benchmark or to your own questions",
        description="Score answers to a benchmark as its official scorer does, or answers to your own questions by "
        "--metric, and print the scores as one line of JSON. Answers are in the benchmark's official result format, in "
        "LLaVA's format, or JSON lines with id and response. An answer to an unknown question is an error; a missing "
        "answer counts as wrong. For instructions, answers are JSON lines with instruction_id, kwargs and response, "
        "and a line with strict and loose is printed for each.",
        epilog="example: redux score vqav2 --answers merge.jsonl "
        "--questions v2_OpenEnded_mscoco_val2014_questions.json v2_mscoco_val2014_annotations.json",
    )
    score.add_argument("task", metavar="TASK", nargs="?", help=f"{', '.join(BENCHMARK_TITLES)} or {INSTRUCTIONS_TASK}")
    score.add_argument(
        "--metric",
        choices=OWN_METRICS,
        help="in place of TASK: the metric of your own questions, see evaluate.tasks.NAME.metric",
    )
    score.add_argument(
        "--answers", metavar="FILE", required=True, help="path or URL; a folder for the official format of MME"
    )
    score.add_argument(
        "--questions", metavar="FILE", nargs="+", help="the official files of the benchmark, or your own file"
    )
    score.add_argument("--submission", metavar="OUT", type=Path, help="also write the result file for the VQAv2 server")
    score.set_defaults(verb=_score)


def _score(arguments: argparse.Namespace) -> None:
    from jobs import score

    score.score(arguments)


def _add_instructions(verbs: Any) -> None:
    instructions = verbs.add_parser(
        "instructions",
        help="write the prompts of the sixteen instructions to a file",
        description="Combine each of the sixteen instructions with questions about images, and write one prompt per "
        "line, so that every model answers the same prompts. A job names the file in "
        "evaluate.tasks.instructions.files.",
        epilog="example: redux instructions mm-vet.jsonl --out prompts.jsonl",
    )
    instructions.add_argument(
        "questions",
        metavar="FILE",
        nargs="?",
        help="lines with question_id, image and text as in LLaVA's files, and answer if known; or with id, image and "
        "question (default: questions about the test images of easy-VQA)",
    )
    instructions.add_argument("--out", metavar="FILE", type=Path, required=True, help="file of JSON lines")
    instructions.add_argument(
        "--per-task",
        metavar="N",
        type=parse_count,
        default=218,
        help="questions per instruction (default: %(default)s)",
    )
    instructions.add_argument("--seed", metavar="N", type=int, default=0, help="random seed (default: %(default)s)")
    kinds = instructions.add_mutually_exclusive_group()
    kinds.add_argument("--pairs", action="store_true", help="write prompts with two instructions each, in place of one")
    kinds.add_argument(
        "--held-out",
        action="store_true",
        help="write the twelve constraints that no training set teaches, in place of the sixteen instructions",
    )
    instructions.set_defaults(verb=_instructions)


def _instructions(arguments: argparse.Namespace) -> None:
    from jobs import instructions

    instructions.write_prompts(arguments)
