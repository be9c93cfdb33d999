import pickle

import pytest

from fewshot.errors import FewShotError
from fewshot.text import MAX_CHARACTERS, for_terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 漢字.png", "naïve 漢字.png"),
        ("a\nerror: b", "a\\nerror: b"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("gnp\u202e.exe", "gnp\\u202e.exe"),
        ("bad \udcff bytes", "bad \\udcff bytes"),
    ],
)
def test_a_message_is_one_line_that_cannot_control_the_terminal(text, shown):
    assert for_terminal(text) == str(FewShotError(text)) == shown
    str(FewShotError(text)).encode()


def test_each_argument_is_a_line():
    assert str(FewShotError("a", "b\nc")) == "a\nb\\nc"
    assert str(pickle.loads(pickle.dumps(FewShotError("a", "b")))) == "a\nb"


def test_a_line_that_is_too_long_keeps_its_start_and_end():
    message = str(FewShotError("start" + "x" * 10**6 + "end"))
    assert message.startswith("start") and message.endswith("end") and len(message) < MAX_CHARACTERS + 10
