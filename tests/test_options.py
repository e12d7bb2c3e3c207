"""The flags: their help, their defaults, what they refuse, and how long a run tunes."""

import argparse
import json
import re
from dataclasses import fields, replace

import pytest

from lora import ALL_LINEAR
from support.options import (EVALUATION, LISTS, OF_BEAMS, TEMPORAL, Options, Where, add_flags,
                             as_flag, parse)

ALL = [f.name for kind in (Options, Where) for f in fields(kind)]

# A value for each flag that is none of its defaults, as it is typed and as it arrives.
GIVEN = {
    "data": ("ml-100k", "ml-100k"), "data_dir": ("raw", "raw"), "domain": ("games", "games"),
    "sample": ("0.5", 0.5), "chronological": (None, True), "index": ("time", "time"),
    "skip_bad_lines": (None, True), "drop_untitled": (None, True), "keep_repeats": (None, True),
    "order_strength": ("0.25", 0.25), "clock": ("0.5", 0.5),
    "limit_train": ("7", 7), "seed": ("3", 3), "model": ("some/base", "some/base"),
    "temporal": ("sinpe", "sinpe"),
    "sinpe_scale": ("0.1", 0.1), "lora_rank": ("2", 2), "lora_alpha": ("5", 5.0),
    "lora_dropout": ("0.2", 0.2), "lora_targets": ("q_proj, o_proj", ("q_proj", "o_proj")),
    "lambda_ct": ("0.5", 0.5), "lr": ("1e-2", 0.01), "batch_size": ("9", 9), "epochs": ("4", 4),
    "least_steps": ("11", 11), "warmup": ("6", 6), "max_steps": ("5", 5), "micro_batch": ("2", 2),
    "recompute": (None, True), "compile": (None, True), "eval_sequences": ("8", 8),
    "lists": ("beams, exact", ("beams", "exact")), "beams": ("3", 3), "length_penalty": ("2", 2.0),
    "ground_with": ("tuned", "tuned"), "ground_list": ("single", "single"),
    "exclude_history": (None, False), "device": ("cpu", "cpu"), "shard": (None, True),
    "dtype": ("bfloat16", "bfloat16")}
WANTS = {   # what a flag goes with
    "data_dir": ["--data", "ml-100k"], "sample": ["--data", "ml-100k"],
    "domain": ["--data", "mine"], "drop_untitled": ["--data", "ml-100k"],
    "keep_repeats": ["--data", "mine"], "chronological": ["--data", "lastfm"],
    "sinpe_scale": ["--temporal", "sinpe"]}


def parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    ap = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(ap, Options, Where)
    return ap


def flags(*argv: str) -> dict:
    """The flags that the parser finds."""
    return parse(parser(), argv)


# ------------------------------------------------------------ Help


def entries() -> dict[str, str]:
    """What the help says about each flag, in one line, by the flag's name."""
    text = parser().format_help()
    parts = re.split(r"^  --([a-z-]+)", text[text.index("\ndata:\n"):], flags=re.MULTILINE)[1:]
    assert len(set(parts[::2])) == len(parts[::2]), "a flag is described twice"
    return {name: " ".join(said.partition("\n\n")[0].split())
            for name, said in zip(parts[::2], parts[1::2])}


def test_the_help_describes_every_field_exactly_once_with_its_default():
    found = entries()
    assert found.keys() == {name.replace("_", "-") for name in ALL}
    for name, said in found.items():
        assert said.count("(default: ") == 1, name
        words = said.partition("(default: ")[0].split()
        assert len([w for w in words if w.isalpha() and w.islower()]) > 2, f"--{name} has no help"


@pytest.mark.parametrize("name, default", [
    ("lr", "0.0001; 0.003 with the tiny base; 0.004 with the tiny base on synthetic"),
    ("lora-targets", "q_proj,v_proj; with the tiny base all-linear"), ("lambda-ct", "0.1"),
    ("exclude-history", "yes; no with --keep-repeats"), ("shard", "no"),
    ("compile", "yes on GPUs where there may be 1,000 steps; else no"), ("data", "synthetic"),
    ("out", "runs"),
    ("length-penalty", "1; 0 with the tiny base"), ("lists", "beams,titles"),
    ("sample", "0.1 with movielens and 1/3 with steam, as the paper's text (D4); else 1")])
def test_the_help_gives_the_default_of_each_preset(name, default):
    assert entries()[name].endswith(f"(default: {default})")


