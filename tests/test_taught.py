"""Classifiers that are taught once: the file, what it adds, and the whole classifier as ONNX."""

import csv
import json
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.models import get_model

from conftest import nothing_touched
from fewshot import FewShotClassifier
from fewshot.config import ROOT, compose
from fewshot.data.photos import prepare
from fewshot.errors import FewShotError
from fewshot.export import Photos, export_classifier
from fewshot.familiarity import ONE_SHOT, learn_familiarity
from fewshot.prediction import predict
from fewshot.teaching import teach

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "grey": (120, 120, 120)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of one colour each, with noise, and a network with random weights."""
    home, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for folder, names in (("support", ("red", "green", "blue")), ("more", ("red", "grey")), ("query", COLOURS)):
        for name in names:
            (home / folder / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.array(COLOURS[name]) + generator.integers(-40, 40, (40, 50, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(home / folder / name / f"{number}.png")
    torch.manual_seed(0)
    torch.save(get_model("mobilenet_v3_small", weights=None).state_dict(), home / "weights.pth")
    return home


def encoder(photos):
    file = f"encoder.file={photos / 'weights.pth'}"
    return ["encoder=pretrained", "encoder.name=mobilenet_v3_small", file, "dataset.size=32", "hardware=cpu"]


@pytest.fixture(scope="module")
def taught(photos):
    file = photos / "colours.fewshot"
    teach(compose(*encoder(photos), f"support={photos / 'support'}", f"out={file}", name="teach"))
    return file


def answers(photos, out, *overrides):
    return answers_of(photos / "query", out, *overrides)


def answers_of(query, out, *overrides):
    predict(compose(*overrides, f"query={query}", f"out={out}", "hardware=cpu", name="predict"))
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_taught_file_answers_as_the_photos_do(photos, taught, tmp_path, capsys):
    direct = answers(photos, tmp_path / "direct", *encoder(photos), f"support={photos / 'support'}", "unknown=true")
    found = answers(photos, tmp_path / "taught", f"model={taught}", "unknown=true")
    assert len(found) == 12 and [row["label"] for row in found] == [row["label"] for row in direct]
    for key in ("probability", "familiarity"):
        values = [[float(row[key]) for row in rows] for rows in (found, direct)]
        np.testing.assert_allclose(*values, atol=2e-3)
    message = capsys.readouterr().out
    assert (
        "accuracy on held-out examples when it was taught:" in message
        and " of 12 queries are unlike every class; about 5% of" in message
    )
    assert str(photos).encode() not in taught.read_bytes()


@pytest.mark.parametrize("ending", [".safetensors", ".fewshot"])
def test_a_classifier_is_written_as_onnx_only(taught, tmp_path, ending):
    out = tmp_path / f"colours{ending}"
    with pytest.raises(FewShotError, match=f"^out={out}: a taught classifier is written as ONNX; choose out=FILE"):
        export_classifier(str(taught), str(out))
    assert not out.exists()


def test_a_wrong_image_format_is_not_blamed_on_the_photos(photos, tmp_path):
    out = tmp_path / "x.fewshot"
    settings = [*encoder(photos), f"support={photos / 'support'}", f"out={out}", "hardware=cpu"]
    with pytest.raises(FewShotError, match=r"^dataset\.channels=4 must be 1 or 3$"):
        teach(compose(*settings, "dataset.channels=4", name="teach"))
    assert not out.exists()


def test_classes_and_examples_are_added_without_the_old_photos(photos, taught, tmp_path):
    more = tmp_path / "more.fewshot"
    teach(compose(f"model={taught}", f"support={photos / 'more'}", f"out={more}", "hardware=cpu", name="teach"))
    labels = load_file(more)["labels"]
    assert labels.bincount().tolist() == [3, 3, 6, 3]
    rows = answers(photos, tmp_path / "out", f"model={more}")
    assert {row["label"] for row in rows if "/grey/" in row["file"]} == {"grey"}


def test_a_broken_hostile_or_changed_file_is_refused(photos, taught, tmp_path):
    tensors = load_file(taught)
    with safe_open(taught, framework="pt") as opened:
        content = json.loads(opened.metadata()["fewshot"])
    del content["sha256"]  # whoever means harm writes a new one, or none

    def refused(message, tensors=tensors, **changes):
        file = tmp_path / "x.fewshot"
        save_file(tensors, file, {"fewshot": json.dumps(content | changes)})
        with pytest.raises(FewShotError, match=message) as caught:
            answers(photos, tmp_path / "out", f"model={file}")
        assert "\n" not in str(caught.value)

    refused("its encoder is not the one", encoder_sha256="0")
    weight = next(name for name in tensors if name.startswith("weights.encoder") and name.endswith("weight"))
    refused("its encoder is not the one", tensors | {weight: tensors[weight] + 1})
    refused("do not fit its classes", classes=["a", "b"])
    refused("do not fit its classes", tensors | {"examples": tensors["examples"][:, 1:].contiguous()})
    refused("classifier does not fit", tensors | {"classifier.weight": tensors["classifier.weight"][:2].contiguous()})
    refused("classifier does not fit", classifier=content["classifier"] | {"temperature": 0.0})
    refused("unknown images does not fit", familiarity=content["familiarity"] | {"spread": 1e99})
    refused("its crop is 'sideways', and must be one of auto, center, pad, squash", crop="sideways")
    refused("its method is os.system", config=content["config"] | {"method": {"_target_": "os.system"}})
    with pytest.raises(FewShotError, match=r"there is no file .*fewshot teach support=DIR out="):
        answers(photos, tmp_path / "out", f"model={tmp_path / 'none.fewshot'}")


@pytest.mark.parametrize("place", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_changed_byte_anywhere_in_a_model_file_is_noticed(photos, taught, tmp_path, place):
    content = bytearray(taught.read_bytes())
    content[int(place * len(content))] ^= 1
    file = tmp_path / "x.fewshot"
    file.write_bytes(content)
    with pytest.raises(FewShotError, match=r"x\.fewshot is broken, or holds no weights saved by this program"):
        answers(photos, tmp_path / "out", f"model={file}")


@pytest.mark.parametrize("content", [b"", b"hello" * 100, pickle.dumps(pathlib.Path("x"))])
def test_what_is_no_model_file_is_refused_by_all_that_read_one(photos, tmp_path, content):
    file = tmp_path / "x.fewshot"
    file.write_bytes(content)
    readers = [
        lambda: answers(photos, tmp_path / "out", f"model={file}"),
        lambda: teach(
            compose(
                f"model={file}", f"support={photos / 'more'}", f"out={tmp_path / 'y'}", "hardware=cpu", name="teach"
            )
        ),
        lambda: export_classifier(str(file), str(tmp_path / "x.onnx")),
        lambda: FewShotClassifier.load(file),
    ]
    for read in readers:
        with nothing_touched(), pytest.raises(FewShotError, match=r"x\.fewshot is broken, or holds no weights"):
            read()
    assert [path.name for path in tmp_path.iterdir()] == ["x.fewshot"]


@pytest.mark.parametrize("override", ["encoder=pretrained", "method=protonet", "dataset.size=32", "support=x"])
def test_what_a_file_decides_cannot_be_chosen_again(photos, taught, tmp_path, override):
    with pytest.raises(FewShotError, match=rf"{override.partition('=')[0]}.*: model=.* decides that"):
        answers(photos, tmp_path / "out", f"model={taught}", override)


def test_photos_are_resized_as_pillow_does():
    generator = np.random.default_rng(0)
    for height, width in ((32, 32), (100, 61), (20, 300), (64, 48)):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for crop in ("center", "squash"):
            expected = prepare(Image.fromarray(pixels), 32, 3, crop=crop).astype(int)
            found = Photos(32, crop)(torch.from_numpy(pixels)[None])[0].numpy()
            assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 0.01


def test_the_onnx_file_answers_photos_of_any_size(photos, taught, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} of the extra export is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime of the extra export is not installed")
    assert 0 <= export_classifier(str(taught), str(tmp_path / "colours.onnx")) < 1e-3
    session = onnxruntime.InferenceSession(tmp_path / "colours.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["blue", "green", "red"] and -2 < float(metadata["unknown_below"]) < 2
    rows = answers(photos, tmp_path / "out", f"model={taught}", "unknown=true")
    for row in rows:
        pixels = np.asarray(Image.open(row["file"]).convert("RGB"))
        (probabilities,), (familiarity,) = session.run(None, {"pixels": pixels[None]})
        assert probabilities.max() == pytest.approx(float(row["probability"]), abs=5e-3)
        assert familiarity == pytest.approx(float(row["familiarity"]), abs=5e-3)


@pytest.mark.slow
def test_a_newcomer_gets_from_photos_to_an_onnx_file_that_needs_onnxruntime_alone(photos, cli, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} of the extra export is not installed")

    def use(command, *arguments):
        done = cli(*arguments, script=f"{command}.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "examples").symlink_to(photos / "support")
    (tmp_path / "pictures").symlink_to(photos / "query")
    network = [*encoder(photos), "cache_dir=kept", "support=examples"]
    assert " held-out examples: " in use("predict", *network, "query=pictures", "unknown=true", "out=out")
    assert "mine.fewshot: 3 classes, 9 examples" in use("teach", *network, "out=mine.fewshot")
    use("export", "model=mine.fewshot", "out=mine.onnx")
    # The program that the guide shows, where neither fewshot nor torch can be imported.
    guide = (ROOT / "notebooks" / "guides" / "predict.md").read_text()
    (code,) = re.findall(r"^```\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    blocked = "import sys\nsys.modules.update(dict.fromkeys(('fewshot', 'torch', 'torchvision')))\n"
    (tmp_path / "use.py").write_text(blocked + code)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    command = [sys.executable, "use.py", "mine.onnx", *(row["file"] for row in rows)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(rows) == 12, done.stderr
    for row, line in zip(rows, lines, strict=True):
        label, _, probability = line.removeprefix(f"{row['file']}: ").rpartition(", ")
        assert label in (row["label"], f"none of these ({row['label']}?)"), (row, line)
        assert float(probability.rstrip("%")) == pytest.approx(100 * float(row["probability"]), abs=0.6), (row, line)
    differ = sum(("none of these" in line) != (row["unknown"] == "yes") for row, line in zip(rows, lines, strict=True))
    assert differ <= 1  # one may be at the limit


def clusters(classes, shots, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(classes)).repeat_interleave(shots)
    kinds = torch.tensor(classes)[labels]
    return centres[kinds] + 0.7 * torch.randn(len(kinds), 64, generator=generator), labels


@pytest.mark.parametrize("way", [2, 6])
@pytest.mark.parametrize("shots", [3, 10])
def test_false_alarms_are_as_rare_as_stated_and_other_classes_are_noticed(way, shots):
    known, other = list(range(way)), list(range(way, 12))
    learned = learn_familiarity(*clusters(known, shots, 1), way)
    inside, outside = learned(clusters(known, 200, 2)[0]), learned(clusters(other, 200, 3)[0])
    limit = learned.threshold(0.05)
    assert (inside < limit).double().mean() < 0.12
    ranks = torch.cat([inside, outside]).argsort().argsort()[: len(inside)].double() + 1
    area = float((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))
    assert area > 0.9
    assert learned.threshold(0.2) > limit


def test_one_example_a_class_has_a_fixed_threshold_and_rates_are_checked():
    learned = learn_familiarity(*clusters([0, 1, 2], 1, 1), 3)
    assert learned.examples == 0 and learned.threshold(0.5) == pytest.approx(ONE_SHOT[0])
    for rate in (0, 1, 2):
        with pytest.raises(FewShotError, match=f"false_alarm={rate} must be above 0 and below 1"):
            learned.threshold(rate)


def test_copies_of_taught_photos_are_neither_learned_again_nor_queries(photos, taught, tmp_path, capsys):
    more = tmp_path / "more"
    for name in ("red", "green", "blue"):
        (more / name).mkdir(parents=True)
        for number, image in enumerate(sorted((photos / "support" / name).iterdir())):
            (more / name / f"again {number}.png").write_bytes(image.read_bytes())
    (more / "blue" / "red.png").write_bytes((photos / "support" / "red" / "0.png").read_bytes())
    (more / "red" / "new.png").write_bytes((photos / "query" / "red" / "1.png").read_bytes())
    out = tmp_path / "more.fewshot"
    teach(compose(f"model={taught}", f"support={more}", f"out={out}", "hardware=cpu", name="teach"))
    message = capsys.readouterr()
    assert "3 classes, 11 examples" in message.out
    assert message.err.count("is left out, since it is an example of ") == 9
    assert "red.png is also in another class, so they cannot be distinguished: an example of red" in message.err

    with pytest.raises(FewShotError, match=r"no query left"):
        answers_of(photos / "support", tmp_path / "none", f"model={taught}")
    rows = answers_of(more, tmp_path / "some", f"model={taught}")
    assert [row["file"].rpartition("/")[2] for row in rows] == ["new.png"]
    assert "again 0.png is an example of blue in" in (tmp_path / "some" / "left_out.txt").read_text()


@pytest.mark.parametrize("labels", [[True, False], [b"a", b"b"]])
def test_classes_that_no_file_can_hold_are_refused_before_it_is_written(taught, tmp_path, labels):
    images = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    classifier = FewShotClassifier(taught, hardware="cpu").fit(images, labels)
    with pytest.raises(FewShotError, match=r"classes named by (bool|bytes) cannot be saved"):
        classifier.save(tmp_path / "x.fewshot")
    assert not (tmp_path / "x.fewshot").exists()
