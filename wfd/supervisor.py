"""The loop. One process, one thread; it owns every run of its home, and is the file that knows all the others.

    while running:
        inputs = wait(until the next deadline)          # requests, dead children, timers: drain all of them
        write events, deciding after each fact          # in memory only
        commit: one write, then one fsync for each run  # nothing is durable before, so nothing is done before
        act from the state: spawn, signal; then reply; then feed the watchers

Rules
* Acting reads the *state*, not the event that changed it. RUNNING without a process is an ordinary state, and what a new
  daemon finds after a crash is no special case: it folds the logs and enters the same loop. `changed` only says which
  steps are worth a look, and timers only say when.
* What the world told us (an attempt's end) is kept until the line that says so is durable, and is presented again after
  a commit that failed. What a client asked for in such a batch is refused, and was never done.
* A run whose commit or spawn failed stalls: no step of it starts, live ones are left alone, the reason is in its status,
  and all is presented again every RETRY_MS.
* A fault in one run (damage, a failed assertion) quarantines that run; the others go on.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import random
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from wfd import VERSION, decide, journal, process, protocol, requests
from wfd.events import (
    DRAW_PPM,
    FORMAT,
    RULES,
    AttemptExited,
    AttemptLost,
    AttemptNotStarted,
    AttemptTimedOut,
    Event,
    Fact,
    Line,
    LogRecovered,
    RunCancelRequested,
    RunRetried,
    RunSubmitted,
    RunTimedOut,
    StepStarted,
    SupervisorStarted,
)
from wfd.journal import CommitFailed, Damaged, Journal
from wfd.orphans import Orphans
from wfd.paths import AttemptFiles, Home, is_run_id
from wfd.process import Attempt, Launch, Outcome, SpawnStalled
from wfd.protocol import ProtocolError, Request
from wfd.server import Connection, Server
from wfd.state import READY, RUNNING, Impossible, Run, RunState, StepRecord
from wfd.watchers import Batch, Watchers

# How long a stalled run waits before it tries again.
RETRY_MS = 1_000
# Runs take turns at the free slots, one step a turn. Where a run's last step was quick, a turn is so many steps: each start
# is a line that must be synced, and those of one run are synced together (of 100 runs of 20 steps, 1.0 instead of 2.3 syncs
# a step). Others wait no longer for that than people notice.
TURN_STEPS, QUICK_MS = 4, 100
# epoll and kqueue count a wait in 32 bits of milliseconds, and a back-off may last a year: wake up once a day.
MAX_WAIT_MS = 86_400_000
# How often the size of live attempts' output is looked at; and how soon after one was started or cut, since a command that
# prints without end fills a disk at a gigabyte a second.
OUTPUT_CHECK_MS, OUTPUT_SOON_MS = 1_000, 100
# Given up when the disk is full, so that a cancel can still be written.
RESERVE_BYTES = 1 << 20
# Timers of what has ended meanwhile are thrown out when there are this many more than after the last time.
TIMERS_SLACK = 10_000

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class LiveRun:
    """A run that is not over, and what the daemon holds for it beside its log.

    attempts       by step index: what has a process, or had one until its end is durable
    ended          those of them that are over
    changed        steps to act on
    slots          how many of its RUNNING steps the daemon-wide limit has counted
    is_quick       the last of its attempts that ended took at most QUICK_MS
    is_in_session  this daemon's session line is written; is_session_durable: and on disk
    stalled        why nothing starts; retry_at_ms: when all is presented again
    """

    def __init__(self, run: Run, log: Journal, environment: requests.Environment) -> None:
        self.run = run
        self.journal = log
        self.environ = process.environment(environment.env, run.workflow.env)
        self.umask = environment.umask
        self.limits = process.limits(environment.limits)
        self.attempts: dict[int, Attempt] = {}
        self.ended: dict[int, None] = {}
        self.changed: dict[int, None] = {}
        self.slots = 0
        self.is_offered = self.is_quick = False
        self.is_in_session = self.is_session_durable = False
        self.torn_bytes = 0
        self.kept_as: str | None = None
        self.stalled: str | None = None
        self.is_spawn_stalled = False
        self.retry_at_ms: int | None = None
        self.cancel_request: str | None = None
        self.retry_request: str | None = None


_Reply = tuple[Connection, Request, LiveRun | None, Callable[[], dict[str, object]]]


class Supervisor:
    """All runs of one home."""

    def __init__(
        self, home: Home, socket_path: str, selector: selectors.BaseSelector, boot_id: str, host: str, max_parallel: int
    ) -> None:
        self.home = home
        self.socket_path = socket_path
        self.boot_id = boot_id
        self.host = host
        self.max_parallel = max_parallel
        self.server = Server(selector, monotonic_ms)
        self.server.on_line = self._on_line
        self.watchers = Watchers(home, self.server)
        self.server.on_room = self.watchers.wake
        self.server.on_close = self.watchers.drop
        self.live: dict[str, LiveRun] = {}
        self.quarantined: dict[str, Damaged] = {}
        # Runs that the system has refused to let us take over. That is tried again.
        self._waiting: set[str] = set()
        self.is_stopping = False
        # All runs are being cancelled: nothing new is accepted, and nothing more is started.
        self.is_draining = False
        self.now_ms, self.at = monotonic_ms(), wall()
        self.started_ms = self.now_ms
        self._selector = selector
        self._running = 0
        self._touched: dict[str, LiveRun] = {}
        # Runs that may have something to start. It is the first one's turn, in which it has started so many steps.
        self._offers: deque[LiveRun] = deque()
        self._turn_steps = 0
        self._children: dict[int, tuple[LiveRun, int, Attempt]] = {}
        self._orphans = Orphans(self._children)
        # (due_ms, serial, what to call, its arguments: none, a run, or a run with a step's index and attempt)
        self._timers: list[tuple[int, int, Callable[..., None], tuple[object, ...]]] = []
        self._timers_kept = 0
        self._serial = itertools.count()
        self._requests: deque[tuple[Connection, Request]] = deque()
        self._replies: list[_Reply] = []
        # Runs whose batch of this turn did not become durable.
        self._failed: dict[str, None] = {}
        # In this turn. What other logs had written by then may not be on the disk, though their own sync succeeds.
        self._has_sync_failed = False
        self._is_checking_outputs = False
        self._is_reserve_due = False

    # -- the turn -------------------------------------------------------------------------------------------------

    def turn(self, until_ms: int | None) -> None:
        """Wait for something to happen, at most until `until_ms` (monotonic), and do all that follows from it."""
        self._wait(until_ms)
        self.now_ms, self.at = monotonic_ms(), wall()
        self._reap()
        self._run_timers()
        self.server.tick()
        for live in list(self._touched.values()):
            self._guard(live, self._record_ends)
        while self._requests:
            self._serve(*self._requests.popleft())
        self._start_steps()
        touched, self._touched = self._touched, {}
        for live in touched.values():
            self._guard(live, self._write_batch)
        for live in touched.values():
            self._guard(live, self._commit)
            self._guard(live, self._act)
            self._guard(live, self._let_go_if_over)
        self._send_replies()
        self._failed.clear()
        self._has_sync_failed = False
        self.watchers.feed()

    def _wait(self, until_ms: int | None) -> None:
        if self._touched or self._requests or self.watchers.is_behind:
            timeout: float | None = 0.0
        else:
            deadlines = [until_ms, self.server.deadline_ms(), self._timers[0][0] if self._timers else None]
            due_ms = min((ms for ms in deadlines if ms is not None), default=None)
            timeout = None if due_ms is None else min(MAX_WAIT_MS, max(0, due_ms - monotonic_ms())) / 1000
        for key, mask in self._selector.select(timeout):
            key.data(key.fileobj, mask)

    @property
    def is_idle(self) -> bool:
        """Is there nothing to do and nobody to talk to?"""
        return not (self.live or self._waiting or self.server.connections)

    @property
    def is_done(self) -> bool:
        """Was it asked to end, and has it ended all that it was asked to end before?"""
        return self.is_stopping or (self.is_draining and not (self.live or self._waiting))

    @property
    def running(self) -> int:
        """How many steps are running, all runs together."""
        return self._running

    def _at(self, due_ms: int, call: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._timers, (due_ms, next(self._serial), call, arguments))

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now_ms:
            _, _, call, arguments = heapq.heappop(self._timers)
            if not arguments:
                call()
            elif self._is_current(arguments):
                self._guard(arguments[0], call, *arguments[1:])
        if len(self._timers) > 2 * self._timers_kept + TIMERS_SLACK:
            # A stalled run sets its timers again each time it is presented again: one of each is enough.
            current = (timer for timer in self._timers if self._is_current(timer[3]))
            self._timers = list({(due_ms, call, of): (due_ms, n, call, of) for due_ms, n, call, of in current}.values())
            heapq.heapify(self._timers)
            self._timers_kept = len(self._timers)

    def _is_current(self, arguments: tuple[object, ...]) -> bool:
        """Is what a timer is about still there?"""
        if not arguments:
            return True
        live = arguments[0]
        assert isinstance(live, LiveRun)
        if self.live.get(live.run.run_id) is not live:
            return False
        return len(arguments) == 1 or live.attempts.get(arguments[1]) is arguments[2]  # type: ignore[call-overload]

    def _guard(self, live: object, call: Callable[..., None], *arguments: object) -> None:
        """One run's fault is not the others'."""
        assert isinstance(live, LiveRun)
        if self.live.get(live.run.run_id) is not live:
            return
        try:
            call(live, *arguments)
        except Damaged as error:
            self.quarantine(error)
        except _SHORTAGES as error:
            if isinstance(error, MemoryError) and live.journal.has_pending:
                self.quarantine(_half_written(live))
            else:
                self._stall(live, f"the system refuses: {journal.words_of(error)}")
        except Exception as error:
            # Whatever it is, the next daemon would meet it again: better one run stands still than all.
            self.quarantine(Damaged(live.run.run_id, f"the daemon's own check failed: {error!r}"))

    def quarantine(self, why: Damaged) -> None:
        """Touch this run no more. Its live steps are left alone."""
        run_id = why.run_id
        log(f"run {run_id} is quarantined: {why.why}")
        self.quarantined[run_id] = why.again()
        live = self.live.pop(run_id, None)
        self._touched.pop(run_id, None)
        if live is not None:
            self._running -= live.slots
            live.journal.close()
            self.watchers.close_run(run_id)

    def check_sound(self, run_id: str) -> None:
        """Raises Damaged of a run that is quarantined. Asked again when an answer is built: if that was in this very turn,
        what we know of the run may not be durable, and nothing more will come."""
        if run_id in self.quarantined:
            raise self.quarantined[run_id].again()

    # -- writing --------------------------------------------------------------------------------------------------

    def _write(self, live: LiveRun, event: Event) -> None:
        """One event, into the batch and into the state."""
        try:
            live.run.apply(live.journal.append(event, self.at, self.now_ms))
        except MemoryError:
            why = _half_written(live)
            self.quarantine(why)
            raise why from None
        step_id = getattr(event, "step", None)
        if step_id is not None:
            live.changed[live.run.index_of[step_id]] = None
        self._touched[live.run.run_id] = live

    def write_fact(self, live: LiveRun, fact: Fact) -> None:
        """A fact, and all that follows from it."""
        self._write(live, fact)
        if isinstance(fact, (RunCancelRequested, RunTimedOut)):
            live.changed.update(live.run.running)
        self._decide(live)

    def _decide(self, live: LiveRun) -> None:
        while (decision := decide.next_decision(live.run)) is not None:
            self._write(live, decision)

    def _begin_session(self, live: LiveRun) -> None:
        """What a daemon writes into a run that it takes over: the repair, the decisions still owed, a person's retry, and
        itself."""
        live.is_in_session = True
        if live.torn_bytes or decide.next_decision(live.run) is not None:
            self._write(live, LogRecovered(live.torn_bytes, live.kept_as))
            self._decide(live)
        if live.retry_request is not None and live.run.is_over:
            self.write_fact(live, RunRetried(live.retry_request))
        if not live.run.is_over:
            self._write(live, SupervisorStarted(FORMAT, RULES, VERSION, self.boot_id, self.host))

    def cancel(self, live: LiveRun, request: str) -> None:
        """Write a cancel, unless this one was carried out before, or the run is being cancelled already or is over."""
        if live.run.state is RunState.RUNNING and request not in live.run.requests:
            live.cancel_request = request
            if not live.is_in_session:
                self._begin_session(live)
            # What was still owed may have been its end.
            if not live.run.is_over:
                self.write_fact(live, RunCancelRequested(request))

    def drain(self) -> None:
        """Cancel every run, those that are waiting to be taken over as soon as they are, and start nothing more."""
        self.is_draining = True
        for live in list(self.live.values()):
            self._guard(live, self._cancel_for_drain)

    def _cancel_for_drain(self, live: LiveRun) -> None:
        """Nobody repeats this request but we: whose cancel could not be written gets another."""
        if self.is_draining:
            self.cancel(live, f"shutdown-{os.getpid()}-{live.run.seq}")

    def retry(self, live: LiveRun, request: str) -> None:
        """Write a person's retry of a run that is over and not let go yet."""
        live.retry_request = request
        self._begin_session(live)
        self._look_at_all(live)

    def _write_batch(self, live: LiveRun) -> None:
        if live.journal.has_pending:
            try:
                live.journal.write()
            except CommitFailed as error:
                self._after_failed_commit(live, error)

    def _commit(self, live: LiveRun) -> None:
        if live.journal.has_pending:
            if self._has_sync_failed:
                live.journal.write_anew()
            try:
                self._commit_batch(live)
            except CommitFailed as error:
                self._after_failed_commit(live, error)
        else:
            self._unstall(live)
        live.cancel_request = live.retry_request = None
        self._count_slots(live)

    def _count_slots(self, live: LiveRun) -> None:
        slots = len(live.run.running)
        self._running += slots - live.slots
        live.slots = slots

    def _commit_batch(self, live: LiveRun) -> None:
        start = live.journal.size
        batch = live.journal.commit()
        live.is_session_durable = live.is_in_session
        for index in [index for index in live.ended if _is_settled(live, index)]:
            del live.ended[index], live.attempts[index]
        if live.is_session_durable:
            live.torn_bytes, live.kept_as = 0, None
        self._unstall(live)
        self.watchers.committed(Batch(live.run.run_id, start, batch, is_end=live.run.is_over))

    def _after_failed_commit(self, live: LiveRun, error: CommitFailed) -> None:
        """The batch is gone: take the state from the disk. A cancel gets a second try in the room of the reserve."""
        # Not if a retry is gone with it: then the run is over again, and both are to hear that.
        request = live.cancel_request if live.retry_request is None else None
        self._refold(live, error)
        is_ending = request is not None or live.run.is_stopping
        if is_ending and self.give_up_reserve(error) and request is not None:
            self.cancel(live, request)
            try:
                self._commit_batch(live)
                return
            except CommitFailed as again:
                error = again
                self._refold(live, error)
        self._failed[live.run.run_id] = None
        self._stall(live, f"its log cannot be written: {error}")

    def _refold(self, live: LiveRun, error: CommitFailed) -> None:
        self._has_sync_failed = self._has_sync_failed or error.is_of_sync
        live.run = live.journal.refold()
        live.is_in_session = live.is_session_durable

    # -- stalls ---------------------------------------------------------------------------------------------------

    def _stall(self, live: LiveRun, why: str) -> None:
        if live.stalled != why:
            log(f"run {live.run.run_id} is stalled: {why}")
        live.stalled = why
        if live.retry_at_ms is None:
            live.retry_at_ms = self.now_ms + RETRY_MS
            self._at(live.retry_at_ms, self._present_again, live)

    def _unstall(self, live: LiveRun) -> None:
        """Its log could be written, or there was nothing to write."""
        if live.stalled is not None and not live.is_spawn_stalled and live.retry_at_ms is None:
            live.stalled = None

    def _stall_spawn(self, live: LiveRun, record: StepRecord, why: str) -> None:
        live.is_spawn_stalled = True
        self._stall(live, f"step {record.step.id!r} cannot be started: {why}")

    def _present_again(self, live: LiveRun) -> None:
        """Present everything again, from the state: ends, deadlines, steps that have no process."""
        live.retry_at_ms = None
        self._touched[live.run.run_id] = live
        if not live.is_in_session:
            self._begin_session(live)
        self._cancel_for_drain(live)
        self._look_at_all(live)

    def _look_at_all(self, live: LiveRun) -> None:
        live.changed.update(dict.fromkeys(range(len(live.run.steps))))
        self.arm_run(live)
        self._offer(live)

    def make_reserve(self) -> None:
        """The file that is given up when the disk is full. It must really take its room, so it holds no holes; half of it
        would take the room that others need. What cannot be made now is tried again later."""
        try:
            if self._has_reserve():
                return
            fd = os.open(self.home.reserve, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            self._make_reserve_later()
            return
        try:
            with open(fd, "wb") as file:
                file.write(b"\1" * RESERVE_BYTES)
        except OSError:
            with suppress(OSError):
                os.unlink(self.home.reserve)
            self._make_reserve_later()

    def _has_reserve(self) -> bool:
        """Is it there, and whole? Raises OSError."""
        try:
            if os.lstat(self.home.reserve).st_size == RESERVE_BYTES:
                return True
        except FileNotFoundError:
            return False
        # Somebody was killed while it was made, or a power cut has left the name alone.
        os.unlink(self.home.reserve)
        return False

    def _make_reserve_later(self) -> None:
        if not self._is_reserve_due:
            self._is_reserve_due = True
            self._at(self.now_ms + RETRY_MS, self._make_reserve_again)

    def _make_reserve_again(self) -> None:
        self._is_reserve_due = False
        # Those whom it was given up for need its room until their end.
        if any(live.run.is_stopping or live.stalled is not None for live in self.live.values()):
            self._make_reserve_later()
        else:
            self.make_reserve()

    def give_up_reserve(self, error: OSError | CommitFailed) -> bool:
        """Make room for the end of a run, if the disk is full and there is any to make."""
        if error.errno not in _DISK_FULL:
            return False
        try:
            os.unlink(self.home.reserve)
        except OSError:
            return False
        self._make_reserve_later()
        return True

    # -- runs come and go -----------------------------------------------------------------------------------------

    def take_over_all(self) -> None:
        """Fold every run that may be unfinished."""
        for run_id in sorted(os.listdir(self.home.live)):
            if is_run_id(run_id):
                self._try_take_over(run_id)

    def _try_take_over(self, run_id: str) -> None:
        self._waiting.discard(run_id)
        # Since the last try somebody may have asked for it.
        if run_id in self.live or run_id in self.quarantined:
            return
        with suppress(Damaged):
            try:
                if not journal.exists(f"{self.home.live}/{run_id}"):
                    # It is over again.
                    return
                if journal.exists(self.home.run(run_id).directory):
                    self.take_over(run_id)
                else:
                    # The crash came between the marker and the run: nobody was told of it.
                    journal.abandon(self.home, run_id)
            except _SHORTAGES as error:
                log(f"run {run_id} cannot be taken over yet: {journal.words_of(error)}")
                self._waiting.add(run_id)
                self._at(self.now_ms + RETRY_MS, lambda: self._try_take_over(run_id))

    def take_over(self, run_id: str, retry_request: str | None = None) -> LiveRun:
        """Own a run that is on disk. One that is over is let go again at the end of the turn, unless a person retries it.
        Raises Damaged (then it is quarantined), OSError."""
        try:
            environment = requests.load_environment(self.home.run(run_id), run_id)
            log_, run, torn_bytes, kept_as = journal.recover(self.home, run_id)
        except Damaged as error:
            self.quarantine(error)
            raise
        live = LiveRun(run, log_, environment)
        live.torn_bytes, live.kept_as, live.retry_request = torn_bytes, kept_as, retry_request
        self._own(live)
        self._count_slots(live)
        for index in run.running:
            # Where the log has the attempt's end already, only the decision on it was torn off.
            if run.steps[index].outcome is None:
                self._guard(live, self._adopt, run.steps[index])
        self._guard(live, self._begin_session)
        self._guard(live, self._cancel_for_drain)
        self._guard(live, self._look_at_all)
        self.check_sound(run_id)
        return live

    def create(self, submitted: RunSubmitted, environment: requests.Environment) -> None:
        """A new run, durable on return. Raises OSError; then nothing of it is left."""
        run_id = submitted.run_id
        log_ = journal.create(self.home, run_id, submitted, environment.encode(), self.at, self.now_ms)
        self.make_reserve()
        live = LiveRun(Run(Line(1, self.at, self.now_ms, 0, submitted)), log_, environment)
        self._own(live)
        self._decide(live)
        self._begin_session(live)
        self.arm_run(live)

    def _own(self, live: LiveRun) -> None:
        # What was under this name before has been mended or removed by hand.
        self.quarantined.pop(live.run.run_id, None)
        self._waiting.discard(live.run.run_id)
        self.live[live.run.run_id] = self._touched[live.run.run_id] = live

    def _let_go_if_over(self, live: LiveRun) -> None:
        """The run's end is durable: its marker may go, and it costs the daemon nothing more."""
        if not live.run.is_over or live.journal.has_pending:
            return
        journal.unmark_live(self.home, live.run.run_id)
        del self.live[live.run.run_id]
        live.journal.close()

    def arm_run(self, live: LiveRun) -> None:
        """Wake up when the run's own timeout passes."""
        deadline_ms = live.run.deadline_ms()
        if deadline_ms is not None:
            self._at(deadline_ms, self._run_deadline, live)

    def _run_deadline(self, live: LiveRun) -> None:
        deadline_ms = live.run.deadline_ms()
        if deadline_ms is not None and deadline_ms <= self.now_ms and live.retry_at_ms is None:
            self.write_fact(live, RunTimedOut())

    # -- starting -------------------------------------------------------------------------------------------------

    def _offer(self, live: LiveRun) -> None:
        """The run may have something to start: let it have its turn."""
        if not live.is_offered:
            live.is_offered = True
            self._offers.append(live)

    def _start_steps(self) -> None:
        """Share out the free slots among the runs, which take turns: see TURN_STEPS."""
        for live in self._touched.values():
            self._offer(live)
        if not self._offers:
            return
        running = self._running + sum(len(live.run.running) - live.slots for live in self._touched.values())
        while self._offers and running < self.max_parallel:
            live = self._offers[0]
            index = self._startable(live)
            if index is None:
                live.is_offered = False
                self._offers.popleft()
                self._turn_steps = 0
                continue
            record = live.run.steps[index]
            self._write(live, StepStarted(record.step.id, record.attempt + 1))
            running += 1
            self._turn_steps += 1
            if not live.is_quick or self._turn_steps >= TURN_STEPS:
                self._offers.rotate(-1)
                self._turn_steps = 0

    def _startable(self, live: LiveRun) -> int | None:
        run = live.run
        if self.live.get(run.run_id) is not live or self.is_stopping or self.is_draining:
            return None
        if live.retry_at_ms is not None or live.is_spawn_stalled or not live.is_in_session:
            return None
        if run.is_stopping or not run.has_free_slot():
            return None
        return run.startable(self.now_ms)

    def _wake(self, live: LiveRun) -> None:
        """A back-off is over."""
        self._touched[live.run.run_id] = live

    # -- acting ---------------------------------------------------------------------------------------------------

    def _act(self, live: LiveRun) -> None:
        """Make the world fit the durable state."""
        changed, live.changed = live.changed, {}
        for index in changed:
            record = live.run.steps[index]
            if record.state is RUNNING:
                self._act_on_running(live, record)
            elif record.state is READY and record.delay_ms:
                self._at(record.not_before_ms, self._wake, live)

    def _act_on_running(self, live: LiveRun, record: StepRecord) -> None:
        if record.outcome is not None:
            # It has ended; what is decided on that could not be written yet.
            return
        attempt = live.attempts.get(record.index)
        ending_ms = live.run.ending_since_ms(record)
        if attempt is None and ending_ms is None:
            self._launch(live, record)
        elif attempt is None:
            never = self._attempt(live, record, self._files(live, record), self._marks(live, record), None, is_child=True)
            never.outcome = Outcome("not_started", why="stopped", detail="it was ended before its command began")
            self._over(live, record, never)
        elif attempt.phase == "alive" and ending_ms is not None:
            self._end(live, record, attempt, ending_ms)
        elif attempt.phase == "alive":
            self._arm_attempt(live, record, attempt)

    def _launch(self, live: LiveRun, record: StepRecord) -> None:
        """Give a RUNNING step its process."""
        if live.retry_at_ms is not None:
            return
        if self._running > self.max_parallel and self._living() >= self.max_parallel:
            # Another run's step has its place: what had made room for that was not written when a crash came, or the limit
            # of this daemon is lower than that of the one before.
            self._stall_spawn(live, record, f"the daemon's limit of {self.max_parallel} running steps is reached")
            return
        run, step = live.run, record.step
        files, marks = self._files(live, record), self._marks(live, record)
        environ = live.environ | process.environment(step.env) | marks
        launch = Launch(files, step.command, step.cwd or run.workflow.cwd or run.cwd, live.umask, live.limits, environ)
        begun: int | Outcome | None = None
        self._orphans.keep()
        try:
            begun = process.start(launch)
        except FileExistsError:
            self._adopt(live, record)
        except SpawnStalled as error:
            self._stall_spawn(live, record, str(error))
            return
        if live.is_spawn_stalled:
            live.is_spawn_stalled, live.stalled = False, None
            self._touched[run.run_id] = live
        if begun is None:
            return
        if isinstance(begun, Outcome):
            failed = self._attempt(live, record, files, marks, None, is_child=True)
            failed.outcome = begun
            self._over(live, record, failed)
            return
        attempt = self._attempt(live, record, files, marks, begun, is_child=True)
        self._children[begun] = (live, record.index, attempt)
        self._arm_attempt(live, record, attempt)
        self._check_outputs_in(OUTPUT_SOON_MS)

    def _living(self) -> int:
        return sum(attempt.phase != "over" for live in self.live.values() for attempt in live.attempts.values())

    def _marks(self, live: LiveRun, record: StepRecord) -> dict[bytes, bytes]:
        return process.markers(live.run.workflow.workflow_id, live.run.run_id, record.step.id, record.attempt)

    def _files(self, live: LiveRun, record: StepRecord) -> AttemptFiles:
        return live.journal.files.attempt(record.index + 1, record.step.id, record.attempt)

    def _attempt(
        self,
        live: LiveRun,
        record: StepRecord,
        files: AttemptFiles,
        marks: dict[bytes, bytes],
        pid: int | None,
        *,
        is_child: bool,
    ) -> Attempt:
        # A spawn may have waited long for a slot of the system: the timeout counts from when the command could begin.
        since_ms = self.now_ms if is_child else record.started_ms
        attempt = Attempt(record.attempt, files, marks, pid, since_ms, is_child, self._orphans)
        live.attempts[record.index] = attempt
        return attempt

    def _adopt(self, live: LiveRun, record: StepRecord) -> None:
        """Take over an attempt that an earlier daemon had started, by the table of process.py."""
        files = self._files(live, record)
        if journal.exists(files.status) or self._is_rebooted(live, record):
            attempt = self._attempt(live, record, files, self._marks(live, record), None, is_child=False)
            self._at(self.now_ms, self._look, live, record.index, attempt)
            self._check_outputs_in(OUTPUT_SOON_MS)

    def _is_rebooted(self, live: LiveRun, record: StepRecord) -> bool:
        """Did the newest attempt start in another boot? The log says so from our session line on."""
        return record.is_rebooted or live.run.boot_id != self.boot_id

    # -- deadlines and signals ------------------------------------------------------------------------------------

    def _arm_attempt(self, live: LiveRun, record: StepRecord, attempt: Attempt) -> None:
        if record.step.timeout_ms is not None:
            self._at(attempt.since_ms + record.step.timeout_ms, self._attempt_deadline, live, record.index, attempt)

    def _attempt_deadline(self, live: LiveRun, index: int, attempt: Attempt) -> None:
        record = live.run.steps[index]
        deadline_ms = live.run.attempt_deadline_ms(record)
        if attempt.phase != "alive":
            return
        if live.retry_at_ms is not None:
            # Behind what presents all again then: another step that cannot be started may stall the run once more at once.
            self._at(live.retry_at_ms, self._attempt_deadline, live, index, attempt)
        elif deadline_ms is not None and deadline_ms <= self.now_ms:
            self.write_fact(live, AttemptTimedOut(record.step.id, attempt.number))

    def _end(self, live: LiveRun, record: StepRecord, attempt: Attempt, since_ms: int) -> None:
        """TERM now, KILL when the grace is over."""
        kill_at_ms = since_ms + record.step.grace_ms
        next_ms = kill_at_ms
        try:
            if self.now_ms >= kill_at_ms:
                attempt.signal(signal.SIGKILL)
                next_ms = self.now_ms + RETRY_MS
            elif not attempt.is_term_sent:
                attempt.is_term_sent = attempt.signal(signal.SIGTERM)
                # An adopted shim that has not written its pid yet cannot be signalled yet.
                next_ms = kill_at_ms if attempt.is_term_sent else self.now_ms + process.ADOPTED_POLL_MS
        except OSError as error:
            log(f"run {live.run.run_id}, step {record.step.id!r} cannot be signalled: {error}")
            next_ms = self.now_ms + RETRY_MS
        self._at(next_ms, self._end_later, live, record.index, attempt)

    def _end_later(self, live: LiveRun, index: int, attempt: Attempt) -> None:
        if attempt.phase == "alive":
            live.changed[index] = None
            self._touched[live.run.run_id] = live

    # -- the end of an attempt ------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """All dead children: shims, and the orphans that were handed to us."""
        ended = []
        has_reaped = False
        while (exit_ := self._next_exit()) is not None:
            has_reaped = True
            live, index, attempt = self._children.pop(exit_.pid, (None, -1, None))
            if live is not None and attempt is not None:
                attempt.reaped(exit_, self.now_ms)
                ended.append((live, index, attempt))
            else:
                self._orphans.forget(exit_.pid)
        if has_reaped:
            self._orphans.look()
        for live, index, attempt in ended:
            if live.attempts.get(index) is attempt:
                self._guard(live, self._look, index, attempt)

    def _next_exit(self) -> process.Exit | None:
        pid = process.next_dead_child()
        if pid is None and hasattr(os, "waitid"):
            return None
        if pid is not None:
            self._kill_survivors_of(pid)
        return process.reap(pid if pid is not None else -1)

    def _kill_survivors_of(self, pid: int) -> None:
        """While the dead shim is a zombie, its group's number is its own."""
        live, index, _ = self._children.get(pid, (None, -1, None))
        if live is not None and not self._is_in_grace(live, live.run.steps[index]):
            process.signal_group(pid, signal.SIGKILL)

    def _is_in_grace(self, live: LiveRun, record: StepRecord) -> bool:
        ending_ms = live.run.ending_since_ms(record)
        return ending_ms is not None and self.now_ms < ending_ms + record.step.grace_ms

    def _look(self, live: LiveRun, index: int, attempt: Attempt) -> None:
        """Look at an attempt that nobody reports on: an adopted one, or the group that a dead shim has left."""
        if attempt.phase == "over":
            return
        record = live.run.steps[index]
        rebooted = self._is_rebooted(live, record)
        try:
            again_ms = None if rebooted else attempt.look(self.now_ms, in_grace=self._is_in_grace(live, record))
            if again_ms is None:
                is_ending = live.run.ending_since_ms(record) is not None
                if not is_ending or not live.journal.has_pending:
                    attempt.settle(is_ending=is_ending, rebooted=rebooted)
                    self._over(live, record, attempt)
                    return
                # What ends it is of this very turn. Nothing was done about it yet, and if the commit fails it never was.
                again_ms = 1
        except OSError as error:
            self._stall(live, f"step {record.step.id!r} cannot be looked at: {error.strerror or error}")
            again_ms = RETRY_MS
        self._at(self.now_ms + again_ms, self._look, live, index, attempt)

    def _over(self, live: LiveRun, record: StepRecord, attempt: Attempt) -> None:
        if attempt.outcome is not None and attempt.outcome.kind == "stalled":
            process.remove(attempt.files)
            del live.attempts[record.index]
            self._stall_spawn(live, record, attempt.outcome.why)
            return
        attempt.phase = "over"
        self._trim_output(live, record, attempt)
        live.ended[record.index] = None
        self._touched[live.run.run_id] = live

    def _record_ends(self, live: LiveRun) -> None:
        """Write the facts of the attempts that are over. They stay in `ended` until that is durable."""
        if live.retry_at_ms is not None or not live.is_in_session:
            return
        for index in live.ended:
            record, attempt = live.run.steps[index], live.attempts[index]
            live.is_quick = self.now_ms - record.started_ms <= QUICK_MS
            assert record.state is RUNNING and record.attempt == attempt.number and attempt.outcome is not None
            self.write_fact(live, _fact_of(record, attempt.outcome))

    def _check_outputs_in(self, delay_ms: int) -> None:
        if not self._is_checking_outputs:
            self._is_checking_outputs = True
            self._at(self.now_ms + delay_ms, self._check_outputs)

    def _check_outputs(self) -> None:
        """Hold the outputs of live attempts to their limit."""
        self._is_checking_outputs = False
        attempts = [(live, index, attempt) for live in self.live.values() for index, attempt in live.attempts.items()]
        cut = [self._trim_output(live, live.run.steps[index], attempt) for live, index, attempt in attempts]
        if attempts:
            self._check_outputs_in(OUTPUT_SOON_MS if any(cut) else OUTPUT_CHECK_MS)

    def _trim_output(self, live: LiveRun, record: StepRecord, attempt: Attempt) -> bool:
        if not process.trim_output(attempt.files.out):
            return False
        if not attempt.is_cut:
            # Once: who prints without end is cut ten times a second.
            attempt.is_cut = True
            log(f"run {live.run.run_id}, step {record.step.id!r}: the output was cut")
        return True

    # -- requests -------------------------------------------------------------------------------------------------

    def _on_line(self, connection: Connection, line: bytes) -> None:
        try:
            self._requests.append((connection, protocol.parse_request(line)))
        except ProtocolError as problem:
            self.server.answer(connection, protocol.error(problem.request_id, problem) if problem.is_told else b"")
        except MemoryError as error:
            # What it is the request of nobody can tell now.
            self.server.answer(connection, protocol.error(None, _problem_of(error)))

    def _serve(self, connection: Connection, request: Request) -> None:
        """Carry a request out in memory; its answer goes out when what it has changed is durable."""
        try:
            live, build = requests.METHODS[request.method](self, connection, request.params)
        except _REFUSALS as error:
            self._refuse(connection, request, _problem_of(error))
        else:
            self._replies.append((connection, request, live, build))

    def _send_replies(self) -> None:
        replies, self._replies = self._replies, []
        for connection, request, live, build in replies:
            try:
                if live is not None:
                    self._check_durable(live)
                data = protocol.result(request.id, build())
            except _REFUSALS as error:
                self._refuse(connection, request, _problem_of(error))
            else:
                self.server.answer(connection, data if request.id is not None else b"")

    def _check_durable(self, live: LiveRun) -> None:
        """Has the batch with what the client asked for become durable? Raises ProtocolError, Damaged."""
        run_id = live.run.run_id
        self.check_sound(run_id)
        if run_id in self._failed:
            why = f"run {run_id} is stalled, nothing was changed: {live.stalled}"
            raise ProtocolError(protocol.STALLED, why)

    def _refuse(self, connection: Connection, request: Request, problem: ProtocolError) -> None:
        self.server.answer(connection, protocol.error(request.id, problem) if request.id is not None else b"")


# What a request may be refused for. Anything else is a defect that ends the daemon; its steps go on.
_REFUSALS = (ProtocolError, Damaged, OSError, MemoryError, AssertionError, Impossible, KeyError, ValueError)
# What the system may have again in a moment.
_SHORTAGES = (OSError, MemoryError)


def _problem_of(error: Exception) -> ProtocolError:
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, Damaged):
        return ProtocolError(protocol.DAMAGED, str(error))
    if isinstance(error, _SHORTAGES):
        return ProtocolError(protocol.STALLED, f"the system refuses: {journal.words_of(error)}")
    log(f"a request failed: {error!r}")
    return ProtocolError(protocol.INTERNAL_ERROR, f"the daemon's own check failed: {error!r}")


