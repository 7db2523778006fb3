"""Interruptions and faults: nothing is lost, nothing is silently wrong."""
import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import write_llama
from data.download import UserError
from test_train import SAMPLE, adapter, metrics

# Each process that gets killed is a fork of one that has torch loaded already and has computed nothing yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "train", "test_resume"])  # AdamW imports the first


def flags(base, directory, *more):
    return ["--init", str(base), "--data", SAMPLE, "--out", str(directory), "--r", "4", "--warmup", "2", "--batch", "4",
            "--micro-batch", "3", "--tasks", "piqa,ARC-Easy", "--form", "cloze", "--dropout", "0.2", "--max-steps", "10", "--validation", "4", "--eval-every", "3",
            "--log-every", "2", "--save-every", "4", "--device", "cpu", "--lr", "1e-2", *more]


def timeless(directory):
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gib", "config")}
            for line in metrics(directory)]


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def assert_equal_runs(a, b):
    assert timeless(a) == timeless(b)
    assert same(adapter(a), adapter(b)) and same(adapter(a, "best"), adapter(b, "best"))
    assert same(load_file(a / "state.safetensors"), load_file(b / "state.safetensors"))  # the optimizer's too


def signal_at(monkeypatch, number, step):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda at, *rest: (
        os.kill(os.getpid(), number) if at == step else None, rate(at, *rest))[1])


@pytest.mark.parametrize("method", [("lora", "none"), ("lora", "token"), ("dora", "none"), ("dora", "static"),
                                    ("hira", "none"), ("gatera", "token")])
def test_a_resumed_run_is_the_run_that_was_never_stopped(method, llama, tmp_path, monkeypatch, capsys):
    method = ("--peft", method[0], "--gate", method[1])
    train.main(flags(llama, tmp_path / "whole", *method))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        signal_at(patch, signal.SIGTERM, 4)  # a step whose progress line is written, and that is no save's
        train.main(flags(llama, tmp_path / "cut", *method))
    assert stopped.value.code == 143
    assert f"python train.py --resume {tmp_path / 'cut'}" in capsys.readouterr().out
    assert timeless(tmp_path / "cut") != timeless(tmp_path / "whole")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lost in a crash": 1}\n{"ste')
    train.main(["--resume", str(tmp_path / "cut")])
    assert "going on after 5 of 10 steps" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    train.main(["--resume", str(tmp_path / "cut")])  # of a finished run: nothing is left to do
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def resume_or_start(base, directory):
    return ["--resume", str(directory)] if (directory / "config.json").exists() else flags(base, directory, "--save-every", "1")


def test_killed_at_random_moments_it_ends_the_same(tmp_path):
    base, whole, cut = write_llama(tmp_path / "llama"), tmp_path / "whole", tmp_path / "cut"
    started = time.time()
    process = PROCESSES.Process(target=train.main, args=(flags(base, whole, "--save-every", "1"),))
    process.start()
    process.join()
    seconds, chance, kills = time.time() - started, random.Random(1), 0
    while kills < 10:
        process = PROCESSES.Process(target=train.main, args=(resume_or_start(base, cut),))
        process.start()
        process.join(chance.uniform(0.2, 0.8) * seconds)
        process.kill()
        process.join()
        kills += 1
    train.main(resume_or_start(base, cut))
    assert_equal_runs(whole, cut)
    assert not list(cut.rglob(".*.tmp"))


def killed_at(function, call, argv):
    """Runs train.main(argv) in this process, which kills itself at a call of os.`function`."""
    original, calls = getattr(os, function), []

    def counting(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, function, counting)
    train.main(argv)


def test_killed_at_any_moment_of_a_save_it_ends_the_same(llama, tmp_path):
    """With --save-every 1 a step's calls are: metrics on the disk; then for each of state, last/adapter.safetensors,
    last/adapter.json, and of the two of best/ after a validation: contents on the disk, new name, name on the disk."""
    train.main(flags(llama, tmp_path / "whole", "--save-every", "1"))
    for function, call in (("fsync", 5), ("fsync", 6), ("replace", 4), ("replace", 5), ("fsync", 13), ("replace", 9)):
        process = PROCESSES.Process(target=killed_at, args=(function, call, resume_or_start(llama, tmp_path / "cut")))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    train.main(resume_or_start(llama, tmp_path / "cut"))
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def wait_for(condition, seconds=30):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


