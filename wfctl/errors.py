"""What can go wrong, as one family: a library's caller catches `WorkflowError`, the command line has exit codes for it.

Each message is one clear sentence: what, where, and what to do.
"""

from __future__ import annotations


class WorkflowError(Exception):
    """Anything that keeps a call from doing what it was asked for."""


class InvalidWorkflow(WorkflowError):
    """A definition was refused. `problems` are pairs of JSON path and message; str() is one problem a line."""

    def __init__(self, text: str, problems: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(text)
        self.problems = problems


class InvalidRequest(WorkflowError):
    """The request itself cannot be granted: a run id that is none or is taken, a retry of a run that still runs."""


class NoSuchRun(WorkflowError):
    """No run, or more than one, is meant by the given text; or the run has no such step."""


class DaemonUnavailable(WorkflowError):
    """The daemon cannot be reached, cannot be started, or cannot do it now (the disk is full, …)."""


class RunDamaged(WorkflowError):
    """The run's log cannot be trusted, or a later version wrote it. The run is left on disk as it is."""
