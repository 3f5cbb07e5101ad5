"""Look at runs: their curves, what was sampled, and what training does to every token.

    python tools/view.py runs/<run-name>                    # writes runs/<run-name>/view.html
    python tools/view.py runs/<run-name> runs/<other>       # overlays their curves
    python tools/view.py runs/<run-name> --serve            # follows a run that is going on

The page is one file. It needs no network and no server: open it with a double click. It shows what
metrics.jsonl and completions.jsonl hold (experiment_base/completions.py describes the latter).
Token alternatives are there where the run had --log-alternatives 5.

With --serve the page is at http://localhost:<port>, for this machine alone, and takes in new steps
every few seconds.
"""

import base64
import gzip
import hashlib
import json
import math
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import tyro
from plot import read_metrics
from readings import reading_of
from runner import fail

TEMPLATE = Path(__file__).with_name("view.html")
LOCAL = ("localhost", "127.0.0.1", "[::1]")
# What a line of completions.jsonl must have.
FIELDS = {
    "prompt": str,
    "answer": str,
    "rewards": list,
    "advantages": list,
    "reward_parts": dict,
    "truncated": list,
    "completions": list,
}


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories that hold a metrics.jsonl
    # the page; default: view.html in the first run's directory
    output: Path | None = None
    serve: bool = False  # write nothing; serve the page and follow the runs
    port: int = 8000  # of --serve


# ---------------------------------------------------------------- reading
def completion_files(run: Path) -> list[Path]:
    """completions.1.jsonl, completions.2.jsonl ... and completions.jsonl, oldest first.

    As in completions.py of the experiments, which needs torch.
    """
    numbered = {}
    for path in run.glob("completions.*.jsonl"):
        match = re.fullmatch(r"completions\.([1-9][0-9]{0,5})\.jsonl", path.name)
        if match:
            numbered[int(match[1])] = path
    files = [numbered[number] for number in sorted(numbered)] + [run / "completions.jsonl"]
    return [path for path in files if path.is_file()]


def read_completions(run: Path) -> list[dict]:
    """The lines. A last one that is half written, of a run that goes on, is left out.

    So are lines that cannot be read; of the first in each file it says so.
    """
    rows = []
    for path in completion_files(run):
        broken = []
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                row = read_line(line)
                if row is not None:
                    rows.append(row)
                elif line.endswith("\n") and line.strip():
                    broken.append(number)
        if broken:
            what = f"{len(broken)} lines are left out, which are not of completions.jsonl"
            print(f"warning: {path}, line {broken[0]}: {what}", file=sys.stderr)
    return rows


def read_line(line: str) -> dict | None:
    """A line's content; None where it is none of completions.jsonl's."""
    try:
        row = json.loads(line)
        if type(row["step"]) is not int or type(row["group"]) is not int:
            return None
        if "sampled_step" in row:
            is_list = [type(of_completion) is list for of_completion in row["log_probs"]]
            return row if type(row["sampled_step"]) is int and all(is_list) else None
        has_fields = all(type(row[name]) is kind for name, kind in FIELDS.items())
        are_whole = all(is_whole(completion) for completion in row["completions"])
        are_lists = all(type(values) is list for values in row["reward_parts"].values())
        return row if has_fields and are_whole and are_lists else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_whole(completion: dict) -> bool:
    """Whether a completion can be shown. Its numbers need not be any: the page looks."""
    tokens = completion["tokens"]
    if not len(tokens) == len(completion["ids"]) == len(completion["mask"]):
        return False
    if not all(type(token) is str for token in tokens):
        return False
    for place in completion.get("alternatives") or []:
        for _, text, _, _ in place or []:
            if type(text) is not str:
                return False
    return True


