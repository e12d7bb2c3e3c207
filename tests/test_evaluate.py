"""evaluate.py: beam search against brute force, grounding, lists, metrics, reversal, the table."""

import itertools
import math

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TITLES, small_config

from cetrec import TemporalLlama, erase_order
from data import (IGNORE, NO_ITEM, Catalogue, Interactions, Tokenizer, encode_example,
                  make_sequences, split_by_time)
from evaluate import (METRICS, Decoding, GroundedBeams, Lists, beam_search, best_answers, clean,
                      embed_titles, evaluate_order, ground, hit_ratio, keep_allowed,
                      list_values, merge_lists, ndcg, nearest, prompts_by_length, read_prompts,
                      relative_change, summarise)
from llama import Llama, save_llama
from lora import add_lora, without_factors
from support.counting import format_table
from support.synthetic import SyntheticWorld
from support.trie import TitleBeams

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
    """log p(answer | prompt) of every answer, each in a row of its own."""
    n, width = len(prompt[0]), max(map(len, answers))
    tokens = torch.tensor([prompt[0] + a + [0] * (width - len(a)) for a in answers])
    item_pos = torch.tensor([prompt[1] + [NO_ITEM] * width] * len(answers))
    with torch.no_grad():
        log_p = model.logits(model(tokens, item_pos)[0]).log_softmax(-1)
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
    """The stated rules for one prompt, step by step."""
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


def every_second_token(b: int, answer: list[int]) -> list[int]:
    """Even and odd tokens take turns, and the prompts begin differently; 7 and 9 may always come.
    """
    return [token for token in range(61) if (token + len(answer) + b) % 2 or token in (7, 9)]


@pytest.mark.parametrize("allowed", [None, every_second_token])
@pytest.mark.parametrize("shortest", [0, 4])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("W, eos", [(1, [7]), (5, [7]), (10, [7]), (5, [7, 9])])
def test_beam_search_equals_transformers_generate(tmp_path, llama, W, eos, penalty, shortest,
                                                  allowed):
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
                          prefix_allowed_tokens_fn=allowed and (
                              lambda b, ids: allowed(b, ids[T:].tolist())),
                          return_dict_in_generate=True, output_scores=True)
    ours, scores = beam_search(TemporalLlama(llama, "none"),
                               [(p, [NO_ITEM] * len(p)) for p in prompts], W, max_new_tokens=12,
                               min_new_tokens=shortest, length_penalty=penalty, eos_ids=eos,
                               prefix_allowed_tokens_fn=allowed)
    lengths = {len(answer) for beams in ours for answer in beams}
    assert len(lengths) > 1 or W == 1
    for mine, other in zip(itertools.chain(*ours), out.sequences[:, T:].tolist(), strict=True):
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


class Markov(torch.nn.Module):
    """The next token depends on the last one only; row i of the table has p(next | i)."""

    def __init__(self, table):
        super().__init__()
        self.log_p = torch.nn.Parameter(torch.tensor(table).log())

    def forward(self, tokens, item_pos, positions=None, mask=None, past=None, last=0):
        return self.log_p[tokens[:, -last:]], past

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize("penalty, answers, log_p", [
    (0.0, [[2, 3], [1, 3]], [math.log(0.36), math.log(0.25)]),
    (1.0, [[2, 3], [1, 2, 3]], [math.log(0.36) / 2, math.log(0.135) / 3])])
def test_two_beams_by_hand(penalty, answers, log_p):
    """Word 3 is EOS. The likelier first word, 1, leads to the less likely answer.

    After two steps there are the answers 2 3 (p = 0.4 · 0.9) and 1 3 (0.5 · 0.5), and the beams 1 2
    (0.15) and 1 1 (0.1). In the third step 1 2 3 (0.15 · 0.9) ends, whose mean log p is larger than
    that of 1 3. Nothing can follow then.
    """
    model = Markov([[0.0, 0.5, 0.4, 0.1], [0.0, 0.2, 0.3, 0.5], [0.0, 0.05, 0.05, 0.9], [0.0] * 4])
    found, scores = beam_search(model, [([0], [NO_ITEM])], 2, 9, 0, penalty, [3])
    assert found == [answers]
    torch.testing.assert_close(scores, torch.tensor([log_p]))


