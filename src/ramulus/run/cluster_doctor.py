"""`ramulus doctor --cluster`: what would break a long run on a cluster, looked for on each of its machines before the run begins."""

from __future__ import annotations

import secrets
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.table import Table

from ramulus.run.config.ground import Ray
from ramulus.run.probe import NodeReport

APART, FAR = 1.0, 30.0  # seconds between two clocks that are worth a note, and that are a fault
FEW_FILES = 4096
LITTLE_DISK = 5e9  # bytes
MOMENT = 0.5  # seconds until a file that was not seen is looked for again
NEIGHBOURS = 4  # machines that each one knocks at, beside the first
STYLES = {"ok": "green", "note": "yellow", "fault": "bold red"}


class Probed(Protocol):
    """A Probe on a machine of the cluster."""

    @property
    def address(self) -> str: ...

    @property
    def resources(self) -> Any: ...

    def call(self, name: str, *parts: Any, seconds: float = 60.0) -> Any: ...


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, where, how it is, and what helps; a fault would break a run."""

    what: str
    where: str
    level: Literal["ok", "note", "fault"]
    observation: str
    remedy: str = ""


@dataclass(frozen=True)
class Wants:
    """What a run asks of its cluster."""

    how: Ray
    shared: tuple[Path, ...] = ()  # folders that all machines must see
    reserves: bool = True  # false: no run is meant

    @property
    def with_gpus(self) -> bool:
        """Whether it computes on GPUs."""
        return self.how.total().get("GPU", 0.0) > 0


def wants_of(run: Any, how: Ray, shared: Sequence[Path]) -> Wants:
    """What a run asks, or nobody's; `shared` are paths beside its own that must be seen by all."""
    own = [Path(how.folder)] if how.weights == "files" and how.folder else []
    if run is not None and how.trainers > 1:
        own.append(run.folder)  # each rank writes its shards there
    return Wants(how, tuple(path.absolute() for path in dict.fromkeys([*shared, *own])), run is not None)


def look_over(machines: Sequence[Probed], gone: Sequence[str], resources: dict[str, float], wants: Wants) -> Iterator[Finding]:
    """Everything that is found, worst last within each check. The first machine is the one the run is started on."""
    reports: dict[str, NodeReport] = {}
    for address in gone:
        yield Finding("machines", address, "note", "was in the cluster and is gone", "start it again with `ray start`, or go on without it")
    for machine in machines:
        try:
            reports[machine.address] = machine.call("look", seconds=120.0)
        except (OSError, RuntimeError) as error:
            remedy = "look at Ray's logs there, /tmp/ray/session_latest/logs; ramulus must be importable by the Python that `ray start` was given"
            yield Finding("machines", machine.address, "fault", f"does not answer: {error}", remedy)
    alive = [machine for machine in machines if machine.address in reports]
    if not alive:
        return
    yield Finding("machines", _names(reports), "ok", ", ".join(f"{report.host} with {report.cores} cores" for report in reports.values()))
    yield from compared_versions(reports)
    yield from hardware(alive, reports, wants)
    if wants.reserves:
        yield from room(resources, wants)
    yield from ports(alive)
    yield from shared_paths(alive, wants)
    yield from clocks(alive)


def compared_versions(reports: dict[str, NodeReport]) -> Iterator[Finding]:
    """Python, torch, transformers, ray and ramulus itself, against the first machine's."""
    first = next(iter(reports.values()))
    remedy = "install the same on all machines (`pip install -c constraints.txt`), then `ray stop` and `ray start` there"
    same = True
    for name in first.versions:
        for address, report in list(reports.items())[1:]:
            mine, other = first.versions[name], report.versions[name]
            if mine == other:
                continue
            same = False
            patch = name == "python" and mine.rpartition(".")[0] == other.rpartition(".")[0]
            yield Finding(name, address, "note" if patch else "fault", f"{other or 'not installed'} here, {mine or 'not installed'} there", remedy)
    for address, report in list(reports.items())[1:]:
        if report.sources != first.sources and report.versions["ramulus"] == first.versions["ramulus"]:
            same = False
            text = "the same version with other sources than the first machine's"
            yield Finding("ramulus", address, "fault", text, "copy the same sources to all machines; PYTHONPATH is sent along")
    if same:
        alike = ", ".join(f"{name} {version}" for name, version in first.versions.items() if version)
        yield Finding("versions", _names(reports), "ok", alike)


