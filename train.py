"""Trains gated adapters on the commonsense tasks: one plain loop.

    python train.py --preset quickstart                        # minutes on a laptop's CPU
    python train.py --init gpt2-medium --peft gatera           # the paper's recipe on commonsense_170k, one GPU
    python train.py --init gpt2-medium --peft lora --gate token --lr 3e-4
    python train.py --help

    python train.py --resume out/quickstart                    # an interrupted run goes on, as if it never had stopped
    torchrun --nproc_per_node=4 -- train.py --init gpt2-medium # four processes share each batch

A run directory holds config.json (everything needed to repeat it), metrics.jsonl (a line for each logged step), the
adapters best/ (lowest validation loss) and last/, which eval.py and gatera.load_adapter read, and state.safetensors, by
which --resume goes on. The loop is in `train`; what stands after it, a first reading can leave out: the command line,
interruptions and faults, several processes, the memory plan.
"""
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import random
import resource
import shlex
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from data.commonsense import FORMS, Packed, Question, pack, training_question
from data.cli import device_problems, flag, pick_device, read_flags, run_command
from data.download import find_model
from data.files import UserError, claim, move_aside, read_json, read_tensors, unwritable, write_json, write_tensors
from data.prepare import DEFAULT, TASKS, count_repeated, hold_out, load_records, prepare, task_names
from data.results import UNIMPORTANT, accuracy_key
from eval import evaluate, log_likelihoods
from gatera import (METHODS, AdapterConfig, adapter_state, adapters_off, gate_entropy, gate_values, gated_layers,
                    inject_adapters, load_adapter, save_adapter)
from model import Transformer, TransformerConfig, compile_blocks, load_tokenizer, read_config


# ----------------------------------------------------------------------------------------- configuration

@dataclass
class Config:
    """Every setting. The comment of a field is its --help; the defaults are the paper's recipe."""
    preset: str = ""                # a named set of other defaults: quickstart
    init: str = "gpt2-medium"       # base: gpt2, smollm2-135m, llama-3-8b, ..., a hub id, a directory, a .gguf file
    out: str = ""                   # run directory; default out/<preset>, or out/<init>-<peft>-<gate>
    resume: str = ""                # go on with the run in this directory, with its settings
    # the method
    peft: str = "gatera"            # lora, dora, hira, or gatera, which is hira with the token gate
    gate: str = ""                  # none, token or static; default: token for gatera, none for the others
    r: int = 32                     # rank
    alpha: float = 0.0              # LoRA and DoRA scale by alpha / r; 0: alpha = 2 r
    dropout: float = 0.0            # on the adapters' input
    targets: str = "qkv,fc"         # adapted layers: qkv (q, k, v), fc (up, down), or layer names, with commas between
    entropy_weight: float = 0.01    # lambda: how strongly gates are pushed towards 0 or 1
    gate_bias: float = 0.0          # b_g at the start; the gate opens sigmoid(b_g)
    skip_closed: float = 0.0        # tokens with a gate up to this skip the update and its cost; 0: none do
    gate_lr: float = 0.0            # learning rate of w_g and b_g; 0: the same as lr
    # data
    tasks: str = "all"              # training tasks, with commas between; all eight are commonsense_170k
    form: str = "label"             # label (the papers' instruction) or cloze (the answer's own words)
    data: str = ""                  # directory of <task>/{train,test}.jsonl; default data/commonsense, made if need be
    max_len: int = 512              # tokens of a prompt with its answer; a longer prompt loses its start
    limit: int = 0                  # the first so many training records of each task; 0: all
    # optimisation
    lr: float = 1e-3                # peak learning rate of AdamW
    weight_decay: float = 0.0       # AdamW's
    batch: int = 32                 # records an optimiser step
    micro_batch: int = 0            # records a forward, gradients add up to the batch's; 0: the whole batch
    epochs: int = 3                 # passes over the training records
    max_steps: int = 0              # stop after so many steps; 0: by epochs
    warmup: int = 100               # steps of linear warmup, before linear decay to 0
    clip: float = 1.0               # largest gradient norm; 0: no clipping
    seed: int = 1337                # of the adapter's start, the data's order and dropout
    # validation and logging
    validation: int = 120           # held-out records (of those that eval.py --split val scores) that pick best/
    eval_every: int = 200           # steps between validations
    log_every: int = 10             # steps between progress lines
    save_every: int = 100           # steps between checkpoints, from which --resume goes on
    test: int = 0                   # score so many test questions of each task before and after training; 0: none
    # machine
    device: str = "auto"            # auto, cpu, cuda, cuda:1, ...
    dtype: str = "auto"             # float32, bfloat16, float16; auto: bfloat16 on cuda, float32 on cpu
    compile: bool = False           # torch.compile the model
    checkpointing: bool = False     # recompute activations in the backward: less memory, a third more time
    plan: bool = False              # only print how much memory the run would need; reads no weights and no data
    fsdp: bool = False              # under torchrun: each process keeps a share of the frozen base, not all of it


