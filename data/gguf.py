"""llama.cpp's .gguf files: config and weights by our names, and what a tokenizer is made of."""
from functools import lru_cache, partial
from pathlib import Path

import torch

from data.files import UserError, reading

GGUF_NAMES = {"token_embd": "embed", "output_norm": "norm", "output": "head", "attn_norm": "attn_norm",
              "ffn_norm": "mlp_norm", "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj",
              "attn_output": "attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj"}


def split_block(key: str, blocks: str) -> tuple[str, str]:
    """A name without its block: "h.3.mlp.c_fc.weight", whose `blocks` is "h." -> "blocks.3.", "mlp.c_fc.weight"."""
    if not key.startswith(blocks):
        return "", key
    _, number, rest = key.split(".", 2)
    return f"blocks.{number}.", rest


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
        config = dict(
            vocab_size=int(tensors["token_embd.weight"].shape[1]), n_layer=field("llama.block_count"), n_head=n_head,
            n_kv_head=field("llama.attention.head_count_kv", n_head), head_dim=field("llama.attention.key_length", 0),
            d_model=field("llama.embedding_length"), d_ff=field("llama.feed_forward_length"),
            max_len=field("llama.context_length"), norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
            tied_head="output.weight" not in tensors, rope_theta=field("llama.rope.freq_base", 10000.0),
            attention_bias="blk.0.attn_q.bias" in tensors, mlp_bias="blk.0.ffn_up.bias" in tensors,
            rope_scaling=scaling)
        head_dim = config["head_dim"] or config["d_model"] // n_head

    def weights():
        for key, quantised in tensors.items():
            with reading(path):
                tensor = get(quantised)
                prefix, key = split_block(key, "blk.")
                name, _, kind = key.rpartition(".")
                if name in ("attn_q", "attn_k") and len(tensor) % head_dim == 0:
                    # llama.cpp keeps the two channels of a rotation next to each other, Hugging Face (and `rotate`)
                    # half a head apart: (heads, S/2, 2, in) -> (heads, 2, S/2, in)
                    shape = tensor.shape
                    tensor = tensor.view(-1, head_dim // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)
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
