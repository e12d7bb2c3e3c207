"""The paper's equations in the paper's order, each by hand and as a property.

Read this file beside the paper: `pytest tests/test_equations.py -v` prints its table of contents.
Expected numbers and closed forms are written out here. They are compared with the functions that
the command runs.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TITLES, small_config
from torch import nn

from cetrec import (answer_log_likelihood, answer_logits, cetrec_loss, counterfactual_loss,
                    erase_order, rotary, sinusoidal, temporal_aware_loss, tuned_parameters,
                    twin_forward)
from data import (IGNORE, NO_ITEM, Catalogue, Interactions, collate, encode_example,
                  encode_sequences, make_sequences, split_by_time)
from evaluate import (Lists, beam_search, embed_titles, evaluate_order, ground, hit_ratio,
                      list_values, merge_lists, ndcg, nearest, prompts_by_length)
from llama import inverse_frequencies, rotate
from lora import add_lora

LN2 = math.log(2)
close = torch.testing.assert_close


@pytest.fixture
def batch(tokenizer):
    """Prompts of three, six and four items with their answers."""
    return collate([encode_example(tokenizer, TITLES[:n], TITLES[-n]) for n in (3, 6, 4)])


def targets_of(batch) -> torch.Tensor:
    """The answers' tokens, row by row.  -> (M,)"""
    return batch.answers[batch.answers != IGNORE]


def plain_logits(model, example, item_pos=None) -> torch.Tensor:
    """Logits of the answer's tokens by one plain pass over one example.  -> (M, V)"""
    tokens = torch.tensor([example.tokens])
    item_pos = torch.tensor([example.item_pos]) if item_pos is None else item_pos
    hidden, _ = model(tokens, item_pos)
    M = sum(label != IGNORE for label in example.labels)
    return model.logits(hidden[0, -M - 1:-1])


# ------------------------------------------------------------ §3.1 The prompt and the likelihood


def test_table1_prompt__asks_in_the_words_of_the_paper(tokenizer):
    text = tokenizer.decode(encode_example(tokenizer, ["Ran", "Heat"], "Se7en (1995)").tokens)
    assert ("Given a list of movies the user has watched before, please recommend a new movie that "
            "the user likes to the user.") in text
    assert 'The user has watched the following movies before:"Ran", "Heat"\n' in text


def test_table1_answer__is_the_quoted_title_and_eos(tokenizer):
    example = encode_example(tokenizer, ["Ran", "Heat"], "Se7en (1995)")
    answer = [label for label in example.labels if label != IGNORE]
    assert tokenizer.decode(answer) == '"Se7en (1995)"' and answer[-1] == tokenizer.eos_ids[0]
    assert example.labels == [IGNORE] * (len(example.tokens) - len(answer)) + answer
    assert tokenizer.decode(example.tokens).endswith('### Response:\n"Se7en (1995)"')


def test_eq01_loss__is_the_mean_of_minus_log_p_by_hand():
    """p(y_1) = 1/2 and p(y_2) = 1/8: the mean of -ln p is (1 + 3) / 2 · ln 2."""
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]] * 2).log() + torch.tensor([[5.0], [-7.0]])
    close(temporal_aware_loss(logits, torch.tensor([0, 2])), torch.tensor(2 * LN2))


def test_eq01_loss__predicts_each_token_from_the_prompt_and_the_answer_before_it(
        temporal, tokenizer):
    model, example = temporal("rope"), encode_example(tokenizer, TITLES[:4], TITLES[7])
    M = sum(label != IGNORE for label in example.labels)
    log_p = 0.0
    for t in range(len(example.tokens) - M, len(example.tokens)):
        hidden, _ = model(torch.tensor([example.tokens[:t]]), torch.tensor([example.item_pos[:t]]))
        log_p += model.logits(hidden[0, -1]).log_softmax(-1)[example.tokens[t]].item()
    loss = cetrec_loss(model, collate([example]), lambda_ct=0)[1]
    assert M > 2 and loss.item() == pytest.approx(-log_p / M, abs=1e-4)


