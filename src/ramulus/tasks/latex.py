r"""LaTeX and Unicode as models write them, brought to one spelling before anything is compared; and text split outside its brackets.

What `one_spelling` gives has one space at most between two things, \frac in place of its relatives, `\text{...}` around words, \{ and \} around
sets, no dollars, fonts, colours, sizes, \left and \right. Every pass is linear.
"""

from __future__ import annotations

import re

from ramulus.core.text import last_box
from ramulus.tasks.signs import latex_of

LONGEST_ANSWER = 2000  # characters of an answer that are looked at; a longer one is wrong
DEEPEST = 60  # brackets in brackets

_ALIAS_TABLE = r"""
vec overrightarrow
frac dfrac tfrac cfrac nicefrac sfrac flatfrac
binom dbinom tbinom
le leq leqslant leqq
ge geq geqslant geqq
ne neq
< lt
> gt
: colon
{ lbrace
} rbrace
[ lbrack
] rbrack
( lparen
) rparen
| vert lvert rvert mid
emptyset varnothing O
phi varphi
epsilon varepsilon
theta vartheta
ldots dots cdots dotsc dotsb
circ degree degrees
setminus backslash
wedge land
vee lor
i imath
j jmath
approx thickapprox simeq doteq
langle lang
rangle rang
reals R
eur euro
gbp pounds
neg lnot
* ast star
cdot bullet
"""
_ALIASES = {alias: name for name, *aliases in map(str.split, _ALIAS_TABLE.strip().splitlines()) for alias in aliases}
_DROPPED = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|scriptscriptstyle|limits|nolimits|normalsize|small|footnotesize|tiny|large|Large|LARGE"
    r"|huge|Huge|bf|rm|it|sf|tt|bfseries|centering|hfill|hline|noindent|mathstrut|strut|allowbreak|nobreak|nonumber|quad|qquad|enspace|thinspace|space|null)(?![a-zA-Z])"
)
_FONTS = re.compile(
    r"\\(?:mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bm|pmb|mathfrak|mathcal|mathscr|underline|ensuremath|emph|uline|large|Large|huge|small)(?![a-zA-Z])\s*(?=[{A-Za-z0-9])"
)
_WORDING = re.compile(
    r"\\(?:text|textbf|textrm|textit|textsf|texttt|textnormal|textup|mathrm|mbox|hbox|operatorname\*?|bold|textsc)(?![a-zA-Z])\s*\{([^{}]*)\}"
)
_COLOUR = re.compile(
    r"\\(?:textcolor|color|colorbox|pagecolor)(?![a-zA-Z])\s*(?:\[[^\[\]]{0,20}\])?\s*\{[^{}]{0,40}\}|\\fcolorbox\{[^{}]{0,40}\}\{[^{}]{0,40}\}"
)
_GONE = re.compile(r"\\(?:tag|label|phantom|vphantom|hphantom|hspace|vspace|kern|mkern|hskip)\*?\s*\{[^{}]{0,40}\}")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_GAP = re.compile(r"(?<!\\)\\[,;:> ]|~|(?<!\\)\\$|&nbsp;")
_BIG_GAP = re.compile(r"\\q?quad(?![a-zA-Z])")
_GROUPS = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:(?:\{,\}|\\,|,[\s~]?\\![\s~]?|\\!,|,\\,|\\[;:]|\\ |~|'| )\d{3})+)(?![\d]|\s?\d|\s?/|\s?\\frac)"
)
_ROWS = re.compile(r"\\begin\{(?:[pbBvV]?matrix|smallmatrix|array|cases|aligned|align\*?)\}")
_NAMED_WORDS = """
arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc sqrt log ln exp pi infinity infty theta alpha beta lambda
"""
_NAMED = frozenset(_NAMED_WORDS.split())
_BARE_WORD = re.compile(
    r"(\\text\{[^{}]*\}|\\(?:begin|end)\{[a-zA-Z*]+\}|\\[a-zA-Z]+)|(?<![a-zA-Z\\])([a-zA-Z]{2,}(?:['-][a-zA-Z]+)*)"
)
_CHOICES = re.compile(r"\s*\(?[A-Z\d]\)?(?:\s*(?:,|and\b|or\b)\s*(?:and\b|or\b)?\s*\(?[A-Z\d]\)?)+\s*")
_WORDS = re.compile(r"\\text\{[^{}]*\}(?:\s*\\text\{[^{}]*\})*")
_SHORT_WORDS = """
no or and if is to yes odd men one two six ten man day cm mm km kg mg ml mL in ft yd mi lb oz hr min sec hrs mph Hz kW kJ kN MW GW Pa eV mol
rad deg sq cu per pct AM PM am pm USD EUR GBP ms us nm
"""
_SHORT = frozenset(_SHORT_WORDS.split())


