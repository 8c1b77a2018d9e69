"""Whatever samples in 16 bits does so with the layers of sampling, and with a float32 head."""

from pathlib import Path

import pytest
import torch
from generation_runs import make_run
from ppo_runs import STOPS, TinyRun

from chatllama.config.loader import load_config
from chatllama.config.schema import GenerationSection, with_weights
from chatllama.generation.decoding_batch import DecodingBatch, Request
from chatllama.generation.sampling import Sampling
from chatllama.inference.answerer import Answerer
from chatllama.inference.chat_model import ChatModel, mean_kl
from chatllama.inference.load import LoadedRun, load_run
from chatllama.model.roles import RoleModel
from chatllama.model.sampling_layers import _Norm, _Projection
from chatllama.serving.engine import Engine, EngineLimits, _RoleBatch
from chatllama.serving.metrics import Metrics
from chatllama.text.chat_format import Message
from trainers.ppo.rollout import sample_responses

SAID: list[Message] = [{"role": "user", "content": "the river"}]


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of all logits that were sampled from, with these layers in place."""
    seen: list[torch.dtype] = []
    sample = DecodingBatch._sample

    def noted(batch: DecodingBatch, hidden: torch.Tensor, *others) -> list:
        modules = list(batch._llama.modules())
        assert any(isinstance(m, _Projection) for m in modules)
        assert any(isinstance(m, _Norm) for m in modules)
        seen.append(batch._llama.lm_head(hidden).dtype)
        return sample(batch, hidden, *others)

    monkeypatch.setattr(DecodingBatch, "_sample", noted)
    return seen


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> LoadedRun:
    run = make_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)
    cfg = with_weights(load_config(run.config), "bfloat16", None)
    return load_run(run, cfg, ["policy", "reference"])


def plain(model: RoleModel) -> bool:
    return not any(isinstance(m, _Projection | _Norm) for m in model.modules())


def test_answers(loaded: LoadedRun, logits: list[torch.dtype]):
    uniforms = torch.rand(1, 4)
    Answerer(loaded, "policy").answer([SAID], uniforms, Sampling(4), [], 1, with_logprobs=True)
    assert set(logits) == {torch.float32} and plain(loaded.model)


def test_chat(loaded: LoadedRun, logits: list[torch.dtype]):
    chat = ChatModel(loaded, Sampling(4), torch.Generator())
    "".join(chat.answer(SAID, "policy"))
    assert set(logits) == {torch.float32} and plain(loaded.model)


def test_the_server(loaded: LoadedRun, logits: list[torch.dtype]):
    engine = Engine(loaded.model, EngineLimits(2, 100, 2), Metrics())
    batch = _RoleBatch(loaded.model, 2)

    def work() -> list:
        return batch.decoding.admit([Request([1, 80], Sampling(1), [], torch.rand(1))])

    engine._guarded("policy", batch, work)  # what comes of it belongs to no request
    assert set(logits) == {torch.float32} and plain(loaded.model)


def test_rollouts(tmp_path: Path, tiny_tokenizer_dir: Path, logits: list[torch.dtype]):
    trainer = TinyRun.make(tmp_path, tiny_tokenizer_dir).trainer(backbone={"dtype": "bfloat16"})
    section = GenerationSection(max_new_tokens=8)
    for role in ("policy", "reference"):
        sample_responses(trainer.engine, role, [[1, 80, 90], [1]], section, STOPS, (3, 1))
    assert set(logits) == {torch.float32} and plain(trainer.engine.model)


def test_the_divergence_between_roles_is_of_float32_logits(loaded: LoadedRun):
    kinds: list[torch.dtype] = []
    hook = loaded.model.llama.lm_head.register_forward_hook(
        lambda *call: kinds.append(call[2].dtype)
    )
    mean_kl(loaded.model, "policy", "reference", [1, 80], [90, 91])
    hook.remove()
    assert kinds == [torch.float32] * 2