def test_eq02_factors__are_added_to_the_frozen_map_by_hand():
    """W = 1, A = (1 1; 1 -1), B = (2 0; 0 1), α/R = 6/2: y = x + 3 · (2 (x1 + x2), x1 - x2)."""
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2, bias=False)})
    model["q_proj"].weight.data = torch.eye(2)
    A, B = add_lora(model, rank=2, alpha=6, dropout=0.0, targets=("q_proj",))
    A.data, B.data = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[2.0, 0], [0, 1]])
    close(model["q_proj"](torch.tensor([5.0, 7.0])), torch.tensor([77.0, 1.0]))


def test_eq02_factors__are_all_that_is_tuned(temporal, batch):
    model = temporal("rope")
    factors = add_lora(model)
    assert [id(p) for p in tuned_parameters(model)] == [id(p) for p in factors]
    cetrec_loss(model, batch, 0.1)[0].backward()
    for p in model.parameters():
        assert (p.grad is not None) == any(p is factor for factor in factors)


# ------------------------------------------------------------ §4.2 Temporal embeddings


def test_eq03_sinusoidal__by_hand():
    p = sinusoidal(torch.tensor([0, 2]), 4, base=100.0)
    close(p, torch.tensor([[0.0, 1.0, 0.0, 1.0],
                           [math.sin(2), math.cos(2), math.sin(0.2), math.cos(0.2)]]))


def test_eq03_sinusoidal__products_depend_on_the_distance_only():
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


def test_eq04_rotary__matches_block_diagonal():
    x = torch.randn(5, 6)
    for k in range(5):
        close(rotary(x[k], torch.tensor(k), 50.0), block_diagonal(k, 6, 50.0) @ x[k])


def test_eq04_rotate__pairs_halves_which_is_the_same_rotation_in_another_order():
    """The backbone pairs (x_i, x_i+dim/2) where Eq. 4 pairs (x_2i, x_2i+1)."""
    x, order = torch.randn(6), [0, 2, 4, 1, 3, 5]
    angles = 3 * inverse_frequencies(small_config(head_dim=6, rope_theta=50.0))
    halves = rotate(x, angles.cos(), angles.sin())
    close(halves, block_diagonal(3, 6, 50.0)[order][:, order] @ x)
    assert not torch.allclose(halves, block_diagonal(3, 6, 50.0) @ x)


def test_eq04_rotary__keeps_lengths():
    x, pos = torch.randn(4, 7, 16), torch.randint(10, (4, 7))
    close(rotary(x, pos).norm(dim=-1), x.norm(dim=-1))


def test_eq04_rotary__adds_up():
    x, pos = torch.randn(4, 7, 16), torch.randint(10, (4, 7))
    close(rotary(rotary(x, pos), 0 * pos + 3), rotary(x, pos + 3), rtol=1e-4, atol=1e-5)


def test_eq04_rotary__is_the_identity_at_position_0():
    x = torch.randn(4, 7, 16)
    assert torch.equal(rotary(x, torch.zeros(4, 7)), x)


def test_eq05_scores__turn_with_the_distance_by_hand():
    """<R_m (1, 0), R_n (0, 1)> = sin(m - n)."""
    q, k, m, n = torch.tensor([1.0, 0]), torch.tensor([0.0, 1]), torch.tensor(5), torch.tensor(3)
    close(rotary(q, m) @ rotary(k, n), torch.tensor(math.sin(2)))


def test_eq05_scores__depend_on_the_distance_only():
    q, k = torch.randn(2, 8)
    inv_freq = inverse_frequencies(small_config())

    def score(m: int, n: int) -> torch.Tensor:
        return rotate(q, (m * inv_freq).cos(), (m * inv_freq).sin()) @ rotate(
            k, (n * inv_freq).cos(), (n * inv_freq).sin())
    close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_eq05_rope_attention__rotates_item_tokens_by_t_plus_k(temporal, batch):
    """The prompts without their prefix and with padding, which plays no role here."""
    model = temporal("rope-attention")
    embeddings, positions = model.llama.embed(batch.tokens), torch.arange(batch.tokens.shape[1])
    k = torch.where(batch.item_pos == NO_ITEM, 0, batch.item_pos)
    close(model(batch.tokens, batch.item_pos)[0], model.llama(embeddings, positions + k)[0])


