"""A page in the browser: add examples to classes, then get the answer for a query, and how good such answers are.

The page is in the folder ``page``: a file each of HTML, CSS and JavaScript, which asks this server and draws what it
answers.
"""

import hashlib
import io
import re
import socket
import tempfile
import time
from base64 import b64encode
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from fewshot.checkpoints import NOWHERE
from fewshot.checks import Count, Place, Port, misfits, refuse
from fewshot.config import ROOT, wrong_settings
from fewshot.data.files import ImageFile
from fewshot.data.kinds import Kind, is_drawn, mismatch
from fewshot.data.photos import CROPS, read_photo
from fewshot.data.twins import are_twins, candidates, thumbnails
from fewshot.directories import newest_run
from fewshot.distances import cosine, l2
from fewshot.errors import FewShotError, mistake
from fewshot.familiarity import FALSE_ALARM
from fewshot.learned import Learned, Pixels
from fewshot.methods.base import FewShotMethod
from fewshot.methods.maml import MAML
from fewshot.methods.matching import MatchingNetwork
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.metrics import largest
from fewshot.models import Model, find, short_names
from fewshot.paths import install
from fewshot.predictor import Predictor, make_trained, predictor_of
from fewshot.taught import load_taught, save_taught
from fewshot.text import for_terminal, say
from fewshot.trained import choices_of

PAGE = Path(__file__).with_name("page")
TYPES: dict[str, Any] = {"host": str, "port": Port, "crop": Literal[CROPS], "checkpoint": Place | None}
TYPES["mirror"] = bool | None
TYPES |= dict.fromkeys(("max_megabytes", "max_model", "max_images", "max_classes"), Count)
MAX_NAME = 40  # characters of a class's name
THUMBNAIL, LARGE = 96, 280  # pixels, the most that an example and the query have on a side in the page
VISITORS = 20  # the most recently active ones, whose images are kept
IDLE = 3600  # seconds without activity after which a visitor's images are removed
FORGOTTEN = (
    f"your images have been removed: the page keeps those of the {VISITORS} most recent visitors, for up to "
    f"{IDLE // 60} minutes; add them again"
)
LOCAL = ("localhost", "127.0.0.1", "::1")
FITTING = "fitting"  # a choice in the list of networks
SESSION = re.compile("[0-9a-f]{32}")
Form = tuple[int, int, bool, str]  # of pixels: size, channels, ink and crop, see ``read_photo``


@dataclass(eq=False)
class Network:
    """A network that the page can use. Its weights are loaded when they are first needed.

    Attributes:
        name: short and unique.
        label: in the list of networks.
        about: a sentence for a visitor.
        form: of the images that it takes.
        knows: what its images show; None: either.
        make: returns its predictor, and the configuration of its training.
        base: classes of a taught file; None: there are none before the visitor's.
        made: what ``load`` returned.
    """

    name: str
    label: str
    about: str
    form: Form
    knows: Kind | None
    make: Callable[[], tuple[Predictor, Any]]
    base: Learned | None = None
    made: tuple[Predictor, Any] | None = None

    def load(self) -> tuple[Predictor, Any]:
        """Return the predictor, and the configuration of its training.

        Raises:
            FewShotError: see ``make_predictor``.
        """
        try:
            self.made = self.made or self.make()
        except Exception as error:  # its type depends on what makes it
            raise mistake(error) or error from error
        return self.made

    def represent(self, images: "Sequence[Example]") -> list[torch.Tensor]:
        """Return what ``Predictor.represent`` does, a tensor for each image; each image is represented once."""
        new = [one for one in images if self.name not in one.represented]
        if new:
            found = self.load()[0].represent([one.pixels[self.form] for one in new])
            for one, row in zip(new, found, strict=True):
                one.represented[self.name] = row
        return [one.represented[self.name] for one in images]

    @property
    def before(self) -> dict[Any, int]:
        """The number of examples that a taught file holds of each class."""
        return dict(zip(self.base.classes, self.base.labels.bincount().tolist(), strict=True)) if self.base else {}


