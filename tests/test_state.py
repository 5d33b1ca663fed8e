"""The transition table, what `apply` takes and refuses, the queues, and what a reboot or a retry does to a run."""

from __future__ import annotations

import unittest
from collections import deque
from typing import Any

from tests import logs
from tests.logs import Log, step, workflow
from wfd.events import (
    AttemptExited,
    AttemptLost,
    AttemptNotStarted,
    AttemptTimedOut,
    Decision,
    Event,
    Line,
    LogRecovered,
    RunCancelRequested,
    RunFinished,
    RunRetried,
    RunTimedOut,
    StepCancelled,
    StepFailed,
    StepReady,
    StepRetried,
    StepSkipped,
    StepStarted,
    StepSucceeded,
)
from wfd.state import Impossible, Run
from wfd.values import Value

# DESIGN §4 in full: what follows for a step of this state, and nothing else does.
STEP_TABLE = {
    "PENDING": {"step_ready": "READY", "step_skipped": "SKIPPED", "step_cancelled": "CANCELLED"},
    "READY": {"step_started": "RUNNING", "step_cancelled": "CANCELLED"},
    "RUNNING": {
        "attempt_exited": "RUNNING",
        "attempt_timed_out": "RUNNING",
        "attempt_lost": "RUNNING",
        "attempt_not_started": "RUNNING",
        "step_succeeded": "SUCCEEDED",
        "step_failed": "FAILED",
        "step_retried": "READY",
        "step_cancelled": "CANCELLED",
    },
    "SUCCEEDED": {},
    "FAILED": {},
    "SKIPPED": {},
    "CANCELLED": {},
}
RUN_TABLE = {
    "RUNNING": {
        "run_cancel_requested": "CANCELLING",
        "run_timed_out": "RUNNING",
        "supervisor_started": "RUNNING",
        "log_recovered": "RUNNING",
    },
    "CANCELLING": {"supervisor_started": "CANCELLING", "log_recovered": "CANCELLING"},
    "SUCCEEDED": {"log_recovered": "SUCCEEDED"},
    "FAILED": {"log_recovered": "FAILED", "run_retried": "RUNNING"},
    "CANCELLED": {"log_recovered": "CANCELLED", "run_retried": "RUNNING"},
}
# Which ends a run may come to, once no step is unfinished.
RUN_ENDS = {"RUNNING": {"SUCCEEDED", "FAILED"}, "CANCELLING": {"CANCELLED"}}


def step_events(attempt: int) -> list[Event]:
    """One of each event of step x, with the attempt number that fits the state."""
    return [
        StepStarted("x", attempt + 1),
        AttemptExited("x", attempt, 0),
        AttemptTimedOut("x", attempt),
        AttemptLost("x", attempt, "killed"),
        AttemptNotStarted("x", attempt, "cwd", ""),
        StepReady("x", 1),
        StepSucceeded("x", 1),
        StepFailed("x", 1, "exit"),
        StepRetried("x", 1, "exit", 0),
        StepSkipped("x", 1, "a"),
        StepCancelled("x", 1, "cancel"),
    ]


RUN_EVENTS: list[Event] = [
    RunCancelRequested("request-9"),
    RunRetried("request-9"),
    RunTimedOut(),
    logs.session(),
    LogRecovered(0),
    Log(workflow()).lines[0].event,
]


def log_with_x(state: str) -> Log:
    """A live run in which step x has this state. Step `k` keeps the run alive."""
    if state in ("PENDING", "SKIPPED"):
        log = Log(workflow(step("a"), step("x", "a"), step("k"))).start("a", "k")
        return log if state == "PENDING" else log.exit("a", 1)
    log = Log(workflow(step("x", retries=1), step("k"))).start("k")
    if state == "CANCELLED":
        return log.cancel()
    if state != "READY":
        log.start("x")
    if state == "SUCCEEDED":
        log.exit("x", 0)
    if state == "FAILED":
        log.exit("x", 1)
        log.now_ms += 1_000
        log.start("x").exit("x", 1)
    return log


def run_in(state: str) -> Log:
    """A run of this state."""
    log = Log(workflow()).start("a")
    if state in ("CANCELLING", "CANCELLED"):
        log.cancel()
    if state in ("SUCCEEDED", "FAILED", "CANCELLED"):
        log.exit("a", 0 if state == "SUCCEEDED" else 1)
    return log


