"""What `status` answers, as types: for whoever uses the library with a type checker. No command line needs them."""

from __future__ import annotations

from typing import TypedDict


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
