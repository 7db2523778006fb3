"""The transformer against Hugging Face's, against itself (packed, cached, selected), and its loading."""
import json
import shutil

import pytest
import torch

from conftest import VOCAB, write_gguf, write_gpt2, write_llama
from data.commonsense import Question, pack
from data.files import UserError
from model import KVCache, Transformer, TransformerConfig, compile_blocks, load_tokenizer

LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)
CHECKPOINTS = {
    "gpt2": lambda d: write_gpt2(d),
    "gpt2-hub-names": lambda d: write_gpt2(d, prefix=""),
    "llama-mha": lambda d: write_llama(d, kv_heads=4),
    "llama-gqa": lambda d: write_llama(d),
    "llama-mqa-tied": lambda d: write_llama(d, kv_heads=1, tied=True),
    "llama-head-dim": lambda d: write_llama(d, head_dim=12),
    "llama-biases": lambda d: write_llama(d, bias=True),
    "llama-rope-old": lambda d: write_llama(d, extra={"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}),
    "llama-rope-new": lambda d: write_llama(d, extra={"rope_theta": None, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500.0}}),
    "llama-sharded": lambda d: write_llama(d, shards=3),
    "llama-bf16": lambda d: write_llama(d, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_logits_and_greedy_tokens_equal_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    directory = CHECKPOINTS[kind](tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = Transformer.from_pretrained(directory)
    assert not any(module.training for module in ours.modules())
    ids = torch.randint(0, VOCAB, (3, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    prompts = [ids[0, :5].tolist(), ids[1, :23].tolist(), ids[2, :1].tolist()]
    for prompt, new in zip(prompts, ours.generate(prompts, 10)):
        row = torch.tensor([prompt])
        for _ in range(10):
            with torch.no_grad():
                row = torch.cat((row, theirs(row).logits[:, -1:].argmax(-1)), 1)
        assert new == row[0, len(prompt):].tolist()


def test_late_tokens_are_as_exact_as_early_ones_in_bfloat16(llama):
    """bfloat16 counts 256, 258, 260, ...: angles computed in it would lose a late token's position."""
    ids = torch.randint(0, VOCAB, (1, 500), generator=torch.Generator().manual_seed(1))
    half, whole = (Transformer.from_pretrained(llama, dtype=dtype)(ids)[0] for dtype in (torch.bfloat16, torch.float32))
    error = (half - whole).abs().mean(-1)
    assert error[300:].mean() < 2 * error[:100].mean()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_packed_row_equals_documents_on_their_own(family, request):
    """Logits and gradients, float64; two documents share a prompt, which is then computed once."""
    model = Transformer.from_pretrained(request.getfixturevalue(family), dtype=torch.float64).requires_grad_(True)
    questions = [Question([5, 6, 7], [[8, 9], [10, 11, 12, 13]]), Question([14], [[15, 16, 17]])]
    batch = pack(questions)
    packed = model(batch.ids, documents=batch.documents, select=batch.select)
    alone = torch.cat([model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1:]
                       for prompt, answers, _ in questions for answer in answers])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
    loss = lambda logits: torch.nn.functional.cross_entropy(logits, batch.targets)  # noqa: E731
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss(packed), parameters), torch.autograd.grad(loss(alone), parameters)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_packed_row_equals_a_padded_batch(llama):
    model = Transformer.from_pretrained(llama, dtype=torch.float64).requires_grad_(True)
    questions = [Question([1, 2, 3], [[4, 5]]), Question([6, 7], [[8, 9, 10, 11, 12]]), Question([13], [[14]])]
    batch = pack(questions)
    logits = model(batch.ids, documents=batch.documents, select=batch.select)
    rows = [torch.tensor(q.prompt + q.answers[0][:-1]) for q in questions]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=99)
    labels = torch.full_like(padded, -100)
    for i, q in enumerate(questions):
        labels[i, len(q.prompt) - 1:len(rows[i])] = torch.tensor(q.answers[0])
    ours = torch.nn.functional.cross_entropy(logits, batch.targets)
    theirs = torch.nn.functional.cross_entropy(model(padded).flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


TREES = {  # documents of a row of 12 tokens, and the lengths of its trees; None: not made of trees, end to end
    "apart": ([[0, 1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]], [4, 1, 7]),
    "a shared prompt": ([[0, 1, 2], [0, 1, 3, 4], [0, 1], [5, 6, 7], [8, 9, 10, 11]], [5, 3, 4]),
    "a branch of a branch": ([[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 6, 7], [8, 9], [8, 10, 11]], [8, 4]),
    "filler behind": ([[0, 1, 2], [3, 4, 5, 6]], [3, 4]),
    "another order": ([[4, 5, 6], [0, 1, 2, 3]], None),
    "backwards": ([[0, 2, 1], [3, 4, 5]], None),
    "filler between": ([[0, 1, 2], [4, 5, 6]], None),
}


@pytest.mark.parametrize("documents, lengths", TREES.values(), ids=TREES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attention_by_tree_equals_the_grid_and_documents_alone(family, documents, lengths, request, monkeypatch):
    """Logits of every document's tokens and gradients, float64. A GPU and a compiled model use the grid."""
    import model as module
    calls, by_tree = [], module.Trees.attend
    monkeypatch.setattr(module.Trees, "attend",
                        lambda trees, *qkv: calls.append(trees.lengths) or by_tree(trees, *qkv))
    model = Transformer.from_pretrained(request.getfixturevalue(family), dtype=torch.float64).requires_grad_(True)
    ids, rows = torch.randint(0, VOCAB, (1, 12)), [torch.tensor(document) for document in documents]
    grid = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    probe = torch.randn(VOCAB, dtype=torch.float64)

    def outcome():
        logits = model(ids, documents=grid)[0]
        logits = torch.cat([logits[row] for row in rows])
        return logits, *torch.autograd.grad((logits @ probe).square().sum(), list(model.parameters()))
    ours = outcome()
    assert calls == ([] if lengths is None else [lengths] * model.config.n_layer)
    alone = torch.cat([model(ids[:, row])[0] for row in rows])
    torch.testing.assert_close(ours[0], alone, rtol=0, atol=1e-10)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for a, b in zip(ours, outcome()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_share_one_graph_and_follow_new_lengths(llama):
    torch._dynamo.reset()
    models = [Transformer.from_pretrained(llama) for _ in range(2)]
    compile_blocks(models[1])

    def losses(sizes):
        ids, starts = torch.arange(sum(sizes))[None] % VOCAB, [sum(sizes[:i]) for i in range(len(sizes))]
        documents = torch.nn.utils.rnn.pad_sequence(
            [torch.arange(n) + start for n, start in zip(sizes, starts)], batch_first=True, padding_value=-1)
        return [model(ids, documents=documents) for model in models]
    for sizes in ([13, 6], [7, 12, 4]):
        torch.testing.assert_close(*losses(sizes), rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):  # neither other lengths nor another block is a new graph
        for sizes in ([4, 14, 9], [21, 2], [5, 6, 7, 15]):
            torch.testing.assert_close(*losses(sizes), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_selected_logits_and_cached_logits_equal_all_of_them(family, request):
    model = Transformer.from_pretrained(request.getfixturevalue(family), dtype=torch.float64)
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    full = model(ids)
    select = torch.tensor([3, 20, 11])
    torch.testing.assert_close(model(ids, select=select), full.flatten(0, 1)[select], rtol=0, atol=1e-12)
    cache, parts = KVCache(model.config, 2, 12, torch.float64, "cpu"), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        positions = torch.arange(start, stop).expand(2, -1)
        parts.append(model(ids[:, start:stop], positions=positions, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient(llama):
    model = Transformer.from_pretrained(llama, dtype=torch.float64).requires_grad_(True)
    ids, grads = torch.arange(20)[None], []
    for model.gradient_checkpointing in (False, True):
        grads.append(torch.autograd.grad(model(ids).square().mean(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_generate_stops_and_refuses_what_has_no_room(gpt2):
    model = Transformer.from_pretrained(gpt2)
    prompts = [[1, 2, 3], [4]]
    greedy = model.generate(prompts, 8)
    stop = greedy[0][2]
    assert model.generate(prompts, 8, stop=stop)[0] == greedy[0][:greedy[0].index(stop)]
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[]], 3)
    with pytest.raises(ValueError, match="exceed the context"):
        model.generate([[1] * 250], 10)


def test_generation_may_fill_the_context(gpt2):
    model = Transformer.from_pretrained(gpt2)
    prompt = [1] * (model.config.max_len - 6)
    greedy, = model.generate([prompt], 6)
    assert len(greedy) == 6 and model.beam_search([prompt], 6, beams=1) == [greedy]
    for generate in (model.generate, model.beam_search):
        with pytest.raises(ValueError, match="exceed the context"):
            generate([prompt], 7)


def test_what_does_not_fit_together_is_refused(gpt2):
    model, ids = Transformer.from_pretrained(gpt2), torch.zeros(2, 3, dtype=torch.long)
    cache, documents = KVCache(model.config, 1, 3, torch.float32, "cpu"), torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match="documents pack one row"):
        model(ids, documents=documents)
    with pytest.raises(ValueError, match="documents pack one row"):
        model(ids[:1], documents=documents, positions=documents, cache=cache)
    with pytest.raises(ValueError, match="a cache needs positions"):
        model(ids[:1], cache=cache)
    long = torch.zeros(1, 257, dtype=torch.long)
    with pytest.raises(ValueError, match="longer than the 256 positions"):
        model(long)
    with pytest.raises(ValueError, match="longer than the 256 positions"):
        model(long, documents=torch.arange(257)[None])


def test_of_all_tokens_but_one_that_one_is_generated(llama):
    model = Transformer.from_pretrained(llama)
    for token in (3, 200):
        never = [other for other in range(VOCAB) if other != token]
        for generate in (model.generate, model.beam_search):
            assert generate([[1, 2], [9]], 3, never=never) == [[token] * 3] * 2


@pytest.mark.parametrize("name, count", {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008, "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824}.items())
def test_parameter_counts_of_published_models(name, count):
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_name(name))
    assert sum(p.numel() for p in model.parameters()) == count


# ----------------------------------------------------------------------------------------------- loading

def edit_tensors(directory, change):
    from safetensors.torch import load_file, save_file
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "missing blocks.1.attn.q_proj.weight": lambda d: edit_tensors(d, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")),
    "unexpected blocks.0.mlp.extra": lambda d: edit_tensors(d, lambda t: t.update({"model.layers.0.mlp.extra": torch.ones(2)})),
    r"norm.weight is \(3,\), expected \(32,\)": lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
    "model.safetensors: broken or truncated": lambda d: truncate(d / "model.safetensors"),
    "model.safetensors: not found": lambda d: (d / "model.safetensors").unlink(),
    "config.json: not found": lambda d: (d / "config.json").unlink(),
    "config.json: not valid JSON": lambda d: (d / "config.json").write_text("{"),
    "architecture 'mistral' is not supported": lambda d: edit_config(d, model_type="mistral"),
    "rope scaling 'yarn' is not supported": lambda d: edit_config(d, rope_scaling={"rope_type": "yarn", "factor": 2.0}),
    "hidden_act = 'gelu' is not supported": lambda d: edit_config(d, hidden_act="gelu"),
    "do not divide": lambda d: edit_config(d, num_key_value_heads=3),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(message, llama):
    DAMAGE[message](llama)
    with pytest.raises(UserError, match=message) as caught:
        Transformer.from_pretrained(str(llama))
    assert "\n" not in str(caught.value)


def test_unknown_models_name_the_ways_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from data import download
    download.hub_reachable.cache_clear()
    with pytest.raises(UserError, match="smollm2-135m"):
        Transformer.from_pretrained("somebody/nothing-of-the-kind")
    with pytest.raises(UserError, match="no such model file or directory"):
        Transformer.from_pretrained("./nowhere/model.gguf")
    with pytest.raises(UserError, match="known: gpt2"):
        TransformerConfig.from_name("gpt5")
    download.hub_reachable.cache_clear()


# -------------------------------------------------------------------------------------------------- GGUF

def test_a_gguf_file_gives_the_same_model_and_tokenizer(llama, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    ids = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(Transformer.from_pretrained(file)(ids), Transformer.from_pretrained(llama)(ids), rtol=0, atol=1e-6)
    text = "The hen, then 12 tins!  in\nthe inn"
    assert load_tokenizer(file).encode(text) == load_tokenizer(llama).encode(text)
    assert load_tokenizer(file).eos == load_tokenizer(llama).eos == VOCAB - 1


def test_quantised_gguf_weights_are_dequantised(llama, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.Q8_0)
    exact, rounded = Transformer.from_pretrained(llama), Transformer.from_pretrained(file)
    for (name, a), b in zip(exact.named_parameters(), rounded.parameters()):
        assert (a - b).abs().max() <= a.abs().max() / 127, name


def test_a_broken_gguf_file_is_refused(llama, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    whole = file.read_bytes()
    for damaged in (b"", b"GGUF", whole[:1000], b"PK\x03\x04" + whole[4:], whole[:-500]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="tiny.gguf"):
            Transformer.from_pretrained(file)
    file.write_bytes(whole.replace(b"llama", b"qwenn"))
    with pytest.raises(UserError, match="architecture 'qwenn'"):
        Transformer.from_pretrained(file)


# ------------------------------------------------------------------------------------------ real weights

@pytest.mark.slow
def test_smollm2_equals_transformers_on_the_same_weights(smollm):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    ours, tokenizer = Transformer.from_pretrained(smollm), load_tokenizer(smollm)
    c = ours.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
        max_position_embeddings=c.max_len, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    back = {"embed": "embed_tokens", "norm": "norm", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
            "attn": "self_attn", "mlp": "mlp"}
    state = {}
    for name, tensor in ours.named_parameters():
        prefix, rest = ("model.", name)
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            prefix = f"model.layers.{layer}."
        first, dot, rest = rest.partition(".")
        state[f"{prefix}{back[first]}{dot}{rest}"] = tensor
    theirs.load_state_dict(state | {"lm_head.weight": ours.embed.weight})
    text = "Question: Which gas do plants take in from the air?\nAnswer:"
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=2e-4)
    assert ours.generate([ids[0].tolist()], 8)[0] == theirs.generate(
        ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
    assert "Paris" in tokenizer.decode(ours.generate([tokenizer.encode("The capital of France is")], 4)[0])
