"""The face of the engine: `python workflow.py run workflow.json`, and `import workflow`.

The command line is wfctl/cli.py, the library wfctl/api.py; nothing is decided here.
"""

from __future__ import annotations

try:
    from wfctl.__main__ import main
except KeyboardInterrupt:
    if __name__ == "__main__":
        # As the command line says it from here on.
        raise SystemExit(130) from None
    raise

if __name__ == "__main__":
    main()

# Below the end of a command, so that the command line does not pay for the library.
from wfctl.api import (
    RunStatus,
    StepStatus,
    cancel,
    load,
    replay,
    retry,
    run,
    status,
    submit,
    validate,
    wait,
    watch,
)
from wfctl.errors import (
    DaemonUnavailable,
    InvalidRequest,
    InvalidWorkflow,
    NoSuchRun,
    RunDamaged,
    WorkflowError,
)
from wfctl.history import Replay
from wfd.definition import Step, Workflow

__all__ = [
    "DaemonUnavailable", "InvalidRequest", "InvalidWorkflow", "NoSuchRun", "Replay", "RunDamaged", "RunStatus", "Step",
    "StepStatus", "Workflow", "WorkflowError", "cancel", "load", "main", "replay", "retry", "run", "status", "submit",
    "validate", "wait", "watch",
]  # fmt: skip
