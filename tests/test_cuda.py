"""What only a GPU can show: its results are the CPU's within rounding, in every dtype, compiled or not.

    python -m pytest tests/test_cuda.py

All other tests run on the CPU, also where there is a GPU (conftest.py).
"""
import itertools
import json
import os
import signal

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import eval as evaluation
import train
from data.commonsense import Question, pack
from data.files import Stopped
from eval import log_likelihoods
from gatera import (GATES, METHODS, AdapterConfig, adapter_state, adapters_off, cached_products, gate_entropy,
                    gate_values, inject_adapters)
from model import Transformer, TransformerConfig, compile_blocks
from test_train import SAMPLE, adapter, metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
GPU = torch.device("cuda")
SMALL = dict(vocab_size=160, n_layer=2, n_head=4, d_model=64, d_ff=96, max_len=64)
FAMILIES = {"gpt2": TransformerConfig(**SMALL, norm="layernorm", positions="learned", mlp="gelu", attention_bias=True,
                                      mlp_bias=True, tied_head=True),
            "llama": TransformerConfig(**SMALL, n_kv_head=2)}
ADAPTERS = list(itertools.product(METHODS, GATES))
# Relative errors: of sums in float32 in another order, and of products of bfloat16's 8 bits and float16's 11.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
HAS_BFLOAT16 = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def questions(count: int, seed: int = 0, several: bool = False) -> list[Question]:
    """Random tokens, 2 to 20 a prompt and 1 to 6 an answer."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        return torch.randint(0, 160, torch.randint(low, high, (1,), generator=generator).tolist(), generator=generator).tolist()
    return [Question(tokens(2, 20), [tokens(1, 6) for _ in range(3 if several else 1)]) for _ in range(count)]


def make_model(family: str, method: str, gate: str, device, dtype=torch.float32) -> Transformer:
    """The same random base and adapter on every device: B and the gates are no longer at their start."""
    torch.manual_seed(0)
    model = Transformer(FAMILIES[family]).train()
    inject_adapters(model, AdapterConfig(method, gate, r=4))
    for name, p in adapter_state(model).items():
        if name.rsplit(".")[-1] in ("B", "w_g", "b_g"):
            p.data.copy_(0.3 * torch.randn_like(p))
    trained = {id(p) for p in adapter_state(model).values()}
    for p in model.parameters():  # what trains stays in float32 or better
        p.data = p.data.to(torch.promote_types(dtype, torch.float32) if id(p) in trained else dtype)
    return model.to(device)


def step(model: Transformer, row, dtype: torch.dtype, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The loss, the logits, the gates and the gradients of one forward and backward, on the CPU in float64."""
    row = row.to(model.embed.weight.device)
    with torch.autocast(row.ids.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        logits = model(row.ids, documents=row.documents, select=row.select)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, row.targets) + 0.1 * gate_entropy(model, row.is_real)
    (scale * loss).backward()
    gates = [g[row.is_real] for g in gate_values(model).values()]  # filler may have any
    gradients = torch.cat([p.grad.flatten() for p in adapter_state(model).values()]) / scale
    model.zero_grad(set_to_none=True)
    seen = {"loss": loss, "logits": logits, "gradients": gradients} | ({"gates": torch.cat(gates)} if gates else {})
    return {name: tensor.detach().double().cpu() for name, tensor in seen.items()}


def assert_close(seen: dict, expected: dict, tolerance: float) -> None:
    for name in expected:
        error = (seen[name] - expected[name]).norm() / expected[name].norm()
        assert error <= tolerance, (name, error.item())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter_of", ADAPTERS, ids=str)
def test_a_step_is_the_cpus_in_float64(adapter_of, family):
    rows = [pack(questions(5)), pack(questions(3, 1)), pack(questions(1, 2))]
    reference = make_model(family, *adapter_of, "cpu", torch.float64)
    expected = [step(reference, row, torch.float64) for row in rows]
    for dtype, tolerance in ROUNDING.items():
        if dtype == torch.bfloat16 and not HAS_BFLOAT16:
            continue
        model = make_model(family, *adapter_of, GPU, dtype)
        for row, of_row in zip(rows, expected):
            assert_close(step(model, row, dtype, 2.0**12 if dtype == torch.float16 else 1.0), of_row, tolerance)


@pytest.mark.parametrize("method, gate, dtype, checkpointing", [
    ("lora", "none", torch.float32, False), ("dora", "token", torch.float32, False), ("hira", "token", torch.float32, False),
    ("hira", "token", torch.float32, True), ("hira", "token", torch.float16, False)])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # beyond that limit, all would run uncompiled
def test_compiled_and_checkpointed_steps_are_the_plain_one(method, gate, dtype, checkpointing):
    torch._dynamo.reset()
    rows = [pack(questions(count, count)) for count in (5, 3, 8)]
    plain, other = (make_model("llama", method, gate, GPU, dtype) for _ in "ab")
    scale = 2.0**12 if dtype == torch.float16 else 1.0
    expected = [step(plain, row, dtype, scale) for row in rows]
    other.gradient_checkpointing = checkpointing
    compile_blocks(other)
    for row, of_row in zip(rows, expected):
        assert_close(step(other, row, dtype, scale), of_row, ROUNDING[dtype])


