"""Files that are whole or as they were before: JSON and arrays, and one way to read an object."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import save

from support.processes import rank


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """In this context an error of the system names the file that is written, and no temporary one.

    What a full disk says has no name by itself.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """In this context no other process works on the folder. Of several processes of one run the
    first one keeps it for all.

    Raises ValueError if another one is at work there, unless that is to be waited for.
    """
    lock = FileLock(folder / ".lock")
    try:
        if rank() == 0:
            lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise ValueError(f"{folder}: another process is at work on this folder; wait for it, "
                             "or stop it") from None
        print(f"waiting for another process that is at work on {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either whole or as it was before, also when the machine is lost.

    It is written in a new folder beside its place and then moved there. So nothing is written
    through a link of that name: the link is replaced, and what it led to stays as it is. Of several
    processes only the first one writes.
    """
    if rank():
        return
    with naming(path), tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as new:
        with open(Path(new, path.name), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(Path(new, path.name), path)


def write_json(path: Path, value) -> None:
    """Write a JSON file, as write_whole does."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def read_object(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError, which names the file, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:       # nested too deep is a RecursionError
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def save_arrays(arrays: dict[str, np.ndarray], path: Path, notes: dict | None = None) -> str:
    """Write a safetensors file, as write_whole does. Returns its SHA-256."""
    content = save({name: np.ascontiguousarray(x) for name, x in arrays.items()}, notes)
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()
