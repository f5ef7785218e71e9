"""Epochs that are started for the first to arrive, by the real coordinator in simulated time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest

from asyncsplit.coordinator import FIRST_BLOCKS_S
from asyncsplit.core.epochs import Phase
from asyncsplit.core.position import Position, fingerprint
from asyncsplit.errors import ExecutionActiveError
from asyncsplit.runner import AHEAD_AFTER_S, EpochRunner
from asyncsplit.wire import Delivery, Failure
from tests.simulation.dataset import DatasetError, FakeExecution
from tests.simulation.test_protocol import BARRIER_S, Call, Job, ProtocolMachine


@pytest.fixture
def machine() -> Iterator[ProtocolMachine]:
    """Return one that has read an epoch of two splits, of which the first waits for another."""
    machine = ProtocolMachine()
    machine.start(n=2, mode=(True, "rows", True), sizes=[4] * 8, budget=1000)
    try:
        read_until(machine, {0})
        for reader in machine.job.readers.values():
            reader.close(ended=True)
        machine.deliver_all()
        come(machine, 0)
        yield machine
    finally:
        machine.job.close()
        machine.fakes.close()


def runner(job: Job) -> EpochRunner:
    return job.coordinator._runner


def read_until(machine: ProtocolMachine, whole: set[int]) -> None:
    """Have all read until these epochs are whole."""
    for _ in range(100):
        if machine.job.whole() == whole:
            return
        machine.step(4)
    raise AssertionError(f"{machine.job.whole()} are")


def come(machine: ProtocolMachine, split: int) -> None:
    """Have a split's consumer arrive at the barrier, and time pass in which to start."""
    machine.job.readers[split].open()
    machine.deliver_all()
    machine.job.pass_time(1.0)


def ask(job: Job) -> Any:
    return job.loop.run_until_complete(job.coordinator.get_dataset_schema(("raise",)))


def test_the_first_to_arrive_has_the_next_epoch_started(machine: ProtocolMachine) -> None:
    job = machine.job
    (ahead,) = runner(job).distributions[1:]
    assert ahead.ledger.produced_rows
    assert runner(job).epochs.phase is Phase.WAITING
    job.readers[1].open()
    machine.deliver_all()
    assert runner(job).distributions == [ahead]
    started = [reader.started for reader in job.readers.values()]
    assert all(each is not None and each.delivery is not None for each in started)
    read_until(machine, {0, 1})


def test_while_one_still_reads_what_is_there_the_next_epoch_is_started() -> None:
    machine = ProtocolMachine()
    machine.start(n=2, mode=(True, "rows", True), sizes=[4] * 8, budget=1000)
    job = machine.job
    try:
        job.readers[1].open()
        while runner(job).epochs.epoch < 1 and len(runner(job).distributions) == 1:
            job.readers[0].act(4, 1.0)
            machine.deliver_all()
            job.pass_time(0.1)
        assert (runner(job).epochs.epoch, runner(job).epochs.phase) == (0, Phase.RUNNING)
        assert list(runner(job).epochs.active) == [1], "the other one waits for the next"
        read_until(machine, {0, 1})
    finally:
        job.close()
        machine.fakes.close()


@contextlib.contextmanager
def all_arrived(next_bundle_s: float, epochs: int | None = None) -> Iterator[ProtocolMachine]:
    """Have two splits arrive for their first epoch, of a dataset that fast."""
    machine = ProtocolMachine()
    machine.start(n=2, mode=(True, "rows", True), sizes=[4] * 8, budget=1000, epochs=epochs)
    try:
        with patch.object(FakeExecution, "seconds_to_next", lambda self: next_bundle_s):
            for reader in machine.job.readers.values():
                reader.open()
            machine.deliver_all()
            while runner(machine.job).epochs.phase is not Phase.RUNNING:
                machine.job.pass_time(0.001)
            yield machine
    finally:
        machine.job.close()
        machine.fakes.close()


