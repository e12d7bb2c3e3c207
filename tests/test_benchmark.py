"""experiments/benchmark.py: its arithmetic, and that both contenders do the same work."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import benchmark
from experiments.benchmark import (Timing, clock, draw_examples, fastest_rows, ours_generation,
                                   ours_tuning, prompt_of, race, random_llama, ratio, twin_of)

SHAPE = (48, 3, 4, 2, 80, 300, True)


@pytest.fixture
def llama():
    return random_llama(SHAPE, "cpu")


def test_a_ratio_is_the_median_of_the_rounds_after_the_warm_up():
    """Rounds 3 to 5: 2 / 1, 9 / 3, 20 / 2. Their mean is 5, and that of the medians is 9 / 2."""
    assert ratio(Timing([50.0, 1, 2, 9, 20]), Timing([1.0, 50, 1, 3, 2])) == 3
    with pytest.raises(ValueError):
        ratio(Timing([1.0] * 4), Timing([1.0] * 5))


def test_contenders_take_turns_at_the_same_rounds():
    seen = []
    times = race({"a": lambda x: seen.append(("a", x)) or 1, "b": lambda x: seen.append(("b", x))},
                 [[0], [1], [2]])
    assert seen == [(who, [n]) for n in range(3) for who in "ab"]
    assert [len(t.seconds) for t in times.values()] == [3, 3] and times["a"].results == [1] * 3
    assert 0 <= clock(sum, [1, 2])[0] < 1 and clock(sum, [1, 2])[1] == 3


def test_every_round_has_a_width_of_its_own(llama):
    rounds = [draw_examples(llama.config, 16, seed) for seed in range(7)]
    widths = [max(len(e.tokens) for e in rows) for rows in rounds]
    assert len(set(widths)) == 7
    for e in rounds[3]:
        answer = e.tokens[len(prompt_of(e)):]
        assert prompt_of(e) + answer == e.tokens and 6 <= len(answer) <= 12
        assert e.labels[-len(answer):] == answer
        assert e.tokens[:45] == rounds[0][0].tokens[:45] and e.item_pos[:45] == [-1] * 45
        assert sorted(set(e.item_pos)) == [-1, *range(10)]


def test_a_twin_has_the_same_tensors_and_blocks_of_its_own(llama):
    twin = twin_of(llama)
    ours, theirs = ({name: x.data_ptr() for name, x in model.state_dict().items()}
                    for model in (llama, twin))
    assert ours == theirs
    assert twin.layers[0] is not llama.layers[0]


def test_the_rows_that_are_fastest_and_fit_are_found():
    tried = []

    def step(examples, rows):
        tried.append(rows)
        if rows == 16:
            raise torch.OutOfMemoryError
        time.sleep(0.001 if rows == 4 else 0.02)
    assert fastest_rows(step, [[0] * 16, [1] * 16]) == 4
    assert tried == [16, 8, 8, 4, 4, 2, 2]


def test_work_is_counted_by_pytorch_and_agrees_with_the_products_of_one_block():
    """4 FLOP for each frozen weight and token: 2 forward, 2 for the gradient of its input."""
    weight, x = torch.randn(6, 5), torch.randn(7, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x @ weight.T).sum().backward()
    assert counter.get_total_flops() == 4 * 6 * 5 * 7


def test_both_contenders_have_the_same_loss_and_the_same_gradient_step(llama):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    examples = draw_examples(llama.config, 4, 0)
    ours, theirs = ours_tuning(twin_of(llama)), benchmark.theirs_tuning(llama)
    losses = [(ours(examples), theirs(examples, 2)) for _ in range(3)]
    for a, b in losses:     # dropout of the factors differs, and they start at zero
        assert a == pytest.approx(b, rel=1e-3)
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-6)
    assert losses[2][0] < losses[0][0] and losses[2][1] < losses[0][1]


def test_both_contenders_find_the_same_beams(llama):
    pytest.importorskip("transformers")
    examples = draw_examples(llama.config, 3, 1)
    ours, theirs = ours_generation(twin_of(llama)), benchmark.theirs_generation(llama)
    for beams, others in zip(ours(examples), theirs(examples), strict=True):
        assert [other[:len(beam)] for beam, other in zip(beams, others)] == beams


def test_the_command_prints_its_tables(capsys):
    assert benchmark.main(["--shapes", "tiny", "--rounds", "1", "--batch-size", "2"]) == 0
    text = capsys.readouterr().out
    for what in ("tuning, tiny shape, batches of 2", "generation, tiny shape, 2 prompts",
                 "ours: of a matrix product", "cetrec.train"):
        assert what in text
    assert benchmark.main(["speed"]) == 2
    assert "section 'speed'; wanted some of tuning, generation, loop" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert benchmark.main(["--device", "cuda"]) == 2
        assert "sees no such device; not measured" in capsys.readouterr().err
