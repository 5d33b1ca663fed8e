"""The vocabulary of the event log: one frozen dataclass an event, to and from a line.

A log is a file of lines, each a JSON object that ends in its own checksum:

    {"seq":4,"at":"2026-11-23T07:24:12.123456Z","mono_ms":812,"durable":3,"event":"step_started",…,"crc":"1a2b3c4d"}

Rules
* An event is a *fact* (what the world did), a *choice* (which ready step got a slot) or a *decision* (what follows from
  the facts). Only decisions name a `cause`: the seq of the fact that they follow from. Replay regenerates them.
* Words, never numbers, for states; past tense for events; units last; integers only; a field that is None is left out.
* `crc` is crc32 of all bytes of the line before its eight digits, seeded with crc32 of the run id, so that a line moved
  over from another run fails. The digits are compared as bytes: parsing hex would let an upper-case flip pass.
* `durable` is the last seq that was known to be on disk when the line was written (the torn-tail rule in journal.py
  rests on it).

This file does no I/O and reads no clock.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, compress, product
from operator import itemgetter
from typing import ClassVar, NamedTuple

from wfd import definition
from wfd.definition import Workflow

# The shape of the lines. A log with a higher number was written by a newer program and is refused by name.
FORMAT = 1
# The version of the rules in decide.py. Logs of older rules stay replayable; newer ones are refused by name.
RULES = 1

# Where a jitter draw ends: 0 <= draw_ppm < 1,000,000.
DRAW_PPM = 1_000_000

_CRC_DIGITS = 8
_CRC_KEY = b',"crc":"'
_CRC_END = b'"}'


class InvalidEvent(ValueError):
    """A line whose checksum is right but whose content is not an event of this vocabulary."""


class Event:
    """What all events share: the word on disk that names them."""

    __slots__ = ()
    name: ClassVar[str]


class Fact(Event):
    """Something the world did. Nothing regenerates it."""

    __slots__ = ()


class Choice(Event):
    """Something that could lawfully have gone otherwise: replay checks that it was allowed."""

    __slots__ = ()


class Decision(Event):
    """Something that follows from what is before it: replay regenerates and compares it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class RunSubmitted(Fact):
    """Always line 1. It carries the whole normalised definition, so that a log explains itself."""

    name = "run_submitted"
    run_id: str
    format: int
    rules: int
    boot_id: str
    cwd: str
    workflow: Workflow


@dataclass(frozen=True, slots=True)
class RunCancelRequested(Fact):
    """Somebody asked to cancel; `request` is the client's id of that request, so that repeating it changes nothing."""

    name = "run_cancel_requested"
    request: str


@dataclass(frozen=True, slots=True)
class RunRetried(Fact):
    """A person asked for another try of what failed, was skipped or was cancelled in a finished run."""

    name = "run_retried"
    request: str


@dataclass(frozen=True, slots=True)
class RunTimedOut(Fact):
    """The run's own timeout passed (awake time)."""

    name = "run_timed_out"


@dataclass(frozen=True, slots=True)
class AttemptExited(Fact):
    """An attempt is over: its lock is free and its process group is empty.

    exit_code  the shell's status of the command (128 + n when signal n ended it); None when the attempt was ended by us
               (after a timeout or a cancel) so hard that no status was left: then the timeout or cancel decides alone.
    draw_ppm   the jitter drawn for the back-off that may follow, 0 <= draw < 1,000,000; None when the step has none.
    user_ms, system_ms, peak_rss_kib   from wait4; None when the attempt was adopted, since only a parent is told.
    """

    name = "attempt_exited"
    step: str
    attempt: int
    exit_code: int | None = None
    draw_ppm: int | None = None
    user_ms: int | None = None
    system_ms: int | None = None
    peak_rss_kib: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptTimedOut(Fact):
    """The step's timeout passed while this attempt ran. Its end follows as attempt_exited."""

    name = "attempt_timed_out"
    step: str
    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptLost(Fact):
    """Nobody can know how the attempt ended: `why` is "killed" (same boot, no exit status) or "rebooted"."""

    name = "attempt_lost"
    step: str
    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class AttemptNotStarted(Fact):
    """The command certainly never ran.

    why  "never_began" (the shim died first; tried again without using a retry, bounded), "stopped" (a cancel or timeout
         came first), "cwd" (the working directory is not there), "exec" (the system refused; `detail` says how).
    """

    name = "attempt_not_started"
    step: str
    attempt: int
    why: str
    detail: str
    draw_ppm: int | None = None


@dataclass(frozen=True, slots=True)
class SupervisorStarted(Fact):
    """A daemon session took the run over. A new `boot_id` makes earlier mono_ms values incomparable."""

    name = "supervisor_started"
    format: int
    rules: int
    version: str
    boot_id: str
    host: str


