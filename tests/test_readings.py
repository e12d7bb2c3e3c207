"""experiments/readings.py: each reading by hand, and that it is another one."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import small_runs

import cetrec
from cetrec import TemporalLlama, answer_logits, cetrec_loss, erase_order, twin_forward
from data import IGNORE, NO_ITEM, collate
from experiments import readings
from experiments.readings import (READINGS, Chronological, ShuffledText, entropy, erase_to_oldest,
                                  from_the_oldest, permute, probabilities_difference)
from support.runs import show_prompt

POS = torch.tensor([[NO_ITEM, 2, 2, NO_ITEM, 1, 0, NO_ITEM, NO_ITEM],
                    [NO_ITEM, 3, 2, 1, 1, NO_ITEM, 0, 0]])


HISTORIES = [["Heat", "Ran", "Jumanji (1995)"], ["Alien³ (1992)", "Heat (1995)", "Ran", "Heat"]]


def batch_of(tokenizer):
    """The two histories with their answers."""
    return collate(tokenizer.examples(HISTORIES, ["Toy Story (1995)", "1984 (1984)"]))


@pytest.fixture
def batch(tokenizer):
    return batch_of(tokenizer)


def test_positions_from_the_oldest_and_of_the_oldest_by_hand():
    assert from_the_oldest(POS).tolist() == [[-1, 0, 0, -1, 1, 2, -1, -1],
                                             [-1, 0, 1, 2, 2, -1, 3, 3]]
    assert erase_to_oldest(POS).tolist() == [[-1, 2, 2, -1, 2, 2, -1, -1],
                                             [-1, 3, 3, 3, 3, -1, 3, 3]]
    erased = erase_order(POS)
    assert torch.equal(from_the_oldest(erased), erased)
    outside = torch.full((2, 5), NO_ITEM)
    for change in (from_the_oldest, erase_to_oldest, permute):
        assert torch.equal(change(outside), outside)


def test_permuting_keeps_items_whole_and_draws_every_order_alike():
    seen = {}
    for _ in range(600):
        other = permute(POS)
        assert torch.equal(other == NO_ITEM, POS == NO_ITEM)
        for row, was in zip(other, POS):
            of_item = {k: set(row[was == k].tolist()) for k in was.unique().tolist()}
            assert all(len(found) == 1 for found in of_item.values())
            assert {k for found in of_item.values() for k in found} == set(of_item)
        order = tuple(other[0][POS[0] >= 0].tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6 and min(seen.values()) > 60       # 100 each are expected


def test_a_chronological_index_is_the_same_model_at_other_positions(temporal, batch):
    model = temporal("sinpe")
    other = Chronological(model.llama, model.kind, model.scale)
    stated, _ = model(batch.tokens, batch.item_pos)
    torch.testing.assert_close(other(batch.tokens, from_the_oldest(batch.item_pos))[0], stated)
    assert not torch.allclose(other(batch.tokens, batch.item_pos)[0], stated, atol=1e-3)
    erased = erase_order(batch.item_pos)
    assert torch.equal(other(batch.tokens, erased)[0], model(batch.tokens, erased)[0])


def test_shuffled_text_moves_titles_with_their_positions(tokenizer):
    other = ShuffledText(**vars(tokenizer))
    history = ["Ran", "Heat", "Jumanji (1995)", "Alien³ (1992)"]
    (plain,), (moved,), (again,) = (t.examples([history], ["Heat"]) for t in (tokenizer, other,
                                                                              other))
    assert moved == again and moved.tokens != plain.tokens

    def positions(example):
        """title -> k"""
        marks = show_prompt(tokenizer, example).split("⟨")[1:]
        return {mark.split("⟩")[0]: mark.split("[k=")[1].split(",")[0] for mark in marks}
    assert positions(moved) == positions(plain) == dict(zip(history, "3210"))
    assert list(positions(moved)) != list(positions(plain))
    (by_clock,) = other.examples([history], ["Heat"], ages=[np.array([9.5, 4.0, 2.0, 0.5])])
    assert positions(by_clock) == dict(zip(history, ("9.5", "4", "2", "0.5")))


def test_differences_of_probabilities_and_entropies_by_hand():
    f, cf = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    torch.testing.assert_close(probabilities_difference(f, cf), torch.tensor([[-0.25, 0.25]]))
    assert entropy(cf) == pytest.approx(math.log(2))
    assert entropy(f) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_the_stated_reading_is_the_loss_of_cetrec(temporal, batch):
    model, stated = temporal("rope"), READINGS["stated"]
    for ours, theirs in zip(stated.loss(model, batch, 0.3), cetrec_loss(model, batch, 0.3)):
        assert torch.equal(ours, theirs)
    assert torch.equal(READINGS["stopped"].loss(model, batch, 0)[0],
                       cetrec_loss(model, batch, 0)[0])


def test_a_stopped_effect_has_the_same_value_and_no_gradient_through_the_erased_world(temporal,
                                                                                      batch):
    model = temporal("rope")
    values, gradients = [], []
    for name in ("stated", "stopped"):
        model.zero_grad()
        loss_ct = READINGS[name].loss(model, batch, 1.0)[2]
        loss_ct.backward()
        values.append(loss_ct.detach())
        gradients.append(model.llama.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(*values)
    model.zero_grad()
    logits_f, logits_cf = twin_forward(model, batch)
    p = (logits_f - logits_cf).softmax(-1).detach()
    targets = batch.answers[batch.answers != IGNORE]
    p[torch.arange(len(p)), targets] -= 1                   # ∂ CE / ∂ effect, by hand
    (logits_f * p / len(p)).sum().backward()
    torch.testing.assert_close(gradients[1], model.llama.embed_tokens.weight.grad)
    assert not torch.allclose(*gradients, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in READINGS if name not in ("stated", "stopped")])
def test_every_reading_is_another_one(temporal, tokenizer, name):
    """Except "stopped", which differs in its gradient alone."""
    losses, llama = [], temporal("rope").llama
    for reading in (READINGS["stated"], READINGS[name]):
        losses.append(reading.loss(reading.model(llama, "rope"),
                                   batch_of(reading.tokenizer(**vars(tokenizer))), 0.5))
    assert not torch.allclose(losses[0][2], losses[1][2], rtol=1e-5)
    same_world = READINGS[name].model is TemporalLlama and "text" not in name
    assert torch.equal(losses[0][1], losses[1][1]) == same_world


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a run that takes a second or two, and its folder."""
    out = tmp_path_factory.mktemp("readings")
    with small_runs():
        yield ["--max-steps", "4", "--batch-size", "16", "--limit-train", "64", "--eval-sequences",
               "6", "--out", str(out)], out


