"""When a text ends: every rule, at every segment boundary, and how little it decodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growing import EOS
from ramulus.core.text import BOX, closed
from ramulus.grow.stop import BoxedAnswer, Repeats, Stop, has_box, repeats


def chars(tokens: list[int]) -> str:
    """Tokens are characters, EOS is silent."""
    return "".join(chr(token) for token in tokens if token != EOS)


def run(stop: Stop, text: str, boundary: int = 0) -> tuple[int, str | None]:
    """Feed characters one by one, `boundary` of them in an earlier segment; (tokens when it ended, why)."""
    tokens = [EOS if letter == "\0" else ord(letter) for letter in text]
    response: list[int] = []
    new: list[int] = []
    for i, token in enumerate(tokens):
        if i == boundary:
            response, new = new, []
        new.append(token)
        why = stop(response, new)
        if why is not None:
            return i + 1, why
    return len(tokens), None


ANSWER = Stop((EOS,), 10_000, chars, BoxedAnswer())


def test_eos_and_length() -> None:
    stop = Stop((EOS, 7), 4)
    assert stop([], [EOS]) == "eos", "EOS as the first token"
    assert stop([1, 2], [7]) == "eos"
    assert stop([1, 2], [3]) is None
    assert stop([1, 2], [3, 4]) == "length"
    assert stop([1, 2, 3], [EOS]) == "eos", "EOS on the last token is an end, not a cut"
    assert Stop((), 3)([], [EOS]) is None


BOXES = [
    "so \\boxed{7}",
    "\\boxed{\\frac{1}{2}}",
    "\\boxed{a{b{c{d}e}f}g}",
    "\\boxed {x}",
    "\\boxed{}",
    "{{ } \\boxed{5}",
    "\\boxed{\\left\\{ 1 \\right.}",
    "\\boxed{\\{1, 2\\}}",
    "} } \\boxed{1\\\\}",
    "\\boxed{" + "x{}" * 300 + "}",
]


@pytest.mark.parametrize("text", BOXES)
def test_a_box_ends_the_text_at_the_brace_that_closes_it(text: str) -> None:
    for boundary in {0, 1, len(text) // 2, len(text) - 1}:
        assert run(ANSWER, text + " and so on }", boundary) == (len(text), "answer")
    assert has_box(text)


@pytest.mark.parametrize(
    "text",
    ["\\frac{1}{2}", "boxed{1}", "\\boxed{1", "\\boxed 1}", "\\boxed{\\}", "\\fbox{1}", "{\\boxed} {1}", "a}}}b"],
)
def test_what_is_no_complete_box(text: str) -> None:
    assert run(ANSWER, text) == (len(text), None)
    assert not has_box(text)


@given(st.text(alphabet="{}\\ bx", max_size=60), st.integers(0, 60))
def test_sampling_sees_a_box_exactly_when_the_whole_text_has_one(text: str, boundary: int) -> None:
    text = text.replace("b", "\\boxed")
    at, why = run(ANSWER, text, boundary)
    first = next((i for i in range(len(text) + 1) if has_box(text[:i])), None)
    assert (at if why == "answer" else None) == first


def test_one_token_may_close_a_box_and_more() -> None:
    words = ["", "\\boxed{\\frac{1}{2", "}}$.", "} }", "\\boxed{3}", "x"]

    def decode(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens)

    stop = Stop((0,), 99, decode, BoxedAnswer())
    assert stop([1], [2]) == "answer"
    assert stop([], [5, 1, 5]) is None
    assert stop([1], [3]) == "answer"
    assert stop([], [4]) == "answer"
    assert stop([], [3]) is None


@pytest.mark.parametrize("boundary", ["segments", "tokens"])
@pytest.mark.parametrize("piece", ["\\}", "a\\}", "\\{b\\}", "\\}\\}", "\\\\\\}", "x^{2}", "}", "}\\}", "} }"])
def test_an_older_box_is_not_completed_again(piece: str, boundary: str) -> None:
    words = ["", "\\boxed{3}", " then S=", piece, " and \\boxed{4", "}", "\\"]

    def decode(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens)

    def ask(*tokens: int) -> str | None:
        """What is said after the last token, with the others before it in an earlier segment or in this one."""
        before, last = list(tokens[:-1]), list(tokens[-1:])
        return stop(before, last) if boundary == "segments" else stop([], before + last)

    stop = Stop((0,), 99, decode, BoxedAnswer())
    assert ask(1, 3) is None
    assert ask(1, 2, 3) is None
    assert ask(*[1, 2] * 20, 3) is None
    assert ask(1, 2, 4, 6, 5) is None, "its brace is escaped by the token before"
    assert ask(1, 2, 3, 4, 5) == "answer", "a new box does"


PIECES = ["\\boxed{", "\\boxed{3}", "{", "}", "\\", "\\{", "\\}", "x", "}}", "} \\}", " "]


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.integers(0, 20))
def test_only_a_box_that_the_last_token_completes_ends_the_text(words: list[str], before: int) -> None:
    """Boxes of the response before, which may have gone on behind them, count no more than none at all."""

    def decode(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens)

    def boxes(tokens: list[int]) -> int:
        return sum(pair.command == BOX for pair in closed(decode(tokens)))

    stop, tokens = Stop((), 999, decode, BoxedAnswer()), list(range(len(words)))
    for end in range(before + 1, len(words) + 1):
        assert (stop(tokens[:before], tokens[before:end]) == "answer") == (boxes(tokens[:end]) > boxes(tokens[: end - 1]))


def test_a_box_beyond_the_window_is_not_seen() -> None:
    text = "\\boxed{" + "x" * 100 + "}"
    assert run(Stop((EOS,), 999, chars, BoxedAnswer(window=50)), text)[1] is None
    assert run(Stop((EOS,), 999, chars, BoxedAnswer(window=108)), text)[1] == "answer"


def test_box_and_eos() -> None:
    stop = Stop((EOS,), 99, chars, BoxedAnswer(and_eos=True))
    assert run(stop, "\\boxed{1} is it\0") == (16, "answer")
    assert run(stop, "\\boxed{1} is it\0", 12) == (16, "answer"), "the box may lie in an earlier segment"
    assert run(stop, "no box\0") == (7, "eos")
    assert run(stop, "\\boxed{1} is it") == (15, None)


def test_decoding_is_rare_and_short() -> None:
    sizes = []

    def decode(tokens: list[int]) -> str:
        sizes.append(len(tokens))
        return chars(tokens)

    text = "let us see what we can do here with letters alone " * 100
    assert run(Stop((EOS,), 10_000, decode, BoxedAnswer()), text)[1] is None
    assert len(sizes) <= len(set(text)), "one look at each distinct token"
    sizes.clear()
    run(Stop((EOS,), 10_000, decode, BoxedAnswer()), text + "{x^{2}}")
    assert max(sizes) <= 64
    sizes.clear()
    run(Stop((EOS,), 10_000, decode, BoxedAnswer()), "}" * 3000)
    assert max(sizes) <= 1024, "untrusted text cannot make it decode everything again and again"


def test_repetition_test() -> None:
    assert repeats("a" * 39, 32, 8), "39 letters hold the same 32 in 8 places"
    assert not repeats("a" * 38, 32, 8)
    line = "the same thirty-two characters!! "
    assert repeats(line * 8, 32, 8)
    assert not repeats(line * 7, 32, 8)
    assert repeats((1, 2) * 5, 4, 4)
    assert not repeats((), 1, 2)


def test_repetition_at_the_end_of_a_segment() -> None:
    stop = Stop((EOS,), 100, chars, None, Repeats())
    new = [ord("a")] * 60
    assert stop([], new[:50], 60) is None
    assert stop([], new, 60) == "repetition"
    assert stop([5] * 40, new, 60) == "length", "the length goes before repetition"
    assert stop([], [*new[:-1], EOS], 60) == "eos"
    assert stop(new, [ord("b")] * 5, 5) is None, "only this segment's text"
    first = Stop((EOS,), 100, chars, None, Repeats(first=True))
    assert first([], [*new[:-1], EOS], 60) == "repetition"
    assert first([5] * 40, new, 60) == "repetition"


def test_repetition_at_intervals_saves_tokens() -> None:
    stop = Stop((EOS,), 1000, chars, BoxedAnswer(), Repeats(every=16))
    assert run(stop, "a" * 100) == (48, "repetition")
    assert run(stop, "xyz" * 5 + "\\boxed{1}" + "a" * 60) == (24, "answer")
    assert Repeats(window=38)([ord("a")] * 100, chars) is False
    assert Repeats(window=39)([ord("a")] * 100, chars) is True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stop((EOS,), 0), "max_tokens=0"),
        (lambda: Stop(("</s>",), 9), "token ids, got"),
        (lambda: Stop((EOS,), 9, answer=BoxedAnswer()), "pass decode=tokenizer.decode"),
        (lambda: Stop((EOS,), 9, repetition=Repeats()), "pass decode=tokenizer.decode"),
        (lambda: BoxedAnswer(window=0), "got 0"),
        (lambda: Repeats(times=1), "times at least 2"),
    ],
)
def test_wrong_values(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("before", "new", "ended"),
    [
        ("bcdbcdb", "c", None),  # "cd" stands in what came before, a hint say
        ("bcdbc", "d", "stop"),
        ("cdcd", "a", None),
        ("cdc", "dx", "stop"),
        ("", "cd", "stop"),
        ("c", "c", None),
    ],
)
def test_a_string_stops_where_it_ends(before: str, new: str, ended: str | None) -> None:
    stop = Stop((EOS,), 100, chars, strings=("cd", "#" * 9))
    assert stop([ord(letter) for letter in before], [ord(letter) for letter in new]) == ended


def test_overlapping_strings_stop_again() -> None:
    stop = Stop((EOS,), 100, chars, strings=("aa",))
    assert stop([ord("a")] * 3, [ord("a")]) == "stop"
    assert stop([ord("a")] * 3, [ord("b")]) is None
