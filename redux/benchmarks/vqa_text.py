"""How VQAv2 and TextVQA compare words: the EvalAI answer processor, and the soft accuracy over ten people's answers.

The tables and the two patterns define the metric, so they stand here with every oddity of their source, GT-Vision-Lab/
VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, commit a013f004.  M4C, by which LLaVA scores TextVQA, has the same
tables (haotian-liu/LLaVA, llava/eval/m4c_evaluator.py, commit c121f043) and a step before them, `word_tokenize`.
"""

import re
from collections.abc import Sequence

NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # a look-behind was meant; as it stands, only what follows matters
COMMA = re.compile(r"\d,\d")
MAX_PERIODS = int(re.UNICODE)
"""So many periods are removed at most: the source gives the flag where the count belongs."""

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
    """Text on one line, without space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(text: str) -> str:
    """The official VQA scorer's form of an answer: no punctuation, digits for words, no articles, apostrophes."""
    plain = text
    for mark in PUNCTUATION:
        # a mark beside a space vanishes, another leaves one; with a comma within digits all vanish
        vanishes = f"{mark} " in text or f" {mark}" in text or COMMA.search(text)
        plain = plain.replace(mark, "" if vanishes else " ")
    plain = PERIOD.sub("", plain, count=MAX_PERIODS)
    words = (NUMBER_WORDS.get(word, word) for word in plain.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_as_evalai(text: str) -> str:
    """M4C's form of an answer, which is also how LLaVA hands answers to VQAv2's server."""
    word = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_answer(flatten_whitespace(word.strip()))


def human_agreement(answer: str, people: Sequence[str]) -> float:
    """Mean over all but one of the people of min(1, how many of the others gave the answer / 3).

    people: their answers, ten of them in both benchmarks, in the same form as `answer`.
    """
    same = sum(given == answer for given in people)
    shares = [min(1.0, (same - (given == answer)) / 3) for given in people]
    return sum(shares) / len(shares)