PRESETS = {
    # SmolLM2-135M learns to answer grade-school science questions in minutes of a laptop's CPU. The multiplicative
    # update of HiRA wants a high rate: of 5e-3, 1e-2 and 2e-2, 1e-2 had the lowest loss on held-out training records.
    "quickstart": dict(init="smollm2-135m", tasks="ARC-Easy", form="cloze", lr=1e-2, batch=16, max_steps=40, warmup=4,
                       validation=40, eval_every=20, log_every=2, test=200),
}
TARGETS = {"qkv": ("q_proj", "k_proj", "v_proj"), "fc": ("up_proj", "down_proj")}


def adapter_config(c: Config) -> AdapterConfig:
    targets = tuple(name for word in c.targets.split(",") for name in TARGETS.get(word, (word,)))
    return AdapterConfig(method="hira" if c.peft == "gatera" else c.peft, gate=c.gate, r=c.r, alpha=c.alpha or None,
                         dropout=c.dropout, targets=targets, gate_bias=c.gate_bias, skip_closed=c.skip_closed)


# ------------------------------------------------------------------------------------------------- data

def load_data(c: Config) -> tuple[list[dict], list[dict], dict[str, list[dict]]]:
    """(training, validation, test) records: the tasks' training sets without what data/prepare.py holds out of them,
    as many of the held-out records as --validation wants, and test records by task."""
    tasks, data = task_names(c.tasks), c.data or DEFAULT
    if not c.data:
        prepare(tasks, ("train", "test") if c.test else ("train",))
    training, held_out = [], []
    for task in tasks:
        kept, val = hold_out(load_records(task, "train", data))
        training += kept[:c.limit or None]
        held_out += val
    test = {task: load_records(task, "test", data)[:c.test] for task in tasks} if c.test else {}
    if not training:
        raise UserError(f"{len(held_out)} training records leave none beside those held out for validation")
    if len(held_out) < c.validation:
        raise UserError(f"--validation {c.validation}: only {len(held_out)} records are held out of these tasks' "
                        "training sets (a tenth, at most 200 a task); expected no more")
    if repeated := count_repeated(training):
        print(f"{repeated:,} records occur more than once in the training data")
    # drawn with a seed of its own: runs with different seeds are validated on the same records
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
    cut: int                           # prompts that lost their start


def load_batches(records: list[dict], encode, c: Config, team: "Team", first: int, steps: int):
    """The Batches of the steps from `first` on. encode: record -> Question; a batch's takes less time than
    its step, so none is kept."""
    size = c.micro_batch or math.ceil(c.batch / team.size)
    for numbers in itertools.islice(batches(len(records), c), first, steps):
        questions = [encode(records[i]) for i in numbers]
        # This process's share. All processes need as many rows, since with --fsdp they make forwards together: one
        # that has no question left takes any, and weighs it 0.
        share, longest = questions[team.rank::team.size], math.ceil(len(questions) / team.size)
        rows = [(pack(share[i:i + size] or questions[:1]), int(i < len(share))) for i in range(0, longest, size)]
        yield Batch(numbers, rows, n_answer=sum(len(q.answers[0]) for q in questions),
                    n_token=sum(len(q.prompt) + len(q.answers[0]) - 1 for q in questions),  # the last is not read
                    cut=sum(q.cut > 0 for q in questions))


# ------------------------------------------------------------------------------------------------ helpers

def learning_rate(step: int, steps: int, c: Config) -> float:
    """The factor on every learning rate: linear warmup, then linear decay to 0. Step 0 already moves."""
    if step < c.warmup:
        return (step + 1) / (c.warmup + 1)
    return (steps - step) / max(1, steps - c.warmup)


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU's allocator, or of this process (ru_maxrss is in KiB, on macOS in bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def mean_gates(model, is_answer: torch.Tensor) -> dict[str, float]:
    """Mean gate on prompt and on answer tokens in the last forward, {} without gates; is_answer (1, N)."""
    gates = gate_values(model)
    if not gates:
        return {}
    mean = torch.stack(list(gates.values())).float().mean(0)                    # over layers: (1, N)
    parts = {"gate_prompt": mean[~is_answer], "gate_answer": mean[is_answer]}
    return {name: part.mean().item() for name, part in parts.items() if len(part)}


