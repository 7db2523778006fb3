"""GateRA (arXiv 2511.17582, AAAI 2026): token-aware gates on LoRA, DoRA and HiRA.

    model = Transformer.from_pretrained("smollm2-135m")
    inject_adapters(model, AdapterConfig(method="hira", gate="token", r=32))

A pretrained model, the base, stays frozen. What trains is an adapter: beside each of some linear layers of the base an
update Delta, and a gate g that decides how much of it a token gets. One formula covers every method here. For a base
layer y = W0 x + b, W0 (out, in), and the input x_t (in,) of token t:

    y_t = W0 x_t + b + g(x_t) * Delta(x_t)              (GateRA, token gate)

    LoRA  (arXiv 2106.09685)             Delta(x) = s B A x                     s = alpha / r
    DoRA  (arXiv 2402.09353)             Delta(x) = (m/n - 1) * W0 x + (m/n) * s B A x,   n = row norms of W0 + s B A
    HiRA  (ICLR 2025)                    Delta(x) = (W0 ⊙ B A) x                ⊙ is elementwise, the Hadamard product

    gate "none"    g = 1                            the published, ungated method
    gate "token"   g(x) = sigmoid(w_g . x + b_g)    one scalar for each token in each adapted layer
    gate "static"  g = sigmoid(b_g)                 the paper's ablation: one scalar for each adapted layer

A (r, in) starts random and B (out, r) at zero: B A, which has the shape of W0 but only rank r, is zero then. m (out,),
the row norms that DoRA learns, starts at n. So Delta starts at exactly 0 and the model at exactly its base. A closed
gate, g = 0, leaves a token to the base; an open one, g = 1, gives it all of the published method.

GateRA as the paper evaluates it is HiRA with the token gate, trained on L_task + lambda * L_ent: the task's loss, and
the entropy of the gates (`gate_entropy`), which draws each gate to 0 or 1.
"""
import json
import math
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from data.files import UserError, is_number, read_json, read_tensors, reading, write_atomically, write_tensors
from data.peft_format import ends_in, read_peft, write_peft
from data.weights import hugging_face_name
from model import Recomputing

METHODS, GATES = ("lora", "dora", "hira"), ("none", "token", "static")


@dataclass
class AdapterConfig:
    method: str = "hira"           # lora, dora or hira
    gate: str = "token"            # none, token or static
    r: int = 32                    # rank of B A
    alpha: float | None = None     # LoRA's and DoRA's scaling numerator; None: 2 r. HiRA has none
    dropout: float = 0.0           # on the input of Delta
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # ends of layers' names; the paper's
    gate_bias: float = 0.0         # b_g at the start. The paper does not say; sigmoid(0) = 1/2 is our default
    skip_closed: float = 0.0       # HiRA: a gate up to this counts as closed, its token skips Delta; 0: none does

    def __post_init__(self):
        if isinstance(self.targets, str):
            raise UserError(f"adapter: targets {self.targets!r}; expected a list of layer names")
        self.targets = tuple(self.targets)
        below_one = math.nextafter(1, 0)
        wrong = [f"{name} {getattr(self, name)!r}; expected {expected}" for name, fine, expected in (
            ("method", self.method in METHODS, "one of " + ", ".join(METHODS)),
            ("gate", self.gate in GATES, "one of " + ", ".join(GATES)),
            ("r", isinstance(self.r, int) and is_number(self.r, 1, math.inf), "a positive whole number"),
            ("alpha", self.alpha is None or is_number(self.alpha, 1e-12, 1e12), "a positive number"),
            ("gate_bias", is_number(self.gate_bias, -1e6, 1e6), "a finite number up to 1e6"),
            ("dropout", is_number(self.dropout, 0, below_one), "a number from 0 up to, not including, 1"),
            ("skip_closed", is_number(self.skip_closed, 0, below_one), "a number from 0 up to, not including, 1"),
            ("skip_closed", self.skip_closed == 0 or (self.method, self.gate) == ("hira", "token"),
             "0, but for hira with a token gate: elsewhere there is nothing to save"),
            ("targets", self.targets and all(isinstance(name, str) and name for name in self.targets),
             "at least one layer name, and no empty one"),
        ) if not fine]
        if wrong:
            raise UserError("adapter: " + "; ".join(wrong))

    @property
    def scaling(self) -> float:
        """s of LoRA and DoRA."""
        return (2 * self.r if self.alpha is None else self.alpha) / self.r


