"""Files that are whole or as they were before: JSON and arrays, and one way to read an object."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from support.processes import rank


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either whole or as it was before, also when the machine is lost.

    Of several processes only the first one writes.
    """
    if rank():
        return
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
