"""The runs of a home as they lie on disk: found, read and replayed without a daemon.

Rules
* No lock is taken and nothing is repaired: what follows the last good line of a log is not looked at, or reported.
* Everything that reads a log imports the journal when it is called. Finding a run by its name needs only the names, and
  that is all that a `status` answered by the daemon asks of this file.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator

from wfctl import render
from wfctl.errors import NoSuchRun, RunDamaged
from wfd.paths import RUN_ID, RUN_ID_RULE, Home, RunFiles, is_run_id

TYPE_CHECKING = False  # As in typing, whose import costs a tenth of a whole `status`.
if TYPE_CHECKING:
    from typing import BinaryIO

    from wfd.decide import Difference
    from wfd.events import Line
    from wfd.journal import Reading
    from wfd.state import Run

_OnLine = Callable[["Line"], None]

LATEST = "@latest"
# Ids as client.new_run_id makes them.
_GENERATED = re.compile(r"[0-9]{8}-[0-9]{6}-[a-z0-9]{4}")
_NS = 1_000_000_000
# 9999-12-31 23:59:59 UTC, the last second that an id can name.
_LAST_SEC = 253_402_300_799
# So much later than its id was made a run may be on disk: the daemon was started and 100,000 steps were taken in, twice.
MAX_SUBMISSION_SEC = 150
# Candidates that an ambiguous name's message shows.
MAX_CANDIDATES_SHOWN = 5
# A first line holds a whole definition; this is what a request may hold, and more than that is no log.
_MAX_LINE_BYTES = 64 << 20
# A run_finished has a few hundred bytes; what is longer at the end of a log is none.
_TAIL_BYTES = 4096


# -- names -------------------------------------------------------------------------------------------------------------


def run_ids(home: Home) -> list[str]:
    """The runs of this home, in no order."""
    return list(filter(RUN_ID.fullmatch, _names(home)))


def _names(home: Home) -> list[str]:
    try:
        return os.listdir(home.runs)
    except FileNotFoundError:
        return []


def marked_live(home: Home) -> set[str]:
    """The runs that may be unfinished: too many, never too few."""
    try:
        return set(filter(is_run_id, os.listdir(home.live)))
    except OSError:
        return set()


def newest(home: Home, count: int | None = None) -> tuple[list[str], list[str]]:
    """The `count` runs that were submitted last (all when None), the last one first; and all that there are, in no order.

    An id of the generated form tells when it was made, so that of thousands only those are looked at on disk that may be
    among the `count`. A name that a user chose tells nothing, nor does one from the future. (Whoever chooses the form of a
    generated id and another day is believed.)"""
    now = _stamp(time.time())
    # Ten thousand names are looked at once; as two filters that was a twentieth of a whole `list` more.
    is_generated = _GENERATED.fullmatch
    dated: list[str] = []
    others: list[str] = []
    for name in _names(home):
        (dated if is_generated(name) and name <= now else others).append(name)
    exact = {run_id: _submitted_ns(home, run_id) for run_id in filter(RUN_ID.fullmatch, others)}
    ids = [*dated, *exact]
    if count is not None and count < len(ids):
        # Of an id its stamp would do, but its beginning is one already.
        border = heapq.nlargest(count, [*dated, *(_stamp(ns / _NS) for ns in exact.values())])[-1][: len(now)]
        border_sec = render.epoch_sec(_as_time(border)) or 0
        # A name may have the form of a time and be none, which is only as late as its letters are.
        border = min(border, _stamp(border_sec - MAX_SUBMISSION_SEC))
        dated = [run_id for run_id in dated if run_id >= border]
    exact.update((run_id, _submitted_ns(home, run_id)) for run_id in dated)
    return _last_first(exact)[:count], ids


def last_first(home: Home, ids: Iterable[str]) -> list[str]:
    """These runs, the one that was submitted last the first."""
    return _last_first({run_id: _submitted_ns(home, run_id) for run_id in ids})


def _last_first(submitted_ns: dict[str, int]) -> list[str]:
    return sorted(submitted_ns, key=lambda run_id: (submitted_ns[run_id], run_id), reverse=True)


def _stamp(sec: float) -> str:
    """A time as generated ids begin with it: of two of them the later is the greater string, which is all that listing ten
    thousand runs has the time to ask. A file may have a time in a year of more digits than four."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime(min(max(0, sec), _LAST_SEC)))


def _as_time(stamp: str) -> str:
    """The same as a log has it."""
    day, _, clock = stamp.partition("-")
    return f"{day[:4]}-{day[4:6]}-{day[6:]}T{clock[:2]}:{clock[2:4]}:{clock[4:]}Z"


def _submitted_ns(home: Home, run_id: str) -> int:
    """When a run was submitted, in nanoseconds since 1970: its environment is written once, when it is created."""
    files = home.run(run_id)
    for path in (files.environment, files.directory):
        try:
            return os.stat(path).st_mtime_ns
        except OSError:
            pass  # Removed by hand, or just now.
    return 0


