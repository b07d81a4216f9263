import json
import os
import random
import shutil

import numpy as np
import pytest
import torch

from models.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    restore_model,
    restore_optimizer,
    restore_rng,
    save_checkpoint,
    trainable_state,
)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(4, 4).requires_grad_(False)
        self.adapter = torch.nn.Linear(4, 2)
        self.register_buffer("mean", torch.arange(4.0))

    def forward(self, x):
        return self.adapter(self.backbone(x - self.mean))


def setup(seed=0):
    torch.manual_seed(seed)
    net = Net()
    names = {p: n for n, p in net.named_parameters() if p.requires_grad}
    return net, torch.optim.AdamW(names, lr=0.1, betas=(0.9, 0.98)), names


def train(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()


def save(root, step, net, optimizer, names, **kw):
    return save_checkpoint(
        root, step, model_state=trainable_state(net), optimizer=optimizer, parameter_names=names,
        trainer_state={"cursor": step * 16}, **kw,
    )


def test_frozen_weights_stay_out_and_buffers_in():
    assert set(trainable_state(Net())) == {"adapter.weight", "adapter.bias", "mean"}


def test_a_tied_head_that_trains_is_saved_once_and_restored_in_both_places(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        net = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
        net.head.weight = net.table.weight
        return net, dict.fromkeys(net.parameters(), "table.weight")

    net, names = tied(0)
    assert list(trainable_state(net)) == ["table.weight"]
    save(tmp_path, 1, net, torch.optim.AdamW(list(names)), names)
    other, _ = tied(1)
    restore_model(other, find_checkpoint(tmp_path, "auto"))
    assert torch.equal(other.head.weight, net.table.weight) and other.head.weight is other.table.weight


def test_continuing_is_bitwise(tmp_path):
    net, optimizer, names = setup()
    train(net, optimizer, 3)
    save(tmp_path, 3, net, optimizer, names)
    train(net, optimizer, 4)
    draws = (random.random(), np.random.rand(), torch.rand(1).item())

    other, other_optimizer, other_names = setup(seed=1)
    checkpoint = find_checkpoint(tmp_path, "auto")
    assert checkpoint.step == 3 and checkpoint.trainer["state"] == {"cursor": 48}
    other.load_state_dict(checkpoint.model, strict=False)
    other.backbone.load_state_dict(net.backbone.state_dict())
    restore_optimizer(other_optimizer, checkpoint, other_names)
    assert other_optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    restore_rng(checkpoint)
    train(other, other_optimizer, 4)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_no_pickle_in_a_checkpoint(tmp_path):
    net, optimizer, names = setup()
    train(net, optimizer, 1)
    path = save(tmp_path, 1, net, optimizer, names)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_only_the_last_are_kept(tmp_path):
    net, optimizer, names = setup()
    for step in (1, 2, 3, 10):
        save(tmp_path, step, net, optimizer, names, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    net, optimizer, names = setup()
    train(net, optimizer, 1)
    path = save(tmp_path, 1, net, optimizer, names)
    if damage == "flip":
        flip_a_byte(path / name)
    elif damage == "cut":
        (path / name).write_bytes((path / name).read_bytes()[:-1])
    else:
        (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: (damaged|missing)"):
        load_checkpoint(path)


def test_fallback_only_when_told(tmp_path):
    net, optimizer, names = setup()
    for step in (1, 2):
        train(net, optimizer, 1)
        save(tmp_path, step, net, optimizer, names)
    flip_a_byte(tmp_path / "step-00000002" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"damaged.*intact one is .*step-00000001.*run\.resume=fallback"):
        find_checkpoint(tmp_path, "auto")
    assert find_checkpoint(tmp_path, "fallback").step == 1
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="No intact checkpoint is left"):
        find_checkpoint(tmp_path, "fallback")


def test_an_interrupted_save_leaves_the_previous_one(tmp_path, monkeypatch):
    net, optimizer, names = setup()
    save(tmp_path, 1, net, optimizer, names)
    monkeypatch.setattr("models.training.checkpoint.atomic_write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, net, optimizer, names)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert find_checkpoint(tmp_path, "auto").step == 1


def test_what_killed_saves_have_left_goes_with_the_next_one(tmp_path):
    net, optimizer, names = setup()
    for name in (".step-00000001.abc.tmp", ".step-00000001.def.old", ".mine.tmp"):
        (tmp_path / name).mkdir()
    save(tmp_path, 2, net, optimizer, names)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "step-00000002"]


def test_a_checkpoint_whose_replacement_was_killed_between_the_renames_is_found(tmp_path):
    net, optimizer, names = setup()
    save(tmp_path, 1, net, optimizer, names)
    replace = os.replace

    def killed(source, target):
        if os.path.isdir(source) and str(source).endswith(".tmp"):
            os._exit(9)
        replace(source, target)

    child = os.fork()
    if not child:
        os.replace = killed
        try:
            save(tmp_path, 1, net, optimizer, names)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list_checkpoints(tmp_path) == []
    assert find_checkpoint(tmp_path, "auto").step == 1
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_a_prune_that_is_killed_leaves_no_half_of_a_checkpoint_listed(tmp_path, monkeypatch):
    net, optimizer, names = setup()
    for step in (1, 2):
        save(tmp_path, step, net, optimizer, names)
    listed = []

    def seen(folder, **_):
        listed.append([p.name for p in list_checkpoints(tmp_path)])

    monkeypatch.setattr("models.training.checkpoint.shutil.rmtree", seen)
    save(tmp_path, 3, net, optimizer, names)
    assert listed == [["step-00000002", "step-00000003"]]


def test_checkpoints_are_as_readable_as_the_umask_says(tmp_path):
    net, optimizer, names = setup()
    old = os.umask(0o027)
    try:
        path = save(tmp_path, 1, net, optimizer, names)
    finally:
        os.umask(old)
    assert {oct(p.stat().st_mode & 0o777) for p in path.iterdir()} == {"0o640"}


def test_other_format_and_missing_manifest(tmp_path):
    net, optimizer, names = setup()
    path = save(tmp_path, 1, net, optimizer, names)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 1 expected, got 99"):
        load_checkpoint(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_checkpoint(path)


def test_state_of_another_model_is_refused(tmp_path):
    net, optimizer, names = setup()
    train(net, optimizer, 1)
    checkpoint = load_checkpoint(save(tmp_path, 1, net, optimizer, names))
    with pytest.raises(CheckpointError, match="other parameters"):
        restore_optimizer(optimizer, checkpoint, {p: "other." + n for p, n in names.items()})


def test_never_and_nothing_there(tmp_path):
    assert find_checkpoint(tmp_path, "never") is None
    assert find_checkpoint(tmp_path / "none", "auto") is None


@pytest.mark.parametrize("manifest", ['{"format": 1}', '{"format": 1, "files": {}}', '{"format": 1, "files": 3}', "[]", "", "{"])
def test_a_damaged_manifest_is_a_clear_error(tmp_path, manifest):
    net, optimizer, names = setup()
    train(net, optimizer, 1)
    path = save(tmp_path, 1, net, optimizer, names)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"damaged|format 1 expected"):
        load_checkpoint(path)
