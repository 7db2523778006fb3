"""The tables of README.md beside this file, and two of its pictures, from the runs in *.json.

    python assets/evidence/tables.py                prints the tables
    python assets/evidence/tables.py assets         draws story.png and long.png into that directory

knowledge.json holds what measures.py prints. Each other file is one experiment: the settings that its runs share, and for
each run the settings of its own, the losses in training and on held-out records, and for each task its hits: one bit a
question in the task's order, in hexadecimal.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))
from data.pictures import draw_training  # noqa: E402
from data.compare import bootstrap  # noqa: E402


TITLES = {"piqa": "PIQA", "openbookqa": "OpenBookQA"}


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


def by_method(experiment: dict, value) -> dict[str, np.ndarray]:
    """{method: value of each of its runs, in the order of their seeds}"""
    methods = {}
    for name, run in experiment["runs"].items():
        method, _, seed = name.partition("/")
        methods.setdefault(method, {})[int(seed or 0)] = value(run)
    return {method: np.array([runs[seed] for seed in sorted(runs)]) for method, runs in methods.items()}


def hits_of(experiment: dict) -> dict[str, dict[str, np.ndarray]]:
    """{method: {task: hits, (seeds, questions)}}"""
    tasks = {task: by_method(experiment, lambda run, task=task, n=n: bits(run["hits"][task])[:n].astype(float))
             for task, n in experiment["questions"].items()}
    return {method: {task: of_task[method] for task, of_task in tasks.items()} for method in next(iter(tasks.values()))}


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
    methods, paper = hits_of(experiment), experiment["paper"]
    rates = {run.split("/")[0]: facts["settings"]["lr"] for run, facts in experiment["runs"].items() if "loss" in facts}
    rows = [["run", "is", "rate", *[TITLES.get(task, task) for task in experiment["questions"]], "mean", "minus HiRA",
             "minus LoRA", "paper, LLaMA-3-8B"]]
    for method, hits in methods.items():
        rows.append([f"{name}/{method}", experiment["is"][method], f"{rates[method]:g}" if method in rates else "",
                     *map(accuracy, hits.values()), accuracy(np.concatenate(list(hits.values()), axis=-1)),
                     *[difference(hits, methods[other]) if method != other else "" for other in ("hira", "lora")],
                     f"{paper[method]:.2f}" if method in paper else ""])
    return markdown(rows)


def label() -> str:
    """BoolQ in label form: held-out losses while training; accuracy, also minus that of the commonest answer, "true"; and
    how often a run gives that answer: where it hits and it is right, or neither."""
    experiment = read("label")
    always_true = {"boolq": bits(experiment["true"])[None, :experiment["questions"]["boolq"]].astype(float)}
    rows = [["run", "is", "held-out loss (after steps)", "BoolQ", "minus always true", "says true"]]
    for method, hits in hits_of(experiment).items():
        validation = experiment["runs"][method].get("validation", ())
        losses = ", ".join(f"{loss:.3f} ({step + 1:,})" for step, loss in validation)
        rows.append([f"label/{method}", experiment["is"][method], losses, accuracy(hits["boolq"]), difference(hits, always_true),
                     f"{100 * (hits['boolq'] == always_true['boolq']).mean():.0f} %"])
    return markdown(rows)


# ---------------------------------------------------------------------- what the plan in README.md asks, five seeds

SEEDS = 5
T = {95: 2.776, 99: 4.604}  # Student's t of four degrees of freedom, for five seeds
PAIRS = [("lora-token", "lora"), ("dora-token", "dora"), ("gatera", "hira")]
COMPARISONS = {  # what: ([(with, without), ...], level in percent)
    "1. a token gate, mean of the next three": (PAIRS, 95),
    "2. a token gate on LoRA": (PAIRS[:1], 99),
    "2. a token gate on DoRA": (PAIRS[1:2], 99),
    "2. a token gate on HiRA (GateRA)": (PAIRS[2:], 99),
    "2. a static gate on HiRA": ([("hira-static", "hira")], 99),
    "2. the entropy term (GateRA - HiRA + token gate)": ([("gatera", "hira-token")], 99)}



def paired(methods: dict[str, dict[str, np.ndarray]], pairs: list[tuple[str, str]]) -> list[np.ndarray]:
    """With minus without, mean over the pairs, for each task: (seeds, questions)."""
    return [np.mean([methods[one][task] - methods[other][task] for one, other in pairs], axis=0)
            for task in methods[pairs[0][0]]]


def estimate(tasks: list[np.ndarray], level: int, digits: int) -> list[str]:
    """[the mean over tasks, which count alike; its interval over questions: bootstrap, these seeds; its interval over
    seeds: Student's t, these questions] of differences (seeds, questions)."""
    rng, tail = np.random.default_rng(0), (100 - level) / 2
    means = np.mean([bootstrap(task.mean(0), rng) / 100 for task in tasks], axis=0)
    return [f"{np.mean([task.mean() for task in tasks]):+.{digits}f}",
            span(*np.percentile(means, [tail, 100 - tail]), digits),
            over_seeds(np.mean([task.mean(1) for task in tasks], axis=0), level, digits)]


def over_seeds(values: np.ndarray, level: int, digits: int) -> str:
    assert len(values) == SEEDS
    half = T[level] * values.std(ddof=1) / len(values) ** 0.5
    return span(values.mean() - half, values.mean() + half, digits)


def span(low: float, high: float, digits: int) -> str:
    return f"{low:+.{digits}f} to {high:+.{digits}f}"


def results(name: str) -> str:
    """Accuracies and held-out losses, mean and standard deviation over seeds."""
    experiment = read(name)
    methods, paper = hits_of(experiment), experiment.get("paper", {})
    runs = {run.split("/")[0]: facts["settings"] for run, facts in experiment["runs"].items() if "settings" in facts}
    losses = by_method(experiment, lambda run: run.get("validation_loss", math.nan))
    rows = [["run", "is", "rate", *[TITLES.get(task, task) for task in experiment["questions"]], "mean", "held-out loss",
             *["paper, LLaMA-3-8B"] * bool(paper)]]
    for method, hits in methods.items():
        mean = np.mean([hits[task].mean(1) for task in hits], axis=0)
        is_base = method not in runs
        rows.append([f"{name}/{method}", experiment["is"][method], "" if is_base else f"{runs[method]['lr']:g}",
                     *[accuracy(hits[task]) for task in hits], accuracy(mean[:, None]),
                     "" if is_base else f"{losses[method].mean():.3f} ± {losses[method].std(ddof=1):.3f}",
                     *([f"{paper[method]:.2f}" if method in paper else ""] if paper else [])])
    return markdown(rows)


def comparisons() -> str:
    """The plan's comparisons 1 to 3."""
    rows = [["", "steps", "level", "accuracy, points", "over questions", "over seeds", "held-out loss, nats", "over seeds"]]
    tasks, loss, first = {}, {}, next(iter(COMPARISONS))
    for what, steps in [*((what, 400) for what in COMPARISONS), (first, 50)]:
        experiment, (pairs, _) = read(f"cloze-{steps}"), COMPARISONS[what]
        losses = by_method(experiment, lambda run: run.get("validation_loss", math.nan))
        hits = {method: {task: 100 * of_task for task, of_task in of_method.items()}
                for method, of_method in hits_of(experiment).items()}
        tasks[what, steps] = paired(hits, pairs)
        loss[what, steps] = np.mean([losses[one] - losses[other] for one, other in pairs], axis=0)
    growth = "3. its growth", "400 - 50"
    tasks[growth] = [late - early for late, early in zip(tasks[first, 400], tasks[first, 50])]
    loss[growth] = loss[first, 400] - loss[first, 50]
    for what, steps in tasks:
        level = COMPARISONS.get(what, (None, 95))[1]
        rows.append([what, str(steps), f"{level} %", *estimate(tasks[what, steps], level, 2), f"{loss[what, steps].mean():+.4f}",
                     over_seeds(loss[what, steps], level, 4)])
    return markdown(rows)


def knowledge() -> str:
    """The plan's comparison 4: what a run predicts worse, or better, than the base, of what it was not trained on."""
    experiment = read("knowledge")
    tokens = {name: np.array(counts) for name, counts in experiment["tokens"].items()}
    tasks = [name for name in tokens if name != "passages"]

    def nats(run, name):
        """Values of texts whose mean is the loss of a token, and spreads as it does from one choice of texts to another."""
        n, t = np.array(run[name]), tokens[name]
        return n.sum() / t.sum() + (n - n.sum() / t.sum() * t) / t.mean()

    measures = [({"passages": lambda run: nats(run, "passages")}, 4),
                ({task: lambda run, task=task: nats(run, task) for task in tasks}, 4),
                ({task: lambda run, task=task: 100.0 * bits(run["hits"][task])[:len(tokens[task])] for task in tasks}, 2)]
    rows = [["", "level", "passages, nats a token", "other tasks' answers, nats a token", "other tasks' accuracy, points"]]
    tables = [({name: by_method(experiment, value) for name, value in groups.items()}, digits) for groups, digits in measures]
    for method, of_method in next(iter(tables[0][0].values())).items():
        cells = []
        for groups, digits in tables:
            value = np.mean([of_group[method].mean(1) for of_group in groups.values()], axis=0)
            base = np.mean([of_group["base"].mean() for of_group in groups.values()])
            cells.append(f"{base:.{digits - 1}f}" if method == "base" else
                         f"{value.mean() - base:+.{digits - 1}f} ± {value.std(ddof=1):.{digits - 1}f}")
        rows.append([f"knowledge/{method}" + ("" if method == "base" else " - base"), "", *cells])
    for what, (pairs, level) in COMPARISONS.items():
        cells = []
        for groups, digits in tables:
            methods = {method: {name: of_group[method] for name, of_group in groups.items()}
                       for pair in pairs for method in pair}
            cells.append("{} ({}; {})".format(*estimate(paired(methods, pairs), level, digits)))
        rows.append([what, f"{level} %", *cells])
    return markdown(rows)


def quarters() -> str:
    """Held-out losses by learning rate at seeds 1 and 2."""
    cells = {}
    for run, facts in read("quarters")["runs"].items():
        method, rate, _ = run.split("/")
        of_method = cells.setdefault(method, {})
        of_method[rate] = ", ".join([*filter(None, [of_method.get(rate)]), f"{facts['validation_loss']:.4f}"])
    return markdown(by_rate("held-out loss", "quarters", cells))


# ------------------------------------------------------------------------------------------- losses and gates


def by_rate(title: str, name: str, cells: dict[str, dict[str, str]]) -> list[list[str]]:
    """The rows of a table of {method: {learning rate: text}}."""
    rates = sorted({rate for of_method in cells.values() for rate in of_method}, key=float)
    return [[title, *rates], *([f"{name}/{method}", *[of_method.get(rate, "") for rate in rates]]
                               for method, of_method in cells.items())]


def search(name: str, then: str = "") -> str:
    """Held-out losses by learning rate at seed 1; and of the best rate, the mean over the seeds of the experiment `then`."""
    cells = {}
    for run, facts in read(name)["runs"].items():
        method, rate = run.split("/")
        cells.setdefault(method, {})[rate] = f"{facts['validation_loss']:.3f}"
    rows = by_rate("held-out loss", name, cells)
    if then:
        seeds = by_method(read(then), lambda run: run.get("validation_loss", math.nan))
        rows = [rows[0] + ["three seeds"], *(row + [f"{seeds[method].mean():.3f}"] for row, method in zip(rows[1:], cells))]
    return markdown(rows)


def gates(name: str) -> str:
    """What the gates of each run do, after training."""
    rows = [["run", "changed", "held-out loss", "mean gate on prompts", "on answers", "entropy, prompts", "closed, prompts",
             "open, prompts", "closed, answers", "open, answers", "between tokens, prompts"]]
    for run, facts in read(name)["runs"].items():
        prompt, answer = facts["gates"]["prompt"], facts["gates"]["answer"]
        shares = [f"{100 * phase[side]:.0f} %" for phase in (prompt, answer) for side in ("below_0.05", "above_0.95")]
        between = f"{100 * prompt['between_tokens']:.0f} %" if "between_tokens" in prompt else ""
        rows.append([f"{name}/{run}", facts["changed"], f"{facts['validation_loss']:.3f}", f"{prompt['mean']:.2f}",
                     f"{answer['mean']:.2f}", f"{prompt['entropy_bits']:.2f}", *shares, between])
    return markdown(rows)


def surprise() -> str:
    """Rank correlations of a token's mean gate with what the base makes of it."""
    columns = "its own loss", "the next token's loss", "the next token's entropy"
    rows = [["rank correlation of a token's mean gate with the base's", "tokens", *columns]]
    for run, facts in read("long")["runs"].items():
        for side, values in facts.get("surprise", {}).items():
            cells = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*values[column]) for column in columns]
            rows.append([f"long/{run}", side, *cells])
    return markdown(rows)


