"""What pruned groups estimate: exact expected gradients over every prefix, suffix and thinning.

One prompt of a world in `thinning`; survival depends on the siblings' guesses, which are wrong.
EXACT says what has the policy gradient as its expectation (as a whole group's leave-one-out
gradient has) whatever the world is. BIASED has the cosine to it, and the distance from it in
lengths of it, of what has not, in this one world, a hard prompt of whose 4 rollouts 2 are kept.
`pytest -s` prints them as measured.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest

from reroll.algo import advantage
from reroll.algo.thinned import Look, advantages, estimates, lives, weights
from tests.algo.thinning import (
    Group,
    World,
    any_subset,
    by_prefix,
    cosine,
    distance,
    each_alone,
    expected,
    spread_out,
    thinned_groups,
    tilted,
    uniformly,
)


def hard_prompt() -> World:
    """Expected reward .12; after its prefixes 0 (it has ended), .01, .34 and .88."""
    world = World((4, 2))
    world.laws |= {(): [0.25, 0.5, 0.2, 0.05], (1,): [0.9, 0.1], (2,): [0.7, 0.3], (3,): [0.2, 0.8]}
    world.rewards = {(0,): 0.0, (1, 0): -0.1, (1, 1): 1.0, (2, 0): 0.1, (2, 1): 0.9}
    world.rewards |= {(3, 0): 0.0, (3, 1): 1.1}
    world.guesses = {(1,): 0.15, (2,): 0.35, (3,): 0.8}
    return world


WORLDS = {
    # name: (world, rollouts of a group, kept)
    "hard": (hard_prompt(), 4, 2),
    "any": (World((5, 3)), 3, 2),
    "two stages": (World((4, 3, 2), seed=1), 3, 2),
}
"""in "two stages" rollouts end before the first stage, between the two, and after"""
G = {name: world.policy_gradient() for name, (world, _, _) in WORLDS.items()}
TOLERANCE = 1e-9
"""of what is exact; rounding is near 1e-14"""


@cache
def groups(name: str, draw: Callable = each_alone, random: bool = False) -> list[Group]:
    world, n, keep = WORLDS[name]
    return thinned_groups(world, n, uniformly(keep) if random else tilted(keep), draw)


def weighed(where, cap: float, group: Group):
    """Weights, and what to divide by: all that were started; without weights those expected to be
    kept, that is, times the mean survivals."""
    size = float(len(group.paths))
    for stage in range(max(map(len, group.looks)) if where == "none" else 0):
        size *= np.mean([looks[stage].survival for looks in group.looks if len(looks) > stage])
    return weights(group.looks, [len(path) for path in group.paths], where, cap), size


def estimate(
    name="hard", rule="rloo", where="all", cap=0.0, draw=each_alone, random=False, **settings
) -> np.ndarray:
    def credit(group, rewards):
        return advantages(rule, group.looks, rewards, **settings)

    found = groups(name, draw, random)
    return expected(WORLDS[name][0], found, credit, partial(weighed, where, cap))


def survivors(rule: Callable, draw=each_alone, random=False) -> np.ndarray:
    """Only the kept are compared with one another, all tokens weigh 1: as published."""
    return expected(
        WORLDS["hard"][0],
        groups("hard", draw, random),
        lambda group, rewards: rule(rewards),
        partial(weighed, "none", 0.0),
    )


@cache
def whole(rule: Callable, name: str = "hard") -> np.ndarray:
    """Nothing is thinned."""
    world, n, _ = WORLDS[name]
    return expected(
        world,
        thinned_groups(world, n, None),
        lambda group, rewards: rule(rewards),
        lambda group: ([[1.0] * len(path) for path in group.paths], n),
    )


# ---- the tables --------------------------------------------------------------------------------

Estimate = Callable[[], np.ndarray]

EXACT: dict[str, tuple[str, Estimate]] = {
    # name: (world, expected gradient); independent thinning, "rloo", all weights, no cap unless
    "nothing thinned": ("hard", lambda: whole(advantage.rloo)),
    "as it is": ("hard", lambda: estimate()),
    "as it is, any world": ("any", lambda: estimate("any")),
    "as it is, two stages": ("two stages", lambda: estimate("two stages")),
    "random, survivors only": ("hard", lambda: survivors(advantage.rloo, any_subset, True)),
    "random, no weights": ("hard", lambda: estimate(where="none", random=True)),
}

BIASED: dict[str, tuple[float, float, Estimate]] = {
    # name: (cosine, distance, expected gradient); differs from "as it is" by what the name says
    "systematic sampling": (0.9994, 0.0492, lambda: estimate(draw=spread_out)),
    "cap 2": (0.9933, 0.1523, lambda: estimate(cap=2.0)),
    "prefix weights": (0.9623, 0.2998, lambda: estimate(where="prefix")),
    "prefix weights, two stages": (0.9969, 0.0799, lambda: estimate("two stages", where="prefix")),
    "no weights": (0.9745, 0.5137, lambda: estimate(where="none")),
    "skip_equal": (0.9996, 0.0551, lambda: estimate(skip_equal=True)),
    "Dr. GRPO": (0.9257, 0.5300, lambda: estimate(rule="dr_grpo")),
    "GRPO, nothing thinned": (0.8304, 1.7494, lambda: whole(advantage.grpo)),
    "GRPO": (0.9161, 0.6325, lambda: estimate(rule="grpo")),
    "GRPO, to GRPO's own": (0.9450, 0.5016, lambda: estimate(rule="grpo")),
    "systematic, no weights": (0.9711, 0.5399, lambda: estimate(where="none", draw=spread_out)),
    "systematic, prefix weights, cap 2": (
        0.9553,
        0.3283,
        lambda: estimate(where="prefix", cap=2.0, draw=spread_out),
    ),
    "systematic, prefix weights, cap 2, GRPO, to GRPO's own": (
        0.9465,
        0.4059,
        lambda: estimate(rule="grpo", where="prefix", cap=2.0, draw=spread_out),
    ),
    "survivors only": (0.9680, 0.3104, lambda: survivors(advantage.rloo)),
    "survivors only, systematic": (0.9563, 0.5554, lambda: survivors(advantage.rloo, spread_out)),
    "survivors only, systematic, Dr. GRPO": (
        0.9563,
        0.3796,
        lambda: survivors(advantage.dr_grpo, spread_out),
    ),
    "survivors only, systematic, GRPO": (
        0.8528,
        0.9290,
        lambda: survivors(advantage.grpo, spread_out),
    ),
    "survivors only, systematic, GRPO, to GRPO's own": (
        0.9819,
        0.3810,
        lambda: survivors(advantage.grpo, spread_out),
    ),
    "random but spread over the guesses, survivors only": (
        0.9935,
        0.1602,
        lambda: survivors(advantage.rloo, spread_out, True),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    world, expectation = EXACT[name]
    assert distance(expectation(), G[world]) < TOLERANCE


@pytest.mark.parametrize(
    "name", BIASED, ids=[f"{n}: cosine {c:.3f}" for n, (c, _, _) in BIASED.items()]
)
def test_biased(name):
    named_cosine, named_distance, expectation = BIASED[name]
    wanted = G["two stages" if "two stages" in name else "hard"]
    if name.endswith("to GRPO's own"):
        wanted = whole(advantage.grpo)
    found = expectation()
    print(f"{name:56} {cosine(found, wanted):.4f} {distance(found, wanted):.4f}")
    assert cosine(found, wanted) == pytest.approx(named_cosine, abs=6e-4)
    assert distance(found, wanted) == pytest.approx(named_distance, abs=6e-4)
    assert 1 - cosine(found, wanted) > 1e-4  # rounding is ten orders below: it is a bias


@pytest.mark.parametrize("name", WORLDS)
def test_the_enumeration_is_right(name):
    world, n, _ = WORLDS[name]
    assert math.fsum(world.chance(path) for path in world.rewards) == pytest.approx(1, rel=1e-12)
    for found in (thinned_groups(world, n, None), groups(name), groups(name, spread_out)):
        assert math.fsum(group.probability for group in found) == pytest.approx(1, rel=1e-12)
    assert any(look.ended and not look.kept for g in groups(name) for look in g.looks[0])
    # the policy gradient, by logits moved one at a time
    step, slopes = 1e-6, []
    for path, law in world.laws.items():
        for place in range(len(law)):
            sides = []
            for sign in (1, -1):
                odds = [p * math.exp(sign * step * (v == place)) for v, p in enumerate(law)]
                moved = {path: [x / sum(odds) for x in odds]}
                sides.append(value_under(world, world.laws | moved))
            slopes.append((sides[0] - sides[1]) / (2 * step))
    assert G[name].tolist() == pytest.approx(slopes, abs=1e-8)


def value_under(world: World, laws) -> float:
    return sum(
        reward * math.prod(laws[path[:t]][path[t]] for t in range(len(path)))
        for path, reward in world.rewards.items()
    )


def test_an_estimate_is_right_on_average_whatever_the_guesses():
    """And, given any prefix, whatever its siblings did to its survival."""
    world, _, _ = WORLDS["two stages"]
    sums = dict.fromkeys(range(4), 0.0)
    for group in groups("two stages"):
        rewards = [world.rewards.get(path) for path in group.paths]
        sums[group.paths[0][0]] += group.probability * estimates(group.looks, rewards)[0]
    for token, total in sums.items():
        assert total / world.chance((token,)) == pytest.approx(world.value((token,)), abs=1e-12)


# ---- signs -------------------------------------------------------------------------------------


def prefix_coefficients(world: World, found: list[Group], credit: Callable) -> list[float]:
    """Of each prefix: the expectation of a rollout's advantage, 0 if it was dropped."""
    sums = [0.0] * len(world.laws[()])
    for group in found:
        rewards = [
            world.rewards[path] if lives(looks) else None
            for path, looks in zip(group.paths, group.looks, strict=True)
        ]
        sums[group.paths[0][0]] += group.probability * credit(group, rewards)[0]
    return [total / p for total, p in zip(sums, world.laws[()], strict=True)]


