"""The state of one run: the fold of its log, and nothing else.

Rules
* `STEP_TRANSITIONS` and `RUN_TRANSITIONS` are the whole machine. A missing key is the error.
* `apply` takes one line and changes the state, or raises Impossible and changes nothing. It never looks at a clock, a
  disk or a process: equal lines make equal states, in the daemon, in a client and in replay.
* A fact leaves work behind in `due`: the steps about which something must now be decided, in order. decide.py turns the
  head of that queue into a decision; applying the decision takes the head off and may put dependents on. So what is
  still owed after a crash in the middle of a batch is part of the state, and recovery needs no code of its own.

How the work spreads: a step that SUCCEEDED counts down `waiting` of its dependents and puts those that reach 0 on
`due`; one that FAILED or was SKIPPED puts its PENDING dependents there. A cancel, or the run's timeout, puts all there
that have no process; a step with a process follows when its attempt is over. A step stands in `due` at most once.
"""

from __future__ import annotations

import heapq
from collections import deque
from enum import StrEnum

from wfd.definition import Step, Workflow
from wfd.events import (
    AttemptExited,
    AttemptLost,
    AttemptNotStarted,
    AttemptTimedOut,
    Decision,
    Event,
    Fact,
    Line,
    LogRecovered,
    RunCancelRequested,
    RunFinished,
    RunRetried,
    RunSubmitted,
    RunTimedOut,
    StepCancelled,
    StepFailed,
    StepReady,
    StepRetried,
    StepSkipped,
    StepStarted,
    StepSucceeded,
    SupervisorStarted,
)


class StepState(StrEnum):
    """The seven states of a step."""

    # Enum's own is a Python function, and the transition tables are looked into once or twice for each line of a log.
    __hash__ = str.__hash__

    PENDING = "PENDING"
    READY = "READY"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"
    CANCELLED = "CANCELLED"


class RunState(StrEnum):
    """The states of a run."""

    __hash__ = str.__hash__

    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


PENDING, READY, RUNNING = StepState.PENDING, StepState.READY, StepState.RUNNING
SUCCEEDED, FAILED, SKIPPED, CANCELLED = StepState.SUCCEEDED, StepState.FAILED, StepState.SKIPPED, StepState.CANCELLED

STEP_TRANSITIONS: dict[tuple[StepState, type[Event]], StepState] = {
    (PENDING, StepReady): READY,
    (PENDING, StepSkipped): SKIPPED,
    (PENDING, StepCancelled): CANCELLED,
    (READY, StepStarted): RUNNING,
    (READY, StepCancelled): CANCELLED,
    (RUNNING, AttemptTimedOut): RUNNING,
    (RUNNING, AttemptExited): RUNNING,
    (RUNNING, AttemptLost): RUNNING,
    (RUNNING, AttemptNotStarted): RUNNING,
    (RUNNING, StepSucceeded): SUCCEEDED,
    (RUNNING, StepFailed): FAILED,
    (RUNNING, StepRetried): READY,
    (RUNNING, StepCancelled): CANCELLED,
    (FAILED, RunRetried): PENDING,
    (SKIPPED, RunRetried): PENDING,
    (CANCELLED, RunRetried): PENDING,
}

# RunFinished leads to the end state that it names; both rows name the ones it may.
RUN_TRANSITIONS: dict[tuple[RunState, type[Event]], tuple[RunState, ...]] = {
    (RunState.RUNNING, RunCancelRequested): (RunState.CANCELLING,),
    (RunState.RUNNING, RunTimedOut): (RunState.RUNNING,),
    (RunState.RUNNING, SupervisorStarted): (RunState.RUNNING,),
    (RunState.RUNNING, LogRecovered): (RunState.RUNNING,),
    (RunState.RUNNING, RunFinished): (RunState.SUCCEEDED, RunState.FAILED),
    (RunState.CANCELLING, SupervisorStarted): (RunState.CANCELLING,),
    (RunState.CANCELLING, LogRecovered): (RunState.CANCELLING,),
    (RunState.CANCELLING, RunFinished): (RunState.CANCELLED,),
    (RunState.SUCCEEDED, LogRecovered): (RunState.SUCCEEDED,),
    (RunState.FAILED, LogRecovered): (RunState.FAILED,),
    (RunState.FAILED, RunRetried): (RunState.RUNNING,),
    (RunState.CANCELLED, LogRecovered): (RunState.CANCELLED,),
    (RunState.CANCELLED, RunRetried): (RunState.RUNNING,),
}

