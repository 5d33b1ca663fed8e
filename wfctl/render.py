"""State as text for people: tables, lines, the live view. The only file that formats for people.

Rules
* `escape` is the one way for a text that somebody else wrote (an id, a message, output) to come near a terminal: what
  could move a cursor, colour a screen or turn the reading direction is shown as its escape sequence instead.
* Everything here is pure: text and numbers in, text out. Who writes it, and where to, is the caller's business.
* Times are UTC, as run ids are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

TYPE_CHECKING = False  # As in typing, whose import costs a tenth of a whole `status`.
if TYPE_CHECKING:
    from typing import Any

    from wfd.events import Line
    from wfd.state import Run, StepRecord

# A table with one id of 200 characters must stay a table.
MAX_COLUMN_CHARS = 40
# Thirty thousand years.
_MAX_MS = 10**15

_COLOURS = {
    "RUNNING": "33", "SUCCEEDED": "32", "FAILED": "31", "DAMAGED": "31", "NEWER": "31", "CANCELLING": "35",
    "CANCELLED": "35", "SKIPPED": "2", "PENDING": "2",
}  # fmt: skip


def escape(text: str, keep: str = "") -> str:
    """The text with everything unprintable but the characters in `keep` shown as \\n, \\x1b, \\u202e or the like."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode("ascii") for char in text
    )


def paint(text: str, state: str, colour: bool) -> str:
    """The text in the colour of a state."""
    code = _COLOURS.get(state)
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def duration(seconds: float) -> str:
    """A length of time in at most eight characters: 0.3s, 12.0s, 3m05s, 2h07m, 5d03h."""
    if seconds < 60:
        return f"{max(0.0, seconds):.1f}s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


# All that happens in one turn of the daemon has one time. Beyond so many of them, who would ask for an early one again?
@lru_cache(1_000)
def epoch_sec(at: str) -> float | None:
    """A time of the log (2026-11-23T07:24:12.123456Z) in seconds since 1970. None when it is no such time: replay never
    compares it, so it may be anything in a log that somebody has written by hand."""
    # Not datetime, whose import costs more than all the rest of a table. Years are counted from March, so that leap
    # days come last and the months before a day make (153 * month + 2) // 5 days.
    seconds, _, fraction = at[17:-1].partition(".")
    parts = at[:4], at[5:7], at[8:10], at[11:13], at[14:16], seconds[:2], fraction[:6] or "0"
    if not (at.isascii() and all(map(str.isdecimal, parts))):
        return None
    year, month, day, hour, minute, second, _ = map(int, parts)
    year, month = (year - 1, month + 9) if month < 3 else (year, month - 3)
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 719469
    return days * 86400 + hour * 3600 + minute * 60 + second + float(f"0.{parts[-1]}")


def _seconds(ms: int) -> float:
    """Milliseconds as seconds. A number that somebody wrote into a log by hand may be too long for a float."""
    return min(ms, _MAX_MS) / 1000


def took(start: object, end: object, now_sec: float) -> str:
    """How long something has lasted, up to now if it is not over; empty when it has not begun."""
    start_sec = epoch_sec(start) if isinstance(start, str) else None
    end_sec = epoch_sec(end) if isinstance(end, str) else now_sec
    return "" if start_sec is None or end_sec is None else duration(end_sec - start_sec)


def clock(at: str) -> str:
    """The time of day of a log line: 07:24:12.123Z."""
    return escape(at[11:23]) + "Z"


def _moment(at: object) -> str:
    return escape(at[:19].replace("T", " ")) + "Z" if isinstance(at, str) else ""


