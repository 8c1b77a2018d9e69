"""Text for the ptx loss: what it is read from, which tokens count, which rows belong to a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppo_runs import PAD, make_base, ppo_config, tokenizer_of

from chatllama.text.chat_format import render
from trainers.ppo.data import PtxLoader, load_ptx

PAIRS = [("Where is Anna?", "by the river."), ("Who paints?", "Victor."), ("And then?", "quiet.")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> str:
    return make_base(tmp_path_factory.mktemp("text") / "base", tiny_tokenizer_dir)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    records = [{"instruction": q, "input": "", "output": a} for q, a in PAIRS]
    (tmp_path / "sft.json").write_text(json.dumps(records))
    (tmp_path / "plain.txt").write_text("the river\n\na quiet garden")
    return tmp_path


def stream(base: str, *sources: dict[str, Any], **ppo: Any) -> PtxLoader:
    cfg = ppo_config(base, "r", ppo={"ptx_coef": 1.0, "ptx_data": list(sources), **ppo})
    loaded = load_ptx(cfg, tokenizer_of(base), PAD)
    assert loaded is not None
    return loaded


def test_of_conversations_only_the_answers_count(base: str, files: Path):
    cfg, tokenizer = ppo_config(base, "r"), tokenizer_of(base)
    rows = stream(base, {"path": str(files / "sft.json")}).rows
    columns = zip(rows["input_ids"][:], rows["mask"][:], strict=True)
    found = {(tuple(ids), tuple(mask)) for ids, mask in columns}
    expected = set()
    for question, answer in PAIRS:
        turns: Any = [{"role": "user", "content": question}]
        prompt = render(tokenizer, cfg.chat, turns, add_generation_prompt=True).ids
        whole = render(tokenizer, cfg.chat, [*turns, {"role": "assistant", "content": answer}])
        mask = [0] * len(prompt) + [1] * (len(whole.ids) - len(prompt))
        expected.add((tuple(whole.ids), tuple(mask)))
    assert found == expected


def test_of_plain_text_everything_counts(base: str, files: Path):
    tokenizer = tokenizer_of(base)
    rows = stream(base, {"path": str(files / "plain.txt"), "format": "text"}).rows
    expected = [
        [1, *tokenizer.encode(text, add_special_tokens=False), 2]
        for text in ("the river", "a quiet garden")
    ]
    assert sorted(rows["input_ids"][:]) == sorted(expected)
    assert rows["mask"][:] == [[1] * len(ids) for ids in rows["input_ids"][:]]


def test_long_text_is_cut_and_what_predicts_nothing_left_out(base: str, files: Path):
    whole = stream(base, {"path": str(files / "plain.txt"), "format": "text"}).rows
    longest = max(whole["input_ids"][:], key=len)
    # one token over: the last piece would be the EOS alone, with nothing before it
    cut = stream(
        base, {"path": str(files / "plain.txt"), "format": "text"}, ptx_max_length=len(longest) - 1
    ).rows
    assert longest[:-1] in cut["input_ids"][:]
    assert min(len(row) for row in cut["input_ids"]) >= 2


def test_text_and_conversations_do_not_mix(base: str, files: Path):
    with pytest.raises(ValueError, match=r"ppo\.ptx_data: either all sources have format text"):
        stream(
            base,
            {"path": str(files / "plain.txt"), "format": "text"},
            {"path": str(files / "sft.json")},
        )


def test_without_ptx_data_there_is_none(base: str):
    assert load_ptx(ppo_config(base, "r"), tokenizer_of(base), PAD) is None


def test_microbatches_of_a_step_by_hand():
    rows = Dataset.from_list(
        [
            {"input_ids": [1, 5, 6, 2], "mask": [1, 1, 0, 1]},
            {"input_ids": [1, 7], "mask": [0, 1]},
            {"input_ids": [1, 8, 9], "mask": [0, 0, 1]},
        ]
    )
    loader = PtxLoader(rows, per_microbatch=2, pad_id=0, seed=3)
    # 6 rows: every row twice; predictions 2 + 1 + 1 (a first token is never predicted), twice
    assert sorted(len(row["input_ids"]) for row in loader.step_rows(4, 3)) == [2, 2, 3, 3, 4, 4]
    found = loader.microbatches(4, num_microbatches=3)
    assert [each.num_tokens for each in found] == [8, 8, 8]
    # as many tokens in each: 4 + 2, 4 + 2, 3 + 3
    assert [each.mask.sum(1).tolist() for each in found] == [[4, 2], [4, 2], [3, 3]]
    trains = {tuple(row["input_ids"]): row["mask"] for row in rows.to_list()}
    for each in found:
        for ids, mask, trained in zip(each.tokens, each.mask, each.loss_mask, strict=True):
            assert trained[mask].int().tolist() == trains[tuple(ids[mask].tolist())]
            assert not trained[~mask].any()
    assert found[0].loss_mask.dtype == torch.bool


def test_every_text_comes_up_before_any_comes_again():
    rows = Dataset.from_list([{"input_ids": [1, n], "mask": [0, 1]} for n in range(12)])

    def order(seed: int) -> list[int]:
        each = PtxLoader(rows, per_microbatch=2, pad_id=0, seed=seed)
        return [row["input_ids"][1] for n in range(4) for row in each.step_rows(n, 2)]

    assert sorted(order(0)[:12]) == list(range(12)) and len(order(0)) == 16
    assert order(0) == order(0) != order(1)
