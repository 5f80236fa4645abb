"""Runs on a cluster whose processes are killed or hang at random moments, each compared with one that nobody disturbed.

`python tests/run_cluster_kills.py FOLDER [MOMENTS] [SEED]` writes a line of FOLDER/moments.jsonl for every moment and goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ramulus.core import run_folder
from ramulus.look.cost.account import FATES

HERE = Path(__file__).parent
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)]), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_DEDUP_LOGS": "0",
}  # fmt: skip
STEPS = 8
WORDS = [
    f"steps={STEPS}", "save_every=1", "cluster=ray", "cluster.samplers=2", "cluster.trainers=2", "learner=sharded", "cluster.timeout=4",
    "cluster.patience=60", "cluster.store_mb=100", "cluster.restarts=9",
]  # fmt: skip
KINDS = {  # what is struck: how its process is called, and by which signal
    "sampler": ("ray::SamplerProcess", signal.SIGKILL),
    "hung sampler": ("ray::SamplerProcess", signal.SIGSTOP),
    "rank": ("ray::RankProcess", signal.SIGKILL),
    "driver": ("", signal.SIGKILL),
    "raylet": ("raylet/raylet", signal.SIGKILL),
    "head": ("gcs_server", signal.SIGKILL),
}
MEASURED = ("seconds", "cpu_seconds", "gpu", "memory", "rss", "prefilled", "prefix_reused", "rows", "reserved", "peak", "disk")


def of_ray(process: int) -> list[str]:
    """The names of Ray's processes below one; its folder stands in the paths of a server of forks, too."""
    return [name for name in below(process).values() if "ray" in name and "multiprocessing.forkserver" not in name]


def below(process: int) -> dict[int, str]:
    """The processes below one, and what they are called."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "stat").read_text().rpartition(")")[2].split()
            names[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words[0] != "Z":
            parents[int(path.name)] = int(words[1])
    found = {process}
    for _ in range(8):
        found |= {child for child, parent in parents.items() if parent in found}
    return {child: names[child] for child in found - {process} if child in names}


def start(variant: str, out: Path) -> subprocess.Popen[bytes]:
    """A run, or what is left of it."""
    command = [sys.executable, "-m", "ramulus", "train", f"{HERE / 'run_cluster.py'}:{variant}", *WORDS, f"out={out}", "--resume"]
    env = ENV | {"RAMULUS_TEST_LAST_STEP": str(last_step(out))}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def rows(out: Path) -> list[dict[str, Any]]:
    """The metrics."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def end(process: subprocess.Popen[bytes], family: set[int]) -> list[str]:
    """See to it that nothing of a run is left; what had not ended by itself within 20 seconds."""
    deadline = time.monotonic() + 20.0
    while (left := {one for one in family if Path(f"/proc/{one}").exists() and status(one) != "Z"}) and time.monotonic() < deadline:
        time.sleep(0.2)
    stayed = []
    for one in left:
        stayed.append(f"{Path(f'/proc/{one}/cmdline').read_bytes().replace(bytes(1), b' ').decode(errors='replace')[:60]} ({status(one)})")
        os.kill(one, signal.SIGKILL)
    process.wait()
    return stayed


