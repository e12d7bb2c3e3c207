"""Damaged input for every reader: each must read it or refuse it with one of the documented errors.

    python -m experiments.fuzz                      10,000 inputs for each reader
    python -m experiments.fuzz tokenizer csv --inputs 500

A reader is given good files of which one was damaged: bits flipped, pieces cut, doubled or put in,
or, in JSON, a value changed for one that nobody expects. ValueError and OSError are what readers
document. Anything else, a process that dies, and more than two seconds are faults; the inputs that
led to one are kept.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cetrec import TemporalLlama
from data import IGNORE, Catalogue, encode_example, make_sequences, split_by_time
from evaluate import Lists, embed_titles
from experiments.figures import figures_available
from experiments.markup import as_html
from experiments.report import Run, compare, comparison, describe, drawings, shown, telling_user
from experiments.reproduce import results
from llama import Llama, LlamaConfig, load_llama
from lora import add_lora, load_lora
from support import progress
from support.checkpoints import check_checkpoint, read_tokenizer
from support.counting import result_table
from support.datasets import load_interactions, prepare
from support.options import Options, Where, add_flags, as_flag, parse
from support.runs import begin, finish, load_adapter, read_catalogue, read_run, save_adapter
from support.terminal import Parser, exit_status, one_line
from support.tiny import SEEN, tiny_tokenizer, write_base
from support.trie import Trie

TITLES = ["Heat (1995)", "Toy Story", 'Say "Cheese", Amélie', "1984", "Up, Up and Away", "Ran 2"]
SECONDS = 2.0           # a reader may take for one of these small inputs
NASTY = [b"\x00", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\xff\xfe", b'"', b"'", b"\\", b"9" * 400,
         b"-1", b"1e999", b"nan", b"[" * 5_000, b"{" * 5_000, b"::", b"\t", b",", b"|", b"\n\n",
         "\u202e\u2066".encode(), b"\x1b[31m", b"<|end of text|>", b"</s>", b"__import__('os')",
         b"{1: 2}", b"[1]", b"{1}", b"None", b"2**999", b"0x10"]
ODD = [None, True, -1, 0, 1, 10**30, 1e300, float("inf"), float("nan"), "", "x", "9" * 400, [], {},
       [[]], [None], ["q_proj", 1], {"a": []}, {"content": 3}, "\ud800", 0.5, 2**31, 2**63]

# ----------------------------------------------------------------------------------------------
# Damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three faults in random places."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        short = min(end, at + rng.choice((1, 4, 60)))
        before, piece, after, nasty = (content[:at], content[at:short], content[short:],
                                       rng.choice(NASTY))
        content = rng.choice((
            before + bytes([rng.randrange(256)]) + after[1:], before + after, before, after,
            before + piece + piece + after, before + nasty + piece + after, before + nasty + after,
            content.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", b""))),
            nasty + content)) or b" "
    return content


def changed(value, rng: random.Random):
    """A JSON value with one place in it changed, or one member dropped or doubled."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        value = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.15:
            del value[key]
        elif rng.random() < 0.1:
            (value.update({rng.choice(("x", "", "0")): value[key]}) if isinstance(value, dict)
             else value.append(value[key]))
        else:
            value[key] = changed(value[key], rng)
        return value
    return rng.choice(ODD)


def damage(path: Path, rng: random.Random) -> None:
    """Put a damaged file in the place of a good one; now and then there is none."""
    content = path.read_bytes()
    if rng.random() < 0.02:
        path.unlink()
    elif path.suffix == ".json" and content[:2] != b"{'" and rng.random() < 0.7:     # not Steam's
        path.write_bytes(json.dumps(changed(json.loads(content), rng)).encode())
    else:
        path.write_bytes(damaged(content, rng))


# ----------------------------------------------------------------------------------------------
# Readers, each with the good files that it reads

TOKENIZER = tiny_tokenizer(TITLES, np.full(len(TITLES), SEEN), "movies", 300)
CONFIG = LlamaConfig(TOKENIZER.bpe.get_vocab_size(), 8, 16, 1, 2, 1, 4, 1024)
SETTINGS = {"temporal": "rope", "index": "order", "scale": 1.0, "base": "0123456789abcdef"}


def good_base(folder: Path) -> None:
    """A checkpoint folder."""
    write_base(Llama(CONFIG), TOKENIZER, folder)


