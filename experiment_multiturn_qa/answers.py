"""When an answer in words is right: exact match and F1, as SQuAD and HotpotQA have them."""

import re
import string
from collections import Counter


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces,
    as in the evaluation script of SQuAD (1606.05250).

    Ours: a text that is nothing but articles or punctuation keeps them, or "A" and "+" would be
    the same answer as "" and "The".
    """
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    without_articles = " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
    return without_articles or " ".join(bare.split()) or text.strip()


def exact_match(given: str | None, golds: list[str]) -> float:
    """1 where the given answer is one of the golds, both normalised. No answer is None."""
    return float(given is not None and normalize_answer(given) in map(normalize_answer, golds))


def f1_score(given: str | None, golds: list[str]) -> float:
    """2 PR / (P + R) of the words that the given answer and a gold share, both normalised;
    of several golds the best.

    A yes or no is right or wrong as a whole, as in HotpotQA (1809.09600):
    "yes and no" shares a word with either.
    """
    best, given = exact_match(given, golds), normalize_answer(given or "")
    for gold in map(normalize_answer, golds):
        if not {given, gold} & {"yes", "no", "noanswer"}:
            words, gold_words = Counter(given.split()), Counter(gold.split())
            shared = (words & gold_words).total()  # P = shared / words, R = shared / gold_words
            best = max(best, 2 * shared / max(words.total() + gold_words.total(), 1))
    return best


def holds_gold(text: str, golds: list[str]) -> bool:
    """Whether a gold stands in a text, both normalised, as whole words; tags are none."""
    text = normalize_answer(re.sub(r"</?\w+>", " ", text))
    return any(f" {normalize_answer(gold)} " in f" {text} " for gold in golds)


def given_answer(trajectory) -> str | None:
    """The text of the last <answer> ... </answer> in its last turn.

    None where there is none, or where the trajectory was cut off.
    """
    _, opened, rest = trajectory.turns[-1].rpartition("<answer>")
    given, closed, _ = rest.partition("</answer>")
    return given if opened and closed and trajectory.status != "truncated" else None


def search_metrics(trajectories) -> dict[str, float]:
    """How trajectories answer and search: means over trajectories."""
    answers = [(given_answer(t), t.prompt.answer) for t in trajectories]
    found = [holds_gold(" ".join(t.results), t.prompt.answer) for t in trajectories]
    figures = {
        "em": [exact_match(given, golds) for given, golds in answers],
        "f1": [f1_score(given, golds) for given, golds in answers],
        "searches": [t.outcomes.count("ok") for t in trajectories],  # that found something
        "recall_at_k": found,
    }
    return {name: sum(values) / len(values) for name, values in figures.items()}
