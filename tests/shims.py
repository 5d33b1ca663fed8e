"""The shim alone: killed at each of its system calls, or refused them, while its daemon lives or not.

The shim of a step's first attempt is started under strace, by a script that a copy of the program has in the place of the
shell that it spawns. What the shim starts is not traced. Each step of a run has a point of its own, so one daemon serves
them all. In one run it is killed and started again now and then. In another the commands wait until it is dead, so that
what the shims do behind their commands, they do and die while nobody looks.

What must hold at every point: the attempt is recorded as `lost`, as never begun, or with its true exit status, never with
another one; each attempt has run as often as that says (tests/counted.py); and before the next attempt of a step begins,
nothing of the one before is alive, though its command has left a process behind.
"""

from __future__ import annotations

import os
import random
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests import counted, mutations, points, strace
from tests.counted import COUNT
from tests.daemon import Daemon, step, wait_until
from tests.proof import Row
from wfd import journal, process
from wfd.events import AttemptExited, AttemptLost, AttemptNotStarted

# Starts a shim; under strace, once, if a plan lies ready for its step. The tracer is no process of the step.
_STARTER = """\
#!/bin/sh
plan={plans}/$WFD_STEP_ID
[ -e "$plan" ] || exec /bin/sh "$@"
read -r options < "$plan"
mv "$plan" "$plan.used"
run=$WFD_RUN_ID
unset WFD_RUN_ID
exec strace -DDD -E "WFD_RUN_ID=$run" -o "$plan.trace" $options /bin/sh "$@"
"""
EXIT_CODE = 3
# Says whether anything of an earlier attempt lives, a zombie does not; then leaves itself and a process in the list.
_COMMAND = (
    COUNT + "[ ! -e gate ] || read -r line < gate; "
    'pids="pids.$WFD_STEP_ID"; [ ! -e "$pids" ] || for pid in $(cat "$pids"); do '
    'case $(ps -o stat= -p "$pid") in ""|Z*) ;; *) echo "$WFD_STEP_ID" >> alive;; esac; done; '
    f'echo "$$" > "$pids"; sleep 600 & echo "$!" >> "$pids"; exit {EXIT_CODE}'
)
# What a call of the shim can really fail with.
_FORKS = ("EAGAIN", "ENOMEM")
ERRORS: dict[str, tuple[str, ...]] = {
    "write": ("ENOSPC", "EIO"), "clone": _FORKS, "clone3": _FORKS, "fork": _FORKS, "vfork": _FORKS,
    "openat": ("EMFILE", "ENFILE"), "fcntl": ("EMFILE",), "wait4": ("EINTR",),
}  # fmt: skip
# How many steps run at once, and how often the daemon is killed meanwhile.
_PARALLEL, _KILLS = 4, 5


@dataclass(frozen=True, slots=True)
class Point:
    """The shim dies before its n-th call of this name, or that call fails with `error`."""

    name: str
    n: int
    error: str = ""

    @property
    def options(self) -> str:
        fault = f"error={self.error}" if self.error else "signal=KILL"
        return f"-e trace={self.name} -e inject={self.name}:{fault}:when={self.n}"

    def __str__(self) -> str:
        return f"{self.error or 'KILL'} of the shim at {self.name} no. {self.n}"


@contextmanager
def prepared(bug: str = "") -> Iterator[Daemon]:
    """A daemon, perhaps with a bug, that starts its shims by the script. Plans lie in `plans`, below its base."""
    with tempfile.TemporaryDirectory(prefix="wfd-test-") as root:
        mutations.write_tree(root, mutations.named(bug) if bug else None)
        daemon = Daemon()
        daemon.root = root
        plans, starter = f"{daemon.base}/plans", f"{daemon.base}/starter"
        spawn = "    return os.posix_spawn(\n        {},\n"
        ours = mutations.Mutation("the script", "wfd.process", spawn.format("_SHELL"), spawn.format(repr(starter)), "", None)
        mutations.break_tree(root, ours)
        os.mkdir(plans)
        with open(os.open(starter, os.O_WRONLY | os.O_CREAT, 0o700), "w", encoding="utf-8") as file:
            file.write(_STARTER.format(plans=shlex.quote(plans)))
        with daemon:
            yield daemon


def plan(daemon: Daemon, step_id: str, options: str) -> None:
    with open(f"{daemon.base}/plans/{step_id}", "w", encoding="utf-8") as file:
        file.write(f"{options}\n")


def trace_of(daemon: Daemon, step_id: str) -> list[strace.Call]:
    path = f"{daemon.base}/plans/{step_id}.trace"
    return strace.calls(path) if os.path.exists(path) else []


def known_points() -> list[Point]:
    """Every system call of a shim that nothing happens to, and every error of one."""
    with prepared() as daemon:
        plan(daemon, "a", "-e trace=all")
        daemon.wait_for(daemon.submit(step("a", _COMMAND)))
        calls = trace_of(daemon, "a")
    kills = [Point(call.name, call.n) for call in calls]
    return kills + [Point(call.name, call.n, error) for call in calls for error in ERRORS.get(call.name, ())]


