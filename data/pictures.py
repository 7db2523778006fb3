"""Pictures: gates.html, a page that colours each token by its gates; PNGs of the gates and of training; and tokens
coloured in a terminal.

A trace is the reading of one question: {"task", "tokens" (their texts), "prompt" (how many of them are the prompt's,
the others are the answer's), "cut" (how many the prompt lost), "gates" (G, T)}, where G counts the gated layers, whose
names are such as "blocks.3.attn.q_proj".
"""
import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from data.files import UserError, is_number, parse_json, write_atomically

GATE_PICTURES = ("gates-layers.png", "gates-histogram.png", "gates-position.png")
COLOURS = "#3b6ea8", "#d9622b"  # of prompt and answer
RAMP = (231, 230, 229, 222, 215, 208, 202)  # of a terminal's 256 colours, from white (closed) to orange (open)


def layer_and_projection(names: list[str]) -> list[tuple[int, str]]:
    """"blocks.3.attn.q_proj" -> (3, "q_proj")."""
    return [(int(name.split(".")[1]), name.rpartition(".")[2]) for name in names]


def by_phase(traces: list[dict]) -> dict[str, torch.Tensor]:
    """{"prompt" (prefill) and "answer" (decode): the gates (G, tokens) of all their tokens}."""
    return {"prompt": torch.cat([trace["gates"][:, :trace["prompt"]] for trace in traces], dim=1),
            "answer": torch.cat([trace["gates"][:, trace["prompt"]:] for trace in traces], dim=1)}


# --------------------------------------------------------------------------------------------- the numbers

def gate_numbers(traces: list[dict], names: list[str]) -> dict:
    """What the gates do, in numbers: for each phase the mean gate over all, by projection and by layer, the shares near
    closed and near open, the mean entropy in bits (at most 1), and the share of the variance that is between the tokens
    of a gate: 0 where gates tell layers apart alone, as static ones do."""
    def means_by(keys: list, values: list[float]) -> dict:
        return {key: float(np.mean([value for other, value in zip(keys, values) if other == key]))
                for key in dict.fromkeys(keys)}

    layers, projections = zip(*layer_and_projection(names))
    numbers = {"questions": len(traces), "cut": sum(trace["cut"] > 0 for trace in traces)}
    for phase, g in by_phase(traces).items():
        if g.shape[1] == 0:
            numbers[phase] = {"tokens": 0}
            continue
        bits = (torch.special.entr(g) + torch.special.entr(1 - g)) / math.log(2)
        numbers[phase] = {
            "tokens": g.shape[1], "mean": g.mean().item(), "below_0.05": (g < 0.05).float().mean().item(),
            "above_0.95": (g > 0.95).float().mean().item(), "entropy_bits": bits.mean().item(),
            "between_tokens": (g.var(1, correction=0).mean() / g.var(correction=0).clamp(min=1e-12)).item(),
            "projections": means_by(projections, g.mean(1).tolist()), "layers": means_by(layers, g.mean(1).tolist())}
    return numbers


# ------------------------------------------------------------------------------------------------ the page

def write_gate_page(traces: list[dict], names: list[str], title: str, path: Path) -> None:
    """gates.html: assets/gates.html with the data in it. Needs no network; texts are data and never markup."""
    page = (Path(__file__).parents[1] / "assets" / "gates.html").read_text()
    # a gate is a byte, 255 g, of a base64 text: the gates of a token, then those of the next
    gates = [(trace["gates"].t() * 255).round().to(torch.uint8).numpy().tobytes() for trace in traces]
    # the page opens on the layer whose gates differ most between tokens, if any do
    spread = torch.cat([trace["gates"] for trace in traces], dim=1).std(1, correction=0)
    start = int(spread.argmax()) if spread.max() > 1e-3 else None
    data = {"title": title, "places": layer_and_projection(names), "start": start,
            "questions": [trace | {"gates": base64.b64encode(g).decode()} for trace, g in zip(traces, gates)]}
    text = json.dumps(data).replace("<", "\\u003c")  # in a <script>, "</script>" would end it
    write_atomically(path, lambda temporary: temporary.write_text(page.replace("{{DATA}}", text)))


