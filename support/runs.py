"""Run folders: what is in them, how a run is told from another, and what a run works on.

A run folder holds run.json (options, versions, counts, and at the end the results), log.jsonl (a
line for each step), the adapter, evaluation.safetensors (lists by test sequence), catalogue.json,
and until the run is complete checkpoint.safetensors (support/journal.py). What --eval-only finds
goes to eval.json and eval-evaluation.safetensors beside them. All of it is safetensors or JSON;
nothing is unpickled.

Nothing here is the paper. It is what lets a run be repeated, interrupted and looked at afterwards.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
from safetensors.torch import load_file

from data import DOMAINS, Batch, Sequences, make_sequences, split_by_time
from evaluate import format_table
from llama import LlamaConfig
from lora import load_lora, save_lora
from support.checkpoints import find_checkpoint
from support.datasets import TABLE_2, counts, load_interactions, prepare
from support.files import read_object, save_arrays, write_json
from support.options import EVALUATION, Options, as_flag
from support.processes import agreed, check_shardable, first_process_first, processes, rank
from support.synthetic import SyntheticWorld

# ----------------------------------------------------------------------------------------------
# The command and its folders


def check_writable(out: Path) -> None:
    """Raise ValueError if nothing can be written below `out`, before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return
    except OSError as error:
        raise ValueError(f"{out}: cannot write there ({error.strerror}); choose another folder "
                         "with --out") from None


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
    """Of what results depend on, for run.json: packages, the device, and the project's revision
    where it is under git."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = {"python": sys.version.split()[0], "torch": torch.__version__,
             "numpy": np.__version__, "tokenizers": tokenizers.__version__,
             "safetensors": safetensors.__version__,
             "device": f"{device.type} ({kind}), {torch.get_num_threads()} threads",
             "processes": str(processes())}
    here = Path(__file__).parent.parent
    if (here / ".git").exists() and shutil.which("git"):
        told = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
                              capture_output=True, text=True)
        found |= {"revision": told.stdout.strip()} if told.returncode == 0 else {}
    return found


def finish(folder: Path, record: dict, arrays: dict, test_set: Sequences,
           tuned: bool = True) -> None:
    """Write what was found, beside the run's own files if it was only evaluated, and print it."""
    if rank():
        return
    if not tuned:       # until the new one is whole there is none, and the run's own counts
        (folder / "eval.json").unlink(missing_ok=True)
    record["arrays"] = save_arrays(
        arrays, folder / ("evaluation.safetensors" if tuned else "eval-evaluation.safetensors"))
    write_json(folder / "catalogue.json", {"domain": test_set.domain, "titles": test_set.titles})
    write_json(folder / ("run.json" if tuned else "eval.json"), record)
    if tuned:
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    print(f"{record['protocol']}\n{format_table(record['rows'])}")
    if "effect" in record:
        print("effect of order on log p(answer) (Eq. 7): {:+.4f} ± {:.4f} nats, factual minus "
              "erased world".format(*record["effect"]))
    title = test_set.titles[test_set.target(0)] if record["method"] == "cetrec" else None
    print(f"written {folder}; look at it with\n{next_commands(folder, title)}")


def next_commands(folder: Path, title: str | None) -> str:
    """What can be done with a finished run, as lines to paste into a shell.

    title is one of the catalogue, which may hold characters that a shell would take for its own; it
    is None for a baseline, whose model only its own command can load.
    """
    run = shlex.quote(str(folder))
    lines = [f"  python -m experiments.report {run}        # its tables and figures on a page"]
    if title is not None:
        lines += [f"  python -m experiments.explain {run} 0     # a test sequence in both worlds",
                  f"  python -m experiments.recommend {run} {shlex.quote(title)}     # ten titles"]
    return "\n".join(lines)


