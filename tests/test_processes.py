"""support/processes.py: several real processes make the same run as one."""

import json
import os
import re
import signal
import socket
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
from support.processes import (SHARDED, check_devices, dealers, joined, least, my_parts,
                               seed_dropout, shard)
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
    assert ours["effect"] == pytest.approx(theirs["effect"], nan_ok=True, abs=1e-5)


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


# ------------------------------------------------------------ Who is there


@pytest.fixture
def told(monkeypatch):
    """Puts variables into the environment, from which all that processes are told are gone."""
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"

    def tell(**variables: str) -> None:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return tell


TWO = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables, wrong", [
    ({"RANK": ""}, "RANK is ''; wanted a whole number from 0 to 0. Of several"),
    ({"RANK": "abc"}, "RANK is 'abc'"), ({"RANK": "3"}, "RANK is '3'"), ({"RANK": "-1"}, "RANK is"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is '1'"), ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''; wanted a whole number from 1 to"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"), ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
    (TWO | {"RANK": "2"}, "RANK is '2'; wanted a whole number from 0 to 1"),
    (TWO | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    (TWO | {"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
    (TWO | {"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_PORT is not set"),
    (TWO | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set")])
def test_a_variable_that_is_wrong_is_named_before_anything_is_done(told, variables, wrong):
    told(**variables)
    with pytest.raises(ValueError, match=f"^the environment variable {re.escape(wrong)}") as raised:
        with joined():
            pytest.fail("it went on")
    assert "torchrun tells each its RANK" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["not set", "'x'", "'2'"])
def test_on_gpus_the_local_rank_must_be_one_of_them(told, monkeypatch, wrong):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told(**TWO, **({} if wrong == "not set" else {"LOCAL_RANK": wrong.strip("'")}))
    with pytest.raises(ValueError, match=f"LOCAL_RANK is {wrong}; wanted .* from 0 to 1"):
        with joined():
            pytest.fail("it went on")


@pytest.mark.parametrize("N, here, gpus, fits", [(2, "2", 1, False), (2, "2", 2, True),
                                                 (4, "2", 2, True), (1, None, 1, True)])
def test_processes_do_not_share_a_gpu(told, monkeypatch, N, here, gpus, fits):
    """They may share the CPUs of a machine with one GPU: only who takes GPUs asks."""
    told(**({"LOCAL_WORLD_SIZE": here} if here else {}))
    monkeypatch.setattr("support.processes.processes", lambda: N)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if fits:
        check_devices()
    else:
        with pytest.raises(ValueError, match="2 processes on a machine with 1 GPUs: every process"):
            check_devices()


def test_the_least_number_of_one_process_is_its_own():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert least(7) == 7
    finally:
        dist.destroy_process_group()
    assert least(5) == 5


def test_what_a_cluster_leaves_in_the_environment_does_not_matter_to_one_process(told):
    told(SLURM_PROCID="3", SLURM_NTASKS="4", LOCAL_RANK="x", MASTER_ADDR="q", MASTER_PORT="zz")
    with joined() as number:
        assert number == 0 and not dist.is_initialized()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_finds_no_others_gives_up(told, monkeypatch, rank):
    monkeypatch.setattr("support.processes.PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    told(**TWO | {"RANK": rank, "MASTER_PORT": str(port)})
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"process {rank} of 2 did not find the others at "
                                         f"127.0.0.1:{port} within 1 s .no answer"):
        with joined():
            pytest.fail("it went on")
    assert time.monotonic() - began < 10


def test_an_address_that_is_none_is_named_at_once(told):
    told(**TWO | {"MASTER_ADDR": "a..b"})
    with pytest.raises(ValueError, match="did not find the others at a..b:29500 .*idna"):
        with joined():
            pytest.fail("it went on")


def test_a_wrong_variable_is_one_line_of_a_real_command():
    done = subprocess.run([sys.executable, "cetrec.py"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"RANK": "abc"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the environment variable RANK is 'abc'; wanted")


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
        with torch.no_grad():
            cetrec.cetrec_loss(model, batch, 0.1)
        for name, p in model.llama.layers.named_parameters():       # sharded again after use
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
    assert torch.equal(torch.cat([targets_of(part) for part, _ in used]), targets_of(batch))
    # A process has the same rows whatever the size of a part, so it may halve its own alone.
    assert torch.equal(torch.cat([targets_of(p) for p, share in my_parts(batch, 1) if share > 0] or
                                 [targets_of(batch)[:0]]),
                       torch.cat([targets_of(p) for p, share in dealt[-1] if share > 0] or
                                 [targets_of(batch)[:0]]))