def test_the_defaults_in_the_help_are_those_of_a_run():
    """Every number in the help of a flag without words of its own is what the preset holds."""
    found = entries()
    bases = {"published": {"model": "some/base", "data": "ml-100k"}, "tiny": {"data": "ml-100k"},
             "synthetic": {}}
    for f in fields(Options):
        for preset, value in f.metadata["presets"].items():
            assert getattr(Options.from_flags(bases[preset]), f.name) == value or f.name in (
                "data", "model", "sample"), f.name
            if type(value) in (int, float) and not f.metadata["shown"]:
                default = found[f.name.replace("_", "-")].partition("(default: ")[2]
                assert value in [float(x) for x in re.findall(r"[\d.]+(?=[;) ])", default)], f.name


def test_groups_stand_in_the_order_of_the_work_and_only_takes_a_part():
    text = parser().format_help()
    starts = [text.index(f"\n{group}:\n") for group in ("data", "model", "tuning", "evaluation",
                                                        "run")]
    assert starts == sorted(starts)
    ap = argparse.ArgumentParser()
    add_flags(ap, Options, only={"seed", "dtype"})
    assert parse(ap, ["--seed", "2"]) == {"seed": 2}
    assert "--data" not in ap.format_help()


# ------------------------------------------------------------ From the command line to options


def test_a_flag_that_is_not_given_is_none():
    assert flags() == {}
    assert vars(parser().parse_args([])) == dict.fromkeys(ALL)


def test_every_field_has_a_flag_that_reaches_it():
    assert GIVEN.keys() == {f.name for f in fields(Options)}


@pytest.mark.parametrize("name", GIVEN)
def test_a_flag_reaches_its_field_and_no_other(name):
    typed, value = GIVEN[name]
    flag = as_flag(name) if value is not False else as_flag(name).replace("--", "--no-", 1)
    context = WANTS.get(name, [])
    argv = [*context, flag] if typed is None else [*context, flag, typed]
    before, after = Options.from_flags(flags(*context)), Options.from_flags(flags(*argv))
    assert getattr(before, name) != value and getattr(after, name) == value
    follows = {"data": {"sample", "lr", "batch_size", "epochs"}, "epochs": {"least_steps"},
               "model": set(ALL), "keep_repeats": {"exclude_history"}}.get(name, set())
    assert {f.name for f in fields(Options) if getattr(before, f.name) != getattr(after, f.name)
            } - follows == {name} - follows


def test_where_repeats_are_kept_lists_may_name_items_of_the_history():
    """Or no repeated item could be found. Who says otherwise means it."""
    assert not Options.from_flags(flags("--data", "mine", "--keep-repeats")).exclude_history
    assert Options.from_flags(flags("--data", "mine", "--keep-repeats",
                                    "--exclude-history")).exclude_history
    assert Options.from_flags(flags("--data", "mine")).exclude_history


@pytest.mark.parametrize("argv, expected", [
    ([], {"model": "tiny", "lora_rank": 16, "lora_alpha": 32.0, "lora_targets": ALL_LINEAR,
          "lr": 4e-3, "batch_size": 64, "epochs": 1, "warmup": 50, "length_penalty": 0.0,
          "sample": 1.0}),
    (["--data", "ml-100k"], {"lr": 3e-3, "batch_size": 128, "lora_rank": 16, "sample": 1.0}),
    (["--data", "movielens"], {"sample": 0.1}), (["--data", "ml-1m"], {"sample": 0.1}),
    (["--data", "steam"], {"sample": 1 / 3}), (["--data", "movielens", "--sample", "1"],
                                              {"sample": 1.0}),
    # D5: BIGRec's factors, CFT's batch, epochs and warm-up, the paper's rate
    (["--model", "some/base"], {"lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.05,
                                "lora_targets": ("q_proj", "v_proj"), "lr": 1e-4, "batch_size": 64,
                                "epochs": 3, "warmup": 20, "length_penalty": 1.0,
                                "lambda_ct": 0.1}),
    (["--model", "some/base", "--lr", "1"], {"lr": 1.0, "lora_rank": 8}),
    (["--lora-targets", "all-linear"], {"lora_targets": ALL_LINEAR}),
    (["--lists", " exact ,titles"], {"lists": ("exact", "titles")})])
def test_presets_go_with_the_base_and_the_data(argv, expected):
    options = Options.from_flags(flags(*argv))
    assert {name: getattr(options, name) for name in expected} == expected


def test_without_a_temporal_embedding_lambda_is_0_and_a_given_one_is_commented(capsys):
    assert Options.from_flags(flags("--temporal", "none")).lambda_ct == 0
    assert capsys.readouterr().out == ""
    assert Options.from_flags(flags("--temporal", "none", "--lambda-ct", "0.5")).lambda_ct == 0
    assert "λ is 0 in this run (w.o. Both = BIGRec)\n" in capsys.readouterr().out


# ------------------------------------------------------------ What is refused


