"""Tests of wfd.definition: what is accepted, what is refused with which words, and many steps in any order."""

from __future__ import annotations

import gc
import json
import unittest
from itertools import pairwise
from typing import Any

from wfd import definition
from wfd.definition import Backoff, DefinitionError, Problem, Step, Workflow

BASE = "/base"
MANY = 100_000  # What is promised.
SOME = 20_000  # Enough for anything quadratic to be noticed, where the shape is rarer.


def workflow(*steps: object, **fields: object) -> dict[str, object]:
    return {"workflow_id": "w", "steps": list(steps) or [step()], **fields}


def step(id: object = "a", *depends_on: object, **fields: object) -> dict[str, object]:
    return {"id": id, "command": "true", **({"depends_on": list(depends_on)} if depends_on else {}), **fields}


def problems_of(document: object, base_dir: str = BASE) -> tuple[Problem, ...]:
    try:
        definition.validate(document, base_dir)
    except DefinitionError as error:
        return error.problems
    return ()


def problems_of_text(text: bytes) -> tuple[Problem, ...]:
    try:
        definition.parse(text, BASE)
    except DefinitionError as error:
        return error.problems
    return ()


# What is wrong in a document otherwise right -> the one problem: its path and a part of its message.
REFUSED: list[tuple[object, str, str]] = [
    # The document and its required fields.
    ([], "$", "must be an object, not a list"),
    (None, "$", "must be an object, not null"),
    ({"steps": [step()]}, "$.workflow_id", "is missing"),
    ({"workflow_id": "w"}, "$.steps", "is missing"),
    (workflow(workflow_id=None), "$.workflow_id", "must be a string, not null"),
    (workflow(steps=[]), "$.steps", "must not be empty"),
    (workflow(steps={"a": "true"}), "$.steps", "must be a list of steps, not an object"),
    (workflow(steps=[0] * (definition.MAX_STEPS + 1)), "$.steps", "at most 200000"),
    (workflow("true"), "$.steps[0]", 'must be an object, not "true"'),
    (workflow({"id": "a"}), "$.steps[0].command", "is missing; a step needs it"),
    (workflow({"command": "true"}), "$.steps[0].id", "is missing; a step needs it"),
    # Unknown fields, those of other tools and those of later versions too.
    (workflow(max_paralel=1), "$.max_paralel", 'did you mean "max_parallel"?'),
    (workflow(fail_fast=True), "$.fail_fast", "unknown field; a workflow has workflow_id, steps"),
    (workflow(step(comand="x")), "$.steps[0].comand", 'did you mean "command"?'),
    (workflow(step(timeout=1)), "$.steps[0].timeout", 'did you mean "timeout_sec"?'),
    (workflow(step(Retries=1)), "$.steps[0].Retries", 'did you mean "retries"?'),
    (workflow(step(priority=1)), "$.steps[0].priority", "unknown field"),
    (workflow(step(backoff={"facter": 1})), "$.steps[0].backoff.facter", 'did you mean "factor"?'),
    (workflow(**{"a b": 1}), '$["a b"]', "unknown field"),
    (workflow(**{"x" * 1000: 1}), f'$["{"x" * 60}…"]', "unknown field"),
    # Null, and true where a number belongs.
    (workflow(cwd=None), "$.cwd", "must not be null; leave it out"),
    (workflow(step(timeout_sec=None)), "$.steps[0].timeout_sec", "must not be null; leave it out"),
    (workflow(step(backoff={"jitter": None})), "$.steps[0].backoff.jitter", "must not be null; leave it out"),
    (workflow(step(timeout_sec=True)), "$.steps[0].timeout_sec", "not true"),
    (workflow(step(retries=False)), "$.steps[0].retries", "not false"),
    (workflow(step(grace_sec=True)), "$.steps[0].grace_sec", "not true"),
    (workflow(max_parallel=True), "$.max_parallel", "not true"),
    # Ids.
    (workflow(step(5)), "$.steps[0].id", "must be a string, not 5"),
    (workflow(step("")), "$.steps[0].id", "empty or blank"),
    (workflow(step("  ")), "$.steps[0].id", "empty or blank"),
    (workflow(step("\u200b\ufeff")), "$.steps[0].id", "empty or blank"),
    (workflow(step(" a")), "$.steps[0].id", 'begin or end with a space, as " a" does'),
    (workflow(step("a ")), "$.steps[0].id", "begin or end with a space"),
    (workflow(step("a\u00a0")), "$.steps[0].id", "begin or end with a space"),
    (workflow(step("-rf")), "$.steps[0].id", "must not begin with -"),
    (workflow(step("a\nb")), "$.steps[0].id", "the control character U+000A at character 2"),
    (workflow(step("a\0")), "$.steps[0].id", "U+0000 at character 2"),
    (workflow(step("a\x9bb")), "$.steps[0].id", "U+009B"),
    (workflow(step("a\u202eb")), "$.steps[0].id", "U+202E"),
    (workflow(step("a\ud800")), "$.steps[0].id", "a lone surrogate U+D800"),
    (workflow(step("x" * 201)), "$.steps[0].id", "201 characters long; at most 200"),
    (workflow(step("é\u200d" * 101)), "$.steps[0].id", "202 characters long; at most 200"),
    (workflow(workflow_id="-w"), "$.workflow_id", "must not begin with -"),
    # Commands.
    (workflow(step(command=5)), "$.steps[0].command", "must be a string, not 5"),
    (workflow(step(command=["ls"])), "$.steps[0].command", "must be a string, not a list"),
    (workflow(step(command="")), "$.steps[0].command", "empty or blank"),
    (workflow(step(command=" \n\t")), "$.steps[0].command", "empty or blank"),
    (workflow(step(command="a\r\nb")), "$.steps[0].command", "U+000D at character 2"),
    (workflow(step(command="a\0b")), "$.steps[0].command", "U+0000 at character 2"),
    (workflow(step(command="echo \udcff")), "$.steps[0].command", "a lone surrogate U+DCFF"),
    (workflow(step(command="x" * (1024 * 1024 + 1))), "$.steps[0].command", "1048577 bytes long"),
    (workflow(step(command="é" * 524_289)), "$.steps[0].command", "1048578 bytes long"),
    # Numbers.
    (workflow(max_parallel=0), "$.max_parallel", "a whole number from 1 to 200000, not 0"),
    (workflow(max_parallel=2.0), "$.max_parallel", "a whole number from 1 to 200000, not 2.0"),
    (workflow(timeout_sec=-1), "$.timeout_sec", "above 0 and at most 31622400, not -1"),
    (workflow(step(retries=-1)), "$.steps[0].retries", "a whole number from 0 to 10000, not -1"),
    (workflow(step(retries=10_001)), "$.steps[0].retries", "not 10001"),
    (workflow(step(retries=1.5)), "$.steps[0].retries", "not 1.5"),
    (workflow(step(retries="2")), "$.steps[0].retries", 'not "2"'),
    (workflow(step(retries=10**5000)), "$.steps[0].retries", "not a number of many digits"),
    (workflow(step(timeout_sec=0)), "$.steps[0].timeout_sec", "leave it out for no limit"),
    (workflow(step(timeout_sec="30")), "$.steps[0].timeout_sec", 'not "30"'),
    (workflow(step(timeout_sec=31_622_401)), "$.steps[0].timeout_sec", "not 31622401"),
    (workflow(step(timeout_sec=float("nan"))), "$.steps[0].timeout_sec", "not NaN"),
    (workflow(step(timeout_sec=float("inf"))), "$.steps[0].timeout_sec", "not Infinity"),
    (workflow(step(grace_sec=-0.5)), "$.steps[0].grace_sec", "a number of seconds from 0 to 86400, not -0.5"),
    (workflow(step(grace_sec=float("-inf"))), "$.steps[0].grace_sec", "not -Infinity"),
    # Back-off.
    (workflow(step(backoff=5)), "$.steps[0].backoff", "must be an object, not 5"),
    (workflow(step(backoff={"factor": 0.5})), "$.steps[0].backoff.factor", "a number from 1 to 1000, not 0.5"),
    (workflow(step(backoff={"jitter": 1.5})), "$.steps[0].backoff.jitter", "a number from 0 to 1, not 1.5"),
    (workflow(step(backoff={"initial_sec": -1})), "$.steps[0].backoff.initial_sec", "not -1"),
    (workflow(step(backoff={"max_sec": float("nan")})), "$.steps[0].backoff.max_sec", "not NaN"),
    (workflow(step(backoff={"initial_sec": 5, "max_sec": 4})), "$.steps[0].backoff", "lower the first"),
    (workflow(step(backoff={"initial_sec": 61})), "$.steps[0].backoff", "below the first (61000 ms); give max_sec too"),
    # Environment.
    (workflow(env=["A=1"]), "$.env", "must be an object of names and strings, not a list"),
    (workflow(env={"A": 1}), "$.env.A", "must be a string, not 1; put it in quotes"),
    (workflow(env={"A": None}), "$.env.A", "must be a string, not null"),
    (workflow(env={"1A": "x"}), '$.env["1A"]', "is no name for a variable"),
    (workflow(env={"": "x"}), '$.env[""]', "is no name for a variable"),
    (workflow(env={"A\n": "x"}), '$.env["A\\n"]', "is no name for a variable"),
    (workflow(env={"Ä": "x"}), '$.env["Ä"]', "is no name for a variable"),
    (workflow(env={5: "x"}), "$.env[5]", "is no name for a variable"),
    (workflow(env={"WFD_RUN_ID": "x"}), "$.env.WFD_RUN_ID", "is reserved"),
    (workflow(env={"A": "x\0"}), "$.env.A", "U+0000"),
    (workflow(env={"A": "\udc80"}), "$.env.A", "a lone surrogate U+DC80"),
    (workflow(env={"A": "x" * 131_070}), "$.env.A", "131072 bytes long with its name; at most 131071"),
    (workflow(env={f"A{n}": "" for n in range(1001)}), "$.env", "has 1001 names; at most 1000"),
    (workflow(step(env={"A": 1})), "$.steps[0].env.A", "must be a string, not 1"),
    # Directories.
    (workflow(cwd=5), "$.cwd", "must be a string, not 5"),
    (workflow(cwd=""), "$.cwd", "empty or blank"),
    (workflow(cwd="~/x"), "$.cwd", "~ is not expanded"),
    (workflow(cwd="a\nb"), "$.cwd", "U+000A"),
    (workflow(step(cwd="~me")), "$.steps[0].cwd", "~ is not expanded"),
    (workflow(step(cwd="x" * 4096)), "$.steps[0].cwd", "4096 bytes long; at most 4095"),
    (workflow(step(cwd="x" * 4095)), "$.steps[0].cwd", "4101 bytes long with the directory it starts from"),
    (workflow(cwd="x" * 4095), "$.cwd", "4101 bytes long with the directory it starts from"),
    # What to do when the daemon is lost.
    (workflow(step(on_lost="Fail")), "$.steps[0].on_lost", 'must be "retry" or "fail", not "Fail"'),
    (workflow(step(on_lost=["fail"])), "$.steps[0].on_lost", "not a list"),
    # Dependencies.
    (workflow(step("a"), step("b", depends_on="a")), "$.steps[1].depends_on", 'must be a list of step ids, not "a"'),
    (workflow(step("a"), step("b", 1)), "$.steps[1].depends_on[0]", "must be a string, the id of a step, not 1"),
    (workflow(step("a"), step("b", ["a"])), "$.steps[1].depends_on[0]", "not a list"),
    (workflow(step("a"), step("b", "a", "a")), "$.steps[1].depends_on[1]", 'repeats "a" of [0]'),
    (workflow(step("a", "a")), "$.steps[0].depends_on[0]", "depends on itself"),
    (workflow(step("a"), step("b", "zzz")), "$.steps[1].depends_on[0]", 'no step has the id "zzz"; add that step'),
    (workflow(step("download"), step("b", "downlaod")), "$.steps[1].depends_on[0]", 'did you mean "download"?'),
    (workflow(step("download"), step("b", "DOWNLOAD")), "$.steps[1].depends_on[0]", 'did you mean "download"?'),
    # Ids given twice.
    (workflow(step("a"), step("b"), step("a")), "$.steps[2].id", '"a" is taken by $.steps[0]; rename one'),
    (workflow(step("a"), step("A")), "$.steps[1].id", 'taken, but for case or Unicode form ("a"), by $.steps[0]'),
    (workflow(step("caf\u00e9"), step("cafe\u0301")), "$.steps[1].id", "but for case or Unicode form"),
    (workflow(step("STRASSE"), step("straße")), "$.steps[1].id", "but for case or Unicode form"),
    (workflow(step("DOWNLOAD"), step("b", "download")), "$.steps[1].depends_on[0]", 'did you mean "DOWNLOAD"?'),
    # Cycles. An arrow reads "runs before".
    (workflow(step("a", "b"), step("b", "a")), "$.steps[0].depends_on[0]", ": a → b → a;"),
    (
        workflow(step("b", "a"), step("x"), step("a", "x", "c"), step("c", "b")),
        "$.steps[0].depends_on[0]",
        "each step before the next: b → c → a → b;",
    ),
    (
        workflow(step("x", "c"), step("a", "c"), step("b", "a"), step("c", "b")),
        "$.steps[1].depends_on[0]",
        "each step before the next: a → b → c → a;",
    ),
]

