"""The paper in our own words, passage by passage, for experiments/page.py.

A passage says what the paper says, why, and what it leaves open. Its equation is MathML, put
together by the few functions below; its code and tests are named here and fetched when the page is
made.
"""

from dataclasses import dataclass

# ----------------------------------------------------------------------------------------------
# MathML, as short as it can be written by hand


def i(name: str) -> str:
    """A symbol; several letters stand upright, as names of functions do."""
    return f"<mi>{name}</mi>"


def o(sign: str) -> str:
    """An operator, a bracket or a relation."""
    return f"<mo>{sign}</mo>"


def said(words: str) -> str:
    """Words among symbols."""
    return f"<mtext>{words}</mtext>"


def n(number) -> str:
    """A number."""
    return f"<mn>{number}</mn>"


def row(*parts: str) -> str:
    """Parts one after another, as one."""
    return f"<mrow>{''.join(parts)}</mrow>"


def sub(base: str, below: str) -> str:
    """base with an index."""
    return f"<msub>{base}{below}</msub>"


def sup(base: str, above: str) -> str:
    """base with an exponent."""
    return f"<msup>{base}{above}</msup>"


def frac(above: str, below: str) -> str:
    """A fraction."""
    return f"<mfrac>{above}{below}</mfrac>"


def total(below: str, above: str) -> str:
    """A sum sign with its limits."""
    return f"<munderover><mo>∑</mo>{below}{above}</munderover>"


def of(name: str, *inside: str) -> str:
    """name(inside)."""
    return row(i(name), o("("), *inside, o(")"))


def matrix(*rows: tuple[str, ...]) -> str:
    """A matrix; the page's style draws its brackets."""
    lines = "".join(f"<mtr>{''.join(f'<mtd>{cell}</mtd>' for cell in line)}</mtr>" for line in rows)
    return f"<mtable>{lines}</mtable>"


def equation(*parts: str) -> str:
    """A line of its own."""
    return f'<math display="block">{row(*parts)}</math>'


EQ, PLUS, MINUS, COMMA = o("="), o("+"), o("−"), o(",")
X_T, X_0, R_K = sub(i("x"), i("t")), sub(i("x"), n(0)), sub(i("R"), i("k"))
L_TA, L_CT, THETA, PHI, LAMBDA = (sub(i("L"), i("TA")), sub(i("L"), i("CT")), i("Θ"), i("Φ"),
                                  i("λ"))
F_T, F_0 = of("f", X_T), of("f", X_0)
ANGLE = frac(i("k"), sup(n("10000"), row(n(2), i("t"), o("/"), i("d"))))

# ----------------------------------------------------------------------------------------------
# Passages


@dataclass(frozen=True)
class Passage:
    """One place of the paper."""

    place: str                      # as the paper numbers it
    title: str
    words: str                      # paragraphs, apart by an empty line
    code: tuple[str, ...]           # functions and classes, by dotted names
    tests: str                      # how the names of its tests begin, after "test_"
    equations: tuple[str, ...] = ()


