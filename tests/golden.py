"""The golden logs: runs as each released version has written them, with the state and the verdict that they must keep.

    python -m tests.golden      record what is missing for the versions of this program

tests/golden/ holds two files for each: `f1r1-cancel.ndjson` is the log, written under format 1 and rules 1, and
`f1r1-cancel.json` what it means: the whole status, and what replay says. A change that would decide an old log otherwise,
or read it otherwise, fails on them.

Rules
* A recorded log is never written again. Who changes the rules gives them a new number (events.RULES) and records: then
  each situation below is there once more under that number, and the old files stay.
* A new situation is a function in the table below. It drives a real daemon, whose name of the host and of the boot are
  fixed, so that nothing of the recording machine is in the log; or makes the log where no daemon would write it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests import logs, mutations
from tests.daemon import Daemon, step, wait_until
from tests.logs import Log
from tests.proof import Row
from wfctl import history
from wfd import process
from wfd.events import FORMAT, RULES, AttemptExited, LogRecovered, StepFailed

PLACE = Path(__file__).with_name("golden")
_PROGRAM = (
    "import os, platform, sys; from wfd import __main__, machine; platform.node = lambda: 'host'; "
    "machine.boot_id = lambda: os.environ['GOLDEN_BOOT']; sys.exit(__main__.main())"
)
# A command that goes on when a file is there. Where, only the environment knows, which is not part of a log.
_GATE = 'while [ ! -e "$DIR/go" ]; do sleep 0.01; done'
_DEAF = "trap '' TERM; echo begun; while :; do sleep 0.01; done"


class Situation(NamedTuple):
    """What happens to the run `golden`, and how: `drive` brings it about with a daemon, or `make` makes its log."""

    name: str
    about: str
    drive: Callable[[Daemon], None] | None = None
    make: Callable[[], bytes] | None = None


# -- with a real daemon ------------------------------------------------------------------------------------------------


def _submit(daemon: Daemon, *steps: dict[str, object], **fields: Any) -> None:
    environment = {"DIR": daemon.directory, **fields.pop("environment", {})}
    daemon.submit(*steps, run_id="golden", directory="/", environment=environment, **fields)


def _finished(daemon: Daemon) -> None:
    """Until the run is over and its daemon has let go of it."""
    daemon.wait_for("golden")
    daemon.wait_until_let_go()


def _opened(daemon: Daemon) -> None:
    daemon.touch("go")
    _finished(daemon)


def _shim(daemon: Daemon, ordinal: int, id: str, attempt: int) -> int:
    """The pid of an attempt's shim, when its command has begun."""
    files = daemon.home.run("golden").attempt(ordinal, id, attempt)
    pid = wait_until(lambda: process.probe(files).pid, f"the pid of {id}")
    assert pid is not None
    return pid


def _deafened(daemon: Daemon, ordinal: int) -> None:
    """Until the step `deaf` hears no TERM any more."""
    _shim(daemon, ordinal, "deaf", 1)
    wait_until(lambda: "begun" in daemon.output("golden", "deaf"), "its trap")


def _all_killed(daemon: Daemon) -> None:
    """Daemon and steps, as by a power cut."""
    daemon.kill()
    for pid in daemon.processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not daemon.processes(), "the end of its steps")


def _torn_and_restarted(daemon: Daemon, tail: bytes) -> None:
    """The daemon dies, a power cut leaves something behind the last line, and the next daemon takes over."""
    daemon.kill()
    with open(daemon.home.run("golden").events, "ab") as file:
        file.write(tail)
    Path(f"{daemon.home.live}/golden").touch()
    daemon.start()


def _repaired(daemon: Daemon, tail: bytes) -> None:
    """The same for a run that is over."""
    _torn_and_restarted(daemon, tail)
    daemon.wait_for_event("golden", "log_recovered")
    daemon.wait_until_let_go()


def diamond(daemon: Daemon) -> None:
    _submit(daemon, step("a", "true"), step("b", "true", "a"), step("c", "true", "a"), step("d", "true", "b", "c"),
            max_parallel=1)  # fmt: skip
    _finished(daemon)


