"""Models by name: what the hub's cache holds and lacks, what is fetched and when, and whole runs on it.

    python -m pytest tests/test_hub.py

The hub is a web server on this machine, and its client the real huggingface_hub. The last part makes caches of the
metadata of published models in ../shared, with few and random weights.
"""
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

import bench
import eval as evaluation
import train
from conftest import VOCAB, write_gpt2, write_llama
from data import download
from data.download import find_model, hub_id
from data.published import CONFIGS, HUB_IDS
from data.files import UserError
from data.hub import hub_reachable
from gatera import load_adapter, merge_adapters
from model import Transformer, TransformerConfig, load_tokenizer, read_config

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample"
HUB_FILES = ROOT.parent / "shared" / "data" / "hub_files"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
needs_hub_files = pytest.mark.skipif(not HUB_FILES.is_dir(), reason="no files of published models in ../shared")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, empty, of a machine that is offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub_reachable.cache_clear()
    yield tmp_path / "cache"
    hub_reachable.cache_clear()


def snapshot(cache: Path, repo_id: str, files=(), commit=COMMIT) -> Path:
    """A model's directory in the cache, with these files: names, or a directory of them. None is not there at all."""
    model = cache / f"models--{repo_id.replace('/', '--')}"
    directory = model / "snapshots" / commit
    directory.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    for file in sorted(files.iterdir()) if isinstance(files, Path) else files:
        if isinstance(file, Path):
            shutil.copyfile(file, directory / file.name)
        else:
            (directory / file).write_text(json.dumps({"model_type": "gpt2"}) if file == "config.json" else "{}")
    return directory


# ------------------------------------------------------------------------------------------------- names

def test_configs_and_hub_ids_have_the_same_names():
    assert list(HUB_IDS) == list(CONFIGS)


@needs_hub_files
@pytest.mark.parametrize("name, model", [("gpt2", "gpt2"), ("gpt2-xl", "gpt2-xl"), ("llama-3.2-1b", "llama-3.2-1b"),
                                         ("llama-3.2-3b", "llama-3.2-3b")])
def test_configs_are_those_of_the_hub(name, model):
    assert read_config(HUB_FILES / model) == TransformerConfig.from_name(name)


def test_what_a_name_is_called_on_the_hub(cache, tmp_path):
    assert hub_id("gpt2-medium") == "openai-community/gpt2-medium"
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id("llama-3-8b") == "meta-llama/Meta-Llama-3-8B"
    for name in ("meta-llama/Meta-Llama-3-8B", "gpt2-user/model", "gpt2-small", "distilgpt2"):  # not OpenAI's
        assert hub_id(name) == name
    write_gpt2(tmp_path / "gpt2-xl")
    (tmp_path / "tiny.gguf").touch()
    assert hub_id("gpt2-xl") == "gpt2-xl" and hub_id("./gpt2-xl") == "./gpt2-xl" and hub_id("tiny.gguf") is None
    assert find_model("gpt2-xl") == Path("gpt2-xl") and find_model("tiny.gguf", weights=True) == Path("tiny.gguf")
    with pytest.raises(UserError, match="./gpt2-large: no such model file or directory"):
        hub_id("./gpt2-large")


@pytest.mark.parametrize("name", ["a/b c", "a--b", "x" * 200, "-a/b"])
def test_what_is_no_name_of_a_model(cache, name):
    with pytest.raises(UserError, match="not a model; expected a hub id"):
        find_model(name)


# ------------------------------------------------------------------------------------------------- the cache

