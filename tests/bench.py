"""Speed and memory, side by side with what people use today: transformers + peft.

    python tests/bench.py                           # all methods, on a CPU
    python tests/bench.py --method gatera --form label --records 64
    python tests/bench.py --device cuda --model llama-3-8b,gpt2-medium \\
        --form label --batch 16,64 [--compile]
    python tests/bench.py --dtype float32,bfloat16  # both on one CPU
    python tests/bench.py --what growth             # with tokens, rank, model
    python tests/bench.py --what resident           # does memory grow?
    python tests/bench.py --what parts              # gate, scoring, ...
    python tests/bench.py --what memory --device cuda --model llama-3-8b
        # what train.py needs, beforehand, from the config alone

Both sides train on the same records in the same batches, with the same weights, rank, targets and AdamW; each is a
process of its own, and they take turns, batch by batch. peft's side is the ordinary way: AutoModelForCausalLM,
get_peft_model, batches padded to the longest, labels of -100, the model's own loss. GateRA stands beside peft's ungated
HiRA, as peft has no gates. A real token is a token that is not padding. smollm2-135m and a path mean those weights; the
name of another shape means random ones (bfloat16 on a GPU).

The floor is the time that the method's needed products take at the matrix rate measured in the same run. In units of a
product with W0: 2 for a frozen layer (forward, input gradient); LoRA and DoRA add 3 with A and with B; HiRA with its
update as a branch is 5, and makes B A anew; the head counts where there is a target; attention is not counted. (HiRA
without a gate could do with 3, by one product with W0 ⊙ (1 + B A): in float32 only, as bfloat16 rounds the update away.)
"""
import argparse
import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.cli import peak_memory, pick_device, read_flags, run_command  # noqa: E402
from data.commonsense import pack, scoring_questions, to_text, training_question  # noqa: E402
from data.files import UserError  # noqa: E402
from data.prepare import TASKS, load_records  # noqa: E402
from eval import log_likelihoods  # noqa: E402
from gatera import (AdapterConfig, GatedLinear, adapter_state, adapters_off, cached_products,  # noqa: E402
                    gate_entropy, gated_layers, inject_adapters)
from data.weights import hugging_face_state  # noqa: E402
from model import CONFIGS, Transformer, TransformerConfig, compile_blocks, load_tokenizer, read_config  # noqa: E402

METHODS = {"lora": ("lora", "none"), "dora": ("dora", "none"), "hira": ("hira", "none"), "gatera": ("hira", "token"),
           "lora+gate": ("lora", "token"), "dora+gate": ("dora", "token")}
LR = 1e-3


# ------------------------------------------------------------------------------------------- the two sides

def load_base(args):
    if args.model == "smollm2-135m" or args.model not in CONFIGS:
        return Transformer.from_pretrained(args.model, dtype=args.dtype, device=args.device)
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_name(args.model))
    model = model.to(args.dtype).to_empty(device=args.device)
    if model.config.tied_head:
        model.head.weight = model.embed.weight
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data.fill_(float(name.endswith("weight"))) if "norm" in name or p.dim() == 1 else p.data.normal_(0, 0.02)
    return model


def batches(args):
    """[[Question]]: the same records in the same order on both sides."""
    tokenizer = load_tokenizer(args.model if args.model not in CONFIGS else "smollm2-135m")
    records = load_records("ARC-Easy", "train")[:args.records]
    questions = [training_question(record, args.form, tokenizer, 512) for record in records]
    return [questions[i:i + args.batch] for i in range(0, len(questions), args.batch)]


