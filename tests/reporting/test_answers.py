from typing import Any

from chatllama.reporting.answers import Answers, read_answers, telling_rows


def kept(number: int, sft: float, ppo: float) -> dict[str, Any]:
    values = {"gold": {"sft": sft, "ppo": ppo}}
    return {"prompt": f"p{number}", "sft": "s", "ppo": "t"} | values


FOUR = [kept(0, 1.0, 2.0), kept(1, 3.0, 0.5), kept(2, 0.0, 4.0), kept(3, 0.0, 1.0)]


LABELS = {"base": "base", "sft": "SFT", "ppo": "GRPO"}


def read(content: dict[str, Any], start: str = "sft") -> Answers:
    return read_answers(content, start, LABELS)


def heads(content: dict[str, Any]) -> dict[str, list[str]]:
    return {sample.prompt: sample.heads for sample in read(content).first}


def test_best_median_worst_and_lost() -> None:
    found = read({"samples": FOUR})
    assert found.judge == "gold score" and found.words == ""
    # By PPO's value: p1 0.5, p3 1, p0 2, p2 4; p1 lost 2.5.
    assert heads({"samples": FOUR}) == {
        "p2": ["Best of the 4 kept"],
        "p3": ["Median of the 4 kept"],
        "p1": ["Worst of the 4 kept", "Lost most against SFT: -2.50"],
    }
    assert [sample.prompt for sample in found.first] == ["p2", "p3", "p1"]
    assert [sample.prompt for sample in found.others] == ["p0"]
    assert found.first[0].answers == [("SFT", "s", 0.0), ("GRPO", "t", 4.0)]


def test_the_best_of_all_is_not_the_best_of_the_first() -> None:
    ours, theirs = [2.0, 0.5, 4.0, 1.0, 9.0, -3.0, 5.0], [1.0, 3.0, 0.0, 0.0, 9.0, -3.0, 8.0]
    assert telling_rows(ours, theirs) == {"Best": 4, "Median": 0, "Worst": 5, "Most lost": 6}
    values = {"sft": theirs, "ppo": ours}
    content = {"samples": FOUR, "judged": {"by": "gold x", "prompts": "h", "values": values}}
    assert heads(content)["p2"] == ["Best of the 4 kept"]  # an older run kept the first texts only
    rows = {0: "Median of all 7", 4: "Best of all 7", 5: "Worst of all 7"}
    more = [{**kept(row, theirs[row], ours[row]), "row": row} for row in (4, 5, 6)]
    content["samples"] = FOUR[:3] + more
    expected = {f"p{row}": [head] for row, head in rows.items()}
    assert heads(content) == expected | {"p6": ["Lost most against SFT: -3.00"]}
    words = "Of all 7 prompts, GRPO's answer is better than that of SFT on 3, equal on 2 and worse"
    assert read(content).words.strip() == f"{words} on 2."


def test_nothing_lost_is_said_and_nothing_is_made_up() -> None:
    found = read({"samples": FOUR[2:]})
    assert found.words == "None of the 2 answers is worse than that of SFT."
    unjudged = [{"prompt": "p", "ppo": "t"}]
    found = read({"samples": unjudged})
    assert found.first == [] and found.words == "" and len(found.others) == 1
    scored = [{"prompt": "p", "base": "b", "ppo": "t", "score": {"base": 1.0, "ppo": 0.0}}]
    found = read({"samples": scored}, "base")
    assert found.judge == "reward score (raw)"
    assert found.first[0].heads[-1] == "Lost most against base: -1.00"
