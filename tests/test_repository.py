"""The shape of the repository: lengths, copies, what must not stand in the code,
and what the README promises."""

import ast
import importlib.util
import re

import pytest
from helpers import ROOT

DIRECTORIES = sorted(path.name for path in ROOT.glob("experiment_*") if path.is_dir())
# Those of the usual layout: a README, a Config, plumbing.
EXPERIMENTS = sorted(path.parent.name for path in ROOT.glob("experiment_*/run.py"))
PATTERNS = ("experiment_*/*.py", "data/*.py", "benchmarks/*.py", "tools/*.py")
SOURCES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))

spec = importlib.util.spec_from_file_location("sync", ROOT / "tools" / "sync.py")
sync = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sync)
PLUMBING = {name: ROOT / owner / name for name, owner in sync.OWNERS.items()}


def test_functions_are_short():
    """At most 40 lines of code, and 45 with blank lines and comments, besides the docstring.

    `main` holds the loop, so that it can be read from top to bottom.
    """
    for path in sorted(ROOT.glob("experiment_*/*.py")):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                body = lines[node.lineno - 1 : node.end_lineno]
                if ast.get_docstring(node) is not None:
                    docstring = node.body[0]
                    first = docstring.lineno - node.lineno
                    del body[first : first + docstring.end_lineno - docstring.lineno + 1]
                code = [line for line in body if line.strip() and line.strip()[0] != "#"]
                where = f"{path.parent.name}/{path.name}: {node.name}"
                assert len(code) <= 40 and len(body) <= 45, (where, len(code), len(body))


def test_no_line_is_longer_than_100_characters():
    paths = [path for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)]
    assert set(SOURCES) < set(paths)
    too_long = []
    for path in sorted(paths):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if len(line) > 100:
                too_long.append(f"{path.relative_to(ROOT)}, line {number}: {len(line)}")
    assert not too_long


def test_copies_are_identical():
    copies = sync.copies(ROOT)
    assert {copy.parent.name for _, copy in copies} == set(EXPERIMENTS) - {"experiment_base"}
    assert {copy.name for _, copy in copies} == set(PLUMBING)
    for source, copy in copies:
        assert copy.read_bytes() == source.read_bytes(), copy


@pytest.mark.parametrize("name", PLUMBING)
def test_plumbing_knows_no_experiment(name):
    """Neither its directory nor a constant that some experiments alone have."""
    text = PLUMBING[name].read_text()
    forbidden = [*DIRECTORIES, "max_sampling_rounds", "config.top_k", "config.max_turns"]
    assert [word for word in forbidden if word in text] == []
    strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert not strings & {"top_k", "max_result_tokens"}
    # The status of a trajectory that ran out of turns, in calls.py, is called so too.
    assert name == "calls.py" or "max_turns" not in strings


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_runs_what_a_model_or_a_file_says(path):
    """Pitfall 25 and untrusted checkpoints:
    no eval or exec, no pickles, no remote code, no shell."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if path.name == "ranks.py" and name == "pickle.loads":
            continue  # what the processes of a run send each other
        assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads")
        assert "trust_remote_code" not in keywords and keywords.get("shell") != "True"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"


def test_weights_are_small_safetensors():
    weights = [
        path
        for path in (ROOT / "data").rglob("*")
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        and path.parent.name != "smollm2"  # fetched, and ignored by git
    ]
    assert weights and all(path.suffix == ".safetensors" for path in weights)
    assert sum(path.stat().st_size for path in weights) <= 16e6


def test_readmes_name_functions_and_files_that_exist():
    code = "\n".join(path.read_text() for path in SOURCES)
    for readme in (
        ROOT / "README.md",
        *(ROOT / experiment / "README.md" for experiment in EXPERIMENTS),
    ):
        text = readme.read_text()
        for path in re.findall(
            r"`((?:data|benchmarks|results|tests|tools|experiment_\w+)/[\w./]*)`", text
        ):
            assert (ROOT / path).exists(), f"{readme}: {path}"
        for names in re.findall(r"\(((?:`\w+(?:\.\w+)?`(?:, )?)+)[;)]", text):
            for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
                assert re.search(rf"(def|class) {name}\b", code), f"{readme}: {name}"


def test_every_test_that_the_readme_names_exists():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) >= 10
    named += re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text())
    for name in named:
        assert f"def {name}(" in tests, name


def test_every_flag_that_the_readmes_show_exists():
    for experiment in EXPERIMENTS:
        config = (ROOT / experiment / "train.py").read_text()
        for readme in (ROOT / "README.md", ROOT / "data" / "README.md"):
            for command in re.findall(
                rf"{experiment}/train\.py((?:\\\n|[^`\n])*)", readme.read_text()
            ):
                for flag in re.findall(r"--([a-z0-9-]+)", command.split("#")[0]):
                    assert flag == "help" or re.search(
                        rf"^    {flag.replace('-', '_')}: ", config, re.M
                    ), flag
        readme = (ROOT / experiment / "README.md").read_text()
        for script, flags in re.findall(r"((?:data|benchmarks)/\w+\.py)((?:\\\n|[^`\n])*)", readme):
            for flag in re.findall(r"--([a-z0-9-]+)", flags):
                assert re.search(
                    rf"^    {flag.replace('-', '_')}: ", (ROOT / script).read_text(), re.M
                ), flag
        readme = re.sub(
            r"(?:data|benchmarks)/\w+\.py(?:\\\n|[^`\n])*|without\s+`--model-name`", "", readme
        )
        # Flags with an underscore, and --cpu, are those of `accelerate launch`; --head and
        # --address are those of `ray start`.
        for flag in re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)(?![\w-])", readme):
            assert flag in ("help", "logdir", "cpu", "head", "address") or re.search(
                rf"^    {flag.replace('-', '_')}: ", config, re.M
            ), flag