@dataclass(eq=False)
class Example:
    """An image of a visitor.

    Attributes:
        name: of its file.
        digest: SHA-256 of the file's bytes.
        pixels: as the networks see it.
        represented: by the networks that were used, by their name; see ``Predictor.represent``.
    """

    name: str
    digest: str
    pixels: Mapping[Form, Pixels]
    represented: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def drawn(self) -> bool:
        """Whether it is a letter or drawing, instead of a photo."""
        return is_drawn(self.pixels[max(self.pixels)])


@dataclass
class Visit:
    """What one visitor has shown.

    Attributes:
        support: the examples of each class, by its name; no class is empty.
        query: the image to classify.
        taught: the network of a file that the visitor loaded.
        learned: what the networks learned from the support set, by their name.
    """

    support: dict[str, list[Example]] = field(default_factory=dict)
    query: Example | None = None
    taught: Network | None = None
    learned: dict[str, Learned] = field(default_factory=dict, compare=False, repr=False)

    @property
    def examples(self) -> list[Example]:
        """All examples."""
        return [example for examples in self.support.values() for example in examples]

    def with_file(self, example: Example) -> list[str]:
        """Return the classes with an example of the same content, in the taught file, too."""
        found = [name for name, images in self.support.items() if example.digest in [one.digest for one in images]]
        if self.taught is not None and self.taught.base is not None:
            base = self.taught.base
            (copy_of,) = base.copies(torch.stack(self.taught.represent([example])))
            found += [base.classes[base.labels[copy_of]]] if copy_of is not None else []
        return list(dict.fromkeys(found))

    @property
    def classes(self) -> list[str]:
        """The names of all classes, those of a taught file first."""
        return list(dict.fromkeys([*(self.taught.before if self.taught else ()), *self.support]))


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
        if visit != Visit():
            self._kept[session] = visit, self._clock()
        self._forget()

    def _forget(self) -> None:
        oldest = self._clock() - IDLE
        while self._kept and (len(self._kept) > VISITORS or next(iter(self._kept.values()))[1] < oldest):
            self._forgotten.append(self._kept.popitem(last=False)[0])


