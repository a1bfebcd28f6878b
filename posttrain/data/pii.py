"""
Personal data: mobile numbers, identity cards, bank cards, e-mail addresses, found by pattern and checksum.

What is meant is the number of one person in mainland China. Left alone on purpose: 400 and 800 service lines, short
codes (10086), fixed lines, foreign numbers, numbers inside longer runs of digits, decimals, addresses of pages, and
amounts; e-mail addresses of reserved domains (example.com, RFC 2606), which belong to nobody, and package or file
names with an @.

Nothing is found in a text that holds neither "@" nor 11 digits with at most 4 characters between them: see NEEDED.
"""

import re
from collections import Counter
from datetime import date
from typing import NamedTuple

KINDS = ("mobile", "identity_card", "bank_card", "email")
PLACEHOLDERS = {
    "mobile": ("[手机号]", "[PHONE]"),
    "identity_card": ("[身份证号]", "[ID_CARD]"),
    "bank_card": ("[银行卡号]", "[BANK_CARD]"),
    "email": ("[邮箱]", "[EMAIL]"),
}
"""Kind -> what is put in its place where Chinese stands within NEARBY characters, and elsewhere."""
NEARBY = 40


class Found(NamedTuple):
    """One piece of personal data: text[start:end]."""

    kind: str
    start: int
    end: int


# Full-width forms, odd spaces and dashes, one to one, so that offsets stay.
_NARROW = {wide: chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)} | dict.fromkeys((0x3000, 0xA0), " ")
_NARROW |= dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2212), "-")
_HAS_WIDE = re.compile("[\uff01-\uff5e\u3000\xa0\u2010-\u2014\u2212]")
# Ten gaps between eleven digits, each of at most one separator; that there are at most 4 in all is not asked here.
NEEDED = re.compile(r"@|[0-9](?:[ -]?[0-9]){10}")
"""No match in a text with its full-width characters folded: nothing is found."""

# Not the tail of a longer number or of a word, nor the head of one, nor the name of a file; a number in groups neither
# the part of a row of groups.
_FROM = r"(?<![0-9A-Za-z_.])(?<![0-9a-f]-)"
_TO = r"(?![0-9A-Za-z_]|[.][0-9]|-[0-9a-f]|\.[A-Za-z]{2,4}\b)"
_FROM_GROUPS, _TO_GROUPS = rf"{_FROM}(?<![0-9][ ,])", rf"{_TO}(?![ ,][0-9])"
_MOBILE = re.compile(
    rf"(?:{_FROM}(?<!\+)(?:(?:\+|00)?86[ -]?)?1[3-9][0-9]{{9}}{_TO}"
    rf"|{_FROM_GROUPS}(?<!\+)(?:(?:\+|00)?86[ -]?)?1[3-9][0-9]([ -])[0-9]{{4}}\1[0-9]{{4}}{_TO_GROUPS})"
    "(?! ?(?:元|美元|万|亿|人|年|个|吨|米|次|倍|%|km|kg|USD|RMB|bytes?))"
)
_SUM_BEFORE, _SUM_AFTER = re.compile(r"[0-9=)] *[-+*×÷=^] *-?\Z"), re.compile(" *[+*×÷=^]")
_IDENTITY = re.compile(
    rf"{_FROM}[1-9][0-9]{{5}}(?:19|20)[0-9]{{9}}[0-9Xx]{_TO}"
    rf"|{_FROM_GROUPS}[1-9][0-9]{{5}}([ -])(?:19|20)[0-9]{{6}}\1[0-9]{{3}}[0-9Xx]{_TO_GROUPS}"
)
_OLD_IDENTITY = re.compile(rf"{_FROM}[1-9][0-9]{{14}}{_TO}")
_IDENTITY_WORD = re.compile(r"身份证|身分证|证件号|identity card|id card|id number", re.IGNORECASE)
_BANK = re.compile(
    rf"{_FROM}[0-9]{{16,19}}{_TO}"
    rf"|{_FROM_GROUPS}[0-9]{{4}}([ -])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{4}}(?:\1[0-9]{{1,3}})?{_TO_GROUPS}"
)
# Issuer prefixes: UnionPay 62 and 81, Visa 4, Mastercard 51-55 and 2221-2720, JCB 3528-3589, Discover, old ICBC 9558.
_ISSUER = re.compile(r"62|81|4|5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|35(?:2[89]|[3-8])|6011|64[4-9]|65|9558")
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,5}"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9@-]|:[A-Za-z~/])"
)
_NOBODY = re.compile(
    r"^(?:your|example|another_example)|[@.]example\.|\.(?:example|test|invalid|localhost|local)$|"
    r"\.(?:png|jpe?g|gif|svg|webp|css|js|ts|json|html?|py|md)$",
    re.IGNORECASE,
)
_USER_OF_PAGE = re.compile(r"://[^/\s]*\Z")
_PAGE = re.compile(r"(?:https?|ftp)://[^\s<>\"'，。；）]+|www\.[^\s<>\"'，。；）]+")
_HAN_NEAR = re.compile("[\u3400-\u9fff]")
_PROVINCES = {*map(str, [*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66),
                         71, 81, 82, 83, 91])}  # fmt: skip


