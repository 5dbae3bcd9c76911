"""Checkpoints from anyone: an expert, or an ``InputError`` that names the file, and nothing else.

A case is how the file is made, and what its message says; ``SOUND`` where it is an expert that fits its backbone, ``OPENS`` where it
opens and is found not to fit by its shapes.
"""

import gzip
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    BASE,
    MAGIC,
    TEXT,
    WIDTH,
    Make,
    adapter,
    clip_lora,
    directory,
    header,
    huggingface,
    lora,
    named,
    opcodes,
    patch_header,
    patch_of,
    raw,
    saved,
    short,
    tensor,
    zipped,
)

from mergekit_vision.checkpoints import ExpertSource, open_expert
from mergekit_vision.errors import InputError
from mergekit_vision.suites.checks import expert_faults

SOUND, OPENS = "sound", "opens"
SHAPES = {key: tuple(value.shape) for key, value in BASE.items()}
Q = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj"
FULL = {**named("visual."), **TEXT}
HEAD = {"classification_head.weight": torch.zeros(2, 2)}
LONG = b"X" + struct.pack("<I", 2000) + b"n" * 2000
TUPLES = b"(K\x00t" + b"2\x86" * 200  # a tuple of the last one twice, 200 times: its hash would take 2 ** 200 steps

PICKLES: dict[str, tuple[Make, str]] = {
    "a tensor by its instructions": (opcodes(patch_of(tensor())), OPENS),
    "a command of the shell": (opcodes(patch_of(tensor(), b"cposix\nsystem\n(" + short("touch ran") + b"tR0")), OPENS),
    "a command by INST": (opcodes(patch_of(tensor(), b"(" + short("touch ran") + b"iposix\nsystem\n0")), OPENS),
    "a command by STACK_GLOBAL": (
        opcodes(patch_of(tensor(), short("os") + short("system") + b"\x93(" + short("touch ran") + b"tR0"), 4), OPENS),
    "a call of what a call returned": (opcodes(patch_of(tensor(), b"cos\nsystem\n(" + short("a") + b"tR(tR0")), OPENS),
    "a pickle in a pickle": (opcodes(patch_of(tensor(), b"ctorch.storage\n_load_from_bytes\n(" + short("x") + b"tR0")), OPENS),
    "a lazy module of torch": (opcodes(patch_of(tensor(), b"ctorch\n_inductor\n0")), OPENS),
    "attributes set on a function": (opcodes(patch_of(tensor(), b"ctorch._utils\n_rebuild_parameter\n}" + short("__defaults__") + b"Nsb0")), OPENS),
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
    "a dictionary in itself": (opcodes(b"}q\x00" + short("a") + b"h\x00s"), "holds no tensors"),
    "a list in itself": (opcodes(b"]q\x00h\x00a"), "holds no tensors"),
    "dictionaries in dictionaries": (opcodes((b"}" + short("a")) * 99 + b"N" + b"s" * 99), "nested too deeply"),
    "names that multiply": (opcodes((b"}" + LONG) * 20 + b"N" + b"s" * 20), "names are too long"),
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
}  # fmt: skip