def hardware(machines: Sequence[Probed], reports: dict[str, NodeReport], wants: Wants) -> Iterator[Finding]:
    """GPUs as NVIDIA's tool, Ray and torch see them; processors, memory and limits."""
    for machine in machines:
        report, counted = reports[machine.address], int(machine.resources.get("GPU", 0))
        if len(report.gpus) != counted:
            level: Literal["note", "fault"] = "fault" if wants.with_gpus else "note"
            text = f"{len(report.gpus)} GPUs by nvidia-smi, {counted} by Ray"
            remedy = f"`ray start ... --num-gpus {len(report.gpus)}` there, and look at CUDA_VISIBLE_DEVICES"
            yield Finding("GPUs", machine.address, level, text, remedy)
        elif report.gpus and not report.cuda:
            level = "fault" if wants.with_gpus else "note"
            yield Finding("GPUs", machine.address, level, "torch is a build for CPUs", "install torch's CUDA build there")
        else:
            yield Finding("GPUs", machine.address, "ok", "; ".join(report.gpus) or "none")
        if report.disk < LITTLE_DISK:
            text = f"{report.disk / 1e9:.1f} GB free for temporary files"
            yield Finding("disk", machine.address, "note", text, "free some, or point TMPDIR and `ray start --temp-dir` elsewhere")
        if 0 < report.files < FEW_FILES:
            text = f"a process may have {report.files} files open"
            yield Finding("limits", machine.address, "note", text, "`ulimit -n 65536` before `ray start`")
    kinds = defaultdict(list)
    for address, report in reports.items():
        kinds[report.processor].append(address)
    if len(kinds) > 1 and not wants.with_gpus:
        text = "; ".join(f"{kind.splitlines()[-1].partition(':')[2].strip() or kind}: {', '.join(places)}" for kind, places in kinds.items())
        yield Finding("processors", "all", "note", text, "trees repeat token for token on equal processors alone")


def room(resources: dict[str, float], wants: Wants) -> Iterator[Finding]:
    """What Ray counts against what the run reserves."""
    for name, count in wants.how.total().items():
        there = resources.get(name, 0.0)
        text = f"{there:g} {name}s in the cluster, the run reserves {count:g}"
        remedy = "add machines with `ray start`, or lower cluster.samplers, cluster.cpus, cluster.gpus or those of the trainers"
        yield Finding("room", "all", "ok", text) if there >= count else Finding("room", "all", "fault", text, remedy)


def ports(machines: Sequence[Probed]) -> Iterator[Finding]:
    """Whether each machine reaches a new port of the first, and of the next few: samplers, ranks and weights use ports that the system gives."""
    doors, shut = {}, 0
    for machine in machines:
        with suppress(OSError, RuntimeError):
            doors[machine.address] = int(machine.call("listen", machine.address))
    addresses = list(doors)
    for i, machine in enumerate(machines):
        near = [addresses[(i + step) % len(addresses)] for step in range(1, NEIGHBOURS + 1)] if addresses else []
        others = [address for address in dict.fromkeys([*addresses[:1], *near]) if address != machine.address]
        answer = _answer_of(machine, "knock", [(address, doors[address]) for address in others])
        for address, why in zip(others, answer if isinstance(answer, list) else [answer] * len(others), strict=True):
            shut += bool(why)
            if why:
                remedy = "let all ports above 1023 through between the machines, in their firewalls or network policy"
                yield Finding("ports", f"{machine.address} to {address}", "fault", f"port {doors[address]}: {why}", remedy)
    if not shut and len(machines) > 1:
        yield Finding("ports", "all", "ok", f"{len(doors)} machines reach each other at ports that were free")


