"""One transformer, written from scratch, that is GPT-2 or Llama depending on its config.

    python -c "from model import *; print(Transformer.from_pretrained('smollm2-135m'))"

Both families are the same residual stream with attention and an MLP per block:

    x = x + attention(norm(x));   x = x + mlp(norm(x))

and `TransformerConfig` names every place where they differ. GPT-2 (Radford et al. 2019) and Llama
(Touvron et al., arXiv 2302.13971) share one set of layer names here: q_proj, k_proj, v_proj, o_proj,
up_proj, down_proj, so that the adapters of gatera.py mean the same in both. Llama has one more,
`gate_proj`, the gate of its SwiGLU MLP: it is a frozen base weight and not the gate of the GateRA paper.

Order of this file: config, the transformer, generation; then what a first reading can leave out: weights in Hugging
Face's layout, .gguf files, tokenizer, and back to Hugging Face's layout.

Shapes: B rows, T tokens a row, C = d_model, H query heads, K key/value heads, S = head_dim, V vocabulary.
A batch is B rows, or one packed row: D documents, of up to L tokens, end to end without padding, N tokens together. A
token's place is its index in the row, its position the index in its document.
"""
import json
import math
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from data.download import UserError, fetch_model, read_json, reading, shards, smollm2_135m


# ---------------------------------------------------------------------------------------------- config

