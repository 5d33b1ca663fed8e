"""The wire: find the daemon, start it when need be, ask it.

Rules
* `connect` answers None when nobody does: a refused or missing socket, a lock file that says nothing, all the same.
  Who is at the address must run under our own uid, or is not spoken to.
* Whoever changes something (`command`) starts a daemon when none answers; whoever only asks (`ask`) does not, and reads
  the log instead (history.py).
* A started daemon gets one end of a socketpair as a connection with the request in it, so that it decides the request
  before it starts any step. End of file instead of an answer means that another daemon won the home's lock. Repeating a
  request changes nothing (it carries an id of ours), so the answer to every silence is to send it again.

Start-up time is most of what a client costs, so what only some calls need is imported where it is needed.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from wfctl.errors import (
    DaemonUnavailable,
    InvalidRequest,
    InvalidWorkflow,
    NoSuchRun,
    RunDamaged,
    WorkflowError,
)
from wfd import protocol
from wfd.paths import Home, default_home, is_run_id, runtime_directory
from wfd.protocol import ProtocolError

TYPE_CHECKING = False  # As in typing, whose import costs a tenth of a whole `status`.
if TYPE_CHECKING:
    from typing import Self

# A log of the daemon's talk that is longer is put aside before the next daemon starts, so that two of them are kept.
MAX_LOG_BYTES = 1 << 20
# How long to go on when no daemon stays up long enough to answer. A cold start takes a tenth of a second, and folding a
# home full of live runs a few.
START_DEADLINE_SEC = 15.0
# A daemon that is there but says nothing for so long is stopped or hung. Taking in 100,000 steps needs a few seconds.
ANSWER_DEADLINE_SEC = 60.0
# Whoever only asks has the log to fall back to, so it waits no longer than a person would believe in an answer.
QUESTION_DEADLINE_SEC = 5.0
# A daemon that owns the home and is not to be reached may be one that starts or ends, which takes it less than this.
SETTLE_SEC = 2.0
# A deadline that has all but passed still leaves a daemon the time to answer, if it can.
_MIN_ANSWER_SEC = 0.05
# A full backlog refuses at once; it is emptied once a turn of the daemon's loop.
CONNECT_DEADLINE_SEC = 5.0
# A daemon that ends at once while nobody holds the lock has not lost a race: it cannot start. Once may be an accident.
MAX_FAILED_STARTS = 3
# Between two looks at a daemon that is not there: from the time it needs to start up to what a person does not notice.
FIRST_DELAY_SEC, MAX_DELAY_SEC = 0.02, 1.0
# A daemon that a client started ends by itself when it had nothing to do for so long.
IDLE_EXIT_SEC = 900
_RECEIVE_BYTES = 1 << 18
# A daemon's lock file has some hundred bytes.
_MAX_LOCK_BYTES = 1 << 16
# What a service manager told us is not meant for a daemon that outlives us. Nor shall one that is started in a step of
# another home be taken for a part of that step, and be ended with it.
_NOT_INHERITED = (
    "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES",
    "WFD_WORKFLOW_ID", "WFD_RUN_ID", "WFD_STEP_ID", "WFD_ATTEMPT",
)  # fmt: skip


class Gone(DaemonUnavailable):
    """The daemon closed the connection, or died, before it answered."""


class Silent(DaemonUnavailable):
    """There is a daemon, but it says nothing: stopped, or hung."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"{owner} does not answer: is it stopped?")


class Refused(DaemonUnavailable):
    """The daemon cannot do it now: the disk is full, the system refuses."""


class ReadTheLog(WorkflowError):
    """The daemon leaves this question to whoever asks it: the answer is in the log."""


def current_home() -> Home:
    """The home that the environment names."""
    home = default_home(os.environ, sys.platform, os.path.expanduser("~"))
    return Home(home.rstrip("/") or "/")


