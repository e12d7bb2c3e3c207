"""Raw files -> interactions -> the paper's preparation (§5.1.1): MovieLens, Steam, LastFM, and the
reader's own.

data.py goes on from here to sequences and prompts. Imports nothing of ours. Ratings, tags and
playing times are not read: the paper uses who, what and when.
"""

import ast
import csv
import gzip
import hashlib
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

LATEST = 4_102_444_800          # 2100-01-01: a later timestamp is in other units than seconds
LONGEST_LINE = 2**24            # bytes; no format has one nearly as long
PLACES = 10**7                  # timestamps up to here, April 1970, only say which came first


@dataclass(frozen=True)
class Interactions:
    """Who took which item when. Row order is the file's order."""

    users: np.ndarray           # (rows,) int64
    items: np.ndarray           # (rows,) int64, index into titles
    timestamps: np.ndarray      # (rows,) int64, seconds since 1970
    titles: list[str]           # (N,) unique, in the order of the item file
    domain: str = "movies"      # a key of data.DOMAINS: the words of the prompt
    checksums: dict[str, str] = field(default_factory=dict)     # file name -> sha256 of its text
    steps: tuple[str, ...] = () # what was done to the raw rows, each with its counts
    dated: bool = True          # False: timestamps only say which came first

    def counts(self) -> dict[str, int]:
        """Rows, users and items that occur."""
        return {"interactions": len(self.users), "users": len(np.unique(self.users)),
                "items": len(np.unique(self.items))}

    def keep(self, rows: np.ndarray, step: str, all_items: bool = False) -> "Interactions":
        """The given rows (a mask), the items that still occur or all, and a line that says so."""
        kept = replace(self, users=self.users[rows], items=self.items[rows],
                       timestamps=self.timestamps[rows])
        if not len(kept.users):
            raise ValueError(f"nothing is left after the step {step!r}; use more data or a larger "
                             "--sample")
        if not all_items:
            items, renumbered = np.unique(kept.items, return_inverse=True)
            kept = replace(kept, items=renumbered, titles=[self.titles[i] for i in items])
        counts = ", ".join(f"{n:,} {what}" for what, n in kept.counts().items())
        return replace(kept, steps=(*self.steps, f"{step}: {counts}"))


# ----------------------------------------------------------------------------------------------
# Where the public data sets are, and what lies in them


@dataclass(frozen=True)
class Download:
    """One file to fetch. Files with a sha256 are checked; the others carry their own checksums."""

    address: str
    size: str                   # for people
    sha256: str | None = None


@dataclass(frozen=True)
class Format:
    """Where one data set lies, in data_dir/folder, each file plain or gzipped."""

    folder: str
    files: tuple[str, str]      # interactions, items
    downloads: tuple[Download, ...]
    most_bytes: int             # a file that unpacks to more is not of this format
    domain: str = "movies"


GROUPLENS = "https://files.grouplens.org/datasets/"
FORMATS = {
    "movielens": Format("ml-1m", ("ratings.dat", "movies.dat"), (Download(
        GROUPLENS + "movielens/ml-1m.zip", "5.9 MB",
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),), 100_000_000),
    "ml-100k": Format("ml-100k", ("u.data", "u.item"), (Download(
        GROUPLENS + "movielens/ml-100k.zip", "4.9 MB",
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),), 10_000_000),
    "ml-latest-small": Format("ml-latest-small", ("ratings.csv", "movies.csv"), (Download(
        GROUPLENS + "movielens/ml-latest-small.zip", "1 MB"),), 20_000_000),
    "steam": Format("steam-mcauley", ("steam_reviews.json", "steam_games.json"), (
        Download("http://cseweb.ucsd.edu/~wckang/steam_reviews.json.gz", "1.3 GB"),
        Download("http://cseweb.ucsd.edu/~wckang/steam_games.json.gz", "2.7 MB")),
        50_000_000_000, "games"),
    "lastfm": Format("lastfm-hetrec", ("user_taggedartists.dat", "artists.dat"), (Download(
        GROUPLENS + "hetrec2011/hetrec2011-lastfm-2k.zip", "2.6 MB",
        "6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c"),), 50_000_000,
        "artists"),
}
FORMATS["ml-1m"] = FORMATS["movielens"]

