"""Figures of finished runs (Fig. 4, 5 and what the paper has no figure of) and the one HTML page.

Only this file needs matplotlib, an optional extra. Colours differ in lightness and marks in shape,
so that a grey print can be read.
"""

import base64
import html
import importlib.util
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluate import METRICS

NO_MATPLOTLIB = "no figures: they want matplotlib; pip install matplotlib"
DARK, MIDDLE, LIGHT = "#1b3a5c", "#d1761d", "#9cc7e0"       # lightness 0.23, 0.57, 0.77
MARKS = "osD^vPX*"


def figures_available() -> bool:
    """Is matplotlib installed?"""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float):
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def _panels(runs: Sequence, columns: int, width: float, height: float):
    """A figure with a panel for each run, so many beside one another, all on one scale."""
    wide = min(columns, len(runs))
    rows = math.ceil(len(runs) / wide)
    fig = _figure(width * wide + 0.6, height * rows)
    panels = fig.subplots(rows, wide, sharey=True, squeeze=False).flatten()
    for ax in panels[len(runs):]:
        ax.set_axis_off()
    return fig, panels[:len(runs)]


def _bare(ax) -> None:
    """Take the frame's upper and right lines off, put a faint grid behind."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)


def _label(run) -> str:
    return f"{run.name}\n{run.options['temporal']}, λ = {run.options['lambda_ct']:g}"


def _short(title: str, width: int = 34) -> str:
    """What fits a figure, and prints."""
    title = "".join(c if c.isprintable() else " " for c in title)
    return title if len(title) <= width else title[:width - 1] + "…"


def training_curves(runs: Sequence):
    """L_TA and L_CT by step, smoothed over a fiftieth of the run, and validation L_TA by epoch."""
    runs = [run for run in runs if any("loss_ta" in line for line in run.log)]
    if not runs:
        return None
    fig, panels = _panels(runs, 2, 5.2, 3.8)
    for ax, run in zip(panels, runs):
        steps = [line for line in run.log if "loss_ta" in line]
        step = np.array([line["step"] for line in steps])
        for key, name, colour, style in (("loss_ta", "$L_{TA}$ (Eq. 9)", DARK, "-"),
                                         ("loss_ct", "$L_{CT}$ (Eq. 8)", MIDDLE, "--")):
            values = np.array([line[key] for line in steps], dtype=float)     # None becomes nan
            if np.isnan(values).all():
                continue
            window = max(1, len(values) // 50)
            smooth = np.convolve(values, np.full(window, 1 / window), "valid")
            ax.plot(step, values, color=colour, alpha=0.2, linewidth=0.7)
            ax.plot(step[window - 1:], smooth, style, color=colour, linewidth=1.8, label=name)
            if key == "loss_ct":
                ax.axhline(math.log(run.result["vocabulary"]), color="0.4", linewidth=1,
                           linestyle=":", label="ln V: the worlds agree")
        epochs = [line for line in run.log if "validation_ta" in line]
        ax.plot([line["step"] for line in epochs], [line["validation_ta"] for line in epochs], "D",
                color="black", markerfacecolor="white", label="validation $L_{TA}$")
        ax.set_title(_label(run), fontsize=10, parse_math=False)
        ax.set_xlabel("step")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="y", which="both", labelsize=8)
        ax.set_ylabel("nats per answer token")
        _bare(ax)
        ax.legend(frameon=False, fontsize=9, loc="center right")
    return fig


def order_bars(runs: Sequence):
    """Fig. 4: every metric on the test histories as they are, reversed and shuffled."""
    orders = (("original order", DARK, ""), ("reversed order", MIDDLE, "//"),
              ("shuffled order", LIGHT, ".."))
    fig, panels = _panels(runs, 3, 4.2, 3.6)
    for ax, run in zip(panels, runs):
        place = np.arange(len(METRICS))
        for i, (order, colour, hatch) in enumerate(orders):
            mean, error = zip(*(run.result["rows"][order][name] for name in METRICS))
            ax.bar(place + 0.27 * (i - 1), mean, 0.25, yerr=error, color=colour, hatch=hatch,
                   edgecolor="white", linewidth=0, error_kw={"elinewidth": 1, "capsize": 2},
                   label=order)
        ax.set_xticks(place, METRICS)
        ax.set_title(_label(run), fontsize=10, parse_math=False)
        ax.set_ylabel("mean ± standard error")
        ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", columnspacing=1,
                  handlelength=1.4)
        _bare(ax)
    panels[0].set_ylim(top=1.18 * panels[0].get_ylim()[1])          # room for the legend
    return fig


def lambda_curve(runs: Sequence):
    """HR@5 and HR@10 against λ, a line for each temporal embedding; None for fewer than two λ."""
    if len({run.options["lambda_ct"] for run in runs}) < 2:
        return None
    fig = _figure(8.4, 3.6)
    smallest = min(run.options["lambda_ct"] for run in runs if run.options["lambda_ct"] > 0)
    for ax, metric in zip(fig.subplots(1, 2), ("HR@5", "HR@10")):
        for i, kind in enumerate(sorted({run.options["temporal"] for run in runs})):
            values: dict[float, list] = {}
            for run in runs:
                if run.options["temporal"] == kind:
                    values.setdefault(run.options["lambda_ct"], []).append(
                        run.result["rows"]["original order"][metric])
            lambdas = sorted(values)
            colour = (DARK, MIDDLE, "0.45", LIGHT)[i]
            ax.plot(lambdas, [np.mean([mean for mean, _ in values[x]]) for x in lambdas],
                    "-", color=colour, linewidth=1.2)
            for x in lambdas:
                for mean, error in values[x]:
                    ax.errorbar(x, mean, error, fmt=MARKS[i], color=colour, capsize=3,
                                label=kind if x == lambdas[0] and mean == values[x][0][0] else None)
        ax.set_xscale("symlog", linthresh=smallest, linscale=0.5)
        ticks = sorted({run.options["lambda_ct"] for run in runs})
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.set_xlabel("λ, weight of $L_{CT}$ (Eq. 10)")
        ax.set_ylabel(f"{metric} ± standard error")
        ax.legend(frameon=False, fontsize=9)
        _bare(ax)
    return fig


def temporal_picture(run):
    """The temporal embedding of one prompt: items × dimensions, in both worlds, sines first."""
    if "temporal/k" not in run.arrays:
        return None
    worlds = {"factual world": run.arrays["temporal/factual"],
              "erased world": run.arrays["temporal/erased"]}
    k, titles = run.arrays["temporal/k"], run.result["history_titles"]
    what = "$p_k$ (Eq. 3)" if run.options["temporal"] == "sinpe" else "turn of $R_k$ (Eq. 4)"
    fig = _figure(10.5, 1.6 + 0.27 * len(k))
    top = max(float(np.abs(values).max()) for values in worlds.values())
    for ax, (name, values) in zip(axes := fig.subplots(1, 2, sharey=True), worlds.items()):
        halves = np.concatenate((values[:, 0::2], values[:, 1::2]), axis=1)
        shown = ax.imshow(halves, aspect="auto", interpolation="nearest", cmap="gray", vmin=-top,
                          vmax=top)
        middle = halves.shape[1] / 2
        ax.axvline(middle - 0.5, color=MIDDLE, linewidth=2)
        ax.set_title(name, fontsize=10)
        ticks = np.linspace(0, 0.8 * middle, 3).astype(int)
        ax.set_xticks([*ticks, *(ticks + int(middle))], [*(2 * ticks), *(2 * ticks + 1)],
                      fontsize=8)
        ax.set_xlabel("even dimensions: sin      |      odd dimensions: cos", fontsize=9)
    axes[0].set_yticks(range(len(k)), [f"{_short(title)}  k = {x:.3g}"
                                       for title, x in zip(titles, k)], fontsize=8,
                       parse_math=False)
    axes[0].set_ylabel("oldest first", fontsize=9)
    fig.colorbar(shown, ax=axes, fraction=0.03, pad=0.01).set_label(what, fontsize=9)
    return fig


def case_study(runs: Sequence, user: int):
    """Fig. 5: one test sequence, and the ten items each run gives for it, as it is and reversed.

    user counts the test sequences of the first run; runs that were not tested on it say so.
    """
    first = runs[0]
    sequence, answer = first.arrays["sequence"][user], int(first.arrays["target"][user])
    history = [int(item) for item in first.arrays["history"][user] if item >= 0]
    by_order = first.options["index"] == "order"        # else k is an age, not a place

    def short(item: int) -> str:
        return _short(first.titles[item])
    rows = math.ceil(len(runs) / 2)
    fig = _figure(3.2 + 5.4 * min(2, len(runs)), 3.6 * rows)
    axes = fig.subplots(rows, 1 + min(2, len(runs)), squeeze=False,
                        width_ratios=[3.2] + [5.4] * min(2, len(runs)))
    for ax in axes.flat:
        ax.set_axis_off()
        ax.set(xlim=(0, 1), ylim=(12.4, -1.2))

    def write(ax, x: float, y: float, text: str, **style) -> None:
        ax.text(x, y, text, va="center", fontsize=8.5, parse_math=False, **style)
    write(axes[0, 0], 0, -0.8, "history, oldest first", weight="bold")
    for row, item in enumerate(history):
        steps = f"  [k = {len(history) - 1 - row}]" if by_order else ""
        write(axes[0, 0], 0, 1 + row, short(item) + steps)
    write(axes[0, 0], 0, 2.2 + len(history) - 1, f"▶ {short(answer)}", weight="bold", color=DARK)
    for ax, run in zip(axes[:, 1:].flat, runs):
        write(ax, 0, -0.8, _label(run).replace("\n", " | "), weight="bold")
        here = np.flatnonzero(run.arrays["sequence"] == sequence)
        if not len(here):
            write(ax, 0, 1, "not among this run's test sequences")
            continue
        for x, order in ((0, "original"), (0.5, "reversed")):
            write(ax, x, 0.1, f"{order} history", style="italic")
            for rank, item in enumerate(run.arrays[f"lists/{order}"][here[0]].tolist()):
                if item >= 0:
                    style = ({"weight": "bold", "color": DARK} if item == answer else
                             {"color": "0.15"})
                    write(ax, x + 0.05, 1 + rank, str(rank + 1), ha="right", **style)
                    write(ax, x + 0.07, 1 + rank,
                          f"{short(item)}{' ◀' if item == answer else ''}", **style)
    return fig


PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
        color: #222; }}
pre {{ font: 13px/1.45 ui-monospace, monospace; overflow-x: auto; background: #f6f6f4;
       padding: 1rem; }}
figure {{ margin: 2rem 0; overflow-x: auto; }}
figcaption {{ color: #444; }}
img {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{heading}</h1>
{body}
</body></html>
"""


