"""Chat templates of strangers: what they may write, and that none takes this process with it."""

import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.text import template_process
from chatllama.text.chat_format import render
from chatllama.text.template_process import rendered
from chatllama.text.tokenizer import load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Ä \u2028 <b> \" ' {{ x }}"},
    {"role": "user", "content": "a\n🙂 \0 b "},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "c"},
]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
TEMPLATES = [
    PLAIN,
    "{{ bos_token }}{{ eos_token }}{{ messages | tojson }}{{ messages[0] | tojson(indent=1) }}",
    "  {% if add_generation_prompt %}\n  <a>\n  {% endif %}\n{{- 5 }}  {# c #}\n x",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.last %}"
    "{% break %}{% endif %}{{ m['content'] | trim | upper }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n }}{{ tools is none }}{{ documents is none }}{{ nothing is defined }}",
    "{% for m in messages %}{% generation %}{% set a = 1 %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{{ a is defined }}{{ dict(a=1, b=2) | tojson(sort_keys=true) }}"
    "{{ dict.fromkeys('ab', 1) }}",
    "{% macro f(x, y=2) %}{{ x }}-{{ y }}{% endmacro %}{{ f('<&>') }}{{ f(1, y=3) }}{{ 7 // 2 }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'ab'[::-1] }}"
    "{{ messages[1:] | map(attribute='role') | join(',') }}{{ '%s' % 'x' }}{{ 'é' | tojson }}",
    "{{ strftime_now('%Y') }}{{ messages[0].content is string }}{{ messages[-1]['missing'] }}|",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_it_writes_what_transformers_writes(
    tokenizer: PreTrainedTokenizerFast, template: str, prompt: bool
) -> None:
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    conversations = [(MESSAGES, prompt), (MESSAGES[:1], True)]
    found = rendered(template, tokenizer.special_tokens_map, conversations)
    assert found[0] == expected and len(found) == 2


REFUSED = {
    "{{ raise_exception('not so') }}": "refuses this: not so",
    "{{ raise_exception('x' * 9999) }}": "refuses this: x{500}$",
    "{% for %}": "refuses this: Expected", "{{ nothing() }}": "'nothing' is undefined",
    "{{ 1 / 0 }}": "ZeroDivisionError", "{{ messages + 1 }}": "TypeError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% include '/etc/passwd' %}": "no loader", "{% import 'os' as os %}": "no loader",
    "{% extends '../x' %}": "no loader", "{{ ''.__class__.__mro__ }}": "unsafe|undefined",
    "{{ messages.append(1) }}": "not.*safe|SecurityError|unsafe",
    "{{ namespace(_a=1) }}": "'_a'", "{{ 'a' * 10 ** 10 }}": "512 MB of memory",
    "{{ '%1000000000d' % 1 }}": "512 MB of memory",
    "{{ 'a'.center(10 ** 10) }}": "512 MB of memory",
    "{{ ([0] * 10 ** 10) | length }}": "512 MB of memory",
    "{% set ns = namespace(x='abcdefgh') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x | length }}": "512 MB of memory",
    "{{ range(10 ** 9) | list }}": "range", "{{ 'x' * 10 ** 7 }}": "more than 8388608 characters",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "fails|refuses|ends its process",
    "{{ " + "-" * 20_000 + "1 }}": "fails|refuses|ends its process",
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000: "fails|refuses|ends its process",
}  # fmt: skip


@pytest.mark.parametrize("template", REFUSED, ids=lambda t: t[:30])
def test_what_it_may_not_do_is_an_error(template: str) -> None:
    with pytest.raises(
        ValueError, match=f"(?s)the tokenizer's chat template .*({REFUSED[template]})"
    ):
        rendered(template, {}, [(MESSAGES, False)])
    assert rendered("{{ messages | length }}", {}, [(MESSAGES, False)]) == ["4"]


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% if messages | length > 1 %}{% for a in range(9**5) %}{% set x = range(9**5) | sum %}"
    "{% endfor %}{% endif %}",
]


@pytest.mark.slow
@pytest.mark.parametrize("template", ENDLESS, ids=lambda t: t[:30])
def test_what_never_ends_is_ended(template: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"takes more than 2 s"):
        rendered(template, {}, [(MESSAGES, False)])
    assert time.monotonic() - begun < 30
    assert rendered("{{ messages | length }}", {}, [(MESSAGES, False)]) == ["4"]


def numbers(count: int, label: str) -> list[str]:
    return [
        rendered(label + "{{ messages[0].n }}", {}, [([{"n": n}], False)])[0] for n in range(count)
    ]


def test_threads_get_their_own_answers() -> None:
    found: dict[str, Sequence[str]] = {}

    def ask(label: str) -> None:
        found[label] = numbers(50, label)

    threads = [threading.Thread(target=ask, args=(label,)) for label in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {label: [f"{label}{n}" for n in range(50)] for label in "abc"}


def _numbers_into(queue: Any) -> None:
    queue.put(numbers(30, "child"))


def test_a_forked_process_shares_no_worker() -> None:
    numbers(1, "a")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_numbers_into, args=(queue,))
    child.start()
    assert numbers(200, "parent") == [f"parent{n}" for n in range(200)]
    assert queue.get(timeout=60) == [f"child{n}" for n in range(30)]
    child.join(60)


def test_a_worker_that_was_killed_is_replaced_and_signals_are_not_for_it() -> None:
    numbers(1, "a")
    worker = next(iter(template_process._workers.values())).process
    assert worker is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        worker.send_signal(number)
    assert numbers(2, "b") == ["b0", "b1"] and worker.poll() is None
    worker.kill()
    worker.wait()
    assert numbers(2, "c") == ["c0", "c1"]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' * 10 ** 10 }}", "{% include 'x' %}"])
def test_a_folders_template_fails_in_words(
    tiny_tokenizer_dir: Path, tmp_path: Path, place: str, template: str
) -> None:
    for file in tiny_tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = template
    if place.endswith(".json"):
        settings = json.loads((tmp_path / place).read_text())
        content = json.dumps(settings | {"chat_template": template})
    (tmp_path / place).write_text(content)
    chat = ChatSection.model_validate({"template": "tokenizer", "date": "2024-01-01"})
    with pytest.raises(ValueError, match=r"the tokenizer's chat template (fails|needs more)"):
        render(load_tokenizer(tmp_path), chat, [{"role": "user", "content": "hi"}])
