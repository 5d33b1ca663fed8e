"""Lives of a machine whose disk is taken away: the home of a real daemon on a real ext4, of which a power cut leaves nothing
but what was synced.

Theory
* kill -9 proves nothing about fsync, since the page cache survives it. A cut shuts the file system down without flushing
  its journal (EXT4_IOC_SHUTDOWN, NOLOGFLUSH): what was not synced is gone.
* First everybody is stopped: an fsync that is in flight during the shutdown could lie, and shall never return. The
  clients (talkers.py) are threads of ours, so that what they were told, up to the last byte that was sent, stays known.
* After a cut the disk is held against all that clients were told (told.py), before any daemon touches it. The last boot of
  a life must bring every run to its end.
* Each boot has a boot id of its own, by a bind mount over the kernel's; so what ran is `lost`, not looked for.
* Each life has namespaces of its own for mounts and processes (`unshare`), and is the first process of the latter. So
  "everybody else" is one call, and whatever ends the life, the kernel unmounts the disk and kills the rest.
* On ext4 the fsync of a file makes its name durable too, so a missing fsync of a directory cannot be seen.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from tests import told
from tests.daemon import ROOT, Daemon, Refused, wait_until
from tests.mutations import named, write_tree
from tests.proof import Row
from tests.talkers import Talker
from tests.told import Told
from wfd import protocol
from wfd.paths import Home

# Lives at a time. Each mostly waits, for the disk and for its steps.
PARALLEL = 3
# A bug that so many lives do not show is not caught.
BUG_LIVES = 60

# From Linux's uapi/linux/ext4.h: _IOR('X', 125, __u32), and EXT4_GOING_FLAGS_NOLOGFLUSH.
_EXT4_IOC_SHUTDOWN = 0x8004587D
_NOLOGFLUSH = 2
_DISK_BYTES = 64 << 20
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_CLIENTS = 3
# What the moment may follow at which something happens to the disk: an answer of this method, or any. "event" is a line that
# a watcher saw when it was new.
_MOMENTS = ("any", "event", "cancel", "retry")
# So many answers before it at most.
_ANSWERS_MAX = 60
_PAUSE_SEC = 0.01
# A client that hears an answer must not wait for the others, who would have their turn for 5 ms.
_SWITCH_SEC = 1e-5


class Broken(Exception):
    """A life could not be lived: the fault of this file, or of the machine."""


class Disk:
    """An ext4 in a file of `directory`, mounted at `path`."""

    # A rename that replaces a file flushes it, unless told not to: that is a kindness that POSIX does not promise.
    OPTIONS = "loop,noauto_da_alloc"

    def __init__(self, directory: str) -> None:
        self.image, self.path = f"{directory}/image", f"{directory}/disk"
        os.mkdir(self.path)
        with open(self.image, "wb") as file:
            file.truncate(_DISK_BYTES)
        self.make()
        self.mount()

    def make(self) -> None:
        call("mkfs.ext4", "-q", "-F", self.image)

    def mount(self) -> None:
        call("mount", "-o", self.OPTIONS, self.image, self.path)

    def unmount(self) -> None:
        call("umount", self.path)

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        self.unmount()

    def cut(self) -> None:
        """What was not synced is gone from now on."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NOLOGFLUSH))
        finally:
            os.close(fd)


def call(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


# -- everybody else: we are the first process of a namespace --------------------------------------------------------------


def stop_all() -> None:
    """From its return on nobody else runs a line of its program: who is in a system call stops on the way out of it."""
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGSTOP)


def kill_all() -> None:
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


# -- a life ------------------------------------------------------------------------------------------------------------


