"""Run folders: what is in them, how a run is told from another, and what a run works on.

A run folder holds run.json (options, versions, counts, and at the end the results), log.jsonl (a
line for each step), the adapter, evaluation.safetensors (lists by test sequence),
recommendations.csv (the best of the lists, by the caller's own ids), catalogue.json, and until the
run is complete checkpoint.safetensors (support/progress.py). What --eval-only finds goes to
eval.json and eval-*; the next time to eval-2.json and eval-2-*, and so on. All of it is
safetensors, JSON or CSV; nothing is unpickled.

Nothing here is the paper. It is what lets a run be repeated, interrupted and looked at afterwards.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence as Ids
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
from torch import nn

from data import (DOMAINS, NO_ITEM, Catalogue, Example, Sequences, Tokenizer, encode_sequences,
                  make_sequences, split_by_time)
from llama import Llama, load_llama
from lora import add_lora, load_lora, save_lora
from support.checkpoints import (check_checkpoint, check_config, check_context, find_checkpoint,
                                 read_tokenizer)
from support.counting import format_table, known
from support.datasets import (FORMATS, TABLE_2, counts, describe_times, in_words,
                              load_interactions, prepare)
from support.files import (locked, naming, read_object, save_arrays, write_json,
                           write_whole)
from support.options import EVALUATION, Options, as_flag
from support.machine import choose_device, choose_kernels
from support.processes import agreed, first_process_first, processes, rank
from support.synthetic import SyntheticWorld
from support.tiny import TINY_BASES, TinyBase, tiny_base


COMPLETE = "{}: this run is complete; --eval-only evaluates it again"


@dataclass(frozen=True)
class RunInputs:
    """What a run works on: its options, its data, its base model. The record goes to run.json."""

    options: Options
    splits: tuple[Sequences, Sequences, Sequences]      # train, validation, test
    synthetic: SyntheticWorld | None                    # where the data came from one
    llama: Llama
    tokenizer: Tokenizer
    device: torch.device
    record: dict

    @property
    def catalogue(self) -> Catalogue:
        """The items as the base model meets them."""
        return Catalogue(self.splits[0].titles, self.splits[0].domain, self.tokenizer)


def open_inputs(options: Options, out: Path, source: Path | None = None,
                same_as: Path | None = None) -> RunInputs:
    """Read the data and the base model, which is made or fetched if need be; print what they are.

    source: the folder of the base model, if it is known. same_as: the folder of a run; data and
    base model must be what they were when it began. Raises FileNotFoundError or ValueError, where
    possible before weights are read.
    """
    check_writable(out)
    device, dtype = choose_device(options)
    splits, synthetic, record = open_data(options)
    if same_as:
        check_same(same_as, record)
    if source is None and options.model == "tiny":
        source = tiny_base(out, splits, options.seed, device,
                           TINY_BASES.get(options.data, TinyBase()))
    source = source or find_checkpoint(options.model)
    config, tokenizer = check_config(source), read_tokenizer(source)
    for part in splits:
        check_context(tokenizer, part, config.max_position_embeddings)
    started, digest = time.perf_counter(), check_checkpoint(source)
    llama = load_llama(source, "cpu" if options.shard else device, dtype)
    choose_kernels(device, llama.lm_head.weight.dtype)
    settings = adapter_settings(options, digest, splits[0].domain, splits[0].titles)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"base model {source} | digest {digest} | {config.vocab_size:,} tokens | read in "
          f"{time.perf_counter() - started:.1f} s | on {device}{threads}, "
          f"{'as stored' if dtype is None else str(dtype).removeprefix('torch.')}")
    record |= {"method": "cetrec", "options": options.record(), "vocabulary": config.vocab_size,
               "settings": settings,
               "base": source.name if options.model == "tiny" else str(source),
               "versions": versions(device)}
    if same_as:
        check_same(same_as, record)
    return RunInputs(options, splits, synthetic, llama, tokenizer, device, record)


def reopen(folder: Path, flags: dict, command: str) -> RunInputs:
    """What the run in a folder worked on; see read_run for the flags that may change it."""
    options, source = read_run(folder, flags, command)
    if options.data not in (*FORMATS, "synthetic") and not Path(options.data).is_dir():
        raise FileNotFoundError(f"{options.data}: no such folder, but the data of the run were "
                                "there; if it has moved, say where with --data")
    return open_inputs(options, folder.parent, source, same_as=folder)


def open_base(folder: Path, flags: dict, command: str) -> tuple[Options, Llama, Catalogue, dict]:
    """What the adapter of a run goes with, without the data it was tuned on.

    -> options, base model, catalogue, and the settings that load_adapter wants
    """
    options, source = read_run(folder, flags, command)
    if options.index == "time":
        raise ValueError(f"{folder}: its index is time, and titles without dates have none")
    device, dtype = choose_device(options)
    check_config(source)
    tokenizer, digest = read_tokenizer(source), check_checkpoint(source)
    llama = load_llama(source, device, dtype)
    choose_kernels(device, llama.lm_head.weight.dtype)
    domain, titles = read_catalogue(folder)
    return (options, llama, Catalogue(titles, domain, tokenizer),
            adapter_settings(options, digest, domain, titles))


def adapter_settings(options: Options, base: str, domain: str, titles: list[str]) -> dict:
    """What a model and its catalogue must have in common with those that an adapter was tuned with.
    """
    catalogue = hashlib.sha256(json.dumps([domain, titles]).encode()).hexdigest()[:16]
    return options.adapter_settings() | {"base": base, "catalogue": catalogue}


def add_factors(model: nn.Module, options: Options) -> None:
    """LoRA factors with the settings of a run, drawn from its seed (§3.1)."""
    torch.manual_seed(options.seed)
    add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout,
             options.lora_targets)


# ----------------------------------------------------------------------------------------------
# The folder of a run


def check_writable(out: Path) -> None:
    """Raise ValueError if nothing can be written below `out`, before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return
    except OSError as error:
        raise ValueError(f"{out}: cannot write there ({error.strerror}); choose another folder "
                         "with --out") from None