def read_run(folder: Path, given: dict, flag: str = "--eval-only") -> tuple[Options, Path | None]:
    """The options of a run, changed by the flags that may differ, and the folder of its base.

    What decides the result is taken from the run itself. Only what concerns the machine, the places
    of files and, unless a run goes on or is done again, the evaluation may differ. The flag names
    the command in messages. The base is None if it is a tiny one to be made again. Raises
    FileNotFoundError or ValueError.
    """
    allowed = {"data_dir", "device", "model", "shard"} | {
        "--resume": set(), "--reproduce": {"out"}}.get(flag, EVALUATION | {"dtype"})
    if extra := sorted(given.keys() - allowed):
        raise ValueError(f"{flag} takes data, base and tuning from the run; it does not go with "
                         f"{', '.join(map(as_flag, extra))}")
    record = folder / "run.json"
    if not record.is_file():
        raise FileNotFoundError(f"{record}: not found; {flag} wants the folder of a run")
    try:
        saved = read_object(record)
        model, base, ended = saved["options"]["model"], Path(saved["base"]), "rows" in saved
        if saved["method"] != "cetrec":
            raise ValueError(f"{folder}: a run of the baseline {saved['method']}; {flag} and what "
                             "loads its model want a run of cetrec.py")
        changed = {"shard": False} | {k: value for k, value in given.items() if k != "out"}
        options = Options.from_record(saved["options"], **changed | {"model": model})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{record}: not the record of a run of this version ({error!r})") from None
    options.check_use(given)
    if flag == "--reproduce":
        if not ended:
            raise ValueError(f"{folder}: this run is not complete; --resume goes on with it")
        if model == "tiny":
            return options, None
    if flag == "--resume" and ended:
        raise ValueError(f"{folder}: this run is complete; --eval-only evaluates it again")
    if flag != "--resume" and not ended:        # temporal.json is the last file of an adapter
        if not (folder / "temporal.json").is_file():
            raise ValueError(f"{folder}: interrupted before its first epoch ended, so it has no "
                             "adapter yet; --resume goes on with it")
        print(f"{folder} is not complete; this takes its best epoch so far, and --resume goes on")

    base = folder.parent / base if model == "tiny" else base        # it lies beside its runs
    if "model" in given or not base.exists() and model != "tiny":
        base = find_checkpoint(given.get("model", model))
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
        if domain in DOMAINS and titles and all(type(title) is str for title in titles):
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
        raise ValueError(f"{folder}: {key} of the run, {was}, is now {now}; a run goes on, and is "
                         "evaluated, with the data and the base it began with only")


def differences(was: Path, now: Path) -> str:
    """Where losses and metrics of two runs differ most, as two lines."""
    logs, tables = [], []
    for folder in (was, now):
        lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
        logs.append({(line["step"], key): value for line in lines for key, value in line.items()
                     if key in ("loss", "loss_ta", "loss_ct", "validation_ta")})
        rows = read_object(folder / "run.json")["rows"]
        tables.append({(row, metric): value[0] for row, values in rows.items()
                       for metric, value in values.items()})
    told = [f"{was} and {now}, which does it again:"]
    for name, (one, other) in (("losses", logs), ("metrics", tables)):
        gaps = {key: 0.0 if str(one.get(key)) == str(other.get(key)) else    # nan is nan here
                abs(one[key] - other[key]) if key in one.keys() & other.keys() else math.inf
                for key in one | other}
        worst = max(gaps, key=gaps.get)
        told.append(f"  {len(gaps):,} {name} | " + (
            "all the same, to the last digit" if not gaps[worst] else f"the largest difference is "
            f"{gaps[worst]:.2g}, of {worst[1]} at {worst[0]}"))
    return "\n".join(told)


# ----------------------------------------------------------------------------------------------
# Data, device, memory


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
                                    options.domain)
        print(f"raw | {_counted(counts(raw))}")
        x = prepare(raw, options.data, options.sample, options.seed, options.chronological)
        print(*(f"step | {step}" for step in x.steps), sep="\n", end="\n" if x.steps else "")
    sequences = make_sequences(x, index=options.index)
    train_set, valid_set, test_set = split_by_time(sequences)
    if options.limit_train:
        train_set = train_set.select(slice(-options.limit_train, None))
    found = counts(x) | {"items": len(x.titles), "sequences": len(sequences),
                         "train": len(train_set), "valid": len(valid_set), "test": len(test_set)}
    print(f"data {options.data} | {_counted(found)}")
    if options.data in TABLE_2:
        print(f"paper's Table 2 | {_counted(TABLE_2[options.data])}")
    return (train_set, valid_set, test_set), world, {
        "counts": found, "steps": x.steps, "checksums": x.checksums}


def _counted(found: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in found.items())


