"""Records as token rows, with counts of what was cut or left out: no length limit acts unseen.

Batches and their order are in `batches.py`; the layout of a conversation is in
`chatllama/text/chat_format.py`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.text.chat_format import Message, end_of_turn_ids, render
from chatllama.text.encoding import encode_text
from chatllama.text.tokenizer import within_positions
from data.caching import cached_map
from data.token_report import MOST, NUM_EXAMPLES, TokenReport, lost_characters

NOT_RENDERED = "the chat template refuses or rewrites it"


def tokenize(
    records: Dataset,
    kind: Literal["sft", "preferences", "prompts"],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
    key: str | None = None,
) -> tuple[Dataset, TokenReport]:
    """The examples of at most `max_length` tokens for a stage, and what was cut or left out.

    The model's max_position_embeddings is a limit, too.

    The kind decides the columns: see `_conversation`, `_preference` and `_prompt`. Every rank calls
    this; later ones find the cache, simultaneous ones do the same work with the same result.

    Args:
        key: of the limit, for errors; None: that of the stage whose kind it is.

    Raises:
        ValueError: there were records, and none could be used; a chat template that this tokenizer
            cannot write at all.
    """
    end_of_turn_ids(tokenizer, chat)
    make, features = {
        "sft": (_conversation, {"input_ids": List(Value("int32")), "mask": List(Value("int8"))}),
        "preferences": (_preference, _PREFERENCE),
        "prompts": (_prompt, _PROMPT),
    }[kind]
    max_length = within_positions(tokenizer, max_length)
    features = features | dict.fromkeys(_NOTES, Value("string")) | {"needed": Value("int32")}
    rows = cached_map(
        records, _by_record, features, make, [*features], tokenizer, chat, max_length, batched=True
    )
    reasons: list[str] = rows["left_out"][:]
    kept = [i for i, reason in enumerate(reasons) if not reason]
    changes = Counter(filter(None, rows.select(kept)["changed"][:]))
    needed = np.array([length or 0 for length in rows["needed"][:]])  # 0: it cannot be written
    report = TokenReport(
        num_read=len(rows),
        num_kept=len(kept),
        changed=dict(changes.most_common()),
        left_out=dict(Counter(filter(None, reasons)).most_common()),
        lost=[*filter(None, rows.select(kept)["lost"][:])],
        examples=[*filter(None, rows["refusal"][:])][:NUM_EXAMPLES],
        num_over=int((needed > max_length).sum()),
        limit=max_length,
        most_need=int(np.quantile(needed, MOST, method="inverted_cdf")) if len(needed) else 0,
        positions=vars(tokenizer).get("max_positions"),
    )
    if reasons and not kept:
        advice = f". {report.advice(key or LIMITS[kind])}" if report.num_over else ""
        raise ValueError(f"no record can be used ({report.summary()}){advice}")
    return rows.select(kept).remove_columns([*_NOTES, "needed"]), report


LIMITS = {"sft": "sft.max_length", "preferences": "reward.max_length"}
LIMITS |= {"prompts": "ppo.max_prompt_length"}
"""The key of a stage's limit."""


_NOTES = ("changed", "left_out", "refusal", "lost")
"""What was done to an example; why it cannot be used; its place and why the template refuses it;
the characters that the tokenizer cannot write. Each "" where there is nothing to say."""


def _by_record(
    records: dict[str, list[Any]],
    make: Callable[..., dict[str, Any]],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *arguments: Any,
) -> dict[str, list[Any]]:
    """What `make` gives for each record of a batch, and the notes."""
    each = [
        dict(zip(records, values, strict=True)) for values in zip(*records.values(), strict=True)
    ]
    made: list[dict[str, Any]] = []
    for record, lost in zip(each, lost_characters(each, tokenizer), strict=True):
        notes = {"changed": "", "left_out": "", "refusal": "", "lost": lost}
        try:
            made.append(notes | make(record, tokenizer, *arguments))
        except ValueError as error:
            refusal = f"{record.get('where', 'a record')}: {error}"
            made.append(notes | {"left_out": NOT_RENDERED, "refusal": refusal})
    return {name: [row.get(name) for row in made] for name in columns}


def tokenize_text(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int | None = None
) -> tuple[Dataset, TokenReport]:
    """Column `input_ids`: BOS, the text, EOS, and how many more examples cutting gave.

    Texts over `max_length` are cut into examples of at most so many tokens, and nothing is lost;
    only the first begins with BOS and only the last ends with EOS.
    """
    features = {"input_ids": List(Value("int32")), "lost": Value("string")}
    max_length = max_length and within_positions(tokenizer, max_length)
    examples = cached_map(dataset, _texts, features, tokenizer, max_length, batched=True)
    extra = len(examples) - len(dataset)
    changed = {"more examples by cutting long texts": extra} if extra else {}
    lost = [*filter(None, examples["lost"][:])]
    report = TokenReport(len(dataset), len(dataset), changed, {}, lost)
    return examples.remove_columns("lost"), report


