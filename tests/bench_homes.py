"""The benchmark's cases about what lies in a home: logs that are read, daemons that start, commands, a daemon at rest."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

from tests import logs
from tests.bench_results import ROUNDS, SHORT_ROUNDS, Options, Result, Skipped, WrongResult, rate, ratio, rounds, timed
from tests.bench_runs import Found
from tests.bench_subjects import HAS_PROC, NEEDS_PROC, PROGRAM, Daemon, chain, definition, fan_out, loose, workflow_file
from tests.daemon import Client, wait_until
from wfctl.client import HELLO
from wfd import decide, journal, protocol
from wfd.__main__ import GC_THRESHOLD
from wfd.definition import Workflow, validate
from wfd.events import AttemptExited
from wfd.paths import Home
from wfd.requests import Environment
from wfd.state import RunState

# -- reading a log -----------------------------------------------------------------------------------------------------

# What wait4 tells of `true`: user_ms, system_ms, peak_rss_kib.
_USAGE = (1, 1, 20_000)


def log(options: Options) -> Found:
    """The log of one long run, read as the daemon does when it starts, and as `replay` does. In processor time: there is
    nothing to wait for. All with the daemon's own threshold for looking for garbage."""
    threshold = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD)
    workflow = validate(definition(fan_out(options.sizes.steps_10k)), "/")
    home, run_id = logs.home(tempfile.mkdtemp(prefix="home-")), "long"
    files = logs.save(home, _finished(workflow, run_id), run_id)

    def recovery() -> float:
        start = time.process_time()
        run, _ = journal.fold(files, run_id)
        seconds = time.process_time() - start
        if run.state is not RunState.SUCCEEDED:
            raise WrongResult(f"the log was folded to {run.state.value}")
        return seconds

    def replay() -> float:
        start = time.process_time()
        with open(files.events, "rb") as file:
            run, difference = decide.replay(journal.Reading(file, run_id))
        seconds = time.process_time() - start
        if difference is not None or not run.is_over:
            raise WrongResult(f"the log does not replay: {difference}")
        return seconds

    def alone() -> float:
        start = time.process_time()
        with open(files.events, "rb") as file:
            for line in file:
                json.loads(line)
        return time.process_time() - start

    calls = {"recovery": recovery, "replay": replay, "alone": alone}
    times = rounds(calls, options.rounds or ROUNDS, warms_up=options.warms_up)
    gc.set_threshold(*threshold)
    yield rate("log", "recovery", times["recovery"], times["alone"])
    yield rate("log", "replay", times["replay"], times["alone"])


def _finished(workflow: Workflow, run_id: str) -> bytes:
    """A log of a run whose steps succeed one after the other, each line with all that the daemon writes."""
    log = logs.Log(workflow, run_id)
    log.write(logs.session())
    for step in workflow.steps:
        log.start(step.id).write(AttemptExited(step.id, 1, 0, None, *_USAGE))
    return log.data


# -- a home with thousands of runs -------------------------------------------------------------------------------------

# As if somebody had started one a minute for a week.
_APART_SEC = 60


@cache
def crowded_home(options: Options) -> Home:
    """A home with all the finished runs, and the unfinished ones."""
    home = quiet_home(options)
    workflow = validate(definition(loose(1, "true")), "/")
    first_sec = int(time.time()) - options.sizes.finished * _APART_SEC
    for number in range(options.sizes.finished):
        made_sec = first_sec + number * _APART_SEC
        # As the client makes them, so that their order is seen in their names.
        run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime(made_sec)) + "aaaa"
        _save(home, run_id, _finished(workflow, run_id), made_sec)
    return home


def quiet_home(options: Options) -> Home:
    """A home with the unfinished runs alone. Of each a step waits until tomorrow for its next attempt."""
    home = logs.home(tempfile.mkdtemp(prefix="home-"))
    tomorrow = {"initial_sec": 86_400, "max_sec": 86_400}
    steps = [logs.step("waits", retries=1, backoff=tomorrow), *(logs.step(f"s{number}") for number in range(19))]
    workflow = logs.workflow(*steps)
    for number in range(options.sizes.unfinished):
        run_id = f"unfinished-{number}"
        log = logs.Log(workflow, run_id).write(logs.session())
        for step in workflow.steps:
            log.start(step.id).write(AttemptExited(step.id, 1, int(step.id == "waits"), None, *_USAGE))
        _save(home, run_id, log.data, int(time.time()))
        with open(f"{home.live}/{run_id}", "wb"):
            pass
    return home


def _save(home: Home, run_id: str, data: bytes, made_sec: int) -> None:
    files = logs.save(home, data, run_id)
    with open(files.environment, "wb") as file:
        file.write(Environment({}, 0o022, {}).encode())
    # `list` takes this for the time of its submission.
    os.utime(files.environment, (made_sec, made_sec))


