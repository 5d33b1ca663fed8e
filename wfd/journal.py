"""The event log on disk: create, append, commit, recover, read.

Theory
* One writer. Only the daemon that holds the home's lock appends; readers take no lock and never repair.
* The newline commits a line, the checksum proves it, one fsync makes a batch durable. Nothing of a batch may be acted
  on, answered or shown before `commit` has returned.
* A power cut may keep any part of an unsynced batch, in any order. So a bad line may have good lines after it. Let g be
  the seq of the last good line (checksum right, seq one more than the line before). If any valid line further on says
  `durable` > g, then line g + 1 had been on disk and is gone: that is damage, and the run is quarantined. Otherwise
  everything after g had never been promised: a torn tail. Creation makes line 1 durable before anybody hears of the
  run, so a bad line 1 is always damage.
* A failed fsync drops the dirty pages: a second fsync *succeeds* while the data is gone, even from another process. So
  a file is never synced again after a failure, and a run that was live at the last stop is copied into a new inode
  before anything is appended to it.
* Nothing of an attempt exists on disk before its step_started is durable, so an attempt on disk that the log does not
  know means that the log has lost what it had promised.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator

from wfd import events
from wfd.events import Event, InvalidEvent, Line, NewerLog, RunSubmitted
from wfd.paths import Home, RunFiles, parse_attempt_name
from wfd.state import Impossible, Run

TYPE_CHECKING = False  # As in typing, whose import costs a tenth of a whole `status`.
if TYPE_CHECKING:
    from typing import BinaryIO

_NEWLINE = ord("\n")
# A copy goes through memory in pieces of this size.
_COPY_BYTES = 1 << 20
# How much of the end of a log is looked at to find its last line. Only run_submitted is ever longer.
_TAIL_BYTES = 4096
# Reasons for a failed open that pass, or tell of the disk and not of the log: no run is quarantined because of them.
_NOT_OF_THE_LOG = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR})


class Damaged(Exception):
    """A log that cannot be trusted: the run is quarantined, and left on disk as it is."""

    words = "is damaged and was not touched: "

    def __init__(self, run_id: str, why: str) -> None:
        super().__init__(f"run {run_id} {self.words}{why}")
        self.run_id = run_id
        self.why = why

    def again(self) -> Damaged:
        """The same refusal for another request: one that is raised twice would keep the frames of both."""
        return type(self)(self.run_id, self.why)


class Newer(Damaged):
    """A log of a later version: it is refused like a damaged one, since we do not know what it says, but it is sound."""

    words = ""


class SyncFailed(OSError):
    """What was written is not durable, nor may be what other files were to have in the same commit of the file system."""


class CommitFailed(Exception):
    """A batch did not become durable. It has been discarded; the log ends where it ended before. is_of_sync: it was a sync
    that failed."""

    def __init__(self, error: OSError | MemoryError) -> None:
        super().__init__(words_of(error))
        self.errno = error.errno if isinstance(error, OSError) else errno.ENOMEM
        self.is_of_sync = isinstance(error, SyncFailed)


def words_of(error: Exception) -> str:
    """What a shortage is called."""
    return os.strerror(errno.ENOMEM) if isinstance(error, MemoryError) else getattr(error, "strerror", None) or str(error)


def sync(fd: int) -> None:
    """Flush a file to the medium. macOS's fsync stops at the drive's cache; F_FULLFSYNC goes on, where the file system
    knows it. Raises OSError."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(fd)


def _sync_surely(fd: int) -> None:
    """Raises SyncFailed: an error like that of a full disk then tells which of the two has failed, a write or a sync."""
    try:
        sync(fd)
    except OSError as error:
        raise SyncFailed(error.errno, error.strerror) from error


def sync_directory(path: str) -> None:
    """Make the names in a directory durable. Raises OSError; SyncFailed when it is the sync that fails."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync_surely(fd)
    finally:
        os.close(fd)


def exists(path: str) -> bool:
    """Is anything of this name there? os.path.lexists takes every error for a no. Raises OSError when nobody can tell."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# -- reading -----------------------------------------------------------------------------------------------------------