# The end of an attempt: what decide.py settles a RUNNING step by.
_ATTEMPT_ENDS = (AttemptExited, AttemptLost, AttemptNotStarted)
_NEEDS_NO_PROCESS = frozenset({PENDING, READY})
# Reasons for another try that use up no retry.
_NO_FAILURE = frozenset({"lost", "never_began"})
END_STATES = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})


class Impossible(ValueError):
    """A line that cannot follow what is before it in its log."""


class StepRecord:
    """What the log says about one step. `index` is its place in the definition, from 0.

    attempt        the number of the newest attempt, 0 before the first
    failures       failed attempts, lost ones not counted; reset when a person retries the run
    losses         attempts that were lost or never began; reset likewise
    waiting        dependencies that have not SUCCEEDED
    blocked_by     the dependency that was the first to be FAILED or SKIPPED
    not_before_ms  mono_ms before which a READY step may not start; delay_ms: how that came about
    started_ms     mono_ms of the newest attempt's start; timed_out_ms: of its timeout, or None
    outcome        the fact that ended the newest attempt, until the step is settled
    is_rebooted    the machine was booted anew since the newest attempt started
    """

    __slots__ = (
        "attempt", "blocked_by", "delay_ms", "exit_code", "failures", "finished_at", "index", "is_due",
        "is_rebooted", "losses",
        "not_before_ms", "outcome", "reason", "started_at", "started_ms", "state", "step", "timed_out_ms", "waiting",
    )  # fmt: skip

    def __init__(self, index: int, step: Step) -> None:
        self.index = index
        self.step = step
        self.state = PENDING
        self.attempt = 0
        self.failures = 0
        self.losses = 0
        self.waiting = len(step.depends_on)
        self.blocked_by: str | None = None
        self.not_before_ms = 0
        self.delay_ms = 0
        self.started_ms = 0
        self.timed_out_ms: int | None = None
        self.outcome: Fact | None = None
        self.is_due = False
        self.is_rebooted = False
        self.exit_code: int | None = None
        self.reason: str | None = None
        self.started_at: str | None = None
        self.finished_at: str | None = None


