"""A machine that a test can crash at any call: clock, descriptors, processes, and who dies with whom.

Theory
* wfd is not told: simulated_os.py puts faces of this machine in the place of `os` and others in wfd's own modules.
  Everything above them, down to the last line of process.py, is the real thing.
* Each call counts. Before a call the daemon may die (`Crash`, which no `except` of wfd's catches), or the world may move
  on by an event: so everything that can happen between two calls does. A dead daemon's calls do nothing any more.
* Time is awake milliseconds. It moves only in `select` and by such nudges, from one event of the world to the next.
* A shim is a little play written by a `Plan`. Its acts are what process.SHIM does; tests/test_simulation.py performs the
  same plans with real shells and compares what process.py says of both.
"""

from __future__ import annotations

import heapq
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tests.simulated_disk import Chance, Directory, Disk, File, Node

Key = tuple[str, str, int]
NEVER = 1 << 60
_FIRST_PID = 1_000
# A number that has become free is given away again only after this. Real ones last longer (see process.SWEEP_MAX_MS).
PID_REUSE_MS = 3_000


class Crash(BaseException):
    """The daemon dies in the middle of a call."""


class Broken(BaseException):
    """A promise was broken. The daemon must not catch it."""


@dataclass(slots=True)
class Plan:
    """What an attempt will do.

    begin_ms       from the spawn to the line `pid`; run_ms: from there to the command's end, None for never
    record_ms      from the command's end to the line `exit`
    shim_dies_ms   from the spawn to a SIGKILL of the shim alone, or None
    on_term        of the command: "dies", "ignores", "zero" (exits 0 after a moment)
    survivor       None, or how a process that the command leaves in its group takes a TERM: "dies", "ignores"
    escapee        the same of one that has left the group with setsid; or "unmarked": and has changed its environment
    error          None, "cwd" (the directory is not there), "fork" (the shim cannot), or an errno of the spawn
    """

    begin_ms: int = 1
    run_ms: int | None = 10
    record_ms: int = 1
    exit_code: int = 0
    shim_dies_ms: int | None = None
    on_term: str = "dies"
    survivor: str | None = None
    escapee: str | None = None
    error: str | int | None = None


@dataclass(slots=True, eq=False)
class Process:
    """A process. key: of its attempt, None for a stranger. parent: the daemon's incarnation, or 0 for another process,
    which is mother, or else init. term_from: the incarnation that has sent it a TERM."""

    pid: int
    group: int
    key: Key | None
    role: str
    on_term: str = "dies"
    parent: int = 0
    mother: Process | None = None
    is_zombie: bool = False
    status: int = 0
    term_from: int = 0

    @property
    def is_out_of_reach(self) -> bool:
        """Has it left its group, and is no daemon told that it is there?"""
        return self.role == "escapee" and not self.parent and self.mother is None


@dataclass(slots=True, eq=False)
class Attempt:
    """The world's own record of one. code: the command's true exit status; is_recorded: the line `exit` was written."""

    key: Key
    pid: int
    boot: int
    spawned_ms: int
    plan: Plan
    has_begun: bool = False
    was_killed_alone: bool = False
    is_ended_by_daemon: bool = False
    is_recorded: bool = False
    code: int | None = None
    processes: list[Process] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        return any(not (process.is_zombie or process.is_out_of_reach) for process in self.processes)


class OpenFile:
    """An open file description: what several descriptors may share, and what a lock belongs to."""

    __slots__ = ("holders", "node", "path", "position")

    def __init__(self, node: File | Directory, path: str) -> None:
        self.node = node
        self.path = path
        self.position = 0
        self.holders = 1

    def close(self) -> None:
        self.holders -= 1
        if self.holders == 0 and isinstance(self.node, File) and self.node.lock is self:
            self.node.lock = None


