"""Hostile input: every row of the tables, and a sample of the sweeps. The long form: `python -m tests.hostile`."""

from __future__ import annotations

import random
import unittest
from collections.abc import Iterable
from itertools import islice

from tests import hostile, hostile_daemon, hostile_frames, hostile_logs, hostile_texts
from tests.hostile import Result

# The sample: prime, so that it meets every place of a line.
_EVERY_CUT, _EVERY_FLIP = 23, 11
# Noticed by late rows: left to the long form.
_SLOW = {"replay compares only the kinds of decisions", "a log of a later version is read"}


class Hostile(unittest.TestCase):
    def assert_fine(self, results: Iterable[Result]) -> None:
        for name, problem in results:
            with self.subTest(name):
                self.assertEqual(problem, "")


class Tables(Hostile):
    def test_texts(self) -> None:
        self.assert_fine(hostile.texts())

    def test_logs(self) -> None:
        self.assert_fine(hostile.edits())

    def test_things(self) -> None:
        self.assert_fine(hostile.things())

    def test_frames(self) -> None:
        self.assert_fine(hostile_daemon.frames())

    def test_what_a_daemon_takes_over(self) -> None:
        self.assert_fine(hostile_daemon.taken_over())

    def test_status_files(self) -> None:
        self.assert_fine(hostile_daemon.statuses_alone())
        self.assert_fine(hostile_daemon.statuses())

    def test_each_row_has_a_name_of_its_own(self) -> None:
        tables = (
            hostile_texts.WORKFLOWS, hostile_texts.COMMANDS, hostile_texts.ENVIRONMENTS, hostile_logs.EDITS,
            hostile_logs.THINGS, hostile_frames.FRAMES, hostile_frames.TAKEN_OVER, hostile_frames.STATUSES,
        )  # fmt: skip
        self.assertGreaterEqual(sum(map(len, tables)), 350)
        for table in tables:
            names = [row.name for row in table]
            self.assertEqual(len(names), len(set(names)))


class Sweeps(Hostile):
    """Whatever is done to a log, it is refused or tells the state of a beginning of what it was."""

    def test_cut_everywhere(self) -> None:
        self.assert_fine(hostile.swept(islice(hostile.cuts(), 0, None, _EVERY_CUT), asks_every=60))

    def test_bytes_changed(self) -> None:
        changes = islice(hostile.flips(1, random.Random(1)), 0, None, _EVERY_FLIP)
        self.assert_fine(hostile.swept(changes, asks_every=90))

    def test_lines_mixed_up(self) -> None:
        self.assert_fine(hostile.swept(islice(hostile.mixes(), 0, None, 2), asks_every=40))


class Bugs(unittest.TestCase):
    def test_each_is_noticed(self) -> None:
        for bug in hostile.BUGS.keys() - _SLOW:
            with self.subTest(bug):
                self.assertTrue(hostile.is_noticed(bug))


if __name__ == "__main__":
    unittest.main()
