"""The house: imports only point left, no two files import each other, one room for DeepSpeed's internals, no crowd.

Held over every import statement of every module: relative ones, those inside functions, those for types alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

LAYERS = (
    {"environment", "errors", "files", "masking", "progress", "types"},
    {"config", "tokenizer"},
    {"data", "model"},
    {"diffusion"},
    {"inference"},
    {"training"},
    {"commands", "preflight"},
    {"cli"},
    {"__main__"},
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
# Within a layer only these (importer, imported).
SIBLINGS = {
    ("errors", "masking"),
    ("progress", "masking"),
    ("environment", "errors"),
    ("types", "errors"),
    ("files", "errors"),
    ("preflight", "commands"),
}
API = "commands.drawing.drawer."  # which the package itself offers, importing it when it is called
MOST_FILES = 15  # of a folder
LONGEST = 60  # lines of a function
ROOM = "training/zero/"  # the only place for what DeepSpeed and torch.distributed do not document
# Private names of torch and of Python that there is no public way around, and where they may stand.
ALLOWED = {
    "model/attention.py": {
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
    },
    "training/speed/recompute.py": {"_scaled_dot_product_flash_attention_for_cpu"},
    "training/speed/compiling.py": {"_dynamo"},
    "training/faults/watchdog.py": {"_current_frames"},
}
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # documented, for all their underscore
DOCUMENTED = re.compile(r"deepspeed(\.comm|(\.\w+)*\.(\w+_)?config)?$")  # its sections' models among them


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """All of a file's syntax tree, which is walked many times."""
    return tuple(ast.walk(ast.parse(source)))


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a module that lies in `package`."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            # `from glide_ds import data` names a unit only together with what it imports.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant):
                yield node.lineno, str(target.value)


