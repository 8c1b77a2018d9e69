import gzip
import json
import math
import random
import re
from pathlib import Path

import pytest

from chatllama.config.loader import load_config
from data import garden_notes
from data.garden_notes import gold, split_pairs

PROJECT = Path(__file__).resolve().parents[2]
SAMPLES = PROJECT / "data" / "samples" / "garden_notes"
PROMPT = "Write a note to Rosa about the tulips."
BEST = (
    "Hello Rosa! The tulips look fresh today. We had lovely tulips this year. "
    "I think the tulips are bright. Yours, Moss."
)


def read(name: str, folder: Path = SAMPLES) -> str:
    content = (folder / name).read_bytes()
    return (gzip.decompress(content) if name.endswith(".gz") else content).decode()


def asked_pairs(text: str) -> set[tuple[str, str]]:
    found = re.findall(r" to (\w+) about the (\w+)\.", text)
    assert all(name in garden_notes.NAMES and topic in garden_notes.TOPICS for name, topic in found)
    return set(found)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # name 1 + topic 1 + three cheerful 1.5 + signature 0.5
        (BEST, 4.0),
        # a fourth cheerful adjective earns nothing and costs nothing
        (BEST.replace(" Yours", " This morning the tulips were sweet. Yours"), 4.0),
        # 1 + 1 + 0.5
        ("Hello Rosa! The tulips look fresh today.", 2.5),
        # another name: -1 instead of +1
        ("Hello Otto! The tulips look fresh today.", 0.5),
        # no greeting: the same -1, and the text is still in order
        ("The tulips look fresh today.", 0.5),
        # 1 + 0 - 0.5 (another topic) + 0.5
        ("Hello Rosa! The beans look fresh today.", 1.0),
        # 1 + 1 - 0.5 (gloomy)
        ("Hello Rosa! The tulips look grim today.", 1.5),
        # 1 + 1 + 0.5 - 0.4 (adjective used again)
        ("Hello Rosa! The tulips look fresh today. I think the tulips are fresh.", 2.1),
        # 1 + 1 - 2 * 0.5 - 0.4
        ("Hello Rosa! The tulips look dull today. I think the tulips are dull.", 0.6),
        # 1 + 1 + 0.5 + 0.5 - 0.3 (the first signature is out of place)
        ("Hello Rosa! The tulips look fresh today. Yours, Moss. Yours, Wren.", 2.7),
        # 1 + 1 + 0.5 - 0.3 (second greeting)
        ("Hello Rosa! Hello Rosa! The tulips look fresh today.", 2.2),
        # -1 + 1 + 0.5 - 0.3: the greeting does not come first
        ("The tulips look fresh today. Hello Rosa!", 0.2),
        # 1 + 1 + 0.5 - 0.3 (a sentence of no known form)
        ("Hello Rosa! The tulips fresh fresher today.", 2.2),
        # 1 + 1 + 0.5 - 0.3 (unfinished) - 1.5 (broken off)
        ("Hello Rosa! The tulips look fresh", 0.7),
        # -1 - 1.5
        ("", -2.5),
    ],
)
def test_gold_by_hand(response: str, expected: float) -> None:
    assert gold(PROMPT, response) == pytest.approx(expected)
    assert gold(f"[INST] {PROMPT} [/INST]", f" {response} ") == pytest.approx(expected)


def test_gold_refuses_a_prompt_without_a_known_name_or_topic() -> None:
    with pytest.raises(ValueError, match=r"to nobody about the tulips.*none of these words: Ada"):
        gold("Write to nobody about the tulips.", BEST)
    with pytest.raises(ValueError, match="none of these words: tulips"):
        gold("Write to Rosa about the weather.", BEST)


def test_a_judge_who_knows_gold_reaches_the_bayes_limit() -> None:
    training, _ = split_pairs()
    records = garden_notes.preferences(random.Random(5), 4_000, training)
    differences = [
        gold(record["prompt"], record["chosen"]) - gold(record["prompt"], record["rejected"])
        for record in records
    ]
    accuracy = sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences)
    # The label agrees with gold with probability sigmoid(2 |difference|).
    limit = sum(1 / (1 + math.exp(-2 * abs(d))) for d in differences) / len(differences)
    assert accuracy == pytest.approx(limit, abs=0.02)
    assert 0.8 < accuracy < 0.95


def test_demonstrations_leave_much_to_improve() -> None:
    records = garden_notes.demonstrations(random.Random(5), 2_000)
    scores = [gold(record["prompt"], record["completion"]) for record in records]
    assert 0.5 < sum(scores) / len(scores) < 1.5 < max(scores) <= garden_notes.BEST_GOLD


@pytest.mark.slow
def test_regenerated_files_equal_the_committed_ones(tmp_path: Path) -> None:
    garden_notes.main(["--out", str(tmp_path / "new")])
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == sorted(path.name for path in SAMPLES.iterdir())
    for name in names:
        assert read(name, tmp_path / "new") == read(name), f"{name}: python -m data.garden_notes"
        assert (SAMPLES / name).stat().st_size < 1.9 * 2**20


def test_held_out_pairs_are_asked_for_in_no_other_file() -> None:
    training, held_out = (set(pairs) for pairs in split_pairs())
    assert (len(training), len(held_out), training & held_out) == (192, 64, set())
    for name in ("pretrain.txt.gz", "sft.jsonl", "preferences.jsonl.gz", "prompts.jsonl"):
        assert asked_pairs(read(name)) == training, name
    for name in ("heldout_preferences.jsonl", "heldout_prompts.jsonl"):
        assert asked_pairs(read(name)) == held_out, name


def test_prompts_are_distinct_and_enough_to_evaluate_on() -> None:
    texts = [json.loads(line)["prompt"] for line in read("heldout_prompts.jsonl").splitlines()]
    assert len(set(texts)) == len(texts) == 256


def test_backbone_text_asks_for_no_note_in_the_chat_layout() -> None:
    documents = read("pretrain.txt.gz").strip().split("\n\n")
    asked = re.compile(r"\[INST\] (?:Where do the \w+ grow|What grows by the \w+)\? \[/INST\]")
    transcripts = [document for document in documents if "[INST]" in document]
    assert 0.05 < len(transcripts) / len(documents) < 0.15
    assert all(asked.match(document) and "Hello" not in document for document in transcripts)


def test_quickstart_uses_these_files() -> None:
    config = load_config(PROJECT / "configs" / "quickstart.yaml")
    assert config.backbone.from_scratch is not None
    sources = [
        *config.backbone.from_scratch.data,
        *config.sft.data,
        *config.reward.data,
        *config.reward.eval_data,
        *config.ppo.data,
        *config.ppo.eval_data,
    ]
    assert sorted(Path(source.path).name for source in sources) == sorted(
        path.name for path in SAMPLES.iterdir()
    )
    assert all((PROJECT / source.path).is_file() for source in sources)
    assert config.evaluation.gold == "data.garden_notes:gold"
    assert config.evaluation.label_scale == garden_notes.LABEL_SCALE
