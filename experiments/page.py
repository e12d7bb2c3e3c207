"""The paper and the code on one page: page.html, one file that opens without a network.

    python -m experiments.page                                  a small run is made on the spot
    python -m experiments.page --run runs/synthetic-rope-1      the numbers of a run that is there

Left are our own words for each passage of the paper (experiments/passages.py), right the code that
implements it, as it stands in the files now, with its tests and whether they passed when the page
was made. The worked examples below are computed then, too, by the functions that they explain.
"""

import ast
import datetime
import importlib.util
import itertools
import re
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cetrec import (TemporalLlama, cetrec_loss, erase_order, open_tuned, rotary, sinusoidal, tune,
                    tuned_parameters, twin_forward)
from data import (IGNORE, NO_ITEM, Batch, Example, Sequences, Tokenizer, build_prompt, collate,
                  encode_sequences)
from evaluate import (METRICS, GroundedBeams, beam_search, clean, ground, hit_ratio, merge_lists,
                      ndcg)
from experiments.markup import STYLE, Html, e, h, table
from experiments.passages import PASSAGES, SYSTEMS, Passage
from experiments.readme import effects, names_of_tests, results
from experiments.report import Run
from support.datasets import day_of
from support.counting import score_rows
from support.files import write_whole
from support.options import Options, Where, add_flags, as_flag, parse
from support.runs import RunInputs, open_inputs
from support.terminal import Parser, exit_status

ROOT = Path(__file__).parent.parent
SMALL = {"limit_train": 4_000, "max_steps": 120, "eval_sequences": 200}
SHADES = ("#c9dcec", "#f3dcc3", "#d3e4cd", "#e6d3e3", "#e9e3c0", "#cfe3e3", "#f0d0cf", "#d9d9d9",
          "#dcd6f0", "#e3d9cf")         # of items, by k; a grey print shows their frames


@dataclass(frozen=True)
class Scene:
    """What the examples are computed from: a run, and one of its test sequences."""

    run: Run
    inputs: RunInputs
    model: TemporalLlama
    test_set: Sequences             # of the evaluation
    number: int                     # of the sequence among them

    @property
    def options(self) -> Options:
        """The options of the run."""
        return self.inputs.options

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the base."""
        return self.inputs.tokenizer

    @property
    def history(self) -> list[str]:
        """The titles of the sequence's history, oldest first."""
        return self.test_set.titles_of(self.test_set.history(self.number))

    @property
    def answer(self) -> str:
        """The title that followed."""
        return self.test_set.titles[self.test_set.target(self.number)]

    @property
    def example(self) -> Example:
        """The sequence's prompt and answer."""
        one = self.test_set.select(slice(self.number, self.number + 1))
        return encode_sequences(self.tokenizer, one)[0]

    @property
    def batch(self) -> Batch:
        """The same as a batch of one row."""
        return collate([self.example]).to(self.inputs.device)

    @torch.no_grad()
    def worlds(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(targets (M,), logits (M, V) of the factual world, of the erased one)"""
        answers = self.batch.answers
        return answers[answers != IGNORE], *twin_forward(self.model, self.batch)

    def spelled(self, token: int) -> Html:
        """A token as HTML."""
        return h("<code>{}</code>", self.tokenizer.bpe.decode([token], skip_special_tokens=False))


def scene_of(folder: Path | None, flags: dict) -> Scene:
    """The scene of a run, or of a small one that is made now with these flags.

    Its test sequence is the first of the evaluation with four items in its history.
    """
    with tempfile.TemporaryDirectory() as out:
        if folder is None:
            inputs = open_inputs(Options.from_flags(SMALL | flags), Path(out))
            folder, flags = tune(inputs, Path(out)), {}
        inputs, model = open_tuned(folder, flags, "experiments.page")
        test_set = inputs.splits[2].sample(inputs.options.eval_sequences, inputs.options.seed)
        lengths = [len(test_set.history(number)) for number in range(len(test_set))]
        number = lengths.index(4) if 4 in lengths else 0
        return Scene(Run.from_folder(folder), inputs, model, test_set, number)


# ----------------------------------------------------------------------------------------------
# HTML: code, tables, pictures


def markdown_table(text: str, heading: str = "") -> Html:
    """The first Markdown table of a text, behind a heading, as HTML."""
    lines = re.search(r"(?:^\|.*\n)+", text[text.index(heading):], re.MULTILINE)[0].splitlines()
    cells = [[Html(re.sub(r"`([^`]+)`", r"<code>\1</code>", e(cell.strip())))
              for cell in line.strip("|").split("|")] for line in lines]
    return table(cells[0], cells[2:])


def source_of(name: str) -> tuple[str, int, str]:
    """(file, first line, source) of a function or class by its dotted name.

    Raises ValueError for a name that is gone.
    """
    parts = name.split(".")
    depth = 2 if parts[0] == "experiments" else 1
    path = ROOT.joinpath(*parts[:depth]).with_suffix(".py")
    text, node = path.read_text(encoding="utf-8"), None
    body = ast.parse(text).body
    for part in parts[depth:]:
        node = next((child for child in body if getattr(child, "name", None) == part), None)
        if node is None:
            raise ValueError(f"{name} is not in {path.relative_to(ROOT)}")
        body = node.body
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = "\n".join(text.splitlines()[first - 1:node.end_lineno])
    return str(path.relative_to(ROOT)), first, textwrap.dedent(lines)


def code(name: str) -> str:
    """A function or class with its place, highlighted."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    path, first, source = source_of(name)
    lines = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))
    return (f'<figure class="code"><figcaption>{e(path)}, line {first}</figcaption>'
            f"<pre><code>{lines.rstrip()}</code></pre></figure>")


