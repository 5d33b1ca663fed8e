"""The rules: transcripts of whole runs, replay of every prefix, and every way to forge a log.

The transcripts beside this file read like a play: a command or more, a rule, and the lines that they added to the log.
    start a          step a gets its slot                  exit a 0 [draw=N]   its attempt ended (`none`: no status)
    lose a [why]     nobody knows how it ended             not_started a why   its command never ran
    time_out a       its timeout passed                    cancel, run_timeout, retry, session BOOT, recover
    at MS            the monotonic clock                   startable           what may start now
    halt             the next command's decisions are not written: the daemon dies in the middle of the batch
"""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from pathlib import Path

from tests import logs
from tests.logs import Log, step, workflow
from wfd import decide
from wfd.decide import describe, replay
from wfd.definition import Backoff
from wfd.events import (
    AttemptExited,
    AttemptLost,
    AttemptNotStarted,
    AttemptTimedOut,
    Decision,
    Event,
    Fact,
    Line,
    LogRecovered,
    RunCancelRequested,
    RunFinished,
    RunRetried,
    RunTimedOut,
    StepStarted,
    StepSucceeded,
)
from wfd.state import Impossible

TRANSCRIPTS = Path(__file__).with_name("transcripts")
WALKS = range(300)


# -- transcripts -------------------------------------------------------------------------------------------------------


class Play:
    """Performs a transcript's commands."""

    def __init__(self) -> None:
        self.steps: list[dict[str, object]] = []
        self.limits: dict[str, object] = {}
        self.log: Log | None = None
        self.is_halting = False

    def perform(self, command: str) -> list[str]:
        """The lines of log, or the words, that one command leads to."""
        verb, *words = command.split()
        if verb == "workflow":
            self.limits = dict(map(_field, words))
            return []
        if verb == "step":
            self.steps.append(_step(words))
            return []
        if self.log is None:
            self.log = Log(workflow(*self.steps, **self.limits))
            if verb == "submit":
                return [_shown(line) for line in self.log.lines]
        if verb in ("at", "startable", "halt"):
            return self._ask(verb, words)
        before = len(self.log.lines)
        self._put(self._event(verb, words))
        return [_shown(line) for line in self.log.lines[before:]]

    def _ask(self, verb: str, words: list[str]) -> list[str]:
        assert self.log is not None
        if verb == "at":
            self.log.now_ms = int(words[0])
        elif verb == "halt":
            self.is_halting = True
        else:
            index = self.log.run.startable(self.log.now_ms)
            return ["nothing" if index is None else self.log.run.steps[index].step.id]
        return []

    def _put(self, event: Event) -> None:
        assert self.log is not None
        if self.is_halting:
            self.log.put(event)
        else:
            self.log.write(event)
        self.is_halting = False

    def _event(self, verb: str, words: list[str]) -> Event:
        assert self.log is not None
        of_run: dict[str, Event] = {
            "run_timeout": RunTimedOut(),
            "cancel": RunCancelRequested("request-1"),
            "retry": RunRetried("again"),
            "recover": LogRecovered(0),
        }
        if verb in of_run:
            return of_run[verb]
        if verb == "session":
            return logs.session(words[0])
        named = dict(word.split("=") for word in words if "=" in word)
        plain = [word for word in words if "=" not in word]
        id, attempt = words[0], self.log.record(words[0]).attempt
        draw_ppm = int(named["draw"]) if "draw" in named else None
        if verb == "start":
            return StepStarted(id, attempt + 1)
        if verb == "exit":
            return AttemptExited(id, attempt, None if plain[1] == "none" else int(plain[1]), draw_ppm)
        if verb == "lose":
            return AttemptLost(id, attempt, plain[1] if len(plain) > 1 else "killed")
        if verb == "not_started":
            return AttemptNotStarted(id, attempt, plain[1], "", draw_ppm)
        assert verb == "time_out", verb
        return AttemptTimedOut(id, attempt)


