"""Titles typed by hand become items of the catalogue; lists of both worlds become a table."""

import difflib
import re
from collections.abc import Sequence

import numpy as np

from evaluate import Lists

# Catalogues write "Matrix, The"; people type "The Matrix".
ARTICLE = re.compile(r"^(.*), (The|A|An|Le|La|Les|Der|Die|Das|Il|El)$")


def title_forms(title: str) -> set[str]:
    """The ways in which a title may be typed: with and without its year, its article in front or
    left out; in lower case."""
    bare = re.sub(r"\s*\(\d{4}\)$", "", title)
    turned, year = ARTICLE.sub(r"\2 \1", bare), title[len(bare):]
    return {form.casefold() for form in (title, bare, turned, turned + year,
                                         ARTICLE.sub(r"\1", bare))}


def find_title(text: str, titles: Sequence[str], forms: dict[str, set[int]]) -> set[int]:
    """The items that may be meant. forms: a way to type a title -> items.

    The first of these that finds something decides: the very title, the title in other case, one
    of its forms, forms that differ by small slips, forms that contain the text.
    """
    key = text.strip().casefold()
    named = forms.get(key, set())
    found = ({i for i in named if titles[i] == text}
             or {i for i in named if titles[i].casefold() == key} or named)
    if not found:
        near = difflib.get_close_matches(key, forms, n=50, cutoff=0.7)
        score = [difflib.SequenceMatcher(None, form, key).ratio() for form in near]
        # Where one form is clearly the best, the others do not count.
        found = set().union(*(forms[form] for form, s in zip(near, score) if s >= score[0] - 0.05))
    return found or set().union(*(items for form, items in forms.items() if key in form))


def resolve_titles(typed: Sequence[str], titles: Sequence[str]) -> list[int]:
    """Item ids of titles typed by hand. Prints what was taken for what, where they differ.

    Raises ValueError that lists the candidates of an ambiguous title or names an unknown one.
    """
    if not 1 <= len(typed) <= 10:
        raise ValueError(f"{len(typed)} titles; wanted 1 to 10, the newest last")
    forms: dict[str, set[int]] = {}
    for item, title in enumerate(titles):
        for form in title_forms(title):
            forms.setdefault(form, set()).add(item)
    history = []
    for text in typed:
        found = find_title(text, titles, forms)
        if not found:
            raise ValueError(f"{text!r}: no title like it among the {len(titles):,} of the "
                             "catalogue")
        if len(found) > 1:
            some = "; ".join(titles[item] for item in sorted(found)[:8])
            raise ValueError(f"{text!r}: which one? {some}{'; ...' if len(found) > 8 else ''}")
        history.append(found.pop())
        if titles[history[-1]] != text:
            print(f"{text!r} taken for {titles[history[-1]]}")
    return history


def side_by_side(titles: Sequence[str], factual: Lists, erased: Lists, length: int = 10,
                 answer: int | None = None) -> str:
    """The first titles of one history's lists in both worlds, with their probabilities.

    The answer, where it is given, is marked by *.
    """
    def cell(lists: Lists, rank: int) -> str:
        """A title with its probability, or blanks where the list has ended."""
        item = lists.items[0, rank] if rank < lists.items.shape[1] else -1
        if item < 0:
            return " " * 46
        title = titles[item] if len(titles[item]) <= 34 else titles[item][:33] + "…"
        percent = 100 * np.exp(lists.log_p[0, rank])
        return (f"{'*' if item == answer else ' '} {title:<34}"
                f"{percent:>8{'.3f' if percent >= 0.001 else '.0e'}} %")
    lines = [f"    {'factual world':<36}{'p(title)':>10}   {'erased world':<36}{'p(title)':>10}"]
    lines += [f"{rank + 1:>2}  {cell(factual, rank)}   {cell(erased, rank)}".rstrip()
              for rank in range(length)]
    if answer is not None:
        lines.append(f"* the answer: {titles[answer]}")
    return "\n".join(lines)
