"""One attempt of a step: the shim that keeps it, spawn, probe, signal, sweep, outcome.

Theory: a lock is its life. Before an attempt's shim is spawned, the daemon opens the attempt's status file and takes
`flock(LOCK_EX)` on it; the shim inherits that open file description as fd 9 and the daemon closes its own copy. The
kernel drops the lock when the shim dies, whatever kills it, and however many daemons come and go meanwhile. Pids are
only hints, for signals. Read the lock first, then the file:

    lock   status file                meaning                        what follows
    held   -                          alive                          wait for the lock, keep its deadlines
    free   "exit N"                   ended while nobody looked      sweep its group, settle with N
    free   pid, no exit, same boot    killed without a trace         kill its marked group members, then `lost`
    free   pid, no exit, other boot   cannot know                    `lost`, no signal (the pid is somebody else's now)
    free   no file, same boot         never spawned                  spawn (the supervisor acts from its state)
    free   no pid, same boot          the shim died first            never began
    free   no pid or file, other boot cannot know                    `lost`
    free   what no shim writes        cannot know                    `lost`; nothing in it is believed

Rules
* The daemon writes the first line of a status file itself. That takes the disk block that the shim's own two short lines
  then fit into, so a disk that fills up meanwhile cannot swallow an exit status.
* An attempt is over when its lock is free, its group has no live member, and none of its processes that have left the
  group is found (orphans.py). A group's number cannot be taken by a stranger while it has a member or its leader is an
  unreaped zombie. So survivors are killed before the shim is reaped. A group whose shim somebody else reaped is ours if
  we saw that shim alive just before; else it is only touched where members carry this attempt's WFD_* environment.
* A logged timeout or cancel decides the attempt: without an exit status it is then "exited, status unknown", never lost.
* Output goes straight to a file, never through a pipe: a pipe dies with the daemon, and hangs on background children.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shlex
import signal
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from wfd import machine
from wfd.orphans import Orphans
from wfd.paths import AttemptFiles

# Portable to dash, bash, busybox, mksh, zsh and bash 3.2. $1 directory, $2 umask, $3 our own `ulimit` calls; the others are
# the command as `words` gives it.
#  * Only TERM is trapped, the rest ignored: the shim must outlive the signals that end the command, to record its end.
#  * The command's own process writes the pid line, as the last thing before it becomes the command and with TERM at its
#    default: a file without it proves that the command never began (a fork that failed, too), and a TERM sent after it
#    cannot fall between the shim's trap and the command.
#  * `kill -- -$$`, not `kill 0`: if setsid had failed, group 0 would be the daemon's.
#  * After a TERM the rest of the group keeps its grace; the daemon sweeps it.
#  * fds 8 and 9 only: two-digit fds fail in dash, mksh and zsh. The shim's own stderr is /dev/null (dash reports
#    "Terminated" there); the command's is fd 8.
#  * WFD_T and WFD_S are in the reserved name space, so that variables of the step's environment are not overwritten.
#  * `||` after the subshell: bash as sh takes `errexit` from an inherited SHELLOPTS, and would die of the command's status.
#  * OLDPWD would be the daemon's directory.
#  * The user's text is never read by this shell, which would be the `$$` of a `kill -9 $$` in it: it is words, or one word.
#    `command`, since bash takes functions from the environment, and prefers one that is called `cd` to its own.
#  * What the shell does by itself and without harm, it does here, and writes the pid line for it: a subshell would be a
#    fork, 0.3 of 1.2 ms.
SHIM = """\
WFD_T= WFD_S=0; trap '' HUP INT QUIT TSTP TTIN TTOU; trap WFD_T=1 TERM
command cd -- "$1" && command umask "$2" || { command echo "error cwd" >&9; exit 125; }
case $4 in
exec) (trap - HUP INT QUIT TERM TSTP TTIN TTOU; unset WFD_T WFD_S OLDPWD; command echo "pid $$" >&9 || exit 125
exec 2>&8 8>&- 9>&-; eval "$3"; shift 3; "$@") || WFD_S=$?;;
*) command echo "pid $$" >&9 || exit 125; shift 3; "$@" 2>&8 8>&- 9>&- || WFD_S=$?;;
esac
command echo "exit $WFD_S" >&9 || exit "$WFD_S"
[ "$WFD_T" ] || command kill -s KILL -- -$$
exit "$WFD_S"
"""
_SHELL = "/bin/sh"
# A command of such words means the same to every shell, which does nothing but look for the first and start it: so the
# subshell of the shim does, and the step costs one shell instead of two (1 ms of processor time on our 2-core machine).
_PLAIN_WORDS = re.compile(r"[ \t]*[A-Za-z0-9_./][A-Za-z0-9_./:@%+,-]*([ \t]+[A-Za-z0-9_./:@%+,=-]+)*[ \t]*")
# Except for what a shell does by itself, in POSIX, bash, ksh or zsh. The first few leave the shell that does them as it was,
# whatever their words (bash's `printf -v` and `test -v` would not).
_HARMLESS = frozenset(("echo", "false", "true"))
_OWN_TO_SHELLS = frozenset(
    """. alias autoload bg bind break builtin caller case cd chdir command compgen complete compopt continue coproc declare
    dirs disown do done elif else enable esac eval exec exit export fc fg fi float for function functions getopts global
    hash help history if in integer jobs kill let local login logout mapfile nameref newgrp nocorrect noglob popd print
    printf pushd pwd r read readarray readonly rehash return select set shift shopt source suspend test then time times
    trap type typeset ulimit umask unalias unset until wait whence where while
    """.split()  # noqa: SIM905 (a list would take a screen)
)
# Where bash finds functions in the environment, by their name: from 4.3 on, in two of the mended 3.2 and 4.2, and on macOS.
# Those before keep them under the name itself.
_EXPORTED_FUNCTIONS = (b"BASH_FUNC_%b%%%%", b"BASH_FUNC_%b()", b"__BASH_FUNC<%b>()")
_STATUS_HEADER = b"status 1\n"
# All that a shim of ours can have written behind it, whole: nothing, its pid, its end, both, or why there was no command.
# No system has pids of more than ten digits; those that no signal call takes are sorted out by their size.
_STATUS = re.compile(rb"(?:pid ([1-9][0-9]{0,9})\n)?(?:exit (0|[1-9][0-9]{0,2})\n)?|(error cwd\n)")
_MAX_PID = 2**31 - 1
# Linux refuses a single argument of 128 KiB (MAX_ARG_STRLEN); a longer command goes through a file.
MAX_ARGUMENT_BYTES = 100_000
# A status file holds three short lines. What is behind this is nonsense that somebody else wrote.
_STATUS_BYTES = 4096
# Output of one attempt beyond this is cut off: it is what a person could still read, times many.
OUTPUT_LIMIT_BYTES = 64 << 20
_OUTPUT_MARK = b"\n[wfd: the output grew beyond %d bytes; what came after was cut]\n"

# An adopted attempt is not our child: nobody tells us of its end, so its lock is looked at so often.
ADOPTED_POLL_MS = 50
# A group's number stays its own while the group has members, and is not given out again before the system has gone once
# round its numbers, of which there are 32,768 at the least: no system starts so many processes in this time.
GROUP_STAYS_MS = 1_000
# The members of a killed group need a moment to go. Looked at quickly at first, then more slowly, but often enough that
# its number hardly comes round again between two looks (a pid space of 32,768 lasts longer than this). It cannot at all
# where the group is found among our own children (orphans.py).
SWEEP_FIRST_MS, SWEEP_MAX_MS = 2, 100
# From this delay on zombies are told from live members (a scan of all processes): PID 1 of a container may never reap.
SWEEP_SCAN_FROM_MS = 8

# The system is short of something: the attempt waits, and no new step starts meanwhile.
_PASSING = frozenset(
    {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.ENOSPC, errno.EDQUOT, errno.EIO,
     errno.EINTR}
)  # fmt: skip
_ULIMIT_LETTERS: dict[str, tuple[int, str, int]] = {
    # name in environment.json: (resource, letter of ulimit, bytes in one unit of the letter)
    "nofile": (resource.RLIMIT_NOFILE, "n", 1),
    "core": (resource.RLIMIT_CORE, "c", 512),
    "fsize": (resource.RLIMIT_FSIZE, "f", 512),
    "cpu": (resource.RLIMIT_CPU, "t", 1),
    "stack": (resource.RLIMIT_STACK, "s", 1024),
    "data": (resource.RLIMIT_DATA, "d", 1024),
    "as": (resource.RLIMIT_AS, "v", 1024),
}
# What service managers tell their own child must not reach a step, which would speak in the daemon's name.
_SERVICE_VARIABLES = frozenset(
    {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
)


class SpawnStalled(Exception):
    """The system is short of something (processes, memory, descriptors, disk). Nothing was started; try again later."""


# Named tuples: a frozen dataclass takes three times as long to make, and each attempt has five of these.
class Launch(NamedTuple):
    """All that one attempt is started with. environ: bytes to bytes, markers included."""

    files: AttemptFiles
    command: str
    cwd: str
    umask: int
    limits: str
    environ: Mapping[bytes, bytes]


class Status(NamedTuple):
    """What the lock and the status file say. held: alive. pid: the shim's, and its group's number. error: "cwd", or
    "strange" when what lies there is nothing that a shim of ours has written to."""

    held: bool
    exists: bool
    pid: int | None = None
    exit_code: int | None = None
    error: str | None = None


class Usage(NamedTuple):
    """What wait4 tells of an attempt. The peak is never lower than the daemon's own at the spawn (Linux keeps the
    high-water mark of the shared memory across vfork and exec)."""

    user_ms: int
    system_ms: int
    peak_rss_kib: int


class Outcome(NamedTuple):
    """How an attempt ended. kind: "exited" (exit_code None: status unknown), "lost" or "not_started" (both with why);
    or "stalled": its command never began because its shell was refused a process, so that it can be spawned again."""

    kind: str
    exit_code: int | None = None
    why: str = ""
    detail: str = ""
    usage: Usage | None = None


class Exit(NamedTuple):
    """A shim of ours that was reaped. code: its own status, negative for a signal."""

    pid: int
    code: int
    usage: Usage


# -- start --------------------------------------------------------------------------------------------------------------


def start(launch: Launch) -> int | Outcome:
    """Spawn the shim; its pid, or an Outcome when the attempt cannot be started at all (too long, no shell).

    Raises SpawnStalled when the system is short of something, FileExistsError when the attempt has a status file already
    (it was begun: probe it)."""
    files = launch.files
    try:
        status = os.open(files.status, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise
    except OSError as error:
        return _cannot_start(error)
    try:
        fcntl.flock(status, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(status, _STATUS_HEADER)
        return _spawn(launch, status)
    except OSError as error:
        # Nothing was spawned: without its files the attempt is again one that nobody has begun.
        remove(files)
        return _cannot_start(error)
    finally:
        # Close, never LOCK_UN: unlocking would unlock the shim's copy too, close only drops ours.
        os.close(status)


def _spawn(launch: Launch, status: int) -> int:
    files = launch.files
    command = words(launch)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, files.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, 1, 8),
        (os.POSIX_SPAWN_DUP2, status, 9),
    ]
    arguments: list[str | bytes] = ["sh", "-c", SHIM, "sh", launch.cwd.encode("utf-8", "surrogateescape")]
    return os.posix_spawn(
        _SHELL,
        [*arguments, f"{launch.umask:04o}", launch.limits, *command],
        launch.environ,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=_ignored_signals(),
    )


@cache
def _ignored_signals() -> tuple[int, ...]:
    """Those that a child would inherit as ignored: ours, and those of whoever started us (nohup). What we handle is reset
    by the exec itself. Asked once: naming all 60 of them costs each spawn as many system calls."""
    return tuple(
        number
        for number in signal.valid_signals()
        if number not in (signal.SIGKILL, signal.SIGSTOP) and signal.getsignal(number) in (signal.SIG_IGN, None)
    )


def remove(files: AttemptFiles) -> None:
    """Remove the files of an attempt that never began."""
    # The status file last: without one it is started anew under its number, and finds an output in its way.
    for path in (files.out, files.status):
        with suppress(OSError):
            os.unlink(path)


def _cannot_start(error: OSError) -> Outcome:
    if error.errno in _PASSING:
        raise SpawnStalled(error.strerror or str(error)) from error
    detail = "the command and its environment are too long" if error.errno == errno.E2BIG else str(error.strerror)
    return Outcome("not_started", why="exec", detail=detail)


def words(launch: Launch) -> list[bytes]:
    """The command as the simple command that the shim's subshell runs: plain words as they are, all else as the one word of
    a `sh -c`. A command too long for that is written to the attempt's script. Raises OSError."""
    command = launch.command.encode("utf-8", "surrogateescape")
    if len(command) > MAX_ARGUMENT_BYTES:
        _write_script(launch.files.script, command)
        command = b". " + os.fsencode(shlex.quote(launch.files.script))
    elif _PLAIN_WORDS.fullmatch(launch.command):
        plain = command.split()
        first = launch.command.split()[0]
        if first in _HARMLESS:
            # Under limits that are not the shim's own a shell of its own does it.
            if not (launch.limits or _is_function(plain[0], launch.environ)):
                return plain
        elif first not in _OWN_TO_SHELLS and not _is_function(plain[0], launch.environ):
            return [b"exec", *plain]
    elif command[:1] in b"-+":
        # `sh -c -x` would take the command for an option.
        command = b" " + command
    return [b"exec", _SHELL.encode(), b"-c", command]


