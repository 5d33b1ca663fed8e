"""Hostile peers against one daemon: it answers everybody else while they are there, and its memory stays bounded.

    python -m tests.siege [--count N] [--seed N]

Theory: N peers connect and stay. In each round every one of them makes a move of its kind, and then, with all of them
still connected, an honest client asks, submits and gets its answers. All peers have the owner's uid: nobody else gets as
far, which a stranger tries as well, through a home and a socket that stand open to all. What is measured is the daemon's
peak of memory; what a peer sees is that it was hung up on when it asked for too much, and not before.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests import mutations
from tests.daemon import DEADLINE_SEC, Daemon, others_may_enter, step, wait_until
from tests.proof import Row
from wfd import protocol, server

PEERS, ROUNDS = 1_000, 12
# Whoever waits so long for an answer is held up by others.
PATIENCE_SEC = 60
# What it may hold of its peers, half as much again for bytearrays that have grown and shrunk, and itself: an idle daemon
# takes 20 MiB, a thousand connections a few more.
BOUND_BYTES = server.HELD_LIMIT_BYTES * 3 // 2 + (64 << 20)
# One that sends without end sends so much in all: more than any line may have.
ENDLESS_BYTES = protocol.MAX_FRAME_BYTES + (4 << 20)
_PIECE = b"x" * (1 << 18)
# The deliberate bugs that this must notice.
BUGS = (
    "peers of any uid are listened to",
    "a frame has no limit",
    "what is held of all peers is not bounded",
    "the socket is made with the umask as it is",
    "whoever does not read is waited for",
)


# So many of all kinds show each bug.
_BUG_PEERS = 40


class Peer:
    """A connection that means no good. `move` does a little more of what its kind does, and never waits."""

    # Is it to be hung up on in the end?
    ends = False

    def __init__(self, address: str, big_run: str) -> None:
        self.big_run = big_run
        self.socket = socket.socket(socket.AF_UNIX)
        # Blocking, so that it waits while many are queued up.
        self.socket.connect(address)
        self.socket.setblocking(False)
        self.is_hung_up = False
        self.sent = 0

    def move(self) -> None:
        """An idle one does nothing."""

    def send(self, data: bytes) -> bool:
        """As much of it as goes; was it all?"""
        while data:
            try:
                count = self.socket.send(data)
            except BlockingIOError:
                return False
            except OSError:
                self.is_hung_up = True
                return False
            self.sent += count
            data = data[count:]
        return True


class Drip(Peer):
    """One byte of a request at a time, and never its end."""

    _REQUEST = b'{"jsonrpc":"2.0","id":1,"method":"submit","params":{"run_id":"' + b"r" * 10_000

    def move(self) -> None:
        self.send(self._REQUEST[self.sent : self.sent + 1])


class Endless(Peer):
    """A line that is longer than any may be."""

    ends = True

    def move(self) -> None:
        while self.sent < ENDLESS_BYTES and self.send(_PIECE):
            pass


class Deaf(Peer):
    """A thousand requests at once, of which it reads no answer."""

    def move(self) -> None:
        if not self.sent:
            ask = protocol.request("status", {"run_id": self.big_run})
            self.send(ask * 1_000)


class Babbler(Peer):
    """Lines that are no requests, and some that are."""

    def move(self) -> None:
        self.send(b'\x00\xff nonsense\n[[[[\n{"jsonrpc":"2.0"}\n' + protocol.request("list", {}))
        try:
            while self.socket.recv(1 << 16):
                pass
        except BlockingIOError:
            return
        except OSError:
            pass
        self.is_hung_up = True


KINDS: tuple[type[Peer], ...] = (Peer, Drip, Deaf, Babbler)
# Each of them costs the daemon 68 MiB of reading; so many would have more than all peers may.
ENDLESS = 10


def memory_bytes(pid: int, field: str) -> int:
    """VmRSS, VmHWM: what a process takes, and the most that it ever took."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{field}:"))