def unwrap(text: str) -> str:
    r"""The answer inside a \boxed{...}, however often it is boxed; several boxes joined by `and` or commas are one list; or the text itself."""
    for _ in range(3):
        inner = last_box(text)
        if inner is None:
            break
        text = inner
    return text.strip()


def one_spelling(text: str) -> str:
    """The text in one spelling; raises ValueError for one that is too long or nested too deep to be an answer."""
    text = unwrap(text.replace("\0", "").replace("\1", ""))
    if len(text) > LONGEST_ANSWER or nesting(text) > DEEPEST:
        raise ValueError("too long or nested too deep to be an answer")
    text = _commands(latex_of(text))
    text = _wording(text)
    return " ".join(text.split()).strip()


def nesting(text: str) -> int:
    """How deep brackets stand in brackets; counting on where they do not match."""
    most = open_now = 0
    for letter in text:
        if letter in "([{":
            open_now += 1
            most = max(most, open_now)
        elif letter in ")]}" and open_now:
            open_now -= 1
    return most


def _commands(text: str) -> str:
    """Fonts, colours, sizes and gaps gone, aliases under one name, dollars and markdown gone, digits in groups of three joined."""
    if not _ROWS.search(text):
        text = re.sub(r"\\\\(?=\s|$)", " ", re.sub(r"\\\\(?=[a-zA-Z%$])", r"\\", text))
    text = re.sub(r"\\\$|\\(?:text|mathrm|mbox)\{\s*\\?\$\s*\}|USD\s?\$|US\s?\$", r"\\text{ USD }", text)
    if text.count("$") == 1:
        text = re.sub(
            r"^\$(?=\s?\d[\d,.]*(?:\s?(?:million|billion|thousand|dollars))?\.?$)|(?<=^\d)\$$|(?<=\d)\$$",
            r"\\text{ USD }",
            text,
        )
    text = (
        text.replace("$", "")
        .replace("**", "")
        .replace("`", "")
        .replace(r"\%", "%")
        .replace(r"\#", "#")
        .replace(r"\&", "&")
    )
    text = re.sub(r"\^?\s?\\degrees?(?![a-zA-Z])", r"^\\circ ", text)
    text = re.sub(r"\\[()\[\]](?!\s*\d*(?:pt|em|ex))", " ", text)
    text = re.sub(r"\\(left|right)\s*\.", " ", text)
    text = _GONE.sub(" ", _COLOUR.sub(" ", text))
    text = _GROUPS.sub(_joined, text)
    text = re.sub(r"(?<=[\d)}])(and|or)(?=[A-Za-z](?:_|\s?[=(<>])|-?\d|-?\\[a-z])", r" \1 ", text)  # x=1orx=2
    text = re.sub(r"(\\q?quad)(?=[a-zA-Z]_)", r"\1 ", text)  # \quadx_{2}
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text).replace("{,}", ",")  # what is left of it is a decimal comma
    text = _GAP.sub(" ", text.replace(r"\!", ""))
    text = _BIG_GAP.sub(" ", text)
    text = _FONTS.sub("", _DROPPED.sub(" ", text))
    text = _COMMAND.sub(lambda match: _alias(match[1]), text)
    text = (
        text.replace("<=", r"\le ")
        .replace(">=", r"\ge ")
        .replace("!=", r"\ne ")
        .replace(r"\not =", r"\ne ")
        .replace(r"\not=", r"\ne ")
    )
    text = text.replace("+/-", r"\pm ").replace("+-", r"\pm ").replace(":=", "=").replace("&=", "=")
    return re.sub(r"\\(?:Longr|R|r)ightarrow|\\implies", r"\\to", text)


