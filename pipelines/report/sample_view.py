"""View of the samples of a stage before training, as a page (`redux look`) or as text for a terminal.

A sample is shown as its worker gets it: `pipelines.data.preview` has encoded it with the code of training. Here its
tokens only get their texts, and are divided into spans: context, image, learned, and what truncation cuts off.
"""

import base64
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from pipelines.data.ingest import Reader, TextRow, check_record, get_caption
from pipelines.data.preview import PreviewSample
from pipelines.data.shard_index import StoredSample
from pipelines.data.text_tokenizer import TextTokenizer
from pipelines.report import page
from redux.conversation import EOS_TOKEN, IGNORE_INDEX, IMAGE_TOKEN, Template, label_conversation
from redux.image import load_pixels
from redux.settings import ImageAspectRatio

SpanKind = Literal["context", "image", "learned", "caption"]

KINDS = {
    "learned": "token that is learned",
    "context": "token that is read, not learned",
    "image": "image tokens",
    "caption": "caption that is compared with the image",
    "cut": "cut off by max_length",
    "unknown": "text that the tokenizer does not know",
}
"""Kinds of tokens, with explanations for the legend."""

MAX_CUT_TOKENS = 200
"""Tokens that are shown of what truncation cuts off."""

MAX_LINE_CHARACTERS = 600
"""Characters of a span that are shown in a terminal."""

MAX_RECORD_CHARACTERS = 4000
"""Characters of a stored record that are shown."""

NEWLINE = "⏎"
CONTINUED = "·"
"""Sign for a token that has no first byte of a character, such as the later ones of an emoji."""

TEMPLATE_TURNS = ({"from": "human", "value": f"{IMAGE_TOKEN}\n[question]"}, {"from": "gpt", "value": "[answer]"})
"""Conversation that shows the text of a template around its turns."""


class ShownToken(NamedTuple):
    """A token with its text.

    Args:
        text: its characters; blanks are kept.
        id: number in the vocabulary; None if there is no tokenizer.
        position: number in the sequence; None if there is no tokenizer.
        is_special: the text is the name of a special token.
        is_unknown: the vocabulary does not have the characters, so the model reads the token for unknown text.
    """

    text: str
    id: int | None = None
    position: int | None = None
    is_special: bool = False
    is_unknown: bool = False


class TokenSpan(NamedTuple):
    """Neighbouring tokens of one kind.

    Args:
        kind: what training does with them.
        is_cut: truncation cuts them off.
        tokens: the tokens; one for all tokens of an image.
        first: position of the first token; None if there is no tokenizer.
        length: number of tokens, also of those that are not shown.
    """

    kind: SpanKind
    is_cut: bool
    tokens: tuple[ShownToken, ...]
    first: int | None
    length: int

    @property
    def positions(self) -> str:
        """First and last position, as text."""
        if self.first is None:
            return ""
        return str(self.first) if self.length == 1 else f"{self.first}–{self.first + self.length - 1}"

    @property
    def title(self) -> str:
        """Name of the kind on the page."""
        return f"cut off, {self.kind}" if self.is_cut else self.kind

    @property
    def hidden(self) -> int:
        """Number of tokens that are not shown."""
        return 0 if self.kind == "image" else self.length - len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """A sample as it is shown.

    Args:
        name: id of its record, or its key; "" if it cannot be read.
        position: when training uses it; "" without a stage.
        index: index of the sample in its set.
        problem: reason why training replaces it, or "".
        spans: its tokens.
        notes: what preparation has changed.
        record: the stored record, as JSON.
        image: image as the tower gets it; None for text only.
        picture: its kept and merged patches; None if they are not known.
        num_tokens: tokens that a worker gets; None if there is no tokenizer, or the sample is unusable.
    """

    name: str
    position: str
    index: int
    problem: str
    spans: tuple[TokenSpan, ...] = ()
    notes: tuple[str, ...] = ()
    record: str = ""
    image: Image.Image | None = None
    picture: Image.Image | None = None
    num_tokens: int | None = None

    @property
    def title(self) -> str:
        """Name on the page."""
        return f"{self.name}, row {self.index}" if self.name else f"row {self.index}"

    def count(self, *kinds: SpanKind, is_cut: bool = False) -> int:
        """Count the tokens of kinds; of all without one."""
        return sum(span.length for span in self.spans if span.is_cut == is_cut and (not kinds or span.kind in kinds))

    @property
    def summary(self) -> str:
        """Numbers of tokens in one line."""
        if self.num_tokens is None:
            return ""
        # 0 learned tokens are a fault, so they are always counted, except for captions, which have no labels.
        always = set() if any(span.kind == "caption" for span in self.spans) else {"learned"}
        counts = {
            "image": self.count("image"),
            "learned": self.count("learned"),
            "unknown": sum(token.is_unknown for span in self.spans if not span.is_cut for token in span.tokens),
            "cut off": self.count(is_cut=True),
        }
        parts = [f"{number:,} {name}" for name, number in counts.items() if number or name in always]
        return f"{self.num_tokens:,} tokens" + (f": {', '.join(parts)}" if parts else "")