# JSON text -> the one problem.
REFUSED_TEXT: list[tuple[bytes, str, str]] = [
    (b"", "$", "is empty"),
    (b" \n", "$", "is empty"),
    (b"{", "$", "is not JSON"),
    (b'{"a": 1,\n "b" 2}', "$", "at line 2, column 6"),
    (b"{} {}", "$", "is not JSON"),
    (b"\xef\xbb\xbf{}", "$", "byte order mark"),
    ('{"a": 1}'.encode("utf-16"), "$", "save it as UTF-8"),
    ('{"a": 1}'.encode("utf-16-le"), "$", "save it as UTF-8"),
    ('{"a": 1}'.encode("utf-32-be"), "$", "save it as UTF-8"),
    (b'{"workflow_id": "\xff"}', "$", "byte 17 is 0xff"),
    (b'{"workflow_id": "a\nb"}', "$", "is not JSON: Invalid control character at line 1, column 19"),
    (b"[" * 200_000 + b"]" * 200_000, "$", "nested too deeply"),
    (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "$", "nested too deeply"),
    (b" " * (definition.MAX_DEFINITION_BYTES + 1), "$", "at most 62914560"),
    (
        b'{"workflow_id": "w", "steps": [{"id": "a", "command": "x", "command": "y"}]}',
        "$.steps[0].command",
        "is given more than once",
    ),
    (
        b'{"workflow_id": "w", "workflow_id": "w", "steps": [{"id": "a", "command": "x"}]}',
        "$.workflow_id",
        "is given more than once",
    ),
    (
        b'{"workflow_id": "w", "steps": [{"id": "a", "command": "x", "timeout_sec": NaN}]}',
        "$.steps[0].timeout_sec",
        "not NaN",
    ),
    (
        b'{"workflow_id": "w", "steps": [{"id": "a", "command": "x", "timeout_sec": -Infinity}]}',
        "$.steps[0].timeout_sec",
        "not -Infinity",
    ),
    (
        b'{"workflow_id": "w", "steps": [{"id": "a", "command": "x", "timeout_sec": 1e999}]}',
        "$.steps[0].timeout_sec",
        "not 1e999",
    ),
    (
        b'{"workflow_id": "w", "steps": [{"id": "a", "command": "x", "retries": ' + b"1" * 10_000 + b"}]}",
        "$.steps[0].retries",
        "not a number of many digits",
    ),
    (
        b'{"workflow_id": "w", "steps": [{"id": "\\ud83d", "command": "x"}]}',
        "$.steps[0].id",
        "a lone surrogate U+D83D",
    ),
]


