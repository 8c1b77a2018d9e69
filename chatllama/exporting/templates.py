"""The chat layouts in Jinja (transformers, vLLM, llama.cpp) and in Go's templates (Ollama).

Each writes the text whose tokens are those of `chat_format.render`; those in Jinja refuse what it
refuses.
"""

import json

from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.config.schema import GenerationSection
from chatllama.text.chat_format import default_system, end_of_turn_ids
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


def jinja_template(tokenizer: PreTrainedTokenizerFast, chat: ChatSection) -> str:
    """The layout as a Jinja chat template."""
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
    bos, eos = (json.dumps(str(t or "")) for t in (tokenizer.bos_token, tokenizer.eos_token))
    text = _JINJA[chat.template].replace("BOS", bos).replace("EOS", eos)
    return _SYSTEM.replace("DEFAULT", system) + text


def modelfile(
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    generation: GenerationSection,
    gguf: str,
    context: int,
) -> str:
    """An Ollama Modelfile for the file `gguf` beside it, with `context` tokens at most.

    Raises:
        ValueError: the layout is the tokenizer's own Jinja template, or the system prompt holds
            the three quotes that would end it.
    """
    if chat.template == "tokenizer":
        raise ValueError(
            "chat.template is 'tokenizer', a Jinja template, which Ollama does not read: no "
            "Modelfile; write its TEMPLATE by hand"
        )
    system = default_system(chat)
    if '"""' in system:
        raise ValueError('chat.system holds """, which would end SYSTEM in a Modelfile')
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token)
    template = _GO[chat.template].replace("BOS", bos).replace("EOS", eos)
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
