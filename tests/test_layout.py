"""Imports only point left: errors, types < config, tokenizer < {data, model} < diffusion < training < {commands} < cli.

Held over every import statement of every module, relative ones and those inside functions included.
"""

import ast
from pathlib import Path

import pytest

LAYERS = (
    {"environment", "errors", "files", "progress", "types"},
    {"config", "tokenizer"},
    {"data", "model"},
    {"diffusion"},
    {"inference"},
    {"training"},
    {"commands", "prepare", "export", "sample", "evaluate", "preflight", "plan"},
    {"cli"},
    {"__main__"},
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
# Within a layer only these (importer, imported): errors and contracts; captions become tokens; what export
# writes sample loads, and what sample draws evaluate judges.
SIBLINGS = {
    ("environment", "errors"),
    ("types", "errors"),
    ("files", "errors"),
    ("sample", "export"),
    ("evaluate", "sample"),
    ("preflight", "commands"),
}


def imported_modules(source: str, package: str):
    """(line, absolute dotted name) of every import in a module that lies in `package`."""
    for node in ast.walk(ast.parse(source)):
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


def violations(package: Path):
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
            if unit is None or not (LAYER[words[1]] < LAYER[unit] or (unit, words[1]) in SIBLINGS):
                found.append(f"{path.name}:{line}: {unit or package.name} imports {words[1]}")
    return found


def test_imports_only_point_left(root):
    assert violations(root / "glide_ds") == []


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
        ("types.py", "from . import config"),
        ("tokenizer.py", "from glide_ds.data import captions"),
        ("diffusion/losses.py", "from glide_ds.training.loop import train"),
        ("export.py", "from glide_ds.commands.sample import draw"),
        ("evaluate.py", "if True:\n    import glide_ds.cli"),
        ("config.py", "import launch.train"),
        ("__init__.py", "from glide_ds.types import Batch"),
        ("helpers.py", "x = 1"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, module, statement):
    path = tmp_path / "glide_ds" / module
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert len(violations(tmp_path / "glide_ds")) == 1


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        (
            "data/loader.py",
            "from glide_ds import tokenizer\nfrom glide_ds.data.order import Order\nfrom . import shapes",
        ),
        ("training/loop.py", "from glide_ds.data import build_source\nfrom ..model import create_model"),
        ("config.py", "from glide_ds.errors import ConfigError"),
        ("cli.py", "import importlib\nimportlib.import_module('glide_ds.commands.export')\nimport torch"),
    ],
)
def test_a_right_import_is_left_alone(tmp_path, module, statement):
    path = tmp_path / "glide_ds" / module
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert violations(tmp_path / "glide_ds") == []
