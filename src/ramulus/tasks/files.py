"""Problems from JSONL, JSON, CSV, parquet (verl's layout too) and Hugging Face datasets, with the columns mapped by name."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ramulus.tasks.columns import check_media, field_of, is_verl, plain, read_answers, read_demonstrations, read_prompt
from ramulus.tasks.problem import Problem
from ramulus.tasks.rows import files_of, read_rows

VERL = {"prompt": "prompt", "answer": "reward_model.ground_truth"}  # arXiv 2409.19256's column layout


@dataclass(frozen=True)
class File:
    """Problems of a .jsonl, .json, .csv, .tsv or .parquet file, of a dataset folder, or of a Hugging Face dataset named `owner/name`.

    `path` may name several, with commas between or by a pattern such as data/*.jsonl: one after another, with the same columns.

    Columns may be dotted paths into nested fields (`reward_model.ground_truth`, `choices.0`). A prompt is text or a chat (a list
    of role and content, or parts of text); an answer is text, a number, or a list of which any counts; None for `answer` reads none. Rows with an
    empty answer are left out and counted in a warning; an empty prompt or a missing column raises ValueError with its row.
    `layout`: "verl" reads prompt, reward_model.ground_truth, data_source and extra_info; "auto" does if those are there and
    neither `prompt` nor `answer` was changed. `keep` names further columns for a scorer, which finds them in task.extra.

    Example:
        >>> from ramulus import File
        >>> File("problems.jsonl", prompt="question", limit=100).answer
        'answer'
    """

    path: str
    prompt: str = "problem"
    answer: str | None = "answer"
    demonstration: str | None = None  # text, a list of texts, or a chat whose assistant turns are meant; that of the prompt: its last turn
    id: str | None = None  # None numbers the rows of each file: its name (its path where several have the name) and row from 0
    split: str | None = None  # of a Hugging Face dataset
    config: str | None = None  # of a Hugging Face dataset: its configuration, such as "main"
    limit: int | None = None  # read only the first rows
    layout: Literal["auto", "columns", "verl"] = "auto"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in ("auto", "columns", "verl"):
            raise ValueError(f'layout must be "auto", "columns" or "verl", got {self.layout!r}')

    def __call__(self) -> list[Problem]:
        problems: list[Problem] = []
        unanswered: list[str] = []
        files = files_of(self.path)
        stems = Counter(Path(file).stem for file in files)
        for place, file in enumerate(files):
            stem = Path(file).stem if stems[Path(file).stem] == 1 else file
            left = None if self.limit is None else self.limit - len(problems) - len(unanswered)
            if place and left is not None and left < 1:
                break
            self._read(file, stem, left, problems, unanswered)
        if not problems:
            raise ValueError(f"{self.path!r} has no rows" + (" with an answer" if unanswered else ""))
        if unanswered:
            text = f"{self.path}: left out {len(unanswered)} of {len(problems) + len(unanswered)} rows whose answer is empty, first {unanswered[0]}"
            warnings.warn(text, stacklevel=2)
        return problems

    def _read(self, file: str, stem: str, limit: int | None, problems: list[Problem], unanswered: list[str]) -> None:
        """Add the problems of one file, and the places of its rows without an answer."""
        verl = self.layout == "verl"
        for number, (where, row) in enumerate(read_rows(file, self.split, self.config, limit)):
            if number == 0 and self.layout == "auto":
                verl = (self.prompt, self.answer) == ("problem", "answer") and is_verl(row)
            problem = self._problem(row, f"{stem}-{number}", f"{file}, {where}", verl)
            if problem is None:
                unanswered.append(where)
            else:
                problems.append(problem)

    def _problem(self, row: dict[str, Any], numbered: str, where: str, verl: bool) -> Problem | None:
        """The problem of one row; None if its answer is empty, since nothing could ever be right."""
        prompt, answer = (VERL["prompt"], VERL["answer"]) if verl else (self.prompt, self.answer)
        both = self.demonstration == prompt  # a chat that ends with its solution
        messages, text, last = read_prompt(field_of(row, prompt, where), where, prompt, split=both)
        check_media(row, text, where, verl)
        answers = () if answer is None else read_answers(field_of(row, answer, where), where, answer)
        if answer is not None and not answers:
            return None
        extra: dict[str, Any] = {name: plain(field_of(row, name, where), where, name) for name in self.keep}
        if verl:
            extra |= {name: plain(row[name], where, name) for name in ("data_source", "extra_info") if name in row}
        if len(answers) > 1:
            extra["answers"] = list(answers)
        shown: tuple[str, ...] = ()
        if self.demonstration is not None:
            shown = read_demonstrations(last if both else field_of(row, self.demonstration, where), where, self.demonstration)
        name = numbered if self.id is None else str(field_of(row, self.id, where))
        return Problem(name, text, answers[0] if answers else "", shown, extra, messages)
