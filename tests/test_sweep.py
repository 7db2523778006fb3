"""Many runs in one process: train.main and eval.main as functions, the directories they choose, and where metrics go."""
import gc
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from data.files import Stopped, UserError
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
