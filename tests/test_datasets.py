"""support/datasets.py: every raw format to the row, fetching, the preparation of §5.1.1."""

import gzip
import hashlib
import itertools
import re
import socket
import struct
import threading
import time
import urllib.error
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data import Interactions, make_sequences, split_by_time
from support.datasets import (COLUMNS, FORMATS, MISSING, THINGS, Download, core, counts, day_of,
                              describe_times, find_columns, find_files, first_of_each_pair, keep,
                              load_interactions, moment, prepare, sample_of, unique_titles, unpack)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, request):
    """Nothing here leaves the machine."""
    if "server" not in request.fixturenames:
        def refuse(*args, **kwargs):
            raise urllib.error.URLError("no network in tests")
        monkeypatch.setattr("support.datasets.urlopen", refuse)


# ----------------------------------------------------------------------------------------------
# One small folder of each format: user 7 takes item 2, Amélie, after item 1, Heat


def put(folder, files):
    """Write files by name; text as UTF-8, bytes as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


BARS = "|" * 22
FILES = {       # data set -> folder, {interactions file: content, item file: content}
    "movielens": ("ml-1m", {
        "ratings.dat": "7::2::5::100\n7::1::3::99\n",
        "movies.dat": "1::Heat (1995)::Action\n2::Amélie (2001)::Comedy\n".encode("latin-1")}),
    "ml-100k": ("ml-100k", {
        "u.data": "7\t2\t4\t100\n7\t1\t4\t99\n",
        "u.item": f"1|Heat (1995){BARS}\n2|Amélie (2001){BARS}\n".encode("latin-1")}),
    "ml-latest-small": ("ml-latest-small", {
        "ratings.csv": "userId,movieId,rating,timestamp\n7,2,4.0,100\n7,1,0.5,99\n",
        "movies.csv": "movieId,title,genres\n1,Heat (1995),x\n2,Amélie (2001),x\n"}),
    "lastfm": ("lastfm-hetrec", {
        "user_taggedartists.dat": "userID\tartistID\ttagID\tday\tmonth\tyear\r\n"
                                  "7\t2\t5\t1\t4\t2009\r\n7\t1\t5\t1\t3\t2009\r\n",
        "artists.dat": "id\tname\turl\tpictureURL\n1\tHeat (1995)\tu\t\n2\tAmélie (2001)\tu\tp\n"}),
    "steam": ("steam-mcauley", {
        "steam_reviews.json":
            "{u'username': u'x', u'product_id': u'2', u'date': u'2017-12-17', "
            "u'text': u'a \"b\"', u'hours': 0.1, u'early_access': False}\n"
            "{u'username': u'x', u'product_id': u'1', u'date': u'2017-12-16'}\n",
        "steam_games.json": "{u'id': u'1', u'title': u'Heat (1995)'}\n"
                            "{u'id': u'2', u'app_name': u'Am\\xe9lie (2001)'}\n"}),
    "own": ("own", {
        "interactions.csv": "user,item,timestamp\nu7,b,100\nu7,a,99\n",
        "items.csv": "item,title\na,Heat (1995)\nb,Amélie (2001)\n"}),
    "recbole": ("atomic", {
        "ml.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
                    "u7\tb\t4\t100.0\nu7\ta\t3\t9.9e1\n",
        "ml.item": "item_id:token\tmovie_title:token_seq\tclass:token_seq\n"
                   "a\tHeat (1995)\tx\nb\tAmélie (2001)\tx\n"}),
}


def write(kind, root):
    """(the data set's name for load_interactions, its interactions file, its item file)"""
    folder, files = FILES[kind]
    put(root / folder, files)
    return (kind if kind in FORMATS else str(root / folder),
            *(root / folder / file for file in files))


def add(path, *lines):
    """Append lines to a file; the number of the last one."""
    text = path.read_bytes() + "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(text)
    return text.count(b"\n")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_each_format_gives_the_same_rows_plain_and_gzipped(tmp_path, kind, packed):
    name, *paths = write(kind, tmp_path)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    for path in paths if packed and kind != "recbole" else ():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    x = load_interactions(name, tmp_path)
    assert x.titles == ["Heat (1995)", "Amélie (2001)"] and x.items.tolist() == [1, 0]
    assert len(set(x.users.tolist())) == 1 and x.timestamps[0] > x.timestamps[1]
    assert x.domain == {"lastfm": "artists", "steam": "games"}.get(
        name, "movies" if name in FORMATS else "items")
    assert bool(x.day) == (name in FORMATS)
    assert x.steps == ("2 interactions, 1 users, 2 items",)
    assert x.checksums == sums
    assert make_sequences(x, min_history=1).history(0).tolist() == [0]


def test_movielens_users_keep_their_numbers_and_both_names_mean_the_same(tmp_path):
    write("movielens", tmp_path)
    assert load_interactions("ml-1m", tmp_path).users.tolist() == [7, 7]


def test_times_are_read_as_each_format_means_them(tmp_path):
    x = load_interactions(write("lastfm", tmp_path)[0], tmp_path)
    assert x.timestamps.tolist() == [1_238_544_000, 1_235_865_600]      # 1 April, 1 March 2009, UTC
    assert load_interactions(write("steam", tmp_path)[0], tmp_path).timestamps[0] == 1_513_468_800


DATE = 1_513_468_800        # 2017-12-17, in UTC


@pytest.mark.parametrize("text, expected", [
    ("0", 0), (" 978300760 ", 978_300_760), ("978300760.25", 978_300_760.25), ("9.5e8", 9.5e8),
    ("-0.5", -0.5), ("-5", -5), (f"{DATE}123456789", DATE * 10**9 + 123_456_789),
    ("2017-12-17", DATE * 10**9), ("2017-12-17T01:00:00+01:00", DATE * 10**9),
    ("2017-12-17 00:00:01", DATE * 10**9 + 10**9), ("2017-12-17T00:00:00Z", DATE * 10**9),
    ("2017-12-17 00:00:00 UTC", DATE * 10**9),
    ("2017-12-17 00:00:00.5 GMT", DATE * 10**9 + 500_000_000),
    ("2017-12-17 00:00:00.000000007", DATE * 10**9 + 7),
    ("20171217T000000.25", DATE * 10**9 + 250_000_000)])
def test_a_number_is_itself_and_a_date_is_its_nanoseconds(text, expected, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")              # the machine's time zone has no say
    time.tzset()
    assert moment(text) == expected and type(moment(text)) is type(expected)
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("text", [
    "1e300", "nan", "inf", "-inf", "yesterday", "", "²", "9" * 20, "9999-12-31", "0001-01-01",
    "17.12.2017", "12/17/2017", "Sun, 17 Dec 2017 00:00:00 GMT", "2017-12-17 01:00:00 PM",
    "2017-12-17 00:00:00 CET"])
def test_what_is_neither_a_number_nor_an_iso_date_is_refused_with_advice(text):
    with pytest.raises(ValueError, match=f"timestamp '{text}'; wanted Unix time, or dates as 20"):
        moment(text)


HOURS = 1_600_000_000 + 1_000 * np.arange(40)           # one user, who has items in turn


def at(folder, times, **options):
    """The data of one user at the given times, shuffled in the file."""
    lines = [f"u,{'ab'[i % 2]},{time}\n" for i, time in enumerate(times)]
    shuffled = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
    return own(folder, "user,item,timestamp\n" + "".join(shuffled), **options)


@pytest.mark.parametrize("form, unit", [
    (lambda t: t, 1), (lambda t: f"{t}.0", 1), (lambda t: f"{t}.{t // 1000 % 10}5", 1),
    (lambda t: 1_000 * t, 1), (lambda t: 1_000 * t + 7, 10**3),
    (lambda t: f"{1_000 * t + 7}.0", 10**3),
    (lambda t: 10**6 * t + 7, 10**6), (lambda t: 10**9 * t + 7, 10**9),
    (lambda t: np.datetime64(int(t), "s"), 1),
    (lambda t: f"{np.datetime64(int(t), 's')}.007Z", 10**3),
    (lambda t: str(np.datetime64(int(t), "s")).replace("T", " ") + " UTC", 1)])
def test_the_unit_is_that_of_the_column_and_nothing_is_rounded(tmp_path, form, unit):
    """Of 40 times all keep their order and their distances in days."""
    x = at(tmp_path, map(form, HOURS))
    assert x.day == 86_400 * unit
    days = np.sort(x.timestamps) / x.day
    assert np.allclose(days, HOURS / 86_400, atol=1.1 / 86_400) and len(set(x.timestamps)) == 40
    assert day_of(x.timestamps.min(), x.day) == "2020-09-13"
    sequences = make_sequences(x, index="time")
    assert np.allclose(sequences.days(30), np.arange(10, 0, -1) / 86.4, atol=1.1 / 86_400)
    order = np.argsort(x.timestamps)
    assert x.items[order].tolist() == [0, 1] * 20


def test_dates_of_long_ago_are_dates(tmp_path):
    """1990 to 1993, which as seconds would be no column of times that people have."""
    x = at(tmp_path, [f"{1990 + i // 12}-{1 + i % 12:02}-03" for i in range(40)])
    assert day_of(x.timestamps.min(), x.day) == "1990-01-03" and len(set(x.timestamps)) == 40


@pytest.mark.parametrize("form", [
    lambda t: (t - HOURS[0]) / 39_000, lambda t: (t - 1_600_020_000) / 1e4, lambda t: t / 86_400,
    lambda t: t - HOURS[0], lambda t: 2 + t // 1000 % 100])
def test_numbers_that_are_no_times_keep_their_order_and_have_no_days(tmp_path, form):
    """Scaled to 0..1, to a mean of 0, days since 1970, seconds since the first, places."""
    x = at(tmp_path, map(form, HOURS))
    assert x.day == 0 and x.items[np.argsort(x.timestamps)].tolist() == [0, 1] * 20
    with pytest.raises(ValueError, match="'time' wants data with times"):
        make_sequences(x, index="time")


def test_microseconds_and_nanoseconds_of_one_second_keep_their_order(tmp_path):
    for form in ("1600000000.{:06}", "1600000000{:09}", "2020-09-13 12:26:40.{:09}"):
        times = [form.format(i) for i in range(40)]
        x = at(tmp_path, times)
        assert x.items[np.argsort(x.timestamps)].tolist() == [0, 1] * 20, times[1]
        assert 0 < np.ptp(x.timestamps) / x.day < 1e-8


@pytest.mark.parametrize("form", [
    "{:%Y%m%d}", "{:%Y%m%d%H}", "{:%Y%m%d%H%M}", "{:%Y%m%d%H%M%S}", "{:%a, %d %b %Y %H:%M:%S GMT}",
    "{:%m/%d/%Y}"])
def test_dates_in_other_forms_are_refused_with_advice_for_the_column(tmp_path, form):
    """They are never read as seconds of 1970, and no flag is advised that would drop them all."""
    dates = [f'"{form.format(datetime.fromtimestamp(int(t), UTC))}"' for t in HOURS]
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"interactions.csv, line \d+: timestamp .*dates as "
                                             r"2020-09-13 .*40 of 40 lines are bad") as error:
            at(tmp_path, dates, skip_bad_lines=skip)
        assert "--skip-bad-lines" not in str(error.value)


@pytest.mark.parametrize("odd", [0, -1, 1_600_000, 1_600_000_000_000, "2020-09-13"])
def test_a_time_of_another_kind_than_the_column_is_a_bad_line(tmp_path, odd):
    times = [*HOURS[:30], odd]
    with pytest.raises(ValueError, match=r"line (\d+): timestamp .*drops 1 of 31 lines") as error:
        at(tmp_path, times)
    line = int(re.search(r"line (\d+)", str(error.value))[1])
    assert (tmp_path / "interactions.csv").read_text().splitlines()[line - 1].endswith(f",{odd}")
    x = at(tmp_path, times, skip_bad_lines=True)
    assert np.sort(x.timestamps).tolist() == HOURS[:30].tolist()
    assert x.steps[1:] == ("1 bad lines of interactions.csv dropped",)


def test_how_often_the_file_decides_is_said(tmp_path):
    """Neighbours are the 39 pairs of consecutive items of a user; another user has one item."""
    x = at(tmp_path, [*HOURS[:37], *HOURS[:3]])
    x = replace(x, users=np.append(x.users, 9), items=np.append(x.items, 0),
                timestamps=np.append(x.timestamps, HOURS[36]))
    assert describe_times(x) == ("times | 2020-09-13 to 2020-09-13 | 7.7 % of neighbours, "
                                 "consecutive items of a user, have equal times")
    rng, tied = np.random.default_rng(0), []
    x = Interactions(rng.integers(0, 9, 80), np.zeros(80, int), rng.integers(0, 9, 80), ["Heat"])
    for user in range(9):
        times = sorted(x.timestamps[x.users == user])
        tied += [one == other for one, other in itertools.pairwise(times)]
    assert f" | {100 * np.mean(tied):.1f} % of neighbours" in describe_times(x)
    text = describe_times(at(tmp_path, [1, 1, 2, 3]))
    assert "times | only an order, 1 to 3 | 33.3 % of" in text
    assert "\nwarning | at equal times the order of the file decides" in text
    assert "warning" not in describe_times(at(tmp_path, [*range(10), 9]))       # exactly a tenth


# ----------------------------------------------------------------------------------------------
# Bad lines: named by file and line, or counted


BAD_ROWS = {        # a line that is wrong in each format, and what is said about it
    "movielens": [("7::1::5", "3 fields, expected 4"), ("7::x::5::9", "id 'x'; wanted a whole"),
                  ("x::1::5::9", "id 'x'; wanted a whole number"),
                  ("7::1::5::99999999999999999999", "timestamp '99999999999999999999'; wanted"),
                  ("99999999999999999999::1::5::9", "id '9+'; wanted a whole number")],
    "ml-100k": [("7 1 5 9", "1 fields, expected 4"), ("7\t1\t5\tx", "timestamp 'x'")],
    "ml-latest-small": [("7,1,5", "3 fields, expected 4"), ('7,"1,5,9', "unexpected end of data"),
                        ('7,"1"0,5,9', "',' expected after '\"' .a quote at the beginning")],
    "lastfm": [("7\t1\t5\t1\t4", "5 fields"), ("7\t1\t5\t31\t2\t2009", "timestamp '2009-02-31'"),
               ("7\t1\t5\tx\t2\t2009", "timestamp '2009-02-0x'"),
               ("7\t1\t5\t1\t2\t99999999999999999999", "timestamp '99999999999999999999-02")],
    "steam": [("{u'username': u'x'", "not a Python dict literal"), ("7", "not a Python dict"),
              ("{u'username': u'x', u'product_id': u'1'}", "timestamp ''"),
              ("__import__('os').system('touch /tmp/owned')", "not a Python dict literal"),
              ("[" * 5_000, "not a Python dict literal"),
              ("-" * 100_000 + "1", "not a Python dict literal"),
              ("{u'date': [1], u'username': 1, u'product_id': u'1'}", "'list' object"),
              ("{u'date': '2017-12-17', u'username': [1], u'product_id': u'1'}", "unhashable"),
              ("{u'username': u'x', u'product_id': u'1', u'date': u'17.12.'}", "timestamp '17")],
    "own": [("u7,a", "2 fields, expected 3"), ("u7,a,soon", "timestamp 'soon'"),
            ("u7;a;5", "1 fields, expected 3 .it seems to be separated by semicolons; wanted comm"),
            ("user,item,timestamp", "timestamp 'timestamp'"), (",,", "timestamp ''")],
    "recbole": [("u7\ta\t3", "3 fields, expected 4"), ("u7\ta\t3\tsoon", "timestamp 'soon'")],
}
BAD_ITEMS = {
    "movielens": [("1::Ran::x", "item 1 is listed twice"), ("3::Ran", "2 fields, expected 3"),
                  ("x::Ran::x", "id 'x'; wanted a whole number")],
    "ml-100k": [("3|Ran|", "3 fields, expected 24")],
    "ml-latest-small": [("1,Ran,x", "item 1 is listed twice")],
    "lastfm": [("3\tRan", "2 fields, expected 4")],
    "steam": [("{u'id': u'3', u'title': 5}", "'int' object"), ("{}}", "not a Python"),
              ("{u'id': u'1', u'title': u'Ran'}", "listed twice, with different titles")],
    "own": [("a,Ran", "item a is listed twice"), ("c", "1 fields, expected 2")],
    "recbole": [("a\tRan\tx", "item a is listed twice")],
}


@pytest.mark.parametrize("kind, which, line, message", [
    (kind, which, line, message) for which, table in ((0, BAD_ROWS), (1, BAD_ITEMS))
    for kind, cases in table.items() for line, message in cases])
def test_a_bad_line_stops_with_its_place_or_is_counted(tmp_path, kind, which, line, message):
    name, *paths = write(kind, tmp_path)
    path = paths[which]
    number = add(path, line)
    with pytest.raises(ValueError, match=f"{path.name}, line {number}: .*({message})") as error:
        load_interactions(name, tmp_path)
    assert "--skip-bad-lines" in str(error.value) and len(str(error.value)) < 400
    x = load_interactions(name, tmp_path, skip_bad_lines=True)
    assert x.titles == ["Heat (1995)", "Amélie (2001)"] and x.items.tolist() == [1, 0]
    assert x.steps[1:] == (f"1 bad lines of {path.name} dropped",)


@pytest.mark.parametrize("kind, old, new, message", [
    ("own", ",", ";", "1 fields, expected 3 .it seems to be separated by semicolons"),
    ("own", ",", "\t", "1 fields, expected 3 .it seems to be separated by tabs"),
    ("own", "u7,", "1,u7,", "4 fields, expected 3"),
    ("own", "u7,b", 'u7,"b', "unexpected end of data .a quote at the beginning of a field"),
    ("recbole", "\t", ",", "1 fields.* wanted commas in CSV, tabs in RecBole's files")])
def test_a_fault_of_most_lines_is_told_and_no_flag_is_advised(tmp_path, kind, old, new, message):
    name, path, _ = write(kind, tmp_path)
    head, rows = path.read_text().split("\n", 1)
    path.write_text(f"{head}\n{rows.replace(old, new)}")
    for skip in (False, True):
        expected = f"{path.name}, line 2: {message}.* 2 of 2 lines are bad"
        with pytest.raises(ValueError, match=expected) as error:
            load_interactions(name, skip_bad_lines=skip)
        assert "--skip" not in str(error.value) and "docs/data.md" in str(error.value)


@pytest.mark.parametrize("kind", FILES)
def test_bytes_that_are_no_text_are_a_bad_line(tmp_path, kind):
    name, rows, _ = write(kind, tmp_path)
    rows.write_bytes(rows.read_bytes() + b"\xff\xfe\n")
    expected = "a Python dict" if kind == "steam" else "1 fields"
    with pytest.raises(ValueError, match=expected):
        load_interactions(name, tmp_path)
    assert len(load_interactions(name, tmp_path, skip_bad_lines=True).items) == 2


@pytest.mark.parametrize("kind", FILES)
def test_empty_files_and_lonely_ones_are_refused(tmp_path, kind):
    name, *paths = write(kind, tmp_path)
    for path in paths:
        whole = path.read_bytes()
        for header_only in (False, True):
            path.write_bytes(whole[:whole.index(b"\n") + 1] if header_only and kind in (
                "ml-latest-small", "lastfm", "own", "recbole") else b"")
            with pytest.raises(ValueError, match=f"{path.name}: holds no rows"):
                load_interactions(name, tmp_path)
        path.unlink()
        with pytest.raises(FileNotFoundError, match="not found|wanted interactions.csv"):
            load_interactions(name, tmp_path)
        path.write_bytes(whole)


PLAIN = "user,item,timestamp\nu8,a,7\nu7,b,9\n"
HEADS = "item,title\na,Heat\nb,Ran\n"


@pytest.mark.parametrize("change", [
    lambda text: text[:-1], lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"), lambda text: text.replace("\n", "\n\n \n"),
    lambda text: "\n" + text, lambda text: "\ufeff" + text, lambda text: text.replace(",", ", "),
    lambda text: text.replace(",", " ,\t").replace("\n", " \n "),
    lambda text: text.replace(",", '", "').replace("\n", '"\n"').join('""')[:-2],
    lambda text: "".join(f",{line}\n" for line in text.splitlines()),           # pandas' index
    lambda text: "".join(f'{line},"x\n\ny, ""z"""\n' for line in text.splitlines())])
def test_csv_is_read_as_programs_write_it(tmp_path, change):
    """Ends of lines, empty lines, a mark of UTF-8, blanks, quotes, an index, broken texts."""
    for packed in (False, True):
        for name, text in (("interactions.csv", PLAIN), ("items.csv", HEADS)):
            content = change(text).encode()
            put(tmp_path, {f"{name}.gz": gzip.compress(content)} if packed else {name: content})
        x = load_interactions(str(tmp_path))
        assert x.items.tolist() == x.users.tolist() == [0, 1] and x.titles == ["Heat", "Ran"]
        assert x.timestamps.tolist() == [7, 9] and x.steps == ("2 interactions, 2 users, 2 items",)
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_fault_after_broken_lines_has_the_line_of_the_file(tmp_path):
    rows = "user,text,item,time\n" + 'u,"one\n\ntwo",a,5\n' * 3 + '\nu,"x\ny",a,soon\n' + "u,,b,6\n"
    with pytest.raises(ValueError, match="s.csv, line 12: timestamp 'soon'.* drops 2 of 13 lines"):
        own(tmp_path, rows)
    x = own(tmp_path, rows, skip_bad_lines=True)
    assert len(x.items) == 4 and x.steps[1:] == ("2 bad lines of interactions.csv dropped",)


@pytest.mark.parametrize("content", [
    PLAIN.encode("utf-16"), PLAIN.encode("utf-16-be"), gzip.compress(PLAIN.encode()),
    b"PK\3\4\x14\0"])
def test_what_is_not_text_in_utf_8_is_named(tmp_path, content):
    with pytest.raises(OSError, match="interactions.csv: not a text in UTF-8; save it as one"):
        own(tmp_path, content)


def test_titles_in_another_encoding_are_named_line_by_line(tmp_path):
    items = HEADS + "".join(f"{i},Film {i}\n" for i in range(9))
    with pytest.raises(ValueError, match=r"items.csv, line 3: 'R.udce4n' is not encoded as UTF-8; "
                                         r"save the file as UTF-8.* drops 1 of 11"):
        own(tmp_path, PLAIN, items.replace("Ran", "Rän").encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 13: 'R.udcc3' is not encoded as UTF-8"):
        own(tmp_path, PLAIN, (items + "z,Rä").encode()[:-1])        # cut off within a character


def test_a_file_is_read_in_pieces_and_its_lines_stay_whole(tmp_path):
    name, rows, _ = write("own", tmp_path)
    n = 400_000                                         # 5 MB; a piece has 4
    rows.write_text("user,item,timestamp\n" + "".join(f"u,a,{i:07}\n" for i in range(n)))
    assert load_interactions(name).timestamps.tolist() == list(range(n))


def test_damaged_gzip_and_endless_lines_are_refused(tmp_path, monkeypatch):
    name, rows, _ = write("movielens", tmp_path)
    packed = rows.with_name("ratings.dat.gz")
    whole = gzip.compress(rows.read_bytes() * 50)
    rows.unlink()
    for damaged in (whole[:-10], b"not gzip at all", whole[:20] + b"\xff" * 9 + whole[29:]):
        packed.write_bytes(damaged)
        with pytest.raises(OSError, match="ratings.dat.gz: damaged gzip"):
            load_interactions(name, tmp_path)
    packed.write_bytes(gzip.compress(b"1" * 3 * 2**24))         # 50 MB in one line, 50 kB packed
    with pytest.raises(OSError, match="more than 16,777,216 bytes in a line"):
        load_interactions(name, tmp_path)
    monkeypatch.setitem(FORMATS, name, replace(FORMATS[name], most_bytes=4_000_000))
    packed.write_bytes(gzip.compress(b"7::1::3::99\n" * 500_000))   # a bomb for a file this size
    with pytest.raises(OSError, match="or 4,000,000 in all; this is not a file of this format"):
        load_interactions(name, tmp_path)


# ----------------------------------------------------------------------------------------------
# Ids, and items without a title


@pytest.mark.parametrize("rows, users, items", [
    (["1,2.0", "1,2", "1.0,2", " 1 , 2 "], [0] * 4, [1] * 4),
    (["1.0,2", "2,2.0", "2.00,1", "02,1"], [0, 1, 1, 2], [1, 1, 0, 0]),
    (["02.0,2", "2,2", "02,2"], [0, 1, 0], [1] * 3), (["1.,2"], [0], [1]),
    (["x.0,2", "x,2", "1.5,2", "1,2"], [0, 1, 2, 3], [1] * 4)])
def test_one_id_is_one_id_however_it_is_written(tmp_path, rows, users, items):
    """Only what pandas adds to whole numbers is left out: "02" and "1.5" are ids of their own."""
    text = "".join(f"{row},5\n" for row in rows)
    x = own(tmp_path, "user,item,time\n" + text, "item,title\n1.0,Heat\n2,Ran\n")
    assert x.users.tolist() == users and x.items.tolist() == items


@pytest.mark.parametrize("missing", ["", " ", "nan", "NaN", "None", "<NA>", "NULL", "NA"])
def test_what_is_missing_is_dropped_and_counted_and_never_an_id(tmp_path, missing):
    rows = f"u,a,5\n{missing},a,6\n{missing},b,7\nu,{missing},8\nv,b,9\n"
    x = own(tmp_path, f"user,item,time\n{rows}",
            f"item,title\na,Heat\nb,Ran\nc,{missing}\n{missing},Alien\n")
    assert x.users.tolist() == [0, 1] and x.timestamps.tolist() == [5, 9]
    assert x.titles == ["Heat", "Ran"] and x.steps == (
        "5 interactions, 2 users, 2 items", "2 items without an id or a title dropped",
        "3 interactions without a user or an item dropped")
    with pytest.raises(ValueError, match="no interaction has a user and an item with a title"):
        own(tmp_path, f"user,item,time\n{missing},a,5\n")


def test_published_ids_mean_what_they_say(tmp_path):
    """On Steam a user may call himself "nan", "12.0" or "12"."""
    name, rows, _ = write("steam", tmp_path)
    rows.write_text("".join(f"{{'username': '{u}', 'product_id': '1', 'date': '2017-12-16'}}\n"
                            for u in ("nan", "12", "12.0", "nan", " 12")))
    add(rows, "{u'username': u'x', u'date': u'2017-12-17'}")
    x = load_interactions(name, tmp_path)
    assert x.users.tolist() == [0, 1, 2, 0, 3]
    assert x.steps[1:] == ("1 interactions without a user or an item dropped",)


UNLISTED = {"movielens": "7::99::5::9", "ml-latest-small": "7,99,5,9",
            "lastfm": "7\t99\t5\t1\t4\t2009", "own": "u7,zz,5", "recbole": "u7\tzz\t1\t5",
            "steam": "{u'username': u'x', u'product_id': u'9', u'date': u'2017-12-17'}"}


@pytest.mark.parametrize("kind", UNLISTED)
def test_up_to_a_tenth_of_the_interactions_may_have_items_without_a_title(tmp_path, kind):
    name, rows, items = write(kind, tmp_path)
    good = rows.read_text().splitlines()[-1]
    add(rows, *[good] * 7, UNLISTED[kind])
    x = load_interactions(name, tmp_path)
    assert len(x.items) == 9 and x.steps[:2] == (
        "10 interactions, 1 users, 3 items", "1 interactions with items that have no title dropped")
    add(rows, UNLISTED[kind])
    said = (rf"2 of 11 interactions are with items for which {items.name} has no title, such as "
            r"(9|99|zz); it lists 2 ids, such as [1a], [2b]\. .*; --drop-untitled goes on without")
    with pytest.raises(ValueError, match=said):
        load_interactions(name, tmp_path, skip_bad_lines=True)
    assert len(load_interactions(name, tmp_path, drop_untitled=True).items) == 9


def test_files_that_do_not_belong_together_are_named_with_their_ids(tmp_path):
    with pytest.raises(ValueError, match="4 of 4 interactions.* such as 001, 002, 003; it lists 2 "
                       "ids, such as 1, 2. Both files want the same ids, letter for letter$"):
        own(tmp_path, "user,item,time\n" + "".join(f"u,00{i},5\n" for i in range(1, 5)),
            "item,title\n1,Heat\n2,Ran\n")


def test_a_user_is_numbered_by_the_first_row_that_counts(tmp_path):
    """So what is dropped has no say in the order of users, and in what is drawn by it."""
    rows = "".join(f"u{n},a,5\n" for n in range(20))
    x = own(tmp_path, f"user,item,time\nu19,zz,1\n,a,1\n{rows}")
    assert x.users.tolist() == list(range(20))
    assert x.steps[0] == "22 interactions, 20 users, 2 items"


@pytest.mark.parametrize("kind, lines, steps", [
    ("steam", ["{u'title': u'no id'}", "{u'id': u'3'}", "{u'id': u'1', u'title': u'Heat (1995)'}"],
     ("2 items without an id or a title dropped", "1 items listed again dropped")),
    ("lastfm", ["3\t\tu\tp", "\tRan\tu\tp"], ("2 items without an id or a title dropped",)),
    ("movielens", ["1::Heat (1995)::War", "3:: ::x"],
     ("1 items listed again dropped", "1 items without an id or a title dropped"))])
def test_items_that_say_nothing_new_are_dropped_and_counted(tmp_path, kind, lines, steps):
    name, _, items = write(kind, tmp_path)
    add(items, *lines)
    x = load_interactions(name, tmp_path)
    assert x.titles == ["Heat (1995)", "Amélie (2001)"] and x.steps[1:] == steps


def test_repeated_titles_become_unique_and_never_collide(tmp_path):
    assert unique_titles(["A", "B", "A", "A"]) == ["A", "B", "A [2]", "A [3]"]
    titles = unique_titles(["A", "A", "A [2]", "A"])
    assert titles[0] == "A" and titles[2] == "A [2]" and len(set(titles)) == 4
    x = own(tmp_path, "user,item,time\nme,a,5\n", 'item,title\na,Heat\nb,"He\nat"\nc, Heat\n')
    assert x.titles == ["Heat", "He at", "Heat [2]"]            # a prompt has a title in one line
    assert x.steps[1:] == ("1 items got a number, because others have the same title, as "
                           "'Heat [2]'",)


# ----------------------------------------------------------------------------------------------
# A folder of one's own, and the names of its columns


def own(folder, rows, items="item,title\na,Heat\nb,Ran\n", **options):
    put(folder, {"interactions.csv": rows, "items.csv": items})
    return load_interactions(str(folder), **options)


def test_a_folder_of_ones_own_is_read_by_column_names(tmp_path):
    x = own(tmp_path, '\ufefftimestamp,rating,item,user\n2020-01-02,5,"a,b",me\n'
            '2020-01-01,5,c,me\n', 'title,item\n"Say ""Hi""","a,b"\nRan,c\n', domain="games")
    assert x.titles == ['Say "Hi"', "Ran"] and x.items.tolist() == [0, 1] and x.domain == "games"
    assert x.day            # dates; small numbers are places, see test_each_format
    x = own(tmp_path, "user,timestamp,item\r\nme,5,a\r\nme,6,b\r\n")
    assert x.items.tolist() == [0, 1]
    for path, what in (("netflix", "there is no such folder"),
                       (str(tmp_path / "items.csv"), "that is a file")):
        said = f"unknown data set '{path}': {what}; known are .*, or a folder with"
        with pytest.raises(ValueError, match=said):
            load_interactions(path, tmp_path)


def test_movielens_files_are_read_under_the_name_of_their_folder_and_as_ones_own(tmp_path):
    """MovieLens 25M has the format of the small one."""
    put(tmp_path / "ml-25m", FILES["ml-latest-small"][1])
    one, two = load_interactions("ml-25m", tmp_path), load_interactions(str(tmp_path / "ml-25m"))
    assert one.users.tolist() == [7, 7] and two.users.tolist() == [0, 0]
    for x in (one, two):
        assert x.titles == ["Heat (1995)", "Amélie (2001)"] and x.domain == "movies"


@pytest.mark.parametrize("rows, items", [
    ("event_time,event_type,product_id,user_id|5,view,p,me", "product_id,title|p,Heat"),
    ("user_id,asin,parent_asin,timestamp|me,v,p,5", "asin,title|p,Heat"),
    ("user_id,asin,parent_asin,timestamp|me,v,p,5", "asin,title,parent_asin|v,Heat,p"),
    ("user_id,asin,parent_asin,timestamp|me,v,p,5", "title,parent_asin|Heat,p"),
    ("user,asin,unixReviewTime|me,p,5", "asin,title|p,Heat"),
    ("user,item,ts|me,p,5", "app_name,id,title|other,p,Heat"),
    ("visitorid,itemid,timestamp|me,p,5", "itemid,app_name|p,Heat")])
def test_the_columns_of_known_data_are_found(tmp_path, rows, items):
    """Where Amazon's variant and product are both there, it is the product that is joined."""
    x = own(tmp_path, *(text.replace("|", "\n") + "\n" for text in (rows, items)))
    assert x.titles == ["Heat"] and x.items.tolist() == [0] and x.timestamps.tolist() == [5]


@pytest.mark.parametrize("files, found", [
    ([], "nothing"), (["interactions.csv", "x.item"], "interactions.csv, x.item"),
    (["a.inter", "a.item", "b.inter", "b.item"], "a.inter, a.item, b.inter, b.item"),
    (["a.inter", "b.item"], "a.inter, b.item")])
def test_a_folder_must_hold_one_pair_of_files(tmp_path, files, found):
    put(tmp_path, dict.fromkeys(files, "x"))
    with pytest.raises(FileNotFoundError, match=f"wanted interactions.csv.*; found {found}$"):
        load_interactions(str(tmp_path))


@pytest.mark.parametrize("header, items", [
    ("user,item,timestamp", "item,title"), ("userId,movieId,timestamp", "movieId,title"),
    ("user_id,item_id,time", "item_id,name"), ("uid,itemId,date", "id,movie_title"),
    ("User ID,Product ID,Date Time", "Product ID,Product Name"),
    ("USER,asin,unixReviewTime", "asin,title"), ("reviewerID,product_id,rated_at", "product,Title"),
    ("user-id,artistId,datetime", "artist,Artist Name"),
    ('"user","gameId",created_at', "game,name"), (" User , item ,TIMESTAMP", "Item Id, Item_Title"),
    ("\ufeffuserID,book_id,time", "\ufeffid,name"),
    ('\ufeff"user id","isbn","time"', "isbn,book_title")])
def test_headers_are_understood_in_common_spellings(tmp_path, header, items):
    x = own(tmp_path, f"{header}\nme,b,5\nme,a,4\n", f"{items}\na,Heat\nb,Ran\n")
    assert x.items.tolist() == [1, 0] and x.titles == ["Heat", "Ran"]
    assert x.timestamps.tolist() == [5, 4]


@pytest.mark.parametrize("header, items, message", [
    ("who,item,timestamp", "item,title", "interactions.csv, line 1: the header has no column for "
     "the user; its columns are who, item, timestamp. Wanted in .* such as user, userid, uid, "),
    ("user,thing,timestamp", "item,title", "no column for the item; .* item, movie, product"),
    ("user,item,when", "item,title", "no column for the time; .* time, timestamp"),
    ("1,2,3", "item,title", "no column for the user; its columns are 1, 2, 3. Wanted in the first"),
    ("user;item;time", "item,title", "interactions.csv, line 1: .*user;item;time .it seems to be "
     "separated by semicolons; wanted commas in CSV"),
    ("user,item,time", "item\ttitle", "items.csv, line 1: .*separated by tabs"),
    ("user,time,asin,product_id", "item,title", "more than one column for the item: asin, product_"
     "id. Give another name to all .* one that counts, which holds the same ids in both files"),
    ("user,id,time", "item,title", "interactions.csv, line 1: .* no column for the item"),
    ("user,item;time", "item,title", "no column for the item; its columns are user, item;time"),
    ("user,item,movieId", "item,title", "more than one column for the item: item, movieId"),
    ("user,User ID,item", "item,title", "more than one column for the user"),
    ("user,item,time", "item,text", "items.csv, line 1: .* no column for the title; .* title, n"),
    ("user,item,time", "key,title", "items.csv, line 1: .* no column for the id; .* product"),
    ("user,item,time", "id,item", "items.csv, line 1: .* more than one column for the id"),
    ("user,item,time", "item,title,name", "more than one column for the title")])
def test_a_header_that_can_be_misunderstood_is_refused(tmp_path, header, items, message):
    filled = ("\n" + ",".join("abcde"[:names.count(",") + 1]) + "\n" for names in (header, items))
    rows, titles = (names + line for names, line in zip((header, items), filled))
    for skip in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            own(tmp_path, rows, titles, skip_bad_lines=skip)
        assert ("capitals, blanks and underscores do not matter" in str(error.value)) == (
            "more than one" not in message)
        assert "\n" not in str(error.value) and "--skip" not in str(error.value)


def test_no_name_of_a_column_fits_two_roles():
    roles = [role for role in COLUMNS if role != "id"]
    for one, other in itertools.combinations(roles, 2):
        assert not set(COLUMNS[one]) & set(COLUMNS[other])
    assert find_columns(["year", "user", "day", "month"], ("day", "year"))("abcd") == ("c", "a")


def test_the_page_about_data_shows_every_name_and_is_short():
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[\w-]+", page))
    for role in ("user", "item", "time"):
        assert {name for name in COLUMNS[role] if name.removesuffix("id") not in THINGS} <= words
    assert {*THINGS, "title", "name", *FORMATS, "id"} | {name.strip("<>") for name in MISSING
                                                         if "/" not in name} - {""} <= words
    lines = page.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100


# ----------------------------------------------------------------------------------------------
# Fetching


class Files(BaseHTTPRequestHandler):
    """Serves bytes by name; may break off half-way, or fall silent there."""

    contents: dict[str, bytes]
    asked: list[str]
    breaks: list[int]
    silent: threading.Event

    def do_GET(self):
        body = self.contents.get(self.path.rpartition("/")[2])
        self.asked.append(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:self.breaks.pop() if self.breaks else None])
        self.wfile.flush()
        self.silent.wait(30)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server():
    handler = type("Handler", (Files,), {"contents": {}, "asked": [], "breaks": [],
                                         "silent": threading.Event()})
    handler.silent.set()
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    handler.address = f"http://127.0.0.1:{running.server_port}"
    yield handler
    handler.silent.set()
    running.shutdown()


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def archive(server, tmp_path, monkeypatch):
    """The bytes of an ml-1m.zip that the server has, with its sha256 known."""
    folder, files = FILES["movielens"]
    body = zipped(tmp_path / "x.zip", {"README": "read me"} | {
        f"{folder}/{name}": content for name, content in files.items()}).read_bytes()
    server.contents["ml-1m.zip"] = body
    monkeypatch.setitem(FORMATS, "movielens", replace(FORMATS["movielens"], downloads=(Download(
        f"{server.address}/ml-1m.zip", "1 kB", hashlib.sha256(body).hexdigest()),)))
    return body


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_data_set_is_fetched_checked_unpacked_and_kept(server, archive, tmp_path, capsys):
    data = tmp_path / "data"
    x = load_interactions("movielens", data)
    assert x.titles == ["Heat (1995)", "Amélie (2001)"]
    assert everything(data) == ["ml-1m.zip", "ml-1m/movies.dat", "ml-1m/ratings.dat"]
    assert "(1 kB)" in capsys.readouterr().out and len(server.asked) == 1
    load_interactions("movielens", data)
    (data / "ml-1m/movies.dat").unlink()        # taken out of the kept archive again
    load_interactions("movielens", data)
    assert len(server.asked) == 1


def test_a_download_that_breaks_off_or_is_another_one_is_never_used(server, archive, tmp_path):
    data = tmp_path / "data"
    server.breaks.append(100)
    with pytest.raises(FileNotFoundError, match="fetching .* failed .100 of 409 bytes arrived"):
        load_interactions("movielens", data)
    server.contents["ml-1m.zip"] = archive[:-1] + b"x"
    with pytest.raises(FileNotFoundError, match="has the sha256 .*Save it .1 kB. as .*1m.zip"):
        load_interactions("movielens", data)
    assert not list(data.iterdir())
    (data / "ml-1m.zip").write_bytes(b"put here by hand")
    with pytest.raises(ValueError, match="data/ml-1m.zip: has the sha256 .* Remove it and run"):
        load_interactions("movielens", data)
    (data / "ml-1m.zip").write_bytes(archive)                   # the right one, by hand
    assert len(load_interactions("movielens", data).items) == 2
    assert len(server.asked) == 2


def without_sums(monkeypatch):
    """Take the published sha256 of ml-1m.zip away."""
    form = FORMATS["movielens"]
    monkeypatch.setitem(FORMATS, "movielens", replace(form, downloads=(
        replace(form.downloads[0], sha256=None),)))


def test_an_archive_without_a_sha256_is_checked_when_it_is_unpacked(archive, tmp_path, monkeypatch):
    without_sums(monkeypatch)
    (tmp_path / "ml-1m.zip").write_bytes(archive[:200])
    with pytest.raises(ValueError, match="ml-1m.zip: damaged zip archive .*Remove it and run"):
        find_files("movielens", tmp_path)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html>\n<p>Log in</p>", b"\n <html>busy</html>"])
@pytest.mark.parametrize("summed", [False, True])
def test_a_web_page_instead_of_the_file_is_named(server, archive, tmp_path, page, summed,
                                                 monkeypatch):
    if not summed:
        without_sums(monkeypatch)
    server.contents["ml-1m.zip"] = page
    data = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=f"fetching {server.address}/ml-1m.zip failed .*: "
                       f"is a web page, .*html.*Save it .* as {data}/ml-1m.zip"):
        find_files("movielens", data)
    assert not list(data.iterdir())
    (data / "ml-1m.zip").write_bytes(page)              # saved from a browser
    with pytest.raises(ValueError, match=f"{data}/ml-1m.zip: is a web page.* {server.address}"):
        find_files("movielens", data)


def test_a_silent_or_a_lost_server_ends_in_one_line_and_leaves_nothing(server, archive, tmp_path,
                                                                       monkeypatch):
    """Before the answer, within it, and where the connection is reset."""
    monkeypatch.setattr("support.datasets.SILENCE", 0.3)
    without_sums(monkeypatch)
    server.silent.clear()
    server.breaks.append(100)
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match="failed .timed out.. Save it"):
        find_files("movielens", tmp_path / "data")
    server.do_GET = lambda self: self.silent.wait(30)
    with pytest.raises(FileNotFoundError, match="failed .*timed out.*. Save it"):
        find_files("movielens", tmp_path / "data")
    assert time.monotonic() - started < 10

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
    server.do_GET = reset
    with pytest.raises(FileNotFoundError, match="failed .*Connection reset by peer.*. Save it"):
        find_files("movielens", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_without_a_network_the_message_gives_address_size_and_target(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find_files("movielens", tmp_path)
    for part in ("https://files.grouplens.org/datasets/movielens/ml-1m.zip", "5.9 MB",
                 str(tmp_path / "ml-1m.zip"), "no network in tests", "--data synthetic"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"steam_reviews.json.gz.*1.3 GB"):
        find_files("steam", tmp_path)
    assert not everything(tmp_path)


def test_a_server_that_fails_is_reported_in_one_line(server, archive, tmp_path):
    server.contents.clear()
    with pytest.raises(FileNotFoundError, match="failed .HTTP Error 404: Not Found.. Save it"):
        find_files("movielens", tmp_path)
    server.do_GET = lambda self: self.wfile.write(b"this is not HTTP\r\n\r\n")
    with pytest.raises(FileNotFoundError, match="failed .this is not HTTP.. Save it"):
        find_files("movielens", tmp_path)


def test_a_gzipped_file_is_fetched_as_it_is(server, tmp_path, monkeypatch):
    files = FILES["steam"][1]
    server.contents |= {f"{file}.gz": gzip.compress(text.encode()) for file, text in files.items()}
    monkeypatch.setitem(FORMATS, "steam", replace(FORMATS["steam"], downloads=tuple(
        Download(f"{server.address}/{file}.gz", "1 kB") for file in files)))
    assert len(load_interactions("steam", tmp_path / "data").items) == 2
    assert everything(tmp_path / "data/steam-mcauley") == [
        "steam_games.json.gz", "steam_reviews.json.gz"]


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.txt", "a/../../a.txt", "C:/a.txt"])
def test_an_archive_has_no_say_in_where_its_files_go(tmp_path, name):
    unpack(zipped(tmp_path / "x.zip", {name: "fine", "../b.txt": "evil"}), tmp_path / "in/out",
           ["a.txt"], 1_000)
    assert everything(tmp_path) == ["in/out/a.txt", "x.zip"]
    assert (tmp_path / "in/out/a.txt").read_text() == "fine"


def test_bombs_damaged_and_wrong_archives_are_refused(tmp_path):
    out = tmp_path / "out"
    bomb = zipped(tmp_path / "bomb.zip", {"a.txt": b"0" * 10_000_000})
    assert bomb.stat().st_size < 20_000
    with pytest.raises(ValueError, match="declares 10,000,000 bytes, but at most 1,000 are"):
        unpack(bomb, out, ["a.txt"], 1_000)
    with pytest.raises(ValueError, match="holds no b.txt. Is it the right archive"):
        unpack(bomb, out, ["b.txt"], 10**8)
    assert not out.exists()
    whole = zipped(tmp_path / "w.zip", {"a.txt": bytes(range(256)) * 100}).read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", whole[:60] + b"\0\0\0\0" + whole[64:]):
        (tmp_path / "d.zip").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged zip archive"):
            unpack(tmp_path / "d.zip", out, ["a.txt"], 10**8)
        assert not (out / "a.txt").exists()


# ----------------------------------------------------------------------------------------------
# The paper's preparation


def rows(*triples) -> Interactions:
    users, items, times = (np.array(column) for column in zip(*triples))
    return Interactions(users, items, times, [f"t{i}" for i in range(items.max() + 1)])


def test_kept_rows_are_counted_and_renumber_the_items():
    x = rows((5, 0, 1), (5, 2, 2), (6, 3, 3), (6, 2, 4))
    assert counts(x) == {"interactions": 4, "users": 2, "items": 3}
    y = keep(keep(x, x.items != 0, "no t0"), np.array([True, False, True]), "two", all_items=True)
    assert (y.users.tolist(), y.items.tolist(), y.timestamps.tolist()) == ([5, 6], [0, 0], [2, 4])
    assert y.titles == ["t2", "t3"] and x.titles == ["t0", "t1", "t2", "t3"]
    assert y.steps == ("no t0: 3 interactions, 2 users, 2 items", "two: 2 interactions, 2 users, "
                       "1 items")
    with pytest.raises(ValueError, match="nothing is left after the step 'none'"):
        keep(x, x.items > 9, "none")


def test_repeats_keep_a_users_first_and_row_order():
    x = rows((1, 0, 50), (1, 1, 60), (1, 0, 40), (2, 0, 5), (1, 1, 60), (2, 0, 5))
    y = first_of_each_pair(x)
    assert list(zip(y.users, y.items, y.timestamps)) == [(1, 1, 60), (1, 0, 40), (2, 0, 5)]
    assert y.steps == ("first of each user and item, 3 repeats dropped: 3 interactions, 2 users, "
                       "2 items",)
    assert first_of_each_pair(y) is y
    assert prepare(x, "own").steps[0].startswith("first of each user and item, 3 repeats dropped; "
                                                 "--keep-repeats keeps them: ")
    assert "--keep" not in prepare(x, "ml-100k").steps[0]
    assert prepare(x, "own", keep_repeats=True) is x
    cold = Interactions(x.users, x.items, x.timestamps, [*x.titles, "nobody took it yet"])
    assert first_of_each_pair(cold).titles == cold.titles       # no filter: it stays a candidate


def test_a_user_with_a_million_rows_is_one_user():
    """Ten million take ten times as long; nothing is quadratic."""
    n = 1_000_000
    x = Interactions(np.zeros(n, dtype=np.int64), np.arange(n) % 5_000, np.arange(n)[::-1].copy(),
                     [str(i) for i in range(5_000)])
    s = make_sequences(x)
    assert len(s) == n - 3
    assert [len(part) for part in split_by_time(s)] == [799_997, 100_000, 100_000]
    first = first_of_each_pair(x)
    assert sorted(first.timestamps) == list(range(5_000)) and (np.diff(first.timestamps) < 0).all()


def brute_core(triples, least):
    """Drop until nothing drops, one loop at a time."""
    triples = list(triples)
    while True:
        kept = [(u, i, t) for u, i, t in triples
                if len({b for a, b, _ in triples if a == u}) >= least
                and len({a for a, b, _ in triples if b == i}) >= least]
        if kept == triples:
            return kept
        triples = kept


def test_the_core_equals_brute_force():
    rng = np.random.default_rng(3)
    pairs = sorted({(int(u), int(i)) for u, i in zip(rng.integers(30, size=160),
                                                     rng.integers(25, size=160))})
    triples = [(u * 10**12, i, t) for t, (u, i) in enumerate(pairs)]    # any numbers for users
    x, expected = core(rows(*triples), 4), brute_core(triples, 4)
    assert 0 < len(expected) < len(triples)
    assert [(u, x.titles[i], t) for u, i, t in zip(x.users, x.items, x.timestamps)] == [
        (u, f"t{i}", t) for u, i, t in expected]
    assert len(x.titles) == len({i for _, i, _ in expected}) and len(x.steps) == 1
    with pytest.raises(ValueError, match="nothing is left after the step '40-core'"):
        core(rows(*triples), 40)


def test_samples_take_whole_users_up_to_the_share_and_depend_on_the_seed():
    ids = np.repeat(np.arange(100), np.arange(1, 101))
    for share, by_rows in itertools.product((0.1, 0.5), (False, True)):
        drawn = sample_of(ids, share, np.random.default_rng(0), by_rows)
        sizes = np.bincount(ids, weights=drawn, minlength=100)
        assert set(sizes / np.arange(1, 101)) == {0.0, 1.0}
        size = drawn.mean() if by_rows else (sizes > 0).mean()
        assert share - 0.02 < size <= share
    other = sample_of(ids, 0.5, np.random.default_rng(1))
    assert (other != sample_of(ids, 0.5, np.random.default_rng(0))).any()
    assert sample_of(ids, 1.0, np.random.default_rng(0)).all()
    hundred = np.arange(100)                            # 0.29 * 100 is a little below 29 in floats
    assert sample_of(hundred, 0.29, np.random.default_rng(0)).sum() == 29


def crowd(users=60, items=40, each=25) -> Interactions:
    rng = np.random.default_rng(0)
    return rows(*[(u, int(i), int(rng.integers(10**6))) for u in range(users)
                  for i in rng.choice(items, each if u % 2 else 5, replace=False)])


def steps_of(x) -> list[str]:
    return [step.partition(":")[0] for step in x.steps]


def test_steam_takes_users_with_20_games_then_a_third_of_users_and_games():
    x = prepare(crowd(), "steam")
    assert steps_of(x) == ["users with 20 games or more", "0.333 of the users, drawn",
                           "0.333 of the games, drawn"]
    assert re.search("750 interactions, 30 users", x.steps[0])
    assert re.search("250 interactions, 10 users", x.steps[1]) and len(x.titles) == 13
    assert len(prepare(crowd(), "steam", 1.0).steps) == 1
    assert counts(prepare(crowd(each=20), "steam", 1.0))["users"] == 30
    with pytest.raises(ValueError, match="nothing is left"):
        prepare(crowd(each=19), "steam", 1.0)
    one, two = prepare(crowd(), "steam", seed=1), prepare(crowd(), "steam", seed=1)
    assert one.titles == two.titles != x.titles


def test_movielens_takes_the_5_core_then_users_with_a_tenth_of_the_interactions():
    x = prepare(crowd(), "movielens")
    assert steps_of(x) == ["5-core", "users drawn to have 0.1 of the interactions"]
    assert 0.06 * 900 < len(x.users) <= 0.1 * 900
    assert len(prepare(crowd(), "ml-1m", 1.0).steps) == 1
    assert prepare(crowd(), "ml-100k").steps == ()


@pytest.mark.parametrize("sample", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(sample):
    with pytest.raises(ValueError, match="--sample is"):
        prepare(crowd(), "movielens", sample)


def lastfm_rows() -> Interactions:
    """Four users tag four artists in file order 0..3, on other days; user 4 tags two."""
    triples = [(u, a, 12 * 10**8 + 86_400 * ((7 * a + u) % 5)) for u in range(4) for a in range(4)
               for _ in range(2)]
    return rows(*triples, (4, 0, 12 * 10**8), (4, 4, 12 * 10**8), (0, 1, -10**8), (1, 1, 3 * 10**8))


def test_lastfm_keeps_the_order_of_the_file_unless_told_to_take_the_dates():
    x = prepare(lastfm_rows(), "lastfm")
    assert steps_of(x) == [
        "first of each user and item, 18 repeats dropped", "artists with 4 users or more",
        "users with 4 artists or more",
        "order by artist number, as the field uses it, not by time (D9); --chronological takes "
        "dates"]
    assert not x.day and len(x.users) == 16 and x.timestamps.tolist() == [0, 1, 2, 3] * 4
    assert make_sequences(x, 3).history(0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="index 'time' wants data with times"):
        make_sequences(x, index="time")
    dated = prepare(lastfm_rows(), "lastfm", chronological=True)
    assert dated.day and dated.timestamps.min() == 12 * 10**8       # 1966 and 1979 are gone
    days = [(7 * a) % 5 for a in range(4)]
    assert make_sequences(dated, 3).history(0).tolist() == np.argsort(days)[:3].tolist()
    with pytest.raises(ValueError, match="--chronological goes with --data lastfm"):
        prepare(crowd(), "ml-100k", chronological=True)


# ----------------------------------------------------------------------------------------------
# The real files, where they are at hand


def test_real_movielens_gives_the_paper_s_interactions(real_data):
    raw = load_interactions("movielens", real_data)
    x = prepare(raw, "movielens", sample=1.0)
    assert counts(x) == {"interactions": 999_611, "users": 6_040, "items": 3_416}
    assert 99_000 < len(prepare(raw, "movielens").users) <= 99_962


def test_real_movielens_100k_and_latest_small_give_the_known_counts(real_data):
    x = load_interactions("ml-100k", real_data)
    assert counts(x) == {"interactions": 100_000, "users": 943, "items": 1_682}
    assert len(set(x.titles)) == 1_682 and "Chasing Amy (1997) [2]" in x.titles
    assert x.steps == ("100,000 interactions, 943 users, 1,682 items", "18 items got a number, "
                       "because others have the same title, as 'Chasing Amy (1997) [2]'")
    train, valid, test = split_by_time(make_sequences(x))
    assert (len(train) + len(valid) + len(test), len(test)) == (97_171, 9_718)
    x = load_interactions("ml-latest-small", real_data)
    assert counts(x) == {"interactions": 100_836, "users": 610, "items": 9_724}


def test_real_lastfm_gives_the_sequences_the_field_uses(real_data):
    """The rows of LLaRA's release, user by user and title by title; 46,896 training rows."""
    raw = load_interactions("lastfm", real_data)
    x = prepare(raw, "lastfm")
    assert counts(x) == {"interactions": 56_794, "users": 1_220, "items": 4_606}
    theirs = load_interactions(str(real_data / "lastfm-llara"))

    def by_user(x):
        order = np.lexsort((x.timestamps, x.users))
        bare = [re.sub(r' \[\d+\]$|"', "", title) for title in x.titles]  # theirs has no quotes
        return [[bare[i] for i in x.items[order][x.users[order] == u]] for u in np.unique(x.users)]
    assert by_user(x) == by_user(theirs)
    lines = (real_data / "lastfm-llara/users.csv").read_text().splitlines()[1:]
    trained = [line.split(",")[2] == "train" for line in lines]         # in the users' order
    lengths = np.unique(x.users, return_counts=True)[1]
    assert np.maximum(0, lengths - 4)[trained].sum() == 46_896
    assert prepare(raw, "lastfm", chronological=True).day == 86_400
    assert raw.steps[:2] == ("186,478 interactions, 1,892 users, 12,523 items",     # as published
                             "1,538 interactions with items that have no title dropped")
    dated = describe_times(prepare(raw, "lastfm", chronological=True))
    assert "| 87.4 % of neighbours" in dated and "\nwarning | at equal times" in dated


def test_real_steam_games_are_read_whole(real_data, tmp_path):
    games = real_data / "steam-mcauley/steam_games.json.gz"
    put(tmp_path / "steam-mcauley", {
        "steam_games.json": gzip.decompress(games.read_bytes()),
        "steam_reviews.json":
            "{u'username': u'x', u'product_id': u'612880', u'date': u'2017-12-17'}\n"})
    x = load_interactions("steam", tmp_path)
    assert len(x.titles) == 32_131 and x.titles[x.items[0]] == "Wolfenstein II: The New Colossus"
    assert x.steps[1:3] == ("3 items without an id or a title dropped",
                            "1 items listed again dropped")
    x = load_interactions(str(real_data / "steam-100k"), domain="games")
    assert counts(x) == {"interactions": 126_824, "users": 10_369, "items": 3_593}
    assert len(first_of_each_pair(x).users) == 126_824 - 2_635
