"""The log's vocabulary: to a line and back, and everything else refused."""

from __future__ import annotations

import json
import typing
import unittest
import zlib
from typing import Any

from tests import logs
from wfd import events
from wfd.definition import Workflow
from wfd.events import (
    FORMAT,
    RULES,
    AttemptExited,
    AttemptLost,
    AttemptNotStarted,
    AttemptTimedOut,
    Choice,
    Decision,
    Event,
    Fact,
    InvalidEvent,
    Line,
    LogRecovered,
    NewerLog,
    RunCancelRequested,
    RunFinished,
    RunRetried,
    RunSubmitted,
    RunTimedOut,
    StepCancelled,
    StepFailed,
    StepReady,
    StepRetried,
    StepSkipped,
    StepStarted,
    StepSucceeded,
    SupervisorStarted,
)

SEED = events.seed("r1")
WORKFLOW = logs.diamond(max_parallel=2, env={"A": "ä"}, timeout_sec=9)

# One of each, and of those with fields that may be None also one without them and one with a gap.
EXAMPLES: tuple[Event, ...] = (
    RunSubmitted("r1", FORMAT, RULES, "boot-1", "/a b/\udcff", WORKFLOW),
    RunCancelRequested("request-1"),
    RunRetried("request-2"),
    RunTimedOut(),
    AttemptExited("b", 1, 0, 999_999, 12, 3, 4_096),
    AttemptExited("b", 1, 143),
    AttemptExited("b", 1, None, 5),
    AttemptExited("b", 1, 0, None, 12, 3, 4_096),
    AttemptExited("b", 1, None, None, None, None, 1),
    AttemptExited("b", 1),
    AttemptTimedOut("b", 2),
    AttemptLost("b", 2, "killed"),
    AttemptNotStarted("b", 3, "exec", "no such file: „x“", 7),
    AttemptNotStarted("b", 3, "cwd", ""),
    SupervisorStarted(FORMAT, RULES, "0.1.0", "boot-1", "host"),
    LogRecovered(17, "torn-400-0badcafe"),
    LogRecovered(0),
    StepStarted("ü → \u2028\n", 1),
    StepReady("b", 4),
    StepSucceeded("b", 5),
    StepFailed("b", 5, "exit"),
    StepRetried("b", 5, "timeout", 1_500),
    StepSkipped("d", 5, "b"),
    StepCancelled("d", 5, "run_timeout"),
    RunFinished(9, "FAILED", "steps_failed"),
)


def line_of(event: Event, seq: int = 4) -> Line:
    return Line(seq, logs.AT, 81_234_567, 3, event)


def raw_of(event: Event) -> bytes:
    return events.encode(line_of(event), SEED)[:-1]


def raw_with(example: Event, /, **changes: object) -> bytes:
    """The event's line with fields added or changed (`...` takes one away), and its checksum made right again."""
    return sealed({**json.loads(raw_of(example)), **changes})


def sealed(record: dict[str, Any]) -> bytes:
    own = {name: value for name, value in record.items() if value is not ... and name != "crc"}
    body = json.dumps(own, separators=(",", ":")).encode()[:-1] + b',"crc":"'
    return body + b'%08x"}' % zlib.crc32(body, SEED)


class RoundTrip(unittest.TestCase):
    def test_every_event_comes_back_equal(self) -> None:
        for event in EXAMPLES:
            with self.subTest(event=event):
                raw = raw_of(event)
                self.assertTrue(events.checks(raw, SEED))
                self.assertEqual(events.decode(raw), line_of(event))

    def test_the_examples_are_the_whole_vocabulary(self) -> None:
        classes = {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)}
        kinds = classes - {Event, Fact, Choice, Decision}
        self.assertEqual({type(event) for event in EXAMPLES}, kinds)
        self.assertEqual(len({kind.name for kind in kinds}), len(kinds))

    def test_a_line_reads_as_the_documentation_shows_it(self) -> None:
        raw = events.encode(line_of(StepRetried("b", 5, "timeout", 1_500)), SEED)
        self.assertEqual(
            raw,
            b'{"seq":4,"at":"2026-11-23T07:24:12.123456Z","mono_ms":81234567,"durable":3,"event":"step_retried",'
            b'"step":"b","cause":5,"reason":"timeout","delay_ms":1500,"crc":"90d8a7e9"}\n',
        )

    def test_field_order_is_fixed_and_what_is_none_is_left_out(self) -> None:
        for event in EXAMPLES:
            with self.subTest(event=event):
                own = [name for name, value in zip(event._fields, event, strict=True) if value is not None]
                names = ["seq", "at", "mono_ms", "durable", "event", *own, "crc"]
                self.assertEqual(list(json.loads(raw_of(event))), names)

    def test_a_line_is_ascii_without_control_characters_and_ends_in_its_only_newline(self) -> None:
        for event in EXAMPLES:
            with self.subTest(event=event):
                raw = events.encode(line_of(event), SEED)
                self.assertEqual(raw.rstrip(b"\n") + b"\n", raw)
                self.assertTrue(all(0x20 <= byte < 0x7F for byte in raw[:-1]))

    def test_decisions_name_their_cause_and_nothing_else_does(self) -> None:
        for event in EXAMPLES:
            with self.subTest(event=event):
                self.assertEqual(isinstance(event, Decision), hasattr(event, "cause"))
                self.assertEqual(sum(isinstance(event, kind) for kind in (Fact, Choice, Decision)), 1)

    def test_every_field_is_a_whole_number_a_string_or_the_workflow(self) -> None:
        for event in EXAMPLES:
            for name, kind in typing.get_type_hints(type(event)).items():
                if name != "name":
                    with self.subTest(event=event.name, field=name):
                        self.assertIn(kind, (int, str, int | None, str | None, Workflow))


