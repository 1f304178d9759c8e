"""To transformers and back: equal logits, equal bytes, one tensor in memory at a time."""

from __future__ import annotations

import filecmp
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import full
from parity import quiet
from ranks import errors_of_ranks, run_ranks
from safetensors.torch import load_file, save_file
from test_checkpoint_damage import forge
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.__main__ import main
from mics.models.building import build, load_config, task_of
from mics.models.interchange.exporting import export
from mics.models.interchange.importing import import_folder
from mics.models.interchange.weights import load_weights

KINDS = ["bert-tiny", "roberta-tiny", "gpt2-tiny", "llama-tiny"]
pytestmark = pytest.mark.filterwarnings(
    # transformers' models return views, of which FSDP2 warns; nothing edits an output in place
    "ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"
)


def silent(what: str, done: int, total: int) -> None:
    pass


def _train_and_save(root: Path, kind: str) -> torch.Tensor:
    config = load_config(kind, vocabulary=96, separator=0)
    model: Any = build(config)
    torch.manual_seed(0)
    quiet(lambda: mics.shard(model, partition=2, gpus_per_node=2, mp_policy=MixedPrecisionPolicy()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    for batch in mics.micro_steps(model, [ids]):
        logits = model(input_ids=batch).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    assets = {"model/config.json": config.to_json_string(use_diff=False).encode()}
    mics.save(root / kind, model=model, optimizer=optimizer, assets=assets)
    with torch.no_grad():
        return full(model.eval()(input_ids=ids).logits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of each kind, trained for a step on 4 ranks, and its logits there."""
    root = tmp_path_factory.mktemp("trained")
    return root, {kind: run_ranks(_train_and_save, 4, root, kind)[0] for kind in KINDS}


def plain(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    masked = task_of(config) == "masked"
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_gives_the_logits_of_the_model_that_was_trained(
    kind: str, trained: Any, tmp_path: Path
) -> None:
    root, logits = trained
    export(root / kind, tmp_path / "out", dtype=None, shard_bytes=10**9, told=silent)
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(plain(tmp_path / "out")(input_ids=ids).logits, logits[kind])


def test_check_compares_the_logits_and_says_so(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained[0] / "gpt2-tiny")
    assert main(["export", checkpoint, str(tmp_path / "a"), "--check"]) == 0
    assert "logits of transformers and of the checkpoint: equal" in capsys.readouterr().out
    assert main(["export", checkpoint, str(tmp_path / "b"), "--check", "--dtype", "bf16"]) == 0
    difference = re.search(r"differ by at most ([\d.e-]+)", capsys.readouterr().out)
    assert difference is not None
    assert 0 < float(difference[1]) < 0.1
    assert next(iter(load_file(tmp_path / "b" / "model.safetensors").values())).dtype is (
        torch.bfloat16
    )


def test_the_exported_configuration_names_the_dtype_of_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the one that the model once had: transformers would round the weights to that."""
    checkpoint = tmp_path / "checkpoint"
    config = load_config("llama-tiny", vocabulary=96, separator=0)
    text = json.loads(config.to_json_string(use_diff=False)) | {"dtype": "bfloat16"}
    for old in ({}, {"torch_dtype": "bfloat16"}):
        asset = {"model/config.json": json.dumps(text | old).encode()}
        torch.manual_seed(0)
        mics.save(checkpoint, model=build(config, device="cpu"), assets=asset)
        assert main(["export", str(checkpoint), str(tmp_path / "out"), "--check"]) == 0
        assert "equal" in capsys.readouterr().out
        assert plain(tmp_path / "out").dtype == torch.float32
        shutil.rmtree(checkpoint)
        shutil.rmtree(tmp_path / "out")


def test_check_fails_when_logits_differ(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mics.models.interchange import comparing

    def other_weights(folder: Path, dtype: Any) -> Any:
        model = plain(folder)
        nn.init.normal_(model.transformer.wte.weight)
        return model

    monkeypatch.setattr(comparing, "_load_plain", other_weights)
    words = ["export", str(trained[0] / "gpt2-tiny"), str(tmp_path / "a"), "--check"]
    assert main(words) == 1


def test_several_files_and_their_index_load_as_one(trained: Any, tmp_path: Path) -> None:
    root, logits = trained
    done = export(root / "llama-tiny", tmp_path / "o", dtype=None, shard_bytes=10**6, told=silent)
    files = [name for name in done.files if name.endswith(".safetensors")]
    assert len(files) == 4
    assert all((tmp_path / "o" / name).stat().st_size < 1.1e6 for name in files)
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(plain(tmp_path / "o")(input_ids=ids).logits, logits["llama-tiny"])


@pytest.mark.parametrize("kind", ["bert-tiny", "gpt2-tiny", "llama-tiny"])
def test_import_then_export_is_the_identity(kind: str, tmp_path: Path) -> None:
    """From a folder that transformers wrote: the same tensors, names, dtypes, configuration."""
    config = load_config(kind, vocabulary=96, separator=0)
    build(config, device="cpu").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    done = import_folder(tmp_path / "theirs", tmp_path / "ours", dtype=None, told=silent)
    assert done.unused == done.code == done.not_finite == []
    export(tmp_path / "ours", tmp_path / "back", dtype=None, shard_bytes=10**9, told=silent)
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype is tensor.dtype
        assert torch.equal(after[name], tensor)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "back")]
    assert configs[0] == configs[1]


def test_export_then_import_then_export_gives_the_same_files(trained: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export(trained[0] / "gpt2-tiny", first, dtype=None, shard_bytes=10**9, told=silent)
    import_folder(first, tmp_path / "ours", dtype=None, told=silent)
    export(tmp_path / "ours", second, dtype=None, shard_bytes=10**9, told=silent)
    names = sorted(file.name for file in first.iterdir())
    assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])


PEAK = """
import json, re, sys, torch
from pathlib import Path
import mics
from mics.models.interchange.exporting import export
from mics.models.interchange.importing import import_folder

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\\s+(\\d+)", status)[0]) * 1024

seen = []
def told(*_):
    seen.append(peak())

root, what = Path(sys.argv[1]), sys.argv[2]
export(root / "small", root / "warm", dtype=None, shard_bytes=10**10, told=told)
import_folder(root / "warm", root / "warm2", dtype=None, told=told)
seen.clear()
before = peak()
if what == "export":
    export(root / "large", root / "out", dtype=None, shard_bytes=10**10, told=told)
else:
    import_folder(root / "theirs", root / "out", dtype=None, told=told)
print(json.dumps(max(seen) - before))
"""


def _llama(layers: int) -> Any:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers}
    return transformers.LlamaConfig(**sizes, num_attention_heads=8, vocab_size=64)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["export", "import"])
