"""What lies where in a tar, from its headers alone, and what is wrong with it.

Nothing is lost without a word: what is no header, no member, no end mark and no padding is damage, and what cannot be
read by its place (a sparse file, a link that leads nowhere) is named. After damage the scan goes on at the next header,
so everything whole is found.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
CHUNK = 2048 * BLOCK  # read at once where headers are looked for
END_MARK = 2 * BLOCK
RECORD = 20  # blocks: what tars are padded to, unless they are written for a tape
LARGEST = 2**32 - 1  # bytes of a member that an index can hold
LONGEST_CHAIN = 40  # of links to links, as Linux follows them
NOWHERE = -1
LONGEST_NAME = 1 << 20  # bytes of a header for a long name or pax records

# Kinds of entry.
FILE = (b"0", b"\0", b"7")  # 7: contiguous, a file like any other
HARD_LINK, SYMBOLIC_LINK, SPARSE = b"1", b"2", b"S"
WITHOUT_DATA = (b"2", b"3", b"4", b"5", b"6", b"V")  # whatever size they state
NO_FILE = (b"3", b"4", b"5", b"6", b"V", b"D")  # devices, folders, pipes, labels
GLOBAL = (b"g", b"N")  # what holds for the whole tar, and names of a form that nobody writes any more
META = (b"L", b"K", b"x", b"X", *GLOBAL)

Read = Callable[[int, int], bytes]
Blocks = NDArray[np.uint8]  # [blocks, 512]


class Member(NamedTuple):
    name: str
    offset: int  # of the data
    size: int


@dataclass
class Scan:
    """The files of a tar, and what is wrong with it."""

    size: int
    members: list[Member] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)


def split_name(name: str) -> tuple[str, str] | None:
    """A member's name as (key, extension) after WebDataset's rule, or None where it belongs to no sample."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or base.startswith(("._", "__")):
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def scan_tar(read: Read, size: int) -> Scan:
    """List a tar's files from its headers (v7, ustar, GNU and pax), checking every header's checksum.

    `read(offset, count)` returns exactly that many bytes. Hard and symbolic links to files of the tar are listed as
    these. `damage` says what is lost, and `members` has everything that is not.
    """
    return _Scanner(read, size).run()


