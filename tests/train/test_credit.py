"""Credit of every token, worked out by hand: rewards, KL, critic, lag and limits put together."""

import math

import pytest
import torch

from reroll.config import AlgoSection, CorrectSection
from reroll.config.algo import ALGORITHMS
from reroll.errors import UserError
from reroll.train.batch import minibatches
from reroll.train.credit import Credit, Scores, credit, graded
from reroll.types import Group, Prompt, Rollout
from tests.model.plain import plain
from tests.tiny import tiny
from tests.train.batches import group, make_trainer, rollout, store

PROMPT = Prompt(0, "", (5, 6))


def made(rewards: list[float | None], lengths: list[int] | None = None, *weights: float) -> Group:
    """A group of two tokens a rollout, or as many as told."""
    lengths = lengths or [2] * len(rewards)
    return Group(
        PROMPT,
        [
            rollout(PROMPT, [3] * n, r, weight=w)
            for r, n, w in zip(rewards, lengths, weights or [1.0] * len(rewards), strict=True)
        ],
    )


def credited(
    groups: list[Group], correct: CorrectSection | None = None, **settings
) -> tuple[list[list[Credit]], dict[str, float]]:
    """With a limit of 16 tokens at version 5 unless told otherwise."""
    others = dict(max_tokens=16, version=5, scores=Scores())
    given = {name: settings.pop(name, default) for name, default in others.items()}
    return credit(groups, AlgoSection(**settings), correct or CorrectSection(), **given)


def advantages(found: list[list[Credit]]) -> list[list[list[float]]]:
    return [[one.advantages.tolist() for one in part] for part in found]


def firsts(found: list[list[Credit]]) -> list[float]:
    """Advantage of each rollout, which all of its tokens have."""
    values = [one.advantages for part in found for one in part]
    assert all((v == v[0]).all() for v in values)
    return [v[0].item() for v in values]


def scores(**streams: list[float]) -> Scores:
    return Scores(**{f"{k}_T": torch.tensor(v, dtype=torch.float64) for k, v in streams.items()})


# --- the group rules ----------------------------------------------------------------------------


DEVIATION = math.sqrt(0.5) + 1e-4
"""of rewards 0 and 1 (n - 1), and what GRPO adds to it"""
RULES = {
    # rewards 0, 2, 4: mean 2, deviation 2; rewards 1 and 0: mean 1/2
    "grpo": ([-2 / 2.0001, 0.0, 2 / 2.0001], [0.5 / DEVIATION, -0.5 / DEVIATION]),
    "dr_grpo": ([-2.0, 0.0, 2.0], [0.5, -0.5]),
    # others' means: 3, 2, 1; 0 and 1
    "rloo": ([-3.0, 0.0, 3.0], [1.0, -1.0]),
}


@pytest.mark.parametrize("rule", RULES)
def test_group_rules_by_hand(rule):
    three, two = RULES[rule]
    groups = [
        made([0.0, 2.0, 4.0], [1, 3, 2]),
        made([1.0, None, 0.0], [2, 5, 4]),
        made([3.0, None]),  # nothing to compare with
        made([None, None]),
        made([7.0, 7.0]),
    ]
    groups[4].rollouts.append(Rollout(PROMPT, 0, 0, reward=1.0))  # no tokens to credit
    found, metrics = credited(groups, advantage=rule)
    assert [len(part) for part in found] == [3, 2, 1, 0, 2]
    assert firsts(found) == pytest.approx([*three, *two, 0.0, 0.0, 0.0], abs=1e-12)
    assert [len(one.advantages) for one in found[0]] == [1, 3, 2]
    assert [one.rollout for one in found[1]] == [groups[1].rollouts[0], groups[1].rollouts[2]]
    assert [one.rollout for part in found for one in part] == graded(groups)
    assert all(one.advantages.dtype == torch.float64 for part in found for one in part)
    # the third and fourth: fewer than two graded
    assert metrics == {"small_groups": 2.0}


@pytest.mark.parametrize(
    "rule, expected",
    [
        # weights 2, 1, 1: mean (2 * 0 + 1 + 3) / 4 = 1, variance 6 / 4 * 3 / 2
        ("grpo", [-1 / 1.5001, 0.0, 2 / 1.5001]),
        ("dr_grpo", [-1.0, 0.0, 2.0]),
        # without it, the first has (1 + 3) / 2 beside it, the second 3 / 3, the third 1 / 3
        ("rloo", [-2.0, 0.0, 3 - 1 / 3]),
    ],
)
def test_weights_of_rollouts_count_in_the_group(rule, expected):
    found, _ = credited([made([0.0, 1.0, 3.0], None, 2.0, 1.0, 1.0)], advantage=rule)
    assert firsts(found) == pytest.approx(expected, abs=1e-12)