@pytest.mark.extra
def test_no_more_than_one_tensor_is_in_memory(what: str, tmp_path: Path) -> None:
    for name, layers in [("small", 1), ("large", 12)]:  # 12 layers: 201 MB, largest tensor 4 MB
        config = _llama(layers)
        model = build(config, device="cpu")
        assets = {"model/config.json": config.to_json_string(use_diff=False).encode()}
        mics.save(tmp_path / name, model=model, assets=assets)
    model.save_pretrained(tmp_path / "theirs")
    largest = max(p.nbytes for p in model.parameters())
    whole = sum(p.nbytes for p in model.parameters())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), what],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout.splitlines()[-1])
    print(f"{taken / 2**20:.1f} MiB above the start, largest tensor {largest / 2**20:.1f} MiB")
    assert taken < 2.5 * largest < whole / 10  # the tensor and the slice it is read from


# -- pretrained weights ----------------------------------------------------------------------------


def _load_pretrained(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    model: Any = build(load_config(kind, vocabulary=96, separator=0))
    quiet(lambda: mics.shard(model, partition=4, gpus_per_node=2, mp_policy=MixedPrecisionPolicy()))
    load_weights(model, folder)
    return {name: full(value) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["bert-tiny", "gpt2-tiny"])
def test_pretrained_weights_fill_a_sharded_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    config = load_config(kind, vocabulary=96, separator=0)
    theirs = build(config, device="cpu")
    theirs.save_pretrained(tmp_path / "t", max_shard_size="1MB")
    assert (tmp_path / "t" / "model.safetensors.index.json").exists()
    wanted = theirs.state_dict()
    for loaded in run_ranks(_load_pretrained, 4, tmp_path / "t", kind):
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    theirs = build(load_config("gpt2-tiny", vocabulary=96, separator=0), device="cpu")
    theirs.transformer.save_pretrained(tmp_path / "bare")  # type: ignore[union-attr, operator]
    ours = build(load_config("gpt2-tiny", vocabulary=96, separator=0), device="cpu")
    load_weights(ours, tmp_path / "bare")
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)  # type: ignore[union-attr]


def test_weights_of_another_dtype_are_converted(tmp_path: Path) -> None:
    theirs = build(load_config("llama-tiny", vocabulary=96, separator=0), device="cpu")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "t")  # type: ignore[operator]
    ours = build(load_config("llama-tiny", vocabulary=96, separator=0), device="cpu")
    load_weights(ours, tmp_path / "t")
    for name, value in ours.state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(value, theirs.state_dict()[name].float())


def test_tensors_without_a_place_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(load_config("gpt2-tiny", vocabulary=96, separator=0), device="cpu")
    model.save_pretrained(tmp_path / "t")  # type: ignore[operator]
    tensors = load_file(tmp_path / "t" / "model.safetensors")
    save_file(tensors | {"pooler.bias": torch.ones(2)}, tmp_path / "t" / "model.safetensors")
    load_weights(model, tmp_path / "t")
    assert "1 tensor(s) of" in (said := capsys.readouterr().err)
    assert "have no place in the model (pooler.bias)" in said