class Refusing(unittest.TestCase):
    def test_each_mistake_is_the_one_problem_reported_with_its_path_and_hint(self) -> None:
        for document, path, message in REFUSED:
            with self.subTest(path=path, message=message):
                problems = problems_of(document)
                self.assertEqual([problem.path for problem in problems], [path])
                self.assertIn(message, problems[0].message)

    def test_what_equals_a_good_value_is_none(self) -> None:
        # Back-offs are remembered, and True == 1.0 == 1.
        for good, bad in (({"initial_sec": 1}, {"initial_sec": True}), ({"factor": 1.0}, {"factor": True})):
            definition.validate(workflow(step(backoff=good)), BASE)
            with self.subTest(bad=bad):
                self.assertEqual(len(problems_of(workflow(step(backoff=bad)))), 1)
        self.assertEqual(len(problems_of(workflow(step(backoff={"factor": [1]})))), 1)

    def test_each_mistake_in_the_text(self) -> None:
        for text, path, message in REFUSED_TEXT:
            with self.subTest(text=text[:80], message=message):
                problems = problems_of_text(text)
                self.assertEqual([problem.path for problem in problems], [path])
                self.assertIn(message, problems[0].message)

    def test_every_message_is_one_short_line_that_any_terminal_can_show(self) -> None:
        texts = [problem for document, _, _ in REFUSED for problem in problems_of(document)]
        texts += [problem for text, _, _ in REFUSED_TEXT for problem in problems_of_text(text)]
        for problem in texts:
            with self.subTest(problem=problem):
                self.assertTrue(str(problem).isprintable())
                self.assertLess(len(str(problem)), 300)

    def test_all_problems_at_once(self) -> None:
        text = b"""{
            "workflow_id": " w", "max_parallel": 0, "colour": 1, "cwd": "~",
            "steps": [
                {"id": "a", "command": "", "retries": -1, "retries": -2},
                {"id": "b", "command": "true", "depends_on": ["c", "d", 7], "timeout_sec": 1e999},
                {"id": "c", "command": "true", "depends_on": ["b"], "env": {"WFD_X": "", "B": 2, "2": "x"}},
                "step",
                {"id": "A", "depends_on": ["A", "bb", "b", "b"], "backoff": {"factor": 0, "x": 1}}
            ]
        }"""
        self.assertEqual(
            sorted(problem.path for problem in problems_of_text(text)),
            sorted(
                [
                    "$.colour",
                    "$.cwd",
                    "$.max_parallel",
                    "$.workflow_id",
                    "$.steps[0].command",
                    "$.steps[0].retries",  # Given twice,
                    "$.steps[0].retries",  # and out of range.
                    "$.steps[1].depends_on[0]",  # Closes a cycle.
                    "$.steps[1].depends_on[1]",  # Unknown.
                    "$.steps[1].depends_on[2]",
                    "$.steps[1].timeout_sec",
                    "$.steps[2].env.B",
                    '$.steps[2].env["2"]',
                    "$.steps[2].env.WFD_X",
                    "$.steps[3]",
                    "$.steps[4].backoff.factor",
                    "$.steps[4].backoff.x",
                    "$.steps[4].command",
                    "$.steps[4].depends_on[0]",  # Itself.
                    "$.steps[4].depends_on[1]",  # Unknown.
                    "$.steps[4].depends_on[3]",  # Repeated.
                    "$.steps[4].id",  # Taken but for case.
                ]
            ),
        )

    def test_a_base_dir_that_is_not_utf_8_harms_only_what_starts_there(self) -> None:
        base_dir = "/home/caf\udce9"
        steps = [{"id": "a", "command": "true"}]
        definition.validate({"workflow_id": "w", "cwd": "/tmp", "steps": steps}, base_dir)
        for cwd in (".", "sub"):
            with self.subTest(cwd=cwd), self.assertRaises(DefinitionError) as caught:
                definition.validate({"workflow_id": "w", "cwd": cwd, "steps": steps}, base_dir)
            self.assertEqual([problem.path for problem in caught.exception.problems], ["$.cwd"])

    def test_base_dir_is_checked_like_the_rest_and_with_it(self) -> None:
        for base_dir in ("", "relative", "~/x", "/a\0", None, "/x" * 5000):
            with self.subTest(base_dir=base_dir):
                paths = [problem.path for problem in problems_of(workflow(cwd=5), base_dir)]  # type: ignore[arg-type]
                self.assertEqual(paths, ["base_dir", "$.cwd"])

    def test_cycles_that_share_no_step_are_all_reported_but_no_more_than_the_limit(self) -> None:
        for pairs, expected in ((2, 2), (100, definition.MAX_CYCLES)):
            steps = [step(f"{side}{n}", f"{other}{n}") for n in range(pairs) for side, other in ("ab", "ba")]
            problems = problems_of(workflow(*steps))
            self.assertEqual(len(problems), expected)
            self.assertIn("a0 → b0 → a0", problems[0].message)
            self.assertIn("a1 → b1 → a1", problems[1].message)

    def test_a_cycle_is_one_in_the_graph(self) -> None:
        """Each arrow of the text is a dependency, whatever the graph around it looks like."""
        edges = {"a": "bc", "b": "cd", "c": "e", "d": "f", "e": "d", "f": "bg", "g": ""}
        (problem,) = problems_of(workflow(*(step(id, *edges[id]) for id in "gfedcba")))
        names = problem.message.partition(": ")[2].partition(";")[0].split(" → ")
        self.assertGreater(len(names), 2)
        self.assertEqual(names[0], names[-1])
        for first, second in pairwise(names):
            self.assertIn(first, edges[second], problem.message)

    def test_an_unhashable_or_foreign_value_anywhere_is_refused_and_never_a_traceback(self) -> None:
        foreign: list[Any] = [[], {}, [[]], {"a": []}, (), b"x", object(), 1j, {1}, {None: 1}, {(): 1}, 10**6000, -0.5]
        good = workflow(step("a"), step("b", "a", retries=1, timeout_sec=1, backoff={"factor": 2}, env={"A": "x"}))
        for index, value in enumerate(foreign):
            for field in ("workflow_id", "steps", "max_parallel", "cwd", "timeout_sec", "colour"):
                with self.subTest(value=index, field=field):
                    self.assertTrue(problems_of({**good, field: value}))
            for field in ("id", "command", "retries", "timeout_sec", "cwd", "grace_sec", "on_lost", "colour"):
                with self.subTest(value=index, step_field=field):
                    self.assertTrue(problems_of(workflow({**step(), field: value}, step("b", "a"))))
            with self.subTest(value=index, within="depends_on, env, backoff"):
                self.assertTrue(problems_of(workflow(step("a"), step("b", value, "a"))))
                self.assertTrue(problems_of(workflow(step(env={"A": value}))))
                self.assertTrue(problems_of(workflow(step(backoff={"factor": value}))))

    def test_the_error_prints_one_problem_a_line_and_counts_what_it_leaves_out(self) -> None:
        self.assertEqual(
            str(Problem("$.steps[2].command", "must be a string, not 5")), "$.steps[2].command: must be a string, not 5"
        )
        for count in (1, 20, 21, 50):
            error = DefinitionError(Problem("$", f"p{n}") for n in range(count))
            lines = str(error).split("\n")
            self.assertEqual(lines[: min(count, 20)], [f"$: p{n}" for n in range(min(count, 20))])
            self.assertEqual(lines[20:], [f"... and {count - 20} more"] if count > 20 else [])

    def test_a_document_that_is_wrong_throughout_gives_a_bounded_error(self) -> None:
        many = 5 * definition.MAX_PROBLEMS
        documents = {
            "steps": workflow(*([0] * many)),
            "unknown": workflow(*(step(str(n), "x", "y") for n in range(many))),
            "taken": workflow(*([step()] * many)),
            "repeated": workflow(step("a"), step("b", *(["a"] * many))),
            "fields": {str(n): n for n in range(many)},
        }
        for name, document in documents.items():
            with self.subTest(name):
                problems = problems_of(document)
                self.assertLessEqual(len(problems), definition.MAX_PROBLEMS + 1)
                if len(problems) > definition.MAX_PROBLEMS:
                    self.assertIn("more problems", problems[-1].message)

    def test_unknown_fields_are_named_up_to_the_limit_and_then_counted(self) -> None:
        for count in (10, 11, 5000):
            with self.subTest(count=count):
                problems = problems_of({**workflow(), **{f"x{n}": n for n in range(count)}})
                rest = [f"$: has {count - 10} more unknown fields"] if count > 10 else []
                self.assertEqual([problem.path for problem in problems[:10]], [f"$.x{n}" for n in range(10)])
                self.assertEqual([str(problem) for problem in problems[10:]], rest)

    def test_a_guess_is_right_among_many_and_not_made_for_all(self) -> None:
        steps = [step(f"resize-{n:05}-image") for n in range(10_000)]
        cases = (
            ("resize-01234-imaeg", "resize-01234-image"),
            ("resiez-01234-image", "resize-01234-image"),
            ("resize-01234-image-", "resize-01234-image"),
            ("Resize-01234-image", "resize-01234-image"),
            ("resize-00000-imaeg", "resize-00000-image"),
            ("resize-09999-imaeg", "resize-09999-image"),
        )
        problems = problems_of(workflow(*steps, *(step(f"b{n}", wrong) for n, (wrong, _) in enumerate(cases))))
        for (wrong, right), problem in zip(cases, problems, strict=True):
            with self.subTest(wrong):
                self.assertIn(f'did you mean "{right}"?', problem.message)
        problems = problems_of(workflow(*steps, *(step(f"b{n}", f"resize-{n:05}-imagee") for n in range(50))))
        self.assertEqual(sum("did you mean" in problem.message for problem in problems), definition.MAX_GUESSES)
        self.assertEqual(len(problems), 50)