def with_logprobs(group: Group, *logprobs: list[float]) -> Group:
    for r, given in zip(group.rollouts, logprobs, strict=True):
        assert len(given) == len(r.completion.token_ids)
        r.completion.logprobs = given
        r.completion.behaviour_logprobs = [9.0] * len(given)  # not what the KL is of
    return group


@pytest.mark.parametrize(
    "estimator, kl",
    [
        # log-ratios to the reference: 0.5, 0 (and 7, of a given token) of the first rollout, 1
        ("k1", [0.5, 1.0]),
        ("k2", [0.125, 0.5]),
        ("k3", [math.exp(-0.5) + 0.5 - 1, math.exp(-1) + 1 - 1]),
    ],
)
def test_kl_in_the_reward_of_a_group_is_summed_over_each_rollout(estimator, kl):
    two = with_logprobs(made([1.0, 0.0], [3, 1]), [-1.0, -2.0, 0.0], [-0.5])
    two.rollouts[0].completion.loss_mask[2] = False
    two.rollouts[0].completion.versions[2] = -1
    found, metrics = credited(
        [two],
        name="rloo",
        kl_coef=0.1,
        kl_estimator=estimator,
        scores=scores(reference=[-1.5, -2.0, -7.0, -1.5]),
    )
    # rewards 1 - 0.1 kl and 0 - 0.1 kl, each against the other
    difference = 1.0 - 0.1 * (kl[0] - kl[1])
    assert firsts(found) == pytest.approx([difference, -difference])
    assert metrics["kl"] == pytest.approx(sum(kl) / 3)
    assert [r.reward for r in two.rollouts] == [1.0, 0.0]


def test_a_kl_in_the_loss_leaves_the_advantages_alone():
    two = with_logprobs(made([1.0, 0.0], [3, 1]), [-1.0, -2.0, 0.0], [-0.5])
    reference = scores(reference=[-1.5, -2.0, -7.0, -1.5])
    found, metrics = credited([two], name="dr_grpo", kl_coef=0.1, scores=reference)
    assert firsts(found) == [0.5, -0.5]
    assert "kl" not in metrics
    # the loss needs the reference's log-probs
    assert [one.reference.tolist() for one in found[0] if one.reference is not None] == [
        [-1.5, -2.0, -7.0],
        [-1.5],
    ]


# --- credit per token ---------------------------------------------------------------------------


def test_reinforce_pp_by_hand():
    # one rollout a prompt; KL 0.2, 0.4 and 0.6, of which half is taken off
    one = with_logprobs(made([1.0], [2]), [-1.0, -1.0])
    other = with_logprobs(made([0.0], [1]), [-2.0])
    reference = scores(reference=[-1.2, -1.4, -2.6])
    settings = dict(name="reinforce_pp", kl_coef=0.5, scores=reference)
    found, metrics = credited([one, other], **settings)
    # rewards -0.1, 0.8 | -0.3; to go 0.7, 0.8 | -0.3: mean 0.4, squares 0.09 + 0.16 + 0.49
    deviation = math.sqrt(0.74 / 2 + 1e-8)
    assert advantages(found)[0][0] == pytest.approx([0.3 / deviation, 0.4 / deviation])
    assert advantages(found)[1][0] == pytest.approx([-0.7 / deviation])
    assert metrics == pytest.approx({"kl": 0.4})  # and no word of small groups
    # half as much a token later: 0.3, 0.8 | -0.3, mean 0.8 / 3
    found, _ = credited([one, other], gamma=0.5, **settings)
    centred = [x - 0.8 / 3 for x in (0.3, 0.8, -0.3)]
    deviation = math.sqrt(sum(x * x for x in centred) / 2 + 1e-8)
    got = [x for part in advantages(found) for row in part for x in row]
    assert got == pytest.approx([x / deviation for x in centred])


