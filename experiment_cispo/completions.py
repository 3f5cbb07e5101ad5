"""completions.jsonl: a few groups of some steps, token by token. Plumbing; tools/view.py shows it.

Steps 1, 10, 20 ... (`log_completions_interval`) have `log_groups` lines of this kind each. Of the
step's groups those with spread come first, as nothing is learnt from the others:

    step                  the step that sampled this group and trained on it
    group, groups         its number in the step, from 0, and how many groups the step trained on
    prompt, prompt_ids    what the policy was given: the text, with special tokens, and its ids
    answer                the right answer, as text
    rewards, advantages   a number for each completion of the group, as the next two
    reward_parts          name -> numbers, whose sum is the reward
    truncated             1 where the token budget ended the completion
    completions           one of these for each completion:

        text                  what was rewarded: without special tokens; with tools the last turn
        update                in which of the step's updates it was trained on, from 1
        ids, tokens           a list with the id of each token, and one with its text
        mask                  1: in the loss. 0: not, as a tool's result, or a completion that is
                              left out. There the lists that follow have null
        sampled_log_probs     of the policy that sampled the token
        old_log_probs         of the policy before the step's updates, as the loss had it
        new_log_probs         of the policy after all of them
        reference_log_probs   of the policy that training began with
        weight                in the loss (`token_weights` in loss.py)
        ratio, clipped, kl    in its update; with several passes over the completions, in the last
        push                  in its update: minus the derivative of the loss, but for its KL term,
                              by the token's log-prob (`tokens_seen` in loss.py). Above 0 the update
                              makes the token likelier
        alternatives          with `log_alternatives`: the likeliest tokens at this place, each as
                              [id, text, log-prob before the updates, log-prob after them]

A completion that was not trained on has no update, old_log_probs, reference_log_probs, weight,
ratio, clipped, kl and push. With kl_weight 0 there are no reference_log_probs and no kl.

The groups of the first such step are scored again at the later ones. Their lines are short:

    step                  after whose updates they were scored
    sampled_step, group   which group it is
    log_probs             a list for each completion, with a number for each token

Numbers have five significant digits. A file of ROTATE_BYTES is renamed to completions.1.jsonl, the
next to completions.2.jsonl, and so on; none is deleted.
"""

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from model import autocast, unwrap
from replay_buffer import Experience, cut_into_micro_batches, packed_rows, single_rows
from run import is_due, step_of
from torch import Tensor

ROTATE_BYTES = 64 * 2**20


def completion_files(log_dir: Path) -> list[Path]:
    """Those of a run, oldest first."""
    numbered = [path for path in log_dir.glob("completions.*.jsonl") if number_of(path)]
    current = log_dir / "completions.jsonl"
    return sorted(numbered, key=number_of) + ([current] if current.is_file() else [])


def number_of(path: Path) -> int:
    """3 of completions.3.jsonl; 0 of another name, which is no file of this log."""
    match = re.fullmatch(r"completions\.([1-9][0-9]{0,5})\.jsonl", path.name)
    return int(match[1]) if match else 0


