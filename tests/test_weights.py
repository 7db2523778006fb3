"""What a loader must not leave unread: configs and weights as they are on the hub and in llama.cpp's files, against
transformers in float64, and what is refused by name."""

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import VOCAB, hub_files, write_gguf, write_gpt2, write_llama
from data.files import UserError
from data.weights import read_fields
from model import Transformer, TransformerConfig, config_of, load_tokenizer, read_config
from test_parity import IDS, ROPE, close, theirs  # noqa: F401  (a fixture)
from test_tokenizer import change_json


def edit(directory, remove=(), **fields):
    """Changes fields of the config.json."""
    def change(raw):
        for name in remove:
            del raw[name]
        raw.update(fields)
    change_json(directory / "config.json", change)
    return directory


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


# ------------------------------------------------------------------------------------- as transformers has it

LINEAR = {"rope_type": "linear", "factor": 4.0}
AS_TRANSFORMERS = {
    "theta beside rope_parameters": lambda d: edit(write_llama(d), rope_theta=500.0, rope_parameters={"rope_type": "default"}),
    "theta in rope_parameters alone": lambda d: edit(write_llama(d), ["rope_theta"], rope_parameters={
        "rope_type": "default", "rope_theta": 500.0}),
    "theta in both": lambda d: edit(write_llama(d), rope_theta=77.0, rope_parameters={"rope_theta": 500.0}),
    "rope_parameters is null": lambda d: edit(write_llama(d), rope_theta=500.0, rope_parameters=None),
    "rope_scaling beside rope_parameters": lambda d: edit(
        write_llama(d), rope_theta=500.0, rope_scaling=ROPE, rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
    "linear rope_scaling": lambda d: edit(write_llama(d), rope_scaling={"type": "linear", "factor": 4.0}),
    "linear rope_parameters": lambda d: edit(write_llama(d), rope_parameters=LINEAR | {"rope_theta": 500.0}),
    "llama3 without its original length": lambda d: edit(write_llama(d), max_position_embeddings=64, rope_scaling={
        name: value for name, value in ROPE.items() if name != "original_max_position_embeddings"}),
    "another epsilon in a llama": lambda d: edit(write_llama(d), rms_norm_eps=0.1),
    "another epsilon in a gpt2": lambda d: edit(write_gpt2(d), layer_norm_epsilon=0.1),
    "a narrower mlp in a gpt2": lambda d: change_tensors(edit(write_gpt2(d), n_inner=48), lambda t: t.update({
        name: (w[:48] if "c_proj.weight" in name else w[..., :48]).contiguous()
        for name, w in t.items() if "mlp.c_fc" in name or name.endswith("mlp.c_proj.weight")})),
    "no rms_norm_eps": lambda d: edit(write_llama(d), ["rms_norm_eps"]),
    "no max_position_embeddings": lambda d: edit(write_llama(d), ["max_position_embeddings"]),
    "another head in a tied llama": lambda d: change_tensors(write_llama(d, tied=True), lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].flip(0)})),
    "another head in a gpt2": lambda d: change_tensors(write_gpt2(d), lambda t: t.update(
        {"lm_head.weight": t["transformer.wte.weight"].flip(0)})),
    "an equal head in a tied llama": lambda d: change_tensors(write_llama(d, tied=True), lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
    "an equal head in a gpt2": lambda d: change_tensors(write_gpt2(d), lambda t: t.update(
        {"lm_head.weight": t["transformer.wte.weight"].clone()})),
    "a gpt2 whose head is its own": lambda d: edit(change_tensors(write_gpt2(d), lambda t: t.update(
        {"lm_head.weight": t["transformer.wte.weight"].flip(0)})), tie_word_embeddings=False),
    "no activation_function, n_positions, eps": lambda d: change_tensors(
        edit(write_gpt2(d), ["activation_function", "n_positions", "layer_norm_epsilon"]), lambda t: t.update(
            {"transformer.wpe.weight": 0.1 * torch.randn(1024, 32)})),
}


@pytest.mark.parametrize("case", AS_TRANSFORMERS)
def test_logits_equal_transformers(case, theirs, tmp_path):  # noqa: F811
    directory = AS_TRANSFORMERS[case](tmp_path / "model")
    ours = Transformer.from_pretrained(str(directory), dtype=torch.float64)
    close(ours(IDS), theirs(directory)(IDS).logits)
    tied = "equal" in case
    assert (ours.head.weight is ours.embed.weight) == ours.config.tied_head == tied or "head" not in case


