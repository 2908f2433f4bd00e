"""Statistics and faults of the samples of a stage, as its workers would get them.

Samples are encoded by the code of training, see `pipelines.data.preview`. What is checked here does not use that code
again: which tokens are learned is compared with the text of the answers, the number of image tokens with the output of
the image tower, the end of answers with the end token. A fault in the encoding, the tokenizer, the template or the data
then shows before the first step.
"""

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from pipelines.core import storage
from pipelines.data.preview import PreviewSample, draw_samples
from pipelines.data.shard_index import Shards
from pipelines.data.text_tokenizer import TextTokenizer
from pipelines.training.plan import StagePlan, StageWork
from pipelines.training.step_trace import SampleShape
from redux.conversation import EOS_TOKEN, IGNORE_INDEX, IMAGE_TOKEN, Template

CONTROL_TOKENS = r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|<(?:start|end)_of_(?:turn|utterance)>|\[/?INST\]"
"""Control tokens of model families: ChatML, Llama, Phi, GLM, Command R; DeepSeek; Gemma, Idefics; Mistral."""

TEMPLATE_MARKS = re.compile(
    rf"{CONTROL_TOKENS}|^\s*(?:USER|ASSISTANT|### ?(?:Human|Assistant|Instruction|Response)):|"
    r"\A(?:Human|User|Assistant|GPT):|(?:Human|User|Assistant|GPT):\s*\Z",
    re.MULTILINE,
)
"""Marks of conversation templates, which do not belong into the text of a turn. Roles count at its begin and end."""

MAX_MARKED_SHARE = 0.05
"""Largest share of samples with marks of a template, or with several rounds under "plain", that is not a fault."""

MAX_CONTROL_SHARE = 0.01
"""The same for control tokens, which texts about language models alone contain."""

MIN_CONTROL_SAMPLES = 3
"""Fewest samples with control tokens that are not such texts."""

MAX_PLAIN_QUESTIONS = 0.2
"""Largest number of different questions per sample under "plain", which leaves them out."""

MIN_ITEMS = 20
"""Fewest samples from which a share is judged."""

FEW_IMAGES = 0.05
"""A set has suspiciously few different images below this share of its samples."""

MIN_DIGITS = 6
"""Fewest digits of an image's number that is not a mere count."""

MAX_READ_IDS = 5000
"""Records of a set, one after the other, whose ids are compared with the names of their images."""

MIN_ID_SHARE = 0.1
"""From this share of ids that name the own image on, they are names of images."""

MIN_MISPLACED = 3
"""Fewest records with the image of another one that are not a coincidence."""

MAX_SHOWN_TEXT = 60


@dataclass
class Findings:
    """Samples with a fault: their number, and the first of them as text.

    Args:
        count: number of samples.
        example: the first one.
    """

    count: int = 0
    example: str = ""

    def add(self, example: str) -> None:
        """Count a sample."""
        self.count += 1
        self.example = self.example or example


