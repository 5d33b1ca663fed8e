"""What clients may ask for: one function a method of protocol.py.

Each looks, or changes the state in memory, and returns the run that its answer depends on (None: it depends on none) and
a function that builds the answer. The supervisor calls that when the turn's commits are done, so an answer speaks of
what is durable; if the commit of that run failed, the client is refused instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wfd import VERSION, definition, journal, protocol
from wfd.events import FORMAT, RULES, RunFinished, RunSubmitted
from wfd.journal import Damaged
from wfd.paths import RUN_ID_RULE, RunFiles, is_run_id
from wfd.protocol import ProtocolError
from wfd.server import Connection
from wfd.state import FAILED, SUCCEEDED, Run, RunState

if TYPE_CHECKING:
    from wfd.supervisor import LiveRun, Supervisor

# A finished run longer than this is not folded in the loop, which would make all others wait: the client reads it.
FOLD_LIMIT_BYTES = 4 << 20

_Answer = tuple["LiveRun | None", Callable[[], dict[str, object]]]


@dataclass(frozen=True, slots=True)
class Environment:
    """What a run's commands inherit from the client that submitted it. limits: soft limits by name, -1 for none."""

    env: dict[str, str]
    umask: int
    limits: dict[str, int]

    def encode(self) -> bytes:
        record = {"env": self.env, "umask": self.umask, "limits": self.limits}
        return json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"


def parse_environment(record: object) -> Environment:
    """Raises ValueError, which says what is wrong."""
    if not isinstance(record, dict) or set(record) != {"env", "umask", "limits"}:
        raise ValueError('environment must be {"env", "umask", "limits"}')
    env, umask, limits = record["env"], record["umask"], record["limits"]
    if not isinstance(env, dict) or not all(_is_variable(name, value) for name, value in env.items()):
        raise ValueError("environment.env must map names to strings (no NUL, no = in a name, no lone surrogate)")
    if type(umask) is not int or not 0 <= umask <= 0o777:
        raise ValueError("environment.umask must be a whole number from 0 to 511")
    if not isinstance(limits, dict) or not all(type(value) is int and value >= -1 for value in limits.values()):
        raise ValueError("environment.limits must map names to whole numbers from -1 on")
    return Environment(env, umask, limits)


def _is_variable(name: str, value: object) -> bool:
    return (
        isinstance(value, str)
        and bool(name)
        and "\0" not in name + value
        and "=" not in name
        and _is_bytes(name)
        and _is_bytes(value)
    )


def _is_bytes(text: str) -> bool:
    """Does the text stand for bytes? Those that are no UTF-8 come as the surrogates of PEP 383, no others do."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def load_environment(files: RunFiles, run_id: str) -> Environment:
    """A run's environment.json. Raises Damaged, OSError."""
    try:
        with journal.open_plain(files.environment, run_id) as file:
            journal.check_owner(run_id, "environment.json", os.fstat(file.fileno()))
            return parse_environment(json.loads(file.read()))
    except FileNotFoundError:
        raise Damaged(run_id, "its environment.json is missing") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(run_id, f"its environment.json is not what was written: {error}") from None


def _hello(supervisor: Supervisor, connection: Connection, params: dict[str, object]) -> _Answer:
    low, high = params["protocol_min"], params["protocol_max"]
    assert isinstance(low, int) and isinstance(high, int)
    version = min(high, protocol.PROTOCOL_MAX)
    if version < max(low, protocol.PROTOCOL_MIN):
        ours = f"{protocol.PROTOCOL_MIN} to {protocol.PROTOCOL_MAX}"
        raise ProtocolError(protocol.UNSUPPORTED_PROTOCOL, f"this daemon speaks protocol {ours}, not {low} to {high}")
    return None, lambda: {
        "protocol": version,
        "pid": os.getpid(),
        "home": supervisor.home.directory,
        "socket": supervisor.socket_path,
        "version": VERSION,
        "uptime_sec": (supervisor.now_ms - supervisor.started_ms) // 1000,
        "active_runs": len(supervisor.live),
        "live_steps": supervisor.running,
        "max_parallel": supervisor.max_parallel,
        "quarantined": sorted(supervisor.quarantined),
    }