def outcomes() -> dict[str, str]:
    """test -> passed, failed or skipped, by running tests/test_equations.py now."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                        f"--junitxml={report}", str(ROOT / "tests" / "test_equations.py")],
                       cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not report.is_file():
            raise ValueError("the tests could not be run; install pytest")
        found: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = ("failed" if kinds & {"failure", "error"} else
                       "skipped" if "skipped" in kinds else "passed")
            name = case.attrib["name"].partition("[")[0]
            if found.get(name) != "failed":
                found[name] = outcome
        return found


def svg(width: int, height: int, parts: list[str], label: str) -> str:
    """A picture that grows with its column."""
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{e(label)}">'
            f"{''.join(parts)}</svg>")


def text_at(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words in a picture."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{e(words)}</text>'


# ----------------------------------------------------------------------------------------------
# Worked examples


def marked(scene: Scene, item_pos: list) -> str:
    """The prompt as text, the tokens of each item in a frame with its k."""
    parts, example, first = [], scene.example, 0
    for _, item in itertools.groupby(example.item_pos):         # each item, and what is between
        last = first + len(list(item))
        words = e(scene.tokenizer.bpe.decode(example.tokens[first:last],
                                             skip_special_tokens=False))
        k = item_pos[first]
        parts.append(words if k == NO_ITEM else
                     f'<span class="item" style="background:{SHADES[int(k) % len(SHADES)]}">'
                     f"{words}<sub>k={k:.3g}</sub></span>")
        first = last
    return f'<pre class="prompt">{"".join(parts)}</pre>'


def example_prompt(scene: Scene) -> str:
    """Table 1: the prompt, its answer, and where the titles stand."""
    text, spans = build_prompt(scene.history, scene.test_set.domain)
    ranges = ", ".join(f"{a} to {b - 1}" for a, b in spans)
    return (f'<pre class="prompt">{e(text)}<b>"{e(scene.answer)}"</b></pre>'
            f'<p class="note">Test sequence {scene.number}; the answer is bold. The titles stand '
            f"at the characters {ranges}.</p>")


def example_likelihood(scene: Scene) -> str:
    """Eq. 1: the answer token by token."""
    targets, logits_f, _ = scene.worlds()
    log_p = -F.cross_entropy(logits_f, targets, reduction="none")
    rows = [[scene.spelled(t), f"{p.exp():.4f}", f"{-p:.4f}"]
            for t, p in zip(targets.tolist(), log_p)]
    return table(["token of the answer", "probability", "−log"], [
        *rows, ["mean, which is the loss", "", f"{-log_p.mean():.4f}"]])


def example_factors(scene: Scene) -> str:
    """Eq. 2: how many numbers are frozen, and how many tuned."""
    tuned = sum(p.numel() for p in tuned_parameters(scene.model))
    everything = sum(p.numel() for p in scene.model.parameters())
    o = scene.options
    return table(["", "numbers"], [["frozen, Θ", f"{everything - tuned:,}"],
                                   ["tuned, Φ", f"{tuned:,}"]],
                 f"rank {o.lora_rank}, α = {o.lora_alpha:g}, on {', '.join(o.lora_targets)}")


def example_sinusoidal(scene: Scene) -> str:
    """Eq. 3: p_k of three positions."""
    p = sinusoidal(torch.arange(3), 8)
    return table(["", *(f"{'sin' if j % 2 == 0 else 'cos'}" for j in range(8))],
                 [[h("p<sub>{}</sub>", k), *(f"{x:.3f}" for x in p[k])] for k in range(3)],
                 "Three positions in eight dimensions. The last pairs hardly move.")


def example_rotary(scene: Scene) -> str:
    """Eq. 4: a vector turned by R_k, as hands of two clocks and in numbers."""
    x = torch.tensor([1.0, 0.0, 1.0, 0.0])
    turned = rotary(x.expand(4, 4), torch.arange(4))
    parts = []
    for pair, (centre, what) in enumerate(((110, "first pair: a radian a step"),
                                           (330, "second pair: 1/100"))):
        parts += [f'<circle cx="{centre}" cy="105" r="80" class="faint"/>',
                  text_at(centre, 205, what, "middle")]
        for k in range(4):
            a, b = turned[k, 2 * pair:2 * pair + 2].tolist()
            parts.append(f'<line x1="{centre}" y1="105" x2="{centre + 80 * a:.1f}" '
                         f'y2="{105 - 80 * b:.1f}" class="hand"/>')
            if pair == 0:
                parts.append(text_at(centre + 93 * a, 109 - 93 * b, f"k={k}", "middle"))
    rows = [[h("R<sub>{}</sub> x", k), *(f"{v:.3f}" for v in turned[k])] for k in range(4)]
    return (svg(440, 215, parts, "a vector turned by R_k") +
            table(["", "x₀", "x₁", "x₂", "x₃"], rows, "x = (1, 0, 1, 0), with d = 4."))


def example_distance(scene: Scene) -> str:
    """Eq. 5: products of a turned query and a turned key."""
    generator = torch.Generator().manual_seed(0)
    q, key = torch.randn(2, 16, generator=generator)
    rows = []
    for distance in range(3):
        scores = [float(rotary(q, torch.tensor(m)) @ rotary(key, torch.tensor(m + distance)))
                  for m in (0, 5, 50)]
        rows.append([f"n = m + {distance}", *(f"{s:.4f}" for s in scores)])
    return table([Html("⟨R<sub>m</sub> q, R<sub>n</sub> k⟩"), "m = 0", "m = 5", "m = 50"], rows,
                 "One query and one key, drawn at random: rows differ, columns do not.")


def example_worlds(scene: Scene) -> str:
    """Eq. 6: the prompt with the k of its items, in both worlds."""
    factual = scene.example.item_pos
    erased = erase_order(torch.tensor(factual)).tolist()
    return ("<p>The factual world:</p>" + marked(scene, factual) +
            "<p>The erased one, with the same tokens:</p>" + marked(scene, erased))


def example_picture(scene: Scene) -> str:
    """p_k of the sequence's items in both worlds, item by item and dimension by dimension."""
    k = torch.tensor(sorted({x for x in scene.example.item_pos if x != NO_ITEM}, reverse=True))
    parts, width = [], 32
    for world, (left, name, pos) in enumerate(((58, "factual world", k),
                                               (318, "erased world", erase_order(k)))):
        parts.append(text_at(left + 4 * width, 14, name, "middle"))
        for row, p in enumerate(sinusoidal(pos, width)):
            if not world:
                parts.append(text_at(left - 6, 36 + 20 * row, f"k = {k[row]:.3g}", "end"))
            for column, value in enumerate(p.tolist()):
                grey = round(127.5 * (1 + value))
                parts.append(f'<rect x="{left + 8 * column}" y="{22 + 20 * row}" width="8" '
                             f'height="20" fill="rgb({grey},{grey},{grey})"/>')
    return svg(584, 32 + 20 * len(k), parts, "temporal embeddings in both worlds") + (
        '<p class="note">Sines and cosines of the angles, in 32 dimensions, oldest item first. In '
        "the erased world all rows are alike.</p>")