# -- what is refused -------------------------------------------------------------------------------


def _load_into(folder: Path, kind: str) -> None:
    _load_pretrained(folder, kind)


def test_weights_of_another_model_are_refused_with_counts_and_names(tmp_path: Path) -> None:
    model = build(load_config("gpt2-tiny", vocabulary=96, separator=0), device="cpu")
    model.save_pretrained(tmp_path / "t")  # type: ignore[operator]
    for text in errors_of_ranks(_load_into, 4, tmp_path / "t", "llama-tiny"):
        assert "is of another model: parameters are missing" in text
        assert "39 of 39 are not there (lm_head.weight, model.embed_tokens.weight," in text
    other = build(load_config("gpt2-tiny", vocabulary=200, separator=0), device="cpu")
    with pytest.raises(mics.CheckpointError, match="shapes differ") as caught:
        load_weights(other, tmp_path / "t")
    assert "transformer.wte.weight is [96, 128] there, [200, 128] here" in str(caught.value)


def test_pickled_weights_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    model = build(load_config("gpt2-tiny", vocabulary=96, separator=0))
    with pytest.raises(mics.CheckpointError, match="pickled weights only") as caught:
        load_weights(model, tmp_path)
    assert "pytorch_model.bin" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has neither model.safetensors nor"),
        ({"model.safetensors": b"nonsense"}, "cannot be read as safetensors"),
        ({"model.safetensors.index.json": b"{}"}, "is no index of safetensors"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'},
            "names files outside of its folder",
        ),
    ],
)
def test_a_folder_that_is_none_is_named(
    files: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    model = build(load_config("gpt2-tiny", vocabulary=96, separator=0))
    with pytest.raises(mics.CheckpointError) as caught:
        load_weights(model, tmp_path)
    assert words in str(caught.value)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 1
    return capsys.readouterr().err


def test_export_names_what_is_wrong(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = str(trained[0] / "gpt2-tiny"), str(tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    mics.save(tmp_path / "bare", model=nn.Linear(2, 2))
    damaged = tmp_path / "damaged"
    mics.save(damaged, model=nn.Linear(2, 2))
    (damaged / "rank-00000.safetensors").write_bytes(b"")
    cases = {
        (str(tmp_path / "nothing"), out): "There is no checkpoint at",
        (str(tmp_path / "taken"), out): "It is a folder without one",
        (good, str(tmp_path / "taken")): "exists; nothing is written over",
        (good, str(tmp_path / "file" / "out")): "cannot be written: Not a directory",
        (str(damaged), out): "rank-00000.safetensors is damaged",
        (str(tmp_path / "bare"), out): "does not say which transformers model it is of",
    }
    for (checkpoint, target), expected in cases.items():
        assert expected in refused(["export", checkpoint, target], capsys)
    said = refused(["export", good, out, "--shard-size", "much"], capsys)
    assert "shard-size = 'much' is no size" in said
    assert not Path(out).exists()
    assert not list(tmp_path.glob("*.tmp")), "leftovers"


def test_import_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs"
    model = build(load_config("gpt2-tiny", vocabulary=96, separator=0), device="cpu")
    model.save_pretrained(theirs)  # type: ignore[operator]
    assert "exists; nothing is written over" in refused(
        ["import", str(theirs), str(theirs)], capsys
    )
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    said = refused(["import", str(theirs), str(tmp_path / "out")], capsys)
    assert "transformer.wte.weight is [96, 128] there, [100, 128] here" in said
    (theirs / "config.json").unlink()
    said = refused(["import", str(theirs), str(tmp_path / "out")], capsys)
    assert "config.json" in said
    assert not (tmp_path / "out").exists()


def test_a_forged_size_is_refused(trained: Any, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained[0] / "gpt2-tiny", tmp_path / "c")
    forge(tmp_path / "c", lambda t: t["files"]["rank-00000.safetensors"].update(bytes=10**9))
    with pytest.raises(mics.CheckpointError, match="another size"):
        export(tmp_path / "c", tmp_path / "out", dtype=None, shard_bytes=10**9, told=silent)


def test_imported_weights_of_another_dtype_say_how_to_convert_them(tmp_path: Path) -> None:
    config = load_config("llama-tiny", vocabulary=96, separator=0)
    build(config, device="cpu").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours", dtype=None, told=silent)
    with pytest.raises(mics.CheckpointError, match="bfloat16") as caught:
        mics.load(tmp_path / "ours", model=build(config, device="cpu"))
    assert "mics import --dtype fp32" in str(caught.value)
