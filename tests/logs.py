"""A log for a test: a run driven by facts, and the lines that it leaves.

`Log` does what the daemon does with a run, without its processes: it writes facts and choices, asks decide.py what
follows, applies each line and keeps it. The clock is an attribute, the outcomes are the test's. What it makes is the
real thing, byte for byte: `data` is the file, and `save` puts it where a run lies on disk.
"""

from __future__ import annotations

import os
import random
import stat
import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from wfd import decide, definition, events
from wfd.definition import Workflow
from wfd.events import (
    DRAW_PPM,
    FORMAT,
    RULES,
    AttemptExited,
    AttemptLost,
    AttemptNotStarted,
    AttemptTimedOut,
    Decision,
    Event,
    Line,
    LogRecovered,
    RunCancelRequested,
    RunFinished,
    RunRetried,
    RunSubmitted,
    RunTimedOut,
    StepCancelled,
    StepReady,
    StepSkipped,
    StepStarted,
    SupervisorStarted,
)
from wfd.paths import Home, RunFiles
from wfd.state import READY, Run, RunState

AT = "2026-11-23T07:24:12.123456Z"


def step(id: str, *depends_on: str, **fields: object) -> dict[str, object]:
    """A step as a user writes it."""
    return {"id": id, "command": "true", "depends_on": list(depends_on), **fields}


def workflow(*steps: dict[str, object], **fields: object) -> Workflow:
    """A workflow of such steps, or of the single step `a`."""
    return definition.validate({"workflow_id": "w", "steps": list(steps) or [step("a")], **fields}, "/base")


def diamond(**fields: object) -> Workflow:
    """a, then b and c, then d."""
    return workflow(step("a"), step("b", "a"), step("c", "a"), step("d", "b", "c"), **fields)


def session(boot_id: str = "boot-1") -> SupervisorStarted:
    return SupervisorStarted(FORMAT, RULES, "0.1.0", boot_id, "host")


class Log:
    """A run and its lines so far. A batch is a fact or choice with what follows from it, unless `batch` says more."""

    def __init__(self, workflow: Workflow, run_id: str = "r1") -> None:
        self.run_id = run_id
        self.now_ms = 1_000
        self.durable = 0
        self.lines: list[Line] = []
        first = Line(1, AT, self.now_ms, 0, RunSubmitted(run_id, FORMAT, RULES, "boot-1", "/base", workflow))
        self.run = Run(first)
        self.lines.append(first)
        self.durable = 1
        self.decide()
        self.durable = self.run.seq

    @property
    def data(self) -> bytes:
        return encode(self.lines, self.run_id)

    def put(self, event: Event) -> Line:
        """One more line, and nothing else."""
        line = Line(self.run.seq + 1, AT, self.now_ms, self.durable, event)
        self.run.apply(line)
        self.lines.append(line)
        return line

    def decide(self) -> None:
        """All decisions that are owed."""
        while (decision := decide.next_decision(self.run)) is not None:
            self.put(decision)

    def write(self, *batch: Event) -> Log:
        """Facts and choices, each with all that follows from it, as one batch."""
        for event in batch:
            self.put(event)
            self.decide()
        self.durable = self.run.seq
        return self

    def start(self, *ids: str) -> Log:
        for id in ids:
            self.write(StepStarted(id, self.record(id).attempt + 1))
        return self

    def exit(self, id: str, exit_code: int | None, draw_ppm: int | None = None) -> Log:
        return self.write(AttemptExited(id, self.record(id).attempt, exit_code, draw_ppm))

    def lose(self, id: str, why: str = "killed") -> Log:
        return self.write(AttemptLost(id, self.record(id).attempt, why))

    def not_started(self, id: str, why: str, draw_ppm: int | None = None) -> Log:
        return self.write(AttemptNotStarted(id, self.record(id).attempt, why, "detail", draw_ppm))

    def time_out(self, id: str) -> Log:
        return self.write(AttemptTimedOut(id, self.record(id).attempt))

    def cancel(self) -> Log:
        return self.write(RunCancelRequested("request-1"))

    def record(self, id: str) -> Any:
        """The record of a step, by its id."""
        return self.run.steps[self.run.index_of[id]]

    def states(self) -> dict[str, str]:
        """The state of each step, in words."""
        return {record.step.id: record.state.value for record in self.run.steps}


def complete(workflow: Workflow, exit_codes: dict[str, Sequence[int]] | None = None, run_id: str = "r1") -> Log:
    """A whole run: what is ready starts, each attempt ends with the next of its step's exit codes, at last with 0."""
    log = Log(workflow, run_id)
    left = {id: list(codes) for id, codes in (exit_codes or {}).items()}
    while not log.run.is_over:
        index = log.run.startable(log.now_ms) if log.run.has_free_slot() else None
        if index is not None:
            log.start(log.run.steps[index].step.id)
        elif log.run.running:
            record = log.run.steps[next(iter(log.run.running))]
            codes = left.get(record.step.id)
            log.exit(record.step.id, codes.pop(0) if codes else 0, _drawn(record.step, random.Random(0)))
        else:
            log.now_ms = min(record.not_before_ms for record in log.run.steps if record.state is READY)
    return log


