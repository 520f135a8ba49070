"""Reward shaping, by hand."""

import pytest

from reroll.algo.reward import soft_overlong


def test_soft_overlong_by_hand():
    # limit 20, buffer 4: free up to 16, then a quarter a token down to -1 at 20
    lengths = [0, 1, 15, 16, 17, 18, 19, 20]
    punished = [soft_overlong(length, limit=20, buffer=4) for length in lengths]
    assert punished == [0.0, 0.0, 0.0, 0.0, -0.25, -0.5, -0.75, -1.0]
    # DAPO's own: 16,384 tokens and 4,096 more to fall over
    assert soft_overlong(16_384, 20_480, 4_096) == 0.0
    assert soft_overlong(18_432, 20_480, 4_096) == -0.5


def test_past_the_limit_it_stays_at_minus_one():
    assert soft_overlong(21, limit=20, buffer=4) == -1.0
    assert soft_overlong(1_000, limit=20, buffer=4) == -1.0


def test_a_buffer_of_the_whole_limit_falls_from_the_first_token():
    assert [soft_overlong(n, limit=4, buffer=4) for n in range(5)] == [0, -0.25, -0.5, -0.75, -1]


@pytest.mark.parametrize("length", [0, 19, 20, 21])
def test_no_buffer_no_punishment(length):
    assert soft_overlong(length, limit=20, buffer=0) == 0.0
