"""Who is let in, and when the barrier opens."""

import pytest

from asyncsplit.core.epochs import Epochs, Noted, Phase, Stream
from asyncsplit.core.position import FINISHED, Past, Position
from asyncsplit.core.replay import read_before
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.errors import (
    ConsumerConflictError,
    CoordinatorLostError,
    StaleEpochError,
    StateMismatchError,
    StreamClosedError,
)

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
    epochs.open()
    assert epochs.epoch == 0
    assert epochs.phase is Phase.STARTING
    assert epochs.active == {0: A1, 1: B1}
    assert not epochs.arrived


def test_the_barrier_opens_when_each_replica_of_each_split_has_arrived() -> None:
    epochs = Epochs(4, replicas=2)
    for reader in range(3):
        epochs.arrive(reader, Stream(str(reader), 1))
    assert epochs.missing == [3]
    with pytest.raises(ConsumerConflictError, match="replica 0 of split 1 is already being"):
        epochs.arrive(2, Stream("intruder", 1))
    epochs.arrive(3, Stream("3", 1))
    assert epochs.ready


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
    epochs.open()
    assert epochs.epoch == 1


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


def test_a_death_at_the_barrier_makes_the_split_missing_again() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1)
    assert epochs.die(0, A1)
    assert epochs.missing == [0, 1]
    assert not epochs.arrive(0, B1), "who comes now waits like everybody"
    assert epochs.arrived == {0: B1}


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.RUNNING])
def test_whoever_comes_for_a_dead_consumers_split_takes_its_place(phase: Phase) -> None:
    epochs = running()
    epochs.phase = phase
    other = Stream("other", 1)
    assert epochs.die(0, A1)
    assert epochs.active[0] == A1, "the place is kept"
    assert epochs.arrive(0, other)
    assert epochs.active == {0: other, 1: B1}
    assert not epochs.arrived
    epochs.check(0, 0, other)


def test_repeating_the_arrival_that_took_a_place_changes_nothing() -> None:
    epochs = running()
    epochs.die(0, A1)
    other = Stream("other", 1)
    epochs.arrive(0, other)
    assert not epochs.arrive(0, other)
    assert epochs.active[0] == other
    assert not epochs.arrived


def test_who_was_replaced_is_fenced_and_takes_nothing_along() -> None:
    epochs = running()
    epochs.die(0, A1)
    other = Stream("other", 1)
    epochs.arrive(0, other)
    with pytest.raises(ConsumerConflictError, match="was thought dead"):
        epochs.check(0, 0, A1)
    assert not epochs.leave(0, A1), "its closing message comes too late to matter"
    with pytest.raises(ConsumerConflictError, match="already being consumed"):
        epochs.arrive(0, A2)
    assert epochs.active[0] == other


def test_the_replacement_of_a_dead_replacement_takes_the_place_too() -> None:
    epochs = running()
    epochs.die(0, A1)
    epochs.arrive(0, Stream("second", 1))
    with pytest.raises(ConsumerConflictError):
        epochs.arrive(0, Stream("third", 1))
    assert epochs.die(0, Stream("second", 1))
    assert epochs.arrive(0, Stream("third", 1))


def test_only_the_split_of_the_dead_is_free() -> None:
    epochs = running()
    epochs.die(0, A1)
    with pytest.raises(ConsumerConflictError, match="split 1"):
        epochs.arrive(1, Stream("other", 1))


def test_a_death_after_leaving_concerns_nobody() -> None:
    epochs = running()
    epochs.leave(0, A1)
    assert not epochs.die(0, A1)
    assert epochs.active == {1: B1}


def test_a_death_that_is_known_before_the_arrival_counts_from_then_on() -> None:
    epochs = Epochs(2)
    assert not epochs.die(0, A1)
    epochs.arrive(0, A1)
    assert not epochs.arrive(0, B1), "a place at the barrier is nothing to go on with"
    assert epochs.arrived == {0: B1}


def test_a_late_arrival_for_an_epoch_that_was_given_up_does_not_count() -> None:
    epochs = running()
    epochs.over()
    for split, stream in enumerate((A1, B1)):
        with pytest.raises(StreamClosedError):
            epochs.arrive(split, stream)
    assert epochs.missing == [0, 1]


def test_an_epoch_can_end_without_its_dead() -> None:
    epochs = running()
    epochs.die(0, A1)
    epochs.over()
    assert epochs.holder(0) is None
    assert not epochs.arrive(0, Stream("other", 1))