def test_survivors_only_pushes_better_than_average_prefixes_down():
    world = World((3, 2), ends=False)
    law, values, survival = [0.7, 0.2, 0.1], [0.05, 0.3, 0.9], [0.1, 0.15, 1.0]
    world.laws = {(): law} | {(h,): [1 - v, v] for h, v in enumerate(values)}
    world.rewards = {(h, reply): float(reply) for h in range(3) for reply in range(2)}
    world.guesses = {(h,): 0.5 for h in range(3)}  # knows nothing
    mean = world.value(())
    assert values[0] < mean < values[1] < values[2]
    found = thinned_groups(world, 4, by_prefix({(h,): s for h, s in enumerate(survival)}))

    paper = prefix_coefficients(world, found, lambda group, rewards: advantage.rloo(rewards))
    assert paper[0] < 0 and paper[1] < -1e-3 and paper[2] > 0

    ours = prefix_coefficients(
        world, found, lambda group, rewards: advantages("rloo", group.looks, rewards)
    )
    exact = [s * (v - mean) for s, v in zip(survival, values, strict=True)]
    assert ours == pytest.approx(exact, abs=1e-12) and ours[1] > 0


# ---- by hand -----------------------------------------------------------------------------------

DROPPED = [Look(4, 0.2, 0.5, False, False)]
ENDED = [Look(3, 1.0, 0.25, False, True)]
ONCE = [Look(4, 0.4, 0.8, True, False)]
TWICE = [Look(4, 0.4, 0.5, True, False), Look(8, 0.7, 0.25, True, False)]
LATER = [Look(4, 0.4, 0.5, True, False), Look(8, 0.7, 0.25, False, False)]


