"""The vocabulary of the event log: one kind of value an event, to and from a line.

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
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, product
from operator import itemgetter
from zlib import crc32

from wfd import definition
from wfd.definition import Workflow
from wfd.values import Value

# The shape of the lines. A log with a higher number was written by a newer program and is refused by name.
FORMAT = 1
# The version of the rules in decide.py. Logs of older rules stay replayable; newer ones are refused by name.
RULES = 1

# Where a jitter draw ends: 0 <= draw_ppm < 1,000,000.
DRAW_PPM = 1_000_000

# What every line ends in, and how many bytes of that the checksum does not cover.
_CRC_KEY, _CRC_END = ',"crc":"', b'%08x"}'
_CRC = _CRC_KEY.encode() + _CRC_END
_END_FROM, _CRC_FROM = -len(_CRC_END % 0), -len(_CRC % 0)


class InvalidEvent(ValueError):
    """A line whose checksum is right but whose content is not an event of this vocabulary."""


class NewerLog(InvalidEvent):
    """A line that a newer program wrote: nothing is wrong with it, only we are too old for it."""


class Event(Value):
    """What all events share: the word on disk that names them."""

    __slots__ = ()
    name = ""


class Fact(Event):
    """Something the world did. Nothing regenerates it."""

    __slots__ = ()


class Choice(Event):
    """Something that could lawfully have gone otherwise: replay checks that it was allowed."""

    __slots__ = ()


class Decision(Event):
    """Something that follows from what is before it: replay regenerates and compares it."""

    __slots__ = ()


class RunSubmitted(Fact):
    """Always line 1. It carries the whole normalised definition, so that a log explains itself."""

    __slots__ = ()
    name = "run_submitted"
    run_id: str
    format: int
    rules: int
    boot_id: str
    cwd: str
    workflow: Workflow


class RunCancelRequested(Fact):
    """Somebody asked to cancel; `request` is the client's id of that request, so that repeating it changes nothing."""

    __slots__ = ()
    name = "run_cancel_requested"
    request: str


class RunRetried(Fact):
    """A person asked for another try of what failed, was skipped or was cancelled in a finished run."""

    __slots__ = ()
    name = "run_retried"
    request: str


class RunTimedOut(Fact):
    """The run's own timeout passed (awake time)."""

    __slots__ = ()
    name = "run_timed_out"


class AttemptExited(Fact):
    """An attempt is over: its lock is free and its process group is empty.

    exit_code  the shell's status of the command (128 + n when signal n ended it); None when the attempt was ended by us
               (after a timeout or a cancel) so hard that no status was left: then the timeout or cancel decides alone.
    draw_ppm   the jitter drawn for the back-off that may follow, 0 <= draw < 1,000,000; None when the step has none.
    user_ms, system_ms, peak_rss_kib   from wait4; None when the attempt was adopted, since only a parent is told.
    """

    __slots__ = ()
    name = "attempt_exited"
    step: str
    attempt: int
    exit_code: int | None = None
    draw_ppm: int | None = None
    user_ms: int | None = None
    system_ms: int | None = None
    peak_rss_kib: int | None = None


class AttemptTimedOut(Fact):
    """The step's timeout passed while this attempt ran. Its end follows as attempt_exited."""

    __slots__ = ()
    name = "attempt_timed_out"
    step: str
    attempt: int


class AttemptLost(Fact):
    """Nobody can know how the attempt ended: `why` is "killed" (same boot, no exit status) or "rebooted"."""

    __slots__ = ()
    name = "attempt_lost"
    step: str
    attempt: int
    why: str


class AttemptNotStarted(Fact):
    """The command certainly never ran.

    why  "never_began" (the shim died first; tried again without using a retry, bounded), "stopped" (a cancel or timeout
         came first), "cwd" (the working directory is not there), "exec" (the system refused; `detail` says how).
    """

    __slots__ = ()
    name = "attempt_not_started"
    step: str
    attempt: int
    why: str
    detail: str
    draw_ppm: int | None = None


class SupervisorStarted(Fact):
    """A daemon session took the run over. A new `boot_id` makes earlier mono_ms values incomparable."""

    __slots__ = ()
    name = "supervisor_started"
    format: int
    rules: int
    version: str
    boot_id: str
    host: str


