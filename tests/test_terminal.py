"""support/terminal.py and support/start.py with real faults: no memory, a full disk, signals."""

import contextlib
import io
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config

from llama import Llama, save_llama
from lora import add_lora
from support.files import save_arrays, write_json
from support.progress import Progress, begin_log, write_line
from support.runs import at_work, save_adapter
from support.tiny import write_base
from support.terminal import LONGEST, Parser, Visible, exit_status, one_line, visible

ROOT = Path(__file__).parent.parent


def stops(error: BaseException):
    """A command that ends in this error."""
    def work():
        raise error
    return work


@contextlib.contextmanager
def limited(kind: int, amount: int):
    """In this context the process may have no more of a resource than that."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


# ------------------------------------------------------------ How a command ends


@pytest.mark.parametrize("work, status, printed", [
    (lambda: None, 0, ""), (stops(ValueError("no such beam")), 2, "error: no such beam\n"),
    (stops(FileNotFoundError("x: not found")), 2, "error: x: not found\n"),
    (stops(torch.OutOfMemoryError("CUDA out of memory.\nTried much.")), 2,
     "error: out of memory (CUDA out of memory.). Less is needed with --micro-batch 1, "
     "--recompute, --dtype bfloat16, a smaller --lora-rank or fewer --beams\n"),
    (stops(KeyboardInterrupt("go on with --resume x")), 130,
     "interrupted; go on with --resume x\n"),
    (stops(KeyboardInterrupt()), 130, "interrupted; files already written are whole\n")])
def test_a_command_ends_with_a_status_and_one_line(work, status, printed, capsys):
    assert exit_status(work) == status
    assert capsys.readouterr() == ("", printed)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("y")])
def test_a_fault_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        exit_status(stops(error))


@pytest.mark.parametrize("ask", [lambda: torch.empty(10**12), lambda: np.ones(10**12),
                                 lambda: bytearray(10**12), lambda: torch.empty(10**18, 10**18)])
def test_memory_that_ends_is_one_line_that_names_what_to_lower(ask, capsys):
    with limited(resource.RLIMIT_AS, 10**11):
        assert exit_status(ask) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory (") and error.count("\n") == 1
    assert "--lora-rank or fewer --beams" in error


def test_a_disk_that_is_full_is_one_line_and_what_was_there_is_whole(tmp_path, temporal, tokenizer,
                                                                      capsys):
    """The largest file of each does not fit. It is named; save_llama alone does not do that."""
    model = temporal("rope")
    add_lora(model)
    plain = Llama(small_config(vocab_size=1_000))
    writers = {
        "adapter": lambda folder: save_adapter(model, folder, {"temporal": "rope"}),
        "base": lambda folder: save_llama(plain, folder),
        "tiny": lambda folder: write_base(plain, tokenizer, folder),
        "arrays": lambda folder: save_arrays({"x": np.ones(9_000)}, folder / "x.safetensors"),
        "json": lambda folder: write_json(folder / "x.json", ["word"] * 9_000)}
    for name, write in writers.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask() for path in folder.iterdir())
        largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        with limited(resource.RLIMIT_FSIZE, largest.stat().st_size - 1):
            assert exit_status(partial(write, folder)) == 2
        assert capsys.readouterr().err == "error: [Errno 27] File too large" + (
            f": '{largest}'\n" if name != "base" else "\n")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, name


def test_a_run_on_a_full_disk_names_the_log_and_how_to_go_on(tmp_path, capsys):
    """Whatever is written while it is tuned, the log for each step. Baselines cannot go on."""
    write_json(tmp_path / "run.json", {"method": "cetrec"})

    def work():
        with at_work(tmp_path):
            begin_log(tmp_path, Progress())
            while True:
                write_line(tmp_path, {"step": 1})
    with limited(resource.RLIMIT_FSIZE, 100):
        assert exit_status(work) == 2
    assert capsys.readouterr().err == (
        f"error: [Errno 27] File too large: '{tmp_path / 'log.jsonl'}'; once that is mended, "
        f"--resume {tmp_path} continues\n")

    def closed():
        with at_work(tmp_path):
            raise BrokenPipeError
    assert exit_status(closed) == 141 and not capsys.readouterr().err


def test_of_several_processes_the_first_tells_a_fault_and_the_others_give_it_time(monkeypatch,
                                                                                  capsys):
    waited, numbers = [], [1, 1, 1, 0]
    monkeypatch.setattr("support.terminal.time.sleep", waited.append)
    monkeypatch.setattr("support.terminal.joined", lambda: contextlib.nullcontext(numbers.pop(0)))
    monkeypatch.setenv("RANK", "1")
    assert exit_status(lambda: print("not shown")) == 0
    assert exit_status(stops(ValueError("no such beam"))) == 2 and waited == [3]
    assert capsys.readouterr() == ("", "error of process 1: no such beam\n")
    assert exit_status(stops(KeyboardInterrupt())) == 130
    gone = "[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"
    monkeypatch.setenv("RANK", "0")
    assert exit_status(stops(RuntimeError(gone))) == 2
    assert capsys.readouterr() == ("", "error: another process of this run has ended\n")


def umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_sigterm_stops_a_command_as_ctrl_c_does(capsys):
    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
    before = signal.getsignal(signal.SIGTERM)
    assert exit_status(work) == 130
    assert capsys.readouterr().err.startswith("interrupted; ")
    assert signal.getsignal(signal.SIGTERM) == before


PRINTS = ("import sys; sys.path.insert(0, '.'); from support.terminal import exit_status; "
          "from tqdm import tqdm; "
          "sys.exit(exit_status(lambda: [print(i) for i in tqdm(range({}), disable=None)]))")


FULL = "[Errno 28] No space left on device: 'standard output'"


@pytest.mark.parametrize("lines, shell, out, error", [
    (100_000, "| head -1; echo ${PIPESTATUS[0]}", "0\n141\n", ""),     # who has had enough
    (100_000, "2>&- >&-; echo $?", "0\n", ""),
    (3, ">/dev/full; echo $?", "2\n", f"error: {FULL}\n")])
def test_a_closed_end_is_borne_without_a_word_and_a_full_disk_is_told(lines, shell, out, error):
    done = subprocess.run(f'"{sys.executable}" -c "{PRINTS.format(lines)}" {shell}', shell=True,
                          cwd=ROOT, executable="/bin/bash", capture_output=True, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert (done.stdout, done.stderr) == (out, error)


def test_a_long_line_that_does_not_fit_a_disk_is_told():
    with open("/dev/full", "w") as full, pytest.raises(OSError, match=re.escape(FULL)):
        try:
            Visible(full).write("x" * 10**5)
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


# ------------------------------------------------------------ What is printed


@pytest.mark.parametrize("raw, shown", [
    ("\x1b[31mRed\x1b[0m", "\\x1b[31mRed\\x1b[0m"), ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
    ("bell\x07\r", "bell\\x07\\r"), ("\udcff.csv", "\\udcff.csv"), ("\x9b1m", "\\x9b1m"),
    ("Amélie 映画 😀\tλ ⟨x⟩\n", "Amélie 映画 😀\tλ ⟨x⟩\n"), ("فیلم", "فیلم")])
def test_characters_that_steer_a_terminal_are_shown_and_others_left_alone(raw, shown, capsys):
    assert visible(raw) == shown
    assert exit_status(lambda: print(raw, end="")) == 0
    assert exit_status(stops(ValueError(raw))) == 2
    out, error = capsys.readouterr()
    assert out == shown and error == f"error: {shown.strip()}\n"


@pytest.mark.parametrize("encoding, printed, refused", [
    ("ascii", b"Am?lie ? \\x1b ?", b"error: Am\\xe9lie\n"),
    ("latin-1", b"Am\xe9lie ? \\x1b ?", b"error: Am\xe9lie\n"),
    ("utf-8", "Amélie λ \\x1b 映".encode(), "error: Amélie\n".encode())])
def test_a_terminal_without_a_character_shows_another_one(monkeypatch, encoding, printed, refused):
    streams = {"stdout": io.TextIOWrapper(io.BytesIO(), encoding, "strict"),    # as Python opens
               "stderr": io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace")}      # them
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert exit_status(lambda: print("Amélie λ \x1b 映", end="")) == 0
    assert exit_status(stops(ValueError("Amélie"))) == 2
    with pytest.raises(SystemExit, match="0"):
        Parser("walk.py", description="λ").parse_args(["--help"])
    for stream in streams.values():
        stream.flush()
    assert streams["stdout"].buffer.getvalue().startswith(printed + b"usage: walk.py")
    assert streams["stderr"].buffer.getvalue() == refused


def test_a_command_in_a_locale_without_unicode(tmp_path):
    """Its help has λ, and the path in an error is no ASCII."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                                "PYTHONIOENCODING": ""}
    help, error = (subprocess.run([sys.executable, "cetrec.py", *argv], cwd=ROOT, env=environment,
                                  capture_output=True)
                   for argv in (["--help"], ["--eval-only", tmp_path / "Amélie"]))
    assert help.returncode == 0 and b"--lambda-ct ? " in help.stdout and help.stderr == b""
    assert error.returncode == 2 and error.stdout == b"" and error.stderr.count(b"\n") == 1
    assert b"Am\\udcc3\\udca9lie/run.json: not found" in error.stderr


