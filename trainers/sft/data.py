"""The rows of SFT and of training from text: packed or bucketed, with labels, in training order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset  # pyright: ignore[reportPrivateImportUsage]

from chatllama.config.batch_sizes import optimizer_steps
from chatllama.config.schema import Config
from chatllama.config.stages import SftSection
from chatllama.runtime import distributed
from chatllama.text.padding import pad_right
from data.batches import bucket_by_length, fill_rate, passes
from data.mixture import load_examples
from trainers.stages.forecast import announce

IGNORED = -100
"""Label of a token that does not train."""


@dataclass(frozen=True)
class Rows:
    """The rows of a training run, in the order in which they train."""

    train: Dataset
    """input_ids, labels and, when packed, seq_lengths; steps x batch_size rows."""
    held_out: Dataset | None
    """The same columns; None: nothing is held out."""
    steps: int
    """Optimizer steps."""
    num_rows: int
    """Rows of one pass, before repetition."""
    facts: dict[str, float]
    """`fill_rate` (share of computed positions that hold tokens) and what was shortened or left
    out, for the stage's result."""


def load_rows(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> Rows:
    """The stage's conversations as packed rows in training order; prints how many and how full.

    Raises:
        ValueError: a source cannot be read, or there is nothing to train on.
    """
    section = cfg.sft
    examples = load_examples(section, "sft", section.max_length, cfg, tokenizer)
    rows = arrange_rows(examples.train, examples.held_out, section, cfg.seed)
    if distributed.rank() == 0:
        print(
            f"{rows.num_rows} rows of at most {section.max_length} tokens, "
            f"{rows.facts['fill_rate']:.1%} filled"
        )
    announce(
        cfg,
        "sft",
        **examples.reports[0].lengths("sft.max_length"),
        examples=rows.num_rows,
        steps=rows.steps,
        tokens=float(row_lengths(rows.train).sum()),
    )
    return replace(rows, facts=rows.facts | examples.reports[0].facts)


def arrange_rows(train: Dataset, held_out: Dataset | None, section: SftSection, seed: int) -> Rows:
    """Rows in training order: packed, or with each step's rows sorted by length.

    Args:
        train: `input_ids` and `mask` (1 = trains; no such column: all), one document a row.
        section: gives steps, batch sizes, packing and `max_length`, which no document exceeds.

    Raises:
        ValueError: there is nothing to train on.
    """
    documents = _with_labels(train).shuffle(seed=seed)
    rows = pack_dataset(documents, section.max_length) if section.packing else documents
    steps = optimizer_steps(section, len(rows))
    evaluation = _with_labels(held_out) if held_out is not None and len(held_out) else None
    if evaluation is not None and section.packing:
        evaluation = cast(Dataset, pack_dataset(evaluation, section.max_length))
    elif evaluation is not None:
        places = bucket_by_length(row_lengths(evaluation).tolist(), len(evaluation))
        evaluation = evaluation.select(places)
    order = passes(len(rows), steps * section.batch_size, seed)
    lengths = row_lengths(cast(Dataset, rows)).tolist()
    if not section.packing:
        places = bucket_by_length([lengths[i] for i in order], section.batch_size)
        order = [order[place] for place in places]
    facts = {"fill_rate": fill_rate([lengths[i] for i in order], section.microbatch_size)}
    return Rows(cast(Dataset, rows).select(order), evaluation, steps, len(rows), facts)


def _with_labels(documents: Dataset) -> Dataset:
    """Labels from masks. A document's first token follows nothing, so nothing predicts it."""

    def label(batch: dict[str, list]) -> dict[str, list]:
        masks = batch["mask"] if "mask" in batch else [[1] * len(i) for i in batch["input_ids"]]
        return {
            "labels": [
                [IGNORED] + [t if m else IGNORED for t, m in zip(ids[1:], mask[1:], strict=True)]
                for ids, mask in zip(batch["input_ids"], masks, strict=True)
            ]
        }

    kept = [name for name in documents.column_names if name in ("input_ids", "mask")]
    columns = documents.select_columns(kept)
    return columns.map(label, batched=True, remove_columns=kept[1:])


@dataclass(frozen=True)
class RowCollator:
    """Rows of documents as (B, L) tensors; positions restart with every document.

    transformers keeps documents apart where positions restart. Padding continues the last
    document, which under causal attention nothing sees, so rows of one document need no mask at
    all. Cheaper than one long row (TRL's padding-free) wherever attention is dense.
    """

    pad_id: int
    flat: bool = False
    """Lay all rows end to end as a single one, without padding."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, labels, position_ids: (B, L) int64."""
        documents = [list(row.get("seq_lengths") or [len(row["input_ids"])]) for row in rows]
        ids, targets = ([row[key] for row in rows] for key in ("input_ids", "labels"))
        if self.flat:
            documents, ids, targets = ([[*chain(*each)]] for each in (documents, ids, targets))
        input_ids, _ = pad_right(ids, self.pad_id)
        labels, _ = pad_right(targets, IGNORED)
        position_ids = torch.empty_like(input_ids)
        for number, lengths in enumerate(documents):
            lengths[-1] += input_ids.shape[1] - sum(lengths)
            position_ids[number] = torch.cat([torch.arange(n) for n in lengths])
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def num_trained(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of a batch that train."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def row_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row, read without making Python lists of them."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    columns = [cast(pa.Table, batch)["input_ids"] for batch in batches]
    lengths = [pc.call_function("list_value_length", [column]).to_numpy() for column in columns]
    return np.concatenate(lengths)
