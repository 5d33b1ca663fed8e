"""Simulated histories in short form, and whether the simulated machine is one.

The long forms: `python -m tests.simulation --seed N --count M`, and `--exhaustive`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from tests import simulation
from tests.simulated_disk import Chance, Directory, Disk, File
from tests.simulated_history import simulate
from tests.simulated_kernel import Kernel, Plan
from tests.simulated_os import installed
from wfd import machine, process
from wfd.paths import Home
from wfd.process import Attempt, Launch

_ROOT = Path(__file__).parent.parent


class Histories(unittest.TestCase):
    """No promise is broken, whatever dies."""

    def test_random_histories(self) -> None:
        for seed in range(400):
            report = simulate(seed)
            self.assertEqual(report.problem, "", f"python -m tests.simulation --seed {seed} --verbose")

    def test_every_crash_of_the_smallest_workflows(self) -> None:
        for script in simulation.small_scripts(1):
            for crashed, report in simulation.crashed(script, is_twice=False):
                self.assertEqual(report.problem, "", crashed)
                self.assertEqual(report.crashes, 1, f"{crashed} was to crash")

    def test_the_seed_is_the_whole_history(self) -> None:
        program = "from tests.simulated_history import simulate; print([simulate(seed).digest for seed in range(8)])"
        expected = f"{[simulate(seed).digest for seed in range(8)]}\n"
        for hash_seed in ("1", "2"):
            environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
            command = [sys.executable, "-c", program]
            answer = subprocess.run(command, cwd=_ROOT, env=environ, capture_output=True, text=True, check=True)
            self.assertEqual(answer.stdout, expected)

    def test_histories_are_rich(self) -> None:
        """Whatever is to be survived does occur: else a simulator that does nothing would be content."""
        seen: dict[str, int] = dict.fromkeys(_WANTED, 0)
        for seed in range(400):
            trace = "\n".join(simulate(seed, is_traced=True).trace)
            for text in seen:
                seen[text] += text in trace
        self.assertEqual([text for text, count in seen.items() if count == 0], [])


_WANTED = (
    "=== killed", "=== power cut", "fsync fails", "the disk is full", "simulated EMFILE", "simulated EAGAIN",
    "simulated ENOSPC", "the wall clock jumps", " rots", "is quarantined", "is stalled",
    "run_retried", "run_timed_out", "attempt_timed_out", "could not start another process",
    "attempt_lost step=a attempt=1 why=killed", "reason=lost delay_ms",
    "attempt_lost step=a attempt=1 why=rebooted", "why=never_began", "why=stopped", "why=cwd", "why=exec",
    "step_skipped", "step_cancelled", "log_recovered dropped_bytes=0", "kept_as=torn-", "state=SUCCEEDED",
    "state=FAILED", "state=CANCELLED", "events.ndjson.new",
)  # fmt: skip


class SimulatedDisks(unittest.TestCase):
    """What the checks of durability rest on."""

    def test_only_what_was_synced_is_sure_to_survive(self) -> None:
        left = {self._left(seed, is_synced=False) for seed in range(200)}
        self.assertTrue({b"old", b"old, new", b"old, n", None} <= left, left)
        self.assertEqual({self._left(seed, is_synced=True) for seed in range(200)}, {b"old, new"})

    def _left(self, seed: int, is_synced: bool) -> bytes | None:
        disk, file = Disk(), File()
        disk.root.change(("f", file))
        disk.append(file, b"old")
        file.sync()
        if is_synced:
            disk.root.sync()
        disk.append(file, b", new")
        if is_synced:
            file.sync()
        disk.cut_power(Chance(seed))
        found = disk.find("/f")
        return bytes(found.data) if isinstance(found, File) else None

    def test_a_name_is_nothing_without_its_inode(self) -> None:
        found = set()
        for seed in range(100):
            disk = Disk()
            disk.root.change(("f", File()))
            disk.root.sync()
            self.assertIsNone(disk.find_durable("/f"))
            disk.cut_power(Chance(seed))
            found.add(disk.find("/f") is None)
        self.assertEqual(found, {False, True})

    def test_a_rename_survives_whole_or_not_at_all(self) -> None:
        for seed in range(100):
            disk = Disk()
            for name in ("new", "log"):
                file = File()
                file.sync()
                disk.root.change((name, file))
            disk.root.sync()
            disk.rename("/new", "/log")
            disk.cut_power(Chance(seed))
            self.assertIn(sorted(disk.root.names), (["log"], ["log", "new"]))

    def test_after_a_failed_fsync_the_next_one_lies(self) -> None:
        left = set()
        for seed in range(100):
            disk, file = Disk(), File()
            file.sync()
            disk.root.change(("f", file))
            disk.root.sync()
            disk.append(file, b"x" * 9)
            file.fail_to_sync(Chance(seed))
            file.sync()
            self.assertEqual(bytes(file.data), b"x" * 9, "everybody reads it")
            disk.cut_power(Chance(seed))
            left.add(bytes(file.data))
        self.assertIn(b"", left)

    def test_a_full_disk_takes_what_fits_into_the_last_block(self) -> None:
        disk, file = Disk(), File()
        disk.append(file, b"x" * 500)
        disk.free = 0
        self.assertEqual(disk.append(file, b"y" * 20), 12)
        disk.free = 1
        self.assertEqual(disk.append(file, b"y" * 1000), 512)

    def test_directories_hold_directories(self) -> None:
        disk = Disk()
        disk.make_directory("/a")
        disk.make_directory("/a/b")
        self.assertIsInstance(disk.find("/a/b"), Directory)
        disk.rename("/a", "/c")
        self.assertIsNone(disk.find("/a/b"))
        self.assertIsInstance(disk.find("/c/b"), Directory)


class SimulatedProcesses(unittest.TestCase):
    """The same little plays, with real shells and without: process.py must see the same."""

    def test_like_real_ones(self) -> None:
        for is_child in (True, False):
            for name, plan, command, act, expected in _PLAYS:
                with self.subTest(name, is_child=is_child):
                    real = self._perform(_RealStage(), plan, command, act, is_child)
                    simulated = self._perform(_SimulatedStage(), plan, command, act, is_child)
                    self.assertEqual(simulated, real)
                    self.assertEqual(real[1:4], expected)

    def _perform(
        self, stage: _Stage, plan: Plan, command: str, act: str, is_child: bool
    ) -> tuple[tuple[bool, bool, bool], str, int | None, str, int | None]:
        """What was seen of the attempt while it lived; its outcome; how its shim, as a child, ended."""
        with stage:
            launch = stage.launch(plan, command)
            pid = process.start(launch)
            assert isinstance(pid, int)
            attempt = Attempt(1, launch.files, _MARKS, pid, 0, is_child)
            stage.until(lambda: stage.is_ready() or bool(process.next_dead_child()))
            status = process.probe(launch.files)
            alive = (status.held, status.exists, status.pid == pid) if act else (False, True, True)
            if act == "kill shim":
                stage.kill_shim(pid)
            elif act:
                for number in (signal.SIGTERM, signal.SIGKILL)[: 2 if act == "kill" else 1]:
                    self.assertTrue(attempt.signal(number))
            stage.until(lambda: process.next_dead_child() == pid)
            exit = None
            if is_child:
                process.signal_group(pid, signal.SIGKILL)
                exit = process.reap(pid)
                assert exit is not None
                attempt.reaped(exit, 0)
            stage.until(lambda: attempt.look(0, in_grace=False) is None)
            attempt.settle(is_ending=act in ("term", "kill"), rebooted=False)
            outcome = attempt.outcome
            assert outcome is not None
            stage.until(lambda: not stage.has_members(pid))
            if exit is None:
                process.reap(pid)
            return alive, outcome.kind, outcome.exit_code, outcome.why, None if exit is None else exit.code


_MARKS = process.markers("w", "r1", "a", 1)
_READY = 'echo > "$READY"; '
# (name, simulated, real, what is done to it, its outcome)
_PLAYS: list[tuple[str, Plan, str, str, tuple[str, int | None, str]]] = [
    ("succeeds", Plan(), "true", "", ("exited", 0, "")),
    ("fails", Plan(exit_code=3), "exit 3", "", ("exited", 3, "")),
    ("has no directory", Plan(error="cwd"), "true", "", ("not_started", None, "cwd")),
    ("leaves a survivor", Plan(survivor="ignores"), "(trap '' TERM; exec sleep 99) & exit 0", "", ("exited", 0, "")),
    ("dies of TERM", Plan(run_ms=None), _READY + "exec sleep 99", "term", ("exited", 143, "")),
    ("exits 0 on TERM", Plan(run_ms=None, on_term="zero"), f"trap 'exit 0' TERM; {_READY} sleep 99 & wait", "term",
     ("exited", 0, "")),
    ("is killed", Plan(run_ms=None, on_term="ignores"), f"trap '' TERM; {_READY} exec sleep 99", "kill",
     ("exited", None, "")),
    ("loses its shim", Plan(run_ms=None), _READY + "exec sleep 99", "kill shim", ("lost", None, "killed")),
]  # fmt: skip


class _Stage(AbstractContextManager["_Stage"]):
    """Where a play is performed."""

    directory: str
    environ: dict[bytes, bytes]

    def launch(self, plan: Plan, command: str) -> Launch:
        files = Home(self.directory).run("r1").attempt(1, "a", 1)
        cwd = "/nowhere/at/all" if plan.error == "cwd" else "/"
        return Launch(files, command, cwd, 0o22, "", {**self.environ, **_MARKS})

    def until(self, condition: Callable[[], bool]) -> None:
        raise NotImplementedError

    def is_ready(self) -> bool:
        raise NotImplementedError

    def kill_shim(self, pid: int) -> None:
        raise NotImplementedError

    def has_members(self, group: int) -> bool:
        raise NotImplementedError


class _RealStage(_Stage):
    def __enter__(self) -> _RealStage:
        self._stack = ExitStack()
        # As the daemon does: a status file that is fd 9 itself would be closed by the exec of its shim.
        while (fd := os.open(os.devnull, os.O_RDONLY)) <= 9:
            self._stack.callback(os.close, fd)
        os.close(fd)
        self.directory = self._stack.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(Home(self.directory).run("r1").attempts)
        self._ready = f"{self.directory}/ready"
        self.environ = {b"PATH": os.defpath.encode(), b"READY": self._ready.encode()}
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError("it did not come to pass")
            time.sleep(0.002)

    def is_ready(self) -> bool:
        return os.path.exists(self._ready)

    def kill_shim(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def has_members(self, group: int) -> bool:
        return bool(machine.group_members(group))


class _SimulatedStage(_Stage):
    def __enter__(self) -> _SimulatedStage:
        self.directory, self.environ = "/home/wfd", {}
        kernel = self._kernel = Kernel(Chance(1))
        for path in ("/home", "/home/wfd", "/home/wfd/runs", "/home/wfd/runs/r1", "/home/wfd/runs/r1/attempts"):
            kernel.disk.make_directory(path)
        self._stack = ExitStack()
        self._stack.enter_context(installed(kernel))
        kernel.start_daemon()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def launch(self, plan: Plan, command: str) -> Launch:
        self._kernel.plan_of = lambda key: plan
        return super().launch(plan, command)

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1_000):
            if condition():
                return
            self._kernel.happen(self._kernel.now_ms + 5)
        raise AssertionError("it did not come to pass")

    def is_ready(self) -> bool:
        return self._kernel.attempts["r1", "a", 1].has_begun

    def kill_shim(self, pid: int) -> None:
        self._kernel.kill_shim(self._kernel.attempts["r1", "a", 1])

    def has_members(self, group: int) -> bool:
        return any(not member.is_zombie for member in self._kernel.members(group))


if __name__ == "__main__":
    unittest.main()