def start(out: Path, name: str, inputs: RunInputs) -> Path:
    """Show a training prompt, and begin a run: make its folder and write run.json there."""
    (example,) = encode_sequences(inputs.tokenizer, inputs.splits[0].select(slice(0, 1)))
    print("a training prompt, each item ⟨marked⟩ with its index k\n"
          f"{show_prompt(inputs.tokenizer, example)}")
    folder = new_folder(out, f"{Path(inputs.options.data).resolve().name}-{name}")
    begin(folder, inputs.record, inputs.splits[0])
    return folder


def begin(folder: Path, record: dict, sequences: Sequences) -> None:
    """Write what is known of a run before it tunes: its catalogue and its record."""
    write_json(folder / "catalogue.json", {"domain": sequences.domain, "titles": sequences.titles})
    write_json(folder / "run.json", record)


def show_prompt(tokenizer: Tokenizer, example: Example) -> str:
    """The prompt as text, with each item as ⟨its tokens⟩[k = its index, tokens first..last]."""
    text, first = "", 0
    for k, group in itertools.groupby(example.item_pos):
        last = first + len(list(group))
        piece = tokenizer.bpe.decode(example.tokens[first:last], skip_special_tokens=False)
        text += piece if k == NO_ITEM else f"⟨{piece}⟩[k={k:.3g}, tokens {first}..{last - 1}]"
        first = last
    return text


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """In this context nobody else works on a run, from its first step to its last result.

    An interruption, and an error of the system, say how to continue. Raises ValueError if another
    process is at work there, or has completed the run since it was read.
    """
    with locked(folder):
        with first_process_first():                     # which has just written it
            record = read_object(folder / "run.json")
        if "rows" in record:
            raise ValueError(COMPLETE.format(folder))
        ours = record["method"] == "cetrec"         # a baseline's run cannot be continued
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"continue with --resume {folder}" if ours else "") from None
        except BrokenPipeError:         # who reads the output has had enough
            raise
        except OSError as error:        # a full disk above all
            again = f"; once that is mended, --resume {folder} continues" if ours else ""
            raise OSError(f"{error}{again}") from None


def new_folder(out: Path, name: str) -> Path:
    """Make out/name-1, or the next number that is free. No other run gets the same."""
    folder = None
    for number in itertools.count(1) if rank() == 0 else ():
        try:
            (folder := out / f"{name}-{number}").mkdir()
            break
        except FileExistsError:
            continue
    return agreed(folder)


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what results depend on, for run.json: packages, the device, and the project's
    revision where it is under git."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = {"python": sys.version.split()[0], "torch": torch.__version__,
             "numpy": np.__version__, "tokenizers": tokenizers.__version__,
             "safetensors": safetensors.__version__,
             "device": f"{device.type} ({kind}), {torch.get_num_threads()} threads",
             "processes": str(processes())}
    project = Path(__file__).parent.parent
    if (project / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "-C", project, "describe", "--always", "--dirty",
                              "--abbrev=40"], capture_output=True, text=True)
        found |= {"revision": git.stdout.strip()} if git.returncode == 0 else {}
    return found


