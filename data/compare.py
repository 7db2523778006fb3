"""Whether evaluated runs differ: eval.py --compare."""
import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.answers import compare_losses, losses_table, markdown
from data.cli import flag
from data.files import UserError, read_json
from data.prepare import DEFAULT, usual_split
from data.results import check_results, correct, find_data, is_choice, read_predictions, results_name
from data.resume import read_facts


def runs_of(group: str) -> list[str]:
    """The runs that a word of --compare names: with commas between, or all those in a directory, such as the seeds in
    out/lora/1, out/lora/2, ..."""
    inside = [] if (Path(group) / "config.json").exists() else sorted(Path(group).glob("*/config.json"))
    return [str(file.parent) for file in inside] or group.split(",")


def find_results(run: str, c) -> Path:
    """The directory of a run's results that --protocol, --split, --limit, ... choose, or `run` itself if it is one."""
    directory = Path(run)
    if (directory / "predictions.jsonl").exists():
        return directory
    settings = read_facts(directory / "config.json").get("config", {})
    try:
        data = find_data(replace(c, run=run), settings)
    except UserError:  # The data are gone, but the results may be there.
        data = settings.get("data") or DEFAULT
    protocol, split = c.protocol or settings.get("form", "cloze"), c.split or usual_split(data)
    return directory / "eval" / results_name(c.adapter, protocol, replace(c, split=split))


def check_evaluated(runs: list[str], c) -> dict[str, Path]:
    """{run: the directory of its results}. UserError names all runs without results, and how to get them."""
    found = {run: find_results(run, c) for run in dict.fromkeys(runs)}
    missing = [run for run, directory in found.items() if not (directory / "predictions.jsonl").exists()]
    if not missing:
        return found
    usual = {"adapter": "best", "protocol": "", "split": "", "beams": 4, "max_new_tokens": 0, "limit": 0,
             "data": "", "tasks": "", "template": "", "max_len": 0}
    given = {name: getattr(c, name) for name, value in usual.items() if getattr(c, name) != value}
    flags = shlex.join(word for name, value in given.items() for word in (flag(name), str(value).replace("\n", "\\n")))
    there = sorted({path.parent.name for run in missing for path in Path(run).glob("eval/*/predictions.jsonl")})
    advice = f"there are {', '.join(there)}: choose with --protocol, --split, --limit, --beams, --adapter, or name one, as " \
             f"{missing[0]}/eval/NAME; or evaluate first" if there else "first"
    name = " or ".join(sorted({found[run].name for run in missing}))
    each = '"$run"' if len(missing) > 1 else shlex.quote(missing[0])
    command = f"python eval.py --run {each} {flags}".strip()
    loop = f"for run in {shlex.join(missing)}; do {command}; done"
    raise UserError(f"{', '.join(missing)}: no results called {name} there; {advice}: "
                    + (loop if len(missing) > 1 else command))


class Results(NamedTuple):
    """An evaluated run: its results.json, {task: 1.0 for each question that it gets right, 0.0 for the others}, and
    {task: the predictions} of free answers that were scored by their loss."""
    summary: dict
    hits: dict[str, list[float]]
    losses: dict[str, list[dict]]


def load_results(directory: Path) -> Results:
    summary = read_json(directory / "results.json")
    check_results(summary, directory / "results.json")
    found, _ = read_predictions(directory, summary)
    protocol = summary["configuration"]["protocol"]
    in_order = {task: [found[task][i] for i in sorted(found[task])] for task in summary["tasks"]}
    losses = {task: predictions for task, predictions in in_order.items() if "loss" in summary["tasks"][task]}
    return Results(summary, {task: [float(correct(prediction, protocol)) for prediction in predictions]
                             for task, predictions in in_order.items() if task not in losses}, losses)


# ------------------------------------------------------------------------------- what can be compared

# What runs must share for their difference to be the method's. Whatever else differs is what is being compared.
SHARED_SETTINGS = ("base", "tasks", "data_sha256", "train_sha256", "form", "template", "limit", "max_len", "batch", "steps",
                   "validation", "eval_every", "seed")
# What changes no step of training but by rounding, or only how many there are.
UNIMPORTANT = ("resume", "out", "data", "max_steps", "epochs", "micro_batch", "log_every", "save_every", "test",
               "device", "compile", "checkpointing", "fsdp", "logger")


