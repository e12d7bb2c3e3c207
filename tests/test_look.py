"""experiments/look.py: what it says of a data set, against brute force."""

import numpy as np
import pytest

from data import Interactions, make_sequences, split_by_time
from experiments import look
from support.datasets import load_interactions


@pytest.fixture
def own_folder(tmp_path):
    """20 users, 30 items; every second user ends with one that nobody had before."""
    rows = [f"u{u},{26 + u % 4 if t == 10 and u % 2 else (7 * u + 3 * t) % 26},"
            f"{1e9 + 864 * (20 * t + u)}" for u in range(20) for t in range(11)]
    (tmp_path / "interactions.csv").write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    (tmp_path / "items.csv").write_text(
        "item,title\n" + "".join(f"{i},Item {i}\n" for i in range(30)))
    return tmp_path


def test_histogram_by_hand():
    lines = look.histogram(np.array([1, 1, 1, 1, 2, 3, 1_024])).splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["1", "4"], ["2-3", "2"], ["4-7", "0"]]
    assert lines[0].count("#") == 50 and lines[1].count("#") == 25 and lines[2].count("#") == 0
    assert lines[10].split()[:2] == ["1,024-2,047", "1"] and len(lines) == 11
    assert look.histogram(np.array([9, 17])).splitlines()[0].split()[:2] == ["8-15", "1"]


def test_the_command_shows_what_a_data_set_holds(own_folder, capsys):
    flags = ["--data", str(own_folder)]
    assert look.main([*flags, "--index", "time", "--domain", "games"]) == 0
    text = capsys.readouterr().out
    for wanted in ("raw | 220 interactions, 20 users, 28 items", "160 sequences, 128 train, ",
                   "users by their number of interactions\n             8-15        20 ####",
                   "answers | train 2001-09-09..2001-09-10 | valid 2001-09-10..2001-09-11 | ",
                   "times | 2001-09-09 to 2001-09-11 | 0.0 % of neighbours",
                   "tokens of a prompt | median ",
                   "The user has played the following video games", "[k=0.", "⟨Item"):
        assert wanted in text, wanted
    assert look.main([*flags, "--sample", "0.5"]) == 0
    assert "step | users drawn to have 0.5 of the interactions: 110 " in capsys.readouterr().out
    with open(own_folder / "interactions.csv", "a") as file:
        file.write("u0,0,1e9\n" * 5 + "u0,99,1e9\n" * 30)
    assert look.main(flags) == 2
    assert "30 of 255 interactions are with items for which" in capsys.readouterr().err
    assert look.main([*flags, "--drop-untitled"]) == 0
    assert ", 5 repeats dropped; --keep-repeats keeps them: 220 inter" in capsys.readouterr().out
    assert look.main([*flags, "--drop-untitled", "--keep-repeats"]) == 0
    assert " | 225 interactions, 20 users, 30 items" in capsys.readouterr().out


def test_the_tokenizer_of_a_checkpoint_makes_the_tokens(own_folder, tokenizer, capsys):
    assert look.main(["--data", str(own_folder)]) == 0
    words = capsys.readouterr().out
    (own_folder / "base").mkdir()
    tokenizer.bpe.save(str(own_folder / "base" / "tokenizer.json"))
    (own_folder / "base" / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert look.main(["--data", str(own_folder), "--tokenizer", str(own_folder / "base")]) == 0
    letters = capsys.readouterr().out
    assert words.split("tokens of a prompt")[0] == letters.split("tokens of a prompt")[0]
    median = [int(text.split("| median ")[1].split(",")[0]) for text in (words, letters)]
    assert median[0] < median[1]        # it was trained on other titles


def few_and_many() -> Interactions:
    """Users of 1 to 12 interactions, in a random order of rows; half of the times are equal."""
    rng = np.random.default_rng(0)
    users = rng.permutation(np.repeat(np.arange(24), 1 + np.arange(24) % 12))
    return Interactions(users, rng.integers(0, 9, len(users)), rng.integers(0, 6, len(users)),
                        [f"Title {i}" for i in range(9)])


def test_users_and_items_are_those_of_brute_force(tokenizer):
    x = few_and_many()
    splits = split_by_time(make_sequences(x))
    of_users = [int((x.users == u).sum()) for u in range(24)]
    answers = np.concatenate([s.targets for s in splits])
    assert sorted(look.interactions_of_users(answers)) == sorted(n for n in of_users if n > 3)
    text = look.describe(splits, 24, tokenizer)
    assert "users by their number of interactions; 6 more have fewer than 4\n" in text
    items = look.histogram(np.bincount(x.items))
    assert f"items by their number of interactions\n{items}\n" in text


def test_the_share_of_unseen_answers_is_that_of_brute_force(own_folder, tokenizer):
    x = load_interactions(str(own_folder), "data")
    splits = train, _, test = split_by_time(make_sequences(x))
    seen = {int(i) for n in range(len(train)) for i in [*train.history(n), train.target(n)]}
    unseen = np.mean([test.target(n) not in seen for n in range(len(test))])
    assert 0 < unseen < 1
    assert f"never seen in training | {100 * unseen:.1f} %" in look.describe(splits, 20, tokenizer)


@pytest.mark.parametrize("flags, message", [
    (["--data", "netflix"], "unknown data set 'netflix'"),
    (["--data", "lastfm", "--index", "time"], "add --chronological"),
    (["--sample", "0.5"], "--sample goes with data that are not synthetic"),
    (["--domain", "games"], "--domain goes with data that are not synthetic"),
    (["--data", "steam", "--sample", "0"], "--sample is 0.0"),
    (["--seed", "-1"], "--seed is -1"), (["--tokenizer", "nowhere"], "tokenizer.json: not found")])
def test_each_error_is_one_line_and_status_2(capsys, flags, message):
    assert look.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_flags_of_tuning_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        look.main(["--lambda-ct", "1"])
    assert "unrecognized arguments: --lambda-ct 1" in capsys.readouterr().err


def test_real_data_have_the_counts_of_their_publisher(real_data, capsys):
    """The README of MovieLens 100K: 943 users, 1,682 items, 20 ratings or more of each user."""
    assert look.main(["--data", "ml-100k", "--data-dir", str(real_data)]) == 0
    text = capsys.readouterr().out
    assert "raw | 100,000 interactions, 943 users, 1,682 items\n" in text
    users = text.split("users by their number of interactions\n")[1].split("\n\n")[0].splitlines()
    assert users[0].split()[0] == "16-31"
    assert sum(int(line.split()[1].replace(",", "")) for line in users) == 943
