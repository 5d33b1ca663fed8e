"""Tests of wfd.supervisor, wfd.requests, wfd.watchers and wfd.__main__: a real daemon, real steps, over its socket.

What happens when the daemon is killed is in test_crash.py, as far as it is not about watchers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import inspect
import io
import itertools
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar
from unittest import mock

from tests import logs
from tests.daemon import DEADLINE_SEC, MARK, ROOT, Client, Daemon, Refused, prlimit, shared, step, until, wait_until
from tests.loop import LoopTest
from wfd import VERSION, __main__, process, protocol, supervisor
from wfd.__main__ import main
from wfd.definition import MAX_DURATION_SEC
from wfd.events import FORMAT, RULES, AttemptExited, Line, RunSubmitted, StepRetried, StepStarted
from wfd.journal import Journal
from wfd.paths import Home
from wfd.requests import Environment
from wfd.watchers import Batch, Watchers

# Steps of a workflow that is large beside all slots together. (The sizes that a definition may have are in test_definition.)
MANY = 200


def seqs(lines: Iterable[Line], name: str, **fields: object) -> list[int]:
    """Where in a log such events are."""
    return [line.seq for line in lines if line.event.name == name
            and all(getattr(line.event, field) == value for field, value in fields.items())]  # fmt: skip


def parallel(lines: Iterable[Line]) -> int:
    """How many steps of a run were RUNNING at the same time, at most."""
    running = most = 0
    for line in lines:
        if line.event.name == "step_started":
            running += 1
        elif line.event.name in ("step_succeeded", "step_failed", "step_retried"):
            running -= 1
        most = max(most, running)
    return most


class DaemonTest(unittest.TestCase):
    def refused(self, daemon: Daemon, method: str, **params: object) -> Refused:
        with self.assertRaises(Refused) as caught:
            daemon.request(method, **params)
        return caught.exception

    def hand_over(self, daemon: Daemon, request: bytes) -> Client:
        """Start it as a client does: born with a connection that has a request in it."""
        ours, theirs = socket.socketpair()
        with theirs:
            ours.sendall(request)
            started = daemon.spawn("--handover-fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),))
        if daemon.process is None:
            daemon.process = started
        client = Client(ours)
        self.addCleanup(client.close)
        return client


class TestOrder(DaemonTest):
    """P5: what runs when."""

    def test_a_diamond(self) -> None:
        with shared() as daemon:
            say = "echo $WFD_STEP_ID >> order"
            run_id = daemon.submit(
                step("d", say, "b", "c"), step("b", say, "a"), step("c", say, "a"), step("a", say), step("alone", "true")
            )
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            order = daemon.read("order").split()
            self.assertEqual((order[0], sorted(order[1:3]), order[3]), ("a", ["b", "c"], "d"))
            lines = daemon.events(run_id)
            for before, after in ("ab", "ac", "bd", "cd"):
                self.assertLess(seqs(lines, "step_succeeded", step=before), seqs(lines, "step_started", step=after))
            self.assertEqual(lines[-1].event.name, "run_finished")

    def test_many_side_by_side(self) -> None:
        with shared() as daemon:
            names = [f"s{number}" for number in range(MANY)]
            say = "echo $WFD_STEP_ID >> order"
            run_id = daemon.submit(
                step("first", say), *(step(name, say, "first") for name in names), step("last", say, *names)
            )
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            order = daemon.read("order").split()
            self.assertEqual((order[0], order[-1]), ("first", "last"))
            self.assertEqual(Counter(order), Counter(["first", *names, "last"]), "each of them once")

    def test_many_in_a_row(self) -> None:
        with shared() as daemon:
            say = "echo $WFD_STEP_ID >> order"
            steps = [step(f"s{number}", say, *[f"s{number - 1}"] * bool(number)) for number in range(MANY)]
            run_id = daemon.submit(*reversed(steps))
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            self.assertEqual(daemon.read("order").split(), [f"s{number}" for number in range(MANY)])

    def test_independent_steps_run_at_the_same_time(self) -> None:
        with shared() as daemon:
            # None of them ends before all have begun.
            meet = "echo x >> here; while [ $(grep -c x here) -lt 5 ]; do sleep 0.01; done"
            run_id = daemon.submit(*(step(f"s{number}", meet) for number in range(5)))
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            lines = daemon.events(run_id)
            self.assertLess(max(seqs(lines, "step_started")), min(seqs(lines, "attempt_exited")))

    def test_what_depends_on_a_failure_is_skipped_and_the_rest_goes_on(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(
                step("bad", "exit 3"), step("after", "true", "bad"), step("later", "true", "after", "good"),
                step("good", "true"), step("other", "true", "good"),
            )  # fmt: skip
            run = daemon.wait_for(run_id)
            self.assertEqual((run.state, run.reason), ("FAILED", "steps_failed"))
            self.assertEqual(
                daemon.states(run_id),
                {"bad": "FAILED", "after": "SKIPPED", "later": "SKIPPED", "good": "SUCCEEDED", "other": "SUCCEEDED"},
            )
            steps = {each["id"]: each for each in daemon.request("status", run_id=run_id)["steps"]}
            self.assertEqual((steps["bad"]["exit_code"], steps["bad"]["reason"]), (3, "exit"))
            self.assertEqual((steps["after"]["because"], steps["later"]["because"]), ("bad", "after"))


class TestSlots(DaemonTest):
    def test_a_run_s_own_limit(self) -> None:
        with shared() as daemon:
            # The first two wait for each other, so two slots there must be; the log shows that there were no more.
            meet = "echo x >> here; while [ $(grep -c x here) -lt 2 ]; do sleep 0.01; done"
            run_id = daemon.submit(*(step(f"s{number}", meet) for number in range(8)), max_parallel=2)
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            self.assertEqual(parallel(daemon.events(run_id)), 2)

    def test_the_daemon_s_limit_holds_for_all_runs_together(self) -> None:
        with Daemon("--max-parallel", "3") as daemon:
            self.assertEqual(daemon.request("hello", protocol_min=1, protocol_max=1)["max_parallel"], 3)
            meet = "echo + >> here; while [ $(grep -c + here) -lt 3 ]; do sleep 0.01; done; sleep 0.02; echo - >> here"
            runs = [daemon.submit(*(step(f"s{number}", meet) for number in range(6))) for _ in range(3)]
            for run_id in runs:
                self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            signs = daemon.read("here").split()
            self.assertEqual(Counter(signs), {"+": 18, "-": 18})
            self.assertEqual(max(itertools.accumulate(1 if sign == "+" else -1 for sign in signs)), 3)

    def test_slots_are_given_to_runs_in_turn(self) -> None:
        with Daemon("--max-parallel", "1") as daemon:
            say = "echo $WFD_RUN_ID >> order"
            gate = step("s0", until("go"))
            first = daemon.submit(gate, *(step(f"s{number}", say) for number in range(1, 16)), run_id="first")
            second = daemon.submit(*(step(f"s{number}", say) for number in range(15)), run_id="second")
            daemon.touch("go")
            for run_id in (first, second):
                self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            order = daemon.read("order").split()
            self.assertEqual(len(order), 30)
            ahead = itertools.accumulate(1 if run_id == "first" else -1 for run_id in order)
            # The second's first turn is one step, since nobody knows yet how long its steps take.
            self.assertLess(max(map(abs, ahead)), 2 * supervisor.TURN_STEPS)

    def test_a_slot_is_free_again_after_any_end(self) -> None:
        with Daemon("--max-parallel", "1") as daemon:
            for command, fields in (("exit 1", {}), ("kill -9 $$", {}), ("sleep 9", {"timeout_sec": 0.05, "grace_sec": 0}),
                                    ("true", {"cwd": "/no/such"})):  # fmt: skip
                daemon.submit(step("a", command, **fields))
            self.assertEqual(daemon.wait_for(daemon.submit(step("a", "true"))).state, "SUCCEEDED")
            self.assertEqual(daemon.request("hello", protocol_min=1, protocol_max=1)["live_steps"], 0)


def create(loop: supervisor.Supervisor, run_id: str, *steps: dict[str, object]) -> None:
    """A run that nobody has submitted."""
    submitted = RunSubmitted(run_id, FORMAT, RULES, loop.boot_id, "/", logs.workflow(*steps))
    loop.create(submitted, Environment({}, 0o022, {}))


class TestTurns(LoopTest):
    """Without processes."""

    def test_a_turn_is_some_steps_of_a_run_whose_steps_are_quick(self) -> None:
        some = supervisor.TURN_STEPS
        for quick_ms, expected in ((-1, [1] * 18), (1_000_000, [1, 1, *[some] * 4])):
            with self.subTest(quick_ms=quick_ms), mock.patch.object(supervisor, "QUICK_MS", quick_ms):
                starts = self.starts(1 + 2 * some, slots=1)
                self.assertEqual([len(list(turn)) for _, turn in itertools.groupby(starts)], expected)

    def test_slots_that_are_free_together_are_shared(self) -> None:
        starts = self.starts(2 * supervisor.TURN_STEPS, slots=supervisor.TURN_STEPS)
        half = supervisor.TURN_STEPS // 2
        self.assertEqual(Counter(starts[: supervisor.TURN_STEPS]), {b"first": half, b"second": half})

    def starts(self, count: int, slots: int) -> list[bytes]:
        """Which of two runs of so many steps is given a slot, each time."""
        self.home = self.fresh_home()
        loop = self.loop(slots)
        for run_id in ("first", "second"):
            create(loop, run_id, *(logs.step(f"s{number}") for number in range(count)))
        starts = []

        def start(launch: process.Launch) -> process.Outcome:
            starts.append(launch.environ[b"WFD_RUN_ID"])
            return process.Outcome("exited", 0)

        with mock.patch.object(process, "start", start):
            while loop.live:
                loop.turn(loop.now_ms)
        return starts


class TestQuarantine(LoopTest):
    """P7: a run of which the daemon's own check fails while a cancel of it is made durable. Its steps go on."""

    def setUp(self) -> None:
        super().setUp()
        self.started: list[bytes] = []
        self.enterContext(mock.patch.multiple(process, start=self.start))
        self.enterContext(mock.patch.object(supervisor, "log"))

    def start(self, launch: process.Launch) -> int:
        """A number that no process has."""
        self.started.append(launch.environ[b"WFD_RUN_ID"])
        return 2**30 + len(self.started)

    def cancel(self, loop: supervisor.Supervisor, run_id: str) -> dict[str, Any]:
        with mock.patch.object(Journal, "commit", side_effect=AssertionError("that cannot be")):
            return self.ask(loop, "cancel", run_id=run_id, request="q")

    def test_its_slots_are_free_again(self) -> None:
        loop = self.loop(max_parallel=1)
        for run_id in ("bad", "good"):
            create(loop, run_id, logs.step("a"))
        loop.turn(loop.now_ms)
        self.assertEqual(self.started, [b"bad"])
        self.cancel(loop, "bad")
        loop.turn(loop.now_ms)
        self.assertEqual(self.started, [b"bad", b"good"])
        self.assertEqual(loop.running, 1)

    def test_what_it_was_asked_for_in_that_turn_is_refused(self) -> None:
        """The lines that say so are whole in its log, and perhaps not on the disk."""
        loop = self.loop()
        create(loop, "r1", logs.step("a"))
        loop.turn(loop.now_ms)
        self.assertEqual(self.cancel(loop, "r1")["error"]["code"], protocol.DAMAGED)


