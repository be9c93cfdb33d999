"""The page: what it does, how it is served, and the whole in a browser."""

import asyncio
import contextlib
import html
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
from base64 import b64encode
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewshot.cli  # noqa: F401  for the help
from conftest import METHODS, free_port, wait_for
from fewshot.config import ROOT, compose
from fewshot.data.files import ImageFile
from fewshot.demo import (
    FORGOTTEN,
    FORM,
    IDLE,
    VISITORS,
    Demo,
    Gate,
    Visit,
    Visits,
    _hosts,
    _sent,
    fitting,
    is_drawing,
    open_networks,
    page_of,
    serve,
)
from fewshot.errors import FewShotError
from fewshot.models import short_names
from fewshot.predictor import make_predictor
from fewshot.trained import load_trained
from fewshot.training import make_data


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
        return Demo(make_predictor(config), config)

    return make


def png(pixels, kind="PNG", **options) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def files(*contents: bytes) -> list[ImageFile]:
    return [ImageFile(f"{number}.png", BytesIO(content).getvalue) for number, content in enumerate(contents)]


def shown(demo, letters, way=3, shot=2) -> Visit:
    """A visit with a support set, and for its query the last image of the first class."""
    visit = Visit()
    for label in range(way):
        visit, notes = demo.add(visit, f"letter {label}", files(*letters[label][:shot]))
        assert not notes
    visit, notes = demo.ask(visit, files(letters[0][-1]))
    assert not notes
    return visit


def rows(answer: str) -> dict[str, tuple[float, float]]:
    """Probability, in percent, and score by class, in the order of the page."""
    found = re.findall(r"<tr><td>(.*?)</td>.*?>([\d.]+)%</td><td[^>]*>(-?[\d.]+)</td></tr>", answer)
    return {html.unescape(name): (float(probability), float(score)) for name, probability, score in found}


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_has_the_probabilities_and_the_scores_of_the_method(demo, letters, method):
    page = demo(method)
    visit = shown(page, letters, way=3, shot=2)
    answer, notes = page.answer(visit)
    logits = page.predictor.learn(visit.support)([visit.query])[0]
    found = rows(answer)
    assert list(found) == [f"letter {label}" for label in logits.argsort(descending=True).tolist()] and not notes
    for label, (probability, logit) in enumerate(zip(logits.softmax(0).tolist(), logits.tolist(), strict=True)):
        shown_probability, score = found[f"letter {label}"]
        assert shown_probability == pytest.approx(100 * probability, abs=0.051)
        assert score == pytest.approx(-logit if method == "protonet" else logit, abs=6e-4) and abs(score) > 0.01
    named = {"protonet": "distance: squared Euclidean", "matching": "logit: logarithm of the query's mean attention"}
    assert named.get(method.removesuffix("_fce"), "logit: the network's score of the class") in answer


def test_the_distances_are_those_of_the_embeddings(demo, letters):
    page = demo()
    visit = shown(page, letters)
    embed = page.predictor.represent
    prototypes = torch.stack([embed(images).mean(0) for images in visit.support.values()])
    expected = (embed([visit.query]) - prototypes).square().sum(1)
    found = rows(page.answer(visit)[0])
    assert expected.min() > 0.01
    assert [found[name][1] for name in visit.support] == pytest.approx(expected.tolist(), abs=1e-3)


def test_classes_grow_and_go_and_each_visit_is_its_own(demo, letters):
    page = demo()
    first = shown(page, letters, way=2)
    second, notes = page.add(first, "  letter   1 ", files(letters[1][3]))
    assert [len(images) for images in second.support.values()] == [2, 3] and not notes
    assert [len(images) for images in first.support.values()] == [2, 2]
    third = page.remove(page.remove(second, "letter 0"), "nobody")
    assert list(third.support) == ["letter 1"] and third.query is second.query
    answer, notes = page.answer(third)
    assert not answer and notes == ["a support set needs at least two classes, and at least one image of each"]
    assert page.answer(Visit()) == ("", []) and page.ask(third, []) == (third, [])


def test_maml_notes_more_classes_than_it_was_trained_for(demo, letters):
    page = demo("maml")
    assert page.answer(shown(page, letters, way=5))[1] == []
    answer, notes = page.answer(shown(page, letters, way=6, shot=1))
    assert len(rows(answer)) == 6 and notes == ["this network was trained for 5 classes: with 6 it is less accurate"]


