"""What a system may run short of, against real daemons: the faults of test_faults.py, and a command that prints gigabytes.

    python -m tests.resource_faults [--count N] [--seed N]      as root on Linux, with strace: else it is fewer of them

Each deliberate bug is met by the test that it is to fail, with daemons that start from a tree that has it.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import sys
import tempfile
import unittest
from contextlib import suppress
from unittest import mock

from tests.daemon import Daemon, step, wait_until
from tests.mutations import named, write_tree
from tests.proof import Row
from wfd import process

BUGS = {
    "a failed batch is not cut back": "Limits.test_file_size",
    "a shortage fails the attempt": "NoMoreProcesses.test_for_the_shim",
    "a file is synced again after a failure": "SyncFails",
    "the reserve is kept": "FullDisk.test_cancel_works",
    "the reserve is not made again": "FullDisk.test_the_reserve_is_back_when_there_is_room",
    "the output of an ended attempt is not cut": "Output.test_is_cut_while_it_lives_and_when_it_has_ended",
    "the output of an adopted attempt is not cut": "Output.test_of_a_step_that_was_adopted_too",
}
# Nobody waits longer for what a bug keeps from happening. The tests themselves take a second or two.
BUG_DEADLINE_SEC = 20
# What the command prints; and how much of it may be on disk at a time, since a fast disk takes some before the daemon looks.
FLOOD_BYTES = 3 << 30
PEAK_BYTES = FLOOD_BYTES // 2


def run(name: str = "", chance: random.Random | None = None) -> unittest.TestResult:
    """Run these tests of test_faults.py, in any order."""
    suite = unittest.defaultTestLoader.loadTestsFromName(f"tests.test_faults.{name}".rstrip("."))
    tests = list(_flat(suite))
    (chance or random.Random(0)).shuffle(tests)
    return unittest.TextTestRunner(io.StringIO()).run(unittest.TestSuite(tests))


def _flat(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    tests: list[unittest.TestCase] = []
    for test in suite:
        tests += _flat(test) if isinstance(test, unittest.TestSuite) else [test]
    return tests


def is_caught(bug: str) -> bool | None:
    """Does its test fail? None: it cannot be run on this machine."""
    with tempfile.TemporaryDirectory(prefix="wfd-test-") as root:
        # A daemon that becomes another user reads it.
        os.chmod(root, 0o755)
        write_tree(root, named(bug))
        with mock.patch.object(Daemon, "root", root), mock.patch("tests.daemon.DEADLINE_SEC", BUG_DEADLINE_SEC):
            result = run(BUGS[bug])
    return None if result.skipped else not result.wasSuccessful()


def flood() -> tuple[int, int]:
    """A step prints FLOOD_BYTES: how many of them were on disk at a time, and how many when it had ended."""
    with Daemon() as daemon:
        run_id = daemon.submit(step("a", f"head -c {FLOOD_BYTES} /dev/zero"))
        out = daemon.home.run(run_id).attempt(1, "a", 1).out
        peak = 0

        def is_over() -> bool:
            nonlocal peak
            with suppress(FileNotFoundError):
                peak = max(peak, os.stat(out).st_size)
            return not os.listdir(daemon.home.live)

        wait_until(is_over, "the end of the flood", daemon.explain)
        return peak, os.stat(out).st_size


def prove(count: int, seed: int) -> Row:
    """All of them, so many times, each time in another order."""
    tried = hit = 0
    failures: list[str] = []
    for number in range(seed, seed + count):
        result = run(chance=random.Random(number))
        tried += result.testsRun
        hit += result.testsRun - len(result.skipped)
        failures += [f"{test.id()}, in the order of seed {number}: {why}" for test, why in result.failures + result.errors]
    if shutil.disk_usage(tempfile.gettempdir()).free > 2 * FLOOD_BYTES:
        peak, rest = flood()
        hit += 1
        if peak > PEAK_BYTES or rest > process.OUTPUT_LIMIT_BYTES:
            failures.append(f"of an output of {FLOOD_BYTES} bytes {peak} were on disk at a time, {rest} in the end")
    caught = [is_it for bug in BUGS if (is_it := is_caught(bug)) is not None]
    return Row("resource faults", tried + 1, hit, len(caught), sum(caught), tuple(failures))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.resource_faults", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=1, metavar="N", help="times (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the first order (default: %(default)s)")
    options = parser.parse_args(arguments)
    row = prove(options.count, options.seed)
    print("\n".join(row.failures) or "all of them were survived")
    print(f"{row.hit} of {row.tried} faults, {len(row.failures)} failures, {row.bugs_caught} of {row.bugs} bugs caught")
    return 1 if row.failures or row.bugs_caught < row.bugs else 0


if __name__ == "__main__":
    sys.exit(main())
