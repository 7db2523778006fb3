"""Many runs in one process: train.main and eval.main as functions, the directories they choose, and where metrics go."""
import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from data.files import Stopped, UserError
from data.run_names import UNNAMED, run_name
from data.runs import Run
from model import Transformer

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


def flags(base, out, *more):
    """With values that are numbers and paths, as a sweep has them."""
    return ["--init", base, "--data", SAMPLE, "--out", out, "--tasks", "piqa", "--form", "cloze", "--r", 4, "--batch", 4,
            "--warmup", 0, "--max-steps", 3, "--validation", 1, "--device", "cpu", "--lr", 1e-2, *more]


def state():
    """What a run must leave as it was: of this process, and how many models and open files there are."""
    gc.collect()
    return (*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)), sys.stdout, sys.stderr, torch.get_num_threads(),
            torch.is_grad_enabled(), threading.active_count(), len(os.listdir("/proc/self/fd")),
            sum(isinstance(thing, Transformer) for thing in gc.get_objects()))


def stop_at(patch, number, step):
    """A signal, once: the rate is asked for by each group of parameters."""
    rate, left = train.learning_rate, [number]
    patch.setattr(train, "learning_rate", lambda at, *rest: (
        os.kill(os.getpid(), left.pop()) if at == step and left else None, rate(at, *rest))[1])


# ------------------------------------------------------------------------------------------- train.main, eval.main

def test_runs_in_one_process_leave_nothing_behind(llama, tmp_path, monkeypatch):
    train.main(flags(llama, tmp_path / "first"))  # tqdm's and torch's own threads and files are there from here on
    evaluation.main(["--run", tmp_path / "first", "--device", "cpu"])
    before = state()
    run = train.main(flags(llama, tmp_path / "run", "--test", 2))
    assert run.keys() == {"out", "steps", "best_validation_loss", "seconds", "tasks"}
    assert run["out"] == str(tmp_path / "run") and run["steps"] == 3 and run["best_validation_loss"] > 0
    assert run["tasks"]["piqa"].keys() == {"acc", "acc_norm"} and run["tasks"]["piqa"]["acc"].keys() == {"before", "after"}
    assert train.main(["--resume", run["out"]]) == run  # of a run that has ended, its results
    summary = evaluation.main(["--run", run["out"], "--device", "cpu", "--limit", 2])
    assert summary["tasks"]["piqa"]["n"] == 2 and summary["settings"]["lr"] == 0.01
    assert summary["mean"]["acc_norm"] == summary["tasks"]["piqa"]["acc_norm"] == run["tasks"]["piqa"]["acc_norm"]["after"]
    assert state() == before

    with pytest.raises(UserError, match="r 4000 is larger"):  # a mistake that the loaded model shows
        train.main(flags(llama, tmp_path / "wrong", "--r", 4000))
    with pytest.raises(UserError, match="no such directory"):
        evaluation.main(["--run", tmp_path / "nowhere"])
    for number, text in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")):
        with monkeypatch.context() as patch, pytest.raises(Stopped, match="--resume") as stopped:
            stop_at(patch, number, 1)
            train.main(flags(llama, tmp_path / text))
        assert isinstance(stopped.value, KeyboardInterrupt) and stopped.value.signal == number
        assert train.main(["--resume", tmp_path / text])["steps"] == 3
        del stopped
    assert state() == before


def test_a_run_may_be_in_another_thread(llama, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train.main(flags(llama, tmp_path / "run"))))
    thread.start()
    thread.join()
    assert results and results[0]["steps"] == 3


def test_a_second_control_c_is_what_it_is_elsewhere(monkeypatch):
    """In a program and in a notebook alike: KeyboardInterrupt, which ends neither without a word."""
    signals = train.Signals()
    signals.catch()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught == [signal.SIGINT]
    finally:
        signals.release()


# ----------------------------------------------------------------------------------------- directories and defaults

