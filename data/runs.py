"""A run's directory: its settings, metrics and checkpoints, and how a run goes on after it was stopped.

    config.json         the settings and what else is needed to repeat the run
    metrics.jsonl       the same as its first line, then a line for each logged step and each validation
    best/, last/        adapters
    state.safetensors   the checkpoint: the adapter, the optimizer's moments, and where the run stands
    training.json       the results

The checkpoint is one file, replaced as a whole, so that a new adapter never stands beside an old optimizer. It holds no
random state: a step's random numbers follow from the seed and the step's number, as the order of the data does.
"""
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from data.files import (UserError, claim, move_aside, read_json, read_tensors, refuse_special, unwritable, write_json,
                        write_tensors)


def read_facts(directory: Path) -> dict:
    """The config.json of the run in a directory; UserError if there is no run."""
    facts = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    if not {"config", "dtype", "steps", "data_sha256"} <= set(facts):
        raise UserError(f"--resume {directory}: there is no run; expected a directory with the config.json of one")
    return facts


def unusable(directory: Path) -> str | None:
    """Why a run cannot have this directory; None if it can. An earlier run there is moved aside, nothing else is."""
    if problem := unwritable(directory):
        return problem
    other_things = directory.is_dir() and any(directory.iterdir()) and not (directory / "metrics.jsonl").exists()
    if other_things or directory.resolve() == Path.cwd():
        return f"{directory}: the directory holds other things than a run; expected a new or empty one"
    return None


class Run:
    """The directory of one run, which one process at a time owns. Of several processes that train together the first
    is the writer: `record`, `write` and `save` do nothing in the others."""

    def __init__(self, directory: Path, is_writer: bool = True, processes: int = 1):
        self.directory, self.is_writer, self.processes = directory, is_writer, processes
        self.checkpoint = directory / "state.safetensors"
        self.metrics = None     # the writer's open metrics.jsonl, from `begin` to `close`
        self.saved_steps = None

    def begin(self, facts: dict, resume: bool) -> tuple[dict[str, torch.Tensor], dict]:
        """Takes the directory over and writes its config.json, which holds `facts`. Returns the tensors and the info
        that `save` was given last; of a new run, both are empty."""
        if self.is_writer:
            self.take_over(resume)
        tensors, info = {}, {}
        if resume and self.checkpoint.exists():
            tensors, info = self.load(facts)
        elif resume:
            print("nothing was saved yet: starting over")
        if self.is_writer:
            self.metrics.truncate(info.get("metrics", 0))  # lines of steps that were not saved come again
        if not info:
            self.record(facts)
        self.write("config.json", facts)
        return tensors, info

    def take_over(self, resume: bool) -> None:
        """Makes this process the one that writes here. A new run overwrites nothing: an earlier one is moved aside."""
        if not resume and (self.directory / "metrics.jsonl").exists():
            self.lock()
            aside = move_aside(self.directory)
            self.metrics.close()
            print(f"the earlier run in {self.directory} is now in {aside}")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock()
        for half in [*self.directory.glob(".*.tmp"), *self.directory.glob("*/.*.tmp")]:
            half.unlink()  # It is of a process that was killed while it wrote.

    def lock(self) -> None:
        refuse_special(self.directory / "metrics.jsonl")
        self.metrics = open(self.directory / "metrics.jsonl", "a")
        claim(self.metrics, self.directory)

    def load(self, facts: dict) -> tuple[dict[str, torch.Tensor], dict]:
        """The tensors and the info of the checkpoint; UserError if the run of `facts` cannot go on from there."""
        tensors, text = read_tensors(self.checkpoint, with_info=True)
        info, before = json.loads(text), read_facts(self.directory)
        if before["data_sha256"] != facts["data_sha256"]:
            raise UserError(f"--resume {self.directory}: the training or validation records have changed since the "
                            "run began")
        if info["step"] > facts["steps"]:
            raise UserError(f"--resume {self.directory}: {info['step']} steps are done already, more than the "
                            f"{facts['steps']} wanted")
        print(f"going on after {info['step']} of {facts['steps']} steps")
        self.saved_steps = info["step"]
        return tensors, info

    def save(self, step: int, tensors: dict[str, torch.Tensor], info: dict) -> None:
        """Saves all that the steps from `step` on depend on. What was saved before stays until this is on the disk."""
        if self.is_writer:
            os.fsync(self.metrics.fileno())
            info = info | {"step": step, "metrics": os.fstat(self.metrics.fileno()).st_size}
            write_tensors(self.checkpoint, tensors, json.dumps(info))
        self.saved_steps = step

    def record(self, line: dict) -> None:
        """Appends a line to metrics.jsonl."""
        if self.is_writer:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()

    def write(self, name: str, values: dict) -> None:
        if self.is_writer:
            write_json(self.directory / name, values)

    def close(self) -> None:
        with suppress(OSError):  # On a full disk, the line that could not be written would raise once more.
            if self.metrics:
                self.metrics.close()

    def advice(self) -> str:
        """How to go on when the run has stopped."""
        if self.saved_steps is None:
            return "nothing was saved yet"
        program = "python" if self.processes == 1 else f"torchrun --nproc_per_node={self.processes} --"
        return (f"what was learnt in {self.saved_steps} steps is in {self.directory}; go on with: "
                f"{program} train.py --resume {shlex.quote(str(self.directory))}")