def example_answer(scene: Scene) -> str:
    """Eq. 7: log p of the answer's tokens in both worlds."""
    targets, logits_f, logits_cf = scene.worlds()
    log_f, log_cf = (-F.cross_entropy(x, targets, reduction="none") for x in (logits_f, logits_cf))
    rows = [[scene.spelled(t), f"{f:.3f}", f"{cf:.3f}", f"{f - cf:+.3f}"]
            for t, f, cf in zip(targets.tolist(), log_f, log_cf)]
    return table(["token", Html("log p(x<sub>t</sub>)"), Html("log p(x<sub>0</sub>)"), "effect"], [
        *rows, ["the answer", f"{log_f.sum():.3f}", f"{log_cf.sum():.3f}",
                f"{(log_f - log_cf).sum():+.3f}"]],
        f"ln V = {np.log(logits_f.shape[1]):.3f}: what a token costs that is one of all alike.")


def example_losses(scene: Scene) -> str:
    """Eq. 8: the parts of L_CT."""
    targets, logits_f, logits_cf = scene.worlds()
    effect = logits_f - logits_cf
    loss = F.cross_entropy(effect, targets, reduction="none")
    rows = [[scene.spelled(t), f"{effect[i, t]:+.3f}", f"{effect[i].logsumexp(0):.3f}",
             f"{part:.4f}"]
            for i, (t, part) in enumerate(zip(targets.tolist(), loss))]
    return table(["token y", "effect of y", "log Σ exp effect", "−log softmax"], [
        *rows, [Html("mean, which is L<sub>CT</sub>"), "", "", f"{loss.mean():.4f}"]])


