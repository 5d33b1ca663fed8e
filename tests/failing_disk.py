"""A disk whose fsync fails, and succeeds a moment later with the data gone: what a client was told survives it (P2, P8).

    python -m tests.failing_disk [--count N] [--seed N]      Linux, root, e2fsprogs

Theory
* The home's ext4 lies in a sparse file on a tmpfs. When the tmpfs is full, a block that the file does not have yet cannot be
  written, though ext4 has given it out: fsync fails, the pages count as clean from then on, and the next fsync succeeds.
  What was in them is in the page cache alone, until a power cut takes that too.
* Where the blocks of ext4's journal are among those that the file does not have, ext4 gives up altogether: it is read-only
  until the next mount, and its fsyncs succeed. Where they were written before, only data is lost. A life has either.
* Linux' loop device takes a write that tmpfs has cut short for a whole one (6.18), and then the first fsync would lie,
  too. So no request may touch two pages of the tmpfs: blocks of its page size, and requests of one block.
* A life goes like this: clients talk, and at some moment the tmpfs is full. When a run has stalled, the daemon is killed, or
  is not. There is room again; if ext4 has not given up, everything goes on, and clients are told of it. Then the power is
  cut, which shows what was on the disk (machine_lives.py).
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from contextlib import suppress

from tests import machine_lives
from tests.daemon import wait_until
from tests.machine_lives import Disk, Life, call
from tests.proof import Row
from wfd import protocol

# What this cannot see is "a file is synced again after a failure": the engine writes its batch again before it syncs again,
# and on ext4 that makes the lost pages dirty once more. The simulator's disk is less kind.
BUGS = ("no fsync at all", "a failed fsync is tried again", "the state is kept after a failed commit")

# Enough for the image's own structures, the daemon's reserve and what the clients make.
_BACKING_BYTES = 12 << 20
# So many small syncs go once round the journal that mkfs.ext4 gives to a disk of this size.
_JOURNAL_ROUND = 500


class FailingDisk(Disk):
    """A disk that can be made to fail. writes_journal: also then, the blocks of its journal can be written."""

    def __init__(self, directory: str, writes_journal: bool) -> None:
        self._backing = f"{directory}/backing"
        os.mkdir(self._backing)
        call("mount", "-t", "tmpfs", "-o", f"size={_BACKING_BYTES},mode=0711", "tmpfs", self._backing)
        super().__init__(self._backing)
        if writes_journal:
            self._go_round_the_journal()

    def make(self) -> None:
        call("mkfs.ext4", "-q", "-F", "-b", str(resource.getpagesize()), self.image)

    def mount(self) -> None:
        super().mount()
        device = os.stat(self.path).st_dev
        queue = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/max_sectors_kb"
        with open(queue, "w", encoding="ascii") as file:
            file.write(str(resource.getpagesize() >> 10))

    def remove(self) -> None:
        super().remove()
        # Lazily: the loop device lets go of its file a moment after the ext4 is gone.
        call("umount", "-l", self._backing)

    def fail(self) -> None:
        """From now on."""
        with open(f"{self._backing}/filler", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0" * resource.getpagesize())

    def mend(self) -> None:
        os.truncate(f"{self._backing}/filler", 0)

    def has_given_up(self) -> bool:
        """Does ext4 write nothing any more?"""
        try:
            os.mkdir(f"{self.path}/probe")
            os.rmdir(f"{self.path}/probe")
        except OSError:
            return True
        return False

    def _go_round_the_journal(self) -> None:
        with open(f"{self.path}/round", "wb", buffering=0) as file:
            for _ in range(_JOURNAL_ROUND):
                file.write(b"x")
                os.fsync(file.fileno())
        os.unlink(f"{self.path}/round")


class FailingLife(Life):
    refusals = Life.refusals | {protocol.STALLED}
    disk: FailingDisk

    def make_disk(self, directory: str) -> Disk:
        return FailingDisk(directory, writes_journal=self.chance.random() < 0.6)

    def live(self) -> list[str]:
        self.daemon.start()
        talks = self.talk(self.disk.fail)
        wait_until(lambda: self._stalls() or self.rests(), "a stall", self.daemon.explain)
        if is_killed := self.chance.random() < 0.5:
            self.daemon.kill()
        self.disk.mend()
        if not self.disk.has_given_up():
            if is_killed:
                self.daemon.start()
            wait_until(self.rests, "the end of all runs", self.daemon.explain)
            for run_id in list(self.told.runs):
                self.told.status(self.daemon.request("status", run_id=run_id))
        self.cut()
        self.off()
        self.hear(talks)
        return self.broken_promises() or self.last_boot()

    def _stalls(self) -> bool:
        return any(run["stalled"] for run in self.daemon.request("list")["runs"])


def prove(count: int, seed: int) -> Row:
    """So many lives."""
    return machine_lives.prove("fsync that fails", FailingLife, range(seed, seed + count), 1, BUGS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.failing_disk", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=12, metavar="N", help="lives (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the first life (default: %(default)s)")
    options = parser.parse_args(arguments)
    return machine_lives.report(prove(options.count, options.seed))


if __name__ == "__main__":
    sys.exit(main())