def test_a_stream_is_closed_with_all_before_it_and_none_after() -> None:
    epochs = Epochs(1)
    epochs.leave(0, A2)
    assert epochs.is_closed(0, A1)
    assert epochs.is_closed(0, A2)
    assert not epochs.is_closed(0, Stream("a", 3))
    assert not epochs.is_closed(0, B1)
    epochs.leave(0, A1)
    assert epochs.is_closed(0, A2), "closing messages may overtake each other"


def test_a_closing_message_between_two_streams_leaves_the_later_one_alone() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1)
    epochs.arrive(0, A2)
    assert not epochs.leave(0, A1)
    assert epochs.arrived == {0: A2}


def test_repeating_an_arrival_with_a_saved_position_changes_nothing() -> None:
    """Its epoch may have begun before the repetition comes."""
    epochs = Epochs(1)
    saved = Position(3, rows=5, saved=True)
    epochs.arrive(0, A1, saved)
    assert epochs.open() == {0: saved}
    epochs.started()
    assert not epochs.arrive(0, A1, saved)
    assert epochs.active == {0: A1}


def test_a_saved_position_waits_for_the_next_epoch_again_after_an_error() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1, Position(1, saved=True))
    epochs.arrive(1, B1, Position(0, rows=5, saved=True))
    epochs.open()
    epochs.started()
    epochs.leave(0, A1)  # somebody was lost; it iterates again
    epochs.arrive(0, A2, Position(1, saved=True))
    assert epochs.arrived == {0: A2}
    with pytest.raises(StateMismatchError, match="the split is at epoch 0 already"):
        epochs.arrive(1, Stream("c", 1), Position(0, rows=4, saved=True))
    with pytest.raises(ConsumerConflictError):
        epochs.arrive(1, Stream("c", 1), Position(0, rows=5, saved=True))


def test_a_state_of_a_split_that_had_read_nothing_is_a_state() -> None:
    epochs = Epochs(2)
    positions = {0: Position(0, saved=True), 1: Position(0, rows=5, saved=True)}
    epochs.arrive(0, A1, positions[0])
    epochs.arrive(1, B1, positions[1])
    resume = epochs.open()
    assert resume == positions
    assert read_before(resume, 2, 0, repeatable=True) == ()


def test_states_between_two_epochs_need_no_replay() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1, Position(1, saved=True))
    epochs.arrive(1, B1, Position(1, saved=True))
    assert epochs.open() == {}
    assert epochs.epoch == 1


def test_who_had_finished_the_resumed_epoch_is_past_it() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1, Position(1, saved=True))
    epochs.arrive(1, B1, Position(0, saved=True))
    assert epochs.open() == {0: Position(0, rows=FINISHED)}


def test_who_has_read_nothing_of_the_next_epoch_yet_is_past_the_resumed_one() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1, Position(1, saved=True, shuffle=ShuffleKey(7, 60, 30)))
    epochs.arrive(1, B1, Position(0, rows=30, saved=True))
    assert epochs.open()[0] == Position(0, rows=FINISHED)


@pytest.mark.parametrize("first", [Position(1, saved=True), Position(1, rows=20, saved=True)])
@pytest.mark.parametrize(
    "second",
    [
        Position(2, rows=20, saved=True),
        Position(2, saved=True, earlier=((Past(20, 1),),)),
        Position(3, saved=True),
    ],
)
def test_states_of_epochs_that_no_run_is_in_at_a_time_are_refused_for_all(
    first: Position, second: Position
) -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1, first)
    epochs.arrive(1, B1, second)
    resume = epochs.open()
    assert epochs.active == {0: A1, 1: B1}, "none is left at the barrier"
    with pytest.raises(StateMismatchError, match=rf"splits \[1\] resume in epoch {second.epoch}"):
        read_before(resume, 2, 1, repeatable=True)


def test_an_arrival_of_one_that_was_replaced_comes_too_late() -> None:
    epochs = running()
    epochs.die(0, A1)
    epochs.arrive(0, Stream("other", 1))
    epochs.over()
    with pytest.raises(StreamClosedError):
        epochs.arrive(0, A1)


def test_after_a_restart_without_a_journal_a_newcomer_begins_where_the_others_are() -> None:
    """Where the one it replaces stood nobody knows, nor that it had not finished, as they had."""
    epochs = Epochs(2)
    epochs.arrive(0, Stream("finished", 2), Position(5))
    epochs.arrive(1, Stream("newcomer", 1))
    assert epochs.open() == {}
    assert epochs.epoch == 5