def late(known: list[Point]) -> list[Point]:
    """Those behind the start of the command."""
    first = next(number for number, point in enumerate(known) if point.name in ("clone", "clone3", "fork", "vfork"))
    last = sum(not point.error for point in known)
    names = {(point.name, point.n) for point in known[first + 1 : last]}
    return [point for point in known if (point.name, point.n) in names]


def meet(chosen: list[Point], chance: random.Random, bug: str = "") -> int:
    """How many of the points were really met, with a daemon that is killed now and then. Raises what was wrong then."""
    with prepared(bug) as daemon:
        run_id = _submit(daemon, chosen, _PARALLEL)
        for _ in range(_KILLS):
            _wait_for_progress(daemon, run_id, chance.randint(1, max(1, 2 * len(chosen) // _KILLS)))
            daemon.restart()
        return _end(daemon, run_id, chosen)


def meet_unseen(chosen: list[Point], bug: str = "") -> int:
    """How many of these late points were really met, while no daemon lived. Raises what was wrong then."""
    with prepared(bug) as daemon:
        os.mkfifo(f"{daemon.directory}/gate")
        gate = os.open(f"{daemon.directory}/gate", os.O_RDWR)
        try:
            run_id = _submit(daemon, chosen, len(chosen))
            names = [f"ran.{run_id}.s{number}" for number in range(len(chosen))]
            wait_until(lambda: all(daemon.read(name) for name in names), "all commands", daemon.explain)
            daemon.kill()
            os.write(gate, b"\n" * len(chosen))
            wait_until(lambda: not _alive(daemon, run_id), "the end of the shims", daemon.explain)
            os.write(gate, b"\n" * len(chosen))
            daemon.start()
            return _end(daemon, run_id, chosen)
        finally:
            os.close(gate)


def _submit(daemon: Daemon, chosen: list[Point], parallel: int) -> str:
    for number, point in enumerate(chosen):
        plan(daemon, f"s{number}", point.options)
    return daemon.submit(*(step(f"s{number}", _COMMAND) for number in range(len(chosen))), max_parallel=parallel)


def _end(daemon: Daemon, run_id: str, chosen: list[Point]) -> int:
    daemon.wait_for(run_id)
    _check(daemon, run_id, chosen)
    met = 0
    for number, point in enumerate(chosen):
        calls = trace_of(daemon, f"s{number}")
        met += any("(INJECTED)" in call.text for call in calls) if point.error else len(calls) >= point.n
    return met


def _alive(daemon: Daemon, run_id: str) -> bool:
    """Is any shim?"""
    for record in daemon.fold(run_id).steps:
        files = daemon.home.run(run_id).attempt(record.index + 1, record.step.id, record.attempt)
        if process.probe(files).held:
            return True
    return False


def _wait_for_progress(daemon: Daemon, run_id: str, lines: int) -> None:
    """Until the log has so many lines more, or an end."""
    files = daemon.home.run(run_id)
    first = journal.last_line(files, run_id)

    def is_there() -> bool:
        last = journal.last_line(files, run_id)
        if first is None or last is None:
            return False
        return last.event.name == "run_finished" or last.seq >= first.seq + lines

    wait_until(is_there, "progress", daemon.explain)


def _check(daemon: Daemon, run_id: str, chosen: list[Point]) -> None:
    ends: dict[str, list[AttemptExited | AttemptLost | AttemptNotStarted]] = {f"s{n}": [] for n in range(len(chosen))}
    for line in daemon.events(run_id):
        if isinstance(line.event, (AttemptExited, AttemptLost, AttemptNotStarted)):
            ends[line.event.step].append(line.event)
    for point, (step_id, (*before, last)) in zip(chosen, ends.items(), strict=True):
        unknown = all(isinstance(end, AttemptLost) or getattr(end, "why", "") == "never_began" for end in before)
        true = isinstance(last, AttemptExited) and last.exit_code == EXIT_CODE
        assert unknown and true, f"{point}: {step_id} ended as {[*before, last]}\n{daemon.explain()}"
    counted.check(daemon, run_id)
    assert not daemon.read("alive"), f"tried again while something of it lived: {daemon.read('alive').split()}, {chosen}"


# Those that dead shims show.
BUGS = ("an unknown end is exit 0", "survivors are not swept", "a lost attempt counts as exited 0")


def prove(count: int, seed: int) -> Row:
    """So many points, each as often as any other; then those that can be met unseen."""
    means = "the shim at its system calls"
    if strace.why_not():
        return Row(means, impossible=strace.why_not())
    chance = random.Random(seed)
    known = known_points()
    unseen = late(known)
    chosen = points.spread(known * -(-count // len(known)), count, chance, lambda point: point)
    met, failures = 0, []
    acts: tuple[Callable[[], int], ...] = (lambda: meet(chosen, chance), lambda: meet_unseen(unseen))
    for act in acts:
        try:
            met += act()
        except Exception as problem:
            failures.append(f"seed {seed}: {type(problem).__name__}: {problem}")
    missed = [bug for bug in BUGS if not _is_caught(bug, unseen)]
    failures += [f"nothing shows the bug: {bug}" for bug in missed]
    return Row(means, count + len(unseen), met, len(BUGS), len(BUGS) - len(missed), tuple(failures))


def _is_caught(bug: str, unseen: list[Point]) -> bool:
    try:
        meet_unseen(unseen, bug)
    except Exception:
        return True
    return False
