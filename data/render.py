"""A program of its own, which data/chat.py runs: {"template", "messages", "tokens"} on stdin -> the text, both in JSON.

A chat template is a program that somebody else wrote. jinja2's sandbox keeps it from everything but its values; time and
memory, in which it could still be without measure, are limited for this process, which has nothing to lose."""
import contextlib
import datetime
import json
import resource
import sys

try:
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise SystemExit(f"it needs jinja2, which torch brings ({error}); run `pip install jinja2`")


class Generation(ext.Extension):
    """{% generation %}...{% endgeneration %} marks what an assistant said, for training; here it is text like any."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, messages: list[dict], tokens: dict[str, str]) -> str:
    def raise_exception(text):
        raise ValueError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, ext.loopcontrols])
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    environment.filters["tojson"] = tojson
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
