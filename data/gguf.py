"""llama.cpp's .gguf files: config and weights by our names, and the fields that a tokenizer is made of.

The format's keys are listed in llama.cpp's gguf documentation; what they mean for Llama is in its model loader.
"""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.files import UserError, reading

GGUF_NAMES = {"token_embd": "embed", "output_norm": "norm", "output": "head", "attn_norm": "attn_norm",
              "ffn_norm": "mlp_norm", "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj",
              "attn_output": "attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj"}
# Keys under "llama." that are read, or that change nothing of what is computed. Any other one has to be off.
KNOWN = set("""block_count context_length embedding_length feed_forward_length vocab_size tensor_data_layout
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.finetuned rope.scale_linear""".split())


def split_block(key: str, blocks: str) -> tuple[str, str]:
    """A name without its block: "h.3.mlp.c_fc.weight", whose `blocks` is "h." -> "blocks.3.", "mlp.c_fc.weight"."""
    if not key.startswith(blocks):
        return "", key
    _, number, rest = key.split(".", 2)
    return f"blocks.{number}.", rest


class GGUF:
    """An open .gguf file. `get` reads its metadata; `fields` and `weights` are what model.py makes a model of."""

    def __init__(self, path: Path):
        self.path = path
        # Weights and tokenizer come from the same file, and parsing it takes seconds: the last one is kept, as long as
        # it does not change.
        self.reader = parse_gguf(path, path.stat().st_mtime_ns)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def get(self, key: str, *default):
        """A value of the metadata. UserError where there is none and no default, or where it is broken."""
        if key not in self.reader.fields and not default:
            raise UserError(f"{self.path}: the metadata has no {key}")
        with reading(self.path):
            return self.reader.fields[key].contents() if key in self.reader.fields else default[0]

    def tensor(self, name: str) -> torch.Tensor:
        """A weight; quantised ones are dequantised. UserError for a type that holds no real numbers, by name."""
        from gguf.quants import dequantize  # only those who use a .gguf pay for the import
        stored = self.tensors[name]
        if stored.data.dtype not in (np.uint8, np.float16, np.float32, np.float64):  # uint8: quantised, in blocks
            raise UserError(f"{name} holds {stored.tensor_type.name}; expected floating-point or quantised numbers")
        if stored.data.dtype == np.float64:
            return torch.from_numpy(stored.data.copy())
        return torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())

    def fields(self) -> dict:
        """The fields of a TransformerConfig. UserError, by name, for what it cannot express."""
        if (family := self.get("general.architecture")) != "llama":
            raise UserError(f"{self.path}: architecture '{family}' is not supported in .gguf files; llama is")
        with reading(self.path):
            self.refuse_unread()
            n_head, d_model = self.get("llama.attention.head_count"), self.get("llama.embedding_length")
            head_dim = self.get("llama.attention.key_length", d_model // n_head)
            for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
                if self.get(key, head_dim) != head_dim:
                    raise UserError(f"{key} is {self.get(key)}, expected the head's {head_dim} channels")
            if "token_embd.weight" not in self.tensors:
                raise UserError("the tensor token_embd.weight is missing")
            return dict(
                vocab_size=self.rows(), n_layer=self.get("llama.block_count"), n_head=n_head,
                n_kv_head=self.get("llama.attention.head_count_kv", n_head), head_dim=head_dim, d_model=d_model,
                d_ff=self.get("llama.feed_forward_length"), max_len=self.get("llama.context_length"),
                norm_eps=self.get("llama.attention.layer_norm_rms_epsilon"),
                tied_head="output.weight" not in self.tensors,
                rope_theta=self.get("llama.rope.freq_base", 10000.0), rope_scaling=self.rope_scaling(),
                attention_bias="blk.0.attn_q.bias" in self.tensors, mlp_bias="blk.0.ffn_up.bias" in self.tensors)

    def rows(self) -> int:
        """Rows of the embedding, which is the model's vocabulary."""
        return int(self.tensors["token_embd.weight"].shape[1])

    def refuse_unread(self) -> None:
        """UserError for metadata that would change what the model computes, and that nothing here reads."""
        if self.get("split.count", 0) > 1:
            raise UserError(f"one of {self.get('split.count')} parts of a model; join them first, with llama.cpp's "
                            "llama-gguf-split --merge")
        for key in self.reader.fields:
            value = self.get(key) if key.startswith("llama.") else None
            if isinstance(value, list) and key.removeprefix("llama.") in KNOWN:
                raise UserError(f"{key} differs from layer to layer; expected one number for all")
            if value and key.removeprefix("llama.") not in KNOWN:
                raise UserError(f"{key} = {value!r} is not supported")

    def rope_scaling(self) -> dict | None:
        """By what each rotation speed is divided: finished divisors in the file, or one factor for all of them, which
        older files name without a type, or `scale_linear`."""
        kind = self.get("llama.rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise UserError(f"rope scaling '{kind}' is not supported in .gguf files; linear is")
        factor = self.get("llama.rope.scaling.factor", 0) or self.get("llama.rope.scale_linear", 0) or 1
        factor = 1 if kind == "none" else factor
        if "rope_freqs.weight" in self.tensors:
            return {"rope_type": "factors", "factors": (factor * self.tensor("rope_freqs.weight")).tolist()}
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}

    def weights(self, head_dim: int):
        """(name, tensor) pairs by our names."""
        for key in self.tensors:
            if key == "rope_freqs.weight":  # see rope_scaling
                continue
            with reading(self.path):
                tensor = self.tensor(key)
                prefix, rest = split_block(key, "blk.")
                name, _, kind = rest.rpartition(".")
                if name in ("attn_q", "attn_k") and len(tensor) % head_dim == 0:
                    # llama.cpp keeps the two channels of a rotation next to each other, Hugging Face and our model half
                    # a head apart: (heads, S/2, 2, in) -> (heads, 2, S/2, in)
                    shape = tensor.shape
                    tensor = tensor.view(-1, head_dim // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)
            yield f"{prefix}{GGUF_NAMES.get(name, name)}.{kind}", tensor


@lru_cache(maxsize=1)
def parse_gguf(path: Path, changed: int):
    """gguf's reader of a file; `changed` is the time of its last change."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        """gguf's, which reads on past a file's end: a damaged length would keep it busy until the memory is full."""

        def _get(self, offset, dtype, count=1, override_order=None):
            self.data = np.asarray(self.data)  # not as a memmap, whose slices take three times as long
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