class Connection:
    """One conversation with the daemon. `owner` is how messages call it; it has `answer_sec` for each answer. `greeting` is
    what it has said of itself, if it was greeted."""

    def __init__(self, sock: socket.socket, owner: str, answer_sec: float = ANSWER_DEADLINE_SEC) -> None:
        self._socket = sock
        self._owner = owner
        self._answer_sec = answer_sec
        self._received = bytearray()
        self._searched = 0
        self.greeting: dict[str, object] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def ask(self, method: str, params: dict[str, object]) -> dict[str, object]:
        """Send a request and wait for its answer. Raises Gone, DaemonUnavailable, and what the daemon refuses with."""
        self.send(protocol.request(method, params))
        return self.answer()

    def send(self, line: bytes) -> None:
        """Send a request's line. A peer that has hung up may have said why: that is left for `answer` to find out."""
        self._socket.settimeout(self._answer_sec)
        try:
            self._socket.sendall(line)
        except TimeoutError:
            raise Silent(self._owner) from None
        except OSError:
            pass

    def answer(self) -> dict[str, object]:
        """The answer to the request that was sent."""
        line = self.receive(self._answer_sec)
        if line is None:
            raise Silent(self._owner)
        message = parse(line)
        if "error" in message:
            raise _refusal(message["error"])
        result = message.get("result")
        if not isinstance(result, dict):
            raise DaemonUnavailable("the daemon gave an answer that is none: is it another version?")
        return result

    def receive(self, timeout_sec: float | None) -> bytes | None:
        """The next line, without its newline; None when none came in time. Raises Gone."""
        received = self._received
        deadline = None if timeout_sec is None else time.monotonic() + timeout_sec
        while (end := received.find(b"\n", self._searched)) < 0:
            self._searched = len(received)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                return None
            except OSError:
                data = b""
            if not data:
                raise Gone("the daemon closed the connection")
            received += data
        line = bytes(received[:end])
        del received[: end + 1]
        self._searched = 0
        return line


def parse(line: bytes) -> dict[str, object]:
    """What the daemon says in a line: a reply or a notification. Raises DaemonUnavailable when it is neither."""
    try:
        return protocol.parse_message(line)
    except ProtocolError as error:
        raise DaemonUnavailable(f"the daemon's answer cannot be read: {error}") from None


def _refusal(error: object) -> WorkflowError:
    """A daemon's error as one of ours."""
    record = error if isinstance(error, dict) else {}
    code, message, data = record.get("code"), str(record.get("message")), record.get("data")
    if code == protocol.INVALID_DEFINITION:
        found = data.get("problems", ()) if isinstance(data, dict) else ()
        return InvalidWorkflow(message, tuple((str(one["path"]), str(one["message"])) for one in found))
    if code == protocol.SHUTTING_DOWN:
        return Gone(message)
    return _REFUSALS.get(code, DaemonUnavailable)(message)


_REFUSALS: dict[object, type[WorkflowError]] = {
    protocol.NO_SUCH_RUN: NoSuchRun,
    protocol.DAMAGED: RunDamaged,
    protocol.STALLED: Refused,
    protocol.RUN_EXISTS: InvalidRequest,
    protocol.NOT_FINISHED: InvalidRequest,
    protocol.INVALID_PARAMS: InvalidRequest,
    protocol.READ_THE_LOG: ReadTheLog,
}


# -- finding the daemon ------------------------------------------------------------------------------------------------


def connect(home: Home, answer_sec: float | None = None) -> Connection | None:
    """A greeted connection to the home's daemon, or None when nobody answers. It has `answer_sec` for each answer, by
    default as long as an order may take.

    Raises Silent when somebody is there who says nothing, and DaemonUnavailable when somebody is who is not to be spoken
    to: another user, another protocol."""
    answer_sec, owner = ANSWER_DEADLINE_SEC if answer_sec is None else answer_sec, _owner(home)
    for path in _addresses(home):
        sock = _open_socket(path, min(answer_sec, CONNECT_DEADLINE_SEC), owner)
        if sock is not None:
            connection = Connection(sock, owner, answer_sec)
            try:
                connection.greeting = connection.ask("hello", HELLO)
            except Gone:
                connection.close()
                continue
            except WorkflowError:
                connection.close()
                raise
            return connection
    return None


HELLO: dict[str, object] = {"protocol_min": protocol.PROTOCOL_MIN, "protocol_max": protocol.PROTOCOL_MAX}


def _addresses(home: Home) -> Iterator[str]:
    """Where the daemon may listen: what its lock file says, which may be stale, then the home's own socket."""
    named = _read_lock(home).get("socket")
    own = home.socket(runtime_directory(os.environ, os.getuid()))
    if isinstance(named, str) and named != own:
        yield named
    yield own


def _owner(home: Home) -> str:
    """The daemon as messages call it."""
    pid = _read_lock(home).get("pid")
    return f"the daemon (pid {pid})" if isinstance(pid, int) else "the daemon"


def has_crashed(home: Home) -> bool:
    """Has the last daemon ended without a farewell? An orderly end takes the pid out of the lock file."""
    return "pid" in _read_lock(home) and not _is_locked(home)


