"""What the doctor of clusters finds: real probes, each made to differ in one thing, so that every fault is seen and nothing else is."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run_recipe
from ramulus import Ray, Sharded
from ramulus.cli import main
from ramulus.run import cluster_doctor
from ramulus.run.cluster_doctor import Finding, Wants, look_over, print_findings, wants_of
from ramulus.run.probe import NodeReport, Probe

Change = Callable[[Any], Any]


@dataclass
class Near:
    """A probe of this process at one of its own addresses; `changes` are made to what it answers, `moved` are folders that it sees elsewhere."""

    address: str
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 2.0})
    changes: dict[str, Change] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    probe: Probe = field(default_factory=Probe)

    def call(self, name: str, *parts: Any, seconds: float = 60.0) -> Any:
        for old, new in self.moved.items():
            parts = tuple(part.replace(old, new) if isinstance(part, str) else part for part in parts)
        answer = getattr(self.probe, name)(*parts)
        return self.changes[name](answer) if name in self.changes else answer


NOBODY = Wants(Ray(), reserves=False)


def found(*others: Near, wants: Wants = NOBODY, gone: tuple[str, ...] = (), **resources: float) -> list[Finding]:
    machines = [Near("127.0.0.1"), *others]
    return list(look_over(machines, gone, resources or {"CPU": 4.0}, wants))


def beside_ok(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(one.what, one.level) for one in findings if one.level != "ok"]


@pytest.fixture(autouse=True)
def usual_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's own disk and limits are, they are not what is tested; and nobody waits for a network file system."""
    monkeypatch.setattr(cluster_doctor, "MOMENT", 0.01)
    real = Probe.look
    monkeypatch.setattr(Probe, "look", lambda self: replace(real(self), disk=10**12, files=10**6, gpus=()))


def reported(**fields: Any) -> dict[str, Change]:
    def change(report: NodeReport) -> NodeReport:
        versions = report.versions | fields.get("versions", {})
        return replace(report, **fields | {"versions": versions})

    return {"look": change}


def test_machines_that_are_alike_are_well(tmp_path: Path) -> None:
    wants = Wants(Ray(samplers=2), (tmp_path, tmp_path / "new" / "run"))
    findings = found(Near("127.0.0.2"), Near("127.0.0.3"), wants=wants)
    assert beside_ok(findings) == []
    assert {one.what for one in findings} == {"machines", "versions", "GPUs", "room", "ports", "paths", "clocks"}
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    console = Console(file=io.StringIO(), width=150)
    assert print_findings(findings, console) == 0
    assert "nothing that would break a run was found" in console.file.getvalue()  # type: ignore[attr-defined]


def old_python(report: NodeReport) -> NodeReport:
    return replace(report, versions=report.versions | {"python": report.versions["python"].rpartition(".")[0] + ".99"})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (reported(versions={"torch": "2.11.0"}), [("torch", "fault")]),
        (reported(versions={"transformers": ""}), [("transformers", "fault")]),
        (reported(versions={"ray": "2.50.0", "ramulus": "0.0.1"}), [("ramulus", "fault"), ("ray", "fault")]),
        (reported(versions={"python": "3.9.1"}), [("python", "fault")]),
        ({"look": old_python}, [("python", "note")]),
        (reported(sources="0"), [("ramulus", "fault")]),
        (reported(disk=10**9), [("disk", "note")]),
        (reported(files=1024), [("limits", "note")]),
        (reported(processor="another one"), [("processors", "note")]),
        (reported(gpus=("H100, 80 GiB, driver 1",)), [("GPUs", "note")]),
        ({"clock": lambda now: now + 5}, [("clocks", "note")]),
        ({"clock": lambda now: now - 100}, [("clocks", "fault")]),
    ],
)
def test_what_differs_is_found_and_nothing_else(changes: dict[str, Change], expected: list[tuple[str, str]]) -> None:
    findings = found(Near("127.0.0.2"), Near("127.0.0.3", changes=changes))
    assert beside_ok(findings) == expected
    for one in findings:
        assert one.level == "ok" or one.where in ("127.0.0.3", "all")
        assert bool(one.remedy) == (one.level != "ok")


def closed(port: int) -> int:
    with socket.socket() as room:
        room.bind(("127.0.0.1", 0))
        return int(room.getsockname()[1])


def test_a_port_that_is_shut_is_named_from_every_side() -> None:
    findings = [one for one in found(Near("127.0.0.2", changes={"listen": closed})) if one.what == "ports"]
    assert [(one.where, one.level) for one in findings] == [("127.0.0.1 to 127.0.0.2", "fault")]
    assert "firewall" in findings[0].remedy


