"""The README is run: its files are written, its commands run in order, in a copy of the project with a home of its own.

Fenced blocks say what they are in their first line: `sh` is run; `sh test` is the tests themselves (checked to be the
command that CI runs); `sh install` is run by CI, which may install things; `sh service` needs a service
manager and is tried by test_services.py where there is one; `json file=NAME` and `python file=NAME` are
files that the commands use. Any other fenced block is a mistake.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest

from tests import proof

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What a reader has who follows the README from a clone.
SHIPPED = (
    "README.md", "ARCHITECTURE.md", "LICENSE", "pyproject.toml", "workflow.py", "wfd", "wfctl", "examples", "systemd",
    "launchd",
)  # fmt: skip
KINDS = {"sh", "sh test", "sh install", "sh service"}
# One block holds at most a few short runs and the start of a daemon.
BLOCK_DEADLINE_SEC = 120


def blocks(path: str) -> list[tuple[str, str]]:
    """(first line without the fence, text) of each fenced block."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return re.findall(r"^```([^\n]+)\n(.*?)^```$", file.read(), re.MULTILINE | re.DOTALL)


class ReadmeTest(unittest.TestCase):
    maxDiff = None

    def test_each_block_says_what_it_is(self) -> None:
        for kind, _ in blocks("README.md"):
            with self.subTest(kind=kind):
                self.assertTrue(kind in KINDS or re.fullmatch(r"(json|python) file=[a-z.]+", kind), kind)

    def test_ci_runs_the_test_command(self) -> None:
        commands = [text.strip() for kind, text in blocks("README.md") if kind == "sh test"]
        self.assertEqual(commands, ["python3 -m unittest"])
        with open(os.path.join(ROOT, ".ci", "run"), encoding="utf-8") as file:
            self.assertIn("-m unittest", file.read())

    def test_each_means_is_there_and_has_a_row_of_the_proof(self) -> None:
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            readme = file.read()
        modules = set(re.findall(r"python3 -m (tests\.\w+)", readme))
        self.assertGreaterEqual(len(modules), 10)
        for name in modules:
            with self.subTest(name):
                self.assertTrue(callable(importlib.import_module(name).main))
        rows = {name for row in re.findall(r"^\| ([a-z, ]+) \|.*\|.*\|$", readme, re.MULTILINE) for name in row.split(", ")}
        self.assertLessEqual({means.name for means in proof.MEANS}, rows)

    def test_each_promise_names_tests_that_are_there(self) -> None:
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            rows = re.findall(r"^\| (P\d+) \|.*\| (.*) \|$", file.read(), re.MULTILINE)
        self.assertEqual([number for number, _ in rows], [f"P{n}" for n in range(1, 13)])
        for number, tests in rows:
            for name in re.findall(r"`(.*?)`", tests):
                with self.subTest(promise=number, test=name):
                    module, _, case = name.partition(".")
                    found = getattr(importlib.import_module(f"tests.{module}"), case)
                    self.assertGreater(unittest.defaultTestLoader.loadTestsFromTestCase(found).countTestCases(), 0)

    def test_commands(self) -> None:
        with tempfile.TemporaryDirectory(prefix="wfd readme ") as directory:
            self._copy(directory)
            environ = self._environ(directory)
            try:
                for kind, text in blocks("README.md"):
                    if kind == "sh":
                        self._run(text, directory, environ)
                    elif " file=" in kind:
                        name = kind.partition(" file=")[2]
                        with open(os.path.join(directory, "project", name), "w", encoding="utf-8") as file:
                            file.write(text)
            finally:
                subprocess.run(
                    [sys.executable, "workflow.py", "daemon", "stop", "--cancel-runs"],
                    cwd=os.path.join(directory, "project"), env=environ, capture_output=True, check=False,
                )  # fmt: skip

    def _copy(self, directory: str) -> None:
        project = os.path.join(directory, "project")
        os.mkdir(project)
        for name in SHIPPED:
            source, target = os.path.join(ROOT, name), os.path.join(project, name)
            if os.path.isdir(source):
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "work"))
            else:
                shutil.copy(source, target)

    def _environ(self, directory: str) -> dict[str, str]:
        """A reader's environment, in which python3 is the interpreter that runs this test."""
        programs = os.path.join(directory, "programs")
        os.mkdir(programs)
        path = os.path.join(programs, "python3")
        with open(path, "w", encoding="utf-8") as file:
            # -S: a reader needs nothing but Python itself.
            file.write(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
        os.chmod(path, 0o755)
        home = os.path.join(directory, "home")
        return {
            **os.environ,
            "PATH": programs + os.pathsep + os.environ.get("PATH", os.defpath),
            "HOME": directory,
            "WFD_HOME": home,
        }

    def _run(self, text: str, directory: str, environ: dict[str, str]) -> None:
        done = subprocess.run(
            ["sh", "-eu", "-c", text],
            cwd=os.path.join(directory, "project"),
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BLOCK_DEADLINE_SEC,
            check=False,
        )
        self.assertEqual(done.returncode, 0, f"{text}\n{done.stdout}\n{done.stderr}")
        self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
    unittest.main()
