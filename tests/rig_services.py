"""The units under a real `systemd --user`. Run by tests/test_services.py inside a rig that provides one, with a fresh HOME
in which they are installed; by its name unittest does not find this file by itself."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import unittest

from tests.daemon import DEADLINE_SEC, ROOT, Daemon, wait_until
from tests.test_services import begin, finish
from wfd.paths import Home

HOME = os.environ["HOME"]
UNITS = ("wfd.socket", "wfd.service")
SAID = f"{HOME}/said"


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", "--user", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"systemctl {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip()


def show(unit: str, name: str) -> str:
    return systemctl("show", "--property", name, "--value", unit)


def setUpModule() -> None:
    """A program where the unit expects it, and a place for what it says: the rig has no journal."""
    os.makedirs(f"{HOME}/.local/bin")
    program = f"{HOME}/.local/bin/wfd"
    with open(program, "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\ncd {shlex.quote(ROOT)} && exec {shlex.quote(sys.executable)} -m wfd "$@"\n')
    os.chmod(program, 0o700)
    os.makedirs(f"{HOME}/.config/systemd/user/wfd.service.d")
    with open(f"{HOME}/.config/systemd/user/wfd.service.d/said.conf", "w", encoding="utf-8") as file:
        file.write(f"[Service]\nStandardOutput=append:{SAID}\nStandardError=append:{SAID}\n")
    systemctl("daemon-reload")


class Installed(Daemon):
    """The daemon of the installed service: systemd starts it, not we."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Home(f"{HOME}/.local/state/wfd")
        self.environ["WFD_HOME"] = self.home.directory

    @property
    def stderr(self) -> str:
        return SAID

    def pid(self) -> int:
        """Of the daemon that answers; connecting starts it."""
        with self.connect() as client:
            return int(client.request("hello", protocol_min=1, protocol_max=1)["pid"])


class Services(unittest.TestCase):
    def setUp(self) -> None:
        self.daemon = Installed()
        self.addCleanup(self.clean)

    def clean(self) -> None:
        try:
            self.daemon.check()
        finally:
            systemctl("stop", *UNITS)
            self.daemon.clean()
            shutil.rmtree(self.daemon.home.directory)

    def test_the_first_connection_starts_it(self) -> None:
        systemctl("start", "wfd.socket")
        self.assertEqual(show("wfd.service", "ActiveState"), "inactive")
        for path, mode in ((self.daemon.home.directory, 0o700), (self.daemon.socket_path, 0o600)):
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), mode)
        self.assertEqual(self.daemon.pid(), int(show("wfd.service", "MainPID")))
        wait_until(lambda: show("wfd.service", "ActiveState") == "active", "the service to be active")

    def test_starting_the_service_starts_the_socket(self) -> None:
        systemctl("start", "wfd.service")
        self.assertEqual(show("wfd.socket", "ActiveState"), "active")
        self.assertEqual(self.daemon.pid(), int(show("wfd.service", "MainPID")))

    def test_after_kill_9_it_is_back_and_adopts(self) -> None:
        systemctl("start", "wfd.socket")
        first = self.daemon.pid()
        run_id = begin(self.daemon)
        os.kill(first, signal.SIGKILL)
        # The socket is still there: the connection waits in it until the next daemon comes.
        self.assertNotIn(self.daemon.pid(), (first, 0))
        self.assertEqual(show("wfd.service", "NRestarts"), "1")
        finish(self, self.daemon, run_id)

    def test_a_restart_does_not_disturb_a_step(self) -> None:
        systemctl("start", "wfd.socket")
        first = self.daemon.pid()
        run_id = begin(self.daemon)
        systemctl("restart", "wfd.service")
        self.assertNotEqual(self.daemon.pid(), first)
        self.assertEqual(show("wfd.service", "NRestarts"), "0")
        finish(self, self.daemon, run_id)

    def test_it_takes_over_from_a_daemon_that_runs_already(self) -> None:
        self.daemon.start()
        first = self.daemon.process
        assert first is not None
        run_id = begin(self.daemon)
        systemctl("start", "wfd.socket")
        self.assertEqual(self.daemon.pid(), int(show("wfd.service", "MainPID")))
        self.assertEqual(first.wait(DEADLINE_SEC), 0)
        finish(self, self.daemon, run_id)
