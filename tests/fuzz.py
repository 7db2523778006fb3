"""Damages what a user hands in, at random, and runs the programs on it: each try has to end well, or in one line.

    python tests/fuzz.py --tries 5000          prints how many tries of each kind ended how
    python tests/fuzz.py --seed 0 --only 1234  does one try again, and shows what the program said

A try takes a fresh copy of a tiny model, adapter, run, ..., damages one of its files (see `damage`) or a flag, and runs
one of the programs in a process of its own, with limits on its time and memory. The same --seed does the same damage.
"""
import argparse
import contextlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch

if __name__ == "__main__":  # run as a script
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import gguf.quants  # noqa: E402, F401  # before the tries are forked
import matplotlib.pyplot  # noqa: E402, F401
from conftest import write_gguf, write_gpt2, write_llama  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import prepare  # noqa: E402
from data.cli import run_command  # noqa: E402
from gatera import AdapterConfig, adapter_state, export_peft, inject_adapters, save_adapter  # noqa: E402
from model import Transformer  # noqa: E402

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"
PROGRAMS = {"train": train.main, "eval": evaluation.main, "prepare": prepare.main}
SECONDS, BYTES = 60, 4 << 30  # that a try may compute; of memory, beyond what the imports take
# What a careless or malicious writer of JSON may put in the place of a value.
ODD = [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308,
       float("nan"), float("inf"), "", " ", "_", "0", "12", "nan", "\ud800", "\udcff_", "\0", "﻿", "‮ 🙂", "a" * 5000,
       "../../x", "/etc/passwd", "..", "(", "a+" * 9, [], [[]], {}, {"a": 1}, [None], [1, "2"], ["q_proj"] * 3]


# ------------------------------------------------------------------------------------------------- damage

def places(value, place=()):
    """Every place inside a JSON value, as a path of keys and indices; of long lists and dicts only some."""
    yield place
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in list(keys)[:40]:
            yield from places(value[key], (*place, key))


def damage_json(raw, dice: random.Random):
    """Changes one place: another type, a neighbour's value, no value, another name, or very deep nesting."""
    place = dice.choice(list(places(raw)))
    if not place:
        return dice.choice(ODD)
    parent = raw
    for key in place[:-1]:
        parent = parent[key]
    key, kind = place[-1], dice.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = str(parent[key])
    elif kind == 2:
        parent[key] = parent[dice.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))]
    elif kind == 3 and isinstance(parent, dict):
        parent[dice.choice([f"{key} ", "\ud800", "extra"])] = parent.pop(key)
    elif kind == 4 and isinstance(parent[key], (int, float)):
        n = parent[key]
        parent[key] = dice.choice([-n, n + 1, n * 2, n / 3, n * 2**40])
    else:
        parent[key] = dice.choice(ODD)
    return raw


def damage_bytes(content: bytes, dice: random.Random, head: int) -> bytes:
    """Flips, cuts, repeats or inserts bytes, mostly in the first `head`, where a binary file keeps its sizes."""
    content, end = bytearray(content), min(head, len(content)) if dice.random() < 0.8 else len(content)
    kind, i = dice.randrange(6), dice.randrange(end)
    if kind == 0:
        del content[i:]
    elif kind == 1:
        content[i:i] = dice.choice([b"\0", b"\xff", b"\xff" * 8, b"{", b"[" * 100_000, b"\n", b"9" * 5000])
    elif kind == 2:
        content[i:i + 8] = dice.choice((0, 2**31 - 1, 2**40, 2**64 - 1)).to_bytes(8, "little")
    elif kind == 3:
        j = dice.randrange(end)
        content[i:i] = content[j:j + dice.randrange(64)]
    else:
        for _ in range(dice.choice((1, 1, 1, 4))):
            content[dice.randrange(end)] = dice.randrange(256)
    return bytes(content)


def damage(file: Path, others: list[Path], dice: random.Random) -> None:
    if dice.random() < 0.15:
        return replace(file, others, dice)
    content = file.read_bytes()
    if file.suffix == ".safetensors" and dice.random() < 0.5:  # its header is JSON, behind the header's length
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(damage_json(json.loads(content[8:8 + size]), dice)).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + size:]
    elif file.suffix == ".json" and dice.random() < 0.8:
        text = json.dumps(damage_json(json.loads(content), dice), ensure_ascii=dice.random() < 0.5)
        content = text.encode("utf-8", "surrogatepass")
    elif file.suffix == ".jsonl" and dice.random() < 0.8:
        lines = content.splitlines()
        i = dice.randrange(len(lines))
        lines[i] = json.dumps(damage_json(json.loads(lines[i]), dice)).encode()
        content = b"\n".join(lines) + b"\n"
    else:
        content = damage_bytes(content, dice, 4000 if file.suffix in (".gguf", ".safetensors") else len(content))
    file.write_bytes(content)


