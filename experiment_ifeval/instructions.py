"""Instructions that a program can verify (IFEval, arXiv 2311.07911), and whether an answer is about
what was asked.

The 25 checkers are those of the package if-verifiable, which has them from Google's own code. Here
is what a training needs around them: rows that are checked before anything is loaded, the two ways
to judge, and words that tell an answer from an evasion.

    strict    the answer as it is
    loose     any of eight versions: the answer, or the answer without its first line, its last or
              both; each with and without asterisks. "Sure, here it is:" is forgiven.
"""

import json
import logging
import math
import re
from dataclasses import dataclass, field
from functools import cache
from zipfile import BadZipFile

from run import fail, first_line, is_unicode

try:
    import langdetect
    import nltk
    from if_verifiable.common import get_loose_transformations
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
except ImportError as error:
    fail(f"the package {error.name} is missing; pip install -r requirements-ifeval.txt")

langdetect.DetectorFactory.seed = 0  # else it draws, and its verdicts differ from call to call
logging.getLogger().addFilter(lambda record: "Unable to detect language" not in str(record.msg))

# An answer of fewer is not on topic. The tightest limit in the data is "fewer than 15 words".
LEAST_WORDS = 6
# These count sentences, or words in capitals, with nltk's sentence data, which is a download.
SENTENCE_KINDS = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
SENTENCE_DATA = "tokenizers/punkt_tab/english/"


@dataclass
class Task:
    """What an answer is judged by."""

    kinds: list[str]  # such as "punctuation:no_comma"
    arguments: list[dict]  # of each kind's checker
    topic: list[str]  # words that answers use, and that the prompt does not hold
    checkers: list = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return ", ".join(self.kinds)


@dataclass
class Judgement:
    """What an answer is worth, instruction by instruction."""

    strict: list[bool]
    on_topic: bool  # about what was asked

    @property
    def share(self) -> float:
        """The share of its instructions that the answer follows, strictly."""
        return sum(self.strict) / len(self.strict)

    @property
    def is_right(self) -> bool:
        """Whether the answer follows every instruction and is on topic."""
        return self.on_topic and all(self.strict)


# ---------------------------------------------------------------- rows
@cache
def has_sentence_data() -> bool:
    try:
        return bool(nltk.data.find(SENTENCE_DATA))
    except (LookupError, BadZipFile):  # absent, or a download that was interrupted
        return False


