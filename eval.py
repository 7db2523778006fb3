"""Scores a base model or a trained run on the commonsense tasks.

    python eval.py --run out/quickstart --tasks ARC-Easy
    python eval.py --init smollm2-135m --tasks all --protocol cloze --limit 100
    python eval.py --run out/lora --export hf DIRECTORY         # instead: the merged model, for other programs

Every choice of a question is ranked by the log-likelihood the model gives to its text. Protocols:

    cloze   the choice's own words. acc takes the highest sum of log p, acc_norm the highest sum per byte of the choice,
            as lm-evaluation-harness does. WinoGrande: the choice fills the blank, the rest of the sentence is scored.
    label   "the correct answer is <label>" after the papers' instruction: what beam search over the labels finds,
            without the risk that an answer fails to parse.

Writes results.json and predictions.jsonl (a line for each question), by default to <run>/eval/<adapter>-<protocol>/.
"""
import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.commonsense import FORMS, Question, pack, scoring_questions, to_text
from data.download import Flags, UserError, read_json, run_command, unwritable
from data.prepare import TASKS, load_records
from gatera import export_peft, load_adapter, merge_adapters, write_atomically
from model import Tokenizer, Transformer, load_tokenizer, save_pretrained


# ----------------------------------------------------------------------------------------------- scoring

@torch.no_grad()
def log_likelihoods(model: Transformer, questions: list[Question], row_tokens: int = 1024,
                    progress=None) -> list[list[float]]:
    """sum of log p(answer token | prompt, earlier answer tokens), in nats, for each answer of each question.

    Questions are packed into rows of about `row_tokens` tokens, of similar length so that little attention is wasted,
    each prompt computed once for all its answers; the scores do not depend on how.
    """
    device = model.embed.weight.device
    size = lambda question: len(question.prompt) + sum(map(len, question.answers))  # noqa: E731
    order = sorted(range(len(questions)), key=lambda i: size(questions[i]), reverse=True)
    scores, start = [None] * len(questions), 0
    while start < len(order):
        stop, tokens = start + 1, size(questions[order[start]])
        while stop < len(order) and tokens + size(questions[order[stop]]) <= row_tokens:
            tokens += size(questions[order[stop]])
            stop += 1
        chosen = [questions[i] for i in order[start:stop]]
        batch = pack(chosen).to(device)
        logits = model(batch.ids, documents=batch.documents, select=batch.select)        # (M, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))             # sums want more than bf16
        log_p = -F.cross_entropy(logits, batch.targets, reduction="none")                # (M,)
        sums = log_p.new_zeros(len(batch.documents)).index_add(0, batch.owner, log_p).tolist()
        for i, question in zip(order[start:stop], chosen):
            scores[i], sums = sums[:len(question.answers)], sums[len(question.answers):]
        if progress is not None:
            progress.update(stop - start)
        start = stop
    return scores


def evaluate(model: Transformer, tokenizer: Tokenizer, records: list[dict], protocol: str, max_len: int = 512,
             quiet: bool = False) -> dict:
    """Scores records of one task. Returns {"n", "acc", "acc_norm", "majority", "cut", "predictions"}: accuracies and
    the share of the commonest label in percent, how many questions lost the start of their prompt, and for each record
    its scores, its predicted index by sum (and by sum per byte) and its label."""
    questions, spans, cut = [], [], 0
    for record in records:
        several = scoring_questions(record, protocol, tokenizer, max_len)
        spans.append((len(questions), len(questions) + len(several)))
        questions += several
        cut += any(question.cut for question in several)
    training = model.training
    model.eval()
    name = records[0]["task"] if records else ""
    with tqdm(total=len(questions), desc=f"{name} {protocol}", unit="q", leave=False,
              disable=quiet or None) as progress:
        scores = log_likelihoods(model, questions, progress=progress)
    model.train(training)

    predictions = []
    for index, (record, (start, stop)) in enumerate(zip(records, spans)):
        sums = [score for several in scores[start:stop] for score in several]
        lengths = [len(answer.strip().encode()) for _, answer in to_text(record, protocol)]
        best = max(range(len(sums)), key=sums.__getitem__)
        best_norm = max(range(len(sums)), key=lambda i: sums[i] / lengths[i])
        predictions.append({"task": record["task"], "index": index, "scores": sums, "prediction": best,
                            "prediction_norm": best_norm, "label": record["label"]})
    percent = lambda hits: 100 * sum(hits) / max(1, len(predictions))  # noqa: E731
    commonest = Counter(p["label"] for p in predictions).most_common(1)
    return {
        "n": len(predictions),
        "acc": percent(p["prediction"] == p["label"] for p in predictions),
        "acc_norm": percent(p["prediction_norm"] == p["label"] for p in predictions),
        "majority": 100 * commonest[0][1] / len(predictions) if commonest else 0.0,
        "cut": cut,
        "predictions": predictions,
    }


