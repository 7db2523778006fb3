"""A program of its own, which data/chat.py runs: {"template", "messages", "tokens"} on stdin -> the text, both in JSON.

A chat template is a program that somebody else wrote. jinja2's sandbox keeps it from everything but its values; time and
memory, in which it could still be without measure, are limited for this process, which has nothing to lose."""
import contextlib
import datetime
import json
import resource
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(template: str, messages: list[dict], tokens: dict[str, str]) -> str:
    def raise_exception(text):
        raise ValueError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template).render(messages=messages, tools=None, documents=None,
                                                    add_generation_prompt=True, **tokens)


if __name__ == "__main__":
    if sys.stdin.isatty():
        raise SystemExit("data/render.py is a part of eval.py --chat; try `python train.py --preset quickstart`")
    for limit, most in ((resource.RLIMIT_AS, 2**30), (resource.RLIMIT_CPU, 10)):  # bytes, seconds
        with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of memory
            resource.setrlimit(limit, (most, most))
    try:
        print(json.dumps(render(**json.load(sys.stdin))))
    except Exception as error:
        raise SystemExit(f"{type(error).__name__}: {error}")
