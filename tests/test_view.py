"""tools/view.py: what is read, what is refused, the page in a browser, and --serve."""

import base64
import gzip
import hashlib
import importlib.util
import json
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
spec = importlib.util.spec_from_file_location("view", ROOT / "tools" / "view.py")
view = importlib.util.module_from_spec(spec)
spec.loader.exec_module(view)
sys.path.remove(str(ROOT / "tools"))

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "javascript:window.hacked=1",
    "{{data}} {{policy}} <!-- ]]>",
    "\u202eevil\u202c",
    "\ud800 half of a pair",
    "\U000e0041\u3164\u2800\u180e",
    "x" * 300,
    "\x00\x1b[31m",
    "שלום",
    "`${window.hacked = 1}`",
]


def completion(tokens: list[str], push: float = 0.1, given: tuple[int, ...] = (), **more) -> dict:
    """A completion as completions.jsonl has it; the tokens at `given` come from a tool."""

    def column(value) -> list:
        return [None if i in given else value for i in range(len(tokens))]

    return {
        "text": "".join(tokens),
        "ids": list(range(len(tokens))),
        "tokens": tokens,
        "mask": [int(i not in given) for i in range(len(tokens))],
        "sampled_log_probs": column(-1.0),
        "new_log_probs": column(-0.5 if push > 0 else -2.0),
        "old_log_probs": column(-1.0),
        "reference_log_probs": column(-1.5),
        "weight": column(0.01),
        "ratio": column(1.3),
        "clipped": column(float(push > 0)),
        "kl": column(0.1),
        "push": column(push),
        "update": 2,
        **more,
    }


def group_of(step: int, completions: list[dict], group: int = 0, **more) -> dict:
    count = len(completions)
    return {
        "step": step,
        "group": group,
        "groups": 16,
        "prompt": "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n",
        "answer": "2",
        "rewards": [float(i) for i in range(count)],
        "advantages": [i - (count - 1) / 2 for i in range(count)],
        "reward_parts": {"reward_accuracy": [float(i) for i in range(count)]},
        "truncated": [0.0] * count,
        "prompt_ids": [1, 2, 3],
        "completions": completions,
        **more,
    }


def scores_of(step: int, sampled_step: int, group: int, log_probs: list) -> dict:
    return {"step": step, "sampled_step": sampled_step, "group": group, "log_probs": log_probs}


def write_run(folder: Path, lines: list[dict], steps: int = 20) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": 0, "eval_accuracy": 0.5}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "reward": step / steps, "kl": None, "unheard_of": 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "completions.jsonl").write_text(text)
    return folder


def two_steps() -> list[dict]:
    alternatives = [[[5, "four", -0.7, -0.1], [6, " 5", -1.2, -3.0]], None, None]
    completions = [
        completion(["two", "\n", "<end>"], -0.2),
        completion(["4", "tool", " ok"], 0.3, given=(1,), alternatives=alternatives),
    ]
    again = [[-1.5] * 3, [-0.2, None, -0.1]]
    return [
        group_of(1, completions),
        group_of(10, completions[::-1]),
        scores_of(10, 1, 0, again),
    ]


# ---------------------------------------------------------------- reading
def unpacked(text: str) -> list[dict]:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_what_the_page_is_given(tmp_path):
    lines = two_steps()
    run = write_run(tmp_path / "a", lines)
    data = view.data_of((run,))
    (found,) = data["runs"]
    assert found["name"] == "a" and len(found["rows"]) == 21
    assert {step: unpacked(text) for step, text in found["steps"].items()} == {
        1: lines[:1],
        10: lines[1:2],
    }
    assert unpacked(found["scores"]) == lines[2:]
    assert [group["step"] for group in found["prompts"]] == [1, 10]
    assert found["prompts"][0]["prompt"] == found["prompts"][1]["prompt"]
    assert data["readings"]["reward"].startswith("Mean reward")
    assert data["readings"]["unheard_of"] == "" and "step" not in data["readings"]


def test_rotated_files_are_read_in_order(tmp_path):
    run = write_run(tmp_path / "a", two_steps()[1:])
    (run / "completions.2.jsonl").write_text(json.dumps(group_of(9, [completion(["b"])])) + "\n")
    (run / "completions.1.jsonl").write_text(json.dumps(group_of(1, [completion(["a"])])) + "\n")
    for other in ("old", "1.backup", "2024.old", "0", "01"):
        (run / f"completions.{other}.jsonl").write_text("nothing of ours")
    (run / "completions.3.jsonl").mkdir()
    assert [row["step"] for row in view.read_completions(run)] == [1, 9, 10, 10]


