"""Who watches which run, and how far each has come.

A watcher's place is an offset in the log, so it can be anywhere: far behind, it reads its history from the file in pieces,
in turn with everybody else; caught up, it gets each committed batch from memory, framed once for all, unless that is longer
than a piece (ten thousand steps that become READY at once are 3 MB of notifications). Only durable bytes are sent, and those
of a turn only after the daemon has acted on them: what starts next shall not wait for the news. A watcher that does not
read costs one outbox and a number; the server drops it in the end, and it comes back with the seq that it had reached.
Who only waits for the end of a run is sent the line that tells it, and no other: at 2 steps in parallel the four lines of a
`true` cost its reader and the daemon a sixth of the step.
"""

from __future__ import annotations

from wfd import journal, protocol
from wfd.journal import Damaged
from wfd.paths import Home
from wfd.server import Connection, Server

# A watcher that is behind reads its history in pieces of this size.
FEED_BYTES = 256 << 10


class Batch:
    """The newest committed bytes of a run's log, and where they begin; framed when the first watcher wants them. is_end:
    the last line is the end of the run."""

    __slots__ = ("_frames", "data", "is_end", "run_id", "start")

    def __init__(self, run_id: str, start: int, data: bytes, *, is_end: bool) -> None:
        self.run_id = run_id
        self.start = start
        self.data = data
        self.is_end = is_end
        self._frames: bytes | None = None

    def frames(self) -> bytes:
        if self._frames is None:
            self._frames = protocol.notifications(self.run_id, self.data)
        return self._frames

    def last_frame(self) -> bytes:
        return protocol.notifications(self.run_id, self.data[self.data.rfind(b"\n", 0, -1) + 1 :])


class _Place:
    __slots__ = ("end", "offset", "only_end", "run_id")

    def __init__(self, run_id: str, offset: int, end: int, only_end: bool) -> None:
        self.run_id = run_id
        self.offset = offset
        self.end = end
        self.only_end = only_end


class Watchers:
    """All watchers of the daemon."""

    def __init__(self, home: Home, server: Server) -> None:
        self._home = home
        self._server = server
        self._places: dict[Connection, _Place] = {}
        self._by_run: dict[str, dict[Connection, None]] = {}
        self._hungry: dict[Connection, None] = {}
        self._batches: list[Batch] = []

    def add(self, connection: Connection, run_id: str, offset: int, end: int, *, only_end: bool) -> None:
        """Send this connection the run's log from `offset` on; `end` bytes of it are durable now. only_end: send it nothing
        but the line that will end the run."""
        self.drop(connection)
        if connection.is_closed:
            return
        self._places[connection] = _Place(run_id, end if only_end else min(offset, end), end, only_end)
        self._by_run.setdefault(run_id, {})[connection] = None
        self.wake(connection)

    def drop(self, connection: Connection) -> None:
        """This connection watches no more."""
        place = self._places.pop(connection, None)
        self._hungry.pop(connection, None)
        if place is not None:
            watchers = self._by_run[place.run_id]
            del watchers[connection]
            if not watchers:
                del self._by_run[place.run_id]

    def wake(self, connection: Connection) -> None:
        """There may be room in its outbox, or something new for it."""
        if connection in self._places:
            self._hungry[connection] = None

    def committed(self, batch: Batch) -> None:
        """More of a run's log is durable. Its watchers hear of it when they are fed."""
        if batch.run_id in self._by_run:
            self._batches.append(batch)

    def _send(self, batch: Batch) -> None:
        """Whoever is caught up gets the batch."""
        for connection in list(self._by_run.get(batch.run_id, ())):
            place = self._places.get(connection)
            if place is None:
                # What was sent to another has let go of it: it held most of what is too much of all together.
                continue
            if place.only_end:
                # Who came after this batch was told of it in the answer.
                if batch.is_end and batch.start >= place.end:
                    self._server.send(connection, batch.last_frame())
                continue
            place.end = batch.start + len(batch.data)
            if place.offset == batch.start and len(batch.data) <= FEED_BYTES and self._has_room(connection):
                place.offset = place.end
                self._server.send(connection, batch.frames())
            else:
                self.wake(connection)

    def close_run(self, run_id: str) -> None:
        """Its log can no longer be trusted: let go of its watchers."""
        for connection in list(self._by_run.get(run_id, ())):
            self._server.close(connection)

    @property
    def is_behind(self) -> bool:
        """Has somebody room for more history right now?"""
        return bool(self._hungry)

    def feed(self) -> None:
        """The batches of this turn; then one piece of history for each who is behind and has room."""
        batches, self._batches = self._batches, []
        for batch in batches:
            self._send(batch)
        hungry, self._hungry = self._hungry, {}
        for connection in hungry:
            place = self._places.get(connection)
            if place is None or place.offset >= place.end or not self._has_room(connection):
                continue
            data = self._read(place)
            if not data:
                self._server.close(connection)
                continue
            place.offset += len(data)
            self._server.send(connection, protocol.notifications(place.run_id, data))
            self.wake(connection)

    def _has_room(self, connection: Connection) -> bool:
        return not (connection.is_full or (self._server.is_crowded and connection.outbox))

    def _read(self, place: _Place) -> bytes:
        files = self._home.run(place.run_id)
        try:
            return journal.read_lines(files, place.run_id, place.offset, place.end, FEED_BYTES)
        except (OSError, Damaged):
            return b""
