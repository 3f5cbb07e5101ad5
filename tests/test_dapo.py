"""What only DAPO has: dynamic sampling, the overlong punishment and the overlong filter.
All numbers are by hand."""

import zlib

import pytest
import torch
from helpers import load_experiment
from test_run import assert_resumes, checkpoints, metrics, read_weights, run_main

dapo = load_experiment("experiment_dapo")
train, Config = dapo.train, dapo.train.Config
RIGHT = "<think>1+1=2</think>\n<answer>2</answer>"
WRONG = "<think>1+1=3</think>\n<answer>3</answer>"


def group(right: int, lengths: list[int], truncated=(), answer="2"):
    """An Experience of completions with these numbers of tokens,
    the first `right` of them correct, all well formed."""
    return dapo.replay_buffer.Experience(
        prompt_ids=torch.tensor([5, 6, 7]),
        completion_ids=[10 * i + 20 + torch.arange(length) for i, length in enumerate(lengths)],
        completion_masks=[torch.ones(length, dtype=torch.long) for length in lengths],
        sampled_log_probs=[torch.zeros(length) for length in lengths],
        truncated=torch.tensor([float(i in truncated) for i in range(len(lengths))]),
        completions=[RIGHT if i < right else WRONG for i in range(len(lengths))],
        answer=answer,
    )


def test_defaults_are_the_papers():
    config = Config()
    assert (config.clip_eps_low, config.clip_eps_high) == (0.2, 0.28)
    assert config.critic_type == "dapo" and config.kl_weight == 0 and config.overlong_cache == 0.2


# ---------------------------------------------------------------- soft overlong punishment
def test_overlong_punishment_by_hand():
    """L_max = 20, L_cache = 4: nothing up to 16 tokens, -1 at 20, linear between.
    Bug: a port counts characters."""
    config = Config(max_new_tokens=20)
    punished = train.overlong_punishment(group(0, [1, 15, 16, 17, 18, 19, 20, 30]), config)
    assert punished.tolist() == pytest.approx([0, 0, 0, -0.25, -0.5, -0.75, -1, -1], abs=1e-6)
    config = Config(max_new_tokens=64)  # L_cache = 12.8
    punished = train.overlong_punishment(group(0, [51, 52, 58, 64]), config)
    assert punished.tolist() == pytest.approx([0, -0.8 / 12.8, -6.8 / 12.8, -1], abs=1e-6)


def test_overlong_cache_0_punishes_nothing():
    assert (
        train.overlong_punishment(
            group(0, [1, 19, 20]), Config(max_new_tokens=20, overlong_cache=0)
        ).tolist()
        == [0] * 3
    )


def test_the_punishment_is_part_of_the_reward_before_mean_and_std():
    """Rewards 1.1 and 0.1 (right and wrong, in form),
    0.5 less at 18 of 20 tokens and 1 less at 20."""
    experience = group(2, [4, 18, 4, 20])
    parts = train.reward(experience, Config(max_new_tokens=20))
    assert set(parts) == {"reward_accuracy", "reward_format", "reward_overlong"}
    rewards = sum(parts.values())
    assert rewards.tolist() == pytest.approx([1.1, 0.6, 0.1, -0.9])
    assert train.group_advantages(rewards).tolist() == pytest.approx(
        [1.0246, 0.4391, -0.1464, -1.3173], abs=1e-3
    )


# ---------------------------------------------------------------- dynamic sampling
class Script:
    """In place of sampling: prompt number i gets a group with `rights[i]` correct completions of
    ragged lengths."""

    def __init__(self, rights: list[int], monkeypatch, **settings) -> None:
        self.prompts = [train.Prompt([i], "2") for i in range(len(rights))]
        self.rights, self.rounds = rights, []
        self.config = Config(group_size=4, rollouts_per_step=4, max_new_tokens=20, **settings)
        monkeypatch.setattr(train, "rollout", self.rollout)

    def rollout(self, policy, tokenizer, prompts, group_size, config, generator):
        self.rounds.append([prompt.ids[0] for prompt in prompts])
        groups = [group(self.rights[prompt.ids[0]], [3, 8, 18, 20]) for prompt in prompts]
        for prompt, experience in zip(prompts, groups):
            experience.prompt_ids = torch.tensor(prompt.ids)
        return groups

    def step(self, cursor=0, step=1):
        """(numbers of the kept prompts, numbers of all that were sampled, the new cursor)."""
        policy = torch.nn.Linear(1, 1)
        policy.device = torch.device("cpu")
        kept, sampled, cursor = train.dynamic_sampling(
            policy, None, self.prompts, cursor, step, self.config
        )
        number = lambda groups: [  # noqa: E731
            experience.prompt_ids.item() for experience in groups
        ]
        return number(kept), number(sampled), cursor