def test_estimates():
    looks = [DROPPED, ENDED, ONCE, TWICE, LATER, ONCE, TWICE, [], []]
    found = estimates(looks, [None, None, 1.0, 0.0, None, None, None, 0.3, None])
    twice = 0.4 + (0.7 - 0.4) / 0.5
    wanted = [0.2, 1.0, 0.4 + 0.6 / 0.8, twice - 0.7 / 0.125, twice, 0.4, twice, 0.3]
    assert found[:-1] == pytest.approx(wanted) and math.isnan(found[-1])


@pytest.mark.parametrize("rule", ["grpo", "dr_grpo", "rloo"])
def test_without_thinning_the_advantages_are_the_usual_ones(rule):
    usual = getattr(advantage, rule)
    equal = [[0.1] * 3, [0.1, None, 0.1], [None, None], [None, 2.0], [1.0], []]
    for rewards in ([1.0, 0.0, 0.0], [0.3, None, -2.0, 0.7], *equal):
        found = advantages(rule, [[]] * len(rewards), rewards)
        assert found == pytest.approx(usual(rewards), rel=1e-12, abs=0)
        assert any(found) == (rewards not in equal)


def test_advantages():
    looks = [DROPPED, ENDED, ONCE, TWICE, ONCE]
    rewards = [None, 1.0, 1.0, 0.0, None]
    started = [0.2, 1.0, 1.15, 1.0 - 5.6, 0.4]
    baseline = sum(started) / 5
    assert advantages("dr_grpo", looks, rewards) == pytest.approx(
        [0.0, 0.0, 1 - baseline, -baseline, 0.0]
    )
    assert advantages("rloo", looks, rewards) == pytest.approx(
        [0.0, 0.0, 1 - (5 * baseline - 1.15) / 4, -(5 * baseline + 4.6) / 4, 0.0]
    )
    counts = [1, 1 / 0.8, 1 / 0.125]  # ended, once, twice
    squares = sum(w * (r - baseline) ** 2 for w, r in zip(counts, [1, 1, 0], strict=True))
    scale = math.sqrt(squares / sum(counts) * 5 / 4) + 1e-4
    assert advantages("grpo", looks, rewards) == pytest.approx(
        [0.0, 0.0, (1 - baseline) / scale, -baseline / scale, 0.0]
    )
    with pytest.raises(ValueError, match="unknown rule"):
        advantages("ppo", looks, rewards)


