"""The paper's equations in the paper's order, each by hand and as a property.

Read this file beside the paper. `pytest tests/test_equations.py -v` prints its table of contents.
Numbers and closed forms are written out here; what they are compared with is the code that the
command runs.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TITLES, small_config

from cetrec import (cetrec_loss, counterfactual_loss, erase_order, rotary, sinusoidal,
                    temporal_aware_loss, tuning_step, twin_forward, world_logits)
from data import (IGNORE, NO_ITEM, Interactions, collate, encode_example, make_sequences,
                  split_by_time)
from evaluate import (Lists, beam_search, embed_titles, evaluate_order, ground, hit_ratio,
                      list_values, merge_lists, ndcg, nearest)
from llama import Llama, inverse_frequencies, pick, rotate
from lora import add_lora

LN2 = math.log(2)
close = torch.testing.assert_close


@pytest.fixture
def batch(tokenizer):
    """Prompts of three, six and four items with their answers."""
    return collate([encode_example(tokenizer, TITLES[:n], TITLES[-n]) for n in (3, 6, 4)])


# ------------------------------------------------------------ §3.1 The prompt and the likelihood


def test_table1_the_prompt_asks_and_the_quoted_title_answers(tokenizer):
    example = encode_example(tokenizer, ["Ran", "Heat"], "Se7en (1995)")
    text = tokenizer.decode(example.tokens)
    assert ("Given a list of movies the user has watched before, please recommend a new movie that "
            "the user likes to the user.") in text
    assert 'The user has watched the following movies before:"Ran", "Heat"\n' in text
    assert text.endswith('### Response:\n"Se7en (1995)"')
    answer = [token for token, label in zip(example.tokens, example.labels) if label != IGNORE]
    assert tokenizer.decode(answer) == '"Se7en (1995)"' and answer[-1] == tokenizer.eos_ids[0]
    assert example.labels == [IGNORE] * (len(example.tokens) - len(answer)) + answer


def test_eq01_by_hand_the_mean_of_minus_log_p():
    """p(y_1) = 1/2 and p(y_2) = 1/8: the mean of -ln p is (1 + 3) / 2 · ln 2."""
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]] * 2).log() + torch.tensor([[5.0], [-7.0]])
    close(temporal_aware_loss(logits, torch.tensor([0, 2])), torch.tensor(2 * LN2))


def test_eq01_the_loss_is_the_answers_log_likelihood_token_by_token(temporal, tokenizer):
    """Each token of the answer is predicted from the prompt and the answer's tokens before it."""
    model, example = temporal("rope"), encode_example(tokenizer, TITLES[:4], TITLES[7])
    answer = sum(label != IGNORE for label in example.labels)
    log_p = 0.0
    for t in range(len(example.tokens) - answer, len(example.tokens)):
        hidden = model(torch.tensor([example.tokens[:t]]), torch.tensor([example.item_pos[:t]]))
        log_p += model.logits(hidden[0, -1]).log_softmax(-1)[example.tokens[t]].item()
    loss = cetrec_loss(model, collate([example]), lambda_ct=0)[1]
    assert answer > 2 and loss.item() == pytest.approx(-log_p / answer, abs=1e-4)


def test_eq02_by_hand_the_frozen_map_and_its_factors():
    """W = 1, A = (1 1; 1 -1), B = (2 0; 0 1), α/R = 6/2: y = x + 3 · (2 (x1 + x2), x1 - x2)."""
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2, bias=False)})
    model["q_proj"].weight.data = torch.eye(2)
    A, B = add_lora(model, rank=2, alpha=6, dropout=0.0, targets=("q_proj",))
    A.data, B.data = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[2.0, 0], [0, 1]])
    close(model["q_proj"](torch.tensor([5.0, 7.0])), torch.tensor([77.0, 1.0]))


def test_eq02_tuning_moves_the_factors_and_nothing_else(temporal, batch):
    model = temporal("rope")
    factors = {id(p) for p in add_lora(model)}
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):          # B starts at zero, so A has a gradient from the second step on
        tuning_step(model, batch, optimizer, lr=0.01, lambda_ct=0.1, rows=3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in factors), name