def test_beams_go_on_where_several_ends_are_likelier_than_any_word():
    """Words 2 and 3 are EOS, and in the second step the four best continuations end. Long answers
    are favoured so much that all these are given up for longer ones."""
    model = Markov([[0.07, 0.03, 0.6, 0.3]] * 4)
    found, scores = beam_search(model, [([0], [NO_ITEM])], 2, 3, 0, 3.0, [2, 3])
    assert found == [[[0, 0, 2], [0, 0, 3]]]
    torch.testing.assert_close(scores, torch.tensor([[math.log(0.07**2 * 0.6) / 27,
                                                      math.log(0.07**2 * 0.3) / 27]]))


def test_what_comes_after_a_prompt_is_done_does_not_count():
    """Word 2 is EOS and likeliest at first, so one beam is done; 1 1 1 1 would have more per token.
    """
    model = Markov([[0.0, 0.49, 0.51], [0.0, 0.99, 0.01], [0.0] * 3])
    found, scores = beam_search(model, [([0], [NO_ITEM]), ([1], [NO_ITEM])], 1, 4, 0, 1.0, [2])
    assert found == [[[2]], [[1, 1, 1, 1]]]
    torch.testing.assert_close(scores, torch.tensor([[math.log(0.51)], [math.log(0.99)]]))


def test_kept_answers_are_sorted_and_an_earlier_one_wins_a_tie():
    answers = [(-2.0, [3, 4]), (-math.inf, [8]), (-1.0, [1, 2]), (-2.0, [7])]
    assert best_answers(answers, 2) == [(-1.0, [1, 2]), (-2.0, [3, 4])]
    assert best_answers(answers, 9) == [(-1.0, [1, 2]), (-2.0, [3, 4]), (-2.0, [7])]


def test_the_allowed_tokens_keep_their_log_p_and_all_others_lose_it():
    log_p = torch.arange(12.0).view(1, 3, 4)
    beams = [[(-1.0, 0, [7]), (-math.inf, 0, [8]), (-2.0, 0, [9])]]     # the second is dead
    kept = keep_allowed(log_p, beams, lambda b, answer: {7: [0, 3], 8: [1], 9: [2]}[answer[0]])
    assert kept.tolist() == [[[0, -math.inf, -math.inf, 3], [-math.inf] * 4,
                              [-math.inf, -math.inf, 10, -math.inf]]]


def test_beams_that_may_follow_some_tokens_only_equal_brute_force_over_what_is_allowed(toy):
    """Scores are the model's own log p. Prompts are restricted each by itself, one of them to
    nothing, and there are no more answers than are allowed."""
    def allowed(b: int, answer: list[int]) -> list[int]:
        words = [[0, 1, 2, 3], [1, 2], []][b]
        return [word for word in words if word not in answer] + [EOS] * bool(words and answer)
    found, scores = beam_search(toy, PROMPTS, 60, 4, 0, 0.0, [EOS], allowed)
    sizes = []
    for b, (prompt, sequences, values) in enumerate(zip(PROMPTS, found, scores)):
        answers = [a for a in all_answers(4, 0) if all(
            token in allowed(b, a[:i]) for i, token in enumerate(a))]
        exact = sorted(zip(log_likelihoods(toy, prompt, answers), answers), reverse=True
                       ) if answers else []
        assert sequences == [answer for _, answer in exact][:60]
        torch.testing.assert_close(values[:len(sequences)], torch.tensor(
            [log_p for log_p, _ in exact][:60]), rtol=1e-4, atol=1e-4)
        assert (values[len(sequences):] == -math.inf).all()
        sizes.append(len(answers))
    assert sizes == [64, 4, 0]


# ------------------------------------------------------------------ grounding and lists


@pytest.fixture
def catalogue(tokenizer) -> Catalogue:
    return Catalogue(TITLES, "movies", tokenizer)