def snapshot(value: Any) -> Any:
    """All that a run holds, as plain values."""
    if hasattr(value, "__slots__") and not isinstance(value, Value):
        return {name: snapshot(getattr(value, name)) for name in value.__slots__}
    if isinstance(value, Run):
        return {name: snapshot(inner) for name, inner in vars(value).items()}
    if isinstance(value, (list, deque)):
        return [snapshot(inner) for inner in value]
    return value.copy() if isinstance(value, (dict, set)) else value


class Table(unittest.TestCase):
    """The whole product of states and events."""

    def outcome(self, log: Log, event: Event) -> bool:
        """Is the event taken? When it is refused, nothing may have changed."""
        before = snapshot(log.run)
        try:
            log.put(event)
            return True
        except Impossible:
            self.assertEqual(snapshot(log.run), before)
            return False

    def test_steps(self) -> None:
        for state, follows in STEP_TABLE.items():
            for event in step_events(log_with_x(state).record("x").attempt):
                with self.subTest(state=state, event=event.name):
                    log = log_with_x(state)
                    self.assertEqual(log.states()["x"], state)
                    if isinstance(event, Decision):
                        # As if it were this step's turn: what is tested here is the table alone.
                        log.run.due.appendleft(log.record("x").index)
                    self.assertEqual(self.outcome(log, event), event.name in follows)
                    self.assertEqual(log.states()["x"], follows.get(event.name, state))

    def test_runs(self) -> None:
        for state, follows in RUN_TABLE.items():
            for event in RUN_EVENTS:
                with self.subTest(state=state, event=event.name):
                    log = run_in(state)
                    self.assertEqual(log.run.state, state)
                    self.assertEqual(self.outcome(log, event), event.name in follows)
                    self.assertEqual(log.run.state, follows.get(event.name, state))

    def test_ends_of_runs(self) -> None:
        for state in RUN_TABLE:
            for end in RUN_TABLE:
                for unfinished in (0, 1):
                    with self.subTest(state=state, end=end, unfinished=unfinished):
                        log = run_in(state)
                        log.run.unfinished = unfinished
                        is_lawful = not unfinished and end in RUN_ENDS.get(state, ())
                        self.assertEqual(self.outcome(log, RunFinished(1, end, "why")), is_lawful)

    def test_nothing_happens_to_a_step_of_a_run_that_is_over(self) -> None:
        for state in ("SUCCEEDED", "FAILED", "CANCELLED"):
            for event in (StepStarted("a", 2), AttemptExited("a", 1, 0), StepReady("a", 1)):
                with self.subTest(state=state, event=event.name):
                    self.assertFalse(self.outcome(run_in(state), event))


class Refusals(unittest.TestCase):
    def refuse(self, log: Log, event: Event, words: str) -> None:
        before = snapshot(log.run)
        with self.assertRaisesRegex(Impossible, words):
            log.put(event)
        self.assertEqual(snapshot(log.run), before)

    def test_a_log_begins_with_run_submitted_as_line_1(self) -> None:
        first = Log(workflow()).lines[0]
        for line in (first._replace(seq=2), first._replace(event=RunTimedOut())):
            with self.assertRaisesRegex(Impossible, "run_submitted as line 1"):
                Run(line)

    def test_seq_goes_on_without_gaps(self) -> None:
        run = Log(workflow()).run
        for seq in (0, 1, 2, 4):
            with self.assertRaisesRegex(Impossible, f"seq {seq} follows 2"):
                run.apply(Line(seq, logs.AT, 1, 0, LogRecovered(0)))

    def test_attempts_are_numbered_without_gaps(self) -> None:
        for number in (0, 2):
            self.refuse(Log(workflow()), StepStarted("a", number), f"names attempt {number}, not 1")
        log = Log(workflow()).start("a")
        for kind in (AttemptExited, AttemptTimedOut):
            self.refuse(log, kind("a", 2), "names attempt 2, not 1")

    def test_unknown_steps(self) -> None:
        self.refuse(Log(workflow()), StepStarted("b", 1), "unknown step 'b'")

    def test_an_attempt_ends_once(self) -> None:
        log = Log(workflow()).start("a")
        log.put(AttemptExited("a", 1, 0))
        for event in (AttemptExited("a", 1, 0), AttemptLost("a", 1, "killed"), AttemptTimedOut("a", 1)):
            self.refuse(log, event, "after its attempt 1 had ended")

    def test_an_attempt_times_out_once(self) -> None:
        self.refuse(Log(workflow()).start("a").time_out("a"), AttemptTimedOut("a", 1), "timed out twice")

    def test_a_decision_out_of_turn(self) -> None:
        self.refuse(Log(workflow()).start("a"), StepSucceeded("a", 3), "was not to be decided now")
        log = Log(workflow(step("a"), step("b"))).start("a", "b")
        log.put(AttemptExited("a", 1, 0))
        log.put(AttemptExited("b", 1, 0))
        self.refuse(log, StepSucceeded("b", 5), "was not to be decided now")

    def test_nothing_starts_after_a_cancel(self) -> None:
        log = Log(workflow())
        log.put(RunCancelRequested("request-1"))
        self.refuse(log, StepStarted("a", 1), "after a cancel")

    def test_an_attempt_that_nobody_ended_has_an_exit_code_or_is_lost(self) -> None:
        log = Log(workflow()).start("a")
        self.refuse(log, AttemptExited("a", 1, None), "as if we had ended it")
        self.refuse(log, AttemptNotStarted("a", 1, "stopped", ""), "as if we had ended it")
        for end in (Log.time_out, lambda log, id: log.cancel()):
            for event in (AttemptExited("a", 1, None), AttemptNotStarted("a", 1, "stopped", "")):
                ended = Log(workflow()).start("a")
                end(ended, "a")
                ended.put(event)


