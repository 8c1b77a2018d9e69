"""`eval --suite instructions`: metrics by hand and by sacrebleu, losses by plain transformers."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_runs import NEW, TEXTS, make_run
from sacrebleu import corpus_bleu, corpus_chrf

from chatllama import cli
from chatllama.config.model import ChatSection
from chatllama.inference.answerer import Answer
from chatllama.inference.evaluation.instructions import compared, ratio, rouge_l, summary
from chatllama.runtime.jsonl import append_lines, read_lines
from chatllama.text.chat_format import Message, render
from chatllama.text.tokenizer import load_tokenizer


def test_a_mean_over_tokens_has_the_error_of_its_conversations() -> None:
    # 6 nats of 4 tokens: 1.5. Residuals 1 - 1.5 and 5 - 4.5: variance 2 (.25 + .25) = 1, over 4.
    assert ratio([1.0, 5.0], [1, 3]) == pytest.approx((1.5, 0.25))
    assert ratio([2.0, 4.0, 6.0], [1, 2, 3]) == (2.0, 0.0)  # no conversation differs
    assert math.isnan(ratio([1.0], [2])[1])


@pytest.mark.parametrize(
    ("reference", "answer", "rouge"),
    [
        ("The cat sat on the mat.", "the cat on mat", 0.8),  # 4 of 4 and of 6 words
        (" same \n", "same", 1.0),
        ("Кошка спит", "кошка ест", 0.5),
        ("猫が好き", "猫は好き", 0.75),
        ("word", "", 0.0),
    ],
)
def test_rouge_l_is_the_longest_common_subsequence(
    reference: str, answer: str, rouge: float
) -> None:
    found = compared(reference, Answer(answer, [1], finished=True))
    assert found["rouge_l"] == pytest.approx(rouge)
    assert found["exact_match"] == float(rouge == 1)


@pytest.mark.slow
def test_rouge_l_is_that_of_its_library() -> None:
    from absl import logging
    from rouge_score.rouge_scorer import RougeScorer

    # absl's handler has pytest's stream, which it closes when a server configures logging.
    logging.get_absl_handler().python_handler.stream = sys.__stderr__
    draw, scorer = random.Random(0), RougeScorer(["rougeL"])
    for _ in range(200):
        one, two = (" ".join(draw.choices("abcdef", k=draw.randint(1, 12))) for _ in range(2))
        assert rouge_l(one, two) == pytest.approx(scorer.score(one, two)["rougeL"].fmeasure)


def test_summary_counts_what_was_not_answered() -> None:
    pairs = [("the cat sat on the mat", "the cat sat on a mat"), ("a dog", "a dog"), ("x", None)]
    lines = [
        {"loss": 2.0, "correct": 1, "tokens": 2}
        | compared(reference, None if text is None else Answer(text, [1], finished=text == "a dog"))
        for reference, text in pairs
    ]
    found = summary(lines)
    assert (found["items"], found["too_long"], found["unfinished"]) == (3, 1, 1)
    assert (found["loss"], found["accuracy"]) == (1.0, 0.5)
    assert (found["exact_match"], found["exact_match_stderr"]) == pytest.approx((0.5, 0.5))
    answers, references = ["the cat sat on a mat", "a dog"], [[p[0] for p in pairs[:2]]]
    assert found["bleu"] == pytest.approx(corpus_bleu(answers, references).score)
    assert found["chrf"] == pytest.approx(corpus_chrf(answers, references).score)
    assert 0 < found["chrf_stderr"] < 50
    assert "bleu" not in summary(lines[2:])


@pytest.mark.slow
def test_losses_are_those_of_plain_transformers_and_answers_are_greedy(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    run = make_run(tmp_path / "run", tiny_tokenizer_dir)
    messages: list[list[Message]] = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        for text in TEXTS[:4]
    ]
    messages[1].extend(({"role": "user", "content": "and"}, {"role": "assistant", "content": "x"}))
    path = tmp_path / "held.jsonl"
    append_lines(path, [{"messages": each} for each in messages])
    words = ["eval", str(run.root), "--suite", "instructions", "--data", str(path)]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    for role, adapter in (("base", None), ("policy", run.policy_adapter)):
        model: Any = LlamaForCausalLM.from_pretrained(run.backbone, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        total, tokens, correct = 0.0, 0, 0
        folder = run.root / "benchmarks" / "instructions"
        lines = read_lines(folder / f"{role}.jsonl")
        for talk, line in zip(messages, lines, strict=True):
            rendered = render(tokenizer, ChatSection(), talk)
            ids, mask = torch.tensor([rendered.ids]), torch.tensor(rendered.mask)[1:]
            with torch.no_grad():
                logits = model(ids).logits[0, :-1][mask]
            targets = ids[0, 1:][mask]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            correct += int((logits.argmax(1) == targets).sum())
            tokens += len(targets)
            prompt = render(tokenizer, ChatSection(), talk[:-1], add_generation_prompt=True).ids
            greedy = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
            text = str(tokenizer.decode(greedy[0, len(prompt) :], skip_special_tokens=True))
            assert line["answer"] == text.strip()
        found = json.loads((folder / f"{role}.json").read_text())["tasks"]["instructions"]
        assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert found["accuracy"] == correct / tokens
        assert f"{found['loss']:.3f} ± {found['loss_stderr']:.3f}" in shown
    assert found["items"] == 4 and found["unfinished"] > 0
    assert cli.main(words) == 0 and "answers" not in capsys.readouterr().err  # kept
    planted = [{"messages": [*messages[0][:1], {"role": "assistant", "content": "wrong"}]}]
    answer = lines[2]["answer"]
    planted += [{"messages": [*messages[2][:1], {"role": "assistant", "content": answer}]}]
    append_lines(path, planted)
    assert cli.main([*words, "--role", "policy"]) == 0
    found = json.loads((folder / "policy.json").read_text())["tasks"]["instructions"]
    assert (found["items"], found["exact_match"]) == (6, pytest.approx(1 / 6))


def test_what_has_no_held_out_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(f"run_dir: {tmp_path}\nbackbone: {{path: m}}\n")
    words = ["eval", str(tmp_path), "--suite", "instructions"]
    assert cli.main(words) == 2
    assert "the run has no sft.data; give --data FILE" in capsys.readouterr().err
    assert cli.main([*words, "--data", str(tmp_path / "gone")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    assert cli.main([*words, "--shots", "2"]) == 2
    assert "--shots is not for instructions" in capsys.readouterr().err
