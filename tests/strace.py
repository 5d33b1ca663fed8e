"""strace as a tool of tests: what a process calls, and a signal or an error in the place of its n-th call.

Facts this rests on (strace(1), and tried)
* Without -f only the process itself is traced, not what it spawns; calls are counted by their name and for that process.
* A SIGKILL that is put in at a call ends the process before the call is carried out.
* -D makes the tracer a grandchild, so that the process keeps its parent and its pid.
* -P counts and meets only the calls that name a path or have it open.
* A name that this system has not is passed over if it begins with a question mark.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

# `openat(AT_FDCWD</>, "/home/wfd.lock", …` and `fsync(10</home/wfd.lock>) = 0`, as -y shows them.
_CALL = re.compile(r"([a-z_0-9]+)\(")
_NAMED = re.compile(r'[(,] ?"(/[^"]*)"')
_OPEN = re.compile(r"^[a-z_0-9]+\(\d+<(/[^>]*)>")


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that was seen. n: the how-manieth of its name. path: the first that it names, else that of its
    descriptor, else ""; nth_of_path: the how-manieth of this name with this path. text: the line."""

    name: str
    n: int
    path: str
    nth_of_path: int
    text: str


@cache
def why_not() -> str:
    """Why nothing can be traced here; "" where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    command = ["strace", "-D", "-o", os.devnull, "-e", "trace=none", "true"]
    tried = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return "" if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.decode(errors='replace').strip()}"


def traced(names: Iterable[str], out: str) -> tuple[str, ...]:
    """What to put before a command so that these calls of it are written to a file, with their paths."""
    return ("strace", "-D", "-y", "-o", out, "-e", "trace=" + ",".join(f"?{name}" for name in names))


def killed_at(name: str, n: int) -> tuple[str, ...]:
    """What to put before a command so that it dies before its n-th call of this name."""
    return ("strace", "-D", "-o", os.devnull, "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={n}")


def calls(path: str) -> list[Call]:
    """What a trace shows."""
    of_name: dict[str, int] = defaultdict(int)
    of_path: dict[tuple[str, str], int] = defaultdict(int)
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            match = _CALL.match(line)
            if match is None:
                continue
            name = match[1]
            where = _NAMED.search(line) or _OPEN.search(line)
            named = where[1] if where else ""
            of_name[name] += 1
            of_path[name, named] += 1
            found.append(Call(name, of_name[name], named, of_path[name, named], line))
    return found