def our_side(args, method):
    """(A function of a batch that makes one training step, its model.)"""
    model = load_base(args).train()
    torch.manual_seed(0)
    inject_adapters(model, AdapterConfig(*METHODS[method], r=args.r))
    parameters = list(adapter_state(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0, fused=True)
    if args.compile:
        compile_blocks(model)

    def step(questions):
        batch = pack(questions).to(torch.device(args.device))
        with torch.autocast(args.device.split(':')[0], dtype=args.dtype, enabled=args.dtype != torch.float32):
            logits = model(batch.ids, documents=batch.documents, select=batch.select)
            loss = F.cross_entropy(logits.float(), batch.targets)
            loss = loss + 0.01 * gate_entropy(model, batch.is_real)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, model


def their_side(args, method):
    """The same with transformers and peft."""
    import peft
    import transformers
    transformers.logging.set_verbosity_error()
    base = load_base(args)
    c = base.config
    if c.positions == "learned":
        config = transformers.GPT2Config(
            vocab_size=c.vocab_size, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.d_ff,
            n_positions=c.max_len, layer_norm_epsilon=c.norm_eps, use_cache=False,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)  # ours has none either
        targets = ["c_attn", "c_fc", "mlp.c_proj"]            # one adapter for q, k and v: fewer parameters than ours
    else:
        config = transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied_head, max_position_embeddings=c.max_len,
            use_cache=False, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})
        targets = list(AdapterConfig().targets)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=args.dtype)
    state = hugging_face_state(base)
    state.setdefault("lm_head.weight", base.embed.weight)
    model.load_state_dict(state, assign=True)  # the very same tensors: no second copy on their side either
    model.tie_weights()
    if c.positions == "rotary":  # its speeds are no weights
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(args.device)
    del base, state
    kind = METHODS[method][0]
    if kind == "hira":
        adapter = peft.HiraConfig(r=args.r, target_modules=targets, task_type="CAUSAL_LM")
    else:
        adapter = peft.LoraConfig(r=args.r, lora_alpha=2 * args.r, use_dora=kind == "dora", target_modules=targets,
                                  lora_dropout=0.0, task_type="CAUSAL_LM", fan_in_fan_out=c.positions == "learned")
    model = peft.get_peft_model(model, adapter)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0, fused=True)

    def step(questions):
        rows = [torch.tensor(q.prompt + q.answers[0]) for q in questions]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, q in enumerate(questions):
            labels[i, len(q.prompt):len(rows[i])] = rows[i][len(q.prompt):]
            mask[i, :len(rows[i])] = 1
        ids, labels, mask = (tensor.to(args.device) for tensor in (ids, labels, mask))
        with torch.autocast(args.device.split(':')[0], dtype=args.dtype, enabled=args.dtype != torch.float32):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, model


# ----------------------------------------------------------------------------------------------- the floor

def real_tokens(questions) -> int:
    return sum(len(q.prompt) + len(q.answers[0]) - 1 for q in questions)


def needed_operations(args, method, work) -> float:
    """Floating-point operations of one pass over `work`: products with weights and with A and B; no attention."""
    with torch.device("meta"):
        model = Transformer(read_config(args.model))
        inject_adapters(model, AdapterConfig(*METHODS[method], r=args.r))
    hira = METHODS[method][0] == "hira"
    tokens = sum(map(real_tokens, work))
    targets = sum(len(q.answers[0]) for batch in work for q in batch)
    total = targets * 2 * model.head.weight.numel()
    for name, layer in model.named_modules():
        if isinstance(layer, GatedLinear):
            total += tokens * (5 if hira else 2) * layer.weight.numel()
            # HiRA makes B A twice a step and its gradient once each for A and B; LoRA has 3 products with A and with B
            total += 4 * len(work) * args.r * layer.weight.numel() if hira else tokens * 3 * args.r * sum(layer.weight.shape)
        elif isinstance(layer, torch.nn.Linear) and name != "head":
            total += tokens * 2 * layer.weight.numel()
    return 2.0 * total


