"""How much memory a process has used, and how many rows of a batch fit into what there is."""

import resource
import sys

import torch

from data import Batch
from llama import LlamaConfig


def peak_memory(device: torch.device) -> float:
    """GB: peak allocated on a GPU, else the peak of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024          # ru_maxrss: bytes on macOS, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def rows_that_fit(config: LlamaConfig, batch: Batch, device: torch.device, worlds: int = 2,
                  recompute: bool = False) -> int:
    """How many rows of a batch to tune on at a time, so that memory stays bounded.

    On CUDA devices it is the number for which the backward pass keeps a third of the memory: about
    ten widths and four inner widths of each token in each block (of one block, where blocks are
    recomputed), and six times the logits of the answers. Elsewhere it is the number for which the
    widest activation of a block has about a million numbers. The allocator keeps blocks of that
    size for the next tensor instead of returning them to the system, so small parts cost no time.
    """
    C, inner, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    T, A = batch.tokens.shape[1], batch.answers.shape[1]
    if device.type != "cuda":
        return max(1, 10**6 // (worlds * T * inner))
    block = 10 * C + 4 * inner
    of_row = worlds * (T * (L * C + block if recompute else L * block) + 6 * A * config.vocab_size)
    return max(1, torch.cuda.get_device_properties(device).total_memory // (3 * 4 * of_row))
