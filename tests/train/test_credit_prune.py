"""Credit of groups that were thinned out, worked out by hand: baselines, weights, denominators."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from reroll.algo.baseline import Running
from reroll.config import AlgoSection, CorrectSection, PruneSection
from reroll.train.batch import minibatches
from reroll.train.credit import Credit, Scores, credit
from reroll.train.forwards import FLAT, Shares
from reroll.types import Finish, Group, Look, Prompt, Rollout
from tests.model.plain import plain as plain_forward
from tests.tiny import tiny, wide
from tests.train.batches import (
    MAX_TOKENS,
    assert_same,
    gradient_of,
    gradients_of,
    make_trainer,
    rollout,
    store,
)
from tests.train.batches import group as random_group

PROMPT = Prompt(0, "", (5, 6))


def looked(
    length: int,
    reward: float | None,
    *looks: tuple[int, float, float, bool, bool],
    prompt: Prompt = PROMPT,
) -> Rollout:
    """looks: (position, probability, survival, kept, ended)."""
    one = rollout(prompt, [3] * length, reward)
    one.looks = [Look(at, None, p, s, kept, ended, 1) for at, p, s, kept, ended in looks]
    one.completion.finish = Finish.ABORT if reward is None and looks else Finish.STOP
    return one


def thinned() -> Group:
    """Two of four kept, by chances of 1/4, 3/4, 1/2 and 1/2, at two tokens.

    Estimates of their rewards: .2 + 4 (1 - .2) = 3.4; .8; .4 + 2 (0 - .4) = -.4; 1, which ended
    before and was left out. Their mean is 1.2.
    """
    kept = [
        looked(3, 1.0, (2, 0.2, 0.25, True, False)),
        looked(4, 0.0, (2, 0.4, 0.5, True, False)),
    ]
    out = [
        looked(2, None, (2, 0.8, 0.75, False, False)),
        looked(1, 1.0, (1, 1.0, 0.5, False, True)),
    ]
    return Group(PROMPT, kept, out)


def whole(*rewards: float, length: int = 2) -> Group:
    """Left whole, and looked at."""
    return Group(PROMPT, [looked(length, r, (1, 0.3, 1.0, True, False)) for r in rewards])


def plain(*rewards: float) -> Group:
    return Group(PROMPT, [rollout(PROMPT, [3, 3], r) for r in rewards])


def credited(
    groups: list[Group], prune: dict[str, Any] | None = None, **settings: Any
) -> list[list[Credit]]:
    running = settings.pop("running", None)
    scores = settings.pop("scores", Scores())
    section = PruneSection(on=True, **prune) if prune is not None else None
    found, _ = credit(
        groups, AlgoSection(**settings), CorrectSection(), max_tokens=16, version=0,
        scores=scores, running=running, prune=section,
    )  # fmt: skip
    return found


def firsts(found: list[list[Credit]]) -> list[float]:
    """Advantage of each rollout, which all of its tokens have."""
    values = [one.advantages for part in found for one in part]
    assert all((v == v[0]).all() for v in values)
    return [v[0].item() for v in values]


# --- advantages -----------------------------------------------------------------------------------


def test_every_started_rollout_is_in_the_baseline() -> None:
    """Doubly robust estimates, those of the left out among them."""
    assert firsts(credited([thinned()], {}, advantage="dr_grpo")) == pytest.approx([-0.2, -1.2])
    # of the three others: (.8 - .4 + 1) / 3 and (3.4 + .8 + 1) / 3
    rloo = [1 - 1.4 / 3, 0 - 5.2 / 3]
    assert firsts(credited([thinned()], {}, advantage="rloo")) == pytest.approx(rloo)
    # known rewards 1 (counts 4), 0 (counts 2) and 1 of the one that had ended (counts 1), around
    # 1.2: variance (4 * .04 + 2 * 1.44 + .04) / 7 * 4 / 3
    scale = math.sqrt(3.08 / 7 * 4 / 3) + 1e-4
    grpo = [-0.2 / scale, -1.2 / scale]
    assert firsts(credited([thinned()], {}, advantage="grpo")) == pytest.approx(grpo)


def test_the_paper_compares_survivors_alone() -> None:
    paper = dict(mode="paper")
    assert firsts(credited([thinned()], paper, advantage="dr_grpo")) == [0.5, -0.5]
    assert firsts(credited([thinned()], paper, advantage="rloo")) == [1.0, -1.0]
    deviation = math.sqrt(0.5) + 1e-4
    found = credited([thinned()], paper, advantage="grpo")
    assert firsts(found) == pytest.approx([0.5 / deviation, -0.5 / deviation])
    assert all(one.inverse is None and (one.weights() == 1).all() for one in found[0])
    # and so does a run without pruning, of whatever it is given
    assert firsts(credited([thinned()], None, advantage="rloo")) == [1.0, -1.0]


@pytest.mark.parametrize("rule", ["grpo", "dr_grpo", "rloo"])
def test_groups_left_whole_are_compared_as_ever(rule: str) -> None:
    rewards = [(0.0, 1.0, 0.5), (1.0, 1.0), (0.25, 0.75, 1.0, 0.0)]
    found = credited([whole(*some) for some in rewards], {}, advantage=rule)
    expected = credited([plain(*some) for some in rewards], None, advantage=rule)
    assert firsts(found) == pytest.approx(firsts(expected), abs=1e-12)
    assert all(one.inverse is None for part in found for one in part)
    beside = credited([whole(0.0, 1.0), thinned(), plain(1.0, 0.0)], {}, advantage=rule)
    alone = [firsts(credited([g], {}, advantage=rule)) for g in (whole(0.0, 1.0), thinned())]
    assert firsts(beside) == pytest.approx([*alone[0], *alone[1], alone[0][1], alone[0][0]])


def test_survivors_that_earned_alike() -> None:
    """Skipped by default; trained on against all that were started if asked for."""

    def alike() -> Group:
        one = thinned()
        one.rollouts[1].reward = 1.0
        one.pruned[1].reward = 1.0
        return one

    assert firsts(credited([alike()], {}, advantage="dr_grpo")) == [0.0, 0.0]
    # estimates 3.4, 1.6, .8, 1
    found = credited([alike()], dict(equal="train"), advantage="dr_grpo")
    assert firsts(found) == pytest.approx([-0.7, -0.7])
    # a reward that differs and was known before counts as signal, though it was left out
    other = alike()
    other.pruned[1] = looked(1, 0.0, (1, 0.0, 0.5, False, True))
    assert any(firsts(credited([other], {}, advantage="dr_grpo")))


def test_an_ungraded_survivor_counts_as_it_was_expected_to() -> None:
    group = thinned()
    group.rollouts.append(looked(5, None, (2, 0.6, 0.5, True, False)))
    (found,) = credited([group], {}, advantage="dr_grpo")
    # estimates 3.4, -.4, .6, .8, 1
    assert firsts([found]) == pytest.approx([1 - 1.08, -1.08])
    assert [one.rollout for one in found] == group.rollouts[:2]


def test_samples_in_place_of_pruned_ones_are_their_rewards() -> None:
    group = thinned()
    group.rollouts.append(rollout(PROMPT, [3, 3], 0.2))
    (found,) = credited([group], {}, advantage="dr_grpo")
    mean = (4 * 1.2 + 0.2) / 5
    assert firsts([found]) == pytest.approx([1 - mean, -mean, 0.2 - mean])
    assert found[2].inverse is not None and found[2].inverse.tolist() == [1.0, 1.0]


def test_a_penalty_is_part_of_what_a_survivor_earned() -> None:
    """Its estimate is made of the shaped reward, here less .1 a nat of KL."""
    group = thinned()
    reference = torch.tensor([-1.0 - 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -3.0], dtype=torch.float64)
    found = credited(
        [group], {}, name="rloo", kl_coef=0.1, kl_estimator="k1", scores=Scores(reference)
    )
    # rewards 1 - .1 and 0 - .2: estimates .2 + 4 (.9 - .2) = 3, .4 + 2 (-.2 - .4) = -.8, .8, 1
    assert firsts(found) == pytest.approx([0.9 - 1.0 / 3, -0.2 - 4.8 / 3])


def test_reinforce_pp_counts_each_survivor_for_those_like_it() -> None:
    """The batch's mean and deviation are those of all that were started."""
    groups = [thinned(), plain(1.0, 0.0)]
    found = credited(groups, {}, name="reinforce_pp")
    # tokens: 3 of reward 1 that count 4, 4 of reward 0 that count 2, 2 and 2 that count 1
    weights = [4.0] * 3 + [2.0] * 4 + [1.0] * 4
    values = [1.0] * 3 + [0.0] * 4 + [1.0] * 2 + [0.0] * 2
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    squares = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    deviation = math.sqrt(squares / sum(weights) * 11 / 10 + 1e-8)
    got = [x for part in found for one in part for x in one.advantages.tolist()]
    assert got == pytest.approx([(v - mean) / deviation for v in values])
    # survivors alone in the paper
    found = credited([thinned(), plain(1.0, 0.0)], dict(mode="paper"), name="reinforce_pp")
    plainly = sum(values) / 11
    assert found[0][0].advantages[0].item() / found[0][1].advantages[0].item() == pytest.approx(
        (1 - plainly) / (0 - plainly)
    )


