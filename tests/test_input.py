"""Bad input: one clear line on stderr, exit status 2, no traceback, nothing written; and loading never runs code.

    python -m pytest tests/test_input.py

A row of CASES is a program, its arguments, the words that its one line must hold, and perhaps what is damaged before.
"""
import ast
import contextlib
import dataclasses
import gzip
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import regex
import tiktoken
import torch
from safetensors.torch import load_file, save_file

import bench
import eval as evaluation
import fuzz
import train
from conftest import VOCAB, write_gguf, write_gpt2, write_llama
from data import cli, download, own, prepare
from data.cli import device_problems, join_negative_numbers, run_command
from data.commonsense import DEFAULT_INSTRUCTION, INSTRUCTION, with_capital, without_tags
from data.files import UserError, first_line, reading
from data.pictures import paint
from data.sources import TABLE, hellaswag_from_query, parse_instruction
from data.tokenizer import SPLIT
from gatera import GATES, AdapterConfig, export_peft, inject_adapters, load_adapter, save_adapter
from model import Transformer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample"
PROGRAMS = {"train": train.main, "eval": evaluation.main, "prepare": prepare.main}
# What every row begins with; a row's own flags come later, and the last one counts.
COMMON = {
    "train": "--init llama --data data --tasks piqa --out out/new --peft lora --r 2 --warmup 0 --validation 1 "
             "--epochs 1 --device cpu",
    "eval": "--init llama --data data --tasks piqa --out scores --device cpu",
    "prepare": "--source papers --out prepared",
}


# --------------------------------------------------------------------------------------- a place to do damage in

@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two tiny bases, a run, the sample records, and a file that is in the way."""
    root = tmp_path_factory.mktemp("template")
    write_llama(root / "llama")
    write_llama(root / "wide", d=48)
    write_gpt2(root / "gpt2like")
    write_llama(root / "shards", shards=2)
    for task in ("piqa", "hellaswag"):
        shutil.copytree(SAMPLE / task, root / "data" / task)
    model = Transformer.from_pretrained(root / "llama")
    inject_adapters(model, AdapterConfig("lora", "none", r=2))
    save_adapter(model, root / "run" / "best")
    (root / "run" / "config.json").write_text(json.dumps({"config": {"init": "llama", "form": "cloze"}}))
    (root / "run" / "metrics.jsonl").write_text("{}\n")
    (root / "papers").mkdir()
    (root / "file.txt").write_text("not to be touched\n")
    (root / "full").mkdir()
    (root / "full" / "diary.txt").write_text("not to be touched either\n")
    return root


def snapshot(directory: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def refused(main, capsys) -> str:
    """The one line with which a program ends, without "error: "."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.endswith("\n")
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    return err.removeprefix("error: ")


# ------------------------------------------------------------------------------------------------------ --help

