"""StopRequest with real signals sent to this process."""

import ctypes
import signal
import threading

import pytest

from trimaran.runtime.signal_watch import SignalWatch
from trimaran.runtime.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_with_its_name_and_does_nothing_else(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.signal_name is None
        signal.raise_signal(number)
        assert stop.requested
        assert stop.signal_name == number.name
    assert stop.requested


def test_the_former_handlers_come_back_after_the_block_even_after_an_error() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def fail_inside() -> None:
        with StopRequest():
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_sigint_raises_keyboard_interrupt() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_may_come_twice_and_the_first_name_stays() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.signal_name == "SIGTERM"


def test_nested_requests_leave_the_outer_one_working() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner.requested
        assert not outer.requested
        signal.raise_signal(signal.SIGTERM)
        assert outer.requested


def test_one_request_can_be_used_again_but_not_entered_twice_at_once() -> None:
    stop = StopRequest()
    with stop:
        pass
    with stop, pytest.raises(RuntimeError, match="already active"):
        stop.__enter__()


def test_entering_outside_the_main_thread_is_refused_by_name() -> None:
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with StopRequest():
                pass
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=enter, name="side")
    thread.start()
    thread.join()
    assert "main thread, not in 'side'" in str(errors[0])


def test_a_watch_hears_of_a_signal_while_the_main_thread_is_in_a_long_call() -> None:
    libc, mutex, heard = ctypes.CDLL(None), ctypes.create_string_buffer(256), []

    def hear(number: signal.Signals) -> None:
        heard.append(number)
        libc.pthread_mutex_unlock(mutex)

    former = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        with SignalWatch(hear):
            libc.pthread_mutex_lock(mutex)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            libc.pthread_mutex_lock(mutex)  # no signal ends this wait; only the other thread does
    finally:
        signal.signal(signal.SIGALRM, former)
    assert heard == [signal.SIGALRM]
    assert signal.set_wakeup_fd(-1) == -1, "the former state is back"