def test_the_answer_to_an_arrival_brings_blocks_that_come_soon() -> None:
    with all_arrived(next_bundle_s=FIRST_BLOCKS_S / 10) as machine:
        machine.job.pass_time(FIRST_BLOCKS_S)
        for reader in machine.job.readers.values():
            assert reader.started is not None
            assert reader.started.delivery is not None
            assert Delivery(*reader.started.delivery).slices
        read_until(machine, {0})


def test_the_answer_to_an_arrival_does_not_wait_long_for_blocks() -> None:
    with all_arrived(next_bundle_s=2 * FIRST_BLOCKS_S) as machine:
        machine.job.pass_time(1.5 * FIRST_BLOCKS_S)
        for reader in machine.job.readers.values():
            assert reader.started is not None
            assert reader.started.delivery is None
        assert not runner(machine.job).distribution.waiting_since
        read_until(machine, {0})


@pytest.mark.parametrize("leaves", [True, False])
def test_an_epoch_nobody_waits_for_lets_the_blocks_before_it_go_first(leaves: bool) -> None:
    with all_arrived(next_bundle_s=0.0, epochs=2) as machine:
        job = machine.job
        while not runner(job).distribution.ledger.finished:
            job.pass_time(0.001)
        assert len(runner(job).distributions) == 1
        if leaves:
            while job.readers[0].stream is not None:
                job.readers[0].act(4, 1.0)
                machine.deliver_all()
        else:
            job.pass_time(AHEAD_AFTER_S)
        assert len(runner(job).distributions) == 2
        read_until(machine, {0, 1})


@contextlib.contextmanager
def between_epochs(next_bundle_s: float = 0.0) -> Iterator[ProtocolMachine]:
    """Have two splits read the first of two known epochs."""
    with all_arrived(next_bundle_s=0.0, epochs=2) as machine:
        read_until(machine, {0})
        for reader in machine.job.readers.values():
            reader.close(ended=True)
        machine.deliver_all()
        with patch.object(FakeExecution, "seconds_to_next", lambda self: next_bundle_s):
            yield machine


def come_early(machine: ProtocolMachine, split: int) -> Call:
    """Have a split's consumer arrive for the next epoch before its loop begins."""
    reader = machine.job.readers[split]
    reader.open(early=True)
    machine.deliver_all()
    assert reader.starting is not None
    return reader.starting


def test_who_arrives_early_waits_for_nobody() -> None:
    with between_epochs() as machine:
        job = machine.job
        early = come_early(machine, 0)
        job.pass_time(BARRIER_S + 2.0)
        assert not early.answered
        assert runner(job).epochs.missing == [1]
        assert not runner(job).epochs.waiting
        read_until(machine, {0, 1})


def test_when_all_have_arrived_early_the_epoch_waits_for_their_loops() -> None:
    with between_epochs(next_bundle_s=2 * FIRST_BLOCKS_S) as machine:
        job = machine.job
        calls = [come_early(machine, split) for split in (0, 1)]
        while runner(job).epochs.phase is not Phase.RUNNING:
            job.pass_time(0.001)
        job.pass_time(1.5 * FIRST_BLOCKS_S)
        assert not runner(job).distribution.waiting_since
        assert not any(call.answered for call in calls), "the first blocks are to come along"
        job.pass_time(BARRIER_S + 2.0)
        assert all(call.answered for call in calls)
        assert not runner(job).epochs.reading
        read_until(machine, {0, 1})


def leave(machine: ProtocolMachine) -> None:
    machine.job.readers[0].close()
    machine.deliver_all()


def die(machine: ProtocolMachine) -> None:
    machine.job.kill(0, 0.0)


def wait_too_long(machine: ProtocolMachine) -> None:
    machine.job.pass_time(BARRIER_S + 2.0)
    assert machine.job.readers[0].stream is None, "it is told"


