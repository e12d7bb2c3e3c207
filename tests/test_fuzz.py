"""Every reader bears a few hundred damaged inputs; python -m experiments.fuzz tries many more."""

import pytest

from experiments import fuzz


@pytest.mark.parametrize("name", [*fuzz.READERS])
def test_damaged_input_is_read_or_refused_as_documented(name, tmp_path):
    assert fuzz.hunt(name, range(60 if name == "titles" else 150), tmp_path) == []


@pytest.mark.parametrize("read, fault", [
    (lambda folder: {}["x"], "KeyError: 'x'"), (lambda folder: fuzz.time.sleep(9), "more than"),
    (lambda folder: fuzz.os.kill(fuzz.os.getpid(), 9), "the process died")])
def test_the_hunt_finds_what_is_not_documented_and_goes_on(tmp_path, monkeypatch, read, fault):
    """Every second input has the fault."""
    def make(folder):
        (folder / "x.txt").write_text("content")

    def reader(folder):
        text = folder / "x.txt"
        if not text.exists() or len(text.read_bytes()) % 2:
            read(folder)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setitem(fuzz.READERS, "broken", (make, lambda folder: None, "*"))
    fuzz.hunt("broken", range(0), tmp_path)
    (tmp_path / "broken-good").mkdir(exist_ok=True)
    make(tmp_path / "broken-good")
    monkeypatch.setitem(fuzz.READERS, "broken", (make, reader, "*"))
    found = fuzz.hunt("broken", range(9), tmp_path)
    assert 2 <= len(found) < 9 and all(fault in line for line in found)


def test_the_command_tells_what_it_found(capsys):
    assert fuzz.main(["csv", "--inputs", "20"]) == 0
    assert capsys.readouterr().out.startswith("csv | 20 inputs | 0 faults | ")
    assert fuzz.main(["xml"]) == 2
    assert "error: xml: no such reader; known are tokenizer, " in capsys.readouterr().err
