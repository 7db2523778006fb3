"""The name of a run's directory, from its settings."""
import hashlib
import os
import re
from pathlib import Path

from data.prepare import is_one_file

# Flags that do not distinguish runs: they change nothing of what is learnt but by rounding, or which adapter is best/.
UNNAMED = ("preset", "out", "resume", "micro_batch", "validation", "eval_every", "log_every", "save_every", "test", "device",
           "dtype", "compile", "checkpointing", "fsdp", "logger")


def run_name(settings: dict, given: dict) -> str:
    """The directory of a run in out/, so that those of a sweep have one each: the preset, or base, method, gate, rate and
    seed, and behind that every other setting that is given."""
    always = () if settings["preset"] else ("peft", "gate", "lr", "seed")
    words = [settings["preset"] or short_name("init", settings["init"])]
    for name, value in settings.items():
        if name in always or name in given and name not in UNNAMED and (name != "init" or settings["preset"]):
            words.append(short_name(name, value))
    return "-".join(words)


def short_name(name: str, value) -> str:
    """A setting's part of the name: of texts, which speak for themselves, the text, of paths their last name, with a
    digest behind it wherever that is not all of the value."""
    if not isinstance(value, str):
        return f"{name.replace('_', '')}{value}"
    text = value
    if value and name in ("init", "data"):
        value = os.path.normpath(value)
        path = Path(os.path.abspath(value))  # "." has no name
        text = path.stem if path.suffix == ".gguf" or is_one_file(path) else path.name
    text = re.sub(r"[^\w.+-]", "+", text[:40])  # --compare parts runs at commas
    digest = hashlib.sha256(os.fsencode(value)).hexdigest()[:6]
    return text if text.replace("+", ",") == value else f"{text}-{digest}"
