"""A stream's account of its slices: what it acknowledges, and where it says it can go on."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from asyncsplit.core.leases import SplitLog
from asyncsplit.core.position import Past, Position, fingerprint
from asyncsplit.core.progress import Progress, Reading
from asyncsplit.core.routing import Part
from asyncsplit.core.shuffle import ShuffleKey
from tests.profiles import FEWER

KEY = ShuffleKey(100, 10, 3)
EARLIER = ((Past(7, 70),),)

slices = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def log_of(counts: list[int], resume: Position | None = None) -> SplitLog:
    log = SplitLog(0, resume)
    for rows in counts:
        log.append(Part(None, 0, rows, rows))
    return log


def reading_of(log: SplitLog, before: int = 0, *, shuffled: bool = False) -> Reading:
    """Begin all slices that a log holds, as a stream does that takes the split over."""
    reading = Reading()
    reading.start(Position(3, before, shuffle=KEY if shuffled else None, earlier=EARLIER))
    reading.deliver(log.first_seq, log.skip_rows, log.check)
    for lease in log.read(log.first_seq, max_leases=99):
        reading.begin(lease.part.rows)
    return reading


@given(slices, st.data())
def test_a_log_goes_on_where_a_reading_stands(counts: list[int], data: st.DataObject) -> None:
    total = sum(counts)
    log = log_of(counts)
    before = data.draw(st.integers(0, total))
    log.acknowledge(before, fed=len(counts))
    reading = reading_of(log, before)
    for finished in data.draw(st.lists(st.integers(0, total - before)).map(sorted)):
        progress = reading.progress(finished, None)
        assert progress == Progress(before + finished, len(counts))
        log.acknowledge(*progress[:1], fed=progress.fed)
        position = reading.position(finished, None, None)
        assert (position.epoch, position.rows, position.earlier) == (
            3,
            before + finished,
            EARLIER,
        )
        resumed = log_of(counts, position)
        resumed.finish()
        assert resumed.committed_rows == log.committed_rows == before + finished
        assert (resumed.first_seq, resumed.skip_rows) == (log.first_seq, log.skip_rows)
        assert resumed.waiting == 0, "it keeps what it has begun"
        for committed in (log.position, resumed.position):
            anew = log_of(counts, committed)
            anew.finish()
            assert (anew.first_seq, anew.skip_rows) == (log.first_seq, log.skip_rows)
            assert anew.position == committed
            assert anew.waiting == len(counts) - anew.first_seq, "who comes next has begun nothing"


@given(slices, st.data())
def test_rows_finished_before_are_left_out_of_the_first_slices(
    counts: list[int], data: st.DataObject
) -> None:
    finished = data.draw(st.integers(0, sum(counts)))
    reading = Reading()
    reading.start(Position(0, finished))
    reading.deliver(0, finished, 0)
    skipped = [reading.begin(rows) for rows in counts]
    starts = accumulate(counts[:-1], initial=0)
    wanted = [
        min(rows, max(0, finished - start)) for rows, start in zip(counts, starts, strict=True)
    ]
    assert skipped == wanted
    assert reading.begun == reading.fed == len(counts)


@FEWER
@given(slices, st.data())
def test_a_shuffle_goes_on_from_the_oldest_slice_with_rows_to_come(
    counts: list[int], data: st.DataObject
) -> None:
    reading = reading_of(log_of(counts))
    for oldest in data.draw(st.lists(st.integers(0, len(counts))).map(sorted)):
        rows = data.draw(st.integers(sum(counts[:oldest]), sum(counts)))
        assert reading.progress(rows, oldest) == Progress(rows, len(counts), oldest)
        position = reading.position(rows, oldest, KEY)
        *_, check = accumulate(counts[:oldest], fingerprint, initial=0)
        assert position == Position(
            3, rows, check, len(counts), shuffle=KEY, low=oldest, earlier=EARLIER
        )
        resumed = log_of(counts, position)
        resumed.finish()
        anew = log_of(counts, resumed.position)
        anew.finish()
        assert resumed.position == anew.position == position._replace(fed=0)


@FEWER
@given(slices, st.data())
def test_a_shuffle_of_the_rest_goes_back_to_where_all_is_finished(
    counts: list[int], data: st.DataObject
) -> None:
    log = log_of(counts)
    before = data.draw(st.integers(1, sum(counts)))
    log.acknowledge(before, fed=len(counts))
    reading = reading_of(log, before)
    held = len(counts) - log.first_seq
    oldest = data.draw(st.integers(0, held))
    rows = sum(counts[: log.first_seq + oldest])
    position = reading.position(max(0, rows - before), oldest, KEY)
    assert position.shuffle is None
    assert position.rows == (rows if oldest < held else max(rows, before))
    resumed = log_of(counts, position)
    resumed.finish()
    log.acknowledge(max(rows, before), fed=len(counts), low=log.first_seq + oldest)
    committed = log.position
    assert committed.shuffle is None
    assert (committed.rows, committed.check) == (position.rows, position.check)


def test_what_began_shuffled_goes_on_shuffled() -> None:
    reading = reading_of(log_of([5, 5]), 4, shuffled=True)
    assert reading.position(2, 0, KEY) == Position(3, 6, 0, 2, shuffle=KEY, earlier=EARLIER)


def test_before_the_first_delivery_it_stands_where_it_arrived() -> None:
    arrived = Position(3, 20, check=7, saved=True)
    reading = Reading(arrived)
    assert reading.position(0, None, None) == arrived
    assert (reading.progress(0, None), reading.begun) == (Progress(), 0)
    begun = Position(3, 40, check=8, shuffle=KEY, low=2, earlier=EARLIER)
    reading.start(begun)
    assert reading.position(0, None, None) == begun, "what another one before it had finished"
    assert Reading().position(0, None, None) == Position(0)