@pytest.mark.parametrize("kind", ["rope", "sinpe"])
def test_grounding_finds_each_catalogue_title_at_distance_0(temporal, catalogue, kind):
    model = temporal(kind)
    assert ground(model, TITLES, catalogue)[:, 0].tolist() == list(range(len(TITLES)))
    quoted = ground(model, [f' "{t}" ' for t in TITLES], catalogue)
    assert quoted[:, 0].tolist() == list(range(len(TITLES)))
    table = embed_titles(model, TITLES, catalogue.tokenizer)
    for rows in (1, 5):
        torch.testing.assert_close(embed_titles(model, TITLES, catalogue.tokenizer, rows), table,
                                   rtol=1e-4, atol=1e-5)
    for title, vector in zip(TITLES, table):        # BOS, the bare title, and nothing of an item
        tokens = torch.tensor([catalogue.tokenizer.bpe.encode(title).ids])
        with torch.no_grad():
            hidden, _ = model(tokens, torch.full_like(tokens, NO_ITEM))
        torch.testing.assert_close(vector, hidden[0, -1], rtol=1e-4, atol=1e-5)


def test_an_empty_answer_is_grounded_as_eos_where_there_is_no_bos(temporal, tokenizer):
    model, bare = temporal(), tokenizers.Tokenizer.from_str(tokenizer.bpe.to_str())
    bare.post_processor = tokenizers.processors.Sequence([])
    without_bos = Tokenizer(bare, (7, 8))
    with torch.no_grad():
        eos = model(torch.tensor([[7]]), torch.tensor([[NO_ITEM]]))[0][0, 0]
    torch.testing.assert_close(embed_titles(model, ["Heat", '" "'], without_bos)[1], eos)
    ranking = ground(model, [""], Catalogue(TITLES, "movies", without_bos))[0]
    assert sorted(ranking.tolist()) == list(range(len(TITLES)))


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error_wherever_they_appear(temporal, tokenizer, value):
    """In the first token after a prompt, in a later one, and in the embedding of a title."""
    model, prompts = temporal("none"), prompts_of(tokenizer, HISTORIES[:1])
    head = model.llama.lm_head.weight
    clean_row = head[5].clone()
    for work in (lambda: read_prompts(model, prompts), lambda: beam_search(model, prompts, 2, 3)):
        head.data[5] = value
        with pytest.raises(ValueError, match="scores are not finite: float16 or too high a rate"):
            work()
        head.data[5] = clean_row
        work()
    model.llama.norm.weight.data[:] = value
    with pytest.raises(ValueError, match="scores are not finite"):
        embed_titles(model, TITLES, tokenizer)


def prompts_of(tokenizer, histories, titles=TITLES):
    """Prompts of the factual world, encoded one by one."""
    examples = [encode_example(tokenizer, [titles[i] for i in h], None) for h in histories]
    return [(e.tokens, e.item_pos) for e in examples]


def answer_of(tokenizer, title) -> list[int]:
    """`"title"` and EOS as they follow a prompt."""
    example = encode_example(tokenizer, ["Heat"], title)
    return [t for t, label in zip(example.tokens, example.labels) if label != IGNORE]


def texts_of_beams(model, tokenizer, prompt, beams, longest, shortest) -> list[str]:
    """What the beams of a prompt say."""
    answers, _ = beam_search(model, [prompt], beams, longest, shortest, eos_ids=tokenizer.eos_ids)
    return [clean(tokenizer.decode(answer)) for answer in answers[0]]


@pytest.mark.parametrize("ground_list", ["merged", "single"])
def test_free_beams_are_grounded_merged_and_rid_of_the_history(temporal, catalogue, ground_list):
    """Answers of three tokens are among them, which are the shortest titles (D12)."""
    model, tokenizer = temporal("rope"), catalogue.tokenizer
    model.llama.lm_head.weight.data[tokenizer.eos_ids[0]] *= 10         # so that answers end early
    kept, dropped = (GroundedBeams(model, catalogue, Decoding(
        beams=3, exclude_history=flag, ground_list=ground_list))(HISTORIES)
        for flag in (False, True))
    longest = max(len(answer_of(tokenizer, title)) for title in TITLES) - 1 + 8     # without EOS
    longer = []
    for i, prompt in enumerate(prompts_of(tokenizer, HISTORIES)):
        texts = texts_of_beams(model, tokenizer, prompt, 3, longest, 3)
        longer.append(texts_of_beams(model, tokenizer, prompt, 3, longest, 4) != texts)
        rankings = ground(model, texts, catalogue).tolist()[:3 if ground_list == "merged" else 1]
        for lists, excluded in ((kept, []), (dropped, HISTORIES[i])):
            ten = merge_lists(rankings, excluded, 10)
            assert lists.items[i].tolist() == ten + [-1] * (10 - len(ten))
        assert kept.valid[i].tolist() == [text in TITLES for text in texts]
    assert any(longer) and dropped.items[1].tolist().count(-1) == 2     # 13 titles less 5 are 8
    assert np.isnan(kept.log_p).all()


