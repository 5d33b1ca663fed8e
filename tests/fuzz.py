"""Seeded fuzzing of everything that comes from outside: definitions, frames and logs.

    python -m tests.fuzz [--seconds N] [--seed N] [--only definitions|frames|logs] [--index N]

Input `index` of a kind is drawn from the seed, the kind and the index alone. A failure names all three; with --index that
one input is tried again.

What must hold
* A definition becomes a workflow that survives its record and can be run to the end that its exit statuses mean, or it
  is refused with at least one problem, each with its place. Nothing else comes of it.
* A frame gets exactly one answer, a result or an error, in its turn, unless it is a notification, which gets none. None
  of them finds the daemon's own checks failing, and others are answered meanwhile.
* A log whose checksums were not forged tells the state of a beginning of what it was, or is refused. One whose checksums
  were may tell anything, but readers refuse it or end well, replay names the first difference, and a history that replay
  accepts keeps the promises.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests import fuzz_inputs, hostile, logs, mutations
from tests.daemon import MARK, ROOT, Client, Daemon, step, until
from tests.proof import Row
from wfctl import render
from wfd import decide, definition, events, journal, protocol
from wfd.definition import DefinitionError, Workflow
from wfd.journal import Damaged
from wfd.state import Impossible, Run

# Tries one input; raises AssertionError, or whatever the engine raises and should not.
Try = Callable[[random.Random], None]

# Lines of one connection, before somebody else asks how the daemon is.
_FRAMES_EACH = 12
# The command line is asked about one log in so many.
_ASKS_EVERY = 25


# -- definitions -------------------------------------------------------------------------------------------------------


@contextmanager
def definitions() -> Iterator[Try]:
    yield try_definition


def try_definition(chance: random.Random) -> None:
    document: Any = fuzz_inputs.document(chance)
    count = chance.choice([0, 1, 1, 2, 4])
    for _ in range(count):
        document = fuzz_inputs.changed(document, chance)
    workflow = _workflow_of(lambda: definition.validate(document, "/base"))
    assert workflow is not None or count, "a valid definition is refused"
    text = json.dumps(document).encode()
    assert _workflow_of(lambda: definition.parse(text, "/base")) == workflow, "the text and its value differ"
    if chance.random() < 0.3:
        text = fuzz_inputs.damaged(text, chance)
        parsed = _workflow_of(lambda: definition.parse(text, "/base"))
        if parsed is not None:
            decoded = definition.decode(text)
            assert _workflow_of(lambda: definition.validate(decoded, "/base")) == parsed, "a text is taken, its value is not"
    if workflow is not None:
        _check_record(workflow)
        _check_run(workflow, chance)


def _workflow_of(read: Callable[[], Workflow]) -> Workflow | None:
    try:
        return read()
    except DefinitionError as error:
        assert error.problems, "refused without a problem"
        for problem in error.problems:
            assert problem.path.startswith("$") and problem.message.isprintable(), f"a problem without a place: {problem}"
        return None


def _check_record(workflow: Workflow) -> None:
    """The workflow comes back from the log as it was, and its numbers are whole."""
    record = definition.to_record(workflow)
    leaves = {type(fuzz_inputs.at(record, path)) for path in fuzz_inputs.places(record)}
    assert leaves <= {dict, list, str, int}, f"its record holds {leaves}"
    assert definition.from_record(json.loads(json.dumps(record))) == workflow, "its record is another workflow"
    line = logs.Log(workflow).lines[0]
    raw = events.encode(line, events.seed("r1"))
    assert events.checks(raw[:-1], events.seed("r1")) and events.decode(raw[:-1]) == line, "its line 1 is another event"


def _check_run(workflow: Workflow, chance: random.Random) -> None:
    """It ends as the exit statuses of its steps say: a step succeeds whose failures are not more than its retries."""
    failures = {each.id: chance.choice([0, 0, 1, 2, 4]) for each in workflow.steps}
    log = logs.complete(workflow, {id: [1] * count for id, count in failures.items()})
    logs.check_promises(log.lines)
    assert decide.replay(log.lines)[1] is None, "its log does not replay"
    expected: dict[str, str] = {}
    by_id = {each.id: each for each in workflow.steps}
    while len(expected) < len(by_id):
        for each in by_id.values():
            if all(name in expected for name in each.depends_on):
                blocked = any(expected[name] != "SUCCEEDED" for name in each.depends_on)
                failed = failures[each.id] > each.retries
                expected[each.id] = "SKIPPED" if blocked else "FAILED" if failed else "SUCCEEDED"
    assert log.states() == expected, f"{log.states()}, not {expected}"
    assert log.run.state == ("FAILED" if "FAILED" in expected.values() else "SUCCEEDED")


# -- logs --------------------------------------------------------------------------------------------------------------


@contextmanager
def log_files() -> Iterator[Try]:
    with hostile.place() as here:
        yield lambda chance: try_log(here, chance)


def try_log(here: hostile.Place, chance: random.Random) -> None:
    log = fuzz_inputs.log(chance)
    raw = log.data.splitlines(keepends=True)
    is_forged = chance.random() < 0.5
    for _ in range(chance.choice([1, 1, 2])):
        if is_forged:
            raw = fuzz_inputs.forged(raw, chance)
        elif chance.random() < 0.5 and raw:
            raw = fuzz_inputs.mixed(raw, chance)
        else:
            raw = fuzz_inputs.damaged(b"".join(raw), chance).splitlines(keepends=True)
    data = b"".join(raw)
    folded, end = _fold(data)
    if not is_forged and folded is not None:
        assert data[:end] == log.data[:end], "what was read is not what was written"
        assert folded.describe() == decide.replay(log.lines[: folded.seq])[0].describe(), "the state of no beginning"
    _check_replay(data, folded)
    if chance.randrange(_ASKS_EVERY) == 0:
        with open(here.home.run("r1").events, "wb") as file:
            file.write(data)
        for command in (["status", "r1"], ["replay", "r1"], ["list"]):
            problems = [here.ends(command, code, "") for code in (0, 6)]
            assert not all(problems), f"{command[0]}: {problems}"


def _fold(data: bytes) -> tuple[Run | None, int]:
    """The state that a log tells, and where its good part ends. None where it is refused."""
    try:
        run, reading = journal._fold(io.BytesIO(data), "r1")
        return run, reading.end
    except Damaged:
        return None, 0


def _check_replay(data: bytes, folded: Run | None) -> None:
    """Replay ends in a refusal, in a difference behind what verifies, or in a history that keeps the promises."""
    reading = journal.Reading(io.BytesIO(data), "r1")
    story, lines = render.Story(), []
    try:
        for line in reading:
            lines.append(line)
            told = story.tell(line)
            assert told is None or told.isprintable(), f"the story would reach a terminal: {told!r}"
    except Damaged:
        pass
    if not lines:
        return
    try:
        run, difference = decide.replay(lines)
    except Impossible:
        assert folded is None, "the fold takes what replay cannot begin with"
        return
    if difference is not None:
        assert difference.seq == run.seq + 1 and difference.expected and difference.found, str(difference)
        assert decide.replay(lines[: run.seq])[1] is None, "what is before the difference does not verify"
    logs.check_promises(lines[: run.seq])
    assert json.dumps(run.describe()), "its status cannot be printed"
    if difference is None and folded is not None:
        assert folded.describe() == run.describe(), "replay and fold tell two states"


# -- frames ------------------------------------------------------------------------------------------------------------


@contextmanager
def frames(root: str = ROOT) -> Iterator[Try]:
    """A daemon, and a Try that sends it some frames. root: where the program lies."""
    daemon = Daemon()
    daemon.root = root
    try:
        daemon.start()
        daemon.wait_for(daemon.submit(step("a", "true"), run_id="over"))
        daemon.submit(step("a", until("go")), run_id="live")
        yield lambda chance: try_frames(daemon, chance)
        assert "Traceback" not in daemon.log(), daemon.explain()
        daemon.touch("go")
        assert daemon.fold("live").state != "FAILED", "the run that went on meanwhile has failed"
    finally:
        daemon.clean()


def try_frames(daemon: Daemon, chance: random.Random) -> None:
    data = bytearray()
    for number in range(_FRAMES_EACH):
        frame: Any = fuzz_inputs.frame(chance, f"f{chance.randrange(10**6)}-{number}", {MARK: daemon.mark})
        for _ in range(chance.choice([0, 1, 1, 3])):
            frame = fuzz_inputs.changed(frame, chance)
        line = json.dumps(frame).encode()
        if chance.random() < 0.3:
            line = fuzz_inputs.damaged(line, chance)
        data += line + b"\n"
    try:
        with daemon.connect() as client:
            client.send(bytes(data) + protocol.request("list", {}, "the last"))
            for line in bytes(data).split(b"\n")[:-1]:
                _check_answer(client, line)
            assert _answer(client)["id"] == "the last", "an answer too many"
        with daemon.connect() as other:
            assert other.request("hello", protocol_min=1, protocol_max=1)["protocol"] == 1
    except (EOFError, OSError) as error:
        raise AssertionError(f"{error!r}\n{daemon.explain()}") from None


def _answer(client: Client) -> dict[str, Any]:
    """The next message that is no event of a watch."""
    while "method" in (message := client.message()):
        pass
    return message


def _check_answer(client: Client, line: bytes) -> None:
    """One answer, as JSON-RPC 2.0 wants it, or none."""
    expected, is_told = _expected_id(line)
    if not is_told:
        return
    answer = _answer(client)
    assert answer.get("jsonrpc") == "2.0" and ("result" in answer) != ("error" in answer), f"no answer: {str(answer)[:300]}"
    assert answer["id"] == expected, f"an answer to {str(answer['id'])[:99]}, not to {str(expected)[:99]}: {line[:300]!r}"
    if "error" in answer:
        code, message = answer["error"]["code"], answer["error"]["message"]
        assert message and isinstance(code, int) and code != protocol.INTERNAL_ERROR, f"{code} {message}: {line[:300]!r}"


def _expected_id(line: bytes) -> tuple[object, bool]:
    """Which id the answer to a line has, and whether there is one: told without protocol.py."""

    def refuse(name: str) -> object:
        raise ValueError(name)

    try:
        record = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None, True
    if not isinstance(record, dict):
        return None, True
    request_id = record.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, (str, int, type(None))):
        return None, True
    is_request = record.get("jsonrpc") == "2.0" and isinstance(record.get("method"), str)
    return request_id, request_id is not None or not is_request


# -- all of them -------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], Any]] = {"definitions": definitions, "frames": frames, "logs": log_files}
# Deliberate bugs: the kind that has to notice each, and among how many inputs.
BUGS: dict[str, tuple[str, int]] = {
    "dependencies are taken for known": ("definitions", 3_000),
    "one retry too many": ("definitions", 100),
    "one dependency is enough": ("definitions", 500),
    "checksums are not compared": ("logs", 300),
    "skip bad lines": ("logs", 500),
}
# One that only a daemon shows.
DEEP_LINE = "a line nested without end ends the daemon"


def attempt(try_one: Try, kind: str, seed: int, index: int) -> str:
    """What is wrong with what comes of one input, and how to try it again; "" where nothing is."""
    try:
        try_one(random.Random(f"{kind} {seed} {index}"))
    except Exception as error:
        return f"{kind}, seed {seed}, index {index}: {type(error).__name__}: {str(error)[:600]}"
    return ""


def fuzz(kind: str, seed: int, count: int, seconds: float = float("inf")) -> tuple[int, list[str]]:
    """How many inputs were tried, at most `count` and in about so many seconds, and what went wrong."""
    problems: list[str] = []
    index = 0
    with KINDS[kind]() as try_one:
        until_sec = time.monotonic() + seconds
        while index < count and time.monotonic() < until_sec:
            problem = attempt(try_one, kind, seed, index)
            index += 1
            if problem:
                problems.append(problem)
            if len(problems) >= 10 or (problem and kind == "frames"):
                break
    return index, problems


def is_noticed(bug: str, seed: int) -> bool:
    """Does the kind that has to notice this bug do so?"""
    kind, count = BUGS[bug]
    with mutations.applied(mutations.named(bug)), KINDS[kind]() as try_one:
        return any(attempt(try_one, kind, seed, index) for index in range(count))


def is_deep_line_noticed(seed: int) -> bool:
    """The same for the bug DEEP_LINE, in a daemon that has it."""
    with tempfile.TemporaryDirectory(prefix="wfd-fuzz-") as tree:
        mutations.write_tree(tree, mutations.named(DEEP_LINE))
        try:
            with frames(tree) as try_one:
                return any(attempt(try_one, "frames", seed, index) for index in range(300))
        except AssertionError:
            return True


def prove(count: int, seed: int) -> Row:
    """Every kind for a third of `count` seconds."""
    tried = 0
    failures: list[str] = []
    for kind in KINDS:
        number, problems = fuzz(kind, seed, sys.maxsize, count / len(KINDS))
        tried += number
        failures += problems
    caught = sum(is_noticed(bug, seed) for bug in BUGS) + is_deep_line_noticed(seed)
    return Row("fuzzing", tried, tried, len(BUGS) + 1, caught, tuple(failures))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="for each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is drawn (default: one that nobody knows)")
    parser.add_argument("--only", choices=tuple(KINDS), help="this kind alone")
    parser.add_argument("--index", type=int, metavar="N", help="this input alone, again; with --only")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    problems: list[str] = []
    for kind in [options.only] if options.only else KINDS:
        if options.index is not None:
            with KINDS[kind]() as try_one:
                problems += filter(None, [attempt(try_one, kind, seed, options.index)])
            continue
        number, found = fuzz(kind, seed, sys.maxsize, options.seconds)
        print(f"{kind}: {number} inputs, {len(found)} failed", flush=True)
        problems += found
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
