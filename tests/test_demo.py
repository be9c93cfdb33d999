"""The page: what it does, how it is served, and the whole in a browser."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import urllib.error
import urllib.request
import zlib
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image

import fewshot.cli  # noqa: F401  for the help
from conftest import METHODS, free_port, wait_for
from fewshot.config import ROOT, compose
from fewshot.data.files import ImageFile
from fewshot.demo import FITTING, FORGOTTEN, IDLE, VISITORS, Demo, Visit, Visits, hosts, open_networks, page_of, serve
from fewshot.errors import FewShotError
from fewshot.models import short_names
from fewshot.predictor import make_predictor
from fewshot.trained import load_trained
from fewshot.training import make_data

SESSION = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def letters(run):
    """Five PNG files of each of seven letters never seen in training, dark on white."""
    data = make_data(load_trained(str(run("protonet"))).config)
    data.setup()
    starts = data.bank.offsets[data.bank.classes("test")[:7]]
    return [[png(255 - image[..., 0]) for image in data.bank.images[start : start + 5].numpy()] for start in starts]


@pytest.fixture
def demo(run):
    """The page's inside, by its method and limits."""

    def make(method="protonet", **limits):
        config = compose(f"checkpoint={run(method)}", *(f"{key}={value}" for key, value in limits.items()), name="demo")
        return Demo(open_networks(config), config)

    return make


@pytest.fixture(scope="module")
def photos():
    return [png(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8)) for seed in range(4)]


def png(pixels, kind="PNG", **options) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def files(*contents: bytes) -> list[ImageFile]:
    return [ImageFile(f"{number}.png", BytesIO(content).getvalue) for number, content in enumerate(contents)]


def shown(page, letters, way=3, shot=2) -> Visit:
    """A visit with a support set, and for its query the last image of the first class."""
    visit = Visit()
    for label in range(way):
        assert add(page, visit, f"letter {label}", *letters[label][:shot]) == []
    page.ask(visit, *files(letters[0][-1]))
    return visit


def add(page, visit, name, *contents) -> list[str]:
    """Add images to a class, and return what the visitor reads."""
    notes = []
    for file in files(*contents):
        try:
            notes += page.add(visit, name, file)
        except FewShotError as error:
            notes.append(str(error))
    return notes


def own(page) -> str:
    return next(iter(page.networks))


def reference(page, visit):
    """The predictor, the support set and the query as its network sees them."""
    network = page.networks[own(page)]
    support = {name: [one.pixels[network.form] for one in images] for name, images in visit.support.items()}
    return network.load()[0], support, visit.query.pixels[network.form]


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_has_the_probabilities_and_the_scores_of_the_method(demo, letters, method):
    page = demo(method)
    visit = shown(page, letters, way=3, shot=2)
    view = page.view(visit, own(page))
    predictor, support, query = reference(page, visit)
    logits = predictor.learn(support)([query])[0]
    answer = view["answer"]
    assert [row[0] for row in answer["rows"]] == [f"letter {label}" for label in logits.argsort(descending=True)]
    for name, probability, score in answer["rows"]:
        logit = float(logits[int(name[-1])])
        assert probability == pytest.approx(float(logits.softmax(0)[int(name[-1])]), abs=1e-4)
        assert score == pytest.approx(-logit if method == "protonet" else logit, abs=1e-3) and abs(score) > 0.01
    named = {"protonet": "squared Euclidean", "matching": "logarithm of the query's mean attention"}
    assert named.get(method.removesuffix("_fce"), "the network's score of the class") in answer["meaning"]
    assert not view["notes"] and json.dumps(view)


def test_the_distances_are_those_of_the_embeddings(demo, letters):
    page = demo()
    visit = shown(page, letters)
    predictor, support, query = reference(page, visit)
    prototypes = torch.stack([predictor.represent(images).mean(0) for images in support.values()])
    expected = (predictor.represent([query]) - prototypes).square().sum(1)
    found = {name: score for name, _, score in page.view(visit, own(page))["answer"]["rows"]}
    assert expected.min() > 0.01
    assert [found[name] for name in support] == pytest.approx(expected.tolist(), abs=1e-3)