def test_only_the_factual_world_recommends(temporal, catalogue):
    """§4.4: the lists are those of prompts with their items' positions, and not of the same prompts
    with the order erased.

    Beams on titles are so many that they find the likeliest titles of all.
    """
    model, tokenizer = temporal("rope"), catalogue.tokenizer
    free = GroundedBeams(model, catalogue, Decoding(beams=3, exclude_history=False))
    on_titles = TitleBeams(model, catalogue, exclude_history=False, beams=len(TITLES))
    lists = free(HISTORIES).items.tolist(), on_titles(HISTORIES).items.tolist()
    answers = [answer_of(tokenizer, title) for title in TITLES]
    for i, (tokens, item_pos) in enumerate(prompts_of(tokenizer, HISTORIES)):
        for world, expected in ((item_pos, True),
                                (erase_order(torch.tensor(item_pos)).tolist(), False)):
            prompt = (tokens, world)
            texts = texts_of_beams(model, tokenizer, prompt, 3, free.longest, free.shortest)
            log_p = log_likelihoods(model, prompt, answers)
            likeliest = sorted(range(len(TITLES)), key=lambda item, log_p=log_p: -log_p[item])
            assert (lists[0][i] == merge_lists(ground(model, texts, catalogue).tolist())
                    ) == expected
            assert (lists[1][i] == likeliest[:10]) == expected


def test_prompts_come_by_length_each_once_with_its_own_ages(catalogue):
    ages = [np.array(row) for row in (
        [3.5, 1.0, 0.0], [9.0, 8.0, 2.5, 1.5, 0.5], [4.0, 3.0, 2.0, 1.0])]
    groups = list(prompts_by_length(catalogue, HISTORIES, ages, 2, ""))
    assert [len(chunk) for chunk, _ in groups] == [2, 1]
    letters = [sum(len(TITLES[item]) for item in HISTORIES[i]) for chunk, _ in groups
               for i in chunk]
    assert letters == sorted(letters) and len(set(letters)) == 3
    rows = [(i, prompt) for chunk, prompts in groups for i, prompt in zip(chunk, prompts)]
    assert sorted(i for i, _ in rows) == [0, 1, 2]
    for i, (tokens, item_pos) in rows:
        e = encode_example(catalogue.tokenizer, [TITLES[item] for item in HISTORIES[i]], None,
                           ages=ages[i])
        assert (tokens, item_pos) == (e.tokens, e.item_pos) and ages[i][0] in item_pos


def test_d12_answers_may_be_as_short_as_the_shortest_title_and_little_longer_than_the_longest(
        temporal, tokenizer):
    lengths = []
    for titles in (TITLES, ["rare words", "rarer words"], [*TITLES, "a b c d e " * 20]):
        sizes = [len(answer_of(tokenizer, title)) - 1 for title in titles]      # without EOS
        recommender = GroundedBeams(temporal(), Catalogue(titles, "movies", tokenizer))
        assert recommender.shortest == min(4, min(sizes))
        assert recommender.longest == min(128, max(sizes) + 8)
        lengths.append((recommender.shortest, recommender.longest))
    assert len(set(lengths)) == 3 and lengths[2][1] == 128 and lengths[1][0] > lengths[0][0]


def test_a_long_history_does_not_run_out_of_neighbours(temporal, tokenizer):
    titles, long = [f"{t} {i}" for i in (1, 2) for t in TITLES], list(range(1, 16))
    items = GroundedBeams(temporal(), Catalogue(titles, "movies", tokenizer),
                          Decoding(beams=1, ground_list="single"))([[0], long]).items
    assert (items >= 0).all() and not set(items[1].tolist()) & set(long)


