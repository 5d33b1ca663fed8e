"""`python -m wfctl`: the command line. `wfctl.__main__:main` is also what a zipapp starts."""

from __future__ import annotations

import sys

from wfctl import cli


def main() -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