def test_classes_and_examples_are_added_and_removed(demo, letters):
    page = demo()
    visit = shown(page, letters, way=2)
    assert not add(page, visit, "  letter   1 ", letters[1][3])
    view = page.view(visit, own(page))
    assert [(one["name"], len(one["examples"])) for one in view["classes"]] == [("letter 0", 2), ("letter 1", 3)]
    page.remove(visit, "letter 0", view["classes"][0]["examples"][0]["id"])
    page.remove(visit, "nobody")
    assert [(name, len(images)) for name, images in visit.support.items()] == [("letter 0", 1), ("letter 1", 3)]
    page.remove(visit, "letter 0")
    view = page.view(visit, own(page))
    assert list(visit.support) == ["letter 1"] and view["query"] and view["answer"] is None and not view["notes"]


def test_the_same_example_is_said_and_not_taken_twice(demo, letters):
    page, visit = demo(), Visit()
    assert add(page, visit, "a", letters[0][0], letters[0][0]) == ["1.png is left out: it is already an example of a"]
    assert add(page, visit, "b", letters[0][0]) == ["0.png is also an example of a: remove it from one of them"]
    add(page, visit, "a", letters[0][1])
    add(page, visit, "b", letters[1][0])
    page.ask(visit, *files(letters[0][1]))
    view = page.view(visit, own(page))
    assert "the query is also an example of a, so this answer says nothing about new images" in view["answer"]["lines"]
    assert "0.png of b looks the same as 0.png of a: remove one of them" in view["lines"]


def test_the_page_says_how_good_the_answers_will_be_and_whether_the_query_is_like_a_class(demo, letters):
    page = demo()
    lines = page.view(shown(page, letters, way=3, shot=1), own(page))["lines"]
    assert "add a second example of a class to see how good the answers will be" in lines
    visit = shown(page, letters, way=3, shot=3)
    view = page.view(visit, own(page))
    assert any(line.startswith("accuracy on 9 held-out examples: ") for line in view["lines"])
    assert any("familiarity" in line for line in view["answer"]["lines"])
    unlike = [line for line in view["answer"]["lines"] if line.startswith("perhaps none of these")]
    assert view["answer"]["unknown"] == bool(unlike)
    visit.support["letter 0"][0], visit.support["letter 1"][0] = (
        visit.support["letter 1"][0],
        visit.support["letter 0"][0],
    )
    visit.learned.clear()
    view = page.view(visit, own(page))
    odd = [
        (one["name"], place) for one in view["classes"] for place, image in enumerate(one["examples"]) if image["odd"]
    ]
    suspicious = [line for line in view["lines"] if "is it in the wrong class?" in line]
    assert len(odd) == len(suspicious) and set(odd) <= {("letter 0", 0), ("letter 1", 0)}


def test_maml_says_when_there_are_more_classes_than_it_was_trained_for(demo, letters):
    page, line = demo("maml"), "this network was trained for 5 classes: with 6 it is less accurate"
    assert line not in page.view(shown(page, letters, way=5), own(page))["answer"]["lines"]
    view = page.view(shown(page, letters, way=6, shot=1), own(page))
    assert len(view["answer"]["rows"]) == 6 and line in view["answer"]["lines"]


def test_without_a_choice_the_network_that_fits_is_taken_and_no_weights_of_others_are_loaded(
    letters, photos, monkeypatch
):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("fewshot.encoders.pretrained.get_model", offline)
    config = compose(name="demo")
    page = Demo(open_networks(config), config)
    assert list(page.networks) == [*short_names(), "encoder=pretrained"]
    assert not any(network.made for network in page.networks.values())

    def chosen(*contents):
        visit = Visit()
        assert not add(page, visit, "a", *contents)
        return page.view(visit, FITTING)["network"]

    assert chosen(letters[0][0]) == chosen(photos[0], *letters[0][:2]) == "omniglot/protonet"
    assert chosen(*photos) == chosen(*photos[:2], letters[0][0]) == "miniimagenet/protonet"
    visit = Visit()
    page.ask(visit, *files(photos[0]))
    assert page.view(visit, FITTING)["network"] == "miniimagenet/protonet"
    (line,) = page.view(Visit(), "encoder=pretrained")["notes"]
    assert "cannot be downloaded" in line and "no network" in line and str(Path.home()) not in line
    for name in ("a", "b"):
        add(page, visit, name, photos["ab".index(name)])
    lines = page.view(visit, "omniglot/protonet")["lines"]
    wrong = "look like photos, but this network knows letters, so its answers mean little; choose another network"
    assert f"2 of the 2 examples {wrong}" in lines and f"1 of the 1 queries {wrong}" in lines


