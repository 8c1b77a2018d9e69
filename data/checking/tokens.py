"""Checks of records as token ids: what is trained, how it begins and ends, what is too long."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.text.chat_format import end_of_turn_ids, render
from chatllama.text.encoding import decode, encode
from data.caching import code_digest, num_workers
from data.checking.report import Findings, SourceHealth, percentiles
from data.decontaminate import record_texts
from data.tokenize import fit, nothing_within


@dataclass(frozen=True)
class TokenRules:
    """What the ids of a record are judged by."""

    bos_id: int | None
    end_ids: list[int]
    """Ids that end an assistant's turn."""


def sequence_problems(
    ids: Sequence[int], mask: Sequence[bool], prompt_ids: Sequence[int], rules: TokenRules
) -> list[str]:
    """Names of the checks that a conversation fails.

    Args:
        ids: (T,) of the conversation.
        mask: (T,) True on the tokens that are trained.
        prompt_ids: of the same conversation without its last answer, open for it.
        rules: what to judge by.
    """
    problems: list[str] = []
    if not any(mask):
        problems.append("trains_nothing")
    elif all(mask):
        problems.append("trains_everything")
    ends = [i for i in range(len(ids)) if mask[i] and (i + 1 == len(ids) or not mask[i + 1])]
    if any(ids[end] not in rules.end_ids for end in ends):
        problems.append("label_without_eos")
    if rules.bos_id is not None and any(a == b == rules.bos_id for a, b in pairwise(ids)):
        problems.append("double_bos")
    if list(ids[: len(prompt_ids)]) != list(prompt_ids):
        problems.append("prompt_is_no_prefix")
    return problems


MESSAGES = {
    "trains_nothing": "no token of the record is trained",
    "trains_everything": "every token is trained, the prompt too",
    "label_without_eos": "an answer does not end with the EOS, so that stopping is never learnt",
    "double_bos": "two BOS in a row",
    "prompt_is_no_prefix": "the prompt's tokens do not begin those of prompt and answer",
}


@dataclass(frozen=True)
class CheckedTokens:
    """What is known of each usable record of a source, in order."""

    lengths: list[int]
    """Tokens, of the longest of its sequences."""
    problems: list[str]
    """The first check of its tokens that fails, in words, or ""."""


def check_tokens(
    good: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    health: SourceHealth,
    findings: Findings,
) -> CheckedTokens:
    """Lengths and failed checks of every record; the defects go into `findings`.

    Args:
        good: usable rows of `read_rows`.
        tokenizer: of the run.
        chat: layout.
        health: of the source, with its limit; its figures are filled in.
        findings: collects.
    """
    bos = tokenizer.bos_token_id
    rules = TokenRules(bos if isinstance(bos, int) else None, end_of_turn_ids(tokenizer, chat))
    shown = good.map(
        _measure,
        features=Features(
            {
                "length": Value("int64"),
                "tokens": Value("int64"),
                "trained": Value("int64"),
                "problems": List(Value("string")),
                "cut": Value("string"),
                "where": Value("string"),
            }
        ),
        remove_columns=good.column_names,
        fn_kwargs={
            "tokenizer": tokenizer,
            "chat": chat,
            "rules": rules,
            "limit": health.max_length,
            "code": code_digest(),
        },
        num_proc=num_workers(len(good)),
    )
    lengths: list[int] = shown["length"][:]
    health.num_tokens = sum(shown["tokens"][:])
    health.num_trained_tokens = sum(shown["trained"][:])
    health.lengths = percentiles(lengths)
    first: list[str] = []
    for where, problems in zip(shown["where"][:], shown["problems"][:], strict=True):
        first.append("")
        for problem in problems:
            name, _, reason = problem.partition(": ")
            message = MESSAGES.get(name, "cannot be laid out")
            example = f"{where}: {reason}" if reason else where
            findings.add("error", name, health.name, message, example)
            first[-1] = first[-1] or message
    for where, length, cut in zip(shown["where"][:], lengths, shown["cut"][:], strict=True):
        if cut:
            health.truncated += 1
            message = f"over {health.max_length} tokens: {cut}"
            findings.add("warning", "truncated", health.name, message, f"{where}: {length} tokens")
    _check_characters(good, tokenizer, health, findings)
    return CheckedTokens(lengths, first)


def _check_characters(
    good: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    health: SourceHealth,
    findings: Findings,
) -> None:
    counts: Counter[str] = Counter()
    for row in good:
        counts.update("".join(record_texts(row)))  # pyright: ignore[reportArgumentType]
    dropped = {char: n for char, n in counts.items() if drops(tokenizer, char)}
    for char, count in sorted(dropped.items(), key=lambda item: -item[1]):
        message = "a character that the tokenizer drops"
        example = f"{char!r} (U+{ord(char):04X}), {count} times"
        findings.add("warning", "dropped_character", health.name, message, example)


def drops(tokenizer: PreTrainedTokenizerFast, char: str) -> bool:
    """Whether a character is lost as tokens: nothing or the unknown token stands for it."""
    if char.isspace():
        return False
    ids = encode(tokenizer, char)
    return tokenizer.unk_token_id in ids or char not in decode(tokenizer, ids)


def _measure(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    rules: TokenRules,
    limit: int | None,
    code: str,
) -> dict[str, Any]:
    """Figures and failed checks of one row; `code` only names the cache entry."""
    if "text" in row:
        ids = encode(tokenizer, row["text"])
        # BOS and EOS are put around it; every token is trained.
        num = len(ids) + 1 + (tokenizer.bos_token_id is not None)
        figures = {"length": num, "tokens": num, "trained": num}
        return {**figures, "problems": [], "cut": "", "where": row["where"]}
    lengths, trained, problems = [0], 0, list[str]()
    try:
        for conversation in _conversations(row):
            asked = conversation[:-1] if conversation[-1]["role"] == "assistant" else conversation
            prompt = render(tokenizer, chat, asked, add_generation_prompt=True)
            if asked is conversation:
                lengths.append(len(prompt.ids))
                continue
            whole = render(tokenizer, chat, conversation)
            lengths.append(len(whole.ids))
            trained += sum(whole.mask)
            problems += sequence_problems(whole.ids, whole.mask, prompt.ids, rules)
    except ValueError as error:
        problems.append(f"cannot_be_rendered: {error}")
    return {
        "length": max(lengths),
        "tokens": sum(lengths),
        "trained": trained,
        "problems": list(dict.fromkeys(problems)),
        "cut": _cut(row, tokenizer, chat, limit) if limit and max(lengths) > limit else "",
        "where": row["where"],
    }


def _cut(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, chat: ChatSection, limit: int
) -> str:
    """What training does with a record that is too long."""
    if row.get("answers") or row["messages"][-1]["role"] != "assistant":
        return "left out"
    _, mask, changed = fit(row["messages"], tokenizer, chat, limit)
    return changed if any(mask) else f"left out, {nothing_within(limit)}"


def _conversations(row: dict[str, Any]) -> list[list[Any]]:
    """Every sequence that a row becomes."""
    if row.get("answers"):
        return [
            [*row["prompt"], {"role": "assistant", "content": answer}] for answer in row["answers"]
        ]
    return [row["messages"]]
