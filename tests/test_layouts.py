"""Every layout of ``layouts.py`` is read as the data set it is, or named with what makes it whole."""

import re

import numpy as np
import pytest

from conftest import listing
from fewshot.data.bank import SPLITS, open_bank
from fewshot.errors import FewShotError
from layouts import (
    COUNT,
    FOLDER,
    MINI,
    MINIIMAGENET,
    OMNIGLOT,
    Layout,
    pixels,
    read_folder,
    read_miniimagenet,
    read_omniglot,
)


def named(layouts: list[Layout]):
    assert len({layout.name for layout in layouts}) == len(layouts)
    return pytest.mark.parametrize("layout", layouts, ids=lambda layout: layout.name)


@named([layout for layout in MINIIMAGENET if layout.message is None])
def test_miniimagenet_is_read_from_every_layout(tmp_path, layout):
    data_dir = layout.write(tmp_path / "data")
    before = listing(tmp_path / "data")
    source = read_miniimagenet(data_dir)
    bank = open_bank("miniimagenet", source, {}, tmp_path / "cache")
    assert listing(tmp_path / "data") == before
    assert all(path.is_file() for path in source.files) and source.files
    if "100 classes" in layout.name:
        assert [len(bank.classes(split)) for split in SPLITS] == [64, 16, 20]
        return
    assert {split: tuple(bank.class_names(split)) for split in SPLITS} == MINI
    for place, name in enumerate(bank.names):
        images = bank.images[bank.offsets[place] : bank.offsets[place + 1]].numpy().astype(int)
        assert len(images) == COUNT
        for number, image in enumerate(images):
            assert np.abs(image - pixels(name, number)).mean() < 4, (name, number)


@named([layout for layout in MINIIMAGENET if layout.message is not None])
def test_incomplete_miniimagenet_is_named_with_what_is_missing(tmp_path, layout):
    data_dir = layout.write(tmp_path / "data")
    with pytest.raises(FewShotError, match=layout.message):
        read_miniimagenet(data_dir).classes()


@named([layout for layout in OMNIGLOT if layout.message is None])
def test_omniglot_is_read_from_every_layout(tmp_path, layout):
    expected = open_bank("omniglot", read_omniglot(OMNIGLOT[0].write(tmp_path / "zips")), {}, tmp_path / "cache")
    data_dir = layout.write(tmp_path / "data")
    before = listing(tmp_path / "data")
    source = read_omniglot(data_dir)
    bank = open_bank("omniglot", source, {}, tmp_path / "cache")
    assert listing(tmp_path / "data") == before
    assert all(path.is_file() for path in source.files) and source.files
    assert (bank.names, bank.splits) == (expected.names, expected.splits)
    assert (bank.images == expected.images).all()


@named([layout for layout in OMNIGLOT if layout.message is not None])
def test_incomplete_omniglot_is_named_with_what_is_missing(tmp_path, layout):
    data_dir = layout.write(tmp_path / "data")
    with pytest.raises(FewShotError, match=layout.message) as caught:
        read_omniglot(data_dir)
    assert "remove" not in str(caught.value) and "delete" not in str(caught.value)


@named([layout for layout in FOLDER if layout.message is None])
def test_your_own_images_are_read_from_every_layout(tmp_path, layout):
    data_dir = layout.write(tmp_path / "data")
    before = listing(tmp_path / "data")
    source = read_folder(data_dir, layout.depth)
    bank = open_bank("mine", source, {}, tmp_path / "cache")
    assert listing(tmp_path / "data") == before
    assert all(path.is_file() for path in source.files) and source.files
    assert tuple(len(bank.class_names(split)) for split in SPLITS) == layout.counts


@named([layout for layout in FOLDER if layout.message is not None])
def test_incomplete_folders_are_named_with_what_is_missing(tmp_path, layout):
    data_dir = layout.write(tmp_path / "data")
    with pytest.raises(FewShotError, match=layout.message):
        read_folder(data_dir, layout.depth)


