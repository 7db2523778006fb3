"""Text <-> token ids: byte-pair encoding (BPE) and its like, as the model at hand was trained with.

A tokenizer.json is read by the `tokenizers` library, exactly as by everybody on the hub. GPT-2's older pair of files,
vocab.json and merges.txt, and llama.cpp's .gguf files are read by tiktoken, which knows one kind of BPE, on bytes; what
it cannot express is refused.
"""
import json
import math
from functools import partial
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken
import tokenizers

from data.download import find_model
from data.files import UserError, read_file, read_json, reading
from data.gguf import GGUF
from data.limits import at_once, in_time, needs_limit, without_panics

# Byte-level BPE cuts a text into words, then merges the bytes of each word, pair by pair, into tokens. How words are cut
# is a property of each tokenizer, by llama.cpp's name for it:
SPLIT = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Tokenizer:
    """Text <-> token ids. All text is text: the name of a special token in it has no power.

    eos: the id that ends a text, None if the model has none. bos: the id that stands before every text in the models that
    were trained so (Llama), else None. ids: all there are; for other rows of a model's vocabulary see `unused`.
    special: those of special tokens by name, for a text that has to hold them (data/chat.py)."""
    def __init__(self, encode, decode, ids, eos: int | None, bos: int | None, special: dict[str, int] = {}):
        self._encode, self._decode, self.special = encode, decode, special
        self.ids, self.eos, self.bos = frozenset(ids), eos, bos
        # SentencePiece's kind puts a space before every text: "x" alone has the ids of " x" behind another text.
        self.adds_space = self.encode("a x") == self.encode("a") + self.encode("x")

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of a text. continues: it goes on after another one with a space, " yes" after "Answer:", which a
        tokenizer that puts a space before every text must not double."""
        if continues and self.adds_space:
            text = text.removeprefix(" ")
        return self._encode(text.encode("utf-8", "replace").decode())  # half of a character, \ud800, becomes "?"

    def decode(self, ids: list[int]) -> str:
        return self._decode(ids)

    def unused(self, vocab_size: int) -> list[int]:
        """The ids of a model's vocabulary that are no token, such as those that pad it to a round number."""
        return sorted(set(range(vocab_size)) - self.ids)


class TextStream:
    """The text that each token of a sequence adds to it; a character that spans tokens comes with its last one."""

    def __init__(self, tokenizer: Tokenizer):
        self.decode, self.ids = tokenizer.decode, []
        self.context, self.shown = 0, 0  # the text of self.ids[:shown] is out, of [context:shown] with the last piece

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.rest()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the start of a character
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return text

    def rest(self) -> str:
        """What is still to show: after the last token, what there is of a character cut short. It is read with the piece
        before it, as decoders treat the start of a text in their own way."""
        before = self.decode(self.ids[self.context:self.shown])
        return self.decode(self.ids[self.context:])[len(before):]


# ------------------------------------------------------------------------------------------------- loading

