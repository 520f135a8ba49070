"""The ladder: what counts as copied. Success by rungs is seen in test_loop_prefix.py."""

from reroll.ladder import copied_share


def test_only_runs_that_stand_in_the_trace_are_copied() -> None:
    trace = list(range(20))
    assert copied_share(trace, trace, 4) == 1.0
    assert copied_share([*range(5, 10), 99, 98], trace, 4) == 5 / 7
    assert copied_share([0, 1, 2, 99, 3, 4, 5], trace, 4) == 0.0  # no four in a row
    assert copied_share([0, 1, 2, 3, 50, 10, 11, 12, 13], trace, 4) == 8 / 9
    assert copied_share([19, 18, 17, 16], trace, 4) == 0.0
    assert copied_share([0, 1], trace, 4) == copied_share([], trace, 4) == 0.0
