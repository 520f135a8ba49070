"""The shape of the package: layers, sizes, docstrings, and what the documents say about it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reroll.ledger import CATEGORIES
from tests.project import ROOT

PACKAGE = ROOT / "src" / "reroll"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"types", "versions", "errors", "config"},
    {"algo", "tasks", "model"},
    {"engine"},
    {"rollout", "train"},
    {
        "audit", "figures", "ledger", "rundir", "order", "interrupt", "log", "plot", "evaluate",
        "setup", "scheduling", "occupancy", "simulate", "comparison", "timeline", "workload",
        "summary", "pruning", "helptext", "loop", "cli", "__main__", "arguments", "notes",
        "collection", "gathering", "imports", "prefixes", "ladder", "warmstart",
    },
]  # fmt: skip
"""from low to high; a module imports from its own part and from lower layers"""
FREE = (0, len(LAYERS) - 1)
"""layers whose parts are single modules, which may import one another"""

LONG_FILES: dict[str, str] = {}
"""file over 300 lines, and why"""
LONG_FUNCTIONS: dict[str, str] = {}
"""`file: function` over 60 lines, and why"""


def name_of(path: Path) -> str:
    """`reroll.engine.local`; a package stands for its __init__."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, where: Path) -> set[str]:
    """Modules of reroll that a tree imports anywhere in it, in functions too."""
    known = {name_of(source) for source in SOURCES}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module or "")
    return {name for name in found if name.split(".")[0] == "reroll"}


class WithoutTypes(ast.NodeTransformer):
    """Takes out `if TYPE_CHECKING:`, which never runs."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        never = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if never else self.generic_visit(node)


def run_of(path: Path) -> ast.AST:
    """The tree of what a file does when it runs."""
    return WithoutTypes().visit(ast.parse(path.read_text()))


IMPORTS = {name_of(path): imports_of(ast.parse(path.read_text()), path) for path in SOURCES}
RUN_IMPORTS = {name_of(path): imports_of(run_of(path), path) for path in SOURCES}

ONLY_TYPES = {
    "reroll.config.check": {"reroll.config.load"},
    "reroll.config.check_schedule": {"reroll.config.load"},
    "reroll.config.check_prune": {"reroll.config.load"},
    "reroll.config.check_prefix": {"reroll.config.load"},
}
"""modules imported for their types alone: the whole configuration, which calls its checks"""


def part_of(name: str) -> str:
    """`engine` of `reroll.engine.local`; empty for `reroll` itself."""
    return f"{name}.".split(".")[1]


def layer_of(name: str) -> int:
    part = part_of(name)
    return next(i for i, layer in enumerate(LAYERS) if part in layer) if part else -1


def test_every_part_has_its_layer() -> None:
    parts = {part_of(name) for name in IMPORTS} - {""}
    assert parts == set().union(*LAYERS)


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_point_down(name: str) -> None:
    for other in IMPORTS[name]:
        mine, theirs = layer_of(name), layer_of(other)
        within = part_of(name) == part_of(other) or mine in FREE
        assert theirs < mine or (theirs == mine and within), f"{name} imports {other}"


def test_algorithms_know_nothing_but_algorithms() -> None:
    algo = {name: found for name, found in IMPORTS.items() if part_of(name) == "algo"}
    assert len(algo) > 3
    for name, found in algo.items():
        assert {part_of(other) for other in found} <= {"algo"}, name


def test_config_stands_on_errors_and_types_alone() -> None:
    config = {name: found for name, found in IMPORTS.items() if part_of(name) == "config"}
    assert len(config) > 3
    for name, found in config.items():
        assert {part_of(other) for other in found} <= {"config", "errors", "types"}, name
        assert "reroll.config" not in found, f"{name} imports what imports it"
    assert IMPORTS["reroll.errors"] == IMPORTS["reroll.types"] == set()


def test_rollout_and_train_do_not_know_each_other() -> None:
    for one, other in (("rollout", "train"), ("train", "rollout")):
        for name, found in IMPORTS.items():
            if part_of(name) == one:
                assert other not in {part_of(module) for module in found}, name


def test_no_imports_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in sorted(RUN_IMPORTS.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())
    assert len(done) >= len(SOURCES)
    only_types = {name: IMPORTS[name] - RUN_IMPORTS[name] for name in IMPORTS}
    assert {name: found for name, found in only_types.items() if found} == ONLY_TYPES


def test_files_are_short() -> None:
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in SOURCES}
    assert {name for name, length in lengths.items() if length > 300} == set(LONG_FILES)
    assert max(lengths.values()) <= 400


def test_functions_are_short() -> None:
    long = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > 60:
                    long.add(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert long == set(LONG_FUNCTIONS)


def public(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes of a module, and methods of its public classes, without underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    outer = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    inner = [
        node
        for owner in outer
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    return [*outer, *inner]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    for node in public(tree):
        assert ast.get_docstring(node), node.name


HIDDEN = ["datasets", "trl", "peft", "tensorboard", "wandb", "trackio", "vllm", "ray"]

WITHOUT = """
import importlib, importlib.machinery, pkgutil, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {hidden}:
            return None
        return super().find_spec(name, path, target)