@contextmanager
def besieged(daemon: Daemon, count: int, endless: int, seed: int) -> Iterator[list[Peer]]:
    """The peers, connected: one run that is worth asking for, and so many who ask for it or for worse."""
    chance = random.Random(seed)
    big_run = daemon.submit(*(step(f"step-{number}", "true") for number in range(300)), max_parallel=1)
    daemon.request("cancel", run_id=big_run, request="q")
    daemon.wait_for(big_run)
    kinds = [Endless] * endless + [chance.choice(KINDS) for _ in range(count - endless)]
    chance.shuffle(kinds)
    peers: list[Peer] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    try:
        for kind in kinds:
            peers.append(kind(daemon.socket_path, big_run))
        yield peers
    finally:
        for peer in peers:
            peer.socket.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def siege(daemon: Daemon, count: int, endless: int, seed: int, rounds: int = ROUNDS) -> list[str]:
    """All that goes wrong, one sentence each. endless: how many of the peers send lines without end."""
    assert daemon.process is not None
    pid, problems = daemon.process.pid, []
    if mode_of(daemon.socket_path) != 0o600:
        problems.append(f"the socket has mode {mode_of(daemon.socket_path):o}")
    with besieged(daemon, count, endless, seed) as peers:
        for number in range(rounds):
            for peer in peers:
                peer.move()
            _ask_honestly(daemon, f"round-{seed}-{number}")
        _let_come_to_an_end(daemon, peers)
        kinds = {type(peer).__name__ for peer in peers if peer.is_hung_up and not peer.ends}
        if kinds:
            problems.append(f"some were hung up on that had asked for nothing out of bounds: {sorted(kinds)}")
        if not all(peer.is_hung_up for peer in peers if peer.ends):
            problems.append(f"a line of {ENDLESS_BYTES} bytes was listened to")
    peak = memory_bytes(pid, "VmHWM")
    if peak > BOUND_BYTES:
        problems.append(f"the daemon took {peak >> 20} MiB, of at most {BOUND_BYTES >> 20}")
    wait_until(lambda: daemon.request("hello", protocol_min=1, protocol_max=1), "an answer after the siege")
    return problems


def _ask_honestly(daemon: Daemon, run_id: str) -> None:
    """A client that comes now, with everybody else still there."""
    with daemon.connect() as client:
        client.socket.settimeout(PATIENCE_SEC)
        client.request("hello", protocol_min=1, protocol_max=1)
        client.request("submit", **daemon.submission(step("a", "true"), run_id=run_id))
        client.request("status", run_id=run_id)


def _let_come_to_an_end(daemon: Daemon, peers: list[Peer]) -> None:
    """Those that go on without end do so until they are hung up on, or have sent it all and it was taken."""
    endless = [peer for peer in peers if peer.ends]

    def are_done() -> bool:
        for peer in endless:
            peer.move()
        return all(peer.is_hung_up or peer.sent >= ENDLESS_BYTES for peer in endless)

    wait_until(are_done, "the end of endless lines", daemon.explain)
    # What is still on its way to the daemon is read before this is answered, more than once.
    for number in range(3):
        _ask_honestly(daemon, f"end-{number}-{os.urandom(4).hex()}")
    for peer in endless:
        if not peer.is_hung_up:
            _listen(peer)


def _listen(peer: Peer) -> None:
    """Has it been hung up on? The reason comes first."""
    try:
        while peer.socket.recv(1 << 16):
            pass
        peer.is_hung_up = True
    except BlockingIOError:
        pass
    except OSError:
        peer.is_hung_up = True


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


# -- strangers ---------------------------------------------------------------------------------------------------------

# It changes its uid when Python is there, which may lie where others do not come. What it hears is printed; a peer that
# is refused hears nothing.
_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
heard = b""
for request in sys.stdin.buffer.read().splitlines(True):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(sys.argv[1])
    try:
        client.sendall(request)
        heard += client.recv(1000)
    except OSError:
        pass