# ------------------------------------------------------------------------------------------------ the gates

def new_figure(rows: int, height: float):
    """A figure 8 inches wide and its rows. matplotlib is only imported by those who want pictures."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["text.parse_math"] = False  # a path may hold a $
    figure = Figure(figsize=(8, height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, squeeze=False)[:, 0]


def save(figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_gates(traces: list[dict], names: list[str], title: str, out: Path) -> None:
    """Writes GATE_PICTURES."""
    titles = "prompt (prefill)", "generated answer (decode)"
    phases = [(f"{phase}, {g.shape[1]:,} tokens", g, colour)
              for phase, g, colour in zip(titles, by_phase(traces).values(), COLOURS) if g.shape[1]]
    layers, histogram, positions = (out / name for name in GATE_PICTURES)
    draw_layers(phases, names, title, layers)
    draw_histogram(phases, title, histogram)
    draw_positions(traces, title, positions)


def draw_layers(phases: list[tuple], names: list[str], title: str, path: Path) -> None:
    """The mean gate of each layer and projection."""
    pairs = layer_and_projection(names)
    layers, projections = (list(dict.fromkeys(column)) for column in zip(*pairs))
    figure, axes = new_figure(len(phases), 2.2 * len(phases) + 0.4)
    for axis, (phase, g, _) in zip(axes, phases):
        grid = np.full((len(projections), len(layers)), np.nan)
        for (layer, projection), value in zip(pairs, g.mean(1).tolist()):
            grid[projections.index(projection), layers.index(layer)] = value
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set(title=f"{phase}: mean gate {g.mean():.2f}", yticks=range(len(projections)), yticklabels=projections)
        step = max(1, len(layers) // 15)
        axis.set_xticks(range(0, len(layers), step), layers[::step])
    axes[-1].set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="mean gate (0 closed, 1 open)")
    figure.suptitle(title)
    save(figure, path)


def draw_histogram(phases: list[tuple], title: str, path: Path) -> None:
    """How often a gate has which value."""
    figure, (axis,) = new_figure(1, 3.6)
    for phase, g, colour in phases:
        share, edges = np.histogram(g.numpy(), bins=40, range=(0, 1))
        near = f"{100 * (g < 0.05).float().mean():.1f} % below 0.05, {100 * (g > 0.95).float().mean():.1f} % above 0.95"
        axis.stairs(100 * share / g.numel(), edges, color=colour, fill=True, alpha=0.25)
        axis.stairs(100 * share / g.numel(), edges, color=colour, label=f"{phase}\n{near}")
    axis.set(title=title, xlabel="gate", ylabel="% of gates", xlim=(0, 1))
    axis.legend(fontsize=8)
    save(figure, path)


def draw_positions(traces: list[dict], title: str, path: Path) -> None:
    """The gates token by token, before and after the answer starts."""
    by_position = {}  # {position, counted from the answer's first token: the gates (G,) of each question there}
    for trace in traces:
        for t, gates in enumerate(trace["gates"].t().numpy()):
            by_position.setdefault(t - trace["prompt"], []).append(gates)
    positions = sorted(t for t, gates in by_position.items() if len(gates) >= max(2, len(traces) // 4))
    low, high = [[np.quantile(by_position[t], q) for t in positions] for q in (0.1, 0.9)]
    figure, (axis,) = new_figure(1, 3.6)
    axis.fill_between(positions, low, high, color=COLOURS[0], alpha=0.2, label="10 % to 90 % of all gates")
    axis.plot(positions, [np.mean(by_position[t]) for t in positions], color=COLOURS[0], marker=".",
              label="mean over gates and questions")
    axis.axvline(-0.5, color="black", linestyle="--", linewidth=1, label="left: prompt (prefill), right: answer (decode)")
    axis.set(title=title, ylim=(0, 1), ylabel="gate",
             xlabel="token, counted from the answer's first (as far as a quarter of the questions reach)")
    axis.legend(fontsize=8)
    save(figure, path)


# ------------------------------------------------------------------------------------------------- training

DRAWN = ("loss", "validation_loss", "entropy", "gate_prompt", "gate_answer")


def read_metrics(run: str) -> list[dict]:
    """The lines of a run's metrics.jsonl; none if there is no such file. UserError for a damaged one."""
    file = Path(run) / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []  # a last line without an end is not whole
    found = []
    for number, text in enumerate(lines, 1):
        line = parse_json(text, f"{file}, line {number}")
        drawn = [name for name in DRAWN if isinstance(line, dict) and name in line]
        if not isinstance(line, dict) or not all(is_number(line.get(name), -1e9, 1e9)
                                                 for name in (*drawn, *(["step"] if drawn else []))):
            raise UserError(f"{file}, line {number}: not what train.py writes")
        found.append(line)
    return found