def is_number(value, least: float, most: float) -> bool:
    """Whether `value`, which may come from a file and be anything, is a number from `least` to `most`; nan is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


@dataclass
class TransformerConfig:
    vocab_size: int
    n_layer: int                     # blocks
    n_head: int
    d_model: int                     # width of the residual stream
    d_ff: int                        # width of the MLP
    max_len: int                     # longest document seen in pretraining
    n_kv_head: int = 0               # grouped-query attention (arXiv 2305.13245); 0: as many as n_head
    head_dim: int = 0                # 0: d_model / n_head
    # where the families differ:              Llama            GPT-2
    norm: str = "rmsnorm"            #        rmsnorm          layernorm
    norm_eps: float = 1e-5
    positions: str = "rotary"        #        rotary           learned
    mlp: str = "swiglu"              #        swiglu           gelu (its tanh approximation)
    attention_bias: bool = False     #        False            True
    mlp_bias: bool = False           #        False            True
    tied_head: bool = False          #        small models     True: the head is the embedding, transposed
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None # Llama 3.1's frequencies, see `inverse_frequencies`

    def __post_init__(self):
        # Sizes end beyond those of any model: a damaged config must not make one that fills the memory.
        most = dict(vocab_size=2**20, n_layer=2**10, n_head=2**12, d_model=2**20, d_ff=2**20, max_len=2**31,
                    n_kv_head=2**12, head_dim=2**12)
        for name, value in vars(self).items():
            if name in most:
                least = 0 if name in ("n_kv_head", "head_dim") else 1
                fine = isinstance(value, int) and is_number(value, least, most[name])
                expected = f"a positive whole number up to {most[name]}"
            elif name in ("norm_eps", "rope_theta"):
                least, greatest = (0, 1) if name == "norm_eps" else (1, 1e12)
                fine, expected = is_number(value, least, greatest), f"a number from {least} to {greatest}"
            elif name in ("attention_bias", "mlp_bias", "tied_head"):
                fine, expected = isinstance(value, bool), "true or false"
            else:
                continue
            if not fine:
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.d_model // self.n_head
        if not self.head_dim:
            raise ValueError(f"d_model is {self.d_model}, expected a channel or more for each of {self.n_head} heads")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads do not divide into {self.n_kv_head} key/value heads")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, and rotary positions turn pairs of channels")
        scaling = {name: value for name, value in (self.rope_scaling or {}).items() if name != "rope_type"}
        numbers = scaling.get("factors") or list(scaling.values())
        if not all(is_number(value, 1e-12, 1e12) for value in numbers):
            raise ValueError(f"rope_scaling is {scaling}, expected positive numbers")
        if "factors" in scaling and len(numbers) != self.head_dim // 2:
            raise ValueError(f"{len(numbers)} rotation speeds, expected {self.head_dim // 2}")

    @classmethod
    def from_name(cls, name: str) -> "TransformerConfig":
        """The config of a published model (`CONFIGS`). Raises UserError for a name that is not there."""
        if name not in CONFIGS:
            raise UserError(f"no config named '{name}'; known: {', '.join(CONFIGS)}")
        return cls(**CONFIGS[name])


def _gpt2(n_layer, n_head, d_model):
    return dict(vocab_size=50257, n_layer=n_layer, n_head=n_head, d_model=d_model, d_ff=4 * d_model, max_len=1024,
                norm="layernorm", positions="learned", mlp="gelu", attention_bias=True, mlp_bias=True, tied_head=True)


_LLAMA_31_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192)
_LLAMA_3 = dict(vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, max_len=8192,
                rope_theta=500000.0)
_LLAMA_32 = dict(vocab_size=128256, n_kv_head=8, d_ff=8192, max_len=131072, rope_theta=500000.0, tied_head=True,
                 rope_scaling=_LLAMA_31_ROPE | {"factor": 32.0})
CONFIGS = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "smollm2-135m": dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536, max_len=8192,
                         rope_theta=100000.0, tied_head=True),
    "llama-2-7b": dict(vocab_size=32000, n_layer=32, n_head=32, d_model=4096, d_ff=11008, max_len=4096),
    "llama-3-8b": _LLAMA_3,
    "llama-3.1-8b": _LLAMA_3 | dict(max_len=131072, rope_scaling=_LLAMA_31_ROPE),
    "llama-3.2-1b": _LLAMA_32 | dict(n_layer=16, n_head=32, d_model=2048),
    "llama-3.2-3b": _LLAMA_32 | dict(n_layer=28, n_head=24, d_model=3072),
}


# --------------------------------------------------------------------------------------------- positions

def inverse_frequencies(config: TransformerConfig, device=None) -> torch.Tensor:
    """The rotation speed of each pair of channels, (S/2,), in radians a token.

    RoPE (arXiv 2104.09864, section 3.2.2): theta_i = rope_theta^(-2i / S). Llama 3.1 slows the slow ones by `factor`,
    leaves the fast ones, and blends in between (Llama 3 report, arXiv 2407.21783; Meta's reference code).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    theta = 1.0 / (config.rope_theta ** exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return theta
    if scaling["rope_type"] == "factors":  # llama.cpp stores the finished divisors instead of their recipe
        return theta / torch.tensor(scaling["factors"], device=device)
    wavelength = 2 * math.pi / theta  # tokens a turn
    turns = scaling["original_max_position_embeddings"] / wavelength  # turns in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * theta / scaling["factor"] + smooth * theta
    return torch.where(turns < low, theta / scaling["factor"], torch.where(turns > high, theta, blended))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns channel pair (i, i + S/2) of x (B, T, H, S) by its token's angle; cos, sin (B, T, 1, S)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ------------------------------------------------------------------------------------------- transformer

class Flow(NamedTuple):
    """What every block needs to know about the tokens beside their activations."""
    rotary: tuple | None        # cos, sin: (B, T, 1, S)
    # For a packed row. Prompt [a b] with answers [c d] and [e f] is the row "a b c e" (an answer's last token is not
    # read) and the documents [[0 1 2], [0 1 3]]. Attention works on D * L cells, the rest of the model on the row:
    grid: torch.Tensor | None   # (D, L) row -> cells: the documents above; cells past an end hold any token
    cell: torch.Tensor | None   # (N,)   cells -> row: a cell that holds each token, [0 1 2 5] or [3 4 2 5] above
    lengths: torch.Tensor | None  # (D,) on a CPU, where documents lie end to end and share nothing: one by one, no grid
    cache: "KVCache | None"


class KVCache:
    """Keys and values of the tokens seen so far, for decoding: a pair of (B, max_len, K, S) for each layer, in which
    the token at position p has slot p."""

    def __init__(self, config: TransformerConfig, batch: int, max_len: int, dtype, device):
        shape = (batch, max_len, config.n_kv_head, config.head_dim)
        self.layers = [[torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"] for _ in range(config.n_layer)]
        self.rows = torch.arange(batch, device=device)[:, None]
        self.max_len, self.mask, self.positions = max_len, None, None

    def at(self, positions: torch.Tensor) -> "KVCache":
        """Makes ready for the next tokens, at `positions` (B, T): each sees the slots up to its own."""
        self.positions = positions
        slots = torch.arange(self.max_len, device=positions.device)
        self.mask = slots <= positions[:, None, :, None]                                      # (B, 1, T, max_len)
        return self

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Puts k and v (B, T, K, S) of the next tokens into their slots. Returns all of the layer's keys and values."""
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[self.rows, self.positions] = new.to(kept.dtype)
        return self.layers[layer]

    def take(self, rows: torch.Tensor, start: int = 0):
        """Row i goes on from what row rows[i] has seen; slots before `start` are the same in both."""
        for layer in self.layers:
            for i, kept in enumerate(layer):
                if len(rows) == len(kept):
                    kept[:, start:] = kept[rows, start:]
                else:
                    layer[i] = kept[rows]
        self.rows = torch.arange(len(rows), device=rows.device)[:, None]


def make_norm(config: TransformerConfig) -> nn.Module:
    # layernorm: (x - mean) / sqrt(var + eps) * weight + bias        rmsnorm: x / sqrt(mean(x^2) + eps) * weight
    return {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[config.norm](config.d_model, eps=config.norm_eps)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(S)) v (arXiv 1706.03762, equation 1), causal without a mask. q (B, T, H, S), k and v
    (B, T, K, S): H / K query heads share a key/value head (arXiv 2305.13245). Returns (B, T, H, S)."""
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))                  # (B, heads, T, S)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


@torch.compiler.disable  # other lengths would be another graph for each batch
def attend_by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`attend` for each document of a packed row (1, N, heads, S) in turn: on a CPU, quicker than a padded grid."""
    documents = zip(*(z.split(lengths.tolist(), dim=1) for z in (q, k, v)))
    return torch.cat([attend(*document) for document in documents], dim=1)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, config.n_head, config.n_kv_head, config.head_dim
        q_dim, kv_dim, bias = config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.d_model, q_dim, bias=bias)
        self.k_proj = nn.Linear(config.d_model, kv_dim, bias=bias)
        self.v_proj = nn.Linear(config.d_model, kv_dim, bias=bias)
        self.o_proj = nn.Linear(q_dim, config.d_model, bias=bias)

    def forward(self, x: torch.Tensor, flow: Flow) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)     # (B, T, H, S)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)  # (B, T, K, S)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        if flow.rotary is not None:
            q, k = rotate(q, *flow.rotary), rotate(k, *flow.rotary)
        if flow.cache is not None:
            k, v = flow.cache.update(self.layer, k, v)                # (B, max_len, K, S)
        if flow.lengths is not None:
            return self.o_proj(attend_by_document(q, k, v, flow.lengths).flatten(2))
        if flow.grid is not None:                                     # one packed row -> (D, L, heads, S)
            q, k, v = (z[0][flow.grid] for z in (q, k, v))
        y = attend(q, k, v, None if flow.cache is None else flow.cache.mask).flatten(2)   # (B, T, H * S)
        if flow.grid is not None:                                     # (D, L, H * S) -> one packed row, (1, N, H * S)
            y = y.flatten(0, 1)[flow.cell][None]
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        if self.swiglu:
            self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)  # SwiGLU's, not GateRA's
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        if self.swiglu:  # arXiv 2002.05202: W_down (silu(W_gate x) * W_up x)
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)

    def forward(self, x: torch.Tensor, flow: Flow) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), flow)
        return x + self.mlp(self.mlp_norm(x))


