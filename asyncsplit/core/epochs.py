"""Who consumes which split, and when an epoch starts.

The barrier knows its arrivals by name: it opens when each split has arrived, and arriving twice
is either a repetition of the same message or a conflict, never somebody else's arrival.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from asyncsplit.core.position import FINISHED, Position
from asyncsplit.core.readers import reader_name
from asyncsplit.errors import (
    ConsumerConflictError,
    StaleEpochError,
    StateMismatchError,
    StreamClosedError,
)

KEPT = 8
"""How many consumers of each split are remembered that have died or closed a stream, the latest:
of earlier ones, no message is on its way any more."""


class Stream(NamedTuple):
    """One iteration over one split: the consumer and which of its iterations it is.

    A consumer is one iterator object in one process; copies made by pickling are consumers of
    their own. Its iterations are numbered, so a late message of an earlier one is known as such.
    """

    consumer: str
    number: int


class Noted(NamedTuple):
    """What a coordinator notes of its last epoch, for the one that is restarted in its place."""

    epoch: int
    readers: dict[int, Stream]
    """Who reads it: nobody, if it is over."""
    positions: dict[int, Position]
    """How much of their splits is committed."""


class Phase(Enum):
    """What the coordinator is doing about epochs."""

    WAITING = "waiting"
    """Some split has not arrived."""
    STARTING = "starting"
    """All have arrived; the executor is being started."""
    RUNNING = "running"
    """Blocks are being delivered."""


@dataclass
class Epochs:
    """The barrier and the epoch it opens into."""

    n: int
    """How many readers there are: splits, or replicas of splits."""
    epoch: int = -1
    phase: Phase = Phase.WAITING
    arrived: dict[int, Stream] = field(default_factory=dict)
    active: dict[int, Stream] = field(default_factory=dict)
    dead: dict[str, None] = field(default_factory=dict)
    """Consumers known to have died, in that order: whoever comes for their split replaces them."""
    positions: dict[int, Position] = field(default_factory=dict)
    """Where those who have arrived stand, as far as they know."""
    vacant: set[int] = field(default_factory=set)
    """Splits of the epoch under way whose streams were closed before they knew that it had begun:
    their places are kept for whoever comes next."""
    early: set[Stream] = field(default_factory=set)
    """Streams that have arrived for an epoch known to come, and whose loops have not begun."""
    untouched: set[int] = field(default_factory=set)
    """Vacant splits of which nothing was read, because such a stream held them."""
    noted: Noted | None = None
    """What to go on with, of a coordinator that died in the middle of an epoch."""
    replicas: int = 1
    """How many readers each split has."""
    loaded: dict[int, Position] = field(default_factory=dict)
    """The saved positions that this run began with."""
    _closed: dict[int, dict[str, int]] = field(default_factory=dict)

    def recover(self, noted: Noted) -> None:
        """Go on where a coordinator that died has been."""
        self.epoch = noted.epoch
        if noted.readers:
            self.epoch -= 1
            self.noted = noted

    @property
    def waiting(self) -> list[int]:
        """Splits whose loops wait at the barrier."""
        return [split for split, stream in self.arrived.items() if stream not in self.early]

    @property
    def reading(self) -> list[int]:
        """Splits whose loops read the epoch under way."""
        return [split for split, stream in self.active.items() if stream not in self.early]

    @property
    def missing(self) -> list[int]:
        """Splits that have not arrived at the barrier, of those that the epoch has to wait for."""
        needed = range(self.n) if self.noted is None else sorted(self.noted.readers)
        return [split for split in needed if split not in self.arrived]

    @property
    def ready(self) -> bool:
        """Whether the barrier can open: no epoch is under way and each split has arrived."""
        if self.phase is not Phase.WAITING:
            return False
        # Each arrival asks: with many splits, looking for who is missing took a part of the time.
        return not self.missing if self.noted else len(self.arrived) == self.n

    def is_awaited(self, total: int | None = None) -> bool:
        """Tell whether another epoch will come: somebody waits for it, or all ``total`` do come."""
        return bool(self.arrived) or self.epoch + 1 < (total or 0)

    def is_executed(self, *, exhausted: bool) -> bool:
        """Tell whether what is executed, if anything is, is for the epoch under way.

        Else it was started ahead, or is about to be stopped. ``exhausted`` says whether that epoch
        has had all its blocks.
        """
        return self.phase is Phase.STARTING or (self.phase is Phase.RUNNING and not exhausted)

    def may_start_ahead(self, *, exhausted: bool, total: int | None = None) -> bool:
        """Tell whether the executor may start for the next epoch before its barrier opens.

        It is certain that one comes, and that it begins with its first row; and nothing is
        executed for the one under way, which is what ``exhausted`` says. The first one never may:
        until all are there, the dataset is the user's. ``total`` is how many there will be, if
        that is known.
        """
        if self.is_executed(exhausted=exhausted) or self.epoch < 0 or self.noted is not None:
            return False
        if self._stand(self.epoch + 1):
            return False
        return self.is_awaited(total if self.phase is Phase.RUNNING else None)

    def superseded_by(self, split: int, stream: Stream) -> Stream | None:
        """Return the consumer's earlier stream, if its closing message has not come yet."""
        running = self.active.get(split)
        if running and running.consumer == stream.consumer and running.number < stream.number:
            return running
        return None

    def is_closed(self, split: int, stream: Stream) -> bool:
        """Tell whether a stream has been closed, even if its arrival never came."""
        return stream.number <= self._closed.get(split, {}).get(stream.consumer, 0)

    def holder(self, split: int) -> Stream | None:
        """Return the stream that reads a split or waits to read it."""
        if split in self.vacant:
            return None
        return self.active.get(split) or self.arrived.get(split)

    def arrive(
        self, split: int, stream: Stream, position: Position | None = None, *, early: bool = False
    ) -> bool:
        """Note that a stream waits for the next epoch; repeating the message changes nothing.

        Where the split's consumer has died in the middle of an epoch, the newcomer takes its
        place there instead of waiting. ``position`` is where the consumer stands, if it has read
        the split before; it counts where this coordinator has not opened an epoch yet. ``early``
        says that its loop has not begun, which a repetition without it takes back.

        Returns:
            Whether the stream reads the epoch under way, in place of one that died.

        Raises:
            ConsumerConflictError: If another consumer holds the split, and is not known to be dead.
            StaleEpochError: If the same consumer has a later stream, or its epoch is over.
            StateMismatchError: If a saved position comes after the first epoch has begun.
            StreamClosedError: If the stream was closed before this message came.
        """
        holder, name = self.holder(split), reader_name(split, self.replicas)
        reader = None if self.noted is None else self.noted.readers.get(split)
        is_reader = reader is not None and reader.consumer == stream.consumer
        if (
            position
            and position.saved
            and (self.epoch >= 0 or self.noted is not None)
            and not (stream == holder or is_reader)
            and position[:2] != (self.epoch + 1, 0)
            and position != self.loaded.get(split)
            and not (split in self.untouched and position[:2] == (self.epoch, 0))
        ):
            raise StateMismatchError(
                f"{name} cannot resume in epoch {position.epoch}: the split is at epoch"
                f" {self.epoch + (self.noted is not None)} already. Load states into a new split,"
                " before iterating"
            )
        if self.is_closed(split, stream):
            raise StreamClosedError(
                f"this stream over {name} was closed while it waited for its epoch"
            )
        if not early:
            self.early.discard(stream)
        if position and position.saved:
            if position == self.loaded.get(split) and self.epoch >= 0 and stream != holder:
                # Whoever is restarted loads again what the run began with; it has got further.
                position = None
            else:
                self.loaded[split] = position
        if holder and holder.consumer != stream.consumer:
            if holder.consumer not in self.dead:
                raise ConsumerConflictError(
                    f"{name} is already being consumed by another iterator"
                    f" (consumer {holder.consumer}): give each consumer a split of its own, or"
                    + (
                        " drop the other iterator first, which has arrived for the next epoch,"
                        " because SplitOptions.epochs says that it comes"
                        if holder in self.early
                        else " close the other stream first"
                    )
                )
            if split in self.active:
                if position and position.has_begun and not position.saved:
                    raise self._replaced(split, stream)
                return self._take_over(split, stream)
        elif split in self.vacant:
            return self._take_over(split, stream)
        elif holder and holder.number > stream.number:
            raise StaleEpochError(
                f"{name} has moved on to a later stream of this iterator; iterate that one"
            )
        if self.active.get(split) != stream:
            if position and position.has_begun and not position.saved:
                self._check_reader(split, stream, position, reader)
            if early and holder != stream:  # else its loop may have begun since
                self.early.add(stream)
            self.arrived[split] = stream
            self.positions.pop(split, None)
            if position:
                self.positions[split] = position
                if is_reader and position.epoch > self.epoch + 1:
                    self._reads_no_more(split)
        return False

    def _check_reader(
        self, split: int, stream: Stream, position: Position, reader: Stream | None
    ) -> None:
        """Let a stream go on only in an epoch that it reads."""
        if position.epoch <= self.epoch:
            raise self._over(position.epoch, split)
        if reader is not None and reader.consumer != stream.consumer:
            raise self._replaced(split, stream)

    def _take_over(self, split: int, stream: Stream) -> bool:
        self._close(split, self.active[split])
        self.early.discard(self.active[split])
        self.vacant.discard(split)
        self.untouched.discard(split)
        self.active[split] = stream
        return True

    def _reads_no_more(self, split: int) -> None:
        """Note that a split is through with the epoch that a coordinator died in."""
        if self.noted is None or split not in self.noted.readers:
            return
        readers = {s: reader for s, reader in self.noted.readers.items() if s != split}
        self.noted = self.noted._replace(readers=readers)
        if not readers:
            self.noted = None
            self.epoch += 1

    def abandon(self) -> Noted | None:
        """Do not go on with the epoch that a coordinator died in, if there is one; return it."""
        noted, self.noted = self.noted, None
        if noted is not None:
            self.epoch = noted.epoch
        return noted

    def die(self, split: int, stream: Stream) -> bool:
        """Note that a stream's consumer has died; True if that concerns the epoch or its barrier.

        It no longer counts as arrived. In an epoch under way its place is kept for whoever
        replaces it.
        """
        self.dead[stream.consumer] = None
        if self.arrived.get(split) == stream:
            del self.arrived[split]
            return True
        return self.active.get(split) == stream

    def open(self) -> dict[int, Position]:
        """Begin to start the next epoch, with everybody who has arrived.

        A coordinator that has not opened any takes the earliest epoch that somebody wants; who
        wants the one after it has finished that epoch, and stays at the barrier.

        Returns:
            Where splits stand that are in this epoch, or past it.
        """
        if self.noted is not None:
            return self._open_again(self.noted)
        if self.epoch < 0:
            self.epoch = min((p.epoch for p in self.positions.values()), default=0) - 1
        self.epoch += 1
        self.phase = Phase.STARTING
        resume = self._stand(self.epoch)
        finished = {s for s, p in resume.items() if p.rows == FINISHED}
        self.active = {s: v for s, v in self.arrived.items() if s not in finished}
        self.arrived = {s: v for s, v in self.arrived.items() if s in finished}
        self.positions = {s: self.positions[s] for s in finished}
        return resume

    def _stand(self, epoch: int) -> dict[int, Position]:
        """Return where those who have arrived stand that are in an epoch, or past it.

        Saved positions that cannot be of the same run are returned as they are.
        """
        known = {s: self.positions[s] for s in self.arrived if s in self.positions}
        elsewhere = {
            s: p
            for s, p in known.items()
            if p.saved and p.epoch > epoch and (p.epoch > epoch + 1 or p.has_begun or p.earlier)
        }
        past = {
            s: Position(epoch, rows=FINISHED)
            for s, p in known.items()
            if p.epoch == epoch + 1 and s not in elsewhere
        }
        here = {s: p for s, p in known.items() if p.epoch == epoch}
        begun = {s: p for s, p in here.items() if p.has_begun or p.earlier} | elsewhere
        # A state that says "nothing yet" is a state too, where others have read something.
        unbegun = {s: p for s, p in here.items() if p.saved} if begun else {}
        return past | unbegun | begun

    def _open_again(self, noted: Noted) -> dict[int, Position]:
        """Begin to start the epoch that a coordinator died in, with those who had not left it."""
        self.noted = None
        self.epoch = noted.epoch
        self.phase = Phase.STARTING
        self.active = {split: self.arrived.pop(split) for split in noted.readers}
        here: dict[int, Position] = {}
        for split in noted.readers:
            own, committed = self.positions.pop(split, None), noted.positions[split]
            # Who is alive knows more; who has been replaced, or has had nothing yet, does not.
            knows = (
                own
                and own.epoch == noted.epoch
                and (own.rows, own.fed) > (committed.rows, committed.fed)
            )
            here[split] = own if own and knows else committed
        past = set(range(self.n)) - set(here)
        if not past and not any(p.has_begun or p.earlier for p in here.values()):
            return {}
        return here | dict.fromkeys(past, Position(self.epoch, rows=FINISHED))

    def started(self) -> None:
        """Note that blocks can be delivered."""
        self.phase = Phase.RUNNING

    def over(self) -> None:
        """Note that the epoch is over, because all have left it or because it failed."""
        self.phase = Phase.WAITING
        for split, stream in self.active.items():
            self._close(split, stream)
            self.early.discard(stream)
        self.active = {}
        self.vacant.clear()
        self.untouched.clear()
        while len(self.dead) > KEPT * self.n:
            del self.dead[next(iter(self.dead))]

    def check(self, split: int, epoch: int, stream: Stream) -> None:
        """Raise unless the stream consumes this split in this epoch.

        Raises:
            ConsumerConflictError: If the consumer was thought dead and has lost its place.
            StaleEpochError: If the epoch is over for this stream.
        """
        if stream.consumer in self.dead:
            raise ConsumerConflictError(
                f"this consumer ({stream.consumer}) was thought dead and"
                f" {reader_name(split, self.replicas)} given to whoever replaces it: it must not go"
                " on. Iterate the split anew"
            )
        if epoch != self.epoch or self.active.get(split) != stream:
            raise self._over(epoch, split)
        self.early.discard(stream)

    def vacate(self, split: int, stream: Stream) -> bool:
        """Note that a stream is closed which did not know that its epoch had begun; True if so.

        Its share is then there for whoever comes next, as if it had died.
        """
        self._close(split, stream)
        if self.arrived.get(split) == stream:
            del self.arrived[split]
        if self.active.get(split) != stream or split in self.vacant:
            self.early.discard(stream)
            return False
        self.vacant.add(split)
        if stream in self.early:
            self.untouched.add(split)
        return True

    def leave(self, split: int, stream: Stream) -> bool:
        """Note that a stream is closed, whether it waits or runs; True if it was running.

        A message about a stream nobody knows is remembered: its arrival may come after it.
        """
        self._close(split, stream)
        self.early.discard(stream)
        newcomer = self.arrived.get(split)
        if newcomer == stream:
            del self.arrived[split]
        # One that was thought dead before a restart goes, too, and leaves its share to whoever
        # has come in its place.
        replaced = newcomer is not None and newcomer.consumer != stream.consumer
        if self.noted is not None and self.noted.readers.get(split) == stream and not replaced:
            self._reads_no_more(split)
        if self.active.get(split) != stream or split in self.vacant:
            return False
        del self.active[split]
        return True

    def _close(self, split: int, stream: Stream) -> None:
        closed = self._closed.setdefault(split, {})
        closed[stream.consumer] = max(closed.pop(stream.consumer, 0), stream.number)
        if len(closed) > KEPT:
            del closed[next(iter(closed))]

    def _replaced(self, split: int, stream: Stream) -> ConsumerConflictError:
        return ConsumerConflictError(
            f"this consumer ({stream.consumer}) was replaced in"
            f" {reader_name(split, self.replicas)} before the coordinator was restarted: it must"
            " not go on. Iterate the split anew"
        )

    def _over(self, epoch: int, split: int) -> StaleEpochError:
        return StaleEpochError(
            f"epoch {epoch} is over for {reader_name(split, self.replicas)}: the coordinator is at"
            f" epoch {self.epoch}; start a new iteration"
        )
