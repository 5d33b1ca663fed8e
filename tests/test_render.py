"""What people see: escaping, widths, tables, the story, the live picture. All pure, so cases are data."""

from __future__ import annotations

import re
import unittest
from unicodedata import east_asian_width

from tests.logs import AT, Log, complete, session, step, workflow
from wfctl import render
from wfd.events import LogRecovered, RunTimedOut

NOW = (render.epoch_sec(AT) or 0) + 75


class Escape(unittest.TestCase):
    CASES = (
        ("plain", "", "plain"),
        ("größe → 日本 🎉", "", "größe → 日本 🎉"),
        ("a\x1b[31mred", "", "a\\x1b[31mred"),
        ("\x1b]0;title\x07", "", "\\x1b]0;title\\x07"),
        ("c1 \x9b31m", "", "c1 \\x9b31m"),
        ("line\nline\ttab\r", "\n\t", "line\nline\ttab\\r"),
        ("line\nline", "", "line\\nline"),
        ("a\u202egpj.exe", "", "a\\u202egpj.exe"),
        ("\u2028", "\n", "\\u2028"),
        ("zero\u200bwidth", "", "zero\\u200bwidth"),
        ("lone \udc80", "", "lone \\udc80"),
        ("del\x7f nul\x00", "", "del\\x7f nul\\x00"),
        ("tag \U000e0041", "", "tag \\U000e0041"),
        ("", "", ""),
    )

    def test_cases(self) -> None:
        for text, keep, expected in self.CASES:
            with self.subTest(text=text):
                self.assertEqual(render.escape(text, keep), expected)

    def test_nothing_that_a_terminal_obeys_comes_through(self) -> None:
        everything = "".join(map(chr, (*range(0x3000), *range(0xD800, 0xE100), *range(0xFF00, 0x10000))))
        self.assertTrue(render.escape(everything).isprintable())


class Numbers(unittest.TestCase):
    def test_durations(self) -> None:
        cases = (
            (-3, "0.0s"), (0.04, "0.0s"), (9.96, "10.0s"), (59.9, "59.9s"), (60, "1m00s"), (185, "3m05s"),
            (3600, "1h00m"), (7625, "2h07m"), (86400, "1d00h"), (442800, "5d03h"),
        )  # fmt: skip
        for seconds, expected in cases:
            with self.subTest(seconds=seconds):
                self.assertEqual(render.duration(seconds), expected)

    def test_epoch(self) -> None:
        cases = (
            ("1970-01-01T00:00:00.000000Z", 0.0), ("2000-02-29T23:59:59.500000Z", 951868799.5),
            ("2023-12-31T00:00:00.000000Z", 1703980800.0), ("2024-03-01T12:00:01.250000Z", 1709294401.25),
            ("2100-03-01T00:00:00.000000Z", 4107542400.0),
        )  # fmt: skip
        for at, expected in cases:
            with self.subTest(at=at):
                self.assertEqual(render.epoch_sec(at), expected)

    def test_times_that_are_none(self) -> None:
        """A log that somebody has written by hand may hold any text as a time, and any number."""
        whole = "2026-11-23T07:24:12.123456Z"
        cases = (
            "", "yesterday", "\x1b[2J", whole.replace("2026", "²026"), whole.replace("12.", "nan"), "٣" * 27,
            whole.replace("2.1", "x.1"), whole.replace("-11-", "-1x-"), whole.replace("1234", "1e9"),
        )  # fmt: skip
        for at in cases:
            with self.subTest(at=at[:30]):
                self.assertIsNone(render.epoch_sec(at))
                self.assertEqual((render.took(at, None, NOW), render.took(AT, at, NOW)), ("", ""))
                self.assertTrue(render.clock(at).isprintable())
        step = {"state": "READY", "reason": "exit", "exit_code": 1, "delay_ms": 10**400}
        self.assertTrue(render.why(step).startswith("exit 1; waits "))

    def test_how_long(self) -> None:
        self.assertEqual(render.took(None, None, NOW), "")
        self.assertEqual(render.took(AT, None, NOW), "1m15s")
        self.assertEqual(render.took(AT, "2026-11-23T07:24:14.623456Z", NOW), "2.5s")

    def test_signals_are_named(self) -> None:
        cases = ((1, "exit 1"), (127, "exit 127"), (128, "exit 128"), (137, "exit 137 (signal 9)"), (255, "exit 255"))
        for code, expected in cases:
            with self.subTest(code=code):
                found = render.why({"state": "FAILED", "reason": "exit", "exit_code": code, "delay_ms": 0})
                self.assertEqual(found, expected)


