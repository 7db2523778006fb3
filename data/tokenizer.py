"""Text <-> token ids."""
import json
import math
from functools import partial
from pathlib import Path

from data.download import find_model
from data.files import UserError, read_json, reading
from data.gguf import gguf_field, open_gguf

# Byte-pair encoding (BPE) cuts a text into words, then merges the bytes of each word, pair by pair, into tokens. How
# words are cut is a property of each tokenizer, by llama.cpp's name for it:
SPLIT = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Tokenizer:
    """Text <-> token ids, by tiktoken. `encode` treats all text as text: a special token's name has no power."""

    def __init__(self, name: str, split: str, ranks: dict[bytes, int], special: dict[str, int], eos: int | None,
                 bos: int | None = None):
        import tiktoken
        self.encoding = tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens=special)
        ids = [*ranks.values(), *(i for i in (eos, bos) if i is not None)]
        self.smallest, self.largest = min(ids), max(ids)
        self.split = split
        # some vocabularies have no token for bytes that their training text lacked (SmolLM2: 21 of the 256)
        self.tokenless = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self.special = special  # {name: id} of the tokens that no text encodes to
        self.eos = eos  # ends a text
        self.bos = bos  # stands before every text, in the models that were trained so (Llama 3); else None

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # half of a character, \ud800, becomes "?"
        drop = lambda piece: piece.encode().translate(None, self.tokenless)  # noqa: E731
        if not self.tokenless or len(drop(text)) == len(text.encode()):
            return self.encoding.encode_ordinary(text)
        # As Hugging Face does: bytes without a token vanish after the split into words and before the merges.
        # (tiktoken would abort.)
        import regex
        words = (drop(match.group()) for match in regex.finditer(self.split, text))
        return [i for word in words if word for i in self.encoding._encode_single_piece(word)]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer of a model (names as in `Transformer.from_pretrained`): byte-level BPE, from a .gguf file,
    tokenizer.json, or GPT-2's vocab.json + merges.txt. Raises UserError for any other kind, by name."""
    path = find_model(name_or_path)
    if path.suffix == ".gguf":
        file, load = path, gguf_tokenizer
    elif (path / "tokenizer.json").exists():
        file, load = path / "tokenizer.json", json_tokenizer
    else:
        file, load = path / ("vocab.json" if (path / "vocab.json").exists() else "encoder.json"), gpt2_tokenizer
    with reading(file):
        tokenizer, size = load(file)
        # else some later step would ask for a row of the embedding that is not there
        if tokenizer.smallest < 0 or tokenizer.largest >= size:
            raise UserError(f"ids from {tokenizer.smallest} to {tokenizer.largest}, but the model has a vocabulary of "
                            f"{size}: not its tokenizer")
    return tokenizer


def json_tokenizer(file: Path) -> tuple[Tokenizer, int]:
    """A tokenizer.json's tokenizer, and the size of the vocabulary that its model has."""
    raw, directory = read_json(file), file.parent
    model, steps = raw.get("model", {}), raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if model.get("type") != "BPE" or kinds[-1:] != ["ByteLevel"] or raw.get("normalizer"):
        raise UserError(f"{file}: not byte-level BPE without a normalizer (model {model.get('type')}, splits {kinds}); "
                        "SentencePiece tokenizers, such as Llama 2's, are not supported")
    first, last = steps[0], steps[-1]
    if last.get("add_prefix_space") or first.get("behavior", "Isolated") != "Isolated" or first.get("invert"):
        raise UserError(f"{file}: add_prefix_space, and splits that are inverted or not 'Isolated', are not supported")
    if kinds == ["ByteLevel"]:
        split = SPLIT["gpt-2"]
    elif kinds == ["Digits", "ByteLevel"] and first.get("individual_digits"):
        split = SPLIT["smollm"]
    elif kinds == ["Split", "ByteLevel"] and "Regex" in first["pattern"] and not last.get("use_regex", True):
        split = first["pattern"]["Regex"]
    else:
        raise UserError(f"{file}: this way of splitting words is not supported: {kinds}")
    special = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    ranks = byte_ranks(model.get("vocab", {}), set(special), model.get("merges", []), file)
    settings = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (directory / name).exists():
            settings |= read_json(directory / name)
    eos = settings.get("eos_token") or settings.get("eos_token_id")  # a name, a named dict, an id or a list of ids
    eos = eos[0] if isinstance(eos, list) else eos.get("content") if isinstance(eos, dict) else eos
    eos = special.get(eos, eos if isinstance(eos, int) else None)
    after = raw.get("post_processor") or {}
    templates = [step for step in after.get("processors", [after]) if step.get("type") == "TemplateProcessing"]
    bos = templates[0]["single"][0].get("SpecialToken", {}).get("id") if templates else None
    return Tokenizer(directory.name, split, ranks, special, eos, special.get(bos)), model_vocabulary(directory)