def test_a_missing_context_length_is_transformers_default(llama, gpt2):
    assert config_of(edit(llama, ["max_position_embeddings"])).max_len == 2048
    assert config_of(edit(gpt2, ["n_positions"])).max_len == 1024


def test_one_file_counts_more_than_shards_beside_it(theirs, tmp_path):  # noqa: F811
    """As in transformers: a model that was saved in one file again, beside its old shards."""
    directory = write_llama(tmp_path / "model", shards=2)
    other = write_llama(tmp_path / "other")
    change_tensors(other, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 2}))
    (directory / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    ours = Transformer.from_pretrained(str(directory), dtype=torch.float64)
    close(ours(IDS), theirs(directory)(IDS).logits)
    close(ours(IDS), Transformer.from_pretrained(str(other), dtype=torch.float64)(IDS))


def test_gpt2_of_2019_says_nothing_of_itself(tmp_path):
    directory = edit(write_gpt2(tmp_path / "model"), ["model_type", "architectures", "activation_function"])
    same = Transformer.from_pretrained(str(write_gpt2(tmp_path / "same")))
    assert torch.equal(Transformer.from_pretrained(str(directory))(IDS), same(IDS))


PUBLISHED = {
    "gpt2": TransformerConfig.from_name("gpt2"), "gpt2-xl": TransformerConfig.from_name("gpt2-xl"),
    "dialogpt-medium": TransformerConfig.from_name("gpt2-medium"),
    "llama-3.2-1b": TransformerConfig.from_name("llama-3.2-1b"), "llama-3.2-3b": TransformerConfig.from_name("llama-3.2-3b"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_one_in_the_table(name):
    assert config_of(hub_files(name)) == PUBLISHED[name]


def test_other_published_configs():
    assert read_fields(hub_files("tinyllama-1.1b-chat")) | {"rope_theta": 10000.0} == dict(
        vocab_size=32000, n_layer=22, n_head=32, n_kv_head=4, head_dim=0, d_model=2048, d_ff=5632, max_len=2048,
        norm_eps=1e-5, attention_bias=False, mlp_bias=False, tied_head=False, rope_theta=10000.0, rope_scaling=None)
    granite = read_config(str(hub_files("granite-3b-code")))
    assert granite.attention_bias and granite.mlp_bias and granite.tied_head and granite.rope_theta == 1e7
    with pytest.raises(UserError, match="config.json: quantization_config = .*bitsandbytes.* is not supported"):
        read_config(str(hub_files("llama-3.1-8b-instruct")))


# ------------------------------------------------------------------------------------------- refused by name

NAME = "model.layers.1.self_attn.o_proj.weight"


def put(tensors, value):
    tensors[NAME] = tensors[NAME].clone()
    tensors[NAME][3, 5] = value


WRONG = {
    "blocks.1.attn.o_proj.weight holds nan or inf": lambda t: put(t, float("nan")),
    "attn.o_proj.weight holds nan or inf": lambda t: put(t, float("-inf")),
    "blocks.1.attn.o_proj.weight holds int32": lambda t: t.update({NAME: t[NAME].to(torch.int32)}),
    "blocks.1.attn.o_proj.weight holds int8": lambda t: t.update({NAME: t[NAME].to(torch.int8)}),
    "blocks.1.attn.o_proj.weight holds bool": lambda t: t.update({NAME: t[NAME] > 0}),
    "blocks.1.attn.o_proj.weight holds float8_e4m3fn": lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}),
    "blocks.1.attn.o_proj.weight holds complex64": lambda t: t.update({NAME: t[NAME].to(torch.complex64)}),
    "head.weight holds nan or inf": lambda t: t.update({"lm_head.weight": t["lm_head.weight"] / 0}),
}


@pytest.mark.parametrize("message", WRONG)
def test_weights_that_are_no_finite_numbers_are_refused(message, llama):
    change_tensors(llama, WRONG[message])
    with pytest.raises(UserError, match=message) as caught:
        Transformer.from_pretrained(str(llama))
    assert "\n" not in str(caught.value)


FIELDS = {
    "quantization_config = .*'gptq'": dict(quantization_config={"quant_method": "gptq", "bits": 4}),
    "partial_rotary_factor = 0.5 is not supported": dict(partial_rotary_factor=0.5),
    "partial_rotary_factor = 0.25": dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    "rope scaling 'yarn' is not supported; expected default, linear or llama3": dict(rope_parameters={"rope_type": "yarn"}),
    "rope scaling 'dynamic'": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "field 'factor' is missing": dict(rope_scaling={"type": "linear"}),
    "rope_scaling is .*expected positive numbers": dict(rope_scaling={"type": "linear", "factor": "big"}),
    "tied_head is 'yes', expected true or false": dict(tie_word_embeddings="yes"),
    "broken": dict(rope_scaling=[1, 2]),
}


@pytest.mark.parametrize("message", FIELDS)
def test_a_config_that_is_not_computed_is_refused(message, llama):
    edit(llama, **FIELDS[message])
    with pytest.raises(UserError, match=message) as caught:
        Transformer.from_pretrained(str(llama))
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


# ------------------------------------------------------------------------------------------------------ .gguf

@pytest.fixture
def written(llama, tmp_path, monkeypatch):
    """written(change): a .gguf file of the tiny Llama, to whose writer `change` did something at the end."""
    def write(change, name="changed.gguf"):
        finish = gguf.GGUFWriter.write_header_to_file
        with monkeypatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "write_header_to_file", lambda self: (change(self), finish(self)))
            return str(write_gguf(tmp_path / name, llama))
    return write