def test_d11_base_weights_ground_without_the_factors(temporal, catalogue):
    """Titles and texts are embedded without them; the texts themselves come from the tuned model.
    """
    model, (prompt,) = temporal(), prompts_of(catalogue.tokenizer, HISTORIES[:1])
    for p in add_lora(model, dropout=0.0):
        p.data.normal_(std=0.5)
    recommenders = {weights: GroundedBeams(model, catalogue, Decoding(
        beams=2, ground_with=weights, exclude_history=False)) for weights in ("base", "tuned")}
    texts = texts_of_beams(model, catalogue.tokenizer, prompt, 2, recommenders["base"].longest,
                           recommenders["base"].shortest)
    by_tuned = merge_lists(ground(model, texts, catalogue).tolist())
    with without_factors(model):
        by_base = merge_lists(ground(model, texts, catalogue).tolist())
    assert recommenders["base"](HISTORIES[:1]).items[0].tolist() == by_base
    assert recommenders["tuned"](HISTORIES[:1]).items[0].tolist() == by_tuned != by_base


def test_a_hundred_thousand_titles_are_ranked_in_bounded_pieces(monkeypatch):
    sizes, table = [], torch.randn(100_000, 3)

    def counted(a, b, **rest):
        sizes.append(len(a) * len(b))
        return (a[:, None] - b[None]).norm(dim=-1)
    monkeypatch.setattr(torch, "cdist", counted)
    table[99_999] = table[5]
    join, kept = torch.cat, []
    monkeypatch.setattr(torch, "cat", lambda parts: kept.extend(parts) or join(parts))
    found = nearest(table[[5] * 100 + [7]], table, 3)
    assert sum(part.untyped_storage().nbytes() for part in kept) == 101 * 3 * 8
    assert found[0, :2].tolist() == [5, 99_999] and found[100, 0] == 7
    assert len(sizes) == 2 and max(sizes) <= 2**23


# ------------------------------------------------------------------ what is run, and how often


def test_the_common_prefix_runs_once_each_prompt_once_and_beams_token_by_token(toy):
    """Rows and columns of each forward."""
    ran = []
    toy.register_forward_pre_hook(lambda module, args: ran.append(tuple(args[0].shape)))
    prompts = [([1, 2, 0] + rest, [NO_ITEM] * (3 + len(rest))) for rest in ([3], [3, 1], [2, 2])]
    beam_search(toy, prompts, 3, 6, 6, 0.0, [EOS])
    assert ran == [(1, 2), (3, 3)] + [(3, 3)] * 5


def test_prompts_of_unequal_length_are_read_as_each_alone(toy):
    """The logits after each prompt, which columns hold it, and those after three more tokens."""
    prompts = [([1, 2, 0, 3, 1], [NO_ITEM] * 5), ([1, 2, 2], [NO_ITEM] * 3)]
    more = torch.tensor([[3, 1, 2], [0, 0, 1]])
    with torch.inference_mode():
        logits, past, seen = read_prompts(toy, prompts)
        mask = torch.cat((seen[:, None].expand(2, 3, -1), torch.ones(2, 3, 3).tril().bool()), -1)
        hidden, _ = toy(more, torch.full_like(more, NO_ITEM), mask.sum(dim=-1) - 1, mask[:, None],
                        past)
        for row, (tokens, _) in enumerate(prompts):
            whole = torch.tensor([tokens + more[row].tolist()])
            alone, _ = toy(whole, torch.full_like(whole, NO_ITEM))
            torch.testing.assert_close(logits[row], toy.logits(alone[0, len(tokens) - 1]))
            torch.testing.assert_close(hidden[row], alone[0, len(tokens):])
    assert seen.int().tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]]


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


def test_a_list_is_worth_the_expectation_where_the_true_distribution_is_known():
    """By hand, and as the mean over answers drawn from it."""
    true_p, items = np.array([[0.5, 0.3, 0.2, 0.0]]), np.array([[1, 0, -1]])
    by_hand = [0.8, 0.3 + 0.5 / math.log2(3)] * 2
    np.testing.assert_allclose(list_values(items, np.array([0]), true_p)[0], by_hand)
    drawn = np.random.default_rng(1).choice(4, 20_000, p=true_p[0])
    simulated = list_values(np.repeat(items, len(drawn), axis=0), drawn).mean(axis=0)
    np.testing.assert_allclose(simulated, by_hand, atol=0.01)