@pytest.mark.parametrize("program", [train, evaluation, prepare, download, bench], ids=lambda program: program.__name__)
def test_help_is_whole_and_fits_a_terminal(program, capsys, monkeypatch):
    """Every setting below its title, with its default and its choices, in any terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="^0$"):
        program.main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 80 and "Traceback" not in text
    settings, choices = getattr(program, "Config", None) or program.Settings, getattr(program, "CHOICES", {})
    for title in re.findall(r"^    # (.*)", inspect.getsource(settings), re.MULTILINE):
        assert f"\n\n{title}:\n  --" in text
    entries = {entry.split()[0].strip(","): " ".join(entry.split()) for entry in text.split("\n  --")[1:]}
    for field in dataclasses.fields(settings):
        entry = entries[field.name.replace("_", "-")]
        default = {"False": "no"}.get(str(field.default), str(field.default))
        assert field.default in ("", None) or f"[{default}]" in entry
        assert "|".join(choices.get(field.name, ())) in entry
    if "gate" in choices:
        assert set(choices["gate"]) == set(GATES)  # a fork's too


# ------------------------------------------------------------------------------------------------- the table

def write(file, content):
    return lambda: Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())


def change(file, **fields):
    return lambda: Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | fields))


def line(number, content):
    """Replaces one line of the training records."""
    def replace():
        file = Path("data/piqa/train.jsonl")
        lines = file.read_bytes().split(b"\n")
        lines[number - 1] = content if isinstance(content, bytes) else json.dumps(content).encode()
        file.write_bytes(b"\n".join(lines))
    return replace


def tensors(file, **changed):
    return lambda: save_file(load_file(file) | changed, file)


def several(*damages):
    return lambda: [damage() for damage in damages]


def remove(path):
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


GOOD = {"task": "piqa", "question": "To open a door,", "choices": ["push it.", "eat it."], "label": 0}
PAPER = {"instruction": "Please choose the correct solution to the question: q\n\nSolution1: a\n\nSolution2: b\n\n"
         "Answer format: solution1/solution2", "input": "", "output": "the correct answer is solution1",
         "answer": "solution1"}
RECORD = "data/piqa/train.jsonl, line 2: "
CASES = [
    # flags: unknown, malformed, without a value, of another program, several wrong at once
    ("train", "--lrr 1", "unknown argument --lrr (did you mean --lr?)"),
    ("train", "--bath 8 --r x --lr -1",
     "unknown argument --bath (did you mean --batch?); --r x: expected a whole number; --lr -1.0: expected"),
    ("train", "--protocol cloze", "unknown argument --protocol; see --help"),
    ("train", "--rank 8 --learning-rate 1", "--rank (did you mean --r?); unknown argument --learning-rate (did you mean --lr?)"),
    ("eval", "--rank 8", "unknown argument --rank; see --help"),
    ("train", "piqa", "unknown argument piqa"),
    ("train", "--lr", "--lr: expected one argument; see --help"),
    ("train", "--lr --r 4", "--lr: expected one argument; see --help"),
    ("train", "--compile=3", "--compile"),
    ("train", "--batch 1e9", "--batch 1e9: expected a whole number"),
    ("train", "--batch 2.5", "--batch 2.5: expected a whole number"),
    ("train", "--lr fast", "--lr fast: expected a number"),
    ("train", "--out ''", "--out : expected a value"),
    ("train", "--tasks ''", "--tasks : expected a value"),
    ("train", f"--seed {'9' * 5000}", "expected a whole number"),
    ("train", f"--batch {2**63}", "expected a whole number"),
    ("train", "--max-len 99999999999999999999 --micro-batch -99999999999999999999",
     "--max-len 99999999999999999999: expected a whole number below 2^63; --micro-batch -99999999999999999999: expected"),
    ("train", "--data 'a\0b' --out '\ud800'", "--out \\ud800: expected a value; --data a\0b: expected a value"),
    ("eval", f"--limit {2**64}", "expected a whole number"),
    ("eval", "--compare 'a\0b' c", "--compare a\0b c: expected a value"),
    ("eval", "--taks piqa --limit few --protocol vibes", "--limit few: expected a whole number; --protocol vibes: "
     "expected one of cloze, label"),
    ("eval", "--taks piqa", "unknown argument --taks (did you mean --tasks?)"),
    ("eval", "--lr 1e-3", "unknown argument --lr"),
    ("eval", "--limit", "--limit: expected one argument"),
    ("eval", "--adapter newest --dtype int4",
     "--adapter newest: expected one of best, last; --dtype int4: expected one of"),
    ("eval", "--data ''", "--data : expected a value"),
    ("eval", "--export hf", "--export: expected 2 arguments"),
    ("prepare", "--task piqa --sauce hub", "unknown argument --task (did you mean --tasks?); unknown argument --sauce "
     "(did you mean --source?)"),
    ("prepare", "--tasks", "--tasks: expected one argument"),
    # values that cannot be
    ("train", "--r 0", "r 0: expected a positive whole number"),
    ("train", "--r -3", "r -3: expected a positive whole number"),
    ("train", "--r 33", "r 33 is larger than the smallest adapted matrix side"),
    ("train", "--r 99999999999", "r 99999999999 is larger than the smallest adapted matrix side"),
    ("train", "--lr -1e-3", "--lr -0.001: expected a number above 0, up to 1"),
    ("train", "--lr nan", "--lr nan: expected"),
    ("train", "--lr inf", "--lr inf: expected"),
    ("train", "--lr 0", "--lr 0.0: expected a number above 0"),
    ("train", "--lr -inf", "--lr -inf: expected a number above 0"),
    ("train", "--gate-lr inf", "--gate-lr inf: expected a number from 0 to 1e12"),
    ("train", "--alpha -1", "alpha -1.0: expected a positive number"),
    ("train", "--alpha nan", "alpha nan: expected a positive number"),
    ("train", "--dropout 1.5", "dropout 1.5: expected a number from 0"),
    ("train", "--batch 0", "--batch 0: expected a number from 1 to 1e12"),
    ("train", "--micro-batch -1 --epochs 0", "--epochs 0: expected a number from 1 to 1e12; --micro-batch -1: expected a number from 0 to 1e12"),
    ("train", "--seed -1", "--seed -1: expected a whole number from 0"),
    ("train", "--clip nan", "--clip nan: expected"),
    ("train", "--warmup 99999", "--warmup 99999: expected less than the"),
    ("train", "--warmup 5 --max-steps 5", "--warmup 5: expected less than --max-steps 5"),
    ("train", "--validation 99999999999", "--validation 99999999999: only 1 "),
    ("train", "--max-len 8", "--max-len 8: expected 16 or more"),
    ("train", "--max-len 99999999999", "--max-len 99999999999: expected no more than the base's context of 512"),
    ("train", "--targets attention",
     "no layer is named attention; this model has down_proj, gate_proj, head, k_proj, o_proj"),
    ("train", "--targets q_proj,head --peft gatera", "--targets q_proj,head: the head sees answer tokens alone"),
    ("train", "--targets ,", "expected at least one layer name, and no empty one"),
    ("train", "--tasks ,", "--tasks ,: expected all or some of piqa, hellaswag"),
    ("train", "--tasks piqa,arc", "--tasks arc: expected all or some of piqa, hellaswag"),
    ("train", "--tasks piqa,piqa", "a task is named twice"),
    ("train", "--peft ia3", "--peft ia3: expected one of lora, dora, hira, gatera"),
    ("train", "--peft lora --gate soft", "--gate soft: expected one of none, token, static"),
    ("train", "--preset slowstart", "--preset slowstart: expected one of quickstart"),
    ("train", "--device tpu", "--device tpu: expected auto, cpu, mps, cuda or cuda:N"),
    ("train", "--device cuda:99", "--device cuda:99: no such CUDA GPU here"),
    ("train", f"--device cuda:{'9' * 5000}", ": expected auto, cpu, mps, cuda or cuda:N"),
    ("train", "--device cuda:\u0660", ": expected auto, cpu, mps, cuda or cuda:N"),
    ("eval", "--limit -1 --max-len 3", "--limit -1: expected 0 (all) or more; --max-len 3: expected 16 or more"),
    ("eval", f"--protocol generate --beams {2**62}", f"--beams {2**62}: expected a whole number from 1 to 1000"),
    ("eval", "--prompt '\ud800'", "--prompt \\ud800: expected a value"),
    ("eval", "--max-len 4096", "--max-len 4096 is longer than the base's context of 512"),
    ("eval", "--tasks ,", "--tasks ,: expected all or some of piqa, hellaswag"),
    ("eval", "--device cuda:99", "--device cuda:99: no such CUDA GPU here"),
    ("eval", "--export onnx dir", "--export onnx: expected hf or peft"),
    ("prepare", "--tasks arc", "--tasks arc: expected all or some of boolq, piqa"),
    ("prepare", "--tasks piqa,arc", "--tasks arc: expected all or some of boolq, piqa"),
    ("prepare", "--tasks ,", "--tasks ,: expected all or some of boolq, piqa"),
    # places to write to
    ("train", "--out file.txt", "--out file.txt: a file is there; expected a directory"),
    ("train", "--out file.txt/run", "--out file.txt/run: a file is there; expected a directory"),
    ("train", "--out full", "--out full: the directory holds other things than a run"),
    ("train", "--out .", "--out .: the directory holds other things than a run"),
    ("eval", "--out file.txt", "--out file.txt: a file is there; expected a directory"),
    ("eval", "--run run --export hf file.txt", "--export file.txt: a file is there; expected a directory"),
    ("eval", "--run run --export hf gpt2like",
     "--export gpt2like: the directory is not empty; expected a new or empty one"),
    ("eval", "--run run --export peft run/best", "--export run/best: the directory is not empty"),
    ("prepare", "--out file.txt", "--out file.txt: a file is there; expected a directory"),
    # records
    ("train", "--data nowhere", "--data nowhere: no such file or directory; expected records: a directory of <name>/train"),
    ("train", "--data file.txt", "--data file.txt: no records there; expected a directory of"),
    ("train", "", "data/piqa/train.jsonl: not a file", several(remove("data/piqa/train.jsonl"),
                                                             lambda: Path("data/piqa/train.jsonl").mkdir())),
    ("train", "", "data/piqa/train.jsonl: empty; expected one record a line", write("data/piqa/train.jsonl", b"")),
    ("train", "", "data/piqa/train.jsonl, line 1: not valid JSON", write("data/piqa/train.jsonl", b"\n\n")),
    ("train", "", RECORD + "not valid JSON: byte 14 is not UTF-8", line(2, b'{"question": "\xe9"}')),
    ("train", "", RECORD + "not valid JSON (Expecting", line(2, b"{question: 1}")),
    ("train", "", RECORD + "not valid JSON (maximum recursion depth", line(2, b"[" * 200_000)),
    ("train", "", RECORD + "not valid JSON (Exceeds the limit", line(2, b"9" * 5000)),
    ("train", "", RECORD + "expected an object with task, question, choices and label", line(2, [1])),
    ("train", "", RECORD + "no label", line(2, {k: v for k, v in GOOD.items() if k != "label"})),
    ("train", "", RECORD + "no choices and no label", line(2, {"task": "piqa", "question": "q"})),
    ("train", "", RECORD + "task is 'boolq', expected 'piqa'", line(2, GOOD | {"task": "boolq"})),
    ("train", "", RECORD + "label is 2, expected a whole number from 0 to 1", line(2, GOOD | {"label": 2})),
    ("train", "", RECORD + "label is '0', expected a whole number", line(2, GOOD | {"label": "0"})),
    ("train", "", RECORD + "label is nan, expected a whole number", line(2, GOOD | {"label": float("nan")})),
    ("train", "", RECORD + "3 choices, expected 2", line(2, GOOD | {"choices": ["a", "b", "c"]})),
    ("train", "", RECORD + "question must be a text that is not empty", line(2, GOOD | {"question": " "})),
    ("train", "", RECORD + "a text holds '\\ud800', which is half of a character",
     line(2, GOOD | {"question": "\ud800"})),
    ("train", "", RECORD + "100,023 characters, expected up to 30,000", line(2, GOOD | {"question": "[" * 100_008})),
    ("eval", "--data nowhere", "--data nowhere: no such file or directory; expected records"),
    ("eval", "", "data/piqa/test.jsonl, line 1: not valid JSON", write("data/piqa/test.jsonl", b"PK\x03\x04")),
    ("eval", "--tasks hellaswag", "a hellaswag choice without text", write("data/hellaswag/test.jsonl", json.dumps(
        {"task": "hellaswag", "question": "Rest: sit.", "choices": ["a", "[step]", "c", "d"], "label": 0}))),
    ("prepare", "--source nowhere", "--source nowhere: not found; expected auto, hub, index, or a directory"),
    ("prepare", "--tasks piqa", "no piqa/train.json or .json.gz in it"),
    ("prepare", "--tasks piqa", "papers/piqa/train.json.gz: broken or truncated",
     several(lambda: Path("papers/piqa").mkdir(), write("papers/piqa/train.json.gz", gzip.compress(b"[]" * 99)[:-9]))),
    ("prepare", "--tasks piqa", "papers/piqa/train.json, record 2: not a record of piqa", several(
        lambda: Path("papers/piqa").mkdir(),
        write("papers/piqa/train.json", json.dumps([PAPER, PAPER | {"answer": "b"}])))),
    # bases
    ("train", "--init full", "full: no tokenizer.json, nor vocab.json with merges.txt"),
    ("train", "--init llama", "llama/config.json: not found; a model directory needs", remove("llama/config.json")),
    ("train", "--init ./nowhere", "./nowhere: no such model file or directory"),
    ("train", "--init ~nobody-is-called-so/x", "~nobody-is-called-so/x: no such model file or directory"),
    ("eval", f"--init {'a' * 300}", "File name too long"),
    ("train", "--init '~nobody-is-called-so'", "~nobody-is-called-so/config.json: n_head is 0", several(
        lambda: shutil.copytree("llama", "~nobody-is-called-so"),
        change("~nobody-is-called-so/config.json", num_attention_heads=0))),
    ("train", "--init nowhere/tiny.gguf", "nowhere/tiny.gguf: no such model file or directory"),
    ("train", "--init file.txt", "file.txt: neither a directory nor a .gguf file"),
    ("train", "--init some/model", "some/model: not in the local cache, and the hub cannot be reached"),
    ("eval", "--init some/model", "HF_ENDPOINT to a mirror"),
    ("train", "--init tiny.gguf", "tiny.gguf: broken or truncated", write("tiny.gguf", b"GGUF\3\0\0\0" + b"\xff" * 64)),
    ("train", "", "llama/config.json: n_layer is 1000000000, expected a positive", change("llama/config.json",
     num_hidden_layers=10**9)),
    ("train", "", "llama/config.json: tied_head is 'no', expected true or false", change("llama/config.json",
     tie_word_embeddings="no")),
    ("train", "", "llama/config.json: n_head is 0, expected a positive whole number", change("llama/config.json",
     num_attention_heads=0)),
    ("train", "", "rope_scaling is {'factor': 0", change("llama/config.json", rope_scaling={
        "rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8})),
    ("train", "", "llama/tokenizer.json: has ids up to 262, but the model has a vocabulary of 99",
     change("llama/config.json", vocab_size=99)),
    ("train", "", "llama/tokenizer.json: broken or truncated", change("llama/tokenizer.json", added_tokens=3)),
    ("train", "", "names no end-of-text token", remove("llama/tokenizer_config.json"),
     change("llama/config.json", eos_token_id=None)),
    ("train", "--init shards",
     "model.safetensors.index.json: names '../llama/model.safetensors'; expected .safetensors files of "
     "the same directory",
     change("shards/model.safetensors.index.json", weight_map={"a": "../llama/model.safetensors"})),
    ("train", "--init shards", "index.json: names '..'", change("shards/model.safetensors.index.json",
     weight_map={"a": ".."})),
    ("train", "--init shards", "index.json: broken or truncated", change("shards/model.safetensors.index.json",
     weight_map=3)),
    ("train", "--init shards", "model-00002-of-00002.safetensors: not found",
     remove("shards/model-00002-of-00002.safetensors")),
    # adapters and runs
    ("eval", "--run nowhere", "nowhere: no such directory"),
    ("eval", "--run full", "full: no adapter there; looked for full/best/adapter.safetensors"),
    ("eval", "--run run --adapter last", "run: no adapter there; looked for run/last/adapter.safetensors"),
    ("eval", "--run run --init wide", "run/best/adapter.safetensors: does not fit this base model"),
    ("eval", "--run run --init gpt2like", "run/best/adapter.safetensors: does not fit this base model"),
    ("eval", "--run run", "run/best/adapter.safetensors: its contents do not match their checksum", lambda: Path(
        "run/best/adapter.safetensors").write_bytes(Path("run/best/adapter.safetensors").read_bytes()[:-1] + b"?")),
    ("eval", "--run run", "blocks.0.attn.q_proj.update.A holds nan or inf",
     tensors("run/best/adapter.safetensors", **{"blocks.0.attn.q_proj.update.A": torch.full((2, 32), float("nan"))})),
    ("eval", "--run run", "unexpected ../../evil.A", tensors("run/best/adapter.safetensors",
     **{"../../evil.A": torch.ones(1)})),
    ("eval", "--run run", "run/best/adapter.json: adapter: r '2': expected", change("run/best/adapter.json", r="2")),
    ("eval", "--run run", "alpha", change("run/best/adapter.json", alpha=10**400)),
    ("eval", "--run run", "run/best/adapter.json: unknown fields colour", change("run/best/adapter.json", colour=1)),
    ("eval", "--run run", "run/config.json: not valid JSON", write("run/config.json", "{")),
    ("eval", "--run run", "run/config.json: not the config.json of a run: its config cannot be", change("run/config.json", config=[])),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{row[0]}: {row[1] or row[2]}"[:60] for i, row in enumerate(CASES)])
def test_bad_input_is_one_line_and_writes_nothing(case, place, capsys, monkeypatch):
    program, flags, words, *damages = case
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "hub"))
    download.hub_reachable.cache_clear()
    for damage in damages:
        damage()
    before = snapshot(place)
    argv = shlex.split(COMMON[program]) + shlex.split(flags)
    assert words in refused(lambda: PROGRAMS[program](argv), capsys)
    assert snapshot(place) == before
    download.hub_reachable.cache_clear()


@pytest.mark.parametrize("program, flags, words", [
    ("train.py", "--lrr 1 --tasks arc",
     "unknown argument --lrr (did you mean --lr?); --tasks arc: expected all or some of"),
    ("train.py", COMMON["train"] + " --data nowhere", "--data nowhere: no such file or directory"),
    ("eval.py", "--limt 3", "unknown argument --limt (did you mean --limit?); nothing to evaluate"),
    ("data/prepare.py", "--source nowhere", "--source nowhere: not found; expected auto, hub, index, or a directory"),
])
def test_the_programs_end_with_the_line_and_status_2(program, flags, words, place):
    before = snapshot(place)
    done = subprocess.run([sys.executable, ROOT / program, *shlex.split(flags)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {words}")
    assert done.stdout == "" and snapshot(place) == before


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_output_without_permission_is_noticed_before_the_work(program, place, capsys, monkeypatch):
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place / "full" and allowed(path, mode))
    argv = shlex.split(COMMON[program]) + ["--out", str(place / "full" / "new")]
    assert f"full/new: no permission to write to {place}/full" in refused(lambda: PROGRAMS[program](argv), capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(place, capsys):
    Path("data/piqa/train.jsonl").chmod(0)
    line = refused(lambda: train.main(shlex.split(COMMON["train"])), capsys)
    assert "Permission denied: 'data/piqa/train.jsonl'" in line


def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")


@pytest.mark.parametrize("program", ["train", "eval"])
def test_gpus_that_are_not_there_or_too_old(program, place, capsys, monkeypatch):
    argv = shlex.split(COMMON[program])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refused(lambda: PROGRAMS[program]([*argv, "--device", "cuda"]), capsys)
    assert "--device cuda: no such CUDA GPU here, of 0; use --device cpu" in line
    old_gpu(monkeypatch)
    for device in ("auto", "cuda"):
        line = refused(lambda: PROGRAMS[program]([*argv, "--device", device, "--dtype", "bfloat16"]), capsys)
        assert "--dtype bfloat16: Old GPU does not compute in it; use float16 or float32" in line
    assert evaluation.pick_device("auto", "auto") == (torch.device("cuda"), torch.float16)


@pytest.mark.parametrize("program", ["train", "eval"])
def test_apples_gpu(program, place, capsys, monkeypatch):
    argv = [*shlex.split(COMMON[program]), "--device", "mps"]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "--device mps: no Apple GPU here" in refused(lambda: PROGRAMS[program](argv), capsys)
    assert cli.pick_device("auto", "float32")[0].type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for has_bfloat16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: has_bfloat16)
        assert cli.pick_device("auto", "auto") == cli.pick_device("mps", "auto") == (torch.device("mps"), dtype)
        assert cli.pick_device("mps", "float16")[1] == torch.float16
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**30)
    assert cli.peak_memory(torch.device("mps")) == 3.0
    missing = NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device.\nMore.")
    assert "for the MPS device.; use --device cpu" in refused(fail_with(missing), capsys)
    monkeypatch.setenv("RANK", "0")
    assert cli.pick_device("auto", "float32")[0].type == "cpu"
    assert "start without torchrun" in refused(lambda: PROGRAMS[program](argv), capsys)


def test_odd_names_and_texts_are_printed_somehow(place, capsys):
    """A name that is no UTF-8, as Linux allows, and a line break: still one line."""
    odd = "x\udcff\ny"
    assert "x\\udcff y" in refused(lambda: train.main([*shlex.split(COMMON["train"]), "--data", odd]), capsys)


class PanicException(BaseException):
    """As tokenizers and tiktoken raise it."""


def fail_with(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, words", [
    (PanicException("no entry\nfound"), "a library gave up: no entry"), (MemoryError(), "out of memory"),
    (OSError(36, "File name too long", "x"), "File name too long: 'x'")])
def test_what_no_check_can_foresee_is_one_line(error, words, capsys):
    assert words in refused(fail_with(error), capsys)


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), SystemExit(3)])
def test_a_mistake_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(fail_with(error))


@pytest.mark.parametrize("error", [
    RecursionError("deep"), OverflowError("big"), UnicodeDecodeError("utf-8", b"x", 0, 1, "y"), struct.error("short"),
    zipfile.BadZipFile("zip"), PanicException("x\ny"), KeyError("a"), MemoryError()])
def test_whatever_is_raised_while_a_file_is_read_names_the_file(error, capsys):
    def main():
        with reading(Path("some.file")):
            raise error
    assert refused(main, capsys).startswith("some.file: ")


# -------------------------------------------------------------------------------- what would wait or try for hours

READ_BY = {  # a file, and a command that reads it
    "llama/config.json": "eval", "llama/tokenizer.json": "eval", "llama/tokenizer_config.json": "eval",
    "llama/special_tokens_map.json": "eval", "llama/model.safetensors": "eval", "shards/model.safetensors.index.json": "train --init shards",
    "shards/model-00002-of-00002.safetensors": "train --init shards", "old/vocab.json": "train --init old",
    "old/merges.txt": "train --init old", "tiny.gguf": "train --init tiny.gguf", "data/piqa/train.jsonl": "train",
    "data/piqa/test.jsonl": "eval", "papers/piqa/train.json": "prepare --tasks piqa", "run/config.json": "eval --run run",
    "run/best/adapter.json": "eval --run run", "run/best/adapter.safetensors": "eval --run run",
    "peft/adapter_config.json": "eval --run peft", "peft/adapter_model.safetensors": "eval --run peft",
    "scores/results.json": "eval", "scores/predictions.jsonl": "eval", "run/metrics.jsonl": "train --out run",
}


def write_old_gpt2(directory):
    """GPT-2's pair of tokenizer files in the place of its tokenizer.json."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(model["merges"]), encoding="utf-8")
    (directory / "tokenizer.json").unlink()
    return directory


