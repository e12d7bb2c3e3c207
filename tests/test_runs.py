"""Run folders: whole files, going on with the same data."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from support.files import save_arrays, write_json
from support.options import Options
from support.runs import check_same, check_writable, new_folder, open_data, read_run, reopen
from support.synthetic import SyntheticWorld

# ------------------------------------------------------------ The command and its folders


def interrupted(*inputs):
    """Stands in for os.replace."""
    raise KeyboardInterrupt


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    text, arrays = tmp_path / "run.json", tmp_path / "lists.safetensors"
    write_json(text, {"λ": 0.1})
    every_other = np.arange(12).reshape(3, 4)[:, ::2]       # safetensors wants contiguous ones
    digest = save_arrays({"items": every_other}, arrays, {"done": "2"})
    assert json.loads(text.read_text(encoding="utf-8")) == {"λ": 0.1}
    assert load_file(arrays)["items"].tolist() == [[0, 2], [4, 6], [8, 10]]
    assert digest == hashlib.sha256(arrays.read_bytes()).hexdigest()
    before = text.read_bytes(), arrays.read_bytes()
    monkeypatch.setattr(os, "replace", interrupted)         # the last moment to be interrupted at
    for write in (lambda: write_json(text, {"λ": 1}),
                  lambda: save_arrays({"items": np.zeros(2)}, arrays)):
        with pytest.raises(KeyboardInterrupt):
            write()
    with pytest.raises(TypeError):
        write_json(text, {"not JSON": np.zeros(1)})
    assert (text.read_bytes(), arrays.read_bytes()) == before


def test_a_new_folder_has_the_next_free_number(tmp_path):
    (tmp_path / "run-2").write_text("in the way")
    folders = [new_folder(tmp_path, "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run-1", "run-3", "run-4"]
    assert all(folder.is_dir() for folder in folders)


def test_where_nothing_can_be_written_is_known_before_any_work(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="file: cannot write there .* with --out$"):
        check_writable(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write there"):
        check_writable(tmp_path / "file" / "below")


# ------------------------------------------------------------ Going on with a run


def make_run(folder: Path, base: str = "tiny-1", **more) -> Options:
    """A folder as a run leaves it, as far as it is read."""
    options = Options.from_flags({"data": "ml-100k", "lr": 0.5} | more.pop("flags", {}))
    folder.mkdir()
    (folder.parent / base).mkdir(exist_ok=True)
    write_json(folder / "run.json", {"method": "cetrec", "options": options.record(),
                                     "base": base} | more)
    return options


def test_a_run_gives_its_options_and_the_base_beside_it(tmp_path):
    run = tmp_path / "run"
    options = make_run(run, rows={})
    assert read_run(run, {}) == (options, tmp_path / "tiny-1")
    changed, _ = read_run(run, {"data_dir": "d", "device": "cpu", "dtype": "stored", "beams": 3,
                                "lists": "exact, beams"})
    assert changed == replace(options, data_dir="d", device="cpu", dtype="stored", beams=3,
                              lists=("exact", "beams"))
    (tmp_path / "moved").mkdir()
    moved = {"model": str(tmp_path / "moved"), "data": str(tmp_path / "moved")}
    assert read_run(run, moved) == (replace(options, data=moved["data"]), tmp_path / "moved")


def test_a_base_that_is_not_tiny_is_where_the_record_says_or_found_again(tmp_path, monkeypatch):
    base = tmp_path / "Llama"
    base.mkdir()
    options = make_run(tmp_path / "run", str(base), rows={}, flags={"model": "meta/Llama"})
    assert read_run(tmp_path / "run", {}) == (options, base)
    base.rmdir()                        # the Hub's cache was emptied: it is fetched once more
    monkeypatch.setattr("support.runs.find_checkpoint", lambda name: {"meta/Llama": tmp_path}[name])
    assert read_run(tmp_path / "run", {}) == (options, tmp_path)


@pytest.mark.parametrize("flags, command, message", [
    ({"lr": 1.0, "epochs": 2}, "--eval-only", "--eval-only takes data, base and tuning from the "
     "run; it does not go with --epochs, --lr"),
    ({"beams": 3}, "--resume", "--resume takes data, base and tuning from the run; it does not go "
     "with --beams"),
    ({"dtype": "stored"}, "--resume", "it does not go with --dtype"),
    ({"out": "x"}, "--eval-only", "it does not go with --out"),
    ({"lists": "trie"}, "--eval-only", "--lists is 'trie'"),
    ({"lists": "exact", "beams": 2}, "--eval-only", "--beams goes with --lists beams"),
    ({"model": "nowhere"}, "--eval-only", "nowhere: not found, but the run was tuned on this base; "
     "if it has moved, say where with --model"),
    ({}, "--resume", "run: this run is complete; --eval-only evaluates it again")])
def test_what_does_not_go_with_a_run_is_refused(tmp_path, flags, command, message):
    make_run(tmp_path / "run", rows={})
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_run(tmp_path / "run", flags, command)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_data_dir_is_refused_where_the_data_of_the_run_are_not_public(tmp_path):
    make_run(tmp_path / "run", rows={}, flags={"data": "mine"})
    with pytest.raises(ValueError, match="--data-dir goes with a public data set"):
        read_run(tmp_path / "run", {"data_dir": "x"})


def test_data_that_have_moved_are_named_and_can_be_told(tmp_path):
    here = str(tmp_path)
    for command, more in (("--eval-only", {"rows": {}}), ("--resume", {})):
        options = make_run(tmp_path / command, flags={"data": "mine"}, **more)
        with pytest.raises(FileNotFoundError, match="mine: no such folder, but the data of the run "
                                                    "were there; if it has moved, .*with --data"):
            reopen(tmp_path / command, {}, command)
        found, _ = read_run(tmp_path / command, {"data": here}, command)
        assert found == replace(options, data=here)


@pytest.mark.parametrize("text", [
    "{", "[]", "3", "\x00", '{"options": 3}', '{"options": {"model": "tiny"}}',
    '{"options": {"model": "tiny"}, "base": 3}',
    '{"options": {"model": "tiny", "data": 1}, "base": "b"}'])
def test_a_damaged_record_is_one_clear_line(tmp_path, text):
    with pytest.raises(FileNotFoundError, match="run.json: not found; --resume wants the folder"):
        read_run(tmp_path, {}, "--resume")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_run(tmp_path, {})
    assert str(error.value).startswith(f"{tmp_path / 'run.json'}: not ")
    assert "\n" not in str(error.value)


def test_a_record_whose_value_cannot_be_says_which(tmp_path):
    make_run(tmp_path / "run", rows={})
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    saved["options"]["device"] = "gpu"
    write_json(tmp_path / "run" / "run.json", saved)
    with pytest.raises(ValueError, match="--device is 'gpu'; wanted one of auto, cpu, cuda, mps"):
        read_run(tmp_path / "run", {})


def test_a_run_that_is_not_complete_is_evaluated_if_it_has_an_adapter(tmp_path, capsys):
    run = tmp_path / "run"
    options = make_run(run)
    assert read_run(run, {}, "--resume") == (options, tmp_path / "tiny-1")
    with pytest.raises(ValueError, match="interrupted before its first epoch ended, so it has no "
                                         "adapter yet; --resume continues it"):
        read_run(run, {})
    (run / "adapter_model.safetensors").write_text("")      # the first of three files is there
    with pytest.raises(ValueError, match="no adapter yet"):
        read_run(run, {})
    (run / "temporal.json").write_text("{}")                # the last one
    assert capsys.readouterr().out == ""
    assert read_run(run, {}) == (options, tmp_path / "tiny-1")
    assert capsys.readouterr().out == (
        f"{run} is not complete; this takes its best epoch so far, and --resume continues\n")


def test_a_run_goes_on_with_the_same_data_and_base_only(tmp_path):
    began = {"counts": {"train": 7, "test": 1}, "steps": ("first of each pair: 7 rows",),
             "checksums": {"u.data": "ab"}, "settings": {"base": "c0ffee", "scale": 1.0},
             "options": {"device": "cpu"}, "base": "tiny-1", "versions": {"torch": "2"}}
    write_json(tmp_path / "run.json", began | {"rows": {}, "effect": [0.1, 0.1]})
    check_same(tmp_path, began)
    check_same(tmp_path, began | {"options": {"device": "cuda"}, "base": "/moved/tiny-1",
                                  "versions": {"torch": "3"}})
    for part, now, message in (
            ("counts", {"train": 3, "test": 1}, "counts of the run, {'train': 7}, is now "
             "{'train': 3}"),
            ("checksums", {"u.data": "cd"}, "checksums of the run, {'u.data': 'ab'}, is now"),
            ("settings", {"base": "decaf", "scale": 1.0}, "settings of the run, {'base': "
             "'c0ffee'}, is now {'base': 'decaf'}"),
            ("steps", (), "steps of the run, ['first of each pair: 7 rows'], is now []")):
        with pytest.raises(ValueError) as error:
            check_same(tmp_path, began | {part: now})
        assert message in str(error.value) and "'scale'" not in str(error.value)
        assert "with the data and the base it began with only" in str(error.value)


# ------------------------------------------------------------ Data, device, memory


def test_open_data_prints_and_records_what_there_is(capsys, monkeypatch):
    draw = SyntheticWorld.interactions
    monkeypatch.setattr(SyntheticWorld, "interactions", lambda self, seed: draw(self, 150, seed))
    options = Options.from_flags({"limit_train": 50, "seed": 4, "order_strength": 0.5})
    (train_set, valid_set, test_set), world, record = open_data(options)
    text = capsys.readouterr().out
    x = SyntheticWorld(strength=0.5, seed=4).interactions(seed=4)
    sequences = int((np.unique(x.users, return_counts=True)[1] - 3).clip(0).sum())
    a, b = sequences * 8 // 10, sequences * 9 // 10
    assert world.strength == 0.5 and record["steps"] == () and record["checksums"] == {}
    assert record["counts"] == {
        "interactions": len(x.users), "users": 150, "items": 300, "sequences": sequences,
        "train": 50, "valid": b - a, "test": sequences - b}
    assert text == (f"data synthetic | {len(x.users):,} interactions, 150 users, 300 items, "
                    f"{sequences:,} sequences, 50 train, {b - a} valid, {sequences - b} test\n")
    assert [len(s) for s in (train_set, valid_set, test_set)] == [50, b - a, sequences - b]
    (whole, _, _), _, _ = open_data(replace(options, limit_train=0))
    assert len(whole) == a                  # and the 50 are its latest
    assert (train_set.targets == whole.targets[-50:]).all()


def test_open_data_counts_the_steps_and_names_the_papers_counts(tmp_path, capsys):
    """20 films, 12 users with 9 ratings each: 6 sequences a user. The first rating is repeated."""
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "movies.dat").write_text("".join(f"{i}::Film {i} (1999)::x\n" for i in range(1, 21)))
    rows = [f"{u}::{1 + (3 * u + 7 * t) % 20}::5::{1000 * u + t}\n" for u in range(12)
            for t in range(9)]
    (folder / "ratings.dat").write_text("".join(rows) + rows[0])
    options = Options.from_flags({"data": "movielens", "data_dir": str(tmp_path), "sample": 1.0,
                                  "index": "time"})
    splits, world, record = open_data(options)
    text = capsys.readouterr().out
    assert world is None and splits[0].index == "time"
    assert text.startswith("raw | 109 interactions, 12 users, 20 items\nstep | ")
    assert [line.removeprefix("step | ") for line in text.splitlines() if line.startswith("step")
            ] == list(record["steps"][1:]) and "\ntimes | 1970-01-01 to 1970-01-01 | 0.0 %" in text
    assert ("data movielens | 108 interactions, 12 users, 20 items, 72 sequences, 57 train, "
            "7 valid, 8 test\npaper's Table 2 | 192,483 sequences, 3,952 items, 999,611 "
            "interactions\n") in text
    digest = hashlib.sha256((folder / "ratings.dat").read_bytes()).hexdigest()
    assert record["checksums"]["ratings.dat"] == digest
