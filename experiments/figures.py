"""Figures of finished runs (Fig. 4, 5 and what the paper has no figure of) and the one HTML page.

Runs are those of experiments/report.py. Only this file needs matplotlib, which is optional. Colours
differ in lightness and marks in shape, so that a grey print can be read.
"""

import base64
import importlib.util
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cetrec import erase_order, sinusoidal
from evaluate import METRICS
from experiments.markup import STYLE, e, h
from support.files import write_whole

NO_MATPLOTLIB = "no figures: they want matplotlib; pip install matplotlib"
DARK, MIDDLE, LIGHT = "#1b3a5c", "#d1761d", "#9cc7e0"       # lightness 0.23, 0.57, 0.77
MARKS = "osD^"                  # of the four temporal embeddings
WIDTH = 64                      # dimensions of the temporal picture
WIDE = 6.5                      # inches: on a phone of 500 pixels the letters have nine


def figures_available() -> bool:
    """Is matplotlib installed?"""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float):
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, height: float):
    """A figure with so many panels below one another, all on one scale."""
    fig = _figure(WIDE, height * count)
    return fig, fig.subplots(count, 1, sharey=True, squeeze=False).flatten()


def _bare(ax) -> None:
    """Take the frame's upper and right lines off, put a faint grid behind."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)


def _label(run) -> str:
    return f"{run.name}\n{run.setting}"


def _short(title: str, width: int = 34) -> str:
    """What fits a figure, and prints."""
    title = "".join(c if c.isprintable() else " " for c in title)
    return title if len(title) <= width else title[:width - 1] + "…"


def training_curves(runs: Sequence):
    """L_TA and L_CT by step, smoothed over a fiftieth of the run, and validation L_TA by epoch.

    For baselines, which have other losses, these are what stands in their place.
    """
    runs = [run for run in runs if any("loss_ta" in line for line in run.log)]
    if not runs:
        return None
    fig, panels = _panels(len(runs), 3.2)
    for ax, run in zip(panels, runs):
        steps = [line for line in run.log if "loss_ta" in line]
        step = np.array([line["step"] for line in steps])
        ta, ct = (("$L_{TA}$ (Eq. 9)", "$L_{CT}$ (Eq. 8)") if run.record["method"] == "cetrec" else
                  ("the answer's loss", "the effect's loss"))
        for key, name, colour, style in (("loss_ta", ta, DARK, "-"), ("loss_ct", ct, MIDDLE, "--")):
            values = np.array([line[key] for line in steps], dtype=float)     # None becomes nan
            if np.isnan(values).all():
                continue
            window = max(1, len(values) // 50)
            smooth = np.convolve(values, np.full(window, 1 / window), "valid")
            ax.plot(step, values, color=colour, alpha=0.2, linewidth=0.7)
            ax.plot(step[window - 1:], smooth, style, color=colour, linewidth=1.8, label=name)
            if key == "loss_ct" and "vocabulary" in run.record:
                ax.axhline(math.log(run.record["vocabulary"]), color="0.4", linewidth=1,
                           linestyle=":", label="ln V: the worlds agree")
        epochs = [line for line in run.log if "validation_ta" in line]
        ax.plot([line["step"] for line in epochs], [line["validation_ta"] for line in epochs], "D",
                color="black", markerfacecolor="white", label=f"{ta}, validation")
        ax.set_title(_label(run), fontsize=10, parse_math=False)
        ax.set_xlabel("step")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="y", which="both", labelsize=9)
        ax.set_ylabel("nats per answer token")
        _bare(ax)
        ax.legend(frameon=False, fontsize=9, loc="center right")
    return fig


def change_bars(rates: dict[str, tuple]):
    """Fig. 4: by how much each metric changes when the test histories are reversed.

    rates: what a bar stands for -> (mean (4,), error (4,) or None), in per cent. A change that too
    few hits tell, which is not a number, is a dash in the place of a bar.
    """
    fig, place = _figure(WIDE, 3.6), np.arange(len(METRICS))
    ax, width = fig.subplots(), 0.84 / len(rates)
    hatches, shades = ("", "//", "..", "\\\\", "xx"), (DARK, MIDDLE, LIGHT, "0.75", "0.45")
    for i, (name, (mean, error)) in enumerate(rates.items()):
        at = place + (i - (len(rates) - 1) / 2) * width
        ax.bar(at, mean, 0.92 * width, yerr=error, label=name, color=shades[i % 5],
               hatch=hatches[i % 5], edgecolor="white", linewidth=0,
               error_kw={"elinewidth": 1, "capsize": 2})
        for x in at[np.isnan(mean)]:
            ax.text(x, 0, "–", ha="center", va="bottom")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(place, METRICS)
    ax.set_ylabel("change, %")
    legend = ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.08),
                       ncols=1 if max(map(len, rates)) > 24 else 3)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _bare(ax)
    return fig


def entropy_curves(worlds: dict[str, list[dict]], vocabulary: int):
    """How much the erased world leaves open about the next token while tuning, for each reading.

    worlds: reading -> what experiments.readings noted at each step; None if there is nothing.
    """
    if not worlds:
        return None
    rows = -(-len(worlds) // 2)
    fig = _figure(WIDE, 1.3 * rows + 0.5)
    panels = fig.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten()
    for ax in panels[len(worlds):]:
        ax.set_axis_off()
    for ax, (name, notes) in zip(panels, worlds.items()):
        done = np.arange(1, len(notes) + 1) / len(notes)
        for world, colour, style in (("factual", DARK, "-"), ("erased", MIDDLE, "--")):
            ax.plot(done, [note[world] for note in notes], style, color=colour, linewidth=1,
                    label=f"{world} world")
        ax.axhline(math.log(vocabulary), color="0.4", linewidth=1, linestyle=":",
                   label="ln V: nothing is known")
        ax.set_title(name, fontsize=9)
        _bare(ax)
    panels[0].legend(frameon=False, fontsize=8)
    fig.supxlabel("share of tuning done", fontsize=10)
    fig.supylabel("entropy of the next token, nats", fontsize=10)
    return fig


def lambda_curve(runs: Sequence):
    """HR@5 and HR@10 against λ, a line for each temporal embedding; None for fewer than two λ.

    The lists are of the first run's first kind; runs without them are left out.
    """
    kind = next(iter(runs[0].kinds))
    runs = [run for run in runs if kind in run.kinds]
    ticks = sorted({run.options["lambda_ct"] for run in runs})
    if len(ticks) < 2:
        return None
    fig = _figure(WIDE, 3.2)
    embeddings = sorted({run.options["temporal"] for run in runs})
    for ax, metric in zip(fig.subplots(1, 2), ("HR@5", "HR@10")):
        for mark, colour, embedding in zip(MARKS, (DARK, MIDDLE, "0.45", LIGHT), embeddings):
            found: dict[float, list] = {}               # λ -> (mean, error) of each run
            for run in runs:
                if run.options["temporal"] == embedding:
                    scores = run.record["rows"][run.kinds[kind]]
                    found.setdefault(run.options["lambda_ct"], []).append(scores[metric])
            lambdas = sorted(found)
            ax.plot(lambdas, [np.mean([mean for mean, _ in found[x]]) for x in lambdas], "-",
                    color=colour, linewidth=1.2)
            points = np.array([(x, *score) for x in lambdas for score in found[x]])
            ax.errorbar(*points.T, fmt=mark, color=colour, capsize=3, label=embedding)
        ax.set_xscale("symlog", linthresh=min(x for x in ticks if x > 0), linscale=0.5)
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.set_xlabel("λ, weight of $L_{CT}$ (Eq. 10)")
        ax.set_ylabel(f"{metric} ± standard error")
        ax.set_title(f"lists: {kind}", fontsize=10)
        ax.legend(frameon=False, fontsize=9)
        _bare(ax)
    return fig


def temporal_picture(options: dict, titles: Sequence[str]):
    """What tells the worlds apart, items × dimensions: p_k of Eq. 3, or sine and cosine of the
    angles by which R_k of Eq. 4 turns, sines first.

    options: of the run; titles: its history, oldest first. It is drawn as for a base of WIDTH
    dimensions; in a wider one the same angles stand closer together. Returns None where there is no
    temporal embedding, and where k is an age, which the history does not tell.
    """
    kind, n = options["temporal"], len(titles)
    if kind == "none" or options["index"] != "order":
        return None
    k = torch.arange(n - 1, -1, -1)
    scale, what = 1.0, "sin and cos of the turn $R_k$ (Eq. 4)"
    if kind == "sinpe":
        scale, what = options["sinpe_scale"], "$p_k$ (Eq. 3)"
    fig, top = _figure(WIDE, 1.6 + 0.27 * n), scale or 1.0
    axes, middle = fig.subplots(1, 2, sharey=True), WIDTH // 2
    for ax, (world, pos) in zip(axes, (("factual world", k), ("erased world", erase_order(k)))):
        values = (scale * sinusoidal(pos, WIDTH)).numpy()
        shown = ax.imshow(np.concatenate((values[:, 0::2], values[:, 1::2]), axis=1),
                          aspect="auto", interpolation="nearest", cmap="gray", vmin=-top,
                          vmax=top)
        ax.axvline(middle - 0.5, color=MIDDLE, linewidth=2)
        ax.set_title(world, fontsize=10)
        ticks = np.array([0, middle // 2])
        ax.set_xticks([*ticks, *(ticks + middle)], [*(2 * ticks), *(2 * ticks + 1)], fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("even: sin   |   odd: cos", fontsize=9)
    axes[0].set_yticks(range(n), [f"{_short(title, 22)}  k = {x}"
                                  for title, x in zip(titles, k.tolist())], fontsize=9,
                       parse_math=False)
    bar = fig.colorbar(shown, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(what, fontsize=9)
    bar.ax.tick_params(labelsize=9)
    return fig


def case_study(runs: Sequence, user: int):
    """Fig. 5: one test sequence, and the ten items each run gives for it, as it is and reversed.

    user counts the test sequences of the first run; runs that were not tested on it say so. The
    lists are of the first run's first kind, if a run has it, else of its own first.
    """
    first, kind = runs[0], next(iter(runs[0].kinds))
    sequence, answer = first.arrays["sequence"][user], int(first.arrays["target"][user])
    history = [int(item) for item in first.arrays["history"][user] if item >= 0]
    by_order = first.options["index"] == "order"        # else k is an age, not a place
    heights = [len(history) + 3.2] + [12.6] * len(runs)         # in lines
    fig = _figure(WIDE, 0.24 * sum(heights))
    axes = fig.subplots(1 + len(runs), 1, height_ratios=heights)
    for ax, lines in zip(axes, heights):
        ax.set_axis_off()
        ax.set(xlim=(0, 1), ylim=(lines - 1.2, -1.2))

    def write(ax, x: float, y: float, text: str, **style) -> None:
        ax.text(x, y, text, va="center", fontsize=9, parse_math=False, **style)
    write(axes[0], 0, -0.8, "history, oldest first", weight="bold")
    for row, item in enumerate(history):
        steps = f"  [k = {len(history) - 1 - row}]" if by_order else ""
        write(axes[0], 0.05, 0.2 + row, _short(first.titles[item], 60) + steps)
    write(axes[0], 0, 0.4 + len(history), f"▶ {_short(first.titles[answer], 60)}, the answer",
          weight="bold", color=DARK)
    for ax, run in zip(axes[1:], runs):
        name = run.kinds.get(kind) or next(iter(run.kinds.values()))
        write(ax, 0, -0.8, f"{run.name} | {run.setting} | {name}", weight="bold")
        rows = np.flatnonzero(run.arrays["sequence"] == sequence)
        if not len(rows):
            write(ax, 0, 1, "not among this run's test sequences")
            continue
        for x, order in ((0, "original"), (0.5, "reversed")):
            write(ax, x, 0.1, f"{order} history", style="italic")
            ten = run.arrays[f"lists/{name}/{order}"][rows[0]].tolist()
            for rank, item in enumerate(item for item in ten if item >= 0):
                hit = item == answer
                style = {"weight": "bold", "color": DARK} if hit else {"color": "0.15"}
                write(ax, x + 0.04, 1 + rank, str(rank + 1), ha="right", **style)
                write(ax, x + 0.06, 1 + rank, _short(first.titles[item]) + " ◀" * hit, **style)
    return fig


PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}
body {{ max-width: 56rem; }}
h2 {{ border-top: 1px solid var(--line); padding-top: 1.5rem; margin-top: 2rem; }}
h3 {{ margin-top: 1.2rem; }}
figure {{ margin: 2rem 0; }}
img {{ width: 100%; max-width: 45rem; height: auto; background: white; }}
</style></head><body>
<h1>{heading}</h1>
{body}
</body></html>
"""