class Reading:
    """The good lines of a log, in order; then `end` (the offset after the last of them) and `torn_bytes` (what is
    behind it). Raises Damaged while iterating."""

    def __init__(self, file: BinaryIO, run_id: str) -> None:
        self._file = file
        self._run_id = run_id
        self._seed = events.seed(run_id)
        self.seq = 0
        self.end = 0
        self.torn_bytes = 0

    def __iter__(self) -> Iterator[Line]:
        seed, checks, decode = self._seed, events.checks, events.decode
        seq = end = 0
        for raw in self._file:
            body = raw[:-1]
            if raw[-1] != _NEWLINE or not checks(body, seed):
                self._judge_tail(raw)
                return
            try:
                line = decode(body)
            except InvalidEvent as error:
                raise refusal(self._run_id, seq + 1, error) from None
            if line.seq != seq + 1:
                self._judge_tail(raw)
                return
            if line.durable > seq:
                raise Damaged(self._run_id, f"line {line.seq} says that line {line.durable} was durable before it")
            self.seq = seq = seq + 1
            self.end = end = end + len(raw)
            yield line
        if self.seq == 0:
            raise Damaged(self._run_id, "the log is empty, though creation writes line 1")

    def _judge_tail(self, raw: bytes) -> None:
        """Is what follows the last good line a torn tail, or damage?"""
        if self.seq == 0:
            raise Damaged(self._run_id, "line 1 is not whole, though nobody heard of the run before it was durable")
        while raw:
            self.torn_bytes += len(raw)
            if not raw.endswith(b"\n"):
                # The end of the file. A writer may be adding the rest of this line right now, so we do not read on: the
                # rest would look like a bad line, and the next line like the proof of damage.
                return
            if events.checks(raw[:-1], self._seed):
                durable = _durable_of(raw[:-1])
                if durable is None or durable > self.seq:
                    raise Damaged(
                        self._run_id,
                        f"line {self.seq + 1} is missing or altered, though a later line proves that it was on disk",
                    )
            raw = self._file.readline()


def refusal(run_id: str, seq: int, error: InvalidEvent) -> Damaged:
    """Why a run is refused whose line `seq` is whole and no event of ours."""
    return Newer(run_id, str(error)) if isinstance(error, NewerLog) else Damaged(run_id, f"line {seq}: {error}")


def _durable_of(body: bytes) -> int | None:
    try:
        return events.decode(body).durable
    except InvalidEvent:
        return None


def open_log(files: RunFiles, run_id: str) -> BinaryIO:
    """The log, for reading. Raises FileNotFoundError when there is no such run, and what `open_plain` raises."""
    try:
        return open_plain(files.events, run_id)
    except FileNotFoundError:
        if exists(files.directory):
            raise Damaged(run_id, "it has no events.ndjson") from None
        raise


