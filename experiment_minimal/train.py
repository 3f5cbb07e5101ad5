# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0"]
# ///
"""GRPO (Group Relative Policy Optimization, arXiv 2402.03300), the whole algorithm in one file.

A small language model that mostly guesses comes back to reasoning before it answers:

    python experiment_minimal/train.py    # 2 CPU cores, offline, 2 minutes; or with uv: uv run ...

One step, for a prompt q and a group of G completions o_1 ... o_G of it:

    (1)  o_i   ~  pi(. | q)                                     sample a group from the policy
    (2)  r_i   =  reward(o_i)                                   a rule: is the answer right?
    (3)  A_i   =  (r_i - mean(r)) / std(r)                      compare each with its group
    (4)  ratio =  pi(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)        for each token t
    (5)  KL    =  pi_ref / pi - log(pi_ref / pi) - 1            how far pi is from pi_ref at t; >= 0
    (6)  loss  = -1/G sum_i 1/|o_i| sum_t [min(ratio A_i, clip(ratio, 1-eps, 1+eps) A_i) - beta KL]

averaged over prompts. pi is trained; pi_old is the pi that sampled, pi_ref the pi before training,
both without gradient, like A. At a step's first update pi is pi_old: every ratio is 1, and as a
group's A sum to 0, the loss is beta KL; the gradient is that of -A log pi + beta KL. From the
second update on pi has left pi_old, if only a little. (6), (5): the paper's equations 3, 4; (3):
its 4.1.2. experiment_base computes the same gradient several times faster, for larger models, too.
"""

import copy
import json
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
MODEL = DATA / "policy_math"  # a directory, or the name of a chat model on the Hugging Face hub
SYSTEM = (
    "Reason step by step inside <think> </think>, "
    "then give the final number inside <answer> </answer>."
)
SEED = 42  # or the command line's first argument
STEPS = 40
PROMPTS_PER_STEP = 16
GROUP_SIZE = 8  # G, completions of a prompt
PROMPTS_PER_UPDATE = 8  # half of a step's, so a step has two updates
MAX_NEW_TOKENS = 64
TEMPERATURE = 1.0
LEARNING_RATE = 5e-5
CLIP_EPS = 0.2  # eps in (6)
KL_WEIGHT = 0.01  # beta in (6)
MAX_NORM = 1.0  # a longer gradient is scaled down to this norm
FORMAT_REWARD = 0.1  # for the right form; a right answer earns 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read_tasks(path: Path) -> list[dict]:
    """Rows with "question" and "answer": sums of up to three numbers of up to two digits."""
    tasks = [json.loads(line) for line in path.read_text().splitlines()]
    tasks = [task for task in tasks if task["num_terms"] <= 3 and task["num_digits"] <= 2]
    return [task for task in tasks if "*" not in task["operators"]]


def encode_prompts(tokenizer, questions: list[str]):
    """(ids, mask), each (rows, prompt length). Padded on the left: all end at the same column."""
    rows = []
    for question in questions:
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        # The template has written BOS already, where the model has one: no second one.
        rows.append(tokenizer(text, add_special_tokens=False).input_ids)
    width = max(len(row) for row in rows)
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]  # 0 is an id, too
    return torch.tensor(ids, device=DEVICE), torch.tensor(mask, device=DEVICE)


def find_eos_ids(model, tokenizer) -> torch.Tensor:
    """Every id that ends a completion: the tokenizer's, and those of the generation config."""
    more = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    return torch.tensor(sorted(ids), device=DEVICE)


