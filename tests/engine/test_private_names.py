"""The private names of DeepSpeed that the engine uses still exist, as what they are taken for.

Behaviour is compared in test_engine.py and test_resume.py; this finds what no CPU test reaches
(an optimizer on NVMe) and names the culprit when a version moves.
"""

import inspect

import pytest

METHODS = {
    "deepspeed.runtime.engine.DeepSpeedEngine": ("coalesce_grad_reduction",),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "get_param_id",
        "unscale_and_clip_grads",
        "_optimizer_step",
        "_get_norm_groups",
        "_swappable_optimizer_subgroup",
        "_optimizer_states_and_gradient_swap_in",
        "_optimizer_states_and_gradient_swap_out",
        "_release_swap_buffers",
    ),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "unscale_and_clip_grads",
        "_optimizer_step",
    ),
    "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload": (
        "_register_deepspeed_module",
    ),
    "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator": (
        "is_invalid_trace",
        "_invalidate_trace",
    ),
}
ATTRIBUTES = {
    "deepspeed.runtime.zero.stage3": (
        "self.grad_position[self.get_param_id(",
        "self.fp32_partitioned_groups_flat",
        "self.sub_group_to_group_id",
        "self.parameter_offload",
    ),
    "deepspeed.runtime.zero.stage_1_and_2": ("self.single_partition_of_fp32_groups",),
    "deepspeed.runtime.zero.parameter_offload": (
        "self.forward_hooks",
        "self.backward_hooks",
        "self.param_coordinator",
    ),
    "deepspeed.runtime.zero.partition_parameters": (
        "param.ds_id",
        "param.ds_numel",
        "param.ds_shape",
        "param.ds_shape",
        "param.ds_tensor",
        "param.ds_active_sub_modules",
    ),
    "deepspeed.runtime.torch_autocast": ('PARAM_COMM_DTYPE_ATTR_NAME = "comm_dtype"',),
    "deepspeed.utils.groups": (
        "if _WORLD_GROUP is None:",
        "_WORLD_GROUP = dist.new_group(",
        "return _clone_world_group()",
    ),
    "deepspeed.utils.tensor_fragment": (
        "_hp_mapping",
        "lp_fragment_address",
        "hp_fragment_address",
        "param_group_index",
    ),
}


@pytest.mark.slow  # importing deepspeed takes seconds
def test_private_names_of_deepspeed_exist():
    import pkgutil

    deepspeed = pkgutil.resolve_name("deepspeed")
    assert deepspeed.ops.__compatible_ops__.keys() >= {"deepspeed_shm_comm"}
    for place, names in METHODS.items():
        found = pkgutil.resolve_name(place)
        assert [name for name in names if not callable(getattr(found, name, None))] == [], place
    for place, texts in ATTRIBUTES.items():
        source = inspect.getsource(pkgutil.resolve_name(place))
        assert [text for text in texts if text not in source] == [], place