class Run:
    """One run, as its log tells it. Made from line 1; then `apply` takes the lines in order.

    cause          seq of the newest fact or choice: what decisions now follow from
    mono_ms        of the newest line that is known to be of the boot `boot_id`
    due            steps about which something must be decided, in order
    stop_ms        mono_ms of the first cancel or run timeout; from then on nothing starts
    requests       the ids of all cancels and retries: one that is repeated changes nothing
    elapsed_ms     awake time of the run before the boot that `origin_ms` belongs to
    """

    def __init__(self, line: Line) -> None:
        event = line.event
        if not isinstance(event, RunSubmitted) or line.seq != 1:
            raise Impossible("a log must begin with run_submitted as line 1")
        self.run_id = event.run_id
        self.workflow: Workflow = event.workflow
        self.cwd = event.cwd
        self.boot_id = event.boot_id
        self.state = RunState.RUNNING
        self.reason = ""
        self.requests: set[str] = set()
        self.submitted_at = line.at
        self.finished_at: str | None = None
        self.seq = self.cause = 1
        self.origin_ms = self.mono_ms = line.mono_ms
        self.elapsed_ms = 0
        self._is_recovering = False
        self.stop_ms: int | None = None
        self.timed_out = False
        self.steps = [StepRecord(index, step) for index, step in enumerate(self.workflow.steps)]
        self.index_of = {record.step.id: record.index for record in self.steps}
        self.dependents: list[list[int]] = [[] for _ in self.steps]
        self.due: deque[int] = deque()
        self.unfinished = len(self.steps)
        self.failed = 0
        self.running: dict[int, None] = {}
        self._ready: deque[int] = deque()
        self._delayed: list[tuple[int, int]] = []
        for record in self.steps:
            for dependency in record.step.depends_on:
                self.dependents[self.index_of[dependency]].append(record.index)
            if record.waiting == 0:
                self._put_on_due(record)

    # -- questions ------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self.state in END_STATES

    @property
    def is_stopping(self) -> bool:
        """A cancel or the run's timeout: nothing starts any more, and what runs is being ended."""
        return self.stop_ms is not None

    def startable(self, now_ms: int) -> int | None:
        """The first READY step whose back-off is over, or None. now_ms: the monotonic clock of this boot."""
        while self._delayed and self._delayed[0][0] <= now_ms:
            self._ready.append(heapq.heappop(self._delayed)[1])
        # Both queues are only hints (a started step stays in them until it is met here): the record decides.
        while self._ready:
            record = self.steps[self._ready[0]]
            if record.state is READY and record.not_before_ms <= now_ms:
                return record.index
            self._ready.popleft()
        return None

    def has_free_slot(self) -> bool:
        """May one more step of this run be running?"""
        limit = self.workflow.max_parallel
        return limit is None or len(self.running) < limit

    def deadline_ms(self) -> int | None:
        """mono_ms at which the run's own timeout passes, or None when it has none or cannot time out any more."""
        timeout_ms = self.workflow.timeout_ms
        if timeout_ms is None or self.is_over or self.is_stopping:
            return None
        return self.origin_ms + timeout_ms - self.elapsed_ms

    def attempt_deadline_ms(self, record: StepRecord) -> int | None:
        """mono_ms at which the live attempt of a RUNNING step times out, or None."""
        timeout_ms = record.step.timeout_ms
        if timeout_ms is None or record.timed_out_ms is not None or self.is_stopping:
            return None
        return record.started_ms + timeout_ms

    def ending_since_ms(self, record: StepRecord) -> int | None:
        """mono_ms since when the live attempt of a RUNNING step is being ended, or None."""
        if record.timed_out_ms is None or self.stop_ms is None:
            return self.stop_ms if record.timed_out_ms is None else record.timed_out_ms
        return min(record.timed_out_ms, self.stop_ms)

    def describe(self) -> dict[str, object]:
        """The run as the JSON object of `status --json` (source is added by whoever answers)."""
        return {
            "run_id": self.run_id,
            "workflow_id": self.workflow.workflow_id,
            "state": self.state.value,
            "reason": self.reason,
            "submitted_at": self.submitted_at,
            "finished_at": self.finished_at,
            "last_seq": self.seq,
            "cwd": self.cwd,
            "steps": [_describe_step(record) for record in self.steps],
        }

    # -- the fold -------------------------------------------------------------------------------------------------

    def apply(self, line: Line) -> None:
        """Take the next line. Raises Impossible."""
        event = line.event
        if line.seq != self.seq + 1:
            raise Impossible(f"seq {line.seq} follows {self.seq}")
        step_id = getattr(event, "step", None)
        if step_id is None:
            self._apply_to_run(line, event)
        else:
            self._apply_to_step(line, event, step_id)
        self.seq = line.seq
        if not self._is_recovering:
            self.mono_ms = line.mono_ms

    def _apply_to_step(self, line: Line, event: Event, step_id: str) -> None:
        index = self.index_of.get(step_id)
        if index is None:
            raise Impossible(f"{event.name} names the unknown step {step_id!r}")
        record = self.steps[index]
        kind = type(event)
        after = STEP_TRANSITIONS.get((record.state, kind))
        if after is None:
            where = f"which is {record.state.value} in a run that is {self.state.value}"
            raise Impossible(f"{event.name} of step {step_id!r}, {where}")
        if not isinstance(event, Decision):
            _check_attempt(self, record, event)
            self.cause = line.seq
        elif not self.due or self.due[0] != index:
            raise Impossible(f"{event.name} of step {step_id!r} was not to be decided now")
        else:
            self.due.popleft()
            record.is_due = False
        record.state = after
        _APPLY[kind](self, line, record)

    def _apply_to_run(self, line: Line, event: Event) -> None:
        after = RUN_TRANSITIONS.get((self.state, type(event)))
        if after is None:
            raise Impossible(f"{event.name} in a run that is {self.state.value}")
        if isinstance(event, RunFinished):
            if self.unfinished or event.state not in after:
                where = f"with {self.unfinished} unfinished steps in a run that is {self.state.value}"
                raise Impossible(f"run_finished {event.state} {where}")
            self.state, self.reason, self.finished_at = RunState(event.state), event.reason, line.at
            return
        self.state = after[0]
        if isinstance(event, LogRecovered):
            # A new daemon wrote this, perhaps after a reboot, with another clock. Its supervisor_started will tell.
            self._is_recovering = True
            return
        if isinstance(event, SupervisorStarted):
            self._new_session(line, event)
            return
        self.cause = line.seq
        if isinstance(event, RunRetried):
            self._retry(line, event)
        elif isinstance(event, (RunCancelRequested, RunTimedOut)):
            self._stop(line, event)

    def _stop(self, line: Line, event: RunCancelRequested | RunTimedOut) -> None:
        if isinstance(event, RunCancelRequested):
            self.requests.add(event.request)
        else:
            self.timed_out = True
        if self.stop_ms is None:
            self.stop_ms = line.mono_ms
        for record in self.steps:
            if record.state in _NEEDS_NO_PROCESS:
                self._put_on_due(record)

    def _new_session(self, line: Line, event: SupervisorStarted) -> None:
        self._is_recovering = False
        if event.boot_id == self.boot_id:
            return
        # Another boot, another monotonic clock: what was waited before counts as far as the log saw it.
        self.elapsed_ms += self.mono_ms - self.origin_ms
        self.boot_id, self.origin_ms = event.boot_id, line.mono_ms
        if self.stop_ms is not None:
            self.stop_ms = line.mono_ms
        self._delayed = []
        for record in self.steps:
            if record.state is RUNNING:
                record.started_ms = line.mono_ms
                record.is_rebooted = True
                if record.timed_out_ms is not None:
                    record.timed_out_ms = line.mono_ms
            elif record.state is READY:
                self._make_ready(record, line.mono_ms, record.delay_ms)

    def _retry(self, line: Line, event: RunRetried) -> None:
        self.requests.add(event.request)
        self.reason, self.finished_at, self.stop_ms = "", None, None
        self.timed_out, self.failed, self.elapsed_ms, self.origin_ms = False, 0, 0, line.mono_ms
        for record in self.steps:
            again = STEP_TRANSITIONS.get((record.state, RunRetried))
            if again is not None:
                record.state, record.failures, record.losses, record.blocked_by = again, 0, 0, None
                record.exit_code = record.reason = record.finished_at = None
                self.unfinished += 1
                if record.waiting == 0:
                    self._put_on_due(record)

    def _put_on_due(self, record: StepRecord) -> None:
        if not record.is_due:
            record.is_due = True
            self.due.append(record.index)

    def _make_ready(self, record: StepRecord, now_ms: int, delay_ms: int) -> None:
        record.delay_ms, record.not_before_ms = delay_ms, now_ms + delay_ms
        if delay_ms:
            heapq.heappush(self._delayed, (record.not_before_ms, record.index))
        else:
            self._ready.append(record.index)

    def _finish_step(self, line: Line, record: StepRecord, reason: str | None) -> None:
        record.outcome, record.reason, record.finished_at = None, reason, line.at
        self.running.pop(record.index, None)
        self.unfinished -= 1

    def _block_dependents(self, record: StepRecord) -> None:
        for index in self.dependents[record.index]:
            dependent = self.steps[index]
            if dependent.state is PENDING and dependent.blocked_by is None:
                dependent.blocked_by = record.step.id
                self._put_on_due(dependent)