@pytest.mark.parametrize("method, gate", [("lora", "token"), ("dora", "token"), ("hira", "token"), ("hira", "none")])
def test_a_step_never_waits_for_the_gpu(method, gate):
    """The loop's own step, but for the numbers that it reads where it logs; test_device.py runs that loop itself."""
    model = make_model("llama", method, gate, GPU, torch.float16)
    optimizer = train.make_optimizer(model, train.Config())
    rows = [pack(questions(count)).to(GPU) for count in (4, 6)]
    for row in rows:  # the first one makes handles, for which the host waits
        torch.cuda.set_sync_debug_mode("error" if row is rows[1] else "default")
        try:
            with torch.autocast("cuda", dtype=torch.float16):
                logits = model(row.ids, documents=row.documents, select=row.select)
                loss = F.cross_entropy(logits.float(), row.targets) + gate_entropy(model, row.is_real)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter_state(model).values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if row is rows[1]:
                with pytest.raises(RuntimeError):
                    loss.item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter_of", ADAPTERS, ids=str)
def test_scores_and_decoding_are_the_cpus(adapter_of, family):
    on_cpu, on_gpu = (make_model(family, *adapter_of, device).eval() for device in ("cpu", GPU))
    asked = questions(9, several=True)
    expected, seen = log_likelihoods(on_cpu, asked), log_likelihoods(on_gpu, asked)
    assert torch.allclose(torch.tensor(seen), torch.tensor(expected), rtol=1e-4)
    assert torch.allclose(torch.tensor(log_likelihoods(on_gpu, asked, row_tokens=40)), torch.tensor(expected), rtol=1e-4)
    prompts = [question.prompt for question in asked]
    for way in (cached_products, adapters_off):
        with way(on_cpu), way(on_gpu):
            assert on_gpu.generate(prompts, 6) == on_cpu.generate(prompts, 6)
            assert on_gpu.beam_search(prompts, 6) == on_cpu.beam_search(prompts, 6)


def flags(base, directory, *more):
    return ["--init", base, "--data", SAMPLE, "--out", directory, "--r", 4, "--warmup", 2, "--batch", 4, "--micro-batch", 3,
            "--tasks", "piqa,ARC-Easy", "--form", "cloze", "--max-steps", 10, "--validation", 2, "--eval-every", 5,
            "--log-every", 1, "--lr", 1e-2, "--peft", "gatera", "--device", "cuda", *more]


def json_lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(directory):
    return torch.tensor([line["loss"] for line in metrics(directory) if "loss" in line])


@pytest.mark.parametrize("dtype, tolerance", [
    ("float32", 1e-4), ("float16", 1e-3),
    pytest.param("bfloat16", 3e-3, marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="this GPU has no bfloat16"))])
def test_a_run_is_the_cpus_and_goes_on_after_a_stop(dtype, tolerance, llama, tmp_path, monkeypatch):
    train.main(flags(llama, tmp_path / "cpu", "--device", "cpu", "--dtype", "float32"))
    train.main(flags(llama, tmp_path / "gpu", "--dtype", dtype))
    assert torch.allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=tolerance)
    rate = train.learning_rate
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "learning_rate", lambda at, *rest: (
            os.kill(os.getpid(), signal.SIGTERM) if at == 4 else None, rate(at, *rest))[1])
        train.main(flags(llama, tmp_path / "cut", "--dtype", dtype))
    train.main(["--resume", tmp_path / "cut"])
    # Sums whose order is left to the GPU make two runs differ in their last bits.
    assert torch.allclose(losses(tmp_path / "cut"), losses(tmp_path / "gpu"), rtol=tolerance)
    expected, whole, cut = (torch.cat([tensor.flatten() for _, tensor in sorted(adapter(tmp_path / name).items())])
                            for name in ("cpu", "gpu", "cut"))
    assert (whole - expected).norm() <= 100 * tolerance * expected.norm()
    assert (cut - whole).norm() <= 100 * tolerance * whole.norm()


def test_what_a_gpu_trained_is_evaluated_and_shown_on_both(llama, tmp_path):
    run = tmp_path / "run"
    train.main(flags(llama, run, "--dtype", "float32"))
    for protocol in ("cloze", "label", "generate"):
        gpu, cpu = (evaluation.main(["--run", run, "--protocol", protocol, "--dtype", "float32", "--device", device,
                                     "--out", tmp_path / device / protocol]) for device in ("cuda", "cpu"))
        assert gpu["tasks"] == cpu["tasks"] and gpu["device"] != cpu["device"]
        gpu, cpu = (json_lines_of(tmp_path / device / protocol / "predictions.jsonl") for device in ("cuda", "cpu"))
        for one, other in zip(gpu, cpu, strict=True):
            assert one.get("text") == other.get("text")
            assert one.get("scores", []) == pytest.approx(other.get("scores", []), rel=1e-4)
    shown = [evaluation.main(["--run", run, "--gates", "--limit", 2, "--device", device, "--out", tmp_path / device])
             ["gates"]["prompt"]["mean"] for device in ("cuda", "cpu")]
    assert shown[0] == pytest.approx(shown[1], rel=1e-4)
    gpu, cpu = (evaluation.main(["--run", run, "--prompt", "Why?", "--dtype", "float32", "--device", device])
                for device in ("cuda", "cpu"))
    assert gpu == cpu and len(gpu) == 2


def test_a_gpu_that_is_full_names_what_to_lower(llama, tmp_path, monkeypatch):
    def full(*_, **__):
        return torch.empty(2**50, device=GPU)
    monkeypatch.setattr(train, "gate_entropy", full)
    with pytest.raises(train.UserError, match="out of memory.*--micro-batch"):
        train.main(flags(llama, tmp_path / "run", "--dtype", "float32"))
