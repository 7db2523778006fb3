"""Adapters in the models of transformers: there and back, and all that gatera.py does to a model. Each model is a tiny
random one of the real class. What is missing on a machine is skipped with a reason."""
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import VOCAB
from data.files import UserError
from data.weights import save_pretrained
from gatera import (GATES, METHODS, AdapterConfig, GatedLinear, adapter_state, adapters_off, cached_products, export_peft,
                    gate_context, gate_entropy, gate_values, gated_layers, inject_adapters, load_adapter, merge_adapters,
                    save_adapter)
from model import Transformer, load_tokenizer

transformers = pytest.importorskip("transformers", reason="its models are adapted: pip install -r requirements-dev.txt")

ROOT = Path(__file__).parents[1]
IDS = torch.randint(0, VOCAB - 1, (2, 12), generator=torch.Generator().manual_seed(0))
EVERY = [(method, gate) for method in METHODS for gate in GATES]
every = pytest.mark.parametrize("method, gate", EVERY, ids=["-".join(pair) for pair in EVERY])
PEFTS = [name for name, method in METHODS.items() if hasattr(method, "PEFT")]
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.15, bos_token_id=VOCAB - 1, eos_token_id=VOCAB - 1,
             pad_token_id=VOCAB - 1)
FAMILIES = {"llama": {}, "qwen2": {}, "mistral": {}, "gemma": dict(head_dim=8), "qwen3": dict(head_dim=8)}


def fresh(family="llama", kind=None, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | options)
    return (kind or transformers.AutoModelForCausalLM).from_config(config).eval()


