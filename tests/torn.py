"""Writes that were torn at any length: of a log, and of a status file. The next daemon goes on to the right end.

A run of a real daemon is over. Its files are cut to what a torn write would have left, and a request makes the daemon take
it over, as every daemon does at its start with a run that is unfinished.

    the last batch   cut at any byte, with all attempts on disk     nothing runs again: the status file tells the end
    the whole log    cut at any byte behind line 1, with none       goes on from the last whole line
    a status file    cut at any byte                                without its last line the attempt is lost; without its
                                                                    pid line it never began; it is tried again in both cases
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from typing import ClassVar

from tests import counted, mutations, points
from tests.counted import COUNT
from tests.daemon import ROOT, Daemon, step
from tests.proof import Row
from wfd import decide
from wfd.events import LogRecovered, StepStarted

# A cut is a way to make it, and where.
_Cut = tuple[str, int]


def read_log(daemon: Daemon, run_id: str) -> bytes:
    with open(daemon.home.run(run_id).events, "rb") as file:
        return file.read()


def write_log(daemon: Daemon, run_id: str, data: bytes) -> None:
    with open(daemon.home.run(run_id).events, "wb") as file:
        file.write(data)


def remove_attempts(daemon: Daemon, run_id: str) -> None:
    for entry in os.scandir(daemon.home.run(run_id).attempts):
        os.unlink(entry.path)


def status_of(daemon: Daemon, run_id: str) -> str:
    """The state that the daemon tells. Asking makes it take over a run that has no live marker."""
    return str(daemon.request("status", run_id=run_id)["state"])


class CutLog:
    """A run with a retry, a failure and a step that is skipped, whose log is cut.

    whole  its bytes         lines, ends  each line, and where it ends         last_batch  where that begins
    """

    END: ClassVar = {"a": "SUCCEEDED", "b": "SUCCEEDED", "c": "FAILED", "d": "SKIPPED"}

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.run_id = daemon.submit(
            step("a", COUNT),
            step("b", COUNT + '[ "$WFD_ATTEMPT" = 2 ]', "a", retries=1, backoff={"initial_sec": 0}),
            step("c", COUNT + "exit 7", "a"),
            step("d", COUNT, "b", "c"),
        )
        self._wait_for_end()
        self.whole = read_log(daemon, self.run_id)
        self.lines = self.whole.splitlines(True)
        self.ends = [sum(map(len, self.lines[: number + 1])) for number in range(len(self.lines))]
        self.last_batch = self.ends[daemon.events(self.run_id)[-1].durable - 1]
        self._attempts = {entry.path: _content(entry.path) for entry in os.scandir(daemon.home.run(self.run_id).attempts)}

    def without_attempts(self, cut: int) -> None:
        """Cut, with no attempt on disk: everything behind the cut is done again. Raises AssertionError."""
        remove_attempts(self.daemon, self.run_id)
        self._resume(cut)

    def with_attempts(self, cut: int) -> None:
        """Cut in the last batch: all attempts have run, and none of them runs again. Raises AssertionError."""
        remove_attempts(self.daemon, self.run_id)
        for path, content in self._attempts.items():
            with open(path, "wb") as file:
                file.write(content)
        before = self._executions()
        self._resume(cut)
        assert self._executions() == before, f"cut at {cut}: {self._executions()}\n{self.daemon.story(self.run_id)}"

    def _executions(self) -> list[dict[int, int]]:
        return [counted.executions(self.daemon, self.run_id, step_id) for step_id in self.END]

    def _resume(self, cut: int) -> None:
        daemon, run_id = self.daemon, self.run_id
        good = max(end for end in self.ends if end <= cut)
        write_log(daemon, run_id, self.whole[:cut])
        is_owing = decide.next_decision(daemon.fold(run_id)) is not None
        status_of(daemon, run_id)
        self._wait_for_end()
        lines = daemon.events(run_id)
        assert decide.replay(lines)[1] is None, f"cut at {cut}: {decide.replay(lines)[1]}"
        assert read_log(daemon, run_id)[:good] == self.whole[:good], f"cut at {cut}: what was whole is not kept"
        recovered = [line.event for line in lines if isinstance(line.event, LogRecovered)]
        expected = [cut - good] if is_owing or cut > good else []
        assert [event.dropped_bytes for event in recovered] == expected, f"cut at {cut}: {recovered}"
        for event in recovered:
            if event.kept_as is not None:
                kept = _content(f"{daemon.home.run(run_id).directory}/{event.kept_as}")
                assert kept == self.whole[good:cut], f"cut at {cut}: {kept!r} is kept"

    def _wait_for_end(self) -> None:
        self.daemon.wait_until_let_go()
        state, ended = self.daemon.fold(self.run_id).state, self.daemon.states(self.run_id)
        assert (state, ended) == ("FAILED", self.END), f"{state}: {ended}\n{self.daemon.story(self.run_id)}"


class CutStatus:
    """A run of one step that exits 7, whose status file is cut."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.run_id = daemon.submit(step("a", COUNT + "exit 7"))
        daemon.wait_until_let_go()
        lines = read_log(daemon, self.run_id).splitlines(True)
        last = next(n for n, line in enumerate(daemon.events(self.run_id), 1) if isinstance(line.event, StepStarted))
        self._started = b"".join(lines[:last])
        self._path = daemon.home.run(self.run_id).attempt(1, "a", 1).status
        self.whole = _content(self._path)

    def cut(self, length: int) -> None:
        """So many bytes of it are there, and the log ends with the start of that attempt. Raises AssertionError."""
        daemon, run_id = self.daemon, self.run_id
        remove_attempts(daemon, run_id)
        with open(self._path, "wb") as file:
            file.write(self.whole[:length])
        write_log(daemon, run_id, self._started)
        before = counted.executions(daemon, run_id, "a")
        status_of(daemon, run_id)
        daemon.wait_until_let_go()
        ran = counted.executions(daemon, run_id, "a") - before
        names = [name for name in daemon.names(run_id) if name.startswith("attempt_")]
        kept_lines = self.whole[:length].count(b"\n")
        # The header, the pid, the exit status.
        expected = {3: ["attempt_exited"], 2: ["attempt_lost", "attempt_exited"]}
        assert names == expected.get(kept_lines, ["attempt_not_started", "attempt_exited"]), f"cut at {length}: {names}"
        assert ran == ({} if kept_lines == 3 else {2: 1}), f"cut at {length}: attempts {dict(ran)} ran"
        assert daemon.fold(run_id).steps[0].exit_code == 7


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# -- rows ---------------------------------------------------------------------------------------------------------------

