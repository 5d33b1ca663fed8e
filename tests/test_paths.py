"""Where things lie: names that are safe, unique and within the kernel's limits."""

from __future__ import annotations

import unittest

from wfd.paths import (
    MAX_SLUG_CHARS,
    MAX_SOCKET_PATH_BYTES,
    Home,
    RunFiles,
    default_home,
    is_run_id,
    parse_attempt_name,
    runtime_directory,
    slug,
)


class RunIds(unittest.TestCase):
    def test_what_may_be_one(self) -> None:
        for text in ("20261123-072412-k3fq", "a", "0", "a.b_c-d", "a..b", "x" * 100):
            self.assertTrue(is_run_id(text), text)
        for text in ("", ".", "..", ".new-a", "-a", "_a", "a.", "A", "a/b", "a b", "a\n", "ä", "a\0", "x" * 101, "٣"):
            self.assertFalse(is_run_id(text), text)


class Homes(unittest.TestCase):
    def test_default_home(self) -> None:
        cases: tuple[tuple[dict[str, str], str, str], ...] = (
            ({"WFD_HOME": "/w", "XDG_STATE_HOME": "/x"}, "linux", "/w"),
            ({"XDG_STATE_HOME": "/x"}, "linux", "/x/wfd"),
            ({"XDG_STATE_HOME": "/x"}, "darwin", "/x/wfd"),
            ({}, "linux", "/u/.local/state/wfd"),
            ({}, "darwin", "/u/Library/Application Support/wfd"),
            ({"WFD_HOME": "", "XDG_STATE_HOME": ""}, "linux", "/u/.local/state/wfd"),
            ({"XDG_STATE_HOME": "relative"}, "linux", "/u/.local/state/wfd"),
        )
        for environ, platform, home in cases:
            with self.subTest(environ=environ, platform=platform):
                self.assertEqual(default_home(environ, platform, "/u"), home)

    def test_names(self) -> None:
        home = Home("/h")
        files = home.run("r1")
        attempt = files.attempt(12, "b c/d", 3)
        self.assertEqual(
            (home.lock, home.log, home.reserve, home.live, home.runs),
            ("/h/wfd.lock", "/h/wfd.log", "/h/wfd.reserve", "/h/live", "/h/runs"),
        )
        self.assertEqual(
            (files.directory, files.events, files.environment, files.attempts),
            ("/h/runs/r1", "/h/runs/r1/events.ndjson", "/h/runs/r1/environment.json", "/h/runs/r1/attempts"),
        )
        self.assertEqual(
            (attempt.out, attempt.status, attempt.script),
            tuple(f"/h/runs/r1/attempts/12-b-c-d.3.{kind}" for kind in ("out", "status", "sh")),
        )

    def test_socket(self) -> None:
        runtime = runtime_directory({}, 1_000)
        fitting = "/" + "h" * (MAX_SOCKET_PATH_BYTES - len("/") - len("/wfd.sock"))
        self.assertEqual(len(Home(fitting).socket(runtime)), MAX_SOCKET_PATH_BYTES)
        self.assertEqual(Home(fitting).socket(runtime), fitting + "/wfd.sock")
        moved = set()
        for long in (fitting + "h", fitting + "i", "/" + "h" * 200, "/" + "ä" * 60, "/" + "\udcff" * 100):
            path = Home(long).socket(runtime)
            self.assertTrue(path.startswith(runtime + "/"), path)
            self.assertEqual(path, Home(long).socket(runtime))
            moved.add(path)
        self.assertEqual(len(moved), 5, "each home has a socket of its own")

    def test_a_moved_socket_always_fits(self) -> None:
        long = Home("/" + "h" * 200)
        for environ in ({}, {"XDG_RUNTIME_DIR": "/run/user/1000"}, {"XDG_RUNTIME_DIR": "/" + "r" * 59},
                        {"XDG_RUNTIME_DIR": "/" + "r" * 60}, {"XDG_RUNTIME_DIR": "/" + "ä" * 40},
                        {"XDG_RUNTIME_DIR": "relative"}):  # fmt: skip
            path = long.socket(runtime_directory(environ, 2**32 - 2))
            self.assertTrue(path.startswith("/"), path)
            self.assertLessEqual(len(path.encode()), MAX_SOCKET_PATH_BYTES, path)

    def test_runtime_directory(self) -> None:
        self.assertEqual(runtime_directory({"XDG_RUNTIME_DIR": "/run/user/7"}, 7), "/run/user/7/wfd")
        self.assertEqual(runtime_directory({}, 7), "/tmp/wfd-7")
        longest = "/" + "r" * 59
        self.assertEqual(runtime_directory({"XDG_RUNTIME_DIR": longest}, 7), longest + "/wfd")
        self.assertEqual(runtime_directory({"XDG_RUNTIME_DIR": longest + "r"}, 7), "/tmp/wfd-7")


class AttemptNames(unittest.TestCase):
    IDS = ("a", "download", "a b", "../../etc/passwd", "-rf", "ü", "💥", ".", "", "x" * 200, "a/" * 90, "--", "_")

    def test_every_step_id_makes_a_plain_name_that_is_read_back(self) -> None:
        for step_id in self.IDS:
            with self.subTest(step_id=step_id):
                files = RunFiles("/r").attempt(200_000, step_id, 10_001)
                for path in (files.out, files.status, files.script):
                    directory, _, name = path.rpartition("/")
                    self.assertEqual(directory, "/r/attempts")
                    self.assertTrue(name.isascii() and name[0].isdigit(), name)
                    self.assertLessEqual(len(name), MAX_SLUG_CHARS + 30)
                    self.assertEqual(parse_attempt_name(name), (200_000, 10_001))

    def test_slugs_are_never_empty(self) -> None:
        for step_id in self.IDS:
            self.assertRegex(slug(step_id), r"\A[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?\Z")

    def test_other_names_are_no_attempts(self) -> None:
        for name in ("", "1-a.1", "1-a.1.txt", "0-a.1.out", "1-a.0.out", "01-a.1.out", "1-a.01.out", "1-.1.out",
                     "a.1.out", "1-a.1.out~", "1-a.1.out\n", " 1-a.1.out", "1-a b.1.out", "\u0661-a.1.out",
                     "1-a.1.out/x"):  # fmt: skip
            with self.subTest(name=name):
                self.assertIsNone(parse_attempt_name(name))


if __name__ == "__main__":
    unittest.main()
