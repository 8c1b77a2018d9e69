"""Rollouts: layout, trimming, dealing to ranks, sampling and scoring, against rows taken alone."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import PAD, STOPS, TinyRun, make_prompts, make_stop_tokens

import trainers.ppo.rollout as rollout_module
from chatllama.config.generation import GenerationSection
from chatllama.model.roles import acting_as
from trainers.engine.microbatches import balanced_groups, distribute, microbatches
from trainers.ppo.rollout import Collector, Rollout, arrange, sample_responses, score
from trainers.ppo.train import PpoTrainer

PROMPTS = [[1, 80, 90], [1], [1, 70, 71, 72, 73], [1, 99], [1, 120, 130, 140]]
SEED = (3, 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("rollout"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def trainer(tiny: TinyRun) -> PpoTrainer:
    """Policy and reference differ, as in the middle of a run."""
    trainer = tiny.trainer()
    for name, parameter in trainer.engine.model.named_parameters():
        if ".policy." in name:
            parameter.data += 0.02
    return trainer


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


# --- layout


def test_arranged_by_hand():
    rollout = arrange([[1, 7], [1, 8, 9]], [[5, 6, 2], [4]], stop_ids=[2, 3], pad_id=0)
    assert rollout.tokens.tolist() == [[0, 1, 7, 5, 6, 2], [1, 8, 9, 4, 0, 0]]
    assert rollout.mask.int().tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert rollout.response_mask.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert rollout.finished.tolist() == [True, False]
    assert rollout.lengths.tolist() == [3, 1]
    assert [rollout.response_ids(row) for row in (0, 1)] == [[5, 6, 2], [4]]


def test_a_pad_id_inside_a_text_is_a_token():
    rollout = arrange([[1, 0], [0]], [[0, 2], [0, 0, 2]], stop_ids=[2], pad_id=0)
    assert rollout.mask.sum(1).tolist() == [4, 4]
    assert rollout.response_ids(0) == [0, 2] and rollout.finished.tolist() == [True, True]


def test_kl_is_policy_less_reference():
    numbers = {
        "logprobs": torch.tensor([[-1.0, -2.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0]]),
    }
    rollout = replace(arrange([[1]], [[5, 2]], [2], 0), **numbers)
    assert rollout.kl.tolist() == [[0.5, -1.0]]


def test_select_cuts_only_empty_columns():
    # prompts of 1, 4 and 2 tokens; responses of 3, 1 and 2
    rollout = arrange([[1], [1, 7, 8, 9], [1, 6]], [[11, 12, 2], [13], [14, 2]], [2], 0)
    rollout = replace(rollout, values=torch.arange(9.0).view(3, 3))
    part = rollout.select([0, 2])
    # columns 0 and 1 of the prompts hold nothing for these rows; all of the response does
    assert part.tokens.tolist() == [[0, 1, 11, 12, 2], [1, 6, 14, 2, 0]]
    assert part.mask.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert part.response_mask.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    assert part.values.tolist() == [[0, 1, 2], [6, 7, 8]]
    swapped = rollout.select([2, 1])
    assert swapped.tokens.tolist() == [[0, 0, 1, 6, 14, 2], [1, 7, 8, 9, 13, 0]]
    assert swapped.values.tolist() == [[6, 7], [3, 4]] and swapped.scores.shape == (2,)
    whole = rollout.select(range(3))
    for name, value in rollout.__dict__.items():
        assert torch.equal(whole.__dict__[name], value), name


def test_microbatches_hold_about_equally_many_tokens():
    # prompt and response lengths, together 8, 6, 6, 6, 3, 12, 5 and 10
    lengths = [(2, 6), (5, 1), (1, 5), (4, 2), (2, 1), (6, 6), (3, 2), (5, 5)]
    rollout = arrange([[1] * p for p, _ in lengths], [[7] * r for _, r in lengths], [2], 0)
    # rows 5, 7, 0, 1 begin with 12, 10, 8 and 6; then 2 makes 12 of the 6, 3 makes 14 of the 8,
    # 6 makes 15 of the 10, 4 makes 15 of the first 12
    assert rollout.microbatches(2) == [[5, 4], [7, 6], [0, 3], [1, 2]]
    # one; and for 8 rows of 3 each, three: 12, 10, 8 -> 8 + 6, 10 + 6, 12 + 6, 14 + 5, 16 + 3
    assert rollout.microbatches(8) == [[5, 7, 0, 1, 2, 3, 6, 4]]
    assert rollout.microbatches(3) == [[5, 3], [7, 2, 4], [0, 1, 6]]


def test_microbatches_of_equal_rows_follow_their_order():
    rollout = arrange([[1, 5]] * 5, [[7, 2]] * 5, [2], 0)
    assert rollout.microbatches(2) == [[0, 3], [1, 4], [2]]


# --- dealing


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_items", [1, 4, 7, 12])
def test_every_item_is_dealt_once_and_all_ranks_go_equally_often(
    monkeypatch: pytest.MonkeyPatch, world_size: int, num_items: int
):
    counted, passes = [], []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        dealt = list(distribute(num_items, 2))
        passes.append(len(dealt))
        counted += [item for rows, counts in dealt if counts for item in rows]
        assert all(rows == [0] for rows, counts in dealt if not counts)
    assert sorted(counted) == list(range(num_items))
    assert len(set(passes)) == 1


def test_microbatches_of_a_batch_by_hand(monkeypatch: pytest.MonkeyPatch):
    as_rank(monkeypatch, 1, 2)
    # 9 + 2 | 8 + 3 | 7 + 4 | 6 + 5, of which this rank has the second and the fourth
    assert microbatches([9, 8, 7, 6, 5, 4, 3, 2], 2) == [[1, 6], [3, 4]]


def test_a_long_item_stands_alone_and_no_group_is_empty():
    assert balanced_groups([1, 1, 9, 1], 2) == [[2], [0, 1, 3]]
    assert balanced_groups([5, 90, 5], 3) == [[1], [0], [2]]


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_groups_hold_every_item_once_and_totals_are_near(count: int):
    lengths = torch.empty(40).geometric_(0.05, generator=torch.Generator().manual_seed(count))
    lengths = lengths.int().tolist()
    groups = balanced_groups(lengths, count)
    totals = [sum(lengths[item] for item in group) for group in groups]
    assert sorted(item for group in groups for item in group) == list(range(40))
    assert len(groups) == count and all(groups)
    # the last to join the fullest group found it below the mean
    last = min(lengths[item] for item in groups[totals.index(max(totals))])
    assert max(totals) <= sum(lengths) / count + last


# --- sampling


def sample(
    trainer: PpoTrainer, role: str = "policy", seed: tuple = SEED, **changes: object
) -> list[list[int]]:
    generation = GenerationSection.model_validate({"max_new_tokens": 6, **changes})
    return sample_responses(trainer.engine, role, PROMPTS, generation, STOPS, seed)


def test_responses_stop_at_their_first_stop_token_or_at_the_limit(trainer: PpoTrainer):
    responses = sample(trainer, max_new_tokens=9)
    assert any(r[-1] in STOPS for r in responses) and any(len(r) == 9 for r in responses)
    for response in responses:
        assert not set(response[:-1]) & set(STOPS)
        assert response[-1] in STOPS or len(response) == 9


def test_the_same_seed_repeats_and_another_differs(trainer: PpoTrainer):
    assert sample(trainer) == sample(trainer)
    assert sample(trainer) != sample(trainer, seed=(3, 2))


def test_the_role_and_every_setting_reach_the_sampler(trainer: PpoTrainer):
    plain = sample(trainer)
    assert sample(trainer, "reference") != plain
    assert sample(trainer, temperature=0.3) != plain
    assert max(len(r) for r in sample(trainer, max_new_tokens=3)) == 3
    # one candidate, or a nucleus that holds only the likeliest: greedy whatever the seed
    assert sample(trainer, top_k=1) == sample(trainer, top_p=1e-6, seed=(9, 9)) != plain


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_sampling_does_not_depend_on_its_batch_size(trainer: PpoTrainer, batch_size: int):
    assert sample(trainer, batch_size=batch_size) == sample(trainer)


@pytest.mark.parametrize("deterministic", [False, True])
def test_sampling_may_use_kernels_that_training_may_not(
    trainer: PpoTrainer, monkeypatch: pytest.MonkeyPatch, deterministic: bool
):
    seen: list[bool] = []
    generate = rollout_module.generate

    def observed(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return generate(*args, **kwargs)

    monkeypatch.setattr(rollout_module, "generate", observed)
    torch.use_deterministic_algorithms(deterministic)
    try:
        sample(trainer, "policy")
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_sampling_does_not_depend_on_the_number_of_ranks(
    trainer: PpoTrainer, monkeypatch: pytest.MonkeyPatch, world_size: int
):
    alone = sample(trainer)
    merged: list[list[int]] = [[] for _ in PROMPTS]
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        share = sample(trainer)  # without a process group a rank sees only its own share
        assert [i for i, r in enumerate(share) if r] == list(range(rank, len(PROMPTS), world_size))
        merged = [new or old for new, old in zip(share, merged, strict=True)]
    assert merged == alone


def test_where_weights_stay_split_idle_ranks_sample_along(
    trainer: PpoTrainer, monkeypatch: pytest.MonkeyPatch
):
    # 5 prompts on 2 ranks: rank 1 has only two of its own and goes on while rank 0 samples
    alone, seen = sample(trainer), []
    import trainers.ppo.rollout as rollout_module

    generate = rollout_module.generate

    def spy(llama: object, prompts: list, *args: object, **kwargs: object) -> list:
        seen.append((len(prompts), kwargs["any_running"]))
        return generate(llama, prompts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(rollout_module, "generate", spy)
    monkeypatch.setattr(trainer.engine, "is_zero3", lambda: True)
    monkeypatch.setattr(trainer.engine, "_gather", False)
    monkeypatch.setattr(trainer.engine, "whole_layers", nullcontext)
    as_rank(monkeypatch, 1, 2)
    share = sample(trainer)
    assert seen == [(2, rollout_module.all_any)]
    assert [share[i] for i in (1, 3)] == [alone[i] for i in (1, 3)]
    monkeypatch.setattr(trainer.engine, "is_zero3", lambda: False)
    sample(trainer)
    assert seen[1] == (2, bool)


# --- scoring


@pytest.fixture(scope="module")
def arranged(trainer: PpoTrainer) -> Rollout:
    return arrange(PROMPTS, sample(trainer), STOPS, PAD)


@torch.no_grad()
def expected_row(
    trainer: PpoTrainer, role: str, prompt: list[int], response: list[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of a response that stands alone, by the whole softmax."""
    with acting_as(trainer.engine.model, role):
        logits = trainer.engine.model.llama(torch.tensor([prompt + response])).logits[0]
    rows = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return rows[range(len(response)), response], -(rows.exp() * rows).sum(-1)