class TestSubmitting(DaemonTest):
    def test_the_same_run_twice_is_one_run(self) -> None:
        with Daemon() as daemon:
            params = daemon.submission(step("a", f"echo x >> out; {until('go')}"), run_id="r1")
            answers = [daemon.request("submit", **params) for _ in range(2)]
            self.assertEqual([answer["created"] for answer in answers], [True, False])
            self.assertEqual([answer["state"] for answer in answers], ["RUNNING", "RUNNING"])
            other = daemon.submission(step("a", "echo other"), run_id="r1")
            refused = self.refused(daemon, "submit", **other)
            self.assertEqual(refused.code, protocol.RUN_EXISTS)
            self.assertIn("r1 exists and has another definition", refused.message)
            daemon.touch("go")
            daemon.wait_for("r1", "SUCCEEDED")
            for again in ("finished", "after a restart"):
                with self.subTest(again):
                    if again != "finished":
                        daemon.restart()
                    answer = daemon.request("submit", **params)
                    self.assertEqual((answer["created"], answer["state"]), (False, "SUCCEEDED"))
                    self.assertEqual(self.refused(daemon, "submit", **other).code, protocol.RUN_EXISTS)
            self.assertEqual(daemon.read("out"), "x\n")

    def test_the_same_run_from_many_clients_at_once(self) -> None:
        with shared() as daemon:
            line = protocol.request("submit", daemon.submission(step("a", "echo x >> out"), run_id="from-many"))
            clients = [daemon.connect() for _ in range(20)]
            for client in clients:
                client.send(line)
            answers = [client.message()["result"] for client in clients]
            for client in clients:
                client.close()
            self.assertEqual([answer["created"] for answer in answers].count(True), 1)
            daemon.wait_for("from-many", "SUCCEEDED")
            self.assertEqual(daemon.read("out"), "x\n")
            self.assertEqual(daemon.names("from-many").count("run_submitted"), 1)

    def test_many_runs_at_once(self) -> None:
        with shared() as daemon:
            lines = [protocol.request("submit", daemon.submission(step("a", "true")), number) for number in range(40)]
            with daemon.connect() as client:
                client.send(b"".join(lines))
                answers = [client.message() for _ in lines]
            self.assertEqual([answer["id"] for answer in answers], list(range(40)))
            for answer in answers:
                daemon.wait_for(answer["result"]["run_id"], "SUCCEEDED")
            daemon.wait_until_let_go()

    def test_a_refused_definition_leaves_no_run(self) -> None:
        with shared() as daemon:
            before = os.listdir(daemon.home.runs)
            refused = self.refused(daemon, "submit", **daemon.submission(step("a", "true", "a"), run_id="refused"))
            self.assertEqual(refused.code, protocol.INVALID_DEFINITION)
            self.assertEqual(self.refused(daemon, "status", run_id="refused").code, protocol.NO_SUCH_RUN)
            self.assertEqual(os.listdir(daemon.home.runs), before)


