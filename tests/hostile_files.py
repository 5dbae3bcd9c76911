"""Files of weights that are damaged or hostile, byte by byte: how each is made, and what is said of it."""

import gzip
import pickle
import struct
import zipfile

from checkpoint_files import FULL, MAGIC, Make, header, opcodes, patch_header, patch_of, raw, saved, short, tensor, zipped

SOUND, OPENS = "sound", "opens"
"""An expert that fits its backbone; one that opens and is found not to fit by its shapes."""

LONG = b"X" + struct.pack("<I", 2000) + b"n" * 2000
TUPLES = b"(K\x00t" + b"2\x86" * 200  # a tuple of the last one twice, 200 times: its hash would take 2 ** 200 steps

PATCHED = (  # torch.load would write the text into `ran.patch`: the function gets a name, and what asks for a patch
    b"("
    + short("module")
    + b"ctorch._utils\n_rebuild_parameter\n}"
    + short("dump_patches")
    + b"\x88s}"
    + short("__name__")
    + short("ran")
    + b"s\x86b"
    + short("a")
    + short("text")
    + b"tQ"
)


def old(body: bytes, keys: list[str], storages: bytes = b"") -> Make:
    """A file from before PyTorch 1.6 with the instructions of a pickle, and storages behind it."""
    return raw(MAGIC + pickle.dumps({}, 2) + b"\x80\x02" + body + b"." + pickle.dumps(keys, 2) + storages)


