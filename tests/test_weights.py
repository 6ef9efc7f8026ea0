"""Weights from every kind of source load strictly, and every way they can fail says what is wrong."""

import functools
import hashlib
import http.server
import os
import threading
import urllib.error
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.weights import WeightsRecord, load_weights, save_weights, sha256


def net(out=4) -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), fc=nn.Linear(8, out)))


@pytest.fixture
def source_net() -> nn.Module:
    model = net()
    for value in model.state_dict().values():
        value.copy_(torch.rand_like(value.float()) * 9)
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "net_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module.model.", "model._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path, source_net, suffix, wrapper, prefix):
    state = {prefix + k: v for k, v in source_net.state_dict().items()}
    path = tmp_path / f"w{suffix}"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    model = net()
    record = load_weights(model, path)
    assert equal(model, source_net)
    assert record == WeightsRecord(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), "file")


def test_safetensors_round_trip_leaves_no_other_file(tmp_path, source_net):
    save_weights(source_net, tmp_path / "deep" / "w.safetensors")
    model = net()
    load_weights(model, tmp_path / "deep" / "w.safetensors")
    assert equal(model, source_net)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_a_prefix_the_model_itself_has_stays(tmp_path):
    model, other = nn.ModuleDict({"model": nn.Linear(2, 2)}), nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(other.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert equal(model, other)


def test_files_older_than_bn_counters_load(tmp_path, source_net):
    torch.save({k: v for k, v in source_net.state_dict().items() if "num_batches" not in k}, tmp_path / "w.pt")
    model = net()
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.bn.running_var, source_net.bn.running_var)


def test_key_map_renames_and_drops(tmp_path, source_net):
    state = {k.replace("fc.", "head.linear."): v for k, v in source_net.state_dict().items()}
    torch.save({**state, "aux1.weight": torch.ones(2)}, tmp_path / "w.pt")
    model = net()
    load_weights(model, tmp_path / "w.pt", {r"^head\.linear\.": "fc.", r"^aux\d\.": None})
    assert equal(model, source_net)


@pytest.mark.parametrize(
    ("key_map", "message"),
    [
        ({"(": "x"}, r"'\(' -> 'x' is no regular expression"),
        ({"conv": r"\9"}, "is no regular expression"),
        ({r"\.(weight|bias)$": ".x"}, "gives two keys the name 'conv.x'"),
    ],
)
def test_bad_key_maps_are_named(tmp_path, source_net, key_map, message):
    torch.save(source_net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(QexpError, match=message):
        load_weights(net(), tmp_path / "w.pt", key_map)


def test_misfit_lists_missing_unexpected_and_shapes_and_leaves_the_model_alone(tmp_path, source_net):
    state = source_net.state_dict()
    state["conv1.weight"] = state.pop("conv.weight")
    torch.save(state, tmp_path / "w.pt")
    model = net(out=5)
    before = model.fc.weight.clone()
    with pytest.raises(QexpError) as caught:
        load_weights(model, tmp_path / "w.pt")
    for part in (
        "does not fit Sequential",
        "1 missing: conv.weight (did you mean 'conv1.weight'?)",
        "1 unexpected: conv1.weight",
        "2 of another shape: fc.weight: file [4, 8], model [5, 8]",
        "key_map",
    ):
        assert part in str(caught.value)
    assert torch.equal(model.fc.weight, before)


def test_another_networks_names_are_not_suggested(tmp_path, source_net):
    other = {f"features.{key}": value for key, value in source_net.state_dict().items() if "fc" not in key}
    torch.save(other | {"classifier.1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(QexpError, match=r"missing: conv.weight, .*unexpected: features.conv.weight") as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert "did you mean" not in str(caught.value)


def test_long_lists_of_keys_are_cut(tmp_path):
    torch.save({f"x{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.pt")
    with pytest.raises(QexpError, match=r"20 unexpected: x0, x1, x2, x3 and 16 more"):
        load_weights(net(), tmp_path / "w.pt")


class Spy:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return os.system, ("false",)


def test_pickled_objects_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "spy": Spy()}, tmp_path / "w.pt")
    with pytest.raises(QexpError, match=r"refused, for it holds Python objects besides tensors"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 400])
def test_truncated_files_are_named(tmp_path, source_net, suffix, keep):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(source_net.state_dict(), path)
    else:
        save_weights(source_net, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(QexpError, match=r"damaged or truncated \(\d+ bytes\)"):
        load_weights(net(), path)


def test_garbage_is_named(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"<html>Not found</html>")
    with pytest.raises(QexpError, match="damaged or truncated"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(1)], {"state_dict": {"a": 1}}, {}])
def test_files_without_weights_say_what_they_hold(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(QexpError, match="no weights in it; got"):
        load_weights(net(), tmp_path / "w.pt")


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "resnet20.pt").touch()
    with pytest.raises(QexpError, match=r"no such file \(did you mean 'resnet20.pt'\?\)"):
        load_weights(net(), tmp_path / "resnet2.pt")
    with pytest.raises(QexpError, match="is empty or not there"):
        load_weights(net(), tmp_path / "nowhere" / "resnet20.pt")


