"""The service files, and the daemon's side of what they promise: readiness, watchdog, passed sockets, replacement.

The units are checked by systemd itself where it is there. `Managed` plays the service manager for everything else, so
the protocols of sd_notify(3) and sd_listen_fds(3) are tested for real on any system. tests/rig_services.py goes on
beside a real `systemd --user`, where the machine has a rig for that and we are root.
"""

from __future__ import annotations

import configparser
import os
import plistlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tests.daemon import DEADLINE_SEC, ROOT, Client, Daemon, step, wait_until
from wfd import machine
from wfd.paths import Home, default_home

SERVICE, SOCKET = f"{ROOT}/systemd/wfd.service", f"{ROOT}/systemd/wfd.socket"
PLIST = f"{ROOT}/launchd/local.wfd.plist"
RIG = f"{os.path.dirname(ROOT)}/shared/rigs/user-systemd"

# Any setting that is not listed here would be one that nobody asked for, or one that steps inherit.
SERVICE_SETTINGS = {
    "Unit": {
        "Description": "Workflow daemon",
        "Requires": "wfd.socket",
        "After": "wfd.socket",
        "StartLimitIntervalSec": "0",
    },
    "Service": {
        "Type": "notify",
        "NotifyAccess": "main",
        "ExecStart": "%h/.local/bin/wfd --home %h/.local/state/wfd --replace",
        "Restart": "on-failure",
        "RestartSec": "1",
        "KillMode": "process",
        "OOMPolicy": "continue",
        "WatchdogSec": "120",
        "TimeoutStartSec": "600",
    },
    "Install": {"WantedBy": "default.target"},
}
SOCKET_SETTINGS = {
    "Unit": {"Description": "Socket of the workflow daemon"},
    "Socket": {"ListenStream": "%h/.local/state/wfd/wfd.sock", "SocketMode": "0600", "DirectoryMode": "0700"},
    "Install": {"WantedBy": "sockets.target"},
}


def settings(path: str) -> dict[str, dict[str, str]]:
    """A unit file as section -> setting -> value. Raises configparser.Error for a setting given twice."""
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#", empty_lines_in_values=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    with open(path, encoding="utf-8") as file:
        parser.read_file(file)
    return {name: dict(parser[name]) for name in parser.sections()}


class SystemdUnits(unittest.TestCase):
    def test_every_setting(self) -> None:
        for path, expected in ((SERVICE, SERVICE_SETTINGS), (SOCKET, SOCKET_SETTINGS)):
            with self.subTest(os.path.basename(path)):
                self.assertEqual(settings(path), expected)

    def test_the_units_mean_the_home_that_clients_look_in(self) -> None:
        home = Home(default_home({}, "linux", "%h"))
        self.assertIn(f" --home {home.directory} ", settings(SERVICE)["Service"]["ExecStart"])
        self.assertEqual(settings(SOCKET)["Socket"]["ListenStream"], home.socket("/nowhere"))

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_has_nothing_to_say_about_them(self) -> None:
        self.assertEqual(self.verify({}), "")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_would_name_a_misspelt_setting(self) -> None:
        self.assertIn("OMPolicy", self.verify({"OOMPolicy": "OMPolicy"}))

    def verify(self, changes: Mapping[str, str]) -> str:
        """What `systemd-analyze verify` says about copies of the units."""
        with tempfile.TemporaryDirectory(prefix="wfd-test-") as home:
            os.makedirs(f"{home}/.local/bin")
            # The program that the service names has to be there.
            shutil.copy(sys.executable, f"{home}/.local/bin/wfd")
            units = [f"{home}/{os.path.basename(path)}" for path in (SERVICE, SOCKET)]
            for path, copy in zip((SERVICE, SOCKET), units, strict=True):
                with open(path, encoding="utf-8") as source, open(copy, "w", encoding="utf-8") as target:
                    text = source.read()
                    for old, new in changes.items():
                        text = text.replace(old, new)
                    target.write(text)
            environ = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "XDG_RUNTIME_DIR": home}
            done = subprocess.run(
                ["systemd-analyze", "verify", "--user", *units],
                env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                check=False,
            )  # fmt: skip
            return done.stdout


