"""The house, held to its plan: who imports whom, which rooms are pure, and the style that a machine can check.

The arrows are those of ARCHITECTURE.md. Whoever needs another changes the table here and the text there, and says why.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import unittest
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Each room of wfd, and the rooms that it may import.
ARROWS: dict[str, frozenset[str]] = {
    "values": frozenset(),
    "definition": frozenset({"values"}),
    "protocol": frozenset({"values"}),
    "paths": frozenset({"values"}),
    "machine": frozenset(),
    "events": frozenset({"definition", "values"}),
    "state": frozenset({"definition", "events"}),
    "decide": frozenset({"definition", "events", "state", "values"}),
    "journal": frozenset({"events", "state", "paths"}),
    "orphans": frozenset({"machine"}),
    "process": frozenset({"paths", "machine", "orphans"}),
    "server": frozenset({"protocol"}),
    "watchers": frozenset({"journal", "paths", "protocol", "server"}),
    "requests": frozenset({"definition", "events", "journal", "paths", "protocol", "server", "state"}),
}
# The two that may import all of wfd, and what the client may import of it: nothing that owns runs.
ALL_KNOWING = frozenset({"supervisor", "__main__"})
FOR_CLIENTS = frozenset({"values", "definition", "events", "state", "decide", "protocol", "paths", "journal"})

PURE = ("values", "definition", "events", "state", "decide", "protocol", "paths")
# Whoever imports one of these looks at the world, or changes it.
WORLDLY = frozenset({
    "asyncio", "concurrent", "ctypes", "datetime", "fcntl", "glob", "importlib", "io", "logging", "mmap",
    "multiprocessing", "os", "pathlib", "platform", "pwd", "random", "resource", "secrets", "select", "selectors",
    "shutil", "signal", "socket", "ssl", "stat", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
})  # fmt: skip
WORLDLY_CALLS = frozenset({"open", "print", "input", "exec", "eval", "__import__"})

MAX_FUNCTION_LINES = 70
# Names that say nothing about what is in a room.
EMPTY_WORDS = frozenset({
    "base", "common", "handler", "handlers", "helper", "helpers", "manager", "misc", "util", "utils",
})  # fmt: skip
# Put together, so that this file does not find itself.
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b")


@cache
def sources() -> list[tuple[Path, ast.Module]]:
    """Every Python file of the project, read. What else lies beside them is its owner's."""
    below = (path for folder in ("wfd", "wfctl", "tests", "examples") for path in (ROOT / folder).rglob("*.py"))
    return [(path, ast.parse(path.read_bytes(), path)) for path in sorted([ROOT / "workflow.py", *below])]


def rooms(package: str) -> dict[str, ast.Module]:
    """The files of a package by their names."""
    here = ROOT / package
    return {path.stem: module for path, module in sources() if path.parent == here and path.stem != "__init__"}


