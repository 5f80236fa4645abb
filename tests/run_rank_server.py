"""A process that has imported everything and forks two ranks a run, as torchrun starts them, one of which kills itself at a chosen moment.

As torchrun with one restart does: a rank that ends badly ends the other, and both begin again with the same store. `python run_rank_server.py`,
then a line of JSON for each run on standard input; the answers, the statuses of each life's ranks, come on standard output.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from typing import Any

import torch
import torch._dynamo
import torch.distributed.checkpoint
from torch.distributed import TCPStore

import ramulus.learn.policy.torch_learner
import ramulus.learn.sharded.sharded_learner
import ramulus.run.evaluation.final_evaluation
import ramulus.run.launch  # noqa: F401
from ramulus.cli import main
from run_killed_rank import arm

LONGEST = 60.0  # seconds of a life, which takes some three: a rank that is still there then says where


def rank(number: int, life: int, port: int, ask: dict[str, Any]) -> None:
    """One rank of a life, in a process of its own."""
    log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(life),
    }  # fmt: skip
    if number == ask["rank"] and life == 0:
        arm(ask["moment"], ask["number"])
    main(["train", *ask["words"]])


def lived(life: int, port: int, ask: dict[str, Any]) -> list[int]:
    """The statuses of a life's ranks."""
    here: dict[int, int] = {}
    for number in range(2):
        process = os.fork()
        if not process:
            rank(number, life, port, ask)
            os._exit(70)  # the command ends the process itself
        here[process] = number
    statuses, began = [0, 0], time.monotonic()
    while here:
        time.sleep(0.02)
        for process in list(here):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[here.pop(process)] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() - began > LONGEST
        if here and (late or any(statuses)):
            time.sleep(1)
            if late:
                for process in here:
                    os.kill(process, signal.SIGUSR1)
                time.sleep(2)
            for process in here:
                os.kill(process, signal.SIGKILL)
    return statuses


def store_of_a_run() -> tuple[int, int]:
    """The process that keeps it, as torchrun does, and its port; no rank inherits it."""
    read, write = os.pipe()
    keeper = os.fork()
    if not keeper:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        signal.pause()
    port = int(os.read(read, 16))
    os.close(read)
    os.close(write)
    return keeper, port


def serve() -> None:
    """Runs, one after the other."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        keeper, port = store_of_a_run()
        lives = [lived(0, port, ask)]
        if any(lives[0]):
            lives.append(lived(1, port, ask))
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
        print(json.dumps(lives), flush=True)


if __name__ == "__main__":
    serve()
