"""Where things lie. Names only: nothing here touches the disk.

    <home>/                       0700; see `default_home`
      wfd.lock  wfd.log  wfd.sock  wfd.reserve
      live/<run_id>               a run that may be unfinished (too many, never too few)
      runs/<run_id>/
        events.ndjson             the journal
        environment.json          0600: the submitter's environment, umask and limits
        attempts/<ordinal>-<slug>.<attempt>.{out,status}
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from wfd.values import Value

# sockaddr_un.sun_path holds 104 bytes on macOS and 108 on Linux, the closing NUL included: 103 fit both.
MAX_SOCKET_PATH_BYTES = 103
# A slug only helps people find a file; the ordinal makes the name unique. 40 keeps names far below NAME_MAX (255).
MAX_SLUG_CHARS = 40

# Lower case sorts alike on case-folding file systems; a leading dot or dash would hide it or read as an option.
RUN_ID = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,98}[a-z0-9_-])?")
RUN_ID_RULE = "1 to 100 of a-z 0-9 . _ -, starting with a letter or digit, not ending in a dot"


def is_run_id(text: str) -> bool:
    """May this be the name of a run (and so of its directory)?"""
    return RUN_ID.fullmatch(text) is not None


def default_home(environ: Mapping[str, str], platform: str, user_home: str) -> str:
    """$WFD_HOME, else $XDG_STATE_HOME/wfd, else the platform's place for state. A relative value of either is ignored,
    as the XDG base directory specification asks."""
    if environ.get("WFD_HOME", "").startswith("/"):
        return environ["WFD_HOME"]
    if environ.get("XDG_STATE_HOME", "").startswith("/"):
        return environ["XDG_STATE_HOME"] + "/wfd"
    if platform == "darwin":
        return user_home + "/Library/Application Support/wfd"
    return user_home + "/.local/state/wfd"


class AttemptFiles(Value):
    """The files of one attempt."""

    __slots__ = ()
    out: str
    status: str
    script: str


class RunFiles(Value):
    """The files of one run."""

    __slots__ = ()
    directory: str

    @property
    def events(self) -> str:
        return self.directory + "/events.ndjson"

    @property
    def environment(self) -> str:
        return self.directory + "/environment.json"

    @property
    def attempts(self) -> str:
        return self.directory + "/attempts"

    def attempt(self, ordinal: int, step_id: str, attempt: int) -> AttemptFiles:
        """The files of an attempt. ordinal: the step's place in the definition, from 1."""
        stem = f"{self.attempts}/{ordinal}-{slug(step_id)}.{attempt}"
        return AttemptFiles(stem + ".out", stem + ".status", stem + ".sh")


def slug(step_id: str) -> str:
    """A file-name-safe rest of a step id, for people's eyes."""
    return _UNSAFE.sub("-", step_id)[:MAX_SLUG_CHARS].strip("-") or "step"


_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_ATTEMPT_NAME = re.compile(r"([1-9][0-9]{0,8})-[A-Za-z0-9_-]+\.([1-9][0-9]{0,8})\.(?:out|status|sh)")


def parse_attempt_name(name: str) -> tuple[int, int] | None:
    """(ordinal, attempt) of an attempt's file name, or None when it is not one."""
    match = _ATTEMPT_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


class Home(Value):
    """The files of one home: one daemon, all its runs."""

    __slots__ = ()
    directory: str

    @property
    def lock(self) -> str:
        return self.directory + "/wfd.lock"

    @property
    def log(self) -> str:
        return self.directory + "/wfd.log"

    @property
    def reserve(self) -> str:
        return self.directory + "/wfd.reserve"

    @property
    def live(self) -> str:
        return self.directory + "/live"

    @property
    def runs(self) -> str:
        return self.directory + "/runs"

    def run(self, run_id: str) -> RunFiles:
        return RunFiles(f"{self.runs}/{run_id}")

    def socket(self, runtime_directory: str) -> str:
        """The home's own socket. A path too long for sockaddr_un moves, under a hashed name, into the given private
        runtime directory (0700; the caller makes it and checks its owner)."""
        path = self.directory + "/wfd.sock"
        if len(path.encode("utf-8", "surrogateescape")) <= MAX_SOCKET_PATH_BYTES:
            return path
        import hashlib  # Only such homes need it, and importing it costs every other start-up milliseconds.

        digest = hashlib.sha256(self.directory.encode("utf-8", "surrogateescape")).hexdigest()
        return f"{runtime_directory}/{digest[:16]}.sock"


def runtime_directory(environ: Mapping[str, str], uid: int) -> str:
    """A short private directory for sockets whose home path is too long: $XDG_RUNTIME_DIR/wfd, else /tmp/wfd-<uid>."""
    base = environ.get("XDG_RUNTIME_DIR", "")
    # 60 leaves room for "/wfd/" and the hashed name within MAX_SOCKET_PATH_BYTES.
    if base.startswith("/") and len(base.encode("utf-8", "surrogateescape")) <= 60:
        return base + "/wfd"
    return f"/tmp/wfd-{uid}"
