"""One simulated history: the real daemon on a machine that crashes, forgets, lies and stalls, by one integer.

Theory: a history is a function of its seed. The seed chooses workflows, what their steps do, who asks for what and when,
and every misfortune: the daemon is killed before any call (more often while bytes are unsynced), a third of the times by
a power cut, also while it recovers; the disk is full, fails to sync and lies about it later; descriptors and processes
run out; the wall clock jumps; shims are killed; notices of exits come late and twice; synced bytes rot. Then the faults
stop, and every run must come to its end.

What is checked, and when: each line in the instant in which it is durable (simulated_ledger.py); each spawn, signal,
answer and watched line in the instant in which it happens, against what is durable then (here); the whole log, at the end,
by the rules' own replay. Nothing in wfd knows that it is simulated (simulated_os.py).
"""

from __future__ import annotations

import errno
import json
import signal
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.simulated_clients import Caller, Client, Error, SimulatedSelector, SimulatedSocket, Watcher, World
from tests.simulated_disk import Chance, Directory, File, Node
from tests.simulated_kernel import NEVER, Attempt, Broken, Crash, Kernel, Key, Plan
from tests.simulated_ledger import Ledger
from tests.simulated_os import HOME, installed
from wfd import decide, events
from wfd.events import Line
from wfd.paths import Home
from wfd.state import Run
from wfd.supervisor import Supervisor

_HOME = Home(HOME)
_DAY_MS = 86_400_000
# A history that is not over by then, after the last fault, never will be.
_PATIENCE_MS = 300_000
_MAX_TURNS = 4_000
# Of crashes anywhere, and of those in the middle of a write: together about a third.
_POWER_CUTS, _POWER_CUTS_IN_WRITES = 0.2, 0.6
# Of the histories. They cost three times as much as others, and find what those would find once in millions.
_STORMS = 0.06
_ENVIRONMENT = {"env": {"HOME": "/home/u"}, "umask": 18, "limits": {}}


@dataclass(slots=True)
class Report:
    """What became of a history.

    problem         "" when no promise was broken
    digest          of all its bytes
    recovery_calls  how many calls each daemon made before its first wait
    crash_sites     the places in wfd's source at which it was killed
    """

    seed: int
    problem: str = ""
    digest: int = 0
    calls: int = 0
    crashes: int = 0
    power_cuts: int = 0
    lines: int = 0
    trace: list[str] = field(default_factory=list)
    recovery_calls: list[int] = field(default_factory=list)
    crash_sites: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Script:
    """A history whose misfortunes are chosen, not drawn: what the exhaustive mode varies.

    crashes  at which call the daemon dies: the first counted from the start, each other from the daemon's own start"""

    definition: dict[str, object]
    exit_codes: Mapping[str, Sequence[int]]
    crashes: tuple[tuple[int, str], ...] = ()

    @property
    def size(self) -> int:
        """How many steps it has."""
        steps = self.definition["steps"]
        assert isinstance(steps, list)
        return len(steps)


