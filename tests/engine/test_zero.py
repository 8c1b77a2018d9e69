"""ZeRO's settings, what the config refuses, and when a split model may be whole."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from chatllama.config.schema import DeepSpeedSection
from trainers.engine import zero
from trainers.engine.zero import absent_bytes, whole_model_fits, zero_settings


def settings_of(**section: Any) -> dict[str, Any]:
    return zero_settings(DeepSpeedSection(**section), accumulation_steps=3, max_grad_norm=0.5)


def test_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = settings_of(stage=3, offload_optimizer="cpu", stage3_param_persistence_threshold=7)
    assert settings["train_batch_size"] == 3 * 4
    assert settings["train_micro_batch_size_per_gpu"] == 1
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5  # DeepSpeed's own default would be 1.0
    split = settings["zero_optimization"]
    assert split["stage"] == 3 and split["stage3_param_persistence_threshold"] == 7
    assert split["offload_optimizer"]["device"] == "cpu" and "offload_param" not in split
    assert settings_of(stage=1)["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 50_000_000,
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_trained", "bucket"), [(35_000, 35_000), (50_000_000, 50_000_000), (7 * 10**9, 50_000_000)]
)
def test_buckets_are_no_larger_than_what_is_trained(stage: int, num_trained: int, bucket: int):
    settings = zero_settings(
        DeepSpeedSection(stage=stage),
        accumulation_steps=1,
        max_grad_norm=1.0,
        num_trained=num_trained,
    )
    assert settings["zero_optimization"]["reduce_bucket_size"] == bucket


def test_nvme_settings_are_passed_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zero, "device", lambda: torch.device("cuda", 0))
    split = settings_of(stage=3, offload_optimizer="nvme", offload_param="cpu", nvme_path="/disk")[
        "zero_optimization"
    ]
    assert split["offload_optimizer"]["device"] == "nvme"
    assert split["offload_optimizer"]["nvme_path"] == "/disk"
    assert split["offload_optimizer"]["pin_memory"] is True
    assert split["offload_param"]["device"] == "cpu" and "nvme_path" not in split["offload_param"]
    both = settings_of(stage=3, offload_param="nvme", nvme_path="/disk")["zero_optimization"]
    assert both["offload_param"]["device"] == "nvme"
    assert both["offload_param"]["nvme_path"] == "/disk" and "offload_optimizer" not in both


def test_an_optimizer_on_nvme_is_refused_without_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zero, "device", lambda: torch.device("cpu"))
    with pytest.raises(ValueError, match="offload_optimizer nvme works with GPUs only"):
        settings_of(stage=3, offload_optimizer="nvme", nvme_path="/disk")
    settings_of(stage=3, offload_optimizer="cpu", offload_param="nvme", nvme_path="/disk")


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (
            {"stage": 2, "offload_param": "cpu"},
            "offload_param needs stage 3, not 2: it is what shards",
        ),
        ({"stage": 0, "offload_optimizer": "cpu"}, "stage 1, 2 or 3, not 0, which is plain data"),
        (
            {"stage": 2, "offload_optimizer": "nvme", "nvme_path": "/disk"},
            "nvme needs stage 3, not 2, where DeepSpeed would use the CPU's memory",
        ),
        ({"stage": 3, "offload_optimizer": "nvme"}, "nvme_path and offloading to nvme go together"),
        ({"stage": 3, "nvme_path": "/disk"}, "nvme_path and offloading to nvme go together"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(section: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        DeepSpeedSection(**section)


def split_model(present: int, absent: int, dtype: torch.dtype) -> nn.Module:
    """A linear layer of which ZeRO-3 left `present` elements here and split `absent` others."""
    model = nn.Linear(present, 1, bias=False, dtype=dtype)
    cast(Any, model.weight).ds_numel = present
    rest = nn.Parameter(torch.empty(0, dtype=dtype))
    cast(Any, rest).ds_numel = absent
    model.register_parameter("rest", rest)
    return model


def test_only_absent_parameters_take_memory():
    assert absent_bytes(split_model(10, 1000, torch.bfloat16)) == 2000
    assert absent_bytes(split_model(10, 1000, torch.float32)) == 4000
    assert absent_bytes(nn.Linear(10, 10)) == 0


@pytest.mark.parametrize(("free", "fits"), [(2500, True), (2499, False), (0, False)])
def test_a_model_may_take_four_fifths_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free: int, fits: bool
):
    monkeypatch.setattr(zero, "free_memory", lambda: free)
    assert whole_model_fits(split_model(1, 1000, torch.bfloat16)) is fits
    assert ("layer by layer for every token" in capsys.readouterr().out) is not fits


def test_the_fullest_rank_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zero, "free_memory", lambda: 10_000)
    fuller = torch.tensor([2.0, -1000.0], dtype=torch.float64)  # of a rank with 1000 bytes
    monkeypatch.setattr(zero, "all_max", lambda values: torch.maximum(values, fuller))
    assert not whole_model_fits(split_model(1, 1000, torch.bfloat16))


def test_free_memory_of_a_cpu_is_shared(monkeypatch: pytest.MonkeyPatch):
    import psutil

    from chatllama.runtime import distributed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert distributed.free_memory() == 300
