"""`make real`: its data, rewards, plan and page, without the real model."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports what lies in benchmarks."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module


def reviews(real_data: Any) -> list[Any]:
    """Made-up sentences, half of them positive; many begin alike."""
    return [
        real_data.Review(f"{who} film {n} was surely {word} {'indeed ' * (n % 3)}.", word == "good")
        for who in ("this", "that", "our", "any")
        for n in range(40)
        for word in ("good", "bad")
    ]


def test_reviews_read_alike_from_both_layouts(
    module: Any, tmp_path: Path, data_cache: None
) -> None:
    real_data = module("real_data")
    good = ["caf\xe9 of joy , a treat for us all", "a warm and happy tale of two friends"]
    bad = ["a dull and empty tale of two foes", "too short"]
    (tmp_path / "rt-polarity.pos").write_text("\n".join(good), "latin-1")
    (tmp_path / "rt-polarity.neg").write_text("\n".join(bad), "latin-1")
    file = tmp_path / "reviews.jsonl"
    rows = [{"text": t + " ", "label": 1} for t in good] + [{"text": t, "label": 0} for t in bad]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = real_data.read_reviews(str(tmp_path))
    assert found == real_data.read_reviews(str(file))
    assert [(r.text, r.positive) for r in found] == sorted(
        [(good[0], True), (good[1], True), (bad[0], False)]
    )


def test_pairs_are_of_one_opening_and_use_a_sentence_once(module: Any) -> None:
    real_data = module("real_data")
    given = reviews(real_data)
    made = real_data.pairs(given, 1000, seed=0)
    label = {review.text: review.positive for review in given}
    used = []
    for pair in made:
        opening = pair["prompt"].removeprefix(real_data.request(""))
        good, bad = (f"{opening} {pair[side]}" for side in ("chosen", "rejected"))
        assert label[good] and not label[bad]
        used += [good, bad]
    assert len(made) > 100 and len(set(used)) == len(used)
    assert {r.part for r in given} == set(real_data.PARTS)


def test_harmless_pairs_share_no_opening(module: Any, tmp_path: Path, data_cache: None) -> None:
    rows = [
        {
            side: f"\n\nHuman: ask {n // 2}\n\nAssistant: {side} {n}"
            for side in ("chosen", "rejected")
        }
        for n in range(200)
    ]
    rows.append({"chosen": "\n\nHuman: long\n\nAssistant: " + "x" * 900, "rejected": ""})
    file = tmp_path / "hh.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    train, held = module("real_data").harmless(str(file), 1000, 1000)
    opening = lambda pair: pair["chosen"].partition("Assistant")[0]  # noqa: E731
    assert len(train) + len(held) == 200 and len(held) > 20
    assert not {*map(opening, train)} & {*map(opening, held)}


def test_sums_are_right_and_each_once(module: Any) -> None:
    made = module("real_rewards").sums(3, 500)
    assert len({item["prompt"] for item in made}) == 500
    for item in made:
        left, _, right = item["prompt"].removeprefix("What is ").removesuffix("?").split()
        assert int(item["answer"]) == int(left) + int(right)


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [("12", "12", 1.0), ("It is -3.", "-3", 1.0), ("1 + 2 is 3", "3", 1.0), ("3 or 4", "3", 0.0),
     ("", "3", 0.0), ("none", "3", 0.0), ("13", "3", 0.0)],
)  # fmt: skip
def test_a_sum_is_right_by_its_last_number(
    module: Any, response: str, answer: str, score: float
) -> None:
    assert module("real_rewards").right("What?", response, answer) == score


@pytest.mark.parametrize(
    ("checks", "value", "good", "bad"),
    [
        ("lower", "", "a b, c.", "a B"),
        ("upper", "", "A B", "A b"),
        ("no_comma", "", "a b", "a, b"),
        ("at_most", "2", "a b.", "a b c"),
        ("at_least", "3", "a b c", "a b"),
        ("keyword", "water", "Water is wet.", "waters"),
        ("forbidden", "the", "other", "The sea"),
        ("quotation", "", '"a b"', '"a b" c'),
        ("ending", "That is all.", "x. That is all. ", "That is all, folks"),
        ("json", "", '{"a": 1}', '"a"'),
    ],
)
def test_constraints_are_checked(module: Any, checks: str, value: str, good: str, bad: str) -> None:
    followed = module("real_rewards").followed
    assert followed("?", good, [checks], [value]) == 1.0
    assert followed("?", bad, [checks], [value]) == 0.0
    assert followed("?", " ", [checks], [value]) == 0.0
    assert followed("?", good, [checks, "ending"], [value, "zzz"]) == 0.5


def test_constraints_of_both_parts_have_other_topics(module: Any) -> None:
    constraints = module("real_rewards").constraints
    topics = [
        {item["prompt"].split(".")[0] for item in constraints(1, held, 300)} for held in (0, 1)
    ]
    assert not topics[0] & topics[1]


def test_the_plan_names_each_step_once_and_knows_its_settings(module: Any) -> None:
    real = module("real_plan")
    gpu = (*real.settings_of(real.CONFIGS / "gpu.yaml"),)
    assert "backbone.dtype=bfloat16" in gpu and "ppo.rollout_batch_size=128" in gpu
    whole, few = (list(real.steps([0, 1], real.PLACES, more)) for more in (gpu, real.SHRUNK))
    names = [step.done for step in whole]
    assert len(set(names)) == len(names) == len(few)
    here = {step.done.name for step in real.steps([0, 1], real.PLACES, ())}
    assert {step.done.name for step in few} == here
    assert not {name for name in here if "seed" in name} & {name.name for name in names}
    for step in whole:
        for key in ("run_dir=", "seed="):
            assert sum(word.startswith(key) for word in step.words) <= 1, step
    for step in few:  # a section without data takes no settings, and the last one counts
        lasting = dict(word.split("=", 1) for word in step.words if word.startswith("ppo.steps="))
        assert lasting in ({}, {"ppo.steps": "2"}), step
        task = next((w for w in step.words if w.endswith(".yaml")), "")
        assert not ("sums" in task and "reward." in str(step.words)), step
        assert not ("constraints" in task and "sft." in str(step.words)), step
    ppo = next(step for step in whole if step.name == "gpu-seed-1/sentiment/ppo")
    assert {"seed=1", *gpu} <= set(ppo.words)
    judges = next(step for step in whole if step.name == "gpu-seed-1/judges")
    assert "HuggingFaceTB/SmolLM2-1.7B-Instruct" in judges.words


def test_a_step_is_done_once_its_very_command_has_succeeded(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module("real")
    monkeypatch.setattr(module("real_plan"), "HOME", tmp_path)
    (tmp_path / "done").mkdir()
    gate = tmp_path / "result.json"

    def step(code: str, gate: Path | None = None) -> Any:
        return real.Step("a b/c", [sys.executable, "-c", code], 1.0, gate=gate)

    def run(which: Any) -> bool:
        which.done.unlink(missing_ok=True)
        return real.work(real.View([which], 1)) is None

    assert not run(step("print('oh'); raise SystemExit(3)"))
    assert real.log(step("")).read_text() == "oh\n"
    assert not step("raise SystemExit(3)").is_done()
    gate.write_text('{"accuracy_low": 0.6}')
    assert not run(step("raise SystemExit(4)", gate))
    gate.write_text('{"accuracy_low": 0.5}')
    assert run(step("raise SystemExit(4)", gate))
    busy = step("sum(range(10**7))")
    assert run(busy)
    assert busy.is_done() and not step("pass").is_done()
    changed = real.replace(busy, files=[gate])
    assert not changed.is_done()
    assert not real.replace(busy, after=[changed]).is_done()
    gate.write_text('{"step": 1}')
    resumed = real.replace(step("import sys; print(sys.argv[1:])"), metrics=gate, start="sft")
    for printed in ("['--from', 'sft']\n", "['--resume']\n"):
        real.log(resumed).unlink()
        assert run(resumed) and real.log(resumed).read_text() == printed
    gate.unlink()
    new = real.replace(resumed, files=[Path(__file__)])
    real.log(new).unlink()
    assert run(new) and real.log(new).read_text() == "[]\n"
    for code, kept in (("pass", False), ("pass", True), ("1", False)):
        gate.with_name("answers").write_text("old")
        assert run(real.replace(step(code), out=gate.with_name("answers")))
        assert gate.with_name("answers").exists() == kept
    folder = tmp_path / "model"
    folder.mkdir()
    assert run(real.replace(step("1"), out=folder)) and not folder.exists()
    assert run(busy)
    record = json.loads(busy.done.read_text())
    assert record["cpu_seconds"] > 0 and record["largest_process_mib"] > 0


def test_steps_run_beside_one_another_once_their_inputs_are_there(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = module("real"), tmp_path
    monkeypatch.setattr(module("real_plan"), "HOME", folder)
    (folder / "done").mkdir()
    wait = f"""
