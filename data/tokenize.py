"""What became of records on their way to tokens, counted, so that no length limit acts unseen."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.text.chat_format import Message, render
from chatllama.text.encoding import encode
from data.caching import code_digest, num_workers


@dataclass(frozen=True)
class TokenReport:
    """Counts of tokenised records."""

    num_read: int
    num_kept: int
    changed: dict[str, int]
    """Kept but changed, by what was done."""
    left_out: dict[str, int]
    """Left out, by reason."""

    def summary(self) -> str:
        """A line for the log."""
        counts = [f"{count} {what}" for what, count in self.changed.items()]
        counts += [f"{count} left out: {reason}" for reason, count in self.left_out.items()]
        return "; ".join([f"{self.num_kept} of {self.num_read} examples", *counts])

    @property
    def facts(self) -> dict[str, float]:
        """The counts for a stage's result."""
        return {
            "examples": self.num_kept,
            "examples_changed": sum(self.changed.values()),
            "examples_left_out": sum(self.left_out.values()),
        }


def tokenize(
    records: Dataset,
    function: Callable[..., dict[str, Any]],
    features: dict[str, Any],
    arguments: dict[str, Any],
) -> tuple[Dataset, TokenReport]:
    """The examples that `function` makes of records, and the report.

    The result is cached by `datasets` under the records, the arguments and this package's code.
    Every rank calls this; those that come later find the cache, those that come at the same time
    do the same work and reach the same result.

    Args:
        records: from `load_mixture`.
        function: from a record, `code` and `arguments` to the columns of `features`, `changed`
            (what was done to it, or "") and `left_out` (why it cannot be used, or "").
        features: columns of the result.
        arguments: of `function`.

    Raises:
        ValueError: there were records, and none could be used.
    """
    columns = Features({**features, "changed": Value("string"), "left_out": Value("string")})
    rows = records.map(
        _by_record,
        batched=True,
        features=columns,
        remove_columns=records.column_names,
        fn_kwargs={"function": function, "arguments": {**arguments, "code": code_digest()}},
        num_proc=num_workers(len(records)),
    )
    reasons: list[str] = rows["left_out"][:]
    kept = [i for i, reason in enumerate(reasons) if not reason]
    changes = Counter(rows.select(kept)["changed"][:])
    del changes[""]
    report = TokenReport(
        num_read=len(rows),
        num_kept=len(kept),
        changed=dict(changes.most_common()),
        left_out=dict(Counter(filter(None, reasons)).most_common()),
    )
    if reasons and not kept:
        raise ValueError(f"no record can be used ({report.summary()})")
    return rows.select(kept).remove_columns(["changed", "left_out"]), report


def _by_record(
    records: dict[str, list[Any]],
    function: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
) -> dict[str, list[Any]]:
    """What `function` makes of each record of a batch: batches cost `datasets` far less."""
    made = [
        function(dict(zip(records, values, strict=True)), **arguments)
        for values in zip(*records.values(), strict=True)
    ]
    return {name: [row[name] for row in made] for name in made[0]}


def tokenize_conversations(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_length: int
) -> tuple[Dataset, TokenReport]:
    """Columns `input_ids` and `mask` (1: the token is trained on), and what was cut or left out.

    A conversation over `max_length` loses whole exchanges from its end. One whose first exchange
    is already over is cut in the middle of the answer, so that it has no EOS: a cut never teaches
    to stop. What then has no token to train on is left out.

    Args:
        dataset: records of kind `sft`.
        tokenizer: from `load_tokenizer`.
        chat: the layout.
        max_length: tokens of an example.

    Raises:
        ValueError: no record can be used.
    """
    return tokenize(
        dataset,
        _conversation,
        {"input_ids": List(Value("int32")), "mask": List(Value("int8"))},
        {"tokenizer": tokenizer, "chat": chat, "max_length": max_length},
    )


def tokenize_text(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int | None = None
) -> tuple[Dataset, TokenReport]:
    """Column `input_ids`: BOS, the text, EOS, and how many more examples cutting gave.

    Args:
        dataset: records of kind `text`.
        tokenizer: from `load_tokenizer`.
        max_length: longer texts are cut into examples of at most this many tokens, and nothing is
            lost; only the first begins with BOS and only the last ends with EOS. None: no limit.
    """
    examples = dataset.map(
        _texts,
        batched=True,
        features=Features({"input_ids": List(Value("int32"))}),
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "code": code_digest()},
        num_proc=num_workers(len(dataset)),
    )
    extra = len(examples) - len(dataset)
    changed = {"more examples by cutting long texts": extra} if extra else {}
    return examples, TokenReport(len(dataset), len(dataset), changed, {})