TABLE_2 = {     # what we know of it; the README says which counts can be had and which cannot
    "movielens": {"sequences": 192_483, "items": 3_952, "interactions": 999_611},
    "steam": {"items": 3_581},
    "lastfm": {"sequences": 46_897, "items": 4_606, "interactions": 73_510},
}
TABLE_2["ml-1m"] = TABLE_2["movielens"]


# ----------------------------------------------------------------------------------------------
# Fetching: whole and checked, or not there


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(address: str, path: Path, sha256: str | None = None) -> None:
    """Fetch a file; it appears at `path` only when whole and right. A half one is gone on with.

    Raises OSError (no network, broken off) or ValueError (another checksum).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            have = have if response.status == 206 else 0            # 200: from the start again
            left = response.headers.get("Content-Length")
            total = have + int(left) if left else None
            with open(part, "ab" if have else "wb") as file, tqdm(
                    total=total, initial=have, desc=path.name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:                   # 416: the half file is as long as the whole
            raise
        part.unlink()
        raise OSError(f"{address}: what was fetched before does not fit; run again") from None
    if total is not None and part.stat().st_size != total:
        raise OSError(f"broke off after {part.stat().st_size:,} of {total:,} bytes; run again, it "
                      "goes on from there")
    if sha256 and (got := _sha256(part)) != sha256:
        part.unlink()
        raise ValueError(f"{path}: fetched from {address} with sha256 {got}, published is "
                         f"{sha256}. What came was discarded; run again")
    os.replace(part, path)


def unpack(archive: Path, folder: Path, files: tuple[str, ...], most_bytes: int) -> None:
    """Take the named files out of a zip into `folder`, each whole or not there.

    Raises ValueError, before anything is written, for a damaged archive, an entry that would leave
    the folder, one that declares more than most_bytes, or a file that is not in it.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            entries = {}
            for entry in packed.infolist():
                name = entry.filename
                if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name:
                    raise ValueError(f"{archive}: holds {name!r}, which leaves the folder; not "
                                     "unpacked")
                if entry.file_size > most_bytes:
                    raise ValueError(f"{archive}: {name} declares {entry.file_size:,} bytes, at "
                                     f"most {most_bytes:,} expected; not unpacked")
                entries[name.rpartition("/")[2]] = entry
            if missing := [name for name in files if name not in entries]:
                raise ValueError(f"{archive}: holds no {missing[0]}. Is it the right archive?")
            folder.mkdir(parents=True, exist_ok=True)
            for name in files:
                part = folder / f"{name}.part"
                with packed.open(entries[name]) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                os.replace(part, folder / name)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive}: damaged zip archive ({error}). Remove it and run again") \
            from None


