"""PPO whose rollouts come from servers: vLLM's protocol by a stub, and two servers of our own."""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import TinyRun, nudge
from pydantic import ValidationError
from serving_setup import serving
from vllm_stub import BASE, VllmStub, vllm_stub

from chatllama.config.generation import GenerationSection
from chatllama.config.loader import dump_config
from chatllama.generation.sampling import Sampling
from chatllama.runs.folder import RunFolder
from trainers.ppo.rollout import arrange
from trainers.ppo.servers import pool as server_pool
from trainers.ppo.servers.client import SamplingServer, ServedResponse, ServerLost, ServerRefused
from trainers.ppo.servers.pool import NoServerLeft, compare, prompt_seed
from trainers.ppo.train import PpoTrainer

PROMPTS = [[1, 80, 90], [1, 100], [1, 120, 130, 140]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("tiny"), tiny_tokenizer_dir)


@pytest.fixture
def stub(tiny: TinyRun) -> Iterator[tuple[str, VllmStub]]:
    with vllm_stub(tiny.base) as running:
        yield running


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "FIRST_PAUSE", 0.001)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def trainer(tiny: TinyRun, urls: list[str], **servers: Any) -> PpoTrainer:
    generation = {"engine": "server", "servers": {"urls": urls, "retries": 2, **servers}}
    return tiny.trainer(generation=generation)


def pool_of(trainer: PpoTrainer) -> server_pool.ServerPool:
    assert trainer.servers is not None
    return trainer.servers


# --- config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"engine": "server"}, "go together"),
        ({"servers": {"urls": ["http://a:1"]}}, "go together"),
        ({"engine": "server", "servers": {"urls": []}}, "urls"),
        ({"engine": "server", "servers": {"urls": ["a:1"]}}, "expected http://HOST:PORT"),
        ({"engine": "server", "servers": {"urls": ["http://a:1", "http://a:1/"]}}, "twice"),
        ({"engine": "server", "servers": {"urls": ["http://a:1"]}, "top_p": 0.9}, "top_p 1"),
    ],
)
def test_what_does_not_fit_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerationSection.model_validate(section)


# --- one server ----------------------------------------------------------------------------------


def test_vllm_s_requests_and_replies(stub: tuple[str, VllmStub], tiny: TinyRun) -> None:
    url, known = stub
    server = SamplingServer(f"{url}/v1/", None, 30)
    assert server.base_model() == BASE
    server.load("one", str(tiny.folder / "sft" / "adapter"))
    with pytest.raises(ServerRefused, match=r"HTTP 400 Bad Request: .*'one' has already"):
        server.load("one", "x")
    answer = server.sample("one", PROMPTS[0], Sampling(5), [2], seed=3)
    again = server.sample("one", PROMPTS[0], Sampling(5), [2], seed=3)
    other = server.sample(BASE, PROMPTS[0], Sampling(5), [2], seed=3)
    assert answer == again != other and 1 <= len(answer.ids) == len(answer.logprobs) <= 5
    sent = known.calls[-1][1]
    # What vLLM would else take from the model's generation_config.json.
    assert (sent["top_p"], sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (
        1,
        -1,
        0,
        1,
    )
    server.unload("one")
    with pytest.raises(ServerLost, match="does not exist"):
        server.sample("one", PROMPTS[0], Sampling(5), [2], seed=3)
    with pytest.raises(ServerLost):
        SamplingServer(closed_port(), None, 5).base_model()


def reply(**changes: Any) -> dict[str, Any]:
    choice = {
        "token_ids": [5, 6, 2],
        "prompt_token_ids": [1],
        "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0]},
    }
    return {"choices": [choice | changes]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": None}, "return_token_ids"),
        ({"prompt_token_ids": [1, 1]}, "changed the prompt"),
        ({"logprobs": None}, "0 log-probabilities for 3 tokens"),
        ({"logprobs": {"token_logprobs": [-1.0, None, -3.0]}}, "log-probabilities"),
        ({"token_ids": [5, 6, 7]}, "none of the stop ids"),
        ({"token_ids": [5, 2, 2]}, "went on after a stop token"),
    ],
)
def test_answers_that_would_train_wrongly_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    server = SamplingServer("http://a:1", None, 5)
    assert server._checked(reply(), [1], 4, [2]) == ServedResponse([5, 6, 2], [-1, -2, -3])
    with pytest.raises(ServerRefused, match=message):
        server._checked(reply(**changes), [1], 4, [2])
    with pytest.raises(ServerRefused, match="longest answer"):
        server._checked(reply(), [1], 2, [2])


