"""Files: reading what others wrote, writing so that nothing is ever half there, one writer at a time, and tensors with
a checksum. What goes wrong with a file is one clear line, a UserError, and no traceback."""
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class UserError(Exception):
    """One clear line: what is wrong, what was expected, what to do. Programs print it and exit with status 2."""


class Stopped(KeyboardInterrupt):
    """A run that Ctrl-C or SIGTERM has stopped, with all that it did saved; a sweep around it stops too. Programs exit
    with 128 + the signal's number."""

    def __init__(self, text: str, signal: int):
        super().__init__(text)
        self.signal = signal


def is_number(value, least: float, most: float) -> bool:
    """Whether `value`, which may come from a file and be anything, is a number from `least` to `most`; nan is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def is_text(value) -> bool:
    """Whether `value`, which may come from a file or a flag and be anything, is a text that could name a file: without
    half of a character, which no encoding has, and without \\0."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------ reading


@contextlib.contextmanager
def reading(file: Path):
    """Around code that interprets a file which somebody else wrote. Whatever goes wrong there is one UserError that
    names the file: there are more ways to damage a file than checks for them."""
    if file.exists() and not (file.is_file() or file.is_dir()):  # not even opened: that could wait without end
        raise UserError(f"{file}: a pipe, a socket or a device is there; expected a file")
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    except MemoryError:
        raise UserError(f"{file}: needs more memory than there is") from None
    except BaseException as error:  # with its cause, which may be a mistake of ours, for those who call from Python
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file}: broken or truncated ({reason}); fetch or make it again") from error


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust (tokenizers, tiktoken, safetensors) gave up. Its error is no Exception."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """An error of some library in one line without secrets: addresses may hold a password or a signed query."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?'\")]*)(?:\?[^\s'\")]*)?", r"\1\2", line)
    return re.sub(r"\bhf_\w+", "hf_...", line)[:200]


def parse_json(content: bytes, where) -> object:
    """What `content` says. UserError, which begins with `where`, if it is not JSON in UTF-8."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid JSON: byte {error.start} is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, nested without end
        raise UserError(f"{where}: not valid JSON ({first_line(error)})") from None


def expect_file(path: Path, hint: str = "") -> None:
    """UserError for no file, for a directory, and for a pipe, which would be waited for without end. hint: what
    its message ends with."""
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'not found'}{hint}")


def read_file(path: Path, hint: str = "") -> bytes:
    expect_file(path, hint)
    return path.read_bytes()


def read_json(path: Path, hint: str = "") -> dict:
    """The object in a JSON file; UserError if there is none."""
    raw = parse_json(read_file(path, hint), path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}, expected an object with named fields")
    return raw


# ------------------------------------------------------------------------------------------------ writing


def write_atomically(path: Path, write) -> None:
    """`write(temporary path)`, then a rename: readers find the old file or the new one, never half of one. After a
    power cut too: the contents are on the disk before they get their name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.umask(umask := os.umask(0))       # there is no other way to read it
        os.chmod(temporary, 0o666 & ~umask)  # safetensors writes for the owner alone
        wait_for_disk(temporary)
        os.replace(temporary, path)
        wait_for_disk(path.parent)  # a directory's contents are its names
    finally:
        temporary.unlink(missing_ok=True)


def wait_for_disk(path: Path) -> None:
    """Returns when a file's contents, or a directory's names, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(directory: Path, empty: bool = False) -> str | None:
    """Why nothing can be written to a directory, which may not exist yet, or has to be `empty`; None if it can be."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        return f"{directory}: a file is there; expected a directory"
    if empty and directory.exists() and any(directory.iterdir()):
        return f"{directory}: the directory is not empty; expected a new or empty one"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{directory}: no permission to write to {there}"


def claim(handle, directory: Path) -> None:
    """Makes this process the one that writes to a directory, until `handle`, the directory or a file in it, is closed;
    the kernel closes it when the process ends. UserError if there is another."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{directory}: another run is writing there; wait for it, or choose another --out") from None
    except OSError:  # a file system without locks
        pass


def move_aside(directory: Path) -> Path:
    """Renames a directory to the first of NAME-1, NAME-2, ... that is free, and returns its new path: whatever writes to
    NAME from now on overwrites nothing. The caller has claimed it; the claim goes with the directory."""
    for number in itertools.count(1):
        aside = directory.with_name(f"{directory.name}-{number}")
        if not aside.exists():
            return directory.rename(aside)


def json_lines(values: list[dict]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def write_json(path: Path, value) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


# --------------------------------------------------------------------------------- tensors with a checksum


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], info: str) -> None:
    """Writes tensors, and a text beside them, as one safetensors file with a checksum, which `read_tensors` checks."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"info": info, "sha256": checksum(tensors, info)}

    def write(path: Path) -> None:
        save_file(tensors, path, metadata)
        sort_metadata(path)

    write_atomically(file, write)


def sort_metadata(file: Path) -> None:
    """The same tensors and texts become the same file: safetensors sorts tensors, but writes the texts beside them in
    an order that changes from call to call. The header, JSON behind its length in 8 bytes, keeps its length."""
    with open(file, "r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # spaces up to its length are the format's own
            handle.seek(8)
            handle.write(text.ljust(size))


def read_tensors(file: Path, with_info: bool = False):
    """{name: tensor} of a safetensors file, or with_info the pair of it and the text that `write_tensors` put beside
    it, "" in a file of others; UserError if the file is not there or not whole."""
    expect_file(file)
    with reading(file), safe_open(file, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}
        metadata = handle.metadata() or {}
    info = metadata.get("info", "")
    if metadata.get("sha256") not in (None, checksum(tensors, info)):
        raise UserError(f"{file}: its contents do not match their checksum; the file was damaged, copy it again")
    return (tensors, info) if with_info else tensors


def read_info(file: Path) -> str:
    """The text that `write_tensors` put beside the tensors of a file, "" in a file of others. The tensors stay unread,
    and the checksum unchecked."""
    with reading(file), safe_open(file, framework="pt") as handle:
        return (handle.metadata() or {}).get("info", "")


def fingerprint(parameters) -> str:
    """Tells a base model from another, at no cost, by the first values of each of its (name, parameter): in bfloat16, so
    that loaded in float32 or bfloat16 it is the same."""
    return checksum({f"{name} {tuple(p.shape)}": p.detach().flatten()[:64].to(torch.bfloat16).cpu()
                     for name, p in parameters})


def is_out_of_memory(error: Exception) -> bool:
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in signs)


def checksum(tensors: dict[str, torch.Tensor], info: str = "") -> str:
    """SHA-256 of names, values and text: safetensors itself notices a file cut short, but not a flipped byte."""
    digest = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def misfits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """What is wrong with tensors from a file, in one line: those that are missing or unexpected, that have another shape
    than expected, or hold nan or inf. "" if nothing is."""
    wrong = [f"missing {name}" for name in expected if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in expected]
    wrong += [f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
              for name in expected if name in found and found[name].shape != expected[name].shape]
    wrong += [f"{name} holds nan or inf" for name in expected
              if name in found and not found[name].float().isfinite().all()]
    return listed(wrong)


def listed(wrong: list[str]) -> str:
    """A list of what is wrong as one line: the first four, and how many more."""
    return "; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")


if __name__ == "__main__":
    import data  # noqa: F401  (data.py, which says what to run instead)
