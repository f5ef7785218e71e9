"""Where spans go, and how a trace gets from one process to another.

A trace travels as W3C trace context, a dict with a ``traceparent``, in arguments of calls on the
coordinator and in its answers. Where there is none, nothing is recorded: so an epoch that is not
sampled costs no more than one with traces off.
"""

import atexit
import functools
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import asyncsplit
from asyncsplit.errors import StreamClosedError
from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry.spans import DATASET, Attribute, SpanType

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

Carrier: TypeAlias = dict[str, str]
Attributes: TypeAlias = Mapping[Attribute, str | bool | int | float]

SCOPE = "asyncsplit"

EXPORT_TIMEOUT_S = 5.0
"""How long one export may take, repetitions included."""

FLUSH_S = 0.5
"""How long the end of a loop may wait for its spans to leave."""

FAREWELL_S = 2.0
"""How long the last spans may keep a coordinator from ending."""

_W3C = TraceContextTextMapPropagator()


def harmless(method: Callable[P, R]) -> Callable[P, R | None]:
    """Make a method return None where it would raise: no span is worth a training job."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(*args, **kwargs)
        except Exception:
            _warn_once()
            return None

    return guarded


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "A span could not be recorded; further failures are not logged. Everything else works.",
        exc_info=True,
    )


def current() -> Carrier | None:
    """Return the current span of this task or thread, or None if there is none."""
    if not trace.get_current_span().get_span_context().is_valid:
        return None
    return carrier_of()


def carrier_of(span: Span | None = None) -> Carrier:
    """Return the context to hand on: of a span, or of the current one."""
    carrier: Carrier = {}
    _W3C.inject(carrier, None if span is None else trace.set_span_in_context(span))
    return carrier


def context_of(carrier: Carrier) -> SpanContext:
    """Return the identity of the span that a carrier tells of."""
    return trace.get_current_span(_W3C.extract(carrier)).get_span_context()


class Tracing(NamedTuple):
    """Says that spans are recorded, and how; comes to consumers with their iterator."""

    make_provider: Callable[[], Any] | None
    endpoint: str | None
    ratio: float
    dataset: str
    parent: Carrier | None
    """The span in which the split was created."""

    @classmethod
    def of(cls, config: TelemetryConfig, dataset: str | None) -> "Tracing | None":
        """Return what a config asks for, in the current span; None if that is nothing."""
        if config.tracer_provider is None and config.otlp_traces_endpoint is None:
            return None
        return cls(
            config.tracer_provider,
            config.otlp_traces_endpoint,
            config.trace_sample_ratio,
            dataset or "dataset",
            current(),
        )

    def open(self) -> "Tracer | None":
        """Return this process's tracer; what keeps it from working is logged. Takes its time."""
        try:
            return Tracer(self._provider(), self.ratio, self.dataset)
        except Exception as error:
            logger.warning(
                "No spans of dataset %r are recorded in process %d: %s. Everything else works.",
                self.dataset,
                os.getpid(),
                error,
                exc_info=not isinstance(error, ImportError),
            )
            return None

    def open_aside(self) -> "Future[Tracer | None]":
        """Open on a thread: the SDK takes longer to import than a loop may be held."""
        opened: Future[Tracer | None] = Future()
        threading.Thread(
            target=lambda: opened.set_result(self.open()), name="asyncsplit-tracing", daemon=True
        ).start()
        return opened

    def _provider(self) -> trace.TracerProvider:
        """Return the one asked for, or the process's own, or one that sends to the endpoint."""
        if self.make_provider is not None:
            return self.make_provider()  # type: ignore[no-any-return]
        own = trace.get_tracer_provider()
        if not isinstance(own, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
            return own
        assert self.endpoint is not None
        with _opening:
            return _pushing(self.endpoint)


class Tracer:
    """Records the spans of one dataset in one process."""

    def __init__(self, provider: trace.TracerProvider, ratio: float, dataset: str) -> None:
        """Use a provider; of traces that begin here a share is recorded."""
        self._provider = provider
        self._tracer = provider.get_tracer(SCOPE, asyncsplit.__version__)
        self._ratio = ratio
        self._dataset: Attributes = {DATASET: dataset}

    def start(
        self,
        kind: SpanType,
        parent: Carrier | None,
        attributes: Attributes,
        *,
        since_ns: int | None = None,
        links: Iterable[Carrier | None] = (),
        role: SpanKind = SpanKind.INTERNAL,
    ) -> Span | None:
        """Start a span, now or in the past; None if its trace is not recorded."""
        if parent is None and random.random() >= self._ratio:
            return None
        if parent is not None and not context_of(parent).trace_flags.sampled:
            return None
        span = self._tracer.start_span(
            kind.name,
            Context() if parent is None else _W3C.extract(parent, Context()),
            role,
            _plain({**self._dataset, **attributes}),
            [Link(context_of(carrier)) for carrier in links if carrier is not None],
            since_ns,
        )
        return span if span.is_recording() else None

    def record(
        self,
        kind: SpanType,
        parent: Carrier,
        attributes: Attributes,
        since_ns: int,
        *,
        until_ns: int | None = None,
        error: BaseException | None = None,
        links: Iterable[Carrier | None] = (),
    ) -> Span | None:
        """Record what is over."""
        span = self.start(kind, parent, attributes, since_ns=since_ns, links=links)
        if span is not None:
            finish(span, error, until_ns)
        return span

    def flush(self) -> "Future[None] | None":
        """Send what is recorded, on a thread; None if there is no point in waiting for that."""
        flush = getattr(self._provider, "force_flush", None)
        if flush is None or getattr(self._provider, "failing", False):
            return None
        flushed: Future[None] = Future()

        def run() -> None:
            harmless(flush)()
            flushed.set_result(None)

        threading.Thread(target=run, name="asyncsplit-flush", daemon=True).start()
        return flushed


def finish(
    span: Span,
    error: BaseException | None = None,
    until_ns: int | None = None,
    attributes: Attributes | None = None,
) -> None:
    """End a span, with an error if there was one."""
    if attributes:
        span.set_attributes(_plain(attributes))
    if error is not None and not isinstance(error, StreamClosedError):  # which was asked for
        span.record_exception(error)
        span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
    span.end(until_ns)


def ago(seconds: float) -> int:
    """Return the time so many seconds ago, as spans have it."""
    return time.time_ns() - int(seconds * 1e9)


def _plain(attributes: Attributes) -> dict[str, str | bool | int | float]:
    return {attribute.name: value for attribute, value in attributes.items()}


_opening = threading.Lock()


@functools.cache
def _pushing(endpoint: str) -> trace.TracerProvider:
    """Return a provider that sends to an endpoint, one for all iterators of this process.

    Raises:
        ImportError: If the extra ``otel`` is not installed.
    """
    try:
        from asyncsplit.telemetry.otlp_spans import PushingProvider
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'asyncsplit[otel]' on all nodes") from error

    provider = PushingProvider(
        endpoint,
        {
            "service.name": SCOPE,
            "service.version": asyncsplit.__version__,
            "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
        },
    )
    # Not the SDK's own, which may keep a process for half a minute.
    atexit.register(provider.close)
    return provider
