"""experiments/page.py: the page holds the paper, live code and computed numbers, and it renders.

Widths, sizes and errors are read in a real browser, which is driven by the W3C WebDriver protocol;
without chromium and chromedriver these tests are skipped.
"""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from conftest import small_runs

pytest.importorskip("pygments")

from experiments import page, passages
from experiments.markup import typeset
from experiments.page import ROOT, code, markdown_table, source_of

PLACES = {"Table 1", *(f"Eq. {number}" for number in range(1, 11)), "§4.3", "§5.1.1", "§5.1.2",
          "§5.1.4", "§5.4"}
SMALL = {"limit_train": 64, "max_steps": 4, "batch_size": 16, "eval_sequences": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(page.html, the scene that it shows)"""
    out, scenes = tmp_path_factory.mktemp("page"), []
    keep = page.scene_of
    with small_runs() as patch:
        patch.setattr(page, "SMALL", SMALL)
        patch.setattr(page, "scene_of", lambda *given: scenes.append(keep(*given)) or scenes[0])
        assert page.main(["--out", str(out)]) == 0
    return out / "page.html", scenes[0]


# ------------------------------------------------------------ What is on the page


def test_every_place_of_the_paper_is_a_passage_with_tests_that_passed(made):
    text = made[0].read_text(encoding="utf-8")
    places = [part.place for part in passages.PASSAGES]
    assert set(places) == PLACES
    assert all(f'<span class="place">{place}</span>' in text for place in places)
    assert page.EXAMPLES.keys() == set(places)
    tests = re.findall(r'<li class="(\w+)"><code>(test_\w+)</code> (\w+)</li>', text)
    assert len(tests) > 30 and {outcome for pair in tests for outcome in (pair[0], pair[2])} == {
        "passed"}
    assert text.count("<math") >= 20 and "§5.4" in text and "D15" in text
    for name in ("GRU4Rec", "Caser", "SASRec", "P5", "E4SRec", "LLaRA", "CFT"):
        assert f"<h3>{name}</h3>" in text


def test_code_is_what_stands_in_the_files_now(made):
    class Code(HTMLParser):
        """Collects the text of every <pre><code>."""
        found, inside = [], False

        def handle_starttag(self, tag, attrs):
            if tag == "code" and self.get_starttag_text() == "<code>" and self.before == "pre":
                self.inside = True
                self.found.append("")
            self.before = tag

        def handle_endtag(self, tag):
            self.inside &= tag != "pre"

        def handle_data(self, data):
            if self.inside:
                self.found[-1] += data
    parser = Code()
    parser.before = ""
    parser.feed(made[0].read_text(encoding="utf-8"))
    names = [name for part in passages.PASSAGES for name in part.code]
    assert len(parser.found) == len(names) + len(passages.SYSTEMS)
    for name, shown in zip(names, parser.found):
        source = (ROOT / source_of(name)[0]).read_text(encoding="utf-8")
        for line in shown.splitlines():
            assert line.strip() in source
        assert f"{name.rpartition('.')[2]}" in shown


def test_the_page_asks_for_nothing_from_elsewhere_and_names_no_place(made):
    text = made[0].read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text) and "<script" not in text
    assert "@import" not in text and "url(" not in text and "/tmp" not in text


def test_numbers_are_those_of_the_run(made):
    text, scene = made[0].read_text(encoding="utf-8"), made[1]
    targets, logits_f, _ = scene.worlds()
    loss = torch_cross_entropy(logits_f, targets)
    assert f"<td>{loss:.4f}</td>" in text
    for row in ("10 beams on titles | change, reversed", "5 beams, grounded"):
        (mean, error), form = scene.run.record["rows"][row]["HR@5"], "+.1f" if "|" in row else ".4f"
        assert f"<td>{mean:{form}} ± {error:{form[-3:]}}".replace(">-", ">−") in text
    assert "<th>p<sub>2</sub></th><td>0.909</td><td>−0.416</td><td>0.199</td>" in text


def test_worlds_and_effects_of_the_page_by_hand(made):
    scene = made[1]
    t, number = scene.test_set, scene.number
    history = t.titles_of(t.history(number))
    factual, erased = page.example_worlds(scene).split("<p>The erased one")
    assert re.findall(r'<span class="item"[^>]*>([^<]+)<sub>k=(\d+)</sub>', factual) == [
        (title, str(len(history) - 1 - i)) for i, title in enumerate(history)]
    assert re.findall(r'<span class="item"[^>]*>([^<]+)<sub>k=(\d+)</sub>', erased) == [
        (title, "0") for title in history]
    targets, *worlds = scene.worlds()
    log_f, log_cf = (logits.double().log_softmax(1)[range(len(targets)), targets]
                     for logits in worlds)
    shown = [[float(x.replace("−", "-")) for x in re.findall(r"<td>([^<]+)</td>", row)]
             for row in page.example_answer(scene).split("<tr>")[2:]]
    wanted = [[float(f), float(cf), float(f - cf)] for f, cf in zip(log_f, log_cf)]
    assert len(shown) == len(targets) + 1
    for cells, numbers in zip(shown, [*wanted, [sum(x) for x in zip(*wanted)]]):
        assert cells == pytest.approx(numbers, abs=6e-4)


def torch_cross_entropy(logits, targets):
    p = logits.double().exp()
    p = p / p.sum(dim=1, keepdim=True)
    return float(-p[range(len(targets)), targets].log().mean())


# ------------------------------------------------------------ What would break it


def outcome_of_all(beginning: str, outcome: str) -> dict[str, str]:
    """test -> outcome, for the tests of equations whose names begin so after "test_"."""
    text = (ROOT / "tests" / "test_equations.py").read_text("utf-8")
    return dict.fromkeys(re.findall(rf"^def (test_{beginning}\w*)", text, re.M), outcome)


def test_what_is_gone_is_found(made):
    scene, part = made[1], passages.PASSAGES[0]
    with pytest.raises(ValueError, match="cetrec.nothing is not in cetrec.py"):
        source_of("cetrec.nothing")
    with pytest.raises(ValueError, match="no tests begin with test_eq99"):
        page.passage(replace(part, tests="eq99"), scene, {})
    passed = outcome_of_all("table1", "passed")
    with pytest.raises(ValueError, match="docs/readings.md has no D99"):
        page.passage(replace(part, words="See D99."), scene, passed)
    with pytest.raises(ValueError, match="or they did not run"):
        page.passage(part, scene, {})


def test_a_run_without_its_log_has_no_curves(made):
    scene = replace(made[1], run=replace(made[1].run, log=[]))
    assert page.example_curves(scene) == "<p>The run has no log of its losses.</p>"


def test_a_test_that_fails_is_shown_as_such(made):
    failed = outcome_of_all("table1", "failed")
    assert '<li class="failed">' in page.passage(passages.PASSAGES[0], made[1], failed)


def test_places_in_files_and_small_parts():
    path, first, source = source_of("data.Tokenizer.examples")
    assert (path, source.partition("(")[0]) == ("data.py", "def examples")      # and dedented
    assert (ROOT / path).read_text("utf-8").splitlines()[first - 1].strip().startswith("def exampl")
    assert source_of("cetrec.answer_log_likelihood")[2].startswith("@torch.no_grad()")
    assert '<span class="k">def</span>' in code("cetrec.erase_order")
    assert [typeset(x) for x in ("-0.000", "-1.5", "+2.0", "1 [-0.1, +0.2]", "a-1")] == [
        "0.000", "−1.5", "+2.0", "1 [−0.1, +0.2]", "a-1"]
    made = markdown_table("x | y\n\n| id | b |\n|---|---|\n| `c` | 1 < 2 |\n\nz\n", "| id |")
    assert "<th>id</th>" in made and "<th><code>c</code></th><td>1 &lt; 2</td>" in made


def test_a_run_that_is_there_can_be_shown_and_errors_are_one_line(tmp_path, capsys):
    assert page.main(["--run", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "none" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
    for flags, message in ((["--run", "x", "--seed", "1"], "--seed goes with a run that is made"),
                           (["--data-dir", "x"], "--data-dir goes with --run; drop it")):
        assert page.main(flags) == 2 and message in capsys.readouterr().err


# ------------------------------------------------------------ In a browser


class Browser:
    """A headless Chromium, by the W3C WebDriver protocol."""

    def __init__(self):
        with socket.socket() as free:                   # a port that nobody uses
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"],
                                        stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}/session"
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/status") as reply:
                    if json.load(reply)["value"]["ready"]:
                        break
            except OSError:
                time.sleep(0.1)
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
        self.url += "/" + self.ask("POST", "", {"capabilities": {"alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}}})["sessionId"]

    def ask(self, method: str, path: str, body: dict | None = None):
        request = urllib.request.Request(
            self.url + path, method=method, headers={"Content-Type": "application/json"},
            data=None if body is None else json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def run(self, script: str):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def command(self, name: str, **given):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": name, "params": given})

    def log(self, kind: str) -> list[dict]:
        return self.ask("POST", "/se/log", {"type": kind})


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no chromium with chromedriver")
    driver = Browser()
    yield driver
    driver.ask("DELETE", "")
    driver.process.kill()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_renders_at_both_widths_without_errors_or_requests(made, browser, width, scheme):
    browser.command("Emulation.setDeviceMetricsOverride", width=width, height=900,
                    deviceScaleFactor=1, mobile=width < 500)
    browser.command("Emulation.setEmulatedMedia", features=[
        {"name": "prefers-color-scheme", "value": scheme}])
    browser.log("performance")
    browser.ask("POST", "/url", {"url": made[0].as_uri()})
    wide = browser.run("return [...document.querySelectorAll('body *')].filter("
                       "x => x.getBoundingClientRect().right > innerWidth + 1 && "
                       "!x.closest('.table')).map(x => x.outerHTML.slice(0, 80))")
    assert not wide and browser.run("return document.documentElement.scrollWidth") <= width
    sizes = browser.run("return [...document.querySelectorAll('math')].map("
                        "x => [x.getBoundingClientRect().width, x.getBoundingClientRect().height])")
    assert len(sizes) >= 20 and all(a > 20 and b > 10 for a, b in sizes)
    pictures = browser.run("return [...document.querySelectorAll('svg')].map("
                           "x => x.getBoundingClientRect().width)")
    assert len(pictures) == 3 and min(pictures) > 250
    columns = browser.run("const [a, b] = document.querySelector('section').children;"
                          "return [a, b].map(x => x.getBoundingClientRect().top)")
    assert (columns[0] == columns[1]) == (width > 500)      # beside each other, or one by one
    dark = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark))) < 60) == (scheme == "dark")
    assert not browser.log("browser")
    asked = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    urls = {x["params"]["request"]["url"] for x in asked
            if x["method"] == "Network.requestWillBeSent"}
    assert all(url == made[0].as_uri() or url.startswith("data:") for url in urls)
