"""What the benchmark runs: graphs of steps, our daemon, and the tools beside it.

Our side checks each run before its time counts: it SUCCEEDED, by its log each step ran once, and for as long as it had to
sleep, and the log replays. That commands are really executed, and once, is seen in the output of those that have some, which
`true` has not: so each graph is run with such ones first.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests import daemon
from tests.bench_results import WrongResult, timed
from tests.daemon import ROOT
from wfctl.client import HELLO
from wfd import decide, journal
from wfd.events import AttemptExited, Line, StepStarted
from wfd.paths import Home, parse_attempt_name
from wfd.state import RunState

PROGRAM = (sys.executable, os.path.join(ROOT, "workflow.py"))
HAS_PROC = os.path.exists("/proc/self/status")
NEEDS_PROC = "it is read from /proc, which is not here"

# -- graphs ------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One command of a graph, and the steps that it depends on."""

    id: str
    needs: tuple[str, ...] = ()
    command: str = "true"


Graph = list[Step]


def fan_out(count: int, first: str = "true") -> Graph:
    """One step, so many that depend on it, and one that depends on all of them. first: the command of the first."""
    middle = [Step(f"s{number}", ("first",)) for number in range(count)]
    return [Step("first", command=first), *middle, Step("last", tuple(step.id for step in middle))]


def layers(count: int, width: int) -> Graph:
    """So many layers, each of whose steps depends on all of the layer before."""
    ids = [tuple(f"s{layer}-{number}" for number in range(width)) for layer in range(count)]
    return [Step(id, before) for before, here in zip([(), *ids], ids, strict=False) for id in here]


def chain(count: int) -> Graph:
    return [Step(f"s{number}", (f"s{number - 1}",) if number else ()) for number in range(count)]


def loose(count: int, command: str) -> Graph:
    """Steps that do not depend on each other."""
    return [Step(f"s{number}", command=command) for number in range(count)]


def traced(graph: Graph) -> Graph:
    """The graph with commands that leave a trace: each says the id of its step. To the engine they are like `true`: plain
    words, which the shell of the step executes by itself."""
    return [step._replace(command=f"echo {step.id}") for step in graph]


def definition(graph: Graph, parallel: int | None = None) -> dict[str, object]:
    """The graph as a workflow."""
    steps = [{"id": step.id, "command": step.command, "depends_on": list(step.needs)} for step in graph]
    return {"workflow_id": "bench", "steps": steps, **({"max_parallel": parallel} if parallel else {})}