class Queues(unittest.TestCase):
    def test_due_holds_what_is_owed_in_order_and_each_step_once(self) -> None:
        log = Log(logs.diamond()).start("a")
        log.put(AttemptExited("a", 1, 0))
        self.assertEqual(list(log.run.due), [0])
        log.put(StepSucceeded("a", 4))
        self.assertEqual(list(log.run.due), [1, 2])
        log.put(RunCancelRequested("request-1"))
        self.assertEqual(list(log.run.due), [1, 2, 3])

    def test_a_step_waits_for_all_its_dependencies(self) -> None:
        log = Log(logs.diamond()).start("a").exit("a", 0).start("b", "c").exit("c", 0)
        self.assertEqual(log.states()["d"], "PENDING")
        self.assertEqual(log.exit("b", 0).states()["d"], "READY")

    def test_ready_steps_start_in_the_order_in_which_they_became_ready(self) -> None:
        log = Log(workflow(step("c"), step("z", "b"), step("b"), step("a")))
        order = []
        while (index := log.run.startable(log.now_ms)) is not None:
            order.append(log.run.steps[index].step.id)
            self.assertEqual(log.run.startable(log.now_ms), index)
            log.start(order[-1])
            if order[-1] == "b":
                log.exit("b", 0)
        self.assertEqual(order, ["c", "b", "a", "z"])

    def test_a_back_off_holds_its_step_back_and_no_other(self) -> None:
        first_delays = {"a": 3, "b": 1, "c": 2}
        waiting = [step(id, retries=3, backoff={"initial_sec": sec}) for id, sec in first_delays.items()]
        log = Log(workflow(*waiting, step("d"))).start("a", "b", "c")
        for id in ("a", "b", "c"):
            log.exit(id, 1)
        self.assertEqual(log.run.startable(log.now_ms), 3)
        log.start("d")
        seen = []
        for _ in range(3):
            times = sorted(log.record(id).not_before_ms for id in ("a", "b", "c") if log.states()[id] == "READY")
            self.assertIsNone(log.run.startable(times[0] - 1))
            index = log.run.startable(times[0])
            assert index is not None
            log.now_ms = times[0]
            seen.append(log.run.steps[index].step.id)
            log.start(seen[-1])
        self.assertEqual(seen, ["b", "c", "a"])
        self.assertIsNone(log.run.startable(10**9))

    def test_a_cancelled_back_off_starts_nothing(self) -> None:
        log = Log(workflow(step("a", retries=1), step("b"))).start("a", "b").exit("a", 1).cancel()
        self.assertEqual(log.states()["a"], "CANCELLED")
        self.assertIsNone(log.run.startable(10**9))

    def test_slots(self) -> None:
        log = Log(workflow(step("a"), step("b"), step("c"), max_parallel=2))
        self.assertTrue(log.run.has_free_slot())
        log.start("a", "b")
        self.assertFalse(log.run.has_free_slot())
        log.put(AttemptExited("a", 1, 0))
        self.assertFalse(log.run.has_free_slot(), "an attempt keeps its slot until its step is settled")
        log.decide()
        self.assertTrue(log.run.has_free_slot())
        self.assertTrue(Log(workflow()).start("a").run.has_free_slot(), "no limit, no full house")


