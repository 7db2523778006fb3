"""Damages valid files at random and loads them: every try has to end in success or in a UserError of one line.

    python tests/fuzz.py --tries 2000          prints how many tries of each kind loaded, and how many were refused

A try takes a fresh copy of a tiny model, of an adapter or of some records, damages one of its files (see `damage`) and
hands it to the loader that the programs use. The same --seed does the same damage.
"""
import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

if __name__ == "__main__":  # run as a script
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from conftest import write_gguf, write_gpt2, write_llama  # noqa: E402

from data.commonsense import FORMS, scoring_questions, training_question  # noqa: E402
from data.files import UserError  # noqa: E402
from data.prepare import load_records, prepare  # noqa: E402
from gatera import AdapterConfig, adapter_state, export_peft, inject_adapters, load_adapter, save_adapter  # noqa: E402
from model import Transformer, load_tokenizer  # noqa: E402

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"
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


def damage(file: Path, dice: random.Random) -> None:
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
        content = b"\n".join(lines)
    else:
        content = damage_bytes(content, dice, 4000 if file.suffix in (".gguf", ".safetensors") else len(content))
    file.write_bytes(content)


# -------------------------------------------------------------------------------------- what is damaged, and read

def load_model(path: Path) -> None:
    model, tokenizer = Transformer.from_pretrained(path), load_tokenizer(path)
    ids = tokenizer.encode("The hen, then 12 tins \ud800")[:16] + [tokenizer.eos or 0]
    model(torch.tensor([ids]))
    tokenizer.decode(ids)


def load_data(path: Path) -> None:
    tokenizer = load_tokenizer(path.parent / "llama")
    for record in load_records("piqa", "test", path) + load_records("hellaswag", "test", path):
        for form in FORMS:
            training_question(record, form, tokenizer, 512)
            scoring_questions(record, form, tokenizer, 512)


def build(root: Path) -> dict:
    """Valid files: {kind: (directory or file to load, files that get damaged, loader)}."""
    llama = write_llama(root / "llama", layers=1)
    shards = write_llama(root / "shards", layers=1, shards=2, extra={"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}})
    gpt2 = write_gpt2(root / "gpt2", layers=1)
    raw = json.loads((gpt2 / "tokenizer.json").read_text())
    (gpt2 / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (gpt2 / "merges.txt").write_text("#version: 0.2\n" + "\n".join(raw["model"]["merges"]), encoding="utf-8")
    (gpt2 / "tokenizer.json").unlink()
    gguf = write_gguf(root / "tiny.gguf", llama)
    for method, gate, save, name in (("hira", "token", save_adapter, "ours"), ("dora", "none", export_peft, "peft")):
        model = Transformer.from_pretrained(llama)
        inject_adapters(model, AdapterConfig(method, gate, r=2))
        for p in adapter_state(model).values():
            p.data.normal_(generator=torch.Generator().manual_seed(0))
        save(model, root / name)
    for task in ("piqa", "hellaswag"):
        shutil.copytree(SAMPLE / task, root / "records" / task)
    items = [{"instruction": f"Please choose the correct solution to the question: {i}\n\nSolution1: a\n\nSolution2: b"
              "\n\nAnswer format: solution1/solution2", "input": "", "output": "the correct answer is solution1",
              "answer": "solution1"} for i in range(3)]
    (root / "papers" / "piqa").mkdir(parents=True)
    (root / "papers" / "piqa" / "test.json").write_text(json.dumps(items))
    adapter = lambda path: load_adapter(Transformer.from_pretrained(path.parent / "llama"), path)  # noqa: E731
    papers = lambda path: prepare(["piqa"], ("test",), path, path.parent / "prepared")  # noqa: E731
    return {
        "config": (llama, ["config.json"], load_model),
        "sharded": (shards, ["config.json", "model.safetensors.index.json"], load_model),
        "weights": (llama, ["model.safetensors"], load_model),
        "tokenizer": (llama, ["tokenizer.json", "tokenizer_config.json"], load_model),
        "gpt2": (gpt2, ["config.json", "vocab.json", "merges.txt"], load_model),
        "gguf": (gguf, [""], load_model),
        "adapter": (root / "ours", ["adapter.json", "adapter.safetensors"], adapter),
        "peft": (root / "peft", ["adapter_config.json", "adapter_model.safetensors"], adapter),
        "records": (root / "records", ["piqa/test.jsonl", "hellaswag/test.jsonl"], load_data),
        "papers": (root / "papers", ["piqa/test.json"], papers),
    }


def fuzz(tries: int, seed: int, root: Path) -> tuple[Counter, list[str]]:
    """({(kind, outcome): tries}, what went wrong): one text for each traceback, warning, second line, or slow try."""
    kinds, counts, wrong = build(root), Counter(), []
    for number in range(tries):
        dice = random.Random(f"{seed} {number}")
        kind = list(kinds)[number % len(kinds)]
        whole, files, load = kinds[kind]
        file = whole / dice.choice(files)
        kept, started = file.read_bytes(), time.monotonic()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("error")
                damage(file, dice)
                load(whole)
            outcome = "loaded"
        except UserError as error:
            outcome = "refused"
            if "\n" in str(error) or str(whole) not in str(error) and kind != "records":
                wrong.append(f"try {number}, {kind}: {error!r}")
        except BaseException as error:  # tiktoken's panics are no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "crashed"
            wrong.append(f"try {number}, {kind}, {file.name}: {type(error).__name__}: {str(error)[:300]}")
        if time.monotonic() - started > 5:
            wrong.append(f"try {number}, {kind}: {time.monotonic() - started:.1f} s")
        file.write_bytes(kept)
        shutil.rmtree(root / "prepared", ignore_errors=True)
        counts[kind, outcome] += 1
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts, wrong = fuzz(args.tries, args.seed, Path(directory))
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(f"{kind:<10}", *(f"{counts[kind, outcome]:>5} {outcome}" for outcome in ("loaded", "refused", "crashed")))
    print("\n".join(wrong) or f"{args.tries} tries, no traceback")
    sys.exit(bool(wrong))
