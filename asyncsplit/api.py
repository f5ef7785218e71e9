"""streaming_split() and iter_batches(): check the arguments, create the coordinator."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.data import Dataset
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asyncsplit import engine
from asyncsplit.coordinator import SplitCoordinator
from asyncsplit.core.budget import prefetch_budget
from asyncsplit.core.routing import Equal
from asyncsplit.iterator import AsyncDataIterator
from asyncsplit.options import SplitOptions
from asyncsplit.parcel import pack
from asyncsplit.remote import Coordinator
from asyncsplit.stream import BatchStream
from asyncsplit.telemetry.tracing import Tracing


def streaming_split(
    ds: Dataset,
    n: int,
    *,
    equal: Equal = False,
    locality_hints: Sequence[str] | None = None,
    options: SplitOptions | None = None,
) -> list[AsyncDataIterator]:
    """Split a dataset's stream among ``n`` consumers; returns at once.

    Each epoch executes the dataset anew; it starts when all ``n`` consumers iterate. The
    iterators share one coordinator actor, on this node unless `SplitOptions.coordinator_node_id`
    names another one; it ends when the last of them is gone.

    With ``SplitOptions(replicas=r)`` there are ``n * r`` consumers and iterators, the ``r`` of each
    split one after the other: rank ``i`` takes iterator ``i``, replica ``i % r`` of split
    ``i // r``. All of them have to iterate for an epoch to start.

    Args:
        ds: The dataset; executed as it is, with its own context.
        n: How many splits.
        equal: Give all splits exactly the same number of rows: True drops up to ``n - 1`` of them,
            ``"pad"`` drops none and gives up to ``n - 1`` of the dataset's last rows twice. See
            `StreamStatistics.padded_rows`.
        locality_hints: For each split, the id of the node its consumers run on; ignored, as
            upstream does, where the dataset preserves order.
        options: Everything else.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument's value is not allowed.
        RuntimeError: If Ray is not running, has no CPU to execute the dataset on, or is a release
            asyncsplit does not support.
    """
    engine.check_ray_version()
    if not isinstance(ds, Dataset):
        raise TypeError(f"ds={ds!r} must be a ray.data.Dataset, not {type(ds).__name__}")
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n={n!r} must be an int: the number of splits")
    if n < 1:
        raise ValueError(f"n={n} must be 1 or more: the number of splits")
    options = options or SplitOptions()
    if not isinstance(options, SplitOptions):
        raise TypeError(f"options={options!r} must be an asyncsplit.SplitOptions")
    shares = check_equal(equal, options)
    hints = _check_hints(locality_hints, n)
    store_bytes = _check_cluster().get("object_store_memory")
    budget = prefetch_budget(options.prefetch_bytes, n, store_bytes)
    node_id = _check_node(options.coordinator_node_id)
    pieces, refs = pack(ds)
    coordinator: Coordinator = (
        ray.remote(SplitCoordinator)
        .options(
            num_cpus=0,
            max_restarts=options.coordinator_max_restarts,
            # Every message says where its sender stands, so a restarted coordinator can be sent
            # those that its predecessor did not answer.
            max_task_retries=-1 if options.coordinator_max_restarts else 0,
            # A call of each consumer and one of each process wait; the rest is for everything else.
            max_concurrency=8 * n * options.replicas + 100,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(n, shares, hints, replace(options, prefetch_bytes=budget), *pieces)  # type: ignore[assignment]
    )
    if refs:
        coordinator.keep.remote(refs)
    tracing = Tracing.of(options.telemetry, ds.name)
    return [
        AsyncDataIterator(
            coordinator, split, n, 0, ds, tracing, replica=replica, replicas=options.replicas
        )
        for split in range(n)
        for replica in range(options.replicas)
    ]


def iter_batches(
    ds: Dataset, *, options: SplitOptions | None = None, **kwargs: Any
) -> BatchStream[Any]:
    """Return a stream of a dataset's batches for a single consumer.

    Keyword arguments are those of `AsyncDataIterator.iter_batches`; errors as
    `streaming_split`'s.
    """
    if options is not None and getattr(options, "replicas", 1) > 1:
        raise ValueError(
            f"SplitOptions.replicas={options.replicas} needs as many consumers, and iter_batches()"
            " serves one: use streaming_split(ds, 1, options=...)"
        )
    (iterator,) = streaming_split(ds, 1, options=options)
    return iterator.iter_batches(**kwargs)


def check_equal(equal: object, options: SplitOptions) -> Equal:
    """Return how equal the shares are, or raise ValueError if these options rule that out."""
    if isinstance(equal, str) and equal != "pad":
        raise ValueError(f"equal={equal!r} is unknown: use True, False or 'pad'")
    if equal and options.routing == "demand":
        raise ValueError(
            f"equal={equal!r} cannot be combined with routing='demand': equal shares are decided by"
            " rows. Use routing='rows', or equal=False"
        )
    return "pad" if equal == "pad" else bool(equal)


def _check_cluster() -> Mapping[str, float]:
    """Return the cluster's resources."""
    if not ray.is_initialized():
        raise RuntimeError(
            "Ray is not running: the dataset belongs to a cluster that was shut down, or was"
            " created elsewhere. Call ray.init() and create the dataset again"
        )
    # Asks the cluster's head, which takes about a millisecond: no wait for anybody else.
    resources: Mapping[str, float] = ray.cluster_resources()
    if not resources.get("CPU"):
        raise RuntimeError(
            "the Ray cluster has no CPUs, so the dataset cannot be executed: start Ray with"
            " num_cpus=1 or more, or add a node"
        )
    return resources


def _check_node(node_id: str | None) -> str:
    """Return where the coordinator is to run; without the check Ray would put it anywhere."""
    if node_id is None:
        return engine.node_id()
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if node_id not in alive:
        raise ValueError(
            f"SplitOptions.coordinator_node_id={node_id!r} is no node of this cluster: the ids of"
            f" its living nodes are {', '.join(alive)}"
        )
    return node_id


def _check_hints(hints: Sequence[str] | None, n: int) -> list[str] | None:
    if hints is None:
        return None
    if isinstance(hints, str) or not all(isinstance(node, str) for node in hints):
        raise TypeError(f"locality_hints={hints!r} must be a list of {n} node ids (strings)")
    if len(hints) != n:
        raise ValueError(
            f"locality_hints has {len(hints)} node ids for n={n} splits: give one for each split"
        )
    return list(hints)
