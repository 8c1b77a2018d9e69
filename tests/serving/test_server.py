"""The server through OpenAI's own client, and the parts of the API that are not OpenAI's."""

import http.client
import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving_setup import make_served_run, metric, post, serving

from chatllama.generation.sampling import Sampling
from chatllama.inference.answerer import Answerer, random_numbers
from chatllama.inference.load import LoadedRun, load_run
from chatllama.runs.folder import RunFolder
from chatllama.text.chat_format import Message
from chatllama.text.detokenizing import stream_text

pytestmark = pytest.mark.slow

ASK: list[Any] = [{"role": "user", "content": "Anna paints the river"}]
SAID: list[Any] = [*ASK, {"role": "assistant", "content": "Does she?"}]
CONTINUE = {"continue_final_message": True}
TEXTS = [f"{who} {what}" for who in ("Anna", "the queen", "Victor") for what in ("asks", "walks")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_served_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def loaded(run: RunFolder) -> LoadedRun:
    """The same run, apart from the server's."""
    return load_run(run)


@pytest.fixture(scope="module")
def url(run: RunFolder) -> Iterator[str]:
    with serving(run, max_adapters=2) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def expected(
    loaded: LoadedRun, role: str, text: str, count: int = 24, **sampling: Any
) -> list[int]:
    """What `chatllama generate` answers, as token ids."""
    values: dict[str, Any] = {"temperature": 0.0} | sampling
    settings = Sampling(count, **values)
    message: Message = {"role": "user", "content": text}
    numbers = random_numbers(7, 0, 0, count)[None]
    return Answerer(loaded, role).answer([[message]], numbers, settings, [], 1, False)[0].ids


def text_of(loaded: LoadedRun, ids: list[int]) -> str:
    return "".join(stream_text(loaded.tokenizer, ids))


# --- OpenAI's client -----------------------------------------------------------------------------


def test_models_answer_in_their_roles(client: OpenAI, loaded: LoadedRun) -> None:
    assert [model.id for model in client.models.list()] == ["base", "sft", "policy"]
    assert client.models.retrieve("sft").object == "model"
    told = {}
    for name, role in (("base", "base"), ("sft", "reference"), ("policy", "policy")):
        answer = client.chat.completions.create(model=name, messages=ASK, temperature=0)
        ids = expected(loaded, role, ASK[0]["content"])
        choice = answer.choices[0]
        assert choice.message.content == text_of(loaded, ids)
        assert choice.finish_reason == ("stop" if ids[-1] == 2 else "length")
        assert answer.usage is not None and answer.usage.completion_tokens == len(ids)
        told[name] = choice.message.content
    assert len(set(told.values())) == 3


def test_a_seed_gives_the_same_as_generate_and_streams_the_same(
    client: OpenAI, loaded: LoadedRun
) -> None:
    ids = expected(loaded, "policy", "hello", 12, temperature=0.9, top_p=0.8)
    settings: dict[str, Any] = {
        "model": "policy",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.9,
        "top_p": 0.8,
        "max_tokens": 12,
        "seed": 7,
    }
    assert client.chat.completions.create(**settings).choices[0].message.content == text_of(
        loaded, ids
    )
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(delta or "" for delta in deltas) == text_of(loaded, ids)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage and usage.completion_tokens == len(ids)


def test_several_choices_differ_and_the_first_is_the_only_one_of_n_1(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "sft", "prompt": "the river", "max_tokens": 8, "seed": 3}
    three = client.completions.create(**settings, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len({choice.text for choice in three.choices}) == 3
    one = client.completions.create(**settings)
    assert one.choices[0].text == three.choices[0].text
    assert three.usage and one.usage and three.usage.prompt_tokens == one.usage.prompt_tokens


def test_logprobs_are_those_of_the_training_forward_pass(client: OpenAI, loaded: LoadedRun) -> None:
    answer = client.chat.completions.create(
        model="policy", messages=ASK, temperature=0.7, seed=7, logprobs=True, top_logprobs=3,
        max_tokens=10, extra_body={"return_token_ids": True},
    )  # fmt: skip
    choice: Any = answer.choices[0]
    answerer = Answerer(loaded, "policy")
    prompt = answerer.render(ASK)
    assert choice.prompt_token_ids == prompt
    own = answerer.logprobs([prompt], [choice.token_ids], 0.7)[0]
    content = choice.logprobs.content
    assert [one.logprob for one in content] == pytest.approx(own, abs=1e-4)
    for one in content:
        values = [other.logprob for other in one.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert one.logprob <= values[0] + 1e-6


def test_completions_of_texts_and_of_ids_agree(client: OpenAI, loaded: LoadedRun) -> None:
    tokenizer = loaded.tokenizer
    texts = ["the river", "Anna walks"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    settings: dict[str, Any] = {"model": "base", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    by_text = client.completions.create(prompt=texts, **settings)
    by_ids = client.completions.create(prompt=ids, **settings)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    first = by_text.choices[0].logprobs
    assert first is not None and first.tokens and first.top_logprobs and first.token_logprobs
    assert len(first.tokens) == len(first.token_logprobs) == len(first.top_logprobs)
    assert all(len(top) == 2 for top in first.top_logprobs)


def test_a_completion_is_its_tokens_and_keeps_its_first_space(client: OpenAI) -> None:
    spaced = 0
    for prompt in ("the river", "Anna", "Why"):
        settings: dict[str, Any] = {"model": "base", "prompt": prompt, "temperature": 2, "seed": 1}
        made = client.completions.create(**settings, n=60, max_tokens=3, logprobs=1).choices
        for choice in made:
            log = choice.logprobs
            assert log is not None and log.tokens and log.text_offset
            if choice.finish_reason == "length" and "\ufffd" not in "".join(log.tokens):
                assert choice.text == "".join(log.tokens)
                assert log.text_offset == [len("".join(log.tokens[:i])) for i in range(3)]
                spaced += choice.text.startswith(" ")
        stopped = client.completions.create(**settings, n=60, max_tokens=3, stop=[" "]).choices
        assert [c.text for c in stopped] == [c.text.split(" ")[0] for c in made]
    assert spaced


@pytest.mark.parametrize("begun", ["the river ", "Anna", "a garden. The"])
def test_a_begun_answer_is_continued_as_generate_does(
    client: OpenAI, loaded: LoadedRun, begun: str
) -> None:
    messages = [*ASK, {"role": "assistant", "content": begun}]
    answerer, numbers = Answerer(loaded, "policy"), random_numbers(0, 0, 0, 24)[None]
    (own,) = answerer.answer([messages], numbers, Sampling(24, temperature=0.0), [], 1, False)
    asked: dict[str, Any] = {"model": "policy", "messages": messages, "temperature": 0}
    asked |= {"max_tokens": 24, "extra_body": CONTINUE}
    create: Any = client.chat.completions.create
    answer = create(**asked)
    text = "".join(stream_text(loaded.tokenizer, own.ids, continues=True))
    assert answer.choices[0].message.content == text
    chunks = create(**asked, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    drawn = asked | {"temperature": 100, "max_tokens": 1, "n": 128}
    several = [create(**drawn, seed=seed).choices for seed in range(4)]
    texts = [choice.message.content or "" for choices in several for choice in choices]
    assert any(text.startswith(" ") for text in texts)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "policy", "prompt": "the river", "temperature": 0}
    whole = client.completions.create(**settings, max_tokens=20).choices[0].text
    stop = whole[len(whole) // 2 :][:2]
    cut = client.completions.create(**settings, max_tokens=20, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    streamed = client.completions.create(**settings, max_tokens=20, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text


def test_64_streams_of_mixed_models_at_once_equal_their_solo_answers(client: OpenAI) -> None:
    numbered = [f"{text} {number} times" for number in range(11) for text in TEXTS][:64]
    asked = [(("base", "sft", "policy")[i % 3], text) for i, text in enumerate(numbered)]
    alone, together = {}, {}

    def ask(model: str, text: str, into: dict[tuple[str, str], str]) -> None:
        message: Any = {"role": "user", "content": text}
        chunks = client.chat.completions.create(
            model=model, messages=[message], temperature=0, stream=True, max_tokens=16
        )
        into[model, text] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    for model, text in asked:
        ask(model, text, alone)
    threads = [threading.Thread(target=ask, args=(*pair, together)) for pair in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert together == alone and len(alone) == 64 and len(set(alone.values())) > 20


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "'gpt-4' does not exist; loaded: base, sft"),
        ({"model": "../../etc/passwd"}, openai.NotFoundError, "does not exist"),
        ({"model": "reward"}, openai.BadRequestError, "use /v1/score"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": ASK + ASK}, openai.BadRequestError, "message 1 has role 'user'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "the prompt leaves"),
        ({"frequency_penalty": 1.5}, openai.BadRequestError, "frequency_penalty: not supported"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools: not supported"),
        ({"extra_body": {"beams": 3}}, openai.BadRequestError, "beams: unknown argument"),
        ({"messages": SAID}, openai.BadRequestError, "own: .* continued .continue_final_message"),
        ({"extra_body": CONTINUE}, openai.BadRequestError, "message 0 is not the assistant"),
        ({"messages": [*ASK, {"role": "assistant", "content": " "}], "extra_body": CONTINUE},
         openai.BadRequestError, "message 1 is empty"),
        ({"n": 10**4}, openai.BadRequestError, "n: "),
        ({"messages": [{"role": "user", "content": "a" * 40_000}]}, openai.BadRequestError,
         "context has 256"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_openai_s_way(
    client: OpenAI, changes: dict[str, Any], error: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": "policy", "messages": ASK} | changes))
    assert re.search(message, caught.value.message)
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}


# --- what is not OpenAI's ------------------------------------------------------------------------


def test_adapters_come_and_go(url: str, run: RunFolder) -> None:
    prompt = {"prompt": "the river", "temperature": 0, "max_tokens": 8}
    extra, sft = str(run.root / "extra"), str(run.sft_adapter)
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

    def told_by(name: str) -> str:
        status, body = post(url, "/v1/completions", {"model": name, **prompt})
        assert status == 200, body
        return body["choices"][0]["text"]

    told = post(url, load, {"lora_name": "new.1", "lora_path": extra})
    assert told == (200, "Success: LoRA adapter 'new.1' added successfully.")
    assert told_by("new.1") == told_by("policy")
    status, body = post(url, load, {"lora_name": "new.1", "lora_path": sft})
    assert status == 400 and "has already been loaded" in body["error"]["message"]
    inplace = {"lora_name": "new.1", "lora_path": sft, "load_inplace": True}
    assert post(url, load, inplace)[0] == 200
    assert told_by("new.1") == told_by("sft") != told_by("policy")
    assert post(url, load, {"lora_name": "new.2", "lora_path": extra})[0] == 200
    status, body = post(url, load, {"lora_name": "new.3", "lora_path": extra})
    assert status == 400 and "unload one first" in body["error"]["message"]
    for name in ("new.1", "new.2"):
        told = post(url, unload, {"lora_name": name})
        assert told == (200, f"Success: LoRA adapter '{name}' removed successfully.")
    assert post(url, unload, {"lora_name": "new.1"})[0] == 404
    assert post(url, "/v1/completions", {"model": "new.1", **prompt})[0] == 404
    assert post(url, unload, {"lora_name": "policy"})[0] == 400


@pytest.mark.parametrize(
    "path",
    ["/etc", "..", "{run}/../..", "{run}/extra/adapter_model.safetensors", "a\0b", "{run}/backbone",
     "{run}/reward/adapter", "x" * 4000],
)  # fmt: skip
def test_adapters_come_only_from_below_the_root_and_nothing_is_leaked(
    url: str, run: RunFolder, path: str
) -> None:
    asked = path.replace("{run}", str(run.root))
    status, body = post(url, "/v1/load_lora_adapter", {"lora_name": "evil", "lora_path": asked})
    assert status == 400
    message = body["error"]["message"]
    assert message.startswith("lora_path: ") and str(run.root) not in message
    assert "/usr" not in message and "passwd" not in message


@pytest.mark.parametrize("key", ["use_rslora", "use_dora", "alpha_pattern"])
def test_an_adapter_of_other_arithmetic_is_not_served(
    url: str, run: RunFolder, tmp_path: Path, key: str
) -> None:
    folder = run.root / "other_arithmetic" / key
    shutil.copytree(run.root / "extra", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = config | {key: {"q_proj": 3} if key == "alpha_pattern" else True}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    asked = {"lora_name": "other", "lora_path": str(folder)}
    status, body = post(url, "/v1/load_lora_adapter", asked)
    assert status == 400 and f"the folder/adapter_config.json: {key} is" in body["error"]["message"]


def test_a_link_out_of_the_root_is_not_followed(url: str, run: RunFolder, tmp_path: Path) -> None:
    outside = tmp_path / "good_adapter"
    shutil.copytree(run.root / "extra", outside)
    (run.root / "way_out").symlink_to(outside)
    for path in (run.root / "way_out", outside):
        asked = {"lora_name": "x", "lora_path": str(path)}
        status, body = post(url, "/v1/load_lora_adapter", asked)
        assert status == 400 and str(tmp_path) not in body["error"]["message"]


def test_scores_and_log_ratios(url: str, loaded: LoadedRun) -> None:
    talk = [*ASK, {"role": "assistant", "content": "the queen"}]
    status, told = post(url, "/v1/score", {"conversations": [talk, [*talk[:1], talk[1]]]})
    assert status == 200
    answerer = Answerer(loaded, "policy")
    prompt = answerer.render(ASK)
    from chatllama.text.chat_format import render

    whole = render(loaded.tokenizer, loaded.chat, talk).ids
    own = answerer.scores([whole])[0]
    assert [one["score"] for one in told["data"]] == pytest.approx([own, own], abs=1e-5)
    status, told = post(url, "/v1/token_kl", {"model": "policy", "messages": talk})
    assert status == 200 and told["reference"] == "sft"
    answer = whole[len(prompt) :]
    policy = answerer.logprobs([prompt], [answer], 1.0)[0]
    sft = Answerer(loaded, "reference").logprobs([prompt], [answer], 1.0)[0]
    assert [t["kl"] for t in told["tokens"]] == pytest.approx(
        [p - q for p, q in zip(policy, sft, strict=True)], abs=1e-5
    )
    assert told["kl"] == pytest.approx(sum(policy) - sum(sft), abs=1e-4)
    for token in told["tokens"]:  # parts of characters, too, can be put together from these
        assert bytes(token["bytes"]).decode(errors="replace") == token["text"]
    status, told = post(url, "/v1/score", {"messages": ASK})
    assert status == 400 and "end with the assistant's answer" in told["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(url: str, stream: bool) -> None:
    before = metric(url, "disconnects_total")
    body = {"model": "base", "prompt": "the", "max_tokens": 200, "n": 64, "stream": stream,
            "stop_token_ids": []}  # fmt: skip
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    if stream:
        connection.getresponse().read(10)
    else:
        time.sleep(0.3)
    connection.close()
    deadline = time.monotonic() + 60
    while metric(url, "running") + metric(url, "waiting") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A client that left before the end is counted, unless the answer was ready first.
    assert metric(url, "disconnects_total") >= before


def test_the_page_is_told_what_to_show_first(url: str, run: RunFolder) -> None:
    with urllib.request.urlopen(f"{url}/v1/run", timeout=30) as response:
        told = json.loads(response.read())
    assert told["run"] == run.root.name and told["examples"] == [] and told["knows"] is None
    assert told["votes"] == 0


def test_votes_are_kept_and_given_back(url: str, run: RunFolder) -> None:
    vote = {"messages": ASK, "answers": ["a river", "a garden"], "models": ["sft", "policy"]}
    assert (
        post(url, "/v1/votes", {**vote, "verdict": "b", "reason": " more green "})[1]["votes"] == 1
    )
    assert post(url, "/v1/votes", {**vote, "verdict": "both_bad"})[1]["votes"] == 2
    for wrong in ({"answers": ["x", "x"]}, {"answers": ["x", " "]}, {"verdict": "c"},
                  {"messages": [*ASK, {"role": "assistant", "content": "x"}]}):  # fmt: skip
        assert post(url, "/v1/votes", {**vote, "verdict": "a"} | wrong)[0] == 400
    with urllib.request.urlopen(f"{url}/v1/votes", timeout=30) as response:
        assert "attachment" in response.headers["content-disposition"]
        lines = [json.loads(line) for line in response.read().splitlines()]
    assert (run.root / "votes.jsonl").read_text().count("\n") == len(lines) == 2
    assert lines[0]["answers"] == ["a garden", "a river"] and lines[0]["ranks"] == [0, 1]
    assert lines[0]["models"] == ["policy", "sft"] and lines[0]["reason"] == "more green"
    assert lines[1]["ranks"] == [0, 0] and lines[1]["verdict"] == "both_bad"
