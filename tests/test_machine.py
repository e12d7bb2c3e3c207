"""support/machine.py: the device, kernels, compiled blocks, and how many rows fit the memory."""

import resource
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import small_config

from cetrec import TemporalLlama, cetrec_loss
from data import NO_ITEM, Batch
from llama import Llama
from lora import add_lora
from support import machine
from support.machine import (backward_bytes, choose_device, choose_kernels, compile_pays,
                             fewer_rows, missing_to_compile, peak_memory, rows_that_fit)
from support.options import Options
from support.processes import SHARDED

ML_100K = {"data": "ml-100k"}


@pytest.mark.parametrize("cuda, half, mps, device, dtype, expected", [
    (False, False, False, "auto", "auto", ("cpu", torch.float32)),
    (False, False, True, "auto", "auto", ("mps", torch.float32)),
    (True, True, True, "auto", "auto", ("cuda", torch.bfloat16)),
    (True, False, False, "auto", "auto", ("cuda", torch.float16)),
    (True, True, False, "cpu", "auto", ("cpu", torch.float32)),
    (True, True, False, "cuda", "float32", ("cuda", torch.float32)),
    (False, False, False, "auto", "bfloat16", ("cpu", torch.bfloat16)),
    (False, False, False, "auto", "stored", ("cpu", None))])
def test_the_device_and_the_precision(cuda, half, mps, device, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: half or including_emulation)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    found = choose_device(Options.from_flags({"device": device, "dtype": dtype} | ML_100K))
    assert found == (torch.device(expected[0]), expected[1])


@pytest.mark.parametrize("flags, kind", [({}, "cpu"), ({"device": "cuda"}, "cuda"),
                                         (ML_100K, "cuda"), ({"model": "someone/llama"}, "cuda")])
def test_auto_leaves_the_default_run_on_the_cpu_and_says_so(flags, kind, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_device(Options.from_flags(flags))[0].type == kind
    printed = capsys.readouterr().out
    assert ("auto takes the CPU, which is faster than a GPU" in printed) == (not flags)


def test_a_device_that_is_not_there_and_a_compiler_that_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: this PyTorch sees no such device; use"):
        choose_device(Options.from_flags({"device": "cuda"}))
    compiling = Options.from_flags({"device": "cpu", "compile": True})
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="--compile wants a C.. compiler, here no-such-compiler"):
        choose_device(compiling)
    monkeypatch.setenv("CXX", sys.executable)
    assert choose_device(compiling)[0].type == "cpu"


@pytest.mark.parametrize("device, steps, flags, found, expected", [
    ("cuda", 1_000, {}, True, True), ("cuda", 999, {}, True, False),
    ("cpu", 9_999, {}, True, False), ("cuda", 9_999, {}, False, False),
    ("cuda", 9_999, {"compile": False}, True, False),
    ("cpu", 1, {"compile": True}, True, True), ("cuda", 9_999, {"recompute": True}, True, False)])
def test_blocks_are_compiled_on_gpus_in_long_runs_and_where_it_is_said(device, steps, flags, found,
                                                                       expected, monkeypatch):
    monkeypatch.setattr(machine, "missing_to_compile", lambda kind: "" if found else "triton")
    options = Options.from_flags(flags)
    assert compile_pays(options, torch.device(device), steps) == expected


@pytest.mark.parametrize("missing", ["", "triton", "gcc", "headers", "capability"])
def test_what_the_compiler_wants_on_a_gpu_is_looked_for(missing, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != missing)
    monkeypatch.setattr("shutil.which", lambda name: None if missing == "gcc" else name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(
        tmp_path / "none" if missing == "headers" else tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda: (6, 1) if missing == "capability" else (7, 0))
    assert bool(missing_to_compile("cuda")) == bool(missing)


# ------------------------------------------------------------ Precision of logits on a GPU


def as_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 numbers with ten bits of mantissa, the other thirteen being cut off."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype, exact", [(torch.bfloat16, True), (torch.float16, True),
                                          (torch.float32, False)])
def test_numbers_of_half_precision_are_exact_in_tf32(dtype, exact):
    """So a product of them in TF32 differs from one in float32 by the order of its sum only."""
    x = torch.randn(100_000).to(dtype).float()
    assert torch.equal(as_tf32(x), x) == exact
    smallest = torch.tensor([2.0**-24]).to(dtype).float()               # subnormal in float16
    assert torch.equal(as_tf32(smallest), smallest)


@pytest.mark.parametrize("device, dtype, expected", [
    ("cuda", torch.bfloat16, "high"), ("cuda", torch.float16, "high"),
    ("cuda", torch.float32, "highest"), ("cpu", torch.bfloat16, None)])