def test_reinforce_pp_is_normalised_over_trained_tokens_by_weight():
    # returns 1 | 1 1 1 | 0; the second rollout's middle token is not trained on, the third
    # counts three times: mean (1 + 2) / 6 = 1/2, variance (6 / 4) / 6 * 4 / 3 = 1/3
    groups = [made([1.0], [1]), made([1.0], [3]), made([0.0], [1], 3.0)]
    groups[1].rollouts[0].completion.loss_mask[1] = False
    found, _ = credited(groups, name="reinforce_pp")
    high = 0.5 / math.sqrt(1 / 3 + 1e-8)
    got = [x for part in advantages(found) for row in part for x in row]
    assert got == pytest.approx([high, high, high, high, -high])


def test_reinforce_pp_through_the_trainer():
    # KL of the stored log-probs to those of the reference, one rollout a prompt
    model, reference = tiny("llama"), tiny("llama", seed=1)
    groups = [group(0, [1.0], [3]), group(1, [0.0], [2]), group(2, [0.5], [4], prefix=2)]
    store(model, groups, noise=0.1, temperature=0.8)
    algo = dict(name="reinforce_pp", kl_coef=0.05)
    trainer = make_trainer(model, algo=algo, reference=reference, temperature=0.8)
    found, metrics = trainer.credit(groups)
    returns, kls, trained = [], [], []
    for r in (r for one in groups for r in one.rollouts):
        c = r.completion
        with torch.no_grad():
            initial, _ = plain(reference, list(r.prompt.token_ids), c.token_ids, 0.8)
        kl = [
            (a - b) * m for a, b, m in zip(c.logprobs, initial.tolist(), c.loss_mask, strict=True)
        ]
        to_go = [r.reward - 0.05 * sum(kl[i:]) for i in range(len(kl))]
        returns.append(to_go)
        kls += [x for x, m in zip(kl, c.loss_mask, strict=True) if m]
        trained += [x for x, m in zip(to_go, c.loss_mask, strict=True) if m]
    mean = sum(trained) / len(trained)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in trained) / (len(trained) - 1) + 1e-8)
    for part, to_go in zip(found, returns, strict=True):
        assert part[0].advantages.tolist() == pytest.approx([(x - mean) / deviation for x in to_go])
    assert metrics["kl"] == pytest.approx(sum(kls) / 7)
    # the penalty is felt: without it all tokens of a rollout have the same credit
    assert found[0][0].advantages.std() > 0.01


def test_gae_by_hand():
    # deltas 0.9 * 0.25 - 0.5 = -0.275 and 1 - 0.25 = 0.75; 0.9 * 0.8 = 0.72
    groups = [made([1.0], [2]), made([0.5], [1])]
    settings = dict(name="ppo", gamma=0.9, lam=0.8, scores=scores(values=[0.5, 0.25, 0.1]))
    found, metrics = credited(groups, whiten=False, **settings)
    raw = [0.265, 0.75, 0.4]
    assert advantages(found)[0][0] == pytest.approx(raw[:2])
    assert advantages(found)[1][0] == pytest.approx(raw[2:])
    assert metrics == {}
    white, _ = credited(groups, **settings)
    mean = sum(raw) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in raw) / 2 + 1e-8)
    got = [x for part in advantages(white) for row in part for x in row]
    assert got == pytest.approx([(x - mean) / deviation for x in raw])
    # the critic learns what was, not what was whitened
    for part in (found, white):
        returns = [one.returns.tolist() for row in part for one in row if one.returns is not None]
        assert returns[0] == pytest.approx([0.765, 1.0]) and returns[1] == pytest.approx([0.5])
        assert part[0][0].values is not None and part[0][0].values.tolist() == [0.5, 0.25]


def test_gae_with_a_kl_at_every_token_but_those_given():
    # KL 9 (given: no penalty), 0.2, 0.4; a tenth of it off, at its token
    one = with_logprobs(made([1.0], [3]), [0.0, -1.0, -1.0])
    one.rollouts[0].completion.versions[0] = -1
    one.rollouts[0].completion.loss_mask[0] = False
    streams = scores(reference=[-9.0, -1.2, -1.4], values=[0.5, 0.25, 0.5])
    found, metrics = credited(
        [one], name="ppo", kl_coef=0.1, gamma=0.5, lam=0.5, whiten=False, scores=streams
    )
    # rewards 0, -0.02, 0.96: deltas 0.125 - 0.5, -0.02 + 0.25 - 0.25, 0.96 - 0.5
    third = 0.46
    second = -0.02 + third / 4
    first = -0.375 + second / 4
    assert advantages(found)[0][0] == pytest.approx([first, second, third])
    assert metrics["kl"] == pytest.approx(0.3)


