"""
The forms a text may be trained in (`text_form`), and taking a web page's tags out of it (`strip_html`).

zh_safe   text.training_text.
nfkc      NFKC of the whole text, code blocks included, then training_text: "，" becomes ",", "x²" becomes "x2".
zh_punct  training_text, then one punctuation style in the Chinese lines (see `chinese_punctuation`).
raw       as published, tags included; only lone surrogates, which cannot be encoded, are dropped.

Every form is stable: written(written(text)) == written(text). Steps that can make work for each other (a tag is taken
out, two spaces meet) are repeated until nothing changes; each shortens the text or leaves less ASCII punctuation.
"""

import html
import re
import unicodedata

from posttrain import text as texts
from posttrain.text import HAN, fenced, has_lone_surrogate, training_text

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


def written(text: str, form: str = "zh_safe", strip_html: bool = True) -> str:
    """The text in a form (zh_safe, nfkc, zh_punct, raw), its tags taken out where `without_html` says so."""
    if form == "raw":
        return _LONE_SURROGATES.sub("", text) if has_lone_surrogate(text) else text
    while True:
        if form == "nfkc":
            text = unicodedata.normalize("NFKC", text)
        plain = training_text(text)
        new = without_html(plain) if strip_html and ("<" in plain or "&" in plain) else plain
        if form == "zh_safe" and new == plain:
            return plain  # the training text of a training text is itself
        new = chinese_punctuation(new) if form == "zh_punct" else new
        if new == text:
            return text
        text = new


# ------------------------------------------------------------------ HTML

# Tags that only lay a text out. The names of all others (table, img, form, script, sub ...) carry meaning, or are
# somebody's placeholder or type parameter.
_BLOCKS = ("p", "div", "center", "section", "article")
_INLINE = ("span", "font", "b", "strong", "i", "em", "big", "small", "nobr")
_LAYOUT = "|".join(("br", "hr", *_BLOCKS, *_INLINE))
_ATTRIBUTE = r"""\s+[\w:-]+\s*=\s*(?:"[^"<>\n]*"|'[^'<>\n]*'|[^\s"'<>]+)"""
_TAG = re.compile(rf"(?i:<(/?)({_LAYOUT})(?:{_ATTRIBUTE})*\s*/?>)")
_ANY_TAG = re.compile(r"<(?=[A-Za-z!/?|])[^<>\n]*>")
_NAMES = ("nbsp ensp emsp thinsp quot apos amp ndash mdash hellip middot bull lsquo rsquo ldquo rdquo laquo raquo copy "
          "reg trade deg plusmn times divide frac12 frac14 frac34 cent pound yen euro sect").split()  # fmt: skip
_ENTITY = re.compile(rf"&(?:{'|'.join(_NAMES)}|#\d{{2,6}}|#[xX][0-9a-fA-F]{{2,5}});")
_REST_OF_REFERENCE = re.compile(r"#?\w+;")
_ABOUT_MARKUP = re.compile(
    r"html|xml|\bcss|jsx|javascript|\bjs\b|php|\bvue\b|(?-i:\bReact\b)|svg|markdown|latex|markup|\btags?\b|"
    r"\bweb ?(?:page|site)|browser|\bcod(?:e|ing)\b|snippet|regex|\bentit(?:y|ies)\b|\bbold\b|italic|underline|"
    r"line breaks?|```|~~~|`[^`\n]*[<&]|"
    "标签|标记|网页|网站|代码|源码|前端|浏览器|脚本|编程|正则|转义|实体|加粗|粗体|斜体|下划线|换行",
    re.IGNORECASE,
)
_CODE_LINE = re.compile(r"[;{}]\s*$|^[ \t]*(?:#include|import |from \w+ import|def |class |function |echo |print)",
                        re.MULTILINE)  # fmt: skip
_TABLE_BREAK = re.compile(r"^[ \t]*\|.*<(?i:br)\b", re.MULTILINE)
_MENTIONED = re.compile(rf"[\"'“”‘’「」《》(（]\s*(?i:</?(?:{_LAYOUT})\b[^<>]*>)\s*[\"'“”‘’「」《》)）]")
_MARKUP = rf"{_TAG.pattern}|{_ENTITY.pattern}"
MARKUP = re.compile(_MARKUP)
"""No match: without_html(text) == text."""
TOUCHED = re.compile(f"{texts.TOUCHED.pattern}|{_MARKUP}")
"""No match: written(text, "zh_safe", True) == text. The classes of characters and runs of spaces: text.CHANGED,
text.CHANGED_SPACES."""


