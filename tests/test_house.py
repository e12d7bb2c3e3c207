"""The house: five small files at the top, support/ below the command, experiments/ beside it.

A room imports only what stands below it, and the five files have a budget of code and of prose.
Each check is also shown a small source that breaks it.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIVE = ("llama", "lora", "data", "evaluate", "cetrec")
BELOW = {"llama": (), "lora": (), "data": (), "evaluate": ("llama", "lora", "data"),
         "support": ("llama", "lora", "data", "evaluate", "support"),
         "cetrec": ("llama", "lora", "data", "evaluate", "support"),
         "experiments": (*FIVE, "support", "experiments")}
ALL_LINES, FILE_LINES, FUNCTION_LINES, PROSE = 1_100, 270, 60, (0.4, 0.9)
SUPPORT_NAMES = 12      # that cetrec.py may import
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def nodes(tree, *kinds):
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def imported(tree) -> list[str]:
    """Dotted names that are imported anywhere in a tree; some are modules, others are in them."""
    return [alias.name for node in nodes(tree, ast.Import) for alias in node.names] + [
        name for node in nodes(tree, ast.ImportFrom) for name in (
            node.module, *(f"{node.module}.{alias.name}" for alias in node.names))]


def broken_rule(house: dict[str, str]):
    """Who imports or names what stands above it. house: module, such as support.runs -> source"""
    bare = {}
    for module, text in house.items():
        tree, room = ast.parse(text), module.partition(".")[0]
        bare[module] = (set(imported(tree)) & house.keys()) - {module}
        if room == "support" and "experiments" in text:
            yield f"{module} names experiments/"
        if room not in BELOW:
            yield f"{module} stands beside the five files"
        for other in sorted(bare[module]):
            if other.partition(".")[0] not in BELOW.get(room, ()):
                yield f"{module} imports {other}"
        if any(node.level for node in nodes(tree, ast.ImportFrom)):
            yield f"{module} imports by dots, where nobody sees what"
        for function in nodes(tree, ast.FunctionDef, ast.AsyncFunctionDef):
            for other in sorted(set(imported(function)) & house.keys()):
                yield f"{module}: {function.name} hides an import of {other}"
    # Whoever leans on nobody is taken away, again and again. What is left leans on itself.
    while free := {module for module, others in bare.items() if not others & bare.keys()}:
        bare = {module: others for module, others in bare.items() if module not in free}
    if bare:
        yield f"a circle among {', '.join(sorted(bare))}"


def lines_of(text: str) -> tuple[int, int]:
    """How many lines hold code, and how many nothing but a comment or a docstring."""
    code, prose, docstrings = set(), set(), set()
    for node in nodes(ast.parse(text), ast.Expr):
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            prose.add(token.start[0])
        elif token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings), len((prose | docstrings) - (prose & code))


def broken_budget(house: dict[str, str]):
    """What is too long in the five files, or written by hand, or explained too little."""
    sizes = {module: lines_of(text) for module, text in house.items() if module in FIVE}
    for module in sizes:
        tree = ast.parse(house[module])
        for function in nodes(tree, ast.FunctionDef, ast.AsyncFunctionDef):
            if function.end_lineno - function.lineno >= FUNCTION_LINES:
                yield f"{module}: {function.name} is too long"
        for kind in nodes(tree, ast.ClassDef):
            if any(ast.unparse(base).endswith("Function") for base in kind.bases):
                yield f"{module}: {kind.name} is an autograd function written by hand"
        if sizes[module][0] > FILE_LINES:
            yield f"{module} is too long"
        from_support = [alias.name for node in nodes(tree, ast.ImportFrom)
                        if (node.module or "").startswith("support") for alias in node.names]
        if len(from_support) > SUPPORT_NAMES:
            yield f"{module} imports {len(from_support)} names from support/"
    code, prose = (sum(column) for column in zip(*sizes.values()))
    if code > ALL_LINES:
        yield "the five files are too long"
    if not PROSE[0] <= prose / code <= PROSE[1]:
        yield f"{prose / code:.2f} lines of prose to a line of code"


def test_the_rule_and_the_budget_of_the_house_hold():
    paths = [p for room in ("", "support", "experiments") for p in (ROOT / room).glob("*.py")]
    house = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8")
             for path in paths}
    assert house.keys() > {*FIVE, "support.runs", "experiments.benchmark"}
    assert not [*broken_rule(house), *broken_budget(house)]


@pytest.mark.parametrize("house, expected", [
    ({"llama": "", "data": "from llama import KVCache"}, "data imports llama"),
    ({"support.a": "import cetrec", "cetrec": ""}, "support.a imports cetrec"),
    ({"cetrec": "if 1:\n    from experiments import b", "experiments.b": ""},
     "cetrec imports experiments.b"),
    ({"support.a": "from support import b", "support.b": "import support.c",
      "support.c": "from support.a import x", "lora": ""},
     "a circle among support.a, support.b, support.c"),
    ({"support.a": "def f():\n    from support.b import c", "support.b": ""},
     "support.a: f hides an import of support.b"),
    ({"support.a": "from . import b"}, "support.a imports by dots, where nobody sees what"),
    ({"support.a": "# experiments/look.py calls this"}, "support.a names experiments/"),
    ({"utils": ""}, "utils stands beside the five files")])
def test_each_break_of_the_rule_is_found(house, expected):
    assert [*broken_rule(house)] == [expected]
    assert not [*broken_rule({"lora": "import numpy", "support.a": "import lora", "cetrec": "",
                              "support.b": "from support.a import f",
                              "experiments.c": "def f():\n    import torch\nimport cetrec"})]


CODE = "# why\n\nx = 1\ny = 2\n"            # two lines of code, and half as many of prose


@pytest.mark.parametrize("house, expected", [
    ({"lora": CODE * 9 + "def f():\n" + "\n" * 59 + "    x = 1"}, "lora: f is too long"),
    ({"lora": CODE * 9 + "class Fast(torch.autograd.Function):\n    x = 1"},
     "lora: Fast is an autograd function written by hand"),
    ({"lora": CODE * 135 + "z = 3"}, "lora is too long"),
    (dict.fromkeys(FIVE, CODE * 110) | {"lora": CODE * 110 + "z = 3"},
     "the five files are too long"),
    ({"cetrec": CODE * 9 + "from support.a import b, c, d, e, f, g, h\n" * 2},
     "cetrec imports 14 names from support/"),
    ({"lora": CODE + "z = [\n    3]"}, "0.25 lines of prose to a line of code"),
    ({"lora": '"""a\n\nb"""\nx = """\n"""  # c'}, "1.50 lines of prose to a line of code")])
def test_each_break_of_the_budget_is_found(house, expected):
    assert [*broken_budget(house)] == [expected]
    assert not [*broken_budget(dict.fromkeys(FIVE, CODE * 110))]
    assert not [*broken_budget({"cetrec": CODE * 9 + "from support import a, b, c, d\n" * 3,
                                "data": CODE * 135,
                                "lora": CODE * 9 + "def f():\n" + "\n" * 58 + "    x = 1",
                                "support.a": "x = 1\n" * 999})]