# --- overlong replies ---------------------------------------------------------------------------


def test_soft_overlong_punishment_is_credit_and_no_reward():
    # a limit of 16, the last quarter of it: 12 tokens get 0, 14 get -1/2, 16 get -1
    three = made([1.0, 1.0, 1.0], [12, 14, 16])
    found, metrics = credited([three], name="dr_grpo", overlong=0.25)
    assert firsts(found) == pytest.approx([0.5, 0.0, -0.5])
    assert [r.reward for r in three.rollouts] == [1.0, 1.0, 1.0]
    assert metrics["overlong"] == pytest.approx(-0.5)
    # the limit is the engine's
    found, metrics = credited([three], name="dr_grpo", overlong=0.25, max_tokens=32)
    assert firsts(found) == [0.0] * 3 and metrics["overlong"] == 0.0
    found, metrics = credited([three], name="dr_grpo")
    assert firsts(found) == [0.0] * 3 and "overlong" not in metrics


def test_tokens_that_were_given_do_not_count_as_length():
    two = made([1.0, 1.0], [16, 16])
    two.rollouts[0].completion.versions[:4] = [-1] * 4
    two.rollouts[0].completion.loss_mask[:4] = [False] * 4
    found, metrics = credited([two], name="dr_grpo", overlong=0.25)
    assert firsts(found) == pytest.approx([0.5, -0.5])
    assert metrics["overlong"] == pytest.approx(-0.5)


@pytest.mark.parametrize("name", ["reinforce_pp", "ppo"])
def test_overlong_punishment_stands_at_the_last_token(name):
    groups = [made([1.0], [16]), made([0.0], [2])]
    values = scores(values=[0.0] * 18) if name == "ppo" else Scores()
    found, _ = credited(groups, name=name, overlong=0.25, scores=values)
    # 1 - 1 is no better than 0: nothing varies
    assert not any(one.advantages.any() for part in found for one in part)
    found, _ = credited(groups, name=name, scores=values)
    assert (found[0][0].advantages > 0).all() and (found[1][0].advantages < 0).all()


# --- stale and given tokens ---------------------------------------------------------------------


def aged(versions: list[int], reward: float = 1.0, masked: tuple[int, ...] = ()) -> Rollout:
    """A rollout whose tokens were drawn by these versions, -1 for those given."""
    prefix = versions.count(-1)
    one = rollout(PROMPT, [3] * len(versions), reward, prefix=prefix)
    one.completion.versions = versions
    for i in masked:
        one.completion.loss_mask[i] = False
    return one


def pair(*versions: int, masked: tuple[int, ...] = ()) -> list[Group]:
    """A group of such a rollout and a fresh one at version 5."""
    return [Group(PROMPT, [aged(list(versions), masked=masked), aged([5, 5], 0.0)])]


def test_lags_are_optimizer_steps_since_the_draw():
    ((one, other),), _ = credited(pair(-1, 3, 5, 4, 0))
    assert one.lags == [0, 2, 0, 1, 5] and other.lags == [0, 0]
    assert one.mask == [False, True, True, True, True]
    ((one, _),), _ = credited(pair(-1, 3, 5, 4, 0), version=105)
    assert one.lags == [0, 102, 100, 101, 105]


@pytest.mark.parametrize(
    "max_lag, mask, tokens",
    [
        (5, [False, True, True, True, False, True], 4 + 2),
        (2, [False, True, True, True, False, False], 3 + 2),
        (1, [False, False, True, True, False, False], 2 + 2),
        (0, [False, False, True, False, False, False], 1 + 2),
    ],
)
def test_masking_stale_tokens(max_lag, mask, tokens):
    groups = pair(-1, 3, 5, 4, 5, 0, masked=(4,))
    found, _ = credited(groups, CorrectSection(mode="mask", max_lag=max_lag))
    assert found[0][0].mask == mask and found[0][1].mask == [True, True]
    # what averages are over
    (part,) = minibatches(found, 1, 1000, True)
    assert part.tokens == tokens and part.rollouts == 2
    assert part.microbatches[0].mask.tolist() == [1.0, 1.0, *map(float, mask)]  # by length
    # the completion keeps its own: another version may train on it
    assert groups[0].rollouts[0].completion.loss_mask == [False, True, True, True, False, True]


