"""The whole path on a few steps, and every error that a user can cause from the command line."""

import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_runs
from safetensors.torch import load_file, save_file

import cetrec
from cetrec import TemporalLlama, main
from data import build_prompt
from evaluate import METRICS, beam_search
from experiments import report
from llama import load_llama, save_llama
from support.checkpoints import read_tokenizer
from support.processes import my_parts
from support.progress import log_step
from support.synthetic import SyntheticWorld
from support.tiny import TINY_BASES
from test_cetrec import log_of

ROOT = Path(__file__).parent.parent
QUICK = ["--limit-train", "64", "--eval-sequences", "12", "--beams", "2", "--batch-size", "16",
         "--epochs", "2", "--max-steps", "6", "--device", "cpu"]    # an epoch has four steps
ONE_STEP = [*QUICK, "--max-steps", "1", "--eval-sequences", "5"]
LISTS = {"beams": "2 beams, grounded", "titles": "10 beams on titles", "exact": "all titles scored"}
ORDERS = ("original", "reversed", "shuffled")


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """Few users, and a base that is tinier still: these tests are about the path, not quality."""
    with small_runs() as patch:
        patch.setitem(TINY_BASES, "synthetic", replace(
            TINY_BASES["synthetic"], pieces=768, num_hidden_layers=1))
        patch.setattr("support.runs.TinyBase", lambda: TINY_BASES["synthetic"])
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_world) -> Path:
    """A run of 6 steps with its base beside it."""
    out = tmp_path_factory.mktemp("finished")
    assert main([*QUICK, "--out", str(out)]) == 0
    return out / "synthetic-rope-1"


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of that run and of its base, for tests that change it."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("eval.json", "eval-*"))
    return tmp_path / finished.name


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------ The main path