def replace(file: Path, others: list[Path], dice: random.Random) -> None:
    """Something else in the place of a file: nothing, another file, or what is no file."""
    content = dice.choice(others).read_bytes()
    file.unlink()
    kind = dice.randrange(9)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(dice.choice([file.name, "/dev/zero", "nowhere"]))
    elif kind == 3:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(file))
    elif kind < 7:
        file.write_bytes(content if kind > 4 else b"")


def damage_flags(argv: list[str], dice: random.Random) -> list[str]:
    """Another value, a flag without its value, a value twice, an unknown flag, or what is between them left out."""
    i, kind = dice.randrange(len(argv)), dice.randrange(6)
    odd = str(dice.choice([*ODD, *NUMBERS, "llama", "run", "peft", "all", "piqa", "hf", "~nobody-is-called-so", "/dev/null"]))
    odd = odd if odd != str(2**31) else "2"  # as --max-steps, it is work for days
    flags = [f"--{name.replace('_', '-')}" for name in (*train.Config.__annotations__, *evaluation.Settings.__annotations__)]
    name = dice.choice(sorted({*flags} - {"--compile"}))  # which takes minutes
    if kind == 0:
        return argv[:i] + [odd] + argv[i + 1:]
    if kind == 1:
        return argv[:i] + argv[i + 1:]
    return [*argv, name, odd] if kind > 2 else [*argv, dice.choice([name, odd])]


# -------------------------------------------------------------------------------------- what is damaged, and run

NUMBERS = ["-1", "1e400", "-1e400", "nan", str(2**62), str(2**63), "9" * 40, "0x10", "1_0", "1e-320"]
TRAIN = ("train --data records --tasks piqa --form cloze --out out --peft lora --r 2 --warmup 0 --validation 1 --max-steps 1 --max-len 128 "
         "--batch 2 --device cpu --init ")
EVAL = "eval --data records --tasks piqa --limit 2 --device cpu --out scores "
MODEL = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
RUN = ["config.json", "metrics.jsonl", "state.safetensors", "best/adapter.json", "best/adapter.safetensors"]
SCORES = [f"{run}/eval/best-cloze-2/{name}" for run in ("run", "run2") for name in ("results.json", "predictions.jsonl")]
# {kind: (files that get damaged, commands that read them)}
KINDS = {
    "model": ([f"llama/{name}" for name in MODEL], [TRAIN + "llama", EVAL + "--init llama", EVAL + "--init llama "
                                                    "--protocol generate", EVAL + "--init llama --prompt hen"]),
    "shards": ([f"shards/{name}" for name in ("config.json", "model.safetensors.index.json",
                                              "model-00001-of-00002.safetensors")], [TRAIN + "shards"]),
    "gpt2": ([f"gpt2/{name}" for name in ("config.json", "vocab.json", "merges.txt", "special_tokens_map.json")],
             [TRAIN + "gpt2", EVAL + "--init gpt2"]),
    "gguf": (["tiny.gguf"], [TRAIN + "tiny.gguf", EVAL + "--init tiny.gguf"]),
    "adapter": (["ours/adapter.json", "ours/adapter.safetensors"], [EVAL + "--run ours --init llama", EVAL + "--run ours "
                                                                    "--init llama --gates"]),
    "peft": (["peft/adapter_config.json", "peft/adapter_model.safetensors"],
             [EVAL + "--run peft --init llama", "eval --run peft --init llama --export hf new"]),
    "records": (["records/piqa/train.jsonl", "records/piqa/test.jsonl"], [TRAIN + "llama --test 2", EVAL + "--init llama"]),
    "papers": (["papers/piqa/train.json", "papers/piqa/test.json"], ["prepare --tasks piqa --source papers --out new"]),
    "run": ([f"run/{name}" for name in RUN], ["train --data records --resume run --max-steps 3", EVAL + "--run run",
                                              EVAL + "--run run --gates", EVAL + "--run run --adapter last"]),
    "results": ([*SCORES, "run/metrics.jsonl", "run/config.json"],
                ["eval --compare run run2 --tasks piqa --limit 2 --out scores",
                 "eval --run run --data records --tasks piqa --limit 2 --device cpu"]),
    "flags": ([], [TRAIN + "llama", EVAL + "--init llama", EVAL + "--run run", "eval --compare run run2 --limit 2 --out scores",
                   "prepare --tasks piqa --source papers --out new"]),
}


