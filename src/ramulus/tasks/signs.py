"""Unicode as LaTeX: fractions, powers, roots, signs and Greek as models write them; full-width letters are letters."""

from __future__ import annotations

import re
import unicodedata

_UP = {**dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")), "⁺": "+", "⁻": "-", "ⁿ": "n", "ˣ": "x"}
_DOWN = {**dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789")), "₊": "+", "₋": "-", "ₙ": "n", "ₖ": "k", "ᵢ": "i"}
_RAISED = re.compile(f"[{''.join(_UP)}]+")
_LOWERED = re.compile(f"[{''.join(_DOWN)}]+")
_TABLE = r"""
−–—‐‑ -
×✕ \times
·⋅∙ \cdot
÷ \div
∕⁄ /
√ \sqrt
∛ \sqrt[3]
∜ \sqrt[4]
∞ \infty
°º ^\circ
≤⩽ \le
≥⩾ \ge
≠ \ne
≈ \approx
± \pm
∓ \mp
∈ \in
∅ \emptyset
∪ \cup
∩ \cap
∖ \setminus
ℝ \mathbb{R}
ℤ \mathbb{Z}
ℕ \mathbb{N}
ℚ \mathbb{Q}
ℂ \mathbb{C}
⟨〈 \langle
⟩〉 \rangle
…⋯ \ldots
∠ \angle
△ \triangle
′’‘ '
∶ :
⌊ \lfloor
⌋ \rfloor
⌈ \lceil
⌉ \rceil
∗ *
⇒→ \to
"""
_CURRENCIES = {"€": "EUR", "£": "GBP", "¥": "JPY", "₹": "INR", "₩": "KRW", "₽": "RUB", "¢": "cents"}


def _signs() -> dict[str, str]:
    """Each sign with its LaTeX; commands end in a space."""
    spellings: dict[str, str] = {}
    for line in _TABLE.strip().splitlines():
        letters, latex = line.split()
        spellings |= {
            letter: latex + " " if latex.startswith(("\\", "^")) and latex[-1].isalpha() else latex
            for letter in letters
        }
    for code in (*range(0x3B1, 0x3C2), *range(0x3C3, 0x3CA), *map(ord, "ΓΔΘΛΠΣΦΨΩ")):
        name = unicodedata.name(chr(code)).split()[-1].lower().replace("lamda", "lambda")
        spellings[chr(code)] = f"\\{name if chr(code).islower() else name.capitalize()} "
    return spellings | {sign: rf"\text{{ {name} }}" for sign, name in _CURRENCIES.items()}


_SIGNS = _signs()
_SIGN = re.compile("[" + re.escape("".join(_SIGNS)) + "]")


def latex_of(text: str) -> str:
    """The text without letters that LaTeX has a command for, compatibility letters and invisible ones."""
    if text.isascii():
        return text
    text = _RAISED.sub(lambda match: "^{" + "".join(_UP[c] for c in match.group()) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + "".join(_DOWN[c] for c in match.group()) + "}", text)
    text = "".join(_vulgar(letter) for letter in text)
    text = unicodedata.normalize("NFKC", _SIGN.sub(lambda match: _SIGNS[match.group()], text))
    return "".join(letter for letter in text if unicodedata.category(letter) != "Cf")


def _vulgar(letter: str) -> str:
    """\u00bd as \\frac{1}{2}, other letters as they are."""
    if not ("¼" <= letter <= "¾" or "⅐" <= letter <= "⅞"):
        return letter
    top, _, bottom = unicodedata.normalize("NFKC", letter).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"