LEGACY: dict[str, tuple[Make, str]] = {
    "an old file": (saved(FULL, legacy=True), SOUND),
    "an old file of another magic": (raw(pickle.dumps({"visual.proj": 1}, 2)), "a pickle that torch.save did not write"),
    "an old file that ends": (raw(MAGIC), "truncated, damaged"),
    "an old file of a big machine": (raw(MAGIC + pickle.dumps({"little_endian": False}, 2) + b"\x80\x02N."), "big-endian"),
    "an old file of storages that are not there": (
        raw(MAGIC + pickle.dumps({}, 2) + b"\x80\x02" + patch_of(tensor()) + b"." + pickle.dumps(["0"], 2)), "reaches beyond"),
    "an old file of storages that it lacks": (
        raw(MAGIC + pickle.dumps({}, 2) + b"\x80\x02" + patch_of(tensor()) + b"." + pickle.dumps([], 2)), "truncated, damaged"),
    "an old file of a giant storage": (
        raw(MAGIC + pickle.dumps({}, 2) + b"\x80\x02" + patch_of(tensor()) + b"." + pickle.dumps(["0"], 2) + b"\xff" * 60), "beyond"),
    "an old file of unknown storages": (
        raw(MAGIC + pickle.dumps({}, 2) + b"\x80\x02}." + pickle.dumps(["0"], 2)), "truncated, damaged"),
    "a module with its source": (  # torch.load would write a file `ran.patch` of the pickle's own text
        raw(MAGIC + pickle.dumps({}, 2) + b"\x80\x02(" + short("module") + b"ctorch._utils\n_rebuild_parameter\n}" + short("dump_patches")
            + b"\x88s}" + short("__name__") + short("ran") + b"s\x86b" + short("a") + short("text") + b"tQ." + pickle.dumps([], 2)),
        "holds no tensors"),
}  # fmt: skip

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
}  # fmt: skip

SAFETENSORS: dict[str, tuple[Make, str]] = {
    "a sound header": (header(patch_header(), b"\0" * 48), OPENS),
    "no tensors": (header({}), "holds no tensors"),
    "a giant header": (header(b"{", length=1 << 62), "header too large"),
    "brackets without end": (header(b'{"a":' * 50_000), "recursion limit"),
    "tensors over each other": (
        header({**patch_header(), "b": patch_header()["visual.conv1.weight"]}, b"\0" * 48),
        "invalid offset",
    ),
    "a hole": (header(patch_header(span=(4, 52)), b"\0" * 52), "invalid offset"),
    "more than is told": (header(patch_header(), b"\0" * 60), "not fully covered"),
    "less than is told": (header(patch_header()), "not fully covered"),
    "sizes that overflow": (header(patch_header(shape=(1 << 32, 3, 1 << 32, 1), span=(0, 0))), "overflow"),
    "a negative size": (header(patch_header(shape=(-1, 3, 2, 2)), b"\0" * 48), "invalid value"),
    "an unknown dtype": (header(patch_header("Q4"), b"\0" * 48), "unknown variant"),
    "float8": (header(patch_header("F8_E5M2", span=(0, 12)), b"\0" * 12), "stored as float8_e5m2, which weights are not"),
    "integers": (header(patch_header("I32"), b"\0" * 48), "stored as int32, which weights are not"),
    "a pointer of Git LFS": (raw(b"version https://git-lfs.github.com/spec/v1\n", "x.safetensors"), "git lfs pull"),
}

