"""datasets.py: every raw format to the row, fetching and unpacking, the paper's preparation."""

import gzip
import hashlib
import itertools
import re
import threading
import urllib.error
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import datasets
from data import make_sequences, split_by_time
from datasets import (FORMATS, LATEST, Download, Interactions, core, download, find_files,
                      first_of_each_pair, load_interactions, prepare, sample_of, seconds,
                      unique_titles, unpack)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, request):
    """Nothing here leaves the machine."""
    if "server" not in request.fixturenames:
        def refuse(*args, **kwargs):
            raise urllib.error.URLError("no network in tests")
        monkeypatch.setattr("urllib.request.urlopen", refuse)


# ----------------------------------------------------------------------------------------------
# One small folder of each format


def put(folder, **files):
    """Files by name, `_` for the last dot; str as UTF-8, bytes as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        content = content.encode() if isinstance(content, str) else content
        (folder / f"{stem}.{ending}").write_bytes(content)


def movielens_1m(root):
    put(root / "ml-1m", ratings_dat="7::2::5::100\n7::1::3::99\n",
        movies_dat="1::Heat (1995)::Action\n2::Amélie (2001)::Comedy\n".encode("latin-1"))
    return "movielens", root


def movielens_100k(root):
    put(root / "ml-100k", u_data="7\t2\t4\t100\n7\t1\t4\t99\n",
        u_item=("1|Heat (1995)|" + "|" * 21 + "\n2|Amélie (2001)|" + "|" * 21 + "\n"
                ).encode("latin-1"))
    return "ml-100k", root


def movielens_small(root):
    put(root / "ml-latest-small", ratings_csv="userId,movieId,rating,timestamp\n7,2,4.0,100\n"
        "7,1,0.5,99\n", movies_csv="movieId,title,genres\n1,Heat (1995),x\n2,Amélie (2001),x\n")
    return "ml-latest-small", root


def lastfm(root):
    put(root / "lastfm-hetrec", artists_dat='id\tname\turl\tpictureURL\n1\tHeat (1995)\tu\t\n'
        '2\tAmélie (2001)\tu\tp\n',
        user__taggedartists_dat="userID\tartistID\ttagID\tday\tmonth\tyear\r\n"
        "7\t2\t5\t1\t4\t2009\r\n7\t1\t5\t1\t3\t2009\r\n")
    return "lastfm", root


def steam(root):
    put(root / "steam-mcauley", steam__games_json="{u'id': u'1', u'title': u'Heat (1995)'}\n"
        "{u'id': u'2', u'app_name': u'Am\\xe9lie (2001)'}\n",
        steam__reviews_json="{u'username': u'x', u'product_id': u'2', u'date': u'2017-12-17', "
        "u'text': u'a \"b\"', u'hours': 0.1, u'early_access': False}\n"
        "{u'username': u'x', u'product_id': u'1', u'date': u'2017-12-16'}\n")
    return "steam", root


def own_csv(root):
    put(root / "own", interactions_csv="user,item,timestamp\nu7,b,100\nu7,a,99\n",
        items_csv="item,title\na,Heat (1995)\nb,Amélie (2001)\n")
    return str(root / "own"), root


def recbole(root):
    put(root / "atomic", ml_inter="user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "u7\tb\t4\t100.0\nu7\ta\t3\t9.9e1\n",
        ml_item="item_id:token\tmovie_title:token_seq\tclass:token_seq\na\tHeat (1995)\tx\n"
        "b\tAmélie (2001)\tx\n")
    return str(root / "atomic"), root


def rename(root):
    """put() writes `__` where a name has an underscore; files get their real names here."""
    for path in root.rglob("*__*"):
        path.rename(path.with_name(path.name.replace("__", "_")))
    return root


FOLDERS = [movielens_1m, movielens_100k, movielens_small, lastfm, steam, own_csv, recbole]


def make(build, root):
    name, root = build(root)
    rename(root)
    return name, root


def files_of(build, root):
    """(name, data_dir, interactions file, item file)"""
    name, root = make(build, root)
    if name in FORMATS:
        folder, pair = root / FORMATS[name].folder, FORMATS[name].files
    else:
        folder = root / ("own" if build is own_csv else "atomic")
        pair = ("interactions.csv", "items.csv") if build is own_csv else ("ml.inter", "ml.item")
    return name, root, folder / pair[0], folder / pair[1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("build", FOLDERS)
def test_each_format_gives_the_same_rows_plain_and_gzipped(tmp_path, build, packed):
    name, root, rows, items = files_of(build, tmp_path)
    if packed and build is not recbole:
        for path in (rows, items):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    x = load_interactions(name, root)
    assert x.titles == ["Heat (1995)", "Amélie (2001)"] and x.items.tolist() == [1, 0]
    assert len(set(x.users.tolist())) == 1 and x.timestamps[0] > x.timestamps[1]
    assert x.domain == {"lastfm": "artists", "steam": "games"}.get(
        name, "movies" if name in FORMATS else "items")
    assert x.dated == (name in FORMATS) and not x.steps
    plain = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (rows, items)
             if path.exists()}
    assert len(x.checksums) == 2 and (packed or x.checksums == plain)
    assert make_sequences(x, min_history=1).history(0).tolist() == [0]


def test_times_are_read_as_each_format_means_them(tmp_path):
    x = load_interactions(*make(lastfm, tmp_path))
    assert x.timestamps.tolist() == [1_238_544_000, 1_235_865_600]      # 1 April, 1 March 2009, UTC
    assert load_interactions(*make(steam, tmp_path)).timestamps[0] == 1_513_468_800


@pytest.mark.parametrize("text, wanted", [
    ("0", 0), ("978300760", 978_300_760), ("978300760.9", 978_300_760), ("9.5e8", 950_000_000),
    ("2017-12-17", 1_513_468_800), ("2017-12-17T01:00:00+01:00", 1_513_468_800),
    ("2017-12-17 00:00:01", 1_513_468_801), ("2017-12-17T00:00:00Z", 1_513_468_800)])
def test_timestamps_are_integers_floats_or_iso_dates(text, wanted):
    assert seconds(text) == wanted


@pytest.mark.parametrize("text, message", [
    ("-5", "not between 1970 and 2100"), ("1238536800000", "milliseconds?"), ("1e300", "between"),
    ("nan", "not between"), ("inf", "not between"), ("yesterday", "wanted seconds since 1970 or"),
    ("", "wanted seconds"), ("1066-10-14", "not between"), (str(LATEST), "not between")])
def test_negative_and_absurd_timestamps_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        seconds(text)


# ----------------------------------------------------------------------------------------------
# Bad lines: named by file and line, or counted


BAD_ROWS = {        # a line that is wrong in each format, and what is said about it
    movielens_1m: [("7::1::5", "3 fields, expected 4"), ("7::x::5::9", "integer, got 'x'"),
                   ("", "1 fields"), ("7::99::5::9", "unknown item 99"), ("7::1::5::-9", "betwee"),
                   ("7::1::5::99999999999999999999", "not between 1970"),
                   ("99999999999999999999::1::5::9", "is out of range")],
    movielens_100k: [("7 1 5 9", "1 fields, expected 4"), ("7\t1\t5\tx", "integer, got 'x'")],
    movielens_small: [("7,1,5", "3 fields, expected 4"), ('7,"1,5,9', "unexpected end of data")],
    lastfm: [("7\t1\t5\t1\t4", "5 fields"), ("7\t1\t5\t31\t2\t2009", "day is out of range"),
             ("7\t1\t5\tx\t2\t2009", "integer, got 'x'")],
    steam: [("{u'username': u'x'", "not a Python dict literal"), ("7", "not a Python dict"),
            ("{u'username': u'x', u'date': u'2017-12-17'}", "has no 'product_id'"),
            ("__import__('os').system('touch /tmp/owned')", "not a Python dict literal"),
            ("[" * 5_000, "not a Python dict literal"), ("{u'date': [], u'username': 1}", "unhash"),
            ("{u'username': u'x', u'product_id': u'1', u'date': u'17.12.'}", "timestamp '17.12.'")],
    own_csv: [("u7,a", "2 fields, expected 3"), ("u7,a,soon", "timestamp 'soon'"),
              ("u7,a,-1", "not between")],
    recbole: [("u7\ta\t3", "3 fields, expected 4"), ("u7\ta\t3\tsoon", "timestamp 'soon'")],
}
BAD_ITEMS = {
    movielens_1m: [("1::Ran::x", "item 1 is listed twice"), ("3:: ::x", "title '' is empty"),
                   ("x::Ran::x", "integer, got 'x'"), ("3::Ran", "2 fields, expected 3")],
    movielens_100k: [("3|Ran|", "3 fields, expected 24")],
    movielens_small: [("3,,x", "title '' is empty"), ("1,Ran,x", "item 1 is listed twice")],
    lastfm: [("3\t\tu\tp", "title '' is empty"), ("3\tRan", "2 fields, expected 4")],
    steam: [("{u'id': u'3', u'title': 5}", "has no attribute 'strip'"), ("{}}", "not a Python")],
    own_csv: [("a,Ran", "item a is listed twice"), ("c", "1 fields, expected 2")],
    recbole: [("a\tRan\tx", "item a is listed twice")],
}


@pytest.mark.parametrize("build, which, line, message", [
    (build, which, line, message) for which, table in ((2, BAD_ROWS), (3, BAD_ITEMS))
    for build, cases in table.items() for line, message in cases])
def test_a_bad_line_stops_with_its_place_or_is_counted(tmp_path, build, which, line, message):
    name, root, *files = files_of(build, tmp_path)
    path = files[which - 2]
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    number = path.read_bytes().count(b"\n")
    with pytest.raises(ValueError, match=f"{path.name}, line {number}: .*({message})") as error:
        load_interactions(name, root)
    assert "--skip-bad-lines" in str(error.value) and len(str(error.value)) < 400
    x = load_interactions(name, root, skip_bad_lines=True)
    assert x.titles == ["Heat (1995)", "Amélie (2001)"] and x.items.tolist() == [1, 0]
    assert x.steps == (f"1 bad lines of {path.name} dropped",)


@pytest.mark.parametrize("build", FOLDERS)
def test_undecodable_bytes_are_a_bad_line_where_the_encoding_has_any(tmp_path, build):
    name, root, rows, _ = files_of(build, tmp_path)
    rows.write_bytes(rows.read_bytes() + b"\xff\xfe\n")
    latin = build in (movielens_1m, movielens_100k)
    wanted = "1 fields" if latin else "byte 0xff is not utf-8 text"
    with pytest.raises(ValueError, match=wanted):
        load_interactions(name, root)
    assert len(load_interactions(name, root, skip_bad_lines=True).items) == 2


@pytest.mark.parametrize("build", FOLDERS)
def test_empty_files_and_lonely_ones_are_refused(tmp_path, build):
    name, root, rows, items = files_of(build, tmp_path)
    whole = rows.read_bytes()
    for header_only in (False, True):
        rows.write_bytes(whole[:whole.index(b"\n") + 1] if header_only and build in (
            movielens_small, lastfm, own_csv, recbole) else b"")
        with pytest.raises(ValueError, match="holds no rows"):
            load_interactions(name, root)
    rows.unlink()
    with pytest.raises(FileNotFoundError, match="not found|wanted interactions.csv"):
        load_interactions(name, root)
    rows.write_bytes(whole)
    items.unlink()
    with pytest.raises(FileNotFoundError, match="not found|wanted interactions.csv"):
        load_interactions(name, root)


def test_damaged_gzip_and_endless_lines_are_refused(tmp_path, monkeypatch):
    name, root, rows, _ = files_of(movielens_1m, tmp_path)
    packed = rows.with_name("ratings.dat.gz")
    packed.write_bytes(gzip.compress(rows.read_bytes() * 50)[:-10])
    rows.unlink()
    with pytest.raises(ValueError, match="ratings.dat.gz: damaged gzip"):
        load_interactions(name, root)
    packed.write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match="ratings.dat.gz: damaged gzip"):
        load_interactions(name, root)
    packed.write_bytes(gzip.compress(b"1" * 3 * 2**24))         # 50 MB in one line, 50 kB packed
    with pytest.raises(ValueError, match="line 1: more than 16,777,216 bytes in a line"):
        load_interactions(name, root)
    monkeypatch.setitem(FORMATS, name, datasets.replace(FORMATS[name], most_bytes=4_000_000))
    packed.write_bytes(gzip.compress(b"7::1::3::99\n" * 500_000))   # a bomb for a file this size
    with pytest.raises(ValueError, match="or 4,000,000 in all; this is not a file of this format"):
        load_interactions(name, root)


def test_an_item_that_nobody_lists_is_dropped_and_counted(tmp_path):
    for build, line in ((lastfm, "7\t99\t5\t1\t4\t2009"), (own_csv, "u7,zz,5"),
                        (steam, "{u'username': u'x', u'product_id': u'9', u'date': u'2017-12-17'}"),
                        (recbole, "u7\tzz\t1\t5")):
        name, root, rows, _ = files_of(build, tmp_path)
        rows.write_bytes(rows.read_bytes() + line.encode() + b"\n")
        x = load_interactions(name, root)
        assert len(x.items) == 2
        assert x.steps == ("1 interactions with items that have no title dropped",)


def test_items_without_a_title_are_dropped_with_their_interactions(tmp_path):
    name, root, rows, items = files_of(own_csv, tmp_path)
    items.write_bytes(items.read_bytes() + b"c, \n")
    rows.write_bytes(rows.read_bytes() + b"u7,c,3\nu7,c,4\n")
    x = load_interactions(name, root)
    assert x.titles == ["Heat (1995)", "Amélie (2001)"] and len(x.items) == 2
    assert x.steps == ("1 items without a title dropped",
                       "2 interactions with items that have no title dropped")
    name, root, _, games = files_of(steam, tmp_path)
    games.write_text(games.read_text() + "{u'title': u'no id'}\n{u'id': u'3'}\n"
                     "{u'id': u'1', u'title': u'again'}\n")
    assert load_interactions(name, root).steps == (
        "2 games without id or title dropped", "1 games listed again dropped")


def test_a_folder_of_ones_own_is_read_by_column_names(tmp_path):
    put(tmp_path / "x", interactions_csv='\ufefftimestamp,rating,item,user\n2020-01-02,5,"a,b",me\n'
        '2020-01-01,5,c,me\n', items_csv='title,item\n"Say ""Hi""","a,b"\nRan,c\n')
    x = load_interactions(str(tmp_path / "x"), domain="games")
    assert x.titles == ['Say "Hi"', "Ran"] and x.items.tolist() == [0, 1] and x.domain == "games"
    assert x.dated          # dates; small numbers are places, see test_each_format
    put(tmp_path / "crlf", interactions_csv="user,timestamp,item\r\nme,5,a\r\nme,6,b\r\n",
        items_csv="item,title\na,Heat\nb,Ran\n")
    assert load_interactions(str(tmp_path / "crlf")).items.tolist() == [0, 1]
    put(tmp_path / "y", interactions_csv="who,item,timestamp\n", items_csv="item,title\na,b\n")
    with pytest.raises(ValueError, match="line 1: the header has no column 'user': who, item, t"):
        load_interactions(str(tmp_path / "y"), skip_bad_lines=True)
    (tmp_path / "z").mkdir()
    with pytest.raises(FileNotFoundError, match="wanted interactions.csv.*found nothing"):
        load_interactions(str(tmp_path / "z"))
    with pytest.raises(ValueError, match="unknown data set 'netflix'.*or a folder with"):
        load_interactions("netflix", tmp_path)
    put(tmp_path / "w", interactions_csv="user,item,timestamp\nu,zz,3\n",
        items_csv="item,title\na,b\n")
    with pytest.raises(ValueError, match="no interaction has an item of the catalogue"):
        load_interactions(str(tmp_path / "w"))


