"""Real daemons that are killed at their system calls, and real daemons that are refused them.

    python -m tests.sweep [--only NAME] [--count N] [--seed N]

Two runs of the scene (tests/scene.py) are recorded under strace; what they have in common are the points: (system call, n),
the n-th call of that name by the daemon, from its first look at the home on. Then, for each chosen point, a daemon plays
the same scene and dies there, or the call fails with an error that it can really fail with; after a death the next daemon
takes over; the story is played to its end, and all is compared with what it must be. Both are done with a daemon of a
fresh home and with one that takes over what a killed one has left.

The points of a kill are the calls that the world can see, or in which the daemon waits: a kill before any other is the
same as one before the next of these. A call may come a little earlier or later in another run, so a few points near the
end are not met: 90 % must be.

What this cannot see: whether anything was durable. A kill -9 leaves the page cache as it is, so an engine without any
fsync passes. Power cuts and the simulator are for that.

The command runs the other means with real daemons as well: the shim alone (shims.py), torn writes (torn.py), random kills
under load (kills.py).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice

from tests import kills, mutations, points, shims, strace, torn
from tests.daemon import ROOT
from tests.proof import Row
from tests.scene import Died, Scene, finish, staged
from tests.strace import Call
from wfd.__main__ import EXIT_CANNOT_START

# Of the points that were recorded, so many must really be met.
MIN_HIT = 0.9
# Two daemons a processor: each waits most of the time for its steps, or for a disk.
PARALLEL = 2 * (os.cpu_count() or 1)
# Names of one call on several machines are all here; a system has those that it has.
VISIBLE = (
    "accept4", "bind", "chmod", "clone", "clone3", "close", "epoll_ctl", "epoll_pwait", "epoll_wait", "execve", "flock",
    "fsync", "ftruncate", "getdents64", "kill", "listen", "mkdir", "mkdirat", "openat", "pread64", "pwrite64", "read",
    "recvfrom", "rename", "renameat", "renameat2", "rmdir", "sendto", "socket", "socketpair", "unlink", "unlinkat", "vfork",
    "wait4", "waitid", "write",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """A system call of the daemon that is met at its n-th time: the daemon dies before it, or it fails with `error`. path:
    the file below the base that it names, "" for none; for an error only the calls that name it are counted."""

    name: str
    n: int
    is_taken_over: bool
    error: str = ""
    path: str = ""

    def __str__(self) -> str:
        what = f"{self.error} of {self.name} on {self.path}" if self.error else f"KILL at {self.name}"
        return f"{what} no. {self.n}{', taking over' if self.is_taken_over else ''}"


# -- points -------------------------------------------------------------------------------------------------------------


def record(is_taken_over: bool, key: Callable[[Call], Hashable]) -> list[Call]:
    """What a daemon of this program calls, each time, while the scene is played undisturbed. Paths begin at the base."""
    first, second = (record_once(is_taken_over) for _ in range(2))
    before = {key(call) for call in first}
    # Not the first's: the first daemon of all may have to compile what it imports, and counts that in its calls.
    return [call for call in second if key(call) in before]


def record_once(is_taken_over: bool) -> list[Call]:
    """What one daemon called."""
    with staged(is_taken_over=is_taken_over) as scene:
        trace = f"{scene.base}/trace"
        scene.wrapper = strace.traced(VISIBLE, trace)
        scene.start()
        scene.play()
        assert scene.stop() == 0, scene.explain()
        scene.check_end()
        calls = strace.calls(trace)
        first = next(number for number, call in enumerate(calls) if call.path.startswith(scene.home.directory))
        # Other files are Python's or the kernel's.
        return [
            replace(call, path=call.path.removeprefix(scene.base))
            for call in calls[first:]
            if not call.path or call.path.startswith(scene.base)
        ]


def kill_points() -> list[Point]:
    """Every call that was recorded, whichever way the daemon begins."""
    return [as_kill(call, again) for again in (False, True) for call in record(again, lambda c: (c.name, c.n))]


def as_kill(call: Call, is_taken_over: bool) -> Point:
    return Point(call.name, call.n, is_taken_over, path=call.path)


# -- one point ----------------------------------------------------------------------------------------------------------


def kill_at(point: Point, root: str = ROOT) -> bool:
    """Was the daemon really killed there? Raises what is wrong afterwards."""
    with staged(root, is_taken_over=point.is_taken_over) as scene:
        scene.wrapper = strace.killed_at(point.name, point.n)
        status = play_to_death(scene)
        assert status in (0, -signal.SIGKILL), f"the daemon ended with {status}\n{scene.explain()}"
        scene.kills += status != 0
        finish(scene)
        return status != 0


def play_to_death(scene: Scene) -> int:
    """Start a daemon and play; its exit status, with which it may end before the story does."""
    try:
        scene.start()
        scene.play()
        return scene.stop()
    except Died:
        return scene.ended()


# -- errors -------------------------------------------------------------------------------------------------------------

# What a call can really fail with, by its name; a machine has some of the names of one call.
_WRITES = ("ENOSPC", "EIO", "EINTR")
_SPAWNS = ("EAGAIN", "ENOMEM")
ERRORS: dict[str, tuple[str, ...]] = {
    "write": _WRITES, "pwrite64": _WRITES, "fsync": ("EIO", "ENOSPC", "EINTR"), "ftruncate": ("EIO", "EINTR"),
    "openat": ("EMFILE", "ENFILE", "EIO", "EINTR"), "flock": ("EINTR", "ENOLCK"), "accept4": ("EMFILE", "ENFILE"),
    "clone": _SPAWNS, "clone3": _SPAWNS, "vfork": _SPAWNS,
    "mkdir": ("ENOSPC", "EIO"), "rename": ("ENOSPC", "EIO"),
}  # fmt: skip
# Parts of names that hold a pid or an offset of the log.
_NEVER_AGAIN = ("/.lock-probe-", "/torn-")
# Those have no file, and are counted all together.
_PATHLESS = ("accept4", "clone", "clone3", "vfork")


def error_points() -> list[Point]:
    """Every call that was recorded, with each error that it can fail with."""
    return [point for again in (False, True) for point in _error_points(again)]


def _error_points(is_taken_over: bool) -> Iterator[Point]:
    for call in record(is_taken_over, lambda call: (call.name, call.path, call.nth_of_path)):
        errors = ERRORS.get(call.name, ())
        if call.name == "openat" and "O_CREAT" in call.text:
            errors = (*errors, "ENOSPC")
        if call.name in _PATHLESS:
            place = (call.n, "")
        elif call.path and not any(part in call.path for part in _NEVER_AGAIN):
            place = (call.nth_of_path, call.path)
        else:
            continue
        for error in errors:
            yield Point(call.name, place[0], is_taken_over, error, place[1])


def fail_at(point: Point, root: str = ROOT) -> bool:
    """Did the call really fail? Raises what is wrong afterwards."""
    with staged(root, is_taken_over=point.is_taken_over) as scene:
        trace = f"{scene.base}/trace"
        scene.wrapper = (
            *strace.traced({point.name, "close"}, trace), *(("-P", scene.base + point.path) if point.path else ()),
            "-e", f"inject={point.name}:error={point.error}:when={point.n}",
        )  # fmt: skip
        status = play_to_death(scene)
        is_hit = _check_trace(strace.calls(trace), f"{scene.home.runs}/")
        if status == EXIT_CANNOT_START:
            said = scene.log().rstrip().rpartition("\n")[2]
            assert said.startswith("wfd: "), f"the daemon does not say why it cannot start\n{scene.explain()}"
            finish(scene)
        else:
            assert status == 0, f"the daemon ended with {status}\n{scene.explain()}"
            scene.check_end()
        return is_hit


def _check_trace(calls: Sequence[Call], runs: str) -> bool:
    """Is an error in it? A log whose sync has failed is never synced again: before the next sync it is closed."""
    for number, call in enumerate(calls):
        if "(INJECTED)" not in call.text:
            continue
        is_log = call.path.startswith(runs) and call.path.endswith("/events.ndjson") and "/.new-" not in call.path
        if call.name == "fsync" and is_log and "EINTR" not in call.text:
            opened = call.text.removeprefix("fsync").partition("<")[0]
            after = (later for later in calls[number + 1 :] if later.text.removeprefix(later.name).startswith(f"{opened}<"))
            again = next(after, None)
            assert again is None or again.name == "close", f"synced again after a failure: {again.text}"
        return True
    return False


# -- rows ---------------------------------------------------------------------------------------------------------------

Act = Callable[[Point, str], bool]


@dataclass(frozen=True, slots=True)
class Bug:
    """A deliberate bug of mutations.txt, and the points of which some show it."""

    name: str
    shows_at: Callable[[Point], bool]


def _is_batch(point: Point) -> bool:
    """Of the run that is cancelled and tried again."""
    return (point.name, point.path) == ("write", "/home/runs/other/events.ndjson")


KILL_BUGS = (
    Bug("spawn before commit", _is_batch),
    Bug("reply before commit", _is_batch),
    Bug("the lock is not taken", lambda point: point.is_taken_over),
    Bug("the lock of an adopted attempt is not looked at", lambda point: point.is_taken_over),
    Bug("glue to the torn tail", lambda point: point.is_taken_over),
    Bug("a repeated retry is carried out again", lambda point: (point.name, point.path) == ("unlink", "/home/wfd.sock")),
)
ERROR_BUGS = (
    Bug("a file is synced again after a failure", lambda point: (point.name, point.error) == ("fsync", "EIO")),
    Bug("numbers of a failed batch are not given back", lambda point: point.error == "EIO" and _is_batch(point)),
    Bug("a shortage fails the attempt", lambda point: point.error == "EMFILE" and point.path.endswith("-flaky.1.status")),
)
# A bug that so many tries at its points do not show is not caught. Of some bugs there are only four points, and each of
# them shows it every other time.
_BUG_TRIES = 150


def prove_kills(count: int, seed: int) -> Row:
    return _prove("kills at system calls", kill_points, kill_at, KILL_BUGS, count, seed)


def prove_errors(count: int, seed: int) -> Row:
    return _prove("errors of system calls", error_points, fail_at, ERROR_BUGS, count, seed)


def _prove(means: str, record: Callable[[], list[Point]], act: Act, bugs: Sequence[Bug], count: int, seed: int) -> Row:
    if strace.why_not():
        return Row(means, impossible=strace.why_not())
    chance = random.Random(seed)
    known = record()
    met = meet(choose(known, count, chance), act)
    failures = [problem for _, _, problem in met if problem]
    hit = sum(was_met for _, was_met, _ in met)
    if hit < MIN_HIT * len(met):
        failures.append(f"only {hit} of {len(met)} recorded points were met")
    # Always the same points of them, or a bug would be missed now and then by chance.
    missed = [bug.name for bug in bugs if not is_caught(bug, known, act, random.Random(5))]
    failures += [f"nothing shows the bug: {name}" for name in missed]
    return Row(means, len(met), hit, len(bugs), len(bugs) - len(missed), tuple(failures))


def choose(known: Sequence[Point], count: int, chance: random.Random) -> list[Point]:
    """So many of them, spread over the calls, their errors and both ways to begin."""
    return points.spread(known, count, chance, lambda point: (point.name, point.error, point.is_taken_over))


def meet(chosen: Sequence[Point], act: Act, root: str = ROOT) -> list[tuple[Point, bool, str]]:
    """Each point, whether it was met, and what was wrong then ("": nothing)."""

    def one(point: Point) -> tuple[Point, bool, str]:
        try:
            return point, act(point, root), ""
        except Exception as problem:
            return point, True, f"{point}: {type(problem).__name__}: {problem}"

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(one, chosen))


def is_caught(bug: Bug, known: Sequence[Point], act: Act, chance: random.Random) -> bool:
    """Does anything go wrong at one of its points in a program that has the bug?"""
    telling = [point for point in known if bug.shows_at(point)]
    chosen = list(islice(cycle(chance.sample(telling, len(telling))), _BUG_TRIES))
    with tempfile.TemporaryDirectory(prefix="wfd-test-") as root:
        mutations.write_tree(root, mutations.named(bug.name))
        parts = (chosen[first : first + PARALLEL] for first in range(0, len(chosen), PARALLEL))
        return any(problem for part in parts for _, _, problem in meet(part, act, root))


ROWS: dict[str, Callable[[int, int], Row]] = {
    "kills": prove_kills, "errors": prove_errors, "shim": shims.prove, "torn": torn.prove, "random": kills.prove,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=ROWS, action="append", metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--count", type=int, default=300, metavar="N", help="points of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which points (default: %(default)s)")
    options = parser.parse_args(arguments)
    bad = False
    for name in options.only or ROWS:
        row = ROWS[name](options.count, options.seed)
        said = row.impossible or f"{row.hit} of {row.tried} met, {row.bugs_caught} of {row.bugs} bugs caught"
        print(f"{row.means}: {said}", *row.failures, sep="\n", flush=True)
        bad = bad or bool(row.failures) or row.bugs_caught < row.bugs
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