def touched(text: str, strip_html: bool = True) -> bool:
    """Whether written(text, "zh_safe", strip_html) may differ from the text."""
    return texts.touched(text) or strip_html and ("<" in text or "&" in text) and MARKUP.search(text) is not None


def without_html(text: str) -> str:
    """The text without the tags that only lay it out (br, hr, p, div, center, section, article, span, font, b, strong,
    i, em, big, small, nobr) and with its character references (&nbsp; &quot; &#8226; ...) spelled out.

    A text is left whole, because its tags may be what it is about, or no tags at all, if
    - it speaks of markup or code (about_markup), or holds a line of code;
    - it holds any other tag (<table>, <img>, <think>, <name>, List<String>, a <b and c> d);
    - an inline tag has no partner, a tag stands in quotes or brackets, or a break in a Markdown table;
    - it is one element of less than 200 characters, or two thirds of it are tags: the answer may be that markup.
    A break becomes a line end, the end of a block two, an inline tag nothing. &lt; and &gt; are never spelled out.
    """
    if not MARKUP.search(text) or about_markup(text) or not _laid_out(text):
        return text
    return _ENTITY.sub(_character, _TAG.sub(_in_place_of, text))


def about_markup(text: str) -> bool:
    """Whether a text speaks of markup or code. Where one turn of a conversation does, keep the tags of all."""
    return _ABOUT_MARKUP.search(text) is not None


def _laid_out(text: str) -> bool:
    """Whether all tags of a text only lay it out."""
    tags = list(_TAG.finditer(text))
    inline = [tag for tag in tags if tag[2].lower() in _INLINE]
    opened = sorted(tag[2].lower() for tag in inline if not tag[1])
    closed = sorted(tag[2].lower() for tag in inline if tag[1])
    reading = _TAG.sub("", text)
    is_element = bool(tags) and text.startswith("<") and text.endswith(">") and len(reading) < 200
    return (
        opened == closed
        and not is_element
        and 3 * len(reading.strip()) >= len(text)
        and len(_ANY_TAG.findall(text)) == len(tags)
        and not _MENTIONED.search(text)
        and not _TABLE_BREAK.search(text)
        and not _CODE_LINE.search(_ENTITY.sub("", text))
    )


def _in_place_of(tag: re.Match) -> str:
    """What a reader sees of a tag."""
    name = tag[2].lower()
    return "" if name in _INLINE else "\n\n" if name in _BLOCKS else "\n"


def _character(entity: re.Match) -> str:
    """The character of a reference; the reference itself if that would make markup of text."""
    found = html.unescape(entity[0])
    makes_reference = found == "&" and _REST_OF_REFERENCE.match(entity.string, entity.end())
    return entity[0] if found in ("<", ">", "`", "~", "", "\ufffd") or makes_reference else found


# ------------------------------------------------------------------ Chinese punctuation

