"""support/trie.py: the catalogue as one trie against titles scored one by one."""

import math

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TITLES, small_config
from test_evaluate import HISTORIES, answer_of, log_likelihoods, prompts_of

from cetrec import TemporalLlama
from data import Tokenizer
from evaluate import beam_search
from llama import Llama
from support.trie import ExactTitles, TitleBeams, Trie, Walk, catalogue_log_likelihood


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
                                model.tokenizer.eos_ids[:1],
                                Walk(trie, [()] * len(prompts), len(TITLES)))
    for prompt, answers, values in zip(prompts, found, scores):
        exact = brute_force(model, prompt)
        order = sorted(range(len(TITLES)), key=lambda i: -exact[i])
        assert answers == [answer_of(model, TITLES[i]) for i in order]
        torch.testing.assert_close(values, torch.tensor(sorted(exact, reverse=True)), rtol=1e-4,
                                   atol=1e-4)


def test_narrow_beams_on_the_trie_give_distinct_titles_without_the_history(catalogue_model):
    made = TitleBeams(catalogue_model, TITLES, "movies")(HISTORIES)
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
    for kind in (TitleBeams, ExactTitles):
        made = kind(model, titles, "movies")([[0, 1, 5], [0, 1, 2]])
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
    made = ExactTitles(model, TITLES, "movies")(HISTORIES)
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
