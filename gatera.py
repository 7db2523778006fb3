"""GateRA (arXiv 2511.17582, AAAI 2026): token-aware gates on LoRA, DoRA and HiRA.

    model = Transformer.from_pretrained("smollm2-135m")
    inject_adapters(model, AdapterConfig(method="hira", gate="token", r=32))

A pretrained model, the base, stays frozen. Some of its linear layers get an adapter, which alone trains: an update
Delta, and a gate g that decides how much of it each token gets. One formula covers every method here. For a layer
y = W0 x + b of the base, W0 (out, in), and the input x_t (in,) of token t:

    y_t = W0 x_t + b + g(x_t) * Delta(x_t)               g(x) = sigmoid(w_g . x + b_g)       (GateRA, token gate)

    LoRA  (arXiv 2106.09685)     Delta(x) = s B A x                                     s = alpha / r
    DoRA  (arXiv 2402.09353)     Delta(x) = (m/n - 1) * W0 x + (m/n) * s B A x          n = row norms of W0 + s B A
    HiRA  (ICLR 2025)            Delta(x) = (W0 ⊙ B A) x                                ⊙ is elementwise (Hadamard)

A (r, in) starts random and B (out, r) at zero: B A, which has the shape of W0 and a rank of at most r, is zero then. m
(out,), the row norms that DoRA learns, starts at n. So Delta starts at exactly 0 and the model at exactly its base. With
g = 0 a token is left to the base, with g = 1 it gets plain LoRA, DoRA or HiRA.

GateRA as the paper evaluates it is HiRA with the token gate, trained on L_task + lambda * L_ent: the task's loss, and
lambda times the entropy of the gates (`gate_entropy`), which draws each gate to 0 or 1.

Below: the layer that joins gate and update, the gates, the updates, adapters in a whole model, and on disk. A new gate is
one class and one entry of GATES, a new update one class and one entry of METHODS.
"""
import math
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from data.adapters import (check_adapter, fill, find_layers, peft_layers, read_adapter, untie_head, unwrapped,
                           write_adapter)
from data.files import UserError
from data.peft_format import write_peft

__version__ = "0.1.0"


@dataclass
class AdapterConfig:
    method: str = "hira"           # one of METHODS
    gate: str = "token"            # one of GATES
    r: int = 32                    # rank of B A
    alpha: float | None = None     # of LoRA's and DoRA's s = alpha / r; None: 2 r, so that s = 2
    dropout: float = 0.0           # on the input of Delta
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # ends of layers' names; the paper's
    gate_bias: float = 0.0         # b_g at the start. The paper does not say; sigmoid(0) = 1/2 is our default

    def __post_init__(self):
        check_adapter(vars(self), METHODS, GATES)
        self.targets = tuple(self.targets)

    @property
    def scaling(self) -> float:
        """s of LoRA and DoRA."""
        return (2 * self.r if self.alpha is None else self.alpha) / self.r


# The base computes in the dtype of x, which may be bfloat16 or float16. What trains is kept in float32 or better, as its
# steps are too small for bfloat16's 8 bits, and joins each product in the dtype of x.

def parameter(W0: torch.Tensor, *shape: int, value: float = 0.0) -> nn.Parameter:
    """A parameter of this shape, on the device of W0, in float32 or better."""
    return nn.Parameter(W0.new_full(shape, value, dtype=torch.promote_types(W0.dtype, torch.float32)))


def linear(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """W x + b for each token: x (N, in), W (out, in), b (out,) -> (N, out)."""
    return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))


