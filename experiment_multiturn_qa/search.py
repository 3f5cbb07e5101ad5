"""The tool: full-text search over a corpus, SQLite FTS5 ranked by bm25,
and what the model is told of it.

The index is a file beside the corpus, built once and again when the corpus has changed, opened
read-only for queries. A query is text as people and models write it: nothing in it is syntax, and
none raises.
"""

import glob
import hashlib
import itertools
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path

from calls import describe_tool, parse_tool_call
from run import fail

NOTHING = "No passage found."  # the result where no term of a query occurs
COMMON = 0.05  # terms in more than this fraction of the passages are dropped from queries ...
# ... and in more than this many, or a corpus of ten passages would drop every term that it has
COMMON_PASSAGES = 5
# terms in more passages are counted when the index is built, the others when they are asked for
FREQUENT = 100
MAX_CHARACTERS = 1000  # of a query; the rest is not looked at
MAX_TERMS = 32  # of a query
MAX_POSTINGS = 5_000  # that a query reads, its rarest terms first; its time is linear in them
TITLE_WEIGHT = 4.0  # of a word in the title, where one in the text has 1
TOKENIZER = "porter unicode61"
VERSION = "1"  # of the tables below: a new one builds every index anew
TABLES = f"""
CREATE TABLE passages(id INTEGER PRIMARY KEY, title TEXT, text TEXT);
CREATE VIRTUAL TABLE words USING fts5(title, text, content='', tokenize='{TOKENIZER}');
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(words, 'row');
CREATE TABLE frequent(term TEXT PRIMARY KEY, passages INTEGER) WITHOUT ROWID;
CREATE TABLE corpus(digest TEXT, passages INTEGER);
"""
# One character is a term in scripts that put no spaces between words: Thai, Lao, Burmese,
# Khmer, kana, Chinese
NO_SPACES = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
RUN_OR_WORD = re.compile(rf"{NO_SPACES}+|(?:(?!{NO_SPACES})\w)+")


def split_characters(text: str) -> str:
    """The text with a space around each character of a script without spaces.
    For the index and for queries."""
    return re.sub(NO_SPACES, r" \g<0> ", text)


def query_terms(query: str) -> list[str]:
    """The different words of a query, and of each run in a script without spaces the pairs of
    neighbours, as the words of a phrase: a single character stands in half of the passages."""
    terms = []
    for found in RUN_OR_WORD.findall(query[:MAX_CHARACTERS]):
        if re.match(NO_SPACES, found):
            letters = [letter for letter in found if letter.isalnum()]  # FTS5 leaves the marks out
            pairs = zip(letters, letters[1:]) if len(letters) > 1 else [letters]
            terms += [split_characters("".join(pair)) for pair in pairs]
        else:
            terms.append(found)
    return list(dict.fromkeys(terms))[:MAX_TERMS]