sys.stdout.buffer.write(heard)
"""


@contextmanager
def opened_to_all(daemon: Daemon) -> Iterator[None]:
    """The home and its socket, as if their owner had made them so after the start."""
    paths = [daemon.base, daemon.home.directory, daemon.socket_path]
    modes = [mode_of(path) for path in paths]
    for path, mode in zip(paths, (0o755, 0o755, 0o666), strict=True):
        os.chmod(path, mode)
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            # The socket is gone with its daemon.
            with suppress(FileNotFoundError):
                os.chmod(path, mode)


def no_stranger_here() -> str:
    """Why nobody can be somebody else here, or ""."""
    if os.geteuid() != 0:
        return "only root can become somebody else"
    return "" if others_may_enter(tempfile.gettempdir()) else "another uid cannot reach the directory for temporary files"


def stranger_hears(daemon: Daemon, requests: bytes) -> bytes:
    """What uid 65534 is answered, one connection a request."""
    with opened_to_all(daemon):
        done = subprocess.run(
            [sys.executable, "-ISc", _STRANGER, daemon.socket_path],
            input=requests, capture_output=True, check=False, timeout=DEADLINE_SEC,
        )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"the stranger failed: {done.stderr.decode()}")
    return done.stdout


def stranger_problems(daemon: Daemon) -> list[str]:
    """Everything that a client may ask, asked by somebody else."""
    if no_stranger_here():
        return []
    owned = daemon.submit(step("a", "true"), run_id="owned")
    daemon.wait_for(owned)
    before = daemon.events(owned), daemon.run_ids()
    requests: list[tuple[str, dict[str, object]]] = [
        ("hello", {"protocol_min": 1, "protocol_max": 1}), ("list", {}), ("status", {"run_id": owned}),
        ("submit", daemon.submission(step("a", "true"), run_id="foreign")), ("cancel", {"run_id": owned, "request": "q"}),
        ("retry", {"run_id": owned, "request": "q"}), ("watch", {"run_id": owned, "from_seq": 1}), ("shutdown", {}),
    ]  # fmt: skip
    heard = stranger_hears(daemon, b"".join(protocol.request(method, params) for method, params in requests))
    problems = [f"a stranger was answered {heard[:200]!r}"] if heard else []
    try:
        daemon.request("list")
    except (OSError, EOFError):
        return [*problems, "a stranger has ended the daemon"]
    if (daemon.events(owned), daemon.run_ids()) != before:
        problems.append("a stranger has changed something")
    return problems


# -- the whole ---------------------------------------------------------------------------------------------------------


def hold_out(count: int, seed: int, root: str | None = None) -> list[str]:
    """A fresh daemon (of the program in `root`), strangers and a siege: what goes wrong."""
    daemon = Daemon()
    daemon.root = root or daemon.root
    try:
        daemon.start()
        return stranger_problems(daemon) or siege(daemon, count, min(ENDLESS, count), seed)
    except (AssertionError, OSError, EOFError) as error:
        return [str(error).partition("\n")[0] or repr(error)]
    finally:
        daemon.clean()


def notices(name: str, count: int, seed: int) -> bool:
    """Does a daemon with this bug fail?"""
    with tempfile.TemporaryDirectory() as directory:
        mutations.write_tree(directory, mutations.named(name))
        return bool(hold_out(count, seed, directory))


def is_caught(bug: str) -> bool:
    """Is a daemon with this bug noticed?"""
    return notices(bug, _BUG_PEERS, 1)


def prove(count: int, seed: int) -> Row:
    """A siege of `count` peers; then smaller ones of daemons with a bug."""
    if not os.path.exists("/proc/self/status"):
        return Row("siege", impossible="the memory of a process is looked up in /proc")
    failures = [f"seed {seed}, {count} peers: {problem}" for problem in hold_out(count, seed)]
    bugs = [name for name in BUGS if "uid" not in name or not no_stranger_here()]
    caught = [name for name in bugs if is_caught(name)]
    failures += [f"the bug {name!r} was not noticed" for name in bugs if name not in caught]
    return Row("siege", count, count, len(bugs), len(caught), tuple(failures))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.siege", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=PEERS, metavar="N", help="peers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which kinds of them (default: %(default)s)")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    row = prove(options.count, options.seed)
    print("\n".join(row.failures) or row.impossible or "it held out")
    print(f"{row.tried} peers, {row.bugs_caught} of {row.bugs} bugs noticed, {time.monotonic() - began:.0f} s")
    return 1 if row.failures else 0


if __name__ == "__main__":
    sys.exit(main())