class CompletionLog:
    """Chooses groups of a step before its updates, and writes them after these."""

    def __init__(self, run, policy, sequences_log_probs, replay_buffer, tokenizer) -> None:
        """sequences_log_probs: the function of train.py. replay_buffer: holds a step's groups."""
        self.run = run
        self.policy = policy
        self.sequences_log_probs = sequences_log_probs
        self.replay_buffer = replay_buffer
        self.tokenizer = tokenizer
        self.config = run.settings
        self.texts = {}  # of tokens, by id
        self.chosen = []  # (number, Experience) of the present step
        self.groups = 0  # how many it has
        self.alternatives = []  # what `likeliest_tokens` gave for each completion of these
        self.first = self.open()  # (step, number, group) of the first chosen ones

    def is_due(self, step: int) -> bool:
        """Whether completions of this step are shown: of the first one, and every few steps."""
        interval = self.config.log_completions_interval
        return is_due(step, interval) or (step == 1 and interval > 0)

    def open(self) -> list[tuple]:
        """Make a resumed run's files end with its step. Returns the first groups in them."""
        groups = []
        with self.run.writing("completions.jsonl"):
            cut_completions(self.run.log_dir, self.run.state["step"])
            vocabulary = unwrap(self.model()).config.get_text_config().vocab_size
            groups = first_groups(self.run.log_dir, vocabulary)
        return groups

    def model(self):
        """The policy, unwrapped where something has wrapped it."""
        return self.policy

    # ------------------------------------------------------------ before and after the updates
    def choose(self, step: int) -> None:
        """Choose the groups to write, of those that are about to be trained on."""
        self.chosen = []
        self.alternatives = []
        if not self.is_due(step):
            return
        groups = list(enumerate(self.replay_buffer.experiences))
        self.groups = len(groups)
        groups.sort(key=lambda group: not group[1].advantages.any())  # those with spread first
        self.chosen = groups[: self.config.log_groups]
        if self.config.log_alternatives:
            for _, experience in self.chosen:
                self.alternatives.append(self.likeliest_tokens(experience))

    def write(self, step: int, batches) -> None:
        """Write the chosen groups. batches: the step's, after the last update."""
        if not self.chosen:
            return
        trained = self.trained_tokens(batches)
        groups = [experience for _, experience in self.chosen]
        scores = self.score(groups + [experience for _, _, experience in self.first])
        lines = []
        for i, (number, experience) in enumerate(self.chosen):
            place = {"step": step, "group": number, "groups": self.groups}
            line = {**place, **self.describe(experience)}
            for j, completion in enumerate(line["completions"]):
                completion["new_log_probs"] = scores[i][j]
                completion |= trained.get((number, j), {})
                if self.alternatives:
                    likeliest = self.alternatives[i][j]
                    completion["alternatives"] = self.alternatives_of(experience, j, *likeliest)
            lines.append(line)
        for (sampled_step, number, _), log_probs in zip(self.first, scores[len(groups) :]):
            line = {"step": step, "sampled_step": sampled_step, "group": number}
            lines.append({**line, "log_probs": log_probs})
        if not self.first:
            self.first = [(step, number, experience) for number, experience in self.chosen]
        self.append(lines)

    def append(self, lines: list[dict]) -> None:
        path = self.run.log_dir / "completions.jsonl"
        with self.run.writing("completions.jsonl"):
            with open(path, "a") as file:
                for line in lines:
                    file.write(json.dumps(line) + "\n")
            if path.stat().st_size >= ROTATE_BYTES:
                numbers = [number_of(other) for other in completion_files(path.parent)]
                path.rename(path.with_name(f"completions.{max(numbers) + 1}.jsonl"))

    def describe(self, experience: Experience) -> dict:
        """What is written of a group, but for what training says of it."""
        completions = []
        for i, text in enumerate(experience.completions):
            ids = experience.completion_ids[i].tolist()
            mask = experience.completion_masks[i]
            completion = {
                "text": text,
                "ids": ids,
                "tokens": [self.text_of_token(id_) for id_ in ids],
                "mask": mask.tolist(),
                "sampled_log_probs": spread(experience.sampled_log_probs[i][mask.bool()], mask),
            }
            completions.append(completion)
        parts = experience.reward_parts
        return {
            "prompt": self.tokenizer.decode(experience.prompt_ids),
            "answer": answer_text(experience.answer),
            "rewards": rounded(experience.rewards),
            "advantages": rounded(experience.advantages),
            "reward_parts": {name: rounded(part) for name, part in parts.items()},
            "truncated": experience.truncated.tolist(),
            "prompt_ids": experience.prompt_ids.tolist(),
            "completions": completions,
        }

    def text_of_token(self, id_: int) -> str:
        """A token's text by itself; a part of a character is a replacement character."""
        if id_ not in self.texts:
            text = self.tokenizer.decode([id_])
            token = self.tokenizer.convert_ids_to_tokens(id_) or ""
            is_stripped = str(token).startswith("\u2581") and not text.startswith(" ")
            if is_stripped:
                text = " " + text  # decode strips the space in front of a text
            self.texts[id_] = text
        return self.texts[id_]

    def trained_tokens(self, batches) -> dict[tuple[int, int], dict]:
        """(group's number, completion) -> what training tells of a chosen group's completion."""
        # By identity: == would compare tensors.
        numbers = {id(experience): number for number, experience in self.chosen}
        found = {}
        for update, batch in enumerate(batches, start=1):
            for micro_batch in batch:
                columns = columns_of(micro_batch)
                for experience, i, places in by_completion(micro_batch):
                    if id(experience) not in numbers:
                        continue
                    told = {"update": update}
                    for name, values in columns.items():
                        told[name] = spread(values[places], experience.completion_masks[i])
                    found[numbers[id(experience)], i] = told
        return found

    # ------------------------------------------------------------ the policy as it is now
    @torch.no_grad()
    def forward(self, function, *arguments):
        """function(policy, ...), without a gradient. Where the policy is wrapped this differs."""
        self.policy.eval()
        return function(self.policy, *arguments)

    def device(self) -> torch.device:
        return self.policy.device

    def score(self, groups: list[Experience]) -> list[list[list]]:
        """Log-probs under the policy as it is now: group -> completion -> token."""
        scores = []
        rows = []
        places = {id(experience): i for i, experience in enumerate(groups)}
        for experience in groups:
            scores.append([[None] * len(mask) for mask in experience.completion_masks])
            weights = [mask.float() for mask in experience.completion_masks]
            if self.replay_buffer.packed:
                rows += packed_rows(experience, weights, self.config.micro_batch_tokens)
            else:
                rows += single_rows(experience, weights)
        packing = (self.config.micro_batch_tokens, self.replay_buffer.packed)
        for micro_batch in cut_into_micro_batches(rows, *packing):
            arguments = (micro_batch.to(self.device()), self.config)
            log_probs = self.forward(self.sequences_log_probs, *arguments)
            for experience, i, tokens in by_completion(micro_batch):
                values = spread(log_probs[tokens], experience.completion_masks[i])
                scores[places[id(experience)]][i] = values
        return scores

    def likeliest_tokens(self, experience: Experience) -> list[tuple[Tensor, Tensor]]:
        """For each completion (ids, log-probs) of the likeliest tokens, (tokens, count) each."""
        found = []
        for i in range(len(experience.completions)):
            arguments = (*self.on_device(experience, i), self.config.log_alternatives, self.config)
            found.append(self.forward(likeliest, *arguments))
        return found

    def on_device(self, experience: Experience, completion: int) -> tuple[Tensor, Tensor]:
        """(prompt_ids, completion_ids)."""
        ids = experience.completion_ids[completion]
        return experience.prompt_ids.to(self.device()), ids.to(self.device())

    def alternatives_of(
        self, experience: Experience, completion: int, ids: Tensor, before: Tensor
    ) -> list[list | None]:
        """What the log holds of them. ids, before: of the completion, by `likeliest_tokens`."""
        arguments = (*self.on_device(experience, completion), ids, self.config)
        after = self.forward(log_probs_of, *arguments)
        columns = (ids.tolist(), before.tolist(), after.tolist())
        places = []
        for token_ids, then, now in zip(*columns):
            texts = [self.text_of_token(id_) for id_ in token_ids]
            places.append([list(x) for x in zip(token_ids, texts, rounded(then), rounded(now))])
        mask = experience.completion_masks[completion].tolist()
        return [place if in_loss else None for place, in_loss in zip(places, mask)]


