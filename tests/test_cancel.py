"""Cancels and timeouts: whatever a step does, nothing of the run is alive when it is over.

Every block of a Daemon ends with that check: no process carries the run's marks any more (daemon.py). Long graces prove
that something ended by itself, short ones that it was killed.
"""

from __future__ import annotations

import os
import signal
import socket
import unittest
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, ClassVar

from tests.daemon import Client, Daemon, step, wait_until
from wfd import process, protocol
from wfd.events import StepStarted
from wfd.state import Run

HANGS = "echo began; exec sleep 600"
IGNORES_TERM = "trap '' TERM; echo began; while :; do sleep 0.05; done"
# The clean-up takes a while, and is itself not touched by a second signal.
CLEANS_UP = "trap 'sleep 0.2; echo cleaned; exit 0' TERM; echo began; while :; do sleep 0.01; done"
FORKS = "(sleep 600 & sleep 600 & wait) & (trap '' TERM; echo began; sleep 600; sleep 600)"
LEAVES_CHILD = "(trap '' TERM; sleep 600; sleep 600) & echo began; sleep 600"
NO_GRACE, LONG_GRACE = 0.1, 300


# Its clock is ahead of the system's by as many seconds as a file beside its home has bytes.
TIMELESS = """
import os, sys
from wfd import supervisor
clock, now_ms = os.path.dirname(os.environ["WFD_HOME"]) + "/clock", supervisor.monotonic_ms
supervisor.monotonic_ms = lambda: now_ms() + 1000 * os.stat(clock).st_size
from wfd.__main__ import main
sys.exit(main())
"""


class Timeless(Daemon):
    """For graces and timeouts that nobody waits for: however long the test takes, they pass when it says so."""

    program = ("-S", "-c", TIMELESS)

    def __init__(self) -> None:
        super().__init__()
        self.clock = f"{self.base}/clock"
        self.let_pass(0)

    def let_pass(self, seconds: int) -> None:
        """So much time. What a living daemon has to do then is done when this returns."""
        with open(self.clock, "ab") as file:
            file.write(b"." * seconds)
        if self.process is not None:
            # It may be waiting, for as long as it had to before.
            self.request("list")


def cancel(daemon: Daemon, run_id: str, request: str = "request-1") -> str:
    """Ask for the end of a run; the state that the answer tells."""
    return str(daemon.request("cancel", run_id=run_id, request=request)["state"])


def wait_for_output(daemon: Daemon, run_id: str, *step_ids: str) -> None:
    """Until each of these steps has printed something."""
    for step_id in step_ids:
        daemon.wait_for_event(run_id, "step_started", step=step_id)
        wait_until(lambda step_id=step_id: _output(daemon, run_id, step_id), f"output of {step_id}")  # type: ignore[misc]


def _output(daemon: Daemon, run_id: str, step_id: str) -> str:
    ordinal = daemon.fold(run_id).index_of[step_id] + 1
    path = daemon.home.run(run_id).attempt(ordinal, step_id, 1).out
    return daemon.output(run_id, step_id) if os.path.exists(path) else ""


def events_of(daemon: Daemon, run_id: str, step_id: str) -> list[Any]:
    events: list[Any] = [line.event for line in daemon.events(run_id)]
    return [event for event in events if getattr(event, "step", None) == step_id]


def names_of(daemon: Daemon, run_id: str, step_id: str) -> list[str]:
    return [event.name for event in events_of(daemon, run_id, step_id)]