def test_eq06_k__counts_back_from_the_newest_item_d1(tokenizer):
    example = encode_example(tokenizer, ["Ran", "Heat", "Se7en (1995)"], "Jumanji (1995)")
    for k, title in enumerate(["Se7en (1995)", "Heat", "Ran"]):
        assert tokenizer.decode([token for token, pos in zip(example.tokens, example.item_pos)
                                 if pos == k]) == title
    assert set(example.item_pos) == {NO_ITEM, 0, 1, 2}


@pytest.mark.parametrize("kind", ["rope", "sinpe"])
def test_eq06_input__every_token_of_an_item_carries_the_same_embedding_and_others_none(
        temporal, batch, kind):
    """The plain Llama, given R_k x_t or x_t + 0.7 p_k token by token, gives the same output."""
    model = temporal(kind, scale=0.7)
    x = model.llama.embed(batch.tokens).clone()
    for row, t in (batch.item_pos != NO_ITEM).nonzero().tolist():
        k = batch.item_pos[row, t]
        x[row, t] = (block_diagonal(int(k), 24, 10_000.0) @ x[row, t] if kind == "rope" else
                     x[row, t] + 0.7 * sinusoidal(k, 24))
    close(model(batch.tokens, batch.item_pos)[0], model.llama(x)[0], rtol=1e-4, atol=1e-4)
    item_pos = batch.item_pos[1]
    item_pos = item_pos[item_pos != NO_ITEM]
    assert len(item_pos.unique()) == 6 < len(item_pos)          # six items of more tokens


# ------------------------------------------------------------ §4.3 The counterfactual world


def test_sec4_3_erase_order__puts_every_item_at_0_by_hand_d1():
    item_pos = torch.tensor([[NO_ITEM, 2, 2, NO_ITEM, 1, NO_ITEM, 0]])
    assert erase_order(item_pos).tolist() == [[NO_ITEM, 0, 0, NO_ITEM, 0, NO_ITEM, 0]]
    assert item_pos[0, 1] == 2          # the factual world is left as it is


@pytest.mark.parametrize("kind", ["rope", "rope-attention", "sinpe"])
def test_sec4_3_erased_world__is_the_same_whatever_the_order_was(temporal, batch, kind):
    model, item = temporal(kind), batch.item_pos != NO_ITEM
    other = torch.where(item, 9 - batch.item_pos, NO_ITEM)
    factual, other_factual, erased, other_erased = (
        model(batch.tokens, world)[0] for world in (
            batch.item_pos, other, erase_order(batch.item_pos), erase_order(other)))
    assert (factual - other_factual).abs().max() > 1e-3 and torch.equal(erased, other_erased)


@pytest.mark.parametrize("kind", ["rope", "rope-attention", "sinpe"])
def test_sec4_3_erased_world__is_the_plain_llama_for_rotary_kinds_only(temporal, batch, kind):
    """R_0 is the identity, bit for bit (D2); p_0 is not zero (D8)."""
    model = temporal(kind)
    erased, _ = model(batch.tokens, erase_order(batch.item_pos))
    plain, _ = model.llama(model.llama.embed(batch.tokens))
    assert torch.equal(erased, plain) == (kind != "sinpe")


