"""Versions in stretches read like the list of them."""

import copy
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.versions import Runs, runs

STRETCHES = st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 4)), max_size=6)


def plain(stretches: list[tuple[int, int]]) -> list[int]:
    return [version for version, count in stretches for _ in range(count)]


@given(STRETCHES, st.slices(12))
def test_they_read_like_the_list(stretches, part) -> None:
    one, other = Runs(stretches), plain(stretches)
    assert len(one) == len(other) and list(one) == other
    assert list(reversed(one)) == other[::-1]
    assert [one[i] for i in range(-len(other), len(other))] == other + other
    assert list(one[part]) == other[part]
    for version in range(-1, 4):
        assert one.count(version) == other.count(version)
        assert (version in one) == (version in other)
    assert repr(one) == f"Runs({runs(other)})"


@given(STRETCHES)
def test_stretches_are_those_of_the_list_merged(stretches) -> None:
    found = runs(Runs(stretches))
    assert found == runs(plain(stretches)) and plain(found) == plain(stretches)
    assert all(count > 0 for _, count in found)
    assert all(a[0] != b[0] for a, b in pairwise(found))


@given(STRETCHES, STRETCHES)
def test_they_equal_what_holds_the_same_versions(a, b) -> None:
    same = plain(a) == plain(b)
    assert (Runs(a) == Runs(b)) == same
    assert (Runs(a) == plain(b)) == same and (plain(a) == Runs(b)) == same
    assert (Runs(a) != plain(b)) == (not same)
    assert Runs(a) != tuple(plain(b)) and Runs(a) != 1


def test_a_place_outside_is_refused() -> None:
    for place in (3, -4):
        with pytest.raises(IndexError, match=f"token {place} of 3"):
            Runs([(5, 1), (6, 2)])[place]
    with pytest.raises(IndexError):
        Runs()[0]


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="version 7"):
        Runs([(7, -1)])


def test_long_stretches_are_never_written_out() -> None:
    one = Runs([(3, 10**15), (4, 10**15)])
    assert len(one) == 2 * 10**15 and one[10**15 - 1] == 3 and one[10**15] == 4
    assert runs(one[5 : 10**15 + 2]) == [(3, 10**15 - 5), (4, 2)]


def test_what_runs_gives_is_a_copy() -> None:
    one = Runs([(3, 2)])
    runs(one).append((4, 1))
    assert one == [3, 3]


def test_they_are_copied_and_pickled() -> None:
    one = Runs([(3, 2), (4, 1)])
    for other in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other == one and len(other) == 3
