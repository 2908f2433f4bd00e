"""`redux ask` and `redux chat`: ask a trained model in the terminal."""

import argparse
from typing import Any

from jobs.cli.arguments import parse_count, parse_fraction

MODEL_HELP = "folder of a run; or folder, Hugging Face Hub id or URL of a LLaVA"


def add_parsers(verbs: Any) -> None:
    """Add the parsers of this group."""
    _add_ask(verbs)
    _add_chat(verbs)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that load a model with other settings of the method."""
    parser.add_argument(
        "--image-tokens",
        metavar="N",
        type=_parse_budget,
        help="image tokens that VMTC leaves; all turns it off (default: as trained)",
    )
    parser.add_argument(
        "--gamma",
        metavar="G",
        type=parse_fraction,
        help="largest share of image tokens that CMAI inhibits; 0 turns it off (default: as trained)",
    )
    parser.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def _parse_budget(text: str) -> int | str:
    return text if text == "all" else parse_count(text)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=parse_count,
        default=512,
        help="longest answer in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0 takes the likeliest token, more makes answers vary (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw among the likeliest tokens with this probability together (default: %(default)s)",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="seed of the draws (default: a new one each time)")


def _add_ask(verbs: Any) -> None:
    ask = verbs.add_parser(
        "ask",
        help="ask a model one question about an image",
        description="Print the answer of a model to one question, with the template and image preparation of its "
        "training. The last argument is the question, those before it are images.",
        epilog='example: redux ask runs/quickstart photo.png "what shape is in the image?"',
    )
    ask.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    ask.add_argument("images", metavar="IMAGE", nargs="*", help="image files, paths or URLs")
    ask.add_argument("question", metavar="QUESTION", help="the question")
    add_model_options(ask)
    _add_sampling_options(ask)
    ask.set_defaults(verb=_ask)


def _ask(arguments: argparse.Namespace) -> None:
    from jobs import chat

    print(chat.ask(arguments))


def _add_chat(verbs: Any) -> None:
    chat = verbs.add_parser(
        "chat",
        help="talk with a model about images",
        description="Talk with a model in the terminal. Answers appear word by word; Ctrl-C ends an answer, Ctrl-D the "
        "conversation. Commands: /image FILE shows an image with the next question; /tokens [FILE] draws the image "
        "tokens that the model keeps and merges, in the terminal or to a PNG file; /reset begins again; /help; /quit.",
        epilog="example: redux chat runs/quickstart photo.png",
    )
    chat.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    chat.add_argument("images", metavar="IMAGE", nargs="*", help="images for the first question, paths or URLs")
    add_model_options(chat)
    _add_sampling_options(chat)
    chat.set_defaults(verb=_chat)


def _chat(arguments: argparse.Namespace) -> None:
    from jobs import chat

    chat.run_chat(arguments)
