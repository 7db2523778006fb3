"""What both programs share on the command line: flags, the device and its dtype, one line for an error."""
import argparse
import dataclasses
import difflib
import inspect
import os
import re
import resource
import sys
import textwrap
import time
from functools import partial

import torch

from data.files import Stopped, UserError, first_line, is_panic, is_text


def flag(name: str) -> str:
    """The flag of a setting: --max-len of max_len."""
    return "--" + name.replace("_", "-")


# What other programs call flags of ours that are not spelt alike.
OTHER_NAMES = {"--rank": "--r", "--lora-r": "--r", "--learning-rate": "--lr", "--method": "--peft", "--model": "--init",
               "--batch-size": "--batch", "--output-dir": "--out", "--steps": "--max-steps", "--lambda": "--entropy-weight"}


def make_parser(settings: type, description: str, choices: dict) -> argparse.ArgumentParser:
    """A flag for each field of a dataclass. A comment that ends a field's line is the flag's --help, and one that has a
    line of its own is the title of those that follow."""
    description = "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, 79)
                              for part in description.strip().split("\n\n"))
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False,
                                     exit_on_error=False,
                                     formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=79))
    fields, group = {field.name: field for field in dataclasses.fields(settings)}, parser
    for line in inspect.getsource(settings).splitlines():
        if title := re.fullmatch(r"    # (.*)", line):
            group = parser.add_argument_group(title[1])
        elif found := re.match(r"    (\w+): .*?# (.*)", line):
            field, text = fields[found[1]], found[2].replace("%", "%%")
            if field.type is bool:
                group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, default=None,
                                   help=f"{text} [no]")
                continue
            word = "|".join(choices.get(field.name, [])) or {list: "WORD"}.get(field.type, field.type.__name__.upper())
            group.add_argument(flag(field.name), nargs="+" if field.type is list else None, metavar=word,
                               help=f"{text} [{field.default}]" if field.default not in ("", [], None) else text)
    return parser


def read_flags(settings: type, argv: list, description: str, choices: dict = {}) -> tuple[dict, list[str]]:
    """({field: value} of the flags that are given, what is wrong with them, one text each).

    settings: a dataclass. Each field is a flag; its type is that of the value, where a list takes several words.
    argv: flags and values; from Python, values may be numbers and paths. choices: {field: the values it may have}."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    try:
        known, unknown = make_parser(settings, description, choices).parse_known_args(
            join_negative_numbers(list(map(str, argv))))
    except argparse.ArgumentError as error:  # a flag without its value
        raise UserError(f"{str(error).removeprefix('argument ')}; see --help") from None

    # the value of an unknown flag is no error of its own
    wrong = []
    for word in [word for word in unknown if word.startswith("--")] or unknown:
        name, flags = word.split("=")[0], list(map(flag, fields))
        close = [other for other in [OTHER_NAMES.get(name)] if other in flags]
        close += difflib.get_close_matches(name, flags, n=1, cutoff=0.8)
        wrong.append(f"unknown argument {word}" + (f" (did you mean {close[0]}?)" if close else "; see --help"))
    given = {}
    for name, words in vars(known).items():
        if words is None:
            continue
        kind, text = fields[name].type, " ".join(words) if isinstance(words, list) else words
        expected = {int: "a whole number", float: "a number"}.get(kind, "a value")
        try:
            value = kind(words)
            if words == "" or kind is list and "" in words:  # as in --data "$UNSET"
                raise ValueError
            if kind is int and abs(value) >= 2**63:
                expected = "a whole number below 2^63"
                raise ValueError
            if not is_text(str(text)):
                raise ValueError
            if name in choices and value not in choices[name]:
                expected = f"one of {', '.join(choices[name])}"
                raise ValueError
            given[name] = value
        except ValueError:
            wrong.append(f"{flag(name)} {text}: expected {expected}")
    return given, wrong


def join_negative_numbers(argv: list[str]) -> list[str]:
    """["--lr", "-1e-3"] -> ["--lr=-1e-3"]: argparse takes some negative numbers for flags."""
    joined = []
    for word in argv:
        if re.fullmatch(r"-(\.?\d.*|inf|nan)", word) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def run_command(main) -> None:
    """Runs a program's main(); what a user can mend becomes one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what a terminal has no character for
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, OSError) as error:  # an OSError names its file: no permission, disk full, ...
        end_with(str(error))
    except MemoryError:
        end_with("out of memory: this needs more than there is here")
    except Stopped as error:  # which has said how to go on
        sys.exit(128 + error.signal)
    except KeyboardInterrupt:
        print("interrupted; what was saved before is whole", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:
        if isinstance(error, NotImplementedError) and "MPS" in str(error):  # Apple's GPU lacks an operation
            end_with(f"{first_line(error)}; use --device cpu")
        if not is_panic(error):
            raise  # a mistake of ours, with its traceback
        end_with(f"a library gave up: {first_line(error)}")


def end_with(line: str) -> None:
    print("error:", " ".join(line.splitlines()), file=sys.stderr)
    sys.exit(2)


def device_problems(name: str) -> list[str]:
    """What is wrong with --device, one text or none."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", name):
        return [f"--device {name}: expected auto, cpu, mps, cuda or cuda:N"]
    if name == "mps" and not torch.backends.mps.is_available():
        return ["--device mps: no Apple GPU here that this PyTorch can use; use --device cpu"]
    if name == "mps" and "RANK" in os.environ:
        return ["--device mps: there is one GPU for all processes; start without torchrun, or use --device cpu"]
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        return [f"--device {name}: no such CUDA GPU here, of {torch.cuda.device_count()}; use --device cpu"]
    return []


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where to run, and the dtype of the frozen base: bfloat16 on what computes in it, else float16 on NVIDIA's GPUs and
    float32 elsewhere. Under torchrun, Apple's GPU (mps) is only taken by name."""
    if device == "auto":
        has_mps = torch.backends.mps.is_available() and "RANK" not in os.environ
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    device = torch.device(device)
    is_old = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8
    if dtype == "auto":
        dtype = cpu_dtype() if device.type == "cpu" else "float16" if is_old else "bfloat16"
        if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):  # which has bfloat16
            dtype = "float32"
    if dtype == "bfloat16" and is_old:
        raise UserError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} does not compute in it; use float16 "
                        "or float32")
    return device, getattr(torch, dtype)


def cpu_dtype() -> str:
    """bfloat16 on a CPU that multiplies matrices in it (AVX512-BF16, AMX) and is several times quicker so, float32 on all
    others, which imitate bfloat16, some a thousand times slower. A product in each is timed, which takes milliseconds: by
    the time of one thread, so that a busy machine comes to the same."""
    seconds, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x, W, times = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype), []
            for _ in range(5):
                start = time.thread_time()
                x @ W
                times.append(time.thread_time() - start)
            seconds[dtype] = min(times)
    finally:
        torch.set_num_threads(threads)
    return "bfloat16" if 2 * seconds[torch.bfloat16] < seconds[torch.float32] else "float32"


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU's allocator, or of this process since it began (ru_maxrss is in KiB, on macOS in bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":  # what it has now: no peak is kept
        return torch.mps.driver_allocated_memory() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
