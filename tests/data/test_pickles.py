import contextlib
import io
import os
import pickle
import pickletools
import resource
import subprocess
import time
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import damaged, nothing_touched
from fewshot.data.files import file_at
from fewshot.data.miniimagenet import _read_pickle
from fewshot.data.pickles import to_array, to_list, unpickle
from fewshot.errors import FewShotError

IMAGES = np.arange(6 * 2 * 2 * 3, dtype=np.uint8).reshape(6, 2, 2, 3)
CLASSES = {"n01": [0, 1, 2], "n02": [3, 4, 5]}
CACHE = {"image_data": IMAGES, "class_dict": CLASSES}
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(contents):
    with nothing_touched():
        return unpickle(io.BytesIO(contents))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_come_back(protocol):
    value = {
        "a": [1, -2, 2**40, 1.5, None, True, False],
        7: ("x", b"\xff\x00", "é"),
        "n": {"deep": [[], {}, ()]},
        b"": "",
    }
    value["again"] = value["a"]
    assert read(pickle.dumps(value, protocol)) == value
    assert read(pickle.dumps([OrderedDict(a=1), defaultdict(list, b=2)], protocol)) == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["uint8", "<i8", ">i4", "float32", "bool", "<U3", "S2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back(protocol, dtype, order):
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 7, dtype=dtype, order=order)
    found = to_array(read(pickle.dumps(array, protocol)))
    assert np.array_equal(found, array) and found.dtype == array.dtype


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [[3, 1], (3, 1), range(3, 0, -2), np.array([3, 1]), [np.int64(3), np.uint8(1)]])
def test_lists_of_numbers_come_back_whatever_holds_them(protocol, value):
    found = to_list(read(pickle.dumps(value, protocol)), 2)
    assert found == [3, 1] and {type(number) for number in found} == {int}
    with pytest.raises(ValueError, match="a list of 2 entries, more than 1"):
        to_list(read(pickle.dumps(value, protocol)), 1)


class Reduced:
    """Pickled as a call of ``function``, and as what is to be done with its result."""

    def __init__(self, function, *arguments, then=()):
        self.call = function, arguments, *then

    def __reduce__(self):
        return self.call


def exploits(marker):
    """What strangers put into pickles: each leaves ``marker`` behind when Python's own reader meets it."""
    touch = f"touch {marker}"
    plant = f"open({str(marker)!r}, 'w').close()"
    system = Reduced(os.system, touch)
    looped = [system]
    looped.append(looped)
    return {
        "os.system": system,
        "eval": Reduced(eval, plant),
        "exec": Reduced(exec, plant),
        "a process": Reduced(subprocess.call, ["touch", str(marker)]),
        "open": Reduced(open, str(marker), "w"),
        "import": Reduced(eval, f"__import__('os').system({touch!r})"),
        "in a dictionary": {"a": {"b": [{"c": system}]}},
        "as a key": {("a", system): 1},
        "in an array of objects": np.array([[system]], dtype=object),
        "in a record": np.array([(1, system)], dtype=[("a", int), ("b", object)]),
        "behind a memo": [looped, looped],
        "as items of a list": Reduced(list, then=(None, iter([system]))),
        "as the state of an object": Reduced(OrderedDict, then=({"x": system},)),
        "as a factory": Reduced(defaultdict, system),
        "a file mapped": Reduced(np.memmap, str(marker), "uint8", "w+", 0, (1,)),
        "an array written": Reduced(np.save, str(marker.with_suffix("")), np.zeros(1)),
    }


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("kind", exploits(Path("x")))
def test_an_exploit_is_refused_and_nothing_of_it_happens(tmp_path, kind, protocol):
    marker = tmp_path / "owned.npy"
    contents = pickle.dumps(CACHE | {"extra": exploits(marker)[kind]}, protocol)
    with pytest.raises(
        (pickle.UnpicklingError, TypeError), match=r"names|calls|are not numbers|in an unexpected place"
    ):
        read(contents)
    assert not marker.exists()
    with contextlib.suppress(TypeError):
        pickle.loads(contents)  # a real one: Python's own reader falls for it
    assert marker.exists()


@pytest.mark.parametrize(
    "contents",
    [
        b"cos\nsystem\n(S'touch X'\ntR.",
        b"(S'touch X'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch X'\no.",  # OBJ
        b"cos\nsystem\n(S'touch X'\nt\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x07touch X\x85R.",
        b"\x80\x04(\x8c\x02os\x8c\x06system\x93\x8c\x07touch X\x85}\x92.",  # NEWOBJ_EX
        b"\x82\x01.",  # an extension
        b"Ptouch X\n.",  # a persistent id
        b"cbuiltins\nlist\ncbuiltins\nrange\n(I9\ntR\x85R.",  # what is admitted, called though it is not to be
        b"cnumpy\nndarray\n((I9\nttR.",
        b"cnumpy.core.multiarray\n_reconstruct\n)Rcos\nsystem\nb.",  # BUILD with what is no state
        b"cnumpy\ndtype.__reduce__\n.",  # dotted names
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
    ],
)
def test_instructions_that_call_are_refused(contents):
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        read(contents)


