"""The workflow daemon, and everything that the daemon and its clients must agree on.

The rooms and what each may import are listed in ARCHITECTURE.md; `tests/test_architecture.py` holds the code to it.
"""

VERSION = "0.1.0"
