"""support/trie.py: the catalogue as one trie against titles scored one by one."""

import math

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TITLES, small_config
from test_evaluate import HISTORIES, answer_of, log_likelihoods, prompts_of

from cetrec import TemporalLlama
from data import Catalogue, Tokenizer, build_prompt
from evaluate import beam_search
from llama import Llama
from support.trie import ExactTitles, TitleBeams, Trie, catalogue_log_likelihood


@pytest.fixture(params=["tokenizer", "llama3_tokenizer"])
def any_tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def model(any_tokenizer) -> TemporalLlama:
    torch.manual_seed(1)
    llama = Llama(small_config(vocab_size=any_tokenizer.bpe.get_vocab_size()))
    for p in llama.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return TemporalLlama(llama, "rope").eval()


def catalogue_of(tokenizer, titles=TITLES) -> Catalogue:
    return Catalogue(titles, "movies", tokenizer)


def brute_force(model, tokenizer, prompt, titles=TITLES) -> list[float]:
    """log p of every title and EOS, each in a row of its own."""
    return log_likelihoods(model, prompt, [answer_of(tokenizer, title) for title in titles])


@pytest.fixture
def letters():
    """The trie of "a", "a b" and "c" over single letters, and the token of each letter."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.train_from_iterator([], tokenizers.trainers.BpeTrainer(
        vocab_size=257, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
    trie = Trie(catalogue_of(Tokenizer(bpe, (0,)), ["a b", "c", "a"]))
    return trie, {letter: bpe.encode(letter).ids[0] for letter in 'abc "'} | {".": 0}


def test_the_trie_of_three_titles_by_hand(letters):
    """As Trie's docstring shows it. The items are "a b", "c" and "a", in this order."""
    trie, code = letters
    assert trie.token[1:].tolist() == [code[letter] for letter in '"a". b".c".']
    assert trie.parent[1:].tolist() == [0, 1, 2, 3, 2, 5, 6, 7, 1, 9, 10]
    assert trie.end.tolist() == [12, 12, 9, 5, 5, 9, 9, 9, 9, 12, 12, 12]
    assert trie.below.tolist() == [3, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert trie.leaf.tolist() == [8, 11, 4] and trie.longest == 6
    rows, kids = trie.children(np.array([2, 4, 1]))
    assert rows.tolist() == [0, 0, 2, 2] and kids.tolist() == [3, 5, 2, 9]
    assert trie.closed([0, 0]) == {5, 6, 7, 8} and trie.closed([]) == set()
    assert trie.closed([0, 2]) == {2, 3, 4, 5, 6, 7, 8}
    assert trie.items == {tuple(code[letter] for letter in answer): [item] for item, answer in
                          enumerate(('"a b".', '"c".', '"a".'))}


def test_pieces_of_the_trie_by_hand(letters):
    """Nodes with children are 1 2 3 5 6 7 9 10. The path to the first of a piece comes before it.
    """
    pieces = list(letters[0].subtrees(3))
    assert [(path, nodes.tolist()) for path, nodes, _ in pieces] == [
        (0, [1, 2, 3]), (2, [1, 2, 5, 6, 7]), (1, [1, 9, 10])]
    assert pieces[0][2].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    (_, nodes, ancestor), = letters[0].subtrees(8)
    assert [nodes[row].tolist() for row in ancestor] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 5], [1, 2, 5, 6], [1, 2, 5, 6, 7], [1, 9], [1, 9, 10]]


@pytest.mark.parametrize("beginning, excluded, continuations", [
    ("", [], '"'), ('"', [], "ac"), ('"', [1], "a"), ('"', [0], "ac"), ('"', [0, 2], "c"),
    ('"a', [], '" '), ('"a', [0], '"'), ('"a', [2], " "), ('"a"', [], "."), ('"a ', [1], "b"),
    ('"c".', [], "")])
def test_the_tokens_that_may_follow_by_hand(letters, beginning, excluded, continuations):
    """Items are "a b", "c" and "a": a beginning goes on to those of them that are not excluded."""
    trie, code = letters
    following = trie.continuations([code[letter] for letter in beginning], trie.closed(excluded))
    assert sorted(following) == sorted(code[letter] for letter in continuations)


