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
    about = json.loads((tmp_path / "vit.convert.json").read_text())
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


def test_nothing_is_written_when_the_outputs_differ(reference, tmp_path, capsys):
    about = json.loads((reference / "vit_meta.json").read_text())["vit_p16"]
    output = np.full([1, about["embed_dim"]], 1e3, np.float32)
    np.savez(tmp_path / "recorded.npz", input=np.zeros([1, 3, 224, 224], np.float32), output=output)
    with pytest.raises(SystemExit):
        convert_main(
            [
                str(reference / "vit_p16_backbone.pth"),
                str(tmp_path / "vit"),
                *("--set", f"num_heads={about['num_heads']}"),
                *("--verify", str(tmp_path / "recorded.npz")),
            ]
        )
    assert "differ" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recorded.npz"]


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


def test_a_configuration_of_the_user_s_is_not_overwritten(reference, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("Global: {}")
    with pytest.raises(SystemExit):
        convert_main([str(reference / "full_checkpoint.pth"), str(tmp_path / "mine"), "--set", "num_heads=3"])
    assert "mine.yaml is there, and not of passl-convert" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_what_was_told_once_is_known_on_the_way_back(reference, tmp_path, capsys):
    for _ in range(2):  # a converted set may be written again
        convert_main([str(reference / "full_checkpoint.pth"), str(tmp_path / "run"), "--set", "num_heads=3"])
    assert (tmp_path / "run.yaml").read_text().startswith("# Made by passl-convert, how the run in full_checkpoint.pth")
    capsys.readouterr()
    convert_main([str(tmp_path / "run"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "num_heads: 3" in printed
    assert "does not show" not in printed


def test_a_probe_goes_back_as_the_two_official_files(reference, tmp_path):
    options = ["--backbone", str(reference / "linear_backbone_fullstyle.pth")]
    convert_main([str(reference / "linear_n4_checkpoint.pth.tar"), str(tmp_path / "probe"), *options])
    convert_main([str(tmp_path / "probe"), str(tmp_path / "v1.2.pth"), "--to", "torch"])
    head, backbone = (load_torch(tmp_path / name) for name in ("v1.2_linearweights.pth", "v1.2.pth"))
    before = load_torch(reference / "linear_n4_checkpoint.pth.tar")["state_dict"]
    for name, value in before.items():
        np.testing.assert_array_equal(head["state_dict"][name], value, err_msg=name)
    assert "cls_token" in backbone


def test_a_name_keeps_its_dots(reference, tmp_path):
    source = shutil.copy(reference / "vit_p16_backbone.pth", tmp_path / "vit.v1.2.pth.tar")
    convert_main([str(source), f"{tmp_path}/new/"])
    assert (tmp_path / "new/vit.v1.2.pdparams").is_file()
