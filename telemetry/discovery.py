"""Files that tell Prometheus which coordinators of a node serve metrics.

Each coordinator has one file, in the format of Prometheus' ``file_sd_configs``. Ray kills the
coordinator of a driver that shuts down, so a shell waits for the end of the coordinator, however it
comes, and removes the file. Should it be killed, too, the file still shows as dead: the coordinator
has held a lock on it, which the kernel lets go of, whoever has its process id by then.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple


class Target(NamedTuple):
    """One coordinator that serves metrics."""

    address: str
    """``host:port``."""
    dataset: str
    splits: int
    pid: int


def default_directory() -> Path:
    """Return the directory of this user's coordinators, in the system's temporary directory."""
    return Path(tempfile.gettempdir(), f"asyncsplit-{os.getuid()}")


class Entry:
    """A coordinator's own file, as long as it is not withdrawn."""

    def __init__(self, directory: Path, target: Target) -> None:
        """Write the file, under its name only when it is complete; clear away dead ones.

        Raises:
            OSError: If that is not possible, or the directory of this user is somebody else's.
        """
        _provide(directory)
        sweep(directory)
        prefix = f"{target.pid}-"
        handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=directory)
        self._file = os.fdopen(handle, "w")
        self._life: int | None = None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.fchmod(handle, 0o644)  # Prometheus runs as somebody else
            json.dump(_group(target), self._file)
            self._file.flush()
            self.path = Path(temporary).with_suffix(".json")
            Path(temporary).rename(self.path)
        except BaseException:
            self._file.close()
            Path(temporary).unlink(missing_ok=True)
            raise
        # Without a shell it is the next coordinator that removes the file.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self._life = _remove_at_exit(self.path.absolute())

    def withdraw(self) -> None:
        """Remove the file; doing so twice is no error."""
        self.path.unlink(missing_ok=True)
        self._file.close()
        if self._life is not None:
            os.close(self._life)
            self._life = None


def sweep(directory: Path) -> None:
    """Remove the files of coordinators that are gone, as far as that is allowed."""
    for path, file in _files(directory):
        if not _is_held(file):
            with contextlib.suppress(OSError):
                path.unlink()


def targets(directory: Path) -> list[Target]:
    """Return the coordinators of a directory that are alive, in the order of their addresses."""
    found: list[Target] = []
    for _, file in _files(directory):
        if _is_held(file):
            # Somebody else's file, or of another version, is no reason to fail.
            with contextlib.suppress(ValueError, LookupError, TypeError):
                found.extend(_parse(json.load(file)))
    return sorted(found)


def _remove_at_exit(path: Path) -> int:
    """Have a file removed when the descriptor returned is closed, at the latest by the kernel."""
    end, descriptor = os.pipe()
    try:
        subprocess.run(
            # In the background, so that it is no child of ours: Ray would kill that one, too.
            ["/bin/sh", "-c", 'exec 3<&0; { read -r _ <&3; rm -f -- "$0"; } &', path],
            stdin=end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A signal to our process group, such as that of Ctrl-C, is not for it.
            start_new_session=True,
            cwd="/",
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        os.close(descriptor)
        raise
    finally:
        os.close(end)
    return descriptor


def _provide(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    # In the temporary directory anybody can have made it, or a link of that name.
    if directory == default_directory() and directory.lstat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user")


def _files(directory: Path) -> Iterator[tuple[Path, IO[str]]]:
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(OSError), path.open() as file:
            yield path, file


def _is_held(file: IO[str]) -> bool:
    """Tell whether the process that wrote the file lives: only then is it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _group(target: Target) -> object:
    # Prometheus drops labels of this prefix after relabelling; the metrics have the others.
    labels = {
        "__meta_asyncsplit_dataset": target.dataset,
        "__meta_asyncsplit_splits": str(target.splits),
        "__meta_asyncsplit_pid": str(target.pid),
    }
    return [{"targets": [target.address], "labels": labels}]


def _parse(groups: list[dict[str, dict[str, str]]]) -> Iterator[Target]:
    for group in groups:
        labels = group["labels"]
        for address in group["targets"]:
            yield Target(
                address,
                labels["__meta_asyncsplit_dataset"],
                int(labels["__meta_asyncsplit_splits"]),
                int(labels["__meta_asyncsplit_pid"]),
            )