def renamed(old, new):
    """Puts another value, or the value under another key, in the metadata."""
    def change(writer):
        for data in writer.kv_data:
            if old in data:
                if isinstance(new, str):
                    data[new] = data.pop(old)
                else:
                    data[old].value = new
                return
        raise AssertionError(old)
    return change


@pytest.mark.parametrize("change", [
    lambda w: w.add_rope_scaling_factor(4.0), lambda w: w.add_float32("llama.rope.scale_linear", 4.0),
    lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), w.add_rope_scaling_factor(4.0))],
    ids=["a factor without a type", "scale_linear", "linear"])
def test_a_linear_rope_in_a_gguf_file_is_computed(change, written, llama, theirs):  # noqa: F811
    file = written(change)
    ours = Transformer.from_pretrained(file, dtype=torch.float64)
    edit(llama, rope_scaling={"type": "linear", "factor": 4.0})
    close(ours(IDS), Transformer.from_pretrained(str(llama), dtype=torch.float64)(IDS))
    close(ours(IDS), theirs(llama)(IDS).logits)


def test_every_size_in_a_gguf_file_is_read(written, llama):
    """Those that the tiny Llama has by default, too: the same model in both layouts."""
    write_llama(llama, head_dim=12, bias=True, extra={"rms_norm_eps": 0.125, "rope_theta": 500.0})
    ours = Transformer.from_pretrained(written(lambda w: (w.add_key_length(12), w.add_value_length(12))))
    assert ours.config == config_of(llama)
    assert torch.equal(ours(IDS), Transformer.from_pretrained(str(llama))(IDS))


def test_finished_divisors_in_a_gguf_file_are_computed(written, llama, theirs):  # noqa: F811
    """llama.cpp's converter writes what Llama 3.1's recipe comes to: plain speeds over scaled ones."""
    scaling = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is the oracle here")
    edit(llama, rope_scaling=ROPE | {"original_max_position_embeddings": 64})
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    divisors = plain / scaling.ROPE_INIT_FUNCTIONS["llama3"](theirs(llama).config, "cpu")[0]
    assert divisors.min() < 1.01 and divisors.max() > 7.9
    file = written(lambda w: w.add_tensor("rope_freqs.weight", divisors.numpy()))
    close(Transformer.from_pretrained(file, dtype=torch.float64)(IDS), theirs(llama)(IDS).logits, 1e-5)
    edit(llama, rope_scaling={"type": "linear", "factor": 6.0})  # divisors and a factor: both divide
    file = written(lambda w: (w.add_tensor("rope_freqs.weight", torch.full((4,), 2.0).numpy()),
                              w.add_rope_scaling_factor(3.0)), "both.gguf")
    close(Transformer.from_pretrained(file, dtype=torch.float64)(IDS), theirs(llama)(IDS).logits, 1e-5)


@pytest.mark.parametrize("change", [
    lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.NONE), w.add_rope_scaling_factor(4.0)),
    lambda w: w.add_rope_scaling_factor(1.0), lambda w: w.add_rope_dimension_count(8), lambda w: w.add_vocab_size(VOCAB),
    lambda w: w.add_key_length(8), lambda w: w.add_expert_count(0), lambda w: w.add_uint16("split.count", 0)],
    ids=["no scaling", "by one", "all channels", "vocab_size", "key_length", "no experts", "whole"])
def test_metadata_that_changes_nothing_is_taken(change, written, llama):
    assert torch.equal(Transformer.from_pretrained(written(change))(IDS), Transformer.from_pretrained(str(llama))(IDS))


GGUF_WRONG = {
    "rope scaling 'yarn' is not supported": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "llama.rope.dimension_count is 4, expected the head's 8 channels": lambda w: w.add_rope_dimension_count(4),
    "llama.attention.value_length is 4, expected the head's 8": lambda w: w.add_value_length(4),
    "llama.attention.head_count differs from layer to layer": renamed("llama.attention.head_count", [4, 4]),
    "llama.attention.head_count_kv differs from layer to layer": renamed("llama.attention.head_count_kv", [2, 2]),
    "llama.feed_forward_length differs from layer to layer": renamed("llama.feed_forward_length", [48, 48]),
    "llama.expert_count = 8 is not supported": lambda w: w.add_expert_count(8),
    "llama.rope.scaling.attn_factor = .* is not supported": lambda w: w.add_rope_scaling_attn_factors(0.5),
    "llama.attention.sliding_window = 64 is not supported": lambda w: w.add_sliding_window(64),
    "llama.logit_scale = 2.0 is not supported": lambda w: w.add_logit_scale(2.0),
    "one of 3 parts of a model; join them first": lambda w: w.add_uint16("split.count", 3),
    "the metadata has no llama.block_count": renamed("llama.block_count", "general.block_count"),
}


@pytest.mark.parametrize("message", GGUF_WRONG)
def test_a_gguf_file_that_is_not_computed_is_refused(message, written):
    change = GGUF_WRONG[message]
    if "head_count " in message or "_kv" in message or "feed_forward" in message:
        def change(writer, change=change):  # a list has a type of its own
            GGUF_WRONG[message](writer)
            for data in writer.kv_data:
                for value in data.values():
                    if isinstance(value.value, list) and value.type != gguf.GGUFValueType.ARRAY:
                        value.type, value.sub_type = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
    with pytest.raises(UserError, match=message) as caught:
        Transformer.from_pretrained(written(change))
    assert "\n" not in str(caught.value) and "changed.gguf" in str(caught.value)




def test_gguf_tokenizers_that_tiktoken_cannot_express_are_refused(written):
    def types(writer):
        for data in writer.kv_data:
            if "tokenizer.ggml.token_type" in data:
                data["tokenizer.ggml.token_type"].value[100] = 4  # user-defined

    def split(writer):
        for data in writer.kv_data:
            if "tokenizer.ggml.pre" in data:
                data["tokenizer.ggml.pre"].value = "qwen2"

    def tokens(writer):
        for data in writer.kv_data:
            if "tokenizer.ggml.tokens" in data:
                data["tokenizer.ggml.tokens"].value += ["<a>", "<b>"]
                writer_types = next(d for d in writer.kv_data if "tokenizer.ggml.token_type" in d)
                writer_types["tokenizer.ggml.token_type"].value += [3, 3]
                return

    for change, message in ((types, "is added to the vocabulary and found in texts"), (split, "with splits 'qwen2'"),
                            (tokens, "has ids up to 264, but the model has a vocabulary of 263"),
                            (lambda w: w.add_add_space_prefix(True), "add_space_prefix is not supported"),
                            (renamed("tokenizer.ggml.merges", "tokenizer.ggml.mergex"), "has no tokenizer.ggml.merges")):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(written(change))
        assert "\n" not in str(caught.value) and "changed.gguf" in str(caught.value)


def test_weights_of_integers_in_a_gguf_file_are_refused(llama, tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", lambda self, name, array, **more: add(
        self, name, array.astype("int32") if name == "output_norm.weight" else array, **more))
    with pytest.raises(UserError, match="output_norm.weight holds I32; expected floating-point"):
        Transformer.from_pretrained(str(write_gguf(tmp_path / "tiny.gguf", llama)))