class LaunchdTemplate(unittest.TestCase):
    # As in README.md, where the shell fills in the values.
    RECIPE = "s|@WFD@|{program}|; s|@HOME@|{home}|; s|@PATH@|{path}|"

    def test_every_setting_once_it_is_filled_in(self) -> None:
        home, path = "/Users/some one", "/opt/homebrew/bin:/usr/bin"
        recipe = self.RECIPE.format(program="/opt/bin/wfd", home=home, path=path)
        filled = subprocess.run(["sed", "-e", recipe, PLIST], stdin=subprocess.DEVNULL, capture_output=True, check=True)
        self.assertEqual(
            plistlib.loads(filled.stdout),
            {
                "Label": "local.wfd",
                "ProgramArguments": ["/opt/bin/wfd", "--home", default_home({}, "darwin", home), "--replace"],
                "EnvironmentVariables": {"PATH": path},
                "RunAtLoad": True,
                "KeepAlive": {"SuccessfulExit": False},
                "AbandonProcessGroup": True,
                "ProcessType": "Interactive",
                "Umask": 0o077,
                "StandardErrorPath": f"{home}/Library/Logs/wfd.log",
            },
        )
        self.assertNotIn(b"@", filled.stdout)


# Puts what was passed where sd_listen_fds(3) says, and becomes the daemon. Moved up first: a target may be a source.
_LAUNCH = """
import fcntl, os, sys
pid, *fds = sys.argv[1].split(",")
for target, fd in enumerate([fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 20) for fd in fds], 3):
    os.dup2(fd, target)
os.environ.update(LISTEN_PID=pid or str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES="wfd.socket")
os.execv(sys.executable, [sys.executable, "-S", "-m", "wfd", *sys.argv[2:]])
"""


class Managed(Daemon):
    """A daemon whose service manager is the test.

    passed      file descriptors for the daemon to start with
    listen_pid  whom they are meant for: "" the daemon
    """

    def __init__(self, *flags: str, environ: Mapping[str, str] | None = None) -> None:
        super().__init__(*flags, environ=environ)
        self.passed: list[int] = []
        self.listen_pid = ""
        self._sockets: list[socket.socket] = []
        self._notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notifications.settimeout(DEADLINE_SEC)
        self._notifications.bind(f"{self.base}/notify")
        self.environ["NOTIFY_SOCKET"] = f"{self.base}/notify"

    def __enter__(self) -> Managed:
        return self

    def clean(self) -> None:
        for sock in (*self._sockets, self._notifications):
            sock.close()
        super().clean()

    def listen(self, path: str) -> None:
        """Do what systemd does for a socket unit: listen there, whoever did before, and pass that on."""
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self._sockets.append(listener)
        self.passed.append(listener.fileno())

    def spawn(self, *flags: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        told = ",".join([self.listen_pid, *map(str, self.passed)])
        with open(self.stderr, "ab") as stderr:
            started = subprocess.Popen(
                [sys.executable, "-ISc", _LAUNCH, told, *self.flags, *flags],
                cwd=ROOT, env=self.environ, pass_fds=(*self.passed, *pass_fds),
                stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
            )  # fmt: skip
        self._others.append(started)
        return started

    def hear(self) -> str:
        """The daemon's next notification."""
        return self._notifications.recv(4096).decode()

    def pid_at(self, path: str) -> Any:
        """Who answers there."""
        with Client.connect(path) as client:
            return client.request("hello", protocol_min=1, protocol_max=1)["pid"]


class Notifications(unittest.TestCase):
    def test_ready_then_alive_then_stopping(self) -> None:
        with Managed(environ={"WATCHDOG_USEC": "100000"}) as daemon:
            daemon.process = daemon.spawn()
            self.assertEqual(daemon.hear(), "READY=1")
            self.assertEqual(daemon.pid_at(daemon.socket_path), daemon.process.pid)
            self.assertEqual([daemon.hear() for _ in range(3)], ["WATCHDOG=1"] * 3)
            self.assertEqual(daemon.stop(), 0)
            self.assertEqual(next(said for said in iter(daemon.hear, "") if said != "WATCHDOG=1"), "STOPPING=1")

    def test_no_heartbeat_that_nobody_waits_for(self) -> None:
        for environ in ({}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}):
            with self.subTest(environ), Managed(environ=environ) as daemon:
                daemon.start()
                self.assertEqual(daemon.stop(), 0)
                self.assertEqual([daemon.hear(), daemon.hear()], ["READY=1", "STOPPING=1"])

    @unittest.skipUnless(sys.platform == "linux", "only Linux has abstract socket names")
    def test_an_abstract_address(self) -> None:
        with Managed() as daemon, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
            notifications.settimeout(DEADLINE_SEC)
            notifications.bind(f"\0wfd-test-{daemon.mark}")
            daemon.environ["NOTIFY_SOCKET"] = f"@wfd-test-{daemon.mark}"
            daemon.start()
            self.assertEqual(notifications.recv(100), b"READY=1")


