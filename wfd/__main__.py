"""`python -m wfd`: flags, home, lock, sockets, readiness, signals; then the loop.

Exit status: 0 it was asked to end, or had nothing to do for long enough · 2 usage · 4 it cannot start (the home is not
usable, another daemon owns it).

Environment: WFD_HOME, XDG_STATE_HOME (where the home is), XDG_RUNTIME_DIR (sockets of homes with long paths); from a
service manager LISTEN_FDS and LISTEN_PID (socket activation), NOTIFY_SOCKET (readiness), WATCHDOG_USEC.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import os
import platform
import resource
import selectors
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from wfd import VERSION, journal, machine
from wfd.paths import Home, default_home, runtime_directory
from wfd.protocol import PROTOCOL_MAX, PROTOCOL_MIN, request
from wfd.supervisor import Supervisor, log, monotonic_ms, printable, wall

EXIT_CANNOT_START = 4
# fds 8 and 9 are the shim's, 0 to 2 its standard ones: none of ours may lie there, or a DUP2 at a spawn would clobber it.
_LOWEST_FD = 10
# Steps spend most of their time waiting, so more of them than processors pay off.
_PARALLEL_PER_CPU, _PARALLEL_MIN = 4, 32
# Room for a thousand watchers beside the journals of live runs; no more, since some systems pay for what is allowed.
_WANTED_DESCRIPTORS = 8_192
# Hardly anything of ours is part of a cycle, while the parts of a large workflow stay for long: Python's own threshold of
# 700 has it look through all of them again and again.
GC_THRESHOLD = 50_000
# What is in a lock file is shorter, unless somebody else has written it.
_LOCK_BYTES = 4096
# How long a service waits for the daemon that it replaces.
_REPLACE_SEC = 10
# A daemon that is killed while it starts a step leaves a child that has all its descriptors, the lock among them, until it
# execs the shim. It does so within a millisecond, or when the machine has time for it.
_LEFT_SEC = 5
# No number that anybody means has more: a day has eleven in microseconds.
_MAX_DIGITS = 18
# The first descriptor that systemd passes (sd_listen_fds(3)).
_LISTEN_FDS_START = 3

# st_dev and st_ino: which file a path leads to.
_FileId = tuple[int, int]


class CannotStart(Exception):
    """One sentence for the person who started it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the daemon until it is asked to end. Returns the exit status."""
    options = _parse(arguments)
    os.umask(0o077)
    home = Home(options.home or default_home(os.environ, sys.platform, os.path.expanduser("~")))
    try:
        handover = None if options.handover_fd is None else _move_up(options.handover_fd)
        passed = _passed_sockets()
        _close_inherited()
        _occupy_low_descriptors()
        _prepare(home)
        lock = _lock(home, options.replace, passed)
        try:
            _serve(home, lock, options, handover, passed)
        finally:
            os.close(lock)
    except CannotStart as error:
        print(printable(f"wfd: {error}"), file=sys.stderr)
        return EXIT_CANNOT_START
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="wfd",
        description="The workflow daemon: owns the runs of one home. Usually wfctl starts it; a service manager may.",
        epilog="Environment: WFD_HOME or XDG_STATE_HOME (where the home is), XDG_RUNTIME_DIR (sockets of homes with long "
        "paths), LISTEN_FDS, NOTIFY_SOCKET, WATCHDOG_USEC (from a service manager).",
    )
    cpus = os.cpu_count() or 1
    parser.add_argument("--home", type=_absolute, help="where runs are kept (default: $WFD_HOME or the platform's place)")
    parser.add_argument(
        "--max-parallel",
        type=_positive,
        default=max(_PARALLEL_MIN, _PARALLEL_PER_CPU * cpus),
        metavar="N",
        help="running steps, all runs together (default: %(default)s)",
    )
    parser.add_argument(
        "--idle-exit-sec", type=_positive, metavar="N", help="end after so long without a run and without a client"
    )
    parser.add_argument(
        "--replace", action="store_true", help="ask a running daemon of this home to end, and adopt its steps (services)"
    )
    parser.add_argument("--handover-fd", type=_positive, metavar="FD", help="a connected socket of the starting client")
    parser.add_argument("--version", action="version", version=f"wfd {VERSION}")
    return parser.parse_args(arguments)


def _absolute(text: str) -> str:
    if not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an absolute path")
    return text.rstrip("/") or "/"


def _positive(text: str) -> int:
    number = _number(text)
    if number is None or number < 1:
        limits = f"from 1 on, of {_MAX_DIGITS} digits at most"
        raise argparse.ArgumentTypeError(f"{text[:_MAX_DIGITS]!r} is not a whole number {limits}")
    return number


def _number(text: str) -> int | None:
    """The number that a flag or a variable holds. None when it is none that anybody means: what is no ASCII digit counts
    for Python too, and thousands of digits are refused."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


