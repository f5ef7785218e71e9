import asyncio

from tests.simulation.clock import VirtualLoop


def test_time_gets_to_a_timer_that_is_set_again_until_then() -> None:
    """A rounding error before it asyncio lets it go off; others are at work all the time."""
    loop = VirtualLoop()
    loop.start_at(49.6839852229162)
    at = 49.683985222916206
    assert 0 < at - loop.time() < 1e-9

    async def wait() -> int:
        over = asyncio.Event()
        turns = 0

        def look() -> None:
            nonlocal turns
            turns += 1
            if loop.time() >= at or turns == 10:
                over.set()
            else:
                loop.call_soon(lambda: None)
                loop.call_at(at, look)

        look()
        await over.wait()
        return turns

    try:
        assert loop.run_until_complete(wait()) < 10
        assert loop.time() == at
    finally:
        loop.close()
