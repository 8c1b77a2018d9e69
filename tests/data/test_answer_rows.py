"""Answers behind one copy of their prompt: the rows by hand, and scores and gradients as alone."""

from typing import Any

import pytest
import torch
from tiny_models import FORMS, tiny_llama

from chatllama.config.model import LoraSection
from chatllama.config.schema import Config
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters
from chatllama.model.scoring import score_sequences, score_shared, visible
from data.batches import PreferenceCollator, SharedPromptCollator
from trainers.reward import evaluate as reward_scores


def example(prompt: list[int], *answers: list[int]) -> dict[str, Any]:
    return {
        "answer_ids": [prompt + answer for answer in answers],
        "prompt_length": len(prompt),
        "ranks": list(range(len(answers))),
        "ratings": [0.0] * len(answers),
    }


EXAMPLES = [
    example([1, 10], [20, 21], [30]),
    example([1], [40], [50, 51, 52, 53, 54, 55]),
    example([1, 11, 12], [60], [61, 62]),
]


def test_rows_by_hand():
    rows, pairs = SharedPromptCollator(pad_id=0, max_length=20)(EXAMPLES)
    # The longest, 1 + 1 + 6 tokens, sets the width; the others have 6 and 5.
    assert rows.tokens.tolist() == [
        [1, 40, 50, 51, 52, 53, 54, 55],
        [1, 11, 12, 60, 61, 62, 0, 0],
        [1, 10, 20, 21, 30, 0, 0, 0],
    ]
    assert rows.positions.tolist() == [
        [0, 1, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 3, 4, 0, 0],
        [0, 1, 2, 3, 2, 0, 0, 0],
    ]
    assert rows.prompts.tolist() == [[0] * 8, [1] * 6 + [-1] * 2, [2] * 5 + [-1] * 3]
    assert rows.answers.tolist() == [
        [-1, 2, 3, 3, 3, 3, 3, 3],
        [-1, -1, -1, 4, 5, 5, -1, -1],
        [-1, -1, 0, 0, 1, -1, -1, -1],
    ]
    assert rows.ends.tolist() == [19, 20, 1, 7, 11, 13]
    assert pairs.better.tolist() == [0, 2, 4] and pairs.worse.tolist() == [1, 3, 5]


def test_short_examples_fill_the_rows_of_long_ones():
    long = example([1], [2] * 9, [3] * 4)
    rows, _ = SharedPromptCollator(0, 20)([EXAMPLES[0], EXAMPLES[2], long])
    assert rows.tokens.shape == (2, 14)  # 14, and 6 + 5
    assert (rows.prompts >= 0).sum() == 25


def test_a_row_is_never_longer_than_the_longest_sequence_may_be():
    rows, _ = SharedPromptCollator(0, 7)([EXAMPLES[1]])
    assert rows.tokens.tolist() == [[1, 50, 51, 52, 53, 54, 55], [1, 40, 0, 0, 0, 0, 0]]
    assert rows.ends.tolist() == [8, 6]


def test_tokens_of_an_example_are_those_that_are_computed():
    # a prompt of one token with answers of 1 and 6; split, it stands twice
    assert SharedPromptCollator(0, 8).num_tokens(EXAMPLES[1]) == 8
    assert SharedPromptCollator(0, 7).num_tokens(EXAMPLES[1]) == 9
    assert PreferenceCollator(0).num_tokens(EXAMPLES[1]) == 9


def test_what_sees_what_by_hand():
    prompts = torch.tensor([[0, 0, 0, 0, 1, 1]])
    answers = torch.tensor([[-1, 0, 0, 1, -1, 2]])
    assert visible(prompts, answers)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def role_model(attention: str, form: str) -> RoleModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = tiny_llama(form=form)
        llama.set_attn_implementation(attention)
        adapter = Adapter(LoraSection(r=4, alpha=8.0), trainable=True)
        model = RoleModel(llama, {"reward": adapter}, ("reward",))
        for parameter in adapter_parameters(model, "reward"):
            parameter.data.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("attention", "form"), [("eager", "llama"), *(("sdpa", form) for form in FORMS)]
)
@pytest.mark.parametrize("max_length", [8, 20])
def test_scores_and_gradients_are_those_of_whole_sequences(
    attention: str, form: str, max_length: int
):
    model = role_model(attention, form)
    found = []
    (tokens, mask), _ = PreferenceCollator(0)(EXAMPLES)
    rows, _ = SharedPromptCollator(77, max_length)(EXAMPLES)  # padding is never seen
    for scores in (score_sequences(model, tokens, mask), score_shared(model, *rows)):
        model.zero_grad()
        (scores * torch.arange(1.0, 7.0)).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([scores.detach(), *gradients])
    assert found[0][0].std() > 0.05 and len(found[0]) == 2 * 14 + 2
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)


def test_flash_attention_gets_whole_sequences():
    section = {"run_dir": "r", "backbone": {"path": "p", "attn_implementation": "sdpa"}}
    assert isinstance(
        reward_scores.collator_for(Config.model_validate(section), 0), SharedPromptCollator
    )
    section["backbone"] = {"path": "p", "attn_implementation": "flash_attention_2"}
    assert isinstance(
        reward_scores.collator_for(Config.model_validate(section), 0), PreferenceCollator
    )
