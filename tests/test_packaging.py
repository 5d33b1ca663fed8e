"""What pyproject.toml promises an installer, and the program as one zip file, the daemon included."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import unittest
import zipapp
from typing import Any

import wfd
from tests.daemon import ROOT, Daemon

PACKAGES = ("wfctl", "wfd")


def project() -> dict[str, Any]:
    with open(f"{ROOT}/pyproject.toml", "rb") as file:
        return tomllib.load(file)


class Project(unittest.TestCase):
    def test_nothing_is_needed_to_run_it(self) -> None:
        self.assertEqual(project()["project"]["dependencies"], [])
        self.assertNotIn("optional-dependencies", project()["project"])

    def test_every_script_is_there(self) -> None:
        scripts = project()["project"]["scripts"]
        self.assertEqual(sorted(scripts), ["wfctl", "wfd", "workflow"])
        for name, target in scripts.items():
            module, _, function = target.partition(":")
            with self.subTest(name):
                self.assertTrue(callable(getattr(importlib.import_module(module), function)))

    def test_every_file_is_in_a_package_that_is_named(self) -> None:
        tables = project()["tool"]["setuptools"]
        self.assertEqual((sorted(tables["packages"]), tables["py-modules"]), (list(PACKAGES), ["workflow"]))
        inner = [path for name in PACKAGES for path, _, files in os.walk(f"{ROOT}/{name}") if "__init__.py" in files]
        self.assertEqual(sorted(inner), [f"{ROOT}/{name}" for name in PACKAGES])

    def test_the_version_is_the_programs_own(self) -> None:
        self.assertEqual(project()["tool"]["setuptools"]["dynamic"]["version"], {"attr": "wfd.VERSION"})
        with open(f"{ROOT}/CHANGELOG.md", encoding="utf-8") as file:
            self.assertIn(f"\n## {wfd.VERSION}, ", file.read())

    def test_tools_are_pinned(self) -> None:
        for requirement in project()["dependency-groups"]["dev"]:
            self.assertRegex(requirement, r"\A[a-z]+==[0-9.]+\Z")


class OneFile(unittest.TestCase):
    def setUp(self) -> None:
        # Only its home is wanted here, and its cleaning up: the zip file starts a daemon of its own.
        self.daemon = Daemon()
        self.addCleanup(self.daemon.clean)
        self.program = f"{self.daemon.base}/workflow.pyz"
        build(self.program, f"{self.daemon.base}/staging")

    def python(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        # -P and -S, and a directory without our packages: they can come from nowhere but the zip file.
        return subprocess.run(
            [sys.executable, "-P", "-S", *arguments],
            cwd=self.daemon.directory, env={**self.daemon.environ, **environ},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.python(self.program, *arguments)

    def test_it_runs_a_workflow_and_the_daemon(self) -> None:
        with open(f"{self.daemon.directory}/workflow.json", "w", encoding="utf-8") as file:
            json.dump({"workflow_id": "w", "steps": [{"id": "a", "command": "exit 3"}]}, file)
        begun = self.call("run", "-d", "workflow.json")
        self.assertEqual((begun.returncode, begun.stderr), (0, ""))
        run_id = begun.stdout.strip()
        self.assertEqual(self.call("wait", run_id).returncode, 1)
        status = json.loads(self.call("status", "--json", run_id).stdout)
        self.assertEqual((status["state"], status["source"]), ("FAILED", "daemon"))
        self.assertEqual(json.loads(self.call("daemon", "status", "--json").stdout)["version"], wfd.VERSION)
        self.assertEqual(self.call("daemon", "stop").returncode, 0)
        self.assertEqual(self.call("daemon", "status").returncode, 4)
        self.assertEqual(self.call("replay", run_id).returncode, 0)

    def test_it_is_a_library_too(self) -> None:
        done = self.python("-c", "import workflow; print(workflow.__file__)", PYTHONPATH=self.program)
        self.assertEqual((done.stdout, done.stderr), (f"{self.program}/workflow.py\n", ""))


def build(program: str, staging: str) -> None:
    """The recipe of README.md."""
    os.mkdir(staging)
    shutil.copy(f"{ROOT}/workflow.py", staging)
    for name in PACKAGES:
        shutil.copytree(f"{ROOT}/{name}", f"{staging}/{name}", ignore=shutil.ignore_patterns("__pycache__"))
    zipapp.create_archive(staging, program, "/usr/bin/env python3", "wfctl.__main__:main")


if __name__ == "__main__":
    unittest.main()
