"""A trained model on a hub: its folder with a card that says where it comes from and what it scored."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from ramulus.core.json_object import read_object
from ramulus.core.run_folder import WHEN, final_evaluation, model_folder
from ramulus.run.evaluation.loaded_model import export_model

HUB_MODEL = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # of a model: OWNER/NAME; a path with more parts is a folder
SHOWN = ("mean@", "greedy", "pass@", "maj@", "reward")
"""What a card tells of an evaluation: the numbers whose names begin so."""


class HubClient(Protocol):
    """What is asked of `huggingface_hub.HfApi`."""

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> Any: ...
    def repo_exists(self, repo_id: str) -> bool: ...
    def model_info(self, repo_id: str) -> Any: ...
    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str | None = None) -> Any: ...


def hub_client() -> HubClient:
    """The hub's own client, with the token of the environment or of `hf auth login`. Raises ValueError where there is none."""
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise ValueError("there is no token for the hub, and nothing was sent: set HF_TOKEN, or log in with `hf auth login`")
    return HfApi(token=token)


def push_model(run: Path, repo: str, which: str, private: bool, console: Console, client: HubClient | None = None) -> str:
    """Send the model of a run with its card; returns the address.

    Raises ValueError for a name that no hub takes or without a token, before anything is written, and for one that is public already where it is to
    be private; OSError with what the hub said.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository: give OWNER/NAME ({error})") from error
    hub = client or hub_client()
    try:
        seen = private and hub.repo_exists(repo) and not hub.model_info(repo).private
    except HTTPError as error:
        raise OSError(f"the hub did not answer for {repo}: {str(error).splitlines()[0]}; is the name yours, and may the token read?") from error
    if seen:
        raise ValueError(f"{repo} is public, and nothing was sent: add --public to send the model there, or name another")
    with tempfile.TemporaryDirectory(prefix="ramulus-push-") as scratch:
        folder = Path(scratch) / "model"
        step = export_model(run, folder, which, console)
        stage = model_folder(run, which)[0].parents[2]
        (folder / "README.md").write_text(model_card(stage, step, repo), encoding="utf-8")
        try:
            address = hub.create_repo(repo, private=private, exist_ok=True)
            hub.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=f"step {step} of {stage.name}, by ramulus")
        except HTTPError as error:
            raise OSError(f"the hub did not take {repo}: {str(error).splitlines()[0]}; is the name yours, and may the token write?") from error
    return str(address)


def model_card(stage: Path, step: int, repo: str) -> str:
    """The card of a stage's model, Markdown with the hub's front matter; it names no folder of this machine."""
    saved, config = configuration(stage)
    base = (config.get("model") or {}).get("path") if isinstance(config.get("model"), dict) else config.get("model")
    roots = Path(), *stage.resolve().parents
    on_hub = isinstance(base, str) and HUB_MODEL.fullmatch(base) is not None and not any((root / base).exists() for root in roots)
    recipe = Path(str(saved.get("recipe", config.get("name", stage.name)))).name
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", *([f"base_model: {base}"] if on_hub else [])]
    front += ["tags:", "- ramulus", "- reinforcement-learning", "---", ""]
    subject = f"{base if on_hub else 'A model'} after {step} steps of `{recipe}` by ramulus: reinforcement learning on verifiable rewards."
    load = [f'model = AutoModelForCausalLM.from_pretrained("{repo}")', f'tokenizer = AutoTokenizer.from_pretrained("{repo}")']
    text = [f"# {repo.rpartition('/')[2]}", "", subject, "", "```python"]
    text += ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", *load, "```", *score_table(stage, step), *settings_told(config)]
    return "\n".join([*front, *text, ""])


def configuration(stage: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json of a stage's run, and the stage's part of it; empty where there is none."""
    for folder in (stage, stage.parent):
        if (folder / "run.json").is_file():
            saved = read_object(folder / "run.json")
            stages = saved.get("stages", [])
            named = [one for i, one in enumerate(stages, 1) if stage.name == f"{i}-{one.get('name')}"]
            return saved, (named or stages or [{}])[0]
    return {}, {}


def score_table(stage: Path, step: int) -> list[str]:
    """A table of the evaluations before training and of the model of a step; [] where that was never evaluated."""
    reports = {when: read_object(path) for when in WHEN if (path := final_evaluation(stage, when)).is_file()}
    if reports.get("after", {}).get("step") != step:
        reports.pop("after", None)
        evaluated = stage / "evals" / f"{step:06d}.json"
        reports |= {"after": read_object(evaluated)} if evaluated.is_file() else {}
    if len({asked_of(report) for report in reports.values()}) > 1:  # held-out problems in training, others in the final evaluation
        reports.pop("before", None)
    names = [name for name in reports.get("after", {}) if name.startswith(SHOWN)]
    if not names:
        return []
    lines = [f"| {name} | " + " | ".join(told_of(reports[when], name) for when in reports) + " |" for name in names]
    head = f"On {reports['after'].get('problems', 'the')} held-out problems; in brackets 95 % intervals over problems."
    return ["", "## Results", "", head, "", "| | " + " | ".join(reports) + " |", "|---|" + "---|" * len(reports), *lines]


def asked_of(report: dict[str, Any]) -> tuple[Any, ...]:
    """How many problems a report is of, and which."""
    return report.get("problems"), *(row.get("id") for row in report.get("answers") or ())


def told_of(report: dict[str, Any], name: str) -> str:
    """A number of an evaluation with its interval."""
    value, pair = report.get(name), report.get("intervals", {}).get(name)
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.3f}" + (f" [{pair[0]:.3f}, {pair[1]:.3f}]" if pair else "")


def settings_told(config: dict[str, Any]) -> list[str]:
    """The settings of the training, those that are numbers or parts."""
    parts = {name: value.get("class", "").rpartition(".")[2] for name, value in config.items() if isinstance(value, dict) and "class" in value}
    numbers = {name: value for name, value in config.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    rows = [f"| {name} | {value} |" for name, value in {**parts, **numbers}.items()]
    return ["", "## Training", "", "| setting | value |", "|---|---|", *rows] if rows else []
