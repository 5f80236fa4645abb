"""TRL's GRPOTrainer, held before each step until it is told to go on. Runs in TRL's environment; speaks JSON lines.

Started with the path of a JSON file of settings: `model` (a folder), `rows` (JSON lines with prompt and answer, in the order of use),
`reward` (chain, digits or boxed), `prompts`, `width`, `micro` (sequences of a forward and backward pass), `response`, `exact` (every response has
the full length), `rates` (learning rate of each step), `loss`, `clip` (low, high), `dtype`,
`half` (products in bfloat16), `device`, `betas`, `threads`, `seed`, `out`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the task's grader imports the standard library only


def say(channel: Any, content: dict[str, Any]) -> None:
    """One line to whoever started this process."""
    channel.write(json.dumps(content) + "\n")
    channel.flush()


def reward_of(kind: str, ends: int) -> Any:
    """A reward function as TRL calls it; `ends` is the EOS token."""
    if kind == "digits":

        def digits(completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [sum(ids) % 10 / 10 for ids in completion_ids]

        return digits
    if kind == "boxed":
        from ramulus.tasks.answers import LastBox
        from ramulus.tasks.equality import same

        box = LastBox()

        def boxed(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
            found = [box(turns[-1]["content"]) for turns in completions]
            return [float(said is not None and bool(same(said, right))) for said, right in zip(found, answer, strict=True)]

        return boxed
    from ramulus.core.task import Path as Response
    from ramulus.core.task import Task
    from ramulus.tasks.chain import ChainAnswer

    grade = ChainAnswer()

    def chain(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        scores = []
        for text, ids, right in zip(completions, completion_ids, answer, strict=True):
            finish = "eos" if ids and ids[-1] == ends else "length"
            scores.append(grade(Task("", (), "", right), Response(text, tuple(ids), finish))["reward"])
        return scores

    return chain


def build(chosen: dict[str, Any]) -> Any:
    """The trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    total = chosen["prompts"] * chosen["width"]
    accumulation = total // chosen["micro"]
    tokenizer = AutoTokenizer.from_pretrained(chosen["model"])
    rows = [json.loads(line) for line in Path(chosen["rows"]).read_text().splitlines()]
    length = {"min_new_tokens": chosen["response"]} if chosen["exact"] else {}
    half = chosen["half"]
    config = GRPOConfig(
        output_dir=chosen["out"], use_cpu=chosen["device"] == "cpu", bf16=half, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=chosen["micro"], gradient_accumulation_steps=accumulation, num_generations=chosen["width"],
        max_completion_length=chosen["response"], temperature=1.0, generation_kwargs=length, shuffle_dataset=False, beta=0.0,
        loss_type=chosen["loss"], epsilon=chosen["clip"][0], epsilon_high=chosen["clip"][1], scale_rewards="group",
        learning_rate=max(chosen["rates"]), max_steps=len(chosen["rates"]), adam_beta1=chosen["betas"][0], adam_beta2=chosen["betas"][1],
        weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", seed=chosen["seed"], model_init_kwargs={"dtype": chosen["dtype"]},
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    reward = reward_of(chosen["reward"], tokenizer.eos_token_id)
    return GRPOTrainer(
        chosen["model"], reward, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


class Gate:
    """Stands where every step begins: answers for the step before, then does what it is asked until a step is wanted."""

    def __init__(self, trainer: Any, channel: Any) -> None:
        self.trainer, self.channel = trainer, channel
        self.start: float | None = None
        self.counted = {"rows": 0, "tokens": 0}
        self.check: str | None = None
        self.seen: dict[str, torch.Tensor] = {}
        self.inner, trainer._compute_loss = trainer._compute_loss, self.loss
        self.clip, trainer.accelerator.clip_grad_norm_ = trainer.accelerator.clip_grad_norm_, self.clipped

    def loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's loss, its rows and tokens counted."""
        mask = inputs["completion_mask"]
        self.counted["rows"] += len(mask)
        self.counted["tokens"] += int(mask.sum())
        if self.check:
            names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
            part = sum(name.endswith("/advantages") for name in self.seen)
            self.seen |= {f"{part}/{name}": inputs[name].detach().cpu().clone() for name in names}
        return self.inner(model, inputs)

    def clipped(self, parameters: Any, *others: Any, **options: Any) -> Any:
        """TRL's clipping; where a check was asked for, the gradients before it are kept."""
        if self.check:
            from safetensors.torch import save_file

            grads = {f"grad/{name}": p.grad.detach().cpu().clone() for name, p in self.trainer.model.named_parameters()}
            save_file(self.seen | grads, self.check)
            self.check, self.seen = None, {}
        return self.clip(parameters, *others, **options)

    def wait(self) -> None:
        """Say what the last step took, then obey until there is to be another."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.start is not None:
            history = self.trainer.state.log_history
            told = {"reward": history[-1].get("reward")} if history else {}
            say(self.channel, {"seconds": time.perf_counter() - self.start, "spent": time.process_time()} | self.counted | told)
        self.counted = {"rows": 0, "tokens": 0}
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "step":
                self.start = time.perf_counter()
                return
            if asked["do"] == "save":
                from safetensors.torch import save_file

                save_file(
                    {n: p.detach().cpu().clone() for n, p in self.trainer.model.named_parameters()}, asked["path"]
                )
            if asked["do"] == "check":
                self.check = asked["path"]
            say(self.channel, {"done": asked["do"], "spent": time.process_time()})
        os._exit(0)  # nobody asks any more


def main() -> None:
    """Build the trainer and run it, step by step."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not mix with the answers
    chosen = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(chosen["threads"])
    import transformers
    import trl
    from transformers import TrainerCallback

    trainer = build(chosen)
    rates = chosen["rates"]
    trainer.create_optimizer()
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: rates[min(step, len(rates) - 1)] / max(rates))
    gate = Gate(trainer, channel)
    first = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if gate.start is None:
                say(channel, first | {"threads": torch.get_num_threads()})
            gate.wait()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            gate.wait()

    trainer.add_callback(Steps())
    trainer.train()


if __name__ == "__main__":
    main()