def test_the_trie_spells_every_title_and_nothing_else(any_tokenizer):
    titles = [*TITLES, "Heat"]                      # the sixth title again
    trie = Trie(catalogue_of(any_tokenizer, titles))
    answers = [answer_of(any_tokenizer, title) for title in titles]
    beginnings = {tuple(answer[:n]) for answer in answers for n in range(1, trie.longest + 1)}
    assert len(trie.token) - 1 == len(beginnings)
    for beginning in [(), *beginnings]:
        assert {(*beginning, token) for token in trie.continuations(beginning, set())} == {
            longer for longer in beginnings if longer[:-1] == beginning}
    for item, answer in enumerate(answers):
        path, node = [], trie.leaf[item]
        while node > 0:
            path.insert(0, trie.token[node])
            node = trie.parent[node]
        assert path == answer and item in trie.items[tuple(answer)]
    assert trie.leaf[13] == trie.leaf[5] and trie.below[0] == 14 and trie.below[trie.leaf[5]] == 2
    assert (trie.parent[1:] < np.arange(1, len(trie.parent))).all()
    inner = np.flatnonzero(trie.end - np.arange(len(trie.end)) > 1)
    rows, kids = trie.children(inner)
    assert sorted(kids.tolist()) == list(range(1, len(trie.token)))
    assert (trie.parent[kids] == inner[rows]).all()


def test_wide_beams_on_the_trie_rank_all_titles_as_brute_force_does(model, any_tokenizer):
    trie, prompts = Trie(catalogue_of(any_tokenizer)), prompts_of(any_tokenizer, HISTORIES)
    found, scores = beam_search(model, prompts, len(TITLES), trie.longest, 0, 0.0,
                                any_tokenizer.eos_ids[:1],
                                lambda b, answer: trie.continuations(answer, set()))
    for prompt, answers, values in zip(prompts, found, scores):
        exact = brute_force(model, any_tokenizer, prompt)
        order = sorted(range(len(TITLES)), key=lambda i: -exact[i])
        assert answers == [answer_of(any_tokenizer, TITLES[i]) for i in order]
        torch.testing.assert_close(values, torch.tensor(sorted(exact, reverse=True)), rtol=1e-4,
                                   atol=1e-4)


def test_narrow_beams_on_the_trie_give_distinct_titles_without_the_history(model, any_tokenizer):
    lists = TitleBeams(model, catalogue_of(any_tokenizer))(HISTORIES)
    for history, items, log_p, prompt in zip(HISTORIES, lists.items, lists.log_p,
                                             prompts_of(any_tokenizer, HISTORIES)):
        found, exact = items[items >= 0], np.array(brute_force(model, any_tokenizer, prompt))
        assert len(set(found.tolist())) == len(found) == min(10, 13 - len(history))
        assert not set(history) & set(found.tolist())
        np.testing.assert_allclose(log_p[items >= 0], exact[found], atol=1e-4)
        assert (np.diff(log_p[items >= 0]) <= 0).all()


@pytest.mark.parametrize("kind", [TitleBeams, ExactTitles])
def test_the_history_may_be_recommended_again_if_asked(temporal, tokenizer, kind):
    model, (prompt,) = temporal(), prompts_of(tokenizer, [[0, 1, 2]])
    lists = kind(model, catalogue_of(tokenizer), exclude_history=False)([[0, 1, 2]])
    exact = np.array(brute_force(model, tokenizer, prompt))
    assert set(lists.items[0].tolist()) & {0, 1, 2} and len(set(lists.items[0].tolist())) == 10
    np.testing.assert_allclose(lists.log_p[0], exact[lists.items[0]], atol=1e-4)


@pytest.mark.parametrize("kind", [TitleBeams, ExactTitles])
def test_histories_in_any_number_and_order_are_served_as_alone(temporal, tokenizer, kind):
    """There are more than one chunk of them, of lengths 1 to 3, the longer ones first."""
    rng = np.random.default_rng(0)
    histories = [rng.permutation(6)[:n].tolist() for n in (3, 2, 1) for _ in range(22)]
    recommend = kind(temporal(), catalogue_of(tokenizer, TITLES[:6]))
    together = recommend(histories)
    assert (together.items[:, :3] >= 0).all() and (together.items[:, 5:] == -1).all()
    assert np.isnan(together.log_p[together.items == -1]).all()
    for i in (0, 21, 30, 65):
        alone = recommend([histories[i]])
        assert together.items[i].tolist() == alone.items[0].tolist()
        np.testing.assert_allclose(together.log_p[i], alone.log_p[0], atol=1e-4)