LAYOUTS: dict[str, tuple[Make, str]] = {
    "OpenAI's state dictionary in float16": (
        saved({key: value.half() for key, value in FULL.items()} | {"input_resolution": torch.tensor(16), "vocab_size": torch.tensor(50)}),
        SOUND),
    "text apart": (saved(named("visual.") | named("text.", TEXT)), SOUND),
    "a text tower as wide, alone": (saved(TEXT), "no patch embedding"),
    "both towers without a prefix": (saved({**TEXT, **named("")}), "has unknown visual.text_projection"),
    "CoCa": (saved({**FULL, "visual.attn_pool.query": torch.zeros(2, 2)}), "has unknown visual.attn_pool.query"),
    "timm": (saved({"visual.trunk.patch_embed.proj.weight": torch.zeros(4, 3, 2, 2)}), "a tower of timm"),
    "a ResNet": (saved({"visual.conv1.weight": torch.zeros(4, 3, 3, 3), "visual.layer1.0.bn1.weight": torch.zeros(4)}), "a ResNet"),
    "Lightning with two models": (saved({"state_dict": named("student.") | named("teacher.")}), "holds 2 vision towers"),
    "one of two models": (saved({"state_dict": named("student.") | named("teacher.")}, key="state_dict.student"), SOUND),
    "FSDP and compile in the middle": (
        saved({key.replace(".1.", ".1._fsdp_wrapped_module._orig_mod."): value for key, value in named("module.visual.").items()}), SOUND),
    "averaged weights alone": (saved({"ema_model": named("module.visual."), "step": 3}), SOUND),
    "AveragedModel": (saved({**named("module.visual."), "n_averaged": torch.tensor(3)}), SOUND),
    "TALL": (saved({**named("model.visual."), "model.logit_scale": torch.tensor(1.0), "model_name": "ViT-B-32"}), SOUND),
    "linearized": (saved({"model.params.0": torch.zeros(2), "model.params0.0": torch.zeros(2)}), "a linearized model"),
    "a head": (saved(HEAD), "holds a classification head"),
    "a head beside a tower": (saved({**named("image_encoder.visual."), **HEAD}), SOUND),
    "a temperature alone": (saved({"logit_scale": torch.tensor(1.0)}), "no patch embedding"),
    "a part of a text tower": (saved({"text_model.final_layer_norm.weight": torch.zeros(2)}), "no patch embedding"),
    "one tensor": (saved(torch.zeros(3)), "a single tensor without a name"),
    "a list": (saved([named("visual.")]), "holds no tensors"),
    "a scalar for a matrix": (saved({**FULL, "visual.proj": torch.tensor(1.0)}), "visual.proj is ()"),
    "expanded": (saved({**FULL, "visual.proj": torch.zeros(1).expand(WIDTH, 24)}), "visual.proj is not a plain tensor"),
    "integers": (saved({**FULL, "visual.proj": torch.zeros(WIDTH, 24, dtype=torch.int64)}), "stored as int64"),
    "a delta without the patch embedding": (saved({"visual.proj": torch.zeros(WIDTH, 24)}, kind="delta"), SOUND),
    "a delta of two towers": (saved({"a.visual.proj": torch.zeros(2), "b.visual.proj": torch.zeros(2)}, kind="delta"), "holds 2"),
    "a delta of nothing": (saved({"weights": torch.zeros(2)}, kind="delta"), "holds"),
    "transformers": (saved(huggingface() | named("text_model.", {"embeddings.position_ids": torch.arange(12)})), SOUND),
    "transformers with position_ids": (saved(huggingface() | {"vision_model.embeddings.position_ids": torch.arange(5)}), SOUND),
    "transformers without a prefix": (saved(huggingface("", None)), SOUND),
    "a dual encoder": (saved(huggingface("vision_model.vision_model.")), SOUND),
    "transformers for classes": (saved(huggingface("model.vision_model.") | {"model.classifier.weight": torch.zeros(2)}), "ForImageClass"),
    "transformers without a third of attention": (
        saved({key: value for key, value in huggingface().items() if "0.self_attn.k_proj.bias" not in key}), "not query, key and value"),
    "one parameter by two names": (
        saved(huggingface() | {"vision_model.pre_layernorm.bias": torch.zeros(WIDTH)}), "one parameter stored twice"),
}  # fmt: skip