# ---------------------------------------------------------------- every token of the vocabulary
def predictions(policy, prompt_ids, completion_ids, config):
    """Log-probs of all tokens at each place of a completion: some places at a time.

    Yields (places, vocabulary). The four lines of `sequences_log_probs`'s docstring, in chunks.
    """
    base = unwrap(policy)
    input_ids = torch.cat([prompt_ids, completion_ids])[None]  # (1, tokens)
    text_config = base.config.get_text_config()
    cap = getattr(text_config, "final_logit_softcapping", None)  # Gemma
    with autocast(config, input_ids.device):
        hidden = base.get_decoder()(input_ids, use_cache=False).last_hidden_state[0]
        hidden = hidden[len(prompt_ids) - 1 : -1]  # each predicts the token after it
        for states in hidden.split(max(1, 2**26 // text_config.vocab_size)):
            logits = base.get_output_embeddings()(states).float()
            if cap:
                logits = cap * torch.tanh(logits / cap)
            yield (logits / config.temperature).log_softmax(-1)


def likeliest(policy, prompt_ids, completion_ids, count: int, config):
    """(ids, log-probs) of the likeliest tokens at each place of a completion, (tokens, count)."""
    ids = []
    values = []
    for log_probs in predictions(policy, prompt_ids, completion_ids, config):
        top = log_probs.topk(min(count, log_probs.shape[-1]))
        ids.append(top.indices.cpu())
        values.append(top.values.cpu())
    return torch.cat(ids), torch.cat(values)


def log_probs_of(policy, prompt_ids, completion_ids, ids, config) -> Tensor:
    """Log-probs of the tokens `ids` at each place of a completion. (tokens, count), as `ids`."""
    values = []
    first = 0
    for log_probs in predictions(policy, prompt_ids, completion_ids, config):
        of_places = ids[first : first + len(log_probs)].to(log_probs.device)
        values.append(log_probs.gather(1, of_places).cpu())
        first += len(log_probs)
    return torch.cat(values)


# ---------------------------------------------------------------- from tensors to lists
def rounded(values) -> list:
    """Numbers of five digits; None for what is not finite."""
    if isinstance(values, Tensor):
        values = values.tolist()
    return [float(f"{x:.5g}") if math.isfinite(x) else None for x in values]


def spread(values, mask) -> list:
    """The values of a completion's sampled tokens as a list over all its tokens, else None."""
    found = [None] * len(mask)
    for place, value in zip(mask.nonzero().flatten().tolist(), rounded(values)):
        found[place] = value
    return found


def answer_text(answer) -> str:
    """The right answer, or several of them; "" where there is none."""
    if isinstance(answer, (list, tuple)):
        return " or ".join(str(one) for one in answer)
    return "" if answer is None else str(answer)


def columns_of(micro_batch) -> dict[str, Tensor]:
    """What the log holds of a micro-batch's tokens, (sampled,) each."""
    columns = {
        "old_log_probs": micro_batch.old_log_probs,
        "reference_log_probs": micro_batch.reference_log_probs,
        "weight": micro_batch.weights,
        **micro_batch.seen,
    }
    return {name: values for name, values in columns.items() if values is not None}


def by_completion(micro_batch):
    """Yields (group, number in it, (sampled,) bool) for each completion of a micro-batch."""
    for number, (experience, i) in enumerate(micro_batch.origins):
        yield experience, i, micro_batch.completion == number


# ---------------------------------------------------------------- a resumed run
def cut_completions(log_dir: Path, step: int) -> None:
    """Drop the lines of later steps, which are done again, and one that is half written.

    Older files are looked at as long as the newer ones lose all their lines.
    """
    for path in reversed(completion_files(log_dir)):
        aside = path.with_name(f"{path.name}.cutting")
        dropped = 0
        with open(path, errors="replace") as old, open(aside, "w") as new:
            for line in old:
                if 0 <= step_of(line) <= step:
                    new.write(line)
                else:
                    dropped += 1
        is_empty = aside.stat().st_size == 0
        os.replace(aside, path)
        if is_empty:
            path.unlink()
        elif not dropped:
            return


def first_groups(log_dir: Path, vocabulary: int) -> list[tuple[int, int, SimpleNamespace]]:
    """(step, number, group) of the log's first step. [] where there is none that can be read."""
    groups = []
    for path in completion_files(log_dir)[:1]:
        with open(path, errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    if "sampled_step" in row or (groups and row["step"] != groups[0][0]):
                        break
                    groups.append((row["step"], row["group"], read_group(row, vocabulary)))
                except (ValueError, KeyError, TypeError, RuntimeError, RecursionError):
                    print(f"warning: {path} has been changed; its first groups are not followed")
                    return []
    return groups


def read_group(row: dict, vocabulary: int) -> SimpleNamespace:
    """What `score` needs of an Experience. ValueError and others where something else is there."""
    completions = row["completions"]
    prompt_ids = torch.tensor(row["prompt_ids"])
    ids = [torch.tensor(completion["ids"]) for completion in completions]
    masks = [torch.tensor(completion["mask"]) for completion in completions]
    for one in [prompt_ids, *ids]:
        is_token = one.dtype == torch.long and one.ndim == 1 and len(one)
        if not is_token or one.min() < 0 or one.max() >= vocabulary:
            raise ValueError("not token ids")
    if [one.shape for one in ids] != [mask.shape for mask in masks]:
        raise ValueError("a mask for other tokens")
    return SimpleNamespace(
        prompt_ids=prompt_ids,
        completion_ids=ids,
        completion_masks=masks,
        sampled_log_probs=[torch.zeros(len(one)) for one in ids],
        advantages=torch.zeros(len(ids)),
    )
