"""Untrusted text is shown as text, in every kind of output."""

import ast
import csv
import html
import io
import os
import pty
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.text import Text
from rich.console import Console

from fewshot.report import _short
from fewshot.text import FORMULA, for_csv, for_figure, for_html, for_markdown, for_terminal, make_table, say

SIGNS = "\\`*_{}[]<>()#+-.!|~$&=@'\"/:;% \t\n\r\x1b\x07\x9b\u202e\ud800é漢"
texts = st.text() | st.text(st.sampled_from(SIGNS + "ab1w")) | st.text(st.sampled_from("[]/bold red=link#:w.htps ()"))


@given(texts)
@example("[link](javascript:alert(1))")
@example("<img src=x onerror=alert(1)>")
@example("a | b \\| c\n| new | row |")
@example("&lt;b&gt; &#60;i&#62;")
@example("https://example.com www.example.com ~~no~~ __init__ a_b $x$")
@example("1. one")
def test_text_in_markdown_is_shown_literally(text):
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = for_terminal(text).strip()
    cell, line = (
        page.parse(f"| a | b |\n| --- | --- |\n| {for_markdown(text)} | end |\n"),
        page.parse(for_markdown(text)),
    )
    cells = [token for token in cell if token.type == "inline"]
    assert [token.content for token in cells[:2]] == ["a", "b"] and len(cells) == 4 and cells[3].content == "end"
    for token in (cells[2], *(token for token in line if token.type == "inline")):
        assert {child.type for child in token.children or ()} <= {"text"}
        assert "".join(child.content for child in token.children or ()) == shown
    assert {token.type for token in line} <= {"paragraph_open", "inline", "paragraph_close"}


def test_in_markdown_names_and_overrides_stay_readable():
    for text in ("way=5 train.meta_batch=4", "omniglot/protonet_5way_1shot", "5-way 1-shot", "scaled cosine, × 10"):
        assert for_markdown(text) == text
    assert for_markdown("https://a www.b") == "https:\\//a www\\.b"  # not made a link automatically


@given(texts)
@example("=HYPERLINK(0)")
@example(" +1")
@example("'=1")
@example("\t=1")
def test_text_in_csv_is_no_formula_and_can_be_read_back(text):
    text = text.encode(errors="surrogateescape").decode(errors="surrogateescape") if text.isascii() else text
    cell, file = for_csv(text), io.StringIO(newline="")
    csv.writer(file).writerow([cell, "end"])
    file.seek(0)
    assert list(csv.reader(file)) == [[cell, "end"]]
    assert cell[:1] == "'" or not cell.lstrip().startswith(("=", "+", "-", "@"))
    assert not set(cell) & set("\t\n\r\x1b\x07\x9b\u202e")
    assert (cell[1:] if FORMULA.match(cell) else cell) == for_csv(f"x{text}")[1:]


@pytest.mark.parametrize("value", [-1, -0.5, None, True])
def test_a_number_in_csv_stays_a_number(value):
    assert for_csv(value) is value


def test_file_names_in_csv_stay_usable():
    for name in ("Screenshot at 1\u202fPM.png", "می\u200cخواهم.png", "latin \udce9.png", "-a/../b;c,d.png"):
        assert for_csv(f"/data/{name}") == f"/data/{name}"


@given(texts)
@example('" onload="alert(1)')
@example("<script>alert(1)</script>")
def test_text_in_html_is_shown_literally_between_tags_and_in_attributes(text):
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, attributes))

        def handle_data(self, data):
            seen.append(data)

    shown = for_html(text)
    shown.encode()
    reader = Reader()
    reader.feed(f'<b title="{shown}">{shown}')
    reader.close()
    read = html.unescape(shown)
    assert seen[0] == ("b", [("title", read)]) and "".join(seen[1:]) == read
    assert not set(shown) & set("\n\r\x1b\x07\x9b\u202e\ud800")


@given(texts)
@example("[bold]x[/bold]")
@example("[/lab]")
@example("[link=file:///etc/passwd]x[/link]")
def test_text_in_a_terminal_table_is_shown_literally(text):
    shown = for_terminal(text)
    console = Console(file=io.StringIO(), width=3 * max(1, len(shown)) + 20, force_terminal=False, emoji=False)
    console.print(make_table(text, [text, "n"], [[text, 1]], numbers={"n"}))
    printed = console.file.getvalue()
    assert printed.count(shown) >= 3 and "\x1b" not in printed


def test_say_prints_one_line_per_part(capsys):
    say("[bold]a[/lab]\n\x1b[2J", make_table("[/x]", ["[b]"], [["[i]"]]))
    say("why", error=True)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "[bold]a[/lab]\\n\\x1b[2J" and "[/x]" in printed.out and "[i]" in printed.out
    assert printed.err == "why\n"


