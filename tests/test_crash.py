"""kill -9 of the daemon, of the shims, of the steps; logs that were cut; another boot.

Steps count their executions in files, so that a step that ran twice is seen whatever the log says. They wait for a file
to go on, never for time. Each block of a Daemon ends with a replay of all its logs (daemon.py).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import unittest
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from typing import Any
from unittest import mock

from tests import counted, kills, logs
from tests.daemon import Daemon, Refused, step, wait_until
from tests.loop import LoopTest
from tests.test_orphans import ARE_FOUND
from tests.torn import CutLog, CutStatus, read_log, remove_attempts, status_of, write_log
from wfd import decide, journal, process, protocol, requests, supervisor
from wfd.events import AttemptExited, StepStarted, SupervisorStarted
from wfd.journal import Damaged
from wfd.paths import Home, RunFiles
from wfd.state import Run

COUNT = 'echo x >> "ran.$WFD_STEP_ID"; '
# Which process of an attempt is which: the shim leads the group, the command is its child.
KILL_SHIM = 'kill -9 "$PPID"; '
KILL_GROUP = 'kill -s KILL -- "-$PPID"; '


def until(name: str) -> str:
    """Shell text that waits for a file."""
    return f"until [ -e {name} ]; do sleep 0.02; done; "


def touch(daemon: Daemon, *names: str) -> None:
    for name in names:
        with open(f"{daemon.directory}/{name}", "w", encoding="ascii"):
            pass


def ran(daemon: Daemon, step_id: str) -> int:
    """How often the step's command was run."""
    return len(daemon.read(f"ran.{step_id}")) // 2


def probe(daemon: Daemon, run_id: str, step_id: str, attempt: int = 1) -> process.Status:
    ordinal = daemon.fold(run_id).index_of[step_id] + 1
    return process.probe(daemon.home.run(run_id).attempt(ordinal, step_id, attempt))


def wait_for_end(daemon: Daemon, run_id: str, *step_ids: str) -> None:
    """Until the shims of these steps have recorded the end and are gone."""
    for step_id in step_ids:
        wait_until(lambda step_id=step_id: _is_over(probe(daemon, run_id, step_id)), f"the end of {step_id}")  # type: ignore[misc]


def _is_over(status: process.Status) -> bool:
    return status.exit_code is not None and not status.held


def facts_of(daemon: Daemon, run_id: str, step_id: str) -> list[Any]:
    """What the log says about how the step's attempts ended."""
    names = {"attempt_exited", "attempt_lost", "attempt_not_started", "attempt_timed_out"}
    events: list[Any] = [line.event for line in daemon.events(run_id)]
    return [event for event in events if event.name in names and event.step == step_id]