def restarted(
    epoch: int, positions: dict[int, Position], n: int = 2, readers: str = "ab"
) -> Epochs:
    """Return what a coordinator begins with whose predecessor has noted this."""
    epochs = Epochs(n)
    epochs.recover(Noted(epoch, {s: Stream(readers[s], 1) for s in positions}, positions))
    return epochs


def test_after_a_restart_a_replacement_goes_on_while_all_others_have_finished() -> None:
    committed = Position(5, rows=20, check=3)
    epochs = restarted(5, {1: committed})
    epochs.arrive(0, A2, Position(6))
    assert epochs.missing == [1], "the next epoch has to wait"
    epochs.arrive(1, Stream("newcomer", 1))
    assert epochs.ready
    assert epochs.open() == {0: Position(5, rows=FINISHED), 1: committed}
    assert epochs.epoch == 5
    assert epochs.active == {1: Stream("newcomer", 1)}
    assert epochs.arrived == {0: A2}


def test_after_a_restart_nobody_waits_for_a_split_that_had_left() -> None:
    epochs = restarted(5, {0: Position(5, rows=20)})
    epochs.arrive(0, A1, Position(5, rows=30, fed=2))
    assert epochs.open() == {0: Position(5, rows=30, fed=2), 1: Position(5, rows=FINISHED)}


def test_after_a_restart_who_has_finished_meanwhile_is_not_waited_for() -> None:
    epochs = restarted(5, {0: Position(5, rows=20), 1: Position(5, rows=20)})
    epochs.arrive(0, A2, Position(6))
    assert epochs.missing == [1]
    epochs.leave(1, B1)
    assert epochs.epoch == 5
    assert epochs.missing == [1], "now for the next epoch"
    epochs.arrive(1, Stream("newcomer", 1))
    assert epochs.open() == {}
    assert epochs.epoch == 6


def test_after_a_restart_between_epochs_the_next_one_comes() -> None:
    epochs = restarted(5, {})
    for split, stream in enumerate((A1, B1)):
        epochs.arrive(split, stream)
    assert epochs.open() == {}
    assert epochs.epoch == 6


def test_after_a_restart_what_earlier_runs_have_read_is_known_if_nobody_is_left() -> None:
    committed = Position(0, earlier=((Past(7, 70), Past(0, 0), Past(3, 9)),))
    epochs = restarted(0, {0: committed, 1: committed})
    for split in range(2):
        epochs.arrive(split, Stream(f"newcomer {split}", 1))
    resume = epochs.open()
    assert resume == {0: committed, 1: committed}
    assert read_before(resume, 2, 0, repeatable=True) == committed.earlier


def test_after_a_restart_blocks_that_do_not_come_again_are_an_error_also_for_newcomers() -> None:
    epochs = restarted(5, {1: Position(5, rows=20)})
    epochs.arrive(0, A2, Position(6))
    epochs.arrive(1, Stream("newcomer", 1))
    with pytest.raises(CoordinatorLostError, match="epoch 5 cannot go on"):
        read_before(epochs.open(), 2, 5, repeatable=False)


def test_a_restart_before_anything_was_read_harms_nobody() -> None:
    epochs = restarted(5, {0: Position(5), 1: Position(5)})
    epochs.arrive(0, A1, Position(5))
    epochs.arrive(1, Stream("newcomer", 1))
    assert read_before(epochs.open(), 2, 5, repeatable=False) == ()
    assert epochs.epoch == 5


def test_who_was_replaced_before_a_restart_is_refused_after_it() -> None:
    epochs = restarted(5, {0: Position(5, rows=20), 1: Position(5)})
    with pytest.raises(ConsumerConflictError, match="was replaced in split 0 before"):
        epochs.arrive(0, Stream("replaced", 1), Position(5, rows=30, fed=3))
    assert not epochs.arrived


def test_who_reads_an_epoch_that_was_over_before_a_restart_is_told() -> None:
    epochs = restarted(5, {})
    with pytest.raises(StaleEpochError, match="epoch 5 is over for split 0"):
        epochs.arrive(0, A1, Position(5, rows=30, fed=3))
    assert not epochs.arrived


