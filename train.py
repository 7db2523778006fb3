"""Trains gated adapters on the commonsense tasks, GSM8K, or your own data: one plain loop.

    python train.py --preset quickstart               # minutes on a laptop
    python train.py --init gpt2-medium --peft gatera  # the paper's recipe
    python train.py --init gpt2-medium --peft lora --gate token --lr 3e-4
    python train.py --init smollm2-135m --data my.jsonl   # instruction data

    python train.py --resume out/quickstart           # a stopped run goes on
    torchrun --nproc_per_node=4 -- train.py --init gpt2-medium   # 4 processes

A run directory holds config.json (everything needed to repeat the run),
metrics.jsonl (a line for each logged step), the adapters best/ (lowest
validation loss) and last/, which eval.py and gatera.load_adapter read,
state.safetensors, from which --resume goes on as if the run had never stopped,
and training.json, the results.
"""
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import random
import shlex
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and sys.stderr.isatty() and "RANK" not in os.environ:
    print("importing PyTorch", file=sys.stderr)  # which takes seconds

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from data.cli import device_problems, flag, peak_memory, pick_device, read_flags, run_command
from data.commonsense import FORMS, Packed, Question, is_free, pack, training_question
from data.compare import UNIMPORTANT
from data.download import find_model
from data.files import Stopped, UserError, fingerprint, reading, unwritable
from data.loggers import LOGGERS, logger_problems
from data.own import read_template
from data.prepare import (DEFAULT, check_records, count_repeated, has_test, hold_out, line_numbers, load_records, prepare,
                          task_names, task_problems, without_twins)
from data.results import accuracy_key
from data.resume import read_settings, unusable
from data.run_names import run_name
from data.runs import Progress, Run, Signals, clock, introduce
from data.team import Team
from eval import evaluate, log_likelihoods
from gatera import (GATES, METHODS, AdapterConfig, adapter_state, adapters_off, gate_entropy, gate_parameters, gate_values,
                    inject_adapters, load_adapter, save_adapter)
from model import Transformer, compile_blocks, load_tokenizer, read_config


# ---------------------------------------------------------------------------------------------- settings

@dataclass
class Config:
    """Every setting. The comment of a field is its --help; the defaults are the paper's recipe."""
    preset: str = ""                # a named set of other defaults, and the method's best rate in short runs
    init: str = "gpt2-medium"       # base: gpt2, smollm2-135m, llama-3-8b, ..., a hub id, a directory, a .gguf file
    out: str = ""                   # default out/<preset> or out/<init>-<peft>-<gate>-lr<lr>-seed<seed>, and other flags
    resume: str = ""                # go on with the run in this directory, with its settings
    # the method
    peft: str = "gatera"            # lora, dora, hira, or gatera, which is hira with the token gate
    gate: str = ""                  # default: token for gatera, none for the others
    r: int = 32                     # rank
    alpha: float = 0.0              # LoRA and DoRA scale by alpha / r; 0: alpha = 2 r
    dropout: float = 0.0            # on the adapters' input
    targets: str = "qkv,fc"         # adapted layers: qkv (q, k, v), fc (up, down), or layer names, with commas between
    entropy_weight: float = 0.01    # lambda: how strongly gates are pushed towards 0 or 1
    gate_bias: float = 0.0          # b_g at the start; the gate opens sigmoid(b_g)
    gate_lr: float = 0.0            # learning rate of the gates; 0: the same as lr
    # data
    tasks: str = "all"              # some, with commas between; all: commonsense_170k's eight, or all that --data has
    form: str = "label"             # label (the papers' instruction) or cloze (the answer's own words)
    data: str = ""                  # yours: a directory of <name>/train.jsonl and test.jsonl, or one .jsonl or .json file
    template: str = ""              # instruction data's prompt, with {instruction} and {input}, or a file with it
    max_len: int = 512              # tokens of a prompt with its answer; a longer prompt loses its start
    limit: int = 0                  # the first so many training records of each task; 0: all
    # optimisation
    lr: float = 1e-3                # peak learning rate of AdamW
    weight_decay: float = 0.0       # AdamW's
    batch: int = 32                 # records an optimiser step
    micro_batch: int = 0            # records a forward, gradients add up to the batch's; 0: the whole batch
    epochs: int = 3                 # passes over the training records
    max_steps: int = 0              # stop after so many steps; 0: by epochs
    warmup: int = -1                # steps of linear warmup, before linear decay to 0; -1: a tenth of all, at most 100
    clip: float = 1.0               # largest gradient norm; 0: no clipping
    seed: int = 1337                # of the adapter's start, the data's order and dropout
    # validation and logging
    validation: int = 120           # held-out records (of those that eval.py --split val scores) that pick best/
    eval_every: int = 200           # steps between validations
    log_every: int = 10             # steps between progress lines
    save_every: int = 100           # steps between checkpoints, from which --resume goes on
    logger: str = "none"            # where metrics go besides metrics.jsonl
    test: int = 0                   # score so many test questions of each task before and after training; 0: none
    # machine
    device: str = "auto"            # auto, cpu, cuda, cuda:1, ..., mps (Apple)
    dtype: str = "auto"             # float32, bfloat16, float16; auto: bfloat16 on what computes in it
    compile: bool = False           # torch.compile the model
    checkpointing: bool = False     # keep no activations, recompute them in the backward: less memory, a third more time
    fsdp: bool = False              # under torchrun: each process keeps a share of the frozen base, not all of it