class History(World):
    """One history. `run` makes it happen."""

    def __init__(self, seed: int, script: Script | None = None, is_traced: bool = False) -> None:
        self.seed = seed
        self.chance = Chance(seed)
        self.script = script
        self.kernel = Kernel(self.chance)
        self.report = Report(seed)
        if is_traced:
            self.kernel.trace = self.report.trace
        self.ledgers: dict[str, Ledger] = {}
        self.callers: list[Caller] = []
        self.watchers: list[Watcher] = []
        self.definitions: dict[str, dict[str, object]] = {}
        self.selector: SimulatedSelector | None = None
        self.supervisor: Supervisor | None = None
        self.is_calm = False
        self.max_parallel = 100
        self._crashes_left = 0
        self._was_late = False
        self._is_cursed = False
        # Drawn apart, so that the other histories are what they were.
        self._escapes = Chance(seed + (1 << 40))

    def run(self) -> Report:
        """Let it happen. A broken promise is in the report."""
        kernel = self.kernel
        is_linux = self.script is not None or self.chance.hit(0.85)
        try:
            with installed(kernel, is_linux=is_linux):
                self._prepare()
                self._live()
                self._check_end()
        except Broken as error:
            self.report.problem = str(error)
        except RecursionError:
            raise
        self.report.calls = kernel.calls
        self.report.lines = sum(len(ledger.lines) for ledger in self.ledgers.values())
        self.report.digest = self._digest()
        return self.report

    def _digest(self) -> int:
        digest = zlib.crc32(b"%d %d" % (self.kernel.calls, self.kernel.now_ms))
        for run_id in sorted(self.ledgers):
            digest = zlib.crc32(self.ledgers[run_id].data, digest)
        return digest

    # -- before ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        kernel, chance = self.kernel, self.chance
        disk = kernel.disk
        for path in ("/home", HOME, _HOME.live, _HOME.runs):
            disk.make_directory(path)
            disk.directory(path.rpartition("/")[0]).sync()
            disk.directory(path).sync()
        kernel.plan_of, kernel.on_spawn, kernel.on_log = self._plan_of, self._on_spawn, self._on_log
        kernel.on_signal, kernel.on_durable = self._on_signal, self._on_durable
        if self.script is not None:
            self._add_run("r1", self.script.definition, 0)
            self._watch("r1", None, 1)
            return
        for number in range(1, chance.pick((1, 1, 1, 1, 1, 1, 1, 2, 2, 3)) + 1):
            delay_ms = chance.below(300)
            self._add_run(f"r{number}", _definition(chance), delay_ms)
            # Most come when there is something to see.
            self._add_company(f"r{number}", delay_ms if chance.hit(0.9) else 0)
        self.max_parallel = chance.pick((1, 2, 3, 100))
        kernel.nudge_every = chance.pick((0, 12, 40))
        kernel.nudge_at = kernel.calls + 1 if kernel.nudge_every else NEVER
        kernel.dirty_crash = chance.pick((0.0, 0.2, 0.5))
        kernel.late_exit_notice = chance.pick((0.0, 0.0, 0.3))
        kernel.late_hang_up = 0.7
        self._crashes_left = chance.pick((0, 1, 1, 2, 2, 3, 5))
        self._is_cursed = chance.hit(0.03)
        self._schedule_faults()

    def _add_run(self, run_id: str, definition: dict[str, object], delay_ms: int) -> None:
        self.definitions[run_id] = definition
        self.ledgers[run_id] = Ledger(run_id, self.kernel)
        params: dict[str, object] = {
            "run_id": run_id, "definition": definition, "base_dir": "/base", "cwd": "/work", "environment": _ENVIRONMENT,
        }  # fmt: skip
        self._call(f"submit {run_id}", "submit", params, delay_ms)

    def _call(self, name: str, method: str, params: dict[str, object], delay_ms: int) -> None:
        caller = Caller(self, name, method, params)
        self.callers.append(caller)
        caller.wake_in(delay_ms)

    def _watch(self, run_id: str, room: int | None, delay_ms: int) -> None:
        watcher = Watcher(self, f"watch {run_id}", run_id, room)
        self.watchers.append(watcher)
        watcher.wake_in(delay_ms)

    def _add_company(self, run_id: str, from_ms: int) -> None:
        """Those who look at a run, cancel it and want it tried again."""
        chance = self.chance
        if chance.hit(0.5):
            self._watch(run_id, chance.pick((None, None, 500)), from_ms + chance.below(1_500))
        if chance.hit(0.3):
            self._call("status", "status", {"run_id": run_id}, from_ms + chance.below(1_500))
        for number in range(chance.pick((0, 0, 0, 1, 1, 2))):
            request: dict[str, object] = {"run_id": run_id, "request": f"cancel-{number}"}
            self._call(f"cancel {run_id}", "cancel", request, from_ms + chance.below(1_500))
        if chance.hit(0.3):
            request = {"run_id": run_id, "request": "retry-1"}
            self._call(f"retry {run_id}", "retry", request, from_ms + chance.below(2_500))

    def _schedule_faults(self) -> None:
        chance, kernel = self.chance, self.kernel
        horizon_ms = chance.between(600, 4_000)
        kernel.after(horizon_ms, self._calm_down)
        if chance.hit(0.25):
            self._window(horizon_ms, self._fill_disk, self._free_disk)
        if chance.hit(0.2):
            self._fail_syncs(horizon_ms)
        if chance.hit(0.1):
            self._window(horizon_ms, *_switch(kernel, "has_no_descriptors"))
        if chance.hit(0.1):
            self._window(horizon_ms, *_switch(kernel, "has_no_processes"))
        if chance.hit(0.2):
            kernel.after(chance.below(horizon_ms), self._jump_wall_clock)
        if chance.hit(0.1):
            kernel.after(chance.below(horizon_ms), self._sleep)
        if chance.hit(0.08):
            params: dict[str, object] = {"cancel_runs": True} if chance.hit(0.5) else {}
            kernel.after(chance.below(horizon_ms), lambda: self._call("shutdown", "shutdown", params, 0))
        # Drawn apart, as the escapes are.
        if Chance(self.seed + (2 << 40)).hit(_STORMS):
            self._brew_storm(horizon_ms)

    def _brew_storm(self, horizon_ms: int) -> None:
        """All that is rare at once: several runs, and the next misfortune where the last one has left something undone."""
        chance, kernel = self.chance, self.kernel
        for number in range(len(self.ledgers) + 1, len(self.ledgers) + chance.between(1, 3)):
            self._add_run(f"r{number}", _definition(chance), chance.below(300))
        for run_id in self.ledgers:
            for number in range(chance.below(3)):
                for method in ("cancel", "retry"):
                    request: dict[str, object] = {"run_id": run_id, "request": f"{method}-in-the-storm-{number}"}
                    self._call(f"{method} {run_id}", method, request, chance.below(2_500))
        for _ in range(chance.below(5)):
            self._window(horizon_ms, self._fill_disk, self._free_disk)
        for _ in range(chance.below(6)):
            self._fail_syncs(horizon_ms)
        for shortage in ("has_no_descriptors", "has_no_processes"):
            for _ in range(chance.pick((0, 0, 1, 3))):
                self._window(horizon_ms, *_switch(kernel, shortage))
        self._crashes_left += chance.below(4)

    def _fail_syncs(self, horizon_ms: int) -> None:
        chance, kernel = self.chance, self.kernel
        kernel.after(chance.below(horizon_ms), lambda: setattr(kernel, "fails_to_sync", chance.between(1, 2)))

    def _window(self, horizon_ms: int, begin: Any, end: Any) -> None:
        start_ms = self.chance.below(horizon_ms)
        self.kernel.after(start_ms, begin)
        self.kernel.after(start_ms + self.chance.between(50, 1_500), end)

    def _fill_disk(self) -> None:
        if not self.is_calm:
            self.kernel.disk.free = self.chance.below(6)
            self.kernel.note("the disk is full")

    def _free_disk(self) -> None:
        self.kernel.disk.free = None

    def _jump_wall_clock(self) -> None:
        self.kernel.wall_offset_ms += self.chance.between(-30 * _DAY_MS, 30 * _DAY_MS)
        self.kernel.note("the wall clock jumps")

    def _sleep(self) -> None:
        """The lid is closed for a while: the wall clock goes on, the monotonic one counts awake time."""
        self.kernel.wall_offset_ms += self.chance.below(_DAY_MS)
        self.kernel.note("the machine sleeps")

    def _calm_down(self) -> None:
        """No more faults; every run must end now."""
        if not self.is_calm:
            kernel = self.kernel
            self.is_calm, kernel.give_up_ms = True, kernel.now_ms + _PATIENCE_MS
            kernel.crash_at, kernel.dirty_crash, kernel.fails_to_sync = NEVER, 0.0, 0
            kernel.has_no_descriptors = kernel.has_no_processes = False
            self._free_disk()
            kernel.note("--- calm")

    # -- the life of daemons --------------------------------------------------------------------------------------

    def _live(self) -> None:
        turns = 0
        while not self._is_over():
            self._draw_crash()
            try:
                turns += self._serve(turns)
            except Crash:
                self._bury(has_crashed=True)
            except Exception as error:
                raise Broken(f"the daemon dies of {error!r}") from error
            else:
                self._bury(has_crashed=False)

    def _draw_crash(self) -> None:
        kernel = self.kernel
        if self.script is not None:
            crashes = self.script.crashes
            if self.report.crashes < len(crashes):
                kernel.crash_at = kernel.calls + crashes[self.report.crashes][0]
        elif self._crashes_left and not self.is_calm:
            # Half of them early, where recovery is.
            spread = self.chance.pick((15, 60, 400))
            kernel.crash_at = kernel.calls + 1 + self.chance.below(spread)

    def _serve(self, turns: int) -> int:
        """One daemon, until it ends or is killed."""
        kernel = self.kernel
        kernel.start_daemon()
        calls = kernel.calls
        selector: Any = SimulatedSelector(kernel, self._welcome)
        self.selector = selector
        supervisor = Supervisor(_HOME, "/socket", selector, kernel.boot_id, "host", self.max_parallel)
        self.supervisor = supervisor
        supervisor.make_reserve()
        if self.script is None and self.chance.hit(0.15):
            self._hand_over(selector)
        supervisor.take_over_all()
        self.report.recovery_calls.append(kernel.calls - calls)
        served = 0
        while not supervisor.is_done:
            self._check_turn(supervisor, turns + served)
            if not supervisor.live and self._is_over():
                self._check_idle()
                break
            supervisor.turn(None)
            served += 1
        if supervisor.is_draining and not supervisor.is_stopping:
            self._check_drained()
        supervisor.server.close_all()
        return served

    def _hand_over(self, selector: SimulatedSelector) -> None:
        """A client has started this daemon, with its request on a connection that is there from the beginning."""
        waiting = [caller for caller in self.callers if not caller.is_done]
        if waiting:
            self.chance.pick(waiting).wake()
        arrivals, selector.arrivals = selector.arrivals, []
        for arrival in arrivals:
            self._welcome(arrival)

    def _welcome(self, socket: SimulatedSocket) -> None:
        assert self.supervisor is not None
        self.supervisor.server.welcome(socket)  # type: ignore[arg-type]

    def connect(self, client: Client) -> SimulatedSocket | None:
        if self.kernel.is_dead or self.selector is None:
            return None
        socket = SimulatedSocket(self.kernel, client)
        self.selector.arrivals.append(socket)
        return socket

    def _bury(self, has_crashed: bool) -> None:
        """The daemon is gone. Some time passes in which the world goes on without it."""
        kernel, chance = self.kernel, self.chance
        self.selector = self.supervisor = None
        is_power_cut = False
        if has_crashed:
            kernel.crash_at = NEVER
            kernel.note("=== killed")
            self.report.crash_sites.append(kernel.crash_site)
            if self.script is not None:
                is_power_cut = self.script.crashes[self.report.crashes][1] == "power cut"
            else:
                self._crashes_left -= 1
                is_power_cut = chance.hit(_POWER_CUTS_IN_WRITES if kernel.is_crash_dirty else _POWER_CUTS)
                kernel.is_crash_dirty = False
            self.report.crashes += 1
            self.report.power_cuts += is_power_cut
        kernel.end_daemon()
        if is_power_cut:
            kernel.cut_power()
        for client in (*self.callers, *self.watchers):
            client.hang_up()
        if has_crashed and self.script is None and chance.hit(0.1):
            self._recover_twice()
        if not self.is_calm and self.script is None:
            if chance.hit(0.08):
                self._damage()
            if chance.hit(0.1):
                # The next daemon meets this first.
                kernel.fails_to_sync = 1
        until_ms = kernel.now_ms + (5 if self.script else chance.pick((0, 20, 300, 5_000)))
        while kernel.happen(until_ms):
            pass

    def _damage(self) -> None:
        """Bytes rot that had been promised: that run must stop, and no other."""
        ledger = self.chance.pick(list(self.ledgers.values()))
        node = self.kernel.disk.find(_HOME.run(ledger.run_id).events)
        if ledger.is_damaged or not isinstance(node, File) or ledger.state not in ("RUNNING", "CANCELLING"):
            return
        if self.chance.hit(0.4):
            self._cut_log(ledger, node)
            return
        sure = _proven_durable(ledger)
        if sure < 1:
            return
        # Most often in the last line of which it can be told, where nothing but the later lines' word gives it away.
        number = sure - 1 if self.chance.hit(0.7) else self.chance.below(sure)
        place = sum(len(line) + 1 for line in ledger.lines[:number]) + self.chance.below(len(ledger.lines[number]))
        node.data[place] ^= 1 << self.chance.below(7)
        self.kernel.note(f"byte {place} of run {ledger.run_id} rots")
        self._now_damaged(ledger, node)

    def _cut_log(self, ledger: Ledger, node: File) -> None:
        """The end of a log is gone, whole lines of it, but not what an attempt of which it told has left on disk."""
        attempts = self.kernel.disk.find(_HOME.run(ledger.run_id).attempts)
        starts = [number for number, line in enumerate(ledger.lines) if b'"event":"step_started"' in line]
        if not starts or starts[-1] == 0 or not isinstance(attempts, Directory):
            return
        record = json.loads(ledger.lines[starts[-1]])
        wanted = f"-{record['step']}.{record['attempt']}.status"
        if any(name.endswith(wanted) for name in attempts.names):
            attempts.sync()
            for left in attempts.names.values():
                left.is_made = True
            node.truncate(sum(len(line) + 1 for line in ledger.lines[: starts[-1]]))
            self.kernel.note(f"run {ledger.run_id} loses its lines from {starts[-1] + 1} on")
            self._now_damaged(ledger, node)

    def _now_damaged(self, ledger: Ledger, node: File) -> None:
        node.synced = node.promised = bytes(node.data)
        node.intact = len(node.data)
        # Whatever happens next, this is the file that will be found.
        self.kernel.disk.directory(_HOME.run(ledger.run_id).directory).sync()
        ledger.is_damaged = True
        ledger.data = node.synced

    def _recover_twice(self) -> None:
        """A recovery that is killed before its first turn, and another: the second must find what the first has left."""
        kernel = self.kernel
        if kernel.disk.free is not None or kernel.has_no_descriptors or kernel.fails_to_sync:
            return
        nudge_at, kernel.nudge_at = kernel.nudge_at, NEVER
        found = []
        for _ in range(2):
            kernel.start_daemon()
            selector: Any = SimulatedSelector(kernel, self._welcome)
            Supervisor(_HOME, "/socket", selector, kernel.boot_id, "host", self.max_parallel).take_over_all()
            kernel.end_daemon()
            nodes = [kernel.disk.find(_HOME.run(run_id).events) for run_id in self.ledgers]
            found.append([bytes(node.data) for node in nodes if isinstance(node, File)])
        kernel.nudge_at = nudge_at
        if found[0] != found[1]:
            raise Broken("a second recovery made other bytes than the first")

    # -- what the world sees --------------------------------------------------------------------------------------

    def _plan_of(self, key: Key) -> Plan:
        run_id, step_id, number = key
        if self.script is not None:
            codes = self.script.exit_codes.get(step_id, ())
            return Plan(begin_ms=2, run_ms=10, record_ms=1, exit_code=codes[number - 1] if number <= len(codes) else 0)
        definition = self.definitions[run_id]
        step = next(step for step in definition["steps"] if step["id"] == step_id)  # type: ignore[attr-defined]
        plan = _plan(self.chance, self.is_calm, "timeout_sec" in step or "timeout_sec" in definition)
        if self._escapes.hit(0.06):
            plan.escapee = self._escapes.pick(("dies", "ignores", "unmarked"))
        if self._is_cursed and step_id == "a":
            # Whatever is tried, something kills its shim: sooner or later that must count.
            plan.shim_dies_ms, plan.run_ms = 70, 100
        return plan

    def _on_spawn(self, key: Key) -> None:
        run_id, step_id, number = key
        problem = self.ledgers[run_id].spawn_problem(step_id, number)
        if problem is None and self.ledgers[run_id].is_damaged:
            problem = "the run is damaged"
        living = [attempt for attempt in self.kernel.attempts.values() if self._holds_slot(attempt)]
        if len(living) >= self.max_parallel and not self._was_late:
            problem = f"{len(living)} attempts live, of at most {self.max_parallel}"
        if problem is not None:
            raise Broken(f"attempt {number} of {run_id}/{step_id} was spawned, but {problem}")

    def _holds_slot(self, attempt: Attempt) -> bool:
        return attempt.is_alive and not self.ledgers[attempt.key[0]].is_damaged

    def _on_log(self, text: str) -> None:
        self.kernel.note(f"log: {text}")
        if "cannot be taken over yet" in text:
            # Meanwhile others take its slots, which it has on disk as well: then there may be more than max_parallel.
            self._was_late = True

    def _on_signal(self, attempt: Attempt, number: int, is_shim_alive: bool) -> None:
        run_id, step_id, attempt_number = attempt.key
        problem = None
        if is_shim_alive:
            problem = self.ledgers[run_id].signal_problem(step_id, attempt_number, number == signal.SIGKILL)
        if problem is not None:
            raise Broken(f"signal {number} was sent to attempt {attempt_number} of {run_id}/{step_id}, but {problem}")

    def _on_durable(self, path: str, node: Node) -> None:
        """Something was synced: a log, or the name of one."""
        if not path.startswith(_HOME.runs):
            return
        run_id = path[len(_HOME.runs) + 1 :].partition("/")[0].removeprefix(".new-")
        if isinstance(node, File) and self.kernel.disk.find(f"{_HOME.live}/{run_id}") is None:
            raise Broken(f"{path} is written, and run {run_id} has no live marker by which a restart would find it")
        for ledger in [self.ledgers[run_id]] if run_id else self.ledgers.values():
            log = self.kernel.disk.find_durable(_HOME.run(ledger.run_id).events)
            if isinstance(log, File) and (log is node or isinstance(node, Directory)) and log.promised:
                self._take_durable(ledger, log.promised)

    def _take_durable(self, ledger: Ledger, data: bytes) -> None:
        if not ledger.is_damaged:
            ledger.extend(data)
            if not ledger.is_over and self.kernel.disk.find_durable(f"{_HOME.live}/{ledger.run_id}") is None:
                raise Broken(f"run {ledger.run_id} is not over, and no marker by which a restart would find it is durable")
        elif data != ledger.data:
            raise Broken(f"run {ledger.run_id} is damaged, and its log was written")

    def acknowledged(self, caller: Caller, result: dict[str, Any]) -> None:
        if caller.method == "shutdown":
            return
        run_id = str(caller.params["run_id"])
        ledger = self.ledgers[run_id]
        if ledger.is_damaged and caller.method != "submit":
            raise Broken(f"{caller.method} of the damaged run {run_id} was answered")
        problem = None
        request = caller.params.get("request")
        if not ledger.lines:
            problem = "no line of it is durable"
        elif caller.method == "submit" and self.kernel.disk.durable_bytes(_HOME.run(run_id).environment) is None:
            problem = "its environment is not durable"
        elif caller.method == "cancel" and not ledger.may_ignore_cancel(str(request)):
            problem = "no cancel is durable"
        elif caller.method == "retry" and request not in ledger.requests:
            problem = "no retry is durable"
        elif caller.method == "status":
            problem = _status_problem(ledger, result)
        if problem is not None:
            raise Broken(f"{caller.method} of {run_id} was acknowledged, but {problem}")

    def refused_as_damaged(self, client: Client, error: Error) -> None:
        run_id = client.run_id if isinstance(client, Watcher) else str(getattr(client, "params", {})["run_id"])
        if not self._may_be_damaged(self.ledgers[run_id]):
            raise Broken(f"run {run_id} was called damaged: {error.message}")

    def _may_be_damaged(self, ledger: Ledger) -> bool:
        """By us, or by a creation that failed and whose ruins a power cut has kept: nobody was told of that run."""
        files = _HOME.run(ledger.run_id)
        if not ledger.lines and None in map(self.kernel.disk.find, (files.environment, files.events)):
            ledger.is_damaged = True
        return ledger.is_damaged

    def may_give_up(self, caller: Caller, error: Error) -> bool:
        """A retry of a run that SUCCEEDED, or that never ends while it waits."""
        caller.patience -= 1
        ledger = self.ledgers.get(str(caller.params.get("run_id")))
        return caller.method == "retry" and ledger is not None and (ledger.state == "SUCCEEDED" or caller.patience <= 0)

    def shown(self, watcher: Watcher) -> None:
        ledger = self.ledgers[watcher.run_id]
        number = len(watcher.lines)
        if number > len(ledger.lines) or watcher.lines[-1] != ledger.lines[number - 1]:
            raise Broken(f"{watcher.name} was shown as line {number}: {watcher.lines[-1]!r}, which is not durable there")

    # -- at the end -----------------------------------------------------------------------------------------------

    def _check_turn(self, supervisor: Supervisor, turns: int) -> None:
        kernel = self.kernel
        for run_id, why in supervisor.quarantined.items():
            self.ledgers[run_id].is_quarantined = True
            if not self._may_be_damaged(self.ledgers[run_id]):
                raise Broken(f"run {run_id} was quarantined: {why}")
        if turns > _MAX_TURNS or kernel.now_ms > kernel.give_up_ms:
            states = {run_id: ledger.state for run_id, ledger in self.ledgers.items()}
            raise Broken(f"after {turns} turns the end is not in sight: {states}, {_waiting(self.callers)}")
        if self.script is None and self.chance.hit(0.03):
            for live in supervisor.live.values():
                problem = _status_problem(self.ledgers[live.run.run_id], live.run.describe())
                if problem is not None and not live.journal.has_pending:
                    raise Broken(f"the state of {live.run.run_id} is not the fold of its log: {problem}")

    def _check_drained(self) -> None:
        """A daemon that was told to cancel all runs has ended by itself."""
        for ledger in self.ledgers.values():
            if ledger.lines and not (ledger.is_damaged or ledger.is_over):
                raise Broken(f"the daemon has ended as if all runs were cancelled, and run {ledger.run_id} goes on")

    def _check_idle(self) -> None:
        """A daemon with nothing to do holds nothing."""
        if self.kernel.fds:
            raise Broken(f"descriptors are left open: {[file.path for file in self.kernel.fds.values()]}")

    def _is_over(self) -> bool:
        """Everybody was answered and every run is over. When faults were still to come: now they will not."""
        for caller in self.callers:
            if not caller.is_done:
                return False
        for ledger in self.ledgers.values():
            if ledger.is_damaged:
                # The ruin of a creation may have no marker, by which a daemon would have found it.
                if ledger.lines and not ledger.is_quarantined:
                    return False
            elif not ledger.is_over:
                return False
        for watcher in self.watchers:
            ledger = self.ledgers[watcher.run_id]
            if not ledger.is_damaged and len(watcher.lines) < len(ledger.lines):
                return False
        return True

    def _check_end(self) -> None:
        """Nothing of any attempt lives, nothing is left open, and the rules would write each log again."""
        kernel = self.kernel
        for run_id, ledger in self.ledgers.items():
            if ledger.is_damaged:
                continue
            # It costs a fifth of a history, and its rules are checked line by line all the time.
            if self.seed % 3 == 0:
                _check_replay(ledger)
            data = kernel.disk.find(_HOME.run(run_id).events)
            if not isinstance(data, File) or bytes(data.data) != ledger.data:
                raise Broken(f"run {run_id}: the file holds other bytes than were made durable")
        for attempt in kernel.attempts.values():
            if attempt.is_alive and not self.ledgers[attempt.key[0]].is_damaged:
                raise Broken(f"{attempt.key} is alive after the end of its run")


