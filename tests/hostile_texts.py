"""Hostile input as texts: workflow files, command lines and environments, and what comes of each.

Each row is a name, the input, the exit code of the real command line, and a fragment of what it says. No daemon is
started for any of them. The rows are carried out by hostile.py.
"""

from __future__ import annotations

import gzip
import json
import sys
from typing import NamedTuple


class Text(NamedTuple):
    """A workflow file, the exit code of `validate`, and a part of what it prints."""

    name: str
    content: bytes
    code: int
    words: str


class Call(NamedTuple):
    """A command line in an environment. {home} is the home's directory, {file} that of a good workflow file."""

    name: str
    arguments: tuple[str, ...]
    code: int
    words: str
    environ: dict[str, str | None] = {}  # noqa: RUF012 - of a tuple, and never changed


def _of(*steps: object, **fields: object) -> bytes:
    """A workflow file as json.dumps writes it."""
    return json.dumps({"workflow_id": "w", "steps": list(steps), **fields}).encode()


def _step(id: object = "a", **fields: object) -> dict[str, object]:
    return {"id": id, "command": "true", **fields}


def _raw(fields: str) -> bytes:
    """A workflow file whose one step has these fields, as they are."""
    return b'{"workflow_id":"w","steps":[{"id":"a","command":"true",%b}]}' % fields.encode("utf-8", "surrogatepass")


GOOD = _of(_step())