class PassedSockets(unittest.TestCase):
    def test_a_client_that_came_first_is_served_and_the_socket_outlives_the_daemon(self) -> None:
        with Managed() as daemon:
            daemon.listen(daemon.socket_path)
            file = os.lstat(daemon.socket_path)
            for _ in range(2):
                with daemon.connect() as client:
                    daemon.process = daemon.spawn()
                    hello = client.request("hello", protocol_min=1, protocol_max=1)
                    self.assertEqual((hello["pid"], hello["socket"]), (daemon.process.pid, daemon.socket_path))
                self.assertEqual(daemon.stop(), 0)
                self.assertTrue(os.path.samestat(os.lstat(daemon.socket_path), file))

    def test_the_homes_own_socket_answers_besides_one_elsewhere(self) -> None:
        with Managed() as daemon:
            daemon.listen(f"{daemon.base}/else.where")
            daemon.start()
            assert daemon.process is not None
            for path in (daemon.socket_path, f"{daemon.base}/else.where"):
                self.assertEqual(daemon.pid_at(path), daemon.process.pid)
            daemon.stop()
            self.assertFalse(os.path.lexists(daemon.socket_path))
            self.assertTrue(os.path.lexists(f"{daemon.base}/else.where"))

    def test_a_socket_whose_file_was_removed_is_no_way_in(self) -> None:
        with Managed() as daemon:
            daemon.listen(daemon.socket_path)
            os.unlink(daemon.socket_path)
            daemon.start()

    def test_what_was_meant_for_another_process_is_left_alone(self) -> None:
        with Managed() as daemon:
            daemon.listen(daemon.socket_path)
            daemon.listen_pid = "1"
            file = os.lstat(daemon.socket_path)
            daemon.spawn()
            self.assertEqual(daemon.hear(), "READY=1")
            self.assertFalse(os.path.samestat(os.lstat(daemon.socket_path), file))

    def test_what_is_no_socket_is_refused_in_a_sentence(self) -> None:
        with Managed() as daemon, open(os.devnull, "rb") as file:
            daemon.passed.append(file.fileno())
            self.assertNotEqual(daemon.spawn().wait(DEADLINE_SEC), 0)
            self.assertRegex(daemon.log(), r"\Awfd: a descriptor that was passed is not a socket: .*\n\Z")

    def test_steps_inherit_nothing_of_it(self) -> None:
        names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
        with Managed(environ={"WATCHDOG_USEC": "60000000"}) as daemon:
            daemon.listen(daemon.socket_path)
            daemon.start()
            # Also not where the submitter is itself a service. `ls` sees its own descriptor of the directory.
            run_id = daemon.submit(step("names", "env"), step("files", "ls /dev/fd"), environment=dict.fromkeys(names, "1"))
            daemon.wait_for(run_id, "SUCCEEDED")
            seen = {line.partition("=")[0] for line in daemon.output(run_id, "names").splitlines()}
            self.assertIn("WFD_RUN_ID", seen)
            self.assertFalse(seen.intersection(names))
            self.assertEqual(daemon.output(run_id, "files").split(), ["0", "1", "2", "3"])