def shut_down(machine: ProtocolMachine) -> None:
    job = machine.job
    job.loop.run_until_complete(job.coordinator.shutdown_executor(()))


@pytest.mark.parametrize("end", [leave, die, wait_too_long, shut_down])
@pytest.mark.parametrize("produced", [True, False])
def test_when_nobody_waits_any_more_what_was_started_is_stopped(
    end: Callable[[ProtocolMachine], None], produced: bool, machine: ProtocolMachine
) -> None:
    job = machine.job
    if not produced:  # the executor is just being started
        leave(machine)
        job.pass_time(1.0)
        job.readers[0].open()
        machine.deliver_all()
        assert len(runner(job).distributions) == 2
    end(machine)
    job.pass_time(1.0)
    assert job.dataset.is_idle
    assert all(pump.ended for pump in job.dataset.pumps)
    assert runner(job).distribution.ledger.held_bytes == 0
    if end is shut_down:
        assert runner(job).epochs.phase is Phase.WAITING
        return
    assert len(runner(job).distributions) == 1
    if end is die:
        job.spawn(0)
    read_until(machine, {0, 1})


def test_schema_does_not_have_to_wait_for_what_was_started_ahead(
    machine: ProtocolMachine,
) -> None:
    job = machine.job
    (before,) = runner(job).distributions[1:]
    schema = ask(job)
    assert schema.names == ["id"]
    job.pass_time(1.0)
    (ahead,) = runner(job).distributions[1:]
    assert ahead is not before
    assert ahead.ledger.produced_rows, "it was started anew"
    assert ask(job) is schema
    assert runner(job).distributions[1:] == [ahead]
    counts = job.loop.run_until_complete(job.coordinator.status(())).schema_requests  # type: ignore[union-attr]
    assert counts == {"hit": 1, "miss": 1, "observed": 0, "rejected": 0}
    read_until(machine, {0, 1})


def test_schema_is_refused_again_when_the_barrier_has_opened(machine: ProtocolMachine) -> None:
    job = machine.job
    with patch.object(FakeExecution, "seconds_to_next", lambda self: 5.0):
        leave(machine)
        come(machine, 0)  # nothing is produced for a while
        come(machine, 1)
        reply = ask(job)
    assert isinstance(reply, Failure)
    assert isinstance(reply.unpack(), ExecutionActiveError)


def test_an_epoch_that_somebody_had_begun_is_not_the_one_started_ahead(
    machine: ProtocolMachine,
) -> None:
    job = machine.job
    (ahead,) = runner(job).distributions[1:]
    reader = job.readers[1]
    reader.position = Position(1, 4, fingerprint(0, 4), 1)
    job.share(1, 1).finished = 4
    come(machine, 1)
    assert ahead.stopped
    assert reader.started is not None
    assert reader.started.position.rows == 4
    assert runner(job).distribution.ledger.committed_rows == [0, 4]
    assert sum(not pump.execution.is_over for pump in job.dataset.pumps) <= 1


@pytest.mark.parametrize("when", ["start", "blocks"])
def test_what_fails_ahead_is_raised_when_the_barrier_opens_and_not_later(
    when: str, machine: ProtocolMachine
) -> None:
    job = machine.job
    leave(machine)
    job.pass_time(1.0)
    with contextlib.ExitStack() as stack:
        if when == "start":
            job.dataset.failures[1] = "start"
        else:
            error = DatasetError(1)
            stack.enter_context(patch.object(FakeExecution, "next_bundle", side_effect=error))
        come(machine, 0)
    job.dataset.failures.clear()
    waits = job.readers[0].starting
    assert waits is not None
    assert not waits.answered
    heard: list[BaseException] = []
    with patch.object(job, "judge", lambda call, error: heard.append(error)):
        come(machine, 1)
    assert [type(error) for error in heard] == [DatasetError, DatasetError]
    assert job.dataset.is_idle
    read_until(machine, {0, 2})