# ------------------------------------------------------------------------------------------ the adapted layer

class GatedLinear(nn.Module):
    """A frozen nn.Linear with an adapter, gated or not; `weight` and `bias` keep their names in the state dict.

    forward: x (..., in) -> (..., out). `gate_logit` (..., 1) keeps z of the gate g = sigmoid(z) from the last forward,
    in float32 after a product in x's dtype, for the entropy term and for looking at; None without a gate.
    """

    def __init__(self, linear: nn.Linear, config: AdapterConfig):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.method, self.gate, self.scaling, self.dropout = config.method, config.gate, config.scaling, config.dropout
        self.skip_closed = config.skip_closed
        out_features, in_features = self.weight.shape
        # Adapters stay in float32 (or better) beside a bf16 base: their updates are too small for bf16's 8 bits.
        device, dtype = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        # drawn on the CPU, so that a seed means the same adapter on every device
        A = nn.init.kaiming_uniform_(torch.empty(config.r, in_features, dtype=dtype), a=math.sqrt(5))
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(out_features, config.r, dtype=dtype, device=device))
        if self.method == "dora":
            squared = self.weight.detach().to(dtype).square().sum(1)                             # (out,)
            self.register_buffer("weight_norm_squared", squared, persistent=False)
            self.m = nn.Parameter(squared.sqrt())                # (out,) n itself while B = 0, so that m/n is exactly 1
        if self.gate == "token":
            self.w_g = nn.Parameter(torch.zeros(in_features, dtype=dtype, device=device))
        if self.gate != "none":
            self.b_g = nn.Parameter(torch.full((1,), config.gate_bias, dtype=dtype, device=device))
        self.gate_logit = None
        self.enabled = True          # see adapters_off
        self.dense = None            # see cached_products
        self.train(linear.training)  # or dropout would be at work in a model in eval mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])                   # (N, in), N tokens
        W0 = self.weight.to(x.dtype)
        y = F.linear(x, W0, None if self.bias is None else self.bias.to(x.dtype))          # W0 x + b: (N, out)
        if not self.enabled:
            self.gate_logit = None
            return y.view(*leading, -1)

        # z = w_g . x + b_g,   g = sigmoid(z)                                   (GateRA, token gate)
        g = None
        if self.gate == "token":
            z = F.linear(x, self.w_g[None].to(x.dtype)).to(self.b_g.dtype) + self.b_g      # (N, 1)
        elif self.gate == "static":
            z = self.b_g.repeat(len(x), 1)
        if self.gate != "none":
            g = torch.sigmoid(z)
            if not Recomputing.now:  # the first forward's is the one that the loss has seen
                self.gate_logit = z.view(*leading, 1)

        dropping = self.training and self.dropout > 0
        x_in = F.dropout(x, self.dropout) if dropping else x                    # read by Delta alone: the gate reads x
        if self.method == "hira":  # Delta(x) = (W0 ⊙ B A) x
            if g is None or self.skip_closed == 0:
                return (y + self.hira(x_in, W0, g)).view(*leading, -1)
            # A token whose gate is closed would add next to nothing: only the open ones pay for Delta. What is lost of
            # the output is g ||Delta(x)|| a token, what is lost of the gradient is bounded by the theorem below.
            opened = (g > self.skip_closed).flatten().nonzero().flatten()       # (open tokens,)
            return y.index_add_(0, opened, self.hira(x_in[opened], W0, g[opened])).view(*leading, -1)

        # LoRA: Delta(x) = s B A x. The gate scales r numbers before B, not many after it.
        low, B = self.scaling * F.linear(x_in, self.A.to(x.dtype)), self.B      # (N, r), (out, r)
        low = low if g is None else low * g.to(x.dtype)
        if self.method == "dora":  # Delta(x) = (m/n - 1) * W0 x + (m/n) * s B A x, and m/n goes into B
            ratio = self.m / self.row_norm()                                    # (out,)
            B = ratio[:, None] * B
            if dropping:
                W0x = F.linear(x_in, W0)
            else:  # y has it already
                W0x = y if self.bias is None else y - self.bias.to(x.dtype)
            y = torch.addcmul(y, W0x if g is None else W0x * g.to(x.dtype), (ratio - 1).to(x.dtype))
        return y.addmm(low, B.to(x.dtype).t()).view(*leading, -1)

    def hira(self, x: torch.Tensor, W0: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        """g * (W0 ⊙ B A) x, (N, in) -> (N, out), by the dense product that `cached_products` keeps if there is one."""
        if self.dense is None or torch.is_grad_enabled():
            return GatedHadamard.apply(x, W0, self.A, self.B, g)
        delta = x @ self.dense.t()
        return delta if g is None else delta.mul_(g.to(x.dtype))

    @torch.no_grad()  # DoRA, section 4.3: the norm is a constant for the gradient
    def row_norm(self) -> torch.Tensor:
        """n = row norms (out,) of W0 + s B A, without making that matrix:
        n^2 = ||W0||^2 + 2 s rowsum((W0 A^T) ⊙ B) + s^2 rowsum((B (A A^T)) ⊙ B)."""
        A, B, s = self.A, self.B, self.scaling
        with torch.autocast(A.device.type, enabled=False):  # in float32: m/n is 1 but for a few parts in a thousand
            cross = (self.weight.to(A.dtype) @ A.t() * B).sum(1)
            return (self.weight_norm_squared + 2 * s * cross + s * s * (B @ (A @ A.t()) * B).sum(1)).sqrt()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name not in ("weight", "bias")}


