"""The benchmark's case about watchers: does a run become slower when hundreds look on, and does each of them see it all?

The watchers are connections of one other process, `python -m tests.bench_watchers SOCKET RUN_ID COUNT FILE`. It takes what
has come every TICK_SEC, as terminals would that are redrawn so often: what the daemon does for them is to be measured, not
what they do with it.

The run's first step waits until all are there. The time is that from its end to the end of the run, by the log.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from tests.bench_results import ROUNDS, Options, Skipped, WrongResult, ratio, rounds
from tests.bench_runs import MOST_PARALLEL, Found
from tests.bench_subjects import Daemon, Graph, Step, definition, fan_out, loose
from tests.daemon import DEADLINE_SEC, ROOT, until
from wfd import protocol
from wfd.events import AttemptExited, RunFinished

# In so much time a run writes less than a socket holds: nobody who only waits for his turn is a slow reader.
TICK_SEC = 0.02
_RECEIVE_BYTES = 1 << 20
# What the daemon has open beside its watchers' connections: logs, status files, directories that it syncs.
_OTHER_FILES = 100
_END = b'"event":"run_finished"'


def watchers(options: Options) -> Found:
    """Nothing has more lines a second than a run of `true`, so it asks the most of a daemon with watchers; one of
    `sleep 0.1` is more like what people watch."""
    sizes = options.sizes
    quick = fan_out(sizes.steps, until("gate"))
    behind_gate = [step._replace(needs=("first",)) for step in loose(sizes.sleeps, "sleep 0.1")]
    slow = [Step("first", command=until("gate")), *behind_gate]
    if why := _why_no_crowd(sizes.watchers):
        yield Skipped("watchers", why)
        return
    with Daemon("--max-parallel", str(MOST_PARALLEL)) as daemon:
        calls = {
            "nobody": lambda: _watched_run(daemon, quick, 16, 0),
            "watched": lambda: _watched_run(daemon, quick, 16, sizes.watchers),
            "slow, nobody": lambda: _watched_run(daemon, slow, MOST_PARALLEL, 0),
            "slow, watched": lambda: _watched_run(daemon, slow, MOST_PARALLEL, sizes.watchers),
        }
        times = rounds(calls, options.rounds or ROUNDS, warms_up=options.warms_up)
        yield ratio("watchers", "without them", times["watched"], times["nobody"])
        yield ratio("watchers", "without them, steps of `sleep 0.1`", times["slow, watched"], times["slow, nobody"])
        if why := _why_no_crowd(sizes.most_watchers):
            yield Skipped("watchers", why)
            return
        most = _watched_run(daemon, quick, 16, sizes.most_watchers)
    # All of whom have seen it all, or we would not be here.
    yield ratio("watchers", "without them, 1,000", [most], times["nobody"][-1:])


def _why_no_crowd(count: int) -> str:
    """The crowd, and the daemon too, has a file open for each watcher."""
    needed, allowed = count + _OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if allowed == resource.RLIM_INFINITY or allowed >= needed:
        return ""
    return f"{count:,} watchers need {needed:,} open files, and no more than {allowed:,} may be"


def _watched_run(daemon: Daemon, graph: Graph, parallel: int, count: int) -> float:
    gate = f"{daemon.directory}/gate"
    run_id = daemon.submit(**definition(graph, parallel))  # type: ignore[arg-type]
    with _crowd(daemon, run_id, count) if count else nullcontext():
        daemon.touch("gate")
        daemon.wait_for(run_id, "SUCCEEDED")
    os.rename(gate, f"{gate}-{run_id}")
    daemon.check_run(run_id, graph)
    lines = daemon.events(run_id)
    begin_ms = next(line.mono_ms for line in lines if isinstance(line.event, AttemptExited) and line.event.step == "first")
    return (next(line.mono_ms for line in lines if isinstance(line.event, RunFinished)) - begin_ms) / 1000


@contextmanager
def _crowd(daemon: Daemon, run_id: str, count: int) -> Iterator[None]:
    """The other process, from when all its watchers are answered until they have seen the run's end. Raises WrongResult."""
    path = os.path.join(tempfile.mkdtemp(prefix="stream-"), "stream")
    command = [sys.executable, "-m", "tests.bench_watchers", daemon.socket_path, run_id, str(count), path]
    # In a group of its own: a Ctrl-C is for us alone, who end it then.
    crowd = subprocess.Popen(command, cwd=ROOT, env=daemon.environ, stdout=subprocess.PIPE, process_group=0)
    try:
        assert crowd.stdout is not None
        if crowd.stdout.readline() != b"ready\n":
            raise WrongResult(f"not all of {count} watchers were answered")
        yield
        if crowd.wait(DEADLINE_SEC) != 0:
            raise WrongResult(f"not each of {count} watchers has seen each event of run {run_id}")
    finally:
        crowd.kill()
        crowd.communicate()
    with open(path, "rb") as frames, open(daemon.home.run(run_id).events, "rb") as log:
        if [protocol.line_of(frame[:-1]) + b"\n" for frame in frames] != list(log):
            raise WrongResult(f"what the watchers of run {run_id} have seen is not its log")


# -- the other process -------------------------------------------------------------------------------------------------


def main(socket_path: str, run_id: str, count: str, path: str) -> int:
    """Be the watchers. When all have been answered, say so; when all have come to the run's end, write what they have seen
    to a file. Raises WrongResult when one of them has seen something else than another."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # What they have seen, and how far each has come in it.
    stream, places = bytearray(), dict[socket.socket, int]()
    for _ in range(int(count)):
        watcher, begun = _watch(socket_path, run_id)
        places[watcher] = _take(stream, 0, begun)
    print("ready", flush=True)
    while places and not (_is_whole(stream) and min(places.values()) == len(stream)):
        time.sleep(TICK_SEC)
        for watcher, place in places.items():
            with suppress(BlockingIOError):
                places[watcher] = _take(stream, place, watcher.recv(_RECEIVE_BYTES) or b"\0")
    with open(path, "wb") as file:
        file.write(stream)
    return 0


def _watch(socket_path: str, run_id: str) -> tuple[socket.socket, bytes]:
    """A connection that watches, and what has come behind the answer. Raises WrongResult, TimeoutError."""
    watcher, received = socket.socket(socket.AF_UNIX), b""
    # A daemon that may open no more files lets the others wait.
    watcher.settimeout(DEADLINE_SEC)
    watcher.connect(socket_path)
    watcher.sendall(protocol.request("watch", {"run_id": run_id, "from_seq": 1}))
    while b"\n" not in received:
        data = watcher.recv(_RECEIVE_BYTES)
        if not data:
            watcher.close()
            raise WrongResult("the daemon has hung up")
        received += data
    answer, _, begun = received.partition(b"\n")
    if "result" not in json.loads(answer):
        raise WrongResult(f"the daemon answered {answer!r}")
    watcher.setblocking(False)
    return watcher, begun


def _take(stream: bytearray, place: int, data: bytes) -> int:
    """What has come to a watcher at its place in the stream: its new place."""
    known = min(len(data), len(stream) - place)
    if not stream.startswith(data[:known], place):
        raise WrongResult(f"after {place} bytes a watcher has seen {data[:200]!r}")
    stream += data[known:]
    return place + len(data)


def _is_whole(stream: bytearray) -> bool:
    return stream.endswith(b"\n") and _END in stream[stream.rfind(b"\n", 0, -1) + 1 :]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
