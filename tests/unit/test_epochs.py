"""Who is let in, and when the barrier opens."""

import pytest

from asyncsplit.core.epochs import Epochs, Phase, Stream
from asyncsplit.errors import ConsumerConflictError, StaleEpochError, StreamClosedError

A1, A2, B1 = Stream("a", 1), Stream("a", 2), Stream("b", 1)


def running(n: int = 2) -> Epochs:
    epochs = Epochs(n)
    for split in range(n):
        epochs.arrive(split, Stream("ab"[split], 1))
    epochs.open()
    epochs.started()
    return epochs


def test_the_barrier_opens_when_each_split_has_arrived() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1)
    epochs.arrive(0, A1)
    assert not epochs.ready
    assert epochs.missing == [1]
    epochs.arrive(1, B1)
    assert epochs.ready
    assert epochs.open() == 0
    assert epochs.phase is Phase.STARTING
    assert epochs.active == {0: A1, 1: B1}
    assert not epochs.arrived


def test_an_intruder_is_refused_and_changes_nothing() -> None:
    epochs = running()
    before = dict(epochs.active)
    with pytest.raises(ConsumerConflictError, match="split 0 is already being consumed"):
        epochs.arrive(0, Stream("intruder", 1))
    assert epochs.active == before
    assert not epochs.arrived


def test_an_intruder_at_the_barrier_is_refused() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1)
    with pytest.raises(ConsumerConflictError):
        epochs.arrive(0, Stream("intruder", 1))
    assert epochs.arrived == {0: A1}


def test_a_split_whose_consumer_is_done_is_free_for_another() -> None:
    epochs = running()
    assert epochs.leave(0, A1)
    epochs.arrive(0, Stream("other", 1))
    assert epochs.arrived == {0: Stream("other", 1)}


def test_the_next_epoch_waits_for_those_still_in_this_one() -> None:
    epochs = running()
    epochs.leave(0, A1)
    epochs.arrive(0, A2)
    assert not epochs.ready
    epochs.leave(1, B1)
    epochs.over()
    epochs.arrive(1, Stream("b", 2))
    assert epochs.ready
    assert epochs.open() == 1


def test_repeating_an_arrival_in_a_running_epoch_changes_nothing() -> None:
    epochs = running()
    epochs.arrive(0, A1)
    assert not epochs.arrived


def test_a_consumers_later_stream_supersedes_its_earlier_one() -> None:
    epochs = running()
    assert epochs.superseded_by(0, A2) == A1
    assert epochs.superseded_by(0, A1) is None
    assert epochs.superseded_by(0, Stream("other", 2)) is None


def test_a_closing_message_that_overtakes_the_arrival_wins() -> None:
    epochs = Epochs(1)
    assert not epochs.leave(0, A1)
    with pytest.raises(StreamClosedError):
        epochs.arrive(0, A1)
    epochs.arrive(0, A2)
    assert epochs.ready


def test_leaving_the_barrier_makes_the_split_missing_again() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1)
    assert not epochs.leave(0, A1)
    assert epochs.missing == [0, 1]


def test_an_arrival_older_than_the_one_that_waits_is_stale() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A2)
    with pytest.raises(StaleEpochError):
        epochs.arrive(0, A1)


def test_a_message_about_a_past_epoch_is_stale() -> None:
    epochs = running()
    epochs.check(0, 0, A1)
    with pytest.raises(StaleEpochError, match="epoch 0 is over for split 0"):
        epochs.check(0, 0, A2)
    epochs.over()
    with pytest.raises(StaleEpochError):
        epochs.check(0, 0, A1)
