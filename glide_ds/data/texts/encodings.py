"""Bytes to text in the encoding that they are in, or not at all: a caption of wrong letters is worse than none."""

from __future__ import annotations

import codecs
import re

from glide_ds.data.tally import Cause, Unusable

BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which begins like it
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What captions in other scripts are found in. The order says nothing.
LEGACY = ["gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1253", "cp1255", "cp1256"]
HIGH = re.compile(rb"[\x80-\xff]+")
HALF_WIDTH_KANA = re.compile(r"[\uff61-\uff9f]")  # what other encodings look like as Shift JIS
CJK = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff\uff00-\uff60]")
ASCII, ACCENTS = re.compile(r"[\t\n\r -~]"), re.compile(r"[\u00a0-\u024f]")
LETTERS = re.compile(
    r"[\u0370-\u06ff\u0900-\u097f\u0e00-\u0e7f\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uff60]"
)
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
ENOUGH = 0.8  # of a text's letters
CLEAR = 0.05  # of charset-normalizer's mess, by which the likeliest must be less messy than the next,
COHERENT = 0.3  # or of its measure of a language's letters, by which it must be ahead


def decode_text(data: bytes) -> tuple[str, bool]:
    """(text, whether it was UTF-8). Raises Unusable where the bytes are no text in any encoding that they tell."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    else:
        if "\0" not in text:
            return text, True
    for text in _candidates(data):
        if _is_text(text):
            return text, False
    what = "it has NULs" if b"\0" in data else f"it begins with {data[:12]!r}"
    raise Unusable(Cause.BAD_TEXT, f"neither UTF-8 nor clearly of another encoding: {what}")


def _is_text(text: str) -> bool:
    return all(char.isprintable() or char.isspace() for char in text)


def _candidates(data: bytes) -> list[str]:
    """The texts that it may be, the likeliest first; one, as a rule."""
    for bom, encoding in BOMS:
        if data.startswith(bom):
            return _tried(data, encoding)
    if b"\0" in data:
        texts = [text for encoding in WIDE for text in _tried(data, encoding) if _likely(text) >= ENOUGH]
        return sorted(texts, key=_likely, reverse=True)
    wide = _tried(data, "utf-16-le")
    if wide and len(CJK.findall(wide[0])) >= ENOUGH * len(wide[0]):
        return wide
    if _is_western(data) and (western := [text for text in _tried(data, "cp1252") if _is_text(text)]):
        return western
    if legacy := _legacy(data):
        return legacy
    wide = _tried(data, "utf-16-be")
    return wide if wide and len(CJK.findall(wide[0])) >= ENOUGH * len(wide[0]) else []


def _likely(text: str) -> float:
    """How much of it is of what captions are made of, 0 to 1. Letters read in the wrong order are of all scripts."""
    plain, accents, others = (len(part.findall(text)) for part in (ASCII, ACCENTS, LETTERS))
    return (plain + 0.5 * accents + 0.9 * others) / max(1, len(text))


def _tried(data: bytes, encoding: str) -> list[str]:
    try:
        return [data.decode(encoding)]
    except UnicodeDecodeError:
        return []


def _is_western(data: bytes) -> bool:
    """Whether its accents stand among Latin letters: alone, or two or three beside one, as in "süß"."""
    for run in HIGH.finditer(data):
        around = data[max(0, run.start() - 1) : run.start()] + data[run.end() : run.end() + 1]
        if len(run[0]) > 3 or (len(run[0]) > 1 and not re.search(rb"[A-Za-z]", around)):
            return False
    return True


def _legacy(data: bytes) -> list[str]:
    """What charset-normalizer finds, where one encoding is clearly the likeliest."""
    from charset_normalizer import from_bytes  # here, not on top: few captions need it

    found = [
        match
        for match in from_bytes(data, cp_isolation=LEGACY, threshold=0.3)
        if _is_text(str(match)) and len(HALF_WIDTH_KANA.findall(str(match))) <= 0.1 * len(str(match))
    ]
    if not found:
        return []
    best = max(found, key=lambda match: (match.coherence >= COHERENT, -match.chaos))
    others = [match for match in found if str(match) != str(best)]
    clear = all(
        match.chaos >= best.chaos + CLEAR or match.coherence + COHERENT <= best.coherence for match in others
    )
    return [str(best)] if clear else []
