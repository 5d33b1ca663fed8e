"""The fuzzer in short form: fixed seeds, so many inputs of each kind. The long form: `python -m tests.fuzz`."""

from __future__ import annotations

import random
import unittest

from tests import fuzz, fuzz_inputs

_SEED = 1
_COUNTS = {"definitions": 300, "frames": 12, "logs": 120}
# Those that few inputs show.
_QUICK = ("one retry too many", "one dependency is enough", "checksums are not compared")


class Fuzzing(unittest.TestCase):
    def test_each_kind(self) -> None:
        for kind, count in _COUNTS.items():
            with self.subTest(kind):
                self.assertEqual(fuzz.fuzz(kind, _SEED, count), (count, []))

    def test_it_notices(self) -> None:
        for bug in _QUICK:
            with self.subTest(bug):
                self.assertTrue(fuzz.is_noticed(bug, _SEED))

    def test_an_input_is_its_numbers_alone(self) -> None:
        """Whatever was tried before it: a failure can be repeated."""
        for index in range(20):
            made = [fuzz_inputs.log(random.Random(f"logs 1 {index}")).data for _ in range(2)]
            self.assertEqual(made[0], made[1])
            frames = [fuzz_inputs.frame(random.Random(f"frames 1 {index}"), "r", {}) for _ in range(2)]
            self.assertEqual(frames[0], frames[1])


if __name__ == "__main__":
    unittest.main()
