"""Hostile input as files: logs that are cut, mixed up or forged, and what may lie in the place of a home's files.

A row tells what `status` and `replay` of the run come to, and what either says of it. "Forged" lines have checksums
that are right, so only their content can give them away; where the fold has nothing against them, replay has. The rows
are carried out by hostile.py.
"""

from __future__ import annotations

import gzip
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests import logs
from tests.logs import AT, Log
from wfd.events import (
    AttemptExited,
    Line,
    LogRecovered,
    RunCancelRequested,
    RunFinished,
    RunRetried,
    RunTimedOut,
    StepStarted,
)
from wfd.paths import Home


class Edit(NamedTuple):
    """What is done to the log of a finished run, the exit codes of `status` and `replay`, and a part of what the first of
    them says that refuses it (or status, if none does). file: of `replay` with the log's path, where it is another."""

    name: str
    change: Callable[[Log], bytes]
    status: int
    replay: int
    words: str = ""
    file: int | None = None


class Thing(NamedTuple):
    """What is put into a home, a command line, its exit code, and a part of what it prints. {file}: a good workflow."""

    name: str
    put: Callable[[Home], object]
    arguments: tuple[str, ...]
    code: int
    words: str
    needs_root: bool = False


def finished(run_id: str = "r1") -> Log:
    """Four steps of which one fails and one is skipped: 15 lines in seven batches."""
    return logs.complete(logs.diamond(), {"b": [1]}, run_id)


# -- edits -------------------------------------------------------------------------------------------------------------


def _raw(log: Log) -> list[bytes]:
    return log.data.splitlines(keepends=True)


def _without(number: int) -> Callable[[Log], bytes]:
    return lambda log: b"".join(_raw(log)[: number - 1] + _raw(log)[number:])


def _doubled(number: int) -> Callable[[Log], bytes]:
    return lambda log: b"".join(_raw(log)[:number] + _raw(log)[number - 1 :])


def _swapped(number: int) -> Callable[[Log], bytes]:
    """The line and the next one."""

    def change(log: Log) -> bytes:
        raw = _raw(log)
        raw[number - 1 : number + 1] = raw[number], raw[number - 1]
        return b"".join(raw)

    return change


def _in_line(
    number: int, old: bytes, new: bytes | Callable[[re.Match[bytes]], bytes], forged: bool = True
) -> Callable[[Log], bytes]:
    """One text in one line; forged: with the checksum that belongs to it."""

    def change(log: Log) -> bytes:
        raw = _raw(log)
        changed = re.sub(old, new, raw[number - 1], count=1)
        assert changed != raw[number - 1], (number, old)
        raw[number - 1] = logs.resealed(changed, log.run_id) if forged else changed
        return b"".join(raw)

    return change


def _then(number: int, *events: object) -> Callable[[Log], bytes]:
    """Up to this line as it was, then these events as sound lines."""

    def change(log: Log) -> bytes:
        lines = log.lines[:number]
        for event in events:
            lines.append(Line(len(lines) + 1, AT, log.now_ms, len(lines), event))  # type: ignore[arg-type]
        return logs.encode(lines, log.run_id)

    return change


def _from_another(number: int) -> Callable[[Log], bytes]:
    def change(log: Log) -> bytes:
        raw = _raw(log)
        raw[number - 1] = _raw(finished("another"))[number - 1]
        return b"".join(raw)

    return change