class Recomputing:
    """`now` is True while a checkpointed block runs for the second time, in the backward. A layer that keeps something
    of its forward, as GatedLinear its gate, must not keep that one's: its graph would hold the block's activations, and
    save no memory."""
    now = False


@contextmanager
def recomputation():
    Recomputing.now = True
    try:
        yield
    finally:
        Recomputing.now = False


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embed = nn.Embedding(config.max_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight
        self.gradient_checkpointing = False  # recompute each block in the backward instead of keeping its activations

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None, documents: torch.Tensor | None = None,
                select: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """Next-token logits.

        ids        (B, T) token ids. Rows are independent; pad short rows on the right, nothing looks to the right.
        positions  (B, T) position of each token in its document; the default counts from 0 in each document.
        documents  (D, L) packs D documents into one row, B = 1: documents[d, t] is the place in the row of token t
                   of document d, -1 past its end. A document sees itself alone. Documents may share tokens at
                   their start: the choices of a question share its prompt, which is then computed once.
        select     (M,) the places, in the B * T tokens, whose logits are wanted; None: all of them.
        cache      keys and values of earlier tokens; `positions` are then required, and say which slots to fill.
        Returns (M, V), or (B, T, V) without `select`. Raises ValueError where shapes do not fit together.
        """
        config, (B, T) = self.config, ids.shape
        lengths = grid = cell = None
        if documents is not None:
            if B != 1 or cache is not None:
                raise ValueError(f"documents pack one row without a cache; got {B} rows, cache {cache is not None}")
            # The inverse of the grid: cell d * L + t for the token in it. Cells past a document's end (-1) write to
            # a spare place, T; cells that share a token hold the same result, and any of them will do.
            cells = torch.arange(documents.numel(), device=ids.device)
            cell = cells.new_zeros(T + 1).scatter_(0, torch.where(documents < 0, T, documents).flatten(), cells)[:T]
            # Cells past an end hold any token, as nothing sees them, but not all the same one: in the backward, all
            # their gradients would queue for that one on a GPU.
            grid = torch.where(documents < 0, cells.view_as(documents) % T, documents)
            if documents.device.type == "cpu" and not torch.compiler.is_compiling():
                end_to_end = torch.equal(documents[documents >= 0], torch.arange(T))
                lengths = (documents >= 0).sum(1) if end_to_end else None
            if positions is None:
                positions = (cell % documents.shape[1])[None]
        elif positions is None:
            if cache is not None:
                raise ValueError("a cache needs positions: the slot of each token")
            positions = torch.arange(T, device=ids.device).expand(B, T)
        if config.positions == "learned" and (documents if documents is not None else ids).shape[1] > config.max_len:
            raise ValueError(f"a document is longer than the {config.max_len} positions this model has learned")

        x = self.embed(ids)                                                        # (B, T, C)
        rotary = None
        if config.positions == "learned":
            x = x + self.position_embed(positions)
        else:  # angles in float32 whatever the model's dtype: bf16 cannot count to 1000
            angles = positions[..., None].float() * inverse_frequencies(config, ids.device)  # (B, T, S/2)
            angles = torch.cat((angles, angles), dim=-1)[:, :, None]               # (B, T, 1, S)
            rotary = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        flow = Flow(rotary, grid, cell, lengths, None if cache is None else cache.at(positions))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, flow, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputation()))
            else:
                x = block(x, flow)
        if select is not None:
            x = x.flatten(0, 1)[select]                                            # (M, C)
        return self.head(self.norm(x))

    # --------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, stop: int | None = None,
                 temperature: float = 0.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> list[list[int]]:
        """Continues each prompt (token ids, lengths may differ) by up to `max_new_tokens`, with a KV cache.

        temperature 0 takes the likeliest token; above 0 samples from softmax(logits / temperature), from the
        `top_k` likeliest if given, by a `generator` of the model's device. Returns the new ids, without `stop`.
        Raises ValueError for an empty prompt, one that leaves no room, or settings out of range.
        """
        if temperature < 0 or top_k is not None and top_k < 1:
            raise ValueError(f"temperature {temperature}, top_k {top_k}: out of range")
        ids, lengths, last, positions, cache = self._start(prompts, max_new_tokens)
        device = ids.device
        out, done = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            logits = self(ids, positions=positions, cache=cache, select=last).float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)[:, 0]
            out.append(new)
            if stop is not None:
                done |= new == stop
                if done.all():
                    break
            ids, positions = new[:, None], (lengths + step)[:, None]    # from here on, a row is one token
            last = torch.arange(len(prompts), device=device)
        rows = torch.stack(out, dim=1).tolist() if out else [[] for _ in prompts]
        return [row[:row.index(stop)] if stop in row else row for row in rows]

    @torch.no_grad()
    def beam_search(self, prompts: list[list[int]], max_new_tokens: int, stop: int | None = None,
                    beams: int = 4) -> list[list[int]]:
        """Continues each prompt by the likeliest text that keeping the `beams` best at every step finds.

        A step extends every open text by every token. Of the results, ranked by their sum of log p, those that end in
        `stop` are finished if they are among the first `beams`; the first `beams` others stay open. Finished texts
        compete by log p per token, `stop` counted. A prompt is done when it has `beams` of them and its best open text
        is, per token so far, no better than the worst; what is open after the last step counts as finished. These are
        the rules of transformers' generate(num_beams=beams), which the papers call. Arguments, result and errors as
        in `generate`; every prompt is searched on its own, whatever it is batched with.
        """
        if beams < 1:
            raise ValueError(f"beams {beams}: expected 1 or more")
        ids, lengths, last, positions, cache = self._start(prompts, max_new_tokens)
        P, V, shortest = len(prompts), self.config.vocab_size, int(lengths.min())
        rows = torch.arange(P * beams, device=ids.device)
        sums = torch.full((P, beams), -math.inf, device=ids.device)
        sums[:, 0] = 0                                    # at first there is one open text, the empty one
        texts = [[[]] * beams for _ in prompts]           # the open texts of each prompt, best first
        finished = [[] for _ in prompts]                  # (log p per token, text), best first, at most `beams`
        done = [False] * P
        for step in range(max_new_tokens):
            log_p = F.log_softmax(self(ids, positions=positions, cache=cache, select=last).float(), dim=-1)
            if step == 0:                                 # the prompt was computed once; from here on, a row a text
                log_p, lengths = log_p.repeat_interleave(beams, 0), lengths.repeat_interleave(beams)
                cache.take(rows // beams)
            total = (sums.view(-1, 1) + log_p).view(P, beams * V)
            # 2 * beams: should `beams` of them end in stop, there are still as many to go on with
            scores, indices = (best.tolist() for best in total.topk(min(2 * beams, beams * V)))   # (P, 2 * beams) each
            parents, tokens, kept = [], [], []
            for p in range(P):
                open_texts = []                           # (sum of log p, row it continues, text)
                for rank, (score, index) in enumerate(zip(scores[p], indices[p])):
                    if score == -math.inf:
                        break
                    text = texts[p][index // V] + [index % V]
                    if text[-1] != stop and step + 1 < max_new_tokens:
                        open_texts.append((score, p * beams + index // V, text))
                    elif rank < beams and not done[p]:
                        finished[p].append((score / len(text), text))
                finished[p] = sorted(finished[p], key=lambda pair: -pair[0])[:beams]
                open_texts = (open_texts + [(-math.inf, p * beams, [0])] * beams)[:beams]  # fewer: small vocabularies
                done[p] |= len(finished[p]) == beams and open_texts[0][0] / (step + 1) <= finished[p][-1][0]
                texts[p] = [text for _, _, text in open_texts]
                kept.append([score for score, _, _ in open_texts])
                parents += [row for _, row, _ in open_texts]
                tokens += [text[-1] for _, _, text in open_texts]
            if all(done):
                break
            cache.take(torch.tensor(parents, device=ids.device), shortest)
            sums = torch.tensor(kept, device=ids.device)
            ids, positions, last = torch.tensor(tokens, device=ids.device)[:, None], (lengths + step)[:, None], rows
        best = [pairs[0][1] if pairs else [] for pairs in finished]
        return [text[:-1] if text[-1:] == [stop] else text for text in best]

    def _start(self, prompts: list[list[int]], max_new_tokens: int):
        """Prompts for the first step of a generation: padded ids (B, T), lengths (B,), the place of each prompt's last
        token in the B * T, positions (B, T), and a cache with room for all that follows."""
        if not prompts or not all(prompts):
            raise ValueError("generation needs at least one prompt, each with at least one token")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens {max_new_tokens}: expected 0 or more")
        device, lengths = self.embed.weight.device, torch.tensor([len(p) for p in prompts])
        total = int(lengths.max()) + max_new_tokens
        if total > self.config.max_len:
            raise ValueError(f"{int(lengths.max())} prompt and {max_new_tokens} new tokens exceed the context of "
                             f"{self.config.max_len}")
        # Rows are padded on the right. A pad's key sits in a slot that no real token sees until a generated
        # token has overwritten it, so neither masks nor positions know of padding.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
        lengths = lengths.to(device)
        cache = KVCache(self.config, len(prompts), total, self.blocks[0].attn.k_proj.weight.dtype, device)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        last = torch.arange(len(prompts), device=device) * ids.shape[1] + lengths - 1
        return ids, lengths, last, positions, cache

    # ------------------------------------------------------------------------------- pretrained weights

    @classmethod
    def from_pretrained(cls, name_or_path: str, dtype: torch.dtype | None = None, device=None) -> "Transformer":
        """A model with its pretrained weights, in `dtype` (default float32) on `device` (default CPU), in eval mode.

        name_or_path: gpt2, gpt2-medium, gpt2-large, gpt2-xl; smollm2-135m (from the package index); a hub id of
        GPT-2 or Llama architecture; a local directory in Hugging Face layout; a .gguf file of Llama architecture.
        Loading is strict: UserError names the missing, surplus and misshapen weights, or a file that is broken.
        """
        path = find_model(name_or_path)
        config, weights = read_gguf(path) if path.suffix == ".gguf" else read_directory(path)
        with torch.device("meta"):
            model = cls(config)  # shapes alone; each weight gets its memory when it is read
        load_weights(model, weights, dtype or torch.float32, torch.device(device or "cpu"), path)
        model.name_or_path = str(name_or_path)
        return model.eval()


def compile_blocks(model: Transformer) -> None:
    """torch.compile for each block, in place: all blocks share one graph, which takes seconds where the graph of a
    whole model takes minutes. After `inject_adapters`, as the graph holds the adapters."""
    for block in model.blocks:
        block.compile(dynamic=True)


# ---------------------------------------------------------------------- weights in Hugging Face's layout

def find_model(name_or_path: str) -> Path:
    """The local file or directory of a model, downloaded if need be (data/download.py)."""
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and path.is_file() or path.is_dir():
        return path
    if name_or_path == "smollm2-135m":
        return smollm2_135m()
    if path.suffix == ".gguf" or path.is_absolute() or name_or_path[:1] in (".", "~") or name_or_path.count("/") > 1:
        raise UserError(f"{name_or_path}: no such model file or directory")
    if path.is_file():
        raise UserError(f"{name_or_path}: neither a directory nor a .gguf file")
    return fetch_model(f"openai-community/{name_or_path}" if name_or_path.startswith("gpt2") else name_or_path)


def load_weights(model: nn.Module, weights, dtype: torch.dtype, device: torch.device, source) -> None:
    """Puts (name, tensor) pairs into a model on the meta device, one at a time, checking every name and shape."""
    missing = {name for name, _ in model.named_parameters()}  # a tied head is listed once, as embed.weight
    wrong = []
    for name, tensor in weights:
        if name not in missing:
            wrong.append(f"unexpected {name}")
            continue
        missing.remove(name)
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        expected = getattr(module, leaf).shape
        if tensor.shape != expected:
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(expected)}")
            continue
        setattr(module, leaf, nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False))
    wrong += [f"missing {name}" for name in sorted(missing)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{source}: the weights do not fit the config: {'; '.join(wrong[:4])}{more}")
    if model.config.tied_head:
        model.head.weight = model.embed.weight


def read_directory(directory: Path):
    """Config and weights, as (name, tensor) pairs, of a directory in Hugging Face layout."""
    config, family = directory_config(directory)
    index = directory / "model.safetensors.index.json"
    files = shards(index) if index.exists() else [directory / "model.safetensors"]
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: not found; only safetensors are read (pickled .bin files can run code)")

    def weights():
        rename = gpt2_weights if family == "gpt2" else llama_weights
        for file in files:
            with reading(file), safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    yield from rename(key, tensors.get_tensor(key), config)
    return config, weights()


def directory_config(directory: Path) -> tuple[TransformerConfig, str]:
    """The config and the family, gpt2 or llama, of a directory in Hugging Face layout."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}/config.json: not found; a model directory needs config.json, *.safetensors and "
                        "tokenizer files")
    raw = read_json(directory / "config.json")
    family = raw.get("model_type")
    if family not in ("gpt2", "llama"):
        raise UserError(f"{directory}: architecture '{family}' is not supported; gpt2 and llama are")
    with reading(directory / "config.json"):
        try:
            return gpt2_config(raw) if family == "gpt2" else llama_config(raw), family
        except KeyError as error:
            raise UserError(f"field {error} is missing") from None
        except ValueError as error:
            raise UserError(str(error)) from None


def read_config(name_or_path: str) -> TransformerConfig:
    """The config alone of a published model (`CONFIGS`), a directory, of which config.json is enough, or a .gguf file.
    Downloads nothing and reads no weights."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return directory_config(path)[0]
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf(path)[0]
    return TransformerConfig.from_name(name_or_path)


def _require(raw: dict, **allowed):
    """Refuses settings of a config.json that this transformer does not compute."""
    for field, values in allowed.items():
        if field in raw and raw[field] not in values:
            raise ValueError(f"{field} = {raw[field]!r} is not supported; expected {' or '.join(map(repr, values))}")


def gpt2_config(raw: dict) -> TransformerConfig:
    _require(raw, activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
             scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,), tie_word_embeddings=(True,))
    d_model = raw["n_embd"]
    return TransformerConfig(
        vocab_size=raw["vocab_size"], n_layer=raw["n_layer"], n_head=raw["n_head"], d_model=d_model,
        d_ff=raw.get("n_inner") or 4 * d_model, max_len=raw["n_positions"], norm="layernorm",
        norm_eps=raw.get("layer_norm_epsilon", 1e-5), positions="learned", mlp="gelu", attention_bias=True,
        mlp_bias=True, tied_head=True)


def llama_config(raw: dict) -> TransformerConfig:
    _require(raw, hidden_act=("silu",))
    rope = raw.get("rope_parameters")  # since transformers 5; two fields before
    rope = rope or (raw.get("rope_scaling") or {}) | {"rope_theta": raw.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope scaling '{kind}' is not supported; expected 'default' or 'llama3'")
    scaling = None
    if kind == "llama3":
        scaling = {"rope_type": "llama3"} | {key: rope[key] for key in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    return TransformerConfig(
        vocab_size=raw["vocab_size"], n_layer=raw["num_hidden_layers"], n_head=raw["num_attention_heads"],
        n_kv_head=raw.get("num_key_value_heads") or 0, head_dim=raw.get("head_dim") or 0, d_model=raw["hidden_size"],
        d_ff=raw["intermediate_size"], max_len=raw["max_position_embeddings"], norm_eps=raw["rms_norm_eps"],
        attention_bias=raw.get("attention_bias") or False, mlp_bias=raw.get("mlp_bias") or False,
        tied_head=raw.get("tie_word_embeddings") or False, rope_theta=rope.get("rope_theta", 10000.0),
        rope_scaling=scaling)


GPT2_NAMES = {"wte": "embed", "wpe": "position_embed", "ln_f": "norm", "ln_1": "attn_norm", "ln_2": "mlp_norm",
              "attn.c_proj": "attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
LLAMA_NAMES = {"embed_tokens": "embed", "norm": "norm", "input_layernorm": "attn_norm",
               "post_attention_layernorm": "mlp_norm", "self_attn": "attn", "mlp": "mlp"}


def split_block(key: str, blocks: str) -> tuple[str, str]:
    """A name without its block: "h.3.mlp.c_fc.weight", whose `blocks` is "h." -> "blocks.3.", "mlp.c_fc.weight"."""
    if not key.startswith(blocks):
        return "", key
    _, number, rest = key.split(".", 2)
    return f"blocks.{number}.", rest


def gpt2_weights(key: str, tensor: torch.Tensor, config: TransformerConfig):
    """Hugging Face's GPT-2 names -> ours. Its Conv1D keeps (in, out): transposed. Its c_attn is q, k, v: split."""
    key = key.removeprefix("transformer.")
    if key.endswith((".attn.bias", ".attn.masked_bias")) or key == "lm_head.weight":
        return  # the causal mask, stored as if it were a weight; the head is the embedding
    prefix, key = split_block(key, "h.")
    key, _, kind = key.rpartition(".")
    if key.startswith(("attn.", "mlp.")) and kind == "weight":
        tensor = tensor.t()
    if key == "attn.c_attn":
        for name, part in zip("qkv", tensor.chunk(3)):
            yield f"{prefix}attn.{name}_proj.{kind}", part.contiguous()
    else:
        yield f"{prefix}{GPT2_NAMES.get(key, key)}.{kind}", tensor.contiguous()


def llama_weights(key: str, tensor: torch.Tensor, config: TransformerConfig):
    """Hugging Face's Llama names -> ours."""
    if key.endswith("rotary_emb.inv_freq") or key == "lm_head.weight" and config.tied_head:
        return  # computed from the config; the embedding
    prefix, key = split_block(key.removeprefix("model.").replace("lm_head", "head"), "layers.")
    first, dot, rest = key.partition(".")
    yield f"{prefix}{LLAMA_NAMES.get(first, first)}{dot}{rest}", tensor


# ------------------------------------------------------------------------------------------- .gguf files

GGUF_NAMES = {"token_embd": "embed", "output_norm": "norm", "output": "head", "attn_norm": "attn_norm",
              "ffn_norm": "mlp_norm", "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj",
              "attn_output": "attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj"}


def read_gguf(path: Path):
    """Config and weights, as (name, tensor) pairs, of a .gguf file; quantised weights are dequantised."""
    from gguf.quants import dequantize
    reader = open_gguf(path)
    field = partial(gguf_field, reader, path)
    family = field("general.architecture")
    if family != "llama":
        raise UserError(f"{path}: architecture '{family}' is not supported in .gguf files; llama is")
    if field("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"{path}: rope scaling '{field('llama.rope.scaling.type')}' is not supported in .gguf files")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    get = lambda tensor: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())  # noqa: E731
    with reading(path):
        n_head, scaling = field("llama.attention.head_count"), None
        if "rope_freqs.weight" in tensors:
            scaling = {"rope_type": "factors", "factors": get(tensors.pop("rope_freqs.weight")).tolist()}
        if "token_embd.weight" not in tensors:
            raise UserError("the tensor token_embd.weight is missing")
        config = TransformerConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[1]), n_layer=field("llama.block_count"), n_head=n_head,
            n_kv_head=field("llama.attention.head_count_kv", n_head), head_dim=field("llama.attention.key_length", 0),
            d_model=field("llama.embedding_length"), d_ff=field("llama.feed_forward_length"),
            max_len=field("llama.context_length"), norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
            tied_head="output.weight" not in tensors, rope_theta=field("llama.rope.freq_base", 10000.0),
            attention_bias="blk.0.attn_q.bias" in tensors, mlp_bias="blk.0.ffn_up.bias" in tensors,
            rope_scaling=scaling)

    def weights():
        for key, quantised in tensors.items():
            with reading(path):
                tensor = get(quantised)
                prefix, key = split_block(key, "blk.")
                name, _, kind = key.rpartition(".")
                if name in ("attn_q", "attn_k") and len(tensor) % config.head_dim == 0:
                    # llama.cpp keeps the two channels of a rotation next to each other, Hugging Face (and `rotate`)
                    # half a head apart: (heads, S/2, 2, in) -> (heads, 2, S/2, in)
                    shape = tensor.shape
                    tensor = tensor.view(-1, config.head_dim // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)
                yield f"{prefix}{GGUF_NAMES.get(name, name)}.{kind}", tensor
    return config, weights()


def gguf_field(reader, path: Path, key: str, *default):
    """A value of a .gguf file's metadata. UserError where there is none and no default, or where it is broken."""
    if key not in reader.fields and not default:
        raise UserError(f"{path}: the metadata has no {key}")
    with reading(path):
        return reader.fields[key].contents() if key in reader.fields else default[0]


def open_gguf(path: Path):
    """gguf's reader of a file. Weights and tokenizer come from the same one, and parsing it takes seconds: it is kept,
    as long as the file does not change."""
    return _open_gguf(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _open_gguf(path: Path, changed: int):
    from gguf import GGUFReader, GGUFValueType  # only those who use a .gguf pay for the import

    class Reader(GGUFReader):
        """gguf's, which reads on past a file's end: a damaged length would keep it busy until the memory is full."""

        def _get(self, offset, dtype, count=1, override_order=None):
            found = GGUFReader._get(self, offset, dtype, count, override_order)
            if not found.size and count:
                raise ValueError(f"there is nothing at byte {offset}, where {count} values should be")
            return found

        def _get_field_parts(self, offset, kind, *more):
            if kind == GGUFValueType.ARRAY and self._get(offset + 4, "uint64")[0] > 2**20:
                raise ValueError(f"a list at byte {offset} is longer than any vocabulary")
            return super()._get_field_parts(offset, kind, *more)

    with reading(path):
        return Reader(path)


# --------------------------------------------------------------------------------------------- tokenizer

# Byte-pair encoding (BPE) cuts a text into words, then merges the bytes of each word, pair by pair, into tokens. How
# words are cut is a property of each tokenizer, by llama.cpp's name for it:
SPLIT = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Tokenizer:
    """Text <-> token ids, by tiktoken. `encode` treats all text as text: a special token's name has no power."""

    def __init__(self, name: str, split: str, ranks: dict[bytes, int], special: dict[str, int], eos: int | None,
                 bos: int | None = None):
        import tiktoken
        self.encoding = tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens=special)
        ids = [*ranks.values(), *(i for i in (eos, bos) if i is not None)]
        self.smallest, self.largest = min(ids), max(ids)
        self.split = split
        # some vocabularies have no token for bytes that their training text lacked (SmolLM2: 21 of the 256)
        self.tokenless = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self.special = special  # {name: id} of the tokens that no text encodes to
        self.eos = eos  # ends a text
        self.bos = bos  # stands before every text, in the models that were trained so (Llama 3); else None

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # half of a character, \ud800, becomes "?"
        drop = lambda piece: piece.encode().translate(None, self.tokenless)  # noqa: E731
        if not self.tokenless or len(drop(text)) == len(text.encode()):
            return self.encoding.encode_ordinary(text)
        # As Hugging Face does: bytes without a token vanish after the split into words and before the merges.
        # (tiktoken would abort.)
        import regex
        words = (drop(match.group()) for match in regex.finditer(self.split, text))
        return [i for word in words if word for i in self.encoding._encode_single_piece(word)]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer of a model (names as in `Transformer.from_pretrained`): byte-level BPE, from a .gguf file,
    tokenizer.json, or GPT-2's vocab.json + merges.txt. Raises UserError for any other kind, by name."""
    path = find_model(name_or_path)
    if path.suffix == ".gguf":
        file, load = path, gguf_tokenizer
    elif (path / "tokenizer.json").exists():
        file, load = path / "tokenizer.json", json_tokenizer
    else:
        file, load = path / ("vocab.json" if (path / "vocab.json").exists() else "encoder.json"), gpt2_tokenizer
    with reading(file):
        tokenizer, size = load(file)
        # else some later step would ask for a row of the embedding that is not there
        if tokenizer.smallest < 0 or tokenizer.largest >= size:
            raise UserError(f"ids from {tokenizer.smallest} to {tokenizer.largest}, but the model has a vocabulary of "
                            f"{size}: not its tokenizer")
    return tokenizer


def json_tokenizer(file: Path) -> tuple[Tokenizer, int]:
    """A tokenizer.json's tokenizer, and the size of the vocabulary that its model has."""
    raw, directory = read_json(file), file.parent
    model, steps = raw.get("model", {}), raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if model.get("type") != "BPE" or kinds[-1:] != ["ByteLevel"] or raw.get("normalizer"):
        raise UserError(f"{file}: not byte-level BPE without a normalizer (model {model.get('type')}, splits {kinds}); "
                        "SentencePiece tokenizers, such as Llama 2's, are not supported")
    first, last = steps[0], steps[-1]
    if last.get("add_prefix_space") or first.get("behavior", "Isolated") != "Isolated" or first.get("invert"):
        raise UserError(f"{file}: add_prefix_space, and splits that are inverted or not 'Isolated', are not supported")
    if kinds == ["ByteLevel"]:
        split = SPLIT["gpt-2"]
    elif kinds == ["Digits", "ByteLevel"] and first.get("individual_digits"):
        split = SPLIT["smollm"]
    elif kinds == ["Split", "ByteLevel"] and "Regex" in first["pattern"] and not last.get("use_regex", True):
        split = first["pattern"]["Regex"]
    else:
        raise UserError(f"{file}: this way of splitting words is not supported: {kinds}")
    special = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    ranks = byte_ranks(model.get("vocab", {}), set(special), model.get("merges", []), file)
    settings = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (directory / name).exists():
            settings |= read_json(directory / name)
    eos = settings.get("eos_token") or settings.get("eos_token_id")  # a name, a named dict, an id or a list of ids
    eos = eos[0] if isinstance(eos, list) else eos.get("content") if isinstance(eos, dict) else eos
    eos = special.get(eos, eos if isinstance(eos, int) else None)
    after = raw.get("post_processor") or {}
    templates = [step for step in after.get("processors", [after]) if step.get("type") == "TemplateProcessing"]
    bos = templates[0]["single"][0].get("SpecialToken", {}).get("id") if templates else None
    return Tokenizer(directory.name, split, ranks, special, eos, special.get(bos)), model_vocabulary(directory)


def gpt2_tokenizer(vocab: Path) -> tuple[Tokenizer, int]:
    merges = vocab.with_name("merges.txt" if vocab.name == "vocab.json" else "vocab.bpe")
    if not vocab.exists() or not merges.exists():
        model = vocab.with_name("tokenizer.model").exists()
        kind = "; it has a SentencePiece model, which is not byte-level BPE" if model else ""
        raise UserError(f"{vocab.parent}: no tokenizer.json, nor vocab.json with merges.txt{kind}")
    vocabulary, end = read_json(vocab), "<|endoftext|>"
    special = {end: vocabulary[end]} if end in vocabulary else {}
    lines = merges.read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    ranks = byte_ranks(vocabulary, set(special), lines, merges)
    return Tokenizer("gpt2", SPLIT["gpt-2"], ranks, special, special.get(end)), model_vocabulary(vocab.parent)


def model_vocabulary(directory: Path) -> int | float:
    """The vocab_size in config.json; without limit for a tokenizer that is on its own."""
    config = directory / "config.json"
    return read_json(config).get("vocab_size", math.inf) if config.exists() else math.inf


def gguf_tokenizer(file: Path) -> tuple[Tokenizer, int]:
    get = partial(gguf_field, open_gguf(file), file)
    kind, split = get("tokenizer.ggml.model", None), get("tokenizer.ggml.pre", None)
    if kind != "gpt2" or split not in SPLIT:
        raise UserError(f"{file}: tokenizer '{kind}' with splits '{split}' is not supported; expected 'gpt2' with "
                        f"one of {', '.join(SPLIT)}")
    NORMAL = 1  # gguf's type of a token that text can encode to
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    special = {token: i for i, (token, type_) in enumerate(zip(tokens, types)) if type_ != NORMAL}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranks = byte_ranks(vocabulary, set(special), get("tokenizer.ggml.merges"), file)
    add_bos = get("tokenizer.ggml.add_bos_token", split == "llama-bpe")  # llama.cpp's default
    bos = get("tokenizer.ggml.bos_token_id") if add_bos else None
    eos = get("tokenizer.ggml.eos_token_id", None)
    return Tokenizer(file.stem, SPLIT[split], ranks, special, eos, bos), len(tokens)


def byte_ranks(vocabulary: dict[str, int], special: set[str], merges: list, file: Path) -> dict[bytes, int]:
    """{token as bytes: id}. tiktoken first merges the pair whose token has the lowest id; that is the order of
    `merges` ("a b" or [a, b]) in every byte-level BPE file we know, and UserError for one where it is not."""
    symbols = byte_symbols()
    try:
        ranks = {bytes(symbols[c] for c in token): i for token, i in vocabulary.items() if token not in special}
        merged = [vocabulary["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in merges]
    except KeyError as error:
        raise UserError(f"{file}: not byte-level BPE: {error} is not in its alphabet or vocabulary") from None
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{file}: two tokens of its vocabulary have the same id")
    if merged != sorted(merged):
        raise UserError(f"{file}: its merges are not in the order of their tokens' ids, which is not supported")
    return ranks


def byte_symbols() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each of the 256 bytes. Bytes without one get chr(256), ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ------------------------------------------------------------------------- back to Hugging Face's layout

def hugging_face_name(name: str, config: TransformerConfig) -> str:
    """Our name of a layer or weight -> Hugging Face's (GPT2_NAMES, LLAMA_NAMES). GPT-2's q, k and v share c_attn."""
    gpt2 = config.positions == "learned"
    if name.startswith("head"):
        return f"lm_{name}"
    prefix = "transformer." if gpt2 else "model."
    if name.startswith("blocks."):
        _, layer, name = name.split(".", 2)
        prefix += f"{'h' if gpt2 else 'layers'}.{layer}."
    names = [(ours, theirs) for theirs, ours in (GPT2_NAMES if gpt2 else LLAMA_NAMES).items()]
    names += [(f"attn.{part}_proj", "attn.c_attn") for part in "qkv" if gpt2]
    return next(prefix + theirs + name[len(ours):] for ours, theirs in names if f"{name}.".startswith(f"{ours}."))


def hugging_face_state(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights under Hugging Face's names and in its shapes; a tied head is there once, as the embedding."""
    parts = {}  # GPT-2's c_attn has three
    for name, tensor in model.named_parameters():
        theirs = hugging_face_name(name, model.config)
        if theirs.startswith("transformer.h.") and tensor.dim() == 2:
            tensor = tensor.t()  # Conv1D keeps (in, out)
        parts.setdefault(theirs, []).append(tensor)
    return {name: (torch.cat(several, -1) if len(several) > 1 else several[0]).contiguous()
            for name, several in parts.items()}


TOKENIZER_FILES = ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")


def save_pretrained(model: Transformer, directory, source: str) -> None:
    """Writes `model` to `directory` in Hugging Face layout: config.json, model.safetensors and tokenizer files.

    source: the model it was made from, as in `from_pretrained`; its tokenizer and the rest of its config go along.
    Raises UserError while the model has adapters (merge them first), and for a target that is the source itself.
    """
    source, directory = find_model(str(source)), Path(directory)
    if getattr(model, "adapter_config", None) is not None:
        raise UserError("the model has adapters, which Hugging Face's layout has no place for; merge them first")
    if directory.resolve() == source.resolve() or directory.is_file():
        kind = "a file" if directory.is_file() else "the base"
        raise UserError(f"{directory}: cannot write a model here, it is {kind}")
    directory.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".gguf":
        raw = write_gguf_tokenizer(source, directory) | llama_fields(model.config, source)
    else:
        raw = read_json(source / "config.json")
        for old in TOKENIZER_FILES:
            new = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.get(old, old)
            if (source / old).exists():
                shutil.copyfile(source / old, directory / new)
    tensors = {name: tensor.detach().cpu() for name, tensor in hugging_face_state(model).items()}
    raw.pop("dtype", None)
    raw["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    raw["tie_word_embeddings"] = "lm_head.weight" not in tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def llama_fields(config: TransformerConfig, source: Path) -> dict:
    """The config.json of a Llama that came without one: `llama_config`, backwards."""
    if config.rope_scaling is not None:
        raise UserError(f"{source}: holds the finished divisors of its rotation speeds, and a config.json wants their "
                        "recipe; export from the model's Hugging Face files instead")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim, "hidden_size": config.d_model,
            "intermediate_size": config.d_ff, "max_position_embeddings": config.max_len,
            "rms_norm_eps": config.norm_eps, "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias, "rope_theta": config.rope_theta}


def write_gguf_tokenizer(file: Path, directory: Path) -> dict:
    """A .gguf file's tokenizer as tokenizer.json and tokenizer_config.json. Returns the ids that config.json names."""
    get = partial(gguf_field, open_gguf(file), file)
    tokenizer, tokens = load_tokenizer(file), get("tokenizer.ggml.tokens")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.split}, "behavior": "Isolated", "invert": False}
    steps = {"gpt-2": [byte_level], "smollm": [{"type": "Digits", "individual_digits": True}, byte_level],
             "llama-bpe": [split, byte_level | {"use_regex": False}]}[get("tokenizer.ggml.pre")]
    special = [{"id": i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for token, i in tokenizer.special.items()]
    first = None  # the token that stands before every text
    if tokenizer.bos is not None:
        name = tokens[tokenizer.bos]
        single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        first = {"type": "TemplateProcessing", "single": single,
                 "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
                 "special_tokens": {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]}}}
    (directory / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": first, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": get("tokenizer.ggml.pre") == "llama-bpe",
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": get("tokenizer.ggml.merges")}},
        ensure_ascii=False), encoding="utf-8")
    ids = {name: get(f"tokenizer.ggml.{key}_token_id", None) for name, key in (
        ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    settings = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": get("llama.context_length"),
                 "clean_up_tokenization_spaces": False, "chat_template": get("tokenizer.chat_template", None)}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {f"{name}_token_id": i for name, i in ids.items() if name != "unk" and i is not None}
