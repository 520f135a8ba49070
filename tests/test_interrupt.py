import signal
import threading

import pytest

from reroll.interrupt import Interrupts

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", BOTH)
def test_outside_held_it_comes_at_once(number: signal.Signals) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(number)
        done.append("after")
    assert done == []


@pytest.mark.parametrize("number", BOTH)
def test_inside_held_it_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    done = []
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            with interrupts.held():
                signal.raise_signal(number)
                signal.raise_signal(number)
                done.append("rest of the block")
            done.append("after")
        with interrupts.held():  # it has been delivered once and does not come again
            done.append("later")
    assert done == ["rest of the block", "later"]


def test_held_without_a_signal_is_quiet() -> None:
    with Interrupts() as interrupts, interrupts.held():
        pass
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        with interrupts.held():
            pass
        signal.raise_signal(signal.SIGINT)


def test_an_error_in_the_block_wins_over_the_signal() -> None:
    with Interrupts() as interrupts, pytest.raises(ZeroDivisionError), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with Interrupts():
        assert all(signal.getsignal(number) not in before for number in BOTH)
    assert [signal.getsignal(number) for number in BOTH] == before
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in BOTH] == before


def test_in_another_thread_it_leaves_signals_alone() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    seen = []

    def work() -> None:
        with Interrupts() as interrupts, interrupts.held():
            seen.extend(signal.getsignal(number) for number in BOTH)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before