EDITS: tuple[Edit, ...] = (
    Edit("as it was", lambda log: log.data, 0, 0),
    # Cut: what had not been promised is a torn tail, and line 1 always had been.
    Edit("nothing", lambda log: b"", 6, 6, "the log is empty"),
    Edit("a newline", lambda log: b"\n", 6, 6, "line 1 is not whole"),
    Edit("half of line 1", lambda log: log.data[:200], 6, 6, "line 1 is not whole"),
    Edit("line 1 without its newline", lambda log: _raw(log)[0][:-1], 6, 6, "line 1 is not whole"),
    Edit("line 1 alone", lambda log: _raw(log)[0], 0, 0, "PENDING"),
    Edit("half of line 9", lambda log: b"".join(_raw(log)[:8]) + _raw(log)[8][:40], 0, 0, "RUNNING"),
    Edit("without its last byte", lambda log: log.data[:-1], 0, 0, "RUNNING"),
    Edit("without its last batch", lambda log: b"".join(_raw(log)[:12]), 0, 0, "RUNNING"),
    Edit("zeros behind it", lambda log: log.data + bytes(4_096), 0, 0, "FAILED"),
    Edit("half a line behind it", lambda log: log.data + _raw(log)[3][:50], 0, 0, "FAILED"),
    # Lines missing, doubled, swapped, or of others.
    Edit("zeros in its place", lambda log: bytes(len(log.data)), 6, 6, "line 1 is not whole"),
    Edit("without line 1", _without(1), 6, 6, "line 1 is not whole"),
    Edit("without line 2", _without(2), 6, 6, "line 2 is missing or altered, though a later line proves"),
    Edit("without line 12", _without(12), 6, 6, "line 12 is missing or altered, though a later line proves"),
    Edit("without line 14, in its last batch", _without(14), 6, 6, "line 14 is not whole"),
    Edit("line 1 twice", _doubled(1), 6, 6, "line 2 is missing or altered"),
    Edit("line 5 twice", _doubled(5), 6, 6, "line 6 is missing or altered"),
    Edit("its end twice", _doubled(15), 6, 6, "line 16 is not whole"),
    Edit("lines 1 and 2 swapped", _swapped(1), 6, 6, "line 1"),
    Edit("lines 6 and 7 swapped", _swapped(6), 6, 6, "line 6 is missing or altered"),
    Edit("backwards", lambda log: b"".join(reversed(_raw(log))), 6, 6, "line 1"),
    Edit("twice", lambda log: log.data * 2, 6, 6, "line 16 is not whole"),
    Edit("another run's log", lambda log: finished("another").data, 6, 6, "line 1 is not whole", file=0),
    Edit("another run's line 6", _from_another(6), 6, 6, "line 6 is missing or altered"),
    Edit("another run's log, sealed as this one's", lambda log: logs.encode(finished("another").lines, log.run_id), 6, 6,
         "line 1: the log is of run 'another'"),
    # What editors, mailers and archivers do.
    Edit("a byte order mark", lambda log: b"\xef\xbb\xbf" + log.data, 6, 6, "line 1 is not whole"),
    Edit("Windows ends of lines", lambda log: log.data.replace(b"\n", b"\r\n"), 6, 6, "line 1 is not whole"),
    Edit("spaces behind a line", _in_line(5, rb"\}\n", b"}  \n", forged=False), 6, 6, "line 5 is missing or altered"),
    Edit("spaces in a line", _in_line(5, rb'":', b'": ', forged=False), 6, 6, "line 5 is missing or altered"),
    Edit("a checksum in upper case", _in_line(5, rb'"[0-9a-f]{8}"', lambda found: found[0].upper(), forged=False), 6, 6,
         "line 5 is missing or altered"),
    Edit("an empty line", lambda log: b"\n".join([*log.data.split(b"\n", 3)[:3], b"", log.data.split(b"\n", 3)[3]]), 6, 6,
         "line 4 is missing or altered"),
    Edit("compressed", lambda log: gzip.compress(log.data, mtime=0), 6, 6, "line 1"),
    Edit("one line nested without end", lambda log: b"[" * 100_000 + b"\n" + log.data, 6, 6, "line 1"),
    # Forged: whole lines that are no events.
    Edit("an unknown event", _in_line(4, b"attempt_exited", b"attempt_vanished"), 6, 6, "unknown event 'attempt_vanished'"),
    Edit("an unknown field", _in_line(4, b'"exit_code"', b'"mood":1,"exit_code"'), 6, 6, "the field 'mood' is unknown"),
    Edit("a field missing", _in_line(4, b'"attempt":1,', b""), 6, 6, "the field 'attempt' is missing"),
    Edit("fields in another order", _in_line(4, b'"step":"a","attempt":1', b'"attempt":1,"step":"a"'), 6, 6,
         "not in their order"),
    Edit("a key twice", _in_line(4, b'"attempt":1', b'"attempt":1,"attempt":2'), 6, 6, "names attempt 2, not 1"),
    Edit("a text for a number", _in_line(4, b'"attempt":1', b'"attempt":"1"'), 6, 6, "'attempt' is of the wrong type"),
    Edit("a fraction", _in_line(4, b'"attempt":1', b'"attempt":1.0'), 6, 6, "'attempt' is of the wrong type"),
    Edit("true for a number", _in_line(4, b'"attempt":1', b'"attempt":true'), 6, 6, "'attempt' is of the wrong type"),
    Edit("below zero", _in_line(4, b'"attempt":1', b'"attempt":-1'), 6, 6, "the field 'attempt' is negative"),
    Edit("no number", _in_line(4, b'"exit_code":0', b'"exit_code":NaN'), 6, 6, "'exit_code' is of the wrong type"),
    Edit("5,000 digits", _in_line(4, b'"exit_code":0', b'"exit_code":' + b"9" * 5_000), 6, 6, "line 4: not JSON"),
    Edit("400 digits", _in_line(4, b'"mono_ms":[0-9]+', b'"mono_ms":' + b"9" * 400), 0, 0, "FAILED"),
    Edit("nested without end", _in_line(4, b'"step":"a"', b'"step":' + b"[" * 50_000), 6, 6, "line 4: not JSON"),
    Edit("not ASCII", _in_line(4, b'"step":"a"', b'"step":"\xc3\xa4"'), 6, 6, "line 4: not JSON"),
    Edit("a definition of nothing", _in_line(1, rb'"steps":\[.*\]', b'"steps":[]'), 6, 6, "run_submitted: $.steps"),
    Edit("a definition that goes in circles", _in_line(1, rb'"depends_on":\[\]', b'"depends_on":["d"]'), 6, 6,
         "closes a cycle"),
    Edit("a later format", _in_line(1, b'"format":1', b'"format":2'), 6, 6,
         "was written by a newer wfd (format 2; this one reads up to 1)"),
    Edit("later rules", _in_line(1, b'"rules":1', b'"rules":9'), 6, 6, "was written by a newer wfd (rules 9"),
    Edit("a format of nobody", _in_line(1, b'"format":1', b'"format":0'), 6, 6, "format must be a whole number from 1 on"),
    Edit("times of nobody", _in_line(1, b'"at":"[^"]*"', b'"at":"\\\\u001b[31m"'), 0, 0, "FAILED"),
    # Forged: events that cannot follow.
    Edit("durable before it was there", _in_line(4, b'"durable":3', b'"durable":4'), 6, 6,
         "says that line 4 was durable before"),
    Edit("a gap", _in_line(4, b'"seq":4', b'"seq":5'), 6, 6, "line 4 is missing or altered"),
    Edit("submitted again", lambda log: _then(3, log.lines[0].event)(log), 6, 6, "run_submitted in a run that is RUNNING"),
    Edit("a step that nobody knows", _then(2, StepStarted("x", 1)), 6, 6, "names the unknown step 'x'"),
    Edit("a start before its time", _then(2, StepStarted("b", 1)), 6, 6, "which is PENDING"),
    Edit("attempt 2 before 1", _then(2, StepStarted("a", 2)), 6, 6, "names attempt 2, not 1"),
    Edit("an end before the start", _then(2, AttemptExited("a", 1, 0)), 6, 6, "which is READY"),
    Edit("two ends", _then(3, AttemptExited("a", 1, 0), AttemptExited("a", 1, 0)), 6, 6, "after its attempt 1 had ended"),
    Edit("an end by nobody", _then(3, AttemptExited("a", 1, None)), 6, 6, "as if we had ended it"),
    Edit("a start after a cancel", _then(7, RunCancelRequested("q"), StepStarted("b", 1)), 6, 6, "starts after a cancel"),
    Edit("the end before the steps'", _then(3, RunFinished(3, "SUCCEEDED", "")), 6, 6, "with 4 unfinished steps"),
    Edit("an end of no name", _in_line(15, b'"state":"FAILED"', b'"state":"\\\\u001b[2J"'), 6, 6, "run_finished"),
    Edit("another try of what still runs", _then(3, RunRetried("q")), 6, 6, "run_retried in a run that is RUNNING"),
    # Forged so that the fold has nothing against it: the rules have.
    Edit("a failure that succeeded", _in_line(15, b'"state":"FAILED"', b'"state":"SUCCEEDED"'), 0, 6,
         "line 15: expected run_finished"),
    Edit("another reason", _in_line(11, b'"reason":"exit"', b'"reason":"lost"'), 0, 6, "line 11: expected step_failed"),
    Edit("another cause", _in_line(14, b'"cause":13', b'"cause":12'), 0, 6, "line 14: expected step_succeeded"),
    Edit("another's fault", _in_line(12, b'"because":"b"', b'"because":"c"'), 0, 6, "line 12: expected step_skipped"),
    Edit("another exit status", _in_line(10, b'"exit_code":1', b'"exit_code":0'), 0, 6, "line 11: expected step_succeeded"),
    Edit("a draw without a jitter", _in_line(10, b'"exit_code":1', b'"exit_code":1,"draw_ppm":1'), 0, 6, "draw_ppm absent"),
    Edit("a timeout that it had not", _then(3, RunTimedOut()), 0, 6, "no timeout of the run"),
    Edit("a repair of nothing", _then(15, LogRecovered(1)), 0, 0, "FAILED"),
)  # fmt: skip