@cache
def imports(module: ast.Module) -> set[str]:
    """The dotted names of all that a file imports at run time, inside functions too. Of `from a import b` both a and
    a.b: b may be a room."""
    found: set[str] = set()
    for node in walk(module):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(f"{'.' * node.level}{node.module or ''}")
            found.update(f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
    return found


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield from walk(child)


def imported_rooms(module: ast.Module, package: str) -> set[str]:
    """The rooms of a package that a file imports at run time."""
    there = rooms(package)
    heads = {name.split(".")[1] for name in imports(module) if name.startswith(f"{package}.")}
    return heads & there.keys()


class Arrows(unittest.TestCase):
    def test_every_room_is_on_the_plan(self) -> None:
        self.assertEqual(rooms("wfd").keys(), ARROWS.keys() | ALL_KNOWING)

    def test_the_daemons_rooms(self) -> None:
        for room, module in rooms("wfd").items():
            with self.subTest(room=room):
                may = ARROWS.get(room, ARROWS.keys() | ({"supervisor"} if room == "__main__" else set()))
                self.assertEqual(imported_rooms(module, "wfd") - may, set())
                heads = {name.split(".")[0] for name in imports(module)}
                self.assertEqual(heads & {"wfctl", "workflow"}, set())

    def test_the_clients_rooms(self) -> None:
        for room, module in rooms("wfctl").items():
            with self.subTest(room=room):
                self.assertEqual(imported_rooms(module, "wfd") - FOR_CLIENTS, set())
                self.assertNotIn("workflow", {name.split(".")[0] for name in imports(module)})

    def test_the_face(self) -> None:
        module = ast.parse((ROOT / "workflow.py").read_bytes())
        self.assertEqual(imported_rooms(module, "wfd") - {"definition"}, set())
        functions = [node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
        self.assertEqual(functions, [], "the face has no logic of its own")

    def test_no_circles(self) -> None:
        for package in ("wfd", "wfctl"):
            graph = {room: imported_rooms(module, package) for room, module in rooms(package).items()}
            graphlib.TopologicalSorter(graph).prepare()

    def test_no_relative_imports(self) -> None:
        for path, module in sources():
            with self.subTest(path=str(path.relative_to(ROOT))):
                self.assertEqual({name for name in imports(module) if name.startswith(".")}, set())

    def test_the_standard_library_alone(self) -> None:
        ours = {"wfd", "wfctl", "workflow", "tests"}
        for path, module in sources():
            with self.subTest(path=str(path.relative_to(ROOT))):
                beside = {other.stem for other in path.parent.glob("*.py")} if path.parent != ROOT / "tests" else set()
                heads = {name.split(".")[0] for name in imports(module)}
                self.assertEqual(heads - sys.stdlib_module_names - ours - beside, set())


class Purity(unittest.TestCase):
    def test_pure_rooms_import_nothing_that_looks_at_the_world(self) -> None:
        for room in PURE:
            with self.subTest(room=room):
                heads = {name.split(".")[0] for name in imports(rooms("wfd")[room])}
                self.assertEqual(heads & WORLDLY, set())

    def test_pure_rooms_call_nothing_that_does(self) -> None:
        for room in PURE:
            calls = [node.func for node in ast.walk(rooms("wfd")[room]) if isinstance(node, ast.Call)]
            with self.subTest(room=room):
                self.assertEqual({call.id for call in calls if isinstance(call, ast.Name)} & WORLDLY_CALLS, set())

    def test_pure_rooms_import_only_pure_rooms(self) -> None:
        for room in PURE:
            with self.subTest(room=room):
                self.assertEqual(imported_rooms(rooms("wfd")[room], "wfd") - set(PURE), set())


class Style(unittest.TestCase):
    def test_every_file_says_what_it_is(self) -> None:
        for path, module in sources():
            with self.subTest(path=str(path.relative_to(ROOT))):
                self.assertTrue(ast.get_docstring(module) or not module.body)

    def test_what_is_public_says_what_it_means(self) -> None:
        for package in ("wfd", "wfctl"):
            for room, module in rooms(package).items():
                for node in module.body:
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                        with self.subTest(room=f"{package}.{room}", name=node.name):
                            self.assertTrue(ast.get_docstring(node))

    def test_functions_fit_a_screen(self) -> None:
        for path, module in sources():
            for node in ast.walk(module):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    with self.subTest(path=str(path.relative_to(ROOT)), function=node.name):
                        assert node.end_lineno is not None
                        self.assertLessEqual(node.end_lineno - node.lineno + 1, MAX_FUNCTION_LINES)

    def test_names_say_something(self) -> None:
        for path, module in sources():
            classes = [node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef)]
            for name in (path.stem, *classes):
                words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
                with self.subTest(path=str(path.relative_to(ROOT)), name=name):
                    self.assertEqual(words & EMPTY_WORDS, set())

    def test_nothing_is_left_for_later(self) -> None:
        for path, _ in sources():
            with self.subTest(path=str(path.relative_to(ROOT))):
                self.assertIsNone(UNFINISHED.search(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    unittest.main()
