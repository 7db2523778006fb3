"""Configs: the fields of published models, and what the fields of any config may hold. What each field means stands in
model.py's TransformerConfig."""
from data.files import is_number


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


# Sizes end beyond those of any model: a damaged config must not make one that fills the memory.
LARGEST = dict(vocab_size=2**20, n_layer=2**10, n_head=2**12, d_model=2**20, d_ff=2**20, max_len=2**31, n_kv_head=2**12,
               head_dim=2**12)


def check_config(fields: dict) -> None:
    """ValueError for fields that no model can have; n_kv_head and head_dim may be 0 for their defaults."""
    for name, value in fields.items():
        if name in LARGEST:
            least = 0 if name in ("n_kv_head", "head_dim") else 1
            fine = isinstance(value, int) and is_number(value, least, LARGEST[name])
            expected = f"a positive whole number up to {LARGEST[name]}"
        elif name in ("norm_eps", "rope_theta"):
            least, greatest = (0, 1) if name == "norm_eps" else (1, 1e12)
            fine, expected = is_number(value, least, greatest), f"a number from {least} to {greatest}"
        elif name in ("attention_bias", "mlp_bias", "tied_head"):
            fine, expected = isinstance(value, bool), "true or false"
        else:
            continue
        if not fine:
            raise ValueError(f"{name} is {value!r}, expected {expected}")

    d_model, n_head = fields["d_model"], fields["n_head"]
    n_kv_head, head_dim = fields["n_kv_head"] or n_head, fields["head_dim"] or d_model // n_head
    if not head_dim:
        raise ValueError(f"d_model is {d_model}, expected a channel or more for each of {n_head} heads")
    if n_head % n_kv_head:
        raise ValueError(f"{n_head} query heads do not divide into {n_kv_head} key/value heads")
    if fields["positions"] == "rotary" and head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, and rotary positions turn pairs of channels")
    scaling = {name: value for name, value in (fields["rope_scaling"] or {}).items() if name != "rope_type"}
    numbers = scaling.get("factors") or list(scaling.values())
    if not all(is_number(value, 1e-12, 1e12) for value in numbers):
        raise ValueError(f"rope_scaling is {scaling}, expected positive numbers")
    if "factors" in scaling and len(numbers) != head_dim // 2:
        raise ValueError(f"{len(numbers)} rotation speeds, expected {head_dim // 2}")
