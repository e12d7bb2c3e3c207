"""support/processes.py: several real processes make the same run as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import small_config

import cetrec
from llama import Llama
from lora import add_lora
from support.processes import SHARDED, dealers, my_parts, seed_dropout, shard
from support.tiny import write_base
from test_cetrec import batch_of, log_of, targets_of
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parent.parent
FLAGS = ["--device", "cpu", "--batch-size", "7", "--epochs", "2", "--max-steps", "18",
         "--eval-sequences", "7", "--lists", "titles", "--lora-dropout", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> list[str]:
    """Flags that name a small base and data of 64 training sequences: a last batch of one."""
    folder = tmp_path_factory.mktemp("world")
    write_base(Llama(small_config(vocab_size=tokenizer.bpe.get_vocab_size())), tokenizer, folder)
    rng = np.random.default_rng(0)
    rows = [f"{user},{item},{1000 * place + user}\n" for user in range(16)
            for place, item in enumerate(rng.permutation(13)[:8])]
    (folder / "interactions.csv").write_text("user,item,time\n" + "".join(rows))
    (folder / "items.csv").write_text("item,title\n" + "".join(
        f"{item},Film of {'many ' * (item % 4)}{item}\n" for item in range(13)))
    return ["--data", str(folder), "--model", str(folder), *FLAGS]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert cetrec.main([*world, "--out", str(out)]) == 0
    return next(out.iterdir())


def started(N: int, flags: list[str]) -> subprocess.Popen:
    """The command in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(N)]
    return subprocess.Popen(
        [sys.executable, *(torchrun if N > 1 else []), ROOT / "cetrec.py", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def finished(N: int, flags: list[str]) -> str:
    """What the command prints in so many processes."""
    process = started(N, flags)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    return out


def children_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started; each is a session of its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return list(map(int, children.read_text().split()))


def step_reached(step: int, out: Path) -> Path:
    """Wait until the run below `out` has logged a step. Returns its folder."""
    deadline, log = time.monotonic() + 100, None
    while time.monotonic() < deadline and not (log and f'"step": {step},' in log.read_text()):
        time.sleep(0.01)
        log = next(out.glob("*/log.jsonl"), None)
    return log.parent


def losses_of(run: Path) -> dict:
    """(step, name) -> loss."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {(line["step"], key): value for line in lines for key, value in line.items()
            if "loss" in key or key == "validation_ta"}


def check_same_run(one: Path, other: Path) -> None:
    """Losses within 1e-5 at every step; validation, metrics and effect equal to rounding."""
    assert losses_of(one) == pytest.approx(losses_of(other), abs=1e-5)
    ours, theirs = (json.loads((run / "run.json").read_text()) for run in (one, other))
    for row, values in ours["rows"].items():
        for metric, value in values.items():
            assert value == pytest.approx(theirs["rows"][row][metric], nan_ok=True, abs=1e-6), row
    assert ours["effect"] == pytest.approx(theirs["effect"], abs=1e-5)


def test_three_processes_make_the_run_of_one(world, alone, tmp_path):
    """With batches, a validation split and users that cannot be dealt out evenly."""
    out = finished(3, [*world, "--out", str(tmp_path)])
    assert out.count("step     1/") == 1 and out.count("written ") == 1     # one of them prints
    run, = tmp_path.iterdir()
    check_same_run(run, alone)
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert json.loads((run / "run.json").read_text())["versions"]["processes"] == "3"


def test_a_process_that_dies_ends_the_others_and_one_alone_goes_on(world, alone, tmp_path):
    """What two processes with sharded weights did before the break are the losses of one, too."""
    process = started(2, [*world, "--shard", "--recompute", "--out", str(tmp_path)])
    run = step_reached(7, tmp_path)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    killed = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 30
    assert "SIGKILL" in error                           # torchrun says which process died and how
    assert (run / "checkpoint.safetensors").is_file()
    assert "rows" not in json.loads((run / "run.json").read_text())
    assert cetrec.main(["--resume", str(run)]) == 0
    check_same_run(run, alone)


@pytest.mark.parametrize("N", [1, 2])
def test_a_killed_run_goes_on_to_the_same_factors_and_log_bit_for_bit(world, tmp_path, N):
    """All its processes die at once and without a warning, and dropout differs between them."""
    flags = [*world, "--lora-dropout", "0.1"]
    process = started(N, [*flags, "--out", str(tmp_path / "killed")])
    run = step_reached(4, tmp_path / "killed")
    for victim in (process.pid, *children_of(process)):
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=60)
    assert (run / "checkpoint.safetensors").is_file()
    assert "rows" not in json.loads((run / "run.json").read_text())
    for argv in (["--resume", str(run)], [*flags, "--out", str(tmp_path / "whole")]):
        if N > 1:
            finished(N, argv)
        else:
            assert cetrec.main(argv) == 0
    whole, = (tmp_path / "whole").iterdir()
    assert log_of(run) == log_of(whole)
    for name in ("adapter_model.safetensors", "evaluation.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_dropout_depends_on_the_seed_the_step_and_the_process(monkeypatch):
    drawn = []
    for seed, step, rank in ((0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)):
        monkeypatch.setattr("support.processes.rank", lambda rank=rank: rank)
        seed_dropout(seed, step)
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] and len(set(map(tuple, drawn))) == 4


def test_frozen_weights_are_sharded_and_factors_are_not(temporal, tmp_path, tokenizer):
    """On a mesh of one, where the halves are wholes, what is computed is the same, bit for bit."""
    model, batch = temporal("rope"), batch_of(tokenizer, 3, 4, 3)
    factors = add_lora(model.llama)
    plain = cetrec.cetrec_loss(model, batch, 0.1)
    expected = torch.autograd.grad(plain[0], factors, allow_unused=True)
    with pytest.raises(ValueError, match="--shard wants several processes"):
        shard(model, torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard(model, torch.device("cpu"))
        losses = cetrec.cetrec_loss(model, batch, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(losses, plain))
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(losses[0], factors),
                                                     expected))
        for name, p in model.llama.layers.named_parameters():
            assert isinstance(p, DTensor) == (not p.requires_grad), name
        assert not any(isinstance(p, DTensor) for p in (*factors, model.llama.norm.weight))
        assert dealers() == (0, 1)
    finally:
        SHARDED.clear()
        dist.destroy_process_group()


@pytest.mark.parametrize("N, rows, parts", [(1, 2, [3]), (2, 2, [2, 2]), (2, 9, [1, 1]),
                                            (3, 1, [2, 2, 2]), (7, 9, [1] * 7)])
def test_parts_are_dealt_out_evenly_and_their_shares_add_up_to_one(monkeypatch, tokenizer, N, rows,
                                                                   parts):
    """Five rows. Whoever gets none works on a part at share 0, so that all do as many passes."""
    batch, dealt = batch_of(tokenizer, 3, 4, 3, 5, 6), []
    monkeypatch.setattr("support.processes.processes", lambda: N)
    for rank in range(N):
        monkeypatch.setattr("support.processes.rank", lambda rank=rank: rank)
        dealt.append(my_parts(batch, rows))
    assert [len(own) for own in dealt] == parts
    used = [(part, share) for own in dealt for part, share in own if share > 0]
    assert sum(share for _, share in used) == pytest.approx(1)
    assert sum(len(part.tokens) for part, _ in used) == 5
    for part, share in used:
        assert share == len(targets_of(part)) / len(targets_of(batch))
        assert len(part.tokens) <= rows
    targets = torch.cat([targets_of(part) for part, _ in used]).sort().values
    assert torch.equal(targets, targets_of(batch).sort().values)