WORKFLOWS: tuple[Text, ...] = (
    # What is no text, or no JSON.
    Text("a byte order mark", b"\xef\xbb\xbf" + GOOD, 2, "starts with a byte order mark"),
    Text("UTF-16, big end first", GOOD.decode().encode("utf-16-be"), 2, "looks like UTF-16"),
    Text("UTF-32", GOOD.decode().encode("utf-32"), 2, "looks like UTF-16 or UTF-32"),
    Text("zeros", bytes(64), 2, "looks like UTF-16"),
    Text("white space alone", b" \n\t\r\n", 2, "is empty"),
    Text("compressed", gzip.compress(GOOD), 2, "looks like UTF-16 or UTF-32; save it as UTF-8"),
    Text("half of a character", GOOD[:-1] + b"\xe2\x82", 2, "is not UTF-8 text"),
    Text("an overlong slash", GOOD.replace(b"true", b"\xc0\xaf"), 2, "is not UTF-8 text"),
    Text("a surrogate in UTF-8", GOOD.replace(b"true", b"\xed\xa0\x80"), 2, "is not UTF-8 text"),
    Text("YAML", b"workflow_id: w\nsteps:\n- id: a\n", 2, "is not JSON: Expecting value at line 1, column 1"),
    Text("two documents", GOOD + b"\n" + GOOD, 2, "is not JSON: Extra data at line 2"),
    Text("a comment", b"// mine\n" + GOOD, 2, "is not JSON"),
    Text("a comma too many", GOOD.replace(b"}]", b"},]"), 2, "is not JSON"),
    Text("single quotes", GOOD.replace(b'"', b"'"), 2, "is not JSON"),
    Text("a newline in a string", GOOD.replace(b"true", b"tr\nue"), 2, "is not JSON: Invalid control character"),
    Text("cut in the middle", GOOD[: len(GOOD) // 2], 2, "is not JSON"),
    Text("objects without end", b'{"a":' * 50_000, 2, "is nested too deeply"),
    Text("a deep value in an unknown field", GOOD[:-1] + b',"x":' + b"[" * 90 + b"]" * 90 + b"}", 2, "$.x: unknown field"),
    # What JSON allows and nobody means.
    Text("a key twice in a step", _raw('"retries":1,"retries":2'), 2, "$.steps[0].retries: is given more than once"),
    Text("a key twice in a back-off", _raw('"backoff":{"factor":2,"factor":2}'), 2,
         "$.steps[0].backoff.factor: is given more"),
    Text("a number beyond floats", _raw('"timeout_sec":1e999'), 2, "$.steps[0].timeout_sec"),
    Text("a number below floats", _raw('"timeout_sec":1e-400'), 2, "above 0 and at most 31622400, not 0.0"),
    Text("infinity", _raw('"timeout_sec":-Infinity'), 2, "$.steps[0].timeout_sec"),
    Text("5,000 digits", _raw('"retries":' + "9" * 5_000), 2, "not a number of many digits"),
    Text("minus nothing", _raw('"retries":-0.0'), 2, "a whole number from 0 to 10000, not -0.0"),
    Text("true for one", _raw('"retries":true'), 2, "not true"),
    Text("null for nothing", _raw('"cwd":null'), 2, "must not be null; leave it out"),
    # What would do something to a terminal, a file system or a command line.
    Text("an id that colours", _of(_step("\x1b[31m")), 2, "$.steps[0].id: contains the control character U+001B"),
    Text("an id that turns the text round", _of(_step("a\u202eb")), 2, "U+202E"),
    Text("an id that is an option", _of(_step("--rf")), 2, "must not begin with -"),
    Text("an id that nobody sees", _of(_step("\u200b\u2060")), 2, "must not be empty or blank"),
    Text("an id of 201 characters", _of(_step("x" * 201)), 2, "at most 200 are allowed"),
    Text("a lone surrogate", _raw('"cwd":"/\\ud800"'), 2, "a lone surrogate U+D800"),
    Text("NUL in a command", _of({"id": "a", "command": "true\0false"}), 2, "U+0000 at character 5"),
    Text("a command that is a list", _of({"id": "a", "command": ["rm", "-rf"]}), 2, "must be a string, not a list"),
    Text("a command of a megabyte", _of({"id": "a", "command": "x" * (1 << 20) + "x"}), 2, "1048577 bytes long"),
    Text("a home that is not expanded", _of(_step(cwd="~/x")), 2, "~ is not expanded"),
    Text("a path that no system takes", _of(_step(cwd="/" + "x" * 5_000)), 2, "at most 4095 are allowed"),
    Text("a variable of ours", _of(_step(env={"WFD_ATTEMPT": "9"})), 2, "$.steps[0].env.WFD_ATTEMPT: is reserved"),
    Text("a variable with =", _of(_step(env={"A=B": "1"})), 2, "is no name for a variable"),
    Text("a variable that is a number", _of(_step(env={"A": 1})), 2, "must be a string, not 1; put it in quotes"),
    Text("NUL in a variable", _of(env={"A": "\0"}), 2, "U+0000"),
    # Graphs that are none.
    Text("no steps", _of(), 2, "$.steps: must not be empty"),
    Text("200,001 steps", _of(*[0] * 200_001), 2, "has 200001 steps; at most 200000"),
    Text("a step that is null", _of(None), 2, "$.steps[0]: must be an object, not null"),
    Text("a step that waits for itself", _of(_step(depends_on=["a"])), 2, "depends on itself"),
    Text("a circle", _of(_step("a", depends_on=["b"]), _step("b", depends_on=["a"])), 2, "closes a cycle"),
    Text("an unknown dependency", _of(_step("load"), _step("b", depends_on=["laod"])), 2, 'did you mean "load"?'),
    Text("a dependency that is no id", _of(_step(depends_on=[{}])), 2, "$.steps[0].depends_on[0]: must be a string"),
    Text("one id twice", _of(_step(), _step()), 2, '"a" is taken by $.steps[0]'),
    Text("one id twice but for case", _of(_step("ß"), _step("SS")), 2, "but for case or Unicode form"),
    Text("one id twice but for its form", _of(_step("\u00e9"), _step("e\u0301")), 2, "but for case or Unicode form"),
    # Numbers out of range, and fields of others.
    Text("retries without end", _of(_step(retries=10**9)), 2, "from 0 to 10000, not 1000000000"),
    Text("a grace before it begins", _of(_step(grace_sec=-1)), 2, "from 0 to 86400, not -1"),
    Text("a back-off that ends before it begins", _of(_step(backoff={"initial_sec": 61})), 2, "give max_sec too"),
    Text("a loss that is ignored", _of(_step(on_lost="ignore")), 2, 'must be "retry" or "fail"'),
    Text("a field of a later version", _of(_step(), fail_fast=True), 2, "$.fail_fast: unknown field"),
    # Unusual, and right.
    Text("an id in any script", _of(_step("čárka 手順 🙂"), workflow_id="流れ"), 0, "is valid"),
    Text("escaped where nobody must", GOOD.replace(b"w", b"\\u0077"), 0, "is valid: w"),
    Text("a timeout of a year", _of(_step(timeout_sec=31_622_400)), 0, "is valid"),
    Text("a tab and a newline in a command", _of({"id": "a", "command": "\ttrue\n"}), 0, "is valid"),
)

COMMANDS: tuple[Call, ...] = (
    # Run ids.
    Call("a path up", ("status", "../r1"), 3, "is no run id or part of one"),
    Call("a path through a run", ("status", "r1/../r2"), 3, "is no run id or part of one"),
    Call("an absolute path", ("status", "/etc/passwd"), 3, "is no run id or part of one"),
    Call("nothing", ("status", ""), 3, "'' is no run id"),
    Call("upper case", ("status", "R1"), 3, "is no run id or part of one"),
    Call("an option for a run", ("status", "-r1"), 2, "unrecognized arguments: -r1"),
    Call("an option after --", ("status", "--", "-r1"), 3, "is no run"),
    Call("a part of two", ("status", "r"), 3, "may be any of 2 runs: r2, r1"),
    Call("a newline behind", ("status", "r1\n"), 3, r"'r1\n' is no run id"),
    Call("what clears a screen", ("status", "\x1b[2J"), 3, r"'\x1b[2J' is no run id"),
    Call("a lone surrogate", ("status", "r\udc801"), 3, r"\udc80"),
    Call("another @", ("status", "@LATEST"), 3, "is no run id or part of one"),
    Call("5,000 characters", ("status", "r" * 5_000), 3, "is no run id or part of one"),
    Call("digits that are none", ("status", "r²"), 3, "is no run id or part of one"),
    Call("a building site", ("status", ".new-r1"), 3, "there is no run"),
    Call("two runs", ("status", "r1", "r2"), 2, "unrecognized arguments: r2"),
    Call("an id with a path for a new run", ("run", "--run-id", "../x", "{file}"), 2, "cannot be a run id"),
    Call("an id with a dot behind for a new run", ("run", "--run-id", "x.", "{file}"), 2, "cannot be a run id"),
    Call("a step that is not there", ("logs", "r1", "e\x1b[1m"), 3, r"has no step 'e\x1b[1m'; it has a, b, c, d"),
    # Numbers.
    Call("line 0", ("replay", "r1", "--until", "0"), 2, "'0' is not a whole number from 1 on"),
    Call("a line of 5,000 digits", ("replay", "r1", "--until", "9" * 5_000), 2, "is not a whole number from 1 on"),
    Call("a line behind the end", ("replay", "r1", "--until", "99999"), 0, "replay verified"),
    Call("a digit of another script", ("watch", "r1", "--from", "\u0661"), 2, "is not a whole number from 1 on"),
    Call("no end of waiting", ("wait", "r1", "--timeout", "inf"), 2, "'inf' is not a number of seconds"),
    Call("no number", ("wait", "r1", "--timeout", "1e"), 2, "'1e' is not a number of seconds"),
    # Files in the place of logs.
    Call("/dev/null", ("replay", "/dev/null"), 6, "is no event log: its first line does not name a run"),
    Call("a directory", ("replay", "{home}/runs"), 3, "cannot be read as a log: Is a directory"),
    Call("nothing there", ("replay", "{home}/nothing"), 3, "cannot be read as a log: No such file"),
    Call("a workflow", ("replay", "{file}"), 6, "is no event log"),
    Call("a program", ("replay", "/bin/sh"), 6, "is no event log"),
    # Commands.
    Call("no command", (), 2, "a command is missing"),
    Call("an option first", ("--json", "list"), 2, "there is no command '--json'"),
    Call("a command that clears a screen", ("\x1b[2J",), 2, r"there is no command '\x1b[2J'"),
    Call("a half option", ("status", "r1", "--exit"), 2, "unrecognized arguments: --exit"),
    Call("a workflow that is a home", ("run", "{home}"), 2, "Is a directory"),
)

# Where a variable is None it is not there at all.
ENVIRONMENTS: tuple[Call, ...] = (
    Call("a home that is a file", ("status",), 2, "/dev/null/runs: Not a directory", {"WFD_HOME": "/dev/null"}),
    Call("a home that is too long", ("list",), 2, "File name too long", {"WFD_HOME": "/" + "x" * 5_000}),
    Call("a home that cannot be made", ("run", "{file}"), 4, "cannot be started", {"WFD_HOME": "/proc/1/no/such"}),
    # macOS has no such names.
    Call("a home that is no UTF-8", ("status",), 3, "there are no runs in",
         {"WFD_HOME": "{home}/x" if sys.platform == "darwin" else "{home}/\udcff"}),
    Call("a home that colours", ("status",), 3, r"\x1b[31m", {"WFD_HOME": "{home}/\x1b[31m"}),
    Call("a home that is relative", ("status",), 3, "/x/wfd", {"WFD_HOME": "home", "XDG_STATE_HOME": "{home}/x"}),
    Call("no home at all", ("status",), 3, "{home}", {"WFD_HOME": "", "XDG_STATE_HOME": "x", "HOME": "{home}"}),
    Call("a home with slashes behind", ("status", "r2"), 0, "SUCCEEDED", {"WFD_HOME": "{home}//"}),
    Call("5,000 columns of digits", ("list", "-x"), 2, "unrecognized arguments: -x", {"COLUMNS": "9" * 5_000}),
    Call("columns that are none", ("list", "-x"), 2, "unrecognized arguments: -x", {"COLUMNS": "²"}),
    Call("fewer columns than none", ("list", "-x"), 2, "unrecognized arguments: -x", {"COLUMNS": "-7"}),
    Call("a terminal of nobody", ("status", "r2"), 0, "SUCCEEDED", {"TERM": "\x1b[31m", "NO_COLOR": "\0"[:0]}),
    Call("a runtime directory of nobody", ("status", "r2"), 0, "SUCCEEDED", {"XDG_RUNTIME_DIR": "/" + "x" * 5_000}),
    Call("no environment", ("status", "r2"), 0, "SUCCEEDED", {"HOME": None, "PATH": None, "TERM": None, "LANG": None}),
)  # fmt: skip
