"""One hand for the HTML pages: a style, tables, and numbers set as in a book."""

import html
import math
import re

STYLE = """
:root { --ink: #222; --faint: #777; --paper: #fffefb; --wash: #f5f3ec; --line: #ddd8cc;
        --blue: #1b3a5c; --orange: #a3560f; --green: #3f6b3a; }
@media (prefers-color-scheme: dark) {
:root { --ink: #ddd9cf; --faint: #99958a; --paper: #1b1a18;
        --wash: #24231f; --line: #3d3a33; --blue: #9cc0e4; --orange: #e0a96d; --green: #a3c69b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem; max-width: 84rem; color: var(--ink);
       background: var(--paper); font: 1.0625rem/1.55 Georgia, "Iowan Old Style", "Times New Roman",
       serif; }
h1 { font-size: 2rem; font-weight: normal; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; font-weight: normal; margin: 0 0 .6rem; }
h3 { font-size: 1.1rem; font-weight: normal; font-style: italic; margin: 0 0 .5rem; }
p { margin: 0 0 .8rem; }
a { color: var(--blue); text-decoration: none; margin-right: .7em; }
.note, figcaption, summary { color: var(--faint); font-size: .85rem; }
figure { margin: 0 0 1rem; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere; }
sub, sup { line-height: 0; font-size: .75em; }
.table { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.4;
        font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top;
         font-weight: normal; }
th.below { padding-left: 1.2em; color: var(--faint); }
thead th { border-bottom: 1px solid var(--faint); color: var(--faint); }
"""


def e(text) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=False)


def typeset(cell: str) -> str:
    """Numbers with a minus sign of their width, and without a sign where they are 0."""
    return re.sub(r"(^|[\s\[])-(?=[\d.])", r"\1−", re.sub(r"^[-+](0\.0+)$", r"\1", cell))


def table(head: list[str], rows: list[list[str]], note: str = "") -> str:
    """A table whose first column names things and whose others hold numbers.

    Cells are HTML. A first cell that begins with two spaces is about the row above.
    """
    def line(cells: list[str]) -> str:
        name, *values = cells
        below = ' class="below"' if name.startswith("  ") else ""
        return f"<tr><th{below}>{name.strip()}</th>" + "".join(
            f"<td>{typeset(value)}</td>" for value in values) + "</tr>"
    top = "".join(f"<th>{cell}</th>" for cell in head)
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    body = "".join(map(line, rows))
    text = f'<div class="table"><table>{top}<tbody>{body}</tbody></table></div>'
    return text + (f'<p class="note">{note}</p>' if note else "")


def score_table(rows: dict[str, dict[str, tuple[float, float]]], note: str = "") -> str:
    """What support.counting.format_table prints, without the standard errors of single cases."""
    metrics, lines = list(next(iter(rows.values()))), []
    for name, scores in rows.items():
        percent, cells = " | change, " in name, []
        for mean, error in scores.values():
            form = "+.1f" if percent else ".4f"
            number = "" if math.isnan(mean) else f"{mean:{form}}"
            cells.append(number + ("" if math.isnan(error) or not number else
                                   f" ± {error:{form.lstrip('+')}}") +
                         (" %" if percent and number else ""))
        head, _, below = name.rpartition(" | ")
        lines.append([f"  {e(below)}" if head and head.partition(" | ")[0] in rows else e(name),
                      *cells])
    return table(["", *metrics], lines, note)
