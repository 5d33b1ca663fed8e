"""The rules: what follows from the state of a run, and what may be chosen. Facts in, decisions out.

`next_decision` looks at the head of the run's `due` queue and says the one thing that follows. The daemon asks it after
each fact until it answers None, writing and applying each answer; `check` asks it again for each line of a finished
log. Because the same function speaks both times, a log that replays is a log that these rules would write again.

Rules (events.RULES is their version; a change that would decide an old log differently needs a new number)
* A cancel decides before a timeout of the run, that before a timeout of the attempt, that before the exit status.
* Exit 0 succeeds. Everything else is a failure and is tried again while failures <= retries, after the back-off.
* A lost attempt, and one that never began, is no failure: tried again at once, without using a retry, MAX_LOSSES times.
* A step is skipped as soon as one dependency is FAILED or SKIPPED; it is ready when all have SUCCEEDED.
* The run ends when no step is unfinished: CANCELLED after a cancel, FAILED after its timeout or any failed step.

This file does no I/O, reads no clock and draws no numbers: a jitter is drawn by the caller and written on the fact.
"""

from __future__ import annotations

from collections.abc import Iterable

from wfd.events import (
    DRAW_PPM,
    AttemptExited,
    AttemptLost,
    AttemptNotStarted,
    AttemptTimedOut,
    Choice,
    Decision,
    Event,
    Line,
    LogRecovered,
    RunFinished,
    RunTimedOut,
    StepCancelled,
    StepFailed,
    StepReady,
    StepRetried,
    StepSkipped,
    StepStarted,
    StepSucceeded,
)
from wfd.state import READY, RUNNING, Impossible, Run, RunState, StepRecord
from wfd.values import Value

# Losses are the machine's doing (OOM kills, power cuts), but a step that is the reason for them must not repeat for
# ever.
MAX_LOSSES = 3


class Difference(Value):
    """The first line of a log that the rules would not have written."""

    __slots__ = ()
    seq: int
    expected: str
    found: str

    def __str__(self) -> str:
        return f"line {self.seq}: expected {self.expected}, found {self.found}"


def next_decision(run: Run) -> Decision | None:
    """What follows from the state as it is, or None when the next move is the world's."""
    if run.due:
        record = run.steps[run.due[0]]
        if record.state is RUNNING:
            return _settle(run, record)
        if run.is_stopping:
            return _cancelled(run, record)
        if record.blocked_by is not None:
            return StepSkipped(record.step.id, run.cause, record.blocked_by)
        return StepReady(record.step.id, run.cause)
    if run.unfinished == 0 and not run.is_over:
        return _finished(run)
    return None


def _settle(run: Run, record: StepRecord) -> Decision:
    """The end of a RUNNING step's attempt."""
    outcome = record.outcome
    if run.is_stopping:
        return _cancelled(run, record)
    if record.timed_out_ms is not None:
        return _failed(run, record, "timeout")
    if isinstance(outcome, AttemptLost):
        return _lost(run, record, "lost")
    if isinstance(outcome, AttemptNotStarted):
        if outcome.why == "never_began":
            return _lost(run, record, "never_began")
        return _failed(run, record, "not_started")
    assert isinstance(outcome, AttemptExited)
    if outcome.exit_code == 0:
        return StepSucceeded(record.step.id, run.cause)
    return _failed(run, record, "exit")


def _failed(run: Run, record: StepRecord, reason: str) -> Decision:
    if record.failures >= record.step.retries:
        return StepFailed(record.step.id, run.cause, reason)
    draw_ppm = getattr(record.outcome, "draw_ppm", None) or 0
    delay_ms = record.step.backoff.delay_ms(record.failures + 1, draw_ppm)
    return StepRetried(record.step.id, run.cause, reason, delay_ms)


def _lost(run: Run, record: StepRecord, reason: str) -> Decision:
    if record.losses >= MAX_LOSSES or (reason == "lost" and record.step.on_lost == "fail"):
        return StepFailed(record.step.id, run.cause, reason)
    return StepRetried(record.step.id, run.cause, reason, 0)