def _present(folder: Path, file: str) -> Path | None:
    """The file, plain or gzipped."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def find_files(name: str, data_dir: Path) -> tuple[Path, Path]:
    """Interactions and items of a public data set, fetched and unpacked if they are not there.

    Raises FileNotFoundError with address, size and target where they cannot be fetched.
    """
    form, folder = FORMATS[name], data_dir / FORMATS[name].folder
    for item in form.downloads:
        file = item.address.rpartition("/")[2]
        packed = file.endswith(".zip")
        wanted = form.files if packed else (file.removesuffix(".gz"),)
        if all(_present(folder, name) for name in wanted):
            continue
        archive = data_dir / file if packed else folder / file
        if not archive.is_file():
            print(f"fetching {item.address} ({item.size}) to {archive}")
            try:
                download(item.address, archive, item.sha256)
            except OSError as error:
                reason = getattr(error, "reason", None) or error
                raise FileNotFoundError(
                    f"{folder / wanted[0]}: not found (nor {wanted[0]}.gz), and fetching "
                    f"{item.address} failed ({reason}). Save it ({item.size}) as {archive}, or "
                    "pass --data-dir; --data synthetic needs nothing") from None
        elif item.sha256 and (got := _sha256(archive)) != item.sha256:
            raise ValueError(f"{archive}: sha256 is {got}, published is {item.sha256}. Remove it "
                             "and run again")
        if packed:
            unpack(archive, folder, wanted, form.most_bytes)
    return tuple(_present(folder, file) for file in form.files)


# ----------------------------------------------------------------------------------------------
# Reading lines: strict unless told otherwise, every fault with its file and line


class Reader:
    """Reads raw text files line by line, plain or gzipped, and keeps account of them."""

    def __init__(self, skip_bad_lines: bool = False, most_bytes: int = 50_000_000_000):
        self.skip_bad_lines, self.most_bytes = skip_bad_lines, most_bytes
        self.checksums: dict[str, str] = {}
        self.dropped: Counter[str] = Counter()          # reason -> how many
        self.index: dict = {}                           # an item's own id -> its number
        self.titles: list[str] = []

    def lines(self, path: Path, encoding: str) -> Iterator[tuple[int, str]]:
        """(line number, text without its end), streamed."""
        digest, rest, number, size = hashlib.sha256(), b"", 0, 0
        packed = path.stat().st_size
        try:
            with open(path, "rb") as raw, tqdm(
                    total=packed, desc=path.name, unit="B", unit_scale=True, leave=False,
                    disable=True if packed < 50_000_000 else None) as bar:
                file = gzip.open(raw) if path.suffix == ".gz" else raw
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    size += len(chunk)
                    bar.update(raw.tell() - bar.n)
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        number += 1
                        yield from self._decoded(path, number, line, encoding)
                    if len(rest) > LONGEST_LINE or size > self.most_bytes:
                        raise ValueError(f"{path}, line {number + 1}: more than {LONGEST_LINE:,} "
                                         f"bytes in a line or {self.most_bytes:,} in all; this is "
                                         "not a file of this format")
                if rest:
                    yield from self._decoded(path, number + 1, rest, encoding)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}). Fetch it again") from None
        self.checksums[path.name.removesuffix(".gz")] = digest.hexdigest()

    def _decoded(self, path: Path, number: int, line: bytes, encoding: str):
        try:
            yield number, line.decode(encoding).rstrip("\r")
        except UnicodeDecodeError as error:
            self.bad(path, number, f"byte {line[error.start]:#x} is not {encoding} text")

    def bad(self, path: Path, number: int, what) -> None:
        """Stop at a bad line, or count it."""
        if not self.skip_bad_lines:
            what = re.sub(r"invalid literal.*: ", "expected an integer, got ", str(what))
            raise ValueError(f"{path}, line {number}: {what}. Repair or remove the line, or pass "
                             "--skip-bad-lines")
        self.dropped[f"bad lines of {path.name}"] += 1

    def rows(self, path: Path, separator: str, encoding: str, convert: Callable, columns: int = 0,
             header: Callable | None = None) -> Iterator:
        """convert(fields) of every line; None is left out, ValueError and KeyError make it bad.

        separator "csv" means quoted CSV. header, if there is such a line, is given its fields and
        returns convert. columns 0: as many as the header has. Raises ValueError for a file without
        rows.
        """
        empty = True
        for number, text in self.lines(path, encoding):
            try:
                if separator != "csv":
                    fields = text.split(separator)
                else:
                    fields = next(csv.reader([text], strict=True), []) if '"' in text else \
                        text.split(",")
                if header:
                    convert, header = header(fields) or convert, None
                    columns = columns or len(fields)
                    continue
                empty = False
                if len(fields) != columns:
                    raise ValueError(f"{len(fields)} fields, expected {columns} separated by "
                                     f"{',' if separator == 'csv' else separator!r}")
                value = convert(fields)
            except (ValueError, KeyError, OverflowError, csv.Error) as error:
                if header:                          # without it nothing else makes sense
                    raise ValueError(f"{path}, line {number}: {error}") from None
                self.bad(path, number, error)
                continue
            if value is not None:
                yield value
        if empty:
            raise ValueError(f"{path}: holds no rows. Fetch it again")

    def add_item(self, item, title: str) -> None:
        """Enter an item of the catalogue. Raises ValueError for an empty title or a second time."""
        title = title.strip()
        if not title or "\n" in title or "\r" in title:
            raise ValueError(f"title {title!r} is empty or has a line break")
        if item in self.index:
            raise ValueError(f"item {item} is listed twice")
        self.index[item] = len(self.titles)
        self.titles.append(title)

    def known(self, item) -> int | None:
        """Number of an item; None, counted, if the catalogue does not list it."""
        number = self.index.get(item)
        if number is None:
            self.dropped["interactions with items that have no title"] += 1
        return number

    def gather(self, rows: Iterator, domain: str) -> Interactions:
        """Interactions from (user, item number or None, timestamp) rows."""
        users, items, timestamps = array("q"), array("q"), array("q")
        for user, item, timestamp in rows:
            if item is not None:
                users.append(user)
                items.append(item)
                timestamps.append(timestamp)
        if not users:
            raise ValueError("no interaction has an item of the catalogue. Do the item file and "
                             "the interactions belong together?")
        columns = (np.frombuffer(column, dtype=np.int64) for column in (users, items, timestamps))
        steps = tuple(f"{count:,} {reason} dropped" for reason, count in self.dropped.items())
        return Interactions(*columns, unique_titles(self.titles), domain, self.checksums, steps)


def _number(text: str) -> int:
    """An id that an int64 holds."""
    if not 0 <= (value := int(text)) < 2**62:
        raise ValueError(f"{text} is out of range")
    return value


def seconds(text: str) -> int:
    """Seconds since 1970 of an integer, a float or an ISO date (UTC unless it says otherwise)."""
    try:
        value = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            try:
                date = datetime.fromisoformat(text)
            except ValueError:
                raise ValueError(f"timestamp {text!r}; wanted seconds since 1970 or an ISO date"
                                 ) from None
            value = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not 0 <= value < LATEST:
        hint = ", milliseconds?" if LATEST <= value < 1000 * LATEST else ""
        raise ValueError(f"timestamp {text!r} is not between 1970 and 2100 (seconds{hint})")
    return int(value)


def unique_titles(titles: list[str]) -> list[str]:
    """Give the second, third ... item of one title the suffix " [2]", " [3]" ..."""
    taken, seen, unique = set(titles), Counter(), []
    for title in titles:
        seen[title] += 1
        new, count = title, seen[title]
        while count > 1 and (new == title or new in taken):
            new, count = f"{title} [{count}]", count + 1
        taken.add(new)
        unique.append(new)
    return unique


# ----------------------------------------------------------------------------------------------
# The formats


def _movielens(reader: Reader, ratings: Path, movies: Path) -> Iterator:
    """(user, item, timestamp) of the three MovieLens layouts; an unlisted movie is a bad line."""
    kind = movies.name.removesuffix(".gz")
    separators, columns, encoding = {
        "movies.dat": (("::", "::"), (4, 3), "latin-1"),
        "u.item": (("\t", "|"), (4, 24), "latin-1"),
        "movies.csv": (("csv", "csv"), (4, 3), "utf-8")}[kind]
    header = (lambda fields: None) if encoding == "utf-8" else None
    for _ in reader.rows(movies, separators[1], encoding,
                         lambda f: reader.add_item(int(f[0]), f[1]), columns[1], header):
        pass
    index = reader.index

    def convert(fields):
        timestamp = int(fields[3])
        if not 0 <= timestamp < LATEST:
            timestamp = seconds(fields[3])
        item = int(fields[1])
        if item not in index:
            raise ValueError(f"unknown item {item}, not in {kind}")
        return _number(fields[0]), index[item], timestamp
    return reader.rows(ratings, separators[0], encoding, convert, columns[0], header)


def _lastfm(reader: Reader, tagged: Path, artists: Path) -> Iterator:
    """Tag assignments of HetRec 2011: user, artist, tag, day, month, year. Names hold bare quotes.

    Five rows of the real file have impossible years; they keep their date here.
    """
    for _ in reader.rows(artists, "\t", "utf-8", lambda f: reader.add_item(int(f[0]), f[1]), 4,
                         lambda fields: None):
        pass

    def convert(fields):
        user, artist, _, day, month, year = map(_number, fields)
        return user, reader.known(artist), int(datetime(year, month, day, tzinfo=UTC).timestamp())
    return reader.rows(tagged, "\t", "utf-8", convert, 6, lambda fields: None)


def _steam(reader: Reader, reviews: Path, games: Path) -> Iterator:
    """McAuley's files: a Python literal per line, read without running any of it."""
    for number, text in reader.lines(games, "utf-8"):
        try:
            game = _literal(text)
            title = game.get("title") or game.get("app_name") or ""
            if "id" not in game or not title.strip():
                reader.dropped["games without id or title"] += 1
            elif game["id"] in reader.index:
                reader.dropped["games listed again"] += 1
            else:
                reader.add_item(game["id"], title)
        except (ValueError, AttributeError) as error:
            reader.bad(games, number, error)
    if not reader.titles:
        raise ValueError(f"{games}: holds no rows. Fetch it again")
    users: dict[str, int] = {}
    days: dict[str, int] = {}
    empty = True
    for number, text in reader.lines(reviews, "utf-8"):
        empty = False
        try:
            review = _literal(text)
            date = review["date"]
            if date not in days:
                days[date] = seconds(date)
            row = (users.setdefault(review["username"], len(users)),
                   reader.known(review["product_id"]), days[date])
        except KeyError as error:
            reader.bad(reviews, number, f"has no {error}")
        except (ValueError, TypeError) as error:
            reader.bad(reviews, number, error)
        else:
            yield row
    if empty:
        raise ValueError(f"{reviews}: holds no rows. Fetch it again")