# --- a pool --------------------------------------------------------------------------------------


def test_prompts_are_dealt_out_and_a_lost_server_s_are_taken_over(
    stub: tuple[str, VllmStub], tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    url, known = stub
    pool = pool_of(trainer(tiny, [url]))
    alone = pool.sample("policy", PROMPTS, (0, 1))
    assert all(call[1]["seed"] == prompt_seed((0, 1), PROMPTS.index(call[1]["prompt"]))
               for call in known.calls if call[0] == "/v1/completions")  # fmt: skip
    gone = closed_port()
    both = pool_of(trainer(tiny, [gone, url]))
    assert both.sample("policy", PROMPTS, (0, 1)) == alone
    assert both.live == [url]
    told = capsys.readouterr().err
    assert f"sampling server dropped after 3 failures: {gone}" in told and f"left: {url}" in told
    known.failing = 2  # fewer than would drop it
    assert both.sample("policy", PROMPTS, (0, 1)) == alone
    known.failing = 10**6
    with pytest.raises(NoServerLeft, match="none of the sampling servers answers"):
        both.sample("policy", PROMPTS, (0, 2))


class Scripted:
    """A server that answers with the prompt's length, the longest prompts first."""

    url = "http://a:1"

    def __init__(self) -> None:
        self.seeds: dict[int, int] = {}

    def base_model(self) -> str:
        return BASE

    def sample(self, model: str, prompt: list[int], *options: Any) -> ServedResponse:
        self.seeds[len(prompt)] = options[-1]
        time.sleep(0.05 * (4 - len(prompt)))
        return ServedResponse([len(prompt)], [0.0])


def scripted(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> tuple[server_pool.ServerPool, Any]:
    pool, server = pool_of(trainer(tiny, ["http://a:1"])), Scripted()
    monkeypatch.setattr(pool._members[0], "server", server)
    return pool, server


def test_answers_stand_in_the_order_of_their_prompts_with_seeds_of_their_own(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, server = scripted(tiny, monkeypatch)
    prompts = [[1], [1, 5, 6], [1, 5]]
    seen = set()
    for seed in ((0, 1), (0, 2), (7, 1)):  # seed of the run, step
        answers = pool.sample("base", prompts, seed)
        assert [answer.ids for answer in answers] == [[1], [3], [2]]
        seen |= set(server.seeds.values())
    assert len(seen) == 9


@pytest.mark.parametrize("role", ["policy", "reference", "base"])
def test_servers_are_compared_with_the_role_that_answered(role: Any) -> None:
    arranged = arrange([[1], [1]], [[5, 2], [2]], [2], pad_id=0)
    own, reference = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.full((2, 2), -0.5)
    rollout = replace(arranged, logprobs=own, ref_logprobs=reference)
    shift = torch.tensor([[0.2, -0.1], [0.3, 9.0]])  # signs differ: the mean of sizes is 0.2
    theirs = (reference if role == "reference" else own) + shift
    served = [
        ServedResponse([5, 2], theirs[0].tolist()),
        ServedResponse([2], [float(theirs[1, 0])]),
    ]
    found = compare(role, served, rollout, limit=0.21)
    assert found["ppo/sampler_gap"] == pytest.approx(0.2)
    assert found["ppo/sampler_gap_max"] == pytest.approx(0.3)


def test_pauses_double_and_failures_with_successes_between_drop_no_server(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, _ = scripted(tiny, monkeypatch)
    (member,) = pool._members
    for round_number in range(3):
        failing = [2]

        def work(failing: list[int] = failing) -> str:
            if failing[0]:
                failing[0] -= 1
                raise ServerLost("no answer")
            return "answer"

        assert pool._try(member, work) == "answer", round_number
        assert member.failures == 0 and pool.live == ["http://a:1"]
    monkeypatch.setattr(server_pool, "FIRST_PAUSE", 0.5)
    for pause in (0.5, 1.0, 2.0):
        pool._failed(member, time.monotonic(), ServerLost("no answer"))
        assert member.resume_at - member.failed_at == pytest.approx(pause)
    assert pool.live == []  # the third in a row, of two retries


def test_each_phase_has_an_adapter_of_its_own_and_the_old_one_goes(
    stub: tuple[str, VllmStub], tiny: TinyRun
) -> None:
    url, known = stub
    running = trainer(tiny, [url])
    pool = pool_of(running)
    first = pool.sample("policy", PROMPTS, (0, 1))
    ((name, folder),) = known.paths.items()
    assert name.startswith("policy-") and Path(folder).is_dir()
    nudge(running, 0.3)
    assert pool.sample("policy", PROMPTS, (0, 1)) != first
    assert len(known.adapters) == 1 and name not in known.adapters and not Path(folder).is_dir()
    pool.sample("base", PROMPTS, (0, 1))
    assert known.calls[-1][1]["model"] == BASE
    pool.close()
    left = [path.name for path in (tiny.folder / "ppo" / "served").iterdir()]
    assert known.adapters == {} and not any(name.split("-")[1] in each for each in left)


def test_an_adapter_that_changes_nothing_is_the_base(
    stub: tuple[str, VllmStub], tiny: TinyRun
) -> None:
    url, known = stub
    running = trainer(tiny, [url])
    for name, parameter in running.engine.model.named_parameters():
        if ".lora_B.policy." in name:
            parameter.data.zero_()
    pool_of(running).sample("policy", PROMPTS, (0, 1))
    assert known.adapters == {} and known.calls[-1][1]["model"] == BASE


def test_log_probabilities_are_compared_and_bounded(
    stub: tuple[str, VllmStub], tiny: TinyRun
) -> None:
    url, known = stub
    running = trainer(tiny, [url])
    state = running.start()
    _, rollout, _, metrics = running.advance(state)
    assert 0 <= metrics["ppo/sampler_gap"] <= metrics["ppo/sampler_gap_max"] < 1e-4
    served = [ServedResponse(rollout.response_ids(r), []) for r in range(len(rollout.tokens))]
    moved = [
        ServedResponse(one.ids, (rollout.logprobs[r, : len(one.ids)] + 0.01).tolist())
        for r, one in enumerate(served)
    ]
    found = compare("policy", moved, rollout, limit=0.011)
    assert found["ppo/sampler_gap"] == pytest.approx(0.01, abs=1e-5)
    with pytest.raises(ValueError, match=r"by 0\.01 nats a token .* allows 0\.009"):
        compare("policy", moved, rollout, limit=0.009)
    known.spoil = True
    with pytest.raises(ValueError, match=r"differ from the trainer's by 0\.2 nats"):
        running.advance(state)


# --- end to end ----------------------------------------------------------------------------------


def metrics_of(tiny: TinyRun) -> list[dict[str, Any]]:
    text = RunFolder(tiny.folder).metrics("ppo").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_ppo_against_two_servers_of_our_own(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TinyRun.make(tmp_path, tiny_tokenizer_dir)
    key = "k" * 20
    monkeypatch.setenv("CHATLLAMA_API_KEY", key)
    run = RunFolder(tiny.folder)
    dump_config(tiny.config(), run.config)
    with serving(run, api_keys=(key,)) as one, serving(run, api_keys=(key,)) as two:
        running = trainer(tiny, [one, two])
        numbers = running.train(resume=False)
        assert numbers["steps"] == 2
    lines = metrics_of(tiny)
    gaps = [line["ppo/sampler_gap_max"] for line in lines if "ppo/sampler_gap_max" in line]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    assert list((tiny.folder / "ppo" / "served").iterdir()) == []


@pytest.mark.slow
def test_a_run_whose_servers_are_gone_stops_with_a_checkpoint_and_goes_on(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    whole = TinyRun.make(tmp_path / "whole", tiny_tokenizer_dir)
    tiny = TinyRun.make(tmp_path / "cut", tiny_tokenizer_dir)
    with vllm_stub(whole.base) as (url, _):
        trainer(whole, [url]).train(resume=False)
    with vllm_stub(tiny.base) as (url, known):
        running = trainer(tiny, [url])
        roll_out = running._roll_out

        def cut(step: int) -> Any:
            known.failing = 10**6 if step == 1 else 0
            return roll_out(step)

        running._roll_out = cut  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"none of the sampling servers.*Step 1 is saved"):
            running.train(resume=False)
        known.failing = 0
        resumed = trainer(tiny, [url])
        resumed.train(resume=True)
    first, second = metrics_of(whole), metrics_of(tiny)
    assert [line["step"] for line in second] == [1, 2]
    for name in ("ppo/score_mean", "ppo/policy_loss"):
        values = [[line[name] for line in lines if name in line] for lines in (first, second)]
        assert values[0] == pytest.approx(values[1], abs=1e-6) and values[0]
    assert torch.isfinite(torch.tensor(values[0])).all()