def validation_loss(model, questions, autocast) -> float:
    """Mean cross entropy of an answer token, in nats."""
    model.eval()
    with autocast:
        total = -sum(scores[0] for scores in log_likelihoods(model, questions))
    model.train()
    return total / sum(len(question.answers[0]) for question in questions)


def progress(line: dict, steps: int) -> str:
    """A line of metrics.jsonl as people read it."""
    gates = ""
    if "gate_prompt" in line:
        gates = (f" | entropy {line['entropy']:.3f} | gate prompt {line['gate_prompt']:.2f}"
                 f" answer {line.get('gate_answer', math.nan):.2f}")
    norm = math.nan if line["grad_norm"] is None else line["grad_norm"]
    return (f"step {line['step']:>5}/{steps} | loss {line['loss']:.4f}{gates} | lr {line['lr']:.2e} | norm "
            f"{norm:.2f} | {line['tokens_per_s']:,.0f} tokens/s | {line['memory_gib']:.1f} GiB")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def scores_before_and_after(model, tokenizer, test_records: dict[str, list[dict]], c: Config, quiet: bool) -> dict:
    """{task: {"acc" and "acc_norm": {"before", "after" training}}}, in percent."""
    scores, name = {}, accuracy_key(c.form)
    for task, records in test_records.items():
        print(f"{task}: scoring {len(records)} test questions without and with the adapters", flush=True)
        with adapters_off(model):  # the frozen base is what it was
            before = evaluate(model, tokenizer, records, c.form, c.max_len, quiet)
        after = evaluate(model, tokenizer, records, c.form, c.max_len, quiet)
        scores[task] = {key: {"before": before[key], "after": after[key]} for key in ("acc", "acc_norm")}
        print(f"{task}: {name} on {len(records)} held-out test questions {before[name]:.1f} % before, "
              f"{after[name]:.1f} % after training (always the commonest label: {after['majority']:.1f} %)")
    return scores


# ------------------------------------------------------------------------------------------------ training