def test_a_reward_known_between_two_stages_counts_what_came_before():
    ended_later = [Look(4, 0.4, 0.5, True, False), Look(6, 1.0, 0.25, False, True)]
    baseline = (0.4 + 0.6 / 0.5 + 0.4 - 0.4 / 0.8) / 2
    squares = 2 * (1 - baseline) ** 2 + baseline**2 / 0.8
    scale = math.sqrt(squares / (2 + 1 / 0.8) * 2) + 1e-4
    found = advantages("grpo", [ended_later, ONCE], [None, 0.0])
    assert found == pytest.approx([0.0, -baseline / scale])


def test_equal_rewards_say_nothing_only_if_asked():
    looks, rewards = [DROPPED, ONCE, ONCE], [None, 1.0, 1.0]
    assert advantages("rloo", looks, rewards, skip_equal=True) == [0.0] * 3
    assert advantages("rloo", looks, rewards)[1] == pytest.approx(1 - (0.2 + 1.15) / 2)
    # one that had ended is known though it was dropped
    other = [Look(3, 0.0, 0.25, False, True)]
    assert any(advantages("rloo", [other, ONCE, ONCE], rewards, skip_equal=True))
    assert not any(advantages("rloo", [ENDED, ONCE, ONCE], rewards, skip_equal=True))


def test_weights():
    looks, lengths = [DROPPED, TWICE, LATER, [Look(3, 1.0, 1.0, True, True)]], [4, 10, 8, 3]
    early, late = 1 / 0.5 / 0.25, 1 / 0.25
    found = weights(looks, lengths, "prefix", 0.0)
    assert [len(row) for row in found] == [0, 10, 0, 3]
    assert found[1] == pytest.approx([early] * 4 + [late] * 4 + [1.0] * 2)
    assert found[3] == [1.0] * 3
    assert weights(looks, lengths, "all", 0.0)[1] == pytest.approx([early] * 10)
    assert weights(looks, lengths, "none", 1.0)[1::2] == [[1.0] * 10, [1.0] * 3]
    assert weights([[], []], [2, 0], "all", 2.0) == [[1.0, 1.0], []]
    for where, cap in (("suffix", 0.0), ("all", -1.0), ("all", math.nan)):
        with pytest.raises(ValueError, match="unknown where"):
            weights(looks, lengths, where, cap)


@pytest.mark.parametrize("where", ["prefix", "all"])
def test_weights_respect_their_cap(where):
    found = groups("hard")
    capped = [max(max(row, default=0.0) for row in weighed(where, 1.5, g)[0]) for g in found]
    free = [max(max(row, default=0.0) for row in weighed(where, 0.0, g)[0]) for g in found]
    assert max(capped) == 1.5 < max(free)
    # 1 / floor: no cap is needed for a bound
    assert max(free) <= 1 / 0.1 + 1e-9
    assert capped == [min(w, 1.5) for w in free]