def _step(words: list[str]) -> dict[str, object]:
    """`step d after=b,c retries=2 backoff=1:2:60:0.5`"""
    named = dict(word.split("=") for word in words[1:])
    after = named.pop("after", "")
    fields = dict(_field(f"{name}={value}") for name, value in named.items())
    if "backoff" in named:
        shape = [float(part) for part in named["backoff"].split(":")]
        fields["backoff"] = dict(zip(("initial_sec", "factor", "max_sec", "jitter"), shape, strict=True))
    return step(words[0], *filter(None, after.split(",")), **fields)


def _field(word: str) -> tuple[str, object]:
    name, value = word.split("=")
    return name, int(value) if value.isdigit() else value


def _shown(line: Line) -> str:
    return "1 run_submitted" if line.seq == 1 else f"{line.seq} {describe(line.event)}"


def _blocks(text: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """(number of the first line, commands, what they lead to) of each block of a transcript."""
    number = 1
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if "----" in lines:
            rule = lines.index("----")
            yield number, lines[:rule], lines[rule + 1 :]
        elif lines:
            yield number, lines, []
        number += block.count("\n") + 2


class Transcripts(unittest.TestCase):
    maxDiff = None

    def test_each_reads_as_written_and_replays(self) -> None:
        paths = sorted(TRANSCRIPTS.glob("*.txt"))
        self.assertTrue(paths)
        for path in paths:
            with self.subTest(transcript=path.name):
                play = Play()
                for number, commands, expected in _blocks(path.read_text(encoding="utf-8")):
                    found = [line for command in commands for line in play.perform(command)]
                    self.assertEqual(found, expected, f"{path.name}, line {number}: {commands}")
                assert play.log is not None
                self.assertEqual(replay(play.log.lines)[1], None)


# -- rules that a table says best --------------------------------------------------------------------------------------


class Delays(unittest.TestCase):
    def test_the_formula(self) -> None:
        # initial, factor, max, jitter in thousandths; failures; draw; delay
        cases = (
            (1_000, 2_000, 60_000, 0, (1, 2, 3, 4, 5, 6, 7, 8, 9_999), 0,
             (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000)),
            (100, 1_500, 1_000, 0, (1, 2, 3, 4, 5, 6, 7), 0, (100, 150, 225, 337, 506, 759, 1_000)),
            (0, 2_000, 60_000, 1_000, (1, 2, 50), 999_999, (0, 0, 0)),
            (1_000, 1_000, 60_000, 0, (1, 9_999), 0, (1_000, 1_000)),
            (1_000, 2_000, 60_000, 1_000, (1, 3), 500_000, (500, 2_000)),
            (1_000, 2_000, 60_000, 1_000, (1, 3), 0, (1_000, 4_000)),
            (1_000, 2_000, 60_000, 500, (1, 3), 500_000, (750, 3_000)),
        )  # fmt: skip
        for initial, factor, most, jitter, failures, draw_ppm, delays in cases:
            backoff = Backoff(initial, factor, most, jitter)
            with self.subTest(backoff=backoff, draw_ppm=draw_ppm):
                self.assertEqual(tuple(backoff.delay_ms(count, draw_ppm) for count in failures), delays)

    def test_the_last_draw_is_the_one_that_counts_and_a_lost_attempt_has_none(self) -> None:
        day = {"initial_sec": 86_400, "max_sec": 86_400, "jitter": 1}
        log = Log(workflow(step("a", retries=9, timeout_sec=1, backoff=day))).start("a").exit("a", 1, 500_000)
        self.assertEqual(log.record("a").delay_ms, 43_200_000)
        log.now_ms += 43_200_000
        log.start("a")
        log.now_ms += 1_000
        self.assertEqual(log.time_out("a").lose("a").record("a").delay_ms, 86_400_000)

    def test_they_follow_the_failures_of_this_step_since_the_last_retry_by_hand(self) -> None:
        log = Log(workflow(step("a", retries=3, backoff={"initial_sec": 1, "factor": 2, "max_sec": 3})))
        delays = []
        for turn in range(8):
            if turn % 4 == 1:
                log.start("a").lose("a")
            log.start("a").exit("a", 1)
            if log.run.is_over:
                log.write(RunRetried(f"again-{turn}"))
            else:
                delays.append(log.record("a").delay_ms)
            log.now_ms += 60_000
        self.assertEqual(delays, [1_000, 2_000, 3_000] * 2)


# What the end of an attempt leads to, by what happened before that. "-": such an end cannot be.
ENDS = ("exit 0", "exit 1", "exit none", "lose", "never_began", "cwd", "exec", "stopped")
LEADS_TO = {
    "a retry left": ("succeeded", "retried exit", "-", "retried lost", "retried never_began",
                     "retried not_started", "retried not_started", "-"),
    "no retry left": ("succeeded", "failed exit", "-", "retried lost", "retried never_began",
                      "failed not_started", "failed not_started", "-"),
    "timeout": ("retried timeout",) * 8,
    "timeout, no retry left": ("failed timeout",) * 8,
    "cancel": ("cancelled cancel",) * 8,
    "timeout, cancel": ("cancelled cancel",) * 8,
    "run timeout": ("cancelled run_timeout",) * 8,
    "timeout, run timeout": ("cancelled run_timeout",) * 8,
    "run timeout, cancel": ("cancelled cancel",) * 8,
}  # fmt: skip


class Outcomes(unittest.TestCase):
    def decided(self, before: str, end: str) -> str:
        log = Log(workflow(step("a", retries=0 if "no retry left" in before else 1), timeout_sec=1)).start("a")
        log.now_ms += 5_000
        for word in before.split(", "):
            if word == "run timeout":
                log.write(RunTimedOut())
            elif word == "timeout":
                log.time_out("a")
            elif word == "cancel":
                log.cancel()
        if end.startswith("exit"):
            event: Event = AttemptExited("a", 1, {"0": 0, "1": 1, "none": None}[end.split()[1]])
        else:
            event = AttemptLost("a", 1, "killed") if end == "lose" else AttemptNotStarted("a", 1, end, "")
        try:
            log.put(event)
        except Impossible:
            return "-"
        decision = decide.next_decision(log.run)
        assert decision is not None
        reason = getattr(decision, "reason", "")
        return f"{decision.name.removeprefix('step_')} {reason}".strip()

    def test_the_product(self) -> None:
        for before, outcomes in LEADS_TO.items():
            for end, outcome in zip(ENDS, outcomes, strict=True):
                with self.subTest(before=before, end=end):
                    self.assertEqual(self.decided(before, end), outcome)

    # P9.
    def test_lost_three_times_is_tried_again_and_the_fourth_fails(self) -> None:
        for kind in ("lose", "never_began"):
            with self.subTest(kind=kind):
                log = Log(workflow(step("a")))
                for number in range(1, 5):
                    self.assertEqual(log.states()["a"], "READY")
                    self.assertEqual(log.record("a").delay_ms, 0)
                    log.start("a")
                    log = log.lose("a") if kind == "lose" else log.not_started("a", "never_began")
                    self.assertEqual(log.record("a").attempt, number)
                self.assertEqual(log.run.state, "FAILED")
                self.assertEqual(log.record("a").reason, "lost" if kind == "lose" else "never_began")

    def test_losses_and_false_starts_share_one_bound(self) -> None:
        log = Log(workflow(step("a")))
        for turn in range(4):
            log.start("a")
            log = log.lose("a") if turn % 2 else log.not_started("a", "never_began")
        self.assertEqual(log.states()["a"], "FAILED")

    def test_losses_use_no_retry_and_failures_no_loss(self) -> None:
        log = Log(workflow(step("a", retries=2, backoff={"initial_sec": 0})))
        for end in (log.lose, lambda id: log.exit(id, 1), log.lose, lambda id: log.exit(id, 1), log.lose):
            log.start("a")
            end("a")
        self.assertEqual(log.states()["a"], "READY")
        self.assertEqual(log.start("a").exit("a", 1).states()["a"], "FAILED")

    def test_on_lost_fail(self) -> None:
        log = Log(workflow(step("a", on_lost="fail", retries=5))).start("a").lose("a")
        self.assertEqual((log.states()["a"], log.record("a").reason), ("FAILED", "lost"))
        # What certainly never ran is not lost.
        log = Log(workflow(step("a", on_lost="fail"))).start("a").not_started("a", "never_began")
        self.assertEqual(log.states()["a"], "READY")


class Ends(unittest.TestCase):
    def test_of_a_run(self) -> None:
        two = workflow(step("a"), step("b"), timeout_sec=1)

        def late(log: Log) -> Log:
            log.now_ms += 5_000
            return log.write(RunTimedOut())

        cases = (
            (Log(two).start("a", "b").exit("a", 0).exit("b", 0), "SUCCEEDED", ""),
            (Log(two).start("a", "b").exit("a", 1).exit("b", 0), "FAILED", "steps_failed"),
            (Log(two).start("a", "b").exit("a", 1).cancel().exit("b", 0), "CANCELLED", "cancel"),
            (late(Log(two).start("a", "b").exit("a", 0)).exit("b", 0), "FAILED", "run_timeout"),
            (late(Log(two).start("a", "b").exit("a", 1)).exit("b", 0), "FAILED", "run_timeout"),
            (late(Log(two).start("a", "b")).cancel().exit("a", 0).exit("b", 0), "CANCELLED", "cancel"),
            (Log(two).cancel(), "CANCELLED", "cancel"),
            (late(Log(two)), "FAILED", "run_timeout"),
        )
        for log, state, reason in cases:
            with self.subTest(lines=[describe(line.event) for line in log.lines[1:]]):
                self.assertEqual((log.run.state, log.run.reason), (state, reason))
                self.assertIsInstance(log.lines[-1].event, RunFinished)


# -- replay ------------------------------------------------------------------------------------------------------------


def walks() -> Iterator[tuple[int, Log]]:
    for seed in WALKS:
        yield seed, logs.random_walk(seed)


class Replay(unittest.TestCase):
    """P3: a log that these rules wrote verifies, whole and cut after any line."""

    def test_every_prefix_of_every_walk_verifies(self) -> None:
        for seed, log in walks():
            with self.subTest(seed=seed):
                for length in range(1, len(log.lines) + 1, 7):
                    run, difference = replay(log.lines[:length])
                    self.assertIsNone(difference)
                    self.assertEqual(run.seq, length)
                self.assertEqual(replay(log.lines)[0].describe(), log.run.describe())

    def test_walks_keep_the_promises(self) -> None:
        for seed, log in walks():
            with self.subTest(seed=seed):
                logs.check_promises(log.lines)

    def test_whole_runs_verify(self) -> None:
        wide = workflow(*(step(f"s{n}") for n in range(200)), max_parallel=7)
        deep = workflow(*(step(f"s{n}", *[f"s{n - 1}"] if n else []) for n in range(200)))
        for log in (
            logs.complete(wide),
            logs.complete(deep, {"s3": [1]}),
            logs.complete(logs.diamond(), {"a": [0], "b": [2]}),
            logs.complete(workflow(step("a", retries=3, backoff={"jitter": 0.5})), {"a": [1, 2, 3]}),
        ):
            self.assertIsNone(replay(log.lines)[1])
            self.assertTrue(log.run.is_over)

    def test_of_nothing(self) -> None:
        with self.assertRaisesRegex(Impossible, "empty"):
            replay([])
        with self.assertRaisesRegex(Impossible, "line 1"):
            replay(Log(workflow()).lines[1:])


class Forgeries(unittest.TestCase):
    """P3: logs that somebody has changed, with everything else made right again: the first difference is named."""

    def assert_told(self, lines: list[Line], seq: int, expected: str | None, found: str) -> None:
        difference = replay(logs.renumbered(lines))[1]
        assert difference is not None
        self.assertEqual((difference.seq, difference.found), (seq, found))
        if expected is not None:
            self.assertEqual(difference.expected, expected)
        self.assertEqual(str(difference), f"line {seq}: expected {difference.expected}, found {found}")

    def decisions(self) -> Iterator[tuple[Log, int, Decision]]:
        """All decisions of a number of runs, each with its place in the log."""
        for seed in range(25):
            log = logs.random_walk(seed, turns=40)
            for place, line in enumerate(log.lines):
                if isinstance(line.event, Decision):
                    with self.subTest(seed=seed, seq=line.seq):
                        yield log, place, line.event

    def test_a_decision_changed(self) -> None:
        for log, place, decision in self.decisions():
            for other in logs.variants(decision, log.run):
                lines = [*log.lines[:place], log.lines[place]._replace(event=other), *log.lines[place + 1 :]]
                self.assert_told(lines, place + 1, describe(decision), describe(other))

    def test_a_decision_left_out(self) -> None:
        for log, place, decision in self.decisions():
            lines = [*log.lines[:place], *log.lines[place + 1 :]]
            if place + 1 == len(log.lines):
                self.assertIsNone(replay(lines)[1], "whoever resumes it will write the rest")
            elif isinstance(log.lines[place + 1].event, LogRecovered):
                self.assertIsNotNone(replay(logs.renumbered(lines))[1])
            else:
                self.assert_told(lines, place + 1, describe(decision), describe(log.lines[place + 1].event))

    def test_a_decision_too_many(self) -> None:
        for log, place, decision in self.decisions():
            again = log.lines[place]
            if place + 1 < len(log.lines) and isinstance(log.lines[place + 1].event, Decision):
                expected = describe(log.lines[place + 1].event)
            else:
                expected = "no decision (a fact, a choice or the end)"
            lines = [*log.lines[: place + 1], again, *log.lines[place + 1 :]]
            self.assert_told(lines, place + 2, expected, describe(decision))

    def test_two_decisions_exchanged(self) -> None:
        for log, place, decision in self.decisions():
            following = log.lines[place + 1].event if place + 1 < len(log.lines) else None
            if isinstance(following, Decision):
                lines = [*log.lines[:place], log.lines[place + 1], log.lines[place], *log.lines[place + 2 :]]
                self.assert_told(lines, place + 1, describe(decision), describe(following))

    def test_a_fact_between_decisions(self) -> None:
        log = Log(workflow(step("a"), step("b"))).start("a", "b")
        ends = [AttemptExited("a", 1, 0), AttemptExited("b", 1, 0)]
        lines = [*log.lines, *(Line(0, logs.AT, 1_000, 0, event) for event in ends)]
        self.assert_told(lines, 7, "step_succeeded step=a cause=6", describe(ends[1]))

    def test_illegal_choices(self) -> None:
        waits = workflow(step("a", retries=1), step("b", "a"), step("c"), max_parallel=2, timeout_sec=9)
        backing_off = Log(waits).start("a").exit("a", 1)
        backing_off.now_ms += 999
        late = Log(waits)
        late.now_ms += 9_000
        cases: tuple[tuple[Log, Event, str], ...] = (
            (backing_off, StepStarted("a", 2), "no start before mono_ms 2000, when the back-off ends"),
            (Log(logs.diamond(max_parallel=1)).start("a").exit("a", 0).start("b"), StepStarted("c", 1),
             "no start while max_parallel = 1 steps are running"),
            (Log(waits).start("a").cancel(), StepStarted("c", 1), "a step that is READY"),
            (late.start("a").write(RunTimedOut()), StepStarted("c", 1), "a step that is READY"),
            (Log(waits), StepStarted("b", 1), "a step that is READY"),
            (Log(waits).start("a"), StepStarted("a", 2), "a step that is READY"),
            (Log(waits).start("c").exit("c", 0), StepStarted("c", 2), "a step that is READY"),
            (Log(waits), StepStarted("z", 1), "a step that is READY"),
            (Log(workflow()).start("a").exit("a", 0), StepStarted("a", 2), "a step that is READY"),
            (Log(waits), StepStarted("a", 2), "an event that can follow"),
        )  # fmt: skip
        for log, choice, expected in cases:
            self.forge(log, choice, expected)

    def test_a_start_in_the_same_batch_as_a_cancel(self) -> None:
        log = Log(workflow())
        log.put(RunCancelRequested("request-1"))
        self.forge(log, StepStarted("a", 1), "step_cancelled step=a cause=3 reason=cancel")

    def test_impossible_facts(self) -> None:
        timed = workflow(step("a", timeout_sec=2, retries=1, backoff={"jitter": 0.5}), step("b"), timeout_sec=9)
        early = Log(timed).start("a", "b")
        early.now_ms += 1_999
        no_limit = Log(workflow()).start("a")
        cases: tuple[tuple[Log, Event, str], ...] = (
            (early, AttemptTimedOut("a", 1), "no timeout of the attempt before mono_ms 3000"),
            (early, AttemptTimedOut("b", 1), "no timeout of the attempt before mono_ms None"),
            (early, RunTimedOut(), "no timeout of the run before mono_ms 10000"),
            (no_limit, RunTimedOut(), "no timeout of the run before mono_ms None"),
            (early, AttemptExited("a", 1, 1), "draw_ppm from 0 to 999999"),
            (early, AttemptExited("a", 1, 1, 1_000_000), "draw_ppm from 0 to 999999"),
            (early, AttemptExited("b", 1, 1, 5), "draw_ppm absent (no jitter)"),
            (early, AttemptNotStarted("a", 1, "cwd", ""), "draw_ppm from 0 to 999999"),
            (Log(workflow(step("a", backoff={"jitter": 0.001}))).start("a"), AttemptExited("a", 1, 1),
             "draw_ppm from 0 to 999999"),
            (no_limit, AttemptExited("a", 1, None), "an event that can follow"),
            (no_limit, AttemptExited("a", 2, 0), "an event that can follow"),
            (no_limit, AttemptExited("z", 1, 0), "an event that can follow"),
            (no_limit, RunRetried("again"), "an event that can follow"),
            (Log(workflow()).start("a").exit("a", 0), logs.session(), "an event that can follow"),
            (no_limit, no_limit.lines[0].event, "an event that can follow"),
        )  # fmt: skip
        for log, fact, expected in cases:
            self.assertIsInstance(fact, Fact)
            self.forge(log, fact, expected)

    def test_a_cause_may_be_no_later_fact(self) -> None:
        log = Log(workflow(step("a"), step("b"))).start("a").start("b").exit("a", 0)
        place = len(log.lines) - 1
        lines = [*log.lines[:place], log.lines[place]._replace(event=StepSucceeded("a", 5))]
        self.assert_told(lines, place + 1, "step_succeeded step=a cause=6", "step_succeeded step=a cause=5")

    def forge(self, log: Log, event: Event, expected: str) -> None:
        with self.subTest(event=describe(event), expected=expected):
            line = Line(log.run.seq + 1, logs.AT, log.now_ms, log.durable, event)
            run, difference = replay([*log.lines, line])
            assert difference is not None
            self.assertEqual((difference.seq, difference.expected), (line.seq, expected))
            self.assertTrue(difference.found.startswith(describe(event)))
            self.assertEqual(run.describe(), log.run.describe(), "the state before the difference")


if __name__ == "__main__":
    unittest.main()