def _read_lock(home: Home) -> dict[str, object]:
    try:
        with open(home.lock, "rb", opener=open_at_once) as file:
            record = json.loads(file.read(_MAX_LOCK_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def open_at_once(path: str, flags: int) -> int:
    """As open() does, but without waiting for somebody to write into a FIFO that lies in the place of the file."""
    return os.open(path, flags | os.O_NONBLOCK)


def _open_socket(path: str, wait_sec: float, owner: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline, delay = time.monotonic() + wait_sec, FIRST_DELAY_SEC
    # Non-blocking, since connecting to a full backlog would otherwise wait for ever.
    sock.setblocking(False)
    try:
        while True:
            try:
                sock.connect(path)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Silent(owner) from None
                time.sleep(delay)
        if _peer_uid(sock) != os.geteuid():
            raise DaemonUnavailable(f"the socket {path} belongs to another user's process; it was not spoken to")
    except (OSError, ValueError):
        # ValueError: the lock file names an address that no socket can have.
        sock.close()
        return None
    except DaemonUnavailable:
        sock.close()
        raise
    return sock


def _peer_uid(sock: socket.socket) -> int:
    """The effective uid of the process at the other end, as the kernel has it."""
    if sys.platform == "darwin":
        # struct xucred of <sys/ucred.h>: version, uid, ngroups, groups[16]; SOL_LOCAL is 0, LOCAL_PEERCRED 1.
        return int(struct.unpack("2Ih16I", sock.getsockopt(0, 1, struct.calcsize("2Ih16I")))[1])
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[1])


def patience_sec(deadline_sec: float | None) -> float:
    """How long to wait for the answer to a question, by the deadline (of the monotonic clock) of whoever asks."""
    if deadline_sec is None:
        return QUESTION_DEADLINE_SEC
    return min(QUESTION_DEADLINE_SEC, max(_MIN_ANSWER_SEC, deadline_sec - time.monotonic()))


def ignore(text: str) -> None:
    """What a caller does not want to be told."""


def ask(
    home: Home, method: str, params: dict[str, object], say: Callable[[str], None] = ignore
) -> dict[str, object] | None:
    """The answer of the daemon, or None when none answers; `say` is told when there is one that is silent. Starts
    nothing."""
    try:
        return question(home, method, params)
    except Silent as error:
        say(str(error))
        return None


def question(home: Home, method: str, params: dict[str, object]) -> dict[str, object] | None:
    """As `ask`, but a daemon that is silent is not one that is not there: raises Silent."""
    try:
        connection = connect(home, QUESTION_DEADLINE_SEC)
        if connection is None:
            return None
        with connection:
            return connection.ask(method, params)
    except Gone:
        return None


def command(home: Home, method: str, params: dict[str, object]) -> dict[str, object]:
    """The answer of the daemon, which is started when none answers. Raises what `Connection.ask` raises."""
    line = protocol.request(method, params)
    if len(line) > protocol.MAX_FRAME_BYTES:
        raise InvalidRequest(f"the request is {len(line)} bytes long; at most {protocol.MAX_FRAME_BYTES} are allowed")
    deadline, delay, failed_starts = time.monotonic() + START_DEADLINE_SEC, FIRST_DELAY_SEC, 0
    while True:
        connection = connect(home)
        is_ours = connection is None
        try:
            if connection is None:
                connection = start_daemon(home, line)
            else:
                connection.send(line)
            return connection.answer()
        except Refused as error:
            raise DaemonUnavailable(f"{error} (home: {home.directory})") from None
        except Gone:
            # It lost the race for the lock, is just shutting down, or died with our request: ask whoever is next.
            pass
        finally:
            if connection is not None:
                connection.close()
        failed_starts += is_ours and not _is_locked(home)
        if failed_starts >= MAX_FAILED_STARTS or time.monotonic() > deadline:
            raise DaemonUnavailable(f"the daemon cannot be started{_last_words(home)} (see {home.log})")
        time.sleep(delay)
        delay = min(2 * delay, MAX_DELAY_SEC)


def _last_words(home: Home) -> str:
    try:
        with open(home.log, "rb", opener=open_at_once) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
            last = file.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    except OSError:
        return ""
    return f": {last}" if last else ""


def start_daemon(home: Home, line: bytes) -> Connection:
    """A new daemon, and our end of the connection that it is born with, the request already in it.

    Raises DaemonUnavailable when it cannot even be spawned."""
    reap_daemons()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # What fits goes first, so that the daemon finds it; the rest of a long request when somebody reads.
        ours.setblocking(False)
        sent = ours.send(line)
        _spawn(home, theirs.fileno())
    except OSError as error:
        ours.close()
        where = f" ({error.filename})" if error.filename else ""
        raise DaemonUnavailable(f"the daemon cannot be started: {error.strerror}{where}") from None
    except DaemonUnavailable:
        ours.close()
        raise
    finally:
        theirs.close()
    connection = Connection(ours, "the daemon that was started")
    connection.send(line[sent:])
    return connection


# Daemons that this process has started and that have not been waited for: zombies, once they end before us.
_children: set[int] = set()
# The daemon's name for its end of the hand-over.
_HANDOVER_FD = 3


def _spawn(home: Home, theirs: int) -> None:
    import fcntl

    import wfd

    log = _open_log(home)
    # Copies out of the way of 0 to 3, so that no step below overwrites what the next one needs. They stay closed on exec:
    # an inheritable end would also reach a daemon that another thread starts now, and we would never see it closed.
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HANDOVER_FD + 1) for fd in (log, theirs)]
    os.close(log)
    try:
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        # The directory or zip file that the package was found in, so that the daemon is of the same version.
        environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(wfd.__file__)))
        # -S: it needs nothing of this machine's site-packages, whose hooks may take longer than all the rest of its start.
        arguments = [
            sys.executable, "-P", "-S", "-m", "wfd",
            "--home", home.directory, "--handover-fd", str(_HANDOVER_FD), "--idle-exit-sec", str(IDLE_EXIT_SEC),
        ]  # fmt: skip
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, sources[0], 1),
            (os.POSIX_SPAWN_DUP2, sources[0], 2),
            (os.POSIX_SPAWN_DUP2, sources[1], _HANDOVER_FD),
        ]
        _children.add(os.posix_spawn(sys.executable, arguments, environ, file_actions=actions, setsid=True, setsigmask=()))
    finally:
        for fd in sources:
            os.close(fd)