# ------------------------------------------------------------ §4.2 Temporal embeddings


def test_eq03_by_hand_sines_and_cosines():
    p = sinusoidal(torch.tensor([0, 2]), 4, base=100.0)
    close(p, torch.tensor([[0.0, 1.0, 0.0, 1.0],
                           [math.sin(2), math.cos(2), math.sin(0.2), math.cos(0.2)]]))


def test_eq03_products_of_two_embeddings_depend_on_their_distance_only():
    """<p_j, p_k> = Σ_t cos((j - k) / 10000^(2t/dim))."""
    p, k = sinusoidal(torch.arange(10), 8), torch.arange(10.0)
    angles = (k[:, None] - k)[..., None] / 10_000 ** (torch.arange(0, 8, 2) / 8)
    close(p @ p.T, angles.cos().sum(-1), rtol=1e-4, atol=1e-5)


def block_diagonal(k: float, dim: int, base: float) -> torch.Tensor:
    """R_k of Eq. 4 written out as a matrix of 2 x 2 blocks."""
    matrix = torch.zeros(dim, dim)
    for t in range(dim // 2):
        a = k / base ** (2 * t / dim)
        matrix[2 * t:2 * t + 2, 2 * t:2 * t + 2] = torch.tensor(
            [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    return matrix


def test_eq04_by_hand_adjacent_pairs_turn_as_the_block_diagonal_matrix():
    x = torch.randn(5, 6)
    for k in range(5):
        close(rotary(x[k], torch.tensor(k), 50.0), block_diagonal(k, 6, 50.0) @ x[k])


def test_eq04_split_halves_are_the_same_rotation_up_to_the_order_of_coordinates():
    """The backbone's own rotation has (x_i, x_{i + dim/2}) where Eq. 4 has (x_2i, x_2i+1)."""
    x, order = torch.randn(6), [0, 2, 4, 1, 3, 5]
    angles = 3 * inverse_frequencies(small_config(head_dim=6, rope_theta=50.0))
    turned = rotate(x, angles.cos(), angles.sin())
    close(turned, block_diagonal(3, 6, 50.0)[order][:, order] @ x)
    assert not torch.allclose(turned, block_diagonal(3, 6, 50.0) @ x)
    close(rotate(x[order], angles.cos(), angles.sin()), rotary(x, torch.tensor(3), 50.0)[order])


def test_eq04_keeps_lengths_adds_up_and_is_nothing_at_0():
    x, pos = torch.randn(4, 7, 16), torch.randint(10, (4, 7))
    close(rotary(x, pos).norm(dim=-1), x.norm(dim=-1))
    close(rotary(rotary(x, pos), 0 * pos + 3), rotary(x, pos + 3), rtol=1e-4, atol=1e-5)
    assert torch.equal(rotary(x, 0 * pos), x)


def test_eq05_by_hand_a_score_turns_with_the_distance():
    """<R_m (1, 0), R_n (0, 1)> = sin(m - n)."""
    q, k, m, n = torch.tensor([1.0, 0]), torch.tensor([0.0, 1]), torch.tensor(5), torch.tensor(3)
    close(rotary(q, m) @ rotary(k, n), torch.tensor(math.sin(2)))


def test_eq05_scores_depend_on_distances_only():
    q, k = torch.randn(2, 8)
    inv_freq = inverse_frequencies(small_config())

    def score(m, n):
        return rotate(q, (m * inv_freq).cos(), (m * inv_freq).sin()) @ rotate(
            k, (n * inv_freq).cos(), (n * inv_freq).sin())
    close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_eq05_rope_attention_turns_item_tokens_by_t_plus_k(temporal, batch):
    model = temporal("rope-attention")
    positions = torch.arange(batch.tokens.shape[1]) + batch.item_pos.clamp(min=0)
    close(model(batch.tokens, batch.item_pos), model.llama(batch.tokens, positions=positions))
    everywhere = torch.full_like(batch.item_pos, 4)         # the same k changes no distance
    close(model(batch.tokens, everywhere), model.llama(batch.tokens), rtol=1e-4, atol=1e-5)


def test_eq06_by_hand_k_counts_back_from_the_newest_item_d1(tokenizer):
    example = encode_example(tokenizer, ["Ran", "Heat", "Se7en (1995)"], "Jumanji (1995)")
    for k, title in enumerate(["Se7en (1995)", "Heat", "Ran"]):
        assert tokenizer.decode([token for token, pos in zip(example.tokens, example.item_pos)
                                 if pos == k]) == title
    assert set(example.item_pos) == {NO_ITEM, 0, 1, 2}


@pytest.mark.parametrize("kind", ["rope", "sinpe"])
def test_eq06_all_tokens_of_an_item_share_one_temporal_embedding_and_others_have_none(
        temporal, batch, kind, monkeypatch):
    """The backbone's input at every token, against R_k x_t or x_t + 0.7 p_k."""
    model, seen = temporal(kind, scale=0.7), []
    monkeypatch.setattr(Llama, "forward", lambda self, tokens, embeddings, **rest:
                        seen.append(embeddings) or embeddings)
    model(batch.tokens, batch.item_pos)
    tok_emb, item = model.llama.embed(batch.tokens), batch.item_pos != NO_ITEM
    assert torch.equal(seen[0][~item], tok_emb[~item])
    assert item[1].sum() > 6 == len(batch.item_pos[1][item[1]].unique())    # six items, more tokens
    for row, t in item.nonzero().tolist():
        k, x_t = batch.item_pos[row, t], tok_emb[row, t]
        wanted = block_diagonal(int(k), 24, 10_000.0) @ x_t if kind == "rope" else (
            x_t + 0.7 * sinusoidal(k, 24))
        close(seen[0][row, t], wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ §4.3 The counterfactual world


def test_sec4_3_erased_world_by_hand_puts_every_item_at_0_d1():
    item_pos = torch.tensor([[NO_ITEM, 2, 2, NO_ITEM, 1, NO_ITEM, 0]])
    assert erase_order(item_pos).tolist() == [[NO_ITEM, 0, 0, NO_ITEM, 0, NO_ITEM, 0]]
    assert item_pos[0, 1] == 2          # the factual world is left as it is


@pytest.mark.parametrize("kind", ["rope", "rope-attention", "sinpe"])
def test_sec4_3_erased_world_is_one_whatever_the_order_was(temporal, batch, kind):
    """Where the items' k are dealt out anew, the factual world changes and the erased one does not.
    A rotary erased world is the plain Llama, bit for bit (D2); a sinusoidal one is not (D8)."""
    model, item = temporal(kind), batch.item_pos != NO_ITEM
    other = torch.where(item, 9 - batch.item_pos, NO_ITEM)
    worlds = [model(batch.tokens, world) for world in (
        batch.item_pos, other, erase_order(batch.item_pos), erase_order(other))]
    assert (worlds[0] - worlds[1]).abs().max() > 1e-3 and torch.equal(worlds[2], worlds[3])
    assert torch.equal(worlds[2], model.llama(batch.tokens)) == (kind != "sinpe")


# ------------------------------------------------------------ §4.4 Losses

F_LOGITS = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
CF_LOGITS = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
Y = torch.tensor([0, 1])


def test_eq07_by_hand_the_effect_is_the_ratio_of_the_worlds():
    """(1/2, 1/4, 1/4) over (1/4, 1/4, 1/2) is (2, 1, 1/2), which sums to 7/2: -ln(4/7) for y = 0.
    """
    p_f, p_cf = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    loss = counterfactual_loss(p_f.log(), p_cf.log(), torch.tensor([0]))
    close(loss, torch.tensor(math.log(7 / 4)))


def test_eq07_adding_a_vector_to_both_worlds_leaves_the_effect_alone():
    shift = torch.tensor([0.3, -2.0, 1.0])
    close(counterfactual_loss(F_LOGITS + shift, CF_LOGITS + shift, Y),
          counterfactual_loss(F_LOGITS, CF_LOGITS, Y))
    assert temporal_aware_loss(F_LOGITS + shift, Y) - temporal_aware_loss(F_LOGITS, Y) > 0.1


def test_eq08_by_hand_the_loss_of_the_difference_of_logits():
    """f - c is (1, 0, 0) and (0, -1, 0): ln((e + 2) / e) = .5514 and ln(2e + 1) = 1.8620."""
    close(counterfactual_loss(F_LOGITS, CF_LOGITS, Y), torch.tensor(
        (math.log((math.e + 2) / math.e) + math.log(2 * math.e + 1)) / 2))


def test_eq08_is_log_vocab_with_zero_gradient_where_both_worlds_agree(temporal, batch):
    model = temporal("none")
    loss = counterfactual_loss(*twin_forward(model, batch), batch.targets)
    assert loss.item() == pytest.approx(math.log(model.llama.config.vocab_size), abs=1e-5)
    loss.backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-6


def test_eq08_gradients_flow_through_both_worlds_d3(temporal, batch):
    f, c = F_LOGITS.clone().requires_grad_(), CF_LOGITS.clone().requires_grad_()
    counterfactual_loss(f, c, Y).backward()
    close(f.grad, ((f - c).softmax(-1) - F.one_hot(Y, 3)).detach() / 2)
    close(c.grad, -f.grad)
    model = temporal("rope")
    weight, worlds = model.llama.layers[0].self_attn.q_proj.weight, twin_forward(model, batch)
    both, one = (torch.autograd.grad(counterfactual_loss(worlds[0], erased, batch.targets), weight,
                                     retain_graph=True)[0]
                 for erased in (worlds[1], worlds[1].detach()))
    assert (both - one).norm() > 0.1 * both.norm()


def test_eq08_for_a_given_factual_world_the_best_erased_world_is_f_minus_log_p():
    """Eight answers to one prompt have the shares p = (1/2, 1/4, 1/8, 1/8), whose entropy H is
    1.75 ln 2. L_CT has its only minimum, H, where softmax(f(x_t) - f(x_0)) = p, so at
    f(x_0) = f(x_t) - ln p + constant. L_TA drives f(x_t) to ln p, and then that is uniform."""
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    f, log_p = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    best, free = (f - log_p + 3).requires_grad_(), torch.zeros(4, requires_grad=True)

    def loss_ct(f, f_0):
        return counterfactual_loss(f.expand(8, 4), f_0.expand(8, 4), y)
    loss_ct(f, best).backward()
    close(loss_ct(f, best), torch.tensor(1.75 * LN2))
    close(best.grad, torch.zeros(4))
    for _ in range(300):                                    # gradient descent from f(x_0) = 0
        free.data -= 2 * torch.autograd.grad(loss_ct(f, free), free)[0]
    close(free - free.mean(), best - best.mean(), rtol=0, atol=1e-3)
    uniform = torch.full((4,), 7.0)
    close(loss_ct(log_p, uniform), temporal_aware_loss(log_p.expand(8, 4), y))


def test_eq09_by_hand_the_loss_of_the_factual_logits():
    """ln((e² + 2) / e²) = .2395 and ln((e + 2) / e) = .5514, and the gradient softmax(f) - y."""
    f = F_LOGITS.clone().requires_grad_()
    loss = temporal_aware_loss(f, Y)
    close(loss, torch.tensor((math.log((math.e**2 + 2) / math.e**2)
                              + math.log((math.e + 2) / math.e)) / 2))
    loss.backward()
    close(f.grad, (F_LOGITS.softmax(-1) - F.one_hot(Y, 3)) / 2)


def test_eq09_is_eq01_in_the_factual_world(temporal, batch):
    model = temporal("rope")
    loss_ta = cetrec_loss(model, batch, lambda_ct=1)[1]
    for world, same in ((batch.item_pos, True), (erase_order(batch.item_pos), False)):
        logits = model.logits(model(batch.tokens, world)).flatten(0, 1)
        plain = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE)
        assert (abs(loss_ta - plain) < 1e-4) == same


def test_eq10_by_hand_lambda_weighs_the_counterfactual_loss(temporal, batch):
    """.39549 + 0.1 · 1.20672 = .51617; and in the model, with its gradient, for another λ."""
    loss = temporal_aware_loss(F_LOGITS, Y) + 0.1 * counterfactual_loss(F_LOGITS, CF_LOGITS, Y)
    assert loss.item() == pytest.approx(0.51617, abs=1e-5)
    model = temporal("rope")
    weight = model.llama.layers[0].mlp.up_proj.weight
    losses = cetrec_loss(model, batch, lambda_ct=0.5)
    whole, ta, ct = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in losses)
    close(losses[0], losses[1] + 0.5 * losses[2])
    close(whole, ta + 0.5 * ct)


def test_eq10_lambda_0_without_temporal_embedding_is_bigrec(temporal, batch):
    """One world is run, and the loss is the plain Llama's, with its gradient."""
    model, ran = temporal("none"), []
    model.register_forward_pre_hook(lambda module, args: ran.append(len(args[0])))
    loss, loss_ta, loss_ct = cetrec_loss(model, batch, lambda_ct=0)
    assert loss_ct is None and loss is loss_ta and ran == [1, 3]    # the prefix, and three rows
    plain = F.cross_entropy(model.llama.logits(model.llama(batch.tokens)).flatten(0, 1),
                            batch.labels.flatten(), ignore_index=IGNORE)
    for ours, theirs in zip(*(torch.autograd.grad(x, list(model.parameters()))
                              for x in (loss, plain))):
        close(ours, theirs, rtol=1e-4, atol=1e-5)
    close(loss, plain)


# ------------------------------------------------------------ §5.1 Data, metrics, lists


def sequences_of(*users, times=None, **settings):
    """Sequences of the given users' items; by default user after user, an item a second."""
    items = np.concatenate(users)
    owner = np.repeat(np.arange(len(users)), [len(user) for user in users])
    return make_sequences(Interactions(owner, items, np.arange(len(items)) if times is None else
                                       np.array(times), [f"Film {i}" for i in range(30)]),
                          **settings)


def test_sec5_1_1_windows_by_hand():
    """Each item with enough before it is an answer; its history is the last items before it."""
    s = sequences_of([5, 6, 7, 8, 9], [1, 2], min_history=2, max_history=3)
    assert [(s.history(i).tolist(), s.target(i)) for i in range(len(s))] == [
        ([5, 6], 7), ([5, 6, 7], 8), ([6, 7, 8], 9)]
    twelve = sequences_of(range(12), range(3))
    assert [len(twelve.history(i)) for i in range(len(twelve))] == [3, 4, 5, 6, 7, 8, 9, 10, 10]


def test_sec5_1_1_the_split_is_8_1_1_in_time(world_splits):
    users = [range(13)] * 2                     # two users at the same time: 10 answers each
    parts = split_by_time(sequences_of(*users, times=[*range(13)] * 2))
    assert [part.timestamps.tolist() for part in parts] == [
        [t for t in range(3, 11) for _ in (0, 1)], [11, 11], [12, 12]]
    train, valid, test = (part.timestamps for part in world_splits)
    assert train.max() <= valid.min() and valid.max() <= test.min()


def test_sec5_1_2_hr_and_ndcg_by_hand():
    ranks = np.array([0, 4, 5, 9, 10])          # counted from 0
    assert hit_ratio(ranks, 5).mean() == 2 / 5 and hit_ratio(ranks, 10).mean() == 4 / 5
    assert ndcg(ranks, 10).mean() == pytest.approx(
        (1 + 1 / math.log2(6) + 1 / math.log2(7) + 1 / math.log2(11)) / 5)
    assert ndcg(ranks, 5).tolist() == [1, 1 / math.log2(6), 0, 0, 0]


def test_sec5_1_2_a_list_is_worth_the_metrics_at_the_rank_of_its_answer():
    items = np.array([[3, 1, 4, 0, 5, 9, 2, 6, 8, -1]] * 3)
    values = list_values(items, np.array([3, 9, 7]))            # ranks 0 and 5, and not in the list
    assert values.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1 / math.log2(7)], [0, 0, 0, 0]]


