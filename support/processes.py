"""Many processes, one run: `torchrun --nproc_per_node N cetrec.py ...` starts N of them.

Every process has the whole model and draws the same batches, of which it works on its own part.
Gradients and losses are sums over the parts, each weighted by its share of the batch's targets; so
they are added up over all processes, and each makes the same step. Users are dealt out for the
evaluation in the same way. Process 0 alone prints and writes.
"""

import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from data import IGNORE, Batch, Sequences
from evaluate import Lists

PATIENCE = 60                   # seconds in which the processes of a run must find one another
TORCHRUN = ("Of several processes, torchrun tells each its RANK, LOCAL_RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT; for one process alone, unset RANK and WORLD_SIZE")
SHARDED: list[bool] = []        # holds something once weights are sharded


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def variable(name: str, least: int, most: int, default: str | None = None) -> int:
    """The whole number in a variable of the environment. Raises ValueError if there is none."""
    value = os.environ.get(name, default)
    if value is None or not (value.isdecimal() and least <= int(value) <= most):
        found = "not set" if value is None else repr(value)
        raise ValueError(f"the environment variable {name} is {found}; wanted a whole number from "
                         f"{least} to {most}. {TORCHRUN}")
    return int(value)


def connect(number: int, N: int) -> None:
    """Join process `number` of N with the others, at the address that the environment names.

    Raises ValueError for a variable that is wrong, and if the others are not there in time.
    """
    host, port = os.environ.get("MASTER_ADDR"), variable("MASTER_PORT", 1, 65_535)
    if not host:
        raise ValueError(f"the environment variable MASTER_ADDR is not set. {TORCHRUN}")
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        local = variable("LOCAL_RANK", 0, N - 1)
        torch.cuda.set_device(local % torch.cuda.device_count())    # check_devices has the rest
    long = timedelta(days=2)    # a process that dies ends the others at once, but a base takes long
    try:
        socket.getaddrinfo(host, port)
        with ThreadPool(1) as pool:         # because Ctrl-C could not stop PyTorch's own waiting
            store, *_ = pool.apply_async(next, [rendezvous("env://", timeout=long)]).get(PATIENCE)
        dist.init_process_group(backend, store=store, rank=number, world_size=N, timeout=long)
    except (OSError, TimeoutError, RuntimeError, ValueError) as error:
        raise ValueError(f"process {number} of {N} did not find the others at {host}:{port} within "
                         f"{PATIENCE} s ({str(error) or 'no answer'}). They want the same "
                         "MASTER_ADDR and MASTER_PORT, and to be started together, as torchrun "
                         "does it") from None


@contextmanager
def joined() -> Iterator[int]:
    """In this context the processes that torchrun has started can talk to one another.

    It gives the number of this process. They end with it, status 0, because the libraries' threads
    may abort a process that winds down. Raises ValueError as connect does.
    """
    if dist.is_initialized():           # by an outer command
        yield rank()
        return
    N = variable("WORLD_SIZE", 1, 10**6, "1")
    number = variable("RANK", 0, N - 1, "0" if N == 1 else None)
    if N == 1:
        yield 0
        return
    connect(number, N)
    yield number
    dist.barrier()          # whoever left earlier would seem to have died
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


@contextmanager
def first_process_first():
    """Process 0 goes through this context before all others do, so that they find its files."""
    if rank():
        dist.barrier()
    yield
    if processes() > 1 and not rank():
        dist.barrier()


def check_devices() -> None:
    """Raise ValueError if processes on this machine would share a GPU."""
    here, count = variable("LOCAL_WORLD_SIZE", 1, 10**6, "1"), torch.cuda.device_count()
    if processes() > 1 and here > count:
        raise ValueError(f"{here} processes on a machine with {count} GPUs: every process wants "
                         "one of its own. Start fewer, or take --device cpu")


def least(number: int) -> int:
    """The smallest of the numbers that the processes have."""
    value = torch.tensor(number)
    if processes() > 1:
        dist.all_reduce(value, dist.ReduceOp.MIN)
    return int(value)


