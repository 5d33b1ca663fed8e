"""`python -m wfctl`: the command line as a whole process. Scripts and zipapps start `wfctl.__main__:main`, too."""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False  # As in typing, whose import costs a tenth of a whole `status`.
if TYPE_CHECKING:
    from typing import NoReturn


# As cli.INTERRUPTED, which is not there yet.
_INTERRUPTED = 130
# As the daemon's, which would have to be imported.
_GC_THRESHOLD = 50_000


def main() -> NoReturn:
    """Carry out the command line and end the process with its exit code.

    A `status` is mostly start-up and end. Collecting garbage while modules are imported finds none, and taking the
    interpreter apart frees what the kernel frees anyway: without both it is a seventh faster. What is read from a log stays,
    too, and is no garbage to look for again and again."""
    gc.disable()
    try:
        from wfctl import cli
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)
    gc.set_threshold(_GC_THRESHOLD)
    gc.enable()
    code = cli.main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:  # noqa: SIM105 - importing contextlib costs a millisecond
                stream.flush()
            except OSError:
                pass  # The code has been decided; what cannot be said any more does not change it.
    os._exit(code)


if __name__ == "__main__":
    main()