def resolve(home: Home, text: str) -> str:
    """The run that is meant: an exact id, else a unique beginning or end of one, or @latest. Raises NoSuchRun."""
    if is_run_id(text) and os.path.lexists(home.run(text).directory):
        return text
    if text == LATEST:
        last = newest(home, 1)[0]
        if not last:
            raise NoSuchRun(f"there are no runs in {home.directory}")
        return last[0]
    if not (text and is_run_id(f"0{text}0")):
        raise NoSuchRun(f"{text!r} is no run id or part of one ({RUN_ID_RULE})")
    found = sorted((run_id for run_id in run_ids(home) if run_id.startswith(text) or run_id.endswith(text)), reverse=True)
    if len(found) == 1:
        return found[0]
    if not found:
        raise NoSuchRun(f"there is no run {text!r} in {home.directory}; `list` shows those that are there")
    shown = ", ".join(found[:MAX_CANDIDATES_SHOWN]) + (", …" if len(found) > MAX_CANDIDATES_SHOWN else "")
    raise NoSuchRun(f"{text!r} may be any of {len(found)} runs: {shown}")


# -- logs --------------------------------------------------------------------------------------------------------------


def status(home: Home, run_id: str) -> dict[str, object]:
    """The run's state as its log tells it, in the form of `status --json`. Raises NoSuchRun, RunDamaged."""
    return {**fold(home, run_id).describe(), "source": "log", "stalled": None}


def fold(home: Home, run_id: str) -> Run:
    """The run's state as its log tells it. Raises NoSuchRun, RunDamaged."""
    from wfd import journal

    try:
        run, reading = _fold_checked(home.run(run_id), run_id)
        if reading.torn_bytes and not _is_marked_live(home, run_id):
            with journal.open_log(home.run(run_id), run_id) as file:
                _check_tail(file, run_id, reading)
        return run
    except FileNotFoundError:
        raise NoSuchRun(f"there is no run {run_id}") from None
    except journal.Damaged as error:
        raise RunDamaged(str(error)) from None


def _fold_checked(files: RunFiles, run_id: str) -> tuple[Run, Reading]:
    """The state that a log tells, if it knows every attempt on disk. Raises FileNotFoundError, Damaged."""
    from wfd import journal

    attempts = journal.attempts_on_disk(files, run_id)
    run, reading = journal.fold(files, run_id)
    journal.check_attempts(run, attempts)
    return run, reading


def lines(home: Home, run_id: str) -> Iterator[Line]:
    """The good lines of a log, from the first. Raises NoSuchRun, RunDamaged (also behind the last good line, when the
    end of the run stands there out of reach)."""
    from wfd import journal

    try:
        with journal.open_log(home.run(run_id), run_id) as file:
            reading = journal.Reading(file, run_id)
            yield from reading
            if reading.torn_bytes and not _is_marked_live(home, run_id):
                _check_tail(file, run_id, reading)
    except FileNotFoundError:
        raise NoSuchRun(f"there is no run {run_id}") from None
    except journal.Damaged as error:
        raise RunDamaged(str(error)) from None


def _is_marked_live(home: Home, run_id: str) -> bool:
    """May this run be unfinished? What is wrong with its tail is then for the next daemon to judge."""
    return os.path.lexists(f"{home.live}/{run_id}")


def _check_tail(file: BinaryIO, run_id: str, reading: Reading) -> None:
    """Raise Damaged when a whole run_finished stands behind the last good line: then that tail was not torn in writing,
    somebody has altered it. Looks only at what `reading` has seen, since a writer may have gone on."""
    from wfd import events, journal

    file.seek(reading.end + max(0, reading.torn_bytes - _TAIL_BYTES))
    tail = file.read(min(reading.torn_bytes, _TAIL_BYTES))
    raw = tail[:-1].rpartition(b"\n")[2]
    if not tail.endswith(b"\n") or not events.checks(raw, events.seed(run_id)):
        return
    try:
        is_end = events.decode(raw).event.name == "run_finished"
    except events.InvalidEvent:
        return
    if is_end:
        why = f"its last line tells its end, but line {reading.seq + 1} is not whole"
        raise journal.Damaged(run_id, why)


def summary(home: Home, run_id: str) -> dict[str, object] | None:
    """A run as a row of `list`, read as cheaply as its state allows; None when it has just been removed. Counts that
    only a fold would tell are None for a run that is over. A damaged run has the state DAMAGED, one of a later version
    NEWER, and either says why."""
    from wfd import journal
    from wfd.events import RunFinished
    from wfd.state import END_STATES

    files = home.run(run_id)
    try:
        last = journal.last_line(files, run_id)
        state = last.event.state if last is not None and isinstance(last.event, RunFinished) else ""
        if last is None or state not in END_STATES:
            return summary_of(_fold_checked(files, run_id)[0])
        workflow_id, steps, submitted_at = _first_line(files, run_id)
    except FileNotFoundError:
        return None
    except journal.Damaged as error:
        state = "NEWER" if isinstance(error, journal.Newer) else "DAMAGED"
        return {**_row(run_id, None, state, None, None, None), "why": error.why}
    row = _row(run_id, workflow_id, state, submitted_at, last.at, steps)
    if state == "SUCCEEDED":
        row.update(succeeded=steps, failed=0)
    return row


