"""Hugging Face's layout of a model <-> our names.

A model is a directory with config.json, *.safetensors and tokenizer files, or one .gguf file (data/gguf.py). Its config
becomes a dict of TransformerConfig's fields, its weights (name, tensor) pairs by the names of model.py. Whatever this
transformer does not compute is refused by name, and loading leaves no weight unread.
"""
import re
import shutil
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

from data.download import find_model
from data.files import UserError, expect_file, listed, read_json, reading, write_atomically, write_json
from data.gguf import GGUF, split_block
from data.hub import shards
from data.names import GPT2_NAMES, LLAMA_NAMES, hugging_face_name
from data.tokenizer import write_gguf_tokenizer

# ------------------------------------------------------------------------------------------------ the config


def read_fields(path: Path) -> dict:
    """The fields of a TransformerConfig that a model's files describe: a directory's config.json, or a .gguf file.
    UserError names the file, and what is missing or not supported."""
    if path.suffix == ".gguf":
        return GGUF(path).fields()
    raw = read_json(path / "config.json", "; a model directory needs config.json, *.safetensors and tokenizer files")
    with reading(path / "config.json"):
        try:
            return {"gpt2": gpt2_fields, "llama": llama_fields}[family(raw)](raw)
        except KeyError as error:
            raise UserError(f"field {error} is missing") from None


def family(raw: dict) -> str:
    """gpt2 or llama: what a config.json describes. The oldest ones of GPT-2 do not say so, but have its fields."""
    kind = raw.get("model_type")
    if kind is None and {"n_embd", "n_layer", "n_head", "vocab_size"} <= raw.keys():
        kind = "gpt2"
    if kind not in ("gpt2", "llama"):
        raise UserError(f"architecture '{kind}' is not supported here: gpt2 and llama are. In another one, adapters work "
                        "all the same: load it with transformers, and call gatera.inject_adapters on it")
    return kind


def require(raw: dict, **allowed):
    """Refuses settings of a config.json that this transformer does not compute."""
    for field, values in allowed.items():
        if field in raw and raw[field] not in values:
            raise UserError(f"{field} = {raw[field]!r} is not supported; expected {' or '.join(map(repr, values))}")


def gpt2_fields(raw: dict) -> dict:
    """Fields that are not there have transformers' defaults, here and in `llama_fields`; sizes have to be there."""
    require(raw, activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,), quantization_config=(None,))
    d_model = raw["n_embd"]
    return dict(
        vocab_size=raw["vocab_size"], n_layer=raw["n_layer"], n_head=raw["n_head"], d_model=d_model,
        d_ff=raw.get("n_inner") or 4 * d_model, max_len=raw.get("n_positions", 1024), norm="layernorm",
        norm_eps=raw.get("layer_norm_epsilon", 1e-5), positions="learned", mlp="gelu", attention_bias=True,
        mlp_bias=True, tied_head=raw.get("tie_word_embeddings", True))


def llama_fields(raw: dict) -> dict:
    require(raw, hidden_act=("silu",), partial_rotary_factor=(None, 1.0), quantization_config=(None,))
    max_len = raw.get("max_position_embeddings", 2048)
    return dict(
        vocab_size=raw["vocab_size"], n_layer=raw["num_hidden_layers"], n_head=raw["num_attention_heads"],
        n_kv_head=raw.get("num_key_value_heads") or 0, head_dim=raw.get("head_dim") or 0, d_model=raw["hidden_size"],
        d_ff=raw["intermediate_size"], max_len=max_len, norm_eps=raw.get("rms_norm_eps", 1e-6),
        attention_bias=raw.get("attention_bias") or False, mlp_bias=raw.get("mlp_bias") or False,
        tied_head=raw.get("tie_word_embeddings") or False, **rope_fields(raw, max_len))


