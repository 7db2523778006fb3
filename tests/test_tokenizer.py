"""Text <-> ids, on tokenizers of published models where they are at hand (../shared/data/hub_files), and against
`tokenizers` and transformers."""
import gzip
import json
import random
import time

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
from conftest import SHARED, VOCAB, hub_files, write_gguf, write_llama
from data.commonsense import scoring_questions, training_question
from data.download import smollm2_135m
from data.files import UserError
from data.gguf import GGUF
from data.tokenizer import SPLIT, TextStream, byte_symbols, load_tokenizer
from data.weights import save_pretrained
from gatera import AdapterConfig, inject_adapters, save_adapter
from model import Transformer

# name: (end of text, beginning of text, whether a space is put before every text)
PUBLISHED = {"gpt2": (50256, None, False), "dialogpt-medium": (50256, None, False), "phi-2": (50256, None, False),
             "granite-3b-code": (0, None, False), "smollm-135m": (0, None, False), "llama-3.2-3b": (128001, 128000, False),
             "llama-2-7b-chat": (2, 1, True), "tinyllama-1.1b-chat": (2, 1, True)}
TEXTS = ["", " ", "the then in", "Hello  world!\n\n\tTabs", "don't I'll we've 'S", "été naïve 東京 🙂👍🏽", "a1 22 333  4444 x5",
         "  12  ab \n 3", "\r\n \r\n", "<|endoftext|> is text here", "</s> and <s>, too", "e=mc²  ½ Ⅷ ٣"]
ALPHABETS = ["abcdefghij XYZ", "0123456789²½Ⅷ٣१", " \t\n\r\x0b\x0c\x85\u2003\u2028\u3000", "'s't're've'm'll'd'S'LL",
             "!?.,;:-_()[]{}<|>\"'`~@#$%^&*", "éüñßçøåÅıİſ", "東京日本語한국어ไทย", "🙂👍🏽👨‍👩‍👧‍👦🇩🇪", "                        ",
             "\u0301\u0300\u200d\u200b\ufeff\u0915\u093f", "\x00\x01\x02\x04\x06\x13\x14\x16\x1d\x7f", "the then inner "]


def fuzzed_texts(n):
    rng = random.Random(0)
    piece = lambda: "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 6)))  # noqa: E731
    return ["", " ", "\n", "  \n 1"] + ["".join(piece() for _ in range(rng.randint(0, 12))) for _ in range(n)]


def sampled_texts(step):
    """Every step-th record of the commonsense files, where they are at hand."""
    files = sorted((SHARED / "commonsense").glob("*/t*.json.gz"))
    if not files:
        pytest.skip("the commonsense files are not beside the repository (../shared/data)")
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield from (f"{r['instruction']}\n{r['output']}" for r in json.load(lines)[::step])


def reference(directory):
    """What everybody on the hub reads a tokenizer.json with."""
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.no_padding()
    theirs.no_truncation()
    return theirs


def assert_same_ids(ours, theirs, texts):
    texts = list(texts)
    for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)):
        assert ours.encode(text) == encoding.ids, repr(text)


def change_json(file, change):
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


# ---------------------------------------------------------------------------------------- published tokenizers

@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tokenizer_has_its_ids_ends_and_texts(name):
    directory = hub_files(name)
    ours = load_tokenizer(str(directory))
    assert (ours.eos, ours.bos, ours.adds_space) == PUBLISHED[name]
    texts = [*fuzzed_texts(500), *sampled_texts(1000)]
    if name == "dialogpt-medium":  # its tokenizer is GPT-2's, in the older pair of files
        theirs = reference(hub_files("gpt2"))
    elif name == "tinyllama-1.1b-chat":  # the copy at hand lacks no-break spaces, and so `tokenizers` refuses it
        theirs = reference(hub_files("llama-2-7b-chat"))
    else:
        theirs = reference(directory)
    assert_same_ids(ours, theirs, texts)
    for text in TEXTS + texts[:200]:
        ids = ours.encode(text)
        stream = TextStream(ours)
        pieces = [stream.add(i) for i in ids]
        assert "".join(pieces) + stream.rest() == ours.decode(ids)
        assert ours.decode(ids) == (theirs.decode(ids, skip_special_tokens=False)), text


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_special_tokens_inside_a_text_are_text(name):
    ours = load_tokenizer(str(hub_files(name)))
    for end in ("<|endoftext|>", "</s>", "<s>", "<|begin_of_text|>", "<|im_end|>"):
        ids = ours.encode(f"before {end} after")
        assert ours.eos not in ids and ours.bos not in ids and ours.decode(ids) == f"before {end} after"


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_answers_space_is_never_doubled_and_training_sees_what_scoring_sees(name):
    ours = load_tokenizer(str(hub_files(name)))
    record = {"task": "piqa", "question": "To open a door,", "choices": ["push it.", "eat it."], "label": 1}
    for form in ("cloze", "label"):
        question, trained = scoring_questions(record, form, ours, 512)[0], training_question(record, form, ours, 512)
        assert trained.prompt == question.prompt and trained.answers[0] == question.answers[1] + [ours.eos]
    prompt, _ = "Question: To open a door,\nAnswer:", " push it."
    question = scoring_questions(record, "cloze", ours, 512)[0]
    bos = [] if ours.bos is None else [ours.bos]
    assert question.prompt + question.answers[0] == bos + ours.encode(f"{prompt} push it.")
    assert ours.decode(question.prompt[len(bos):] + question.answers[0]) == f"{prompt} push it."


