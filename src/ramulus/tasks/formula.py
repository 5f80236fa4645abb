r"""Formulas of a clean answer: read by a parser of our own that refuses what it does not know, and compared by their values.

Two formulas are equal if their values are: exactly where they are rational, to 35 digits where not, and at several points where they have
letters. A decimal fraction in one of them makes six digits enough. No text is ever run, and the size of every number is limited.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Formula = tuple[Any, ...]
"""("number", Fraction, whether it is a decimal), ("letter", name), ("constant", name), ("call", name, arguments...), or "+", "*", "/", "^"."""

_FUNCTION_WORDS = """
sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan sinh cosh tanh coth ln log lg exp sqrt gcd lcm max min arg cis abs sgn Re
Im det
"""
FUNCTIONS = frozenset(_FUNCTION_WORDS.split())
MINUS: Formula = ("number", Fraction(-1), False)
_OPAQUE = frozenset("fghFGPQ")  # what these letters are given in brackets, they are taken to be functions of
_LETTER_WORDS = """
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron rho sigma tau upsilon phi chi psi omega Gamma Delta Theta
Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar angle triangle aleph nabla circ
"""
_LETTERS = frozenset(_LETTER_WORDS.split())
_ACCENTS = frozenset(["overline", "bar", "vec", "hat", "tilde", "widehat", "overrightarrow", "dot"])
_TOKEN = re.compile(
    r"(\s*)(?:(\d+(?:\.\d+)?|\.\d+)|\\text\{\s*([^{}]*?)\s*\}|\\([a-zA-Z]+|[{}])|([A-Za-z])|(.))", re.DOTALL
)
_ENDING = frozenset(["}", "over", "choose", "times", "cdot", "div", "rfloor", "rceil"])  # commands that begin no factor
_MOST_DEEP = 80


class Unreadable(ValueError):
    """The text is no formula that this parser knows."""


class Token:
    """One token: `kind` is number, text, command, letter or mark."""

    __slots__ = ("kind", "spaced", "value")

    def __init__(self, kind: str, value: str, spaced: bool) -> None:
        self.kind, self.value, self.spaced = kind, value, spaced


def formula_of(text: str) -> Formula:
    """The formula that a clean text is; raises Unreadable."""
    parser = Parser(lexed(text))
    formula = parser.group(None)
    if parser.place < len(parser.tokens):
        raise Unreadable(text)
    return formula


def lexed(text: str) -> list[Token]:
    kinds = ("number", "text", "command", "letter", "mark")
    tokens = []
    for match in _TOKEN.finditer(text.strip()):
        for kind, value in zip(kinds, match.groups()[1:], strict=True):
            if value is not None:
                tokens.append(Token(kind, value, bool(match[1])))
    return tokens


class Parser:
    """Recursive descent over the tokens; a product without a sign binds tighter than a slash, as in 1/2x."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.place = 0
        self.deep = 0
        self.bars = 0

    def peek(self, ahead: int = 0) -> Token:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else Token("end", "", False)

    def take(self) -> Token:
        token = self.peek()
        self.place += 1
        return token

    def at(self, *values: str) -> bool:
        token = self.peek()
        return token.kind in ("mark", "command") and token.value in values

    def group(self, closing: str | None) -> Formula:
        r"""An expression up to a closing mark, with \over and \choose; the mark is taken."""
        self.deep += 1
        if self.deep > _MOST_DEEP:
            raise Unreadable("too deep")
        formula = self.sum()
        if self.at("over", "choose"):
            name = "/" if self.take().value == "over" else "binom"
            other = self.sum()
            formula = ("/", formula, other) if name == "/" else ("call", "binom", formula, other)
        if closing is not None and self.take().value != closing:
            raise Unreadable(f"no {closing}")
        self.deep -= 1
        return formula

    def sum(self) -> Formula:
        formula = self.product()
        while self.at("+", "-"):
            sign = self.take().value
            other = self.product()
            formula = ("+", formula, other if sign == "+" else negative(other))
        return formula

    def product(self) -> Formula:
        formula = self.signed()
        while True:
            if self.at("*", "times", "cdot"):
                self.take()
                formula = ("*", formula, self.signed())
            elif self.at("/", "div"):
                self.take()
                formula = ("/", formula, self.signed())
            else:
                return formula

    def signed(self) -> Formula:
        """A run of factors without signs between them, with a sign before it."""
        if self.at("-"):
            self.take()
            return negative(self.signed())
        if self.at("+"):
            self.take()
            return self.signed()
        formula = self.mixed() or self.power()
        while self.begins():
            before = self.tokens[self.place - 1]
            if self.peek().kind == "number" and before.value not in (")", "}", "]"):
                raise Unreadable("a number after a number or a letter")
            formula = ("*", formula, self.power())
        return formula

    def mixed(self) -> Formula | None:
        r"""2 1/2, 2\frac{1}{2}: a whole number and a proper fraction after it are one number."""
        first, second = self.peek(), self.peek(1)
        if first.kind != "number" or "." in first.value:
            return None
        if second.kind == "number" and second.spaced and self.peek(2).value == "/" and self.peek(3).kind == "number":
            top, bottom, size = second.value, self.peek(3).value, 4
        elif second.kind == "command" and second.value == "frac":
            values = [self.peek(i).value for i in range(2, 8)]
            kinds = [self.peek(i).kind for i in (3, 6)]
            if kinds == ["number", "number"] and values[0] + values[2] + values[3] + values[5] == "{}{}":
                top, bottom, size = values[1], values[4], 8
            elif self.peek(2).kind == "number" and len(values[0]) == 2:
                top, bottom, size = values[0][0], values[0][1], 3
            else:
                return None
        else:
            return None
        whole = int(top) < int(bottom) if top.isdigit() and bottom.isdigit() else False
        if not whole or self.peek(size).value in ("^", "!"):
            if second.kind == "number":
                raise Unreadable("no proper fraction after a whole number")
            return None
        self.place += size
        return ("number", Fraction(int(first.value)) + Fraction(int(top), int(bottom)), False)

    def begins(self) -> bool:
        """Whether the next token begins another factor of a product."""
        token = self.peek()
        if token.kind in ("number", "letter", "text"):
            return True
        if token.kind == "mark":
            return token.value in "([{" or (token.value == "|" and not self.bars)
        return token.kind == "command" and token.value not in _ENDING

    def power(self) -> Formula:
        formula = self.postfix(self.primary())
        while self.at("^"):
            self.take()
            if self.at("circ") or (self.at("{") and self.peek(1).value == "circ" and self.peek(2).value == "}"):
                self.place += 1 if self.at("circ") else 3
                formula = ("degrees", formula)
            else:
                formula = ("^", formula, self.exponent())
            formula = self.postfix(formula)
        return formula

    def exponent(self) -> Formula:
        if self.at("{"):
            self.take()
            return self.group("}")
        if self.at("-"):
            self.take()
            return negative(self.exponent())
        formula = self.postfix(self.primary())
        if self.at("^"):
            self.take()
            return ("^", formula, self.exponent())
        return formula

    def postfix(self, formula: Formula) -> Formula:
        while self.at("!"):
            self.take()
            if self.at("!"):
                self.take()
                formula = ("call", "double factorial", formula)
            else:
                formula = ("call", "factorial", formula)
        return formula

    def primary(self) -> Formula:
        token = self.take()
        if token.kind == "number":
            return ("number", fraction(token.value), "." in token.value)
        if token.kind == "letter":
            return self.letter(token.value)
        if token.kind == "text" and token.value in FUNCTIONS:
            return self.function(token.value)
        if token.kind == "mark" and token.value in "([{":
            return self.group({"(": ")", "[": "]", "{": "}"}[token.value])
        if token.kind == "mark" and token.value == "|":
            self.bars += 1
            inside = self.group("|")
            self.bars -= 1
            return ("call", "abs", inside)
        if token.kind == "command":
            return self.command(token.value)
        raise Unreadable(f"{token.kind} {token.value!r}")

    def letter(self, name: str) -> Formula:
        """A letter with its primes and subscripts; e and i are numbers; f(x) is a function of x."""
        bare = name
        while self.at("'"):
            name += self.take().value
        if self.at("_"):
            self.take()
            name += "_" + self.subscript()
        if self.at("(") and (bare in _OPAQUE or (self.peek(1).kind == "number" and self.peek(2).value == ")")):
            self.take()
            return ("call", f"of {name}", *self.arguments(")"))
        if (
            name == "C"
            and self.at("(")
            and any(token.value == "," for token in self.tokens[self.place : self.place + 12])
        ):
            self.take()
            return self.binomial(self.arguments(")"))
        if name in ("e", "i"):
            return ("constant", name)
        return ("letter", name)

    def binomial(self, arguments: tuple[Formula, ...]) -> Formula:
        if len(arguments) != 2:
            raise Unreadable("C of other than two")
        return ("call", "binom", *arguments)

    def subscript(self) -> str:
        """What stands under a letter, as one name."""
        if not self.at("{"):
            return self.take().value
        parts: list[str] = []
        level = 0
        while True:
            token = self.take()
            level += (token.value == "{") - (token.value == "}")
            if token.kind == "end":
                raise Unreadable("a subscript without an end")
            if level == 0:
                return "".join(parts[1:])
            parts.append(token.value)

    def arguments(self, closing: str) -> tuple[Formula, ...]:
        arguments = [self.sum()]
        while self.at(","):
            self.take()
            arguments.append(self.sum())
        if self.take().value != closing:
            raise Unreadable("arguments without an end")
        return tuple(arguments)

    def command(self, name: str) -> Formula:
        if name == "frac":
            return ("/", self.argument(), self.argument())
        if name == "binom":
            return ("call", "binom", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name in ("lfloor", "lceil"):
            return ("call", "floor" if name == "lfloor" else "ceiling", self.group("r" + name[1:]))
        if name == "pi":
            return ("constant", "pi")
        if name == "infty":
            return ("constant", "infinity")
        if name in _ACCENTS:
            return ("letter", f"{name} {self.subscript()}")
        if name in _LETTERS:
            return self.letter(name) if name != "circ" else ("letter", name)
        raise Unreadable(f"\\{name}")

    def argument(self) -> Formula:
        r"""The argument of a command: a group, or one digit, letter or command, as LaTeX takes it."""
        token = self.peek()
        if token.kind == "number" and token.value.isdigit():
            self.place += 1
            if len(token.value) > 1:
                self.place -= 1
                self.tokens = [
                    *self.tokens[: self.place],
                    Token("number", token.value[1:], False),
                    *self.tokens[self.place + 1 :],
                ]
            return ("number", Fraction(int(token.value[0])), False)
        if token.kind == "mark" and token.value != "{":
            raise Unreadable("no argument")
        return self.primary()

    def root(self) -> Formula:
        index: Formula = ("number", Fraction(2), False)
        if self.at("["):
            self.take()
            index = self.group("]")
        inside = self.primary()  # \sqrt 13 is meant to be the root of 13
        return ("call", "root", inside, index)

    def function(self, name: str) -> Formula:
        """A function of what follows: a group in brackets, or factors up to the next sign or function."""
        under: Formula | None = None
        raised: Formula | None = None
        while self.at("_", "^"):
            mark = self.take().value
            if mark == "_":
                under = self.exponent() if self.at("{") else self.argument()
            else:
                raised = self.exponent()
        if name in ("max", "min", "gcd", "lcm") and self.at("(", "{"):
            closing = {"(": ")", "{": "}"}[self.take().value]
            return ("call", name, *self.arguments(closing))
        inside = self.operand()
        if raised == MINUS and name in ("sin", "cos", "tan", "cot"):
            return ("call", "arc" + name, inside)
        call: Formula = ("call", name, inside) if under is None else ("call", name, inside, under)
        return call if raised is None else ("^", call, raised)

    def operand(self) -> Formula:
        if self.at("-"):
            self.take()
            return negative(self.operand())
        bracket = self.at("(", "[", "{", "|")
        formula = self.power()
        if bracket and formula[0] != "^":
            return formula
        while self.begins() and not self.at("(", "[") and self.peek().value not in FUNCTIONS:
            if self.peek().kind == "number" and self.tokens[self.place - 1].value not in (")", "}", "]"):
                raise Unreadable("a number after a number or a letter")
            formula = ("*", formula, self.power())
        if self.at("/") and self.peek(1).kind == "number" and formula[0] != "call":
            self.take()
            formula = ("/", formula, self.power())
        return formula


def fraction(text: str) -> Fraction:
    """The value of digits with or without a point."""
    whole, _, part = text.partition(".")
    return Fraction(int(whole + part or "0"), 10 ** len(part))


def negative(formula: Formula) -> Formula:
    """The formula with the other sign."""
    if formula[0] == "number":
        return ("number", -formula[1], formula[2])
    return ("*", MINUS, formula)


def letters(formula: Formula) -> set[str]:
    """The letters in a formula."""
    return atoms(formula, "letter")


def atoms(formula: Formula, kind: str) -> set[str]:
    """The names of a formula's atoms of one kind, "letter" or "constant"."""
    if formula[0] == kind:
        return {formula[1]}
    return set().union(*(atoms(part, kind) for part in formula if isinstance(part, tuple)))


def decimal(formula: Formula) -> bool:
    """Whether there is a decimal fraction in a formula."""
    if formula[0] == "number":
        return bool(formula[2])
    return any(decimal(part) for part in formula if isinstance(part, tuple))
