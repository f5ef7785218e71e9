"""What a coordinator finds of the one before it."""

import errno
import logging
import os
from pathlib import Path

import pytest

from asyncsplit.core.epochs import Noted, Stream
from asyncsplit.core.position import Past, Position
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.journal import Journal

EARLIER = ((Past(7, 70), Past(2**62, 0)),)
SHUFFLED = Position(4, 20, check=2**32 - 1, shuffle=ShuffleKey(9, 3, 2**70), low=5, earlier=EARLIER)
PLAIN = Position(4, 30, check=3, earlier=EARLIER)
READERS = {0: Stream("a", 3), 2: Stream("c", 1)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "actor"


def begun(path: Path) -> Journal:
    journal = Journal(path, 3)
    journal.begin(Noted(4, dict(READERS), {0: SHUFFLED, 2: PLAIN}))
    return journal


def test_there_is_nothing_before_the_first_epoch(path: Path) -> None:
    assert Journal(path, 3).read() is None


def test_what_is_noted_is_found(path: Path) -> None:
    begun(path)
    assert Journal(path, 3).read() == Noted(4, READERS, {0: SHUFFLED, 2: PLAIN})


def test_the_last_commit_counts(path: Path) -> None:
    journal = begun(path)
    for rows in (31, 2**40):
        journal.commit(2, PLAIN._replace(rows=rows, check=rows % 100))
    journal.commit(0, SHUFFLED._replace(rows=21, low=6))
    assert Journal(path, 3).read() == Noted(
        4, READERS, {0: SHUFFLED._replace(rows=21, low=6), 2: PLAIN._replace(rows=2**40, check=76)}
    )


def test_a_commit_writes_in_place_and_only_what_is_new(path: Path) -> None:
    journal = begun(path)
    file = path.stat()
    journal.commit(2, PLAIN)
    assert path.stat().st_mtime_ns == file.st_mtime_ns
    journal.commit(2, PLAIN._replace(rows=31))
    assert (path.stat().st_ino, path.stat().st_size) == (file.st_ino, file.st_size)


def test_who_takes_over_is_noted_with_what_it_shuffles_by(path: Path) -> None:
    journal = begun(path)
    journal.commit(2, PLAIN._replace(rows=31))
    journal.take_over(0, Stream("b", 1), PLAIN)
    readers = {**READERS, 0: Stream("b", 1)}
    assert Journal(path, 3).read() == Noted(4, readers, {0: PLAIN, 2: PLAIN._replace(rows=31)})


def test_who_has_left_is_not_waited_for(path: Path) -> None:
    journal = begun(path)
    journal.leave(0)
    assert Journal(path, 3).read() == Noted(4, {2: READERS[2]}, {2: PLAIN})


def test_an_epoch_that_is_over_has_no_readers(path: Path) -> None:
    begun(path).begin(Noted(4, {}, {}))
    assert Journal(path, 3).read() == Noted(4, {}, {})


@pytest.mark.parametrize("n", [3, 300])
def test_each_epoch_is_noted_in_place_of_the_last_whether_it_is_longer_or_shorter(
    path: Path, n: int
) -> None:
    journal = Journal(path, n)
    for epoch, readers in enumerate((range(2), range(n), range(0), range(1))):
        noted = Noted(
            epoch,
            {split: Stream("c", split) for split in readers},
            {split: PLAIN._replace(epoch=epoch, rows=split) for split in readers},
        )
        journal.begin(noted)
        assert Journal(path, n).read() == noted
    journal.commit(0, PLAIN._replace(epoch=3, rows=9))
    found = Journal(path, n).read()
    assert found is not None
    assert found.positions[0].rows == 9


def test_a_short_journal_is_the_same_file_in_each_epoch(path: Path) -> None:
    journal = begun(path)
    file = path.stat().st_ino
    journal.begin(Noted(5, {}, {}))
    assert path.stat().st_ino == file


def test_at_the_end_nothing_is_left(path: Path) -> None:
    begun(path).remove()
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[]\n", b"\xff", b'{"epoch": 4'])
def test_a_damaged_file_is_one_warning(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert Journal(path, 3).read() is None
    assert "their splits begin anew" in caplog.text
    assert not path.exists()


def test_a_short_file_is_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(path)
    path.write_bytes(path.read_bytes()[:-30])
    with caplog.at_level(logging.WARNING):
        assert Journal(path, 3).read() is None
    assert str(path) in caplog.text


def test_where_nothing_can_be_written_the_job_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And is told once: not with each commit."""
    with caplog.at_level(logging.WARNING):
        journal = begun(tmp_path / "missing" / "actor")
        journal.commit(2, PLAIN._replace(rows=31))
        journal.leave(0)
    assert len(caplog.records) == 1


def test_on_a_full_disk_nothing_old_is_left_to_be_believed(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(path, 300)  # too long to be written in place
    journal.begin(Noted(4, {}, {}))
    path.with_suffix(".tmp").symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        journal.begin(Noted(5, {}, {}))
    assert "No space left" in caplog.text
    assert not path.exists()
    assert Journal(path, 300).read() is None


@pytest.mark.parametrize("room", [0, 10])
def test_so_it_is_where_a_write_in_place_finds_no_room(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    journal = begun(path)
    write = os.pwrite

    def full(file: int, content: bytes, at: int) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content[:room], at)

    monkeypatch.setattr(os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        journal.begin(Noted(5, {}, {}))
    assert "No space left" in caplog.text
    assert not path.exists()
    assert Journal(path, 3).read() is None
