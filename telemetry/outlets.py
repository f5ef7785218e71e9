"""All ways in which a coordinator's metrics leave it; none of them may disturb training."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry import otel, ray_metrics
from asyncsplit.telemetry.complaints import Complaints
from asyncsplit.telemetry.endpoint import Endpoint
from asyncsplit.telemetry.state import CoordinatorState

logger = logging.getLogger(__name__)

FAREWELL_S = 2.0
"""How long each last push may keep a coordinator from ending."""


class Outlets:
    """What one coordinator's metrics go to."""

    def __init__(self, state: CoordinatorState, config: TelemetryConfig) -> None:
        """Open what the config asks for; what cannot be opened is logged, and left out."""
        self._endpoint = Endpoint.serve(state, config)
        self._provider: Any = None
        if config.meter_provider is not None:
            self._provider = _observed(state, config.meter_provider)
        self._pushers: list[_Pusher] = []
        if config.otlp_endpoint is not None:
            export = partial(otel.Export, state, config.otlp_endpoint)
            self._pushers.append(_Pusher(export, config.push_interval_s, config.otlp_endpoint))
        if config.ray_metrics:
            bridge = partial(ray_metrics.Bridge, state)
            self._pushers.append(_Pusher(bridge, config.push_interval_s, "Ray's metrics agent"))

    @property
    def url(self) -> str | None:
        """Where Prometheus finds the metrics; None if it does not."""
        return None if self._endpoint is None else self._endpoint.url

    def close(self) -> None:
        """Push once more and stop; blocks for a few seconds at most."""
        for pusher in self._pushers:
            pusher.stop()
        if self._endpoint is not None:
            self._endpoint.close()
        for pusher in self._pushers:
            pusher.join()
        if (flush := getattr(self._provider, "force_flush", None)) is not None:
            try:
                flush(timeout_millis=1000 * FAREWELL_S)
            except Exception:
                logger.warning("The last metrics did not leave the meter provider", exc_info=True)


def _observed(state: CoordinatorState, make_provider: Callable[[], Any]) -> Any:
    try:
        provider = make_provider()
        otel.observe(state, provider)
    except Exception:
        logger.warning(
            "OpenTelemetry gets no metrics of dataset %r: what TelemetryConfig(meter_provider=%r)"
            " returned could not be used. Everything else works.",
            state.name,
            make_provider,
            exc_info=True,
        )
        return None
    return provider


class _Outlet(Protocol):
    def push(self) -> None: ...

    def close(self) -> None: ...


class _Pusher:
    """Pushes every few seconds, on a thread of its own."""

    def __init__(self, make: Callable[[], _Outlet], interval_s: float, name: str) -> None:
        self._make = make
        self._interval_s = interval_s
        self._name = name
        self._complaints = Complaints(
            f"Metrics to {name}", f"That is tried again every {interval_s:g} s."
        )
        self._outlet: _Outlet | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asyncsplit-push", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def join(self) -> None:
        self._thread.join(FAREWELL_S)
        if self._outlet is not None:
            self._outlet.close()

    def _run(self) -> None:
        # Here, because importing what is needed and asking Ray's head take their time.
        try:
            self._outlet = outlet = self._make()
        except Exception as error:
            logger.warning(
                "No metrics are pushed to %s: %s. Everything else works.", self._name, error
            )
            return
        while True:
            last = self._stopped.wait(self._interval_s)
            try:
                outlet.push()
            except Exception as error:
                line = self._complaints.failed(time.monotonic(), error)
            else:
                line = self._complaints.arrived(time.monotonic())
            if last:
                return
            if line is not None:
                # Good news, too: at another level it would be missing where the bad was seen.
                logger.warning("%s", line)