def test_the_main_path_depends_on_the_seed_only(finished, tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    text, run = capsys.readouterr().out, tmp_path / "synthetic-rope-1"
    record = read_json(run / "run.json")
    counts = record["counts"]
    for expected in (f"data synthetic | {counts['interactions']:,} interactions, ",
                     "\ntiny base | step", " threads, float32\n", "⟩[k=0, tokens ",
                     "at most 6 steps (--max-steps), 0 of them warm-up\n", "step     6/6 | loss ",
                     "epoch 2 | validation ta ", "12 test sequences, 300 candidates, history "
                     "excluded, scored by the true distribution",
                     "\n2 beams, grounded ", "\n10 beams on titles ", "\n  change, reversed ",
                     "\n  shuffled ", "\npopularity ", "\nco-occurrence, newest item ",
                     "\nco-occurrence, whole history ", "\nbest, order-aware ",
                     "\nbest, order-blind ", "\neffect of order on log p(answer): ",
                     f"\nwritten {run}\nits tables and figures: "):
        assert expected in text, expected
    command = shlex.split(text.rpartition("its tables and figures: ")[2])
    assert command == ["python", "-m", "experiments.report", str(run)]
    assert counts["train"] == 64 and record["tuning"]["steps"] == 6
    assert record["options"]["lambda_ct"] == 0.1
    assert record["versions"].keys() - {"revision"} == {
        "python", "torch", "numpy", "tokenizers", "safetensors", "device", "processes"}
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "catalogue.json",
        "evaluation.safetensors", "log.jsonl", "recommendations.csv", "run.json", "temporal.json"]
    settings = read_json(run / "temporal.json")
    assert settings.pop("sha256") and settings == record["settings"]
    catalogue = read_json(run / "catalogue.json")
    assert catalogue["domain"] == "movies" and len(catalogue["titles"]) == counts["items"]

    assert log_of(run) == log_of(finished) and len(log_of(run)) == 6 + 2    # and two validations
    for name in ("adapter_model.safetensors", "evaluation.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    torch.manual_seed(99)       # what was drawn before does not count, nor that the base is there
    assert main([*QUICK, "--lists", "beams", "--out", str(tmp_path)]) == 0
    assert log_of(tmp_path / "synthetic-rope-2") == log_of(run)
    assert main([*ONE_STEP, "--lists", "beams", "--seed", "1", "--out", str(tmp_path)]) == 0
    assert log_of(tmp_path / "synthetic-rope-3")[0]["loss"] != log_of(run)[0]["loss"]


def test_the_record_holds_the_means_of_the_arrays(finished):
    record = read_json(finished / "run.json")
    arrays = load_file(finished / "evaluation.safetensors")
    for name in (LISTS["beams"], LISTS["titles"]):
        for order in ORDERS:
            values = arrays[f"values/{name}/{order}"].double()
            row = record["rows"][name if order == "original" else f"{name} | {order}"]
            assert list(row) == list(METRICS)
            for (mean, error), column in zip(row.values(), values.T):
                assert mean == pytest.approx(column.mean().item())
                assert error == pytest.approx(column.std().item() / math.sqrt(12))
    factual, erased = arrays["answers"].T
    assert record["effect"][0] == pytest.approx((factual - erased).mean().item())
    assert (arrays["answers"] < 0).all() and arrays["seen"].shape == arrays["popularity"].shape
    catalogue = read_json(finished / "catalogue.json")["titles"]
    assert arrays["target"].max() < len(catalogue) == len(arrays["seen"])


def test_counting_baselines_are_scored_by_the_true_distribution_too(finished):
    """HR@5 of popularity is the probability of the five most popular items outside the history."""
    record = read_json(finished / "run.json")
    arrays = load_file(finished / "evaluation.safetensors")
    popular = (-arrays["popularity"]).argsort(stable=True).tolist()
    world, worth = SyntheticWorld(seed=0), []
    for padded in arrays["history"].tolist():
        history = [item for item in padded if item >= 0]
        five = [item for item in popular if item not in history][:5]
        worth.append(world.next_distribution(np.array([history]))[0, five].sum())
    assert record["rows"]["popularity"]["HR@5"][0] == pytest.approx(np.mean(worth))


# ------------------------------------------------------------ Evaluated again


def test_eval_only_repeats_the_numbers_and_leaves_the_runs_own_files_untouched(copied, capsys):
    before, run = contents(copied), read_json(copied / "run.json")
    assert main(["--eval-only", str(copied)]) == 0
    after, again = contents(copied), read_json(copied / "eval.json")
    assert after.keys() - before.keys() == {"eval.json", "eval-evaluation.safetensors",
                                            "eval-recommendations.csv"}
    assert {name: after[name] for name in before} == before
    assert after["eval-evaluation.safetensors"] == before["evaluation.safetensors"]
    for part in ("protocol", "rows", "effect", "arrays", "options", "counts", "settings"):
        assert again[part] == run[part], part
    capsys.readouterr()
    assert main(["--eval-only", str(copied), "--no-exclude-history", "--eval-sequences", "0",
                 "--lists", "titles"]) == 0
    assert (f"{run['counts']['test']:,} test sequences, 300 candidates, history kept, "
            in capsys.readouterr().out)
    assert {name: contents(copied)[name] for name in before} == before


def test_a_kill_between_the_two_files_of_an_evaluation_leaves_the_run_readable(copied, monkeypatch):
    """The run's own evaluation counts until the new one is whole."""
    own = read_json(copied / "run.json")["rows"]

    def killed(path, value):
        raise SystemError("killed")
    with monkeypatch.context() as patch:
        patch.setattr("support.runs.write_json", killed)
        with pytest.raises(SystemError):
            main(["--eval-only", str(copied)])
    run = report.Run.from_folder(copied)
    assert run.source == "run.json" and run.record["rows"] == own


def test_recommendations_have_the_lists_of_the_best_kind_by_the_callers_own_ids(tmp_path, capsys):
    """Ids of users and items that are no numbers, and a title with a comma and a quote."""
    mine = tmp_path / "mine"
    mine.mkdir()
    titles = {f"B{i}": f'Song {i}, the "{i}"' for i in range(20)}
    with (mine / "items.csv").open("w") as file:
        csv.writer(file).writerows([("item", "title"), *titles.items()])
    rows = {(f"u-{u}", t): f"B{(3 * u + 7 * t) % 20}" for u in range(12) for t in range(9)}
    (mine / "interactions.csv").write_text("user,item,timestamp\n" + "".join(
        f"{user},{item},{1_600_000_000 + 100 * t + int(user[2:])}\n"
        for (user, t), item in rows.items()))
    assert main(["--data", str(mine), "--max-steps", "1", "--out", str(tmp_path)]) == 0
    run = tmp_path / "mine-rope-1"
    with (run / "recommendations.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    record, arrays = read_json(run / "run.json"), load_file(run / "evaluation.safetensors")
    assert record["best"] in ("10 beams on titles", "5 beams, grounded")
    catalogue = read_json(run / "catalogue.json")["titles"]
    lists = arrays[f"lists/{record['best']}/original"]
    assert [row["title"] for row in found] == [catalogue[i] for i in lists[lists >= 0].tolist()]
    assert [row["answer_title"] for row in found if row["rank"] == "1"] == [
        catalogue[i] for i in arrays["target"].tolist()]
    for row in found:
        assert titles[row["item"]] == row["title"]
        assert titles[row["answer"]] == row["answer_title"]
        history = [item for (user, t), item in rows.items() if user == row["user"]]
        assert row["answer"] in history[3:]
    latest = {user: rows[user, 8] for user in {row["user"] for row in found}}
    assert {(row["user"], row["answer"]) for row in found} >= set(latest.items())
    scored = record["best"] == "10 beams on titles"
    assert all((float(row["score"]) < 0) if scored else row["score"] == "" for row in found)


def test_what_a_run_cannot_do_is_refused_before_it_has_a_folder(tmp_path, capsys, monkeypatch):
    """Shards without torchrun; and a tokenizer that cannot keep beams on titles."""
    assert main([*ONE_STEP, "--out", str(tmp_path), "--shard"]) == 2
    assert "error: --shard wants several processes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())                         # not even a base
    monkeypatch.setattr("support.trie.Trie.__init__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*ONE_STEP, "--out", str(tmp_path)])
    assert not list(tmp_path.glob("synthetic-*"))


def test_three_kinds_of_lists_in_a_table_of_100_columns(finished, capsys):
    assert main(["--eval-only", str(finished), "--lists", "exact, titles, beams"]) == 0
    table, _, last = capsys.readouterr().out.partition("\nwritten ")
    table = table[table.index("12 test sequences"):].splitlines()
    rows = table[1:-1]                                  # without the protocol and the effect
    assert len(rows) == 1 + 3 * 5 + 3 + 3 and len({len(row) for row in rows}) == 1
    assert max(map(len, table)) <= 100 and last == f"{finished}\n"

    arrays = load_file(finished / "eval-evaluation.safetensors")
    for name in LISTS.values():
        for order in ORDERS:
            lists = arrays[f"lists/{name}/{order}"]
            assert lists.shape == (12, 10) and (lists >= 0).all()
            for row, history in zip(lists.tolist(), arrays["history"].tolist()):
                assert len(set(row)) == 10 and not set(row) & set(history)
    exact, titles = (arrays[f"lists/{LISTS[name]}/original"].tolist() for name in ("exact",
                                                                                   "titles"))
    found = sum(len(set(a) & set(b)) for a, b in zip(exact, titles))
    assert found > 60, f"{found} of 120 in the exact top tens are found by beams on titles"


def test_eval_only_wants_the_data_of_the_run(copied, capsys):
    """Were the data others, the titles in the catalogue would not be those of the lists."""
    before = contents(copied)
    record = read_json(copied / "run.json")
    assert record["counts"]["users"] == 120
    record["counts"]["users"] = 7
    (copied / "run.json").write_text(json.dumps(record))
    assert main(["--eval-only", str(copied)]) == 2
    assert "counts of the run, {'users': 7}, is now {'users': 120}" in capsys.readouterr().err
    assert contents(copied).keys() == before.keys()


def test_an_adapter_is_evaluated_on_the_base_it_was_tuned_on_only(copied, capsys):
    base = next(copied.parent.glob("tiny-*"))
    moved = base.rename(copied.parent / "moved")
    assert main(["--eval-only", str(copied)]) == 2
    assert f"{base}: not found, but the run was tuned on this base" in capsys.readouterr().err
    assert main(["--eval-only", str(copied), "--model", str(moved), "--dtype", "bfloat16",
                 "--lists", "titles"]) == 0
    assert "bfloat16\n" in capsys.readouterr().out
    weights = load_file(moved / "model.safetensors")
    norm = weights["model.norm.weight"]
    weights["model.norm.weight"] = norm + 0.01
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert main(["--eval-only", str(copied), "--model", str(moved)]) == 2
    error, tuned = capsys.readouterr().err, read_json(copied / "temporal.json")["base"]
    assert f"settings of the run, {{'base': '{tuned}'}}, is now {{'base': " in error
    weights["model.norm.weight"] = norm
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    record = read_json(copied / "run.json")
    record["options"]["temporal"] = "sinpe"
    (copied / "run.json").write_text(json.dumps(record))
    assert main(["--eval-only", str(copied), "--model", str(moved)]) == 2
    assert ("settings of the run, {'temporal': 'rope'}, is now {'temporal': 'sinpe'}"
            in capsys.readouterr().err)


# ------------------------------------------------------------ Interrupted


def test_an_interrupted_command_says_how_to_go_on_and_goes_on(finished, tmp_path, capsys,
                                                              monkeypatch):
    broken, steps = tmp_path / finished.name, []
    base = next(finished.parent.glob("tiny-*"))
    shutil.copytree(base, tmp_path / base.name)

    def interrupted(*inputs):
        steps.append(1)
        if len(steps) == 4:             # in the first epoch, after three checkpoints
            os.kill(os.getpid(), signal.SIGINT)
        return log_step(*inputs)

    def no_evaluation(*inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr("support.progress.log_step", interrupted)
    assert main([*QUICK, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"interrupted; continue with --resume {broken}\n"
    assert main(["--eval-only", str(broken)]) == 2
    assert "interrupted before its first epoch ended" in capsys.readouterr().err
    for part, damage, message in (
            ("counts", {"train": 3}, "counts of the run, {'train': 3}, is now {'train': 64}"),
            ("settings", {"base": "b"}, "settings of the run, {'base': 'b'}, is now")):
        record = read_json(broken / "run.json")
        (broken / "run.json").write_text(json.dumps(record | {part: record[part] | damage}))
        assert main(["--resume", str(broken)]) == 2 and message in capsys.readouterr().err
        (broken / "run.json").write_text(json.dumps(record))
    with monkeypatch.context() as once_more:
        once_more.setattr(cetrec, "result_table", no_evaluation)
        assert main(["--resume", str(broken)]) == 130 and len(steps) == 4 + 3
    assert main(["--eval-only", str(broken)]) == 0              # looks, and changes nothing
    assert f"{broken} is not complete; this takes its best epoch" in capsys.readouterr().out
    for path in broken.glob("eval*"):
        if path.name != "evaluation.safetensors":
            path.unlink()
    assert main(["--resume", str(broken)]) == 0 and len(steps) == 4 + 3
    whole, again = (read_json(folder / "run.json") for folder in (finished, broken))
    for part in ("protocol", "rows", "effect", "options", "counts"):
        assert again[part] == whole[part], part
    assert log_of(broken) == log_of(finished)
    assert contents(broken).keys() == {name for name in contents(finished)
                                       if not name.startswith(("eval.", "eval-"))}
    for name in ("adapter_model.safetensors", "evaluation.safetensors"):
        assert (finished / name).read_bytes() == (broken / name).read_bytes()
    assert main(["--resume", str(broken)]) == 2
    assert "this run is complete; --eval-only evaluates it again" in capsys.readouterr().err


@pytest.mark.parametrize("limit, said", [
    ("1", "at most 1 steps (--max-steps), 0 of them warm-up\n"),
    ("400", "at most 4 steps, 0 of them warm-up\n")])
def test_max_steps_is_named_where_it_is_what_limits(tmp_path, capsys, limit, said, monkeypatch):
    monkeypatch.setattr(cetrec, "train", lambda *inputs: signal.raise_signal(signal.SIGINT))
    flags = [*QUICK, "--epochs", "1", "--max-steps", limit, "--out", str(tmp_path)]
    assert main(flags) == 130 and said in capsys.readouterr().out


def test_a_run_that_evaluates_is_not_resumed_beside_it(tmp_path, capsys, monkeypatch):
    """Whoever tries is told so, and the run ends as if nobody had tried."""
    evaluate, tried = cetrec.result_table, []

    def tried_meanwhile(*inputs):
        tried.append(main(["--resume", str(tmp_path / "synthetic-rope-1")]))
        return evaluate(*inputs)
    monkeypatch.setattr(cetrec, "result_table", tried_meanwhile)
    assert main([*ONE_STEP, "--out", str(tmp_path)]) == 0 and tried == [2]
    assert "another process is at work on this folder" in capsys.readouterr().err
    run = tmp_path / "synthetic-rope-1"
    assert "rows" in read_json(run / "run.json") and len(log_of(run)) == 2
    assert not (run / ".lock").exists() and not (run / "checkpoint.safetensors").exists()


def test_a_run_that_was_completed_after_it_was_read_stays_as_it_is(tmp_path, capsys, monkeypatch):
    """The second command reads run.json, the first one ends, and the second one goes on."""
    make, run = cetrec.make_recommenders, tmp_path / "synthetic-rope-1"
    with monkeypatch.context() as patch:
        patch.setattr(cetrec, "result_table", lambda *inputs: signal.raise_signal(signal.SIGINT))
        assert main([*ONE_STEP, "--out", str(tmp_path)]) == 130
    completed = []

    def complete_meanwhile(*inputs):
        if not completed:
            completed.append(True)
            assert main(["--resume", str(run)]) == 0
            completed.append(contents(run))
        return make(*inputs)
    monkeypatch.setattr(cetrec, "make_recommenders", complete_meanwhile)
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 2
    assert "this run is complete; --eval-only evaluates it again" in capsys.readouterr().err
    after = contents(run)
    after.pop(".lock", None)
    assert after == completed[1]


# ------------------------------------------------------------ Flags, bases, data


@pytest.mark.parametrize("flags, expected", [
    (["--temporal", "rope-attention"], {"temporal": "rope-attention", "lambda_ct": 0.1}),
    (["--temporal", "sinpe", "--sinpe-scale", "0.1"], {"sinpe_scale": 0.1}),
    (["--temporal", "none", "--lambda-ct", "0.5"], {"lambda_ct": 0.0}),
    (["--lambda-ct", "0", "--order-strength", "0", "--seed", "3"], {"order_strength": 0.0,
                                                                    "seed": 3}),
    (["--lora-rank", "2", "--lora-alpha", "4", "--lora-dropout", "0.25", "--lora-targets",
      "q_proj,o_proj", "--lr", "0.01", "--epochs", "2", "--warmup", "1", "--dtype", "bfloat16"],
     {"lora_rank": 2, "lora_targets": ["q_proj", "o_proj"]}),
    (["--recompute", "--dtype", "stored"], {"recompute": True, "dtype": "stored"}),
    (["--compile", "--micro-batch", "5"], {"compile": True, "micro_batch": 5}),
    (["--ground-with", "tuned", "--ground-list", "single", "--length-penalty", "1"],
     {"ground_with": "tuned", "ground_list": "single", "length_penalty": 1.0, "lists": ["beams"]})])
def test_flags_reach_the_run(tmp_path, capsys, flags, expected, monkeypatch):
    """test_options.py shows that each flag reaches its field; here it reaches the work."""
    recomputed, compiled, rows = [], [], []

    def recompute(block, *inputs, use_reentrant):
        recomputed.append(1)
        return block(*inputs)

    def compile_block(call, dynamic):
        return lambda *inputs: compiled.append(1) or call(*inputs)

    def parts(batch, size):
        rows.append(size)
        return my_parts(batch, size)
    monkeypatch.setattr("support.machine.checkpoint", recompute)
    monkeypatch.setattr("support.processes.my_parts", parts)
    monkeypatch.setattr(torch, "compile", compile_block)
    monkeypatch.setenv("CXX", sys.executable)           # a compiler need not be here
    assert main([*ONE_STEP, "--lists", "beams", *flags, "--out", str(tmp_path)]) == 0
    folder, text = next(tmp_path.glob("synthetic-*")), capsys.readouterr().out
    record, adapter = (read_json(folder / name) for name in ("run.json", "adapter_config.json"))
    assert {key: record["options"][key] for key in expected} == expected
    assert bool(recomputed) == expected.get("recompute", False)
    assert bool(compiled) == expected.get("compile", False)
    assert ("blocks are compiled" in text) == bool(compiled)
    assert len(rows) == 1 and ("--micro-batch" not in flags or rows == [5])
    if "--lora-rank" in flags:
        assert {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.25,
                "target_modules": ["q_proj", "o_proj"]}.items() <= adapter.items()
        assert log_of(folder)[0]["lr"] == 0.01 and " threads, bfloat16\n" in text
    if "none" in flags:
        assert "λ is 0 in this run" in text and " + 0" not in text.partition("| loss ")[2][:40]
    if "stored" in flags:
        assert " threads, as stored\n" in text
    assert "\n2 beams, grounded " in text and "10 beams on titles" not in text


def test_a_checkpoint_folder_serves_as_model_and_movielens_as_data(finished, tmp_path, capsys):
    base, folder = next(finished.parent.glob("tiny-*")), tmp_path / "raw" / "ml-1m"
    folder.mkdir(parents=True)
    (folder / "movies.dat").write_text("".join(f"{i}::Film {i} (1999)::x\n" for i in range(1, 21)))
    (folder / "ratings.dat").write_text("".join(
        f"{u}::{1 + (3 * u + 7 * t) % 20}::5::{1000 * u + t}\n" for u in range(12)
        for t in range(9)))
    assert main(["--data", "movielens", "--data-dir", str(tmp_path / "raw"), "--sample", "1",
                 "--index", "time", "--model", str(base), "--lora-rank", "2", "--max-steps", "1",
                 "--beams", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    run, text = tmp_path / "movielens-rope-1", capsys.readouterr().out
    record = read_json(run / "run.json")
    assert read_json(run / "temporal.json")["index"] == "time"
    assert record["steps"] == ["108 interactions, 12 users, 20 items",
                               "5-core: 108 interactions, 12 users, 20 items"]
    assert set(record["checksums"]) == {"ratings.dat", "movies.dat"}
    assert "192,483 sequences" in text and ", 20 candidates, history excluded\n" in text
    assert "best, order-aware" not in text      # the true distribution of these data is unknown
    assert read_json(run / "adapter_config.json")["base_model_name_or_path"] == str(base)


def test_a_base_whose_activations_overflow_in_float16_is_evaluated_in_float32_only(
        finished, tmp_path, capsys):
    """What leaves its MLPs is above 65,504. The norms hide that in float32."""
    base = load_llama(next(finished.parent.glob("tiny-*")))
    for block in base.layers:
        block.mlp.up_proj.weight.data *= 1e7
    shutil.copytree(next(finished.parent.glob("tiny-*")), tmp_path / "base")
    save_llama(base, tmp_path / "base")
    flags = [*ONE_STEP, "--model", str(tmp_path / "base"), "--out", str(tmp_path)]
    assert main(flags) == 0
    run = str(tmp_path / "synthetic-rope-1")
    for lists in ("beams", "titles", "exact"):
        assert main(["--eval-only", run, "--lists", lists, "--dtype", "float16"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the model's scores are not finite") and "float32" in error
    assert main([*flags, "--dtype", "float16"]) == 2                # nor does it tune in it
    assert "or --dtype bfloat16 where it is float16" in capsys.readouterr().err


def test_a_run_on_ones_own_folder_is_written_below_out(tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "items.csv").write_text("item,title\n" + "".join(f"{i},Song {i}\n" for i in range(20)))
    (mine / "interactions.csv").write_text("user,item,timestamp\n" + "".join(
        f"u{u},{(3 * u + 7 * t) % 20},2020-01-{1 + t:02}\n" for u in range(12) for t in range(9)))
    assert main([*ONE_STEP, "--data", str(mine), "--domain", "artists", "--index", "time",
                 "--out", str(tmp_path / "runs")]) == 0
    assert sorted(path.name for path in mine.iterdir()) == ["interactions.csv", "items.csv"]
    run = tmp_path / "runs" / "mine-rope-1"
    assert f"\nwritten {run}" in capsys.readouterr().out
    assert read_json(run / "catalogue.json")["domain"] == "artists"
    assert main(["--eval-only", str(run)]) == 0
    moved = mine.rename(tmp_path / "moved")
    assert main(["--eval-only", str(run)]) == 2
    assert f"{mine}: no such folder" in capsys.readouterr().err
    assert main(["--eval-only", str(run), "--data", str(moved)]) == 0
    with open(moved / "items.csv", "a") as file:
        file.write("20,Song 20\n")
    assert main(["--eval-only", str(run), "--data", str(moved)]) == 2
    assert "checksums of the run, {'items.csv': " in capsys.readouterr().err


def test_the_tiny_base_is_an_ordinary_checkpoint_for_transformers(finished):
    transformers = pytest.importorskip("transformers")
    base = next(finished.parent.glob("tiny-*"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer, prompt = read_tokenizer(base), build_prompt(["Dusty Canyon 4", "Ran"])[0]
    ids = transformers.AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt").input_ids
    tokens, model = ids[0].tolist(), load_llama(base)
    assert tokens == tokenizer.bpe.encode(prompt).ids
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(model.embed(ids))[0]), theirs(ids).logits,
                                   rtol=2e-5, atol=2e-5)
        expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:]
    (beams,), _ = beam_search(TemporalLlama(model, "none"), [(tokens, [-1] * len(tokens))], beams=1,
                              max_new_tokens=12, min_new_tokens=0, eos_ids=tokenizer.eos_ids)
    assert beams[0] == expected.tolist()


# ------------------------------------------------------------ What a user can do wrong


def no_network(*args, **kwargs):
    """Stands in for a download."""
    raise urllib.error.URLError("no network in tests")


@pytest.mark.parametrize("flags, message", [
    (["--data", "movielens", "--data-dir", "nowhere"], "ml-1m.zip"),
    (["--data", "ml-100k", "--order-strength", "1"], "--order-strength goes with --data synthetic"),
    (["--data", "lastfm", "--index", "time"], "add --chronological"),
    (["--data", "netflix"], "unknown data set 'netflix'"),
    (["--data", "."], ".: wanted interactions.csv"),
    (["--order-strength", "2"], "order strength is 2.0"),
    (["--lambda-ct", "nan"], "--lambda-ct is nan"), (["--seed", "9" * 20], "--seed is 9999"),
    (["--lora-targets", "wq"], "LoRA targets is ('wq',)"),
    (["--lora-rank", "0"], "--lora-rank is 0"),
    (["--lists", "trie"], "--lists is 'trie'"),
    (["--lists", "exact", "--ground-list", "single"], "--ground-list goes with --lists beams"),
    (["--limit-train", "-3"], "--limit-train is -3"),
    (["--model", "nowhere"], "nowhere/config.json: not found"),
    (["--device", "cuda"], "--device cuda: this PyTorch sees no such device"),
    (["--device", "mps"], "--device mps: this PyTorch sees no such device"),
    (["--eval-only", "nowhere"], "run.json: not found"),
    (["--eval-only", "x", "--lr", "1"], "does not go with --lr"),
    (["--eval-only", "x", "--out", "y"], "does not go with --out"),
    (["--resume", "nowhere"], "--resume wants the folder of a run"),
    (["--resume", "x", "--beams", "3"], "does not go with --beams")])
def test_each_user_error_is_one_line_and_status_2(tmp_path, capsys, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.datasets.urlopen", no_network)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available.get(flags[-1]):
        pytest.skip("this machine has one")
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.glob("runs/synthetic-*"))
    assert not list(tmp_path.glob("runs/tiny-*"))       # no base is trained in vain


def test_an_unwritable_output_folder_and_a_damaged_record(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "choose another folder with --out" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"options": {"data": 1}}')
    assert main(["--eval-only", str(tmp_path)]) == 2
    assert "not the record of a run" in capsys.readouterr().err


def test_a_history_longer_than_the_context_is_refused_before_tuning(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TINY_BASES, "synthetic", replace(
        TINY_BASES["synthetic"], max_position_embeddings=16))
    assert main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "more than the base's context of 16" in capsys.readouterr().err
    assert not list(tmp_path.glob("synthetic-*"))


def test_the_command_itself_ends_without_a_traceback():
    done = subprocess.run([sys.executable, str(ROOT / "cetrec.py"), "--out", "/dev/null"],
                          capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: /dev/null: cannot write there")


@pytest.mark.parametrize("flags, message", [
    (["--lamda", "1"], "unrecognized arguments: --lamda 1"),
    (["--recommend", "x", "y"], "unrecognized arguments: --recommend x y"),
    (["--resume", "x", "--eval-only", "y"], "--resume and --eval-only: one at a time")])
def test_flags_that_cannot_be_are_answered_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines() == [
        f"error: {message}; usage: cetrec.py [flags], where --help explains the flags"]


def test_help_ends_with_status_0_and_leads_to_the_readings(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "usage: cetrec.py [flags] CETRec: tune a Llama" in text
    assert "docs/readings.md" in text and (ROOT / "docs" / "readings.md").is_file()
    assert all(f" --{name} " in text for name in ("data", "out", "resume", "eval-only"))