# -------------------------------------------------------------------------------- HiRA, with its own backward

class GatedHadamard(torch.autograd.Function):
    """g * (W0 ⊙ B A) x, whose backward is the paper's soft gradient masking, written out.

    x (N, in), W0 (out, in), A (r, in), B (out, r), g (N, 1) or None for g = 1. Returns (N, out).

    Autograd would keep the dense product W0 ⊙ B A of every layer until the backward: a second copy of the model.
    Making it again costs r / N of a product with W0, so only the inputs are kept. With dy_t = dL/dy_t, the gradient
    that arrives, and u_t = (W0 ⊙ B A)^T dy_t:

        dL/dx_t    = g_t u_t
        dL/dg_t    = x_t . u_t                                 (= dy_t . Delta(x_t), without keeping Delta)
        dL/d(BA)   = sum_t g_t  W0 ⊙ (dy_t x_t^T)              (GateRA, soft gradient masking)

    The last line is the theorem: token t moves the adapter by its gate's share, at most
    g_t max|W0| ||dy_t|| ||x_t|| in the Frobenius norm (the paper has ||W0||), and not at all where the gate is closed.
    """

    @staticmethod
    def forward(ctx, x, W0, A, B, g):
        ctx.save_for_backward(x, W0, A, B, g)
        # float16 has no numbers below 6e-8, where W0 ⊙ B A starts: lifted by a power of two, which costs no precision
        lift = ctx.lift = 64 if x.dtype == torch.float16 else 1
        dense = ((B * lift).to(x.dtype) @ A.to(x.dtype)).mul_(W0)       # (out, in)
        y = x @ dense.t()                                               # (N, out)
        if g is not None:
            y = y.mul_(g.to(x.dtype))
        return y if lift == 1 else y.div_(lift)

    @staticmethod
    @once_differentiable                                                # no second derivatives
    def backward(ctx, dy):                                              # in place only on what is ours: not on dy
        x, W0, A, B, g = ctx.saved_tensors
        A_x, B_x = A.to(x.dtype), (B * ctx.lift).to(x.dtype)            # in x's dtype, B lifted, as in the forward
        u = dy @ (B_x @ A_x).mul_(W0)                                   # (N, in)
        if ctx.lift != 1:
            u = u.div_(ctx.lift)
        dg = None
        if g is not None:
            dg = (x * u).sum(-1, keepdim=True, dtype=g.dtype)           # (N, 1)
            u, dy = u.mul_(g.to(x.dtype)), dy * g.to(x.dtype)
        dBA = (dy.t() @ x).mul_(W0)                                     # (out, in)
        dA, dB = B_x.t() @ dBA, dBA @ A_x.t()                           # (r, in), (out, r)
        return u, None, dA.to(A.dtype) / ctx.lift, dB.to(B.dtype), dg   # u is dx by now; W0 is frozen