def read_training(runs: dict[str, str]) -> dict[str, list[dict]]:
    """{name: the lines of metrics.jsonl} of those runs, {name: directory}, that have losses to draw. A damaged file is
    told, and stops nothing: it is only for a picture."""
    found = {}
    for name, run in runs.items():
        try:
            lines = read_metrics(run)
        except UserError as error:
            print(f"{error}; its losses are not drawn")
            continue
        if any("loss" in line for line in lines):
            found[name] = lines
    return found


def draw_training(runs: dict[str, list[dict]], path: Path) -> None:
    """Loss, and where there are gates their entropy and means, over training. runs: what `read_training` returns; where
    there are none, nothing is drawn."""
    if not runs:
        return
    gated = any("gate_prompt" in line for lines in runs.values() for line in lines)
    figure, (loss, *others) = new_figure(3 if gated else 1, 6.6 if gated else 3.4)
    for i, (name, lines) in enumerate(runs.items()):
        def curve(key):
            """Its steps and values."""
            found = [line for line in lines if key in line]
            return [line["step"] for line in found], np.array([line[key] for line in found])

        loss.plot(*curve("loss"), color=f"C{i}", label=name[-50:], alpha=0.8)  # the end of a path tells most
        loss.plot(*curve("validation_loss"), f"C{i}o")
        if any("gate_answer" in line for line in lines):
            steps, entropy = curve("entropy")
            others[0].plot(steps, entropy / math.log(2), color=f"C{i}")
            others[1].plot(*curve("gate_prompt"), color=f"C{i}")
            others[1].plot(*curve("gate_answer"), color=f"C{i}", linestyle="--")
    loss.set(ylabel="loss, nats a token\n(dots: validation)", xlabel="" if gated else "step")
    loss.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, frameon=False)
    if gated:
        others[0].set(ylabel="gate entropy, bits", ylim=(0, 1.02))
        others[1].set(ylabel="mean gate (solid: on\nprompts, dashed: answers)", ylim=(0, 1), xlabel="step")
    save(figure, path)


# ------------------------------------------------------------------------------------------------ a terminal

def paint(text: str, gate: float | None, colour: bool) -> str:
    """A token with its mean gate: as a background colour, or behind it as a number. Control characters go."""
    text = re.sub(r"[^\S\n]|[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)
    if gate is None:
        return text
    if not colour:
        return f"{text.rstrip(chr(10))}[{gate:.2f}]" + "\n" * text.endswith("\n")
    start = f"\x1b[30;48;5;{RAMP[min(len(RAMP) - 1, int(gate * len(RAMP)))]}m"
    return start + text.replace("\n", f"\x1b[0m\n{start}") + "\x1b[0m"


def colour_legend(colour: bool) -> str:
    """What `paint` shows, in words or as the colours themselves."""
    if not colour:
        return "in brackets after each token"
    gates = [(i + 0.5) / len(RAMP) for i in range(len(RAMP))]
    return " ".join(paint(f" {gate:.1f} ", gate, colour) for gate in gates)
