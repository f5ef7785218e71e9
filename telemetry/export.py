"""``asyncsplit dashboards export`` writes dashboards, rules and configuration to a folder."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from asyncsplit.telemetry.discovery import default_directory

_PACKED_RUNBOOK = "docs/runbook.md"
_PACKED_DIRECTORY = "/tmp/asyncsplit-0"
"""What the packed files say, and the export replaces."""


def files(runbook_url: str, discovery_dir: str) -> dict[str, str]:
    """Return the content of every file to export, by its path in the folder."""
    packed = resources.files("asyncsplit").joinpath("dashboards")
    return {
        name: text.replace(_PACKED_RUNBOOK, runbook_url).replace(_PACKED_DIRECTORY, discovery_dir)
        for name, text in _read(packed, "")
    }


def export(folder: Path, content: dict[str, str], *, force: bool) -> list[Path]:
    """Write files into a folder, which is made if need be.

    Returns:
        The files, in order.

    Raises:
        ChangedError: If that would overwrite other files; nothing has been written then.
        OSError: If that is not possible; files that were there are as they were.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    files = {folder / name: text.encode() for name, text in sorted(content.items())}
    if not force:
        changed = [
            path for path, data in files.items() if path.exists() and path.read_bytes() != data
        ]
        if changed:
            raise ChangedError(changed)
    with contextlib.ExitStack() as unfinished:
        complete = []
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}.new")
            unfinished.callback(new.unlink, missing_ok=True)
            new.write_bytes(data)
            complete.append((new, path))
        # A disk that is full has shown by now, so all files are replaced or none.
        for new, path in complete:
            new.replace(path)
    return list(files)


class ChangedError(Exception):
    """There are files of the same name that say something else."""

    def __init__(self, paths: list[Path]) -> None:
        more = f" and {len(paths) - 1} more files" if paths[1:] else ""
        super().__init__(f"{paths[0]}{more} would be overwritten")


def _read(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _read(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry.read_text(encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="asyncsplit dashboards",
        description="Dashboards, alerts and configuration for Prometheus and Grafana.",
    )
    actions = parser.add_subparsers(required=True, metavar="action")
    exporting = actions.add_parser("export", help="write them to a folder")
    exporting.add_argument("folder", type=Path, metavar="DIR", help="made if it does not exist")
    exporting.add_argument(
        "--runbook-url",
        default=_PACKED_RUNBOOK,
        metavar="URL",
        help="where alerts and dashboards link to; the exported runbook.md has the text",
    )
    exporting.add_argument(
        "--discovery-dir",
        type=Path,
        default=default_directory(),
        metavar="DIR",
        help="where coordinators announce themselves (default: %(default)s)",
    )
    exporting.add_argument(
        "--force", action="store_true", help="overwrite files that have been changed"
    )
    args = parser.parse_args(argv)
    try:
        content = files(args.runbook_url, str(args.discovery_dir.absolute()))
        written = export(args.folder, content, force=args.force)
    except ChangedError as error:
        print(
            f"asyncsplit dashboards export: {error}. Name another folder, or say --force.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""  # none if the disk is full
        print(
            f"asyncsplit dashboards export: cannot write to {args.folder}: {error.strerror}{where}."
            " Name a folder that you may write to, on a disk with room.",
            file=sys.stderr,
        )
        return 1
    print("\n".join(map(str, written)))
    return 0