class Checksum(unittest.TestCase):
    def test_every_byte_of_a_line_is_guarded(self) -> None:
        raw = raw_of(AttemptExited("b", 1, 0, 5))
        for place, byte in enumerate(raw):
            for value in {byte ^ 1, byte ^ 0x20, byte ^ 0x80, 0, 0x0A, 0x30, 0x7A, 0xFF} - {byte}:
                flipped = raw[:place] + bytes([value]) + raw[place + 1 :]
                self.assertFalse(events.checks(flipped, SEED), flipped)

    def test_the_digits_are_compared_as_bytes(self) -> None:
        raw = next(raw for raw in map(raw_of, EXAMPLES) if raw[-10:-2] != raw[-10:-2].upper())
        self.assertFalse(events.checks(raw[:-10] + raw[-10:].upper(), SEED))

    def test_a_line_of_another_run_is_refused(self) -> None:
        for other in ("r2", "r", "", "R1"):
            self.assertFalse(events.checks(raw_of(RunTimedOut()), events.seed(other)), other)

    def test_a_line_that_lost_or_gained_bytes_is_refused(self) -> None:
        raw = raw_of(RunTimedOut())
        for length in range(len(raw)):
            self.assertFalse(events.checks(raw[:length], SEED), length)
            self.assertFalse(events.checks(raw[length + 1 :], SEED), length)
        for other in (b" " + raw, raw + b" ", raw + raw, raw + b"\n"):
            self.assertFalse(events.checks(other, SEED), other)


class Refusals(unittest.TestCase):
    """Lines whose checksum is right and whose content `encode` would not write."""

    def assert_refused(self, raw: bytes, words: str) -> None:
        with self.subTest(raw=raw[:200]):
            with self.assertRaises(InvalidEvent) as caught:
                events.decode(raw)
            self.assertIn(words, str(caught.exception))

    def test_content(self) -> None:
        exited, ready = AttemptExited("b", 1, 0), StepReady("b", 4)
        cases = (
            (raw_with(ready, event="step_prepared"), "unknown event 'step_prepared'"),
            (raw_with(ready, event=7), "unknown event 7"),
            (raw_with(ready, event=["step_ready"]), "unknown event"),
            (raw_with(ready, event=...), "'event' is missing"),
            (raw_with(ready, step=...), "step_ready: the field 'step' is missing"),
            (raw_with(ready, cause=...), "'cause' is missing"),
            (raw_with(ready, seq=...), "'seq' is missing"),
            (raw_with(ready, durable=...), "'durable' is missing"),
            (raw_with(ready, colour="red"), "the field 'colour' is unknown"),
            (raw_with(ready, attempt=1), "the field 'attempt' is unknown"),
            (raw_with(ready, cause=True), "'cause' is of the wrong type"),
            (raw_with(ready, seq=True), "'seq' is of the wrong type"),
            (raw_with(ready, mono_ms=1.5), "'mono_ms' is of the wrong type"),
            (raw_with(ready, at=None), "'at' is of the wrong type"),
            (raw_with(ready, step=1), "'step' is of the wrong type"),
            (raw_with(exited, exit_code=None), "'exit_code' is of the wrong type"),
            (raw_with(exited, exit_code=False), "'exit_code' is of the wrong type"),
            (raw_with(exited, exit_code="0"), "'exit_code' is of the wrong type"),
            (raw_with(exited, exit_code=-1), "'exit_code' is negative"),
            (raw_with(exited, user_ms=float("nan")), "'user_ms' is of the wrong type"),
            (raw_with(ready, seq=-4), "'seq' is negative"),
            (raw_with(ready, durable=-1), "'durable' is negative"),
            (raw_with(ready, mono_ms=-1), "'mono_ms' is negative"),
            (sealed(dict(reversed(json.loads(raw_of(ready)).items()))), "not in their order"),
        )
        for raw, words in cases:
            self.assert_refused(raw, words)

    def test_what_is_no_json_object(self) -> None:
        for raw in (b"", b"null", b"[]", b"4", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5_000, b'{"seq":1}{}', b"{} "):
            self.assert_refused(raw, "")

    def test_missing_checksum(self) -> None:
        record = json.loads(raw_of(RunTimedOut()))
        del record["crc"]
        self.assert_refused(json.dumps(record, separators=(",", ":")).encode(), "'crc' is missing")

    def test_a_definition_that_is_none(self) -> None:
        submitted = EXAMPLES[0]
        record = json.loads(raw_of(submitted))["workflow"]
        self.assert_refused(raw_with(submitted, workflow=...), "'workflow' is missing")
        self.assert_refused(raw_with(submitted, workflow=[]), "'workflow' is of the wrong type")
        self.assert_refused(raw_with(submitted, workflow={}), "$.steps")
        self.assert_refused(raw_with(submitted, workflow={**record, "max_parallel": 0}), "$.max_parallel")

    def test_a_newer_log_is_refused_by_name_whatever_else_is_new_in_it(self) -> None:
        for event in (EXAMPLES[0], logs.session()):
            for name, ours in (("format", FORMAT), ("rules", RULES)):
                words = f"was written by a newer wfd ({name} {ours + 1}; this one reads up to {ours})"
                for newer in ({name: ours + 1}, {name: ours + 1, "mood": "new", "boot_id": ...}):
                    self.assert_refused(raw_with(event, **newer), words)
                    with self.assertRaises(NewerLog):
                        events.decode(raw_with(event, **newer))
                self.assert_refused(raw_with(event, **{name: 0}), f"{name} must be a whole number from 1 on")
                self.assert_refused(raw_with(event, **{name: "1"}), f"{name} must be a whole number from 1 on")


if __name__ == "__main__":
    unittest.main()