def finish(folder: Path, record: dict, arrays: dict, sequences: Sequences,
           name: str = "run") -> None:
    """Write results and print them. name: run, or eval for a run that is evaluated again, which
    becomes eval-2 and so on where such an evaluation is there already."""
    if rank():
        return
    numbers = itertools.count(2)
    while name != "run" and (folder / f"{name}.json").exists():
        name = f"eval-{next(numbers)}"
    prefix = "" if name == "run" else f"{name}-"
    record["evaluated"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())    # in UTC
    record["arrays"] = save_arrays(arrays, folder / f"{prefix}evaluation.safetensors")
    write_whole(folder / f"{prefix}recommendations.csv",
                recommendations(record["best"], arrays, sequences).encode())
    write_json(folder / f"{name}.json", record)
    for done in ("checkpoint.safetensors", ".lock") if name == "run" else ():
        (folder / done).unlink(missing_ok=True)
    print(f"{record['protocol']}\n{format_table(record['rows'])}")
    if "effect" in record:
        effect, error = record["effect"]
        print(f"effect of order on log p(answer): {effect:+.4f} ± {known(error, '.4f')} nats, "
              "factual minus erased world")
    print(f"written {folder}")


def recommendations(name: str, arrays: dict, sequences: Sequences) -> str:
    """The lists of that name as CSV: a line for each rank of each test sequence.

    Users and items are called as in the data, and the score is the title's log p, where the list
    has one. The answer is the item that the user took next.
    """
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["user", "rank", "item", "title", "score", "answer", "answer_title"])

    def own(ids: Ids[str], number: int) -> str | int:
        return ids[number] if ids else int(number)
    for row, answer, items, scores in zip(
            arrays["sequence"], arrays["target"], arrays[f"lists/{name}/original"],
            arrays[f"log_p/{name}/original"]):
        user = own(sequences.user_ids, sequences.users[row])
        for place, (item, score) in enumerate(zip(items, scores), 1):
            if item >= 0:
                out.writerow([user, place, own(sequences.item_ids, item), sequences.titles[item],
                              "" if np.isnan(score) else f"{score:.6g}",
                              own(sequences.item_ids, answer), sequences.titles[answer]])
    return text.getvalue()


def read_run(folder: Path, flags: dict, command: str = "--eval-only") -> tuple[Options, Path]:
    """The options of a run, changed by the flags that may differ, and the folder of its base.

    What decides the result is taken from the run itself. Only what concerns the machine, where
    files are and, unless a run is resumed, the evaluation may differ. The command is named in
    messages. Raises FileNotFoundError or ValueError.
    """
    allowed = {"data", "data_dir", "device", "model", "shard"} | (
        set() if command == "--resume" else EVALUATION | {"dtype"})
    if extra := sorted(flags.keys() - allowed):
        raise ValueError(f"{command} takes data, base and tuning from the run; it does not go with "
                         f"{', '.join(map(as_flag, extra))}")
    record = folder / "run.json"
    if not record.is_file():
        raise FileNotFoundError(f"{record}: not found; {command} wants the folder of a run")
    try:
        saved = read_object(record)
        model, base, ended = saved["options"]["model"], Path(saved["base"]), "rows" in saved
        if saved["method"] != "cetrec":
            raise ValueError(f"{folder}: a run of the baseline {saved['method']}; {command} and "
                             "what loads its model want a run of cetrec.py")
        changed = {"shard": False} | {k: value for k, value in flags.items() if k != "out"}
        options = Options.from_record(saved["options"], **changed | {"model": model})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{record}: not the record of a run of this version ({error!r})") from None
    options.check_use(flags)
    if command == "--resume" and ended:
        raise ValueError(COMPLETE.format(folder))
    if command != "--resume" and not ended:        # temporal.json is the last file of an adapter
        if not (folder / "temporal.json").is_file():
            raise ValueError(f"{folder}: interrupted before its first epoch ended, so it has no "
                             "adapter yet; --resume continues it")
        print(f"{folder} is not complete; this takes its best epoch so far, and --resume continues")

    base = folder.parent / base if model == "tiny" else base        # it lies beside its runs
    if "model" in flags or not base.exists() and model != "tiny":
        base = find_checkpoint(flags.get("model", model))
    if not base.exists():
        raise FileNotFoundError(f"{base}: not found, but the run was tuned on this base; if it has "
                                "moved, say where with --model")
    return options, base


def read_catalogue(folder: Path) -> tuple[str, list[str]]:
    """(domain, titles) of a run's items."""
    path = folder / "catalogue.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; python cetrec.py --eval-only {folder} writes "
                                "it")
    try:
        catalogue = read_object(path)
        domain, titles = catalogue["domain"], catalogue["titles"]
        if domain in DOMAINS and titles and titles == [str(title) for title in titles]:
            return domain, titles
        raise ValueError(f"{path}: not a run's catalogue; its domain or its titles are none")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a run's catalogue ({error!r})") from None