class Life:
    """What happens to one disk; `live` says what that is. A life that has ended well has no problem to tell."""

    # Codes of refusals that are no fault.
    refusals = frozenset({protocol.NOT_FINISHED})

    def __init__(self, directory: str, root: str, seed: int) -> None:
        """root: where the program lies."""
        self.chance = random.Random(seed)
        self.ran, self._boot_id = f"{directory}/ran", f"{directory}/boot_id"
        os.mkdir(self.ran)
        self._new_boot_id()
        call("mount", "--bind", self._boot_id, _BOOT_ID)
        self.disk = self.make_disk(directory)
        self.told = Told()
        self.cuts = 0
        self.daemon = Daemon()
        self.daemon.root = root
        self.daemon.home = Home(f"{self.disk.path}/home")
        self.daemon.environ["WFD_HOME"] = self.daemon.home.directory
        self._talkers = [
            Talker(f"c{number}", random.Random(seed * _CLIENTS + number), self.told, self.ran, self.refusals)
            for number in range(_CLIENTS)
        ]

    def _new_boot_id(self) -> None:
        with open(self._boot_id, "w", encoding="ascii") as file:
            file.write(f"{uuid.UUID(int=self.chance.getrandbits(128))}\n")

    def make_disk(self, directory: str) -> Disk:
        return Disk(directory)

    def live(self) -> list[str]:
        """All of it. Returns what was not kept."""
        raise NotImplementedError

    def end(self) -> None:
        """Whatever has happened, nothing is left."""
        kill_all()
        self.daemon.clean()
        self.disk.remove()
        call("umount", _BOOT_ID)

    def talk(self, act: Callable[[], None]) -> list[threading.Thread]:
        """Let the clients talk, and act at some moment."""
        moment, done = threading.Lock(), threading.Event()
        count = self.told.count + self.chance.randint(1, _ANSWERS_MAX)
        method = self.chance.choice(_MOMENTS)
        # At once: between an answer and an fsync that should have come before it there is less than a millisecond.
        pause_sec = self.chance.choice((0, 0, self.chance.random() * _PAUSE_SEC))

        def noted(told_by: str) -> None:
            if self.told.count >= count and method in (told_by, "any") and moment.acquire(blocking=False):
                time.sleep(pause_sec)
                act()
                done.set()

        self.told.on_note = noted
        talks = [threading.Thread(target=talker.talk, args=(self.daemon,)) for talker in self._talkers]
        for talk in talks:
            talk.start()
        wait_until(lambda: done.is_set() or not any(talk.is_alive() for talk in talks), "the moment")
        if moment.acquire(blocking=False):
            act()
            done.set()
        done.wait()
        return talks

    def hear(self, talks: list[threading.Thread]) -> None:
        """What was on its way to the clients when their daemon died."""
        for thread in (*talks, *(watch for talker in self._talkers for watch in talker.watches)):
            thread.join()

    def cut(self) -> None:
        """The power fails."""
        stop_all()
        self.disk.cut()

    def off(self) -> None:
        """After the cut nobody is alive any more, and the next boot finds what was on the disk."""
        self.cuts += 1
        if self.daemon.process is not None:
            self.daemon.kill()
        kill_all()
        self.disk.unmount()
        self.disk.mount()
        self._new_boot_id()

    def last_boot(self) -> list[str]:
        """The last boot: everything comes to its end by itself."""
        daemon, home = self.daemon, self.daemon.home
        daemon.program = Daemon.program
        daemon.start()
        wait_until(self.rests, "the end of all runs", daemon.explain)
        unfinished = [run_id for run_id in daemon.run_ids() if not daemon.fold(run_id).is_over]
        if unfinished:
            return [f"{unfinished} did not come to their end\n{daemon.explain()}"]
        daemon.check()
        return told.broken_promises(self.told, home, self.ran)

    def rests(self) -> bool:
        """Has the daemon nothing more to do, or something that it will not do?"""
        hello = self.daemon.request("hello", protocol_min=1, protocol_max=1)
        return bool(hello["quarantined"]) or not hello["active_runs"]

    def broken_promises(self) -> list[str]:
        return told.broken_promises(self.told, self.daemon.home, self.ran)


# -- many lives --------------------------------------------------------------------------------------------------------