@pytest.mark.parametrize("argv, out", [
    ("", "out/gpt2-medium-gatera-token-lr0.001-seed1337"),
    ("--init gpt2 --peft lora --lr 3e-4 --seed 2", "out/gpt2-lora-none-lr0.0003-seed2"),
    ("--init models/tiny.gguf --gate token --device cpu --test 5 --log-every 1", "out/tiny-87c62c-gatera-token-lr0.001-seed1337"),
    ("--init gpt2 --r 8 --tasks piqa,boolq --data data/sample --entropy-weight 0 --limit 9",
     "out/gpt2-gatera-token-r8-entropyweight0.0-piqa+boolq-sample-e92943-limit9-lr0.001-seed1337"),
    ("--preset quickstart", "out/quickstart"),
    ("--preset quickstart --test 20 --device cpu --dtype float32 --save-every 5", "out/quickstart"),
    ("--preset quickstart --peft dora --seed 3", "out/quickstart-dora-seed3"),
    ("--preset quickstart --targets qkv,o_proj --init a/b", "out/quickstart-b-c14cdd-qkv+o_proj"),
    ("--preset quickstart --peft lora --out out/mine", "out/mine"),
])
def test_runs_of_a_sweep_have_a_directory_each(argv, out):
    assert train.parse(argv.split()).out == out and "," not in out  # at which --compare parts runs


@pytest.mark.parametrize("name, values", [
    ("init", ["a/m", "b/m", "m", "m.gguf", "."]),
    ("data", ["d.v1", "d.v2", "x/train.json", "y/train.json", "train.json", "train.jsonl", "train"]),
    ("tasks", [f"boolq,piqa,social_i_qa,hellaswag,winogrande,{last}" for last in ("ARC-Easy", "ARC-Easy,openbookqa")]),
    ("template", ["Q: {instruction}", "Q, {instruction}", *("x" * 50 + "{instruction}" + end for end in "?!")]),
])
def test_settings_that_differ_differ_in_the_name(name, values):
    for preset in ("", "quickstart"):
        settings = dataclasses.asdict(train.Config(preset, gate="token"))
        names = [run_name(settings | {name: value}, {name: value}) for value in values]
        assert len(set(names)) == len(values) and not any(name.startswith("-") or "--" in name for name in names)


def test_every_setting_that_changes_what_is_learnt_is_in_the_name():
    values = {"init": "gpt2", "peft": "lora", "gate": "static", "tasks": "piqa", "form": "cloze", "data": "mine", "template": "Q: {instruction}",
              "targets": "qkv", "r": 3, "alpha": 4, "dropout": 0.5, "entropy_weight": 2, "gate_bias": 7,
              "gate_lr": 0.2, "max_len": 99, "limit": 9, "lr": 0.9, "weight_decay": 0.8, "batch": 77, "epochs": 6,
              "max_steps": 55, "warmup": 11, "clip": 0.7, "seed": 42}
    others = {field.name for field in dataclasses.fields(train.Config)} - values.keys()
    assert others == set(UNNAMED)  # a new setting belongs to one of the two
    for preset in ("", "quickstart"):
        plain = run_name(dataclasses.asdict(train.Config(preset=preset)), {"preset": preset})
        for name, value in values.items():
            settings = dataclasses.asdict(train.Config(preset=preset) if name != "init" else train.Config(preset, value))
            assert run_name(settings | {name: value}, {name: value}) != plain, name


@pytest.mark.parametrize("argv, lr", [
    ("", 1e-2), ("--peft hira", 1e-2), ("--peft hira --gate static", 1e-2), ("--peft lora", 1e-3), ("--peft dora", 1e-3),
    ("--peft lora --gate token", 3e-3), ("--peft dora --gate token", 3e-3), ("--peft lora --gate static", 1e-3),
    ("--peft lora --lr 0.5", 0.5)])
def test_the_preset_takes_the_rate_that_was_best_for_the_method(argv, lr):
    """As README's table has it. Without the preset, the defaults are the paper's recipe for all."""
    assert train.parse(["--preset", "quickstart", *argv.split()]).lr == lr
    assert train.parse(argv.split()).lr == (0.5 if lr == 0.5 else 1e-3)


