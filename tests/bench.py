"""How fast it is, beside what is installed: `python -m tests.bench [CASE…] [--pairs N] [--json FILE]`.

Rules
* Ratios, not times. Each round runs ours and then each of the others (A B C, A B C, …); a ratio is made within a round,
  so a machine that is busy or drifts says the same. Shown are the median and the lowest and highest of the rounds.
* Whole processes against whole processes: `python workflow.py run -q` beside `ninja`. The daemon is already running, as
  it is for whoever starts a second workflow.
* A time counts only when the result is right: the run SUCCEEDED, each step ran once, and the log replays.
* Nothing is deleted before the last measurement: unlinking the files of earlier runs makes ext4 slow for a while, and
  that would be measured with the next run. What others have deleted is kept away from, too.

The homes lie in a directory under $TMPDIR. On tmpfs an fsync costs nothing, so choose a real disk.
A bar is a promise about an idle machine. Missing one is reported, and is not an error of the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from wfctl import client
from wfd import decide, journal
from wfd.events import AttemptExited, Line
from wfd.paths import Home
from wfd.state import RunState

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = (sys.executable, os.path.join(ROOT, "workflow.py"))
DAEMON = (sys.executable, "-m", "wfd")
# A daemon that does not answer after so long never will.
START_SEC = 15.0
# An idle daemon is given so long to come to rest, and is then watched for so long.
SETTLE_SEC, IDLE_SEC = 1.0, 5.0
# The median of five rounds bears two that were disturbed. Short commands vary more and cost little.
ROUNDS, SHORT_ROUNDS = 5, 21

# A step's id and those that it depends on. All steps run `true`.
Graph = list[tuple[str, list[str]]]
# Something to measure; it returns its seconds.
Call = Callable[[], float]


class WrongResult(Exception):
    """What was measured is not what was asked for, so the time means nothing."""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table. `values`: a ratio (unit "x") or a figure (unit "MB", …) of each round.

    bar   what `values` should not exceed, or None when there is none
    ours_ms, theirs_ms   the medians that a ratio is made of, for orientation
    """

    case: str
    against: str
    unit: str
    values: list[float]
    bar: float | None = None
    ours_ms: float | None = None
    theirs_ms: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        return None if self.bar is None else self.median <= self.bar

    def row(self) -> str:
        spread = f"{min(self.values):.2f} to {max(self.values):.2f}" if len(self.values) > 1 else ""
        pair = (self.ours_ms, self.theirs_ms) if self.ours_ms and self.theirs_ms else ()
        times = " / ".join(f"{ms:.0f} ms" if ms >= 10 else f"{ms:.2f} ms" for ms in pair)
        bar = "" if self.bar is None else f"bar {self.bar:g} {'met' if self.is_met else 'MISSED'}"
        columns = f"{self.case:12} {self.against:22} {self.median:8.2f} {self.unit:3} {spread:18} {bar:16} {times}"
        return columns.rstrip()

    def record(self) -> dict[str, object]:
        return {**asdict(self), "median": self.median, "is_met": self.is_met}


@dataclass(frozen=True, slots=True)
class Options:
    """What a case needs to know. base: the directory that all files of the benchmark are in."""

    base: str
    rounds: int | None


# -- our side ----------------------------------------------------------------------------------------------------------