def start(options: Options) -> Found:
    """From the spawn of a daemon to its first answer."""
    crowded, quiet = crowded_home(options), quiet_home(options)
    calls = {"crowded": lambda: _first_answer(options, crowded), "quiet": lambda: _first_answer(options, quiet)}
    times = rounds(calls, options.rounds or SHORT_ROUNDS, warms_up=options.warms_up)
    yield ratio("start", "without the finished", times["crowded"], times["quiet"])


def _first_answer(options: Options, home: Home) -> float:
    daemon = Daemon(home=home)
    ours, theirs = socket.socketpair()
    # Its end is that of a `with` whose beginning is measured.
    with theirs, Client(ours) as connection, ExitStack() as stack:
        stack.push(daemon)
        # Handed over with the question in it, as a client does that starts a daemon.
        connection.send(protocol.request("hello", HELLO))
        start = time.perf_counter()
        daemon.process = daemon.spawn("--handover-fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),))
        theirs.close()
        answer = connection.message()
        seconds = time.perf_counter() - start
    if answer["result"]["active_runs"] != options.sizes.unfinished:
        raise WrongResult(f"the daemon has taken over {answer['result']['active_runs']} runs")
    return seconds


# -- commands ----------------------------------------------------------------------------------------------------------

_BARE = (sys.executable, "-I", "-c", "import socket, json")


def commands(options: Options) -> Found:
    """Whole processes, beside an interpreter that only imports what a client needs at least."""
    small = chain(20)
    dead_home, dead_id = _killed(options)
    with Daemon(home=crowded_home(options)) as daemon:
        _, run_id = daemon.run(workflow_file(small))
        daemon.check_run(run_id, small)
        one = workflow_file(chain(1))

        def run_detached() -> float:
            seconds, output = timed([*PROGRAM, "run", "-d", one], daemon.environ)
            # It shall not be in the way of what is measured next.
            daemon.wait_for(output.strip(), "SUCCEEDED")
            return seconds

        calls: dict[str, Callable[[], float]] = {
            "status": lambda: _says("SUCCEEDED", daemon.environ, "status", run_id),
            "list": lambda: _says(run_id, daemon.environ, "list"),
            "run -d": run_detached,
            "status, no daemon": lambda: _says("SUCCEEDED", {**daemon.environ, "WFD_HOME": dead_home}, "status", dead_id),
            "python": lambda: timed(_BARE)[0],
        }
        times = rounds(calls, options.rounds or SHORT_ROUNDS, warms_up=options.warms_up)
    for name in list(times)[:-1]:
        yield ratio("commands", name, times[name], times["python"])


def _killed(options: Options) -> tuple[str, str]:
    """The home of a daemon that was killed, and the id of a long run in it."""
    graph = fan_out(options.sizes.steps)
    with Daemon() as daemon:
        _, run_id = daemon.run(workflow_file(graph))
        daemon.check_run(run_id, graph)
        daemon.kill()
        return daemon.home.directory, run_id


def _says(word: str, environ: dict[str, str], *arguments: str) -> float:
    seconds, output = timed([*PROGRAM, *arguments], environ)
    if word not in output:
        raise WrongResult(f"{' '.join(arguments)} said {output!r}")
    return seconds


# -- at rest -----------------------------------------------------------------------------------------------------------


def idle(options: Options) -> Found:
    """A daemon that has run something and now has nothing to do; then one that waits for many steps."""
    if not HAS_PROC:
        yield Skipped("idle", NEEDS_PROC)
        return
    sizes = options.sizes
    if options.warms_up:
        # Whoever compiles the program as it starts keeps some of the memory that that takes.
        with Daemon() as daemon:
            daemon.hello()
    with Daemon("--max-parallel", str(sizes.live_steps)) as daemon:
        small = chain(20)
        _, run_id = daemon.run(workflow_file(small))
        daemon.check_run(run_id, small)
        time.sleep(sizes.settle_sec)
        # Each wait that ends is followed by another, which is a voluntary switch.
        before = daemon.figure("voluntary_ctxt_switches")
        time.sleep(sizes.idle_sec)
        yield Result("idle", "wake-ups", "", [daemon.figure("voluntary_ctxt_switches") - before])
        yield Result("idle", "memory", "MB", [_memory_mb(daemon)])
        live = daemon.submit(**definition(loose(sizes.live_steps, "sleep 1000")))  # type: ignore[arg-type]
        wait_until(lambda: daemon.hello()["live_steps"] == sizes.live_steps, "the start of all steps", daemon.explain)
        time.sleep(sizes.settle_sec)
        yield Result("idle", "memory, live steps", "MB", [_memory_mb(daemon)])
        daemon.request("cancel", run_id=live, request="bench")
        daemon.wait_for(live, "CANCELLED")


def _memory_mb(daemon: Daemon) -> float:
    return daemon.figure("VmRSS") * 1.024 / 1000