class Demo:
    """What the page does, independent of its server.

    Args:
        networks: the first is that of the command line, or none is.
        config: the composed ``conf/demo.yaml``.
    """

    def __init__(self, networks: Sequence[Network], config: DictConfig) -> None:
        self.networks, self.config = {network.name: network for network in networks}, config

    def add(self, visit: Visit, name: str, file: ImageFile) -> list[str]:
        """Add an image to a class, which may be new; return notes for the visitor.

        Raises:
            FewShotError: it cannot be read, or exceeds a limit.
        """
        name = for_terminal(" ".join(name.split())[:MAX_NAME])
        if not name:
            raise FewShotError("enter a name for the class, then add its images")
        if name not in visit.classes and len(visit.classes) >= self.config.max_classes:
            raise FewShotError(f"{name} is left out: at most {self.config.max_classes} classes are allowed")
        images = visit.support.get(name, [])
        if len(images) == self.config.max_images:
            raise FewShotError(f"{file.name} is left out: at most {len(images)} images per class are allowed")
        example = self._read(visit, file)
        same = visit.with_file(example)
        if name in same:
            return [f"{file.name} is left out: it is already an example of {name}"]
        visit.support[name] = [*images, example]
        visit.learned.clear()
        return [f"{file.name} is also an example of {other}: remove it from one of them" for other in same]

    def ask(self, visit: Visit, file: ImageFile) -> None:
        """Use an image as the query; see ``add``."""
        visit.query = None
        visit.query = self._read(visit, file)

    def remove(self, visit: Visit, name: str, digest: str | None = None) -> None:
        """Remove an example of a class by its digest, or the whole class, if it exists."""
        kept = [image for image in visit.support.get(name, ()) if digest is not None and image.digest != digest]
        if kept:
            visit.support[name] = kept
        else:
            visit.support.pop(name, None)
        visit.learned.clear()

    def load(self, visit: Visit, name: str, path: Path) -> None:
        """Replace everything by the classes in a taught file; see ``load_taught``.

        Args:
            visit: is changed.
            name: of the file on the visitor's side.
            path: of the file here, which is untrusted.
        """
        try:
            taught = load_taught(path, self.config.hardware, self.config.trust)
        except FewShotError as error:
            raise FewShotError(str(error).replace(str(path), name)) from error
        predictor, made = taught.predictor, (taught.predictor, taught.config)
        base = replace(taught.learned, classes=tuple(for_terminal(str(name)) for name in taught.learned.classes))
        label, many = for_terminal(name), f"{len(base.labels):,} examples of {len(base.classes)} classes"
        about = f"{label} holds {many}, without their pictures."
        network = Network(name, label, about, _form(predictor), predictor.knows, lambda: made, base)
        visit.__dict__.update(vars(Visit(taught=network)))

    def save(self, visit: Visit, chosen: str) -> bytes:
        """Return the taught file of a visit; see ``save_taught``.

        Raises:
            FewShotError: there are fewer than two classes.
        """
        network = self.choose(visit, chosen)
        predictor, config = network.load()
        learned = self._learn(visit, network)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "taught.fewshot")
            save_taught(path, predictor, learned, config, _names(visit, network))
            return path.read_bytes()

    def choose(self, visit: Visit, chosen: str) -> Network:
        """Return the network to use: that of a taught file, the chosen one, or the first that fits the images."""
        if visit.taught is not None or chosen in self.networks:
            return visit.taught or self.networks[chosen]
        images = visit.examples or ([] if visit.query is None else [visit.query])
        wanted = "letters" if 2 * sum(image.drawn for image in images) > len(images) else "photos"
        fits = (network for network in self.networks.values() if images and network.knows == wanted)
        return next(fits, next(iter(self.networks.values())))

    def view(self, visit: Visit, chosen: str) -> dict[str, Any]:
        """Return what the page shows, as plain data.

        Args:
            visit: what to show.
            chosen: the name of a network, or another string for the one that fits.
        """
        network, answer = self.choose(visit, chosen), None
        notes, lines, odd = list[str](), list[str](), set[Example]()
        try:
            if chosen == network.name:
                network.load()  # also if there is nothing to learn yet: a missing file is known at once
            if len(visit.classes) > 1:
                learned = self._learn(visit, network)
                odd = _suspects(visit, network, learned)
                lines = _how_good(visit, network, learned)
                answer = visit.query and _answer(visit.query, visit, network, learned)
        except FewShotError as error:
            notes.append(public(error))
        classes = [
            {
                "name": name,
                "taught": network.before.get(name, 0),
                "examples": [
                    {
                        "id": one.digest,
                        "name": one.name,
                        "picture": _picture(one.pixels[network.form], THUMBNAIL),
                        "odd": one in odd,
                    }
                    for one in visit.support.get(name, ())
                ],
            }
            for name in visit.classes
        ]
        return {
            "networks": {one.name: one.label for one in ([visit.taught] if visit.taught else self.networks.values())},
            "network": network.name,
            "about": network.about,
            "coarse": network.form[0] < THUMBNAIL // 2,
            "classes": classes,
            "query": visit.query and _picture(visit.query.pixels[network.form], LARGE),
            "answer": answer,
            "lines": lines,
            "notes": notes,
            "most": {"image": self.config.max_megabytes * 2**20, "model": self.config.max_model * 2**20},
        }

    def _learn(self, visit: Visit, network: Network) -> Learned:
        """Learn the support set, once."""
        if network.name in visit.learned:
            return visit.learned[network.name]
        if len(visit.classes) < 2:
            raise FewShotError("add examples of two classes first")
        predictor, base, rows = network.load()[0], network.base, network.represent(visit.examples)
        classes = visit.classes
        labels = [classes.index(name) for name, images in visit.support.items() for _ in images]
        if base is not None:
            rows, labels = [*base.examples, *rows], [*base.labels.tolist(), *labels]
        visit.learned[network.name] = predictor.learn_examples(
            tuple(classes), torch.stack([row.to(rows[0]) for row in rows]), torch.tensor(labels)
        )
        return visit.learned[network.name]

    def _read(self, visit: Visit, file: ImageFile) -> Example:
        content = file.read()
        forms = [visit.taught.form] if visit.taught else [network.form for network in self.networks.values()]
        once = ImageFile(for_terminal(file.name), lambda: content)
        pixels = {form: read_photo(once, *form, reduced=True) for form in dict.fromkeys(forms)}
        if all((image == image[:1, :1]).all() for image in pixels.values()):
            raise FewShotError(f"{file.name} is blank: it has only one colour")
        return Example(once.name, hashlib.sha256(content).hexdigest(), pixels)