def fit(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
    untrained: Sequence[int] = (),
) -> tuple[list[int], list[int], str]:
    """Ids and mask of a conversation within `max_length` tokens, and what was cut ("": nothing)."""
    rendered, changed = render(tokenizer, chat, messages), ""
    shortest = 3 if messages[0]["role"] == "system" else 2
    while len(rendered.ids) > max_length and len(messages) > shortest:
        messages = messages[:-2]
        rendered, changed = render(tokenizer, chat, messages), "lost whole exchanges at the end"
    ids, mask = rendered.ids, without_turns(rendered.mask, messages, untrained)
    if len(ids) > max_length:
        ids, mask, changed = ids[:max_length], mask[:max_length], "cut inside the answer"
    return ids, mask, changed


def without_turns(
    mask: Sequence[bool], messages: Sequence[Message], untrained: Sequence[int]
) -> list[int]:
    """The mask of a conversation, 0 on the turns of the given numbers."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answer, made = -1, list[int]()
    for i, trained in enumerate(mask):
        answer += trained and (i == 0 or not mask[i - 1])  # between two answers is a question
        made.append(int(trained and turns[answer] not in untrained))
    return made


def nothing_within(max_length: int) -> str:
    """Why a conversation whose mask `fit` leaves empty is left out."""
    return f"no answer within {max_length} tokens"


def _conversation(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_length: int
) -> dict[str, Any]:
    """Columns `input_ids` and `mask` (1: the token is trained on).

    A conversation over `max_length` loses whole exchanges from its end. One whose first exchange
    is already over is cut in the middle of the answer, so that it has no EOS: a cut never teaches
    to stop. What then has no token to train on is left out.
    """
    turns, untrained = record["messages"], record.get("untrained") or ()
    ids, mask, changed = fit(turns, tokenizer, chat, max_length, untrained)
    left_out = "" if any(mask) else nothing_within(max_length)
    needed = len(render(tokenizer, chat, turns).ids) if changed else len(ids)
    row = {"input_ids": ids, "mask": mask, "needed": needed}
    return row | {"changed": changed, "left_out": left_out}


def _texts(
    records: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int | None
) -> dict[str, list[Any]]:
    """Examples of a batch of texts; what a text loses is noted at its first example."""
    examples: list[list[int]] = []
    noted: list[str] = []
    losses = lost_characters([{"text": text} for text in records["text"]], tokenizer)
    for text, lost in zip(records["text"], losses, strict=True):
        ids = [*encode_text(tokenizer, text), tokenizer.eos_token_id]
        size = max_length or len(ids)
        pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
        examples += pieces
        noted += [lost, *[""] * (len(pieces) - 1)]
    return {"input_ids": examples, "lost": noted}


_PREFERENCE = {
    "answer_ids": List(List(Value("int32"))),
    "ranks": List(Value("int32")),
    "ratings": List(Value("float32")),
    "prompt_length": Value("int32"),
    "where": Value("string"),
}


def _preference(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_length: int
) -> dict[str, Any]:
    """Columns `answer_ids`, `ranks`, `ratings`, `prompt_length` and `where`.

    Every sequence is whole: prompt, answer and end of turn, the same `prompt_length` tokens first,
    the best answer first. An answer over `max_length` is left out, since a reward model must see
    how an answer ends; so is one that has the tokens of a better one. Where no two answers of
    different rank remain, the whole example is left out.
    """
    prompt: list[Message] = record["prompt"]
    begin = render(tokenizer, chat, prompt, add_generation_prompt=True).ids
    kept: list[tuple[list[int], int, float]] = []
    longest, repeated = 0, False
    for answer, rank, rating in zip(
        record["answers"], record["ranks"], record["ratings"], strict=True
    ):
        whole: list[Message] = [*prompt, {"role": "assistant", "content": answer}]
        ids = render(tokenizer, chat, whole, last_answer_only=True).ids
        assert ids[: len(begin)] == begin, f"the answer changed its prompt's tokens: {prompt}"
        longest = max(longest, len(ids))
        again = any(ids == other for other, _, _ in kept)
        repeated = repeated or again
        if len(ids) <= max_length and not again:
            kept.append((ids, rank, rating))
    usable = len({rank for _, rank, _ in kept}) > 1
    problem = f"an answer is over {max_length} tokens" if longest > max_length else ""
    if not problem and repeated:
        problem = "answers are the same tokens"
    return {
        "answer_ids": [ids for ids, _, _ in kept],
        "ranks": [rank for _, rank, _ in kept],
        "ratings": [rating for _, _, rating in kept],
        "prompt_length": len(begin),
        "where": record["where"],
        "needed": longest,
        "changed": f"shortened: {problem}" if usable and problem else "",
        "left_out": "" if usable else problem,
    }


_PROMPT = {
    "input_ids": List(Value("int32")),
    "text": Value("string"),
    "messages": List({"role": Value("string"), "content": Value("string")}),
    "where": Value("string"),
    "columns": Value("string"),
}
"""Of prompts: ids, the last user message, and what reward functions may look at beside it."""


def _prompt(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_length: int
) -> dict[str, Any]:
    """Columns of `_PROMPT`; a longer prompt is left out."""
    messages: list[Message] = record["messages"]
    ids = render(tokenizer, chat, messages, add_generation_prompt=True).ids
    left_out = f"over {max_length} tokens" if len(ids) > max_length else ""
    text = messages[-1]["content"]
    own = {name: record[name] for name in ("messages", "where", "columns")}
    return {"input_ids": ids, "text": text, "left_out": left_out, "needed": len(ids), **own}