def test_a_state_loaded_again_after_a_restart_takes_nothing_back() -> None:
    epochs = restarted(0, {0: Position(0, rows=20), 1: Position(0, rows=9)})
    with pytest.raises(StateMismatchError, match="the split is at epoch 0 already"):
        epochs.arrive(0, Stream("newcomer", 1), Position(0, rows=5, saved=True))
    epochs.arrive(0, A1, Position(0, rows=5, saved=True))
    assert epochs.arrived == {0: A1}, "who had loaded it first may say so again"


def test_a_place_left_before_it_was_known_is_kept() -> None:
    epochs = running()
    assert epochs.vacate(0, A1)
    assert epochs.holder(0) is None
    assert not epochs.vacate(0, A1), "once is enough"
    assert epochs.arrive(0, A2), "in the same epoch"
    assert epochs.active == {0: A2, 1: B1}
    with pytest.raises(StreamClosedError):
        epochs.arrive(0, A1)


def test_a_place_that_was_left_is_there_for_anybody_until_the_epoch_is_over() -> None:
    epochs = running()
    epochs.vacate(0, A1)
    epochs.vacate(1, B1)
    assert epochs.arrive(0, Stream("other", 1))
    epochs.over()
    assert not epochs.arrive(1, Stream("b", 2))
    assert epochs.arrived == {1: Stream("b", 2)}


def test_a_place_at_the_barrier_is_not_kept() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1)
    assert not epochs.vacate(0, A1)
    assert epochs.missing == [0, 1]


def test_after_a_restart_too_a_place_left_before_it_was_known_is_kept() -> None:
    epochs = restarted(5, {0: Position(5), 1: Position(5, rows=20)})
    assert not epochs.vacate(0, A1)
    assert epochs.missing == [0, 1], "it has not left the epoch"
    epochs.arrive(0, A2, Position(5))
    epochs.arrive(1, B1, Position(5, rows=20, fed=1))
    epochs.open()
    assert epochs.active == {0: A2, 1: B1}


def test_who_is_restarted_and_loads_again_what_the_run_began_with_goes_on() -> None:
    epochs, began = Epochs(1), Position(2, 100, 7, saved=True)
    epochs.arrive(0, Stream("a", 1), began)
    assert epochs.open() == {0: began}
    epochs.started()
    epochs.die(0, Stream("a", 1))
    with pytest.raises(StateMismatchError, match="split 0 cannot resume in epoch 2"):
        epochs.arrive(0, Stream("b", 1), Position(2, 50, 3, saved=True))
    assert epochs.arrive(0, Stream("b", 1), began), "it takes the place of the one that died"
    assert epochs.leave(0, Stream("b", 1))
    epochs.over()
    assert not epochs.arrive(0, Stream("c", 1), began)
    assert epochs.open() == {}, "and in the next epoch it begins at the first row"


def test_after_a_restart_who_finds_itself_replaced_leaves_its_share() -> None:
    epochs = Epochs(1)
    epochs.recover(Noted(3, {0: A1}, {0: Position(3, 10, 7)}))
    epochs.arrive(0, Stream("replacement", 1))
    with pytest.raises(ConsumerConflictError):
        epochs.arrive(0, A1, Position(3, 10, 7, fed=2))
    assert not epochs.leave(0, A1)
    assert epochs.open() == {0: Position(3, 10, 7)}


def test_who_was_replaced_before_a_restart_does_not_replace_its_replacement() -> None:
    epochs = running()
    epochs.die(0, A1)
    with pytest.raises(ConsumerConflictError, match="was replaced in split 0"):
        epochs.arrive(0, Stream("replaced", 2), Position(0, 4, 7, fed=1))
    assert epochs.arrive(0, Stream("replaced", 3)), "anew it may"


def test_nobody_has_to_wait_for_the_first_epoch_to_be_started_ahead() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1)
    assert not epochs.may_start_ahead(exhausted=True, total=3)


def test_the_next_epoch_may_start_when_somebody_waits_and_nothing_is_executed() -> None:
    epochs = running()
    assert not epochs.may_start_ahead(exhausted=True)
    epochs.leave(0, A1)
    epochs.arrive(0, A2)
    assert not epochs.may_start_ahead(exhausted=False)
    assert epochs.may_start_ahead(exhausted=True)
    epochs.leave(1, B1)
    epochs.over()
    assert epochs.may_start_ahead(exhausted=False)
    epochs.leave(0, A2)
    assert not epochs.may_start_ahead(exhausted=False)
    assert not epochs.is_awaited()
    for split, stream in enumerate((Stream("a", 3), Stream("b", 2))):
        epochs.arrive(split, stream)
    epochs.open()
    assert not epochs.may_start_ahead(exhausted=True), "it is the one that starts now"


