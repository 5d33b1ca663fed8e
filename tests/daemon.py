"""A real daemon for a test: in a home of its own, driven over its socket without wfctl.

    with Daemon() as daemon:
        run_id = daemon.submit(step("a", "true"))
        assert daemon.wait_for(run_id).state == "SUCCEEDED"

Rules
* Nothing here sleeps to let time pass: it waits for a condition, with a deadline that only a fault reaches.
* What a test started carries a mark of this one Daemon in its environment (MARK), so it is found and ended whatever
  happens; where the system shows no environments, the groups named in the status files are looked at instead.
* When the block ends well, `check` proves two things about all runs of the home: each log replays without difference,
  and nothing of a finished run is alive. A test that damages a run on purpose names it in `damaged`.
* What needs no fresh daemon takes the one that the tests of its module share (`shared`): a start costs more than most of
  what they do with it.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, Self, TypeVar

from wfd import decide, journal, process, protocol
from wfd.events import Line
from wfd.journal import Damaged
from wfd.paths import Home, is_run_id, runtime_directory
from wfd.state import END_STATES, Run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# In the environment of the daemon and of every step: which Daemon of which test they belong to.
MARK = "WFD_TEST"
# Only a fault reaches this. Two copies of the tests on a slow machine do not.
DEADLINE_SEC = 120
_POLL_SEC = 0.005
_HAS_PROC = os.path.exists("/proc/self/environ")

# resource.prlimit, which only Linux has: who needs it elsewhere is skipped.
prlimit: Any = getattr(resource, "prlimit", None)

T = TypeVar("T")


def others_may_enter(path: str) -> bool:
    """May any user reach what lies in this directory? A private TMPDIR shuts out those that root can become."""
    while True:
        if not os.stat(path).st_mode & stat.S_IXOTH:
            return False
        if path == "/":
            return True
        path = os.path.dirname(os.path.abspath(path))


class Refused(Exception):
    """The daemon answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code: int = error["code"]
        self.message: str = error["message"]
        self.data: Any = error.get("data")


def step(id: str, command: str, *depends_on: str, **fields: object) -> dict[str, object]:
    """A step as a user writes it."""
    return {"id": id, "command": command, "depends_on": list(depends_on), **fields}


def wait_until(condition: Callable[[], T], what: str, explain: Callable[[], str] = str) -> T:
    """The first true value of the condition. Raises AssertionError, with the explanation, when none comes."""
    deadline = time.monotonic() + DEADLINE_SEC
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {DEADLINE_SEC} s in vain for {what}\n{explain()}")
        time.sleep(_POLL_SEC)


@contextmanager
def deadline() -> Iterator[None]:
    """End what would otherwise wait for ever."""

    def end(number: int, frame: object) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(DEADLINE_SEC)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.socket.settimeout(DEADLINE_SEC)
        self._file = sock.makefile("rb")
        self._serial = 0

    @classmethod
    def connect(cls, address: str) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(DEADLINE_SEC)
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def line(self) -> bytes:
        """The next line, b"" at the end."""
        return self._file.readline()

    def message(self) -> dict[str, Any]:
        """The next message. Raises EOFError at the end."""
        line = self.line()
        if not line:
            raise EOFError("the daemon has closed the connection")
        return json.loads(line)  # type: ignore[no-any-return]

    def request(self, method: str, **params: object) -> dict[str, Any]:
        """Ask, and wait for the answer; notifications that come before it are dropped. Raises Refused, EOFError."""
        self._serial += 1
        self.send(protocol.request(method, params, self._serial))
        while True:
            message = self.message()
            if message.get("id") == self._serial:
                return _result(message)

    def events(self) -> Iterator[dict[str, Any]]:
        """The lines of the log that a watch brings, until the connection ends."""
        while True:
            try:
                message = self.message()
            except (EOFError, ConnectionError):
                return
            if message.get("method") == "event":
                yield message["params"]["line"]

    def seqs(self, count: int) -> list[int]:
        """Of the next events, as many of them."""
        return [event["seq"] for event in islice(self.events(), count)]

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _result(message: dict[str, Any]) -> dict[str, Any]:
    if "error" in message:
        raise Refused(message["error"])
    return message["result"]  # type: ignore[no-any-return]