DIRECTORIES: dict[str, tuple[Make, str]] = {
    "a usual one": (directory({"model.safetensors": huggingface(), "config.json": {"model_type": "clip", "vision_config": None}}), SOUND),
    "weights of two libraries": (directory({"pytorch_model.bin": {}, "model.safetensors": huggingface()}), SOUND),
    "an index of pickles": (
        directory({"a.bin": huggingface(), "pytorch_model.bin.index.json": {"weight_map": dict.fromkeys(huggingface(), "a.bin")}}), SOUND),
    "an index of itself": (
        directory({"model.safetensors.index.json": {"weight_map": {"a": "model.safetensors.index.json"}}}), "not one of weights beside it"),
    "an index of files above": (directory({"model.safetensors.index.json": {"weight_map": {"a": "../x"}}}), "not one of weights beside it"),
    "an index of the directory above": (directory({"model.safetensors.index.json": {"weight_map": {"a": ".."}}}), "not a file of weights"),
    "an index of NUL": (directory({"model.safetensors.index.json": {"weight_map": {"a": "a\0"}}}), "null byte"),
    "an index of numbers": (directory({"model.safetensors.index.json": {"weight_map": {"a": 1}}}), "no `weight_map`"),
    "an index of nothing": (directory({"model.safetensors.index.json": {"weight_map": {}}}), "holds no tensors"),
    "an index that is a list": (directory({"model.safetensors.index.json": []}), "holds a list, not a JSON object"),
    "an index without end": (directory({"model.safetensors.index.json": b"[" * 10**5}), "not readable JSON"),
    "an index of a missing file": (directory({"model.safetensors.index.json": {"weight_map": {"a": "b.bin"}}}), "cannot be read"),
    "an index of tensors that are not there": (
        directory({"a.bin": {}, "pytorch_model.bin.index.json": {"weight_map": {"visual.proj": "a.bin"}}}), "lacks visual.proj"),
    "two files": (directory({"a.pt": FULL, "b.pt": FULL}), "several files may hold the weights"),
    "another model": (directory({"model.safetensors": huggingface(), "config.json": {"model_type": "siglip"}}), "not of CLIP"),
    "a list as vision_config": (
        directory({"model.safetensors": huggingface(), "config.json": {"model_type": "clip", "vision_config": [1]}}), "must be an object"),
    "a configuration that is damaged": (directory({"model.safetensors": huggingface(), "config.json": b"{"}), "not readable JSON"),
    "DeepSpeed": (directory({"mp_rank_00_model_states.pt": FULL}), "zero_to_fp32.py"),
    "nothing": (directory({}), "no weights in this directory"),
}  # fmt: skip