PRESETS = {
    # SmolLM2-135M learns to answer grade-school science questions in minutes of a laptop's CPU. The multiplicative
    # update of HiRA wants a high rate: of 5e-3, 1e-2 and 2e-2, 1e-2 had the lowest loss on held-out training records.
    "quickstart": dict(init="smollm2-135m", tasks="ARC-Easy", form="cloze", lr=1e-2, batch=16, max_steps=40,
                       validation=40, eval_every=20, log_every=2, test=200),
}
RATES = {"lora": 1e-3, "dora": 1e-3, "lora-token": 3e-3, "dora-token": 3e-3}  # in place of a preset's lr, found likewise
TARGETS = {"qkv": ("q_proj", "k_proj", "v_proj"), "fc": ("up_proj", "down_proj")}
CHOICES = {"preset": PRESETS, "peft": (*METHODS, "gatera"), "gate": GATES, "form": FORMS, "logger": LOGGERS,
           "dtype": ("auto", "float32", "bfloat16", "float16")}
# What --resume may set anew. (With --dropout, --micro-batch changes the masks; --data has to hold the same records.)
MAY_CHANGE = (*UNIMPORTANT, "eval_every")


def adapter_config(c: Config) -> AdapterConfig:
    targets = tuple(name for word in c.targets.split(",") for name in TARGETS.get(word, (word,)))
    return AdapterConfig(method="hira" if c.peft == "gatera" else c.peft, gate=c.gate, r=c.r, alpha=c.alpha or None,
                         dropout=c.dropout, targets=targets, gate_bias=c.gate_bias)


def parse(argv: list[str]) -> Config:
    """Flags -> Config. UserError lists everything that is wrong with them at once."""
    given, wrong = read_flags(Config, argv, __doc__, CHOICES)
    if "template" in given:
        given["template"] = read_template(given["template"])
    changed = {name for name in given if name in MAY_CHANGE}
    recorded = read_settings(Path(given["resume"]), Config, changed) if "resume" in given else {}
    wrong += [f"{flag(name)} {given[name]!s:.60}: the run to resume has {value or 'none'!s:.60}"
              for name, value in recorded.items() if name not in MAY_CHANGE and given.get(name, value) != value]
    if recorded and "out" in given:
        wrong.append(f"--out {given['out']}: a run is resumed where it is")
    c = Config(**(PRESETS.get(given.get("preset"), {}) | recorded | given))
    c.gate = c.gate or ("token" if c.peft == "gatera" else "none")
    if c.preset and "lr" not in recorded | given:
        c.lr = RATES.get(f"{c.peft}-{c.gate}", RATES.get(c.peft, c.lr))
    c.out = c.resume or c.out or f"out/{run_name(dataclasses.asdict(c), given)}"
    if wrong := wrong + check(c):
        raise UserError("; ".join(wrong))
    return c