def headline(result: dict, protocol: str) -> float:
    """The one accuracy to quote: acc_norm in cloze form, where choices differ in length; acc in label form."""
    return result["acc_norm" if protocol == "cloze" else "acc"]


def table(results: dict[str, dict], protocol: str) -> str:
    """The results of several tasks as text, with the majority baseline beside them and their unweighted mean below."""
    lines = [f"{'task':<14} {'n':>6} {'acc':>7} {'acc_norm':>9} {'± 95 %':>7} {'majority':>9} {'cut':>5}"]
    for task, result in results.items():
        p = headline(result, protocol) / 100
        half = 196 * math.sqrt(p * (1 - p) / result["n"])
        lines.append(f"{task:<14} {result['n']:>6} {result['acc']:>7.2f} {result['acc_norm']:>9.2f} {half:>7.2f} "
                     f"{result['majority']:>9.2f} {result['cut']:>5}")
    if len(results) > 1:
        mean = {key: sum(r[key] for r in results.values()) / len(results) for key in ("acc", "acc_norm", "majority")}
        lines.append(f"{'mean':<14} {'':>6} {mean['acc']:>7.2f} {mean['acc_norm']:>9.2f} {'':>7} "
                     f"{mean['majority']:>9.2f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ machine

def device_problems(name: str) -> list[str]:
    """What is wrong with --device, one text or none."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        return [f"--device {name}: expected auto, cpu, cuda or cuda:N"]
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        return [f"--device {name}: no such CUDA GPU here, of {torch.cuda.device_count()}; use --device cpu"]
    return []


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where to run, and the dtype of the frozen base: float32 on CPUs, whose bfloat16 is slow, bfloat16 on GPUs that
    compute in it, float16 on older ones."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if dtype == "bfloat16" and where.type == "cuda" and torch.cuda.get_device_capability(where)[0] < 8:
        raise UserError(f"--dtype bfloat16: {torch.cuda.get_device_name(where)} does not compute in it; use float16 or "
                        "float32")
    if dtype != "auto":
        return where, getattr(torch, dtype)
    if where.type == "cpu":
        return where, torch.float32
    return where, torch.bfloat16 if torch.cuda.get_device_capability(where)[0] >= 8 else torch.float16


# -------------------------------------------------------------------------------------------- command line

def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Flags(description=__doc__)
    parser.add_argument("--run", help="a run directory of train.py, or a directory with an adapter")
    parser.add_argument("--adapter", choices=("best", "last"), default="best", help="which of the run's adapters")
    parser.add_argument("--init", help="a base model, as in train.py; with --run the run's own")
    parser.add_argument("--tasks", default="all", help=f"all, or some of {','.join(TASKS)}")
    parser.add_argument("--protocol", choices=FORMS, help="default: the run's own form, cloze for a base model")
    parser.add_argument("--limit", type=int, default=0, help="the first so many questions of each task; 0: all")
    parser.add_argument("--data", help="a directory of <task>/test.jsonl; default data/commonsense, made if need be")
    parser.add_argument("--max-len", type=int, default=0,
                        help="longer questions lose the start of their prompt; default the run's, or 512")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--export", nargs=2, metavar=("hf|peft", "DIR"),
                        help="instead of scoring, write the merged model in Hugging Face layout (hf) or the adapter in "
                             "peft's (peft); ungated adapters only")
    parser.add_argument("--out", help="where to write; default the run's eval/, out/eval/ for a base model")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> tuple[list[str], Path | None, dict]:
    """The tasks, the adapter's directory and the run's configuration; UserError with everything that is wrong."""
    tasks = list(TASKS) if args.tasks == "all" else args.tasks.split(",")
    wrong = args.wrong + [f"unknown task '{task}'; expected all or {', '.join(TASKS)}" for task in tasks
                          if task not in TASKS]
    wrong += [] if args.limit >= 0 else [f"--limit {args.limit}; expected 0 (all) or more"]
    wrong += [] if args.max_len == 0 or args.max_len >= 16 else [f"--max-len {args.max_len}; expected 16 or more"]
    wrong += [f"--tasks: {task} is named twice" for task in set(tasks) if tasks.count(task) > 1]
    if args.export and args.export[0] not in ("hf", "peft"):
        wrong.append(f"--export {args.export[0]}; expected hf or peft")
    wrong += [] if args.run or args.init else ["nothing to evaluate: pass --run DIRECTORY or --init MODEL"]
    wrong += device_problems(args.device)
    target = args.export[1] if args.export else args.out or args.run or "out"
    if problem := unwritable(Path(target), empty=bool(args.export)):
        wrong.append(f"--{'export' if args.export else 'out'} {problem}")
    adapter, run = None, {}
    if args.run:
        places = [Path(args.run) / args.adapter, Path(args.run)]
        adapter = next((place for place in places if (place / "adapter.safetensors").exists()
                        or (place / "adapter_config.json").exists()), None)  # the latter is peft's
        configs = [place / "config.json" for place in (Path(args.run), Path(args.run).parent)]
        configs = [path for path in configs if path.exists()]
        run = read_json(configs[0]).get("config", {}) if configs else {}  # of the run, also for one of its adapters
        if not isinstance(run, dict) or not isinstance(run.get("init", ""), str):
            raise UserError(f"{configs[0]}: not the config.json of a run")
        if not Path(args.run).is_dir():
            wrong.append(f"{args.run}: no such directory")
        elif adapter is None:
            wrong.append(f"{args.run}: no adapter there; looked for {places[0]}/adapter.safetensors")
        elif not (args.init or run.get("init")):
            wrong.append(f"{args.run}: no config.json that names the base model; pass --init")
    if wrong:
        raise UserError("; ".join(wrong))
    return tasks, adapter, run


def export(model: Transformer, base: str, layout: str, directory: str) -> dict:
    if layout == "peft":
        export_peft(model, directory)
    else:
        merge_adapters(model)
        save_pretrained(model, directory, base)
    print(f"wrote {directory}")
    return {}


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    tasks, adapter, run = check(args)
    base, protocol = args.init or run["init"], args.protocol or run.get("form", "cloze")
    device, dtype = pick_device(args.device, args.dtype or ("float32" if args.export else "auto"))
    extra = {} if args.data is None else {"out": Path(args.data)}
    records = {task: load_records(task, "test", **extra)[:args.limit or None] for task in tasks if not args.export}
    tokenizer = load_tokenizer(base)
    model = Transformer.from_pretrained(base, dtype=dtype, device=device)
    max_len = args.max_len or min(run.get("max_len", 512), model.config.max_len)
    if max_len > model.config.max_len:
        raise UserError(f"--max-len {max_len} is longer than the base's context of {model.config.max_len}")
    if adapter is not None:
        load_adapter(model, adapter)
    if args.export:
        return export(model, base, *args.export)
    print(f"{base}{f' + {adapter}' if adapter else ''}, {protocol} form, {sum(map(len, records.values()))} questions")

    results = {task: evaluate(model, tokenizer, records[task], protocol, max_len) for task in tasks}
    print(table(results, protocol))
    predictions = [prediction for result in results.values() for prediction in result.pop("predictions")]
    # A directory for each adapter, protocol and limit, so that no result overwrites another; tasks join up in it.
    kind = f"{args.adapter if args.run else Path(base).stem}-{protocol}{f'-{args.limit}' if args.limit else ''}"
    out = Path(args.out) if args.out else Path(args.run or "out") / "eval" / kind
    if (out / "results.json").exists():
        earlier = (out / "predictions.jsonl").read_text().splitlines()
        predictions = [p for p in map(json.loads, earlier) if p["task"] not in results] + predictions
        results = read_json(out / "results.json")["tasks"] | results
    summary = {"base": base, "adapter": str(adapter) if adapter else None, "protocol": protocol, "limit": args.limit,
               "dtype": str(dtype), "torch": torch.__version__, "tasks": results,
               "mean": sum(headline(result, protocol) for result in results.values()) / len(results)}
    lines = "".join(json.dumps(prediction) + "\n" for prediction in predictions)
    write_atomically(out / "predictions.jsonl", lambda path: path.write_text(lines))
    write_atomically(out / "results.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    print(f"wrote {out}/results.json and predictions.jsonl")
    return summary


if __name__ == "__main__":
    run_command(main)