class Accepting(unittest.TestCase):
    def test_defaults(self) -> None:
        self.assertEqual(
            definition.parse(b'{"workflow_id": "w", "steps": [{"id": "a", "command": "x"}]}', BASE),
            Workflow(
                workflow_id="w",
                steps=(
                    Step(
                        id="a",
                        command="x",
                        depends_on=(),
                        retries=0,
                        timeout_ms=None,
                        backoff=Backoff(initial_ms=1000, factor_permille=2000, max_ms=60_000, jitter_permille=0),
                        env={},
                        cwd=None,
                        grace_ms=10_000,
                        on_lost="retry",
                    ),
                ),
                max_parallel=None,
                env={},
                cwd=None,
                timeout_ms=None,
            ),
        )

    def test_every_field(self) -> None:
        self.assertEqual(definition.validate(EVERY_FIELD, BASE), EVERY_FIELD_READ)

    def test_text_and_value_agree(self) -> None:
        self.assertEqual(definition.parse(json.dumps(EVERY_FIELD).encode(), BASE), EVERY_FIELD_READ)
        self.assertEqual(definition.decode(json.dumps(EVERY_FIELD).encode()), EVERY_FIELD)

    def test_unusual_but_right(self) -> None:
        odd_ids = ["größe", "a/b", "../x", "@latest", "a b", "日本", "👩‍👩‍👧", "x" * 200, ".", "a-", "İ", "1"]
        commands = ["a\n\tb\n", "é" * 524_288, "-x", " true ", "echo \u202e\u2028", "#"]
        document = workflow(
            *(step(id) for id in odd_ids),
            *(step(f"c{n}", command=command) for n, command in enumerate(commands)),
            env={"A": "\x1b[0m\n\r", "_1": "", "wfd_x": "x", "B": "x" * 131_069},
        )
        read = definition.validate(document, BASE)
        self.assertEqual([step.id for step in read.steps[: len(odd_ids)]], odd_ids)
        self.assertEqual([step.command for step in read.steps[len(odd_ids) :]], commands)
        self.assertEqual(read.env, document["env"])
        self.assertEqual(definition.from_record(definition.to_record(read)), read)

    def test_seconds_become_milliseconds_half_up_and_never_vanish(self) -> None:
        for seconds, expected_ms in (
            (1, 1000),
            (30.5, 30_500),
            (0.0005, 1),
            (0.0015, 2),
            (0.5005, 501),  # Its product with 1000 is 500.49999999999994.
            (1.0004, 1000),
            (0.0001, 1),
            (5e-324, 1),
            (31_622_400, 31_622_400_000),
        ):
            with self.subTest(seconds=seconds):
                read = definition.validate(workflow(step(timeout_sec=seconds), timeout_sec=seconds), BASE)
                self.assertEqual((read.steps[0].timeout_ms, read.timeout_ms), (expected_ms, expected_ms))
        zero = definition.validate(workflow(step(grace_sec=0, backoff={"initial_sec": 0.0, "max_sec": 0})), BASE)
        self.assertEqual((zero.steps[0].grace_ms, zero.steps[0].backoff), (0, Backoff(0, 2000, 0, 0)))

    def test_directories(self) -> None:
        for base_dir, outer, inner, expected in (
            ("/base", None, None, (None, None)),
            ("/base", "x", None, ("/base/x", None)),
            ("/base", None, "x", (None, "/base/x")),
            ("/base", "x", "y/z", ("/base/x", "/base/x/y/z")),
            ("/base", "/abs", "y", ("/abs", "/abs/y")),
            ("/base", "x", "/abs", ("/base/x", "/abs")),
            ("/base", ".", ".", ("/base", "/base")),
            ("/base", "..", "./y", ("/base/..", "/base/.././y")),
            ("/", "x", "y", ("/x", "/x/y")),
            ("/base/", "x", " ~", ("/base/x", "/base/x/ ~")),
        ):
            with self.subTest(base_dir=base_dir, outer=outer, inner=inner):
                fields = {} if outer is None else {"cwd": outer}
                steps = step("a") if inner is None else step("a", cwd=inner)
                read = definition.validate(workflow(steps, **fields), base_dir)
                self.assertEqual((read.cwd, read.steps[0].cwd), expected)

    def test_no_two_steps_share_an_environment(self) -> None:
        first, second = definition.validate(workflow(step("a"), step("b")), BASE).steps
        first.env["A"] = "x"
        self.assertEqual(second.env, {})


