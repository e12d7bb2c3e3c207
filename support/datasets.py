"""This file reads the raw data and prepares them as §5.1.1 of the paper says.

It knows MovieLens, Steam and LastFM as they were published, and it reads a folder of the user's
own. The result is the `Interactions` from which data.py makes sequences and prompts. Ratings, tags
and playing times are left aside, because the paper uses only who took which item at what time.

The file goes from the line to the data set: how a line is split, which data sets there are, how
their files are fetched, and how they are read. `prepare` stands at the end. It drops and draws
rows as the paper does, and counts each of its steps.
"""

import ast
import csv
import gzip
import hashlib
import re
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http.client import HTTPException
from operator import itemgetter, methodcaller
from pathlib import Path

import numpy as np
import torch.hub
from tqdm import tqdm

from data import Interactions
from support.files import write_whole

LATEST = 4_102_444_800          # 2100-01-01; a later timestamp is in other units than seconds
LONGEST_LINE = 2**24            # bytes; no format has a line nearly as long
PLACES = 10**7                  # timestamps up to here, April 1970, only say what came first


# ----------------------------------------------------------------------------------------------
# The fields of a line

by_tabs, by_bars, by_colons = (methodcaller("split", mark) for mark in ("\t", "|", "::"))


def csv_fields(text: str) -> list[str]:
    """The fields of a line of CSV. It is read alone, so that a stray quote spoils only one line."""
    return next(csv.reader([text], strict=True)) if '"' in text else text.split(",")


def literal(text: str) -> dict:
    """The dict that a line of Python source spells out. Nothing in the line is ever run."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text[:40]!r} is not a Python dict literal")
    return value


def steam_review(text: str) -> list[str]:
    """Who reviewed which game when. McAuley's files have a Python literal, not JSON, a line."""
    review = literal(text)
    return [review["username"], review["product_id"], review["date"]]


def steam_game(text: str) -> list[str]:
    """The id and the title of a game, either of which a few of the games lack."""
    game = literal(text)
    return [game.get("id") or "", game.get("title") or game.get("app_name") or ""]


# ----------------------------------------------------------------------------------------------
# Where the data sets are, and how they look


@dataclass(frozen=True)
class Download:
    """A file to fetch. Where the publisher gives no sha256, the archive's own checks must do."""

    address: str
    size: str                   # for the messages that people read
    sha256: str | None = None


@dataclass(frozen=True)
class Table:
    """A text file with one row a line."""

    name: str
    split: Callable[[str], list[str]] = csv_fields
    header: tuple[str, ...] = ()        # the columns' names, unless the file's first line has them
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Format:
    """A data set: two files in the folder data_dir/folder, each of them plain or gzipped.

    In a strict data set every id is a whole number, and an item that is not listed, or listed
    without a title, is an error. In the others such items are dropped and counted.
    """

    folder: str
    tables: tuple[Table, Table]             # the interactions and the items
    downloads: tuple[Download, ...] = ()
    domain: str = "items"                   # a key of data.DOMAINS
    most_bytes: int = 50_000_000_000        # a file that unpacks to more is not of this format
    strict: bool = False
    time: tuple[str, ...] = ("time",)       # the column, or columns, that say when


