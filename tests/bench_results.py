"""A figure of the benchmark: how it comes about, and what it should be.

Rules
* Ratios, not times. Each round makes all calls of a case in turn (A B C, A B C, …), and a ratio is made within a round, so a
  machine that is busy or drifts says the same. Shown are the median and the lowest and highest of the rounds.
* A bar is a promise about an idle machine of two processors. Missing one is reported, and is not an error.
* Memory is counted in thousands (KB) and millions (MB) of bytes.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from tests.daemon import ROOT

# The median of five rounds bears two that were disturbed. Short commands vary more and cost little; of long runs there is
# time for a few.
ROUNDS, SHORT_ROUNDS, LONG_ROUNDS = 5, 21, 3

# The longest command, a run of 100,000 steps, takes about a minute. What takes a quarter of an hour takes for ever.
TIMEOUT_SEC = 900

# Something to measure; it returns its seconds.
Call = Callable[[], float]


class WrongResult(Exception):
    """What was measured is not what was asked for, so the time means nothing."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a median is held to: at most `limit`, or at least where it is a floor. goal: what the work aims at."""

    limit: float
    goal: float | None = None
    is_floor: bool = False


# By case and figure.
BARS: dict[tuple[str, str], Bar] = {
    ("fan-out", "ninja -j16"): Bar(1.6, goal=1.2),
    ("fan-out", "daemon's CPU a step"): Bar(0.25),
    ("fan-out-2", "ninja -j2"): Bar(2.0),
    ("layers", "ninja -j16"): Bar(1.6, goal=1.2),
    ("layers-2", "ninja -j2"): Bar(2.0),
    ("chain", "ninja -j1"): Bar(2.0, goal=1.4),
    ("sleep", "ninja -j50"): Bar(1.15),
    ("10k", "a step, to one of 1,000"): Bar(1.3),
    ("10k", "peak memory a step"): Bar(2.0),
    ("100k", "a step, to one of 1,000"): Bar(1.3),
    ("100k", "peak memory a step"): Bar(2.0),
    ("submit", "json.loads + graphlib"): Bar(4.0),
    ("runs", "throughput of one run"): Bar(60, is_floor=True),
    ("runs", "runs that waited"): Bar(0),
    ("disk", "syncs of a log in a turn"): Bar(1),
    ("log", "recovery"): Bar(45, is_floor=True),
    ("log", "replay"): Bar(30, is_floor=True),
    ("start", "without the finished"): Bar(1.3),
    ("commands", "status"): Bar(1.8),
    ("commands", "list"): Bar(1.8),
    ("commands", "run -d"): Bar(1.8),
    ("commands", "status, no daemon"): Bar(3.0),
    ("watchers", "without them"): Bar(1.15),
    ("idle", "wake-ups"): Bar(0),
    ("idle", "memory"): Bar(25),
    ("idle", "memory, live steps"): Bar(35),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much the cases do. A test makes it little."""

    fan_out: int = 1_000
    layers: int = 20
    layer_steps: int = 50
    chain: int = 200
    sleeps: int = 300
    steps: int = 1_000
    steps_10k: int = 10_000
    steps_100k: int = 100_000
    runs: int = 100
    run_steps: int = 20
    traced_runs: int = 5
    finished: int = 10_000
    unfinished: int = 10
    watchers: int = 200
    most_watchers: int = 1_000
    live_steps: int = 200
    # An idle daemon is given so long to come to rest, and is then watched for so long.
    settle_sec: float = 1.0
    idle_sec: float = 5.0


@dataclass(frozen=True, slots=True)
class Options:
    """What a case needs to know.

    base      the directory that all files of the benchmark are in
    rounds    of each comparison; None: as many as the case finds right
    warms_up  a first round warms the caches up and is not counted (a test has no time for it)
    """

    base: str
    rounds: int | None = None
    sizes: Sizes = Sizes()
    warms_up: bool = True


@dataclass(frozen=True, slots=True)
class Skipped:
    """A case, or a figure of it, that cannot be had here."""

    case: str
    why: str

    def row(self) -> str:
        return f"{self.case:12} skipped: {self.why}"


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table. `values`: a ratio (unit "x"), a share (unit "%") or a figure (unit "MB", …) of each round.

    figure   what it is, or what ours is set against
    ours_ms, theirs_ms   the medians that a ratio is made of, for orientation
    note     what a figure of a profile means beside the others
    """

    case: str
    figure: str
    unit: str
    values: list[float]
    ours_ms: float | None = None
    theirs_ms: float | None = None
    note: str = ""

    @property
    def bar(self) -> Bar | None:
        return BARS.get((self.case, self.figure))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        bar = self.bar
        if bar is None:
            return None
        return self.median >= bar.limit if bar.is_floor else self.median <= bar.limit

    def row(self) -> str:
        spread = f"{min(self.values):.2f} to {max(self.values):.2f}" if len(self.values) > 1 else ""
        pair = (self.ours_ms, self.theirs_ms) if self.ours_ms and self.theirs_ms else ()
        times = " / ".join(f"{ms:.0f} ms" if ms >= 10 else f"{ms:.2f} ms" for ms in pair)
        head = f"{self.case:12} {self.figure:37} {self.median:8.2f} {self.unit:3}"
        return f"{head} {spread:18} {self._verdict():18} {times or self.note}".rstrip()

    def _verdict(self) -> str:
        bar = self.bar
        if bar is None:
            return ""
        return f"bar {'>=' if bar.is_floor else '<='} {bar.limit:g} {'met' if self.is_met else 'MISSED'}"

    def record(self) -> dict[str, object]:
        bar = None if self.bar is None else asdict(self.bar)
        return {**asdict(self), "median": self.median, "bar": bar, "is_met": self.is_met}


def ratio(case: str, figure: str, ours: Sequence[float], theirs: Sequence[float]) -> Result:
    """How many times as long ours took, from the seconds of each round."""
    values = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Result(case, figure, "x", values, *_medians_ms(ours, theirs))


def rate(case: str, figure: str, ours: Sequence[float], theirs: Sequence[float]) -> Result:
    """Our speed as a share of theirs."""
    values = [100 * b / a for a, b in zip(ours, theirs, strict=True)]
    return Result(case, figure, "%", values, *_medians_ms(ours, theirs))


def _medians_ms(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    return statistics.median(ours) * 1000, statistics.median(theirs) * 1000


def rounds(calls: Mapping[str, Call], count: int, *, warms_up: bool) -> dict[str, list[float]]:
    """The seconds of each call, round by round, without those of a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(0 if warms_up else 1, count + 1):
        for name, call in calls.items():
            seconds = call()
            if number:
                times[name].append(seconds)
    return times


def timed(command: Sequence[str], environ: Mapping[str, str] | None = None, cwd: str = ROOT) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed. Raises WrongResult when it fails, or does not end."""
    with _in_time(command):
        start = time.perf_counter()
        done = subprocess.run(command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        seconds = time.perf_counter() - start
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip()
        raise WrongResult(f"{' '.join(command)} ended with {done.returncode}: {last}")
    return seconds, done.stdout.decode("utf-8", "replace")


@contextmanager
def _in_time(command: Sequence[str]) -> Iterator[None]:
    """Raises WrongResult in the midst of a block that has not ended after TIMEOUT_SEC."""

    def end(number: int, frame: object) -> None:
        raise WrongResult(f"{' '.join(command)} has not ended after {TIMEOUT_SEC} s")

    # Not subprocess's own timeout: with one it looks for the end of the process every now and then, which would be measured.
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SEC)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
