"""The whole main path on a few steps, and every error a user can cause from the command line."""

import json
import re
import subprocess
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import cetrec
from cetrec import TemporalLlama, main
from data import Tokenizer, build_prompt
from evaluate import beam_search
from llama import load_llama

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small_base(monkeypatch):
    """The tiny base made tinier: these tests are about the path, not about quality."""
    monkeypatch.setitem(cetrec.TINY_BASES, "synthetic", replace(
        cetrec.TINY_BASES["synthetic"], vocab_size=1_000, hidden_size=32, intermediate_size=64,
        max_sequences=256, batch_size=32))


QUICK = ["--limit-train", "200", "--eval-sequences", "40", "--beams", "2", "--batch-size", "16"]


def test_the_main_path_then_eval_only_repeats_its_numbers(tmp_path, capsys):
    assert main([*QUICK, "--max-steps", "3", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    folder = tmp_path / "synthetic-rope-1"
    for wanted in ("device ", "trainable of", "paper's Table 2", "[k=0, tokens", "step     3/3",
                   "change under reversal", "popularity", "co-occurrence, whole history",
                   "best possible, order-aware", "best possible, order-blind",
                   "test: 40 sequences, all-ranking of 300 items, history excluded, 2 beams",
                   "change when shuffled", "history of 4 to 6 (", "effect of order (Eq. 7)",
                   f"report {folder}/report.html"):
        assert wanted in text, wanted
    record = json.loads((folder / "run.json").read_text())
    assert record["options"]["lambda_ct"] == 0.1 and record["tuning"]["steps"] == 3
    assert {"torch", "python"} <= record["versions"].keys() and record["counts"]["train"] == 200
    assert sorted(p.name for p in folder.iterdir() if p.suffix not in (".png", ".svg")) == [
        "adapter_config.json", "adapter_model.safetensors", "catalogue.json",
        "evaluation.safetensors", "log.jsonl", "report.html", "run.json", "temporal.json"]
    assert json.loads((folder / "temporal.json").read_text()) == record["fingerprint"]
    assert main(["--eval-only", str(folder)]) == 0
    again = json.loads((folder / "eval.json").read_text())
    assert again["metrics"] == record["metrics"]
    assert main(["--eval-only", str(folder), "--no-exclude-history",
                 "--eval-sequences", "0"]) == 0
    assert "892 sequences, all-ranking of 300 items, history kept" in capsys.readouterr().out


def test_a_finished_run_is_evaluated_in_three_ways(tmp_path, capsys):
    """On the trie every list is whole; exact ranks contain what the trie's beams find."""
    quick = [flag for flag in QUICK if flag not in ("--beams", "2")]
    assert main([*quick, "--decode", "trie", "--max-steps", "2", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "synthetic-rope-1"
    assert "10 beams on the catalogue's titles" in capsys.readouterr().out
    made = {"trie": load_file(folder / "evaluation.safetensors")}
    assert main(["--eval-only", str(folder), "--decode", "exact"]) == 0
    text = capsys.readouterr().out
    assert "every title's log-likelihood" in text and "of the exact top tens are found" in text
    made["exact"] = load_file(folder / "evaluation.safetensors")
    assert main(["--eval-only", str(folder), "--decode", "beams", "--beams", "3"]) == 0
    assert "3 beams, length penalty 0, grounded with tuned weights" in capsys.readouterr().out
    for arrays in made.values():
        lists = arrays["lists/original"]
        assert (lists >= 0).all() and all(len(set(row)) == 10 for row in lists.tolist())
        for row, history in zip(lists.tolist(), arrays["history"].tolist()):
            assert not set(row) & set(history)


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(tmp_path):
    logs = []
    for seed in ("0", "0", "1"):
        assert main([*QUICK, "--max-steps", "2", "--seed", seed, "--out", str(tmp_path)]) == 0
    for number in (1, 2, 3):
        lines = (tmp_path / f"synthetic-rope-{number}" / "log.jsonl").read_text().splitlines()
        logs.append([{k: v for k, v in json.loads(line).items() if k != "ms"} for line in lines])
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("flags, wanted", [
    (["--temporal", "rope-attention"], {"temporal": "rope-attention", "lambda_ct": 0.1}),
    (["--temporal", "sinpe", "--sinpe-scale", "0.1"], {"sinpe_scale": 0.1}),
    (["--temporal", "none", "--lambda-ct", "0.5"], {"lambda_ct": 0.0}),
    (["--lambda-ct", "0", "--order-strength", "0", "--seed", "3"], {"order_strength": 0.0,
                                                                    "seed": 3}),
    (["--lora-rank", "2", "--lora-alpha", "4", "--lora-dropout", "0", "--lora-targets",
      "q_proj,o_proj", "--lr", "0.01", "--epochs", "2", "--warmup", "1", "--dtype", "bfloat16",
      "--device", "cpu"],
     {"lora_rank": 2, "lora_targets": ["q_proj", "o_proj"], "dtype": "bfloat16", "epochs": 2}),
    (["--recompute", "--dtype", "stored"], {"recompute": True, "dtype": "stored"}),
    (["--compile", "--micro-batch", "5"], {"compile": True, "micro_batch": 5}),
    (["--ground-with", "base", "--ground-list", "single", "--length-penalty", "1"],
     {"ground_with": "base", "ground_list": "single", "length_penalty": 1.0}),
])
def test_every_flag_reaches_the_run(tmp_path, capsys, flags, wanted, monkeypatch):
    recomputed, compiled = [], []
    monkeypatch.setattr(torch, "compile", lambda call, **how: lambda *inputs: compiled.append(
        1) or call(*inputs))
    monkeypatch.setattr("llama.checkpoint", lambda block, *inputs, **rest: recomputed.append(1) or
                        checkpoint(block, *inputs, **rest))
    assert main([*QUICK, *flags, "--max-steps", "1", "--eval-sequences", "5", "--out",
                 str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("synthetic-*/run.json")).read_text())
    assert {key: record["options"][key] for key in wanted} == wanted
    assert bool(recomputed) == wanted.get("recompute", False)
    assert bool(compiled) == wanted.get("compile", False)
    if "none" in flags:
        assert "λ is 0 in this run" in capsys.readouterr().out


def test_a_checkpoint_folder_serves_as_model_and_movielens_as_data(tmp_path, capsys):
    assert main([*QUICK, "--max-steps", "1", "--eval-sequences", "5", "--out", str(tmp_path)]) == 0
    base = next(tmp_path.glob("tiny-*"))
    folder = tmp_path / "raw" / "ml-1m"
    folder.mkdir(parents=True)
    (folder / "movies.dat").write_text("".join(f"{i}::Film {i} (1999)::x\n" for i in range(1, 21)))
    (folder / "ratings.dat").write_text("".join(
        f"{u}::{1 + (3 * u + 7 * t) % 20}::5::{1000 * u + t}\n" for u in range(12)
        for t in range(9)))
    assert main(["--data", "movielens", "--data-dir", str(tmp_path / "raw"), "--sample", "1",
                 "--index", "time", "--model", str(base), "--lora-rank", "2", "--max-steps", "1",
                 "--beams", "2", "--out", str(tmp_path)]) == 0
    run = tmp_path / "movielens-rope-1"
    assert json.loads((run / "temporal.json").read_text())["index"] == "time"
    record = json.loads((run / "run.json").read_text())
    assert record["steps"] == ["5-core: 108 interactions, 12 users, 20 items"]
    assert set(record["checksums"]) == {"ratings.dat", "movies.dat"}
    text = capsys.readouterr().out
    assert "192,483 sequences" in text and "all-ranking of 20 items" in text


def test_a_run_on_ones_own_folder_is_written_below_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cetrec.__dict__, "TinyBase", lambda: cetrec.TINY_BASES["synthetic"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "items.csv").write_text("item,title\n" + "".join(f"{i},Song {i}\n" for i in range(20)))
    (mine / "interactions.csv").write_text("user,item,timestamp\n" + "".join(
        f"u{u},{(3 * u + 7 * t) % 20},2020-01-{1 + t:02}\n" for u in range(12) for t in range(9)))
    assert main([*QUICK, "--data", str(mine), "--domain", "artists", "--index", "time",
                 "--max-steps", "1", "--out", str(tmp_path / "runs")]) == 0
    assert sorted(path.name for path in mine.iterdir()) == ["interactions.csv", "items.csv"]
    run = tmp_path / "runs" / "mine-rope-1"
    assert f"report {run}/report.html" in capsys.readouterr().out
    assert main(["--eval-only", str(run)]) == 0


def test_an_adapter_is_evaluated_on_the_base_it_was_tuned_on_only(tmp_path, capsys):
    assert main([*QUICK, "--max-steps", "1", "--eval-sequences", "5", "--out", str(tmp_path)]) == 0
    run, base = tmp_path / "synthetic-rope-1", next(tmp_path.glob("tiny-*"))
    moved = base.rename(tmp_path / "moved")
    assert main(["--eval-only", str(run)]) == 2
    assert f"{base}/config.json: not found" in capsys.readouterr().err
    assert main(["--eval-only", str(run), "--model", str(moved), "--dtype", "bfloat16"]) == 0
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert main(["--eval-only", str(run), "--model", str(moved)]) == 2
    error = capsys.readouterr().err
    tuned = json.loads((run / "temporal.json").read_text())["base"]
    assert f"tuned with base {tuned}" in error and "this model has base" in error
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] - 0.01},
              moved / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((run / "run.json").read_text())
    record["options"]["temporal"] = "sinpe"
    (run / "run.json").write_text(json.dumps(record))
    assert main(["--eval-only", str(run), "--model", str(moved)]) == 2
    assert "temporal embedding rope" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on_and_goes_on(tmp_path, capsys, monkeypatch):
    flags = [*QUICK, "--max-steps", "6", "--out", str(tmp_path)]
    assert main(flags) == 0
    whole, broken = tmp_path / "synthetic-rope-1", tmp_path / "synthetic-rope-2"
    step, calls = cetrec.optimizer_step, []

    def breaks(*inputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        step(*inputs)

    def tables(text):       # from the first table on, without the folder's name
        return text[text.index("test: 40 sequences"):].partition("report ")[0]
    wanted = tables(capsys.readouterr().out)
    monkeypatch.setattr(cetrec, "optimizer_step", breaks)
    assert main(flags) == 130
    assert f"interrupted; go on with --resume {broken}\n" in capsys.readouterr().err
    for part, damage, message in (
            ("counts", {"train": 3}, "counts of the run, {'train': 3}, is now {'train': 200}"),
            ("fingerprint", {"base": "b"}, "fingerprint of the run, {'base': 'b'}, is now")):
        record = json.loads((broken / "run.json").read_text())
        changed = record | {part: record[part] | damage}
        (broken / "run.json").write_text(json.dumps(changed))
        assert main(["--resume", str(broken)]) == 2 and message in capsys.readouterr().err
        (broken / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(cetrec, "evaluate_order", no_evaluation)        # interrupted once more
    assert main(["--resume", str(broken)]) == 130 and len(calls) == 4 + 3
    monkeypatch.undo()
    assert main(["--eval-only", str(broken)]) == 0                      # looks, and changes nothing
    assert (broken / "checkpoint.safetensors").is_file()
    (broken / "eval.json").unlink()
    capsys.readouterr()
    assert main(["--resume", str(broken)]) == 0
    assert tables(capsys.readouterr().out) == wanted
    assert ({p.name for p in whole.iterdir()} == {p.name for p in broken.iterdir()})
    for name in ("adapter_model.safetensors", "evaluation.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert main(["--resume", str(broken)]) == 2
    assert "this run is complete; --eval-only evaluates it again" in capsys.readouterr().err


def no_evaluation(*inputs):
    """Stands in for evaluate_order."""
    raise KeyboardInterrupt


def test_the_tiny_base_is_an_ordinary_checkpoint_for_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main([*QUICK, "--max-steps", "1", "--eval-sequences", "5", "--out", str(tmp_path)]) == 0
    base = next(tmp_path.glob("tiny-*"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer, prompt = Tokenizer.from_folder(base), build_prompt(["Dusty Canyon 4", "Ran"])[0]
    ids = transformers.AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt").input_ids
    tokens, model = ids[0].tolist(), load_llama(base)
    assert tokens == tokenizer.bpe.encode(prompt).ids
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), theirs(ids).logits, rtol=2e-5,
                                   atol=2e-5)
        wanted = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:]
    (beams,), _ = beam_search(TemporalLlama(model, "none"), [(tokens, [-1] * len(tokens))], beams=1,
                              max_new_tokens=12, min_new_tokens=0, eos_ids=tokenizer.eos_ids)
    assert beams[0] == wanted.tolist()


def no_network(*args, **kwargs):
    """Stands in for urlopen."""
    raise urllib.error.URLError("no network in tests")


@pytest.mark.parametrize("flags, message", [
    (["--data", "movielens", "--data-dir", "nowhere"], "ml-1m.zip"),
    (["--data", "ml-100k", "--order-strength", "1"], "--order-strength goes with --data synthetic"),
    (["--data-dir", "x"], "--data-dir goes with a public data set"),
    (["--sample", "0.5"], "--sample goes with data that are not synthetic"),
    (["--data", "ml-100k", "--sample", "2"], "--sample is 2.0"),
    (["--data", "ml-100k", "--chronological"], "--chronological goes with --data lastfm"),
    (["--data", "lastfm", "--index", "time"], "add --chronological"),
    (["--data", "netflix"], "unknown data set 'netflix'"),
    (["--sinpe-scale", "2"], "--sinpe-scale goes with --temporal sinpe"),
    (["--order-strength", "2"], "order strength is 2.0"),
    (["--lambda-ct", "-1"], "--lambda-ct is -1.0"), (["--lambda-ct", "nan"], "--lambda-ct is nan"),
    (["--epochs", "0"], "--epochs is 0"), (["--beams", "0"], "--beams is 0"), (["--lr", "inf"],
                                                                               "--lr is inf"),
    (["--lora-targets", "wq"], "LoRA targets wq"), (["--lora-rank", "0"], "LoRA rank is 0"),
    (["--limit-train", "-3"], "--limit-train is -3"),
    (["--model", "nowhere"], "nowhere/config.json: not found"),
    (["--device", "cuda"], "--device cuda: this PyTorch sees no such device"),
    (["--device", "mps"], "--device mps: this PyTorch sees no such device"),
    (["--decode", "trie", "--beams", "5"], "5 beams on the trie make lists of 5"),
    (["--decode", "exact", "--beams", "5"], "--beams goes with --decode beams or trie"),
    (["--decode", "trie", "--ground-list", "single"], "--ground-list goes with --decode beams"),
    (["--explain", "x", "--eval-only", "y"], "--eval-only and --explain: one at a time"),
    (["--eval-only", "nowhere"], "run.json: not found"),
    (["--eval-only", "x", "--lr", "1"], "does not go with --lr"),
    (["--resume", "nowhere"], "--resume wants the folder of a run"),
    (["--resume", "x", "--beams", "3"], "does not go with --beams"),
    (["--micro-batch", "-1"], "--micro-batch is -1"),
])
def test_each_user_error_is_one_line_and_status_2(tmp_path, capsys, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available.get(flags[-1]):
        pytest.skip("this machine has one")
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.glob("runs/synthetic-*"))
    if flags[0].startswith("--lora"):       # refused before a base is trained for minutes
        assert not list(tmp_path.glob("runs/tiny-*"))


def test_an_unwritable_output_folder_and_a_damaged_record(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "choose another folder with --out" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"options": {"data": 1}}')
    assert main(["--eval-only", str(tmp_path)]) == 2
    assert "not the record of a run" in capsys.readouterr().err


def test_a_history_longer_than_the_context_is_refused_before_tuning(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cetrec.TINY_BASES, "synthetic", replace(
        cetrec.TINY_BASES["synthetic"], max_position_embeddings=16))
    assert main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "more than the base's context of 16" in capsys.readouterr().err


def test_the_command_itself_ends_without_a_traceback():
    done = subprocess.run([sys.executable, str(ROOT / "cetrec.py"), "--model", "nowhere", "--out",
                           "/dev/null"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run([sys.executable, str(ROOT / "cetrec.py"), "--lamda", "1"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "unrecognized arguments: --lamda" in done.stderr


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in cetrec.Options.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text
    others = ("resume", "eval-only", "recommend", "explain", "out")
    assert all(f"--{name}" in text for name in others)
    assert text.count("default: ") == len(cetrec.Options.__dataclass_fields__) + len(others)


def test_the_benchmark_measures_what_it_can_and_says_what_it_cannot(tmp_path):
    """Data only here: the other sections take minutes."""
    command = [sys.executable, "-m", "experiments.benchmark", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "data", "evaluation", "--steam-lines", "3000", "--data-dir",
                           str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for wanted in ("ML-1M, text to split .* not measured: ", "Steam, reading ", " prompts/s, ",
                   "loop waits for data ", "not measured: name a finished run with --run"):
        assert re.search(wanted, done.stdout), done.stdout
    assert set(json.loads((tmp_path / "out" / "benchmark.json").read_text())) == {"data",
                                                                                   "evaluation"}
    for flags in (["nonsense"], ["tuning", "--shapes", "huge"]):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
