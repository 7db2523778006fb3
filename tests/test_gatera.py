"""The method against its own equations: every number here is computed a second, plainer way.

What holds for every update and gate is tested for all of METHODS and GATES, so that a new one is tested as soon as it is
there."""
import json
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data.commonsense import Question, pack
from data.files import UserError
from gatera import (GATES, METHODS, AdapterConfig, GatedHadamard, GatedLinear, adapter_state, adapters_off,
                    cached_products, export_peft, gate_context, gate_entropy, gate_parameters, gate_values, gated_layers,
                    inject_adapters, load_adapter, merge_adapters, parameter, save_adapter, times)
from model import Transformer, TransformerConfig

EVERY = [(method, gate) for method in METHODS for gate in GATES]
every = pytest.mark.parametrize("method, gate", EVERY, ids=["-".join(pair) for pair in EVERY])
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny(family="llama", dtype=torch.float64):
    torch.manual_seed(0)
    gpt2 = dict(norm="layernorm", positions="learned", mlp="gelu", attention_bias=True, mlp_bias=True, tied_head=True)
    config = TransformerConfig(vocab_size=50, n_layer=2, n_head=4, d_model=16, d_ff=24, max_len=64,
                               **(gpt2 if family == "gpt2" else dict(n_kv_head=2)))
    return Transformer(config).to(dtype)


def trainable(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def adapted(method, gate, family="llama", dtype=torch.float64, trained=True, **options):
    model = tiny(family, dtype)
    inject_adapters(model, AdapterConfig(method, gate, r=4, **options))
    if trained:  # away from the start, where Delta is 0
        generator = torch.Generator().manual_seed(1)
        for name, p in adapter_state(model).items():
            p.data += 0.2 * torch.randn(p.shape, generator=generator).to(dtype)
    return model


def set_gates(model, logit):
    """Every gate to sigmoid(logit), whatever the token; gradients flow as before."""
    for layer in gated_layers(model).values():
        if layer.gate is not None:
            layer.gate._forward_hooks.clear()
            layer.gate.register_forward_hook(lambda gate, inputs, z: z - z.detach() + logit)


# ------------------------------------------------------------------------------------------- identities

@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_a_fresh_adapter_leaves_the_logits_bit_identical(method, gate, dtype, family):
    base = tiny(family, dtype)(IDS)
    assert torch.equal(adapted(method, gate, family, dtype, trained=False)(IDS), base)


@every
def test_a_closed_gate_is_the_base_exactly(method, gate):
    if gate == "none":
        pytest.skip("no gate to close")
    model = adapted(method, gate)
    set_gates(model, -1e4)
    assert torch.equal(model(IDS), tiny()(IDS))


@every
def test_an_open_gate_is_the_published_method_exactly(method, gate):
    if gate == "none":
        pytest.skip("no gate to open")
    model, published = adapted(method, gate), adapted(method, "none")
    state = adapter_state(model)
    for name, p in adapter_state(published).items():
        p.data.copy_(state[name])
    set_gates(model, 1e4)
    assert torch.equal(model(IDS), published(IDS))


# ------------------------------------------------------------------- outputs and gradients, the plain way

def dora(x, W0, A, B, s, m):
    V = W0 + s * B @ A
    return x @ (m / V.norm(dim=1).detach() * V.T) - x @ W0.T


DELTAS = {"lora": lambda x, W0, A, B, s: s * x @ (B @ A).T, "dora": dora, "hira": lambda x, W0, A, B, s: x @ (W0 * (B @ A)).T}
OPENINGS = {"none": lambda x: 1.0, "static": lambda x, b_g: torch.sigmoid(b_g),
            "token": lambda x, w_g, b_g: torch.sigmoid((x * w_g).sum(-1, keepdim=True) + b_g)}


def plain(layer, x, method, gate):
    """y_t = W0 x_t + b + g(x_t) * Delta(x_t), with dense matrices and autograd alone."""
    g = OPENINGS[gate](x, **dict(layer.gate.named_parameters() if layer.gate is not None else []))
    delta = DELTAS[method](x, layer.weight, s=layer.update.scaling, **dict(layer.update.named_parameters()))
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias) + g * delta