def test_somebody_else_at_a_port_is_no_answer() -> None:
    def answer() -> None:
        while True:
            visitor, _ = other.accept()
            with visitor:
                visitor.sendall(b"SSH-2.0")

    with socket.create_server(("127.0.0.2", 0)) as other:
        threading.Thread(target=answer, daemon=True).start()
        findings = found(Near("127.0.0.2", changes={"listen": lambda port: other.getsockname()[1]}))
    assert beside_ok(findings) == [("ports", "fault")]
    assert "somebody else answers" in next(one.observation for one in findings if one.level == "fault")


def test_a_folder_that_is_not_shared_is_found(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir(), theirs.mkdir()
    private = Near("127.0.0.2", moved={str(mine): str(theirs)})
    findings = found(private, wants=Wants(Ray(), (mine,), reserves=False))
    assert beside_ok(findings) == [("paths", "fault"), ("paths", "fault")]  # neither reads what the other writes
    missing = Near("127.0.0.2", moved={str(mine): str(tmp_path / "nowhere")})
    findings = found(missing, wants=Wants(Ray(), (mine,), reserves=False))
    assert [one.observation.partition(": ")[2] for one in findings if one.level == "fault"] == [
        "what 127.0.0.1 writes is not read (No such file or directory)", "No such file or directory",
    ]  # fmt: skip
    assert [*mine.iterdir(), *theirs.iterdir()] == []


def test_which_folders_a_run_shares(tmp_path: Path) -> None:
    run = replace(run_recipe.rl(), out=str(tmp_path / "run"), learner=Sharded())
    assert wants_of(None, Ray(), []) == Wants(Ray(), reserves=False)
    assert wants_of(run, Ray(), [tmp_path]).shared == (tmp_path,)
    assert wants_of(run, Ray(trainers=2), []).shared == (run.folder.absolute(),)
    files = Ray(weights="files", folder=str(tmp_path))
    assert wants_of(run, files, []).shared == (tmp_path,)
    assert ("paths", "fault") in beside_ok(found(Near("127.0.0.2"), wants=Wants(Ray(weights="files"), reserves=False)))


def test_room_and_gpus_that_a_run_wants() -> None:
    wants = Wants(Ray(samplers=8, gpus=1))
    findings = found(Near("127.0.0.2", {"CPU": 2.0, "GPU": 8.0}), wants=wants, CPU=4.0, GPU=8.0)
    assert beside_ok(findings) == [("GPUs", "fault"), ("room", "fault")]
    assert "0 GPUs by nvidia-smi, 8 by Ray" in [one.observation for one in findings]
    narrow = Near("127.0.0.2", {"GPU": 1.0}, reported(gpus=("H100, 80 GiB, driver 1",), cuda=""))
    findings = found(narrow, wants=wants, CPU=40.0, GPU=8.0)
    assert [one.observation for one in findings if one.level == "fault"] == ["torch is a build for CPUs"]


def test_machines_that_are_gone_or_silent_are_named() -> None:
    def silent(answer: Any) -> Any:
        raise TimeoutError("no answer in 120 seconds")

    findings = found(Near("127.0.0.2", changes={"look": silent}), gone=("10.0.0.9",))
    assert beside_ok(findings) == [("machines", "note"), ("machines", "fault")]
    assert findings[0].where == "10.0.0.9"
    assert "no answer in 120 seconds" in findings[1].observation


def test_gpus_are_those_of_nvidias_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ramulus.run.probe import gpus

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 550.54.15'\necho 'NVIDIA H100 80GB HBM3, 81559, 550.54.15'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpus() == ("NVIDIA H100 80GB HBM3, 80 GiB, driver 550.54.15",) * 2
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a", "b"), "doctor takes one model"),
        (("--shared", "/tmp"), "go with --cluster"),
        (("--cluster", "cluster.samplers=8"), "name a recipe before cluster.samplers=8"),
        (("--cluster", "grpoo"), "there is no recipe 'grpoo'"),
        (("--cluster", "--address", "nowhere"), "cluster.address='nowhere' is no address: write HOST:PORT"),
        (("--cluster", "--address", f"127.0.0.1:{closed(0)}"), "no Ray cluster answers at cluster.address=127.0.0.1:"),
    ],
)
def test_what_cannot_be_looked_at_is_one_sentence(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="ray is not installed here")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert error.count("\n") == 1