def test_the_running_baseline_counts_them_likewise() -> None:
    running = Running(1.0, 0.5)
    found = credited([thinned()], {}, advantage="running", running=running)
    # against the other one alone: with it, one more of the same mean
    assert firsts(found) == pytest.approx([1.0, -1.0])
    running.count()
    assert running.prompts[0] == pytest.approx([0.5 * 6, 0.5 * 4])
    assert running.every == pytest.approx([3.0, 2.0])
    later = credited([plain(1.0)], {}, advantage="running", running=running)
    # history: 3 rollouts' worth of mean 2/3, and one of the mean over all
    assert firsts(later) == pytest.approx([1 - (2 / 3 + 2.0) / 4])
    paper = Running(1.0, 0.5)
    credited([thinned()], dict(mode="paper"), advantage="running", running=paper)
    paper.count()
    assert paper.every == [1.0, 0.5]


# --- weights of tokens ----------------------------------------------------------------------------


def weights_of(prune: dict[str, Any], **settings: Any) -> list[list[float]]:
    (found,) = credited([thinned()], prune, **settings)
    return [one.weights().tolist() for one in found]


def test_tokens_before_the_probe_count_by_their_survival() -> None:
    # of survivals 1/4 and 1/2: 4 and 2, and 2 at most unless told otherwise
    assert weights_of(dict(cap=0.0)) == [[4.0, 4.0, 1.0], [2.0, 2.0, 1.0, 1.0]]
    assert weights_of({}) == [[2.0, 2.0, 1.0], [2.0, 2.0, 1.0, 1.0]]
    assert weights_of(dict(weigh="prefix", cap=1.5)) == [[1.5, 1.5, 1.0], [1.5, 1.5, 1.0, 1.0]]
    assert weights_of(dict(weigh="all", cap=3.0)) == [[3.0] * 3, [2.0] * 4]
    assert weights_of(dict(weigh="none")) == [[1.0] * 3, [1.0] * 4]
    assert weights_of(dict(mode="paper")) == [[1.0] * 3, [1.0] * 4]