def a_layer(method, gate, bias=True, **options):
    torch.manual_seed(3)
    layer = GatedLinear(nn.Linear(6, 10, bias=bias).double().requires_grad_(False), AdapterConfig(method, gate, r=3, **options))
    for p in trainable(layer).values():
        p.data += torch.randn_like(p)
    return layer, torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method, gate", [(method, gate) for method in DELTAS for gate in OPENINGS])
def test_outputs_and_gradients_equal_the_plain_formula(method, gate, bias):
    layer, x = a_layer(method, gate, bias)
    weight, inputs = torch.randn(2, 5, 10, dtype=torch.float64), [x, *trainable(layer).values()]
    ours, theirs = layer(x), plain(layer, x, method, gate)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), inputs), torch.autograd.grad((theirs * weight).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@every
def test_a_gate_scales_the_update_and_its_gradient(method, gate):
    """y = W0 x + b + g * Delta(x), where Delta is what the ungated layer adds, in outputs and by autograd."""
    layer, x = a_layer(method, gate)
    ungated = GatedLinear(nn.Linear(6, 10).double(), AdapterConfig(method, "none", r=3))
    ungated.load_state_dict(layer.state_dict(), strict=False)
    ungated.update = layer.update
    base, weight = F.linear(x, layer.weight, layer.bias), torch.randn(2, 5, 10, dtype=torch.float64)
    g = 1.0 if layer.gate is None else torch.sigmoid(layer.gate(x.flatten(0, 1))).view(2, 5, 1)
    inputs = [x, *trainable(layer).values()]
    ours, theirs = layer(x), base + g * (ungated(x) - base)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), inputs), torch.autograd.grad((theirs * weight).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@every
def test_gradients_are_those_of_the_outputs(method, gate, monkeypatch):
    """By finite differences. DoRA's norm is a constant for the gradient; so it is held here."""
    layer, x = a_layer(method, gate)
    if hasattr(layer.update, "row_norm"):
        norm = layer.update.row_norm(layer.weight)
        monkeypatch.setattr(layer.update, "row_norm", lambda W0: norm)
    names, values = zip(*trainable(layer).items())
    function = lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values)), x)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *values))


