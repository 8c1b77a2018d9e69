"""The page in a real Chromium: chat, comparison, a vote that trains a reward model.

Needs Playwright (`pip install -e '.[browser]'`) and Debian's chromium, or CHATLLAMA_CHROMIUM.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_setup import KEY, make_served_run, serving

from chatllama.runs.folder import RunFolder

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHATLLAMA_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; set CHATLLAMA_CHROMIUM"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_served_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page as wide as a phone; scripts that fail and requests that are refused fail the test."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 380, "height": 800}, accept_downloads=True)
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("response", lambda r: complaints.append(r.url) if r.status >= 400 else None)
    yield page
    page.close()
    assert complaints == []


def test_a_vote_in_the_browser_trains_a_reward_model(
    run: RunFolder, page: Any, tmp_path: Path
) -> None:
    with serving(run) as url:
        page.goto(url)
        page.get_by_role("tab", name="Chat").focus()
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("tab", name="Compare").get_attribute("aria-selected") == "true"
        page.get_by_label("Settings").or_(page.get_by_text("Settings")).first.click()
        page.get_by_label("Longest answer").fill("8")
        for question, verdict in (("the river", "A is better"), ("a garden", "B is better"),
                                  ("the queen", "Tie")):  # fmt: skip
            page.get_by_label("What both answer").fill(question)
            page.keyboard.press("Enter")
            page.get_by_label("Reason").fill(f"because {verdict}")
            page.get_by_role("button", name=verdict).click()
            page.get_by_role("status").filter(has_text="Vote kept").wait_for()
        with page.expect_download() as download:
            page.get_by_role("button", name="Export votes").click()
        votes = tmp_path / "votes.jsonl"
        download.value.save_as(votes)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    records = [json.loads(line) for line in votes.read_text().splitlines()]
    assert [record["verdict"] for record in records] == ["a", "b", "tie"]
    assert records[0]["models"] == ["sft", "policy"] and records[1]["models"] == ["policy", "sft"]
    assert records[0]["reason"] == "because A is better"

    import train_rm

    folder = tmp_path / "trained"
    (folder / "sft").mkdir(parents=True)
    shutil.copytree(run.sft_adapter, folder / "sft" / "adapter")
    (folder / "sft" / "result.json").write_text("{}")
    config = tmp_path / "rm.yaml"
    config.write_text(
        f"run_dir: {folder}\nbackbone: {{path: {run.backbone}, dtype: float32}}\n"
        "tracking: {report_to: []}\nlora: {r: 4, alpha: 6}\n"
        f"reward: {{data: [{{path: {votes}}}], eval_data: [{{path: {votes}}}], steps: 2, "
        "batch_size: 2, microbatch_size: 2, allow_weak: true}\n"
    )
    train_rm.main([str(config)])
    assert (RunFolder(folder).reward_adapter / "adapter_model.safetensors").is_file()


def test_chat_streams_scores_and_shades(run: RunFolder, page: Any) -> None:
    with serving(run, api_keys=(KEY,)) as url:
        page.goto(url)
        page.get_by_label("This server wants a key").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#chat-model option").first.wait_for(state="attached")
        assert page.get_by_label("Model").input_value() == "policy"
        page.get_by_label("Your message").fill("the river")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Reward score").click()
        page.locator("#log .note", has_text="score").wait_for()
        page.get_by_role("button", name="Log-ratios").click()
        page.locator("#log .token").first.wait_for(state="attached")
        assert "nats over" in page.locator("#log").inner_text()
        theme = page.get_by_role("button", name="Theme")
        colours = []
        for _ in range(2):
            theme.click()
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colours[0] != colours[1]


def test_a_blind_comparison_hides_names_until_the_vote(run: RunFolder, page: Any) -> None:
    with serving(run) as url:
        page.goto(url)
        page.get_by_role("tab", name="Compare").click()
        page.get_by_label("Blind").check()
        page.get_by_label("What both answer").fill("the river")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Both bad").wait_for()
        assert page.locator("#sides h2").all_inner_texts() == ["A", "B"]
        assert page.locator("#sides .tools").count() == 0
        page.locator("#vote-form:focus").wait_for()
        page.keyboard.press("4")
        page.locator("#sides .tools").first.wait_for()
        page.locator("#tally", has_text="both bad 1").wait_for()
        titles = page.locator("#sides h2").all_inner_texts()
        assert sorted(title[3:] for title in titles) == ["policy", "sft"]