@dataclass
class SetInspection:
    """Properties of the drawn samples of a set in a stage.

    Args:
        stage: name of the stage.
        name: name of the set.
        samples: number of samples of the set.
        learns_tokens: True if tokens have labels, as in stages with the objective language.
        shapes: sizes of the encoded samples.
        truncated: samples that were cut at max_length.
        unusable: samples that training would replace, by the kind of reason.
        formats: image formats.
        sides: width and height of the images as stored.
        image_hashes: number of samples with each image.
        faults: faults of the labels and of the tokens, by kind.
        questions: number of samples with each first question.
        ids: id, and name of the image without suffix, of records of the set with both.
    """

    stage: str
    name: str
    samples: int
    learns_tokens: bool = True
    shapes: list[SampleShape] = field(default_factory=list)
    truncated: int = 0
    unusable: dict[str, Findings] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    sides: list[tuple[int, int]] = field(default_factory=list)
    image_hashes: Counter[int] = field(default_factory=Counter)
    faults: dict[str, Findings] = field(default_factory=dict)
    questions: Counter[str] = field(default_factory=Counter)
    ids: list[tuple[str, str]] = field(default_factory=list)

    @property
    def drawn(self) -> int:
        """Number of drawn samples."""
        return len(self.shapes) + self.num_unusable

    @property
    def num_unusable(self) -> int:
        """Number of drawn samples that training would replace."""
        return sum(findings.count for findings in self.unusable.values())

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of a sample, without padding."""
        return float(np.mean([shape.length for shape in self.shapes])) if self.shapes else 0.0

    def add_fault(self, kind: str, example: str) -> None:
        """Count a sample with a fault."""
        self.faults.setdefault(kind, Findings()).add(example)


def inspect_set(
    work: StageWork, name: str, count: int, seed: int, tower_tokens: int | None, threads: int = 2
) -> SetInspection:
    """Draw samples of a set, encode them as in training, and check them.

    Args:
        work: a stage.
        name: name of a set of its mixture.
        count: number of samples.
        seed: seed of the draw.
        tower_tokens: tokens that the tower makes of an image; None skips their check.
        threads: threads that decode images.
    """
    reader, plan = work.reader, work.plan
    inspection = SetInspection(plan.name, name, len(reader.sources[name]), plan.stage.objective == "language")
    inspection.ids = _read_ids(reader.sources[name], seed)
    checker = _SampleChecker(inspection, work, tower_tokens)
    for sample in draw_samples(reader, name, count, seed, work.steps, threads):
        if sample.stored is not None:
            _record_stored_sample(inspection, sample)
        if sample.prepared is not None and inspection.learns_tokens:
            checker.check_turns(sample.prepared.record["conversations"], f"sample {sample.prepared.key}")
        if sample.encoded is None:
            inspection.unusable.setdefault(_find_kind(sample.problem), Findings()).add(sample.problem)
        else:
            checker.check(sample)
    return inspection


def _record_stored_sample(inspection: SetInspection, sample: PreviewSample) -> None:
    """Record the size and the format of the stored image of a sample."""
    stored = sample.stored
    assert stored is not None
    if stored.image:
        inspection.image_hashes[hash(stored.image)] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(stored.image)) as picture:
                    inspection.formats[picture.format or "?"] += 1
                    inspection.sides.append(picture.size)
        except Exception:  # each format raises others; the sample is unusable, and its problem says why
            inspection.formats["unreadable"] += 1


def _read_ids(shards: Shards, seed: int) -> list[tuple[str, str]]:
    """Read id and name of the image of records that follow each other: a shift of a column moves images to neighbours.

    Nothing is read from a store, where each record would be a request.
    """
    if not storage.is_local(shards.folder):
        return []
    start = int(np.random.default_rng((seed, 2)).integers(max(len(shards) - MAX_READ_IDS, 0) + 1))
    return [
        (str(record["id"]), PurePosixPath(image.replace("\\", "/")).stem)
        for record in shards.iterate_records(start, start + MAX_READ_IDS)
        if isinstance(image := record.get("image"), str) and record.get("id") is not None
    ]


def _find_kind(problem: str) -> str:
    """Find the kind of a problem: its text without the key of the sample, and without numbers.

    >>> _find_kind("shards/0.tar: sample 000000017: 91 tokens, cut off after 30 before any answer")
    'N tokens, cut off after N before any answer'
    """
    text = re.sub(r"^.*?: sample [^:]*: ", "", problem)
    return re.sub(r"\d+", "N", text)[:120]


class _SampleChecker:
    """Checks of the encoded samples of a set in a stage."""

    def __init__(self, inspection: SetInspection, work: StageWork, tower_tokens: int | None) -> None:
        self.inspection, self.plan, self.tower_tokens = inspection, work.plan, tower_tokens
        self.tokenizer: Any = work.reader.get_tokenizer()
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.is_language = work.plan.stage.objective == "language"
        self.template: Template | None = work.plan.load_template() if self.is_language else None
        self.end_id = self._find_end_token()
        self.end_text = self._find_end_text()
        self.control_tokens = self._list_control_tokens()

    def _find_end_token(self) -> int | None:
        """Find the token that must end each answer; None under "plain", whose answers end with a new line."""
        if self.template is None or not self.template.end.strip():
            return None
        if EOS_TOKEN in self.template.end:
            return int(self.tokenizer.eos_token_id)
        token_id = self.tokenizer.convert_tokens_to_ids(self.template.end.strip())
        # An end of several tokens, as in Phi-3's template, has its last one.
        return None if token_id is None or token_id == self.tokenizer.unk_token_id else int(token_id)

    def _list_control_tokens(self) -> list[str]:
        """List the special tokens of the tokenizer that no text contains."""
        if isinstance(self.tokenizer, TextTokenizer):
            added = self.tokenizer.backend.get_added_tokens_decoder().values()
            tokens = [token.content for token in added if token.special]
        else:
            tokens = list(self.tokenizer.all_special_tokens)
        unknown = self.tokenizer.unk_token_id
        return [
            token for token in tokens if token != IMAGE_TOKEN and self.tokenizer.convert_tokens_to_ids(token) != unknown
        ]

    def _find_end_text(self) -> str:
        """Find the line break that ends an answer under "plain"; "" if the tokenizer has none, or the end is a token.

        Some tokenizers have tokens such as ".\\n", so that it is compared as text.
        """
        if self.template is None or self.template.end != "\n":
            return ""
        ids = self.tokenizer("a\n", add_special_tokens=False)["input_ids"]
        return "\n" if "\n" in self._decode(ids) else ""

    def _ends(self, span: Any) -> bool:
        """Return True if learned tokens end with the end of an answer, perhaps before a line break of the template."""
        if self.end_id is not None:
            return self.end_id in span[-2:]
        return self.end_text in self._decode(span[-2:])

    def check(self, sample: PreviewSample) -> None:
        """Check one encoded sample."""
        assert sample.encoded is not None
        assert sample.prepared is not None
        ids = sample.encoded["input_ids"]
        labels = sample.encoded.get("labels")
        # No logits predict the first token.
        learned = len(ids) if labels is None else int((labels[1:] != IGNORE_INDEX).sum())
        self.inspection.shapes.append(SampleShape(len(ids), learned, sample.image is not None))
        turns = sample.prepared.record["conversations"]
        if labels is None:
            return
        key = f"sample {sample.prepared.key}"
        images = int((ids == self.image_id).sum())
        expected = (self.tower_tokens or 0) * (sample.image is not None)
        if self.tower_tokens is not None and images != expected:
            self.inspection.add_fault("image tokens", f"{key}: {images} image tokens, the tower makes {expected}")
        if not learned:
            self.inspection.add_fault("nothing learned", f"{key}: no token has a label")
            return
        answers = [turn["value"] for turn in turns[1::2]]
        # Under "plain" several answers are one text, and an image in an answer divides it.
        is_one_text = self.template is not None and not self.template.human and len(answers) > 1
        if not is_one_text and not any(IMAGE_TOKEN in answer for answer in answers):
            self._check_labels(ids, labels, answers, key, len(ids) == self.plan.stage.max_length)

    def check_turns(self, turns: list[dict], key: str) -> None:
        """Check the text of the turns against the template."""
        texts = [turn["value"].replace(IMAGE_TOKEN, "").strip() for turn in turns]
        self.inspection.questions[texts[0]] += 1
        template_mark = next((mark[0].strip() for mark in map(TEMPLATE_MARKS.search, texts) if mark), "")
        control = next((token for token in self.control_tokens if any(token in text for text in texts)), "")
        if mark := control or template_mark:
            self.inspection.add_fault("template marks", f"{key}: {mark!r} in the text of a turn")
        if control or re.fullmatch(CONTROL_TOKENS, template_mark):
            self.inspection.add_fault("control tokens", key)
        if self.template is not None and not self.template.human and len(turns) > 2:
            self.inspection.add_fault("plain rounds", f"{key}: {len(turns) // 2} questions")

    def _check_labels(self, ids: Any, labels: Any, answers: list[str], key: str, is_cut: bool) -> None:
        """Compare the learned tokens with the answers."""
        is_learned = labels != IGNORE_INDEX
        # A label is the token itself; the model shifts labels by one.
        wrong = np.flatnonzero(is_learned & (labels != ids))
        if wrong.size:
            index = int(wrong[0])
            self.inspection.add_fault(
                "labels", f"{key}: token {index} is {self._show([ids[index]])}, its label {self._show([labels[index]])}"
            )
            return
        spans = [ids[span] for span in _split_spans(np.flatnonzero(is_learned))]
        has_end = bool(spans) and self._ends(spans[-1])
        # Truncation may cut off answers, and the end of the last one.
        if is_cut and (not has_end or len(spans) < len(answers)):
            self.inspection.truncated += 1
            answers = answers[: len(spans)]
        if len(spans) != len(answers):
            self.inspection.add_fault("labels", f"{key}: {len(spans)} learned parts for {len(answers)} answers")
            return
        # Each whole answer ends with the end token.
        for number, (span, answer) in enumerate(zip(spans, answers, strict=True)):
            is_cut_off = is_cut and not has_end and number == len(spans) - 1
            if not is_cut_off and not self._ends(span):
                self.inspection.add_fault("end token", f"{key}: an answer ends with {self._show(span[-3:])}")
                return
            if not self._is_answer(span, answer, is_cut_off):
                self.inspection.add_fault(
                    "labels", f"{key}: learned {self._show(span)} for the answer {answer[:MAX_SHOWN_TEXT]!r}"
                )
                return

    def _is_answer(self, span: Any, answer: str, is_cut_off: bool) -> bool:
        """Return True if tokens are an answer with the template's text around it, or its beginning if cut off."""
        assert self.template is not None
        text = answer.strip() if self.template.strips else answer
        end = self.template.end.replace(EOS_TOKEN, self.tokenizer.eos_token or EOS_TOKEN)
        expected_text = f"{self.template.answer}{text}{end}"
        learned, expected = _squeeze(self._decode(span)), _squeeze(expected_text)
        if learned == expected:
            return True
        if is_cut_off:  # the last character may be cut as well
            learned = learned.rstrip("\ufffd")
            return (bool(learned) and expected.startswith(learned)) or not self._gives_back(expected_text)
        # A tokenizer that does not give every text back decides nothing.
        alone = self.tokenizer(expected_text, add_special_tokens=False)["input_ids"]
        return not self._gives_back(expected_text) and abs(len(alone) - len(span)) <= 1

    def _gives_back(self, text: str) -> bool:
        """Return True if the tokenizer gives a text back."""
        return _squeeze(self._decode(self.tokenizer(text, add_special_tokens=False)["input_ids"])) == _squeeze(text)

    def _decode(self, ids: Any) -> str:
        tokenizer = self.tokenizer.backend if isinstance(self.tokenizer, TextTokenizer) else self.tokenizer
        return str(tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))

    def _show(self, ids: Any) -> str:
        return repr(self._decode(ids)[:MAX_SHOWN_TEXT])


