"""The benchmark's cases that run steps: beside the tools, very many steps, many runs, and what the disk is asked to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.bench_results import (
    LONG_ROUNDS,
    ROUNDS,
    Call,
    Options,
    Result,
    Sizes,
    Skipped,
    WrongResult,
    rate,
    ratio,
    rounds,
    timed,
)
from tests.bench_subjects import (
    HAS_PROC,
    NEEDS_PROC,
    PROGRAM,
    TOOLS,
    Daemon,
    Graph,
    chain,
    definition,
    fan_out,
    is_installed,
    layers,
    loose,
    run_tool,
    workflow_file,
)
from tests.daemon import Client, wait_until
from wfctl.client import HELLO
from wfd import protocol
from wfd.events import RunFinished, StepStarted
from wfd.paths import Home

Found = Iterator[Result | Skipped]
# As many as any of the graphs below wants, which is more than the daemon takes by itself on a small machine.
MOST_PARALLEL = 50


# -- beside the tools --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Race:
    """A graph that we and the tools run.

    takes_lists  also those tools run its commands that know no order
    shows_cpu    the daemon's processor time is a figure of it
    """

    graph: Callable[[Sizes], Graph]
    parallel: int
    takes_lists: bool = False
    shows_cpu: bool = False


RACES: dict[str, Race] = {
    "fan-out": Race(lambda sizes: fan_out(sizes.fan_out), 16, takes_lists=True, shows_cpu=True),
    "fan-out-2": Race(lambda sizes: fan_out(sizes.fan_out), 2),
    "layers": Race(lambda sizes: layers(sizes.layers, sizes.layer_steps), 16),
    "layers-2": Race(lambda sizes: layers(sizes.layers, sizes.layer_steps), 2),
    "chain": Race(lambda sizes: chain(sizes.chain), 1),
    "sleep": Race(lambda sizes: loose(sizes.sleeps, "sleep 0.1"), 50),
}


def race(case: str, options: Options) -> Found:
    """Whole processes against whole processes: `workflow.py run -q` beside `ninja`. The daemon is already running, as it is
    for whoever starts a second workflow."""
    graph, parallel = RACES[case].graph(options.sizes), RACES[case].parallel
    path, cpu_ms = workflow_file(graph, parallel), list[float]()
    with Daemon("--max-parallel", str(MOST_PARALLEL)) as daemon:
        daemon.run_traced(graph, parallel)

        def ours() -> float:
            before = daemon.cpu_sec() if HAS_PROC else 0.0
            seconds, run_id = daemon.run(path)
            cpu_ms.append(((daemon.cpu_sec() if HAS_PROC else 0.0) - before) * 1000 / len(graph))
            daemon.check_run(run_id, graph)
            return seconds

        calls: dict[str, Call] = {"wfd": ours}
        for tool in [tool for tool in TOOLS if tool.knows_order or RACES[case].takes_lists]:
            if not is_installed(tool.name):
                yield Skipped(case, f"{tool.name} is not installed")
            else:
                calls[f"{tool.name} -j{parallel}"] = lambda tool=tool: run_tool(tool, graph, parallel)  # type: ignore[misc]
        times = rounds(calls, options.rounds or ROUNDS, warms_up=options.warms_up)
    for name in list(times)[1:]:
        yield ratio(case, name, times["wfd"], times[name])
    if RACES[case].shows_cpu:
        cpu_ms = cpu_ms[-len(times["wfd"]) :]
        yield Result(case, "daemon's CPU a step", "ms", cpu_ms) if HAS_PROC else Skipped(case, NEEDS_PROC)


# -- very many steps ---------------------------------------------------------------------------------------------------


def many_steps(case: str, options: Options) -> Found:
    """A daemon that has done nothing else for each run, since the peak of its memory is never forgotten."""
    sizes = options.sizes
    count = {"10k": sizes.steps_10k, "100k": sizes.steps_100k}[case]
    peaks_kb: list[float] = []

    def run(count: int) -> float:
        graph = fan_out(count)
        with Daemon() as daemon:
            base_kib = daemon.figure("VmRSS") if HAS_PROC else 0
            seconds, run_id = daemon.run(workflow_file(graph, 16))
            peaks_kb.append(((daemon.figure("VmHWM") if HAS_PROC else 0) - base_kib) * 1.024 / len(graph))
            daemon.check_run(run_id, graph)
        return seconds / len(graph)

    with Daemon() as daemon:
        daemon.run_traced(fan_out(sizes.steps), 16)
    if options.warms_up:
        run(sizes.steps)
        peaks_kb.clear()
    calls: dict[str, Call] = {"few": lambda: run(sizes.steps), "many": lambda: run(count)}
    times = rounds(calls, options.rounds or {"10k": LONG_ROUNDS, "100k": 1}[case], warms_up=False)
    yield ratio(case, "a step, to one of 1,000", times["many"], times["few"])
    # They are of a run of few, a run of many, in turns.
    yield Result(case, "peak memory a step", "KB", peaks_kb[1::2]) if HAS_PROC else Skipped(case, NEEDS_PROC)


# What has to be done with a definition at least: read it, and see that there is no circle in it.
_READ_AND_SORT = """
import json, sys, time
from graphlib import TopologicalSorter
with open(sys.argv[1]) as file:
    text = file.read()