# -- descriptors --------------------------------------------------------------------------------------------------------


def _move_up(fd: int) -> int:
    """The same open file behind a descriptor that no spawn clobbers and no step inherits. Raises CannotStart."""
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST_FD)
    except (OSError, OverflowError) as error:
        raise CannotStart(f"descriptor {fd} was promised and is not there: {error}") from None
    os.close(fd)
    return moved


def _passed_sockets() -> list[socket.socket]:
    """What systemd's socket activation passed (sd_listen_fds(3)). Raises CannotStart."""
    pid, count = os.environ.pop("LISTEN_PID", ""), _number(os.environ.pop("LISTEN_FDS", "0"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count is None:
        return []
    try:
        return [socket.socket(fileno=_move_up(_LISTEN_FDS_START + i)) for i in range(count)]
    except OSError as error:
        raise CannotStart(f"a descriptor that was passed is not a socket: {error.strerror}") from None


def _close_inherited() -> None:
    """Close what whoever started us had left open: a pipe or a lock of theirs would be held as long as any step lives."""
    try:
        names = os.listdir("/dev/fd/")
    except OSError:
        return
    for name in names:
        # One of them was the listing's own.
        with suppress(OSError):
            if int(name) >= _LOWEST_FD and os.get_inheritable(int(name)):
                os.close(int(name))


def _occupy_low_descriptors() -> None:
    null = fcntl.fcntl(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), fcntl.F_DUPFD_CLOEXEC, _LOWEST_FD)
    for fd in range(_LOWEST_FD):
        try:
            os.fstat(fd)
            if fd > 2:
                os.dup2(null, fd, inheritable=False)
        except OSError:
            os.dup2(null, fd, inheritable=False)
    os.dup2(null, 0, inheritable=False)
    os.close(null)


def _raise_limits() -> None:
    """A daemon serves all shells of its user, so it must not keep the soft limits of the one that happened to start it.
    Each step gets its own submitter's (process.limits)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    for number in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_AS):
        soft, hard = resource.getrlimit(number)
        if soft != hard:
            resource.setrlimit(number, (hard, hard))


# -- home and lock ------------------------------------------------------------------------------------------------------


def _prepare(home: Home) -> None:
    """The home's directories, private to us. Raises CannotStart."""
    try:
        os.makedirs(os.path.dirname(home.directory), exist_ok=True)
        for directory in (home.directory, home.runs, home.live):
            own_directory(directory)
        _keep(home)
        os.chdir("/")
    except OSError as error:
        raise CannotStart(f"the home {home.directory} cannot be used: {error.strerror}") from None


def _keep(home: Home) -> None:
    """Make the home's own names durable, whoever made them, as long as it holds no run: a run that is durable in a directory
    that is not would be lost with it. Raises OSError."""
    with os.scandir(home.runs) as runs:
        if next(runs, None) is not None:
            return
    journal.sync_directory(home.directory)
    # Who may not read it has not made the home.
    with suppress(PermissionError):
        journal.sync_directory(os.path.dirname(home.directory))


def own_directory(path: str) -> None:
    """Make a directory that only we can enter, or check that it is one. Raises CannotStart, OSError."""
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise CannotStart(f"{path} is not a directory (a symbolic link is not followed here)")
    if status.st_uid != os.geteuid():
        raise CannotStart(f"{path} belongs to uid {status.st_uid}, not to us (uid {os.geteuid()})")
    if stat.S_IMODE(status.st_mode) & 0o077:
        if os.listdir(path):
            raise CannotStart(f"{path} can be entered by others: chmod 700 it, if nothing else lives there")
        os.chmod(path, 0o700)


def _lock(home: Home, replace: bool, passed: list[socket.socket]) -> int:
    """The home's lock: whoever holds it is its daemon. The file is never unlinked, or two could hold one each."""
    try:
        fd = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CannotStart(f"{home.lock} cannot be opened: {error.strerror}") from None
    deadline = time.monotonic() + (_REPLACE_SEC if replace else _LEFT_SEC)
    asked = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() >= deadline or not (replace or _is_left_by_a_dead(fd)):
                os.close(fd)
                raise CannotStart(f"another daemon owns {home.directory}: see `daemon status`") from None
        except OSError as error:
            os.close(fd)
            raise CannotStart(f"{home.lock} cannot be locked: {error.strerror}") from None
        if replace and not asked:
            asked = True
            _ask_to_end(home, passed)
        time.sleep(0.02)


def _is_left_by_a_dead(lock: int) -> bool:
    """Is the daemon that was the last to own the home dead, as its lock file has it?"""
    try:
        os.kill(json.loads(os.pread(lock, _LOCK_BYTES, 0))["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False
    return False


def _ask_to_end(home: Home, passed: list[socket.socket]) -> None:
    """Its live steps go on and are adopted by us."""
    try:
        with open(home.lock, "rb") as file:
            owner = json.loads(file.read())
        if any(_is_at(listener, owner["socket"]) for listener in passed):
            # The service manager has taken that path over from the daemon: we would be asking ourselves.
            machine.terminate_lock_owner(owner["pid"], home.lock)
            return
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_REPLACE_SEC)
            client.connect(owner["socket"])
            client.sendall(request("shutdown", {}))
            client.recv(1)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        log(f"the daemon that owns the home does not answer: {error!r}")


def _write_lock(lock: int, socket_path: str) -> None:
    content: dict[str, object] = {
        "pid": os.getpid(), "socket": socket_path, "version": VERSION,
        "protocol_min": PROTOCOL_MIN, "protocol_max": PROTOCOL_MAX, "started_at": wall(),
    }  # fmt: skip
    _replace_content(lock, content)


def _replace_content(lock: int, content: dict[str, object]) -> None:
    data = json.dumps(content).encode() + b"\n"
    # In place, and cut afterwards: on a full disk the file must not give back the block that it has.
    os.pwrite(lock, data, 0)
    os.ftruncate(lock, len(data))


# -- sockets ------------------------------------------------------------------------------------------------------------


def _listen(home: Home, passed: list[socket.socket]) -> tuple[str, list[socket.socket], _FileId | None]:
    """The home's own socket and those that a service manager passed; and, if we have bound the home's own, its file."""
    runtime = runtime_directory(os.environ, os.geteuid())
    path = home.socket(runtime)
    if not path.startswith(home.directory + "/"):
        own_directory(runtime)
    if any(_is_at(listener, path) for listener in passed):
        return path, passed, None
    with suppress(FileNotFoundError):
        # We hold the lock, so whoever listened here is gone.
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    # bind makes the file with all bits that the umask leaves: 0600 from its first moment.
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    return path, [*passed, listener], _file_id(path)


def _is_at(listener: socket.socket, path: str) -> bool:
    """Was this socket bound at this path, and is its file still there?"""
    try:
        return os.path.samefile(listener.getsockname(), path)
    except (OSError, TypeError, ValueError):
        # It has no name in the file system, or its file was removed.
        return False


def _file_id(path: str) -> _FileId | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _unlink_own(path: str, bound: _FileId | None) -> None:
    """Remove the socket file that we have made. A service manager may have put its own there meanwhile."""
    if bound is not None and _file_id(path) == bound:
        os.unlink(path)


# -- the service manager ------------------------------------------------------------------------------------------------


def _notifier() -> tuple[Callable[[str], None], int | None]:
    """How to tell the service manager something (sd_notify(3)), and how often it wants to hear that the loop turns (ms)."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    usec, pid = _number(os.environ.pop("WATCHDOG_USEC", "")), os.environ.pop("WATCHDOG_PID", str(os.getpid()))
    if not address:
        return lambda text: None, None
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def notify(text: str) -> None:
        try:
            sender.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            log(f"the service manager cannot be told {text!r}: {error.strerror}")

    # Half the interval, as sd_watchdog_enabled(3) advises.
    return notify, usec // 2000 if usec is not None and pid == str(os.getpid()) else None


# -- the loop -----------------------------------------------------------------------------------------------------------


def _serve(
    home: Home, lock: int, options: argparse.Namespace, handover: int | None, passed: list[socket.socket]
) -> None:
    try:
        supervisor, path, bound = _set_up(home, lock, options, handover, passed)
        notify, heartbeat_ms = _notifier()
    except OSError as error:
        raise CannotStart(f"the home {home.directory} cannot be used: {error.strerror or error}") from None
    notify("READY=1")
    log(f"wfd {VERSION}, pid {os.getpid()}, owns {home.directory}, {len(supervisor.live)} live runs")
    _loop(supervisor, options.idle_exit_sec, notify, heartbeat_ms)
    notify("STOPPING=1")
    supervisor.server.close_all()
    _unlink_own(path, bound)
    # A client that follows a run starts a daemon again when one has crashed, but not when it was asked to end.
    with suppress(OSError):
        _replace_content(lock, {"ended_at": wall()})
    log(f"pid {os.getpid()} ends; {supervisor.running} running steps go on")


def _set_up(
    home: Home, lock: int, options: argparse.Namespace, handover: int | None, passed: list[socket.socket]
) -> tuple[Supervisor, str, _FileId | None]:
    """A supervisor that listens and owns the runs of the home; its socket's path and, if we have made it, its file. Raises
    CannotStart, OSError."""
    _raise_limits()
    gc.set_threshold(GC_THRESHOLD)
    if not machine.inherits_locks(home.directory):
        raise CannotStart(f"{home.directory} is on a file system whose locks do not pass to children (NFS?)")
    boot_id = machine.boot_id()
    path, listeners, bound = _listen(home, passed)
    _write_lock(lock, path)
    selector = selectors.DefaultSelector()
    supervisor = Supervisor(home, path, selector, boot_id, platform.node(), options.max_parallel)
    _catch_signals(supervisor, selector)
    for listener in listeners:
        supervisor.server.listen(listener)
    if handover is not None:
        supervisor.server.welcome(socket.socket(fileno=handover))
    supervisor.make_reserve()
    supervisor.take_over_all()
    return supervisor, path, bound


def _loop(
    supervisor: Supervisor, idle_exit_sec: int | None, notify: Callable[[str], None], heartbeat_ms: int | None
) -> None:
    beat_at_ms = monotonic_ms()
    idle_since_ms: int | None = None
    while not supervisor.is_done:
        now_ms = monotonic_ms()
        deadlines = []
        if heartbeat_ms is not None:
            if now_ms >= beat_at_ms:
                notify("WATCHDOG=1")
                beat_at_ms = now_ms + heartbeat_ms
            deadlines.append(beat_at_ms)
        if idle_exit_sec is None or not supervisor.is_idle:
            idle_since_ms = None
        else:
            idle_since_ms = now_ms if idle_since_ms is None else idle_since_ms
            deadlines.append(idle_since_ms + idle_exit_sec * 1000)
            if now_ms >= deadlines[-1]:
                log(f"nothing to do for {idle_exit_sec} s")
                return
        supervisor.turn(min(deadlines, default=None))


def _catch_signals(supervisor: Supervisor, selector: selectors.BaseSelector) -> None:
    """A signal writes a byte into a socket that the selector watches, so none can fall between a check and the wait."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def stop(number: int, frame: object) -> None:
        supervisor.is_stopping = True

    def drain(_: socket.socket, mask: int) -> None:
        with suppress(BlockingIOError):
            reading.recv(4096)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Keeps `writing` alive as long as the selector, with the function that reads its other end.
    drain.__dict__["writing"] = writing
    selector.register(reading, selectors.EVENT_READ, drain)


if __name__ == "__main__":
    sys.exit(main())
