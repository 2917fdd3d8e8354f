"""The `glide-ds` command: a table of subcommands, each imported only when it is called.

A subcommand is a module, or a class in one, with `add_arguments(parser)` and `run(args)`; what `run` returns is the
exit code, None is 0. To add one, add a line to COMMANDS.
"""

from __future__ import annotations

import argparse
import errno
import os
import platform
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple

from glide_ds import __version__
from glide_ds.environment import is_first
from glide_ds.errors import EXIT_LOST, GlideError, SurroundingsError
from glide_ds.masking import masked
from glide_ds.training.faults.last_word import last_word

# Which launchers put before or behind all others, as one word or two; the variable LOCAL_RANK says it too.
LOCAL_RANK = re.compile(r"--local[_-]rank(=.*)?")


# What a file system or the system's limits refuse, wherever it is noticed.
SURROUNDINGS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.ESTALE,
)


class Command(NamedTuple):
    """A subcommand: its words, the module behind it, what it is for, and a command line that works."""

    words: tuple[str, ...]
    module: str
    summary: str
    example: str
    together: bool = False  # launched on several ranks: all raise the same error, and one of them says it


COMMANDS = (
    Command(
        ("train",),
        "glide_ds.commands.train",
        "train one phase or a pipeline of phases; the launchers start launch/train.py",
        "glide-ds train --ds_config ds_configs/tiny/phase1.json --dry_run",
        together=True,
    ),
    Command(
        ("prepare", "shapes"),
        "glide_ds.commands.prepare_shapes",
        "write the built-in shapes as WebDataset shards",
        "glide-ds prepare shapes --out shards/ --count 10000",
    ),
    Command(
        ("prepare", "pack"),
        "glide_ds.commands.prepare_pack",
        "turn a folder, a jsonl or a parquet of pictures and captions into shards",
        "glide-ds prepare pack photos/ --out shards/",
    ),
    Command(
        ("prepare", "index"),
        "glide_ds.commands.prepare_index",
        "index shards before the first run, and find damaged ones",
        "glide-ds prepare index 's3://bucket/laion/{00000..09999}.tar'",
    ),
    Command(
        ("prepare", "clip"),
        "glide_ds.commands.prepare_clip",
        "compute the CLIP embeddings of shards beforehand, over every process it is launched with",
        "glide-ds prepare clip 'shards/{000000..000009}.tar' --model ViT-L/14 --out clip/",
    ),
    Command(
        ("preflight",),
        "glide_ds.preflight",
        "find the mistake before the GPU hours: files, hosts, memory, disk, network, one real step",
        "glide-ds preflight --ds_config ds_configs/tiny/phase1.json",
        together=True,
    ),
    Command(
        ("plan",),
        "glide_ds.commands.plan",
        "say what a run will take: memory by part, hours, network, loader cores, disk",
        "glide-ds plan --ds_config ds_configs/phase3.json --nodes 16 --gpus 8 --gpu h100",
    ),
    Command(
        ("config", "explain"),
        "glide_ds.commands.config:Explain",
        "say what a key is for, by its name or by words of its meaning",
        "glide-ds config explain train.recompute",
    ),
    Command(
        ("config", "schema"),
        "glide_ds.commands.config:Schema",
        "a JSON Schema of a --ds_config file, by which editors complete and check",
        "glide-ds config schema --out ds_configs/schema.json",
    ),
    Command(
        ("config", "diff"),
        "glide_ds.commands.config:Diff",
        "how two configurations or run directories differ",
        "glide-ds config diff ds_configs/phase1.json ds_configs/phase2.json",
    ),
    Command(
        ("export",),
        "glide_ds.commands.export",
        "consolidated fp32 weights of a run, verified; drops into stock GLIDE code",
        "glide-ds export runs/mine --out mine.pt",
    ),
    Command(
        ("sample",),
        "glide_ds.commands.drawing.sample",
        "draw pictures for prompts",
        'glide-ds sample mine.pt --prompt "a corgi in a top hat" --out corgi.png',
    ),
    Command(
        ("demo",),
        "glide_ds.commands.drawing.demo",
        "a page to draw on, in a browser on this machine",
        "glide-ds demo mine.pt",
    ),
    Command(
        ("evaluate",),
        "glide_ds.commands.evaluate",
        "judge a model's pictures by held-out shapes or shards, and measure what CLIP contributes",
        "glide-ds evaluate mine.pt --shards 'heldout/{00..03}.tar' --guidance 1 2 3 5 --out mine.json",
        together=True,
    ),
    Command(
        ("report",),
        "glide_ds.commands.results.report",
        "a page of one or several runs: configuration, curves, pictures, events, evaluations",
        "glide-ds report runs/mine --out mine.html",
    ),
    Command(
        ("status",),
        "glide_ds.commands.results.status",
        "what a run directory holds, whether it runs, how far it is, and what of it can go",
        "glide-ds status runs/mine --prune --dry_run",
    ),
    Command(
        ("doctor",),
        "glide_ds.commands.doctor",
        "what is installed and what it runs on, on one screen for a bug report",
        "glide-ds doctor",
    ),
)
GROUPS = {
    "prepare": "make shards and what goes with them",
    "config": "explain and compare configurations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's). The exit code is 0, or what the error stands for (errors.py)."""
    sys.excepthook = _crash
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    together = False
    try:
        args = build_parser(arguments).parse_args(arguments)
        together = args.together
        return args.handler(args) or 0
    except GlideError as error:
        return _told(error, together)
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        told = SurroundingsError(
            f"{place}{error.strerror}",
            "the command ends; what stood there before still stands",
            "look after the disk, its free space and the permissions there, then start the same command again",
        )
        return _told(told, together)
    except KeyboardInterrupt:
        print("glide-ds: interrupted", file=sys.stderr)
        return 130


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own words for an error that nobody foresaw, secrets masked: a library's hold the URL it was given."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True)


def _told(error: GlideError, together: bool) -> int:
    """Say it, on one rank of those that all raise the same; the exit code."""
    # A rank that is left alone with its error says so itself.
    if is_first() or not together or error.exit_code == EXIT_LOST:
        last_word(f"glide-ds: error: {error}")
    return error.exit_code


def without_local_rank(words: Sequence[str]) -> list[str]:
    """A command line without the launchers' own option."""
    kept: list[str] = []
    for before, word in pairwise(["", *words]):
        if not LOCAL_RANK.fullmatch(word) and not (
            word.isdecimal() and re.fullmatch("--local[_-]rank", before)
        ):
            kept.append(word)
    return kept


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments: of the subcommands only the one that they call is imported."""
    parser = argparse.ArgumentParser(
        "glide-ds",
        description="Fine-tune GLIDE with CLIP conditioning on DeepSpeed.",
        epilog='TAB completes in bash and zsh after: eval "$(register-python-argcomplete glide-ds)"',
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="with those of torch and DeepSpeed")
    menu = parser.add_subparsers(metavar="COMMAND", required=True)
    groups = {name: _add_group(menu, name) for name in GROUPS}
    for command in COMMANDS:
        *group, name = command.words
        subparser = _add(groups[group[0]] if group else menu, name, command.summary, [command.example])
        if tuple(arguments[: len(command.words)]) == command.words:
            home, _, name = command.module.partition(":")
            module = import_module(home)
            module = getattr(module, name) if name else module
            module.add_arguments(subparser)
            # No argument is named so.
            subparser.set_defaults(handler=module.run, together=command.together)
    return parser


class _Version(argparse.Action):
    """Looked up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
        print(f"glide_ds {__version__}, {others}, Python {platform.python_version()}")
        parser.exit()


def _complete() -> None:
    """Answer a shell that asks how the line goes on: eval "$(register-python-argcomplete glide-ds)"."""
    import argcomplete

    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    argcomplete.autocomplete(build_parser(line.split()[1:]))


def _add_group(menu: Any, name: str) -> Any:
    examples = [command.example for command in COMMANDS if command.words[0] == name]
    return _add(menu, name, GROUPS[name], examples).add_subparsers(metavar="WHAT", required=True)


def _add(menu: Any, name: str, summary: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = menu.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