place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = Without
for name in {hidden}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit("not hidden: " + name)

import reroll
modules = [m.name for m in pkgutil.walk_packages(reroll.__path__, "reroll.")]
for name in modules:
    if name != "reroll.__main__":
        importlib.import_module(name)
from reroll.cli import main
try:
    main(["--help"])
except SystemExit as ended:
    assert ended.code == 0

from transformers import Qwen3Config, Qwen3ForCausalLM
from reroll.config import load_config
from reroll.errors import UserError
from reroll.model.lora import add_lora
model = Qwen3ForCausalLM(Qwen3Config(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=8,
))
try:
    add_lora(model, load_config(None, {{"lora.rank": "2"}}).lora, 0)
except UserError as error:
    print(error)
print("imported", len(modules))
"""


def test_it_imports_without_the_optional_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(hidden=HIDDEN)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "usage: reroll" in done.stdout
    assert "lora.rank = 2: needs the package peft; pip install 'reroll[peft]'\n" in done.stdout
    assert done.stdout.endswith(f"imported {len(SOURCES) - 1}\n")


# --- documents ----------------------------------------------------------------------------------


def tree_of(readme: str) -> dict[str, str]:
    """path: description, from the first fenced block under a heading with "tree" in it."""
    found = re.search(
        r"^#+[^\n]*\btree\b[^\n]*\n.*?^```[^\n]*\n(.*?)^```", readme, re.M | re.S | re.I
    )
    assert found, "README.md has no heading with 'tree' and a fenced block under it"
    rows = [re.match(r"\s*(\S+)\s{2,}(\S.*)$", line) for line in found[1].splitlines()]
    return {row[1]: row[2] for row in rows if row}


def on_disk() -> set[str]:
    """Files that the tree must list."""
    found = set()
    for folder in ("src/reroll", "recipes", "bench", "docs"):
        for path in (ROOT / folder).rglob("*"):
            name = str(path.relative_to(ROOT))
            exempt = path.name in ("__init__.py", "__main__.py", "py.typed")
            if path.is_file() and not exempt and "/assets/" not in name and ".pyc" not in name:
                found.add(name)
    return found


def tracked_or_new() -> set[str]:
    """What git would carry: results that it ignores need no line."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return set(listed.stdout.splitlines()) if listed.returncode == 0 else on_disk()


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    tree = tree_of((ROOT / "README.md").read_text())
    files = on_disk() & tracked_or_new()
    assert len(files) > 40
    tops = ("src/reroll/", "recipes/", "bench/", "docs/")
    listed = {path for path in tree if path.startswith(tops) and not path.endswith("/")}
    assert sorted(files - listed) == [], "files without a line"
    beyond = {path for path in listed - files if not (ROOT / path).exists()}
    assert sorted(beyond) == [], "lines without a file"


def glossary_names(text: str) -> set[str]:
    """Names in backticks in the first column of tables that look like keys of metrics."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.lstrip().startswith("|")]
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return {name for name in names if re.fullmatch(r"[a-z]+(_[a-z]+)*", name)}


def spelled_in_source() -> set[str]:
    """Words of the source, and names that it puts together: tokens_prefill, greedy_reward_low."""
    words = {w for path in SOURCES for w in re.findall(r"[a-z]+(?:_[a-z]+)*", path.read_text())}
    return words | {f"{k}_{c}" for k in ("tokens", "flops", "seconds") for c in CATEGORIES}


def test_the_glossary_names_what_the_source_names() -> None:
    names = glossary_names((ROOT / "docs" / "glossary.md").read_text())
    assert names, "no table with names in its first column"
    assert sorted(names - spelled_in_source()) == []


def test_the_readers_of_documents_see_what_is_wrong() -> None:
    readme = "# A\n```\nnot/this.py    x\n```\n## Source tree\ntext\n```text\nsrc/reroll/\n" + (
        "src/reroll/a.py    does a\n  bench/b.py  does b\nsrc/reroll/c.py\n```\n"
    )
    assert tree_of(readme) == {"src/reroll/a.py": "does a", "bench/b.py": "does b"}
    table = "| name | what |\n|---|---|\n| `live_groups`, `pass@k` | `other` |\n| `no_such_key` | |"
    assert glossary_names(table) == {"live_groups", "no_such_key"}
    assert glossary_names(table) - spelled_in_source() == {"no_such_key"}
