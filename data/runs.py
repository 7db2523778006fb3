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
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from data.commonsense import is_free
from data.files import (UserError, claim, is_out_of_memory, listed, misfits, move_aside, read_json, read_tensors,
                        write_json, write_tensors)
from data.loggers import Logger
from data.prepare import DEFAULT, task_names
from data.resume import halves, is_run, misplaced, parse_info, unusable


class Run:
    """The directory of one run, which one process at a time owns. Of several processes that train together the first
    is the writer: `record`, `write` and `save` do nothing in the others."""

    def __init__(self, directory: Path, is_writer: bool = True, processes: int = 1, logger: str = "none"):
        self.directory, self.is_writer, self.processes = directory, is_writer, processes
        self.logger_name, self.logger = logger, None  # the writer's, from `start` to `close`
        self.checkpoint = directory / "state.safetensors"
        self.metrics = None     # the writer's open metrics.jsonl, from `begin` to `close`
        self.saved_steps = None
        self.facts = {}
        self.results = None     # those of a run that had ended before

    def begin(self, facts: dict, resume: bool, expected: dict[str, torch.Tensor]) -> tuple[dict, dict]:
        """Takes the directory over for the run of `facts`. Returns the tensors and the info that `save` was given last;
        of a new run, both are empty. expected: what the tensors have to be like. Nothing is overwritten yet."""
        self.facts = json.loads(json.dumps(facts))  # as they are read again
        if self.is_writer:
            self.take_over(resume)
        if resume and self.checkpoint.exists():
            return self.load(expected)
        if resume:
            print("nothing was saved yet: starting over")
        return {}, {}

    def take_over(self, resume: bool) -> None:
        """Makes this process the one that writes here. A new run overwrites nothing: an earlier one is moved aside."""
        if problem := misplaced(self.directory) if resume else unusable(self.directory):  # since the flags were read
            raise UserError(problem)
        if not resume and is_run(self.directory):
            self.lock()
            aside = move_aside(self.directory)
            self.metrics.close()
            print(f"the earlier run in {self.directory} is now in {aside}")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock()
        for half in halves(self.directory):
            half.unlink()

    def lock(self) -> None:
        self.metrics = open(self.directory / "metrics.jsonl", "a")
        claim(self.metrics, self.directory)

    def load(self, expected: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict]:
        """The tensors and the info of the checkpoint; UserError if the run of `facts` cannot go on from there."""
        tensors, text = read_tensors(self.checkpoint, with_info=True)
        info, what = parse_info(text, self.directory), f"--resume {self.directory}"
        wrong = [f"{name} is {tensors[name].dtype}, expected {tensor.dtype}" for name, tensor in expected.items()
                 if name in tensors and tensors[name].dtype != tensor.dtype]
        if wrong := misfits(tensors, expected) or listed(wrong):
            raise UserError(f"{what}: its checkpoint is of another version of train.py; start a new run ({wrong})")
        if info["facts"]["data_sha256"] != self.facts["data_sha256"]:
            raise UserError(f"{what}: the training or validation records have changed since the run began")
        if info["facts"]["base_sha256"] != self.facts["base_sha256"]:
            raise UserError(f"{what}: the weights of the base {self.facts['config']['init']} are others than those that "
                            "the run began with (base_sha256)")
        if info["step"] > self.facts["steps"]:
            raise UserError(f"{what}: {info['step']} steps are done already, more than the {self.facts['steps']} wanted")
        print(f"going on after {info['step']} of {self.facts['steps']} steps")
        self.saved_steps, self.results = info["step"], self.earlier_results(info)
        return tensors, info

    def earlier_results(self, info: dict) -> dict | None:
        """What training.json says of a run in which nothing is left to do; None if something is."""
        has_all_steps = info["step"] == self.facts["steps"]
        if has_all_steps and self.facts["config"]["test"] in (0, info["facts"]["config"].get("test")):
            with suppress(UserError):  # Those that are missing or damaged are made again.
                results = read_json(self.directory / "training.json")
                return results if results.get("steps") == info["step"] else None

    def start(self, tensors: dict[str, torch.Tensor], info: dict) -> None:
        """What `begin` returned is in its place: from here on files are written, but in a run that has ended none."""
        if not self.is_writer or self.results:
            return
        if info and info["facts"] != self.facts:  # The checkpoint learns of new settings before config.json has them.
            earlier = read_json(self.directory / "config.json")
            write_tensors(self.checkpoint, tensors, json.dumps(info | {"facts": self.facts, "earlier": earlier}))
        (self.directory / "training.json").unlink(missing_ok=True)  # of other settings
        self.metrics.truncate(self.whole_lines(info.get("metrics", 0)))  # lines of steps that were not saved come again
        self.write("config.json", self.facts)
        if not os.fstat(self.metrics.fileno()).st_size:
            self.record(self.facts)
        if self.logger_name != "none":
            self.logger = Logger(self.logger_name, self.directory, self.facts, info.get("step", 0))

    def whole_lines(self, size: int) -> int:
        """How many of the first `size` bytes of metrics.jsonl are there, as whole lines."""
        content = (self.directory / "metrics.jsonl").read_bytes()[:size]
        whole = content.rfind(b"\n") + 1
        if whole < size:
            print(f"metrics.jsonl has lost {size - whole} bytes since the checkpoint was saved; the run itself is whole")
        return whole

    def save(self, step: int, tensors: dict[str, torch.Tensor], info: dict) -> None:
        """Saves all that the steps from `step` on depend on. What was saved before stays until this is on the disk."""
        if self.is_writer:
            os.fsync(self.metrics.fileno())
            info = info | {"step": step, "metrics": os.fstat(self.metrics.fileno()).st_size, "facts": self.facts}
            write_tensors(self.checkpoint, tensors, json.dumps(info))
        self.saved_steps = step

    def record(self, line: dict) -> None:
        """Appends a line to metrics.jsonl, and tells --logger."""
        if self.is_writer:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        if self.logger:
            self.logger.log(line)

    def write(self, name: str, values: dict) -> None:
        if self.is_writer:
            write_json(self.directory / name, values)

    def close(self) -> None:
        if self.logger:
            self.logger.close()
        with suppress(OSError):  # On a full disk, the line that could not be written would raise once more.
            if self.metrics:
                self.metrics.close()

    def explain(self, error: Exception, c, team) -> str:
        """What a user can do about a fault of the machine; "" for a mistake in the program. c: the settings."""
        if is_out_of_memory(error):
            size = c.micro_batch or math.ceil(c.batch / team.size)
            return (f"out of memory: lower --micro-batch (now {size}) or --max-len (now {c.max_len})"
                    f"{'' if c.checkpointing else ', or add --checkpointing'}; {self.advice()}")
        if isinstance(error, (OSError, SafetensorError)) and self.metrics:  # the disk is full, ...
            return f"cannot write: {error}; {self.advice()}"
        if team.has_lost_one(error):
            return f"process {team.rank}: another process has ended, its own message says why; {self.advice()}"
        return ""

    def advice(self) -> str:
        """How to go on when the run has stopped."""
        if self.saved_steps is None:
            return "nothing was saved yet"
        program = "python" if self.processes == 1 else f"torchrun --nproc_per_node={self.processes} --"
        return (f"what was learnt in {self.saved_steps} steps is in {self.directory}; go on with: "
                f"{program} train.py --resume {shlex.quote(str(self.directory))}")


