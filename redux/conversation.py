"""Convert LLaVA conversations to token ids and labels.

The whole conversation is tokenized once, and labels follow from the character spans of the assistant's text. LLaVA
tokenizes pieces and adds up their lengths; if a tokenizer merges across two pieces, the lengths disagree and the sample
is silently masked. Here a token across the end of a span is an error that names the token.

A conversation is a list of turns {"from": "human" | "gpt", "value": text} in which `<image>` stands for the image. As
in LLaVA's trainer, `<image>` moves to the front of its turn, on a line of its own. A first turn {"from": "system"}
replaces the system message of the template.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    # Readers of conversations do without transformers.
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
EOS_TOKEN = "</s>"
"""Vicuna's end token. In a template it stands for the end token of the tokenizer in use."""

IGNORE_INDEX = -100
"""Label of tokens that are not predicted; torch's cross-entropy ignores it."""

CLIP_MAX_LENGTH = 77
"""Limit of tokens in a caption for CLIP's text tower."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """Text around the turns of a conversation. The model learns `answer`, the assistant's text and `end`.

    Args:
        system: text at the start of the conversation.
        human: text before a human turn.
        assistant: text before a turn of the assistant.
        end: text after a turn of the assistant; EOS_TOKEN stands for the tokenizer's end token.
        answer: learned text before the assistant's text.
        after: text after `end`.
        system_message: text before and after a system message, which replaces `system`; None if there can be none.
        strips: blanks around the text of a turn are removed.
        has_special_tokens: the text begins as the model's input does, so that the tokenizer adds no token.
    """

    system: str
    human: str
    assistant: str
    end: str
    answer: str = ""
    after: str = ""
    system_message: tuple[str, str] | None = ("", " ")
    strips: bool = False
    has_special_tokens: bool = False

    def split_spans(self, turns: Sequence[dict], eos: str = EOS_TOKEN) -> Iterator[tuple[str, bool]]:
        """Split a conversation into pieces (text, is_learned), whose concatenation is the conversation.

        Args:
            turns: turns {"from", "value"}.
            eos: end token of the tokenizer.

        Raises:
            ValueError: roles do not alternate human, gpt, human, ..., or the template takes no system message.
        """
        end = self.end.replace(EOS_TOKEN, eos)
        system, turns = split_system(turns)
        # LLaVA's stage 1 (an empty `human`) keeps nothing but the image and its caption.
        template = self.replace_system(system) if system is not None and self.human else self
        yield template.system, False
        for number, turn in enumerate(turns):
            role = ("human", "gpt")[number % 2]
            if turn["from"] != role:
                raise ValueError(f"turn {number + 1}: got role {turn['from']!r}, allowed: {role!r}")
            text = move_image_to_front(turn["value"])
            if self.strips:
                text = text.strip()
            if role == "human":
                yield self.human + self.human_text(text), False
                yield self.assistant, False
            else:
                yield f"{self.answer}{text}{end}", True
                yield self.after, False

    def replace_system(self, message: str) -> "Template":
        """Return the template with a system message in place of its own; ValueError if there can be none."""
        if self.system_message is None:
            raise ValueError(
                "messages: got a system message, allowed: user and assistant, because the chat template has none"
            )
        before, after = self.system_message
        return replace(self, system=f"{before}{message.strip() if self.strips else message}{after}")

    def human_text(self, text: str) -> str:
        """Return the text of a human turn; LLaVA's stage 1 (an empty `human`) keeps only its image."""
        if self.human:
            return text
        return IMAGE_TOKEN if IMAGE_TOKEN in text else ""


def split_system(turns: Sequence[dict]) -> tuple[str | None, Sequence[dict]]:
    """Split the system message, a first turn {"from": "system"}, from the other turns. None if there is none."""
    if turns and turns[0].get("from") == "system":
        return turns[0]["value"], turns[1:]
    return None, turns