TALK = r"""
import sys
from fewshot.text import open_streams, say
open_streams()
for number in range(5):
    say(f"line {number} \xb1 \u6f22 \ud800")
    sys.stdout.write("x" * 100_000 + "\n")
print("the end", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_characters_that_a_terminal_cannot_encode_are_replaced(environment):
    done = subprocess.run([sys.executable, "-c", TALK], capture_output=True, env={**os.environ, **environment})
    assert done.returncode == 0 and done.stderr == b"the end\n"
    assert done.stdout.startswith(b"line 0 +/- \\u6f22 \\ud800\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_program_continues_when_its_reader_is_gone(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        [sys.executable, "-c", TALK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as talking:
        assert talking.stdout is not None and talking.stderr is not None
        talking.stdout.readline()
        talking.stdout.close()
        errors = talking.stderr.read().decode().splitlines()
    assert talking.returncode == 0
    line = "cannot write to the standard output (its reader is gone); the program continues without it"
    assert errors == [line, "the end"]


@pytest.mark.parametrize("closing", ["2>&1 | head -1", ">&- 2>&-", "> /dev/full"])
def test_a_program_continues_when_it_cannot_report_it(closing, tmp_path):
    command = f"{{ '{sys.executable}' -c \"$TALK\"; echo $? > '{tmp_path}/status'; }} {closing}"
    environment = {**os.environ, "TALK": TALK}
    subprocess.run(["bash", "-c", command], capture_output=True, env=environment)
    assert (tmp_path / "status").read_text() == "0\n"


def test_a_program_continues_when_its_terminal_is_closed(tmp_path):
    ours, theirs = pty.openpty()
    script = f"import os; os.read(0, 1)\n{TALK}\nopen({str(tmp_path / 'done')!r}, 'w').close()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True
    ) as talking:
        os.close(ours)
        os.close(theirs)
        assert talking.stdin is not None
        talking.stdin.write(b"x")
        talking.stdin.close()
    assert talking.returncode == 0 and (tmp_path / "done").exists()


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("text", ["", " ", "\n", "a\x1b[31mb", "\u202ea b", "x" * 100, "a\tb " * 50])
def test_labels_in_the_figures_of_the_report_are_printable_lines(text):
    for lines in (1, 2):
        labels = _short(text, 16, lines)
        assert 1 <= len(labels) <= lines and all(len(label) <= 16 and label.isprintable() for label in labels)


PRINTING = ("print", "Console", "Table", "track", "writer", "DictWriter", "escape")


def test_all_output_passes_through_the_functions_of_text():
    """Each call that prints or writes text is in ``text.py``, or is known to pass its text through there."""
    known = {
        ("callbacks.py", "method.print"),  # numbers of episodes and percentages, above the progress bar
        ("progress.py", "Console"),  # shows constants and numbers
        ("methods/base.py", "self.print"),  # a number and the name of a split
        ("data/bank.py", "track"),
        ("data/bank.py", "escape"),  # Rich's, applied to printable text
        ("benchmarks/contest.py", "track"),  # a constant
        ("benchmarks/photos.py", "track"),  # the name of a split
        ("benchmarks/reading.py", "track"),  # constants
        ("figures/scale.py", "track"),  # a constant
        ("prediction.py", "track"),  # a constant
        ("prediction.py", "csv.writer"),  # each row passes through for_csv
        ("report.py", "csv.DictWriter"),
        ("sweeps.py", "csv.DictWriter"),  # each value passes through for_csv
        ("loggers.py", "csv.DictWriter"),  # the rows of a table that it read
    }
    src = ROOT / "src"
    found, without_encoding = set(), set()
    for path in sorted(src.rglob("*.py")):
        name = path.relative_to(src).as_posix().removeprefix("fewshot/")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or name == "text.py":
                continue
            called = ast.unparse(call.func)
            last = called.rpartition(".")[2]
            if called.endswith((".write_text", ".read_text")) and not any(
                keyword.arg == "encoding" for keyword in call.keywords
            ):
                without_encoding.add((name, call.lineno))
            elif last in PRINTING or called.startswith(("sys.stdout", "sys.stderr")):
                found.add((name, called))
    assert found - known == set() and not without_encoding


@given(texts)
@example("$x_{$")
@example("\\$\\frac$")
@example("_hidden")
def test_text_in_a_figure_is_shown_literally_and_in_the_legend(text):
    shown = for_figure(text)
    label = Text(text=shown)
    drawn, is_formula = label._preprocess_math(shown)
    hidden = for_terminal(text).startswith("_")
    assert not is_formula and drawn == f"{' ' * hidden}{for_terminal(text)}"
    assert not shown.startswith("_")