def common_tasks(groups: list[str], methods: list[list[Results]], chosen: list[str]) -> list[str]:
    """The chosen tasks, [] are all, that all runs have. UserError where runs cannot be paired by question."""
    for group, method in zip(groups, methods):
        seeds = [str(run.summary["settings"]["seed"]) for run in method if "seed" in (run.summary["settings"] or {})]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{group}: two of {', '.join(runs_of(group))} have the same seed; name one of each seed, "
                            "with commas between (train.py moves an earlier run aside, to NAME-1)")
    summaries = [run.summary for method in methods for run in method]
    tasks = [task for task in summaries[0]["tasks"] if task in (chosen or summaries[0]["tasks"])
             and all(task in summary["tasks"] for summary in summaries)]
    # A loss is the same in cloze and in label form.
    of_losses = bool(tasks) and all("loss" in summary["tasks"][task] for summary in summaries for task in tasks)
    for name in (*(() if of_losses else ("protocol",)), "split", "beams", "max_new_tokens", "rules"):
        if len(values := {str(summary["configuration"].get(name)) for summary in summaries}) > 1:
            raise UserError(f"these cannot be compared: their {name} is {' and '.join(sorted(values))}")
    if other := [task for task in tasks
                 if len({(summary["data"][task], summary["tasks"][task]["n"]) for summary in summaries}) > 1]:
        raise UserError(f"these cannot be paired: the questions of {', '.join(other)} differ; evaluate all with the "
                        "same --limit, --data and --template")
    if not tasks:
        raise UserError("these have no task in common")
    return tasks


def setting_differences(methods: list[list[Results]]) -> tuple[list[str], list[str]]:
    """(settings that differ and should not, settings that are compared), each as "name: first / second / ..."."""
    base = "{base_sha256:.8} in {dtype}"
    settings = [[{"base": base.format(**run.summary["configuration"])} | (run.summary["settings"] or {})
                 for run in method] for method in methods]
    # data_sha256 is also of the validation records, how many of which there are is a setting by itself; but an earlier
    # version of train.py wrote no other digest.
    have_both = all("train_sha256" in run for method in settings for run in method if "data_sha256" in run)
    redundant = "data_sha256" if have_both else "train_sha256"
    names = {name for method in settings for run in method for name in run} - {"preset", "init", redundant, *UNIMPORTANT}
    wrong, compared = [], []
    for name in sorted(names):
        digits = 8 if name.endswith("_sha256") else None
        values = [sorted({str(run[name])[:digits] for run in method if name in run}) for method in settings]
        values = [of_method for of_method in values if of_method]
        mixed = name != "seed" and any(len(of_method) > 1 for of_method in values)  # within what should be one method
        if mixed or any(of_method != values[0] for of_method in values):
            text = f"{name}: " + " / ".join(", ".join(of_method) for of_method in values)
            (wrong if mixed or name in SHARED_SETTINGS else compared).append(text)
    return wrong, compared


# ----------------------------------------------------------------------------------------- do they differ

def bootstrap(difference: np.ndarray, rng: np.random.Generator, times: int = 10_000) -> np.ndarray:
    """Means of `times` resamples of a task's paired differences, in percent. A resample of n questions counts how often
    each distinct value comes up, which is one multinomial draw."""
    values, counts = np.unique(difference, return_counts=True)
    n = len(difference)
    return 100 * rng.multinomial(n, counts / n, size=times) @ values / n


