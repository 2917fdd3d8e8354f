"""From what a person writes for a set of shards to their URLs: braces, globs, folders, lists, `~` and variables."""

from __future__ import annotations

import difflib
import glob
import os
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from braceexpand import braceexpand

from glide_ds.data.packing.folders import packed
from glide_ds.data.packing.pack import HELD_OUT, SHARE
from glide_ds.data.tars.storage import Storage, is_remote, local_path, reading
from glide_ds.errors import DataError
from glide_ds.masking import MASK, bare

PEEK = 1000  # names of a pattern that are all missing: the rest need not be looked for
NEAR = 200  # names that are compared with a missing one
# All of most patterns. braceexpand takes 20 times as long.
ONE_RANGE = re.compile(r"([^{}\\]*)\{(\d+)\.\.(\d+)\}([^{}\\]*)")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".heic", ".gif", ".bmp", ".tif", ".tiff")
VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Shard URLs in the given order, from brace patterns, globs, folders, comma lists and lists of all of them.

    Raises DataError naming the pattern, and the nearest existing files, where one matches nothing or where
    a local shard it names does not exist; SurroundingsError where a store can't be listed.
    """
    urls, faults = existing(patterns)
    if faults:
        raise faults[0]
    if not urls:
        raise DataError("data.shards is empty", remedy="name tar files, a brace pattern, or builtin:shapes")
    places = [bare(url) if is_remote(url) else os.path.abspath(local_path(url)) for url in urls]
    if len(set(places)) < len(urls):
        doubled = [place for place, count in Counter(places).items() if count > 1]
        raise DataError(
            f"data.shards names {doubled[0]} more than once ({len(doubled)} such shards)",
            "its samples would be read twice an epoch",
            "name each shard once",
        )
    return urls


def existing(patterns: str | Sequence[str]) -> tuple[list[str], list[DataError]]:
    """The shards that are there, and what is wrong with each pattern that names others."""
    urls: list[str] = []
    faults: list[DataError] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            for part in _parts(pattern):
                found, fault = _find(part)
                urls += found
                faults += [fault] if fault else []
        except DataError as error:
            faults.append(error)
    return urls, faults


def pack_pictures(patterns: str | Sequence[str]) -> None:
    """Have what names pictures packed now, before processes wait for one another. Raises GlideError."""
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        for part in _parts(pattern):
            if not is_remote(part) and not os.path.isfile(local_path(part)) and _pictures_of(part):
                _find(part)


def _parts(pattern: str) -> list[str]:
    """The patterns of a list with commas, or with webdataset's `::`, each with `~` and variables filled in."""
    if pattern.strip() == "":
        raise DataError("data.shards has an empty pattern", remedy="name tar files, or builtin:shapes")
    if MASK in pattern:
        raise DataError(
            f"data.shards {pattern!r} has a secret that was masked, as run.json keeps it",
            "the shards can't be read",
            "give them again with it, or with the name of a variable that holds it: "
            "--set data.shards='https://host/{00..99}.tar?sig=$SIGNATURE'",
        )
    if pattern.startswith("pipe:"):
        raise DataError(
            f"data.shards names a command: {pattern.split()[0]} …",
            "what it writes can't be read by place, which this reader needs for an exact order",
            "set data.reader=stream, or give the store's URL: s3://, gs://, hf://, https://",
        )
    if re.match(r"\w+::", pattern):
        raise DataError(
            f"data.shards {pattern!r} chains file systems",
            "only one can be read",
            "give the store's own URL; data.cache_dir keeps what was read on the node's disk",
        )
    whole = os.path.expanduser(pattern.strip())
    parts = [part for each in whole.split("::") for part in _at_commas(each)]
    return [_filled(part, pattern) for part in parts]


def _at_commas(pattern: str) -> list[str]:
    """The parts at the commas outside of braces; one part where a file has that very name, or a store may."""
    if "," not in pattern or (
        not is_remote(pattern) and os.path.exists(os.path.expandvars(local_path(pattern)))
    ):
        return [pattern]
    depth, parts = 0, [""]
    for char in pattern:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    parts = [os.path.expanduser(part.strip()) for part in parts if part.strip()]
    if is_remote(pattern) and not all("://" in part for part in parts):
        return [pattern]
    return parts


def _filled(part: str, pattern: str) -> str:
    for name in VARIABLE.findall(part):
        if not os.environ.get(name.strip("{}")):
            raise DataError(
                f"data.shards {pattern!r} uses the variable {name.strip('{}')}, which is not set, or empty",
                remedy="export it, or write what it stands for",
            )
    return local_path(os.path.expandvars(part))


def _find(pattern: str) -> tuple[list[str], DataError | None]:
    """What a single pattern names and is there, and what is wrong with it."""
    if not is_remote(pattern) and os.path.isfile(
        local_path(pattern)
    ):  # brackets and braces in a name among them
        return (
            ([], _no_shards(pattern, os.path.dirname(pattern))) if _is_picture(pattern) else ([pattern], None)
        )
    if not is_remote(pattern) and (place := _pictures_of(pattern)):
        if os.path.isdir(local_path(pattern)):
            return packed(place), None
        if glob.glob(local_path(pattern), recursive=True):
            return packed(place, local_path(pattern)), None
        return [], _no_shards(pattern, place)
    try:
        names = _names(pattern)
        first = list(islice(names, PEEK))
    except ValueError:
        return [], DataError(f"data.shards pattern {pattern!r} has unbalanced braces", remedy="close them")
    folders: dict[str, set[str]] = {}
    found, missing = _look(first, folders)
    total = len(first)
    if found or not missing:
        for name in names:  # only now: a million names that are missing take seconds
            total += 1
            more, lost = _look([name], folders)
            found += more
            missing += lost
    return found, _missing(pattern, missing, len(found), total) if missing else None


