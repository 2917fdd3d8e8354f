"""Passwords, keys and signatures, taken out of what people and files get to read; what stands for a place without them.

A value that is only named ($SIGNATURE, ${SIGNATURE}) is no secret: it comes from the environment again at a resume.
"""

from __future__ import annotations

import re

MASK = "<masked>"

_NAME = (
    r"[\w.-]*(?:signature|secret|passw(?:or)?d|passphrase|credential|api[_-]?key|access[_-]?key(?:[_-]?id)?|"
    r"account[_-]?key|token)"
)
_SIGNATURE = rf"(?:{_NAME}|sig|sas|auth|authorization|jwt|hmac|hdnea|hdnts|policy)"
# Words elsewhere; and what a server may tell one file from another by.
_QUERY = rf"(?:{_SIGNATURE}|key|pwd|pass|code|session)"
# What is renewed together with a signature.
_RENEWED = rf"(?:{_SIGNATURE}|x-(?:amz|goog|oss|cos)-[\w-]+|expires?|key-pair-id|se|st|sp|spr|sr|sv|sk\w+)"
_VALUE = r"(?!\$\{?\w|<masked>)[^\s&\"'<>,;]+"
_RULES = (
    # user:password@host of any URL; of the web's also a token alone.
    (re.compile(r"(://[^\s/@:\"'?]*:)(?!\$\{?\w+\}?@)[^\s\"'/]*@"), rf"\1{MASK}@"),
    (re.compile(r"((?:https?|ftp|git)://)(?!\$)(?!<)[^\s/@:\"'?]+@"), rf"\1{MASK}@"),
    (re.compile(rf"([?&;]{_QUERY}=){_VALUE}", re.IGNORECASE), rf"\1{MASK}"),
    (
        re.compile(
            rf"(authorization[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|digest|token|apikey) +)?+){_VALUE}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    (re.compile(rf"\b(bearer +){_VALUE}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(rf"((?<![\w.-]){_NAME}=[\"']?){_VALUE}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(rf"(([\"']){_NAME}\2\s*:\s*([\"'])){_VALUE}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(rf"(--{_NAME}\s+[\"']?){_VALUE}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"((?:^|\s)(?:-u|--user)\s+[\"']?[^\s:\"']+:)[^\s\"']+"), rf"\1{MASK}"),
)
_USER = re.compile(r"(?<=://)[^\s/@]*@")


def masked(text: str) -> str:
    """The text with MASK in place of each secret: of URLs, headers, options of commands, keys and values."""
    if not any(mark in text for mark in "=:@") and "-" not in text and "earer" not in text:
        return text
    for pattern, mask in _RULES:
        text = pattern.sub(mask, text)
    return text


def bare(url: str) -> str:
    """What stays of an URL when its secrets, and what is renewed with them, change: the same file's, whoever asks."""
    if not any(mark in url for mark in "?@") or masked(url) == url:
        return url
    place, _, query = url.partition("?")
    place = _USER.sub("", place) if masked(place) != place else place
    kept = [part for part in query.split("&") if part and not re.match(rf"{_RENEWED}=", part, re.IGNORECASE)]
    return f"{place}?{'&'.join(kept)}" if kept else place