# -- the parts of a history --------------------------------------------------------------------------------------------


def _switch(kernel: Kernel, name: str) -> tuple[Any, Any]:
    return lambda: setattr(kernel, name, True), lambda: setattr(kernel, name, False)


def _definition(chance: Chance) -> dict[str, object]:
    steps: list[dict[str, object]] = []
    for number in range(chance.pick((1, 1, 1, 2, 2, 2, 3, 3, 4))):
        step: dict[str, object] = {"id": "abcd"[number], "command": "true"}
        step["depends_on"] = [other["id"] for other in steps if chance.hit(0.45)]
        step["retries"] = chance.pick((0, 0, 1, 2))
        step["on_lost"] = chance.pick(("retry", "retry", "fail"))
        step["grace_sec"] = chance.pick((0, 0.05, 0.3))
        step["backoff"] = {"initial_sec": chance.pick((0, 0.1, 0.4)), "jitter": chance.pick((0, 0, 0.5))}
        if chance.hit(0.3):
            step["timeout_sec"] = chance.pick((0.02, 0.1, 0.3))
        steps.append(step)
    if chance.hit(0.3):
        steps.reverse()
    definition: dict[str, object] = {"workflow_id": "w", "steps": steps}
    if chance.hit(0.3):
        definition["max_parallel"] = chance.pick((1, 2))
    if chance.hit(0.15):
        definition["timeout_sec"] = chance.pick((0.1, 0.5, 1.5))
    return definition


