"""Speed and memory, each figure with its workload; nothing here is part of the method.

    python -m experiments.benchmark --data-dir data         data preparation

Every measurement runs in a process of its own, so that peak memory is its own. What cannot run here
(a data set that is not there) says "not measured".
"""

import argparse
import contextlib
import gzip
import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from cetrec import (TINY_BASES, TemporalLlama, batches, cetrec_loss, learning_rate, optimizer_step,
                    peak_memory, tiny_base)
from data import SyntheticWorld, Tokenizer, make_sequences, split_by_time, tiny_tokenizer
from datasets import load_interactions, prepare
from llama import load_llama
from lora import ALL_LINEAR, add_lora, lora_parameters


def movielens(data_dir: str) -> str:
    """ML-1M from its text files to the split, the whole 5-core."""
    started = time.perf_counter()
    raw = load_interactions("movielens", data_dir)
    train_set, valid_set, test_set = split_by_time(make_sequences(prepare(raw, "movielens", 1.0)))
    seconds = time.perf_counter() - started
    sequences = len(train_set) + len(valid_set) + len(test_set)
    return f"{seconds:.1f} s for {len(raw.users):,} ratings, {sequences:,} sequences"


def steam(lines: int) -> str:
    """Reading and preparing a file of reviews as Steam's lie, made here, a third as many users."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "steam-mcauley"
        folder.mkdir()
        with gzip.open(folder / "steam_games.json.gz", "wt", compresslevel=1) as file:
            file.writelines(f"{{u'id': u'{g}', u'title': u'Game {g}'}}\n" for g in range(15_474))
        users = (lines // 3 * rng.random(lines) ** 3).astype(int)       # a few write a lot
        games = rng.integers(0, 15_474, lines)
        days = [str(np.datetime64("2010-10-15") + d) for d in rng.integers(0, 2_600, 5_000)]
        text = "Good game, and it\\'s fun to play with friends \\u2122. " * 3
        with gzip.open(folder / "steam_reviews.json.gz", "wt", compresslevel=1) as file:
            file.writelines(
                f"{{u'username': u'user {u}', u'hours': 0.1, u'product_id': u'{g}', u'page': 1, "
                f"u'date': u'{days[i % 5_000]}', u'text': u'{text}', u'early_access': False}}\n"
                for i, (u, g) in enumerate(zip(users, games)))
        started = time.perf_counter()
        raw = load_interactions("steam", root)
        read = time.perf_counter() - started
    prepare(raw, "steam")
    return f"{lines / read:,.0f} lines/s, streamed; {lines:,} made-up reviews"


def tokenisation() -> str:
    """Prompts and answers to padded batches of 64, tiny tokenizer, the synthetic world."""
    train_set, _, _ = split_by_time(make_sequences(SyntheticWorld().interactions()))
    counts = np.bincount(train_set.items[train_set.targets], minlength=len(train_set.titles))
    tokenizer = tiny_tokenizer(train_set.titles, counts, train_set.domain, 768)
    started = time.perf_counter()
    done = sum(len(batch.tokens) for _ in range(4) for batch in
               batches(tokenizer, train_set, 64, np.random.default_rng(0)))
    return f"{done / (time.perf_counter() - started):,.0f} prompts/s, tiny tokenizer, batches of 64"


def waiting(steps: int) -> str:
    """Share of a tuning loop that waits for its next batch: the default run's."""
    train_set, _, _ = split_by_time(make_sequences(SyntheticWorld().interactions()))
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(None):
        base = tiny_base(Path(root), train_set.select(slice(0, 200)), 0, torch.device("cpu"),
                         TINY_BASES["synthetic"])
        model = TemporalLlama(load_llama(base), tokenizer=Tokenizer.from_folder(base)).train()
    add_lora(model, 16, 32.0, 0.05, ALL_LINEAR)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
    waited, started = 0.0, time.perf_counter()
    source = batches(model.tokenizer, train_set, 64, np.random.default_rng(0))
    for step in range(1, steps + 1):
        asked = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - asked
        optimizer_step(optimizer, cetrec_loss(model, batch, 0.1)[0],
                       learning_rate(step, steps, 1e-3, 10))
    total = time.perf_counter() - started
    return (f"{100 * waited / total:.1f} % of {steps} steps of the default run, "
            f"{1000 * total / steps:.0f} ms each")


def measure(function, *arguments) -> tuple[str, float]:
    """(result, peak GB) of a function, run in this process."""
    return function(*arguments), peak_memory(torch.device("cpu"))


def main(argv: list[str] | None = None) -> int:
    """Run every measurement and print a table."""
    ap = argparse.ArgumentParser(prog="benchmark", allow_abbrev=False, description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data-dir", default="data", metavar="DIR",
                    help="folder with ml-1m/ as unpacked (default: %(default)s)")
    ap.add_argument("--steam-lines", type=int, default=200_000, metavar="N",
                    help="made-up reviews to stream; the real file has 7,793,069 (default: "
                    "%(default)s)")
    options = ap.parse_args(argv)
    print(f"machine | {platform.processor() or platform.machine()}, {torch.get_num_threads()} "
          f"threads | torch {torch.__version__}")
    rows = [("ML-1M, text to split", movielens, options.data_dir),
            ("Steam, reading", steam, options.steam_lines),
            ("tokenising in the loop", tokenisation), ("loop waits for data", waiting, 100)]
    for name, *work in rows:
        if work[0] is movielens and not Path(options.data_dir, "ml-1m").is_dir():
            print(f"{name:<24} not measured: no ml-1m in {options.data_dir}")
            continue
        pool = multiprocessing.get_context("spawn").Pool(1)
        result, peak = pool.apply(measure, work)
        pool.close()
        pool.join()
        print(f"{name:<24} {result} | peak {peak:.2f} GB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