def test_equal_scores_are_said(demo, letters):
    page, visit = demo(max_classes=40), Visit()
    names = [f"class {number}" for number in range(40)]  # few are sorted in the same order by any algorithm
    for name in names:
        add(page, visit, name, letters[0][0])
    page.ask(visit, *files(letters[1][0]))
    line = "several classes have the same largest score, so the answer is a guess among them"
    answer = page.view(visit, own(page))["answer"]
    assert line in answer["lines"] and [row[0] for row in answer["rows"]] == names


def test_a_taught_file_is_saved_loaded_and_extended(demo, letters, tmp_path):
    page = demo()
    visit = shown(page, letters, way=2)
    before = page.view(visit, own(page))["answer"]["rows"]
    path = tmp_path / "taught.fewshot"
    path.write_bytes(page.save(visit, own(page)))
    other = Visit()
    page.load(other, "mine.fewshot", path)
    page.ask(other, *files(letters[0][-1]))
    view = page.view(other, FITTING)
    assert view["networks"] == {"mine.fewshot": "mine.fewshot"}
    assert [(one["name"], one["taught"], one["examples"]) for one in view["classes"]] == [
        ("letter 0", 2, []),
        ("letter 1", 2, []),
    ]
    for row, old in zip(view["answer"]["rows"], before, strict=True):
        assert row[0] == old[0] and row[1:] == pytest.approx(old[1:], abs=1e-3)
    add(page, other, "letter 1", letters[1][3])
    add(page, other, "letter 2", *letters[2][:2])
    rows = page.view(other, FITTING)["answer"]["rows"]
    whole = shown(page, letters, way=3)
    add(page, whole, "letter 1", letters[1][3])
    for row, old in zip(rows, page.view(whole, own(page))["answer"]["rows"], strict=True):
        assert row[0] == old[0] and row[1:] == pytest.approx(old[1:], abs=1e-3)
    path.write_bytes(page.save(other, FITTING))
    page.load(visit, "more.fewshot", path)
    assert [one["taught"] for one in page.view(visit, FITTING)["classes"]] == [2, 3, 2]
    path.write_bytes(b"no file of ours")
    with pytest.raises(FewShotError, match=r"^bad\.fewshot is broken"):
        page.load(visit, "bad.fewshot", path)
    with pytest.raises(FewShotError, match="add examples of two classes first"):
        page.save(Visit(), own(page))


def test_limits_hold(demo, letters):
    page = demo(max_images=3, max_classes=2)
    visit = Visit()
    notes = add(page, visit, "many", *letters[0])
    assert len(visit.support["many"]) == 3
    assert notes == [f"{n}.png is left out: at most 3 images per class are allowed" for n in (3, 4)]
    assert add(page, visit, "two", letters[1][0]) == []
    assert add(page, visit, "three", letters[2][0]) == ["three is left out: at most 2 classes are allowed"]
    assert list(visit.support) == ["many", "two"]
    assert add(page, Visit(), " ", letters[0][0]) == ["enter a name for the class, then add its images"]
    visit = Visit()
    add(page, visit, "n" * 99, letters[0][0])
    add(page, visit, "a\u202eb", letters[0][0])
    assert list(visit.support) == ["n" * 40, "a\\u202eb"]


