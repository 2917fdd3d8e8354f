"""A caption is read in the encoding that it is in, or refused: never as letters that nobody wrote."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from data_kit import json_bytes, sample, source, take, write_tar

from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.texts.captions import read_caption
from glide_ds.data.texts.encodings import decode_text

TEXTS = {
    "English": "a dog runs along the beach",
    "German": "Ein süßer Hund läuft über die Wiese",
    "French": "un café crème à la terrasse, déjà vu",
    "quotes": "a dog \u2013 the \u201cbest\u201d one\u2026",
    "Chinese": "一只可爱的小狗在公园里奔跑，天空中有白云，草地上开满了黄色的花",
    "Taiwanese": "一隻可愛的小狗在公園裡奔跑，天空中有白雲，草地上開滿了黃色的花朵",
    "Japanese": "公園を走るかわいい犬。空には白い雲が浮かび、草原には黄色い花がたくさん咲いています。",
    "Korean": "공원을 달리는 귀여운 강아지, 하늘에는 흰 구름이 떠 있고 풀밭에는 노란 꽃이 피어 있다",
    "Russian": "Милая собака бежит по зелёному парку в солнечный день",
    "Greek": "Ένας σκύλος τρέχει στο πάρκο κάτω από τον ήλιο",
    "Arabic": "كلب لطيف يركض في الحديقة تحت الشمس",
}
WIDE = ("utf-16-le", "utf-16-be", "utf-16", "utf-32", "utf-32-le", "utf-32-be", "utf-8", "utf-8-sig")
LEGACY = {
    "German": ("latin-1", "cp1252"),
    "French": ("latin-1", "cp1252"),
    "quotes": ("cp1252",),
    "Chinese": ("gbk", "gb18030"),
    "Taiwanese": ("big5",),
    "Japanese": ("shift_jis", "cp932", "euc_jp"),
    "Korean": ("euc_kr", "cp949"),
    "Russian": ("cp1251", "koi8_r"),
    "Greek": ("cp1253",),
    "Arabic": ("cp1256",),
}


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("language", TEXTS)
def test_unicode_with_and_without_its_mark(language: str, encoding: str) -> None:
    for text in (TEXTS[language], TEXTS[language][:9], f"{TEXTS[language]}\r\n"):
        assert decode_text(text.encode(encoding))[0] == text


@pytest.mark.parametrize(("language", "encoding"), [(la, e) for la, names in LEGACY.items() for e in names])
def test_encodings_of_before(language: str, encoding: str) -> None:
    text = TEXTS[language]
    assert decode_text(text.encode(encoding)) == (text, False)
    assert read_caption({"txt": text.encode(encoding)}, 0.0) == (text, ("caption not UTF-8",))
    for size in range(1, len(text)):  # however short, it is read or refused
        with suppress(Unusable):
            assert "\0" not in decode_text(text[:size].encode(encoding))[0]


@pytest.mark.parametrize(
    "data",
    [
        b"a\0b",
        b"a dog\0\0\0",
        bytes(40),
        b"\0",
        b"a\0\0\0b",
        b"\xff\xfea",
        b"\xff\x00\x01\x9d",
        b"\x00\xd8" * 3,
    ],
)
def test_no_text_has_nuls(data: bytes) -> None:
    with pytest.raises(Unusable, match=Cause.BAD_TEXT):
        decode_text(data)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("crème brûlée, café".encode()[:-1], "crème brûlée, caf"),  # cut within its last letter
        ("日本語の写真、赤い犬".encode()[:-2], "日本語の写真、赤い"),
        ("crème".encode() + b"\xff" + "brûlée, été".encode(), "crèmebrûlée, été"),
        ("a dog \ud83d\udc36".encode("utf-8", "surrogatepass"), "a dog 🐶"),  # as Java and MySQL write it
        ("a dog \ud83d, red".encode("utf-8", "surrogatepass"), "a dog , red"),
        ("\ufeff\ufeffa dog".encode(), "a dog"),
        ("赤い犬が走る".encode("iso2022_jp"), "赤い犬が走る"),
        ("빨간 개".encode("iso2022_kr"), "빨간 개"),
        ("赤い犬が芝生の上に座っている".encode("shift_jis"), "赤い犬が芝生の上に座っている"),
        ("crème brûlée, café".encode("mac_roman"), None),
        ("crème brûlée, café".encode("cp850"), None),
        ("příliš žluťoučký kůň".encode("iso8859-2"), None),
        ("красная собака сидит".encode("iso8859-5"), None),
        ("빨간 개가 잔디 위에 앉아 있다".encode("johab"), None),
        ("สุนัขสีแดงนั่งบนหญ้า".encode("cp874"), None),
        (b"a red\xc0\x80dog", None),
    ],
)
def test_other_letters_are_never_taken_for_those_that_were_written(data: bytes, text: str | None) -> None:
    if text is not None:
        assert decode_text(data)[0] == text
        return
    with pytest.raises(Unusable, match=Cause.BAD_TEXT):
        decode_text(data)


def test_a_bad_text_does_not_spoil_a_good_record(tmp_path: Path) -> None:
    good = json_bytes(caption="of the record")
    notes = ("text not readable, the record's caption taken",)
    assert read_caption({"txt": b"a\0b", "json": good}, 0.0) == ("of the record", notes)
    assert read_caption({"txt": b"a\0b", "caption": b"of the other"}, 0.0) == ("of the other", ())
    for record in (b"{", json_bytes(url="u"), json_bytes(caption="")):
        with pytest.raises(Unusable, match=Cause.BAD_TEXT):
            read_caption({"txt": b"a\0b", "json": record}, 0.0)
    write_tar(tmp_path / "x.tar", [(f"{n}", sample(n, txt=b"a\0b", json=good)) for n in range(8)])
    made = source(str(tmp_path / "x.tar"))
    assert set(take(made, 1)[0].captions) == {"of the record"}
    assert made.report()["tolerated"] == {notes[0]: 8}