def _literal(text: str) -> dict:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text[:40]!r} is not a Python dict literal")
    return value


def _own(reader: Reader, folder: Path) -> Iterator:
    """interactions.csv and items.csv, or RecBole's NAME.inter and NAME.item; columns by name."""
    pair = _present(folder, "interactions.csv"), _present(folder, "items.csv")
    separator, wanted = "csv", ("user", "item", "timestamp")
    if not all(pair):
        atomic = sorted(folder.glob("*.inter"))
        if len(atomic) != 1 or any(pair) or not atomic[0].with_suffix(".item").is_file():
            raise FileNotFoundError(
                f"{folder}: wanted interactions.csv (user,item,timestamp) and items.csv "
                "(item,title), or one RecBole NAME.inter and NAME.item; found "
                f"{', '.join(sorted(path.name for path in folder.iterdir())[:6]) or 'nothing'}")
        pair, separator = (atomic[0], atomic[0].with_suffix(".item")), "\t"
        wanted = ("user_id", "item_id", "timestamp")
    users: dict[str, int] = {}

    def columns(fields, *names):
        """Where the named columns stand; RecBole's header adds a type, `item_id:token`."""
        plain = [name.partition(":")[0].strip().lstrip("\ufeff") for name in fields]
        for name in names:
            found = [i for i, p in enumerate(plain) if p == name or name == "title" and
                     re.fullmatch(r"\w*(title|name)", p)]
            if not found:
                raise ValueError(f"the header has no column {name!r}: {', '.join(plain)}")
            yield found[0]

    def item_row(fields):
        item, title = columns(fields, wanted[1], "title")

        def convert(row):
            if row[title].strip():
                reader.add_item(row[item], row[title])
            else:
                reader.dropped["items without a title"] += 1
        return convert

    def row(fields):
        user, item, timestamp = columns(fields, *wanted)
        return lambda row: (users.setdefault(row[user], len(users)), reader.known(row[item]),
                            seconds(row[timestamp]))
    for _ in reader.rows(pair[1], separator, "utf-8", None, header=item_row):
        pass
    return reader.rows(pair[0], separator, "utf-8", None, header=row)