def _squeeze(text: str) -> str:
    """Remove white space, which tokenizers do not give back exactly, and marks of word pieces."""
    return re.sub(r"\s+|##", "", text)


def _split_spans(positions: Any) -> list[Any]:
    """Split ascending positions into spans without a gap."""
    return np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1) if len(positions) else []


# --- what is a problem -----------------------------------------------------------------------------------------------


def list_problems(inspection: SetInspection, plan: StagePlan) -> Iterator[str]:
    """List the faults of a set in a stage, a line each."""
    prefix, drawn = f"train.{inspection.stage}.data: {inspection.name}", inspection.drawn
    share = inspection.num_unusable / max(drawn, 1)
    if share > plan.max_bad_fraction:
        for kind, findings in sorted(inspection.unusable.items(), key=lambda item: -item[1].count):
            yield (
                f"{prefix}: {findings.count} of {drawn} samples cannot be used ({kind}), allowed: a share of "
                f"data.max_bad_fraction, {plan.max_bad_fraction:g}; the first: {findings.example}"
            )
    advice = {
        "labels": "labels on the answers' own tokens; check the tokenizer's offsets and the template",
        "nothing learned": "at least one learned token in each sample",
        "end token": "answers that end with the end token, or the model never learns to stop; check eos_token of the "
        "tokenizer",
        "image tokens": "as many image tokens as the tower makes",
    }
    for kind, allowed in advice.items():
        if faulty := inspection.faults.get(kind):
            yield f"{prefix}: {faulty.count} of {drawn} samples: {faulty.example}, allowed: {allowed}"
    yield from _list_template_problems(inspection, plan)