def write_page(folder: Path, heading: str, tables: Sequence[tuple[str, str]],
               drawn: Sequence[tuple[str, str, object]], notes: Sequence[str]) -> Path:
    """Each figure as PNG and SVG, and report.html with all of them inside; each file appears whole.

    tables: (title, text); drawn: (file name, caption, figure); notes: sentences below them.
    """
    body = [f"<h2>{html.escape(title)}</h2>\n<pre>{html.escape(text)}</pre>"
            for title, text in tables]
    for name, caption, fig in drawn:
        for kind in ("png", "svg"):
            import matplotlib
            made = io.BytesIO()
            with matplotlib.rc_context({"svg.hashsalt": name}):     # the same bytes every time
                fig.savefig(made, format=kind, dpi=160,
                            metadata={"Date": None} if kind == "svg" else None)
            _write(folder / f"{name}.{kind}", made.getvalue())
        image = base64.b64encode(made.getvalue()).decode()
        body.append(f'<figure><img alt="{html.escape(caption)}" '
                    f'src="data:image/svg+xml;base64,{image}">\n'
                    f"<figcaption>{html.escape(caption)}</figcaption></figure>")
    body += [f"<p>{html.escape(note)}</p>" for note in notes]
    page = PAGE.format(heading=html.escape(heading), body="\n".join(body))
    _write(folder / "report.html", page.encode())
    return folder / "report.html"


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
