"""`redux ask`, `redux chat` and `redux serve`: ask a trained model in the terminal or over HTTP."""

import argparse
from typing import Any

from jobs.cli.arguments import build_options, parse_count, parse_fraction, parse_share

MODEL_HELP = "folder of a run; or folder, Hugging Face Hub id or URL of a LLaVA"


def add_parsers(verbs: Any) -> None:
    """Add the parsers of this group."""
    _add_ask(verbs)
    _add_chat(verbs)
    _add_serve(verbs)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that load a model with other settings of the method."""
    parser.add_argument(
        "--image-tokens",
        metavar="N|all",
        type=_parse_budget,
        help="number of image tokens after VMTC; all turns VMTC off (default: as trained)",
    )
    parser.add_argument(
        "--gamma",
        metavar="G",
        type=parse_fraction,
        help="largest share of image tokens that CMAI inhibits; 0 turns CMAI off (default: as trained)",
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
        help="0 takes the likeliest token; higher values make answers vary (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens whose probabilities add up to P (default: %(default)s)",
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
    ask.add_argument("images", metavar="IMAGE", nargs="*", default=[], help="paths or URLs of images")
    ask.add_argument("question", metavar="QUESTION", help="the question")
    _add_model_options(ask)
    _add_sampling_options(ask)
    ask.set_defaults(verb=_ask)


def _ask(arguments: argparse.Namespace) -> None:
    from jobs import chat

    print(chat.ask(build_options(chat.AskOptions, arguments)))


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
    chat.add_argument(
        "images", metavar="IMAGE", nargs="*", default=[], help="paths or URLs of images for the first question"
    )
    _add_model_options(chat)
    _add_sampling_options(chat)
    chat.set_defaults(verb=_chat)


def _chat(arguments: argparse.Namespace) -> None:
    from jobs import chat

    chat.run_chat(build_options(chat.ChatOptions, arguments))


def _add_serve(verbs: Any) -> None:
    serve = verbs.add_parser(
        "serve",
        help="serve a model over HTTP, with OpenAI's chat protocol and a demo page",
        description="Serve a model on Ray Serve until Ctrl-C: /v1/chat/completions and /v1/models in OpenAI's "
        "protocol, /health, and a demo page at /. If the variable REDUX_API_KEY is set, each request to /v1 needs "
        "this key as bearer token. The key is required if --host is not a loopback address. Usage counts image tokens "
        "before and after compression.",
        epilog="example: redux serve runs/quickstart --compare",
    )
    serve.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    serve.add_argument("--name", metavar="NAME", help="name of the model in requests (default: name of its folder)")
    serve.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    serve.add_argument(
        "--port", metavar="PORT", type=parse_count, default=8000, help="port to listen on (default: %(default)s)"
    )
    serve.add_argument(
        "--compare",
        action="store_true",
        help="also serve the same weights without VMTC and CMAI, as NAME-llava; the page then shows both answers",
    )
    _add_model_options(serve)
    resources = serve.add_argument_group("resources")
    resources.add_argument(
        "--replicas", metavar="N", type=parse_count, default=1, help="copies of the model (default: %(default)s)"
    )
    resources.add_argument(
        "--gpu-share",
        metavar="F",
        type=parse_share,
        default=1.0,
        help="share of a GPU for each copy, if there are GPUs (default: %(default)s)",
    )
    resources.add_argument(
        "--max-batch-size",
        metavar="N",
        type=parse_count,
        default=16,
        help="conversations that a copy answers at the same time (default: %(default)s)",
    )
    limits = serve.add_argument_group("limits of a request")
    for option, default, text in (
        ("--max-body", 20, "size in MB, with images"),
        ("--max-images", 8, "images of a conversation"),
        ("--max-pixels", 50, "megapixels of an image"),
        ("--max-new-tokens", 2048, "longest answer in tokens"),
        ("--max-requests", 128, "requests in progress at the same time"),
    ):
        limits.add_argument(option, metavar="N", type=parse_count, default=default, help=f"{text} (default: {default})")
    limits.add_argument(
        "--image-host",
        metavar="HOST",
        action="append",
        default=[],
        help="allow http(s) URLs of images on this host; may be repeated (default: only data URLs)",
    )
    serve.set_defaults(verb=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from jobs import serve

    serve.run_server(build_options(serve.ServeOptions, arguments))
