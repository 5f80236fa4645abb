"""`ramulus push`: a real run's model and its card, to a stand-in of the hub's client that keeps what it is sent."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ramulus.cli import main
from ramulus.run.publish import hub_client, model_card, push_model, score_table

RUN = Path(__file__).parent / "data" / "run-0.1"


class Hub:
    """Keeps repositories in a folder, as `huggingface_hub.HfApi` does on a hub."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, []

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> str:
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.said.append(("private", private))
        return f"https://hub.invalid/{repo_id}"

    def repo_exists(self, repo_id: str) -> bool:
        return (self.folder / repo_id).is_dir()

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=("private", True) in self.said)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str | None = None) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        self.said.append(("message", commit_message))


def test_the_stand_in_is_asked_as_the_real_client_is() -> None:
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "repo_exists", "model_info", "upload_folder"):
        mine, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (Hub, HfApi))
        assert mine.keys() <= theirs.keys(), name


def test_a_model_is_sent_with_its_card(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub = Hub(tmp_path)
    address = push_model(RUN, "me/sums", "last", True, Console(quiet=True), hub)
    assert address == "https://hub.invalid/me/sums"
    assert hub.said == [("private", True), ("message", "step 2 of run-0.1, by ramulus")]
    sent = tmp_path / "me" / "sums"
    assert AutoTokenizer.from_pretrained(sent).eos_token_id is not None
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(sent).parameters()) > 0
    card = (sent / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "after 2 steps" in card
    assert re.search(r"\| greedy \| 1.000", card)
    assert "| branching | Segments |" in card


def test_a_card_names_a_model_of_the_hub_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    for path, named in (("Qwen/Qwen2.5-0.5B", True), (str(tmp_path / "secret"), False), ("./secret", False)):
        stage = tmp_path / "run" / "1-rl"
        stage.mkdir(parents=True, exist_ok=True)
        config = {"name": "rl", "model": {"class": "ramulus.Pretrained", "path": path}, "steps": 3}
        config |= {"tasks": {"class": "ramulus.File", "path": str(tmp_path)}}
        (stage.parent / "run.json").write_text(json.dumps({"recipe": str(tmp_path / "mine.py"), "stages": [config]}))
        report = {"problems": 9, "mean@4": 0.5, "intervals": {"mean@4": [0.25, 0.75]}}
        (stage / "evaluation-before.json").write_text(json.dumps(report | {"mean@4": 0.1}))
        (stage / "evaluation-after.json").write_text(json.dumps(report | {"step": 3}))
        card = model_card(stage, 3, "me/mine")
        assert ("base_model: Qwen/Qwen2.5-0.5B" in card) is named
        assert str(tmp_path) not in card
        assert "secret" not in card
        assert "| mean@4 | 0.100 [0.250, 0.750] | 0.500 [0.250, 0.750] |" in card
        assert "`mine.py`" in card


def test_a_card_tells_the_scores_of_the_checkpoint_that_is_sent(tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    for step in (2, 6):
        (tmp_path / "evals" / f"{step:06d}.json").write_text(json.dumps({"problems": 4, "greedy": step / 8}))
    for problems, at_2 in ((4, "| greedy | 0.125 | 0.250 |"), (9, "| greedy | 0.250 |")):  # the final evaluation's, the same or others
        for when, step, greedy in (("before", 0, 0.125), ("after", 6, 0.875)):
            (tmp_path / f"evaluation-{when}.json").write_text(json.dumps({"problems": problems, "greedy": greedy, "step": step}))
        told = {step: "\n".join(score_table(tmp_path, step)) for step in (2, 4, 6)}
        assert ("On 4 held-out" in told[2], at_2 in told[2]) == (True, True)
        assert told[4] == ""
        assert (f"On {problems} held-out" in told[6], "| greedy | 0.125 | 0.875 |" in told[6]) == (True, True)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["a b", "x/y/z", "-a", "a..b"])
def test_a_name_that_no_hub_takes_is_refused(name: str, tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    with pytest.raises(ValueError, match="give OWNER/NAME"):
        push_model(RUN, name, "last", True, Console(quiet=True), hub)
    assert hub.said == []


def test_without_a_token_nothing_is_sent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="nothing was sent"):
        hub_client()
    assert "set HF_TOKEN" in refused(capsys, "push", RUN, "me/mine")


def test_what_the_hub_says_is_told(tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx2")
    from huggingface_hub.errors import HfHubHTTPError

    class Silent(Hub):
        def create_repo(self, repo_id: str, **more: Any) -> str:
            raise httpx.ConnectError("no route to host")

    class Closed(Hub):
        def create_repo(self, repo_id: str, **more: Any) -> str:
            raise HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=httpx.Request("POST", "https://hub.invalid/")))

    hub = Hub(tmp_path)
    push_model(RUN, "me/seen", "last", False, Console(quiet=True), hub)
    before = len(hub.said)
    with pytest.raises(ValueError, match="me/seen is public, and nothing was sent: add --public"):
        push_model(RUN, "me/seen", "last", True, Console(quiet=True), hub)
    assert len(hub.said) == before
    push_model(RUN, "me/seen", "last", False, Console(quiet=True), hub)
    with pytest.raises(OSError, match="did not take me/mine: 403 Forbidden"):
        push_model(RUN, "me/mine", "last", True, Console(quiet=True), Closed(tmp_path))
    with pytest.raises(OSError, match="did not take me/mine: no route to host"):
        push_model(RUN, "me/mine", "last", True, Console(quiet=True), Silent(tmp_path))
