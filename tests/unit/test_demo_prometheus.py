from collections.abc import Sequence
from pathlib import Path

import pytest

from asyncsplit.demo.prometheus import running

LISTENING = 'level=info msg="Listening on" address=127.0.0.1:1234'
READY = 'level=info msg="Server is ready to receive web requests."'


def program(tmp_path: Path, says: Sequence[str], then: str) -> str:
    script = tmp_path / "says"
    lines = "".join(f"echo '{line}' >&2\n" for line in says)
    script.write_text(f"#!/bin/sh\n{lines}exec {then}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("says", [(LISTENING, READY), (READY, LISTENING)])
def test_it_is_ready_in_whatever_order_it_says_so(tmp_path: Path, says: Sequence[str]) -> None:
    with running(program(tmp_path, says, "sleep 60"), tmp_path, tmp_path) as api:
        assert api.url == "http://127.0.0.1:1234"


@pytest.mark.parametrize("says", [(LISTENING,), (READY,), ("no such file",)])
def test_one_that_ends_before_it_is_ready_has_not_started(
    tmp_path: Path, says: Sequence[str]
) -> None:
    with (
        pytest.raises(OSError, match=f"did not start: .*{says[0][-20:]}"),
        running(program(tmp_path, says, "false"), tmp_path, tmp_path),
    ):
        raise AssertionError("it ran")