def use_tokenizer(folder: Path) -> None:
    """Read a tokenizer, and do with it what a run does."""
    tokenizer = read_tokenizer(folder)
    tokenizer.decode(encode_example(tokenizer, TITLES[:3], TITLES[3]).tokens)
    Trie(Catalogue(TITLES, "movies", tokenizer))


def use_base(folder: Path) -> None:
    """Check a base, read it, and run it."""
    check_checkpoint(folder)
    llama = load_llama(folder)
    llama(llama.embed(torch.tensor([[1, 2, 3]])))


def good_adapter(folder: Path) -> None:
    """An adapter with its settings."""
    llama = Llama(CONFIG)
    add_lora(llama)
    save_adapter(llama, folder, SETTINGS)


def use_adapter(folder: Path) -> None:
    """Read an adapter as peft's and as ours."""
    load_lora(Llama(CONFIG), folder)
    load_adapter(Llama(CONFIG), folder, SETTINGS)


def good_run(folder: Path) -> None:
    """The folder of a finished run that was evaluated again, and its data and base in it."""
    READERS["csv"][0](folder)
    parts = split_by_time(make_sequences(load_interactions(str(folder)), 1))
    options = Options.from_flags({"data": str(folder), "model": str(folder)}).record()

    def recommend(histories, ages, progress) -> Lists:
        """All titles, in the order of the catalogue."""
        lists = Lists.empty(len(histories), 5)
        lists.items[:, :len(TITLES)] = np.arange(len(TITLES))
        return lists
    lists = {"10 beams on titles": recommend, "5 beams, grounded": recommend}
    found, arrays = result_table(lists, parts, None, True)
    arrays["answers"] = np.zeros((len(parts[2]), 2))
    record = {"method": "cetrec", "options": options, "base": str(folder), "vocabulary": 300,
              "counts": {"test": len(parts[2])}, "checksums": {"items.csv": "0"},
              "settings": SETTINGS, "versions": {"torch": "2"}, **found}
    begin(folder, record, parts[2])
    for name in ("run", "eval"):
        finish(folder, record, arrays, parts[2], name)
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 1.0, "loss_ta": 1.0, "loss_ct": null, '
                                      '"lr": 0.1, "ms": 3}\n{"step": 1, "validation_ta": 2.0}\n')


def use_run(folder: Path) -> None:
    """Read a run to evaluate it, and to recommend with it."""
    read_run(folder, {})
    read_catalogue(folder)


def use_report(folder: Path) -> None:
    """Read a run to report on it and to compare it; print and draw all of that."""
    run = Run.from_folder(folder)
    results(folder)
    print(describe(run), shown(run), compare([run, run]), as_html(comparison([run, run])))
    if figures_available():
        drawings([run, run], telling_user(run))


def good_checkpoint(folder: Path) -> None:
    """A checkpoint of one factor, which was tuned for a step, and the log that goes with it."""
    factor = torch.nn.Parameter(torch.zeros(3))
    optimizer, done = torch.optim.AdamW([factor]), progress.Progress(step=1)
    factor.grad = torch.ones(3)
    optimizer.step()
    with progress.begin(folder, done, 9) as bar:
        progress.log_step(folder, bar, done, torch.ones(3), 0.1, 0.1)
        done.validation, done.best = [1.0], [factor.detach().clone()]
        progress.log_validation(folder, bar, done)
        progress.save_checkpoint(folder, optimizer, done)


def use_checkpoint(folder: Path) -> None:
    """Go on from a checkpoint."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    done = progress.load_checkpoint(folder, optimizer)
    progress.begin_log(folder, done)


def good_data(inter: str, items: str, row: str, item: str, head: tuple[str, str]) -> Callable:
    """Two files of a data set: six users who take all items in turn."""
    def write(folder: Path) -> None:
        """The interactions and the items."""
        rows = [row.format(u=u, i=i, t=978_300_000 + 60 * i + u, d=f"2017-01-0{i + 1}")
                for u in range(1, 7) for i in range(6)]
        (folder / inter).parent.mkdir(exist_ok=True)
        (folder / inter).write_text(head[0] + "".join(rows))
        names = [item.format(i=i, title=title, quoted=title.replace('"', '""'))
                 for i, title in enumerate(TITLES)]
        (folder / items).write_text(head[1] + "".join(names))
    return write


def use_data(name: str | None) -> Callable:
    """Read a data set to the sequences; the files that are no data set are the user's own."""
    def read(folder: Path) -> None:
        """Strictly, and leaving bad lines out."""
        for skip in (False, True):
            x = load_interactions(name or str(folder), folder, skip)
            split_by_time(make_sequences(prepare(x, name or "own", 1.0), 1))
    return read