class TestWhatStepsGet(DaemonTest):
    DAEMON_ONLY = {  # noqa: RUF012
        "DAEMON_ONLY": "1", "LISTEN_FDNAMES": "x", "WATCHDOG_USEC": "5000000", "NOTIFY_SOCKET": "/no/such/socket",
    }  # fmt: skip

    def test_the_environment_in_layers(self) -> None:
        with Daemon(environ=self.DAEMON_ONLY) as daemon:
            run_id = daemon.submit(
                step("a-step", "env -0 | tr '\\0' '\\t'", env={"C": "step", "E": "é\"'$"}),
                environment={"A": "client", "B": "client", "C": "client", "NOTIFY_SOCKET": "/somewhere"},
                env={"B": "workflow", "C": "workflow", "D": "workflow"},
            )
            daemon.wait_for(run_id, "SUCCEEDED")
            seen = dict(entry.split("=", 1) for entry in daemon.output(run_id, "a-step").split("\t") if entry)
            for shells_own in ("PWD", "OLDPWD", "SHLVL", "_", "LOGNAME"):
                self.assertNotIn(ROOT, seen.pop(shells_own, ""))
            self.assertEqual(
                seen,
                {"PATH": os.environ["PATH"], MARK: daemon.mark, "A": "client", "B": "workflow", "C": "step",
                 "D": "workflow", "E": "é\"'$", "WFD_WORKFLOW_ID": "w", "WFD_RUN_ID": run_id,
                 "WFD_STEP_ID": "a-step", "WFD_ATTEMPT": "1"},
            )  # fmt: skip

    def test_the_attempt_is_told_its_number(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(step("a", "echo $WFD_ATTEMPT >> out; [ $WFD_ATTEMPT = 3 ]", retries=5,
                                        backoff={"initial_sec": 0}))  # fmt: skip
            daemon.wait_for(run_id, "SUCCEEDED")
            self.assertEqual(daemon.read("out").split(), ["1", "2", "3"])

    def test_the_directory(self) -> None:
        with shared() as daemon:
            for name in ("client", "workflow", "workflow/step one"):
                os.mkdir(f"{daemon.directory}/{name}")
            where = "pwd -P > $OUT"
            client = daemon.submit(step("a", where, env={"OUT": f"{daemon.directory}/1"}),
                                   directory=f"{daemon.directory}/client")  # fmt: skip
            layered = daemon.submit(
                step("a", where, env={"OUT": f"{daemon.directory}/2"}),
                step("b", where, cwd="step one", env={"OUT": f"{daemon.directory}/3"}),
                cwd=f"{daemon.directory}/workflow",
            )
            for run_id in (client, layered):
                daemon.wait_for(run_id, "SUCCEEDED")
            found = [os.path.basename(daemon.read(name).strip()) for name in "123"]
            self.assertEqual(found, ["client", "workflow", "step one"])

    def test_a_directory_that_is_not_there_fails_the_attempt(self) -> None:
        with shared() as daemon:
            missing = f"{daemon.directory}/missing"
            run_id = daemon.submit(step("a", "true", cwd=missing, retries=1, backoff={"initial_sec": 0}))
            self.assertEqual(daemon.wait_for(run_id).state, "FAILED")
            self.assertEqual(daemon.names(run_id).count("attempt_not_started"), 2)
            self.assertEqual(daemon.fold(run_id).steps[0].reason, "not_started")

    def test_the_umask_and_the_limits(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(step("a", "umask; ulimit -n; ulimit -c"), umask=0o031, limits={"nofile": 123, "core": 0})
            daemon.wait_for(run_id, "SUCCEEDED")
            umask, nofile, core = daemon.output(run_id, "a").split()
            self.assertEqual((int(umask, 8), nofile, core), (0o031, "123", "0"))

    def test_no_descriptor_of_the_daemon(self) -> None:
        # Not those that it has opened, nor those that whoever started it had left open.
        left_open = [os.open(os.devnull, os.O_RDONLY)]
        left_open += [fcntl.fcntl(left_open[0], fcntl.F_DUPFD, lowest) for lowest in (9, 10, 40)]
        daemon = Daemon()
        self.addCleanup(daemon.clean)
        daemon.await_answer(daemon.spawn(pass_fds=tuple(left_open)))
        for fd in left_open:
            os.close(fd)
        with daemon.connect():
            live = daemon.submit(step("a", until("go")))
            run_id = daemon.submit(step("a", "exec ls /dev/fd/"))
            daemon.wait_for(run_id, "SUCCEEDED")
            self.assertEqual(daemon.output(run_id, "a").split(), ["0", "1", "2", "3"])
            daemon.touch("go")
            daemon.wait_for(live, "SUCCEEDED")
        daemon.check()

    def test_values_of_the_environment_are_in_one_private_file(self) -> None:
        """P10."""
        secret = "correct-horse-battery"
        with shared() as daemon:
            run_id = daemon.submit(step("a", until("go")), environment={"PASSWORD": secret})
            daemon.wait_for_event(run_id, "step_started")
            wait_until(lambda: daemon.processes(run_id), "the step")
            if os.path.exists("/proc/self/cmdline"):
                for pid in daemon.processes(run_id):
                    with open(f"/proc/{pid}/cmdline", "rb") as file:
                        self.assertNotIn(secret.encode(), file.read())
            self.assertNotIn(secret, json.dumps([daemon.request("status", run_id=run_id), daemon.request("list")]))
            daemon.touch("go")
            daemon.wait_for(run_id, "SUCCEEDED")
            found = []
            for directory, _, names in os.walk(daemon.base):
                for name in names:
                    path = os.path.join(directory, name)
                    if os.path.isfile(path):
                        with open(path, "rb") as file:
                            found += [path] * (secret.encode() in file.read())
            environment = daemon.home.run(run_id).environment
            self.assertEqual(found, [environment])
            self.assertEqual(os.stat(environment).st_mode & 0o777, 0o600)

    def test_standard_input_is_empty_and_output_is_whole(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(
                step("a", "cat; i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; echo e >&2")
            )
            daemon.wait_for(run_id, "SUCCEEDED")
            self.assertEqual(daemon.output(run_id, "a"), "".join(f"line {n}\n" for n in range(5_000)) + "e\n")


class TestRetries(DaemonTest):
    def test_delays_are_the_formula_s(self) -> None:
        backoff = {"initial_sec": 0.02, "factor": 3, "max_sec": 0.1}
        with shared() as daemon:
            run_id = daemon.submit(step("a", "exit 3", retries=4, backoff=backoff))
            self.assertEqual(daemon.wait_for(run_id).state, "FAILED")
            lines = daemon.events(run_id)
            delays = [line.event.delay_ms for line in lines if isinstance(line.event, StepRetried)]
            self.assertEqual(delays, [20, 60, 100, 100])
            self.assert_waited(lines)

    def test_a_jitter_is_drawn_and_recorded(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(step("a", "exit 3", retries=6, backoff={"initial_sec": 0.03, "factor": 1, "jitter": 0.5}))
            self.assertEqual(daemon.wait_for(run_id).state, "FAILED")
            lines = daemon.events(run_id)
            backoff = daemon.fold(run_id).workflow.steps[0].backoff
            draws = [line.event.draw_ppm for line in lines if isinstance(line.event, AttemptExited)]
            delays = [line.event.delay_ms for line in lines if isinstance(line.event, StepRetried)]
            self.assertEqual(delays, [backoff.delay_ms(n, draw or 0) for n, draw in enumerate(draws[:6], 1)])
            self.assertGreater(len(set(draws)), 1)
            self.assert_waited(lines)

    def assert_waited(self, lines: list[Line]) -> None:
        earliest_ms = 0
        for line in lines:
            if isinstance(line.event, StepRetried):
                earliest_ms = line.mono_ms + line.event.delay_ms
            elif isinstance(line.event, StepStarted):
                self.assertGreaterEqual(line.mono_ms, earliest_ms)

    def test_others_go_on_during_a_back_off(self) -> None:
        with Daemon("--max-parallel", "1") as daemon:
            # The second attempt of a waits for what only b can make, so b must run meanwhile.
            run_id = daemon.submit(
                step("a", "[ $WFD_ATTEMPT = 2 ] && [ -e b ]", retries=1, backoff={"initial_sec": 0.3}), step("b", "touch b")
            )
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")

    def test_a_person_s_retry(self) -> None:
        with shared() as daemon:
            say = "echo $WFD_STEP_ID $WFD_ATTEMPT >> out"
            run_id = daemon.submit(
                step("a", say),
                step("b", f"{say}; [ -e fixed ]", "a", retries=1, backoff={"initial_sec": 0}),
                step("c", say, "b"),
            )
            self.assertEqual(daemon.wait_for(run_id).state, "FAILED")
            with daemon.watch(run_id) as watcher:
                daemon.touch("fixed")
                answer = daemon.request("retry", run_id=run_id, request="q1")
                self.assertEqual(answer, {"run_id": run_id, "state": "RUNNING"})
                daemon.wait_for(run_id, "SUCCEEDED")
                whole = [line.seq for line in daemon.events(run_id)]
                self.assertEqual(watcher.seqs(len(whole)), whole)
            self.assertEqual(daemon.read("out").splitlines(), ["a 1", "b 1", "b 2", "b 3", "c 1"])
            refused = self.refused(daemon, "retry", run_id=run_id, request="q2")
            self.assertEqual((refused.code, "nothing to try again" in refused.message), (protocol.NOT_FINISHED, True))

    def test_a_retry_that_is_repeated_changes_nothing(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(step("a", f"echo x >> out; [ $WFD_ATTEMPT = 1 ] || {until('go')}; exit 1"))
            daemon.wait_for(run_id, "FAILED")
            for _ in range(2):
                self.assertEqual(daemon.request("retry", run_id=run_id, request="q1")["state"], "RUNNING")
            self.assertEqual(self.refused(daemon, "retry", run_id=run_id, request="q2").code, protocol.NOT_FINISHED)
            daemon.touch("go")
            daemon.wait_for(run_id, "FAILED")
            # The client has not heard the first answer, and the run is over again meanwhile.
            self.assertEqual(daemon.request("retry", run_id=run_id, request="q1")["state"], "FAILED")
            self.assertEqual(daemon.names(run_id).count("run_retried"), 1)
            self.assertEqual(daemon.read("out"), "x\nx\n")
            daemon.wait_until_let_go()

    def test_a_retry_that_is_repeated_after_the_new_end_is_answered_alike(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(step("a", "[ $WFD_ATTEMPT = 2 ]"))
            daemon.wait_for(run_id, "FAILED")
            daemon.request("retry", run_id=run_id, request="q1")
            daemon.wait_for(run_id, "SUCCEEDED")
            daemon.wait_until_let_go()
            self.assertEqual(daemon.request("retry", run_id=run_id, request="q1")["state"], "SUCCEEDED")
            with self.assertRaises(Refused):
                daemon.request("retry", run_id=run_id, request="q2")

    def test_a_retry_at_the_moment_of_the_end(self) -> None:
        with shared() as daemon:
            assert daemon.process is not None
            run_id = daemon.submit(step("a", f"{until('go')}; [ $WFD_ATTEMPT = 2 ]"))
            daemon.wait_for_event(run_id, "step_started")
            wait_until(lambda: daemon.processes(run_id), "the step")
            with daemon.connect() as client:
                # The end and the request reach the daemon in the same turn.
                daemon.process.send_signal(signal.SIGSTOP)
                daemon.touch("go")
                wait_until(lambda: not daemon.processes(run_id), "the step's end")
                client.send(protocol.request("retry", {"run_id": run_id, "request": "q1"}))
                daemon.process.send_signal(signal.SIGCONT)
                answer = client.message()
            if "error" in answer:
                self.assertEqual(answer["error"]["code"], protocol.NOT_FINISHED)
                daemon.wait_for(run_id, "FAILED")
            else:
                self.assertEqual(answer["result"]["state"], "RUNNING")
                daemon.wait_for(run_id, "SUCCEEDED")
                self.assertEqual(daemon.names(run_id).count("run_retried"), 1)

    def test_a_cancelled_run_may_be_retried(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(step("a", until("go")), step("b", "true", "a"))
            daemon.wait_for_event(run_id, "step_started")
            self.assertEqual(daemon.request("cancel", run_id=run_id, request="q1")["state"], "CANCELLING")
            daemon.wait_for(run_id, "CANCELLED")
            daemon.touch("go")
            daemon.request("retry", run_id=run_id, request="q2")
            daemon.wait_for(run_id, "SUCCEEDED")


class TestTimeouts(DaemonTest):
    """Timeouts here are long beside what a loaded machine needs to start a command, which must have begun by then. All the
    runs wait at the same time."""

    WORKFLOWS: ClassVar[dict[str, dict[str, Any]]] = {
        # It leaves somebody in the background, too.
        "too-long": {"steps": [step("a", "sleep 1000 & echo $WFD_ATTEMPT >> out; sleep 1000", retries=2, timeout_sec=0.8,
                                    grace_sec=5, backoff={"initial_sec": 0.02})]},
        "ignores-it": {"steps": [step("a", "trap '' TERM; (trap '' TERM; sleep 1000) & sleep 1000", timeout_sec=0.8,
                                      grace_sec=0.1)]},
        "exits": {"steps": [step("a", "trap 'exit 0' TERM; while :; do sleep 0.01; done", timeout_sec=0.8)]},
        "in-time": {"steps": [step("a", "true", timeout_sec=1.5), step("b", "sleep 1.8", "a", timeout_sec=60)]},
        "whole-run": {"timeout_sec": 1.5, "steps": [
            step("done", "true"), step("long", "trap '' TERM; sleep 1000", grace_sec=0.05), step("next", "true", "long"),
            step("again", "exit 1", retries=1, backoff={"initial_sec": 100, "max_sec": 100}),
        ]},
        "retried": {"timeout_sec": 1.5, "steps": [step("a", "[ $WFD_ATTEMPT = 2 ] || sleep 1000")]},
    }  # fmt: skip
    daemon: ClassVar[Daemon]

    @classmethod
    def setUpClass(cls) -> None:
        cls.daemon = Daemon()
        cls.addClassCleanup(cls.daemon.clean)
        cls.daemon.start()
        for run_id, fields in cls.WORKFLOWS.items():
            cls.daemon.submit(*fields["steps"], run_id=run_id, **{name: fields[name] for name in fields if name != "steps"})

    @classmethod
    def tearDownClass(cls) -> None:
        cls.daemon.check()

    def test_a_step_that_takes_too_long_fails_and_is_tried_again(self) -> None:
        run = self.daemon.wait_for("too-long")
        self.assertEqual((run.state, run.steps[0].reason, run.steps[0].attempt), ("FAILED", "timeout", 3))
        lines = self.daemon.events("too-long")
        names = [line.event.name for line in lines if line.event.name.startswith(("attempt", "step_"))]
        one = ["step_started", "attempt_timed_out", "attempt_exited"]
        self.assertEqual(names, ["step_ready", *one, "step_retried", *one, "step_retried", *one, "step_failed"])
        self.assertEqual([line.event.delay_ms for line in lines if isinstance(line.event, StepRetried)], [20, 40])
        self.assertEqual(self.daemon.read("out").split(), ["1", "2", "3"])

    def test_one_that_ignores_it_is_killed_when_its_grace_is_over(self) -> None:
        run = self.daemon.wait_for("ignores-it")
        self.assertEqual((run.state, run.steps[0].reason, run.steps[0].exit_code), ("FAILED", "timeout", None))

    def test_an_exit_status_after_the_timeout_counts_as_the_timeout(self) -> None:
        run = self.daemon.wait_for("exits")
        self.assertEqual((run.state, run.steps[0].reason, run.steps[0].exit_code), ("FAILED", "timeout", 0))

    def test_one_that_ends_in_time_is_not_touched(self) -> None:
        self.assertEqual(self.daemon.wait_for("in-time").state, "SUCCEEDED")
        self.assertNotIn("attempt_timed_out", self.daemon.names("in-time"))

    def test_the_run_s_own_timeout(self) -> None:
        run = self.daemon.wait_for("whole-run")
        self.assertEqual((run.state, run.reason), ("FAILED", "run_timeout"))
        self.assertEqual(
            self.daemon.states("whole-run"),
            {"done": "SUCCEEDED", "long": "CANCELLED", "next": "CANCELLED", "again": "CANCELLED"},
        )
        self.assertEqual({record.reason for record in run.steps}, {None, "run_timeout"})

    def test_a_retried_run_has_its_time_again(self) -> None:
        self.daemon.wait_for("retried", "FAILED")
        self.daemon.request("retry", run_id="retried", request="q1")
        self.daemon.wait_for("retried", "SUCCEEDED")


WATCHER = """
import json, socket, sys, time
path, run_id, seq = sys.argv[1], sys.argv[2], int(sys.argv[3])
last = ""
while last != "run_finished":
    try:
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        params = {"run_id": run_id, "from_seq": seq}
        client.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "watch", "params": params}).encode() + b"\\n")
        for line in client.makefile("rb"):
            message = json.loads(line)
            if message.get("method") == "event":
                event = message["params"]["line"]
                print(event["seq"], event["crc"], flush=True)
                seq, last = event["seq"] + 1, event["event"]
                if last == "run_finished":
                    break
    except OSError:
        pass
    time.sleep(0.01)
"""


class TestWatchers(DaemonTest):
    def test_eight_of_them_one_stopped_across_a_kill(self) -> None:
        """P11."""
        with Daemon() as daemon:
            names = [f"s{number}" for number in range(80)]
            run_id = daemon.submit(
                *(step(name, "true") for name in names[:40]), step("gate", until("go"), *names[:40]),
                *(step(name, "true", "gate") for name in names[40:]),
            )  # fmt: skip
            starts = [1, 1, 2, 3, 30, 1, 50]
            # Who asks for more than there is gets what comes next.
            wait_until(lambda: len(daemon.events(run_id)) >= max(starts), "the first lines", daemon.explain)
            watchers = [self.watcher(daemon, run_id, seq) for seq in starts]
            watchers[0].send_signal(signal.SIGSTOP)
            daemon.wait_for_event(run_id, "step_started", step="gate")
            # One that joins late, where the log is already long.
            middle = daemon.events(run_id)[-1].seq
            starts.append(middle)
            watchers.append(self.watcher(daemon, run_id, middle))
            daemon.restart()
            daemon.touch("go")
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            self.assertEqual(daemon.request("list"), {"runs": []}, "it still answers")
            with open(daemon.home.run(run_id).events, "rb") as file:
                events = [json.loads(line) for line in file]
            log = [f"{event['seq']} {event['crc']}" for event in events]
            for seq, watcher in list(zip(starts, watchers, strict=True))[1:]:
                self.assertEqual(self.heard(watcher), log[seq - 1 :])
            watchers[0].send_signal(signal.SIGCONT)
            self.assertEqual(self.heard(watchers[0]), log)

    def watcher(self, daemon: Daemon, run_id: str, seq: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-ISc", WATCHER, daemon.socket_path, run_id, str(seq)]
        watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        self.addCleanup(watcher.wait)
        self.addCleanup(watcher.kill)
        assert watcher.stdout is not None
        self.addCleanup(watcher.stdout.close)
        return watcher

    def heard(self, watcher: subprocess.Popen[str]) -> list[str]:
        return watcher.communicate(timeout=DEADLINE_SEC)[0].splitlines()

    def test_every_starting_point_of_a_finished_run(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(step("a", "true"), step("b", "true", "a"))
            daemon.wait_for(run_id, "SUCCEEDED")
            lines = daemon.events(run_id)
            for from_seq in (-1, 0, *range(1, len(lines) + 1)):
                with self.subTest(from_seq=from_seq), daemon.connect() as client:
                    answer = client.request("watch", run_id=run_id, from_seq=from_seq)
                    self.assertEqual(answer, {"run_id": run_id, "state": "SUCCEEDED", "last_seq": len(lines)})
                    wanted = list(range(max(1, from_seq), len(lines) + 1))
                    self.assertEqual(client.seqs(len(wanted)), wanted)

    def test_who_waits_for_the_end_hears_of_nothing_else(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", until("go") + "; exit 1"))
            other = daemon.submit(step("a", until("other")))
            with daemon.connect() as client:
                answer = client.request("watch", run_id=run_id, from_seq=1, only_end=True)
                self.assertEqual(answer["state"], "RUNNING")
                daemon.touch("other")
                daemon.touch("go")
                line = client.message()["params"]["line"]
                self.assertEqual((line["event"], line["state"]), ("run_finished", "FAILED"))
                self.assertEqual(line["seq"], len(daemon.events(run_id)))
                daemon.wait_for(other, "SUCCEEDED")
                # Of a run that is over it is told in the answer.
                answer = client.request("watch", run_id=run_id, from_seq=1, only_end=True)
                self.assertEqual((answer["state"], answer["last_seq"]), ("FAILED", line["seq"]))
                daemon.request("retry", run_id=run_id, request="again")
                again = client.message()["params"]["line"]
                self.assertEqual((again["event"], again["seq"]), ("run_finished", len(daemon.events(run_id))))

    def test_one_connection_watches_one_run_and_may_ask_meanwhile(self) -> None:
        with shared() as daemon:
            first = daemon.submit(step("a", until("go")))
            second = daemon.submit(step("a", until("go")))
            with daemon.watch(first) as client:
                self.assertEqual(client.request("status", run_id=first)["state"], "RUNNING")
                client.request("watch", run_id=second, from_seq=1)
                daemon.touch("go")
                run_ids = []
                while True:
                    message = client.message()
                    run_ids.append(message["params"]["run_id"])
                    if message["params"]["line"]["event"] == "run_finished":
                        break
                self.assertEqual(set(run_ids), {second})
            daemon.wait_for(first, "SUCCEEDED")

    def test_history_that_is_longer_than_an_outbox(self) -> None:
        with shared() as daemon:
            # Its first line alone is larger than what a watcher may have waiting for it.
            long = "true #" + "x" * 900_000
            run_id = daemon.submit(*(step(f"s{number}", long) for number in range(3)), step("z", "true", "s0", "s1", "s2"))
            daemon.wait_for(run_id, "SUCCEEDED")
            wanted = [line.seq for line in daemon.events(run_id)]
            with daemon.watch(run_id) as client:
                self.assertEqual(client.seqs(len(wanted)), wanted)


class TestFeeding(unittest.TestCase):
    """Without a daemon, so that a bug put into it counts."""

    def test_who_waits_for_the_end_is_sent_the_line_that_ends_the_run(self) -> None:
        sent: list[tuple[str, bytes]] = []
        server = mock.Mock(is_crowded=False, send=lambda to, data: sent.append((to.name, data)))
        watchers = Watchers(Home("/nowhere"), server)

        def add(name: str, end: int, only_end: bool) -> None:
            connection = mock.Mock(is_full=False, is_closed=False, outbox=b"")
            connection.name = name
            watchers.add(connection, "r", 0, end, only_end=only_end)

        add("all", 0, only_end=False)
        add("end", 0, only_end=True)
        watchers.committed(Batch("r", 0, b"1\n2\n", is_end=False))
        watchers.feed()
        watchers.committed(Batch("r", 4, b"3\n4\n", is_end=True))
        add("late", 8, only_end=True)
        watchers.feed()
        first, second = (protocol.notifications("r", b"%d\n%d\n" % seqs) for seqs in ((1, 2), (3, 4)))
        self.assertEqual(sent, [("all", first), ("all", second), ("end", protocol.notifications("r", b"4\n"))])

    def test_who_is_behind_is_sent_all_in_order(self) -> None:
        """What is committed meanwhile waits until it has caught up."""
        log = logs.complete(logs.workflow(*(logs.step(f"s{number}") for number in range(9))))
        place = logs.home(self.enterContext(tempfile.TemporaryDirectory()))
        logs.save(place, log.data, log.run_id)
        sent: list[bytes] = []
        watchers = Watchers(place, mock.Mock(is_crowded=False, send=lambda to, data: sent.append(data)))
        half, *ends = logs.line_ends(log.data)[len(log.lines) // 2 :]
        watchers.add(mock.Mock(is_full=False, is_closed=False, outbox=b""), log.run_id, 0, half, only_end=False)
        with mock.patch("wfd.watchers.FEED_BYTES", 500):
            for start, end in itertools.pairwise([half, *ends]):
                watchers.committed(Batch(log.run_id, start, log.data[start:end], is_end=end == len(log.data)))
                watchers.feed()
            while watchers.is_behind:
                watchers.feed()
        self.assertEqual(b"".join(sent), protocol.notifications(log.run_id, log.data))


class TestAnswers(DaemonTest):
    def test_status_of_a_live_and_of_a_finished_run(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(step("a", until("go")), step("b", "exit 4", "a"))
            daemon.wait_for_event(run_id, "step_started")
            live = daemon.request("status", run_id=run_id)
            self.assertEqual({name: live[name] for name in ("run_id", "workflow_id", "state", "source", "stalled", "cwd")},
                             {"run_id": run_id, "workflow_id": "w", "state": "RUNNING", "source": "daemon", "stalled": None,
                              "cwd": daemon.directory})  # fmt: skip
            self.assertEqual([(each["id"], each["state"]) for each in live["steps"]], [("a", "RUNNING"), ("b", "PENDING")])
            summary = daemon.request("list")["runs"]
            self.assertEqual([(each["run_id"], each["state"], each["steps"], each["running"]) for each in summary],
                             [(run_id, "RUNNING", 2, 1)])  # fmt: skip
            hello = daemon.request("hello", protocol_min=1, protocol_max=1)
            self.assertEqual((hello["active_runs"], hello["live_steps"], hello["version"]), (1, 1, VERSION))
            daemon.touch("go")
            daemon.wait_for(run_id, "FAILED")
            over = daemon.request("status", run_id=run_id)
            self.assertEqual((over["state"], over["reason"]), ("FAILED", "steps_failed"))
            self.assertEqual(over["last_seq"], daemon.events(run_id)[-1].seq)
            self.assertEqual(daemon.request("list"), {"runs": []})
            self.assertEqual(daemon.request("cancel", run_id=run_id, request="q")["state"], "FAILED", "no error")

    def test_a_long_log_is_left_to_the_client(self) -> None:
        with shared() as daemon:
            run_id = daemon.submit(*(step(f"s{number}", "true #" + "x" * 900_000) for number in range(5)))
            daemon.wait_for(run_id, "SUCCEEDED")
            for method, params in (
                ("status", {}), ("cancel", {"request": "q"}), ("watch", {"from_seq": 1, "only_end": True})
            ):  # fmt: skip
                with self.subTest(method=method):
                    self.assertEqual(self.refused(daemon, method, run_id=run_id, **params).code, protocol.READ_THE_LOG)
            self.assertEqual(daemon.request("watch", run_id=run_id, from_seq=1)["state"], "SUCCEEDED")


class TestFaultsOfOneRun(DaemonTest):
    """P7: damage quarantines that run, and only that one."""

    def flip(self, daemon: Daemon, run_id: str, line: int) -> bytes:
        """Change a byte of a line; the file as it is then."""
        path = daemon.home.run(run_id).events
        with open(path, "rb") as file:
            lines = file.read().splitlines(keepends=True)
        lines[line - 1] = lines[line - 1].replace(b'"mono_ms"', b'"mono_mS"')
        with open(path, "wb") as file:
            file.write(b"".join(lines))
        daemon.damaged.add(run_id)
        return b"".join(lines)

    def test_the_others_go_on(self) -> None:
        with Daemon() as daemon:
            runs = [daemon.submit(step("a", f"echo $WFD_RUN_ID >> out; {until('go')}"), step("b", "true", "a"))
                    for _ in range(4)]  # fmt: skip
            for run_id in runs:
                daemon.wait_for_event(run_id, "step_started")
            wait_until(lambda: len(daemon.read("out").split()) == 4, "all four steps")
            daemon.kill()
            first, middle, gone, good = runs
            content = {run_id: self.flip(daemon, run_id, line) for run_id, line in ((first, 1), (middle, 2))}
            os.unlink(daemon.home.run(gone).environment)
            daemon.damaged.add(gone)
            daemon.start()
            daemon.touch("go")
            self.assertEqual(daemon.wait_for(good).state, "SUCCEEDED")
            hello = daemon.request("hello", protocol_min=1, protocol_max=1)
            self.assertEqual((hello["quarantined"], hello["active_runs"]), (sorted([first, middle, gone]), 0))
            for run_id in (first, middle, gone):
                for method, params in (("status", {}), ("cancel", {"request": "q"}), ("retry", {"request": "q"}),
                                       ("watch", {"from_seq": 1})):  # fmt: skip
                    with self.subTest(run_id=run_id, method=method):
                        refused = self.refused(daemon, method, run_id=run_id, **params)
                        self.assertEqual(refused.code, protocol.DAMAGED)
                        self.assertNotIn("\n", refused.message)
            for run_id, data in content.items():
                with open(daemon.home.run(run_id).events, "rb") as file:
                    self.assertEqual(file.read(), data, "it is left as it is")

    def test_a_status_file_that_is_none_makes_the_attempt_lost(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", f"echo $WFD_ATTEMPT >> out; {until('go')}"))
            wait_until(lambda: daemon.read("out"), "the step")
            pids = daemon.processes(run_id)
            daemon.kill()
            daemon.touch("go")
            wait_until(lambda: not daemon.processes(run_id), f"the end of {pids}")
            status = daemon.home.run(run_id).attempt(1, "a", 1).status
            os.unlink(status)
            os.mkdir(status)
            daemon.start()
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            self.assertIn("attempt_lost", daemon.names(run_id))
            self.assertEqual(daemon.read("out").split(), ["1", "2"])


@unittest.skipUnless(prlimit, "only Linux changes another process's limits")
class TestShortages(DaemonTest):
    """P8: no step starts, nothing is lost, and work goes on by itself."""

    def limit(self, daemon: Daemon, spare: int | None) -> None:
        """Let the daemon have so many more descriptors than it has now; None: as many as before."""
        assert daemon.process is not None
        pid = daemon.process.pid
        _, hard = prlimit(pid, resource.RLIMIT_NOFILE)
        taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        free = (number for number in itertools.count() if number not in taken)
        soft = min(hard, 1_024) if spare is None else next(itertools.islice(free, spare, None))
        prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

    def test_no_descriptors(self) -> None:
        with Daemon() as daemon:
            daemon.request("list")
            run_id = daemon.submit(step("a", until("go")), step("b", "echo x >> out", "a"))
            daemon.wait_for_event(run_id, "step_started", step="a")
            wait_until(lambda: daemon.processes(run_id), "the step")
            self.limit(daemon, 0)
            refused = self.refused(daemon, "submit", **daemon.submission(step("a", "true"), run_id="new"))
            self.assertEqual(refused.code, protocol.STALLED)
            daemon.touch("go")
            stalled = wait_until(lambda: daemon.request("status", run_id=run_id)["stalled"], "the stall", daemon.explain)
            self.assertIn(os.strerror(errno.EMFILE), str(stalled))
            self.assertEqual(daemon.read("out"), "")
            self.limit(daemon, None)
            self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
            self.assertEqual(daemon.read("out"), "x\n")
            self.assertTrue(daemon.request("submit", **daemon.submission(step("a", "true"), run_id="new"))["created"])
            daemon.wait_for("new", "SUCCEEDED")


class TestLife(DaemonTest):
    """Homes, locks, sockets, the start and the end of a daemon."""

    def fresh(self, *flags: str, **options: Any) -> Daemon:
        """A daemon that is not started yet."""
        daemon = Daemon(*flags, **options)
        self.addCleanup(daemon.clean)
        return daemon

    def fails(self, daemon: Daemon, *flags: str) -> str:
        """What it says when it cannot start: one sentence, exit 4."""
        process = daemon.spawn(*flags)
        self.assertEqual(process.wait(DEADLINE_SEC), 4, daemon.log())
        said = daemon.log()
        self.assertRegex(said, r"\Awfd: [^\n]+\n\Z")
        os.unlink(daemon.stderr)
        return said

    def test_one_daemon_for_one_home(self) -> None:
        with Daemon() as daemon:
            assert daemon.process is not None
            before = daemon.log()
            second = daemon.spawn()
            self.assertEqual(second.wait(DEADLINE_SEC), 4)
            self.assertRegex(daemon.log()[len(before) :], r"\Awfd: another daemon owns [^\n]+\n\Z")
            daemon.hang_up()
            self.assertEqual(daemon.request("hello", protocol_min=1, protocol_max=1)["pid"], daemon.process.pid)
            self.assertEqual(daemon.wait_for(daemon.submit(step("a", "true"))).state, "SUCCEEDED")

    def test_six_at_once_make_one(self) -> None:
        daemon = self.fresh()
        started = [daemon.spawn() for _ in range(6)]
        wait_until(lambda: sum(each.poll() is not None for each in started) == 5, "five of them to give up")
        self.assertEqual({each.poll() for each in started}, {None, 4})
        daemon.await_answer(next(each for each in started if each.poll() is None))
        self.assertEqual(daemon.wait_for(daemon.submit(step("a", "true"))).state, "SUCCEEDED")
        daemon.check()

    def test_one_replaces_another(self) -> None:
        with Daemon() as daemon:
            old = daemon.process
            assert old is not None
            run_id = daemon.submit(step("a", f"echo x >> out; {until('go')}; exit 7"))
            wait_until(lambda: daemon.read("out"), "the step")
            pids = daemon.processes(run_id)
            daemon.start("--replace")
            self.assertEqual(old.wait(DEADLINE_SEC), 0)
            daemon.hang_up()
            self.assertEqual(daemon.processes(run_id)[0], pids[0], "its step goes on undisturbed")
            daemon.touch("go")
            run = daemon.wait_for(run_id)
            self.assertEqual((run.state, run.steps[0].exit_code, daemon.read("out")), ("FAILED", 7, "x\n"))

    def test_the_lock_file_says_who_it_is(self) -> None:
        with shared() as daemon:
            assert daemon.process is not None
            with open(daemon.home.lock, encoding="utf-8") as file:
                content = json.load(file)
            self.assertEqual((content["pid"], content["socket"], content["version"]),
                             (daemon.process.pid, daemon.socket_path, VERSION))  # fmt: skip

    def test_what_a_killed_daemon_leaves_behind_is_no_obstacle(self) -> None:
        with Daemon() as daemon:
            daemon.kill()
            self.assertTrue(os.path.exists(daemon.socket_path))
            with self.assertRaises(ConnectionRefusedError):
                daemon.connect()
            daemon.start()
            daemon.stop()
            # Nor is anything else that lies there.
            with open(daemon.home.lock, "w", encoding="utf-8") as file:
                file.write("nonsense " * 1_000)
            with open(daemon.home.socket(""), "w", encoding="utf-8") as file:
                file.write("nonsense")
            daemon.start()
            with open(daemon.home.lock, encoding="utf-8") as file:
                self.assertEqual(json.load(file)["socket"], daemon.socket_path)

    def test_an_orderly_end_leaves_steps_and_no_socket(self) -> None:
        with Daemon() as daemon:
            for end in ("SIGTERM", "SIGINT", "shutdown"):
                with self.subTest(end):
                    assert daemon.process is not None
                    command = f"echo x >> {end}; {until(f'go-{end}')}; exit 5"
                    run_id = daemon.submit(step("a", command), step("b", "true", "a"))
                    wait_until(lambda end=end: daemon.read(end), "the step")  # type: ignore[misc]
                    if end == "shutdown":
                        self.assertEqual(daemon.request("shutdown"), {})
                    else:
                        daemon.process.send_signal(getattr(signal, end))
                    self.assertEqual(daemon.ended(), 0)
                    self.assertFalse(os.path.exists(daemon.socket_path))
                    self.assertNotEqual(daemon.processes(run_id), [])
                    daemon.touch(f"go-{end}")
                    daemon.start()
                    run = daemon.wait_for(run_id)
                    self.assertEqual((run.state, run.steps[0].exit_code, daemon.read(end)), ("FAILED", 5, "x\n"))

    def test_a_shutdown_that_cancels(self) -> None:
        with Daemon() as daemon:
            assert daemon.process is not None
            failed = daemon.submit(step("a", "false"))
            daemon.wait_for(failed)
            # They end when we let them, and the daemon with them: not before it was asked all.
            stays = f"trap '' TERM; echo x >> out; {until('go')}"
            runs = [daemon.submit(step("a", stays, grace_sec=2 * DEADLINE_SEC)) for _ in range(3)]
            wait_until(lambda: len(daemon.read("out").split()) == 3, "three steps")
            daemon.request("shutdown", cancel_runs=True)
            refused = self.refused(daemon, "submit", **daemon.submission(step("a", "true")))
            self.assertEqual(refused.code, protocol.SHUTTING_DOWN)
            self.assertEqual(self.refused(daemon, "retry", run_id=failed, request="x").code, protocol.SHUTTING_DOWN)
            daemon.touch("go")
            self.assertEqual(daemon.process.wait(DEADLINE_SEC), 0)
            self.assertEqual({daemon.fold(run_id).state for run_id in runs}, {"CANCELLED"})

    def test_homes_of_all_kinds(self) -> None:
        for name in ("with spaces and 'quotes'", "h" * 200, "ünï/cödé", "$HOME", "new\nline"):
            with self.subTest(home=name), Daemon(home=name) as daemon:
                self.assertEqual(daemon.wait_for(daemon.submit(step("a", "echo done"))).state, "SUCCEEDED")
                self.assertEqual(os.stat(daemon.socket_path).st_mode & 0o777, 0o600)
                self.assertEqual(os.stat(os.path.dirname(daemon.socket_path)).st_mode & 0o777, 0o700)

    def test_homes_that_cannot_be_used(self) -> None:
        daemon = self.fresh()
        path = daemon.home.directory
        with open(path, "w"):
            pass
        self.assertIn("is not a directory", self.fails(daemon))
        os.unlink(path)
        os.symlink(daemon.directory, path)
        self.assertIn("symbolic link", self.fails(daemon))
        os.unlink(path)
        os.mkdir(path, 0o755)
        os.chmod(path, 0o755)
        os.mkdir(path + "/something")
        self.assertIn("chmod 700", self.fails(daemon))
        os.rmdir(path + "/something")
        for obstacle in ("runs", "live"):
            os.chmod(path, 0o700)
            with open(f"{path}/{obstacle}", "w"):
                pass
            self.assertIn("is not a directory", self.fails(daemon))
            os.unlink(f"{path}/{obstacle}")
        for obstacle in ("wfd.lock", "wfd.sock"):
            os.mkdir(f"{path}/{obstacle}")
            self.assertIn(path, self.fails(daemon))
            os.rmdir(f"{path}/{obstacle}")
        daemon.start()
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o700)

    @unittest.skipUnless(os.geteuid() == 0, "only root can give a directory away")
    def test_somebody_else_s_home(self) -> None:
        daemon = self.fresh()
        os.mkdir(daemon.home.directory, 0o700)
        os.chown(daemon.home.directory, 65534, 65534)
        self.assertIn("belongs to uid 65534", self.fails(daemon))

    def test_it_can_wait_for_a_year(self) -> None:
        """A back-off may last so long, and the system's calls count milliseconds in 32 bits."""
        selector = selectors.DefaultSelector()
        self.addCleanup(selector.close)
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        theirs.send(b"x")
        selector.register(ours, selectors.EVENT_READ, lambda sock, mask: sock.recv(1))
        directory = self.enterContext(tempfile.TemporaryDirectory())
        loop = supervisor.Supervisor(Home(directory), "", selector, "boot", "host", 1)
        loop.turn(loop.now_ms + MAX_DURATION_SEC * 1000)
        with self.assertRaises(BlockingIOError):
            ours.recv(1, socket.MSG_DONTWAIT)

    def test_wrong_flags(self) -> None:
        daemon = self.fresh()
        for flags in (["--max-parallel", "0"], ["--max-parallel", "-1"], ["--max-parallel", "1e3"], ["--home", "relative"],
                      ["--idle-exit-sec", "x"], ["--no-such"], ["--max-parallel", "٣"], ["--handover-fd", "-1"],
                      ["--idle-exit-sec", "9" * 5_000]):  # fmt: skip
            with self.subTest(flags=flags), contextlib.redirect_stderr(io.StringIO()) as said:
                with self.assertRaises(SystemExit) as caught:
                    main(["--home", daemon.home.directory, *flags])
                self.assertEqual(caught.exception.code, 2)
                self.assertIn("\nwfd: error: ", said.getvalue())
        self.assertEqual(daemon.spawn("--no-such").wait(DEADLINE_SEC), 2)
        self.assertNotIn("Traceback", daemon.log())
        self.assertFalse(os.path.exists(daemon.home.directory))
        os.unlink(daemon.stderr)
        for descriptor in ("77", "9" * 12):
            self.assertIn("was promised and is not there", self.fails(daemon, "--handover-fd", descriptor))

    def test_a_service_manager_that_talks_nonsense(self) -> None:
        for value in ("", "²", "-1", "x", "9" * 5_000):
            says = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": value, "WATCHDOG_USEC": value, "NOTIFY_SOCKET": "/no/such"}
            with self.subTest(value=value[:9]), mock.patch.dict(os.environ, says):
                self.assertEqual(__main__._passed_sockets(), [])
                notify, heartbeat_ms = __main__._notifier()
                inspect.getclosurevars(notify).nonlocals["sender"].close()
                self.assertIsNone(heartbeat_ms)

    def test_it_ends_when_it_has_nothing_to_do(self) -> None:
        """A live run keeps one, and a client the other, longer than its second; nothing else does."""
        working, listening = self.fresh("--idle-exit-sec", "1"), self.fresh("--idle-exit-sec", "1")
        # Neither is ever without both, from its birth on.
        submission = working.submission(step("a", until("go")), run_id="r1")
        with self.hand_over(working, protocol.request("submit", submission)) as client:
            self.assertTrue(client.message()["result"]["created"])
        with self.hand_over(listening, protocol.request("list", {})) as client:
            self.assertEqual(client.message()["result"], {"runs": []})
            assert working.process is not None
            with self.assertRaises(subprocess.TimeoutExpired):
                working.process.wait(1.3)
            self.assertEqual(client.request("list"), {"runs": []})
        working.touch("go")
        working.wait_for("r1", "SUCCEEDED")
        for daemon in (working, listening):
            self.assertEqual(daemon.ended(), 0)
            self.assertIn("nothing to do for 1 s", daemon.log())


class TestHandOver(DaemonTest):
    """A client that starts the daemon hands it a connection with its request in it."""

    def test_a_cancel_is_decided_before_any_step_starts(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", f"touch begun; {until('go')}"), step("b", "touch b", "a"), step("c", "touch c"),
                                   max_parallel=1)  # fmt: skip
            wait_until(lambda: os.path.exists(f"{daemon.directory}/begun"), "the step")
            daemon.kill()
            daemon.touch("go")
            wait_until(lambda: not daemon.processes(run_id), "the step's end")
            client = self.hand_over(daemon, protocol.request("cancel", {"run_id": run_id, "request": "q"}))
            self.assertIn(client.message()["result"]["state"], ("CANCELLING", "CANCELLED"))
            self.assertEqual(client.request("status", run_id=run_id)["state"], "CANCELLED")
            daemon.wait_for(run_id, "CANCELLED")
            self.assertEqual(daemon.states(run_id), {"a": "SUCCEEDED", "b": "CANCELLED", "c": "CANCELLED"})
            self.assertEqual(daemon.names(run_id).count("step_started"), 1)

    def test_a_submit_is_answered(self) -> None:
        daemon = Daemon()
        self.addCleanup(daemon.clean)
        params = daemon.submission(step("a", "echo hello"), run_id="r1")
        client = self.hand_over(daemon, protocol.request("submit", params))
        self.assertTrue(client.message()["result"]["created"])
        assert daemon.process is not None
        daemon.await_answer(daemon.process)
        daemon.wait_for("r1", "SUCCEEDED")
        daemon.check()

    def test_the_end_instead_of_an_answer_means_that_there_is_another(self) -> None:
        with Daemon() as daemon:
            client = self.hand_over(daemon, protocol.request("list", {}))
            # A reset says so too: the request has not been read.
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(client.line(), b"")
            self.assertIn("another daemon owns", daemon.log())


# What macOS before Python 3.13 lacks, /proc, and what orphans are found by.
ELSEWHERE = """
import os, sys
if hasattr(os, "waitid"):
    del os.waitid
exists = os.path.exists
os.path.exists = lambda path: not str(path).startswith("/proc") and exists(path)
from wfd import machine
from wfd.__main__ import main
machine.keep_orphans = lambda: None
sys.exit(main())
"""


class TestElsewhere(DaemonTest):
    def test_without_waitid_and_proc(self) -> None:
        daemon = Daemon()
        self.addCleanup(daemon.clean)
        daemon.program = ("-c", ELSEWHERE)
        daemon.start()
        names = [f"s{number}" for number in range(30)]
        run_id = daemon.submit(
            *(step(name, "sleep 1000 & exit 0") for name in names), step("last", "exit 3", *names, retries=1,
                                                                         backoff={"initial_sec": 0}),
        )  # fmt: skip
        run = daemon.wait_for(run_id)
        self.assertEqual((run.state, run.steps[-1].exit_code, run.steps[-1].attempt), ("FAILED", 3, 2))
        stubborn = daemon.submit(
            step("a", "trap '' TERM; (trap '' TERM; sleep 1000) & echo x >> out; sleep 1000", grace_sec=0.1)
        )
        wait_until(lambda: daemon.read("out"), "the step")
        daemon.request("cancel", run_id=stubborn, request="q")
        daemon.wait_for(stubborn, "CANCELLED")
        daemon.check()


if __name__ == "__main__":
    unittest.main()
