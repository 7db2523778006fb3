"""peft's adapter files <-> our tensors.

peft keeps an adapter as adapter_config.json and adapter_model.safetensors, whose keys are transformers' names of the
layers. Here an adapter is {our name of a layer: {"A": (r, in), "B": (out, r), and what else its method trains}}, and a
method is a pair: the fields of adapter_config.json by which peft knows it, and {our name of a tensor: peft's}.

transformers' GPT-2 has q, k and v in one layer, c_attn: one adapter, our three. Three of rank r are exactly one of rank
3r, in blocks; what has one number for each output, as DoRA's m, is stacked like B:

    BA = [ B_q  0   0  ] [ A_q ]
         [  0  B_k  0  ] [ A_k ]        Every layer then gets rank 3r, the others filled up with zeros, as not every
         [  0   0  B_v ] [ A_v ]        version of peft heeds its `rank_pattern` (for HiRA, 0.21 does not).

The other way round, one that peft trained on c_attn is three that share A: B_q A, B_k A and B_v A.
"""
import json
import math
import re
import time
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data.files import UserError, is_number, read_json, read_tensors, reading, write_atomically
from data.names import ends, ends_in

# Fields of adapter_config.json that are followed, or that do not change what the adapter computes. All others have to be
# off, so that whatever peft invents is refused by name instead of overlooked.
FIELDS = set("""peft_type task_type peft_version auto_mapping base_model_name_or_path revision inference_mode
    r lora_alpha lora_dropout hira_dropout use_rslora use_dora fan_in_fan_out
    target_modules exclude_modules layers_to_transform layers_pattern
    init_lora_weights init_weights eva_config megatron_core qalora_group_size""".split())
# Starts that leave the base as it is. Those of PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract theirs from it.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
SECONDS = 2.0  # that all patterns of an adapter may take together
LONGEST = 1000  # characters of a pattern, and copies that its {counts} make of a part of it


# ------------------------------------------------------------------------------------------------ reading

