"""What errors of other libraries say, without their tracebacks."""

from __future__ import annotations


def sentence(error: BaseException, otherwise: str = "") -> str:
    """The first line of a library's error; where it says nothing `otherwise`, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), otherwise or type(error).__name__)