def _check_attempt(run: Run, record: StepRecord, event: Event) -> None:
    attempt: int = event.attempt  # type: ignore[attr-defined]
    is_start = isinstance(event, StepStarted)
    expected = record.attempt + 1 if is_start else record.attempt
    if attempt != expected:
        raise Impossible(f"{event.name} of step {record.step.id!r} names attempt {attempt}, not {expected}")
    if record.outcome is not None:
        raise Impossible(f"{event.name} of step {record.step.id!r} after its attempt {attempt} had ended")
    if is_start:
        if run.is_stopping:
            raise Impossible(f"step {record.step.id!r} starts after a cancel or the run's timeout")
    elif isinstance(event, AttemptTimedOut):
        if record.timed_out_ms is not None:
            raise Impossible(f"attempt {attempt} of step {record.step.id!r} timed out twice")
    elif _says_we_ended_it(event) and run.ending_since_ms(record) is None:
        raise Impossible(f"{event.name} of step {record.step.id!r} as if we had ended it, but nothing told us to")


def _says_we_ended_it(event: Event) -> bool:
    if isinstance(event, AttemptExited):
        return event.exit_code is None
    return isinstance(event, AttemptNotStarted) and event.why == "stopped"


def _describe_step(record: StepRecord) -> dict[str, object]:
    return {
        "id": record.step.id,
        "state": record.state.value,
        "attempt": record.attempt,
        "exit_code": record.exit_code,
        "reason": record.reason,
        "because": record.blocked_by,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "delay_ms": record.delay_ms if record.state is READY else 0,
        "depends_on": list(record.step.depends_on),
    }


