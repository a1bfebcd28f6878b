"""
Text: the form that is trained on, the two forms that texts are compared by, and which script a text is written in.

The *training text* (`zh_safe`) keeps what NFKC would destroy: the punctuation of Chinese and x² (NFKC makes them ASCII
commas and x2 in 68 % of real Chinese answers). The *key* is NFKC, lower case, without white space: rough on purpose, it
puts the spellings of one question on one side of the split. The *exact text* finds duplicates: x² is not x2
there, and code indented otherwise is other code.
"""

import re
import unicodedata

# Han characters, by block: URO and extension A, the ideographic zero, compatibility, extensions B to J and supplement.
HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f\U00030000-\U0003347f"
_NOT_HAN = re.compile(f"[^{HAN}]+")
_NOT_LETTER = re.compile(r"[\W\d_]+")
_NOT_ASCII_LETTER = re.compile("[^A-Za-z]+")

# Invisible or forbidden characters: C0 and C1 controls (tab and line feed excepted), soft hyphen, zero-width and
# direction marks, byte order mark, lone surrogates, non-characters. A zero-width joiner inside an emoji is kept.
_DROPPED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ud800-\udfff\ufffe\uffff]|(?<![\U0001f000-\U0001faff\u2600-\u27bf\ufe0f])\u200d"
)
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_WIDE = {0x3000: " "} | {wide: chr(wide - 0xFEE0) for first, last in (("０", "９"), ("Ａ", "Ｚ"), ("ａ", "ｚ"))
                         for wide in range(ord(first), ord(last) + 1)}  # fmt: skip
_HAS_WIDE = re.compile("[\u3000０-９Ａ-Ｚａ-ｚ]")
_SPACES = re.compile("[ \t\xa0\u2000-\u200a\u202f\u205f\u3000]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_INNER_BLANKS = re.compile(r"(?<=\S)[ \t]+")
_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def key_text(text: str) -> str:
    """NFKC, lower case, no white space, no invisible characters. Texts with one key may still differ: in exponents,
    case, indentation."""
    return "".join(_DROPPED.sub("", unicodedata.normalize("NFKC", text)).lower().split())


def exact_text(text: str) -> str:
    """NFC, each run of spaces and tabs inside a line one space; case, line ends and indentation stay."""
    return _INNER_BLANKS.sub(" ", unicodedata.normalize("NFC", text))


def han_count(text: str) -> int:
    """Number of Han characters, extensions included."""
    return len(_NOT_HAN.sub("", text))


def chinese_ratio(text: str) -> float:
    """Share of Han characters among letters of any script; digits, punctuation and spaces do not count.

    0.0 where there is no letter at all.
    """
    letters = len(_NOT_LETTER.sub("", text))
    return han_count(text) / letters if letters else 0.0


def language(text: str, min_cn_ratio: float = 0.3) -> str:
    """zh, en, other, or none (no letters).

    zh: at least `min_cn_ratio` of the letters are Han. en: at least 0.7 of them are A to Z; this cannot tell English
    from other languages written in plain Latin letters. Han characters in a Japanese text count as Han.
    """
    letters = len(_NOT_LETTER.sub("", text))
    if not letters:
        return "none"
    if han_count(text) >= min_cn_ratio * letters:
        return "zh"
    return "en" if len(_NOT_ASCII_LETTER.sub("", text)) >= 0.7 * letters else "other"


def has_lone_surrogate(text: str) -> bool:
    """Whether half of a surrogate pair stands alone: such text cannot be encoded, hence not be tokenised."""
    return _LONE_SURROGATE.search(text) is not None


def training_text(text: str) -> str:
    """The form that is trained on (`zh_safe`).

    NFC; full-width letters and digits and U+3000 become ASCII, full-width punctuation stays; invisible and control
    characters and lone surrogates are dropped; all line ends become \\n. Outside fenced code blocks runs of spaces
    inside a line become one, trailing spaces go, and three or more line ends become two. The indentation of a line is
    kept (Markdown lists, quoted code), and a line indented by four or more keeps its inner spaces too.
    """
    text = _DROPPED.sub("", _LINE_END.sub("\n", unicodedata.normalize("NFC", text)))
    pieces, in_code, start = [], False, 0
    for fence in _FENCE.finditer(text):
        piece = text[start : fence.start()]
        pieces.append(piece if in_code else _folded_prose(piece))
        in_code, start = not in_code, fence.start()
    pieces.append(text[start:] if in_code else _folded_prose(text[start:]))
    whole = "".join(pieces).strip("\n")
    return (whole if whole.startswith(("    ", "\t")) else whole.lstrip()).rstrip()


def _folded_prose(text: str) -> str:
    """Fold the spaces, blank lines and full-width letters of text outside code blocks."""
    if _HAS_WIDE.search(text):
        text = text.translate(_WIDE)
    lines = [_folded_line(line) for line in text.split("\n")] if _SPACES.search(text) else [text]
    return _BLANK_LINES.sub("\n\n", "\n".join(lines))


def _folded_line(line: str) -> str:
    """One line: indentation kept, inner runs of spaces folded, trailing spaces dropped."""
    body = line.lstrip(" \t\xa0")
    indent = line[: len(line) - len(body)].replace("\xa0", " ")
    if len(indent) >= 4 or "\t" in indent:
        return indent + body.rstrip() if body.strip() else ""
    body = _SPACES.sub(" ", body).rstrip()
    return indent + body if body else ""