def moved(model, seed=1):
    """Adapter parameters away from their start, where Delta is 0 and all gates are equal."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_state(model).values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return model


def adapted(method="hira", gate="token", family="llama", kind=None, targets=AdapterConfig.targets, **options):
    model = fresh(family, kind, **options)
    inject_adapters(model, AdapterConfig(method, gate, r=4, targets=targets))
    return moved(model)


def logits(model, ids=IDS):
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def train(model, steps=2, **inputs):
    """Steps of AdamW with the entropy term; the losses."""
    model.train()
    optimizer, losses = torch.optim.AdamW(adapter_state(model).values(), lr=1e-2), []
    for _ in range(steps):
        output = model(IDS)
        output = output if isinstance(output, torch.Tensor) else output.logits
        loss = F.cross_entropy(output[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()) + 0.01 * gate_entropy(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------- there and back

@every
def test_what_one_has_learnt_runs_in_the_other(method, gate, llama, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained
    ours = Transformer.from_pretrained(llama)
    inject_adapters(ours, AdapterConfig(method, gate, r=4, targets=("q_proj", "blocks.1.mlp.down_proj", "head")))
    train(moved(ours))
    save_adapter(ours, tmp_path / "ours")
    load_adapter(model := theirs(llama).eval(), tmp_path / "ours")
    close(logits(model), logits(ours))
    assert len(gated_layers(model)) == 4 and (logits(model) - logits(theirs(llama))).abs().max() > 1e-3
    losses = train(model)
    assert losses[1] < losses[0]
    save_adapter(model, tmp_path / "theirs")
    load_adapter(again := Transformer.from_pretrained(llama), tmp_path / "theirs")
    close(logits(again), logits(model))
    assert (logits(again) - logits(ours)).abs().max() > 1e-3


@pytest.mark.slow
def test_a_real_model_learns_in_one_and_runs_in_the_other(smollm, tmp_path):
    ours = Transformer.from_pretrained(smollm)
    save_pretrained(ours, tmp_path / "base", smollm)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    close(logits(model), logits(ours), 1e-3)
    inject_adapters(model, AdapterConfig(r=8))
    train(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    close(logits(model), logits(ours), 1e-3)
    prompt = IDS[:1, :6]
    written = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    assert written == ours.generate([prompt[0].tolist()], 8)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_model_of_linear_layers_trains_generates_and_comes_back(method, family, tmp_path):
    model = fresh(family)
    base = logits(model)
    inject_adapters(model, AdapterConfig(method, "token", r=4, targets=("q_proj", "o_proj", "gate_proj", "down_proj")))
    assert len(gated_layers(model)) == 8 and torch.equal(logits(model), base)
    losses = train(model, steps=3)
    assert losses[-1] < losses[0]
    model.generate(IDS, max_new_tokens=4)
    save_adapter(model, tmp_path)
    again = fresh(family)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), base)


def test_models_without_a_head_or_with_another_one_have_the_same_layers(llama, tmp_path):
    """LlamaModel has no `model.` before its layers' names."""
    theirs = {kind: getattr(transformers, kind).from_pretrained(llama).eval()
              for kind in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")}
    ours = Transformer.from_pretrained(llama)
    inject_adapters(ours, AdapterConfig(r=4, targets=("q_proj", "blocks.1.mlp.down_proj")))
    moved(ours)
    save_adapter(ours, tmp_path / "ours")
    for kind, model in theirs.items():
        load_adapter(model, tmp_path / "ours")
        save_adapter(model, tmp_path / kind)
        load_adapter(again := Transformer.from_pretrained(llama), tmp_path / kind)
        assert torch.equal(logits(again), logits(ours)), kind
    hidden = theirs["AutoModel"](IDS)[0]
    close(hidden, theirs["AutoModelForCausalLM"](IDS, output_hidden_states=True).hidden_states[-1], 0)
    with pytest.raises(UserError, match="no layer is named head; this model has down_proj"):
        inject_adapters(fresh(kind=transformers.AutoModel), AdapterConfig(targets=("head",)))


class Parallel(nn.Module):
    """What DistributedDataParallel makes of a model's names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Parallel, torch.compile, lambda model: Parallel(torch.compile(model))])
def test_wrapped_models_have_the_same_names(wrap, tmp_path):
    with pytest.raises(UserError, match="inside a (Parallel|OptimizedModule); inject the adapters before that"):
        inject_adapters(wrap(fresh()), AdapterConfig(r=4))
    model = adapted("lora", "none")
    expected, names, wrapped = logits(model), list(gated_layers(model)), wrap(model)
    assert list(gated_layers(wrapped)) == names
    save_adapter(wrapped, tmp_path)
    export_peft(wrapped, tmp_path / "peft")
    load_adapter(wrapped, tmp_path)
    for directory in (tmp_path, tmp_path / "peft"):
        load_adapter(again := fresh(), directory)
        assert torch.equal(logits(again), expected)
    merge_adapters(wrapped)
    assert not gated_layers(model) and type(model.lm_head) is nn.Linear
    close(logits(model), expected)


def test_blocks_compiled_one_by_one_have_the_same_names(tmp_path):
    model = adapted()
    expected = logits(model)
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block)
    save_adapter(model, tmp_path)
    load_adapter(again := fresh(), tmp_path)
    assert torch.equal(logits(again), expected)
    load_adapter(model, tmp_path)


# ------------------------------------------------------------------------------------------- what is refused

class Linear4bit(nn.Linear):
    """A quantised layer, as bitsandbytes has them."""

    def __init__(self, linear):
        super().__init__(*linear.weight.shape[::-1], bias=False)
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def int8(linear):
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    return linear


def float8(linear):
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return linear


class Packed(nn.Parameter):
    """A tensor that only looks like one of numbers, as torchao has them."""


def packed(linear):
    linear.weight = Packed(linear.weight.data, requires_grad=False)
    return linear


QUANTISED = {"q_proj is a Linear4bit": Linear4bit, "q_proj is a Linear whose weight is a Parameter of torch.int8": int8,
             "q_proj is a Linear whose weight is a Parameter of torch.float8": float8,
             "q_proj is a Linear whose weight is a Packed of torch.float32": packed}


def refused(message, function, *args):
    with pytest.raises(UserError, match=message) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("message", QUANTISED)
def test_quantised_layers_are_refused(message):
    model = fresh()
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            model.set_submodule(name, QUANTISED[message](module))
    refused(f"targets: model.layers.0.self_attn.{message}.*, expected an nn.Linear .*without quantisation",
            inject_adapters, model, AdapterConfig(r=4))
    assert not gated_layers(model) and model.lm_head.weight.requires_grad
    inject_adapters(model, AdapterConfig(r=4, targets=("up_proj",)))  # which is an nn.Linear


def test_offloaded_layers_are_refused():
    accelerate = pytest.importorskip("accelerate", reason="it moves weights away and back: pip install accelerate")
    model = accelerate.cpu_offload(fresh(), execution_device=torch.device("cpu"))
    refused("q_proj is a Linear whose weight accelerate has offloaded, .*without quantisation and offloading",
            inject_adapters, model, AdapterConfig(r=4))
    with torch.device("meta"):  # shapes alone
        inject_adapters(fresh(), AdapterConfig(r=4))


def test_layers_that_only_lend_their_weight_are_refused():
    """nn.MultiheadAttention never calls its out_proj."""
    model = nn.TransformerEncoderLayer(16, 2)
    for layer, kind in ("out_proj", "NonDynamicallyQuantizableLinear"), ("norm1", "LayerNorm"):
        refused(f"{layer} is a {kind}", inject_adapters, model, AdapterConfig(r=4, targets=(layer,)))


def test_gpt2_is_refused_and_says_where_it_works(gpt2, tmp_path):
    ours = Transformer.from_pretrained(gpt2)
    inject_adapters(ours, AdapterConfig("lora", "none", r=4))
    save_adapter(moved(ours), tmp_path / "ours")
    export_peft(ours, tmp_path / "peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    before, way_out = logits(model), "Conv1D.*model.Transformer.from_pretrained"
    refused(f"named q_proj, .*this model has lm_head. .*{way_out}", inject_adapters, model, AdapterConfig(r=4))
    refused(f"c_attn is a Conv1D, .*{way_out}", inject_adapters, model, AdapterConfig(r=4, targets=("c_attn",)))
    for directory in ("ours", "peft"):
        refused(f"{directory}/adapter.*: targets: .*{way_out}", load_adapter, model, tmp_path / directory)
    assert torch.equal(logits(model), before)
    inject_adapters(model, AdapterConfig(r=4, targets=("lm_head",)))  # an nn.Linear


def test_a_model_with_adapters_of_peft_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="its models are refused here: pip install -r requirements-dev.txt")
    save_adapter(adapted(), tmp_path)
    base = fresh()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    for model in (base, wrapped):
        refused("the model has adapters of peft", inject_adapters, model, AdapterConfig(r=4))
        refused("the model has adapters of peft", load_adapter, model, tmp_path)
    inject_adapters(wrapped.unload(), AdapterConfig(r=4))


# --------------------------------------------------------------------------------- what gatera.py does to a model

@every
def test_switches_and_looks(method, gate):
    model, base = adapted(method, gate), logits(fresh())
    expected = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), base) and gate_values(model) == {}
    with cached_products(model), gate_context(model, position=None):
        close(logits(model), expected)
    values = gate_values(model)
    assert [g.shape for g in values.values()] == [IDS.shape] * (10 if gate != "none" else 0)
    entropy = torch.tensor([torch.distributions.Bernoulli(g).entropy().mean() for g in values.values()]).mean()
    close(gate_entropy(model), entropy) if values else close(gate_entropy(model), torch.zeros(()))


@every
def test_generation_with_a_cache_and_with_beams(method, gate):
    model = adapted(method, gate)
    rows = IDS[:1]
    for _ in range(8):  # no cache
        rows = torch.cat([rows, logits(model, rows)[:, -1:].argmax(-1)], 1)
    model.generation_config.eos_token_id = None
    for context in (gate_context, cached_products):  # the first changes nothing
        with context(model):
            assert torch.equal(model.generate(IDS[:1], max_new_tokens=8, do_sample=False), rows)
    beams = model.generate(IDS, max_new_tokens=5, num_beams=3, do_sample=False, num_return_sequences=3,
                           return_dict_in_generate=True, output_scores=True)
    assert all(g.shape == (6, 1) for g in gate_values(model).values())
    for row, score in zip(beams.sequences, beams.sequences_scores):
        logp = logits(model, row[None])[0, :-1].log_softmax(-1)[range(11, 16), row[12:]]
        close(logp.sum() / 5, score, 1e-4)


def test_gates_that_read_different_tokens():
    """Generating, a head reads the last token alone."""
    model = adapted(targets=("q_proj", "lm_head"))
    model.generate(IDS, max_new_tokens=1)
    values = gate_values(model)
    assert values["lm_head"].shape == (2, 1) and values["model.layers.0.self_attn.q_proj"].shape == (2, 12)
    every_gate = torch.cat([g.flatten() for g in values.values()])
    close(gate_entropy(model), torch.distributions.Bernoulli(every_gate).entropy().mean())
    refused("one mask cannot fit all", gate_entropy, model, torch.ones(2, 12))


@pytest.mark.parametrize("family, options, targets", [
    ("llama", {}, ("q_proj", "up_proj")), ("qwen2", {}, ("k_proj", "down_proj")), ("mistral", {}, ("o_proj", "gate_proj")),
    ("gemma", {}, ("q_proj", "v_proj")), ("gptj", dict(rotary_dim=8), ("q_proj", "fc_in")),
    ("llama", {}, ("lm_head", "v_proj")),
    ("llama", dict(tie_word_embeddings=True), ("lm_head", "v_proj")), ("gemma", {}, ("lm_head",))], ids=str)
@pytest.mark.parametrize("method", PEFTS)
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_exports_load_in_peft(method, family, options, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="it reads what is exported: pip install -r requirements-dev.txt")
    model = adapted(method, "none", family, targets=targets, **options)
    export_peft(model, tmp_path)
    assert not json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    reference = peft.PeftModel.from_pretrained(fresh(family, **options), tmp_path).eval()
    close(logits(reference), logits(model))
    assert (logits(model) - logits(fresh(family, **options))).abs().max() > 1e-3
    load_adapter(again := fresh(family, **options), tmp_path)
    close(logits(again), logits(model), 1e-6)
    refused("a token gate cannot be exported: .* 'In transformers'", export_peft, adapted(), tmp_path / "gated")
    assert not (tmp_path / "gated").exists()


@pytest.mark.parametrize("family, options, targets", [
    ("llama", {}, ("q_proj", "up_proj")), ("qwen2", {}, ("k_proj", "down_proj")), ("gemma", {}, ("q_proj", "v_proj")),
    ("llama", {}, ("lm_head",)), ("llama", dict(tie_word_embeddings=True), ("lm_head", "v_proj")),
    ("llama", dict(tie_word_embeddings=True), ("v_proj",)), ("gemma", {}, ("lm_head",))], ids=str)
@pytest.mark.parametrize("method", [name for name, update in METHODS.items() if hasattr(update, "merged")])
def test_a_merged_model_is_a_plain_one(method, family, options, targets, tmp_path):
    model = adapted(method, "none", family, targets=targets, **options)
    expected, embeddings = logits(model), model.get_input_embeddings().weight.clone()
    tied = model.config.tie_word_embeddings
    merge_adapters(model)
    close(logits(model), expected)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] == (tied and "lm_head" not in targets)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and type(loaded) is type(model)
    close(logits(loaded.eval()), expected)
    close(logits(loaded), logits(model), 0)
    refused("a gated adapter cannot be merged", merge_adapters, adapted())


@every
def test_copies_pickles_states_dtypes_and_modes(method, gate, tmp_path):
    model = adapted(method, gate)
    output = model(IDS).logits
    output.sum().backward()  # gates have a graph now
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), output) and gated_layers(again)
    assert all((layer.gate_logit is None) == (gate == "none") for layer in gated_layers(model).values())
    state = model.state_dict()
    other = fresh()
    inject_adapters(other, AdapterConfig(method, gate, r=4))
    other.load_state_dict(state)
    assert torch.equal(logits(other), output)
    assert set(fresh().state_dict()) < set(state)
    model.train()
    assert all(layer.training and layer.update.training for layer in gated_layers(model).values())
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(IDS).logits
    assert 0 < (rounded.float() - output).abs().max() < 0.1 * output.abs().max()
    half = fresh().bfloat16()
    save_adapter(model, tmp_path)
    load_adapter(half, tmp_path)
    assert {p.dtype for p in adapter_state(half).values()} == {torch.float32}
    assert (logits(half).float() - output).abs().max() < 0.1 * output.abs().max()
    assert half.generate(IDS, max_new_tokens=3).shape[0] == 2
    model.to("meta")
    assert all(t.is_meta for layer in gated_layers(model).values() for t in (*layer.parameters(), *layer.buffers()))


# ------------------------------------------------------------------------------------------------- checkpointing

def checkpointed(model, reentrant):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def gradients(model):
    loss = model(IDS, labels=IDS).loss + gate_entropy(model)
    return torch.autograd.grad(loss, list(adapter_state(model).values()))


@pytest.mark.parametrize("gate", ["token", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_gradient(method, gate):
    expected = gradients(adapted(method, gate).train())
    model, storages = checkpointed(adapted(method, gate), False), []
    for a, b in zip(gradients(model), expected):
        assert torch.equal(a, b)
    for module in model.modules():  # and keeps no activations when the backward is over
        if isinstance(module, (nn.Linear, GatedLinear)):
            module.register_forward_hook(lambda m, i, o: storages.append(weakref.ref(o.untyped_storage())))
    gradients(model)
    assert len(storages) > 2 * len(gated_layers(model)) and not any(ref() is not None for ref in storages)


@pytest.mark.parametrize("gate", ["token", "static"])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_is_refused(gate):
    model = checkpointed(adapted("hira", gate), True)
    model.enable_input_require_grads()
    model(IDS)
    refused("has no gradient: .* use_reentrant=False", gate_entropy, model)
    with torch.no_grad():
        assert 0 < gate_entropy(model) < 0.7  # a number for a log
    logits(model.eval())
    assert 0 < gate_entropy(model) < 0.7
    for layer in gated_layers(model.train()).values():
        layer.gate.requires_grad_(False)  # they do not learn
    logits(model)
    assert 0 < gate_entropy(model) < 0.7


def test_the_copies_of_data_parallel_are_refused():
    refused("use DistributedDataParallel", gate_entropy, nn.DataParallel(adapted()))
    assert gate_entropy(nn.DataParallel(adapted(gate="none"))) == 0


# ------------------------------------------------------------------------------------------- other programs

def readme(language, word):
    """The text of the block in README's section that holds a word."""
    section = (ROOT / "README.md").read_text().partition("### In transformers")[2].partition("\n### ")[0]
    return next(text for text in re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL) if word in text)