def forgetting() -> str:
    """What the runs of the search for rates lost on passages, beside what they learnt."""
    experiment, cells = read("rates"), {}
    for run, facts in experiment["runs"].items():
        method, rate = run.split("/")
        lost = facts["passages"] - experiment["base_passages"]
        cells.setdefault(method, {})[rate] = f"{lost:+.3f} at {facts['validation_loss']:.3f}"
    return markdown(by_rate("lost, at the held-out loss", "forgetting", cells))


def curves(experiment: dict, name: str) -> list[dict]:
    """A run's losses and gates, as the lines of its metrics.jsonl had them."""
    run = experiment["runs"][name]
    steps = (run if "steps" in run else experiment)["steps"]
    keys = [key for key in ("loss", "entropy", "gate_prompt", "gate_answer") if key in run]
    lines = [{"step": step} | {key: run[key][i] for key in keys} for i, step in enumerate(steps)]
    return [*lines, {"step": steps[-1], "validation_loss": run["validation_loss"]}]


TABLES = {"cloze": lambda: accuracies("cloze"), "search": lambda: search("search", "cloze"),
          "cloze-400": lambda: results("cloze-400"), "cloze-50": lambda: results("cloze-50"), "comparisons": comparisons,
          "quarters": quarters, "rates": lambda: search("rates"), "knowledge": knowledge, "forgetting": forgetting,
          "surprise": surprise, "label": label, "story": lambda: gates("story"), "long": lambda: gates("long")}
DRAWN = {"story": ("default", "lambda-0", "lambda-1", "lambda-1-rising", "bias-minus-3", "bias-3", "gate-lr-0.1", "200-steps"),
         "long": ("50-steps", "400-steps", "lambda-1.5", "lambda-1.5-rising", "bias-minus-3-gate-lr-0.1", "1600-steps")}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for name, runs in DRAWN.items():
            draw_training({run: curves(read(name), run) for run in runs}, Path(sys.argv[1]) / f"{name}.png")
    else:
        print("\n\n".join(table() for table in TABLES.values()))