def synchronize(args):
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_rate(args, n_tokens: int) -> float:
    """Operations a second of x @ W.T, with the MLP's W and so many tokens."""
    config = read_config(args.model)
    x = torch.randn(n_tokens, config.d_model, device=args.device, dtype=args.dtype)
    W = torch.randn(config.d_ff, config.d_model, device=args.device, dtype=args.dtype)
    rates = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(10):
            x @ W.t()
        synchronize(args)
        rates.append(20 * x.numel() * len(W) / (time.perf_counter() - start))
    return statistics.median(rates)


# ------------------------------------------------------------------------------------- training, in turn

def worker(pipe, side, args, method):
    """Answers the number of a batch with (seconds of a step on it, peak GiB so far)."""
    step, work = side(args, method)[0], batches(args)
    for questions in work[:4]:  # warm up; --compile sees several lengths
        step(questions)
    synchronize(args)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        step(work[number])
        synchronize(args)
        seconds = time.perf_counter() - start
        pipe.send((seconds, peak_memory(torch.device(args.device))))


def machine(args) -> str:
    """What the figures are of: the processor, what it computes in, and how quickly."""
    dtypes = {torch.float32, pick_device(args.device, "auto")[1]}  # bfloat16 is endless on CPUs that imitate it
    args = variant(args, model=args.model.split(",")[0])
    rates = {dtype: matrix_rate(variant(args, dtype=dtype), 512) / 1e9 for dtype in dtypes}
    measured = ", ".join(f"{rate:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}" for dtype, rate in rates.items())
    if args.device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(args.device)}; {measured}"
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text.split()]
    return f"{name[1] if name else platform.processor()} ({', '.join(flags)}), {torch.get_num_threads()} threads; {measured}"


def with_peft() -> bool:
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def training(args, method):
    sides = {"ours": our_side} | ({"peft": their_side} if with_peft() and not args.alone else {})
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(theirs, side, args, method), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[name].recv()
    work = batches(args)
    tokens, operations = sum(map(real_tokens, work)), needed_operations(args, method, work)
    speeds, peaks, rates = {name: [] for name in sides}, {}, []
    with tqdm(total=args.rounds * len(work), desc=method, unit="batch", leave=False) as progress:
        for _ in range(args.rounds):
            seconds = dict.fromkeys(sides, 0.0)
            for number, questions in enumerate(work):
                rates.append(matrix_rate(args, real_tokens(questions)))
                for name, pipe in pipes.items():
                    pipe.send(number)
                    took, peaks[name] = pipe.recv()
                    seconds[name] += took
                progress.update()
            for name in sides:
                speeds[name].append(tokens / seconds[name])
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(None)
        process.join()
    median = {name: statistics.median(values) for name, values in speeds.items()}
    floor = tokens / (operations / statistics.median(rates))
    show = lambda name: f"{median[name]:,.0f} ({min(speeds[name]):,.0f}-{max(speeds[name]):,.0f})" if name in median else "-"  # noqa: E731
    ratio = lambda a, b: f"{a / b:.2f}" if b else "-"  # noqa: E731
    print(f"| {method} | {show('ours')} | {show('peft')} | {ratio(median['ours'], median.get('peft'))} | "
          f"{peaks['ours']:.2f} | {format(peaks['peft'], '.2f') if 'peft' in peaks else '-'} | {ratio(peaks['ours'], peaks.get('peft'))} | "
          f"{floor:,.0f} | {floor / median['ours']:.2f} |", flush=True)


# --------------------------------------------------------------------------- the rest, each in this process

def in_turn(args, *functions) -> list[float]:
    """Median seconds of each function; they take turns, the order changing from round to round."""
    times = [[] for _ in functions]
    for number in range(args.rounds + 1):
        for taken, function in list(zip(times, functions))[::-1 if number % 2 else 1]:
            start = time.perf_counter()
            function()
            synchronize(args)
            if number:  # the first is a warm-up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def variant(args, **changes):
    return argparse.Namespace(**(vars(args) | changes))