class DaemonKilled(unittest.TestCase):
    """Steps outlive the daemon."""

    def test_steps_go_on_and_are_adopted_with_their_exit_status(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(
                step("before", COUNT),
                step("meanwhile", COUNT + until("go-1")),
                step("meanwhile-3", COUNT + until("go-1") + "exit 3"),
                step("later", COUNT + until("go-2")),
                step("later-4", COUNT + until("go-2") + "exit 4"),
                step("after", COUNT, "before", "meanwhile", "later"),
                step("never", COUNT, "later-4"),
            )
            daemon.wait_for_event(run_id, "step_succeeded", step="before")
            for name in ("meanwhile", "meanwhile-3", "later", "later-4"):
                wait_until(lambda name=name: ran(daemon, name), name)  # type: ignore[misc]
            daemon.kill()
            touch(daemon, "go-1")
            wait_for_end(daemon, run_id, "meanwhile", "meanwhile-3")
            daemon.start()
            daemon.wait_for_event(run_id, "step_failed", step="meanwhile-3")
            touch(daemon, "go-2")
            run = daemon.wait_for(run_id)
            self.assertEqual(
                daemon.states(run_id),
                {"before": "SUCCEEDED", "meanwhile": "SUCCEEDED", "meanwhile-3": "FAILED", "later": "SUCCEEDED",
                 "later-4": "FAILED", "after": "SUCCEEDED", "never": "SKIPPED"},
            )  # fmt: skip
            self.assertEqual([record.exit_code for record in run.steps], [0, 0, 3, 0, 4, 0, None])
            self.assertEqual([record.attempt for record in run.steps], [1, 1, 1, 1, 1, 1, 0])
            self.assertEqual([ran(daemon, record.step.id) for record in run.steps], [1, 1, 1, 1, 1, 1, 0])

    def test_steps_outlive_a_daemon_that_is_asked_to_end(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", COUNT + until("go") + "exit 5"))
            wait_until(lambda: ran(daemon, "a"), "a")
            self.assertEqual(daemon.stop(), 0)
            self.assertTrue(probe(daemon, run_id, "a").held)
            daemon.start()
            touch(daemon, "go")
            self.assertEqual(daemon.wait_for(run_id).steps[0].exit_code, 5)
            self.assertEqual(ran(daemon, "a"), 1)

    def test_a_step_that_was_promised_but_not_spawned_is_spawned_under_its_number(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", COUNT))
            daemon.wait_for(run_id)
            daemon.kill()
            cut_after(daemon, run_id, StepStarted)
            remove_attempts(daemon, run_id)
            daemon.start()
            status_of(daemon, run_id)
            self.assertEqual(daemon.wait_for(run_id).steps[0].attempt, 1)
            self.assertEqual(ran(daemon, "a"), 2, "once before the cut, once after it")

    def test_killed_at_random_under_load(self) -> None:
        kills.under_load(15, 20261123)


class ProcessesKilled(unittest.TestCase):
    """An unknown outcome is `lost`: tried again without using a retry, unless the step says otherwise; bounded."""

    def test_daemon_and_all_steps(self) -> None:
        first_hangs = COUNT + '[ "$WFD_ATTEMPT" -gt 1 ] || exec sleep 600'
        with Daemon() as daemon:
            run_id = daemon.submit(
                step("done", COUNT),
                step("again", first_hangs, retries=0),
                step("again-2", first_hangs, retries=0),
                step("fails", first_hangs, retries=5, on_lost="fail"),
                step("after", COUNT, "again", "again-2"),
            )
            daemon.wait_for_event(run_id, "step_succeeded", step="done")
            for name in ("again", "again-2", "fails"):
                wait_until(lambda name=name: ran(daemon, name), name)  # type: ignore[misc]
            daemon.kill()
            kill_all(daemon)
            daemon.start()
            run = daemon.wait_for(run_id)
            self.assertEqual(
                daemon.states(run_id),
                {"done": "SUCCEEDED", "again": "SUCCEEDED", "again-2": "SUCCEEDED", "fails": "FAILED",
                 "after": "SUCCEEDED"},
            )  # fmt: skip
            self.assertEqual([record.attempt for record in run.steps], [1, 2, 2, 1, 1])
            self.assertEqual([record.failures for record in run.steps], [0, 0, 0, 0, 0])
            self.assertEqual([ran(daemon, record.step.id) for record in run.steps], [1, 2, 2, 1, 1])
            self.assertEqual(run.steps[3].reason, "lost")
            self.assertEqual([event.why for event in facts_of(daemon, run_id, "fails")], ["killed"])

    def test_a_step_that_is_lost_four_times_fails(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", COUNT + KILL_GROUP, retries=9), step("b", COUNT, "a"))
            run = daemon.wait_for(run_id)
            self.assertEqual((run.steps[0].state, run.steps[0].reason, run.steps[0].attempt), ("FAILED", "lost", 4))
            self.assertEqual(ran(daemon, "a"), 4)
            self.assertEqual(run.steps[1].state, "SKIPPED")

    # Processes that write their numbers down, deaf to what could be caught: the command, its child and grandchild, one
    # that is nobody's child, one that is stopped.
    GROUP = 5
    START = (
        'trap "" TERM HUP INT; echo $$ >> pids; sleep 600 & echo $! >> pids; kill -STOP $!; '
        "(sh -c 'echo $$ >> pids; exec sleep 600' &); sh -c 'echo $$ >> pids; sleep 600 & echo $! >> pids; wait' & "
    )
    # Two more that have left the group: a child of the command, and one that is nobody's.
    ESCAPE = "setsid sh -c 'echo $$ >> pids; exec sleep 600' & (setsid sh -c 'echo $$ >> pids; exec sleep 600' &) "

    def orphaning(self, count: int, more: str, then: str) -> str:
        """A command that says, in its second attempt, what of its first one is alive. A zombie is not."""
        first = f"{self.START}{more}; until [ $(wc -l < pids) = {count} ]; do sleep 0.02; done; echo $$ > command; {then}"
        look = 'case $(ps -o stat= -p "$pid") in ""|Z*) echo gone;; *) echo alive;; esac'
        never = until("never")
        return f'if [ "$WFD_ATTEMPT" = 1 ]; then {first}{never}fi; for pid in $(cat pids); do {look}; done > seen'

    def test_a_shim_alone_while_the_daemon_lives(self) -> None:
        forms = [("the group", ":", self.GROUP)]
        if ARE_FOUND:
            forms.append(("and what has left it", self.ESCAPE, self.GROUP + 2))
        for name, more, count in forms:
            with self.subTest(name), Daemon() as daemon:
                run_id = daemon.submit(step("a", self.orphaning(count, more, KILL_SHIM), retries=0))
                run = daemon.wait_for(run_id)
                self.assertEqual((run.state, run.steps[0].attempt), ("SUCCEEDED", 2))
                self.assertEqual(daemon.read("seen"), "gone\n" * count)
                facts = [event.name for event in facts_of(daemon, run_id, "a")]
                self.assertEqual(facts, ["attempt_lost", "attempt_exited"])

    def test_a_shim_alone_while_no_daemon_lives(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", self.orphaning(self.GROUP, ":", ""), retries=0))
            command = int(daemon.wait_for_file("command"))
            daemon.kill()
            shim = probe(daemon, run_id, "a").pid
            assert shim is not None
            os.kill(shim, signal.SIGKILL)
            wait_until(lambda: not probe(daemon, run_id, "a").held, "the end of the shim")
            os.kill(command, 0)
            daemon.start()
            run = daemon.wait_for(run_id)
            self.assertEqual((run.state, run.steps[0].attempt), ("SUCCEEDED", 2))
            self.assertEqual(daemon.read("seen"), "gone\n" * self.GROUP)

    def test_a_shim_that_died_before_its_command_began(self) -> None:
        """Seen as what a daemon finds that comes after: the lock free, no pid line."""
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", COUNT, retries=0, on_lost="fail"))
            daemon.wait_for(run_id)
            daemon.kill()
            cut_after(daemon, run_id, StepStarted)
            remove_attempts(daemon, run_id)
            write_status(daemon.home.run(run_id), 1, "a", "status 1\n")
            daemon.start()
            status_of(daemon, run_id)
            run = daemon.wait_for(run_id)
            self.assertEqual((run.state, run.steps[0].attempt, run.steps[0].failures), ("SUCCEEDED", 2, 0))
            self.assertEqual(facts_of(daemon, run_id, "a")[0].why, "never_began")


def kill_all(daemon: Daemon) -> None:
    """kill -9 of everything that the steps have started, all at once."""

    def is_gone() -> bool:
        pids = daemon.processes()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(is_gone, "the end of all steps")


def cut_after(daemon: Daemon, run_id: str, kind: type) -> None:
    """Cut the log behind its first event of this kind."""
    number = next(number for number, line in enumerate(daemon.events(run_id), 1) if isinstance(line.event, kind))
    write_log(daemon, run_id, b"".join(read_log(daemon, run_id).splitlines(True)[:number]))


def write_status(files: RunFiles, ordinal: int, step_id: str, text: str) -> None:
    with open(files.attempt(ordinal, step_id, 1).status, "w", encoding="ascii") as file:
        file.write(text)


class LogCut(unittest.TestCase):
    """A power cut may leave any part of what was not promised. Here a whole log is cut, anywhere."""

    def setUp(self) -> None:
        self.daemon = self.enterContext(Daemon())
        self.log = CutLog(self.daemon)
        self.run_id, self.whole, self.lines, self.END = self.log.run_id, self.log.whole, self.log.lines, self.log.END

    def test_any_cut_behind_line_1_can_be_folded_and_replays(self) -> None:
        files = self.daemon.home.run(self.run_id)
        reference = self.daemon.events(self.run_id)
        ends = self.log.ends
        for cut in range(len(self.whole) - 1, ends[0] - 1, -1):
            os.truncate(files.events, cut)
            run, reading = journal.fold(files, self.run_id)
            kept = sum(end <= cut for end in ends)
            self.assertEqual((run.seq, reading.end, reading.torn_bytes), (kept, ends[kept - 1], cut - ends[kept - 1]))
            if cut == ends[kept - 1]:
                lines = self.daemon.events(self.run_id)
                self.assertEqual(lines, reference[:kept])
                self.assertIsNone(decide.replay(lines)[1])
        write_log(self.daemon, self.run_id, self.whole)

    def test_any_cut_is_resumed_to_the_right_end(self) -> None:
        """At, just behind, in and just before the end of every line, with no attempts on disk."""
        for before, end in pairwise(self.log.ends):
            for cut in (before, before + 1, (before + end) // 2, end - 1):
                with self.subTest(cut=cut):
                    self.log.without_attempts(cut)

    def test_a_last_batch_that_is_cut_is_written_again_and_nothing_runs_again(self) -> None:
        for cut in range(self.log.last_batch, len(self.whole), 60):
            with self.subTest(cut=cut):
                self.log.with_attempts(cut)

    def test_with_the_attempts_left_nothing_runs_again_or_the_run_is_refused(self) -> None:
        """An attempt on disk that the cut log does not know proves that the log had promised more."""
        daemon, run_id = self.daemon, self.run_id
        counts = [counted.executions(daemon, run_id, name) for name in self.END]
        last_start = max(n for n, line in enumerate(daemon.events(run_id), 1) if isinstance(line.event, StepStarted))
        for kept in range(len(self.lines) - 1, last_start - 1, -1):
            with self.subTest(kept=kept):
                write_log(daemon, run_id, b"".join(self.lines[:kept]))
                status_of(daemon, run_id)
                self.assertEqual(daemon.wait_for(run_id).state, "FAILED")
                self.assertEqual(daemon.states(run_id), self.END)
                self.assertEqual([counted.executions(daemon, run_id, name) for name in self.END], counts)
                daemon.wait_until_let_go()
        for kept in range(1, last_start):
            data = b"".join(self.lines[:kept])
            write_log(daemon, run_id, data)
            with self.subTest(kept=kept), self.assertRaises(Damaged):
                journal.recover(daemon.home, run_id)
            self.assertEqual(read_log(daemon, run_id), data, "a damaged run is left as it is")
        self.assert_quarantined("exists, but the log ends before")

    def test_line_1_cut(self) -> None:
        for cut in (0, 1, len(self.lines[0]) - 1):
            write_log(self.daemon, self.run_id, self.whole[:cut])
            with self.subTest(cut=cut), self.assertRaises(Damaged):
                journal.recover(self.daemon.home, self.run_id)
        self.assert_quarantined("line 1")

    def test_one_byte_flipped_before_the_tail(self) -> None:
        middle = len(b"".join(self.lines[:5])) + 30
        flipped = bytearray(self.whole[: -len(self.lines[-1])])
        flipped[middle] ^= 1
        write_log(self.daemon, self.run_id, bytes(flipped))
        self.assert_quarantined("line 6")

    def assert_quarantined(self, why: str) -> None:
        """This run is refused, by this daemon and the next, which finds it marked; others go on; nothing is changed."""
        daemon, run_id = self.daemon, self.run_id
        daemon.damaged.add(run_id)
        other = daemon.submit(step("a", until("go")))
        data = read_log(daemon, run_id)
        for _ in range(2):
            for method in ("status", "cancel"):
                with self.assertRaises(Refused) as caught:
                    daemon.request(method, run_id=run_id, **({"request": "x"} if method == "cancel" else {}))
                self.assertEqual(caught.exception.code, protocol.DAMAGED)
                self.assertIn(why, caught.exception.message)
            hello = daemon.request("hello", protocol_min=1, protocol_max=1)
            self.assertEqual(hello["quarantined"], [run_id])
            self.assertEqual(read_log(daemon, run_id), data)
            daemon.restart()
        touch(daemon, "go")
        self.assertEqual(daemon.wait_for(other).state, "SUCCEEDED")


class StatusCut(unittest.TestCase):
    """P9: a status file tells what its whole lines tell."""

    def test_at_every_byte(self) -> None:
        status = CutStatus(self.enterContext(Daemon()))
        for length in range(len(status.whole) + 1):
            with self.subTest(length=length):
                status.cut(length)


class FinishedAndDamaged(unittest.TestCase):
    """P7: the last line of a log proves nothing about the lines before it."""

    def test_every_answer_about_it_is_a_refusal(self) -> None:
        with Daemon() as daemon:
            daemon.damaged.add(run_id := daemon.submit(step("a", "true"), step("b", "false", "a")))
            daemon.wait_for(run_id)
            daemon.wait_until_let_go()
            log = read_log(daemon, run_id)
            # In the last batch, too: then what follows would be a torn tail, were it not for the end that it tells.
            for number in (2, len(log.splitlines()) - 3):
                lines = log.splitlines(True)
                lines[number] = lines[number].replace(b'"at"', b'"At"')
                write_log(daemon, run_id, b"".join(lines))
                for method, params in (
                    ("status", {}), ("cancel", {"request": "r"}), ("retry", {"request": "r"}), ("watch", {"from_seq": 1}),
                ):  # fmt: skip
                    with self.subTest(line=number + 1, method=method), self.assertRaises(Refused) as caught:
                        daemon.request(method, run_id=run_id, **params)
                    self.assertEqual(caught.exception.code, protocol.DAMAGED)


class KilledInRecovery(unittest.TestCase):
    """Doing a recovery twice, or being killed in the middle of it, changes nothing."""

    TORN = b'{"seq":4,"at":"20'

    def setUp(self) -> None:
        self.daemon = self.enterContext(Daemon())
        self.run_id = self.daemon.submit(step("a", COUNT + until("go")))
        wait_until(lambda: ran(self.daemon, "a"), "a")
        self.daemon.kill()
        self.good = read_log(self.daemon, self.run_id)
        write_log(self.daemon, self.run_id, self.good + self.TORN)

    def recovered(self) -> None:
        """The next daemon recovers it as if nothing had been before."""
        daemon, run_id = self.daemon, self.run_id
        daemon.start()
        touch(daemon, "go")
        self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
        self.assertEqual(ran(daemon, "a"), 1)
        self.assertTrue(read_log(daemon, run_id).startswith(self.good))
        directory = daemon.home.run(run_id).directory
        kept = [name for name in os.listdir(directory) if name.startswith("torn-")]
        self.assertEqual(len(kept), 1, kept)
        with open(f"{directory}/{kept[0]}", "rb") as file:
            self.assertEqual(file.read(), self.TORN)
        self.assertNotIn("events.ndjson.new", os.listdir(directory))

    def test_nothing_before(self) -> None:
        self.recovered()

    def test_between_the_copy_and_the_rename(self) -> None:
        with open(self.daemon.home.run(self.run_id).events + ".new", "wb") as file:
            file.write(self.good[:-30])
        self.recovered()

    @unittest.skipUnless(shutil.which("strace"), "strace kills at a system call; it is not installed")
    def test_at_each_of_its_system_calls(self) -> None:
        # A recovery syncs the torn tail, the copy and the directory; the last one here is its first commit.
        for point in ("fsync:signal=KILL:when=1", "fsync:signal=KILL:when=2", "rename:signal=KILL:when=1",
                      "fsync:signal=KILL:when=3", "fsync:signal=KILL:when=4"):  # fmt: skip
            killed = subprocess.run(
                ["strace", "-o", os.devnull, "-e", f"trace={point.split(':')[0]}", "-e", f"inject={point}",
                 sys.executable, "-S", "-m", "wfd"],
                env=self.daemon.environ, stdin=subprocess.DEVNULL, capture_output=True, check=False,
            )  # fmt: skip
            if b"ptrace" in killed.stderr:
                self.skipTest("strace may not trace here")
            self.assertEqual(killed.returncode, -signal.SIGKILL, killed.stderr)
        self.recovered()


class AnotherBoot(unittest.TestCase):
    """What ran when the machine went down is lost, unless its status file says how it ended; back-offs start again."""

    def test_reboot(self) -> None:
        delay_sec = 0.3
        log = logs.Log(
            logs.workflow(
                logs.step("running"),
                logs.step("ended", retries=0),
                logs.step("began-not"),
                logs.step("no-file"),
                logs.step("on-lost", on_lost="fail"),
                logs.step("waiting", retries=1, backoff={"initial_sec": delay_sec}),
                cwd="/",
            )
        )
        log.now_ms = 10**12  # The clock of that boot was far ahead of ours.
        log.write(logs.session("another-boot"))
        log.start("running", "ended", "began-not", "no-file", "on-lost", "waiting").exit("waiting", 1)
        with Daemon() as daemon, subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
            try:
                daemon.kill()
                files = plant(daemon.home, log)
                for ordinal, name, rest in ((1, "running", ""), (2, "ended", "exit 7\n"), (5, "on-lost", "exit")):
                    write_status(files, ordinal, name, f"status 1\npid {stranger.pid}\n{rest}")
                write_status(files, 3, "began-not", "status 1\n")
                daemon.start()
                run = daemon.wait_for(log.run_id)
                self.assertIsNone(stranger.poll(), "the pid is somebody else's now")
            finally:
                stranger.kill()
            attempts = {record.step.id: (record.state.value, record.attempt) for record in run.steps}
            self.assertEqual(
                attempts,
                {"running": ("SUCCEEDED", 2), "ended": ("FAILED", 1), "began-not": ("SUCCEEDED", 2),
                 "no-file": ("SUCCEEDED", 2), "on-lost": ("FAILED", 1), "waiting": ("SUCCEEDED", 2)},
            )  # fmt: skip
            self.assertEqual(run.steps[1].exit_code, 7)
            for name in ("running", "began-not", "no-file", "on-lost"):
                self.assertEqual(facts_of(daemon, log.run_id, name)[0].why, "rebooted")
            lines = daemon.events(log.run_id)
            session = next(line for line in lines[len(log.lines) :] if isinstance(line.event, SupervisorStarted))
            again = daemon.wait_for_event(log.run_id, "step_started", step="waiting", attempt=2)
            self.assertGreaterEqual(again.mono_ms - session.mono_ms, delay_sec * 1000)

    def test_what_was_being_ended_is_not_lost(self) -> None:
        log = logs.Log(logs.workflow(logs.step("a"), logs.step("b", "a"), logs.step("c", timeout_sec=1, retries=0), cwd="/"))
        log.start("a", "c")
        log.now_ms += 1_000
        log.time_out("c").cancel()
        with Daemon() as daemon:
            daemon.kill()
            files = plant(daemon.home, log)
            write_status(files, 1, "a", "status 1\npid 99999999\n")
            daemon.start()
            self.assertEqual(daemon.wait_for(log.run_id).state, "CANCELLED")
            for name in ("a", "c"):
                self.assertEqual([event.name for event in facts_of(daemon, log.run_id, name)][-1], "attempt_exited")


class TestInOneProcess(LoopTest):
    """A supervisor that is turned by hand, so that the system can refuse it something in the very turn that is meant."""

    def setUp(self) -> None:
        super().setUp()
        self.owner = self.loop(boot_id="another boot")
        self.enterContext(mock.patch.multiple(supervisor, log=mock.DEFAULT, RETRY_MS=10))

    def turn(self) -> None:
        self.owner.turn(self.owner.now_ms)

    def turn_until(self, is_so: Callable[[], object], what: str) -> None:
        def is_so_now() -> object:
            self.turn()
            return is_so()

        wait_until(is_so_now, what)

    def fold(self, run_id: str) -> Run:
        return journal.fold(self.home.run(run_id), run_id)[0]

    def test_a_run_that_waits_for_its_take_over_is_not_forgotten(self) -> None:
        log = logs.Log(logs.workflow())
        plant(self.home, log)
        for error in (OSError(errno.ENOSPC, "No space left on device"), MemoryError()):
            with self.subTest(error=error), mock.patch.object(journal, "recover", side_effect=error):
                self.owner.take_over_all()
                self.assertEqual((list(self.owner.live), self.owner.is_idle), ([], False))
        # Whoever cancels all runs cancels this one as well, once it is there.
        self.owner.drain()
        self.assertFalse(self.owner.is_done)
        self.turn_until(lambda: self.owner.is_done, "the end of all runs")
        self.assertEqual([self.fold(log.run_id).state, self.fold(log.run_id).steps[0].attempt], ["CANCELLED", 0])

    def test_a_cancel_of_all_runs_that_cannot_be_written_is_written_later(self) -> None:
        log = logs.Log(logs.workflow(logs.step("a"), logs.step("b")))
        plant(self.home, log)
        with mock.patch.object(process, "start", side_effect=process.SpawnStalled("no")):
            self.owner.take_over_all()
            self.turn()
            self.owner.drain()
            with mock.patch.object(journal, "sync", side_effect=OSError(errno.EIO, "Input/output error")):
                self.turn()
            self.assertEqual(self.fold(log.run_id).state, "RUNNING")
            self.turn_until(lambda: self.owner.is_done, "the end of all runs")
        self.assertEqual(self.fold(log.run_id).state, "CANCELLED")

    def test_a_cancel_of_a_run_whose_end_is_still_owed(self) -> None:
        """A crash tore off all that followed from the last exit, and the next daemon could not write it at first."""
        log = logs.Log(logs.workflow()).start("a")
        log.put(AttemptExited("a", 1, 0))
        plant(self.home, log)
        self.owner.take_over_all()
        with mock.patch.object(journal, "sync", side_effect=OSError(errno.EIO, "Input/output error")):
            self.turn()
        self.assertEqual(self.fold(log.run_id).state, "RUNNING")
        answer = self.ask(self.owner, "cancel", run_id=log.run_id, request="q")
        self.assertEqual(answer["result"], {"run_id": log.run_id, "state": "SUCCEEDED"})
        self.assertEqual(self.fold(log.run_id).state, "SUCCEEDED")

    def test_who_watches_from_a_line_of_this_very_turn_begins_with_it(self) -> None:
        plant(self.home, logs.Log(logs.workflow()))
        with mock.patch.object(process, "start", side_effect=process.SpawnStalled("no")):
            self.owner.take_over_all()
            ours = self.client(self.owner, "watch", run_id="r1", from_seq=4)
            for _ in range(2):
                self.turn()
        answer, first = (json.loads(line) for line in ours.recv(100_000).splitlines()[:2])
        self.assertEqual((answer["result"]["last_seq"], first["params"]["line"]["seq"]), (4, 4))

    def test_what_was_to_be_in_a_commit_that_failed_is_written_anew(self) -> None:
        """Two logs are written before the first of them is synced, which fails: what the second sync says proves nothing."""
        files = [plant(self.home, logs.Log(logs.workflow(), run_id)) for run_id in ("r1", "r2")]
        with mock.patch.object(process, "start", side_effect=process.SpawnStalled("no")):
            self.owner.take_over_all()
            self.turn()
            inodes = [os.stat(each.events).st_ino for each in files]
            self.owner.drain()
            failure = OSError(errno.EIO, "Input/output error")
            with mock.patch.object(journal, "sync", side_effect=[failure, *[None] * 10]):
                self.turn()
        self.assertEqual([self.fold(run_id).state for run_id in ("r1", "r2")], ["RUNNING", "CANCELLED"])
        first, second = (os.stat(each.events).st_ino for each in files)
        self.assertEqual((first == inodes[0], second == inodes[1]), (True, False))

    def test_what_was_to_be_in_the_commit_of_a_second_try_is_written_anew(self) -> None:
        """The second of two logs finds no room, gets that of the reserve, and then it is its sync that fails."""
        files = [plant(self.home, logs.Log(logs.workflow(), run_id)) for run_id in ("r1", "r2")]
        self.owner.make_reserve()
        with mock.patch.object(process, "start", side_effect=process.SpawnStalled("no")):
            self.owner.take_over_all()
            self.turn()
            inodes = [os.stat(each.events).st_ino for each in files]
            self.owner.drain()
            with (
                full_disk(write_of="r2"),
                mock.patch.object(journal, "sync", side_effect=[OSError(errno.EIO, "Input/output error"), *[None] * 10]),
            ):
                self.turn()
        self.assertEqual([self.fold(run_id).state for run_id in ("r1", "r2")], ["CANCELLING", "RUNNING"])
        first, second = (os.stat(each.events).st_ino for each in files)
        self.assertEqual((first == inodes[0], second == inodes[1]), (False, True))

    def test_a_retry_whose_write_failed_is_refused_though_the_run_is_cancelled_in_the_same_turn(self) -> None:
        """A cancel is tried twice on a full disk; but here there is nothing to cancel without the retry."""
        log = logs.complete(logs.workflow(), {"a": [1]})
        plant(self.home, log)
        journal.unmark_live(self.home, log.run_id)
        self.owner.make_reserve()
        clients = [self.client(self.owner, method, run_id=log.run_id, request=method) for method in ("retry", "cancel")]
        with full_disk(write_of=log.run_id):
            self.turn()
        for client in clients:
            self.assertEqual(json.loads(client.recv(100_000)).get("error", {}).get("code"), protocol.STALLED)
        self.assertEqual(journal.last_line(self.home.run(log.run_id), log.run_id), log.lines[-1])

    def test_memory_that_is_short_refuses_a_request(self) -> None:
        short = mock.Mock(side_effect=MemoryError)
        for when in (mock.patch.dict(requests.METHODS, list=short), mock.patch.object(protocol, "parse_request", short)):
            with self.subTest(when=when), when:
                problem = self.ask(self.owner, "list")["error"]
                self.assertIn("the system refuses: Cannot allocate memory", problem["message"])

    def test_memory_that_is_short_stalls_a_run(self) -> None:
        log = logs.Log(logs.workflow(logs.step("a", cwd="/")))
        plant(self.home, log)
        self.owner.take_over_all()
        with mock.patch.object(process, "start", side_effect=MemoryError):
            self.turn()
        (live,) = self.owner.live.values()
        self.assertEqual(live.stalled, "the system refuses: Cannot allocate memory")
        self.turn_until(lambda: not self.owner.live, "the end of the run")
        self.assertEqual(self.fold(log.run_id).state, "SUCCEEDED")

    def test_a_cancel_after_the_end_and_a_retry_in_the_same_turn(self) -> None:
        log = logs.complete(logs.workflow(), {"a": [1]})
        plant(self.home, log)
        journal.unmark_live(self.home, log.run_id)
        params: dict[str, object] = {"run_id": log.run_id, "request": "q"}
        _, answer = requests.METHODS["cancel"](self.owner, mock.Mock(), params)
        requests.METHODS["retry"](self.owner, mock.Mock(), {**params, "request": "r"})
        self.assertEqual(answer()["state"], "FAILED", "it was over when it was asked about, and goes on")

    def test_a_new_run_under_the_name_of_a_damaged_one(self) -> None:
        self.owner.quarantine(Damaged("r1", "somebody has edited it"))
        log = logs.Log(logs.workflow())
        self.owner.create(log.lines[0].event, requests.Environment({}, 0o022, {}))  # type: ignore[arg-type]
        self.assertEqual(self.owner.quarantined, {})

    def test_what_ends_an_attempt_counts_when_it_is_durable(self) -> None:
        """A reboot has ended it, its timeout passes in the very turn that finds that out, and the turn's batch fails."""
        log = logs.Log(logs.workflow(logs.step("a", timeout_sec=0.001, on_lost="fail")))
        files = plant(self.home, log.start("a"))
        write_status(files, 1, "a", "status 1\npid 99999999\n")
        self.client(self.owner, "status", run_id=log.run_id)
        # Taken over by a request, it is looked at in the turn after that; taken over at a start, in the first one.
        self.turn()
        with mock.patch.object(journal, "sync", side_effect=OSError(errno.EIO, "Input/output error")):
            self.turn()
        (live,) = self.owner.live.values()
        self.assertEqual(live.stalled, "its log cannot be written: Input/output error")
        self.turn_until(lambda: not self.owner.live, "the end of the run")
        self.assertEqual(self.owner.quarantined, {})
        with journal.open_log(files, log.run_id) as file:
            run, difference = decide.replay(journal.Reading(file, log.run_id))
        self.assertIsNone(difference)
        self.assertEqual((run.steps[0].state.value, run.steps[0].reason), ("FAILED", "lost"))


class TestTakeOver(LoopTest):
    """What the next daemon makes of a run that is alive, and of one whose end it cannot be sure of."""

    def test_a_timeout_counts_from_the_start_however_often_daemons_change(self) -> None:
        log = logs.Log(logs.workflow(logs.step("a", timeout_sec=3))).start("a")
        started_ms = log.now_ms
        files = plant(self.home, log)
        write_status(files, 1, "a", "status 1\npid 99999999\n")
        # As its shim does while it lives.
        shim = self.enterContext(open(files.attempt(1, "a", 1).status, "rb"))
        fcntl.flock(shim, fcntl.LOCK_EX)
        for after_ms, is_over in ((1_000, False), (2_999, False), (3_000, True)):
            with mock.patch.object(supervisor, "monotonic_ms", lambda now_ms=started_ms + after_ms: now_ms):
                loop = self.loop()
                loop.take_over_all()
                # The first turn looks at the attempt, and sets the timers that the second one runs.
                for _ in range(2):
                    loop.turn(loop.now_ms)
                self.end(loop)
            with journal.open_log(files, log.run_id) as file:
                names = [line.event.name for line in journal.Reading(file, log.run_id)]
            self.assertEqual("attempt_timed_out" in names, is_over, after_ms)

    def test_what_was_promised_waits_for_what_has_its_place(self) -> None:
        """Both are RUNNING: what had made room for the second could not be written, and then the daemon was killed."""
        for run_id in ("r1", "r2"):
            files = plant(self.home, logs.Log(logs.workflow(logs.step("a", cwd="/")), run_id).start("a"))
        write_status(files, 1, "a", "status 1\npid 99999999\n")
        loop = self.loop(max_parallel=1)
        self.enterContext(mock.patch.multiple(supervisor, log=mock.DEFAULT, RETRY_MS=10))
        start = self.enterContext(mock.patch.object(process, "start", wraps=process.start))
        with open(files.attempt(1, "a", 1).status, "rb") as shim:
            fcntl.flock(shim, fcntl.LOCK_EX)
            loop.take_over_all()
            for _ in range(20):
                loop.turn(loop.now_ms + 5)
            why = self.ask(loop, "status", run_id="r1")["result"]["stalled"]
            self.assertEqual(why, "step 'a' cannot be started: the daemon's limit of 1 running steps is reached")
            start.assert_not_called()

        def are_over() -> bool:
            loop.turn(loop.now_ms + 5)
            return not loop.live

        wait_until(are_over, "the end of both")
        attempts = [journal.fold(self.home.run(run_id), run_id)[0].steps[0].attempt for run_id in ("r1", "r2")]
        self.assertEqual(attempts, [1, 2])

    def test_an_end_that_may_not_be_durable_is_not_told(self) -> None:
        """It was read from a log that nobody could take over, which would have made it durable."""
        log = logs.complete(logs.workflow())
        plant(self.home, log)
        loop = self.loop()
        with mock.patch.object(supervisor, "log"):
            with mock.patch.object(journal, "recover", side_effect=OSError(errno.EIO, "Input/output error")):
                loop.take_over_all()
                self.assertEqual(self.ask(loop, "status", run_id=log.run_id)["error"]["code"], protocol.STALLED)
            self.assertEqual(self.ask(loop, "status", run_id=log.run_id)["result"]["state"], "SUCCEEDED")


def full_disk(write_of: str) -> AbstractContextManager[object]:
    """The next batch of this run finds no room; later ones do."""
    write = journal.Journal._write
    is_full = True

    def refuse_once(self: journal.Journal, batch: bytes) -> None:
        nonlocal is_full
        if is_full and self.run_id == write_of:
            is_full = False
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, batch)

    return mock.patch.object(journal.Journal, "_write", refuse_once)


def plant(home: Home, log: logs.Log) -> RunFiles:
    """Put a made log where a daemon finds it at its start, of the form that a crash leaves."""
    files = logs.save(home, log.data, log.run_id)
    environment = requests.Environment({"PATH": os.environ.get("PATH", os.defpath)}, 0o022, {})
    with open(files.environment, "wb") as file:
        file.write(environment.encode())
    journal.mark_live(home, log.run_id)
    return files


if __name__ == "__main__":
    unittest.main()
