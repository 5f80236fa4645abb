"""`cluster=Ray(...)` in a recipe: where samplers and trainers are placed. Ray itself is imported by `run/cluster.py` alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ramulus.engine.factory import EngineTraits, engine_traits
from ramulus.learn.factory import learner_traits

_LONGEST = 1e9  # seconds that can be waited for


@dataclass(frozen=True)
class Ray:
    """Ray places what samples, and the further ranks of `learner=Sharded(...)`, in processes of their own: on this machine or on many.

    The process that is given the command is the driver and rank 0: it draws tasks, grows trees, grades and writes, as without a cluster. Each sampler
    is the recipe's `engine`, built in a process of its own from the model's structure; its weights come with the first load. With `ahead=0` trees and
    updates are those of one process.

    Example:
        >>> from ramulus import Ray
        >>> Ray(samplers=2, trainers=2).bundles()
        ([{'CPU': 1.0}, {'CPU': 1.0}], [{'CPU': 1.0}, {'CPU': 1.0}])
    """

    address: str = ""  # "": a cluster on this machine that ends with the run; "auto": the one that `ray start` made here; HOST:PORT: that of a head
    samplers: int = 1  # processes that sample
    cpus: float = 1.0  # of each sampler, which computes with as many threads
    gpus: float = 0.0  # of each sampler; with Vllm all that its tensor-parallel size wants
    colocated: bool = False  # samplers share the trainers' GPUs (or cores) and give their memory back while these learn
    ahead: int = 0  # steps whose trees are grown while earlier ones are learned: tokens are sampled by weights at most so many updates old
    trainers: int = 1  # ranks of learner=Sharded(...); the first is the process that was started
    trainer_cpus: float = 1.0  # of each
    trainer_gpus: float = 0.0  # of each: 1 where the run learns on GPUs
    weights: Literal["objects", "files", "direct"] = "objects"  # to samplers: by the object store, in `folder`, or straight to vLLM by engine.weights
    folder: str = ""  # that all machines see, for weights="files"; "" is a temporary one of this machine
    timeout: float = 600.0  # seconds in which a sampler must have answered something; one that has not is ended and started again
    patience: float = 600.0  # seconds for which room in the cluster, and a process that starts, are waited for
    restarts: int = 3  # times that the trainers begin again from the last checkpoint after a rank was lost
    store_mb: int = 0  # of the object store of a cluster that the run starts; 0 leaves it to Ray

    def __post_init__(self) -> None:
        for name in ("samplers", "trainers"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("cpus", "gpus", "trainer_cpus", "trainer_gpus", "ahead", "restarts", "store_mb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"cluster.{name} must be at least 0, got {getattr(self, name)}")
        if not all(0 < seconds <= _LONGEST for seconds in (self.timeout, self.patience)):
            raise ValueError(
                f"cluster.timeout and cluster.patience must be above 0 and at most {_LONGEST:g} seconds, got {self.timeout} and {self.patience}"
            )
        if self.weights not in ("objects", "files", "direct"):
            raise ValueError(f"cluster.weights is 'objects', 'files' or 'direct', got {self.weights!r}")
        if not self.cpus + self.gpus:
            raise ValueError("a sampler needs something: set cluster.cpus or cluster.gpus above 0")
        if self.trainers > 1 and not self.trainer_cpus + self.trainer_gpus:
            raise ValueError("a trainer needs something: set cluster.trainer_cpus or cluster.trainer_gpus above 0")
        if "://" in self.address:
            raise ValueError(
                f"cluster.address={self.address!r} goes by Ray's client, which moves every tree over a proxy: give the command on a machine of the "
                "cluster, with cluster.address=auto"
            )
        port = self.address.rpartition(":")[2]
        if self.address and self.address not in ("auto", "local") and not (port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"cluster.address={self.address!r} is no address: write HOST:PORT of the head (6379 is usual), or auto")
        if self.colocated and self.ahead:
            raise ValueError("colocated samplers sleep while trainers learn and grow nothing ahead: set cluster.ahead=0 or cluster.colocated=false")
        if self.colocated and self.gpus and self.samplers != self.trainers:
            raise ValueError(f"colocated samplers share a GPU each: set as many samplers as trainers, got {self.samplers} and {self.trainers}")

    @property
    def alone(self) -> bool:
        """Whether the cluster is this machine's and ends with the run."""
        return self.address in ("", "local")

    def bundles(self) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """What is reserved for trainers and for samplers, each in one piece; colocated samplers are in the trainers' pieces, by turns."""
        trainers = [_kept(self.trainer_cpus, self.trainer_gpus) for _ in range(self.trainers)]
        if not self.colocated:
            return trainers, [_kept(self.cpus, self.gpus) for _ in range(self.samplers)]
        for place in range(self.samplers):
            mine = trainers[place % self.trainers]
            mine["CPU"] = mine.get("CPU", 0.0) + self.cpus
        return [_kept(one.get("CPU", 0.0), max(self.trainer_gpus, self.gpus)) for one in trainers], []

    def total(self) -> dict[str, float]:
        """What all of it takes."""
        pieces = [piece for part in self.bundles() for piece in part]
        return _kept(sum(piece.get("CPU", 0.0) for piece in pieces), sum(piece.get("GPU", 0.0) for piece in pieces))

    def share(self, gpus: float) -> float:
        """GPUs that a sampler or a rank asks Ray for: half of those of its piece where both are in one."""
        return max(self.trainer_gpus, self.gpus) / 2 if self.colocated else gpus