# ---------------------------------------------------------------------------------------- adapters in a model

def inject_adapters(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Freezes `model` and replaces each targeted nn.Linear by a GatedLinear around the same weight, in place.

    Returns the names of the adapted layers. Raises UserError for a target that names no layer, a rank larger than the
    smaller side of a matrix, and a model that has adapters. Order: load the base, inject, load an adapter, compile.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if any(isinstance(module, GatedLinear) for module in model.modules()):
        raise UserError("the model already has adapters; merge them or load the base again")
    if unknown := [target for target in config.targets if not any(ends_in(name, target) for name in linears)]:
        leaves = sorted({name.rpartition(".")[2] for name in linears})
        raise UserError(f"targets: no layer is named {', '.join(unknown)}; this model has {', '.join(leaves)}")
    chosen = {name: linear for name, linear in linears.items()
              if any(ends_in(name, target) for target in config.targets)}
    smallest = min(min(linear.weight.shape) for linear in chosen.values())
    if config.r > smallest:
        raise UserError(f"r {config.r} is larger than the smallest adapted matrix side, {smallest}")
    model.requires_grad_(False)
    for name, linear in chosen.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, GatedLinear(linear, config))
    model.adapter_config = config
    return list(chosen)


def remove_adapters(model: nn.Module) -> None:
    """Puts an nn.Linear with the present weight back in the place of each adapted layer."""
    for name, layer in gated_layers(model).items():
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    model.adapter_config = None


def gated_layers(model: nn.Module) -> dict[str, GatedLinear]:
    """{name: layer} of the adapted layers, gated or not, in the order of the blocks."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, GatedLinear)}
    return {name.removeprefix("_orig_mod."): layer for name, layer in layers.items()}  # torch.compile's prefix


def adapter_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of everything that trains, and nothing else."""
    return {f"{name}.{leaf}": p for name, layer in gated_layers(model).items()
            for leaf, p in layer.adapter_parameters().items()}


@contextmanager
def adapters_off(model: nn.Module):
    """The base model, for as long as the `with` lasts."""
    layers = gated_layers(model).values()
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer in layers:
            layer.enabled = True


# -------------------------------------------------------------------------------------------------- the gates

def gate_entropy(model: nn.Module, mask: torch.Tensor | None = None) -> torch.Tensor:
    """L_ent = -(1/N) sum [ g log g + (1 - g) log(1 - g) ], in nats, over the N gates of the last forward, one for each
    token and adapted layer (GateRA, entropy regularisation). Small where g is near 0 or 1, ln 2 = 0.693 at g = 1/2.

    From z, where g = sigmoid(z), it is exact and needs no clamp: H(z) = softplus(z) - z sigmoid(z). As H(z) = H(-z), it
    is taken at -|z|, where nothing cancels.
    mask (B, T): True where a token is real. Returns a scalar; 0 for a model without gates.
    """
    logits = [layer.gate_logit for layer in gated_layers(model).values() if layer.gate_logit is not None]
    if not logits:
        return torch.zeros((), device=next(model.parameters()).device)
    z = torch.cat(logits, dim=-1)                                               # (B, T, gates)
    if mask is not None:
        z = z[mask]
    a = z.abs()
    return (F.softplus(-a) + a * torch.sigmoid(-a)).mean()