def test_control_c_saves_and_a_second_one_stops_at_once(llama, tmp_path):
    out = tmp_path / "run"
    started = lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 1  # noqa: E731
    process = PROCESSES.Process(target=train.main, args=(flags(llama, out, "--max-steps", "100000", "--save-every", "100000"),))
    process.start()
    wait_for(started)
    assert not (out / "state.safetensors").exists()
    with pytest.raises(UserError, match="another run is writing there"):  # neither beside it ...
        train.main(flags(llama, out))
    with pytest.raises(UserError, match="another run is writing there"):  # ... nor on with it
        train.main(["--resume", str(out)])
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130 and (out / "state.safetensors").exists()
    process = PROCESSES.Process(target=stuck, args=(["--resume", str(out)],))
    process.start()
    lines = len(metrics(out))
    wait_for(lambda: (out / "stuck").exists())
    for _ in range(2):
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == -signal.SIGINT and len(metrics(out)) <= lines


def stuck(argv):
    """A run whose steps never end."""
    def sleep(*args):
        open(argv[1] + "/stuck", "w").close()
        time.sleep(60)
    train.learning_rate = sleep
    train.main(argv)


@pytest.fixture
def stopped(llama, tmp_path, monkeypatch):
    """A run of ten steps that was stopped after six."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_at(patch, signal.SIGTERM, 5)
        train.main(flags(llama, tmp_path / "run"))
    return tmp_path / "run"


def test_other_settings_are_refused_by_name(stopped, capsys):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        train.main(["--resume", str(stopped), "--lr", "0.5", "--r", "8", "--batch", "4", "--dtype", "bfloat16",
                    "--out", "elsewhere"])
    for text in ("--lr 0.5: the run to resume has 0.01", "--r 8: the run to resume has 4", "--dtype bfloat16", "--out elsewhere"):
        assert text in str(caught.value)
    assert "--batch" not in str(caught.value)
    with pytest.raises(UserError, match="6 steps are done already, more than the 5 wanted"):
        train.main(["--resume", str(stopped), "--max-steps", "5"])
    for nothing in (stopped / "best", stopped.parent / "llama"):
        with pytest.raises(UserError, match="there is no run"):
            train.main(["--resume", str(nothing)])
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_more_steps_are_allowed_and_told(stopped, capsys):
    train.main(["--resume", str(stopped), "--max-steps", "20", "--log-every", "1", "--save-every", "7"])
    assert "learning rate goes on from 5.00e-03 instead of 7.78e-03" in capsys.readouterr().out
    lines = [line for line in metrics(stopped) if "loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, *range(6, 20)]
    assert lines[3]["lr"] == pytest.approx(0.01 * 14 / 18) and json.loads((stopped / "config.json").read_text())["steps"] == 20


def test_other_records_are_refused(stopped, tmp_path):
    for task in ("piqa", "ARC-Easy"):
        (tmp_path / "data" / task).mkdir(parents=True)
        text = Path(SAMPLE, task, "train.jsonl").read_text()
        (tmp_path / "data" / task / "train.jsonl").write_text(text.replace("the", "that", 1))
    with pytest.raises(UserError, match="records have changed since the run began"):
        train.main(["--resume", str(stopped), "--data", str(tmp_path / "data")])


@pytest.mark.parametrize("damage", ["cut", "flipped", "flipped text"])
def test_a_damaged_checkpoint_is_noticed(damage, stopped):
    file = stopped / "state.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[:-5]
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
    else:
        data[data.index(b'step\\": 6') + 8] ^= 1
    file.write_bytes(data)
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"state.safetensors: (broken or truncated|its contents do not match)"):
        train.main(["--resume", str(stopped)])
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_a_filesystem_without_locks_does_not_stop_a_run(llama, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    train.main(flags(llama, tmp_path / "run", "--max-steps", "3"))
    assert (tmp_path / "run" / "training.json").exists()