@torch.no_grad()
def last_hidden(trainer: PpoTrainer, role: str, ids: list[int]) -> torch.Tensor:
    with acting_as(trainer.engine.model, role):
        return trainer.engine.model.llama.model(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_every_row_alone(
    trainer: PpoTrainer, arranged: Rollout, temperature: float
):
    model = trainer.engine.model
    scored = score(model, arranged, temperature, 2, ["reward"])
    responses = [arranged.response_ids(row) for row in range(len(PROMPTS))]
    for row, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        length = len(response)
        for role, found in (("policy", scored.logprobs), ("reference", scored.ref_logprobs)):
            expected, entropy = expected_row(trainer, role, prompt, response, temperature)
            torch.testing.assert_close(found[row, :length], expected, atol=2e-5, rtol=0)
            if role == "policy":
                torch.testing.assert_close(scored.entropy[row, :length], entropy, atol=2e-5, rtol=0)
        states = last_hidden(trainer, "value", prompt + response)
        values = model.heads["value"](states[len(prompt) - 1 : -1])
        torch.testing.assert_close(scored.values[row, :length], values, atol=2e-5, rtol=0)
        reward = model.heads["reward"](last_hidden(trainer, "reward", prompt + response)[-1])
        torch.testing.assert_close(scored.member_scores[row, 0], reward, atol=2e-5, rtol=0)
        for name in ("logprobs", "ref_logprobs", "entropy", "values"):
            assert not scored.__dict__[name][row, length:].any()
    assert scored.kl.abs().max() > 0.01


@pytest.mark.parametrize("microbatch_size", [1, 3, 5])
def test_scoring_does_not_depend_on_the_microbatch_size(
    trainer: PpoTrainer, arranged: Rollout, microbatch_size: int
):
    pairs = score(trainer.engine.model, arranged, 1.0, 2, ["reward"])
    other = score(trainer.engine.model, arranged, 1.0, microbatch_size, ["reward"])
    for name, value in pairs.__dict__.items():
        torch.testing.assert_close(other.__dict__[name], value, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_all_ranks_add_up_to_the_whole(
    trainer: PpoTrainer, arranged: Rollout, monkeypatch: pytest.MonkeyPatch, world_size: int
):
    whole = score(trainer.engine.model, arranged, 1.0, 2, ["reward"])
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shares.append(score(trainer.engine.model, arranged, 1.0, 2, ["reward"]))
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "member_scores"):
        total = torch.stack([share.__dict__[name] for share in shares]).sum(0)
        assert torch.equal(total, whole.__dict__[name]), name


def test_another_role_can_be_the_one_to_compare_with(trainer: PpoTrainer, arranged: Rollout):
    scored = score(trainer.engine.model, arranged, 1.0, 2, [], reference="base")
    response = arranged.response_ids(2)
    expected, _ = expected_row(trainer, "base", PROMPTS[2], response, 1.0)
    torch.testing.assert_close(scored.ref_logprobs[2, : len(response)], expected, atol=2e-5, rtol=0)
    assert scored.member_scores.shape == (5, 0)


def test_a_collected_rollout_is_scored_on_its_own_texts(trainer: PpoTrainer):
    asked: list[tuple[list[str], list[str]]] = []

    class Spy:
        roles, terms = ("reward",), ()

        def term_scores(self, members: torch.Tensor, samples: list[Any]) -> torch.Tensor:
            asked.append(([x.prompt for x in samples], [x.response for x in samples]))
            assert samples[3].where == "made.jsonl:4" and samples[3].columns == {"number": 3}
            assert samples[3].messages == [{"role": "user", "content": "question 3"}]
            return members[:, :1]

        def total(self, terms: torch.Tensor) -> torch.Tensor:
            return terms[:, 0] * 2

    prompts, stop_tokens = make_prompts().train, make_stop_tokens(trainer.cfg)
    spy: Any = Spy()
    collector = Collector(trainer.engine, spy, stop_tokens, trainer.cfg.generation, 2)
    rollout, texts = collector.collect("reference", prompts.to_list(), SEED)
    expected = sample_responses(
        trainer.engine, "reference", prompts["input_ids"][:], trainer.cfg.generation, STOPS, SEED
    )
    assert [rollout.response_ids(row) for row in range(len(texts))] == expected
    assert asked == [([f"question {n}" for n in range(7)], texts)]
    assert texts == [stop_tokens.decode(response) for response in expected]
    assert torch.equal(rollout.scores, rollout.member_scores[:, 0] * 2)
    # the reference answered, yet log-probabilities are the policy's
    row = expected_row(trainer, "policy", prompts["input_ids"][0], expected[0], 1.0)[0]
    torch.testing.assert_close(rollout.logprobs[0, : len(row)], row, atol=2e-5, rtol=0)


def test_a_stop_token_is_not_part_of_the_text(trainer: PpoTrainer):
    stop_tokens = make_stop_tokens(trainer.cfg, stops=[2])
    ids = stop_tokens.tokenizer.encode("the river", add_special_tokens=False)
    assert stop_tokens.decode([*ids, 2]) == stop_tokens.decode(ids) == "the river"
