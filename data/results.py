"""Predictions and results on disk, and the table of them.

An evaluation is a directory: predictions.jsonl has a line for each question, and results.json the configuration, a
digest of each task's records, the accuracies, and a digest of the predictions that they count. Multiple choice is
summarised here, free answers in answers.py.
"""
import contextlib
import hashlib
import math
import os
from collections import Counter
from pathlib import Path

import torch

from data.answers import (answers_table, is_answer_prediction, is_answer_result, is_count, is_right, is_span,
                          summarise_answers)
from data.commonsense import FORMS
from data.files import UserError, is_number, json_lines, parse_json, read_file, write_json
from data.output import claimed, read_ours, set_aside
from data.prepare import DEFAULT, KNOWN, data_sets, is_one_file, task_names
from data.resume import read_facts

EVALUATION = ("results.json", "predictions.jsonl")


def accuracy_key(protocol: str) -> str:
    """The one accuracy to quote: acc_norm in cloze form, where choices differ in length; acc elsewhere."""
    return "acc_norm" if protocol == "cloze" else "acc"


def correct(prediction: dict, protocol: str) -> bool:
    """Whether a prediction counts for the accuracy to quote."""
    if "label" not in prediction:
        return is_right(prediction)
    chosen = "prediction_norm" if accuracy_key(protocol) == "acc_norm" else "prediction"
    return prediction[chosen] == prediction["label"]


def summarise(predictions: list[dict], protocol: str) -> dict:
    """{"n", "acc", "acc_norm" (not of generate), "interval", "majority", "unparsed", "cut"} of one task's predictions.

    Accuracies in percent; the interval is Wilson's for 95 %, of the accuracy to quote; majority: the share of the
    commonest label, which a model that has learnt nothing else can reach; unparsed: generated texts without a label;
    cut: questions that lost the start of their prompt. Of free answers it is what `summarise_answers` says."""
    n = len(predictions)
    if n and "label" not in predictions[0]:
        return summarise_answers(predictions, wilson)
    result = {"n": n, "acc": 100 * sum(p["prediction"] == p["label"] for p in predictions) / max(1, n)}
    if protocol != "generate":
        result["acc_norm"] = 100 * sum(p["prediction_norm"] == p["label"] for p in predictions) / max(1, n)
    commonest = max(Counter(p["label"] for p in predictions).values(), default=0)
    return result | {"interval": wilson(sum(correct(p, protocol) for p in predictions), n),
                     "majority": 100 * commonest / max(1, n),
                     "unparsed": sum(p["prediction"] is None for p in predictions),
                     "cut": sum(p["cut"] for p in predictions)}


def wilson(hits: int, n: int, z: float = 1.96) -> list[float]:
    """The 95 % interval of a proportion, in percent (Wilson 1927): unlike p ± z s it stays sensible near 0 and 100."""
    if n == 0:
        return [0.0, 100.0]
    p, spread = hits / n, z * z / n
    middle, half = p + spread / 2, z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return [100 * (middle - half) / (1 + spread), 100 * (middle + half) / (1 + spread)]


# ------------------------------------------------------------------------------------ predictions on disk

@contextlib.contextmanager
def continued(out: Path, summary: dict, sizes: dict[str, int]):
    """Opens an evaluation in `out`, which goes on where it was if it was interrupted. Yields what is there already,
    {task: {index: prediction}}, and the open file for what follows. summary: what becomes results.json. sizes: how many
    questions each task has."""
    with claimed(out, EVALUATION):
        earlier = earlier_predictions(out, summary, sizes)
        with open(out / "predictions.jsonl", "a") as file:  # first: results.json never stands alone
            save_results(out, summary, file)
            yield earlier, file