def _cancelled(run: Run, record: StepRecord) -> Decision:
    reason = "cancel" if run.state is RunState.CANCELLING else "run_timeout"
    return StepCancelled(record.step.id, run.cause, reason)


def _finished(run: Run) -> Decision:
    if run.state is RunState.CANCELLING:
        return RunFinished(run.cause, RunState.CANCELLED.value, "cancel")
    if run.timed_out:
        return RunFinished(run.cause, RunState.FAILED.value, "run_timeout")
    if run.failed:
        return RunFinished(run.cause, RunState.FAILED.value, "steps_failed")
    return RunFinished(run.cause, RunState.SUCCEEDED.value, "")


def check(run: Run, line: Line) -> Difference | None:
    """Would the rules have allowed this line to follow? Asked before it is applied."""
    expected = next_decision(run)
    event = line.event
    if isinstance(event, Decision) or (expected is not None and not isinstance(event, LogRecovered)):
        if event == expected:
            return None
        wanted = "no decision (a fact, a choice or the end)" if expected is None else describe(expected)
        return Difference(line.seq, wanted, describe(event))
    problem = _illegal_choice(run, line) if isinstance(event, Choice) else _illegal_fact(run, line)
    return Difference(line.seq, problem, describe(event)) if problem else None


def _illegal_choice(run: Run, line: Line) -> str | None:
    event = line.event
    assert isinstance(event, StepStarted)
    index = run.index_of.get(event.step)
    record = None if index is None else run.steps[index]
    if record is None or record.state is not READY:
        return "a step that is READY"
    # No start after a cancel needs no rule here: then no step is READY once what is owed has been decided.
    if line.mono_ms < record.not_before_ms:
        return f"no start before mono_ms {record.not_before_ms}, when the back-off ends"
    if not run.has_free_slot():
        return f"no start while max_parallel = {run.workflow.max_parallel} steps are running"
    return None


def _illegal_fact(run: Run, line: Line) -> str | None:
    event = line.event
    if isinstance(event, RunTimedOut):
        deadline_ms = run.deadline_ms()
        if deadline_ms is None or line.mono_ms < deadline_ms:
            return f"no timeout of the run before mono_ms {deadline_ms}"
    index = run.index_of.get(getattr(event, "step", ""))
    if index is None:
        return None
    record = run.steps[index]
    if isinstance(event, AttemptTimedOut):
        deadline_ms = run.attempt_deadline_ms(record)
        if deadline_ms is None or line.mono_ms < deadline_ms:
            return f"no timeout of the attempt before mono_ms {deadline_ms}"
    if isinstance(event, (AttemptExited, AttemptNotStarted)):
        has_jitter = record.step.backoff.jitter_permille > 0
        if has_jitter != (event.draw_ppm is not None) or (event.draw_ppm or 0) >= DRAW_PPM:
            return f"draw_ppm {'from 0 to 999999' if has_jitter else 'absent (no jitter)'}"
    return None


def replay(lines: Iterable[Line]) -> tuple[Run, Difference | None]:
    """Fold a log from its first line, regenerating every decision and checking every choice.

    Returns the state and None, or the state before the first difference and that difference. A log may end in the
    middle of the decisions that follow a fact: whoever resumes it writes log_recovered and the rest.
    Raises Impossible when there is no line, or the first is not run_submitted.
    """
    run: Run | None = None
    for line in lines:
        if run is None:
            run = Run(line)
            continue
        difference = check(run, line)
        if difference is not None:
            return run, difference
        try:
            run.apply(line)
        except Impossible as error:
            return run, Difference(line.seq, "an event that can follow", f"{describe(line.event)}: {error}")
    if run is None:
        raise Impossible("the log is empty")
    return run, None


def describe(event: Event) -> str:
    """An event in one phrase: `step_retried step=b cause=7 reason=exit delay_ms=1000`."""
    parts = [event.name]
    for name, value in zip(event._fields, event, strict=True):
        if value is not None and name != "workflow":
            parts.append(f"{name}={value}")
    return " ".join(parts)