def _form(predictor: Predictor) -> Form:
    return predictor.size, predictor.channels, predictor.ink, predictor.crop


def _names(visit: Visit, network: Network) -> list[str]:
    taught = [f"example {number + 1} in {network.name}" for number in range(sum(network.before.values()))]
    return [*taught, *(one.name for one in visit.examples)]


def _suspects(visit: Visit, network: Network, learned: Learned) -> set[Example]:
    """Return the visitor's examples that look mislabelled."""
    first = sum(network.before.values())
    found = [number for number, *_ in learned.held_out.suspects()] if learned.held_out else []
    return {visit.examples[number - first] for number in found if number >= first}


def _how_good(visit: Visit, network: Network, learned: Learned) -> list[str]:
    """Say how good answers will be, and which examples look wrong."""
    lines = list(learned.describe(_names(visit, network)))
    if learned.held_out is None and learned.learn:
        lines.append("add a second example of a class to see how good the answers will be")
    for name, images in (("examples", visit.examples), ("queries", [visit.query] if visit.query else [])):
        line = mismatch(network.knows, [image.drawn for image in images], name, "choose another network")
        lines += [] if line is None else [line]
    labelled = [(name, one) for name, images in visit.support.items() for one in images]
    pixels = [one.pixels[network.form] for _, one in labelled]
    for one, other, mirror in candidates(thumbnails(np.stack(pixels))) if pixels else ():
        if are_twins(pixels[one], pixels[other], mirror):
            (first, twin), (second, copy) = labelled[one], labelled[other]
            lines.append(f"{copy.name} of {second} looks the same as {twin.name} of {first}: remove one of them")
    return lines


def _answer(query: Example, visit: Visit, network: Network, learned: Learned) -> dict[str, Any]:
    """Classify the query by the support set."""
    method, way = network.load()[0].method, len(learned.classes)
    represented = torch.stack(network.represent([query]))
    logits = learned.answer(represented)[0]
    measured, meaning, sign = measure(method)
    lines = [
        f"the query is also an example of {name}, so this answer says nothing about new images"
        for name in visit.with_file(query)
    ]
    if largest(logits).sum() > 1:
        lines.append("several classes have the same largest score, so the answer is a guess among them")
    if isinstance(method, MAML) and way > method.head.out_features:
        lines.append(f"this network was trained for {method.head.out_features} classes: with {way} it is less accurate")
    unknown = False
    if learned.familiarity is not None:
        familiarity, limit = float(learned.familiarity(represented)[0]), learned.familiarity.threshold(FALSE_ALARM)
        unknown = familiarity < limit
        lines.append(
            f"{'perhaps none of these' if unknown else 'like the examples'}: familiarity {familiarity:.2f}; "
            f"{1 - FALSE_ALARM:.0%} of the images of a class have at least {limit:.2f}"
        )
    probabilities = logits.softmax(0).tolist()
    order = logits.argsort(descending=True, stable=True)
    rows = [[learned.classes[i], probabilities[i], sign * float(logits[i])] for i in order]
    return {"rows": rows, "unknown": unknown, "lines": lines, "measured": measured, "meaning": meaning}


def measure(method: FewShotMethod) -> tuple[str, str, int]:
    """Return what the logits of a method measure, an explanation, and the sign of the measure in the logits."""
    if isinstance(method, PrototypicalNetwork):
        names: dict[Any, str] = {l2: "squared Euclidean", cosine: "cosine"}
        kind = names.get(getattr(method.distance, "func", None), "scaled cosine")
        return "distance", f"{kind}, between the embedded query and the mean of the embedded examples", -1
    if isinstance(method, MatchingNetwork):
        return "logit", "logarithm of the query's mean attention on the class's examples", 1
    return "logit", "the network's score of the class; the probabilities are its softmax", 1


def public(error: FewShotError) -> str:
    """Return a message for visitors, without the directories of the one who serves the page."""
    return str(error).replace(str(ROOT), ".").replace(str(Path.home()), "~")