def save_results(out: Path, summary: dict, file) -> None:
    """Writes results.json when the predictions that it counts are on the disk. Its digest of them goes on being right
    while lines are appended."""
    file.flush()
    os.fsync(file.fileno())
    content = (out / "predictions.jsonl").read_bytes()
    summary["predictions"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(out / "results.json", summary)


def earlier_predictions(out: Path, summary: dict, sizes: dict[str, int]) -> dict[str, dict[int, dict]]:
    """The predictions of an earlier evaluation in `out` if it was of the very same thing: model, adapter's contents,
    protocol and records. The results of its other tasks join `summary`. Anything else is moved aside and not mixed in."""
    results, predictions = (out / name for name in EVALUATION)
    old = read_ours(results, {"configuration", "data", "tasks"})
    if old is None:
        if results.exists() or predictions.exists() and predictions.stat().st_size:
            set_aside(out, EVALUATION, "files that are no evaluation")
        return {}
    configuration, digests = old["configuration"], old["data"]
    if not (isinstance(configuration, dict) and isinstance(digests, dict)):
        check_results(old, results)
    differ = [name for name, value in summary["configuration"].items() if configuration.get(name) != value]
    differ += [f"{task}'s records" for task, digest in summary["data"].items() if digests.get(task, digest) != digest]
    if differ or not predictions.exists():
        what = f"another evaluation ({', '.join(differ)} differ)" if differ else "results without their predictions"
        set_aside(out, EVALUATION, what)
        return {}
    check_results(old, results)
    found, size = read_predictions(out, old)
    if wrong := [task for task, of_task in found.items() if max(of_task) >= sizes.get(task, math.inf)]:
        raise UserError(f"{predictions}: more predictions of {', '.join(wrong)} than questions; {AGAIN}")
    os.truncate(predictions, size)  # a last line without an end is not whole
    summary |= {name: old[name] | summary[name] for name in ("data", "tasks")}
    return found


NO_DIGEST = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}  # of a results.json without one
AGAIN = "move it and the file beside it away, and evaluate again"


def check_results(found: dict, file: Path) -> None:
    """UserError for a results.json that is damaged, or of another version: every field that something relies on."""
    if missing := {"configuration", "settings", "data", "tasks"} - found.keys():
        raise UserError(f"{file}: of another version of eval.py, without {', '.join(sorted(missing))}; {AGAIN}")
    c, data, tasks = (found[name] for name in ("configuration", "data", "tasks"))
    digest = found.get("predictions", NO_DIGEST)
    wrong = [name for name in ("configuration", "data", "tasks") if not isinstance(found[name], dict)]
    if not wrong:
        norm = () if c.get("protocol") == "generate" else ("acc_norm",)
        rules = {
            "configuration": all(isinstance(c.get(name), str) for name in ("base_sha256", "dtype", "protocol", "split"))
            and c["protocol"] in (*FORMS, "generate"),
            "settings": found["settings"] is None or isinstance(found["settings"], dict),
            "data": all(isinstance(digest, str) for digest in data.values()),
            "tasks": tasks.keys() <= data.keys() and all(isinstance(task, dict) and (
                is_answer_result(task, c["protocol"]) if not is_choice(task) else
                is_count(task.get("n")) and task["n"] > 0
                and all(is_count(task.get(name)) for name in ("unparsed", "cut"))
                and all(is_number(task.get(name), 0, 100) for name in ("acc", "majority", *norm))
                and is_span(task.get("interval"), -1e-6, 100 + 1e-6)) for task in tasks.values()),
            "predictions": isinstance(digest, dict) and is_count(digest.get("bytes"))
            and isinstance(digest.get("sha256"), str)}
        wrong = [name for name, fine in rules.items() if not fine]
    if wrong:
        raise UserError(f"{file}: damaged, its {' and '.join(wrong)} cannot be what eval.py wrote; {AGAIN}")


def is_choice(result: dict) -> bool:
    """Whether a task's result is one of multiple choice."""
    return not {"loss", "exact"} & result.keys()