def test_kernels_are_chosen_for_gpus_only(device, dtype, expected, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", set_to.append)
    choose_kernels(torch.device(device), dtype)
    assert set_to == ([False, expected] if expected else [])


# ------------------------------------------------------------ Memory


@pytest.mark.parametrize("platform, device, expected", [
    ("linux", "cpu", 2.048), ("darwin", "cpu", 0.002), ("linux", "cuda", 7.5)])
def test_peak_memory_is_in_gigabytes_everywhere(platform, device, expected, monkeypatch):
    """Linux says how many times 1,024 bytes a process took at most, and macOS says bytes."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2_000_000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_500_000_000)
    assert peak_memory(torch.device(device)) == pytest.approx(expected)


def plain_batch(rows: int, tokens: int, prefix: int, answer: int) -> Batch:
    """Rows of so many tokens, those of a common prefix and of the answer included."""
    T = tokens - prefix
    ones = torch.ones(rows, T, dtype=torch.long)
    return Batch(ones[0, :prefix], ones, torch.full((rows, T), NO_ITEM), ones[:, 0] * 0,
                 ones[:, :answer])


def llama_of(device="meta", dtype=torch.float32, **sizes) -> Llama:
    with torch.device(device):
        return Llama(small_config(**sizes)).to(dtype)


SHAPE_135M = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536,
              "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
              "head_dim": 64}
SHAPE_8B = {"vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128}


def test_rows_that_fit_a_cpu_keep_the_widest_activation_near_a_million_numbers():
    llama, long = llama_of(**SHAPE_135M), plain_batch(64, 200, 30, 10)
    # (two worlds) x (200 - 30 tokens) x (an inner width of 1,536) is 522,240 numbers a row
    assert rows_that_fit(llama, long) == 1 and rows_that_fit(llama, long, worlds=1) == 3
    assert rows_that_fit(llama, plain_batch(64, 60, 30, 10)) == 10
    # a row that is larger than that is still worked on
    llama.config = replace(llama.config, intermediate_size=10**7)
    assert rows_that_fit(llama, long) == 1
    # the whole batch, where the shape is tiny
    assert rows_that_fit(llama_of(), plain_batch(64, 40, 10, 5)) >= 64


def kept_by_autograd(llama: Llama, batch: Batch) -> int:
    """Bytes of all storages that the graph of a twin loss keeps, the model's own left out."""
    model, sizes = TemporalLlama(llama, "rope").train(), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes(), storage       # so no address comes twice
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        cetrec_loss(model, batch, 0.1)
    return sum(size for address, (size, _) in sizes.items() if address not in weights)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "o_proj", "down_proj")])
@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 1, "hidden_size": 160},
                                   {"intermediate_size": 20, "head_dim": 32}])
def test_what_a_row_keeps_is_what_autograd_keeps(sizes, targets):
    """Counted for four rows more, in float32, in which a CPU's kernels keep what a GPU's do."""
    llama = llama_of("cpu", **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 200,
                               "num_hidden_layers": 24} | sizes)
    add_lora(llama, targets=targets, dropout=0)
    few, more = (kept_by_autograd(llama, plain_batch(rows, 120, 30, 4)) for rows in (2, 6))
    predicted, shared = backward_bytes(llama, plain_batch(2, 120, 30, 4))
    assert predicted == pytest.approx((more - few) / 4, rel=0.15)
    assert 2 * predicted + shared == pytest.approx(few, rel=0.15)
    halved, _ = backward_bytes(llama.bfloat16(), plain_batch(2, 120, 30, 4))
    assert halved == pytest.approx(predicted / 2, rel=0.1)      # but for the logits


@pytest.mark.parametrize("shape, rows, compiled, measured", [
    (SHAPE_8B, 40, False, 89), (SHAPE_8B, 16, True, 36), (SHAPE_135M, 64, True, 9.7 + 0.3)])
def test_predicted_peaks_are_near_those_measured_on_a_gpu(shape, rows, compiled, measured):
    """One H200, bfloat16, prompts of 205 tokens with 45 in common, GB with the weights."""
    llama = llama_of(dtype=torch.bfloat16, tie_word_embeddings=shape is SHAPE_135M, **shape)
    add_lora(llama)
    weights = sum(p.numel() * p.itemsize for p in llama.parameters())
    row, shared = backward_bytes(llama, plain_batch(rows, 205, 45, 10), compiled=compiled)
    assert (weights + shared + rows * row) / 1e9 == pytest.approx(measured, rel=0.2)


@pytest.fixture
def gpu(monkeypatch):
    """A card of 80 GB: 60 GB are free, and of 12 GB that PyTorch has reserved 2 GB are unused."""
    free = SimpleNamespace(bytes=60e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free.bytes, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10e9)
    return free


def test_rows_that_fit_a_gpu_fill_four_fifths_of_what_is_free(gpu):
    llama, batch = llama_of(dtype=torch.bfloat16, **SHAPE_135M), plain_batch(64, 200, 30, 10)
    del llama.embed_tokens                          # this PyTorch cannot put its weight on a GPU
    object.__setattr__(llama, "embed_tokens", SimpleNamespace(weight=SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16)))
    for how in ({}, {"worlds": 1}, {"compiled": True}, {"recompute": True}):
        row, shared = backward_bytes(llama, batch, **how)
        rows = rows_that_fit(llama, batch, **how)
        assert rows * row + shared <= 0.8 * 62e9 < (rows + 1) * row + shared
    assert rows_that_fit(llama, batch, recompute=True) > 4 * rows_that_fit(llama, batch)
    gpu.bytes = 0
    assert rows_that_fit(llama, batch) >= 1
    gpu.bytes = -2e9
    assert rows_that_fit(llama, batch) == 1


def test_rows_that_did_not_fit_are_halved_unless_it_is_one_or_weights_are_sharded(capsys):
    assert fewer_rows(9, "why") == 4
    assert capsys.readouterr().out.startswith("9 rows at a time do not fit the memory; trying 4")
    with pytest.raises(MemoryError, match="why"):
        fewer_rows(1, "why")
    SHARDED.append(True)
    try:
        with pytest.raises(MemoryError, match="why"):
            fewer_rows(9, "why")
    finally:
        SHARDED.clear()