def test_added_tokens_that_are_not_special_are_found_in_texts():
    ours = load_tokenizer(str(hub_files("phi-2")))
    assert ours.encode("x" + " " * 31 + "y") == [87, 50257, 88]
    assert ours.unused(51200) == list(range(50295, 51200))


def test_ends_of_published_tokenizers_equal_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    compared = 0
    for name in PUBLISHED:
        directory = hub_files(name)
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(directory)
        except (ValueError, TypeError):  # neither a model_type nor a tokenizer.json; the copy without no-break spaces
            assert name in ("dialogpt-medium", "tinyllama-1.1b-chat")
            continue
        ours, whole = load_tokenizer(str(directory)), theirs.encode("x")
        assert ours.eos == theirs.eos_token_id
        assert ([] if ours.bos is None else [ours.bos]) == whole[:-1]
        compared += 1
    assert compared == 6


# ------------------------------------------------------------------------------------------- the end of a text

BASE = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMED = {name: VOCAB + i for i, name in enumerate(("<s>", "</s>", "<end>"))}
# files beside tokenizer.json, and the id that ends a text; transformers' own where it has one
ENDS = [
    ({"tokenizer_config": BASE | {"eos_token": "</s>"}}, "</s>"),
    ({"tokenizer_config": BASE | {"eos_token": {"__type": "AddedToken", "content": "</s>"}}}, "</s>"),
    ({"tokenizer_config": BASE, "special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
    ({"special_tokens_map": {"eos_token": {"content": "</s>"}}}, "</s>"),
    ({"tokenizer_config": BASE | {"eos_token": "<end>"}, "special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
    ({"tokenizer_config": BASE | {"eos_token": "<end>", "added_tokens_decoder": {}},
      "special_tokens_map": {"eos_token": "</s>"}}, "<end>"),
    ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}, "<|endoftext|>"),
    # by id, where transformers' tokenizer knows of none
    ({"config": {"eos_token_id": NAMED["</s>"]}}, None, "</s>"),
    ({"config": {"eos_token_id": [NAMED["</s>"], NAMED["<end>"]]}}, None, "</s>"),
    ({"tokenizer_config": BASE | {"eos_token": None}, "generation_config": {"eos_token_id": [NAMED["<end>"], 1]},
      "config": {"eos_token_id": 5}}, None, "<end>"),
    ({"tokenizer_config": BASE}, None, None),
]


def write_ends(directory, files):
    write_llama(directory)
    change_json(directory / "config.json", lambda raw: (raw.pop("eos_token_id"), raw.pop("bos_token_id")))
    change_json(directory / "config.json", lambda raw: raw.update(files.get("config", {}), vocab_size=VOCAB + 3))
    change_json(directory / "tokenizer.json", lambda raw: raw["added_tokens"].extend(
        {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False} for name, i in NAMED.items()))
    (directory / "tokenizer_config.json").unlink()
    for name, content in files.items():
        if name != "config":
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("case", ENDS, ids=str)
def test_the_end_of_a_text_is_transformers(case, tmp_path):
    files, theirs, *ours = case
    directory = write_ends(tmp_path / "model", files)
    named = NAMED | {"<|endoftext|>": VOCAB - 1, None: None}
    assert load_tokenizer(str(directory)).eos == named[ours[0] if ours else theirs]
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    assert transformers.AutoTokenizer.from_pretrained(directory).eos_token_id == named[theirs]


def test_an_end_whose_name_no_tokenizer_knows_is_the_id_in_the_config(tmp_path):
    files = {"tokenizer_config": BASE | {"eos_token": "<nowhere>"}, "config": {"eos_token_id": NAMED["<end>"]}}
    assert load_tokenizer(str(write_ends(tmp_path / "model", files))).eos == NAMED["<end>"]


@pytest.mark.parametrize("value, words", [([], "eos_token_id is an empty list"), ("</s>", "expected a token's id"),
                                          (-1, "expected a token's id"), (True, "expected a token's id"),
                                          (VOCAB + 3, "has ids up to 266, but the model has a vocabulary of 266")])
def test_an_end_that_is_no_id_is_one_line(value, words, tmp_path):
    directory = write_ends(tmp_path / "model", {"tokenizer_config": BASE, "config": {"eos_token_id": value}})
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(str(directory))
    assert "\n" not in str(caught.value)


def template(single):
    special = {"<s>": {"id": "<s>", "ids": [VOCAB], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [VOCAB + 1],
                                                                                 "tokens": ["</s>"]}}
    part = lambda word: ({"Sequence": {"id": word, "type_id": 0}} if word in "AB"  # noqa: E731
                         else {"SpecialToken": {"id": word, "type_id": 0}})
    return {"type": "TemplateProcessing", "single": [part(word) for word in single.split()],
            "pair": [part("A"), part("B")], "special_tokens": special}


@pytest.mark.parametrize("single, bos", [("<s> A", VOCAB), ("A", None), ("A </s>", None), ("<s> A </s>", VOCAB)])
def test_the_beginning_of_a_text_is_transformers(single, bos, tmp_path):
    directory = write_ends(tmp_path / "model", {"tokenizer_config": BASE | {"eos_token": "</s>", "add_bos_token": True}})
    change_json(directory / "tokenizer.json", lambda raw: raw.update(post_processor=template(single)))
    assert load_tokenizer(str(directory)).bos == bos
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    ids = transformers.AutoTokenizer.from_pretrained(directory).encode("x")
    assert ids[:ids.index(ord("x") - 33)] == ([] if bos is None else [bos])


def test_two_tokens_before_every_text_are_refused(tmp_path):
    directory = write_ends(tmp_path / "model", {"tokenizer_config": BASE | {"eos_token": "</s>"}})
    change_json(directory / "tokenizer.json", lambda raw: raw.update(post_processor=template("<s> </s> A")))
    with pytest.raises(UserError, match=r"puts the tokens \[263, 264\] before every text; expected one or none"):
        load_tokenizer(str(directory))


# ------------------------------------------------------------------- a vocabulary larger than the tokenizer's

@pytest.fixture
def padded(tmp_path):
    """A model with 40 rows more than its tokenizer has tokens, which it likes best."""
    directory = write_llama(tmp_path / "padded")
    change_json(directory / "config.json", lambda raw: raw.update(vocab_size=VOCAB + 40))
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = tensors[name][:40] * 1.01 if name == "lm_head.weight" else tensors[name][:40]
        tensors[name] = torch.cat([tensors[name], more])
    tensors["lm_head.weight"][VOCAB:] = 50 * tensors["lm_head.weight"][:40]
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_ids_that_are_no_token_are_never_generated(padded, tmp_path, capsys):
    tokenizer, model = load_tokenizer(str(padded)), Transformer.from_pretrained(str(padded))
    never = tokenizer.unused(model.config.vocab_size)
    assert never == list(range(VOCAB, VOCAB + 40))
    prompts = [tokenizer.encode(text) for text in ("the hen in", "an inn", "then")]
    assert max(i for ids in model.generate(prompts, 12) for i in ids) >= VOCAB  # or this would prove nothing
    for new in (model.generate(prompts, 12, never=never), model.beam_search(prompts, 12, never=never)):
        assert all(len(ids) == 12 and max(ids) < VOCAB for ids in new)
    inject_adapters(model, AdapterConfig(r=2))
    save_adapter(model, tmp_path / "run" / "best")
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    record = {"task": "piqa", "question": "To open a door,", "choices": ["push it.", "eat it."], "label": 0}
    for split in ("train", "test"):
        (tmp_path / "data" / "piqa" / f"{split}.jsonl").write_text(json.dumps(record) + "\n")
    flags = ["--init", str(padded), "--run", str(tmp_path / "run")]
    told = evaluation.main([*flags, "--prompt", "the hen"])
    assert len(told) == 2 and all(tokenizer.encode(text) for text in told.values())
    for more in (["--gates"], ["--protocol", "generate"], ["--protocol", "generate", "--beams", "1"]):
        evaluation.main([*flags, "--tasks", "piqa", "--data", str(tmp_path / "data"), *more])


# ------------------------------------------------------------------------------------- files that tiktoken serves

def bpe(vocabulary, merges, *steps):
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(steps))
    return tokenizer


def test_gpt2_ids_equal_hugging_face():
    """encoder.json and vocab.bpe, as OpenAI published them."""
    directory = SHARED / "gpt2_bpe"
    if not directory.is_dir():
        pytest.skip("GPT-2's encoder.json and vocab.bpe are not beside the repository (../shared/data/gpt2_bpe)")
    lines = (directory / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    theirs = bpe(json.loads((directory / "encoder.json").read_text()), [line for line in lines[1:] if line],
                 tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    ours = load_tokenizer(str(directory))
    assert_same_ids(ours, theirs, fuzzed_texts(3000))
    assert_same_ids(ours, theirs, sampled_texts(200))


def pair_of_files(llama, directory):
    """vocab.json and merges.txt with what the tokenizer.json of `llama` has."""
    raw = json.loads((llama / "tokenizer.json").read_text())
    (directory / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(raw["model"]["merges"]))
    return directory


def test_gpt2_files_give_the_same_tokenizer_as_tokenizer_json(llama, tmp_path):
    ours, other = load_tokenizer(str(llama)), load_tokenizer(str(pair_of_files(llama, tmp_path)))
    for text in [*TEXTS, *fuzzed_texts(200)]:
        assert other.encode(text) == ours.encode(text) and other.decode(other.encode(text)) == ours.decode(ours.encode(text))
    assert other.eos == ours.eos == VOCAB - 1 and other.ids == ours.ids


TIKTOKEN = {
    "no merge makes the token 'qx'": lambda d: change_json(d / "vocab.json", lambda raw: raw.update(qx=900)),
    "its merges are not in the order": lambda d: (d / "merges.txt").write_text("h e\nĠ t\n"),
    "two tokens of its vocabulary have the same id": lambda d: change_json(d / "vocab.json", lambda raw: raw.update(a=7)),
    "'qx' is not in its alphabet or vocabulary": lambda d: (d / "merges.txt").write_text("q x\n"),
    "'▁' is not in its alphabet": lambda d: change_json(d / "vocab.json", lambda raw: raw.update({"▁the": 900})),
    "'<more>' is added to the vocabulary and found in texts":
        lambda d: (d / "added_tokens.json").write_text('{"<more>": 900}'),
    "'  ' is added to the vocabulary and found in texts": lambda d: (d / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {"900": {"content": "  ", "special": False}}})),
    "add_prefix_space without a tokenizer.json": lambda d: (d / "tokenizer_config.json").write_text(
        '{"add_prefix_space": true}'),
    "a RobertaTokenizer without its tokenizer.json": lambda d: (d / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "RobertaTokenizer"}'),
    "vocab.json: there is no merges.txt beside it": lambda d: (d / "merges.txt").unlink(),
}


@pytest.mark.parametrize("message", TIKTOKEN)
def test_what_tiktoken_cannot_express_is_refused_by_name(message, llama, tmp_path):
    directory = pair_of_files(llama, tmp_path)
    TIKTOKEN[message](directory)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(directory))
    assert "\n" not in str(caught.value)


