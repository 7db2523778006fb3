"""What stands for a setting in the name of a run's directory."""
import hashlib
import os
import re
from pathlib import Path

from data.prepare import is_one_file


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