def test_the_rate_is_told_and_resumed(llama, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    argv = ["--preset", "quickstart", "--peft", "dora", *flags(llama, out)[:-2]]
    train.main([*argv, "--lr", 1e-2])
    assert train.parse(["--resume", str(out)]).lr == 1e-2  # given, and neither the preset's nor the method's
    train.main(argv)
    assert "3 steps of 4, lr 0.001;" in capsys.readouterr().out


@pytest.mark.parametrize("steps, warmup", [(3, 0), (40, 4), (999, 99), (1001, 100), (10**6, 100)])
def test_the_warmup_fits_the_run(steps, warmup, llama):
    c = train.parse(list(map(str, flags(llama, "out/new", "--warmup", -1, "--max-steps", steps))))
    assert train.load_inputs(c, train.Team(0, 1, torch.device("cpu")))[1] == steps and c.warmup == warmup
    with pytest.raises(UserError, match=f"--warmup {steps}: expected less than --max-steps {steps}; lower it or leave it out"):
        train.parse(list(map(str, flags(llama, "out/new", "--warmup", steps, "--max-steps", steps))))


def test_a_resumed_run_keeps_its_warmup(llama, tmp_path):
    argv = flags(llama, tmp_path / "run", "--warmup", -1, "--max-steps", 20)
    train.main(argv)
    assert train.parse(["--resume", str(tmp_path / "run"), "--max-steps", "400"]).warmup == 2  # of 20 steps, not of 400


# -------------------------------------------------------------------------------------------------------- --logger

class FakeRun:
    """What wandb and trackio share: init(...) gives a run, and a run with the same name or id goes on."""
    def __init__(self, **options):
        self.options, self.lines, self.finished = options, [], 0

    def log(self, numbers, step):
        self.lines.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(request, monkeypatch):
    """(The name of a package, the runs that its init has made, in their order.)"""
    runs, module = [], types.ModuleType(request.param)
    module.init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, runs


def recorded(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("step"), {k: v for k, v in line.items() if v is not None}) for line in lines if "step" in line]


@pytest.mark.parametrize("fake", ["wandb", "trackio"], indirect=True)
def test_a_logger_gets_settings_and_metrics_and_goes_on(fake, llama, tmp_path, monkeypatch):
    (name, runs), out = fake, tmp_path / "run"
    argv = flags(llama, out, "--log-every", 1, "--logger", name)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, signal.SIGTERM, 1)
        train.main(argv)
    train.main(["--resume", out])
    assert [run.finished for run in runs] == [1, 1] and runs[0].options["config"]["config"]["lr"] == 0.01
    assert runs[0].lines + runs[1].lines == recorded(out) and len(recorded(out)) == 4
    same = ("project", "name", "id", "resume", "dir")
    assert [runs[0].options.get(key) for key in same] == [runs[1].options.get(key) for key in same]
    assert runs[0].options["resume"] == "allow"
    train.main(argv)  # a new run in the same directory is another
    assert runs[2].options["name"] != runs[0].options["name"] and len(runs[2].lines) == 4
    train.main(["--resume", out])  # of a run that has ended: nothing to log
    train.main(["--resume", out, "--max-steps", 4, "--logger", "none"])
    assert len(runs) == 3


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_a_fault_of_a_logger_is_told_once_and_ends_nothing(fault, fake, llama, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(sys.modules["wandb"] if fault == "init" else FakeRun, fault, fail)
    assert train.main(flags(llama, tmp_path / "run", "--logger", "wandb", "--log-every", 1))["steps"] == 3
    printed = capsys.readouterr().out
    assert printed.count("WARNING: --logger wandb: ConnectionError: no network; it gets no more metrics") == 1
    assert len(recorded(tmp_path / "run")) == 4


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_the_first_process_alone_logs(fake, tmp_path):
    for is_writer in (True, False):
        run = Run(tmp_path / str(is_writer), is_writer, processes=2, logger="wandb")
        run.begin({"config": {}}, False, {})
        run.start({}, {})
        run.record({"step": 0, "loss": 1.0})
        run.close()
    assert [one.lines for one in fake[1]] == [[(0, {"loss": 1.0})]]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_logger_is_told_before_anything_else(name, llama, tmp_path, monkeypatch):
    """Also where a directory of its name is there: `import wandb` finds one that wandb has left."""
    for module in (None, types.ModuleType(name)):
        monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), module)
        with pytest.raises(UserError, match=f"^--logger {name}: the package is not installed; pip install {name}$"):
            train.main(flags("no-such-model", tmp_path / "run", "--logger", name))
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_what_was_logged(llama, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard")
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        rate = train.learning_rate
        patch.setattr(train, "learning_rate", lambda step, *rest: rate(step, *rest) if step < 4 else exec("raise RuntimeError"))
        train.main(flags(llama, out, "--log-every", 1, "--logger", "tensorboard", "--max-steps", 6, "--save-every", 3))
    train.main(["--resume", out])  # from step 3: what was logged of step 3 comes again, and is there once
    events = reader.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert "loss" in events.Tags()["scalars"] and "config/text_summary" in events.Tags()["tensors"]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(line["loss"])) for step, line in recorded(out) if "loss" in line]
    assert [step for step, _ in found] == list(range(6))
