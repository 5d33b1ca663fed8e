"""Deliberate bugs: each a small patch of the engine, and each must be caught. What catches them is what is tested here.

    python -m tests.mutations [--only TEXT] [--seeds N]      the table: bug, caught by, after how many histories

The bugs are in mutations.txt. A changed source is compiled, and the code of its functions is put into the real ones, so
that whoever holds one of them (a class, a table, another module) has the bug too; module constants are exchanged likewise.
Afterwards all is as it was. A bug whose lines are not found, or not found once, is an error: whoever changes such a line
says there what would be wrong with the new one.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import os
import shutil
import subprocess
import sys
import types
import unittest
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

from tests.proof import Row
from tests.simulated_history import simulate

# A bug that so many histories do not show is not caught.
MAX_SEEDS = 4_000
_ROOT = Path(__file__).parent.parent
_TABLE = Path(__file__).with_name("mutations.txt")


@dataclass(frozen=True, slots=True)
class Mutation:
    """A bug. test: the name of what catches it, "" for the simulator. seed: one that is known to show it, or None."""

    name: str
    module: str
    old: str
    new: str
    test: str
    seed: int | None


def mutations() -> list[Mutation]:
    """All that are in the table."""
    blocks = ("\n" + _TABLE.read_text(encoding="utf-8").partition("\n\n* name of")[2]).split("\n\n* ")[1:]
    return [_parse(block.splitlines()) for block in blocks]


def _parse(lines: list[str]) -> Mutation:
    module, test, seed = "", "", None
    name, *rest = lines
    patch: list[str] = []
    for line in rest:
        word, _, value = line.strip().rpartition(" ")
        if not patch and word == "in":
            module = value.removesuffix(".py").replace("/", ".")
        elif not patch and word == "caught by":
            test = value
        elif not patch and word == "seed":
            seed = int(value)
        else:
            patch.append(line or " ")
    old = "".join(f"{line[1:]}\n" for line in patch if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in patch if line[0] in " +")
    return Mutation(name, module, old, new, test, seed)


def named(name: str) -> Mutation:
    """The one of this name. Raises KeyError."""
    return {mutation.name: mutation for mutation in mutations()}[name]


def write_tree(directory: str, mutation: Mutation | None = None) -> None:
    """Put the whole program into an empty directory, with this bug: for means that start real daemons."""
    for name in ("wfd", "wfctl"):
        shutil.copytree(_ROOT / name, Path(directory, name), ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_ROOT / "workflow.py", directory)
    if mutation is not None:
        break_tree(directory, mutation)
    # Else each of the first daemons would do it, and its system calls would have other numbers than those of the others.
    subprocess.run([sys.executable, "-m", "compileall", "-q", directory], check=True)


def break_tree(directory: str, mutation: Mutation) -> None:
    """Put this bug into a program that lies in a directory."""
    path = Path(directory, mutation.module.replace(".", "/") + ".py")
    path.write_text(_broken(mutation, path.read_text(encoding="utf-8")), encoding="utf-8")


def _broken(mutation: Mutation, source: str) -> str:
    count = source.count(f"\n{mutation.old}")
    if count != 1:
        raise ValueError(f"mutations.txt, {mutation.name!r}: its lines are {count} times in {mutation.module}, not once")
    return source.replace(mutation.old, mutation.new)


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The engine with this bug."""
    module = importlib.import_module(mutation.module)
    source = _broken(mutation, inspect.getsource(module))
    broken = types.ModuleType(module.__name__)
    broken.__file__ = module.__file__
    exec(compile(source, module.__file__ or "", "exec"), broken.__dict__)
    codes = {name: function.__code__ for name, function in _functions(broken)}
    functions = [(name, function, function.__code__) for name, function in _functions(module) if name in codes]
    constants = {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}
    try:
        for name, function, _ in functions:
            function.__code__ = codes[name]
        for name in constants:
            setattr(module, name, getattr(broken, name))
        yield
    finally:
        for _, function, code in functions:
            function.__code__ = code
        for name, value in constants.items():
            setattr(module, name, value)


def _functions(module: types.ModuleType) -> Iterator[tuple[str, types.FunctionType]]:
    """The functions and methods that are written in this module, by their names in it."""
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
            yield name, value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for inner, member in list(vars(value).items()):
                function = member.fget if isinstance(member, property) else member
                # What dataclass writes is in no file.
                if isinstance(function, types.FunctionType) and function.__code__.co_filename == module.__file__:
                    yield f"{name}.{inner}", function


def catch(mutation: Mutation, seeds: Iterable[int]) -> tuple[int, str] | None:
    """How many histories (0: a named test or means) it took to catch the bug, and what was seen; None when it was not caught."""
    if mutation.test and ".test_" not in mutation.test:
        means = importlib.import_module(mutation.test)
        return (0, mutation.test) if means.is_caught(mutation.name) else None
    with applied(mutation):
        if mutation.test:
            suite = unittest.defaultTestLoader.loadTestsFromName(mutation.test)
            result = unittest.TextTestRunner(io.StringIO(), failfast=True).run(suite)
            bad = [*result.failures, *result.errors]
            return (0, bad[0][0].id()) if bad else None
        for count, seed in enumerate(seeds, 1):
            problem = simulate(seed).problem
            if problem:
                return count, f"seed {seed}: {problem}"
    return None


def with_known_first(mutation: Mutation, seeds: Iterable[int]) -> Iterable[int]:
    return seeds if mutation.seed is None else chain([mutation.seed], seeds)


def _catch_named(name: str, seeds: int) -> tuple[int, str] | None:
    mutation = named(name)
    with redirect_stderr(io.StringIO()):
        return catch(mutation, range(seeds))


def catch_all(chosen: Iterable[Mutation], seeds: int, jobs: int) -> Iterator[tuple[Mutation, tuple[int, str] | None]]:
    """Each bug with what `catch` says of it, in their order."""
    bugs = list(chosen)
    # A process each, since a bug is put into the modules of its process. Not by fork, which is unsafe on macOS.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from zip(bugs, pool.map(_catch_named, [bug.name for bug in bugs], [seeds] * len(bugs)), strict=True)


def prove(count: int, seed: int) -> Row:
    """All of them, each within so many histories; the seeds are always the first ones, so that the number means something."""
    rows = list(catch_all(mutations(), count, os.cpu_count() or 1))
    missed = tuple(f"nothing catches the bug: {mutation.name}" for mutation, caught in rows if caught is None)
    return Row(
        "deliberate bugs, against the simulator and named tests", len(rows), len(rows), len(rows), len(rows) - len(missed),
        missed,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="bugs whose name holds this")
    parser.add_argument("--seeds", type=int, default=MAX_SEEDS, metavar="N", help="histories each (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = [mutation for mutation in mutations() if options.only in mutation.name]
    missed = 0
    print("| bug | caught by | after histories |\n|---|---|---|")
    for mutation, caught in catch_all(chosen, options.seeds, options.jobs):
        missed += caught is None
        by = mutation.test or "the simulator"
        print(f"| {mutation.name} | {by if caught else 'NOTHING'} | {caught[0] or '' if caught else ''} |", flush=True)
        if options.only and caught:
            print(caught[1])
    print(f"\n{len(chosen)} bugs, {missed} not caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