@dataclass(frozen=True, kw_only=True)
class SetView:
    """Samples of a set in a stage.

    Args:
        name: name of the set.
        facts: what holds for the whole set, in short sentences.
        samples: the samples.
    """

    name: str
    facts: tuple[str, ...]
    samples: tuple[SampleView, ...]

    @property
    def summary(self) -> str:
        """Lengths and shares of the shown samples in one line; "" if there is no tokenizer."""
        lengths = [sample.num_tokens for sample in self.samples if sample.num_tokens]
        if not lengths:
            return ""
        has_labels = any(span.kind != "caption" for sample in self.samples for span in sample.spans)
        learned = sum(sample.count("learned") for sample in self.samples if not sample.problem)
        cut = sum(bool(sample.count(is_cut=True)) for sample in self.samples)
        unusable = sum(bool(sample.problem) for sample in self.samples)
        parts = [f"{min(lengths):,} to {max(lengths):,} tokens" if len(set(lengths)) > 1 else f"{lengths[0]:,} tokens"]
        parts += [f"{page.format_percent(learned / sum(lengths))} of them learned"] if has_labels else []
        parts += [f"{cut} cut off"] if cut else []
        parts += [f"{unusable} unusable"] if unusable else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class StageView:
    """Samples of the sets of a stage.

    Args:
        name: name of the stage.
        facts: settings that decide what a sample becomes, as names and values.
        template: text of the template around a conversation; empty if it has none.
        sets: the sets.
    """

    name: str
    facts: dict[str, str]
    template: tuple[TokenSpan, ...]
    sets: tuple[SetView, ...]


def view_sample(
    sample: PreviewSample,
    reader: Reader,
    template: Template | None,
    image_tokens: int,
    max_length: int | None,
    picture: Image.Image | None,
) -> SampleView:
    """Make the view of a sample.

    Args:
        sample: the sample as a worker gets it.
        reader: reader of the stage.
        template: conversation template; None in a contrastive stage.
        image_tokens: number of tokens that stand for an image.
        max_length: number of tokens to which a sample is truncated; None for no limit.
        picture: its kept and merged patches.
    """
    spans: tuple[TokenSpan, ...] = ()
    # A sample that cannot be prepared has no text to show.
    if sample.prepared is not None:
        turns = sample.prepared.record["conversations"]
        try:
            if template is None:
                spans = _view_caption(reader, sample.prepared, sample.encoded)
            else:
                spans = _view_conversation(reader, turns, sample.encoded, template, image_tokens, max_length)
        except ValueError:  # The sample has this problem; its text is shown without tokens
            spans = view_pieces(template, turns, reader.get_tokenizer().eos_token) if template else ()
    # People count steps and samples from 1.
    stored = sample.stored
    batch_size = reader.order.global_batch_size
    step, index_in_batch = sample.stream_position.batch + 1, sample.stream_position.position % batch_size
    return SampleView(
        name=stored.id if stored else "",
        position=f"step {step:,}, sample {index_in_batch + 1:,} of {batch_size:,}",
        index=sample.stream_position.sample,
        problem=sample.problem,
        spans=spans,
        notes=_list_notes(sample, reader),
        record=format_record(stored.record) if stored else "",
        image=None if sample.image is None else Image.fromarray(np.ascontiguousarray(sample.image)),
        picture=picture,
        num_tokens=len(sample.encoded["input_ids"]) if sample.encoded else None,
    )