def open_plain(path: str, run_id: str) -> BinaryIO:
    """A file of a run, for reading. Raises FileNotFoundError; Damaged when it is no plain file; and OSError when the
    system is short of descriptors or memory, or its disk fails: that says nothing about the file."""
    name = path.rpartition("/")[2]
    try:
        # O_NONBLOCK: opening a FIFO that somebody put there must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _NOT_OF_THE_LOG:
            raise
        raise Damaged(run_id, f"{name} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Damaged(run_id, f"{name} is not a plain file")
    return open(fd, "rb")


def check_owner(run_id: str, name: str, found: os.stat_result) -> None:
    """A daemon carries out what a run's files say, so nobody else may have written them. (Who only reads them is not
    harmed.) Raises Damaged."""
    if found.st_uid != os.geteuid():
        raise Damaged(run_id, f"{name} belongs to uid {found.st_uid}, not to us (uid {os.geteuid()})")


def fold(files: RunFiles, run_id: str) -> tuple[Run, Reading]:
    """The state that a log tells, and where its good part ends. Raises FileNotFoundError, Damaged."""
    with open_log(files, run_id) as file:
        return _fold(file, run_id)


def _fold(file: BinaryIO, run_id: str) -> tuple[Run, Reading]:
    reading = Reading(file, run_id)
    lines = iter(reading)
    try:
        run = Run(next(lines))
        if run.run_id != run_id:
            raise Impossible(f"the log is of run {run.run_id!r}")
        for line in lines:
            run.apply(line)
    except Impossible as error:
        raise Damaged(run_id, f"line {reading.seq}: {error}") from None
    return run, reading


def submitted(files: RunFiles, run_id: str) -> RunSubmitted:
    """Line 1 of a log. Raises FileNotFoundError, Damaged."""
    with open_log(files, run_id) as file:
        for line in Reading(file, run_id):
            if isinstance(line.event, RunSubmitted):
                return line.event
            break
    raise Damaged(run_id, "line 1 is not run_submitted")


def last_line(files: RunFiles, run_id: str) -> Line | None:
    """The last line of a log, when its checksum is right: enough to tell a finished run from others without reading it
    all. None when it is torn, too long to be an end, or no event: then the lines before it tell why. Raises
    FileNotFoundError, Damaged."""
    with open_log(files, run_id) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    if not tail.endswith(b"\n"):
        return None
    raw = tail[:-1].rpartition(b"\n")[2]
    if not events.checks(raw, events.seed(run_id)):
        return None
    try:
        return events.decode(raw)
    except InvalidEvent:
        return None


def offset_of(files: RunFiles, run_id: str, seq: int) -> int:
    """Where line `seq` begins (or would begin, behind the last line). Raises FileNotFoundError, Damaged."""
    with open_log(files, run_id) as file:
        offset = 0
        for number, raw in enumerate(file, 1):
            if number >= seq or not raw.endswith(b"\n"):
                break
            offset += len(raw)
        return offset


def read_lines(files: RunFiles, run_id: str, offset: int, end: int, limit: int) -> bytes:
    """Whole lines from `offset` on: about `limit` bytes of them, at least one, and none beyond `end`. Opened afresh
    each time, since a recovery may have moved the log to a new inode (with the same bytes at the same places).
    Raises FileNotFoundError, Damaged."""
    with open_log(files, run_id) as file:
        file.seek(offset)
        data = file.read(min(limit, max(0, end - offset)))
        if data and not data.endswith(b"\n"):
            cut = data.rfind(b"\n") + 1
            data = data[:cut] if cut else data + file.readline(end - offset - len(data))
        return data if data.endswith(b"\n") else b""


# -- writing -----------------------------------------------------------------------------------------------------------


class Journal:
    """The one writer of one run's log.

    seq      of the last line appended       durable  of the last line known to be on disk
    size     bytes known to be on disk
    """

    def __init__(self, files: RunFiles, run_id: str, fd: int, seq: int, size: int) -> None:
        self.files = files
        self.run_id = run_id
        self._fd = fd
        self._seed = events.seed(run_id)
        self._pending: list[bytes] = []
        self._written = b""
        self._must_move = False
        self.seq = self.durable = seq
        self.size = size

    def append(self, event: Event, at: str, mono_ms: int) -> Line:
        """Add a line to the batch. It is nowhere but in memory until `commit`."""
        line = Line(self.seq + 1, at, mono_ms, self.durable, event)
        self._pending.append(events.encode(line, self._seed))
        self.seq = line.seq
        return line

    @property
    def has_pending(self) -> bool:
        return bool(self._pending or self._written)

    def write(self) -> None:
        """Write the batch without waiting for the disk: `commit` then has only to sync it. Logs that are all written before
        the first of them is synced share the commit of the file system's journal (0.25 instead of 0.49 ms each on our ext4).

        Raises CommitFailed, as `commit` does."""
        try:
            # Its lines are let go of at once: those of ten thousand steps that become READY are megabytes.
            batch, self._pending = b"".join(self._pending), []
            if self._must_move:
                self._move_to_new_inode()
            self._write(batch)
            self._written += batch
        except (OSError, MemoryError) as error:
            self.discard()
            raise CommitFailed(error) from error

    def write_anew(self) -> None:
        """What was written is to be written once more, into a new inode: since then a sync of another file has failed, and
        where the two were to be in one commit of the file system's journal, ours would now succeed with nothing on the disk
        (ext4: jbd2_complete_transaction waits for no transaction that is gone). `commit` does it."""
        if self._written:
            self._pending, self._written = [self._written, *self._pending], b""
            # Where it lies now, the next daemon would believe it, and so would readers, should the move fail.
            self._cut_back()
            self._must_move = True

    def commit(self) -> bytes:
        """Make the batch durable: one write, if that is not done, and one fsync. Returns its bytes.

        Raises CommitFailed; the batch is then discarded, and the caller must fold its state again from `refold`."""
        if self._pending:
            self.write()
        try:
            self._sync()
        except OSError as error:
            self.discard()
            raise CommitFailed(error) from error
        batch, self._written = self._written, b""
        self.durable = self.seq
        self.size += len(batch)
        return batch

    def discard(self) -> None:
        """Drop the batch."""
        self._pending, self._written = [], b""
        self.seq = self.durable

    def refold(self) -> Run:
        """The state that the durable part of the log tells. Raises Damaged."""
        # Read from our own descriptor and no further: a batch that failed may still lie behind the durable part.
        try:
            run, reading = _fold(io.BytesIO(os.pread(self._fd, self.size, 0)), self.run_id)
        except (OSError, MemoryError) as error:
            raise Damaged(self.run_id, f"its log cannot be read: {words_of(error)}") from None
        if reading.end != self.size:
            raise Damaged(self.run_id, f"its log should have {self.size} durable bytes and has {reading.end}")
        return run

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, batch: bytes) -> None:
        try:
            _write_all(self._fd, batch)
        except (OSError, MemoryError):
            self._cut_back()
            raise

    def _sync(self) -> None:
        try:
            _sync_surely(self._fd)
        except SyncFailed:
            # This file's next fsync would lie (see the theory above). Cut back all the same, so that no reader
            # is shown what nobody was promised.
            self._cut_back()
            self._must_move = True
            raise

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self.size)
        except OSError:
            self._must_move = True

    def _move_to_new_inode(self) -> None:
        fd = _copy_to_new_inode(self.files, self._fd, self.size)
        os.close(self._fd)
        self._fd = fd
        self._must_move = False


