"use strict";

const $ = selector => document.querySelector(selector);
const visit = sessionStorage.visit ??= [...crypto.getRandomValues(new Uint8Array(16))]
    .map(byte => byte.toString(16).padStart(2, "0")).join("");
let most = {image: 2 ** 23, model: 2 ** 23};  // bytes, until the server says otherwise
let turn = Promise.resolve();  // the server gets one request at a time, in order

function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
}

async function post(action, query = {}, body = null) {
    try {
        body = await body?.arrayBuffer();
    } catch {
        return {notes: [`${query.name} cannot be read: add files, not folders`]};
    }
    try {
        const address = `${action}?${new URLSearchParams({network: sessionStorage.network ?? "", ...query})}`;
        const response = await fetch(address, {method: "POST", headers: {visit}, body});
        if (!response.ok) return {notes: [await response.text()]};
        return await (response.headers.get("content-type") === "application/json" ? response.json() : response.blob());
    } catch {
        return {notes: ["no answer from the server of this page: is fewshot demo still running?"]};
    }
}

// Send requests, then show what became of them.
function act(...requests) {
    turn = turn.then(async () => {
        document.body.classList.add("busy");
        const notes = [];
        for (const request of requests) notes.push(...(await post(...request)).notes ?? []);
        const view = await post("view");
        show(view.classes ? view : {...view, notes: []}, [...notes, ...view.notes]);
        document.body.classList.remove("busy");
    });
    return turn;
}

function show(view, notes) {
    $("#notes").replaceChildren(...notes.map(note => {
        const close = make("button", {className: "small", textContent: "OK"});
        const line = make("p", {}, make("span", {textContent: note}), close);
        close.onclick = () => line.remove();
        return line;
    }));
    if (!view.classes) return;
    most = view.most;
    document.body.classList.toggle("coarse", view.coarse);
    showNetworks(view);
    const ready = view.classes.length > 1;
    $("#hint").textContent = view.answer ? "Show it more, or add examples where it is wrong."
        : ready ? "Now show it something new, and it says which class it is."
        : view.classes.length ? "Now another class: change the name, and add its examples."
        : "Name a class, and add a few pictures or drawings of it. Then do the same for another class.";
    $("#save").disabled = !ready;
    const before = [...$("#classes").querySelectorAll("button")].indexOf(document.activeElement);
    $("#classes").replaceChildren(...view.classes.map(showClass));
    if (before >= 0) ([...$("#classes").querySelectorAll("button:enabled")].slice(0, before + 1).pop() ?? $("#name")).focus();
    $(".good").hidden = !view.lines.length;
    $("#lines").replaceChildren(...view.lines.map(line => make("li", {textContent: line})));
    $("#answer").replaceChildren(...(view.answer ? showAnswer(view) : []));
    if (view.query && !pads.query.filled) pads.query.show(view.query);
}

function showNetworks(view) {
    const chosen = sessionStorage.network ?? "";
    const taught = !(chosen in view.networks) && Object.keys(view.networks).length === 1;
    const options = Object.entries(view.networks).map(([value, text]) => make("option", {value, text}));
    if (!taught) options.unshift(make("option", {value: "fitting", text: "the one that fits your pictures"}));
    $("#network").replaceChildren(...options);
    $("#network").value = taught ? view.network : chosen in view.networks ? chosen : "fitting";
    const undecided = $("#network").value === "fitting" && !view.classes.length && !view.query;
    $("#about").textContent = undecided ? "Your first pictures decide: a network for letters or one for photos." : view.about;
}