class Deadlines(unittest.TestCase):
    def test_an_attempt(self) -> None:
        log = Log(workflow(step("a", timeout_sec=2, retries=1))).start("a")
        record = log.record("a")
        self.assertEqual(log.run.attempt_deadline_ms(record), 3_000)
        self.assertIsNone(log.run.ending_since_ms(record))
        log.now_ms = 3_005
        log.time_out("a")
        self.assertIsNone(log.run.attempt_deadline_ms(record))
        self.assertEqual(log.run.ending_since_ms(record), 3_005)
        log.now_ms = 4_000
        log.cancel()
        self.assertEqual(log.run.ending_since_ms(record), 3_005, "the grace began with the timeout")

    def test_the_run(self) -> None:
        log = Log(workflow(timeout_sec=5)).start("a")
        self.assertEqual(log.run.deadline_ms(), 6_000)
        log.now_ms = 6_000
        log.write(RunTimedOut())
        self.assertIsNone(log.run.deadline_ms())
        self.assertEqual(log.run.ending_since_ms(log.record("a")), 6_000)
        self.assertIsNone(Log(workflow()).run.deadline_ms())

    def test_a_cancel_and_a_timeout_are_not_taken_for_each_other(self) -> None:
        log = Log(workflow(timeout_sec=5)).start("a").cancel()
        self.assertEqual((log.run.timed_out, log.run.requests), (False, {"request-1"}))
        late = Log(workflow(timeout_sec=5)).start("a")
        late.now_ms += 5_000
        late.write(RunTimedOut())
        self.assertEqual((late.run.timed_out, late.run.requests), (True, set()))

    def test_none_after_a_cancel_or_the_end(self) -> None:
        log = Log(workflow(step("a", timeout_sec=2), timeout_sec=5)).start("a").cancel()
        self.assertIsNone(log.run.deadline_ms())
        self.assertIsNone(log.run.attempt_deadline_ms(log.record("a")))
        self.assertIsNone(Log(workflow(timeout_sec=5)).start("a").exit("a", 0).run.deadline_ms())


class Sessions(unittest.TestCase):
    """P12, as far as it is the state's: clocks that start anew."""

    def test_another_daemon_of_the_same_boot_changes_nothing_but_seq_and_clock(self) -> None:
        log = Log(workflow(step("a", timeout_sec=9), step("b", retries=1), timeout_sec=60)).start("a", "b").exit("b", 1)
        before = snapshot(log.run)
        log.now_ms += 500
        log.write(logs.session("boot-1"))
        self.assertEqual(snapshot(log.run), {**before, "seq": before["seq"] + 1, "mono_ms": 1_500})

    def test_after_a_reboot_a_back_off_starts_again_in_full(self) -> None:
        log = Log(workflow(step("a", retries=1, backoff={"initial_sec": 2}))).start("a").exit("a", 1)
        log.now_ms = 10
        log.write(logs.session("boot-2"))
        self.assertIsNone(log.run.startable(2_009))
        self.assertEqual(log.run.startable(2_010), 0)

    def test_after_a_reboot_a_step_that_was_merely_waiting_may_start_at_once(self) -> None:
        log = Log(workflow())
        log.now_ms = 10
        log.write(logs.session("boot-2"))
        self.assertEqual(log.run.startable(10), 0)

    def test_after_a_reboot_attempts_and_graces_count_from_the_session(self) -> None:
        log = Log(workflow(step("a", timeout_sec=2), step("b", timeout_sec=2))).start("a", "b").time_out("a")
        log.now_ms = 10
        log.write(logs.session("boot-2"))
        self.assertEqual(log.run.ending_since_ms(log.record("a")), 10)
        self.assertEqual(log.run.attempt_deadline_ms(log.record("b")), 2_010)
        log.cancel()
        log.now_ms = 5
        log.write(logs.session("boot-3"))
        self.assertEqual(log.run.ending_since_ms(log.record("b")), 5)

    def test_only_attempts_that_were_live_then_are_known_to_be_from_before_the_reboot(self) -> None:
        log = Log(workflow(step("a"), step("b"))).start("a").write(logs.session("boot-1"))
        self.assertFalse(log.record("a").is_rebooted)
        log.write(logs.session("boot-2")).start("b")
        self.assertEqual((log.record("a").is_rebooted, log.record("b").is_rebooted), (True, False))
        log.lose("a", "rebooted").start("a")
        self.assertFalse(log.record("a").is_rebooted)

    def test_the_runs_timeout_counts_what_the_log_saw_of_each_boot(self) -> None:
        log = Log(workflow(step("a"), step("b"), timeout_sec=60))
        log.now_ms = 21_000
        log.start("a")
        log.now_ms = 500
        log.write(logs.session("boot-2"))
        self.assertEqual(log.run.deadline_ms(), 500 + 60_000 - 20_000)
        log.now_ms = 10_500
        log.start("b")
        log.now_ms = 7
        log.write(logs.session("boot-3"))
        self.assertEqual(log.run.deadline_ms(), 7 + 60_000 - 30_000)

    def test_a_repair_before_the_session_line_is_not_mistaken_for_time_of_the_old_boot(self) -> None:
        for mono_ms in (50, 900_000):
            with self.subTest(mono_ms=mono_ms):
                log = Log(workflow(step("a"), step("b", "a"), timeout_sec=60)).start("a")
                log.now_ms = 21_000
                log.put(AttemptExited("a", 1, 0))
                log.now_ms = mono_ms
                log.write(LogRecovered(0))
                log.write(logs.session("boot-2"))
                self.assertEqual(log.run.deadline_ms(), mono_ms + 60_000 - 20_000)

    def test_after_a_repair_and_its_session_line_the_clock_goes_on(self) -> None:
        log = Log(workflow(step("a"), timeout_sec=60)).write(LogRecovered(17), logs.session("boot-1"))
        log.now_ms = 21_000
        log.start("a")
        log.now_ms = 5
        log.write(logs.session("boot-2"))
        self.assertEqual(log.run.deadline_ms(), 5 + 60_000 - 20_000)