def example_curves(scene: Scene) -> str:
    """L_TA and L_CT by step, on a scale of ratios."""
    log = [line for line in scene.run.log if "loss_ta" in line]
    if not log:
        return "<p>The run has no log of its losses.</p>"
    values = np.array([[line["loss_ta"], line.get("loss_ct") or np.nan] for line in log])
    low, high = 0.9 * np.nanmin(values), 1.1 * np.nanmax(values)

    def height(nats: float) -> float:
        return 174 - 160 * np.log(nats / low) / np.log(high / low)
    parts = [text_at(574, 192, f"step {log[-1]['step']}", "end"),
             '<line x1="60" y1="174" x2="574" y2="174" class="faint"/>']
    for nats in (x for x in (0.25, 0.5, 1, 2, 4, 8) if low < x < high):
        parts.append(text_at(52, height(nats) + 4, f"{nats:g}", "end"))
        parts.append(f'<line x1="60" y1="{height(nats):.1f}" x2="574" y2="{height(nats):.1f}" '
                     'class="faint"/>')
    for column, style in enumerate(("one", "two")):
        points = " ".join(f"{60 + 514 * n / max(1, len(log) - 1):.1f},{height(value):.1f}"
                          for n, value in enumerate(values[:, column]) if value == value)
        parts.append(f'<polyline points="{points}" class="{style}"/>')
    dashed = ("λ = 0, so there is no L<sub>CT</sub>" if np.isnan(values[:, 1]).all() else
              "L<sub>CT</sub> dashed, which begins at ln V")
    return svg(584, 200, parts, "both losses while tuning") + (
        f'<p class="note">Nats a token, at each step of tuning: L<sub>TA</sub> drawn through, '
        f"{dashed}.</p>")


