"""A finished run for a live user: titles typed by hand go in, ten titles come out."""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from support.trie import ExactTitles

LONGEST = 10        # of a history, as data.make_sequences makes them

# Catalogues write "Matrix, The"; people type "The Matrix".
ARTICLE = re.compile(r"^(.*), (The|A|An|Le|La|Les|Der|Die|Das|Il|El)$")


def title_forms(title: str) -> set[str]:
    """The ways in which a title may be typed: with and without its year, its article in front or
    left out; all of them plain."""
    bare = re.sub(r"\s*\(\d{4}\)$", "", title)
    turned, year = ARTICLE.sub(r"\2 \1", bare), title[len(bare):]
    return {plain(form) for form in (title, bare, turned, turned + year,
                                     ARTICLE.sub(r"\1", bare))}


def plain(text: str) -> str:
    """Without capitals, accents and blanks around it: "Amélie " -> "amelie"."""
    letters = unicodedata.normalize("NFKD", text.strip().casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def find_title(text: str, titles: Sequence[str], forms: dict[str, set[int]]) -> set[int]:
    """The items that may be meant. forms: a way to type a title -> items.

    The first of these that finds something decides: the very title, the title but for case and
    accents, one of its forms, forms that contain the text as whole words, forms that differ by
    small slips of letters, forms that contain the text. A number is never a slip: "Alien 3" is not
    "Alien".
    """
    key, numbers = plain(text), re.compile(r"\d+")
    named = forms.get(key, set())
    words = re.compile(rf"(?<!\w){re.escape(key)}(?!\w)")
    found = ({i for i in named if titles[i] == text}
             or {i for i in named if plain(titles[i]) == key} or named
             or set().union(*(items for form, items in forms.items()
                              if key and words.search(form))))
    if not found:
        near = [form for form in difflib.get_close_matches(key, forms, n=50, cutoff=0.7)
                if numbers.findall(form) == numbers.findall(key)]
        score = [difflib.SequenceMatcher(None, form, key).ratio() for form in near]
        # Where one form is clearly the best, the others do not count.
        found = set().union(*(forms[form] for form, s in zip(near, score) if s >= score[0] - 0.05))
    return found or set().union(*(items for form, items in forms.items() if key in form))


def all_forms(titles: Sequence[str]) -> dict[str, set[int]]:
    """A way to type a title -> the items that may be meant."""
    forms: dict[str, set[int]] = {}
    for item, title in enumerate(titles):
        for form in title_forms(title):
            forms.setdefault(form, set()).add(item)
    return forms


def resolve_titles(typed: Sequence[str], titles: Sequence[str],
                   forms: dict[str, set[int]] | None = None) -> list[int]:
    """Item ids of titles typed by hand. Prints what was taken for what, where they differ.

    forms: all_forms(titles), which is worth keeping for many calls. Raises ValueError that lists
    the candidates of an ambiguous title or names an unknown one.
    """
    if not typed or isinstance(typed, str):
        raise ValueError(f"{typed!r}: wanted a list of titles, the newest last")
    forms, history = forms or all_forms(titles), []
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


@dataclass(frozen=True)
class TitleRecommender:
    """Every title of the catalogue is scored; the ten most likely ones are recommended."""

    exact: ExactTitles

    @cached_property
    def forms(self) -> dict[str, set[int]]:
        """The ways to type the catalogue's titles."""
        return all_forms(self.exact.catalogue.titles)

    def history(self, titles: Sequence[str]) -> list[int]:
        """The items of the newest ten titles, as no longer history was tuned on.

        titles: oldest first. Raises ValueError as resolve_titles does.
        """
        return resolve_titles(titles, self.exact.catalogue.titles, self.forms)[-LONGEST:]

    def __call__(self, titles: Sequence[str]) -> list[tuple[str, float]]:
        """(title, log p) of ten titles, best first, for a history of titles, oldest first."""
        ten = self.exact([self.history(titles)])
        return [(self.exact.catalogue.titles[item], log_p) for item, log_p in
                zip(ten.items[0].tolist(), ten.log_p[0].tolist()) if item >= 0]