class Progress:
    """Where a run stands, and what it says about that: on the screen, and as lines of metrics.jsonl."""

    def __init__(self, run: Run, steps: int, saved: dict, started: float):
        self.run, self.steps = run, steps
        self.best, self.n_cut = saved.get("best", math.inf), saved.get("cut", 0)
        self.started = started - saved.get("seconds", 0.0)
        # since the last progress line: its time, the tokens, its step
        self.since, self.tokens, self.logged = time.time(), 0, saved.get("step", 0) - 1

    def seconds(self) -> float:
        """What the run has taken, without the time that it was stopped."""
        return time.time() - self.started

    def info(self) -> dict:
        """What the next __init__ gets as `saved`, beside the step."""
        return {"steps": self.steps, "best": self.best, "cut": self.n_cut, "seconds": self.seconds()}

    def log(self, step: int, memory_gib: float, **numbers) -> None:
        now = time.time()
        line = {"step": step, **numbers, "tokens_per_s": self.tokens / (now - self.since), "memory_gib": memory_gib}
        self.run.record(line)
        left = (self.steps - 1 - step) * (now - self.since) / (step - self.logged)
        gates = ""
        if "gate_prompt" in line:
            gates = (f" | entropy {line['entropy']:.3f} | gate prompt {line['gate_prompt']:.2f}"
                     f" answer {line.get('gate_answer', math.nan):.2f}")
        norm = math.nan if line["grad_norm"] is None else line["grad_norm"]
        print(f"step {step:>5}/{self.steps} | loss {line['loss']:.4f}{gates} | lr {line['lr']:.2e} | norm {norm:.2f} | "
              f"{line['tokens_per_s']:,.0f} tokens/s | {memory_gib:.1f} GiB | {clock(left)} left", flush=True)
        self.since, self.tokens, self.logged = now, 0, step

    def validated(self, step: int, loss: float) -> bool:
        """Whether this validation loss is the lowest so far."""
        is_best = loss < self.best
        self.best = min(loss, self.best)
        self.run.record({"step": step, "validation_loss": loss})
        print(f"step {step:>5}/{self.steps} | validation loss {loss:.4f}" + (" | best so far" if is_best else ""))
        return is_best

    @contextmanager
    def paused(self):
        """The time spent in the block is not training's."""
        start = time.time()
        yield
        self.since += time.time() - start


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class Signals:
    """Between `catch` and `release`, Ctrl-C and SIGTERM are noted in `caught`, for the loop to stop after the step in
    hand. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.caught, self.handlers_before = [], {}

    def catch(self) -> None:
        self.handlers_before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame) -> None:
        self.caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def release(self) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
