"""The chat template of a tokenizer as a conversation template, so that training learns it and asking uses it.

A chat template is a program in Jinja. Its text around the turns is found by rendering conversations of known words,
and checked by rendering others. One whose text cannot be expressed as a `redux.conversation.Template` is refused: it
rewrites turns, or writes earlier answers in another way than the last one.

Qwen3's template, asked with `enable_thinking` false, puts an empty thinking block before the last answer alone. Here
it stands before each answer, since a model learns all answers of a conversation at once.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date

from transformers import AddedToken, PreTrainedTokenizerBase

from redux.conversation import EOS_TOKEN, IMAGE_TOKEN, TEMPLATES, Template, encode_conversation
from redux.settings import TemplateName

ROLES = ("user", "assistant")
PROBE_WORDS = ("qzqa", "azaz", "qzqb", "bzbz")
"""Turns of a conversation whose rendering shows the text around them: no template contains these words."""

SYSTEM_WORD = "szsz"

CHECKED_TEXTS = (
    f"{IMAGE_TOKEN}\nWhat is\nthis?",
    "It is 4.\n\n- yes",
    "And {{ 'that' }}?",
    '<b>No</b>, "that" isn\'t.',
    "Why?",
    "Because.",
)

TODAY = date(2024, 7, 26)
"""Date for chat templates that write the date: a conversation must have the same tokens on each day."""

CALL_OF_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

THINKING_BLOCK = re.compile(r"<think>\s*</think>\s*")

MAX_SHOWN = 60


def find_template(name: TemplateName, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Find a conversation template by its name; "chat" is that of the tokenizer.

    Raises:
        ValueError: the tokenizer has no chat template, or one that cannot be expressed as a `Template`.
    """
    return derive_template(tokenizer) if name == "chat" else TEMPLATES[name]


def set_end_token(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Make the token that ends the template's answers the end token of the tokenizer, by which generation ends."""
    end = template.end.strip()
    if EOS_TOKEN in end or not end or end == tokenizer.eos_token:
        return
    token_id = tokenizer.convert_tokens_to_ids(end)
    token = tokenizer.added_tokens_decoder.get(token_id, AddedToken(end, normalized=False))
    # Decoding leaves out special tokens only.
    token.special = True
    tokenizer.add_special_tokens({"eos_token": token})


def derive_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Derive the conversation template of a tokenizer's chat template.

    Raises:
        ValueError: there is no chat template, or it cannot be expressed as a `Template`.
    """
    if not tokenizer.chat_template:
        raise _refuse("a tokenizer without a chat template")
    # The texts around the turns: those of the first and of a later turn must be equal.
    prefix, assistant = _render_around(tokenizer, PROBE_WORDS[:1])
    start, _, between, before_answer, tail = _render_around(tokenizer, PROBE_WORDS)
    human = between.removeprefix(tail)
    if not between.startswith(tail) or not human or start != prefix or not prefix.endswith(human):
        raise _refuse("a chat template that writes first and later turns differently")
    if not before_answer.startswith(assistant):
        raise _refuse(
            f"a chat template that asks with {_show(assistant)} and writes {_show(before_answer)} before an answer"
        )
    end = _find_end(tokenizer, tail)
    template = Template(
        system=prefix.removesuffix(human),
        human=human,
        assistant=assistant,
        end=end,
        answer=before_answer.removeprefix(assistant),
        after=tail.removeprefix(end),
        system_message=_find_system_message(tokenizer, human),
        strips=_strips(tokenizer),
        has_special_tokens=True,
    )
    # The check of renderings compares texts; this one compares token ids.
    _check_renderings(tokenizer, template)
    turns = [{"from": role, "value": text} for role, text in zip(("human", "gpt"), PROBE_WORDS[:2], strict=True)]
    try:
        encode_conversation(tokenizer, turns, template, 1)
    except ValueError:
        # The end token takes the text after it along, as Phi-3's.
        template = replace(template, end=template.end + template.after, after="")
        try:
            encode_conversation(tokenizer, turns, template, 1)
        except ValueError as error:
            raise _refuse(f"a chat template whose answers have no token of their own ({error})") from None
    return template


def _render(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], system: str | None = None) -> str:
    """Render a conversation by the chat template; one that ends with a question asks for the answer."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ROLES[number % 2], "content": text} for number, text in enumerate(texts)]
    undated = CALL_OF_DATE.sub(lambda call: json.dumps(TODAY.strftime(call[2])), tokenizer.get_chat_template())
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=undated,
                tokenize=False,
                add_generation_prompt=len(texts) % 2 == 1,
                enable_thinking=False,
            )
        )
    except Exception as error:  # A chat template is a program, which may raise any error
        raise _refuse(f"a chat template that fails ({' '.join(str(error).split())[:200]})") from error


def _render_around(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], system: str | None = None) -> list[str]:
    """Render a conversation and return the texts around its words."""
    text, around = _render(tokenizer, words, system), []
    for word in [*([system] if system else []), *words]:
        before, separator, text = text.partition(word)
        if not separator or word in text:
            raise _refuse("a chat template that leaves out or repeats a turn")
        around.append(before)
    return [*around, text]


def _strips(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a chat template removes blanks around all turns. No template itself writes a tab there."""
    text = _render(tokenizer, [f"\t{word}\t" for word in PROBE_WORDS])
    return all(f"\t{word}" not in text and f"{word}\t" not in text for word in PROBE_WORDS)


def _find_end(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """Return the text after an answer up to its first special token, which ends the answer."""
    tokens = {str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.added_tokens_decoder.values())}
    start = len(tail) - len(tail.lstrip())
    # Of tokens that begin alike, the longest.
    length = max((len(token) for token in tokens if token.strip() and tail.startswith(token, start)), default=0)
    if not length:
        raise _refuse(f"a chat template with {_show(tail)} after an answer, which does not begin with a special token")
    return tail[: start + length]


def _find_system_message(tokenizer: PreTrainedTokenizerBase, human: str) -> tuple[str, str] | None:
    """Find the text around a system message; None if the chat template does not write one before the first turn."""
    try:
        before, after, _ = _render_around(tokenizer, PROBE_WORDS[:1], SYSTEM_WORD)
        template = (before, after.removesuffix(human)) if after.endswith(human) else None
        _render_around(tokenizer, PROBE_WORDS, SYSTEM_WORD)
    except ValueError:
        return None
    return template


def _check_renderings(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Check conversations of one and three turns, with an image, with and without a system message and last answer."""
    for system in (None, SYSTEM_WORD) if template.system_message else (None,):
        chosen = template.replace_system(system) if system else template
        for count in (1, 2, 5, 6):
            turns = [
                {"from": ("human", "gpt")[number % 2], "value": text}
                for number, text in enumerate(CHECKED_TEXTS[:count])
            ]
            ours = "".join(text for text, _ in chosen.split_spans(turns))
            theirs = _render(tokenizer, CHECKED_TEXTS[:count], system)
            if THINKING_BLOCK.sub("", ours) != THINKING_BLOCK.sub("", theirs):
                raise _refuse(f"a chat template that rewrites turns: {_show(theirs)}")


def _refuse(problem: str) -> ValueError:
    """Build the error for a chat template."""
    return ValueError(
        f"template: got chat for {problem}, allowed: vicuna_v1, vicuna_bare, plain, or a chat template with the same "
        "text around all turns"
    )


def _show(text: str) -> str:
    """Shorten a text for an error."""
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")
