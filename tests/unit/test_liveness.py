"""Who is lost, who is only slow, and when a warning is due."""

import pytest

from asyncsplit.core.liveness import Liveness, lost_error


def test_a_silent_split_is_lost_after_the_barrier_timeout() -> None:
    liveness = Liveness(barrier_timeout_s=100, rejoin_timeout_s=10)
    assert not liveness.lost([3], since=0, now=99)
    assert liveness.lost([3], since=0, now=100) == {3: "has not been heard of for 100 s"}


def test_silence_is_counted_from_the_last_message() -> None:
    liveness = Liveness(barrier_timeout_s=100, rejoin_timeout_s=10)
    liveness.hear(3, 60)
    assert not liveness.lost([3], since=0, now=159)
    assert liveness.lost([3], since=0, now=160)


def test_silence_before_anybody_waits_does_not_count() -> None:
    liveness = Liveness(barrier_timeout_s=100, rejoin_timeout_s=10)
    liveness.hear(3, 0)
    assert not liveness.lost([3], since=500, now=599)


def test_a_dead_consumer_is_lost_after_the_shorter_timeout() -> None:
    liveness = Liveness(barrier_timeout_s=100, rejoin_timeout_s=10)
    liveness.mourn(3, 50)
    liveness.mourn(3, 55)
    assert not liveness.lost([3], since=58, now=59)
    assert liveness.lost([3], since=58, now=60) == {3: "died 10 s ago and was not replaced"}
    liveness.hear(3, 60)
    assert not liveness.is_dead(3)
    assert not liveness.lost([3], since=58, now=61)


@pytest.mark.parametrize("dead", [True, False])
def test_without_a_timeout_nobody_is_ever_lost(dead: bool) -> None:
    liveness = Liveness(barrier_timeout_s=None, rejoin_timeout_s=None)
    if dead:
        liveness.mourn(3, 0)
    assert not liveness.lost([3], since=0, now=1e9)


def test_warnings_come_after_30_s_and_then_ever_less_often() -> None:
    liveness = Liveness(barrier_timeout_s=None, rejoin_timeout_s=None)
    times = [now for now in range(600) if liveness.warning([1, 2], since=0, now=now)]
    assert times == [30, 60, 120, 240, 480]
    assert liveness.warning([1, 2], since=0, now=960) == (
        "split 1 has not been heard of for 960 s; split 2 has not been heard of for 960 s"
    )


def test_a_new_wait_begins_anew() -> None:
    liveness = Liveness(barrier_timeout_s=None, rejoin_timeout_s=None)
    assert liveness.warning([1], since=0, now=40)
    assert not liveness.warning([1], since=50, now=70)
    assert liveness.warning([1], since=50, now=80)
    assert not liveness.warning([], since=None, now=90)


def test_slow_splits_are_not_worth_a_warning() -> None:
    liveness = Liveness(barrier_timeout_s=None, rejoin_timeout_s=None)
    liveness.hear(1, 39)
    assert liveness.warning([1], since=0, now=40) is None
    assert liveness.warning([1, 2], since=0, now=41) == "split 2 has not been heard of for 41 s"


def test_a_replica_is_named_with_its_split() -> None:
    liveness = Liveness(barrier_timeout_s=None, rejoin_timeout_s=None, replicas=2)
    warning = liveness.warning([7], since=0, now=30)
    assert warning == "replica 1 of split 3 has not been heard of for 30 s"
    assert "replica 1 of split 3 died" in str(lost_error(0, {7: "died"}, 2))