def mcnemar(difference: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: of the questions that only one of two runs gets right, each run would win
    half if they were equally good."""
    n, fewer = int((difference != 0).sum()), int(min((difference > 0).sum(), (difference < 0).sum()))
    ways = total = 1  # n over k for k = 0, and the sum of them up to `fewer`
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def compare(groups: list[str], chosen: list[str], c) -> dict:
    """eval.py --compare: prints tables of the chosen tasks, [] are all, and returns what they say. c: the flags of eval.py.

    A group is a method: one run, or its seeds (`runs_of`), whose mean counts. One table is of multiple choice and its mean;
    each task with free answers has its own, of accuracies (`accuracies`) or of losses (`compare_losses`)."""
    found = check_evaluated([run for group in groups for run in runs_of(group)], c)
    methods = [[load_results(found[run]) for run in runs_of(group)] for group in groups]
    tasks = common_tasks(groups, methods, chosen)
    runs = [run for method in methods for run in method]
    left_out = {task for run in runs for task in run.summary["tasks"] if task in chosen or not chosen} - set(tasks)
    wrong, compared = setting_differences(methods)
    for names, start in ((wrong, "WARNING: what should be the same differs: "), (compared, "compared: "),
                         (sorted(left_out), "not evaluated for all, left out: ")):
        if names:
            print(start + "; ".join(names))
    if not all(run.summary["settings"] for run in runs):
        print("a base model or an adapter without a run's config.json is among them: its training is unknown")

    print("\n".join(f"[{i}] {', '.join(runs_of(group))}" for i, group in enumerate(groups, 1)))
    results, rows = runs[0].summary["tasks"], {}
    choice = [task for task in tasks if is_choice(results[task])]
    for together in [choice, *([task] for task in tasks if task not in choice)]:
        if not together:
            continue
        task = together[0]
        if task in runs[0].losses:
            rows[task] = compare_losses([[run.losses[task] for run in method] for method in methods])
            text = losses_table(task, rows[task], results[task]["n"])
        else:
            found = accuracies(methods, together)
            text = comparison_table(found, {task: results[task]["n"] for task in together})
            rows |= found if task in choice else {task: found[task]}
        print(f"\n{text}")
    names = [",".join(str(Path(run)) for run in runs_of(group)) for group in groups]
    return {"runs": names, "warnings": wrong, "compared": compared, "rows": rows}


def accuracies(methods: list[list[Results]], tasks: list[str]) -> dict[str, list[dict]]:
    """{each task, and "mean": a cell for each method}: its accuracy and, over its seeds, the standard deviation; and the
    difference to the first method, paired by question, with a 95 % bootstrap interval over questions (not over seeds). p
    is McNemar's, where both are single runs, over the questions of all tasks together."""
    # {task: a number for each question: how many of the method's seeds get it right, of 1}
    hits = [{task: np.mean([run.hits[task] for run in method], axis=0) for task in tasks} for method in methods]
    rows = {task: [] for task in [*tasks, "mean"]}
    for method, method_hits in zip(methods, hits):
        percent = {task: [100 * np.mean(run.hits[task]) for run in method] for task in tasks}  # of each seed
        percent["mean"] = np.mean(list(percent.values()), axis=0)
        difference = {task: method_hits[task] - hits[0][task] for task in tasks}
        rng = np.random.default_rng(0)
        draws = {task: bootstrap(difference[task], rng) for task in tasks}
        draws["mean"] = np.mean(list(draws.values()), axis=0)
        difference["mean"] = np.concatenate(list(difference.values()))  # for McNemar's p
        for task, row in rows.items():
            cell = {"accuracy": float(np.mean(percent[task])),
                    "spread": float(np.std(percent[task], ddof=1)) if len(method) > 1 else None}
            if method is not methods[0]:
                cell["difference"] = cell["accuracy"] - row[0]["accuracy"]
                cell["interval"] = np.percentile(draws[task], [2.5, 97.5]).tolist()
                cell["p"] = mcnemar(difference[task]) if len(method) == len(methods[0]) == 1 else None
            row.append(cell)
    return rows


def comparison_table(rows: dict[str, list[dict]], n: dict[str, int]) -> str:
    """The rows of `accuracies` in Markdown, a line for each method; n: questions of each task. Differences are those of
    the mean, or of the one task that --tasks names."""
    tasks = rows if len(n) > 1 else n
    counts = [f"{task}, n {n.get(task, sum(n.values())):,}" for task in tasks]
    table = [["", *counts, "minus [1]", "95 % interval", "p"]]
    for i, cell in enumerate(rows["mean"]):
        line = [f"[{i + 1}]"]
        for task in tasks:
            spread = rows[task][i]["spread"]
            line.append(f"{rows[task][i]['accuracy']:.2f}" + ("" if spread is None else f" ± {spread:.2f}"))
        if i == 0:
            line += ["", "", ""]
        else:
            p = "" if cell["p"] is None else f"{cell['p']:.4f}" if cell["p"] >= 1e-4 else "<0.0001"
            line += [f"{cell['difference']:+.2f}", "{:+.2f} to {:+.2f}".format(*cell["interval"]), p]
        table.append(line)
    return markdown(table)