class Chain:
    """A stand-in for a model whose next word depends on the last one only, by a table."""

    P = torch.tensor([[0, 0.6, 0.4, 0],         # after the prompt: "a" 0.6, "b" 0.4
                      [0, 0.5, 0.1, 0.4],       # after "a":        "a" 0.5, "b" 0.1, EOS 0.4
                      [0, 0.1, 0.1, 0.8],       # after "b":        "a" 0.1, "b" 0.1, EOS 0.8
                      [0, 0, 0, 1]])

    def __call__(self, tokens, item_pos, cache, wanted=None):
        cache.length += tokens.shape[1]
        hidden = F.one_hot(tokens, 4).float()
        return hidden if wanted is None else pick(hidden, wanted)

    def logits(self, hidden):
        return (hidden @ self.P).log()


def test_sec5_1_4_beams_by_hand():
    """The best answer, "b" EOS at 0.4 · 0.8 = 0.32, begins with the second-best word. Two beams
    find it; one goes on from "a" to "a a" at 0.3. "a" EOS at 0.24 is third, below both."""
    for beams, answers, p in ((1, [[1, 1]], [0.3]), (2, [[2, 3], [1, 1]], [0.32, 0.3])):
        found, scores = beam_search(Chain(), [([0], [NO_ITEM])], beams, max_new_tokens=2,
                                    min_new_tokens=0, length_penalty=1.0, eos_ids=[3])
        assert found == [answers]
        close(scores, torch.tensor([p]).log() / 2)          # both have two tokens