def times(g: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """g * x for each token: g (N, 1), x (N, out) -> (N, out). Without a gate, which is None, x."""
    return x if g is None else x * g.to(x.dtype)


# ------------------------------------------------------------------------------------------------------ the layer

class GatedLinear(nn.Module):
    """A frozen nn.Linear with an update, gated or not; its W0 and b keep their names in the state dict, weight and bias.

    `gate_logit` (..., 1) keeps z of the last forward for the entropy term and for looking at; None without a gate.
    """

    def __init__(self, base: nn.Linear, config: AdapterConfig):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.update = METHODS[config.method](self.weight, config)
        self.gate = None if GATES[config.gate] is None else GATES[config.gate](self.weight, config)
        self.gate_logit = None
        self.enabled = True        # see adapters_off
        self.context = {}          # see gate_context
        self.train(base.training)  # or dropout would be at work in a model in eval mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:                             # (..., in) -> (..., out)
        leading, kind = x.shape[:-1], x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        x = x.reshape(-1, x.shape[-1])                                              # (N, in): N tokens
        y = linear(x, self.weight, self.bias)                                       # W0 x + b: (N, out)
        z = g = None
        if self.enabled:
            if self.gate is not None:
                z = self.gate(x, **self.context)                                    # w_g . x + b_g: (N, 1)
                g = torch.sigmoid(z)
            y = y + self.update(x, g, W0=self.weight, b=self.bias, y=y)             # + g * Delta(x)
        # A forward within a backward is checkpointing's second one. The first one's z stays, which the loss has seen:
        # the second's graph would hold the activations, and save no memory.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.gate_logit = None if z is None else z.view(*leading, 1)
        return y.view(*leading, -1)

    def __getstate__(self) -> dict:  # copies and pickles cannot take a graph along
        return self.__dict__ | {"gate_logit": None}


# --------------------------------------------------------------------------------------------------------- gates
# forward: x (N, in), the tokens, -> the logit z (N, 1); the layer takes g = sigmoid(z). At the start, z is
# config.gate_bias. A gate that reads something else than x asks for it by name, as in forward(self, x, position,
# **context), and gets it as it was given to `gate_context`.

class TokenGate(nn.Module):
    """z = w_g . x + b_g: a gate for each token (GateRA, token gate)."""

    def __init__(self, W0: torch.Tensor, config: AdapterConfig):
        super().__init__()
        self.w_g = parameter(W0, W0.shape[1])                                       # (in,)
        self.b_g = parameter(W0, 1, value=config.gate_bias)

    def forward(self, x: torch.Tensor, **context) -> torch.Tensor:
        return linear(x, self.w_g[None]) + self.b_g                                 # (N, 1), float32 as b_g is


class StaticGate(nn.Module):
    """z = b_g: one gate for all tokens, the paper's ablation."""

    def __init__(self, W0: torch.Tensor, config: AdapterConfig):
        super().__init__()
        self.b_g = parameter(W0, 1, value=config.gate_bias)

    def forward(self, x: torch.Tensor, **context) -> torch.Tensor:
        return self.b_g.repeat(len(x), 1)                                           # (N, 1)


GATES = {"none": None, "token": TokenGate, "static": StaticGate}


# ------------------------------------------------------------------------------------------------------- updates
# forward: x (N, in), g (N, 1) or None without a gate -> g * Delta(x) (N, out). Of the base, an update may ask for W0
# (out, in), b (out,) or None, and y = W0 x + b (N, out). Optional members, and what they make possible:
#   merged        merging: the one weight for all tokens that does what base and update do with g = 1
#   PEFT          peft's files: the fields of adapter_config.json that name the method, and its names of our parameters
#   product       `cached_products`: the dense matrix of Delta, which is kept in the attribute `dense`

class LowRank(nn.Module):
    """What the updates here are made of: A, random, and B, zero at the start."""

    def __init__(self, W0: torch.Tensor, config: AdapterConfig):
        super().__init__()
        self.B = parameter(W0, W0.shape[0], config.r)                               # (out, r)
        A = torch.empty(config.r, W0.shape[1], dtype=self.B.dtype)  # on the CPU: a seed means the same A on every device
        self.A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)).to(W0.device))  # (r, in)
        self.scaling, self.drop = config.scaling, nn.Dropout(config.dropout)  # for Delta alone: base and gate read x


