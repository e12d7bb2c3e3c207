"""support/progress.py: the log, the checkpoint, and what keeps two processes apart."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support.files import locked
from support.progress import (Progress, begin, begin_log, load_checkpoint, log_step,
                              log_validation, save_checkpoint)
from support.runs import new_folder

CPU = torch.device("cpu")


def optimizer_of(*values: float, stepped: bool = True) -> torch.optim.AdamW:
    """An optimizer of factors of two numbers each, which may have made a step."""
    factors = [torch.nn.Parameter(torch.full((2,), value)) for value in values]
    optimizer = torch.optim.AdamW(factors)
    for p in factors if stepped else ():
        p.grad = torch.ones(2)
    optimizer.step()
    return optimizer


def tensors_of(optimizer) -> list[list[float]]:
    """Factors and their moments."""
    factors = optimizer.param_groups[0]["params"]
    return [x.tolist() for p in factors
            for x in (p.detach(), *(optimizer.state[p].values() if p in optimizer.state else ()))]


def steps(folder, total: int, losses=(3.0, 2.0, 10.0), stop: int | None = None) -> list[int]:
    """Log the next steps, up to `stop`, and write a checkpoint. Returns the steps after which one
    was due."""
    done, due = load_checkpoint(folder, optimizer_of(1.0)), []
    with begin(folder, done, total) as bar:
        while done.step < (stop or total):
            done.step += 1
            if log_step(folder, bar, done, torch.tensor(losses), 0.1, 1e-3):
                due.append(done.step)
        save_checkpoint(folder, optimizer_of(1.0), done)
    return due


def test_the_log_has_a_line_for_each_step_and_each_validation(tmp_path, capsys):
    done = Progress(validation=[0.9, 0.7])
    with begin(tmp_path, done, 10) as bar:
        for step in (1, 2):
            done.step = step
            log_step(tmp_path, bar, done, torch.tensor([3.0, 2.0, 10.0]), 0.1, 1e-3)
        assert log_validation(tmp_path, bar, done)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("ms") >= 0 for line in lines[:2])
    values = {"loss": 3.0, "loss_ta": 2.0, "loss_ct": 10.0, "lr": 1e-3}
    assert lines == [{"step": 1} | values, {"step": 2} | values, {"step": 2, "validation_ta": 0.7}]
    text = capsys.readouterr().out
    assert re.search(r"^step     2/10 \| loss 3.000 = ta 2.000 \+ 0.1 x ct 10.000 \| lr 1.0e-03 "
                     r"\| \d+ ms \| \d+\.\d GB \| \d+\.\d min left$", text, flags=re.MULTILINE)
    assert "epoch 2 | validation ta 0.7000 | best so far, adapter saved\n" in text


def test_with_lambda_0_there_is_one_loss(tmp_path, capsys):
    steps(tmp_path, 2, losses=(2.0, 2.0))
    assert "step     2/2 | loss 2.000 | lr" in capsys.readouterr().out
    assert '"loss_ct": null' in (tmp_path / "log.jsonl").read_text()


def test_an_epoch_that_is_no_better_is_not_the_best(tmp_path, capsys):
    done = Progress(validation=[0.9, 0.8, 0.85])
    with begin(tmp_path, done, 9) as bar:
        assert not log_validation(tmp_path, bar, done)
    assert "epoch 3 | validation ta 0.8500 | no better than before, so tuning stops\n" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("total, printed", [
    (150, [1, 30, 60, 90, 120, 150]), (3, [1, 2, 3]), (1, [1]),
    (104, [1, 20, 40, 60, 80, 100, 104])])
def test_a_line_is_printed_for_the_first_step_every_fifth_of_all_and_the_last(tmp_path, capsys,
                                                                              total, printed):
    """That is when a checkpoint is due, too."""
    assert steps(tmp_path, total) == printed
    text = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"^step +(\d+)/", text, flags=re.MULTILINE)] == printed


def test_a_checkpoint_is_due_when_the_last_one_is_a_minute_old(tmp_path):
    done = Progress(step=1)
    with begin(tmp_path, done, 100) as bar:
        for age, due in ((50, False), (61, True)):
            done.step, done.saved = done.step + 1, time.perf_counter() - age
            assert log_step(tmp_path, bar, done, torch.ones(2), 0, 1e-3) == due
        save_checkpoint(tmp_path, optimizer_of(1.0), done)
        assert not log_step(tmp_path, bar, done, torch.ones(2), 0, 1e-3)


@pytest.mark.parametrize("lost, left", [("all of it", [3]), ("half a line", [1, 3]),
                                        ("nothing", [1, 2, 3])])
def test_a_log_that_has_lost_lines_goes_on_with_whole_ones(tmp_path, capsys, lost, left):
    steps(tmp_path, 3, stop=2)
    path = tmp_path / "log.jsonl"
    if lost == "all of it":
        path.unlink()
    elif lost == "half a line":
        path.write_bytes(path.read_bytes()[:-9])
    steps(tmp_path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == left
    assert ("log.jsonl has lost some of the" in capsys.readouterr().out) == (lost != "nothing")


def test_a_log_that_is_ahead_of_the_checkpoint_is_cut_back(tmp_path):
    steps(tmp_path, 9, stop=2)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 3}\n{"st')
    steps(tmp_path, 9, stop=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def checkpointed(folder, optimizer, **progress) -> None:
    """Write a checkpoint."""
    done = Progress(**progress)
    begin_log(folder, done)
    save_checkpoint(folder, optimizer, done)


def test_a_checkpoint_brings_back_factors_moments_and_progress(tmp_path):
    """Also of a factor that no step had a gradient for."""
    optimizer = optimizer_of(1.0, 2.0)
    optimizer.state.pop(optimizer.param_groups[0]["params"][1])
    best = [torch.tensor([7.0, 8.0]), torch.tensor([9.0, 9.5])]
    checkpointed(tmp_path, optimizer, step=1, validation=[0.9, 0.8], best=best, seconds=100.0)
    again = optimizer_of(5.0, 6.0, stepped=False)
    done = load_checkpoint(tmp_path, again)
    assert tensors_of(again) == tensors_of(optimizer)
    assert (done.step, done.validation) == (1, [0.9, 0.8])
    assert all(torch.equal(a, b) for a, b in zip(done.best, best, strict=True))
    assert 100 < done.total_seconds() < 150             # the time before the break counts


def test_without_a_checkpoint_tuning_begins(tmp_path):
    optimizer = optimizer_of(1.0)
    before = tensors_of(optimizer)
    assert load_checkpoint(tmp_path, optimizer).step == 0 and tensors_of(optimizer) == before


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    """In every tensor, and in what is noted beside them."""
    checkpointed(tmp_path, optimizer_of(1.0), step=1, validation=[0.5], best=[torch.ones(2)])
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for place in (whole.index(b"validation"), whole.index(b"0.5"), *range(
            len(whole) - 24, len(whole), 8)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        with pytest.raises(ValueError, match="checkpoint.safetensors: damaged"):
            load_checkpoint(tmp_path, optimizer_of(1.0))
    path.write_bytes(whole)
    assert load_checkpoint(tmp_path, optimizer_of(1.0)).validation == [0.5]


def test_two_at_once_get_two_folders_but_do_not_work_on_one(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: new_folder(tmp_path, "run"), range(40)))
    assert sorted(folders) == sorted(tmp_path / f"run-{n}" for n in range(1, 41))

    def waits():
        with locked(tmp_path, wait=True):
            return "its turn"
    with ThreadPoolExecutor(1) as thread:
        with locked(tmp_path):
            with pytest.raises(ValueError, match="another process is at work on this folder"):
                with locked(tmp_path):
                    pass
            waiting = thread.submit(waits)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
        assert waiting.result(timeout=30) == "its turn"

