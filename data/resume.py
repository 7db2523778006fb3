"""What a run has left in its directory, of which nothing is believed before it is checked: files, settings, and where
the checkpoint stands. runs.py says which files there are."""
import dataclasses
import json
import math
import os
import stat
from contextlib import suppress
from pathlib import Path

from data.commonsense import FORMS
from data.files import UserError, is_number, is_text, listed, read_info, read_json, unwritable
from data.own import template_problem

ADAPTERS = ("best", "last")
FILES = ("config.json", "metrics.jsonl", "state.safetensors", "training.json",
         *(f"{adapter}/{name}" for adapter in ADAPTERS for name in ("adapter.safetensors", "adapter.json")))
# The fields of config.json: those that stay while a run lasts, and the others.
FIXED = {"adapter": dict, "dtype": str, "data_sha256": str, "base_sha256": str, "base_parameters": int,
         "trainable_parameters": int}
FACTS = FIXED | {"config": dict, "steps": int, "processes": int, "device": str, "torch": str, "python": str}
# The settings that eval.py takes from there.
FOLLOWED = {"init": str, "tasks": str, "form": str, "data": str, "max_len": int, "template": str}


# ------------------------------------------------------------------------------------------------ the directory

def is_run(directory: Path) -> bool:
    """Whether a directory has the config.json of a run."""
    with suppress(UserError, OSError):
        return {"config", "dtype", "steps", "data_sha256"} <= read_json(directory / "config.json").keys()
    return False


def misplaced(directory: Path) -> str | None:
    """What is where a run keeps its files and is none of its: a link, through which something else would be
    overwritten, a pipe, on which reading waits for ever, ... None if there is nothing of the kind."""
    if directory.is_symlink() and not directory.exists():
        return f"{directory}: a link to nothing; expected a directory, or a new name"
    for name in (*ADAPTERS, *FILES):
        path = directory / name
        expected, is_expected = ("directory", stat.S_ISDIR) if name in ADAPTERS else ("file", stat.S_ISREG)
        if os.path.lexists(path) and not is_expected(path.lstat().st_mode):
            return f"{path}: a link, or something else that is no {expected} of a run; expected a {expected}, or nothing"
    return None


def halves(directory: Path) -> list[Path]:
    """Files that a process was writing when it was killed."""
    paths = [directory / name for name in FILES]
    return [half for path in paths for half in path.parent.glob(f".{path.name}.*.tmp")]


def unusable(directory: Path) -> str | None:
    """Why a new run cannot have this directory; None if it can. An earlier run there is moved aside, nothing else is."""
    if problem := unwritable(directory) or misplaced(directory):
        return problem
    if not directory.exists() or is_run(directory) and not Path.cwd().is_relative_to(directory.resolve()):
        return None
    metrics = directory / "metrics.jsonl"  # empty and alone, it is of a run that was killed as it began
    rest = set(directory.iterdir()) - set(halves(directory)) - {metrics}
    if rest or metrics.exists() and metrics.stat().st_size or directory.resolve() == Path.cwd():
        return f"{directory}: the directory holds other things than a run; expected a new or empty one"
    return None


# ----------------------------------------------------------------------------------- settings and the checkpoint

def read_facts(file: Path) -> dict:
    """What the config.json of a run says, {} if there is none. UserError for values that train.py writes for nothing; of
    settings, those are checked that eval.py follows. A field may be missing: an adapter's config.json may be short."""
    facts = read_json(file) if file.exists() else {}
    wrong = [name for name, kind in FACTS.items() if name in facts and not fits(facts[name], kind)]
    if not wrong:
        settings = facts.get("config", {})
        wrong = [name for name, kind in FOLLOWED.items() if name in settings and not fits(settings[name], kind)]
        if not wrong and (settings.get("form", FORMS[0]) not in FORMS or settings.get("max_len", 16) < 16):
            wrong = ["form or max_len"]
        if not wrong and settings.get("template") and template_problem(settings["template"]):
            wrong = ["template"]
    if wrong:
        raise UserError(f"{file}: not the config.json of a run: its {' and '.join(wrong)} cannot be what train.py wrote")
    return facts


def parse_info(text: str, directory: Path) -> dict:
    """What `Run.save` wrote beside the tensors, every value checked."""
    try:
        info = json.loads(text)
        whole, facts = ("step", "steps", "cut", "metrics"), info["facts"]
        is_fine = (all(is_number(info[name], 0, math.inf) for name in (*whole, "best", "seconds"))
                   and all(type(info[name]) is int for name in whole) and 1 <= info["step"] <= info["steps"]
                   and all(is_number(value, 0, 1e30) for value in info["scaler"].values())
                   and all(type(facts[name]) is kind for name, kind in FACTS.items()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_fine = False
    if not is_fine:
        raise UserError(f"--resume {directory}: its checkpoint is of another version of train.py; start a new run")
    return info


def saved_info(directory: Path) -> dict:
    """Where the checkpoint of the run in a directory stands; {} if nothing was saved yet."""
    file = directory / "state.safetensors"
    return parse_info(read_info(file), directory) if file.exists() else {}


def read_settings(directory: Path, settings: type, changed: set[str]) -> dict:
    """The settings of the run in a directory, fields of the dataclass `settings`. Its dtype is no longer "auto": what
    that meant, it has to mean again. UserError names what is no value of a setting, and what is not as it was when the
    checkpoint was saved; `changed` are those that get another value anyway."""
    if problem := misplaced(directory):
        raise UserError(f"--resume {problem}")
    facts = read_facts(directory / "config.json")
    if not is_run(directory):
        raise UserError(f"--resume {directory}: there is no run; expected a directory with the config.json of one")
    saved = saved_info(directory)
    if saved and facts == saved.get("earlier"):  # A kill came between the checkpoint, written first, and config.json.
        facts = saved["facts"]
    kinds = {field.name: field.type for field in dataclasses.fields(settings)}
    values = {name: value for name, value in facts["config"].items() if name in kinds}
    words = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    wrong = [f"{name} {value!r:.40}: expected {words[kinds[name]]}" for name, value in values.items()
             if not fits(value, kinds[name])]
    if saved and not wrong:
        before = saved["facts"]
        wrong = (differences(values, before["config"], kinds.keys() - {"resume", "out", "dtype", *changed})
                 + differences(facts, before, FIXED))
    if wrong:
        raise UserError(f"{directory / 'config.json'}: {listed(wrong)}; expected what train.py wrote there, and "
                        "flags for what may change")
    return values | {"dtype": facts["dtype"].removeprefix("torch.")}


def fits(value, kind: type) -> bool:
    """Whether a value from a file is one of a field of this kind."""
    if kind is float:
        return is_number(value, -math.inf, math.inf)
    return type(value) is kind and (kind is not str or is_text(value))


def differences(now: dict, before: dict, names) -> list[str]:
    return [f"{name} is {now.get(name)!r:.200}, was {before.get(name)!r:.200} when the checkpoint was saved"
            for name in sorted(names) if now.get(name) != before.get(name)]
