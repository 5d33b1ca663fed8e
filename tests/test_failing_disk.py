"""A disk whose fsync fails and then succeeds, in short form: `python -m tests.failing_disk` is the long one."""

from __future__ import annotations

import unittest

from tests import machine_lives
from tests.daemon import ROOT
from tests.failing_disk import FailingLife


class FsyncFails(unittest.TestCase):
    """P2, P8: what a client was told survives."""

    def test_nothing_is_lost(self) -> None:
        if why := machine_lives.impossible():
            self.skipTest(why)
        # The first has a journal that can be written, the second has not.
        for story in machine_lives.lives(FailingLife, ROOT, [0, 1]):
            self.assertEqual((story["problems"], story["cuts"]), ([], 1), story)


if __name__ == "__main__":
    unittest.main()