ADAPTERS: dict[str, tuple[Make, str]] = {
    "a usual one": (adapter(lora(Q)), SOUND),
    "in a pickle": (
        directory({"adapter_model.bin": lora(Q), "adapter_config.json": {"peft_type": "LORA", "r": 2, "lora_alpha": 1}}), SOUND),
    "names by pattern": (adapter(lora(Q, 3), rank_pattern={"vision_model.encoder.layers.0.self_attn.q_proj": 3}), SOUND),
    "an expression as a pattern": (adapter(lora(Q), rank_pattern={"(a+)+$": 3}), "only names of layers"),
    "layers of another model": (adapter(lora("base_model.model.bert.encoder.layer.0.query")), "not a Linear layer of CLIP's"),
    "the text tower": (adapter(lora(Q.replace("vision", "text"))), "adapts the text tower"),
    "two adapters": (adapter(lora(Q, adapter=".a") | lora(Q, adapter=".b")), "holds 2 adapters (a, b)"),
    "half a pair": (adapter({f"{Q}.lora_A.weight": torch.ones(2, WIDTH)}), "lacks lora_A or lora_B"),
    "factors of two ranks": (adapter(lora(Q) | {f"{Q}.lora_A.weight": torch.ones(3, WIDTH)}, r=3), "are not two factors"),
    "factors of another width": (adapter(lora(Q, out=7)), "has other shapes than the backbone"),
    "another rank": (adapter(lora(Q), r=7), "gives vision_model.encoder.layers.0.self_attn.q_proj the rank 7"),
    "a rank as text": (adapter(lora(Q), r="2"), "the rank '2', but its matrices have 2"),
    "a giant alpha": (adapter(lora(Q), lora_alpha=10**400), "lora_alpha must be a number"),
    "an alpha that is none": (adapter(lora(Q), lora_alpha=float("nan")), "lora_alpha must be a number, not nan"),
    "a switch as text": (adapter(lora(Q), use_rslora="false"), "use_rslora must be true or false"),
    "DoRA without magnitudes": (adapter(lora(Q), use_dora=True), "lacks its lora_magnitude_vector"),
    "DoRA with few magnitudes": (
        adapter(lora(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(3)}, use_dora=True), "does not have a number for each of 32 rows"),
    "DoRA": (adapter(lora(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(WIDTH)}, use_dora=True), SOUND),
    "magnitudes alone": (adapter({f"{Q}.lora_magnitude_vector": torch.ones(WIDTH)}), "has no LoRA matrices"),
    "PiSSA": (adapter(lora(Q), init_lora_weights="pissa_niter_4"), "changes the weights that the adapter is added to"),
    "IA3": (adapter(lora(Q), peft_type="IA3"), "of the kind IA3"),
    "weights beside it that nobody knows": (adapter({**lora(Q), "base_model.model.classifier.bias": torch.ones(2)}), "no parameter of CLIP"),
    "no configuration": (directory({"x.safetensors": lora(Q)}), "without adapter_config.json"),
    "a configuration that is a list": (directory({"adapter_model.safetensors": lora(Q), "adapter_config.json": []}), "not a JSON object"),
    "a model around an adapter": (
        saved(
            {**huggingface("vision_model.base_model.model.", None), "vision_head.weight": torch.zeros(2, 24)}
            | lora("vision_model.base_model.model.encoder.layers.1.mlp.fc2", adapter=".default", out=WIDTH)
            | {"vision_model.base_model.model.encoder.layers.1.mlp.fc2.lora_A.default.weight": torch.ones(2, 4 * WIDTH)}, scale=1.0),
        SOUND),
    "CLIP-LoRA": (clip_lora(2), SOUND),
    "CLIP-LoRA of both encoders": (clip_lora(encoder="both"), "encoder 'both'"),
    "CLIP-LoRA of some blocks": (clip_lora(position="top3"), "position 'top3'"),
    "CLIP-LoRA of more blocks": (clip_lora(5), "has unknown visual.transformer.resblocks.2"),
    "CLIP-LoRA of another rank": (clip_lora(r=7), "metadata give the rank 7"),
    "CLIP-LoRA of other layers": (clip_lora(params=["q", "k", "v"]), "name the layers q, k, v, and it holds q, v"),
    "CLIP-LoRA of alpha NaN": (clip_lora(alpha=float("nan")), "lack `r` or `alpha`"),
    "CLIP-LoRA of the MLP": (clip_lora(parts=("q_proj", "c_fc")), "not all of its tensors are factors"),
}  # fmt: skip

GROUPS = {"pickle": PICKLES, "legacy": LEGACY, "archive": ARCHIVES, "safetensors": SAFETENSORS, "layout": LAYOUTS,
          "directory": DIRECTORIES, "adapter": ADAPTERS}  # fmt: skip
CASES = [pytest.param(*case, id=f"{group}: {name}") for group, cases in GROUPS.items() for name, case in cases.items()]


def outcome(source: ExpertSource) -> str:
    """What is found of a checkpoint: by opening it, beside a backbone, and when all weights are read."""
    try:
        expert = open_expert(source)
    except InputError as error:
        return str(error)
    if faults := expert_faults(expert, str(expert.path), SHAPES):
        return "; ".join(faults)
    weights = expert.on(BASE)
    assert {key: tuple(weights[key].shape) for key in BASE} == SHAPES
    return SOUND


@pytest.mark.parametrize(("make", "expected"), CASES)
def test_a_checkpoint_is_an_expert_or_is_refused(
    tmp_path: Path, make: Make, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make(tmp_path)
    before = set(tmp_path.iterdir())
    found = outcome(made if isinstance(made, ExpertSource) else ExpertSource(made))
    assert "lacks visual." in found if expected == OPENS else expected in found
    assert found == SOUND or found.startswith(str(tmp_path))
    assert len(found) < 1500
    assert set(tmp_path.iterdir()) == before, "a hostile file wrote one of its own"
