"""Ten thousand short runs over one connection: the daemon holds no more memory and no more descriptors than in the
beginning, and what lies on the disk by then slows nobody down.

    python -m tests.endurance [--count N] [--seed N]      Linux, whose /proc tells both

Nothing is deleted meanwhile. The memory is looked at when a fifth of the runs are over, since Python's own pools and caches
have to fill first, and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

from tests.daemon import ROOT, Client, Daemon, step, wait_until
from tests.mutations import named, write_tree
from tests.proof import Row
from wfd import decide, protocol

# So many submissions wait for their answer at a time.
WINDOW = 64
# Of the daemon's memory, from a fifth of the runs to the end. It was 4 KiB in 10,000 runs; a finished run that is kept costs
# as much alone.
GROWTH_KIB = 256
# Enough for a leak of finished runs to be seen.
BUG_RUNS = 500
BUGS = ("finished runs are kept", "the logs of finished runs stay open")
# Of so many runs at most the log is replayed.
REPLAYED = 500


def submit(daemon: Daemon, run_ids: list[str]) -> None:
    """A run of one short step for each id, all over one connection, and wait until they are over."""
    with daemon.connect() as client:
        waiting = iter(run_ids)
        for run_id in islice(waiting, WINDOW):
            _send(daemon, client, run_id)
        for run_id in run_ids:
            answer = client.message()
            assert answer["id"] == run_id and "result" in answer, answer
            for following in islice(waiting, 1):
                _send(daemon, client, following)
    wait_until(lambda: not daemon.request("list")["runs"], "the end of all runs", daemon.explain)


def _send(daemon: Daemon, client: Client, run_id: str) -> None:
    client.send(protocol.request("submit", daemon.submission(step("a", "true"), run_id=run_id), run_id))


def _memory_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))


def endure(daemon: Daemon, count: int, chance: random.Random) -> Iterator[str]:
    """So many runs; what is wrong afterwards."""
    daemon.start()
    assert daemon.process is not None
    pid = daemon.process.pid
    run_ids = [f"r{number:05}-{chance.getrandbits(32):08x}" for number in range(count)]
    submit(daemon, run_ids[: count // 5])
    descriptors, memory_kib = sorted(os.listdir(f"/proc/{pid}/fd")), _memory_kib(pid)
    submit(daemon, run_ids[count // 5 :])
    growth_kib = _memory_kib(pid) - memory_kib
    if growth_kib > GROWTH_KIB:
        yield f"the daemon has grown by {growth_kib} KiB, from {memory_kib} KiB"
    if len(left := os.listdir(f"/proc/{pid}/fd")) != len(descriptors):
        yield f"the daemon has {len(left)} descriptors open, and had {len(descriptors)}"
    yield from _listing(daemon, run_ids)
    for run_id in chance.sample(run_ids, min(REPLAYED, count)):
        if difference := decide.replay(daemon.events(run_id))[1]:
            yield f"run {run_id} does not replay: {difference}"
    if alive := daemon.processes():
        yield f"all runs are over, and {alive} are alive"
    daemon.restart()
    if marked := os.listdir(daemon.home.live):
        yield f"{len(marked)} runs are still marked as live, and the next daemon reads them"


def _listing(daemon: Daemon, run_ids: list[str]) -> Iterator[str]:
    """What `list` tells, from the disk alone."""
    for flags, wanted in (("--all",), run_ids), ((), run_ids[-50:]):
        done = subprocess.run(
            [sys.executable, f"{daemon.root}/workflow.py", "list", "--json", *flags], env=daemon.environ,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        runs: list[dict[str, Any]] = json.loads(done.stdout)["runs"] if done.returncode == 0 else []
        if {(run["run_id"], run["state"]) for run in runs} != {(run_id, "SUCCEEDED") for run_id in wanted}:
            yield f"list {flags} shows {len(runs)} runs, not {len(wanted)} that have all SUCCEEDED: {done.stderr[-500:]}"


def problems(root: str, count: int, seed: int) -> list[str]:
    """What went wrong with the program that lies in `root`."""
    daemon = Daemon()
    daemon.root = root
    try:
        return list(endure(daemon, count, random.Random(seed)))
    except AssertionError as error:
        return [str(error)]
    finally:
        daemon.clean()


def is_caught(bug: str) -> bool:
    """Is a daemon with this bug noticed?"""
    with tempfile.TemporaryDirectory(prefix="wfd-test-") as root:
        write_tree(root, named(bug))
        return bool(problems(root, BUG_RUNS, 1))


def impossible() -> str:
    return "" if sys.platform == "linux" else "reads /proc, which only Linux has"


def prove(count: int, seed: int) -> Row:
    """So many runs."""
    means = "memory and descriptors over many runs"
    if why := impossible():
        return Row(means, impossible=why)
    again = f"(python -m tests.endurance --count {count} --seed {seed})"
    failures = tuple(f"{problem} {again}" for problem in problems(ROOT, count, seed))
    return Row(means, count, count, len(BUGS), sum(map(is_caught, BUGS)), failures)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of their names (default: %(default)s)")
    options = parser.parse_args(arguments)
    row = prove(options.count, options.seed)
    print("\n".join(row.failures) or row.impossible or "the daemon is as small as it was")
    print(f"{row.hit} runs, {len(row.failures)} failures, {row.bugs_caught} of {row.bugs} bugs caught")
    return 1 if row.failures or row.bugs_caught < row.bugs else 0


if __name__ == "__main__":
    sys.exit(main())
