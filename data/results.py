"""Predictions and results on disk, and the table of them.

An evaluation is a directory: predictions.jsonl has a line for each question, and results.json the configuration, a
digest of each task's records, and the accuracies.
"""
import contextlib
import json
import math
import os
from pathlib import Path

from data.files import UserError, claim, json_lines, move_aside, read_json, refuse_special, write_atomically, write_json


def accuracy_key(protocol: str) -> str:
    """The one accuracy to quote: acc_norm in cloze form, where choices differ in length; acc elsewhere."""
    return "acc_norm" if protocol == "cloze" else "acc"


def correct(prediction: dict, protocol: str) -> bool:
    """Whether a prediction counts for the accuracy to quote."""
    chosen = "prediction_norm" if accuracy_key(protocol) == "acc_norm" else "prediction"
    return prediction[chosen] == prediction["label"]


# ------------------------------------------------------------------------------------ predictions on disk

@contextlib.contextmanager
def claimed(directory: Path):
    """Nobody else evaluates into a directory meanwhile."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        claim(handle, directory)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def continued(out: Path, summary: dict):
    """Opens an evaluation in `out`, which goes on where it was if it was interrupted. Yields what is there already,
    {task: {index: prediction}}, and the open file for what follows. summary: what becomes results.json."""
    with claimed(out):
        earlier = earlier_predictions(out, summary)
        write_json(out / "results.json", summary)
        whole = json_lines([line for predictions in earlier.values() for line in predictions.values()])
        write_atomically(out / "predictions.jsonl", lambda path: path.write_text(whole))
        with open(out / "predictions.jsonl", "a") as file:
            yield earlier, file


def earlier_predictions(out: Path, summary: dict) -> dict[str, dict[int, dict]]:
    """The predictions of an earlier evaluation in `out` if it was of the very same thing: model, adapter's contents,
    protocol and records. The results of its other tasks join `summary`. Any other evaluation is moved aside and not
    mixed in."""
    if not (out / "results.json").exists():
        return {}
    old = read_json(out / "results.json")
    configuration, digests = old.get("configuration", {}), old.get("data", {})
    differ = [name for name, value in summary["configuration"].items() if configuration.get(name) != value]
    differ += [f"{task}'s records" for task, digest in summary["data"].items() if digests.get(task, digest) != digest]
    if not differ:
        summary |= {name: old[name] | summary[name] for name in ("data", "tasks")}
        return read_predictions(out)
    files = [out / name for name in ("predictions.jsonl", "results.json")]  # in this order, a kill loses nothing
    aside = " and ".join(str(move_aside(file)) for file in files if file.exists())
    print(f"{out} held another evaluation ({', '.join(differ)} differ), which is now in {aside}")
    return {}


def read_predictions(directory: Path) -> dict[str, dict[int, dict]]:
    """{task: {index: prediction}} of predictions.jsonl."""
    file, found = directory / "predictions.jsonl", {}
    refuse_special(file)
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []  # a last line without an end is not whole
    for number, line in enumerate(lines, 1):
        try:
            prediction = json.loads(line)
            if not {"label", "prediction", "cut"} <= prediction.keys():
                raise ValueError
            found.setdefault(prediction["task"], {})[prediction["index"]] = prediction
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}, line {number}: not a prediction; delete {directory} and evaluate again") from None
    return found


# ---------------------------------------------------------------------------------- finding runs and results

def find_run(c) -> tuple[Path, dict]:
    """(The directory of the adapter, the run's config.json) of --run, which may also name one of a run's adapters.
    c: the flags of eval.py."""
    run = Path(c.run)
    if not run.is_dir():
        raise UserError(f"{run}: no such directory")
    file = next((file for file in (run / "config.json", run.parent / "config.json") if file.exists()), None)
    facts = read_json(file) if file else {}
    settings, kinds = facts.get("config", {}), {"init": str, "tasks": str, "form": str, "max_len": int}
    if not (isinstance(settings, dict)
            and all(isinstance(settings.get(name, kind()), kind) for name, kind in kinds.items())):
        raise UserError(f"{file}: not the config.json of a run")
    files = "adapter.safetensors", "adapter_config.json"  # ours, peft's
    found = [directory for directory in (run / c.adapter, run) if any((directory / name).exists() for name in files)]
    if not found:
        last = "; last/ is there, of a run that has not ended: add --adapter last"
        raise UserError(f"{run}: no adapter there; looked for {run / c.adapter}/adapter.safetensors"
                        + (last if (run / "last" / "adapter.safetensors").exists() else ""))
    if not (c.init or settings.get("init")):
        raise UserError(f"{run}: no config.json that names the base model; pass --init")
    return found[0], facts


def results_name(adapter: str, protocol: str, c) -> str:
    """The name of a directory of results: those of each adapter, protocol, split and limit stand side by side.
    c: the flags of eval.py."""
    parts = [adapter, "gates" if c.gates else "", protocol, "val" if c.split == "val" else "", str(c.limit or ""),
             f"beams{c.beams}" if protocol == "generate" and c.beams != 4 else "",
             "" if c.skip_closed is None else f"skip{c.skip_closed}"]
    return "-".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------- the table

def mean_result(results: dict[str, dict], protocol: str) -> dict:
    """The unweighted mean over tasks, as papers report it. Its 95 % interval combines the tasks' own (MOVER, Zou and
    Donner 2008): for one task it is that task's, and it stays within 0 and 100."""
    tasks = list(results.values())
    values = [task[accuracy_key(protocol)] for task in tasks]
    value = sum(values) / len(values)
    low, high = (math.dist(values, [task["interval"][side] for task in tasks]) / len(values) for side in (0, 1))
    mean = {key: sum(task[key] for task in tasks) / len(tasks)
            for key in ("acc", "acc_norm", "majority") if key in tasks[0]}
    total = {key: sum(task[key] for task in tasks) for key in ("n", "unparsed", "cut")}
    return mean | total | {"interval": [value - low, value + high]}


def table(results: dict[str, dict], protocol: str) -> str:
    """The results of several tasks as text, with the majority baseline beside them and their unweighted mean below."""
    lines = [f"{'task':<14} {'n':>6} {'acc':>7} {'acc_norm':>9} {'95 % interval':>15} {'majority':>9} {'unparsed':>9} "
             f"{'cut':>5}"]
    rows = results | ({"mean": mean_result(results, protocol)} if len(results) > 1 else {})
    for task, row in rows.items():
        norm = f"{row['acc_norm']:.2f}" if "acc_norm" in row else "-"
        low, high = row["interval"]
        lines.append(f"{task:<14} {row['n']:>6,} {row['acc']:>7.2f} {norm:>9} {f'{low:.1f} - {high:.1f}':>15} "
                     f"{row['majority']:>9.2f} {row['unparsed']:>9} {row['cut']:>5}")
    return "\n".join(lines)