def check(c: Config) -> list[str]:
    """What is wrong with the values, one text each."""
    rules = [
        (c.peft != "gatera" or c.gate == "token",
         f"--gate {c.gate}: expected token with --peft gatera, which is hira with that gate; or use --peft hira"),
        (c.gate == "none" or "head" not in c.targets.split(","),
         f"--targets {c.targets}: the head sees answer tokens alone, gates learn from all; use --gate none or no head"),
        (0 < c.lr <= 1, f"--lr {c.lr}: expected a number above 0, up to 1"),
        (c.max_len >= 16, f"--max-len {c.max_len}: expected 16 or more"),
        (0 <= c.seed < 2**63, f"--seed {c.seed}: expected a whole number from 0 to 2^63 - 1"),
        (not c.max_steps or c.warmup < c.max_steps,
         f"--warmup {c.warmup}: expected less than --max-steps {c.max_steps}; lower it or leave it out"),
        (not (c.compile and c.fsdp), "--compile with --fsdp: expected one of them"),
        (not c.fsdp or "RANK" in os.environ, "--fsdp: expected a start by torchrun --nproc_per_node=N -- train.py"),
    ]
    least = {1: ("batch", "epochs", "eval_every", "log_every", "save_every"),
             0: ("entropy_weight", "gate_lr", "limit", "weight_decay", "micro_batch", "max_steps", "clip", "validation",
                 "test"),
             -1: ("warmup",)}
    rules += [(low <= getattr(c, name) <= 1e12, f"{flag(name)} {getattr(c, name)}: expected a number from {low} to 1e12")
              for low, names in least.items() for name in names]
    # read_flags has checked those of the command line, but nobody those of the run to resume.
    rules += [(getattr(c, name) in ("", *choices),
               f"{flag(name)} {getattr(c, name)}: expected one of {', '.join(choices)}")
              for name, choices in CHOICES.items()]
    wrong = [message for is_fine, message in rules if not is_fine] + task_problems(c.tasks, c.data or DEFAULT)
    wrong += device_problems(c.device) + logger_problems(c.logger)
    if problem := unwritable(Path(c.out)) if c.resume else unusable(Path(c.out)):
        wrong.append(f"--out {problem}")
    try:
        adapter_config(c)
    except UserError as error:  # "adapter: r 0: expected ..." is about --r
        problems = str(error).removeprefix("adapter: ").split("; ")
        wrong += [flag(name) + " " + rest for name, rest in (problem.split(" ", 1) for problem in problems)]
    return wrong


# -------------------------------------------------------------------------------------------------- data

def load_data(c: Config) -> tuple[list[dict], list[dict], dict[str, list[dict]]]:
    """(training, validation, test) records: the tasks' training sets without what data/prepare.py holds out of them,
    as many of the held-out records as --validation wants, and test records by task."""
    data = c.data or DEFAULT
    tasks = task_names(c.tasks, data)
    if not c.data:
        prepare(tasks, ("train", "test") if c.test else ("train",))
    training, held_out = [], []
    for task in tasks:
        kept, held = hold_out(load_records(task, "train", data, c.template))
        training += kept[:c.limit or None]
        held_out += held
    if c.template and not any(map(is_free, training)):
        raise UserError("--template: it is for instruction data, of which there are none; expected none, or another --data")
    test = {task: load_records(task, "test", data, c.template)[:c.test] for task in tasks} if c.test else {}
    training = without_twins(training, held_out)  # of another task
    if not training:
        raise UserError("the training records are all held out for validation, or repeat one that is; expected more")
    if len(held_out) < c.validation:
        raise UserError(f"--validation {c.validation}: only {len(held_out)} records are held out of these tasks' "
                        "training sets (a tenth, at most 200 a task); expected no more")
    if empty := [i for i, record in enumerate(training) if is_free(record) and not record["answer"].strip()]:
        print(f"{len(empty):,} records have an empty answer, of which the end of text is learnt: "
              f"{name_records(empty[:1], training, c)}, ...")
    if repeated := count_repeated(training):
        print(f"{repeated:,} records occur more than once in the training data")
    # The same records for every --seed, so that runs with different seeds are validated on the same.
    chosen = random.Random(0).sample(range(len(held_out)), c.validation)
    return training, [held_out[i] for i in sorted(chosen)], test


def batches(n: int, c: Config):
    """Record numbers, a list for each optimiser step, epoch after epoch. The order depends on the seed alone."""
    for epoch in itertools.count():
        order = list(range(n))
        random.Random(f"{c.seed} {epoch}").shuffle(order)
        for i in range(0, n, c.batch):
            yield order[i:i + c.batch]