WHOLE = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def write_index(directory: Path):
    (directory / INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", SHARDS))}))


@pytest.mark.parametrize("name, cached", [
    ("gpt2-medium", "openai-community/gpt2-medium"), ("gpt2-medium", "gpt2-medium"),
    ("openai-community/gpt2-medium", "gpt2-medium"), ("gpt2-user/model", "gpt2-user/model"),
    ("distilgpt2", "distilgpt2"), ("llama-3.1-8b", "meta-llama/Meta-Llama-3.1-8B")])
def test_a_whole_copy_is_used_without_asking(cache, monkeypatch, name, cached):
    directory = snapshot(cache, cached, WHOLE)
    monkeypatch.setattr(download, "hub_reachable", lambda: pytest.fail("asked"))
    assert find_model(name) == find_model(name, weights=True) == directory


def test_a_whole_copy_under_the_old_name_goes_before_part_of_one_under_the_new(cache):
    new, old = (snapshot(cache, name, files) for name, files in [("openai-community/gpt2", WHOLE[:3]), ("gpt2", WHOLE)])
    assert find_model("gpt2") == new and find_model("gpt2", weights=True) == old


PARTS = {  # files that are there, and those that are then missed without and with weights
    "nothing": ([], "config.json, tokenizer.json, tokenizer_config.json", "tokenizer_config.json and 1 more"),
    "no config": (WHOLE[1:], "config.json", "config.json"),
    "no tokenizer": (["config.json", "tokenizer_config.json", "model.safetensors"], "tokenizer.json", "tokenizer.json"),
    "no end of text": (["config.json", "tokenizer.json", "model.safetensors"], *["tokenizer_config.json"] * 2),
    "GPT-2's two files": (["vocab.json", "merges.txt", "config.json", "model.safetensors"],
                          *["tokenizer.json, tokenizer_config.json"] * 2),
    "no weights": (WHOLE[:3], None, "model.safetensors"),
    "an adapter": (WHOLE[:3] + ["adapter_model.safetensors", "adapter_config.json"], None, "model.safetensors"),
    "GPTQ": (WHOLE[:3] + ["gptq_model-4bit-128g.safetensors"], None, "model.safetensors"),
    "pickles": (WHOLE[:3] + ["pytorch_model.bin"], None, "model.safetensors"),
    "a shard without its index": (WHOLE[:3] + SHARDS[:1], None, "model.safetensors"),
    "all shards without their index": (WHOLE[:3] + SHARDS, None, "model.safetensors"),
    "an index": (WHOLE[:3] + [INDEX], None, ", ".join(SHARDS)),
    "one of two shards": (WHOLE[:3] + [INDEX] + SHARDS[:1], None, SHARDS[1]),
}


def put(directory: Path, files: list[str]):
    for file in files:
        (directory / file).write_text("{}")
    if "config.json" in files:
        (directory / "config.json").write_text('{"model_type": "gpt2"}')
    if INDEX in files:
        write_index(directory)


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_model_is_not_a_model(cache, part):
    files, *missed = PARTS[part]
    directory = snapshot(cache, "some/model")
    put(directory, files)
    for weights, names in zip((False, True), missed):
        if names is None:
            assert find_model("some/model", weights) == directory
            continue
        with pytest.raises(UserError) as caught:
            find_model("some/model", weights)
        verb = "are" if "," in names or "more" in names else "is"
        assert f"{names} {verb} not in the local cache, and the hub cannot be reached" in str(caught.value)
        assert "\n" not in str(caught.value) and "smollm2-135m" in str(caught.value)


@pytest.mark.parametrize("files", [WHOLE, WHOLE[:3] + SHARDS + [INDEX]])
def test_a_file_that_is_a_link_to_nowhere_is_missing(cache, files):
    """The cache is made of links: what they lead to may have been deleted."""
    directory = snapshot(cache, "some/model")
    put(directory, files)
    assert find_model("some/model", weights=True) == directory
    for name in [name for name in files if name.endswith(".safetensors")]:
        (directory / name).unlink()
        (directory / name).symlink_to("../../blobs/0")
        with pytest.raises(UserError, match=f"{name} is not in the local cache"):
            find_model("some/model", weights=True)
        (directory / name).unlink()
        (directory / name).touch()


def test_what_the_hub_is_known_not_to_have_is_not_missed(cache):
    """transformers and huggingface_hub keep in .no_exist what they have asked for in vain."""
    directory = snapshot(cache, "some/model")
    put(directory, ["config.json", "vocab.json", "merges.txt", "model.safetensors"])
    nowhere = directory.parents[1] / ".no_exist"
    for commit in ("f" * 40, COMMIT):
        with pytest.raises(UserError, match="tokenizer.json, tokenizer_config.json are not in the local cache"):
            find_model("some/model")
        (nowhere / commit).mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (nowhere / commit / name).touch()
    assert find_model("some/model", weights=True) == directory


def test_models_of_2019_have_no_tokenizer_config(cache):
    """DialoGPT's repository: offline nothing says that there is no tokenizer_config.json, but for its age."""
    directory = snapshot(cache, "microsoft/DialoGPT-medium")
    put(directory, ["vocab.json", "merges.txt", "model.safetensors"])
    (directory / "config.json").write_text('{"n_layer": 24}')
    assert find_model("microsoft/DialoGPT-medium", weights=True) == directory
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer_config.json is not in the local cache"):
        find_model("microsoft/DialoGPT-medium")


def test_an_empty_cache_names_the_ways_out(cache):
    for name in ("some/model", "gpt2-medium", "gpt2-user/model"):
        with pytest.raises(UserError, match=f"^{hub_id(name)}: not in the local cache.*directory.*.gguf.*smollm2-135m"):
            find_model(name)
    assert not cache.exists()


def test_a_mistyped_short_name_gets_the_list_of_them(cache):
    for name, close in (("smolm2", "did you mean smollm2-135m? "), ("llama3 8b", "did you mean llama-3-8b? "), ("xyz", "")):
        with pytest.raises(UserError) as caught:
            find_model(name)
        assert str(caught.value).endswith(f"; {close}The short names are {', '.join(HUB_IDS)}")
    for name in ("gpt2", "some/gpt2"):
        with pytest.raises(UserError) as caught:
            find_model(name)
        assert "short names" not in str(caught.value)


# ---------------------------------------------------------------------------------- a hub on this machine

class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks a hub for, about one model; `server.mode` says how it misbehaves."""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append((self.command, path, self.headers.get("Authorization")))
        refusals = {"missing": (404, "RepoNotFound"), "licence": (403, "GatedRepo"), "token": (401, "RepoNotFound"),
                    "forbidden": (403, None), "error": (500, None)}
        name = path.partition("/resolve/")[2].partition("/")[2]
        mode = server.mode
        if mode == "error soon" and path.startswith("/api/"):
            server.mode = "error"  # from the next question on
        if path == "/":
            self.answer(b"")
        elif mode in refusals:
            status, code = refusals[mode]
            self.answer(b"{}", status, **({"X-Error-Code": code} if code else {}))
        elif path.startswith("/api/models/some/model/tree/"):
            self.answer(json.dumps([{"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                                    for name, content in server.files.items()]).encode())
        elif path.startswith("/api/models/some/model"):
            self.answer(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": [
                {"rfilename": name} for name in server.files]}).encode())
        elif not path.startswith("/some/model/") or name not in server.files:
            self.answer(b"{}", 404, **{"X-Error-Code": "EntryNotFound"})
        else:
            tag = hashlib.sha256(server.files[name]).hexdigest()
            self.answer(server.files[name], ETag=f'"{tag}"', **{"X-Repo-Commit": COMMIT})

    def answer(self, content, status=200, **headers):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start and status == 200 else status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.mode in ("cut", "cut once") and self.path.endswith("/model.safetensors")
        self.wfile.write(content[start:start + 1000] if cut else content[start:])
        if cut:  # the line breaks: the rest never comes
            self.server.mode = "well" if self.server.mode == "cut once" else "cut"
            self.close_connection = True

    def log_message(self, *args):
        pass


OTHERS = ["pytorch_model.bin", "adapter_model.safetensors", "gptq_model-4bit-128g.safetensors", "onnx/config.json",
          "consolidated.safetensors", "original/model.safetensors", "flax_model.msgpack", "modeling_other.py"]


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub with one tiny Llama, and other files beside it that nobody should ask for. `place` is where it comes to;
    `loaded()` names the files whose contents were sent since it was called last."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made = write_llama(cache.parent / "made")
    server.files = {path.name: path.read_bytes() for path in made.iterdir()} | {name: b"other" for name in OTHERS}
    server.files["chat_template.jinja"] = b"{{ messages }}"
    server.asked, server.mode = [], "well"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secretsecret",
                   "HF_HOME": str(cache.parent / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DOWNLOAD_TIMEOUT": "2", "NO_PROXY": "127.0.0.1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # in case it was imported offline
    def loaded():
        names = {path.partition("/resolve/")[2].partition("/")[2] for command, path, _ in server.asked if command == "GET"}
        server.asked.clear()
        return names - {""}

    yield types.SimpleNamespace(server=server, files=server.files, loaded=loaded, place=cache / "models--some--model" / "snapshots" / COMMIT)
    server.shutdown()
    server.server_close()


def test_the_hub_is_probed_once(hub):
    assert hub_reachable() and hub_reachable()
    assert len(hub.server.asked) == 1


def test_offline_nothing_is_asked(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_reachable() and not hub.server.asked


@pytest.mark.parametrize("address", ["http://no-such-host.invalid", "http://127.0.0.1:9", "nonsense"])
def test_an_unreachable_hub_is_noticed_fast(cache, monkeypatch, address):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", address)
    start = time.monotonic()
    assert not hub_reachable()
    assert time.monotonic() - start < 5


METADATA = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_weights_come_last_and_nothing_else_comes(hub):
    assert find_model("some/model") == hub.place and hub.loaded() == METADATA
    assert find_model("some/model") == hub.place and not hub.server.asked
    assert load_tokenizer("some/model").eos == VOCAB - 1 and not hub.server.asked
    assert Transformer.from_pretrained("some/model").config.n_layer == 2 and hub.loaded() == {"model.safetensors"}
    assert {path.name for path in hub.place.iterdir()} == METADATA | {"model.safetensors"}
    assert find_model("some/model", weights=True) == hub.place and not hub.server.asked


def test_shards_come_with_their_index(hub, tmp_path):
    del hub.files["model.safetensors"]
    made = write_llama(tmp_path / "shards", shards=2)
    hub.files.update({path.name: path.read_bytes() for path in made.glob("*.safetensors*")})
    find_model("some/model")
    assert hub.loaded() == METADATA | {INDEX}
    find_model("some/model", weights=True)
    assert hub.loaded() == set(SHARDS)


def test_of_weights_that_are_there_twice_the_one_file_comes(hub):
    """As transformers does, and its loader: shards beside a model.safetensors are not read."""
    hub.files[INDEX] = json.dumps({"weight_map": dict(zip("ab", SHARDS))}).encode()
    hub.files.update(dict.fromkeys(SHARDS, b"other"))
    find_model("some/model", weights=True)
    assert hub.loaded() == METADATA | {INDEX, "model.safetensors"}
    assert find_model("some/model", weights=True) == hub.place and not hub.server.asked


@pytest.mark.parametrize("damage, words", [
    (lambda files: {"config.json": json.dumps(json.loads(files["config.json"]) | {"model_type": "mistral"}).encode()},
     "mistral"),
    (lambda files: {"config.json": json.dumps(json.loads(files["config.json"]) | {"hidden_act": "gelu"}).encode()},
     "hidden_act"),
    (lambda files: {"tokenizer.json": b"{}"}, "tokenizer.json"),
])
@pytest.mark.parametrize("program", [train.main, evaluation.main], ids=["train", "eval"])
def test_what_is_refused_is_refused_before_its_weights_come(hub, damage, words, program):
    hub.files.update(damage(hub.files))
    with pytest.raises(UserError, match=words):
        program(["--init", "some/model", "--data", str(SAMPLE), "--tasks", "boolq", "--out", "out/new"])
    assert hub.loaded() == METADATA and not Path("out").exists()


def test_a_missing_record_is_noticed_before_weights_come(hub, tmp_path):
    flags = ["--init", "some/model", "--tasks", "boolq", "--out", "out/new", "--data"]
    with pytest.raises(UserError, match="--data nowhere: no such file or directory"):
        train.main([*flags, "nowhere"])
    assert not hub.loaded()
    (tmp_path / "mine" / "boolq").mkdir(parents=True)
    (tmp_path / "mine" / "boolq" / "train.jsonl").write_text('{"task": "boolq"}\n')
    with pytest.raises(UserError, match="boolq/train.jsonl, line 1: no question"):
        train.main([*flags, str(tmp_path / "mine")])
    assert hub.loaded() == METADATA


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_model_is_fetched_again(hub, cache, part):
    earlier = snapshot(cache, "some/model", commit="f" * 40)
    put(earlier, PARTS[part][0])
    assert find_model("some/model", weights=True) == hub.place
    assert {path.name for path in hub.place.iterdir()} == METADATA | {"model.safetensors"}
    assert (hub.place / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_what_the_hub_does_not_have_is_asked_for_once(hub, monkeypatch):
    """A repository without tokenizer_config.json, such as DialoGPT's."""
    del hub.files["tokenizer_config.json"]
    assert find_model("some/model", weights=True) == hub.place
    hub.server.asked.clear()
    assert find_model("some/model", weights=True) == hub.place and not hub.server.asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_reachable.cache_clear()
    assert find_model("some/model", weights=True) == hub.place


@pytest.mark.parametrize("gone, words", [
    ({"config.json"}, "some/model: has no config.json; expected a base model"),
    ({"model.safetensors"}, "some/model: has no model.safetensors, nor an index of shards"),
])
def test_what_no_part_of_the_hub_can_be_loaded_is_not_fetched(hub, gone, words):
    for name in gone:
        del hub.files[name]
    with pytest.raises(UserError, match=words):
        find_model("some/model", weights=True)
    assert not hub.loaded() and not hub.place.exists()


def test_a_plan_needs_the_config_alone(hub, cache, capsys, monkeypatch):
    memory = ["--what", "memory", "--method", "gatera"]
    bench.main([*memory, "--model", "some/model", "--r", "2"])
    assert "some/model: " in capsys.readouterr().out and hub.loaded() == {"config.json"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_reachable.cache_clear()
    bench.main([*memory, "--model", "some/model", "--r", "2"])  # now it is there
    with pytest.raises(UserError, match="tokenizer.json, tokenizer_config.json are not in the local cache"):
        find_model("some/model")
    capsys.readouterr()
    for name in ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"):
        bench.main([*memory, "--model", name])
        assert "8,030,261,248 frozen parameters" in capsys.readouterr().out


def test_a_program_that_fetches_a_model_says_no_more_than_needed(hub):
    command = [sys.executable, "eval.py", "--init", "some/model", "--data", "data/sample", "--tasks", "piqa",
               "--limit", "1", "--device", "cpu", "--out", str(hub.place.parents[3] / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and "some/model in " in done.stdout, done.stderr
    assert all(line.startswith("Fetching") for line in done.stderr.splitlines() if line)  # progress


def test_a_hub_that_is_not_there(hub, capfd):
    hub.server.shutdown()
    hub.server.server_close()
    started = time.monotonic()
    with pytest.raises(UserError, match="not in the local cache, and the hub cannot be reached; go online"):
        find_model("some/model")
    assert time.monotonic() - started < 15 and capfd.readouterr().err == ""  # no warnings, no minutes of retries


@pytest.mark.parametrize("mode, words", [
    ("missing", "some/model: the hub has no such model (a private one needs HF_TOKEN)"),
    ("token", "some/model: the hub has no such model (a private one needs HF_TOKEN)"),
    ("licence", "some/model: accept its licence at http://127.0.0.1:"),
    ("forbidden", "some/model: download failed ("),
    ("error", "some/model: download failed ("),
    ("cut", "some/model: download failed ("),
])
def test_a_hub_that_refuses_or_breaks_off_is_one_line_and_leaves_nothing_half(mode, words, hub, cache, capfd):
    hub.server.mode = mode
    with pytest.raises(UserError) as caught:
        find_model("some/model", weights=True)
    error, said = str(caught.value), capfd.readouterr()
    assert error.startswith(words) and "\n" not in error and "secretsecret" not in error + said.out + said.err
    assert "run again" in error or "HF_TOKEN" in error
    assert all(line.startswith("Fetching") for line in said.err.splitlines() if line) and not said.out
    for path in cache.parent.rglob("*"):
        assert "secretsecret" not in path.name and not (path.is_file() and b"secretsecret" in path.read_bytes())
    assert not list(cache.rglob("*.safetensors"))  # nothing that a later run takes for whole
    hub.server.mode = "well"  # and the next run gets it all
    assert find_model("some/model", weights=True) == hub.place
    assert (hub.place / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_hub_that_fails_after_it_has_listed_the_files(hub, cache):
    """huggingface_hub then returns what is there as if that were all of it."""
    put(snapshot(cache, "some/model"), PARTS["no end of text"][0])
    hub.server.mode = "error soon"
    with pytest.raises(UserError, match="some/model: download failed .*run again"):
        find_model("some/model")
    assert hub.server.mode == "error"
    hub.server.mode = "well"
    assert find_model("some/model") == hub.place and (hub.place / "tokenizer_config.json").is_file()


def test_of_several_processes_the_first_alone_fetches(hub, monkeypatch):
    there = []  # when the first process lets the others go on
    monkeypatch.setattr(train.Team, "wait", lambda team: there.append((hub.place / "model.safetensors").is_file()))
    train.main(["--init", "some/model", "--data", str(SAMPLE), "--tasks", "boolq", "--out", "out", "--r", "2",
                "--max-steps", "1", "--warmup", "0", "--validation", "1", "--device", "cpu"])
    assert there and there[0]


def test_a_download_that_breaks_off_goes_on(hub):
    hub.server.mode = "cut once"
    assert find_model("some/model", weights=True) == hub.place
    assert (hub.place / "model.safetensors").read_bytes() == hub.files["model.safetensors"]

# ------------------------------------------------------------------------------------- whole runs, offline

SIZES = {"n_layer", "n_embd", "n_head", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "head_dim"}


def make_small(directory: Path, model: str, **options):
    """A published model's metadata, with weights of which only the vocabulary and the context have their real size."""
    files = {file.name: file for file in (HUB_FILES / model).iterdir()}
    config = json.loads(files["config.json"].read_text())
    if "n_embd" in config:
        write_gpt2(directory, vocab=config["vocab_size"], context=config["n_positions"], **options)
    else:
        write_llama(directory, vocab=config["vocab_size"], tied=config["tie_word_embeddings"], **options)
    small = json.loads((directory / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    for name, file in files.items():
        if name != INDEX:  # its shards are not these
            shutil.copyfile(file, directory / name)
    config |= {name: small[name] for name in SIZES & set(small)}
    (directory / "config.json").write_text(json.dumps(config))


@needs_hub_files
@pytest.mark.parametrize("name, repo_id, model, options", [
    ("gpt2-medium", "openai-community/gpt2-medium", "gpt2", {"prefix": ""}),  # as OpenAI's file names its weights
    ("gpt2-medium", "gpt2-medium", "gpt2", {}),
    ("./llama", None, "llama-3.2-3b", {"shards": 2}),
    ("./tinyllama", None, "tinyllama-1.1b-chat", {}),
    ("microsoft/DialoGPT-medium", "microsoft/DialoGPT-medium", "dialogpt-medium", {}),
])
def test_training_evaluation_and_export_on_real_metadata(name, repo_id, model, options, cache, capsys):
    directory = Path(name) if repo_id is None else snapshot(cache, repo_id)
    make_small(directory, model, **options)
    assert find_model(name, weights=True) == directory

    # The headline command, made short, and the papers' way to evaluate
    common = ["--tasks", "boolq", "--data", str(SAMPLE), "--device", "cpu"]
    short = ["--r", "2", "--max-steps", "2", "--warmup", "1", "--batch", "2", "--validation", "1", *common]
    train.main(["--init", name, "--peft", "gatera", *short, "--out", "out/gated"])
    summary = evaluation.main(["--run", "out/gated", "--protocol", "generate", "--limit", "2", *common])
    assert summary["configuration"]["base"] == name
    [predictions] = Path("out/gated/eval").glob("*/predictions.jsonl")
    assert len(predictions.read_text().splitlines()) == 2
    evaluation.main(["--run", "out/gated", "--prompt", "Is the Nile in Africa?", "--device", "cpu"])

    # An ungated run in Hugging Face layout is the merged model
    train.main(["--init", name, "--peft", "hira", "--lr", "0.1", *short, "--out", "out/plain"])
    evaluation.main(["--run", "out/plain", "--export", "hf", "exported", "--device", "cpu"])
    exported, merged = Transformer.from_pretrained("exported"), Transformer.from_pretrained(name)
    tokenizer = load_tokenizer("exported")
    ids = torch.tensor([load_tokenizer(name).encode("Is the Nile in Africa?\n\nAnswer: 12345 it's")])
    assert ids.tolist() == [tokenizer.encode("Is the Nile in Africa?\n\nAnswer: 12345 it's")]
    assert (tokenizer.bos, tokenizer.eos) == (load_tokenizer(name).bos, load_tokenizer(name).eos)
    base = merged(ids)
    load_adapter(merged, "out/plain/best")
    merge_adapters(merged)
    assert torch.equal(exported(ids), merged(ids)) and (exported(ids) - base).abs().max() > 1e-4