# -- things ------------------------------------------------------------------------------------------------------------


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _replace(path: str, make: Callable[[str], object]) -> None:
    """Something else in the place of a file or an empty directory."""
    if os.path.isdir(path) and not os.path.islink(path):
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)
    make(path)


def _loop(path: str) -> None:
    os.symlink(path, path)


def _link_to(target: str) -> Callable[[str], None]:
    return lambda path: os.symlink(target, path)


def bind(path: str) -> None:
    """A socket in the place of a file."""
    # From its directory, since the whole path may be too long for a socket.
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(".", os.O_RDONLY)
        try:
            os.chdir(os.path.dirname(path))
            listener.bind(os.path.basename(path))
        finally:
            os.fchdir(here)
            os.close(here)


def _give_away(path: str) -> None:
    """To a user that this machine need not have."""
    os.chown(path, 65534, 65534)


def _log(make: Callable[[str], object]) -> Callable[[Home], None]:
    return lambda home: _replace(home.run("r1").events, make)


def _edited(change: Callable[[Log], bytes]) -> Callable[[Home], None]:
    return lambda home: _write(home.run("r1").events, change(finished()))


def _attempts(make: Callable[[str], object]) -> Callable[[Home], None]:
    return lambda home: _replace(home.run("r1").attempts, make)