def gate_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """{layer name: g (B, T)} of the last forward; empty for a model without gates."""
    return {name: torch.sigmoid(layer.gate_logit.detach()).squeeze(-1)
            for name, layer in gated_layers(model).items() if layer.gate_logit is not None}


# --------------------------------------------------------------------------------------------- after training

def set_skip_closed(model: nn.Module, threshold: float) -> None:
    """AdapterConfig.skip_closed for adapters that are there already, to try what a trained one loses by skipping.
    Raises UserError where that saves nothing, or for a threshold out of range."""
    model.adapter_config = replace(model.adapter_config, skip_closed=threshold)
    for layer in gated_layers(model).values():
        layer.skip_closed = threshold


@contextmanager
def cached_products(model: nn.Module):
    """Keeps HiRA's W0 ⊙ B A of every layer for as long as the `with` lasts: for decoding, where one token's product
    with it is r times cheaper than making it. Costs the memory of the adapted weights once more; not for training."""
    layers = [layer for layer in gated_layers(model).values() if layer.method == "hira"]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.dense = layer.weight * (layer.B @ layer.A).to(layer.weight.dtype)     # (out, in)
        yield
    finally:
        for layer in layers:
            layer.dense = None


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Folds ungated adapters into the base weights, in place: each GatedLinear becomes an nn.Linear again.

    LoRA: W0 + s B A.   DoRA: (m/n) * (W0 + s B A).   HiRA: W0 ⊙ (1 + B A).
    Load the base in float32 for it: bfloat16 rounds 1 + B A to 1 where B A is below 0.004, and a warning says how much
    of an update got lost. Raises UserError for a gated adapter: its weight would be another one for every token.
    """
    for name, layer in gated_layers(model).items():
        if layer.gate != "none":
            raise UserError(f"a gated adapter cannot be merged: its weight differs from token to token ({name})")
    worst = 0.0                                     # the largest share of a layer's update that was rounded off
    for layer in gated_layers(model).values():
        W0, BA = layer.weight.to(layer.A.dtype), layer.B @ layer.A               # (out, in)
        W = W0 + (W0 * BA if layer.method == "hira" else layer.scaling * BA)
        if layer.method == "dora":
            W = W * (layer.m / layer.row_norm())[:, None]
        merged = W.to(layer.weight.dtype)
        worst = max(worst, ((merged - W).norm() / (W - W0).norm().clamp(min=1e-30)).item())
        layer.weight = nn.Parameter(merged, requires_grad=False)
    remove_adapters(model)
    if worst > 0.05:
        warnings.warn(f"merging into {merged.dtype} rounded off up to {100 * min(worst, 1):.0f} % of a layer's update; "
                      "load the base in float32")


# ------------------------------------------------------------------------------------------- to disk and back

def save_adapter(model: nn.Module, directory) -> None:
    """Writes adapter.safetensors (the adapter's tensors alone) and adapter.json (its AdapterConfig)."""
    tensors = adapter_state(model)
    if not tensors:
        raise UserError("the model has no adapter to save")
    config = json.dumps(asdict(model.adapter_config), indent=2) + "\n"
    write_tensors(Path(directory) / "adapter.safetensors", tensors, config)  # there too, where its checksum covers it
    write_atomically(Path(directory) / "adapter.json", lambda path: path.write_text(config))


def load_adapter(model: nn.Module, directory) -> AdapterConfig:
    """Injects the adapter that `save_adapter`, `export_peft` or peft itself wrote to `directory` into a base model, or
    overwrites the values of an adapter already there. Strict: UserError names missing, surplus and misshapen tensors,
    broken files and settings of peft that no AdapterConfig expresses."""
    file = Path(directory) / "adapter.safetensors"
    if (Path(directory) / "adapter_config.json").exists() and not file.exists():
        file = Path(directory) / "adapter_model.safetensors"
        with reading(Path(directory)):
            values, layers = read_peft(Path(directory), peft_layers(model), PEFT)
            config = AdapterConfig(**values)
        tensors = {f"{name}.{leaf}": tensor for name, part in layers.items() for leaf, tensor in part.items()}
    else:
        config, (tensors, info) = read_adapter_config(directory), read_tensors(file, with_info=True)
        if info and AdapterConfig(**json.loads(info)) != config:
            raise UserError(f"{directory}: adapter.json is not what was saved with adapter.safetensors; it was edited "
                            "or damaged, copy it again")
    fresh = not gated_layers(model)
    if fresh:
        try:
            inject_adapters(model, config)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    elif model.adapter_config != config:
        raise UserError(f"{file}: the model already has another adapter ({model.adapter_config})")
    own = adapter_state(model)
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
              for name in own if name in tensors and tensors[name].shape != own[name].shape]
    wrong += [f"{name} holds nan or inf" for name in own
              if name in tensors and not tensors[name].float().isfinite().all()]
    if wrong:
        if fresh:
            remove_adapters(model)  # leave the base as it was
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{file}: does not fit this base model: {'; '.join(wrong[:4])}{more}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return config


