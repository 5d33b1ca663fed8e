"""What only the operating system can tell, with an adapter for each of Linux and macOS.

Linux answers from /proc, macOS through `ps` and `sysctl`. Both are slow beside everything else the daemon does, so they
are asked once at start-up, or where something went wrong.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress

# From <linux/prctl.h>.
_PR_SET_CHILD_SUBREAPER = 36
_LISTING_BYTES = 1 << 16
# proc(5): the fields 20, 26, 50 and 51, of which the first two are before those that we count.
_THREADS, _CODE_BEGIN, _ENVIRONMENT_BEGIN, _ENVIRONMENT_END = 17, 23, 47, 48
_DEAD = (b"Z", b"X")


def group_members(group: int, marks: Mapping[bytes, bytes] | None = None) -> list[int]:
    """Pids of the group's live members (zombies are not); with marks, without those that do not carry them."""
    members = _members_from_proc(group) if os.path.exists("/proc/self/stat") else _members_from_ps(group)
    return members if marks is None else [pid for pid in members if carries(pid, marks) is not False]


def as_variables(marks: Mapping[bytes, bytes]) -> frozenset[bytes]:
    """Marks as a system shows them."""
    return frozenset(name + b"=" + value for name, value in marks.items())


def _members_from_proc(group: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        # Gone, or hidden from us (hidepid). Any other error says nothing about it, and is not to be taken for a no.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            fields = _stat_in(f"/proc/{name}")
            if int(fields[2]) == group and (fields[0] not in _DEAD or _has_threads(fields)):
                found.append(int(name))
    return found


def _stat_in(directory: str) -> list[bytes]:
    """The fields of /proc/<pid>/stat, or that of a thread, from the third on: state, parent, group, …"""
    with open(f"{directory}/stat", "rb") as file:
        # The command name in brackets may hold anything.
        return file.read().rpartition(b")")[2].split()


def _has_threads(fields: list[bytes]) -> bool:
    """Are there others than the main thread? When that alone has ended, the process is shown as a zombie, and goes on."""
    return int(fields[_THREADS]) > 1


def _members_from_ps(group: int) -> list[int]:
    listing = _ps("-A", "-o", "pid=,pgid=,stat=")
    rows = (line.split() for line in listing.splitlines())
    return [int(row[0]) for row in rows if len(row) == 3 and int(row[1]) == group and row[2][:1] != b"Z"]


def carries(pid: int, marks: Mapping[bytes, bytes]) -> bool | None:
    """Has a process all these variables in its environment? None: that cannot be told at this moment."""
    if os.path.exists("/proc/self/environ"):
        found = environment_of(pid)
        return None if found is None else as_variables(marks) <= found
    # macOS shows the environment of one's own processes behind the command.
    words = _ps("-E", "-ww", "-o", "command=", "-p", str(pid))
    return all(mark in words for mark in as_variables(marks))


def environment_of(pid: int) -> frozenset[bytes] | None:
    """The variables that /proc shows of a process; of one that we may not look into, none. None for one that has no
    environment at the moment, so that one has to ask again: it is in the middle of an exec, or dead and not yet reaped."""
    found = _environment_in(f"/proc/{pid}")
    with suppress(OSError):
        if found is None and _has_threads(_stat_in(f"/proc/{pid}")):
            # The main thread has ended, and took its view of the memory with it. The others have theirs.
            threads = (_environment_in(f"/proc/{pid}/task/{thread}") for thread in os.listdir(f"/proc/{pid}/task"))
            return next((each for each in threads if each is not None), None)
    return found


def _environment_in(directory: str) -> frozenset[bytes] | None:
    try:
        with open(f"{directory}/environ", "rb") as file:
            found = file.read()
        if found:
            return frozenset(found.split(b"\0"))
        fields = _stat_in(directory)
    except PermissionError:
        return frozenset()
    except OSError:
        # Some Linux says ESRCH of a process that is not reaped yet.
        return None
    # An exec sets the end of the environment to its beginning before it counts the strings, and tells where the code is
    # after that (Linux, fs/binfmt_elf.c). What is empty and has code is empty for good, until the next exec.
    is_whole = fields[_CODE_BEGIN] != b"0" and fields[_ENVIRONMENT_BEGIN] == fields[_ENVIRONMENT_END]
    return frozenset() if is_whole else None


def _ps(*arguments: str) -> bytes:
    return subprocess.run(["ps", *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False).stdout


def keep_orphans() -> int | None:
    """From now on, a process below us whose parent dies becomes our child instead of init's. A descriptor of the list of
    our children, for `children` and `count_children`; None where there is no such thing (macOS), or no list. Raises
    OSError when the system is short of something."""
    if sys.platform != "linux":
        return None
    try:
        # In a /proc that belongs to another pid namespace, the numbers of our children would be those of strangers.
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        listing = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if _is_subreaper():
        return listing
    os.close(listing)
    return None


def _is_subreaper() -> bool:
    """Ask for it. Python has no prctl(2) of its own."""
    try:
        # Here, since it takes 3 ms and half a megabyte that only a daemon with steps needs to spend.
        import ctypes

        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (ImportError, AttributeError, OSError, MemoryError):
        # A Python without it, or a system that allows no memory that is written and executed.
        return False


def count_children(listing: int) -> int:
    """How many children we have, zombies included: 0.2 µs for each. Raises OSError."""
    return _list_children(listing).count(b" ")


def children(listing: int) -> list[int]:
    """Their pids, zombies included. Raises OSError."""
    return [int(pid) for pid in _list_children(listing).split()]


def _list_children(listing: int) -> bytes:
    # The kernel gives at most a page at a time. It writes a space behind each number.
    data = b""
    while piece := os.pread(listing, _LISTING_BYTES, len(data)):
        data += piece
    return data


def boot_id() -> str:
    """What distinguishes this boot from all others. Raises OSError when the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        for name in ("kern.bootsessionuuid", "kern.boottime"):
            answer = subprocess.run(["sysctl", "-n", name], capture_output=True, check=False, text=True).stdout.strip()
            if answer:
                return answer
    raise OSError(errno.ENOSYS, "the system does not tell one boot from another")


def inherits_locks(directory: str) -> bool:
    """Does a lock live on in a child after we have closed our copy of the file? Not on NFS, where flock becomes a lock
    of the process; then a living attempt would look dead. Tried, not looked up."""
    path = f"{directory}/.lock-probe-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        reading, writing = os.pipe()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            actions = [(os.POSIX_SPAWN_DUP2, fd, 9), (os.POSIX_SPAWN_DUP2, reading, 0)]
            child = os.posix_spawn("/bin/sh", ["sh", "-c", "read -r line"], {}, file_actions=actions)
        finally:
            os.close(reading)
        os.close(fd)
        fd = -1
        try:
            return _is_locked(path)
        finally:
            os.close(writing)
            os.waitpid(child, 0)
    finally:
        if fd >= 0:
            os.close(fd)
        os.unlink(path)


def _is_locked(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def terminate_lock_owner(pid: int, path: str) -> None:
    """TERM to the process that holds the flock of a file, if it is `pid`. A pid alone might be a stranger's by now; the
    kernel's list of locks tells, and a pidfd keeps the answer true. Linux only, as is what it is needed for."""
    if sys.platform == "linux":
        process = os.pidfd_open(pid)
        try:
            if _is_locked_by(pid, path):
                signal.pidfd_send_signal(process, signal.SIGTERM)
        finally:
            os.close(process)


def _is_locked_by(pid: int, path: str) -> bool:
    # "1: FLOCK  ADVISORY  WRITE 708 00:13:4242 0 EOF". The device is left out: overlayfs and btrfs tell it two ways.
    inode = str(os.stat(path).st_ino)
    with open("/proc/locks", encoding="ascii") as file:
        rows = [line.split() for line in file]
    return any(row[1] == "FLOCK" and row[4] == str(pid) and row[5].rpartition(":")[2] == inode for row in rows)
