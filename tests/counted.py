"""Steps that count their own executions, so that one that ran twice is seen whatever the log says.

The command of a step begins with COUNT: each execution appends the number of its attempt to a file of the step. `check`
compares those files with the log. How often an attempt must have run follows from how the log says that it ended:

    it exited with a status of its own            once
    it was ended by a signal, or nobody knows     once or never: the signal may have come before it could count
    it never began                                never
"""

from __future__ import annotations

from collections import Counter, defaultdict

from tests.daemon import Daemon
from wfd.events import AttemptExited, AttemptLost, AttemptNotStarted

COUNT = 'echo "$WFD_ATTEMPT" >> "ran.$WFD_RUN_ID.$WFD_STEP_ID"; '
# What a shell reports of a command that TERM or KILL has ended.
_BY_SIGNAL = (128 + 15, 128 + 9)


def executions(daemon: Daemon, run_id: str, step_id: str) -> Counter[int]:
    """How often each attempt of a step has really run."""
    return Counter(map(int, daemon.read(f"ran.{run_id}.{step_id}").split()))


def check(daemon: Daemon, run_id: str) -> None:
    """Did every attempt of a run that is over run as often as its end allows, and none that the log does not know? Raises
    AssertionError."""
    allowed: dict[str, dict[int, range]] = defaultdict(dict)
    for line in daemon.events(run_id):
        event = line.event
        if isinstance(event, (AttemptExited, AttemptLost, AttemptNotStarted)):
            allowed[event.step][event.attempt] = _times(event)
    for record in daemon.fold(run_id).steps:
        step_id, times = record.step.id, allowed[record.step.id]
        assert sorted(times) == list(range(1, record.attempt + 1)), f"{run_id}, {step_id!r}: the ends of {times} only"
        ran = executions(daemon, run_id, step_id)
        for attempt in times.keys() | ran.keys():
            expected = times.get(attempt, range(1))
            said = f"run {run_id}, step {step_id!r}: attempt {attempt} ran {ran[attempt]} times, not {list(expected)}"
            assert ran[attempt] in expected, f"{said}\n{daemon.story(run_id)}"


def _times(event: AttemptExited | AttemptLost | AttemptNotStarted) -> range:
    if isinstance(event, AttemptNotStarted):
        return range(1)
    if isinstance(event, AttemptLost) or event.exit_code in (None, *_BY_SIGNAL):
        return range(2)
    return range(1, 2)