def example_sum(scene: Scene) -> str:
    """Eq. 10: the losses of the sequence add up."""
    with torch.no_grad():
        loss, loss_ta, loss_ct = cetrec_loss(scene.model, scene.batch, scene.options.lambda_ct)
    if loss_ct is None:
        return f"<p>λ = 0 in this run: L = L<sub>TA</sub> = {loss_ta:.4f}.</p>"
    return (f"<p>Of the sequence above: L = {loss_ta:.4f} + {scene.options.lambda_ct:g} · "
            f"{loss_ct:.4f} = <b>{loss:.4f}</b>.</p>")


def example_split(scene: Scene) -> str:
    """§5.1.1: the three parts and their dates."""
    rows = []
    train_set, valid_set, _ = scene.inputs.splits
    for name, part in zip(("train", "valid", "test"), (train_set, valid_set, scene.test_set)):
        times = part.times[part.targets]
        first, last = (day_of(time, part.day) for time in (times.min(), times.max()))
        rows.append([name, f"{len(part):,}", first, last])
    return table(["", "sequences", "first answer", "last answer"], rows,
                 "Of the run that this page shows; training and test may be samples.")


def example_metrics(scene: Scene) -> str:
    """§5.1.2: both metrics for a few places of the answer."""
    ranks = np.array([0, 1, 4, 5, 9, 10])
    return table(["place of the answer", *(str(r + 1) for r in ranks)], [
        ["HR@5", *(f"{x:g}" for x in hit_ratio(ranks, 5))],
        ["NDCG@5", *(f"{x:.3f}" for x in ndcg(ranks, 5))],
        ["HR@10", *(f"{x:g}" for x in hit_ratio(ranks, 10))],
        ["NDCG@10", *(f"{x:.3f}" for x in ndcg(ranks, 10))]])


@torch.inference_mode()
def example_beams(scene: Scene) -> str:
    """§5.1.4: five beams, their nearest titles, and the merged list."""
    model, catalogue, titles = scene.model, scene.inputs.catalogue, scene.test_set.titles
    history, ages = scene.test_set.history(scene.number), scene.test_set.ages(scene.number)
    recommender = GroundedBeams(model, catalogue, scene.options.decoding())
    (prompt,) = catalogue.prompts([history], None if ages is None else [ages])
    (answers,), (scores,) = beam_search(
        model, [(prompt.tokens, prompt.item_pos)], 5, recommender.longest, recommender.shortest,
        scene.options.length_penalty, scene.tokenizer.eos_ids)
    texts = [clean(scene.tokenizer.decode(answer)) for answer in answers]
    near = ground(model, texts, catalogue, length=20).tolist()
    rows = [[text, f"{float(score):.2f}", titles[items[0]], titles[items[1]]]
            for text, score, items in zip(texts, scores, near)]
    listed = ", ".join(f"<b>{e(titles[i])}</b>" if titles[i] == scene.answer else e(titles[i])
                       for i in merge_lists(near, history))
    return table(["beam", "score", "nearest title", "second-nearest"], rows) + (
        f"<p>Merged, without the history: {listed}. The answer was {e(scene.answer)}.</p>")


def example_reversal(scene: Scene) -> str:
    """Fig. 4 of the run: by how much each metric changes."""
    record, shown = scene.run.record, ("", " | reversed", " | change, reversed")
    rows = {f"{name}{row}": record["rows"][f"{name}{row}"] for name in scene.run.lists
            for row in shown}
    return table(["", *METRICS], score_rows(rows), record["protocol"])


