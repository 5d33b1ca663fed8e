"""Many short runs, in short form: `python -m tests.endurance` is the long one."""

from __future__ import annotations

import unittest

from tests import endurance
from tests.daemon import ROOT


class ManyRuns(unittest.TestCase):
    def setUp(self) -> None:
        if why := endurance.impossible():
            self.skipTest(why)

    def test_leave_the_daemon_as_it_was(self) -> None:
        self.assertEqual(endurance.problems(ROOT, endurance.BUG_RUNS, 1), [])

    def test_a_leak_is_noticed(self) -> None:
        self.assertTrue(endurance.is_caught(endurance.BUGS[0]))


if __name__ == "__main__":
    unittest.main()
