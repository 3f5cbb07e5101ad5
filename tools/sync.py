"""Copy the plumbing from its owner to the experiments that have a copy of it.

    python tools/sync.py            # copy
    python tools/sync.py --check    # copy nothing; say what differs, and exit with 1 if anything

Plumbing is what an experiment uses as it is: sampling.py, kv_cache.py, captured.py, model.py,
flex.py, completions.py, run.py and data.py belong to experiment_base, calls.py to
experiment_multiturn_tool_calling, ranks.py to experiment_accelerate. Change the owner's file, then
run this. Lesson files (train.py, loss.py, replay_buffer.py) are never touched: they may diverge.

An experiment whose README has a line "Own plumbing: `sampling.py`" keeps that file for itself.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
OWNERS = {  # a file stands before those that it imports
    "sampling.py": "experiment_base",
    "captured.py": "experiment_base",
    "kv_cache.py": "experiment_base",
    "model.py": "experiment_base",
    "flex.py": "experiment_base",
    "completions.py": "experiment_base",
    "run.py": "experiment_base",
    "data.py": "experiment_base",
    "calls.py": "experiment_multiturn_tool_calling",
    "ranks.py": "experiment_accelerate",
}


@dataclass
class Config:
    check: bool = False  # copy nothing; say what differs, and exit with 1 if anything does


def own_plumbing(experiment: Path) -> set[str]:
    """The files that an experiment's README lists as its own."""
    readme = experiment / "README.md"
    if not readme.is_file():
        return set()
    for line in readme.read_text().splitlines():
        if line.startswith("Own plumbing:"):
            return set(re.findall(r"`(\w+\.py)`", line))
    return set()


def copies(root: Path) -> list[tuple[Path, Path]]:
    """(owner's file, copy) for every copy below `root`.

    An experiment that imports a plumbing file, as `import run` or `from run import`, has a copy.
    """
    found = []
    for train in sorted(root.glob("experiment_*/train.py")):
        experiment = train.parent
        code = "\n".join(path.read_text() for path in experiment.glob("*.py"))
        for name, owner in OWNERS.items():
            if experiment.name == owner or name in own_plumbing(experiment):
                continue
            if re.search(rf"^ *(from|import) {name.removesuffix('.py')}\b", code, re.MULTILINE):
                found.append((root / owner / name, experiment / name))
                if (root / owner / name).is_file():  # what it imports is needed too
                    code += (root / owner / name).read_text()
    return found


def main(config: Config) -> None:
    differing = []
    for source, copy in copies(ROOT):
        if not source.is_file():
            sys.exit(f"error: {source} is missing, which other experiments have copies of")
        if not copy.is_file() or copy.read_bytes() != source.read_bytes():
            differing.append(copy)
            if not config.check:
                copy.write_bytes(source.read_bytes())
    for copy in differing:
        state = "copied"
        if config.check:
            state = "differs" if copy.is_file() else "is missing"
        print(f"{copy.relative_to(ROOT)} {state}")
    if config.check and differing:
        sys.exit("error: run `python tools/sync.py`, or change the owner's file")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
