"""Where the daemon's time goes: `python -m tests.bench --profile`, and the daemon that is started for it,
`python -m tests.bench_profile FILE FLAGS…`.

The program has no switch for this. Its functions are wrapped from outside before its `main` is called: at each border of
one of PARTS the time since the border before goes to the part that was left. So a part's time does not hold that of the
parts it calls, and all of them together are the time from the first run's submission to the last one's end. What the daemon
waits for is counted as long as there is a run; "the rest" is the loop itself, and what of it has no line of its own.

What the measuring itself costs: two looks at the clock and two calls more for each call of a part, 1 µs on our 2-core
machine, so 0.02 ms of a step, which has some twenty. It is in the parts, mostly in those that call, and the table shows how
much it was in all.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import selectors
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.bench_results import Options, Result, WrongResult
from tests.bench_runs import MOST_PARALLEL, RACES, run_at_once, small_graph
from tests.bench_subjects import Daemon, workflow_file
from wfd.__main__ import main as run_daemon
from wfd.supervisor import Supervisor

# Each part's functions: the room, and the name in it. A name that is not there any more is an error, not a gap.
PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "spawn": (("os", "posix_spawn"),),
    "attempt files": (("wfd.process", "start"),),
    "reap": (("wfd.process", "next_dead_child"), ("wfd.process", "reap")),
    "look": (("wfd.process", "Attempt.look"), ("wfd.process", "Attempt.settle")),
    "fsync": (("wfd.journal", "sync"),),
    "write": (("wfd.journal", "_write_all"),),
    "encode": (("wfd.events", "encode"),),
    "decide": (("wfd.decide", "next_decision"),),
    "fold": (("wfd.state", "Run.apply"),),
    "validate": (("wfd.definition", "validate"),),
    "create a run": (("wfd.journal", "create"),),
    "its marker": (("wfd.journal", "mark_live"), ("wfd.journal", "unmark_live")),
    "watchers": (("wfd.watchers", "Watchers.feed"),),
    "requests": (("wfd.server", "Server.ready"), ("wfd.supervisor", "Supervisor._serve")),
}
# The cases that it is shown of.
PROFILED = (*RACES, "runs")
REST, WAIT, IDLE = "the rest", "wait", "idle"
_CALIBRATION_CALLS = 100_000


class Clock:
    """Whose time it is. spent_ns: of each part, without those that it calls; calls: how often it was called."""

    def __init__(self) -> None:
        self.spent_ns: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._part = IDLE
        self._since_ns = time.perf_counter_ns()

    def turn_to(self, part: str) -> str:
        """From now on it is this part's time. Returns whose it was."""
        before, now_ns = self._part, time.perf_counter_ns()
        self.spent_ns[before] += now_ns - self._since_ns
        self._part, self._since_ns = part, now_ns
        return before

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is that part's when it is called in a turn of the loop."""

        @functools.wraps(function)
        def measured(*arguments: Any, **keywords: Any) -> Any:
            if self._part is IDLE:
                return function(*arguments, **keywords)
            self.calls[part] += 1
            before = self.turn_to(part)
            try:
                return function(*arguments, **keywords)
            finally:
                self.turn_to(before)

        return measured


def _wrap(room: str, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    owner: Any = importlib.import_module(room)
    *outer, name = name.split(".")
    for each in outer:
        owner = getattr(owner, each)
    setattr(owner, name, wrapper(getattr(owner, name)))


def main(path: str, *flags: str) -> int:
    """Be a daemon, and write what its parts took to a file when it ends."""
    clock = Clock()
    for part, names in PARTS.items():
        for room, name in names:
            _wrap(room, name, functools.partial(clock.wrapped, part))
    turn, select = Supervisor.turn, selectors.DefaultSelector.select
    waiting = clock.wrapped(WAIT, select), clock.wrapped(IDLE, select)

    def measured_turn(supervisor: Supervisor, until_ms: int | None) -> None:
        # Before there is a run, waiting is nobody's time.
        selectors.DefaultSelector.select = waiting[not supervisor.live]  # type: ignore[method-assign]
        before = clock.turn_to(REST)
        turn(supervisor, until_ms)
        clock.turn_to(before)

    Supervisor.turn = measured_turn  # type: ignore[assignment,method-assign]
    status = run_daemon(list(flags))
    measured = {"spent_ns": clock.spent_ns, "calls": clock.calls, "call_ns": _cost_ns()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(measured, file)
    return status


def _cost_ns() -> float:
    """What wrapping a function costs at each of its calls."""
    clock = Clock()
    clock.turn_to(REST)
    nothing = clock.wrapped("nothing", lambda: None)
    start_ns = time.perf_counter_ns()
    for _ in range(_CALIBRATION_CALLS):
        nothing()
    return (time.perf_counter_ns() - start_ns) / _CALIBRATION_CALLS


def profile(case: str, options: Options) -> Iterator[Result]:
    """What a case runs, run by such a daemon: the time of each part, the longest first, in ms a step."""
    path = os.path.join(tempfile.mkdtemp(prefix="profile-"), "profile.json")
    daemon = Daemon("--max-parallel", str(MOST_PARALLEL))
    daemon.program = ("-m", "tests.bench_profile", path)
    with daemon:
        steps = _run(daemon, case, options)
        daemon.stop()
    with open(path, encoding="utf-8") as file:
        measured = json.load(file)
    calls, spent_ms = measured["calls"], {part: ns / 1e6 / steps for part, ns in measured["spent_ns"].items()}
    del spent_ms[IDLE]
    if not spent_ms:
        raise WrongResult("the daemon has measured nothing")
    for part, ms in sorted(spent_ms.items(), key=lambda each: each[1], reverse=True):
        share, often = ms / sum(spent_ms.values()), calls.get(part, 0) / steps
        yield Result(case, f"profile: {part}", "ms", [ms], note=f"{share:.1%}, {often:.1f} calls")
    measuring_ms = measured["call_ns"] * sum(calls.values()) / 1e6 / steps
    yield Result(case, "profile: measuring", "ms", [measuring_ms], note="(in the others)")


def _run(daemon: Daemon, case: str, options: Options) -> int:
    """Returns how many steps that was."""
    if case == "runs":
        graph, count = small_graph(options.sizes), options.sizes.runs
        run_at_once(daemon, graph, count)
        return count * len(graph)
    graph = RACES[case].graph(options.sizes)
    _, run_id = daemon.run(workflow_file(graph, RACES[case].parallel))
    daemon.check_run(run_id, graph)
    return len(graph)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