class LogRecovered(Fact):
    """A torn tail of `dropped_bytes` was cut off (and kept in the file `kept_as`), or decisions were found missing."""

    __slots__ = ()
    name = "log_recovered"
    dropped_bytes: int
    kept_as: str | None = None


class StepStarted(Choice):
    """The step got a slot for this attempt. Written before anything of the attempt exists."""

    __slots__ = ()
    name = "step_started"
    step: str
    attempt: int


class StepReady(Decision):
    """All dependencies succeeded."""

    __slots__ = ()
    name = "step_ready"
    step: str
    cause: int


class StepSucceeded(Decision):
    """The attempt exited 0."""

    __slots__ = ()
    name = "step_succeeded"
    step: str
    cause: int


class StepFailed(Decision):
    """No try is left. reason: "exit", "timeout", "lost", "never_began", "not_started"."""

    __slots__ = ()
    name = "step_failed"
    step: str
    cause: int
    reason: str


class StepRetried(Decision):
    """READY again, not before `delay_ms` of awake time have passed. reason as in step_failed."""

    __slots__ = ()
    name = "step_retried"
    step: str
    cause: int
    reason: str
    delay_ms: int


class StepSkipped(Decision):
    """`because` names the dependency that was FAILED or SKIPPED."""

    __slots__ = ()
    name = "step_skipped"
    step: str
    cause: int
    because: str


class StepCancelled(Decision):
    """reason: "cancel" (a person) or "run_timeout"."""

    __slots__ = ()
    name = "step_cancelled"
    step: str
    cause: int
    reason: str


class RunFinished(Decision):
    """All steps are in an end state.

    state: SUCCEEDED, FAILED or CANCELLED; reason: "", "steps_failed", "run_timeout", "cancel"."""

    __slots__ = ()
    name = "run_finished"
    cause: int
    state: str
    reason: str


class Line(Value):
    """One line of a log: the envelope, and the event in it.

    at: RFC 3339 UTC, for people only. mono_ms: the monotonic clock of the boot, in milliseconds."""

    __slots__ = ()
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
# What each field must hold, read off the annotations once: `int…`, `str…` or `Workflow`, which is an object on disk.
_TYPES: dict[type[Event], dict[str, type]] = {
    event: {name: {"i": int, "s": str, "W": dict}[kind[0]] for name, kind in event.__annotations__.items()}
    for event in _EVENTS
}
# Those that may be None are the last of their events, and are None when left out.
_OPTIONAL: dict[type[Event], frozenset[str]] = {
    event: frozenset(event._fields[len(event._fields) - len(event._defaults) :]) for event in _EVENTS
}
# Those that carry versions, and one of them a definition.
_CHECKED = (RunSubmitted, SupervisorStarted)
_ENVELOPE: dict[str, type] = {"seq": int, "at": str, "mono_ms": int, "durable": int, "event": str}


# One of the forms that the lines of an event may have: each optional field is there or it is not. The event; and of the
# line's values, envelope and crc included: their types, what picks the whole numbers, and what picks the event's fields,
# with None for those that are not there (itself None where a field must be looked into: see `_checked`).
_Shape = tuple[
    type[Event],
    tuple[type, ...],
    Callable[[Sequence[object]], tuple[int, ...]],
    Callable[[tuple[object, ...]], tuple[object, ...]] | None,
]


def _shapes(event: type[Event]) -> Iterator[tuple[tuple[str, ...], _Shape]]:
    """All forms of an event's lines, by the names on the line in their order."""
    choices = [(True, False) if name in _OPTIONAL[event] else (True,) for name in event._fields]
    for is_there in product(*choices):
        names = tuple(compress(event._fields, is_there))
        types = (*_ENVELOPE.values(), *(_TYPES[event][name] for name in names), str)
        numbers = itemgetter(*(place for place, kind in enumerate(types) if kind is int))
        own = itemgetter(slice(len(_ENVELOPE), -1)) if all(is_there) else _with_gaps(event, names)
        yield (*_ENVELOPE, *names, "crc"), (event, types, numbers, None if event in _CHECKED else own)