def _half_written(live: LiveRun) -> Damaged:
    """Memory ran out while a batch was made: it and the state may differ, until the log is read again."""
    return Damaged(live.run.run_id, "memory ran out in the middle of a batch; restart the daemon")


def _is_settled(live: LiveRun, index: int) -> bool:
    """Has the state taken in how this step's attempt ended?"""
    record = live.run.steps[index]
    return record.state is not RUNNING or record.attempt != live.attempts[index].number


def _fact_of(record: StepRecord, outcome: Outcome) -> Fact:
    step, number = record.step, record.attempt
    draw_ppm = random.randrange(DRAW_PPM) if step.backoff.jitter_permille else None
    if outcome.kind == "lost":
        return AttemptLost(step.id, number, outcome.why)
    if outcome.kind == "not_started":
        return AttemptNotStarted(step.id, number, outcome.why, outcome.detail, draw_ppm)
    usage = outcome.usage
    if usage is None:
        return AttemptExited(step.id, number, outcome.exit_code, draw_ppm)
    return AttemptExited(
        step.id, number, outcome.exit_code, draw_ppm, usage.user_ms, usage.system_ms, usage.peak_rss_kib
    )


def monotonic_ms() -> int:
    """Awake time since some moment of this boot. Linux and macOS give all processes of one boot the same."""
    return time.monotonic_ns() // 1_000_000


def wall() -> str:
    """The time of day, for people: RFC 3339, UTC, microseconds."""
    nanoseconds = time.time_ns()
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(nanoseconds // 1_000_000_000))
    return f"{seconds}.{nanoseconds // 1000 % 1_000_000:06d}Z"


def log(text: str) -> None:
    """A line in the daemon's own log (its stderr). Somebody may look at it on a terminal: what names and messages of
    others could do there is shown as its escape sequence."""
    with suppress(OSError):
        print(wall(), printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with everything that is not printable as Python would write it."""
    return text if text.isprintable() else ascii(text)[1:-1]