class Kernel:
    """The machine. `incarnation` counts its daemons; `plan_of` and the `on_…` calls belong to the history."""

    def __init__(self, chance: Chance) -> None:
        self.chance = chance
        self.disk = Disk()
        self.now_ms = 0
        self.boot, self.boot_id = 1, "boot-1"
        self.incarnation = 0
        self.wall_offset_ms = 1_795_000_000_000
        self.calls = 0
        self.crash_at = NEVER
        self.give_up_ms = NEVER
        self.nudge_at = NEVER
        self.nudge_every = 0
        self.dirty_crash = 0.0
        self.is_crash_dirty = False
        self.is_dead = True
        self.is_woken = False
        self.is_subreaper = False
        self.late_exit_notice = self.late_hang_up = 0.0
        self.fails_to_sync = 0
        self.has_no_descriptors = self.has_no_processes = False
        self.fds: dict[int, OpenFile] = {}
        self.processes: dict[int, Process] = {}
        self.attempts: dict[Key, Attempt] = {}
        self.unspawnable: set[Key] = set()
        self.trace: list[str] | None = None
        # Where in wfd's source the daemon has called, if that is asked for; and where it was killed last.
        self.called_sites: set[str] | None = None
        self.crash_site = ""
        self.plan_of: Callable[[Key], Plan] = lambda key: Plan()
        self.on_log: Callable[[str], None] = lambda text: None
        self.on_spawn: Callable[[Key], None] = lambda key: None
        self.on_signal: Callable[[Attempt, int, bool], None] = lambda attempt, number, is_shim_alive: None
        self.on_durable: Callable[[str, Node], None] = lambda path, node: None
        self._boot_ms = -12_345
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0
        self._next_pid = _FIRST_PID
        # A living shim's descriptor 9.
        self._statuses: dict[Process, OpenFile] = {}

    # -- time -----------------------------------------------------------------------------------------------------

    def monotonic_ms(self) -> int:
        return self.now_ms - self._boot_ms

    def wall(self) -> str:
        seconds, ms = divmod(self.now_ms + self.wall_offset_ms, 1000)
        days, seconds = divmod(seconds, 86_400)
        # A calendar of its own: 31 days in each month. It is only for people.
        months, day = divmod(days, 31)
        return (
            f"{1970 + months // 12:04}-{months % 12 + 1:02}-{day + 1:02}T"
            f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{ms:03}000Z"
        )

    def after(self, delay_ms: int, call: Callable[[], None]) -> None:
        """Let something happen in the world."""
        self._serial += 1
        heapq.heappush(self._events, (self.now_ms + delay_ms, self._serial, call))

    def happen(self, limit_ms: int) -> bool:
        """The next event of the world, if it lies before the limit (awake time); else the time is the limit."""
        if not self._events or self._events[0][0] > limit_ms:
            self.now_ms = max(self.now_ms, limit_ms)
            return False
        due_ms, _, call = heapq.heappop(self._events)
        self.now_ms = max(self.now_ms, due_ms)
        call()
        return True

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    # -- calls ----------------------------------------------------------------------------------------------------

    def enter(self, *what: object) -> None:
        """A call of the daemon begins: it may die, or the world may move on first."""
        calls = self.calls = self.calls + 1
        if self.trace is not None and not self.is_dead:
            self.note(" ".join(_short(part) for part in what))
        if self.called_sites is not None:
            self.called_sites.add(_site(what[0]))
        if calls >= self.crash_at or self.is_dead:
            if not self.is_dead:
                self.crash_site = _site(what[0])
            raise Crash
        if calls >= self.nudge_at:
            self.nudge_at = self.calls + 1 + self.chance.below(self.nudge_every)
            self.nudge()

    def nudge(self) -> None:
        """The next event of the world happens now, in the middle of a call, if it was to happen soon anyway."""
        if self._events and self._events[0][0] <= self.now_ms + 200:
            self.happen(NEVER)

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now_ms:>7} {self.calls:>5}  {text}")

    def crash_soon(self) -> None:
        """Unsynced bytes are where crashes hurt."""
        if self.crash_at < NEVER and self.dirty_crash and self.chance.hit(self.dirty_crash):
            self.crash_at = self.calls + 1 + self.chance.below(3)
            self.is_crash_dirty = True

    def start_daemon(self) -> None:
        self.incarnation += 1
        self.is_dead = self.is_subreaper = False
        self.fds = {}
        self.note(f"=== daemon {self.incarnation}, {self.boot_id}")

    def end_daemon(self) -> None:
        """Its descriptors are closed; its zombies go to init, its living children too."""
        self.is_dead = True
        for file in self.fds.values():
            file.close()
        self.fds = {}
        for child in list(self.processes.values()):
            if child.parent:
                child.parent = 0
                if child.is_zombie:
                    self._reap_by_init(child)

    def cut_power(self) -> None:
        """Everything that lives is gone, and the disk keeps what it keeps. The clock and all pids begin anew."""
        self.note("=== power cut")
        self.end_daemon()
        self.processes, self._statuses = {}, {}
        self.disk.cut_power(self.chance)
        self.boot += 1
        self.boot_id = f"boot-{self.boot}"
        self._boot_ms = self.now_ms - self.chance.below(60_000)
        self._next_pid = _FIRST_PID
        for attempt in self.attempts.values():
            attempt.processes = []
        if self.chance.hit(0.5):
            # Others have the numbers now that attempts of the last boot had.
            for _ in range(self.chance.between(1, 6)):
                self._new_process(None, "stranger", group=0)

    # -- processes ------------------------------------------------------------------------------------------------

    def _new_process(self, key: Key | None, role: str, group: int, on_term: str = "dies") -> Process:
        pid = self._next_pid
        self._next_pid += 1
        new = self.processes[pid] = Process(pid, group or pid, key, role, on_term)
        return new

    def spawn(self, key: Key, status: OpenFile, plan: Plan) -> int:
        shim = self._new_process(key, "shim", group=0)
        shim.parent = self.incarnation
        attempt = self.attempts[key] = Attempt(key, shim.pid, self.boot, self.now_ms, plan, processes=[shim])
        status.holders += 1
        self.after(plan.begin_ms, lambda: self._begin(attempt, shim, status))
        if plan.shim_dies_ms is not None:
            self.after(plan.shim_dies_ms, lambda: self.kill_shim(attempt))
        self._statuses[shim] = status
        return shim.pid

    def _is_running(self, process: Process) -> bool:
        return self.processes.get(process.pid) is process and not process.is_zombie

    def _begin(self, attempt: Attempt, shim: Process, status: OpenFile) -> None:
        if not self._is_running(shim):
            return
        if attempt.plan.error == "cwd":
            self._write_status(status, "error cwd")
            self._die(shim, 125 << 8)
            return
        if attempt.plan.error == "fork":
            self._die(shim, 2 << 8)
            return
        self._write_status(status, f"pid {shim.pid}")
        attempt.has_begun = True
        self.note(f"{_name(attempt.key)} begins as {shim.pid}")
        command = self._new_process(attempt.key, "command", shim.group, attempt.plan.on_term)
        command.mother = shim
        attempt.processes.append(command)
        if attempt.plan.survivor is not None:
            attempt.processes.append(self._new_process(attempt.key, "survivor", shim.group, attempt.plan.survivor))
        if attempt.plan.escapee == "unmarked":
            self._new_process(None, "stranger", group=0).mother = command
        elif attempt.plan.escapee is not None:
            attempt.processes.append(self._new_process(attempt.key, "escapee", group=0, on_term=attempt.plan.escapee))
        for left in attempt.processes[2:]:
            left.mother = command
        if attempt.plan.run_ms is not None:
            self.after(attempt.plan.run_ms, lambda: self._end_command(attempt, command, attempt.plan.exit_code))

    def _write_status(self, status: OpenFile, line: str) -> None:
        assert isinstance(status.node, File)
        self.disk.append(status.node, f"{line}\n".encode())

    def _end_command(self, attempt: Attempt, command: Process, code: int) -> None:
        if not self._is_running(command):
            return
        attempt.code = code
        self._die(command, code << 8)
        self.note(f"{_name(attempt.key)} ends with {code}")
        shim = attempt.processes[0]
        self.after(attempt.plan.record_ms, lambda: self._record(attempt, shim, code))

    def _record(self, attempt: Attempt, shim: Process, code: int) -> None:
        if not self._is_running(shim):
            return
        self._write_status(self._statuses[shim], f"exit {code}")
        attempt.is_recorded = True
        if attempt.is_ended_by_daemon:
            self._die(shim, code << 8)
        else:
            self._signal_all(attempt.pid, signal.SIGKILL)

    def kill_shim(self, attempt: Attempt) -> None:
        """The shim alone; its command goes on."""
        shim = attempt.processes[0] if attempt.processes else None
        if shim is not None and self._is_running(shim):
            attempt.was_killed_alone = True
            self._die(shim, signal.SIGKILL)

    def _die(self, process: Process, status: int) -> None:
        process.is_zombie, process.status = True, status
        file = self._statuses.pop(process, None)
        if file is not None:
            file.close()
        self._hand_over_orphans(process)
        if process.parent == self.incarnation and not self.is_dead:
            self._notify_of_exit()
        elif process.role == "shim":
            self._reap_by_init(process)
        else:
            # Its parent, the shim or init, waits for it.
            self.forget(process)

    def _hand_over_orphans(self, dead: Process) -> None:
        """To the daemon that is above them, if it wants them; else to init."""
        if dead.key is None:
            return
        above = self.attempts[dead.key].processes[0].parent
        is_wanted = self.is_subreaper and above == self.incarnation and not self.is_dead
        for process in self.processes.values():
            if process.mother is dead:
                process.mother, process.parent = None, self.incarnation if is_wanted else 0

    def _notify_of_exit(self) -> None:
        def notice() -> None:
            self.is_woken = True

        if self.chance.hit(self.late_exit_notice):
            self.after(self.chance.below(500), notice)
        else:
            notice()
        if self.chance.hit(self.late_exit_notice):
            self.after(self.chance.below(500), notice)

    def _reap_by_init(self, process: Process) -> None:
        # PID 1 of a container may take its time.
        if self.chance.hit(0.2):
            self.after(self.chance.below(300), lambda: self.forget(process))
        else:
            self.forget(process)

    def forget(self, process: Process) -> None:
        if self.processes.get(process.pid) is not process:
            return
        del self.processes[process.pid]
        if process.role == "shim" and self.chance.hit(0.3):
            self.after(PID_REUSE_MS + self.chance.below(1_500), partial(self._reuse, process.pid, self.boot))

    def _reuse(self, pid: int, boot: int) -> None:
        """A stranger gets a number that an attempt had."""
        if boot == self.boot and not any(process.group == pid or process.pid == pid for process in self.processes.values()):
            self.processes[pid] = Process(pid, pid, None, "stranger")

    def members(self, group: int) -> list[Process]:
        return [process for process in self.processes.values() if process.group == group]

    def signal(self, targets: list[Process], number: int) -> None:
        """The daemon's signal, to some processes."""
        if number not in (signal.SIGTERM, signal.SIGKILL):
            return
        living = [process for process in targets if not process.is_zombie]
        for process in living:
            if process.key is None:
                raise Broken(f"signal {number} was sent to the process {process.pid} of a stranger")
            if number == signal.SIGTERM and process.term_from == self.incarnation:
                raise Broken(f"a second TERM was sent to the {process.role} {process.pid}")
            process.term_from = self.incarnation if number == signal.SIGTERM else process.term_from
        keys = {process.key: None for process in living if process.key is not None}
        for key in keys:
            attempt = self.attempts[key]
            self.on_signal(attempt, number, self._is_running(attempt.processes[0]))
            attempt.is_ended_by_daemon = True
        self._deliver(living, number)

    def _signal_all(self, group: int, number: int) -> None:
        self._deliver([process for process in self.members(group) if not process.is_zombie], number)

    def _deliver(self, living: list[Process], number: int) -> None:
        for process in living:
            assert process.key is not None
            attempt = self.attempts[process.key]
            if number == signal.SIGKILL:
                self._die(process, signal.SIGKILL)
            elif process.role == "shim":
                # Its traps are set long before it begins; the engine does not send a TERM earlier.
                if not attempt.has_begun:
                    self._die(process, signal.SIGTERM)
            elif process.role in ("survivor", "escapee"):
                if process.on_term == "dies":
                    self._die(process, signal.SIGTERM)
            elif process.on_term != "ignores":
                self.after(3, partial(self._end_command, attempt, process, 0 if process.on_term == "zero" else 143))


def _site(call: object) -> str:
    """The place in wfd that makes this call."""
    frame = sys._getframe(2)
    while frame.f_back is not None and not frame.f_globals["__name__"].startswith("wfd."):
        frame = frame.f_back
    return f"{frame.f_globals['__name__']}:{frame.f_lineno} {call}"


def _name(key: Key) -> str:
    return f"{key[0]}/{key[1]}.{key[2]}"


def _short(part: object) -> str:
    text = repr(part) if isinstance(part, bytes) else str(part)
    return text if len(text) <= 160 else text[:157] + "..."
