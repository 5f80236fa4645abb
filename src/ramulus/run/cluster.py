"""Ray: joins or starts a cluster, reserves room on it, starts samplers and ranks there. The one module that imports ray."""

from __future__ import annotations

import logging
import math
import os
import pickle
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramulus.engine.factory import engine_traits
from ramulus.engine.pool import Lost
from ramulus.learn.factory import learner_traits
from ramulus.learn.sharded.starting import start_ranks
from ramulus.learn.sharded.world import STANDING
from ramulus.native.memory import LARGE_PAGES, free_memory, free_there
from ramulus.native.processors import cores
from ramulus.run.config.ground import Ray
from ramulus.run.config.recipe import Run
from ramulus.run.interrupt import own_signals
from ramulus.run.memory.rooms import Placement
from ramulus.run.placed_engine import PlacedEngine
from ramulus.run.placed_ranks import PlacedRank, led, line_of
from ramulus.run.ray_carrier import RayCarrier
from ramulus.run.sampler import Built, RankProcess

SENT = (
    "PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", LARGE_PAGES, "TOKENIZERS_PARALLELISM", "HF_HOME", "HF_HUB_OFFLINE",
    "RAMULUS_KERNELS", "RAMULUS_VLLM_PYTHON", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
)  # fmt: skip
"""What of the driver's environment its processes on other machines have, too."""

TOKEN_REMEDY = "give this shell the head's token: RAY_AUTH_MODE=token and its ~/.ray/auth_token, or RAY_AUTH_TOKEN_PATH"
_STARTS = 3  # times that a cluster is started where it comes too late
KNOCK = 5.0  # seconds in which somebody must listen at the address of a head


def ray_library() -> Any:
    """ray; ImportError names the extra."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('cluster=Ray(...) needs ray: pip install "ramulus[ray]", the same version on all machines') from error
    return ray


@contextmanager
def connected(how: Ray | None) -> Iterator[None]:
    """Inside, this process is a driver of the cluster; one that is connected already stays so.

    Raises ImportError without ray, ConnectionError where no cluster is to be joined, each with the remedy.
    """
    if how is None or ray_library().is_initialized():
        yield
        return
    ray = ray_library()
    with own_signals():
        begin(how) if how.alone else join(how)
    try:
        yield
    finally:
        with own_signals():
            ray.shutdown()


def begin(how: Ray) -> None:
    """Start a cluster on this machine that ends with this process; it has as many CPUs as are asked of it, though cores be fewer."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    store = {"object_store_memory": how.store_mb * 2**20} if how.store_mb else {}
    cpus = max(cores(), math.ceil(how.total().get("CPU", 0.0)))
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    for left in range(_STARTS - 1, -1, -1):
        try:
            ray_library().init(address="local", num_cpus=cpus, **quiet, **store)
            return
        except Exception as error:  # a bare one where it takes longer than its 30 seconds: the machine is busy
            with suppress(Exception):
                ray_library().shutdown()
            if not left or "timed out" not in str(error):
                raise ConnectionError(f"Ray cannot start on this machine: {line_of(error)}; its logs are in /tmp/ray") from error


def join(how: Ray) -> None:
    """Become a driver of a cluster that is there. ConnectionError, with the remedy, where there is none, or one of other versions."""
    host, _, port = how.address.rpartition(":")
    remedy = "start one with `ray start --head`, check cluster.address, or leave it out for a cluster that ends with the run"
    if how.address != "auto":
        try:
            socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster answers at cluster.address={how.address} ({error.strerror or error}): {remedy}") from error
    environment = {name: os.environ[name] for name in SENT if name in os.environ}
    try:
        ray_library().init(how.address, runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.ERROR)
    except ray_library().exceptions.AuthenticationError as error:
        raise ConnectionError(f"the Ray cluster at cluster.address={how.address} wants a token: {TOKEN_REMEDY}") from error
    except (RuntimeError, ConnectionError, ValueError) as error:
        if "ersion mismatch" in str(error):
            reason = " ".join(str(error).split()).removeprefix("Version mismatch: ")
            raise ConnectionError(f"the Ray cluster at {how.address} has other versions ({reason}): install the same on all machines") from error
        why = f"cannot join the Ray cluster at cluster.address={how.address} ({line_of(error)})"
        raise ConnectionError(f"{why}: {remedy}; or {TOKEN_REMEDY}") from error