@dataclass(frozen=True, slots=True)
class LogRecovered(Fact):
    """A torn tail of `dropped_bytes` was cut off (and kept in the file `kept_as`), or decisions were found missing."""

    name = "log_recovered"
    dropped_bytes: int
    kept_as: str | None = None


@dataclass(frozen=True, slots=True)
class StepStarted(Choice):
    """The step got a slot for this attempt. Written before anything of the attempt exists."""

    name = "step_started"
    step: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepReady(Decision):
    """All dependencies succeeded."""

    name = "step_ready"
    step: str
    cause: int


@dataclass(frozen=True, slots=True)
class StepSucceeded(Decision):
    """The attempt exited 0."""

    name = "step_succeeded"
    step: str
    cause: int


@dataclass(frozen=True, slots=True)
class StepFailed(Decision):
    """No try is left. reason: "exit", "timeout", "lost", "never_began", "not_started"."""

    name = "step_failed"
    step: str
    cause: int
    reason: str


@dataclass(frozen=True, slots=True)
class StepRetried(Decision):
    """READY again, not before `delay_ms` of awake time have passed. reason as in step_failed."""

    name = "step_retried"
    step: str
    cause: int
    reason: str
    delay_ms: int


@dataclass(frozen=True, slots=True)
class StepSkipped(Decision):
    """`because` names the dependency that was FAILED or SKIPPED."""

    name = "step_skipped"
    step: str
    cause: int
    because: str


@dataclass(frozen=True, slots=True)
class StepCancelled(Decision):
    """reason: "cancel" (a person) or "run_timeout"."""

    name = "step_cancelled"
    step: str
    cause: int
    reason: str


@dataclass(frozen=True, slots=True)
class RunFinished(Decision):
    """All steps are in an end state.

    state: SUCCEEDED, FAILED or CANCELLED; reason: "", "steps_failed", "run_timeout", "cancel"."""

    name = "run_finished"
    cause: int
    state: str
    reason: str


class Line(NamedTuple):
    """One line of a log: the envelope, and the event in it.

    at: RFC 3339 UTC, for people only. mono_ms: the monotonic clock of the boot, in milliseconds."""

    seq: int
    at: str
    mono_ms: int
    durable: int
    event: Event


_EVENTS: tuple[type[Event], ...] = (
    RunSubmitted, RunCancelRequested, RunRetried, RunTimedOut,
    AttemptExited, AttemptTimedOut, AttemptLost, AttemptNotStarted, SupervisorStarted, LogRecovered,
    StepStarted,
    StepReady, StepSucceeded, StepFailed, StepRetried, StepSkipped, StepCancelled, RunFinished,
)  # fmt: skip

_BY_NAME: dict[str, type[Event]] = {event.name: event for event in _EVENTS}
_FIELDS: dict[type[Event], tuple[str, ...]] = {event: tuple(f.name for f in fields(event)) for event in _EVENTS}  # type: ignore[arg-type]
# What each field must hold, read off the annotations once: `int…`, `str…` or `Workflow`, which is an object on disk.
_TYPES: dict[type[Event], dict[str, type]] = {
    event: {f.name: {"i": int, "s": str, "W": dict}[str(f.type)[0]] for f in fields(event)}  # type: ignore[arg-type]
    for event in _EVENTS
}
_OPTIONAL: dict[type[Event], frozenset[str]] = {
    event: frozenset(f.name for f in fields(event) if f.default is None)  # type: ignore[arg-type]
    for event in _EVENTS
}
_ENVELOPE: dict[str, type] = {"seq": int, "at": str, "mono_ms": int, "durable": int, "event": str}


class _Shape(NamedTuple):
    """One of the forms that the lines of an event may have: each optional field is there or it is not.

    types    of all values of the line, envelope and crc included
    numbers  picks the whole numbers out of them
    gaps     the places, among the event's fields, of those left out before others that are there
    """

    event: type[Event]
    types: tuple[type, ...]
    numbers: Callable[[Sequence[object]], tuple[int, ...]]
    gaps: tuple[int, ...]


def _shapes(event: type[Event]) -> Iterator[tuple[tuple[str, ...], _Shape]]:
    """All forms of an event's lines, by the event's name and the names on the line in their order."""
    choices = [(True, False) if name in _OPTIONAL[event] else (True,) for name in _FIELDS[event]]
    for is_there in product(*choices):
        names = tuple(compress(_FIELDS[event], is_there))
        types = (*_ENVELOPE.values(), *(_TYPES[event][name] for name in names), str)
        numbers = itemgetter(*(place for place, kind in enumerate(types) if kind is int))
        last = max((place for place, there in enumerate(is_there) if there), default=-1)
        gaps = tuple(place for place, there in enumerate(is_there[:last]) if not there)
        yield (event.name, *_ENVELOPE, *names, "crc"), _Shape(event, types, numbers, gaps)


