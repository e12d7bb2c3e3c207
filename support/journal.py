"""The journal of a tuning run: its log, its checkpoints, and how it goes on after a break.

A checkpoint is safetensors with a checksum of all that is in it; nothing is unpickled.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from data import IGNORE, Batch, Tokenizer
from support.files import save_arrays
from support.processes import rank
from support.runs import peak_memory


def lock(file, wait: bool = False) -> None:
    """Let no other process work on what an open file stands for, until the file is closed.

    Raises ValueError if another process does so now, unless that is to be waited for.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        folder = Path(file.name).parent
        if not wait:
            raise ValueError(f"{folder}: another process is at work on this folder; wait for it, "
                             "or stop it") from None
        print(f"waiting for another process that is at work on {folder}")
        fcntl.flock(file, fcntl.LOCK_EX)


def checksum(arrays: dict[str, np.ndarray], notes: dict[str, str]) -> str:
    """SHA-256 of named arrays and notes, whatever their order."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


class Journal:
    """Keeps account of tuning: a moving line, log.jsonl, and checkpoints to go on from.

        with Journal(folder, optimizer, rng, total, lambda_ct, tokenizer) as journal:
            while journal.goes_on():
                for batch in journal.epoch(lambda: batches(...)):
                    ... one step ...
                    journal.note(lr, losses)
                journal.validated(loss, save)

    If the folder holds a checkpoint, all goes on from there, to the same factors and the same log
    as without the break. A checkpoint is written at each printed step, after each validation, and
    every minute. The log may be ahead of it, and is cut back to where the checkpoint was. Only one
    process at a time keeps the journal of a folder; another one is refused with a ValueError.

    A step waits for the device once, for its gradient's norm (cetrec.tuning_step). The losses stay
    there until the log is written, once a second. The tokenizer is for the message that names the
    sequences of a step that failed; `what` names the work on the moving line.
    """

    def __init__(self, folder: Path, optimizer: torch.optim.Optimizer, rng: np.random.Generator,
                 total: int, lambda_ct: float, tokenizer: Tokenizer, what: str = "tuning"):
        self.folder, self.optimizer, self.rng, self.what = folder, optimizer, rng, what
        self.total, self.lambda_ct, self.tokenizer = total, lambda_ct, tokenizer
        self.factors = [p for group in optimizer.param_groups for p in group["params"]]
        self.step, self.batch, self.seconds, self.waited = 0, 0, 0.0, 0.0
        self.losses: list[float] = []           # validation L_TA, an epoch each
        self.best: list[Tensor] = []            # the factors of the best epoch
        self.pending: list[tuple] = []          # steps that the log does not have yet
        if rank():
            self.log = tempfile.TemporaryFile("w", encoding="utf-8")        # nobody reads it
        else:
            self.log = open(folder / "log.jsonl", "a", encoding="utf-8")
        try:
            lock(self.log)
            end = self._load() if (folder / "checkpoint.safetensors").is_file() else 0
        except ValueError:
            self.log.close()
            raise
        there = 0 if rank() else (folder / "log.jsonl").read_bytes()[:end].rfind(b"\n") + 1
        if there < end:                                                     # whole lines only
            print(f"{self.log.name} has lost some of the {end:,} bytes that it had; the curves of "
                  "this run will have a gap, its result will not")
        self.log.truncate(there)
        self.bar = tqdm(total=total, initial=self.step, desc=what, unit="step", disable=None,
                        leave=False)

    def __enter__(self) -> "Journal":
        self.started = self.flushed = self.saved = time.perf_counter()
        self.first = self.step          # of this sitting; speed is counted after its first step
        if rank():                      # drop out other numbers than the first process does
            torch.manual_seed(torch.initial_seed() + 10**6 * rank() + self.step)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self.step < 100 and self.what == "tuning":
            self.bar.write(f"only {self.step} steps of tuning; more data, a smaller --batch-size, "
                           "--epochs or --max-steps would help", file=sys.stdout)
        if isinstance(error, FloatingPointError):
            self._flush()
        self.bar.close()
        self.log.close()
        if isinstance(error, FloatingPointError):
            raise ValueError(
                f"step {self.step + 1}: {error}, so it was not made. Its sequences: "
                f"{self._batch_in_words()}. Try a smaller --lr or --lambda-ct; {self.folder} keeps "
                "the adapter of the best epoch, if one has ended, and the last checkpoint"
            ) from None

    def goes_on(self) -> bool:
        """Are steps left, and was the last epoch the best (D5)?"""
        return self.step < self.total and (not self.losses or self.losses[-1] == min(self.losses))

    def epoch(self, batches: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
        """The batches of an epoch, less those that were done before a break.

        batches draws the whole epoch from the generator whose state is noted here, so after a break
        it draws the same batches again, and the ones that were done are passed over.
        """
        self.sampling, done = self.rng.bit_generator.state, self.batch
        asked = time.perf_counter()
        for number, batch in enumerate(itertools.islice(batches(), done, None), start=done + 1):
            self.waited += time.perf_counter() - asked
            self.current = batch
            yield batch
            self.batch = number
            printed = self.step % max(1, self.total // 5) == 0 or self.step in (1, self.total)
            asked = time.perf_counter()
            if printed or asked - self.flushed > 1:
                line = self._flush()
                if printed:
                    self.bar.write(line, file=sys.stdout)
                if printed and self.step < self.total or asked - self.saved > 60:
                    self._save()
            if self.step == self.total:
                break
        self.batch = 0

    def note(self, lr: float, losses) -> None:
        """A step is done; losses are (L, L_TA, L_CT or None), tensors or None."""
        self.step += 1
        if self.step == self.first + 1:
            self.warm = time.perf_counter()
        self.pending.append((self.step, lr, *losses))
        self.bar.update()

    def validated(self, loss: float, save: Callable[[], None]) -> None:
        """An epoch is over, with this validation L_TA; save() writes the adapter if it is the
        best. Raises ValueError for a loss that is not finite."""
        self._flush()
        if not math.isfinite(loss):
            raise ValueError(f"validation L_TA is {loss} after step {self.step}: tuning has "
                             "diverged. Try a smaller --lr or --lambda-ct")
        self.losses.append(loss)
        better = loss == min(self.losses)
        self.log.write(json.dumps({"step": self.step, "validation_ta": loss}) + "\n")
        self.bar.write(f"epoch {len(self.losses)} | validation ta {loss:.4f} | " + (
            "best so far, adapter saved" if better else "no better than before, so tuning stops"),
            file=sys.stdout)
        if better:
            save()
            self.best = [p.detach().clone() for p in self.factors]
        self.sampling = self.rng.bit_generator.state
        self._save()

    def restore_best(self) -> None:
        """Put the factors of the best epoch back into the model."""
        for p, value in zip(self.factors, self.best):
            p.data.copy_(value)

    def record(self) -> dict:
        """For run.json."""
        seconds = self.seconds + time.perf_counter() - self.started
        return {"steps": self.step, "validation_ta": self.losses, "seconds": seconds,
                "share_waiting_for_data": self.waited / seconds}

    def _flush(self) -> str:
        """Write pending steps to the log. Returns the last as a line to print."""
        now, line = time.perf_counter(), ""
        ms = 1000 * (now - self.flushed) / max(1, len(self.pending))
        for step, lr, *losses in self.pending:
            loss, ta, ct = (None if x is None else float(x) for x in losses)
            self.log.write(json.dumps({"step": step, "loss": loss, "loss_ta": ta, "loss_ct": ct,
                                       "lr": lr, "ms": ms}) + "\n")
            parts = "" if ct is None else f" = ta {ta:.3f} + {self.lambda_ct:g} x ct {ct:.3f}"
            told = f"loss {loss:.3f}{parts}"
            line = (f"{'' if self.what == 'tuning' else self.what + ' | '}"
                    f"step {step:>5}/{self.total} | {told} | lr {lr:.1e} | {ms:.0f} ms | "
                    f"{peak_memory(self.factors[0].device):.1f} GB | {self._left(now)}")
            self.bar.set_postfix_str(told, refresh=False)
        self.pending, self.flushed = [], now
        self.log.flush()
        return line

    def _batch_in_words(self) -> str:
        """The sequences of the batch that is worked on: histories and answers."""
        told = []
        for tokens, item_pos, labels in zip(self.current.tokens, self.current.item_pos,
                                            self.current.labels):
            parts = [tokens[item_pos == k].tolist()
                     for k in item_pos[item_pos >= 0].unique().flip(0)]
            answer = labels[labels != IGNORE].tolist()
            told.append(f"{', '.join(map(self.tokenizer.decode, parts))} -> "
                        f"{self.tokenizer.decode(answer)}")
        return "; ".join(told)

    def _left(self, now: float) -> str:
        done = self.step - self.first - 1               # the first step may compile
        if done < 1:
            return "? min left"
        return f"{(now - self.warm) / done * (self.total - self.step) / 60:.1f} min left"

    def _save(self) -> None:
        """Write checkpoint.safetensors: factors, moments, the best epoch's factors, random states,
        what is done. The log that it goes with is on the disk before it."""
        self._flush()
        self.saved = time.perf_counter()
        if rank():
            return
        os.fsync(self.log.fileno())
        tensors = {f"best/{i}": x for i, x in enumerate(self.best)}
        tensors["random/cpu"] = torch.get_rng_state()
        for i, p in enumerate(self.factors):
            tensors[f"factor/{i}"] = p.detach()
            if kept := self.optimizer.state.get(p):     # nothing, if no step had a gradient for it
                tensors |= {f"mean/{i}": kept["exp_avg"], f"square/{i}": kept["exp_avg_sq"]}
        if (kind := self.factors[0].device.type) != "cpu":
            tensors[f"random/{kind}"] = torch.get_device_module(kind).get_rng_state()
        done = {"step": self.step, "batch": self.batch, "losses": self.losses,
                "waited": self.waited, "log": self.log.tell(),
                "seconds": self.seconds + time.perf_counter() - self.started}
        arrays = {name: x.numpy(force=True) for name, x in tensors.items()}
        notes = {"sampling": json.dumps(self.sampling), "done": json.dumps(done)}
        save_arrays(arrays, self.folder / "checkpoint.safetensors",
                    notes | {"sha256": checksum(arrays, notes)})

    def _load(self) -> int:
        """Put everything where it was. Returns the length of the log then. Raises ValueError for a
        damaged checkpoint or one of other factors."""
        path = self.folder / "checkpoint.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if notes.pop("sha256") != checksum({n: x.numpy() for n, x in tensors.items()}, notes):
                raise ValueError("its checksum is of other content")
            done = json.loads(notes["done"])
            for i, p in enumerate(self.factors):
                p.data.copy_(tensors[f"factor/{i}"])
                if f"mean/{i}" in tensors:
                    self.optimizer.state[p] = {"step": torch.tensor(float(done["step"])),
                                               "exp_avg": tensors[f"mean/{i}"].to(p.device),
                                               "exp_avg_sq": tensors[f"square/{i}"].to(p.device)}
            for name in [name for name in tensors if name.startswith("random/")]:
                kind = name.removeprefix("random/")
                module = torch if kind == "cpu" else torch.get_device_module(kind)
                module.set_rng_state(tensors[name])
            self.rng.bit_generator.state = json.loads(notes["sampling"])
            self.step, self.batch, self.losses = done["step"], done["batch"], done["losses"]
            self.seconds, self.waited = done["seconds"], done["waited"]
            self.best = [tensors[f"best/{i}"].to(p.device)
                         for i, p in enumerate(self.factors) if self.losses]
            return done["log"]
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged, or of other settings ({error}). Delete it to tune "
                             "from the first step") from None
