"""What is compared, measured and drawn. Each file is a command: python -m experiments.NAME."""

import sys

if sys.argv[0] == "-m":             # as it is while Python looks for the module of a command
    import support.start  # noqa: F401
