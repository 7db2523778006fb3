"""One transformer, written from scratch, that is GPT-2 or Llama depending on its config.

    python -c "from model import *; print(Transformer.from_pretrained('smollm2-135m'))"

Both families are the same residual stream with attention and an MLP per block:

    x = x + attention(norm(x));   x = x + mlp(norm(x))

and `TransformerConfig` names every place where they differ. GPT-2 (Radford et al. 2019) and Llama
(Touvron et al., arXiv 2302.13971) share one set of layer names here: q_proj, k_proj, v_proj, o_proj,
up_proj, down_proj, so that the adapters of gatera.py mean the same in both. Llama has one more,
`gate_proj`, the gate of its SwiGLU MLP: it is a frozen base weight and not the gate of the GateRA paper.

Order of this file: config, the transformer, generation, pretrained weights.

Shapes: B rows, T tokens a row, C = d_model, H query heads, K key/value heads, S = head_dim, V vocabulary, M tokens whose
logits are wanted. A batch is B rows, or one packed row: D documents, of up to L tokens, end to end without padding, N
tokens together, so that T = N. A token has a place in its row, a position in its document, and while decoding a slot in
the cache. UserError is for a user's input, ValueError for a caller's mistake.
"""
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.configs import check_config
from data.download import find_config, find_model, hub_id
from data.files import UserError, reading
from data.published import CONFIGS, HUB_IDS
from data.tokenizer import load_tokenizer  # noqa: F401  (other programs take it from here)
from data.weights import load_weights, read_fields, read_weights


# ---------------------------------------------------------------------------------------------- config

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
    rope_scaling: dict | None = None # linear, llama3, or factors (llama.cpp's), see `inverse_frequencies`

    def __post_init__(self):
        check_config(vars(self))
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.d_model // self.n_head

    @classmethod
    def from_name(cls, name: str) -> "TransformerConfig":
        """The config of a published model (data/published.py). Raises UserError for a name that is not there."""
        if name not in CONFIGS:
            raise UserError(f"no config named '{name}'; known: {', '.join(CONFIGS)}")
        return cls(**CONFIGS[name])


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
    if scaling["rope_type"] == "linear":
        return theta / scaling["factor"]
    if scaling["rope_type"] == "factors":  # llama.cpp stores the finished divisors instead of their recipe
        return theta / torch.tensor(scaling["factors"], device=device)
    wavelength = 2 * math.pi / theta  # tokens a turn
    turns = scaling["original_max_position_embeddings"] / wavelength  # turns in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * theta / scaling["factor"] + smooth * theta
    return torch.where(turns < low, theta / scaling["factor"], torch.where(turns > high, theta, blended))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns channel pair (i, i + S/2), as Hugging Face orders them, of x (B, T, H, S) by its token's angle; cos and sin are
    (B, T, 1, S)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ------------------------------------------------------------------------------------------- transformer

class Flow(NamedTuple):
    """What every block needs to know about the tokens beside their activations."""
    rotary: tuple | None        # cos, sin: (B, T, 1, S)
    # For a packed row. Prompt [a b] with answers [c d] and [e f] is the row "a b c e" (an answer's last token is not
    # read) and the documents [[0 1 2], [0 1 3]]. Attention works on D * L cells, cell d L + t for token t of document d,
    # the rest of the model on the row:
    grid: torch.Tensor | None   # (D, L) the place that fills each cell: the documents above; past an end, any place
    cell: torch.Tensor | None   # (N,)   a cell that holds each place's token, [0 1 2 5] or [3 4 2 5] above
    trees: "Trees | None"       # on a CPU, used instead of grid and cell
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
        """Row i goes on from what row rows[i] has seen. Their slots before `start` hold the same already."""
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
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and q.device.type != "cpu" and not (mask is None and q.element_size() == 2 and is_ampere(q.device)):
        k, v, shared = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1), 1
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1)
    return y.transpose(1, 2)


