"""Compiled decode steps: the tokens of the plain ones, and one compilation for all of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_runs import answers, make_run
from ppo_runs import STOPS, TinyRun, nudge
from tiny_models import FORMS, adapter_parameters, role_model, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

from chatllama.config.schema import Config, GenerationSection
from chatllama.generation.decoding_batch import DecodingBatch, Request, Sampled
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.generation.static_kv_cache import StaticKVCache
from chatllama.inference.options import GenerateOptions, complete
from chatllama.model.lora import merge_products
from chatllama.model.packed_attention import registered
from chatllama.model.roles import acting_as, autocast, sampling_as

PROMPTS = [[5, 9, 30], [7], [11, 40, 41, 42, 80, 3, 12], [20, 21], [33, 60, 61, 9], [8, 8]] * 3
UNIFORMS = torch.rand(54, 40, generator=torch.Generator().manual_seed(0))
POSITIONS = 600
ENDS = [2, *range(10, 17)]


class Graphs:
    """A backend that keeps the graphs, of which each is a compilation, and runs them as it says."""

    def __init__(self, backend: str = "eager") -> None:
        self.seen: list[torch.fx.GraphModule] = []
        self._backend = backend

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._dynamo import lookup_backend

        self.seen.append(graph)
        return lookup_backend(self._backend)(graph, inputs)


def sampled(
    llama: LlamaForCausalLM, sampling: Sampling, compiled: StaticKVCache | None, **more: Any
) -> list[list[int]]:
    given: dict[str, Any] = {"prompts": PROMPTS, "stop_ids": ENDS, "batch_size": 5, **more}
    return generate(llama, sampling=sampling, uniforms=UNIFORMS, compiled=compiled, **given)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama(max_positions=POSITIONS)


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    return Graphs()


@pytest.fixture(scope="module")
def compiled(llama: LlamaForCausalLM, graphs: Graphs) -> StaticKVCache:
    return StaticKVCache(llama, graphs)


# --- the same tokens -----------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_once_for_every_sampling_and_queue(
    llama: LlamaForCausalLM, compiled: StaticKVCache, graphs: Graphs
):
    for sampling in (Sampling(40), Sampling(40, 0.0), Sampling(33, 0.7, 20, 0.9)):
        expected = sampled(llama, sampling, None)
        assert len({len(response) for response in expected}) > 4  # slots were refilled
        assert sampled(llama, sampling, compiled) == expected
    endless = sampled(llama, Sampling(12), None, stop_ids=[])
    assert sampled(llama, Sampling(12), compiled, stop_ids=[]) == endless
    few = {"prompts": PROMPTS[:2]}  # three slots stay empty
    cut: dict[str, Any] = {"ends_with": lambda number, token: token % 7 == number % 7}
    for more in (few, cut):
        expected = sampled(llama, Sampling(40), None, **more)
        assert sampled(llama, Sampling(40), compiled, **more) == expected
    assert generate(llama, [], Sampling(4), [2], UNIFORMS[:0], 5, compiled=compiled) == []
    assert len(graphs.seen) == 1 and (compiled.allocated, compiled.capacity) == (5, 256)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form != "llama"])
def test_every_family_gives_the_tokens_of_transformers(form: str):
    plain: Any = tiny_llama(form=form)
    llama, graphs = tiny_llama(form=form), Graphs()
    llama.set_attn_implementation(registered("sdpa"))
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}
    expected = [
        plain.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        for prompt in PROMPTS[:6]
    ]
    compiled = StaticKVCache(llama, graphs)
    assert sampled(llama, Sampling(40, 0.0), compiled, prompts=PROMPTS[:6] * 9) == expected * 9
    assert len(graphs.seen) == 1 and {len(answer) for answer in expected} != {40}


@pytest.mark.slow
def test_whatever_a_step_reads_or_writes_lies_where_it_lay(
    llama: LlamaForCausalLM, compiled: StaticKVCache, graphs: Graphs
):
    """CUDA graphs copy inputs that are not marked so, and refuse to write to them."""
    sampled(llama, Sampling(3), compiled)
    marks = {
        node.name: node.meta["tensor_dict"].get("_dynamo_static_input_type")
        for node in graphs.seen[0].graph.nodes
        if node.op == "placeholder"
    }
    assert set(marks.values()) == {"unguarded"}, marks
    weights = 2 * 9 + 2  # of two layers, embedding and last norm
    assert len(marks) == weights + 1 + 2 * 2 + 1  # rotary frequencies, keys and values, the state
    places = [t.data_ptr() for layer in compiled._layers for t in layer.tensors]
    sampled(llama, Sampling(9), compiled)
    assert [t.data_ptr() for layer in compiled._layers for t in layer.tensors] == places


@pytest.mark.slow
def test_rows_come_and_go_and_memory_grows_beneath_them(llama: LlamaForCausalLM):
    graphs = Graphs()
    batch = DecodingBatch(llama, 3, StaticKVCache(llama, graphs))
    requests = [
        Request(prompt, Sampling(30, temperature), [], uniforms)
        for prompt, temperature, uniforms in zip(
            [[5, 9], [7, 8, 9, 10], [11] * 6, list(range(3, 90)) * 4, [44, 45]],
            [0.0, 1.0, 0.7, 1.0, 1.0],
            UNIFORMS,
            strict=False,
        )
    ]
    produced: dict[int, list[int]] = {}

    def note(news: list[Sampled]) -> None:
        for one in news:
            produced.setdefault(one.row, []).append(one.token)

    note(batch.admit(requests[:3]))
    for _ in range(4):
        note(batch.step())
    batch.drop([0])  # the last row takes its number
    note(batch.step())
    assert len(graphs.seen) == 1
    note(batch.admit([requests[3]]))  # 378 tokens in all
    note(batch.step())
    assert len(graphs.seen) == 2
    batch.drop([1])
    note(batch.admit([requests[4]]))
    while batch.running:
        note(batch.step())
    assert len(graphs.seen) == 2
    expected = {
        row: generate(llama, [r.prompt], r.sampling, [], r.uniforms[None], 1)[0]
        for row, r in enumerate(requests)
    }
    lengths = {0: 5, 1: 7, 2: 30, 3: 30, 4: 30}
    assert produced == {row: expected[row][: lengths[row]] for row in lengths}


@pytest.mark.slow
def test_roles_and_weights_change_between_rollouts():
    model = role_model(tiny_llama())
    merge_products(model)
    graphs = Graphs("aot_eager")
    slots, sampling = StaticKVCache(model.llama, graphs), Sampling(20)
    said: list[list[list[int]]] = []

    def both(role: str, num_graphs: int) -> None:
        model.eval()
        with acting_as(model, role), autocast(model):
            said.append(sampled(model.llama, sampling, None))
            assert sampled(model.llama, sampling, slots) == said[-1]
        assert len(graphs.seen) == num_graphs, role

    both("policy", 1)
    both("reference", 2)
    model.train()  # as the update leaves it
    both("policy", 2)
    both("base", 3)
    for parameter in adapter_parameters(model, "policy"):
        parameter.data.add_(0.05)
    both("policy", 3)
    for parameter in adapter_parameters(model, "policy"):
        parameter.data = parameter.data + 0.05
    both("policy", 3)
    assert said[0] == said[2]
    assert all(said[i] != said[j] for i, j in ((0, 1), (0, 3), (0, 4), (4, 5)))


@pytest.mark.slow
def test_bfloat16_differs_by_rounding_only_and_its_layers_stay_where_they_are():
    model, graphs = role_model(tiny_llama(dtype=torch.bfloat16)), Graphs("aot_eager")
    slots = StaticKVCache(model.llama, graphs)
    for _ in range(3):
        with sampling_as(model, "policy"):
            pairs = [sampled(model.llama, Sampling(20), each) for each in (None, slots)]
        # 15 of 18 are equal where a plain batch has another size; of other weights' none is.
        assert sum(mine == theirs for mine, theirs in zip(*pairs, strict=True)) >= 12
        for parameter in adapter_parameters(model, "policy"):
            parameter.data = parameter.data + 0.05
    assert len(graphs.seen) == 1
    inputs = [n.meta["tensor_dict"] for n in graphs.seen[0].graph.nodes if n.op == "placeholder"]
    marks = {each.get("_dynamo_static_input_type") for each in inputs}
    assert marks == {"unguarded"}
    with sampling_as(model, "reward"):
        sampled(model.llama, Sampling(20), slots)
    assert len(graphs.seen) == 2


@pytest.mark.slow
def test_varlen_compiles_as_sdpa_does(llama: LlamaForCausalLM):
    varlen = tiny_llama(max_positions=POSITIONS)
    varlen.set_attn_implementation(registered("varlen"))
    slots = StaticKVCache(varlen, Graphs())
    assert sampled(varlen, Sampling(6), slots) == sampled(llama, Sampling(6), None)


@pytest.mark.slow
def test_rollouts_and_the_evaluation_share_what_is_compiled(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    from trainers.engine import engine
    from trainers.ppo import rollout

    graphs = Graphs()
    monkeypatch.setattr(engine, "StaticKVCache", lambda llama: StaticKVCache(llama, graphs))
    monkeypatch.setattr(rollout, "merged_as", lambda *_: pytest.fail("merged"))
    trainer = TinyRun.make(tmp_path, tiny_tokenizer_dir).trainer()
    prompts = [[1, 80, 90], [1], [1, 70, 71]]

    def sample(role: str, **changes: Any) -> list[list[int]]:
        section = GenerationSection.model_validate({"max_new_tokens": 8, **changes})
        return rollout.sample_responses(trainer.engine, role, prompts, section, STOPS, (3, 1))

    first = sample("policy", merge_lora="never")
    assert sample("policy", compile=True) == first
    nudge(trainer)
    second = sample("policy", merge_lora="never")
    assert sample("policy", compile=True) == second != first
    assert len(graphs.seen) == 1
    assert sample("reference", compile=True) == sample("reference", merge_lora="never")
    assert len(graphs.seen) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) for torch.compile")
def test_the_command_compiles_with_torchs_own_compiler(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    steps: list[int] = []
    step = StaticKVCache.step
    monkeypatch.setattr(StaticKVCache, "step", lambda *args: steps.append(1) or step(*args))
    run = make_run(tmp_path / "run", tiny_tokenizer_dir)
    plain = answers(run, tmp_path / "plain.jsonl", token_ids=True)
    assert not steps
    mine = answers(run, tmp_path / "compiled.jsonl", token_ids=True, compile=True)
    assert [line["token_ids"] for line in mine] == [line["token_ids"] for line in plain]
    assert steps


@pytest.mark.gpu
def test_cuda_graphs_run_and_sample_the_same():
    from torch._dynamo.utils import counters

    llama = tiny_llama()
    nn.Module.to(llama, "cuda")
    compiled = StaticKVCache(llama)
    counters.clear()
    for sampling in (Sampling(40, 0.0), Sampling(40)):
        assert sampled(llama, sampling, compiled) == sampled(llama, sampling, None)
    assert counters["inductor"]["cudagraph_skips"] == 0
    from torch._inductor.cudagraph_trees import get_container

    assert get_container(torch.cuda.current_device()).tree_manager is not None


# --- what is refused -----------------------------------------------------------------------------


def config(**sections: Any) -> Config:
    backbone = {"path": "base", **sections.pop("backbone", {})}
    generation = {"compile": True, **sections.pop("generation", {})}
    return Config.model_validate(
        {"run_dir": "run", "backbone": backbone, "generation": generation, **sections}
    )


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"backbone": {"quantization": "nf4"}}, r"generation.compile: quantised weights \(nf4\)"),
        (
            {"backbone": {"attn_implementation": "eager"}},
            "generation.compile: the mask .* only backbone.attn_implementation sdpa takes",
        ),
        ({"backbone": {"liger_kernel": True}}, "tried with Liger's kernels; use one of the two"),
        ({"deepspeed": {"stage": 3}}, "generation.compile: deepspeed.stage 3 .* use stage 2"),
        ({"generation": {"merge_lora": "always"}}, "merge_lora always: .* use auto or never"),
        (
            {"generation": {"engine": "server", "servers": {"urls": ["http://a:1"]}}},
            "compile: with engine server nothing is sampled here",
        ),
    ],
)
def test_configs_that_cannot_be_compiled(sections: dict[str, Any], message: str):
    assert config().generation.compile
    assert config(backbone={"attn_implementation": "varlen"}).generation.compile
    with pytest.raises(ValueError, match=message):
        config(**sections)
    for other in ("auto", False):  # then it is off, or decided without an error
        generation = {**sections.get("generation", {}), "compile": other}
        cfg = config(**{**sections, "generation": generation})
        assert cfg.against_compiling is not None and not cfg.compiles_rollouts(True)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"backbone": {"attn_implementation": "varlen"}, "deepspeed": {"stage": 2}},
        {"lora": None, "generation": {"merge_lora": "never"}},
    ],
)
def test_auto_compiles_on_a_gpu_alone(sections: dict[str, Any]):
    generation = sections.pop("generation", {})
    by = {
        choice: config(**sections, generation={**generation, "compile": choice})
        for choice in ("auto", True, False)
    }
    assert [by["auto"].compiles_rollouts(gpu) for gpu in (False, True)] == [False, True]
    for choice in (True, False):
        assert [by[choice].compiles_rollouts(gpu) for gpu in (False, True)] == [choice] * 2
    assert Config.model_validate({"run_dir": "r", "backbone": {"path": "b"}}).generation == (
        GenerationSection(compile="auto")
    )


@pytest.mark.parametrize(
    ("gpu", "triton", "compiles"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_the_stage_decides_by_its_machine(
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: str,
    triton: bool,
    compiles: bool,
):
    from trainers.ppo import train

    run = TinyRun.make(tmp_path, tiny_tokenizer_dir)
    monkeypatch.setattr(train, "device", lambda: torch.device(gpu))
    monkeypatch.setattr(train, "find_spec", lambda name: object() if triton else None)
    assert run.trainer().collector.generation.compile is compiles
    assert run.trainer(generation={"compile": False}).collector.generation.compile is False


def test_models_that_cannot_be_compiled(tmp_path: Path, tiny_tokenizer_dir: Path):
    run = make_run(tmp_path, tiny_tokenizer_dir)
    cfg = config(generation={"compile": False})
    with pytest.raises(ValueError, match=r"--compile: quantised weights \(int8\)"):
        complete(run, cfg, GenerateOptions(compile=True, quantization="int8"))
    assert complete(run, cfg, GenerateOptions(compile=True)).options.compile
    llama = tiny_llama()
    llama.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attn_implementation sdpa takes, not eager"):
        StaticKVCache(llama)


@pytest.mark.slow
def test_without_a_compiler_it_is_said_what_to_install(llama: LlamaForCausalLM):
    def broken(graph: object, inputs: object) -> Any:
        raise RuntimeError("No working C++ compiler found")

    message = "(?s)compiling .* No working C\\+\\+ compiler found.*apt install g\\+\\+.*--compile"
    with pytest.raises(ValueError, match=message):
        sampled(llama, Sampling(4), StaticKVCache(llama, broken))


@pytest.mark.slow
def test_errors_of_computing_are_not_called_the_compilers(
    llama: LlamaForCausalLM, compiled: StaticKVCache, monkeypatch: pytest.MonkeyPatch
):
    sampled(llama, Sampling(3), compiled)

    def fails(*_: object) -> Any:
        raise RuntimeError("lost the device")

    monkeypatch.setattr(compiled, "_decode", fails)
    with pytest.raises(RuntimeError, match="lost the device"):
        sampled(llama, Sampling(3), compiled)
    monkeypatch.undo()
    assert sampled(llama, Sampling(3), compiled) == sampled(llama, Sampling(3), None)
