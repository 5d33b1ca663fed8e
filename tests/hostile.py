"""Hostile input, carried out: the tables of hostile_texts.py, hostile_logs.py and hostile_frames.py, and sweeps over a log.

    python -m tests.hostile [--count N] [--seed N]      every row, and N values for each byte of a small log

Rules
* Every row goes through the real command line or a real daemon. It must end with its exit code (or its answer) and say
  its words, in plain text and without a traceback.
* Nothing else may change: the home is compared byte by byte, and the other run in it must be told as before.
* In the sweeps no result is written down: whatever is done to a log without forging checksums, the outcome is a refusal
  or the state that some beginning of the log tells, and never another.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import combinations
from pathlib import Path
from unittest import mock

from tests import hostile_logs, logs, mutations
from tests.daemon import deadline
from tests.hostile_daemon import frames, statuses, statuses_alone, taken_over
from tests.hostile_texts import COMMANDS, ENVIRONMENTS, GOOD, WORKFLOWS
from tests.proof import Row
from wfctl import cli
from wfd import decide, journal
from wfd.events import Line
from wfd.journal import Damaged
from wfd.paths import Home, RunFiles

# Of `logs.complete`: every kind of batch in a log of two kilobytes.
SMALL = logs.complete(logs.workflow(logs.step("a"), logs.step("b", "a", retries=1)), {"b": [1]})
# What a bad block, a bad cable or a text editor makes of a byte, tried first.
LIKELY = (0x00, 0x0A, 0xFF, 0x20, 0x22, 0x30)

# A row's name, and what is wrong: "" where nothing is.
Result = tuple[str, str]
# What was done to a log, and the log.
Change = tuple[str, bytes]


# -- one command line --------------------------------------------------------------------------------------------------


def call(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command line within this process, and all that it prints."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with deadline(), redirect_stdout(out), redirect_stderr(err):
        code = cli.main(arguments)
    printed = b""
    for stream in (out, err):
        stream.flush()
        printed += stream.buffer.getvalue()
    return code, printed.decode("utf-8")


@contextmanager
def environment(changes: dict[str, str | None]) -> Iterator[None]:
    """The environment with these changes."""
    with mock.patch.dict(os.environ):
        for name, value in changes.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        yield


class Place:
    """A home with the finished runs r1 and r2, in the environment of this process, and a good workflow beside it."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.file = f"{base}/good.json"
        Path(self.file).write_bytes(GOOD)
        os.mkdir(f"{base}/home", 0o700)
        self.home = logs.home(f"{base}/home")
        logs.save(self.home, hostile_logs.finished().data)
        logs.save(self.home, logs.complete(logs.diamond(), run_id="r2").data, "r2")
        # @latest and `list` go by these times.
        for run_id in ("r1", "r2"):
            os.utime(self.home.run(run_id).directory, ns=(0, int(run_id[1:])))

    def of(self, text: str) -> str:
        return text.replace("{home}", self.home.directory).replace("{file}", self.file)

    def ends(self, arguments: Sequence[str], code: int, words: str, changes: dict[str, str | None] | None = None) -> str:
        """What is wrong with the way in which this command line ends."""
        environ = {name: None if value is None else self.of(value) for name, value in (changes or {}).items()}
        try:
            with environment({"WFD_HOME": self.home.directory, **environ}):
                found, printed = call([self.of(argument) for argument in arguments])
        except Exception as error:
            return f"{error!r} ends it"
        if found != code or self.of(words) not in printed:
            return f"exit {found}, not {code} with {words!r}: {printed[-300:]!r}"
        if not printed.replace("\n", "").isprintable() or "Traceback" in printed:
            return f"prints what nobody should see: {printed[-300:]!r}"
        return ""

    def problem(self, arguments: Sequence[str], code: int, words: str, changes: dict[str, str | None] | None = None) -> str:
        """The same; and the home must be as it was, and r2 be told."""
        before = logs.contents(self.home.directory)
        problem = self.ends(arguments, code, words, changes) or self.ends(["status", "r2"], 0, "SUCCEEDED")
        return problem or ("" if logs.contents(self.home.directory) == before else "the home has changed")


@contextmanager
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="wfd-hostile-") as base:
        yield Place(base)


# -- the tables --------------------------------------------------------------------------------------------------------