def test_groups_that_are_all_wrong_or_all_right_are_replaced(monkeypatch):
    """Also where ragged lengths give them spread.
    Bug: a port looks at the spread of rewards, which length punishes."""
    script = Script([0, 4, 0, 1, 4, 3] * 8, monkeypatch)
    kept, sampled, cursor = script.step()
    assert len(kept) == 4 and all(script.rights[i] in (1, 3) for i in kept)
    assert kept == [i for i in sampled if script.rights[i] in (1, 3)]
    wasted = [i for i in sampled if i not in kept]
    assert wasted and cursor == len(sampled) == len(set(sampled))
    all_wrong = train.reward(group(0, [3, 8, 18, 20]), script.config)
    assert train.group_advantages(sum(all_wrong.values())).any()  # it does have spread
    expected, missing = [], 4
    for numbers in script.rounds:
        expected.append(missing)
        missing -= sum(script.rights[i] in (1, 3) for i in numbers)
    assert [len(numbers) for numbers in script.rounds if numbers] == [n for n in expected if n]


@pytest.mark.parametrize("useless", [0, 4])
def test_no_such_group_is_kept_in_a_whole_epoch(useless, monkeypatch):
    script = Script([useless, 2] * 10, monkeypatch)
    cursor, all_kept = 0, []
    while cursor < 20:
        kept, _, cursor = script.step(cursor)
        all_kept += kept
    assert sorted(all_kept) == list(range(1, 20, 2))


def test_a_full_batch_takes_one_round(monkeypatch):
    script = Script([2] * 16, monkeypatch)
    kept, sampled, cursor = script.step()
    assert (
        kept == sampled
        and cursor == 4
        and [len(numbers) for numbers in script.rounds if numbers] == [4]
    )


def test_the_rounds_are_limited(monkeypatch):
    script = Script([0] * 64, monkeypatch, max_sampling_rounds=3)
    assert script.step()[0] == [] and [len(numbers) for numbers in script.rounds] == [4, 4, 4]
    script = Script([0] * 64, monkeypatch, max_sampling_rounds=1)
    assert script.step()[2] == 4


@pytest.mark.parametrize("seed", range(5))
def test_an_epoch_takes_every_prompt_once(seed, monkeypatch):
    """Bug: prompts of discarded groups come twice,
    or those of a batch that was not filled are lost."""
    script = Script(
        [0, 4, 1, 3, 2, 0, 0, 2, 1, 4, 0, 3, 0],
        monkeypatch,
        epochs=3,
        seed=seed,
        max_sampling_rounds=2,
    )
    taken, cursor, step = [], 0, 0
    while cursor < 3 * 13:
        step += 1
        _, sampled, cursor = script.step(cursor, step)
        taken += sampled
    epochs = [taken[i : i + 13] for i in (0, 13, 26)]
    assert len(taken) == 39 and all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


# ---------------------------------------------------------------- overlong filtering
def batch_of(experiences, **settings):
    config = Config(
        group_size=4, rollouts_per_step=2, train_batch_size=8, max_new_tokens=20, **settings
    )
    for experience in experiences:
        experience.rewards = sum(train.reward(experience, config).values())
        experience.advantages = train.group_advantages(experience.rewards)
    replay_buffer = dapo.replay_buffer.ReplayBuffer(packed=True)
    replay_buffer.extend([train.without_truncated(experience) for experience in experiences])
    (batch,) = replay_buffer.batches(config, torch.Generator().manual_seed(0))
    return batch


@pytest.mark.parametrize(
    "critic, weights",
    [
        # 3 + 5 + 7 + 8 tokens: the 20 are not counted
        ("dapo", {3: 1 / 23, 5: 1 / 23, 7: 1 / 23, 8: 1 / 23}),
        ("grpo", {3: 1 / 24, 5: 1 / 40, 7: 1 / 56, 8: 1 / 64}),  # of 8 completions: it stays one
        ("drgrpo", {3: 1 / 160, 5: 1 / 160, 7: 1 / 160, 8: 1 / 160}),
    ],
)
def test_truncated_tokens_leave_the_loss_and_the_count(critic, weights):
    groups = [
        group(1, [3, 20, 5, 20], truncated=(1, 3)),
        group(1, [7, 20, 8, 20], truncated=(1, 3)),
    ]
    batch = batch_of(groups, critic_type=critic)
    found = torch.cat([micro_batch.weights for micro_batch in batch])
    assert sorted(found.tolist()) == pytest.approx(
        sorted(w for length, w in weights.items() for _ in range(length))
    )
    targets = torch.cat([micro_batch.targets for micro_batch in batch])
    assert not set(targets.tolist()) & set(range(30, 40))  # those of the second completion
    assert (
        sum(int(micro_batch.members.any(-1).sum()) for micro_batch in batch)
        == 2 * 3 + 2 + 4 + 6 + 7
    )  # not forwarded