def test_what_is_assumed_about_your_own_images_is_reported(tmp_path, capsys):
    layouts = {layout.name: layout for layout in FOLDER}

    def report(name):
        read_folder(layouts[name].write(tmp_path / name.replace("/", "_")))
        return capsys.readouterr().out

    assert re.search(
        r"the classes are those in .*/CUB_200_2011/images, the only folder", report("CUB, the folder above")
    )
    assert "2 of the 10 classes in train are held out for it (dataset.source.val=0.2)" in report("splits train, test")
    assert "to take the 20 folders in them instead, add dataset.source.depth=2" in report("alphabets")
    assert "ignored 1 images" in report("images next to the folders")
    assert "depth" not in report("images within folders of a class")


def test_a_complete_layout_is_read_next_to_an_incomplete_one(tmp_path, capsys):
    layouts = {layout.name: layout for layout in MINIIMAGENET}
    layouts["tables without images"].write(tmp_path)
    layouts["caches train.pkl, val.pkl, test.pkl"].write(tmp_path)
    assert len(read_miniimagenet(tmp_path).classes()) == 7
    assert "unpack the images again; reading pickled caches instead" in capsys.readouterr().out


def test_other_splits_than_the_published_ones_are_named(tmp_path, capsys):
    next(layout for layout in MINIIMAGENET if layout.name == "folders train, valid, test").write(tmp_path)
    val = tmp_path / "miniimagenet" / "valid"
    (tmp_path / "miniimagenet" / "train" / "n01532829").rename(val / "n01532829")
    assert len(read_miniimagenet(tmp_path).classes()) == 7
    assert (
        "are not those of Ravi & Larochelle: 1 classes are in a different split, for example n01532829"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("fault", ["an external link", "a link", "an external dataset", "a virtual dataset", "floats"])
def test_an_hdf5_file_reaches_no_other_file(tmp_path, fault):
    h5py = pytest.importorskip("h5py")
    next(layout for layout in MINIIMAGENET if layout.name == "HDF5 with JSON").write(tmp_path)
    images, name = np.zeros((2, 8, 8, 3), np.uint8), MINI["val"][0]
    with h5py.File(tmp_path / "secret.hdf5", "w") as secret:
        secret["images"] = images
    (tmp_path / "secret.raw").write_bytes(images.tobytes())
    with h5py.File(tmp_path / "miniimagenet" / "val_data.hdf5", "a") as file:
        group = file["datasets"]
        del group[name]
        if fault == "an external link":
            group[name] = h5py.ExternalLink(str(tmp_path / "secret.hdf5"), "images")
        elif fault == "a link":
            group[name] = h5py.SoftLink(f"/datasets/{MINI['val'][1]}")
        elif fault == "an external dataset":
            raw = [(str(tmp_path / "secret.raw"), 0, images.nbytes)]
            group.create_dataset(name, images.shape, images.dtype, external=raw)
        elif fault == "a virtual dataset":
            layout = h5py.VirtualLayout(images.shape, images.dtype)
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.hdf5"), "images", images.shape)
            group.create_virtual_dataset(name, layout)
        else:
            group[name] = images.astype(np.float32)
    with pytest.raises(FewShotError, match=r"cannot read the HDF5 file .*val_data\.hdf5: .*n01855672"):
        read_miniimagenet(tmp_path).classes()


def test_an_hdf5_file_that_claims_more_than_it_holds_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    next(layout for layout in MINIIMAGENET if layout.name == "HDF5 with JSON").write(tmp_path)
    with h5py.File(tmp_path / "miniimagenet" / "val_data.hdf5", "a") as file:
        for number in range(2):
            file["datasets"].create_dataset(f"{number}", (9000, 84, 84, 3), np.uint8, chunks=(1, 84, 84, 3))
    with pytest.raises(FewShotError, match=r"it claims 38\d,\d+,\d+ bytes of images, more than 100 times its own"):
        read_miniimagenet(tmp_path).classes()


@pytest.mark.parametrize("contents", [b"", b"no HDF5", b"\x89HDF\r\n\x1a\n" + bytes(99)])
def test_a_broken_hdf5_file_is_named(tmp_path, contents):
    pytest.importorskip("h5py")
    next(layout for layout in MINIIMAGENET if layout.name == "HDF5 with JSON").write(tmp_path)
    (tmp_path / "miniimagenet" / "test_data.hdf5").write_bytes(contents)
    with pytest.raises(FewShotError, match=r"cannot read the HDF5 file .*test_data\.hdf5"):
        read_miniimagenet(tmp_path).classes()
