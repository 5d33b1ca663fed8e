"""P8: what the system may refuse. Nothing new starts, live steps are left alone, the state says why, and the work goes on
by itself when the fault is gone.

The limits are real ones: a small tmpfs that is full, resource limits set on the running daemon, errors that strace puts in
the place of a system call's result. What a machine does not offer is skipped, with the reason.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.daemon import ROOT, Client, Daemon, Refused, others_may_enter, prlimit, step, until, wait_until
from wfd import process, protocol
from wfd.paths import Home
from wfd.supervisor import RESERVE_BYTES

COUNT = 'echo x >> "ran.$WFD_STEP_ID"; '
HANGS = "echo began; exec sleep 600"
# Enough for the reserve, a few logs, and a page for each of two files of some tens of attempts.
DISK_BYTES = 4 << 20
# A uid of nobody, so that a limit on its processes counts ours alone; nor that of another run of the tests at this moment.
OTHER_UID = 10_000 + os.getpid() % 50_000
# What is stalled is tried again after a second. Where the fault stays until the test has seen it, sooner will do.
HASTY = "import sys; from wfd import supervisor; supervisor.RETRY_MS = 100; from wfd.__main__ import main; "
# A daemon that may open so many descriptors.
LIMITED = (
    HASTY + "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0})); sys.exit(main())"
)

linux_only = unittest.skipUnless(sys.platform == "linux", "sets limits of another process, as only Linux can")


def ran(daemon: Daemon, step_id: str) -> int:
    return daemon.read(f"ran.{step_id}").count("x")


def wait_for_stall(daemon: Daemon, run_id: str, why: str) -> None:
    """Until the run's status says that it is stalled, and why."""

    def is_stalled() -> bool:
        status = daemon.request("status", run_id=run_id)
        assert status["finished_at"] is None, f"it is over, and never stalled: {status}"
        return why in str(status["stalled"])

    wait_until(is_stalled, f"a stall: {why}", daemon.explain)


def wait_until_it_goes_on(daemon: Daemon, run_id: str) -> None:
    wait_until(lambda: daemon.request("status", run_id=run_id)["stalled"] is None, "no stall", daemon.explain)


class Hasty(Daemon):
    program: tuple[str, ...] = ("-S", "-c", HASTY + "sys.exit(main())")


class Gate:
    """A pipe that steps wait at, however many, without turning; each takes one line."""

    def __init__(self, directory: str, name: str = "gate") -> None:
        self.path = f"{directory}/{name}"
        self.command = f"read -r line < {name}; "
        os.mkfifo(self.path)
        # Open for both: no step waits in its open, and none sees the end.
        self._fd = os.open(self.path, os.O_RDWR)

    def open(self, count: int) -> None:
        os.write(self._fd, b"\n" * count)

    def close(self) -> None:
        os.close(self._fd)