class _Scanner:
    """One pass over a tar."""

    def __init__(self, read: Read, size: int) -> None:
        self.read, self.size, self.scan = read, size, Scan(size)
        # What the next member's own header has no room for.
        self.long_name, self.long_link = "", ""
        self.pax: dict[str, str] = {}
        self.links: list[tuple[int, str]] = []  # (place among the members, what it leads to)

    def run(self) -> Scan:
        offset: int | None = 0
        size, damage = self.size, self.scan.damage
        while offset is not None and offset + BLOCK <= size:
            header = self.read(offset, BLOCK)
            if is_header(header):
                offset = self._entry(header, offset)
            elif header.strip(b"\0"):
                offset = self._lost(offset, offset + BLOCK, "are no tar header and no member")
            else:
                offset = self._zeros(offset)
        if offset is not None:
            damage.append(
                f"it ends at byte {size} without an end mark: it was cut off or is still being written"
            )
        self._resolve_links()
        self._check_last()
        return self.scan

    def _entry(self, header: bytes, offset: int) -> int | None:
        """Take what a sound header says; returns where the next one lies, or None where the tar ends within it."""
        kind, count, start = header[156:157], _number(header[124:136]), offset + BLOCK
        if "size" in self.pax and kind not in META:
            count = _decimal(self.pax["size"])
        if kind in WITHOUT_DATA:
            count = 0
        elif kind == HARD_LINK and count and not self._data_follows(start, count):
            count = 0  # old writers state the size of the file that is linked to
        if kind == SPARSE:
            start = self._after_sparse_map(header, start)
        end = start + -(-count // BLOCK) * BLOCK
        if start + count > self.size:
            self.scan.damage.append(
                f"it ends at byte {self.size}, inside the member {self._name(header)!r} that ends at {start + count}"
            )
            return self._next_header(start)  # there is one where the size was wrong, not the tar cut off
        if kind in META:
            self._meta(kind, start, count)
        else:
            self._member(kind, header, start, count)
            self.long_name, self.long_link, self.pax = "", "", {}
        return end

    def _meta(self, kind: bytes, start: int, count: int) -> None:
        if kind in GLOBAL:
            return
        if count > LONGEST_NAME:
            self.scan.damage.append(f"bytes {start} to {start + count} are a name of {count} bytes")
            return
        data = self.read(start, count)
        if kind == b"L":
            self.long_name = data.rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"K":
            self.long_link = data.rstrip(b"\0").decode("utf-8", "replace")
        else:
            self.pax = _pax(data)

    def _name(self, header: bytes) -> str:
        return self.pax.get("GNU.sparse.name") or self.pax.get("path") or self.long_name or header_name(header)

    def _member(self, kind: bytes, header: bytes, start: int, count: int) -> None:
        name, members = self._name(header), self.scan.members
        if kind in NO_FILE:
            return
        if kind == SPARSE or any(key.startswith("GNU.sparse") for key in self.pax):
            self._unread(name, "is stored without its holes (GNU sparse); write the tar without --sparse")
        elif count > LARGEST:
            self._unread(name, f"has {count} bytes, more than the {LARGEST} that an index can hold")
        elif kind in FILE or (kind == HARD_LINK and count):
            members.append(Member(name, start, count))
        elif kind in (HARD_LINK, SYMBOLIC_LINK):
            target = self.pax.get("linkpath") or self.long_link or _text(header[157:257])
            if kind == SYMBOLIC_LINK:
                target = os.path.join(os.path.dirname(name), target)
            self.links.append((len(members), os.path.normpath(target)))
            members.append(Member(name, NOWHERE, 0))
        else:
            self._unread(name, f"is of the tar's kind {kind.decode('latin-1')!r}, which is no file")

    def _unread(self, name: str, why: str) -> None:
        if split_name(name):  # others belong to no sample
            self.scan.damage.append(f"the member {name!r} {why}")

    def _data_follows(self, start: int, count: int) -> bool:
        """Whether a hard link brings its file's bytes along, as pax allows: then no header comes at once."""
        if start + max(count, BLOCK) > self.size:
            return False
        following = self.read(start, BLOCK)
        return not is_header(following) and bool(following.strip(b"\0"))

    def _after_sparse_map(self, header: bytes, start: int) -> int:
        extended = header[482]
        while extended and start + BLOCK <= self.size:
            extended = self.read(start, BLOCK)[504]
            start += BLOCK
        return start

    # ---- where no header is

    def _zeros(self, offset: int) -> int | None:
        """An end mark and padding, which is the end (None), or a hole: then where the next member lies."""
        following = next((at for at, _ in self._blocks(offset, _not_zero)), self.size)
        if following < self.size:
            return self._lost(
                offset, following, "are no member, yet the tar goes on: two were joined, or this is a hole"
            )
        # Behind a hole it isn't known where the tar began that this is the end of.
        if not self.scan.damage and not _is_padding(offset, self.size):
            self.scan.damage.append(
                f"it ends in {self.size - offset} zero bytes, more than an end mark and padding take: its end was "
                "not written, or the file is larger than the tar"
            )
        return None

    def _lost(self, first: int, offset: int, what: str) -> int | None:
        """Name what lies from `first` to the next header after `offset`, and go on there."""
        following = self._next_header(offset)
        self.scan.damage.append(f"bytes {first} to {following or self.size} {what}")
        return following

    def _next_header(self, offset: int) -> int | None:
        self.long_name, self.long_link, self.pax = "", "", {}
        return next((at for at, block in self._blocks(offset, _like_header) if is_header(block)), None)

    def _blocks(
        self, offset: int, wanted: Callable[[Blocks], NDArray[np.bool_]]
    ) -> Iterator[tuple[int, bytes]]:
        """(offset, block) of the blocks from `offset` on that are `wanted`."""
        while offset + BLOCK <= self.size:
            count = min(CHUNK, (self.size - offset) // BLOCK * BLOCK)
            data = self.read(offset, count)
            for row in np.flatnonzero(wanted(np.frombuffer(data, np.uint8).reshape(-1, BLOCK))).tolist():
                yield offset + row * BLOCK, data[row * BLOCK : (row + 1) * BLOCK]
            offset += count

    # ---- at the end

    def _resolve_links(self) -> None:
        """Let each link among the members be what it leads to; a link to a link too."""
        if not self.links:
            return
        members = self.scan.members
        files = {os.path.normpath(member.name): member for member in members if member.offset != NOWHERE}
        links = {os.path.normpath(members[place].name): target for place, target in self.links}
        for place, target in self.links:
            end = target
            for _ in range(LONGEST_CHAIN):
                if end in files or end not in links:
                    break
                end = links[end]
            if end in files:
                members[place] = files[end]._replace(name=members[place].name)
            else:
                self._unread(members[place].name, f"is a link to {target!r}, which is no file of this tar")
        members[:] = [member for member in members if member.offset != NOWHERE]

    def _check_last(self) -> None:
        """A file that was made long before it was written, and never to its end, ends in zeros within a member."""
        if not self.scan.members:
            return
        name, offset, size = max(self.scan.members, key=lambda member: member.offset)
        if not size or self.read(offset + max(0, size - 16), min(16, size)).strip(b"\0"):
            return
        if name.lower().endswith((".npy", ".npz", ".bin", ".pth", ".pt", ".ten", ".tar")):
            return
        written = self.read(offset, size).rstrip(b"\0")
        if not written.endswith(
            (b"\xff\xd9", b"IEND\xaeB`\x82", b";")
        ):  # a picture's own end; padding may follow
            self._unread(name, f"ends in {size - len(written)} zero bytes: the tar was not written to its end")


def _not_zero(blocks: Blocks) -> NDArray[np.bool_]:
    return np.not_equal(blocks.max(axis=1), 0)


def _like_header(blocks: Blocks) -> NDArray[np.bool_]:
    """Those that begin with a name and have digits for a checksum: few enough to look at one by one."""
    digits = blocks[:, 148:154]
    octal = ((digits >= ord("0")) & (digits <= ord("7"))) | (digits == ord(" ")) | (digits == 0)
    return np.logical_and(blocks[:, 0] != 0, octal.all(axis=1))


def _is_padding(offset: int, size: int) -> bool:
    """Whether the zeros from `offset` to the end are an end mark, and what fills up the last record, if anything."""
    return any(
        -(-(offset + mark) // record) * record == size
        for mark in (BLOCK, END_MARK)  # some writers leave half of the mark
        for record in range(BLOCK, (RECORD + 1) * BLOCK, BLOCK)
    )


def is_header(header: bytes) -> bool:
    """Whether a block is a member's header, by its checksum."""
    if len(header) < BLOCK:
        return False
    try:
        stated = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        return False
    if header[0] == 0 or size < 0:
        return False
    total = sum(header) - sum(header[148:156]) + 8 * 32
    # Some old writers added up signed characters.
    return stated == total or stated == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(text: bytes) -> int:
    if text[0] & 0x80:  # GNU's base 256, for sizes of 8 GiB and more
        return int.from_bytes(bytes([text[0] & 0x7F]) + text[1:], "big")
    return int(text.strip(b" \0") or b"0", 8)


def _decimal(text: str) -> int:
    """A pax record's number; one that is none reaches behind every tar's end, which is then named."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 1 << 62


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def header_name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = _text(header[345:500]) + "/" + name
    return name


def _pax(data: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n"; by their lengths, for a value may hold anything."""
    found, offset = {}, 0
    while offset < len(data):
        length, space, _ = data[offset : offset + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        record = data[offset + len(length) + 1 : offset + int(length)].removesuffix(b"\n")
        key, _, value = record.partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        offset += int(length)
    return found
