"""Units, currencies and words of scale after a number: what they multiply it by, what they measure, and which words are none.

A unit that is not known here (apples, students) measures nothing that could be compared, and is taken for what the question asks about.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

_TABLE = """
length m 1 meter meters metre metres
length mm 1/1000 millimeter millimeters millimetre millimetres
length cm 1/100 centimeter centimeters centimetre centimetres
length dm 1/10 decimeter decimeters
length km 1000 kilometer kilometers kilometre kilometres
length nm 1/1000000000 nanometer nanometers
length inch 254/10000 inches in
length foot 3048/10000 feet ft
length yard 9144/10000 yards yd
length mile 1609344/1000 miles mi
mass g 1 gram grams gm
mass kg 1000 kilogram kilograms kgs
mass mg 1/1000 milligram milligrams
mass lb 45359237/100000 pound pounds lbs
mass oz 28349523125/1000000000 ounce ounces
time s 1 second seconds sec secs
time ms 1/1000 millisecond milliseconds
time min 60 minute minutes mins
time h 3600 hour hours hr hrs
time day 86400 days
time week 604800 weeks
month month 1 months
month year 12 years yr yrs
volume L 1 l liter liters litre litres
volume mL 1/1000 ml milliliter milliliters
volume gal 3785411784/1000000000 gallon gallons
angle degree 1 degrees deg
arc radian 1 radians rad
money:USD dollar 1 dollars USD usd bucks
money:USD cent 1/100 cents ct
money:EUR euro 1 euros EUR eur
money:GBP GBP 1 gbp
money:JPY yen 1 JPY
money:INR rupee 1 rupees INR
money:KRW won 1 KRW
money:RUB ruble 1 rubles RUB
frequency Hz 1 hertz
frequency kHz 1000 kilohertz
force N 1 newton newtons
force kN 1000 kilonewton
energy J 1 joule joules
energy kJ 1000 kilojoule kilojoules
energy eV 1602176634/10000000000000000000000000000
power W 1 watt watts
power kW 1000 kilowatt kilowatts
power MW 1000000 megawatt megawatts
pressure Pa 1 pascal pascals
pressure kPa 1000
pressure atm 101325
voltage V 1 volt volts
current A 1 ampere amperes amp amps
resistance ohm 1 ohms
temperature K 1 kelvin kelvins
amount mol 1 mole moles
"""
UNITS: dict[str, tuple[str, Fraction]] = {}
for _line in _TABLE.strip().splitlines():
    _dimension, _name, _factor, *_others = _line.split()
    UNITS |= {_unit: (_dimension, Fraction(_factor)) for _unit in (_name, *_others)}
_COMPOUND = {
    "mph": "mile/h",
    "kmph": "km/h",
    "kmh": "km/h",
    "kph": "km/h",
    "fps": "foot/s",
    "cc": "cm^3",
    "sqft": "foot^2",
}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_REFUSED_WORDS = """
or and not maybe no none nor is are was isn't than but except unless if then possibly perhaps either neither mod modulo factorial squared
cubed more less fewer fold half double twice negative minus plus over to from between unknown wrong false true undefined infinity
incorrect guess actually wait hmm sum difference product zero one two three four five six seven eight nine ten eleven twelve twenty pi
choose dozens percent percentage pct quarter third fourth fifth tenth tenths halves thirds quarters base power root log approximately about
sqrt another other others also any each th
"""
_REFUSED = frozenset(_REFUSED_WORDS.split())
_PIECE = re.compile(r"([A-Za-z'-]+)(?:\s?\^\s?\{?\s?(-?\d)\s?\}?)?|([/*])")


@dataclass(frozen=True)
class Unit:
    """What stands after a number: `factor` multiplies it, `measures` says what it measures in powers, empty where that is not known."""

    factor: Fraction = Fraction(1)
    scale: Fraction = Fraction(1)  # of words such as million, part of the number itself
    measures: frozenset[tuple[str, int]] = field(default_factory=frozenset)


def unit_of(text: str) -> Unit | None:
    """The unit that the words after a number are; None where they are something else."""
    words = text.replace("\\cdot", "*").replace("(", " ").replace(")", " ").strip(" .,")
    scale = Fraction(1)
    while match := re.match(r"(hundred|thousand|million|billion|trillion|dozen)s?\b\s*(?:of\b)?", words, re.IGNORECASE):
        name = match[1].lower()
        scale *= 12 if name == "dozen" else Fraction(10) ** _SCALES[name]
        words = words[match.end() :].strip()
    if not words:
        return Unit(scale=scale)
    if re.search(r"\d", re.sub(r"\^\s?\{?\s?-?\d\s?\}?", "", words)) or len(words) > 60:
        return None
    words = re.sub(
        r"\b(?:cubic|cu\.?)\s+([A-Za-z]+)", r"\1^3", re.sub(r"\b(?:square|sq\.?)\s+([A-Za-z]+)", r"\1^2", words)
    )
    words = re.sub(r"\bper\b", "/", re.sub(r"\b(?:of|the|a|an|in length|long|each)\b", " ", words)).strip()
    if not words:
        return None
    return _parsed(words, scale)


def _parsed(words: str, scale: Fraction) -> Unit | None:
    """The unit of pieces joined by spaces, slashes and stars."""
    if _PIECE.sub("", words).strip():
        return None
    factor, measures, below, known = Fraction(1), Counter[str](), False, True
    pieces = list(_PIECE.finditer(words))
    if len(pieces) > 7:
        return None
    for match in pieces:
        if match[3]:
            below = match[3] == "/"
            continue
        name, power = match[1], int(match[2] or 1) * (-1 if below else 1)
        factors = _named(name)
        if factors is None and (name.lower() in _REFUSED or len(name) < 2):
            return None
        for unit, exponent in factors or ():
            dimension, size = UNITS[unit]
            measures[dimension] += exponent * power
            factor *= size ** (exponent * power)
        known = known and factors is not None
    if not known:
        return Unit(scale=scale)
    if measures["volume"]:
        factor *= Fraction(1, 1000) ** measures["volume"]
        measures["length"] += 3 * measures.pop("volume")
    return Unit(factor, scale, frozenset((name, power) for name, power in measures.items() if power))


def _named(name: str) -> list[tuple[str, int]] | None:
    """The known units that a word stands for, with their powers."""
    if name in _COMPOUND:
        above, _, below = _COMPOUND[name].partition("/")
        first, _, power = above.partition("^")
        return [(first, int(power or 1)), *([(below, -1)] if below else [])]
    for spelled in (name, name.lower()):
        if spelled in UNITS and (len(spelled) > 1 or spelled == name):
            return [(spelled, 1)]
    return None