def good_titles(folder: Path) -> None:
    """A list of titles; damage makes strange ones of them."""
    (folder / "titles.txt").write_text("\n".join(TITLES) + "\n</s>\n<|end of text|>\n")


def use_titles(folder: Path) -> None:
    """Whatever titles are called, prompts mark them, answers decode to them, the trie has them."""
    text = (folder / "titles.txt").read_bytes().decode("utf-8", "replace")
    titles = list(dict.fromkeys(filter(None, (line.strip() for line in text.splitlines()))))
    if not titles:
        return
    special = {TOKENIZER.bos_id, *TOKENIZER.eos_ids}
    for tokenizer in (TOKENIZER, tiny_tokenizer(titles, np.full(len(titles), SEEN), "items", 280)):
        example = encode_example(tokenizer, titles[:9], titles[-1])
        answer = [label for label in example.labels if label != IGNORE]
        assert tokenizer.decode(answer) == f'"{titles[-1]}"'
        assert not special & set(example.tokens[1:-1])
        assert set(range(len(titles[:9]))) <= set(example.item_pos)
        trie = Trie(Catalogue(titles, "movies", tokenizer))
        assert sorted(i for found in trie.items.values() for i in found) == [*range(len(titles))]
    embed_titles(TemporalLlama(Llama(CONFIG)), titles, TOKENIZER)


def good_flags(folder: Path) -> None:
    """A command line, a word a line."""
    odd = {"int": "9", "float": "0.5", "bool": None}
    words = []
    for f in fields(Options):
        if f.name not in ("data", "model", "chronological", "recompute", "domain", "data_dir"):
            kind, choices = getattr(f.type, "__name__", "str"), f.metadata["choices"]
            value = odd.get(kind, choices[-1] if choices else None)
            words += [as_flag(f.name)] + ([value] if value and kind != "bool" else [])
    (folder / "flags.txt").write_text("\n".join(words))