def create(home: Home, run_id: str, first: Event, environment: bytes, at: str, mono_ms: int) -> Journal:
    """A new run on disk, whole or not at all: live marker, directory, environment and line 1 are durable on return.

    Raises FileExistsError when the run exists, OSError when the disk refuses (then nothing of it is left)."""
    files, building = home.run(run_id), _building(home, run_id)
    if exists(files.directory):
        raise FileExistsError(errno.EEXIST, "the run exists", files.directory)
    _remove(building)
    fd = marker = -1
    try:
        # All is made and written before the first sync: a file system with a journal then commits it at once, and the syncs
        # that follow find less to do (1.7 instead of 2.3 ms on our ext4).
        unmark_live(home, run_id)
        marker = _open_new(f"{home.live}/{run_id}")
        os.mkdir(building.directory, 0o700)
        os.mkdir(building.attempts, 0o700)
        line = events.encode(Line(1, at, mono_ms, 0, first), events.seed(run_id))
        fd = _create_log(building.events)
        _write_all(fd, line)
        _write_file(building.environment, environment)
        sync(fd)
        sync(marker)
        sync_directory(building.directory)
        sync_directory(home.live)
        os.rename(building.directory, files.directory)
        sync_directory(home.runs)
    except (OSError, MemoryError):
        if fd >= 0:
            os.close(fd)
        # Back, so that whoever kills us now leaves no ruin under the name of a run.
        try:
            os.rename(files.directory, building.directory)
        except OSError:
            pass
        _remove(building)
        unmark_live(home, run_id)
        raise
    finally:
        if marker >= 0:
            os.close(marker)
    return Journal(files, run_id, fd, 1, len(line))


def abandon(home: Home, run_id: str) -> None:
    """Remove what a `create` that was killed has left of a run that never was."""
    _remove(_building(home, run_id))
    unmark_live(home, run_id)


def _remove(made: RunFiles) -> None:
    """Remove what `create` makes of a run, as far as it is there. The environment goes first: whatever a power cut keeps of
    the rest is then no run that could start. (Importing shutil takes a client that only reads logs 4 ms of 40.)"""
    for path, remove in (
        (made.environment, os.unlink), (made.events, os.unlink), (made.attempts, os.rmdir), (made.directory, os.rmdir)
    ):  # fmt: skip
        try:
            remove(path)
        except OSError:
            pass


def _building(home: Home, run_id: str) -> RunFiles:
    # The leading dot keeps it from being taken for a run.
    return RunFiles(f"{home.runs}/.new-{run_id}")


def recover(home: Home, run_id: str) -> tuple[Journal, Run, int, str | None]:
    """Take over a log that an earlier session may have left in any state.

    Returns the journal (on a new inode that ends behind the last good line), the state, how many torn bytes were cut
    off and the name of the file that keeps them. Raises FileNotFoundError, Damaged, OSError. Doing it twice, or being
    killed in the middle of it, changes nothing."""
    files = home.run(run_id)
    run, reading = fold(files, run_id)
    check_owner(run_id, "its directory", os.lstat(files.directory))
    check_attempts(run, attempts_on_disk(files, run_id))
    try:
        os.mkdir(files.attempts, 0o700)
    except FileExistsError:
        pass
    # Whoever made its marker, or created it, may have been killed before the sync: then neither is durable yet.
    mark_live(home, run_id)
    sync_directory(home.live)
    sync_directory(home.runs)
    with open_log(files, run_id) as file:
        check_owner(run_id, "events.ndjson", os.fstat(file.fileno()))
        kept_as = _keep_torn_tail(files, file, reading) if reading.torn_bytes else None
        fd = _copy_to_new_inode(files, file.fileno(), reading.end)
    return Journal(files, run_id, fd, run.seq, reading.end), run, reading.torn_bytes, kept_as