function showClass({name, taught, examples}) {
    const more = make("button", {className: "small more", textContent: "Add more"});
    more.onclick = () => { $("#name").value = name; $("#examples .choose").focus(); };
    const remove = make("button", {className: "small remove", textContent: "Remove", disabled: !examples.length});
    remove.ariaLabel = `Remove ${name}`;
    remove.onclick = () => act(["remove", {class: name}]);
    const number = `${examples.length} example${examples.length === 1 ? "" : "s"}`;
    const count = !taught ? number : examples.length ? `${taught} in the file, ${number} here` : `${taught} in the file`;
    const pictures = examples.map(example => {
        const title = example.name + (example.odd ? ", which looks like another class" : "");
        const button = make("button", {textContent: "×", title: "Remove", ariaLabel: `Remove ${title}`});
        button.onclick = () => act(["remove", {class: name, example: example.id}]);
        return make("div", {title, className: example.odd ? "odd" : ""},
            make("img", {src: example.picture, alt: title}), button);
    });
    return make("li", {className: "class"},
        make("header", {}, make("b", {textContent: name}), make("small", {textContent: count}), more, remove),
        make("div", {className: "pictures"}, ...pictures));
}

function showAnswer({answer, query}) {
    const percent = share => `${(100 * share).toFixed(1)}%`;
    const rows = answer.rows.map(([name, share, score]) => {
        const bar = make("div", {className: "bar"});
        bar.style.width = percent(share);
        return make("tr", {}, make("td", {textContent: name}), make("td", {}, bar),
            make("td", {className: "number", textContent: percent(share)}),
            make("td", {className: "number", textContent: score.toFixed(3)}));
    });
    const [[best, share]] = answer.rows;
    const head = make("tr", {}, make("th", {textContent: "class"}), make("th", {colSpan: 2, textContent: "probability"}),
        make("th", {className: "number", textContent: answer.measured}));
    return [
        make("div", {className: `best${answer.unknown ? " unknown" : ""}`}, make("b", {textContent: best}),
            make("span", {textContent: percent(share) + (answer.unknown ? ", but perhaps none of these" : "")})),
        make("table", {className: "scores"}, make("thead", {}, head), make("tbody", {}, ...rows)),
        make("ul", {}, ...[...answer.lines, `${answer.measured}: ${answer.meaning}`].map(
            line => make("li", {textContent: line}))),
        make("div", {className: "seen"}, make("img", {src: query, alt: ""}), "what the network sees"),
    ];
}

class Pad {
    filled = false;
    taken = 0;

    // The sender is called when an image is chosen, and returns what sends it once it is read.
    constructor(element, single, sender) {
        element.append($("#pad").content.cloneNode(true));
        const find = selector => element.querySelector(selector);
        Object.assign(this, {single, sender, square: find(".square"), canvas: find("canvas"), video: find("video"),
            chooser: find("input"), takeButton: find(".take"), drawButton: find(".draw"), cameraButton: find(".camera")});
        this.pen = this.canvas.getContext("2d");
        Object.assign(this.pen, {lineWidth: 18, lineCap: "round", lineJoin: "round"});
        this.chooser.multiple = !single;
        if (single) find("p span").textContent = "a picture";
        find(".choose").onclick = () => { this.chooser.removeAttribute("capture"); this.chooser.click(); };
        this.chooser.onchange = () => { this.files(this.chooser.files); this.chooser.value = ""; };
        find(".clear").onclick = () => { this.clear(); if (single) act(["forget"]); };
        this.drawButton.onclick = () => { this.drawing(); this.clear(); };
        this.takeButton.onclick = () => this.take();
        this.cameraButton.onclick = () => this.video.srcObject ? this.stop() : this.film();
        this.canvas.onpointerdown = event => this.down(event);
        const drawing = event => this.canvas.hasPointerCapture(event.pointerId);
        this.canvas.onpointermove = event => { if (drawing(event)) this.line(event); };
        this.canvas.onpointerup = event => { if (single && drawing(event)) this.drawing(); };
        element.ondragover = event => { event.preventDefault(); this.square.classList.add("over"); };
        element.ondragleave = () => this.square.classList.remove("over");
        element.ondrop = event => {
            event.preventDefault();
            this.square.classList.remove("over");
            this.files(event.dataTransfer.files);
        };
    }

    // With a picture, the pad cannot be drawn on: a touch that only scrolls the page must not remove it.
    fill(filled, picture = false) {
        this.filled = filled;
        this.square.classList.toggle("drawn", filled);
        this.square.classList.toggle("picture", picture);
    }

    clear() {
        this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
        this.drawButton.hidden = true;
        this.fill(false);
    }