def _list_template_problems(inspection: SetInspection, plan: StagePlan) -> Iterator[str]:
    prefix = f"train.{inspection.stage}.template: got {plan.template}"
    count = inspection.questions.total()
    marked = inspection.faults.get("template marks", Findings())
    control = inspection.faults.get("control tokens", Findings()).count
    has_controls = control >= MIN_CONTROL_SAMPLES and control / count > MAX_CONTROL_SHARE
    if has_controls or (count and marked.count / count > MAX_MARKED_SHARE):
        yield (
            f"{prefix} for {inspection.name}, where {marked.count} of {count} samples have a template in their text "
            f"already ({marked.example}), allowed: turns of plain text, because the stage adds the template"
        )
    rounds = inspection.faults.get("plain rounds", Findings())
    if count and rounds.count / count > MAX_MARKED_SHARE:
        yield (
            f"{prefix} for {inspection.name}, where {rounds.count} of {count} samples have several questions, which "
            f"plain leaves out ({rounds.example}), allowed: vicuna_v1, vicuna_bare, chat, or captions"
        )
    elif plan.template == "plain" and count >= MIN_ITEMS and inspection.questions:
        different = len(inspection.questions)
        if different / count > MAX_PLAIN_QUESTIONS:
            yield (
                f"{prefix} for {inspection.name}, where {count} samples have {different} different questions, which "
                "plain leaves out, allowed: vicuna_v1, vicuna_bare, chat, or captions"
            )