def mark_live(home: Home, run_id: str) -> None:
    """Put the run on the list of those that a start-up looks at. Raises OSError. Its name is durable when `create` or
    `recover` has returned."""
    # Empty as it is, it is synced: without a journal, ext4 has durable names whose inodes are nowhere, and clears them. And
    # it is made anew each time, since one whose sync has failed before would never be durable.
    made = f"{home.live}/.new-{run_id}"
    try:
        os.unlink(made)
    except FileNotFoundError:
        pass
    _write_file(made, b"")
    try:
        os.rename(made, f"{home.live}/{run_id}")
    except IsADirectoryError:
        # Somebody has put it there. It marks the run as well as a file does.
        os.unlink(made)


def unmark_live(home: Home, run_id: str) -> None:
    """Take a run, whose end is durable, off that list. No fsync and no error: a marker that stays costs one look."""
    try:
        os.unlink(f"{home.live}/{run_id}")
    except OSError:
        pass


def attempts_on_disk(files: RunFiles, run_id: str) -> list[str]:
    """The names in a run's directory of attempts. A reader looks here before it reads the log: what is here then, a later
    look at the log must know. Raises Damaged, OSError."""
    try:
        return os.listdir(files.attempts)
    except FileNotFoundError:
        # Somebody deleted it; what it held is gone, but the log is whole.
        return []
    except OSError as error:
        if error.errno in _NOT_OF_THE_LOG:
            raise
        raise Damaged(run_id, f"attempts cannot be looked into: {error.strerror}") from None


def check_attempts(run: Run, names: list[str]) -> None:
    """Does the log know every attempt on disk? Raises Damaged."""
    for name in names:
        found = parse_attempt_name(name)
        if found is None:
            continue
        ordinal, attempt = found
        if ordinal > len(run.steps) or attempt > run.steps[ordinal - 1].attempt:
            raise Damaged(run.run_id, f"attempts/{name} exists, but the log ends before that attempt was started")


def _keep_torn_tail(files: RunFiles, file: BinaryIO, reading: Reading) -> str:
    """Copy the tail aside. Named by offset and content: a crash in recovery makes the same file again, not another."""
    file.seek(reading.end)
    tail = file.read()
    name = f"torn-{reading.end}-{zlib.crc32(tail):08x}"
    _write_file(f"{files.directory}/{name}", tail)
    return name


def _copy_to_new_inode(files: RunFiles, source: int, size: int) -> int:
    """The first `size` bytes of the log as a new file in its place, durable; its descriptor, for appending."""
    temporary = files.events + ".new"
    try:
        os.unlink(temporary)
    except FileNotFoundError:
        pass
    fd = _create_log(temporary)
    try:
        offset = 0
        while offset < size:
            piece = os.pread(source, min(_COPY_BYTES, size - offset), offset)
            if not piece:
                raise OSError(errno.EIO, "the log became shorter while it was copied")
            _write_all(fd, piece)
            offset += len(piece)
        _sync_surely(fd)
        os.rename(temporary, files.events)
        sync_directory(files.directory)
    except (OSError, MemoryError):
        os.close(fd)
        # On a full disk the room is needed; after the rename there is nothing of this name.
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise
    return fd


def _create_log(path: str) -> int:
    # Readable too: a journal that must move copies itself from its own descriptor.
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _write_file(path: str, data: bytes) -> None:
    """A small file, durable once its directory is. Raises OSError."""
    fd = _open_new(path)
    try:
        _write_all(fd, data)
        sync(fd)
    finally:
        os.close(fd)


def _open_new(path: str) -> int:
    # O_NONBLOCK: as in open_plain.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _write_all(fd: int, data: bytes) -> None:
    """Short writes are real (a full tmpfs, RLIMIT_FSIZE): go on until all is written or an error says why not."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