def bomb() -> bytes:
    """A PNG file of 20,000 by 20,000 pixels in half a megabyte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = (20000).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes(20001 * 20000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


HOSTILE = {
    "PostScript is a program and is not run": lambda: png(np.zeros((9, 9, 3), dtype=np.uint8), "EPS"),
    "exceeds limit of": bomb,
    "not an image in a known format": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "is blank: it has only one colour": lambda: png(np.full((9, 9), 7, dtype=np.uint8)),
    "blank: it has only one colour": lambda: png(np.full((1, 1, 3), (255, 0, 0), dtype=np.uint8)),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_unreadable_files_are_named_and_the_others_are_taken(demo, letters, why):
    page, visit = demo(), Visit()
    content = HOSTILE[why]()
    (line,) = add(page, visit, "a", letters[0][0], content, letters[0][1])
    assert len(visit.support["a"]) == 2 and "1.png" in line and why in line
    page.ask(visit, *files(letters[0][2]))
    with pytest.raises(FewShotError, match=r"0\.png") as caught:
        page.ask(visit, *files(content))
    assert why in str(caught.value) and visit.query is None and len(visit.support["a"]) == 2
    add(page, visit := Visit(), "a", content)
    assert visit == Visit()


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        (["max_images=0"], "max_images=0 must be a whole number of at least 1"),
        (["max_megabytes=ten"], "max_megabytes=ten must be a whole number of at least 1"),
        (["port=0"], "port=0 must be a whole number of at least 1 and at most 65,535"),
        (["port=80000"], "port=80000 must be a whole number of at least 1 and at most 65,535"),
        (['host="é..b"'], "cannot serve at é..b:7860"),
        (["host=5"], "host=5 must be a string"),
        (["crop=round"], "crop=round must be auto, center, pad or squash"),
        (["encoder=conv4"], "encoder=conv4: a checkpoint decides"),
        (["checkpoint=null", "dataset.size=abc"], "dataset.size=abc must be a whole number of at least 1"),
        (["checkpoint=/none"], "there is no checkpoint /none"),
        (["checkpoint=null", "encoder=conv4"], "untrained weights"),
    ],
)
def test_a_mistake_is_reported_in_one_line(run, overrides, notes):
    with pytest.raises(FewShotError) as caught:
        serve(compose(f"checkpoint={run('protonet')}", *overrides, name="demo"))
    assert notes in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_extra_it_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with (
        pytest.raises(FewShotError, match=r"uvicorn is not installed; .* '\.\[demo\]'"),
        page_of(compose(f"checkpoint={run('protonet')}", name="demo")),
    ):
        pass


def test_visits_are_kept_by_last_use_and_who_loses_one_is_notified_once():
    now = 0.0
    visits, shown = Visits(lambda: now), Visit({"a": []})
    visits.put("active", shown)
    for number in range(3 * VISITORS):
        assert visits.take(f"looks {number}") == (Visit(), [])  # who shows nothing takes no place
        visits.put(f"looks {number}", Visit())
    for number in range(VISITORS + 2):
        visits.put(f"new {number}", shown)
        visit, notes = visits.take("active")
        assert visit is shown and notes == []
        visits.put("active", visit)
    for number in range(3):
        assert visits.take(f"new {number}") == (Visit(), [FORGOTTEN])
        assert visits.take(f"new {number}") == (Visit(), [])
    assert visits.take("new 3") == (shown, [])
    now = IDLE + 1
    assert visits.take("active") == (Visit(), [FORGOTTEN]) and visits.take("new 9") == (Visit(), [FORGOTTEN])


@pytest.fixture(scope="module")
def address(run):
    """Of the page, served by this process."""
    pytest.importorskip("uvicorn", reason="no uvicorn: pip install 'fewshot[demo]'")
    config = compose(
        f"checkpoint={run('protonet')}", f"port={free_port()}", "max_megabytes=1", "max_model=2", name="demo"
    )
    with page_of(config) as found:
        yield found


def ask(url: str, body: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, str]:
    """Return the status and the text of an answer."""
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode("latin-1")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def post(address: str, action: str, body: bytes = b"", session: str = SESSION, **query: str) -> tuple[int, str]:
    return ask(f"{address}/{action}?{urlencode(query)}", body, visit=session)


def test_the_server_does_what_the_page_asks(address, letters):
    for name, contents in (("a", letters[0]), ("b", letters[1])):
        for number, content in enumerate(contents[:2]):
            status, text = post(address, "add", content, name=f"{number}.png", **{"class": name})
            assert status == 200 and json.loads(text) == {"notes": []}
    assert json.loads(post(address, "ask", letters[0][3], name="q.png")[1]) == {"notes": []}
    view = json.loads(post(address, "view", network=FITTING)[1])
    assert view["answer"]["rows"][0][0] in "ab" and view["notes"] == []
    assert json.loads(post(address, "view", session="f" * 32)[1])["classes"] == []
    status, text = post(address, "save")
    assert status == 200 and "__metadata__" in text
    (line,) = json.loads(post(address, "load", b"{}", name="mine.fewshot")[1])["notes"]
    assert line.startswith("mine.fewshot is broken") and "/tmp" not in line
    assert json.loads(post(address, "remove", **{"class": "a"})[1]) == {"notes": []}
    assert [one["name"] for one in json.loads(post(address, "view")[1])["classes"]] == ["b"]
    assert json.loads(post(address, "forget")[1]) == {"notes": []}
    assert json.loads(post(address, "view")[1])["query"] is None
    post(address, "restart")
    view = json.loads(post(address, "view")[1])
    assert view["classes"] == [] and view["query"] is None
    assert str(ROOT) not in json.dumps(view) and str(Path.home()) not in json.dumps(view)


@pytest.mark.parametrize(
    "path", ["README.md", "../demo.py", "%2e%2e/demo.py", "..%2fdemo.py", "page/", "docs", "//etc/passwd"]
)
def test_the_server_gives_out_nothing_but_the_page(address, path):
    for own in ("", "page.js", "page.css"):
        assert ask(f"{address}/{own}")[0] == 200
    assert ask(f"{address}/{path}")[0] == 404
    assert post(address, "file")[0] == 404


def test_requests_are_those_of_the_page_and_no_larger_than_its_limits(address):
    assert post(address, "ask", bytes(2**20 + 1), name="big.png") == (413, "big.png has more than the allowed 1 MB")
    assert post(address, "load", bytes(2**21 + 1), name="x.fewshot")[0] == 413
    for session in ("", "x", "0" * 31, "0" * 33, "../" * 11):
        assert post(address, "view", session=session)[0] == 403
    assert ask(f"{address}/view", b"", origin="http://evil.example")[0] == 403
    assert ask(f"{address}/view", method="OPTIONS", origin="http://evil.example")[0] == 405  # no preflight succeeds


def test_a_huge_request_takes_no_memory(address):
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /ask?name=big HTTP/1.1\r\nHost: {host}\r\nvisit: {SESSION}\r\nContent-Length: {280 * 2**20}\r\n\r\n"
    chunk = bytes(2**20)
    tracemalloc.start()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode())
        for _ in range(280):
            connection.sendall(chunk)
        answer = connection.recv(2**16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24 and b" 413 " in answer.splitlines()[0]


def test_a_page_for_this_machine_answers_to_its_own_names_alone(address):
    port = address.rpartition(":")[2]
    for name in ("127.0.0.1", f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert ask(f"{address}/", Host=name)[0] == 200, name
    for name in (f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}", f"0.0.0.0:{port}"):
        assert ask(f"{address}/", Host=name)[0] == 400, name
        assert ask(f"{address}/view", b"", Host=name, visit=SESSION)[0] == 400, name


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "my-machine"])
def test_a_page_that_is_opened_to_others_answers_to_any_name(host):
    assert hosts(host) == ["*"]
    assert {"localhost", "127.0.0.1"} <= set(hosts("127.0.0.1")) and "*" not in hosts("127.0.0.2")


def test_a_malformed_request_leaves_no_traceback(address, capfd):
    host, port = address.removeprefix("http://").split(":")
    sent = f"POST /ask HTTP/1.1\r\nHost: {host}\r\nvisit: {SESSION}\r\nContent-Length: 99\r\n\r\ncut off"
    for content in (b"no http\r\n\r\n", sent.encode()):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(content)
    for body in (b"", b"no image", bytes(9)):
        for action in ("add", "ask", "load", "remove"):
            assert post(address, action, body, **{"class": "a\x00", "name": "\x00"})[0] == 200
    written = capfd.readouterr()
    assert "Traceback" not in written.err + written.out


def test_an_address_in_use_is_reported(address, run):
    config = compose(f"checkpoint={run('protonet')}", f"port={address.rpartition(':')[2]}", name="demo")
    with pytest.raises(FewShotError, match=r"cannot serve at 127\.0\.0\.1:\d+: .*; choose another one with host="):
        serve(config)


def test_nobody_else_is_asked_for_anything(monkeypatch):
    pytest.importorskip("uvicorn", reason="no uvicorn: pip install 'fewshot[demo]'")
    asked = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def note(host):
        asked.append(host)

    monkeypatch.setattr(socket.socket, "connect", lambda self, to: (note(to[0]), connect(self, to))[1])
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **too: (note(host), look_up(host, *more, **too))[1])
    with page_of(compose(f"port={free_port()}", name="demo")) as address:
        assert ask(f"{address}/")[0] == 200
    assert asked and set(asked) <= {"127.0.0.1", "localhost", "::1"}


def test_the_page_names_nothing_elsewhere_and_its_text_can_be_read():
    files = {path.name: path.read_text() for path in (ROOT / "src" / "fewshot" / "page").iterdir()}
    assert set(files) == {"index.html", "page.css", "page.js"}
    assert not any(re.search(r"https?:|[\"'(]//", text) for text in files.values())

    def luminance(colour):
        digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = (dict(re.findall(r"--([\w-]+): #(\w+)", part)) for part in files["page.css"].split("@media")[:2])
    pairs = [("text", "ground"), ("text", "card"), ("soft", "ground"), ("soft", "card"), ("accent", "card")]
    for colours in (light, dark):
        for one, other in [*pairs, ("on-accent", "accent"), ("warn", "warn-ground"), ("warn", "card")]:
            low, high = sorted(luminance(colours[name]) for name in (one, other))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (one, other)


@pytest.fixture(scope="module")
def served(run):
    """The address of the page, started as a user would."""
    pytest.importorskip("uvicorn", reason="no uvicorn: pip install 'fewshot[demo]'")
    port = free_port()
    command = [
        sys.executable,
        ROOT / "src" / "demo.py",
        f"checkpoint={run('protonet')}",
        f"port={port}",
        "max_images=3",
    ]
    # A shell has what it starts in the background ignore Ctrl-C, and these tests with it.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as server:  # noqa: PLW1509
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}"
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0 and not errors


class Tab:
    """The page in a browser, as a new visitor sees it."""

    def __init__(self, browser, address: str, folder: Path) -> None:
        self.browser, self.folder = browser, folder
        browser.get(address)
        browser.execute_script("sessionStorage.clear()")
        browser.refresh()
        self.until(lambda: self.texts("#hint") != [""], "the page")

    def until(self, what, meaning: str) -> None:
        stop = time.monotonic() + 180
        while not what():
            if time.monotonic() > stop:
                pytest.fail(f"{meaning} never came:\n{self.texts('body')}")
            time.sleep(0.1)

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        # In one go: what is found first may have been drawn anew before it is read.
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText.trim())"
        return self.browser.execute_script(script, selector)

    def press(self, selector: str, *keys: str) -> None:
        """Reach an element by the Tab key alone, then press keys."""
        chains = pytest.importorskip("selenium.webdriver").ActionChains
        self.browser.execute_script("document.activeElement.blur()")
        for _ in range(60):
            chains(self.browser).send_keys("\ue004").perform()
            if self.browser.execute_script("return document.activeElement.matches(arguments[0])", selector):
                chains(self.browser).send_keys(*keys).perform()
                return
        pytest.fail(f"no key leads to {selector}")

    def upload(self, contents, pad: str) -> None:
        paths = [self.folder / f"{number}.png" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        self.all(f"#{pad} input[type=file]")[0].send_keys("\n".join(map(str, paths)))

    def examples(self, name: str, contents, images: int) -> None:
        self.press("#name", name)
        self.upload(contents, "examples")
        self.until(lambda: len(self.all(".class img")) == images, f"the images of {name}")

    def draw(self, pad: str) -> None:
        actions = pytest.importorskip("selenium.webdriver").ActionChains(self.browser)
        actions.move_to_element_with_offset(self.all(f"#{pad} canvas")[0], -40, -60).click_and_hold()
        actions.move_by_offset(30, 90).move_by_offset(50, -20).release().perform()

    def ink(self, pad: str) -> int:
        """The number of pixels in a pad that are drawn."""
        script = """const canvas = document.querySelector(arguments[0]);
            const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return data.filter((value, place) => place % 4 === 3 && value).length"""
        return self.browser.execute_script(script, f"#{pad} canvas")


ODD = "<b>${1}{{x}}"


@pytest.mark.slow
def test_in_a_browser_files_are_answered_as_the_predictor_answers_them(browser, served, run, letters, tmp_path):
    tab = Tab(browser, served, tmp_path)
    tab.examples("letter 0", letters[0][:2], 2)
    tab.examples(ODD, [*letters[1][:2], b"no image"], 4)
    assert tab.texts(".class b") == ["letter 0", ODD]
    broken = "cannot read the image 2.png: not an image in a known format; replace or remove it"
    tab.until(lambda: tab.texts("#notes span") == [broken], "what is broken")
    tab.upload([letters[0][4]], "query")
    tab.until(lambda: tab.all(".scores") and not tab.texts("#notes span"), "the answer")
    assert tab.ink("query") > 1000  # the query is shown

    predictor = make_predictor(compose(f"checkpoint={run('protonet')}", name="demo"))
    support = {
        name: [predictor.read(file) for file in files(*letter[:2])]
        for name, letter in zip(("letter 0", ODD), letters, strict=False)
    }
    logits = predictor.learn(support)([predictor.read(*files(letters[0][4]))])[0]
    found = [[cell.text for cell in row.find_elements("css selector", "td")] for row in tab.all(".scores tbody tr")]
    assert [name for name, *_ in found] == [list(support)[place] for place in logits.argsort(descending=True).tolist()]
    assert tab.texts(".best b") == [found[0][0]]
    for name, _, probability, distance in found:
        label = list(support).index(name)
        assert float(distance) == pytest.approx(-logits[label].item(), abs=2e-3)
        assert float(probability.rstrip("%")) == pytest.approx(100 * logits.softmax(0)[label].item(), abs=0.1)
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and all(link.startswith((served, "data:")) for link in asked)
    browser.refresh()
    tab.until(
        lambda: tab.texts(".class b") == ["letter 0", ODD] and tab.ink("query") > 1000, "the visit, after a reload"
    )
    (chooser,) = tab.all("#network")
    for chosen in ("miniimagenet/protonet", "fitting"):
        browser.execute_script("arguments[0].value = arguments[1]; arguments[0].onchange()", chooser, chosen)
        tab.until(lambda: ("scaled cosine" in " ".join(tab.texts("#answer li"))) == (chosen != "fitting"), chosen)  # noqa: B023
    assert not Tab(browser, served, tmp_path).all(".class")  # another visitor


@pytest.mark.slow
def test_in_a_browser_only_clear_removes_a_picture_and_a_reload_keeps_the_network(browser, served, letters, tmp_path):
    chains = pytest.importorskip("selenium.webdriver").ActionChains
    tab = Tab(browser, served, tmp_path)
    for label in range(2):
        tab.examples(f"letter {label}", letters[label][:2], 2 * (label + 1))
    tab.upload([letters[0][4]], "query")
    tab.until(lambda: tab.all(".scores"), "the answer")
    ink, answer = tab.ink("query"), tab.texts("#answer")
    chains(browser).move_to_element(tab.all("#query canvas")[0]).click().perform()
    browser.execute_script(
        "arguments[0].value = 'miniimagenet/protonet'; arguments[0].onchange()", *tab.all("#network")
    )
    tab.until(lambda: "scaled cosine" in tab.texts("#answer")[0], "the answer of the other network")
    assert tab.ink("query") == ink > 1000
    browser.refresh()
    tab.until(lambda: "scaled cosine" in "".join(tab.texts("#answer")), "the same, after a reload")
    assert "miniimagenet/protonet" in tab.texts("#about")[0] and tab.texts("#answer") != answer
    tab.press("#query .clear", "\ue007")
    tab.until(lambda: not tab.all(".scores") and tab.ink("query") == 0, "the end of the query")
    tab.press(".pictures button", "\ue007")
    tab.until(lambda: len(tab.all(".class img")) == 3, "the removal of one")
    assert browser.execute_script("return document.activeElement.matches('#classes button')")
    assert tab.ink("query") == 0  # it does not come back
    chains(browser).move_to_element(tab.all("#query canvas")[0]).click().perform()
    tab.until(lambda: tab.all(".scores"), "the answer to a dot")


@pytest.mark.slow
def test_in_a_browser_what_cannot_be_read_or_answered_is_said_and_the_page_goes_on(browser, served, letters, tmp_path):
    tab = Tab(browser, served, tmp_path)
    browser.execute_script(
        "pads.examples.files([{name: 'folder', slice: () => ({arrayBuffer: () => Promise.reject(Error())})}])"
    )
    tab.until(lambda: tab.texts("#notes span") == ["folder cannot be read: add files, not folders"], "the folder")
    browser.execute_script("""const real = fetch;
        window.fetch = async () => {
            window.fetch = real;
            return new Response("{", {headers: {"content-type": "application/json"}});
        }""")
    tab.upload(letters[0][:1], "examples")
    tab.until(lambda: "no answer from the server" in "".join(tab.texts("#notes span")), "the broken answer")
    tab.examples("letter 0", letters[0][:1], 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_in_a_browser_drawings_photos_and_keys_work_at_both_sizes(browser, served, letters, tmp_path, size):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500},
    )
    tab = Tab(browser, served, tmp_path)
    tab.examples("letter 0", letters[0][:2], 2)
    tab.draw("examples")
    tab.press("#name", "drawn")
    tab.press("#examples .draw", "\ue007")
    tab.until(lambda: tab.texts(".class b") == ["letter 0", "drawn"], "the drawing among the examples")
    assert tab.ink("examples") == 0
    tab.draw("query")
    tab.until(lambda: tab.texts(".best b") == ["drawn"], "the answer")
    for box in ("section", "button", "select", "#answer table"):  # nothing is cut off or broken into lines
        for element in tab.all(box):
            place = element.rect
            assert place["x"] >= 0 and place["x"] + place["width"] <= size[0], box
            assert box != "button" or place["height"] < 50
    assert all(
        button.text or button.get_attribute("aria-label") for button in tab.all("button") if button.is_displayed()
    )

    tab.press("#examples .camera", "\ue007")
    tab.until(lambda: tab.all("#examples .filming, #notes p"), "the camera")
    if tab.all(".filming"):
        tab.press("#name", "camera")
        tab.press("#examples .take", "\ue007")
        tab.until(lambda: tab.texts(".class b")[2:] == ["camera"], "the picture among the examples")
        tab.press("#examples .camera", "\ue007")
        tab.until(lambda: not tab.all(".filming"), "the end of the film")
        tab.press('.remove[aria-label="Remove camera"]', "\ue007")
        tab.until(lambda: len(tab.all(".class")) == 2, "the removal")
    tab.press(".class .more", "\ue007")
    tab.upload(letters[0][2:4], "examples")
    tab.until(lambda: "1.png is left out: at most 3 images" in " ".join(tab.texts("#notes span")), "the limit")
    tab.press(".pictures button", "\ue007")
    tab.until(lambda: len(tab.all(".class img")) == 3, "the removal of one")
    tab.press('.remove[aria-label="Remove drawn"]', "\ue007")
    tab.until(lambda: tab.texts(".class b") == ["letter 0"] and not tab.all(".best"), "the removal of a class")
    tab.press("#restart", "\ue007")
    browser.switch_to.alert.accept()
    tab.until(lambda: not tab.all(".class") and tab.ink("query") == 0, "the beginning")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