def growth(args):
    """Our step (the first of --method) against what it should be linear in."""
    method = args.method.split(",")[0]
    print(f"| {method}: what grows | point | tokens | seconds a step | times the floor |\n|---|---|---|---|---|")
    points = [("tokens", dict(batch=b)) for b in (4, 16, 64)] + [("rank", dict(r=r)) for r in (8, 32, 128)]
    points += [("model", dict(model=m)) for m in ("gpt2", "gpt2-medium")]
    for what, changes in points:
        these = variant(args, **changes)
        step, work = our_side(these, method)[0], batches(these)[:1]
        (seconds,) = in_turn(these, lambda: step(work[0]))
        floor = needed_operations(these, method, work) / matrix_rate(these, real_tokens(work[0]))
        print(f"| {what} | {', '.join(f'{k} {v}' for k, v in changes.items())} | {real_tokens(work[0])} | {seconds:.2f} | "
              f"{seconds / floor:.2f} |", flush=True)


def resident(args):
    """Memory of a process, on a CPU, after ever more steps on batches that are all of another length."""
    at = [step for step in (1, args.steps // 10, args.steps) if step]
    print(f"| method | {' | '.join(f'GiB at step {step}' for step in at)} | last / the one before |\n|---|{'---|' * len(at)}---|")
    for method in args.method.split(","):
        step, work = our_side(args, method)[0], batches(args)
        random.Random(0).shuffle(work)
        gib = []
        for number in tqdm(range(1, args.steps + 1), desc=method, unit="step", leave=False):
            step(work[number % len(work)])
            if number in at:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                gib.append(pages * resource.getpagesize() / 2**30)
        print(f"| {method} | {' | '.join(f'{size:.2f}' for size in gib)} | {gib[-1] / gib[-2]:.3f} |", flush=True)


def parts(args):
    print("| what | measured | against |\n|---|---|---|")
    for part in (steps_with_gates, scoring_and_decoding, starting):
        for row in part(args):
            print(f"| {' | '.join(row)} |", flush=True)


def steps_with_gates(args):
    work, steps = batches(args)[0], {}
    for method in ("lora", "lora+gate", "hira", "gatera"):
        steps[method] = our_side(args, method)[0]
    for plain, gated in (("lora", "lora+gate"), ("hira", "gatera")):
        a, b = in_turn(args, lambda: steps[plain](work), lambda: steps[gated](work))
        yield f"token gate on {plain}", f"{100 * (b / a - 1):+.1f} %", f"a step without it, {a:.2f} s"


def scoring_and_decoding(args):
    tokenizer, model = load_tokenizer("smollm2-135m"), load_base(args).eval()
    inject_adapters(model, AdapterConfig("hira", "token", r=args.r))
    records = load_records("ARC-Easy", "test")[:24]
    questions = [question for record in records for question in scoring_questions(record, args.form, tokenizer, 512)]
    pairs = [(tokenizer.encode(p), tokenizer.encode(a)) for record in records for p, a in to_text(record, args.form)]

    @torch.no_grad()
    def plain_loop():
        scores = []
        for prompt, answer in pairs:
            logits = model(torch.tensor([prompt + answer], device=args.device))[0, len(prompt) - 1:-1].float()
            scores.append(logits.log_softmax(-1)[range(len(answer)), answer].sum().item())
        return scores

    packed = [score for scores in log_likelihoods(model, questions) for score in scores]
    worst = max(abs(a - b) for a, b in zip(packed, plain_loop()))
    a, b = in_turn(args, plain_loop, lambda: log_likelihoods(model, questions))
    yield (f"scoring {len(records)} questions, {args.form}", f"{a / b:.2f} x quicker, scores within {worst:.0e}",
           f"one forward a choice, {a:.1f} s")

    def decode(how):
        with how(model):
            model.generate([questions[0].prompt], 32)

    ways = (adapters_off, cached_products, lambda model: contextlib.nullcontext())
    a, b, c = in_turn(args, *(lambda how=how: decode(how) for how in ways))
    yield "gatera decoding 32 tokens", f"{b / a:.2f} x ({c / a:.2f} x without cached_products)", f"the base, {a:.2f} s"


def starting(args):
    tokenizer, n, start = load_tokenizer("smollm2-135m"), 0, time.perf_counter()
    for task in TASKS:
        for record in load_records(task, "train"):
            n += len(training_question(record, "label", tokenizer, 512).prompt)
    yield "reading and tokenising commonsense_170k", f"{time.perf_counter() - start:.0f} s", f"{n:,} prompt tokens"
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        command = [sys.executable, "-u", ROOT / "train.py", "--preset", "quickstart", "--out", f"{out}/run"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            next(line for line in run.stdout if line.startswith("step"))
            yield "train.py --preset quickstart, all cached", f"{time.perf_counter() - start:.1f} s", "to its first step's end"
            run.kill()


# ------------------------------------------------------------------------------------ the memory, beforehand

ANSWER_TOKENS = 10  # about as many as an answer has, in either form


def kept_for_backward(config: TransformerConfig, adapter: AdapterConfig, max_len: int, dtype: torch.dtype,
                      device: str = "cpu") -> int:
    """Bytes that the forward of one record of max_len tokens keeps for its backward. They are counted in a real forward
    of fake tensors, which have shapes and no memory. It is a CPU's, but for the norms: autocast runs them in float32 on a
    GPU, which keeps their input in it, and a copy of their output in half precision for each layer that reads it."""
    storages = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held on to, so that no other storage gets its number
        return tensor

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model = Transformer(config)
        for module in model.modules():  # fake tensors know no model.to(dtype)
            is_norm = isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm))
            if is_norm and device != "cpu" and dtype != torch.float32:
                module.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
                continue
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(p.to(dtype)))
        inject_adapters(model, adapter)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            row = torch.arange(max_len)[None]
            logits = model(row, select=row[0, -ANSWER_TOKENS:])
            F.cross_entropy(logits.float(), row[0, -ANSWER_TOKENS:]) + gate_entropy(model)
        return sum(storage.nbytes() for number, storage in storages.items() if number not in weights)


