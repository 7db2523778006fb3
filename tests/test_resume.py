"""Interruptions and faults: nothing is lost, nothing is silently wrong."""
import fcntl
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from conftest import write_llama
from data.cli import run_command
from data.files import Stopped, UserError, json_lines, read_tensors, write_tensors
from data.prepare import hold_out, load_records
from gatera import GATES, METHODS, load_adapter
from model import Transformer
from test_train import SAMPLE, adapter, metrics

# Each process that gets killed is a fork of one that has torch loaded already and has computed nothing yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "train", "test_resume"])  # AdamW imports the first


def flags(base, directory, *more):
    return ["--init", str(base), "--data", SAMPLE, "--out", str(directory), "--r", "4", "--warmup", "2", "--batch", "4",
            "--micro-batch", "3", "--tasks", "piqa,ARC-Easy", "--form", "cloze", "--dropout", "0.2", "--max-steps", "10",
            "--validation", "2", "--eval-every", "3", "--log-every", "2", "--save-every", "4", "--device", "cpu", "--dtype",
            "float32", "--lr", "1e-2", *more]


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


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(method, gate, llama, tmp_path, monkeypatch, capsys):
    method = ("--peft", method, "--gate", gate)
    handlers = list(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))
    train.main(flags(llama, tmp_path / "whole", *method))
    assert list(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))) == handlers
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        signal_at(patch, signal.SIGTERM, 4)  # a step whose progress line is written, and that is no save's
        train.main(flags(llama, tmp_path / "cut", *method))
    assert stopped.value.signal == signal.SIGTERM
    assert f"python train.py --resume {tmp_path / 'cut'}" in capsys.readouterr().out
    assert timeless(tmp_path / "cut") != timeless(tmp_path / "whole")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lost in a crash": 1}\n{"ste')
    train.main(["--resume", str(tmp_path / "cut")])
    assert "going on after 5 of 10 steps" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    train.main(["--resume", str(tmp_path / "cut")])  # of a finished run: nothing is left to do
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_what_a_run_has_counted_goes_on(llama, tmp_path, monkeypatch, capsys):
    """The lowest validation loss, which this rate leaves behind; prompts that were cut; and the time."""
    argv = ["--lr", "1", "--warmup", "9", "--eval-every", "1", "--save-every", "100", "--max-len", "64"]
    train.main(flags(llama, tmp_path / "whole", *argv))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, signal.SIGTERM, 8)
        now, rate = time.monotonic, train.learning_rate
        patch.setattr(train, "learning_rate", lambda at, *rest: (
            patch.setattr(time, "monotonic", lambda: now() + 1000) if at == 7 else None, rate(at, *rest))[1])
        train.main(flags(llama, tmp_path / "cut", *argv))
    losses = [line["validation_loss"] for line in metrics(tmp_path / "cut") if "validation_loss" in line]
    results = train.main(["--resume", str(tmp_path / "cut")])
    assert min(losses) < losses[-1] and results["best_validation_loss"] == min(losses) and results["seconds"] > 1000
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    told = [line for line in capsys.readouterr().out.splitlines() if "lost the start of its prompt" in line]
    assert len(told) == 2 and told[0] == told[1]


@pytest.mark.parametrize("clock", [lambda: 5.0, lambda ticks=[1e6]: ticks.append(ticks[-1] - 7) or ticks[-1]],
                         ids=["stands still", "runs backwards"])