class Widths(unittest.TestCase):
    def test_cut(self) -> None:
        cases = (
            ("short", 5, "short"), ("longer", 5, "long…"), ("日本語", 6, "日本語"), ("日本語", 5, "日本…"),
            ("日本語", 4, "日…"), ("a日本", 1, "…"), ("x", 0, ""), ("e\u0301e\u0301e\u0301", 3, "e\u0301e\u0301e\u0301"),
        )  # fmt: skip
        for text, width, expected in cases:
            with self.subTest(text=text, width=width):
                self.assertEqual(render.cut(text, width), expected)

    def test_columns_are_aligned(self) -> None:
        lines = render.table([("ID", "STATE", "WHY"), ("a", "READY", ""), ("日本", "FAILED", "exit 1")], 1, False)
        self.assertEqual(lines, ["ID    STATE   WHY", "a     READY", "日本  FAILED  exit 1"])

    def test_a_long_id_does_not_break_the_table(self) -> None:
        lines = render.table([("ID", "STATE", "WHY"), ("x" * 200, "READY", "")], 1, False)
        self.assertEqual(len(lines[1]), render.MAX_COLUMN_CHARS + len("  READY"))

    def test_colours_do_not_count(self) -> None:
        rows = [("ID", "STATE", "WHY"), ("a", "FAILED", "x"), ("b", "SUCCEEDED", "y")]
        plain, coloured = render.table(rows, 1, False), render.table(rows, 1, True)
        self.assertIn("\x1b[31mFAILED", coloured[1])
        self.assertEqual([re.sub(r"\x1b\[\d*m", "", line) for line in coloured], plain)


def failed_run() -> Log:
    """a succeeds, b fails at the second attempt, c times out, d is skipped."""
    steps = (
        step("a"),
        step("b", "a", retries=1, backoff={"initial_sec": 1.5}),
        step("c", "a", timeout_sec=1),
        step("d", "b"),
    )
    log = Log(workflow(*steps)).write(session()).start("a").exit("a", 0).start("b", "c").exit("b", 137)
    log.now_ms += 1_500
    log.time_out("c").exit("c", 143).start("b").exit("b", 2)
    return log


class Status(unittest.TestCase):
    maxDiff = None

    def test_a_failed_run(self) -> None:
        self.assertEqual(
            render.status_text(failed_run().run.describe(), NOW, False).split("\n"),
            [
                "r1  w  FAILED  0.0s  (1 succeeded, 2 failed, 1 skipped)",
                "STEP  STATE      ATTEMPT  TOOK  WHY",
                "a     SUCCEEDED  1        0.0s",
                "b     FAILED     2        0.0s  exit 2",
                "c     FAILED     1        0.0s  timed out",
                "d     SKIPPED                   because of b",
            ],
        )

    def test_a_live_run(self) -> None:
        log = Log(workflow(step("a", retries=1), step("b"), step("c", "b"))).start("a", "b").exit("a", 1)
        status = {**log.run.describe(), "stalled": "its log cannot be written: \x1b[1mNo space left on device"}
        self.assertEqual(
            render.status_text(status, NOW, False).split("\n"),
            [
                "r1  w  RUNNING  1m15s  (1 running, 1 ready, 1 pending)",
                "stalled: its log cannot be written: \\x1b[1mNo space left on device",
                "STEP  STATE    ATTEMPT  TOOK   WHY",
                "a     READY    1               exit 1; waits 1.0s",
                "b     RUNNING  1        1m15s",
                "c     PENDING",
            ],
        )

    def test_a_run_that_timed_out(self) -> None:
        log = Log(workflow(step("a"), timeout_sec=3))
        log.now_ms += 3_000
        log.write(RunTimedOut())
        text = render.status_text(log.run.describe(), NOW, False)
        self.assertIn("r1  w  FAILED  the run timed out after 0.0s  (1 cancelled)", text)
        self.assertRegex(text, "a +CANCELLED +the run timed out$")


class Story(unittest.TestCase):
    maxDiff = None

    def told(self, log: Log) -> list[str]:
        story = render.Story()
        lines = [told for line in log.lines if (told := story.tell(line)) is not None]
        prefix = "07:24:12.123Z  "
        self.assertTrue(all(line.startswith(prefix) for line in lines))
        return [line.removeprefix(prefix) for line in lines]

    def test_a_failed_run(self) -> None:
        self.assertEqual(
            self.told(failed_run()),
            [
                "(run)             RUNNING     w, 4 steps",
                "a                 READY",
                "(run)                         kept by wfd 0.1.0 on host",
                "a                 RUNNING     attempt 1",
                "a                 SUCCEEDED   attempt 1",
                "b                 READY",
                "c                 READY",
                "b                 RUNNING     attempt 1",
                "c                 RUNNING     attempt 1",
                "b                 READY       attempt 1 exited with 137 (signal 9); tried again after 1.5 s",
                "c                 FAILED      attempt 1 timed out",
                "b                 RUNNING     attempt 2",
                "b                 FAILED      attempt 2 exited with 2",
                "d                 SKIPPED     because of b",
                "(run)             FAILED      steps failed",
            ],
        )

    def test_a_cancelled_run(self) -> None:
        log = Log(workflow(step("a"), step("b", "a"))).start("a").cancel().exit("a", None)
        self.assertEqual(
            self.told(log)[3:],
            [
                "(run)             CANCELLING  a cancel was asked for",
                "b                 CANCELLED   cancelled",
                "a                 CANCELLED   attempt 1 cancelled",
                "(run)             CANCELLED   cancelled",
            ],
        )

    def test_losses_and_repairs(self) -> None:
        log = Log(workflow(step("a"))).start("a").write(LogRecovered(17, "torn-1-00000000")).lose("a").start("a")
        log.not_started("a", "cwd")
        self.assertEqual(
            self.told(log)[3:],
            [
                "(run)                         the log was repaired, 17 bytes of a torn tail were cut off",
                "a                 READY       attempt 1 was lost (killed); tried again at once",
                "a                 RUNNING     attempt 2",
                "a                 FAILED      attempt 2 was not started (cwd: detail)",
                "(run)             FAILED      steps failed",
            ],
        )

    def test_every_transition_of_every_step_is_told(self) -> None:
        log = complete(workflow(*(step(f"s{number}") for number in range(5))))
        for number in range(5):
            states = [line.split()[1] for line in self.told(log) if line.startswith(f"s{number} ")]
            self.assertEqual(states, ["READY", "RUNNING", "SUCCEEDED"])