class Cancel(unittest.TestCase):
    """P6: after the answer no attempt starts; every group gets TERM, then KILL after its grace."""

    daemon: Daemon

    @classmethod
    def setUpClass(cls) -> None:
        cls.daemon = cls.enterClassContext(Daemon())

    def assert_cancelled(self, run: Run, reason: str = "cancel") -> None:
        self.assertEqual((run.state, run.reason), ("CANCELLED", "cancel"))
        for record in run.steps:
            if record.state != "SUCCEEDED":
                self.assertEqual((record.state, record.reason), ("CANCELLED", reason))

    def test_steps_that_resist(self) -> None:
        """One run of all kinds, so that no end waits for another's."""
        steps: dict[str, tuple[str, float, list[int | None]]] = {
            "hangs": (HANGS, LONG_GRACE, [143]),
            "ignores": (IGNORES_TERM, NO_GRACE, [None]),
            "cleans": (CLEANS_UP, LONG_GRACE, [0]),
            # The shim may need longer than the grace to write down the end of the command, and is then killed before.
            "forks": (FORKS, NO_GRACE, [143, None]),
            "leaves": (LEAVES_CHILD, NO_GRACE, [143, None]),
        }
        daemon = self.daemon
        run_id = daemon.submit(
            *(step(name, command, grace_sec=grace) for name, (command, grace, _) in steps.items()),
            step("pending", "true", "hangs"),
        )
        wait_for_output(daemon, run_id, *steps)
        self.assertEqual(cancel(daemon, run_id), "CANCELLING")
        run = daemon.wait_for(run_id)
        self.assert_cancelled(run)
        for ordinal, (name, (_, _, codes)) in enumerate(steps.items(), 1):
            with self.subTest(name):
                written = process.probe(daemon.home.run(run_id).attempt(ordinal, name, 1)).exit_code
                self.assertIn(written, codes)
                self.assertEqual(run.steps[ordinal - 1].exit_code, written)
        self.assertTrue(daemon.output(run_id, "cleans").endswith("cleaned\n"), "the clean-up was not let finish")
        self.assertEqual(names_of(daemon, run_id, "pending"), ["step_cancelled"])

    def test_the_rest_of_a_group_keeps_its_grace(self) -> None:
        """The command is gone at once, what it started cleans up."""
        child = "(trap 'sleep 0.2; echo cleaned; exit' TERM; echo began; while :; do sleep 0.01; done) & wait"
        daemon = self.daemon
        run_id = daemon.submit(step("a", child, grace_sec=LONG_GRACE))
        wait_for_output(daemon, run_id, "a")
        cancel(daemon, run_id)
        run = daemon.wait_for(run_id)
        self.assert_cancelled(run)
        self.assertEqual(run.steps[0].exit_code, 143, "the command's own end, which nothing has cut short")
        self.assertIn("cleaned", daemon.output(run_id, "a"))

    def test_at_once(self) -> None:
        """A TERM that comes before the command must not get lost, or it would live until the KILL."""
        daemon, runs = self.daemon, []
        for number in range(20):
            run_id = daemon.submit(step("a", HANGS, grace_sec=LONG_GRACE), step("b", HANGS, grace_sec=LONG_GRACE))
            if number % 2:
                daemon.wait_for_event(run_id, "step_started")
            cancel(daemon, run_id)
            runs.append(run_id)
        for run_id in runs:
            self.assert_cancelled(daemon.wait_for(run_id))

    def test_a_stopped_step(self) -> None:
        daemon = self.daemon
        run_id = daemon.submit(step("a", "echo began; kill -STOP $$; sleep 600", grace_sec=LONG_GRACE))
        wait_for_output(daemon, run_id, "a")
        cancel(daemon, run_id)
        self.assert_cancelled(daemon.wait_for(run_id))

    def test_during_back_off_and_in_the_queue(self) -> None:
        daemon = self.daemon
        run_id = daemon.submit(
            step("fails", "exit 1", retries=1, backoff={"initial_sec": 300, "max_sec": 300}),
            step("holds", HANGS),
            step("queued", "touch started"),
            max_parallel=1,
        )
        daemon.wait_for_event(run_id, "step_retried", step="fails")
        wait_for_output(daemon, run_id, "holds")
        self.assertEqual(cancel(daemon, run_id), "CANCELLING")
        self.assert_cancelled(daemon.wait_for(run_id))
        self.assertEqual(names_of(daemon, run_id, "queued"), ["step_ready", "step_cancelled"])
        self.assertEqual(names_of(daemon, run_id, "fails")[-2:], ["step_retried", "step_cancelled"])
        self.assertEqual(daemon.read("started"), "")

    def test_a_run_of_which_nothing_runs_ends_in_the_same_batch(self) -> None:
        daemon = self.daemon
        run_id = daemon.submit(step("a", "exit 1", retries=1, backoff={"initial_sec": 300, "max_sec": 300}))
        daemon.wait_for_event(run_id, "step_retried")
        self.assertEqual(cancel(daemon, run_id), "CANCELLED")

    def test_it_wins_over_exit_0(self) -> None:
        daemon = self.daemon
        run_id = daemon.submit(step("a", "trap 'exit 0' TERM; echo began; while :; do sleep 0.01; done"))
        wait_for_output(daemon, run_id, "a")
        cancel(daemon, run_id)
        run = daemon.wait_for(run_id)
        self.assert_cancelled(run)
        self.assertEqual(run.steps[0].exit_code, 0)

    def test_twice_and_of_a_run_that_is_over(self) -> None:
        daemon = self.daemon
        done = daemon.submit(step("a", "true"))
        daemon.wait_for(done)
        before = daemon.events(done)
        self.assertEqual(cancel(daemon, done), "SUCCEEDED")
        self.assertEqual(daemon.events(done), before)
        run_id = daemon.submit(step("a", CLEANS_UP, grace_sec=LONG_GRACE))
        wait_for_output(daemon, run_id, "a")
        for request in ("one", "one", "two"):
            self.assertIn(cancel(daemon, run_id, request), ("CANCELLING", "CANCELLED"))
        self.assert_cancelled(daemon.wait_for(run_id))
        self.assertEqual(cancel(daemon, run_id, "three"), "CANCELLED")
        self.assertEqual(daemon.names(run_id).count("run_cancel_requested"), 1)
        self.assertEqual(daemon.output(run_id, "a").count("cleaned"), 1)