def _plan(chance: Chance, is_calm: bool, may_hang: bool) -> Plan:
    plan = Plan(
        begin_ms=chance.pick((0, 1, 3, 60)),
        run_ms=chance.pick((0, 5, 40, 150, 400)),
        record_ms=chance.pick((0, 0, 1, 30)),
        exit_code=0 if chance.hit(0.7) else chance.pick((1, 2, 127, 143)),
        on_term=chance.pick(("dies", "dies", "ignores", "zero")),
    )
    if may_hang and chance.hit(0.2):
        plan.run_ms = None
    if chance.hit(0.15):
        plan.survivor = chance.pick(("dies", "ignores"))
    if not is_calm and chance.hit(0.06):
        plan.shim_dies_ms = chance.pick((0, 1, 30, 200))
    if chance.hit(0.03):
        errors: tuple[str | int, ...] = ("cwd", "fork", errno.E2BIG)
        plan.error = chance.pick(errors)
    return plan


def _proven_durable(ledger: Ledger) -> int:
    """So many lines are said to be durable by a line that is still there: damage to them can be told from a torn tail."""
    last = ledger.lines[-1] if ledger.lines else b""
    _, _, rest = last.partition(b'"durable":')
    return int(rest.partition(b",")[0] or 0)


def _lines_of(ledger: Ledger) -> Iterator[Line]:
    return (events.decode(raw) for raw in ledger.lines)