def _open_log(home: Home) -> int:
    """Where a daemon's talk goes. Nothing is written into a directory that is not ours."""
    _make_private(home.directory)
    found = os.lstat(home.directory)
    if not stat.S_ISDIR(found.st_mode):
        raise DaemonUnavailable(f"{home.directory} is a symbolic link: set WFD_HOME to the directory itself")
    if found.st_uid != os.geteuid():
        raise DaemonUnavailable(f"{home.directory} belongs to another user: set WFD_HOME to a directory of your own")
    try:
        if os.lstat(home.log).st_size > MAX_LOG_BYTES:
            os.replace(home.log, home.log + ".1")
    except FileNotFoundError:
        pass
    # O_NONBLOCK: a FIFO in its place must not be waited for.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.open(home.log, flags, 0o600)


def _make_private(directory: str) -> None:
    """Make a directory and those that it lies in, as far as they are missing, for us alone: os.makedirs would leave all
    but the last one to the umask, which may be 0."""
    parent = os.path.dirname(directory)
    if parent != directory and not os.path.isdir(parent):
        _make_private(parent)
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        return  # What is there is looked at by whoever wants to use it.


def reap_daemons() -> None:
    """Wait for those daemons that this process started and that have ended; a long-lived caller would keep zombies."""
    for pid in list(_children):
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        except ChildProcessError:
            pass
        _children.discard(pid)


def greet(home: Home) -> dict[str, object]:
    """What the daemon says of itself; it is started when none answers."""
    return command(home, "hello", HELLO)


def stop_daemon(home: Home, cancel_runs: bool) -> bool:
    """Ask the daemon to end and wait until it has. False when none was there. Raises what `Connection.ask` raises."""
    connection = find(home)
    if connection is None:
        return False
    pid = connection.greeting.get("pid")
    with connection:
        try:
            connection.ask("shutdown", {"cancel_runs": cancel_runs})
            while connection.receive(None) is not None:
                pass
        except Gone:
            pass
    # The next daemon may have the lock before we look: its pid is another. One that ends takes its own out of the file.
    while _is_locked(home) and _read_lock(home).get("pid", pid) == pid:
        time.sleep(FIRST_DELAY_SEC)
    reap_daemons()
    return True


def hello(home: Home) -> dict[str, object] | None:
    """What the daemon says of itself, or None where none lives. Raises what `find` raises."""
    connection = find(home, QUESTION_DEADLINE_SEC)
    if connection is None:
        return None
    with connection:
        return connection.greeting


def find(home: Home, answer_sec: float | None = None) -> Connection | None:
    """As `connect`, but None only where no daemon lives. Raises DaemonUnavailable also when one lives that nobody can
    reach."""
    deadline = time.monotonic() + SETTLE_SEC
    while (connection := connect(home, answer_sec)) is None and _is_locked(home):
        if time.monotonic() > deadline:
            pid, socket_path = (_read_lock(home).get(name) for name in ("pid", "socket"))
            raise DaemonUnavailable(
                f"{_owner(home)} owns {home.directory}, but nobody listens at {socket_path}: was that file removed? "
                f"End the daemon with `kill {pid}`; its steps go on, and the next command starts another"
            )
        time.sleep(FIRST_DELAY_SEC)
    return connection


