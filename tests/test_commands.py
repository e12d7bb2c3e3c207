"""Every command in README and docs is run as it stands there, on small stand-ins for the data.

A test works in a folder that has small data sets at their places, a small base where one of the
commands wants a published one, and an interrupted run for --resume. What is added to a command are
flags that make it short. Of a command for several processes the part behind torchrun is run.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import cetrec
from experiments import (benchmark, choose, explain, fuzz, id_baselines, llm_baselines, look, page,
                         readings, readme, recommend, report, reproduce, table3)
from support.synthetic import SyntheticWorld
from support.tiny import TINY_BASES, TinyBase

QUICK = ["--limit-train", "64", "--eval-sequences", "9", "--max-steps", "2", "--batch-size", "16"]
SHORT = {       # command -> (what it runs, flags that make it short)
    "cetrec.py": (cetrec.main, QUICK), "look": (look.main, []), "explain": (explain.main, []),
    "recommend": (recommend.main, []), "report": (report.main, []),
    "id_baselines": (id_baselines.main, ["--epochs", "1", "--width", "8", *QUICK[:4]]),
    "llm_baselines": (llm_baselines.main, QUICK),
    "table3": (table3.main, [*QUICK[2:4], "--seeds", "0"]),
    "readings": (readings.main, QUICK), "readme": (readme.main, []),
    "reproduce": (reproduce.main, [*QUICK[:6], "--seeds", "0"]),
    "choose": (choose.main, ["--eval-sequences", "9"]), "page": (page.main, []),
    "benchmark": (benchmark.main, ["--rounds", "1", "--batch-size", "2", "--shapes", "tiny"]),
    "fuzz": (fuzz.main, ["--inputs", "3"])}
WORDS = {"NAME": "ml-100k", "METHOD": "caser", "RUN": "runs/ml-100k-rope-1",
         "SMOLLM2": "meta-llama/Meta-Llama-3-8B", "path/to/llama": "meta-llama/Meta-Llama-3-8B",
         "tuning": "", "[SECTION": "generation", "...]": ""}    # one section takes ten seconds
NOT_HERE = {"pytest", "pip", "venv"}        # the test command itself, and the installation


def commands_in(text: str) -> list[str]:
    """The commands of a page in code, without the interpreter's place and comments: what follows
    "python" or torchrun's flags. a|b stands for both, and WORDS has what capitals stand for. Of
    many seeds the first is enough."""
    text = re.sub(r"(?<!`)`[^`\n]+\n[^`\n]+`", lambda m: m[0].replace("\n", " "), text)
    found = []
    for line in re.findall(r"(?:python3?|torchrun [^\n`]*?) ((?:cetrec\.py|-m )[^\n`&]*)", text):
        line = re.split(r"\s+#|\s\.\.\.(?:\s|$)", line)[0].strip()
        line = re.sub(r"(--seeds \d+)( \d+)+", r"\1", line)
        choices = [word.split("|") for word in line.split(" ")]
        for n in range(max(map(len, choices))):
            words = [words[n % len(words)] for words in choices]
            found.append(" ".join(filter(None, (WORDS.get(word, word) for word in words))))
    return [line for line in dict.fromkeys(found) if not NOT_HERE & set(line.split())]


COMMANDS = list(dict.fromkeys(command for path in readme.pages()
                              for command in commands_in(path.read_text(encoding="utf-8"))))


def write_raw_files(root: Path) -> None:
    """Small data sets in the raw formats of the public ones, and one's own folder."""
    world = SyntheticWorld(items=40)
    x = world.interactions(400)
    times = x.timestamps + 1_200_000_000            # LastFM's dates begin in 2005
    rows = list(zip(x.users.tolist(), x.items.tolist(), times.tolist()))
    titles = ["Heat (1995)", "Toy Story (1995)", *x.titles[2:]]
    dates = times.astype("datetime64[s]").astype("datetime64[D]").astype(str).tolist()

    def put(name: str, lines) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="latin-1")
    put("data/ml-1m/ratings.dat", (f"{u + 1}::{i + 1}::5::{t}" for u, i, t in rows))
    put("data/ml-1m/movies.dat", (f"{i + 1}::{t}::Drama" for i, t in enumerate(titles)))
    put("data/ml-100k/u.data", (f"{u + 1}\t{i + 1}\t5\t{t}" for u, i, t in rows))
    put("data/ml-100k/u.item", (f"{i + 1}|{t}{'|' * 22}" for i, t in enumerate(titles)))
    put("data/lastfm-hetrec/user_taggedartists.dat", [
        "userID\tartistID\ttagID\tday\tmonth\tyear", *(
            f"{u + 1}\t{i + 1}\t1\t{int(d[8:])}\t{int(d[5:7])}\t{d[:4]}"
            for (u, i, _), d in zip(rows, dates))])
    put("data/lastfm-hetrec/artists.dat", [
        "id\tname\turl\tpictureURL", *(f"{i + 1}\t{t}\tu\tp" for i, t in enumerate(titles))])
    for folder in ("own", "path/to/folder"):
        put(f"{folder}/interactions.csv", ["user,item,timestamp", *(
            f"{u},{i},{t}" for u, i, t in rows)])
        put(f"{folder}/items.csv", ["item,title", *(
            f'{i},"{t}"' for i, t in enumerate(titles))])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which commands are run, with all they want."""
    root, draw = tmp_path_factory.mktemp("place"), SyntheticWorld.interactions
    write_raw_files(root)
    tiny = TinyBase(pieces=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    max_sequences=64, epochs=1)
    targets = {name: [(title, dict(list(rows.items())[:2]))]
               for name, make in reproduce.TARGETS.items() for title, rows in list(make())[:1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(SyntheticWorld, "interactions", lambda self, seed=0: draw(self, 120, seed))
        patch.setattr("support.runs.TinyBase", lambda: tiny)
        for name in list(TINY_BASES):
            patch.setitem(TINY_BASES, name, tiny)
        for name, sections in targets.items():
            patch.setitem(reproduce.TARGETS, name, lambda sections=sections: sections)
        patch.setitem(table3.SYSTEMS, "GRU4Rec", (id_baselines.main, [
            "--method", "gru4rec", "--epochs", "1", "--width", "8"]))
        for name in list(table3.SYSTEMS)[1:]:
            patch.delitem(table3.SYSTEMS, name)
        patch.setenv("TORCH_COMPILE_DISABLE", "1")      # the benchmark's would take minutes
        patch.setattr("torch.hub.urlopen", lambda *args, **kwargs: pytest.fail("network"))
        for kind in ("rope", "none"):           # the runs that later commands look at
            assert cetrec.main(["--data", "ml-100k", "--temporal", kind, *QUICK]) == 0
        base, = (p for p in Path("runs").glob("tiny-*"))
        shutil.copytree(base, "meta-llama/Meta-Llama-3-8B")
        yield root


@pytest.fixture
def interrupted(place, monkeypatch):
    """A run that was interrupted in its evaluation stands where the README's run is, for a while.
    """
    finished, kept = Path("runs/ml-100k-rope-1"), Path("kept")

    def stop(*inputs):
        raise KeyboardInterrupt
    finished.rename(kept)
    with monkeypatch.context() as patch:
        patch.setattr(cetrec, "result_table", stop)
        assert cetrec.main(["--data", "ml-100k", *QUICK]) == 130
    yield
    shutil.rmtree(finished)
    kept.rename(finished)


def run(command: str) -> int:
    """The exit status of a command of README or docs, made short."""
    words = shlex.split(command)
    name = words[0] if words[0] != "-m" else words[1].removeprefix("experiments.")
    argv = words[1:] if words[0] != "-m" else words[2:]
    main, short = SHORT[name]
    if {"--resume", "--eval-only", "--recorded", "--verify"} & set(argv):
        short = []
    flags = [*argv, *short]
    for flag in {f for f in argv if f.startswith("--")} & set(short):       # what is said counts
        at = len(argv) + short.index(flag)
        if flag not in ("--eval-sequences", "--max-steps"):
            del flags[at:at + 2]
    return main(flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_readme_and_docs_works(place, command, request, capsys, monkeypatch):
    if "--device cuda" in command and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if "--resume" in command:
        request.getfixturevalue("interrupted")
    if "experiments.readme" in command:
        monkeypatch.setattr(readme, "write_whole", lambda *inputs: pytest.fail("not up to date"))
    if "--verify" in command:
        monkeypatch.setattr(reproduce, "verify", lambda *inputs: ["tests/test_reproduce.py"])
    try:
        status = run(command)
    except SystemExit as stop:
        status = stop.code
    assert status == 0, capsys.readouterr().err


def test_there_are_commands_and_how_they_are_read():
    assert len(COMMANDS) > 20
    names = {command.split()[1 if command.startswith("-m") else 0] for command in COMMANDS}
    assert "cetrec.py" in names and "experiments.report" in names
    page = ("`python cetrec.py\n--data x`, then\n  .venv/bin/python -m experiments.look a|b # so\n"
            "torchrun --nproc_per_node 8 cetrec.py --data movielens ...  # many\n"
            "python3 -m venv .venv && .venv/bin/python cetrec.py --seeds 7 8 9 --out x\n")
    assert commands_in(page) == ["cetrec.py --data x", "-m experiments.look a",
                                 "-m experiments.look b", "cetrec.py --data movielens",
                                 "cetrec.py --seeds 7 --out x"]


def test_the_stand_ins_are_what_the_readers_of_raw_files_take(place):
    counts = json.loads((place / "runs/ml-100k-rope-1/run.json").read_text())["counts"]
    assert counts["items"] == 40 and counts["test"] > 50