class Size(unittest.TestCase):
    """Shapes of many steps: read without recursion, in any order. Anything quadratic would take minutes here."""

    def setUp(self) -> None:
        # The collector would look at hundreds of thousands of living objects again and again.
        gc.disable()
        self.addCleanup(gc.enable)

    def test_chain_written_backwards(self) -> None:
        self.check([step(f"s{n}", f"s{n - 1}") for n in range(MANY - 1, 0, -1)] + [step("s0")])

    def test_fan_out(self) -> None:
        self.check([step("s0"), *(step(f"s{n}", "s0") for n in range(1, SOME))])

    def test_fan_in(self) -> None:
        self.check([step("last", *(f"s{n}" for n in range(1, SOME))), *(step(f"s{n}") for n in range(1, SOME))])

    def check(self, steps: list[dict[str, object]]) -> None:
        read = definition.validate(workflow(*steps), BASE)
        self.assertEqual(len(read.steps), len(steps))
        for written, found in zip(steps, read.steps, strict=True):
            if (written["id"], written.get("depends_on", [])) != (found.id, list(found.depends_on)):
                self.fail(f"{written} was read as {found}")

    def test_chain_through_its_record(self) -> None:
        read = definition.validate(workflow(step("s0"), *(step(f"s{n}", f"s{n - 1}") for n in range(1, SOME))), BASE)
        self.assertEqual(definition.from_record(definition.to_record(read)), read)

    def test_a_long_cycle_is_found_and_printed_short(self) -> None:
        steps = [step(f"s{n}", f"s{(n - 1) % SOME}") for n in range(SOME)]
        (problem,) = problems_of(workflow(*steps))
        self.assertEqual(problem.path, "$.steps[0].depends_on[0]")
        self.assertIn(": s0 → s1 → s2 → s3 → s4 → s5 → (19989 more) → s19995 → ", problem.message)
        self.assertIn(" → s19999 → s0;", problem.message)


