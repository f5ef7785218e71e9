"""Calls on the coordinator actor, awaited or blocked on without losing anything."""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from asyncsplit.errors import CoordinatorLostError
from asyncsplit.wire import Failure

T = TypeVar("T")

Coordinator: TypeAlias = "ActorHandle[Any]"
Reply: TypeAlias = "T | Failure"


def ask(
    coordinator: Coordinator, method: str, *args: object
) -> "concurrent.futures.Future[Reply[Any]]":
    """Call a method of the coordinator; returns at once."""
    return getattr(coordinator, method).remote(args).future()  # type: ignore[no-any-return]


def quietly(call: Callable[[], object]) -> None:
    """Make a call of the coordinator for what is collected as garbage, if Ray still runs.

    Ray would start anew for it, and a Ray started since does not know the coordinator.
    """
    if ray.is_initialized():
        with contextlib.suppress(Exception):
            call()


async def settled(future: "concurrent.futures.Future[Any]", timeout_s: float | None = None) -> None:
    """Return when the future is done, or after a while; cancelling leaves the future as it was.

    `asyncio.wrap_future` will not do: cancelling what it returns cancels the future itself,
    which Ray then fails to complete.
    """
    if future.done():
        return
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake(_: object) -> None:
        try:
            loop.call_soon_threadsafe(_set, waiter)
        except RuntimeError:  # the loop was closed while Ray was at work
            return

    future.add_done_callback(wake)
    alarm = None if timeout_s is None else loop.call_later(timeout_s, _set, waiter)
    try:
        await waiter
    finally:
        if alarm is not None:
            alarm.cancel()


def opened(future: "concurrent.futures.Future[Reply[T]]") -> T:
    """Return a settled call's result.

    Raises:
        CoordinatorLostError: If the coordinator actor is gone.
        Exception: Whatever the coordinator answered instead of a result.
    """
    try:
        reply = future.result()
    except RayActorError as error:
        if "error raised in its creation task" in str(error):
            reason = str(error).strip().rpartition("\n")[2]
            raise CoordinatorLostError(
                f"the split's coordinator could not be started: {reason}"
            ) from error
        raise CoordinatorLostError(
            "the split's coordinator is gone: it was killed, its node was lost, or whoever"
            " created the split has ended. Create a new split to go on"
        ) from error
    if isinstance(reply, Failure):
        raise reply.unpack()
    return reply


def answer_blocking(coordinator: Coordinator, method: str, *args: object) -> Any:
    """Call as `answer` does, but block the thread."""
    future = ask(coordinator, method, *args)
    concurrent.futures.wait((future,))
    return opened(future)


async def answer(coordinator: Coordinator, method: str, *args: object) -> Any:
    """Call a method of the coordinator and return its result, or raise as `opened` does."""
    future = ask(coordinator, method, *args)
    await settled(future)
    return opened(future)


def _set(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