def modules(package: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        words = path.relative_to(package).with_suffix("").parts
        words = words[:-1] if words[-1] == "__init__" else words
        found[".".join((package.name, *words))] = path
    return found


def violations(package: Path) -> list[str]:
    """Every import below `package` that does not point left, as "file:line: unit imports unit"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            unit = None
        elif parts[0] not in LAYER:
            found.append(f"{path.name}: the module belongs to no layer of the design")
            continue
        else:
            unit = parts[0]
        inside = ".".join((package.name, *parts[:-1]))
        for line, name in imported_modules(path.read_text(), inside):
            words = name.split(".")
            if words[0] in ("launch", "tests", "benchmarks"):
                found.append(f"{path.name}:{line}: the package imports {words[0]}")
            if words[0] != package.name or len(words) < 2 or words[1] not in LAYER or words[1] == unit:
                continue
            if unit is None and name.startswith(f"{package.name}.{API}"):
                continue
            if unit is None or not (LAYER[words[1]] < LAYER[unit] or (unit, words[1]) in SIBLINGS):
                found.append(f"{path.name}:{line}: {unit or package.name} imports {words[1]}")
    return found


def rings(package: Path) -> list[str]:
    """Every ring of modules that import each other, each once, as "a → b → a"."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        targets = set()
        for _, imported in imported_modules(path.read_text(), inside):
            # What is named may be a module or something in one.
            target = imported if imported in known else imported.rpartition(".")[0]
            if target in known and target != name:
                targets.add(target)
        graph[name] = targets
    found: dict[frozenset[str], str] = {}
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            ring = trail[trail.index(name) :]
            found.setdefault(frozenset(ring), " → ".join([*ring, name]))
            return
        if name in done:
            return
        for target in sorted(graph[name]):
            walk(target, [*trail, name])
        done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return sorted(found.values())


def own_names(package: Path) -> set[str]:
    """Every private name that the package itself defines: functions, classes, attributes, variables."""
    names = set()
    for path in package.rglob("*.py"):
        for node in nodes(path.read_text()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if ast.unparse(node.value) in ("self", "cls"):
                    names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def private_names(path: Path, own: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name of somebody else's that a file touches, as an attribute or a string."""
    for node in nodes(path.read_text()):
        name = None
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        elif (
            isinstance(node, ast.ImportFrom)
            and not (node.module or "").startswith("glide_ds")
            and not node.level
        ):
            yield from ((node.lineno, a.name) for a in node.names if a.name.startswith("_"))
        if isinstance(name, str) and re.match(r"_[a-z]", name) and name not in own | PUBLIC:
            yield node.lineno, name


def outside_the_room(package: Path) -> list[str]:
    """Every undocumented name of DeepSpeed or torch that is touched outside of training/zero."""
    own, found = own_names(package), []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        if place.startswith(ROOM):
            continue
        for line, name in private_names(path, own):
            if name not in ALLOWED.get(place, set()):
                found.append(f"{place}:{line}: {name}")
        for line, name in imported_modules(path.read_text(), "glide_ds"):
            module = name if DOCUMENTED.match(name) else name.rpartition(".")[0]
            if name.split(".")[0] == "deepspeed" and not DOCUMENTED.match(module):
                found.append(f"{place}:{line}: {name}")
    return found


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in nodes(path.read_text()):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def test_imports_only_point_left(root: Path):
    assert violations(root / "glide_ds") == []


def test_no_files_import_each_other(root: Path):
    assert rings(root / "glide_ds") == []


def test_undocumented_names_are_touched_in_one_room_only(root: Path):
    assert outside_the_room(root / "glide_ds") == []


def test_the_room_lists_every_private_name_that_it_touches(root: Path):
    room = root / "glide_ds" / ROOM
    table, own = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "", own_names(room)
    touched = {name for path in room.glob("*.py") for _, name in private_names(path, own)}
    assert touched, "nothing was found: the search is broken"
    assert {name for name in touched if not re.search(rf"\b{name}\b", table)} == set()


def test_no_folder_is_crowded(root: Path):
    folders = {path.parent for path in (root / "glide_ds").rglob("*.py")}
    counts = {str(folder.relative_to(root)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_no_function_is_long(root: Path):
    long = [
        f"{path.relative_to(root)}:{name}: {lines} lines"
        for path in (root / "glide_ds").rglob("*.py")
        for name, lines in functions(path)
        if lines > LONGEST
    ]
    assert long == []


def write(root: Path, files: dict[str, str]) -> Path:
    package = root / "glide_ds"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("data/loader.py", "from glide_ds.model import create_model"),
        ("model/unet.py", "import glide_ds.data.shapes"),
        ("data/loader.py", "def f():\n    from glide_ds import model"),
        ("data/loader.py", "from ..model.glide import Glide"),
        ("data/loader.py", "from .. import diffusion"),
        ("data/loader.py", "import importlib\nimportlib.import_module('glide_ds.training.loop')"),
        ("types.py", "from glide_ds.config import Config"),
        ("errors.py", "from glide_ds.types import Batch"),
        ("types.py", "from . import config"),
        ("tokenizer.py", "from glide_ds.data.texts import captions"),
        ("diffusion/losses.py", "from glide_ds.training.loop import train"),
        ("inference/draw.py", "from glide_ds.training.loop import train"),
        ("commands/export.py", "from glide_ds.preflight.site import Site"),
        ("commands/evaluate.py", "if True:\n    import glide_ds.cli"),
        ("config/load.py", "import launch.train"),
        ("__init__.py", "from glide_ds.types import Batch"),
        ("helpers.py", "x = 1"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, statement: str):
    assert len(violations(write(tmp_path, {module: statement}))) == 1


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        (
            "data/loader.py",
            "from glide_ds import tokenizer\nfrom glide_ds.data.order import Order\nfrom . import shapes",
        ),
        ("training/loop.py", "from glide_ds.data import build_source\nfrom ..model import create_model"),
        ("config/schema.py", "from glide_ds.types import GlideConfig"),
        ("types.py", "from glide_ds.errors import ConfigError"),
        ("cli.py", "import importlib\nimportlib.import_module('glide_ds.commands.export')\nimport torch"),
    ],
)
def test_a_right_import_is_left_alone(tmp_path: Path, module: str, statement: str):
    assert violations(write(tmp_path, {module: statement})) == []


@pytest.mark.parametrize(
    "files",
    [
        {"a.py": "from glide_ds.b import x", "b.py": "from glide_ds import a"},
        {
            "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from glide_ds.b import x",
            "b.py": "from glide_ds.c import x",
            "c.py": "def f():\n    import glide_ds.a",
        },
        {
            "data/__init__.py": "from glide_ds.data.loader import x",
            "data/loader.py": "from glide_ds.data import y",
        },
    ],
    ids=["two", "three, one for types", "a package and its module"],
)
def test_a_ring_is_found(tmp_path: Path, files: dict[str, str]):
    assert len(rings(write(tmp_path, files))) == 1


def test_what_is_no_ring_is_left_alone(tmp_path: Path):
    files = {"a.py": "from glide_ds.b import x\nfrom glide_ds.c import y", "b.py": "from glide_ds.c import y"}
    assert rings(write(tmp_path, {**files, "c.py": "import torch"})) == []


@pytest.mark.parametrize(
    "statement",
    [
        "engine.optimizer._link_all_hp_params()",
        "setattr(engine, '_copy_recovery_script', None)",
        "import torch.distributed as dist\ndist.distributed_c10d._get_default_store()",
        "from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS",
        "from torch.distributed.distributed_c10d import _world",
    ],
)
def test_an_undocumented_name_is_found_outside_of_its_room(tmp_path: Path, statement: str):
    assert outside_the_room(write(tmp_path, {"training/zero/engine.py": statement})) == []
    assert len(outside_the_room(write(tmp_path, {"training/loop.py": statement}))) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "def _own(): ...\nmodule._own()",
        "self._x = 1\nother._x",
        "point._replace(x=1)",
        "import deepspeed",
        "from deepspeed.runtime.zero.config import DeepSpeedZeroConfig",
    ],
)
def test_an_own_or_a_documented_name_may_stand_anywhere(tmp_path: Path, statement: str):
    assert outside_the_room(write(tmp_path, {"training/loop.py": statement})) == []