def retries(daemon: Daemon) -> None:
    third = 'test "$WFD_ATTEMPT" = 5'
    # 1, 1.5, 2.25 and 3.375 ms: rounded down.
    _submit(daemon, step("rounded", third, retries=4, backoff={"initial_sec": 0.001, "factor": 1.5}),
            step("drawn", "exit 9", retries=3, backoff={"initial_sec": 0.02, "factor": 2, "max_sec": 0.05, "jitter": 0.5}),
            step("at once", "false", retries=2, backoff={"initial_sec": 0}))  # fmt: skip
    _finished(daemon)


def skip_cascade(daemon: Daemon) -> None:
    _submit(daemon, step("a", "exit 3"), step("b", "true", "a"), step("c", "true", "b"), step("x", "true"),
            step("d", "true", "x", "c"))  # fmt: skip
    _finished(daemon)
    _repaired(daemon, b'{"seq":')


def timeouts(daemon: Daemon) -> None:
    kind = "trap 'exit 7' TERM; while :; do sleep 0.01; done"
    _submit(daemon, step("deaf", _DEAF, timeout_sec=1, grace_sec=0, retries=1, backoff={"initial_sec": 0}),
            step("kind", kind, timeout_sec=1), step("quick", "true", timeout_sec=600))  # fmt: skip
    _finished(daemon)


def cancel(daemon: Daemon) -> None:
    _submit(daemon, step("done", "true"), step("deaf", _DEAF, "done", grace_sec=0), step("ready", "true", "done"),
            step("pending", "true", "deaf"), max_parallel=1)  # fmt: skip
    _deafened(daemon, 2)
    daemon.request("cancel", run_id="golden", request="cancel-1")
    _finished(daemon)
    _repaired(daemon, bytes(50))


def cancel_while_down(daemon: Daemon) -> None:
    """Between the cancel and its end a daemon dies, and what it wrote last is torn."""
    _submit(daemon, step("deaf", _DEAF, grace_sec=1), step("after", "true", "deaf"))
    _deafened(daemon, 1)
    daemon.request("cancel", run_id="golden", request="cancel-1")
    _torn_and_restarted(daemon, b"\n")
    _finished(daemon)


def retry_by_hand(daemon: Daemon) -> None:
    _submit(daemon, step("fine", "true"), step("a", 'test -e "$DIR/go"', "fine", retries=1, backoff={"initial_sec": 0}),
            step("b", "true", "a"))  # fmt: skip
    _finished(daemon)
    daemon.touch("go")
    daemon.request("retry", run_id="golden", request="retry-1")
    _finished(daemon)


def cancelled_and_retried(daemon: Daemon) -> None:
    _submit(daemon, step("a", _GATE, grace_sec=0), step("b", "true", "a"))
    _shim(daemon, 1, "a", 1)
    daemon.request("cancel", run_id="golden", request="cancel-1")
    _finished(daemon)
    daemon.touch("go")
    daemon.request("retry", run_id="golden", request="retry-1")
    _finished(daemon)


def run_timeout(daemon: Daemon) -> None:
    _submit(daemon, step("a", _GATE, grace_sec=0), step("ready", "true"), step("pending", "true", "a"),
            timeout_sec=1, max_parallel=1)  # fmt: skip
    _finished(daemon)


def unicode(daemon: Daemon) -> None:
    _submit(daemon, step("čárka", "true # " + "ž" * 1_000), step("手順 2", "true", "čárka", env={"NAME": "日本"}),
            step("🙂", "true", "手順 2"), workflow_id="流れ")  # fmt: skip
    _finished(daemon)
    _repaired(daemon, b"\xff\n\xff")


def no_directory(daemon: Daemon) -> None:
    _submit(daemon, step("a", "true", cwd="/no/such", retries=1, backoff={"initial_sec": 0, "jitter": 1}),
            step("b", "true", "a"))  # fmt: skip
    _finished(daemon)


def too_long(daemon: Daemon) -> None:
    """No system takes an environment with a variable of a megabyte."""
    _submit(daemon, step("a", "true"), environment={"LONG": "x" * (1 << 20)})
    _finished(daemon)


def adopted(daemon: Daemon) -> None:
    _submit(daemon, step("a", f"{_GATE}; exit 5"), step("b", _GATE), step("c", "true", "b"))
    for ordinal, id in ((1, "a"), (2, "b")):
        _shim(daemon, ordinal, id, 1)
    daemon.restart()
    _opened(daemon)