def _drawn(step: definition.Step, chance: random.Random) -> int | None:
    return chance.randrange(DRAW_PPM) if step.backoff.jitter_permille else None


# -- random runs -------------------------------------------------------------------------------------------------------


def random_workflow(chance: random.Random) -> Workflow:
    """A few steps with everything that a definition can say about when they run."""
    steps: list[dict[str, object]] = []
    for number in range(chance.randint(1, 9)):
        known = [str(earlier["id"]) for earlier in steps]
        fields: dict[str, object] = {"retries": chance.randint(0, 2), "on_lost": chance.choice(["retry", "fail"])}
        if chance.random() < 0.4:
            fields["timeout_sec"] = chance.choice([0.5, 2, 30])
        if chance.random() < 0.5:
            fields["backoff"] = {"initial_sec": chance.choice([0, 1, 2]), "jitter": chance.choice([0, 0.5, 1])}
        steps.append(step(f"s{number}", *chance.sample(known, chance.randint(0, min(3, len(known)))), **fields))
    # The user's order says nothing about the order of execution.
    chance.shuffle(steps)
    limits: dict[str, object] = {}
    if chance.random() < 0.5:
        limits["max_parallel"] = chance.randint(1, 3)
    if chance.random() < 0.3:
        limits["timeout_sec"] = chance.choice([3, 60])
    return workflow(*steps, **limits)


def random_walk(seed: int, turns: int = 400) -> Log:
    """A run to which anything happens that can. The same seed makes the same log."""
    chance = random.Random(seed)
    log = Log(random_workflow(chance))
    for _ in range(turns):
        if log.run.is_over and (log.run.state is RunState.SUCCEEDED or chance.random() < 0.6):
            break
        log.now_ms += chance.choice([0, 1, 50, 700, 5_000])
        moves = list(_moves(log, chance))
        if moves:
            chance.choice(moves)()
    return log


def _moves(log: Log, chance: random.Random) -> Iterable[Callable[[], object]]:
    """What may happen next. The ordinary is offered more often than the rare."""
    run = log.run
    if run.is_over:
        yield lambda: log.write(RunRetried(f"again-{run.seq}"))
        return
    index = run.startable(log.now_ms)
    if index is not None and run.has_free_slot() and not run.is_stopping:
        for _ in range(4):
            yield lambda: log.start(run.steps[index].step.id)
    for record in [run.steps[index] for index in run.running]:
        yield from _ends(log, chance, record)
    deadline_ms = run.deadline_ms()
    if deadline_ms is not None and log.now_ms >= deadline_ms:
        yield lambda: log.write(RunTimedOut())
    if run.state is RunState.RUNNING and chance.random() < 0.04:
        yield log.cancel
    if chance.random() < 0.1:
        yield lambda: log.write(session())
    if chance.random() < 0.05:
        yield lambda: reboot(log, chance)


def _ends(log: Log, chance: random.Random, record: Any) -> Iterable[Callable[[], object]]:
    id, draw_ppm = record.step.id, _drawn(record.step, chance)
    deadline_ms = log.run.attempt_deadline_ms(record)
    if deadline_ms is not None and log.now_ms >= deadline_ms:
        yield lambda: log.time_out(id)
    for _ in range(3):
        yield lambda: log.exit(id, 0, draw_ppm)
    yield lambda: log.exit(id, chance.choice([1, 2, 127, 143]), draw_ppm)
    yield lambda: log.lose(id)
    yield lambda: log.not_started(id, chance.choice(["never_began", "cwd", "exec"]), draw_ppm)
    if log.run.ending_since_ms(record) is not None:
        yield lambda: log.exit(id, None, draw_ppm)
        yield lambda: log.not_started(id, "stopped", draw_ppm)


def reboot(log: Log, chance: random.Random) -> None:
    """The machine goes down in the middle of a batch, and comes up with another clock."""
    run, now_ms = log.run, chance.randrange(5_000)
    if run.running and chance.random() < 0.5:
        record = run.steps[next(iter(run.running))]
        log.put(AttemptExited(record.step.id, record.attempt, 0, _drawn(record.step, chance)))
        log.now_ms = now_ms
        log.write(LogRecovered(17, "torn-1-00000000"))
    log.now_ms = now_ms
    if not run.is_over:
        log.write(session(f"boot-after-{run.seq}"))


