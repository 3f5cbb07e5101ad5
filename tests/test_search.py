"""The tool: what the search finds, what it makes of odd queries and corpora,
and what an index survives."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, chat_template, load_experiment
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_sampling import CHATML, make_tokenizer
from transformers.utils import get_json_schema

search_module = load_experiment("experiment_multiturn_qa").search
build_index, Search, parse_call, run_call = (
    getattr(search_module, name) for name in ("build_index", "Search", "parse_call", "run_call")
)
PASSAGES = [
    ("Ann Lee", "painter born in 1954 in Port Velkar"),
    ("Ann Moss", "pilot born in Kresk"),
    ("Port Velkar", "town on the river Olt, known for its no-tank engines"),
    ("The Final", "Velkar beat Kresk 55:54; it wasn't close to O'Brien's record"),
    ("北京", "北京是中国的首都。"),
    ("上海", "上海是中国最大的城市。"),
    ("กรุงเทพ", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"),
    ("เชียงใหม่", "เชียงใหม่เป็นจังหวัดในภาคเหนือของประเทศไทย"),
    ("မြန်မာ", "ရန်ကုန်မြို့"),
    ("Straße", "Die längste Straße heißt Lange Gasse"),
]


def index_of(folder, passages=PASSAGES, top_k=3, digest="1"):
    build_index(folder / "corpus.sqlite", digest, passages)
    return Search(folder / "corpus.sqlite", top_k)


def titles(search, query):
    return [title for title, _ in search.passages(query)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return index_of(tmp_path_factory.mktemp("index"))


@cache
def ten_thousand():
    """An index of 10,000 passages of 40 words whose frequencies fall as 1 / rank;
    and the words, commonest first."""
    rng = random.Random(0)
    words = [f"{rng.choice('bdgklmnprst')}{rng.choice('aeiou')}{n:x}" for n in range(20_000)]
    weights = [1 / (n + 3) for n in range(len(words))]
    passages = [(f"title{i}", " ".join(rng.choices(words, weights, k=40))) for i in range(10_000)]
    with tempfile.TemporaryDirectory() as folder:
        return index_of(Path(folder), passages), words  # stays open


# ---------------------------------------------------------------- queries
@pytest.mark.parametrize(
    "query, title",
    [
        ("Ann Lee", "Ann Lee"),
        ("ANN lee", "Ann Lee"),
        ("Where was Ann Lee born?", "Ann Lee"),
        ('"Ann Lee"', "Ann Lee"),
        ("What's O'Brien's record?", "The Final"),
        ("55:54", "The Final"),
        ("no-tank", "Port Velkar"),
        ("engine", "Port Velkar"),  # its stem
        ("Port Velkar", "Port Velkar"),  # a word in a title counts more than one in a text
        ("strasse längste", "Straße"),
        ("LANGSTE", "Straße"),  # without diacritics
        ("中国的首都", "北京"),
        ("最大的城市是哪里？", "上海"),
        ("北", "北京"),
        ("เมืองหลวงของไทย", "กรุงเทพ"),
        ("จังหวัดในภาคเหนือ", "เชียงใหม่"),
        ("ရန်ကုန်", "မြန်မာ"),
    ],
)
def test_questions_as_people_type_them(query, title, small):
    """Pitfall 31: raw text in MATCH raises, and the default AND finds nothing.
    Any one word is enough."""
    assert titles(small, query)[0] == title
    assert titles(small, f"{query} zzzz qqqq")[0] == title


@pytest.mark.parametrize(
    "query",
    [
        "",
        " ",
        "?",
        "zzzz",
        '"',
        "''",
        "\x00",
        "\ud800",
        "()",
        "AND",
        "NOT",
        "*",
        "NEAR(",
        "ัั",
        "_",
        "-",
        "\\",
    ],
)
def test_a_query_that_finds_nothing_gives_a_text(query, small):
    assert small(query) == search_module.NOTHING
    assert run_call({"query": query}, small) == ("failed", search_module.NOTHING)


@pytest.mark.parametrize(
    "query",
    ["title:Ann", "Ann*", "Ann AND pilot", "Ann NOT Lee", "-Ann", "^Ann", "NEAR(Ann Lee)", "{Ann}"],
)
def test_nothing_in_a_query_is_syntax(query, small):
    assert "Ann Lee" in titles(small, query) and "Ann Moss" in titles(small, query)


def test_a_result_is_a_line_for_each_passage(tmp_path):
    search = index_of(
        tmp_path, [("A\nb", "one\n\ntwo   three"), ("C", "one"), ("", "one")], top_k=2
    )
    result = search("one")
    assert result.count("\n") == 1 and set(result.split("\n")) <= {
        "A b: one two three",
        "C: one",
        ": one",
    }
    assert run_call({"query": "one"}, search) == ("ok", result)


def test_terms_in_more_than_a_twentieth_of_the_passages_are_dropped_unless_nothing_remains(
    tmp_path,
):
    """Counted after stemming, and only those terms count as the rest that occur at all."""
    passages = [
        (f"P{i}", f"the town{'s' if i % 2 else ''} {'rare' if i == 77 else 'x'} w{i}")
        for i in range(200)
    ]
    search = index_of(tmp_path, passages, top_k=5)
    assert search.count("town") == search.count("towns") == 200 and search.count("rare") == 1
    assert search.choose_terms("the rare town") == ["rare"] and titles(search, "the rare town") == [
        "P77"
    ]
    assert search.choose_terms("the w5 w6") == ["w5", "w6"]
    assert {*search.choose_terms("the town")} == {"the", "town"} and len(
        titles(search, "the town")
    ) == 5
    assert {*search.choose_terms("the town nowhere")} == {"the", "town"}


def test_in_a_small_corpus_no_term_is_common(small):
    """Bug: in a corpus of ten passages every term that occurs stands in more than a twentieth of
    them."""
    assert {*small.choose_terms("Ann Lee")} == {"Ann", "Lee"}


def test_rare_terms_come_first_and_bound_what_is_read(tmp_path, monkeypatch):
    passages = [
        (f"P{i}", " ".join(f"w{n}" for n in range(1, 9) if i % (20 * n) == 0) or "x")
        for i in range(2000)
    ]
    search = index_of(tmp_path, passages)
    assert [search.count(f"w{n}") for n in (1, 2, 4)] == [100, 50, 25]
    monkeypatch.setattr(search_module, "MAX_POSTINGS", 60)
    # 13 + 25, and 50 more would be too many
    assert search.choose_terms("w1 w2 w4 w8") == ["w8", "w4"]
    monkeypatch.setattr(search_module, "MAX_POSTINGS", 1)
    assert search.choose_terms("w1 w2 w4") == ["w4"]


FRAGMENTS = st.sampled_from(
    [
        '"',
        "'",
        "AND",
        "NEAR(",
        "中国",
        "ไทย",
        "\x00",
        "*",
        "title:",
        "bo1f",
        "the",
        "-",
        "(",
        "\ud800",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(st.one_of(FRAGMENTS, st.text(max_size=5))).map("".join),
        st.text().map(lambda t: t * 200),
    )
)
@example("ba" * 100_000)
@example(" ".join(f"w{i}" for i in range(10_000)))
@example("中" * 100_000)
@example("\u0e31" * 5000)
def test_any_text_is_a_query(text):
    """Never an exception, and never more than 100 ms on 10,000 passages: of this thread's time, and
    of three tries, so that a busy machine does not matter."""
    search, _ = ten_thousand()
    seconds = []
    while len(seconds) < 3 and not min(seconds, default=1) < 0.1:
        start = time.thread_time()
        assert isinstance(search(text), str)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.1


def test_queries_of_common_words_read_no_more_than_others():
    search, words = ten_thousand()
    for query in (" ".join(words[:32]), " ".join(words[10:42]), " ".join(words[100:132])):
        terms = search.choose_terms(query)
        assert search(query) != search_module.NOTHING
        assert len(terms) == 1 or sum(map(search.count, terms)) <= search_module.MAX_POSTINGS


# ---------------------------------------------------------------- the index
def test_the_index_is_opened_read_only(small):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        small.connection.execute("DELETE FROM passages")


def test_it_is_built_once_and_again_when_the_corpus_changes(tmp_path):
    index = tmp_path / "corpus.sqlite"
    build_index(index, "1", PASSAGES)
    before = index.stat().st_mtime_ns, index.stat().st_ino
    build_index(index, "1", None)  # is not read
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == before
    reader = Search(index, 3)
    build_index(index, "2", [("Ann Lee", "another one")])
    assert (
        titles(Search(index, 3), "Ann") == ["Ann Lee"] and len(titles(reader, "Ann")) == 2
    )  # who reads has the old one
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.sqlite"]


def test_a_file_that_is_no_index_is_left_alone(tmp_path):
    """Bug: --index-path, or a database of the user's beside the data, overwritten."""
    index = tmp_path / "corpus.sqlite"
    for make in (lambda: index.write_bytes(b"mine"), lambda: index.unlink(), index.mkdir):
        make()
        if index.exists():
            with pytest.raises(
                SystemExit, match="corpus.sqlite: exists and is no index of a corpus; move it away"
            ):
                build_index(index, "1", PASSAGES)
    with sqlite3.connect(tmp_path / "mine.db") as connection:
        connection.execute("CREATE TABLE corpus(mine)")
    with pytest.raises(SystemExit, match="mine.db: exists and is no index"):
        build_index(tmp_path / "mine.db", "1", PASSAGES)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(
        SystemExit, match=r"missing/corpus.sqlite: the index cannot be written .*; --index-path"
    ):
        build_index(tmp_path / "missing" / "corpus.sqlite", "1", PASSAGES)


