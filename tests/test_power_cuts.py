"""Power cuts in short form: `python -m tests.power_cuts` is the long one."""

from __future__ import annotations

import unittest

from tests import machine_lives, power_cuts
from tests.daemon import ROOT


class PowerCuts(unittest.TestCase):
    """P1, P2: what a client was told survives."""

    @classmethod
    def setUpClass(cls) -> None:
        if why := machine_lives.impossible():
            raise unittest.SkipTest(why)

    def test_nothing_is_lost(self) -> None:
        [story] = machine_lives.lives(power_cuts.CutLife, ROOT, [1])
        self.assertEqual((story["problems"], story["cuts"]), ([], power_cuts.CUTS_A_LIFE))

    def test_without_fsync_the_same_check_fails(self) -> None:
        self.assertTrue(machine_lives.is_caught(power_cuts.CutLife, "no fsync at all", 1))


if __name__ == "__main__":
    unittest.main()
