"""Reward models of other families, and servers that score."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import sample_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from chatllama.config.ppo import RewardSource
from chatllama.serving.schema import ScoreRequest
from trainers.functions.sample import Sample
from trainers.ppo.terms.models import ClassifierModel
from trainers.ppo.terms.remote import CONVERSATIONS, ScoreServers

WORDS = ["[PAD]", "[UNK]", "<user>", "<assistant>", "what", "is", "it", "a", "river", "garden"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
SAMPLES = [
    sample_of("what is it", "a river"),
    sample_of("it", "garden garden a river is it what"),
    sample_of("what", "a"),
]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("$A", "$A:0 $B:1", [])
    names = ["input_ids", "attention_mask", *([] if template else ["token_type_ids"])]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=24,
        model_input_names=names,
    )
    fast.chat_template = template
    return fast


def save(folder: Path, family: str, labels: int = 1) -> str:
    """A tiny random reward model of a family, in a folder."""
    torch.manual_seed(3)
    common: dict[str, Any] = {"vocab_size": len(WORDS), "num_labels": labels, "pad_token_id": 0}
    if family == "bert":
        model: Any = BertForSequenceClassification(
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, max_position_embeddings=24, initializer_range=0.5,
                       **common)
        )  # fmt: skip
    else:
        model = GPT2ForSequenceClassification(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=24, initializer_range=0.5,
                       **common)
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer(None if family == "bert" else TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_model_of_another_family_reads_texts_its_own_way(tmp_path: Path, family: str) -> None:
    folder = save(tmp_path, family)
    judge = ClassifierModel(folder, "ppo.rewards.0.model", batch_size=2)
    plain: Any = {"gpt2": GPT2ForSequenceClassification, "bert": BertForSequenceClassification}
    model = plain[family].from_pretrained(folder).eval()
    expected: list[float] = []
    for sample in SAMPLES:  # by hand, one at a time
        text = f"<user> {sample.prompt} <assistant> {sample.response}"
        words = text.split() if family == "gpt2" else f"{sample.prompt} {sample.response}".split()
        ids = torch.tensor([[WORDS.index(word) for word in words]])
        types = torch.zeros_like(ids)
        types[:, len(sample.prompt.split()) :] = 1
        more = {} if family == "gpt2" else {"token_type_ids": types}
        with torch.no_grad():
            expected.append(float(model(ids, **more).logits[0, 0]))
    assert len({round(score, 3) for score in expected}) == 3
    assert judge.values(SAMPLES) == pytest.approx(expected, abs=1e-5)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    two = save(tmp_path / "two", "gpt2", labels=2)
    with pytest.raises(ValueError, match=r"rewards\.3\.model: .* gives 2 numbers"):
        ClassifierModel(two, "ppo.rewards.3.model", 2)
    with pytest.raises(ValueError, match=r"rewards\.3\.model: .*nothing.* cannot be loaded"):
        ClassifierModel(str(tmp_path / "nothing"), "ppo.rewards.3.model", 2)
    one = save(tmp_path / "one", "gpt2")
    weights = tmp_path / "one" / "model.safetensors"
    judge = ClassifierModel(one, "k", 2)
    with pytest.raises(ValueError, match=r"a\.jsonl:7 .*: 44 tokens, and the reward .* reads 24"):
        judge.values([sample_of("what", "a river " * 20 + "a")])
    tensors = load_file(weights)
    del tensors["score.weight"]  # a language model that is told to have one label
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"k: .* no weights for score\.weight, which"):
        ClassifierModel(one, "k", 2)


@contextmanager
def serving(status: int = 200, body: bytes | None = None) -> Iterator[tuple[str, list[int]]]:
    """A server that scores an answer by its length; its address, and the sizes of its requests."""
    sizes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            asked = ScoreRequest.model_validate_json(content)  # what `chatllama serve` takes
            assert self.path == "/v1/score" and asked.conversations is not None
            sizes.append(len(asked.conversations))
            lengths = [float(len(str(each[-1].content))) for each in asked.conversations]
            data = [{"index": i, "score": score} for i, score in enumerate(lengths)][::-1]
            answer = json.dumps({"data": data}).encode() if body is None else body
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sizes
    finally:
        server.shutdown()


def many(count: int) -> list[Sample]:
    return [sample_of("q", "x" * (n + 1)) for n in range(count)]


def test_servers_share_the_answers_and_take_over_from_one_that_fails() -> None:
    count = 2 * CONVERSATIONS + 3
    with serving() as (good, sizes), serving(400, b"{}") as (bad, _), serving() as (other, more):
        judge = ScoreServers(RewardSource(urls=[good, f"{other}/v1"]))
        assert judge.values(many(count)) == [float(n + 1) for n in range(count)]
        assert sum(sizes) + sum(more) == count and sizes and more
        judge = ScoreServers(RewardSource(urls=[bad, good]))
        assert judge.values(many(count)) == [float(n + 1) for n in range(count)]


@pytest.mark.parametrize("body", [b"no json", b"{}", b'{"data": []}', b'{"data": [{"index": 0}]}'])
def test_a_server_that_gives_no_scores_is_named(body: bytes) -> None:
    with serving(200, body) as (url, _):
        judge = ScoreServers(RewardSource(urls=[url]))
        with pytest.raises(ValueError, match=rf"scored a\.jsonl:7 .*{url}/v1/score gives no sco"):
            judge.values(many(1))