def texts() -> Iterator[Result]:
    """Workflow files, command lines, environments."""
    with place() as here:
        path = f"{here.base}/w.json"
        for text in WORKFLOWS:
            Path(path).write_bytes(text.content)
            yield text.name, here.problem(["validate", path], text.code, text.words)
            if text.code:
                # Whoever runs it is told the same, and no daemon is started for it.
                yield f"{text.name}, run", here.ends(["run", path], text.code, text.words)
        for row in (*COMMANDS, *ENVIRONMENTS):
            yield row.name, here.problem(row.arguments, row.code, row.words, row.environ)


def edits() -> Iterator[Result]:
    """Logs that are cut, mixed up or forged."""
    with place() as here:
        log = hostile_logs.finished()
        for edit in hostile_logs.EDITS:
            Path(here.home.run("r1").events).write_bytes(edit.change(log))
            says = "replay" if edit.replay and not edit.status else "status"
            for command, code in (("status", edit.status), ("replay", edit.replay)):
                yield f"{edit.name}, {command}", here.ends([command, "r1"], code, edit.words if command == says else "")
            file = ["replay", here.home.run("r1").events]
            code = edit.replay if edit.file is None else edit.file
            yield f"{edit.name}, replay of the file", here.ends(file, code, "")
            yield f"{edit.name}, list", here.problem(["list"], 0, "r2")


def things() -> Iterator[Result]:
    """What may lie in the place of a file."""
    for thing in hostile_logs.THINGS:
        if thing.needs_root and os.geteuid() != 0:
            continue
        with place() as here:
            thing.put(here.home)
            yield thing.name, here.problem(thing.arguments, thing.code, thing.words)


# -- sweeps ------------------------------------------------------------------------------------------------------------


class Sweep:
    """The log SMALL in the place of r1's, and what any change of its bytes comes to."""

    def __init__(self, home: Home) -> None:
        self._path = home.run("r1").events
        self._files: RunFiles = home.run("r1")
        self._states = [_state(SMALL.lines[: number + 1]) for number in range(len(SMALL.lines))]

    def outcome(self, data: bytes) -> str:
        """Either "refused", or "line N" when that is the last one of the beginning that is told. Raises AssertionError
        when something else is told, and whatever the fold raises beyond its own refusal."""
        Path(self._path).write_bytes(data)
        try:
            run, reading = journal.fold(self._files, "r1")
        except Damaged:
            return "refused"
        assert run.describe() == self._states[run.seq - 1], f"the state is of no beginning of the log: {run.describe()}"
        assert data[: reading.end] == SMALL.data[: reading.end], "what was read is not what was written"
        assert reading.end + reading.torn_bytes <= len(data), "more was read than there is"
        return f"line {run.seq}"


def _state(lines: list[Line]) -> dict[str, object]:
    run, difference = decide.replay(lines)
    assert difference is None
    return run.describe()


def cuts() -> Iterator[Change]:
    """Cut at each byte, also with zeros in the place of what is gone."""
    data = SMALL.data
    for end in range(len(data)):
        yield f"cut at {end}", data[:end]
        yield f"zeros from {end} on", data[:end] + bytes(len(data) - end)


def flips(count: int, chance: random.Random) -> Iterator[Change]:
    """Each byte exchanged for `count` others, the likely ones first."""
    for place, byte in enumerate(SMALL.data):
        likely = list(dict.fromkeys((byte ^ 1, byte ^ 0x20, byte ^ 0x80, *LIKELY)))
        chance.shuffle(likely)
        values = [value for value in dict.fromkeys([*likely, *range(256)]) if value != byte]
        for value in values[:count]:
            yield f"byte {place} is {value:#04x}", SMALL.data[:place] + bytes([value]) + SMALL.data[place + 1 :]


