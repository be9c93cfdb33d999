"""Images of one's own, from folders to answers."""

import csv
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision.models import get_model

import fewshot.cli  # noqa: F401  for the help
from conftest import METHODS
from fewshot.config import CONF, compose, compose_unresolved
from fewshot.data.episodes import EpisodeNumber
from fewshot.data.files import list_zip
from fewshot.data.images import decode, normalise
from fewshot.demo import open_networks
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.export import export
from fewshot.files import output_directory
from fewshot.learned import Learned
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.prediction import predict
from fewshot.predictor import make_predictor
from fewshot.text import for_csv
from fewshot.trained import load_trained
from fewshot.training import make_data


@pytest.fixture(scope="module")
def episode(run):
    """One of the test, and its images: uint8, bright letters on black."""
    data = make_data(load_trained(str(run("protonet"))).config)
    data.setup()
    episode = data.datasets["test"][EpisodeNumber(0, 0)]
    return episode, data.bank.images[episode.support].numpy(), data.bank.images[episode.query].numpy()


@pytest.fixture
def folders(episode, tmp_path):
    """The same as dark letters on white, in folders."""
    labelled, support, query = episode
    for name, images, labels in (
        ("support", support, labelled.support_labels),
        ("query", query, labelled.query_labels),
    ):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = tmp_path / name / f"letter {label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - image[..., 0]).save(path)
    return tmp_path


def configure(folders, *overrides):
    places = [f"support={folders / 'support'}", f"query={folders / 'query'}", f"out={folders / 'out'}"]
    return compose(*places, *overrides, name="predict")


