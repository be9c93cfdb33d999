"""A page in the browser: add examples to classes, then get the answer for a query, with its distances."""

import io
import json
import logging
import re
import time
from base64 import b64decode, b64encode
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from fewshot.config import ROOT
from fewshot.data.files import ImageFile
from fewshot.directories import newest_run
from fewshot.distances import cosine, l2
from fewshot.errors import FewShotError
from fewshot.familiarity import FALSE_ALARM
from fewshot.learned import Learned, Pixels
from fewshot.methods.base import FewShotMethod
from fewshot.methods.maml import MAML
from fewshot.methods.matching import MatchingNetwork
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.metrics import largest
from fewshot.models import find, short_names
from fewshot.predictor import Predictor, make_predictor
from fewshot.text import for_html, say
from fewshot.trained import choices_of

LONGEST = 40  # characters of a class's name
THUMBNAIL = 64  # pixels, the most that a picture in the page has on a side
VISITORS = 20  # the most recently active ones, whose images are kept
IDLE = 3600  # seconds without activity after which a visitor's images are removed
FORGOTTEN = (
    f"your images have been removed: the page keeps those of the {VISITORS} most recent visitors, for up to "
    f"{IDLE // 60} minutes; add them again"
)
# Paths that the page requests. Gradio would also accept files, serve them, and fetch addresses.
ASKED = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|(assets|static)/.*"
    r"|gradio_api/(startup-events|(queue|heartbeat)/.*))"
)
LOCAL = ("localhost", "127.0.0.1", "::1")
FITTING = "the one that fits the examples"  # a choice in the list of networks
# Of drawings: the mean difference between the colours of a pixel, and the share of pixels that are near the ground, of
# all and at the edges. So all of Omniglot's test characters (their first drawing) and 2% of miniImageNet's test photos
# count as drawings.
MOST_COLOUR, NEAR_GROUND, LEAST_GROUND, LEAST_AT_EDGES = 8, 48, 0.6, 0.9
FORM = 2**20  # bytes of a request in addition to the images
Message = Mapping[str, Any]  # of ASGI
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# A square to draw and drop images on. Gradio's own component decodes whatever it receives before we could check it;
# here images arrive as strings and never become files on the server.
PAD = """
<div class="square"><canvas width="280" height="280"></canvas></div>
<div class="buttons">
<label>choose ${query ? "an image" : "images"}<input type="file" ${query ? "" : "multiple"} hidden></label>
${query ? "" : '<button class="add">add the drawing</button>'}
<button class="clear">clear</button>
</div>
"""
PEN = """
const pad = element.querySelector("canvas"), pen = pad.getContext("2d"), chooser = element.querySelector("input");
Object.assign(pen, {lineWidth: 18, lineCap: "round", lineJoin: "round"});
const place = event => [event.offsetX * pad.width / pad.clientWidth, event.offsetY * pad.height / pad.clientHeight];
const clear = () => {
    pen.clearRect(0, 0, pad.width, pad.height);
    pad.parentElement.classList.remove("drawn");
};
const send = images => { props.value = JSON.stringify(images); trigger("submit"); };
const sendDrawing = () => send([["the drawing", pad.toDataURL()]]);
const sendFiles = async files => {
    // One image and one byte more than allowed, so that the server notices.
    const read = file => new Promise(done => {
        const reader = new FileReader();
        reader.onload = () => done([file.name, reader.result]);
        reader.onerror = () => done([file.name, ""]);
        reader.readAsDataURL(file.slice(0, props.bytes + 1));
    });
    const chosen = [...files].slice(0, props.query ? 1 : props.images + 1);
    const images = [];
    let room = props.together;
    for (const file of chosen) {
        const size = Math.min(file.size, props.bytes + 1);
        room -= size;
        images.push(room < 0 && images.length ? [file.name, null] : await read(file));
    }
    if (!images.length) return;
    clear();
    send(images);
};
pad.onpointerdown = event => {
    pad.setPointerCapture(event.pointerId);
    pad.parentElement.classList.add("drawn");
    pen.beginPath();
    pen.moveTo(...place(event));
    pad.onpointermove(event);
};
pad.onpointermove = event => {
    if (!event.buttons) return;
    pen.lineTo(...place(event));
    pen.stroke();
};
if (props.query) pad.onpointerup = sendDrawing;
else element.querySelector(".add").onclick = () => { sendDrawing(); clear(); };
element.querySelector(".clear").onclick = clear;
chooser.onchange = () => { sendFiles(chooser.files); chooser.value = ""; };
element.ondragover = event => event.preventDefault();
element.ondrop = event => { event.preventDefault(); sendFiles(event.dataTransfer.files); };
"""
CHOICE = """
element.onclick = event => {
    const row = event.target.closest(".class");
    if (row) trigger(event.target.matches("button") ? "remove" : "choose", {name: row.dataset.name});
};
"""
STYLE = """
.pad {display: flex; gap: 14px}
.square {position: relative; flex: none; width: 200px; height: 200px; background: white; border: 1px dashed #999;
    border-radius: 6px}
.square::before {content: "draw here, or drop images"; position: absolute; inset: 0; padding: 76px 44px; color: #bbb;
    text-align: center}
.square.drawn::before {content: none}
.square canvas {position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; cursor: crosshair}
.buttons {display: flex; flex-direction: column; align-items: flex-start; gap: 8px}
.buttons button, .buttons label {padding: 3px 12px; font: inherit; cursor: pointer; color: inherit; background: none;
    border: 1px solid #9998; border-radius: 6px}
.notes:not(:has(p)) {display: none}
.notes p {margin: 4px 0; padding: 6px 12px; border-left: 4px solid #D55E00; background: #D55E0022}
.class {display: flex; align-items: center; gap: 10px; padding: 6px 0; border-top: 1px solid #8884; cursor: pointer}
.class b {width: 7em; overflow-wrap: anywhere}
.class div {display: flex; flex-wrap: wrap; gap: 4px; flex: 1}
.class button {padding: 0 8px; font: inherit; cursor: pointer; color: inherit; background: none; border: none}
.seen {height: 48px; width: 48px; image-rendering: pixelated; border-radius: 4px}
.answer {display: flex; align-items: center; gap: 14px; margin-bottom: 8px}
.answer .seen {height: 84px; width: 84px}
.answer b {font-size: 1.6em; overflow-wrap: anywhere}
.scores {width: 100%; border-collapse: collapse; table-layout: fixed}
.scores th, .scores td {padding: 6px 8px; text-align: left; border-top: 1px solid #8884; overflow-wrap: anywhere}
.scores th {vertical-align: bottom}
.scores .wide {width: 34%}
.scores .number {text-align: right; font-variant-numeric: tabular-nums}
.bar {height: 14px; background: #0072B2; border-radius: 3px; min-width: 1px}
"""