class Batch(NamedTuple):
    """What one optimiser step learns from. Counts are of the whole batch, also where processes share it."""
    numbers: list[int]                 # of its records
    rows: list[tuple[Packed, int]]     # this process's micro-batches as packed rows, and their weight: 1, a filler's 0
    n_answer: int                      # answer tokens: those that are predicted
    n_token: int                       # tokens read, prompt and answer
    n_cut: int                         # prompts that lost their start


def load_batches(records: list[dict], encode, c: Config, team: Team, first: int, steps: int):
    """The Batches of the steps from `first` on. encode: record -> Question. They are made one by one, as the
    loop asks for them."""
    size = c.micro_batch or math.ceil(c.batch / team.size)
    for numbers in itertools.islice(batches(len(records), c), first, steps):
        questions = [encode(records[i]) for i in numbers]
        # This process's share. All processes need as many rows, since with --fsdp they make forwards together: one
        # that has no question left takes any, and weighs it 0.
        share, longest = questions[team.rank::team.size], math.ceil(len(questions) / team.size)
        rows = [(pack(share[i:i + size] or questions[:1]), int(i < len(share))) for i in range(0, longest, size)]
        yield Batch(numbers, rows, n_answer=sum(len(q.answers[0]) for q in questions),
                    n_token=sum(len(q.prompt) + len(q.answers[0]) - 1 for q in questions),  # the last is not read
                    n_cut=sum(q.cut > 0 for q in questions))


def name_records(numbers: list[int], records: list[dict], c: Config) -> str:
    """Some of the training records, by task and line of its file, for somebody to look at them."""
    found = line_numbers([records[number] for number in numbers], "train", c.data or DEFAULT, c.template)
    return "; ".join(f"{task} {', '.join(map(str, lines))}" for task, lines in found.items())


# -------------------------------------------------------------------------- the model, and what trains it

