"""The machine: the device, what makes it fast, and how many rows fit its memory."""

import importlib.util
import os
import resource
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from data import Batch
from llama import Llama
from lora import LoraLinear
from support.options import Options
from support.processes import SHARDED, check_devices, check_shardable, least

COMPILE_PAYS = 1_000        # steps on a GPU after which compiling has won its time back


def choose_device(options: Options) -> tuple[torch.device, torch.dtype | None]:
    """The device, and the precision of the frozen weights, where None keeps the stored one.

    auto takes half precision only where it is faster, which is on GPUs. bfloat16 has the range of
    float32; float16 is for cards that do not have bfloat16. The default run is so small that
    starting a GPU's kernels takes longer than their work: it took 84 s on an H200, and 54 s on two
    CPU cores beside it. So auto leaves it on the CPU.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    kind = options.device
    if kind == "auto":
        kind = next(name for name, there in available.items() if there)
        if kind == "cuda" and options.model == "tiny" and options.data == "synthetic":
            print("--device auto takes the CPU, which is faster than a GPU with so small a base "
                  "and so short prompts")
            kind = "cpu"
    if not available[kind]:
        raise ValueError(f"--device {kind}: this PyTorch sees no such device; use --device auto")
    if kind == "cuda":
        check_devices()
    if options.compile and (missing := missing_to_compile(kind)):
        raise ValueError(f"--compile wants {missing}; install it, or drop --compile")
    if options.shard:
        check_shardable()
    name = options.dtype
    if name == "auto" and kind == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if bf16 else "float16"
    elif name == "auto":
        name = "float32"
    return torch.device(kind), None if name == "stored" else getattr(torch, name)


def choose_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Let PyTorch take the faster kernels for frozen weights of this precision on a GPU.

    cuDNN's attention makes a plan for every new shape, which takes a second, and real batches have
    ever new widths. PyTorch's other kernels take any shape.

    Beside half-precision weights, tuning and evaluation have no other product of float32 than the
    one that makes the logits. Tensor cores take it as TF32, which keeps ten bits of each factor's
    mantissa. Hidden states and weights have no more than that (float16 ten, bfloat16 seven), so the
    logits stay exact to the rounding of their sums. The gradient that comes back is rounded to ten
    bits, and then to half precision. Both settings hold for the whole process.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")


# ----------------------------------------------------------------------------------------------
# Blocks that are compiled, or run again in the backward pass


def missing_to_compile(kind: str) -> str:
    """What torch.compile wants for this kind of device and does not find, or nothing."""
    if kind == "cuda":
        needed = "triton, a C compiler, Python's headers and a GPU of compute capability 7 or more"
        complete = (importlib.util.find_spec("triton") and torch.cuda.get_device_capability()[0] > 6
                    and any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
                    and Path(sysconfig.get_path("include"), "Python.h").is_file())
    else:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        complete, needed = shutil.which(compiler), f"a C++ compiler, here {compiler} (see CXX)"
    return "" if complete else needed


def compile_pays(options: Options, device: torch.device, steps: int) -> bool:
    """Are blocks compiled in a run of so many steps? --compile and --no-compile decide it.

    Otherwise they are on GPUs, where it makes a step a fifth to a third faster and costs a minute
    or two once, in runs of many steps, unless something is missing or --recompute is given.
    """
    if options.compile is not None:
        return options.compile
    return (device.type == "cuda" and steps >= COMPILE_PAYS and not options.recompute
            and not missing_to_compile("cuda"))


def wrap_blocks(llama: Llama, recompute: bool = False, compiled: bool = False) -> None:
    """Recompute or compile the blocks from outside; llama.py has no code for it.

    Evaluation stays eager.
    """
    if compiled:
        print("blocks are compiled; the first step takes up to two minutes (--no-compile)")
    for block in llama.layers:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.forward = in_training(torch.compile(block.forward, dynamic=True), block.forward)


def in_training(compiled: Callable, eager: Callable) -> Callable:
    """A function that is compiled while gradients are recorded, and eager otherwise."""
    return lambda *inputs: (compiled if torch.is_grad_enabled() else eager)(*inputs)


# ----------------------------------------------------------------------------------------------
# Memory


def peak_memory(device: torch.device) -> float:
    """GB: peak allocated on a GPU, else the peak of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024          # ru_maxrss: bytes on macOS, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def backward_bytes(llama: Llama, batch: Batch, worlds: int = 2, recompute: bool = False,
                   compiled: bool = False) -> tuple[float, float]:
    """Bytes that the backward pass wants for each row, and for all rows together.

    For each token a block keeps the inputs of both norms, queries and the attention's output, keys
    and values with those of the prefix, where each query of a group may look, three widths of the
    MLP, and the input of each LoRA map with its dropout mask. Compiled blocks keep about 0.7 of
    that, because they compute some of it again; measured at 135M and 8B. A block that is recomputed
    keeps its input only, and all of it while it works. The logits of a target are there six times,
    in float32. All rows share the prefix and the logits' weights in float32.
    """
    config, (P, T) = llama.config, (len(batch.prefix), batch.tokens.shape[1])
    C, L, size = config.hidden_size, len(llama.layers), llama.embed_tokens.weight.dtype.itemsize
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = 2 * H * D + 2 * G * D * (P + T) / T + H // G * (P + T)
    factors = sum(m.in_features * (size + (m.config.dropout > 0))
                  for m in llama.layers[0].modules() if isinstance(m, LoraLinear))
    block = size * (2 * C + attention + 3 * config.intermediate_size) + factors
    kept = L * C * size + block if recompute else L * block * (0.7 if compiled else 1)
    logits = 6 * 4 * batch.answers.shape[1] * config.vocab_size
    shared = 4 * C * config.vocab_size if size < 4 else 0
    return worlds * (T * kept + logits), P * kept + shared


def rows_that_fit(llama: Llama, batch: Batch, worlds: int = 2, recompute: bool = False,
                  compiled: bool = False) -> int:
    """How many rows of a batch to tune on at a time, so that memory stays bounded.

    On CUDA devices they fill four fifths of what is free. Elsewhere it is the number for which the
    widest activation of a block has about a million numbers. The allocator keeps blocks of that
    size for the next tensor instead of returning them to the system, so small parts cost no time.
    """
    device = llama.embed_tokens.weight.device
    if device.type != "cuda":
        return max(1, 10**6 // (worlds * batch.tokens.shape[1] * llama.config.intermediate_size))
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    row, shared = backward_bytes(llama, batch, worlds, recompute, compiled)
    rows = max(1, int((0.8 * free - shared) / row))
    return least(rows) if SHARDED else rows         # then all run the same blocks equally often


def fewer_rows(rows: int, reason: str) -> int:
    """Half of the rows that did not fit, for another try.

    Raises MemoryError if it was one row, or if the other processes of --shard would have to halve
    theirs, too.
    """
    if rows == 1 or SHARDED:
        raise MemoryError(reason)
    print(f"{rows} rows at a time do not fit the memory; trying {rows // 2} from now on")
    return rows // 2