def test_the_hand_written_backward_passes_gradcheck():
    torch.manual_seed(0)
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, A, B, g, W0 = leaf(5, 7), leaf(3, 7), leaf(6, 3), leaf(5, 1), torch.randn(6, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(GatedHadamard.apply, (x, W0, A, B, g))
    assert torch.autograd.gradcheck(GatedHadamard.apply, (x, W0, A, B, None))


def test_hira_keeps_no_dense_product_for_the_backward():
    layer = GatedLinear(nn.Linear(64, 96, bias=False).requires_grad_(False), AdapterConfig("hira", "token", r=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(1, 3, 64))
    assert [t for t in kept if t.shape in ((96, 64), (64, 96)) and t.data_ptr() != layer.weight.data_ptr()] == []


@pytest.mark.parametrize("alpha, scaling", [(None, 2.0), (3.0, 0.75)])
def test_scaling(alpha, scaling):
    assert AdapterConfig("lora", r=4, alpha=alpha).scaling == scaling


@pytest.mark.parametrize("method", METHODS)
def test_dropout_works_on_the_input_of_delta_and_only_in_training(method):
    model, without = adapted(method, "token", dropout=0.5), adapted(method, "token")
    for p, q in zip(adapter_state(without).values(), adapter_state(model).values()):
        p.data.copy_(q)
    assert torch.equal(model.eval()(IDS), without(IDS))
    gates = gate_values(model)["blocks.0.attn.q_proj"]
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    assert torch.equal(gate_values(model)["blocks.0.attn.q_proj"], gates)  # the gate reads the input whole
    set_gates(model, -1e4)  # the base's own path has no dropout
    assert torch.equal(model(IDS), tiny()(IDS))


# -------------------------------------------------------------------------------------------- entropy

def test_entropy_equals_its_definition_and_survives_saturation():
    model = adapted("hira", "token")
    model(IDS)
    g = torch.stack(list(gate_values(model).values()))                                   # (gates, B, T)
    definition = -(g * g.log() + (1 - g) * (1 - g).log())
    torch.testing.assert_close(gate_entropy(model), definition.mean(), rtol=0, atol=1e-12)
    mask = torch.rand(IDS.shape) < 0.5
    torch.testing.assert_close(gate_entropy(model, mask), definition[:, mask].mean(), rtol=0, atol=1e-12)
    for logit in (1e4, -1e4):
        set_gates(model, logit)
        model(IDS)
        entropy = gate_entropy(model)
        entropy.backward()
        assert entropy == 0
    assert all(torch.isfinite(layer.gate.b_g.grad).all() for layer in gated_layers(model).values())
    ungated = adapted("lora", "none")
    ungated(IDS)
    assert gate_entropy(ungated) == 0 and gate_values(ungated) == {}


@every
def test_gates_start_where_the_bias_says(method, gate):
    model = adapted(method, gate, trained=False, gate_bias=1.5)
    model(IDS)
    values = gate_values(model)
    assert list(values) == ([] if gate == "none" else list(gated_layers(model)))
    for g in values.values():
        torch.testing.assert_close(g, torch.sigmoid(torch.full(IDS.shape, 1.5, dtype=g.dtype)), rtol=0, atol=0)


def test_the_entropy_term_pushes_a_gate_to_the_side_it_is_on():
    for logit, sign in ((0.5, -1), (-0.5, 1)):
        model = adapted("hira", "static")
        set_gates(model, logit)
        model(IDS)
        gate_entropy(model).backward()
        assert all(torch.sign(layer.gate.b_g.grad) == sign for layer in gated_layers(model).values())


# -------------------------------------------------------------------------------------------- the theorem

BOUNDS = {"hira": lambda layer: layer.weight.abs().max(), "lora": lambda layer: layer.update.scaling,
          "dora": lambda layer: layer.update.scaling * (layer.update.m / layer.update.row_norm(layer.weight)).abs().max()}


@every
def test_theorem_soft_gradient_masking(method, gate):
    """GateRA, soft gradient masking, token by token: the gradient of the update is g times that of the ungated method,
    and the norm of dL/d(BA) at most g c ||dL/dy|| ||x|| with c = max|W0| for HiRA, s for LoRA, s max(m/n) for DoRA. The
    gate's own gradient carries g (1 - g). `-k theorem -s` prints the table."""
    if gate == "none":
        pytest.skip("no gate to mask gradients")
    torch.manual_seed(4)
    linear = nn.Linear(8, 12, bias=False).double().requires_grad_(False)
    gated = GatedLinear(linear, AdapterConfig(method, gate, r=8))
    ungated = GatedLinear(linear, AdapterConfig(method, "none", r=8))
    for name, p in trainable(gated).items():
        p.data = torch.eye(8).double() if name == "update.A" else p.data + 0.5 * torch.randn_like(p)  # A = I: dL/dB is dL/d(BA)
    ungated.update = gated.update
    update = list(gated.update.parameters())
    print(f"\n{method}, {gate} gate:  token      g    ||dL/dBA||   bound")
    for token in range(4):
        x, dy = 2 * torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 12, dtype=torch.float64)
        y = gated(x)
        g = torch.sigmoid(gated.gate_logit)
        masked = torch.autograd.grad((y * dy).sum(), update, retain_graph=True)
        whole = torch.autograd.grad((ungated(x) * dy).sum(), update)
        for a, b in zip(masked, whole):
            torch.testing.assert_close(a, g.view(()) * b, rtol=0, atol=1e-12)
        if hasattr(gated.gate, "b_g"):
            d_gate, = torch.autograd.grad((y * dy).sum(), [gated.gate.b_g])
            delta = ungated(x) - F.linear(x, linear.weight)
            torch.testing.assert_close(d_gate, (g * (1 - g) * (delta * dy).sum()).view(1), rtol=0, atol=1e-12)
        if method in BOUNDS:
            dBA = masked[[name for name, _ in gated.update.named_parameters()].index("B")].norm()
            bound = (g * BOUNDS[method](gated) * dy.norm() * x.norm()).item()
            print(f"{token:>{len(method) + len(gate) + 17}}  {g.item():.3f}  {dBA:11.4f}  {bound:8.4f}")
            assert 0 < dBA <= bound * (1 + 1e-12)  # LoRA reaches its bound: there the gradient has rank one


# ------------------------------------------------------------------------------------ injection and files

@every
def test_injection_freezes_the_base_and_keeps_its_names(method, gate):
    model, before = tiny(), set(tiny().state_dict())
    names = inject_adapters(model, AdapterConfig(method, gate, r=4))
    assert len(names) == 2 * 5 and all(isinstance(model.get_submodule(name), GatedLinear) for name in names)
    assert set(model.state_dict()) == before | set(adapter_state(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_state(model))
    gates = {f"{name}.gate.{leaf}" for name, layer in gated_layers(model).items() if layer.gate is not None
             for leaf, _ in layer.gate.named_parameters()}
    assert sum(p.numel() for p in gate_parameters(model)) == sum(adapter_state(model)[name].numel() for name in gates)
    own = {"lora": lambda rows: 0, "dora": lambda rows: rows, "hira": lambda rows: 0}
    if method in own and gate in OPENINGS:  # beside A and B
        expected = sum(4 * (rows + columns) + own[method](rows) + {"none": 0, "static": 1, "token": columns + 1}[gate]
                       for rows, columns in (model.get_submodule(name).weight.shape for name in names))
        assert sum(p.numel() for p in adapter_state(model).values()) == expected


def test_targets_are_ends_of_names():
    assert inject_adapters(tiny(), AdapterConfig(r=4, targets=("attn.q_proj", "0.mlp.up_proj", "blocks.1.attn.v_proj"))) == [
        "blocks.0.attn.q_proj", "blocks.0.mlp.up_proj", "blocks.1.attn.q_proj", "blocks.1.attn.v_proj"]
    with pytest.raises(UserError, match="no layer is named proj"):  # whole words only
        inject_adapters(tiny(), AdapterConfig(r=4, targets=("proj",)))


@pytest.mark.parametrize("name, gate, share", [
    ("llama-2-7b", "none", 0.8256), ("llama-2-7b", "token", 0.8384),
    ("llama-3-8b", "none", 0.7002), ("llama-3-8b", "token", 0.7123)])
def test_trainable_shares_of_the_paper(name, gate, share):
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_name(name))
    base = sum(p.numel() for p in model.parameters())
    inject_adapters(model, AdapterConfig("hira", gate, r=32))
    trainable = sum(p.numel() for p in adapter_state(model).values())
    assert round(100 * trainable / (base + trainable), 4) == share


def test_the_same_seed_starts_every_method_with_the_same_A():
    starts = []
    for method, gate in EVERY:
        model = tiny()
        torch.manual_seed(7)
        inject_adapters(model, AdapterConfig(method, gate, r=4))
        starts.append(torch.cat([layer.update.A.flatten() for layer in gated_layers(model).values()]))
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_A_starts_as_pefts_does():
    """Uniform up to 1 / sqrt(in)."""
    torch.manual_seed(0)
    A = GatedLinear(nn.Linear(4096, 32), AdapterConfig("lora", "none", r=32)).update.A.detach()
    assert 0.999 < 64 * A.abs().max() <= 1 and 64 * A.std() == pytest.approx(3**-0.5, rel=0.01)
    assert abs(64 * A.mean()) < 0.01


@pytest.mark.parametrize("options, message", [
    (dict(targets=("q_proj", "blocks.7.mlp.up_proj")), "no layer is named blocks.7.mlp.up_proj; this model has"),
    (dict(targets=("c_attn",)), "no layer is named c_attn; this model has down_proj, gate_proj, head, k_proj"),
    (dict(r=9), "r 9 is larger than the smallest adapted matrix side, 8"),
    (dict(r=0), "r 0: expected a positive whole number"),
    (dict(method="ia3", gate="soft"), "method 'ia3': expected one of lora, dora, hira; gate 'soft': expected one of"),
    (dict(dropout=1.0), "dropout 1.0"), (dict(alpha=-1.0), "alpha -1.0"), (dict(targets=()), "at least one layer name")])
def test_impossible_adapters_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        inject_adapters(tiny(), AdapterConfig(**options))
    assert message in str(caught.value)


def test_a_target_is_a_whole_name():
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    assert inject_adapters(model, AdapterConfig(r=2, targets=("proj",))) == ["proj"]


def test_injecting_twice_is_refused():
    with pytest.raises(UserError, match="already has adapters"):
        inject_adapters(adapted("lora", "none"), AdapterConfig(r=4))


@every
def test_saving_and_loading_gives_bit_equal_logits_and_stores_the_adapter_alone(method, gate, tmp_path):
    model = adapted(method, gate, dtype=torch.float32)
    save_adapter(model, tmp_path)
    assert set(load_file(tmp_path / "adapter.safetensors")) == set(adapter_state(model))
    again = tiny(dtype=torch.float32)
    assert load_adapter(again, tmp_path) == model.adapter_config
    assert torch.equal(again(IDS), model(IDS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_a_compiled_models_adapter_has_the_same_names(tmp_path):
    model = adapted("lora", "token", dtype=torch.float32)
    save_adapter(torch.compile(model), tmp_path)
    load_adapter(again := tiny(dtype=torch.float32), tmp_path)
    assert torch.equal(again(IDS), model(IDS))


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


BROKEN = {
    "missing blocks.0.attn.k_proj.update.B": lambda d: edit(d / "adapter.safetensors", lambda t: t.pop("blocks.0.attn.k_proj.update.B")),
    "unexpected elsewhere.A": lambda d: edit(d / "adapter.safetensors", lambda t: t.update({"elsewhere.A": torch.ones(1)})),
    r"blocks.1.mlp.up_proj.update.A is \(2, 2\), expected \(4, 16\)":
        lambda d: edit(d / "adapter.safetensors", lambda t: t.update({"blocks.1.mlp.up_proj.update.A": torch.ones(2, 2)})),
    "missing blocks.0.attn.q_proj.update.A.* and 36 more": lambda d: save_file({}, d / "adapter.safetensors"),
    "broken or truncated": lambda d: (d / "adapter.safetensors").write_bytes((d / "adapter.safetensors").read_bytes()[:-9]),
    "adapter.safetensors: not found": lambda d: (d / "adapter.safetensors").unlink(),
    "adapter.json: not found": lambda d: (d / "adapter.json").unlink(),
    "adapter.json: not valid JSON": lambda d: (d / "adapter.json").write_text("[1"),
    "adapter.json is not what was saved with adapter.safetensors": lambda d: (d / "adapter.json").write_text(
        (d / "adapter.json").read_text().replace('"gate_bias": 0.0', '"gate_bias": 1.0')),
    "adapter.json: unknown fields colour": lambda d: (d / "adapter.json").write_text(json.dumps({"colour": 1})),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_adapter_is_refused_and_changes_nothing(message, tmp_path):
    save_adapter(adapted("hira", "token", dtype=torch.float32), tmp_path)
    BROKEN[message](tmp_path)
    model = adapted("hira", "token", dtype=torch.float32)
    before = model(IDS)
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(model(IDS), before)


def test_values_are_not_loaded_into_an_adapter_of_another_kind(tmp_path):
    save_adapter(adapted("lora", "none", dtype=torch.float32, alpha=2.0), tmp_path)
    model = adapted("lora", "none", dtype=torch.float32, alpha=4.0)  # the same shapes
    before = model(IDS)
    with pytest.raises(UserError, match="already has another adapter"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("method", METHODS)
def test_merging_ungated_adapters_keeps_the_logits(method):
    model = adapted(method, "none", family="gpt2")
    before = model(IDS)
    if not hasattr(METHODS[method], "merged"):
        with pytest.raises(UserError, match=f"{method} cannot be merged"):
            merge_adapters(model)
        assert torch.equal(model(IDS), before)
        return
    merge_adapters(model)
    assert gated_layers(model) == {} and set(model.state_dict()) == set(tiny("gpt2").state_dict())
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-12)


def test_merging_warns_where_rounding_takes_the_update():
    for dtype, lossy in ((torch.float32, False), (torch.bfloat16, True)):
        model = adapted("hira", "none", dtype=dtype, trained=False)
        for layer in gated_layers(model).values():
            layer.update.B.data.fill_(1e-3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merge_adapters(model)
        assert ["load the base in float32" in str(warning.message) for warning in caught] == [True] * lossy


@every
def test_merging_a_gated_adapter_is_refused_and_changes_nothing(method, gate):
    if gate == "none":
        pytest.skip("can be merged")
    model = adapted(method, gate)
    before = model(IDS)
    with pytest.raises(UserError, match="gated adapter cannot be merged"):
        merge_adapters(model)
    assert torch.equal(model(IDS), before)


# ------------------------------------------------------------------------------------ gates and updates of one's own

class EntropyGate(nn.Module):
    """Opens where the base is unsure: z = v * (entropy of the base's next token) + b_g."""

    def __init__(self, W0, config):
        super().__init__()
        self.v, self.b_g = parameter(W0, 1), parameter(W0, 1, value=config.gate_bias)

    def forward(self, x, entropy, **context):
        return self.v * entropy.reshape(-1, 1) + self.b_g                                   # (N, 1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_gate_may_read_something_else_than_its_token(method, checkpointing, tmp_path, monkeypatch):
    monkeypatch.setitem(GATES, "entropy", EntropyGate)
    model, targets = adapted(method, "entropy"), IDS.roll(-1, 1)
    model.gradient_checkpointing = checkpointing
    with adapters_off(model), torch.no_grad():
        entropy = torch.special.entr(model(IDS).softmax(-1)).sum(-1)                        # (B, T)
    optimizer = torch.optim.AdamW([{"params": gate_parameters(model), "lr": 0.1}], weight_decay=0)
    before, losses = {name: p.clone() for name, p in adapter_state(model).items()}, []
    for _ in range(5):
        with gate_context(model, entropy=entropy):
            loss = F.cross_entropy(model(IDS).flatten(0, 1), targets.flatten()) + 0.01 * gate_entropy(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in adapter_state(model).items():
        assert torch.equal(p, before[name]) == (".gate." not in name), name
    layer, values = gated_layers(model)["blocks.1.mlp.up_proj"], gate_values(model)["blocks.1.mlp.up_proj"]
    with gate_context(model, entropy=entropy):
        logits = model(IDS)
        again = tiny()
        load = save_adapter(model, tmp_path) or load_adapter(again, tmp_path)
        with gate_context(again, entropy=entropy):
            assert load.gate == "entropy" and torch.equal(again(IDS), logits)
    torch.testing.assert_close(gate_values(model)["blocks.1.mlp.up_proj"], torch.sigmoid(layer.gate.v * entropy + layer.gate.b_g))
    assert not torch.equal(values, gate_values(model)["blocks.1.mlp.up_proj"])              # of the step before the last
    with pytest.raises(TypeError, match="entropy"):  # nobody hands it over any more
        model(IDS)


class Shift(nn.Module):
    """Delta(x) = v, whatever x: nothing of low rank, and nothing that peft knows or a weight can do."""

    def __init__(self, W0, config):
        super().__init__()
        self.v = parameter(W0, W0.shape[0])

    def forward(self, x, g, **base):
        return times(g, self.v.to(x.dtype).expand(len(x), -1))


@pytest.mark.parametrize("gate", GATES)
def test_an_update_may_be_anything(gate, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "shift", Shift)
    fresh, model = adapted("shift", gate, dtype=torch.float32, trained=False), adapted("shift", gate, dtype=torch.float32)
    base = tiny(dtype=torch.float32)(IDS)
    assert torch.equal(fresh(IDS), base) and not torch.equal(model(IDS), base)
    save_adapter(model, tmp_path)
    load_adapter(again := tiny(dtype=torch.float32), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    with cached_products(model):
        assert torch.equal(again(IDS), model(IDS))
    with pytest.raises(UserError, match="cannot be merged"):
        merge_adapters(model)
    with pytest.raises(UserError, match="cannot be exported: peft has no"):
        export_peft(model, tmp_path / "peft")


# ------------------------------------------------------------------------------------------- torch.compile

@every
def test_the_model_compiles_without_a_graph_break(method, gate):
    torch._dynamo.reset()
    model = adapted(method, gate)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = pack([Question([1, 2, 3], [[4, 5]]), Question([6, 7], [[8, 9, 10]])])

    def gradients(forward):
        logits = forward(batch.ids, documents=batch.documents, select=batch.select)
        (F.cross_entropy(logits, batch.targets) + gate_entropy(model)).backward()
        grads = [p.grad.clone() for p in adapter_state(model).values()]
        model.zero_grad()
        return [logits, *grads]

    for a, b in zip(gradients(model), gradients(compiled)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method, gate", [("hira", "token"), ("dora", "static")])
def test_compiled_blocks_are_checkpointed_as_others_are(method, gate):
    """Logits and gradients are the same, and the forward keeps no more for the backward, whose gates are the first's."""
    torch._dynamo.reset()
    model = adapted(method, gate)
    parameters = list(adapter_state(model).values())

    def step():
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(IDS)
            loss = logits.square().sum() + gate_entropy(model)
        gates = [layer.gate_logit for layer in gated_layers(model).values()]
        grads = torch.autograd.grad(loss, parameters)
        assert all(layer.gate_logit is gate for layer, gate in zip(gated_layers(model).values(), gates))
        return [logits, *grads], sum(storage.nbytes() for storage in kept.values())

    plain, plain_size = step()
    model.gradient_checkpointing = True
    _, size = step()
    for block in model.blocks:  # as `compile_blocks` does, but for the code generation
        block.compile(dynamic=True, backend="aot_eager_decomp_partition")
    compiled, compiled_size = step()
    for a, b in zip(plain, compiled):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert compiled_size == size < plain_size / 2


# ------------------------------------------------------------------------------- switches and short cuts

@every
def test_adapters_can_be_switched_off_and_on(method, gate):
    model = adapted(method, gate)
    with_adapters = model(IDS)
    with adapters_off(model):
        assert torch.equal(model(IDS), tiny()(IDS)) and gate_values(model) == {}
    assert torch.equal(model(IDS), with_adapters)


@pytest.mark.parametrize("gate", GATES)
def test_cached_products_give_the_same_logits(gate, monkeypatch):
    model = adapted("hira", gate)
    before = model(IDS)
    with torch.no_grad(), cached_products(model):
        monkeypatch.setattr(GatedHadamard, "apply", None)  # the products are not made again
        torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-12)
    assert all(layer.update.dense is None for layer in gated_layers(model).values())


def test_cached_products_are_kept_in_the_dtype_of_the_weights():
    model = adapted("hira", "token", dtype=torch.bfloat16)
    with cached_products(model):
        assert all(layer.update.dense.dtype == torch.bfloat16 for layer in gated_layers(model).values())


def test_cached_products_take_no_gradient_away():
    model = adapted("hira", "token")
    whole = torch.autograd.grad(model(IDS).square().sum(), list(adapter_state(model).values()))
    with cached_products(model):
        cached = torch.autograd.grad(model(IDS).square().sum(), list(adapter_state(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(whole, cached))


def test_adapters_work_in_packed_rows_and_with_a_cache():
    """Gradients of two packed documents equal those of each on its own; cached decoding equals the full forward."""
    model = adapted("hira", "token")
    questions = [Question([1, 2, 3], [[4, 5]]), Question([6, 7], [[8, 9, 10]])]
    batch, parameters = pack(questions), list(adapter_state(model).values())
    packed = model(batch.ids, documents=batch.documents, select=batch.select)
    g_packed = torch.autograd.grad(packed.square().sum() + 6 * gate_entropy(model), parameters)
    alone, entropy = [], 0
    for prompt, answers, _ in questions:
        logits = model(torch.tensor([prompt + answers[0][:-1]]))
        alone.append(logits[0, len(prompt) - 1:])
        entropy = entropy + gate_entropy(model) * logits.shape[1] / batch.ids.numel()
    alone = torch.cat(alone)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-11)
    for a, b in zip(g_packed, torch.autograd.grad(alone.square().sum() + 6 * entropy, parameters)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    row = [1, 2, 3]
    for token in model.generate([[1, 2, 3], [4]], 6)[0]:
        assert token == model(torch.tensor([row]))[0, -1].argmax()
        row.append(token)


def test_checkpointing_with_gates_keeps_no_activations():
    """After a backward, all activations are free: a gate logit kept from the second forward would hold each block's."""
    import weakref
    model, storages = adapted("hira", "token"), []
    model.gradient_checkpointing = True
    for module in model.modules():
        if isinstance(module, (nn.Linear, GatedLinear)):
            module.register_forward_hook(lambda m, i, o: storages.append(weakref.ref(o.untyped_storage())))
    (model(IDS).square().sum() + gate_entropy(model)).backward()
    assert len(storages) > 2 * len(gated_layers(model)) and not any(ref() is not None for ref in storages)


def test_a_flipped_byte_is_noticed(tmp_path):
    save_adapter(adapted("hira", "token", dtype=torch.float32), tmp_path)
    file = tmp_path / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="do not match their checksum"):
        load_adapter(tiny(dtype=torch.float32), tmp_path)


def test_a_refused_adapter_leaves_the_base_as_it_was(tmp_path):
    save_adapter(adapted("lora", "none", dtype=torch.float32), tmp_path)
    BROKEN["missing blocks.0.attn.k_proj.update.B"](tmp_path)
    base = tiny(dtype=torch.float32)
    with pytest.raises(UserError, match="missing"):
        load_adapter(base, tmp_path)
    assert gated_layers(base) == {} and torch.equal(base(IDS), tiny(dtype=torch.float32)(IDS))


def test_entropy_is_exact_in_float32_at_both_ends():
    for logit in (-30.0, -15.0, -3.0, 0.0, 3.0, 15.0, 30.0):
        values = []
        for dtype in (torch.float32, torch.float64):
            model = adapted("hira", "static", dtype=dtype)
            set_gates(model, -abs(logit) if dtype == torch.float64 else logit)
            model(IDS)
            values.append(gate_entropy(model).item())
        assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every
def test_half_precision_rounds_updates_and_gradients_but_loses_none(method, gate, dtype):
    """W0 ⊙ B A starts below float16's smallest number. Here each row of W0 holds two equal numbers, and x opposite ones
    in their places: W0 x is 0, and y the update alone."""
    torch.manual_seed(3)
    half, exact = (nn.Linear(256, 128, bias=False, dtype=d).requires_grad_(False) for d in (dtype, torch.float64))
    rows = torch.arange(128)
    half.weight.data.zero_()[rows, 2 * rows] = half.weight.data[rows, 2 * rows + 1] = (0.02 * torch.randn(128)).to(dtype)
    exact.weight.data = half.weight.double()
    half, exact = (GatedLinear(linear, AdapterConfig(method, gate, r=8)) for linear in (half, exact))
    trained = {name: p for name, p in half.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.data += 3e-5 * torch.randn_like(p)
        exact.get_parameter(name).data = p.double()
    x = 16 * torch.randn(32, 128).repeat_interleave(2, 1) * torch.tensor([1, -1]).repeat(128)
    dy = 64 * torch.randn(32, 128)  # as a loss scaler lifts it
    results = []
    for layer in (half, exact):
        inputs = x.to(dtype).to(layer.weight.dtype).requires_grad_()
        y = layer(inputs)
        gradients = torch.autograd.grad(y, [inputs, *map(layer.get_parameter, trained)], dy.to(dtype).to(y.dtype))
        results.append([y, *gradients])
    for name, a, b in zip(["y", "x", *trained], *results):
        assert a.dtype == (dtype if name in ("y", "x") else torch.float32) and b.norm() > 0
        assert (a.double() - b).norm() < 0.1 * b.norm(), name


@every
def test_autocast_computes_what_a_bfloat16_input_does(method, gate):
    torch.manual_seed(3)
    layer = GatedLinear(nn.Linear(64, 32).requires_grad_(False).bfloat16(), AdapterConfig(method, gate, r=4))
    for p in adapter_state(layer).values():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(5, 64)
    plain_output = layer(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert torch.equal(output, plain_output)
    parameters = list(adapter_state(layer).values())
    gradients = [torch.autograd.grad(y.float().square().sum(), parameters) for y in (output, plain_output)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