def test_the_network_that_fits_the_examples_is_found(run, letters):
    networks = open_networks(compose(f"checkpoint={run('protonet')}", name="demo"))
    assert list(networks) == [str(run("protonet")), *short_names()]
    for name, model in list(networks.items())[1:]:
        assert model.predictor.channels == (3 if name.startswith("mini") else 1)
    listed = {name: networks[name] for name in ("miniimagenet/protonet", "omniglot/protonet", "glyphs/protonet")}
    photos = [png(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8)) for seed in range(3)]

    def found(*contents):
        return fitting(listed, {name: page.add(Visit(), "a", files(*contents))[0] for name, page in listed.items()})

    assert found() == "miniimagenet/protonet"
    assert found(letters[0][0]) == "omniglot/protonet"
    assert found(*photos) == found(*photos[:2], letters[0][0]) == "miniimagenet/protonet"
    assert found(photos[0], *letters[0][:2]) == "omniglot/protonet"
    asked = {name: page.ask(Visit(), files(letters[0][0]))[0] for name, page in listed.items()}
    assert fitting(listed, asked) == "omniglot/protonet"


def test_a_drawing_is_ink_on_a_plain_ground():
    ground = np.full((84, 84, 3), 240, dtype=np.uint8)
    ground[30:50, 20:60] = 10
    assert is_drawing(ground) and is_drawing(255 - ground)
    coloured, filled = ground.copy(), ground.copy()
    coloured[..., 0] = 120
    filled[10:80, 10:80] = np.arange(70, dtype=np.uint8)[:, None, None]
    assert not is_drawing(coloured) and not is_drawing(filled)
    assert not is_drawing(np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8))


def test_equal_scores_are_noted(demo, letters):
    page, visit = demo(), Visit()
    for name in ("a", "b"):
        visit, _ = page.add(visit, name, files(letters[0][0]))
    visit, _ = page.ask(visit, files(letters[1][0]))
    assert page.answer(visit)[1] == ["several classes have the same largest score, so the answer is a guess among them"]


def test_limits_hold(demo, letters):
    page = demo(max_images=3, max_classes=2, max_megabytes=1)
    visit, notes = page.add(Visit(), "many", files(*letters[0]))
    assert len(visit.support["many"]) == 3
    assert notes == ["3.png and all after it are left out: 3 images in a class are the most allowed"]
    visit, _ = page.add(visit, "two", files(letters[1][0]))
    after, notes = page.add(visit, "three", files(letters[2][0]))
    assert after is visit and notes == ["three is left out: 2 classes are the most allowed"]
    noise = png(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8))
    assert len(noise) > 2**20
    for after, (line,) in (page.add(visit, "two", files(noise)), page.ask(visit, files(noise))):
        assert after.support == visit.support
        assert line == "cannot read the image 0.png: it has more than the allowed 1 MB; replace or remove it"
    after, notes = page.add(Visit(), " ", files(letters[0][0]))
    assert not after.support and notes == ["enter a name for the class, then add its images"]
    after, _ = page.add(Visit(), "n" * 99, files(letters[0][0]))
    assert list(after.support) == ["n" * 40]


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
}


@pytest.mark.parametrize("why", HOSTILE)
def test_unreadable_files_are_named_and_the_others_are_classified(demo, letters, why):
    page = demo()
    content = HOSTILE[why]()
    visit, notes = page.add(Visit(), "a", files(letters[0][0], content, letters[0][1]))
    assert len(visit.support["a"]) == 2 and len(notes) == 1 and "1.png" in notes[0] and why in notes[0]
    before = shown(page, letters)
    after, (line,) = page.ask(before, files(content))
    assert "0.png" in line and why in line and after.query is None and after.support == before.support
    assert page.add(Visit(), "a", files(content))[0].support == {}


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        (["max_images=0"], "max_images=0 must be a whole number of at least 1"),
        (["max_megabytes=ten"], "max_megabytes=ten must be a whole number of at least 1"),
        (["port=-1"], "port=-1 must be a whole number of at least 1"),
        (["encoder=conv4"], "encoder=conv4: a checkpoint decides"),
        (["checkpoint=/none"], "there is no checkpoint /none"),
        (["checkpoint=null", "encoder=conv4"], "weights that nobody has trained"),
    ],
)
def test_a_mistake_is_reported_in_one_line(run, overrides, notes):
    with pytest.raises(FewShotError) as caught:
        serve(compose(f"checkpoint={run('protonet')}", *overrides, name="demo"))
    assert notes in str(caught.value) and "\n" not in str(caught.value)