def _with_gaps(event: type[Event], names: Sequence[str]) -> Callable[[tuple[object, ...]], tuple[object, ...]]:
    # Whatever has gaps has two fields or more, so that itemgetter gives a tuple.
    own = itemgetter(*(len(_ENVELOPE) + names.index(name) if name in names else -1 for name in event._fields))
    return lambda values: own((*values, None))


# So the names, their order and their types cost two look-ups and one comparison a line: reading logs is mostly this.
_SHAPES: dict[str, dict[tuple[str, ...], _Shape]] = {event.name: dict(_shapes(event)) for event in _EVENTS}

_encode: Callable[[object], str] = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode
# `raw_decode` without the Python that is around it. Where there is no JSON it raises StopIteration.
_parse: Callable[[str, int], tuple[object, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_new = tuple.__new__
_KEYS: dict[type[Event], tuple[str, ...]] = {
    event: tuple([f',"{name}":' for name in event._fields]) for event in _EVENTS
}


def seed(run_id: str) -> int:
    """The crc32 seed of a run's lines."""
    return crc32(run_id.encode())


def encode(line: Line, crc_seed: int) -> bytes:
    """The line's bytes, newline included."""
    seq, at, mono_ms, durable, _ = line
    event = line.event
    # Joined by hand: the encoder sets itself up anew for every object, and is quick only for a string. Half the time.
    text = f'{{"seq":{seq},"at":{_encode(at)},"mono_ms":{mono_ms},"durable":{durable},"event":"{event.name}"'
    for key, value in zip(_KEYS[type(event)], event):  # noqa: B905 - saying so costs a sixth of the whole
        if type(value) is str:
            text += key + _encode(value)
        elif type(value) is int:
            text += f"{key}{value}"
        elif value is not None:
            assert isinstance(value, Workflow)
            text += key + definition.to_json(value)
    body = (text + _CRC_KEY).encode("ascii")
    return b'%b%08x"}\n' % (body, crc32(body, crc_seed))


def checks(raw: bytes, crc_seed: int) -> bool:
    """Does the checksum of this line (without its newline) prove it?"""
    return raw[_CRC_FROM:] == _CRC % crc32(raw[:_END_FROM], crc_seed)


def decode(raw: bytes) -> Line:
    """The line in these bytes (without the newline), whose checksum the caller has checked.

    Raises InvalidEvent for what is no event of this vocabulary, its fields in their order; NewerLog for what a newer
    program wrote.
    """
    try:
        text = raw.decode("ascii")
        record, end = _parse(text, 0)
    except (ValueError, StopIteration, RecursionError) as error:
        raise InvalidEvent(f"not JSON: {error}") from None
    if type(record) is not dict or end != len(text):
        raise InvalidEvent("not a JSON object")
    name = record.get("event")
    shapes = _SHAPES.get(name) if type(name) is str else None
    shape = None if shapes is None else shapes.get(tuple(record))
    if shape is None:
        raise InvalidEvent(_flaw(record))
    event, types, numbers, own = shape
    values = tuple(record.values())
    if tuple(map(type, values)) != types or min(numbers(values)) < 0:
        raise InvalidEvent(_flaw(record))
    fields = _checked(event, record) if own is None else own(values)
    # The shape has proved what Value would count.
    return _new(Line, (*values[:4], _new(event, fields)))


def _checked(event: type[Event], record: dict[str, object]) -> tuple[object, ...]:
    """The fields of one of `_CHECKED`."""
    if problem := _version_problem(record):
        raise InvalidEvent(problem)
    if event is RunSubmitted:
        try:
            record["workflow"] = definition.from_record(record["workflow"])
        except definition.DefinitionError as error:
            raise InvalidEvent(f"run_submitted: {error}") from None
    return tuple([record[name] for name in event._fields])


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
    """What is wrong with the versions that a line names. Raises NewerLog."""
    for name, ours in (("format", FORMAT), ("rules", RULES)):
        theirs = record.get(name)
        if type(theirs) is not int or theirs < 1:
            return f"{name} must be a whole number from 1 on"
        if theirs > ours:
            reads = f"{name} {theirs}; this one reads up to {ours}"
            raise NewerLog(f"was written by a newer wfd ({reads}): use that version or a later one")
    return ""