def pipe(file):
    os.mkfifo(file)


def socket_file(file):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(file))  # its path may have 107 characters


def device(file):
    file.symlink_to("/dev/zero")  # has no end


@pytest.mark.parametrize("make", [pipe, socket_file, device, Path.mkdir], ids=lambda make: make.__name__)
def test_what_is_no_file_is_refused_and_never_waited_for(make, place, capsys, monkeypatch):
    model = Transformer.from_pretrained("llama")
    inject_adapters(model, AdapterConfig("lora", "none", r=2))
    export_peft(model, "peft")
    write_old_gpt2(write_gpt2(place / "old"))
    write_gguf("tiny.gguf", place / "llama")
    Path("papers/piqa").mkdir()
    evaluation.main(shlex.split(COMMON["eval"]))  # writes scores/
    for name, command in READ_BY.items():
        file = Path(name)
        before = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        make(file)
        program, *flags = shlex.split(command)
        signal.alarm(20)  # ends the tests where something waits
        try:
            line = refused(lambda: PROGRAMS[program]([*shlex.split(COMMON[program]), *flags]), capsys)
        finally:
            signal.alarm(0)
        assert file.parts[0] in line, line  # of some files, the line names the directory
        file.rmdir() if make is Path.mkdir else file.unlink()
        if before is not None:
            file.write_bytes(before)