def cells(text: str) -> int:
    """How many cells of a terminal an escaped text takes."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(char: str) -> int:
    from unicodedata import combining, east_asian_width

    return 0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1


def cut(text: str, width: int) -> str:
    """At most `width` cells of an escaped text, with a mark where something is missing."""
    if cells(text) <= width:
        return text
    end = used = 0
    while used + _cells(text[end]) < width:
        used += _cells(text[end])
        end += 1
    return text[:end] + "…"[:width]


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cells(text))


def table(rows: Sequence[Sequence[str]], state_column: int, colour: bool) -> list[str]:
    """Aligned columns of escaped texts; the first row is the heading."""
    shown = [(*[cut(cell, MAX_COLUMN_CHARS) for cell in row[:-1]], row[-1]) for row in rows]
    widths = [max(map(cells, column)) for column in zip(*shown, strict=True)]
    lines = []
    for number, row in enumerate(shown):
        padded = list(map(_pad, row, widths))
        if number:
            padded[state_column] = paint(padded[state_column], row[state_column], colour)
        lines.append("  ".join(padded).rstrip())
    return lines


# -- status and list ---------------------------------------------------------------------------------------------------


def status_text(status: Mapping[str, object], now_sec: float, colour: bool) -> str:
    """A run and its steps, as `status` shows them."""
    steps = _records(status["steps"])
    rows = [("STEP", "STATE", "ATTEMPT", "TOOK", "WHY")]
    for step in steps:
        attempt = str(step["attempt"]) if step["attempt"] else ""
        lasted = "" if step["state"] in ("PENDING", "READY") else took(step["started_at"], step["finished_at"], now_sec)
        rows.append((escape(str(step["id"])), str(step["state"]), attempt, lasted, why(step)))
    lines = [headline(status, steps, now_sec, colour)]
    if status.get("stalled"):
        lines.append(f"stalled: {escape(str(status['stalled']))}")
    return "\n".join([*lines, *table(rows, 1, colour)])


def headline(status: Mapping[str, object], steps: Iterable[Mapping[str, object]], now_sec: float, colour: bool) -> str:
    """A run in one line."""
    state = str(status["state"])
    reason = _RUN_REASONS.get(str(status["reason"]), "")
    lasted = took(status["submitted_at"], status["finished_at"], now_sec)
    # A log that is replayed from a file may name any run.
    words = [escape(str(status["run_id"])), escape(str(status["workflow_id"])), paint(state, state, colour)]
    how_long = f"{reason} after {lasted}" if reason else lasted
    return "  ".join([*words, how_long, counts(str(step["state"]) for step in steps)])


def counts(states: Iterable[str]) -> str:
    """How many steps are in which state: `3 SUCCEEDED, 1 FAILED of 4`."""
    found: dict[str, int] = {}
    for state in states:
        found[state] = found.get(state, 0) + 1
    parts = [f"{found[state]} {state.lower()}" for state in _STATE_ORDER if state in found]
    return f"({', '.join(parts)})"


_STATE_ORDER = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELLED", "RUNNING", "READY", "PENDING")
_RUN_REASONS = {"run_timeout": "the run timed out"}


def why(step: Mapping[str, object]) -> str:
    """What is worth knowing about a step's state, in a few words."""
    reason, code, delay_ms = step["reason"], step["exit_code"], step["delay_ms"]
    if step["state"] == "SKIPPED":
        return f"because of {escape(str(step['because']))}"
    text = _why(reason if isinstance(reason, str) else "", code if isinstance(code, int) else None)
    if step["state"] == "READY" and isinstance(delay_ms, int) and delay_ms:
        text = f"{text}; waits {duration(_seconds(delay_ms))}"
    return text


def _why(reason: str, exit_code: int | None) -> str:
    if reason == "exit" and exit_code is not None:
        signal = f" (signal {exit_code - 128})" if 128 < exit_code <= 192 else ""
        return f"exit {exit_code}{signal}"
    return _REASONS.get(reason, escape(reason))


_REASONS = {
    "": "",
    "timeout": "timed out",
    "lost": "lost: nobody knows how it ended",
    "never_began": "its process died before the command began",
    "not_started": "could not be started",
    "cancel": "cancelled",
    "run_timeout": "the run timed out",
    "steps_failed": "steps failed",
}


