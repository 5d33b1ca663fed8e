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
from collections.abc import Mapping, Sequence
from contextlib import suppress


def group_members(group: int, marks: Mapping[bytes, bytes] | None = None) -> list[int]:
    """Pids of the group's live members (zombies are not); with marks, only of those whose environment carries them all."""
    members = _members_from_proc(group) if os.path.exists("/proc/self/stat") else _members_from_ps(group)
    if marks is None:
        return members
    wanted = [name + b"=" + value for name, value in marks.items()]
    return [pid for pid in members if _carries(pid, wanted)]


def _members_from_proc(group: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The command name in brackets may hold anything; the fields behind it are state, parent, group.
            fields = file.read().rpartition(b")")[2].split()
            if int(fields[2]) == group and fields[0] not in (b"Z", b"X"):
                found.append(int(name))
    return found


def _members_from_ps(group: int) -> list[int]:
    listing = _ps("-A", "-o", "pid=,pgid=,stat=")
    rows = (line.split() for line in listing.splitlines())
    return [int(row[0]) for row in rows if len(row) == 3 and int(row[1]) == group and row[2][:1] != b"Z"]


def _carries(pid: int, wanted: Sequence[bytes]) -> bool:
    if os.path.exists("/proc/self/environ"):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = set(file.read().split(b"\0"))
        except OSError:
            return False
        return all(mark in variables for mark in wanted)
    # macOS shows the environment of one's own processes behind the command.
    words = _ps("-E", "-ww", "-o", "command=", "-p", str(pid))
    return all(mark in words for mark in wanted)


def _ps(*arguments: str) -> bytes:
    return subprocess.run(["ps", *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False).stdout


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