def train(c: Config, dtype: torch.dtype, team: "Team", run: "Run", signals: "Signals") -> dict:
    """One run, from the records to best/ and last/; `main` calls it. Alone, this process is a team of one."""
    device, out, started = team.device, run.out, time.time()

    # Tokenizer and records.
    if team.rank > 0:
        team.wait()  # for the first process, which downloads what is not there yet
    tokenizer = load_tokenizer(c.init)
    if tokenizer.eos is None:
        raise UserError(f"{c.init}: its tokenizer names no end-of-text token, which answers are trained to end with")
    read_config(c.init)  # a model is refused, if at all, before its data and its weights are downloaded
    train_records, validation_records, test_records = load_data(c)
    find_model(c.init, weights=True)
    if team.rank == 0:
        team.wait()  # everything is there: the others may go on

    def encode(record: dict) -> Question:
        return training_question(record, c.form, tokenizer, c.max_len)

    validation = [encode(record) for record in validation_records]

    # The frozen base. With --fsdp first on the CPU, where all processes share one mapped file; Team.shard then moves it
    # block by block.
    model = Transformer.from_pretrained(c.init, dtype=dtype, device="cpu" if c.fsdp else device)
    model.gradient_checkpointing = c.checkpointing
    if c.max_len > model.config.max_len:
        raise UserError(f"--max-len {c.max_len} is longer than the base's context of {model.config.max_len}")
    n_base = sum(p.numel() for p in model.parameters())

    # The adapters, which alone are trained.
    torch.manual_seed(c.seed)
    inject_adapters(model, adapter_config(c))
    trainable = adapter_state(model)
    n_trainable = sum(p.numel() for p in trainable.values())
    print(f"{c.init}: {n_base:,} frozen parameters; {c.peft}, gate {c.gate}, r {c.r}: {n_trainable:,} trainable, "
          f"{100 * n_trainable / (n_base + n_trainable):.4f} % of all; {device.type}, "
          f"{str(dtype).removeprefix('torch.')}" + (f"; {team.size} processes" if team.size > 1 else ""))
    if c.fsdp:
        team.shard(model)
    if c.compile:
        compile_blocks(model)
    model.train()

    gates = [p for name, p in trainable.items() if name.endswith(("w_g", "b_g"))]
    others = [p for name, p in trainable.items() if not name.endswith(("w_g", "b_g"))]
    groups = [{"params": others, "peak": c.lr}, {"params": gates, "peak": c.gate_lr or c.lr}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, weight_decay=c.weight_decay, betas=(0.9, 0.999), fused=True)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # does nothing for the other dtypes

    steps = c.max_steps or c.epochs * math.ceil(len(train_records) / c.batch)
    if c.warmup >= steps:
        raise UserError(f"--warmup {c.warmup} is not shorter than the run of {steps} steps")
    print(f"{len(train_records):,} training and {len(validation)} validation records of "
          f"{', '.join(task_names(c.tasks))}, {c.form} form; loss on the answer alone; {steps} steps of {c.batch}; "
          f"writing to {out}")

    # config.json, and the first line of metrics.jsonl
    digest = hashlib.sha256(json.dumps([train_records, validation_records]).encode()).hexdigest()
    facts = {"config": dataclasses.asdict(c) | {"resume": ""}, "adapter": dataclasses.asdict(model.adapter_config),
             "steps": steps, "base_parameters": n_base, "trainable_parameters": n_trainable, "data_sha256": digest,
             "processes": team.size, "device": str(device), "dtype": str(dtype), "torch": torch.__version__,
             "python": platform.python_version()}
    saved = run.begin(facts, c, model, optimizer, scaler)  # with --resume, these three are now as they were saved
    first, best, cut = saved["step"], saved["best"], saved["cut"]  # first step; lowest validation loss; prompts cut
    started -= saved["seconds"]

    # ------------------------------------------------------------------------------------------- the loop
    data = load_batches(train_records, encode, c, team, first, steps)
    upcoming = next(data, None)
    tokens, since, logged = 0, time.time(), first - 1  # since the last progress line: tokens, its time, its step
    caught = 0  # signals to stop
    signals.catch()
    for step in range(first, steps):
        batch = upcoming
        # Dropout depends on seed, step and process alone, so that it is the same after a --resume.
        torch.manual_seed(random.Random(f"{c.seed} {step} {team.rank}").getrandbits(63))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, steps, c)

        # L = L_task + lambda L_ent (GateRA): means over the whole batch, however it is cut into rows. L_task is over
        # the answers' tokens, L_ent over all, prompt and answer; a packed row has no padding to leave out.
        loss, entropy = 0.0, 0.0  # L_task and L_ent of the rows so far, which are logged apart
        for row, weight in batch.rows:
            row = row.to(device)
            with autocast:
                logits = model(row.ids, documents=row.documents, select=row.select)                  # (M, V)
                l_task = F.cross_entropy(logits.float(), row.targets, reduction="sum") * weight / batch.n_answer
                l_ent = gate_entropy(model) * (weight * row.ids.numel() / batch.n_token)
            scaler.scale(l_task + c.entropy_weight * l_ent).backward()
            loss, entropy = loss + l_task.detach(), entropy + l_ent.detach()
        # Over all processes; a signal to one of them stops all.
        sums = torch.stack([loss, entropy, loss.new_full((), len(signals.caught))])
        loss, entropy, caught = team.add_up(trainable.values(), sums)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), c.clip or math.inf)
        scaler.step(optimizer)  # leaves out a step whose gradients overflowed float16
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        tokens, cut = tokens + batch.n_token, cut + batch.cut
        upcoming = next(data, None)  # while a GPU still computes: tolist() below is the one wait for it
        loss, entropy, caught, norm = torch.stack([loss, entropy, caught, norm]).tolist()
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1  # float16: its scale halves, training goes on
        if not math.isfinite(loss) or not (math.isfinite(norm) or may_overflow):
            raise UserError(f"step {step}: the loss is {loss}, the gradient's norm {norm}; lower --lr, or use --dtype "
                            f"float32; the batch was {where(batch.numbers, train_records, c)}; {run.advice()}")

        is_last = step == steps - 1
        if step % c.log_every == 0 or is_last:
            now = time.time()
            line = {"step": step, "loss": loss, "entropy": entropy, **mean_gates(model, row.is_answer),  # last row's
                    "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm if math.isfinite(norm) else None,
                    "tokens_per_s": tokens / (now - since), "memory_gib": peak_memory(device)}
            left = (steps - 1 - step) * (now - since) / (step - logged)
            tokens, since, logged = 0, now, step
            run.record(line)
            print(f"{progress(line, steps)} | {clock(left)} left", flush=True)
        if validation and ((step + 1) % c.eval_every == 0 or is_last):
            paused = time.time()
            value = validation_loss(model, validation, autocast)  # the same on every process
            if not math.isfinite(value):
                raise UserError(f"step {step}: the validation loss is {value}; lower --lr, or use --dtype float32; "
                                f"{run.advice()}")
            run.record({"step": step, "validation_loss": value})
            print(f"step {step:>5}/{steps} | validation loss {value:.4f}" + (" | best so far" if value < best else ""))
            if value < best:
                best = value
                run.save_best(model)
            since += time.time() - paused
        if caught or is_last or (step + 1) % c.save_every == 0:
            run.save(step + 1, model, optimizer, best=best, cut=cut, scaler=scaler.state_dict(),
                     seconds=time.time() - started)
        if caught:
            team.wait()  # until all are here
            break
    # ----------------------------------------------------------------------------------- the end of the loop
    if caught or signals.caught:
        print(f"interrupted; {run.advice()}")
        sys.exit(128 + (signals.caught or [signal.SIGTERM])[0])
    signals.release()
    if validation:
        team.wait()  # until the first process has written it
        load_adapter(model, out / "best")
    else:
        run.save_best(model)
    if cut:
        print(f"{cut} times a question was longer than {c.max_len} tokens and lost the start of its prompt")
    results = {"steps": steps, "best_validation_loss": best if validation else None, "seconds": time.time() - started,
               "tasks": scores_before_and_after(model, tokenizer, test_records, c, quiet=team.rank > 0)}
    run.write("training.json", results)
    print(f"saved {out}/best and {out}/last in {clock(results['seconds'])}; score it on all questions with: "
          f"python eval.py --run {out} --tasks {c.tasks}" + (f" --data {c.data}" if c.data else ""))
    if dist.is_initialized():
        dist.destroy_process_group()
    return results