def check_same(folder: Path, record: dict) -> None:
    """Raise ValueError if data or base are not what they were when the run in the folder began.

    record is what would be written to run.json now, results apart. Options may differ where
    read_run allows it; a base may have moved, and its digest is among the settings.
    """
    saved = read_object(folder / "run.json")
    here = json.loads(json.dumps(record))
    for key in sorted(saved.keys() & here.keys() - {"options", "base", "versions"}):
        was, now = saved[key], here[key]
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):     # name what differs only
            was, now = ({k: v for k, v in one.items() if v != other.get(k)}
                        for one, other in ((was, now), (now, was)))
        raise ValueError(f"{folder}: {key} of the run, {was}, is now {now}; a run continues, and "
                         "is evaluated, with the data and the base it began with only")


# ----------------------------------------------------------------------------------------------
# Data


def open_data(options: Options) -> tuple[tuple[Sequences, Sequences, Sequences],
                                         SyntheticWorld | None, dict]:
    """(train, valid, test), the world if it is synthetic, and a record of counts and checksums.

    Prints every step of the preparation with its counts, beside the paper's Table 2.
    """
    if options.data == "synthetic":
        world = SyntheticWorld(strength=options.order_strength, seed=options.seed,
                               clock=options.clock)
        x = world.interactions(seed=options.seed)
    else:
        world = None
        with first_process_first():                             # which may have to fetch files
            raw = load_interactions(options.data, options.data_dir, options.skip_bad_lines,
                                    options.domain, options.drop_untitled)
        x = prepare(raw, options.data, options.sample, options.seed, options.chronological,
                    options.keep_repeats)
        print(f"raw | {x.steps[0]}", *(f"step | {step}" for step in x.steps[1:]),
              describe_times(x), sep="\n")
    sequences = make_sequences(x, index=options.index)
    train_set, valid_set, test_set = split_by_time(sequences)
    if options.limit_train:
        train_set = train_set.select(slice(-options.limit_train, None))
    found = counts(x) | {"items": len(x.titles), "sequences": len(sequences),
                         "train": len(train_set), "valid": len(valid_set), "test": len(test_set)}
    print(f"data {options.data} | {in_words(found)}")
    if options.data in TABLE_2:
        print(f"paper's Table 2 | {in_words(TABLE_2[options.data])}")
    return (train_set, valid_set, test_set), world, {
        "counts": found, "steps": x.steps, "checksums": x.checksums}


# ----------------------------------------------------------------------------------------------
# Adapters: peft's two files, and temporal.json, which says what they were tuned for


def save_adapter(model, folder: Path, settings: dict) -> None:
    """Write the factors, and the settings they go with, as Options.adapter_settings has them.

    temporal.json is written last and has the checksum of the factors' file.
    """
    if rank():
        return
    name = settings.get("model")        # for peft, which cannot make the tiny base model
    with naming(folder / "adapter_model.safetensors"):
        save_lora(model, folder, None if name == "tiny" else name)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        with open(folder / name, "rb") as file:         # on the disk before what vouches for it
            os.fsync(file.fileno())
    write_json(folder / "temporal.json", settings | {"sha256": adapter_checksum(folder)})


def adapter_checksum(folder: Path) -> str:
    """SHA-256 of the file of the factors, or "" if there is none."""
    path = folder / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def load_adapter(model, folder: Path, settings: dict) -> None:
    """Add the folder's factors to a model of the settings that they were tuned with.

    Raises FileNotFoundError or ValueError: files absent or damaged; another base model, temporal
    embedding or catalogue than in the settings, both named. An adapter that peft wrote has no
    temporal.json; load it with lora.load_lora.
    """
    path = Path(folder) / "temporal.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a tuned adapter of ours has it")
    saved = read_object(path)
    if missing := [key for key in (*settings, "sha256") if key not in saved]:
        raise ValueError(f"{path}: not the settings of an adapter ({missing[0]!r} is missing)")
    if any(saved[key] != value for key, value in settings.items()):
        tuned, ours = (", ".join(f"{key} {values[key]}" for key in settings)
                       for values in (saved, settings))
        raise ValueError(f"{path}: the adapter was tuned with {tuned}; this model has {ours}. Give "
                         "it the base model and the settings it was tuned with")
    if saved["sha256"] != adapter_checksum(Path(folder)):
        raise ValueError(f"{folder}: the factors are not those that temporal.json was written for; "
                         "they are damaged, absent or changed, so copy them again or tune again")
    load_lora(model, folder)