# Left as it is: inline code, formulas, addresses of pages and mail, tags, Markdown links' targets.
_LEFT = re.compile(
    r"`[^`\n]+`|\$\$.{1,2000}?\$\$|\$[^$\n]+\$|\\[(\[](?:[^\\]|\\[^()\[\]])+\\[)\]]|(?:https?|ftp)://[^\s\"'<>，。；！？、）》”’]+|"
    r"(?:www\.|(?<![\w.+-])[\w.+-]+@)[A-Za-z0-9][\w.-]*[\w/?=&%#-]|<[A-Za-z/!][^<>\n]*>|(?<=\])\([^()\s]*\)",
    re.DOTALL | re.ASCII,
)
_OPEN, _CLOSE = "“‘（《「『【", "”’）》」』】"
_FULL = str.maketrans(",;:!?", "，；：！？")
_CODE_LIKE = re.compile(r"[{}\\=<>_|]|\w\([\"']|\[\s*[\"']|[\"']\s*:\s*[\"'\[\d]|^(?: {4}|\t)|;$")
_AFTER_HAN = re.compile(rf"(?<=[{HAN}{_CLOSE}\x00])(?!::|[:;!]+[-=()\\/*])([,;:!?]+) *")
_BEFORE_HAN = re.compile(rf"(?<=[A-Za-z0-9%*\])])([,;!?]|(?<=\*):) *(?=[{HAN}{_OPEN}])")
_WORD_BEFORE = re.compile(rf"[{HAN}].*(?:[A-Za-z%*\])]|[{HAN}]\d[\d.,:%]*)\Z|\*\Z")
_DOTS = re.compile(rf"(?<=[{HAN}])\.{{3,}}")
_STOP = re.compile(rf"(?<=[{HAN}{_CLOSE}])\.(?: +(?=[{HAN}{_OPEN}])|(?=$|[{_CLOSE}\"]))")
_NUMERAL = re.compile(r"^[\s#*>-]*[（(]?第?[一二三四五六七八九十百]+[章节条]?\Z")
_BRACKETS = re.compile(r"(.?)(?:\(((?:[^()（）]|（[^()（）]*）)*)[)）]|（([^()（）]*)\))")
_PLAIN = re.compile(rf"[{HAN}A-Za-z0-9 、，。：；？！（）·\-]*\Z")
_NAME = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z0-9 .&'’/\-]+\Z")
_QUOTED = re.compile(r'"([^"]*)"')


def chinese_punctuation(text: str) -> str:
    """One style in the Chinese lines of a training text: , ; : ! ? . ... ( ) and straight double quotes become
    ，；：！？。……（）“” where they stand after a Chinese character, a closing mark or inline code, or between a Latin
    word and a Chinese character; a space behind them goes. Brackets change in pairs, if they hold a Chinese character
    or, after one, a Latin name; quotes if all of a line pair off and hold Chinese.

    Not in code blocks, inline code, formulas, addresses, tags; not in lines that are not Chinese (text.language), that
    are indented by four, or look like code or a formula ({ } = < > _ |); not in numbers (3.14, 1,000, 12:30), numbered
    headings (一. ...), names (a stop between two Chinese characters), f(x), (1), emoticons.
    """
    return "".join(piece if is_code else _chinese_prose(piece) for is_code, piece in fenced(text))


def _chinese_prose(text: str) -> str:
    """chinese_punctuation of text without code blocks."""
    left = _LEFT.findall(text)
    lines = [_chinese_line(line) for line in _LEFT.sub("\x00", text).split("\n")]
    first, *rest = "\n".join(lines).split("\x00")
    return first + "".join(span + piece for span, piece in zip(left, rest, strict=True))


def _chinese_line(line: str) -> str:
    """chinese_punctuation of a line, in which \\0 stands for what is left as it is."""
    if line.isascii() or texts.language(line) != "zh" or _CODE_LIKE.search(line):
        return line
    line = _DOTS.sub("……", line)
    line = _AFTER_HAN.sub(lambda mark: mark[1].translate(_FULL), line)
    line = _BEFORE_HAN.sub(_between_word_and_han, line)
    line = _STOP.sub(lambda stop: stop[0] if _NUMERAL.match(stop.string[: min(stop.start(), 40)]) else "。", line)
    line = _BRACKETS.sub(_bracketed, line)
    if line.count('"') % 2 == 0 and all(texts.han_count(quoted) for quoted in _QUOTED.findall(line)):
        line = _QUOTED.sub(r"“\1”", line)
    return line


def _between_word_and_han(mark: re.Match) -> str:
    """A mark between a Latin word and a Chinese character, in full width if Chinese stands before the word too."""
    before = mark.string[max(0, mark.start() - 200) : mark.start()]
    return mark[1].translate(_FULL) if _WORD_BEFORE.search(before) else mark[0]


def _bracketed(found: re.Match) -> str:
    """Brackets and the character before them, in full width where they belong to Chinese."""
    before, inside = found[1], found[2] if found[2] is not None else found[3]
    if re.match(r"[\w\]]", before, re.ASCII):
        chinese = before != "]" and texts.han_count(inside) > 0 and _PLAIN.match(inside)
    else:
        chinese = texts.han_count(inside) > 0 or before and texts.han_count(before) and _NAME.match(inside)
    return f"{before}（{inside}）" if chinese else found[0]