class FullDisk(unittest.TestCase):
    """The home on a small file system of its own."""

    def setUp(self) -> None:
        if os.geteuid() != 0 or platform.system() != "Linux":
            self.skipTest("mounts a tmpfs, as only root on Linux can")
        self.mount = tempfile.mkdtemp(prefix="wfd-test-")
        self.addCleanup(os.rmdir, self.mount)
        options = f"size={DISK_BYTES},mode=0700"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.mount], capture_output=True)
        if mounted.returncode != 0:
            self.skipTest(f"tmpfs cannot be mounted here: {mounted.stderr.decode()}")
        self.addCleanup(subprocess.run, ["umount", "-l", self.mount], check=True)
        self.daemon = Hasty()
        self.daemon.home = Home(f"{self.mount}/home")
        self.daemon.environ["WFD_HOME"] = self.daemon.home.directory
        self.enterContext(self.daemon)
        self.gate = Gate(self.daemon.directory)
        self.addCleanup(self.gate.close)

    def fill(self) -> None:
        with open(f"{self.mount}/filler", "ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0" * 4096)

    def free(self) -> None:
        os.unlink(f"{self.mount}/filler")

    def submit_waiting(self, count: int, **fields: Any) -> str:
        """A run with so many live steps at the gate: their ends are more than the rest of the log's last page takes."""
        steps = [step(f"s{number}", COUNT + "echo began; " + self.gate.command, **fields) for number in range(count)]
        run_id = self.daemon.submit(*steps, step("next", COUNT, "s0"))
        wait_until(lambda: all(ran(self.daemon, f"s{number}") for number in range(count)), "all at the gate")
        return run_id

    def test_work_goes_on_when_there_is_room_again(self) -> None:
        daemon, count = self.daemon, 30
        run_id = self.submit_waiting(count)
        self.fill()
        before = daemon.events(run_id)
        self.gate.open(count)
        wait_for_stall(daemon, run_id, "No space left")
        for number in range(count):
            files = daemon.home.run(run_id).attempt(number + 1, f"s{number}", 1)
            wait_until(lambda files=files: process.probe(files).exit_code == 0, "an exit status on the full disk")  # type: ignore[misc]
        with self.assertRaises(Refused) as refused:
            daemon.submit(step("a", "true"))
        self.assertEqual(refused.exception.code, protocol.STALLED)
        self.assertEqual(ran(daemon, "next"), 0)
        self.assertEqual(daemon.events(run_id)[: len(before)], before)
        self.free()
        run = daemon.wait_for(run_id)
        self.assertEqual((run.state, {record.attempt for record in run.steps}), ("SUCCEEDED", {1}))
        self.assertEqual({ran(daemon, record.step.id) for record in run.steps}, {1})
        self.assertEqual(os.listdir(daemon.home.runs), [run_id], "something is left of the run that was refused")

    def test_live_steps_end_undisturbed(self) -> None:
        """One ends in the middle of it, one lives through it: neither is touched, and how they ended is recorded after."""
        daemon, count = self.daemon, 30
        through = Gate(daemon.directory, "through")
        self.addCleanup(through.close)
        crowd = self.submit_waiting(count)
        commands = {"within": COUNT + self.gate.command + "exit 3", "through": COUNT + through.command + "exit 5"}
        run_id = daemon.submit(*(step(name, command) for name, command in commands.items()))
        wait_until(lambda: all(ran(daemon, name) for name in commands), "both")
        self.fill()
        self.gate.open(count + 1)
        wait_for_stall(daemon, crowd, "No space left")
        self.assertEqual(daemon.states(run_id)["through"], "RUNNING")
        self.assertTrue(daemon.processes(run_id))
        self.free()
        wait_until_it_goes_on(daemon, crowd)
        through.open(1)
        run = daemon.wait_for(run_id)
        ends = {record.step.id: (record.state.value, record.attempt, record.exit_code) for record in run.steps}
        self.assertEqual(ends, {"within": ("FAILED", 1, 3), "through": ("FAILED", 1, 5)})
        self.assertEqual([ran(daemon, name) for name in commands], [1, 1])
        self.assertEqual(daemon.wait_for(crowd).state, "SUCCEEDED")

    def test_cancel_works(self) -> None:
        daemon, count = self.daemon, 30
        run_id = self.submit_waiting(count, grace_sec=300)
        self.fill()
        self.gate.open(count - 1)
        wait_for_stall(daemon, run_id, "No space left")
        self.assertEqual(daemon.request("cancel", run_id=run_id, request="x")["state"], "CANCELLING")
        self.assertEqual(daemon.wait_for(run_id).state, "CANCELLED")
        self.assertTrue(os.path.exists(f"{self.mount}/filler"))
        self.free()
        daemon.wait_for(daemon.submit(step("a", "true")))
        self.assertEqual(os.path.getsize(daemon.home.reserve), RESERVE_BYTES)

    def test_the_reserve_is_back_when_there_is_room(self) -> None:
        daemon, count = self.daemon, 30
        cancelled, other = (self.submit_waiting(count, grace_sec=300) for _ in range(2))
        self.fill()
        self.gate.open(2 * count - 1)
        for run_id in (cancelled, other):
            wait_for_stall(daemon, run_id, "No space left")
        daemon.request("cancel", run_id=cancelled, request="x")
        daemon.wait_for(cancelled)
        self.assertFalse(os.path.exists(daemon.home.reserve))
        self.free()
        wait_until_it_goes_on(daemon, other)
        wait_until(lambda: os.path.exists(daemon.home.reserve), "the reserve")

    def test_cancel_works_without_a_daemon_too(self) -> None:
        """A daemon starts on a full disk, and finds the room to take the run over."""
        daemon, count = self.daemon, 3
        run_id = self.submit_waiting(count, grace_sec=300)
        daemon.kill()
        self.fill()
        daemon.start()
        self.assertIn(run_id, daemon.log())
        self.assertIn("cannot be taken over yet: No space left", daemon.log())
        self.assertEqual(daemon.request("cancel", run_id=run_id, request="x")["state"], "CANCELLING")
        self.assertEqual(daemon.wait_for(run_id).state, "CANCELLED")

    def test_a_take_over_waits_for_room(self) -> None:
        daemon, count = self.daemon, 3
        run_id = self.submit_waiting(count)
        daemon.kill()
        self.fill()
        daemon.start()
        with self.assertRaises(Refused) as refused:
            daemon.request("status", run_id=run_id)
        self.assertEqual(refused.exception.code, protocol.STALLED)
        self.assert_told(run_id)
        self.gate.open(count)
        self.free()
        self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
        self.assertEqual({ran(daemon, f"s{number}") for number in range(count)}, {1})

    def assert_told(self, run_id: str) -> None:
        """The state comes from the log, with the reason why it does not change; and whoever waits goes on waiting."""
        said = self.ask("status", run_id, "--json")
        told = json.loads(said.stdout)
        self.assertEqual((said.returncode, told["state"], told["source"]), (0, "RUNNING", "log"))
        self.assertIn("No space left", told["stalled"])
        [row] = json.loads(self.ask("list", "--json").stdout)["runs"]
        self.assertEqual(row["stalled"], "the daemon could not take it over yet")
        waited = self.ask("wait", run_id, "--timeout", "1")
        self.assertEqual(waited.returncode, 124)
        self.assertEqual(waited.stderr.count("No space left"), 1, waited.stderr)

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"{ROOT}/workflow.py", *arguments]
        return subprocess.run(command, env=self.daemon.environ, capture_output=True, text=True, timeout=60)