RATING = "user", "item", "rating", "time"
GROUPLENS, STEAM = "https://files.grouplens.org/datasets/", "http://cseweb.ucsd.edu/~wckang/"
FORMATS = {
    "movielens": Format(
        "ml-1m", (Table("ratings.dat", by_colons, RATING, "latin-1"),
                  Table("movies.dat", by_colons, ("item", "title", "genres"), "latin-1")),
        (Download(GROUPLENS + "movielens/ml-1m.zip", "5.9 MB",
                  "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),),
        "movies", 100_000_000, strict=True),
    "ml-100k": Format(
        "ml-100k", (Table("u.data", by_tabs, RATING, "latin-1"),
                    Table("u.item", by_bars, ("item", "title", *[""] * 22), "latin-1")),
        (Download(GROUPLENS + "movielens/ml-100k.zip", "4.9 MB",
                  "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),),
        "movies", 10_000_000, strict=True),
    "ml-latest-small": Format(
        "ml-latest-small", (Table("ratings.csv"), Table("movies.csv")),
        (Download(GROUPLENS + "movielens/ml-latest-small.zip", "1 MB"),),
        "movies", 20_000_000, strict=True),
    "steam": Format(
        "steam-mcauley", (Table("steam_reviews.json", steam_review, ("user", "item", "time")),
                          Table("steam_games.json", steam_game, ("item", "title"))),
        (Download(STEAM + "steam_reviews.json.gz", "1.3 GB"),
         Download(STEAM + "steam_games.json.gz", "2.7 MB")), "games"),
    "lastfm": Format(
        "lastfm-hetrec", (Table("user_taggedartists.dat", by_tabs), Table("artists.dat", by_tabs)),
        (Download(GROUPLENS + "hetrec2011/hetrec2011-lastfm-2k.zip", "2.6 MB",
                  "6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c"),),
        "artists", 50_000_000, time=("year", "month", "day")),
}
FORMATS["ml-1m"] = FORMATS["movielens"]

TABLE_2 = {     # what the paper's Table 2 says; the README tells which counts can be reached
    "movielens": {"sequences": 192_483, "items": 3_952, "interactions": 999_611},
    "steam": {"items": 3_581},
    "lastfm": {"sequences": 46_897, "items": 4_606, "interactions": 73_510},
}
TABLE_2["ml-1m"] = TABLE_2["movielens"]


def present(folder: Path, file: str) -> Path | None:
    """The path of a file that is there, plain or gzipped."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def own_format(folder: Path) -> Format:
    """The format of a folder of the user's own.

    It holds interactions.csv and items.csv, or RecBole's NAME.inter and NAME.item. The columns may
    stand in any order, and others may stand between them. Raises FileNotFoundError if the folder
    holds neither pair whole, or more than one.
    """
    pairs = [Table("interactions.csv"), Table("items.csv")], *(
        [Table(path.name, by_tabs), Table(path.with_suffix(".item").name, by_tabs)]
        for path in folder.glob("*.inter"))
    whole = [pair for pair in pairs if all(present(folder, table.name) for table in pair)]
    if len(whole) != 1:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise FileNotFoundError(
            f"{folder}: wanted interactions.csv (user,item,timestamp) and items.csv (item,title), "
            f"or one RecBole NAME.inter and NAME.item; found {found}")
    return Format(str(folder), tuple(whole[0]))


# ----------------------------------------------------------------------------------------------
# Fetching: a file is there whole, or it is not there


def unpack(archive: Path, folder: Path, files: list[str], most_bytes: int) -> None:
    """Take the named files out of a zip archive, wherever in it they are, and put them in `folder`.

    A file appears under its name only when it is whole, and the archive has no say in where files
    go. Raises ValueError for a damaged archive, and, before anything is written, for one that lacks
    a file or in which a file has more than most_bytes.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            entries = {entry.filename.rpartition("/")[2]: entry for entry in packed.infolist()}
            for name in files:
                if name not in entries:
                    raise ValueError(f"{archive}: holds no {name}. Is it the right archive?")
                if (size := entries[name].file_size) > most_bytes:
                    raise ValueError(f"{archive}: {name} declares {size:,} bytes, but at most "
                                     f"{most_bytes:,} are expected; not unpacked")
            folder.mkdir(parents=True, exist_ok=True)
            for name in files:
                write_whole(folder / name, packed.read(entries[name]))
    # RuntimeError means an encrypted entry, NotImplementedError an unknown way of packing.
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive}: damaged zip archive ({error}). Remove it and run again") \
            from None


def find_files(name: str, data_dir: Path) -> tuple[Path, Path]:
    """The interactions and the items of a public data set, which are fetched if they are missing.

    An archive that the user has saved by hand is taken as well, if it is the published one. Raises
    FileNotFoundError, which says what to save where, if a file cannot be fetched.
    """
    form, folder = FORMATS[name], data_dir / FORMATS[name].folder
    files = [table.name for table in form.tables]
    for source in form.downloads:
        file = source.address.rpartition("/")[2]
        packed = file.endswith(".zip")          # the others are single files, used as they come
        path = data_dir / file if packed else folder / file
        needed = files if packed else [file.removesuffix(".gz")]
        if all(present(folder, file) for file in needed):
            continue
        if not path.is_file():
            # It is written under another name until it is whole. A wrong sha256: RuntimeError.
            print(f"fetching {source.address} ({source.size}) to {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(source.address, str(path), source.sha256)
            except (OSError, HTTPException, RuntimeError) as error:
                raise FileNotFoundError(
                    f"{folder / needed[0]}: not found (nor {needed[0]}.gz), and fetching "
                    f"{source.address} failed ({str(error).strip()}). Save it ({source.size}) as "
                    f"{path}, or pass --data-dir; --data synthetic needs nothing") from None
        elif source.sha256:
            with open(path, "rb") as archive:
                found = hashlib.file_digest(archive, "sha256").hexdigest()
            if found != source.sha256:
                raise ValueError(f"{path}: its sha256 is {found}, the published one is "
                                 f"{source.sha256}. Remove the file and run again")
        if packed:
            unpack(path, folder, needed, form.most_bytes)
    return tuple(present(folder, file) for file in files)


# ----------------------------------------------------------------------------------------------
# Columns, found by their names

# The names are compared without capitals, blanks and underscores; see plain_name. A name belongs
# here if people use it and it can mean nothing else: "id" may be a row's own number.
THINGS = ("item", "movie", "product", "artist", "game", "app", "book", "track", "song", "video")
COLUMNS = {
    "user": ("user", "userid", "uid", "reviewerid"),
    "item": (*THINGS, *(f"{thing}id" for thing in THINGS), "iid", "asin", "isbn"),
    "time": ("time", "timestamp", "unixtime", "unixreviewtime", "date", "datetime", "ratedat",
             "createdat"),
    "title": ("title", "name", *(thing + word for thing in THINGS for word in ("title", "name"))),
    "year": ("year",), "month": ("month",), "day": ("day",),
}
COLUMNS["id"] = (*COLUMNS["item"], "id")        # in the item file it can only be the item's


def plain_name(name: str) -> str:
    """A column's name in small letters and digits only: "User ID" and "user_id:token" -> "userid".

    RecBole's headers have a type after the colon.
    """
    return re.sub(r"[\W_]+", "", name.partition(":")[0]).lower()


def find_columns(names: list[str], roles: tuple[str, ...]) -> Callable:
    """A function from the fields of a row to those of the roles, found by the columns' names.

    Raises ValueError, which names the accepted ones, if no column or more than one fits a role. A
    guess between two columns could go wrong without anybody noticing.
    """
    columns = []
    for role in roles:
        found = [column for column, name in enumerate(names) if plain_name(name) in COLUMNS[role]]
        if len(found) != 1:
            raise ValueError(
                f"the header has {'more than one' if found else 'no'} column for the {role}; its "
                f"columns are {', '.join(names)[:400]}. Call one of them "
                f"{' or '.join(COLUMNS[role])}; capitals, blanks and underscores do not matter")
        columns += found
    return itemgetter(*columns)


def seconds(text: str) -> int:
    """Seconds since 1970 of an integer, a float or an ISO date (UTC unless it says otherwise)."""
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        try:
            date = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"timestamp {text[:40]!r}; wanted seconds since 1970 or an ISO date") \
                from None
        value = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not 0 <= value < LATEST:
        hint = ", milliseconds?" if LATEST <= value < 1000 * LATEST else ""
        raise ValueError(f"timestamp {text[:40]!r} is not between 1970 and 2100 (seconds{hint})")
    return int(value)


# ----------------------------------------------------------------------------------------------
# Reading: a fault stops with its file and line, or it is counted


class Reader:
    """Collects the items and the interactions of one data set, and keeps account of what it drops.

    The items must be read first, because an interaction refers to an item by its id. Numbers are
    kept in one array of 64-bit integers: a list of Python's would take several times the memory.
    """

    def __init__(self, form: Format, skip_bad_lines: bool = False):
        self.form, self.skip_bad_lines = form, skip_bad_lines
        self.checksums: dict[str, str] = {}
        self.dropped: Counter[str] = Counter()          # the reason -> how many
        self.titles: list[str] = []
        self.index: dict[int | str, int] = {}           # an item's own id -> its place in titles
        self.people: dict[str, int] = {}                # a user's name -> the user's number
        self.rows = array("q")                          # user, item, time; user, item, time; ...

    def lines(self, path: Path) -> Iterator[bytes]:
        """The lines of a file, as a stream, because Steam's reviews are larger than most memories.

        Raises ValueError for a damaged gzip file and for one of absurd size. A few kilobytes of
        gzip can unpack to terabytes, so both bounds are checked while the file is read.
        """
        digest, rest, size, packed = hashlib.sha256(), b"", 0, path.stat().st_size
        try:
            with open(path, "rb") as plain, tqdm.wrapattr(
                    plain, "read", packed, desc=path.name, leave=False,
                    disable=True if packed < 50_000_000 else None) as raw:
                file = gzip.open(raw) if path.suffix == ".gz" else raw
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    size += len(chunk)
                    *whole, rest = (rest + chunk).split(b"\n")     # rest: a line cut in two
                    if len(rest) > LONGEST_LINE or size > self.form.most_bytes:
                        raise ValueError(
                            f"{path}: more than {LONGEST_LINE:,} bytes in a line or "
                            f"{self.form.most_bytes:,} in all; this is not a file of this format")
                    yield from whole
                if rest:
                    yield rest
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}). Remove it and fetch it again") \
                from None
        self.checksums[path.name.removesuffix(".gz")] = digest.hexdigest()

    def read(self, path: Path, table: Table, roles: tuple[str, ...], store: Callable) -> None:
        """Read a file, and call store(...) with the fields of the given roles for every line.

        A line that cannot be split or stored is a bad one: it stops the reading, or is counted if
        the user asked for that. A header that is not understood stops the reading in any case.
        """
        names, rows = table.header, 0
        choose = names and find_columns(names, roles)
        for number, line in enumerate(self.lines(path), 1):
            try:
                fields = table.split(line.decode(table.encoding).rstrip("\r"))
                if not choose:
                    names, choose = fields, find_columns(fields, roles)
                    continue
                rows += 1
                if len(fields) != len(names):
                    raise ValueError(f"{len(fields)} fields, expected {len(names)}")
                store(*choose(fields))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                    csv.Error) as error:
                if not choose or not self.skip_bad_lines:
                    what = f"has no {error}" if isinstance(error, KeyError) else error
                    advice = "Repair or remove the line, or pass --skip-bad-lines"
                    raise ValueError(f"{path}, line {number}: {what}. "
                                     f"{advice if choose else 'Repair the header'}") from None
                self.dropped[f"bad lines of {path.name}"] += 1
        if not rows:
            raise ValueError(f"{path}: holds no rows. Fetch it again")

    def add_item(self, item: str, title: str) -> None:
        """Enter an item. Raises ValueError for a title or an id that cannot be right."""
        strict, title = self.form.strict, title.strip()
        key = int(item) if strict else item
        if not (item and title) and not strict:
            self.dropped["items without an id or a title"] += 1
        elif not title or "\n" in title or "\r" in title:
            raise ValueError(f"title {title[:40]!r} is empty or has a line break")
        elif key not in self.index:
            self.index[key] = len(self.titles)
            self.titles.append(title)
        elif self.titles[self.index[key]] == title:
            self.dropped["items listed again"] += 1
        else:
            raise ValueError(f"item {item} is listed twice, with different titles")

    def add_row(self, user: str, item: str, *time: str) -> None:
        """Enter an interaction, whose time is one text, or a year, a month and a day."""
        if len(time) == 1:
            timestamp = seconds(time[0])
        else:           # LastFM has five dates before 1970; `prepare` drops them where dates matter
            timestamp = int(datetime(*map(int, time), tzinfo=UTC).timestamp())
        strict = self.form.strict
        place = self.index.get(int(item) if strict else item)
        if place is not None:       # users whose ids may be any text are numbered as they come
            number = int(user) if strict else self.people.setdefault(user, len(self.people))
            self.rows.extend((number, place, timestamp))
        elif strict:
            raise ValueError(f"unknown item {item}, not in {self.form.tables[1].name}")
        else:
            self.dropped["interactions with items that have no title"] += 1

    def interactions(self, domain: str | None) -> Interactions:
        """Everything that was entered."""
        if not self.rows:
            raise ValueError("no interaction has an item of the catalogue. Do the item file and "
                             "the interactions belong together?")
        columns = np.frombuffer(self.rows, dtype=np.int64).reshape(-1, 3).T.copy()
        steps = tuple(f"{count:,} {reason} dropped" for reason, count in self.dropped.items())
        return Interactions(*columns, unique_titles(self.titles), domain or self.form.domain,
                            self.checksums, steps)