_SEGMENT = re.compile(r"[{|]\0[}|]|^\0\s?=|\\(?:angle|triangle)\s?[A-Z]?\0")  # \frac{NO}{BO}, |OR|, NO=5: two points


def _joined(match: re.Match[str]) -> str:
    """A number written in groups of digits, such as 12\\,000, without the gaps."""
    return match[1] + re.sub(r"\D", "", match[2])


def _alias(name: str) -> str:
    name = _ALIASES.get(name, name)
    if name in ("begin", "end", "text"):
        return "\\" + name
    return name if name in "<>:[]()|*" else "\\" + name + (" " if name[0].isalpha() else "")


def _wording(text: str) -> str:
    """Wording stand in \\text{...}, letters and numbers do not; plain names of functions become commands."""
    for _ in range(3):  # fonts stand in fonts
        text, count = _WORDING.subn(_word, text)
        if not count:
            break
    text = _BARE_WORD.sub(_bare, text.replace("\0", r"\text{").replace("\1", "}"))
    text = _WORDS.sub(_phrase, text)
    return re.sub(r"\\([a-zA-Z]+) (?=[{}()\[\]^_,.=+*/<>|!-]|$)", r"\\\1", text)


def _phrase(match: re.Match[str]) -> str:
    """Neighbouring words as one text."""
    return "\\text{" + " ".join(re.sub(r"\\text\{|\}", " ", match.group()).split()) + "}"


def _word(match: re.Match[str]) -> str:
    """The inside of a font command: words stay in one, a number before them goes out, what has no words is bare."""
    inside = match[1]
    if _CHOICES.fullmatch(inside):  # A and C: two things
        return " " + re.sub(r"and\b|or\b", lambda word: f" \0{word.group()}\1 ", inside) + " "
    words = inside.strip()
    worded = re.search(r"[^\W\d_]{2}|[a-z]/[a-z]", words.replace("\0", "").replace("\1", ""))
    if not worded or "\\" in words:
        return f" {inside} " if words != "i" else " i "
    if number := re.match(r"\s*([-+]?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?)(?=[\s%A-Za-z])", inside):
        return f"{number[1]} \0{inside[number.end() :]}\1"
    return f"\0{inside}\1"


def _bare(match: re.Match[str]) -> str:
    """Wording that stand by themselves go into \\text{...}; products such as abc and xy do not."""
    if match[1]:
        return match[1]
    word = match[2]
    if word in _NAMED:
        return f"\\{word.replace('infinity', 'infty')} "
    around = match.string[max(match.start() - 12, 0) : match.start()] + "\0" + match.string[match.end() : match.end() + 2]
    if word in ("NO", "OR") and _SEGMENT.search(around):
        return word
    if word in _SHORT or word.lower() in ("and", "or", "no", "yes"):
        return rf"\text{{ {word} }}"
    product = len(word) == 3 and (not set(word.lower()) & set("aeiou") or set(word) <= set("abcdxyz"))
    if len(word) < 3 or product or (word.isupper() and len(word) <= 4):
        return word
    return rf"\text{{ {word} }}"


OPENING = {
    "(": ")",
    "[": "]",
    "{": "}",
    "\\{": "\\}",
    "\\langle": "\\rangle",
    "\\lfloor": "\\rfloor",
    "\\lceil": "\\rceil",
}
_TOKEN = re.compile(r"\\begin\{[a-zA-Z*]+\}|\\end\{[a-zA-Z*]+\}|\\text\{[^{}]*\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)


def tokens(text: str) -> list[tuple[int, str, int]]:
    """(place, token, depth of brackets around it) of a clean text; (1,2] closes like (1,2), what closes nothing is at depth 0."""
    occurrences, level = [], 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in (")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil") or token.startswith("\\end{"):
            level = max(level - 1, 0)
        occurrences.append((match.start(), token, level))
        if token in OPENING or token.startswith("\\begin{"):
            level += 1
    return occurrences


def split_outside(text: str, at: frozenset[str] | set[str]) -> tuple[list[str], list[str]]:
    """(the parts of a clean text between these tokens outside of brackets, the tokens between them), stripped."""
    parts, between, start = [], [], 0
    for place, token, level in tokens(text):
        if level == 0 and token in at:
            parts.append(text[start:place].strip())
            between.append(token)
            start = place + len(token)
    return [*parts, text[start:].strip()], between