def lost(daemon: Daemon) -> None:
    _submit(daemon, step("often", _GATE), step("once", _GATE, on_lost="fail"), step("after", "true", "often"))
    for attempt in (1, 2, 3, 4):
        os.killpg(_shim(daemon, 1, "often", attempt), signal.SIGKILL)
        daemon.wait_for_event("golden", "attempt_lost", step="often", attempt=attempt)
    os.killpg(_shim(daemon, 2, "once", 1), signal.SIGKILL)
    _finished(daemon)


def reboot(daemon: Daemon) -> None:
    _submit(daemon, step("a", f'test "$WFD_ATTEMPT" = 2 || {_GATE}', timeout_sec=600),
            step("b", 'test "$WFD_ATTEMPT" = 2', retries=1, backoff={"initial_sec": 0.5}), timeout_sec=3_600)  # fmt: skip
    _shim(daemon, 1, "a", 1)
    daemon.wait_for_event("golden", "step_retried", step="b")
    _all_killed(daemon)
    daemon.environ["GOLDEN_BOOT"] = "boot-2"
    daemon.start()
    _finished(daemon)


def torn_tail(daemon: Daemon) -> None:
    _submit(daemon, step("a", "true"), step("b", _GATE, "a"))
    _shim(daemon, 2, "b", 1)
    _torn_and_restarted(daemon, b'{"seq":9,"at":"2026-')
    _opened(daemon)


def never_began(daemon: Daemon) -> None:
    _submit(daemon, step("a", f'test "$WFD_ATTEMPT" = 2 || {_GATE}'))
    _shim(daemon, 1, "a", 1)
    _all_killed(daemon)
    Path(daemon.home.run("golden").attempt(1, "a", 1).status).write_bytes(b"status 1\n")
    daemon.start()
    _finished(daemon)


# -- made --------------------------------------------------------------------------------------------------------------


def stopped() -> bytes:
    log = Log(logs.workflow(logs.step("a"), logs.step("b", "a")), "golden").write(logs.session()).start("a").cancel()
    return log.not_started("a", "stopped").data


def owed() -> bytes:
    """A power cut has kept the end of an attempt and torn off the decisions on it; the next boot goes on."""
    workflow = logs.workflow(logs.step("a"), logs.step("b", "a"), logs.step("c", "a"), timeout_sec=60)
    log = Log(workflow, "golden").write(logs.session()).start("a")
    log.now_ms += 700
    log.put(AttemptExited("a", 1, 0))
    log.now_ms = 40
    log.write(LogRecovered(81, "torn-1042-0f0f0f0f"), logs.session("boot-2"))
    return log.start("b", "c").exit("b", 0).exit("c", 0).data


def unfinished() -> bytes:
    """As a daemon has left it that died while it wrote."""
    log = Log(logs.diamond(), "golden").write(logs.session()).start("a").exit("a", 0).start("b")
    known = len(log.data)
    # One line of the last batch is whole, the next is not.
    return log.exit("b", 1).data[: known + 200]


def forged() -> bytes:
    """Somebody has given a failure another reason, and sealed the line."""
    log = logs.complete(logs.diamond(), {"b": [1]}, "golden")
    place = next(number for number, line in enumerate(log.lines) if isinstance(line.event, StepFailed))
    lines = list(log.lines)
    lines[place] = lines[place]._replace(event=StepFailed("b", lines[place - 1].seq, "lost"))
    return logs.encode(lines, "golden")