def until(name: str) -> str:
    """A command that goes on as soon as a file of this name exists."""
    return f"while [ ! -e {name} ]; do sleep 0.01; done"


class Daemon:
    """A daemon in a home of its own. The constructor makes the directories; `clean`, or the end of a `with`, removes them.

    directory   where its steps run, unless the test says otherwise      home     the paths of its home
    process     the daemon's process, None while it is down              damaged  runs that `check` leaves out
    flags       of its command line                                      environ  what it is started with
    program     what Python is told to run                           root     where that lies
    wrapper     what runs that Python, and keeps its pid
    """

    # -S as wfctl starts it.
    program: tuple[str, ...] = ("-S", "-m", "wfd")
    wrapper: tuple[str, ...] = ()
    root = ROOT

    def __init__(self, *flags: str, home: str = "home", environ: Mapping[str, str] | None = None) -> None:
        """home: its name below a fresh directory."""
        self.base = tempfile.mkdtemp(prefix="wfd-test-")
        self.mark = secrets.token_hex(8)
        self.home = Home(f"{self.base}/{home}")
        self.directory = f"{self.base}/work"
        self.flags = flags
        # A runtime directory of our own, for homes whose socket does not fit into them.
        os.mkdir(f"{self.base}/run", 0o700)
        os.mkdir(self.directory)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("WFD_")}
        self.environ = {
            **inherited, "WFD_HOME": self.home.directory, "XDG_RUNTIME_DIR": f"{self.base}/run", MARK: self.mark,
            **(environ or {}),
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.damaged: set[str] = set()
        self._client: Client | None = None
        self._others: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.clean()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.clean()

    # -- its life -------------------------------------------------------------------------------------------------

    def start(self, *flags: str) -> None:
        """Start it and wait until it answers. flags: more of them, for this start only."""
        self.await_answer(self.spawn(*flags))

    def await_answer(self, process: subprocess.Popen[bytes]) -> None:
        """Take this one for the daemon, and wait until it answers."""
        self.process = process
        wait_until(self._answers, "the daemon's answer", self.explain)

    def spawn(self, *flags: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        """Start a daemon process for this home, and wait for nothing."""
        with open(self.stderr, "ab") as stderr:
            started = subprocess.Popen(
                [*self.wrapper, *self.interpreter(), *self.program, *self.flags, *flags],
                cwd=self.root, env=self.environ, pass_fds=pass_fds, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
            )  # fmt: skip
        self._others.append(started)
        return started

    def interpreter(self) -> list[str]:
        """What runs `program`."""
        return [sys.executable]

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}\n{self.explain()}")
        try:
            with self.connect() as client:
                return bool(client.request("hello", protocol_min=1, protocol_max=1)["pid"] == self.process.pid)
        except (OSError, EOFError):
            return False

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.ended()

    def stop(self) -> int:
        """Ask it to end (SIGTERM), which leaves its steps alone. Returns its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.ended()

    def ended(self) -> int:
        """Wait for its end. Returns its exit status."""
        assert self.process is not None
        status = self.process.wait(DEADLINE_SEC)
        self.process = None
        self.hang_up()
        return status

    def hang_up(self) -> None:
        """Close the connection that `request` keeps."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def restart(self) -> None:
        """kill -9, and a new one."""
        if self.process is not None:
            self.kill()
        self.start()

    @property
    def stderr(self) -> str:
        return f"{self.base}/stderr"

    def log(self) -> str:
        """What all daemons of this home have said."""
        with open(self.stderr, encoding="utf-8", errors="replace") as file:
            return file.read()

    def explain(self) -> str:
        """For the message of a failed test."""
        return f"the daemon said:\n{self.log()[-4000:]}" if os.path.exists(self.stderr) else "the daemon said nothing"

    # -- requests -------------------------------------------------------------------------------------------------

    @property
    def socket_path(self) -> str:
        return self.home.socket(runtime_directory(self.environ, os.geteuid()))

    def connect(self) -> Client:
        return Client.connect(self.socket_path)

    def request(self, method: str, **params: object) -> dict[str, Any]:
        """The answer, over one connection that is kept. Raises Refused."""
        if self._client is None:
            self._client = self.connect()
        return self._client.request(method, **params)

    def submit(self, *steps: dict[str, object], run_id: str | None = None, **fields: Any) -> str:
        """Submit these steps; the run id. fields: of the workflow; or of the request, where `submission` knows them."""
        params = self.submission(*steps, run_id=run_id, **fields)
        self.request("submit", **params)
        return str(params["run_id"])

    def submission(
        self,
        *steps: dict[str, object],
        run_id: str | None = None,
        environment: Mapping[str, str] | None = None,
        umask: int = 0o022,
        limits: Mapping[str, int] | None = None,
        directory: str | None = None,
        **fields: object,
    ) -> dict[str, object]:
        """The params of submit. environment, umask, limits, directory: of the submitting client."""
        env = {"PATH": os.environ.get("PATH", os.defpath), MARK: self.mark, **(environment or {})}
        return {
            "run_id": run_id or f"r{secrets.token_hex(6)}",
            "definition": {"workflow_id": "w", "steps": list(steps), **fields},
            "base_dir": directory or self.directory,
            "cwd": directory or self.directory,
            "environment": {"env": env, "umask": umask, "limits": dict(limits or {})},
        }

    def watch(self, run_id: str, from_seq: int = 1) -> Client:
        """A connection that gets the run's events from a seq on."""
        client = self.connect()
        try:
            client.request("watch", run_id=run_id, from_seq=from_seq)
        except BaseException:
            client.close()
            raise
        return client

    # -- what is on disk ------------------------------------------------------------------------------------------

    def run_ids(self) -> list[str]:
        with suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.home.runs) if is_run_id(name))
        return []

    def events(self, run_id: str) -> list[Line]:
        """The run's log as it is now."""
        with journal.open_log(self.home.run(run_id), run_id) as file:
            return list(journal.Reading(file, run_id))

    def names(self, run_id: str) -> list[str]:
        """The names of its events."""
        return [line.event.name for line in self.events(run_id)]

    def fold(self, run_id: str) -> Run:
        return journal.fold(self.home.run(run_id), run_id)[0]

    def states(self, run_id: str) -> dict[str, str]:
        """The state of each step."""
        return {record.step.id: record.state.value for record in self.fold(run_id).steps}

    def output(self, run_id: str, step_id: str, attempt: int = 1) -> str:
        """What an attempt has printed so far."""
        ordinal = self.fold(run_id).index_of[step_id] + 1
        with open(self.home.run(run_id).attempt(ordinal, step_id, attempt).out, encoding="utf-8") as file:
            return file.read()

    def read(self, name: str) -> str:
        """A file in `directory`, "" while there is none."""
        with suppress(FileNotFoundError), open(f"{self.directory}/{name}", encoding="utf-8") as file:
            return file.read()
        return ""

    # -- waiting --------------------------------------------------------------------------------------------------

    def wait_for(self, run_id: str, *states: str) -> Run:
        """Until the run is in one of these states, or in an end state when none is named. The folded log."""
        wanted = states or tuple(state.value for state in END_STATES)

        def is_there() -> Run | None:
            last = journal.last_line(self.home.run(run_id), run_id)
            is_over = last is not None and last.event.name == "run_finished"
            # Folding a long log at each look would slow down what we wait for.
            if not is_over and END_STATES.issuperset(wanted):
                return None
            run = self.fold(run_id)
            return run if run.state in wanted else None

        found = wait_until(is_there, f"run {run_id} to be {' or '.join(wanted)}", lambda: self.story(run_id))
        assert found is not None
        return found

    def wait_until_let_go(self) -> None:
        """Until the daemon has nothing to do with any run. The line that ends a run is in its log a moment before."""
        wait_until(lambda: not os.listdir(self.home.live), "the end of all live markers", self.explain)

    def wait_for_event(self, run_id: str, name: str, count: int = 1, **fields: object) -> Line:
        """The count-th event of this name with these values."""

        def found() -> Line | None:
            lines = [line for line in self.events(run_id) if line.event.name == name and _has(line.event, fields)]
            return lines[count - 1] if len(lines) >= count else None

        line = wait_until(found, f"{name} {fields} of run {run_id}", lambda: self.story(run_id))
        assert line is not None
        return line

    def touch(self, name: str) -> None:
        """Make a file in `directory` that somebody waits for."""
        with open(f"{self.directory}/{name}", "w"):
            pass

    def wait_for_file(self, name: str) -> str:
        """The first whole line of a file in `directory`, without its newline."""
        text = wait_until(lambda: self.read(name).partition("\n")[1] and self.read(name), f"file {name}", self.explain)
        return text.partition("\n")[0]

    def story(self, run_id: str) -> str:
        """For the message of a failed test: the run's log, and what the daemon said."""
        lines = "\n".join(f"{line.seq} {line.mono_ms} {decide.describe(line.event)}" for line in self.events(run_id))
        return f"{lines[-4000:]}\n{self.explain()}"

    # -- processes ------------------------------------------------------------------------------------------------

    def processes(self, run_id: str | None = None) -> list[int]:
        """The live processes of this daemon's steps, all runs together or of one."""
        if not _HAS_PROC:
            return [group for group in self._groups(run_id) if process.group_exists(group)]
        run_mark = b"WFD_RUN_ID=" + (run_id.encode() if run_id else b"")
        return [
            pid
            for pid, variables in self._marked()
            if any(variable == run_mark or (not run_id and variable.startswith(run_mark)) for variable in variables)
        ]

    def _marked(self) -> Iterator[tuple[int, list[bytes]]]:
        mark = f"{MARK}={self.mark}".encode()
        for name in os.listdir("/proc"):
            # A process that ends while we look, or somebody else's, is no concern of ours.
            with suppress(OSError):
                if name.isdigit():
                    with open(f"/proc/{name}/environ", "rb") as file:
                        variables = file.read().split(b"\0")
                    if mark in variables:
                        yield int(name), variables

    def _groups(self, run_id: str | None) -> Iterator[int]:
        for each in [run_id] if run_id else self.run_ids():
            directory = self.home.run(each).attempts
            for name in os.listdir(directory) if os.path.isdir(directory) else []:
                if name.endswith(".status"):
                    with open(f"{directory}/{name}", "rb") as file:
                        for line in file:
                            if line.startswith(b"pid ") and line.endswith(b"\n"):
                                yield int(line[4:])

    # -- the end --------------------------------------------------------------------------------------------------

    def check(self, known: Container[str] = ()) -> None:
        """Every log replays, and nothing of a finished run is alive. known: runs that were checked before.
        Raises AssertionError."""
        for run_id in self.run_ids():
            if run_id in self.damaged or run_id in known:
                continue
            try:
                run, difference = decide.replay(self.events(run_id))
            except Damaged as error:
                raise AssertionError(f"{error}\n{self.explain()}") from None
            assert difference is None, f"run {run_id} does not replay: {difference}\n{self.story(run_id)}"
            if run.is_over:
                alive = self.processes(run_id)
                assert not alive, f"run {run_id} is {run.state}, but {alive} of it live\n{self.story(run_id)}"

    def clean(self) -> None:
        """End the daemon and everything that it has started, and remove the home."""
        self.end_all()
        shutil.rmtree(self.base)

    def end_all(self) -> None:
        """End the daemon and everything that it has started."""
        self.hang_up()
        for other in self._others:
            other.kill()
            other.wait(DEADLINE_SEC)
        wait_until(self._kill_all, "the end of everything that the test has started")

    def _kill_all(self) -> bool:
        pids = [pid for pid, _ in self._marked()] if _HAS_PROC else self.processes()
        for pid in pids:
            with suppress(ProcessLookupError):
                (os.kill if _HAS_PROC else os.killpg)(pid, signal.SIGKILL)
        return not pids


_shared: list[Daemon] = []


@contextmanager
def shared() -> Iterator[Daemon]:
    """A running daemon that earlier tests of the module may have used. It has no live run, and a fresh `directory`. So it
    must be when the block ends, and the runs of the block are checked as at the end of a daemon of its own. A test that
    fails takes the daemon with it."""
    if not _shared:
        _shared.append(Daemon())
        unittest.addModuleCleanup(_end_shared)
    daemon = _shared[0]
    try:
        if daemon.process is None:
            daemon.start()
        known = daemon.run_ids()
        daemon.directory = tempfile.mkdtemp(prefix="work-", dir=daemon.base)
        yield daemon
        daemon.wait_until_let_go()
        daemon.check(known)
    except BaseException:
        _end_shared()
        raise


def _end_shared() -> None:
    while _shared:
        _shared.pop().clean()


def _has(event: object, fields: Mapping[str, object]) -> bool:
    return all(getattr(event, name, None) == value for name, value in fields.items())