def test_a_user_with_a_million_rows_is_one_user(tmp_path):
    """Ten million take ten times as long; nothing is quadratic."""
    n = 1_000_000
    x = Interactions(np.zeros(n, dtype=np.int64), np.arange(n) % 5_000, np.arange(n)[::-1].copy(),
                     [str(i) for i in range(5_000)])
    s = make_sequences(x)
    assert len(s) == n - 3
    assert [len(part) for part in split_by_time(s)] == [799_997, 100_000, 100_000]
    assert len(first_of_each_pair(x).items) == 5_000


def test_repeated_titles_become_unique_and_never_collide():
    assert unique_titles(["A", "B", "A", "A"]) == ["A", "B", "A [2]", "A [3]"]
    titles = unique_titles(["A", "A", "A [2]", "A"])
    assert titles[0] == "A" and titles[2] == "A [2]" and len(set(titles)) == 4


# ----------------------------------------------------------------------------------------------
# Fetching


class Files(BaseHTTPRequestHandler):
    """Serves bytes by name, parts of them when asked; may break off half-way."""

    contents: dict[str, bytes]
    asked: list[str]
    breaks: list[int]

    def do_GET(self):
        body, start = self.contents.get(self.path.rpartition("/")[2]), 0
        self.asked.append(f"{self.path} {self.headers.get('Range')}")
        if body is None:
            return self.send_error(404)
        if self.headers.get("Range"):
            start = int(self.headers["Range"][6:-1])
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + self.breaks.pop() if self.breaks else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server():
    handler = type("Handler", (Files,), {"contents": {}, "asked": [], "breaks": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{running.server_port}"
    yield handler
    running.shutdown()


def zipped(path, **entries):
    """A zip archive; names with `/` for `__` and a dot for the last `_`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            stem, _, ending = name.replace("__", "/").rpartition("_")
            archive.writestr(f"{stem}.{ending}", content)
    return path


def serve_movielens(server, tmp_path, monkeypatch):
    name, _ = make(movielens_1m, tmp_path / "original")
    folder = tmp_path / "original" / "ml-1m"
    archive = zipped(tmp_path / "x.zip", README_txt="read me",
                     **{f"ml-1m__{file}_dat": (folder / f"{file}.dat").read_bytes()
                        for file in ("ratings", "movies")})
    server.contents["ml-1m.zip"] = body = archive.read_bytes()
    monkeypatch.setitem(FORMATS, name, datasets.replace(FORMATS[name], downloads=(Download(
        f"{server.address}/ml-1m.zip", "1 kB", hashlib.sha256(body).hexdigest()),)))
    return name, body


def test_a_data_set_is_fetched_checked_unpacked_and_kept(server, tmp_path, monkeypatch, capsys):
    name, _ = serve_movielens(server, tmp_path, monkeypatch)
    x = load_interactions(name, tmp_path / "data")
    assert x.titles == ["Heat (1995)", "Amélie (2001)"]
    assert sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*.*")) \
        == ["ml-1m.zip", "ml-1m/movies.dat", "ml-1m/ratings.dat"]
    assert "(1 kB)" in capsys.readouterr().out and len(server.asked) == 1
    load_interactions(name, tmp_path / "data")
    (tmp_path / "data/ml-1m/movies.dat").unlink()       # taken out of the kept archive again
    load_interactions(name, tmp_path / "data")
    assert len(server.asked) == 1


def test_a_download_that_breaks_off_is_gone_on_with(server, tmp_path, monkeypatch):
    name, body = serve_movielens(server, tmp_path, monkeypatch)
    server.breaks.append(100)
    with pytest.raises(FileNotFoundError, match="broke off after 100 of .* bytes; run again"):
        load_interactions(name, tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["ml-1m.zip.part"]
    load_interactions(name, tmp_path / "data")
    assert server.asked[1].endswith("bytes=100-")
    assert (tmp_path / "data/ml-1m.zip").read_bytes() == body
    (tmp_path / "again.part").write_bytes(b"longer than it can be" * 1_000)
    with pytest.raises(OSError, match="does not fit; run again"):
        download(f"{server.address}/ml-1m.zip", tmp_path / "again")
    download(f"{server.address}/ml-1m.zip", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == body


def test_a_wrong_checksum_is_never_used(server, tmp_path, monkeypatch):
    name, body = serve_movielens(server, tmp_path, monkeypatch)
    server.contents["ml-1m.zip"] = body[:-1] + b"x"
    with pytest.raises(ValueError, match="published is .* What came was discarded"):
        load_interactions(name, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())
    (tmp_path / "data/ml-1m.zip").write_bytes(b"put here by hand")
    with pytest.raises(ValueError, match="ml-1m.zip: sha256 is .* Remove it and run again"):
        load_interactions(name, tmp_path / "data")


def test_offline_the_message_gives_address_target_and_size(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find_files("movielens", tmp_path)
    for part in ("https://files.grouplens.org/datasets/movielens/ml-1m.zip", "5.9 MB",
                 str(tmp_path / "ml-1m.zip"), "no network in tests", "--data synthetic"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"steam_reviews.json.gz.*1.3 GB"):
        find_files("steam", tmp_path)
    assert not list(tmp_path.rglob("*.gz"))


def test_a_gzipped_file_is_fetched_as_it_is(server, tmp_path, monkeypatch):
    name, root = make(steam, tmp_path / "original")
    for file in ("steam_reviews.json", "steam_games.json"):
        server.contents[f"{file}.gz"] = gzip.compress((root / "steam-mcauley" / file).read_bytes())
    monkeypatch.setitem(FORMATS, name, datasets.replace(FORMATS[name], downloads=tuple(
        Download(f"{server.address}/{file}.gz", "1 kB") for file in FORMATS[name].files)))
    assert len(load_interactions(name, tmp_path / "data").items) == 2
    assert sorted(p.name for p in (tmp_path / "data/steam-mcauley").iterdir()) == [
        "steam_games.json.gz", "steam_reviews.json.gz"]


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt",
                                  "..\\evil.txt", "C:\\evil.txt"])
def test_an_entry_that_leaves_the_folder_is_refused(tmp_path, name):
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("a.txt", "fine")
        packed.writestr(name, "evil")
    with pytest.raises(ValueError, match="leaves the folder; not unpacked"):
        unpack(archive, tmp_path / "out", ("a.txt",), 1_000)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/evil*"))


def test_bombs_damaged_and_wrong_archives_are_refused(tmp_path):
    bomb = zipped(tmp_path / "bomb.zip", a_txt=b"0" * 10_000_000)
    assert bomb.stat().st_size < 20_000
    with pytest.raises(ValueError, match="declares 10,000,000 bytes, at most 1,000 expected"):
        unpack(bomb, tmp_path / "out", ("a.txt",), 1_000)
    with pytest.raises(ValueError, match="holds no b.txt. Is it the right archive"):
        unpack(bomb, tmp_path / "out", ("b.txt",), 10**8)
    assert not (tmp_path / "out").exists()
    whole = zipped(tmp_path / "w.zip", a_txt=bytes(range(256)) * 100).read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", whole[:60] + b"\0\0\0\0" + whole[64:]):
        (tmp_path / "d.zip").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged zip archive"):
            unpack(tmp_path / "d.zip", tmp_path / "out", ("a.txt",), 10**8)
        assert not (tmp_path / "out/a.txt").exists()


# ----------------------------------------------------------------------------------------------
# The paper's preparation


def rows(*triples) -> Interactions:
    users, items, times = (np.array(column) for column in zip(*triples))
    return Interactions(users, items, times, [f"t{i}" for i in range(items.max() + 1)])


def test_repeats_keep_a_users_first_and_row_order():
    x = rows((1, 0, 50), (1, 1, 60), (1, 0, 40), (2, 0, 5), (1, 1, 60), (2, 0, 5))
    y = first_of_each_pair(x)
    assert list(zip(y.users, y.items, y.timestamps)) == [(1, 1, 60), (1, 0, 40), (2, 0, 5)]
    assert y.steps == ("first of each user and item: 3 interactions, 2 users, 2 items",)
    assert first_of_each_pair(y) is y
    cold = Interactions(x.users, x.items, x.timestamps, [*x.titles, "nobody took it yet"])
    assert first_of_each_pair(cold).titles == cold.titles       # no filter: it stays a candidate


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
    x, wanted = core(rows(*triples), 4), brute_core(triples, 4)
    assert 0 < len(wanted) < len(triples)
    assert [(u, x.titles[i], t) for u, i, t in zip(x.users, x.items, x.timestamps)] == [
        (u, f"t{i}", t) for u, i, t in wanted]
    assert len(x.titles) == len({i for _, i, _ in wanted})
    with pytest.raises(ValueError, match="nothing is left"):
        core(rows(*triples), 40)


def test_samples_take_whole_users_up_to_the_share_and_depend_on_the_seed():
    ids = np.repeat(np.arange(100), np.arange(1, 101))
    for share, by_rows in itertools.product((0.1, 0.5), (False, True)):
        taken = sample_of(ids, share, np.random.default_rng(0), by_rows)
        counts = np.bincount(ids, weights=taken, minlength=100)
        assert set(counts / np.arange(1, 101)) == {0.0, 1.0}
        size = taken.mean() if by_rows else (counts > 0).mean()
        assert share - 0.02 < size <= share
    other = sample_of(ids, 0.5, np.random.default_rng(1))
    assert (other != sample_of(ids, 0.5, np.random.default_rng(0))).any()
    assert sample_of(ids, 1.0, np.random.default_rng(0)).all()


def crowd(users=60, items=40, each=25) -> Interactions:
    rng = np.random.default_rng(0)
    return rows(*[(u, int(i), int(rng.integers(10**6))) for u in range(users)
                  for i in rng.choice(items, each if u % 2 else 5, replace=False)])


def test_steam_takes_users_with_20_games_then_a_third_of_users_and_games():
    x = prepare(crowd(), "steam")
    assert [step.partition(":")[0] for step in x.steps] == [
        "users with 20 games or more", "0.333 of the users, drawn", "0.333 of the games, drawn"]
    assert re.search("750 interactions, 30 users", x.steps[0])
    assert re.search("250 interactions, 10 users", x.steps[1]) and len(x.titles) == 13
    assert len(prepare(crowd(), "steam", 1.0).steps) == 1
    one, two = prepare(crowd(), "steam", seed=1), prepare(crowd(), "steam", seed=1)
    assert one.titles == two.titles != x.titles


def test_movielens_takes_the_5_core_then_users_with_a_tenth_of_the_interactions():
    x = prepare(crowd(), "movielens")
    assert [step.partition(":")[0] for step in x.steps] == [
        "5-core", "users drawn to have 0.1 of the interactions"]
    assert 0.06 * 900 < len(x.users) <= 0.1 * 900
    assert len(prepare(crowd(), "movielens", 1.0).steps) == 1
    assert prepare(crowd(), "ml-100k").steps == ()


@pytest.mark.parametrize("sample", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(sample):
    with pytest.raises(ValueError, match="--sample is"):
        prepare(crowd(), "movielens", sample)


def lastfm_rows() -> Interactions:
    """Four users tag four artists in file order 0..3, on other days; user 4 tags two."""
    triples = [(u, a, 12 * 10**8 + 86_400 * ((7 * a + u) % 5)) for u in range(4) for a in range(4)
               for _ in range(2)]
    return rows(*triples, (4, 0, 12 * 10**8), (4, 4, 12 * 10**8), (0, 1, -10**8))


def test_lastfm_keeps_the_order_of_the_file_unless_told_to_take_the_dates():
    x = prepare(lastfm_rows(), "lastfm")
    assert [step.partition(":")[0] for step in x.steps] == [
        "first of each user and item", "artists with 4 users or more",
        "users with 4 artists or more",
        "order by artist number, as the field uses it, not by time (D9); --chronological takes "
        "dates"]
    assert not x.dated and len(x.users) == 16 and x.timestamps.tolist() == [0, 1, 2, 3] * 4
    assert make_sequences(x, 3).history(0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="index 'time' wants data with times"):
        make_sequences(x, index="time")
    dated = prepare(lastfm_rows(), "lastfm", chronological=True)
    assert dated.dated and dated.timestamps.min() == 12 * 10**8      # the row of 1966 is gone
    days = [(7 * a) % 5 for a in range(4)]
    assert make_sequences(dated, 3).history(0).tolist() == np.argsort(days)[:3].tolist()
    with pytest.raises(ValueError, match="--chronological goes with --data lastfm"):
        prepare(crowd(), "ml-100k", chronological=True)


# ----------------------------------------------------------------------------------------------
# The real files, where they are at hand


def test_real_movielens_gives_the_paper_s_interactions(real_data):
    x = prepare(load_interactions("movielens", real_data), "movielens", sample=1.0)
    assert x.counts() == {"interactions": 999_611, "users": 6_040, "items": 3_416}
    tenth = prepare(load_interactions("movielens", real_data), "movielens")
    assert 99_000 < len(tenth.users) <= 99_962


def test_real_movielens_100k_and_latest_small_give_the_known_counts(real_data):
    x = load_interactions("ml-100k", real_data)
    assert x.counts() == {"interactions": 100_000, "users": 943, "items": 1_682}
    assert len(set(x.titles)) == 1_682 and "Chasing Amy (1997) [2]" in x.titles
    train, valid, test = split_by_time(make_sequences(x))
    assert (len(train) + len(valid) + len(test), len(test)) == (97_171, 9_718)
    x = load_interactions("ml-latest-small", real_data)
    assert x.counts() == {"interactions": 100_836, "users": 610, "items": 9_724}


def test_real_lastfm_gives_the_sequences_the_field_uses(real_data):
    """The rows of LLaRA's release, user by user and title by title; 46,896 training rows."""
    x = prepare(load_interactions("lastfm", real_data), "lastfm")
    assert x.counts() == {"interactions": 56_794, "users": 1_220, "items": 4_606}
    theirs = load_interactions(str(real_data / "lastfm-llara"))

    def by_user(x):
        order = np.lexsort((x.timestamps, x.users))
        bare = [re.sub(r' \[\d+\]$|"', "", title) for title in x.titles]  # theirs has no quotes
        return [[bare[i] for i in x.items[order][x.users[order] == u]] for u in np.unique(x.users)]
    assert by_user(x) == by_user(theirs)
    lines = (real_data / "lastfm-llara/users.csv").read_text().splitlines()[1:]
    trained = {int(line.split(",")[1]) for line in lines if line.split(",")[2] == "train"}
    assert sum(max(0, (x.users == user).sum() - 4) for user in trained) == 46_896
    assert prepare(load_interactions("lastfm", real_data), "lastfm", chronological=True).dated


def test_real_steam_games_are_read_whole(real_data, tmp_path):
    games = real_data / "steam-mcauley/steam_games.json.gz"
    put(tmp_path / "steam-mcauley", steam__games_json=gzip.decompress(games.read_bytes()),
        steam__reviews_json="{u'username': u'x', u'product_id': u'612880', u'date': u'2017-12-17'}"
        "\n")
    rename(tmp_path)
    x = load_interactions("steam", tmp_path)
    assert len(x.titles) == 32_131 and x.titles[x.items[0]] == "Wolfenstein II: The New Colossus"
    assert x.steps == ("3 games without id or title dropped", "1 games listed again dropped")
    x = load_interactions(str(real_data / "steam-100k"), domain="games")
    assert x.counts() == {"interactions": 126_824, "users": 10_369, "items": 3_593}
    assert len(first_of_each_pair(x).users) == 126_824 - 2_635