def choose_device(options: Options) -> tuple[torch.device, torch.dtype | None]:
    """The device, and the precision of the frozen weights, where None keeps the stored one.

    auto takes half precision only where it is faster, which is on GPUs. bfloat16 has the range of
    float32; float16 is for cards that do not have bfloat16.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    kind = options.device
    if kind == "auto":
        kind = next(name for name, available in here.items() if available)
    if not here[kind]:
        raise ValueError(f"--device {kind}: this PyTorch sees no such device; use --device auto")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if options.compile and kind == "cpu" and not shutil.which(compiler):
        raise ValueError(f"--compile wants a C++ compiler on CPUs, and there is no {compiler}; "
                         "install it, name another one in the variable CXX, or drop --compile")
    if options.shard:
        check_shardable()
    name = options.dtype
    if name == "auto" and kind == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    elif name == "auto":
        name = "float32"
    return torch.device(kind), None if name == "stored" else getattr(torch, name)


def peak_memory(device: torch.device) -> float:
    """GB: peak allocated on a GPU, else the peak of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024          # ru_maxrss: bytes on macOS, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def rows_that_fit(config: LlamaConfig, batch: Batch, device: torch.device, worlds: int = 2,
                  recompute: bool = False) -> int:
    """How many rows of a batch to tune on at a time, so that memory stays bounded.

    On CUDA devices that is so many that what the backward pass keeps takes a third of the memory:
    some ten widths and four inner widths of each token in each block (of one block, where blocks
    are recomputed), and about six times the logits at the targets. Elsewhere it is so many that the
    widest activation of a block has about a million numbers. Memory of that size is kept for the
    next tensor instead of being given back and asked for anew, so smaller parts cost no time.
    """
    C, inner, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, A = batch.tokens.shape[1] - batch.prefix, batch.places.shape[1]
    if device.type != "cuda":
        return max(1, 10**6 // (worlds * tokens * inner))
    block = 10 * C + 4 * inner
    of_row = worlds * (tokens * (L * C + block if recompute else L * block)
                       + 6 * A * config.vocab_size)
    return max(1, torch.cuda.get_device_properties(device).total_memory // (3 * 4 * of_row))


# ----------------------------------------------------------------------------------------------
# Adapters: peft's two files, and temporal.json, which says what they were tuned for


def save_adapter(model, folder: Path, base: str | None = None) -> None:
    """Write factors and settings of a TemporalLlama; base is the name of the base, for peft.

    What a baseline puts round the Llama (experiments/llm_baselines.py) goes to parts.safetensors.
    temporal.json, which is written last, has the checksums of the tensors' files.
    """
    if rank():
        return
    try:
        save_lora(model, folder, base)
    except BaseException:           # a full disk above all: leave no part of a file
        for part in folder.glob("adapter_*.part"):
            part.unlink()
        raise
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        with open(folder / name, "rb") as file:         # on the disk before what vouches for it
            os.fsync(file.fileno())
    if parts := parts_round_the_base(model):
        save_arrays({name: p.numpy(force=True) for name, p in parts.items()},
                    folder / "parts.safetensors")
    write_json(folder / "temporal.json", model.settings() | {"sha256": adapter_checksums(folder)})


def adapter_checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of the files of an adapter that hold tensors."""
    paths = [folder / name for name in ("adapter_model.safetensors", "parts.safetensors")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths if path.is_file()}


def load_adapter(model, folder: Path) -> None:
    """Add the folder's factors to the TemporalLlama that they were tuned in.

    Raises FileNotFoundError or ValueError: files absent or damaged; another base or temporal
    embedding than this model's, both named. An adapter that peft made has none: see load_lora.
    """
    path = Path(folder) / "temporal.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a tuned adapter of ours has it")
    try:
        theirs, ours = read_object(path), model.settings()
        both, checksums = [[f[key] for key in ours] for f in (theirs, ours)], theirs["sha256"]
    except KeyError as error:
        raise ValueError(f"{path}: not the settings of an adapter ({error!r})") from None
    if both[0] != both[1]:
        tuned, here = (", ".join(f"{key} {value}" for key, value in zip(ours, values))
                       for values in both)
        raise ValueError(f"{path}: the adapter was tuned with {tuned}; this model has {here}. Give "
                         "it the base and the settings it was tuned with")
    if checksums != (found := adapter_checksums(Path(folder))):
        raise ValueError(f"{folder}: the tensors of the adapter are not those that temporal.json "
                         f"was written for ({', '.join(found) or 'no files'}); they are damaged or "
                         "changed, so copy them again or tune again")
    load_lora(model, folder)
    if parts := parts_round_the_base(model):
        kept = load_file(folder / "parts.safetensors")
        for name, p in parts.items():
            p.data.copy_(kept[name])


def parts_round_the_base(model) -> dict[str, torch.nn.Parameter]:
    """Parameters outside the Llama, by name. CETRec has none."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("llama.")}
