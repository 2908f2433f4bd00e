"""Comparison of words in VQAv2 and TextVQA: the EvalAI answer processor, and the soft accuracy over ten answers.

The tables and the two patterns define the metric, so they keep every oddity of their source, GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation/vqaEval.py, commit a013f004. M4C, LLaVA's scorer of TextVQA, has the same tables
(haotian-liu/LLaVA, llava/eval/m4c_evaluator.py, commit c121f043) and a step before them, `word_tokenize`.
"""

import re
from collections.abc import Sequence

NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(
    r"(?!<=\d)(\.)(?!\d)"
)  # The source means a look-behind; as written, only the next character matters
COMMA = re.compile(r"\d,\d")
MAX_PERIODS = int(re.UNICODE)
"""Limit of removed periods: the source passes a flag in the place of the count."""

CONTRACTION_PAIRS = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't
hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've I'dve:I'd've Im:I'm
Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't
mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't
notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't
shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've
shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've
somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've someone'dve:someone'd've
someonell:someone'll someones:someone's somethingd:something'd somethingd've:something'd've
something'dve:something'd've somethingll:something'll thats:that's thered:there'd thered've:there'd've
there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've
theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've
werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's
whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll
whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've
yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've
youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in CONTRACTION_PAIRS.split())


def flatten_whitespace(text: str) -> str:
    """Join lines and strip the text."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(text: str) -> str:
    """Normalize an answer as the official VQA scorer: no punctuation, digits for words, no articles, apostrophes."""
    plain = text
    for mark in PUNCTUATION:
        # A mark next to a space is removed, others become a space; with a comma between digits all are removed.
        is_removed = f"{mark} " in text or f" {mark}" in text or COMMA.search(text)
        plain = plain.replace(mark, "" if is_removed else " ")
    plain = PERIOD.sub("", plain, count=MAX_PERIODS)
    words = (NUMBER_WORDS.get(word, word) for word in plain.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_as_evalai(text: str) -> str:
    """Normalize an answer as M4C; LLaVA submits answers to VQAv2's server in this form, too."""
    word = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_answer(flatten_whitespace(word.strip()))


def human_agreement(answer: str, people: Sequence[str]) -> float:
    """Compute the soft accuracy: the mean over people of min(1, equal answers of the other people / 3).

    Args:
        answer: normalized answer.
        people: normalized answers of people, ten in both benchmarks.
    """
    matches = sum(person == answer for person in people)
    shares = [min(1.0, (matches - (person == answer)) / 3) for person in people]
    return sum(shares) / len(shares)
