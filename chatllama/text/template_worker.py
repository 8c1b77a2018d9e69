"""Renders chat templates, one JSON line a request, as a process of its own with limits.

Runs alone (`python template_worker.py`), imports nothing of this package, and ends with its input.
A template is a program of a stranger's: the limits of this process on CPU time and memory are the
only ones that hold for every loop, product and filter. `template_process.py` starts it.

The environment is that of `transformers.utils.chat_template_utils`, which a test compares.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2.ext
from jinja2 import TemplateError, nodes
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 2
"""For one conversation."""
MEMORY_BYTES = 512 * 2**20
"""Of the whole process."""
MOST_CHARACTERS = 8 * 2**20
"""Written for a request."""


SHOWN = 500
"""Characters of an error."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` tags, which mark the answers for other programs and write nothing."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag as a call block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace takes no name like {name!r}")


class Dict:
    """The class `dict` for templates, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A new one."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*args)


def raise_exception(message: object) -> None:
    """Ends the rendering with a message."""
    raise TemplateError(str(message))


def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON, without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def environment() -> ImmutableSandboxedEnvironment:
    """What a chat template may use."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


def allow(seconds: int) -> None:
    """Limits this process to so many more seconds of CPU time; beyond it the system ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)


def limit(kind: int, most: int) -> None:
    """Sets one of this process's limits, within those of the system."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))


def answer(request: dict[str, Any], compiled: dict[str, jinja2.Template]) -> dict[str, Any]:
    """`texts` of the request's conversations, or the `error` of the first that has none."""
    texts = []
    try:
        source = request["template"]
        if source not in compiled:
            compiled.clear()
            compiled[source] = environment().from_string(source)
        for messages, prompt in request["conversations"]:
            allow(CPU_SECONDS)
            text = compiled[source].render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt,
                **request["tokens"],
            )  # fmt: skip
            texts.append(text)
            if sum(map(len, texts)) > MOST_CHARACTERS:
                raise TemplateError(f"it writes more than {MOST_CHARACTERS} characters")
    except TemplateError as error:
        return {"error": f"refuses this: {str(error)[:SHOWN]}"}
    except MemoryError:
        return {"error": f"needs more than {MEMORY_BYTES // 2**20} MB of memory"}
    except Exception as error:  # whatever a stranger's program may raise
        return {"error": f"fails: {type(error).__name__}: {str(error)[:SHOWN]}"}
    return {"texts": texts}


def main() -> None:
    """Answers requests until there are no more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the process that reads the answers
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    limit(resource.RLIMIT_CORE, 0)
    compiled: dict[str, jinja2.Template] = {}
    for line in sys.stdin:
        allow(CPU_SECONDS)
        found = json.dumps(answer(json.loads(line), compiled))
        sys.stdout.write(found + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
