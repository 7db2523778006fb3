"""The tables of README.md beside this file, and the first of its pictures, from the runs in *.json.

    python assets/evidence/tables.py                prints the tables
    python assets/evidence/tables.py story.png      draws the picture into that file

Each file is one experiment: the settings that its runs share, and for each run the settings of its own, the losses in
training and on held-out records, and for each task its hits: one bit a question in the task's order, in hexadecimal.
"""
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))
from data.pictures import draw_training  # noqa: E402
from data.compare import bootstrap  # noqa: E402


TITLES = {"boolq": "BoolQ", "piqa": "PIQA", "openbookqa": "OpenBookQA"}


def read(experiment: str) -> dict:
    return json.loads((HERE / f"{experiment}.json").read_text())


def bits(hexadecimal: str) -> np.ndarray:
    """"5a" -> [0, 1, 0, 1, 1, 0, 1, 0]"""
    return np.unpackbits(np.frombuffer(bytes.fromhex(hexadecimal), np.uint8))


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# ------------------------------------------------------------------------------------------------- accuracies


def hits_of(experiment: dict) -> dict[str, dict[str, np.ndarray]]:
    """{method: {task: hits, (seeds, questions)}}"""
    methods = {}
    for name, run in experiment["runs"].items():
        methods.setdefault(name.split("/")[0], []).append(run["hits"])
    return {method: {task: np.array([bits(run[task]) for run in runs]) for task in experiment["questions"]}
            for method, runs in methods.items()}


def accuracy(hits: np.ndarray | list) -> str:
    """The mean over seeds, in percent, and their standard deviation where there are several."""
    seeds = 100 * np.mean(hits, axis=-1)
    return f"{seeds.mean():.1f}" + (f" ± {seeds.std(ddof=1):.1f}" if len(seeds) > 1 else "")


def difference(hits: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str:
    """Of the mean over tasks, paired by question, with a 95 % bootstrap interval over questions."""
    pairs = [hits[task].mean(0) - other[task].mean(0) for task in hits]
    rng = np.random.default_rng(0)
    low, high = np.percentile(np.mean([bootstrap(pair, rng) for pair in pairs], axis=0), [2.5, 97.5])
    return f"{100 * np.mean([pair.mean() for pair in pairs]):+.1f} ({low:+.1f} to {high:+.1f})"


def accuracies(name: str) -> str:
    experiment = read(name)
    tasks, paper = list(experiment["questions"]), experiment.get("paper", {})
    several, methods = len(tasks) > 1, hits_of(experiment)
    rates = {run.split("/")[0]: facts["settings"]["lr"] for run, facts in experiment["runs"].items() if "loss" in facts}
    head = ["run", "is", "rate", *[TITLES.get(task, task) for task in tasks], *["mean"] * several, "minus HiRA", "minus LoRA"]
    rows = [head + ["paper, LLaMA-3-8B"] * bool(paper)]
    for method, hits in methods.items():
        row = [f"{name}/{method}", experiment["is"][method], f"{rates[method]:g}" if method in rates else ""]
        row += [accuracy(hits[task]) for task in tasks]
        if several:  # each task counts alike
            row.append(accuracy(np.concatenate([hits[task] for task in tasks], axis=-1)))
        row += [difference(hits, methods[other]) if method != other else "" for other in ("hira", "lora")]
        rows.append(row + [f"{paper[method]:.2f}" if method in paper else ""] * bool(paper))
    return markdown(rows)


def says_true() -> dict[str, int]:
    """How often each run in label form answers BoolQ with "true": it does where it hits and that is the label, or
    misses and it is not."""
    experiment = read("label")
    answer_is_true = bits(experiment["true"])
    return {method: int((hits["boolq"] == answer_is_true).sum()) for method, hits in hits_of(experiment).items()}


# ------------------------------------------------------------------------------------------- losses and gates


def search(name: str, then: str = "") -> str:
    """Held-out losses by learning rate at seed 1; and of the best rate, the mean over the seeds of the experiment `then`."""
    losses, rates, seeds = {}, set(), {}
    for run, facts in read(name)["runs"].items():
        method, rate = run.split("/")
        rates.add(rate)
        losses.setdefault(method, {})[rate] = facts["validation_loss"]
    for run, facts in read(then)["runs"].items() if then else ():
        seeds.setdefault(run.split("/")[0], []).append(facts.get("validation_loss"))
    rates = sorted(rates, key=float)
    rows = [["held-out loss", *rates, *["three seeds"] * bool(then)]]
    for method, by_rate in losses.items():
        cells = [f"{by_rate[rate]:.3f}" if rate in by_rate else "" for rate in rates]
        rows.append([f"{name}/{method}", *cells, *([f"{np.mean(seeds[method]):.3f}"] if then else [])])
    return markdown(rows)


def story() -> str:
    rows = [["run", "changed", "held-out loss", "mean gate on prompts", "on answers", "entropy, prompts",
             "closed, prompts", "open, prompts", "closed, answers", "open, answers"]]
    for name, run in read("story")["runs"].items():
        prompt, answer = run["gates"]["prompt"], run["gates"]["answer"]
        shares = [f"{100 * gates[side]:.0f} %" for gates in (prompt, answer) for side in ("below_0.05", "above_0.95")]
        rows.append([f"story/{name}", run["changed"], f"{run['validation_loss']:.3f}", f"{prompt['mean']:.2f}",
                     f"{answer['mean']:.2f}", f"{prompt['entropy_bits']:.2f}", *shares])
    return markdown(rows)


def curves(experiment: dict, name: str) -> list[dict]:
    """A run's losses and gates, as the lines of its metrics.jsonl had them."""
    run = experiment["runs"][name]
    steps = run.get("steps", experiment["steps"])
    keys = [key for key in ("loss", "entropy", "gate_prompt", "gate_answer") if key in run]
    lines = [{"step": step} | {key: run[key][i] for key in keys} for i, step in enumerate(steps)]
    return [*lines, {"step": steps[-1], "validation_loss": run["validation_loss"]}]


TABLES = {"cloze": lambda: accuracies("cloze"), "search": lambda: search("search", "cloze"),
          "rates": lambda: search("rates"), "label": lambda: accuracies("label"), "story": story}
DRAWN = "default", "lambda-0", "lambda-1", "lambda-1-rising", "bias-minus-3", "bias-3", "gate-lr-0.1", "200-steps"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        draw_training({name: curves(read("story"), name) for name in DRAWN}, Path(sys.argv[1]))
    else:
        print("\n\n".join(table() for table in TABLES.values()))
