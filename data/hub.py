"""Models on the Hugging Face hub: which files of one the local cache has, which are needed, and fetching them.

The cache is huggingface_hub's, which transformers uses too (HF_HUB_CACHE, below ~/.cache/huggingface unless set):

    models--ORGANISATION--MODEL/refs/main                    the commit that the branch main was last seen at
    models--ORGANISATION--MODEL/snapshots/COMMIT/...         the files of that commit that somebody has asked for
    models--ORGANISATION--MODEL/.no_exist/COMMIT/...         an empty file for each that was asked for and is not there
"""
import functools
import os
import re
import threading
from pathlib import Path

from data.files import UserError, first_line, read_json, reading

# Some models were renamed: a copy from before lies in the cache under its old name.
OLD_IDS = {f"openai-community/{name}": name for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
OLD_IDS |= {"meta-llama/Llama-3.1-8B": "meta-llama/Meta-Llama-3.1-8B"}
# Only these are fetched, and the safetensors: never pickles (*.bin, *.pth), which can run code when loaded.
INDEX = "model.safetensors.index.json"
METADATA = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
            "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", INDEX]


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


def cached_copies(repo_id: str) -> list[Path]:
    """The directories in the local cache that hold files of a model, under its present name and its old one."""
    from huggingface_hub import errors, utils
    try:
        utils.validate_repo_id(repo_id)
    except errors.HFValidationError:
        raise UserError(f"{repo_id}: not a model; expected a hub id such as openai-community/gpt2, a directory in "
                        "Hugging Face layout, a .gguf file, or a short name such as smollm2-135m") from None
    copies = []
    for name in dict.fromkeys([repo_id, OLD_IDS.get(repo_id, repo_id)]):
        model = _cache() / f"models--{name.replace('/', '--')}"
        if (model / "refs" / "main").is_file():
            commit = (model / "refs" / "main").read_text("utf-8", "replace").strip()
            copies.append(model / "snapshots" / commit)
    return [copy for copy in copies if copy.is_dir()]


def lacking(copy: Path, part: str) -> list[str]:
    """The files without which a copy is not whole, as somebody may have fetched some of them only. part: what has to be
    there, the "config", the "tokenizer" too, or the "weights" too."""
    needed = ["config.json"]
    if part != "config":
        needed += ["vocab.json", "merges.txt"] if _is_nowhere(copy, "tokenizer.json") else ["tokenizer.json"]
        # Without it, the token that ends a text could be another one, and nobody would notice.
        needed += [] if _is_nowhere(copy, "tokenizer_config.json") else ["tokenizer_config.json"]
    if part == "weights" and not (copy / "model.safetensors").is_file():
        index = copy / INDEX
        needed += [file.name for file in shards(index)] if index.is_file() else ["model.safetensors"]
    return [name for name in needed if not (copy / name).is_file()]


def _is_nowhere(copy: Path, name: str) -> bool:
    """Whether the hub was asked for a file of this commit and does not have it either."""
    return _marker(copy.parents[1], copy.name, name).exists()


def _marker(model: Path, commit: str, name: str) -> Path:
    return model / ".no_exist" / commit / name


def fetch_model(repo_id: str, part: str) -> Path:
    """Brings a part of a model (see `lacking`) into the local cache and returns its directory there. UserError if the
    hub has no such model, wants a licence accepted or has no safetensors of it, or if the connection breaks."""
    from huggingface_hub import HfApi, errors, snapshot_download, utils

    utils.logging.set_verbosity_error()  # its retries and hints; what matters comes as one line from here
    try:
        info = HfApi(endpoint=_endpoint()).model_info(repo_id)
        names = {file.rfilename for file in info.siblings}
        if "config.json" not in names:
            raise UserError(f"{repo_id}: has no config.json; expected a base model in Hugging Face layout")
        if part == "weights" and not names & {"model.safetensors", INDEX}:
            raise UserError(f"{repo_id}: has no model.safetensors, nor an index of shards; other files of weights "
                            "(pickles, GPTQ, adapters) are not loaded")

        def fetch(wanted: list[str]) -> Path:
            copy = Path(snapshot_download(repo_id, allow_patterns=wanted, endpoint=_endpoint(), cache_dir=_cache()))
            if missing := [name for name in wanted if not (copy / name).is_file()]:
                raise FileNotFoundError(f"{missing[0]} did not come")  # some errors it swallows
            return copy

        wanted = ["config.json"] if part == "config" else [name for name in METADATA if name in names]
        copy = fetch(wanted)
        if part == "weights":  # one file goes before shards, as in transformers
            whole = "model.safetensors" in names
            copy = fetch(wanted + (["model.safetensors"] if whole else [file.name for file in shards(copy / INDEX)]))
        for name in set(METADATA) - names:  # as huggingface_hub does where it is asked for one file
            marker = _marker(copy.parents[1], info.sha, name)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        return copy
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(f"{repo_id}: accept its licence at {_endpoint()}/{repo_id}, then set HF_TOKEN to an access "
                        "token") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repo_id}: the hub has no such model (a private one needs HF_TOKEN)") from None
    except Exception as error:  # the connection broke, the disk is full, ...
        raise UserError(f"{repo_id}: download failed ({type(error).__name__}: {first_line(error)}); "
                        "run again, finished files are kept") from None


# Both from the environment as it is now: huggingface_hub has read it when it was imported.
def _endpoint() -> str:
    from huggingface_hub import constants
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _cache() -> Path:
    from huggingface_hub import constants
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE))


def shards(index: Path) -> list[Path]:
    """The weight files that a model.safetensors.index.json names; UserError for one that is not beside it."""
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:  # ../../x must not be read
            if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
                raise UserError(f"names {name!r}; expected .safetensors files of the same directory")
    return [index.with_name(name) for name in names]
