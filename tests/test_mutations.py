"""Deliberate bugs in short form: each must be caught within a few histories. The table: `python -m tests.mutations`."""

from __future__ import annotations

import os
import tempfile
import unittest

from tests.mutations import applied, catch, mutations, with_known_first
from wfd import __main__ as daemon
from wfd import decide, state
from wfd.paths import Home

# After a change of the engine the known seeds may show nothing any more; then the others are tried.
_SEEDS = range(1_500)
# Named tests that take longer than a moment are left to the long form.
_QUICK = ("tests.test_mutations.Homes", "tests.test_decide", "tests.test_state")


class Bugs(unittest.TestCase):
    def test_each_is_caught(self) -> None:
        for mutation in mutations():
            if mutation.test and mutation.test not in _QUICK:
                continue
            with self.subTest(mutation.name):
                self.assertIsNotNone(catch(mutation, with_known_first(mutation, _SEEDS)), "nothing catches it")

    def test_each_has_its_place_and_leaves_nothing_behind(self) -> None:
        before = decide.next_decision.__code__, decide.MAX_LOSSES, state.Run.apply.__code__
        for mutation in mutations():
            with self.subTest(mutation.name), applied(mutation):
                pass
        self.assertEqual((decide.next_decision.__code__, decide.MAX_LOSSES, state.Run.apply.__code__), before)
        self.assertGreaterEqual(len(mutations()), 35)


class Homes(unittest.TestCase):
    """Within one process, so that a bug put into it counts."""

    def test_have_one_daemon(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            lock = daemon._lock(Home(directory), False, [])
            try:
                with self.assertRaises(daemon.CannotStart):
                    os.close(daemon._lock(Home(directory), False, []))
            finally:
                os.close(lock)


if __name__ == "__main__":
    unittest.main()
