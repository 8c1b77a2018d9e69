"""The chat layouts in Jinja (transformers, vLLM, llama.cpp) and in Go's templates (Ollama).

Each writes the text whose tokens are those of `chat_format.render`; those in Jinja refuse what it
refuses.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.config.schema import GenerationSection
from chatllama.exporting.reference_outputs import CONVERSATIONS, is_prompt
from chatllama.text.chat_format import (
    Message,
    default_system,
    end_of_turn_ids,
    opening_bos,
    render,
    settled,
)
from chatllama.text.encoding import adds_bos
from chatllama.text.template_process import rendered
from chatllama.text.tokenizer import save_tokenizer
from chatllama.text.tokenizer_template import frozen_template

_SYSTEM = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- set system = system | trim if system is string else none -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = DEFAULT -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user')
    or message['content'] is not string -%}
{{- raise_exception('expected texts by user and assistant in turn, one system text before') -}}
{%- endif -%}
{%- endfor -%}
{%- if not turns or system is not string or add_generation_prompt and turns | length % 2 == 0 -%}
{{- raise_exception('a conversation needs a user message, an answer follows the user only') -}}
{%- endif -%}
"""
_JINJA = {
    "llama2": """\
{%- for message in turns -%}
{%- set text = message['content'] | trim -%}
{%- if message['role'] == 'user' -%}
{%- if loop.first and system -%}
{%- set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + text -%}
{%- endif -%}
{{- BOS + '[INST] ' + (text | trim) + ' [/INST]' -}}
{%- else -%}
{{- (' ' + text if text else '') + EOS -}}
{%- endif -%}
{%- endfor -%}
""",
    "alpaca": """\
{{- BOS -}}
{%- for message in turns -%}
{%- set text = message['content'] | trim -%}
{%- if message['role'] == 'user' -%}
{{- system + '\\n\\n' if loop.first and system else '' if loop.first else '\\n\\n' -}}
{{- '### Instruction:\\n' + text -}}
{{- '' if loop.last and not add_generation_prompt else '\\n\\n### Response:\\n' -}}
{%- else -%}
{{- text + EOS -}}
{%- endif -%}
{%- endfor -%}
""",
    "vicuna": """\
{{- BOS -}}
{%- for message in turns -%}
{%- set text = message['content'] | trim -%}
{%- if message['role'] == 'user' -%}
{{- system + ' ' if loop.first and system else '' -}}
{{- 'USER: ' + text if text else 'USER:' -}}
{{- '' if loop.last and not add_generation_prompt else ' ASSISTANT:' -}}
{%- else -%}
{{- (' ' + text if text else '') + EOS -}}
{%- endif -%}
{%- endfor -%}
""",
    "llama3": """\
{{- BOS -}}
{%- if system -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in turns -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- (message['content'] | trim) + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt else '' -}}
""",
    "chatml": """\
{{- BOS -}}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' if system else '' -}}
{%- for message in turns -%}
{{- '\\n' if not loop.first else '' -}}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] | trim) + '<|im_end|>' -}}
{%- endfor -%}
{{- '\\n<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
""",
}
_GO = {
    "llama2": """\
{{- $first := true }}
{{- range .Messages }}
{{- if eq .Role "user" }}
{{- if not $first }}BOS{{ end }}[INST] {{ if and $first $.System }}<<SYS>>
{{ $.System }}
<</SYS>>

{{ end }}{{ .Content }} [/INST]
{{- $first = false }}
{{- else if eq .Role "assistant" }} {{ .Content }}EOS
{{- end }}
{{- end }}""",
    "alpaca": """\
{{- if .System }}{{ .System }}

{{ end }}
{{- $first := true }}
{{- range .Messages }}
{{- if eq .Role "user" }}
{{- if not $first }}

{{ end }}### Instruction:
{{ .Content }}

### Response:
{{ $first = false }}
{{- else if eq .Role "assistant" }}{{ .Content }}EOS
{{- end }}
{{- end }}""",
    "vicuna": """\
{{- if .System }}{{ .System }} {{ end }}
{{- range .Messages }}
{{- if eq .Role "user" }}USER: {{ .Content }} ASSISTANT:
{{- else if eq .Role "assistant" }} {{ .Content }}EOS
{{- end }}
{{- end }}""",
    "llama3": """\
{{- if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}
{{- range .Messages }}
{{- if ne .Role "system" }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}
{{- end }}<|start_header_id|>assistant<|end_header_id|>

""",
    "chatml": """\
{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}
{{- range .Messages }}
{{- if ne .Role "system" }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
""",
}


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> None:
    """Writes tokenizer and chat template: plain transformers' ids are then those of training."""
    save_tokenizer(tokenizer, folder)
    template = jinja_template(tokenizer, chat)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def jinja_template(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> str:
    """The layout as a Jinja chat template."""
    chat = settled(tokenizer, chat)
    system = json.dumps(default_system(chat), ensure_ascii=False)
    if chat.template == "tokenizer":
        own = frozen_template(tokenizer.get_chat_template(), chat.date)
        if chat.system is None:
            return own
        default = f"[{{'role': 'system', 'content': {system}}}]"
        return (
            "{%- if messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = {default} + messages -%}}{{%- endif -%}}{own}"
        )
    bos, eos = map(json.dumps, (opening_bos(tokenizer, chat), str(tokenizer.eos_token)))
    text = _JINJA[chat.template].replace("BOS", bos).replace("EOS", eos)
    return _SYSTEM.replace("DEFAULT", system) + text


def as_text(tokenizer: Any, messages: list[Message], template: str) -> str:
    """A conversation as text by a Jinja chat template; ValueError if it refuses or fails."""
    return rendered(template, tokenizer.special_tokens_map, [(messages, is_prompt(messages))])[0]


def own_layout(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> ChatSection | None:
    """The layout, or the one of ours that writes the tokens of the tokenizer's own template.

    None where that template writes something else.
    """
    chat = settled(tokenizer, chat)
    if chat.template != "tokenizer":
        return chat
    system = chat.system if chat.system is not None else _unasked_system(tokenizer, chat)
    for layout in _GO:
        own = ChatSection.model_validate({"template": layout, "system": system})
        try:
            if all(_ids(tokenizer, own, each) == _ids(tokenizer, chat, each)
                   for each in CONVERSATIONS):  # fmt: skip
                return own
        except ValueError:  # tokens that it lacks, or a template without system prompts
            continue
    return None


def _ids(tokenizer: PreTrainedTokenizerFast, chat: ChatSection, messages: list[Message]) -> Any:
    options = {"add_generation_prompt": is_prompt(messages), "last_answer_only": True}
    return render(tokenizer, chat, messages, **options).ids


def _unasked_system(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> str:
    """The system prompt that the tokenizer's template writes where none is given; "" for none."""
    template, mark = jinja_template(tokenizer, chat), "\ue000"
    question: Message = {"role": "user", "content": "?"}
    try:
        asked = as_text(tokenizer, [{"role": "system", "content": mark}, question], template)
    except ValueError:
        return ""
    unasked = as_text(tokenizer, [question], template)
    before, _, after = asked.partition(mark)
    fits = len(unasked) >= len(before + after) and unasked.startswith(before)
    return unasked[len(before) : -len(after)] if fits and unasked.endswith(after) and after else ""


def modelfile(
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    generation: GenerationSection,
    gguf: str,
    context: int,
) -> str:
    """An Ollama Modelfile for the file `gguf` beside it, with `context` tokens at most.

    Ollama puts the BOS before a conversation where the GGUF file says so.

    Args:
        chat: the layout, as `own_layout` names it.

    Raises:
        ValueError: the system prompt holds the three quotes that would end it.
    """
    system = default_system(chat)
    if '"""' in system:
        raise ValueError('chat.system holds """, which would end SYSTEM in a Modelfile')
    bos, eos = opening_bos(tokenizer, chat), str(tokenizer.eos_token)
    template = "" if adds_bos(tokenizer) else bos
    template += _GO[chat.template].replace("BOS", bos).replace("EOS", eos)
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    if system:
        lines.append(f'SYSTEM """{system}"""')
    for index in end_of_turn_ids(tokenizer, chat):
        stop = tokenizer.convert_ids_to_tokens(index)
        lines.append(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}")
    sampling = {name: getattr(generation, name) for name in ("temperature", "top_k", "top_p")}
    others = {"min_p": 0, "repeat_penalty": 1, "num_ctx": context}
    lines += [f"PARAMETER {name} {value}" for name, value in (sampling | others).items()]
    return "\n".join(lines) + "\n"