PICKLES: dict[str, tuple[Make, str]] = {
    "a tensor by its instructions": (opcodes(patch_of(tensor())), OPENS),
    "a command of the shell": (opcodes(patch_of(tensor(), b"cposix\nsystem\n(" + short("touch ran") + b"tR0")), OPENS),
    "a command by INST": (opcodes(patch_of(tensor(), b"(" + short("touch ran") + b"iposix\nsystem\n0")), OPENS),
    "a command by STACK_GLOBAL": (
        opcodes(patch_of(tensor(), short("os") + short("system") + b"\x93(" + short("touch ran") + b"tR0"), 4),
        OPENS,
    ),
    "a call of what a call returned": (opcodes(patch_of(tensor(), b"cos\nsystem\n(" + short("a") + b"tR(tR0")), OPENS),
    "a pickle in a pickle": (opcodes(patch_of(tensor(), b"ctorch.storage\n_load_from_bytes\n(" + short("x") + b"tR0")), OPENS),
    "a lazy module of torch": (opcodes(patch_of(tensor(), b"ctorch\n_inductor\n0")), OPENS),
    "attributes set on a function": (
        opcodes(patch_of(tensor(), b"ctorch._utils\n_rebuild_parameter\n}" + short("__defaults__") + b"Nsb0")),
        OPENS,
    ),
    "attributes set on a class": (opcodes(patch_of(tensor(), b"cos\nsystem\n}" + short("__call__") + b"Nsb0")), OPENS),
    "a memo of two thousand million places": (opcodes(patch_of(tensor(), b"Nr\xff\xff\xff\x7f0")), OPENS),
    "a memo place of many digits": (opcodes(patch_of(tensor(), b"Np" + b"9" * 4000 + b"\n0")), OPENS),
    "a number of a million digits": (opcodes(b"L" + b"9" * 10**6 + b"L\n"), "truncated, damaged"),
    "a text longer than the file": (opcodes(b"\x8d" + struct.pack("<Q", 1 << 62), 4), "truncated, damaged"),
    "bytes longer than the file": (opcodes(b"\x8e" + struct.pack("<Q", 1 << 34), 4), "truncated, damaged"),
    "a byte array longer than the file": (opcodes(b"\x96" + struct.pack("<Q", 1 << 34), 5), "registered extensions or buffers"),
    "a frame longer than the file": (opcodes(b"\x95" + struct.pack("<Q", 1 << 62), 4), "truncated, damaged"),
    "a number longer than the file": (opcodes(b"\x8b" + struct.pack("<i", 1 << 30)), "truncated, damaged"),
    "a number of negative length": (opcodes(b"\x8b" + struct.pack("<i", -1)), "truncated, damaged"),
    "a registered extension": (opcodes(b"\x82\x01"), "registered extensions"),
    "a buffer from elsewhere": (opcodes(b"\x97", 5), "registered extensions or buffers"),
    "tuples in tuples as a key": (opcodes(patch_of(tensor(), b"}" + TUPLES + b"Ns0")), OPENS),
    "tuples in tuples in a set": (opcodes(patch_of(tensor(), b"\x8f(" + TUPLES + b"\x900"), 4), OPENS),
    "tuples in tuples in a frozen set": (opcodes(patch_of(tensor(), b"(" + TUPLES + b"\x910"), 4), OPENS),
    "tuples in tuples to make a set of": (opcodes(patch_of(tensor(), b"c__builtin__\nset\n((" + TUPLES + b"ltR0")), OPENS),
    "tuples in tuples as a storage": (opcodes(patch_of(tensor(key=TUPLES))), "a storage without a name"),
    "tuples in tuples as a kind of storage": (opcodes(patch_of(tensor(kind=TUPLES))), "is stored as uint8"),
    "a text that ends in its length": (opcodes(b"X\x01"), "truncated, damaged"),
    "a tensor of a giant stride": (
        opcodes(patch_of(tensor(stride=f"(L{1 << 63}L\nK\x04K\x02K\x01t"))),
        "impossible sizes",
    ),
    "a dictionary in itself": (opcodes(b"}q\x00" + short("a") + b"h\x00s"), "holds no tensors"),
    "a list in itself": (opcodes(b"]q\x00h\x00a"), "holds no tensors"),
    "dictionaries in dictionaries": (opcodes((b"}" + short("a")) * 99 + b"N" + b"s" * 99), "holds no tensors"),
    "names that multiply": (opcodes((b"}" + LONG) * 20 + b"N" + b"s" * 20), "holds no tensors"),
    "a million marks": (opcodes(b"(" * 10**6), "truncated, damaged"),
    "a stack that is empty": (opcodes(b"0000"), "truncated, damaged"),
    "a name that cannot be one": (opcodes(patch_of(tensor(), b"c\xff\xff\n\xfe\n0")), "truncated, damaged"),
    "an unknown instruction": (opcodes(b"\xff"), "truncated, damaged"),
    "protocol 255": (opcodes(b"N", 255), "truncated, damaged"),
    "a tensor beyond its storage": (opcodes(patch_of(tensor(offset=b"K\x01"))), "reaches beyond what is stored"),
    "a tensor of negative offset": (opcodes(patch_of(tensor(offset=b"J\xff\xff\xff\xff"))), "impossible sizes"),
    "a tensor of an offset that is text": (opcodes(patch_of(tensor(offset=short("a")))), "truncated, damaged"),
    "a tensor of few strides": (opcodes(patch_of(tensor(stride="(K\x01t"))), "impossible sizes"),
    "a tensor of a hundred axes": (opcodes(patch_of(tensor("(" + "K\x01" * 100 + "t", "(" + "K\x01" * 100 + "t"))), "impossible"),
    "a tensor of one number many times": (opcodes(patch_of(tensor(stride="(K\x00K\x00K\x00K\x00t"))), "holds no tensors"),
    "a tensor without a storage": (opcodes(patch_of(tensor(key=short("7")))), "truncated, damaged"),
    "a tensor of no storage at all": (opcodes(patch_of(b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR")), "truncated, damaged"),
    "a persistent name of one part": (opcodes(short("a") + b"Q"), "truncated, damaged"),
}

LEGACY: dict[str, tuple[Make, str]] = {
    "an old file": (saved(FULL, legacy=True), SOUND),
    "an old file of another magic": (raw(pickle.dumps({"visual.proj": 1}, 2)), "a pickle that torch.save did not write"),
    "an old file that ends": (raw(MAGIC), "truncated, damaged"),
    "an old file of a big machine": (raw(MAGIC + pickle.dumps({"little_endian": False}, 2) + b"\x80\x02N."), "big-endian"),
    "an old file of storages that are not there": (old(patch_of(tensor()), ["0"]), "reaches beyond"),
    "an old file of storages that it lacks": (old(patch_of(tensor()), []), "truncated, damaged"),
    "an old file of a giant storage": (old(patch_of(tensor()), ["0"], b"\xff" * 60), "beyond"),
    "an old file of unknown storages": (old(b"}", ["0"]), "truncated, damaged"),
    "an old file of tuples in tuples as storages": (
        raw(MAGIC + pickle.dumps({}, 2) + b"\x80\x02}.\x80\x02(" + TUPLES + b"l."),
        "a storage without a name",
    ),
    "a module with its source": (old(PATCHED, []), "holds no tensors"),
}

ARCHIVES: dict[str, tuple[Make, str]] = {
    "compressed": (raw(zipped(b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED)), "its records are compressed"),
    "a bomb": (raw(zipped(b"\x80\x02" + b"]" * 10**7, compression=zipfile.ZIP_DEFLATED)), "its records are compressed"),
    "twenty megabytes of objects": (raw(zipped(b"\x80\x02" + b"N" * (20 << 20) + b".")), "too much to be read safely"),
    "no pickle": (raw(zipped(b"").replace(b"data.pkl", b"data.txt")), "without data.pkl"),
    "an empty pickle": (raw(zipped(b"")), "truncated, damaged"),
    "one name twice": (raw(zipped(b"\x80\x02N.", ("x/data.pkm", b"")).replace(b"data.pkm", b"data.pkl")), "several records"),
    "a name outside": (raw(zipped(b"\x80\x02" + patch_of(tensor()) + b".", ("../../ran", b"x"))), OPENS),
    "big-endian": (raw(zipped(b"\x80\x02N.", ("x/byteorder", b"big"))), "big-endian"),
    "a storage that is short": (raw(zipped(b"\x80\x02" + patch_of(tensor()) + b".", patch=b"1234")), "reaches beyond"),
    "an archive cut in two": (raw(zipped(b"\x80\x02N.")[:60]), "not a zip file"),
    "a wrong checksum": (raw(zipped(b"\x80\x02" + short("marked") + b".").replace(b"marked", b"masked", 1)), "Bad CRC-32"),
    "numpy's archive": (raw(zipped(b"").replace(b"x/data.pkl", b"x/arr0.npy")), "without data.pkl"),
    "gzip": (raw(gzip.compress(b"weights")), "neither safetensors nor saved by torch.save"),
    "a tar": (raw(b"pickle\0" + b"\0" * 600), "neither safetensors nor"),
    "HDF5": (raw(b"\x89HDF\r\n\x1a\n" + b"\0" * 60, "tf_model.h5"), "from_tf=True"),
    "an empty file": (raw(b""), "neither safetensors nor"),
    "a web page": (raw(b"<!DOCTYPE html><html>Not found"), "neither safetensors nor"),
}

_UNREADABLE = "not a safetensors file ("  # and the reason, which versions of the library word differently
SAFETENSORS: dict[str, tuple[Make, str]] = {
    "a sound header": (header(patch_header(), b"\0" * 48), OPENS),
    "a name of a megabyte": (
        header({"a." * 500_000: patch_header()["visual.conv1.weight"]}, b"\0" * 48),
        "more than 1000 characters",
    ),
    "no tensors": (header({}), "holds no tensors"),
    "a giant header": (header(b"{", length=1 << 62), _UNREADABLE),
    "brackets without end": (header(b'{"a":' * 50_000), _UNREADABLE),
    "tensors over each other": (
        header({**patch_header(), "b": patch_header()["visual.conv1.weight"]}, b"\0" * 48),
        _UNREADABLE,
    ),
    "a hole": (header(patch_header(span=(4, 52)), b"\0" * 52), _UNREADABLE),
    "more than is told": (header(patch_header(), b"\0" * 60), _UNREADABLE),
    "less than is told": (header(patch_header()), _UNREADABLE),
    "sizes that overflow": (header(patch_header(shape=(1 << 32, 3, 1 << 32, 1), span=(0, 0))), _UNREADABLE),
    "a negative size": (header(patch_header(shape=(-1, 3, 2, 2)), b"\0" * 48), _UNREADABLE),
    "an unknown dtype": (header(patch_header("Q4"), b"\0" * 48), _UNREADABLE),
    "float8": (header(patch_header("F8_E5M2", span=(0, 12)), b"\0" * 12), "stored as float8_e5m2, which weights are not"),
    "integers": (header(patch_header("I32"), b"\0" * 48), "stored as int32, which weights are not"),
    "a pointer of Git LFS": (raw(b"version https://git-lfs.github.com/spec/v1\n", "x.safetensors"), "git lfs pull"),
}