class LoRA(LowRank):
    """Delta(x) = s B A x (arXiv 2106.09685)."""

    PEFT = {"peft_type": "LORA", "use_dora": False}, {"A": "lora_A.weight", "B": "lora_B.weight"}

    def forward(self, x: torch.Tensor, g: torch.Tensor | None, **base) -> torch.Tensor:
        low = times(g, self.scaling * linear(self.drop(x), self.A))                 # (N, r), fewer numbers than (N, out)
        return linear(low, self.B)

    def merged(self, W0: torch.Tensor) -> torch.Tensor:
        return W0 + self.scaling * (self.B @ self.A)                                # (out, in)


class DoRA(LoRA):
    """Delta(x) = (m/n - 1) * W0 x + (m/n) * s B A x, n = row norms of W0 + s B A (arXiv 2402.09353)."""

    PEFT = LoRA.PEFT[0] | {"use_dora": True}, LoRA.PEFT[1] | {"m": "lora_magnitude_vector"}

    def __init__(self, W0: torch.Tensor, config: AdapterConfig):
        super().__init__(W0, config)
        squared = W0.detach().to(self.B.dtype).square().sum(1)                      # (out,)
        self.register_buffer("weight_norm_squared", squared, persistent=False)
        self.m = nn.Parameter(squared.sqrt())       # (out,), n itself while B = 0, so that m/n is exactly 1

    def forward(self, x: torch.Tensor, g: torch.Tensor | None, W0, b, y) -> torch.Tensor:
        dropped, ratio = self.drop(x), self.m / self.row_norm(W0)                   # m/n: (out,)
        low = times(g, self.scaling * linear(dropped, self.A))                      # (N, r)
        if self.training and self.drop.p:
            W0x = linear(dropped, W0)                                               # (N, out)
        else:  # y holds it already
            W0x = y if b is None else y - b.to(x.dtype)
        # (m/n) B (g s A x) + (m/n - 1) (g W0 x)
        return torch.addcmul(linear(low, ratio[:, None] * self.B), times(g, W0x), (ratio - 1).to(x.dtype))

    @torch.no_grad()  # DoRA, section 4.3: the norm is a constant for the gradient
    def row_norm(self, W0: torch.Tensor) -> torch.Tensor:
        """n = row norms (out,) of W0 + s B A, without making that matrix:
        n^2 = ||W0||^2 + 2 s rowsum((W0 A^T) ⊙ B) + s^2 rowsum((B (A A^T)) ⊙ B)."""
        A, B, s = self.A, self.B, self.scaling
        with torch.autocast(A.device.type, enabled=False):  # m/n - 1 is about 1e-3: summed in bfloat16, it would be lost
            cross = (linear(W0, A) * B).sum(1)                                      # (out,), W0 A^T in the dtype of W0
            return (self.weight_norm_squared + 2 * s * cross + s * s * (B @ (A @ A.T) * B).sum(1)).sqrt()

    def merged(self, W0: torch.Tensor) -> torch.Tensor:
        return (self.m / self.row_norm(W0))[:, None] * super().merged(W0)           # (out, in)


