"""passl-convert as a user types it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from passl import checkpoint
from passl.cli import convert_main
from passl.convert import load_torch, save_torch


def test_a_backbone_there_and_back(reference, tmp_path, capsys):
    source = reference / "vit_p16_backbone.pth"
    convert_main([str(source), str(tmp_path / "vit")])
    printed = capsys.readouterr().out
    assert "a backbone alone" in printed
    assert "name: VisionTransformer" in printed
    assert "transposed" in printed
    assert "blocks.*.attn.qkv.weight" in printed
    assert "0 left over" in printed
    assert f"written: {tmp_path / 'vit'}.pdparams" in printed
    about = json.loads((tmp_path / "vit.json").read_text())
    assert about["kind"] == "backbone"
    assert len(about["report"]["matched"]) == len(checkpoint.read_weights(tmp_path / "vit"))

    convert_main([str(tmp_path / "vit"), str(tmp_path / "back.pth"), "--to", "torch"])
    before, after = load_torch(source), load_torch(tmp_path / "back.pth")
    assert list(before) == list(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_a_dry_run_writes_nothing(reference, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert_main([str(reference / "full_checkpoint.pth"), "--dry-run", "--verbose"])
    printed = capsys.readouterr().out
    assert "student, teacher and centre of a whole DINO run" in printed
    assert "student.module.head.last_layer.weight_g" in printed
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_the_name_of_the_source(reference, tmp_path):
    convert_main([str(reference / "vit_p8_backbone.pth"), f"{tmp_path}/new/"])
    assert (tmp_path / "new/vit_p8_backbone.pdparams").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{source}"], 2, "DST is missing"),
        (["{folder}/gone", "{folder}/x"], 1, "gone: no such file (tried .pdparams"),
        (["{source}", "{folder}/x", "--set", "num_heads"], 1, "write KEY=VALUE"),
        (["{source}", "{folder}/x", "--arch", "vit_smal"], 1, "Did you mean 'vit_small'?"),
        (["{source}", "{source}", "--to", "torch"], 1, "is the source itself"),
        (["{odd}", "{folder}/x"], 1, "--allow 'extra'"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(reference, tmp_path, capsys, arguments, code, message):
    state = load_torch(reference / "vit_p16_backbone.pth")
    save_torch({**state, "extra": np.zeros(3, np.float32)}, tmp_path / "odd.pth")
    places = {"source": reference / "vit_p16_backbone.pth", "folder": tmp_path, "odd": tmp_path / "odd.pth"}
    with pytest.raises(SystemExit) as stopped:
        convert_main([argument.format(**places) for argument in arguments])
    assert stopped.value.code == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pth"]


def test_a_run_s_own_checkpoint_is_not_overwritten(reference, tmp_path, capsys):
    store = checkpoint.CheckpointStore(tmp_path)
    store.save("epoch_1", {"w": np.zeros(2, np.float32)}, {}, {"step": 3})
    with pytest.raises(SystemExit):
        convert_main([str(reference / "vit_p16_backbone.pth"), str(tmp_path / "latest")])
    assert "a checkpoint of a run is there" in capsys.readouterr().err
    assert list(checkpoint.read_weights(tmp_path / "latest")) == ["w"]


def test_what_others_wrote_is_not_overwritten(reference, tmp_path, capsys):
    """Paddle calls its programs PREFIX.json; ours may be written again."""
    source = str(reference / "vit_p16_backbone.pth")
    for _ in range(2):
        convert_main([source, str(tmp_path / "mine")])
    (tmp_path / "other.json").write_text('{"base_code": {}}')
    with pytest.raises(SystemExit):
        convert_main([source, str(tmp_path / "other")])
    assert "other.json is there, and not of passl-convert" in capsys.readouterr().err
    assert not (tmp_path / "other.pdparams").exists()
    assert (tmp_path / "other.json").read_text() == '{"base_code": {}}'


def test_what_verifies_not_is_not_written(reference, tmp_path, capsys):
    recording = {"input": np.zeros((1, 3, 224, 224), np.float32), "output": np.ones((1, 1), np.float32)}
    np.savez(tmp_path / "recorded.npz", **recording)
    source = str(reference / "vit_p16_backbone.pth")
    with pytest.raises(SystemExit):
        convert_main(
            [source, str(tmp_path / "vit"), "--verify", str(tmp_path / "recorded.npz"), "--set", "num_heads=2"]
        )
    assert "recorded.npz has [1, 1]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recorded.npz"]


def test_a_name_keeps_its_dots(reference, tmp_path):
    source = shutil.copy(reference / "vit_p16_backbone.pth", tmp_path / "vit.v1.2.pth.tar")
    convert_main([str(source), f"{tmp_path}/new/"])
    assert (tmp_path / "new/vit.v1.2.pdparams").is_file()