def test_without_gradio_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with (
        pytest.raises(FewShotError, match=r"gradio is not installed; .* '\.\[demo\]'"),
        page_of(compose(f"checkpoint={run('protonet')}", name="demo")),
    ):
        pass


def test_a_huge_request_takes_no_memory_and_is_answered_in_one_line():
    chunk, left, answers = bytes(2**20), 280, []

    async def receive():
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": chunk, "more_body": left > 0}

    async def send(message):
        answers.append(message)

    async def app(*_):
        pytest.fail("it was let through")

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": []}
    tracemalloc.start()
    asyncio.run(Gate(app, largest=2**21)(scope, receive, send))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23 and left == 0
    assert answers[0]["status"] == 413
    assert answers[1]["body"] == b"a request may have at most 2,097,152 bytes; send fewer images at once"


def test_too_many_images_at_once_are_named(demo, letters):
    sent = [["0.png", f"data:image/png;base64,{b64encode(letters[0][0]).decode()}"], ["1.png", None]]
    visit, notes = demo().add(Visit(), "a", _sent(json.dumps(sent)))
    assert len(visit.support["a"]) == 1
    assert notes == ["1.png is left out: with the images before it, it is too large; add it separately"]


def test_visits_are_kept_by_last_use_and_who_loses_one_is_notified_once():
    now = 0.0
    visits, shown = Visits(lambda: now), Visit({"a": ()})
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


def gradio_or_skip():
    pytest.importorskip("gradio", reason="no gradio: pip install 'fewshot[demo]'")


@pytest.fixture(scope="module")
def address(run):
    """Of the page, served by this process."""
    gradio_or_skip()
    config = compose(
        f"checkpoint={run('protonet')}", f"port={free_port()}", "max_megabytes=1", "max_together=1", name="demo"
    )
    with page_of(config):
        yield f"http://127.0.0.1:{config.port}"


def status(url: str, body: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path",
    [
        f"gradio_api/file={ROOT / 'README.md'}",
        "gradio_api/file=http://example.com/a.png",
        f"file={ROOT / 'README.md'}",
        "gradio_api/proxy=http://example.com/",
        "gradio_api/run/predict",
        "gradio_api/runs",
        "static/../../../etc/passwd",
        "assets/%2e%2e/%2e%2e/blocks.py",
        "monitoring",
        "docs",
    ],
)
def test_the_server_gives_out_nothing_but_the_page(address, path):
    assert status(f"{address}/") == 200
    assert status(f"{address}/{path}") in (403, 404)