@dataclass
class Ground:
    """Room on a cluster for one stage, and what is started there."""

    how: Ray
    trainers: Any = None  # placement groups
    samplers: Any = None
    groups: list[Any] = field(default_factory=list)
    engines: list[PlacedEngine] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)  # of weights

    def reserve(self) -> None:
        """Reserve room for trainers and samplers; the first trainer is this process. ValueError where the cluster is too small or too busy."""
        ray, how = ray_library(), self.how
        there, wanted = ray.cluster_resources(), how.total()
        if any(there.get(name, 0.0) < count for name, count in wanted.items()):
            text = " and ".join(f"{count:g} {name}s" for name, count in wanted.items())
            held = " and ".join(f"{there.get(name, 0.0):g} {name}s" for name in wanted)
            raise ValueError(
                f"the run wants {text} of the Ray cluster, which has {held}: add machines with `ray start`, or lower cluster.samplers, cluster.cpus, "
                "cluster.gpus or those of the trainers"
            )
        first, then = how.bundles()
        first[0] = first[0] | {f"node:{ray.util.get_node_ip_address()}": 0.001}  # where this process is
        self.trainers = self._group(first)
        self.samplers = self._group(then) if then else self.trainers
        if how.trainer_gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:  # this process sees the GPUs of its piece alone, as those of Ray do
            asked = ray.remote(gpus_here).options(**self.options(self.trainers, 0, 0, how.trainer_gpus)).remote()
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ray.get(asked, timeout=how.patience))

    def _group(self, bundles: list[dict[str, float]]) -> Any:
        """A placement group, once it is there."""
        from ray.util.placement_group import placement_group

        group = placement_group(bundles, strategy="PACK")
        self.groups.append(group)
        if not group.wait(self.how.patience):
            raise ValueError(
                f"the Ray cluster has had no room for {bundles} within {self.how.patience:g} s: wait for what else runs there, lower what is "
                "asked for, or raise cluster.patience"
            )
        return group

    def options(self, group: Any, place: int, cpus: float, gpus: float) -> dict[str, Any]:
        """How something is started in a piece of a group."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        at = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place % len(group.bundle_specs))
        return {"num_cpus": cpus, "num_gpus": self.how.share(gpus), "scheduling_strategy": at}

    def machines(self) -> list[Placement]:
        """Where trainers and samplers are, this machine first, and what is free there."""
        ray, how = ray_library(), self.how
        here, pending = ray.get_runtime_context().get_node_id(), dict[str, Any]()
        trainers, samplers = self._nodes(self.trainers, how.trainers), self._nodes(self.samplers, how.samplers)
        for group, nodes, gpus in ((self.trainers, trainers, 0.0), (self.samplers, samplers, how.gpus)):
            for place, node in enumerate(nodes):
                if node != here or gpus:
                    pending[node] = ray.remote(free_there).options(**self.options(group, place, 0, gpus)).remote(gpus > 0)
        free = {node: ray.get(answer, timeout=how.patience) for node, answer in pending.items()}
        free[here] = (free_memory(), free.get(here, (0, 0))[1])
        return [Placement(trainers.count(node), samplers.count(node), *free[node]) for node in sorted(free, key=lambda node: node != here)]

    def _nodes(self, group: Any, count: int) -> list[str]:
        """The machines of so many that are started in the pieces of a group."""
        nodes: dict[int, str] = ray_library().util.placement_group_table(group)["bundles_to_node_id"]
        return [nodes[place % len(nodes)] for place in range(count)]

    async def engine(self, run: Run, skeleton: Any, decode: Any) -> PlacedEngine:
        """The run's engine in each sampler; `skeleton` is the model without numbers."""
        how = self.how
        threads = max(1, int(how.cpus)) if run.threads is None or how.address else run.threads
        device = "cuda" if how.gpus else "cpu"
        built = Built(run.engine, skeleton, decode, device, threads, device == "cpu")
        carrier = RayCarrier(ray_library(), lambda place: self.options(self.samplers, place, how.cpus, how.gpus), _by_value(built), decode, self.host)
        folder = self._folder() if how.weights == "files" else None
        vocabulary = int(skeleton.get_input_embeddings().num_embeddings)
        sender = engine_traits(run.engine).sender if how.weights == "direct" else None
        engine = PlacedEngine(carrier, how.samplers, vocabulary, how.timeout, how.patience, folder, how.colocated, sender)
        self.engines.append(engine)
        await engine.begin()
        if how.colocated and "sleep" not in engine.features:
            remedy = "take engine=Local(), or cluster.colocated=false"
            raise ValueError(f"colocated samplers must give their memory back, which {run.engine} cannot: {remedy}")
        return engine

    def _folder(self) -> Path:
        """The folder where weights are written for the samplers."""
        if self.how.folder:
            Path(self.how.folder).mkdir(parents=True, exist_ok=True)
        self.folders.append(Path(tempfile.mkdtemp(prefix="ramulus-weights-", dir=self.how.folder or None)).absolute())
        return self.folders[-1]

    @property
    def host(self) -> str:
        """The address of this machine for processes of the cluster."""
        return "127.0.0.1" if self.how.alone else str(ray_library().util.get_node_ip_address())

    def lead(self, seconds: float) -> None:
        """Start the further ranks in the trainers' group, and have them and this process, rank 0, stand ready for the learner."""
        how = self.how
        if how.trainers == 1:
            STANDING.append(start_ranks(1, seconds))
            return

        def start(rank: int, *where: Any) -> PlacedRank:
            options = self.options(self.trainers, rank, how.trainer_cpus, how.trainer_gpus)
            actor = ray_library().remote(RankProcess).options(**options, max_restarts=0).remote()
            return PlacedRank(ray_library(), actor, actor.serve.remote(rank, *where))

        STANDING.append(led(start, how.trainers, self.on_one(), self.host, how.alone, seconds, how.patience))

    def on_one(self) -> int:
        """Ranks that are on one machine: all, or as many as on each where they are spread evenly."""
        counts = set(Counter(self._nodes(self.trainers, self.how.trainers)).values())
        return counts.pop() if len(counts) == 1 else self.how.trainers

    def leave(self) -> None:
        """End what was started, and give the room back."""
        from ray.util.placement_group import remove_placement_group

        for world in STANDING:
            if not world.broken:
                with suppress(Exception):
                    world.tell("end", [None] * world.size)
            world.leave()
        STANDING.clear()
        for engine in self.engines:
            engine.close()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        for group in self.groups:
            with suppress(Exception):  # a cluster that is gone has no room to give back
                remove_placement_group(group)