BOMBS = {
    "a memo of one entry, far away": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a number of many digits": b"L" + b"9" * 100_000 + b"L\n.",
    "a number as a key that no message could hold": b"\x80\x02}\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b"Ns.",
    "a frame of 2^60 bytes": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"].",
    "2^62 bytes": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",
    "2^40 bytes": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
    "2^40 bytes of text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
    "2^40 bytes that can be written": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "2 GB of old text": b"T\xff\xff\xff\x7f.",
    "a key nested too deeply to be hashed": b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
    "a list of a range without end": b"cbuiltins\nlist\ncbuiltins\nrange\n(I0\nL200000000L\ntR\x85R.",
    "a range as arguments": b"cbuiltins\nrange\ncbuiltins\nrange\n(L200000000L\ntRR.",
    "a range as a state": b"cnumpy\ndtype\n(S'u1'\ntRcbuiltins\nrange\n(L200000000L\ntRb.",
    "a range as pairs": b"ccollections\nOrderedDict\ncbuiltins\nrange\n(L200000000L\ntR\x85R.",
    "an array larger than its bytes": pickle.dumps(IMAGES, 4).replace(b"K\x06K\x02K\x02K\x03", b"K\xffK\xffK\xffK\xff"),
    "text of a gigabyte a letter": pickle.dumps(np.array(["x"]), 4).replace(b"\x02U1", b"\x0aU999999999"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_or_harmless_at_once_and_in_little_memory(kind):
    largest, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if kind.startswith(("a memo", "a frame")):
        assert read(BOMBS[kind]) == []
    else:
        with pytest.raises((pickle.UnpicklingError, TypeError, ValueError, OverflowError, MemoryError)):
            read(BOMBS[kind])
    assert time.process_time() - since < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < 300 * 1024  # KiB


def test_lists_in_lists_are_not_unfolded(tmp_path):
    bomb = [0] * 10
    for _ in range(12):
        bomb = [bomb] * 10  # ten to the thirteenth numbers in a few hundred bytes
    for cache in (
        CACHE | {"class_dict": {"n01": bomb}},
        {"data": IMAGES, "labels": bomb[:6]},
        CACHE | {"image_data": bomb},
    ):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(cache))
        with pytest.raises(FewShotError, match=r"x\.pkl is not a pickled miniImageNet cache"):
            _read_pickle(tmp_path / "x.pkl")


CACHES = [
    *(pickle.dumps(CACHE, protocol) for protocol in PROTOCOLS),
    *(pickle.dumps({"data": IMAGES, "labels": [0, 1, 0, 1, 2, 2]}, protocol) for protocol in (2, 4)),
    pickle.dumps({"data": IMAGES, "labels": np.array(list("aabbcc"))}),
    pickle.dumps(CACHE | {"class_dict": OrderedDict(n1=range(3), n2=np.array([3, 4]))}, 2),
    pickle.dumps(CACHE, 2).replace(b"numpy._core.", b"numpy.core."),
    *(pickle.dumps(CACHE | {"extra": value}, 2) for value in ([1.5, (None, "é")], Counter(a=1))),
    *(contents for contents in BOMBS.values() if len(contents) < 10_000),
]
PIECES = st.sampled_from([opcode.code.encode("latin1") for opcode in pickletools.opcodes]) | st.sampled_from(
    [
        b"cos\nsystem\n(S'touch owned'\ntR",
        b"\x8c\x08builtins\x8c\x04eval\x93\x8c\x14open('owned','w')   \x85R",
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n(S'u1'\ntR",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy.core.multiarray\nscalar\n",
        b"cnumpy._core.numeric\n_frombuffer\n",
        b"ccollections\nOrderedDict\n",
        b"cbuiltins\nrange\n(I0\nL99999999999L\ntR",
        b"r\xff\xff\xff\x7f",
        b"j\xff\xff\xff\x7f",
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x95" + b"\xff" * 7 + b"\x7f",
        b"U\x0aimage_data",
        b"U\x06labels",
    ]
)
PROGRAMS = (
    st.lists(PIECES | st.binary(max_size=4), max_size=30)
    .map(b"".join)
    .map(lambda program: b"\x80\x02" + program + b".")
)


@pytest.fixture(scope="module")
def cache_file(tmp_path_factory):
    return tmp_path_factory.mktemp("caches") / "mini-imagenet-cache-val.pkl"


@given(contents=damaged(st.sampled_from(CACHES), PIECES) | PROGRAMS)
def test_whatever_a_pickle_holds_it_is_read_or_refused_in_one_line(cache_file, contents):
    cache_file.write_bytes(contents)
    try:
        with nothing_touched():
            images, of_class = _read_pickle(file_at(cache_file))
    except FewShotError as error:
        assert str(error).startswith(f"{cache_file} is not") and len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
        for label, members in of_class.items():
            assert isinstance(label, str | bytes | int | float)
            assert members and all(images[member].size for member in members)
