"""Fetch a published file: resumed after a cut, checked, and put in place only when whole."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3

from glide_ds.errors import WeightsError
from glide_ds.files import locked, sha256, sync_directory, write_file
from glide_ds.progress import Progress

logger = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds without a byte
ATTEMPTS = 6  # in a row without progress
PAUSE = 1.0  # seconds before the second attempt, doubled for each further one
_CHUNK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP states that pass by waiting


@dataclass(frozen=True)
class Fetched:
    """A file in the cache, and how far it has been checked."""

    path: Path
    sha256: str
    checks: str


def fetch(url: str, path: Path, *, size: int | None = None, digest: str | None = None) -> Fetched:
    """The file at `url`, kept at `path`; what is there and intact is not asked for again.

    `size` in bytes and `digest` (SHA-256) are what is known beforehand. Without a digest the file is held
    against what the server says (length, MD5) and against the CRC-32 of every entry of a zip archive, which a
    `.pt` is; its SHA-256 is written to `path.sha256` and checked on every later use.

    A broken transfer goes on where it stopped, in this run or the next. Several processes may call this at
    once: one fetches, the others wait. Raises WeightsError for anything that waiting does not mend.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if hit := _from_cache(path, digest):  # before the lock: hashing gigabytes rank after rank takes long
            return hit
        with locked(path.with_name(f".{path.name}.lock")):
            return (
                _from_cache(path, digest)
                or _adopted(path, size, digest)
                or _again(path, lambda: _from_server(url, path, size, digest))
            )
    except OSError as error:
        raise WeightsError(
            f"cannot keep {path.name} in {path.parent} ({error.strerror or error})",
            remedy="make room, or set GLIDE_DS_CACHE to a directory that can be written",
        ) from error


def _from_cache(path: Path, digest: str | None) -> Fetched | None:
    known = digest or _recorded(path)
    if known is None or not path.exists():
        return None
    found = sha256(path)
    if found != known.lower():
        return None
    return Fetched(path, found, f"in the cache, SHA-256 {found[:12]}… as it should be")


def _adopted(path: Path, size: int | None, digest: str | None) -> Fetched | None:
    """A file that a person put into the cache, or None where it must be fetched; a damaged one is removed."""
    if not path.exists():
        return None
    if digest or _recorded(path):
        logger.warning("%s is damaged or not the file expected: fetching it again", path)
        return None
    try:
        checks = _check_archive(path)
    except _DamagedError as damage:
        logger.warning("%s is damaged (%s): removing it and fetching it again", path, damage)
        path.unlink()
        return None
    if size is not None and path.stat().st_size != size:
        raise WeightsError(
            f"{path} has {path.stat().st_size:,} bytes, the published file {size:,}",
            "it is another file",
            "remove it to download that one, or give its path as the weights",
        )
    found = sha256(path)
    _record(path, found)
    return Fetched(path, found, f"in the cache, {checks}; its SHA-256 {found[:12]}… is recorded for later")


def _again(path: Path, fetching: Callable[[], Fetched]) -> Fetched:
    """Fetch; where that can't be done the error also tells of the damaged file, which stays until another is whole."""
    try:
        return fetching()
    except WeightsError as error:
        if not path.exists():
            raise
        fact, consequence, remedy = error.faults[0]
        raise WeightsError(
            f"{path} is damaged or not the file expected, and can't be fetched again: {fact}",
            consequence,
            f"{remedy}; or put a whole copy there",
        ) from error


def _from_server(url: str, path: Path, size: int | None, digest: str | None) -> Fetched:
    partial = path.with_name(path.name + ".part")
    total, md5 = _Transfer(url, partial, size).run()
    try:
        found, checks = _verify(partial, total, md5, digest)
    except _DamagedError as damage:
        partial.unlink()  # going on from damaged bytes would fail for ever
        raise WeightsError(
            f"{path.name} arrived damaged ({damage}) and was removed", remedy="try again"
        ) from damage
    partial.replace(path)
    _record(path, found)
    _validator(partial).unlink(missing_ok=True)
    sync_directory(path.parent)
    return Fetched(path, found, f"downloaded from {url}, {checks}")


def _verify(partial: Path, total: int, md5: str | None, digest: str | None) -> tuple[str, str]:
    """SHA-256 of the complete file, and a sentence on what it was held against."""
    found = sha256(partial)
    if digest is not None:
        if found != digest.lower():
            raise _DamagedError(f"its SHA-256 is {found} instead of {digest}")
        return found, f"{total:,} bytes, SHA-256 as expected"
    checks = [f"{total:,} bytes as announced"]
    if md5 is not None:
        with partial.open("rb") as file:
            own = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        if own != md5:
            raise _DamagedError(f"its MD5 is {own} instead of {md5}, which the server announced")
        checks.append("MD5 as announced")
    checks.append(_check_archive(partial))
    return found, ", ".join(checks) + f"; no SHA-256 was published, {found[:12]}… is recorded for later"