class Frame(unittest.TestCase):
    def frame(self, log: Log, height: int = 24, width: int = 80, colour: bool = False) -> list[str]:
        return render.frame(log.run, NOW, height, width, colour)

    def test_a_row_for_each_step(self) -> None:
        self.assertEqual(
            self.frame(failed_run()),
            [
                "r1  w  FAILED  0.0s  (1 succeeded, 2 failed, 1 skipped)",
                "  a  SUCCEEDED     0.0s",
                "  b  FAILED        0.0s  attempt 2, exit 2",
                "  c  FAILED        0.0s  timed out",
                "  d  SKIPPED             because of b",
            ],
        )

    def test_it_never_leaves_the_terminal(self) -> None:
        ids = ["x" * 200, "日本語" * 20, "short", *(f"s{number}" for number in range(30))]
        log = Log(workflow(*(step(id) for id in ids))).start(*ids)
        for height in (2, 3, 10, 24, 34, 100):
            for width in (20, 41, 80):
                lines = self.frame(log, height, width)
                with self.subTest(height=height, width=width):
                    self.assertLessEqual(len(lines), height)
                    self.assertEqual(len(lines), min(height, len(ids) + 1))
                    for line in lines:
                        cells = sum(2 if east_asian_width(char) in "WF" else 1 for char in line)
                        self.assertLessEqual(cells, width, line)

    def test_what_matters_now_is_shown_when_not_all_fits(self) -> None:
        ids = [f"s{number:02}" for number in range(40)]
        log = Log(workflow(*(step(id) for id in ids))).start(*ids[:20])
        for id in ids[:18]:
            log.exit(id, 1 if id == "s03" else 0)
        lines = self.frame(log, height=6)
        self.assertEqual([line.split()[0] for line in lines[1:-1]], ["s03", "s18", "s19", "s20"])
        self.assertEqual(lines[-1], "… and 36 more steps")

    def test_colours_do_not_change_the_text(self) -> None:
        log = failed_run()
        coloured = self.frame(log, colour=True)
        self.assertIn("\x1b[31mFAILED\x1b[0m", coloured[0])
        self.assertIn("\x1b[32mSUCCEEDED\x1b[0m", coloured[1])
        self.assertEqual([re.sub(r"\x1b\[\d*m", "", line) for line in coloured], self.frame(log))

    def test_redraw(self) -> None:
        self.assertEqual(render.redraw(["a", "b"], 0), "\ra\x1b[K\nb\x1b[K\n\x1b[J")
        self.assertEqual(render.redraw(["a"], 2), "\x1b[2A\ra\x1b[K\n\x1b[J")


class List(unittest.TestCase):
    def test_rows(self) -> None:
        row = {
            "run_id": "r1", "workflow_id": "w\x1b[1m", "state": "RUNNING", "submitted_at": AT, "finished_at": None,
            "steps": 4, "succeeded": 1, "failed": 0, "running": 2, "stalled": None,
        }  # fmt: skip
        damaged = {
            **row, "run_id": "r0", "workflow_id": None, "state": "DAMAGED", "submitted_at": None, "steps": None,
            "succeeded": None, "why": "line 1 is not whole",
        }  # fmt: skip
        over = {**row, "run_id": "r2", "workflow_id": "v", "state": "FAILED", "finished_at": AT, "succeeded": None}
        self.assertEqual(
            render.list_text([row, damaged, over], NOW, False).split("\n"),
            [
                "RUN  STATE    SUBMITTED             TOOK   STEPS  WORKFLOW",
                "r1   RUNNING  2026-11-23 07:24:12Z  1m15s  1/4    w\\x1b[1m",
                "r0   DAMAGED                                      line 1 is not whole",
                "r2   FAILED   2026-11-23 07:24:12Z  0.0s   4      v",
            ],
        )


if __name__ == "__main__":
    unittest.main()
