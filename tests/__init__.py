"""The tests. Where Python is told to write no byte code, each of the many daemons and clients that they start would
compile the whole program again, which is a third of what a daemon's start costs. Those share a cache of this run instead.
"""

import atexit
import os
import shutil
import tempfile

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="wfd-pycache-")
    atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)