# ======================================================================= what a first reading can leave out

# ---------------------------------------------------------------------------------------- the command line

CHOICES = {"preset": PRESETS, "peft": (*METHODS, "gatera"), "form": FORMS,
           "dtype": ("auto", "float32", "bfloat16", "float16")}
# What --resume may set anew. (With --dropout, --micro-batch changes the masks; --data has to hold the same records.)
MAY_CHANGE = (*UNIMPORTANT, "eval_every")


def parse(argv: list[str]) -> Config:
    """Flags -> Config. UserError lists everything that is wrong with them at once."""
    given, wrong = read_flags(Config, argv, __doc__, CHOICES)
    recorded = recorded_config(Path(given["resume"])) if "resume" in given else {}
    wrong += [f"{flag(name)} {given[name]}: the run to resume has {value}" for name, value in recorded.items()
              if name not in MAY_CHANGE and given.get(name, value) != value]
    if recorded and "out" in given:
        wrong.append(f"--out {given['out']}: a run is resumed where it is")
    config = Config(**(PRESETS.get(given.get("preset"), {}) | recorded | given))
    config.gate = config.gate or ("token" if config.peft == "gatera" else "none")
    if config.resume:
        config.out = config.resume
    elif not config.out:
        base = Path(config.init).name.removesuffix(".gguf")
        config.out = f"out/{config.preset or f'{base}-{config.peft}-{config.gate}'}"
    wrong += check(config)
    if wrong:
        raise UserError("; ".join(wrong))
    return config


def check(c: Config) -> list[str]:
    """What is wrong with the values, one text each."""
    tasks, out = task_names(c.tasks), Path(c.out)
    unknown = [task for task in tasks if task not in TASKS]
    rules = [
        (c.peft != "gatera" or c.gate == "token",
         f"--peft gatera is hira with the token gate; for --gate {c.gate} use --peft hira"),
        (not unknown, f"--tasks {', '.join(unknown).strip() or c.tasks}: expected all or some of {', '.join(TASKS)}"),
        (len(set(tasks)) == len(tasks), f"--tasks {c.tasks}: a task is named twice"),
        (0 < c.lr <= 1, f"--lr {c.lr}: expected a number above 0, up to 1"),
        (c.max_len >= 16, f"--max-len {c.max_len}: expected 16 or more"),
        (0 <= c.seed < 2**63, f"--seed {c.seed}: expected a whole number from 0 to 2^63 - 1"),
        (not c.max_steps or c.warmup < c.max_steps,
         f"--warmup {c.warmup}: expected less than --max-steps {c.max_steps}"),
        (not (c.compile and c.checkpointing), "--compile with --checkpointing: expected one of them"),
        (not (c.compile and c.fsdp), "--compile with --fsdp: expected one of them"),
        (not c.fsdp or "RANK" in os.environ or c.plan, "--fsdp: start it by torchrun --nproc_per_node=N -- train.py"),
    ]
    least = {1: ("batch", "epochs", "eval_every", "log_every", "save_every"),
             0: ("entropy_weight", "gate_lr", "limit", "weight_decay", "micro_batch", "max_steps", "warmup", "clip",
                 "validation", "test")}
    rules += [(low <= getattr(c, name) < math.inf,
               f"{flag(name)} {getattr(c, name)}: expected a finite number, {low} or more")
              for low, names in least.items() for name in names]
    # argparse has checked those of the command line, but not those of the run to resume
    rules += [(getattr(c, name) in ("", *choices), f"{flag(name)} {getattr(c, name)}: expected one of "
               f"{', '.join(choices)}") for name, choices in CHOICES.items()]
    wrong = [message for fine, message in rules if not fine] + device_problems(c.device)
    if problem := unwritable(out):
        wrong.append(f"--out {problem}")
    # A run may replace an earlier run, which is moved aside, but nothing else that is already there.
    elif out.is_dir() and any(out.iterdir()) and not (out / "metrics.jsonl").exists() or out.resolve() == Path.cwd():
        wrong.append(f"--out {out}: the directory holds other things than a run; expected a new or empty one")
    try:
        adapter_config(c)
    except UserError as error:
        wrong.append(str(error))
    return wrong