def mixes() -> Iterator[Change]:
    """Lines swapped, doubled, removed, moved, halved, or taken from another run."""
    lines = SMALL.data.splitlines(keepends=True)
    others = logs.complete(SMALL.run.workflow, {"b": [1]}, "another").data.splitlines(keepends=True)
    for one, two in combinations(range(len(lines)), 2):
        swapped = list(lines)
        swapped[one], swapped[two] = lines[two], lines[one]
        yield f"lines {one + 1} and {two + 1} swapped", b"".join(swapped)
        yield f"lines {one + 1} to {two} removed", b"".join(lines[:one] + lines[two:])
        yield f"line {one + 1} also behind line {two + 1}", b"".join([*lines[: two + 1], lines[one], *lines[two + 1 :]])
        yield f"line {two + 1} also before line {one + 1}", b"".join([*lines[:one], lines[two], *lines[one:]])
    for number, line in enumerate(lines):
        before, after = b"".join(lines[:number]), b"".join(lines[number + 1 :])
        yield f"line {number + 1} halved", before + line[: len(line) // 2] + after
        yield f"line {number + 1} without its newline", before + line[:-1] + after
        yield f"line {number + 1} of another run", before + others[number] + after


def swept(changes: Iterable[Change], asks_every: int = 0) -> Iterator[Result]:
    """What comes of these changes. The command line is asked about every `asks_every`-th, too."""
    with place() as here:
        sweep = Sweep(here.home)
        for number, (name, data) in enumerate(changes, 1):
            try:
                outcome = sweep.outcome(data)
            except Exception as error:
                yield name, repr(error)
                continue
            problem = _asked(here, outcome) if asks_every and number % asks_every == 0 else ""
            yield name, problem


def _asked(here: Place, outcome: str) -> str:
    # What the fold takes, the command line may still refuse: the end of a finished run that stands behind a bad line.
    codes = (6,) if outcome == "refused" else (0, 6)
    for command in ("status", "replay"):
        problems = [here.ends([command, "r1"], code, "") for code in codes]
        if all(problems):
            return f"{command}: {problems[0]}"
    return here.problem(["list"], 0, "r2")


# -- proof -------------------------------------------------------------------------------------------------------------


def tables() -> Iterator[Result]:
    """Every row of every table."""
    yield from texts()
    yield from edits()
    yield from things()
    yield from statuses_alone()
    yield from frames()
    yield from taken_over()
    yield from statuses()


def everything(count: int, seed: int) -> Iterator[Result]:
    """The tables and the sweeps."""
    yield from tables()
    yield from swept(cuts(), asks_every=50)
    yield from swept(mixes(), asks_every=5)
    yield from swept(flips(count, random.Random(seed)), asks_every=500)


# Deliberate bugs, and the part of all this that has to notice each.
BUGS: dict[str, Callable[[], Iterator[Result]]] = {
    "checksums are not compared": lambda: swept(flips(1, random.Random(0))),
    "skip bad lines": lambda: swept(mixes()),
    "durable marks are ignored": lambda: edits(),
    "replay compares only the kinds of decisions": lambda: edits(),
    "a log of a later version is read": lambda: edits(),
    "the first line of a finished run is not checked": lambda: things(),
    "anything in a status file is believed": lambda: statuses_alone(),
}
# One that only a daemon shows.
STRANGER = "the marks of an adopted step are not looked at"


def is_noticed(bug: str) -> bool:
    """Does the part that has to notice this bug do so?"""
    with mutations.applied(mutations.named(bug)):
        return any(problem for _, problem in BUGS[bug]())


def is_stranger_noticed() -> bool:
    """The same for the bug STRANGER, in a daemon that has it."""
    with tempfile.TemporaryDirectory(prefix="wfd-hostile-") as tree:
        mutations.write_tree(tree, mutations.named(STRANGER))
        return any(problem for _, problem in statuses(tree))


def prove(count: int, seed: int) -> Row:
    """Every row, and `count` values for each byte of a small log."""
    results = list(everything(count, seed))
    failures = tuple(f"{name}: {problem}" for name, problem in results if problem)
    caught = sum(map(is_noticed, BUGS)) + is_stranger_noticed()
    return Row("hostile input", len(results), len(results), len(BUGS) + 1, caught, failures)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=16, metavar="N", help="values for each byte (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which come first (default: %(default)s)")
    options = parser.parse_args(arguments)
    row = prove(options.count, options.seed)
    print("\n".join(row.failures))
    print(f"{row.tried} cases, {len(row.failures)} failed; {row.bugs_caught} of {row.bugs} bugs noticed")
    return 1 if row.failures or row.bugs_caught < row.bugs else 0


if __name__ == "__main__":
    sys.exit(main())
