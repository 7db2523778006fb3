"""Names of layers, ours and transformers'.

Ours are the same for GPT-2 and Llama: blocks.0.attn.q_proj, blocks.0.mlp.up_proj, head. transformers calls them
transformer.h.0.attn.c_attn (q, k and v in one), transformer.h.0.mlp.c_fc and lm_head in GPT-2, and in Llama
model.layers.0.self_attn.q_proj, model.layers.0.mlp.up_proj and lm_head.
"""

GPT2_NAMES = {"wte": "embed", "wpe": "position_embed", "ln_f": "norm", "ln_1": "attn_norm", "ln_2": "mlp_norm",
              "attn.c_proj": "attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
LLAMA_NAMES = {"embed_tokens": "embed", "norm": "norm", "input_layernorm": "attn_norm",
               "post_attention_layernorm": "mlp_norm", "self_attn": "attn", "mlp": "mlp"}


def hugging_face_name(name: str, config) -> str:
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


def transformers_names(names: list[str], config) -> dict[str, list[str]]:
    """{transformers' name of a layer: ours}; in a model of transformers, which has another config, both are the same."""
    layers = {}
    for name in names:
        theirs = hugging_face_name(name, config) if hasattr(config, "positions") else name
        layers.setdefault(theirs, []).append(name)
    return layers


def llama_name(name: str) -> str:
    """Our name of a layer of a Llama, or the end of one -> transformers'; all other names stay."""
    name = f".{name}."
    for ours, theirs in ((".blocks.", ".model.layers."), (".attn.", ".self_attn."), (".head.", ".lm_head.")):
        name = name.replace(ours, theirs)
    return name[1:-1]


def whole_name(name: str) -> str:
    """The name of a layer or tensor in transformers' LlamaForCausalLM, given its name there, in ours, in a LlamaModel
    without a head, or in blocks that torch.compile has wrapped; other names stay."""
    name = llama_name(name.replace("_orig_mod.", ""))
    return f"model.{name}" if name.startswith("layers.") else name


def ends_in(name: str, end: str) -> bool:
    """Whether a layer's name is `end`, or ends in it behind a dot."""
    return f".{name}".endswith(f".{end}")


def ends(chosen: list[str], names: list[str]) -> list[str]:
    """The shortest ends of names that mean the chosen ones of all `names`, and no other: q_proj, mlp.c_proj, ..."""
    others, found = set(names) - set(chosen), []
    for name in chosen:
        words = name.split(".")
        candidates = [".".join(words[i:]) for i in reversed(range(len(words)))]
        found.append(next((end for end in candidates if not any(ends_in(other, end) for other in others)), name))
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    import data  # noqa: F401  (data.py, which says what to run instead)
