"""evaluate.py: beam search against brute force, grounding, lists, metrics, reversal, the table."""

import itertools
import math

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TITLES, small_config

import evaluate
from cetrec import TemporalLlama
from data import (IGNORE, NO_ITEM, Interactions, Tokenizer, encode_example, make_sequences,
                  split_by_time)
from evaluate import (METRICS, Beams, Decoding, Ended, GroundedBeams, Lists, beam_search, clean,
                      embed_titles, evaluate_order, format_table, ground, hit_ratio, list_values,
                      merge_lists, ndcg, nearest, prefill, prompts_by_length, relative_change,
                      summarise)
from llama import Llama, save_llama
from lora import add_lora, without_factors
from support.synthetic import SyntheticWorld

EOS = 4


@pytest.fixture
def toy():
    """Five words, one of them EOS; logits far from uniform and dependent on the whole past."""
    torch.manual_seed(3)
    model = Llama(small_config(vocab_size=5))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return TemporalLlama(model, "rope").eval()


def log_likelihoods(model, prompt, answers) -> list[float]:
    """log p(answer | prompt) of every answer, each in a row of its own and without a cache."""
    n, width = len(prompt[0]), max(map(len, answers))
    tokens = torch.tensor([prompt[0] + a + [0] * (width - len(a)) for a in answers])
    item_pos = torch.tensor([prompt[1] + [NO_ITEM] * width] * len(answers))
    with torch.no_grad():
        log_p = model.logits(model(tokens, item_pos)).log_softmax(-1)
    return [sum(row[n + i - 1, token].item() for i, token in enumerate(answer))
            for row, answer in zip(log_p, answers)]


def all_answers(longest, shortest):
    """Every string that ends in EOS after at least `shortest` words, or runs to `longest`."""
    for n in range(1, longest + 1):
        for words in itertools.product(range(4), repeat=n - 1):
            if n - 1 >= shortest:
                yield [*words, EOS]
    for words in itertools.product(range(4), repeat=longest):
        yield list(words)


PROMPTS = [([1, 2, 0, 3], [NO_ITEM, 1, 0, NO_ITEM]), ([2, 2], [NO_ITEM, 0]),
           ([0, 1, 3, 3, 2, 1, 0], [NO_ITEM] * 7)]


@pytest.mark.parametrize("shortest", [0, 2])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beam_search_with_room_for_everything_equals_brute_force(toy, penalty, shortest):
    """W ≥ number of strings: nothing is pruned, so the best strings and scores are exact."""
    W = 64 + 16 + 4 + 1 + 8
    found, scores = beam_search(toy, PROMPTS, W, max_new_tokens=3, min_new_tokens=shortest,
                                length_penalty=penalty, eos_ids=[EOS])
    for prompt, sequences, values in zip(PROMPTS, found, scores):
        answers = list(all_answers(3, shortest))
        exact = sorted(((log_p / len(a) ** penalty, a) for log_p, a in zip(
            log_likelihoods(toy, prompt, answers), answers)), reverse=True)[:10]
        assert sequences[:10] == [a for _, a in exact]
        torch.testing.assert_close(values[:10], torch.tensor([s for s, _ in exact]), rtol=1e-4,
                                   atol=1e-4)


def reference_beam(model, prompt, W, longest, shortest, penalty):
    """The stated rules for one prompt, without cache, step by step."""
    alive, heap = [(0.0, [])], []
    for g in range(1, longest + 1):
        longer = [[*words, token] for _, words in alive for token in range(5)
                  if token != EOS or len(words) >= shortest]
        options = sorted(zip(log_likelihoods(model, prompt, longer), longer),
                         key=lambda option: -option[0])
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
    """The weights are the same, the prompts differ in length, and answers end early and late,
    because EOS is made likely by its row of the output matrix.
    """
    transformers = pytest.importorskip("transformers")
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
    """Of what is common at least the last token of each prompt is left to run by itself. A token is
    common only if it belongs to the same place of the histories."""
    alike = [(tokens, [NO_ITEM] * len(tokens)) for tokens in ([1, 2, 0], [1, 2, 0], [1, 2, 0, 3])]
    moved = [([1, 2, 0], [NO_ITEM, k, NO_ITEM]) for k in (0, 3)]
    for prompts in (alike, moved):
        found, scores = beam_search(toy, prompts, 3, 5, 0, 1.0, [EOS])
        alone = [beam_search(toy, [prompt], 3, 5, 0, 1.0, [EOS]) for prompt in prompts]
        assert found == [answers for (answers,), _ in alone]
        torch.testing.assert_close(scores, torch.cat([values for _, values in alone]))
    assert not torch.allclose(*scores)