def test_an_error_is_one_line_of_bounded_length_with_its_beginning_and_its_end(capsys):
    exit_status(stops(ValueError(f"data.csv: {'x' * 10**6}\n\ny; repair it")))
    line = capsys.readouterr().err
    assert line.startswith("error: data.csv: xxx") and line.endswith("x\\n\\ny; repair it\n")
    assert line.count("\n") == 1 and len(line) < LONGEST + 20
    assert one_line(" short\n") == "short"


def test_faults_of_a_command_line_are_one_line_too(capsys):
    with pytest.raises(SystemExit, match="2"):
        Parser("walk.py", "WHERE [flags]").parse_args([f"--\x1b{'y' * 9_000}"])
    line = capsys.readouterr().err
    assert line.startswith("error: the following arguments") or "\\x1byyy" in line
    assert line.endswith("usage: walk.py WHERE [flags], where --help explains the flags\n")
    assert line.count("\n") == 1 and "\x1b" not in line and len(line) < LONGEST + 200


# ------------------------------------------------------------ What a command settles at its start

# This is put into a Python of its own before anything else is run there. When torch is about to be
# loaded it prints two of the settings, and that Python ends.
AT_TORCH = """
import os, signal, sys

def look(event, args):
    if event == "import" and args[0] == "torch":
        print(os.environ.get("GOMP_SPINCOUNT"), signal.getsignal(signal.SIGINT) == signal.SIG_DFL)
        sys.stdout.flush()
        os._exit(0)
sys.addaudithook(look)
"""


@pytest.mark.parametrize("argv, settled", [
    (["cetrec.py"], "1000 True"), (["-m", "experiments.look", "--help"], "1000 True"),
    (["-c", "import cetrec"], "None False"), (["-c", "import experiments.look"], "None False")])
def test_a_command_settles_threads_and_ctrl_c_before_torch_is_loaded_and_an_import_does_not(
        tmp_path, argv, settled):
    (tmp_path / "sitecustomize.py").write_text(AT_TORCH)
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
                          env=environment | {"PYTHONPATH": str(tmp_path)})
    assert (done.stdout, done.stderr) == (f"{settled}\n", "")


def test_importing_cetrec_changes_nothing_in_the_process():
    program = """
import os, signal
before = dict(os.environ), [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
import cetrec
assert (dict(os.environ), [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
        ) == before
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="wants /proc")
def test_ctrl_c_while_libraries_are_loaded_ends_a_command_without_a_word():
    process = subprocess.Popen([sys.executable, str(ROOT / "cetrec.py")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "numpy" not in maps.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT
