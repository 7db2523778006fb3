"""Published models by the short names that every --init knows: their ids on the hub, and what their config.json says in
the fields of model.py's TransformerConfig."""

HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",  # by its short name it comes from the package index
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
}


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


if __name__ == "__main__":
    import data  # noqa: F401  (data.py, which says what to run instead)