def view_stored(
    index: int, stored: StoredSample | str, template: Template, size: int, image_aspect_ratio: ImageAspectRatio
) -> SampleView:
    """Make the view of a stored sample without a tokenizer: its text as the template writes it, and its image.

    Args:
        index: index of the sample in its set.
        stored: the sample, or the reason why it cannot be read.
        template: conversation template.
        size: side of the image in pixels.
        image_aspect_ratio: "pad" or "crop".
    """
    if isinstance(stored, str):
        return SampleView(name="", position="", index=index, problem=stored)
    problem, image = "", None
    spans: tuple[TokenSpan, ...] = ()
    notes: tuple[str, ...] = ()
    # An unusable sample is shown with its problem.
    try:
        check_record(stored)
        spans = view_pieces(template, stored.record["conversations"])
        if stored.image:
            image = Image.fromarray(load_pixels(stored.image, size, image_aspect_ratio).transpose(1, 2, 0))
            notes = (_describe_resizing(stored.image, image),)
    except ValueError as error:
        problem = str(error)
    return SampleView(
        name=stored.id,
        position="",
        index=index,
        problem=problem,
        spans=spans,
        notes=notes,
        record=format_record(stored.record),
        image=image,
    )


def format_record(record: dict) -> str:
    """Format a stored record as JSON, cut to a readable length."""
    return page.cut_text(json.dumps(record, indent=2, ensure_ascii=False), MAX_RECORD_CHARACTERS)


def view_template(template: Template, eos: str | None = None) -> tuple[TokenSpan, ...]:
    """Show the text of a template around one question and its answer; `eos` is the end token of the tokenizer."""
    return view_pieces(template, TEMPLATE_TURNS, eos)


def view_pieces(template: Template, turns: Sequence[dict], eos: str | None = None) -> tuple[TokenSpan, ...]:
    """Divide a conversation into spans by its text alone."""
    spans: list[TokenSpan] = []
    for text, is_learned in template.split_spans(turns, eos or EOS_TOKEN):
        for number, part in enumerate(text.split(IMAGE_TOKEN)):
            # Each cut between two parts is a tag.
            if number:
                spans.append(TokenSpan("image", False, (ShownToken(IMAGE_TOKEN, is_special=True),), None, 1))
            kind: SpanKind = "learned" if is_learned else "context"
            # Neighbouring pieces of one kind, such as the system prompt and a question, are one span.
            if part and spans and spans[-1].kind == kind:
                spans[-1] = spans[-1]._replace(tokens=(ShownToken(spans[-1].tokens[0].text + part),))
            elif part:
                spans.append(TokenSpan(kind, False, (ShownToken(part),), None, 1))
    return tuple(spans)


def _view_conversation(
    reader: Reader,
    turns: Sequence[dict],
    encoded: TextRow | None,
    template: Template,
    image_tokens: int,
    max_length: int | None,
) -> tuple[TokenSpan, ...]:
    """Divide a conversation into spans, also that of an unusable sample, which is not encoded."""
    tokenizer: Any = reader.get_tokenizer()
    text, tokens = label_conversation(tokenizer, turns, template, image_tokens)
    labels = tokens.labels
    num_kept = min(len(tokens.ids), max_length or len(tokens.ids))
    if encoded is not None:
        # Ids and labels are those that a worker gets; only what is cut off comes from the whole conversation.
        num_kept = len(encoded["input_ids"])
        if (encoded["input_ids"] != tokens.ids[:num_kept]).any():
            raise RuntimeError("a sample has other tokens than the beginning of its conversation")
        labels = np.concatenate([encoded["labels"], tokens.labels[num_kept:]])
    # The image of an answer is not a prediction, so it is told apart by its id.
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    kinds = [_find_kind(token, label, image_id) for token, label in zip(tokens.ids, labels, strict=True)]
    return join_spans(name_tokens(tokenizer, text, tokens.ids, tokens.start, tokens.end), kinds, num_kept)


def _find_kind(token: int, label: int, image_id: int) -> SpanKind:
    """Find the kind of a token of a conversation."""
    if token == image_id:
        return "image"
    return "context" if label == IGNORE_INDEX else "learned"


def _view_caption(reader: Reader, sample: StoredSample, encoded: TextRow | None) -> tuple[TokenSpan, ...]:
    """Divide the caption of a contrastive stage into spans."""
    tokenizer: Any = reader.get_tokenizer()
    text = get_caption(sample)
    tokens = tokenizer(text, return_offsets_mapping=True)
    start, end = np.array(tokens["offset_mapping"], np.int64).reshape(-1, 2).T
    ids = np.array(tokens["input_ids"], np.int64)
    num_kept = len(ids)
    if encoded is not None:
        # The encoder puts the end token where it cuts the caption; it has no characters.
        num_kept = len(encoded["input_ids"])
        ids = np.concatenate([encoded["input_ids"], ids[num_kept - 1 :]])
        start, end = (np.insert(column, num_kept - 1, len(text)) for column in (start, end))
    return join_spans(name_tokens(tokenizer, text, ids, start, end), ["caption"] * len(ids), num_kept)