class GatedHadamard(torch.autograd.Function):
    """g * (W0 ⊙ B A) x, whose backward is the paper's soft gradient masking, written out. g None: 1.

    Autograd would keep the dense product W0 ⊙ B A of every layer until the backward: a second copy of the model. Making
    it again costs r / N of what W0 x costs for N tokens, so only the inputs are kept. With dy_t = dL/dy_t, the gradient
    that arrives, and u_t = (W0 ⊙ B A)^T dy_t:

        dL/dx_t    = g_t u_t
        dL/dg_t    = x_t . u_t                                 (= dy_t . Delta(x_t), without keeping Delta)
        dL/d(BA)   = sum_t g_t  W0 ⊙ (dy_t x_t^T)              (GateRA, soft gradient masking)

    The last line is the theorem: token t moves B A by its gate's share, at most g_t max|W0| ||dy_t|| ||x_t|| in the
    Frobenius norm (the paper's bound, with ||W0||, is looser), and not at all where the gate is closed. (LoRA and DoRA
    have the same from autograd, as g multiplies what they add.)
    """

    @staticmethod
    def forward(ctx, x, W0, A, B, g):
        ctx.save_for_backward(x, W0, A, B, g)
        W0, A, B, lift = GatedHadamard.prepare(x, W0, A, B)
        y = times(g, x @ (B @ A).mul_(W0).T)                                        # (N, out)
        return y if lift == 1 else y.div_(lift)

    @staticmethod
    @once_differentiable                                                            # no second derivatives
    def backward(ctx, dy):
        x, W0, A, B, g = ctx.saved_tensors
        W0, A, B, lift = GatedHadamard.prepare(x, W0, A, B)
        u = dy @ (B @ A).mul_(W0)                                                   # (N, in)
        u = u if lift == 1 else u.div_(lift)
        dg = None if g is None else (x * u).sum(-1, keepdim=True, dtype=g.dtype)    # (N, 1)
        dx, masked = times(g, u), times(g, dy)                                      # (N, in), (N, out)
        dBA = (masked.T @ x).mul_(W0)                                               # (out, in), soft gradient masking
        dA, dB = B.T @ dBA, dBA @ A.T                                               # (r, in), (out, r)
        return dx, None, dA if lift == 1 else dA.float() / lift, dB, dg             # none for W0, which is frozen

    @staticmethod
    def prepare(x, W0, A, B):
        """W0, A and B in the dtype of x, and the lift: float16 has no numbers below 6e-8, and W0 ⊙ B A is as small early
        on, so there B is lifted by a power of two, which costs no precision, and what B made is divided by it."""
        lift = 64 if x.dtype == torch.float16 else 1
        return W0.to(x.dtype), A.to(x.dtype), (B if lift == 1 else B * lift).to(x.dtype), lift


class HiRA(LowRank):
    """Delta(x) = (W0 ⊙ B A) x (ICLR 2025): each entry of W0 scaled, which may have full rank; no factor s."""

    PEFT = {"peft_type": "HIRA"}, {"A": "hira_A", "B": "hira_B"}
    dense = None

    def forward(self, x: torch.Tensor, g: torch.Tensor | None, W0, **base) -> torch.Tensor:
        x = self.drop(x)
        if self.dense is None or torch.is_grad_enabled():  # a kept product has no gradient to A and B
            return GatedHadamard.apply(x, W0, self.A, self.B, g)                    # (N, out)
        return times(g, linear(x, self.dense))

    def product(self, W0: torch.Tensor) -> torch.Tensor:
        return W0 * (self.B @ self.A).to(W0.dtype)                                  # W0 ⊙ B A: (out, in)

    def merged(self, W0: torch.Tensor) -> torch.Tensor:
        return W0 + self.product(W0)                                                # W0 ⊙ (1 + B A): (out, in)


METHODS = {"lora": LoRA, "dora": DoRA, "hira": HiRA}


# ----------------------------------------------------------------------------------------------- in a whole model

