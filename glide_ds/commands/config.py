"""`glide-ds config explain`, `schema` and `diff`: what a key means, what editors check by, how two runs differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glide_ds.config.explain import describe, differences, find, json_schema, page
from glide_ds.config.keys import all_keys
from glide_ds.config.load import load_config
from glide_ds.config.schema import Config
from glide_ds.files import check_place, user_path, write_file


class Explain:
    """`glide-ds config explain`."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "words", nargs="*", help="a key, a section, or words of its meaning; none: all keys"
        )
        parser.add_argument("--markdown", action="store_true", help="all keys as a page: docs/config.md")

    @staticmethod
    def run(args: argparse.Namespace) -> None:
        if args.markdown:
            print(page(), end="")
            return
        print("\n".join(describe(key) for key in (find(args.words) if args.words else all_keys())))


class Schema:
    """`glide-ds config schema`."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", type=user_path, help="write it here; default: print it")

    @staticmethod
    def run(args: argparse.Namespace) -> None:
        text = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
        if args.out:
            check_place(args.out.parent)
            write_file(args.out, text)
        else:
            print(text, end="")


class Diff:
    """`glide-ds config diff`."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        for name in ("first", "second"):
            parser.add_argument(name, type=user_path, help="a --ds_config file, a run.json or a run directory")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """0 where they are alike, 1 where not."""
        lines = list(differences(configs_of(args.first), configs_of(args.second)))
        print("\n".join(lines) if lines else f"{args.first} and {args.second} are alike")
        return 1 if lines else 0


def configs_of(place: Path) -> tuple[Config, ...]:
    """The phases that a file or a run directory describes. Raises ConfigError where it is neither."""
    return load_config(place / "run.json" if place.is_dir() else place)
