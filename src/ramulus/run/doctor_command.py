"""`ramulus doctor`: the installation, a model, or a cluster. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from tyro.conf import Positional

from ramulus.look.terminal import new_console
from ramulus.run.config.find import check_named


def doctor(
    words: Positional[tuple[str, ...]] = (),
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    cluster: bool = False,
    address: str = "",
    shared: tuple[Path, ...] = (),
) -> int:
    """Say what is installed, which device there is, what is missing and how to get it; or what would happen with a model, or on a Ray cluster.

    Example: `ramulus doctor --cluster grpo cluster.samplers=8 out=/shared/run --shared /shared`; its exit status is 2 where a run would break.

    Args:
        words: a model folder, a name on the hub, or a run; left out, the installation is looked at. With --cluster a recipe and its fields.
        dtype: of the model's weights.
        cluster: look at every machine of a Ray cluster: versions, GPUs, room, ports, shared folders, clocks.
        address: of its head, HOST:PORT; by default that of the recipe, or the cluster that `ray start` made here.
        shared: folders that all machines must see.
    """
    from rich.table import Table

    from ramulus.run.doctor import machine, packages

    console, table = new_console(), Table(box=None, show_header=False)
    if cluster:
        return look_at_cluster(words, address, shared, console)
    if len(words) > 1 or address or shared:
        raise ValueError("doctor takes one model; a recipe with its fields, --address and --shared go with --cluster")
    model = words[0] if words else None
    if model is not None:
        from ramulus.run.diagnosis import diagnose

        rows, works = diagnose(model, dtype)
        for name, text in rows:
            table.add_row(name, text.replace("[", "\\["))
        console.print(table)
        return int(not works)
    for name, version, remedy in packages():
        color = "red" if version == "missing" else "yellow" if version == "not installed" else "green"
        table.add_row(name, f"[{color}]{version}[/{color}]", remedy.replace("[", "\\["))
    for name, version in machine():
        table.add_row(name, version, "")
    console.print(table)
    return int(any(version == "missing" for _, version, _ in packages()))


def look_at_cluster(words: tuple[str, ...], address: str, shared: tuple[Path, ...], console: Console) -> int:
    """The doctor of clusters, for the recipe in `words` if one is named."""
    if words and "=" in words[0]:
        raise ValueError(f"name a recipe before {words[0]}, as in `ramulus doctor --cluster grpo {words[0]}`")
    if words:
        check_named(words[0])
    from ramulus.run.cluster_doctor import doctor_cluster
    from ramulus.run.config.resume import build

    run = build(words[0], list(words[1:]))[0][-1] if words else None
    return doctor_cluster(run, address, shared, console)