def read_adapter_config(directory) -> AdapterConfig:
    """The AdapterConfig in adapter.json; UserError if it is not there or not one."""
    file = Path(directory) / "adapter.json"
    if not file.exists():
        raise UserError(f"{file}: not found; expected a directory with adapter.safetensors and adapter.json, or one "
                        "that peft wrote")
    raw = read_json(file)
    if unknown := set(raw) - {field.name for field in fields(AdapterConfig)}:
        raise UserError(f"{file}: unknown fields {', '.join(sorted(unknown))}")
    with reading(file):
        return AdapterConfig(**raw)


# ----------------------------------------------------------------------------------------------- peft's files

# by method, the fields of peft's adapter_config.json that tell it, and peft's names of its tensors
LORA_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight"}
PEFT = {"lora": ({"peft_type": "LORA", "use_dora": False}, LORA_KEYS),
        "dora": ({"peft_type": "LORA", "use_dora": True}, LORA_KEYS | {"m": "lora_magnitude_vector"}),
        "hira": ({"peft_type": "HIRA"}, {"A": "hira_A", "B": "hira_B"})}


def peft_layers(model: nn.Module) -> dict[str, list[str]]:
    """{transformers' name of a linear layer: our names}, three (q, k, v) for GPT-2's c_attn, else one."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, GatedLinear)):
            name = name.removeprefix("_orig_mod.")
            layers.setdefault(hugging_face_name(name, model.config), []).append(name)
    return layers


def export_peft(model: nn.Module, directory) -> None:
    """Writes an ungated adapter as adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained.

    Raises UserError for a gated adapter: peft would drop the gate without a word, and compute something else."""
    adapted, config = gated_layers(model), model.adapter_config if gated_layers(model) else None
    if not adapted:
        raise UserError("the model has no adapter to export")
    if config.gate != "none":
        raise UserError(f"a {config.gate} gate cannot be exported: peft has no gates and would drop it silently")
    layers = peft_layers(model)
    parts = {theirs: [peft_part(model.get_submodule(name), config) for name in names]
             for theirs, names in layers.items() if any(name in adapted for name in names)}
    write_peft(Path(directory), parts, list(layers), PEFT[config.method], config.r, config.scaling, config.dropout,
               getattr(model, "name_or_path", None))


def peft_part(layer: nn.Module, config: AdapterConfig) -> dict[str, torch.Tensor]:
    """A, B and m of a layer; for one without an adapter in a c_attn with one, those that change nothing: A = B = 0."""
    if isinstance(layer, GatedLinear):
        return layer.adapter_parameters()
    W0 = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))    # (out, in)
    return {"A": W0.new_zeros(config.r, W0.shape[1]), "B": W0.new_zeros(W0.shape[0], config.r), "m": W0.norm(dim=1)}
