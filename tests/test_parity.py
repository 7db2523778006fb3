"""Against the reference implementations, in float64: transformers (the model), peft (the adapters and their files),
tokenizers (the ids). What is missing on a machine is skipped with a reason; requirements-dev.txt brings all three."""
import json
import time

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import eval as evaluation
from conftest import VOCAB, write_gguf, write_gpt2, write_llama
from data import peft_format
from data.download import hub_id
from data.files import UserError
from gatera import (METHODS, AdapterConfig, adapter_state, export_peft, gated_layers, inject_adapters, load_adapter,
                    merge_adapters, save_adapter)
from data.names import hugging_face_name
from data.weights import save_pretrained
from model import Transformer, TransformerConfig, inverse_frequencies, load_tokenizer

IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
PEFTS = [name for name, method in METHODS.items() if hasattr(method, "PEFT")]  # the methods that peft has too
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def need(name):
    return pytest.importorskip(name, reason=f"{name} is the oracle here: pip install -r requirements-dev.txt")


@pytest.fixture
def theirs(monkeypatch):
    """theirs(directory): transformers' model, in float64.

    Its LlamaRMSNorm computes in float32 even in a float64 model, an error of 1e-7 that would hide every other one.
    Here, and only here, it computes in the dtype it is given. (Rotary angles are float32 in both implementations.)"""
    transformers = need("transformers")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return lambda directory, dtype=torch.float64: load(directory, dtype=dtype).eval()


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------ the transformer

ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
MATRIX = {
    "gpt2": lambda d: write_gpt2(d),
    "llama-mha": lambda d: write_llama(d, kv_heads=4),
    "llama-gqa-tied": lambda d: write_llama(d, tied=True),
    "llama-mqa": lambda d: write_llama(d, kv_heads=1),
    "llama-head-dim": lambda d: write_llama(d, head_dim=12),
    "llama-biases": lambda d: write_llama(d, bias=True),
    "llama-3-rope": lambda d: write_llama(d, extra={"rope_theta": 500.0, "rope_scaling": ROPE}),
    "llama-3-rope-odd-factor": lambda d: write_llama(d, head_dim=16, extra={"rope_theta": 50.0, "rope_scaling": ROPE | {
        "factor": 2.5, "original_max_position_embeddings": 64}}),  # three of the eight frequencies are blended
    "gpt2-fp16": lambda d: write_gpt2(d, dtype=torch.float16),
    "gpt2-bf16-sharded": lambda d: write_gpt2(d, dtype=torch.bfloat16, shards=2),
    "llama-fp16-sharded": lambda d: write_llama(d, dtype=torch.float16, shards=3),
}


def to_ours(gradients, config):
    """{transformers' name: gradient} -> by our names: Conv1D transposed, c_attn split."""
    from data.weights import gpt2_weights, llama_weights
    rename = gpt2_weights if config.positions == "learned" else llama_weights
    return {name: tensor for key, gradient in gradients.items() for name, tensor in rename(key, gradient)}


@pytest.mark.parametrize("kind", MATRIX)
def test_logits_and_gradients_equal_transformers(kind, theirs, tmp_path):
    """200 tokens: 12 times the context in which the scaled rotary angles were made."""
    directory = MATRIX[kind](tmp_path / "model")
    reference, ours = theirs(directory), Transformer.from_pretrained(directory, dtype=torch.float64).requires_grad_(True)
    ids = torch.randint(0, VOCAB, (2, 200), generator=torch.Generator().manual_seed(1))
    losses = []
    for logits in (ours(ids), reference(ids).logits):
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
    close(ours(ids), reference(ids).logits)
    expected = to_ours({name: p.grad for name, p in reference.named_parameters()}, ours.config)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == expected.keys() and sum(name.endswith("q_proj.weight") for name in gradients) == 2
    for name, gradient in gradients.items():
        close(gradient, expected[name])
        assert name.endswith("bias") or gradient.abs().max() > 1e-6, name  # equal zeros would prove nothing


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [2.5, 5.0, 8.0, 10.0, 32.0])
def test_scaled_rotation_speeds_are_bit_equal_to_transformers(factor, head_dim):
    """Angles are float32: a speed off by one in its last bit is off by 1e-2 radians after 100,000 tokens."""
    transformers = need("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = ROPE | {"factor": factor, "original_max_position_embeddings": 8192}
    theirs = transformers.LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=131072,
                                      rope_parameters=rope | {"rope_theta": 500000.0})
    ours = TransformerConfig(vocab_size=8, n_layer=1, n_head=2, d_model=2 * head_dim, d_ff=8, max_len=131072,
                             rope_theta=500000.0, rope_scaling=rope)
    assert torch.equal(inverse_frequencies(ours), ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0])