@pytest.mark.parametrize("argv, message", [
    (["--data", "ml-100k", "--order-strength", "1"], "--order-strength goes with --data synthetic"),
    (["--data-dir", "x"], "--data-dir goes with a public data set"),
    (["--data", "mine", "--data-dir", "x"], "--data-dir goes with a public data set"),
    (["--sample", "0.5"], "--sample goes with data that are not synthetic"),
    (["--domain", "games"], "--domain goes with data that are not synthetic"),
    (["--drop-untitled"], "--drop-untitled goes with data that are not synthetic"),
    (["--keep-repeats"], "--keep-repeats goes with a folder of your own"),
    (["--data", "lastfm", "--keep-repeats"], "--keep-repeats goes with a folder of your own"),
    (["--sinpe-scale", "2"], "--sinpe-scale goes with --temporal sinpe"),
    (["--lists", "exact", "--beams", "3"], "--beams goes with --lists beams"),
    (["--lists", "titles", "--ground-list", "single"], "--ground-list goes with --lists beams"),
    (["--lists", "titles", "--ground-with", "base"], "--ground-with goes with --lists beams"),
    (["--lists", "titles", "--length-penalty", "1"], "--length-penalty goes with --lists beams"),
    (["--data", "ml-100k", "--sample", "2"], "--sample is 2.0; wanted a share above 0, at most 1"),
    (["--data", "ml-100k", "--chronological"], "--chronological goes with --data lastfm"),
    (["--data", "lastfm", "--index", "time"], "add --chronological"),
    (["--compile", "--recompute"], "--compile and --recompute: one at a time"),
    (["--lists", "trie"], "--lists is 'trie'; wanted one or more of beams, titles, exact"),
    (["--lists", "beams,"], "--lists is 'beams,'; wanted one or more of"),
    (["--lora-targets", "wq"], "LoRA targets is ('wq',)"),
    (["--lora-rank", "0"], "--lora-rank is 0"),
    (["--lora-alpha", "nan"], "--lora-alpha is nan"),
    (["--lora-dropout", "1"], "--lora-dropout is 1"), (["--lr", "1e308"], "--lr is 1e+308"),
    (["--lora-dropout", "1e-300"], "--lora-dropout is 1e-300"),
    (["--length-penalty", "2000"], "--length-penalty is 2000"),
    (["--lora-rank", "9" * 20], "--lora-rank is 9999"), (["--beams", "100000"], "--beams is 1000"),
    (["--lora-alpha", "1e308"], "--lora-alpha is 1e+308"),
    (["--lambda-ct", "-1"], "--lambda-ct is -1.0"), (["--lambda-ct", "nan"], "--lambda-ct is nan"),
    (["--lr", "inf"], "--lr is inf; wanted a number from 0 to 1000"),
    (["--seed", "9" * 20], f"--seed is {'9' * 20}"), (["--seed", "-1"], "--seed is -1"),
    (["--epochs", "0"], "--epochs is 0"), (["--batch-size", "0"], "--batch-size is 0"),
    (["--beams", "0"], "--beams is 0"), (["--limit-train", "-3"], "--limit-train is -3"),
    (["--micro-batch", "-1"], "--micro-batch is -1"), (["--max-steps", "-1"], "--max-steps is -1"),
    (["--warmup", "-1"], "--warmup is -1"), (["--least-steps", "-1"], "--least-steps is -1"),
    (["--eval-sequences", "-1"], "--eval-sequences is -1"),
    (["--sinpe-scale", "-1", "--temporal", "sinpe"], "--sinpe-scale is -1.0"),
    (["--length-penalty", "-1"], "--length-penalty is -1.0")])
def test_contradictions_and_impossible_values_are_refused(argv, message):
    with pytest.raises(ValueError) as error:
        Options.from_flags(flags(*argv))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [f.name for f in fields(Options) if f.metadata["choices"]])
def test_a_value_that_is_not_a_choice_is_refused_by_the_parser_and_by_the_options(name, capsys):
    with pytest.raises(SystemExit):
        flags(as_flag(name), "nonsense")
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{as_flag(name)} is 'nonsense'; wanted one of "):
        replace(Options.from_flags({}), **{name: "nonsense"})


