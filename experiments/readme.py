"""The parts of README and docs that are made from the code, the flags and the kept records.

    python -m experiments.readme        write them anew; the tests compare them

A part stands between a line that names it and a line that ends it:

    <!-- made: flags -->                one of PARTS below, or a file of kept records
    <!-- end -->

The first run is what `python cetrec.py > experiments/results/first-run.txt` printed.
"""

import re
import sys
from dataclasses import fields
from pathlib import Path

from evaluate import METRICS
from experiments.reproduce import (ABLATION, RESULTS, means, read_records, record_file, rows_of,
                                   spread, markdown, worlds_table)
from support.files import write_whole
from support.options import Options, Where, as_flag, describe_default
from support.terminal import Parser, exit_status

ROOT = Path(__file__).parent.parent
PART = re.compile(r"(<!-- made: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def names_of_tests(beginning: str, source: str) -> list[str]:
    """The tests in a source whose names continue so after "test_"."""
    return re.findall(rf"^def (test_{beginning}\w*)", source, re.MULTILINE)


# ----------------------------------------------------------------------------------------------
# What was printed, and what was measured


def printed() -> tuple[list[str], list[str]]:
    """What the first run printed: before its result table, and the table with the effect."""
    lines = (RESULTS / "first-run.txt").read_text(encoding="utf-8").splitlines()
    table = next(i for i, line in enumerate(lines) if " test sequences, " in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("effect "))
    return lines[:table], lines[table:end + 1]


def first_run() -> list[str]:
    """The lines of the first run's output that a reader wants first."""
    _, rows = printed()
    return ["```", *(line for line in rows if not line.startswith((
        "  reversed", "  shuffled", "  change, shuffled", "co-occurrence, whole"))), "```"]


def first_table() -> list[str]:
    """The whole result table of the first run."""
    return ["```", *printed()[1], "```"]


def results() -> list[str]:
    """HR@10 of Table 4 on every data set that has records, ten beams on titles, and what counting
    reaches."""
    found = {path.stem.removeprefix("TABLE4-"): rows_of(read_records(path))
             for path in sorted(RESULTS.glob("TABLE4-*.jsonl"))}
    column, counting = list(METRICS).index("HR@10"), "co-occurrence, whole history"
    lines = [f"| HR@10 | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for name, row in [*((name, "10 beams on titles") for name in ABLATION), (None, counting)]:
        cells = [spread(means(records[name or "w.o. Both"], row)[:, column], ".3f")
                 for records in found.values()]
        lines.append(f"| {name or counting} | {' | '.join(cells)} |")
    return lines


def flags() -> list[str]:
    """Every flag of cetrec.py, its default and what it does, by group."""
    lines, groups = [], {}
    for f in (*fields(Options), *fields(Where)):
        groups.setdefault(f.metadata["group"], []).append(f)
    for group, of_group in groups.items():
        lines += ["", f"### {group}", "", "| flag | default | what it does |", "|---|---|---|"]
        for f in of_group:
            name = as_flag(f.name)
            if f.type is bool:
                name = f"{name}, --no-{name[2:]}"
            choices = f.metadata["choices"]
            values = f" One of {', '.join(map(str, choices))}." if choices else ""
            lines.append(f"| `{name}` | {describe_default(f)} | {f.metadata['text']}.{values} |"
                         .replace("NAME|FOLDER", "NAME or FOLDER"))
    return lines[1:]


def worlds() -> list[str]:
    """What the readings make of the erased world."""
    return worlds_table(rows_of(read_records(RESULTS / "READINGS-synthetic.jsonl")))


def effects() -> list[str]:
    """What each reading changes, beside the stated one; without lists that it does not concern."""
    lines = []
    for entry in read_records(RESULTS / "READINGS-synthetic.jsonl"):
        if "compared" in entry and "+0.0000 [+0.0000, +0.0000]" not in entry["compared"]:
            cells = entry["compared"].strip("| ").split(" | ")
            lines.append(f"| {' | '.join(cells[:2] + cells[-2:])} |" if len(cells) == 6 else
                         "|---|---|---|---|")
    return lines


# ----------------------------------------------------------------------------------------------
# The command

PARTS = {"first-run": first_run, "first-table": first_table,
         "results": results, "flags": flags, "worlds": worlds, "effects": effects}


def with_parts(text: str) -> str:
    """A file's text with all its parts made anew. Raises ValueError for an unknown part."""
    def made(match: re.Match) -> str:
        """One part with the lines that name it and end it."""
        name = match["name"]
        if name in PARTS:
            lines = PARTS[name]()
        elif (path := record_file(RESULTS, name)).is_file():
            lines = markdown(name.partition("-")[0], read_records(path))
        else:
            raise ValueError(f"<!-- made: {name} -->: there is no such part, and no {path}")
        return match[1] + "".join(f"{line}\n" for line in lines) + match[3]
    return PART.sub(made, text)


def pages() -> list[Path]:
    """README and docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: list[str] | None = None) -> int:
    """Write what has changed. Returns the exit status."""
    Parser(prog="python -m experiments.readme", description="Make the tables of README and docs "
           "anew, from code, flags and kept records.").parse_args(argv)

    def work() -> None:
        for path in pages():
            text = path.read_text(encoding="utf-8")
            if (anew := with_parts(text)) != text:
                write_whole(path, anew.encode())
                print(f"written {path.relative_to(ROOT)}")
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