def is_ampere(device: torch.device) -> bool:
    """Whether flash attention runs there, the only quick kernel on GPUs that knows shared heads. It takes half precision
    and no mask; the others would compute the whole matrix of scores first."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


class Trees:
    """A packed row on a CPU as trees: documents that share their first token are the branches of one. A tree has a length
    and, if it has several branches, a mask (length, length): a token sees another one that is not later in the row, if
    some document holds both. `end_to_end`: whether the row is such a sequence of trees, with no more than filler behind."""

    def __init__(self, documents: torch.Tensor, T: int):
        holds = torch.zeros(len(documents), T + 1, dtype=torch.bool)
        holds = holds.scatter_(1, documents.where(documents >= 0, T), True)[:, :T]            # (D, T)
        branches = torch.unique_consecutive(documents[:, 0], return_counts=True)[1].tolist()
        self.lengths, self.masks, end = [], [], 0
        self.end_to_end = bool(((documents.diff() > 0) | (documents[:, 1:] < 0)).all())       # each document in order
        for tree in holds.split(branches):                                                    # (branches, T)
            start, end = end, end + int(tree.any(0).sum())
            tree = tree[:, start:end]
            self.lengths.append(end - start)
            self.masks.append(None if len(tree) == 1 else (tree[:, :, None] & tree[:, None]).any(0).tril())
            self.end_to_end &= bool(tree.any(0).all())
        self.filler = T - end

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`attend` for each tree in turn, q (1, N, H, S), k and v (1, N, K, S): quicker than a padded grid. In float32 or
        better, outside autocast: the backward of such small products takes five times longer in bfloat16."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            parts = zip(*(z.to(dtype).split([*self.lengths, self.filler], dim=1) for z in (q, k, v)), self.masks)
            y = torch.cat([attend(*qkv_and_mask) for qkv_and_mask in parts], dim=1)
            return F.pad(y, (0, 0, 0, 0, 0, self.filler)).to(q.dtype)


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
        if flow.trees is not None:
            return self.o_proj(flow.trees.attend(q, k, v).flatten(2))
        if flow.grid is not None:                                     # one packed row -> (D, L, heads, S)
            q, k, v = (z[0].index_select(0, flow.grid.flatten()).unflatten(0, flow.grid.shape) for z in (q, k, v))
        y = attend(q, k, v, None if flow.cache is None else flow.cache.mask).flatten(2)   # (B, T, H * S)
        if flow.grid is not None:                                     # (D, L, H * S) -> one packed row, (1, N, H * S)
            y = y.flatten(0, 1).index_select(0, flow.cell)[None]
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


@contextmanager
def recomputation(block: Block):
    """While a checkpointed block runs for the second time, in the backward. What GatedLinear keeps of a forward has to
    stay the first one's. It sees to that by itself, but not in a block that is compiled, whose one graph, for both, keeps
    it each time (PyTorch 2.7; 2.13 ends the second run before that): then it is put back here."""
    kept = [(layer, layer.gate_logit) for layer in block.modules() if hasattr(layer, "gate_logit")]
    try:
        yield
    finally:
        for layer, logit in kept:
            layer.gate_logit = logit


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
                   their start: the choices of a question share its prompt, which is then computed once. Places of
                   no document are filler, which nobody sees.
        select     (M,) the places, in the B * T tokens, whose logits are wanted; None: all of them.
        cache      keys and values of earlier tokens; `positions` are then required, and say which slots to fill.
        Returns (M, V), or (B, T, V) without `select`. Raises ValueError where shapes do not fit together.
        """
        config, (B, T) = self.config, ids.shape
        trees = grid = cell = None
        if documents is not None:
            if B != 1 or cache is not None:
                raise ValueError(f"documents pack one row without a cache; got {B} rows, cache {cache is not None}")
            # The inverse of the grid. Cells past a document's end (-1) write to a spare place, T; cells that share a
            # token hold the same result, and any of them will do.
            cells = torch.arange(documents.numel(), device=ids.device)
            cell = cells.new_zeros(T + 1).scatter_(0, torch.where(documents < 0, T, documents).flatten(), cells)[:T]
            # Cells past an end hold any token, as nothing sees them, but not all the same one: in the backward, all
            # their gradients would queue for that one on a GPU.
            grid = torch.where(documents < 0, cells.view_as(documents) % T, documents)
            if documents.device.type == "cpu" and not torch.compiler.is_compiling():
                trees = Trees(documents, T)
                trees = trees if trees.end_to_end else None
            if positions is None:
                positions = (cell % documents.shape[1])[None]                      # cell d L + t -> t
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
        else:  # angles in float32 whatever the model's dtype: bf16 has no 257
            angles = positions[..., None].float() * inverse_frequencies(config, ids.device)  # (B, T, S/2)
            angles = torch.cat((angles, angles), dim=-1)[:, :, None]               # (B, T, 1, S)
            rotary = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        flow = Flow(rotary, grid, cell, trees, None if cache is None else cache.at(positions))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, flow, use_reentrant=False,
                               context_fn=lambda block=block: (nullcontext(), recomputation(block)))
            else:
                x = block(x, flow)
        if select is not None:
            x = x.flatten(0, 1).index_select(0, select)                                          # (M, C)
        return self.head(self.norm(x))

    # --------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], max_new_tokens: int, never: list[int] = ()):
        """Greedy decoding with a KV cache, step by step: yields the likeliest next token of each prompt, (B,), first
        after all prompts (prefill), then after each of up to `max_new_tokens` new ones (decode): once more than there
        are new tokens, so that the last one is read too, and its gates can be looked at.

        Prompts are token ids; their lengths may differ. Ids in `never`, such as rows of the vocabulary that are no
        token, are not chosen. Raises ValueError for an empty prompt, and for one that leaves no room.
        """
        ids, lengths, last, positions, cache = self._start(prompts, max_new_tokens)
        for step in range(max_new_tokens + 1):
            logits = self(ids, positions=positions, cache=cache, select=last)       # (B, V)
            logits[:, list(never)] = -math.inf
            new = logits.argmax(-1)
            yield new
            ids, positions = new[:, None], (lengths + step)[:, None]                # from here on, a row is one token
            last = torch.arange(len(prompts), device=new.device)

    def generate(self, prompts: list[list[int]], max_new_tokens: int, stop: int | None = None,
                 never: list[int] = ()) -> list[list[int]]:
        """Continues each prompt by up to `max_new_tokens` as `decode` does, until all have come to the token `stop`.
        Returns the new ids, without `stop`."""
        rows = [[] for _ in prompts]
        for new in islice(self.decode(prompts, max_new_tokens, never), max_new_tokens):
            for row, token in zip(rows, new.tolist()):
                row.append(token)
            if all(stop in row for row in rows):
                break
        return [row[:row.index(stop)] if stop in row else row for row in rows]

    @torch.no_grad()
    def beam_search(self, prompts: list[list[int]], max_new_tokens: int, stop: int | None = None,
                    beams: int = 4, never: list[int] = ()) -> list[list[int]]:
        """Continues each prompt by the likeliest text that keeping the `beams` best at every step finds.

        A step extends every open text by every token. Of the results, ranked by their sum of log p, those that end in
        `stop` are finished if they are among the first `beams`; the first `beams` others stay open. Finished texts
        compete by log p per token, `stop` counted. A prompt is done when it has `beams` of them and its best open text
        is, per token so far, no better than the worst; what is open after the last step counts as finished. These are
        the rules of transformers' generate(num_beams=beams), as the papers use it. Arguments, result and errors as
        in `generate`; every prompt is searched on its own, whatever it is batched with.
        """
        if beams < 1:
            raise ValueError(f"beams {beams}: expected 1 or more")
        ids, lengths, last, positions, cache = self._start(prompts, max_new_tokens)
        P, V, shortest = len(prompts), self.config.vocab_size, min(map(len, prompts))
        rows = torch.arange(P * beams, device=ids.device)
        sums = torch.full((P, beams), -math.inf, device=ids.device)
        sums[:, 0] = 0                                    # at first there is one open text, the empty one
        texts = [[[]] * beams for _ in prompts]           # the open texts of each prompt, best first
        finished = [[] for _ in prompts]                  # (log p per token, text), best first, at most `beams`
        done = [False] * P
        for step in range(max_new_tokens):
            log_p = F.log_softmax(self(ids, positions=positions, cache=cache, select=last).float(), dim=-1)  # (rows, V)
            log_p[:, list(never)] = -math.inf
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
                # at the end, and with small vocabularies, fewer texts are open than there are beams
                open_texts = (open_texts + [(-math.inf, p * beams, [0])] * beams)[:beams]
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
        device, longest = self.embed.weight.device, max(map(len, prompts))
        total = longest + max_new_tokens
        if total > self.config.max_len:
            raise ValueError(f"{longest} prompt and {max_new_tokens} new tokens exceed the context of "
                             f"{self.config.max_len}")
        # Rows are padded on the right. A pad's key sits in a slot that no real token sees until a generated
        # token has overwritten it, so neither masks nor positions know of padding.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        cache = KVCache(self.config, len(prompts), total, self.blocks[0].attn.k_proj.weight.dtype, device)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        last = torch.arange(len(prompts), device=device) * ids.shape[1] + lengths - 1
        return ids, lengths, last, positions, cache

    # ------------------------------------------------------------------------------- pretrained weights

    @classmethod
    def from_pretrained(cls, name_or_path: str, dtype: torch.dtype | None = None, device=None) -> "Transformer":
        """A model with its pretrained weights, in `dtype` (default float32) on `device` (default CPU), in eval mode.

        name_or_path: a name in data/published.py (smollm2-135m comes from the package index, the others from the hub); a
        hub id of GPT-2 or Llama architecture; a local directory in Hugging Face layout; a .gguf file of Llama architecture.
        Loading is strict: UserError names the missing, surplus and misshapen weights, or a file that is broken.
        """
        config_of(find_model(name_or_path))             # refused, if at all, before its weights are downloaded
        path = find_model(name_or_path, weights=True)
        with torch.device("meta"):
            model = cls(config_of(path))  # shapes alone; each weight gets its memory when it is read
        weights = read_weights(path, model.config)
        load_weights(model, weights, dtype or torch.float32, torch.device(device or "cpu"), path)
        model.name_or_path, model.hub_id = str(name_or_path), hub_id(name_or_path)
        return model.eval()