def gpus_here() -> list[str]:
    """The GPUs that Ray gave to the process that asks."""
    return list(ray_library().get_runtime_context().get_accelerator_ids()["GPU"])


def _by_value(thing: Any) -> bytes:
    """As bytes, with the classes of a user's recipe file in them, which other processes do not have."""
    import ray.cloudpickle as pickler

    for name, module in list(sys.modules.items()):
        if name.startswith("recipe_"):
            pickler.register_pickle_by_value(module)
    return bytes(pickler.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL))


@dataclass(frozen=True)
class Placed:
    """An object that was placed on a machine of the cluster."""

    address: str
    resources: Mapping[str, float]  # that Ray counts there
    actor: Any = field(repr=False)

    def call(self, name: str, *parts: Any, seconds: float = 60.0) -> Any:
        """The answer of a method. TimeoutError where there is none in so many seconds, Lost where the machine is gone."""
        ray = ray_library()
        try:
            return ray.get(getattr(self.actor, name).remote(*parts), timeout=seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"no answer in {seconds:g} seconds") from error
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
            raise Lost(line_of(error)) from error


@contextmanager
def one_on_each(kind: type) -> Iterator[tuple[list[Placed], list[str]]]:
    """An object of this class on every machine of the cluster that this process is a driver of; and the addresses of machines that are gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray, placed, gone = ray_library(), list[Placed](), list[str]()
    for node in ray.nodes():
        if not node["Alive"]:
            gone.append(node["NodeManagerAddress"])
            continue
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        actor = ray.remote(kind).options(num_cpus=0, scheduling_strategy=where, max_restarts=0).remote()
        placed.append(Placed(node["NodeManagerAddress"], node["Resources"], actor))
    here = ray.util.get_node_ip_address()
    try:
        yield sorted(placed, key=lambda one: (one.address != here, one.address)), gone
    finally:
        for one in placed:
            ray.kill(one.actor)


def cluster_room() -> dict[str, float]:
    """What Ray counts in the whole cluster."""
    return dict(ray_library().cluster_resources())


@contextmanager
def grounded(run: Run) -> Iterator[Ground | None]:
    """Room for a stage on its cluster, if it has one."""
    if run.cluster is None:
        yield None
        return
    ground = Ground(run.cluster)
    try:
        ground.reserve()
        if (ranks := learner_traits(run.learner).ranks) is not None:
            ground.lead(ranks.timeout)
        yield ground
    finally:
        ground.leave()