def test_one_ratio_of_a_whole_rollout_takes_one_weight() -> None:
    for ratio in ("sequence", "product"):
        assert weights_of(dict(cap=0.0), ratio=ratio) == [[4.0] * 3, [2.0] * 4]
    assert weights_of(dict(weigh="prefix"), ratio="token") == weights_of({}, ratio="token")


def test_each_probe_weighs_what_it_had_read() -> None:
    kept = [
        looked(5, 1.0, (1, 0.5, 0.5, True, False), (3, 0.5, 0.25, True, False)),
        looked(2, 0.0, (1, 0.5, 1.0, True, False), (2, 0.0, 1.0, True, True)),
    ]
    out = [
        looked(2, None, (1, 0.5, 0.75, False, False)),
        looked(4, None, (1, 0.5, 0.75, True, False), (3, 0.5, 0.25, False, False)),
    ]
    (found,) = credited([Group(PROMPT, kept, out)], dict(cap=0.0))
    got = [one.weights().tolist() for one in found]
    assert got[0] == pytest.approx([8.0, 4.0, 4.0, 1.0, 1.0])
    assert got[1] == [1.0, 1.0]
    (capped,) = credited([Group(PROMPT, kept, out)], {})
    assert capped[0].weights().tolist() == pytest.approx([2.0, 2.0, 2.0, 1.0, 1.0])


