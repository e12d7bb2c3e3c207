"""The parts of README and docs that are made from the code, the flags and the kept records.

    python -m experiments.readme        write them anew; the tests compare them

A part stands between a line that names it and a line that ends it:

    <!-- made: map -->                  one of PARTS below, or a file of kept records
    <!-- end -->

The first run is what `python cetrec.py > experiments/results/first-run.txt` printed.
"""

import ast
import re
import sys
from dataclasses import fields
from pathlib import Path

from evaluate import METRICS
from experiments.reproduce import (ABLATION, RESULTS, means, read_records, record_file, rows_of,
                                   spread, told, worlds_table)
from support.files import write_whole
from support.options import Options, Where, as_flag, told_default
from support.terminal import Parser, exit_status

ROOT = Path(__file__).parent.parent
FIVE = ("llama", "lora", "data", "cetrec", "evaluate")
PART = re.compile(r"(<!-- made: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Place in the paper -> what is there, and how the names of its tests in test_equations.py begin.
PLACES = {
    "Table 1": ("the prompt, quoted titles", "table1"),
    "Eq. 1": ("the answer's likelihood, token by token", "eq01"),
    "Eq. 2": ("Θ frozen, Φ tuned", "eq02"),
    "Eq. 3": ("sinusoidal p_k", "eq03"),
    "Eq. 4": ("rotary R_k", "eq04"),
    "Eq. 5": ("attention under rotation", "eq05"),
    "Eq. 6": ("one p_k for all tokens of item k", "eq06"),
    "§4.2": ("temporal embeddings", "eq06"),
    "§4.3": ("order erased; the twin network", "sec4_3"),
    "§4.4": ("the losses, and the one world that recommends", "eq10"),
    "Eq. 7": ("the effect of order on the answer", "eq07"),
    "Eq. 8": ("L_CT, of the difference f(x_t) − f(x_0)", "eq08"),
    "Eq. 9": ("L_TA", "eq09"),
    "Eq. 10": ("L = L_TA + λ L_CT", "eq10"),
    "§5.1.1": ("windows of 3 to 10, split 8:1:1 by time", "sec5_1_1"),
    "§5.1.2": ("HR@K, NDCG@K over all items", "sec5_1_2"),
    "§5.1.3": ("w.o. CT: λ = 0; w.o. Both, which is BIGRec: `--temporal none`", "eq10_lambda_0"),
    "§5.1.4": ("five beams, grounded, merged", "sec5_1_4"),
    "§5.4": ("reversed histories (Fig. 4)", "sec5_4")}

# ----------------------------------------------------------------------------------------------
# The map from the paper to the code


def places_in(text: str) -> set[str]:
    """The places of the paper that a docstring names: "Eq. 7 to 9 in §4.4" -> four of them.

    §4.2.1 is in §4.2; sections of §5 count by themselves.
    """
    found = {f"Table {number}" for number in re.findall(r"Table (\d+)", text)}
    for first, more in re.findall(r"Eqs?\. (\d+)((?:(?:, | and | to )\d+)*)", text):
        numbers = [int(first)]
        for between, number in re.findall(r"(, | and | to )(\d+)", more):
            numbers += (range(numbers[-1] + 1, int(number) + 1) if between == " to " else
                        [int(number)])
        found |= {f"Eq. {number}" for number in numbers}
    found |= {f"§{section}" for section in re.findall(r"§(4\.\d|5(?:\.\d)+)", text)}
    return found


def code_of_places(sources: dict[str, str]) -> dict[str, list[str]]:
    """Place -> the functions and classes whose docstrings name it; sources by module."""
    found: dict[str, list[str]] = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                for place in places_in(ast.get_docstring(child) or ""):
                    found.setdefault(place, []).append(f"{name}.{child.name}")
                visit(child, f"{name}.{child.name}")
    for module, source in sources.items():
        visit(ast.parse(source), module)
    return found


def names_of_tests(beginning: str, source: str) -> list[str]:
    """The tests in a source whose names go on so after "test_"."""
    return re.findall(rf"^def (test_{beginning}\w*)", source, re.MULTILINE)


def paper_map() -> list[str]:
    """Every place of the paper with its code and its tests.

    Raises ValueError for a place that has no code, or no test.
    """
    code = code_of_places({name: (ROOT / f"{name}.py").read_text("utf-8") for name in FIVE})
    tests = (ROOT / "tests" / "test_equations.py").read_text("utf-8")
    lines = ["| paper | what | code | tests in `tests/test_equations.py` |", "|---|---|---|---|"]
    for place, (what, beginning) in PLACES.items():
        if place not in code or not (here := names_of_tests(beginning, tests)):
            raise ValueError(f"{place} has no function, or no test: name it in a docstring of the "
                             f"five files, and begin a test's name with test_{beginning}")
        names = ", ".join(f"`{name}`" for name in code[place])
        lines.append(f"| {place} | {what} | {names} | {len(here)}: `test_{beginning}…` |")
    return lines


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
    before, rows = printed()
    data, *steps, epoch = [line for line in before if line.startswith(("data ", "step ", "epoch "))]
    shown = [line for line in rows if not line.startswith((
        "  reversed", "  shuffled", "  change, shuffled", "co-occurrence, whole"))]
    between = f"{'...':<56}the base is made; one prompt with each item's k is shown"
    return ["```", data, between, steps[-1], epoch, *shown, "```"]


def first_table() -> list[str]:
    """The whole result table of the first run."""
    return ["```", *printed()[1], "```"]


def results() -> list[str]:
    """Table 4 on every data set that has records, in short: ten beams on titles, and what counting
    reaches."""
    made, counted = "10 beams on titles", "co-occurrence, whole history"
    lines = [f"| | {' | '.join(ABLATION)} | {counted} |", "|---|" + "---|" * (len(ABLATION) + 1)]
    for metric, ending, form in (("HR@10", "", ".3f"),
                                 ("NDCG@10 reversed, %", " | change, reversed", "+.0f")):
        column = list(METRICS).index(metric.split()[0])
        for path in sorted(RESULTS.glob("TABLE4-*.jsonl")):
            records = rows_of(read_records(path))
            cells = [spread(means(records[name], made + ending)[:, column], form)
                     for name in ABLATION]
            cells.append("" if ending else spread(
                means(records["w.o. Both"], counted)[:, column], form))
            data = path.stem.removeprefix("TABLE4-")
            lines.append(f"| {data}, {metric} | {' | '.join(cells)} |")
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
            lines.append(f"| `{name}` | {told_default(f)} | {f.metadata['text']}.{values} |"
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

PARTS = {"map": paper_map, "first-run": first_run, "first-table": first_table,
         "results": results, "flags": flags, "worlds": worlds, "effects": effects}


def with_parts(text: str) -> str:
    """A file's text with all its parts made anew. Raises ValueError for an unknown part."""
    def made(match: re.Match) -> str:
        """One part with the lines that name it and end it."""
        name = match["name"]
        if name in PARTS:
            lines = PARTS[name]()
        elif (path := record_file(RESULTS, name)).is_file():
            lines = told(name.partition("-")[0], read_records(path))
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