EVERY_FIELD: dict[str, object] = {
    "workflow_id": "w",
    "max_parallel": 4,
    "env": {"B": "2", "A": "1"},
    "cwd": "sub",
    "timeout_sec": 3600,
    "steps": [
        {"id": "a", "command": "true"},
        {
            "id": "b",
            "command": "false",
            "depends_on": ["a"],
            "retries": 3,
            "timeout_sec": 1.5,
            "backoff": {"initial_sec": 0.25, "factor": 1.5, "max_sec": 10, "jitter": 0.1},
            "env": {"C": ""},
            "cwd": "deep",
            "grace_sec": 0.5,
            "on_lost": "fail",
        },
    ],
}
EVERY_FIELD_READ = Workflow(
    "w",
    (
        Step("a", "true", (), 0, None, Backoff(1000, 2000, 60_000, 0), {}, None, 10_000, "retry"),
        Step("b", "false", ("a",), 3, 1500, Backoff(250, 1500, 10_000, 100), {"C": ""}, "/base/sub/deep", 500, "fail"),
    ),
    4,
    {"B": "2", "A": "1"},
    "/base/sub",
    3_600_000,
)
# The bytes that go into line 1 of a log. They must stay readable for ever.
EVERY_FIELD_RECORD = (
    '{"workflow_id":"w","steps":['
    '{"id":"a","command":"true","depends_on":[],"retries":0,'
    '"backoff":{"initial_ms":1000,"factor_permille":2000,"max_ms":60000,"jitter_permille":0},'
    '"env":{},"grace_ms":10000,"on_lost":"retry"},'
    '{"id":"b","command":"false","depends_on":["a"],"retries":3,"timeout_ms":1500,'
    '"backoff":{"initial_ms":250,"factor_permille":1500,"max_ms":10000,"jitter_permille":100},'
    '"env":{"C":""},"cwd":"/base/sub/deep","grace_ms":500,"on_lost":"fail"}],'
    '"max_parallel":4,"env":{"A":"1","B":"2"},"cwd":"/base/sub","timeout_ms":3600000}'
)


