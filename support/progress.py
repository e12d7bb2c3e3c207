"""What tuning writes while it works: log.jsonl, a checkpoint to resume from, a line that moves.

A checkpoint is safetensors with a checksum of all that is in it; nothing is unpickled.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from data import IGNORE, Batch, Tokenizer
from support.files import naming, save_arrays, write_whole
from support.machine import peak_memory
from support.processes import rank


@dataclass
class Progress:
    """How far tuning has got. Factors and moments apart, a checkpoint holds nothing else.

    No generator states are among it: the order of an epoch depends on (seed, epoch) only, and
    dropout on (seed, step, process) only.
    """

    step: int = 0
    validation: list[float] = field(default_factory=list)   # validation L_TA, one for each epoch
    best: list[Tensor] = field(default_factory=list)        # the factors of the best epoch
    log_length: int = 0                                     # bytes of log.jsonl
    seconds: float = 0.0

    # Of this process only, not in a checkpoint: the step it began at, and times of the clock.
    first: int = 0
    began: float = field(default_factory=time.perf_counter)
    warm: float = 0.0       # when the first step was done, which may have compiled kernels
    last: float = field(default_factory=time.perf_counter)      # the last step
    saved: float = field(default_factory=time.perf_counter)     # the last checkpoint

    def total_seconds(self) -> float:
        """Time of tuning, that before interruptions included."""
        return self.seconds + time.perf_counter() - self.began


# ----------------------------------------------------------------------------------------------
# The log


def begin_log(folder: Path, progress: Progress) -> None:
    """Cut log.jsonl back to where the checkpoint was. It is a new file, for it may be a link."""
    path = folder / "log.jsonl"
    kept = path.read_bytes()[:progress.log_length] if path.is_file() else b""
    whole = kept.rfind(b"\n") + 1
    if whole < progress.log_length:
        print(f"{path} has lost some of the {progress.log_length:,} bytes that it had; the "
              "curves of this run will have a gap, its result will not")
    write_whole(path, kept[:whole])


def write_line(folder: Path, values: dict) -> None:
    """Add a line to the log, as the first process only. A full disk's error names the log."""
    log = folder / "log.jsonl"
    if not rank():
        with naming(log), open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def begin(folder: Path, progress: Progress, total: int, name: str = "tuning") -> tqdm:
    """Begin or continue the log of a folder, and the line that moves on a terminal."""
    begin_log(folder, progress)
    return tqdm(total=total, initial=progress.step, desc=name, unit="step", disable=None,
                leave=False)