def image(fig, name: str, kind: str) -> bytes:
    """A figure as a png or svg file, the same bytes every time. name: what it is called."""
    import matplotlib
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # Titles may be in any script, and those that the font does not have are drawn as boxes,
        # about which nobody can do much.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        fig.savefig(file, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def write_page(folder: Path, heading: str, parts: Sequence[tuple[str, str]],
               drawn: Sequence[tuple[str, str, object]], notes: Sequence[str]) -> Path:
    """Each figure as PNG and SVG, and report.html with all of them inside; each file appears whole.

    parts: (title, HTML); drawn: (file name, caption, figure); notes: sentences below them.
    """
    body = [e(part) if title == heading else h("<h2>{}</h2>\n{}", title, part)
            for title, part in parts]
    for name, caption, fig in drawn:
        for kind in ("png", "svg"):
            drawn_as = image(fig, name, kind)
            write_whole(folder / f"{name}.{kind}", drawn_as)
        encoded = base64.b64encode(drawn_as).decode()
        body.append(h('<figure><img alt="{}" src="data:image/svg+xml;base64,{}">\n'
                      "<figcaption>{}</figcaption></figure>", caption, encoded, caption))
    body += [h("<p>{}</p>", note) for note in notes]
    page = PAGE.format(heading=e(heading), body="\n".join(body), style=STYLE)
    write_whole(folder / "report.html", page.encode())
    return folder / "report.html"