def open_networks(config: DictConfig) -> list[Network]:
    """List the networks of the page: that of the command line, those in the package, and one of many photos.

    Only that of the command line is loaded at once. The last is left out if the command line chooses an encoder.

    Args:
        config: the composed ``conf/demo.yaml``.

    Raises:
        FewShotError: see ``make_predictor``; or the method of the command line is transductive.
    """
    chosen = config.checkpoint is not None or choices_of(config.overrides, ("encoder", "method", "distance"))
    networks = [_own(config)] if chosen else []
    for name in short_names():
        model = find(name)
        if model is not None and name != config.checkpoint:
            networks.append(_shipped(name, model, config))
    if config.checkpoint is not None or not chosen:
        networks.append(
            Network(
                "encoder=pretrained",
                "colour photos, most accurate: resnet18",
                "resnet18 learned from a million photos of ImageNet. Its weights are loaded when it is chosen.",
                (config.dataset.size, config.dataset.channels, False, config.crop),
                "photos",
                lambda: _make(config, checkpoint=None),
            )
        )
    return networks


def _make(config: DictConfig, **changes: Any) -> tuple[Predictor, Any]:
    trained = make_trained(cast(DictConfig, OmegaConf.merge(config, changes)), NOWHERE)
    if trained.method.needs_all_queries:
        raise FewShotError(
            f"{type(trained.method).__name__} is transductive: it needs many queries together, and the page "
            "classifies one image at a time; choose another method, such as method=protonet, or "
            "classify a folder with predict"
        )
    return predictor_of(trained, config.hardware, config.crop), trained.config


def _own(config: DictConfig) -> Network:
    made = _make(config)
    name = str(config.checkpoint or config.encoder.get("name", "without training")).removeprefix(f"{ROOT}/")
    name = name if find(name) else Path(name).name
    data = OmegaConf.select(made[1], "choices.dataset")
    size = f"{made[0].size} × {made[0].size} pixels"
    about = f"{name}{f' was trained on {data}, and' * bool(data)} sees images of {size}."
    return Network(name, f"yours: {name}", about, _form(made[0]), made[0].knows, lambda: made)


def _shipped(name: str, model: Model, config: DictConfig) -> Network:
    expects, test = model.card["expects"], model.card["test"]
    shots = f"{test['shot']} example{'s' * (test['shot'] > 1)}"
    about = (
        f"{name} compares {expects['kind']} of {expects['size']} × {expects['size']} pixels. From {shots} of each "
        f"of {test['way']} classes that were new to it, it named {100 * test['accuracy']:.0f}% of the images right."
    )
    form = expects["size"], expects["channels"], expects["ink"], config.crop
    knows: Kind = "letters" if expects["ink"] else "photos"
    return Network(
        name,
        f"{expects['kind']}: {name}",
        about,
        form,
        knows,
        lambda: _make(config, checkpoint=name, overrides=[], mirror=None),
    )


def serve(config: DictConfig) -> None:
    """Serve the page until Ctrl-C.

    Args:
        config: the composed ``conf/demo.yaml``.

    Raises:
        FewShotError: a setting is wrong; the extra is not installed; there is no complete run, or no predictor (see
            ``make_predictor``); or the address is not available.
    """
    # The network that takes this image format is made when a visitor chooses it.
    refuse([*misfits(config, TYPES), *wrong_settings({"dataset": config.dataset})])
    if config.checkpoint == "newest":
        config.checkpoint = str(newest_run(ROOT / "outputs"))
    with page_of(config), suppress(KeyboardInterrupt):
        Event().wait()


@contextmanager
def page_of(config: DictConfig) -> Iterator[str]:
    """Serve the page while the ``with`` block runs, at the address that is yielded; see ``serve``."""
    try:
        import uvicorn  # noqa: PLC0415

        app = make_app(Demo(open_networks(config), config))
    except ImportError as error:
        raise FewShotError(f"{error.name} is not installed; install the extra: {install('demo')}") from error
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except (OSError, TypeError) as error:  # the latter for a host that cannot be a name
        raise FewShotError(
            f"cannot serve at {config.host}:{config.port}: {error}; choose another one with host=ADDRESS port=NUMBER"
        ) from error
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error", timeout_graceful_shutdown=1))
    thread = Thread(target=server.run, args=[[listening]], daemon=True)
    thread.start()
    address = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
    say(f"{address}    Ctrl-C stops it")
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()