SOFT_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from wfd.__main__ import main
sys.exit(main())
"""


@linux_only
class Limits(unittest.TestCase):
    """Limits of the daemon, lowered and raised while it runs."""

    def setUp(self) -> None:
        self.daemon = self.enterContext(Hasty())
        self.gate = Gate(self.daemon.directory)
        self.addCleanup(self.gate.close)

    @contextmanager
    def limited(self, which: int, soft: int) -> Iterator[None]:
        assert self.daemon.process is not None
        before = prlimit(self.daemon.process.pid, which)
        prlimit(self.daemon.process.pid, which, (soft, before[1]))
        try:
            yield
        finally:
            prlimit(self.daemon.process.pid, which, before)

    def submit_waiting(self) -> str:
        run_id = self.daemon.submit(step("a", COUNT + self.gate.command), step("b", COUNT, "a"))
        wait_until(lambda: ran(self.daemon, "a"), "a")
        return run_id

    def test_file_size(self) -> None:
        daemon, run_id = self.daemon, self.submit_waiting()
        size = os.path.getsize(daemon.home.run(run_id).events)
        with self.limited(resource.RLIMIT_FSIZE, size + 50):
            self.gate.open(1)
            wait_for_stall(daemon, run_id, "File too large")
            self.assertEqual(os.path.getsize(daemon.home.run(run_id).events), size, "half a batch is left")
        self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
        self.assertEqual([ran(daemon, name) for name in "ab"], [1, 1])

    def test_the_soft_limits_of_whoever_started_it_are_not_kept(self) -> None:
        daemon = self.daemon
        daemon.stop()
        daemon.program = ("-c", SOFT_LIMITED)
        daemon.start()
        assert daemon.process is not None
        soft, hard = prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
        self.assertEqual(soft, hard)
        self.assertEqual(daemon.wait_for(daemon.submit(step("a", "true"))).state, "SUCCEEDED")

    def test_descriptors(self) -> None:
        daemon, run_id = self.daemon, self.submit_waiting()
        daemon.request("list")
        with self.limited(resource.RLIMIT_NOFILE, self.used()):
            self.gate.open(1)
            wait_for_stall(daemon, run_id, "Too many open files")
            with self.assertRaises(Refused):
                daemon.submit(step("a", "true"))
        self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
        self.assertEqual([ran(daemon, name) for name in "ab"], [1, 1])

    def test_descriptors_at_a_start(self) -> None:
        """Runs that cannot be taken over are taken over when others have ended."""
        daemon = self.daemon
        runs = [self.submit_waiting()] + [daemon.submit(step("c", COUNT + self.gate.command)) for _ in range(5)]
        wait_until(lambda: ran(daemon, "c") == 5, "the others")
        limit = self.used() - 3
        daemon.kill()
        daemon.program = ("-c", LIMITED.format(limit))
        daemon.process = daemon.spawn()
        wait_until(lambda: "cannot be taken over yet: Too many open files" in daemon.log(), "a shortage", daemon.explain)
        self.gate.open(len(runs))
        self.assertEqual({daemon.wait_for(run_id).state for run_id in runs}, {"SUCCEEDED"})
        self.assertEqual([ran(daemon, name) for name in "abc"], [1, 1, 5])

    def used(self) -> int:
        """As many descriptors as the daemon has open, it has below this one."""
        assert self.daemon.process is not None
        return 1 + max(int(name) for name in os.listdir(f"/proc/{self.daemon.process.pid}/fd"))


class OtherUser(Daemon):
    """A daemon of another uid. It hears only its own, so our connections are made as that uid."""

    # What it may import later lies perhaps where only we can read.
    program = (
        "-S",
        "-c",
        f"import encodings.ascii, os, shutil; {HASTY}"
        f"os.setgroups([]); os.setgid({OTHER_UID}); os.setuid({OTHER_UID}); sys.exit(main())",
    )

    def __init__(self) -> None:
        super().__init__()
        for path in (self.base, self.directory, f"{self.base}/run"):
            os.chown(path, OTHER_UID, OTHER_UID)

    def connect(self) -> Client:
        os.seteuid(OTHER_UID)
        try:
            return super().connect()
        finally:
            os.seteuid(0)

    def limit(self, spare: int) -> None:
        """So many processes more than there are may be started."""
        assert self.process is not None
        # Only who has its uid may set it, and raise it again up to the hard limit.
        arguments = ["prlimit", "--pid", str(self.process.pid), f"--nproc={self._count() + spare}:"]
        subprocess.run(arguments, user=OTHER_UID, group=OTHER_UID, extra_groups=[], check=True)

    def _count(self) -> int:
        """How many processes the uid has."""
        found = 0
        for name in os.listdir("/proc"):
            with suppress(OSError):
                if name.isdigit():
                    with open(f"/proc/{name}/status", encoding="utf-8") as file:
                        found += f"\nUid:\t{OTHER_UID}\t" in file.read()
        return found


@unittest.skipUnless(shutil.which("prlimit"), "prlimit sets the limit; it is not installed")
class NoMoreProcesses(unittest.TestCase):
    """fork answers EAGAIN, to the daemon or to the shim that it has just managed to spawn."""

    MANY = 1_000

    def setUp(self) -> None:
        if os.geteuid() != 0 or platform.system() != "Linux":
            self.skipTest("limits the processes of another uid, as only root on Linux can")
        if not others_may_enter(tempfile.gettempdir()):
            self.skipTest("another uid cannot reach the directory for temporary files")
        self.daemon = OtherUser()
        self.enterContext(self.daemon)
        self.live = self.daemon.submit(step("live", HANGS, grace_sec=300))
        files = self.daemon.home.run(self.live).attempt(1, "live", 1)
        wait_until(lambda: os.path.exists(files.out) and os.path.getsize(files.out), "the live step")
        self.alive = self.daemon.processes(self.live)

    def tearDown(self) -> None:
        self.assertEqual(self.daemon.processes(self.live), self.alive, "a live step was touched")
        self.daemon.request("cancel", run_id=self.live, request="end")
        self.daemon.wait_for(self.live)

    def assert_stalls_and_goes_on(self, spare: int, why: str) -> None:
        daemon = self.daemon
        daemon.limit(spare)
        run_id = daemon.submit(step("a", COUNT, retries=0), step("b", COUNT, "a"))
        wait_for_stall(daemon, run_id, why)
        self.assertEqual(daemon.states(run_id), {"a": "RUNNING", "b": "PENDING"})
        daemon.limit(self.MANY)
        run = daemon.wait_for(run_id)
        self.assertEqual((run.state, run.steps[0].attempt), ("SUCCEEDED", 1))
        self.assertEqual((ran(daemon, "a"), ran(daemon, "b")), (1, 1))

    def test_for_the_shim(self) -> None:
        self.assert_stalls_and_goes_on(0, "step 'a' cannot be started: Resource temporarily unavailable")

    def test_for_the_command(self) -> None:
        self.assert_stalls_and_goes_on(1, "step 'a' cannot be started: its shell could not start another process")

    def test_cancel_of_a_stalled_run(self) -> None:
        daemon = self.daemon
        daemon.limit(0)
        run_id = daemon.submit(step("a", COUNT), step("b", COUNT, "a"))
        wait_for_stall(daemon, run_id, "cannot be started")
        self.assertEqual(daemon.request("cancel", run_id=run_id, request="x")["state"], "CANCELLING")
        self.assertEqual(daemon.wait_for(run_id).state, "CANCELLED")
        daemon.limit(self.MANY)
        self.assertEqual(ran(daemon, "a"), 0)


@unittest.skipUnless(shutil.which("strace"), "strace puts the errors in; it is not installed")
class SyncFails(unittest.TestCase):
    """After a failed fsync a second one succeeds while the data is gone: only a new inode helps."""

    def test_a_new_inode_and_nothing_lost(self) -> None:
        with Daemon() as daemon:
            gate = Gate(daemon.directory)
            self.addCleanup(gate.close)
            run_id = daemon.submit(step("a", COUNT + gate.command), step("b", COUNT, "a"))
            wait_until(lambda: ran(daemon, "a"), "a")
            path = daemon.home.run(run_id).events
            before = daemon.events(run_id)
            inode = os.stat(path).st_ino
            # The sync of the batch, then that of its copy in the new inode.
            with self.injected(daemon, "fsync:error=EIO:when=1..2"):
                gate.open(1)
                wait_for_stall(daemon, run_id, "Input/output error")
                self.assertEqual(daemon.events(run_id), before, "a reader is shown what nobody was promised")
                self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            self.assertNotEqual(os.stat(path).st_ino, inode)
            self.assertEqual(daemon.events(run_id)[: len(before)], before)
            self.assertEqual([ran(daemon, name) for name in "ab"], [1, 1])

    @contextmanager
    def injected(self, daemon: Daemon, fault: str) -> Iterator[None]:
        """This fault in the running daemon."""
        assert daemon.process is not None
        trace = ["strace", "-p", str(daemon.process.pid), "-e", f"trace={fault.split(':')[0]}", "-e", f"inject={fault}"]
        with subprocess.Popen(trace, stderr=subprocess.PIPE) as tracer:
            assert tracer.stderr is not None
            try:
                if b"attached" not in (said := tracer.stderr.readline()):
                    daemon.request("cancel", run_id=daemon.run_ids()[0], request="skipped")
                    self.skipTest(f"strace may not trace here: {said.decode()}")
                yield
            finally:
                tracer.send_signal(signal.SIGINT)
                tracer.communicate()


class Output(unittest.TestCase):
    """A step that prints without measure: its output is held to the limit while it lives, and when it has ended."""

    # Prints, goes on when that was cut, and prints again. Who is never cut gives up.
    PRINTS = (
        "import os, sys, time\n"
        "for _ in range({mebibytes}): os.write(1, bytes(1 << 20))\n"
        "for _ in range(2000):\n"
        "    time.sleep(0.01)\n"
        "    if os.fstat(1).st_size <= {limit}: break\n"
        "else: sys.exit(1)\n"
        "for _ in range({mebibytes}): os.write(1, bytes(1 << 20))"
    )
    CODE = PRINTS.format(mebibytes=(process.OUTPUT_LIMIT_BYTES >> 20) + 4, limit=process.OUTPUT_LIMIT_BYTES)
    COMMAND = COUNT + f'exec "{sys.executable}" -S -c "{CODE}"'

    def size(self, daemon: Daemon, run_id: str) -> int:
        return os.path.getsize(daemon.home.run(run_id).attempt(1, "a", 1).out)

    def test_is_cut_while_it_lives_and_when_it_has_ended(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", self.COMMAND))
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            self.assertEqual((self.size(daemon, run_id), ran(daemon, "a")), (process.OUTPUT_LIMIT_BYTES, 1))
            self.assertEqual(daemon.log().count("the output was cut"), 1, "said more than once")

    def test_of_a_step_that_was_adopted_too(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", until("go") + "; " + self.COMMAND))
            wait_until(lambda: daemon.processes(run_id), "a")
            daemon.restart()
            daemon.touch("go")
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")


class CannotStart(unittest.TestCase):
    """What no waiting mends fails the attempt, with the reason."""

    def test_reasons(self) -> None:
        too_long = "the command and its environment are too long"
        cases: dict[str, tuple[dict[str, Any], str, str]] = {
            "cwd": ({"cwd": "/nonexistent/directory"}, "cwd", "the working directory cannot be entered"),
            "environment": ({"env": {f"BIG_{number}": "x" * 120_000 for number in range(60)}}, "exec", too_long),
        }
        with Daemon() as daemon:
            fields: dict[str, Any] = {"retries": 1, "backoff": {"initial_sec": 0}}
            run_id = daemon.submit(
                *(step(name, COUNT, **fields, **extra) for name, (extra, _, _) in cases.items()),
                step("long", COUNT + ": " + "x" * 150_000),
                step("after", COUNT, "cwd"),
            )
            run = daemon.wait_for(run_id)
            self.assertEqual([record.state for record in run.steps], ["FAILED", "FAILED", "SUCCEEDED", "SKIPPED"])
            for record, (_, why, detail) in zip(run.steps, cases.values(), strict=False):
                self.assertEqual((record.attempt, record.reason), (2, "not_started"))
                line: Any = daemon.wait_for_event(run_id, "attempt_not_started", step=record.step.id)
                self.assertEqual((line.event.why, line.event.detail), (why, detail))
            self.assertEqual([ran(daemon, name) for name in (*cases, "long", "after")], [0, 0, 1, 0])


if __name__ == "__main__":
    unittest.main()
