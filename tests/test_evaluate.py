"""evaluate.py: beam search against brute force, grounding, lists, metrics, floors, oracle."""

import itertools
import math

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TITLES, small_config

import evaluate
from cetrec import TemporalLlama
from data import (IGNORE, NO_ITEM, SyntheticWorld, Tokenizer, encode_example, make_sequences,
                  split_by_time)
from evaluate import (METRICS, CountingFloors, Decoding, Recommender, Trie, agreement, beam_search,
                      catalogue_log_likelihood, clean, embed_titles, evaluate_order,
                      expected_metrics, format_result, format_table, ground, hit_ratio, list_ranks,
                      members_of_groups, merge_lists, ndcg, nearest, oracle_metrics, prefill,
                      relative_change, score_ranks, summarise)
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


@pytest.mark.parametrize("shortest", [0, 4])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("W, eos", [(1, [7]), (5, [7]), (10, [7]), (5, [7, 9])])
def test_beam_search_equals_transformers_generate(tmp_path, llama, W, eos, penalty, shortest):
    """Same weights, a batch of prompts of different lengths, and answers that end early and late:
    the EOS row of the output matrix is made likely.
    """
    transformers = pytest.importorskip("transformers")
    from llama import save_llama
    llama.lm_head.weight.data[7] = 1.5 * llama.lm_head.weight.data[[7, 9, 30]].sum(dim=0)
    save_llama(llama, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = [[5, 9, 2, 44, 17], [5, 9, 3], [5, 9, 2, 30, 31, 32, 33, 8, 50], [1]]
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(ids, attention_mask=mask, num_beams=W, num_return_sequences=W,
                          max_new_tokens=12, min_new_tokens=shortest, length_penalty=penalty,
                          do_sample=False, eos_token_id=eos, pad_token_id=0,
                          return_dict_in_generate=True, output_scores=True)
    ours, scores = beam_search(TemporalLlama(llama, "none"),
                               [(p, [NO_ITEM] * len(p)) for p in prompts], W, max_new_tokens=12,
                               min_new_tokens=shortest, length_penalty=penalty, eos_ids=eos)
    lengths = {len(answer) for beams in ours for answer in beams}
    assert len(lengths) > 1 or W == 1
    for mine, other in zip(itertools.chain(*ours), out.sequences[:, T:].tolist()):
        end = next((i + 1 for i, token in enumerate(other) if token in eos), 12)
        assert mine == other[:end] and set(other[end:]) <= {0, 7}       # theirs are padded
    if W > 1:
        torch.testing.assert_close(scores.flatten(), out.sequences_scores, rtol=1e-4, atol=1e-4)


def test_prompts_that_are_alike_or_begin_one_another_are_served_as_alone(toy):
    """Of what is common at least the last token of each prompt is left to run by itself."""
    prompts = [(tokens, [NO_ITEM] * len(tokens)) for tokens in ([1, 2, 0], [1, 2, 0], [1, 2, 0, 3])]
    found, _ = beam_search(toy, prompts, 3, 5, 0, 1.0, [EOS])
    assert found == [beam_search(toy, [p], 3, 5, 0, 1.0, [EOS])[0][0] for p in prompts]


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


HISTORIES = [[0, 1, 2], [5, 4, 3, 2, 1], [7, 8, 9, 10]]


def prompts_of(model, histories, titles=TITLES):
    examples = [encode_example(model.tokenizer, [titles[i] for i in h], None) for h in histories]
    return [(e.tokens, e.item_pos) for e in examples]


def answer_of(model, title) -> list[int]:
    """`"title"` and EOS as they follow a prompt."""
    example = encode_example(model.tokenizer, ["Heat"], title)
    return [t for t, label in zip(example.tokens, example.labels) if label != IGNORE]


@pytest.mark.parametrize("ground_list", ["merged", "single"])
def test_free_beams_are_grounded_merged_and_rid_of_the_history(temporal, ground_list):
    model = temporal("rope")
    kept, dropped = (Recommender(model, TITLES, "movies", Decoding(
        beams=3, exclude_history=flag, ground_list=ground_list))(HISTORIES, batch_size=2)
        for flag in (False, True))
    longest = max(len(e.ids) for e in model.tokenizer.bpe.encode_batch(
        [f'"{t}"' for t in TITLES], add_special_tokens=False))
    for i, history in enumerate(HISTORIES):
        answers, _ = beam_search(model, prompts_of(model, [history]), 3, longest + 8,
                                 eos_ids=model.tokenizer.eos_ids)
        texts = [clean(model.tokenizer.decode(a)) for a in answers[0]]
        lists = ground(model, texts, TITLES).tolist()[:3 if ground_list == "merged" else 1]
        for made, gone in ((kept, []), (dropped, history)):
            ten = merge_lists(lists, gone, 10)
            assert made.items[i].tolist() == ten + [-1] * (10 - len(ten))
        assert kept.valid[i].tolist() == [t in TITLES for t in texts]
    assert dropped.items[1].tolist().count(-1) == 2         # 13 titles less 5: eight are left
    assert np.isnan(kept.log_p).all()


def test_longer_histories_later_do_not_run_out_of_neighbours(temporal):
    """Texts grounded for short histories are grounded anew when more may be dropped."""
    model, titles = temporal(), [f"{t} {i}" for i in (1, 2) for t in TITLES]
    recommender = Recommender(model, titles, "movies", Decoding(beams=1, ground_list="single"))
    recommender([[0]])
    long = list(range(1, 16))
    again = recommender([[0], long]).items
    assert again.tolist() == Recommender(model, titles, "movies", recommender.decoding)(
        [[0], long]).items.tolist()
    assert (again >= 0).all() and not set(again[1].tolist()) & set(long)


def test_d11_base_weights_ground_without_the_factors(temporal):
    from lora import add_lora
    model = temporal()
    plain = embed_titles(model, model.tokenizer, TITLES)
    for p in add_lora(model, dropout=0.0):
        p.data.normal_(std=0.5)
    tables = {how: Recommender(model, TITLES, "movies", Decoding(ground_with=how)).table
              for how in ("base", "tuned")}
    torch.testing.assert_close(tables["base"], plain)
    torch.testing.assert_close(tables["tuned"], embed_titles(model, model.tokenizer, TITLES))
    assert not torch.allclose(tables["tuned"], plain)


def test_a_hundred_thousand_titles_are_ranked_in_bounded_pieces(monkeypatch):
    sizes, table = [], torch.randn(100_000, 3)

    def counted(a, b, **rest):
        sizes.append(len(a) * len(b))
        return (a[:, None] - b[None]).norm(dim=-1)
    monkeypatch.setattr(torch, "cdist", counted)
    table[99_999] = table[5]
    found = nearest(table[[5] * 100 + [7]], table, 3)
    assert found[0, :2].tolist() == [5, 99_999] and found[100, 0] == 7
    assert len(sizes) == 2 and max(sizes) <= 2**23


# ------------------------------------------------------------------ the catalogue as one trie


@pytest.fixture(params=["our tokenizer", "llama 3's splitting"])
def catalogue_model(request, tokenizer, llama3_tokenizer):
    chosen = tokenizer if request.param == "our tokenizer" else llama3_tokenizer
    torch.manual_seed(1)
    llama = Llama(small_config(vocab_size=chosen.bpe.get_vocab_size()))
    for p in llama.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return TemporalLlama(llama, "rope", tokenizer=chosen).eval()


def brute_force(model, prompt, titles=TITLES) -> list[float]:
    """log p of every title and EOS, one prompt and title at a time."""
    return [log_likelihood(model, (list(prompt[0]), list(prompt[1])), answer_of(model, title))
            for title in titles]


def test_the_trie_spells_every_title_and_nothing_else(catalogue_model):
    titles = [*TITLES, "Heat"]                      # the sixth title again
    trie = Trie(catalogue_model.tokenizer, titles)
    for item, title in enumerate(titles):
        path, node = [], trie.leaf[item]
        while node > 0:
            path.insert(0, trie.token[node])
            node = trie.parent[node]
        assert path == answer_of(catalogue_model, title)
    assert trie.leaf[13] == trie.leaf[5] and trie.below[0] == 14 and trie.below[trie.leaf[5]] == 2
    assert (trie.parent[1:] < np.arange(1, len(trie.parent))).all()
    inner = np.flatnonzero(trie.end - np.arange(len(trie.end)) > 1)
    rows, kids = trie.children(inner)
    assert sorted(kids.tolist()) == list(range(1, len(trie.token)))
    assert (trie.parent[kids] == inner[rows]).all()
    assert (trie.child(inner[rows], trie.token[kids]) == kids).all()


def test_wide_beams_on_the_trie_rank_all_titles_as_brute_force_does(catalogue_model):
    model = catalogue_model
    trie, prompts = Trie(model.tokenizer, TITLES), prompts_of(model, HISTORIES)
    found, scores = beam_search(model, prompts, len(TITLES), trie.longest, 0, 0.0,
                                model.tokenizer.eos_ids[:1], trie)
    for prompt, answers, values in zip(prompts, found, scores):
        exact = brute_force(model, prompt)
        order = sorted(range(len(TITLES)), key=lambda i: -exact[i])
        assert answers == [answer_of(model, TITLES[i]) for i in order]
        torch.testing.assert_close(values, torch.tensor(sorted(exact, reverse=True)), rtol=1e-4,
                                   atol=1e-4)


def test_narrow_beams_on_the_trie_give_distinct_titles_without_the_history(catalogue_model):
    made = Recommender(catalogue_model, TITLES, "movies", Decoding("trie", 10))(HISTORIES)
    for history, items, log_p, prompt in zip(HISTORIES, made.items, made.log_p,
                                             prompts_of(catalogue_model, HISTORIES)):
        there = items[items >= 0]
        assert len(set(there.tolist())) == len(there) == min(10, 13 - len(history))
        assert not set(history) & set(there.tolist())
        np.testing.assert_allclose(log_p[items >= 0],
                                   np.array(brute_force(catalogue_model, prompt))[there], atol=1e-4)
        assert (np.diff(log_p[items >= 0]) <= 0).all()


def test_items_of_one_title_share_its_place_and_are_excluded_each_by_itself(temporal):
    model, titles = temporal(), [*TITLES, "Heat"]
    for decode in ("trie", "exact"):
        made = Recommender(model, titles, "movies", Decoding(decode, 10))([[0, 1, 5], [0, 1, 2]])
        assert 13 in made.items[0] and 5 not in made.items[0]
        at = made.items[1].tolist().index(5)
        assert made.items[1, at + 1] == 13 and made.log_p[1, at] == made.log_p[1, at + 1]


@pytest.mark.parametrize("at_once", [1, 3, 128])
def test_exact_scores_equal_each_title_scored_by_itself(catalogue_model, at_once):
    model, titles = catalogue_model, [*TITLES, "Heat"]
    prompts = prompts_of(model, HISTORIES)
    scores = catalogue_log_likelihood(model, prompts, Trie(model.tokenizer, titles), at_once)
    exact = torch.tensor([brute_force(model, prompt, titles) for prompt in prompts])
    torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sinpe", "rope-attention", "none"])
def test_exact_scores_hold_for_every_temporal_embedding(temporal, kind):
    model = temporal(kind)
    prompts = prompts_of(model, HISTORIES[:1])      # one prompt: no shared prefix, plain cache
    scores = catalogue_log_likelihood(model, prompts, Trie(model.tokenizer, TITLES), 5)
    torch.testing.assert_close(scores[0], torch.tensor(brute_force(model, prompts[0])), rtol=1e-4,
                               atol=1e-4)


def test_exact_recommendation_is_the_order_of_all_scores(temporal):
    model = temporal()
    made = Recommender(model, TITLES, "movies", Decoding("exact"))(HISTORIES)
    for history, items, prompt in zip(HISTORIES, made.items, prompts_of(model, HISTORIES)):
        exact = brute_force(model, prompt)
        order = [i for i in sorted(range(13), key=lambda i: -exact[i]) if i not in history][:10]
        assert items.tolist() == order + [-1] * (10 - len(order))


def test_exact_work_is_linear_in_the_nodes_of_the_trie(temporal):
    """Each node goes through the model once, and at most one path to it for each piece."""
    model, titles = temporal(), [f"{t} {i}" for i in range(40) for t in TITLES]
    trie, ran = Trie(model.tokenizer, titles), []
    model.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape[1]))
    catalogue_log_likelihood(model, prompts_of(model, HISTORIES[:1]), trie, 64)
    inner = int((trie.end - np.arange(len(trie.end)) > 1).sum()) - 1
    pieces = ran[1:]
    assert len(pieces) == math.ceil(inner / 64)
    assert inner <= sum(pieces) <= inner + len(pieces) * trie.longest
    assert max(pieces) <= 64 + trie.longest