def _check_archive(path: Path) -> str:
    """torch.load does not look at a zip's checksums; a flipped bit would be trained on. Raises _DamagedError."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except zipfile.BadZipFile as error:
        raise _DamagedError(f"it is no .pt archive: {error}") from error
    if bad is not None:
        raise _DamagedError(f"the checksum of its entry {bad} does not match")
    return "CRC-32 of every tensor right"


def _recorded(path: Path) -> str | None:
    record = path.with_name(path.name + ".sha256")
    return record.read_text().split()[0] if record.exists() else None


def _record(path: Path, digest: str) -> None:
    write_file(path.with_name(path.name + ".sha256"), f"{digest}  {path.name}\n")


def _validator(partial: Path) -> Path:
    """Where the ETag of a partial file is kept: its bytes may only be continued from the same version."""
    return partial.with_name(partial.name + ".etag")


class _DamagedError(Exception):
    """The bytes are not those that were sent; the message says why."""


class _PassingError(Exception):
    """A failure that waiting may mend."""


# What comes while the body is read is urllib3's own: requests wraps only errors in what it decodes.
_PASSING_ERRORS = (_PassingError, requests.RequestException, urllib3.exceptions.HTTPError)


class _Transfer:
    """One file on its way: appends to `partial` until it is whole."""

    def __init__(self, url: str, partial: Path, size: int | None) -> None:
        self.url, self.partial, self.size = url, partial, size
        self.md5: str | None = None

    def run(self) -> tuple[int, str | None]:
        """The total size in bytes and the base64 MD5 that the server announced, if any."""
        failures = 0
        while True:
            before = self._have()
            try:
                total = self._attempt()
                if self._have() == total:
                    return total, self.md5
                problem = f"the connection ended after {self._have():,} of {total:,} bytes"
            except _PASSING_ERRORS as error:
                problem = str(error) or type(error).__name__
            failures = 0 if self._have() > before else failures + 1
            if failures >= ATTEMPTS:
                raise WeightsError(
                    f"could not download {self.url} ({problem}) in {ATTEMPTS} attempts",
                    remedy=f"{before:,} bytes are kept, the same command goes on from there; or fetch the file "
                    "elsewhere and give its path",
                )
            logger.warning("%s: %s; trying again", self.url, problem)
            time.sleep(PAUSE * 2 ** (failures - 1) if failures else 0)

    def _have(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _attempt(self) -> int:
        """One request; returns how long the whole file is."""
        have, etag = self._have(), _validator(self.partial)
        headers = {"User-Agent": "glide_ds", "Accept-Encoding": "identity"}
        if have and etag.exists():
            headers |= {"Range": f"bytes={have}-", "If-Range": etag.read_text()}
        try:
            response = requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT)
        except ValueError as error:  # requests' errors of this kind say that the address is none
            raise WeightsError(f"{self.url} is no address of a file ({error})", remedy="correct it") from error
        with response:
            if not response.ok:
                return self._refusal(response, have)
            resumed = response.status_code == 206
            total = self._total(response, have if resumed else 0)
            self._keep_validators(response, resumed)
            self._receive(response, have if resumed else 0, total)
        return total

    def _refusal(self, response: requests.Response, have: int) -> int:
        code = response.status_code
        if code == 416:  # nothing is left after `have`: complete, or longer than the file
            whole = response.headers.get("Content-Range", "").rpartition("/")[2]
            if whole == str(have):
                return have
            self.partial.unlink(missing_ok=True)
            raise _PassingError("the partial file did not belong to the server's; starting over")
        if code in _PASSING:
            raise _PassingError(f"HTTP {code}")
        raise WeightsError(
            f"{self.url} answered HTTP {code} {response.reason}",
            remedy="check the address and the network's rules, or fetch the file elsewhere and give its path",
        )

    def _total(self, response: requests.Response, offset: int) -> int:
        if "html" in response.headers.get("Content-Type", ""):
            raise WeightsError(
                f"{self.url} answered with a web page, not a file", remedy="check the address and the proxy"
            )
        length = response.headers.get("Content-Length")
        if length is None:
            raise WeightsError(
                f"{self.url} does not say how long the file is",
                "it could not be checked",
                "fetch it from another address, or elsewhere and give its path",
            )
        total = offset + int(length)
        if self.size is not None and total != self.size:
            raise WeightsError(
                f"{self.url} offers {total:,} bytes, the published file has {self.size:,}",
                "it is another file",
                "check the address",
            )
        free = shutil.disk_usage(self.partial.parent).free
        if free < total - offset:
            raise WeightsError(
                f"{self.partial.parent} has {free:,} bytes free, the download needs {total - offset:,}",
                remedy="make room, or set GLIDE_DS_CACHE to another disk",
            )
        return total

    def _keep_validators(self, response: requests.Response, resumed: bool) -> None:
        # Azure sends the whole file's MD5 with a part as x-ms-blob-content-md5.
        whole = response.headers.get("x-ms-blob-content-md5")
        self.md5 = whole or (self.md5 if resumed else response.headers.get("Content-MD5"))
        if etag := response.headers.get("ETag"):
            write_file(_validator(self.partial), etag)
        elif not resumed:
            _validator(self.partial).unlink(missing_ok=True)

    def _receive(self, response: requests.Response, offset: int, total: int) -> None:
        name = self.partial.name.removesuffix(".part")
        with (
            self.partial.open("ab" if offset else "wb") as file,
            Progress(name, total, "B", done=offset, scaled=True, stream=sys.stderr) as progress,
        ):
            # Undecoded, for what arrived before a cut is handed over then.
            for chunk in response.raw.stream(_CHUNK, decode_content=False):
                file.write(chunk)
                progress.advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
