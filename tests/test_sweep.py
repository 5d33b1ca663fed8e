"""Daemons and shims that are killed at their system calls or refused them, in short form. The long one: tests/sweep.py."""

from __future__ import annotations

import random
import unittest

from tests import shims, strace, sweep
from tests.sweep import Point

SEED = 1


@unittest.skipIf(strace.why_not(), strace.why_not())
class Sweep(unittest.TestCase):
    """P1, P2, P8."""

    COUNT = 8

    # Points at which something was wrong once, and what.
    FOUND = (
        # The daemon ended with a traceback where it should say in a sentence why it cannot start.
        Point("openat", 1, False, "EMFILE", "/home/live"),
        Point("flock", 1, False, "ENOLCK", "/home/wfd.lock"),
        # The attempt was taken for failed.
        Point("flock", 1, False, "ENOLCK", "/home/runs/main/attempts/1-fetch.1.status"),
        # The run was taken for damaged.
        Point("openat", 2, True, "EIO", "/home/runs/other/events.ndjson"),
        # A retry that was repeated after a shortage was refused: its run was not over.
        Point("openat", 2, True, "ENOSPC", "/home/runs/other/events.ndjson.new"),
    )

    def assert_met(self, points: list[Point], act: sweep.Act) -> None:
        met = sweep.meet(points, act)
        problems = [problem for _, _, problem in met if problem]
        self.assertFalse(problems, "\n".join(problems))
        hit = sum(was_met for _, was_met, _ in met)
        self.assertGreaterEqual(hit, sweep.MIN_HIT * len(points), met)

    def test_killed(self) -> None:
        # Of a few points all must be met: so only those of the first half of a run, which come in any other run as well.
        calls = sweep.record(False, lambda call: (call.name, call.n))
        known = [sweep.as_kill(call, False) for call in calls[: len(calls) // 2]]
        self.assert_met(sweep.choose(known, self.COUNT, random.Random(SEED)), sweep.kill_at)

    def test_killed_while_it_takes_over(self) -> None:
        self.assert_met([Point("fsync", 4, True), Point("flock", 4, True)], sweep.kill_at)

    def test_errors_that_showed_a_defect(self) -> None:
        self.assert_met(list(self.FOUND), sweep.fail_at)


@unittest.skipIf(strace.why_not(), strace.why_not())
class Shim(unittest.TestCase):
    """P9."""

    def test_dies_while_nobody_looks(self) -> None:
        points = shims.late(shims.known_points())
        self.assertEqual(shims.meet_unseen(points), len(points))


if __name__ == "__main__":
    unittest.main()
