"""Worked solutions of integer arithmetic, one operation a line."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\s*(\d+|[-+*/()])")


def worked(expression: str, answer: str) -> str:
    """A solution that writes each operation of + - * / with brackets as `a + b = c` on a line, then the answer in tags.

    Division is exact or rounds down, as reasoning-gym's. Raises ValueError if the steps do not lead to `answer`.
    """
    steps = _Steps(expression)
    value = steps.sum()
    if steps.rest or str(value) != answer:
        raise ValueError(f"the steps of {expression!r} lead to {value}, not to {answer}")
    return "\n".join([*steps.lines, f"<answer>{answer}</answer>"])


class _Steps:
    """Reads an expression from left to right and writes a line for each operation."""

    def __init__(self, expression: str) -> None:
        self.rest = _TOKEN.findall(expression)
        if "".join(self.rest) != re.sub(r"\s", "", expression):
            raise ValueError(
                f"only whole numbers, + - * / and brackets can be worked out step by step, not {expression!r}"
            )
        self.lines: list[str] = []

    def sum(self) -> int:
        value = self.term()
        while self.rest and self.rest[0] in "+-":
            value = self.apply(value, self.rest.pop(0), self.term())
        return value

    def term(self) -> int:
        value = self.factor()
        while self.rest and self.rest[0] in "*/":
            value = self.apply(value, self.rest.pop(0), self.factor())
        return value

    def factor(self) -> int:
        if not self.rest:
            raise ValueError("the expression ends too early")
        token = self.rest.pop(0)
        if token == "-":
            return -self.factor()
        if token != "(":
            return int(token)
        value = self.sum()
        if not self.rest or self.rest.pop(0) != ")":
            raise ValueError("a bracket is not closed")
        return value

    def apply(self, a: int, operator: str, b: int) -> int:
        value = {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a // b
        self.lines.append(f"{a} {operator} {b if b >= 0 else f'({b})'} = {value}")
        return value