def test_added_tokens_with_a_special_name_have_their_id(llama, tmp_path):
    directory = pair_of_files(llama, tmp_path)
    (directory / "added_tokens.json").write_text(json.dumps({"[PAD]": VOCAB}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    ours = load_tokenizer(str(directory))
    assert VOCAB in ours.ids and VOCAB not in ours.encode("[PAD]") and ours.decode([VOCAB]) == "[PAD]"


@pytest.mark.slow
def test_smollm2_ids_equal_hugging_face(smollm):
    """Against a tokenizer built from the file's tokens and merges. 21 bytes have no token in it: they vanish."""
    gguf = GGUF(smollm2_135m())
    vocabulary = {token: i for i, token in enumerate(gguf.get("tokenizer.ggml.tokens"))}
    cut = tokenizers.pre_tokenizers
    theirs = bpe(vocabulary, gguf.get("tokenizer.ggml.merges"), cut.Digits(individual_digits=True),
                 cut.ByteLevel(add_prefix_space=False))
    ours = load_tokenizer(smollm)
    tokenless = [symbol for symbol in byte_symbols() if symbol not in vocabulary]
    characters = [chr(byte_symbols()[symbol]) for symbol in tokenless if byte_symbols()[symbol] < 128]
    assert len(tokenless) == 21 and len(characters) == 6 and ours.encode("".join(characters)) == []
    assert_same_ids(ours, theirs, fuzzed_texts(3000))
    assert_same_ids(ours, theirs, sampled_texts(20))


# ------------------------------------------------------------------------------------------------- tokenizer.json

@pytest.mark.parametrize("kind", SPLIT)
def test_a_gguf_tokenizer_equals_the_tokenizer_json_that_is_made_of_it(kind, llama, tmp_path):
    """GPT-2's way of cutting words, digits one by one, Llama 3's pattern with its first token."""
    file = write_gguf(tmp_path / "tiny.gguf", llama, pre=kind)
    model = Transformer.from_pretrained(str(file))
    save_pretrained(model, tmp_path / "written", str(file))
    ours, other, theirs = load_tokenizer(str(file)), load_tokenizer(str(tmp_path / "written")), reference(tmp_path / "written")
    assert (ours.eos, ours.bos) == (other.eos, other.bos) == (VOCAB - 1, VOCAB - 1 if kind == "llama-bpe" else None)
    for text in [*TEXTS, *fuzzed_texts(300)]:
        ids = other.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == other.decode(ids)
    assert_same_ids(ours, theirs, fuzzed_texts(300))


DAMAGED = {
    "its merges are left out at random": lambda raw: raw["model"].update(dropout=0.1),
    "broken or truncated": lambda raw: raw["model"].update(type="Unheard of"),
    "broken": lambda raw: raw.pop("model"),
    "tokenizer.json": lambda raw: raw["model"]["merges"].append("q x"),
    "has ids up to 900, but the model has a vocabulary of 263": lambda raw: raw["model"]["vocab"].update({"qx": 900}),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_tokenizer_json_is_one_line(message, llama):
    change_json(llama / "tokenizer.json", DAMAGED[message])
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(llama))
    assert "\n" not in str(caught.value) and "tokenizer.json" in str(caught.value)


def test_merges_that_hold_spaces_are_read(llama):
    """The older form, "a b", of a token with a space in it."""
    change_json(llama / "tokenizer.json", lambda raw: (
        raw["model"]["vocab"].update({" ": VOCAB, "  ": VOCAB + 1, "a ": VOCAB + 2}),
        raw["model"]["merges"].extend(["   ", "a  "]), raw.update(pre_tokenizer=None)))
    change_json(llama / "config.json", lambda raw: raw.update(vocab_size=VOCAB + 3))
    ours = load_tokenizer(str(llama))
    assert ours.encode("  ") == [VOCAB + 1] and ours.encode("a b") == [VOCAB + 2, ord("b") - 33]


def test_the_byte_alphabet_is_complete():
    assert sorted(byte_symbols().values()) == list(range(256))


def test_half_of_a_character_is_a_question_mark(gpt2, tmp_path):
    for directory in (gpt2, pair_of_files(gpt2, tmp_path)):
        ours = load_tokenizer(str(directory))
        assert ours.decode(ours.encode("x\ud800y")) == "x?y"


def test_a_character_that_spans_tokens_comes_with_its_last_one(llama):
    ours = load_tokenizer(str(llama))
    stream = TextStream(ours)
    ids = ours.encode("a🙂b")
    assert len(ids) == 6 and [stream.add(i) for i in ids] == ["a", "", "", "", "🙂", "b"]
    stream = TextStream(ours)
    assert [stream.add(i) for i in ids[:3]] == ["a", "", ""] and stream.rest() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("part, what", [
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a|a)*[bc]d"}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "a{0,90}a{0,90}a{0,90}a{0,9}[bc]d"}, "behavior": "Isolated",
                       "invert": False}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "a{0,90}a{0,90}a{0,90}a{0,9}[bc]d"}, "content": "x"}),
    ("decoder", {"type": "Sequence", "decoders": [{"type": "Fuse"}, {
        "type": "Replace", "pattern": {"Regex": "a{0,90}a{0,90}a{0,90}a{0,9}[bc]d"}, "content": "x"}]}),
], ids=["panics", "splits", "normalises", "decodes"])
def test_a_pattern_of_a_file_that_would_try_for_hours_is_refused(part, what, tmp_path, monkeypatch, capfd):
    """Neither is there anything of Rust's panics on stderr."""
    directory = write_llama(tmp_path / "model")
    change_json(directory / "tokenizer.json", lambda raw: raw.update({part: what}))
    monkeypatch.setattr("data.limits.SECONDS", 1.0)
    tokenizer, started = load_tokenizer(str(directory)), time.monotonic()
    text = "a" * 20_000 + " bd"
    with pytest.raises(UserError, match="tokenizer.json: .*(too slow to be used|retry-limit)"):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
    assert time.monotonic() - started < 5
    assert capfd.readouterr().err == ""
