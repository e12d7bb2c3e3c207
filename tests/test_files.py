"""support/files.py: nothing is written through a link, by whatever a run writes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config

from llama import Llama, save_llama
from lora import add_lora, save_lora
from support.files import naming, save_arrays, write_json
from support.progress import Progress, load_checkpoint, begin_log, save_checkpoint, write_line
from support.runs import save_adapter


def tune(folder: Path) -> None:
    """A log of two lines and a checkpoint."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    begin_log(folder, Progress())
    for step in (1, 2):
        write_line(folder, {"step": step})
    save_checkpoint(folder, optimizer, Progress(step=2))


@pytest.fixture
def writers(temporal) -> dict:
    """What a run writes, and the functions that the README names."""
    model, plain = temporal("rope"), Llama(small_config())
    add_lora(model.llama)
    return {"adapter": lambda folder: save_adapter(model, folder, {"temporal": "rope"}),
            "factors": lambda folder: save_lora(model, folder),
            "base": lambda folder: save_llama(plain, folder),
            "arrays": lambda folder: save_arrays({"x": np.ones(9)}, folder / "x.safetensors"),
            "json": lambda folder: write_json(folder / "run.json", {"λ": 0.1}), "tuning": tune}


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link(tmp_path, writers, link):
    """Neither of a file's own name, nor of the temporary name of earlier versions."""
    for kind, write in writers.items():
        plain, folder = tmp_path / kind, tmp_path / f"{kind}-linked"
        plain.mkdir()
        write(plain)
        folder.mkdir()
        for name in [path.name for path in plain.iterdir()]:
            for place in (name, f"{name}.part"):
                (users := tmp_path / f"users-{place}").write_text(f"a file of the user's, {place}")
                link(users, folder / place)
        write(folder)
        for path in plain.iterdir():
            ours, users = folder / path.name, tmp_path / f"users-{path.name}"
            assert not ours.is_symlink() and not ours.samefile(users)
            if path.name != "checkpoint.safetensors":       # which has the seconds it took
                assert ours.read_bytes() == path.read_bytes()
        for users in tmp_path.glob("users-*"):
            assert users.read_text() == f"a file of the user's, {users.name[6:]}"
            users.unlink()


def test_a_link_that_leads_nowhere_is_replaced_and_a_linked_log_goes_on(tmp_path, writers):
    for kind, write in writers.items():
        write(tmp_path)
        names = [path.name for path in tmp_path.iterdir()]
        for name in names:
            (tmp_path / name).unlink()
            (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
        (tmp_path / "elsewhere").mkdir()
        write(tmp_path)
        assert not any((tmp_path / "elsewhere").iterdir()), kind
        (tmp_path / "elsewhere").rmdir()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
        for name in names:
            (tmp_path / name).unlink()
    tune(tmp_path)
    kept = tmp_path / "kept.jsonl"
    (tmp_path / "log.jsonl").rename(kept)               # as who moves a large log does
    (tmp_path / "log.jsonl").symlink_to(kept)
    done = load_checkpoint(tmp_path, torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
    begin_log(tmp_path, done)
    write_line(tmp_path, {"step": 3})
    assert kept.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "log.jsonl").read_text() == kept.read_text() + '{"step": 3}\n'


def test_an_error_of_the_system_names_the_file_and_keeps_its_kind():
    with pytest.raises(BrokenPipeError, match=r"\[Errno 32\] Broken pipe: 'the/file'"):
        with naming(Path("the/file")):
            raise BrokenPipeError(32, "Broken pipe", "/a/temporary/name")