def not_parsed(task, text):
    """A text of a task's wording that is filled with pieces of it."""
    start, end = INSTRUCTION.get(task, DEFAULT_INSTRUCTION)[0].split("{question}")
    formats = {n: "/".join(f"answer{i + 1}" for i in range(n)) for n in TABLE[task].choices}
    for answers in formats.values():
        with contextlib.suppress(ValueError):
            parse_instruction(task, f"{start}{text}{end}\n\nAnswer format: {answers}")


def encoding(name):
    ranks = {bytes([i]): i for i in range(256)} | {b"aa": 256, b"  ": 257, b"[[": 258, b"\n\n": 259}
    return tiktoken.Encoding(name, pat_str=SPLIT[name], mergeable_ranks=ranks, special_tokens={})


RECORD_OF = {"question": "q", "choices": ["a", "b"], "label": 0}
OURS = {  # whatever looks for a pattern in a text
    "tags": without_tags, "capital": with_capital, "answer": lambda text: evaluation.parse_answer("piqa", text),
    "error": lambda text: first_line(ValueError(text)), "screen": lambda text: paint(text, 0.5, True),
    "flag": lambda text: join_negative_numbers(["--lr", f"-{text}"]), "device": device_problems,
    "half": lambda text: own.record_problem("piqa", {"task": "piqa", **RECORD_OF, "question": text}),
    "wheel": lambda text: hellaswag_from_query({"query": f"a: b. {text} x", "choices": [], "gold": 0}, 0),
    **{f"papers-{task}": lambda text, task=task: not_parsed(task, text) for task in TABLE},
    **{f"split-{name}": lambda text, name=name: list(regex.finditer(SPLIT[name], text)) for name in SPLIT},
    **{f"tiktoken-{name}": encoding(name).encode_ordinary for name in SPLIT},
}
PIECES = ["[", "[]", "[x\n", "a", "1 ", "# ", ". ", "!", ": ", " ", "\n", "'s", "https://", "http://x@", "hf_", "true",
          "\n\nAnswer1: ", " Answer2: ", " Answer1: a Answer2: b Answer3: ", "\n\nSolution1: ", " Ending4: ", " Option1: ",
          "\n\nAnswer format: ", "Answer format: ", "/answer1", "\ud800"]