def inject_adapters(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Freezes `model` and replaces each targeted nn.Linear by a GatedLinear around the same weight, in place.

    Returns the names of the adapted layers. Raises UserError for a target that names no layer, a rank larger than the
    smaller side of a matrix, and a model that has adapters. Order: load the base, inject, load an adapter, compile.
    """
    if gated_layers(model):
        raise UserError("the model already has adapters; merge them or load the base again")
    if unwrapped(model) is not model:
        raise UserError(f"the model is inside a {type(model).__name__}; inject the adapters before that")
    layers = find_layers(model, config.targets, config.r)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, GatedLinear(layer, config))
    model.adapter_config = config
    return list(layers)


def gated_layers(model: nn.Module) -> dict[str, GatedLinear]:
    """{name: layer} of the adapted layers, gated or not, in the order of the blocks."""
    return {name: layer for name, layer in unwrapped(model).named_modules() if isinstance(layer, GatedLinear)}


def adapter_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of everything that trains, and nothing else."""
    return {f"{name}.{leaf}": p for name, layer in gated_layers(model).items()
            for leaf, p in layer.named_parameters() if leaf not in ("weight", "bias")}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the gates, which may want a learning rate of their own."""
    return [p for layer in gated_layers(model).values() if layer.gate is not None for p in layer.gate.parameters()]


def gate_entropy(model: nn.Module, mask: torch.Tensor | None = None) -> torch.Tensor:
    """L_ent = -(1/N) sum [ g log g + (1 - g) log(1 - g) ], in nats, over the N gates of the last forward, one for each
    token and adapted layer (GateRA, entropy regularisation). Small where g is near 0 or 1, ln 2 = 0.693 at g = 1/2.

    From z, where g = sigmoid(z), it is exact and needs no clamp: H(z) = softplus(z) - z sigmoid(z). For large z the two
    cancel, so it is taken at -|z|, as H(z) = H(-z).
    mask (B, T): True where a token is real. Returns a scalar; 0 for a model without gates. UserError in training if that
    forward kept no graph of the gates: the term would have no gradient, and nobody would notice.
    """
    if isinstance(model, nn.DataParallel) and gate_parameters(model):
        raise UserError("DataParallel's copies keep their gates to themselves; use DistributedDataParallel (torchrun)")
    gated = [layer for layer in gated_layers(model).values() if layer.gate_logit is not None]
    if not gated:
        return torch.zeros((), device=next(model.parameters()).device)
    if torch.is_grad_enabled() and any(layer.training and not layer.gate_logit.requires_grad
                                       and any(p.requires_grad for p in layer.gate.parameters()) for layer in gated):
        raise UserError("the entropy of these gates has no gradient: their forward ran under no_grad, or inside "
                        "reentrant checkpointing, which has to be use_reentrant=False")
    logits = [layer.gate_logit for layer in gated]
    if len({z.shape for z in logits}) > 1:  # as where a head reads the last token alone, or an expert some tokens
        if mask is not None:
            raise UserError("the gated layers read different tokens, and one mask cannot fit all; expected no mask")
        logits = [torch.cat([z.flatten() for z in logits])[:, None]]                # (N, 1)
    a = torch.cat(logits, dim=-1).abs()                                             # (B, T, gates)
    H = (F.softplus(-a) + a * torch.sigmoid(-a)).mean(-1)                           # (B, T)
    return H.mean() if mask is None else (H * mask).sum() / mask.sum()


def gate_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """{layer name: g (B, T)} of the last forward; empty for a model without gates."""
    return {name: torch.sigmoid(layer.gate_logit.detach()).squeeze(-1)
            for name, layer in gated_layers(model).items() if layer.gate_logit is not None}


@contextmanager
def temporarily(modules, name: str, values):
    """Each module has another value in its attribute `name`, for as long as the `with` lasts."""
    before = [getattr(module, name) for module in modules]
    try:
        for module, value in zip(modules, values):
            setattr(module, name, value)
        yield
    finally:
        for module, value in zip(modules, before):
            setattr(module, name, value)


def adapters_off(model: nn.Module):
    """`with adapters_off(model):` it computes as its base."""
    return temporarily(gated_layers(model).values(), "enabled", repeat(False))


def gate_context(model: nn.Module, **context):
    """`with gate_context(model, position=position):` gates can read, beside x, the position of each token, or whatever else
    they ask for. With checkpointing, the backward belongs into the `with` too: it runs the gates once more."""
    return temporarily(gated_layers(model).values(), "context", repeat(context))


def cached_products(model: nn.Module):
    """`with cached_products(model):` the dense products W0 ⊙ B A, for updates that make one, are kept: for decoding under
    no_grad, where a token's product with one is r times cheaper than making it. Costs a copy of the weights."""
    layers = [layer for layer in gated_layers(model).values() if hasattr(layer.update, "product")]
    with torch.no_grad():
        products = [layer.update.product(layer.weight) for layer in layers]
    return temporarily([layer.update for layer in layers], "dense", products)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Folds ungated adapters into the base weights, in place: each GatedLinear becomes an nn.Linear again.

    Load the base in float32 for it: bfloat16 rounds HiRA's 1 + B A to 1 where B A is below 0.004, and a warning says how
    much of an update got lost. UserError where no one weight serves every token, as with a gate.
    """
    model = unwrapped(model)
    layers, lost = gated_layers(model), 0.0         # the largest share of a layer's update that was rounded off
    for name, layer in layers.items():
        if layer.gate is not None:
            raise UserError(f"a gated adapter cannot be merged: its weight differs from token to token ({name}); gatera "
                            "runs it in transformers' model, README: 'In transformers'")
        if not hasattr(layer.update, "merged"):
            raise UserError(f"{model.adapter_config.method} cannot be merged: it is not one weight for all tokens")
    for layer in layers.values():
        W0 = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))  # (out, in)
        W = layer.update.merged(W0)
        rounded = W.to(layer.weight.dtype)
        lost = max(lost, ((rounded - W).norm() / (W - W0).norm().clamp(min=1e-30)).item())
        layer.weight = nn.Parameter(rounded, requires_grad=False)
    remove_adapters(model)
    untie_head(model)
    if lost > 0.05:
        warnings.warn(f"merging into {rounded.dtype} rounded off up to {100 * min(lost, 1):.0f} % of a layer's update; "
                      "load the base in float32")


def remove_adapters(model: nn.Module) -> None:
    """Puts an nn.Linear with the present weight back in the place of each adapted layer."""
    for name, layer in gated_layers(model).items():
        base = nn.Linear(*layer.weight.shape[::-1], bias=layer.bias is not None, device="meta")
        base.weight, base.bias = layer.weight, layer.bias
        model.set_submodule(name, base)
    model.adapter_config = None


# ------------------------------------------------------------------------------------------------------ on disk

def save_adapter(model: nn.Module, directory) -> None:
    """Writes adapter.safetensors (the adapter's tensors alone) and adapter.json (its AdapterConfig)."""
    if not gated_layers(model):
        raise UserError("the model has no adapter to save")
    write_adapter(Path(directory), asdict(unwrapped(model).adapter_config), adapter_state(model))


def load_adapter(model: nn.Module, directory) -> AdapterConfig:
    """Injects the adapter that `save_adapter`, `export_peft` or peft itself wrote to `directory` into a base model, ours
    or a Llama of transformers, or overwrites the values of an adapter already there.

    Strict: UserError names missing, surplus and misshapen tensors, broken files, and settings of peft that no
    AdapterConfig expresses; a base that refuses an adapter stays as it was.
    """
    peft = {name: method.PEFT for name, method in METHODS.items() if hasattr(method, "PEFT")}
    file, config, tensors = read_adapter(Path(directory), AdapterConfig, peft_layers(model), peft)
    fresh = not gated_layers(model)
    if not fresh and (other := unwrapped(model).adapter_config) != config:
        raise UserError(f"{file}: the model already has another adapter ({other})")
    try:
        if fresh:
            inject_adapters(model, config)
        fill(adapter_state(model), tensors)
    except UserError as error:
        if fresh:
            remove_adapters(model)
        raise UserError(f"{file}: {error}") from None
    return config


def export_peft(model: nn.Module, directory) -> None:
    """Writes an ungated adapter as adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained.

    UserError for a gated adapter, as peft would drop the gate without a word, and for a method that peft does not have."""
    model, layers = unwrapped(model), gated_layers(model)
    if not layers:
        raise UserError("the model has no adapter to export")
    config, method = model.adapter_config, METHODS[model.adapter_config.method]
    if config.gate != "none":
        raise UserError(f"a {config.gate} gate cannot be exported: peft has no gates and would drop it silently; "
                        "gatera runs it in transformers' model, README: 'In transformers'")
    if not hasattr(method, "PEFT"):
        raise UserError(f"{config.method} cannot be exported: peft has no such method")
    adapter = {name: dict(layer.update.named_parameters()) for name, layer in layers.items()}
    weights = {name: model.get_submodule(name).weight for names in peft_layers(model).values() for name in names}
    write_peft(Path(directory), adapter, peft_layers(model), weights, method.PEFT, config.r, config.scaling,
               config.dropout, getattr(model, "hub_id", getattr(model, "name_or_path", None)))


if __name__ == "__main__":
    raise SystemExit("gatera.py is the method, to be read and imported; try `python train.py --preset quickstart`")
