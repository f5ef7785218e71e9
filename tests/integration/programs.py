"""Runs Python programs one after the other, on one connection to a cluster: for tests of many.

Each process that connects has workers of its own, which takes longer than most programs. Each line
of the input is a job in JSON, and each is answered by a line: what it printed, and its error.
"""

import contextlib
import gc
import io
import json
import os
import runpy
import sys
import traceback
from typing import NamedTuple


class Program(NamedTuple):
    """A program: its ``code``, or if there is none the file at ``place``."""

    place: str
    code: str | None
    arguments: list[str]
    directory: str
    """Which it runs in."""

    def run(self) -> tuple[str, str]:
        """Return what it prints, and the traceback of what it raises."""
        os.chdir(self.directory)
        sys.argv = [self.place, *self.arguments]
        error, printed = "", io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                if self.code is None:
                    runpy.run_path(self.place, run_name="__main__")
                else:
                    exec(compile(self.code, self.place, "exec"), {"__name__": "__main__"})
            except BaseException:
                error = traceback.format_exc()
        # What it leaves in cycles, such as splits, ends with it and not in the next one.
        gc.collect()
        return printed.getvalue(), error


def main() -> None:
    """Run what the input says."""
    answers = sys.stdout
    for line in sys.stdin:
        print(json.dumps(Program(*json.loads(line)).run()), file=answers, flush=True)


if __name__ == "__main__":
    main()
