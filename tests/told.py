"""What clients were told, kept where no fault of the test can reach it, and compared with what a home still holds.

Rules
* An answer is a promise. What the clients have received is noted here, also when its daemon was dead by then; what
  they have only asked for is not.
* A home keeps its promises when each of these is true of the durable lines of its logs:
    a submission    the run is there, with that definition and that environment
    a cancel, a retry that was carried out    its request is in the log
    a watched line  is in the log at its seq, byte for byte
    a status        is what the log tells up to the status' last_seq
    any other state is that of some beginning of the log, and no earlier one than was told before
* Steps that say so (`RAN`) note each of their executions outside of the home. Every execution is of an attempt that the
  log knows (P2), and none was executed twice (P1, P4); that nothing starts after it has SUCCEEDED is what replay checks.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from wfd import definition, journal, requests
from wfd.events import Line, RunCancelRequested, RunRetried, StepStarted
from wfd.journal import Damaged
from wfd.paths import Home
from wfd.state import Impossible, Run

# Shell text that notes an execution, for steps whose environment has the directory as WFD_TEST_RAN.
RAN = 'echo "$WFD_STEP_ID $WFD_ATTEMPT" >> "$WFD_TEST_RAN/$WFD_RUN_ID"; '


@dataclass(slots=True)
class ToldRun:
    """What clients were told of one run.

    submission  the params of its submit                        requests   cancels and retries that were carried out
    states      and what was known of the log when it was asked for      known_seq  the last line that anybody was told of
    """

    submission: dict[str, Any]
    lines: dict[int, bytes] = field(default_factory=dict)
    statuses: list[dict[str, Any]] = field(default_factory=list)
    states: list[tuple[str, int]] = field(default_factory=list)
    requests: set[str] = field(default_factory=set)
    known_seq: int = 1


class Told:
    """What all clients of a home were told. Many threads may note; `count` is how often they did, and whoever notes calls
    `on_note` at once, with the method that told it
    ("event": a new line, to a watcher)."""

    def __init__(self) -> None:
        self.runs: dict[str, ToldRun] = {}
        self.contradictions: list[str] = []
        self.count = 0
        self.on_note: Callable[[str], None] = lambda method: None
        self._lock = threading.Lock()

    def submitted(self, submission: dict[str, Any], answer: dict[str, Any]) -> None:
        run = self.runs.setdefault(answer["run_id"], ToldRun(submission))
        run.states.append((answer["state"], 1))
        self._note("submit")

    def cancelled(self, request: str, answer: dict[str, Any], known_seq: int) -> None:
        """known_seq: of the run, when the cancel was sent. One that came when the run was over has changed nothing."""
        if answer["state"] in ("CANCELLING", "CANCELLED"):
            self.runs[answer["run_id"]].requests.add(request)
        self._state("cancel", answer, known_seq)

    def retried(self, request: str, answer: dict[str, Any], known_seq: int) -> None:
        self.runs[answer["run_id"]].requests.add(request)
        self._state("retry", answer, known_seq)

    def _state(self, method: str, answer: dict[str, Any], known_seq: int) -> None:
        self.runs[answer["run_id"]].states.append((answer["state"], known_seq))
        self._note(method)

    def status(self, answer: dict[str, Any]) -> None:
        run = self.runs[answer["run_id"]]
        run.statuses.append(answer)
        run.known_seq = max(run.known_seq, answer["last_seq"])
        self._note("status")

    def watched(self, run_id: str, seq: int, raw: bytes, is_new: bool) -> None:
        """A line, without its newline. is_new: it was written after the watch had begun."""
        run = self.runs[run_id]
        if run.lines.setdefault(seq, raw) != raw:
            self.contradictions.append(f"line {seq} of run {run_id} was shown in two ways: {run.lines[seq]!r}, {raw!r}")
        run.known_seq = max(run.known_seq, seq)
        self._note("event" if is_new else "watch")

    def _note(self, method: str) -> None:
        with self._lock:
            self.count += 1
        self.on_note(method)


# -- is it kept? -------------------------------------------------------------------------------------------------------


def broken_promises(told: Told, home: Home, ran: str) -> list[str]:
    """What clients were told and the home does not hold, and executions that it knows nothing of. ran: WFD_TEST_RAN."""
    problems = list(told.contradictions)
    for run_id, run in told.runs.items():
        try:
            problems += [f"run {run_id}: {problem}" for problem in _of_run(run, home, run_id)]
        except FileNotFoundError as error:
            problems.append(f"run {run_id} was acknowledged and is gone: {error.filename}")
        except (Damaged, Impossible) as error:
            problems.append(str(error))
    return problems + list(_unknown_executions(home, ran))


def _of_run(told: ToldRun, home: Home, run_id: str) -> Iterator[str]:
    files = home.run(run_id)
    submission = told.submission
    if journal.submitted(files, run_id).workflow != definition.validate(submission["definition"], submission["base_dir"]):
        yield "it has another definition than was submitted"
    if requests.load_environment(files, run_id) != requests.parse_environment(submission["environment"]):
        yield "it has another environment than was submitted"
    lines, raw = read(home, run_id)
    for seq, shown in sorted(told.lines.items()):
        if seq > len(raw) or raw[seq - 1] != shown:
            yield f"line {seq} was shown and is {'another one' if seq <= len(raw) else 'gone'}: {shown.decode()}"
    kept = {line.event.request for line in lines if isinstance(line.event, (RunCancelRequested, RunRetried))}
    for request in sorted(told.requests - kept):
        yield f"request {request} was acknowledged and is not in the log"
    yield from _wrong_states(told, lines)


def read(home: Home, run_id: str) -> tuple[list[Line], list[bytes]]:
    """The good lines of a log, and their bytes without newlines. Raises FileNotFoundError, Damaged."""
    with journal.open_log(home.run(run_id), run_id) as file:
        reading = journal.Reading(file, run_id)
        lines = list(reading)
        file.seek(0)
        return lines, file.read(reading.end).split(b"\n")[:-1]


def _wrong_states(told: ToldRun, lines: list[Line]) -> Iterator[str]:
    run, states, described = Run(lines[0]), [""], {}
    wanted = {status["last_seq"] for status in told.statuses}
    for line in lines:
        if line.seq > 1:
            run.apply(line)
        states.append(run.state.value)
        if line.seq in wanted:
            described[line.seq] = run.describe()
    for status in told.statuses:
        seq = status["last_seq"]
        if described.get(seq) != {name: value for name, value in status.items() if name not in ("source", "stalled")}:
            yield f"status told of line {seq} what the log does not: {status}, not {described.get(seq)}"
    for state, known_seq in told.states:
        if state not in states[known_seq:]:
            yield f"it was told to be {state}, when line {known_seq} was known, and never was"


def _unknown_executions(home: Home, ran: str) -> Iterator[str]:
    for run_id in sorted(os.listdir(ran)):
        with open(f"{ran}/{run_id}", encoding="utf-8") as file:
            executed = Counter(tuple(line.split()) for line in file)
        try:
            lines, _ = read(home, run_id)
        except (FileNotFoundError, Damaged) as error:
            yield f"run {run_id} was executed, but {error}"
            continue
        started = {(line.event.step, str(line.event.attempt)) for line in lines if isinstance(line.event, StepStarted)}
        for (step, attempt), count in executed.items():
            if (step, attempt) not in started:
                yield f"run {run_id}: attempt {attempt} of step {step} was executed, and the log does not know it"
            if count > 1:
                yield f"run {run_id}: attempt {attempt} of step {step} was executed {count} times"