def _submit(supervisor: Supervisor, connection: Connection, params: dict[str, object]) -> _Answer:
    run_id, cwd, base_dir = params["run_id"], params["cwd"], params["base_dir"]
    assert isinstance(run_id, str) and isinstance(cwd, str) and isinstance(base_dir, str)
    if supervisor.is_draining:
        raise ProtocolError(protocol.SHUTTING_DOWN, "the daemon is shutting down and takes no more runs")
    if not is_run_id(run_id):
        raise ProtocolError(protocol.INVALID_PARAMS, f"{run_id!r} is no run id ({RUN_ID_RULE})")
    if not cwd.startswith("/") or "\0" in cwd or not _is_bytes(cwd):
        raise ProtocolError(protocol.INVALID_PARAMS, "cwd must be an absolute path")
    try:
        environment = parse_environment(params["environment"])
    except ValueError as error:
        raise ProtocolError(protocol.INVALID_PARAMS, str(error)) from None
    try:
        # Popped, so that the parsed JSON, 1.5 KB a step, is gone before the log's line 1 is made.
        workflow = definition.validate(params.pop("definition"), base_dir)
    except definition.DefinitionError as error:
        problems = [{"path": problem.path, "message": problem.message} for problem in error.problems]
        raise ProtocolError(protocol.INVALID_DEFINITION, str(error), {"problems": problems}) from None
    existing = _existing(supervisor, run_id)
    if existing is not None and existing != workflow:
        raise ProtocolError(protocol.RUN_EXISTS, f"run {run_id} exists and has another definition: choose another id")
    if existing is not None:
        _find(supervisor, params)
    else:
        supervisor.create(RunSubmitted(run_id, FORMAT, RULES, supervisor.boot_id, cwd, workflow), environment)
    return None, lambda: {
        "run_id": run_id,
        "workflow_id": workflow.workflow_id,
        "state": _state_of(supervisor, run_id),
        "created": existing is None,
    }


def _existing(supervisor: Supervisor, run_id: str) -> definition.Workflow | None:
    live = supervisor.live.get(run_id)
    if live is not None:
        return live.run.workflow
    try:
        return journal.submitted(supervisor.home.run(run_id), run_id).workflow
    except FileNotFoundError:
        return None


def _find(supervisor: Supervisor, params: dict[str, object]) -> tuple[str, LiveRun | None]:
    """The run that a request names; None beside its id when it is over. A run on disk that is unfinished though no marker
    says so (it was copied here, or cut) is taken over now. Raises ProtocolError, Damaged, OSError."""
    run_id = params["run_id"]
    assert isinstance(run_id, str)
    live = supervisor.live.get(run_id)
    if live is not None:
        # Perhaps it is over in memory, but then its end is not durable yet.
        return run_id, live
    supervisor.check_sound(run_id)
    files = supervisor.home.run(run_id)
    if not is_run_id(run_id) or not journal.exists(files.directory):
        raise ProtocolError(protocol.NO_SUCH_RUN, f"there is no run {run_id}")
    last = journal.last_line(files, run_id)
    is_marked = journal.exists(f"{supervisor.home.live}/{run_id}")
    # Where the marker is still there, a take-over has failed, and the end that we read may not be durable.
    if last is not None and isinstance(last.event, RunFinished) and not is_marked:
        return run_id, None
    journal.mark_live(supervisor.home, run_id)
    return run_id, supervisor.take_over(run_id)


def _fold_finished(files: RunFiles, run_id: str) -> Run:
    """The end of a run whose last line tells it. That line alone proves nothing about those before it. Raises Damaged."""
    run, _ = journal.fold(files, run_id)
    if not run.is_over:
        raise Damaged(run_id, f"its last line tells its end, but line {run.seq + 1} is not whole")
    return run


def _is_long(files: RunFiles) -> bool:
    return os.stat(files.events).st_size > FOLD_LIMIT_BYTES


def _finished(files: RunFiles, run_id: str) -> Run:
    """The same for an answer: a log that is too long for the loop is left to whoever asks. Raises ProtocolError, Damaged,
    OSError."""
    if _is_long(files):
        raise ProtocolError(protocol.READ_THE_LOG, f"run {run_id} is over and its log is long: read it yourself")
    return _fold_finished(files, run_id)


def _state_of(supervisor: Supervisor, run_id: str) -> str:
    live = supervisor.live.get(run_id)
    if live is not None:
        return live.run.state.value
    last = journal.last_line(supervisor.home.run(run_id), run_id)
    if last is not None and isinstance(last.event, RunFinished):
        return last.event.state
    return journal.fold(supervisor.home.run(run_id), run_id)[0].state.value


def _status(supervisor: Supervisor, connection: Connection, params: dict[str, object]) -> _Answer:
    run_id, live = _find(supervisor, params)
    if live is not None:
        # Looked up when the answer is built: a failed commit gives the run its earlier state back.
        def describe() -> dict[str, object]:
            supervisor.check_sound(run_id)
            return {**live.run.describe(), "source": "daemon", "stalled": live.stalled}

        return None, describe
    # Looked up now: later in this turn somebody may have the run tried again, and then its log has no end any more.
    run = _finished(supervisor.home.run(run_id), run_id)
    return None, lambda: {**run.describe(), "source": "daemon", "stalled": None}


