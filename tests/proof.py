"""The long form of everything that tries to break a promise, as one table.

    python -m tests.proof [--only TEXT] [--share PERCENT] [--seed N]

Each means tries points: crashes, cuts, errors, inputs. How many of them were really met is part of its row, and a share
below what was recorded (LEAST) is a failure, like a broken promise: a means that no longer reaches anything would be
content with everything. Each means also puts deliberate bugs into the program and must notice them.

The seed is printed and chooses what is tried; with the same seed the same is tried.
"""

from __future__ import annotations

import argparse
import importlib
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """What one means has shown.

    tried        points (crashes, cuts, cases, inputs) that were to be met; hit: that really were
    bugs         deliberate bugs that were put in so that the means can show it would notice; bugs_caught: that it noticed
    failures     what went wrong, one sentence each: how to repeat it comes with it
    impossible   why nothing could be tried on this machine, "" where it could
    """

    means: str
    tried: int = 0
    hit: int = 0
    bugs: int = 0
    bugs_caught: int = 0
    failures: tuple[str, ...] = ()
    impossible: str = ""


@dataclass(frozen=True, slots=True)
class Means:
    """One of them.

    call   where its function is, which takes a count and a seed: module:function
    count  of the long form
    least  so many points there were when this was recorded, and so large a share of them was met, less a little for chance
    """

    name: str
    call: str
    count: int
    least: tuple[int, float]

    def prove(self, share: float, seed: int) -> Row:
        module, _, function = self.call.partition(":")
        try:
            call: Callable[[int, int], Row] = getattr(importlib.import_module(module), function)
            return call(max(1, round(self.count * share)), seed)
        except Exception as error:
            # The others are to be heard, too.
            return Row(self.name, failures=(f"it came to no end: {error!r}",))


MEANS = (
    Means("histories", "tests.simulation:prove", 200_000, (50, 0.85)),
    Means("exhaustive", "tests.simulation:prove_exhaustive", 3, (5_000, 0.85)),
    Means("bugs", "tests.mutations:prove", 4_000, (90, 1.0)),
    Means("kills", "tests.sweep:prove_kills", 300, (300, 0.9)),
    Means("errors", "tests.sweep:prove_errors", 300, (300, 0.9)),
    Means("shims", "tests.shims:prove", 150, (150, 0.9)),
    Means("torn", "tests.torn:prove", 400, (400, 1.0)),
    Means("random", "tests.kills:prove", 300, (300, 1.0)),
    Means("power", "tests.power_cuts:prove", 30, (30, 1.0)),
    Means("disk", "tests.failing_disk:prove", 12, (12, 0.5)),
    Means("resources", "tests.resource_faults:prove", 1, (1, 1.0)),
    Means("endurance", "tests.endurance:prove", 10_000, (10_000, 1.0)),
    Means("hostile", "tests.hostile:prove", 16, (1_000, 1.0)),
    Means("fuzz", "tests.fuzz:prove", 30, (1_000, 1.0)),
    Means("golden", "tests.golden:prove", 1, (20, 1.0)),
    Means("siege", "tests.siege:prove", 100, (100, 0.9)),
)
# Fewer points than recorded are a loss of coverage only when all are tried.
_WHOLE = 1.0


def shortfall(means: Means, row: Row, share: float) -> str:
    """How far a row stays behind what was recorded, "" when it does not."""
    points, met = means.least
    if not row.tried:
        return "nothing was tried"
    if share >= _WHOLE and row.tried < points:
        return f"{row.tried} points, where there were {points}"
    if row.hit < met * row.tried:
        return f"{row.hit} of {row.tried} points were met, less than {met:.0%}"
    if row.bugs_caught < row.bugs:
        return f"{row.bugs - row.bugs_caught} of {row.bugs} deliberate bugs were not noticed"
    return ""


def rows(only: str, share: float, seed: int) -> Iterator[tuple[Means, Row]]:
    for means in MEANS:
        if only in means.name:
            yield means, means.prove(share, seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description=(__doc__ or "").split("\n")[0])
    known = ", ".join(means.name for means in MEANS)
    parser.add_argument("--only", default="", metavar="TEXT", help=f"the means whose name holds this, of {known}")
    parser.add_argument("--share", type=float, default=100, metavar="PERCENT", help="of the points (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="what is tried (default: drawn, and printed)")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}\n\n{'means':12} {'tried':>9} {'met':>9} {'bugs':>9} {'failures':>9} {'seconds':>8}", flush=True)
    bad = 0
    began = time.monotonic()
    for means, row in rows(options.only, options.share / 100, seed):
        seconds, began = time.monotonic() - began, time.monotonic()
        problem = "" if row.impossible else shortfall(means, row, options.share / 100)
        found = [*row.failures, *([problem] if problem else [])]
        bad += len(found)
        caught = f"{row.bugs_caught} of {row.bugs}" if row.bugs else "-"
        figures = f"{row.tried:>9,} {row.hit:>9,} {caught:>9} {len(found):>9} {seconds:>8.0f}"
        print(f"{means.name:12} {row.impossible or f'{figures}  {row.means}'}", *found, sep="\n  ! ", flush=True)
    print(f"\n{bad} failures")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