@dataclass(frozen=True)
class Visit:
    """The images of one visitor.

    Attributes:
        support: the images of each class, by its name; no class is empty.
        query: the image to classify.
        learned: what was learned from the support set, by the page's network.
    """

    support: Mapping[str, tuple[Pixels, ...]] = field(default_factory=dict)
    query: Pixels | None = None
    learned: "dict[Demo, Learned]" = field(default_factory=dict, compare=False, repr=False)


class Visits:
    """The images of the most recent visitors, and which visitors have lost theirs.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[str, tuple[Visit, float]] = OrderedDict()  # by session, with the time of its last use
        self._forgotten: deque[str] = deque(maxlen=500 * VISITORS)

    def take(self, session: str) -> tuple[Visit, list[str]]:
        """Return the visit of a session, or a new one; and a note for the visitor if the images were removed."""
        self._forget()
        if session in self._kept:
            return self._kept[session][0], []
        if session in self._forgotten:
            self._forgotten.remove(session)
            return Visit(), [FORGOTTEN]
        return Visit(), []

    def put(self, session: str, visit: Visit) -> None:
        """Keep a visit, unless it is empty."""
        self._kept.pop(session, None)
        if visit.support or visit.query is not None:
            self._kept[session] = visit, self._clock()
        self._forget()

    def _forget(self) -> None:
        oldest = self._clock() - IDLE
        while self._kept and (len(self._kept) > VISITORS or next(iter(self._kept.values()))[1] < oldest):
            self._forgotten.append(self._kept.popitem(last=False)[0])


class Demo:
    """What the page does, independent of Gradio.

    Args:
        predictor: classifies the query.
        limits: ``max_megabytes``, ``max_images`` and ``max_classes`` of ``conf/demo.yaml``.
    """

    def __init__(self, predictor: Predictor, limits: DictConfig) -> None:
        self.predictor, self.limits = predictor, limits

    def add(self, visit: Visit, name: str, files: Sequence[ImageFile]) -> tuple[Visit, list[str]]:
        """Add images to a class, which may be new.

        Returns:
            The updated visit, and why images were left out.
        """
        name = " ".join(name.split())[:LONGEST]
        if not name:
            return visit, ["enter a name for the class, then add its images"]
        if name not in visit.support and len(visit.support) == self.limits.max_classes:
            return visit, [f"{name} is left out: {len(visit.support)} classes are the most allowed"]
        images, notes = list(visit.support.get(name, ())), []
        for file in files:
            if len(images) == self.limits.max_images:
                notes.append(
                    f"{file.name} and all after it are left out: {len(images)} images in a class are the most allowed"
                )
                break
            try:
                images.append(self._read(file))
            except FewShotError as error:
                notes.append(str(error))
        return replace(visit, support={**visit.support, name: tuple(images)}, learned={}) if images else visit, notes

    def remove(self, visit: Visit, name: str) -> Visit:
        """Remove a class, if it exists."""
        support = {other: images for other, images in visit.support.items() if other != name}
        return replace(visit, support=support, learned={})

    def ask(self, visit: Visit, files: Sequence[ImageFile]) -> tuple[Visit, list[str]]:
        """Use the first of some images as the query; without images, keep the query.

        Returns:
            See ``add``.
        """
        if not files:
            return visit, []
        try:
            return replace(visit, query=self._read(files[0])), []
        except FewShotError as error:
            return replace(visit, query=None), [str(error)]

    def answer(self, visit: Visit) -> tuple[str, list[str]]:
        """Classify the query by the support set.

        Returns:
            HTML, and notes on the answer, or on why there is none.
        """
        if visit.query is None:
            return "", []
        try:
            learned = self._learn(visit)
            represented = learned.represent([visit.query])
            logits = learned.answer(represented)[0]
        except FewShotError as error:
            return "", [str(error)]
        method, way = self.predictor.method, len(visit.support)
        notes = []
        if largest(logits).sum() > 1:
            notes.append("several classes have the same largest score, so the answer is a guess among them")
        if isinstance(method, MAML) and way > method.head.out_features:
            notes.append(
                f"this network was trained for {method.head.out_features} classes: with {way} it is less accurate"
            )
        figures = [*_how_good(learned), *_how_familiar(learned, represented)]
        return _answer(visit.query, list(visit.support), logits, *measure(method), figures), notes

    def _learn(self, visit: Visit) -> Learned:
        """Learn the support set, once."""
        if self not in visit.learned:
            visit.learned[self] = self.predictor.learn(visit.support)
        return visit.learned[self]

    def _read(self, file: ImageFile) -> Pixels:
        def within() -> bytes:
            content = file.read()
            if len(content) > self.limits.max_megabytes * 2**20:
                raise ValueError(f"it has more than the allowed {self.limits.max_megabytes} MB")
            return content

        pixels = self.predictor.read(ImageFile(file.name, within))
        if pixels.min() == pixels.max():
            raise FewShotError(f"{file.name} is blank: it has only one colour")
        return pixels


def _how_good(learned: Learned) -> list[str]:
    if learned.held_out is None:
        return ["add a second example of a class to see how good the answers will be"] if learned.learn else []
    accuracy, low, high = learned.held_out.accuracy()
    interval = f"95% interval {low:.0%} to {high:.0%}"
    return [f"leave-one-out accuracy on {learned.held_out.examples} examples: {accuracy:.0%} ({interval})"]


def _how_familiar(learned: Learned, represented: torch.Tensor) -> list[str]:
    """How like the classes the query is; the answer stays as it is."""
    if learned.familiarity is None:
        return []
    familiarity, limit = float(learned.familiarity(represented)[0]), learned.familiarity.threshold(FALSE_ALARM)
    verdict = "perhaps none of these" if familiarity < limit else "like the examples"
    others = f"{1 - FALSE_ALARM:.0%} of the images of a class have at least {limit:.2f}"
    return [f"{verdict}: familiarity {familiarity:.2f}; {others}"]


def measure(method: FewShotMethod) -> tuple[str, str, int]:
    """Return what the logits of a method measure, an explanation, and the sign of the measure in the logits."""
    if isinstance(method, PrototypicalNetwork):
        names: dict[Any, str] = {l2: "squared Euclidean", cosine: "cosine"}
        kind = names.get(getattr(method.distance, "func", None), "scaled cosine")
        return "distance", f"{kind}, between the embedded query and the mean of the embedded examples", -1
    if isinstance(method, MatchingNetwork):
        return "logit", "logarithm of the query's mean attention on the class's examples", 1
    return "logit", "the network's score of the class; the probabilities are its softmax", 1


def serve(config: DictConfig) -> None:
    """Serve the page until Ctrl-C.

    Args:
        config: the composed ``conf/demo.yaml``.

    Raises:
        FewShotError: a number is not a positive whole number; gradio is not installed; there is no complete run, or no
            predictor (see ``make_predictor``); or the address is not available.
    """
    for key in ("port", "max_megabytes", "max_together", "max_images", "max_classes"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise FewShotError(f"{key}={config[key]} must be a whole number of at least 1")
    if config.checkpoint == "newest":
        config.checkpoint = str(newest_run(ROOT / "outputs"))
    with page_of(config) as page:
        page.block_thread()


@contextmanager
def page_of(config: DictConfig) -> Iterator[Any]:
    """Serve the page, a ``gradio.Blocks``, while the ``with`` block runs; see ``serve``."""
    try:
        import gradio as gr  # noqa: PLC0415
        from starlette.middleware import Middleware  # noqa: PLC0415
    except ImportError as error:
        raise FewShotError("gradio is not installed; install the extra: pip install -e '.[demo]'") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio polls its own server
    page = make_page(open_networks(config), config)
    largest = FORM + _together(config) * 4 // 3  # in base64
    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            app_kwargs={"middleware": [Middleware(Gate, largest=largest, hosts=_hosts(config.host))]},
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=STYLE,
            footer_links=[],
            run_history=False,
            share=False,
            ssr_mode=False,
            state_session_capacity=VISITORS,
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise FewShotError(
            f"cannot serve at {config.host}:{config.port}: {error}; choose another one with host=ADDRESS port=NUMBER"
        ) from error
    say(f"{page.local_url}    Ctrl-C stops it")
    try:
        yield page
    finally:
        page.close(verbose=False)


def open_networks(config: DictConfig) -> dict[str, Demo]:
    """Load the network of the command line, and those in the package, by the names that the page lists.

    Args:
        config: the composed ``conf/demo.yaml``.

    Raises:
        FewShotError: see ``make_predictor``; or the method of the command line is transductive.
    """
    predictor = make_predictor(config)
    own = str(config.checkpoint or config.encoder.get("name", "without training")).removeprefix(f"{ROOT}/")
    if predictor.method.transductive:
        raise FewShotError(
            f"{type(predictor.method).__name__} is transductive: it needs many queries together, and the page "
            "classifies one image at a time; choose another method, such as method=simpleshot, or "
            "classify a folder with predict"
        )
    networks = {own: Demo(predictor, config)}
    for name in short_names():
        named = OmegaConf.merge(config, {"checkpoint": name, "overrides": []})
        if name not in networks and find(name) is not None:
            networks[name] = Demo(make_predictor(cast(DictConfig, named)), config)
    return networks


def fitting(networks: Mapping[str, Demo], visits: Mapping[str, Visit]) -> str:
    """Return the first network that expects what most examples show, drawings or photos; else the first of all.

    Args:
        networks: by name.
        visits: the images as each network sees them, by its name.
    """
    colour = next((name for name, demo in networks.items() if demo.predictor.channels == 3), next(iter(networks)))
    visit = visits[colour]
    images = [image for images in visit.support.values() for image in images]
    images += [visit.query] if visit.query is not None and not images else []
    if not images:
        return next(iter(networks))
    drawings = sum(map(is_drawing, images)) > len(images) / 2
    return next((name for name, demo in networks.items() if demo.predictor.ink == drawings), next(iter(networks)))


def is_drawing(pixels: Pixels) -> bool:
    """Whether an image is ink on a plain ground: nearly grey, its edges and most of it close to their median."""
    colour = pixels.astype(np.int16)
    grey = colour.mean(axis=2)
    edges = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    share, at_edges = ((abs(part - np.median(edges)) < NEAR_GROUND).mean() for part in (grey, edges))
    return bool(np.ptp(colour, axis=2).mean() < MOST_COLOUR and share > LEAST_GROUND and at_edges > LEAST_AT_EDGES)


def _together(config: DictConfig) -> int:
    """Return the bytes of images allowed in one request, at least those of one image."""
    return int(max(config.max_together, config.max_megabytes) * 2**20 + 1)


def _hosts(host: str) -> frozenset[str] | None:
    """Return the host names of a page that only this machine may use; None if it is open to others."""
    plain = host.strip("[]").lower()
    with suppress(ValueError):  # a name instead of an address
        if plain == "localhost" or ip_address(plain).is_loopback:
            return frozenset({plain, *LOCAL})
    return None


def make_page(networks: Mapping[str, Demo], config: DictConfig) -> Any:
    """Make the page, a ``gradio.Blocks``; its actions are those of ``Demo``.

    Every network keeps the images of a visitor as it sees them, so that another one can answer at once.
    """
    import gradio as gr  # noqa: PLC0415

    kept = {name: Visits() for name in networks}

    def shown(request: gr.Request, chosen: str, act: Callable[[Demo, Visit], tuple[Visit, Sequence[str]]]) -> list[Any]:
        session, visits, notes = str(request.session_hash), dict[str, Visit](), dict[str, list[str]]()
        for name, demo in networks.items():
            visit, forgotten = kept[name].take(session)
            visits[name], left_out = act(demo, visit)
            kept[name].put(session, visits[name])
            notes[name] = [*forgotten, *left_out]
        used = chosen if chosen in networks else fitting(networks, visits)
        answer, more = networks[used].answer(visits[used])
        named = f"<small>network: <code>{for_html(used)}</code></small>"
        return [_gallery(visits[used]), answer, _notes([*notes[used], *more]), "", "", named]

    def add(name: str, sent: str, chosen: str, request: gr.Request) -> list[Any]:
        return shown(request, chosen, lambda demo, visit: demo.add(visit, name, _sent(sent)))

    def ask(sent: str, chosen: str, request: gr.Request) -> list[Any]:
        return shown(request, chosen, lambda demo, visit: demo.ask(visit, _sent(sent)))

    def remove(chosen: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        return shown(request, chosen, lambda demo, visit: (demo.remove(visit, str(event.name)), []))

    def start_again(chosen: str, request: gr.Request) -> list[Any]:
        return shown(request, chosen, lambda *_: (Visit(), []))

    def answer_again(chosen: str, request: gr.Request) -> list[Any]:
        return shown(request, chosen, lambda _, visit: (visit, []))

    def choose(event: gr.EventData) -> str:
        return str(event.name)

    pad: dict[str, Any] = {"html_template": PAD, "js_on_load": PEN, "elem_classes": "pad", "apply_default_css": False}
    pad |= {"bytes": config.max_megabytes * 2**20, "images": config.max_images, "together": _together(config)}
    theirs = config.checkpoint is not None or choices_of(config.overrides, ("encoder", "method", "distance"))
    with gr.Blocks(title="fewshot", analytics_enabled=False) as page:
        gr.HTML("<h2>A few examples of each class, and an answer</h2>")
        network = gr.Dropdown(
            [FITTING, *networks], value=next(iter(networks)) if theirs else FITTING, label="Network", filterable=False
        )
        notes = gr.HTML(elem_classes="notes")
        with gr.Row():
            with gr.Column():
                with gr.Row():
                    gr.HTML("<h3>Examples of the class</h3>")
                    name = gr.Textbox("A", max_length=LONGEST, show_label=False, container=False)
                examples = gr.HTML(query=False, **pad)
                support = gr.HTML(js_on_load=CHOICE, apply_default_css=False)
                again = gr.Button("Remove everything", size="sm")
            with gr.Column():
                gr.HTML("<h3>Query</h3>")
                query = gr.HTML(query=True, **pad)
                answer = gr.HTML(apply_default_css=False)
                used = gr.HTML(apply_default_css=False)
        # One at a time: MAML changes its network while it adapts, and other threads would see that.
        how: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "trigger_mode": "multiple"}
        how |= {"api_visibility": "private", "show_progress": "hidden"}
        how |= {"outputs": [support, answer, notes, examples, query, used]}
        examples.submit(add, [name, examples, network], **how)
        query.submit(ask, [query, network], **how)
        network.change(answer_again, [network], **how)
        support.remove(remove, [network], **how)
        support.choose(choose, [], **how | {"outputs": [name]})
        again.click(start_again, [network], **how)
    return page


class Gate:
    """ASGI middleware that passes on only requests that the page itself makes.

    Args:
        app: the web app.
        largest: bytes of a request.
        hosts: allowed host names; None: any. Otherwise any web page could point its own name at this machine, and read
            what the server answers (DNS rebinding).
    """

    def __init__(self, app: Callable[..., Awaitable[None]], largest: int, hosts: Collection[str] | None = None) -> None:
        self.app, self.largest, self.hosts = app, largest, hosts

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle a request; refuse what the page never requests, and what the app cannot parse."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._handle(scope, receive, answer)
        except Exception:
            if begun:
                raise
            await _refuse(send, 400, "malformed request")

    async def _handle(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if self.hosts is not None and _host(scope) not in self.hosts:
            return await _refuse(send, 403, "wrong host name")
        if not ASKED.fullmatch(scope["path"]):
            return await _refuse(send, 404, "not part of the page")
        if scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size > self.largest:
                body.clear()  # read the rest without keeping it: a client sees no answer while it sends
            else:
                body += message.get("body", b"")
        if size > self.largest:
            return await _refuse(
                send, 413, f"a request may have at most {self.largest:,} bytes; send fewer images at once"
            )
        text = _only_strings(body)
        body.clear()
        if text is None:
            return await _refuse(send, 400, "the page only sends strings")
        read: Iterator[Message] = iter([{"type": "http.request", "body": text}])

        async def replay() -> Message:
            return next(read, None) or await receive()

        return await self.app(scope, replay, send)


def _host(scope: Mapping[str, Any]) -> str:
    """Return the host name of a request, without the port."""
    names = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
    return re.sub(r":\d+$", "", names[0]).strip("[]").lower() if len(names) == 1 else ""


async def _refuse(send: Send, status: int, why: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": why.encode()})


def _only_strings(body: bytearray) -> bytes | None:
    """Return the same JSON if it only holds strings for the components; anything else could name a file."""
    try:
        content = json.loads(body)
        plain = all(value is None or isinstance(value, str) for value in content.get("data", ()))
        return json.dumps(content).encode() if plain else None
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None


def _sent(text: str) -> list[ImageFile]:
    """Parse what a pad sends: for each image its name, and its content as ``data:KIND;base64,CONTENT``.

    The content is null if the request had no room for it.
    """
    images = json.loads(text or "[]")
    return [ImageFile(str(name), partial(_content, str(name), url)) for name, url in images]


def _content(name: str, url: Any) -> bytes:
    if url is None:
        raise FewShotError(f"{name} is left out: with the images before it, it is too large; add it separately")
    return b64decode(str(url).partition(",")[2])


def _gallery(visit: Visit) -> str:
    return "".join(
        f'<div class="class" data-name="{for_html(name)}" title="more of this class"><b>{for_html(name)}</b>'
        f'<div>{"".join(map(_picture, images))}</div><button title="remove this class">×</button></div>'
        for name, images in visit.support.items()
    )


def _answer(
    query: Pixels,
    classes: Sequence[str],
    logits: torch.Tensor,
    measured: str,
    meaning: str,
    sign: int,
    figures: Sequence[str],
) -> str:
    probabilities, order = logits.softmax(0).tolist(), logits.argsort(descending=True).tolist()
    rows = "".join(
        f'<tr><td>{for_html(classes[i])}</td><td><div class="bar" style="width: {probabilities[i]:.1%}"></div></td>'
        f'<td class="number">{probabilities[i]:.1%}</td><td class="number">{sign * logits[i]:.3f}</td></tr>'
        for i in order
    )
    lines = "".join(f"{for_html(line)}<br>" for line in figures)
    return (
        f'<div class="answer">{_picture(query)}<b>{for_html(classes[order[0]])}</b> {probabilities[order[0]]:.1%}</div>'
        f'<table class="scores"><tr><th>class</th><th class="wide">probability</th><th></th>'
        f'<th class="number">{measured}</th></tr>{rows}</table><small>{lines}{measured}: {meaning}</small>'
    )


def _notes(lines: Sequence[str]) -> str:
    return "".join(f"<p>{for_html(line)}</p>" for line in lines)


def _picture(pixels: Pixels) -> str:
    """An ``img`` element: the image as the network sees it, at most ``THUMBNAIL`` pixels wide and high."""
    image, content = Image.fromarray(pixels.squeeze()), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(content, "PNG")
    return f'<img class="seen" src="data:image/png;base64,{b64encode(content.getvalue()).decode()}">'