def recorded_config(out: Path) -> dict:
    """The settings of the run in `out`. Its dtype is no longer "auto": what that meant, it has to mean again."""
    facts = read_json(out / "config.json") if (out / "config.json").exists() else {}
    if not {"config", "dtype", "steps", "data_sha256"} <= set(facts):
        raise UserError(f"--resume {out}: there is no run; expected a directory with the config.json of one")
    known = {field.name for field in dataclasses.fields(Config)}
    settings = {name: value for name, value in facts["config"].items() if name in known}
    return settings | {"dtype": facts["dtype"].removeprefix("torch.")}


def main(argv: list[str] | None = None) -> dict:
    c = parse(sys.argv[1:] if argv is None else argv)
    if c.plan:
        print(plan(c))
        return {}
    device, dtype = pick_device(c.device, c.dtype)
    team = Team.join(device)
    run, signals = Run(Path(c.out), team), Signals()
    # of several processes, the first alone speaks
    quiet = nullcontext() if team.rank == 0 else redirect_stdout(open(os.devnull, "w"))
    try:
        with quiet:
            return train(c, dtype, team, run, signals)
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if not (text := explain(error, c, run)):
            raise
        raise UserError(text) from error
    finally:
        signals.release()
        run.close()


# --------------------------------------------------------------------------------- interruptions and faults

