"""This file reads the raw data and prepares them as §5.1.1 of the paper says.

It knows MovieLens, Steam and LastFM as they were published, and it reads a folder of the user's
own. The result is the `Interactions` from which data.py makes sequences and prompts. Ratings, tags
and playing times are left aside, because the paper uses only who took which item at what time.

The file goes from the line to the data set: how a line is split, which data sets there are, how
their files are fetched, what ids and times mean, and how files are read. `prepare` stands at the
end. It drops and draws rows as the paper does. Whatever is dropped or changed is counted.
"""

import ast
import codecs
import csv
import gzip
import hashlib
import io
import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from http.client import HTTPException
from operator import itemgetter, methodcaller
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from data import Interactions
from support.files import write_whole

LONGEST_LINE = 2**24            # bytes; no format has a line nearly as long
SILENCE = 60                    # seconds that a server may say nothing while a file is fetched
csv.field_size_limit(LONGEST_LINE)      # reviews are longer than the 128 kB that csv expects


# ----------------------------------------------------------------------------------------------
# The fields of a line. Each of these makes an iterator over rows from one over lines

by_commas = partial(csv.reader, strict=True, skipinitialspace=True)
by_tabs, by_bars = (partial(csv.reader, delimiter=mark, quoting=csv.QUOTE_NONE) for mark in "\t|")
by_colons = partial(map, methodcaller("split", "::"))
MARKS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def separated(fields: list[str]) -> str:
    """What to say of a line that was not split, if it looks as if another mark splits it."""
    found = [name for mark, name in MARKS.items() if len(fields) == 1 and mark in fields[0]]
    return (f" (it seems to be separated by {found[0]}; wanted commas in CSV, tabs in RecBole's "
            "files)" if found else "")


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
    return [review.get(key) or "" for key in ("username", "product_id", "date")]


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
    """A text file with one row a line, or in CSV a few lines where a quoted field breaks."""

    name: str
    split: Callable[[Iterator[str]], Iterator[list[str]]] = by_commas
    header: tuple[str, ...] = ()        # the columns' names, unless the file's first line has them
    encoding: str = "utf-8"             # a mark at the beginning is no part of a column's name


@dataclass(frozen=True)
class Format:
    """A data set: two files in the folder data_dir/folder, each of them plain or gzipped."""

    folder: str
    tables: tuple[Table, Table]             # the interactions and the items
    downloads: tuple[Download, ...] = ()    # none: a folder of the user's own
    domain: str = "items"                   # a key of data.DOMAINS
    most_bytes: int = 50_000_000_000        # a file that unpacks to more is not of this format
    numbered: bool = False                  # is each id a whole number, which a user keeps?
    time: tuple[str, ...] = ("time",)       # the column, or columns, that say when