def unique_titles(titles: list[str]) -> list[str]:
    """Give the second, third ... item of the same title the suffix " [2]", " [3]" ...

    Grounding compares titles, so two items with one title could not be told apart.
    """
    taken, seen, unique = set(titles), Counter(), []
    for title in titles:
        seen[title] += 1
        new, count = title, seen[title]
        while count > 1 and (new == title or new in taken):
            new, count = f"{title} [{count}]", count + 1
        taken.add(new)
        unique.append(new)
    return unique


def load_interactions(name: str, data_dir: str | Path = "data", skip_bad_lines: bool = False,
                      domain: str | None = None) -> Interactions:
    """Read a public data set, which is fetched to data_dir if need be, or a folder of one's own.

    All raw rows whose item has a title are there; nothing else is filtered. A bad line stops the
    reading, or is counted with skip_bad_lines. Raises FileNotFoundError, which says what to
    download and where to save it, or ValueError, which gives the file and the line.
    """
    if name in FORMATS:
        form, paths = FORMATS[name], find_files(name, Path(data_dir))
    elif Path(name).is_dir():
        form = own_format(Path(name))
        paths = [present(Path(name), table.name) for table in form.tables]
    else:
        raise ValueError(f"unknown data set {name!r}; known are synthetic, {', '.join(FORMATS)}, "
                         "or a folder with interactions.csv and items.csv")
    reader = Reader(form, skip_bad_lines)
    reader.read(paths[1], form.tables[1], ("id", "title"), reader.add_item)
    reader.read(paths[0], form.tables[0], ("user", "item", *form.time), reader.add_row)
    x = reader.interactions(domain)
    return replace(x, dated=name in FORMATS or bool(x.timestamps.max() > PLACES))