def _names(pattern: str) -> Iterator[str]:
    if match := ONE_RANGE.fullmatch(pattern):
        before, first, last, behind = match.groups()
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if re.match(r"0\d", first) or re.match(r"0\d", last) else 0
        return (f"{before}{n:0{width}d}{behind}" for n in range(int(first), int(last) + step, step))
    return iter(braceexpand(pattern))


def _look(names: list[str], folders: dict[str, set[str]]) -> tuple[list[str], list[str]]:
    """(what of these is there, the others). `folders` remembers what lies where: one listing serves all names in it."""
    found: list[str] = []
    missing: list[str] = []
    for name in names:
        if is_remote(name):
            matches = _remote(name)
        else:
            path = local_path(name)
            folder, base = os.path.split(path)
            if folder not in folders:
                folders[folder] = _files(folder)
            matches = [name] if base in folders[folder] else _matches(path)
        found += matches
        missing += [] if matches else [name]
    return found, missing


def _files(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:  # not there, or no folder, as the missing names will say
        return set()


def _matches(path: str) -> list[str]:
    """What a local path names that is no file: a folder, with those in it, or a glob."""
    if glob.has_magic(path):
        matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        if "**" not in path:
            return matches
        files: dict[str, str] = {}  # links that lead back show a file at many places
        for match in sorted(matches, key=len):
            if HELD_OUT in path or not _is_held_out(os.path.dirname(match)):
                files.setdefault(os.path.realpath(match), match)
        return sorted(files.values())
    return _tars(path) if os.path.isdir(path) else []


def _tars(folder: str) -> list[str]:
    """The tars in a folder and its subfolders, links to folders too, but nothing hidden, nor set aside below it."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [
            name for name in folders if not name.startswith(".") and not _is_held_out(os.path.join(place, name))
        ]
        tars = (name for name in files if name.lower().endswith(".tar") and not name.startswith("."))
        found += [os.path.join(place, name) for name in tars]
    return sorted(found)


def _is_held_out(folder: str) -> bool:
    return os.path.basename(folder) == HELD_OUT and os.path.exists(os.path.join(folder, SHARE))


def held_out_beside(patterns: str | Sequence[str]) -> list[str]:
    """The folders of held-out shards that `glide-ds prepare pack` made beside the local ones among these shards."""
    named = (patterns,) if isinstance(patterns, str) else patterns
    local = [part for pattern in named for part in _parts(pattern) if not is_remote(part)]
    folders = dict.fromkeys(os.path.dirname(path) for path in existing(local)[0])
    beside = [os.path.join(folder, HELD_OUT) for folder in folders]
    return [folder for folder in beside if _is_held_out(folder) and _tars(folder)]


def _remote(url: str) -> list[str]:
    magic = glob.has_magic(url) and not url.startswith(("http://", "https://"))
    if not magic and not url.endswith("/") and "*" not in url:
        return [url]  # whether it is there is asked when it is opened
    if url.startswith(("http://", "https://")):
        raise DataError(
            f"data.shards {url!r}: a web server can't be asked for its files",
            "none can be found",
            "name them by a brace pattern, as in https://host/set/{00000..00099}.tar",
        )
    with reading(url):
        return Storage().remote.list(url)


def _missing(pattern: str, missing: list[str], found: int, total: int) -> DataError:
    path = local_path(missing[0])
    example = "" if missing[0] == pattern else f" (the first is {missing[0]})"
    if found:
        fact = f"data.shards pattern {pattern!r}: {len(missing)} of {total} shards do not exist{example}"
    else:
        fact = f"data.shards pattern {pattern!r} matches no file{example}"
    if is_remote(missing[0]):
        hint = "the store lists no such file"
    elif near := nearest_files(path):
        hint = f"the nearest existing are {', '.join(near)}"
    else:
        hint = "no tar file lies in or near that folder"
    remedy = "correct the pattern, or use data.shards=builtin:shapes to try without data"
    return DataError(f"{fact}; {hint}", remedy=remedy)


def _no_shards(pattern: str, folder: str) -> DataError:
    return DataError(
        f"data.shards {pattern!r} names pictures, and training reads shards: tar files of pictures and captions",
        remedy=f"make them: glide-ds prepare pack {folder or '.'} --out shards/, then data.shards='shards/*.tar'",
    )


def _pictures_of(pattern: str) -> str | None:
    """The folder of the pictures that a local pattern names instead of shards; None where it names none."""
    if _is_picture(pattern):
        return os.path.dirname(re.split(r"[*?\[{]", pattern)[0]) or "."
    path = local_path(pattern)
    seen = list(islice((name for _, _, names in os.walk(path) for name in names), PEEK))
    tars = any(name.lower().endswith(".tar") for name in seen)
    return path if not tars and any(map(_is_picture, seen)) else None


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def nearest_files(path: str, count: int = 3) -> list[str]:
    """The existing tar files most like a missing path, in its folder or the nearest folder that exists."""
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    here = (os.path.join(folder, name) for name in _files(folder) if name.lower().endswith(".tar"))
    below = islice(glob.iglob(os.path.join(glob.escape(folder), "*", "*.tar")), PEEK)
    tars = sorted(here) or sorted(below)
    middle = bisect(tars, path)
    near = tars[max(0, middle - NEAR // 2) : middle + NEAR // 2]
    return difflib.get_close_matches(path, near, n=count, cutoff=0.0)