def test_a_run_that_is_still_written(tmp_path):
    run = write_run(tmp_path / "a", two_steps())
    with open(run / "completions.jsonl", "a") as file:
        file.write('{"step": 20, "group": 0, "prom')
    assert [row["step"] for row in view.read_completions(run)] == [1, 10, 10]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = (write_run(tmp_path / "a" / "x", []), write_run(tmp_path / "b" / "x", []))
    assert view.names_of(runs) == [str(run) for run in runs]
    assert view.names_of(runs[:1]) == ["x"]


def broken(**changes) -> str:
    """A line with one completion, of which something is changed."""
    return json.dumps(group_of(1, [{**completion(["a"]), **changes}]))


BROKEN = [
    "{}",
    "[]",
    "nothing",
    '{"step": 1, "group": 0}',
    '{"step": 1e999, "group": 0}',
    json.dumps({**group_of(1, [completion(["a"])]), "step": "1"}),
    json.dumps(group_of(1, [{"text": "a"}])),
    json.dumps(group_of(1, [3])),
    json.dumps(group_of(1, [completion(["a"])], rewards=None)),
    json.dumps(group_of(1, [completion(["a"])], reward_parts={"x": None})),
    broken(tokens=[1]),
    broken(tokens=[]),
    broken(mask=[1, 1]),
    broken(alternatives=[[1, 2]]),
    broken(alternatives=[[[1, None, 0, 0]]]),
    json.dumps({"step": 1, "group": 0, "sampled_step": 1, "log_probs": None}),
    json.dumps({"step": 1, "group": 0, "sampled_step": 1, "log_probs": ["x"]}),
    "[" * 100_000,
]


@pytest.mark.parametrize("line", BROKEN, ids=[line[-30:] for line in BROKEN])
def test_a_broken_line_is_named_and_left_out(line, tmp_path, capsys):
    run = write_run(tmp_path / "a", [])
    lines = [json.dumps(row) for row in two_steps()]
    (run / "completions.jsonl").write_text(
        "\ufeff" + "\n\n".join([lines[0], line, *lines[1:]]) + "\n"
    )
    assert view.read_completions(run) == two_steps()
    assert "completions.jsonl, line 3: 1 lines are left out" in capsys.readouterr().err


def test_numbers_that_json_does_not_have(tmp_path):
    """Bug: a page that its browser cannot read, said to be written."""
    run = write_run(tmp_path / "a", [group_of(1, [completion(["a"], kl=[float("nan")])])])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "reward": NaN}\n{"step": 22, "reward": 1e999}\n')
    page = view.page_of(view.data_of((run,)), followed=False)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0], parse_constant=pytest.fail)
    assert [row["reward"] for row in data["runs"][0]["rows"][-2:]] == [None, None]
    assert unpacked(data["runs"][0]["steps"]["1"])[0]["completions"][0]["kl"] == [None]


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(runs=()), "name at least one run"),
        (dict(runs=(Path("nowhere"),)), "metrics.jsonl: no such file"),
        (dict(output=Path("nowhere/view.html")), "--output nowhere/view.html: No such file"),
        (dict(serve=True, port=70000), "--port 70000"),
    ],
)
def test_refusals(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "a", two_steps())
    with pytest.raises(SystemExit) as refusal:
        view.main(view.Options(**{"runs": (run,), **options}))
    assert said in str(refusal.value)


def test_the_page_lets_its_own_script_run_alone(tmp_path, capsys):
    lines = [group_of(1, [completion(HOSTILE)], prompt="".join(HOSTILE), answer=HOSTILE[1])]
    run = write_run(tmp_path / "a", lines)
    view.main(view.Options((run,)))
    page = (run / "view.html").read_text("utf-8")
    assert "view.html" in capsys.readouterr().out
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    data = page.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data and json.loads(data)["runs"][0]["name"] == "a"
    assert len(re.findall("<script", page)) == 2
    for word in ("http://", "https://", "src="):
        assert word not in page.replace("http://www.w3.org/2000/svg", "")