def agreed(value):
    """The value that process 0 has, in every process."""
    box = [value]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Put the sums over all processes into these tensors. They travel as one."""
    if processes() > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x))


def my_parts(batch: Batch, rows: int) -> list[tuple[Batch, float]]:
    """The parts of a batch that this process works on, at most so many rows each, and their shares
    of the batch's answer tokens.

    Its stretch of the batch is the same however many rows are in a part, and all processes get
    equally many parts. If its rows run out, a process works on some row again, with share 0.
    """
    B, N = len(batch.tokens), processes()
    each = math.ceil(math.ceil(B / N) / rows)           # parts of a process
    targets, mine = int((batch.answers != IGNORE).sum()), []
    for i in range(rank() * each, (rank() + 1) * each):
        start, stop = B * i // (N * each), B * (i + 1) // (N * each)
        part = batch.rows(slice(start, max(stop, start + 1)))
        share = int((part.answers != IGNORE).sum()) / targets if stop > start else 0.0
        mine.append((part, share))
    return mine


def seed_dropout(seed: int, step: int) -> None:
    """Let dropout depend on the seed, the step and this process, not on what ran before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1)[0]))


def check_shardable() -> None:
    """Raise ValueError where torchrun has not started the processes that would share weights."""
    if not dist.is_initialized():
        raise ValueError("--shard wants several processes; start them with torchrun "
                         "--nproc_per_node N cetrec.py ...")


def shard(model: nn.Module, device: torch.device) -> None:
    """Let each process keep 1/N of the frozen weights of every block, by PyTorch's FSDP2.

    A block's weights are gathered when it runs, forward and backward, and dropped again. Factors,
    embeddings and norm stay whole in every process. Gathering is an act of all processes together.
    So from now on all must run the same blocks equally often, and users are not dealt out. Raises
    ValueError as check_shardable does.
    """
    check_shardable()
    from torch.distributed.fsdp import fully_shard      # this takes a second; few want it

    # Keys and values that a block returns are views, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in model.llama.layers:
        tuned = {p for p in block.parameters() if p.requires_grad}
        for p in tuned:
            p.data = p.data.to(device)
        # A block alone is a root to FSDP2, which keeps the weights of a root unless it is told.
        fully_shard(block, ignored_params=tuned, reshard_after_forward=True)
    for name, p in model.named_parameters():
        if not name.startswith("llama.layers."):
            p.data = p.data.to(device)
    SHARDED.append(True)


def dealers() -> tuple[int, int]:
    """(this process, how many there are), for what may be dealt out unevenly."""
    return (0, 1) if SHARDED else (rank(), processes())


def shared_out(recommend: Callable) -> Callable:
    """A recommender (see evaluate_order) that makes every process's lists for its own users only,
    and gives all lists to all."""
    def recommend_together(histories, ages=None, progress: str = "") -> Lists:
        this, N = dealers()
        mine = range(this, len(histories), N)
        lists = recommend([histories[i] for i in mine], ages and [ages[i] for i in mine], progress)
        return replace(lists, **{f.name: together(getattr(lists, f.name)) for f in fields(lists)})
    return recommend_together


def my_sequences(sequences: Sequences) -> Sequences:
    """The sequences that this process works on: every N-th, beginning with its own number."""
    this, N = dealers()
    return sequences.select(slice(this, None, N))


def together(mine: np.ndarray) -> np.ndarray:
    """Rows r, r + N, r + 2N .. of each process r of N, as one array in their order."""
    N = dealers()[1]
    if N == 1:
        return mine
    parts = [None] * N
    dist.all_gather_object(parts, mine)
    whole = np.empty((sum(map(len, parts)), *mine.shape[1:]), dtype=mine.dtype)
    for first, part in enumerate(parts):
        whole[first::N] = part
    return whole


def my_share(items: Iterator) -> Iterator:
    """Every N-th of the items, N being the number of processes, beginning with this one's."""
    this, N = dealers()
    return (item for i, item in enumerate(items) if i % N == this)
