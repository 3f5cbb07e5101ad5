"""experiment_accelerate/train.py, of which one rank kills itself. Run by test_accelerate.py, with

KILL_RANK     which rank
KILL_IN       sampling, training or saving
KILL_AT_STEP  in which step
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiment_accelerate"))

import ranks  # noqa: E402
import train  # noqa: E402
import transformers  # noqa: E402
import tyro  # noqa: E402

place = os.environ["KILL_IN"]
is_chosen = os.environ["RANK"] == os.environ["KILL_RANK"]
present = {"step": 0}


def noting_the_step(function):
    def prompts_of_step(prompts, step, config):
        present["step"] = step
        return function(prompts, step, config)

    return prompts_of_step


def deadly(function):
    def call(*arguments, **named):
        if is_chosen and present["step"] == int(os.environ["KILL_AT_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call


train.prompts_of_step = noting_the_step(train.prompts_of_step)
if place == "sampling":
    train.rollout = deadly(train.rollout)
elif place == "training":
    train.optimizer_step = deadly(train.optimizer_step)
elif os.environ["KILL_RANK"] == "0":  # the writer, with its files half written
    write = transformers.PreTrainedTokenizerBase.save_pretrained
    transformers.PreTrainedTokenizerBase.save_pretrained = deadly(write)
else:
    ranks.RankRun.save = deadly(ranks.RankRun.save)
with ranks.process_group():
    train.main(tyro.cli(train.Config))