def is_prediction(value, protocol: str) -> bool:
    """Whether what a line of predictions.jsonl says is a prediction of this protocol."""
    if not (isinstance(value, dict) and isinstance(value.get("task"), str) and isinstance(value.get("cut"), bool)
            and is_count(value.get("index"))):
        return False
    if "label" not in value:
        return is_answer_prediction(value, protocol)
    if not is_count(value["label"]):
        return False
    if protocol == "generate":
        return isinstance(value.get("text"), str) and (is_count(chosen := value.get("prediction", "")) or chosen is None)
    scores, choices = value.get("scores"), [value["label"], value.get("prediction"), value.get("prediction_norm")]
    return (isinstance(scores, list) and all(type(score) is float for score in scores)
            and all(is_count(choice) and choice < len(scores) for choice in choices))


def read_predictions(directory: Path, results: dict) -> tuple[dict[str, dict[int, dict]], int]:
    """({task: {index: prediction}}, how many bytes their whole lines are) of predictions.jsonl beside results.json."""
    file, found, protocol = directory / "predictions.jsonl", {}, results["configuration"]["protocol"]
    content = read_file(file)
    content = content[:content.rfind(b"\n") + 1]
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            prediction = parse_json(line, file)
        except UserError:
            prediction = None
        if not is_prediction(prediction, protocol) or prediction["task"] not in results["data"]:
            raise UserError(f"{file}, line {number}: not a prediction; {AGAIN}")
        of_task = found.setdefault(prediction["task"], {})
        if prediction["index"] in of_task:
            raise UserError(f"{file}, line {number}: a second prediction for the same question; {AGAIN}")
        of_task[prediction["index"]] = prediction
    digest = results.get("predictions", NO_DIGEST)
    counted = content[:digest["bytes"]]
    if len(counted) < digest["bytes"] or hashlib.sha256(counted).hexdigest() != digest["sha256"]:
        raise UserError(f"{file}: not the predictions that results.json counts, it was changed or damaged; {AGAIN}")
    if short := [task for task, result in results["tasks"].items()
                 if len(found.get(task, ())) != result["n"] or max(found[task]) >= result["n"]]:
        raise UserError(f"{file}: not all predictions of {', '.join(short)}, and no others, are there; {AGAIN}")
    return found, len(content)


# ---------------------------------------------------------------------------------- finding runs and results

def find_run(c) -> tuple[Path, dict]:
    """(The directory of the adapter, the run's config.json) of --run, which may also name one of a run's adapters.
    c: the flags of eval.py."""
    run = Path(c.run)
    if not run.is_dir():
        raise UserError(f"{run}: no such directory")
    facts = read_facts(run / "config.json" if (run / "config.json").exists() else run.parent / "config.json")
    files = "adapter.safetensors", "adapter_config.json"  # ours, peft's
    found = [directory for directory in (run / c.adapter, run) if any((directory / name).exists() for name in files)]
    if not found:
        last = "; last/ is there, of a run that has not ended: add --adapter last"
        raise UserError(f"{run}: no adapter there; looked for {run / c.adapter}/adapter.safetensors"
                        + (last if (run / "last" / "adapter.safetensors").exists() else ""))
    if not (c.init or facts.get("config", {}).get("init")):
        raise UserError(f"{run}: no config.json that names the base model; pass --init")
    return found[0], facts


def digests(records: dict[str, list[dict]]) -> dict[str, str]:
    """{task: the SHA-256 of its records}, by which questions are known to be the same."""
    return {task: hashlib.sha256(json_lines(of_task).encode()).hexdigest() for task, of_task in records.items()}