def summary_of(run: Run) -> dict[str, object]:
    """The row of a run whose state is known."""
    row = _row(run.run_id, run.workflow.workflow_id, run.state.value, run.submitted_at, run.finished_at, len(run.steps))
    states = [record.state.value for record in run.steps]
    row.update(succeeded=states.count("SUCCEEDED"), failed=states.count("FAILED"), running=states.count("RUNNING"))
    return row


def _row(
    run_id: str,
    workflow_id: str | None,
    state: str,
    submitted_at: str | None,
    finished_at: str | None,
    steps: int | None,
) -> dict[str, object]:
    return {
        "run_id": run_id,
        "workflow_id": workflow_id,
        "state": state,
        "submitted_at": submitted_at,
        "finished_at": finished_at,
        "steps": steps,
        "succeeded": None,
        "failed": None,
        "running": 0,
        "stalled": None,
    }


def _first_line(files: RunFiles, run_id: str) -> tuple[str, int, str]:
    """Workflow id, number of steps, time of submission; the definition is not checked again, since the daemon has.
    Raises FileNotFoundError, Damaged."""
    from wfd import events, journal

    with journal.open_log(files, run_id) as file:
        raw = file.readline(_MAX_LINE_BYTES)
    try:
        record = json.loads(raw)
        is_newer = record["format"] > events.FORMAT or record["rules"] > events.RULES
        told = str(record["workflow"]["workflow_id"]), len(record["workflow"]["steps"]), str(record["at"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise journal.Damaged(run_id, "line 1 is not whole") from None
    if is_newer or not events.checks(raw[:-1], events.seed(run_id)):
        # Whoever reads the line whole knows what to say about it.
        journal.submitted(files, run_id)
    return told


# -- replay ------------------------------------------------------------------------------------------------------------


class Replay:
    """What came of replaying a log.

    run           the state after the last line that verified       lines       how many verified
    difference    the first line that the rules would not have written, or None
    torn_bytes    what follows the last good line: never promised to anybody, cut off by the next daemon
    """

    __slots__ = ("difference", "lines", "run", "torn_bytes")

    def __init__(self, run: Run, difference: Difference | None, torn_bytes: int) -> None:
        self.run = run
        self.lines = run.seq
        self.difference = difference
        self.torn_bytes = torn_bytes

    @property
    def verified(self) -> bool:
        return self.difference is None


def replay_run(home: Home, run_id: str, until: int | None = None, on_line: _OnLine = lambda line: None) -> Replay:
    """Fold a run's log again, regenerating every decision and checking every choice, up to line `until` if that is
    given. `on_line` is shown each line before it is judged. Raises NoSuchRun, RunDamaged."""
    from wfd import journal

    try:
        attempts = journal.attempts_on_disk(home.run(run_id), run_id)
        with journal.open_log(home.run(run_id), run_id) as file:
            found = _replay(file, run_id, until, on_line, _is_marked_live(home, run_id))
        if until is None and found.verified:
            journal.check_attempts(found.run, attempts)
        return found
    except FileNotFoundError:
        raise NoSuchRun(f"there is no run {run_id}") from None
    except journal.Damaged as error:
        raise RunDamaged(str(error)) from None


def replay_file(path: str, until: int | None = None, on_line: _OnLine = lambda line: None) -> Replay:
    """The same for a log under any name, which tells in its first line whose it is. Raises NoSuchRun, RunDamaged."""
    try:
        with open(path, "rb") as file:
            run_id = _run_id_in(path, file.readline(_MAX_LINE_BYTES))
            file.seek(0)
            return _replay(file, run_id, until, on_line)
    except OSError as error:
        raise NoSuchRun(f"{path} cannot be read as a log: {error.strerror or error}") from None


def _run_id_in(path: str, first_line: bytes) -> str:
    """The run that a log says it is of. The checksums, which are seeded with it, prove it."""
    try:
        run_id = json.loads(first_line)["run_id"]
    except (ValueError, LookupError, TypeError, RecursionError):
        run_id = None
    if not isinstance(run_id, str) or not is_run_id(run_id):
        raise RunDamaged(f"{path} is no event log: its first line does not name a run")
    return run_id


def _replay(file: BinaryIO, run_id: str, until: int | None, on_line: _OnLine, may_be_unfinished: bool = False) -> Replay:
    from wfd import decide, journal
    from wfd.state import Impossible

    reading = journal.Reading(file, run_id)

    def shown() -> Iterator[Line]:
        for line in reading:
            on_line(line)
            yield line
            if line.seq == until:
                return

    try:
        run, difference = decide.replay(shown())
        if run.run_id != run_id:
            raise journal.Damaged(run_id, f"line 1: the log is of run {run.run_id!r}")
        if reading.torn_bytes and not may_be_unfinished:
            _check_tail(file, run_id, reading)
    except journal.Damaged as error:
        raise RunDamaged(str(error)) from None
    except Impossible as error:
        raise RunDamaged(f"run {run_id} cannot be replayed: {error}") from None
    return Replay(run, difference, reading.torn_bytes)
