"""Hostile input for a daemon, carried out: the tables of hostile_frames.py against real ones.

One daemon gets all frames, one takes over all odd files, one all odd status files. Each has runs of its own meanwhile,
which must go on, and it must be the same process at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests import logs
from tests.daemon import MARK, ROOT, Client, Daemon, Refused, step, until
from tests.hostile_frames import FRAMES, STATUSES, TAKEN_OVER, Frame, Status
from tests.logs import Log
from wfd import machine, process, protocol
from wfd.events import Line
from wfd.paths import AttemptFiles
from wfd.requests import Environment

Result = tuple[str, str]


# -- frames ------------------------------------------------------------------------------------------------------------


def frames() -> Iterator[Result]:
    """Each line on a connection of its own, and a good request behind it."""
    with Daemon() as daemon:
        daemon.wait_for(daemon.submit(step("a", "true"), run_id="over"))
        daemon.submit(step("a", until("go")), run_id="live")
        assert daemon.process is not None
        pid = daemon.process.pid
        for frame in FRAMES:
            with daemon.connect() as client:
                try:
                    yield frame.name, _answered(client, frame)
                except (OSError, EOFError, ValueError) as error:
                    yield frame.name, f"{error!r}\n{daemon.explain()}"
        daemon.touch("go")
        yield "the run that went on meanwhile", _unless(daemon.wait_for("live").state, "SUCCEEDED")
        yield "the runs that there are", _unless(daemon.run_ids(), ["live", "over"])
        yield "the daemon itself", _unless(daemon.request("hello", protocol_min=1, protocol_max=1)["pid"], pid)
        yield "what the daemon said", _unless("Traceback" in daemon.log(), False)


def _unless(found: object, expected: object) -> str:
    return "" if found == expected else f"{found!r}, not {expected!r}"


def _answered(client: Client, frame: Frame) -> str:
    """What is wrong with the answers to a frame and to the good request behind it."""
    client.send(frame.line + b"\n" + protocol.request("list", {}, "next"))
    answers: list[dict[str, Any]] = []
    while not answers or answers[-1].get("id") != "next":
        message = client.message()
        # The events of a watch are no answers.
        if "method" not in message:
            answers.append(message)
    *own, last = answers
    if "result" not in last:
        return f"the next request is answered with {last}"
    if frame.code is None:
        return f"a notification is answered with {own}" if own else ""
    if len(own) != 1 or own[0]["id"] != frame.id or own[0].get("jsonrpc") != "2.0":
        return f"{len(own)} answers: {str(own)[:300]}"
    error = own[0].get("error", {"code": 0, "message": str(own[0].get("result"))})
    if error["code"] != frame.code or frame.words not in error["message"]:
        return f"{str(error)[:300]}, not {frame.code} with {frame.words!r}"
    # The problems of a definition are told one a line.
    is_plain = "\n" not in error["message"] or frame.code == protocol.INVALID_DEFINITION
    return "" if is_plain else "a message of several lines"


# -- take-over ---------------------------------------------------------------------------------------------------------


def unfinished(daemon: Daemon, run_id: str, log: Log) -> None:
    """A run in the home of a daemon that is not started yet, as an earlier one has left it. Its log is of this boot."""
    files = logs.save(daemon.home, log.data, run_id)
    env = {"PATH": os.environ.get("PATH", os.defpath), MARK: daemon.mark}
    Path(files.environment).write_bytes(Environment(env, 0o022, {}).encode())
    Path(f"{daemon.home.live}/{run_id}").touch()


def begun(run_id: str) -> Log:
    """One step that may be tried twice, and a daemon of this boot that has taken the run over."""
    workflow = logs.workflow(logs.step("a", grace_sec=0), cwd="/")
    return Log(workflow, run_id).write(logs.session(machine.boot_id()))


@contextlib.contextmanager
def _unstarted() -> Iterator[Daemon]:
    """A daemon that has its home and is not started yet."""
    daemon = Daemon()
    try:
        os.mkdir(daemon.home.directory, 0o700)
        logs.home(daemon.home.directory)
        yield daemon
    finally:
        daemon.clean()


def taken_over() -> Iterator[Result]:
    """Each odd file in a run of its own, all of them taken over at one start."""
    with _unstarted() as daemon:
        rows = [row for row in TAKEN_OVER if not row.needs_root or os.geteuid() == 0]
        for number, row in enumerate(rows):
            unfinished(daemon, f"r{number}", begun(f"r{number}"))
            row.put(daemon.home, f"r{number}")
        before = {f"r{number}": logs.contents(daemon.home.run(f"r{number}").directory) for number in range(len(rows))}
        # A marker of a run that never was, which cannot be removed.
        os.mkdir(f"{daemon.home.live}/nobody")
        daemon.start()
        for number, row in enumerate(rows):
            run_id = f"r{number}"
            if row.words:
                daemon.damaged.add(run_id)
                yield row.name, _refused(daemon, run_id, row.words) or _unless(
                    logs.contents(daemon.home.run(run_id).directory), before[run_id]
                )
            else:
                yield row.name, _unless(daemon.wait_for(run_id).state, "SUCCEEDED")
        yield "a run that comes later", _unless(daemon.wait_for(daemon.submit(step("a", "true"))).state, "SUCCEEDED")
        daemon.restart()
        yield "another daemon", _unless(daemon.wait_for(daemon.submit(step("a", "true"))).state, "SUCCEEDED")
        daemon.check()


def _refused(daemon: Daemon, run_id: str, words: str) -> str:
    try:
        return f"it is told: {daemon.request('status', run_id=run_id)}"
    except Refused as error:
        is_right = error.code == protocol.DAMAGED and words in error.message and "\n" not in error.message
        return "" if is_right else f"refused with {error}, not with {words!r}"


# -- status files ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process group of somebody else's."""
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _put(path: str, row: Status, pid: int) -> None:
    if isinstance(row.content, bytes):
        Path(path).write_bytes(row.content.replace(b"{pid}", b"%d" % pid))
    else:
        row.content(path)


