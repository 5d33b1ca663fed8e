"""The library: what `import workflow` offers. Each call is one question or one order to the daemon of the current home
($WFD_HOME, else the platform's place for state).

    import workflow
    run_id = workflow.submit("workflow.json")
    for line in workflow.watch(run_id):
        print(line.seq, line.event)
    print(workflow.status(run_id)["state"])

A definition is given as a path, as a decoded JSON document, or as a `Workflow`. A relative `cwd` in it starts at the
directory of the file, or at the current one for a document. Everything that goes wrong is a `WorkflowError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TypedDict, cast

from wfctl import client, history
from wfctl.documents import absolute, checked, directory_of, document_in, parse, read_file, submit_document
from wfctl.errors import InvalidRequest
from wfctl.history import Replay
from wfctl.watch import Watch
from wfd import definition
from wfd.definition import Workflow
from wfd.events import Line
from wfd.paths import Home


class StepStatus(TypedDict):
    """One step of a run. Times are RFC 3339 UTC. `because`: the dependency for which it was skipped; `delay_ms`: how
    long a READY step waits before it is tried again."""

    id: str
    state: str
    attempt: int
    exit_code: int | None
    reason: str | None
    because: str | None
    started_at: str | None
    finished_at: str | None
    delay_ms: int
    depends_on: list[str]


class RunStatus(TypedDict):
    """A run, with its steps in the order of the definition. `source` is "daemon" or "log"; `stalled` says why nothing
    of the run can start at present, or is None."""

    run_id: str
    workflow_id: str
    state: str
    reason: str
    source: str
    stalled: str | None
    submitted_at: str
    finished_at: str | None
    last_seq: int
    cwd: str
    steps: list[StepStatus]


Source = Workflow | Mapping[str, object] | str | os.PathLike[str]


def load(path: str | os.PathLike[str]) -> Workflow:
    """Read and check a workflow file. Raises InvalidWorkflow."""
    return parse(read_file(os.fspath(path)), directory_of(os.fspath(path)))


def validate(document: Mapping[str, object], base_dir: str | None = None) -> Workflow:
    """Check a decoded JSON document. Relative `cwd`s in it start at `base_dir`, or at the current directory.
    Raises InvalidWorkflow, which holds every problem."""
    return checked(document, absolute(base_dir or "."))


def submit(workflow: Source, run_id: str | None = None, *, max_parallel: int | None = None) -> str:
    """Start a run and return its id once it is durable. The daemon is started when none answers.

    Steps inherit the caller's environment, umask, limits and current directory. Submitting the same workflow under the
    same `run_id` again returns the run that exists. Raises InvalidWorkflow, InvalidRequest, DaemonUnavailable."""
    document, base_dir = _document_of(workflow)
    return str(submit_document(document, base_dir, run_id, max_parallel)["run_id"])


def run(workflow: Source, run_id: str | None = None, *, max_parallel: int | None = None) -> RunStatus:
    """Submit, wait for the end, and return the final status. A daemon that crashes meanwhile is started again.
    Raises what `submit` and `watch` raise."""
    run_id = submit(workflow, run_id, max_parallel=max_parallel)
    home = client.current_home()
    _wait(home, run_id, revives=True)
    return cast(RunStatus, client.status(home, run_id))


def wait(run_id: str) -> str:
    """Wait until the run is over and return its state. Raises NoSuchRun, RunDamaged, DaemonUnavailable."""
    home = client.current_home()
    return _wait(home, client.resolve(home, run_id), revives=False)


def status(run_id: str) -> RunStatus:
    """The state of a run, from the daemon, or from the log when none answers. Raises NoSuchRun, RunDamaged."""
    home = client.current_home()
    return cast(RunStatus, client.status(home, client.resolve(home, run_id)))


def watch(run_id: str, from_seq: int = 1) -> Iterator[Line]:
    """The events of a run from line `from_seq` on, each once and in order, as they become durable, until it is over.
    Waits for the daemon when it is gone. Raises NoSuchRun, RunDamaged, DaemonUnavailable."""
    if from_seq < 1:
        raise InvalidRequest(f"from_seq is {from_seq}; lines are counted from 1")
    home = client.current_home()
    return (line for line in Watch(home, client.resolve(home, run_id), from_seq) if line is not None)


def cancel(run_id: str, wait: bool = False) -> str:
    """Cancel a run and return its state: CANCELLING, or its end if it was over. With `wait`, return when it is over.
    The daemon is started when none answers. Raises NoSuchRun, RunDamaged, DaemonUnavailable."""
    home = client.current_home()
    run_id = client.resolve(home, run_id)
    state = str(client.cancel(home, run_id)["state"])
    return _wait(home, run_id, revives=True) if wait else state


def retry(run_id: str) -> str:
    """Try again what did not succeed in a run that is over; return its state. The daemon is started when none answers.
    Raises NoSuchRun, RunDamaged, InvalidRequest, DaemonUnavailable."""
    home = client.current_home()
    return str(client.retry(home, client.resolve(home, run_id))["state"])


def replay(run_id: str, until: int | None = None) -> Replay:
    """Fold a run's log again, regenerate every decision and check every choice, up to line `until` if that is given.
    Raises NoSuchRun, RunDamaged."""
    home = client.current_home()
    return history.replay_run(home, client.resolve(home, run_id), until)


def _wait(home: Home, run_id: str, revives: bool) -> str:
    watch = Watch(home, run_id, revives=revives, only_end=True)
    for _ in watch:
        pass
    assert watch.state is not None
    return watch.state


# -- definitions -------------------------------------------------------------------------------------------------------


def _document_of(workflow: Source) -> tuple[dict[str, object], str]:
    """What is sent, and where its relative directories start."""
    if isinstance(workflow, Workflow):
        return _user_form(definition.to_record(workflow)), client.current_directory()
    if isinstance(workflow, Mapping):
        return dict(workflow), client.current_directory()
    path = _path_of(workflow)
    return document_in(read_file(path), directory_of(path)), directory_of(path)


def _path_of(workflow: object) -> str:
    if not isinstance(workflow, (str, os.PathLike)):
        raise InvalidRequest(f"a workflow is given as a path, a document or a Workflow, not as {type(workflow).__name__}")
    return os.fspath(workflow)


def _user_form(record: Mapping[str, object]) -> dict[str, object]:
    """A normalised record in the words that a user writes: seconds for milliseconds, plain ratios for thousandths.
    Checking it gives the workflow again that the record was made from. An `env` holds strings only and stays as it is."""
    document: dict[str, object] = {}
    for name, value in record.items():
        if name.endswith("_ms") and isinstance(value, int):
            document[name.removesuffix("_ms") + "_sec"] = value / 1000
        elif name.endswith("_permille") and isinstance(value, int):
            document[name.removesuffix("_permille")] = value / 1000
        elif name == "steps" and isinstance(value, list):
            document[name] = [_user_form(step) for step in value]
        elif isinstance(value, dict):
            document[name] = _user_form(value)
        else:
            document[name] = value
    return document