def name_tokens(
    tokenizer: Any,
    text: str,
    ids: Int[np.ndarray, " tokens"],
    start: Int[np.ndarray, " tokens"],
    end: Int[np.ndarray, " tokens"],
) -> list[ShownToken]:
    """Give each token its characters start:end of the text; a token without any, its name in the vocabulary."""
    # Readers have a tokenizer without transformers, with other names for the same.
    if isinstance(tokenizer, TextTokenizer):
        find_name = tokenizer.backend.id_to_token
        added = tokenizer.backend.get_added_tokens_decoder()
        special_ids = {number for number, token in added.items() if token.special}
    else:
        find_name, special_ids = tokenizer.convert_ids_to_tokens, set(tokenizer.all_special_ids)
    result = list[ShownToken]()
    shown_end = 0
    for position, (token, token_start, token_end) in enumerate(
        zip(ids.tolist(), start.tolist(), end.tolist(), strict=True)
    ):
        # Blanks before a token that the tokenizer drops are shown with the token.
        gap = text[shown_end:token_start]
        characters = (gap if gap.isspace() else "") + text[token_start:token_end]
        if text[token_start:token_end] == IMAGE_TOKEN:
            shown_token = ShownToken(IMAGE_TOKEN, token, position, True)
        elif token_start == token_end:
            shown_token = ShownToken(find_name(token) or f"<{token}>", token, position, True)
        elif token_end <= shown_end:
            # Several tokens of one character, such as the bytes of an emoji, have the same characters.
            shown_token = ShownToken(CONTINUED, token, position, True)
        else:
            # The token for unknown text is special, too, but stands for characters.
            is_unknown = token == tokenizer.unk_token_id
            is_special = token in special_ids and not is_unknown
            shown_token = ShownToken(characters, token, position, is_special, is_unknown)
        shown_end = max(shown_end, token_end)
        result.append(shown_token)
    return result


def join_spans(tokens: Sequence[ShownToken], kinds: Sequence[SpanKind], num_kept: int) -> tuple[TokenSpan, ...]:
    """Join neighbouring tokens of one kind.

    Args:
        tokens: all tokens.
        kinds: kind of each of them.
        num_kept: number of tokens before the cut.
    """
    keys = [(kind, position >= num_kept) for position, kind in enumerate(kinds)]
    spans = []
    for (kind, is_cut), group in itertools.groupby(range(len(tokens)), keys.__getitem__):
        positions = list(group)
        limit = len(positions)
        # All tokens of an image are alike, and what is cut off may be long.
        if kind == "image":
            limit = 1
        elif is_cut:
            limit = MAX_CUT_TOKENS
        shown = tuple(tokens[position] for position in positions[:limit])
        spans.append(TokenSpan(kind, is_cut, shown, positions[0], len(positions)))
    return tuple(spans)


