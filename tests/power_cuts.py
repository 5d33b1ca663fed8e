"""Power cuts, with the real daemon on a real file system: what a client was told survives each of them (P1, P2).

    python -m tests.power_cuts [--count N] [--seed N]      Linux, root, e2fsprogs

How a life of such a machine goes is told in machine_lives.py. Here it is a few boots, with a cut at the end of each: after
so many answers, at once or a moment later; or in the middle of the recovery from the cut before.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress

from tests import machine_lives
from tests.daemon import Daemon, wait_until
from tests.machine_lives import Life
from tests.proof import Row

# Cuts in one life: the first meets a young home, the others a recovered one.
CUTS_A_LIFE = 3
# Deliberate bugs that a cut can show, each within about ten lives.
BUGS = (
    "no fsync at all", "the environment is not synced", "reply before commit", "show before commit",
    "the new inode is not synced",
)  # fmt: skip

# A recovery takes about so long.
_RECOVERY_SEC = 0.05
# A daemon whose disk is slow: between what it does and a sync that should have come before, there is time for a cut.
_SLOW_DISK = (
    "import os, sys, time; fsync = os.fsync; os.fsync = lambda fd: (time.sleep(0.003), fsync(fd))[1]; "
    "from wfd.__main__ import main; sys.exit(main())"
)


class CutLife(Life):
    def live(self) -> list[str]:
        for _ in range(CUTS_A_LIFE):
            self.daemon.program = self.chance.choice((Daemon.program, ("-c", _SLOW_DISK)))
            if self.cuts and self.chance.random() < 0.4:
                self._boot_and_recover()
            else:
                self._boot_and_talk()
            if problems := self.broken_promises():
                return problems
        return self.last_boot()

    def _boot_and_talk(self) -> None:
        self.daemon.start()
        talks = self.talk(self.cut)
        self.off()
        self.hear(talks)

    def _boot_and_recover(self) -> None:
        self.daemon.process = self.daemon.spawn()
        wait_until(self._listens, "the socket of a daemon that recovers", self.daemon.explain)
        time.sleep(self.chance.random() * _RECOVERY_SEC)
        self.cut()
        self.off()

    def _listens(self) -> bool:
        with suppress(OSError):
            self.daemon.connect().close()
            return True
        return False


def prove(count: int, seed: int) -> Row:
    """So many cuts, or a few more."""
    lives = range(seed, seed + -(-count // CUTS_A_LIFE))
    return machine_lives.prove("power cuts", CutLife, lives, CUTS_A_LIFE, BUGS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.power_cuts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=30, metavar="N", help="cuts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the first life (default: %(default)s)")
    options = parser.parse_args(arguments)
    return machine_lives.report(prove(options.count, options.seed))


if __name__ == "__main__":
    sys.exit(main())
