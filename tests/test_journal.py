"""support/journal.py: logs, checkpoints, and going on after a break."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from support.journal import Journal
from support.runs import new_folder


def journal(folder: Path, total: int, lambda_ct: float = 0.1) -> Journal:
    """A journal of one factor, whose optimizer has made a step."""
    factor = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([factor])
    factor.grad = torch.ones(2)
    optimizer.step()
    return Journal(folder, optimizer, np.random.default_rng(0), total, lambda_ct, None)


def tune(book: Journal, batches: int, losses, save=lambda: None, one=(3.0, 2.0, 10.0)) -> list:
    """The loop as train has it: epochs of so many batches, validated with the given losses."""
    seen, losses = [], iter(losses)
    with book:
        while book.goes_on():
            for batch in book.epoch(lambda: iter(range(batches))):
                seen.append(batch)
                book.note(1e-3, [x if x is None else torch.tensor(x) for x in one])
            book.validated(next(losses), save)
    return seen


def printed_steps(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^step +(\d+)/", text, flags=re.MULTILINE)]


def test_an_epoch_stops_at_the_last_step_and_the_log_has_a_line_for_each(tmp_path, capsys):
    book, saved = journal(tmp_path, total=10), []
    seen = tune(book, 4, [0.9, 0.8, 0.7], lambda: saved.append(book.step))
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1] and saved == [4, 8, 10]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 10]
    assert lines[4] == {"step": 4, "validation_ta": 0.9}
    assert {key: lines[0][key] for key in ("loss", "loss_ta", "loss_ct", "lr")} == {
        "loss": 3.0, "loss_ta": 2.0, "loss_ct": 10.0, "lr": 1e-3} and lines[0]["ms"] >= 0
    record = book.record()
    assert record["steps"] == 10 and record["validation_ta"] == [0.9, 0.8, 0.7]
    assert record["seconds"] > 0 and 0 <= record["share_waiting_for_data"] <= 1
    text = capsys.readouterr().out
    assert re.search(r"^step     2/10 \| loss 3.000 = ta 2.000 \+ 0.1 x ct 10.000 \| lr 1.0e-03 "
                     r"\| \d+ ms \| \d+\.\d GB \| \d+\.\d min left$", text, flags=re.MULTILINE)
    assert "epoch 3 | validation ta 0.7000 | best so far, adapter saved\n" in text


@pytest.mark.parametrize("total, wanted", [
    (150, [1, 30, 60, 90, 120, 150]), (3, [1, 2, 3]), (1, [1]),
    (104, [1, 20, 40, 60, 80, 100, 104])])
def test_a_line_is_printed_for_the_first_step_every_fifth_of_all_and_the_last(tmp_path, capsys,
                                                                              total, wanted):
    tune(journal(tmp_path, total), 1_000, [1.0])
    assert printed_steps(capsys.readouterr().out) == wanted


@pytest.mark.parametrize("lost", ["all of it", "half a line", "nothing"])
def test_a_log_that_has_lost_lines_goes_on_with_whole_ones(tmp_path, capsys, lost):
    book = journal(tmp_path, 3)
    with book:
        for _ in book.epoch(lambda: iter(range(9))):
            if book.step == 2:
                break
            book.note(1e-3, [torch.tensor(1.0)] * 3)
        book._save()
    path = tmp_path / "log.jsonl"
    if lost == "all of it":
        path.unlink()
    elif lost == "half a line":
        path.write_bytes(path.read_bytes()[:-9])
    tune(journal(tmp_path, 3), 9, [1.0])
    steps = [json.loads(line).get("step") for line in path.read_text().splitlines()]
    assert steps == {"all of it": [3, 3], "half a line": [1, 3, 3], "nothing": [1, 2, 3, 3]}[lost]
    assert ("log.jsonl has lost some of the" in capsys.readouterr().out) == (lost != "nothing")


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    """In every tensor and in both notes."""
    with journal(tmp_path, 9) as book:
        book.sampling = book.rng.bit_generator.state
        book._save()
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    places = [whole.index(b"PCG64"), whole.index(b"waited"), *range(len(whole) - 40, len(whole), 8)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        with pytest.raises(ValueError, match="checkpoint.safetensors: damaged"):
            journal(tmp_path, 9)
    path.write_bytes(whole)
    journal(tmp_path, 9).log.close()


def test_two_at_once_get_two_folders_but_not_one_journal(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: new_folder(tmp_path, "run"), range(40)))
    assert sorted(made) == sorted(tmp_path / f"run-{n}" for n in range(1, 41))
    with journal(tmp_path, 9):
        with pytest.raises(ValueError, match="another process is at work on this folder"):
            journal(tmp_path, 9)
    journal(tmp_path, 9).log.close()


def test_a_factor_that_no_step_had_a_gradient_for_is_kept_too(tmp_path):
    def two_factors() -> Journal:
        one, other = (torch.nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0))
        optimizer = torch.optim.AdamW([one, other])
        one.grad = torch.ones(2)
        optimizer.step()
        return Journal(tmp_path, optimizer, np.random.default_rng(0), 9, 0.1, None)
    with two_factors() as book:
        book.factors[1].data.fill_(5.0)
        book.sampling = book.rng.bit_generator.state
        book._save()
    with two_factors() as again:
        assert again.factors[1].tolist() == [5.0, 5.0]
        assert torch.equal(again.factors[0], book.factors[0])
        assert not again.optimizer.state.get(again.factors[1])


def test_with_lambda_0_there_is_one_loss(tmp_path, capsys):
    tune(journal(tmp_path, 2, lambda_ct=0), 2, [1.0], one=(2.0, 2.0, None))
    assert "step     2/2 | loss 2.000 | lr" in capsys.readouterr().out
    assert '"loss_ct": null' in (tmp_path / "log.jsonl").read_text()


def test_tuning_stops_after_an_epoch_that_is_no_better_and_the_best_comes_back(tmp_path, capsys):
    book, saved = journal(tmp_path, total=1_000), []

    def save():
        saved.append(book.factors[0].tolist()[0])
    with book:
        for loss, value in ((0.9, 1.0), (0.8, 2.0), (0.85, 3.0)):
            assert book.goes_on()
            for _ in book.epoch(lambda: iter(range(40))):
                book.note(1e-3, (1.0, 1.0, None))
            book.factors[0].data.fill_(value)
            book.validated(loss, save)
        assert not book.goes_on()
        book.restore_best()
    assert saved == [1.0, 2.0] and book.factors[0].tolist() == [2.0, 2.0]
    text = capsys.readouterr().out
    assert text.count("best so far, adapter saved") == 2
    assert "epoch 3 | validation ta 0.8500 | no better than before, so tuning stops\n" in text


def test_few_steps_are_commented_at_the_end_unless_the_run_was_interrupted(tmp_path, capsys):
    for steps in (99, 100):
        tune(journal(tmp_path, steps), steps, [1.0])
        (tmp_path / "checkpoint.safetensors").unlink()
        said = [line for line in capsys.readouterr().out.splitlines() if "only" in line]
        assert said == [f"only {steps} steps of tuning; more data, a smaller --batch-size, "
                        "--epochs or --max-steps would help"][steps // 100:]
    with pytest.raises(KeyboardInterrupt), journal(tmp_path, 5):
        raise KeyboardInterrupt
    assert "only" not in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_tuning_with_advice(tmp_path):
    """Where no step failed, but what they led to."""
    saved = []
    with pytest.raises(ValueError, match="validation L_TA is nan after step 4: .* diverged"):
        tune(journal(tmp_path, 9), 4, [float("nan")], lambda: saved.append(1))
    assert not saved
