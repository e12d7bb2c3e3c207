"""experiments/id_baselines.py: three models by hand, losses, training, the command."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_runs

from data import make_sequences, split_by_time
from experiments import id_baselines
from experiments.id_baselines import (MODELS, Caser, GRU4Rec, ItemScores, Recipe, SASRec,
                                      best_items, draw_negatives, fit, id_loss, padded)
from experiments.report import Run, compare, describe
from support.options import defaults
from support.synthetic import SyntheticWorld

N = 10
EVERY = pytest.mark.parametrize("name", MODELS)


def large_model(name: str, items: int = N, width: int = 8) -> torch.nn.Module:
    """A model whose weights are so large that differences show."""
    model = MODELS[name](items, width)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def recipe(**changes) -> Recipe:
    return Recipe(**defaults(Recipe) | changes)


# ------------------------------------------------------------ The three models


@pytest.mark.parametrize("kind, length, count", [(GRU4Rec, 10, 214), (Caser, 5, 1204),
                                                 (SASRec, 5, 246)])
def test_parameters_are_as_many_as_in_the_lineages_code(kind, length, count):
    assert sum(p.numel() for p in kind(10, 4, length).parameters()) == count


@EVERY
def test_what_stands_behind_a_history_changes_nothing_and_rows_are_apart(name):
    model = large_model(name)
    items, lengths = padded([[1, 2, 3], [4, 5, 6, 7, 8], [9]], N)
    scores = model.scores(items, lengths)
    assert scores.shape == (3, N)
    other = items.clone()
    other[0, 3:], other[1, 5:], other[2, 1:] = 7, torch.tensor([N, 0, 1, 2, 3]), N - 1
    assert torch.equal(model.scores(other, lengths), scores)
    order = [2, 0, 1]
    torch.testing.assert_close(model.scores(items[order], lengths[order]), scores[order])
    torch.testing.assert_close(model.scores(items[1:2], lengths[1:2]), scores[1:2])


@EVERY
def test_order_counts_and_the_two_tables_are_not_tied(name):
    model = large_model(name)
    inputs = padded([[1, 2, 3, 4]], N)
    scores = model.scores(*inputs)
    for turned in ([4, 3, 2, 1], [2, 1, 3, 4]):
        assert not torch.allclose(model.scores(*padded([turned], N)), scores, atol=1e-3)
    model.embedding.weight.data[8] += 1.0                # an item that is not in the history
    assert torch.equal(model.scores(*inputs), scores)
    model.embedding.weight.data[2] += 1.0
    assert not torch.allclose(model.scores(*inputs), scores, atol=1e-3)


@pytest.mark.parametrize("name", ["gru4rec", "sasrec"])
def test_tied_tables_score_an_item_by_its_own_embedding(name):
    free, model = (recipe(method=name, width=8, tied=tied).model(N) for tied in (False, True))
    assert sum(p.numel() for p in free.parameters()) - N * 8 == sum(
        p.numel() for p in model.parameters())
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    model.eval()
    inputs = padded([[1, 2, 3, 4]], N)
    state, bias, E = (x.detach().numpy() for x in (model(*inputs)[0], model.head.bias,
                                                   model.embedding.weight))
    scores = model.scores(*inputs)
    np.testing.assert_allclose(scores[0].detach().numpy(), E[:N] @ state + bias, atol=1e-5)
    model.embedding.weight.data[8] += 1.0               # an item that is not in the history
    assert (model.scores(*inputs) != scores)[0].nonzero().flatten().tolist() == [8]
    for kind in ("bce", "bpr", "ce"):                   # absent items learn from answers
        model.zero_grad()
        id_loss(kind, model, model(*inputs), torch.tensor([7])).backward()
        assert model.embedding.weight.grad[7].abs().sum() > 0


def test_tied_tables_do_not_fit_caser_and_the_command_says_so(capsys):
    assert id_baselines.main(["--method", "caser", "--tied"]) == 2
    assert "--tied does not go with caser" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--tied does not go with caser"):
        recipe(method="caser", tied=True)


@EVERY
def test_dropout_works_in_training_only_and_at_the_rate_of_its_model(name):
    assert defaults(Recipe, name)["dropout"] == (0.0 if name == "gru4rec" else 0.1)
    inputs = padded([[1, 2, 3, 4]], N)
    for rate in (0.0, 0.5):
        model = recipe(method=name, width=8, dropout=rate).model(N)
        model.embedding.weight.data += torch.randn(N + 1, 8)
        assert torch.equal(model(*inputs), model(*inputs)) == (rate == 0)
        model.eval()
        assert torch.equal(model(*inputs), model(*inputs))


def test_gru4rec_is_its_equations_from_item_to_item():
    model = large_model("gru4rec")
    W, U, b, c = (getattr(model.gru, name).detach().numpy().astype(float) for name in (
        "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"))
    h = np.zeros(8)
    for item in (3, 0, 7):
        x = W @ model.embedding.weight[item].detach().numpy() + b
        y = U @ h + c
        r, z = (1 / (1 + np.exp(-(x + y)[part])) for part in (slice(0, 8), slice(8, 16)))
        h = (1 - z) * np.tanh(x[16:] + r * y[16:]) + z * h
    state = model(*padded([[3, 0, 7]], N))[0].detach().numpy()
    np.testing.assert_allclose(state, h, atol=1e-5)


def test_casers_filters_by_hand():
    """d = 1 and items that are 1 and 2: two neighbours that sum to 3, and a difference of -1."""
    model = Caser(3, 1, length=4).eval()
    model.embedding.weight.data = torch.tensor([[1.0], [2.0], [5.0], [9.0]])
    for conv in (*model.horizontal, model.vertical):
        conv.weight.data.fill_(1.0)
        conv.bias.data.zero_()
    model.vertical.weight.data[:] = torch.tensor([1.0, -1, 0, 0]).view(1, 1, 4, 1)
    inputs = torch.tensor([[0, 1, 3, 3], [1, 0, 2, 3]]), torch.tensor([2, 3])
    state = model(*inputs)
    assert state[0].tolist() == [3.0] * 16 + [3.0] * 16 + [3.0] * 16 + [0.0]
    assert state[1].tolist() == [6.0] * 16 + [8.0] * 16 + [8.0] * 16 + [1.0]    # 1 + 5 in two rows
    model.horizontal[1].bias.data.fill_(0.5)            # it answers on rows of pads, too
    model.embedding.weight.data[2] = -5.0
    assert model(torch.tensor([[2, 3, 3, 3]]), torch.tensor([1]))[0, 16].item() == 0.5


def test_sasrecs_block_by_hand():
    model, history = large_model("sasrec"), [3, 0, 7]
    e, p = (x.weight.detach().numpy().astype(float) for x in (model.embedding, model.positions))

    def linear(which, x):
        return x @ which.weight.detach().numpy().astype(float).T + which.bias.detach().numpy()

    def norm(which, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * which.weight.detach().numpy() + which.bias.detach().numpy()
    x = e[history] + p[:3]
    q = norm(model.before, x)
    logits = linear(model.query, q[2:]) @ linear(model.key, x).T / math.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum()
    f = norm(model.between, weights @ linear(model.value, x) + q[2:])
    z = f + linear(model.outer, np.maximum(0, linear(model.inner, f)))
    z = norm(model.last, norm(model.after, z))
    np.testing.assert_allclose(model(*padded([history], N))[0].detach().numpy(), z[0], atol=1e-5)


def test_sasrec_looks_at_no_pad_and_at_nothing_ahead_and_its_weights_sum_to_one():
    model = SASRec(N, 50).eval()                        # at its first values
    items, lengths = padded([[1, 2, 3], list(range(10)), [4]], N)
    weights, _, _ = model.attention(items, lengths)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 10))
    assert (weights.triu(1) == 0).all()
    assert (weights[0, :, 3:] == 0).all() and (weights[2, :, 1:] == 0).all()
    assert (weights[2, :, 0] == 1).all()                # a history of one item sees itself


# ------------------------------------------------------------ Losses


def test_losses_by_hand(monkeypatch):
    """Two answers with the scores 1 and -2; their negatives score 0.5 and 3."""
    model = GRU4Rec(4, 1)
    model.head.weight.data = torch.tensor([[1.0], [0.5], [-2.0], [3.0]])
    model.head.bias.data.zero_()
    monkeypatch.setattr(id_baselines, "draw_negatives", lambda targets, items: torch.tensor([1, 3]))
    state, targets = torch.ones(2, 1), torch.tensor([0, 2])

    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))
    bce = -(log_sigmoid(1) + log_sigmoid(-2) + log_sigmoid(-0.5) + log_sigmoid(-3)) / 4
    bpr = -(log_sigmoid(1 - 0.5) + log_sigmoid(-2 - 3)) / 2
    whole = sum(math.exp(s) for s in (1, 0.5, -2, 3))
    ce = math.log(whole) - (1 - 2) / 2
    for kind, loss in (("bce", bce), ("bpr", bpr), ("ce", ce)):
        assert id_loss(kind, model, state, targets).item() == pytest.approx(loss, abs=1e-6)
    model.head.weight.data.zero_()
    for kind, loss in (("bce", math.log(2)), ("bpr", math.log(2)), ("ce", math.log(4))):
        assert id_loss(kind, model, state, targets).item() == pytest.approx(loss, abs=1e-6)


def test_a_negative_is_any_item_but_the_answer_all_alike_likely():
    targets = torch.arange(5).repeat(4_000)
    drawn = draw_negatives(targets, 5)
    assert (drawn != targets).all()
    counts = torch.stack([torch.bincount(drawn[targets == t], minlength=5) for t in range(5)])
    assert (counts.diagonal() == 0).all()
    assert (counts[~torch.eye(5, dtype=torch.bool)] - 1_000).abs().max() < 150      # five sigma


# ------------------------------------------------------------ Lists and training


def test_lists_are_the_ten_best_ties_by_item_without_the_history():
    class Fixed(torch.nn.Module):
        head = torch.nn.Linear(1, 12)

        def scores(self, items, lengths):
            return torch.tensor([[0.0, 5, 5, 1, 2, 2, 2, 9, 0, 0, 0, 0]]).repeat(len(items), 1)
    lists = ItemScores(Fixed())([[7, 2], [0]]).items.tolist()
    assert lists == [[1, 4, 5, 6, 3, 0, 8, 9, 10, 11], [7, 1, 2, 4, 5, 6, 3, 8, 9, 10]]
    assert ItemScores(Fixed(), exclude_history=False)([[7, 2]]).items[0, :3].tolist() == [7, 1, 2]
    long = ItemScores(Fixed())([[0, 1, 2, 3, 4]]).items[0].tolist()
    assert long == [7, 5, 6, 8, 9, 10, 11, -1, -1, -1]
    few = best_items(np.array([[0.0, 1.0, 2.0]]), [[1]], exclude_history=True)
    assert few.tolist() == [[2, 0, *[-1] * 8]]


@pytest.fixture(scope="module")
def splits():
    return split_by_time(make_sequences(SyntheticWorld(items=40).interactions(300)))


@EVERY
def test_64_records_are_learned_by_heart(name, splits):
    sets = [f"{np.sort(splits[0].history(i))}" for i in range(len(splits[0]))]
    _, first = np.unique(sets, return_index=True)
    records = splits[0].select(np.sort(first)[:64])     # order alone would take long to learn
    model = MODELS[name](40, 32)
    fit(model, records, records, recipe(loss="ce", lr=0.005, batch_size=16, epochs=60,
                                        patience=60), 0, log=lambda line: None)
    lists = ItemScores(model)([records.history(i) for i in range(64)])
    assert lists.items[:, 0].tolist() == records.items[records.targets].tolist()


def test_training_keeps_the_best_epoch_stops_and_depends_on_the_seed_only(splits):
    train_set, valid_set, _ = splits

    def trained(seed, **changes):
        torch.manual_seed(5)
        model = GRU4Rec(40, 8)
        lines = []
        record = fit(model, train_set, valid_set, recipe(lr=0.02, batch_size=64, loss="ce",
                                                         patience=2, **changes), seed, lines.append)
        return model, record, lines
    (one, record, lines), (two, again, _), (other, _, _) = trained(1), trained(1), trained(2)
    reached = record["validation_ndcg10"]
    assert record["best_epoch"] == 1 + int(np.argmax(reached))
    assert record["epochs"] == record["best_epoch"] + 2 == len(lines) == len(reached)
    assert again["validation_ndcg10"] == reached
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.equal(p, q)
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))
    histories = [valid_set.history(i) for i in range(len(valid_set))]
    values = id_baselines.list_values(ItemScores(one)(histories).items,
                                      valid_set.items[valid_set.targets]).mean(axis=0)
    assert values[3] == pytest.approx(max(reached))         # NDCG@10 is the last metric


def test_answers_that_were_mixed_up_teach_much_less(splits):
    train_set, valid_set, _ = splits
    rng, best = np.random.default_rng(0), []
    mixed = train_set.items.copy()
    mixed[train_set.targets] = rng.permutation(mixed[train_set.targets])
    histories = {i: train_set.history(i) for i in range(len(train_set))}

    class Mixed(type(train_set)):
        def history(self, i):
            return histories[i]
    for chosen in (train_set, Mixed(**vars(train_set) | {"items": mixed})):
        torch.manual_seed(0)
        record = fit(SASRec(40, 16), chosen, valid_set, recipe(lr=0.01, loss="ce", batch_size=64,
                                                               epochs=8), 0, lambda line: None)
        best.append(max(record["validation_ndcg10"]))
    assert best[0] > 1.5 * best[1]


def test_a_loss_that_is_not_finite_ends_in_one_line(splits):
    with pytest.raises(ValueError, match="the loss of epoch 1 is nan; try a smaller --lr"):
        fit(SASRec(40, 8), splits[0], splits[1], recipe(lr=1e17, loss="ce"), 0, lambda line: None)


# ------------------------------------------------------------ The command


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory):
    """Runs of two methods in one small world."""
    root = tmp_path_factory.mktemp("id")
    with small_runs():
        for flags in (["--method", "sasrec"], ["--method", "caser", "--loss", "ce"]):
            assert id_baselines.main([*flags, "--epochs", "2", "--eval-sequences", "30", "--width",
                                      "8", "--out", str(root)]) == 0
    return [root / "synthetic-sasrec-1", root / "synthetic-caser-1"]


def test_a_run_folder_is_read_like_any_other(run_folders):
    first, second = (Run.from_folder(folder) for folder in run_folders)
    assert (first.setting, second.setting) == ("sasrec", "caser")
    assert first.record["baseline"]["method"] == "sasrec"
    text = describe(first)
    for row in ("all items scored", "  change, reversed", "popularity",
                "co-occurrence, whole history", "best, order-aware"):
        assert f"\n{row}" in text
    assert "Eq. 7" not in text and text.count("\nall items scored ") >= 2
    both = compare([first, second])
    assert "on the same 30 test sequences" in both and "synthetic-caser-1, caser" in both
    assert json.loads((run_folders[0] / "run.json").read_text())["tuning"]["epochs"] == 2


@pytest.mark.parametrize("flags, message", [
    (["--method", "bert4rec"], "invalid choice: 'bert4rec'"),
    (["--lambda-ct", "1"], "unrecognized arguments: --lambda-ct 1"),
    (["--model", "tiny"], "unrecognized arguments: --model tiny")])
def test_what_this_command_does_not_know_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        id_baselines.main(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--width", "0"], "--width is 0; wanted a number from 1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--data-dir", "x"], "--data-dir goes with a public data set")])
def test_values_that_cannot_be_end_in_one_line(flags, message, capsys, tmp_path):
    assert id_baselines.main([*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_cross_entropy_of_the_whole_catalogue_is_pytorchs(splits):
    model = large_model("gru4rec", 40)
    inputs = padded([splits[0].history(i) for i in range(6)], 40)
    targets = torch.from_numpy(splits[0].items[splits[0].targets[:6]])
    torch.testing.assert_close(id_loss("ce", model, model(*inputs), targets),
                               F.nll_loss(model.scores(*inputs).log_softmax(-1), targets))
