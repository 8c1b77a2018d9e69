"""SFT: rows, loss, and invariance to the split of a batch."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from chatllama.config.model import BackboneSection
from chatllama.config.schema import Config, SftSection
from chatllama.model.roles import RoleModel, acting_as, adapter_state
from chatllama.runs.folder import RunFolder
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.tokenizer import load_tokenizer
from trainers.sft.data import IGNORED, RowCollator, arrange_rows
from trainers.sft.instruction_trainer import InstructionTrainer, end_in_loss
from trainers.sft.model import build_policy
from trainers.sft.train import sft_arguments

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path) -> LlamaForCausalLM:
    transformers_logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval()


@pytest.fixture
def loss_llama(tiny_llama_dir: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval()
    end_in_loss(model, use_bfloat16=False)
    return model


def documents(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        length = 6 + number % 9
        ids = [1, *torch.randint(3, 300, (length,), generator=generator).tolist(), 2]
        rows.append({"input_ids": ids, "mask": [0] * 3 + [1] * (len(ids) - 3)})
    return Dataset.from_list(rows)


# --- rows


def test_collator_by_hand():
    batch = RowCollator(pad_id=9)(
        [
            {"input_ids": [1, 5, 1, 6, 2], "labels": [-100, 5, -100, 6, 2], "seq_lengths": [2, 3]},
            {"input_ids": [1, 7], "labels": [-100, 7], "seq_lengths": [2]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 5, 1, 6, 2], [1, 7, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 5, -100, 6, 2], [-100, 7, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_first_token_of_every_packed_document_does_not_train():
    train = Dataset.from_list([{"input_ids": [1, 5, 2], "mask": [1, 1, 1]}] * 4)
    section = SftSection(steps=1, batch_size=1, microbatch_size=1)
    rows = arrange_rows(train, None, section, max_length=6, packing=True, seed=0)
    assert rows.num_rows == 2
    assert rows.train[0]["labels"] == [IGNORED, 5, 2, IGNORED, 5, 2]


def test_without_a_mask_everything_trains():
    train = Dataset.from_list([{"input_ids": [1, 0, 5, 2]}])
    section = SftSection(steps=1, batch_size=1, microbatch_size=1)
    rows = arrange_rows(train, None, section, max_length=6, packing=False, seed=0)
    assert rows.train[0]["labels"] == [IGNORED, 0, 5, 2]


def test_every_pass_holds_each_row_once_and_the_seed_decides_the_order():
    train = Dataset.from_list([{"input_ids": [1, n], "mask": [0, 1]} for n in range(6)])
    section = SftSection(steps=4, batch_size=3, microbatch_size=3)

    def order(seed: int) -> list[int]:
        rows = arrange_rows(train, None, section, max_length=2, packing=False, seed=seed)
        return [ids[1] for ids in rows.train["input_ids"]]

    assert sorted(order(0)[:6]) == sorted(order(0)[6:]) == [0, 1, 2, 3, 4, 5]
    assert order(0)[:6] != order(0)[6:]
    assert order(0) == order(0) != order(1)


def test_unpacked_rows_of_a_step_are_sorted_by_length():
    sizes = [5, 1, 4, 2, 3, 6]
    train = Dataset.from_list([{"input_ids": [7] * n, "mask": [1] * n} for n in sizes])
    section = SftSection(steps=3, batch_size=4, microbatch_size=2)
    rows = arrange_rows(train, train, section, max_length=8, packing=False, seed=0)
    lengths = [len(ids) for ids in rows.train["input_ids"]]
    steps = [lengths[:4], lengths[4:8], lengths[8:]]
    assert all(step == sorted(step) for step in steps)
    assert sorted(lengths) == sorted(sizes * 2)  # two passes
    positions = sum(2 * longest for longest in lengths[1::2])
    assert rows.facts == {"fill_rate": pytest.approx(42 / positions)}
    assert rows.held_out is not None
    assert [len(ids) for ids in rows.held_out["input_ids"]] == [1, 2, 3, 4, 5, 6]


def test_fill_rate_of_packed_rows():
    train = Dataset.from_list([{"input_ids": [1] * n} for n in (6, 4, 3)])
    section = SftSection(epochs=1.0, batch_size=2, microbatch_size=2)
    rows = arrange_rows(train, None, section, max_length=8, packing=True, seed=0)
    # 6 alone and 4 + 3 together: 13 tokens in two rows of 7
    assert rows.num_rows == 2 and rows.facts == {"fill_rate": pytest.approx(13 / 14)}


# --- loss


def test_loss_is_the_cross_entropy_of_the_labels(
    loss_llama: LlamaForCausalLM, llama: LlamaForCausalLM
):
    row = {"input_ids": [1, 20, 30, 40, 2], "labels": [IGNORED, IGNORED, 30, IGNORED, 2]}
    losses = loss_llama(**RowCollator(0)([row]), as_loss=True)
    with torch.no_grad():
        logprobs = llama(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    # token 2 (id 30) is predicted at position 1, token 4 (id 2) at position 3
    torch.testing.assert_close(losses.loss_sum, -(logprobs[1, 30] + logprobs[3, 2]))


def test_packed_documents_do_not_see_each_other(loss_llama: LlamaForCausalLM):
    ids = list(documents(3)["input_ids"])
    labels = [[IGNORED, *i[1:]] for i in ids]
    alone = [
        loss_llama(**RowCollator(0)([{"input_ids": i, "labels": w}]), as_loss=True).loss_sum
        for i, w in zip(ids, labels, strict=True)
    ]
    apart = torch.stack(alone).sum()
    packed = {
        "input_ids": [token for each in ids for token in each],
        "labels": [label for each in labels for label in each],
        "seq_lengths": [len(i) for i in ids],
    }
    short = {"input_ids": [1, 7], "labels": [IGNORED, IGNORED], "seq_lengths": [2]}
    together = loss_llama(**RowCollator(0)([short, packed]), as_loss=True).loss_sum
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)
    joined = {k: v for k, v in packed.items() if k != "seq_lengths"}
    one_document = loss_llama(**RowCollator(0)([joined]), as_loss=True).loss_sum
    assert not torch.isclose(one_document, apart, atol=1e-3)


def test_padding_changes_nothing(loss_llama: LlamaForCausalLM):
    short = {"input_ids": [1, 20, 2], "labels": [IGNORED, 20, 2]}
    long = {"input_ids": [1, *range(50, 60)], "labels": [IGNORED] * 11}
    alone = loss_llama(**RowCollator(0)([short]), as_loss=True).loss_sum
    for pad in (0, 77):
        beside = loss_llama(**RowCollator(pad)([short, long]), as_loss=True).loss_sum
        torch.testing.assert_close(beside, alone)


def test_the_head_is_called_once_whatever_the_batch_holds(loss_llama: LlamaForCausalLM):
    # ZeRO-3 gathers the head's weight at every call, on all ranks together.
    calls = []
    loss_llama.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for trained in (0, 1, 5):
        row = {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [IGNORED] * (6 - trained) + [3] * trained}
        assert torch.isfinite(loss_llama(**RowCollator(0)([row]), as_loss=True).loss_sum)
        assert calls == [1]
        calls.clear()


# --- trainer


def sft_config(
    tiny_llama_dir: Path, folder: Path, microbatch_size: int, **changes: object
) -> Config:
    section = SftSection(
        steps=3,
        batch_size=8,
        microbatch_size=microbatch_size,
        max_length=32,
        learning_rate=1e-2,
    )
    return Config(
        run_dir=str(folder),
        backbone=BackboneSection(path=str(tiny_llama_dir), dtype="float32"),
        sft=section,
    ).model_copy(update=changes)


def make_trainer(cfg: Config) -> tuple[InstructionTrainer, RoleModel]:
    quiet_libraries()
    run = RunFolder(Path(cfg.run_dir))
    data = documents()
    rows = arrange_rows(
        data.select(range(20)),
        data.select(range(20, 24)),
        cfg.sft,
        max_length=32,
        packing=True,
        seed=0,
    )
    model = build_policy(cfg, run)
    assert isinstance(model, RoleModel)
    trainer = InstructionTrainer(
        model.peft_model,  # type: ignore[arg-type]
        sft_arguments(cfg, cfg.sft, run, rows),
        cfg.sft,
        rows,
        load_tokenizer(str(cfg.backbone.path)),
        use_bfloat16=False,
        callbacks=[],
    )
    return trainer, model


def test_microbatches_change_neither_losses_nor_weights(tiny_llama_dir: Path, tmp_path: Path):
    results = []
    for size in (8, 4, 1):
        trainer, model = make_trainer(sft_config(tiny_llama_dir, tmp_path / str(size), size))
        with acting_as(model, "policy"):
            numbers = trainer.run(None)
        logs = [line for line in trainer.state.log_history if "loss" in line]
        curves = [[line[key] for line in logs] for key in ("loss", "accuracy", "grad_norm")]
        results.append((curves, numbers, adapter_state(model, "policy")))
    for curves, numbers, state in results[1:]:
        assert torch.tensor(curves).allclose(torch.tensor(results[0][0]), rtol=1e-4)
        assert numbers == pytest.approx(results[0][1], rel=1e-4)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, results[0][2][name], rtol=1e-3, atol=1e-5)


def test_norms_and_biases_do_not_decay(tiny_llama_dir: Path, tmp_path: Path):
    cfg = sft_config(tiny_llama_dir, tmp_path, 8, lora=None)
    model = build_policy(cfg, RunFolder(tmp_path))
    assert isinstance(model, LlamaForCausalLM)
    trainer, _ = make_trainer(sft_config(tiny_llama_dir, tmp_path, 8))
    optimizer = trainer.create_optimizer(model)
    names = {id(p): n for n, p in model.named_parameters()}
    free = [
        names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]
    ]
    assert sorted(free) == sorted(n for n, p in model.named_parameters() if p.ndim == 1)
    assert len(free) == 5  # two per layer and the last


def test_no_telemetry_is_sent(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub.constants
    import huggingface_hub.utils._telemetry as telemetry

    def send(*args: object, **kwargs: object) -> None:
        raise AssertionError("telemetry was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(telemetry, "Thread", send)
    make_trainer(sft_config(tiny_llama_dir, tmp_path, 8))