def _is_locked(home: Home) -> bool:
    """Does a daemon live? Its pid would not tell: where nobody reaps, the dead keep theirs."""
    import fcntl

    try:
        with open(home.lock, "rb", opener=open_at_once) as file:
            # Shared, and let go of at once. A daemon that starts in this instant finds it taken; its client asks again.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


# -- what is asked -----------------------------------------------------------------------------------------------------


def resolve(home: Home, text: str) -> str:
    """The run that is meant: as history.resolve finds it on disk, or one that the daemon still has though somebody has
    deleted its directory. Raises NoSuchRun."""
    from wfctl import history

    if not isinstance(text, str):
        raise InvalidRequest(f"a run is named by a string, not by {type(text).__name__}")
    try:
        return history.resolve(home, text)
    except NoSuchRun:
        answer = ask(home, "list", {}) if is_run_id(text) else None
        found = answer["runs"] if answer is not None else []
        if isinstance(found, list) and any(run["run_id"] == text for run in found):
            return text
        raise


def status(home: Home, run_id: str, say: Callable[[str], None] = ignore) -> dict[str, object]:
    """The run's state as `status --json` prints it, from the daemon or else from the log ("source" tells which; `say`
    is told when there is a daemon that is silent). Raises NoSuchRun, RunDamaged, DaemonUnavailable."""
    stalled = None
    try:
        found = ask(home, "status", {"run_id": run_id}, say)
    except ReadTheLog:
        found = None
    except Refused as error:
        # The daemon has not been able to take the run over. What became of it meanwhile nobody has written.
        found, stalled = None, str(error)
    if found is not None:
        return found
    from wfctl import history

    return {**history.status(home, run_id), "stalled": stalled}


def new_run_id(home: Home) -> str:
    """A fresh id: the time of day, so that ids sort by it, and four random characters for runs of the same second."""
    while True:
        tail = "".join(_ID_CHARS[byte % len(_ID_CHARS)] for byte in os.urandom(4))
        run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + tail
        if not os.path.lexists(home.run(run_id).directory):
            return run_id


_ID_CHARS = "abcdefghijklmnopqrstuvwxyz0123456789"


def as_sent(path: str) -> str:
    """A path as a request holds it: its bytes as UTF-8, whatever encoding this process runs under. Bytes that are no
    UTF-8 travel as lone surrogates."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def current_directory() -> str:
    """The current directory, as a request holds it. Raises InvalidRequest when it has been removed."""
    try:
        return os.getcwdb().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        raise InvalidRequest("the current directory does not exist any more; change to one that does") from None


def submission_environment() -> dict[str, object]:
    """What a command inherits from the one who submits it: environment, umask and soft limits."""
    import resource

    umask = os.umask(0o077)
    os.umask(umask)
    limits: dict[str, object] = {}
    for name in ("nofile", "core", "fsize", "cpu", "stack", "data"):
        soft = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[0]
        limits[name] = -1 if soft == resource.RLIM_INFINITY else soft
    # Bytes that are no UTF-8 travel as lone surrogates, whatever encoding this process runs under.
    env = {
        name.decode("utf-8", "surrogateescape"): value.decode("utf-8", "surrogateescape")
        for name, value in os.environb.items()
    }
    return {"env": env, "umask": umask, "limits": limits}


def submit(home: Home, run_id: str, document: Mapping[str, object], base_dir: str) -> dict[str, object]:
    """Hand a workflow over. Returns {"run_id", "workflow_id", "state", "created"} once the run is durable."""
    params: dict[str, object] = {
        "run_id": run_id,
        "definition": dict(document),
        "base_dir": base_dir,
        "cwd": current_directory(),
        "environment": submission_environment(),
    }
    return command(home, "submit", params)


def cancel(home: Home, run_id: str) -> dict[str, object]:
    """Ask for the end of a run. Returns {"run_id", "state"} once the request is durable."""
    try:
        return command(home, "cancel", {"run_id": run_id, "request": os.urandom(8).hex()})
    except ReadTheLog:
        # It is over, and there is nothing to cancel.
        from wfctl import history

        return {"run_id": run_id, "state": history.status(home, run_id)["state"]}


def retry(home: Home, run_id: str) -> dict[str, object]:
    """Ask for another try of what did not succeed in a run that is over. Returns {"run_id", "state"}."""
    return command(home, "retry", {"run_id": run_id, "request": os.urandom(8).hex()})
