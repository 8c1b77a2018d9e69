"""The page's scripts in Chromium, without a server: Markdown as DOM nodes, tokens as text."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chatllama.serving.app import PAGE

CHROMIUM = os.environ.get("CHATLLAMA_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; set CHATLLAMA_CHROMIUM"),
]
SHOW = """
const show = (text) => {
  const place = document.createElement("div");
  place.append(markdown(text));
  return place.innerHTML;
};
"""


def evaluate(expression: str, folder: Path) -> Any:
    """The value of an expression that uses the page's functions."""
    sources = [(PAGE / name).read_text() for name in ("markdown.js", "page.js")]
    script = re.sub(r"(?m)^import .*|^export ", "", "\n".join(sources))
    page = folder / "page.html"
    told = f"document.body.textContent = JSON.stringify({expression});"
    page.write_text(
        f"<meta charset=utf-8><body><script>{script}{SHOW}</script><script>{told}</script>"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'chromium'}", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search("<body>(.*)</body>", found.stdout, re.DOTALL)
    assert body, found.stderr
    return json.loads(html.unescape(body[1]))


MARKDOWN = {
    "<img src=x onerror=alert(1)> **a <b>x</b>**": (
        "<p>&lt;img src=x onerror=alert(1)&gt; <strong>a &lt;b&gt;x&lt;/b&gt;</strong></p>"
    ),
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x](JavaScript:alert)": "<p>[x](JavaScript:alert)</p>",
    "[x](data:text/html,y)": "<p>[x](data:text/html,y)</p>",
    "[x](//evil.example)": "<p>[x](//evil.example)</p>",
    '[<i>](https://a.example/"b)': (
        '<p><a href="https://a.example/&quot;b" rel="noopener noreferrer nofollow" target="_blank" '
        'title="https://a.example/&quot;b">&lt;i&gt;</a></p>'
    ),
    '```python\nif a < b:\n    "**"\n```\nafter': (
        '<pre data-language="python" tabindex="0"><code>if a &lt; b:\n    "**"</code></pre>'
        "<p>after</p>"
    ),
    "~~~\n```\nopen": '<pre tabindex="0"><code>```\nopen</code></pre>',
    "# T\ntext\n- a\n- b\n  1. c": (
        "<h3>T</h3><p>text</p><ul><li>a</li><li>b<ol><li>c</li></ol></li></ul>"
    ),
    "3. c\n4. d\n\n---\n> q\n> > r": (
        '<ol start="3"><li>c</li><li>d</li></ol><hr>'
        "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote>"
    ),
    "a * b, *it* _it_ snake_case_name `x **y**` ``a`b``": (
        "<p>a * b, <em>it</em> <em>it</em> snake_case_name <code>x **y**</code> "
        "<code>a`b</code></p>"
    ),
    "one\ntwo\r\n\r\nthree": "<p>one\ntwo</p><p>three</p>",
    "": "",
}


def test_markdown_becomes_nodes_and_never_html(tmp_path: Path) -> None:
    shown = evaluate(f"{json.dumps(list(MARKDOWN))}.map(show)", tmp_path)
    assert dict(zip(MARKDOWN, shown, strict=True)) == MARKDOWN
    long = '["**a ", "*a ", "`a ", "_a ", "[a", "> ", "- a\\n", "- "].map((t) => t.repeat(3000))'
    clock = "const start = performance.now(); show(text); return performance.now() - start;"
    milliseconds = evaluate(f"{long}.map((text) => {{ {clock} }})", tmp_path)
    assert max(milliseconds) < 3000  # no text takes a time that grows without bound


def test_no_script_of_the_page_parses_html() -> None:
    for path in PAGE.glob("*.js"):
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_tokens_that_hold_parts_of_a_character_are_shown_whole(tmp_path: Path) -> None:
    texts = [b" Gr", b"\xc3", b"\xbc\xc3\x9f", b"e\n", b"\xf0\x9f", b"\x99", b"\x82", b"\xe2\x82"]
    tokens = json.dumps([{"bytes": list(text), "kl": 1} for text in texts])
    found = evaluate(
        f"readable({tokens}).map((group) => [group.text, group.tokens.length])", tmp_path
    )
    assert found == [["Gr", 1], ["üß", 2], ["e↵\n", 1], ["🙂", 3], ["\ufffd", 1]]
