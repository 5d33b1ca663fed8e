"""Following a run: its lines from any point on, each once and in order, whatever happens to the daemon.

A follower counts lines. When the daemon is gone it reads what the log holds, waits for the next daemon, and goes on
there with the line after the last one that it has seen. Whoever only looks at a run starts no daemon, since looking
changes nothing; whoever has ordered the run (`revives`) starts one in the place of one that has crashed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

from wfctl import client, history
from wfctl.client import FIRST_DELAY_SEC, MAX_DELAY_SEC, Connection, Gone, ReadTheLog, Refused, Silent
from wfctl.errors import DaemonUnavailable, RunDamaged
from wfd import events, protocol
from wfd.events import Line, RunFinished, RunRetried
from wfd.paths import Home
from wfd.state import END_STATES

# A crashed daemon is given so long to be started again by somebody else, such as a service manager.
REVIVE_SEC = 1.0
_NOBODY = "no daemon answers; waiting for one (what runs goes on, and `daemon start` starts one)"
_CRASHED = "the daemon has died; what runs goes on, and another is started"


class Watch:
    """The lines of one run from `from_seq` on, each once and in order, until the run is over; then `state` is its end.

    Iterating waits. With `tick_sec` it also yields None whenever so much time passed without a line. While no daemon
    answers, or it has no room to take the run over, it reads the log, tells `on_wait` why once, and waits. With `revives`
    it starts one when the last one has crashed. With `only_end` it does not ask the daemon for the lines on the way, and of
    what it yields only `state` means anything. With `deadline_sec` (of the monotonic clock) no question is waited for any
    longer, and iterating ends then, with `state` None.
    Raises NoSuchRun, RunDamaged, DaemonUnavailable while iterating."""

    def __init__(
        self,
        home: Home,
        run_id: str,
        from_seq: int = 1,
        tick_sec: float | None = None,
        on_wait: Callable[[str], None] = client.ignore,
        revives: bool = False,
        deadline_sec: float | None = None,
        only_end: bool = False,
    ) -> None:
        self._home = home
        self._run_id = run_id
        self._seed = events.seed(run_id)
        self._tick_sec = tick_sec
        self._on_wait = on_wait
        self._revives = revives
        self._deadline_sec = deadline_sec
        self._only_end = only_end
        self._why = _NOBODY
        self._refusal = ""
        self.next_seq = from_seq
        self.state: str | None = None

    def __iter__(self) -> Iterator[Line | None]:
        delay_sec, lonely_since, log_seen = FIRST_DELAY_SEC, None, None
        while True:
            before, is_revived = self.next_seq, False
            connection = self._connect()
            if connection is not None:
                with connection:
                    yield from self._from_daemon(connection)
                lonely_since = None
            else:
                log = self._look_at_log()
                if log != log_seen or log is None:
                    yield from self._from_log()
                log_seen = log
            if self.state is not None or self._is_too_late():
                return
            if connection is None:
                if lonely_since is None:
                    lonely_since = time.monotonic()
                    self._on_wait(self._why)
                if is_revived := self._revive(lonely_since):
                    # Should it crash at once, the next one comes no sooner than this one has.
                    lonely_since = time.monotonic()
            is_news = is_revived or self.next_seq > before
            delay_sec = FIRST_DELAY_SEC if is_news else min(2 * delay_sec, MAX_DELAY_SEC)
            yield from self._pause(delay_sec)

    def _connect(self) -> Connection | None:
        self._why = _CRASHED if self._revives and client.has_crashed(self._home) else _NOBODY
        try:
            return client.connect(self._home, client.patience_sec(self._deadline_sec))
        except Silent as error:
            self._why = f"{error} Waiting for it"
            return None

    def _is_too_late(self) -> bool:
        return self._deadline_sec is not None and time.monotonic() >= self._deadline_sec

    def _revive(self, lonely_since: float) -> bool:
        """A daemon that crashed has not ended the run's work, and nobody else may come by to go on with it. Is there one
        again?"""
        if self._revives and time.monotonic() - lonely_since >= REVIVE_SEC and client.has_crashed(self._home):
            client.greet(self._home)
            return True
        return False

    def _pause(self, delay_sec: float) -> Iterator[None]:
        end = time.monotonic() + delay_sec
        while (left := end - time.monotonic()) > 0:
            time.sleep(left if self._tick_sec is None else min(left, self._tick_sec))
            if self._tick_sec is not None:
                yield None

    def _from_daemon(self, connection: Connection) -> Iterator[Line | None]:
        """The lines that the daemon sends, until the run is over or the daemon is gone."""
        try:
            params = {"run_id": self._run_id, "from_seq": self.next_seq, "only_end": self._only_end}
            reply = connection.ask("watch", params)
            if self._only_end:
                yield from self._await_end(connection, str(reply["state"]))
            else:
                yield from self._stream(connection, str(reply["state"]), reply["last_seq"])
        except ReadTheLog:
            yield from self._from_log()
        except Refused as error:
            if self._refusal != str(error):
                self._refusal = str(error)
                self._on_wait(f"the run is stalled: {error}")
            yield from self._from_log()
        except (Gone, Silent):
            pass

    def _stream(self, connection: Connection, state: str, last_seq: object) -> Iterator[Line | None]:
        assert isinstance(last_seq, int)
        is_over = state in {end.value for end in END_STATES}
        # Who starts beyond the end of the log gets the lines up to there, too, and keeps them to himself.
        expected = min(self.next_seq, last_seq + 1)
        while not is_over or expected <= last_seq:
            raw = connection.receive(self._tick_sec)
            if raw is None:
                yield None
                continue
            line = self._line_of(raw, expected)
            expected = line.seq + 1
            # The history of a run that was retried holds the ends of its earlier tries; what comes now is the end.
            if isinstance(line.event, RunFinished) and line.seq > last_seq:
                is_over, last_seq, state = True, line.seq, self._end_in(line, line.event)
            if line.seq >= self.next_seq:
                self.next_seq = expected
                yield line
        self.state = state

    def _await_end(self, connection: Connection, state: str) -> Iterator[Line | None]:
        while state not in END_STATES:
            raw = connection.receive(self._tick_sec)
            line = None if raw is None else self._line_of(raw, None)
            if line is not None and isinstance(line.event, RunFinished):
                state = self._end_in(line, line.event)
            yield line
        self.state = state

    def _look_at_log(self) -> tuple[int, int, int] | None:
        """Changes when the log does."""
        try:
            found = os.stat(self._home.run(self._run_id).events)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size

    def _from_log(self) -> Iterator[Line]:
        if self._only_end:
            run = history.fold(self._home, self._run_id)
            self.next_seq = run.seq + 1
            self.state = run.state.value if run.is_over else None
            return
        state = None
        for line in history.lines(self._home, self._run_id):
            if isinstance(line.event, RunFinished):
                state = self._end_in(line, line.event)
            elif isinstance(line.event, RunRetried):
                state = None
            if line.seq >= self.next_seq:
                self.next_seq = line.seq + 1
                yield line
        self.state = state

    def _line_of(self, frame: bytes, expected: int | None) -> Line:
        """The line `expected` (None: any) in a notification, proved by its own checksum: the daemon passes on what its disk
        gives it."""
        try:
            raw = protocol.line_of(frame)
        except protocol.ProtocolError as error:
            raise DaemonUnavailable(f"the daemon's answer cannot be read: {error}") from None
        if not events.checks(raw, self._seed):
            raise self._damaged(f"line {expected or 'of its end'} is not whole")
        try:
            line = events.decode(raw)
        except events.InvalidEvent as error:
            from wfd import journal

            raise RunDamaged(str(journal.refusal(self._run_id, expected or self.next_seq, error))) from None
        if expected is not None and line.seq != expected:
            raise self._damaged(f"line {line.seq} comes where line {expected} should be")
        return line

    def _end_in(self, line: Line, event: RunFinished) -> str:
        """The end state that a run_finished names. Nobody has folded the log on our way, so it may be any word."""
        if event.state not in END_STATES:
            raise self._damaged(f"line {line.seq} names {event.state!r} as the end of the run")
        return event.state

    def _damaged(self, why: str) -> RunDamaged:
        return RunDamaged(f"run {self._run_id} is damaged and was not touched: {why}")