@pytest.mark.parametrize("name", OURS)
def test_no_pattern_of_ours_takes_long_for_any_text(name):
    for piece in PIECES:
        text = (piece * 30_000)[:30_000] + ("" if "\ud800" in piece else "x")
        if name.startswith(("split", "tiktoken")):
            text = text.encode("utf-8", "replace").decode()
        took = []
        for _ in range(3):  # the machine may be busy
            started = time.thread_time()
            OURS[name](text)
            took.append(time.thread_time() - started)
            if took[-1] < 0.05:
                break
        assert min(took) < 0.05, (piece, took)


# --------------------------------------------------------------------------------------------------- the fuzzer

def test_damage_ends_well_or_in_one_line(tmp_path, monkeypatch):
    """5,000 tries and more: python tests/fuzz.py --tries 5000"""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "GATERA_CACHE", "PIP_NO_INDEX"):
        monkeypatch.setenv(name, "")  # put back at the end
    counts, wrong = fuzz.fuzz(range(33), seed=1, root=tmp_path)
    assert not wrong, "\n".join(wrong)
    assert {outcome for _, outcome in counts} == {"fine", "refused"}  # neither is everything refused, nor nothing


# ----------------------------------------------------------------------------------- loading runs and reads no more

FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "imp"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load",
                   "torch.hub.load", "numpy.load", "np.load", "importlib.import_module"}
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}