def begin(daemon: Daemon) -> str:
    """A run with a step that is running, until `finish` lets it go by the pipe that it reads from."""
    os.mkfifo(f"{daemon.directory}/go")
    params = daemon.submission(step("held", "echo x >>begun; read -r line <go; exit 7"))
    with daemon.connect() as client:
        client.request("submit", **params)
    daemon.wait_for_file("begun")
    return str(params["run_id"])


def finish(test: unittest.TestCase, daemon: Daemon, run_id: str) -> None:
    """Let the step go. It must have been adopted once: its first attempt ends, with its own exit status."""

    def open_pipe() -> int:
        # Without O_NONBLOCK this would wait without end for a step that is not there any more.
        with suppress(OSError):
            return os.open(f"{daemon.directory}/go", os.O_WRONLY | os.O_NONBLOCK)
        return 0

    pipe = wait_until(open_pipe, "the step to read from its pipe", daemon.explain)
    os.write(pipe, b"\n")
    os.close(pipe)
    test.assertEqual(daemon.wait_for(run_id).state, "FAILED")
    daemon.wait_for_event(run_id, "attempt_exited", attempt=1, exit_code=7)
    test.assertEqual(daemon.names(run_id).count("supervisor_started"), 2)
    test.assertEqual(daemon.read("begun"), "x\n")


class Replacement(unittest.TestCase):
    """A service takes over from the daemon that a client had started."""

    def replace(self, daemon: Daemon) -> None:
        """Start a second daemon with --replace: the first ends well, and the second answers."""
        first, daemon.process = daemon.process, None
        assert first is not None
        daemon.start("--replace")
        self.assertEqual(first.wait(DEADLINE_SEC), 0)

    def test_it_asks_the_other_to_end_and_adopts_its_steps(self) -> None:
        with Daemon() as daemon:
            run_id = begin(daemon)
            self.replace(daemon)
            finish(self, daemon, run_id)

    @unittest.skipUnless(sys.platform == "linux", "sockets are passed by systemd only")
    def test_also_when_the_manager_has_taken_the_socket_away_from_the_other(self) -> None:
        with Managed() as daemon:
            daemon.start()
            run_id = begin(daemon)
            daemon.listen(daemon.socket_path)
            file = os.lstat(daemon.socket_path)
            self.replace(daemon)
            # The first has not removed, when it ended, what is not its own.
            self.assertTrue(os.path.samestat(os.lstat(daemon.socket_path), file))
            finish(self, daemon, run_id)

    @unittest.skipUnless(sys.platform == "linux", "sockets are passed by systemd only")
    def test_only_who_holds_the_lock_is_ended(self) -> None:
        """The pid in a lock file may be a stranger's by now."""
        hold = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
        with tempfile.NamedTemporaryFile() as lock, tempfile.NamedTemporaryFile() as other:
            for held, expected in ((other, 0), (lock, -signal.SIGTERM)):
                with (
                    self.subTest(expected),
                    subprocess.Popen(
                        [sys.executable, "-ISc", hold, held.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                    ) as holder,
                ):
                    assert holder.stdout is not None
                    holder.stdout.readline()
                    machine.terminate_lock_owner(holder.pid, lock.name)
                    holder.communicate(b"\n")
                    self.assertEqual(holder.returncode, expected)


class BesideSystemd(unittest.TestCase):
    @unittest.skipUnless(os.path.exists(RIG) and shutil.which("systemctl"), "there is no rig here, or no systemd")
    @unittest.skipUnless(os.geteuid() == 0, "the rig needs root")
    def test_the_units_do_what_they_promise(self) -> None:
        # Its own session, so that a rig that hangs is ended whole.
        rig = subprocess.Popen(
            [RIG, f"{ROOT}/systemd", sys.executable, "-m", "unittest", "tests.rig_services"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = rig.communicate(timeout=3 * DEADLINE_SEC)
        finally:
            if rig.poll() is None:
                os.killpg(rig.pid, signal.SIGKILL)
                rig.communicate()
        self.assertEqual(rig.returncode, 0, said)


if __name__ == "__main__":
    unittest.main()
