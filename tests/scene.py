"""A scene for real daemons that die or are refused things: what clients ask for, and how it must end.

`play` is the whole story, from the first submission to the daemon's end. Each request in it is one that may be repeated,
and is repeated until it is answered. So when the daemon has died in the middle, the next one is started in the same home
and the same story is played again: what had been done before is asked for once more and must change nothing.

    main    fetch; flaky (fails once, is tried again); gate (runs until the story's end); fails, and skips never;
            slow (runs into its timeout); last, after all that can succeed
    other   hang, and after it after: cancelled while hang runs, then tried again by a person, and then succeeds

What must hold, whatever died: a request that was answered is in the log, and so is every event that a watcher was shown,
in the same order; every step ends as it must, in as many attempts as it must, each of which really ran once; nothing is
lost, for nobody here kills a shim; and all that Daemon.check looks at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tests import counted
from tests.counted import COUNT
from tests.daemon import ROOT, Client, Daemon, Refused, step, wait_until
from wfd import protocol

T = TypeVar("T")

# Step: its state, and how many attempts of it began.
EXPECTED: dict[str, dict[str, tuple[str, int]]] = {
    "main": {
        "fetch": ("SUCCEEDED", 1), "flaky": ("SUCCEEDED", 2), "gate": ("SUCCEEDED", 1), "fails": ("FAILED", 1),
        "never": ("SKIPPED", 0), "slow": ("FAILED", 1), "last": ("SUCCEEDED", 1),
    },
    "other": {"hang": ("SUCCEEDED", 2), "after": ("SUCCEEDED", 1)},
}  # fmt: skip
# What a request that was answered leaves in the log.
_LEAVES = {"submit": "run_submitted", "cancel": "run_cancel_requested", "retry": "run_retried"}
# What is behind the good lines of a log whose writer a power cut has stopped.
TORN = b'{"seq":99,"at":"20'


class Died(Exception):
    """The daemon has ended before the story did."""


class Scene(Daemon):
    """A home in which the story is played. Nothing is started before somebody says so.

    heard      of each run the lines that its watcher was shown     answered  the requests that were
    kills      how many daemons of this home were killed
    """

    def __init__(self, root: str = ROOT) -> None:
        super().__init__()
        self.root = root
        self.heard: dict[str, list[dict[str, Any]]] = {run_id: [] for run_id in EXPECTED}
        self.answered: list[tuple[str, str]] = []
        self.kills = 0
        self._watching: dict[str, Client] = {}
        os.mkfifo(f"{self.directory}/gate")
        # Open for both: the step does not wait in its open, and does not see the end.
        self._gate = os.open(f"{self.directory}/gate", os.O_RDWR)

    def __enter__(self) -> Scene:
        return self

    def clean(self) -> None:
        os.close(self._gate)
        super().clean()

    def hang_up(self) -> None:
        super().hang_up()
        for watching in self._watching.values():
            watching.close()
        self._watching.clear()

    # -- the story ------------------------------------------------------------------------------------------------

    def play(self) -> None:
        """All of it. Raises Died."""
        self.begin()
        self.ask("cancel", "other", request="cancel-1")
        self.hear("other", "run_finished", 1)
        self.touch("go")
        self.ask("retry", "other", request="retry-1")
        os.write(self._gate, b"\n")
        self.hear("main", "run_finished", 1)
        self.hear("other", "run_finished", 2)

    def begin(self) -> None:
        """As far as two steps that run. Raises Died."""
        directly = {"initial_sec": 0}
        self._submit(
            "main",
            step("fetch", COUNT),
            step("flaky", COUNT + "[ -e once ] || { : > once; exit 1; }", "fetch", retries=1, backoff=directly),
            step("gate", COUNT + "read -r line < gate"),
            step("fails", COUNT + "exit 3", "fetch"),
            step("never", COUNT, "fails"),
            step("slow", COUNT + "exec sleep 600", timeout_sec=0.2),
            step("last", COUNT, "flaky", "gate"),
        )
        self._submit("other", step("hang", COUNT + "[ -e go ] || exec sleep 600"), step("after", COUNT, "hang"))
        for run_id, step_id in (("main", "gate"), ("other", "hang")):
            self.wait(lambda name=f"ran.{run_id}.{step_id}": self.read(name), step_id)  # type: ignore[misc]

    def _submit(self, run_id: str, *steps: dict[str, object]) -> None:
        params = self.submission(*steps, run_id=run_id)
        del params["run_id"]
        self.ask("submit", run_id, **params)

    def wait(self, condition: Callable[[], T], what: str) -> T:
        """The first true value of the condition. Raises Died, AssertionError."""

        def value_or_death() -> T:
            value = condition()
            self._check_alive(bool(value))
            # Nobody would ever get what he waits for.
            assert value or "is quarantined" not in self.log(), self.explain()
            return value

        return wait_until(value_or_death, what, self.explain)

    def _check_alive(self, is_enough: bool = False) -> None:
        assert self.process is not None
        if not is_enough and self.process.poll() is not None:
            raise Died

    def _answers(self) -> bool:
        try:
            return super()._answers()
        except AssertionError:
            # Most likely it has ended, between two looks perhaps.
            self._check_alive()
            raise

    def ask(self, method: str, run_id: str, **params: object) -> None:
        """Ask until it is answered. Raises Died, Refused (but for a shortage, which passes)."""

        def is_answered() -> bool:
            try:
                self.request(method, run_id=run_id, **params)
            except Refused as refused:
                if refused.code != protocol.STALLED:
                    raise
                return False
            except (ConnectionError, FileNotFoundError, EOFError):
                self.hang_up()
                return False
            return True

        self.wait(is_answered, f"an answer to {method}")
        self.answered.append((run_id, _LEAVES[method]))

    def hear(self, run_id: str, name: str, count: int) -> None:
        """Watch the run until it was shown so many events of this name. Raises Died."""
        heard = self.heard[run_id]

        def is_heard() -> bool:
            try:
                if run_id not in self._watching:
                    self._watching[run_id] = self.watch(run_id, len(heard) + 1)
                while sum(event["event"] == name for event in heard) < count:
                    message = self._watching[run_id].message()
                    heard.append(message["params"]["line"])
            except (Refused, ConnectionError, FileNotFoundError, EOFError) as error:
                if isinstance(error, Refused) and error.code != protocol.STALLED:
                    raise
                if run_id in self._watching:
                    self._watching.pop(run_id).close()
                return False
            return True

        self.wait(is_heard, f"{name} of {run_id}")

    # -- what must hold -------------------------------------------------------------------------------------------

    def check_kept(self) -> None:
        """What was answered or shown is in the log. Raises AssertionError."""
        for run_id, event in self.answered:
            assert event in self.names(run_id), f"{event} of {run_id} was answered and is not in its log\n{self.explain()}"
        for run_id, heard in self.heard.items():
            if heard:
                with open(self.home.run(run_id).events, "rb") as file:
                    lines = [json.loads(line) for line in file.readlines()[: len(heard)]]
                assert lines == heard, f"a watcher of {run_id} was shown {heard}, its log has {lines}"

    def check_end(self) -> None:
        """Everything has ended as it must. Raises AssertionError."""
        self.check_kept()
        assert "Traceback" not in self.log(), self.explain()
        for run_id, expected in EXPECTED.items():
            began_not = [event for event in self._facts(run_id, "attempt_not_started") if event.why == "never_began"]
            assert len(began_not) <= self.kills, f"{len(began_not)} attempts never began\n{self.story(run_id)}"
            assert not list(self._facts(run_id, "attempt_lost")), f"an attempt is lost\n{self.story(run_id)}"
            ended = {
                record.step.id: (record.state.value, record.attempt - sum(e.step == record.step.id for e in began_not))
                for record in self.fold(run_id).steps
            }
            assert ended == expected, f"{run_id} ended as {ended}\n{self.story(run_id)}"
            counted.check(self, run_id)
        left = os.listdir(self.home.live) + [name for name in os.listdir(self.home.runs) if name not in EXPECTED]
        assert not left, f"{left} is left\n{self.explain()}"

    def _facts(self, run_id: str, name: str) -> Iterator[Any]:
        return (line.event for line in self.events(run_id) if line.event.name == name)


@contextmanager
def staged(root: str = ROOT, *, is_taken_over: bool = False) -> Iterator[Scene]:
    """A home for the story. is_taken_over: a daemon was killed in it while steps ran, and a torn line is in a log."""
    with Scene(root) as scene:
        if is_taken_over:
            scene.start()
            scene.begin()
            scene.kill()
            scene.kills += 1
            with open(scene.home.run("main").events, "ab") as file:
                file.write(TORN)
        yield scene


def finish(scene: Scene) -> None:
    """A daemon whom nothing happens to plays the story to its end, and all is checked."""
    scene.check_kept()
    scene.wrapper = ()
    scene.start()
    scene.play()
    assert scene.stop() == 0, scene.explain()
    scene.check_end()