def build(root: Path) -> None:
    """Valid files of all kinds, in `root`."""
    write_llama(root / "llama", layers=1)
    (root / "llama" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    write_llama(root / "shards", layers=1, shards=2, extra={"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}})
    gpt2 = write_gpt2(root / "gpt2", layers=1)
    raw = json.loads((gpt2 / "tokenizer.json").read_text())
    (gpt2 / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (gpt2 / "merges.txt").write_text("#version: 0.2\n" + "\n".join(raw["model"]["merges"]), encoding="utf-8")
    (gpt2 / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    (gpt2 / "tokenizer.json").unlink()
    write_gguf(root / "tiny.gguf", root / "llama")
    for method, gate, save, name in (("hira", "token", save_adapter, "ours"), ("dora", "none", export_peft, "peft")):
        model = Transformer.from_pretrained(root / "llama")
        inject_adapters(model, AdapterConfig(method, gate, r=2))
        for p in adapter_state(model).values():
            p.data.normal_(generator=torch.Generator().manual_seed(0))
        save(model, root / name)
    for split in ("train", "test"):
        (root / "records" / "piqa").mkdir(parents=True, exist_ok=True)
        lines = (SAMPLE / "piqa" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (root / "records" / "piqa" / f"{split}.jsonl").write_text("".join(lines[:12]))
        items = [{"instruction": f"Please choose the correct solution to the question: {i}\n\nSolution1: a\n\nSolution2: "
                  "b\n\nAnswer format: solution1/solution2", "input": "", "output": "the correct answer is solution1",
                  "answer": "solution1"} for i in range(3)]
        (root / "papers" / "piqa").mkdir(parents=True, exist_ok=True)
        (root / "papers" / "piqa" / f"{split}.json").write_text(json.dumps(items))
    with contextlib.chdir(root), open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        for run, method in (("run", "gatera"), ("run2", "lora")):
            train.main(shlex.split(f"{TRAIN.removeprefix('train ')} llama --max-steps 2 --peft {method} --out {run}"))
            evaluation.main(shlex.split(f"--run {run} --data records --tasks piqa --limit 2 --device cpu"))


# ---------------------------------------------------------------------------------------------------- tries

def attempt(number: int, seed: int, place: Path) -> str:
    """In a process of its own: damages the copy in `place` and runs a program there. Never returns."""
    dice = random.Random(f"{seed} {number}")
    kind = list(KINDS)[number % len(KINDS)]
    files, commands = KINDS[kind]
    program, *argv = shlex.split(dice.choice(commands))
    os.chdir(place)
    with open("said.txt", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    signal.alarm(10 * SECONDS)  # for one that waits; a busy machine makes others wait too
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    what = file = dice.choice(files) if files else ""
    if file:
        damage(Path(file), [Path(name) for names, _ in KINDS.values() for name in names], dice)
    else:
        what = argv = damage_flags(argv, dice)
    Path("try.txt").write_text(f"{kind}, {ascii(what)[:200]}: {program} {ascii(argv)[:300]}")
    print("=====", flush=True)  # what was said before is the damage's
    status = 1
    try:
        run_command(lambda: PROGRAMS[program](argv))
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def judge(status: int, said: str) -> str:
    """How a try ended: fine, refused, or what it must not."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if os.WIFSIGNALED(status):
        return "hung" if os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU) else "killed"
    if "out of memory" in said or "more memory than there is" in said or "allocate memory" in said:
        return "memory"
    if "Traceback" in said or "panicked" in said:
        return "traceback"
    if os.WEXITSTATUS(status) == 0:
        return "fine"
    # Before the one line there may be others, of what went well; not behind it.
    return "refused" if os.WEXITSTATUS(status) == 2 and len(lines) == 1 and said.endswith(lines[0] + "\n") else "unclear"


def fuzz(tries: range, seed: int, root: Path) -> tuple[Counter, list[str]]:
    """({(kind, outcome): tries}, what went wrong, a text each)."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(root / "hub"), "GATERA_CACHE": str(root / "cache"),
                   "PIP_NO_INDEX": "1"}
    build(root / "valid")
    counts, wrong = Counter(), []
    for number in tries:
        place = root / "try" / "place"  # ../x is inside of root
        shutil.copytree(root / "valid", place)
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            try:
                attempt(number, seed, place)
            finally:  # a mistake in the damage
                traceback.print_exc()
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        said = (place / "said.txt").read_text(errors="replace").partition("=====\n")[2]
        outcome, kind = judge(status, said), list(KINDS)[number % len(KINDS)]
        counts[kind, outcome] += 1
        if outcome not in ("fine", "refused"):
            about = (place / "try.txt").read_text() if (place / "try.txt").exists() else "the damage itself failed"
            wrong.append(f"{outcome}: --seed {seed} --only {number}, {about}\n    {said.strip()[-700:]}")
        if len(tries) == 1:
            print((place / "try.txt").read_text(), said, sep="\n")
        shutil.rmtree(root / "try")
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a try to do again")
    args = parser.parse_args()
    numbers = range(args.tries) if args.only is None else range(args.only, args.only + 1)
    with tempfile.TemporaryDirectory() as directory:
        counts, wrong = fuzz(numbers, args.seed, Path(directory))
    outcomes = ["fine", "refused", *sorted({outcome for _, outcome in counts} - {"fine", "refused"})]
    for kind in KINDS:
        print(f"{kind:<10}", *(f"{counts[kind, outcome]:>5} {outcome}" for outcome in outcomes))
    print("\n".join(wrong) or f"{len(numbers)} tries, all fine or refused in one line")
    sys.exit(bool(wrong))