class RetriedRuns(unittest.TestCase):
    def retried(self, log: Log) -> Log:
        log.now_ms += 10_000
        return log.write(RunRetried("again"))

    def test_what_did_not_succeed_is_tried_again_and_attempt_numbers_go_on(self) -> None:
        chain = workflow(step("a"), step("b", "a"), step("c", "b"), timeout_sec=60)
        log = self.retried(Log(chain).start("a").exit("a", 0).start("b").exit("b", 1))
        self.assertEqual(log.states(), {"a": "SUCCEEDED", "b": "READY", "c": "PENDING"})
        self.assertEqual(log.run.state, "RUNNING")
        self.assertEqual((log.run.reason, log.run.finished_at, log.run.requests), ("", None, {"again"}))
        self.assertEqual(log.run.deadline_ms(), log.now_ms + 60_000)
        self.assertIsNone(log.record("c").blocked_by)
        for row in log.run.describe()["steps"][1:]:  # type: ignore[index]
            self.assertEqual([row[name] for name in ("exit_code", "reason", "because", "finished_at")], [None] * 4)
        log.start("b")
        self.assertEqual(log.record("b").attempt, 2)
        log.exit("b", 0).start("c").exit("c", 0)
        self.assertEqual(log.run.state, "SUCCEEDED")

    def test_the_budget_of_retries_and_losses_is_new(self) -> None:
        log = Log(workflow(step("a", retries=1, backoff={"initial_sec": 0})))
        for _ in range(3):
            log.start("a").lose("a")
        log.start("a").exit("a", 1).start("a").exit("a", 1)
        self.assertEqual(log.run.state, "FAILED")
        self.retried(log)
        for _ in range(3):
            log.start("a").lose("a")
        log.start("a").exit("a", 1)
        self.assertEqual(log.states()["a"], "READY")
        self.assertEqual(log.start("a").exit("a", 0).run.state, "SUCCEEDED")

    def test_a_cancelled_run(self) -> None:
        log = Log(logs.diamond()).start("a").cancel().exit("a", 1)
        self.assertEqual(log.run.state, "CANCELLED")
        self.retried(log)
        self.assertFalse(log.run.is_stopping)
        self.assertEqual(log.states(), {"a": "READY", "b": "PENDING", "c": "PENDING", "d": "PENDING"})

    def test_a_run_that_had_timed_out_ends_by_what_its_steps_do_now(self) -> None:
        log = Log(workflow(timeout_sec=1)).start("a")
        log.now_ms = 2_000
        log.write(RunTimedOut()).exit("a", None)
        self.assertEqual((log.run.state, log.run.reason), ("FAILED", "run_timeout"))
        self.assertEqual(self.retried(log).start("a").exit("a", 0).run.state, "SUCCEEDED")