@pytest.mark.parametrize("kind", ["rope", "rope-attention", "sinpe", "none"])
def test_sec4_3_twin_network__is_one_model_run_on_each_row_in_both_worlds(
        temporal, tokenizer, kind):
    model = temporal(kind)
    examples = [encode_example(tokenizer, TITLES[:n], TITLES[-n]) for n in (3, 6, 4)]
    for world, logits in enumerate(twin_forward(model, collate(examples))):
        plain = []
        for example in examples:
            item_pos = torch.tensor([example.item_pos])
            plain.append(plain_logits(model, example, erase_order(item_pos) if world else item_pos))
        close(logits, torch.cat(plain), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ §4.4 Losses

F_LOGITS = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
CF_LOGITS = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
Y = torch.tensor([0, 1])


def test_eq07_effect_of_probabilities__sums_to_0_so_eq08_cannot_take_it_d3():
    """Eq. 7 to the letter: (1/2, 1/4, 1/4) minus (1/4, 1/4, 1/2) is (1/4, 0, -1/4)."""
    p_f, p_cf = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    effect = p_f - p_cf
    close(effect, torch.tensor([[0.25, 0.0, -0.25]]))
    close(effect.sum(dim=-1), torch.zeros(1))
    # As logits such differences hardly matter: the loss stays near ln 3.
    assert abs(counterfactual_loss(p_f, p_cf, torch.tensor([0])) - math.log(3)) < 0.3


def test_eq07_effect_of_logits__is_the_ratio_of_the_worlds_by_hand():
    """Inside Eq. 8: (1/2, 1/4, 1/4) over (1/4, 1/4, 1/2) is (2, 1, 1/2), whose sum is 7/2, so the
    loss of y = 0 is -ln(4/7)."""
    p_f, p_cf = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    loss = counterfactual_loss(p_f.log(), p_cf.log(), torch.tensor([0]))
    close(loss, torch.tensor(math.log(7 / 4)))


def test_eq07_effect_of_log_p__is_summed_over_the_answer_in_each_world(
        temporal, tokenizer, world_splits):
    """In the report: log p(answer) in the factual and in the erased world, in nats."""
    model, sequences = temporal("rope"), world_splits[2].select(slice(0, 3))
    found = answer_log_likelihood(model, tokenizer, sequences, batch_size=2)
    for (factual, erased), example in zip(found, encode_sequences(tokenizer, sequences)):
        answer = torch.tensor([label for label in example.labels if label != IGNORE])
        for value, item_pos in ((factual, torch.tensor([example.item_pos])),
                                (erased, erase_order(torch.tensor([example.item_pos])))):
            log_p = plain_logits(model, example, item_pos).log_softmax(-1)
            assert value == pytest.approx(log_p.gather(1, answer[:, None]).sum().item(), abs=1e-3)
        assert abs(factual - erased) > 1e-3


def test_eq08_loss__takes_the_difference_of_logits_by_hand():
    """f - c is (1, 0, 0) and (0, -1, 0): ln((e + 2) / e) = .5514 and ln(2e + 1) = 1.8620."""
    close(counterfactual_loss(F_LOGITS, CF_LOGITS, Y), torch.tensor(
        (math.log((math.e + 2) / math.e) + math.log(2 * math.e + 1)) / 2))


def test_eq08_loss__ignores_what_both_worlds_share():
    shift = torch.tensor([0.3, -2.0, 1.0])
    close(counterfactual_loss(F_LOGITS + shift, CF_LOGITS + shift, Y),
          counterfactual_loss(F_LOGITS, CF_LOGITS, Y))


def test_eq08_loss__is_ln_v_with_zero_gradient_where_the_worlds_agree(temporal, batch):
    model = temporal("none")
    loss = counterfactual_loss(*twin_forward(model, batch), targets_of(batch))
    assert loss.item() == pytest.approx(math.log(model.llama.config.vocab_size), abs=1e-5)
    loss.backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-6


def test_eq08_gradient__is_softmax_minus_target_and_opposite_in_the_two_worlds_d3():
    f, c = F_LOGITS.clone().requires_grad_(), CF_LOGITS.clone().requires_grad_()
    counterfactual_loss(f, c, Y).backward()
    close(f.grad, ((f - c).softmax(-1) - F.one_hot(Y, 3)).detach() / 2)
    close(c.grad, -f.grad)


def test_eq08_gradient__flows_through_the_erased_world_too_d3(temporal, batch):
    model = temporal("rope")
    weight, (f, f_0) = model.llama.layers[0].self_attn.q_proj.weight, twin_forward(model, batch)
    both, one = (torch.autograd.grad(counterfactual_loss(f, erased, targets_of(batch)), weight,
                                     retain_graph=True)[0] for erased in (f_0, f_0.detach()))
    assert (both - one).norm() > 0.1 * both.norm()


# Eight answers to one prompt have the shares p = (1/2, 1/4, 1/8, 1/8), whose entropy is 1.75 ln 2.
SHARES, EIGHT = torch.tensor([0.5, 0.25, 0.125, 0.125]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])


def loss_ct_of_eight(f: torch.Tensor, f_0: torch.Tensor) -> torch.Tensor:
    """L_CT where all eight answers have the same logits in each world."""
    return counterfactual_loss(f.expand(8, 4), f_0.expand(8, 4), EIGHT)


