import pytest
import ray

from tests.unit.test_detect_blocking import INSIDE_ASYNCSPLIT, defined_in

pytestmark = pytest.mark.usefixtures("ray_cluster")


@ray.remote(num_cpus=0)
def answer() -> int:
    return 42


@pytest.mark.asyncio
async def test_asyncsplit_may_start_await_and_poll_ray_calls_on_the_loop() -> None:
    reference = defined_in(INSIDE_ASYNCSPLIT, "answer.remote()", answer=answer)()

    assert await reference == 42
    poll = "ray.wait([reference], timeout=0)"
    assert defined_in(INSIDE_ASYNCSPLIT, poll, ray=ray, reference=reference)() == ([reference], [])
