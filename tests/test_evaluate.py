"""evaluate.py: beam search against brute force, grounding, lists, metrics, floors, oracle."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import TITLES, small_config

import evaluate
from cetrec import TemporalLlama
from data import NO_ITEM, SyntheticWorld, encode_example, make_sequences, split_by_time
from evaluate import (METRICS, CountingFloors, beam_search, clean, embed_titles, evaluate_order,
                      expected_metrics, format_result, format_table, ground, hit_ratio, list_ranks,
                      merge_lists, ndcg, nearest, oracle_metrics, recommend, relative_change,
                      score_ranks, summarise)
from llama import Llama

EOS = 4


@pytest.fixture
def toy():
    """Five words, one of them EOS; logits far from uniform and dependent on the whole past."""
    torch.manual_seed(3)
    model = Llama(small_config(vocab_size=5))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return TemporalLlama(model, "rope").eval()


def log_likelihood(model, prompt, continuation) -> float:
    tokens = torch.tensor([prompt[0] + continuation])
    item_pos = torch.tensor([prompt[1] + [NO_ITEM] * len(continuation)])
    with torch.no_grad():
        log_p = model.logits(model(tokens, item_pos)).log_softmax(-1)[0]
    n = len(prompt[0])
    return sum(log_p[n + i - 1, token].item() for i, token in enumerate(continuation))


def all_answers(longest, shortest):
    """Every string that ends in EOS after at least `shortest` words, or runs to `longest`."""
    for n in range(1, longest + 1):
        for words in itertools.product(range(4), repeat=n - 1):
            if n - 1 >= shortest:
                yield [*words, EOS]
    for words in itertools.product(range(4), repeat=longest):
        yield list(words)


PROMPTS = [([1, 2, 0, 3], [NO_ITEM, 1, 0, NO_ITEM]), ([2, 2], [NO_ITEM, 0]), ([0, 1, 3, 3, 2, 1,
                                                                               0], [NO_ITEM] * 7)]


@pytest.mark.parametrize("shortest", [0, 2])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beam_search_with_room_for_everything_equals_brute_force(toy, penalty, shortest):
    """W ≥ number of strings: nothing is pruned, so the best strings and scores are exact."""
    W = 64 + 16 + 4 + 1 + 8
    found, scores = beam_search(toy, PROMPTS, W, max_new_tokens=3, min_new_tokens=shortest,
                                length_penalty=penalty, eos_ids=[EOS])
    for prompt, sequences, values in zip(PROMPTS, found, scores):
        exact = sorted(((log_likelihood(toy, prompt, a) / len(a) ** penalty, a)
                        for a in all_answers(3, shortest)), reverse=True)[:10]
        assert sequences[:10] == [a for _, a in exact]
        torch.testing.assert_close(values[:10], torch.tensor([s for s, _ in exact]), rtol=1e-4,
                                   atol=1e-4)


def reference_beam(model, prompt, W, longest, shortest, penalty):
    """The stated rules for one prompt, without cache, step by step."""
    alive, heap = [(0.0, [])], []
    for g in range(1, longest + 1):
        options = []
        for _, words in alive:
            for token in range(5):
                if token == EOS and len(words) < shortest:
                    continue
                options.append((log_likelihood(model, prompt, [*words, token]), [*words, token]))
        options.sort(key=lambda option: -option[0])
        alive = []
        for rank, (total, words) in enumerate(options[:2 * W]):
            if words[-1] == EOS:
                if rank < W:
                    heap.append((total / g ** penalty, words))
                    heap.sort(key=lambda h: -h[0])
                    heap = heap[:W]
            elif len(alive) < W:
                alive.append((total, words))
        if len(heap) == W and heap[-1][0] >= options[0][0] / g ** penalty:
            return heap
    heap += [(total / longest ** penalty, words) for total, words in alive]
    return sorted(heap, key=lambda h: -h[0])[:W]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("W, shortest", [(1, 0), (2, 1), (3, 0), (4, 2)])
def test_narrow_beams_follow_the_stated_rules_and_batches_change_nothing(toy, W, shortest, penalty):
    found, scores = beam_search(toy, PROMPTS, W, max_new_tokens=6, min_new_tokens=shortest,
                                length_penalty=penalty, eos_ids=[EOS])
    for prompt, sequences, values in zip(PROMPTS, found, scores):
        expected = reference_beam(toy, prompt, W, 6, shortest, penalty)
        assert sequences == [words for _, words in expected]
        torch.testing.assert_close(values, torch.tensor([s for s, _ in expected]), rtol=1e-4,
                                   atol=1e-4)
        alone, _ = beam_search(toy, [prompt], W, max_new_tokens=6, min_new_tokens=shortest,
                               length_penalty=penalty, eos_ids=[EOS])
        assert alone[0] == sequences


@pytest.mark.parametrize("W, penalty", [(1, 1.0), (5, 0.0), (5, 1.0)])
def test_beam_search_equals_transformers_generate(tmp_path, llama, W, penalty):
    transformers = pytest.importorskip("transformers")
    from llama import save_llama
    save_llama(llama, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = [5, 9, 2, 44, 17]
    out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.long),
                          num_beams=W, num_return_sequences=W, max_new_tokens=12, min_new_tokens=4,
                          length_penalty=penalty, do_sample=False, eos_token_id=7, pad_token_id=0,
                          return_dict_in_generate=True, output_scores=True)
    ours, scores = beam_search(TemporalLlama(llama, "none"), [(prompt, [NO_ITEM] * 5)], W,
                               max_new_tokens=12, length_penalty=penalty, eos_ids=[7])
    for mine, other in zip(ours[0], out.sequences[:, 5:].tolist()):
        assert mine == other[:len(mine)] and set(other[len(mine):]) <= {0}
    if W > 1:
        torch.testing.assert_close(scores[0], out.sequences_scores, rtol=1e-4, atol=1e-4)


def test_eos_comes_no_earlier_than_the_fifth_token_by_default(toy):
    found, _ = beam_search(toy, PROMPTS, 3, max_new_tokens=8, eos_ids=[EOS])
    assert all(EOS not in sequence[:4] for beams in found for sequence in beams)
    assert any(EOS in sequence for beams in found for sequence in beams)


@pytest.mark.parametrize("arguments", [{"beams": 0}, {"max_new_tokens": 0}, {"prompts": []}])
def test_beam_search_refuses_nothing_to_do(toy, arguments):
    with pytest.raises(ValueError, match="wanted at least one of each"):
        beam_search(toy, **({"prompts": PROMPTS} | arguments))


# ------------------------------------------------------------------ grounding and lists


@pytest.mark.parametrize("kind", ["rope", "sinpe"])
def test_grounding_finds_each_catalogue_title_at_distance_0(temporal, kind):
    model = temporal(kind)
    assert ground(model, TITLES, TITLES)[:, 0].tolist() == list(range(len(TITLES)))
    quoted = ground(model, [f' "{t}" ' for t in TITLES], TITLES)
    assert quoted[:, 0].tolist() == list(range(len(TITLES)))
    table = embed_titles(model, model.tokenizer, TITLES)
    assert (embed_titles(model, model.tokenizer, TITLES) - table).abs().max() == 0
    alone = torch.cat([embed_titles(model, model.tokenizer, [t]) for t in TITLES])
    torch.testing.assert_close(alone, table, rtol=1e-4, atol=1e-5)


def test_an_empty_answer_is_grounded_somewhere(temporal):
    model = temporal()
    assert sorted(ground(model, [""], TITLES)[0].tolist()) == list(range(len(TITLES)))


def test_nearest_by_hand_with_ties_by_item_id():
    table = torch.tensor([[3.0, 0], [0, 1], [0, -1], [0, 0.5]])
    assert nearest(torch.zeros(1, 2), table).tolist() == [[3, 1, 2, 0]]


def test_distances_keep_the_digits_that_decide():
    """A common component of 1,000 beside differences of 0.001: a² + b² - 2ab in float32 sees
    nothing."""
    torch.manual_seed(0)
    table = 1_000 + 0.001 * torch.randn(50, 64).double()
    query = table[17:18] + 1e-6
    exact = (query - table).norm(dim=-1)
    assert nearest(query.float(), table.float())[0, 0] == int(exact.argmin()) == 17


def test_d7_merged_list_is_round_robin_with_first_occurrence_kept():
    assert merge_lists([[3, 1, 2, 0], [3, 2, 1, 0], [0, 1, 2, 3]]) == [3, 0, 1, 2]
    assert merge_lists([[3, 1, 2, 0], [3, 2, 1, 0]], exclude=[3, 2], length=2) == [1, 0]


def test_clean_takes_spaces_and_quotes_off():
    assert clean(' "Heat (1995)" ') == "Heat (1995)" and clean('" "') == ""


def test_recommend_excludes_the_history_and_reversal_is_seen(temporal):
    model = temporal("rope")
    histories = [[0, 1, 2], [5, 4, 3, 2, 1], [7, 8, 9, 10]]
    with_history, without = (recommend(model, TITLES, histories, beams=3,
                                       batch_size=2, exclude_history=flag, length=6)
                             for flag in (False, True))
    assert with_history.shape == without.shape == (3, 6)
    for history, kept, dropped in zip(histories, with_history, without):
        assert not set(history) & set(dropped.tolist())
        assert len(set(kept.tolist())) == 6
    alone = recommend(model, TITLES, histories[1:2], beams=3, length=6)
    assert alone[0].tolist() == without[1].tolist()
    example = encode_example(model.tokenizer, [TITLES[i] for i in histories[0]], None)
    longest = max(len(e.ids) for e in model.tokenizer.bpe.encode_batch(TITLES))
    answers, _ = beam_search(model, [(example.tokens, example.item_pos)], 3, max_new_tokens=longest
                             + 8, eos_ids=model.tokenizer.eos_ids)
    lists = ground(model, [model.tokenizer.decode(a) for a in answers[0]], TITLES).tolist()
    assert without[0].tolist() == merge_lists(lists, histories[0], 6)


# ------------------------------------------------------------------ ranks and metrics


def test_metrics_by_hand():
    ranks = np.array([0, 4, 5, 9, 10])
    assert hit_ratio(ranks, 5).mean() == pytest.approx(0.4)
    assert hit_ratio(ranks, 10).mean() == pytest.approx(0.8)
    assert ndcg(ranks, 10).mean() == pytest.approx(
        (1 + 1 / math.log2(6) + 1 / math.log2(7) + 1 / math.log2(11)) / 5)
    assert ndcg(np.array([0]), 5)[0] == 1 and ndcg(np.array([5]), 5)[0] == 0


def test_ranks_with_ties_by_item_id_and_absent_targets():
    scores = np.array([[1.0, 3.0, 3.0, 0.0]])
    assert [score_ranks(scores, np.array([t]))[0] for t in range(4)] == [2, 0, 1, 3]
    assert list_ranks(np.array([[4, 2, 9], [4, 2, 9]]), np.array([9, 1])).tolist()[0] == 2
    assert (hit_ratio(list_ranks(np.array([[4, 2, 9]]), np.array([1])), 10) == 0).all()


def test_standard_errors_by_hand():
    mean, error = summarise(np.array([0, 99, 99, 0]))["HR@5"]
    assert mean == 0.5 and error == pytest.approx(math.sqrt(4 * 0.25 / 3) / 2)


def test_change_under_reversal_is_paired_and_in_per_cent():
    before, after = np.array([0, 0, 0, 99]), np.array([0, 99, 99, 99])
    change, error = relative_change(before, after)["HR@5"]
    assert change == pytest.approx(-200 / 3) and error > 0
    assert relative_change(before, before)["HR@5"] == (0.0, 0.0)
    assert math.isnan(relative_change(np.array([99, 99]), before[:2])["HR@5"][0])


def test_the_standard_error_of_a_change_matches_resampling():
    rng = np.random.default_rng(0)
    before = rng.integers(0, 20, 400)
    after = np.where(rng.random(400) < 0.4, before, rng.integers(0, 200, 400))
    picks = rng.integers(0, 400, (2_000, 400))
    resampled = [hit_ratio(after[p], 5).mean() / hit_ratio(before[p], 5).mean() - 1 for p in picks]
    assert relative_change(before, after)["HR@5"][1] == pytest.approx(100 * np.std(resampled),
                                                                      rel=0.1)


def test_evaluation_reads_histories_forward_then_backward(temporal, monkeypatch):
    model = temporal("rope")
    world = SyntheticWorld(items=len(TITLES) * 2)
    world.titles = [f"{title} {i}" for i in (1, 2) for title in TITLES]
    train, _, test = split_by_time(make_sequences(world.interactions(40)))
    seen = []

    def pretend(model, titles, histories, *rest, **more):
        seen.append([list(h) for h in histories])
        return np.tile(np.arange(10), (len(histories), 1))
    monkeypatch.setattr(evaluate, "recommend", pretend)
    result = evaluate_order(model, train, test, world)
    assert seen[0] == [test.history(i).tolist() for i in range(len(test))]
    assert seen[1] == [h[::-1] for h in seen[0]]
    hits = np.array([test.target(i) < 5 for i in range(len(test))])
    assert result["rows"]["original order"]["HR@5"][0] == pytest.approx(hits.mean())
    assert "no hit to lose" in format_result(result) or hits.any()
    assert "on the way from best order-blind" in format_result(result)


# ------------------------------------------------------------------ floors and oracle


def test_floors_equal_dense_counting():
    world = SyntheticWorld(items=25)
    train, _, test = split_by_time(make_sequences(world.interactions(80)))
    counts, popularity = np.zeros((25, 25)), np.zeros(25)
    for i in range(len(train)):
        counts[train.history(i), train.target(i)] += 1
        popularity[train.target(i)] += 1
    similarity = counts / np.sqrt(np.outer(counts.sum(1), counts.sum(0)).clip(min=1e-9))
    histories = [test.history(i) for i in range(len(test))]
    floors = CountingFloors(train, 25)
    scores = floors.scores(histories, exclude_history=False)
    for row, history in enumerate(histories):
        np.testing.assert_allclose(scores["popularity"][row], popularity)
        np.testing.assert_allclose(scores["co-occurrence, newest item"][row],
                                   similarity[history[-1]])
        np.testing.assert_allclose(scores["co-occurrence, whole history"][row],
                                   similarity[history].sum(0))
    masked = floors.scores(histories)
    assert all(np.isneginf(masked[name][0][histories[0]]).all() for name in masked)
    targets = test.items[test.targets]
    np.testing.assert_array_equal(floors.ranks(histories, targets)["popularity"],
                                  score_ranks(masked["popularity"], targets))


def test_expected_metrics_by_hand():
    p = np.array([[0.5, 0.3, 0.2]])
    exact = expected_metrics(np.array([[1.0, 2.0, 0.0]]), p)
    assert exact["HR@5"] == pytest.approx(1.0)
    assert exact["NDCG@5"] == pytest.approx(0.3 + 0.5 / math.log2(3) + 0.2 / 2)


def test_expected_metrics_equal_simulation():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(30))
    draws = rng.choice(30, 40_000, p=p)
    ranks = score_ranks(np.tile(p, (40_000, 1)), draws)
    for name, value in expected_metrics(p[None], p[None]).items():
        assert METRICS[name](ranks).mean() == pytest.approx(value, abs=0.01)


def test_the_oracle_bounds_are_ordered_and_meet_at_strength_0():
    for strength in (1.0, 0.0):
        world = SyntheticWorld(items=60, strength=strength)
        sequences = make_sequences(world.interactions(60))
        rows = oracle_metrics(world, [sequences.history(i) for i in range(len(sequences))],
                              samples=64)
        for name in METRICS:
            aware, blind = rows["order-aware"][name], rows["order-blind"][name]
            if strength:
                assert aware[0] > blind[0] + blind[1] and aware[0] > rows["order-aware, reversed "
                                                                          "history"][name][0]
            else:
                assert aware[0] == pytest.approx(blind[0],
                                                 abs=1e-9) and blind[1] == pytest.approx(0,
                                                                                         abs=1e-9)


def test_the_table_has_a_line_per_row_and_a_column_per_metric():
    ranks = np.array([0, 3, 7, 99])
    text = format_table([("original", summarise(ranks), ""), ("change", relative_change(ranks,
                                                                                        ranks),
                                                              "%")])
    head, first, second = text.splitlines()
    assert head.split() == list(METRICS)
    assert first.startswith("original") and "+0.0 ± 0.0 %" in second
    assert "0.5000 ± 0.2887" in first and evaluate.CUTOFFS == (5, 10)
