"""Deliberate bugs in short form: each must be caught within a few histories. The table: `python -m tests.mutations`."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tempfile
import time
import unittest
from unittest import mock

from tests.mutations import applied, catch, mutations, with_known_first
from wfd import __main__ as daemon
from wfd import decide, journal, state
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

    def test_are_free_a_moment_after_their_daemon_was_killed(self) -> None:
        # A child that it was just starting has the lock until its exec.
        dead = subprocess.Popen(["true"])
        dead.wait()
        with tempfile.TemporaryDirectory() as directory:
            home = Home(directory)
            left = daemon._lock(home, False, [])
            os.write(left, json.dumps({"pid": dead.pid}).encode())
            with mock.patch.object(time, "sleep", lambda seconds: os.close(left)):
                os.close(daemon._lock(home, False, []))

    def test_are_durable_before_their_first_run(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        synced: list[str] = []
        with tempfile.TemporaryDirectory() as directory, mock.patch.object(journal, "sync_directory", synced.append):
            home = Home(f"{directory}/home")
            for _ in range(2):
                daemon._prepare(home)
                self.assertEqual(synced, [home.directory, directory])
                synced.clear()
            os.mkdir(home.run("r1").directory)
            daemon._prepare(home)
            self.assertEqual(synced, [])

    def test_have_a_socket_that_only_the_owner_may_use(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            before = os.umask(0)
            try:
                path, [listener], _ = daemon._listen(Home(directory), [])
            finally:
                os.umask(before)
            with listener:
                self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)


if __name__ == "__main__":
    unittest.main()