def _list(supervisor: Supervisor, connection: Connection, params: dict[str, object]) -> _Answer:
    return None, lambda: {"runs": [_summary(live) for live in supervisor.live.values()]}


def _summary(live: LiveRun) -> dict[str, object]:
    run = live.run
    states = [record.state for record in run.steps]
    return {
        "run_id": run.run_id,
        "workflow_id": run.workflow.workflow_id,
        "state": run.state.value,
        "submitted_at": run.submitted_at,
        "finished_at": run.finished_at,
        "steps": len(states),
        "succeeded": states.count(SUCCEEDED),
        "failed": states.count(FAILED),
        "running": len(run.running),
        "stalled": live.stalled,
    }


def _cancel(supervisor: Supervisor, connection: Connection, params: dict[str, object]) -> _Answer:
    try:
        run_id, live = _find(supervisor, params)
    except OSError as error:
        # Taking a run over needs room on the disk, too.
        if not supervisor.give_up_reserve(error):
            raise
        run_id, live = _find(supervisor, params)
    if live is None:
        # Looked up now, as for a status.
        state = _finished(supervisor.home.run(run_id), run_id).state.value
        return None, lambda: {"run_id": run_id, "state": state}
    supervisor.cancel(live, str(params["request"]))
    return live, lambda: {"run_id": run_id, "state": _state_of(supervisor, run_id)}


def _retry(supervisor: Supervisor, connection: Connection, params: dict[str, object]) -> _Answer:
    run_id, live = _find(supervisor, params)
    run = _fold_finished(supervisor.home.run(run_id), run_id) if live is None else live.run
    request = str(params["request"])
    is_repeated = request in run.requests
    if is_repeated and live is None:
        # Its first answer was lost; perhaps it has the run's new end behind it.
        return None, lambda: {"run_id": run_id, "state": run.state.value}
    if not is_repeated:
        live = _tried_again(supervisor, run, live, request)
    return live, lambda: {"run_id": run_id, "state": _state_of(supervisor, run_id)}


def _tried_again(supervisor: Supervisor, run: Run, live: LiveRun | None, request: str) -> LiveRun:
    """Carry out a person's retry, if that is possible. Raises ProtocolError, Damaged, OSError."""
    if live is not None and (not run.is_over or live.journal.has_pending):
        raise ProtocolError(protocol.NOT_FINISHED, f"run {run.run_id} is not over: cancel it or wait for its end first")
    if supervisor.is_draining:
        raise ProtocolError(protocol.SHUTTING_DOWN, "the daemon is shutting down and starts nothing more")
    if run.state is RunState.SUCCEEDED:
        raise ProtocolError(protocol.NOT_FINISHED, f"run {run.run_id} SUCCEEDED: there is nothing to try again")
    if live is None:
        journal.mark_live(supervisor.home, run.run_id)
        return supervisor.take_over(run.run_id, retry_request=request)
    # A retry that failed before has left it with us.
    supervisor.retry(live, request)
    return live


def _watch(supervisor: Supervisor, connection: Connection, params: dict[str, object]) -> _Answer:
    run_id, owner = _find(supervisor, params)
    from_seq = params["from_seq"]
    assert isinstance(from_seq, int)
    files, only_end = supervisor.home.run(run_id), bool(params.get("only_end"))
    # Whoever is shown all lines checks them himself. The end alone proves nothing.
    if owner is None and (only_end or not _is_long(files)):
        _finished(files, run_id)

    def begin() -> dict[str, object]:
        supervisor.check_sound(run_id)
        # Where that is counts now, as the end does: a batch of this very turn may have come between.
        offset = 0 if only_end else journal.offset_of(files, run_id, from_seq)
        live = supervisor.live.get(run_id)
        if live is not None:
            end, last_seq = live.journal.size, live.journal.durable
        else:
            last = journal.last_line(files, run_id)
            end, last_seq = os.stat(files.events).st_size, last.seq if last is not None else 0
        supervisor.watchers.add(connection, run_id, offset, end, only_end=only_end)
        return {"run_id": run_id, "state": _state_of(supervisor, run_id), "last_seq": last_seq}

    return None, begin


def _shutdown(supervisor: Supervisor, connection: Connection, params: dict[str, object]) -> _Answer:
    if params.get("cancel_runs"):
        supervisor.drain()
    else:
        supervisor.is_stopping = True
    return None, dict


METHODS: dict[str, Callable[[Supervisor, Connection, dict[str, object]], _Answer]] = {
    "hello": _hello,
    "submit": _submit,
    "status": _status,
    "list": _list,
    "cancel": _cancel,
    "retry": _retry,
    "watch": _watch,
    "shutdown": _shutdown,
}