import pathlib, time
here = pathlib.Path({str(folder)!r})
end = time.monotonic() + 30
(here / ME).touch()
while not (here / OTHER).exists():
    assert time.monotonic() < end
    time.sleep(0.05)
"""

    def step(name: str, code: str, *after: Any) -> Any:
        return real.Step(name, [sys.executable, "-c", code], 1.0, after=after)

    met = [step(me, wait.replace("ME", repr(me)).replace("OTHER", repr(other)))
           for me, other in (("one", "two"), ("two", "one"))]  # fmt: skip
    last = step(
        "last", f"import pathlib; assert pathlib.Path({str(folder)!r}, 'two').exists()", *met
    )
    view = real.View([last, *met], 2)
    assert [each.name for each in view.ready()] == ["one", "two"]
    assert real.work(view) is None and view.done == {"one", "two", "last"}
    slow = step("slow", "import time; time.sleep(60)")
    bad = step("bad", "raise SystemExit(1)")
    assert real.work(real.View([slow, bad, step("never", "1", bad)], 2)) == bad
    assert not slow.is_done() and not (folder / "done" / "never.begun").exists()


def test_perplexity_does_not_depend_on_who_shares_a_batch(
    module: Any, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    answers = [("the river", "is long and wide"), ("a", "b"), ("the sun over the hills", "")]
    perplexity = module("real_judges").perplexity
    alone, together = (perplexity(folder, answers, rows) for rows in (1, 3))
    assert alone == pytest.approx(together, rel=1e-5)
    assert 1 < alone != perplexity(folder, answers[:2][::-1][:1])


def test_a_program_judges_the_mean_of_a_records_answers(module: Any, tmp_path: Path) -> None:
    final = tmp_path / "final.jsonl"
    records = [{"prompt": "1?", "answer": "1"}, {"prompt": "2?", "answer": "2"}]
    final.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "answers").mkdir()
    rows = [{"id": i, "prompt": f"{i}?", "response": r} for i, r in ((1, "2"), (0, "2"), (1, "3"))]
    file = tmp_path / "answers" / "sft.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judges = module("real_judges")
    assert judges.check(tmp_path, final, judges.right)["sft"]["reward"] == [0.0, 0.5]


def test_the_page_holds_what_the_judges_said(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = module("real_table")
    method = {"lexicon": [0.0, 0.2], "classifier": [0.1, 0.1], "perplexity": 120.4}
    method |= {"distinct_2": 0.9, "ends": [True, False], "words": [3, 5]}
    method |= {"answers": ["so | so", "fine"], "prompts": ["Continue: a", "Continue: b"]}
    better = method | {"lexicon": [0.5, 0.8]}
    curve = [
        {
            "step": s,
            "kl": [s, s + 1.0],
            "score": [0.1, s],
            "lexicon": [s, 0.1],
            "classifier": [0, s],
        }
        for s in (0, 8)
    ]
    program = {"reward": [0.0, 1.0]}
    judged = {
        "sentiment": {
            "methods": {"base": method, "sft": method, "best-of-16": method, "ppo": better},
            "curves": {"ppo": curve},
        },
        "sums": {who: program for who in ("base", "sft", "ppo", "grpo")},
        "constraints": {who: program for who in ("base", "policy")},
    }
    seed = tmp_path / "seed-4"
    result = {"accuracy": 0.93, "accuracy_low": 0.91, "accuracy_high": 0.95, "num_eval_pairs": 1000}
    share = {"value": 0.61, "low": 0.5, "high": 0.7}
    doctor = {"data": {"held_out": {"longer_preferred": share}, "word_accuracy": share}}
    for folder in (seed / "sentiment" / "ppo" / "reward", seed / "harmless" / "reward"):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "doctor.json").write_text(json.dumps(doctor))
    (seed / "judged.json").write_text(json.dumps(judged))
    for adapter in ("adapter", "previous/adapter"):
        file = seed / "sums" / "ppo" / adapter / "adapter_model.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "done").mkdir()
    done = {"wall_seconds": 90.0, "cpu_seconds": 170.0, "largest_process_mib": 2000}
    (tmp_path / "done" / "seed-4-sums-ppo.json").write_text(json.dumps(done))
    monkeypatch.setattr(sys, "argv", ["real_table.py", str(tmp_path / "real.md"), str(seed)])
    monkeypatch.setattr(table, "version", lambda _: "1.2")
    assert table.main() == 0
    page = (tmp_path / "real.md").read_text()
    assert "0.930 (0.910-0.950) of 1,000 held-out pairs; words alone 0.610" in page
    row = next(line for line in page.splitlines() if line.startswith("| ppo | 0.65"))
    assert "+0.55 (11.0 s.e.)" in row and "| 8.5 ± 0.5 | 120 | 0.90 | 4.0 | 0.50 |" in row
    assert "| grpo | 0.500 ± 0.500, +0.00 |" in page
    assert "so / so" in page and "| sums-ppo | 1.5 | 170 | 2000 |" in page
    assert (tmp_path / "real.png").stat().st_size > 10_000
    adapter = seed / "sums" / "ppo" / "adapter"
    assert "sums/ppo/adapter e3b0c44298fc1c14" in page and "previous" not in page
    # the same from the one file that holds all of a seed
    again = tmp_path / "again" / "real.md"
    again.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["real_table.py", str(again), str(tmp_path / "seed-4.json")])
    adapter.joinpath("adapter_model.safetensors").unlink()
    assert table.main() == 0 and again.read_text() == page
    assert "All seeds" not in page
    # of two seeds
    both = [str(tmp_path / "seed-4.json")] * 2
    monkeypatch.setattr(sys, "argv", ["real_table.py", str(again), *both])
    assert table.main() == 0
    assert (
        "| ppo | 0.65 ± 0.09 | +0.55 (11.0, 11.0) | 0.10 ± 0.00 | +0.00 (-, -) | 1.00, 1.00 |"
    ) in again.read_text()