def test_eos_comes_no_earlier_than_the_fifth_token_by_default(toy):
    found, _ = beam_search(toy, PROMPTS, 3, max_new_tokens=8, eos_ids=[EOS])
    assert all(EOS not in sequence[:4] for beams in found for sequence in beams)
    assert any(EOS in sequence for beams in found for sequence in beams)


def test_two_steps_of_two_beams_by_hand():
    """Word 2 is EOS. After one step the beams are 0 and 1; then both go on from 1. What ends is
    reported and does not go on."""
    alive = Beams(1, 2, "cpu")
    total, tokens, ends = alive.advance(torch.tensor([[[-1.0, -3, -2]] * 2]), torch.tensor([2]))
    assert total[0].tolist() == [-1, -2, -3] + [-math.inf]      # only the first beam has begun
    assert tokens[0, :3, 0].tolist() == [0, 2, 1] and ends[0, :3].tolist() == [False, True, False]
    assert alive.sums.tolist() == [[-1, -3]] and alive.parent.tolist() == [[0, 0]]
    assert alive.ancestors.int().tolist() == [[[1, 0], [0, 1]]]

    log_p = torch.tensor([[[-9.0, -8, -7], [-0.5, -1, -1.5]]])
    total, tokens, ends = alive.advance(log_p, torch.tensor([2]))
    assert total[0].tolist() == [-3.5, -4, -4.5, -8]
    assert ends[0].tolist() == [False, False, True, True]
    assert tokens[0].tolist() == [[1, 0], [1, 1], [1, 2], [0, 2]]
    assert alive.parent.tolist() == [[1, 1]] and alive.tokens[0].tolist() == [[1, 0], [1, 1]]
    assert alive.ancestors.int().tolist() == [[[0, 1, 1, 0], [0, 1, 0, 1]]]


def test_beams_go_on_where_several_ends_are_likelier_than_any_word():
    """Words 2 and 3 are EOS, and the four best continuations of both beams end."""
    alive, eos = Beams(1, 2, "cpu"), torch.tensor([2, 3])
    for step in (1, 2):
        alive.advance(torch.tensor([[[-4.0, -5, -1, -2]] * 2]), eos)
        assert (alive.tokens < 2).all() and alive.tokens.shape == (1, 2, step)
    assert alive.sums.tolist() == [[-8, -9]]


def test_kept_answers_stay_sorted_and_an_earlier_one_wins_a_tie():
    ended = Ended(1, 2, "cpu")
    ended.add(torch.tensor([[-2.0, -math.inf]]), torch.tensor([[[7], [8]]]))
    assert ended.answers(0) == [[7]]
    ended.add(torch.tensor([[-1.0, -2]]), torch.tensor([[[1, 2], [3, 4]]]))
    assert ended.answers(0) == [[1, 2], [7]] and ended.scores.tolist() == [[-1, -2]]


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
    table = embed_titles(model, TITLES)
    for rows in (1, 5):
        torch.testing.assert_close(embed_titles(model, TITLES, rows), table, rtol=1e-4, atol=1e-5)
    for title, vector in zip(TITLES, table):        # BOS, the bare title, and nothing of an item
        tokens = torch.tensor([model.tokenizer.bpe.encode(title).ids])
        with torch.no_grad():
            hidden = model(tokens, torch.full_like(tokens, NO_ITEM))
        torch.testing.assert_close(vector, hidden[0, -1], rtol=1e-4, atol=1e-5)


def test_an_empty_answer_is_grounded_as_eos_where_there_is_no_bos(temporal):
    model = temporal()
    bare = tokenizers.Tokenizer.from_str(model.tokenizer.bpe.to_str())
    bare.post_processor = tokenizers.processors.Sequence([])
    model.tokenizer = Tokenizer(bare, (7, 8))
    with torch.no_grad():
        eos = model(torch.tensor([[7]]), torch.tensor([[NO_ITEM]]))[0, 0]
    torch.testing.assert_close(embed_titles(model, ["Heat", '" "'])[1], eos)
    assert sorted(ground(model, [""], TITLES)[0].tolist()) == list(range(len(TITLES)))