# ----------------------------------------------------------------------------------------------
# The paper's preparation (§5.1.1)

SAMPLE = {"movielens": 0.1, "ml-1m": 0.1, "steam": 1 / 3}      # the paper's text; all others: 1


def counts(interactions: Interactions) -> dict[str, int]:
    """How many rows there are, and how many users and items occur in them."""
    return {"interactions": len(interactions.users),
            "users": len(np.unique(interactions.users)),
            "items": len(np.unique(interactions.items))}


def keep(interactions: Interactions, rows: np.ndarray, step: str,
         all_items: bool = False) -> Interactions:
    """Keep the given rows (a mask) and the items that still occur, and note the step's counts.

    With all_items, items that nobody took stay in the catalogue.
    """
    x = replace(interactions, users=interactions.users[rows], items=interactions.items[rows],
                timestamps=interactions.timestamps[rows])
    if not len(x.users):
        raise ValueError(f"nothing is left after the step {step!r}; use more data or a larger "
                         "--sample")
    if not all_items:
        items, renumbered = np.unique(x.items, return_inverse=True)
        x = replace(x, items=renumbered, titles=[x.titles[i] for i in items])
    left = ", ".join(f"{count:,} {what}" for what, count in counts(x).items())
    return replace(x, steps=(*x.steps, f"{step}: {left}"))


