"""What must be settled before torch is loaded; so cetrec.py imports this file first.

A thread that waits for others spins before it sleeps, by default so long that two runs on one
machine slow each other tenfold. Large tensors are put into large pages of memory, which Linux hands
out faster. And loading takes seconds, in which Ctrl-C ends our commands without a word; afterwards
support/terminal.py takes care of it. A program that only imports cetrec keeps its own ways.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

HOME = Path(__file__).resolve().parent.parent
PROGRAM = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
if PROGRAM.parent in (HOME, HOME / "experiments"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