class Record(unittest.TestCase):
    def test_golden_bytes(self) -> None:
        record = definition.to_record(EVERY_FIELD_READ)
        self.assertEqual(json.dumps(record, separators=(",", ":")), EVERY_FIELD_RECORD)
        self.assertEqual(definition.from_record(json.loads(EVERY_FIELD_RECORD)), EVERY_FIELD_READ)

    def test_anything_that_to_record_cannot_have_written_is_refused(self) -> None:
        for keys, value, path in (
            (("workflow_id",), None, "$.workflow_id"),
            (("workflow_id",), REMOVE, "$.workflow_id"),
            (("env",), REMOVE, "$.env"),
            (("steps",), [], "$.steps"),
            (("max_parallel",), None, "$.max_parallel"),
            (("cwd",), "sub", "$.cwd"),
            (("timeout_ms",), 1.5, "$.timeout_ms"),
            (("timeout_ms",), 0, "$.timeout_ms"),
            (("timeout_sec",), 1, "$.timeout_sec"),
            (("steps", 1, "timeout_sec"), 1, "$.steps[1].timeout_sec"),
            (("steps", 1, "timeout_ms"), True, "$.steps[1].timeout_ms"),
            (("steps", 1, "timeout_ms"), None, "$.steps[1].timeout_ms"),
            (("steps", 0, "depends_on"), REMOVE, "$.steps[0].depends_on"),
            (("steps", 0, "depends_on"), ["b"], "$.steps[0].depends_on[0]"),
            (("steps", 0, "depends_on"), ["zz"], "$.steps[0].depends_on[0]"),
            (("steps", 0, "retries"), REMOVE, "$.steps[0].retries"),
            (("steps", 0, "retries"), 1.0, "$.steps[0].retries"),
            (("steps", 0, "grace_ms"), 86_400_001, "$.steps[0].grace_ms"),
            (("steps", 0, "on_lost"), "RETRY", "$.steps[0].on_lost"),
            (("steps", 0, "cwd"), "x", "$.steps[0].cwd"),
            (("steps", 0, "id"), "b", "$.steps[1].id"),
            (("steps", 0, "backoff"), {}, "$.steps[0].backoff.initial_ms"),
            (("steps", 0, "backoff", "factor_permille"), 999, "$.steps[0].backoff.factor_permille"),
            (("steps", 0, "backoff", "factor_permille"), 1_000_001, "$.steps[0].backoff.factor_permille"),
            (("steps", 0, "backoff", "jitter_permille"), 1001, "$.steps[0].backoff.jitter_permille"),
            (("steps", 0, "backoff", "max_ms"), 999, "$.steps[0].backoff"),
            (("steps", 0, "backoff", "factor"), 2, "$.steps[0].backoff.factor"),
        ):
            with self.subTest(keys=keys, value=value):
                record = json.loads(EVERY_FIELD_RECORD)
                place = record
                for key in keys[:-1]:
                    place = place[key]
                if value is REMOVE:
                    del place[keys[-1]]
                else:
                    place[keys[-1]] = value
                with self.assertRaises(DefinitionError) as caught:
                    definition.from_record(record)
                self.assertEqual(caught.exception.problems[0].path, path)

    def test_a_users_definition_is_no_record(self) -> None:
        with self.assertRaises(DefinitionError):
            definition.from_record(EVERY_FIELD)