def check_promises(lines: Sequence[Line]) -> None:
    """P4, P5 and P6, told from the lines alone, without state.py. Raises AssertionError."""
    first = lines[0].event
    assert isinstance(first, RunSubmitted)
    depends_on = {step.id: set(step.depends_on) for step in first.workflow.steps}
    state = dict.fromkeys(depends_on, "PENDING")
    attempts = dict.fromkeys(depends_on, 0)
    is_stopped = False
    for line in lines[1:]:
        event = line.event
        if isinstance(event, StepStarted):
            assert state[event.step] == "PENDING", f"line {line.seq}: one live attempt of a step at most"
            assert event.attempt == attempts[event.step] + 1, f"line {line.seq}: attempts without gaps"
            assert not is_stopped, f"line {line.seq}: nothing starts after a cancel or the run's timeout"
            assert all(state[id] == "SUCCEEDED" for id in depends_on[event.step]), f"line {line.seq}: dependencies first"
            state[event.step], attempts[event.step] = "RUNNING", event.attempt
        elif isinstance(event, (RunCancelRequested, RunTimedOut)):
            is_stopped = True
        elif isinstance(event, RunRetried):
            is_stopped = False
            state = {id: now if now == "SUCCEEDED" else "PENDING" for id, now in state.items()}
        elif isinstance(event, StepSkipped):
            assert event.because in depends_on[event.step], f"line {line.seq}: skipped because of a dependency"
            assert state[event.because] in ("FAILED", "SKIPPED"), f"line {line.seq}: skipped because of its end"
            state[event.step] = "SKIPPED"
        elif isinstance(event, StepCancelled):
            assert is_stopped, f"line {line.seq}: cancelled by a cancel or the run's timeout"
            state[event.step] = "CANCELLED"
        elif isinstance(event, RunFinished):
            assert not {"PENDING", "RUNNING"} & set(state.values()), f"line {line.seq}: all steps first"
            blocked = {id for id in state if any(state[name] in ("FAILED", "SKIPPED") for name in depends_on[id])}
            assert all(state[id] in ("SKIPPED", "CANCELLED") for id in blocked), f"line {line.seq}: skipped if blocked"
        elif isinstance(event, Decision) and not isinstance(event, StepReady):
            step = event.step  # type: ignore[attr-defined]
            assert state[step] == "RUNNING", f"line {line.seq}: only what runs ends"
            after = {"step_succeeded": "SUCCEEDED", "step_failed": "FAILED", "step_retried": "PENDING"}
            state[step] = after[event.name]


# -- lines and files ---------------------------------------------------------------------------------------------------


def encode(lines: Iterable[Line], run_id: str = "r1") -> bytes:
    seed = events.seed(run_id)
    return b"".join(events.encode(line, seed) for line in lines)


def resealed(raw: bytes, run_id: str = "r1") -> bytes:
    """A changed line with its checksum made right again."""
    body = raw[: -len(b'01234567"}\n')]
    return body + b'%08x"}\n' % zlib.crc32(body, events.seed(run_id))


def line_ends(data: bytes) -> list[int]:
    """The offset behind each line."""
    return [place + 1 for place, byte in enumerate(data) if byte == 0x0A]


def cuts(data: bytes) -> list[int]:
    """Where to cut a log behind line 1: at every end of a line and next to it, and in the middle of every line. For what is
    too slow to be done at every byte; that a reader takes all cuts in a line alike, test_journal shows at every byte."""
    ends = line_ends(data)
    places = {end + by for end in ends for by in (-1, 0, 1)} | {(one + next) // 2 for one, next in pairwise(ends)}
    return sorted(place for place in places if ends[0] <= place <= len(data))


def renumbered(lines: Iterable[Line]) -> list[Line]:
    """These lines as a log of their own, each durable before the next. Causes stay as they are."""
    return [line._replace(seq=seq, durable=seq - 1) for seq, line in enumerate(lines, 1)]


def variants(decision: Decision, run: Run) -> Iterable[Decision]:
    """All that differ from a decision in one field."""
    others = [id for id in run.index_of if id != getattr(decision, "step", id)]
    words = {"step": others, "cause": [decision.cause - 1, decision.cause + 1],  # type: ignore[attr-defined]
             "reason": ["exit", "timeout", "cancel", "run_timeout", "lost", "x"], "because": others,
             "state": [state.value for state in RunState], "delay_ms": [0, 1, 1_000, 60_001]}  # fmt: skip
    for name, values in words.items():
        if hasattr(decision, name):
            for value in values:
                if value != getattr(decision, name):
                    yield decision._replace(**{name: value})


def contents(directory: str) -> dict[str, bytes | None]:
    """All that is below a directory, plain files with their bytes."""
    paths = sorted(Path(directory).rglob("*"))
    plain = {path for path in paths if stat.S_ISREG(path.lstat().st_mode)}
    return {str(path.relative_to(directory)): path.read_bytes() if path in plain else None for path in paths}


def home(directory: str) -> Home:
    """A home with the directories that the daemon makes at its start."""
    place = Home(directory)
    os.mkdir(place.live, 0o700)
    os.mkdir(place.runs, 0o700)
    return place


def save(place: Home, data: bytes, run_id: str = "r1") -> RunFiles:
    """A run on disk with these bytes as its log."""
    files = place.run(run_id)
    os.makedirs(files.attempts, 0o700)
    with open(files.events, "wb") as file:
        file.write(data)
    return files