BUILDER = """
import sys
sys.path.insert(0, sys.argv[1])
import search
from pathlib import Path

def passages(count):
    for i in range(count):
        yield f"title {i}", " ".join(f"w{i * 7919 % (n + 2)}" for n in range(40))

search.build_index(Path(sys.argv[2]), sys.argv[3], passages(int(sys.argv[4])))
print(len(search.Search(Path(sys.argv[2]), 3).passages("w1")))
"""


def start_builder(index, digest="1", count=60_000):
    command = [
        sys.executable,
        "-c",
        BUILDER,
        str(ROOT / "experiment_multiturn_qa"),
        str(index),
        digest,
        str(count),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for_leftovers(folder):
    for _ in range(6000):
        found = [path for path in folder.glob("*.building") if path.stat().st_size > 100_000]
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("nothing is being built")


def test_kill_while_it_is_built(tmp_path):
    """kill -9 leaves the old index, which still answers, and a file that the next build deletes."""
    index = tmp_path / "corpus.sqlite"
    build_index(index, "old", PASSAGES)
    process = start_builder(index, "new", 10**7)
    (leftover,) = wait_for_leftovers(tmp_path)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert titles(Search(index, 3), "Ann Lee")[0] == "Ann Lee" and leftover.exists()
    os.utime(leftover, (0, 0))
    build_index(index, "newest", [*PASSAGES, ("Ann Z", "x")])
    assert len(titles(Search(index, 3), "Ann")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.sqlite"]


def test_two_processes_build_at_once(tmp_path):
    """Neither deletes what the other one writes; both find everything."""
    index = tmp_path / "corpus.sqlite"
    processes = [start_builder(index) for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=60)[0] == "3\n" and process.returncode == 0
    assert Search(index, 3).size == 60_000 and [path.name for path in tmp_path.iterdir()] == [
        "corpus.sqlite"
    ]


def test_what_another_process_holds_locked_is_no_leftover(tmp_path):
    """However old it looks: a large corpus may take more than the minute that leftovers are left
    alone."""
    path = tmp_path / "corpus.sqlite.1.building"
    with closing(sqlite3.connect(path, isolation_level=None)) as builder:
        builder.execute("CREATE TABLE passages(title)")
        builder.execute("BEGIN EXCLUSIVE")
        os.utime(path, (0, 0))
        build_index(tmp_path / "corpus.sqlite", "1", PASSAGES)
        assert path.exists()
    os.utime(path, (0, 0))
    build_index(tmp_path / "corpus.sqlite", "2", PASSAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.sqlite"]


# ---------------------------------------------------------------- the corpus
def corpus(folder, *lines):
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    (folder / "questions.json").write_text("[]")
    return str(folder / "questions.json")


def config_of(data_path, **changes):
    return SimpleNamespace(**{"data_path": data_path, "index_path": None, "top_k": 3, **changes})


GOOD = json.dumps({"id": 1, "title": "Ann", "text": "one"})


def test_a_corpus_that_is_not_utf_8(tmp_path):
    """Bug: an "\u00e9" of Latin-1 becomes a question mark in the index, without a word."""
    data = corpus(tmp_path, GOOD)
    with open(tmp_path / "corpus.jsonl", "ab") as file:
        file.write('\n{"text": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(SystemExit, match="corpus.jsonl, line 2: not valid JSON in UTF-8"):
        search_module.open_search(config_of(data), [])


def test_a_corpus_beside_the_questions(tmp_path):
    data = corpus(
        tmp_path,
        GOOD,
        "",
        json.dumps({"id": "b2", "text": "two"}),
        json.dumps({"text": "half a pair \ud83d"}),
    )
    search = search_module.open_search(config_of(data), [])
    assert (
        search("one") == "Ann: one"
        and search("two") == "b2: two"
        and search("pair") == ": half a pair ?"
    )
    assert (tmp_path / "corpus.sqlite").exists()
    corpus(tmp_path, GOOD.replace("Ann", "Bob"))
    assert search_module.open_search(config_of(data), [])("one") == "Bob: one"
    elsewhere = search_module.open_search(config_of(data, index_path=str(tmp_path / "x.db")), [])
    assert elsewhere("one") == "Bob: one" and (tmp_path / "x.db").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": 1, "text": ', "not valid JSON"),
        ("[1]", 'expected {"id"'),
        ('{"id": 1, "title": "Ann"}', "with a text"),
        ('{"id": 1, "title": "Ann", "text": " "}', "with a text"),
        ('{"id": 1, "title": "Ann", "text": ["one"]}', "with a text"),
        ('{"id": 1, "title": ["Ann"], "text": "one"}', "field 'title' must be text"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_line_of_a_corpus_is_named(line, message, tmp_path):
    data = corpus(tmp_path, GOOD, "", line)
    with pytest.raises(SystemExit, match=r"corpus.jsonl, line 3: ") as error:
        search_module.open_search(config_of(data), [])
    assert message in str(error.value) and not list(tmp_path.glob("*sqlite*"))


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"corpus.sqlite: its corpus has no passages"):
        search_module.open_search(config_of(corpus(tmp_path, "")), [])


def test_contexts_become_the_corpus(tmp_path):
    rows = [
        ("q.json, line 2", {"chunk_id": "a1", "context": "Ann is a painter."}),
        ("q.json, line 3", {"chunk_id": "a1", "context": "Ann is a painter."}),  # the same again
        ("q.json, line 4", {"context": "Bob is a painter."}),
    ]
    data = tmp_path / "q.json"
    data.write_text("[]")
    search = search_module.open_search(config_of(str(data)), rows)
    assert (
        search.size == 2
        and search("Ann") == "a1: Ann is a painter."
        and (tmp_path / "q.sqlite").exists()
    )
    rows.append(("q.json, line 5", {"context": ["a", "list"]}))
    with pytest.raises(
        SystemExit, match="q.json, line 5: field 'context' must be text, or a corpus.jsonl"
    ):
        search_module.open_search(config_of(str(data)), rows)


# ---------------------------------------------------------------- calls
def call(name="search", **arguments):
    body = json.dumps({"name": name, "arguments": arguments or {"query": "Ann"}})
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize(
    "turn",
    [
        call(),
        call().replace("\n", " "),
        f"I look it up. {call()} Wait.",
        f"<think>{call(query='x')}</think>{call()}",
        '<tool_call>{"name": "search", "parameters": {"query": "Ann"}}</tool_call>',
    ],
)
def test_calls(turn, small):
    assert parse_call(turn) == {"query": "Ann"} and run_call(parse_call(turn), small)[0] == "ok"


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "Ann",
        "<answer>Ann</answer>",
        f"<think>{call()}</think>",
        f"<think>{call()}",
        "</tool_call>",
    ],
)
def test_turns_without_a_call_in_them(turn):
    assert parse_call(turn) is None


@pytest.mark.parametrize(
    "turn, error",
    [
        (call() + call(), "one call a turn"),
        ("<tool_call>{}", "the call is not closed"),
        ("<tool_call>search(Ann)</tool_call>", "not valid JSON"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "not valid JSON"),
        ("<tool_call>[]</tool_call>", "unknown tool"),
        (call(name="calculator"), "unknown tool"),
        (call(query=1), "wrong arguments"),
        (call(query="a", k=5), "wrong arguments"),
        (call(expression="a"), "wrong arguments"),
    ],
)
def test_malformed_calls_say_what_is_expected(turn, error, small):
    outcome, result = run_call(parse_call(turn), small)
    assert outcome == "malformed" and result == f"Error: {error}, {search_module.EXPECTED}"


def test_the_expected_form_and_a_broken_search():
    expected = search_module.EXPECTED.removeprefix("expected ")
    assert parse_call(f"<tool_call>{expected}</tool_call>") == {"query": "a name"}
    assert run_call({"query": "Ann"}, search_module.broken) == ("failed", search_module.BROKEN)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_the_description_is_the_templates_own(name):
    tokenizer = make_tokenizer(chat_template(name), CHATML)
    tools = [get_json_schema(search_module.search)]
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert f"S{search_module.TOOL_PROMPT}" in tokenizer.apply_chat_template(
        chat, tools=tools, tokenize=False
    )