def load_inputs(c: Config, team: Team):
    """(tokenizer, number of steps, *load_data(c)). Settings that do not fit the base are refused before anything large
    is downloaded."""
    with team.first_alone():  # It downloads what is not there yet.
        tokenizer = load_tokenizer(c.init)
        if tokenizer.eos is None:
            raise UserError(f"{c.init}: its tokenizer names no end-of-text token, with which answers have to end")
        context = read_config(c.init).max_len
        if c.max_len > context:
            raise UserError(f"--max-len {c.max_len}: expected no more than the base's context of {context}")
        training, validation, test = load_data(c)
        for records, split in ((training + validation, "train"), (sum(test.values(), []), "test")):
            check_records(records, split, c.form, tokenizer, c.max_len, c.data or DEFAULT, c.template)
        steps = c.max_steps or c.epochs * math.ceil(len(training) / c.batch)
        c.warmup = min(100, steps // 10) if c.warmup == -1 else c.warmup
        if c.warmup >= steps:
            raise UserError(f"--warmup {c.warmup}: expected less than the {steps} steps of the run; lower it or leave it "
                            "out")
        find_model(c.init, weights=True)
    return tokenizer, steps, training, validation, test


def load_model(c: Config, dtype: torch.dtype, team: Team) -> Transformer:
    """The frozen base with adapters, which alone are trained."""
    # With --fsdp first on the CPU, where all processes share one mapped file; `shard` moves it block by block.
    model = Transformer.from_pretrained(c.init, dtype=dtype, device="cpu" if c.fsdp else team.device)
    model.base_sha256 = fingerprint(model.named_parameters())
    model.gradient_checkpointing = c.checkpointing
    torch.manual_seed(c.seed)
    inject_adapters(model, adapter_config(c))
    if c.fsdp:
        team.shard(model, set(adapter_state(model).values()))
    if c.compile:
        compile_blocks(model)
    return model.train()


def make_optimizer(model: Transformer, c: Config) -> torch.optim.AdamW:
    gates = gate_parameters(model)
    others = [p for p in adapter_state(model).values() if not any(p is gate for gate in gates)]
    groups = [{"params": others, "peak": c.lr}, {"params": gates, "peak": c.gate_lr or c.lr}]
    return torch.optim.AdamW(groups, lr=c.lr, weight_decay=c.weight_decay, betas=(0.9, 0.999), fused=True)


def learning_rate(step: int, steps: int, c: Config) -> float:
    """The factor on every learning rate: linear warmup, then linear decay to 0. Step 0 already moves."""
    if step < c.warmup:
        return (step + 1) / (c.warmup + 1)
    return (steps - step) / max(1, steps - c.warmup)


def run_facts(c: Config, steps: int, records: list[list[dict]], model, dtype: torch.dtype, team: Team) -> dict:
    """What config.json holds: all that is needed to repeat the run."""
    n_trainable = sum(p.numel() for p in adapter_state(model).values())
    n_base = sum(p.numel() for p in model.parameters()) - n_trainable
    of_all, of_training = (hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in (records, records[0]))
    return {"config": dataclasses.asdict(c) | {"resume": ""}, "adapter": dataclasses.asdict(model.adapter_config),
            "steps": steps, "base_parameters": n_base, "trainable_parameters": n_trainable,
            "base_sha256": model.base_sha256,
            "data_sha256": of_all, "train_sha256": of_training, "processes": team.size,
            "device": str(team.device), "dtype": str(dtype), "torch": torch.__version__,
            "python": platform.python_version()}


def checkpoint(model, optimizer) -> dict[str, torch.Tensor]:
    """{name: tensor} of what training changes: the adapter and AdamW's moments of it."""
    adapter = adapter_state(model)
    moments = {f"{name}.{key}": value for name, p in adapter.items() for key, value in optimizer.state[p].items()}
    return adapter | moments


def save(run: Run, step: int, info: dict, model, optimizer, scaler) -> None:
    """The checkpoint, with float16's scale and `info`. last/ comes first, so that it has all that the checkpoint says
    is done."""
    if run.is_writer:
        save_adapter(model, run.directory / "last")
    run.save(step, checkpoint(model, optimizer), info | {"scaler": scaler.state_dict()})


@torch.no_grad()
def start(run: Run, facts: dict, c: Config, model, optimizer, scaler, team: Team) -> dict:
    """Takes the run's directory over and puts back what `save` left there. Returns its info, {} for a new run. The run
    may have got another number of steps meanwhile, which is told."""
    for p in adapter_state(model).values():  # as AdamW's first step would
        zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
    tensors, info = run.begin(facts, bool(c.resume), checkpoint(model, optimizer))
    if info:
        if info["best"] < math.inf:
            load_adapter(model, run.directory / "best")  # whether it is whole, which the end of the run needs
        for name, tensor in checkpoint(model, optimizer).items():
            tensor.copy_(tensors[name])
        with reading(run.checkpoint):
            scaler.load_state_dict(info["scaler"])
    team.wait()  # until all have read what the first process now may overwrite
    run.start(tensors, info)
    if info and info["steps"] != facts["steps"]:
        now, before = (c.lr * learning_rate(info["step"], n, c) for n in (facts["steps"], info["steps"]))
        print(f"the run had {info['steps']} steps: its learning rate goes on at {now:.2e} instead of {before:.2e} and "
              f"decays to 0 at step {facts['steps']}")
    return info


# ------------------------------------------------------------------------------------------------ the loop

def train(c: Config, dtype: torch.dtype, team: Team, run: Run, signals: Signals) -> dict:
    """One run, from the records to best/ and last/. Where one process trains alone, it is a team of one."""
    started = time.monotonic()
    tokenizer, steps, train_records, validation_records, test_records = load_inputs(c, team)
    encode = partial(training_question, form=c.form, tokenizer=tokenizer, max_len=c.max_len)
    validation = [encode(record) for record in validation_records]
    model = load_model(c, dtype, team)
    adapter, optimizer = adapter_state(model), make_optimizer(model, c)
    autocast = torch.autocast(team.device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(team.device.type, enabled=dtype == torch.float16)  # idle in the other dtypes
    facts = run_facts(c, steps, [train_records, validation_records], model, dtype, team)
    introduce(facts, train_records, len(validation))
    saved = start(run, facts, c, model, optimizer, scaler, team)
    first = saved.get("step", 0)
    data = load_batches(train_records, encode, c, team, first, steps)
    upcoming = next(data, None)
    progress, caught = Progress(run, steps, saved, started), 0  # caught: signals to stop
    signals.catch()

    for step in range(first, steps):
        batch, is_last = upcoming, step == steps - 1
        is_logged = step % c.log_every == 0 or is_last
        # Dropout depends on seed, step and process alone, so that it is the same after a --resume.
        torch.manual_seed(random.Random(f"{c.seed} {step} {team.rank}").getrandbits(63))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, steps, c)

        # L = L_task + lambda L_ent (GateRA): means over the whole batch, however it is split into rows. L_task is over
        # the answers' tokens, L_ent over all, prompt and answer; a packed row has no padding to skip.
        loss, entropy, gates = 0.0, 0.0, []  # L_task, L_ent and sums of gates of the rows so far, which are logged apart
        for row, weight in batch.rows:
            row = row.to(team.device)
            with autocast:
                logits = model(row.ids, documents=row.documents, select=row.select)                  # (M, V)
                l_task = F.cross_entropy(logits.float(), row.targets, reduction="sum") * weight / batch.n_answer
                l_ent = gate_entropy(model, row.is_real) * (weight * row.is_real.sum() / batch.n_token)
            scaler.scale(l_task + c.entropy_weight * l_ent).backward()
            loss, entropy = loss + l_task.detach(), entropy + l_ent.detach()
            if is_logged:
                gates.append(weight * gate_sums(model, row))

        # Over all processes; a signal to one of them stops all.
        sums = torch.stack([loss, entropy, *(sum(gates) if gates else ()), loss.new_full((), len(signals.caught))])
        loss, entropy, *gates, caught = team.add_up(adapter.values(), sums)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(adapter.values(), c.clip or math.inf)
        scaler.step(optimizer)  # leaves out a step whose gradients overflowed float16
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        upcoming = next(data, None)  # while a GPU still computes: tolist() below is the wait for it
        loss, entropy, *gates, caught, norm = torch.stack([loss, entropy, *gates, caught, norm]).tolist()
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1  # float16: its scale halves, training goes on
        if not math.isfinite(loss) or not (math.isfinite(norm) or may_overflow):
            raise UserError(f"step {step}: the loss is {loss}, the gradient's norm {norm}; lower --lr, or use --dtype "
                            f"float32; the batch was {name_records(batch.numbers, train_records, c)}; {run.advice()}")

        progress.tokens, progress.n_cut = progress.tokens + batch.n_token, progress.n_cut + batch.n_cut
        if is_logged:
            progress.log(step, loss=loss, entropy=entropy, **mean_gates(gates, batch),
                         lr=optimizer.param_groups[0]["lr"], grad_norm=norm if math.isfinite(norm) else None,
                         memory_gib=peak_memory(team.device))
        improved = False
        if validation and ((step + 1) % c.eval_every == 0 or is_last):
            improved = validate(step, model, validation, autocast, progress, run)
        if caught or is_last or improved or (step + 1) % c.save_every == 0:
            save(run, step + 1, progress.info(), model, optimizer, scaler)
        if caught:
            team.wait()  # until all are here
            break

    if caught or signals.caught:
        print(f"interrupted; {run.advice()}")
        raise Stopped(run.advice(), (signals.caught or [signal.SIGTERM])[0])  # SIGTERM where another process was told to
    signals.release()
    return finish(c, model, tokenizer, test_records, progress, team, run)


def gate_sums(model: Transformer, row: Packed) -> torch.Tensor:
    """The gates of the row that the last forward has read, means over layers, summed over prompt and over answer tokens:
    (2,), or (0,) without gates."""
    gates = gate_values(model)
    if not gates:
        return torch.zeros(0, device=row.ids.device)
    mean = torch.stack(list(gates.values())).float().mean(0)                    # over layers: (1, N)
    return torch.stack([(mean * row.is_prompt).sum(), (mean * row.is_answer).sum()])


def mean_gates(sums: list[float], batch: Batch) -> dict[str, float]:
    """Mean gate on the batch's prompt tokens and on its answer tokens that are read, all but the last of each answer."""
    n_answer = batch.n_answer - len(batch.numbers)
    counts = {"gate_prompt": batch.n_token - n_answer, "gate_answer": n_answer}
    return {name: total / n for (name, n), total in zip(counts.items(), sums) if n}  # empty answers have none


def validate(step: int, model, questions: list[Question], autocast, progress: Progress, run: Run) -> bool:
    """Logs the mean cross entropy of an answer token, in nats; best/ becomes the adapter with the lowest. Returns whether
    this is it, so that a checkpoint follows which knows of it."""
    with progress.paused(), autocast:
        model.eval()
        total = -sum(scores[0] for scores in log_likelihoods(model, questions))  # the same on every process
        model.train()
        loss = total / sum(len(question.answers[0]) for question in questions)
        if not math.isfinite(loss):
            raise UserError(f"step {step}: the validation loss is {loss}; lower --lr, or use --dtype float32; "
                            f"{run.advice()}")
        improved = progress.validated(step, loss)
        if improved and run.is_writer:
            save_adapter(model, run.directory / "best")
        return improved


def finish(c: Config, model, tokenizer, test_records: dict[str, list[dict]], progress: Progress, team: Team,
           run: Run) -> dict:
    """The results, which training.json keeps: those of best/, which without validation is last/."""
    if run.results:
        print(f"the run in {c.out} had ended, nothing is left to do; its training.json: {json.dumps(run.results)}")
        return run.results
    if c.validation:
        team.wait()  # until the first process has written it
        load_adapter(model, run.directory / "best")
    elif run.is_writer:
        save_adapter(model, run.directory / "best")
    if progress.n_cut:
        print(f"{progress.n_cut} times a question was longer than {c.max_len} tokens and lost the start of its prompt")
    scores = {task: scores_before_and_after(model, tokenizer, task, records, c, quiet=team.rank > 0)
              for task, records in test_records.items()}
    seconds = progress.seconds()
    results = {"steps": progress.steps, "best_validation_loss": progress.best if c.validation else None,
               "seconds": seconds, "tasks": scores}
    run.write("training.json", results)
    scoring = ["python", "eval.py", "--run", c.out, "--tasks", c.tasks, *(["--data", c.data] if c.data else [])]
    if not all(has_test(task, c.data or DEFAULT) for task in task_names(c.tasks, c.data or DEFAULT)):
        scoring += ["--split", "val"]  # the part that no step has trained on
    print(f"saved {c.out}/best and {c.out}/last in {clock(seconds)}; score it on all questions with:\n"
          f"{shlex.join(scoring)}")
    return results


def scores_before_and_after(model, tokenizer, task: str, records: list[dict], c: Config, quiet: bool) -> dict:
    """{"acc" and "acc_norm": {"before", "after" training}}, in percent; of free answers, "loss" and "perplexity"."""
    print(f"{task}: scoring {len(records)} test questions without and with the adapters", flush=True)
    with adapters_off(model):  # the frozen base is what it was
        before = evaluate(model, tokenizer, records, c.form, c.max_len, quiet)
    after, name = evaluate(model, tokenizer, records, c.form, c.max_len, quiet), accuracy_key(c.form)
    if "loss" in after:
        print(f"{task}: perplexity of an answer token on {len(records)} held-out test records {before['perplexity']:.4g} "
              f"before, {after['perplexity']:.4g} after training")
        return {key: {"before": before[key], "after": after[key]} for key in ("loss", "perplexity")}
    print(f"{task}: {name} {before[name]:.1f} % before, {after[name]:.1f} % after training, on {len(records)} test "
          f"questions\n(always the commonest label: {after['majority']:.1f} %)")
    return {key: {"before": before[key], "after": after[key]} for key in ("acc", "acc_norm")}


# ---------------------------------------------------------------------------------------------------- main

def main(argv: list[str] | None = None) -> dict:
    """A run, as on the command line: argv holds flags and their values, which may be numbers and paths. Returns

        {"out": its directory, "steps": int, "best_validation_loss": nats or None, "seconds": float,
         "tasks": {task: {"acc" and "acc_norm", or of free answers "loss" and "perplexity": {"before", "after"}}} of
         --test's questions}.

    UserError for what a user can mend; Stopped, a KeyboardInterrupt, when Ctrl-C or SIGTERM ends it, with all saved."""
    c = parse(sys.argv[1:] if argv is None else argv)
    device, dtype = pick_device(c.device, c.dtype)
    team = Team.join(device)
    dtype = team.of_the_first(dtype)  # each has timed what its cores are quick in
    run, signals = Run(Path(c.out), team.rank == 0, team.size, c.logger), Signals()
    # Of several processes, the first alone speaks.
    quiet = nullcontext() if team.rank == 0 else redirect_stdout(open(os.devnull, "w"))
    try:
        with quiet:
            results = train(c, dtype, team, run, signals)
        team.leave()
        return {"out": c.out} | results
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if not (text := run.explain(error, c, team)):
            raise
        raise UserError(text) from error
    finally:
        signals.release()
        run.close()


if __name__ == "__main__":
    run_command(main)
