"""Bytes to text in the encoding that they are in, or not at all: a caption of wrong letters is worse than none."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress

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
ESCAPED = ("iso2022_jp_2", "iso2022_kr")  # seven bits, which UTF-8 reads as other letters
# What nobody writes, and what other encodings look like: a capital in a word's midst, a sign between two letters.
WRONG = re.compile(
    r"[a-zß-öø-ÿ][À-ÖØ-ÞŠŽŸŒ]|[^\W\d_][‚„†‡ˆ‰‹›ƒ•˜]|[^\W\d_][¡-§©-¬®-±¶¸-¿][^\W\d_]|[а-я][А-Я]|[α-ω][Α-Ω]"
)
IDEOGRAPHS = re.compile(r"[\u3400-\u9fff\uac00-\ud7a3]")
# By language, the codec and the lead bytes of the letters that its texts are made of.
COMMON = {
    "gb2312": range(0xB0, 0xD8),
    "big5": range(0xA4, 0xC7),
    "shift_jis": range(0x88, 0x98),
    "euc_kr": range(0xB0, 0xC9),
}
ENOUGH = 0.8  # of a text's letters
CLEAR = 0.05  # of charset-normalizer's mess, by which the likeliest must be less messy than the next,
COHERENT = 0.3  # or of its measure of a language's letters, by which it must be ahead


def decode_text(data: bytes) -> tuple[str, bool]:
    """(text, whether it was UTF-8). Raises Unusable where the bytes are no text in any encoding that they tell."""
    if b"\x1b" in data:
        for text in (text for encoding in ESCAPED for text in _tried(data, encoding)):
            if _is_text(text) and not text.isascii():
                return text, False
    try:
        text = data.decode("utf-8-sig").lstrip("\ufeff")
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
    if text := _nearly_utf8(data):
        return [text]
    if b"\0" in data:
        texts = [text for encoding in WIDE for text in _tried(data, encoding) if _likely(text) >= ENOUGH]
        return sorted(texts, key=_likely, reverse=True)
    if wide := _wide(data, "utf-16-le"):
        return wide
    if _is_western(data) and (
        western := [text for text in _tried(data, "cp1252") if _is_text(text) and _plausible(text)]
    ):
        return western
    if legacy := _legacy(data):
        return legacy
    return _wide(data, "utf-16-be")


def _nearly_utf8(data: bytes) -> str:
    """UTF-8 that was cut within a letter, or has halves of letters as Java writes them; "" where it is not that."""
    with suppress(UnicodeError):
        halves = data.decode("utf-8-sig", "surrogatepass")
        return "" if "\0" in halves else halves.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    text = data.decode("utf-8-sig", "replace")
    lost = text.count("\ufffd")
    whole = sum(not char.isascii() for char in text) - lost
    return text.replace("\ufffd", "") if whole > lost and "\0" not in text else ""


def _wide(data: bytes, encoding: str) -> list[str]:
    """Chinese or Japanese in UTF-16 without a NUL to tell it by."""
    wide = _tried(data, encoding)
    return [text for text in wide if len(CJK.findall(text)) >= ENOUGH * len(text) and _plausible(text)]


def _plausible(text: str) -> bool:
    """Whether its letters are those that some language writes, in the places where it does."""
    letters = IDEOGRAPHS.findall(text)
    common = max(sum(_lead(letter, codec) in leads for letter in letters) for codec, leads in COMMON.items())
    return common >= ENOUGH * len(letters) and not WRONG.search(text)


def _lead(letter: str, codec: str) -> int:
    try:
        return letter.encode(codec)[0]
    except UnicodeEncodeError:
        return 0


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
        if _is_text(str(match))
        and _plausible(str(match))
        and len(HALF_WIDTH_KANA.findall(str(match))) <= 0.1 * len(str(match))
    ]
    if not found:
        return []
    best = max(found, key=lambda match: (match.coherence >= COHERENT, -match.chaos))
    others = [match for match in found if str(match) != str(best)]
    clear = all(
        match.chaos >= best.chaos + CLEAR or match.coherence + COHERENT <= best.coherence for match in others
    )
    return [str(best)] if clear else []