def _on_ready(run: Run, line: Line, record: StepRecord) -> None:
    run._make_ready(record, line.mono_ms, 0)


def _on_started(run: Run, line: Line, record: StepRecord) -> None:
    run.running[record.index] = None
    record.attempt += 1
    record.is_rebooted = False
    record.started_ms, record.timed_out_ms, record.delay_ms = line.mono_ms, None, 0
    record.started_at, record.finished_at, record.exit_code, record.reason = line.at, None, None, None


def _on_timed_out(run: Run, line: Line, record: StepRecord) -> None:
    record.timed_out_ms = line.mono_ms


def _on_attempt_end(run: Run, line: Line, record: StepRecord) -> None:
    event = line.event
    assert isinstance(event, _ATTEMPT_ENDS)
    if isinstance(event, AttemptExited):
        record.exit_code = event.exit_code
    record.outcome = event
    run._put_on_due(record)


def _on_succeeded(run: Run, line: Line, record: StepRecord) -> None:
    run._finish_step(line, record, None)
    for index in run.dependents[record.index]:
        dependent = run.steps[index]
        dependent.waiting -= 1
        if dependent.waiting == 0 and dependent.state is PENDING:
            run._put_on_due(dependent)


def _count(record: StepRecord, reason: str) -> None:
    if reason in _NO_FAILURE:
        record.losses += 1
    else:
        record.failures += 1


def _on_failed(run: Run, line: Line, record: StepRecord) -> None:
    event = line.event
    assert isinstance(event, StepFailed)
    _count(record, event.reason)
    run.failed += 1
    run._finish_step(line, record, event.reason)
    run._block_dependents(record)


def _on_retried(run: Run, line: Line, record: StepRecord) -> None:
    event = line.event
    assert isinstance(event, StepRetried)
    _count(record, event.reason)
    record.outcome, record.reason = None, event.reason
    run.running.pop(record.index, None)
    run._make_ready(record, line.mono_ms, event.delay_ms)


def _on_skipped(run: Run, line: Line, record: StepRecord) -> None:
    event = line.event
    assert isinstance(event, StepSkipped)
    run._finish_step(line, record, f"because {event.because}")
    run._block_dependents(record)


def _on_cancelled(run: Run, line: Line, record: StepRecord) -> None:
    event = line.event
    assert isinstance(event, StepCancelled)
    run._finish_step(line, record, event.reason)


_APPLY = {
    StepReady: _on_ready,
    StepStarted: _on_started,
    AttemptTimedOut: _on_timed_out,
    AttemptExited: _on_attempt_end,
    AttemptLost: _on_attempt_end,
    AttemptNotStarted: _on_attempt_end,
    StepSucceeded: _on_succeeded,
    StepFailed: _on_failed,
    StepRetried: _on_retried,
    StepSkipped: _on_skipped,
    StepCancelled: _on_cancelled,
}