@pytest.mark.parametrize("kind", [TitleBeams, ExactTitles])
def test_ages_reach_the_prompt(temporal, tokenizer, kind):
    """Ages that are k itself change nothing, and others do (D15)."""
    recommend = kind(temporal("sinpe"), catalogue_of(tokenizer))
    usual, aged, timed = (recommend([[0, 1, 2]], ages).log_p[0] for ages in (
        None, [np.array([2.0, 1.0, 0.0])], [np.array([900.0, 300.0, 0.0])]))
    np.testing.assert_allclose(aged, usual, atol=1e-4)
    assert np.abs(timed - usual).max() > 1e-3


def test_items_of_one_title_share_its_rank_and_are_excluded_each_by_itself(temporal, tokenizer):
    for kind in (TitleBeams, ExactTitles):
        lists = kind(temporal(), catalogue_of(tokenizer, [*TITLES, "Heat"]))([[0, 1, 5], [0, 1, 2]])
        assert 13 in lists.items[0] and 5 not in lists.items[0]
        at = lists.items[1].tolist().index(5)
        assert lists.items[1, at + 1] == 13 and lists.log_p[1, at] == lists.log_p[1, at + 1]


@pytest.mark.parametrize("at_once", [1, 3, 128])
def test_exact_scores_equal_each_title_scored_by_itself(model, any_tokenizer, at_once):
    titles, prompts = [*TITLES, "Heat"], prompts_of(any_tokenizer, HISTORIES)
    scores = catalogue_log_likelihood(model, prompts, Trie(catalogue_of(any_tokenizer, titles)),
                                      at_once)
    exact = torch.tensor([brute_force(model, any_tokenizer, prompt, titles) for prompt in prompts])
    torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sinpe", "rope-attention", "none"])
def test_exact_scores_hold_for_every_temporal_embedding(temporal, tokenizer, kind):
    model, (prompt,) = temporal(kind), prompts_of(tokenizer, HISTORIES[:1])
    scores = catalogue_log_likelihood(model, [prompt], Trie(catalogue_of(tokenizer)), 5)
    torch.testing.assert_close(scores[0], torch.tensor(brute_force(model, tokenizer, prompt)),
                               rtol=1e-4, atol=1e-4)


def test_exact_recommendation_is_the_order_of_all_scores(temporal, tokenizer):
    model = temporal()
    lists = ExactTitles(model, catalogue_of(tokenizer))(HISTORIES)
    for history, items, prompt in zip(HISTORIES, lists.items, prompts_of(tokenizer, HISTORIES)):
        exact = brute_force(model, tokenizer, prompt)
        order = [i for i in sorted(range(13), key=lambda i: -exact[i]) if i not in history][:10]
        assert items.tolist() == order + [-1] * (10 - len(order))


def test_exact_work_is_linear_in_the_nodes_of_the_trie(temporal, tokenizer, monkeypatch):
    """Each node goes through the model once, and at most one path to it for each piece. Logits are
    computed once for each node that has children."""
    model, titles = temporal(), [f"{t} {i}" for i in range(40) for t in TITLES]
    trie, ran, projected = Trie(catalogue_of(tokenizer, titles)), [], []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (
        projected.append(hidden[..., 0].numel()), logits(hidden))[1])
    model.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape[1]))
    catalogue_log_likelihood(model, prompts_of(tokenizer, HISTORIES[:1]), trie, 64)
    inner = int((trie.end - np.arange(len(trie.end)) > 1).sum()) - 1
    pieces = ran[2:]                                # the prompts' common prefix and the rest of it
    assert len(pieces) == math.ceil(inner / 64)
    assert inner <= sum(pieces) <= inner + len(pieces) * trie.longest
    assert max(pieces) <= 64 + trie.longest
    assert sum(projected) == inner + 1              # and the prompt's end


def test_a_tokenizer_that_merges_prompt_and_answer_is_refused():
    assert build_prompt([])[0].endswith("Response:\n")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.train_from_iterator(['Response:\n"Heat"'] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    with pytest.raises(ValueError, match="merges the prompt's end with the answer 'Heat'.*"
                                         "Use another base or, where .*, --lists beams"):
        Trie(catalogue_of(Tokenizer(bpe, (0,)), ["Heat"]))