def memory(args, method):
    """The memory that train.py needs, from the configuration alone: a table for 1 to 8 processes, with and without
    --fsdp and --checkpointing, for records that all have args.max_len tokens."""
    config, adapter = read_config(args.model), AdapterConfig(*METHODS[method], r=args.r)
    with torch.device("meta"):
        model = Transformer(config).to(args.dtype)
        inject_adapters(model, adapter)
    trainable, frozen = adapter_state(model).values(), [p for p in model.parameters() if not p.requires_grad]
    # In bytes: the weights,
    base = sum(p.nbytes for p in frozen)
    block = sum(p.nbytes for p in model.blocks[0].parameters() if not p.requires_grad)
    ends = base - config.n_layer * block              # what is before and after the blocks
    training = 4 * sum(p.nbytes for p in trainable)   # values, gradients and AdamW's two moments
    # what a record's forward keeps,
    one, two = (kept_for_backward(dataclasses.replace(config, n_layer=n), adapter, args.max_len, args.dtype,
                                  args.device) for n in (1, 2))
    of_block, of_ends = two - one, 2 * one - two
    of_ends += 2 * ANSWER_TOKENS * config.vocab_size * 4  # the logits, and their gradient beside the kept log p
    # W0 ⊙ BA and BA in HiRA's backward, of one layer at a time,
    widest = max(2 * layer.weight.nbytes if hasattr(layer.update, "product") else 0
                 for layer in gated_layers(model).values())
    # and Python, PyTorch and the heap's gaps, as measured.
    program = 0.85 * 2**30 if args.device == "cpu" else 0

    def peak(n: int, checkpointing: bool, fsdp: bool) -> float:
        inputs = args.max_len * config.d_model * args.dtype.itemsize  # of a block: all that checkpointing keeps
        activations = of_block + config.n_layer * inputs if checkpointing else config.n_layer * of_block
        weights = (base / n + ends + 2 * block) if fsdp else base     # of a block, and of the next one
        records = math.ceil(args.batch / n)
        return (program + weights + training + widest + records * (activations + of_ends)) / 2**30

    print(f"{args.model}: {sum(p.numel() for p in frozen):,} frozen parameters, {base / 2**30:.2f} GiB in "
          f"{str(args.dtype).removeprefix('torch.')}; {method}, r {args.r}: {sum(p.numel() for p in trainable):,} "
          f"trainable, {training / 2**30:.2f} GiB with AdamW; a token's activations "
          f"{(config.n_layer * of_block + of_ends) / args.max_len / 2**20:.2f} MiB\n"
          f"GiB of a process with {args.batch} / N records at a time of {args.max_len} tokens each:\n"
          f"{'N':>10} {'plain':>10} {'--checkpointing':>16} {'--fsdp':>10} {'both':>10}")
    for n in (1, 2, 4, 8):
        plain, less, spread, both = (peak(n, *how) for how in ((0, 0), (1, 0), (0, 1), (1, 1)))
        print(f"{n:>10} {plain:>10.1f} {less:>16.1f}" + (f" {spread:>10.1f} {both:>10.1f}" if n > 1 else ""))