# So the names, their order and their types cost one look-up and one comparison a line: reading logs is mostly this.
_SHAPES: dict[tuple[str, ...], _Shape] = dict(chain.from_iterable(map(_shapes, _EVENTS)))

_encode: Callable[[object], str] = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode
_parse = json.JSONDecoder().raw_decode


def seed(run_id: str) -> int:
    """The crc32 seed of a run's lines."""
    return zlib.crc32(run_id.encode())


def encode(line: Line, crc_seed: int) -> bytes:
    """The line's bytes, newline included."""
    seq, at, mono_ms, durable, event = line
    # Joined by hand: the encoder sets itself up anew for every object, and is quick only for a string. Half the time.
    text = f'{{"seq":{seq},"at":{_encode(at)},"mono_ms":{mono_ms},"durable":{durable},"event":"{event.name}"'
    for name in _FIELDS[type(event)]:
        value = getattr(event, name)
        if type(value) is int:
            text += f',"{name}":{value}'
        elif value is not None:
            text += f',"{name}":{_encode(definition.to_record(value) if name == "workflow" else value)}'
    body = text.encode("ascii") + _CRC_KEY
    return b"%b%08x%b\n" % (body, zlib.crc32(body, crc_seed), _CRC_END)


def checks(raw: bytes, crc_seed: int) -> bool:
    """Does the checksum of this line (without its newline) prove it?"""
    body = raw[: -_CRC_DIGITS - len(_CRC_END)]
    return (
        body.endswith(_CRC_KEY)
        and raw.endswith(_CRC_END)
        and raw[len(body) : -len(_CRC_END)] == b"%08x" % zlib.crc32(body, crc_seed)
    )


def decode(raw: bytes) -> Line:
    """The line in these bytes (without the newline), whose checksum the caller has checked.

    Raises InvalidEvent for what is no event of this vocabulary, its fields in their order; and, by name, for a log that
    a newer program wrote.
    """
    try:
        text = raw.decode("ascii")
        record, end = _parse(text)
    except (ValueError, RecursionError) as error:
        raise InvalidEvent(f"not JSON: {error}") from None
    if type(record) is not dict or end != len(text):
        raise InvalidEvent("not a JSON object")
    name = record.get("event")
    shape = _SHAPES.get((name, *record)) if type(name) is str else None
    values = tuple(record.values())
    if shape is None or tuple(map(type, values)) != shape.types or min(shape.numbers(values)) < 0:
        raise InvalidEvent(_flaw(record))
    seq, at, mono_ms, durable, _, *own, _ = values
    event = shape.event
    if event is RunSubmitted or event is SupervisorStarted:
        own = _checked(event, record)
    for place in shape.gaps:
        own.insert(place, None)
    return Line(seq, at, mono_ms, durable, event(*own))


def _checked(event: type[Event], record: dict[str, object]) -> list[object]:
    """The fields of the two events that carry versions, and of which one carries a definition."""
    if problem := _version_problem(record):
        raise InvalidEvent(problem)
    if event is RunSubmitted:
        try:
            record["workflow"] = definition.from_record(record["workflow"])
        except definition.DefinitionError as error:
            raise InvalidEvent(f"run_submitted: {error}") from None
    return [record[name] for name in _FIELDS[event]]


def _flaw(record: dict[str, object]) -> str:
    """What is wrong with a line that has none of the known shapes."""
    name = record.get("event")
    event = _BY_NAME.get(name) if type(name) is str else None
    if "event" in record and event is None:
        return f"unknown event {name!r}: was this log written by a newer version?"
    own = _TYPES[event] if event else {}
    # Before the fields: those of a newer format may well be others.
    if "format" in own and (problem := _version_problem(record)):
        return problem
    known = {**_ENVELOPE, **own, "crc": str}
    for name, kind in known.items():
        if name not in record and not (event and name in _OPTIONAL[event]):
            return f"{event.name if event else 'the line'}: the field {name!r} is missing"
        if name in record and type(record[name]) is not kind:
            return f"{event.name if event else 'the line'}: the field {name!r} is of the wrong type"
    for name, value in record.items():
        if name not in known:
            return f"{event.name if event else 'the line'}: the field {name!r} is unknown"
        if type(value) is int and value < 0:
            return f"{event.name if event else 'the line'}: the field {name!r} is negative"
    return f"{event.name if event else 'the line'}: the fields are not in their order"


def _version_problem(record: dict[str, object]) -> str:
    for name, ours in (("format", FORMAT), ("rules", RULES)):
        theirs = record.get(name)
        if type(theirs) is not int or theirs < 1:
            return f"{name} must be a whole number from 1 on"
        if theirs > ours:
            return f"log {name} {theirs} is newer than this program's {ours}: use a newer version of wfd"
    return ""
