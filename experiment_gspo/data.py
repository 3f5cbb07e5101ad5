"""Data files and hub data sets: read, checked, chosen; and how numbers are written.

Plumbing, the same in every experiment.
"""

import json
import os
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet
from run import fail, first_line, flag_of, is_unicode

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
CURRENCY = r"(?:\\?[$€£¥₹])?"  # as \$ too
UNIT = r"(?:\s?\\?%| ([A-Za-z°]{1,20}))?"
SPELLING = rf"([-+]?)\s*{CURRENCY}\s*(-?)\s*({NUMBER})\s?{CURRENCY}{UNIT}"
WRAPPED = r"\*\*(.*)\*\*|\\boxed\{(.*)\}|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]"
# Words behind a number that are no unit; an s may follow.
NO_UNITS = set(
    "dozen gross score hundred thousand lakh million crore billion trillion k mn bn tn "
    "squared cubed factorial plus minus times and or to".split()
)


def read_rows(path: str, *splits: str) -> list[tuple[str, dict]]:
    """(where, row), as ("tasks.jsonl, line 3", {...}), of a data file or of a hub data set.

    splits: of a hub data set; the first is read, or the last one where the first is missing.
    """
    name, _, subset = path.partition(":")
    where = path
    rows = []
    try:
        if not path.endswith(DATA_SUFFIXES):
            import datasets

            split = splits[0]
            if len(splits) > 1:
                has = datasets.get_dataset_split_names(name, subset or None)
                split = split if split in has else splits[-1]
            loaded = datasets.load_dataset(name, subset or None, split=split)
            rows = [(f"{path}, {split} row {i}", row) for i, row in enumerate(loaded, 1)]
        elif path.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path).to_pylist()
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(table, 1)]
        elif path.endswith(".json"):
            rows = list(read_json_list(path, Path(path).read_text("utf-8-sig")))
        else:
            for i, line in enumerate(Path(path).read_text("utf-8-sig").split("\n"), 1):
                where = f"{path}, line {i}"
                if line.strip():
                    rows.append((where, json.loads(line)))
    except Exception as error:  # json's, Arrow's and the hub's errors share no base class
        hint = "; files end in .jsonl, .json or .parquet, else it is a hub id"
        if path.endswith(DATA_SUFFIXES):
            hint = ""
        fail(f"{where}: cannot be read{hint}: {first_line(error)}")
    for where, row in rows:
        if not isinstance(row, dict):
            fail(f"{where}: expected an object with fields, found {type(row).__name__}")
    return [(where, without_nulls(row)) for where, row in rows]


def without_nulls(row: dict) -> dict:
    """A field that is null, or NaN as pandas writes it, is missing."""
    return {k: v for k, v in row.items() if v is not None and v == v}


def number_of(where: str, row: dict, field: str, default: float) -> float:
    """The number in a field that a row may lack."""
    value = row.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(f"{where}: field {field!r} must be a number, is {str(value)[:50]!r}")
    return value


def characters_of(where: str, row: dict, field: str) -> set[str]:
    """The characters of the text, or of the list of texts, in a field that a row may lack."""
    value = row.get(field, "")
    if not isinstance(value, (str, list)):
        fail(f"{where}: field {field!r} must be text, is {str(value)[:50]!r}")
    return set("".join(map(str, value)))


def text_of(where: str, row: dict, flag: str, field: str) -> str:
    """The text or number in a field that a row must have: 1e-05 as 0.00001.

    flag: of the constant that names the field.
    """
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        fail(f"{where}: field {field!r} is missing or empty; {flag} names the field")
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        found = str(value)[:50]
        fail(f"{where}: field {field!r} must be text or a number, is {found!r}; {flag} names it")
    text = f"{Decimal(str(value)):f}" if isinstance(value, (float, Decimal)) else str(value)
    if not is_unicode(text):
        fail(f"{where}: field {field!r} holds half of a surrogate pair, which is no character")
    return text