def test_eq08_minimum__for_a_given_factual_world_is_at_f_minus_log_p():
    """L_CT has its only minimum, the entropy of p, where softmax(f(x_t) - f(x_0)) = p."""
    f = torch.tensor([2.0, -1.0, 0.5, 3.0])
    best, free = (f - SHARES.log() + 3).requires_grad_(), torch.zeros(4, requires_grad=True)
    loss_ct_of_eight(f, best).backward()
    close(loss_ct_of_eight(f, best), torch.tensor(1.75 * LN2))
    close(best.grad, torch.zeros(4))
    for _ in range(300):                                    # gradient descent from f(x_0) = 0
        free.data -= 2 * torch.autograd.grad(loss_ct_of_eight(f, free), free)[0]
    close(free - free.mean(), best - best.mean(), rtol=0, atol=1e-3)


def test_eq08_minimum__is_shared_with_l_ta_where_the_erased_world_is_uniform():
    """L_TA drives f(x_t) to ln p. Then the best erased world predicts every token alike."""
    uniform = torch.full((4,), 7.0)
    close(loss_ct_of_eight(SHARES.log(), uniform),
          temporal_aware_loss(SHARES.log().expand(8, 4), EIGHT))
    close(loss_ct_of_eight(SHARES.log(), uniform), torch.tensor(1.75 * LN2))


def test_eq09_loss__of_the_factual_logits_by_hand():
    """ln((e² + 2) / e²) = .2395 and ln((e + 2) / e) = .5514."""
    close(temporal_aware_loss(F_LOGITS, Y), torch.tensor(
        (math.log((math.e**2 + 2) / math.e**2) + math.log((math.e + 2) / math.e)) / 2))


def test_eq09_gradient__is_softmax_minus_target():
    f = F_LOGITS.clone().requires_grad_()
    temporal_aware_loss(f, Y).backward()
    close(f.grad, (F_LOGITS.softmax(-1) - F.one_hot(Y, 3)) / 2)


def test_eq09_loss__is_eq01_in_the_factual_world_and_not_in_the_erased_one(temporal, batch):
    model = temporal("rope")
    loss_ta = cetrec_loss(model, batch, lambda_ct=1)[1]
    factual, erased = (F.cross_entropy(answer_logits(model, batch, world), targets_of(batch))
                       for world in (batch.item_pos, erase_order(batch.item_pos)))
    close(loss_ta, factual)
    assert abs(loss_ta - erased) > 1e-4


def test_eq10_loss__by_hand():
    """.39549 + 0.1 · 1.20672 = .51617"""
    loss = temporal_aware_loss(F_LOGITS, Y) + 0.1 * counterfactual_loss(F_LOGITS, CF_LOGITS, Y)
    assert loss.item() == pytest.approx(0.51617, abs=1e-5)


def test_eq10_lambda__weighs_the_counterfactual_loss_and_its_gradient(temporal, batch):
    model = temporal("rope")
    weight = model.llama.layers[0].mlp.up_proj.weight
    losses = cetrec_loss(model, batch, lambda_ct=0.5)
    total, ta, ct = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in losses)
    close(losses[0], losses[1] + 0.5 * losses[2])
    close(total, ta + 0.5 * ct)


def test_eq10_lambda_0__is_the_temporal_aware_loss_alone(temporal, batch):
    loss, loss_ta, loss_ct = cetrec_loss(temporal("rope"), batch, lambda_ct=0)
    close(loss, loss_ta)
    close(loss_ta, cetrec_loss(temporal("rope"), batch, lambda_ct=1)[1])
    assert loss_ct is None


def test_eq10_lambda_0_without_temporal_embedding__is_bigrec(temporal, tokenizer):
    """The loss of the plain Llama on the prompt and the answer, with its gradient."""
    model = temporal("none")
    example = encode_example(tokenizer, TITLES[:4], TITLES[7])
    hidden, _ = model.llama(model.llama.embed(torch.tensor([example.tokens])))
    plain = F.cross_entropy(model.llama.logits(hidden[0, :-1]), torch.tensor(example.labels[1:]),
                            ignore_index=IGNORE)
    loss = cetrec_loss(model, collate([example]), lambda_ct=0)[0]
    close(loss, plain)
    for ours, theirs in zip(*(torch.autograd.grad(x, list(model.parameters()))
                              for x in (loss, plain))):
        close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sec4_4_recommending__uses_the_factual_world_only(tokenizer):
    """Prompts for recommendation carry the item's own k, not the erased 0."""
    catalogue, history = Catalogue(TITLES, "movies", tokenizer), [4, 1, 9]
    [(numbers, [(tokens, item_pos)])] = prompts_by_length(catalogue, [history], None, 8, "")
    example = encode_example(tokenizer, [TITLES[i] for i in history], None)
    assert numbers == [0] and (tokens, item_pos) == (example.tokens, example.item_pos)
    assert set(item_pos) == {NO_ITEM, 0, 1, 2}