class Daemon:
    """A daemon on a home of its own, from `with` to its end."""

    def __init__(self, base: str) -> None:
        self.home = Home(tempfile.mkdtemp(prefix="home-", dir=base))
        self.environ = {**os.environ, "WFD_HOME": self.home.directory, "PYTHONPYCACHEPREFIX": base + "/pycache"}
        # Whoever has installed it has it compiled.
        self.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Daemon:
        with open(self.home.log, "ab") as log:
            self.process = subprocess.Popen(
                [*DAEMON, "--home", self.home.directory],
                cwd=ROOT, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        # A client that finds no daemon starts one, and that would not be the one that we look at.
        deadline = time.monotonic() + START_SEC
        while client.connect(self.home) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise WrongResult("the daemon did not start")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def run(self, path: str) -> tuple[float, str]:
        """Run a workflow file to its end: seconds as a whole process, and the id of the run."""
        seconds, output = timed([*PROGRAM, "run", "-q", path], self.environ)
        return seconds, output.decode().strip()

    def check(self, run_id: str, graph: Graph) -> None:
        """Raises WrongResult unless each step ran once and succeeded, and the log replays."""
        with journal.open_log(self.home.run(run_id), run_id) as file:
            exits: list[AttemptExited] = []
            run, difference = decide.replay(_noting(journal.Reading(file, run_id), exits))
        if difference is not None:
            raise WrongResult(f"run {run_id} does not replay: {difference}")
        if run.state is not RunState.SUCCEEDED:
            raise WrongResult(f"run {run_id} is {run.state.value}")
        if Counter(exit.step for exit in exits) != Counter(step for step, _ in graph):
            raise WrongResult(f"run {run_id}: not each of its {len(graph)} steps ran exactly once")

    def figure(self, field: str) -> int:
        """A number of /proc/<pid>/status: VmRSS and VmHWM are KiB."""
        assert self.process is not None
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def _noting(lines: Iterable[Line], exits: list[AttemptExited]) -> Iterator[Line]:
    for line in lines:
        if isinstance(line.event, AttemptExited):
            exits.append(line.event)
        yield line


def workflow_file(base: str, graph: Graph, parallel: int) -> str:
    """The graph as a workflow."""
    steps = [{"id": step, "command": "true", "depends_on": needs} for step, needs in graph]
    path = os.path.join(tempfile.mkdtemp(prefix="ours-", dir=base), "workflow.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"workflow_id": "bench", "max_parallel": parallel, "steps": steps}, file)
    return path


# -- their side --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that runs commands too. `plan` writes the graph into a directory and returns the command to run in it.

    knows_order  False: it takes a list of commands, so only graphs without edges and chains mean the same to it
    """

    name: str
    plan: Callable[[str, Graph, int], list[str]]
    knows_order: bool = True


def _ninja(directory: str, graph: Graph, parallel: int) -> list[str]:
    # The outputs are never made, so each run runs all.
    builds = [f"build {step}: step {' '.join(needs)}" for step, needs in graph]
    _write(directory, "build.ninja", ["rule step", "  command = true", *builds])
    return ["ninja", f"-j{parallel}"]


def _make(directory: str, graph: Graph, parallel: int) -> list[str]:
    names = " ".join(step for step, _ in graph)
    rules = [f"{step}: {' '.join(needs)}\n\t@true" for step, needs in graph]
    _write(directory, "Makefile", [f"all: {names}", f".PHONY: all {names}", *rules])
    return ["make", f"-j{parallel}"]


def _xargs(directory: str, graph: Graph, parallel: int) -> list[str]:
    _write(directory, "list", [step for step, _ in graph])
    return ["xargs", "-a", "list", "-P", str(parallel), "-n", "1", "/bin/sh", "-c", "true"]


def _parallel(directory: str, graph: Graph, parallel: int) -> list[str]:
    _write(directory, "list", [step for step, _ in graph])
    return ["parallel", "-a", "list", f"-j{parallel}", "true"]


TOOLS = (
    Tool("ninja", _ninja),
    Tool("make", _make),
    Tool("xargs", _xargs, knows_order=False),
    Tool("parallel", _parallel, knows_order=False),
)


def _write(directory: str, name: str, lines: Sequence[str]) -> None:
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def is_installed(name: str) -> bool:
    """Is it there, and the one that is meant?"""
    if shutil.which(name) is None:
        return False
    # moreutils has a `parallel` too, with other options; BSD xargs has no -a.
    answer = subprocess.run([name, "--version"], capture_output=True, check=False).stdout
    return name == "ninja" or answer.lstrip().startswith((b"GNU", name.encode() + b" (GNU"))


# -- measuring ---------------------------------------------------------------------------------------------------------


def timed(command: Sequence[str], environ: Mapping[str, str] | None = None, cwd: str = ROOT) -> tuple[float, bytes]:
    """Seconds of a whole process, and what it printed. Raises WrongResult when it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip()
        raise WrongResult(f"{' '.join(command)} ended with {done.returncode}: {last}")
    return seconds, done.stdout


def compare(case: str, ours: Call, theirs: Mapping[str, Call], rounds: int, bars: Mapping[str, float]) -> Iterator[Result]:
    """Round by round, ours and then each of theirs. The first round warms the caches up and is not counted."""
    mine: list[float] = []
    others: dict[str, list[float]] = {name: [] for name in theirs}
    for number in range(rounds + 1):
        seconds = ours()
        for name, call in theirs.items():
            other = call()
            if number:
                others[name].append(other)
        if number:
            mine.append(seconds)
    for name, times in others.items():
        ratios = [a / b for a, b in zip(mine, times, strict=True)]
        medians = statistics.median(mine) * 1000, statistics.median(times) * 1000
        yield Result(case, name, "x", ratios, bars.get(name), *medians)


def against_tools(
    case: str, options: Options, graph: Graph, parallel: int, bars: Mapping[str, float], *, ordered: bool
) -> Iterator[Result]:
    """The graph of `true` steps, run by us and by each tool that is installed."""
    path = workflow_file(options.base, graph, parallel)
    theirs: dict[str, Call] = {}
    for tool in TOOLS:
        if not is_installed(tool.name):
            print(f"{case:12} {tool.name} is not installed: skipped")
        elif tool.knows_order or not ordered:
            theirs[f"{tool.name} -j{parallel}"] = _one_tool(tool, options.base, graph, parallel)
    with Daemon(options.base) as daemon:

        def ours() -> float:
            seconds, run_id = daemon.run(path)
            daemon.check(run_id, graph)
            return seconds

        yield from compare(case, ours, theirs, options.rounds or ROUNDS, bars)


def _one_tool(tool: Tool, base: str, graph: Graph, parallel: int) -> Call:
    def run() -> float:
        directory = tempfile.mkdtemp(prefix=f"{tool.name}-", dir=base)
        return timed(tool.plan(directory, graph, parallel), cwd=directory)[0]

    return run


# -- the cases ---------------------------------------------------------------------------------------------------------


def fan_out(count: int) -> Graph:
    return [(f"s{number}", []) for number in range(count)]


def chain(count: int) -> Graph:
    return [(f"s{number}", [f"s{number - 1}"] if number else []) for number in range(count)]


def case_fan_out(options: Options) -> Iterator[Result]:
    """1,000 independent steps, 16 at a time"""
    return against_tools("fan-out", options, fan_out(1000), 16, {"ninja -j16": 2.5}, ordered=False)


def case_chain(options: Options) -> Iterator[Result]:
    """200 steps, each after the one before"""
    return against_tools("chain", options, chain(200), 1, {"ninja -j1": 3.0}, ordered=True)


def case_status(options: Options) -> Iterator[Result]:
    """`status` of a finished run of 20 steps, beside an interpreter that does nothing"""
    graph = chain(20)
    with Daemon(options.base) as daemon:
        _, run_id = daemon.run(workflow_file(options.base, graph, 16))
        daemon.check(run_id, graph)

        def ours() -> float:
            seconds, output = timed([*PROGRAM, "status", run_id], daemon.environ)
            if b"SUCCEEDED" not in output:
                raise WrongResult(f"status said {output!r}")
            return seconds

        theirs = {"python -c pass": lambda: timed([sys.executable, "-c", "pass"])[0]}
        yield from compare("status", ours, theirs, options.rounds or SHORT_ROUNDS, {"python -c pass": 3.0})


def case_idle(options: Options) -> Iterator[Result]:
    """a daemon that has run something and now has nothing to do"""
    graph = chain(20)
    with Daemon(options.base) as daemon:
        _, run_id = daemon.run(workflow_file(options.base, graph, 16))
        daemon.check(run_id, graph)
        time.sleep(SETTLE_SEC)
        before = daemon.figure("voluntary_ctxt_switches")
        time.sleep(IDLE_SEC)
        # Each wait that ends is followed by another, which is a voluntary switch.
        yield Result("idle", f"wake-ups in {IDLE_SEC:g} s", "", [daemon.figure("voluntary_ctxt_switches") - before], 0)
        yield Result("idle", "memory (RSS)", "MB", [daemon.figure("VmRSS") / 1024], 30)


def case_10k(options: Options) -> Iterator[Result]:
    """10,000 steps, 16 at a time: the daemon's peak of memory, and what a step costs beside one in a run of 1,000"""
    with Daemon(options.base) as daemon:
        costs = []
        for count in (1_000, 10_000):
            graph = fan_out(count)
            seconds, run_id = daemon.run(workflow_file(options.base, graph, 16))
            daemon.check(run_id, graph)
            costs.append(seconds / count)
        yield Result("10k", "peak memory (RSS)", "MB", [daemon.figure("VmHWM") / 1024], 150)
        yield Result("10k", "a step, to one of 1k", "x", [costs[1] / costs[0]], None, costs[1] * 1000, costs[0] * 1000)


CASES: dict[str, Callable[[Options], Iterator[Result]]] = {
    "fan-out": case_fan_out,
    "chain": case_chain,
    "status": case_status,
    "idle": case_idle,
    "10k": case_10k,
}


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(base: str) -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        "file_system": _file_system(base),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _file_system(path: str) -> str:
    """The type of the file system that a path is on, as far as the system says."""
    try:
        with open("/proc/mounts", encoding="utf-8") as file:
            mounts = [line.split()[1:3] for line in file]
    except OSError:
        return "unknown"
    under = [(point, kind) for point, kind in mounts if os.path.commonpath([point, path]) == point]
    return max(under, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


# -- the command line --------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure the cases that are asked for, or all. 0, or 1 when a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure wfd beside what is installed.")
    about = "; ".join(f"{name}: {case.__doc__}" for name, case in CASES.items())
    parser.add_argument("case", nargs="*", help=f"{about} (default: all)")
    parser.add_argument("--pairs", type=int, metavar="N", help="rounds of each comparison")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every round here")
    arguments = parser.parse_args()
    for name in arguments.case:
        if name not in CASES:
            parser.error(f"no case {name!r}; there are {', '.join(CASES)}")
    base = tempfile.mkdtemp(prefix="wfd-bench-")
    # Where somebody else has just deleted files, ext4 without a journal takes 0.8 ms to create one, since it shuns inodes
    # for minutes after their end. Directories below one that is marked so lie in other parts of the disk.
    if shutil.which("chattr"):
        subprocess.run(["chattr", "+T", base], capture_output=True, check=False)
    try:
        return measure(arguments.case or list(CASES), Options(base, arguments.pairs), arguments.json)
    except WrongResult as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(base)


def measure(cases: Sequence[str], options: Options, json_path: str | None) -> int:
    where = machine(options.base)
    print("\n".join(f"{name + ':':12} {value}" for name, value in where.items()))
    results = []
    for name in cases:
        for result in CASES[name](options):
            print(result.row(), flush=True)
            results.append(result)
    if json_path is not None:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump({"machine": where, "results": [result.record() for result in results]}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