def _attempt(name: str, make: Callable[[str], object] = os.mkdir) -> Callable[[Home], object]:
    return lambda home: make(f"{home.run('r1').attempts}/{name}")


def _lock(data: bytes) -> Callable[[Home], None]:
    return lambda home: _write(home.lock, data)


def _socket(make: Callable[[str], object]) -> Callable[[Home], object]:
    return lambda home: make(f"{home.directory}/wfd.sock")


def _run(name: str, make: Callable[[str], object] = os.mkdir) -> Callable[[Home], object]:
    return lambda home: make(f"{home.runs}/{name}")


def _odd_names(home: Home) -> None:
    for name in ("UPPER", ".hidden", "a b", "é", "x" * 101, "ends.", "-r9", "\udcff", "r\n9", ".new-r9"):
        # Some file systems take no name that is no UTF-8.
        with suppress(OSError):
            os.mkdir(f"{home.runs}/{name}")
            Path(f"{home.live}/{name}").touch()


_STATUS, _LIST, _LOGS = ("status", "r1"), ("list",), ("logs", "r1")

THINGS: tuple[Thing, ...] = (
    # In the place of a log.
    Thing("a FIFO for a log", _log(os.mkfifo), _STATUS, 6, "events.ndjson is not a plain file"),
    Thing("a directory for a log", _log(os.mkdir), _STATUS, 6, "events.ndjson is not a plain file"),
    Thing("a socket for a log", _log(bind), _STATUS, 6, "events.ndjson"),
    Thing("a link for a log", _log(_link_to("../r2/events.ndjson")), _STATUS, 6, "events.ndjson cannot be opened"),
    Thing("a link to nothing for a log", _log(_link_to("nothing")), _STATUS, 6, "events.ndjson cannot be opened"),
    Thing("/dev/zero for a log", _log(_link_to("/dev/zero")), _STATUS, 6, "events.ndjson cannot be opened"),
    Thing("no log", _log(lambda path: None), _STATUS, 6, "it has no events.ndjson"),
    Thing("a byte changed in line 1, listed", _edited(_in_line(1, b'"at":"2', b'"at":"x', forged=False)), _LIST, 0,
          "DAMAGED"),
    Thing("a step changed in line 1, listed", _edited(_in_line(1, b'"true"', b'"fals"', forged=False)), _LIST, 0, "DAMAGED"),
    Thing("line 1 nested without end, listed", _edited(lambda log: b"[" * 100_000 + b"\n" + log.data), _LIST, 0, "DAMAGED"),
    Thing("a later format, listed", _edited(_in_line(1, b'"format":1', b'"format":2')), _LIST, 0, "NEWER"),
    Thing("a log of two names", lambda home: os.link(home.run("r1").events, f"{home.directory}/name"), _STATUS, 0, "FAILED"),
    Thing("a log of another owner", lambda home: _give_away(home.run("r1").events), _STATUS, 0, "FAILED",
          needs_root=True),
    Thing("a run of another owner", lambda home: _give_away(home.run("r1").directory), _STATUS, 0, "FAILED",
          needs_root=True),
    # In the place of a run.
    Thing("names that are no run ids", _odd_names, _LIST, 0, "r2"),
    Thing("a file for a run", _run("r9", lambda path: Path(path).touch()), ("status", "r9"), 6, "Not a directory"),
    Thing("a file for a run, listed", _run("r9", lambda path: Path(path).touch()), _LIST, 0, "DAMAGED"),
    Thing("a FIFO for a run", _run("r9", os.mkfifo), ("status", "r9"), 6, "Not a directory"),
    Thing("an empty run", _run("r9"), ("status", "r9"), 6, "it has no events.ndjson"),
    Thing("an empty run, listed", _run("r9"), _LIST, 0, "it has no events.ndjson"),
    Thing("a link for a run", _run("r9", _link_to("r2")), ("status", "r9"), 6, "line 1 is not whole"),
    Thing("a link to nothing for a run", _run("r9", _link_to("nothing")), ("status", "r9"), 6, "it has no events.ndjson"),
    Thing("a link to itself for a run", _run("r9", _loop), ("status", "r9"), 6, "Too many levels of symbolic links"),
    Thing("a date that is none", _run("20269999-999999-aaaa"), _LIST, 0, "DAMAGED"),
    Thing("a file for the live markers", lambda home: _replace(home.live, lambda path: Path(path).touch()), _LIST, 0, "r2"),
    # In the place of attempts.
    Thing("a file for the attempts", _attempts(lambda path: Path(path).touch()), _STATUS, 6,
          "attempts cannot be looked into"),
    Thing("a FIFO for the attempts", _attempts(os.mkfifo), _STATUS, 6, "attempts cannot be looked into"),
    Thing("a link to itself for the attempts", _attempts(_loop), _STATUS, 6, "attempts cannot be looked into"),
    Thing("the same, listed", _attempts(_loop), _LIST, 0, "r2"),
    Thing("no attempts", _attempts(lambda path: None), _STATUS, 0, "FAILED"),
    Thing("an attempt too many", _attempt("1-a.2.status"), _STATUS, 6,
          "attempts/1-a.2.status exists, but the log ends before"),
    Thing("an attempt of no step", _attempt("99-x.1.out"), _STATUS, 6,
          "attempts/99-x.1.out exists, but the log ends before"),
    Thing("a name that is no attempt's", _attempt("1-a.2.bak"), _STATUS, 0, "FAILED"),
    Thing("a number that no step has", _attempt("9999999999-a.1.out"), _STATUS, 0, "FAILED"),
    # In the place of what steps printed.
    Thing("a FIFO for an output", _attempt("1-a.1.out", os.mkfifo), _LOGS, 0, ""),
    Thing("a directory for an output", _attempt("1-a.1.out"), _LOGS, 0, ""),
    Thing("a link to itself for an output", _attempt("1-a.1.out", _loop), _LOGS, 0, ""),
    # In the place of the daemon's own files.
    Thing("a lock nested without end", _lock(b"[" * 100_000), _STATUS, 0, "FAILED"),
    Thing("a lock that is no object", _lock(b"null"), _STATUS, 0, "FAILED"),
    Thing("NUL in the address", _lock(b'{"socket":"a\\u0000b","pid":1}'), _STATUS, 0, "FAILED"),
    Thing("a surrogate in the address", _lock(b'{"socket":"\\ud800","pid":true}'), _STATUS, 0, "FAILED"),
    Thing("an address that is too long", _lock(b'{"socket":"/%b"}' % (b"x" * 5_000)), _STATUS, 0, "FAILED"),
    Thing("an address that is a number", _lock(b'{"socket":7,"pid":"x"}'), ("daemon", "status"), 4, "no daemon is running"),
    Thing("an address that is a file", _lock(b'{"socket":"/bin/sh"}'), ("daemon", "status"), 4, "no daemon is running"),
    Thing("a FIFO for the lock", lambda home: os.mkfifo(home.lock), ("daemon", "status"), 4, "no daemon is running"),
    Thing("a FIFO for the lock, at a stop", lambda home: os.mkfifo(home.lock), ("daemon", "stop"), 0,
          "no daemon was running"),
    Thing("a directory for the lock", lambda home: os.mkdir(home.lock), _STATUS, 0, "FAILED"),
    Thing("a file for the socket", _socket(lambda path: Path(path).touch()), _STATUS, 0, "FAILED"),
    Thing("a FIFO for the socket", _socket(os.mkfifo), _STATUS, 0, "FAILED"),
    Thing("a socket of nobody", _socket(bind), _STATUS, 0, "FAILED"),
    Thing("a link to itself for the socket", _socket(_loop), _STATUS, 0, "FAILED"),
    Thing("a FIFO for the daemon's log", lambda home: os.mkfifo(home.log), ("run", "{file}"), 4, "cannot be started"),
    Thing("a directory for the daemon's log", lambda home: os.mkdir(home.log), ("run", "{file}"), 4, "cannot be started"),
    Thing("a home of another owner", lambda home: _give_away(home.directory), ("run", "{file}"), 4,
          "belongs to another user",
          needs_root=True),
)  # fmt: skip