def load_interactions(name: str, data_dir: str | Path = "data", skip_bad_lines: bool = False,
                      domain: str | None = None) -> Interactions:
    """Read a public data set from data_dir, fetched if need be, or a folder of the reader's own.

    Every raw row whose item has a title; nothing else is filtered. Raises FileNotFoundError (what
    to download, where to) or ValueError (file and line); skip_bad_lines counts bad lines instead.
    """
    if name not in FORMATS:
        folder = Path(name)
        if not folder.is_dir():
            raise ValueError(f"unknown data set {name!r}; known: synthetic, {', '.join(FORMATS)}, "
                             "or a folder with interactions.csv and items.csv")
        reader = Reader(skip_bad_lines)
        x = reader.gather(_own(reader, folder), domain or "items")
        return replace(x, dated=bool(x.timestamps.max() > PLACES))
    form = FORMATS[name]
    reader = Reader(skip_bad_lines, form.most_bytes)
    read = {"steam": _steam, "lastfm": _lastfm}.get(name, _movielens)
    rows = read(reader, *find_files(name, Path(data_dir)))
    return reader.gather(rows, domain or form.domain)


# ----------------------------------------------------------------------------------------------
# The paper's preparation (§5.1.1)

SAMPLE = {"movielens": 0.1, "ml-1m": 0.1, "steam": 1 / 3}      # the text's; all others 1