class Run:
    """A run's directory, which one process at a time owns. state.safetensors is one file, replaced as a whole, so that
    a new adapter never is beside an old optimizer. Nothing in it is random: a step's random numbers follow from the
    seed and the step's number, as the order of the data does. Of several processes, the first alone writes."""

    def __init__(self, out: Path, team: "Team"):
        self.out, self.team, self.state = out, team, out / "state.safetensors"
        self.metrics = None  # the open metrics.jsonl, in the first process alone
        self.step = None     # steps that are saved

    def begin(self, facts: dict, c: Config, model, optimizer, scaler) -> dict:
        """Takes the directory over and writes its config.json, which holds `facts`. With --resume, puts what was saved
        into model, optimizer and scaler. Returns what `save` was told last; of a new run, the start."""
        if self.team.rank == 0:
            self.take_over(bool(c.resume))
        saved = self.load(model, optimizer) if c.resume and self.state.exists() else {}
        if saved:
            check_resumed(saved, facts, c)
            scaler.load_state_dict(saved["scaler"])
        elif c.resume:
            print("nothing was saved yet: starting over")
        if self.metrics:
            self.metrics.truncate(saved.get("metrics", 0))  # lines of steps that were not saved come again
        if not saved:
            self.record(facts)
        self.write("config.json", facts)
        return {"step": 0, "best": math.inf, "cut": 0, "seconds": 0.0} | saved

    def take_over(self, resuming: bool):
        """Moves an earlier run aside, to out-1, out-2, ...: a new run overwrites nothing."""
        if not resuming and (self.out / "metrics.jsonl").exists():
            self.lock()
            aside = move_aside(self.out)
            self.metrics.close()
            print(f"the earlier run in {self.out} is now in {aside}")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock()
        for half in [*self.out.glob(".*.tmp"), *self.out.glob("*/.*.tmp")]:
            half.unlink()  # of a process that was killed while it wrote

    def lock(self):
        self.metrics = open(self.out / "metrics.jsonl", "a")
        claim(self.metrics, self.out)

    def record(self, line: dict):
        if self.metrics:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()

    def save(self, step: int, model, optimizer, **info):
        """All that the steps from `step` on depend on. What was saved before stays until this is on the disk."""
        if self.metrics:
            os.fsync(self.metrics.fileno())
            info |= {"step": step, "metrics": os.fstat(self.metrics.fileno()).st_size}
            tensors = adapter_state(model)
            moments = {f"{name}.{key}": value for name, p in tensors.items()
                       for key, value in optimizer.state[p].items()}
            save_adapter(model, self.out / "last")  # first: what the state says is done, last/ has too
            write_tensors(self.state, tensors | moments, json.dumps(info))
        self.step = step

    def save_best(self, model):
        if self.metrics:
            save_adapter(model, self.out / "best")

    def write(self, name: str, values: dict):
        if self.metrics:
            write_json(self.out / name, values)

    def load(self, model, optimizer) -> dict:
        """Puts the saved tensors where they came from and returns save's `info`."""
        tensors, info = read_tensors(self.state, with_info=True)
        info, own, state = json.loads(info), adapter_state(model), optimizer.state_dict()
        names = {p: name for name, p in own.items()}
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        state["state"] = {i: {key: tensors[f"{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                          for i, name in enumerate(order)}
        optimizer.load_state_dict(state)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        self.step = info["step"]
        return info

    def close(self):
        with suppress(OSError):  # on a full disk, the line that could not be written would raise once more
            if self.metrics:
                self.metrics.close()

    def advice(self) -> str:
        if self.step is None:
            return "nothing was saved yet"
        program = "python" if self.team.size == 1 else f"torchrun --nproc_per_node={self.team.size} --"
        return (f"what was learnt in {self.step} steps is in {self.out}; go on with: "
                f"{program} train.py --resume {shlex.quote(str(self.out))}")


def check_resumed(saved: dict, facts: dict, c: Config) -> None:
    """UserError if the run cannot go on from what was saved; else prints where it does. facts: the new config.json."""
    earlier, first, steps = read_json(Path(c.out) / "config.json"), saved["step"], facts["steps"]
    if earlier["data_sha256"] != facts["data_sha256"]:
        raise UserError(f"--resume {c.out}: the training or validation records have changed since the run began")
    if first > steps:
        raise UserError(f"--resume {c.out}: {first} steps are done already, more than the {steps} wanted")
    print(f"going on after {first} of {steps} steps")
    if earlier["steps"] != steps:
        now, before = (c.lr * learning_rate(first, n, c) for n in (steps, earlier["steps"]))
        print(f"the run had {earlier['steps']} steps: its learning rate goes on at {now:.2e} instead of "
              f"{before:.2e} and decays to 0 at step {steps}")


def explain(error: Exception, c: Config, run: Run) -> str:
    """What a user can do about a fault of the machine; "" for an error that is one of ours."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        size = c.micro_batch or math.ceil(c.batch / run.team.size)
        return (f"out of memory: lower --micro-batch (now {size}) or --max-len (now {c.max_len})"
                f"{'' if c.checkpointing else ', or add --checkpointing'}; {run.advice()}")
    if isinstance(error, (OSError, SafetensorError)) and run.metrics:  # the disk is full, ...
        return f"cannot write: {error}; {run.advice()}"
    if run.team.size > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError)):
        return f"process {run.team.rank}: another process has ended, its own message says why; {run.advice()}"
    return ""


def where(numbers: list[int], records: list[dict], c: Config) -> str:
    """The records of a batch by task and line of its train.jsonl, to look at when a step went wrong."""
    texts = []
    for task in dict.fromkeys(records[number]["task"] for number in numbers):
        lines = load_records(task, "train", c.data or DEFAULT)
        found = [str(lines.index(records[number]) + 1) for number in numbers if records[number]["task"] == task]
        texts.append(f"{task} {', '.join(found)}")
    return "; ".join(texts)


class Signals:
    """Between `catch` and `release`, Ctrl-C and SIGTERM are noted in `caught`, for the loop to stop after the step in
    hand. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.caught, self.before = [], {}

    def catch(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame):
        self.caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------- several processes

class Team(NamedTuple):
    """The processes that torchrun started, each with a share of every batch. Alone: rank 0 of 1."""
    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> "Team":
        if "RANK" not in os.environ:
            return cls(0, 1, device)
        cuda = device.type == "cuda"
        if cuda:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(hours=6))  # the first process may have gigabytes to download
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def add_up(self, parameters, sums: torch.Tensor) -> torch.Tensor:
        """Sums gradients, in place, and `sums` (k,) over all processes: each has divided its loss by the token counts
        of the whole batch, so that the sum is what one process would have, also where shares differ. Adapters are
        small: one buffer and one exchange after the backward do for DistributedDataParallel's many during it."""
        if self.size == 1:
            return sums
        flat = torch.cat([*(p.grad.flatten() for p in parameters), sums])
        dist.all_reduce(flat)
        *grads, sums = flat.split([*(p.numel() for p in parameters), len(sums)])
        for p, grad in zip(parameters, grads):
            p.grad.copy_(grad.view_as(p))
        return sums

    def shard(self, base: Transformer):
        """Spreads the frozen base: of each block a process keeps 1 / size, and fetches the rest when the block's turn
        in forward or backward comes. Adapters and their optimizer stay whole everywhere, all else is as it was."""
        adapters = set(adapter_state(base).values())
        for p in adapters:
            p.data = p.data.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for module in (*base.blocks, base):  # one by one: no more than a block is whole on the device
            fully_shard(module, mesh=mesh, ignored_params=adapters)


# ------------------------------------------------------------------------------------------------- the plan

ANSWER_TOKENS = 10  # about as many as an answer has, in either form


def kept_for_backward(config: TransformerConfig, c: Config, dtype: torch.dtype) -> int:
    """Bytes that a forward of one record of max_len tokens keeps for its backward: those of a real forward, of fake
    tensors, which have shapes and no memory."""
    kept = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        # held on to, so that no other storage gets its number
        kept[storage._cdata] = (storage, 0 if storage._cdata in own else storage.nbytes())
        return tensor

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model = Transformer(config)
        for module in model.modules():  # fake tensors know no model.to(dtype)
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(p.to(dtype)))
        inject_adapters(model, dataclasses.replace(adapter_config(c), skip_closed=0.0))  # at worst, none is closed
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            row = torch.arange(c.max_len)[None]
            logits = model(row, select=row[0, -ANSWER_TOKENS:])
            F.cross_entropy(logits.float(), row[0, -ANSWER_TOKENS:]) + gate_entropy(model)
    return sum(size for _, size in kept.values())


def plan(c: Config) -> str:
    """The memory a run needs, from its configuration alone: a table for 1 to 8 processes, with and without --fsdp and
    --checkpointing, for records that all have max_len tokens."""
    config, (device, dtype) = read_config(c.init), pick_device(c.device, c.dtype)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        inject_adapters(model, adapter_config(c))
    adapters, frozen = adapter_state(model).values(), [p for p in model.parameters() if not p.requires_grad]
    n_adapter, n_base = sum(p.numel() for p in adapters), sum(p.numel() for p in frozen)
    # in bytes: the weights,
    base = sum(p.nbytes for p in frozen)
    block = sum(p.nbytes for p in model.blocks[0].parameters() if not p.requires_grad)
    ends = base - config.n_layer * block            # what is before and after the blocks
    training = 4 * sum(p.nbytes for p in adapters)  # values, gradients and AdamW's two moments
    # and what a record's forward keeps
    one, two = (kept_for_backward(dataclasses.replace(config, n_layer=n), c, dtype) for n in (1, 2))
    of_block, of_ends = two - one, 2 * one - two
    of_ends += 2 * ANSWER_TOKENS * config.vocab_size * 4  # the logits, and their gradient beside the kept log p
    # W0 ⊙ BA and BA in HiRA's backward, of one layer at a time
    hira = c.peft in ("hira", "gatera")
    widest = 2 * max(layer.weight.nbytes for layer in gated_layers(model).values()) if hira else 0
    program = 0.85 * 2**30 if device.type == "cpu" else 0  # Python, PyTorch and the heap's gaps, as measured

    def peak(n: int, checkpointing: bool, fsdp: bool) -> float:
        records = c.micro_batch or math.ceil(c.batch / n)
        inputs = c.max_len * config.d_model * dtype.itemsize  # of a block, which is all that checkpointing keeps
        activations = of_block + config.n_layer * inputs if checkpointing else config.n_layer * of_block
        weights = (base / n + ends + 2 * block) if fsdp else base  # of a block, and the next one
        return (program + weights + training + widest + records * (activations + of_ends)) / 2**30

    lines = [f"{c.init}: {n_base:,} frozen parameters, {base / 2**30:.2f} GiB in {str(dtype).removeprefix('torch.')}; "
             f"{c.peft}, gate {c.gate}, r {c.r}: {n_adapter:,} trainable, {training / 2**30:.2f} GiB with AdamW; a "
             f"token's activations {(config.n_layer * of_block + of_ends) / c.max_len / 2**20:.2f} MiB",
             f"GiB of a process with {c.micro_batch or f'{c.batch} / N'} records at a time of {c.max_len} tokens each:",
             f"{'N':>10} {'plain':>10} {'--checkpointing':>16} {'--fsdp':>10} {'both':>10}"]
    for n in (1, 2, 4, 8):
        plain, less, spread, both = (peak(n, *how) for how in ((0, 0), (1, 0), (0, 1), (1, 1)))
        lines.append(f"{n:>10} {plain:>10.1f} {less:>16.1f} " + (f"{spread:>10.1f} {both:>10.1f}" if n > 1 else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
