"""How to read each metric of metrics.jsonl: a line, for people who see it for the first time."""

import re

READINGS = {
    # what is measured on held-out prompts
    "eval_accuracy": "Share of held-out prompts answered rightly, greedily. This is the result.",
    "eval_accuracy_lenient": "The same, but the right answer may stand without the tags. The gap "
    "to eval_accuracy is form.",
    "eval_count": "Held-out prompts that were asked.",
    "eval_score": "What the reward model says of held-out answers. Rising while eval_accuracy "
    "falls: the reward is exploited.",
    "eval_tool_use_rate": "Share of held-out answers with at least one call that worked.",
    "eval_accuracy_no_tool": "Accuracy on all held-out prompts while every call of the tool is "
    "answered with an error: what the policy can do alone.",
    "eval_em": "Share of held-out answers that equal a right one, word for word.",
    "eval_f1": "Words that held-out answers share with a right one, as F1.",
    "eval_searches": "Searches of a held-out answer that worked.",
    "eval_recall_at_k": "Share of held-out answers whose search results contain a right answer. "
    "Above eval_em: found, and then misread.",
    "eval_on_topic": "Share of held-out answers that still speak of what was asked.",
    "eval_length": "Tokens of a held-out answer.",
    "eval_truncated": "Share of held-out answers that the token budget cut off.",
    "eval_start_perplexity": "How surprising the first policy finds the answers. Rising: the "
    "language moves away from where it began. Repetition lowers it.",
    # the reward
    "reward": "Mean reward of the step's completions. Noisy: every step has other prompts.",
    "reward_accuracy": "The part of the reward for a right answer inside its tags.",
    "reward_format": "The part for the form that was asked for.",
    "reward_f1": "The part for words shared with a right answer.",
    "reward_overlong": "The part taken away from long completions; 0 is best.",
    "reward_learned": "The part that the reward model gives.",
    "reward_instructions": "The part for instructions that were followed.",
    "reward_std": "Spread of the rewards within a group. At 0 nothing is learnt.",
    "zero_std_fraction": "Share of groups whose rewards are all equal: nothing to learn from. "
    "Near 1 the prompts are too easy or too hard; the reward says which.",
    "groups": "Groups that were trained on.",
    "wasted_fraction": "Share of the sampled groups that were left out: all right, or all wrong.",
    # the policy
    "entropy": "Nats a token, estimated from what was sampled. Falling: surer. "
    "Near 0: it no longer explores.",
    "kl": "Nats a token between the policy and the one that training began with. Near 0 in step "
    "1; it rises as the policy moves.",
    "completion_length": "Tokens that were sampled for a completion.",
    "completion_length_correct": "The same, of the right ones.",
    "completion_length_wrong": "The same, of the wrong ones.",
    "truncated_fraction": "Share that the token budget cut off. High: raise --max-new-tokens.",
    # the update
    "loss": "Not a measure of success: in the first update it is 0 by construction (GRPO).",
    "grad_norm": "Length of the gradient before it is scaled down to --max-norm. Look for jumps.",
    "grad_clip_fraction": "Share of the updates whose gradient was scaled down.",
    "clip_fraction": "Share of tokens whose gradient the clip took away; in CISPO: bounded. 0 in a "
    "step's first update. GRPO's is a few per cent at most; with more, lower --lr. GSPO's "
    "may be half.",
    "ess": "Effective sample size, a share: 1 where all ratios are 1.",
    "max_log_prob_gap": "The largest difference of a token's log-prob, sampled against "
    "recomputed. 1e-5 in float32 and 0.1 to 1 in bfloat16 is rounding. More is a bug, or, with "
    "samples of older weights, how far these have moved.",
    "skipped_updates": "Updates left out because the gradient was not finite. Should be 0.",
    "lr": "Learning rate.",
    # time
    "elapsed_seconds": "Since training began.",
    "sample_tokens_per_second": "Tokens sampled a second.",
    "train_tokens_per_second": "Tokens trained on a second.",
    "peak_memory": "Most memory in use so far, in GiB.",
    # tools
    "tool_use_rate": "Share of completions with at least one call that worked.",
    "calls": "Calls of the tool in a completion.",
    "malformed_calls": "Calls that could not be read, a completion.",
    "failed_calls": "Calls that the tool answered with an error, a completion.",
    "turns": "Turns of the policy in a completion.",
    "answered_fraction": "Share of completions that ended with an answer.",
    "max_turns_fraction": "Share that was ended because it had no turns left.",
    "environment_fraction": "Share of tokens that the tool wrote. They are not trained on.",
    "em": "Share of answers that equal a right one, word for word.",
    "f1": "Words that answers share with a right one, as F1.",
    "searches": "Searches of a completion that worked.",
    "recall_at_k": "Share of completions whose search results contain a right answer.",
    # a reward model
    "score": "What the reward model says of the sampled completions, before scaling.",
    "score_truncated_fraction": "Share of dialogues too long for the reward model.",
    "score_accuracy_correlation": "Between score and truth within groups. Falling towards 0: the "
    "reward model no longer knows right from wrong.",
    "learned_weight": "Weight of the learned reward; 0 where the rules have taken over.",
    # instructions
    "on_topic": "Share of completions that still speak of what was asked.",
    "accuracy": "Share of completions that follow all instructions and are on topic.",
    "instructions": "Share of instructions that were followed.",
    "distinct_fraction": "Share of a group's completions that differ. Low: it no longer explores.",
    # samplers that run at the same time
    "importance_mean": "Mean weight that corrects for samples of an older policy. About 1.",
    "importance_capped_fraction": "Share of these weights that were capped.",
    "staleness_mean": "Updates between the policy that sampled and the one that is trained.",
    "staleness_max": "The most of these.",
    "dropped_fraction": "Share of groups that were too old to be used.",
    "sync_seconds": "To hand the new weights to the samplers.",
    "trainer_idle_seconds": "The trainer waited for samples.",
}
PATTERNS = {
    r"eval_kind/(.+)": "Share of held-out instructions of this kind that were followed.",
    r"eval_(prompt|instruction)_(\w+)_on_topic": "As eval_{0}_{1}, of the answers on topic.",
    r"eval_prompt_\w+": "Share of held-out prompts of which all instructions were followed.",
    r"eval_instruction_\w+": "Share of held-out instructions that were followed.",
    r"eval_(\w+)_(one|two)_hop": "As eval_{0}, of questions whose answer is {1} step(s) away.",
    r"eval_accuracy_(\d+)_digits": "As eval_accuracy, of numbers with {0} digits.",
    r"(\w+)_mean": "Mean of this part of the reward, without its weight.",
    r"(\w+)_std": "Spread of this part within a group.",
    r"sampler_(\d+)_\w+": "Of sampler {0}: waiting or loading in seconds, else a time of day.",
    r"trainer_waited_\w+": "When the trainer waited for samples.",
    r"eval_\w+": "Measured on held-out prompts.",
    r"reward_\w+": "A part of the reward.",
}


def reading_of(name: str) -> str:
    """A line that says how to read a metric; "" for a name that is not known."""
    if name in READINGS:
        return READINGS[name]
    for pattern, reading in PATTERNS.items():
        match = re.fullmatch(pattern, name)
        if match:
            return reading.format(*match.groups())
    return ""
