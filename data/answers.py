"""Free answers, scored: by how likely the reference is (its loss), or by what the model writes instead of it.

A prediction of the protocols cloze and label, which are one here, is {"task", "index", "nats": -log p of the reference
with its end-of-text token, "tokens": how many these are, "cut"}; one of generate {"task", "index", "text", "reference",
"cut", "full": whether the text ended for want of new tokens}.
"""
import math
import re
from decimal import Decimal

import numpy as np

from data.files import UserError, is_number

MARK = "####"  # GSM8K's (arXiv 2110.14168), before the final number of an answer
# A reference that ends so asks for a number. A heading in Markdown does not.
NUMBERED = re.compile(MARK + r"\s*[-\u2212]?\\?\$?[0-9.,]+\s*\Z")
NUMBER = re.compile(r"((?<![\w)])[-\u2212]\\?\$?)?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def final_number(text: str) -> Decimal | None:
    """The number that an answer comes to: the first behind the last ####, or else the last in the last \\boxed{...}, or
    else the last of all. 1,234 is 1234 and 72.0 is 72."""
    text = text.replace("{,}", ",").replace(",\\!", ",")  # LaTeX's thousands
    _, marked, after = text.rpartition(MARK)
    if marked and (found := NUMBER.search(after)):
        return as_decimal(found)
    boxed = text.rpartition("\\boxed{")[2].partition("}")[0] if "\\boxed{" in text else ""
    numbers = list(NUMBER.finditer(boxed)) or list(NUMBER.finditer(text))
    return as_decimal(numbers[-1]) if numbers else None


def as_decimal(number: re.Match) -> Decimal:
    value = Decimal(number[2].replace(",", ""))
    return value.copy_negate() if number[1] else value


def is_right(prediction: dict) -> bool:
    """Whether a written answer counts: by its final number where the reference ends in GSM8K's, else by all its words."""
    if NUMBERED.search(prediction["reference"]):
        return final_number(prediction["text"]) == final_number(prediction["reference"])
    return is_exact(prediction)


def is_exact(prediction: dict) -> bool:
    return prediction["text"].strip() == prediction["reference"].strip()


# ---------------------------------------------------------------------------------------------------- results

def summarise_answers(predictions: list[dict], interval) -> dict:
    """What results.json says of a task with free answers. Of losses {"n", "tokens", "loss" (nats an answer token, each
    token of the task counts alike), "interval", "perplexity", "perplexity_interval", "cut"}; of written answers {"n",
    "acc" and "exact" (percent), "interval" (of acc, by `interval`), "unparsed" (texts without the number that was asked
    for), "full", "cut"}. Intervals are 95 %; the loss's is a bootstrap over records."""
    n, cut = len(predictions), sum(p["cut"] for p in predictions)
    if "nats" in predictions[0]:
        nats, tokens = as_arrays(predictions)
        loss, ends = nats.sum() / tokens.sum(), resampled_interval(nats, tokens)        # perplexity = exp(loss)
        return {"n": n, "tokens": int(tokens.sum()), "loss": float(loss), "interval": ends, "perplexity": perplexity(loss),
                "perplexity_interval": [perplexity(end) for end in ends], "cut": cut}
    hits = sum(map(is_right, predictions))
    return {"n": n, "acc": 100 * hits / n, "exact": 100 * sum(map(is_exact, predictions)) / n,
            "interval": interval(hits, n), "full": sum(p["full"] for p in predictions), "cut": cut,
            "unparsed": sum(bool(NUMBERED.search(p["reference"])) and final_number(p["text"]) is None for p in predictions)}


def as_arrays(predictions: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(nats, tokens) of each record."""
    return np.array([p["nats"] for p in predictions]), np.array([p["tokens"] for p in predictions])


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # JSON has no infinity


def resampled_interval(nats: np.ndarray, tokens: np.ndarray, times: int = 1000) -> list[float]:
    """The 95 % bootstrap interval of nats per token over records: each resample draws as many records as there are."""
    rng, n = np.random.default_rng(0), len(nats)
    draws = [nats[chosen].sum() / tokens[chosen].sum() for chosen in (rng.integers(0, n, n) for _ in range(times))]
    return np.percentile(draws, [2.5, 97.5]).tolist()


def answers_table(results: dict[str, dict]) -> str:
    """The results of tasks with free answers, of one protocol, as text."""
    losses, lines = {task: row for task, row in results.items() if "loss" in row}, []
    if losses:
        lines.append(f"{'task':<14} {'n':>6} {'answer tokens':>14} {'nats/token':>11} {'95 % interval':>17} "
                     f"{'perplexity':>11} {'95 % interval':>17} {'cut':>5}")
    for task, row in losses.items():
        spans = ["{:.4g} - {:.4g}".format(*row[name]) for name in ("interval", "perplexity_interval")]
        lines.append(f"{task:<14} {row['n']:>6,} {row['tokens']:>14,} {row['loss']:>11.4f} {spans[0]:>17} "
                     f"{row['perplexity']:>11.4g} {spans[1]:>17} {row['cut']:>5}")
    written = {task: row for task, row in results.items() if "exact" in row}
    if written:
        lines.append(f"{'task':<14} {'n':>6} {'acc':>7} {'95 % interval':>15} {'exact':>7} {'no number':>10} "
                     f"{'at the limit':>13} {'cut':>5}")
    for task, row in written.items():
        span = "{:.1f} - {:.1f}".format(*row["interval"])
        lines.append(f"{task:<14} {row['n']:>6,} {row['acc']:>7.2f} {span:>15} {row['exact']:>7.2f} {row['unparsed']:>10} "
                     f"{row['full']:>13} {row['cut']:>5}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- on the disk again

def is_count(value) -> bool:
    return type(value) is int and value >= 0


def is_span(value, least: float, most: float) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(end, least, most) for end in value)


def is_answer_prediction(value: dict, protocol: str) -> bool:
    """Whether a line of predictions.jsonl, in which task, index and cut are right, is one of these."""
    if protocol == "generate":
        return (isinstance(value.get("text"), str) and isinstance(value.get("reference"), str)
                and isinstance(value.get("full"), bool))
    nats, tokens = value.get("nats"), value.get("tokens")
    return type(nats) is float and is_number(nats, -1e9, 1e12) and is_count(tokens) and tokens > 0


def is_answer_result(task: dict, protocol: str) -> bool:
    """Whether what results.json says of a task with free answers can be what `summarise_answers` returned."""
    if not (is_count(task.get("n")) and task["n"] > 0 and is_count(task.get("cut"))):
        return False
    if protocol == "generate":
        return (all(is_number(task.get(name), 0, 100) for name in ("acc", "exact")) and is_span(task.get("interval"), -1, 101)
                and all(is_count(task.get(name)) for name in ("unparsed", "full")))
    return (all(is_number(task.get(name), -1e9, math.inf) for name in ("loss", "perplexity")) and is_count(task.get("tokens"))
            and all(is_span(task.get(name), -1e9, math.inf) for name in ("interval", "perplexity_interval")))


# ------------------------------------------------------------------------------------------------ comparisons

def compare_losses(methods: list[list[list[dict]]]) -> list[dict]:
    """A cell for each method of {"loss", "spread" (over seeds), and, of all but the first, "difference" to it with its
    "interval", paired by record}. methods: the predictions of each seed of each method."""
    cells, first = [], None
    for seeds in methods:
        nats, tokens = (np.array(column) for column in zip(*map(as_arrays, seeds)))     # (seeds, records) each
        mean = nats.mean(0)
        first = mean if first is None else first
        if not (tokens == as_arrays(methods[0][0])[1]).all():
            raise UserError("these cannot be paired: their answers have other tokens, which losses count by")
        of_seeds = nats.sum(1) / tokens[0].sum()
        cells.append({"loss": float(of_seeds.mean()), "spread": float(of_seeds.std(ddof=1)) if len(seeds) > 1 else None})
        if len(cells) > 1:
            cells[-1] |= {"difference": cells[-1]["loss"] - cells[0]["loss"],
                          "interval": resampled_interval(mean - first, tokens[0])}
    return cells


def losses_table(task: str, cells: list[dict], n: int) -> str:
    """The cells of `compare_losses` in Markdown."""
    table = [["", f"{task}, n {n:,}, nats a token", "minus [1]", "95 % interval"]]
    for i, cell in enumerate(cells, 1):
        spread = "" if cell["spread"] is None else f" ± {cell['spread']:.4f}"
        line = [f"[{i}]", f"{cell['loss']:.4f}{spread}"]
        line += [f"{cell['difference']:+.4f}", "{:+.4f} to {:+.4f}".format(*cell["interval"])] if i > 1 else ["", ""]
        table.append(line)
    return markdown(table)


def markdown(table: list[list[str]]) -> str:
    """Rows of cells, the first the heads, with columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*table)]
    table = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in table)
