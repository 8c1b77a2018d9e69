"""The counter that stands in for a GPU counts what a hand counts."""

import pytest
import torch
from kernel_counts import KernelCounts, llama_7b, made_fake
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional


def test_kernels_are_counted_and_views_and_memory_are_not():
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), KernelCounts() as counts:
        weight = torch.empty(6, 4)
        x = torch.empty(2, 3, 4)[:, 1:].transpose(0, 1)
        functional.linear(x.reshape(-1, 4), weight)
        x.add_(1)
        functional.scaled_dot_product_attention(x, x, x)
        functional.rms_norm(x, (4,))
    wanted = {"clone": 1, "_to_copy": 2, "mm": 1, "add_": 1, "attention": 1, "rms_norm": 1}
    assert counts.kernels == wanted and not counts.syncs


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("tolist", lambda x: x.tolist() == [0, 0]),
        ("item", lambda x: x[0].item() == 0),
        ("__bool__", lambda x: not x.any()),
        ("cpu", lambda x: x.cpu().device.type == "cpu"),
        ("_to_copy", lambda x: torch.ones(2).to(x.device)),
        ("tensor", lambda x: torch.tensor([2, 3], device=x.device)),
    ],
)
def test_a_wait_for_the_device_is_counted(name: str, read):
    with KernelCounts() as counts:
        assert read(torch.ones(2, dtype=torch.long, device="meta")) is not False
        torch.ones(2).to("meta", non_blocking=True)
        assert torch.ones(2).tolist() == [1, 1]
    assert counts.syncs == {name: 1}


def test_shapes_that_depend_on_numbers_are_refused():
    with pytest.raises(NotImplementedError), KernelCounts():
        torch.ones(2, device="meta")[torch.ones(2, dtype=torch.bool, device="meta")]


def test_a_real_model_runs_at_7b_shapes():
    llama = llama_7b(1)
    assert sum(p.numel() for p in llama.model.layers.parameters()) == 202_383_360
    with FakeTensorMode(), torch.no_grad(), KernelCounts() as counts:
        made_fake(llama)
        llama(torch.zeros(2, 5, dtype=torch.long), use_cache=False)
    assert counts.kernels["attention"] == 1 and counts.kernels["mm"] == 8