def test_nearest_by_hand_with_ties_by_item_id():
    table = torch.tensor([[3.0, 0], [0, 1], [0, -1], [0, 0.5]])
    assert nearest(torch.zeros(1, 2), table).tolist() == [[3, 1, 2, 0]]


def test_distances_keep_the_digits_that_decide():
    """Beside a common component of 1,000 there are differences of 0.01, of which a² + b² - 2ab in
    float32 sees nothing. Distances in float64 are the reference."""
    table = (1_000 + 0.01 * torch.randn(50, 64).double()).float()
    queries = table[[17, 3]] + 0.001
    exact = (queries.double()[:, None] - table.double()[None]).norm(dim=-1)
    assert nearest(queries, table).tolist() == exact.argsort(dim=1).tolist()
    assert exact.argmin(dim=1).tolist() == [17, 3]


def test_d7_merged_list_is_round_robin_with_first_occurrence_kept():
    assert merge_lists([[3, 1, 2, 0], [3, 2, 1, 0], [0, 1, 2, 3]]) == [3, 0, 1, 2]
    assert merge_lists([[3, 1, 2, 0], [3, 2, 1, 0]], exclude=[3, 2], length=2) == [1, 0]
    assert merge_lists([[5, 1], [4, 2]], exclude=range(9)) == []
    assert merge_lists([range(20), range(20, 40)]) == [0, 20, 1, 21, 2, 22, 3, 23, 4, 24]


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
    kept, dropped = (GroundedBeams(model, TITLES, "movies", Decoding(
        beams=3, exclude_history=flag, ground_list=ground_list))(HISTORIES)
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


def test_prompts_come_by_length_each_once_with_its_own_ages(temporal):
    model, ages = temporal(), [[3.5, 1.0, 0.0], [9.0, 8.0, 2.5, 1.5, 0.5], [4.0, 3.0, 2.0, 1.0]]
    made = list(prompts_by_length(model, TITLES, "movies", HISTORIES, ages, 2, ""))
    assert [len(chunk) for chunk, _ in made] == [2, 1]
    sizes = [len(tokens) for _, prompts in made for tokens, _ in prompts]
    assert sizes == sorted(sizes) and len(set(sizes)) > 1
    rows = [(i, prompt) for chunk, prompts in made for i, prompt in zip(chunk, prompts)]
    assert sorted(i for i, _ in rows) == [0, 1, 2]
    for i, (tokens, item_pos) in rows:
        e = encode_example(model.tokenizer, [TITLES[item] for item in HISTORIES[i]], None,
                           ages=ages[i])
        assert (tokens, item_pos) == (e.tokens, e.item_pos) and ages[i][0] in item_pos


def test_d12_answers_may_be_as_short_as_the_shortest_title_and_little_longer_than_the_longest(
        temporal, monkeypatch):
    asked, search = [], evaluate.beam_search
    monkeypatch.setattr(evaluate, "beam_search", lambda *args: (asked.append(args[2:]),
                                                                search(*args))[1])
    for titles in (TITLES, TITLES[:2], [*TITLES, "a b c d e " * 20]):
        model = temporal()
        sizes = [len(answer_of(model, title)) - 1 for title in titles]          # without EOS
        GroundedBeams(model, titles, "movies", Decoding(beams=2, length_penalty=0.5))([[0, 1]])
        assert asked.pop() == (2, min(128, max(sizes) + 8), min(4, min(sizes)), 0.5,
                               model.tokenizer.eos_ids)
    assert min(len(answer_of(model, title)) - 1 for title in TITLES) < 4 and max(sizes) > 120


def test_a_long_history_does_not_run_out_of_neighbours(temporal):
    model, titles = temporal(), [f"{t} {i}" for i in (1, 2) for t in TITLES]
    long = list(range(1, 16))
    made = GroundedBeams(model, titles, "movies", Decoding(beams=1, ground_list="single"))(
        [[0], long]).items
    assert (made >= 0).all() and not set(made[1].tolist()) & set(long)


def test_d11_base_weights_ground_without_the_factors(temporal):
    """Titles and texts are embedded without them; the texts themselves come from the tuned model.
    """
    model = temporal()
    plain = embed_titles(model, TITLES)
    for p in add_lora(model, dropout=0.0):
        p.data.normal_(std=0.5)
    makers = {how: GroundedBeams(model, TITLES, "movies", Decoding(
        beams=2, ground_with=how, exclude_history=False)) for how in ("base", "tuned")}
    for how, maker in makers.items():
        with maker.weights():
            assert torch.allclose(embed_titles(model, TITLES), plain) == (how == "base")
    answers, _ = beam_search(model, prompts_of(model, HISTORIES[:1]), 2, makers["base"].longest,
                             makers["base"].shortest, eos_ids=model.tokenizer.eos_ids)
    texts = [model.tokenizer.decode(answer) for answer in answers[0]]
    with without_factors(model):
        by_base = merge_lists(ground(model, texts, TITLES).tolist())
    made = {how: maker(HISTORIES[:1]).items[0].tolist() for how, maker in makers.items()}
    assert made["base"] == by_base
    assert made["tuned"] == merge_lists(ground(model, texts, TITLES).tolist()) != by_base


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


def test_prompts_of_unequal_length_are_prefilled_as_each_alone(toy):
    """The logits after each prompt, and those after more tokens behind the shared cache."""
    prompts = [([1, 2, 0, 3, 1], [NO_ITEM] * 5), ([1, 2, 2], [NO_ITEM] * 3)]
    with torch.inference_mode():
        cache, logits = prefill(toy, prompts)
        for row, (tokens, _) in enumerate(prompts):
            alone = toy.logits(toy(torch.tensor([tokens]), torch.full((1, len(tokens)), NO_ITEM)))
            torch.testing.assert_close(logits[row], alone[0, -1])
        new = torch.tensor([[3], [0]])
        for _ in range(3):
            hidden = toy(new, torch.full_like(new, NO_ITEM), cache=cache)
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


def ranked(*ranks) -> np.ndarray:
    """Values of lists whose answer stands at these ranks; the answer is item 0, 99 for not there.
    """
    items = np.arange(1, 11) + np.zeros((len(ranks), 1), dtype=int)
    for row, rank in enumerate(ranks):
        if rank < 10:
            items[row, rank] = 0
    return list_values(items, np.zeros(len(ranks), dtype=int))


def test_a_list_is_worth_the_metric_at_the_rank_of_the_answer():
    ranks = np.array([0, 4, 5, 9, 99])
    for column, metric in zip(ranked(*ranks).T, METRICS.values()):
        np.testing.assert_allclose(column, metric(ranks))
    assert (list_values(np.array([[3, -1, -1]]), np.array([8])) == 0).all()


def test_a_list_is_worth_the_expectation_where_the_law_is_known():
    """By hand, and as the mean over answers drawn from the law."""
    law, items = np.array([[0.5, 0.3, 0.2, 0.0]]), np.array([[1, 0, -1]])
    by_hand = [0.8, 0.3 + 0.5 / math.log2(3)] * 2
    np.testing.assert_allclose(list_values(items, np.array([0]), law)[0], by_hand)
    drawn = np.random.default_rng(1).choice(4, 20_000, p=law[0])
    simulated = list_values(np.repeat(items, len(drawn), axis=0), drawn).mean(axis=0)
    np.testing.assert_allclose(simulated, by_hand, atol=0.01)


def test_standard_errors_by_hand():
    mean, error = summarise(ranked(0, 99, 99, 0))["HR@5"]
    assert mean == 0.5 and error == pytest.approx(math.sqrt(4 * 0.25 / 3) / 2)


def test_change_under_reversal_is_paired_and_in_per_cent():
    before, after = ranked(0, 0, 0, 99), ranked(0, 99, 99, 99)
    change, error = relative_change(before, after)["HR@5"]
    assert change == pytest.approx(-200 / 3)
    # The residuals after - before / 3 are 2/3, -1/3, -1/3 and 0, whose variance is 2/9.
    assert error == pytest.approx(100 * math.sqrt(2 / 9 / 4) / 0.75)
    assert relative_change(before, before)["HR@5"] == (0.0, 0.0)
    assert math.isnan(relative_change(ranked(99, 99), ranked(0, 0))["HR@5"][0])


def test_the_standard_error_of_a_change_matches_resampling():
    rng = np.random.default_rng(0)
    before = rng.integers(0, 20, 400)
    after = np.where(rng.random(400) < 0.4, before, rng.integers(0, 200, 400))
    picks = rng.integers(0, 400, (2_000, 400))
    resampled = [hit_ratio(after[p], 5).mean() / hit_ratio(before[p], 5).mean() - 1 for p in picks]
    error = relative_change(ranked(*before), ranked(*after))["HR@5"][1]
    assert error == pytest.approx(100 * np.std(resampled), rel=0.1)


def test_evaluation_reads_histories_forward_backward_and_shuffled():
    world = SyntheticWorld(items=26)
    test = split_by_time(make_sequences(world.interactions(40)))[2]
    seen = []

    def pretend(histories, ages=None, progress=""):
        seen.append([list(h) for h in histories])
        made = Lists.empty(len(histories), 2)
        made.items[:] = np.arange(10) + 5 * progress.endswith("reversed")
        return made
    rows, arrays = evaluate_order({"beams": pretend}, test)
    original, backward, shuffled = seen
    assert original == [test.history(i).tolist() for i in range(len(test))]
    assert backward == [h[::-1] for h in original] and shuffled not in (original, backward)
    assert list(map(sorted, shuffled)) == list(map(sorted, original))
    hits = np.array([test.target(i) < 5 for i in range(len(test))])
    assert rows["beams"]["HR@5"][0] == pytest.approx(hits.mean()) and 0 < hits.mean() < 1
    later = np.array([5 <= test.target(i) < 10 for i in range(len(test))])
    assert rows["beams | reversed"]["HR@5"][0] == pytest.approx(later.mean())
    assert rows["beams | change, reversed"]["HR@5"][0] == pytest.approx(
        100 * (later.mean() / hits.mean() - 1)) and later.mean() != hits.mean()
    assert rows["beams | change, shuffled"]["HR@5"] == (0.0, 0.0)
    assert list(rows) == ["beams", "beams | reversed", "beams | change, reversed",
                          "beams | shuffled", "beams | change, shuffled"]
    np.testing.assert_array_equal(arrays["target"], test.items[test.targets])
    np.testing.assert_array_equal(arrays["values/beams/original"][:, 0], hits)
    assert [row[row >= 0].tolist() for row in arrays["history"]] == original
    np.testing.assert_array_equal(arrays["sequence"], test.targets)
    np.testing.assert_array_equal(arrays["lists/beams/reversed"], [np.arange(5, 15)] * len(test))
    assert arrays["valid/beams/shuffled"].shape == (len(test), 2)
    law = world.law(original)
    valued, _ = evaluate_order({"beams": pretend}, test, law)
    assert valued["beams"]["HR@5"][0] == pytest.approx(law[:, :5].sum(axis=1).mean())


def test_recommenders_get_the_ages_of_items_where_k_is_read_off_the_clock():
    """Ages belong to the places of a history and stay as they are when its items move (D15). The
    answer comes 10, 8 and 7 days after the items."""
    x = Interactions(np.zeros(4, dtype=int), np.arange(4), np.array([0, 2, 3, 10]) * 86_400,
                     list("abcd"))
    got = []
    for index in ("order", "time"):
        sequences = make_sequences(x, index=index)
        evaluate_order({"beams": lambda given, ages, progress: (
            got.append(ages), Lists.empty(len(given)))[1]}, sequences)
    assert got[:3] == [None] * 3
    for ages in got[3:]:
        np.testing.assert_allclose(ages, [np.log2([11, 9, 8])])


def test_the_table_has_a_line_per_row_and_a_column_per_metric():
    values = summarise(ranked(0, 3, 7, 99))
    change = dict.fromkeys(METRICS, (-33.25, 2.5))
    rows = {}
    for name in ("5 beams, grounded", "10 beams on titles", "all titles scored"):
        rows |= {name: values}
        for order in ("reversed", "shuffled"):
            rows |= {f"{name} | {order}": values, f"{name} | change, {order}": change}
    rows |= dict.fromkeys(("popularity", "co-occurrence, newest item",
                           "co-occurrence, whole history", "best, order-aware",
                           "best, order-aware | reversed", "best, order-blind"), values)
    head, *lines = format_table(rows).splitlines()
    assert head.split() == list(METRICS) and len(lines) == len(rows)
    assert max(map(len, [head, *lines])) <= 100 and len(set(map(len, [head, *lines]))) == 1
    first = ["5 beams, grounded", "  reversed", "  change, reversed", "  shuffled",
             "  change, shuffled", "10 beams on titles"]
    for line, name in zip(lines, first):
        cell = "-33.2 ± 2.5 %" if "change" in name else "0.5000 ± 0.2887"
        assert line.startswith(f"{name}  ") and line[len(name):].split("  ")[0] == ""
        assert line[len(name):].strip().startswith(cell)