class CancelWithoutDaemon(unittest.TestCase):
    """A client that starts a daemon hands it its request, which is decided before any step starts."""

    def start_with(self, daemon: Daemon, method: str, **params: object) -> dict[str, Any]:
        """Start a daemon with this request in hand; its answer."""
        ours, theirs = socket.socketpair()
        with Client(ours) as client, theirs:
            client.send(protocol.request(method, params))
            daemon.process = daemon.spawn("--handover-fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),))
            theirs.close()
            answer: dict[str, Any] = client.message()["result"]
        return answer

    def test_no_queued_step_starts(self) -> None:
        """Its slot is free and it is READY when the next daemon comes."""
        with Daemon() as daemon:
            run_id = daemon.submit(
                step("first", "echo began; until [ -e go ]; do sleep 0.02; done"),
                step("queued", "touch started"),
                step("pending", "touch started", "queued"),
                max_parallel=1,
            )
            wait_for_output(daemon, run_id, "first")
            daemon.kill()
            with open(f"{daemon.directory}/go", "w", encoding="ascii"):
                pass
            files = daemon.home.run(run_id).attempt(1, "first", 1)
            wait_until(lambda: not process.probe(files).held, "the end of the first step")
            answer = self.start_with(daemon, "cancel", run_id=run_id, request="x")
            self.assertIn(answer["state"], ("CANCELLING", "CANCELLED"))
            run = daemon.wait_for(run_id)
            self.assertEqual(run.state, "CANCELLED")
            starts = [line.event for line in daemon.events(run_id) if isinstance(line.event, StepStarted)]
            self.assertEqual([event.step for event in starts], ["first"])
            self.assertEqual(daemon.read("started"), "")

    def test_adopted_steps_are_ended(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(
                step("cleans", CLEANS_UP, grace_sec=LONG_GRACE),
                step("ignores", IGNORES_TERM, grace_sec=NO_GRACE),
                step("forks", FORKS, grace_sec=NO_GRACE),
            )
            wait_for_output(daemon, run_id, "cleans", "ignores", "forks")
            daemon.kill()
            self.start_with(daemon, "cancel", run_id=run_id, request="x")
            run = daemon.wait_for(run_id)
            self.assertEqual(run.state, "CANCELLED")
            self.assertEqual([record.state for record in run.steps], ["CANCELLED"] * 3)
            self.assertTrue(daemon.output(run_id, "cleans").endswith("cleaned\n"))

    def test_a_step_that_was_promised_and_not_spawned_never_begins(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", "touch started; " + HANGS))
            wait_for_output(daemon, run_id, "a")
            daemon.kill()
            for pid in daemon.processes():
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not daemon.processes(), "their end")
            for path in (f"{daemon.directory}/started", daemon.home.run(run_id).attempt(1, "a", 1).status):
                os.unlink(path)
            self.start_with(daemon, "cancel", run_id=run_id, request="x")
            self.assertEqual(daemon.wait_for(run_id).state, "CANCELLED")
            self.assertFalse(os.path.exists(f"{daemon.directory}/started"))
            self.assertEqual(events_of(daemon, run_id, "a")[-2].why, "stopped")


class DaemonKilledMeanwhile(unittest.TestCase):
    """What is being ended when the daemon dies is ended by the next one, and never lost."""

    def test_between_term_and_kill(self) -> None:
        """Of a cancel and of a timeout; and before a timeout."""
        with Timeless() as daemon:
            cancelled = daemon.submit(step("a", IGNORES_TERM, grace_sec=10_000))
            timed_out = daemon.submit(step("a", IGNORES_TERM, timeout_sec=10_000, grace_sec=10_000))
            times_out = daemon.submit(step("a", HANGS, timeout_sec=16_000, grace_sec=LONG_GRACE))
            for run_id in (cancelled, timed_out, times_out):
                wait_for_output(daemon, run_id, "a")
            daemon.let_pass(10_000)
            daemon.wait_for_event(timed_out, "attempt_timed_out")
            cancel(daemon, cancelled)
            daemon.kill()
            daemon.start()
            daemon.let_pass(4_000)
            for run_id in (cancelled, timed_out, times_out):
                self.assertTrue(daemon.processes(run_id))
            daemon.let_pass(7_000)
            self.assertEqual(daemon.wait_for(cancelled).state, "CANCELLED")
            self.assertEqual(events_of(daemon, cancelled, "a")[-2].exit_code, None)
            self.assert_timed_out(daemon, timed_out)
            self.assert_timed_out(daemon, times_out)

    def test_killed_with_the_step_between_term_and_kill(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", IGNORES_TERM, timeout_sec=0.8, grace_sec=LONG_GRACE))
            daemon.wait_for_event(run_id, "attempt_timed_out")
            daemon.kill()
            for pid in daemon.processes():
                # One may end with another that was killed before it.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            daemon.start()
            self.assert_timed_out(daemon, run_id)

    def test_the_run_s_timeout_while_none_lives(self) -> None:
        with Timeless() as daemon:
            run_id = daemon.submit(step("a", HANGS, grace_sec=LONG_GRACE), timeout_sec=10_000)
            wait_for_output(daemon, run_id, "a")
            daemon.kill()
            daemon.let_pass(10_000)
            daemon.start()
            run = daemon.wait_for(run_id)
            self.assertEqual((run.state, run.reason, run.steps[0].state), ("FAILED", "run_timeout", "CANCELLED"))

    def assert_timed_out(self, daemon: Daemon, run_id: str) -> None:
        record = daemon.wait_for(run_id).steps[0]
        self.assertEqual((record.state, record.reason, record.failures, record.losses), ("FAILED", "timeout", 1, 0))
        self.assertEqual(names_of(daemon, run_id, "a")[-3:], ["attempt_timed_out", "attempt_exited", "step_failed"])


class Timeout(unittest.TestCase):
    """A timeout ends the whole tree and counts as a failed attempt. All the runs wait at the same time."""

    daemon: Daemon
    BACKOFF: ClassVar[dict[str, object]] = {"initial_sec": 0.05, "factor": 3, "max_sec": 0.2}

    @classmethod
    def setUpClass(cls) -> None:
        cls.daemon = cls.enterClassContext(Daemon())
        cls.daemon.submit(
            step("forks", FORKS, timeout_sec=0.2, grace_sec=NO_GRACE, retries=3, backoff=cls.BACKOFF),
            step("cleans", CLEANS_UP, timeout_sec=1.2, grace_sec=LONG_GRACE),
            step("jitter", "exit 1", retries=3, backoff={**cls.BACKOFF, "jitter": 1}),
            step("after", "touch started", "forks"),
            run_id="attempt",
        )
        cls.daemon.submit(
            step("done", "true"),
            step("ignores", IGNORES_TERM, grace_sec=NO_GRACE),
            step("cleans", CLEANS_UP, grace_sec=LONG_GRACE),
            step("waits", "exit 1", retries=1, backoff={"initial_sec": 300, "max_sec": 300}),
            step("pending", "true", "cleans"),
            run_id="run",
            timeout_sec=1.5,
        )

    def test_of_an_attempt(self) -> None:
        """With and without KILL. Tried again after the back-off, whose delays are the formula's."""
        daemon, run_id = self.daemon, "attempt"
        run = daemon.wait_for(run_id)
        self.assertEqual([record.state for record in run.steps], ["FAILED", "FAILED", "FAILED", "SKIPPED"])
        self.assertEqual([record.reason for record in run.steps[:2]], ["timeout", "timeout"])
        self.assertEqual((run.steps[0].attempt, run.steps[0].failures, run.steps[0].losses), (4, 4, 0))
        self.assertTrue(daemon.output(run_id, "cleans").endswith("cleaned\n"))
        self.assertEqual(self.delays(daemon, run_id, "forks"), [50, 150, 200])
        draws = [event.draw_ppm for event in events_of(daemon, run_id, "jitter") if event.name == "attempt_exited"]
        spread = [base - base * draw // 1_000_000 for base, draw in zip((50, 150, 200), draws, strict=False)]
        self.assertEqual(self.delays(daemon, run_id, "jitter"), spread)

    def delays(self, daemon: Daemon, run_id: str, step_id: str) -> Sequence[int]:
        """The delays in the log, each of them kept by the next start."""
        delays = []
        lines = [line for line in daemon.events(run_id) if getattr(line.event, "step", None) == step_id]
        for retried, started in pairwise(lines):
            if retried.event.name == "step_retried":
                delays.append(retried.event.delay_ms)  # type: ignore[attr-defined]
                self.assertEqual(started.event.name, "step_started")
                self.assertGreaterEqual(started.mono_ms - retried.mono_ms, delays[-1])
        return delays

    def test_of_the_run(self) -> None:
        daemon, run_id = self.daemon, "run"
        run = daemon.wait_for(run_id)
        self.assertEqual((run.state, run.reason), ("FAILED", "run_timeout"))
        self.assertEqual([record.state for record in run.steps], ["SUCCEEDED"] + ["CANCELLED"] * 4)
        self.assertEqual([record.reason for record in run.steps], [None] + ["run_timeout"] * 4)
        self.assertTrue(daemon.output(run_id, "cleans").endswith("cleaned\n"))
        self.assertEqual(cancel(daemon, run_id), "FAILED")

    def test_a_cancel_in_the_grace_of_a_timeout_wins(self) -> None:
        with Timeless() as daemon:
            run_id = daemon.submit(step("a", IGNORES_TERM, timeout_sec=10_000, grace_sec=10_000, retries=5))
            wait_for_output(daemon, run_id, "a")
            daemon.let_pass(10_000)
            daemon.wait_for_event(run_id, "attempt_timed_out")
            cancel(daemon, run_id)
            daemon.let_pass(10_000)
            run = daemon.wait_for(run_id)
            self.assertEqual((run.state, run.steps[0].state, run.steps[0].attempt), ("CANCELLED", "CANCELLED", 1))


class Shutdown(unittest.TestCase):
    """`daemon stop` leaves the steps alone, `daemon stop --cancel-runs` ends them first."""

    def test_with_cancel_runs(self) -> None:
        with Daemon() as daemon:
            runs = [
                daemon.submit(step("a", CLEANS_UP, grace_sec=LONG_GRACE), step("b", "true", "a")),
                daemon.submit(step("a", IGNORES_TERM, grace_sec=NO_GRACE)),
            ]
            for run_id in runs:
                wait_for_output(daemon, run_id, "a")
            self.assertEqual(daemon.request("shutdown", cancel_runs=True), {})
            assert daemon.process is not None
            self.assertEqual(daemon.process.wait(60), 0)
            for run_id in runs:
                self.assertEqual(daemon.fold(run_id).state, "CANCELLED")
            self.assertTrue(daemon.output(runs[0], "a").endswith("cleaned\n"))
            self.assertEqual(os.listdir(daemon.home.live), [])

    def test_without(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", "echo began; until [ -e go ]; do sleep 0.02; done"))
            wait_for_output(daemon, run_id, "a")
            self.assertEqual(daemon.request("shutdown"), {})
            assert daemon.process is not None
            self.assertEqual(daemon.process.wait(60), 0)
            self.assertTrue(daemon.processes(run_id))
            self.assertEqual(daemon.fold(run_id).state, "RUNNING")
            daemon.restart()
            cancel(daemon, run_id)
            self.assertEqual(daemon.wait_for(run_id).state, "CANCELLED")


if __name__ == "__main__":
    unittest.main()