def introduce(facts: dict, training: list[dict], n_validation: int) -> None:
    """Says what the run of `facts` is about to do with its training records."""
    c, n_base, n_trainable = facts["config"], facts["base_parameters"], facts["trainable_parameters"]
    print(f"{c['init']}: {n_base:,} frozen parameters; {facts['device']}, {facts['dtype'].removeprefix('torch.')}"
          + (f"; {facts['processes']} processes" if facts["processes"] > 1 else ""))
    print(f"{c['peft']}, gate {c['gate']}, r {c['r']}: {n_trainable:,} trainable parameters, "
          f"{100 * n_trainable / (n_base + n_trainable):.4f} % of all")
    forms = {"instruction data" if is_free(record) else f"{c['form']} form": None for record in training}
    tasks = ", ".join(task_names(c["tasks"], c["data"] or DEFAULT))
    print(f"{len(training):,} training and {n_validation} validation records of {tasks}")
    print(f"{' and '.join(forms)}, loss on the answer alone; {facts['steps']} steps of {c['batch']}, lr {c['lr']:g}; "
          f"writing to {c['out']}")
    if c["gate"] != "none":
        print("below: the mean gate on prompts and on answers, and the mean entropy of gates, in nats")


# The columns of a progress line and their widths: 80 characters, as wide as a terminal is.
COLUMNS = {"step": 11, "loss": 7, "prompt": 6, "answer": 6, "entropy": 7, "lr": 8, "norm": 5, "tokens/s": 8, "GiB": 5,
           "left": 8}