def test_standard_errors_by_hand():
    mean, error = summarise(ranked(*[0, 99] * 10))["HR@5"]
    assert mean == 0.5 and error == pytest.approx(math.sqrt(20 * 0.25 / 19) / math.sqrt(20))


@pytest.mark.parametrize("hits", [0, 1, 9, 10])
def test_ten_hits_have_a_standard_error_and_a_change_and_fewer_have_none(hits):
    """Of 1,000 lists, whose answers are at rank 6 or absent: NDCG@10 counts the same hits."""
    few, many = ranked(*[6] * hits, *[99] * (1_000 - hits)), ranked(*[6] * 500, *[99] * 500)
    for metric in ("HR@10", "NDCG@10"):
        mean, error = summarise(few)[metric]
        assert mean == pytest.approx(few[:, 2 + ("N" in metric)].mean())
        assert math.isnan(error) == (hits < 10)
        assert np.isnan(relative_change(few, many)[metric]).all() == (hits < 10)
        change, error = relative_change(many, few)[metric]      # tells much, but not how exactly
        assert change == pytest.approx(100 * (hits / 500 - 1)) and math.isnan(error) == (hits < 10)
    assert np.isnan(relative_change(many, many)["HR@5"]).all()


def test_an_expectation_is_a_hit_of_its_sequence():
    """Where the law values lists, each list is worth something, and ten lists are enough."""
    values = np.full((10, 4), 1e-3)
    assert summarise(values)["HR@5"] == pytest.approx((1e-3, 0))
    assert math.isnan(summarise(values[:9])["HR@5"][1])


def test_change_under_reversal_is_paired_and_in_per_cent():
    before, after = ranked(*[0, 0, 0, 99] * 10), ranked(*[0, 99, 99, 99] * 10)
    change, error = relative_change(before, after)["HR@5"]
    assert change == pytest.approx(-200 / 3)
    # The residuals after - before / 3 are 2/3, -1/3, -1/3 and 0, whose squares sum to 2/3.
    assert error == pytest.approx(100 * math.sqrt(10 * 2 / 3 / 39 / 40) / 0.75)
    assert relative_change(before, before)["HR@5"] == (0.0, 0.0)


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
    test = split_by_time(make_sequences(world.interactions(200)))[2]
    seen = []

    def pretend(histories, ages=None, progress=""):
        seen.append([list(h) for h in histories])
        lists = Lists.empty(len(histories), 2)
        lists.items[:] = np.arange(10) + 5 * progress.endswith("reversed")
        return lists
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
    true_p = world.true_distribution(original)
    valued, _ = evaluate_order({"beams": pretend}, test, true_p)
    assert valued["beams"]["HR@5"][0] == pytest.approx(true_p[:, :5].sum(axis=1).mean())


def test_recommenders_get_the_ages_of_items_where_k_is_read_off_the_clock():
    """Ages belong to the places of a history and stay as they are when its items move (D15). The
    answer comes 10, 8 and 7 days after the items."""
    x = Interactions(np.zeros(4, dtype=int), np.arange(4), np.array([0, 2, 3, 10]) * 86_400,
                     list("abcd"))
    passed = []
    for index in ("order", "time"):
        sequences = make_sequences(x, index=index)
        evaluate_order({"beams": lambda histories, ages, progress: (
            passed.append(ages), Lists.empty(len(histories)))[1]}, sequences)
    assert passed[:3] == [None] * 3
    for ages in passed[3:]:
        np.testing.assert_allclose(ages, [np.log2([11, 9, 8])])


def test_the_table_has_a_line_per_row_and_a_column_per_metric():
    values = summarise(ranked(*[0, 3, 7, 99] * 10))
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
        cell = "-33.2 ± 2.5 %" if "change" in name else "0.5000 ± 0.0801"
        assert line.startswith(f"{name}  ") and line[len(name):].split("  ")[0] == ""
        assert line[len(name):].strip().startswith(cell)