def rope_fields(raw: dict, max_len: int) -> dict:
    """rope_theta and rope_scaling. `rope_parameters`, of transformers 5, holds both; before, there were two fields. Where
    a file has old and new ones, the old scaling counts, and the old theta where the new one is missing."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    require(rope, partial_rotary_factor=(None, 1.0))
    theta, kind = rope.get("rope_theta", raw.get("rope_theta", 10000.0)), rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": rope["factor"]}
    elif kind == "llama3":
        scaling = {"rope_type": "llama3"} | {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", max_len)
    else:
        raise UserError(f"rope scaling '{kind}' is not supported; expected default, linear or llama3")
    return {"rope_theta": theta, "rope_scaling": scaling}


# ----------------------------------------------------------------------------------------------- the weights

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_weights(path: Path, config):
    """(name, tensor) pairs of all weights in a directory or a .gguf file. config: the TransformerConfig of `path`."""
    if path.suffix == ".gguf":
        yield from GGUF(path).weights(config.head_dim)
        return
    file, index = path / "model.safetensors", path / "model.safetensors.index.json"
    for file in shards(index) if index.exists() and not file.exists() else [file]:
        expect_file(file, "; only safetensors are read (pickled .bin files can run code)")
        rename = gpt2_weights if config.positions == "learned" else llama_weights
        with reading(file), safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                yield from rename(key, tensors.get_tensor(key))


def gpt2_weights(key: str, tensor: torch.Tensor):
    """Hugging Face's GPT-2 names -> ours. Its Conv1D keeps (in, out): transposed. Its c_attn is q, k, v: split."""
    key = key.removeprefix("transformer.")
    if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", key):
        return  # the causal mask, stored as if it were a weight
    prefix, key = split_block(key, "h.")
    key, _, kind = key.rpartition(".")
    if key.startswith(("attn.", "mlp.")) and kind == "weight":
        tensor = tensor.t()
    if key == "attn.c_attn":
        for name, part in zip("qkv", tensor.chunk(3)):
            yield f"{prefix}attn.{name}_proj.{kind}", part.contiguous()
    else:
        yield f"{prefix}{GPT2_NAMES.get(key, key).replace('lm_head', 'head')}.{kind}", tensor.contiguous()


def llama_weights(key: str, tensor: torch.Tensor):
    """Hugging Face's Llama names -> ours."""
    if key.endswith("rotary_emb.inv_freq"):
        return  # computed from the config
    prefix, key = split_block(key.removeprefix("model.").replace("lm_head", "head"), "layers.")
    first, dot, rest = key.partition(".")
    yield f"{prefix}{LLAMA_NAMES.get(first, first)}{dot}{rest}", tensor


def load_weights(model: nn.Module, weights, dtype: torch.dtype, device: torch.device, source) -> None:
    """Puts (name, tensor) pairs into a model on the meta device, one at a time, checking every name, shape and value.

    A tied head that the file holds once more has to be equal to the embedding, else it is a head of its own, as in
    transformers. UserError names what is missing, surplus, misshapen or not made of finite numbers."""
    missing = {name for name, _ in model.named_parameters()}  # a tied head is listed once, as embed.weight
    wrong = []
    for name, tensor in weights:
        if name == "head.weight" and model.config.tied_head:
            missing.add(name)
            model.head.weight = nn.Parameter(torch.empty_like(model.embed.weight))
        if name not in missing:
            wrong.append(f"unexpected {name}")
            continue
        missing.remove(name)
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        expected = getattr(module, leaf).shape
        if tensor.dtype not in FLOATS:
            wrong.append(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, expected floating-point numbers")
        elif tensor.shape != expected:
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(expected)}")
        elif not tensor.isfinite().all():
            wrong.append(f"{name} holds nan or inf")
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False))
    wrong += [f"missing {name}" for name in sorted(missing)]
    if wrong:
        raise UserError(f"{source}: the weights do not fit the config: {listed(wrong)}")
    if model.config.tied_head:
        own = model.head.weight
        model.config.tied_head = own.is_meta or torch.equal(own, model.embed.weight)
        if model.config.tied_head:
            model.head.weight = model.embed.weight


# ------------------------------------------------------------------------- back to Hugging Face's layout

def hugging_face_state(model: nn.Module) -> dict[str, torch.Tensor]:
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


def save_pretrained(model: nn.Module, directory, source: str) -> None:
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
        raw = write_gguf_tokenizer(source, directory) | llama_json(model.config, source)
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
    write_atomically(directory / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    write_json(directory / "config.json", raw)  # last: without it, nobody takes the directory for a model


def llama_json(config, source: Path) -> dict:
    """The config.json of a Llama that came without one: `llama_fields`, backwards."""
    if (config.rope_scaling or {}).get("rope_type") == "factors":
        raise UserError(f"{source}: holds the finished divisors of its rotation speeds, and a config.json wants their "
                        "recipe; export from the model's Hugging Face files instead")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim, "hidden_size": config.d_model,
            "intermediate_size": config.d_ff, "max_position_embeddings": config.max_len,
            "rms_norm_eps": config.norm_eps, "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias,
            "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