# --- in the loss ----------------------------------------------------------------------------------


def test_denominators_count_tokens_as_they_are_weighed() -> None:
    groups = [thinned(), whole(0.0, 1.0), whole(1.0, 1.0, length=5)]
    groups[0].rollouts[0].completion.loss_mask[0] = False
    (part,) = minibatches(credited(groups, {}, advantage="rloo"), 1, 1000, True)
    # 2 + 1 of the first, 4 + 2 of the second; four of those left whole; ten without signal
    assert part.tokens == pytest.approx(3 + 6 + 4 + 10)
    # all four that were started
    assert part.rollouts == 4 + 2 + 2
    assert (part.groups, part.live_groups) == (3, 2)
    (paper,) = minibatches(credited(groups, dict(mode="paper"), advantage="rloo"), 1, 1000, True)
    assert paper.tokens == 2 + 4 + 4 + 10 and paper.rollouts == 2 + 2 + 2
    bare = credited(groups, dict(weigh="none"), advantage="rloo")
    assert [one.counts for part in bare for one in part] == [1.0] * 6
    packed = torch.cat([batch.inverse for batch in part.microbatches])
    assert sorted(packed.tolist()) == [1.0] * 7 + [2.0] * 4


def thin(group: Group, survivals: list[float], at: int, out: int) -> Group:
    """The last `out` rollouts of a group left out at a probe."""
    for r, s in zip(group.rollouts, survivals, strict=True):
        r.looks = [Look(at, 0.1, 0.4, s, True, False, 1)]
    for r in group.rollouts[len(survivals) - out :]:
        r.looks = [replace(r.looks[0], kept=False)]
        r.reward = None
        for name in ("token_ids", "logprobs", "behaviour_logprobs", "versions", "loss_mask"):
            setattr(r.completion, name, getattr(r.completion, name)[: at + 1])
        r.completion.finish = Finish.ABORT
    keep = len(survivals) - out
    return Group(group.prompt, group.rollouts[:keep], group.rollouts[keep:])


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("shares", [FLAT, Shares(trees=True)], ids=["flat", "trees"])
def test_weights_reach_the_gradient(average: str, shares: Shares) -> None:
    """That of the loss written out token by token, with each token's weight."""
    with wide():
        model = tiny("llama")
        groups = [
            thin(random_group(0, [1.0, 0.0, 1.0, 0.0], [6, 5, 7, 8]), [0.25, 0.5, 0.5, 0.75], 3, 2),
            random_group(1, [0.0, 1.0], [4, 5]),
        ]
        store(model, groups, noise=0.0)
        trainer = make_trainer(
            model, algo=dict(advantage="rloo", average=average), shares=shares, microbatch_tokens=14
        )
        trainer.prune = PruneSection(on=True)
        found, _ = trainer.credit(groups)
        assert [one.weights().tolist() for one in found[0]] == [
            [2.0] * 3 + [1.0] * 3,
            [2.0] * 3 + [1.0] * 2,
        ]
        (got,), metrics = gradients_of(trainer, found)
        loss = torch.zeros((), dtype=torch.float64)
        for one in (one for part in found for one in part):
            ids = one.rollout.completion.token_ids
            now_T, _ = plain_forward(model, list(one.rollout.prompt.token_ids), ids, 1.0)
            # on policy the ratio is 1, and its gradient that of the log-prob
            ratio_T = (now_T - now_T.detach()).exp()
            # four were started of the one and two of the other
            sizes = {"token": 9 + 8 + 9, "sequence": 6 * len(ids), "constant": 6 * MAX_TOKENS}
            loss = loss - (one.advantages * one.weights() * ratio_T).sum() / sizes[average]
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert_same(got, gradient_of(model, loss))
        # without the weights it is another one
        for one in found[0]:
            one.inverse, one.counts = None, 1.0
        (other,), _ = gradients_of(trainer, found)
        assert (got - other).norm() > 0.01 * got.norm()