def choose_rows(rows, eval_rows, config, left_out_by=lambda *_: ""):
    """(training rows, held-out rows) that are used; says how many of how many.

    left_out_by(where, row, config) names the constant that leaves a training row out, else "".
    """
    selected = []
    left_out = Counter()
    for where, row in rows:
        constant = left_out_by(where, row, config)
        if constant:
            left_out[constant] += 1
        else:
            selected.append((where, row))
    used = selected[: config.max_prompts]
    held_out = eval_rows[: config.max_eval_prompts]
    causes = []
    for constant, count in left_out.items():
        causes.append(f"{count} left out by {flag_of(constant)} {getattr(config, constant)}")
    if len(selected) > len(used):
        causes.append(f"the first --max-prompts {config.max_prompts}")
    counts = f"{len(used)} of {len(rows)} prompts selected"
    if causes:
        counts += f" ({', '.join(causes)})"
    counts += f", {len(held_out)} of {len(eval_rows)} held out"
    if len(held_out) < len(eval_rows):
        counts += f" (the first --max-eval-prompts {config.max_eval_prompts})"
    if len(used) < config.rollouts_per_step:
        fail(f"{config.data_path}: {counts}; --rollouts-per-step is {config.rollouts_per_step}")
    if not held_out:
        fail(f"{config.data_path}: {counts}; --eval-data-path names held-out rows")
    print(f"{config.data_path}: {counts}")
    return used, held_out


def read_json_list(path: str, text: str):
    """(where, element) for each element of a list in JSON."""
    elements = json.loads(text)
    if not isinstance(elements, list):
        fail(f"{path}: expected a list of objects")
    decoder = json.JSONDecoder()
    line = 1
    start = 0
    end = text.find("[") + 1
    for row, element in enumerate(elements, 1):
        before = start
        start = re.compile(r"[\s,]*").match(text, end).end()
        line += text.count("\n", before, start)
        yield f"{path}, row {row}, line {line}", element
        end = decoder.raw_decode(text, start)[1]


def read_train_and_eval_rows(data_path: str, eval_data_path: str | None):
    """(training rows, held-out rows) as `read_rows` gives them.

    Held out is, in this order: `eval_data_path`; the file <name>_eval.<suffix> beside a local
    file; a hub data set's `test` split; the last 10 % of the rows, at most 512.
    """
    rows = read_rows(data_path, "train")
    stem, suffix = os.path.splitext(data_path)
    beside = f"{stem}_eval{suffix}"
    if eval_data_path or os.path.isfile(beside):
        # google/IFEval, a benchmark, has its rows in "train".
        return rows, read_rows(eval_data_path or beside, "test", "train")
    if suffix not in DATA_SUFFIXES:
        import datasets

        name, _, subset = data_path.partition(":")
        if "test" in datasets.get_dataset_split_names(name, subset or None):
            return rows, read_rows(data_path, "test")
    held_out = min(512, max(1, len(rows) // 10))
    return rows[:-held_out], rows[-held_out:]


# ---------------------------------------------------------------- numbers
def parse_number(text: str) -> Decimal | None:
    """The value of a text that is one number, perhaps with a currency, a unit, boxed or in bold.

    " $1,234.50." is 1234.5, "**72 km**" is 72; "x = 72", "72 thousand" and "It is 72" are None.
    """
    text = text.strip().removesuffix(".")
    for _ in range(3):  # bold, boxed and math, one in the other
        wrapped = re.fullmatch(WRAPPED, text)
        if wrapped:
            text = wrapped[wrapped.lastindex].strip().removesuffix(".")
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")
    found = re.fullmatch(SPELLING, text) if len(text) <= 50 else None
    if not found:
        return None
    sign, sign_behind_currency, digits, unit = found.groups(default="")
    if (sign and sign_behind_currency) or unit.lower().removesuffix("s") in NO_UNITS:
        return None
    minus = "-" if "-" in (sign, sign_behind_currency) else ""
    return Decimal(minus + digits.replace(",", ""))  # exact; -Decimal(...) would round


def last_number(text: str) -> str:
    """The last number in a text, whatever stands around it; "" where it has none."""
    text = text[-1000:].replace("\N{MINUS SIGN}", "-")
    numbers = re.findall(rf"(?<![0-9.])-?{CURRENCY}-?{NUMBER}(?![0-9])", text)
    return numbers[-1] if numbers else ""


def is_same_number(given: str, right: str, tolerance: float) -> bool:
    """Whether they differ by at most the tolerance, relative to the right one.

    It is at least 1e-6 where the right one is no integer: 0.333333 is a way to write 1/3.
    """
    value = parse_number(given)
    right_value = parse_number(right)
    if value is None:
        return False
    if right_value != right_value.to_integral_value():
        tolerance = max(tolerance, 1e-6)
    return abs(value - right_value) <= Decimal(tolerance) * abs(right_value)
