"""--logger: a run's metrics to TensorBoard, Weights & Biases or Trackio too. None of them is needed, and what goes wrong
in one is told once and ends no training."""
import json
import uuid
from pathlib import Path

from data.files import first_line

LOGGERS = ("none", "tensorboard", "wandb", "trackio")


def starter(name: str):
    """What opens a log. ImportError where the package is missing; by a name in it, as a folder called wandb, which the
    package leaves, can be imported as well."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter as start
    elif name == "wandb":
        from wandb import init as start
    else:
        from trackio import init as start
    return start


def logger_problems(name: str) -> list[str]:
    """What is wrong with --logger, one text or none: its package is missing."""
    if name in LOGGERS[1:]:
        try:
            starter(name)
        except ImportError:
            return [f"--logger {name}: the package is not installed; pip install {name}"]
    return []


class Logger:
    """The open log of a run, which a resumed run goes on with. step: the first that is going to be logged."""

    def __init__(self, name: str, directory: Path, facts: dict, step: int):
        self.name, self.log_numbers, self.finish = name, None, None
        self.attempt(self.open, directory, facts, step)

    def open(self, directory: Path, facts: dict, step: int) -> None:
        start = starter(self.name)
        if self.name == "tensorboard":
            writer = start(directory / "tensorboard", purge_step=step)  # those of steps that were lost are hidden
            writer.add_text("config", f"```\n{json.dumps(facts, indent=2)}\n```", step)
            self.finish = writer.close
            self.log_numbers = lambda numbers, step: [writer.add_scalar(*item, step) for item in numbers.items()]
            return
        file = directory / "logger-id"  # of this run, whatever another in a directory of this name was called
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:8])
        number = file.read_text()
        more = {"id": number, "dir": str(directory)} if self.name == "wandb" else {}
        run = start(project="gatera", name=f"{directory.name}-{number}", config=facts, resume="allow", **more)
        self.log_numbers, self.finish = run.log, run.finish

    def log(self, line: dict) -> None:
        """A line of metrics.jsonl that is about a step."""
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        if self.log_numbers:
            self.attempt(self.log_numbers, numbers, step=line["step"])

    def close(self) -> None:
        if self.finish:
            self.attempt(self.finish)

    def attempt(self, call, *args, **options) -> None:
        try:
            call(*args, **options)
        except Exception as error:  # no network, no account, a full disk, ...
            print(f"WARNING: --logger {self.name}: {type(error).__name__}: {first_line(error)}; it gets no more metrics, "
                  "metrics.jsonl does")
            self.log_numbers = self.finish = None
