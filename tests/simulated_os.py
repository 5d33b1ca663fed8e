"""The faces of a simulated machine that wfd's modules see in the place of `os`, `fcntl`, `open`, ….

What is not here does not exist: a call that wfd makes and nobody has simulated is an AttributeError, never a real one.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any

from tests.simulated_disk import Directory, File
from tests.simulated_kernel import Crash, Kernel, OpenFile, Process
from wfd import events, journal, machine, orphans, process, requests, supervisor

HOME = "/home/wfd"
_PID = 4_242
_UID = 1_000
# The reserve is real bytes that are written at each start; a few blocks do.
_RESERVE_BYTES = 4_096
_CONSTANTS = [name for name in dir(os) if name.startswith(("O_", "SEEK_", "POSIX_SPAWN_"))]


def _error(number: int, path: str = "") -> OSError:
    # One text on every system, since it comes into logs of which the same seed must make the same bytes.
    return OSError(number, f"simulated {errno.errorcode[number]}", path)


class _Path:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def lexists(self, path: str) -> bool:
        self._kernel.enter("lexists", path)
        return self._kernel.disk.find(path) is not None

    exists = lexists


class SimulatedOs:
    """`os`, as on macOS before Python 3.13: nothing shows a dead child without reaping it."""

    P_ALL, WEXITED, WNOHANG, WNOWAIT = 0, 4, 1, 0x1000000
    devnull = "/dev/null"
    fsencode = staticmethod(os.fsencode)
    waitstatus_to_exitcode = staticmethod(os.waitstatus_to_exitcode)

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.path = _Path(kernel)
        self._next_fd = 10

    # -- files ----------------------------------------------------------------------------------------------------

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        kernel = self._kernel
        kernel.enter("open", path)
        if kernel.has_no_descriptors:
            raise _error(errno.EMFILE, path)
        parent, _, name = path.rpartition("/")
        directory = kernel.disk.directory(parent)
        node = directory.names.get(name)
        if node is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            if kernel.disk.free == 0:
                raise _error(errno.ENOSPC, path)
            node = File()
            directory.change((name, node))
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise _error(errno.EEXIST, path)
        elif flags & os.O_TRUNC and isinstance(node, File):
            node.truncate(0)
        return self._descriptor(OpenFile(node, path))

    def _descriptor(self, file: OpenFile) -> int:
        self._next_fd += 1
        self._kernel.fds[self._next_fd] = file
        return self._next_fd

    def close(self, fd: int) -> None:
        # No place to crash at: whether the dying daemon or the kernel closes it is all the same.
        file = self._kernel.fds.pop(fd, None)
        if file is not None:
            file.close()
        elif not self._kernel.is_dead:
            raise _error(errno.EBADF)

    def _file(self, fd: int) -> File:
        if fd not in self._kernel.fds:
            raise _error(errno.EBADF)
        node = self._kernel.fds[fd].node
        assert isinstance(node, File)
        return node

    def write(self, fd: int, data: Any) -> int:
        kernel = self._kernel
        kernel.enter("write", fd, bytes(data))
        written = kernel.disk.append(self._file(fd), bytes(data))
        if kernel.fds[fd].path.endswith("/events.ndjson"):
            kernel.crash_soon()
        if data and not written:
            raise _error(errno.ENOSPC)
        return written

    def read(self, fd: int, size: int) -> bytes:
        kernel = self._kernel
        kernel.enter("read", fd)
        file = kernel.fds[fd]
        data = bytes(self._file(fd).data[file.position : file.position + size])
        file.position += len(data)
        return data

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        self._kernel.enter("pread", fd)
        return bytes(self._file(fd).data[offset : offset + size])

    def ftruncate(self, fd: int, size: int) -> None:
        kernel = self._kernel
        kernel.enter("ftruncate", fd, size)
        file = self._file(fd)
        before = -(-len(file.data) // 512)
        file.truncate(size)
        if kernel.disk.free is not None:
            kernel.disk.free += before - -(-size // 512)

    def fsync(self, fd: int) -> None:
        kernel = self._kernel
        kernel.enter("fsync", fd)
        file = kernel.fds[fd]
        if kernel.fails_to_sync:
            kernel.fails_to_sync -= 1
            kernel.note("fsync fails")
            if isinstance(file.node, File):
                file.node.fail_to_sync(kernel.chance)
            for other in kernel.fds.values():
                # As ext4 whose journal has failed says of all that was to be in the same commit.
                if isinstance(other.node, File) and other.node.is_dirty:
                    other.node.is_lying = True
            raise _error(errno.EIO, file.path)
        file.node.sync()
        kernel.on_durable(file.path, file.node)

    def fstat(self, fd: int) -> Any:
        return self._stat(self._kernel.fds[fd].node)

    def stat(self, path: str) -> Any:
        self._kernel.enter("stat", path)
        node = self._kernel.disk.find(path)
        if node is None:
            raise _error(errno.ENOENT, path)
        return self._stat(node)

    lstat = stat

    def _stat(self, node: File | Directory) -> Any:
        if isinstance(node, File):
            return SimpleNamespace(st_mode=stat.S_IFREG | 0o600, st_size=len(node.data), st_uid=_UID)
        return SimpleNamespace(st_mode=stat.S_IFDIR | 0o700, st_size=4096, st_uid=_UID)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        kernel = self._kernel
        kernel.enter("mkdir", path)
        if kernel.disk.find(path) is not None:
            raise _error(errno.EEXIST, path)
        if kernel.disk.free == 0:
            raise _error(errno.ENOSPC, path)
        kernel.disk.make_directory(path)

    def unlink(self, path: str) -> None:
        self._kernel.enter("unlink", path)
        self._kernel.disk.remove(path)

    def rmdir(self, path: str) -> None:
        self._kernel.enter("rmdir", path)
        self._kernel.disk.remove(path)

    def rename(self, old: str, new: str) -> None:
        self._kernel.enter("rename", old, new)
        self._kernel.disk.rename(old, new)

    def listdir(self, path: str) -> list[str]:
        self._kernel.enter("listdir", path)
        return list(self._kernel.disk.directory(path).names)

    # -- processes ------------------------------------------------------------------------------------------------

    def getpid(self) -> int:
        return _PID

    def geteuid(self) -> int:
        return _UID

    def posix_spawn(
        self,
        path: str,
        argv: Sequence[bytes],
        env: Mapping[bytes, bytes],
        *,
        file_actions: Sequence[tuple[Any, ...]] = (),
        setsid: bool = False,
        setsigmask: Sequence[int] = (),
        setsigdef: Sequence[int] = (),
    ) -> int:
        kernel = self._kernel
        key = _key_in(env)
        kernel.enter("spawn", *key)
        if kernel.has_no_processes:
            raise _error(errno.EAGAIN)
        plan = kernel.plan_of(key)
        if isinstance(plan.error, int):
            kernel.unspawnable.add(key)
            raise _error(plan.error)
        kernel.on_spawn(key)
        out = next(action[2] for action in file_actions if action[1] == 1)
        if kernel.disk.find(out) is None:
            parent, _, name = out.rpartition("/")
            kernel.disk.directory(parent).change((name, File()))
        status = next(action[1] for action in file_actions if action[2] == 9)
        return kernel.spawn(key, kernel.fds[status], plan)

    def killpg(self, group: int, number: int) -> None:
        kernel = self._kernel
        kernel.enter("killpg", group, int(number))
        members = kernel.members(group)
        if not members:
            raise ProcessLookupError(errno.ESRCH, "simulated ESRCH")
        kernel.signal(members, number)

    def getpgid(self, pid: int) -> int:
        return self._kernel.processes[pid].group

    def kill(self, pid: int, number: int) -> None:
        kernel = self._kernel
        kernel.enter("kill", pid, int(number))
        if pid not in kernel.processes:
            raise ProcessLookupError(errno.ESRCH, "simulated ESRCH")
        kernel.signal([kernel.processes[pid]], number)

    def _zombies(self, pid: int) -> Iterator[Process]:
        children = [child for child in self._kernel.processes.values() if child.parent == self._kernel.incarnation]
        if not children:
            raise ChildProcessError(errno.ECHILD, "simulated ECHILD")
        return (child for child in children if child.is_zombie and pid in (-1, child.pid))

    def wait4(self, pid: int, flags: int) -> tuple[int, int, Any]:
        kernel = self._kernel
        kernel.enter("wait4", pid)
        child = next(self._zombies(pid), None)
        usage = SimpleNamespace(ru_utime=0.001, ru_stime=0.002, ru_maxrss=3_000)
        if child is None:
            return 0, 0, usage
        kernel.forget(child)
        return child.pid, child.status, usage


for _name in _CONSTANTS:
    setattr(SimulatedOs, _name, getattr(os, _name))


class SimulatedLinux(SimulatedOs):
    """`os`, where a dead child can be looked at first."""

    def waitid(self, kind: int, pid: int, options: int) -> Any:
        self._kernel.enter("waitid")
        child = next(self._zombies(-1), None)
        return None if child is None else SimpleNamespace(si_pid=child.pid)


class SimulatedFcntl:
    LOCK_SH, LOCK_EX, LOCK_NB, LOCK_UN = 1, 2, 4, 8

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def flock(self, fd: int, operation: int) -> None:
        self._kernel.enter("flock", fd)
        if self._kernel.nudge_every and self._kernel.chance.hit(0.15):
            # Between the lock and what is read of the file lies the attempt's end.
            self._kernel.nudge()
        file = self._kernel.fds[fd]
        assert isinstance(file.node, File)
        if operation & self.LOCK_UN:
            file.node.lock = None
        elif file.node.lock not in (None, file):
            raise BlockingIOError(errno.EAGAIN, "simulated EAGAIN")
        elif operation & self.LOCK_EX:
            file.node.lock = file


class _Reader(io.BytesIO):
    """A file that is read: its bytes as they were when it was opened. The daemon is its only writer."""

    def __init__(self, face: SimulatedOs, fd: int, data: bytes) -> None:
        super().__init__(data)
        self._face = face
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if not self.closed and self._fd in self._face._kernel.fds:
            self._face.close(self._fd)
        super().close()


class _Writer:
    def __init__(self, face: SimulatedOs, fd: int) -> None:
        self._face = face
        self._fd = fd

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._face.close(self._fd)

    def write(self, data: bytes) -> int:
        if self._face.write(self._fd, data) < len(data):
            raise _error(errno.ENOSPC)
        return len(data)


def _key_in(marks: Mapping[bytes, bytes]) -> tuple[str, str, int]:
    """Whose marks they are: run, step and attempt, as the environment of a spawn names them."""
    return marks[b"WFD_RUN_ID"].decode(), marks[b"WFD_STEP_ID"].decode(), int(marks[b"WFD_ATTEMPT"])


class _Machine:
    """machine.py, as far as process.py and orphans.py ask it. What only looks is no place to crash at."""

    as_variables = staticmethod(machine.as_variables)

    def __init__(self, kernel: Kernel, is_linux: bool) -> None:
        self._kernel = kernel
        self._is_linux = is_linux

    def group_members(self, group: int, marks: Mapping[bytes, bytes] | None = None) -> list[int]:
        self._kernel.enter("group_members", group)
        living = [member.pid for member in self._kernel.members(group) if not member.is_zombie]
        return living if marks is None else [pid for pid in living if self.carries(pid, marks) is not False]

    def carries(self, pid: int, marks: Mapping[bytes, bytes]) -> bool | None:
        found = self.environment_of(pid)
        return None if found is None else self.as_variables(marks) <= found

    def environment_of(self, pid: int) -> frozenset[bytes] | None:
        found = self._kernel.processes.get(pid)
        if found is None or found.is_zombie:
            return None
        if found.key is None:
            return frozenset((b"PATH=/bin",))
        return self.as_variables(process.markers("w", *found.key))

    def keep_orphans(self) -> int | None:
        self._kernel.is_subreaper = self._is_linux
        return 0 if self._is_linux else None

    def count_children(self, listing: int) -> int:
        return len(self.children(listing))

    def children(self, listing: int) -> list[int]:
        incarnation = self._kernel.incarnation
        return [child.pid for child in self._kernel.processes.values() if child.parent == incarnation]


class _Random:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def randrange(self, limit: int) -> int:
        return self._kernel.chance.below(limit)


def _remembering(decode: Callable[[bytes], events.Line]) -> Callable[[bytes], events.Line]:
    """The same function of the same bytes, of which nothing is worked out twice: a history reads each of its lines a dozen
    times. Lines are immutable. A fifth of the time."""
    known: dict[bytes, events.Line] = {}

    def remember(raw: bytes) -> events.Line:
        line = known.get(raw)
        if line is None:
            line = known[raw] = decode(raw)
        return line

    return remember


@contextmanager
def installed(kernel: Kernel, *, is_linux: bool = True) -> Iterator[SimulatedOs]:
    """Let wfd's modules see this machine and no other."""
    face = SimulatedLinux(kernel) if is_linux else SimulatedOs(kernel)

    def open_file(file: str | int, mode: str = "r") -> Any:
        if mode == "wb":
            assert isinstance(file, int)
            return _Writer(face, file)
        fd = file if isinstance(file, int) else face.open(file, os.O_RDONLY)
        return _Reader(face, fd, bytes(face._file(fd).data))

    system = SimpleNamespace(platform="linux")
    fcntl, asked = SimulatedFcntl(kernel), _Machine(kernel, is_linux)
    faces: list[tuple[Any, dict[str, object]]] = [
        (events, {"decode": _remembering(events.decode)}),
        (journal, {"os": face, "open": open_file, "sys": system, "fcntl": fcntl}),
        (process, {"os": face, "fcntl": fcntl, "open": open_file, "machine": asked, "sys": system}),
        (orphans, {"os": face, "machine": asked}),
        (requests, {"os": face}),
        (supervisor, {
            "os": face, "open": open_file, "random": _Random(kernel), "monotonic_ms": kernel.monotonic_ms,
            "wall": kernel.wall, "log": lambda text: kernel.on_log(text), "RESERVE_BYTES": _RESERVE_BYTES,
        }),
    ]  # fmt: skip
    before = [(module, name, module.__dict__.get(name)) for module, names in faces for name in names]
    for module, names in faces:
        module.__dict__.update(names)
    try:
        yield face
    finally:
        for module, name, value in before:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


__all__ = ["HOME", "Crash", "SimulatedOs", "installed"]