REMOVE = object()


class Decode(unittest.TestCase):
    def test_strict_wherever_in_the_document(self) -> None:
        for text, paths in (
            (b'{"a": {"b": 1, "b": 2, "c": NaN}}', ["$.a.b", "$.a.c"]),
            (b'[1, {"x": [Infinity]}, -1e400]', ["$[1].x[0]", "$[2]"]),
            (b"[" + b"9" * 21 + b"]", ["$[0]"]),
            (b'{"a": 1, "a": {"b": 1, "b": 1}}', ["$.a", "$.a.b"]),
        ):
            with self.subTest(text=text), self.assertRaises(DefinitionError) as caught:
                definition.decode(text)
            self.assertEqual(sorted(problem.path for problem in caught.exception.problems), paths)

    def test_any_sound_json_passes(self) -> None:
        for text in (b"null", b'[1, 2.5, "x", {"a": [true]}]', '["é", "\\u00e9"]'.encode(), b"[" + b"9" * 20 + b"]"):
            with self.subTest(text=text):
                self.assertEqual(definition.decode(text), json.loads(text))


class Delay(unittest.TestCase):
    def test_the_formula(self) -> None:
        default = Backoff(initial_ms=1000, factor_permille=2000, max_ms=60_000, jitter_permille=0)
        for backoff, failures, draw_ppm, expected in (
            (default, 1, 0, 1000),
            (default, 2, 0, 2000),
            (default, 6, 0, 32_000),
            (default, 7, 0, 60_000),
            (default, 10**9, 999_999, 60_000),
            (Backoff(0, 2000, 60_000, 0), 10**9, 0, 0),
            (Backoff(500, 1000, 60_000, 0), 10**9, 0, 500),
            (Backoff(1, 1500, 60_000, 0), 2, 0, 1),
            (Backoff(1, 1500, 60_000, 0), 3, 0, 2),
            (Backoff(1, 1500, 60_000, 0), 4, 0, 3),
            (Backoff(1, 1500, 60_000, 0), 5, 0, 5),
            (Backoff(1000, 1100, 60_000, 0), 4, 0, 1331),
            (Backoff(60_000, 1_000_000, 60_000, 0), 5, 0, 60_000),
            (Backoff(1000, 2000, 60_000, 500), 1, 0, 1000),
            (Backoff(1000, 2000, 60_000, 500), 1, 500_000, 750),
            (Backoff(1000, 2000, 60_000, 500), 1, 999_999, 501),
            (Backoff(1000, 2000, 60_000, 1000), 1, 999_999, 1),
            (Backoff(1000, 2000, 60_000, 1000), 7, 500_000, 30_000),
        ):
            with self.subTest(backoff=backoff, failures=failures, draw_ppm=draw_ppm):
                self.assertEqual(backoff.delay_ms(failures, draw_ppm), expected)

    def test_it_equals_the_closed_form(self) -> None:
        for factor in (1000, 1001, 1250, 1333, 2000, 2500, 1_000_000):
            backoff = Backoff(7, factor, 3_600_000, 0)
            for failures in (1, 2, 3, 10, 50, 500):
                exact = 7 * factor ** (failures - 1) // 1000 ** (failures - 1)
                self.assertEqual(backoff.delay_ms(failures, 0), min(3_600_000, exact), (factor, failures))

    def test_arguments_out_of_range_are_refused(self) -> None:
        for failures, draw_ppm in ((0, 0), (-1, 0), (1, -1), (1, 1_000_000)):
            with self.subTest(failures=failures, draw_ppm=draw_ppm), self.assertRaises(ValueError):
                Backoff(1000, 2000, 60_000, 0).delay_ms(failures, draw_ppm)


if __name__ == "__main__":
    unittest.main()