@pytest.mark.parametrize("file", sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]), ids=lambda file: file.name)
def test_no_file_has_a_way_to_run_what_it_loads(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert not {module.split(".")[0] for module in modules} & FORBIDDEN_MODULES, node.lineno
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, node.lineno
            assert not any(keyword.arg in FORBIDDEN_ARGUMENTS for keyword in node.keywords), node.lineno
            assert not ast.unparse(node.func).endswith("extractall"), node.lineno  # names in archives choose no place


class Trap:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return Path.write_text, (Path("sprung"), "code ran")


def test_code_and_pickles_beside_a_model_stay_untouched(place, capsys):
    torch.save({"trap": Trap()}, place / "llama" / "pytorch_model.bin")
    torch.save({"trap": Trap()}, place / "run" / "best" / "adapter_model.bin")
    (place / "llama" / "modeling_llama.py").write_text("open('sprung', 'w')")
    change("llama/config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.Model"})()
    load_adapter(Transformer.from_pretrained("llama"), "run/best")
    load_tokenizer("llama")
    (place / "llama" / "model.safetensors").unlink()
    (place / "run" / "best" / "adapter.safetensors").unlink()
    line = refused(lambda: evaluation.main(shlex.split(COMMON["eval"])), capsys)
    assert "llama/model.safetensors: not found; only safetensors are read (pickled .bin files can run code)" in line
    line = refused(lambda: evaluation.main([*shlex.split(COMMON["eval"]), "--run", "run"]), capsys)
    assert "no adapter there" in line
    assert not (place / "sprung").exists()
    torch.load(place / "llama" / "pytorch_model.bin", weights_only=False)  # the trap does work
    assert (place / "sprung").exists()