# ---------------------------------------------------------------- the page's data
def names_of(runs: tuple[Path, ...]) -> list[str]:
    """A name for each run: its directory's, or the whole path where two are alike."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def data_of(runs: tuple[Path, ...]) -> dict:
    """What the page shows: the runs, and how to read their metrics."""
    found = []
    metrics = {}
    for name, run in zip(names_of(runs), runs):
        rows = read_metrics(run)
        for row in rows:
            metrics |= dict.fromkeys(row)
        found.append({"name": name, "rows": rows, **groups_of(run)})
    metrics.pop("step", None)
    return {"runs": found, "readings": {name: reading_of(name) for name in metrics}}


def groups_of(run: Path) -> dict:
    """The groups of a run: packed by step, as the page unpacks only what is looked at."""
    steps = {}
    scores = []  # of the first groups, at later steps
    prompts = []  # which prompt each group had
    for row in read_completions(run):
        if "sampled_step" in row:
            scores.append(row)
            continue
        steps.setdefault(row["step"], []).append(row)
        digest = hashlib.sha256(row["prompt"].encode(errors="surrogatepass")).hexdigest()[:16]
        prompts.append({"step": row["step"], "group": row["group"], "prompt": digest})
    return {
        "steps": {step: packed(steps[step]) for step in sorted(steps)},
        "scores": packed(scores) if scores else None,
        "prompts": prompts,
    }


def packed(rows: list[dict]) -> str:
    """JSON, compressed, in base64: about a tenth of its size, and nothing a browser could run."""
    return base64.b64encode(gzip.compress(to_json(rows).encode(), 6, mtime=0)).decode()


def to_json(data) -> str:
    """What a browser reads as JSON: it knows no NaN and no infinity."""
    try:
        return json.dumps(data, allow_nan=False)
    except ValueError:
        return json.dumps(finite(data))


def finite(data):
    """The same with None in place of NaN and infinity."""
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def page_of(data: dict, followed: bool) -> str:
    """The whole page. followed: it asks its server for new steps.

    The data stands in an element that no browser runs, without a "<" in it; the policy that the
    page begins with lets its own script run and nothing else.
    """
    template = TEMPLATE.read_text("utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    policy += "; connect-src 'self'" if followed else ""
    content = to_json({**data, "followed": followed}).replace("<", "\\u003c")
    return template.replace("{{policy}}", policy).replace("{{data}}", content)


# ---------------------------------------------------------------- serving
def version_of(runs: tuple[Path, ...]) -> str:
    """Changes whenever a run writes something."""
    sizes = []
    for run in runs:
        for path in [run / "metrics.jsonl", *completion_files(run)]:
            status = path.stat()
            sizes.append((path.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /data its data, once it is no longer the version that is named."""

    def __init__(self, runs: tuple[Path, ...], *arguments) -> None:
        self.runs = runs
        super().__init__(*arguments)

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in LOCAL:  # another site whose name was pointed at this machine
            return self.answer(403, "text/plain", "this page is for this machine alone")
        path, _, have = self.path.partition("?have=")
        if path not in ("/", "/data"):
            return self.answer(404, "text/plain", "not found")
        try:
            self.answer_with_runs(path, have)
        except (SystemExit, OSError) as error:  # a run that was deleted, or edited by hand
            self.answer(500, "text/plain", str(error))

    def answer_with_runs(self, path: str, have: str) -> None:
        version = version_of(self.runs)
        if path == "/data" and version == have:
            return self.answer(204, "application/json", "")
        data = data_of(self.runs) | {"version": version}
        if path == "/":
            return self.answer(200, "text/html", page_of(data, followed=True))
        return self.answer(200, "application/json", to_json({**data, "followed": True}))

    def answer(self, status: int, kind: str, text: str) -> None:
        content = text.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the browser has gone away
            super().handle()

    def finish(self) -> None:
        with suppress(ConnectionError):
            super().finish()

    def log_message(self, *_) -> None:
        """Requests are not worth a line."""


def serve(options: Options) -> None:
    try:
        handler = partial(Handler, options.runs)
        server = ThreadingHTTPServer(("127.0.0.1", options.port), handler)
    except (OSError, OverflowError) as error:
        fail(f"--port {options.port}: {error}; take another one")
    print(f"http://localhost:{server.server_port} shows the runs; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


def main(options: Options) -> None:
    if not options.runs:
        fail("name at least one run: python tools/view.py runs/<run-name>")
    data = data_of(options.runs)  # so that what is wrong is said at once
    if options.serve:
        return serve(options)
    output = options.output or options.runs[0] / "view.html"
    try:
        output.write_text(page_of(data, followed=False), "utf-8")
    except OSError as error:
        fail(f"--output {output}: {error.strerror}")
    size = output.stat().st_size / 2**20
    steps = sum(len(run["steps"]) for run in data["runs"])
    print(f"written: {output} ({size:.1f} MB, {steps} steps with completions)")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
