"""Folders that hold no usable model: told by their files, before anything is loaded."""

import json
import re
import shutil

import pytest

from kdtrain.config.model_folder import findings, require_sound
from kdtrain.errors import PreflightError
from tests import tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 118024\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A model folder, and the same in shards."""
    root = tmp_path_factory.mktemp("saved")
    tiny.save_model(tiny.make_qwen3(seed=1), tokenizer, root / "model")
    tiny.make_qwen3(seed=1).save_pretrained(root / "shards", max_shard_size="50KB")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "model", tmp_path / "model")


@pytest.fixture
def shards(saved, tmp_path):
    return shutil.copytree(saved / "shards", tmp_path / "shards")


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN = {
    "weights cut short": (
        lambda f: truncate(f / "model.safetensors", 50_000),
        r"model\.safetensors is cut short: it has 50,000 bytes of 118,\d\d\d",
    ),
    "weights cut in the header": (lambda f: truncate(f / "model.safetensors", 300), r"is cut short: it has 300 bytes"),
    "weights cut in the first bytes": (lambda f: truncate(f / "model.safetensors", 5), "is not a safetensors file"),
    "an error page for weights": (
        lambda f: (f / "model.safetensors").write_text("\n<html>404: not found</html>"),
        "is a web page in place of the file",
    ),
    "zero bytes for weights": (
        lambda f: (f / "model.safetensors").write_bytes(bytes(118_024)),
        r"model\.safetensors holds zero bytes: .*never wrote it",
    ),
    "more than weights": (
        lambda f: (f / "model.safetensors").open("ab").write(b"more"),
        r"model\.safetensors has 118,\d+ bytes, and its header speaks of 118,",
    ),
    "empty weights": (lambda f: truncate(f / "model.safetensors", 0), r"model\.safetensors is empty"),
    "a pointer for weights": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a git-LFS pointer in place of the file.*git lfs pull",
    ),
    "a pointer for the tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        r"tokenizer\.json is a git-LFS pointer",
    ),
    "half a config": (lambda f: truncate(f / "config.json", 40), r"config\.json is not valid JSON \(line \d\)"),
    "a list for a config": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json holds no map"),
    "a config that is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "an empty tokenizer config": (
        lambda f: truncate(f / "tokenizer_config.json", 0),
        r"tokenizer_config.json is empty",
    ),
    "an adapter beside the weights": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        r"an adapter \(adapter_config\.json\) lies beside the weights.*For the weights alone.*for both, merge",
    ),
    "padding beyond the embedding": (
        lambda f: change_config(f, pad_token_id=99999),
        r"pad_token_id 99999, beyond the 320 rows",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_a_model_folder_is_named_with_what_it_is(folder, name):
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises(PreflightError, match=message):
        require_sound(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), r"model-00002-of-00003\S+ is missing, and model"),
        (lambda f: truncate(f / "model-00003-of-00003.safetensors", 1000), r"model-00003\S+ is cut short"),
        (lambda f: truncate(f / "model.safetensors.index.json", 30), r"index\.json is not valid JSON"),
    ],
)
def test_a_broken_shard_or_index_is_named(shards, change, message):
    change(shards)
    with pytest.raises(PreflightError, match=message):
        require_sound(shards)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\), and optimum and gptqmodel are not installed"),
        ({"quant_method": "awq"}, "gptqmodel is not installed"),
        ({"load_in_4bit": True}, r"quantised \(bitsandbytes\), and bitsandbytes is not installed"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors is not installed"),
        ({"quant_method": "hqq"}, "hqq is not installed"),
    ],
)
@pytest.mark.parametrize("where", ["text", "vision"])
def test_a_quantised_folder_without_its_package_names_the_package(folder, monkeypatch, options, message, where):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = {"quantization_config": options}
    change_config(folder, **(config if where == "text" else {"text_config": config}))
    assert re.search(message, next(findings(folder)).message)


def test_sound_folders_and_hub_ids_are_let_through(saved, tmp_path):
    assert list(findings(saved / "model")) == []
    assert list(findings(saved / "shards")) == []
    require_sound(tmp_path / "nobody" / "nothing")
