"""experiment_multiturn_tool_calling/train.py against trl's GRPOTrainer with the same tool,
on the CPU, at their best.

    # about 12 minutes on 2 cores; writes results/tools_vs_trl.json
    python benchmarks/tools_vs_trl.py

The same model, calculator, prompts (token for token), rewards and updates as in
benchmarks/vs_trl.py, which this script extends and which says what is measured. Both sides begin
with the embedded policy that rarely calls, and take their steps in turns. The tokenizer has
Qwen2.5's chat template, one of those that TRL's tools accept; a turn may have as many tokens on
both sides as TRL's `max_completion_length`, which bounds turns and trajectories alike.

    step_time_ratio          median over pairs of steps of TRL's seconds over ours
    token_time_ratio         the same of seconds per sampled token
"""

import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import tyro
import vs_trl
from vs_trl import ROOT, SIDES

EXPERIMENT = "experiment_multiturn_tool_calling"
TOKENS = ("prompt_tokens", "sampled_tokens", "tool_tokens")  # of a trajectory, means over a step


@dataclass
class Options(vs_trl.Work):
    model_name: str = str(ROOT / "data" / "policy_calculator")  # a model's directory
    max_new_tokens: int = 192  # of a turn
    pairs: int = 16  # timed pairs of steps
    warmup: int = 2  # pairs of steps before them
    search_steps: int = 2  # timed steps of each candidate in the search, after one to warm up
    seeds: tuple[int, ...] = (42,)
    output: Path = ROOT / "results" / "tools_vs_trl.json"


# ---------------------------------------------------------------- worker
def work(
    side: str,
    seed: int,
    steps: int,
    settings: dict,
    eval_interval,
    changes: dict,
    device: str,
    folder: str,
):
    """As vs_trl's, with the other experiment, and with the tool on TRL's side."""
    vs_trl.EXPERIMENT, vs_trl.trl_task, vs_trl.trl_tokens = EXPERIMENT, trl_task, trl_tokens
    vs_trl.run_ours, vs_trl.trl_arguments = run_ours, trl_arguments
    vs_trl.work(side, seed, steps, settings, eval_interval, changes, device, folder)


def count(clock, prompts: list, masks: list) -> int:
    """Tell the clock the tokens of a trajectory; prompts and masks as lists of one a trajectory."""
    sampled, given = sum(map(sum, masks)), sum(map(len, masks))
    clock.more = dict(
        zip(TOKENS, (n / len(masks) for n in (sum(map(len, prompts)), sampled, given - sampled)))
    )
    return sampled


def run_ours(train, config, clock, original=vs_trl.run_ours) -> None:
    rollout = train.rollout

    def counted(policy, tokenizer, prompts, group_size, config, generator=None, **more):
        experiences = rollout(policy, tokenizer, prompts, group_size, config, generator, **more)
        if generator is not None:
            trajectories = [trajectory for e in experiences for trajectory in e.trajectories]
            count(clock, [t.prompt.ids for t in trajectories], [t.mask for t in trajectories])
        return experiences

    train.rollout = counted
    original(train, config, clock)


def trl_arguments(config, *rest, original=vs_trl.trl_arguments) -> dict:
    return original(config, *rest) | {"max_tool_calling_iterations": config.max_turns - 1}


def trl_task(train, tokenizer, prompts: list) -> dict:
    from calculator import calculator
    from datasets import Dataset

    chats = []
    for prompt in prompts:
        question = (
            tokenizer.decode(prompt.ids).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        )
        texts = {"system": train.Config.system_prompt, "user": question}
        chats.append([{"role": role, "content": text} for role, text in texts.items()])
    rendered = tokenizer.apply_chat_template(chats, tools=[calculator], add_generation_prompt=True)
    if rendered["input_ids"] != [prompt.ids for prompt in prompts]:
        sys.exit("error: TRL would render the prompts to other ids than ours")

    def accuracy_reward(completions, answer, **_):
        return [
            train.accuracy_reward(last(messages), right)
            for messages, right in zip(completions, answer)
        ]

    def format_reward(completions, **_):
        return [train.format_reward(last(messages)) for messages in completions]

    rows = Dataset.from_dict({"prompt": chats, "answer": [prompt.answer for prompt in prompts]})
    return {
        "train_dataset": rows,
        "reward_funcs": [accuracy_reward, format_reward],
        "tools": [calculator],
    }


def last(messages: list[dict]) -> str:
    """What the policy said last; nothing where it ended with a call."""
    return messages[-1].get("content") or "" if messages[-1]["role"] == "assistant" else ""


def trl_tokens(result: tuple, clock) -> int:
    prompts, _, masks, *_ = result
    return count(clock, prompts, masks)


# ---------------------------------------------------------------- driver
def save_model(name: str, folder: str) -> None:
    """The policy with Qwen2.5's chat template, which renders these prompts as its own does."""
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    AutoModelForCausalLM.from_pretrained(name, dtype="auto").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = (
        Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    ).read_text()
    tokenizer.save_pretrained(folder)


def main(options: Options) -> None:
    start, machine, model_name = time.time(), vs_trl.describe_machine(), options.model_name
    with tempfile.TemporaryDirectory() as folder:
        save_model(model_name, folder)
        options.model_name = folder
        found = {side: vs_trl.search(options, side) for side in SIDES}
        settings, trials = ({side: found[side][i] for side in SIDES} for i in (0, 1))
        results = vs_trl.measure_pairs(options, settings)
        options.model_name = model_name
    pairs = results["pairs"]
    head = {"step_time_ratio": results["step_time_ratio"]}
    head["token_time_ratio"] = median(
        pair["trl"]["seconds"]
        / pair["trl"]["tokens"]
        * pair["ours"]["tokens"]
        / pair["ours"]["seconds"]
        for pair in pairs
    )
    head["peak_memory_ratio"] = results["peak_memory_ratio"]
    for side in SIDES:
        results[side] |= {
            name: mean(pair[side][name] for pair in pairs) for name in (*TOKENS, "reward")
        }
    about = {"machine": machine, "options": asdict(options), "settings": settings, "search": trials}
    about["seconds_in_all"] = time.time() - start
    options.output.write_text(vs_trl.to_json(head | about | results, indent=1) + "\n")
    for side in SIDES:
        print(
            f"{side}: " + ", ".join(f"{name} {value:,.4g}" for name, value in results[side].items())
        )
    print(vs_trl.to_json(head))
    print(f"written: {options.output}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*json.loads(sys.argv[2]))
    else:
        vs_trl.Worker.script = str(Path(__file__).resolve())
        # so that the workers are ended too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
        try:
            main(tyro.cli(Options, description=__doc__))
        except (RuntimeError, KeyboardInterrupt) as error:
            sys.exit(f"error: {str(error) or 'interrupted'}")