def read_peft(directory: Path, layers: dict[str, list[str]], methods: dict[str, tuple[dict, dict]]):
    """(AdapterConfig's fields, {our name of a layer: tensors}) of the adapter that peft or `write_peft` wrote.

    layers: {transformers' name: our names} of all linear layers of the base; three for c_attn, else one. UserError names
    the file and what cannot be followed, what is missing and what is surplus.
    """
    about, file = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    raw = read_json(about)
    with reading(about):
        method = check(raw, methods)
        chosen = {theirs: layers[theirs] for theirs in target_layers(raw, list(layers))}
        if not chosen:
            leaves = sorted({theirs.split(".")[-1] for theirs in layers})
            raise UserError(f"target_modules {raw['target_modules']!r} are no layers of this base model; it has "
                            f"{', '.join(leaves)}")
    r, keys = raw["r"], methods[method][1]
    parts = read_parts(file, list(chosen), keys, r)
    fused = max(map(len, chosen.values()))                                          # 3 with a c_attn, else 1
    in_blocks = fused > 1 and r % fused == 0 and holds_only_blocks(parts, chosen, r // fused)
    our_r = r // fused if in_blocks else r
    tensors = {}
    for theirs, names in chosen.items():
        for i, name in enumerate(names):
            part = split(parts[theirs], i, len(names), our_r if in_blocks else None)
            # a q, k or v of which nothing is there was no target of the export
            if len(names) == 1 or any(tensor.any() for tensor in part.values()):
                tensors[name] = part
    kind = raw["peft_type"].lower()
    scaling = raw.get("lora_alpha", 8) / (math.sqrt(r) if raw.get("use_rslora") else r)
    fields = {"method": method, "gate": "none", "r": our_r, "alpha": scaling * our_r if kind == "lora" else None,
              "dropout": raw.get(f"{kind}_dropout", 0.0),
              "targets": ends(list(tensors), [name for names in layers.values() for name in names])}
    return fields, tensors


def check(raw: dict, methods: dict[str, tuple[dict, dict]]) -> str:
    """Our name of the method that an adapter_config.json describes; UserError if it cannot be had exactly."""
    if missing := [name for name in ("peft_type", "r", "target_modules") if name not in raw]:
        raise UserError(f"not an adapter's configuration; no {' and no '.join(missing)}")
    found = [method for method, (fields, _) in methods.items()
             if all((raw.get(name) or False) == value for name, value in fields.items())]
    kinds = dict.fromkeys(fields["peft_type"] for fields, _ in methods.values())
    wrong = [] if found else [f"peft_type {raw['peft_type']}, only {' and '.join(kinds)}"]
    kinds_of = {"target_modules": str, "exclude_modules": str, "layers_pattern": str, "layers_to_transform": int}
    wrong += [f"{name} {raw[name]!r}" for name, kind in kinds_of.items()
              if not all(type(value) is kind for value in as_list(raw.get(name)))]
    wrong += [f"r {raw['r']!r}"] if type(raw["r"]) is not int or raw["r"] < 1 else []
    wrong += [f"lora_alpha {raw['lora_alpha']!r}"] if not is_number(raw.get("lora_alpha", 8), -1e12, 1e12) else []
    wrong += [f"{name} {raw[name]!r}, which changes the base" for name in ("init_lora_weights", "init_weights")
              if name in raw and raw[name] not in STARTS]
    wrong += [f"{name} {value!r}" for name, value in raw.items()
              if name not in FIELDS and value not in (None, "none", [], {}) and value is not False]
    if wrong:
        raise UserError(f"not supported: {'; '.join(wrong)}")
    return found[0]


def as_list(value) -> list:
    """A list, or the one value that stands for it; None is none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def target_layers(raw: dict, names: list[str]) -> list[str]:
    """Those of the named layers that an adapter_config.json adapts, by the rules of peft."""
    wanted, numbers = raw["target_modules"] or [], as_list(raw.get("layers_to_transform"))
    end = time.monotonic() + SECONDS
    if isinstance(wanted, str) and raw.get("layers_to_transform") is not None:
        raise UserError("layers_to_transform beside a target_modules that is a pattern, which peft refuses")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = [name for name in names if name != "lm_head"]
    chosen = select(wanted, names, end) - select(raw.get("exclude_modules") or [], names, end)
    if numbers:
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in as_list(raw.get("layers_pattern") or None)]
        found = {}  # the number of the block that a layer is in, by the first pattern that finds one
        for start in starts or [r".*?\.[^.]*"]:
            for name, match in try_pattern(rf"{start}\.(?P<number>\d+)\.", names, "match", end).items():
                found.setdefault(name, int(match["number"] or -1))
        chosen = {name for name in chosen if name in wanted or found.get(name) in numbers}  # a whole name always counts
    return [name for name in names if name in chosen]


def select(wanted: str | list[str], names: list[str], end: float) -> set[str]:
    """The names that a pattern matches as a whole, or that end in one of a list."""
    if isinstance(wanted, str):
        return set(try_pattern(wanted, names, "fullmatch", end))
    return {name for name in names if any(ends_in(name, end) for end in wanted)}


def try_pattern(pattern: str, names: list[str], how: str, end: float) -> dict:
    """{name: match} of the names that a pattern from a file matches, as with Python's re, which knows no time limit: one
    like (a+)+$ may try for as long as the universe lasts. end: when, by the monotonic clock, it has to be done."""
    counts = re.findall(r"\{([0-9]{0,9}),?([0-9]{0,9})", pattern[:LONGEST])
    copies = math.prod(max(int(least or 1), int(most or 1), 1) for least, most in counts)
    if len(pattern) > LONGEST or copies > LONGEST:  # it would fill the memory
        raise UserError(f"the pattern {pattern[:80]!r} is too long, or its counts are too high; write a list of names")
    try:
        re.compile(pattern)  # what regex alone knows, such as recursion, is no pattern of peft's
        compiled = regex.compile(pattern)
        found = {name: getattr(compiled, how)(name, timeout=max(end - time.monotonic(), 1e-3)) for name in names}
    except (re.error, regex.error) as error:
        raise UserError(f"{pattern!r} is not a pattern: {error}") from None
    except TimeoutError:
        raise UserError(f"the pattern {pattern!r} takes too long; write one that is quick, or a list of names") from None
    return {name: match for name, match in found.items() if match}


def read_parts(file: Path, chosen: list[str], keys: dict[str, str], r: int) -> dict[str, dict[str, torch.Tensor]]:
    """{transformers' name: {our name of a tensor: tensor}}; UserError if they are not those of the chosen layers."""
    found, parts = read_tensors(file), {}
    for theirs in chosen:
        wanted = {leaf: f"base_model.model.{theirs}.{key}" for leaf, key in keys.items()}
        if missing := [key for key in wanted.values() if key not in found]:
            raise UserError(f"{file}: missing {', '.join(missing)}")
        part = parts[theirs] = {leaf: found.pop(key) for leaf, key in wanted.items()}
        if part["A"].shape[:1] != (r,) or part["B"].shape[1:] != (r,):
            raise UserError(f"{file}: {theirs} has A {tuple(part['A'].shape)} and B {tuple(part['B'].shape)}, expected "
                            f"(r, in) and (out, r) with r = {r}")
    if found:
        raise UserError(f"{file}: unexpected {', '.join(sorted(found)[:4])}{' and more' if len(found) > 4 else ''}")
    return parts


def split(part: dict[str, torch.Tensor], i: int, n: int, r: int | None) -> dict[str, torch.Tensor]:
    """Our i-th of n adapters in one of peft's: its own block, of rank r, or its rows of B with all of A."""
    rows = {leaf: tensor if leaf == "A" else tensor.chunk(n)[i] for leaf, tensor in part.items()}
    if r is None:
        return rows
    ranks = slice(i * r, (i + 1) * r)
    return rows | {"A": part["A"][ranks], "B": rows["B"][:, ranks]}                 # (r, in), (out, r)


def holds_only_blocks(parts: dict, chosen: dict[str, list[str]], r: int) -> bool:
    """Whether A and B are blocks of rank r, as above, and zero beside them, in all layers; and not everywhere zero."""
    nonzero = lambda part: int(part["A"].count_nonzero() + part["B"].count_nonzero())  # noqa: E731
    return any(part["B"].any() for part in parts.values()) and all(
        nonzero(parts[theirs]) == sum(nonzero(split(parts[theirs], i, len(names), r)) for i in range(len(names)))
        for theirs, names in chosen.items())


# ------------------------------------------------------------------------------------------------ writing

def write_peft(directory: Path, adapter: dict[str, dict[str, torch.Tensor]], layers: dict[str, list[str]],
               weights: dict[str, torch.Tensor], method: tuple[dict, dict], r: int, scaling: float, dropout: float,
               base: str | None) -> None:
    """Writes an adapter for PeftModel.from_pretrained.

    adapter: {our name of an adapted layer: tensors}. layers: as in `read_peft`. weights: {our name: W0} of all of them.
    r, scaling (s), dropout: the adapter's. base: what peft finds the base model by, a hub id or a directory.
    """
    fields, keys = method
    chosen = {theirs: names for theirs, names in layers.items() if any(name in adapter for name in names)}
    rank = r * max(map(len, chosen.values()))
    tensors = {}
    for theirs, names in chosen.items():
        parts = [adapter.get(name) or neutral(weights[name], r) for name in names]
        whole = {leaf: torch.cat([part[leaf] for part in parts]) for leaf in keys}                  # m: (out,)
        whole["A"] = F.pad(whole["A"], (0, 0, 0, rank - len(whole["A"])))                           # (rank, in)
        B = torch.block_diag(*(part["B"] for part in parts))
        whole["B"] = F.pad(B, (0, rank - B.shape[1]))                                               # (out, rank)
        tensors |= {f"base_model.model.{theirs}.{key}": whole[leaf].detach().cpu().contiguous()
                    for leaf, key in keys.items()}
    kind, conv1d = fields["peft_type"].lower(), any(len(names) > 1 for names in layers.values())  # GPT-2, with c_attn
    raw = {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": base, "r": rank,
           "target_modules": sorted(ends(list(chosen), list(layers))), f"{kind}_dropout": dropout,
           "fan_in_fan_out": conv1d} | fields
    if kind == "lora":
        raw |= {"lora_alpha": scaling * rank, "use_rslora": False, "bias": "none"}
    text = json.dumps(raw, indent=2) + "\n"
    write_atomically(directory / "adapter_model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    write_atomically(directory / "adapter_config.json", lambda path: path.write_text(text))


def neutral(W0: torch.Tensor, r: int) -> dict[str, torch.Tensor]:
    """An adapter that changes nothing, for a q, k or v without one in a c_attn that has others."""
    W0 = W0.detach().to(torch.promote_types(W0.dtype, torch.float32))               # (out, in)
    return {"A": W0.new_zeros(r, W0.shape[1]), "B": W0.new_zeros(W0.shape[0], r), "m": W0.norm(dim=1)}