def test_other_suffixes_are_refused(tmp_path):
    (tmp_path / "w.h5").touch()
    with pytest.raises(QexpError, match=r"cannot read files ending in '.h5'; allowed: .safetensors"):
        load_weights(net(), tmp_path / "w.h5")


def test_run_folder_gives_its_last_checkpoint(tmp_path, source_net):
    (tmp_path / "checkpoints").mkdir()
    state = {f"model.{k}": v for k, v in source_net.state_dict().items()}
    lightning = {"pytorch-lightning_version": "2.6.0", "epoch": 1, "state_dict": {**state, "top1.total": torch.ones(1)}}
    torch.save(lightning, tmp_path / "checkpoints" / "last.ckpt")
    torch.save({}, tmp_path / "checkpoints" / "best.ckpt")
    model = net()
    assert load_weights(model, tmp_path).kind == "run"
    assert equal(model, source_net)


def test_folder_without_checkpoint_says_what_it_has(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch3.txt").touch()
    with pytest.raises(QexpError, match=r"no last.ckpt or best.ckpt in it \(found: epoch3.txt\)"):
        load_weights(net(), tmp_path)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Says nothing."""


@pytest.fixture
def served(tmp_path, source_net):
    """A file on a local server: its folder and URL."""
    folder = tmp_path / "served"
    save_weights(source_net, folder / "w.safetensors")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/w.safetensors"
        server.shutdown()
        thread.join()


def test_url_is_fetched_once_and_checked(served, tmp_path, source_net):
    folder, url = served
    digest, cache = sha256(folder / "w.safetensors"), tmp_path / "cache"
    record = load_weights(net(), f"{url}#sha256={digest}", cache_dir=cache)
    assert record == WeightsRecord(f"{url}#sha256={digest}", digest, "url")
    (folder / "w.safetensors").unlink()
    model = net()
    load_weights(model, f"{url}#sha256={digest}", cache_dir=cache)
    assert equal(model, source_net)


def test_url_without_checksum_is_refused():
    with pytest.raises(QexpError, match="append #sha256="):
        load_weights(net(), "https://example.org/w.pt")


def test_wrong_checksum_keeps_nothing(served, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(QexpError, match=r"sha256 is .*, expected 0000"):
        load_weights(net(), f"{served[1]}#sha256={'0' * 64}", cache_dir=cache)
    assert not list(cache.iterdir())


def test_absent_url_says_where_to_put_the_file(served, tmp_path):
    with pytest.raises(QexpError, match=r"cannot be fetched \(HTTP Error 404.*put it there as .*cache"):
        load_weights(net(), f"{served[1]}x#sha256={'0' * 64}", cache_dir=tmp_path / "cache")


def test_torchvision_name_offline_names_file_url_and_place(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    model = net()
    model.torchvision_name = "resnet18"
    for name in ("IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        with pytest.raises(QexpError) as caught:
            load_weights(model, name, cache_dir=tmp_path)
        for part in ("resnet18-f37072fd.pth", "https://download.pytorch.org/models/", str(tmp_path), "no network"):
            assert part in str(caught.value)


def test_damaged_torchvision_file_is_not_used(tmp_path):
    (tmp_path / "resnet18-f37072fd.pth").write_bytes(b"cut")
    with pytest.raises(QexpError, match="expected f37072fd; the file is damaged"):
        load_weights(net(), "ResNet18_Weights.IMAGENET1K_V1", cache_dir=tmp_path)


def test_unknown_torchvision_names_list_the_known():
    model = net()
    with pytest.raises(QexpError, match="needs a torchvision model, got Sequential"):
        load_weights(model, "IMAGENET1K_V1")
    model.torchvision_name = "resnet18"
    with pytest.raises(QexpError, match="resnet18 has IMAGENET1K_V1"):
        load_weights(model, "IMAGENET1K_V7")
    with pytest.raises(QexpError, match="torchvision knows no such weights"):
        load_weights(model, "ResNet19_Weights.IMAGENET1K_V1")


@pytest.mark.data
def test_public_squeezenet_gives_its_reference_output():
    from qexp.models.zoo import torchvision_model

    folder = Path(os.environ["QEXP_DATA_DIR"]) / "weights"
    model = torchvision_model("squeezenet1_1").eval()
    load_weights(model, folder / "imagenet_squeezenet1_1.pt")
    vector = {name: np.load(folder / "squeezenet1_1_testvec" / f"{name}_0.npy") for name in ("input", "output")}
    with torch.no_grad():
        scores = model(torch.from_numpy(vector["input"]))
    np.testing.assert_allclose(scores.numpy(), vector["output"], rtol=0, atol=2e-4)