def statuses_alone() -> Iterator[Result]:
    """What process.py makes of each status file whose lock is free."""
    kinds = {"attempt_exited": "exited", "attempt_lost": "lost", "attempt_not_started": "not_started"}
    for row in STATUSES:
        with TemporaryDirectory(prefix="wfd-hostile-") as base:
            files = AttemptFiles(f"{base}/1.out", f"{base}/1.status", f"{base}/1.sh")
            _put(files.status, row, 4_242)
            outcome = process.outcome_of(process.probe(files), is_ending=False, rebooted=False, exit=None)
        expected = process.Outcome(kinds[row.event], **row.fields)  # type: ignore[arg-type]
        yield f"{row.name}, alone", _unless(outcome._replace(detail="", usage=None), expected)


def statuses(root: str = ROOT) -> Iterator[Result]:
    """Each odd status file in a run of its own; the daemon finds all of them at its start. A stranger whose pid they name
    must never be signalled, not even where the lock is held and the run is cancelled. root: where the program lies."""
    with _stranger() as stranger, _unstarted() as daemon:
        daemon.root = root
        for number, row in enumerate(STATUSES):
            _leave(daemon, f"r{number}", row, stranger.pid)
        held = _leave(daemon, "held", Status("", b"status 1\npid {pid}\n", "", {}), stranger.pid)
        with open(held.status, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            daemon.start()
            # TERM and, without a grace, KILL are sent before it is answered.
            daemon.request("cancel", run_id="held", request="q")
            for number, row in enumerate(STATUSES):
                daemon.wait_for(f"r{number}")
                yield row.name, _told(daemon.events(f"r{number}"), row)
        yield "a cancel when its lock is free", _unless(daemon.wait_for("held").state, "CANCELLED")
        yield "the stranger", _unless(stranger.poll(), None)
        daemon.check()


def _leave(daemon: Daemon, run_id: str, row: Status, pid: int) -> AttemptFiles:
    """A run whose attempt 1 runs, as its log says, with this status file."""
    unfinished(daemon, run_id, begun(run_id).start("a"))
    files = daemon.home.run(run_id).attempt(1, "a", 1)
    _put(files.status, row, pid)
    return files


def _told(lines: list[Line], row: Status) -> str:
    event = next((line.event for line in lines if line.event.name.startswith("attempt_")), None)
    found: Mapping[str, object] = {} if event is None else {name: getattr(event, name, None) for name in row.fields}
    return _unless((getattr(event, "name", None), found), (row.event, row.fields))