def use_flags(folder: Path) -> None:
    """Parse a command line and check it. A refusal of the parser is one line, too."""
    words = (folder / "flags.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    ap, errors = Parser(prog="cetrec.py"), io.StringIO()
    add_flags(ap, Options, Where)
    try:
        with contextlib.redirect_stderr(errors):
            Options.from_flags(parse(ap, [word.replace("\0", "") for word in words]))
    except SystemExit as stop:
        assert stop.code == 0 or errors.getvalue().count("\n") == 1     # 0: a mutant asked for help


READERS: dict[str, tuple[Callable, Callable, str]] = {      # good files, reader, files to damage
    "tokenizer": (good_base, use_tokenizer, "*token*.json generation_config.json"),
    "base": (good_base, use_base, "config.json model.safetensors"),
    "adapter": (good_adapter, use_adapter, "*"),
    "run": (good_run, use_run, "run.json catalogue.json"),
    "report": (good_run, use_report, "*.json* *evaluation.safetensors"),
    "checkpoint": (good_checkpoint, use_checkpoint, "*"),
    "titles": (good_titles, use_titles, "*"),
    "flags": (good_flags, use_flags, "*"),
    "csv": (good_data("interactions.csv", "items.csv", "{u},{i},{d}\n", '{i},"{quoted}"\n',
                      ("user,item,timestamp\n", "item,title\n")), use_data(None), "*.csv"),
    "recbole": (good_data("x.inter", "x.item", "{u}\t{i}\t{t}\n", "{i}\t{title}\n",
                          ("user_id:token\titem_id:token\ttimestamp:float\n",
                           "item_id:token\ttitle:token_seq\n")), use_data(None), "x.*"),
    "ml-100k": (good_data("ml-100k/u.data", "ml-100k/u.item", "{u}\t{i}\t3\t{t}\n",
                          "{i}|{title}" + "|0" * 22 + "\n", ("", "")), use_data("ml-100k"),
                "ml-100k/*"),
    "movielens": (good_data("ml-1m/ratings.dat", "ml-1m/movies.dat", "{u}::{i}::3::{t}\n",
                            "{i}::{title}::Drama\n", ("", "")), use_data("ml-1m"), "ml-1m/*"),
    "steam": (good_data("steam-mcauley/steam_reviews.json", "steam-mcauley/steam_games.json",
                        "{{'username': u'{u}', 'product_id': '{i}', 'date': '{d}'}}\n",
                        "{{'id': '{i}', 'title': u'''{title}'''}}\n", ("", "")),
              use_data("steam"), "steam-mcauley/*"),
    "lastfm": (good_data("lastfm-hetrec/user_taggedartists.dat", "lastfm-hetrec/artists.dat",
                         "{u}\t{i}\t1\t1\t4\t2009\n", "{i}\t{title}\tx\ty\n",
                         ("userID\tartistID\ttagID\tday\tmonth\tyear\n",
                          "id\tname\turl\tpictureURL\n")), use_data("lastfm"),
               "lastfm-hetrec/*"),
}

# ----------------------------------------------------------------------------------------------
# The hunt


class TooSlow(BaseException):
    """A reader has had its time."""


def ring(number, frame) -> None:
    """Comes when the time is over."""
    raise TooSlow


def outcome(read: Callable, folder: Path) -> str:
    """"" if the reader reads or refuses as documented, else what it did."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            read(folder)
    except (ValueError, OSError) as error:
        return "" if "\n" not in one_line(error) else "more than one line"
    except TooSlow:
        return f"more than {SECONDS} s"
    except BaseException as error:          # panics of other languages are no Exceptions
        return f"{type(error).__name__}: {one_line(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def try_each(numbers: range, name: str, victims: list[Path], good: Path, trial: Path,
             outcomes: Path) -> None:
    """In the child: a line for each input, its number first, so that the last one is known."""
    signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)            # where libraries report their panics
    with open(outcomes, "a", buffering=1) as file:
        for number in numbers:
            rng = random.Random(f"{name} {number}")
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(good, trial)
            file.write(f"{number}\t")
            file.flush()
            damage(trial / rng.choice(victims), rng)
            file.write(outcome(READERS[name][1], trial) + "\n")


def hunt(name: str, numbers: range, kept: Path) -> list[str]:
    """Try so many damaged inputs, each of which its number decides. Returns the faults.

    The work is done in a child process, which may die of an input.
    """
    make, _, pattern = READERS[name]
    good, trial = kept / f"{name}-good", kept / f"{name}-trial"
    if not good.exists():
        good.mkdir(parents=True)
        torch.manual_seed(0)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            make(good)
            with contextlib.suppress(ValueError):           # Steam's filters leave nothing
                READERS[name][1](good)          # what libraries load late is loaded now
    victims = sorted({path.relative_to(good) for p in pattern.split() for path in good.glob(p)})
    outcomes, faults, start = kept / f"{name}.txt", [], numbers.start
    while start < numbers.stop:
        outcomes.write_text("")
        if (child := os.fork()) == 0:
            try:
                try_each(range(start, numbers.stop), name, victims, good, trial, outcomes)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        lines = outcomes.read_text().splitlines()
        for line in lines:
            number, _, fault = line.partition("\t")
            if fault or status and line is lines[-1]:
                faults.append(f"{name} {number}: {fault or 'the process died'}")
        start = int(lines[-1].partition("\t")[0]) + 1
    return faults


def main(argv: list[str] | None = None) -> int:
    """Parse, hunt and print. Returns the exit status, 1 if there were faults."""
    ap = Parser(prog="python -m experiments.fuzz", usage="[READER ...] [flags]",
                description="Give damaged input to the readers, and tell what they do not bear.")
    ap.add_argument("readers", nargs="*", metavar="READER", default=[*READERS],
                    help=f"of {', '.join(READERS)} (default: all)")
    ap.add_argument("--inputs", type=int, default=10_000, metavar="N",
                    help="for each reader (default: %(default)s)")
    ap.add_argument("--from", type=int, default=0, metavar="N", dest="first",
                    help="number of the first; a number decides its input (default: 0)")
    flags = ap.parse_args(argv)
    faults = []

    def work() -> None:
        """All hunts, one after another."""
        if unknown := set(flags.readers) - READERS.keys():
            raise ValueError(f"{min(unknown)}: no such reader; known are {', '.join(READERS)}")
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as kept:
            for name in flags.readers:
                started, found = time.perf_counter(), []
                ends = range(flags.first, flags.first + flags.inputs, 250)
                for start in tqdm(ends, desc=name, unit="part", leave=False, disable=None):
                    stop = min(start + 250, flags.first + flags.inputs)
                    found += hunt(name, range(start, stop), Path(kept))
                print(f"{name} | {flags.inputs:,} inputs | {len(found)} faults | "
                      f"{time.perf_counter() - started:.0f} s", *found[:9], sep="\n  ")
                faults.extend(found)
    return exit_status(work) or bool(faults)


if __name__ == "__main__":
    sys.exit(main())