def list_text(runs: Iterable[Mapping[str, object]], now_sec: float, colour: bool) -> str:
    """The table of `list`."""
    rows = [("RUN", "STATE", "SUBMITTED", "TOOK", "STEPS", "WORKFLOW")]
    for run in runs:
        lasted = took(run["submitted_at"], run["finished_at"], now_sec)
        name = escape(str(run.get("why") or run["workflow_id"]))
        rows.append((str(run["run_id"]), str(run["state"]), _moment(run["submitted_at"]), lasted, _progress(run), name))
    return "\n".join(table(rows, 1, colour))


def _progress(run: Mapping[str, object]) -> str:
    if run["steps"] is None:
        return ""
    return str(run["steps"]) if run["succeeded"] is None else f"{run['succeeded']}/{run['steps']}"


def _records(value: object) -> list[Mapping[str, object]]:
    return value if isinstance(value, list) else []


# -- the story ---------------------------------------------------------------------------------------------------------


class Story:
    """Tells a log line by line: time, step, transition, attempt, why. It remembers how each attempt ended, since the
    decision that follows is told with it."""

    def __init__(self, colour: bool = False) -> None:
        self._colour = colour
        self._attempts: dict[str, int] = {}
        self._ends: dict[str, str] = {}

    def tell(self, line: Line) -> str | None:
        """The line in words, or None for one that is no transition of the run or of a step."""
        event = line.event
        record: dict[str, Any] = dict(zip(event._fields, event, strict=True))
        step = record.get("step")
        if step is None:
            told = _tell_of_run(event.name, record)
            return None if told is None else self._line(line, "(run)", *told)
        if "attempt" in record:
            self._attempts[step] = record["attempt"]
        if event.name.startswith("attempt_"):
            self._ends[step] = _end_of_attempt(event.name, record)
            return None
        state = _STEP_STATES[event.name]
        return self._line(line, escape(step), state, self._why(step, event.name, record))

    def _why(self, step: str, name: str, record: Mapping[str, object]) -> str:
        number = self._attempts.get(step)
        attempt = f"attempt {number}"
        if name == "step_started":
            return attempt
        if name == "step_ready":
            return ""
        if name == "step_skipped":
            return f"because of {escape(str(record['because']))}"
        if name == "step_cancelled":
            return " ".join(filter(None, [attempt if number else "", _REASONS.get(str(record["reason"]), "")]))
        end = self._ends.pop(step, "")
        if record.get("reason") == "timeout":
            end = "timed out"
        if name == "step_retried":
            delay_ms = record["delay_ms"]
            assert isinstance(delay_ms, int)
            return f"{attempt} {end}; tried again {f'after {_seconds(delay_ms):g} s' if delay_ms else 'at once'}"
        return f"{attempt} {end}".rstrip() if name == "step_failed" else attempt

    def _line(self, line: Line, who: str, state: str, reason: str) -> str:
        name = _pad(cut(who, MAX_COLUMN_CHARS), 16)
        return f"{clock(line.at)}  {name}  {paint(f'{state:<10}', state, self._colour)}  {reason}".rstrip()


_STEP_STATES = {
    "step_ready": "READY",
    "step_started": "RUNNING",
    "step_succeeded": "SUCCEEDED",
    "step_failed": "FAILED",
    "step_retried": "READY",
    "step_skipped": "SKIPPED",
    "step_cancelled": "CANCELLED",
}