# ------------------------------------------------------------ §5.1 Data, metrics, lists


def sequences_of(*users, times=None, **settings):
    """Sequences of the given users' items; by default user after user, an item a second."""
    items = np.concatenate(users)
    owner = np.repeat(np.arange(len(users)), [len(user) for user in users])
    return make_sequences(Interactions(owner, items, np.arange(len(items)) if times is None else
                                       np.array(times), [f"Film {i}" for i in range(30)]),
                          **settings)


def test_sec5_1_1_windows__by_hand():
    """Each item with enough before it is an answer; its history is the last items before it."""
    s = sequences_of([5, 6, 7, 8, 9], [1, 2], min_history=2, max_history=3)
    assert [(s.history(i).tolist(), s.target(i)) for i in range(len(s))] == [
        ([5, 6], 7), ([5, 6, 7], 8), ([6, 7, 8], 9)]


def test_sec5_1_1_windows__have_3_to_10_items():
    twelve = sequences_of(range(12), range(3))
    assert [len(twelve.history(i)) for i in range(len(twelve))] == [3, 4, 5, 6, 7, 8, 9, 10, 10]


def test_sec5_1_1_split__is_8_1_1_in_time():
    users = [range(13)] * 2                     # two users at the same time: 10 answers each
    parts = split_by_time(sequences_of(*users, times=[*range(13)] * 2))
    assert [part.timestamps.tolist() for part in parts] == [
        [t for t in range(3, 11) for _ in (0, 1)], [11, 11], [12, 12]]


def test_sec5_1_1_split__trains_on_nothing_of_the_future(world_splits):
    train, valid, test = (part.timestamps for part in world_splits)
    assert train.max() <= valid.min() and valid.max() <= test.min()


def test_sec5_1_2_hit_ratio__by_hand():
    ranks = np.array([0, 4, 5, 9, 10])          # counted from 0
    assert hit_ratio(ranks, 5).mean() == 2 / 5 and hit_ratio(ranks, 10).mean() == 4 / 5


def test_sec5_1_2_ndcg__by_hand():
    ranks = np.array([0, 4, 5, 9, 10])
    assert ndcg(ranks, 10).mean() == pytest.approx(
        (1 + 1 / math.log2(6) + 1 / math.log2(7) + 1 / math.log2(11)) / 5)
    assert ndcg(ranks, 5).tolist() == [1, 1 / math.log2(6), 0, 0, 0]


def test_sec5_1_2_list__is_scored_at_the_rank_of_its_answer():
    items = np.array([[3, 1, 4, 0, 5, 9, 2, 6, 8, -1]] * 3)
    values = list_values(items, np.array([3, 9, 7]))            # ranks 0 and 5, and not in the list
    assert values.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1 / math.log2(7)], [0, 0, 0, 0]]


class Chain(nn.Module):
    """A stand-in for a model whose next word depends on the last one only, by a table."""

    def __init__(self):
        super().__init__()
        self.P = nn.Parameter(torch.tensor([
            [0, 0.6, 0.4, 0],           # after the prompt: "a" 0.6, "b" 0.4
            [0, 0.5, 0.1, 0.4],         # after "a":        "a" 0.5, "b" 0.1, EOS 0.4
            [0, 0.1, 0.1, 0.8],         # after "b":        "a" 0.1, "b" 0.1, EOS 0.8
            [0, 0, 0, 1]]))

    def forward(self, tokens, item_pos, positions=None, mask=None, past=None, last=0):
        return F.one_hot(tokens, 4).float()[:, -last:], None

    def logits(self, hidden):
        return (hidden @ self.P).log()


@pytest.mark.parametrize("beams, answers, p", [(1, [[1, 1]], [0.3]),
                                               (2, [[2, 3], [1, 1]], [0.32, 0.3])])
