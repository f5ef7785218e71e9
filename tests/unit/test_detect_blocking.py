import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from blockbuster import BlockingError

import asyncsplit

INSIDE_ASYNCSPLIT = Path(asyncsplit.__path__[0], "_probe.py")
INSIDE_RAY = Path(ray.__path__[0], "_probe.py")


def defined_in(file: Path, body: str, **names: object) -> Callable[[], Any]:
    """Compile a function that blames `file`, since the detector judges by file name."""
    namespace: dict[str, Any] = dict(names)
    exec(compile(f"def probe():\n    return {body}\n", str(file), "exec"), namespace)
    probe: Callable[[], Any] = namespace["probe"]
    return probe


@pytest.mark.asyncio
async def test_sleep_in_asyncsplit_on_the_loop_is_caught() -> None:
    with pytest.raises(BlockingError, match=r"time\.sleep"):
        defined_in(INSIDE_ASYNCSPLIT, "time.sleep(0)", time=time)()


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ["ray.get([])", "ray.wait([])"])
async def test_blocking_ray_call_in_asyncsplit_on_the_loop_is_caught(call: str) -> None:
    with pytest.raises(BlockingError, match=re.escape(call.partition("(")[0])):
        defined_in(INSIDE_ASYNCSPLIT, call, ray=ray)()


@pytest.mark.asyncio
async def test_other_code_on_the_loop_is_left_alone() -> None:
    time.sleep(0)  # noqa: ASYNC251 - the call under test


@pytest.mark.asyncio
async def test_file_access_is_caught_when_ours_and_left_alone_when_rays() -> None:
    ours = defined_in(INSIDE_ASYNCSPLIT, "path.stat()", path=INSIDE_RAY.parent)
    rays = defined_in(INSIDE_RAY, "path.stat()", path=INSIDE_RAY.parent)

    with pytest.raises(BlockingError, match=r"os\.stat"):
        ours()
    defined_in(INSIDE_ASYNCSPLIT, "call()", call=rays)()


@pytest.mark.asyncio
async def test_sleep_in_ray_called_by_asyncsplit_is_caught() -> None:
    rays = defined_in(INSIDE_RAY, "time.sleep(0)", time=time)

    with pytest.raises(BlockingError, match=r"time\.sleep"):
        defined_in(INSIDE_ASYNCSPLIT, "call()", call=rays)()


@pytest.mark.usefixtures("detect_blocking")
def test_asyncsplit_may_block_where_no_loop_runs() -> None:
    thread = threading.Thread(target=defined_in(INSIDE_ASYNCSPLIT, "time.sleep(0)", time=time))
    thread.start()
    thread.join()

    defined_in(INSIDE_ASYNCSPLIT, "time.sleep(0)", time=time)()
