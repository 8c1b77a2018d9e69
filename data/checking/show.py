"""Records as tokens, coloured by loss mask: in the terminal and as a page."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.text.byte_level import byte_letters
from chatllama.text.chat_format import render
from chatllama.text.encoding import control_tokens, encode_text
from data.checking.check import stage_sources
from data.checking.report import StageSource
from data.checking.tokens import conversations
from data.reading.source import read_source
from data.tokenize import without_turns


@dataclass(frozen=True)
class Shown:
    """One sequence of tokens."""

    title: str
    """Place of the record, and which of its sequences this is."""
    tokens: list[tuple[str, bool, bool]]
    """Text of each token, whether it is trained (or scored), whether it is a control token."""
    over: int
    """Tokens over the stage's limit."""

    @property
    def num_trained(self) -> int:
        """Tokens that are trained."""
        return sum(trained for _, trained, _ in self.tokens)


def shown_records(
    cfg: Config, tokenizer: PreTrainedTokenizerFast, stage: str, num: int
) -> list[Shown]:
    """The first `num` records of each source of a stage (sft, reward or ppo), as tokens.

    Raises:
        ValueError: the stage has no data, a source cannot be read, or training leaves out
            every record that would be shown.
    """
    parts = [part for part in stage_sources(cfg) if part.stage == stage]
    if not parts:
        raise ValueError(f"{stage}.data is empty: there is nothing to show")
    shown: list[Shown] = []
    for part in parts:
        data, _ = read_source(part.source, part.kind)
        for row in data.select(range(min(num, len(data)))):
            shown += _sequences(cast(dict[str, Any], row), part, cfg, tokenizer)
    if shown and not any(one.tokens for one in shown):
        raise ValueError(f"nothing can be shown: {shown[0].title}")
    return shown


def print_records(shown: Sequence[Shown], console: Console) -> None:
    """Prints every sequence; trained tokens are green, control tokens bold."""
    legend = Text.assemble(("trained", "black on green"), "  ", ("not trained", "dim"), "  ",
                           ("control token", "bold magenta"))  # fmt: skip
    console.print(legend)
    for one in shown:
        console.rule(Text(_heading(one)), align="left")
        line = Text()
        for text, trained, control in one.tokens:
            style = "bold magenta" if control else "" if trained else "dim"
            line.append(text, style=f"{style} on green" if trained else style)
        console.print(line)


def page(shown: Sequence[Shown]) -> str:
    """The same as one HTML page that needs nothing else."""
    parts = [_PAGE_BEGIN]
    for one in shown:
        parts.append(f"<h2>{html.escape(_heading(one))}</h2>\n<pre>")
        for text, trained, control in one.tokens:
            classes = f"{'t' if trained else 'u'}{' c' if control else ''}"
            parts.append(f'<span class="{classes}">{html.escape(text)}</span>')
        parts.append("</pre>\n")
    return "".join([*parts, "</body></html>\n"])


_PAGE_BEGIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Tokens and loss mask</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --page: #fff; --ink: #17202a; --muted: #5b6672; --line: #ccc;
  --trained: #b7ebb0; --control: #8e0a8e; }
@media (prefers-color-scheme: dark) { :root { --page: #11151a; --ink: #e6eaee; --muted: #a0abb6;
  --line: #444; --trained: #1d4d2b; --control: #ff9cf5; } }
body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--page); color: var(--ink); }
h2 { font-size: .9rem; border-top: 1px solid var(--line); padding-top: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; }
span { border-right: 1px solid #8883; }
.t { background: var(--trained); } .u { color: var(--muted); }
.c { font-weight: bold; color: var(--control); }
</style></head><body>
<p><span class="t">trained</span> <span class="u">not trained</span>
<span class="c">control token</span></p>
"""


def _heading(one: Shown) -> str:
    over = f", {one.over} over the limit" if one.over else ""
    return f"{one.title} - {len(one.tokens)} tokens, {one.num_trained} trained{over}"


def _sequences(
    row: dict[str, Any], part: StageSource, cfg: Config, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Shown]:
    """Every sequence that a record becomes; none, with the reason, if training leaves it out."""
    place = f"{part.stage}.{part.role} {row['where']}"
    if part.kind == "text":
        ids = [*encode_text(tokenizer, row["text"]), cast(int, tokenizer.eos_token_id)]
        yield _shown(place, ids, [True] * len(ids), part, tokenizer)
        return
    ranks = [f", rank {rank}" for rank in row.get("ranks") or []] or [""]
    opened = part.kind == "prompts"
    for turns, rank in zip(conversations(row), ranks, strict=True):
        try:
            whole = {"add_generation_prompt": opened, "last_answer_only": bool(row.get("answers"))}
            rendered = render(tokenizer, cfg.chat, turns, **whole)
        except ValueError as error:
            yield Shown(f"{place}{rank}, left out: {error}", [], 0)
            continue
        mask = without_turns(rendered.mask, turns, row.get("untrained") or ())
        yield _shown(place + rank, rendered.ids, mask, part, tokenizer)


def _shown(
    title: str,
    ids: list[int],
    mask: Sequence[int],
    part: StageSource,
    tokenizer: PreTrainedTokenizerFast,
) -> Shown:
    controls = set(control_tokens(tokenizer).values())
    rows = zip(_token_texts(ids, tokenizer), mask, ids, strict=True)
    tokens = [(text, bool(trained), token in controls) for text, trained, token in rows]
    over = max(0, len(ids) - part.max_length) if part.max_length else 0
    return Shown(title, tokens, over)


def _token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each token, with real spaces and line ends; bytes inside a character as `<0xE2>`.

    SentencePiece writes a space as U+2581 and a byte as `<0xE2>`; byte-level BPE (LLaMA 3, Qwen)
    writes each byte as a letter, a space as U+0120.
    """
    tokens = cast(list[str], tokenizer.convert_ids_to_tokens(list(ids)))
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    if "ByteLevel" in json.dumps(decoder):
        added, letters = tokenizer.get_added_vocab(), byte_letters()
        return [token if token in added else _bytes_text(token, letters) for token in tokens]
    ascii = {f"<0x{code:02X}>": chr(code) for code in range(128)}
    return [ascii.get(token, token.replace("\u2581", " ")) for token in tokens]


def _bytes_text(token: str, letters: Mapping[str, int]) -> str:
    """The text that a byte-level token stands for."""
    parts = (bytes([letters[c]]) if c in letters else c.encode() for c in token)
    text = b"".join(parts).decode(errors="surrogateescape")
    return "".join(
        f"<0x{ord(letter) - 0xDC00:02X}>" if 0xDC80 <= ord(letter) <= 0xDCFF else letter
        for letter in text
    )