PASSAGES = (
    Passage("Table 1", "The prompt", """
A history becomes an instruction in English. It says what the user has taken, oldest first, each
title in quotes, and asks for the next one. The answer is a title in quotes, too.

The same function writes the prompts of training and of inference: a prompt that differs by one
space is another prompt to the model. The paper shows the prompt for films; no source has words for
music, so those are ours.""",
            ("data.build_prompt",), "table1"),
    Passage("Eq. 1", "The answer's likelihood", """
A language model is tuned to recommend by making the true next title likely, token by token, given
the prompt and the answer's tokens so far. Only tokens of the answer count; the prompt is given.

The closing quote and the end-of-text token belong to the answer: without them no generated title
would ever end.""",
            ("cetrec.temporal_aware_loss", "data.collate"), "eq01",
            (equation(i("L"), EQ, MINUS,
                      total(row(i("t"), EQ, n(1)), row(o("|"), i("y"), o("|"))), i("log"),
                      sub(i("P"), row(THETA, PLUS, PHI)),
                      row(o("("), sub(i("y"), i("t")), o("|"), i("x"), COMMA,
                          sub(i("y"), row(o("&lt;"), i("t"))), o(")"))),)),
    Passage("Eq. 2", "Low-rank factors", """
The weights Θ of the Llama stay as they are. Beside some of its linear maps a product of two thin
matrices is learned, Φ. One of the two starts at zero, so tuning begins exactly at the pretrained
model.

The paper gives no rank and no targets (D5). We take those of BIGRec: rank 8, α = 16, on queries
and values. The tiny base, which has little to adapt otherwise, has factors everywhere.""",
            ("lora.add_lora", "cetrec.tuned_parameters"), "eq02",
            (equation(i("W"), i("x"), PLUS, frac(i("α"), i("r")), i("B"), i("A"), i("x"), COMMA,
                      o("&#x2003;"), i("W"), o("∈"), THETA, COMMA, o("&#x2003;"), i("A"), COMMA,
                      i("B"), o("∈"), PHI),)),
    Passage("Eq. 3", "Sinusoidal positions", """
A position k becomes a vector: pairs of a sine and a cosine, each pair turning at its own speed,
from one radian a step to almost none. A step from k to k + 1 is the same rotation wherever it
starts, so differences of positions are easy to read off.

Such a vector has the length √(d/2), many times that of a token embedding. The paper adds it as it
is; the flag <code>--sinpe-scale</code> makes it smaller (D8).""",
            ("cetrec.sinusoidal",), "eq03",
            (equation(sub(i("p"), row(i("k"), COMMA, n(2), i("t"))), EQ, i("sin"), o("("), ANGLE,
                      o(")")),
             equation(sub(i("p"), row(i("k"), COMMA, n(2), i("t"), PLUS, n(1))), EQ, i("cos"),
                      o("("), ANGLE, o(")")))),
    Passage("Eq. 4", "Rotary positions", """
Instead of adding a vector one can turn the one that is there: each pair of neighbouring
coordinates by an angle that grows with the position. Turning keeps lengths, and at position 0
nothing happens.

Llama's published weights pair coordinate t with t + d/2 and not with its neighbour. Both are the
same rotation in another order of coordinates; <code>rotary</code> follows the equation, and
<code>rotate</code> the weights.""",
            ("cetrec.rotary", "llama.rotate"), "eq04",
            (equation(R_K, matrix((sub(i("x"), row(n(2), i("t"))),),
                                  (sub(i("x"), row(n(2), i("t"), PLUS, n(1))),)), EQ,
                      matrix((row(i("cos"), sub(i("θ"), i("t"))),
                              row(MINUS, i("sin"), sub(i("θ"), i("t")))),
                             (row(i("sin"), sub(i("θ"), i("t"))),
                              row(i("cos"), sub(i("θ"), i("t"))))),
                      matrix((sub(i("x"), row(n(2), i("t"))),),
                             (sub(i("x"), row(n(2), i("t"), PLUS, n(1))),))),
             equation(sub(i("θ"), i("t")), EQ, ANGLE))),
    Passage("Eq. 5", "Attention under rotation", """
Where queries and keys are turned, their product depends on the distance of two tokens only, not on
where they stand. This is how a Llama knows the places of its tokens, with or without CETRec.

The paper explains its rotary variant by this equation. Read to the letter, item tokens would turn
by t + k inside every layer (<code>--temporal rope-attention</code>, D2).""",
            ("llama.Attention",), "eq05",
            (equation(o("⟨"), sub(i("R"), i("m")), i("q"), COMMA, sub(i("R"), i("n")), i("k"),
                      o("⟩"), EQ, o("⟨"), i("q"), COMMA, sub(i("R"), row(i("n"), MINUS, i("m"))),
                      i("k"), o("⟩")),)),
    Passage("Eq. 6", "One temporal embedding for an item", """
A title is several tokens, and its token positions tell how far along the <em>text</em> it is. How
many items ago it was taken is another matter. So every token of an item gets the same extra
embedding, that of k, the item's number of steps back from the newest one. Tokens outside items get
none.

Which tokens an item has is decided by character offsets. That sounds trivial and is not: a token
may reach over a closing quote. With the flag <code>--index time</code>, k is an age instead
(D15).""",
            ("cetrec.TemporalLlama", "data.item_positions"), "eq06",
            (equation(X_T, EQ, sub(i("e"), i("t")), PLUS, sub(i("p"), row(i("k"), o("("), i("t"),
                                                                     o(")")))),)),
    Passage("§4.3", "The counterfactual world", """
What would the model say if it did not know the order? A twin of the network, with the same
weights, reads the same tokens, but every item has the position p₀. The order of the titles in the
text stays; what is erased is the temporal embedding's knowledge of it.

§4.3 calls p₀ the <em>first</em> item's, where §4.2 gave it to the newest. It cannot be both; we
take the newest (D1). Both worlds run as rows of one pass.""",
            ("cetrec.erase_order", "cetrec.answer_logits", "cetrec.twin_forward"), "sec4_3",
            (equation(X_0, o(":"), o("&#x2003;"), sub(i("p"), i("k")), o("→"), sub(i("p"), n(0)),
                      said("&#xa0;for every item")),)),
    Passage("Eq. 7", "The effect of order", """
What order contributed to the prediction is what the two worlds differ by. In logits, a difference
of two worlds is a ratio of their probabilities.

§4.4 calls f a distribution. A difference of distributions sums to zero and cannot enter a
cross-entropy; we take logits, as the code of CFT does (D3).""",
            ("cetrec.answer_log_likelihood",), "eq07",
            (equation(sub(i("CE"), i("T")), EQ, F_T, MINUS, F_0),)),
    Passage("Eq. 8", "The counterfactual loss", """
The difference alone shall predict the answer: its softmax enters a cross-entropy. Where the worlds
agree it is uniform, the loss is ln V, and the gradient is zero, so something else has to give the
temporal embedding an influence first.

What this loss rewards in the end is an erased world that predicts nothing: for a given factual
world, the best erased one is f(x<sub>t</sub>) − log p. docs/rewards.md has the argument and what
was measured.""",
            ("cetrec.counterfactual_loss",), "eq08",
            (equation(L_CT, EQ, of("ℓ", F_T, MINUS, F_0, COMMA, i("y"))),)),
    Passage("Eq. 9", "The temporal-aware loss", """
The factual world shall predict the answer. It is Eq. 1 with temporal embeddings, and it is what is
minimised where λ = 0, the paper's "w.o. CT".""",
            ("cetrec.temporal_aware_loss",), "eq09",
            (equation(L_TA, EQ, of("ℓ", F_T, COMMA, i("y"))),)),
    Passage("Eq. 10", "Both together", """
The two losses are added with a weight λ. The paper tries 0.01 to 10 and does not say which it took
(D5); here it is 0.1.

Only the factual world is used to recommend, so validation looks at L<sub>TA</sub> alone.""",
            ("cetrec.cetrec_loss", "cetrec.train"), "eq10",
            (equation(i("L"), EQ, L_TA, PLUS, LAMBDA, L_CT),)),
    Passage("§5.1.1", "Sequences and the split", """
Every item of a user with at least three items before it is an answer, and up to ten items before
it are its history. Sequences are split 8 : 1 : 1 by the time of the answer, over all users
together.

Table 2's counts are those of the whole MovieLens-1M although the text samples a tenth (D4);
LastFM's sequences, as the field uses them, are not in the order of time at all (D9).""",
            ("data.make_sequences", "data.split_by_time"), "sec5_1_1"),
    Passage("§5.1.2", "Hit ratio and NDCG", """
The answer's place in a list of ten is all that counts. All items of the catalogue compete, less
those of the history (D13).""",
            ("evaluate.hit_ratio", "evaluate.ndcg"), "sec5_1_2",
            (equation(i("NDCG@K"), EQ, frac(n(1), row(sub(i("log"), n(2)), o("("), i("rank"), PLUS,
                                                     n(2), o(")"))),
                      said("&#xa0;where&#xa0;"), i("rank"), o("&lt;"), i("K")),)),
    Passage("§5.1.4", "From free text to ten items", """
Five beams write five texts. Each text is matched with the title whose embedding is nearest. Five
texts give five items; their second-nearest titles complete the ten. Order, duplicates and ties are
left open (D7), and so are the length normalisation (D10) and the weights that embed (D11).

Beside the paper's lists the command makes another kind: ten beams that can only write titles. On
the synthetic world it shows how much of a model the grounding hides.""",
            ("evaluate.merge_lists", "evaluate.nearest", "evaluate.GroundedBeams"), "sec5_1_4"),
    Passage("§5.4", "Does order count?", """
Reverse the test histories and see what the metrics lose (Fig. 4). A model that reads the order
must lose; but losing proves little by itself, because a Llama without any temporal embedding reads
the order of the text and loses, too.""",
            ("evaluate.evaluate_order", "evaluate.relative_change"), "sec5_4"))

