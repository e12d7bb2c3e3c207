"""The flags of the command: one frozen dataclass with one field for each flag.

Everything about a flag stands in one place, its field: the group, the help, the defaults, the
choices and the least value. The parser, the defaults, the checks and the record in run.json are all
made from that, so a flag cannot be known to one of them and unknown to another.

The identifiers D1 to D15 in the help name what the paper leaves open; docs/readings.md has them.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from data import DOMAINS, Sequences
from evaluate import Decoding
from lora import ALL_LINEAR, LoraConfig
from support.datasets import FORMATS, SAMPLE, check_preparation
from support.terminal import Parser

TEMPORAL = ("rope", "rope-attention", "sinpe", "none")
LISTS = ("beams", "titles", "exact")
LARGEST = 10**18        # of any number, because PyTorch wants seeds below 2^63
SMALLEST = 1e-12        # above 0; float32 would take what is much smaller for 0

# Fields about the lists called beams, and all fields that --eval-only may change.
OF_BEAMS = {"beams", "length_penalty", "ground_with", "ground_list"}
EVALUATION = {"eval_sequences", "lists", "exclude_history"} | OF_BEAMS


def flag(group: str, text: str, default, *, tiny=None, by_data: dict | None = None,
         choices=None, low: float | None = None, high: float = LARGEST,
         metavar: str | None = None, shown: str = ""):
    """A field of Options.

    A flag may have up to three defaults. `default` is meant for published bases, `tiny` for the
    tiny base where that wants another value, and `by_data` for the tiny base on single data sets.
    `shown` gives the default in words where these values do not say it. The value must be from
    `low` to `high`; a number above that would be a slip, and would fail somewhere less clearly.
    """
    presets = {"published": default} | ({} if tiny is None else {"tiny": tiny}) | (by_data or {})
    return field(metadata={"group": group, "text": text, "presets": presets, "choices": choices,
                           "low": low, "high": high, "metavar": metavar, "shown": shown})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that a run depends on; run.json records it."""

    # Data (§5.1.1). What was drawn depends on the seed, so the same seed gives the same run.

    data: str = flag(
        "data", "synthetic needs no download; movielens is MovieLens-1M; these are fetched if need "
        f"be: {', '.join(FORMATS)}; or a folder of your own with interactions.csv (user, item, "
        "timestamp) and items.csv (item, title), or with RecBole's NAME.inter and NAME.item",
        "synthetic", metavar="NAME|FOLDER")
    data_dir: str = flag("data", "where the public data sets are, or are put", "data",
                         metavar="DIR")
    domain: str | None = flag("data", "the prompt's words for an item", None, choices=[*DOMAINS],
                              shown="movies, games or artists with public data, items with a "
                              "folder")
    sample: float = flag("data", "share of the interactions to keep, by drawing users; with steam "
                         "the share of the users and of the games", 1.0, metavar="SHARE",
                         shown="0.1 with movielens and 1/3 with steam, as the paper's text (D4); "
                         "else 1")
    chronological: bool = flag("data", "lastfm only: order by the date of tagging; the field "
                               "orders by artist number, not by time (D9)", False)
    index: str = flag("data", "what k of an item counts in Eq. 6: order, its steps back from the "
                      "newest (D1); or time, log2(1 + days before the recommendation), which is "
                      "beyond the paper (D15)", "order", choices=["order", "time"])
    skip_bad_lines: bool = flag("data", "count malformed lines instead of stopping at the first",
                                False)
    drop_untitled: bool = flag("data", "go on without the interactions whose items have no title, "
                               "even if they are more than a tenth", False)
    keep_repeats: bool = flag("data", "a folder of your own only: keep the repeated interactions "
                              "of a user with an item, as of songs; without it only the first "
                              "counts (D14)", False)
    order_strength: float = flag("data", "synthetic only: how much the order of a history decides "
                                 "the next item, from 0 (not at all) to 1", 1.0, metavar="S")
    clock: float = flag("data", "synthetic only: how much of that follows the age of an item and "
                        "not its steps back, from 0 to 1; gaps are hours and months then", 0.0,
                        low=0, high=1, metavar="C")
    limit_train: int = flag("data", "use the N latest training sequences only; 0 means all", 0,
                            low=0, metavar="N")
    seed: int = flag("data", "decides all that is drawn at random: the synthetic world, samples, "
                     "the tiny base, the factors' first values and the order of tuning", 0, low=0,
                     metavar="N")

    # Base and factors (§3, §4.2). The paper gives no settings for LoRA (D5). Published bases take
    # those of BIGRec, on which it builds. The tiny base has little to lose and much to learn, so
    # its factors are wider and sit beside every linear map.

    model: str = flag(
        "model", "tiny is a small Llama that is trained here, on shuffled histories; or a folder "
        "with config.json, safetensors and tokenizer.json; or a repository on the Hugging Face Hub "
        "such as meta-llama/Llama-3.2-1B, which is fetched once", "tiny",
        metavar="tiny|FOLDER|HUB_NAME")
    temporal: str = flag(
        "model", "temporal embedding of item tokens: rope rotates their input embedding (Eq. 4, "
        "D2); rope-attention turns them by t + k inside attention (Eq. 5); sinpe is added (Eq. 3); "
        "none leaves BIGRec and makes λ 0", "rope", choices=TEMPORAL)
    sinpe_scale: float = flag("model", "factor on p_k of Eq. 3, with --temporal sinpe only (D8)",
                              1.0, low=0, high=1e6, metavar="X")
    lora_rank: int = flag("model", "rank R of the factors (D5)", 8, tiny=16, low=1, high=10_000,
                          metavar="R")
    lora_alpha: float = flag("model", "the factors' product counts α/R", 16.0, tiny=32.0,
                             low=0, high=1e6, metavar="α")
    lora_dropout: float = flag("model", "probability of dropout on the factors' input", 0.05,
                               tiny=0.0, low=0, high=0.99, metavar="P")
    lora_targets: tuple[str, ...] = flag(
        "model", "linear maps that get factors, with commas, or all-linear", ("q_proj", "v_proj"),
        tiny=ALL_LINEAR, metavar="NAMES", shown="q_proj,v_proj; with the tiny base all-linear")

    # Tuning (§4.4). The paper gives AdamW and its rate; batch size, epochs and warm-up are CFT's
    # (D5). The values for the tiny base were chosen on validation splits.

    lambda_ct: float = flag("tuning", "weight λ of L_CT in Eq. 10; 0 is the paper's w.o. CT. The "
                            "paper tries 0.01, 0.1, 0.5, 1 and 10", 0.1, low=0, high=1e6,
                            metavar="λ")
    lr: float = flag("tuning", "peak learning rate of AdamW; the paper has 1e-4", 1e-4, tiny=3e-3,
                     by_data={"synthetic": 4e-3}, low=0, high=1e3, metavar="X")
    batch_size: int = flag("tuning", "sequences in a step", 64, tiny=128, by_data={"synthetic": 64},
                           low=1, metavar="N")
    epochs: int = flag("tuning", "times through the training split, at most: tuning stops after an "
                       "epoch without a better validation L_TA", 3, tiny=1, low=1, metavar="N")
    least_steps: int = flag("tuning", "allow more epochs on small data, until there are N steps",
                            300, low=0, high=1e6, metavar="N",
                            shown="300; 0 where --epochs is given")
    warmup: int = flag("tuning", "steps of linear warm-up, but at most a tenth of all steps; then "
                       "the rate decays linearly", 20, tiny=50, low=0, metavar="N")
    max_steps: int = flag("tuning", "make N steps at most; 0 means no limit", 0, low=0,
                          metavar="N")
    micro_batch: int = flag("tuning", "rows of a batch to work on at a time, with the same "
                            "gradient; 0 means as many as suit the memory", 0, low=0, metavar="N")
    recompute: bool = flag("tuning", "run each block again in the backward pass instead of keeping "
                           "what it computed: less memory, more time", False)
    compile: bool | None = flag(
        "tuning", "let torch.compile make kernels for the blocks; the first step takes up to two "
        "minutes, and CPUs want a C++ compiler", None,
        shown="yes on GPUs where there may be 1,000 steps; else no")

    # Evaluation (§5). These flags may be given with --eval-only, too.

    eval_sequences: int = flag("evaluation", "size of a seeded sample of the test split; 0 means "
                               "all of it", 1_000, low=0, metavar="N")
    lists: tuple[str, ...] = flag(
        "evaluation", "how lists of ten are made, with commas: beams is the paper's, free text "
        "grounded in the catalogue (§5.1.4); titles, ten beams that stay on the catalogue's "
        "titles; exact, every title scored", ("beams", "titles"), metavar="NAMES",
        shown="beams,titles")
    beams: int = flag("evaluation", "beams of the paper's lists", 5, low=1, high=1_000, metavar="W")
    length_penalty: float = flag(
        "evaluation", "a beam's score is its summed log-probability over its number of tokens to "
        "this power: 1, as in CFT, favours long titles, 0 does not (D10)", 1.0, tiny=0.0, low=0,
        high=10, metavar="P")
    ground_with: str = flag("evaluation", "weights that embed texts and titles: tuned, as in CFT; "
                            "or base, without the factors, as in BIGRec (D11)", "tuned",
                            tiny="base", choices=["tuned", "base"])
    ground_list: str = flag("evaluation", "merged takes the beams' neighbours in turn, as CFT; "
                            "single those of the best beam, as BIGRec (D7)", "merged",
                            choices=["merged", "single"])
    exclude_history: bool = flag("evaluation", "leave items of the history out of the lists, "
                                 "§5.1.2 (D13)", True, shown="yes; no with --keep-repeats")

    # The machine. These change the speed, and the results by rounding only.

    device: str = flag("run", "where to compute; auto takes cuda if there is one, else mps, else "
                       "cpu", "auto", choices=["auto", "cpu", "cuda", "mps"])
    shard: bool = flag("run", "keep only a part of each block's frozen weights in every process of "
                       "torchrun, and gather them when they are needed: for bases that do not fit "
                       "one GPU", False)
    dtype: str = flag("run", "precision of the frozen weights; factors, logits and losses are "
                      "always float32. auto is bfloat16 on cuda (float16 where the card has no "
                      "bfloat16) and float32 elsewhere; stored keeps that of the files", "auto",
                      choices=["auto", "stored", "float32", "bfloat16", "float16"])

    def __post_init__(self):
        check_values(self)
        check_preparation(self.data, self.sample, self.chronological)
        if self.index == "time" and self.data == "lastfm" and not self.chronological:
            raise ValueError("--index time wants times, and lastfm as the field uses it has none; "
                             "add --chronological")
        if self.compile and self.recompute:
            raise ValueError("--compile and --recompute: one at a time")
        if not self.lists or set(self.lists) - set(LISTS):
            raise ValueError(f"--lists is {','.join(self.lists)!r}; wanted one or more of "
                             f"{', '.join(LISTS)}, with commas between them")
        LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)

    @classmethod
    def from_flags(cls, flags: dict) -> "Options":
        """Options from the flags that were given and the preset of the base and the data.

        Raises ValueError for a value that is not allowed and for flags that contradict each other.
        """
        flags = split_names(flags)
        if flags.get("temporal") == "none":
            if flags.get("lambda_ct"):
                print("--temporal none leaves one world only: λ is 0 in this run (w.o. Both = "
                      "BIGRec)")
            flags["lambda_ct"] = 0.0
        if "epochs" in flags:           # whoever says how long means it
            flags.setdefault("least_steps", 0)
        if flags.get("keep_repeats"):       # an answer may stand in its history then
            flags.setdefault("exclude_history", False)
        data = flags.get("data", "synthetic")
        presets = () if flags.get("model", "tiny") != "tiny" else (data, "tiny")
        options = cls(**defaults(cls, *presets) | {"sample": SAMPLE.get(data, 1.0)} | flags)
        options.check_use(flags)
        return options

    def check_use(self, flags) -> None:
        """Raise ValueError for a given flag that would change nothing in this run."""
        public, drawn = self.data in FORMATS, self.data == "synthetic"
        for name, goes_with, used in (
                ("order_strength", "--data synthetic", drawn),
                ("clock", "--data synthetic", drawn),
                ("data_dir", "a public data set", public),
                ("sample", "data that are not synthetic", not drawn),
                ("domain", "data that are not synthetic", not drawn),
                ("drop_untitled", "data that are not synthetic", not drawn),
                ("keep_repeats", "a folder of your own", not drawn and not public),
                ("sinpe_scale", "--temporal sinpe", self.temporal == "sinpe"),
                *((name, "--lists beams", "beams" in self.lists) for name in sorted(OF_BEAMS))):
            if name in flags and not used:
                raise ValueError(f"{as_flag(name)} goes with {goes_with}; here it would change "
                                 "nothing, so drop it")

    @classmethod
    def from_record(cls, record: dict, **changes) -> "Options":
        """Options as run.json has them, changed by flags that were given now.

        Raises TypeError for the record of another version, which has other fields, and ValueError
        as from_flags does.
        """
        kept = {name: tuple(value) if isinstance(value, list) else value    # JSON has no tuples
                for name, value in record.items()}
        return cls(**kept | split_names(changes))

    def record(self) -> dict:
        """For run.json."""
        return asdict(self)

    def adapter_settings(self) -> dict:
        """What the model must have in common with the one that an adapter was tuned in."""
        return {"model": self.model, "temporal": self.temporal, "index": self.index,
                "scale": self.sinpe_scale if self.temporal == "sinpe" else 1.0}

    def decoding(self) -> Decoding:
        """How the paper's lists are made."""
        return Decoding(self.beams, self.length_penalty, self.ground_with, self.ground_list,
                        self.exclude_history)

    def repeat_if_small(self, train_set: Sequences) -> Sequences:
        """The training split, several times over if it is so small that a pass has few steps.

        Tuning stops after an epoch that is no better, and ten steps are too few to judge that."""
        steps = math.ceil(len(train_set) / self.batch_size)
        passes = max(1, self.least_steps // 6 // steps)
        return train_set.select(np.tile(np.arange(len(train_set)), passes))

    def schedule(self, sequences: int) -> tuple[int, int]:
        """(all steps, those of warm-up) for so many training sequences.

        Three epochs of a hundred sequences are six steps, which teach nothing. So small data get
        more epochs, as BIGRec gives its 1,024 samples up to fifty.
        """
        per_epoch = math.ceil(sequences / self.batch_size)
        epochs = max(self.epochs, math.ceil(self.least_steps / per_epoch))
        steps = min(epochs * per_epoch, self.max_steps or math.inf)
        return steps, min(self.warmup, steps // 10)


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which folders a call of the command works on. Results do not depend on it."""

    out: str = flag("run", "where a new run gets its folder, and tiny bases theirs", "runs",
                   metavar="DIR")
    resume: str | None = flag("run", "continue the interrupted run in this folder; goes with "
                              "--data-dir, --device, and --data and --model where data and base "
                              "have moved", None, shown="a new run", metavar="RUN")
    eval_only: str | None = flag("evaluation", "evaluate the adapter in this run folder again, on "
                                 "its own data and base; goes with the flags of this group, "
                                 "--data-dir, --device, --dtype, and --data and --model where "
                                 "data and base have moved", None, shown="tune first",
                                 metavar="RUN")


def defaults(kind, *presets: str) -> dict:
    """The default of every field of a dataclass of flags: of the first preset that it has."""
    return {f.name: next(f.metadata["presets"][name] for name in (*presets, "published")
                         if name in f.metadata["presets"]) for f in fields(kind)}


def check_values(options) -> None:
    """Raise ValueError for a field of another type, out of its bounds, or not among its choices."""
    for f in fields(options):
        value, choices = getattr(options, f.name), f.metadata["choices"]
        low, high = f.metadata["low"], f.metadata["high"]
        whole = type(value) is int and f.type is float              # 1 is as good as 1.0
        if f.type in (int, float, bool, str) and type(value) is not f.type and not whole:
            raise ValueError(f"{as_flag(f.name)} is {value!r}; wanted a value of type "
                             f"{f.type.__name__}")
        if low is not None and not (low <= value <= high and not 0 < value < SMALLEST):
            raise ValueError(f"{as_flag(f.name)} is {value}; wanted a number from {low} to "
                             f"{high:g}")         # not a number is refused, too
        if choices and value not in (*choices, f.metadata["presets"]["published"]):
            raise ValueError(f"{as_flag(f.name)} is {value!r}; wanted one of "
                             f"{', '.join(choices)}")


def as_flag(name: str) -> str:
    """lambda_ct -> --lambda-ct"""
    return "--" + name.replace("_", "-")


def split_names(flags: dict) -> dict:
    """The flags that take names with commas between them, as tuples; all others as they are."""
    flags = dict(flags)
    for name in flags.keys() & {"lora_targets", "lists"}:
        if isinstance(flags[name], str):
            names = tuple(part.strip() for part in flags[name].split(","))
            flags[name] = ALL_LINEAR if names == ("all-linear",) else names
    return flags


def add_flags(ap: argparse.ArgumentParser, *kinds, only=None) -> None:
    """Give the parser a flag for every field of the dataclasses, or for those that `only` names.

    The parser itself has no defaults: it yields None for a flag that was not given, because what
    the default is depends on other flags.
    """
    groups = {}
    for f in [f for kind in kinds for f in fields(kind) if only is None or f.name in only]:
        m = f.metadata
        if m["group"] not in groups:
            groups[m["group"]] = ap.add_argument_group(m["group"])
        how = {"help": f"{m['text']} (default: {describe_default(f)})".replace("%", "%%")}
        if f.type in (bool, bool | None):
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": f.type if f.type in (int, float) else str, "choices": m["choices"],
                    "metavar": m["metavar"]}
        groups[m["group"]].add_argument(as_flag(f.name), dest=f.name, **how)


def describe_default(f) -> str:
    """The defaults of a field of Options in words, as help and docs print them."""
    return f.metadata["shown"] or "; ".join(
        in_words(value) + {"published": "", "tiny": " with the tiny base"}.get(
            preset, f" with the tiny base on {preset}")
        for preset, value in f.metadata["presets"].items())


def in_words(value) -> str:
    """A default as the help prints it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(ap: argparse.ArgumentParser, argv) -> dict:
    """The flags that were given, by the names of their fields.

    Ends the program, as the parser does, for a flag that is unknown or has a value of a wrong kind,
    and for an empty one, which mostly is a variable of the shell that was not set.
    """
    # "Intermixed": what is not a flag may stand anywhere, also between or after flags.
    found = vars(ap.parse_intermixed_args(argv))
    flags = {name: value for name, value in found.items() if value is not None}
    for name, value in flags.items():
        if value in ("", []):       # the parser takes `--flag --` for a list of no values
            ap.error(f"argument {as_flag(name)}: got nothing")
    return flags


def read_flags(argv: list[str] | None) -> dict:
    """The flags of cetrec.py that were given, by the names of their fields."""
    ap = Parser(prog="cetrec.py",
                description="CETRec: tune a Llama so that the order of a history counts, then "
                "measure it.",
                epilog="docs/readings.md explains D1 to D15, what the paper leaves open.")
    add_flags(ap, Options, Where)
    flags = parse(ap, argv)
    if "resume" in flags and "eval_only" in flags:
        ap.error("--resume and --eval-only: one at a time")
    return flags