def _status_problem(ledger: Ledger, result: dict[str, Any]) -> str | None:
    """Is the answer the fold of the durable lines up to the one that it names?"""
    last_seq = result["last_seq"]
    if last_seq > len(ledger.lines):
        return f"it tells of line {last_seq}, and {len(ledger.lines)} are durable"
    run: Run | None = None
    for line in _lines_of(ledger):
        if line.seq > last_seq:
            break
        if run is None:
            run = Run(line)
        else:
            run.apply(line)
    assert run is not None
    told = {name: value for name, value in result.items() if name not in ("source", "stalled")}
    return None if told == run.describe() else f"it tells {told}, where the log says {run.describe()}"


def _check_replay(ledger: Ledger) -> None:
    """Would the rules write this log again; and is the state after each line what the ledger, which has rules of its own,
    says it is?"""
    run: Run | None = None
    for line, (run_state, step_state) in zip(_lines_of(ledger), ledger.trail, strict=True):
        difference = None if run is None else decide.check(run, line)
        if difference is not None:
            raise Broken(f"run {ledger.run_id} does not replay: {difference}")
        if run is None:
            run = Run(line)
        else:
            run.apply(line)
        step_id = getattr(line.event, "step", None)
        told = (run.state.value, "" if step_id is None else run.steps[run.index_of[step_id]].state.value)
        if told != (run_state, step_state):
            raise Broken(f"run {ledger.run_id}, line {line.seq}: the state is {told}, not {(run_state, step_state)}")


def _waiting(callers: Iterable[Caller]) -> str:
    return f"still asked: {[caller.name for caller in callers if not caller.is_done]}"


def simulate(seed: int, script: Script | None = None, is_traced: bool = False) -> Report:
    """The history of a seed."""
    return History(seed, script, is_traced).run()