def test_a_pickle_by_the_name_of_safetensors_is_no_safetensors(place):
    torch.save({"trap": Trap()}, place / "llama" / "model.safetensors")
    torch.save({"trap": Trap()}, place / "run" / "best" / "adapter.safetensors")
    other = Transformer.from_pretrained("wide")
    for load in (lambda: Transformer.from_pretrained("llama"), lambda: load_adapter(other, "run/best")):
        with pytest.raises(UserError, match="broken or truncated"):
            load()
    assert not (place / "sprung").exists()


def test_links_to_a_model_and_inside_it_are_followed(place):
    """The hub's cache is made of them."""
    (place / "blob").write_bytes((place / "llama" / "model.safetensors").read_bytes())
    (place / "llama" / "model.safetensors").unlink()
    (place / "llama" / "model.safetensors").symlink_to("../blob")
    (place / "link").symlink_to("llama")
    ids = torch.arange(9)[None] % VOCAB
    assert torch.equal(Transformer.from_pretrained("link")(ids), Transformer.from_pretrained("llama")(ids))


def test_a_token_is_written_nowhere(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    train.main([*shlex.split(COMMON["train"]), "--test", "1"])
    evaluation.main([*shlex.split(COMMON["eval"]), "--run", "out/new"])
    said = capsys.readouterr()
    assert "secretsecret" not in said.out + said.err
    assert not any(b"secretsecret" in path.read_bytes() for path in place.rglob("*") if path.is_file())


@pytest.mark.parametrize("text, shown", [
    ("401 for https://me:pass@mirror.org/some/model?token=abc&x=1 now\nmore",
     "401 for https://mirror.org/some/model now"),
    ("('https://cdn.org/file?X-Amz-Signature=abc', 'x')", "('https://cdn.org/file', 'x')"),
    ("Bearer hf_AbC123 is not valid", "Bearer hf_... is not valid"),
    ("", "ValueError"),
    ("plain https://mirror.org/some/model", "plain https://mirror.org/some/model"),
])
def test_errors_of_libraries_are_shown_without_secrets(text, shown):
    assert first_line(ValueError(text)) == shown