def test_the_command_under_the_stated_reading_does_what_cetrec_does(small):
    flags, out = small
    assert cetrec.main(flags) == 0 and readings.main(flags) == 0
    was, now = (json.loads((out / f"synthetic-rope-{n}" / "run.json").read_text()) for n in (1, 2))
    assert was["rows"] == now["rows"] and was["effect"] == now["effect"]
    notes = json.loads((out / "synthetic-rope-2" / "worlds.json").read_text())["notes"]
    losses = [json.loads(line) for line in (out / "synthetic-rope-2" / "log.jsonl").read_text()
              .splitlines() if "loss_ct" in line]
    assert [n["loss_ct"] for n in notes] == pytest.approx([x["loss_ct"] for x in losses])
    vocabulary = now["vocabulary"]
    assert all(0 < note[w] < math.log(vocabulary) for note in notes for w in ("factual", "erased"))


def test_the_command_tunes_and_evaluates_under_the_reading(small):
    """A rate of 0 leaves the base as it is, so all differences come from index and text."""
    flags, out = small
    losses, tables = [], []
    for name, folder in (("stated", "rope-*"), ("chronological", "chronological-1"),
                         ("shuffled-text", "shuffled-text-1")):
        assert readings.main([*flags, "--lr", "0", "--max-steps", "1", "--reading", name]) == 0
        run = max(out.glob(f"synthetic-{folder}"))
        record = json.loads((run / "run.json").read_text())
        assert record["method"] == ("cetrec" if name == "stated" else name)
        assert (run / "worlds.json").is_file()
        losses.append(json.loads((run / "log.jsonl").read_text().splitlines()[0])["loss_ta"])
        tables += [record["rows"][row] for row in ("10 beams on titles", "5 beams, grounded")]
    assert len(set(losses)) == 3
    assert len({str(row) for row in tables}) == 6


def test_one_world_has_no_reading(small, capsys):
    flags, _ = small
    for more in (["--temporal", "none"], ["--lambda-ct", "0"]):
        assert readings.main([*flags, *more]) == 2
        assert "readings differ in what they do with two worlds" in capsys.readouterr().err


def test_worlds_are_apart_in_one_pass(temporal, batch):
    """What a reading erases has no effect on the factual world beside it."""
    model = temporal("rope")
    alone = answer_logits(model, batch, batch.item_pos)
    for erase in (erase_to_oldest, permute):
        worlds = torch.cat((batch.item_pos, erase(batch.item_pos)))
        torch.testing.assert_close(answer_logits(model, batch, worlds).chunk(2)[0], alone)