def shared_paths(machines: Sequence[Probed], wants: Wants) -> Iterator[Finding]:
    """Whether what one machine writes in a folder is read by all."""
    how = wants.how
    if how.weights == "files" and not how.folder and len(machines) > 1:
        remedy = "set cluster.folder to a folder that all machines see, or cluster.weights=objects"
        yield Finding("paths", "all", "fault", "weights go by files in a temporary folder of one machine", remedy)
    for path in wants.shared:
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        for writer in machines[:2]:  # the first, and one other
            token = secrets.token_hex(8)
            file = str(there / f".ramulus-{token}")
            why = _answer_of(writer, "write", file, token)
            if why:
                yield Finding("paths", writer.address, "fault", f"{path} cannot be written: {why}", "mount it there, writable for this user")
                continue
            lost = [(one.address, content) for one in machines if (content := _settled(one, file, token)) != token]
            _answer_of(writer, "remove", file)
            for address, content in lost:
                text = f"{path}: what {writer.address} writes is not read ({content.removeprefix('!') or 'empty'})"
                yield Finding("paths", address, "fault", text, "mount one file system there on all machines, or choose another folder")
            if not lost:
                yield Finding("paths", writer.address, "ok", f"{path}: what is written is read by all")


def _settled(machine: Probed, file: str, token: str) -> str:
    """What a machine reads in a file; network file systems take a moment."""
    content = ""
    for _ in range(4):
        content = str(_answer_of(machine, "read", file))
        if content == token:
            break
        time.sleep(MOMENT)
    return content


def clocks(machines: Sequence[Probed]) -> Iterator[Finding]:
    """How far each clock is from the first machine's, from the quickest of some calls."""
    offsets = {machine.address: _offset(machine) for machine in machines}
    known = {address: offset for address, offset in offsets.items() if offset is not None}
    if not known:
        return
    middle = known.get(machines[0].address, statistics.median(known.values()))
    bad = {address: offset - middle for address, offset in known.items() if abs(offset - middle) > APART}
    for address, off in bad.items():
        level: Literal["note", "fault"] = "fault" if abs(off) > FAR else "note"
        text = f"{off:+.1f} s from the first machine's: times in logs and of files disagree"
        yield Finding("clocks", address, level, text, "`timedatectl set-ntp true` there, or chrony")
    if not bad:
        yield Finding("clocks", "all", "ok", f"within {max(abs(offset - middle) for offset in known.values()):.2f} s")


def _offset(machine: Probed) -> float | None:
    """Seconds that a machine's clock is ahead of this process's; None where it does not answer."""
    offsets = []
    for _ in range(3):
        began = time.time()
        clock = _answer_of(machine, "clock")
        if not isinstance(clock, float):
            return None
        took = time.time() - began
        offsets.append((took, clock - began - took / 2))
    return min(offsets)[1]


def _answer_of(machine: Probed, name: str, *parts: Any) -> Any:
    """What a machine answers; why it does not, as text."""
    try:
        return machine.call(name, *parts)
    except (OSError, RuntimeError) as error:
        return f"!no answer: {error}"


def _names(reports: Iterable[str]) -> str:
    """Addresses, not too many."""
    names = list(reports)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def print_findings(findings: Iterable[Finding], console: Console) -> int:
    """A table of them; 2 where something would break a run, else 0."""
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "machine", "found", "what helps"):
        table.add_column(column, overflow="fold")
    faults = 0
    for one in findings:
        faults += one.level == "fault"
        style = STYLES[one.level]
        table.add_row(one.what, f"[{style}]{one.level}[/{style}]", one.where, *(text.replace("[", "\\[") for text in (one.observation, one.remedy)))
    console.print(table)
    text = f"{faults} fault{'s' * (faults != 1)} would break a run" if faults else "nothing that would break a run was found"
    console.print(text, highlight=False)
    return 2 if faults else 0


def doctor_cluster(run: Any, address: str, shared: Sequence[Path], console: Console) -> int:
    """Look at a cluster, for a run or for nobody. Raises what joining it raises."""
    from ramulus.run.cluster import cluster_room, connected, one_on_each
    from ramulus.run.probe import Probe

    how = getattr(run, "cluster", None) or Ray()
    how = replace(how, address=address or how.address or "auto")
    with connected(how), one_on_each(Probe) as (machines, gone):
        return print_findings(look_over(machines, gone, cluster_room(), wants_of(run, how, shared)), console)