def test_sec5_1_4_beams__by_hand(beams, answers, p):
    """The best answer, "b" EOS at 0.4 · 0.8 = 0.32, begins with the second-best word. Two beams
    find it; one goes on from "a" to "a a" at 0.3. "a" EOS at 0.24 is third, below both."""
    found, scores = beam_search(Chain(), [([0], [NO_ITEM])], beams, max_new_tokens=2,
                                min_new_tokens=0, length_penalty=1.0, eos_ids=[3])
    assert found == [answers]
    close(scores, torch.tensor([p]).log() / 2)              # both have two tokens


def test_sec5_1_4_grounding__sorts_by_distance_and_breaks_ties_by_number():
    table = torch.tensor([[3.0, 0], [0, 1], [0, -1], [0, 0.5]])
    assert nearest(torch.zeros(1, 2), table).tolist() == [[3, 1, 2, 0]]


def test_sec5_1_4_grounding__embeds_texts_by_their_last_token(temporal, tokenizer):
    model, texts = temporal("rope"), ["Heat (1996)", ' "Ran" ', "Se7en"]

    def embedded(titles):
        return torch.stack([model.llama(model.llama.embed(torch.tensor([
            tokenizer.bpe.encode(title.strip(' "')).ids])))[0][0, -1] for title in titles])
    close(embed_titles(model, TITLES, tokenizer), embedded(TITLES), rtol=1e-4, atol=1e-5)
    distances = (embedded(texts)[:, None] - embedded(TITLES)).norm(dim=-1)
    found = ground(model, texts, Catalogue(TITLES, "movies", tokenizer))
    assert found.tolist() == distances.argsort(dim=1).tolist()


def test_sec5_1_4_merge__by_hand_d7():
    """The beams' nearest titles in turn, then their second-nearest; duplicates keep the first."""
    beams = [[3, 1, 2, 0], [3, 2, 1, 0], [0, 1, 2, 3]]
    assert merge_lists(beams) == [3, 0, 1, 2] and merge_lists(beams, length=2) == [3, 0]
    assert merge_lists(beams, exclude=[3, 1]) == [0, 2]


# ------------------------------------------------------------ §5.4 Does order count?


def recommend_by(rule):
    """A recommender whose lists hold one item, rule(history)."""
    def recommend(histories, ages, progress):
        lists = Lists.empty(len(histories))
        lists.items[:, 0] = [rule(list(h)) for h in histories]
        return lists
    return recommend


def test_sec5_4_reversal__by_hand():
    """Ten users took 0 1 2 -> 3, ten 4 5 6 -> 7. Who recommends what follows the newest item loses
    all hits when histories are read backward; who looks at the set of items loses none; who does
    one for the first ten and the other for the others loses half. Its twenty residuals are a half
    from their mean of 0, and an error from no hits at all is not known."""
    rules = {"newest": lambda h: h[-1] + 1, "set": lambda h: max(h) + 1,
             "half": lambda h: h[-1] + 1 if 0 in h else max(h) + 1}
    rows, _ = evaluate_order({name: recommend_by(rule) for name, rule in rules.items()},
                             sequences_of(*[range(4), range(4, 8)] * 10))
    assert {name: rows[f"{name} | change, reversed"]["HR@5"] for name in rules} == {
        "newest": pytest.approx((-100, math.nan), nan_ok=True), "set": (0, 0),
        "half": pytest.approx((-50, 100 * 0.5 / math.sqrt(19)))}


def test_sec5_4_orders__are_the_history_itself_reversed_and_shuffled():
    seen = []

    def rule(history):
        seen.append(history)
        return 0
    evaluate_order({"": recommend_by(rule)}, sequences_of(range(4), range(4, 8)))
    assert seen[:4] == [[0, 1, 2], [4, 5, 6], [2, 1, 0], [6, 5, 4]]
    assert [sorted(h) for h in seen[4:]] == [[0, 1, 2], [4, 5, 6]]


@pytest.mark.parametrize("kind", ["rope", "rope-attention", "sinpe", "none"])
def test_sec5_4_without_temporal_embedding__the_worlds_are_one(temporal, batch, kind):
    """So all sensitivity to order that "none" has comes from the order of the text."""
    f, f_0 = twin_forward(temporal(kind), batch)
    assert ((f - f_0).abs().max() < 1e-4) == (kind == "none")