def test_a_broken_clock_stops_no_run(clock, llama, tmp_path, monkeypatch):
    train.main(flags(llama, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", clock)
        patch.setattr(time, "time", clock)
        results = train.main(flags(llama, tmp_path / "run"))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert results["seconds"] == 0 and metrics(tmp_path / "run")[1]["tokens_per_s"] is None


def test_all_is_on_the_disk_before_the_state_says_so(llama, tmp_path, monkeypatch):
    """A file's contents before its name, and all other files before the state."""
    out, synced, renamed = tmp_path / "run", set(), []
    fsync, replace = os.fsync, os.replace
    known = lambda status: (status.st_ino, status.st_size)  # noqa: E731

    def sync(handle):
        synced.add(known(os.fstat(handle)))
        fsync(handle)

    def rename(old, new):
        assert known(os.stat(old)) in synced
        renamed.append(new.name)
        if new.name == "state.safetensors":
            assert known(os.stat(out / "metrics.jsonl")) in synced and known(os.stat(out / "last" / "adapter.json")) in synced
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    train.main(flags(llama, out, "--save-every", "1"))
    assert renamed.count("state.safetensors") == 10


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


def killed_writing(name, argv):
    """Runs until a file of this name in last/ or beside it is about to be there."""
    real = os.replace
    def replace(old, new):
        if new.name == name and new.parent.name != "best":
            os.kill(os.getpid(), signal.SIGKILL)
        real(old, new)
    os.replace = replace
    train.main(argv)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json", "state.safetensors"])
def test_killed_in_the_last_save_it_ends_the_same(name, llama, tmp_path):
    train.main(flags(llama, tmp_path / "whole", "--save-every", "100"))
    argv = flags(llama, tmp_path / "cut", "--save-every", "100")
    process = PROCESSES.Process(target=killed_writing, args=(name, argv))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train.main(["--resume", str(tmp_path / "cut")])
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_killed_at_any_moment_of_a_save_it_ends_the_same(llama, tmp_path):
    """With --save-every 1 a step's calls are, for each of last/adapter.safetensors and last/adapter.json: contents on the
    disk, new name, name on the disk; then metrics on the disk; then those three for the state."""
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
    process = PROCESSES.Process(target=program, args=(flags(llama, out, "--max-steps", "100000", "--save-every", "100000"),))
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
    assert process.exitcode == 130 and len(metrics(out)) <= lines


def program(argv):
    """train.py as it is started on the command line."""
    run_command(lambda: train.main(argv))


def stuck(argv):
    """A run whose steps never end."""
    def sleep(*args):
        open(argv[1] + "/stuck", "w").close()
        time.sleep(60)
    train.learning_rate = sleep
    program(argv)


@pytest.fixture
def stopped(llama, tmp_path, monkeypatch):
    """A run of ten steps that was stopped after six."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
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
    config, facts = stopped / "config.json", json.loads((stopped / "config.json").read_text())
    config.write_text(json.dumps(facts | {"dtype": "torch.int8", "config": facts["config"] | {"form": "label"}}))
    with pytest.raises(UserError, match="form is 'label', was 'cloze'.*; dtype is 'torch.int8', was 'torch.float32'"):
        train.main(["--resume", str(stopped)])
    config.write_bytes(before[config])
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()}


def assert_refused(directory, *more, match, before=None):
    """In one line, and nothing is overwritten."""
    before = before or contents(directory)
    with pytest.raises(UserError, match=match) as caught:
        train.main(["--resume", str(directory), *more])
    assert "\n" not in str(caught.value) and contents(directory) == before


EDITED = {"lr": 0.02, "seed": 7, "batch": 5, "dropout": 0.3, "entropy_weight": 0.5, "weight_decay": 0.1, "alpha": 3.0,
          "gate_lr": 0.5, "warmup": 3, "max_steps": 12, "epochs": 7, "eval_every": 4, "clip": 0.5,
          "r": 8, "validation": 1, "limit": 5, "max_len": 100, "form": "label", "tasks": "piqa", "targets": "qkv",
          "peft": "hira", "init": "gpt2", "gate_bias": 0.5}


def test_edited_settings_are_refused_by_name_with_both_values(stopped):
    config, facts = stopped / "config.json", json.loads((stopped / "config.json").read_text())
    for name, value in EDITED.items():
        config.write_text(json.dumps(facts | {"config": facts["config"] | {name: value}}))
        assert_refused(stopped, match=re.escape(f"config.json: {name} is {value!r}, was {facts['config'][name]!r} when"))
    assert_refused(stopped, "--gate-bias", "0.5", match="gate_bias is 0.5, was 0.0 when")  # no flag makes it true
    del facts["config"]["lr"]
    config.write_text(json.dumps(facts))
    assert_refused(stopped, match="lr is None, was 0.01 when")


def test_what_no_flag_may_change_is_refused_if_it_was_edited(stopped):
    config, facts = stopped / "config.json", json.loads((stopped / "config.json").read_text())
    for name, value in (("dtype", "torch.bfloat16"), ("data_sha256", "0"), ("base_sha256", "0"), ("adapter", {})):
        config.write_text(json.dumps(facts | {name: value}))
        assert_refused(stopped, match=f"config.json: {name} is .*, was .* when")


WRONG = [None, [], {}, 10**400, -1, "x", True, 1.5, math.nan, "\0", "\ud800"]


@pytest.mark.parametrize("saved", [True, False])
def test_values_of_another_type_are_refused_in_one_line(saved, stopped):
    config, facts = stopped / "config.json", json.loads((stopped / "config.json").read_text())
    if not saved:
        (stopped / "state.safetensors").unlink()
    changed = [facts | {name: value} for name in facts for value in WRONG]
    changed += [facts | {"config": facts["config"] | {name: value}} for name in facts["config"] for value in WRONG]
    refused = 0
    for wrong in changed:
        config.write_text(json.dumps(wrong))
        try:
            train.parse(["--resume", str(stopped)])
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
    assert refused > len(changed) * (0.85 if saved else 0.7)


@pytest.mark.parametrize("file", ["adapter.safetensors", "config.json"])
def test_a_change_of_settings_survives_a_crash(file, stopped):
    """A run that got more steps and is killed before it saves again, or between the checkpoint, which has learnt of them,
    and config.json."""
    process = PROCESSES.Process(target=killed_writing, args=(file, ["--resume", str(stopped), "--max-steps", "20"]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert train.main(["--resume", str(stopped)])["steps"] == 20


def test_another_base_of_the_same_shape_is_refused_by_name(stopped, llama):
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    assert_refused(stopped, match=f"the weights of the base {llama} are others than those that the run began with")


@pytest.mark.parametrize("left", ["all", "half a line", "a line", "nothing", "no file"])
def test_metrics_that_were_cut_are_kept_and_told(left, stopped, tmp_path, capsys):
    train.main(flags(tmp_path / "llama", tmp_path / "whole"))
    file, lines = stopped / "metrics.jsonl", (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    file.write_text({"all": "".join(lines), "half a line": "".join(lines[:3]) + lines[3][:9], "a line": "".join(lines[:3])}.get(left, ""))
    if left == "no file":
        file.unlink()
    capsys.readouterr()
    train.main(["--resume", str(stopped)])
    assert ("metrics.jsonl has lost" in capsys.readouterr().out) == (left != "all")
    whole = timeless(tmp_path / "whole")
    expected = {"all": whole, "half a line": whole[:3] + whole[len(lines):], "a line": whole[:3] + whole[len(lines):]}
    assert [line for line in timeless(stopped) if "step" in line] == [
        line for line in expected.get(left, whole[len(lines):]) if "step" in line]
    assert "config" in metrics(stopped)[0] and same(adapter(tmp_path / "whole"), adapter(stopped))


def test_a_run_that_has_ended_is_not_scored_again(llama, tmp_path, monkeypatch, capsys):
    results = train.main(flags(llama, tmp_path / "run", "--test", "3"))
    before = contents(tmp_path / "run")
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", None)
    assert train.main(["--resume", str(tmp_path / "run")]) == results
    assert train.main(["--resume", str(tmp_path / "run"), "--max-steps", "10"]) == results
    out, kept = capsys.readouterr().out, json.loads((tmp_path / "run" / "training.json").read_text())
    assert f"the run in {tmp_path / 'run'} had ended, nothing is left to do" in out and json.dumps(kept) in out
    assert contents(tmp_path / "run") == before
    monkeypatch.setattr(train, "evaluate", evaluate)
    (tmp_path / "run" / "training.json").write_text("{")
    for more in ([], ["--test", "2"]):  # results that are damaged, or wanted of another number of questions
        assert set(train.main(["--resume", str(tmp_path / "run"), *more])["tasks"]) == {"piqa", "ARC-Easy"}
    monkeypatch.setattr(train, "evaluate", None)
    with pytest.raises(TypeError):  # stopped as it scores, it leaves no results of other settings behind
        train.main(["--resume", str(tmp_path / "run"), "--test", "1"])
    assert not (tmp_path / "run" / "training.json").exists()
    assert train.main(["--resume", str(tmp_path / "run"), "--max-steps", "12", "--test", "0"])["steps"] == 12


def test_best_is_never_of_steps_that_were_given_up(llama, tmp_path, monkeypatch):
    """Killed behind the validation of step 5 and resumed to end there, best/ and its loss are of the same step."""
    class Killed(BaseException):
        pass

    def killed():
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fault_at(patch, 7, killed)
        train.main(flags(llama, tmp_path / "run", "--save-every", "100"))
    with pytest.raises(UserError, match="6 steps are done already, more than the 5 wanted"):
        train.main(["--resume", str(tmp_path / "run"), "--max-steps", "5"])
    results = train.main(["--resume", str(tmp_path / "run"), "--max-steps", "7"])
    losses = [line["validation_loss"] for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert results["best_validation_loss"] == min(losses) and len(losses) == 3


def changed_info(info, **changes):
    return json.dumps(json.loads(info) | changes)


STATES = {
    "of others": lambda tensors, info, file: save_file(tensors, file),
    "of others, with a text": lambda tensors, info, file: save_file(tensors, file, {"info": "[1"}),
    "text of another kind": lambda tensors, info, file: write_tensors(file, tensors, '"step"'),
    "an adapter": lambda tensors, info, file: shutil.copy(file.parent / "last" / "adapter.safetensors", file),
    "other dtypes": lambda tensors, info, file: write_tensors(file, {k: t.bfloat16() for k, t in tensors.items()}, info),
    "whole numbers": lambda tensors, info, file: write_tensors(file, {k: t.long() for k, t in tensors.items()}, info),
    "other shapes": lambda tensors, info, file: write_tensors(file, {k: t[None] for k, t in tensors.items()}, info),
    "without moments": lambda tensors, info, file: write_tensors(
        file, {k: t for k, t in tensors.items() if "exp_avg" not in k}, info),
    "nan": lambda tensors, info, file: write_tensors(file, {k: t * math.nan for k, t in tensors.items()}, info),
    "no settings": lambda tensors, info, file: write_tensors(
        file, tensors, json.dumps({k: v for k, v in json.loads(info).items() if k != "facts"})),
    **{f"{name} {value}": lambda tensors, info, file, name=name, value=value: write_tensors(
        file, tensors, changed_info(info, **{name: value}))
       for name in ("step", "steps", "metrics", "best", "cut", "seconds", "scaler", "facts")
       for value in (None, "x", [], -1, math.nan)},
    "more steps than there are": lambda tensors, info, file: write_tensors(file, tensors, changed_info(info, step=11)),
    "facts of another kind": lambda tensors, info, file: write_tensors(
        file, tensors, changed_info(info, facts={"config": []})),
}


def test_a_foreign_checkpoint_is_refused_in_one_line(stopped):
    file = stopped / "state.safetensors"
    whole = file.read_bytes()
    for name, write in STATES.items():
        write(*read_tensors(file, with_info=True), file)
        assert_refused(stopped, match="its checkpoint is of another version of train.py; start a new run")
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_a_best_adapter_that_is_damaged_is_noticed_before_the_run_goes_on(name, stopped):
    file = stopped / "best" / name
    whole = file.read_bytes()
    for damaged in (None, b"", whole[:-9], b"{}", b"[]"):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert_refused(stopped, match=f"best(/{name})?: ")
    if name == "adapter.safetensors":
        for text in ("[]", "{", '{"r": []}', '{"x": 1}'):
            file.write_bytes(whole)
            write_tensors(file, read_tensors(file), text)
            assert_refused(stopped, match="best/adapter.safetensors: .|best: adapter.json is not")


PLACES = ["config.json", "metrics.jsonl", "state.safetensors", "training.json", "best", "last", "best/adapter.json",
          "last/adapter.safetensors"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory"])
@pytest.mark.parametrize("name", PLACES)
def test_a_link_or_pipe_in_the_place_of_a_file_is_refused(name, kind, llama, tmp_path):
    out, elsewhere, place = tmp_path / "run", tmp_path / "elsewhere", tmp_path / "run" / name
    if kind == "directory" and name in ("best", "last"):
        return
    train.main(flags(llama, out, "--max-steps", "3"))
    place.rename(elsewhere)
    if kind == "link":
        place.symlink_to(elsewhere)
    elif kind == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    before = contents(tmp_path)
    for argv in (["--resume", str(out), "--max-steps", "5"], flags(llama, out)):
        with pytest.raises(UserError, match=re.escape(f"{place}: a link, or something else that is no ")) as caught:
            train.parse(argv)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="a link, or something else"):  # it was put there after the flags were read
        train.Run(out).take_over(resume=True)
    assert contents(tmp_path) == before


def test_only_a_run_is_moved_aside(llama, tmp_path):
    argv = flags(llama, tmp_path / "run", "--max-steps", "3")
    (tmp_path / "run").mkdir()
    for name, text in {"metrics.jsonl": '{"step": 0}\n', "config.json": '{"model_type": "llama"}', "notes.txt": "mine",
                       ".config.json.bak.tmp.txt": "mine", "results.json": "{}"}.items():
        file = tmp_path / "run" / name
        file.write_text(text)
        with pytest.raises(UserError, match="holds other things than a run"):
            train.main(argv)
        assert file.read_text() == text
        file.unlink()
    (tmp_path / "run" / "metrics.jsonl").touch()  # what a run leaves that is killed as it begins
    (tmp_path / "run" / ".config.json.12.tmp").touch()
    train.main(argv)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train.main(argv)
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run", "run-1"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link: a link to nothing"):
        train.main(flags(llama, tmp_path / "link"))


def test_more_steps_are_allowed_and_told(stopped, capsys):
    train.main(["--resume", str(stopped), "--max-steps", "20", "--log-every", "1", "--save-every", "7"])
    assert "learning rate goes on at 7.78e-03 instead of 5.00e-03" in capsys.readouterr().out
    lines = [line for line in metrics(stopped) if "loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, *range(6, 20)]
    assert lines[3]["lr"] == pytest.approx(0.01 * 14 / 18) and json.loads((stopped / "config.json").read_text())["steps"] == 20


def test_what_a_killed_process_left_half_written_is_removed(stopped):
    halves = [stopped / ".state.safetensors.1.tmp", stopped / "best" / ".adapter.safetensors.1.tmp"]
    for half in halves:
        half.write_text("half")
    train.main(["--resume", str(stopped)])
    assert not any(half.exists() for half in halves)


@pytest.mark.parametrize("part", [0, 1], ids=["training", "validation"])
def test_other_records_are_refused(part, stopped, tmp_path):
    for task in ("piqa", "ARC-Easy"):
        (tmp_path / "data" / task).mkdir(parents=True)
        records = load_records(task, "train", SAMPLE)
        hold_out(records)[part][0]["question"] += " Why?"
        (tmp_path / "data" / task / "train.jsonl").write_text(json_lines(records))
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


def test_a_changed_adapter_json_is_noticed(stopped, llama):
    file = stopped / "last" / "adapter.json"
    text = file.read_text()
    load_adapter(Transformer.from_pretrained(llama), stopped / "last")
    file.write_text(text.replace('"dropout": 0.2', '"dropout": 0.3'))
    with pytest.raises(UserError, match="adapter.json is not what was saved"):
        load_adapter(Transformer.from_pretrained(llama), stopped / "last")


def test_a_filesystem_without_locks_does_not_stop_a_run(llama, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    train.main(flags(llama, tmp_path / "run", "--max-steps", "3"))
    assert (tmp_path / "run" / "training.json").exists()


# ------------------------------------------------------------------------------------------------- faults

def fault_at(monkeypatch, step, fault):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda at, *rest: (fault() if at == step else None, rate(at, *rest))[1])


def assert_the_checkpoint_is_good(whole, out):
    train.main(["--resume", str(out)])
    assert_equal_runs(whole, out)


@pytest.mark.parametrize("fault", [lambda: torch.empty(2**50), lambda: [0] * 2**60])
def test_out_of_memory_names_what_to_lower(fault, llama, tmp_path, monkeypatch):
    train.main(flags(llama, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        fault_at(patch, 6, fault)
        train.main(flags(llama, tmp_path / "run"))
    for text in ("out of memory: lower --micro-batch (now 3) or --max-len (now 512), or add --checkpointing",
                 "learnt in 6 steps", f"python train.py --resume {tmp_path / 'run'}"):
        assert text in str(caught.value)
    assert_the_checkpoint_is_good(tmp_path / "whole", tmp_path / "run")


def full_at(step, size, argv):
    """A run in this process, for which files cannot grow over `size` bytes from `step` on."""
    rate = train.learning_rate
    train.learning_rate = lambda at, *rest: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)) if at == step else None, rate(at, *rest))[1]
    try:
        train.main(argv)
    except UserError as error:
        Path(argv[5] + ".error").write_text(str(error))


@pytest.mark.parametrize("size, what", [(30_000, "state"), (500, "metrics")])
def test_a_full_disk_leaves_the_last_checkpoint(size, what, llama, tmp_path):
    train.main(flags(llama, tmp_path / "whole"))
    process = PROCESSES.Process(target=full_at, args=(5, size, flags(llama, tmp_path / "run")))
    process.start()
    process.join(60)
    error = Path(f"{tmp_path / 'run'}.error").read_text()
    assert "cannot write" in error and "File too large" in error and "learnt in 4 steps" in error
    assert_the_checkpoint_is_good(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run(where, llama, tmp_path, monkeypatch):
    train.main(flags(llama, tmp_path / "whole", "--entropy-weight", "1"))
    entropy, now = train.gate_entropy, [0]
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        fault_at(patch, 6, lambda: now.append(6))
        if where == "loss":
            patch.setattr(train, "gate_entropy", lambda *a: entropy(*a) * (math.inf if now[-1] == 6 else 1))
        else:
            patch.setattr(train, "gate_entropy", lambda *a: NotFinite.apply(entropy(*a)) if now[-1] == 6 else entropy(*a))
        train.main(flags(llama, tmp_path / "run", "--entropy-weight", "1"))
    assert re.search(r"step 6: the loss is (inf|\d.*), the gradient's norm (nan|inf); lower --lr.*; the batch was "
                     r"(piqa|ARC-Easy) \d.*; what was learnt in 6 steps", str(caught.value)), caught.value
    assert_the_checkpoint_is_good(tmp_path / "whole", tmp_path / "run")


class NotFinite(torch.autograd.Function):
    """x, with a gradient that is inf."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * math.inf


def test_the_batch_is_named_by_task_and_line(llama):
    c = train.parse(["--init", str(llama), "--data", SAMPLE, "--tasks", "piqa,boolq", "--validation", "2"])
    records, _, _ = train.load_data(c)
    numbers = [0, len(records) - 1]
    found = dict(part.split(" ") for part in train.name_records(numbers, records, c).split("; "))
    assert set(found) == {"piqa", "boolq"}
    for number in numbers:
        task = records[number]["task"]
        assert json.loads(Path(SAMPLE, task, "train.jsonl").read_text().splitlines()[int(found[task]) - 1])["question"] == records[number]["question"]


def test_steps_that_overflow_float16_are_left_out(llama, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**40))
    train.main(flags(llama, tmp_path / "whole", "--dtype", "float16", "--log-every", "1", "--max-steps", "30"))
    norms = [line["grad_norm"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert norms[0] is None and None not in norms[-3:]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, signal.SIGTERM, 7)
        train.main(flags(llama, tmp_path / "cut", "--dtype", "float16", "--log-every", "1", "--max-steps", "30"))
    train.main(["--resume", str(tmp_path / "cut")])  # with the scale as it was
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_of_another_version_is_refused_in_one_line(llama, tmp_path):
    train.main(flags(llama, tmp_path / "run"))
    file = tmp_path / "run" / "state.safetensors"
    tensors, info = read_tensors(file, with_info=True)
    for changed, text in (({f"old.{name}": tensor for name, tensor in tensors.items()}, info),
                          (tensors, json.dumps({key: value for key, value in json.loads(info).items() if key != "steps"}))):
        write_tensors(file, changed, text)
        with pytest.raises(UserError, match="its checkpoint is of another version of train.py; start a new run"):
            train.main(["--resume", str(tmp_path / "run")])


def test_the_same_contents_are_the_same_file(tmp_path):
    tensors = {"b.A": torch.randn(3, 4), "a": torch.arange(5), "b.step": torch.tensor(2.0)}
    for number in range(16):
        write_tensors(tmp_path / str(number), dict(random.sample(sorted(tensors.items()), 3)), '{"ü": "\\n"}\n\u2028 ü')
    assert len({(tmp_path / str(number)).read_bytes() for number in range(16)}) == 1
    read, info = read_tensors(tmp_path / "0", with_info=True)
    assert same(read, tensors) and info == '{"ü": "\\n"}\n\u2028 ü'