def test_a_trainer_counts_the_entropy_term_once(tmp_path):
    """README's: gradients of one batch, and of two half as large that are accumulated, are those of the plain loop."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it: pip install accelerate")
    names = {}
    exec(readme("python", "compute_loss"), names)
    mask = torch.ones_like(IDS)
    mask[:, -3:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS.where(mask > 0, -100)}
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(2)]
    model = adapted().train()
    loss, parameters = model(**batch).loss, list(adapter_state(model).values())
    without = torch.autograd.grad(loss, parameters, retain_graph=True)
    expected = torch.autograd.grad(loss + 0.01 * gate_entropy(model, mask), parameters)
    for accumulated in (1, 2):
        again, found = adapted(), []
        settings = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=2 // accumulated, gradient_accumulation_steps=accumulated,
            max_steps=1, max_grad_norm=0, gradient_checkpointing=True, use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no")
        trainer = names["GatedTrainer"](again, settings, train_dataset=rows)
        optimizer = trainer.create_optimizer()
        optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in adapter_state(again).values()))
        trainer.train()
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            close(a, b, 1e-6)
        assert max((a - b).abs().max() for a, b in zip(found, without)) > 1e-5
        assert trainer.evaluate(rows)["eval_loss"] > 0


def test_the_harness_scores_a_gated_adapter_as_we_do(llama, tmp_path):
    """Log-likelihoods of choices, and whole rows that are written."""
    pytest.importorskip("lm_eval", reason="it is another program: pip install lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    ours = Transformer.from_pretrained(llama)
    inject_adapters(ours, AdapterConfig(r=4))
    save_adapter(moved(ours), tmp_path)
    load_adapter(model := transformers.AutoModelForCausalLM.from_pretrained(llama), tmp_path)
    harness, tokenizer = HFLM(pretrained=model, tokenizer=str(llama), batch_size=2), load_tokenizer(llama)
    pairs = [("then the hen", " in"), ("then the", " inner hen"), ("a", " b c")]
    scores = harness.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (prompt, answer), (score, _) in zip(pairs, scores):
        prompt, answer = tokenizer.encode(prompt), tokenizer.encode(answer)
        logp = logits(ours, torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].log_softmax(-1)
        assert score == pytest.approx(logp[range(len(answer)), answer].sum().item(), abs=1e-4)
    asked = Instance("generate_until", {}, (pairs[0][0], {"until": ["#"], "max_gen_toks": 6, "do_sample": False}), 0)
    written, = harness.generate_until([asked])
    assert written == tokenizer.decode(ours.generate([tokenizer.encode(pairs[0][0])], 6, stop=tokenizer.eos)[0])


ELSEWHERE = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from gatera import AdapterConfig, adapter_state, export_peft, gate_entropy, inject_adapters, load_adapter, save_adapter

def fresh():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                        num_attention_heads=2))

model, ids = fresh(), torch.arange(20).view(2, 10)
inject_adapters(model, AdapterConfig(r=4))
optimizer = torch.optim.AdamW(adapter_state(model).values(), lr=1e-2)
for _ in range(3):
    (model(ids, labels=ids).loss + gate_entropy(model)).backward()
    optimizer.step()
save_adapter(model, "adapter")
load_adapter(again := fresh(), "adapter")
assert torch.equal(again(ids).logits, model(ids).logits) and not torch.equal(fresh()(ids).logits, model(ids).logits)
inject_adapters(plain := fresh(), AdapterConfig("lora", "none", r=4))
export_peft(plain, "peft")
load_adapter(fresh(), "peft")
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("data", "gatera", "model")))
"""


def test_gatera_works_elsewhere_with_the_files_that_README_names(tmp_path):
    first, names = re.search(r"copy `(gatera.py)` and `data/\{(.*?)\}.py`", (ROOT / "README.md").read_text()).groups()
    (tmp_path / "data").mkdir()
    for file in (first, *(f"data/{name}.py" for name in names.split(","))):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "program.py").write_text(ELSEWHERE)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["data", *(f"data.{name}" for name in names.split(",")[1:]), "gatera"]  # and no more