def table(folders):
    with (folders / "out" / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
def test_own_images_are_answered_as_those_of_an_episode(run, episode, folders, method, capsys):
    predict(configure(folders, f"checkpoint={run(method)}"))
    labelled, *images = episode
    support, query = (normalise(torch.from_numpy(image), "range") for image in images)
    # Files in the order of their names, and the support as the predictor shuffles it.
    order = torch.tensor(sorted(range(15), key=lambda number: (number // 3, f"{number}.png")))
    support_order = labelled.support_labels.argsort()[torch.randperm(5, generator=torch.Generator().manual_seed(0))]
    given = labelled._replace(
        support=support[support_order], support_labels=labelled.support_labels[support_order], query=query[order]
    )
    solve = load_trained(str(run(method))).method
    with torch.no_grad():
        if method == "maml":  # which has the support set in the queries' batch
            logits = solve.classifier(given.support, given.support_labels, 5)(given.query)
        else:
            logits = solve(given)
    expected = logits.softmax(1)
    rows = table(folders)
    assert [row["label"] for row in rows] == [f"letter {label}" for label in expected.argmax(1)]
    found = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(found, expected.amax(1), atol=1e-4, rtol=0)
    assert [row["runner-up"] for row in rows] == [f"letter {label}" for label in expected.topk(2).indices[:, 1]]
    right = (expected.argmax(1) == labelled.query_labels[order]).sum()
    assert f"{right} of the 15 queries in folders named after a class are right" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_classes_and_of_images_a_class(run, folders, method):
    shutil.rmtree(folders / "support" / "letter 4")
    for number in range(3):
        shutil.copy(
            folders / "query" / "letter 0" / f"{number}.png", folders / "support" / "letter 0" / f"{number}.png"
        )
    predict(configure(folders, f"checkpoint={run(method)}", "query=" + str(folders / "query" / "letter 1")))
    assert {row["label"] for row in table(folders)} <= {f"letter {label}" for label in range(4)}
    for number in range(3):
        (folders / "support" / f"letter {7 + number}").mkdir()
        shutil.copy(folders / "query" / "letter 2" / f"{6 + number}.png", folders / "support" / f"letter {7 + number}")
    predict(configure(folders, f"checkpoint={run(method)}", "query=" + str(folders / "query" / "letter 1")))
    assert len(table(folders)) == 3


def test_the_batch_changes_no_answer_of_a_method_that_classifies_one_by_one(run, folders):
    answers = []
    for batch in (1, 4, 64):
        predict(configure(folders, f"checkpoint={run('matching')}", f"batch={batch}"))
        answers.append([(row["file"], row["label"]) for row in table(folders)])
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 15


def test_queries_are_read_a_batch_at_a_time(run, folders, monkeypatch):
    sizes = []
    answer = Learned.answer
    monkeypatch.setattr(Learned, "answer", lambda *both: (sizes.append(len(both[1])), answer(*both))[1])
    predict(configure(folders, f"checkpoint={run('protonet')}", "batch=7"))
    assert sizes == [5, 5, 5]  # alike, so that none is left alone in the last batch


def test_broken_files_are_named_and_the_others_are_read(run, folders, capsys):
    (folders / "query" / "letter 1" / "3.png").write_bytes(b"no image")
    (folders / "query" / "notes.txt").write_text("hello")
    (folders / "support" / "letter 0" / "broken.jpg").write_bytes(b"")
    predict(configure(folders, f"checkpoint={run('protonet')}", "batch=2"))
    message = capsys.readouterr()
    assert [re.sub(r".*/", "", line.split(":")[1]) for line in message.err.splitlines()] == [
        "broken.jpg",
        "notes.txt",
        "3.png",
    ]
    assert all(line.startswith("left out: cannot read the image ") for line in message.err.splitlines())
    assert len(table(folders)) == 14 and "files left out: 3;" in message.out
    listed = (folders / "out" / "left_out.txt").read_text().splitlines()
    assert [f"left out: {line}" for line in listed] == message.err.splitlines()


@pytest.mark.parametrize("pattern", ["pipe.png", "*.png"])
def test_a_pipe_is_left_out_and_not_waited_for(run, folders, capsys, pattern):
    os.mkfifo(folders / "pipe.png")
    with pytest.raises(FewShotError, match="there is no query left to classify"):
        predict(configure(folders, f"checkpoint={run('protonet')}", f"query='{folders / pattern}'"))
    assert "pipe.png" in (err := capsys.readouterr().err) and "not a regular file" in err


def test_many_files_that_are_left_out_are_summed_up_and_listed_in_a_file(run, folders, capsys):
    for number in range(30):
        (folders / "query" / f"notes {number}.txt").write_text("hello")
    predict(configure(folders, f"checkpoint={run('protonet')}"))
    message = capsys.readouterr()
    assert len(message.err.splitlines()) == 5 and "files left out: 30;" in message.out
    assert len((folders / "out" / "left_out.txt").read_text().splitlines()) == 30


def test_a_class_without_an_image_that_can_be_read_is_refused(run, folders):
    for file in (folders / "support" / "letter 2").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(FewShotError, match=r"class letter 2 has no readable image in .*letter 2"):
        predict(configure(folders, f"checkpoint={run('protonet')}"))
    assert not (folders / "out").exists()


def test_queries_of_the_support_set_are_left_out(run, folders, capsys):
    seen = next((folders / "support" / "letter 3").iterdir())
    shutil.copy(seen, folders / "query" / "copy.png")
    predict(configure(folders, f"checkpoint={run('protonet')}"))
    assert f"copy.png is in the support set, as {seen}" in capsys.readouterr().err
    assert len(table(folders)) == 15
    with pytest.raises(FewShotError, match="no query left to classify"):
        predict(configure(folders, f"checkpoint={run('protonet')}", f"query={folders / 'support'}"))
    assert not list((folders / "out").glob("*.partial"))


def test_the_same_image_in_two_classes_is_reported(run, folders, capsys):
    shutil.copy(next((folders / "support" / "letter 3").iterdir()), folders / "support" / "letter 4" / "copy.png")
    predict(configure(folders, f"checkpoint={run('protonet')}"))
    assert re.search(r"warning: .*letter 4/copy\.png is the same image as .*letter 3", capsys.readouterr().err)


def test_queries_that_look_like_support_images_are_reported_and_counted_separately(run, folders, capsys):
    seen = next((folders / "support" / "letter 3").iterdir())
    Image.open(seen).resize((64, 64)).save(folders / "query" / "letter 3" / "copy.jpg", quality=70)
    predict(configure(folders, f"checkpoint={run('protonet')}"))
    message = capsys.readouterr()
    (line,) = message.err.splitlines()
    assert line.startswith(f"warning: {folders}/query/letter 3/copy.jpg looks the same as {seen} in the support set")
    assert "of the 16 queries in folders named after a class" in message.out
    assert "without the 1 that look the same as a support image" in message.out
    shutil.copy(folders / "query" / "letter 3" / "copy.jpg", folders / "support" / "letter 4" / "copy.jpg")
    predict(configure(folders, f"checkpoint={run('protonet')}"))
    message = capsys.readouterr().err.splitlines()[0]
    assert re.match(
        r"warning: .*copy\.jpg of the class letter 4 looks the same as .* of letter 3 .*distinguished",
        message,
    )


def test_the_accuracy_is_reported_for_queries_at_any_depth_below_their_class(run, folders, capsys, monkeypatch):
    deep = folders / "query" / "letter 2" / "2024" / "may"
    deep.mkdir(parents=True)
    for file in list((folders / "query" / "letter 2").glob("*.png")):
        file.rename(deep / file.name)
    monkeypatch.chdir(folders)
    for query, counted in ((folders / "query", 15), ("query/*/*/*/*.png", 3), (deep.parents[1], 3), (deep, 0)):
        config = configure(folders, f"checkpoint={run('protonet')}")
        config.query = str(query)
        predict(config)
        message = capsys.readouterr().out
        assert (f"of the {counted} queries in folders named after a class" in message) == (counted > 0), query


def test_equal_logits_count_as_a_guess_and_are_counted(run, folders, capsys, tmp_path):
    whole = torch.load(run("protonet") / "checkpoints" / "best.ckpt", weights_only=True)
    for weight in whole["state_dict"].values():
        weight.zero_()  # all embeddings are equal
    torch.save(whole, tmp_path / "constant.ckpt")
    predict(configure(folders, f"checkpoint={tmp_path / 'constant.ckpt'}"))
    shown = capsys.readouterr()
    assert "for 15 of the queries, several classes have the same largest logit" in shown.err
    assert "3 of the 15 queries in folders named after a class are right: 20.00%" in shown.out


def test_the_logits_decide_the_order_and_of_equal_ones_the_first_class_comes_first(run, folders, monkeypatch):
    answers = torch.tensor([[-400.0, -150, -300, -200, 0], [0, 0, 0, 0, 0]])
    monkeypatch.setattr(Learned, "answer", lambda *_: answers.repeat(8, 1)[:15])
    predict(configure(folders, f"checkpoint={run('protonet')}"))
    found = [(row["label"], row["probability"], row["runner-up"]) for row in table(folders)[:2]]
    assert found == [("letter 4", "1.0000", "letter 1"), ("letter 0", "0.2000", "letter 1")]


def test_folders_within_the_folder_of_a_class_are_mentioned(run, folders, capsys):
    (folders / "support").rename(folders / "first")
    (folders / "support").mkdir()
    shutil.copytree(folders / "first", folders / "support" / "one")
    (folders / "first").rename(folders / "support" / "two")
    predict(configure(folders, f"checkpoint={run('protonet')}"))
    shown, fix = capsys.readouterr().out, f"support={folders / 'support' / 'one'}"
    assert "the 2 classes are one, two, and the folders in them, such as one/letter 0, are parts of these" in shown
    assert f"choose {fix}" in shown
    predict(configure(folders, f"checkpoint={run('protonet')}", fix))
    assert "are parts of these" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [
        *(("train", "valid", "test"), ("Train", "Test"), ("TRAINING", "dev", "novel", "notes")),
        ("images_background", "images_evaluation"),
    ],
)
def test_a_data_set_in_place_of_a_support_set_is_refused(run, folders, names):
    place = folders / "whole"
    for name in names:
        shutil.copytree(folders / "support", place / name)
    with pytest.raises(
        FewShotError, match=rf"whole contains the splits of a data set, {names[0]}, .*name one of them: su"
    ):
        predict(configure(folders, f"checkpoint={run('protonet')}", f"support={place}"))
    assert not (folders / "out").exists()


def test_what_is_written_without_a_name_never_meets_what_is_there(run, folders, monkeypatch):
    monkeypatch.setattr("fewshot.files.ROOT", folders / "root")
    for _ in range(3):
        predict(configure(folders, f"checkpoint={run('protonet')}", "out=null"))
    written = list((folders / "root" / "outputs").glob("*/*_predict*/predictions.csv"))
    assert len(written) == 3
    stopped = type("Stopped", (datetime,), {"now": classmethod(lambda cls, *_: cls(2030, 1, 2, 3, 4, 5))})
    monkeypatch.setattr("fewshot.files.datetime", stopped)
    made = [output_directory(None, "evaluate").name for _ in range(3)]
    assert made == ["03-04-05_evaluate", "03-04-05_evaluate_2", "03-04-05_evaluate_3"]


@pytest.mark.parametrize(("query", "count"), [("query/letter 1/4.png", 1), ("query/*/1*.png", 6), ("query", 15)])
def test_queries_are_a_file_a_pattern_or_a_folder(run, folders, query, count, monkeypatch):
    for place in (folders / query, Path(query)):
        monkeypatch.chdir(folders)
        config = configure(folders, f"checkpoint={run('protonet')}")
        config.query = str(place)
        predict(config)
        assert len(table(folders)) == count


def test_a_contact_sheet_shows_what_the_network_saw(run, folders, capsys):
    predict(configure(folders, f"checkpoint={run('protonet')}", "sheet=8", "shown=3"))
    assert Image.open(folders / "out" / "predictions.png").size[0] > 500
    message = capsys.readouterr().out
    assert "... and 12 more:" in message and "15 queries, 5 classes with 1 image each" in message


def test_names_steer_neither_the_terminal_nor_a_spreadsheet(run, folders, capsys):
    odd = folders / "query" / "=\x1b[31m\nred [bold].png"
    shutil.copy(folders / "query" / "letter 0" / "0.png", odd)
    predict(configure(folders, f"checkpoint={run('protonet')}", "shown=99"))
    message = capsys.readouterr()
    assert "\x1b[31m" not in message.out + message.err and "[bold]" in message.out
    assert for_csv(str(odd)) in [row["file"] for row in table(folders)]
    shutil.move(folders / "support" / "letter 0", folders / "support" / "=1+1")
    predict(configure(folders, f"checkpoint={run('protonet')}"))
    labels = {row[key] for row in table(folders) for key in ("label", "runner-up")}
    assert "'=1+1" in labels and "=1+1" not in labels


@pytest.mark.parametrize("frozen", [True, False])
def test_a_pretrained_encoder_needs_no_training_if_it_is_frozen(folders, tmp_path, frozen):
    name = "mobilenet_v3_small"
    torch.save(get_model(name, weights=None).state_dict(), tmp_path / "weights.pth")
    encoder = ["encoder=pretrained", f"encoder.name={name}", f"encoder.file={tmp_path / 'weights.pth'}"]
    config = configure(folders, *encoder, f"encoder.frozen={frozen}", "method=matching", "dataset.size=32")
    if frozen:
        predict(config)
        assert len(table(folders)) == 15
        assert make_predictor(config).kind == "plain" and not make_predictor(config).ink
    else:
        with pytest.raises(FewShotError, match=r"untrained weights: .* checkpoint=RUN_DIR"):
            predict(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder=conv4", "dataset.channels=1"], "untrained weights"),
        (["checkpoint=RUN", "method=matching_fce"], "method=matching_fce has untrained weights"),
        (["checkpoint=RUN", "dataset.size=9"], "dataset.size=9: a checkpoint decides the dataset and the encoder"),
        (["checkpoint=/none"], "there is no checkpoint /none"),
        (["checkpoint=RUN", "support=null"], "there is no support set"),
        (["checkpoint=RUN", "support=/none"], "there is no folder /none"),
        (["checkpoint=RUN", "query=null"], "there are no queries"),
        (["checkpoint=RUN", "query=/none"], "there is nothing to classify in query=/none"),
        (["checkpoint=RUN", "batch=0"], "batch=0 must be a whole number of at least 1"),
        (["checkpoint=RUN", "unknown=no"], "unknown=no must be true or false"),
        (["checkpoint=RUN", "false_alarm=5%"], "false_alarm=5% must be a number above 0 and below 1"),
        (["checkpoint=RUN", "false_alarm=1"], "false_alarm=1 must be a number above 0 and below 1"),
        (["dataset.channels=4"], "dataset.channels=4 must be 1 or 3"),
        (["dataset.size=84.5"], "dataset.size=84.5 must be a whole number of at least 1"),
        (["checkpoint=5"], "checkpoint=5 must be a path or null"),
        (["checkpoint=RUN", "sheet=many"], "sheet=many must be a whole number of at least 0"),
        (["checkpoint=RUN", "hardware=cpu", "hardware.devices=2"], "predictions are made on one"),
    ],
)
def test_a_mistake_is_reported_in_one_line(run, folders, overrides, message):
    with pytest.raises(FewShotError) as caught:
        predict(configure(folders, *(override.replace("RUN", str(run("protonet"))) for override in overrides)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_support_set_without_folders_is_explained(run, folders):
    with pytest.raises(FewShotError, match="has 0 folders with files, and at least two classes are needed"):
        predict(configure(folders, f"checkpoint={run('protonet')}", f"support={folders / 'query' / 'letter 1'}"))


@pytest.mark.parametrize("damage", ["weights", "configuration", "method"])
def test_weights_that_do_not_fit_are_reported_in_one_line(run, tmp_path, damage):
    content = torch.load(run("protonet") / "checkpoints" / "best.ckpt", weights_only=True)
    if damage == "weights":
        content["state_dict"].pop("encoder.0.0.weight")
    elif damage == "configuration":
        content["hyper_parameters"]["method"]["encoder"]["filters"] = 9
    else:
        content["hyper_parameters"]["method"] = content["hyper_parameters"]["dataset"]["source"]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(FewShotError) as caught:
        load_trained(str(tmp_path / "other.ckpt"))
    message = str(caught.value)
    expected = {
        "weights": "encoder.0.0.weight",
        "configuration": "must be [9, 1, 3, 3]",
        "method": "can only be a dataset.source",
    }
    assert str(tmp_path / "other.ckpt") in message and expected[damage] in message and "\n" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["encoder.0.0.weight", "encoder.0.1.running_var"])
def test_weights_that_are_not_finite_are_refused_by_all_that_read_them(run, folders, tmp_path, tensor, value):
    content = torch.load(run("protonet") / "checkpoints" / "best.ckpt", weights_only=True)
    assert tensor in content["state_dict"]
    content["state_dict"][tensor].view(-1)[1] = value
    path = tmp_path / "bad.ckpt"
    torch.save(content, path)
    message = re.escape(f"{tensor} of {path} is not finite")
    for use in (
        lambda: predict(configure(folders, f"checkpoint={path}")),
        lambda: evaluate(compose(f"checkpoint={path}", f"out={tmp_path / 'tested'}", name="evaluate")),
        lambda: export(str(path), str(tmp_path / "encoder.onnx")),
        lambda: open_networks(compose(f"checkpoint={path}", name="demo")),
    ):
        with pytest.raises(FewShotError, match=message):
            use()
    assert not (tmp_path / "tested").exists() and not (tmp_path / "encoder.onnx").exists()


def test_logits_that_are_not_finite_are_no_answer(run, folders, monkeypatch):
    monkeypatch.setattr(
        PrototypicalNetwork, "compare", lambda _, episode: torch.full((len(episode.query), 5), torch.nan)
    )
    with pytest.raises(FewShotError, match="logits for these images are not finite"):
        predict(configure(folders, f"checkpoint={run('protonet')}"))
    assert not list((folders / "out").iterdir())


@pytest.mark.parametrize("name", ["predict", "demo", "evaluate", "export"])
def test_help_shows_every_key_with_a_comment(name):
    shown = compose_unresolved(name=name).hydra.help.template
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    for key, value in config.items():
        if key not in ("defaults", "hydra"):
            for documented in value if isinstance(value, dict) else [key]:
                assert re.search(rf"^ *{documented}:.*  # \w", shown, re.MULTILINE), documented


def test_the_command_predicts(cli, run, folders):
    places = [f"support={folders / 'support'}", f"query={folders / 'query'}", f"out={folders / 'out'}"]
    done = cli(f"checkpoint={run('protonet')}", *places, script="predict.py", cwd=folders)
    assert done.returncode == 0, done.stderr
    assert "letter 0" in done.stdout and str(folders / "out" / "predictions.csv") in done.stdout
    assert {path.name for path in folders.iterdir()} == {"support", "query", "out"}
    wrong = cli("checkpiont=x", *places, script="predict.py")
    assert wrong.returncode == 1 and "did you mean checkpoint?" in wrong.stderr and "Traceback" not in wrong.stderr


def test_maml_cannot_go_without_a_checkpoint(folders):
    places = [f"support={folders / 'support'}", f"query={folders / 'query'}"]
    config = compose_unresolved(*places, "method=maml", name="predict")
    with pytest.raises(FewShotError, match="untrained weights"):
        predict(config)


@pytest.mark.real_data
def test_omniglots_own_files_are_read_as_its_bank_reads_them(run, real_data):
    """Characters as PNG files of 105 by 105 pixels, as they are published."""
    archive = real_data / "omniglot" / "images_evaluation.zip"
    if not archive.exists():
        pytest.skip("Omniglot lies unpacked here")
    predictor = make_predictor(compose(f"checkpoint={run('protonet')}", name="predict"))
    files = [file for name, file in list_zip(archive).items() if name.endswith(".png")]
    for file in files[:: len(files) // 40]:
        np.testing.assert_array_equal(predictor.read(file), 255 - decode(file, 28, 1))


def test_another_method_on_the_encoder_of_a_checkpoint(run):
    own, other = (
        make_predictor(compose(f"checkpoint={run('protonet')}", "hardware=cpu", *choice, name="predict"))
        for choice in ([], ["method=matching", "distance=cosine"])
    )
    assert (type(own.method).__name__, type(other.method).__name__) == ("PrototypicalNetwork", "MatchingNetwork")
    weights = own.method.encoder.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in other.method.encoder.state_dict().items())
    images = [np.full((own.size, own.size, 1), value, dtype=np.uint8) for value in (0, 90, 200)]
    images[1][:9], images[2][:, :5] = 255, 0
    assert other.learn({"a": images[:1], "b": images[1:2]})(images).shape == (3, 2)