def test_sec5_1_4_grounding_by_hand_and_by_the_distance_of_embeddings(temporal):
    table = torch.tensor([[3.0, 0], [0, 1], [0, -1], [0, 0.5]])
    assert nearest(torch.zeros(1, 2), table).tolist() == [[3, 1, 2, 0]]     # ties by number
    model, texts = temporal("rope"), ["Heat (1996)", ' "Ran" ', "Se7en"]
    mine, theirs = (torch.stack([model.llama(torch.tensor([
        model.tokenizer.bpe.encode(text.strip(' "')).ids]))[0, -1] for text in part])
        for part in (texts, TITLES))
    distances = (mine[:, None] - theirs).norm(dim=-1)
    assert ground(model, texts, TITLES).tolist() == distances.argsort(dim=1).tolist()
    close(embed_titles(model, TITLES), theirs, rtol=1e-4, atol=1e-5)


def test_sec5_1_4_merge_by_hand_d7():
    """The beams' nearest titles in turn, then their second-nearest; the first place counts."""
    beams = [[3, 1, 2, 0], [3, 2, 1, 0], [0, 1, 2, 3]]
    assert merge_lists(beams) == [3, 0, 1, 2] and merge_lists(beams, length=2) == [3, 0]
    assert merge_lists(beams, exclude=[3, 1]) == [0, 2]


