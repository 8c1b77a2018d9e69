"""Records a command in a terminal as an animated SVG: what README shows.

    pip install pyte
    python docs/images/record.py demo.svg -- chatllama run configs/quickstart.yaml

The command runs in a terminal of its own. Waits are shortened to `--longest` seconds, and time runs
`--speed` times as fast. The picture needs no script and no font of its own.
"""

import argparse
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import pyte

LINE, LETTER, MARGIN = 17, 7.8, 14
NAMED = {
    "black": "#3b4252", "red": "#bf616a", "green": "#8fbc8f", "brown": "#d8b365", "blue": "#81a1c1",
    "magenta": "#b48ead", "cyan": "#88c0d0", "white": "#e5e9f0", "default": "#d8dee9",
}  # fmt: skip
Frame = tuple[float, list[str]]
"""Seconds at which a screen appears, and its lines as SVG."""


def frames(command: Sequence[str], columns: int, rows: int, pause: float) -> Iterator[Frame]:
    """The screens of a command as it runs, at least `pause` seconds apart."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    size = {"COLUMNS": str(columns), "LINES": str(rows), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **size}
    )
    os.close(theirs)
    begun, shown = time.monotonic(), 0.0
    while True:
        ready = select.select([ours], [], [], 0.1)[0]
        try:
            chunk = os.read(ours, 65536) if ready else b""
        except OSError:  # the command has closed its terminal
            break
        stream.feed(chunk)
        now = time.monotonic() - begun
        if chunk and now - shown > pause:
            yield now, lines_of(screen)
            shown = now
    yield time.monotonic() - begun, lines_of(screen)
    if process.wait():
        sys.exit(f"{command[0]} ended with code {process.returncode}")


def lines_of(screen: pyte.Screen) -> list[str]:
    """Each row of a screen as the content of an SVG text element."""
    lines: list[str] = []
    for row in range(screen.lines):
        runs: list[tuple[str, str]] = []
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            color = NAMED.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else NAMED["default"])
            style = f'fill="{color}"' + (' font-weight="bold"' if cell.bold else "")
            if runs and runs[-1][1] == style:
                runs[-1] = (runs[-1][0] + cell.data, style)
            else:
                runs.append((cell.data, style))
        if runs and not runs[-1][0].strip():
            runs.pop()
        lines.append("".join(f"<tspan {style}>{escape(text)}</tspan>" for text, style in runs))
    return lines


def shortened(found: Sequence[Frame], speed: float, longest: float) -> list[Frame]:
    """The frames that differ from the one before, with shorter waits."""
    kept: list[Frame] = [(0.0, found[0][1])]
    before = found[0][0]
    clock = 0.0
    for seconds, lines in found[1:]:
        clock += min(longest, (seconds - before) / speed)
        before = seconds
        if lines != kept[-1][1]:
            kept.append((clock, lines))
    return kept


def svg(title: str, kept: Sequence[Frame], columns: int, rows: int, rest: float) -> str:
    """One picture that shows the frames one after another, for ever; the last for `rest` s."""
    total = kept[-1][0] + rest
    width, height = columns * LETTER + 2 * MARGIN, (rows + 2) * LINE + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace" font-size="13">',
        f'<rect width="100%" height="100%" rx="8" fill="#2e3440"/><text x="{MARGIN}" y="22" '
        f'fill="#88c0d0" font-weight="bold">$ {escape(title)}</text>',
    ]
    for row in range(rows):
        for number, (start, end, line) in enumerate(spells(kept, row, total)):
            if line:
                name, y = f"r{row}n{number}", (row + 3) * LINE
                shown = "" if end == total else f"{100 * end / total:.3f}%{{opacity:0}}"
                hidden = "0%{opacity:0}" if start else ""
                steps = f"{hidden}{100 * start / total:.3f}%{{opacity:1}}{shown}"
                parts.append(
                    f"<style>@keyframes {name}{{{steps}}}"
                    f"#{name}{{animation:{name} {total:.2f}s step-end infinite}}</style>"
                    f'<text id="{name}" opacity="{int(end == total)}" x="{MARGIN}" y="{y}" '
                    f'xml:space="preserve">{line}</text>'
                )
    return "\n".join([*parts, "</svg>\n"])


def spells(kept: Sequence[Frame], row: int, total: float) -> list[tuple[float, float, str]]:
    """The times, from and to, for which a row shows the same line."""
    changes = [(seconds, lines[row]) for seconds, lines in kept]
    changes = [each for i, each in enumerate(changes) if i == 0 or each[1] != changes[i - 1][1]]
    ends = [seconds for seconds, _ in changes[1:]] + [total]
    return [(start, end, line) for (start, line), end in zip(changes, ends, strict=True)]


def main() -> None:
    """Runs the command and writes the picture."""
    parser = argparse.ArgumentParser(description="record a command as an animated SVG")
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--rows", type=int, default=28)
    parser.add_argument("--speed", type=float, default=20.0)
    parser.add_argument("--longest", type=float, default=0.6, help="seconds of a wait, as shown")
    parser.add_argument("--title", help="what the first line says (default: the command)")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    found = list(frames(options.command, options.columns, options.rows, options.speed / 8))
    kept = shortened(found, options.speed, options.longest)
    title = options.title or " ".join(options.command)
    text = svg(title, kept, options.columns, options.rows, rest=6.0)
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {len(kept)} frames, {len(text) // 1000} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