def first_of_each_pair(x: Interactions) -> Interactions:
    """Of a user's interactions with the same item, keep the earliest (on a tie, the first row)."""
    users = np.unique(x.users, return_inverse=True)[1]
    pairs = users * len(x.titles) + x.items
    by_time = np.argsort(x.timestamps, kind="stable")
    kept = np.zeros(len(pairs), dtype=bool)
    kept[by_time[np.unique(pairs[by_time], return_index=True)[1]]] = True
    return x if kept.all() else keep(x, kept, "first of each user and item", all_items=True)


def at_least(ids: np.ndarray, least: int) -> np.ndarray:
    """The mask of the rows whose id has at least `least` rows."""
    _, which, rows = np.unique(ids, return_inverse=True, return_counts=True)
    return rows[which] >= least


def core(x: Interactions, least: int) -> Interactions:
    """The k-core: drop users and items with fewer than `least` interactions until none is left."""
    while True:
        kept = at_least(x.items, least) & at_least(x.users, least)
        if kept.all():
            return keep(x, kept, f"{least}-core")
        x = replace(keep(x, kept, f"{least}-core"), steps=x.steps)


def sample_of(ids: np.ndarray, share: float, rng: np.random.Generator,
              by_rows: bool = False) -> np.ndarray:
    """The mask of all rows of some ids, drawn at random.

    The ids are as many as have at most that share of all ids, or with by_rows of all rows.
    """
    kinds, which, rows = np.unique(ids, return_inverse=True, return_counts=True)
    order = rng.permutation(len(kinds))
    weight = rows[order] if by_rows else np.ones(len(kinds))
    taken = order[:max(1, int(np.searchsorted(weight.cumsum(), share * weight.sum() + 1e-9,
                                              side="right")))]
    return np.isin(which, taken)


