"""One hand for the HTML pages: a style, what is escaped, tables, and numbers set as in a book."""

import html
import re
import textwrap
from collections.abc import Iterable, Sequence

from evaluate import METRICS
from support.counting import LEGEND, columns, score_rows
from support.terminal import visible

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


class Html(str):
    """Text that is HTML already."""


def e(text) -> Html:
    """Text as HTML or SVG. It is escaped here and nowhere else; what is Html stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(visible(str(text))))


def h(template: str, *values) -> Html:
    """HTML of our own, with values in the place of each {}."""
    return Html(template.format(*map(e, values)))


def md(*cells) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(visible(str(cell)).replace("|", "\\|").replace("<", "&lt;")
                             for cell in cells) + " |"


def head(*cells) -> list[str]:
    """The first two rows of a Markdown table."""
    return [md(*cells), "|" + "---|" * len(cells)]


def typeset(cell: str) -> Html:
    """Numbers with a minus sign of their width, and without a sign where they are 0."""
    unsigned = re.sub(r"^[-+](0\.0+)$", r"\1", e(cell))
    return Html(re.sub(r"(^|[\s\[])-(?=[\d.])", r"\1−", unsigned))


def table(head: Sequence, rows: Iterable[Sequence], note: str = "") -> Html:
    """A table whose first column names things and whose others hold numbers.

    A first cell that begins with two spaces is about the row above.
    """
    def line(name, *values) -> Html:
        below = ' class="below"' if name.startswith("  ") else ""
        return h(f"<tr><th{below}>{{}}</th>{'<td>{}</td>' * len(values)}</tr>",
                 Html(e(name).strip()), *map(typeset, values))
    top = h(f"<thead><tr>{'<th>{}</th>' * len(head)}</tr></thead>", *head) if any(head) else ""
    return h('<div class="table"><table>{}<tbody>{}</tbody></table></div>{}', top,
             Html("".join(line(*row) for row in rows)),
             h('<p class="note">{}</p>', note) if note else "")


# ----------------------------------------------------------------------------------------------
# What is said as text and as HTML: lines, and tables as (title, head, rows) or with a note, too

Part = str | tuple


def scores(title: str, rows: dict[str, dict]) -> Part:
    """The table of some rows' scores."""
    lines = score_rows(rows)
    return title, ["", *METRICS], lines, LEGEND if "–" in str(lines) else ""


def as_text(parts: Iterable[Part]) -> str:
    """Lines and tables below one another."""
    lines = []
    for part in parts:
        title, *of_table = (part,) if isinstance(part, str) else part
        lines += ["", title, columns(*of_table[:2])] if of_table else [title]
        lines += [textwrap.fill(note, 100) for note in of_table[2:] if note]
    return "\n".join(lines)


def as_html(parts: Iterable[Part]) -> Html:
    """The same as HTML."""
    return Html("\n".join(h("<p>{}</p>", typeset(part)) if isinstance(part, str) else
                          h("<h3>{}</h3>\n{}", part[0], table(*part[1:])) for part in parts))
