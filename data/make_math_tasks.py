"""Write the arithmetic tasks: math_tasks.jsonl, its two held-out files,
and math_tasks_long.jsonl with its own.

    # the files that the repository ships, the same bytes every time
    python data/make_math_tasks.py

A row is {"question", "answer", "expression", "num_terms", "num_digits", "operators"}. Rows are
spread over *cells* (num_terms, num_digits, operators), where num_digits is the length of the
longest term and operators the set of operators that the expression uses. What is held out of a cell
is at most a tenth of the expressions that it has, and no held-out expression stands in a training
file or is shown to a policy by make_tiny_model.py.
"""

import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

PHRASINGS = (
    "What is {}?",
    "Compute {}.",
    "Work out {}.",
    "How much is {}?",
    "{} = ?",
    "Tell me {}.",
)


@dataclass
class Config:
    seed: int = 0
    output: Path = Path(__file__).resolve().parent
    # of math_tasks.jsonl, half as many of math_tasks_long.jsonl; small cells have fewer
    rows_per_cell: int = 160
    eval_rows: int = 512  # in each held-out file


def cells(terms=(2, 3, 4), digits=(1, 2, 3, 4), operators="+-*"):
    """All cells (num_terms, num_digits, operators) of a range:
    n terms use at most n - 1 operators."""
    return [
        (num_terms, num_digits, "".join(used))
        for num_terms, num_digits in itertools.product(terms, digits)
        for size in range(1, num_terms)
        for used in itertools.combinations(operators, size)
    ]


BASE_CELLS = cells(terms=(2, 3), digits=(1, 2), operators="+-")
HARD_CELLS = [cell for cell in cells(digits=(3, 4)) if "*" in cell[2]]
LONG_CELLS = cells(terms=(2, 3, 4, 5, 6), digits=(1, 2), operators="+-")


def cell_size(cell):
    """The number of different expressions in a cell."""
    num_terms, num_digits, used = cell
    numbers = lambda digits: 10**digits - 1  # 1 to 9, 1 to 99, ...  # noqa: E731
    choices = sum(
        set(chosen) == set(used) for chosen in itertools.product(used, repeat=num_terms - 1)
    )
    return choices * (numbers(num_digits) ** num_terms - numbers(num_digits - 1) ** num_terms)


def random_expression(rng, cell):
    """One expression of a cell, such as "47 + 8 - 12"; term lengths are drawn evenly."""
    num_terms, num_digits, used = cell
    while True:
        lengths = [rng.randint(1, num_digits) for _ in range(num_terms)]
        chosen = [rng.choice(used) for _ in range(num_terms - 1)]
        if max(lengths) == num_digits and set(chosen) == set(used):
            break
    terms = [rng.randint(10 ** (length - 1), 10**length - 1) for length in lengths]
    return " ".join(
        [str(terms[0])] + [f"{operator} {term}" for operator, term in zip(chosen, terms[1:])]
    )


def evaluate(expression):
    """The value of an expression of integers and + - *, products first."""
    tokens = expression.split()
    total, sign, product = 0, 1, int(tokens[0])
    for operator, term in zip(tokens[1::2], map(int, tokens[2::2])):
        if operator == "*":
            product *= term
        else:
            total, sign, product = total + sign * product, 1 if operator == "+" else -1, term
    return total + sign * product


def make_row(rng, cell, expression):
    num_terms, num_digits, used = cell
    return {
        "question": rng.choice(PHRASINGS).format(expression),
        "answer": evaluate(expression),
        "expression": expression,
        "num_terms": num_terms,
        "num_digits": num_digits,
        "operators": used,
    }


def cell_of(row):
    return row["num_terms"], row["num_digits"], row["operators"]


def even_counts(total, limits):
    """Share `total` over cells as evenly as their limits allow: {cell: rows}."""
    counts, rest = {}, total
    for position, (cell, limit) in enumerate(
        sorted(limits.items(), key=lambda item: (item[1], item[0]))
    ):
        counts[cell] = min(limit, rest // (len(limits) - position))
        rest -= counts[cell]
    return counts


def draw(rng, cell, count, taken):
    """Up to `count` rows of a cell whose expressions are not in `taken`, which grows by them."""
    rows = []
    for _ in range(200 * count):  # a small cell can run dry
        if len(rows) == count:
            break
        expression = random_expression(rng, cell)
        if expression not in taken:
            taken.add(expression)
            rows.append(make_row(rng, cell, expression))
    return rows


def write(path, rows, rng):
    rng.shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path.name}: {len(rows)} rows")


def held_out_expressions(folder=Path(__file__).resolve().parent):
    """The expressions of the held-out files: no training data may contain them."""
    names = ("math_tasks_eval.jsonl", "math_tasks_hard_eval.jsonl", "math_tasks_long_eval.jsonl")
    return {
        json.loads(line)["expression"]
        for name in names
        for line in (folder / name).read_text().splitlines()
    }


def main(config: Config):
    rng = random.Random(config.seed)
    taken = set()
    held_out = {}
    for name, chosen in (("math_tasks_eval", BASE_CELLS), ("math_tasks_hard_eval", HARD_CELLS)):
        counts = even_counts(config.eval_rows, {cell: cell_size(cell) // 10 for cell in chosen})
        held_out[name] = [row for cell in chosen for row in draw(rng, cell, counts[cell], taken)]
        write(config.output / f"{name}.jsonl", held_out[name], rng)
    training = [row for cell in cells() for row in draw(rng, cell, config.rows_per_cell, taken)]
    write(config.output / "math_tasks.jsonl", training, rng)

    # Sums of up to six terms. Shorter ones are held out in math_tasks_eval,
    # since policies have learnt from all others.
    rng = random.Random(f"{config.seed} long")
    counts = even_counts(config.eval_rows, {cell: cell_size(cell) // 10 for cell in LONG_CELLS})
    known = {
        cell: [row for row in held_out["math_tasks_eval"] if cell_of(row) == cell]
        for cell in BASE_CELLS
    }
    chosen = [
        row
        for cell in LONG_CELLS
        for row in (
            known[cell][: counts[cell]] if cell in known else draw(rng, cell, counts[cell], taken)
        )
    ]
    write(config.output / "math_tasks_long_eval.jsonl", chosen, rng)
    taken = {row["expression"] for rows in (*held_out.values(), chosen) for row in rows}
    training_long = [
        row for cell in LONG_CELLS for row in draw(rng, cell, config.rows_per_cell // 2, taken)
    ]
    write(config.output / "math_tasks_long.jsonl", training_long, rng)

    print(
        "\nThe cells of the base experiment:\n"
        "| terms | digits | operators | expressions | training | held out |"
    )
    print("|---|---|---|---|---|---|")
    in_training = Counter(map(cell_of, training))
    in_eval = Counter(map(cell_of, held_out["math_tasks_eval"]))
    for cell in BASE_CELLS:
        print(
            f"| {cell[0]} | {cell[1]} | `{cell[2]}` | {cell_size(cell)} "
            f"| {in_training[cell]} | {in_eval[cell]} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