def move_image_to_front(text: str) -> str:
    r"""Move `<image>` to the front of its turn, as LLaVA's trainer does before anything else.

    The result has it once, and the rest of the turn on the next line, stripped. A turn without it stays unchanged.

    >>> move_image_to_front("What is this? <image>\n")
    '<image>\nWhat is this?'
    >>> move_image_to_front(" no image ")
    ' no image '
    """
    if IMAGE_TOKEN not in text:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
TEMPLATES: Mapping[str, Template] = {
    "plain": Template(system="", human="", assistant="", end="\n"),
    "vicuna_v1": Template(system=VICUNA_SYSTEM, human="USER: ", assistant=" ASSISTANT:", end=EOS_TOKEN, answer=" "),
    "vicuna_bare": Template(system="", human="USER: ", assistant=" ASSISTANT:", end=EOS_TOKEN, answer=" "),
}
"""LLaVA-1.5's two templates (haotian-liu/LLaVA, conversation.py), and vicuna_v1 without its system prompt."""


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[dict],
    template: Template,
    image_tokens: int,
    max_length: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a conversation as token ids and labels.

    A conversation that ends with a human turn ends with the text before the assistant's answer.

    Args:
        tokenizer: tokenizer with the token `<image>`.
        turns: turns {"from", "value"}.
        template: text around the turns.
        image_tokens: number of tokens that replace each `<image>`.
        max_length: limit of tokens, image tokens included, where LLaVA cuts; None keeps all.

    Returns:
        (input_ids, labels), each (length,) int64. Labels are IGNORE_INDEX except on the assistant's text.

    Raises:
        ValueError: the cut would go through an image, or leave no text of the assistant.
    """
    _, tokens = label_conversation(tokenizer, turns, template, image_tokens)
    return _cut(tokenizer, tokens, max_length)


def label_conversation(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[dict], template: Template, image_tokens: int
) -> "tuple[str, LabelledTokens]":
    """Encode a conversation without a limit of tokens, and return its text as well; see `encode_conversation`."""
    pieces = list(template.split_spans(turns, tokenizer.eos_token or EOS_TOKEN))
    tokens = label_pieces(tokenizer, pieces, image_tokens, not template.has_special_tokens)
    return "".join(text for text, _ in pieces), tokens


def encode_pieces(
    tokenizer: "PreTrainedTokenizerBase",
    pieces: Sequence[tuple[str, bool]],
    image_tokens: int,
    max_length: int | None = None,
    add_special_tokens: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode the pieces (text, is_learned) of a conversation.

    Args:
        tokenizer, image_tokens, max_length: as for `encode_conversation`, and so are result and errors.
        pieces: the pieces.
        add_special_tokens: the tokenizer puts its begin token before the text.
    """
    return _cut(tokenizer, label_pieces(tokenizer, pieces, image_tokens, add_special_tokens), max_length)


class LabelledTokens(NamedTuple):
    """Tokens of a conversation before it is cut, each of shape (length,).

    Args:
        ids: token ids.
        labels: labels, IGNORE_INDEX except on the assistant's text.
        start, end: characters start:end of each token in the joined pieces. All tokens of an image have those of its
            tag. A token that the tokenizer adds has none.
    """

    ids: np.ndarray
    labels: np.ndarray
    start: np.ndarray
    end: np.ndarray