def test_truncated_completions_count_in_their_groups_mean_and_std():
    """Rewards 1.1, -0.9 (wrong, 20 of 20 tokens), 0.1, 0.1:
    with it the mean is 0.1, without it would be 0.43."""
    experience = group(1, [3, 20, 5, 8], truncated=(1,))
    batch_of([experience, group(1, [7, 7, 7, 7])])
    assert experience.advantages.tolist() == pytest.approx([1.2246, -1.2246, 0, 0], abs=1e-3)
    filtered = train.without_truncated(experience)
    assert filtered.advantages is experience.advantages
    assert [int(mask.sum()) for mask in filtered.completion_masks] == [3, 0, 5, 8]
    # metrics go on to see what was sampled
    assert [int(mask.sum()) for mask in experience.completion_masks] == [3, 20, 5, 8]


def test_a_batch_of_truncated_completions_alone_needs_no_forward():
    assert (
        batch_of([group(2, [20] * 4, truncated=range(4)), group(1, [20] * 4, truncated=range(4))])
        == []
    )


# ---------------------------------------------------------------- runs
def rarely_right(completion: str, *_) -> float:
    """Right by chance, so that many groups of four are all wrong and few all right."""
    return float(zlib.crc32(completion.encode()) % 4 == 0)


@pytest.fixture
def chance(monkeypatch):
    monkeypatch.setattr(train, "accuracy_reward", rarely_right)


def test_resume_with_discarded_groups(tmp_path, model, chance):
    """Bit for bit, over the end of an epoch (16 prompts),
    with rounds that end before the batch is full."""
    whole = assert_resumes(
        tmp_path, model, "experiment_dapo", max_steps=6, epochs=4, max_sampling_rounds=2
    )
    lines = metrics(whole)[1:]
    assert any(line["wasted_fraction"] > 0 for line in lines[:2]) and any(
        line["groups"] < 4 for line in lines
    )
    state = torch.load(
        checkpoints(whole, experiment="experiment_dapo")[6] / "trainer.pt", weights_only=True
    )
    assert state["prompt_cursor"] > 16


def test_a_run_ends_with_its_prompts(tmp_path, model, chance, monkeypatch):
    """The number of steps is not known before:
    the last one evaluates and saves, and a resume has nothing to do."""
    sampled, dynamic_sampling = [], train.dynamic_sampling

    def count(*args):
        kept, groups, cursor = dynamic_sampling(*args)
        sampled.extend(groups)
        return kept, groups, cursor

    monkeypatch.setattr(train, "dynamic_sampling", count)
    settings = dict(
        experiment="experiment_dapo",
        epochs=2,
        max_steps=None,
        checkpoint_interval=100,
        eval_interval=100,
    )
    run_main(tmp_path, model, **settings)
    lines = metrics(tmp_path)
    last = lines[-1]["step"]
    assert len(sampled) == 32 and last < 8 and "eval_accuracy" in lines[-1]
    assert list(checkpoints(tmp_path, experiment="experiment_dapo")) == [last]
    run_main(tmp_path, model, resume=True, **settings)
    assert metrics(tmp_path) == lines


def test_a_step_without_a_group_to_learn_from(tmp_path, model, monkeypatch):
    """Nothing is ever right: no update, no error, and figures that are JSON."""
    monkeypatch.setattr(train, "accuracy_reward", lambda *_: 0.0)
    run_main(
        tmp_path, model, experiment="experiment_dapo", checkpoint_interval=1, max_sampling_rounds=2
    )
    first, second = (
        read_weights(path) for path in checkpoints(tmp_path, experiment="experiment_dapo").values()
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for line in metrics(tmp_path)[1:]:
        assert line["groups"] == 0 and line["wasted_fraction"] == 1 and line["loss"] is None


def test_first_loss_is_minus_the_mean_advantage_of_the_tokens_in_the_loss(
    tmp_path, model, chance, monkeypatch
):
    """Not 0, and nothing is wrong (pitfall 18); there is no KL to begin with."""
    seen, extend = [], dapo.replay_buffer.ReplayBuffer.extend
    monkeypatch.setattr(
        dapo.replay_buffer.ReplayBuffer,
        "extend",
        lambda self, groups: seen.extend(groups) or extend(self, groups),
    )
    run_main(tmp_path, model, experiment="experiment_dapo", max_steps=1, train_batch_size=16)
    lengths = torch.tensor([float(mask.sum()) for e in seen for mask in e.completion_masks])
    advantages = torch.cat([e.advantages for e in seen])
    assert len(seen) == 4 and (lengths == 0).any() and (lengths > 0).any()
    line = metrics(tmp_path)[1]
    assert line["loss"] == pytest.approx(
        float(-(advantages * lengths).sum() / lengths.sum()), abs=1e-5
    )
    assert abs(line["loss"]) > 1e-3 and line["grad_norm"] > 0 and line["kl"] is None


def test_refuses_no_rounds(tmp_path, model):
    with pytest.raises(
        SystemExit, match="^error: --max-sampling-rounds 0: must be a number from 1 to"
    ):
        run_main(tmp_path, model, experiment="experiment_dapo", max_sampling_rounds=0)