def _list_notes(sample: PreviewSample, reader: Reader) -> tuple[str, ...]:
    """List what preparation has changed."""
    notes = []
    if sample.stored and sample.image is not None:
        notes.append(_describe_resizing(sample.stored.image, Image.fromarray(np.ascontiguousarray(sample.image))))
        if reader.random_flip and _is_mirrored(sample.stored, sample.image, reader):
            notes.append("mirrored")
    # Rounds that were left out are in the stored record only.
    if sample.stored and sample.prepared:
        versions = (sample.stored, sample.prepared)
        num_stored, num_drawn = (len(version.record["conversations"]) // 2 for version in versions)
        if reader.max_rounds:
            notes.append(f"{num_drawn} of {num_stored} rounds drawn")
    return tuple(notes)


def _is_mirrored(stored: StoredSample, image: UInt8[np.ndarray, "height width 3"], reader: Reader) -> bool:
    """Return True if the reader has mirrored an image, as another reader that never does shows."""
    _, unflipped = replace(reader, random_flip=False, max_rounds=None).prepare_sample(stored, 0)
    return unflipped is not None and not np.array_equal(image, unflipped)


def _describe_resizing(stored: bytes, image: Image.Image) -> str:
    """Describe the sizes of an image before and after."""
    with Image.open(io.BytesIO(stored)) as decoder:
        kind, (width, height) = decoder.format, decoder.size
    text = f"{kind} of {width} × {height} pixels"
    return text if (width, height) == image.size else f"{text}, as {image.width} × {image.height}"


# --- as text ---------------------------------------------------------------------------------------------------------

ANSI = {"context": "", "image": "\x1b[33m", "learned": "\x1b[1;32m", "caption": "", "cut": "\x1b[9;31m"}
ANSI_END = "\x1b[0m"


def format_stages(stages: Sequence[StageView], draw: Callable[[Image.Image], str] | None = None) -> str:
    """Format stages for a terminal.

    Args:
        stages: the stages.
        draw: formats a picture with colours; None writes text without colours.
    """
    return "\n".join(itertools.chain.from_iterable(_format_stage(stage, draw) for stage in stages))


def _format_stage(stage: StageView, draw: Callable[[Image.Image], str] | None) -> Iterator[str]:
    # Settings first, then the template, then set by set.
    yield f"=== {stage.name} ==="
    width = max(map(len, stage.facts), default=0)
    yield from (f"{name:{width}}  {value}" for name, value in stage.facts.items())
    for span in stage.template:
        yield from _format_span(span, draw is not None)
    for shown_set in stage.sets:
        yield f"\n--- {shown_set.name}: {'; '.join(filter(None, (*shown_set.facts, shown_set.summary)))} ---"
        for number, sample in enumerate(shown_set.samples, start=1):
            title = ", ".join(filter(None, (sample.title, sample.position, *sample.notes)))
            yield f"\n[{number}] {_escape_controls(title)}"
            if sample.problem:
                yield f"  unusable: {_escape_controls(sample.problem)}"
            # The picture of the patches shows the image as well.
            if draw and (picture := sample.picture or sample.image):
                yield draw(picture)
            if sample.summary:
                yield f"  {sample.summary}"
            for span in sample.spans:
                yield from _format_span(span, draw is not None)
    yield ""


def _format_span(span: TokenSpan, has_colours: bool) -> Iterator[str]:
    """Format a span as lines: positions, kind and text."""
    text = "".join(f"[unknown:{token.text}]" if token.is_unknown else token.text for token in span.tokens)
    text = page.cut_text(_escape_controls(text), MAX_LINE_CHARACTERS)
    if span.kind == "image" and span.first is not None:
        text = f"{IMAGE_TOKEN} x {span.length}"
    if span.hidden:
        text += f" … and {span.hidden} more"
    style = ANSI["cut" if span.is_cut else span.kind] if has_colours else ""
    # A line of the text is a line of the terminal, with a sign for the line feed, which is a token.
    lines = text.split("\n")
    lines = [f"{line}{NEWLINE}" for line in lines[:-1]] + lines[-1:]
    head = f"  {span.positions:>9}  {span.title:8}  "
    for number, line in enumerate(filter(None, lines)):
        yield (" " * len(head) if number else head) + (f"{style}{line}{ANSI_END}" if style else line)


def _escape_controls(text: str) -> str:
    """Escape characters that a terminal would obey instead of showing them; line feeds and blanks stay."""
    return "".join(map(_escape_control, text))


def _escape_control(character: str) -> str:
    # U+200D joins the characters of an emoji.
    if character.isprintable() or character in "\n\t\u200d":
        return character
    return character.encode("unicode_escape", "replace").decode()


# --- as a page -------------------------------------------------------------------------------------------------------


def encode_exactly(image: Image.Image) -> str:
    """Encode an image without loss as a data URI, so that the page shows the pixels of the tower."""
    file = io.BytesIO()
    image.save(file, "webp", lossless=True, method=2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def render_page(title: str, lead: str, stages: Sequence[StageView]) -> str:
    """Render the page: one file without scripts that needs no network."""
    # The legend explains what occurs in this page.
    samples = [sample for stage in stages for set_view in stage.sets for sample in set_view.samples]
    used_kinds = {"cut" if span.is_cut else span.kind for sample in samples for span in sample.spans}
    if any(token.is_unknown for sample in samples for span in sample.spans for token in span.tokens):
        used_kinds.add("unknown")
    return page.render(
        "look.html.j2",
        title=title,
        lead=lead,
        stages=stages,
        kinds=[(kind, text) for kind, text in KINDS.items() if kind in used_kinds],
        has_pictures=any(sample.picture for sample in samples),
        encode=page.encode_image,
        encode_exact=encode_exactly,
        newline=NEWLINE,
    )