def check_preparation(name: str, share: float, chronological: bool) -> None:
    """Raise ValueError for what `prepare` cannot do; a caller may ask before minutes of reading."""
    if not 0 < share <= 1:
        raise ValueError(f"--sample is {share}; wanted a share above 0, at most 1")
    if chronological and name != "lastfm":
        raise ValueError("--chronological goes with --data lastfm; other data are in order of time")


def in_file_order(x: Interactions) -> Interactions:
    """Replace each time by the row's place among the rows of its user: 0, 1, 2 ..."""
    order = np.argsort(x.users, kind="stable")
    owner, place = x.users[order], np.empty_like(order)
    place[order] = np.arange(len(order)) - np.searchsorted(owner, owner)
    return replace(x, timestamps=place, dated=False)


def prepare(interactions: Interactions, name: str, sample: float | None = None, seed: int = 0,
            chronological: bool = False) -> Interactions:
    """Take the steps of §5.1.1 for a data set and count each in `steps` (README: D4, D9, D14).

    In every data set, of repeated interactions of a user with an item only the first stays. Then:

    - movielens: the 5-core is taken, and users are drawn until they have `sample` of the rows;
    - steam: users with 20 games or more stay, and `sample` of the users and of the games is drawn;
    - lastfm: artists with 4 users stay, then users with 4 artists. Their order is that of the file,
      which is not one of time; with `chronological` it is that of the dates;
    - all others: users are drawn as for movielens if `sample` is below 1.
    """
    share = SAMPLE.get(name, 1.0) if sample is None else sample
    check_preparation(name, share, chronological)
    rng, x = np.random.default_rng([seed, 5]), interactions
    if chronological:
        possible = x.timestamps >= datetime(2002, 1, 1, tzinfo=UTC).timestamp()
        x = keep(x, possible, "dates that can be, 2002 or later")
    elif name == "lastfm":
        x = in_file_order(x)
    x = first_of_each_pair(x)
    if name == "lastfm":
        x = keep(x, at_least(x.items, 4), "artists with 4 users or more")
        x = keep(x, at_least(x.users, 4), "users with 4 artists or more")
        if not chronological:       # rows were dropped: count the places again, without gaps
            x = replace(in_file_order(x), steps=(
                *x.steps, "order by artist number, as the field uses it, not by time (D9); "
                          "--chronological takes dates"))
    if name in ("movielens", "ml-1m"):
        x = core(x, 5)
    if name == "steam":
        x = keep(x, at_least(x.users, 20), "users with 20 games or more")
    if share < 1 and name == "steam":
        x = keep(x, sample_of(x.users, share, rng), f"{share:.3g} of the users, drawn")
        x = keep(x, sample_of(x.items, share, rng), f"{share:.3g} of the games, drawn")
    elif share < 1:
        x = keep(x, sample_of(x.users, share, rng, by_rows=True),
                 f"users drawn to have {share:.3g} of the interactions")
    return x