def compile_blocks(model: Transformer) -> None:
    """torch.compile for each block, in place: all blocks share one graph, which takes seconds where the graph of a
    whole model takes minutes. After `inject_adapters`, as the graph holds the adapters."""
    Trees.attend = torch.compiler.disable(Trees.attend)  # other lengths would be another graph for each batch
    for block in model.blocks:
        block.compile(dynamic=True)


def read_config(name_or_path: str) -> TransformerConfig:
    """The config of a model (names as in `Transformer.from_pretrained`) without its weights: of a published one from
    the table, of any other from its files, of which config.json is enough."""
    published = {HUB_IDS[name]: name for name in CONFIGS}
    if hub_id(name_or_path) in published and not Path(name_or_path).exists():
        return TransformerConfig.from_name(published[hub_id(name_or_path)])
    return config_of(find_config(name_or_path))


def config_of(path: Path) -> TransformerConfig:
    """The config of a model's directory or .gguf file. UserError names the file and what is wrong with it."""
    with reading(path if path.suffix == ".gguf" else path / "config.json"):
        try:
            return TransformerConfig(**read_fields(path))
        except ValueError as error:
            raise UserError(str(error)) from None


if __name__ == "__main__":
    raise SystemExit("model.py is the transformer, to be read and imported; try `python train.py --preset quickstart`")