class Progress:
    """Where a run stands, and what it says about that: on the screen, and as lines of metrics.jsonl."""

    def __init__(self, run: Run, steps: int, saved: dict, started: float):
        self.run, self.steps = run, steps
        self.best, self.n_cut = saved.get("best", math.inf), saved.get("cut", 0)
        self.started = started - saved.get("seconds", 0.0)  # by time.monotonic, as all times here
        # since the last progress line: its time, the tokens, its step
        self.since, self.tokens, self.logged = time.monotonic(), 0, saved.get("step", 0) - 1
        self.is_titled = False  # whether the columns' names stand above, not far up

    def seconds(self) -> float:
        """What the run has taken, without the time that it was stopped."""
        return max(0.0, time.monotonic() - self.started)

    def info(self) -> dict:
        """What the next __init__ gets as `saved`, beside the step."""
        return {"steps": self.steps, "best": self.best, "cut": self.n_cut, "seconds": self.seconds()}

    def log(self, step: int, memory_gib: float, **numbers) -> None:
        now = time.monotonic()
        seconds = max(0.0, now - self.since)
        speed = self.tokens / seconds if seconds else None  # on a clock too coarse for these steps
        line = {"step": step, **numbers, "tokens_per_s": speed, "memory_gib": memory_gib}
        self.run.record(line)
        left = (self.steps - 1 - step) * seconds / (step - self.logged)
        norm, speed = (math.nan if value is None else value for value in (line["grad_norm"], speed))
        cells = {"step": f"{step}/{self.steps}", "loss": f"{line['loss']:.4f}"}
        if "gate_prompt" in line:
            cells |= {"prompt": f"{line['gate_prompt']:.2f}", "answer": f"{line.get('gate_answer', math.nan):.2f}",
                      "entropy": f"{line['entropy']:.3f}"}
        cells |= {"lr": f"{line['lr']:.2e}", "norm": f"{norm:.2f}", "tokens/s": f"{speed:,.0f}",
                  "GiB": f"{memory_gib:.1f}", "left": clock(left)}
        if not self.is_titled:
            print(" ".join(name.rjust(COLUMNS[name]) for name in cells))
        print(" ".join(text.rjust(COLUMNS[name]) for name, text in cells.items()), flush=True)
        self.is_titled = True
        self.since, self.tokens, self.logged = now, 0, step

    def validated(self, step: int, loss: float) -> bool:
        """Whether this validation loss is the lowest so far."""
        is_best = loss < self.best
        self.best = min(loss, self.best)
        self.run.record({"step": step, "validation_loss": loss})
        print(f"{step}/{self.steps}".rjust(COLUMNS["step"]), f"validation loss {loss:.4f}" + ", best so far" * is_best)
        self.is_titled = False
        return is_best

    @contextmanager
    def paused(self):
        """The time spent in the block is not training's."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class Signals:
    """Between `catch` and `release`, Ctrl-C and SIGTERM are noted in `caught`, for the loop to stop after the step in
    hand. A second Ctrl-C does what it would do elsewhere: it raises KeyboardInterrupt at once. Only a program's main
    thread gets signals; in another, as notebooks may have, nothing is caught."""

    def __init__(self):
        self.caught, self.handlers_before = [], {}

    def catch(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.handlers_before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame) -> None:
        self.caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, self.handlers_before[number])
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def release(self) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        self.handlers_before = {}
