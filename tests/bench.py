"""How fast it is, beside what is installed: `python -m tests.bench [CASE…] [--pairs N] [--profile] [--json FILE]`.

Rules (with those of bench_results.py)
* A time counts only when the result is right: the run SUCCEEDED, each step ran once, and the log replays; a command said
  what it should. Before the first time the graph is run with commands that leave a trace, to see that they are executed.
* Nothing is deleted before the last measurement: unlinking the files of earlier runs makes ext4 slow for a while, and
  that would be measured with the next run. What others have deleted is kept away from, too.
* What is not here (a tool, strace, /proc) is skipped, with the reason.

The homes lie in a directory under $TMPDIR, which is deleted at the end. On tmpfs an fsync costs nothing, so choose a real
disk; on an ext4 without a journal wait for five minutes before the next run there, or files are slow to create.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import TextIO

from tests import bench_homes, bench_runs, bench_watchers
from tests.bench_profile import PROFILED, profile
from tests.bench_results import Options, Result, Skipped, WrongResult
from tests.bench_runs import Found
from tests.bench_subjects import SIGNALS, uninterrupted

CASES: dict[str, tuple[str, Callable[[Options], Found]]] = {
    "fan-out": ("1,000 steps between a first and a last one, 16 at a time", partial(bench_runs.race, "fan-out")),
    "fan-out-2": ("the same, 2 at a time", partial(bench_runs.race, "fan-out-2")),
    "layers": ("20 layers of 50 steps, 16 at a time", partial(bench_runs.race, "layers")),
    "layers-2": ("the same, 2 at a time", partial(bench_runs.race, "layers-2")),
    "chain": ("200 steps, each after the one before", partial(bench_runs.race, "chain")),
    "sleep": ("300 times `sleep 0.1`, 50 at a time", partial(bench_runs.race, "sleep")),
    "10k": ("10,000 steps in one run, beside 1,000", partial(bench_runs.many_steps, "10k")),
    "100k": ("100,000 steps in one run, beside 1,000", partial(bench_runs.many_steps, "100k")),
    "submit": ("10,000 steps, until they are acknowledged", bench_runs.submit),
    "runs": ("100 runs of 20 steps at once, beside one of 2,000", bench_runs.many_runs),
    "disk": ("what is synced, by strace", bench_runs.disk),
    "log": ("reading the log of 10,000 steps, beside json.loads", bench_homes.log),
    "start": ("a daemon's start with 10,000 finished runs and 10 unfinished ones, beside the 10 alone", bench_homes.start),
    "commands": ("status, list, run -d in that home, beside `python3 -I -c 'import socket, json'`", bench_homes.commands),
    "watchers": ("runs of `true` and `sleep 0.1` that 200 watch, beside nobody; then 1,000", bench_watchers.watchers),
    "idle": ("a daemon that has nothing to do, then one with 200 live steps", bench_homes.idle),
}
# It takes some minutes, so it is measured only where it is named.
ONLY_NAMED = frozenset({"100k"})


class NotWritten(Exception):
    """Figures could not be printed, or written to their file."""


def measure(cases: Sequence[str], options: Options, profiles: bool = False) -> Generator[Result | Skipped, None, None]:
    """The figures of these cases, as they come."""
    for name in cases:
        yield from CASES[name][1](options)
        if profiles and name in PROFILED:
            yield from profile(name, options)


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(base: str) -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        "file_system": _file_system(base),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _file_system(path: str) -> str:
    """The type of the file system that a path is on, as far as the system says."""
    try:
        with open("/proc/mounts", encoding="utf-8") as file:
            mounts = [line.split()[1:3] for line in file]
    except OSError:
        return "unknown"
    under = [(point, kind) for point, kind in mounts if os.path.commonpath([point, path]) == point]
    return max(under, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


@contextmanager
def place() -> Iterator[str]:
    """The directory that all files of the benchmark are in, until its end."""
    base, before = tempfile.mkdtemp(prefix="wfd-bench-"), tempfile.tempdir
    # Where somebody else has just deleted files, ext4 without a journal takes 0.8 ms to create one, since it shuns inodes
    # for minutes after their end. Directories below one that is marked so lie in other parts of the disk.
    if shutil.which("chattr"):
        subprocess.run(["chattr", "+T", base], capture_output=True, check=False)
    tempfile.tempdir = base
    try:
        yield base
    finally:
        tempfile.tempdir = before
        with uninterrupted():
            shutil.rmtree(base)


# -- the command line --------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    """Measure the cases that are asked for, or all but ONLY_NAMED. 0; 1 when a result was wrong, or the figures cannot be
    printed or written, which a sentence on stderr says; 2 for wrong words, or a file that cannot be made; 130, 143 and 141
    as a shell has them for who is interrupted, is ended by SIGTERM, or has no reader any more. What was measured until then
    is in the file."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure wfd beside what is installed.",
        epilog="cases:\n" + "\n".join(f"  {name:10} {about}" for name, (about, _) in CASES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", nargs="*", help=f"one or more of those below (default: all but {', '.join(ONLY_NAMED)})")
    parser.add_argument("--pairs", type=_positive, metavar="N", help="rounds of each comparison")
    parser.add_argument("--profile", action="store_true", help=f"of {', '.join(PROFILED)}: where the daemon's time goes")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every round here")
    arguments = parser.parse_args(words)
    for name in arguments.case:
        if name not in CASES:
            parser.error(f"no case {name!r}; there are {', '.join(CASES)}")
    cases = arguments.case or [name for name in CASES if name not in ONLY_NAMED]
    try:
        with ExitStack() as stack:
            try:
                # Before anything is measured: minutes would be lost.
                file = None if arguments.json is None else stack.enter_context(open(arguments.json, "w", encoding="utf-8"))
            except OSError as error:
                parser.error(f"--json {arguments.json}: {error.strerror}")
            base = stack.enter_context(place())
            # Closed before its files go: whatever ends us, no daemon is left.
            found = stack.enter_context(closing(measure(cases, Options(base, arguments.pairs), arguments.profile)))
            show(machine(base), found, file)
    except (WrongResult, NotWritten) as problem:
        if isinstance(problem.__cause__, BrokenPipeError):
            return 141
        print(f"bench: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        number: int = interrupt.args[0] if interrupt.args else signal.SIGINT
        return 128 + number
    return 0


def _heed_signals() -> None:
    """From now on SIGTERM (which `timeout` sends) interrupts as Ctrl-C does, and neither does so for a second time: whoever
    presses Ctrl-C again shall not stop what cleans up. What whoever started us has us ignore is ignored."""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        # Not by ignoring the signal from now on: one that has just come would be told of on stderr.
        if not came:
            came.append(number)
            raise KeyboardInterrupt(number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def show(where: dict[str, object], found: Found, file: TextIO | None) -> None:
    """Print figures as they come, and write them to a file when that is asked for, which is then closed. Raises
    NotWritten."""
    results, skipped = [], []
    try:
        _print("\n".join(f"{name + ':':12} {value}" for name, value in where.items()))
        for each in found:
            _print(each.row())
            if isinstance(each, Result):
                results.append(each.record())
            else:
                skipped.append(asdict(each))
    finally:
        if file is not None:
            try:
                with file:
                    json.dump({"machine": where, "results": results, "skipped": skipped}, file, indent=1)
            except OSError as error:
                raise NotWritten(f"{file.name}: {error.strerror}") from error


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        # Else the interpreter would try to say the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise NotWritten(f"standard output: {error.strerror}") from error


if __name__ == "__main__":
    # Not in main: a test that calls it has signal handlers of its own.
    _heed_signals()
    status = main()
    # All is cleaned up, and it is known how it ended.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
