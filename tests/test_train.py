"""The training program, on tiny models and the sample records."""
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import eval as evaluation
import train
from conftest import CPU_DTYPE, hub_files, write_gpt2, write_llama
from data import runs
from data.commonsense import FORMS, Question, check_question, pack, scoring_questions, training_question
from data.files import UserError, json_lines
from data.prepare import load_records
from gatera import GATES, METHODS, AdapterConfig, adapter_state, gate_entropy, gate_values, gated_layers, inject_adapters, load_adapter
from model import Transformer, load_tokenizer

SAMPLE = str(Path(__file__).parents[1] / "data" / "sample")


def run(directory, base, *flags):
    return train.main(["--init", str(base), "--data", SAMPLE, "--out", str(directory), "--r", "4", "--warmup", "2",
                       "--epochs", "1", "--batch", "8", "--validation", "4", "--eval-every", "3", "--log-every", "2",
                       "--device", "cpu", "--lr", "1e-2", *flags])


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def adapter(directory, which="last"):
    return load_file(directory / which / "adapter.safetensors")


@pytest.mark.parametrize("peft, gate", [*((method, gate) for method in METHODS for gate in GATES), ("gatera", "")])
def test_a_run_learns_and_leaves_what_it_promises(peft, gate, llama, tmp_path, capsys):
    results = run(tmp_path / "run", llama, "--peft", peft, *(["--gate", gate] if gate else []), "--test", "3",
                  "--tasks", "piqa,boolq", "--validation", "2", "--epochs", "8", "--entropy-weight", "0")
    lines = metrics(tmp_path / "run")
    assert lines[0]["config"]["peft"] == peft and lines[0]["torch"] == torch.__version__
    logged = [line for line in lines if "loss" in line]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert [line["step"] for line in logged] == [0, 2, 4, 6, 8, 10, 12, 14, 15] and results["steps"] == 16
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 5, 8, 11, 14, 15]
    assert ("gate_prompt" in logged[0]) == (gate != "none")
    assert all(math.isfinite(line["grad_norm"]) and line["tokens_per_s"] > 0 for line in logged)
    assert set(results["tasks"]) == {"piqa", "boolq"} and results["best_validation_loss"] > 0
    model = Transformer.from_pretrained(llama)
    config = load_adapter(model, tmp_path / "run" / "best")
    assert (config.method, config.gate) == ("hira" if peft == "gatera" else peft, gate or "token")
    summary = evaluation.main(["--run", str(tmp_path / "run"), "--data", SAMPLE, "--limit", "3", "--tasks", "piqa,boolq"])
    for task, scores in results["tasks"].items():
        assert summary["tasks"][task]["acc"] == pytest.approx(scores["acc"]["after"])
    assert "trainable" in capsys.readouterr().out


def test_frozen_weights_do_not_change(llama, tmp_path, monkeypatch):
    models = []
    load = Transformer.from_pretrained.__func__
    monkeypatch.setattr(Transformer, "from_pretrained",
                        classmethod(lambda cls, *a, **k: models.append(load(cls, *a, **k)) or models[-1]))
    run(tmp_path / "run", llama)
    for (name, p) in load(Transformer, llama).named_parameters():
        assert torch.equal(p, models[0].get_parameter(name)), name


