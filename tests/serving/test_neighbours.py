"""What one request does, its neighbours on the same model never notice. Seeded."""

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_setup import make_served_run, metric, post, serving

from chatllama.generation.decoding_batch import DecodingBatch, Request
from chatllama.generation.sampling import Sampling
from chatllama.inference.load import LoadedRun, load_run
from chatllama.runs.folder import RunFolder
from chatllama.serving.engine import Engine, EngineLimits
from chatllama.serving.errors import ApiError
from chatllama.serving.jobs import Job
from chatllama.serving.metrics import Metrics
from chatllama.text.encoding import encode

pytestmark = pytest.mark.slow

BAD = 299
NEIGHBOURS = [
    {"prompt": "the river", "max_tokens": 60, "seed": 1, "stop_token_ids": []},
    {"prompt": "Anna asks", "max_tokens": 60, "temperature": 0, "logprobs": 2},
]
HOSTILE: list[dict[str, Any]] = [
    {"temperature": 1e-39}, {"temperature": 1e-4}, {"temperature": 100}, {"temperature": 5e-324},
    {"top_k": 9223372036854775808}, {"top_k": 2**31}, {"top_k": 10**6}, {"top_p": 1e-45},
    {"top_p": 1e-320}, {"prompt": [BAD]}, {"prompt": [[5, 6], [BAD, 7]]}, {"seed": -(2**63)},
    {"prompt": [5] * 30 + [BAD], "logprobs": 20, "n": 2}, {"stop_token_ids": [2**70]},
    {"temperature": 0, "prompt": [BAD]}, {"stop": "\ud800"}, {"stop": ["\x00", ""]}, {"n": 128},
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_served_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def loaded(run: RunFolder) -> LoadedRun:
    """A run whose token BAD is NaN."""
    loaded = load_run(run)
    with torch.no_grad():
        embeddings: Any = loaded.model.llama.get_input_embeddings()
        embeddings.weight[BAD] = torch.nan
    return loaded


@pytest.fixture
def url(run: RunFolder, loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    step = DecodingBatch.step

    def slow(self: DecodingBatch) -> Any:
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(DecodingBatch, "step", slow)
    with serving(run, loaded) as address:
        yield address


def answers_beside(url: str, bodies: list[bytes]) -> tuple[list[Any], list[tuple[int, Any]]]:
    """What the neighbours get, and what those that come while they are answered get."""
    found: list[Any] = [None, None]

    def ask(place: int) -> None:
        body = {"model": "policy", "return_token_ids": True, **NEIGHBOURS[place]}
        status, told = post(url, "/v1/completions", body)
        choices = told.get("choices", [])  # log-probabilities differ by rounding
        found[place] = (status, [(each["text"], each["token_ids"]) for each in choices] or told)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    while metric(url, "running") < 2 and any(thread.is_alive() for thread in threads):
        time.sleep(0.002)
    told = [post(url, "/v1/completions", body) for body in bodies]
    for thread in threads:
        thread.join(120)
    return found, told


def test_neighbours_finish_equal_to_their_solo_answers(url: str) -> None:
    alone, _ = answers_beside(url, [])
    assert [status for status, _ in alone] == [200, 200]
    luck = random.Random(3)
    failed = 0
    for round in range(12):
        changes = HOSTILE[round::12] + luck.sample(HOSTILE, 2)
        bodies = [{"model": "policy", "prompt": "a", "max_tokens": 3, **each} for each in changes]
        found, told = answers_beside(url, [json.dumps(body).encode() for body in bodies])
        assert found == alone, changes
        for body, (status, answer) in zip(bodies, told, strict=True):
            assert status in (200, 400, 500), (body, answer)
            assert status == 500 or str(BAD) not in str(body["prompt"]), (body, answer)
            if status == 500:
                failed += 1
                assert "logits are NaN" in answer["error"]["message"]
    assert failed >= 4


@pytest.mark.parametrize(
    "sampling",
    [Sampling(4, top_k=2**63), Sampling(4, 1e-39), Sampling(4, float("nan")), Sampling(0)],
)  # fmt: skip
def test_settings_that_no_bound_has_stopped_fail_alone(
    loaded: LoadedRun, sampling: Sampling
) -> None:
    engine = Engine(loaded.model, EngineLimits(8, 4096, 8), Metrics())
    told: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    ended = threading.Event()

    def job(number: int, how: Sampling) -> Job:
        made = Job("policy", lambda _, what: note(number, what), time.monotonic() + 60)
        prompt = encode(loaded.tokenizer, "the river")
        request = Request(prompt, how, [], torch.full((20,), 0.4))
        made.add_rows([request], loaded.tokenizer, [], False)
        return made

    def note(number: int, what: Any) -> None:
        told[number].append(what)
        ends = [isinstance(w[-1], ApiError) or w[-1][-1].ended for w in told.values() if w]
        if len(ends) == 3 and all(ends):
            ended.set()

    for number, how in enumerate((Sampling(12), sampling, Sampling(12))):
        engine._waiting.extend(job(number, how).rows)  # admitted together
    engine.start()
    assert ended.wait(60)
    engine.stop()
    assert isinstance(told[1][-1], ApiError)
    texts = ["".join(delta.text for some in told[n] for delta in some) for n in (0, 2)]
    assert texts[0] == texts[1] and len(told[0]) == 12


def test_a_text_that_cannot_be_decoded_fails_alone(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatllama.serving.jobs import Row

    alone, _ = answers_beside(url, [])
    advance = Row.advance

    def breaking(self: Row, sampled: Any) -> Any:
        if self.request.sampling.max_new_tokens == 5:
            raise RuntimeError("tokenizer")
        return advance(self, sampled)

    monkeypatch.setattr(Row, "advance", breaking)
    body = json.dumps({"model": "policy", "prompt": "a", "max_tokens": 5}).encode()
    found, told = answers_beside(url, [body])
    assert found == alone and told[0][0] == 500 and "tokenizer" not in str(told)


PLACES = {
    "the last layer": lambda llama: llama.model.layers[-1].mlp,
    "the first layer": lambda llama: llama.model.layers[0].self_attn,
    "the head": lambda llama: llama.lm_head,
}


ERRORS = (torch.OutOfMemoryError("no memory"), MemoryError(), ValueError())


@pytest.mark.parametrize(("place", "error"), zip(PLACES, ERRORS, strict=True))
def test_a_prompt_that_cannot_be_read_fails_alone(
    url: str, loaded: LoadedRun, place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails somewhere in the forward pass, with rows of the cache written, some of them NaN."""
    alone, _ = answers_beside(url, [])
    module, embedding = PLACES[place](loaded.model.llama), loaded.model.llama.model.embed_tokens
    forward, embed = module.forward, embedding.forward
    longest: list[int] = []

    def embedding_noted(tokens: torch.Tensor) -> Any:
        longest[:] = [tokens.shape[1]]
        return embed(tokens)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if longest[0] > 40:
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(embedding, "forward", embedding_noted)
    monkeypatch.setattr(module, "forward", failing)
    common = {"model": "policy", "max_tokens": 3, "temperature": 0}  # BAD can be sampled, too
    prompts: list[Any] = [[5] * 50, "a", [BAD] * 45, [[6] * 41, [7, 8]], "the river"]
    bodies = [json.dumps({**common, "prompt": prompt}).encode() for prompt in prompts]
    found, told = answers_beside(url, bodies)
    assert found == alone
    assert [status for status, _ in told] == [500, 200, 500, 500, 200]
    assert all("internal" in str(answer) for status, answer in told if status == 500)
    assert answers_beside(url, [])[0] == alone


def has_ended(told: list[Any]) -> bool:
    return bool(told) and (isinstance(told[-1], ApiError) or bool(told[-1][-1].ended))


def engine_of(loaded: LoadedRun, prompts: list[Any], roles: list[str]) -> list[list[Any]]:
    """What an engine tells about each prompt, all of them admitted together."""
    engine = Engine(loaded.model, EngineLimits(8, 4096, 8), Metrics())
    told: list[list[Any]] = [[] for _ in prompts]
    for number, (prompt, role) in enumerate(zip(prompts, roles, strict=True)):
        deliver = lambda _, what, number=number: told[number].append(what)  # noqa: E731
        job = Job(role, deliver, time.monotonic() + 60)
        request = Request(prompt, Sampling(6), [], torch.full((6,), 0.4))
        job.add_rows([request], loaded.tokenizer, [], False)
        engine._waiting.extend(job.rows)
    engine.start()
    deadline = time.monotonic() + 60
    while not all(map(has_ended, told)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.alive
    engine.stop()
    return told


def tokens_of(told: list[Any]) -> list[int] | str:
    if isinstance(told[-1], ApiError):
        return f"{told[-1].status} {told[-1].detail.code}"
    return [one.token for deltas in told for delta in deltas for one in delta.tokens]


@pytest.mark.parametrize("bad", [[0], [3], [0, 1], [1, 4], [0, 1, 2, 3, 4], []])
def test_of_prompts_read_together_only_the_bad_fail(
    loaded: LoadedRun, bad: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 6, 7 + n] for n in range(5)]
    alone = [tokens_of(engine_of(loaded, [prompt], ["policy"])[0]) for prompt in prompts]
    embedding = loaded.model.llama.model.embed_tokens
    embed = embedding.forward

    def failing(tokens: torch.Tensor) -> Any:
        if tokens.shape[1] > 1 and set(tokens[:, -1].tolist()) & {7 + n for n in bad}:
            raise torch.OutOfMemoryError("no memory")
        return embed(tokens)

    monkeypatch.setattr(embedding, "forward", failing)
    found = [tokens_of(told) for told in engine_of(loaded, prompts, ["policy"] * 5)]
    assert found == ["500 internal" if n in bad else alone[n] for n in range(5)]


def test_a_step_that_fails_ends_the_answers_of_its_role_alone(
    loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, roles = [[5, 6], [6, 7], [7, 8]], ["policy", "reference", "policy"]
    alone = tokens_of(engine_of(loaded, prompts[1:2], ["reference"])[0])
    embedding, calls = loaded.model.llama.model.embed_tokens, []
    embed = embedding.forward

    def failing(tokens: torch.Tensor) -> Any:
        if tokens.shape == (2, 1):
            calls.append(1)
            raise torch.OutOfMemoryError("no memory")
        return embed(tokens)

    monkeypatch.setattr(embedding, "forward", failing)
    found = [tokens_of(told) for told in engine_of(loaded, prompts, roles)]
    assert found == ["500 internal", alone, "500 internal"] and len(calls) == 1