# ----------------------------------------------------------------------------------------------
# The other systems of Table 3: what they are, their equation, and where they differ in code

SYSTEMS = (
    ("GRU4Rec", "A recurrent unit reads item ids one by one, and its last state scores all items. "
     "Trained here against one drawn negative, as in the lineage's code, or by cross-"
     "entropy over the catalogue.",
     equation(sub(i("h"), i("t")), EQ, o("("), n(1), MINUS, i("z"), o(")"), i("n"), PLUS, i("z"),
              sub(i("h"), row(i("t"), MINUS, n(1)))), "experiments.id_baselines.GRU4Rec"),
    ("Caser", "The embedded history is an image: horizontal filters find patterns of neighbours "
     "anywhere, a vertical one weighs places.",
     equation(sub(i("c"), i("h")), EQ, sub(o("max"), i("l")), i("relu"), o("⟨"),
              sub(i("F"), i("h")), COMMA,
              sub(i("X"), row(i("l"), o(":"), i("l"), PLUS, i("h"))), o("⟩")),
     "experiments.id_baselines.Caser"),
    ("SASRec", "One block of causal self-attention over item embeddings and places; the newest "
     "item's place scores.",
     equation(i("U"), EQ, i("softmax"), o("("), frac(row(i("Q"), sub(i("W"), i("q")),
                                                     sup(row(o("("), i("X"), sub(i("W"), i("k")),
                                                             o(")")), i("T"))),
                                                 f"<msqrt>{i('d')}</msqrt>"), o(")"), i("X"),
              sub(i("W"), i("v")), PLUS, i("Q")), "experiments.id_baselines.SASRec"),
    ("P5", "Items are numbers, given in the order in which training meets them, and the next "
     "number is generated. Nothing of the titles is known.",
     equation(i("P"), o("("), i("item_1234"), o("|"), i("item_1001, item_1017"), o(")")),
     "experiments.llm_baselines.sequential_numbers"),
    ("E4SRec", "Items enter the Llama as one embedding each, mapped from a SASRec's table; a "
     "linear map of the last state scores all items. No text is written.",
     equation(i("s"), EQ, sub(i("W"), i("s")), of("h", i("W"), i("Z"), PLUS, i("b"))),
     "experiments.llm_baselines.ItemLlama"),
    ("LLaRA", "Titles as text, each followed by its item's embedding from a SASRec. Tuning goes "
     "from text alone to both.",
     equation(of("P", i("hybrid")), EQ, frac(i("step"), i("steps"))),
     "experiments.llm_baselines.llara_loss"),
    ("CFT", "CETRec's elder: the counterfactual prompt has no history at all, and early tokens "
     "of a title weigh more. CETRec keeps the history and erases its order only.",
     equation(i("L"), EQ, sub(i("L"), i("n")), PLUS, LAMBDA, of("ℓ", of("f", sub(i("x"), i("h"))),
                                                               MINUS, F_0, COMMA, i("y"))),
     "experiments.llm_baselines.cft_loss"))