def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer of a model, by the names of `Transformer.from_pretrained`. UserError names the file, and what is
    broken, missing or not supported."""
    path = find_model(name_or_path)
    candidates = [(path, gguf_tokenizer)] if path.suffix == ".gguf" else [
        (path / "tokenizer.json", json_tokenizer), (path / "vocab.json", gpt2_tokenizer),
        (path / "encoder.json", gpt2_tokenizer)]  # as OpenAI called it
    file, load = next(((file, load) for file, load in candidates if file.exists()), (None, None))
    if file is None:
        raise UserError(f"{path}: no tokenizer.json, nor vocab.json with merges.txt")
    with reading(file):
        tokenizer, largest = load(file)
        # Else some later step would ask for a row of the embedding that is not there.
        largest = max([largest, *(i for i in (tokenizer.eos, tokenizer.bos) if i is not None)])
        # The model's vocabulary is without limit for a tokenizer that is on its own.
        rows = GGUF(path).rows() if file == path else read_settings(path, "config.json").get("vocab_size", math.inf)
        if largest >= rows:
            raise UserError(f"has ids up to {largest}, but the model has a vocabulary of {rows}: not its tokenizer")
    return tokenizer


def json_tokenizer(file: Path) -> tuple[Tokenizer, int]:
    """The tokenizer in a tokenizer.json, and the largest id that a text can have."""
    with without_panics():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception:  # not read as it is, which may be for its merges
            backend = tokenizers.Tokenizer.from_str(json.dumps(with_pairs(read_json(file))))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # as text
    if getattr(backend.model, "dropout", None):
        raise UserError(f"its merges are left out at random (dropout {backend.model.dropout}): not supported")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    special = {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}
    largest = max(id for token, id in vocabulary.items() if token not in special)

    run = partial(in_time if needs_limit(backend, SPLIT.values()) else at_once, file)
    encode = lambda text: run(partial(backend.encode_batch, add_special_tokens=False), text).ids  # noqa: E731
    decode = partial(run, partial(backend.decode_batch, skip_special_tokens=False))
    with without_panics():
        plain, whole = encode("x"), run(backend.encode_batch, "x").ids
    before = whole[:next(i for i in range(len(whole)) if whole[i:i + len(plain)] == plain)]
    if len(before) > 1:
        raise UserError(f"puts the tokens {before} before every text; expected one or none")
    bos = before[0] if before else None
    return Tokenizer(encode, decode, vocabulary.values(), end_of_text(file.parent, vocabulary), bos, special), largest


def with_pairs(raw: dict) -> dict:
    """A tokenizer.json with its merges as pairs. `tokenizers` does not read the older "a b" where a token has a space in
    it; it means the cut that leaves two tokens of the vocabulary."""
    model = raw.get("model") or {}
    vocabulary, merges = model.get("vocab"), model.get("merges") or []
    if any(isinstance(merge, str) and merge.count(" ") != 1 for merge in merges):
        cuts = lambda merge: [(merge[:i], merge[i + 1:]) for i, c in enumerate(merge) if c == " "]  # noqa: E731
        model["merges"] = [next((pair for pair in cuts(merge) if {*pair, "".join(pair)} <= vocabulary.keys()), merge)
                           for merge in merges]
    return raw


def gpt2_tokenizer(vocab: Path) -> tuple[Tokenizer, int]:
    """What `json_tokenizer` returns, of GPT-2's vocab.json (or encoder.json) and merges.txt (or vocab.bpe)."""
    directory, merges = vocab.parent, vocab.with_name("merges.txt" if vocab.name == "vocab.json" else "vocab.bpe")
    if not merges.exists():
        raise UserError(f"there is no {merges.name} beside it")
    settings = read_settings(directory, "tokenizer_config.json")
    if settings.get("tokenizer_class", "GPT2Tokenizer") not in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        raise UserError(f"a {settings['tokenizer_class']} without its tokenizer.json is not supported")
    if settings.get("add_prefix_space"):
        raise UserError("add_prefix_space without a tokenizer.json is not supported")

    vocabulary, added = read_json(vocab), read_settings(directory, "added_tokens.json")
    declared = settings.get("added_tokens_decoder", {}).values()
    names = {"<|endoftext|>", *(token["content"] for token in declared if token["special"])}
    for value in (settings | read_settings(directory, "special_tokens_map.json")).items():
        names |= {token_name(value[1])} if value[0].endswith("_token") else set()
    plain = {*added, *(token["content"] for token in declared)} - names
    if plain:
        raise UserError(f"{min(plain)!r} is added to the vocabulary and found in texts, which needs a tokenizer.json")
    vocabulary |= added
    special = {name: vocabulary[name] for name in names if name in vocabulary}
    lines = read_file(merges).decode().replace("\r\n", "\n").split("\n")
    lines = [line for line in lines[lines[0].startswith("#version"):] if line]
    tokenizer = byte_pairs("gpt2", SPLIT["gpt-2"], vocabulary, special, lines, end_of_text(directory, vocabulary), None)
    return tokenizer, max(vocabulary.values())


def gguf_tokenizer(file: Path) -> tuple[Tokenizer, int]:
    """What `json_tokenizer` returns, of a .gguf file."""
    gguf = GGUF(file)
    kind, split = gguf.get("tokenizer.ggml.model", None), gguf.get("tokenizer.ggml.pre", None)
    if kind != "gpt2" or split not in SPLIT:
        raise UserError(f"tokenizer '{kind}' with splits '{split}' is not supported; expected 'gpt2' with one of "
                        f"{', '.join(SPLIT)}")
    NORMAL, USER_DEFINED = 1, 4  # gguf's types of tokens: made by merges; found in texts before all else
    tokens, types = gguf.get("tokenizer.ggml.tokens"), gguf.get("tokenizer.ggml.token_type")
    if USER_DEFINED in types:
        raise UserError(f"{tokens[types.index(USER_DEFINED)]!r} is added to the vocabulary and found in texts, which is "
                        "not supported in .gguf files")
    if gguf.get("tokenizer.ggml.add_space_prefix", False):
        raise UserError("tokenizer.ggml.add_space_prefix is not supported")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    special = {token: i for i, (token, type_) in enumerate(zip(tokens, types)) if type_ != NORMAL}
    add_bos = gguf.get("tokenizer.ggml.add_bos_token", split == "llama-bpe")  # llama.cpp's default
    tokenizer = byte_pairs(file.stem, SPLIT[split], vocabulary, special, gguf.get("tokenizer.ggml.merges"),
                           gguf.get("tokenizer.ggml.eos_token_id", None),
                           gguf.get("tokenizer.ggml.bos_token_id") if add_bos else None,
                           whole_words=split == "llama-bpe")
    return tokenizer, len(tokens) - 1