def first_of_each_pair(x: Interactions) -> Interactions:
    """A user's first interaction with each item (ties: file order), with the earliest time."""
    pairs = _numbered(x.users) * len(x.titles) + x.items
    order = np.lexsort((np.arange(len(pairs)), x.timestamps, pairs))
    first = np.ones(len(pairs), dtype=bool)
    first[1:] = pairs[order][1:] != pairs[order][:-1]
    kept = np.zeros(len(pairs), dtype=bool)
    kept[order[first]] = True
    return x if kept.all() else x.keep(kept, "first of each user and item", all_items=True)


def _numbered(ids: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... for the different ids, whatever numbers the file uses."""
    return np.unique(ids, return_inverse=True)[1]


def at_least(owners: np.ndarray, others: np.ndarray, least: int) -> np.ndarray:
    """Mask of rows whose owner has at least `least` different others."""
    owners, others = _numbered(owners), _numbered(others)
    pairs = np.unique(owners * (others.max() + 1) + others)
    return np.bincount(pairs // (others.max() + 1))[owners] >= least


def core(x: Interactions, least: int) -> Interactions:
    """The k-core: items and users with fewer than `least` interactions dropped until none is."""
    while True:
        kept = at_least(x.items, x.users, least) & at_least(x.users, x.items, least)
        if kept.all():
            return x.keep(kept, f"{least}-core")
        x = replace(x.keep(kept, ""), steps=x.steps)


def sample_of(ids: np.ndarray, share: float, rng: np.random.Generator,
              by_rows: bool = False) -> np.ndarray:
    """Mask of rows: of a random share of the ids, or of ids that have that share of the rows."""
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


def prepare(interactions: Interactions, name: str, sample: float | None = None, seed: int = 0,
            chronological: bool = False) -> Interactions:
    """The steps of §5.1.1 for a data set, each counted in `steps`; README, D4, D9, D14.

    All: repeats of a user and an item dropped, the first stays. movielens: 5-core, then users drawn
    until they have `sample` of the interactions. steam: users with 20 games or more, then `sample`
    of the users and of the games. lastfm: artists with 4 users, then users with 4 artists, in the
    order of the file, which is not one of time, or by date with `chronological`. Others: users
    drawn as for movielens if `sample` is below 1.
    """
    share = SAMPLE.get(name, 1.0) if sample is None else sample
    check_preparation(name, share, chronological)
    rng, x = np.random.default_rng([seed, 5]), interactions
    if name == "lastfm" and not chronological:
        x = _places(x)
    if chronological:
        possible = x.timestamps >= datetime(2002, 1, 1, tzinfo=UTC).timestamp()
        x = x.keep(possible, "dates that can be, 2002 or later")
    x = first_of_each_pair(x)
    if name == "lastfm":
        x = x.keep(at_least(x.items, x.users, 4), "artists with 4 users or more")
        x = x.keep(at_least(x.users, x.items, 4), "users with 4 artists or more")
        if not chronological:                           # places without gaps again
            x = replace(_places(x), steps=(*x.steps, "order by artist number, as the field uses "
                                           "it, not by time (D9); --chronological takes dates"))
    if name in ("movielens", "ml-1m"):
        x = core(x, 5)
    if name == "steam":
        x = x.keep(at_least(x.users, x.items, 20), "users with 20 games or more")
    if share < 1 and name == "steam":
        x = x.keep(sample_of(x.users, share, rng), f"{share:.3g} of the users, drawn")
        x = x.keep(sample_of(x.items, share, rng), f"{share:.3g} of the games, drawn")
    elif share < 1:
        x = x.keep(sample_of(x.users, share, rng, by_rows=True),
                   f"users drawn to have {share:.3g} of the interactions")
    return x


def _places(x: Interactions) -> Interactions:
    """Every time replaced by the row's place among its user's rows: 0, 1, 2 ... in file order."""
    order = np.argsort(x.users, kind="stable")
    owner, place = x.users[order], np.empty_like(order)
    place[order] = np.arange(len(order)) - np.searchsorted(owner, owner)
    return replace(x, timestamps=place, dated=False)
