"""Text as words and scripts: what comparisons of texts and the language statistics rest on."""

import re
from collections import Counter

# Scripts that are written without spaces: every character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
    "Kana": "\u3040-\u30ff",
    "Hangul": "\uac00-\ud7af\u1100-\u11ff\u3130-\u318f",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
_PATTERNS = {name: re.compile(f"[{block}]") for name, block in _SCRIPTS.items()}
_SEEN = 2000  # characters of a text that decide its script


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; each character of an unspaced script is one."""
    return _WORD.findall(text.casefold())


def script(text: str) -> str:
    """The script that most of a text is in, by Unicode block: a plain guess at its language.

    `Japanese` is Han with at least a tenth of Kana; `none` has no letters of a known script.
    """
    begin = text[:_SEEN]
    if begin.isascii():
        return "Latin" if any(map(str.isalpha, begin)) else "none"
    counts = Counter({name: len(each.findall(begin)) for name, each in _PATTERNS.items()})
    if counts["Kana"] and counts["Kana"] >= 0.1 * (counts["Han"] + counts["Kana"]):
        counts["Japanese"] = counts.pop("Kana") + counts.pop("Han")
    name, count = counts.most_common(1)[0]
    return name if count else "none"
