"""Cells: the runs that a table or a figure is made of. Each is run once."""

import time
from collections.abc import Callable
from pathlib import Path

from support.files import read_object, write_json
from support.runs import check_writable


class Cells:
    """Runs below a folder, by their command lines, which cells.json there lists.

    A cell that is there is not run again, so a table that was interrupted continues where it was.
    """

    def __init__(self, out: Path, total: int):
        check_writable(out)
        self.out, self.index, self.total = out, out / "cells.json", total
        self.started, self.count, self.new = time.perf_counter(), 0, 0

    def folder(self, command: Callable, argv: list[str]) -> Path:
        """The folder of the run that a command with these arguments makes, now if it is not there.

        Raises ValueError for a run that fails, and KeyboardInterrupt for one that is interrupted.
        """
        line = " ".join([command.__module__, *argv])
        self.count += 1
        known = read_object(self.index) if self.index.is_file() else {}
        if line in known and (self.out / known[line] / "run.json").is_file():
            return self.out / known[line]
        print(f"cell {self.count}/{self.total} | {line}", flush=True)
        before = set(self.out.iterdir())
        status = command([*argv, "--out", str(self.out)])
        if status == 130:
            raise KeyboardInterrupt("the same command continues with this cell")
        if status:
            raise ValueError(f"this cell failed, see above: {line}")
        (folder,) = (p for p in set(self.out.iterdir()) - before if (p / "run.json").is_file())
        known[line] = folder.name
        write_json(self.index, known)
        self.new += 1
        minutes = (time.perf_counter() - self.started) / 60
        print(f"cell {self.count}/{self.total} | done | {minutes:.0f} min so far, at most "
              f"{minutes / self.new * (self.total - self.count):.0f} left", flush=True)
        return folder
