"""What the fields of a TransformerConfig may hold, which may come from a damaged file. What each means stands in
model.py."""
from data.files import is_number

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