def status(process: int) -> str:
    """Z: it has ended and nobody asked how; T: it is stopped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def may_begin(out: Path, step: int) -> None:
    """The last step that a run may begin: see Held in run_cluster.py."""
    part = last_step(out).with_suffix(".part")
    part.write_text(str(step))
    part.replace(last_step(out))


def last_step(out: Path) -> Path:
    """The file that says so."""
    return out.parent / f"{out.name}.last"


def strike(process: subprocess.Popen[bytes], out: Path, kind: str, dice: random.Random, later: int) -> dict[str, Any] | None:
    """Wait for a moment, and strike; None where the run ended before. It goes no farther meanwhile than leaves room for `later` blows."""
    name, number = KINDS[kind]
    latest = STEPS - 2 * (later + 1)
    step, share = max(len(rows(out)), min(len(rows(out)) + dice.randint(0, 2), latest)), dice.random()
    may_begin(out, step + 1)
    while process.poll() is None:
        if len(rows(out)) >= step and (out / "run.json").exists():
            time.sleep(share)
            there = below(process.pid)
            victims = sorted(one for one, called in there.items() if name and name in called) if name else [process.pid]
            if victims and process.poll() is None:
                victim = victims[dice.randrange(len(victims))]
                os.kill(victim, number)
                return {"kind": kind, "process": victim, "step": len(rows(out)) + 1}
        time.sleep(0.05)
    return None


def story(variant: str, out: Path, kinds: Sequence[str], dice: random.Random) -> list[dict[str, Any]]:
    """A run to its end, struck once in each of these ways, begun again whenever it ended early."""
    struck: list[dict[str, Any]] = []
    left, lives = list(kinds), 0
    while True:
        process, lives = start(variant, out), lives + 1
        try:
            life(process, out, left, struck, dice)
        except BaseException:
            family = set(below(process.pid))
            process.kill()
            end(process, family)
            raise
        if process.returncode == 0:
            return struck
        if lives > 3 * len(kinds) + 3:
            raise RuntimeError(f"the run in {out} does not end: see {out}.log")


def life(process: subprocess.Popen[bytes], out: Path, left: list[str], struck: list[dict[str, Any]], dice: random.Random) -> None:
    """One process of a run to its end, struck in the ways that are left."""
    family: set[int] = set()
    while left and process.poll() is None:
        blow = strike(process, out, left[0], dice, len(left) - 1)
        if blow is None:
            break
        family |= set(below(process.pid))
        began, done = time.monotonic(), len(rows(out))
        left.pop(0)
        may_begin(out, done + 1 if left else STEPS)
        while process.poll() is None and len(rows(out)) <= done:  # it goes on, or it ends
            family |= set(below(process.pid))
            time.sleep(0.2)
        struck.append(blow | {"run": out.name, "seconds": round(time.monotonic() - began, 1), "status": process.poll()})
    while process.poll() is None:
        family |= set(below(process.pid))
        time.sleep(0.5)
    stayed = end(process, family)
    if stayed and struck:
        struck[-1]["stayed"] = stayed


def wrong_with(whole: Path, out: Path) -> list[str]:
    """What of a run is not as in the one that nobody disturbed, and which identities of its ledger do not hold."""
    found = []
    mine, theirs = rows(out), rows(whole)
    if [row["step"] for row in mine] != list(range(1, STEPS + 1)):
        found.append(f"steps {[row['step'] for row in mine]}")
    for row, other in zip(mine, theirs):
        plain, known = ({name: value for name, value in r.items() if not name.startswith(MEASURED)} for r in (row, other))
        found += [f"step {row['step']}: {name} {plain.get(name)} and {known[name]}" for name in known if plain.get(name) != known[name]]
        if row["sampled"] != sum(row[name] for name in FATES) or row["engine_sampled"] != row["sampled"] or row["thrown_away"]:
            found.append(f"step {row['step']}: its tokens do not add up")
        if row["trained"] != row["trained_policy"] + row["trained_expert"] + row["repeated"]:
            found.append(f"step {row['step']}: what it trained does not add up")
    for path in sorted((whole / "trees").iterdir()):
        if not (out / "trees" / path.name).exists() or (out / "trees" / path.name).read_bytes() != path.read_bytes():
            found.append(f"{path.name} differs")
    one, other = (load_file(run_folder.path_of(folder, STEPS) / "model" / "model.safetensors") for folder in (whole, out))
    return found + [f"the weights {name} differ" for name in one if not bool((one[name] == other[name]).all())]


def main(folder: Path, moments: int, seed: int) -> int:
    """Strike so many times, over as many runs as it takes; the number of runs that did not end as they should."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "moments.jsonl"
    number, bad = 0, 0
    done = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    while sum(len(line["struck"]) for line in done) < moments:
        number = len(done)
        dice, variant = random.Random(f"{seed}/{number}"), ("held", "held_treepo")[number % 2]
        whole = folder / f"whole-{variant}"
        if not (whole / "summary.json").exists():
            story(variant, whole, (), dice)
        shutil.rmtree(folder / f"run-{number}", ignore_errors=True)  # it was not ended
        order = dice.sample(list(KINDS), 3)
        struck = story(variant, folder / f"run-{number}", order[: moments - sum(len(line["struck"]) for line in done)], dice)
        wrong = wrong_with(whole, folder / f"run-{number}")
        bad += bool(wrong)
        done.append({"run": number, "variant": variant, "struck": struck, "wrong": wrong})
        with told.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    return bad + sum(bool(line["wrong"]) for line in done[:number])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = [*sys.argv[1:], "30", "0"][:3]
    sys.exit(main(Path(arguments[0]), *map(int, arguments[1:])))