def gpt2_tokenizer(vocab: Path) -> tuple[Tokenizer, int]:
    merges = vocab.with_name("merges.txt" if vocab.name == "vocab.json" else "vocab.bpe")
    if not vocab.exists() or not merges.exists():
        model = vocab.with_name("tokenizer.model").exists()
        kind = "; it has a SentencePiece model, which is not byte-level BPE" if model else ""
        raise UserError(f"{vocab.parent}: no tokenizer.json, nor vocab.json with merges.txt{kind}")
    vocabulary, end = read_json(vocab), "<|endoftext|>"
    special = {end: vocabulary[end]} if end in vocabulary else {}
    lines = merges.read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    ranks = byte_ranks(vocabulary, set(special), lines, merges)
    return Tokenizer("gpt2", SPLIT["gpt-2"], ranks, special, special.get(end)), model_vocabulary(vocab.parent)


def model_vocabulary(directory: Path) -> int | float:
    """The vocab_size in config.json; without limit for a tokenizer that is on its own."""
    config = directory / "config.json"
    return read_json(config).get("vocab_size", math.inf) if config.exists() else math.inf


def gguf_tokenizer(file: Path) -> tuple[Tokenizer, int]:
    get = partial(gguf_field, open_gguf(file), file)
    kind, split = get("tokenizer.ggml.model", None), get("tokenizer.ggml.pre", None)
    if kind != "gpt2" or split not in SPLIT:
        raise UserError(f"{file}: tokenizer '{kind}' with splits '{split}' is not supported; expected 'gpt2' with "
                        f"one of {', '.join(SPLIT)}")
    NORMAL = 1  # gguf's type of a token that text can encode to
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    special = {token: i for i, (token, type_) in enumerate(zip(tokens, types)) if type_ != NORMAL}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranks = byte_ranks(vocabulary, set(special), get("tokenizer.ggml.merges"), file)
    add_bos = get("tokenizer.ggml.add_bos_token", split == "llama-bpe")  # llama.cpp's default
    bos = get("tokenizer.ggml.bos_token_id") if add_bos else None
    eos = get("tokenizer.ggml.eos_token_id", None)
    return Tokenizer(file.stem, SPLIT[split], ranks, special, eos, bos), len(tokens)


def byte_ranks(vocabulary: dict[str, int], special: set[str], merges: list, file: Path) -> dict[bytes, int]:
    """{token as bytes: id}. tiktoken first merges the pair whose token has the lowest id; that is the order of
    `merges` ("a b" or [a, b]) in every byte-level BPE file we know, and UserError for one where it is not."""
    symbols = byte_symbols()
    try:
        ranks = {bytes(symbols[c] for c in token): i for token, i in vocabulary.items() if token not in special}
        merged = [vocabulary["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in merges]
    except KeyError as error:
        raise UserError(f"{file}: not byte-level BPE: {error} is not in its alphabet or vocabulary") from None
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{file}: two tokens of its vocabulary have the same id")
    if merged != sorted(merged):
        raise UserError(f"{file}: its merges are not in the order of their tokens' ids, which is not supported")
    return ranks


def byte_symbols() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each of the 256 bytes. Bytes without one get chr(256), ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def write_gguf_tokenizer(file: Path, directory: Path) -> dict:
    """A .gguf file's tokenizer as tokenizer.json and tokenizer_config.json. Returns the ids that config.json names."""
    get = partial(gguf_field, open_gguf(file), file)
    tokenizer, tokens = load_tokenizer(file), get("tokenizer.ggml.tokens")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.split}, "behavior": "Isolated", "invert": False}
    steps = {"gpt-2": [byte_level], "smollm": [{"type": "Digits", "individual_digits": True}, byte_level],
             "llama-bpe": [split, byte_level | {"use_regex": False}]}[get("tokenizer.ggml.pre")]
    special = [{"id": i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for token, i in tokenizer.special.items()]
    first = None  # the token that stands before every text
    if tokenizer.bos is not None:
        name = tokens[tokenizer.bos]
        single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        first = {"type": "TemplateProcessing", "single": single,
                 "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
                 "special_tokens": {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]}}}
    (directory / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": first, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": get("tokenizer.ggml.pre") == "llama-bpe",
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": get("tokenizer.ggml.merges")}},
        ensure_ascii=False), encoding="utf-8")
    ids = {name: get(f"tokenizer.ggml.{key}_token_id", None) for name, key in (
        ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    settings = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": get("llama.context_length"),
                 "clean_up_tokenization_spaces": False, "chat_template": get("tokenizer.chat_template", None)}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {f"{name}_token_id": i for name, i in ids.items() if name != "unk" and i is not None}
