"""Time limits, and silence, for the libraries in Rust that read tokenizers. What they do with a damaged file, or with one
that was made to harm, nothing in Python can end or catch while it is under way."""
import contextlib
import json
import os
import threading
from pathlib import Path

from data.files import UserError, reading

SECONDS = 10.0  # that a tokenizer.json may take for one text; published ones take 0.02 for 30,000 characters


def needs_limit(backend, known: list[str]) -> bool:
    """Whether a tokenizer of `tokenizers` may take long for a text: one with patterns other than the known ones, which
    are quick, or of another kind than BPE. For all others a thread for each text would be a waste."""
    parts = [backend.normalizer, backend.pre_tokenizer, backend.decoder]
    text = "".join(part.__getstate__().decode() for part in parts if part is not None)  # in JSON
    for pattern in known:
        text = text.replace(json.dumps({"Regex": pattern}, separators=(",", ":")), "")
    return '"Regex"' in text or type(backend.model).__name__ != "BPE"


def at_once(file: Path, call, value):
    """As `in_time`, without a limit."""
    with reading(file):
        return call([value])[0]


def in_time(file: Path, call, value):
    """call([value])[0], where `call` is one of `tokenizers` for several texts: those let other threads run meanwhile.

    A tokenizer.json brings patterns of its own, which may try for years: UserError, naming the file, after SECONDS. The
    thread is left behind, and ends with the program."""
    outcome = {}

    def work():
        try:
            outcome["result"] = call([value])[0]
        except BaseException as error:  # a panic is no Exception
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    with reading(file):
        with without_panics():
            thread.start()
            thread.join(SECONDS)
        if not outcome:
            raise UserError(f"takes more than {SECONDS:.0f} seconds for one text; its patterns are too slow to be used")
        if "error" in outcome:
            raise outcome["error"]
    return outcome["result"]


@contextlib.contextmanager
def without_panics():
    """Nothing goes to stderr: what Rust calls a panic is written there, in many lines, before Python sees an error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