BUGS = ("glue to the torn tail", "half a line of status counts")
# Cuts until a bug must have shown itself.
_BUG_CUTS = 90


def prove(count: int, seed: int) -> Row:
    """So many cuts, as many of each kind as of the others as long as there are some."""
    chance = random.Random(seed)
    tried, failures = _try(count, chance)
    missed = [bug for bug in BUGS if not _is_caught(bug, chance)]
    failures += [f"nothing shows the bug: {bug}" for bug in missed]
    return Row("writes torn at any length", tried, tried, len(BUGS), len(BUGS) - len(missed), tuple(failures))


def _is_caught(bug: str, chance: random.Random) -> bool:
    with tempfile.TemporaryDirectory(prefix="wfd-test-") as root:
        mutations.write_tree(root, mutations.named(bug))
        return bool(_try(_BUG_CUTS, chance, root)[1])


def _try(count: int, chance: random.Random, root: str = ROOT) -> tuple[int, list[str]]:
    """How many cuts were made, and what was wrong first: a run that has ended badly is cut no more."""
    daemon = Daemon()
    daemon.root = root
    cut: _Cut | None = None
    tried = 0
    try:
        with daemon:
            log, status = CutLog(daemon), CutStatus(daemon)
            ways: dict[str, Callable[[int], None]] = {
                "status file": status.cut, "last batch": log.with_attempts, "log": log.without_attempts,
            }  # fmt: skip
            for cut in _cuts(log, status, count, chance):
                ways[cut[0]](cut[1])
                tried += 1
    except Exception as problem:
        return tried + 1, [f"{cut}: {type(problem).__name__}: {problem}"]
    return tried, []


def _cuts(log: CutLog, status: CutStatus, count: int, chance: random.Random) -> list[_Cut]:
    cuts = [("status file", length) for length in range(len(status.whole) + 1)]
    cuts += [("last batch", cut) for cut in range(log.last_batch, len(log.whole))]
    cuts += [("log", cut) for cut in range(log.ends[0], len(log.whole))]
    return points.spread(cuts, count, chance, lambda cut: cut[0])