EXAMPLES = {
    "Table 1": example_prompt, "Eq. 1": example_likelihood, "Eq. 2": example_factors,
    "Eq. 3": example_sinusoidal, "Eq. 4": example_rotary, "Eq. 5": example_distance,
    "Eq. 6": example_worlds, "§4.3": example_picture, "Eq. 7": example_answer,
    "Eq. 8": example_losses, "Eq. 9": example_curves, "Eq. 10": example_sum,
    "§5.1.1": example_split, "§5.1.2": example_metrics, "§5.1.4": example_beams,
    "§5.4": example_reversal}

# ----------------------------------------------------------------------------------------------
# The page


def anchor(place: str) -> str:
    """§5.1.1 -> 5-1-1"""
    return re.sub(r"[^0-9a-z]+", "-", place.lower()).strip("-")


def passage(part: Passage, scene: Scene, passed: dict[str, str]) -> str:
    """One place of the paper: words, equations and example beside code and tests.

    Raises ValueError if code, tests or identifiers that it names are gone.
    """
    text = (ROOT / "tests" / "test_equations.py").read_text(encoding="utf-8")
    tests = names_of_tests(part.tests, text)
    if not tests or not passed.keys() >= set(tests):
        raise ValueError(f"{part.place}: no tests begin with test_{part.tests}, or they did not "
                         "run")
    known = (ROOT / "docs" / "readings.md").read_text(encoding="utf-8")
    for identifier in re.findall(r"\bD\d+\b", part.words):
        if f"| {identifier} |" not in known:
            raise ValueError(f"{part.place}: docs/readings.md has no {identifier}")
    words = "".join(f"<p>{paragraph}</p>" for paragraph in part.words.strip().split("\n\n"))
    listed = "".join(f'<li class="{passed[name]}"><code>{name}</code> {passed[name]}</li>'
                     for name in tests)
    example = EXAMPLES[part.place](scene)
    heading = f'<h2><span class="place">{part.place}</span> {part.title}</h2>'
    left = heading + words + "".join(part.equations) + f'<div class="example">{example}</div>'
    right = "".join(map(code, part.code)) + f'<ul class="tests">{listed}</ul>'
    return (f'<section id="{anchor(part.place)}"><div class="words">{left}</div>'
            f'<div class="right">{right}</div></section>')


def system(name: str, words: str, equation: str, where: str) -> str:
    """One of the other systems of Table 3."""
    return (f'<section><div class="words"><h3>{name}</h3><p>{words}</p>{equation}</div>'
            f'<div class="right">{code(where)}</div></section>')


def page(scene: Scene, passed: dict[str, str]) -> str:
    """page.html."""
    readings = (ROOT / "docs" / "readings.md").read_text(encoding="utf-8")
    links = " ".join(f'<a href="#{anchor(p.place)}">{p.place}</a>' for p in PASSAGES)
    run = scene.run
    body = "".join(passage(part, scene, passed) for part in PASSAGES)
    return PAGE.format(
        style=STYLE + OWN_STYLE, links=links, body=body,
        systems="".join(system(*s) for s in SYSTEMS),
        readings=markdown_table(readings, "| id |"),
        effects=markdown_table("\n".join(effects()) + "\n"),
        results=markdown_table("\n".join(results()) + "\n"),
        made=f"{datetime.date.today():%d %B %Y}, from the run {e(run.name)} on the data "
             f"{e(run.options['data'])}, seed {run.options['seed']}; {len(passed)} tests of "
             f"equations, {sum(x == 'passed' for x in passed.values())} passed")