def fit(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
) -> tuple[list[int], list[int], str]:
    """Ids and mask of a conversation within `max_length` tokens, and what was cut ("": nothing)."""
    rendered, changed = render(tokenizer, chat, messages), ""
    shortest = 3 if messages[0]["role"] == "system" else 2
    while len(rendered.ids) > max_length and len(messages) > shortest:
        messages = messages[:-2]
        rendered, changed = render(tokenizer, chat, messages), "lost whole exchanges at the end"
    ids, mask = rendered.ids, [int(trained) for trained in rendered.mask]
    if len(ids) > max_length:
        ids, mask, changed = ids[:max_length], mask[:max_length], "cut inside the answer"
    return ids, mask, changed


def nothing_within(max_length: int) -> str:
    """Why a conversation whose mask `fit` leaves empty is left out."""
    return f"no answer within {max_length} tokens"


def _conversation(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
    code: str,
) -> dict[str, Any]:
    """One example; `code` only names the cache entry."""
    ids, mask, changed = fit(record["messages"], tokenizer, chat, max_length)
    left_out = "" if any(mask) else nothing_within(max_length)
    return {"input_ids": ids, "mask": mask, "changed": changed, "left_out": left_out}


def _texts(
    records: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    code: str,
) -> dict[str, list[list[int]]]:
    """Examples of a batch of texts; `code` only names the cache entry."""
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pieces: list[list[int]] = []
    for text in records["text"]:
        ids = [*opening, *encode(tokenizer, text), tokenizer.eos_token_id]
        size = max_length or len(ids)
        pieces += [ids[i : i + size] for i in range(0, len(ids), size)]
    return {"input_ids": pieces}


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_length: int
) -> tuple[Dataset, TokenReport]:
    """Columns `answer_ids`, `ranks`, `ratings`, `prompt_length`, `where`, and what was left out.

    Every sequence is whole: prompt, answer and end of turn, the same `prompt_length` tokens first,
    the best answer first. An answer over `max_length` is left out, since a reward model must see
    how an answer ends; so is one that has the tokens of a better one. Where no two answers of
    different rank remain, the whole example is left out.

    Args:
        dataset: records of kind `preferences`.
        tokenizer: from `load_tokenizer`.
        chat: the layout.
        max_length: tokens of prompt and answer.

    Raises:
        ValueError: no example can be used.
    """
    return tokenize(
        dataset,
        _example,
        {
            "answer_ids": List(List(Value("int32"))),
            "ranks": List(Value("int32")),
            "ratings": List(Value("float32")),
            "prompt_length": Value("int32"),
            "where": Value("string"),
        },
        {"tokenizer": tokenizer, "chat": chat, "max_length": max_length},
    )


def _example(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_length: int,
    code: str,
) -> dict[str, Any]:
    """One example; `code` only names the cache entry."""
    prompt: list[Message] = record["prompt"]
    begin = render(tokenizer, chat, prompt, add_generation_prompt=True).ids
    kept: list[tuple[list[int], int, float]] = []
    too_long, repeated = False, False
    for answer, rank, rating in zip(
        record["answers"], record["ranks"], record["ratings"], strict=True
    ):
        ids = render(tokenizer, chat, [*prompt, {"role": "assistant", "content": answer}]).ids
        assert ids[: len(begin)] == begin, f"the answer changed its prompt's tokens: {prompt}"
        too_long = too_long or len(ids) > max_length
        again = any(ids == other for other, _, _ in kept)
        repeated = repeated or again
        if len(ids) <= max_length and not again:
            kept.append((ids, rank, rating))
    usable = len({rank for _, rank, _ in kept}) > 1
    problem = f"an answer is over {max_length} tokens" if too_long else ""
    if not problem and repeated:
        problem = "answers are the same tokens"
    return {
        "answer_ids": [ids for ids, _, _ in kept],
        "ranks": [rank for _, rank, _ in kept],
        "ratings": [rating for _, _, rating in kept],
        "prompt_length": len(begin),
        "where": record["where"],
        "changed": f"shortened: {problem}" if usable and problem else "",
        "left_out": "" if usable else problem,
    }


def tokenize_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, chat: ChatSection, max_prompt_length: int
) -> tuple[Dataset, TokenReport]:
    """Columns `input_ids` and `text` (the last user message), and what was left out.

    Args:
        dataset: records of kind `prompts`.
        tokenizer: from `load_tokenizer`.
        chat: the layout.
        max_prompt_length: tokens; a longer prompt is left out.

    Raises:
        ValueError: no prompt can be used.
    """
    return tokenize(
        dataset,
        _prompt,
        {"input_ids": List(Value("int32")), "text": Value("string")},
        {"tokenizer": tokenizer, "chat": chat, "max_prompt_length": max_prompt_length},
    )


def _prompt(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    max_prompt_length: int,
    code: str,
) -> dict[str, Any]:
    """One example; `code` only names the cache entry."""
    messages: list[Message] = record["messages"]
    ids = render(tokenizer, chat, messages, add_generation_prompt=True).ids
    left_out = f"over {max_prompt_length} tokens" if len(ids) > max_prompt_length else ""
    text = messages[-1]["content"]
    return {"input_ids": ids, "text": text, "changed": "", "left_out": left_out}
