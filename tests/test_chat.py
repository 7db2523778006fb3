"""eval.py --prompt --chat: templates of published models give the text that transformers gives, and the ids that their
tokenizer.json does."""
import json
import time

import pytest
import tokenizers

import eval as evaluation
from conftest import hub_files
from data import chat
from data.chat import chat_text, encode_chat, read_chat_template
from data.files import UserError
from data.tokenizer import load_tokenizer

MESSAGES = ["Hi there", '  two\n\nlines "12"  ', "é 你好 </s> <|im_end|>", "{{ 7 }} {% for %}"]


@pytest.mark.parametrize("name", ["granite-3b-code", "tinyllama-1.1b-chat", "llama-3.1-8b-instruct"])
@pytest.mark.parametrize("message", MESSAGES)
def test_published_templates_give_transformers_text(name, message):
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(hub_files("granite-3b-code"))  # any will do for any template
    settings = json.loads((hub_files(name) / "tokenizer_config.json").read_text())
    other.bos_token, other.eos_token = settings["bos_token"], settings["eos_token"]
    expected = other.apply_chat_template([{"role": "user", "content": message}], chat_template=settings["chat_template"],
                                         tokenize=False, add_generation_prompt=True)
    assert chat_text(str(hub_files(name)), message) == expected


EVERY_EXTENSION = """{% set x = 1 %}{% for m in messages %}
{% generation %}{% set x = 2 %} {{ m.content ~ x }}
{%- endgeneration %}{{ x }}
{% endfor %}
{{ {"b": "é<", "a": [1]} | tojson(ensure_ascii=true, indent=1, separators=(";", "="), sort_keys=true) }}
{{ {"b": "é<", "a": [1]} | tojson(true, 2) }}"""


def test_what_transformers_adds_to_jinja_is_there(llama):
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(hub_files("granite-3b-code"))
    expected = other.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=EVERY_EXTENSION,
                                         tokenize=False, add_generation_prompt=True)
    assert chat_text(with_template(llama, EVERY_EXTENSION), "Hi") == expected


def test_jinja2_is_found_where_python_finds_it_or_named(llama, tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("")  # stands before the real one, and holds nothing
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="needs jinja2, .*pip install jinja2"):
        chat_text(with_template(llama, "x"), "x")


@pytest.mark.parametrize("name, text", [
    ("granite-3b-code", "Question:\n Hi\n\n<|endoftext|>Answer:\n<|endoftext|>"),
    ("llama-2-7b-chat", "<s>[INST] Hi 你 [/INST] x</s>"),
    ("smollm-135m", "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n")])
def test_special_tokens_are_read_as_tokenizers_does(name, text):
    tokenizer = load_tokenizer(str(hub_files(name)))
    ids = encode_chat(tokenizer, text)
    theirs = tokenizers.Tokenizer.from_file(str(hub_files(name) / "tokenizer.json"))
    theirs.no_padding()
    assert ids == theirs.encode(text, add_special_tokens=False).ids and len(ids) < len(tokenizer.encode(text))


def test_the_quick_starts_base_is_asked_in_chatml(smollm):
    text = chat_text(smollm, "Hi")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert encode_chat(load_tokenizer(smollm), text).count(1) == 3  # <|im_start|>


def with_template(llama, template, **more):
    settings = {"eos_token": "<|endoftext|>", "chat_template": template} | more
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(llama)


def test_where_a_template_stands(llama):
    with pytest.raises(UserError, match="has no chat template; drop --chat"):
        chat_text(str(llama), "x")
    for damaged in (["x"], [{"name": ["default"], "template": "x"}], [None]):
        with pytest.raises(UserError, match="has no chat template; drop --chat"):
            chat_text(with_template(llama, damaged, bos_token=["x"], unk_token={"content": [1]}), "x")
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    assert chat_text(with_template(llama, several), "x") == "x!"
    (llama / "chat_template.jinja").write_text("{{ eos_token }}{{ strftime_now('%%') }}{{ {'a': 'é'} | tojson }}\n")
    assert chat_text(str(llama), "x") == '<|endoftext|>%{"a": "é"}'


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('one user only') }}", "ValueError: one user only"),
    ("{% for %}", "TemplateSyntaxError"),
    ("{{ messages.__class__.__mro__[-1].__subclasses__() }}", "SecurityError"),
    ("{{ 'x' * 10**10 }}", "MemoryError"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1 seconds"),
])
def test_a_template_can_do_no_harm(template, words, llama, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"tokenizer_config.json: its chat template .*{words}"):
        chat_text(with_template(llama, template), "x")
    assert time.monotonic() - started < 5


def test_a_prompt_is_asked_as_a_message(llama, capsys):
    argv = ["--init", with_template(llama, "<|endoftext|>U:{{ messages[0].content }} A:"), "--prompt", "why?", "--chat",
            "--device", "cpu", "--max-new-tokens", "3"]
    answer = evaluation.main(argv)["the base"]
    printed, tokenizer = capsys.readouterr().out, load_tokenizer(str(llama))
    model = evaluation.Transformer.from_pretrained(str(llama))
    prompt = [tokenizer.eos, *tokenizer.encode("U:why? A:")]
    assert answer == tokenizer.decode(model.generate([prompt], 3, tokenizer.eos)[0])
    assert "<|endoftext|>U:why? A: >>>" in printed
    with pytest.raises(UserError, match="tokens in the base's chat template; expected up to 20"):
        evaluation.main([*argv, "--max-len", "20", "--prompt", "why? " * 30])
    assert read_chat_template(llama)[0].name == "tokenizer_config.json"