def find_pii(text: str) -> list[Found]:
    """Personal data in a text, in order, without overlaps. Full-width characters count as their ASCII forms.

    mobile         1[3-9] and nine digits, written together or 3-4-4 with spaces or hyphens, with or without +86, 0086
                   or 86; not before a unit (元, 人, km ...), not in the address of a page.
    identity_card  18 characters: region (GB/T 2260), a date that exists, and the check character of GB 11643-1999
                   (ISO 7064, MOD 11-2); written together or 6-8-4. The old form of 15 digits, which has none, only
                   within 20 characters after a word such as 身份证.
    bank_card      16 to 19 digits, together or in fours, with an issuer's prefix and the Luhn digit of ISO/IEC 7812-1.
    email          name@domain.tld in ASCII; not of a reserved domain, and not example@ or your...@.
    """
    if _HAS_WIDE.search(text):
        text = text.translate(_NARROW)
    if not NEEDED.search(text):
        return []
    found = [Found("identity_card", *m.span()) for m in _IDENTITY.finditer(text) if identity_ok(_digits(m[0]))]
    found += [Found("identity_card", *m.span()) for m in _OLD_IDENTITY.finditer(text) if _old_identity_ok(text, m)]
    found += [Found("bank_card", *m.span()) for m in _BANK.finditer(text) if card_ok(_digits(m[0]))]
    found += [Found("mobile", *m.span()) for m in _MOBILE.finditer(text) if not _in_a_sum(text, m)]
    if found and ("://" in text or "www." in text):
        pages = [page.span() for page in _PAGE.finditer(text)]
        found = [one for one in found if not any(start <= one.start < end for start, end in pages)]
    if "@" in text:
        found += [Found("email", *m.span()) for m in _EMAIL.finditer(text) if _is_of_a_person(text, m)]
    kept: list[Found] = []
    for one in sorted(found, key=lambda one: (one.start, -one.end)):
        if not kept or one.start >= kept[-1].end:
            kept.append(one)
    return kept


def masked(text: str) -> tuple[str, Counter]:
    """(the text with a placeholder for each piece of personal data, how many of each kind)."""
    found = find_pii(text)
    pieces, end = [], 0
    for one in found:
        chinese = _HAN_NEAR.search(text, max(0, one.start - NEARBY), one.end + NEARBY)
        pieces += [text[end : one.start], PLACEHOLDERS[one.kind][0 if chinese else 1]]
        end = one.end
    return "".join([*pieces, text[end:]]), Counter(one.kind for one in found)


def identity_ok(number: str) -> bool:
    """Whether 18 characters are an identity card's number: region, date of birth, check character.

    GB 11643-1999: the sum of the 17 digits, weighted by 2^(18 - place) mod 11, tells the 18th of "10X98765432"."""
    weighted = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    check = "10X98765432"[weighted % 11]
    return number[:2] in _PROVINCES and _is_date(number[6:14]) and check == number[17].upper()


def card_ok(number: str) -> bool:
    """Whether digits are a bank card's number: an issuer's prefix, and the check digit of ISO/IEC 7812-1 (Luhn)."""
    if not _ISSUER.match(number) or len(number) > 16 and number[0] in "2459" and number[:4] != "9558":
        return False  # Visa and Mastercard have 16 digits
    return luhn_ok(number)


def luhn_ok(number: str) -> bool:
    """ISO/IEC 7812-1, annex B: every second digit from the right doubled, the digits of all sum to a multiple of 10."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2])
    return (doubled + sum(int(digit) for digit in number[::-2])) % 10 == 0


def _old_identity_ok(text: str, match: re.Match) -> bool:
    """Whether 15 digits are an identity card's number of before 1999: region, date (19yymmdd), and a word before it."""
    near = text[max(0, match.start() - 20) : match.start()]
    return match[0][:2] in _PROVINCES and _is_date("19" + match[0][6:12]) and bool(_IDENTITY_WORD.search(near))


def _is_date(digits: str) -> bool:
    try:
        date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return False
    return True


def _digits(written: str) -> str:
    """A number without its separators."""
    return written.replace(" ", "").replace("-", "")


def _in_a_sum(text: str, match: re.Match) -> bool:
    """Whether a number is an operand or a result."""
    before = _SUM_BEFORE.search(text[max(0, match.start() - 6) : match.start()])
    return before is not None or _SUM_AFTER.match(text, match.end()) is not None


def _is_of_a_person(text: str, match: re.Match) -> bool:
    """Whether what looks like an e-mail address may be somebody's: no reserved domain, no file, no user of a page."""
    return not _NOBODY.search(match[0]) and not _USER_OF_PAGE.search(text[max(0, match.start() - 80) : match.start()])
