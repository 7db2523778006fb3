"""Several processes, which have to learn what one does, over gloo on the CPU; and the plan of what memory they need."""
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import bench
import train
from data.cli import run_command
from data.files import UserError
from gatera import AdapterConfig, gate_entropy, inject_adapters
from model import Transformer, TransformerConfig
from test_resume import PROCESSES, SAMPLE
from test_train import adapter, metrics

FLAGS = ["--data", SAMPLE, "--r", "4", "--warmup", "2", "--batch", "3", "--tasks", "piqa,ARC-Easy", "--form", "cloze", "--epochs",
         "3", "--validation", "2", "--eval-every", "2", "--log-every", "1", "--device", "cpu", "--dtype", "float32", "--lr", "1e-2",
         "--entropy-weight", "0.1"]


def member(rank, size, port, argv, at):
    """A process as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    if "--fsdp" in argv:
        shard = train.Team.shard

        def checked(team, base, adapters):
            whole = sum(p.numel() for p in base.parameters() if not p.requires_grad)
            shard(team, base, adapters)
            kept = sum(p.to_local().numel() for p in base.parameters() if not p.requires_grad)
            assert kept <= whole / size * 1.01 and all(type(p) is torch.nn.Parameter for p in base.parameters() if p.requires_grad)
        train.Team.shard = checked
    rate = train.learning_rate
    train.learning_rate = lambda step, *rest: (at.get((rank, step), int)(), rate(step, *rest))[1]
    run_command(lambda: train.main(argv))


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def run(size, argv, at={}):
    """Exit statuses of `size` processes; at {(rank, step): what a process does then}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=member, args=(rank, size, port, argv, at)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def assert_same_curves(a, b):
    lines = [[line for line in metrics(directory) if "step" in line] for directory in (a, b)]
    assert len(lines[0]) == len(lines[1]) > 10
    for x, y in zip(*lines):
        assert set(x) == set(y)
        for key in set(x) - {"tokens_per_s", "memory_gib"}:
            assert x[key] == pytest.approx(y[key], rel=1e-4), (key, x, y)


@pytest.mark.parametrize("size, flags", [
    (2, ["--peft", "gatera", "--micro-batch", "1"]),        # shares of 2 and 1; the last batch has one record for two
    (3, ["--peft", "dora", "--gate", "token"]),
    (2, ["--peft", "gatera", "--fsdp", "--micro-batch", "1"]),
    (2, ["--peft", "dora", "--gate", "static", "--fsdp", "--checkpointing"]),
    (2, ["--peft", "lora", "--fsdp", "--test", "2"]),
])
def test_several_processes_learn_what_one_does(size, flags, llama, tmp_path):
    argv = ["--init", str(llama), *FLAGS, *flags]
    train.main([*(flag for flag in argv if flag != "--fsdp"), "--out", str(tmp_path / "one")])
    assert run(size, [*argv, "--out", str(tmp_path / "several")]) == [0] * size
    assert_same_curves(tmp_path / "one", tmp_path / "several")
    for name, tensor in adapter(tmp_path / "one").items():
        assert torch.allclose(tensor, adapter(tmp_path / "several")[name], atol=2e-3), name


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, llama, tmp_path):
    argv = ["--init", str(llama), *FLAGS]
    train.main([*argv, "--out", str(tmp_path / "one")])
    stopped = run(before, [*argv, "--out", str(tmp_path / "moved")], {(before - 1, 4): stop})  # one hears it, all stop
    assert stopped == [143] * before
    assert run(after, ["--resume", str(tmp_path / "moved")]) == [0] * after
    assert_same_curves(tmp_path / "one", tmp_path / "moved")


def die():
    raise RuntimeError("this process has a fault of its own")


