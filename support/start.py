"""What a command settles before torch is loaded. Importing this file changes the process.

A thread that waits for others spins before it sleeps, by default for so long that two runs on one
machine slow each other tenfold. Large tensors get large memory pages, which Linux hands out faster.
And loading takes seconds, in which Ctrl-C ends a command without a traceback; afterwards
support/terminal.py handles it.
"""

import os
import signal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
signal.signal(signal.SIGINT, signal.SIG_DFL)