class Counts(unittest.TestCase):
    def test_failures_and_losses_of_a_step(self) -> None:
        log = Log(workflow(step("a", retries=1, backoff={"initial_sec": 0})))
        counts = []
        for end in ("lost", "never_began", 1, "lost", "lost"):
            log.start("a")
            if end == "lost":
                log.lose("a")
            elif end == "never_began":
                log.not_started("a", "never_began")
            else:
                log.exit("a", 1)
            counts.append((log.record("a").failures, log.record("a").losses))
        self.assertEqual(counts, [(0, 1), (0, 2), (1, 2), (1, 3), (1, 4)])
        log.write(RunRetried("again"))
        self.assertEqual((log.record("a").failures, log.record("a").losses), (0, 0))
        log.start("a").exit("a", 1).start("a").not_started("a", "cwd")
        self.assertEqual((log.record("a").failures, log.record("a").losses), (2, 0))


class Fold(unittest.TestCase):
    def test_equal_lines_make_equal_states(self) -> None:
        for seed in range(100):
            with self.subTest(seed=seed):
                log = logs.random_walk(seed)
                folded = Run(log.lines[0])
                for line in log.lines[1:]:
                    folded.apply(line)
                # The queues of what may start are hints, which asking shortens; the answer is what must be the same.
                self.assertEqual(folded.startable(10**9), log.run.startable(10**9))
                mine, its = snapshot(folded), snapshot(log.run)
                for hint in ("_ready", "_delayed"):
                    del mine[hint], its[hint]
                self.assertEqual(mine, its)

    def test_the_counters_are_what_counting_would_find(self) -> None:
        for seed in range(200):
            log = logs.random_walk(seed)
            states = log.states()
            with self.subTest(seed=seed):
                for record in log.run.steps:
                    unmet = [id for id in record.step.depends_on if states[id] != "SUCCEEDED"]
                    self.assertEqual(record.waiting, len(unmet))
                words = list(states.values())
                self.assertEqual(log.run.failed, words.count("FAILED"))
                self.assertEqual(log.run.unfinished, sum(words.count(word) for word in ("PENDING", "READY", "RUNNING")))
                self.assertEqual(len(log.run.running), words.count("RUNNING"))

    def test_describe(self) -> None:
        log = Log(workflow(step("a", retries=1), step("b", "a"), step("c"))).start("a", "c").exit("a", 3).exit("c", 0)
        told = log.run.describe()
        self.assertEqual(list(told), ["run_id", "workflow_id", "state", "reason", "submitted_at", "finished_at",
                                      "last_seq", "cwd", "steps"])  # fmt: skip
        rows = {row["id"]: row for row in told["steps"]}  # type: ignore[attr-defined]
        self.assertEqual(list(rows), ["a", "b", "c"])
        self.assertEqual((rows["a"]["state"], rows["a"]["exit_code"], rows["a"]["delay_ms"]), ("READY", 3, 1_000))
        log.now_ms += 1_000
        log.start("a").exit("a", 4)
        rows = {row["id"]: row for row in log.run.describe()["steps"]}  # type: ignore[attr-defined]
        self.assertEqual((rows["a"]["state"], rows["a"]["reason"], rows["a"]["attempt"]), ("FAILED", "exit", 2))
        self.assertEqual((rows["b"]["state"], rows["b"]["because"]), ("SKIPPED", "a"))

    def test_describe_tells_of_the_newest_attempt_alone(self) -> None:
        log = Log(workflow(step("a", retries=1))).start("a").exit("a", 3)
        self.assertEqual(row_of(log, "attempt", "exit_code", "reason", "delay_ms"), [1, 3, "exit", 1_000])
        log.now_ms += 1_000
        log.start("a")
        self.assertEqual(row_of(log, "attempt", "delay_ms", "started_at"), [2, 0, logs.AT])
        self.assertEqual(row_of(log, "exit_code", "reason", "finished_at"), [None, None, None])
        log.exit("a", 0)
        self.assertEqual(row_of(log, "exit_code", "reason", "finished_at"), [0, None, logs.AT])


def row_of(log: Log, *names: str) -> list[object]:
    """These columns of the first step."""
    row = log.run.describe()["steps"][0]  # type: ignore[index]
    return [row[name] for name in names]


if __name__ == "__main__":
    unittest.main()