def test_a_tokenizer_that_merges_prompt_and_answer_is_refused():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.train_from_iterator(['Response:\n"Heat"'] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    with pytest.raises(ValueError, match="merges the prompt's end with the answer 'Heat'"):
        Trie(Tokenizer(bpe, (0,)), ["Heat"])


@pytest.mark.parametrize("settings, message", [
    ({"decode": "greedy"}, "decode is 'greedy'"), ({"ground_with": "both"}, "ground_with is"),
    ({"ground_list": "x"}, "ground_list is 'x'"), ({"decode": "trie", "beams": 9}, "at least 10")])
def test_decoding_refuses_what_it_does_not_know(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


# ------------------------------------------------------------------ what is run, and how often


def test_the_common_prefix_runs_once_each_prompt_once_and_finished_prompts_leave(toy):
    """Tokens that go through the model, by rows and columns of each forward."""
    ran = []
    toy.register_forward_pre_hook(lambda module, args: ran.append(tuple(args[0].shape)))
    prompts = [([1, 2, 0] + rest, [NO_ITEM] * (3 + len(rest))) for rest in ([3], [3, 1], [2, 2])]
    W, longest = 3, 6
    beam_search(toy, prompts, W, longest, 0, 0.0, [EOS])
    assert ran[:2] == [(1, 3), (3, 2)]
    assert all(columns == W for _, columns in ran[2:]) and len(ran) <= 2 + longest - 1
    rows = [rows for rows, _ in ran[2:]]
    assert rows == sorted(rows, reverse=True) and rows[-1] < 3
    alone = []
    for prompt in prompts:
        ran.clear()
        beam_search(toy, [prompt], W, longest, 0, 0.0, [EOS])
        alone.append(len(ran) - 1)
    assert rows == [sum(steps > g for steps in alone) for g in range(max(alone))]


def test_a_cache_with_room_gives_what_a_growing_one_gives(toy):
    """Prefill writes into room; a chain of forwards that copies is the reference."""
    prompts = [([1, 2, 0, 3, 1], [NO_ITEM] * 5), ([1, 2, 2], [NO_ITEM] * 3)]
    with torch.inference_mode():
        cache, logits = prefill(toy, prompts, room=2)
        assert cache.room == 2
        for row, (tokens, _) in enumerate(prompts):
            alone = toy.logits(toy(torch.tensor([tokens]), torch.full((1, len(tokens)), NO_ITEM)))
            torch.testing.assert_close(logits[row], alone[0, -1])
        new = torch.tensor([[3], [0]])
        for room in (1, 0, 0):              # twice into the room, then by copying
            cache_room = cache.room
            hidden = toy(new, torch.full_like(new, NO_ITEM), cache=cache)
            assert cache_room >= 1 or room == 0
            for row, (tokens, _) in enumerate(prompts):
                tokens.append(int(new[row]))
                alone = toy(torch.tensor([tokens]), torch.full((1, len(tokens)), NO_ITEM))
                torch.testing.assert_close(hidden[row, 0], alone[0, -1])


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


@pytest.fixture
def small_world():
    """World, train and test whose titles are of conftest's."""
    world = SyntheticWorld(items=len(TITLES) * 2)
    world.titles = [f"{title} {i}" for i in (1, 2) for title in TITLES]
    train, _, test = split_by_time(make_sequences(world.interactions(40)))
    return world, train, test


def test_evaluation_reads_histories_forward_backward_and_shuffled(temporal, monkeypatch,
                                                                  small_world):
    world, train, test = small_world
    seen = []

    def pretend(self, histories, ages=None, **more):
        seen.append([list(h) for h in histories])
        n = len(histories)
        return evaluate.Lists(np.tile(np.arange(10), (n, 1)), np.full((n, 10), np.nan),
                              np.tile([True, False], (n, 1)))
    monkeypatch.setattr(Recommender, "__call__", pretend)
    answers = np.log(np.tile([0.5, 0.25], (len(test), 1)))
    result, arrays = evaluate_order(temporal("rope"), train, test, world, answers=answers)
    original, backward, shuffled = seen
    assert original == [test.history(i).tolist() for i in range(len(test))]
    assert backward == [h[::-1] for h in original]
    assert shuffled not in (original, backward)
    assert list(map(sorted, shuffled)) == list(map(sorted, original))
    hits = np.array([test.target(i) < 5 for i in range(len(test))])
    assert result["rows"]["original order"]["HR@5"][0] == pytest.approx(hits.mean())
    text = format_result(result)
    assert "no hit to lose" in text or hits.any()
    for wanted in (f"test: {len(test)} sequences, all-ranking of 26 items, history excluded, 5 "
                   "beams", "change when shuffled", "on the way from best order-blind",
                   "50.0 % of all beams and 100.0 % of first beams are titles of the catalogue",
                   "recommended | 10 of 26 items at least once (38.5 %)",
                   "log p(answer) +0.6931 ± 0.0000 nats, p(answer) +0.25000 ± 0.00000"):
        assert wanted in text, wanted
    np.testing.assert_array_equal(arrays["target"], test.items[test.targets])
    np.testing.assert_array_equal(arrays["ranks/original"] < 5, hits)
    assert arrays["history"][0, :len(original[0])].tolist() == original[0]


def test_exact_evaluation_says_what_beams_lose(temporal, small_world):
    world, train, test = small_world
    result, arrays = evaluate_order(temporal("rope"), train, test.select(slice(0, 6)), world,
                                    Decoding("exact"))
    trie = Recommender(temporal("rope"), world.titles, "movies", Decoding("trie", 10))(
        [test.history(i) for i in range(6)]).items
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(arrays["lists/original"], trie)])
    assert f"10 beams on titles | {100 * share:.1f} % of the exact top tens are found" in (
        format_result(result))
    assert "original order, 5 grounded beams" in result["rows"]


def test_agreement_of_lists_by_hand():
    one, other = np.array([[1, 2, 3], [4, 5, -1]]), np.array([[3, 1, 9], [4, -1, -1]])
    assert agreement(one, other) == pytest.approx(3 / 5)


def test_groups_are_a_partition_by_length_and_by_what_training_saw(small_world):
    _, train, test = small_world
    groups = members_of_groups(train.select(slice(0, 5)), test)
    lengths = np.array([len(test.history(i)) for i in range(len(test))])
    seen = {int(i) for k in range(5) for i in [*train.history(k), train.target(k)]}
    np.testing.assert_array_equal(groups["history of 4 to 6"], (lengths >= 4) & (lengths <= 6))
    np.testing.assert_array_equal(groups["answer seen in training"],
                                  [test.target(i) in seen for i in range(len(test))])
    by_length = [members for name, members in groups.items() if name.startswith("history")]
    assert (np.sum(by_length, axis=0) == 1).all()
    assert (groups["answer seen in training"] ^ groups["answer never seen in training"]).all()


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