OWN_STYLE = """
nav { margin: 1.5rem 0; line-height: 1.9; }
.place { color: var(--orange); margin-right: .4em; white-space: nowrap; }
.made { color: var(--faint); font-size: .85rem; }
section { padding: 2.2rem 0; border-top: 1px solid var(--line); }
section > div { min-width: 0; }
@media (min-width: 62rem) {
  section { display: grid; grid-template-columns: 5fr 8fr; gap: 2rem; } }
math { font-size: min(1.1rem, 4.3vw); margin: .8rem 0; max-width: 100%; }
mtable { border: solid; border-width: 0 1px; border-radius: .5em; padding: 0 .3em; }
pre { margin: .2rem 0 0; padding: .8rem 1rem; background: var(--wash); white-space: break-spaces;
      overflow-wrap: anywhere; font: 11px/1.55 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
pre code { font: inherit; }
p code { white-space: nowrap; }
.prompt { border-left: 3px solid var(--line); margin: .4rem 0 .8rem; }
.item { color: #222; border: 1px solid #8883; border-radius: 2px; }
.item sub { padding-left: .2em; }
.k, .kn, .kc, .ow { color: var(--blue); } .s, .s1, .s2, .sd, .si, .se { color: var(--green); }
.c1 { color: var(--faint); font-style: italic; } .sd { font-style: italic; }
.mi, .mf { color: var(--orange); } .nf, .nc { font-weight: bold; }
.tests { list-style: none; padding: 0; margin: 0; font-size: .8rem; color: var(--faint); }
.tests li::before { content: "✓ "; color: var(--green); }
.tests li.failed { color: var(--orange); font-weight: bold; }
.tests li.failed::before { content: "✗ "; color: var(--orange); }
.tests li.skipped::before { content: "– "; }
svg { width: 100%; height: auto; margin: .6rem 0; font: 12px Georgia, serif; fill: var(--ink); }
.faint { stroke: var(--line); fill: none; }
.hand { stroke: var(--blue); stroke-width: 2; }
.one, .two { fill: none; stroke: var(--blue); stroke-width: 1.5; }
.two { stroke: var(--orange); stroke-dasharray: 5 3; }
.wide { display: block; }
@media print { body { font-size: 10pt; } pre { font-size: 7pt; } section { break-inside: avoid; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>CETRec: the paper and the code</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{style}</style></head><body>
<h1>CETRec: the paper and the code</h1>
<p>“Enhancing Temporal Sensitivity of Large Language Model for Recommendation with Counterfactual
Tuning” (Liu, Yang, Wu, Wang; arXiv 2507.03047), passage by passage: our words for what it says and
what it leaves open, beside the code that does it. All numbers were computed when this page was
made.</p>
<p class="made">Made on {made}.</p>
<nav>{links}<a href="#systems">Table 3</a><a href="#readings">readings</a><a href="#results">results
</a></nav>
{body}
<h2 id="systems">The other systems of Table 3</h2>
{systems}
<section class="wide" id="readings"><h2>Where the paper is silent</h2>{readings}
<p>What other readings change, on the synthetic world: the difference to the stated one, with 95 %
intervals over test sequences.</p>{effects}</section>
<section class="wide" id="results"><h2>Results</h2>{results}</section>
</body></html>
"""


def main(argv: list[str] | None = None) -> int:
    """Parse and write page.html. Returns the exit status."""
    ap = Parser(prog="python -m experiments.page",
                description="Write page.html: the paper's passages beside the code, with worked "
                "examples from a run.")
    ap.add_argument("--run", metavar="RUN", help="folder of a run of cetrec.py (default: a small "
                    "one is made, which takes half a minute)")
    add_flags(ap, Options, Where, only={"seed", "data_dir", "out"})
    flags = parse(ap, argv)

    def work() -> None:
        """The page of the run that was asked for, or of a small one."""
        for flag, goes_with in (("seed", "a run that is made now"), ("data_dir", "--run")):
            if flag in flags and ("run" in flags) != (goes_with == "--run"):
                raise ValueError(f"{as_flag(flag)} goes with {goes_with}; drop it")
        if importlib.util.find_spec("pygments") is None:
            raise ValueError("the page wants Pygments to colour code; pip install pygments")
        folder, out = flags.pop("run", None), Path(flags.pop("out", "."))
        scene = scene_of(Path(folder) if folder else None, flags)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "page.html", page(scene, outcomes()).encode())
        print(f"written {out / 'page.html'}")
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