def log_step(folder: Path, bar: tqdm, progress: Progress, losses: Tensor, lambda_ct: float,
             lr: float, name: str = "") -> bool:
    """Write a step to the log and to the moving line.

    The line is printed at the first and the last step, and at every fifth of all steps.
    losses: L, L_TA and, where two worlds were run, L_CT. Returns whether it is time for a
    checkpoint: the line was printed, or the last checkpoint is more than a minute old.
    """
    loss, loss_ta, loss_ct = (*losses.tolist(), None)[:3]
    now, done = time.perf_counter(), progress.step - progress.first
    ms, progress.last = 1000 * (now - progress.last), now
    write_line(folder, {"step": progress.step, "loss": loss, "loss_ta": loss_ta, "loss_ct": loss_ct,
                        "lr": lr, "ms": ms})
    parts = "" if loss_ct is None else f" = ta {loss_ta:.3f} + {lambda_ct:g} x ct {loss_ct:.3f}"
    if done == 1:
        progress.warm = now
    bar.update()
    bar.set_postfix_str(f"loss {loss:.3f}{parts}", refresh=False)
    printed = progress.step % max(1, bar.total // 5) == 0 or progress.step in (1, bar.total)
    if printed:
        pace = (now - progress.warm) / max(1, done - 1)
        left = f"{pace * (bar.total - progress.step) / 60:.1f}" if done > 1 else "?"
        bar.write(f"{name}step {progress.step:>5}/{bar.total} | loss {loss:.3f}{parts} | "
                  f"lr {lr:.1e} | {ms:.0f} ms | {peak_memory(losses.device):.1f} GB | "
                  f"{left} min left", file=sys.stdout)
    return printed or now - progress.saved > 60


def log_validation(folder: Path, bar: tqdm, progress: Progress) -> bool:
    """Write and print the last validation loss. Returns whether its epoch is the best so far."""
    loss = progress.validation[-1]
    write_line(folder, {"step": progress.step, "validation_ta": loss})
    best = loss == min(progress.validation)
    bar.write(f"epoch {len(progress.validation)} | validation ta {loss:.4f} | " + (
        "best so far, adapter saved" if best else
        f"no better than before{', so tuning stops' * (progress.step < bar.total)}"),
        file=sys.stdout)
    progress.last = time.perf_counter()
    return best


def not_finite(step: int, norm: float, batch: Batch, tokenizer: Tokenizer) -> str:
    """An error message for a step whose gradient is not finite: its sequences, and what to do."""
    sequences = []
    for tokens, item_pos, answer in zip(batch.tokens, batch.item_pos, batch.answers):
        items = [tokens[item_pos == k].tolist()
                 for k in item_pos[item_pos >= 0].unique().flip(0)]
        sequences.append(f"{', '.join(map(tokenizer.decode, items))} -> "
                         f"{tokenizer.decode(answer[answer != IGNORE].tolist())}")
    return (f"step {step}: the gradient's norm is {norm}, so the step was not made. Its sequences: "
            f"{'; '.join(sequences)}. Try a smaller --lr or --lambda-ct, or --dtype bfloat16 where "
            "it is float16; the adapter of the best epoch, if one has ended, and the last "
            "checkpoint are kept")


# ----------------------------------------------------------------------------------------------
# The checkpoint


def checksum(arrays: dict[str, np.ndarray], notes: dict[str, str]) -> str:
    """SHA-256 of named arrays and notes, whatever their order."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def save_checkpoint(folder: Path, optimizer: torch.optim.Optimizer,
                    progress: Progress) -> None:
    """Write checkpoint.safetensors: factors, moments, the best factors, and how far tuning has got.

    The log is on the disk first.
    """
    progress.saved = time.perf_counter()
    if rank():
        return
    log = folder / "log.jsonl"
    with naming(log), open(log, "rb") as file:
        os.fsync(file.fileno())
    tensors = {f"best/{i}": x for i, x in enumerate(progress.best)}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors[f"factor/{i}"] = p.detach()
        if moments := optimizer.state.get(p):   # none, if no step had a gradient for it
            tensors |= {f"mean/{i}": moments["exp_avg"], f"square/{i}": moments["exp_avg_sq"]}
    arrays = {name: x.numpy(force=True) for name, x in tensors.items()}
    notes = {"progress": json.dumps({
        "step": progress.step, "validation": progress.validation,
        "log_length": log.stat().st_size, "seconds": progress.total_seconds()})}
    save_arrays(arrays, folder / "checkpoint.safetensors",
                notes | {"sha256": checksum(arrays, notes)})


def load_checkpoint(folder: Path, optimizer: torch.optim.Optimizer) -> Progress:
    """Put factors and moments back where a checkpoint had them. Without one, tuning begins.

    Raises ValueError for a damaged checkpoint, or one of other factors.
    """
    path, factors = folder / "checkpoint.safetensors", optimizer.param_groups[0]["params"]
    if not path.is_file():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if notes.pop("sha256") != checksum({n: x.numpy() for n, x in tensors.items()}, notes):
            raise ValueError("its checksum is of other content")
        progress = Progress(**json.loads(notes["progress"]))
        progress.first = progress.step
        progress.best = [tensors[f"best/{i}"].to(p.device)
                         for i, p in enumerate(factors) if progress.validation]
        for i, p in enumerate(factors):
            p.data.copy_(tensors[f"factor/{i}"])
            if f"mean/{i}" in tensors:
                optimizer.state[p] = {"step": torch.tensor(float(progress.step)),
                                      "exp_avg": tensors[f"mean/{i}"].to(p.device),
                                      "exp_avg_sq": tensors[f"square/{i}"].to(p.device)}
        return progress
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged, or of other settings ({error}). Delete it to tune "
                         "from the first step") from None