@torch.no_grad()
def sample(model, prompt_ids, prompt_mask, eos_ids, greedy: bool = False):
    """(1) A completion of every row, from softmax(logits / TEMPERATURE): no top_k, no top_p.

    prompt_ids, prompt_mask: (rows, prompt length). Returns ids and mask, each (rows, prompt length
    + completion length). The mask is 1 through the first end token: to stop is learnt, too.

        ids     pad  p  q    5  8  6 eos eos eos        eos fills up what has ended
        mask     0   1  1    1  1  1  1   0   0
    """
    ids, mask = prompt_ids, prompt_mask  # (rows, tokens so far)
    new_ids = prompt_ids  # what the KV cache does not hold yet: the prompt, then one token a row
    cache = None
    alive = torch.ones(len(ids), dtype=torch.bool, device=DEVICE)  # (rows,), False: has ended
    for _ in range(MAX_NEW_TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new_ids.shape[1] :]
        output = model(new_ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache = output.past_key_values
        logits = output.logits[:, -1] / TEMPERATURE  # (rows, vocabulary)
        sampled = torch.multinomial(logits.softmax(-1), 1)[:, 0]  # (rows,)
        tokens = logits.argmax(-1) if greedy else sampled
        new_ids = torch.where(alive, tokens, eos_ids[0])[:, None]  # (rows, 1)
        ids = torch.cat([ids, new_ids], dim=1)
        mask = torch.cat([mask, alive[:, None].long()], dim=1)  # alive not yet updated: eos counts
        alive = alive & ~torch.isin(tokens, eos_ids)
        if not alive.any():
            break
    return ids, mask


def reward(completion: str, answer: str) -> float:
    """(2) 1 for the right number in the last <answer>, plus FORMAT_REWARD for the form."""
    number = re.match(r"\s*(-?[0-9]{1,20})\s*</answer>", completion.rpartition("<answer>")[2])
    is_right = "<answer>" in completion and number is not None and int(number[1]) == int(answer)
    form = r"\s*<think>[^<]*</think>\s*<answer>[^<]*</answer>\s*"
    return 1.0 * is_right + FORMAT_REWARD * bool(re.fullmatch(form, completion))


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(3) (prompts, G) -> (prompts, G). std divides by G - 1; 1e-4 keeps A small at a tiny std.

    Exactly 0 where all rewards are equal: r - mean may be a rounding error, which would grow.
    """
    mean = rewards.mean(dim=1, keepdim=True)  # (prompts, 1)
    std = rewards.std(dim=1, keepdim=True)  # (prompts, 1)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return ((rewards - mean) / (std + 1e-4)).masked_fill(all_equal, 0.0)


def completion_log_probs(model, ids, mask, completion_length: int) -> torch.Tensor:
    """log pi(o_it | q, o_i,<t), (rows, completion). ids and mask: (rows, prompt + completion)."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # 0, 1, 2, ... of the tokens that are no padding
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logits = logits[:, -completion_length - 1 : -1]  # the logits at t - 1 predict token t
    log_probs = (logits / TEMPERATURE).log_softmax(-1)  # as sampled: (rows, completion, vocabulary)
    targets = ids[:, -completion_length:, None]  # (rows, completion, 1)
    return log_probs.gather(-1, targets)[:, :, 0]


def grpo_loss(log_probs, old_log_probs, reference_log_probs, advantages, completion_mask):
    """(4), (5), (6). advantages: (rows,); the others: (rows, completion). Returns a scalar."""
    advantages = advantages[:, None]  # (rows, 1), the same for every token
    ratio = (log_probs - old_log_probs).clamp(-20, 20).exp()  # (4), bounded against overflow
    clipped_ratio = ratio.clamp(1 - CLIP_EPS, 1 + CLIP_EPS)
    # min: gradient 0 once A has pushed the ratio past 1 +- CLIP_EPS; the way back stays open.
    surrogate = torch.min(ratio * advantages, clipped_ratio * advantages)
    x = (reference_log_probs - log_probs).clamp(-20, 20)  # log(pi_ref / pi)
    kl = x.exp() - x - 1  # (5)
    token_loss = -(surrogate - KL_WEIGHT * kl)
    lengths = completion_mask.sum(-1).clamp(min=1)  # |o_i|, (rows,)
    completion_loss = (token_loss * completion_mask).sum(-1) / lengths  # 1/|o_i| sum_t, (rows,)
    return completion_loss.mean()  # 1/G sum_i, and the mean over the groups


def evaluate(model, tokenizer, tasks: list[dict], eos_ids) -> float:
    """The share of tasks whose greedy completion has the right answer."""
    right = 0
    for start in range(0, len(tasks), 128):
        chunk = tasks[start : start + 128]
        prompt_ids, prompt_mask = encode_prompts(tokenizer, [task["question"] for task in chunk])
        ids, _ = sample(model, prompt_ids, prompt_mask, eos_ids, greedy=True)
        texts = tokenizer.batch_decode(ids[:, prompt_ids.shape[1] :], skip_special_tokens=True)
        for text, task in zip(texts, chunk):
            right += reward(text, task["answer"]) >= 1  # FORMAT_REWARD alone is less
    return right / len(tasks)


def main(seed: int = SEED) -> None:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    policy = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(DEVICE)
    policy.eval()  # no dropout: it would make pi differ from pi_old before any update
    reference = copy.deepcopy(policy).requires_grad_(False)  # pi_ref
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    tasks = read_tasks(DATA / "math_tasks.jsonl")[:1024]
    eval_tasks = read_tasks(DATA / "math_tasks_eval.jsonl")
    eos_ids = find_eos_ids(policy, tokenizer)
    before = evaluate(policy, tokenizer, eval_tasks, eos_ids)
    print(f"held out, greedy, before training: {before:.3f}", flush=True)
    for step in range(STEPS):
        # (1) Sample a group of G completions for every prompt: rows 0 to G - 1 are prompt 0's.
        picked = torch.randperm(len(tasks))[:PROMPTS_PER_STEP]
        row_tasks = [tasks[i] for i in picked for _ in range(GROUP_SIZE)]
        prompt_ids, prompt_mask = encode_prompts(tokenizer, [t["question"] for t in row_tasks])
        ids, mask = sample(policy, prompt_ids, prompt_mask, eos_ids)
        completion_mask = mask[:, prompt_ids.shape[1] :]  # (rows, completion)
        length = completion_mask.shape[1]

        # (2) Reward every completion. (3) Compare it with its group.
        texts = tokenizer.batch_decode(ids[:, -length:], skip_special_tokens=True)
        rewards = [reward(text, task["answer"]) for text, task in zip(texts, row_tasks)]
        rewards = torch.tensor(rewards, device=DEVICE).view(-1, GROUP_SIZE)  # (prompts, G)
        advantages = group_advantages(rewards).flatten()  # (rows,)
        print(f"step {step + 1}/{STEPS}: reward {rewards.mean():.3f}, {texts[0]!r}", flush=True)

        # log pi_old, from before this step's first update, and log pi_ref: constants in the loss.
        updates = torch.arange(len(ids)).split(PROMPTS_PER_UPDATE * GROUP_SIZE)  # row numbers
        with torch.no_grad():
            old = [completion_log_probs(policy, ids[u], mask[u], length) for u in updates]
            ref = [completion_log_probs(reference, ids[u], mask[u], length) for u in updates]

        # (4), (5), (6) Update the policy: forward, loss, backward, step.
        for i, u in enumerate(updates):
            log_probs = completion_log_probs(policy, ids[u], mask[u], length)
            loss = grpo_loss(log_probs, old[i], ref[i], advantages[u], completion_mask[u])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

    after = evaluate(policy, tokenizer, eval_tasks, eos_ids)
    print(f"held out, greedy ({len(eval_tasks)} prompts): {before:.3f} -> {after:.3f}, seed {seed}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SEED)
