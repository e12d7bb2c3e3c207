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
from support.processes import SHARDED, dealers, my_parts, shard
from support.tiny import write_base
from test_cetrec import batch_of
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


def started(N: int, flags: list[str], **how) -> subprocess.Popen:
    """torchrun with so many processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(N),
         "--master_port", str(20_000 + os.getpid() % 9_000 + N), ROOT / "cetrec.py", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, **how)


def losses_of(run: Path) -> dict:
    """(step, name) -> loss."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {(line["step"], key): value for line in lines for key, value in line.items()
            if "loss" in key or key == "validation_ta"}


def check_same_run(one: Path, other: Path) -> None:
    """Losses within 1e-5 at every step; validation, metrics and effect equal to rounding."""
    assert losses_of(one) == pytest.approx(losses_of(other), abs=1e-5)
    here, there = (json.loads((run / "run.json").read_text()) for run in (one, other))
    for row, values in here["rows"].items():
        for metric, value in values.items():
            assert value == pytest.approx(there["rows"][row][metric], nan_ok=True, abs=1e-6), row
    assert here["effect"] == pytest.approx(there["effect"], abs=1e-5)


def test_three_processes_make_the_run_of_one(world, alone, tmp_path):
    """With batches, a validation split and users that cannot be dealt out evenly."""
    process = started(3, [*world, "--out", str(tmp_path)])
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert out.count("step     1/") == 1 and out.count("written ") == 1     # one of them prints
    run, = (path for path in tmp_path.iterdir())
    check_same_run(run, alone)
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert json.loads((run / "run.json").read_text())["versions"]["processes"] == "3"


def test_a_process_that_dies_ends_the_others_and_one_alone_goes_on(world, alone, tmp_path):
    """What two processes with sharded weights did before the break are the losses of one, too."""
    process = started(2, [*world, "--shard", "--out", str(tmp_path)])
    deadline, log = time.monotonic() + 100, None
    while time.monotonic() < deadline and not (log and '"step": 7,' in log.read_text()):
        time.sleep(0.01)
        log = next(tmp_path.glob("*/log.jsonl"), None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 30
    assert "SIGKILL" in error                           # torchrun says which process died and how
    run = log.parent
    assert (run / "checkpoint.safetensors").is_file()
    assert "rows" not in json.loads((run / "run.json").read_text())
    assert cetrec.main(["--resume", str(run)]) == 0
    check_same_run(run, alone)


def test_frozen_weights_are_sharded_and_factors_are_not(temporal, tmp_path, tokenizer):
    """On a mesh of one, where the halves are wholes, what is computed is the same, bit for bit."""
    model, batch = temporal("rope"), batch_of(tokenizer, 3, 4, 3)
    factors = add_lora(model.llama)
    plain = cetrec.cetrec_loss(model, batch, 0.1)
    wanted = torch.autograd.grad(plain[0], factors, allow_unused=True)
    with pytest.raises(ValueError, match="--shard wants several processes"):
        shard(model, torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard(model, torch.device("cpu"))
        losses = cetrec.cetrec_loss(model, batch, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(losses, plain))
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(losses[0], factors),
                                                     wanted))
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
        assert share == len(part.targets) / len(batch.targets)
        assert len(part.tokens) <= rows
    targets = torch.cat([part.targets for part, _ in used]).sort().values
    assert torch.equal(targets, batch.targets.sort().values)
