"""What words stand for on the command line where a field holds an object: models, problems, rewards, adapters, learners."""

from __future__ import annotations

import difflib
from dataclasses import is_dataclass
from functools import partial
from typing import Any

from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Pretrained
from ramulus.learn.policy.torch_learner import Torch
from ramulus.learn.sharded.factory import Sharded
from ramulus.run.config.ground import Ray
from ramulus.run.config.override import Blank, Word
from ramulus.run.config.python_file import read_file
from ramulus.run.config.weighted import Weighted
from ramulus.tasks.chain import ChainAnswer, ChainSum
from ramulus.tasks.files import File
from ramulus.tasks.gym import Gym, GymScore
from ramulus.tasks.math import Boxed
from ramulus.tasks.rewards import ExactAnswer, Format, Overlong
from ramulus.tasks.sums import TEST, Sums
from ramulus.tasks.word_problems import TRAIN, WordProblems

REWARDS = {kind.__name__: kind for kind in (Boxed, ExactAnswer, Format, Overlong, GymScore, ChainAnswer)}


def pretrained(text: str) -> Blank:
    """A model folder, the folder of a run, or a hub name."""
    return Blank(Pretrained, {"path": text})


def problems(text: str, split: str = "train") -> Blank:
    """`gym:NAME`, `chain`, `sums` or `word_problems` (of that split), or the path of a file or dataset."""
    if text.startswith("gym:"):
        return Blank(Gym, {"name": text[4:]})
    if text == "sums":
        return Blank(Sums, {"count": TEST if split == "test" else 9**3 - TEST, "split": split})
    if text == "word_problems":
        return Blank(WordProblems, {"count": TEST if split == "test" else TRAIN, "split": split})
    return Blank(ChainSum, {"count": 1000 if split == "train" else 100, "split": split}) if text == "chain" else Blank(File, {"path": text})


def problems_word(source: Any) -> str:
    """The word that `problems` reads as such a source; FILE where it has none."""
    if isinstance(source, Gym):
        return f"gym:{source.name}"
    named = {Sums: "sums", WordProblems: "word_problems", ChainSum: "chain"}
    return str(source.path) if isinstance(source, File) else next((word for kind, word in named.items() if isinstance(source, kind)), "FILE")


def rewards(text: str) -> Any:
    """`Boxed`, `mine.py:score`, or several with commas between, each of weight 1."""
    words = [word.strip() for word in text.split(",")]
    if len(words) == 1:
        return reward(words[0])
    return tuple(Blank(Weighted, {"reward": reward(word)}) for word in words)


def reward(word: str) -> Any:
    """A shipped reward by its class name, or `FILE.py:NAME`: a function (task, path) -> float, a dataclass, or an object of one."""
    file, colon, name = word.rpartition(":")
    if colon and file.endswith(".py"):
        there = getattr(read_file(file, "give FILE.py:FUNCTION", "reward"), name, None)
        if isinstance(there, type) and is_dataclass(there):
            return Blank(there, {})
        if isinstance(there, type):
            there = instance(there, f"{file}:{name}")
        if not callable(there):
            raise ValueError(f"{file} has no function {name!r} that grades: write def {name}(task, path) -> float")
        return there
    known = {name.lower(): kind for name, kind in REWARDS.items()}
    if word.lower() in known:
        return Blank(known[word.lower()], {})
    close = difflib.get_close_matches(word, REWARDS, n=1)
    guess = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(f"there is no reward {word!r}.{guess} There are {', '.join(REWARDS)}, or give one of your own, FILE.py:FUNCTION")


def reward_word(given: Any) -> str:
    """The word that `reward` reads as such a reward; FILE.py:NAME where it has none."""
    usual = (Boxed(), ExactAnswer(), GymScore(), ChainAnswer())
    return next((type(one).__name__ for one in usual if type(one) is type(given) and one == given), "FILE.py:NAME")


def instance(kind: type, where: str) -> Any:
    """An object of a class of one's own, made without arguments. Raises ValueError where it wants some, or does not grade."""
    try:
        reward = kind()
    except TypeError as error:
        raise ValueError(f"{where} is a class that wants arguments ({error}): make it a dataclass with defaults, or name an object of it") from None
    if not callable(reward):
        raise ValueError(f"{where} is a class whose objects do not grade: give it def __call__(self, task, path) -> float")
    return reward


def adapters(text: str) -> Blank:
    """LoRA of a rank, from `lora=16`. Raises ValueError for what is no number."""
    if not text.isdecimal():
        raise ValueError("lora is a rank, 16 say; `true` takes the usual one, and lora.rank, lora.alpha, lora.targets set its fields")
    return Blank(Lora, {"rank": int(text)})


def learners(text: str) -> Blank:
    """A class of learners, with or without brackets."""
    known = {kind.__name__.lower(): kind for kind in (Torch, Sharded)}
    if (name := text.removesuffix("()").lower()) not in known:
        raise ValueError(f"there is no learner {text!r}: there are {', '.join(known)}; learner.NAME=... sets their fields")
    return Blank(known[name], {})


def grounds(text: str) -> Blank:
    """Ray, with or without brackets."""
    if text.removesuffix("()").lower() != "ray":
        raise ValueError(f"there is no cluster {text!r}: there is ray; cluster.NAME=... sets its fields")
    return Blank(Ray, {})


MODEL = {"word": Word(Pretrained, pretrained)}
PROBLEMS = {"word": Word(File, problems)}
HELD_OUT = {"word": Word(File, partial(problems, split="test"))}
REWARD = {"word": Word(None, rewards)}
LORA = {"word": Word(Lora, adapters)}
LEARNER = {"word": Word(None, learners)}
CLUSTER = {"word": Word(Ray, grounds)}
"""The metadata of fields that are written so."""