def test_masked_tokens_keep_their_penalty_and_have_no_say():
    one = with_logprobs(pair(3, 5)[0], [0.0, -1.0], [-1.0, -1.0])
    reference = scores(reference=[-50.0, -1.2, -1.4, -1.0])
    settings = dict(name="rloo", kl_coef=0.5, scores=reference)
    found, metrics = credited([one], CorrectSection(mode="mask", max_lag=0), **settings)
    # KL 50 + 0.2 and 0.4 + 0: what a reply earned does not depend on which tokens are trained on
    assert firsts(found) == pytest.approx([1 - 25.1 + 0.2, -1 + 25.1 - 0.2])
    assert metrics["kl"] == pytest.approx(50.6 / 4)
    found, _ = credited([one], name="reinforce_pp", scores=Scores())
    kept, _ = credited([one], CorrectSection(mode="mask", max_lag=0), name="reinforce_pp")
    # 1 of 4 tokens left out: mean 1/2 becomes 1/3
    assert advantages(found)[0][0] == pytest.approx([0.5 / math.sqrt(1 / 3 + 1e-8)] * 2)
    assert advantages(kept)[0][0] == pytest.approx([2 / 3 / math.sqrt(1 / 3 + 1e-8)] * 2)


RATIOS = ["sequence", "product"]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("mode", ["none", "mask"])
def test_one_ratio_over_several_versions_is_refused(ratio, mode):
    correct = CorrectSection(mode=mode, max_lag=5) if mode == "mask" else CorrectSection()
    with pytest.raises(UserError) as raised:
        credited(pair(3, 5), correct, ratio=ratio)
    message = str(raised.value)
    assert message.startswith(f"algo.ratio = {ratio!r}: ") and "\n" not in message
    assert "2 policy versions" in message and "correct.mode = 'decoupled'" in message


@pytest.mark.parametrize("ratio", RATIOS)
def test_where_one_ratio_has_a_meaning(ratio):
    several = pair(3, 4, 5)
    assert credited(several, CorrectSection(mode="decoupled"), ratio=ratio)
    assert credited(several, ratio="token")
    # the old ones are left out
    assert credited(several, CorrectSection(mode="mask", max_lag=0), ratio=ratio)
    with pytest.raises(UserError):
        credited(several, CorrectSection(mode="mask", max_lag=1), ratio=ratio)
    # one version, however old; given tokens; tokens that are not trained on
    assert credited(pair(3, 3, 3), ratio=ratio)
    assert credited(pair(-1, -1, 3, 3), ratio=ratio)
    assert credited(pair(3, 5, 5, masked=(0,)), ratio=ratio)
    # the rollouts of a group may differ, and what is not graded does not matter
    ungraded = [Group(PROMPT, [aged([5, 5]), aged([3, 3]), aged([3, 5], None)])]
    assert credited(ungraded, ratio=ratio)


# --- what comes in ------------------------------------------------------------------------------


def test_each_rollout_gets_its_own_part_of_the_scores():
    groups = [made([0.0, None, 1.0], [2, 5, 1]), made([1.0, 0.0], [3, 2])]
    streams = Scores(*(torch.arange(8, dtype=torch.float32) + 10 * k for k in range(3)))
    found, _ = credited(groups, scores=streams)
    cut = [[0, 1], [2], [3, 4, 5], [6, 7]]
    for k, name in enumerate(("reference", "proximal", "values")):
        got = [getattr(one, name) for part in found for one in part]
        assert [x.tolist() for x in got] == [[10 * k + i for i in part] for part in cut]
        assert all(x.dtype == torch.float64 for x in got)
    found, _ = credited(groups)
    for one in (one for part in found for one in part):
        assert one.reference is one.proximal is one.values is one.returns is None


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("groups", [[], [made([None, None]), made([None])]], ids=["none", "bad"])
def test_a_batch_without_graded_rollouts(name, groups):
    model = tiny("llama")
    critic = dict() if name == "ppo" else None
    trainer = make_trainer(model, algo=dict(name=name), critic=critic)
    before = [p.clone() for p in model.parameters()]
    found, metrics = trainer.credit(groups)
    assert found == [[] for _ in groups]
    metrics |= trainer.step(found)
    assert all(math.isfinite(x) for x in metrics.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