def test_a_seed_repeats_a_run_and_another_does_not(llama, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(tmp_path / name, llama, "--seed", seed, "--dropout", "0.1")
    a, b, c = (adapter(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    timeless = [[{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gib", "config")} for line in metrics(tmp_path / name)]
                for name in "ab"]
    assert timeless[0] == timeless[1]


def test_a_run_is_this_plain_loop(llama, tmp_path, monkeypatch):
    """The same with one forward a record, a loss a batch, and AdamW's groups written out, in float64."""
    load = Transformer.from_pretrained.__func__
    monkeypatch.setattr(Transformer, "from_pretrained",
                        classmethod(lambda cls, path, *a, **k: load(cls, path, torch.float64)))
    flags = ["--tasks", "piqa,boolq", "--validation", "2", "--batch", "4", "--micro-batch", "3", "--warmup", "2",
             "--max-steps", "6", "--log-every", "1", "--entropy-weight", "0.1", "--gate-lr", "0.05",
             "--weight-decay", "0.5", "--clip", "0.02"]
    run(tmp_path / "run", llama, *flags)
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]

    c = train.parse(["--init", str(llama), "--data", SAMPLE, *flags])
    records, _, _ = train.load_data(c)
    questions = [training_question(record, "label", load_tokenizer(llama), 512) for record in records]
    ungated, model = Transformer.from_pretrained(llama), Transformer.from_pretrained(llama)
    inject_adapters(ungated, AdapterConfig("hira", "none", r=4))
    torch.manual_seed(1337)
    inject_adapters(model, AdapterConfig("hira", "token", r=4))
    update = [p for name, p in adapter_state(model).items() if name in adapter_state(ungated)]
    gates = [p for name, p in adapter_state(model).items() if name not in adapter_state(ungated)]
    optimizers = [torch.optim.AdamW(update, weight_decay=0.5), torch.optim.AdamW(gates, weight_decay=0.5)]
    for step, (numbers, factor) in enumerate(zip(train.batches(len(records), c), (1/3, 2/3, 1, 3/4, 1/2, 1/4))):
        loss = entropy = 0.0
        opened = [], []  # gates of every layer, on prompt and on answer tokens
        n_answer = sum(len(questions[i].answers[0]) for i in numbers)
        n_token = sum(len(questions[i].prompt) + len(questions[i].answers[0]) - 1 for i in numbers)
        for prompt, (answer,), _ in (questions[i] for i in numbers):
            ids = torch.tensor([prompt + answer[:-1]])
            logits = model(ids)[0, len(prompt) - 1:]
            loss = loss + F.cross_entropy(logits, torch.tensor(answer), reduction="sum") / n_answer
            entropy = entropy + gate_entropy(model) * ids.numel() / n_token
            g = torch.cat(list(gate_values(model).values()))
            opened[0].append(g[:, :len(prompt)])
            opened[1].append(g[:, len(prompt):])
        (loss + 0.1 * entropy).backward()
        norm = torch.nn.utils.clip_grad_norm_(update + gates, 0.02)
        assert norm > 0.02
        for optimizer, peak in zip(optimizers, (0.01, 0.05)):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        expected = {"step": step, "loss": loss.item(), "entropy": entropy.item(), "grad_norm": norm.item(),
                    "lr": 0.01 * factor, "gate_prompt": torch.cat(opened[0], 1).mean().item(),
                    "gate_answer": torch.cat(opened[1], 1).mean().item()}
        assert {key: lines[step][key] for key in expected} == pytest.approx(expected, rel=1e-5), step
    for name, tensor in adapter(tmp_path / "run").items():
        torch.testing.assert_close(tensor, adapter_state(model)[name].detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("flags", [("--micro-batch", "3"), ("--checkpointing",)])
def test_micro_batches_and_checkpointing_do_not_change_what_is_learnt(flags, llama, tmp_path):
    """SGD-like comparison: Adam's first steps are signs, which rounding can flip, so losses and norms are compared."""
    run(tmp_path / "whole", llama, "--entropy-weight", "0.1")
    run(tmp_path / "cut", llama, "--entropy-weight", "0.1", *flags)
    for a, b in zip(metrics(tmp_path / "whole")[1:], metrics(tmp_path / "cut")[1:]):
        for key in ("loss", "entropy", "grad_norm", "validation_loss", "gate_prompt", "gate_answer"):
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=2e-4)


def test_the_entropy_is_a_mean_over_tokens_and_its_weight_lowers_it(llama, tmp_path):
    run(tmp_path / "run", llama, "--entropy-weight", "5", "--gate-lr", "0.1", "--micro-batch", "3", "--log-every", "1")
    entropies = [line["entropy"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert entropies[0] == pytest.approx(math.log(2), rel=1e-5)  # every gate is 1/2
    assert entropies[-1] < 0.6
    run(tmp_path / "plain", llama, "--entropy-weight", "0", "--max-steps", "1", "--warmup", "0")
    first = [metrics(tmp_path / name)[1]["loss"] for name in ("run", "plain")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # what is logged is the task's loss alone


def test_tokens_per_second_are_those_of_training(llama, tmp_path, monkeypatch):
    """By a clock on which a step takes a second, and a validation a hundred."""
    clock, seen, rate, evaluating = [0.0], set(), train.learning_rate, Transformer.eval

    def count(step, *rest):
        clock[0] += step not in seen
        seen.add(step)
        return rate(step, *rest)

    def wait(model):
        clock[0] += 100
        return evaluating(model)

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: clock[0])
        patch.setattr(train, "learning_rate", count)
        patch.setattr(Transformer, "eval", wait)
        run(tmp_path / "run", llama, "--tasks", "piqa,boolq", "--validation", "2", "--epochs", "3", "--eval-every", "2")
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    records, _, _ = train.load_data(train.parse(["--data", SAMPLE, "--tasks", "piqa,boolq", "--validation", "2"]))
    questions = [training_question(record, "label", load_tokenizer(llama), 512) for record in records]
    read = sum(len(question.prompt) + len(question.answers[0]) - 1 for question in questions)
    assert sum(line["tokens_per_s"] * seconds for line, seconds in zip(lines, (1, 2, 2, 1))) == pytest.approx(3 * read)


@pytest.mark.parametrize("step, speed, seconds", [(0, 5e5, 3.0), (38, 123.4, 0.1), (23440, 5e5, 1.9)])
def test_a_progress_line_fits_a_terminal(step, speed, seconds, monkeypatch, capsys):
    """80 columns, for the longest runs on the largest GPUs; its numbers stand below their names."""
    now, lines = iter([0.0, seconds, 2 * seconds]), []
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = runs.Progress(SimpleNamespace(record=lines.append), 60000, {"step": step}, 0.0)
    for step, gates in ((step, {"gate_prompt": 0.25, "gate_answer": 0.5, "entropy": 0.6934}), (step + 1, {})):
        progress.tokens = speed * seconds
        progress.log(step, loss=10.81234, **gates, lr=1.25e-5, grad_norm=12.345, memory_gib=139.61)
        assert lines[-1]["loss"] == 10.81234 and lines[-1]["grad_norm"] == 12.345  # the file has all digits
        progress.validated(step, 9.5)
        names, numbers, validation = capsys.readouterr().out.splitlines()
        assert len(numbers) == len(names) <= 80 and len(validation) <= 80
        ends = {match.group(): match.end() for match in re.finditer(r"\S+", names)}
        below = {name: numbers[:end].split()[-1] for name, end in ends.items()}
        left = runs.clock((59999 - step) * seconds)
        gates = {"prompt": "0.25", "answer": "0.50", "entropy": "0.693"} if gates else {}
        assert below == {"step": f"{step}/60000", "loss": "10.8123", **gates, "lr": "1.25e-05", "norm": "12.35",
                         "tokens/s": f"{speed:,.0f}", "GiB": "139.6", "left": left}
    assert validation.endswith("validation loss 9.5000") and not validation.endswith("best so far")


def test_every_step_has_a_dropout_mask_of_its_own(llama, tmp_path):
    """The same record again and again, and steps too small to change anything: only the mask can change the gradient."""
    same = ["--tasks", "piqa", "--validation", "0", "--limit", "1", "--batch", "1", "--lr", "1e-12", "--warmup", "0",
            "--max-steps", "4", "--log-every", "1"]
    norms = []
    for dropout in ("0", "0.5"):
        run(tmp_path / dropout, llama, *same, "--dropout", dropout)
        norms.append([line["grad_norm"] for line in metrics(tmp_path / dropout) if "loss" in line])
    assert norms[0] == pytest.approx([norms[0][0]] * 4, rel=1e-5)
    assert min(abs(a / b - 1) for a, b in itertools.combinations(norms[1], 2)) > 1e-4


def test_best_is_the_adapter_with_the_lowest_validation_loss(llama, tmp_path):
    """At a rate that rises until the loss does, it is one in the middle. Its loss is computed a second way here."""
    flags = ["--tasks", "openbookqa,winogrande", "--form", "cloze", "--validation", "2",
             "--lr", "1", "--warmup", "7", "--max-steps", "8", "--eval-every", "1", "--dropout", "0.2", "--test", "4"]
    results = run(tmp_path / "run", llama, *flags)
    losses = [line["validation_loss"] for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert len(losses) == 8 and min(losses) < min(losses[0], losses[-1])
    _, records, _ = train.load_data(train.parse(["--init", str(llama), "--data", SAMPLE, *flags]))
    model, tokenizer = Transformer.from_pretrained(llama), load_tokenizer(llama)
    load_adapter(model, tmp_path / "run" / "best")
    nats = []
    for prompt, (answer,), _ in (training_question(record, "cloze", tokenizer, 512) for record in records):
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
        nats.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    assert torch.cat(nats).mean().item() == pytest.approx(min(losses), rel=1e-5)
    assert results["best_validation_loss"] == min(losses)
    for task, scores in results["tasks"].items():  # the test questions' scores are the base's and the best one's
        for when, which in (("before", Transformer.from_pretrained(llama)), ("after", model)):
            scored = evaluation.evaluate(which, tokenizer, load_records(task, "test", SAMPLE), "cloze", quiet=True)
            assert [scores[key][when] for key in ("acc", "acc_norm")] == [scored["acc"], scored["acc_norm"]]


def test_the_order_of_the_data_depends_on_the_seed_alone(llama, tmp_path):
    a, b = (train.parse(["--init", str(llama), "--peft", peft, "--lr", lr]) for peft, lr in (("lora", "1e-4"), ("gatera", "1e-2")))
    first = [next(batch) for batch in [train.batches(100, a)] for _ in range(8)]
    second = [next(batch) for batch in [train.batches(100, b)] for _ in range(8)]
    assert first == second
    assert sorted(i for batch in first[:4] for i in batch) == list(range(100)) != [i for batch in first[:4] for i in batch]
    assert first[:4] != first[4:]


def test_the_schedule_warms_up_and_decays_to_zero():
    c = train.Config(warmup=10)
    rates = [train.learning_rate(step, 100, c) for step in range(100)]
    assert rates[0] > 0 and rates[10] == max(rates) == 1 and rates[-1] == pytest.approx(1 / 90)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11])) and all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_the_defaults_are_the_papers_recipe():
    c = train.parse(["--init", "gpt2-medium", "--peft", "gatera"])
    assert (c.r, c.lr, c.weight_decay, c.warmup, c.batch, c.epochs, c.max_len, c.validation, c.form, c.tasks, c.gate) == (
        32, 1e-3, 0, -1, 32, 3, 512, 120, "label", "all", "token")  # -1: 100, as the run has 15,000 steps
    assert train.adapter_config(c).targets == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert train.adapter_config(c).alpha is None
    assert train.adapter_config(train.parse(["--peft", "lora", "--alpha", "3"])).alpha == 3
    assert train.adapter_config(train.parse(["--targets", "qkv"])).targets == ("q_proj", "k_proj", "v_proj")
    assert train.adapter_config(train.parse(["--targets", "fc,o_proj"])).targets == ("up_proj", "down_proj", "o_proj")


def test_without_a_hub_it_fails_fast_and_names_the_ways_out(monkeypatch, tmp_path):
    from data import download
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    download.hub_reachable.cache_clear()
    with pytest.raises(UserError, match=r"gpt2-medium.*directory.*\.gguf.*smollm2-135m") as caught:
        train.main(["--init", "gpt2-medium", "--peft", "gatera", "--out", str(tmp_path / "run")])
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    download.hub_reachable.cache_clear()


@pytest.mark.parametrize("flags, messages", [
    (["--lrr", "1"], ["unknown argument --lrr", "did you mean --lr?"]),
    (["--r", "0", "--lr", "-1", "--batch", "x"], ["r 0: expected a positive whole number", "--lr -1.0", "--batch x: expected a whole number"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--peft", "ia3"], ["--peft ia3: expected one of lora, dora, hira, gatera"]),
    (["--peft", "gatera", "--gate", "none"], ["use --peft hira"]),
    (["--gate", "soft"], ["--gate soft: expected one of none, token, static"]),
    (["--tasks", "arc"], ["--tasks arc: expected all or some of boolq"]),
    (["--form", "poem", "--dtype", "int8"], ["--form poem", "--dtype int8"]),
    (["--device", "tpu"], ["--device tpu: expected auto, cpu"]),
    (["--preset", "slowstart"], ["--preset slowstart: expected one of quickstart"]),
    (["--dropout", "1"], ["dropout 1.0"]),
    (["--gate-bias", "nan", "--entropy-weight", "inf"], ["--gate-bias nan", "--entropy-weight inf"]),
    (["--tasks", "piqa,piqa"], ["named twice"]),
    (["--max-steps", "3", "--warmup", "3"], ["--warmup 3: expected less than --max-steps 3; lower it or leave it out"]),
    (["--warmup", "-2"], ["--warmup -2: expected a number from -1"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--max-steps", "9" * 15, "--batch", "9" * 20], ["--max-steps 999999999999999: expected a number from 0 to 1e12",
                                                      "--batch 99999999999999999999: expected a whole number below 2^63"]),
    (["--epochs", "1e400", "--batch", "9" * 5000], ["--epochs 1e400: expected a whole number", "--batch 999"]),
    (["--gate-lr", "1e400"], ["--gate-lr inf"]),
    (["--out", str(Path(__file__).parent)], ["holds other things than a run"]),
    (["--out", __file__ + "/run"], ["a file is there"]),
    (["--lr"], ["--lr: expected one argument"]),
    (["--out", __file__], ["a file is there"]),
])
def test_bad_flags_are_reported_at_once(flags, messages):
    with pytest.raises(UserError) as caught:
        train.parse(flags)
    assert all(message in str(caught.value) for message in messages) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flags, message", [
    (("--warmup", "50"), "--warmup 50: expected less than the 5 steps of the run"),
    (("--max-len", "4096"), "--max-len 4096: expected no more than the base's context of 512"),
    (("--validation", "500"), "--validation 500: only 8 records are held out"),
    (("--targets", "c_attn"), "no layer is named c_attn; this model has down_proj"),
    (("--r", "64"), "r 64 is larger than the smallest"),
    (("--r", "9" * 18), "r 9* is larger than the smallest"),
    (("--max-len", "9" * 18), "--max-len 9*: expected no more than the base's context of 512"),
    (("--data", "nowhere"), "nowhere"),
])
def test_what_does_not_fit_the_model_or_data_is_refused_before_anything_is_written(flags, message, llama, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", llama, *flags)
    assert not (tmp_path / "run").exists()


def changed_sample(directory, task, split, number, **changes):
    """data/sample, of which one record, counted from 1, is another."""
    shutil.copytree(SAMPLE, directory)
    records = load_records(task, split, SAMPLE)
    records[number - 1] |= changes
    (directory / task / f"{split}.jsonl").write_text(json_lines(records))
    return ["--data", str(directory), "--tasks", task, "--validation", "1", "--form", "cloze"]


@pytest.mark.parametrize("task, split, changes, flags, message", [
    ("piqa", "train", {"choices": ["a " * 300, "b " * 300]}, [], "an answer of 60. tokens does not fit into 512: raise --max-len"),
    ("piqa", "test", {"choices": ["a " * 300, "b"]}, ["--test", "9"], "an answer of 60. tokens does not fit into 512"),
    ("hellaswag", "train", {"choices": ["[header]"] * 4}, [], "choice without text in cloze form"),
    ("hellaswag", "test", {"choices": ["a", "b", "[title]", "d"]}, ["--test", "9"], "choice without text in cloze form"),
    ("hellaswag", "train", {"question": "[step]"}, [], "an empty prompt"),
    ("winogrande", "train", {"question": "The end is a _"}, [], "choice without text in cloze form"),
])
def test_a_record_that_makes_no_question_is_refused_by_line_before_the_first_step(task, split, changes, flags, message,
                                                                                  llama, tmp_path):
    held_out = load_records(task, "val", SAMPLE)
    trained = [n for n, record in enumerate(load_records(task, "train", SAMPLE), 1) if record not in held_out]
    held = [n for n, record in enumerate(load_records(task, "train", SAMPLE), 1) if record in held_out]
    for number in (trained[-1], held[0]) if split == "train" else (3,):
        data = changed_sample(tmp_path / str(number), task, split, number, **changes)
        where = re.escape(f"{tmp_path}/{number}/{task}/{split}.jsonl, line {number}: ")
        with pytest.raises(UserError, match=f"{where}.*{message}"):
            run(tmp_path / "run", llama, *data, *flags)
        assert not (tmp_path / "run").exists()


def test_a_record_counts_by_what_is_read_of_it(llama, tmp_path):
    """The wrong choice of a record that is trained on is not read, nor is a record beyond --limit."""
    few = ["--max-steps", "1", "--warmup", "0", "--limit", "2"]
    wrong = 1 - load_records("piqa", "train", SAMPLE)[0]["label"]
    choices = ["a " * 300 if i == wrong else "b" for i in (0, 1)]
    run(tmp_path / "run", llama, *changed_sample(tmp_path / "wrong", "piqa", "train", 1, choices=choices), *few)
    run(tmp_path / "run2", llama, *changed_sample(tmp_path / "last", "piqa", "train", 6, choices=["a " * 300] * 2), *few)


@pytest.mark.parametrize("tokenizer", ["bytes", "llama-2"])
def test_records_are_checked_as_they_are_tokenised(tokenizer, llama):
    """At every length, check_question refuses what making the question refuses."""
    tokenizer = load_tokenizer(llama if tokenizer == "bytes" else hub_files("llama-2-7b-chat"))
    for task, form, trained in itertools.product(("piqa", "hellaswag", "winogrande"), FORMS, (True, False)):
        make = training_question if trained else scoring_questions
        for record, max_len in itertools.product(load_records(task, "train", SAMPLE)[:3], range(16, 160)):
            refused = []
            for question in (lambda *a: check_question(*a, trained), make):
                try:
                    question(record, form, tokenizer, max_len)
                    refused.append("")
                except UserError as error:
                    refused.append(str(error))
            assert refused[0] == refused[1], (task, form, max_len)


def test_gpt2_trains_too(tmp_path):
    run(tmp_path / "run", write_gpt2(tmp_path / "gpt2"), "--max-len", "256")
    assert len(adapter(tmp_path / "run", "best")) == 2 * 5 * 4


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("flags", [(), ("--checkpointing",)])
def test_a_compiled_run_learns_the_same(flags, tmp_path):
    base = write_llama(tmp_path / "llama", layers=1)
    run(tmp_path / "eager", base, "--max-steps", "4")
    program = Path(train.__file__)
    subprocess.run([sys.executable, program, "--init", base, "--data", SAMPLE, "--out", tmp_path / "compiled", "--r", "4",
                    "--warmup", "2", "--batch", "8", "--validation", "4", "--eval-every", "3", "--log-every", "2",
                    "--device", "cpu", "--lr", "1e-2", "--max-steps", "4", "--compile", *flags], check=True, capture_output=True)
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 3


CHANGES = ["--gate-lr 0.1", "--clip 1e-3", "--weight-decay 0.5", "--dropout 0.5", "--gate-bias 1", "--entropy-weight 1",
           "--limit 3", "--lr 2e-2", "--targets qkv,fc,o_proj", "--form cloze", "--gate static"]


def test_every_flag_changes_what_is_learnt(llama, tmp_path):
    few = ["--max-steps", "3", "--warmup", "0", "--peft", "hira", "--tasks", "piqa,boolq", "--validation", "2"]
    run(tmp_path / "plain", llama, *few, "--gate", "token")
    plain = adapter(tmp_path / "plain")
    for number, change in enumerate(CHANGES):
        run(tmp_path / str(number), llama, *few, *([] if "--gate " in change else ["--gate", "token"]), *change.split())
        changed = adapter(tmp_path / str(number))
        assert set(changed) != set(plain) or not all(torch.equal(plain[name], t) for name, t in changed.items()), change
    run(tmp_path / "free", llama, *few, "--gate", "token", "--clip", "0")  # no clipping, which was not needed either
    assert all(torch.equal(plain[name], t) for name, t in adapter(tmp_path / "free").items())


def test_checkpointing_is_switched_on(llama, tmp_path, monkeypatch):
    import model
    calls, checkpoint = [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    run(tmp_path / "run", llama, "--checkpointing", "--max-steps", "3")
    assert len(calls) == 3 * 2  # steps, blocks


def test_no_held_out_record_is_trained_on(llama):
    c = train.parse(["--init", str(llama), "--data", SAMPLE, "--validation", "8"])
    training, held_out, _ = train.load_data(c)
    key = lambda record: json.dumps(record, sort_keys=True)  # noqa: E731
    assert len(held_out) == 8 and not set(map(key, training)) & set(map(key, held_out))
    some = [train.load_data(train.parse(["--init", str(llama), "--data", SAMPLE, "--validation", "4", "--seed", seed]))[1]
            for seed in ("1", "5")]
    assert some[0] == some[1] and len(some[0]) == 4  # the same for every seed, and not of the first tasks alone
    assert all(record in held_out for record in some[0]) and some[0] != held_out[:4]


def test_twins_of_held_out_records_are_left_out(llama, tmp_path, capsys):
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    text = (Path(SAMPLE) / "piqa" / "train.jsonl").read_text()
    (tmp_path / "data" / "piqa" / "train.jsonl").write_text(text + text)
    c = train.parse(["--init", str(llama), "--data", str(tmp_path / "data"), "--tasks", "piqa", "--validation", "2"])
    training, held_out, _ = train.load_data(c)
    assert len(held_out) == 2 and len(training) == 8 and not any(record in held_out for record in training)
    assert "4 records occur more than once" in capsys.readouterr().out


def test_gate_sums_tell_prompt_from_answer(llama):
    model = Transformer.from_pretrained(llama)
    inject_adapters(model, AdapterConfig(r=4))
    row = pack([Question(list(range(30)), [[1, 2, 3, 4]])])
    assert row.ids.shape == (1, 34)  # 33 tokens and one of filler, which does not count
    for layer in gated_layers(model).values():
        layer.gate_logit = torch.where(row.is_answer, 100.0, -100.0)[..., None]
        layer.gate_logit[0, 33] = 100.0
    assert train.gate_sums(model, row).tolist() == [0, 3]


def test_a_run_does_not_touch_what_is_not_a_run(llama, tmp_path):
    before = (llama / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds other things than a run"):
        run(llama, llama)
    assert (llama / "config.json").read_bytes() == before


@pytest.mark.slow
def test_the_quick_start_in_short(smollm, tmp_path, capsys):
    results = train.main(["--preset", "quickstart", "--data", SAMPLE, "--max-steps", "6", "--warmup", "1", "--batch", "4",
                          "--validation", "1", "--test", "4", "--log-every", "1", "--out", str(tmp_path / "run")])
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert min(losses[1:]) < losses[0] and set(results["tasks"]) == {"ARC-Easy"}
    assert "before" in capsys.readouterr().out


def test_a_second_run_moves_the_first_aside(llama, tmp_path, capsys):
    run(tmp_path / "run", llama, "--seed", "1")
    first = adapter(tmp_path / "run")
    run(tmp_path / "run", llama, "--seed", "2")
    kept = adapter(tmp_path / "run-1")
    assert all(torch.equal(first[name], kept[name]) for name in first)
    assert not all(torch.equal(first[name], t) for name, t in adapter(tmp_path / "run").items())
    assert "is now in" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(dtype, llama, tmp_path):
    run(tmp_path / "whole", llama, "--entropy-weight", "0.1")
    run(tmp_path / "half", llama, "--entropy-weight", "0.1", "--dtype", dtype)
    for a, b in zip(metrics(tmp_path / "whole")[1:], metrics(tmp_path / "half")[1:]):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=0.03)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=0.1)  # unscaled before it is clipped
    assert all(tensor.dtype == torch.float32 for tensor in adapter(tmp_path / "half").values())


GROWING = """
import random, torch
from data.cli import cpu_dtype
from data.commonsense import Question, pack
from gatera import AdapterConfig, adapter_state, inject_adapters
from model import Transformer, TransformerConfig
dtype, rng = getattr(torch, cpu_dtype()), random.Random(0)
config = TransformerConfig(vocab_size=500, n_layer=2, n_head=4, d_model=256, d_ff=512, max_len=512)
model = Transformer(config).to(dtype).train()
inject_adapters(model, AdapterConfig("lora", "none", r=8))
optimizer = torch.optim.AdamW(adapter_state(model).values())
for step in range(1, 301):
    batch = pack([Question([7] * rng.randrange(80, 100), [[3] * rng.randrange(2, 8)]) for _ in range(6)])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(batch.ids, documents=batch.documents, select=batch.select)
        torch.nn.functional.cross_entropy(logits.float(), batch.targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (30, 300):
        print(open("/proc/self/statm").read().split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process as Linux shows it")
def test_memory_does_not_grow_with_the_steps():
    """In the CPU's quicker dtype, over rows of nearly as many lengths as steps (up to 30 % where each is its own)."""
    run = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    early, late = map(int, run.stdout.split())
    assert late < 1.05 * early, f"{late / early - 1:.1%} more memory after 300 steps than after 30"


@pytest.mark.parametrize("factor, expected", [(5, "bfloat16"), (1.5, "float32"), (0.01, "float32")])
def test_the_dtype_of_a_cpu_is_the_quicker_one(factor, expected, monkeypatch):
    """factor: how much quicker bfloat16 is there."""
    clock, seconds = [0.0], {torch.float32: 1.0, torch.bfloat16: 1 / factor}
    matmul = torch.Tensor.__matmul__

    def timed(x, W):
        clock[0] += seconds[x.dtype]
        return matmul(x, W)
    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    assert CPU_DTYPE() == expected


@pytest.mark.parametrize("flags", [(), ("--checkpointing",), ("--peft", "lora"), ("--peft", "dora")])
def test_bfloat16_is_float32_within_its_rounding(flags, llama, tmp_path):
    """Losses of six steps and scores of what they taught; --resume and eval.py keep what auto meant."""
    lines = {}
    for dtype in ("float32", "bfloat16"):
        run(tmp_path / dtype, llama, *flags, "--dtype", dtype)
        lines[dtype] = [line for line in metrics(tmp_path / dtype)[1:]]
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == f"torch.{dtype}"
    for exact, rounded in zip(*lines.values()):
        for key in {"loss", "validation_loss", "entropy"} & exact.keys():
            assert rounded[key] == pytest.approx(exact[key], rel=2**-7), (key, exact["step"])
    scores = []
    for dtype in lines:
        result = evaluation.main(["--run", str(tmp_path / dtype), "--data", SAMPLE, "--dtype", dtype])
        file = next((tmp_path / dtype / "eval").glob("*/predictions.jsonl"))
        scores.append([json.loads(line)["scores"] for line in file.read_text().splitlines()])
        assert result["configuration"]["dtype"] == f"torch.{dtype}"
    for exact, rounded in zip(*scores):
        assert rounded == pytest.approx(exact, rel=2**-7)
