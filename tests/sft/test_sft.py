"""SFT: rows, loss, and invariance to the split of a batch."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from chatllama.config.model import BackboneSection, LoraSection
from chatllama.config.schema import Config, TrackingSection
from chatllama.config.stages import SftSection
from chatllama.model.roles import RoleModel, adapter_state
from chatllama.runs.checkpoints import layout_of, save_step
from chatllama.runs.folder import RunFolder
from chatllama.runtime.jsonl import read_lines
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.tokenizer import load_tokenizer
from trainers.sft.data import IGNORED, RowCollator, arrange_rows
from trainers.sft.model import build_engine, build_policy, token_losses
from trainers.sft.train import train_sft

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path) -> LlamaForCausalLM:
    transformers_logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval()


@pytest.fixture
def model(tiny_llama_dir: Path) -> RoleModel:
    return RoleModel(LlamaForCausalLM.from_pretrained(tiny_llama_dir), {}).eval()


def loss_sum(model: RoleModel, rows: list[dict], pad_id: int = 0, flat: bool = False):
    return token_losses(model, RowCollator(pad_id, flat)(rows), use_bfloat16=False).loss_sum


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


def test_rows_laid_end_to_end_by_hand():
    rows = [
        {"input_ids": [1, 5, 1, 6, 2], "labels": [-100, 5, -100, 6, 2], "seq_lengths": [2, 3]},
        {"input_ids": [1, 7], "labels": [-100, 7]},
    ]
    batch = RowCollator(pad_id=9, flat=True)(rows)
    assert batch["input_ids"].tolist() == [[1, 5, 1, 6, 2, 1, 7]]
    assert batch["labels"].tolist() == [[-100, 5, -100, 6, 2, -100, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]


def test_first_token_of_every_packed_document_does_not_train():
    train = Dataset.from_list([{"input_ids": [1, 5, 2], "mask": [1, 1, 1]}] * 4)
    section = SftSection(steps=1, batch_size=1, microbatch_size=1, max_length=6, packing=True)
    rows = arrange_rows(train, None, section, seed=0)
    assert rows.num_rows == 2
    assert rows.train[0]["labels"] == [IGNORED, 5, 2, IGNORED, 5, 2]


def test_without_a_mask_everything_trains():
    train = Dataset.from_list([{"input_ids": [1, 0, 5, 2]}])
    section = SftSection(steps=1, batch_size=1, microbatch_size=1, max_length=6, packing=False)
    rows = arrange_rows(train, None, section, seed=0)
    assert rows.train[0]["labels"] == [IGNORED, 0, 5, 2]


def test_every_pass_holds_each_row_once_and_the_seed_decides_the_order():
    train = Dataset.from_list([{"input_ids": [1, n], "mask": [0, 1]} for n in range(6)])
    section = SftSection(steps=4, batch_size=3, microbatch_size=3, max_length=2, packing=False)

    def order(seed: int) -> list[int]:
        rows = arrange_rows(train, None, section, seed=seed)
        return [ids[1] for ids in rows.train["input_ids"]]

    assert sorted(order(0)[:6]) == sorted(order(0)[6:]) == [0, 1, 2, 3, 4, 5]
    assert order(0)[:6] != order(0)[6:]
    assert order(0) == order(0) != order(1)


def test_unpacked_rows_of_a_step_are_sorted_by_length():
    sizes = [5, 1, 4, 2, 3, 6]
    train = Dataset.from_list([{"input_ids": [7] * n, "mask": [1] * n} for n in sizes])
    section = SftSection(steps=3, batch_size=4, microbatch_size=2, max_length=8, packing=False)
    rows = arrange_rows(train, train, section, seed=0)
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
    section = SftSection(epochs=1.0, batch_size=2, microbatch_size=2, max_length=8, packing=True)
    rows = arrange_rows(train, None, section, seed=0)
    # 6 alone and 4 + 3 together: 13 tokens in two rows of 7
    assert rows.num_rows == 2 and rows.facts == {"fill_rate": pytest.approx(13 / 14)}


# --- loss


def test_loss_is_the_cross_entropy_of_the_labels(model: RoleModel, llama: LlamaForCausalLM):
    row = {"input_ids": [1, 20, 30, 40, 2], "labels": [IGNORED, IGNORED, 30, IGNORED, 2]}
    losses = loss_sum(model, [row])
    with torch.no_grad():
        logprobs = llama(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    # token 2 (id 30) is predicted at position 1, token 4 (id 2) at position 3
    torch.testing.assert_close(losses, -(logprobs[1, 30] + logprobs[3, 2]))


def test_packed_documents_do_not_see_each_other(model: RoleModel):
    ids = list(documents(3)["input_ids"])
    labels = [[IGNORED, *i[1:]] for i in ids]
    alone = [
        loss_sum(model, [{"input_ids": i, "labels": w}]) for i, w in zip(ids, labels, strict=True)
    ]
    apart = torch.stack(alone).sum()
    packed = {
        "input_ids": [token for each in ids for token in each],
        "labels": [label for each in labels for label in each],
        "seq_lengths": [len(i) for i in ids],
    }
    short = {"input_ids": [1, 7], "labels": [IGNORED, IGNORED], "seq_lengths": [2]}
    together = loss_sum(model, [short, packed])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)
    joined = {k: v for k, v in packed.items() if k != "seq_lengths"}
    one_document = loss_sum(model, [joined])
    assert not torch.isclose(one_document, apart, atol=1e-3)
    end_to_end = loss_sum(model, [short, packed], flat=True)
    torch.testing.assert_close(end_to_end, apart, rtol=1e-5, atol=0)


def test_padding_changes_nothing(model: RoleModel):
    short = {"input_ids": [1, 20, 2], "labels": [IGNORED, 20, 2]}
    long = {"input_ids": [1, *range(50, 60)], "labels": [IGNORED] * 11}
    alone = loss_sum(model, [short])
    for pad in (0, 77):
        beside = loss_sum(model, [short, long], pad)
        torch.testing.assert_close(beside, alone)


def test_the_head_is_called_once_whatever_the_batch_holds(model: RoleModel):
    # ZeRO-3 gathers the head's weight at every call, on all ranks together.
    calls = []
    model.llama.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for trained in (0, 1, 5):
        row = {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [IGNORED] * (6 - trained) + [3] * trained}
        assert torch.isfinite(loss_sum(model, [row]))
        assert calls == [1]
        calls.clear()


# --- trainer


def sft_config(
    tiny_llama_dir: Path, folder: Path, microbatch_size: int, **changes: object
) -> Config:
    section = SftSection(
        steps=3, batch_size=8, microbatch_size=microbatch_size, max_length=32, learning_rate=1e-2
    )
    return Config(
        run_dir=str(folder),
        backbone=BackboneSection(path=str(tiny_llama_dir), dtype="float32"),
        sft=section,
    ).model_copy(update=changes)


def train(cfg: Config) -> tuple[RoleModel, dict[str, float], list[dict[str, float]]]:
    """The trained model, the closing numbers, and the lines of metrics."""
    quiet_libraries()
    run = RunFolder(Path(cfg.run_dir))
    train, held_out = documents().select(range(20)), documents().select(range(20, 24))
    rows = arrange_rows(train, held_out, cfg.sft, seed=0)
    model = build_policy(cfg, run)
    engine = build_engine(cfg, model)
    tokenizer = load_tokenizer(str(cfg.backbone.path))
    numbers = train_sft(cfg, run, rows, engine, tokenizer, resume=False)
    return model, numbers, read_lines(run.metrics("sft"))


@pytest.mark.slow
def test_microbatches_change_neither_losses_nor_weights(tiny_llama_dir: Path, tmp_path: Path):
    results = []
    for size in (8, 4, 1):
        model, numbers, lines = train(sft_config(tiny_llama_dir, tmp_path / str(size), size))
        curves = [
            [line[f"sft/{key}"] for line in lines if f"sft/{key}" in line]
            for key in ("loss", "accuracy", "grad_norm", "lr", "tokens")
        ]
        del numbers["fill_rate"]  # of padding, which depends on the microbatches
        results.append((curves, numbers, adapter_state(model, "policy")))
    assert all(len(curve) == 3 for curve in results[0][0])
    assert results[0][1].keys() >= {"loss", "steps", "tokens", "eval_loss", "eval_accuracy"}
    for curves, numbers, state in results[1:]:
        assert torch.tensor(curves).allclose(torch.tensor(results[0][0]), rtol=1e-4)
        assert numbers == pytest.approx(results[0][1], rel=1e-4)
        for name, tensor in state.items():
            # A hundredth of a step: Adam divides by the gradient's size, its rounding included.
            torch.testing.assert_close(tensor, results[0][2][name], rtol=1e-3, atol=1e-4)


def test_the_log_of_a_step_is_its_own(tiny_llama_dir: Path, tmp_path: Path):
    cfg = sft_config(tiny_llama_dir, tmp_path, 8, tracking=TrackingSection(log_every=2))
    _, numbers, lines = train(cfg)
    assert [line["step"] for line in lines if "sft/loss" in line] == [2, 3]
    assert [line["step"] for line in lines if "sft/eval_loss" in line] == [3]
    assert numbers["loss"] == lines[1]["sft/loss"]


def test_norms_and_biases_do_not_decay(tiny_llama_dir: Path, tmp_path: Path):
    cfg = sft_config(tiny_llama_dir, tmp_path, 8, lora=None)
    model = build_policy(cfg, RunFolder(tmp_path))
    engine = build_engine(cfg, model)
    names = {id(p): n for n, p in model.named_parameters()}
    free = [
        names[id(p)]
        for group in engine.optimizer.param_groups
        if group["weight_decay"] == 0
        for p in group["params"]
    ]
    assert sorted(free) == sorted(n for n, p in model.named_parameters() if p.ndim == 1)
    assert len(free) == 5  # two per layer and the last
    decaying = [g for g in engine.optimizer.param_groups if g["weight_decay"]]
    assert [g["weight_decay"] for g in decaying] == [cfg.sft.weight_decay]


@pytest.mark.parametrize("lora", [LoraSection(r=2), None])
def test_what_trains_is_float32_whatever_the_type_of_the_backbone(
    tiny_llama_dir: Path, tmp_path: Path, lora: LoraSection | None
):
    cfg = sft_config(tiny_llama_dir, tmp_path, 8, lora=lora)
    backbone = BackboneSection(path=str(tiny_llama_dir), dtype="bfloat16")
    cfg = cfg.model_copy(update={"backbone": backbone})
    model, numbers, _ = train(cfg)
    types = {(p.requires_grad, p.dtype) for p in model.parameters()}
    frozen = {(False, torch.bfloat16)} if lora else set()
    assert types == {(True, torch.float32)} | frozen and numbers["loss"] > 0
    halved = build_policy(cfg, RunFolder(tmp_path))
    for parameter in halved.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(AssertionError):
        build_engine(cfg, halved)


@pytest.mark.parametrize("lora", [LoraSection(), None])
def test_a_checkpoint_of_an_older_version_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, lora: LoraSection | None
):
    from safetensors.torch import save_file

    cfg = sft_config(tiny_llama_dir, tmp_path, 8, lora=lora)
    run = RunFolder(tmp_path)

    def write(folder: Path) -> None:
        save_file({"step": torch.ones(1)}, folder / "trained-0.safetensors")
        (folder / "trainer_state.json").write_text("{}")

    save_step(run, "sft", 1, 1, layout_of(cfg.deepspeed, 8), write)
    rows = arrange_rows(documents(), None, cfg.sft, seed=0)
    engine = build_engine(cfg, build_policy(cfg, run))
    tokenizer = load_tokenizer(str(cfg.backbone.path))
    folder = run.checkpoints("sft")
    message = rf"{folder}/step-1 was written by an older version .* afresh, remove {folder}$"
    with pytest.raises(ValueError, match=message):
        train_sft(cfg, run, rows, engine, tokenizer, resume=True)
