"""Checks of records as token ids: what is trained, how it begins and ends, what is too long."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.text.chat_format import end_of_turn_ids, render
from chatllama.text.encoding import encode_text
from chatllama.text.tokenizer import within_positions
from data.caching import cached_map
from data.checking.records import iterate
from data.checking.report import MESSAGES, Findings, StageSource, percentiles
from data.reading.records import record_texts
from data.token_report import drops
from data.tokenize import fit, nothing_within, without_turns


def sequence_problems(
    ids: Sequence[int],
    mask: Sequence[int],
    prompt_ids: Sequence[int],
    bos_id: int | None,
    end_ids: Sequence[int],
) -> list[str]:
    """Names of the checks that a conversation fails.

    Args:
        ids: (T,) of the conversation.
        mask: (T,) True on the tokens that are trained.
        prompt_ids: of the same conversation without its last answer, open for it.
        bos_id: None where the tokenizer has none.
    """
    problems: list[str] = []
    if not any(mask):
        problems.append("trains_nothing")
    elif all(mask):
        problems.append("trains_everything")
    ends = [i for i in range(len(ids)) if mask[i] and (i + 1 == len(ids) or not mask[i + 1])]
    if any(ids[end] not in end_ids for end in ends):
        problems.append("label_without_eos")
    if bos_id is not None and any(a == b == bos_id for a, b in pairwise(ids)):
        problems.append("double_bos")
    if list(ids[: len(prompt_ids)]) != list(prompt_ids):
        problems.append("prompt_is_no_prefix")
    return problems


_MEASURED = (
    dict.fromkeys(("length", "tokens", "trained"), Value("int64"))
    | dict.fromkeys(("cut", "where"), Value("string"))
    | {"problems": List(Value("string"))}
)


def check_tokens(
    good: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    part: StageSource,
    findings: Findings,
) -> tuple[list[int], list[str]]:
    """Of every usable row of `read_rows`: tokens of its longest sequence; its first problem or "".

    Fills in the source's figures, which hold its limit; the defects go into `findings`.
    """
    part.max_length = part.max_length and within_positions(tokenizer, part.max_length)
    shown = cached_map(good, _measure, _MEASURED, tokenizer, chat, part.max_length)
    lengths: list[int] = shown["length"][:]
    part.num_tokens = sum(shown["tokens"][:])
    part.num_trained_tokens = sum(shown["trained"][:])
    part.lengths = percentiles(lengths)
    first: list[str] = []
    for row in iterate(shown):
        where, problems = row["where"], [problem.partition(": ") for problem in row["problems"]]
        first.append(MESSAGES[problems[0][0]] if problems else "")
        for name, _, reason in problems:
            findings.add(name, part.name, f"{where}: {reason}" if reason else where)
        if row["cut"]:
            part.truncated += 1
            message = f"over {part.max_length} tokens: {row['cut']}"
            findings.add("truncated", part.name, f"{where}: {row['length']} tokens", message)
    _check_characters(good, tokenizer, part, findings)
    return lengths, first


def _check_characters(
    good: Dataset, tokenizer: PreTrainedTokenizerFast, part: StageSource, findings: Findings
) -> None:
    counts: Counter[str] = Counter()
    for row in iterate(good):
        counts.update("".join(record_texts(row)))
    dropped = {char: n for char, n in counts.items() if drops(tokenizer, char)}
    for char, count in sorted(dropped.items(), key=lambda item: -item[1]):
        example = f"{char!r} (U+{ord(char):04X}), {count} times"
        findings.add("dropped_character", part.name, example)


def _measure(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, chat: ChatSection, limit: int | None
) -> dict[str, Any]:
    """Figures and failed checks of one row."""
    if "text" in row:
        num = len(encode_text(tokenizer, row["text"])) + 1  # EOS; every token is trained
        figures = {"length": num, "tokens": num, "trained": num}
        return {**figures, "problems": [], "cut": "", "where": row["where"]}
    bos = tokenizer.bos_token_id
    bos_id, end_ids = bos if isinstance(bos, int) else None, end_of_turn_ids(tokenizer, chat)
    lengths, trained, problems = [0], 0, list[str]()
    try:
        for conversation in conversations(row):
            answered = conversation[-1]["role"] == "assistant"
            turns = conversation[:-1] if answered else conversation
            prompt = render(tokenizer, chat, turns, add_generation_prompt=True)
            if not answered:
                lengths.append(len(prompt.ids))
                continue
            ranked = bool(row.get("answers"))
            whole = render(tokenizer, chat, conversation, last_answer_only=ranked)
            lengths.append(len(whole.ids))
            mask = without_turns(whole.mask, conversation, row.get("untrained") or ())
            trained += sum(mask)
            problems += sequence_problems(whole.ids, mask, prompt.ids, bos_id, end_ids)
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
    untrained = row.get("untrained") or ()
    _, mask, changed = fit(row["messages"], tokenizer, chat, limit, untrained)
    return changed if any(mask) else f"left out, {nothing_within(limit)}"


def conversations(row: dict[str, Any]) -> list[list[Any]]:
    """Every sequence that a row of messages or ranked answers becomes."""
    if row.get("answers"):
        prompt = row["prompt"]
        return [[*prompt, {"role": "assistant", "content": text}] for text in row["answers"]]
    return [row["messages"]]