def hosts(host: str) -> list[str]:
    """Return the host names that the page answers to: of a page that only this machine may use, its own."""
    plain = host.strip("[]").lower()
    with suppress(ValueError):  # a name instead of an address
        if plain == "localhost" or ip_address(plain).is_loopback:
            return [*LOCAL, "[::1]", plain]
    return ["*"]


def make_app(demo: Demo) -> Any:
    """Make the web app, a ``starlette.applications.Starlette``: the files of the page, and ``POST /ACTION?KEY=VALUE``.

    The body of a request is the file, if the action has one. Only the page itself can name a session: a browser sends
    that header for no other page. And unless the page is open to others, it has the host names of this machine alone;
    otherwise any web page could point its own name at this machine, and read what the server answers (DNS rebinding).
    """
    from anyio import CapacityLimiter, to_thread  # noqa: PLC0415
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.middleware import Middleware  # noqa: PLC0415
    from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: PLC0415
    from starlette.requests import ClientDisconnect, Request  # noqa: PLC0415
    from starlette.responses import JSONResponse, PlainTextResponse, Response  # noqa: PLC0415
    from starlette.routing import Mount, Route  # noqa: PLC0415
    from starlette.staticfiles import StaticFiles  # noqa: PLC0415

    # One at a time: MAML changes its network while it adapts, and other threads would see that.
    visits, turn = Visits(), CapacityLimiter(1)

    def respond(action: str, session: str, query: Mapping[str, str], body: Any) -> Response:
        visit, notes = visits.take(session)
        name, chosen, label = query.get("name", "image"), query.get("network", FITTING), query.get("class", "")
        try:
            body.seek(0)
            match action:
                case "view":
                    view = demo.view(visit, chosen)
                    return JSONResponse({**view, "notes": [*notes, *view["notes"]]})
                case "save":
                    return Response(demo.save(visit, chosen), media_type="application/octet-stream")
                case "add":
                    notes += demo.add(visit, label, ImageFile(name, body.read))
                case "ask":
                    demo.ask(visit, ImageFile(name, body.read))
                case "remove":
                    demo.remove(visit, label, query.get("example"))
                case "load":
                    demo.load(visit, name, Path(body.name))
                case "restart" | "forget":  # everything, or the query alone
                    visit = Visit() if action == "restart" else replace(visit, query=None)
                case _:
                    return PlainTextResponse("not part of the page", 404)
        except FewShotError as error:
            notes.append(public(error))
        finally:
            visits.put(session, visit)
        return JSONResponse({"notes": notes})

    async def act(request: Request) -> Response:
        action, session = request.path_params["action"], request.headers.get("visit", "")
        if not SESSION.fullmatch(session):
            return PlainTextResponse("only the page itself may ask this", 403)
        megabytes = demo.config.max_model if action == "load" else demo.config.max_megabytes
        left = megabytes * 2**20
        with tempfile.NamedTemporaryFile() if action == "load" else io.BytesIO() as body:
            try:
                # Read the rest without keeping it: a client sees no answer while it sends.
                async for chunk in request.stream():
                    left -= len(chunk)
                    body.write(chunk if left >= 0 else b"")
            except ClientDisconnect:
                return PlainTextResponse("cut off", 400)
            if left < 0:
                name = request.query_params.get("name", "the request")
                return PlainTextResponse(f"{name} has more than the allowed {megabytes} MB", 413)
            return await to_thread.run_sync(partial(respond, action, session, request.query_params, body), limiter=turn)

    allowed = Middleware(TrustedHostMiddleware, allowed_hosts=hosts(demo.config.host), www_redirect=False)
    page = Mount("/", StaticFiles(directory=PAGE, html=True))
    return Starlette(routes=[Route("/{action}", act, methods=["POST"]), page], middleware=[allowed])


def _picture(pixels: Pixels, most: int) -> str:
    """An image as the network sees it, with at most so many pixels on a side, as the address of an ``img``."""
    image, content = Image.fromarray(pixels.squeeze()), io.BytesIO()
    image.thumbnail((most, most))
    kind = "png" if image.mode == "L" else "jpeg"
    image.save(content, kind, quality=90)
    return f"data:image/{kind};base64,{b64encode(content.getvalue()).decode()}"