SITUATIONS: tuple[Situation, ...] = (
    Situation("diamond", "four steps, one at a time", diamond),
    Situation("retries", "back-offs of fractions, with a jitter, and of nothing", retries),
    Situation("skip-cascade", "one failure, three steps skipped, one not; the torn tail of the end repaired", skip_cascade),
    Situation("timeouts", "a step that is killed twice, one that exits 7 in its grace, one in time", timeouts),
    Situation("cancel", "SUCCEEDED, RUNNING, READY and PENDING when the cancel comes; the end repaired", cancel),
    Situation("cancel-while-down", "a daemon dies between a cancel and its end, while it writes", cancel_while_down),
    Situation("retry-by-hand", "a failed run that a person has tried again", retry_by_hand),
    Situation("cancelled-and-retried", "a cancelled run that a person has tried again", cancelled_and_retried),
    Situation("run-timeout", "RUNNING, READY and PENDING when the run's timeout passes", run_timeout),
    Situation("unicode", "ids in other scripts and a long command; the end repaired", unicode),
    Situation("no-directory", "a directory that is not there, twice, with a jitter drawn", no_directory),
    Situation("too-long", "an environment that no system takes", too_long),
    Situation("adopted", "a daemon killed while two steps run; the next one learns their exit statuses", adopted),
    Situation("lost", "a step lost four times, and one that fails when it is lost once", lost),
    Situation("reboot", "one attempt and one back-off over a reboot", reboot),
    Situation("torn-tail", "half a line cut off while a step runs", torn_tail),
    Situation("never-began", "a shim that died before its command began", never_began),
    Situation("stopped", "a cancel before the command began", make=stopped),
    Situation("owed", "decisions torn off by a power cut, made up for after the reboot", make=owed),
    Situation("unfinished", "a run in the middle, with a torn tail", make=unfinished),
    Situation("forged", "a decision that the rules would have made for another reason", make=forged),
)


# -- files -------------------------------------------------------------------------------------------------------------


def told(path: Path) -> dict[str, Any]:
    """What a log means today: its bytes, its state, and what replay says."""
    replay = history.replay_file(str(path))
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "replay": {
            "lines": replay.lines,
            "torn_bytes": replay.torn_bytes,
            "difference": None if replay.difference is None else str(replay.difference),
        },
        "status": replay.run.describe(),
    }


def written(path: Path) -> dict[str, Any]:
    """What was recorded of it."""
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def corpus() -> list[Path]:
    """The logs, of all versions."""
    return sorted(PLACE.glob("*.ndjson"))


def path_of(situation: Situation) -> Path:
    """Where the log of a situation lies, for the versions of this program."""
    return PLACE / f"f{FORMAT}r{RULES}-{situation.name}.ndjson"


def record(situation: Situation) -> None:
    """Write the two files of a situation that has none yet."""
    path = path_of(situation)
    path.write_bytes(_made(situation))
    meaning = {"about": situation.about, **told(path)}
    path.with_suffix(".json").write_text(json.dumps(meaning, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _made(situation: Situation) -> bytes:
    """The log of a situation, brought about anew."""
    if situation.make is not None:
        return situation.make()
    assert situation.drive is not None
    daemon = Daemon(environ={"GOLDEN_BOOT": "boot-1"})
    daemon.program = ("-c", _PROGRAM)
    try:
        daemon.start()
        situation.drive(daemon)
        daemon.check()
        return Path(daemon.home.run("golden").events).read_bytes()
    finally:
        daemon.clean()


# -- proof -------------------------------------------------------------------------------------------------------------

# Changes of the rules, and of what reads them, each of which some golden log must notice.
BUGS = (
    "one retry too many",
    "lost attempts are not bounded",
    "on_lost is ignored",
    "the exit status wins over a cancel",
    "the exit status wins over a timeout",
    "a lost attempt counts as exited 0",
    "skipping does not spread",
    "one dependency is enough",
    "a retried run forgets that steps SUCCEEDED",
    "back-offs are rounded up",
    "the jitter is rounded up",
    "replay compares only the kinds of decisions",
    "checksums of another run pass",
)


def problems() -> Iterator[str]:
    """The golden logs that mean something else today."""
    for path in corpus():
        meant = written(path)
        try:
            means = told(path)
        except Exception as error:
            yield f"{path.name}: {error!r}"
            continue
        for name, value in means.items():
            if value != meant[name]:
                yield f"{path.name}: its {name} is {value}, not {meant[name]}"


def is_noticed(bug: str) -> bool:
    with mutations.applied(mutations.named(bug)):
        return any(problems())


def prove(count: int, seed: int) -> Row:
    """Every golden log, and every change of the rules that must not pass; there is nothing to draw."""
    tried = len(corpus())
    return Row("golden logs", tried, tried, len(BUGS), sum(map(is_noticed, BUGS)), tuple(problems()))


def main() -> int:
    for situation in SITUATIONS:
        if not path_of(situation).exists():
            record(situation)
            print(path_of(situation).name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