# ---------------------------------------------------------------- a browser
@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium; on Debian: apt install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], handle_sigint=False
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function: lines of completions.jsonl -> the page, in a browser that must not complain."""
    said = []
    pages = []

    def open_page(*runs: list[dict], width: int = 1200, scheme: str = "light", url: str = ""):
        folders = tuple(
            write_run(tmp_path / f"run{i}", lines) if isinstance(lines, list) else lines
            for i, lines in enumerate(runs)
        )
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append("dialog"))
        if not url:
            view.main(view.Options(folders))
            url = (folders[0] / "view.html").as_uri()
        page.goto(url)
        page.wait_for_selector(".tokens, #groups p")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


def shows_step(page, step: int) -> None:
    page.wait_for_selector(f"#step-title:text-is('Completions of step {step}')")


def background(page, token: str) -> str:
    return page.eval_on_selector(token, "element => element.style.background")


FIRST = "#groups .card .card:nth-child(1) .token:nth-child(1)"
SECOND = "#groups .card .card:nth-child(2) .token:nth-child(1)"


def test_curves_tokens_and_colours(opened):
    page = opened(two_steps())
    assert page.title() == "run0: GRPO"
    assert page.inner_text("#step-title") == "Completions of step 1"
    names = page.eval_on_selector_all("#curves h3", "all => all.map(one => one.textContent)")
    assert names == ["eval_accuracy", "reward", "kl"]
    assert page.locator("#curves .mark").count() == 4
    assert "not in this run" in page.inner_text("#curves .card:nth-child(3)")  # kl is null
    assert "--down" in background(page, FIRST) and "--up" in background(page, SECOND)
    seen = {background(page, SECOND)}
    for colour in ("sampled", "push", "ratio", "kl", "weight"):
        page.select_option("#colour", colour)
        seen.add(background(page, SECOND))
        assert page.inner_text("#legend")
    assert len(seen) >= 3  # of which those of kl and weight may be alike
    summary = page.inner_text("#summary")
    assert "2 tokens alike, such as 4, in group 0, completion 1, up (push +0.3)" in summary
    assert "3 tokens alike, such as two, in group 0, completion 0, from 36.8 % to 13.5 %" in summary
    assert "1 of the 16 groups" in page.inner_text("#which")
    page.select_option("#sort", "reward, best first")
    assert page.inner_text("#groups .card .card:nth-child(1) h3") == "Completion 1"
    given = page.locator("#groups .token.given").first
    assert given.inner_text() == "tool" and given.get_attribute("style") == (
        "background: transparent;"
    )
    assert "2 turns" in page.inner_text("#groups .card .card:nth-child(1)")


def test_hovering_tells_the_numbers_and_the_alternatives(opened):
    page = opened(two_steps())
    page.hover(SECOND)
    tip = page.inner_text("#tip")
    for part in ("4", "log-prob when sampled", "-1 (36.8 %)", "+0.5", "1.3, clipped", "four"):
        assert part in tip
    assert "49.7 %" in tip and "90.5 %" in tip  # of an alternative, before and after
    page.hover("#groups .token.given")
    assert "not in the loss" in page.inner_text("#tip")
    page.hover("#curves .card:nth-child(2) svg")
    assert re.search(r"reward\s*run0 step \d+: [\d.]+", page.inner_text("#tip"))


def test_the_keyboard(opened):
    page = opened(two_steps())
    page.focus("#groups .tokens")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".token.chosen") == "↵\n"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text(".token.chosen") == "two" and "two" in page.inner_text("#tip")
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("n")
    shows_step(page, 10)
    assert not page.is_visible("#tip")  # of a token that is no longer there
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".token.chosen") == "4"  # the same completion's place has the focus
    page.keyboard.press("p")
    shows_step(page, 1)


def test_the_same_group_over_time(opened):
    page = opened(two_steps())
    page.wait_for_selector("#followed .tokens")
    assert page.inner_text("#followed h3 >> nth=0") == "Group 0 of step 1: What is 1 + 1?"
    text = page.inner_text("#followed")
    assert "1 that were better than their group: mean log-prob -2 when sampled, -0.3 after" in text
    assert "1 that were worse than their group: mean log-prob -3 when sampled, -4.5 after" in text
    assert not page.is_visible("#compared")
    page.click("#step-buttons button:nth-child(2)")
    shows_step(page, 10)
    compared = page.inner_text("#compared")
    assert "What has changed from step 1 to step 10" in compared
    assert re.search(r"reward\s+0.05\s+0.5\s+\+0.45\s+Mean reward", compared)
    page.click("#groups button >> text=1")  # the same prompt in another step
    shows_step(page, 1)


def test_the_token_that_is_named_can_be_shown(opened):
    page = opened(two_steps())
    page.click("#summary button >> nth=0")
    assert page.inner_text(".token.chosen") == "4" and page.is_visible("#tip")


def test_a_mark_on_a_curve_opens_its_step(opened):
    page = opened(two_steps())
    page.click("#curves .card:nth-child(2) .mark[data-step='10']", force=True)
    page.wait_for_selector("#curves .mark.now[data-step='10']")
    shows_step(page, 10)


def test_many_steps(opened):
    """They are in a list, and the rest of the page does not unpack them all."""
    lines = []
    for step in range(1, 61):
        lines += [{**line, "step": step} for line in two_steps()[:1]]
        lines += [scores_of(step, 1, 0, two_steps()[2]["log_probs"])] if step > 1 else []
    page = opened(lines)
    page.click("#step-buttons button[title=next]")
    shows_step(page, 2)
    page.select_option("#step-buttons select", "60")
    shows_step(page, 60)
    page.wait_for_selector("#followed .tokens")
    assert "after step 60" in page.inner_text("#followed")


def test_several_runs(opened):
    page = opened(two_steps(), [], two_steps()[:1])
    assert page.locator("#runs button").count() == 3
    assert page.locator("#curves .card:nth-child(2) svg > path[fill=none]").count() == 3
    page.click("#runs button:nth-child(2)")
    assert "This run has no completions.jsonl" in page.inner_text("#groups")
    assert not page.is_visible("#over-time")
    page.click("#runs button:nth-child(3)")
    page.wait_for_selector("#groups .tokens")
    assert page.inner_text("#step-title") == "Completions of step 1 of run2"


def test_nothing_of_a_model_runs_in_the_page(opened):
    texts = "".join(HOSTILE)
    group = group_of(
        1,
        [completion(HOSTILE), completion(HOSTILE[::-1])],
        prompt=texts,
        answer=texts,
        reward_parts={texts: [0.0, 1.0]},
    )
    page = opened([group])
    page.hover(FIRST)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#groups img, #groups script, #tip script").count() == 0
    shown = page.inner_text("#groups")
    for part in ("<script>window.hacked = 1</script>", "U+202E", "U+D800", "U+001B", "שלום"):
        assert part in shown
    for part in ("U+E0041", "U+3164", "U+2800", "U+180E"):
        assert part in shown


def test_very_long_completions(opened):
    """100,000 tokens of one completion: some are shown, and a button shows more."""
    page = opened([group_of(1, [completion(["word "] * 100_000), completion(["x"])])])
    assert page.locator("#groups .token").count() == 1501
    page.click("#groups .tokens button")
    assert page.locator("#groups .token").count() == 3001
    assert "1500 of 97000 more" in page.inner_text("#groups .tokens button")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(opened, scheme):
    """Nothing is wider than the screen, and text stands out from what is behind it."""
    hostile = "".join(HOSTILE)
    group = group_of(20, [completion(HOSTILE)] * 2, prompt=hostile, answer=hostile)
    page = opened([*two_steps(), group], width=360, scheme=scheme)
    page.click("#step-buttons button[value='20']")
    shows_step(page, 20)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    text, back = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (text, back)]
    assert abs(bright[0] - bright[1]) > 400 and (bright[0] > bright[1]) == (scheme == "dark")
    page.click(SECOND)
    assert page.is_visible("#tip")


# ---------------------------------------------------------------- --serve
@pytest.fixture
def served(tmp_path):
    run = write_run(tmp_path / "served", two_steps()[:1])
    handler = view.partial(view.Handler, (run,))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield run, f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def get(url: str, **headers) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_what_is_served(served):
    run, url = served
    assert get(url + "/")[1].startswith("<!doctype html>")
    status, text = get(url + "/data")
    version = json.loads(text)["version"]
    assert status == 200 and list(json.loads(text)["runs"][0]["steps"]) == ["1"]
    assert get(f"{url}/data?have={version}") == (204, "")
    with open(run / "completions.jsonl", "a") as file:
        file.write(json.dumps(two_steps()[1]) + "\n")
    status, text = get(f"{url}/data?have={version}")
    assert status == 200 and list(json.loads(text)["runs"][0]["steps"]) == ["1", "10"]
    assert get(url + "/../../etc/passwd")[0] == 404
    assert get(url + "/", Host="evil.example:80")[0] == 403  # a name that was rebound
    (run / "metrics.jsonl").unlink()
    assert get(f"{url}/data")[0] == get(url + "/")[0] == 500  # and it goes on


def test_a_page_that_follows_a_run(opened, served):
    run, url = served
    page = opened(run, url=url)
    assert "New steps appear by themselves" in page.inner_text("#server")
    assert page.locator("#step-buttons button").count() == 1
    page.click("#groups summary")  # what is open stays open, and what is chosen stays chosen
    page.click("#groups .token >> nth=0")
    with open(run / "completions.jsonl", "a") as file:
        file.write(json.dumps(two_steps()[1]) + "\n")
    page.wait_for_selector("#step-buttons button:nth-child(2)")
    assert page.inner_text("#step-title") == "Completions of step 1"
    assert page.is_visible("#groups pre") and page.locator(".token.chosen").count() == 1