def workflow_file(graph: Graph, parallel: int | None = None) -> str:
    path = os.path.join(tempfile.mkdtemp(prefix="ours-"), "workflow.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(definition(graph, parallel), file)
    return path


# -- our side ----------------------------------------------------------------------------------------------------------


# The daemon reads its clock at the beginning of a turn, and may lose the processor before it sees that a step has ended.
_TURN_MS = 50

# What ends the benchmark before its time: Ctrl-C, and `timeout`.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What cleans up is not left half done: a signal that comes meanwhile interrupts what is behind it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Daemon(daemon.Daemon):
    """A daemon, from `with` to its end, in a home of its own or in `home`. Its files stay.

    before   what runs the interpreter that runs it, such as strace
    """

    def __init__(self, *flags: str, home: Home | None = None, before: Sequence[str] = ()) -> None:
        super().__init__(*flags)
        if home is not None:
            self.home = home
            self.environ["WFD_HOME"] = home.directory
        self.before = before
        # Whoever has installed it has it compiled; whoever wants no bytecode beside the sources gets it elsewhere.
        if self.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
            self.environ.setdefault("PYTHONPYCACHEPREFIX", os.path.join(tempfile.gettempdir(), "pycache"))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.process is not None:
                self.stop()
        finally:
            with uninterrupted():
                self.end_all()

    def interpreter(self) -> list[str]:
        return [*self.before, *super().interpreter()]

    def clean(self) -> None:
        self.end_all()

    def run(self, path: str) -> tuple[float, str]:
        """Run a workflow file to its end: seconds as a whole process, and the id of the run."""
        seconds, output = timed([*PROGRAM, "run", "-q", path], self.environ)
        return seconds, output.strip()

    def run_traced(self, graph: Graph, parallel: int | None = None) -> None:
        """Run the graph with commands that leave a trace. Raises WrongResult unless each was executed once."""
        graph = traced(graph)
        _, run_id = self.run(workflow_file(graph, parallel))
        self.check_run(run_id, graph)
        self.check_traces(run_id, graph)

    def check_traces(self, run_id: str, graph: Graph) -> None:
        """Raises WrongResult unless each command of a traced graph has said its word once, whatever the log says."""
        files = self.home.run(run_id)
        for name in sorted(os.listdir(files.attempts)):
            _, attempt = parse_attempt_name(name) or (0, 0)
            if attempt != 1:
                raise WrongResult(f"run {run_id}: {name} is not a file of the first attempt of a step")
        for ordinal, step in enumerate(graph, 1):
            try:
                with open(files.attempt(ordinal, step.id, 1).out, "rb") as file:
                    said = file.read()
            except FileNotFoundError:
                raise WrongResult(f"run {run_id}: step {step.id} was not executed, it has no output file") from None
            if said != step.id.encode() + b"\n":
                raise WrongResult(f"run {run_id}: step {step.id} was not executed exactly once, it said {said[:100]!r}")

    def check_run(self, run_id: str, graph: Graph) -> None:
        """Raises WrongResult unless each step ran once, for as long as it had to sleep, and succeeded, and the log
        replays."""
        with journal.open_log(self.home.run(run_id), run_id) as file:
            starts_ms: list[tuple[str, int]] = []
            ends_ms: list[tuple[str, int]] = []
            run, difference = decide.replay(_noting(journal.Reading(file, run_id), starts_ms, ends_ms))
        if difference is not None:
            raise WrongResult(f"run {run_id} does not replay: {difference}")
        if run.state is not RunState.SUCCEEDED:
            raise WrongResult(f"run {run_id} is {run.state.value}")
        if Counter(id for id, _ in starts_ms) != Counter(step.id for step in graph):
            raise WrongResult(f"run {run_id}: not each of its {len(graph)} steps ran exactly once")
        start_ms, end_ms = dict(starts_ms), dict(ends_ms)
        for step in graph:
            word, _, seconds = step.command.partition(" ")
            if word == "sleep" and (lasted_ms := end_ms[step.id] - start_ms[step.id]) < float(seconds) * 1000 - _TURN_MS:
                raise WrongResult(f"run {run_id}: step {step.id} was to sleep for {seconds} s, and took {lasted_ms} ms")

    def hello(self) -> dict[str, Any]:
        return self.request("hello", **HELLO)

    def figure(self, field: str) -> int:
        """A number of /proc/<pid>/status: VmRSS and VmHWM are KiB."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))

    def cpu_sec(self) -> float:
        """Processor time of the daemon alone, in nanoseconds that are exact, unlike the ticks of /proc/<pid>/stat."""
        # This is what clock_getcpuclockid(3) returns for a process on Linux.
        return time.clock_gettime((~self.pid << 3) | 2)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


def _noting(lines: Iterable[Line], starts_ms: list[tuple[str, int]], ends_ms: list[tuple[str, int]]) -> Iterator[Line]:
    """The lines, of which those where an attempt begins or ends are noted: its step, and when."""
    for line in lines:
        if isinstance(line.event, StepStarted):
            starts_ms.append((line.event.step, line.mono_ms))
        elif isinstance(line.event, AttemptExited):
            ends_ms.append((line.event.step, line.mono_ms))
        yield line


# -- their side --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that runs commands too. `plan` writes the graph into a directory and returns the command to run in it.

    knows_order  False: it takes a list of commands, which is less than a graph
    """

    name: str
    plan: Callable[[str, Graph, int], list[str]]
    knows_order: bool = True


def _ninja(directory: str, graph: Graph, parallel: int) -> list[str]:
    rules = {command: f"run{number}" for number, command in enumerate(dict.fromkeys(step.command for step in graph))}
    heads = [f"rule {rule}\n  command = {command}" for command, rule in rules.items()]
    # The outputs are never made, so each run runs all.
    builds = [f"build {step.id}: {rules[step.command]} {' '.join(step.needs)}" for step in graph]
    _write(directory, "build.ninja", [*heads, *builds])
    return ["ninja", f"-j{parallel}"]


def _make(directory: str, graph: Graph, parallel: int) -> list[str]:
    names = " ".join(step.id for step in graph)
    rules = [f"{step.id}: {' '.join(step.needs)}\n\t@{step.command}" for step in graph]
    _write(directory, "Makefile", [f"all: {names}", f".PHONY: all {names}", *rules])
    return ["make", f"-j{parallel}"]


def _xargs(directory: str, graph: Graph, parallel: int) -> list[str]:
    _write(directory, "list", [step.command for step in graph])
    return ["xargs", "-a", "list", "-d", "\\n", "-P", str(parallel), "-n", "1", "/bin/sh", "-c"]


def _parallel(directory: str, graph: Graph, parallel: int) -> list[str]:
    _write(directory, "list", [step.command for step in graph])
    return ["parallel", "-a", "list", f"-j{parallel}"]


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


def run_tool(tool: Tool, graph: Graph, parallel: int) -> float:
    """The seconds that a tool takes for the graph."""
    directory = tempfile.mkdtemp(prefix=f"{tool.name}-")
    return timed(tool.plan(directory, graph, parallel), cwd=directory)[0]