def _kept(cpus: float, gpus: float) -> dict[str, float]:
    """Resources by Ray's names; none that is 0."""
    return {name: float(count) for name, count in (("CPU", cpus), ("GPU", gpus)) if count}


def _check_weights(how: Ray, engine: EngineTraits) -> None:
    """Raise ValueError where weights cannot go to samplers as they are to."""
    if how.weights == "direct":
        remedy = "take engine=Vllm(...) and set engine.weights to 'gloo' or 'nccl', or cluster.weights to 'objects'"
        if engine.sender is None:
            raise ValueError(f"cluster.weights='direct' goes from the learner straight into vLLM servers by engine.weights: {remedy}")
        if engine.servers > 1:
            raise ValueError("cluster.weights='direct' knows one vLLM server for a sampler: set cluster.samplers in place of engine.servers or urls")
    elif engine.sent_alone:
        remedy = "set cluster.weights='direct', or engine.weights to 'files', 'gloo' or 'ipc', which a sampler uses towards its server"
        raise ValueError(f"{engine.sent_alone} goes from the learner to servers, but with a cluster weights come by cluster.weights: {remedy}")


def _check_sent(run: Any) -> None:
    """Raise ValueError for a mix that a learner's processes cannot be sent."""
    from ramulus.learn.policy.children import carried

    if learner_traits(run.learner).apart:
        try:
            carried(run.mix)
        except Exception as error:  # whatever a part of somebody's own does
            raise ValueError(
                f"the mix cannot be sent to the learner's own processes ({type(error).__name__}: {error}): keep locks, open files and the like "
                "out of its parts, or set learner=torch"
            ) from error


def check_ground(run: Any) -> None:
    """Raise ValueError where a run's learner, or what its updates read, does not go with its cluster."""
    _check_sent(run)
    how: Ray | None = run.cluster
    if how is None:
        return
    engine, ranks = engine_traits(run.engine), learner_traits(run.learner).ranks
    if how.trainers > 1 and ranks is None:
        raise ValueError(f"cluster.trainers={how.trainers} are ranks of a learner over many processes: set learner=sharded, or trainers=1")
    if ranks is not None and ranks.count not in (None, how.trainers):
        raise ValueError(f"learner.ranks={ranks.count}, but cluster.trainers={how.trainers}: leave learner.ranks out, the cluster starts them")
    if how.samplers > 1 and engine.running:
        raise ValueError(
            f"cluster.samplers={how.samplers} would all load their weights into the servers of {engine.running}, each against the others: "
            "set cluster.samplers=1, or an engine that every sampler starts itself"
        )
    _check_weights(how, engine)
    if how.ahead and run.ahead:
        raise ValueError("ahead=1 grows the first round of the next trees, cluster.ahead all of them: set one of the two to 0")