def list_image_problems(inspections: list[SetInspection]) -> Iterator[str]:
    """List sets whose images do not seem to belong to their records.

    In LLaVA's files the id of a record is the name of its image. If few images have the id of their record, but
    many have that of another record, then the column of images was taken from other rows, or from another set.
    """
    by_set = {inspection.name: inspection for inspection in inspections}
    ids = {name: {id for id, _ in inspection.ids} for name, inspection in by_set.items()}
    for name, inspection in by_set.items():
        # Ids that count rows often meet the numbers of images by chance.
        pairs = [(id, stem) for id, stem in inspection.ids if not (stem.isdecimal() and len(stem) < MIN_DIGITS)]
        if len(pairs) < MIN_ITEMS:
            continue
        num_matching = sum(_names_image(id, stem) for id, stem in pairs)
        for other, other_ids in ids.items():
            stems = {_last_part(id) for id in other_ids}
            foreign_pairs = [(id, stem) for id, stem in pairs if stem in stems and not _names_image(id, stem)]
            if num_matching < len(pairs) / 10 and len(foreign_pairs) > len(pairs) / 10:
                id, stem = foreign_pairs[0]
                origin = "other records of the set" if other == name else f"records of {other}"
                yield (
                    f"data.sets.{name}: the images of {len(foreign_pairs)} of {len(pairs)} records have the ids of "
                    f"{origin}; record {id} has the image {stem}, allowed: the image of the record itself; check the "
                    "column of images"
                )
                break
        # Neither the id nor the image belongs to the record, and each belongs to another one: no copy or part of it.
        by_id, by_stem = Counter(_last_part(id) for id, _ in pairs), Counter(stem for _, stem in pairs)
        misplaced = [
            (id, stem) for id, stem in pairs if not _names_image(id, stem) and by_stem[_last_part(id)] and by_id[stem]
        ]
        if num_matching >= MIN_ID_SHARE * len(pairs) and len(misplaced) >= MIN_MISPLACED:
            id, stem = misplaced[0]
            yield (
                f"data.sets.{name}: {len(misplaced)} of {len(pairs)} records have the image of another record, "
                f"{num_matching} their own one; record {id} has the image {stem}, allowed: the image of the record "
                "itself; check the column of images"
            )
        images = inspection.image_hashes
        if images.total() >= MIN_ITEMS and len(images) < FEW_IMAGES * images.total():
            yield (
                f"data.sets.{name}: {images.total()} samples have {len(images)} different images, allowed: the image "
                "of each record; check the folder or the column of images"
            )


def _last_part(id: str) -> str:
    return PurePosixPath(id).stem


def _names_image(id: str, stem: str) -> bool:
    """Return True if an id names an image: one contains the other, without zeros in front."""
    shorter, longer = sorted((_last_part(id).lstrip("0"), stem.lstrip("0")), key=len)
    return shorter == longer or (len(shorter) >= 4 and shorter in longer) or (len(stem) >= 4 and stem in id)