    down(event) {
        this.canvas.setPointerCapture(event.pointerId);
        this.fill(true);
        this.drawButton.hidden = this.single;
        this.pen.beginPath();
        this.line(event);
        this.line(event, 0.1);  // a line of one point is not drawn
    }

    line(event, further = 0) {
        const scale = this.canvas.width / this.canvas.clientWidth;
        this.pen.lineTo(event.offsetX * scale + further, event.offsetY * scale);
        this.pen.stroke();
    }

    // Show a picture as a whole: a file, or the address of one that only the server can read.
    async show(source) {
        this.clear();
        const image = await createImageBitmap(typeof source === "string" ? await decoded(source) : source);
        const side = this.canvas.width, scale = side / Math.max(image.width, image.height);
        const [width, height] = [image.width * scale, image.height * scale];
        this.pen.drawImage(image, (side - width) / 2, (side - height) / 2, width, height);
        this.fill(true, true);
    }

    drawing() {
        const send = this.sender();
        this.canvas.toBlob(blob => send([[`drawing ${++this.taken}`, blob]]));
    }

    async files(chosen) {
        // One byte more than allowed, so that the server notices.
        const files = [...chosen].slice(0, this.single ? 1 : undefined), send = this.sender();
        if (!files.length) return;
        this.clear();
        if (this.single) await this.show(files[0]).catch(() => {});
        send(files.map(file => [file.name, file.slice(0, most.image + 1)]));
    }

    async film() {
        if (!navigator.mediaDevices) {  // the page is not on this machine, and not encrypted: ask the phone's camera
            this.chooser.setAttribute("capture", "environment");
            return this.chooser.click();
        }
        try {
            this.video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
        } catch (error) {
            return show({}, [`the camera cannot be used: ${error.message}`]);
        }
        await this.video.play();
        this.filming(true);
    }

    filming(on) {
        this.video.hidden = this.takeButton.hidden = !on;
        this.cameraButton.textContent = on ? "Stop the camera" : "Camera";
        this.square.classList.toggle("filming", on);
    }

    stop() {
        for (const track of this.video.srcObject.getTracks()) track.stop();
        this.video.srcObject = null;
        this.filming(false);
    }

    take() {
        const side = Math.min(this.video.videoWidth, this.video.videoHeight);
        const [left, top] = [(this.video.videoWidth - side) / 2, (this.video.videoHeight - side) / 2];
        const photo = make("canvas", {width: side, height: side}), send = this.sender();
        photo.getContext("2d").drawImage(this.video, left, top, side, side, 0, 0, side, side);
        photo.toBlob(blob => {
            if (this.single) this.show(blob);
            send([[`picture ${++this.taken}`, blob]]);
        }, "image/jpeg", 0.92);
        if (this.single) this.stop();
    }
}

async function decoded(address) {
    const image = make("img", {src: address});
    await image.decode();
    return image;
}

const pads = {
    examples: new Pad($("#examples"), false, (name = $("#name").value) =>
        images => act(...images.map(([file, content]) => ["add", {class: name, name: file}, content]))),
    query: new Pad($("#query"), true, () => ([[file, content]]) => act(["ask", {name: file}, content])),
};
const sure = text => !$("#classes").children.length || confirm(text);

$("#network").onchange = () => { sessionStorage.network = $("#network").value; act(); };
$("#restart").onclick = () => {
    if (sure("Remove all examples?")) act(["restart"]).then(() => pads.query.clear());
};
$("#load").onclick = () => $("#file").click();
$("#file").onchange = () => {
    const [file] = $("#file").files;
    if (file && sure("The file replaces the examples on this page. Load it?")) {
        act(["load", {name: file.name}, file.slice(0, most.model + 1)]).then(() => pads.query.clear());
    }
    $("#file").value = "";
};
$("#save").onclick = () => {
    turn = turn.then(async () => {
        const content = await post("save");
        if (content.notes) return show({}, content.notes);
        make("a", {href: URL.createObjectURL(content), download: "taught.fewshot"}).click();
    });
};
act();
