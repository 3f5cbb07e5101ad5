"""Measure the search of experiment_multiturn_qa: build time,
size on disk and latency at several sizes of the corpus.

    # 1,000, 100,000 and 1,000,000 passages of 40 words; about 3 minutes
    python benchmarks/search_speed.py

Passages have a title of 2 words and a text of 40, drawn from 50,000 words whose frequencies fall as
1 / rank, as those of a language do, so a few words stand in most passages. A query is 9 words drawn
from one of the passages, common ones among them; what is timed is the tool's whole answer, from the
query to the text with the 3 best passages. The first 100 queries are not counted. Writes
results/search_speed.json.
"""

import datetime
import itertools
import json
import os
import platform
import random
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiment_multiturn_qa"))
from search import Search, build_index  # noqa: E402


@dataclass
class Config:
    sizes: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    queries: int = 2000
    seed: int = 0
    output: Path = ROOT / "results" / "search_speed.json"


def make_passages(size, seed, vocabulary=50_000):
    rng = random.Random(seed)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
    words = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(vocabulary)]
    totals = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(vocabulary)))
    for _ in range(size):
        text = rng.choices(words, cum_weights=totals, k=42)
        yield " ".join(text[:2]), " ".join(text[2:])


def make_queries(size, config):
    """Of some passages, the same whether or not the others are kept in memory."""
    rng = random.Random(config.seed + 1)
    chosen = {rng.randrange(size) for _ in range(config.queries + 100)}
    passages = (p for i, p in enumerate(make_passages(size, config.seed)) if i in chosen)
    queries = [" ".join(rng.sample(f"{title} {text}".split(), 9)) for title, text in passages]
    return [rng.choice(queries) for _ in range(config.queries + 100)]


def measure(size, config):
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "corpus.sqlite"
        start = time.perf_counter()
        build_index(index, "", make_passages(size, config.seed))
        build_seconds = time.perf_counter() - start
        queries, seconds = make_queries(size, config), []
        start = time.perf_counter()
        search = Search(index, top_k=3)
        open_seconds = time.perf_counter() - start
        for query in queries:
            start = time.perf_counter()
            search(query)
            seconds.append(time.perf_counter() - start)
        cuts = statistics.quantiles(seconds[100:], n=100)
        return {
            "passages": size,
            "build_seconds": build_seconds,  # with making the passages up
            "megabytes": index.stat().st_size / 1e6,
            "open_seconds": open_seconds,
            "ms_median": 1000 * cuts[49],
            "ms_p99": 1000 * cuts[98],
            "ms_max": 1000 * max(seconds[100:]),
            # of the process so far
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def main(config: Config):
    report = {
        "command": "python benchmarks/search_speed.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, SQLite {sqlite3.sqlite_version}",
        "sizes": [],
    }
    for size in config.sizes:
        report["sizes"].append(measure(size, config))
        print(json.dumps(report["sizes"][-1]), flush=True)
    config.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