def test_the_server_takes_nothing_but_text_and_no_more_than_its_limits(address):
    join = f"{address}/gradio_api/queue/join"
    fetch = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    assert status(join, json.dumps({"data": [None, "a", fetch]}).encode()) == 400
    assert status(join, json.dumps({"data": [None, "a", [fetch]]}).encode()) == 400
    for body in (b"", b"no json", b"[]", b'{"data": 1}', b"[" * 99999):
        assert status(join, body) == 400
    assert status(join, b" " * (FORM + (2**20 + 1) * 4 // 3 + 1)) == 413
    assert status(f"{address}/gradio_api/upload", b"--x") == 404


def test_a_page_for_this_machine_answers_to_its_own_names_alone(address):
    port = address.rpartition(":")[2]
    for name in ("127.0.0.1", f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert status(f"{address}/config", Host=name) == 200, name
    for name in (
        f"evil.example:{port}",
        "evil.example",
        f"127.0.0.1.evil.example:{port}",
        "localhost.",
        f"0.0.0.0:{port}",
    ):
        assert status(f"{address}/config", Host=name) == 403, name
        assert status(f"{address}/gradio_api/queue/join", b'{"data": []}', Host=name) == 403, name


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "my-machine"])
def test_a_page_that_is_opened_to_others_answers_to_any_name(host):
    assert _hosts(host) is None
    assert {"localhost", "127.0.0.1"} <= (_hosts("127.0.0.1") or set())


def test_a_malformed_request_is_refused_and_leaves_no_traceback(address, capfd):
    join = f"{address}/gradio_api/queue/join"
    for body in (b"{}", b'{"data": ["x"]}', b'{"data": [], "fn_index": "x"}', b'{"data": [], "fn_index": 9999}'):
        assert 400 <= status(join, body) < 500, body
    for query in ("queue/data", "queue/data?session_hash=", "heartbeat/x%00y"):
        with contextlib.suppress(TimeoutError, urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/gradio_api/{query}", timeout=0.5).close()
    written = capfd.readouterr()
    assert "Traceback" not in written.err + written.out


def test_an_address_in_use_is_reported(address, run):
    config = compose(f"checkpoint={run('protonet')}", f"port={address.rpartition(':')[2]}", name="demo")
    with pytest.raises(FewShotError, match=r"cannot serve at 127\.0\.0\.1:\d+: .*; choose another one with host="):
        serve(config)


def test_nobody_else_is_asked_for_anything(run, monkeypatch):
    gradio_or_skip()
    asked = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def note(host):
        asked.append(host)

    monkeypatch.setattr(socket.socket, "connect", lambda self, to: (note(to[0]), connect(self, to))[1])
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **too: (note(host), look_up(host, *more, **too))[1])
    config = compose(f"checkpoint={run('protonet')}", f"port={free_port()}", name="demo")
    with page_of(config):
        assert status(f"http://127.0.0.1:{config.port}/") == 200
        time.sleep(0.5)  # what is asked in a thread
    assert asked and set(asked) <= {"127.0.0.1", "localhost", "::1"}


@pytest.fixture(scope="module")
def served(run):
    """The address of the page, started as a user would."""
    gradio_or_skip()
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
        self.until(lambda: len(self.all(".pad canvas")) == 2, "the page")

    def until(self, what, meaning: str) -> None:
        stop = time.monotonic() + 60
        while not what():
            if time.monotonic() > stop:
                pytest.fail(f"{meaning} never came:\n{self.texts('body')}")
            time.sleep(0.1)

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        # In one go: what is found first may have been drawn anew before it is read.
        script = "return [...document.querySelectorAll(arguments[0])].map(of => of.innerText.trim())"
        return self.browser.execute_script(script, selector)

    def name(self, *keys: str) -> str:
        (box,) = self.all("textarea, input[type=text]")
        if keys:
            box.clear()
            box.send_keys(*keys)
        return box.get_attribute("value")

    def upload(self, contents, pad: int) -> None:
        paths = [self.folder / f"{number}.png" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        self.all(".pad input[type=file]")[pad].send_keys("\n".join(map(str, paths)))

    def examples(self, name: str, contents, images: int) -> None:
        self.name(name)
        self.upload(contents, 0)
        self.until(lambda: len(self.all(".class img")) == images, f"the images of {name}")

    def draw(self, pad: int) -> None:
        actions = pytest.importorskip("selenium.webdriver").ActionChains(self.browser)
        actions.move_to_element_with_offset(self.all(".pad canvas")[pad], -40, -60).click_and_hold()
        actions.move_by_offset(30, 90).move_by_offset(50, -20).release().perform()


ODD = "<b>${1}{{x}}"


@pytest.mark.slow
def test_in_a_browser_files_are_answered_as_the_predictor_answers_them(browser, served, run, letters, tmp_path):
    tab = Tab(browser, served, tmp_path)
    tab.examples("letter 0", letters[0][:2], 2)
    tab.examples(ODD, [*letters[1][:2], b"no image"], 4)
    assert tab.texts(".class b") == ["letter 0", ODD]
    broken = "cannot read the image 2.png: not an image in a known format; replace or remove it"
    tab.until(lambda: tab.texts(".notes p") == [broken], "what is broken")
    tab.upload([letters[0][4]], 1)
    tab.until(lambda: tab.all(".scores") and not tab.texts(".notes p"), "the answer")
    assert "distance: squared Euclidean" in tab.texts("small")[0]

    predictor = make_predictor(compose(f"checkpoint={run('protonet')}", name="demo"))
    support = {
        name: [predictor.read(file) for file in files(*letter[:2])]
        for name, letter in zip(("letter 0", ODD), letters, strict=False)
    }
    logits = predictor.learn(support)([predictor.read(*files(letters[0][4]))])[0]
    found = [[cell.text for cell in row.find_elements("css selector", "td")] for row in tab.all(".scores tr")[1:]]
    assert [name for name, *_ in found] == [list(support)[place] for place in logits.argsort(descending=True).tolist()]
    assert tab.texts(".answer b") == [found[0][0]]
    for name, _, probability, distance in found:
        label = list(support).index(name)
        assert float(distance) == pytest.approx(-logits[label].item(), abs=2e-3)
        assert float(probability.rstrip("%")) == pytest.approx(100 * logits.softmax(0)[label].item(), abs=0.1)
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(of => of.name)")
    assert asked and all(link.startswith((served, "data:")) for link in asked)
    assert not Tab(browser, served, tmp_path).all(".class")  # another visitor


@pytest.mark.slow
def test_in_a_browser_another_network_answers_for_the_same_examples(browser, served, letters, tmp_path):
    tab = Tab(browser, served, tmp_path)
    for number in range(2):
        tab.examples(f"letter {number}", letters[number][:2], 2 * number + 2)
    tab.upload([letters[0][4]], 1)
    tab.until(lambda: tab.all(".scores"), "the answer")
    assert not any(name in " ".join(tab.texts("small")) for name in short_names())  # that of the command
    (chooser,) = tab.all("input[role=combobox]")
    assert chooser.get_attribute("value").endswith("protonet0")
    for chosen, used in (
        ("miniimagenet/protonet", "miniimagenet/protonet"),
        ("the one that fits the examples", "protonet0"),
    ):
        chooser.click()
        tab.until(lambda: len(tab.all("[role=option]")) == len(short_names()) + 2, "the list")
        next(option for option in tab.all("[role=option]") if option.text.endswith(chosen)).click()
        tab.until(lambda: any(f"{text} ".find(f"{used} ") > 0 for text in tab.texts("small")), f"the answer of {used}")  # noqa: B023
        assert len(tab.all(".class img")) == 4 and tab.all(".scores") and not tab.texts(".notes p")


@pytest.mark.slow
def test_in_a_browser_drawings_are_classified_added_and_taken_out(browser, served, letters, tmp_path):
    tab = Tab(browser, served, tmp_path)
    tab.examples("letter 0", letters[0][:2], 2)
    tab.draw(0)
    tab.name("drawn")
    tab.all(".add")[0].click()
    tab.until(lambda: tab.texts(".class b") == ["letter 0", "drawn"], "the drawing among the examples")
    tab.draw(1)
    tab.until(lambda: tab.texts(".answer b") == ["drawn"], "the answer")
    tab.all(".add")[0].click()
    tab.until(
        lambda: tab.texts(".notes p") == ["the drawing is blank: it has only one colour"], "why nothing was added"
    )

    tab.all(".class")[0].click()
    tab.until(lambda: tab.name() == "letter 0", "the name")
    tab.upload(letters[0][2:4], 0)
    tab.until(lambda: "1.png and all after it" in " ".join(tab.texts(".notes p")), "the limit")
    tab.until(lambda: len(tab.all(".class img")) == 4, "the images within the limit")
    tab.all(".class button")[1].click()
    tab.until(lambda: tab.texts(".class b") == ["letter 0"], "the removal")
    tab.until(
        lambda: "a support set needs at least two classes" in " ".join(tab.texts(".notes p")), "why there is no answer"
    )
    tab.until(lambda: not tab.all(".answer"), "the end of the answer")
    next(button for button in tab.all("button") if button.text == "Remove everything").click()
    tab.until(lambda: not tab.all(".class"), "the beginning")


def test_the_page_says_how_good_the_answers_will_be_and_whether_the_query_is_like_a_class(demo, letters):
    page = demo()
    answer, _ = page.answer(shown(page, letters, way=3, shot=1))
    assert "add a second example of a class" in answer
    visit = shown(page, letters, way=3, shot=2)
    answer, _ = page.answer(visit)
    assert "leave-one-out accuracy on 6 examples: " in answer
    assert "like the examples: familiarity" in answer or "perhaps none of these: familiarity" in answer
    assert page.answer(visit)[0] == answer and len(visit.learned) == 1
    assert not page.remove(visit, "letter 2").learned
