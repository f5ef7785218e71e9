"""What a user may set, with defaults and the reasons for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Routing = Literal["rows", "demand"]


@dataclass(frozen=True)
class TelemetryConfig:
    """Say which figures the coordinator publishes, and where."""

    enabled: bool = True
    """Serve ``/metrics``; counting itself is too cheap to switch off."""

    host: str = "127.0.0.1"
    """Address of the endpoint: loopback unless asked otherwise."""

    port: int = 0
    """Port of the endpoint; 0 takes a free one, see ``metrics_url()``."""

    discovery_dir: str | bool = True
    """Directory in which each coordinator writes a file for Prometheus' ``file_sd_configs``, and
    removes it when it ends; True for ``asyncsplit-<user id>`` in the temporary directory of the
    coordinator's node; False for none."""

    meter_provider: Callable[[], Any] | None = None
    """Called in the coordinator's process for an OpenTelemetry ``MeterProvider`` to give the
    metrics to, too; ``opentelemetry.metrics.get_meter_provider`` for that process's own."""

    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry receiver to push the metrics to, too, with OTLP over HTTP, such as
    ``"http://localhost:4318/v1/metrics"``. Needs ``asyncsplit[otel]``."""

    tracer_provider: Callable[[], Any] | None = None
    """Called in the processes of coordinator and consumers for an OpenTelemetry ``TracerProvider``
    to record spans with; ``opentelemetry.trace.get_tracer_provider`` for that process's own.
    Spans are recorded if this or ``otlp_traces_endpoint`` is set."""

    otlp_traces_endpoint: str | None = None
    """URL of an OpenTelemetry receiver to send spans to, with OTLP over HTTP, such as
    ``"http://localhost:4318/v1/traces"``, from processes that have no ``TracerProvider`` of their
    own. Needs ``asyncsplit[otel]``."""

    trace_sample_ratio: float = 1.0
    """Share of the epochs that spans are recorded of. Where a span is current when the split is
    created, or else in the first loop to arrive, that one decides: all epochs or none."""

    ray_metrics: bool = False
    """Give the metrics, without the label ``split``, to Ray's own, too. Needs ``ray[default]``."""

    push_interval_s: float = 15.0
    """How often metrics are pushed to the OpenTelemetry receiver and to Ray."""

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError naming the option, its value and what is allowed."""
        if not isinstance(self.discovery_dir, str | bool) or self.discovery_dir == "":
            raise TypeError(
                f"TelemetryConfig.discovery_dir={self.discovery_dir!r} must be a path, True for"
                " the default one or False for none"
            )
        for name, kind in (
            ("meter_provider", "MeterProvider"),
            ("tracer_provider", "TracerProvider"),
        ):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(
                    f"TelemetryConfig.{name}={function!r} must be a function that returns a {kind}:"
                    " it is called in the coordinator's process, for spans also in consumers'"
                )
        for name, path in (("otlp_endpoint", "metrics"), ("otlp_traces_endpoint", "traces")):
            endpoint = getattr(self, name)
            if endpoint is not None and not str(endpoint).startswith(("http://", "https://")):
                raise ValueError(
                    f"TelemetryConfig.{name}={endpoint!r} must be a URL, such as"
                    f" 'http://localhost:4318/v1/{path}'"
                )
        ratio = self.trace_sample_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise ValueError(
                f"TelemetryConfig.trace_sample_ratio={ratio!r} must be a number from 0 to 1"
            )
        interval = self.push_interval_s
        if isinstance(interval, bool) or not isinstance(interval, int | float) or not interval > 0:
            raise ValueError(
                f"TelemetryConfig.push_interval_s={interval!r} must be a number of seconds above 0"
            )
        if not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise ValueError(
                f"TelemetryConfig.port={self.port!r} is not a port: use 0 (any free one) to 65535"
            )


@dataclass(frozen=True)
class SplitOptions:
    """Tune one split; the defaults suit a training job."""

    routing: Routing = "rows"
    """Which split gets the next block: ``"rows"``, the one with the fewest rows so far, as
    upstream does; ``"demand"``, whoever is about to run out, so that a slow consumer holds nobody
    up: each is given work for 100 ms at a time, or one block, and of the last blocks none that the
    others would be through with sooner."""

    prefetch_bytes: int | None = None
    """Bytes that may wait for one split, from coordinator to training loop. One block more than
    this is the most ever held: a block larger than the budget still gets through. None for 256
    MiB, but no more than the split's part of an eighth of the cluster's object stores. With
    ``routing="demand"`` so many may wait for all splits together, until somebody needs them."""

    replicas: int = 1
    """How many consumers share each split: all of them see the same batches in the same order, as
    tensor- and pipeline-parallel ranks need. The fastest is ahead of the slowest by
    `prefetch_bytes` at most. Rows count as committed when all replicas have finished with them."""

    barrier_timeout_s: float | None = 1800.0
    """Seconds a split may be silent while others wait for it, before they get
    `ConsumerLostError`; None to wait for ever. Longer than the longest pause between batches."""

    rejoin_timeout_s: float | None = 120.0
    """Seconds a split whose consumer has died may stay without another, while others wait for
    it; None to wait for ever. Longer than it takes to start a worker."""

    coordinator_max_restarts: int = 3
    """How often Ray starts the coordinator anew if its process dies. An epoch goes on where it
    was if the dataset preserves order; else its consumers get `CoordinatorLostError`."""

    coordinator_node_id: str | None = None
    """Id of the Ray node to run the coordinator on; None for the one that the split is created on.
    If that node is lost, the split ends in `CoordinatorLostError`."""

    epochs: int | None = None
    """How many epochs there will be, if that is known. The executor then starts on the next one
    soon after it is through with the last, not only when somebody waits for it. Once all loops are
    through with one, the next begins and its first blocks are sent to whoever has read the split,
    so that a loop that comes back waits for nobody; that iterator keeps the split until it is
    dropped or sent elsewhere. Blocks take as much memory as those still being read,
    `prefetch_bytes` for each split. A further epoch is no error: it starts as all do with None."""

    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """Where the figures go."""

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError naming the option, its value and what is allowed."""
        if self.routing not in ("rows", "demand"):
            raise ValueError(
                f"SplitOptions.routing={self.routing!r} is unknown: use 'rows' or 'demand'"
            )
        if not isinstance(self.replicas, int) or isinstance(self.replicas, bool):
            raise TypeError(f"SplitOptions.replicas={self.replicas!r} must be an int")
        if self.replicas < 1:
            raise ValueError(
                f"SplitOptions.replicas={self.replicas} must be 1 or more: the number of consumers"
                " that share each split"
            )
        restarts = self.coordinator_max_restarts
        if not isinstance(restarts, int) or isinstance(restarts, bool):
            raise TypeError(f"SplitOptions.coordinator_max_restarts={restarts!r} must be an int")
        if restarts < 0:
            raise ValueError(
                f"SplitOptions.coordinator_max_restarts={restarts} must be 0 (never) or more"
            )
        node_id = self.coordinator_node_id
        if node_id is not None and not isinstance(node_id, str):
            raise TypeError(
                f"SplitOptions.coordinator_node_id={node_id!r} must be the id of a node (a string),"
                " or None for the one that the split is created on"
            )
        if self.prefetch_bytes is not None:
            if not isinstance(self.prefetch_bytes, int) or isinstance(self.prefetch_bytes, bool):
                raise TypeError(
                    f"SplitOptions.prefetch_bytes={self.prefetch_bytes!r} must be an int, or None"
                )
            if self.prefetch_bytes < 1:
                raise ValueError(
                    f"SplitOptions.prefetch_bytes={self.prefetch_bytes} must be 1 or more; one"
                    " block is always let through, so 1 means one block at a time"
                )
        if self.epochs is not None:
            if not isinstance(self.epochs, int) or isinstance(self.epochs, bool):
                raise TypeError(f"SplitOptions.epochs={self.epochs!r} must be an int, or None")
            if self.epochs < 1:
                raise ValueError(
                    f"SplitOptions.epochs={self.epochs} must be 1 or more, or None if not known"
                )
        for name in ("barrier_timeout_s", "rejoin_timeout_s"):
            seconds = getattr(self, name)
            if seconds is None:
                continue
            if isinstance(seconds, bool) or not isinstance(seconds, int | float):
                raise TypeError(f"SplitOptions.{name}={seconds!r} must be a number of seconds")
            if not seconds > 0:
                raise ValueError(
                    f"SplitOptions.{name}={seconds} must be above 0; None waits for ever"
                )
        if not isinstance(self.telemetry, TelemetryConfig):
            raise TypeError(f"SplitOptions.telemetry={self.telemetry!r} must be a TelemetryConfig")