@pytest.mark.parametrize("fault, status", [(die, 1), (os._exit, 0)])
def test_a_process_that_dies_ends_the_others(fault, status, llama, tmp_path, capfd):
    started = time.time()
    argv = ["--init", str(llama), *FLAGS, "--epochs", "1000", "--save-every", "1", "--out", str(tmp_path / "run")]
    assert run(3, argv, {(1, 4): partial(fault, *[0] * (fault is os._exit))}) == [2, status, 2]
    assert time.time() - started < 30
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_torchrun(llama, tmp_path):
    """The real command: what one process says on its own, two say once; a process that is killed ends the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--", train.__file__, "--init", llama, *FLAGS]
    done = subprocess.run([*command, "--out", tmp_path / "run"], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1 and done.stdout.count("saved ") == 1
    done = subprocess.run([*command, "--out", tmp_path / "run2", "--max-len", "4096"], capture_output=True, text=True,
                          timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "--max-len 4096: expected no more than the base's context of 512" in done.stderr


# ------------------------------------------------------------------------------------------------- the plan

def test_the_plan_reads_a_config_alone(llama, tmp_path, capsys):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((llama / "config.json").read_bytes())
    bench.main(["--what", "memory", "--model", str(tmp_path / "config"), "--r", "4", "--method", "gatera"])
    assert "32,352 frozen parameters" in capsys.readouterr().out
    bench.main(["--what", "memory", "--model", "llama-3-8b", "--device", "cuda", "--method", "gatera", "--max-len", "256"])
    text = capsys.readouterr().out
    assert "8,030,261,248 frozen parameters, 14.96 GiB in bfloat16" in text and "57,606,304 trainable" in text
    rows = [[float(x) for x in line.split()] for line in text.splitlines()[-4:]]
    assert [row[0] for row in rows] == [1, 2, 4, 8]
    for row in rows[1:]:
        plain, checkpointing, fsdp, both = row[1:]
        assert both < fsdp < plain and both < checkpointing < plain
    assert rows[0][1] > rows[1][1] > rows[2][1] and 15 < rows[3][2] and rows[3][4] < 8
    with pytest.raises(UserError, match="./no-such-model: no such model file or directory"):
        bench.main(["--what", "memory", "--model", "./no-such-model"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [("hira", "token"), ("dora", "static"), ("lora", "none")])
def test_the_plan_counts_what_a_real_forward_keeps(method, llama):
    adapter, model = AdapterConfig(*method, r=4), Transformer.from_pretrained(llama).train()
    inject_adapters(model, adapter)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    row = torch.arange(64)[None]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
        logits = model(row, documents=row, select=row[0, -bench.ANSWER_TOKENS:])
        F.cross_entropy(logits, row[0, -bench.ANSWER_TOKENS:]) + gate_entropy(model)
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert bench.kept_for_backward(model.config, adapter, 64, torch.float32) == pytest.approx(real, rel=0.05)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="rms_norm of an older PyTorch keeps more on a CPU")
@pytest.mark.parametrize("device, of_norms", [("cpu", 2 * 4 + 2 * 2), ("cuda", 2 * 4 + 4 * 2)])
def test_the_plan_counts_a_block_as_one_does_by_hand(device, of_norms):
    """In bfloat16, with HiRA on q, k, v, up and down. The two norms keep their input in float32, and a number a token.
    What q, k and v read is one tensor on a CPU, and three on a GPU, where the norm returns float32; up reads another."""
    config = TransformerConfig(vocab_size=64, n_layer=1, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_len=64)
    one, two = (bench.kept_for_backward(dataclasses.replace(config, n_layer=n), AdapterConfig("hira", "none", r=4), 64,
                                        torch.bfloat16, device) for n in (1, 2))
    of_attention = 2 * (2 * 32 + 2 * 16) + 4 * 4    # q, k, v and the result; a number in float32 for each head
    of_mlp = 2 * 4 * 48                             # in and out of silu, its factor, and what down reads
    assert two - one == 64 * (32 * of_norms + 2 * 4 + of_attention + of_mlp)


@pytest.mark.slow
@pytest.mark.parametrize("max_len, batch", [(64, 4), (128, 16)])
def test_the_plan_is_near_what_is_measured(max_len, batch, smollm, tmp_path, capsys):
    bench.main(["--what", "memory", "--model", smollm, "--method", "gatera", "--max-len", str(max_len), "--batch", str(batch)])
    planned = float(capsys.readouterr().out.splitlines()[3].split()[1])
    subprocess.run([sys.executable, train.__file__, "--init", smollm, "--max-len", str(max_len), "--batch", str(batch),
                    "--device", "cpu", "--dtype", "float32", "--data", SAMPLE, "--max-steps", "3", "--warmup", "1", "--validation", "2",
                    "--out", tmp_path / "run"], check=True, capture_output=True)
    measured = [line for line in metrics(tmp_path / "run") if "loss" in line][-1]["memory_gib"]
    assert planned == pytest.approx(measured, rel=0.25)
