"""Simulated histories, many of them: by their seeds, and every crash of every small workflow.

    python -m tests.simulation --seed N [--count M] [--jobs N] [--verbose]      histories N … N + M - 1
    python -m tests.simulation --exhaustive                                      every small DAG, a crash at every call

What one is: simulated_history.py. How much of the engine they reach is counted in places of its source that call the
system: an ordinary history shows where there are such places, and each of them is a place to be killed at.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, product
from multiprocessing import get_context

from tests.proof import Row
from tests.simulated_history import History, Report, Script, simulate

# So many histories are one piece of work: a second or two.
_CHUNK = 500
# After so many histories hardly a new place comes to light.
_SITES_FROM = 400
# The places for a second crash are taken in so many parts: all at once take four minutes.
_PARTS = 6


@dataclass(slots=True)
class Tally:
    """What came of many histories."""

    count: int = 0
    crashes: int = 0
    power_cuts: int = 0
    broken: list[str] = field(default_factory=list)
    sites: Counter[str] = field(default_factory=Counter)

    def add(self, report: Report) -> None:
        self.count += 1
        self.crashes += report.crashes
        self.power_cuts += report.power_cuts
        self.sites.update(report.crash_sites)
        if report.problem:
            self.broken.append(f"seed {report.seed}: {report.problem}")

    def merge(self, other: Tally) -> None:
        self.count += other.count
        self.crashes += other.crashes
        self.power_cuts += other.power_cuts
        self.broken += other.broken
        self.sites += other.sites


def _tally(seeds: Sequence[int]) -> Tally:
    # Histories leave few cycles behind; looking for them costs a tenth of the time.
    gc.set_threshold(50_000)
    tally = Tally()
    for seed in seeds:
        tally.add(simulate(seed))
    return tally


def many(seeds: range, jobs: int) -> Iterator[Tally]:
    """The histories of these seeds, in pieces as they are done, on so many processors."""
    chunks = [seeds[start : start + _CHUNK] for start in range(0, len(seeds), _CHUNK)]
    if jobs == 1:
        yield from map(_tally, chunks)
        return
    # Not by fork, which is unsafe on macOS.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_tally, chunks)


def called_sites(seeds: range) -> set[str]:
    """The places in the engine's source at which these histories call the system."""
    sites: set[str] = set()
    for seed in seeds:
        history = History(seed)
        history.kernel.called_sites = sites
        history.run()
    return sites


def prove(count: int, seed: int) -> Row:
    """So many histories from this seed on."""
    total = Tally()
    for tally in many(range(seed, seed + count), os.cpu_count() or 1):
        total.merge(tally)
    sites = called_sites(range(seed, seed + _SITES_FROM))
    what = f"{total.count:,}, {total.crashes:,} crashes, {total.power_cuts:,} of them power cuts"
    return Row(
        f"simulated histories ({what}): places in the source to be killed at",
        tried=len(sites), hit=len(sites & total.sites.keys()), failures=tuple(total.broken),
    )  # fmt: skip


# -- every crash of every small workflow -------------------------------------------------------------------------------


def small_scripts(max_steps: int) -> Iterator[Script]:
    """Every DAG of so many steps, with no retry or one, and with every choice of steps that fail at first."""
    for size in range(1, max_steps + 1):
        ids = "abc"[:size]
        pairs = list(combinations(ids, 2))
        for edges in product((False, True), repeat=len(pairs)):
            chosen = [pair for pair, is_there in zip(pairs, edges, strict=True) if is_there]
            for retries, failing in product((0, 1), product((False, True), repeat=size)):
                steps = [_small_step(id, [a for a, b in chosen if b == id], retries) for id in ids]
                codes = {id: (1,) for id, fails in zip(ids, failing, strict=True) if fails}
                yield Script({"workflow_id": "w", "steps": steps}, codes)


def _small_step(id: str, depends_on: list[str], retries: int) -> dict[str, object]:
    return {"id": id, "command": "true", "depends_on": depends_on, "retries": retries, "backoff": {"initial_sec": 0.02}}


def crashed(script: Script, is_twice: bool, part: int | None = None) -> Iterator[tuple[Script, Report]]:
    """A script with a crash, and a power cut, at each of its calls; is_twice: and again at each call of the recovery, or at
    one part of them."""
    calls = simulate(0, script).calls
    for call, kind in product(range(1, calls + 1), ("kill", "power cut")):
        once = replace(script, crashes=((call, kind),))
        report = simulate(call, once)
        yield once, report
        if is_twice and len(report.recovery_calls) > 1:
            # As many calls again for the turn that follows: it writes and acts on what the recovery has found.
            for second in range(1, 2 * report.recovery_calls[1] + 1):
                if part is not None and (call + second) % _PARTS != part:
                    continue
                twice = replace(script, crashes=((call, kind), (second, "kill" if second % 2 else "power cut")))
                yield twice, simulate(call, twice)


def _exhaust(script: Script, is_twice: bool, part: int | None) -> Row:
    tried, hit, failures = 0, 0, []
    for crashing, report in crashed(script, is_twice, part):
        tried += 1
        # A second crash may have been asked for that comes too late: the history was over before it.
        hit += report.crashes == len(crashing.crashes)
        if report.problem:
            failures.append(f"{crashing}: {report.problem}")
    return Row("", tried, hit, failures=tuple(failures))


def exhaust(max_steps: int, max_steps_twice: int, part: int | None = None) -> Row:
    """Every workflow of so many steps, killed at each call; up to the second number of steps, killed again at each call of
    the recovery, or at one part of them."""
    scripts = list(small_scripts(max_steps))
    is_twice = [script.size <= max_steps_twice for script in scripts]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_exhaust, scripts, is_twice, [part] * len(scripts), chunksize=4))
    return Row(
        f"simulated crashes at every call of every workflow of up to {max_steps} steps ({len(scripts):,})",
        tried=sum(row.tried for row in rows), hit=sum(row.hit for row in rows),
        failures=tuple(chain.from_iterable(row.failures for row in rows)),
    )  # fmt: skip


def prove_exhaustive(count: int, seed: int) -> Row:
    """All workflows of up to so many steps, those of up to two with a second crash, at one part of its places that the seed
    chooses: `--exhaustive` takes all."""
    return exhaust(count, 2, seed % _PARTS)


# -- the command -------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the first history (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1, help="how many (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="tell the first history, call by call")
    parser.add_argument("--exhaustive", action="store_true", help="instead: crash small workflows at every call")
    options = parser.parse_args(arguments)
    if options.exhaustive:
        row = exhaust(3, 2)
        print("\n".join((*row.failures, f"{row.means}: {row.hit:,} of {row.tried:,}, {len(row.failures)} broken promises")))
        return 1 if row.failures else 0
    if options.verbose:
        print("\n".join(simulate(options.seed, is_traced=True).trace))
    began, total = time.perf_counter(), Tally()
    for tally in many(range(options.seed, options.seed + options.count), options.jobs):
        print("".join(f"{problem}\n" for problem in tally.broken), end="", flush=True)
        total.merge(tally)
    rate = total.count * 60 / (time.perf_counter() - began) / options.jobs
    print(f"{total.count} histories, {total.crashes} crashes ({total.power_cuts} power cuts)", end=", ")
    print(f"{len(total.broken)} broken promises; {rate:,.0f} a minute of one core")
    return 1 if total.broken else 0


if __name__ == "__main__":
    sys.exit(main())
