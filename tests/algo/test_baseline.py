"""The running baseline, worked out by hand; that it is unbiased stands in test_tabular.py."""

import json

import pytest

from reroll.algo.baseline import Running


def test_a_first_batch_is_compared_with_its_others():
    """Prompt 7 twice, prompt 8 once, the mean of all others counting as two of a prompt's own."""
    running = Running(weight=2.0, decay=0.5)
    got = running.advantages([1.0, 0.0, 0.5], [7, 7, 8], [1.0, 1.0, 1.0])
    assert got == pytest.approx(
        [
            1.0 - (2 * 0.25 + 0.0) / 3,  # others of all: 0, .5; of its prompt: 0
            0.0 - (2 * 0.75 + 1.0) / 3,
            0.5 - (2 * 0.5 + 0.0) / 2,  # nobody else of its prompt
        ]
    )
    assert running.every == [0.0, 0.0] and running.prompts == {}
    running.count()
    running.count()  # once
    assert running.every == pytest.approx([1.5, 0.75])
    assert running.prompts == {7: pytest.approx([1.0, 0.5]), 8: pytest.approx([0.5, 0.25])}


def test_what_went_before_fades_and_counts():
    running = Running(2.0, 0.5, [1.5, 0.75], {7: [1.0, 0.5]})
    got = running.advantages([1.0, 0.25], [7, 9], [1.0, 1.0])
    assert got == pytest.approx(
        [
            1.0 - (2 * (0.75 + 0.25) / 2.5 + 0.5) / 3,
            0.25 - (0.75 + 1.0) / 2.5,  # a new prompt: the mean of all
        ]
    )
    running.count()
    assert running.every == pytest.approx([0.5 * 3.5, 0.5 * 2.0])
    assert running.prompts == {7: pytest.approx([1.0, 0.75]), 9: pytest.approx([0.5, 0.125])}
    # a prompt's own rewards fade only when it comes again
    running.advantages([0.0], [8], [1.0])
    running.count()
    assert running.prompts[7] == pytest.approx([1.0, 0.75])


def test_a_weight_counts_in_the_means_but_never_in_its_own():
    twice = Running(1.0, 0.9).advantages([3.0, 1.0, 5.0], [1, 1, 1], [1.0, 2.0, 1.0])
    assert twice[0] == pytest.approx(3.0 - (7 / 3 + 7) / 4)
    assert twice[1] == pytest.approx(1.0 - (4.0 + 8.0) / 3)


def test_alone_without_history_it_says_nothing():
    running = Running(4.0, 0.9)
    assert running.advantages([], [], []) == []
    assert running.advantages([1.0], [3], [1.0]) == [0.0]
    running.count()
    assert running.advantages([0.0], [5], [1.0]) == pytest.approx([-1.0])


def test_equal_rewards_are_no_signal_and_no_decay_forgets_at_once():
    running = Running(4.0, 0.0)
    assert running.advantages([1.0] * 3, [1, 2, 2], [1.0] * 3) == pytest.approx([0.0] * 3)
    running.count()
    assert running.advantages([0.0, 1.0], [1, 1], [1.0] * 2) == pytest.approx([-1.0, 1.0])


def test_the_state_goes_through_json():
    running = Running(4.0, 0.9)
    running.advantages([1.0, 0.0, 0.5], [7, 7, 8], [1.0] * 3)
    running.count()
    other = Running(4.0, 0.9)
    other.load_state(json.loads(json.dumps(running.state())))
    assert other == running
    batch = ([0.25, 0.75], [8, 9], [1.0, 1.0])
    assert other.advantages(*batch) == running.advantages(*batch)
    assert other == running