start = time.perf_counter()
TopologicalSorter({step["id"]: step["depends_on"] for step in json.loads(text)["steps"]}).prepare()
print(time.perf_counter() - start)
"""


def submit(options: Options) -> Found:
    """From the first byte of the request to the daemon's answer; and as `run -d`, with all that a client does."""
    graph = fan_out(options.sizes.steps_10k)
    path = workflow_file(graph)
    with Daemon() as daemon:

        def end(run_id: str) -> None:
            daemon.request("cancel", run_id=run_id, request="bench")
            # A small one may have been faster.
            daemon.wait_for(run_id, "CANCELLED", "SUCCEEDED")

        def acknowledged() -> float:
            params = daemon.submission(**definition(graph))  # type: ignore[arg-type]
            line = protocol.request("submit", params)
            with daemon.connect() as client:
                start = time.perf_counter()
                client.send(line)
                _take_acknowledgement(client)
                seconds = time.perf_counter() - start
            end(str(params["run_id"]))
            return seconds

        def detached() -> float:
            seconds, output = timed([*PROGRAM, "run", "-d", path], daemon.environ)
            end(output.strip())
            return seconds

        def alone() -> float:
            return float(timed([sys.executable, "-I", "-c", _READ_AND_SORT, path])[1])

        calls: dict[str, Call] = {"acknowledged": acknowledged, "run -d": detached, "alone": alone}
        times = rounds(calls, options.rounds or ROUNDS, warms_up=options.warms_up)
    yield ratio("submit", "json.loads + graphlib", times["acknowledged"], times["alone"])
    yield ratio("submit", "the same, by `run -d`", times["run -d"], times["alone"])


def _take_acknowledgement(client: Client) -> None:
    answer = client.message()
    if "result" not in answer:
        raise WrongResult(f"the daemon answered {json.dumps(answer)[:300]}")


# -- many runs ---------------------------------------------------------------------------------------------------------


def many_runs(options: Options) -> Found:
    """Runs that are submitted at once over a connection each, and one run with as many steps. A run that began after
    another's end would have waited for it."""
    sizes = options.sizes
    few, many = small_graph(sizes), fan_out(sizes.runs * sizes.run_steps - 2)
    waited: list[float] = []
    with Daemon() as daemon:
        daemon.run_traced(few)

        def all_at_once() -> float:
            seconds, run_ids = run_at_once(daemon, few, sizes.runs)
            waited.append(_count_waited(daemon, run_ids))
            return seconds

        def one() -> float:
            return run_at_once(daemon, many, 1)[0]

        times = rounds({"runs": all_at_once, "one": one}, options.rounds or ROUNDS, warms_up=options.warms_up)
    yield rate("runs", "throughput of one run", times["runs"], times["one"])
    yield Result("runs", "runs that waited", "", waited[-len(times["runs"]) :])


def small_graph(sizes: Sizes) -> Graph:
    """One run of many."""
    return fan_out(sizes.run_steps - 2)