@pytest.mark.parametrize("argv, message", [
    (["--resume", ""], "argument --resume: got nothing"), (["--lamda-ct", "1"], "unrecognized"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"), (["--decode", "trie"], "unrecognized"),
    (["--reproduce", "x"], "unrecognized"), (["--recommend", "x"], "unrecognized")])
def test_an_unknown_flag_or_an_empty_value_ends_the_program(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        flags(*argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_flags_of_the_evaluation_are_those_of_its_group():
    """They are the flags that --eval-only may change, as its help says."""
    assert {f.name for f in fields(Options) if f.metadata["group"] == "evaluation"} == EVALUATION
    assert OF_BEAMS < EVALUATION and Options.from_flags({}).temporal in TEMPORAL
    assert set(Options.from_flags({}).lists) < set(LISTS)


# ------------------------------------------------------------ The record


def test_options_come_back_from_their_record():
    for argv in ([], ["--model", "some/base", "--lists", "exact", "--temporal", "none"],
                 ["--data", "lastfm", "--chronological", "--domain", "artists"]):
        options = Options.from_flags(flags(*argv))
        saved = json.loads(json.dumps(options.record()))
        assert Options.from_record(saved) == options
        changed = Options.from_record(saved, device="cpu", lists="titles, exact")
        assert changed == replace(options, device="cpu", lists=("titles", "exact"))


def test_a_record_of_another_version_or_with_a_wrong_value_is_refused():
    saved = Options.from_flags({}).record()
    with pytest.raises(TypeError, match="decode"):
        Options.from_record(saved | {"decode": "beams"})
    with pytest.raises(TypeError, match="lambda_ct"):
        Options.from_record({name: value for name, value in saved.items() if name != "lambda_ct"})
    with pytest.raises(ValueError, match="--epochs is 0"):
        Options.from_record(saved | {"epochs": 0})


def test_an_adapter_is_bound_to_the_temporal_embedding_and_p_k_has_a_scale_if_it_is_added():
    """The settings that temporal.json records, besides the digest of the base."""
    options = Options.from_flags(flags("--temporal", "sinpe", "--sinpe-scale", "0.5"))
    assert options.adapter_settings() == {"model": "tiny", "temporal": "sinpe", "index": "order",
                                          "scale": 0.5}
    turned = replace(options, temporal="rope", index="time")
    assert turned.adapter_settings() == {"model": "tiny", "temporal": "rope", "index": "time",
                                         "scale": 1.0}


# ------------------------------------------------------------ How long a run tunes


@pytest.mark.parametrize("argv, sequences, expected", [
    # published bases: batches of 64, 3 epochs, at least 300 steps
    ([], 6_400, (300, 20)), ([], 6_401, (303, 20)), ([], 640, (300, 20)), ([], 130, (300, 20)),
    ([], 64_000, (3_000, 20)), ([], 1, (300, 20)),
    (["--epochs", "2"], 640, (20, 2)), (["--epochs", "2"], 641, (22, 2)),
    (["--max-steps", "7"], 64_000, (7, 0)), (["--max-steps", "25"], 640, (25, 2)),
    # a cap lowers what there would be without it, and nothing else
    (["--max-steps", "100"], 640, (100, 10)), (["--max-steps", "400"], 640, (300, 20)),
    (["--epochs", "5", "--max-steps", "31"], 640, (31, 3)),
    (["--least-steps", "45"], 640, (50, 5)), (["--least-steps", "0"], 640, (30, 3)),
    (["--batch-size", "10"], 640, (320, 20)), (["--warmup", "4"], 640, (300, 4)),
    (["--warmup", "0"], 640, (300, 0)), (["--warmup", "400"], 64_000, (3_000, 300))])
def test_epochs_follow_the_number_of_steps_and_warm_up_is_at_most_a_tenth(argv, sequences,
                                                                          expected):
    options = Options.from_flags(flags("--model", "some/base", *argv))
    assert options.schedule(sequences) == expected


def test_the_tiny_base_on_small_data_tunes_as_long_as_the_synthetic_world():
    """100 sequences are one step of 128, so they are seen 300 times at most; 40,000 once."""
    options = Options.from_flags({"data": "mine"})
    assert options.schedule(100) == (300, 30) and options.schedule(40_000) == (313, 31)


@pytest.mark.parametrize("argv, sequences, passes", [
    ([], 100, 5), ([], 101, 4), ([], 10, 50), ([], 250, 2), ([], 251, 1), ([], 5, 50),
    (["--epochs", "2"], 100, 1), (["--max-steps", "9"], 100, 5), (["--least-steps", "120"], 100, 2),
    (["--least-steps", "0"], 100, 1)])
def test_an_epoch_of_small_data_holds_them_several_times(argv, sequences, passes, world_splits):
    """A sixth of the 300 steps, so that whether an epoch was better can be told: batches of 10."""
    train_set = world_splits[0].select(slice(0, sequences))
    options = Options.from_flags(flags("--batch-size", "10", *argv))
    epoch = options.repeat_if_small(train_set)
    assert len(train_set) == sequences and len(epoch) == passes * sequences
    assert sorted(epoch.targets) == sorted(list(train_set.targets) * passes)
    assert (epoch.targets[-sequences:] == train_set.targets).all()


def test_a_hundred_sequences_in_all_are_tuned_on_for_300_steps_with_six_validations(world_splits):
    options = Options.from_flags(flags("--batch-size", "10"))
    epoch = options.repeat_if_small(world_splits[0].select(slice(0, 100)))
    assert options.schedule(len(epoch)) == (6 * 50, 30) and len(epoch) == 50 * 10