def find_data(c, settings: dict) -> Path:
    """The records to score: --data, else what the run was trained on, else, for tasks that are not among that, such as
    gsm8k after a training on MetaMathQA, the prepared ones."""
    data = Path(c.data or settings.get("data") or DEFAULT)
    if c.data or data == DEFAULT:
        return data
    chosen = set() if c.tasks in ("", "all") else set(task_names(c.tasks, data))
    if chosen and (data.exists() or is_one_file(data)) and chosen <= set(KNOWN) - set(data_sets(data)):
        print(f"{c.tasks}: not in {data}, which {c.run} was trained on, but in {DEFAULT}")
        return DEFAULT
    if not data.exists():
        kind = "file" if is_one_file(data) else "directory"
        raise UserError(f"{data}: no such {kind}, from which {c.run} had its records (seen from where train.py was started); "
                        "pass --data")
    return data


def check_base(c, facts: dict, base: str, fingerprint: str, dtype: torch.dtype) -> None:
    """A word if a run was trained on another base than the one that is loaded, UserError if nobody asked for that one. A
    base of float32 in float16 is rounded twice on its way to its fingerprint, so that float16's are compared with
    float16's alone."""
    comparable = (facts.get("dtype") == "torch.float16") == (dtype == torch.float16)
    if comparable and facts.get("base_sha256", fingerprint) != fingerprint:
        text = f"{base}: its weights are not those that {c.run} was trained on ({facts['config']['init']} at that time)"
        if not c.init:
            raise UserError(f"{text}; pass --init with that base, or with this one to use it all the same")
        print(f"WARNING: {text}")


def results_name(adapter: str, protocol: str, c) -> str:
    """The name of a directory of results: those of each adapter, protocol, split and limit stand side by side.
    c: the flags of eval.py."""
    parts = [adapter, "gates" if c.gates else "", protocol, "val" if c.split == "val" else "", str(c.limit or ""),
             f"beams{c.beams}" if protocol == "generate" and c.beams != 4 else "",
             f"new{c.max_new_tokens}" if protocol == "generate" and c.max_new_tokens else ""]
    return "-".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------- the table

def mean_result(results: dict[str, dict], protocol: str) -> dict | None:
    """The unweighted mean over the tasks of multiple choice, as papers report it; None if there are none. Its 95 %
    interval combines the tasks' own (MOVER, Zou and Donner 2008): for one task it is that task's, and it stays within 0
    and 100."""
    tasks = [result for result in results.values() if is_choice(result)]
    if not tasks:
        return None
    values = [task[accuracy_key(protocol)] for task in tasks]
    value = sum(values) / len(values)
    low, high = (math.dist(values, [task["interval"][side] for task in tasks]) / len(values) for side in (0, 1))
    mean = {key: sum(task[key] for task in tasks) / len(tasks)
            for key in ("acc", "acc_norm", "majority") if key in tasks[0]}
    total = {key: sum(task[key] for task in tasks) for key in ("n", "unparsed", "cut")}
    return mean | total | {"interval": [value - low, value + high]}


def table(results: dict[str, dict], protocol: str) -> str:
    """The results of several tasks as text: multiple choice with the majority baseline beside it and the unweighted mean
    below, then free answers."""
    choice = {task: row for task, row in results.items() if is_choice(row)}
    free = {task: row for task, row in results.items() if not is_choice(row)}
    if not choice:
        return answers_table(free)
    lines = [f"{'task':<13} {'n':>6} {'acc':>7} {'acc_norm':>9} {'95 % interval':>15} {'majority':>9} {'unparsed':>9} "
             f"{'cut':>5}"]
    rows = choice | ({"mean": mean_result(choice, protocol)} if len(choice) > 1 else {})
    for task, row in rows.items():
        norm = f"{row['acc_norm']:.2f}" if "acc_norm" in row else "-"
        low, high = row["interval"]
        lines.append(f"{task:<13} {row['n']:>6,} {row['acc']:>7.2f} {norm:>9} {f'{low:.1f} - {high:.1f}':>15} "
                     f"{row['majority']:>9.2f} {row['unparsed']:>9} {row['cut']:>5}")
    return "\n".join([*lines, *(["", answers_table(free)] if free else [])])