# ---------------------------------------------------------------------------------------- the command line

@dataclass
class Settings:
    """The flags; the comment beside each is its help."""
    # what is measured
    what: str = "training"      # our step beside peft's; or ours alone: see above
    method: str = "lora,dora,hira,gatera"   # some of lora, dora, hira, gatera, lora+gate, dora+gate, with commas between
    model: str = "smollm2-135m"     # models, with commas between
    # on what
    device: str = "cpu"         # auto, cpu, cuda, cuda:1, ...
    dtype: str = "auto"         # float32, bfloat16 or auto, as in train.py; several with commas between
    form: str = "cloze"         # cloze, label, or both with a comma between
    batch: str = "16"           # records a step; several with commas between
    records: int = 256          # the first so many of ARC-Easy's training set
    max_len: int = 512          # tokens of a record, of --what memory
    # how
    rounds: int = 3             # over all records, of which the median counts
    steps: int = 500            # of --what resident
    r: int = 32                 # rank
    compile: bool = False       # our side compiled
    alone: bool = False         # our side only


CHOICES = {"what": ("training", "growth", "parts", "memory", "resident")}


def main(argv: list[str] | None = None) -> None:
    given, wrong = read_flags(Settings, sys.argv[1:] if argv is None else argv, __doc__, CHOICES)
    if wrong:
        raise UserError("; ".join(wrong))
    options = argparse.Namespace(**vars(Settings(**given)))
    dtypes = [pick_device(options.device, name)[1] for name in options.dtype.split(",")]
    if options.what != "memory":
        print(f"{machine(options)}; torch {torch.__version__}, {date.today()}\n", flush=True)
    for model, form, batch, dtype in itertools.product(options.model.split(","), options.form.split(","),
                                                       map(int, options.batch.split(",")), dtypes):
        args = variant(options, model=model, form=form, batch=batch, dtype=dtype)
        if args.what == "memory":
            for method in args.method.split(","):
                memory(args, method)
            continue
        print(f"{model}, r {args.r}, {form} form, batches of {batch} of the first {args.records} ARC-Easy training "
              f"records, {args.device}, {dtype}{', compiled' if args.compile else ''}, {args.rounds} rounds: median "
              "(range)\n", flush=True)
        if args.what != "training":
            {"growth": growth, "parts": parts, "resident": resident}[args.what](args)
        else:
            print("| method | real tokens/s | peft's | ratio | peak GiB | peft's | ratio | floor, tokens/s | floor / ours |")
            print("|---|---|---|---|---|---|---|---|---|", flush=True)
            for method in args.method.split(","):
                training(args, method)
        print()


if __name__ == "__main__":
    run_command(main)
