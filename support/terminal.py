"""The door between a command and its terminal: what it prints, how it ends, how it is stopped.

Titles, paths and columns come from anywhere, and may hold characters that move a terminal's cursor
or turn the direction of its text. They are shown as what they are, here and nowhere else.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from support.files import naming
from support.processes import joined

# Control characters except tab and line feed, marks that turn the direction of text, unusual line
# breaks, and halves of surrogate pairs, which stand for bytes of a path that are no text.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
                    "\ufeff\ud800-\udfff]")
LONGEST = 1_000         # characters of an error line
OTHER_ENDED = re.compile("gloo.*(closed|reset)|nccl.*remote process|by peer", re.I | re.S)
OUT_OF_MEMORY = re.compile("(allocate|not enough|out of) memory|size calculation overflow", re.I)


def visible(text: str) -> str:
    """The text with unseen characters as Python would write them: an escape is \\x1b."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(message) -> str:
    """A message as one line of bounded length: of a long one the first and the last part."""
    text = visible(str(message)).strip().replace("\n", "\\n")
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST // 2]} ... {text[-LONGEST // 2:]}"


class Visible:
    """A stream that shows unseen characters, and otherwise is the stream that it writes to.

    A question mark stands for a character that the terminal does not have.
    """

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write visible(text)."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with naming(Path("standard output")):
            return self._stream.write(visible(text).encode(encoding, "replace").decode(encoding))

    def flush(self) -> None:
        """Flush the stream."""
        with naming(Path("standard output")):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class Quiet(Visible):
    """A stream on which no line moves, for processes that shall not be watched."""

    def isatty(self) -> bool:
        """False."""
        return False


class Parser(argparse.ArgumentParser):
    """A parser whose faults are one line, like all other faults of a command."""

    def __init__(self, prog: str, usage: str = "[flags]", **settings):
        super().__init__(prog=prog, usage=f"{prog} {usage}", allow_abbrev=False, **settings)

    def print_help(self, file=None) -> None:
        """Print the help, also where the terminal does not have all its characters."""
        print(self.format_help(), end="", file=Visible(file or sys.stdout))

    def error(self, message: str):
        """End the program with status 2."""
        usage = self.format_usage().strip()
        sys.exit(failed(f"{one_line(message)}; {usage}, where --help explains the flags"))


def exit_status(work: Callable[[], None]) -> int:
    """Do the work of a command and return its exit status.

    That is 0; or 2, after one line that says what the user can mend; or 130 when interrupted, which
    SIGTERM does as Ctrl-C does. Other exceptions are faults of ours and keep their traceback.
    """
    for name in ("stdout", "stderr"):       # a shell's >&- closes one; the work goes on without it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    number = 0
    mine = threading.current_thread() is threading.main_thread()
    before = [(kind, signal.signal(kind, signal.default_int_handler))
              for kind in (signal.SIGTERM, signal.SIGINT) if mine]
    try:
        with joined() as number, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
                nowhere if number else Visible(sys.stdout)), contextlib.redirect_stderr(
                Quiet(sys.stderr) if number else sys.stderr):
            work()
            sys.stdout.flush()
    except BrokenPipeError:     # who read the output, as `head` does, has had enough: say no more
        return 141              # as a shell has it for a command that SIGPIPE ended
    except (ValueError, OSError, SafetensorError) as error:
        return failed(error)
    except (MemoryError, RuntimeError) as error:
        if OTHER_ENDED.search(str(error)):
            return failed("another process of this run has ended")
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        reason = str(error).strip().splitlines() or ["no more to be had"]
        return failed(f"out of memory ({reason[0]}). Less is needed with --micro-batch 1, "
                      "--recompute, --dtype bfloat16, a smaller --lora-rank or fewer --beams")
    except KeyboardInterrupt as stop:
        if not number:
            print(f"interrupted; {one_line(stop) or 'files already written are whole'}",
                  file=sys.stderr)
        return 130
    finally:
        try:
            sys.stdout.flush()
        except OSError:         # Python would try again at its end, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        for kind, handler in before:
            signal.signal(kind, handler)
    return 0


def failed(message) -> int:
    """Print an error and return the exit status of a fault that the user can mend.

    Of several processes all have most faults alike. So others than the first one wait a while,
    in which torchrun ends them if the first one has told the fault.
    """
    number = os.environ.get("RANK", "")
    other = number.isdecimal() and int(number) > 0
    if other:
        time.sleep(3)
    print(f"error{f' of process {number}' if other else ''}: {one_line(message)}", file=sys.stderr)
    return 2