# ------------------------------------------------------------ §5.4 Does order count?


def test_sec5_4_reversal_by_hand():
    """Two users, 0 1 2 -> 3 and 4 5 6 -> 7. Who recommends what follows the newest item loses all
    hits when histories are read backward; who looks at the set of items loses none; who does one
    for the first user and the other for the second loses half, with a standard error of a half."""
    rules = {"newest": lambda h: h[-1] + 1, "set": lambda h: max(h) + 1,
             "half": lambda h: h[-1] + 1 if 0 in h else max(h) + 1}
    seen = []

    def recommender(rule):
        def recommend(histories, ages, progress):
            seen.append([list(h) for h in histories])
            made = Lists.empty(len(histories))
            made.items[:, 0] = [rule(h) for h in histories]
            return made
        return recommend
    rows, _ = evaluate_order({name: recommender(rule) for name, rule in rules.items()},
                             sequences_of(range(4), range(4, 8)))
    assert seen[0] == [[0, 1, 2], [4, 5, 6]] and seen[1] == [[2, 1, 0], [6, 5, 4]]
    assert [sorted(h) for h in seen[2]] == seen[0]          # shuffled
    assert {name: rows[f"{name} | change, reversed"]["HR@5"] for name in rules} == {
        "newest": (-100, 0), "set": (0, 0), "half": pytest.approx((-50, 50))}


def test_sec5_4_without_temporal_embedding_the_items_k_are_not_read(temporal, batch):
    """So all sensitivity to order that "none" has comes from the order of the text."""
    for kind in ("rope", "rope-attention", "sinpe", "none"):
        f, f_0 = world_logits(temporal(kind), batch, batch.item_pos, erase_order(batch.item_pos))
        assert torch.equal(f, f_0) == (kind == "none")
