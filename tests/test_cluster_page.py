"""docs/cluster.md: its commands are commands, its fields are fields, its files can be read."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ramulus.run.config.find import shipped
from ramulus.run.config.resume import build

PAGE = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text()
BLOCKS = [(found[1], found[2]) for found in re.finditer(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)]
SHELL = [text for kind, text in BLOCKS if kind == "bash"]


def commands() -> list[list[str]]:
    """The words of every `ramulus` command on the page, from the recipe on."""
    text = "\n".join(SHELL + [part["spec"]["entrypoint"] for part in files() if "entrypoint" in part["spec"]])
    text = re.sub(r"\\?\n", " ", re.sub(r"\\\n", " ", text).replace("&&", "\n").replace("#", "\n").replace("\n", " ; "))
    return [shlex.split(one) for one in re.findall(r"ramulus (?:train|doctor --cluster) ([^;&|\"]*)", text)]


def files() -> list[dict]:
    return [part for kind, text in BLOCKS if kind == "yaml" for part in yaml.safe_load_all(text)]


@pytest.mark.parametrize("text", SHELL, ids=range(len(SHELL)))
def test_what_is_for_a_shell_is_read_by_one(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True)


def test_the_commands_name_recipes_and_fields() -> None:
    found = [words for words in commands() if words and words[0] in shipped()]
    assert len(found) >= 6
    for words in found:
        run = build(words[0], [word for word in words[1:] if re.match(r"[\w.]+=", word)])[0][-1]
        assert run.out in ("/shared/run", "")


def test_the_job_for_kubernetes_has_heads_and_workers_alike() -> None:
    claim, job = files()
    assert (claim["kind"], job["kind"]) == ("PersistentVolumeClaim", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert workers["template"] == head["template"]
    spec = head["template"]["spec"]
    assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert cluster["rayVersion"] in (Path(__file__).parents[1] / "constraints.txt").read_text()
