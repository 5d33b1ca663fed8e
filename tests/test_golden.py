"""The golden logs, replayed: each means today what it meant when it was written. How they came about: golden.py."""

from __future__ import annotations

import io
import unittest
from collections.abc import Iterator

from tests import golden
from wfd import events, journal
from wfd.events import FORMAT, RULES, Line, RunRetried, RunSubmitted
from wfd.state import RUN_TRANSITIONS, STEP_TRANSITIONS, Run


class Corpus(unittest.TestCase):
    maxDiff = None

    def test_each_log_means_what_it_meant(self) -> None:
        self.assertEqual(list(golden.problems()), [])

    def test_fold_and_replay_tell_the_same(self) -> None:
        for path in golden.corpus():
            if golden.written(path)["replay"]["difference"] is None:
                with self.subTest(path.name):
                    run, _ = journal._fold(io.BytesIO(path.read_bytes()), "golden")
                    self.assertEqual(run.describe(), golden.written(path)["status"])

    def test_each_carries_the_versions_in_its_name(self) -> None:
        for path in golden.corpus():
            with self.subTest(path.name):
                first = next(lines_of(path.read_bytes())).event
                assert isinstance(first, RunSubmitted)
                self.assertTrue(path.name.startswith(f"f{first.format}r{first.rules}-"))

    def test_every_situation_is_there_for_the_versions_of_today(self) -> None:
        """Whoever gives the rules a new number records: `python -m tests.golden`."""
        there = {path.name for path in golden.corpus()}
        self.assertEqual({golden.path_of(situation).name for situation in golden.SITUATIONS} - there, set())
        self.assertEqual(len(there), len(list(golden.PLACE.glob("*.json"))))

    def test_a_change_of_the_rules_is_noticed(self) -> None:
        for bug in golden.BUGS:
            with self.subTest(bug):
                self.assertTrue(golden.is_noticed(bug))


def lines_of(data: bytes) -> Iterator[Line]:
    return iter(journal.Reading(io.BytesIO(data), "golden"))


class Completeness(unittest.TestCase):
    """The logs of today's versions go through everything that a run can go through."""

    def setUp(self) -> None:
        self.names: set[str] = set()
        self.steps: set[tuple[str, str]] = set()
        self.runs: set[tuple[str, str, str]] = set()
        for situation in golden.SITUATIONS:
            if situation.name != "forged":
                self.walk(golden.path_of(situation).read_bytes())

    def walk(self, data: bytes) -> None:
        lines = lines_of(data)
        first = next(lines)
        run = Run(first)
        self.names.add(first.event.name)
        for line in lines:
            event = line.event
            self.names.add(event.name)
            step = getattr(event, "step", None)
            before = run.state
            if step is not None:
                self.steps.add((run.steps[run.index_of[step]].state, event.name))
            elif isinstance(event, RunRetried):
                self.steps.update((record.state, event.name) for record in run.steps)
            run.apply(line)
            if step is None:
                self.runs.add((before, event.name, run.state))

    def test_every_event_is_there(self) -> None:
        self.assertEqual(self.names, {event.name for event in events._EVENTS})

    def test_every_transition_of_a_step_is_there(self) -> None:
        self.assertEqual({(state, kind.name) for state, kind in STEP_TRANSITIONS} - self.steps, set())

    def test_every_transition_of_a_run_is_there(self) -> None:
        rows = {(state, kind.name, after) for (state, kind), ends in RUN_TRANSITIONS.items() for after in ends}
        self.assertEqual(rows - self.runs, set())

    def test_the_versions_of_today_are_in_the_names(self) -> None:
        self.assertTrue(all(f"f{FORMAT}r{RULES}-" in golden.path_of(situation).name for situation in golden.SITUATIONS))


if __name__ == "__main__":
    unittest.main()