# --------------------------------------------------------------------------------------- adapters and peft's

def random_adapter(directory, method, targets=ALL, seed=1, **options):
    """Our model with an ungated adapter away from its start."""
    model = Transformer.from_pretrained(directory, dtype=torch.float64)
    inject_adapters(model, AdapterConfig(method, "none", r=4, targets=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_state(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def peft_model(base, directory, trainable=False):
    return need("peft").PeftModel.from_pretrained(base, str(directory), is_trainable=trainable)


def peft_parameters(model):
    """{peft's file key: parameter}, as in `export_peft`."""
    return {name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): p
            for name, p in model.named_parameters() if ".default" in name}


def exported(model, directory):
    """{peft's file key: tensor} of our adapter."""
    export_peft(model, directory)
    return load_file(directory / "adapter_model.safetensors")


def test_names_of_layers_are_transformers_names(gpt2, llama, theirs):
    for directory in (gpt2, llama):
        model, modules = Transformer.from_pretrained(directory), dict(theirs(directory).named_modules())
        for name, module in model.named_modules():
            if not list(module.children()):
                assert hugging_face_name(name, model.config) in modules, name


ADAPTERS = {
    "lora": dict(method="lora"), "lora-alpha": dict(method="lora", alpha=3.0),
    "dora": dict(method="dora"), "dora-alpha": dict(method="dora", alpha=16.0), "hira": dict(method="hira"),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_equal_peft_for_20_steps(kind, family, request, theirs, tmp_path):
    """Outputs, gradients, and parameters after 20 steps of AdamW.

    GPT-2's c_attn has one adapter in peft: q, k and v in blocks. Ours have no off-diagonal blocks to train, so those
    of peft's B are held at zero; all else is peft's own."""
    directory = request.getfixturevalue(family)
    ours = random_adapter(directory, **ADAPTERS[kind])
    export_peft(ours, tmp_path / "start")
    reference = peft_model(theirs(directory), tmp_path / "start", trainable=True)
    close(ours(IDS), reference(IDS).logits)

    parameters = peft_parameters(reference)
    assert {key.removesuffix(".weight") for key in parameters} == {
        key.removesuffix(".weight") for key in load_file(tmp_path / "start" / "adapter_model.safetensors")}
    for name, p in parameters.items():
        if "c_attn" in name and "_B" in name:
            blocks = torch.block_diag(*[torch.ones(p.shape[0] // 3, p.shape[1] // 3, dtype=p.dtype)] * 3)
            p.register_hook(lambda gradient, blocks=blocks: gradient * blocks)
    optimizers = [torch.optim.AdamW(p.values(), lr=1e-2, weight_decay=0.1) for p in (adapter_state(ours), parameters)]
    generator = torch.Generator().manual_seed(2)
    for step in range(20):
        ids = torch.randint(0, VOCAB, (2, 16), generator=generator)
        for model, optimizer in zip((ours, reference), optimizers):
            logits = model(ids) if model is ours else model(ids).logits
            optimizer.zero_grad()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        if step == 0:
            compare(ours, parameters, tmp_path / "gradients", lambda p: p.grad)
        for optimizer in optimizers:
            optimizer.step()
    compare(ours, parameters, tmp_path / "end", lambda p: p.detach())
    close(ours(IDS), reference(IDS).logits)


def compare(ours, parameters, directory, read):
    """What `read` takes from every adapter parameter, ours put through the exporter into peft's shapes."""
    values = {name: p.detach().clone() for name, p in adapter_state(ours).items()}
    for p in adapter_state(ours).values():
        p.data = read(p).clone()
    mine = exported(ours, directory)
    for name, p in adapter_state(ours).items():
        p.data = values[name]
    for name, p in parameters.items():
        key = name if name in mine else f"{name}.weight"
        close(mine[key], read(p))
        assert read(p).abs().max() > 1e-5, name


@pytest.mark.parametrize("method", PEFTS)
def test_dropout_equals_peft_under_the_same_seed(method, llama, theirs, tmp_path):
    """Both draw one mask per adapted layer, in the order of the forward; on GPT-2 peft draws one for the fused c_attn
    where we draw three, so that only the distribution is the same."""
    ours = random_adapter(llama, method, dropout=0.3).train()
    export_peft(ours, tmp_path)
    reference = peft_model(theirs(llama), tmp_path, trainable=True).train()
    torch.manual_seed(5)
    mine = ours(IDS)
    torch.manual_seed(5)
    close(mine, reference(IDS).logits)
    assert (mine - ours.eval()(IDS)).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------- in and out

@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("k_proj", "o_proj", "down_proj"), ("up_proj", "head")],
                         ids="+".join)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", PEFTS)
def test_export_loads_in_peft_and_comes_back(method, family, targets, request, theirs, tmp_path):
    directory = request.getfixturevalue(family)
    if family == "gpt2" and "head" in targets:
        targets = ("up_proj",)  # a tied head: transformers ties the weight that peft wraps
    ours = random_adapter(directory, method, targets, alpha=3.0, dropout=0.1)
    export_peft(ours, tmp_path / "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(directory) and written["fan_in_fan_out"] == (family == "gpt2")
    close(ours(IDS), peft_model(theirs(directory), tmp_path / "peft")(IDS).logits)
    again = Transformer.from_pretrained(directory, dtype=torch.float64)
    config = load_adapter(again, tmp_path / "peft")
    close(again(IDS), ours(IDS), 1e-12)
    assert (config.method, config.gate, config.r, config.dropout) == (method, "none", 4, 0.1)
    assert config.scaling == pytest.approx(ours.adapter_config.scaling, rel=1e-12) or method == "hira"
    if not (method == "dora" and family == "gpt2"):  # there m of an untouched k is a parameter like any other
        assert set(config.targets) == set(targets)
        assert adapter_state(again).keys() == adapter_state(ours).keys()


TRAINED = {
    "lora": lambda peft, t: peft.LoraConfig(r=4, lora_alpha=16, target_modules=t, lora_dropout=0.1),
    "rslora": lambda peft, t: peft.LoraConfig(r=4, lora_alpha=16, target_modules=t, use_rslora=True),
    "dora": lambda peft, t: peft.LoraConfig(r=4, lora_alpha=8, target_modules=t, use_dora=True),
    "rsdora": lambda peft, t: peft.LoraConfig(r=4, lora_alpha=8, target_modules=t, use_dora=True, use_rslora=True),
    "hira": lambda peft, t: peft.HiraConfig(r=4, target_modules=t),
}


def trained_by_peft(base, settings, directory):
    """peft's model after three steps, saved to `directory` by peft."""
    model = need("peft").get_peft_model(base, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(directory)
    return model


@pytest.mark.parametrize("family, targets", [
    ("llama", ["q_proj", "v_proj"]), ("llama", "all-linear"), ("llama", r".*\.(up|down)_proj|.*\.q"), ("gpt2", ["c_attn"]),
    ("gpt2", ["c_attn", "c_fc", "c_proj"]), ("gpt2", ["mlp.c_proj"])], ids=str)
@pytest.mark.parametrize("kind", TRAINED)
def test_adapters_trained_and_saved_by_peft_load(kind, family, targets, request, theirs, tmp_path):
    """GPT-2's c_attn as peft trains it: one A for q, k and v."""
    directory, settings = request.getfixturevalue(family), TRAINED[kind](need("peft"), targets)
    settings.fan_in_fan_out = family == "gpt2"
    reference = trained_by_peft(theirs(directory), settings, tmp_path / "peft")
    ours = Transformer.from_pretrained(directory, dtype=torch.float64)
    base = ours(IDS)
    config = load_adapter(ours, tmp_path / "peft")
    close(ours(IDS), reference(IDS).logits)
    assert (ours(IDS) - base).abs().max() > 1e-3
    assert config.gate == "none" and config.r == 4
    save_adapter(ours, tmp_path / "ours")  # and on from here in our own format
    again = Transformer.from_pretrained(directory, dtype=torch.float64)
    load_adapter(again, tmp_path / "ours")
    close(again(IDS), ours(IDS), 0)


CHOICES = {  # which layers, in peft's words
    "excluded": dict(target_modules=["q_proj", "up_proj", "c_attn", "c_fc"], exclude_modules=["layers.0.self_attn.q_proj",
                                                                                             "h.0.attn.c_attn"]),
    "excluded-by-name": dict(target_modules="all-linear", exclude_modules=["v_proj", "c_fc"]),
    "excluded-by-pattern": dict(target_modules=r".*\.(q_proj|up_proj|c_attn|c_fc)", exclude_modules=r".*\.(layers|h)\.1\..*"),
    "layer": dict(target_modules=["q_proj", "down_proj", "c_attn", "mlp.c_proj"], layers_to_transform=0),
    "layers": dict(target_modules=["q_proj", "down_proj", "c_attn", "mlp.c_proj"], layers_to_transform=[1, 7]),
    "layers-by-pattern": dict(target_modules=["v_proj", "c_attn"], layers_to_transform=[0], layers_pattern="(?:layers|h)"),
    "layers-by-patterns": dict(target_modules=["v_proj", "c_attn"], layers_to_transform=[1], layers_pattern=["blocks", "layers", "h"]),
    "a-whole-name": dict(target_modules=["model.layers.0.mlp.up_proj", "transformer.h.0.mlp.c_fc", "k_proj", "c_attn"],
                         layers_to_transform=[1]),
    "no-layers": dict(target_modules=["q_proj", "c_attn"], layers_to_transform=[]),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", PEFTS)
@pytest.mark.parametrize("kind", CHOICES)
def test_the_layers_that_peft_adapts_are_adapted(kind, method, family, request, theirs, tmp_path):
    directory, (fields, _) = request.getfixturevalue(family), METHODS[method].PEFT
    settings = need("peft").PEFT_TYPE_TO_CONFIG_MAPPING[fields["peft_type"]](r=4, fan_in_fan_out=family == "gpt2", **CHOICES[kind])
    for name, value in fields.items():
        setattr(settings, name, value)
    reference = trained_by_peft(theirs(directory), settings, tmp_path / "peft")
    ours = Transformer.from_pretrained(directory, dtype=torch.float64)
    load_adapter(ours, tmp_path / "peft")
    assert {hugging_face_name(name, ours.config) for name in gated_layers(ours)} == {
        name.removeprefix("base_model.model.") for name, module in reference.named_modules() if hasattr(module, "base_layer")}
    close(ours(IDS), reference(IDS).logits)
    save_adapter(ours, tmp_path / "ours")  # the choice of layers comes back, from our files and from peft's
    export_peft(ours, tmp_path / "again")
    close(peft_model(theirs(directory), tmp_path / "again")(IDS).logits, ours(IDS))
    for again in ("ours", "again"):
        model = Transformer.from_pretrained(directory, dtype=torch.float64)
        load_adapter(model, tmp_path / again)
        close(model(IDS), ours(IDS), 1e-12)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_starts_that_leave_the_base_alone_are_taken(start, llama, theirs, tmp_path):
    base = theirs(llama).float()  # which mica's wants
    weights = {name: p.clone() for name, p in base.named_parameters()}
    settings = need("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    reference = trained_by_peft(base, settings, tmp_path / "peft")
    assert all(torch.equal(weights[name.replace(".base_layer", "").removeprefix("base_model.model.")], p)
               for name, p in reference.named_parameters() if "lora_" not in name)
    ours = Transformer.from_pretrained(llama)
    load_adapter(ours, tmp_path / "peft")
    close(ours(IDS), reference(IDS).logits, 1e-5)


EXTRAS = {  # what peft can do beside A and B: refused, by the name of its field
    "init_lora_weights 'pissa', which changes the base": dict(init_lora_weights="pissa"),
    "init_lora_weights 'pissa_niter_4', which changes the base": dict(init_lora_weights="pissa_niter_4"),
    "init_lora_weights 'olora', which changes the base": dict(init_lora_weights="olora"),
    "not supported: bias 'all'": dict(bias="all"),
    "not supported: bias 'lora_only'": dict(bias="lora_only"),
    "lora_bias True": dict(lora_bias=True),
    r"modules_to_save \['lm_head'\]": dict(modules_to_save=["lm_head"]),
    "rank_pattern {'v_proj': 2}": dict(rank_pattern={"v_proj": 2}),
    "alpha_pattern {'v_proj': 32}": dict(alpha_pattern={"v_proj": 32}),
    r"trainable_token_indices \[3, 4\]": dict(trainable_token_indices=[3, 4]),
    r"layer_replication \[\[0, 1\], \[0, 2\]\]": dict(layer_replication=[[0, 1], [0, 2]]),
    r"target_parameters \['mlp.up_proj.weight'\]": dict(target_parameters=["mlp.up_proj.weight"]),
    r"alora_invocation_tokens \[5\]": dict(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    "unexpected .*base_model.model.model.embed_tokens.lora_embedding_A": dict(target_modules=["q_proj", "embed_tokens"]),
}


@pytest.mark.parametrize("message", EXTRAS)
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_what_peft_can_do_beside_is_refused_by_name(message, llama, theirs, tmp_path):
    settings = need("peft").LoraConfig(**dict(r=4, target_modules=["q_proj", "v_proj"]) | EXTRAS[message])
    base = theirs(llama).float() if "changes the base" in message else theirs(llama)
    need("peft").get_peft_model(base, settings).save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(Transformer.from_pretrained(llama), tmp_path / "peft")
    assert "\n" not in str(caught.value) and str(tmp_path / "peft") in str(caught.value)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_shared_rank_that_three_divides_is_not_taken_for_blocks(steps, gpt2, theirs, tmp_path):
    peft = need("peft")
    reference = peft.get_peft_model(theirs(gpt2), peft.LoraConfig(r=6, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=1.0)
    for _ in range(steps):
        reference(IDS, labels=IDS).loss.backward()
        optimizer.step()
    reference.save_pretrained(tmp_path / "peft")
    ours = Transformer.from_pretrained(gpt2, dtype=torch.float64)
    assert load_adapter(ours, tmp_path / "peft").r == 6
    close(ours(IDS), reference(IDS).logits)


def test_all_linear_is_all_but_the_head(llama, theirs, tmp_path):
    export_peft(random_adapter(llama, "lora", (*ALL, "gate_proj")), tmp_path)
    change_config(tmp_path, target_modules="all-linear")  # peft writes the names that it found
    ours = Transformer.from_pretrained(llama, dtype=torch.float64)
    load_adapter(ours, tmp_path)
    close(ours(IDS), peft_model(theirs(llama), tmp_path)(IDS).logits)


def test_an_alpha_that_the_file_does_not_name_is_pefts_own(gpt2, theirs, tmp_path):
    export_peft(random_adapter(gpt2, "lora"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = Transformer.from_pretrained(gpt2, dtype=torch.float64)
    load_adapter(ours, tmp_path)
    close(ours(IDS), peft_model(theirs(gpt2), tmp_path)(IDS).logits)


@pytest.mark.parametrize("targets", [ALL, ("attn.q_proj", "blocks.1.mlp.up_proj", "head")], ids="+".join)
def test_adapters_work_in_a_model_of_transformers(targets, llama, theirs, tmp_path):
    """Trained in ours, loaded in theirs, and the other way round; peft's files too."""
    ours, model = random_adapter(llama, "hira", targets), theirs(llama)
    save_adapter(ours, tmp_path / "ours")
    load_adapter(model, tmp_path / "ours")
    close(model(IDS).logits, ours(IDS))
    assert len(gated_layers(model)) == len(gated_layers(ours))
    for p in adapter_state(model).values():
        p.data += 0.01
    assert all(name.startswith(("model.layers", "lm_head")) for name in adapter_state(model))
    save_adapter(model, tmp_path / "theirs")
    export_peft(model, tmp_path / "peft")
    for directory in ("theirs", "peft"):
        again = Transformer.from_pretrained(llama, dtype=torch.float64)
        load_adapter(again, tmp_path / directory)
        close(again(IDS), model(IDS).logits)
        load_adapter(base := theirs(llama), tmp_path / directory)
        close(base(IDS).logits, model(IDS).logits)
    close(peft_model(theirs(llama), tmp_path / "peft")(IDS).logits, model(IDS).logits)


def test_an_exported_adapter_names_its_base_as_the_hub_does(llama, tmp_path):
    model = random_adapter(llama, "lora")
    for name, base in {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "some/model": "some/model",
                       "llama-3.2-1b": "meta-llama/Llama-3.2-1B", str(llama): str(llama)}.items():
        model.hub_id = hub_id(name)
        export_peft(model, tmp_path / "peft")
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_gated_and_missing_adapters_are_not_exported(llama, tmp_path):
    for gate in ("token", "static"):
        model = Transformer.from_pretrained(llama)
        inject_adapters(model, AdapterConfig("hira", gate, r=4))
        with pytest.raises(UserError, match=f"a {gate} gate cannot be exported: peft .* drop it silently"):
            export_peft(model, tmp_path / "peft")
        with pytest.raises(UserError, match="merge them first"):
            save_pretrained(model, tmp_path / "merged", str(llama))
    with pytest.raises(UserError, match="no adapter to export"):
        export_peft(Transformer.from_pretrained(llama), tmp_path / "peft")
    assert not (tmp_path / "peft").exists() and not (tmp_path / "merged").exists()


def change_config(directory, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(directory, change):
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    r"adapter_config.json: not supported: bias 'all'; modules_to_save \['lm_head'\]":
        lambda d: change_config(d, modules_to_save=["lm_head"], bias="all"),
    r"unexpected .*layers.1.self_attn.q_proj": lambda d: change_config(d, layers_to_transform=[0]),
    "not supported: layers_to_transform 'two'": lambda d: change_config(d, layers_to_transform="two"),
    "layers_to_transform beside a target_modules that is a pattern":
        lambda d: change_config(d, layers_to_transform=[0], target_modules=".*"),
    r"'.q_proj' is not a pattern: missing \)": lambda d: change_config(d, target_modules="(q_proj"),
    "not supported: exclude_modules {'q_proj': 1}": lambda d: change_config(d, exclude_modules={"q_proj": 1}),
    r"unexpected .*layers.0.self_attn.q_proj": lambda d: change_config(d, exclude_modules=".*q_proj"),
    "not supported: lora_alpha '16'": lambda d: change_config(d, lora_alpha="16"),
    "init_lora_weights 'loftq', which changes the base": lambda d: change_config(d, init_lora_weights="loftq"),
    "init_lora_weights 'lora_ga', which changes the base": lambda d: change_config(d, init_lora_weights="lora_ga"),
    "use_qalora True": lambda d: change_config(d, use_qalora=True),
    "lora_bias True": lambda d: change_config(d, lora_bias=True),
    "trainable_token_indices": lambda d: change_config(d, trainable_token_indices=[3]),
    "invented_in_2030 1; and_0_is_a_value 0": lambda d: change_config(d, invented_in_2030=1, and_0_is_a_value=0),
    r"init_lora_weights 'pissa', which changes the base": lambda d: change_config(d, init_lora_weights="pissa"),
    "peft_type IA3, only LORA and HIRA": lambda d: change_config(d, peft_type="IA3"),
    r"target_modules \['c_attn'\] are no layers of this base model; it has down_proj":
        lambda d: change_config(d, target_modules=["c_attn"]),
    r"q_proj has A \(4, 32\) and B \(32, 4\), expected \(r, in\) and \(out, r\) with r = 8": lambda d: change_config(d, r=8),
    "not supported: alpha_pattern {'v_proj': 16}": lambda d: change_config(d, alpha_pattern={"v_proj": 16}),
    "not supported: r 'four'": lambda d: change_config(d, r="four"),
    "alpha -1.0: expected a positive number": lambda d: change_config(d, lora_alpha=-1.0),
    "adapter_model.safetensors: missing base_model.model.model.layers.0.self_attn.q_proj.lora_A":
        lambda d: change_tensors(d, lambda t: t.pop(Q)),
    "missing base_model.model.model.layers.0.self_attn.k_proj.lora_A":
        lambda d: change_config(d, target_modules=["q_proj", "k_proj", "v_proj"]),
    "unexpected base_model.model.model.embed_tokens.lora_embedding_A":
        lambda d: change_tensors(d, lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(1)})),
    r"safetensors: does not fit this base model: blocks.0.attn.q_proj.update.A is \(4, 40\), expected \(4, 32\)":
        lambda d: change_tensors(d, lambda t: t.update({Q: torch.ones(4, 40)})),
    "adapter_model.safetensors: missing": lambda d: save_file({}, d / "adapter_model.safetensors"),
    "adapter_model.safetensors: broken or truncated": lambda d: (d / "adapter_model.safetensors").write_bytes(
        (d / "adapter_model.safetensors").read_bytes()[:-9]),
    "adapter_model.safetensors: not found": lambda d: (d / "adapter_model.safetensors").unlink(),
    "adapter_config.json: not valid JSON": lambda d: (d / "adapter_config.json").write_text("[1, 2"),
    "adapter_config.json: not an adapter's configuration; no peft_type": lambda d: (d / "adapter_config.json").write_text("{}"),
    "or one that peft wrote": lambda d: (d / "adapter_config.json").unlink(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_adapters_of_peft_that_cannot_be_had_exactly_are_refused_by_name(message, llama, tmp_path):
    export_peft(random_adapter(llama, "lora", ("q_proj", "v_proj")), tmp_path / "peft")
    REFUSED[message](tmp_path / "peft")
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(Transformer.from_pretrained(llama), tmp_path / "peft")
    assert "\n" not in str(caught.value) and str(tmp_path / "peft") in str(caught.value)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_pattern_that_would_try_for_ever_is_given_up(field, llama, tmp_path, monkeypatch):
    """This one has two or three ways to match each character of a name, and tries all combinations."""
    export_peft(random_adapter(llama, "lora", ("q_proj",)), tmp_path / "peft")
    change_config(tmp_path / "peft", **{field: r"(?:\w|[a-z.]|.)+[x-z]"}, **{"layers_to_transform": [0]} if field == "layers_pattern" else {})
    monkeypatch.setattr(peft_format, "SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(UserError, match="adapter_config.json: the pattern .* takes too long"):
        load_adapter(Transformer.from_pretrained(llama), tmp_path / "peft")
    assert time.monotonic() - started < 10  # of the centuries


@pytest.mark.parametrize("pattern, message", [
    ("((a{1000}){1000}){1000}", "its counts are too high"), ("((a{1000,}){,1000}){1,9}", "its counts are too high"),
    ("a" * 1001, "is too long"), ("(" * 900, "is not a pattern|RecursionError"), ("(?R)|a", "is not a pattern"),
])
def test_a_pattern_that_would_fill_the_memory_is_refused(pattern, message, llama, tmp_path):
    export_peft(random_adapter(llama, "lora", ("q_proj",)), tmp_path / "peft")
    change_config(tmp_path / "peft", target_modules=pattern)
    with pytest.raises(UserError, match=message):
        load_adapter(Transformer.from_pretrained(llama), tmp_path / "peft")


def test_an_adapter_for_another_base_is_refused(llama, gpt2, tmp_path):
    other = write_llama(tmp_path / "other", d=48, layers=3)
    for method in PEFTS:
        model = random_adapter(other, method)
        save_adapter(model, tmp_path / "ours")
        export_peft(model, tmp_path / "peft")
        for base, ours, theirs in ((llama, "unexpected blocks.2|is .4, 48.", "unexpected .*layers.2"),
                                   (gpt2, "unexpected blocks.2|is .4, 48.", "are no layers of this base model")):
            for directory, message in ((tmp_path / "ours", ours), (tmp_path / "peft", theirs)):
                with pytest.raises(UserError, match=message) as caught:
                    load_adapter(Transformer.from_pretrained(base), directory)
                assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- merging

@pytest.mark.filterwarnings("ignore:merging into")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["lora", "dora", "hira"])  # whose weights are written out below
def test_a_merged_weight_is_computed_in_float32_and_rounded_once(method, dtype, llama):
    model = Transformer.from_pretrained(llama, dtype=dtype)
    inject_adapters(model, AdapterConfig(method, "none", r=4))
    exact = {}
    for name, layer in gated_layers(model).items():
        layer.update.B.data += 0.02 * torch.randn_like(layer.update.B)
        W0, BA = layer.weight.double(), layer.update.B.double() @ layer.update.A.double()
        V = W0 * (1 + BA) if method == "hira" else W0 + layer.update.scaling * BA
        exact[name] = V * (layer.update.m.double() / V.norm(dim=1))[:, None] if method == "dora" else V
    merge_adapters(model)
    for name, W in exact.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == dtype and not merged.requires_grad
        half_a_step = torch.finfo(dtype).eps / 2 * W.abs() + (1e-6 if dtype == torch.float32 else 1e-7)
        assert ((merged.double() - W).abs() <= half_a_step).all(), name


EXPORTS = {
    "gpt2": lambda d: write_gpt2(d), "llama": lambda d: write_llama(d), "llama-tied": lambda d: write_llama(d, tied=True),
    "llama-biases": lambda d: write_llama(d, bias=True, head_dim=12),
    "llama-3-rope": lambda d: write_llama(d, extra={"rope_theta": 500.0, "rope_scaling": ROPE}),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_merged_model_in_hugging_face_layout(kind, theirs, tmp_path):
    base = EXPORTS[kind](tmp_path / "base")
    model = random_adapter(base, "hira")
    before = model(IDS)
    merge_adapters(model)
    save_pretrained(model, tmp_path / "merged", str(base))
    close(theirs(tmp_path / "merged", "auto")(IDS).logits, before)  # "auto": config.json tells the dtype
    close(Transformer.from_pretrained(tmp_path / "merged", dtype=torch.float64)(IDS), before)
    # what went in comes out: the same names, shapes and values as the base has
    reference, written = theirs(base).state_dict(), theirs(tmp_path / "merged").state_dict()
    assert {k: v.shape for k, v in reference.items()} == {k: v.shape for k, v in written.items()}
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    text = "then the inner 12 hens"
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "merged" / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "merged").encode(text) == tokenizer.encode(text).ids == load_tokenizer(base).encode(text)


def test_an_adapted_tied_head_is_written_untied(theirs, tmp_path):
    base = write_llama(tmp_path / "base", tied=True)
    model = random_adapter(base, "lora", ("head",))
    before = model(IDS)
    merge_adapters(model)
    save_pretrained(model, tmp_path / "merged", base)
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    close(theirs(tmp_path / "merged")(IDS).logits, before)
    close(Transformer.from_pretrained(tmp_path / "merged", dtype=torch.float64)(IDS), before)


@pytest.mark.parametrize("tied", [False, True])
def test_the_config_of_a_written_model_is_that_of_its_weights(tied, theirs, tmp_path):
    """Their dtype, whatever the source's was, and whether the head is the embedding."""
    base = write_llama(tmp_path / "base", tied=tied, extra={"dtype": "bfloat16", "torch_dtype": "bfloat16"})
    for source in (base, write_gguf(tmp_path / "tiny.gguf", base)):
        model = Transformer.from_pretrained(source)
        save_pretrained(model, tmp_path / "written", source)
        written = theirs(tmp_path / "written", dtype="auto")
        assert written.dtype == torch.float32 and written.config.tie_word_embeddings == tied
        close(written(IDS).logits, model(IDS), 1e-5)


def test_a_gguf_base_is_written_with_its_tokenizer(llama, theirs, tmp_path):
    from test_tokenizer import TEXTS
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    model = Transformer.from_pretrained(file, dtype=torch.float64)
    save_pretrained(model, tmp_path / "merged", file)
    close(theirs(tmp_path / "merged")(IDS).logits, model(IDS))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "merged" / "tokenizer.json"))
    fast = need("transformers").AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert fast.eos_token_id == load_tokenizer(tmp_path / "merged").eos == load_tokenizer(file).eos
    for text in TEXTS:
        if "<|" not in text:
            ids = load_tokenizer(file).encode(text)
            assert load_tokenizer(tmp_path / "merged").encode(text) == tokenizer.encode(text).ids == fast.encode(text) == ids
            assert tokenizer.decode(ids) == text


def test_the_base_is_never_overwritten(llama, tmp_path):
    model, before = Transformer.from_pretrained(llama), (llama / "config.json").read_bytes()
    for place in (llama, llama / ".." / "llama", llama / "config.json"):
        with pytest.raises(UserError, match="cannot write a model here"):
            save_pretrained(model, place, str(llama))
    assert (llama / "config.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_eval_exports_a_run(kind, llama, theirs, tmp_path):
    model = random_adapter(llama, "dora")
    save_adapter(model, tmp_path / "run" / "best")
    evaluation.main(["--run", str(tmp_path / "run"), "--init", str(llama), "--export", kind, str(tmp_path / "out")])
    if kind == "hf":
        close(theirs(tmp_path / "out")(IDS).logits, model(IDS), 1e-5)  # merged in float32, the default on a CPU
    else:
        close(peft_model(theirs(llama), tmp_path / "out")(IDS).logits, model(IDS), 1e-5)
    with pytest.raises(UserError, match="--export zip: expected hf or peft"):
        evaluation.main(["--run", str(tmp_path / "run"), "--init", str(llama), "--export", "zip", "x"])
    inject_adapters(gated := Transformer.from_pretrained(llama), AdapterConfig(r=4))
    save_adapter(gated, tmp_path / "gated")
    with pytest.raises(UserError, match="gate.* cannot be .*README: 'In transformers'"):
        evaluation.main(["--run", str(tmp_path / "gated"), "--init", str(llama), "--export", kind, str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------- files that cannot be read

def change_json(file, change):
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


CONFIGS = {
    "architecture 'mistral' is not supported here: .* call gatera.inject_adapters on it":
        lambda raw: raw.update(model_type="mistral", sliding_window=4096),
    "architecture 'qwen2' is not supported here": lambda raw: raw.update(model_type="qwen2"),
    "architecture 'None' is not supported here": lambda raw: raw.pop("model_type"),
    "config.json: n_head is 0, expected a positive whole number": lambda raw: raw.update(num_attention_heads=0),
    "config.json: n_layer is 'two', expected a positive": lambda raw: raw.update(num_hidden_layers="two"),
    "config.json: field 'hidden_size' is missing": lambda raw: raw.pop("hidden_size"),
    "rope scaling 'dynamic' is not supported": lambda raw: raw.update(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "the weights do not fit the config: unexpected blocks.1": lambda raw: raw.update(num_hidden_layers=1),
    "weights do not fit the config: missing blocks.0.attn.k_proj.bias": lambda raw: raw.update(attention_bias=True),
}


@pytest.mark.parametrize("message", CONFIGS)
def test_other_architectures_are_refused_by_name(message, llama):
    change_json(llama / "config.json", CONFIGS[message])
    with pytest.raises(UserError, match=message) as caught:
        Transformer.from_pretrained(llama)
    assert "\n" not in str(caught.value) and str(llama) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", "{", "\xff"])
def test_json_files_that_hold_something_else_are_named(content, llama):
    for name, load in (("tokenizer.json", load_tokenizer), ("config.json", Transformer.from_pretrained)):
        (llama / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=name):
            load(llama)


def test_every_truncation_of_a_weights_file_is_refused(llama, tmp_path):
    gguf = write_gguf(tmp_path / "tiny.gguf", llama)
    for file, model in ((llama / "model.safetensors", llama), (gguf, gguf)):
        whole = file.read_bytes()
        for part in range(0, len(whole), len(whole) // 12):
            file.write_bytes(whole[:part])
            with pytest.raises(UserError, match=file.name):
                Transformer.from_pretrained(model)