def byte_pairs(name: str, split: str, vocabulary: dict[str, int], special: dict[str, int], merges: list[str],
               eos: int | None, bos: int | None, whole_words: bool = False) -> Tokenizer:
    """Byte-level BPE by tiktoken, which first merges the pair whose token has the lowest id. That is what `merges`
    ("a b") say in the files that tiktoken can serve; UserError for others. whole_words: a word that is a token is that
    token, whether or not merges lead to it (Llama 3), as always in tiktoken."""
    symbols = byte_symbols()
    try:
        ranks = {bytes(symbols[c] for c in token): i for token, i in vocabulary.items() if token not in special}
        made = [merge.replace(" ", "", 1) for merge in merges]
        ids = [vocabulary[token] for token in made]
    except KeyError as error:
        raise UserError(f"not byte-level BPE: {error} is not in its alphabet or vocabulary") from None
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError("two tokens of its vocabulary have the same id")
    if ids != sorted(ids):
        raise UserError("its merges are not in the order of their tokens' ids, which is not supported")
    made_by_none = [token for token in vocabulary if len(token) > 1 and token not in special] if not whole_words else []
    if unmade := set(made_by_none) - set(made):
        raise UserError(f"no merge makes the token {min(unmade)!r}, which is not supported")

    with without_panics():
        encoding = tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens=special)
    # Some vocabularies have no token for bytes that their training text lacked (SmolLM2: 21 of the 256).
    tokenless = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)

    def encode(text: str) -> list[int]:
        drop = lambda piece: piece.encode().translate(None, tokenless)  # noqa: E731
        if not tokenless or len(drop(text)) == len(text.encode()):
            return encoding.encode_ordinary(text)
        # As Hugging Face does: bytes without a token vanish after the split into words and before the merges.
        # (tiktoken would abort.)
        words = (drop(match.group()) for match in regex.finditer(split, text))
        return [i for word in words if word for i in encoding._encode_single_piece(word)]

    return Tokenizer(encode, encoding.decode, vocabulary.values(), eos, bos, special)


def byte_symbols() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each of the 256 bytes. Bytes without one get chr(256), ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ------------------------------------------------------------------------------- what the files beside it say

def read_settings(directory: Path, name: str) -> dict:
    """A JSON file of a model's directory; {} if it is not there."""
    return read_json(directory / name) if (directory / name).exists() else {}


def token_name(token) -> str | None:
    """A special token is given by its name, or by an object with its name."""
    return token.get("content") if isinstance(token, dict) else token


def end_of_text(directory: Path, vocabulary: dict[str, int]) -> int | None:
    """The id that ends a text, as transformers finds it: by name, then by id; GPT-2's is known without."""
    config = read_settings(directory, "config.json")
    settings, special = (read_settings(directory, f"{name}.json") for name in ("tokenizer_config", "special_tokens_map"))
    kind = settings.get("tokenizer_class", config.get("model_type", "gpt2"))
    if "added_tokens_decoder" not in settings:  # in an older model, special_tokens_map.json has the last word
        settings |= special
    name = token_name(settings.get("eos_token"))
    if name in vocabulary:
        return vocabulary[name]
    for file in ("generation_config.json", "config.json"):
        ids = read_settings(directory, file).get("eos_token_id")
        if ids == []:
            raise UserError(f"{directory / file}: eos_token_id is an empty list; expected the id that ends a text")
        id = ids[0] if isinstance(ids, list) else ids  # of several, transformers takes the first as the tokenizer's
        if id is not None:
            if not isinstance(id, int) or isinstance(id, bool) or id < 0:
                raise UserError(f"{directory / file}: eos_token_id is {ids!r}; expected a token's id")
            return id
    return vocabulary.get("<|endoftext|>") if kind in ("gpt2", "GPT2Tokenizer", "GPT2TokenizerFast") else None


# ------------------------------------------------------------------------------------ .gguf -> tokenizer.json

def write_gguf_tokenizer(file: Path, directory: Path) -> dict:
    """A .gguf file's tokenizer as tokenizer.json and tokenizer_config.json. Returns the ids that config.json names."""
    gguf, known = GGUF(file), load_tokenizer(str(file))
    tokens, types, split = (gguf.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "pre"))
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.get("tokenizer.ggml.merges")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=split == "llama-bpe"))
    backend.add_special_tokens([token for token, type_ in zip(tokens, types) if type_ != 1])
    cut = tokenizers.pre_tokenizers
    backend.pre_tokenizer = {
        "gpt-2": cut.ByteLevel(add_prefix_space=False),
        "smollm": cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]),
        "llama-bpe": cut.Sequence([cut.Split(tokenizers.Regex(SPLIT["llama-bpe"]), "isolated"),
                                   cut.ByteLevel(add_prefix_space=False, use_regex=False)])}[split]
    backend.decoder = tokenizers.decoders.ByteLevel()
    if known.bos is not None:
        name = tokens[known.bos]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A $B:1", special_tokens=[(name, known.bos)])
    backend.save(str(directory / "tokenizer.json"))
    ids = {name: gguf.get(f"tokenizer.ggml.{key}_token_id", None) for name, key in (
        ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    settings = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": gguf.get("llama.context_length"),
                 "clean_up_tokenization_spaces": False, "chat_template": gguf.get("tokenizer.chat_template", None)}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {f"{name}_token_id": i for name, i in ids.items() if name != "unk" and i is not None}