def _tell_of_run(name: str, record: Mapping[str, object]) -> tuple[str, str] | None:
    if name == "run_submitted":
        workflow = record["workflow"]
        steps = len(workflow.steps)  # type: ignore[attr-defined]
        return "RUNNING", f"{escape(workflow.workflow_id)}, {steps} step{'s' * (steps != 1)}"  # type: ignore[attr-defined]
    if name == "run_finished":
        return escape(str(record["state"])), _REASONS.get(str(record["reason"]), "")
    if name == "supervisor_started":
        return "", f"kept by wfd {escape(str(record['version']))} on {escape(str(record['host']))}"
    if name == "log_recovered":
        return "", f"the log was repaired, {record['dropped_bytes']} bytes of a torn tail were cut off"
    return {
        "run_cancel_requested": ("CANCELLING", "a cancel was asked for"),
        "run_retried": ("RUNNING", "another try was asked for"),
        "run_timed_out": ("RUNNING", "the run timed out; its steps are ended"),
    }.get(name)


def _end_of_attempt(name: str, record: Mapping[str, object]) -> str:
    code = record.get("exit_code")
    if name == "attempt_lost":
        return f"was lost ({escape(str(record['why']))})"
    if name == "attempt_not_started":
        return f"was not started ({escape(str(record['why']))}: {escape(str(record['detail']))})"
    return _why("exit", code).replace("exit", "exited with", 1) if isinstance(code, int) else "was ended"


# -- the live view -----------------------------------------------------------------------------------------------------


def frame(run: Run, now_sec: float, height: int, width: int, colour: bool) -> list[str]:
    """The run as a picture of at most `height` lines of `width` cells: a row for each step if they fit, else those that
    matter most now, in the order of the definition."""
    steps = run.steps
    status = {
        "run_id": run.run_id, "workflow_id": run.workflow.workflow_id, "state": run.state.value, "reason": run.reason,
        "submitted_at": run.submitted_at, "finished_at": run.finished_at,
    }  # fmt: skip
    heading = headline(status, [{"state": record.state.value} for record in steps], now_sec, False)
    shown = list(steps)
    rest = ""
    if len(steps) > height - 1:
        room = max(0, height - 2)
        urgent = sorted(steps, key=lambda record: (_URGENCY[record.state.value], -record.started_ms))[:room]
        shown = sorted(urgent, key=lambda record: record.index)
        rest = f"… and {len(steps) - len(shown)} more steps"
    name_width = min(MAX_COLUMN_CHARS, max((cells(escape(record.step.id)) for record in shown), default=0))
    rows = [_row(record, name_width, now_sec, width, colour) for record in shown]
    return [_coloured(cut(heading, width), run.state.value, colour), *rows, *([rest] if rest else [])][:height]


# What is being worked on and what went wrong comes first, then what is next, then the rest.
_URGENCY = {"RUNNING": 0, "FAILED": 1, "READY": 2, "CANCELLED": 3, "SKIPPED": 4, "PENDING": 5, "SUCCEEDED": 6}


def _row(record: StepRecord, name_width: int, now_sec: float, width: int, colour: bool) -> str:
    state = record.state.value
    step = {
        "state": state, "reason": record.reason, "exit_code": record.exit_code, "because": record.blocked_by,
        "delay_ms": record.delay_ms,
    }  # fmt: skip
    lasted = "" if state in ("PENDING", "READY") else took(record.started_at, record.finished_at, now_sec)
    attempt = f"attempt {record.attempt}" if record.attempt > 1 else ""
    name = _pad(cut(escape(record.step.id), name_width), name_width)
    text = f"  {name}  {state:<9}  {lasted:>7}  {', '.join(filter(None, [attempt, why(step)]))}".rstrip()
    return _coloured(cut(text, width), state, colour)


def _coloured(text: str, state: str, colour: bool) -> str:
    """Colour the state's word, after the line was cut: escape sequences have no width."""
    before, word, after = text.partition(f"  {state}")
    return f"{before}  {paint(state, state, colour)}{after}" if word else text


def redraw(lines: Sequence[str], drawn: int) -> str:
    """What a terminal must be sent to show `lines` in the place of the `drawn` ones above the cursor."""
    up = f"\x1b[{drawn}A" if drawn else ""
    return up + "\r" + "".join(line + "\x1b[K\n" for line in lines) + "\x1b[J"