# ---------------------------------------------------------------- the corpus
def read_corpus(path: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of each line of a corpus.jsonl;
    a line that is malformed ends the program with its number."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                fail(f"{path}, line {number}: not valid JSON in UTF-8 ({error})")
            if (
                not isinstance(row, dict)
                or not isinstance(row.get("text"), str)
                or not row["text"].strip()
            ):
                fail(
                    f"{path}, line {number}: "
                    'expected {"id": ..., "title": ..., "text": ...} with a text'
                )
            title = row.get("title", row.get("id", ""))
            if not isinstance(title, str | int):
                fail(f"{path}, line {number}: field 'title' must be text, is {str(title)[:50]!r}")
            yield str(title), row["text"]


def find_corpus(
    data_path: str, rows: list[tuple[str, dict]]
) -> tuple[Path, str, Iterable[tuple[str, str]]]:
    """(where the index belongs, a digest of the contents, passages) of the corpus.jsonl beside the
    questions, else of the questions' contexts, whose titles are their chunk_ids."""
    data = Path(data_path)
    corpus = data.parent / "corpus.jsonl"
    if data.is_file() and corpus.is_file():
        try:
            digest = hashlib.sha256(corpus.read_bytes()).hexdigest()
        except OSError as error:
            fail(f"{corpus}: cannot be read ({error})")
        return corpus.with_suffix(".sqlite"), digest, read_corpus(corpus)
    passages = {}
    for where, row in rows:
        if not isinstance(row.get("context"), str) or not row["context"].strip():
            fail(
                f"{where}: field 'context' must be text, "
                f"or a corpus.jsonl must lie beside {data_path}"
            )
        passages[str(row.get("chunk_id", "")), row["context"]] = None
    digest = hashlib.sha256(json.dumps([*passages]).encode()).hexdigest()
    # a hub's goes to this directory
    name = data.with_suffix("") if data.is_file() else re.sub(r"\W", "_", data_path)
    return Path(f"{name}.sqlite"), digest, passages


# ---------------------------------------------------------------- the index
def build_index(index: Path, digest: str, passages: Iterable[tuple[str, str]]) -> None:
    """Write the index of the passages, unless `index` is one of this digest.

    It is written aside, into a file that its process keeps locked, and renamed when it is whole. So
    readers have the old one or the new one, of two processes that build the later one stays, and
    what a killed one left is deleted.
    """
    digest, found = f"{VERSION} {digest}", read_digest(index)
    if found == digest:
        return
    if found is None and index.exists():
        fail(
            f"{index}: exists and is no index of a corpus; "
            "move it away, or choose another --index-path"
        )
    aside = index.with_name(f"{index.name}.{os.getpid()}.building")
    try:
        delete_leftovers(index)
        with closing(sqlite3.connect(aside, isolation_level=None)) as connection:
            connection.executescript("PRAGMA journal_mode=OFF; PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
            for statement in filter(str.strip, TABLES.split(";")):
                connection.execute(statement)
            count = 0
            for count, passage in enumerate(passages, 1):
                # Without half surrogate pairs.
                title, text = (part.encode(errors="replace").decode() for part in passage)
                connection.execute("INSERT INTO passages VALUES (?, ?, ?)", [count, title, text])
                row = [count, split_characters(title), split_characters(text)]
                connection.execute("INSERT INTO words(rowid, title, text) VALUES (?, ?, ?)", row)
            if not count:
                fail(f"{index}: its corpus has no passages")
            connection.execute("INSERT INTO words(words) VALUES ('optimize')")
            connection.execute(
                "INSERT INTO words(words, rank) VALUES ('rank', ?)", [f"bm25({TITLE_WEIGHT}, 1.0)"]
            )
            connection.execute(
                "INSERT INTO frequent SELECT term, doc FROM vocabulary WHERE doc > ?", [FREQUENT]
            )
            connection.execute("INSERT INTO corpus VALUES (?, ?)", [digest, count])
            connection.execute("COMMIT")
        os.replace(aside, index)
    except (OSError, sqlite3.Error) as error:
        fail(f"{index}: the index cannot be written ({error}); --index-path puts it elsewhere")
    finally:
        aside.unlink(missing_ok=True)


def connect(index: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro", uri=True)


def read_digest(index: Path) -> str | None:
    """The digest of the corpus that an index was built from; None where it is no index."""
    try:
        with closing(connect(index)) as connection:
            return connection.execute("SELECT digest FROM corpus").fetchone()[0]
    except (sqlite3.Error, TypeError):
        return None


def delete_leftovers(index: Path) -> None:
    """Delete what killed builds of this index left:
    files that are a minute old and that no process holds locked."""
    for path in index.parent.glob(f"{glob.escape(index.name)}.*.building"):
        with suppress(FileNotFoundError), closing(sqlite3.connect(path, timeout=0)) as connection:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.DatabaseError as error:  # of a file that is locked, or that is not whole
                if "locked" in str(error):
                    continue
            if time.time() - path.stat().st_mtime > 60:
                path.unlink()


class Search:
    """The tool: a query's best passages in an index that `build_index` wrote."""

    def __init__(self, index: Path, top_k: int) -> None:
        self.top_k = top_k
        self.connection = connect(index)
        (self.size,) = self.connection.execute("SELECT passages FROM corpus").fetchone()
        self.frequent = dict(self.connection.execute("SELECT term, passages FROM frequent"))
        # FTS5's own, which it does not give away
        self.stemmer = sqlite3.connect(":memory:", isolation_level=None)
        self.stemmer.execute(
            f"CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='{TOKENIZER}')"
        )
        self.stemmer.execute("CREATE VIRTUAL TABLE vocabulary USING fts5vocab(words, 'row')")
        self.count = lru_cache(10_000)(self.count)

    def __call__(self, query: str) -> str:
        """The best passages, a line "title: text" for each,
        or a text that says that there is none."""
        lines = [" ".join(f"{title}: {text}".split()) for title, text in self.passages(query)]
        return "\n".join(lines) or NOTHING

    def passages(self, query: str) -> list[tuple[str, str]]:
        """(title, text) of the `top_k` best passages by bm25, best first;
        none where no term occurs."""
        terms = self.choose_terms(query)
        expression = " OR ".join(f'"{term}"' for term in terms)
        found = "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?"
        rows = self.connection.execute(found, [expression, self.top_k]).fetchall() if terms else []
        passage = "SELECT title, text FROM passages WHERE id = ?"
        return [self.connection.execute(passage, row).fetchone() for row in rows]

    def choose_terms(self, query: str) -> list[str]:
        """The terms of a query that occur, the rarest first: not the common ones, where there are
        others, and not more than MAX_POSTINGS allows."""
        counts = {term: self.count(term) for term in query_terms(query)}
        terms = sorted((term for term, count in counts.items() if count), key=counts.get)
        limit = max(COMMON * self.size, COMMON_PASSAGES)
        terms = [term for term in terms if counts[term] <= limit] or terms
        totals = itertools.accumulate(counts[term] for term in terms)
        return [term for term, total in zip(terms, totals) if total <= MAX_POSTINGS] or terms[:1]

    def count(self, term: str) -> int:
        """How many passages the term occurs in, after stemming; of a phrase its rarest word's."""
        self.stemmer.execute("INSERT INTO words(words) VALUES ('delete-all')")
        self.stemmer.execute("INSERT INTO words(rowid, text) VALUES (1, ?)", [term])
        stems = [stem for (stem,) in self.stemmer.execute("SELECT term FROM vocabulary")]
        return min((self.frequent.get(stem) or self.count_rare(stem) for stem in stems), default=0)

    def count_rare(self, stem: str) -> int:
        found = self.connection.execute(
            "SELECT doc FROM vocabulary WHERE term = ?", [stem]
        ).fetchone()
        return found[0] if found else 0


def open_search(config, rows: list[tuple[str, dict]]) -> Search:
    """Search over the corpus of the data, whose index is built where it is missing or old."""
    index, digest, passages = find_corpus(config.data_path, rows)
    index = Path(config.index_path or index)
    build_index(index, digest, passages)
    return Search(index, config.top_k)


# --------------------------------------------- what the policy is told, and what comes of its calls
# its only result in eval_accuracy_no_tool
BROKEN = "Error: the search does not work, answer without it"
EXPECTED = 'expected {"name": "search", "arguments": {"query": "a name"}}'


def search(query: str) -> str:  # what the description is made of; `Search` does it
    """Search a corpus of passages.

    Args:
        query: Words to look for, such as a name.
    """


TOOL_PROMPT = describe_tool(search)


def parse_call(turn: str) -> dict | str | None:
    """{"query": ...} of the call in a turn; None where it has none;
    a text that says what is wrong with it."""
    return parse_tool_call(turn, "search", "query", EXPECTED)


def broken(query: str) -> str:
    return BROKEN


def run_call(call: dict | str, tool) -> tuple[str, str]:
    """(outcome, result) of what `parse_call` found; the outcome is "ok",
    "failed" (nothing found) or "malformed"."""
    if isinstance(call, str):
        return "malformed", call
    result = tool(call["query"])
    return "failed" if result in (NOTHING, BROKEN) else "ok", result


def warn_of_cuts(prompts, config) -> None:
    """Say so where a prompt, all turns and all results may take more than --max-length."""
    longest = max(len(prompt.ids) for prompt in prompts)
    results = config.max_turns - 1
    needed = longest + config.generate_max_length + results * config.max_result_tokens
    if needed > config.max_length:
        sizes = f"a prompt of {longest}, {config.max_turns} turns and {results} results"
        may_take = f"{sizes} may take {needed} tokens"
        print(f"warning: --max-length {config.max_length}: {may_take}; later results will be cut")
