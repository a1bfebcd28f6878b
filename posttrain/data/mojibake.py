"""
Mojibake: what text looks like that was decoded with the wrong encoding, as phrases to be looked for.

The phrases are made, not collected: the commonest characters are written in one encoding and read in another, and the
outcome is folded and lower-cased as the text is that they are looked for in. Phrases that may stand in whole text
(a French é before a quotation mark, a carpenter's 锛) are left out.
"""

import re

from posttrain.text import folded_text

COMMON_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去"
    "法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日者意无力它与长把机十民第公此已工使情明性知全三又关点"
    "正业外将两高间由问很最重并物手应向头文体政美相见被利什二等产或新己制身果加西月话合回特代内信表化老给世位次度门任常先海通教"
)
PUNCTUATION = "，。、：；？！“”（）《》"
LATIN = "éèêëàáâäåíïîóòôöøúùûüñçßÉÈÀÁÄÅÓÖØÚÜÑÇ°£©®±½"  # what Western texts hold beside ASCII
BY_NAME = (
    "\ufffd",  # put there by a decoder that met bytes it could not read
    "锟斤拷", "烫烫烫烫", "屯屯屯",  # U+FFFD read as GBK; memory that was never written, read as GBK
    "ï»¿", "ï¿1⁄2",  # the byte order mark and U+FFFD itself, read as Latin-1
    "â€", "â‚¬", "â„¢", "ã€",  # quotation marks and dashes, euro, trade mark, Chinese full stops, read as Windows-1252
    "μä", "£¬", "¡£",  # 的，。 in GBK, read as Latin-1
    "donât", "doesnât", "didnât", "canât", "wonât", "isnât", "itâs", "iâm", "iâve", "thatâs", "youâre", "weâre",
)  # fmt: skip
EVERYDAY = set(".\"'«»‘’“”–—·®™ \n\u0301")  # may follow an accented letter in whole text


def _read_wrongly(written: bytes, read: str) -> str:
    """Bytes as an encoding reads them that they are not in, folded as rules read it; "" where it cannot read them."""
    try:
        return folded_text(written.decode(read)).lower()
    except UnicodeDecodeError:
        return ""


def _is_unmistakable(phrase: str, length: int) -> bool:
    """Whether an accented letter and what follows it stand in no whole text: something strange, nothing everyday."""
    after = phrase[1:]
    return len(phrase) >= length and not EVERYDAY & set(after.lstrip(" ")) and not after.replace(" ", "").isalnum()


def _phrases() -> tuple[str, ...]:
    """In sorted order, without those that begin with another one of them."""
    codes = ("latin-1", "cp1252")
    found = {p for c in COMMON_HAN + PUNCTUATION for code in codes
             if _is_unmistakable(p := _read_wrongly(c.encode(), code), length=3)}  # fmt: skip
    found |= {p for c in LATIN for code in codes if _is_unmistakable(p := _read_wrongly(c.encode(), code), length=2)}
    # UTF-8 read as GBK: a frequent mark and the first byte of the Chinese character after it make two characters.
    found |= {_read_wrongly(c.encode() + bytes([first]), "gbk") for c in "，。、：；的" for first in range(0xE4, 0xEA)}
    found |= {_read_wrongly("’".encode() + letter, "gbk") for letter in (b"s", b"t", b"re", b"ve", b"ll")}
    found = sorted((found | set(BY_NAME)) - {""})
    return tuple(p for p in found if not any(p != other and p.startswith(other) for other in found))


PHRASES = _phrases()
_ANY = re.compile("|".join(map(re.escape, PHRASES)))


def mojibake(text: str) -> str | None:
    """The first phrase of wrongly decoded text in `text` (folded and lower-cased), or None."""
    found = _ANY.search(text)
    return found[0] if found else None