def _inside(kind: str, root: str, *seeds: str) -> None:
    """What a process in namespaces of its own does: these lives, up to the first that has a problem; a line for each."""
    sys.setswitchinterval(_SWITCH_SEC)
    module, _, name = kind.rpartition(".")
    make = getattr(importlib.import_module(module), name)
    for seed in map(int, seeds):
        with tempfile.TemporaryDirectory(prefix="wfd-test-") as directory:
            life: Life = make(directory, root, seed)
            try:
                problems = life.live()
            except (AssertionError, Refused) as error:
                problems = [str(error)]
            finally:
                life.end()
        story = {"seed": seed, "cuts": life.cuts, "told": life.told.count, "problems": problems}
        print(json.dumps(story), flush=True)
        if problems:
            return


def lives(kind: type[Life], root: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """What came of these lives, one after another, up to the first that has a problem. Raises Broken."""
    code = "import sys; from tests import machine_lives; machine_lives._inside(*sys.argv[1:])"
    arguments = [f"{_module(kind)}.{kind.__name__}", root, *map(str, seeds)]
    # What is left behind when somebody kills a life is in this directory.
    with tempfile.TemporaryDirectory(prefix="wfd-test-") as directory:
        done = subprocess.run(
            [*_NAMESPACES, sys.executable, "-c", code, *arguments], cwd=ROOT, env={**os.environ, "TMPDIR": directory},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise Broken(f"{arguments} ended with {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _module(kind: type[Life]) -> str:
    """Where a kind of life is found, also when that was started as a program."""
    spec = sys.modules[kind.__module__].__spec__
    assert spec is not None
    return spec.name


class _Stillborn(Life):
    """Made and ended: does this machine give us all that a life needs?"""

    def live(self) -> list[str]:
        self.disk.cut()
        return []


def impossible() -> str:
    """Why there can be no such life on this machine, "" where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounts an ext4 of its own, as only root on Linux can"
    missing = [name for name in ("unshare", "mkfs.ext4", "mount", "umount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    try:
        lives(_Stillborn, ROOT, [0])
    except Broken as error:
        return f"no ext4 can be mounted here: {error}"
    return ""


def prove(means: str, kind: type[Life], seeds: range, points: int, bugs: Sequence[str]) -> Row:
    """So many lives of the engine as it is, with so many points each, and as many as it takes of one with each bug."""
    if why := impossible():
        return Row(means, impossible=why)
    try:
        stories = _in_parallel(kind, seeds)
        caught = [name for name in bugs if is_caught(kind, name, seeds[0])]
    except Broken as error:
        return Row(means, len(seeds) * points, failures=(str(error),))
    failures = [
        f"{problem}\n(python -m {_module(kind)} --count {points} --seed {story['seed']})"
        for story in stories
        for problem in story["problems"]
    ]
    cuts = sum(story["cuts"] for story in stories)
    return Row(means, len(seeds) * points, cuts, len(bugs), len(caught), tuple(failures))


def _in_parallel(kind: type[Life], seeds: range) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(PARALLEL) as threads:
        shares = [seeds[number::PARALLEL] for number in range(min(PARALLEL, len(seeds)))]
        return [story for share in threads.map(lambda share: lives(kind, ROOT, share), shares) for story in share]


def is_caught(kind: type[Life], bug: str, seed: int) -> bool:
    """Does a life with this bug have a problem? Raises Broken."""
    with tempfile.TemporaryDirectory(prefix="wfd-test-") as root, ThreadPoolExecutor(PARALLEL) as threads:
        write_tree(root, named(bug))
        for first in range(seed, seed + BUG_LIVES, PARALLEL):
            stories = threads.map(lambda one: lives(kind, root, [one]), range(first, first + PARALLEL))
            if any(story["problems"] for [story] in stories):
                return True
    return False


def report(row: Row) -> int:
    """Print a row; the exit status."""
    print("\n".join(row.failures) or row.impossible or "nothing was lost")
    print(f"{row.hit} of {row.tried} cuts, {len(row.failures)} failures, {row.bugs_caught} of {row.bugs} bugs caught")
    return 1 if row.failures or row.bugs_caught < row.bugs else 0
