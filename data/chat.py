"""A base's chat template: a user's message -> the text that the base was trained to answer, as transformers'
apply_chat_template makes it, and its ids."""
import json
import re
import subprocess
import sys
from pathlib import Path

from data.download import find_model
from data.files import UserError, first_line, read_file, reading
from data.gguf import GGUF
from data.tokenizer import Tokenizer, read_settings, token_name

SECONDS = 10  # that a template may take; published ones take none to speak of


def chat_text(name_or_path: str, message: str) -> str:
    """A user's message in the chat template of a model, up to where the answer starts. UserError if it has none, or
    one that fails."""
    file, template, tokens = read_chat_template(find_model(name_or_path))
    values = {"template": template, "messages": [{"role": "user", "content": message}], "tokens": tokens}
    program = [sys.executable, "-P", str(Path(__file__).with_name("render.py"))]
    try:
        done = subprocess.run(program, input=json.dumps(values).encode(), capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{file}: its chat template takes more than {SECONDS} seconds") from None
    if done.returncode:
        reason = first_line(done.stderr.decode("utf-8", "replace")) or "it needs too much memory or time"
        raise UserError(f"{file}: its chat template cannot be used: {reason}")
    return json.loads(done.stdout)


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which the names of special tokens, such as <|im_start|>, are those tokens."""
    names = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    parts = re.split(f"({names})", text) if names else [text]
    return [i for part in parts if part for i in ([tokenizer.special[part]] if part in tokenizer.special
                                                  else tokenizer.encode(part))]


def read_chat_template(path: Path) -> tuple[Path, str, dict[str, str]]:
    """The chat template of a model's directory or .gguf file: the file that it stands in, the template, and the special
    tokens that it may name, such as {"eos_token": "</s>"}."""
    if path.suffix == ".gguf":
        with reading(path):
            file, template = path, GGUF(path).get("tokenizer.chat_template", None)
            ids = {f"{name}_token": GGUF(path).get(f"tokenizer.ggml.{name}_token_id", None) for name in ("bos", "eos")}
            names = GGUF(path).get("tokenizer.ggml.tokens")
            tokens = {name: names[i] for name, i in ids.items() if i is not None}
    else:
        file, settings = path / "tokenizer_config.json", read_settings(path, "tokenizer_config.json")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several with names
            template = next((entry.get("template") for entry in template
                             if isinstance(entry, dict) and entry.get("name") == "default"), None)
        if (path / "chat_template.jinja").exists():
            file = path / "chat_template.jinja"
            template = read_file(file).decode("utf-8", "replace")
        settings = read_settings(path, "special_tokens_map.json") | settings
        tokens = {name: token_name(value) for name, value in settings.items() if name.endswith("_token")}
        tokens = {name: value for name, value in tokens.items() if isinstance(value, str)}
    if not isinstance(template, str):
        raise UserError(f"{path}: has no chat template; drop --chat, and write the prompt as the base expects it")
    return file, template, tokens