def kinds_of(where: str, row: dict) -> list[str]:
    """The kinds of a row's instructions, each of which must be known."""
    kinds = row.get("instruction_id_list")
    if not isinstance(kinds, list) or not kinds:
        wanted = "field 'instruction_id_list' must be a list of kinds"
        fail(f"{where}: {wanted}, is {str(kinds)[:50]!r}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in INSTRUCTION_DICT:
            known = ", ".join(sorted(INSTRUCTION_DICT))
            fail(f"{where}: {str(kind)[:50]!r} is no kind of instruction; there are {known}")
    return kinds


def is_undecided(where: str, row: dict) -> bool:
    """Whether a row cannot be judged here, or not alike each time.

    Some need nltk's data. google/IFEval has a few that ask for the frequency of "!" or "#": their
    checker, which knows letters alone, draws a letter of its own.
    """
    all_arguments = row.get("kwargs")
    if not isinstance(all_arguments, list):
        return False  # make_task refuses it
    for kind, arguments in zip(kinds_of(where, row), all_arguments):
        if kind in SENTENCE_KINDS and not has_sentence_data():
            return True
        letter = arguments.get("letter") if isinstance(arguments, dict) else None
        if isinstance(letter, str) and re.fullmatch("[^A-Za-z]", letter):
            return True
    return False


def make_task(where: str, row: dict) -> Task:
    """The task of a row in google/IFEval's format. `where` is its file and line, for errors."""
    kinds = kinds_of(where, row)
    all_arguments = row.get("kwargs")
    is_list = isinstance(all_arguments, list) and len(all_arguments) == len(kinds)
    if not is_list or not all(isinstance(arguments, dict) for arguments in all_arguments):
        fail(f"{where}: field 'kwargs' must be a list of {len(kinds)} objects, one for each kind")
    topic = row.get("topic", [])
    if not isinstance(topic, list):
        fail(f"{where}: field 'topic' must be a list of words, is {str(topic)[:50]!r}")
    for word in topic:
        if not isinstance(word, str) or not re.fullmatch(r"\w+-?", word):
            wanted = "must be one word, or the beginning of one, as pollinat-"
            fail(f"{where}: field 'topic' holds {str(word)[:50]!r}, which {wanted}")
    task = Task(kinds, [], [word.lower() for word in topic])
    for kind, arguments in zip(kinds, all_arguments):
        given = {name: value for name, value in arguments.items() if value is not None}
        task.arguments.append(given)
        task.checkers.append(make_checker(where, kind, given))
    return task


def make_checker(where: str, kind: str, arguments: dict):
    """A checker that knows its arguments and has judged a first text."""
    checker = INSTRUCTION_DICT[kind](kind)
    try:
        for name, value in arguments.items():
            check_argument(name, value)
        checker.build_description(**arguments)
        missing = set(checker.get_instruction_args_keys()) - set(arguments)
        if missing:  # the checker would draw them
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
        if arguments.get("nth_paragraph", 0) > arguments.get("num_paragraphs", math.inf):
            raise ValueError("nth_paragraph is above num_paragraphs")
        for text in ("", "A first text.\n\n* With a second line."):
            checker.check_following(text)
    except Exception as error:  # whatever arguments of the wrong kind lead to
        fail(f"{where}: {kind} cannot be checked with {str(arguments)[:80]}: {first_line(error)}")
    return checker


def check_argument(name: str, value) -> None:
    """Raises ValueError for what a checker would replace by a draw of its own, or stumble over when
    an answer makes it look: numbers, letters, words, which are regular expressions for it."""
    if not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{name} has half of a surrogate pair, which is no character")
    if name in ("keywords", "forbidden_words"):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} must be a list of words")
        for word in value:
            check_argument("keyword", word)
    elif name.startswith(("num_", "nth_")) or name.endswith("frequency"):
        least = 1 if name == "nth_paragraph" else 0
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more")
    elif not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text")
    elif name == "keyword":
        re.compile(value)
    elif name == "letter" and len(value) > 1:
        raise ValueError("letter must be one letter")


# ---------------------------------------------------------------- judging
def judge(answer: str, task: Task) -> Judgement:
    strict = [is_followed(checker, answer) for checker in task.checkers]
    return Judgement(strict, is_on_topic(answer, task))


def judge_loosely(answer: str, task: Task) -> list[bool]:
    """Of each instruction, whether any of the eight versions follows it."""
    versions = get_loose_transformations(answer)
    loose = []
    for checker in task.checkers:
        loose.append(any(is_followed(checker, version) for version in versions))
    return loose


def is_followed(checker, answer: str) -> bool:
    """An empty answer follows nothing, as in Google's script."""
    try:
        return bool(answer.strip()) and bool(checker.check_following(answer))
    except RecursionError:  # of JSON that is nested too deeply
        return False


def is_on_topic(answer: str, task: Task) -> bool:
    """Whether an answer has LEAST_WORDS words, and one of them is a word of task.topic.

    No form of these stands in the prompt. So it is not enough to repeat the prompt, and "I'm ready
    to help with your text about honey bees." has none. Rows of google/IFEval name no words of a
    topic; there the length alone decides.
    """
    words = re.findall(r"\w+", answer.lower())
    if len(words) < LEAST_WORDS:
        return False
    if not task.topic:
        return True
    return any(is_form_of(entry, word) for entry in task.topic for word in set(words))


def is_form_of(entry: str, word: str) -> bool:
    """Whether a word is that of an entry: "hive" has hives, and "pollinat-" all that begins so."""
    if entry.endswith("-"):
        return word.startswith(entry[:-1])
    stem = entry
    if entry.endswith("e"):
        stem = entry[:-1]  # bake: baked, baking
    elif re.fullmatch("[^aeiou]*[aeiou][bdfgklmnprt]", entry):
        stem = entry + entry[-1]  # swim: swimming
    forms = [entry, entry + "s", entry + "es", stem + "ed", stem + "ing"]
    if entry.endswith("y"):
        forms += [entry[:-1] + "ies", entry[:-1] + "ied"]  # fly: flies
    return word in forms