def test_an_epoch_that_is_known_to_come_may_start_as_soon_as_the_last_is_exhausted() -> None:
    epochs = running()
    assert not epochs.may_start_ahead(exhausted=False, total=2)
    assert epochs.may_start_ahead(exhausted=True, total=2)
    assert not epochs.may_start_ahead(exhausted=True, total=1)
    epochs.over()
    assert epochs.is_awaited(total=2)
    assert not epochs.may_start_ahead(exhausted=False, total=2), "it was left early, or has failed"


@pytest.mark.parametrize(
    ("position", "may"),
    [
        (Position(1), True),
        (Position(1, saved=True), True),
        (Position(1, 10, fed=1), False),
        (Position(1, fed=1), False),
        (Position(1, earlier=((Past(3, 0),),)), False),
        (Position(2), False),
    ],
)
def test_an_epoch_that_somebody_has_begun_may_not_start_ahead(
    position: Position, may: bool
) -> None:
    epochs = restarted(0, {})
    epochs.arrive(0, A1, position)
    assert epochs.may_start_ahead(exhausted=False) is may
    epochs.leave(0, A1)
    epochs.arrive(1, B1)
    assert epochs.may_start_ahead(exhausted=False), "what counts is who waits now"


def test_an_epoch_that_a_coordinator_died_in_may_not_start_ahead() -> None:
    epochs = restarted(1, {0: Position(1), 1: Position(1)})
    epochs.arrive(0, A1, Position(1, 3, fed=1))
    assert not epochs.may_start_ahead(exhausted=True)
    epochs.leave(0, A1)
    epochs.abandon()
    epochs.arrive(0, A2, Position(2))
    assert epochs.may_start_ahead(exhausted=True)


def test_what_is_executed_is_for_the_epoch_under_way_until_that_has_all_its_blocks() -> None:
    epochs = Epochs(1)
    assert not epochs.is_executed(exhausted=False)
    epochs.arrive(0, A1)
    epochs.open()
    assert epochs.is_executed(exhausted=False)
    epochs.started()
    assert epochs.is_executed(exhausted=False)
    assert not epochs.is_executed(exhausted=True)
    epochs.over()
    assert not epochs.is_executed(exhausted=False), "it is being stopped"


def between_known_epochs() -> Epochs:
    """Return where both have arrived for the next epoch before their loops begin."""
    epochs = running()
    for split, stream in ((0, A1), (1, B1)):
        epochs.leave(split, stream)
        epochs.arrive(split, stream._replace(number=2), Position(1), early=True)
    epochs.over()
    assert epochs.ready
    assert not epochs.waiting
    epochs.open()
    epochs.started()
    return epochs


def test_who_has_arrived_early_reads_when_its_loop_begins() -> None:
    epochs = between_known_epochs()
    assert not epochs.reading
    epochs.check(0, 1, A2)
    epochs.arrive(1, Stream("b", 2), Position(1))
    assert epochs.reading == [0, 1]


def test_an_early_arrival_that_comes_after_its_loop_has_begun_to_wait_changes_nothing() -> None:
    epochs = Epochs(2)
    epochs.arrive(0, A1)
    epochs.arrive(0, A1, early=True)
    assert epochs.waiting == [0]


def test_who_holds_a_split_for_an_epoch_to_come_is_named() -> None:
    epochs = between_known_epochs()
    with pytest.raises(ConsumerConflictError, match="drop the other iterator first"):
        epochs.arrive(0, Stream("intruder", 1))


def test_a_place_held_early_is_there_for_a_state_of_that_epoch_if_nobody_has_read_it() -> None:
    state = Position(1, saved=True)
    for early in (True, False):
        epochs = between_known_epochs()
        if not early:
            epochs.check(0, 1, A2)
        assert epochs.vacate(0, A2)
        if early:
            assert epochs.arrive(0, Stream("new", 1), state)
            assert epochs.active[0] == Stream("new", 1)
        else:
            with pytest.raises(StateMismatchError, match="at epoch 1 already"):
                epochs.arrive(0, Stream("new", 1), state)
    assert not epochs.early - {Stream("b", 2)}
