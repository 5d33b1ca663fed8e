"""kill -9 of the daemon at random while it has much to do, in one home, as often as one wants.

Several runs of steps that count their executions (tests/counted.py) are always under way. A round lets them make a random
piece of progress, kills the daemon, and starts the next. Every third daemon is killed as soon as somebody could connect to
it: then it is just taking the runs over. One step of each run goes on through many rounds. Nobody kills a step, so in the
end each must have run exactly once in one attempt that began, and have SUCCEEDED; a daemon that was killed between the
status file and the spawn leaves an attempt that never began, and no kill can leave more of them than one.
"""

from __future__ import annotations

import random
import tempfile
from concurrent.futures import ThreadPoolExecutor

from tests import counted, mutations
from tests.counted import COUNT
from tests.daemon import ROOT, Daemon, step, wait_until
from tests.proof import Row
from wfd.events import AttemptLost, AttemptNotStarted

# Runs that are under way at once, the steps of each, and how many of one run's steps may run at once.
_RUNS, _STEPS, _PARALLEL = 2, 40, 4
# In one round of so many, one of the long steps may end.
_LONG_ROUNDS = 4
# A round's progress, in lines of all logs together; each step writes four or five.
_MAX_LINES = 40


def under_load(rounds: int, seed: int, root: str = ROOT) -> None:
    """So many rounds. Raises what is wrong in the end."""
    chance = random.Random(seed)
    daemon = Daemon()
    daemon.root = root
    with daemon:
        runs: list[str] = []
        for number in range(rounds):
            while len(busy := [run_id for run_id in runs[-_RUNS:] if _is_busy(daemon, run_id)]) < _RUNS:
                runs.append(_submit(daemon, chance))
            if chance.randrange(_LONG_ROUNDS) == 0:
                daemon.touch(f"go.{chance.choice(runs)}")
            if number % 3 == 2:
                daemon.kill()
                _start_and_kill(daemon)
                daemon.start()
            else:
                _wait_for_progress(daemon, busy, chance.randint(1, _MAX_LINES))
                daemon.restart()
            damaged = daemon.request("hello", protocol_min=1, protocol_max=1)["quarantined"]
            assert not damaged, f"round {number}: {damaged} are damaged\n{daemon.explain()}"
        for run_id in runs:
            daemon.touch(f"go.{run_id}")
        for run_id in runs:
            daemon.wait_for(run_id)
        _check(daemon, runs, rounds)


def _submit(daemon: Daemon, chance: random.Random) -> str:
    names = [f"s{number}" for number in range(_STEPS)]
    steps = [step("long", COUNT + 'until [ -e "go.$WFD_RUN_ID" ]; do sleep 0.1; done')]
    for number, name in enumerate(names):
        before = names[max(0, number - 8) : number]
        steps.append(step(name, COUNT + "sleep 0.02", *chance.sample(before, min(2, len(before)))))
    return daemon.submit(*steps, max_parallel=_PARALLEL)


def _is_busy(daemon: Daemon, run_id: str) -> bool:
    """Has it more to do than to wait for its long step?"""
    return _log(daemon, run_id).count(b'"event":"step_succeeded"') < _STEPS


def _wait_for_progress(daemon: Daemon, runs: list[str], lines: int) -> None:
    """Until the logs of these runs have so many lines more, or they have nothing more to do."""

    def count() -> int:
        return sum(_log(daemon, run_id).count(b"\n") for run_id in runs)

    wanted = count() + lines
    wait_until(
        lambda: count() >= wanted or not any(_is_busy(daemon, run_id) for run_id in runs), "progress", daemon.explain
    )


def _log(daemon: Daemon, run_id: str) -> bytes:
    with open(daemon.home.run(run_id).events, "rb") as file:
        return file.read()


def _start_and_kill(daemon: Daemon) -> None:
    process = daemon.spawn()

    def is_listening() -> bool:
        try:
            daemon.connect().close()
        except OSError:
            return False
        return True

    wait_until(is_listening, "its socket", daemon.explain)
    process.kill()
    process.wait()


def _check(daemon: Daemon, runs: list[str], rounds: int) -> None:
    began_not = 0
    for run_id in runs:
        events = [line.event for line in daemon.events(run_id)]
        assert not any(isinstance(event, AttemptLost) for event in events), f"lost\n{daemon.story(run_id)}"
        tries = [event.step for event in events if isinstance(event, AttemptNotStarted)]
        began_not += len(tries)
        for record in daemon.fold(run_id).steps:
            ended = record.state, record.attempt - tries.count(record.step.id)
            assert ended == ("SUCCEEDED", 1), f"run {run_id}, {record.step.id}: {ended}\n{daemon.story(run_id)}"
        counted.check(daemon, run_id)
    assert began_not <= rounds + rounds // 3, f"{began_not} attempts never began"


BUGS = ("the lock is not taken", "the lock of an adopted attempt is not looked at")
# Rounds until a bug must have shown itself.
_BUG_ROUNDS = 10
# Homes at once: in each, one daemon is killed or started at a time.
_HOMES = 2


def prove(count: int, seed: int) -> Row:
    with ThreadPoolExecutor(_HOMES) as pool:
        problems = list(pool.map(lambda home: _problem(-(-count // _HOMES), seed * _HOMES + home), range(_HOMES)))
    missed = [bug for bug in BUGS if not _is_caught(bug, seed)]
    failures = [problem for problem in problems if problem] + [f"nothing shows the bug: {bug}" for bug in missed]
    return Row("kill -9 at random under load", count, count, len(BUGS), len(BUGS) - len(missed), tuple(failures))


def _is_caught(bug: str, seed: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="wfd-test-") as root:
        mutations.write_tree(root, mutations.named(bug))
        return bool(_problem(_BUG_ROUNDS, seed, root))


def _problem(rounds: int, seed: int, root: str = ROOT) -> str:
    try:
        under_load(rounds, seed, root)
    except Exception as problem:
        return f"seed {seed}: {type(problem).__name__}: {problem}"
    return ""