def label_pieces(
    tokenizer: "PreTrainedTokenizerBase",
    pieces: Sequence[tuple[str, bool]],
    image_tokens: int,
    add_special_tokens: bool = True,
) -> LabelledTokens:
    """Encode the pieces (text, is_learned) of a conversation, without a limit of tokens; see `encode_pieces`."""
    text = "".join(piece for piece, _ in pieces)
    ids, start, end = _tokenize(tokenizer, text, add_special_tokens)
    # learned_before[c]: learned characters before character c; a token has the difference of two of them.
    # By character, since tokens do not respect the borders of pieces.
    is_learned = np.repeat([is_learned for _, is_learned in pieces], [len(piece) for piece, _ in pieces])
    learned_before = np.zeros(len(text) + 1, np.int64)
    np.cumsum(is_learned, out=learned_before[1:])
    learned = learned_before[end] - learned_before[start]
    crossing = np.flatnonzero((learned > 0) & (learned < end - start))
    if crossing.size:
        characters = slice(start[crossing[0]], end[crossing[0]])
        raise ValueError(
            f"token {text[characters]!r} at character {characters.start} is partly the assistant's, partly not"
        )
    # An image of an assistant's turn is input, not a prediction.
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    labels = np.where((learned > 0) & (ids != image_id), ids, IGNORE_INDEX)
    # The processor of transformers repeats the token in the same way.
    repeats = np.where(ids == image_id, image_tokens, 1)
    return LabelledTokens(*(column.repeat(repeats) for column in (ids, labels, start, end)))


def _cut(
    tokenizer: "PreTrainedTokenizerBase", tokens: LabelledTokens, max_length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a conversation off; arguments, result and errors are those of `encode_conversation`."""
    ids, labels = tokens.ids, tokens.labels
    # Images have their full length here.
    if max_length is None or len(ids) <= max_length:
        return ids, labels
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if (ids[max_length:] == image_id).any():
        raise ValueError(f"{len(ids)} tokens, cut off after {max_length} within or before the image")
    if (labels[:max_length] == IGNORE_INDEX).all():  # A batch of such samples would have no loss
        raise ValueError(f"{len(ids)} tokens, cut off after {max_length} before any answer")
    return ids[:max_length], labels[:max_length]


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize a text with images.

    Text between images is tokenized piece by piece, as in LLaVA's tokenizer_image_token: SentencePiece puts a blank
    before each text, and LLaVA's models were trained with this blank after each image.

    Returns:
        (ids, start, end): token ids, and the characters start:end of each token.
    """
    parts = text.split(IMAGE_TOKEN)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids: list[int] = []
    spans: list[np.ndarray] = []
    offset = 0  # First character of the part
    for number, part in enumerate(parts):
        # The begin token belongs to the first part only.
        encoded = tokenizer(part, add_special_tokens=add_special_tokens and number == 0, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        spans.append(np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2) + offset)
        offset += len(part) + len(IMAGE_TOKEN)
        if number < len(parts) - 1:
            ids.append(image_id)
            spans.append(np.array([[offset - len(IMAGE_TOKEN), offset]]))
    start, end = np.concatenate(spans).T
    return np.asarray(ids, np.int64), start, end


def pad_rows(rows: Sequence[np.ndarray], value: int, left: bool = False) -> np.ndarray:
    """Pad rows to the length of the longest with `value`, on the right or the left: (rows, longest) int64."""
    padded = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for padded_row, row in zip(padded, rows, strict=True):
        start = len(padded_row) - len(row) if left else 0
        padded_row[start : start + len(row)] = row
    return padded


def train_word_tokenizer(texts: Iterable[str], max_length: int) -> "PreTrainedTokenizerFast":
    """Train a tokenizer of whole words and marks; words are numbered by count, then alphabet.

    It suits small closed vocabularies such as easy-VQA's: one token for each word keeps conversations short.

    Args:
        texts: texts with all words.
        max_length: limit of tokens in a sequence.
    """
    from transformers import PreTrainedTokenizerFast

    # "</s>" must not have id 2: transformers' CLIP text tower then pools at the largest id instead of the end token.
    special = ["<unk>", "<s>", "<pad>", "</s>", IMAGE_TOKEN]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    # I'm, << and the like stay one token, since decoding puts blanks between tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n|\w+'\w+|\w+:?|<<|>>|\*{6}|[^\w\s]"), "removed", invert=True
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=[IMAGE_TOKEN],
        model_max_length=max_length,
        padding_side="right",
    )