def _is_function(name: bytes, environ: Mapping[bytes, bytes]) -> bool:
    """Has somebody exported a function of this name from a bash?"""
    return environ.get(name, b"").startswith(b"() {") or any(form % name in environ for form in _EXPORTED_FUNCTIONS)


def _write_script(path: str, command: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(command)


def environment(*layers: Mapping[str, str]) -> dict[bytes, bytes]:
    """The layers as one environment, later ones winning, without what a service manager told its own child."""
    return {
        name.encode("utf-8", "surrogateescape"): value.encode("utf-8", "surrogateescape")
        for layer in layers
        for name, value in layer.items()
        if name not in _SERVICE_VARIABLES
    }


def markers(workflow_id: str, run_id: str, step_id: str, attempt: int) -> dict[bytes, bytes]:
    """The WFD_* variables of an attempt: for the step to read, and for the daemon to know the attempt's processes by."""
    return {
        b"WFD_WORKFLOW_ID": workflow_id.encode(),
        b"WFD_RUN_ID": run_id.encode(),
        b"WFD_STEP_ID": step_id.encode(),
        b"WFD_ATTEMPT": b"%d" % attempt,
    }


def limits(wanted: Mapping[str, int]) -> str:
    """Shell text that sets the submitter's soft limits, where they differ from the daemon's own. -1: none."""
    calls = []
    for name, value in wanted.items():
        if name not in _ULIMIT_LETTERS:
            continue
        number, letter, unit = _ULIMIT_LETTERS[name]
        ours = resource.getrlimit(number)[0]
        if value != (-1 if ours == resource.RLIM_INFINITY else ours):
            calls.append(f"command ulimit -S -{letter} {'unlimited' if value < 0 else value // unit} 2>/dev/null")
    return "; ".join(calls)


# -- probe --------------------------------------------------------------------------------------------------------------


def probe(files: AttemptFiles) -> Status:
    """Read the lock, then the file. Raises OSError when the system will not say (no descriptors, …)."""
    try:
        fd = os.open(files.status, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return Status(held=False, exists=False)
    except OSError:
        if stat.S_ISREG(os.lstat(files.status).st_mode):
            raise
        return _STRANGE
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return _STRANGE
        try:
            # Shared: two probers must not take each other for a living shim.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held = True
        return _parse_status(held, os.read(fd, _STATUS_BYTES))
    finally:
        os.close(fd)


def _parse_status(held: bool, data: bytes) -> Status:
    # Only newline-ended lines count: the last one may be half written.
    whole = data[: data.rfind(b"\n") + 1]
    if not whole and _STATUS_HEADER.startswith(data):
        return Status(held, True)
    match = _STATUS.fullmatch(whole, len(_STATUS_HEADER)) if whole.startswith(_STATUS_HEADER) else None
    if match is None:
        return _STRANGE._replace(held=held)
    pid, exit_code = (None if text is None else int(text) for text in match.group(1, 2))
    if (pid is not None and not 1 < pid <= _MAX_PID) or (exit_code is not None and exit_code > 255):
        return _STRANGE._replace(held=held)
    return Status(held, True, pid, exit_code, "cwd" if match[3] else None)


_STRANGE = Status(held=False, exists=True, error="strange")


def outcome_of(status: Status, *, is_ending: bool, rebooted: bool, exit: Exit | None) -> Outcome:
    """How the attempt ended whose lock is free. is_ending: a timeout or cancel is logged. exit: when we reaped it."""
    usage = exit.usage if exit else None
    if status.error == "cwd":
        return Outcome("not_started", why="cwd", detail="the working directory cannot be entered")
    if status.pid is not None and status.exit_code is not None:
        return Outcome("exited", status.exit_code, usage=usage)
    if status.pid is not None and exit is not None and exit.code >= 0:
        # The shim could not write its last line, but we are its parent and were told.
        return Outcome("exited", exit.code, usage=usage)
    if is_ending:
        if status.pid is not None or status.error == "strange" or rebooted:
            return Outcome("exited", None, usage=usage)
        return Outcome("not_started", why="stopped", detail="it was ended before its command began")
    if rebooted:
        return Outcome("lost", why="rebooted")
    if status.pid is not None or status.error == "strange":
        return Outcome("lost", why="killed")
    if exit is not None and exit.code > 0:
        return Outcome("stalled", why="its shell could not start another process")
    return Outcome("not_started", why="never_began", detail="its shell died before the command began")


# -- signal, sweep ------------------------------------------------------------------------------------------------------


def signal_group(group: int, number: int) -> bool:
    """Signal a whole group; False when it has no member left. TERM is followed by CONT, to reach stopped processes."""
    return _signal(os.killpg, group, number)


def _signal(send: Callable[[int, int], None], target: int, number: int) -> bool:
    try:
        send(target, number)
        if number == signal.SIGTERM:
            send(target, signal.SIGCONT)
    except ProcessLookupError:
        return False
    except PermissionError:
        # macOS answers so for a group of zombies; a member that changed its uid is beyond us on either system.
        return False
    return True


def group_exists(group: int) -> bool:
    """Has the group any member, zombies included?"""
    return signal_group(group, 0)


class Attempt:
    """A process that this daemon has spawned or adopted, until the line that tells its end is durable.

    pid        the shim's, and its group's number; None while an adopted shim has not written it yet
    is_child   spawned by this daemon, which reaps it; else its lock is looked at
    phase      "alive" (the lock is held), "sweeping" (the shim is gone, its group may have members), "swept" (nothing of it
               is alive), "over"
    is_cut     its output has been cut back to the limit
    """

    __slots__ = ("_delay_ms", "_known_ms", "_marks", "_orphans", "_orphans_told", "exit", "files",
                 "is_child", "is_cut", "is_term_sent", "number", "outcome", "phase", "pid", "since_ms")  # fmt: skip

    def __init__(
        self, number: int, files: AttemptFiles, marks: Mapping[bytes, bytes], pid: int | None, since_ms: int, is_child: bool,
        orphans: Orphans | None = None,
    ) -> None:  # fmt: skip
        self.number = number
        self.files = files
        self.pid = pid
        self.since_ms = since_ms
        self.is_child = is_child
        self.phase = "alive"
        self.is_cut = False
        self.is_term_sent = False
        self.exit: Exit | None = None
        self.outcome: Outcome | None = None
        self._marks = marks
        self._orphans = orphans
        self._orphans_told: frozenset[int] = frozenset()
        self._delay_ms = SWEEP_FIRST_MS
        # When the group was last known to be its own.
        self._known_ms: int | None = None

    def signal(self, number: int) -> bool:
        """Signal the group of a living attempt; False when that could not be done (any more, or yet). The number of an
        unreaped child's group is its own; an adopted shim's is what a file says, and must be of a process that carries our
        marks while the lock is held. A TERM waits until the command has begun: before, it would reach the shim alone. It
        also reaches those that have left the group; their KILL comes when the shim is dead. Raises OSError."""
        if self.phase != "alive" or not self._may_signal(number):
            return False
        if self.pid is None or not signal_group(self.pid, number):
            return False
        if number == signal.SIGTERM and self._orphans is not None:
            self._orphans.look()
            self._end_orphans(self.pid, in_grace=True)
        return True

    def _may_signal(self, number: int) -> bool:
        if self.is_child:
            return number != signal.SIGTERM or probe(self.files).pid is not None
        status = probe(self.files)
        if status.pid is None or not status.held or not machine.carries(status.pid, self._marks):
            return False
        self.pid = status.pid
        return True

    def reaped(self, exit: Exit, now_ms: int) -> None:
        """Its shim, our child, is dead. now_ms: the monotonic clock."""
        self.exit = exit
        self._known_ms = now_ms
        self.phase = "sweeping"

    def look(self, now_ms: int, *, in_grace: bool) -> int | None:
        """Has it ended? Kills what its dead shim has left behind, unless in_grace. now_ms: the monotonic clock. Returns in
        how many ms to look again, None when nothing of it is found alive. Raises OSError."""
        if self.phase == "swept":
            # It could not be settled, for want of something. Meanwhile its numbers may have become somebody else's.
            return None
        if self.phase == "alive":
            status = probe(self.files)
            self.pid = status.pid or self.pid
            if status.held:
                # As long as the lock is held the shim lives, and its number stays what its marks have shown it to be once.
                if status.pid is not None and (self._known_ms is not None or machine.carries(status.pid, self._marks)):
                    self._known_ms = now_ms
                return ADOPTED_POLL_MS
            self.phase = "sweeping"
            if self._orphans is not None:
                # It may be a child of ours after all, of a run that was let go and taken over again.
                self._orphans.look()
        is_known = self._known_ms is not None and now_ms - self._known_ms <= GROUP_STAYS_MS
        # A child's group is among the orphans, where those are found.
        is_listed = self.is_child and self._orphans is not None and self._orphans.are_kept
        is_group_left = not is_listed and self._end_group(is_known=is_known, in_grace=in_grace)
        if not self._end_orphans(self.pid if is_known else None, in_grace=in_grace) and not is_group_left:
            self.phase = "swept"
            return None
        if is_known and self.pid is not None and group_exists(self.pid):
            self._known_ms = now_ms
        delay_ms, self._delay_ms = self._delay_ms, min(self._delay_ms * 2, SWEEP_MAX_MS)
        return delay_ms

    def _end_group(self, *, is_known: bool, in_grace: bool) -> bool:
        """Has the group of the dead shim a live member? Kills it, unless in_grace. is_known: its number is still its own."""
        if self.pid is None or not group_exists(self.pid):
            return False
        if is_known and self.is_child and self._delay_ms < SWEEP_SCAN_FROM_MS:
            members = [self.pid]
        else:
            members = machine.group_members(self.pid, None if is_known else self._marks)
        if not members:
            return False
        if not in_grace and is_known:
            signal_group(self.pid, signal.SIGKILL)
        elif not in_grace:
            for pid in members:
                if machine.carries(pid, self._marks):
                    _signal(os.kill, pid, signal.SIGKILL)
        return True

    def _end_orphans(self, group: int | None, *, in_grace: bool) -> bool:
        """Is anything of it alive that is our child now? Kills that, or in its grace sends a TERM to each that has left the
        group, once: the others had theirs. group: its number, if that is surely its own."""
        if self._orphans is None:
            return False
        found = self._orphans.of(group, self._marks)
        if found is None:
            return True
        members, others = found
        are_left = bool(members)
        if members and group is not None and not in_grace:
            signal_group(group, signal.SIGKILL)
        for pid in others:
            number = signal.SIGKILL if not in_grace else 0 if pid in self._orphans_told else signal.SIGTERM
            are_left = _signal(os.kill, pid, number) or are_left
            if number == signal.SIGTERM:
                self._orphans_told |= {pid}
        return are_left

    def settle(self, *, is_ending: bool, rebooted: bool) -> None:
        """It is over: find out how. Raises OSError."""
        status = probe(self.files)
        if self.pid is not None and (not status.exists or status.error == "strange"):
            # Somebody took the file from under the shim, which had begun.
            status = status._replace(pid=self.pid)
        self.outcome = outcome_of(status, is_ending=is_ending, rebooted=rebooted, exit=self.exit)
        self.phase = "over"


# -- children -----------------------------------------------------------------------------------------------------------


def next_dead_child() -> int | None:
    """The pid of a child that has ended and is still a zombie, holding its group's number. None: there is none, or the
    system cannot show one without reaping it (macOS before Python 3.13 has no waitid)."""
    if not hasattr(os, "waitid"):
        return None
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return info.si_pid if info else None


def reap(pid: int = -1) -> Exit | None:
    """Reap one child, `pid` or any that has ended. None when there is none."""
    try:
        pid, status, usage = os.wait4(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    if pid == 0:
        return None
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    peak_kib = usage.ru_maxrss // 1024 if sys.platform == "darwin" else usage.ru_maxrss
    milliseconds = round(usage.ru_utime * 1000), round(usage.ru_stime * 1000)
    return Exit(pid, os.waitstatus_to_exitcode(status), Usage(*milliseconds, peak_kib))


# -- output ------------------------------------------------------------------------------------------------------------


def trim_output(path: str, limit_bytes: int = OUTPUT_LIMIT_BYTES) -> bool:
    """Cut an attempt's output back to the limit and mark it. O_APPEND lets the step go on writing at the new end."""
    try:
        if os.stat(path).st_size <= limit_bytes:
            return False
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    mark = _OUTPUT_MARK % limit_bytes
    try:
        os.ftruncate(fd, limit_bytes - len(mark))
        os.write(fd, mark)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