def run_at_once(daemon: Daemon, graph: Graph, count: int) -> tuple[float, list[str]]:
    """Submit a graph so many times and wait for the end of all: seconds, and the ids of the runs."""
    requests = [daemon.submission(**definition(graph)) for _ in range(count)]  # type: ignore[arg-type]
    lines = [protocol.request("submit", params) for params in requests]
    clients = [daemon.connect() for _ in lines]
    for client in clients:
        # So that it has been accepted.
        client.request("hello", **HELLO)
    start = time.perf_counter()
    for client, line in zip(clients, lines, strict=True):
        client.send(line)
    for client in clients:
        _take_acknowledgement(client)
    # A run's marker goes when its end is durable. Looking at markers costs the daemon nothing.
    daemon.wait_until_let_go()
    seconds = time.perf_counter() - start
    for client in clients:
        client.close()
    run_ids = [str(params["run_id"]) for params in requests]
    for run_id in run_ids:
        daemon.check_run(run_id, graph)
    return seconds, run_ids


def _count_waited(daemon: Daemon, run_ids: list[str]) -> int:
    """How many runs began only after another had ended, by the logs."""
    begun, ended = [], []
    for run_id in run_ids:
        lines = daemon.events(run_id)
        begun.append(next(line.mono_ms for line in lines if isinstance(line.event, StepStarted)))
        ended.append(next(line.mono_ms for line in lines if isinstance(line.event, RunFinished)))
    return sum(begin > min(ended) for begin in begun)


# -- the disk ----------------------------------------------------------------------------------------------------------


def disk(options: Options) -> Found:
    """What strace sees of the daemon while a few runs go on at once."""
    if why := _why_no_strace():
        yield Skipped("disk", why)
        return
    sizes = options.sizes
    graph, trace = small_graph(sizes), os.path.join(options.base, "trace")
    # -D: the daemon is our child, not strace's. `?`: not every processor's Linux has both. -y: paths of descriptors.
    calls = "trace=?epoll_wait,?epoll_pwait,fsync,fdatasync"
    with Daemon(before=("strace", "-D", "-y", "-s", "0", "-o", trace, "-e", calls)) as daemon:
        _, run_ids = run_at_once(daemon, graph, sizes.traced_runs)
        daemon.stop()
        turns = wait_until(lambda: _read_trace(trace), "strace's end", daemon.explain)
        at_creation, later = [], []
        for run_id in run_ids:
            first, others = syncs_of_log(turns, daemon.home, run_id)
            batches, syncs = len({line.durable for line in daemon.events(run_id)}), first + sum(others)
            if syncs < batches:
                raise WrongResult(f"strace saw {syncs} syncs of run {run_id}, whose log has {batches} batches")
            at_creation.append(first)
            later += others
    yield Result("disk", "syncs of a log in a turn", "", [float(max(later))])
    yield Result("disk", "the same, in the turn of its creation", "", [float(max(at_creation))])
    steps = len(graph) * sizes.traced_runs
    yield Result("disk", "syncs a step, all files", "", [sum(turn.total() for turn in turns) / steps])


def _why_no_strace() -> str:
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-D", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return f"strace may not trace: {tried.stderr.strip()}" if tried.returncode or tried.stderr else ""


_SYNC = re.compile(r"f(?:data)?sync\(\d+<(.*)>\) += 0\n")


def _read_trace(path: str) -> list[Counter[str]]:
    """The turns of a trace that has come to its end, else nothing."""
    with open(path, encoding="utf-8") as file:
        lines = list(file)
    return syncs_by_turn(lines) if lines and lines[-1].startswith("+++ exited") else []


def syncs_by_turn(lines: Iterable[str]) -> list[Counter[str]]:
    """How often each file was synced in each turn of the loop: a turn begins when a wait is over."""
    turns = [Counter[str]()]
    for line in lines:
        if line.startswith("epoll"):
            turns.append(Counter())
        elif found := _SYNC.fullmatch(line):
            turns[-1][found[1]] += 1
    return turns


def syncs_of_log(turns: Sequence[Counter[str]], home: Home, run_id: str) -> tuple[int, list[int]]:
    """How often a run's log was synced in the turn of its creation, and in each of the others."""
    # It is made, and synced for the first time, under a name that is none of a run, and then gets its own.
    log, new = home.run(run_id).events, home.run(f".new-{run_id}").events
    creation = next((turn for turn in turns if turn[new]), Counter[str]())
    return creation[new] + creation[log], [turn[new] + turn[log] for turn in turns if turn is not creation]