RATING = "user", "item", "rating", "time"
GROUPLENS, STEAM = "https://files.grouplens.org/datasets/", "http://cseweb.ucsd.edu/~wckang/"
FORMATS = {
    "movielens": Format(
        "ml-1m", (Table("ratings.dat", by_colons, RATING, "latin-1"),
                  Table("movies.dat", by_colons, ("item", "title", "genres"), "latin-1")),
        (Download(GROUPLENS + "movielens/ml-1m.zip", "5.9 MB",
                  "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),),
        "movies", 100_000_000, numbered=True),
    "ml-100k": Format(
        "ml-100k", (Table("u.data", by_tabs, RATING, "latin-1"),
                    Table("u.item", by_bars, ("item", "title", *[""] * 22), "latin-1")),
        (Download(GROUPLENS + "movielens/ml-100k.zip", "4.9 MB",
                  "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),),
        "movies", 10_000_000, numbered=True),
    **{name: Format(
        name, (Table("ratings.csv"), Table("movies.csv")),
        (Download(f"{GROUPLENS}movielens/{name}.zip", size),),
        "movies", 5_000_000_000, numbered=True)
       for name, size in (("ml-latest-small", "1 MB"), ("ml-20m", "190 MB"), ("ml-25m", "250 MB"),
                          ("ml-32m", "239 MB"))},
    "steam": Format(
        "steam-mcauley", (Table("steam_reviews.json", partial(map, steam_review),
                                ("user", "item", "time")),
                          Table("steam_games.json", partial(map, steam_game), ("item", "title"))),
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

    It holds interactions.csv and items.csv, or ratings.csv and movies.csv as MovieLens has them, or
    RecBole's NAME.inter and NAME.item. The columns may stand in any order, and others may stand
    between them. Raises FileNotFoundError if the folder holds no such pair, or more than one.
    """
    pairs = [(Table("interactions.csv"), Table("items.csv")),
             (Table("ratings.csv"), Table("movies.csv")), *(
        (Table(name, by_tabs), Table(name.removesuffix("inter") + "item", by_tabs))
        for name in sorted({path.name.removesuffix(".gz") for path in folder.iterdir()})
        if name.endswith(".inter"))]
    whole = [pair for pair in pairs if all(present(folder, table.name) for table in pair)]
    if len(whole) != 1:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise FileNotFoundError(
            f"{folder}: wanted interactions.csv (user,item,timestamp) and items.csv (item,title), "
            "or one of MovieLens' pairs ratings.csv and movies.csv, or of RecBole's pairs "
            f"NAME.inter and NAME.item; found {found}")
    return Format(str(folder), whole[0], domain="movies" if whole[0] == pairs[1] else "items")


# ----------------------------------------------------------------------------------------------
# Fetching: a file is there whole, or it is not there


def check_file(path: Path, source: Download, shown: Path) -> None:
    """Raise ValueError if a fetched file is a web page, or not the one that was published."""
    with open(path, "rb") as file:
        start = file.read(1_000).lstrip()[:60].decode(errors="replace")
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if start.startswith("<") or source.sha256 not in (None, found):
        what = f"is a web page, {start!r}" if start.startswith("<") else f"has the sha256 {found}"
        raise ValueError(f"{shown}: {what}; it is not what {source.address} published (sha256 "
                         f"{source.sha256 or 'not given'}). Remove it and run again")


def fetch(source: Download, path: Path) -> None:
    """Fetch a file, which gets its name when it is whole and checked.

    Raises OSError, HTTPException or ValueError for a server that is silent, breaks off, or sends
    something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    request = Request(source.address, headers={"User-Agent": "cetrec"})
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        with urlopen(request, timeout=SILENCE) as answer, open(part, "wb") as file:
            size = answer.length        # None where the server does not say
            with tqdm.wrapattr(file, "write", size, desc=path.name, leave=False,
                               disable=None) as watched:
                shutil.copyfileobj(answer, watched)
            if size not in (None, file.tell()):
                raise ConnectionError(f"{file.tell():,} of {size:,} bytes arrived")
        check_file(part, source, path)
        os.replace(part, path)


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
            print(f"fetching {source.address} ({source.size}) to {path}")
            try:
                fetch(source, path)
            except (OSError, HTTPException, ValueError) as error:
                raise FileNotFoundError(
                    f"{folder / needed[0]}: not found (nor {needed[0]}.gz), and fetching "
                    f"{source.address} failed ({str(error).strip()}). Save it ({source.size}) as "
                    f"{path}, or pass --data-dir; --data synthetic needs nothing") from None
        else:
            check_file(path, source, path)
        if packed:
            unpack(path, folder, needed, form.most_bytes)
    return tuple(present(folder, file) for file in files)


# ----------------------------------------------------------------------------------------------
# Columns, found by their names

# The names are compared without capitals, blanks and underscores; see plain_name. A name belongs
# here if people use it and it can mean nothing else: "id" may be a row's own number.
THINGS = ("item", "movie", "product", "artist", "game", "app", "book", "track", "song", "video",
          "business", "recipe", "news", "article", "anime", "course", "podcast")
COLUMNS = {
    "user": ("user", "userid", "uid", "reviewerid", "visitorid", "customerid", "memberid"),
    "item": (*THINGS, *(f"{thing}id" for thing in THINGS), "iid", "parentasin", "asin", "isbn"),
    "time": ("time", "timestamp", "unixtime", "unixtimestamp", "unixreviewtime", "date", "datetime",
             "eventtime", "eventtimestamp", "ratedat", "createdat", "ts"),
    "title": ("title", "name", *(thing + word for thing in THINGS for word in ("title", "name"))),
    "year": ("year",), "month": ("month",), "day": ("day",),
}
COLUMNS["id"] = (*COLUMNS["item"], "id")        # in the item file it can only be the item's

# Where a file has both, the first one counts. Amazon sells variants (asin) of a product
# (parent_asin), and lists products only; RecBole's Steam has a game's name twice.
PREFERRED = {"parentasin": "asin", "title": "appname"}


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
    plain, columns = [plain_name(name) for name in names], []
    passed_over = {PREFERRED[name] for name in plain if name in PREFERRED}
    for role in roles:
        found = [column for column, name in enumerate(plain)
                 if name in COLUMNS[role] and name not in passed_over]
        if len(found) > 1:
            raise ValueError(
                f"the header has more than one column for the {role}: "
                f"{', '.join(names[column] for column in found)[:400]}. Give another name to all "
                "of them but the one that counts" + (
                    ", which holds the same ids in both files" if role in ("item", "id") else ""))
        if not found:
            raise ValueError(
                f"the header has no column for the {role}; its columns are "
                f"{', '.join(names)[:400]}{separated(names)}. Wanted in the first line is a name "
                f"such as {', '.join(COLUMNS[role][:4])} (docs/data.md has all); capitals, blanks "
                "and underscores do not matter")
        columns += found
    return itemgetter(*columns)


# ----------------------------------------------------------------------------------------------
# Ids and times

# What pandas and R write for a value that is missing. In published files it is a name like others.
MISSING = {"", "nan", "NaN", "None", "null", "NULL", "<NA>", "NA", "N/A", "n/a", "NaT"}

# Unix times count seconds, milliseconds, microseconds or nanoseconds. The median of a column says
# which, if it is between 1995 and May 2033. Small numbers, which may be places, years, or times
# that were scaled, only say what came first.
UNITS = 1, 10**3, 10**6, 10**9
WANTED = "Unix time, or dates as 2020-09-13 or 2020-09-13T12:26:40+00:00"
FIRST, LAST, PLACES = 788_918_400, 2_000_000_000, 10_000_000


def plain_text(text: str) -> str:
    """A text in one line without blanks around it. Raises ValueError for bytes that are no text."""
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{text[:40]!r} is not encoded as UTF-8; save the file as UTF-8")
    return " ".join(text.splitlines()).strip()


class Ids(dict):
    """The number of each id, in the order in which ids appear, or -1 for one that is missing.

    In people's own files "12", " 12" and "12.0" are one id, because pandas writes whole numbers as
    fractions where others of the column are missing.
    """

    def __init__(self, form: Format):
        super().__init__()
        self.own, self.numbered = not form.downloads, form.numbered
        self.missing = MISSING if self.own else {""}
        self.names: list[str] = []          # the id of each number

    def __missing__(self, text: str) -> int:
        name = re.sub(r"^(\d+)\.0*$", r"\1", plain_text(text)) if self.own else text
        if name != text:
            number = self[name]
        elif name in self.missing:
            number = -1
        elif self.numbered and not (name.isdecimal() and len(name) < 19):
            raise ValueError(f"id {name[:40]!r}; wanted a whole number")
        else:
            number = len(self.names)
            self.names.append(name)
        self[text] = number
        return number


@lru_cache(100_000)
def nanoseconds(text: str) -> int:
    """Nanoseconds since 1970 of an ISO date, which is in UTC if it names no time zone."""
    text, digits = re.sub(r" ?(UTC|GMT)$", "+00:00", text), "0"
    if fraction := re.search(r"(\d\d:?\d\d:?\d\d)[.,](\d{1,9})", text):     # datetime keeps six
        text, digits = text.replace(fraction[0], fraction[1]), fraction[2]
    found = datetime.fromisoformat(text)
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    return int(found.timestamp()) * 10**9 + int(digits.ljust(9, "0"))


def moment(text: str) -> float:
    """What a time says: a number as it is, of a date the nanoseconds since 1970."""
    text = text.strip()
    try:
        value = int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        try:
            value = nanoseconds(text)
        except ValueError:
            value = math.nan
    if not abs(value) < 2**62:
        raise ValueError(f"timestamp {text[:40]!r}; wanted {WANTED}")
    return value


# ----------------------------------------------------------------------------------------------
# Reading: a fault stops with its file and line, or it is counted

WITHOUT, UNTITLED = (f"interactions {what}" for what in (
    "without a user or an item", "with items that have no title"))
FAULTS = ValueError, TypeError, AttributeError, csv.Error       # of a line


class Reader:
    """Collects the items and the interactions of one data set, and keeps account of what it drops.

    The items must be read first: ids that come later have no title. Numbers are kept in arrays of
    64 bits each: lists of Python's would take several times the memory.
    """

    def __init__(self, form: Format, skip_bad_lines: bool = False):
        self.form, self.skip_bad_lines = form, skip_bad_lines
        self.checksums: dict[str, str] = {}
        self.dropped: Counter[str] = Counter()          # the reason -> how many
        self.titles: list[str] = []
        self.item_ids, self.user_ids, self.other_users = Ids(form), Ids(form), Ids(form)
        self.users, self.items, self.times = array("q"), array("q"), array("q")
        self.line = 0                                   # the number of the one that was read last
        self.earliest, self.latest = (math.inf, 0), (-math.inf, 0)      # times with their lines

    def lines(self, path: Path, encoding: str) -> Iterator[str]:
        """The lines of a file, as a stream, because Steam's reviews are larger than most memories.

        Bytes that are no text become halves of surrogate pairs. Raises OSError for a damaged gzip
        file and for one of absurd size. A few kilobytes of gzip can unpack to terabytes, so both
        bounds are checked while the file is read.
        """
        digest, rest, size, packed = hashlib.sha256(), "", 0, path.stat().st_size
        decoder = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder(encoding)("surrogateescape"), translate=True)
        try:
            with open(path, "rb") as plain, tqdm.wrapattr(
                    plain, "read", packed, desc=path.name, leave=False,
                    disable=True if packed < 50_000_000 else None) as raw:
                file = gzip.open(raw) if path.suffix == ".gz" else raw
                while chunk := file.read(1 << 22):
                    if b"\0" in chunk[:1_000]:          # UTF-16, or no text at all
                        raise OSError(f"{path}: not a text in UTF-8; save it as one")
                    digest.update(chunk)
                    size += len(chunk)
                    *whole, rest = (rest + decoder.decode(chunk)).split("\n")   # a line cut in two
                    if len(rest) > LONGEST_LINE or size > self.form.most_bytes:
                        raise OSError(
                            f"{path}: more than {LONGEST_LINE:,} bytes in a line or "
                            f"{self.form.most_bytes:,} in all; this is not a file of this format")
                    for line in whole:
                        self.line += 1
                        yield line + "\n"
                if rest := rest + decoder.decode(b"", True):
                    self.line += 1
                    yield rest
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise OSError(f"{path}: damaged gzip file ({error}). Remove it and fetch it again") \
                from None
        self.checksums[path.name.removesuffix(".gz")] = digest.hexdigest()

    def read(self, path: Path, table: Table, roles: tuple[str, ...], store: Callable) -> None:
        """Read a file, and call store(...) with the fields of the given roles for every row.

        A row that cannot be split or stored is a bad one. The first of them stops the reading,
        unless the user asked to drop and count them. If most lines are bad it is told in any case,
        and so is a header that is not understood.
        """
        names, choose = table.header, table.header and find_columns(table.header, roles)
        rows = table.split(self.lines(path, table.encoding))
        self.line, before, bad, first, ended = 0, 0, 0, "", False
        while not ended:
            try:
                for fields in rows:
                    if choose and len(fields) == len(names):
                        store(*choose(fields))
                    elif choose and "".join(fields).strip():
                        raise ValueError(f"{len(fields)} fields, expected {len(names)}"
                                         f"{separated(fields)}")
                    elif fields and not choose:
                        names, choose = fields, find_columns(fields, roles)
                    before = self.line
                ended = True
            except FAULTS as error:     # the rows go on after it
                hint = (" (a quote at the beginning of a field wants one at its end)"
                        if isinstance(error, csv.Error) else "")
                first = first or f"{path}, line {before + 1}: {error}{hint}"
                if not choose:
                    raise ValueError(first) from None
                bad, before = bad + self.line - before, self.line
        if (lines := self.line - (not table.header)) < 1:
            raise ValueError(f"{path}: holds no rows")
        self.judge(first, path.name, bad, lines)

    def judge(self, first: str, file: str, bad: int, lines: int) -> None:
        """Count the bad lines of a file, or raise ValueError for the first of them.

        Most lines have no slip in common, so if most are bad the reader expected something else.
        """
        if 2 * bad > lines:
            raise ValueError(f"{first}. {bad:,} of {lines:,} lines are bad, so it is not a single "
                             "line that wants repair; docs/data.md shows the formats")
        if bad and not self.skip_bad_lines:
            raise ValueError(f"{first}. Repair or remove the line, or pass --skip-bad-lines, which "
                             f"drops {bad:,} of {lines:,} lines")
        self.dropped[f"bad lines of {file}"] += bad

    def add_item(self, item: str, title: str) -> None:
        """Enter an item. Raises ValueError for a second title."""
        title = plain_text(title)
        place = -1 if title in self.item_ids.missing else self.item_ids[item]
        if place < 0:
            self.dropped["items without an id or a title"] += 1
        elif place == len(self.titles):
            self.titles.append(title)
        elif self.titles[place] == title:
            self.dropped["items listed again"] += 1
        else:
            raise ValueError(f"item {item} is listed twice, with different titles")

    def add_row(self, user: str, item: str, *time: str) -> None:
        """Enter an interaction, whose time is one text, or a year, a month and a day."""
        when = moment(time[0] if len(time) == 1 else "{}-{:0>2}-{:0>2}".format(*time))
        what = self.item_ids[item]
        who = (self.user_ids if 0 <= what < len(self.titles) else self.other_users)[user]
        if who < 0 or what < 0:
            self.dropped[WITHOUT] += 1
        elif what >= len(self.titles):
            self.dropped[UNTITLED] += 1
        else:
            if isinstance(when, float) and self.times.typecode == "q":
                self.times = array("d", self.times)
            self.times.append(when)
            self.users.append(who)
            self.items.append(what)
            if when < self.earliest[0]:
                self.earliest = when, self.line
            if when > self.latest[0]:
                self.latest = when, self.line

    def clock(self) -> tuple[np.ndarray, int, np.ndarray]:
        """(times, how many of their units are a day, or 0, the mask of those that can be)."""
        times, public = np.asarray(self.times), bool(self.form.downloads)
        middle, file = float(np.median(times)), self.form.tables[0].name
        unit = next((u for u in UNITS if (FIRST * u if u < 10**9 else 10**16) <= middle < LAST * u),
                    int(public))
        low, high = (LAST * unit // 1000, LAST * unit) if unit else (-PLACES, PLACES)
        possible = (low <= times) & (times < high) | public
        if bad := int((~possible).sum()):
            time, line = self.earliest if self.earliest[0] < low else self.latest
            self.judge(f"{self.form.folder}/{file}, line {line}: timestamp {time}; the median is "
                       f"{middle:g}. Wanted in the whole column {WANTED}, or numbers below "
                       f"{PLACES:,} that only say what came first", file, bad, len(times))
        while unit > 1 and self.times.typecode == "q" and not (times % 1000).any():
            times, unit = times // 1000, unit // 1000           # of dates mostly to seconds
        return times, 86_400 * unit, possible

    def interactions(self, domain: str | None, drop_untitled: bool = False) -> Interactions:
        """Everything that was entered."""
        listed, names = len(self.titles), self.item_ids.names
        untitled, rows = self.dropped[UNTITLED], len(self.users)
        if untitled > (rows + untitled) / 10 and not drop_untitled:
            raise ValueError(
                f"{untitled:,} of {rows + untitled:,} interactions are with items for which "
                f"{self.form.tables[1].name} has no title, such as "
                f"{', '.join(names[listed:listed + 3])}; it lists {listed:,} ids, such as "
                f"{', '.join(names[:min(listed, 3)])}. Both files want the same ids, letter for "
                "letter" + ("; --drop-untitled goes on without these interactions" if rows else ""))
        if not rows:
            raise ValueError("no interaction has a user and an item with a title")
        times, day, possible = self.clock()
        users, items = np.asarray(self.users), np.asarray(self.items)
        steps = [in_words({
            "interactions": rows + untitled + self.dropped[WITHOUT],
            "users": len({*self.user_ids.names, *self.other_users.names}),
            "items": np.count_nonzero(np.bincount(items)) + len(names) - listed})]
        steps += [f"{count:,} {reason} dropped" for reason, count in self.dropped.items() if count]
        titles = unique_titles(self.titles)
        if again := [new for new, old in zip(titles, self.titles) if new != old]:
            steps.append(f"{len(again):,} items got a number, because others have the same title, "
                         f"as {again[0]!r}")
        user_ids = self.user_ids.names
        if self.form.numbered:
            users, user_ids = np.array(user_ids).astype(np.int64)[users], []
        return Interactions(users[possible], items[possible], times[possible], titles,
                            domain or self.form.domain, self.checksums, tuple(steps), day,
                            user_ids, names[:listed])


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
                      domain: str | None = None, drop_untitled: bool = False) -> Interactions:
    """Read a public data set, which is fetched to data_dir if need be, or a folder of one's own.

    All raw rows whose item has a title are there; nothing else is filtered. The first of the steps
    are the counts of the files. A bad line stops the reading, or is counted with skip_bad_lines.
    More than a tenth of rows without a title stop it, unless drop_untitled. Raises
    FileNotFoundError, which says what to download and where to save it, or ValueError, which gives
    the file and the line.
    """
    folder = Path(name)
    if name in FORMATS:
        form, paths = FORMATS[name], find_files(name, Path(data_dir))
    elif folder.is_dir():
        form = own_format(folder)
        paths = [present(folder, table.name) for table in form.tables]
    else:
        what = "that is a file" if folder.exists() else "there is no such folder"
        raise ValueError(f"unknown data set {name!r}: {what}; known are synthetic, "
                         f"{', '.join(FORMATS)}, or a folder with interactions.csv and items.csv")
    reader = Reader(form, skip_bad_lines)
    reader.read(paths[1], form.tables[1], ("id", "title"), reader.add_item)
    reader.read(paths[0], form.tables[0], ("user", "item", *form.time), reader.add_row)
    return reader.interactions(domain, drop_untitled)


# ----------------------------------------------------------------------------------------------
# The paper's preparation (§5.1.1)

SAMPLE = {"movielens": 0.1, "ml-1m": 0.1, "steam": 1 / 3}      # the paper's text; all others: 1


def counts(interactions: Interactions) -> dict[str, int]:
    """How many rows there are, and how many users and items occur in them."""
    return {"interactions": len(interactions.users),
            "users": len(np.unique(interactions.users)),
            "items": len(np.unique(interactions.items))}


def in_words(found: dict[str, int]) -> str:
    """Counts as text."""
    return ", ".join(f"{count:,} {what}" for what, count in found.items())


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
        x = replace(x, items=renumbered, titles=[x.titles[i] for i in items],
                    item_ids=[x.item_ids[i] for i in items if x.item_ids])
    return replace(x, steps=(*x.steps, f"{step}: {in_words(counts(x))}"))


def first_of_each_pair(x: Interactions, advice: str = "") -> Interactions:
    """Of a user's interactions with the same item, keep the earliest (on a tie, the first row)."""
    users = np.unique(x.users, return_inverse=True)[1]
    pairs = users * len(x.titles) + x.items
    by_time = np.argsort(x.timestamps, kind="stable")
    kept = np.zeros(len(pairs), dtype=bool)
    kept[by_time[np.unique(pairs[by_time], return_index=True)[1]]] = True
    step = f"first of each user and item, {(~kept).sum():,} repeats dropped{advice}"
    return x if kept.all() else keep(x, kept, step, all_items=True)


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
    return replace(x, timestamps=place, day=0)


def describe_times(x: Interactions) -> str:
    """From when to when, how many neighbours have equal times, and a warning if they are many."""
    order = np.lexsort((x.timestamps, x.users))
    same_user, same_time = (np.diff(column[order]) == 0 for column in (x.users, x.timestamps))
    share = (same_user & same_time).sum() / max(1, same_user.sum())
    first, last = (day_of(time, x.day) for time in (x.timestamps.min(), x.timestamps.max()))
    return (f"times | {'' if x.day else 'only an order, '}{first} to {last} | {100 * share:.1f} % "
            "of neighbours, consecutive items of a user, have equal times" + (
                "\nwarning | at equal times the order of the file decides what came first; so what "
                "is learned and measured of order is in part the file's" if share > 0.1 else ""))


def day_of(time: float, day: float) -> str:
    """The date of a time. Where times only say what came first, the number itself."""
    return str(np.datetime64(int(time // day), "D")) if day else f"{time:g}"


def prepare(interactions: Interactions, name: str, sample: float | None = None, seed: int = 0,
            chronological: bool = False, keep_repeats: bool = False) -> Interactions:
    """Take the steps of §5.1.1 for a data set and count each in `steps` (README: D4, D9, D14).

    In every data set, of repeated interactions of a user with an item only the first stays, unless
    keep_repeats. Then:

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
    if not keep_repeats:
        x = first_of_each_pair(x, "" if name in FORMATS else "; --keep-repeats keeps them")
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
