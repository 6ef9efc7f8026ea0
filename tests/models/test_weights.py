"""Weights from every kind of source load strictly, and each failure raises an error that names the cause."""

import argparse
import functools
import hashlib
import http.server
import os
import tarfile
import threading
import urllib.error
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.models.weights import WeightsRecord, load_weights, save_weights
from qexp.system.file_hash import sha256


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
        ({"(": "x"}, r"'\(' -> 'x' is not a regular expression"),
        ({"conv": r"\9"}, "is not a regular expression"),
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


@pytest.mark.parametrize("place", ["net", "model_state", "network", "ema/shadow", "checkpoint/model/state_dict"])
@pytest.mark.parametrize("name", ["w.pth.tar", "w.bin", "w.pkl", "w.t7", "checkpoint"])
def test_weights_are_found_in_any_mapping_under_any_file_name(tmp_path, source_net, place, name):
    content = source_net.state_dict()
    for key in reversed(place.split("/")):
        content = {
            key: content,
            "epoch": 7,
            "best_acc": torch.tensor(98.1),
            "optimizer": {"state": {0: {"m": torch.ones(2)}}},
        }
    torch.save(content, tmp_path / name)
    model = net()
    load_weights(model, tmp_path / name)
    assert equal(model, source_net)


class Lit(pytorch_lightning.LightningModule):
    """A training module that calls its network as it likes."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            setattr(self, name, network)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def lightning(path, **networks):
    module = Lit(**networks)
    content = {"pytorch-lightning_version": "2.6.0", "epoch": 1, "state_dict": module.state_dict()}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["model", "net", "backbone", "my.inner"])
def test_a_lightning_checkpoint_loads_whatever_its_network_is_called(tmp_path, source_net, name, caplog):
    outer, _, inner = name.partition(".")
    network = nn.ModuleDict({inner: source_net}) if inner else source_net
    model = net()
    with caplog.at_level("INFO"):
        load_weights(model, lightning(tmp_path / "w.ckpt", **{outer: network}))
    assert equal(model, source_net) and "left out criterion.weight" in caplog.text


def test_the_trained_network_is_taken_and_not_its_teacher_or_average(tmp_path, source_net, caplog):
    model = net()
    with caplog.at_level("INFO"):
        load_weights(model, lightning(tmp_path / "w.ckpt", student=source_net, teacher=net()))
    assert equal(model, source_net) and "not state_dict, teacher.*" in caplog.text
    torch.save({"model": source_net.state_dict(), "model_ema": net().state_dict()}, tmp_path / "w.pt")
    model = net()
    load_weights(model, tmp_path / "w.pt")
    assert equal(model, source_net)


def test_several_networks_that_fit_are_refused_unless_a_key_map_drops_one(tmp_path, source_net):
    path = lightning(tmp_path / "w.ckpt", left=source_net, right=net())
    with pytest.raises(
        QexpError, match=r"several networks in it fit, and differ: state_dict, left.\*, state_dict, right"
    ):
        load_weights(net(), path)
    model = net()
    load_weights(model, path, {r"^right\.": None})
    assert equal(model, source_net)
    same = lightning(tmp_path / "same.ckpt", left=source_net, right=source_net)
    load_weights(model, same)


def test_tensors_beside_the_network_are_refused_outside_lightning(tmp_path, source_net):
    state = {f"features.{k}": v for k, v in source_net.state_dict().items()} | {"head.weight": torch.ones(1)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(QexpError, match=r"lies in features.\*, and beside it tensors that it lacks: head.weight"):
        load_weights(net(), tmp_path / "w.pt")
    model = net()
    load_weights(model, tmp_path / "w.pt", '{"^head": null}')
    assert equal(model, source_net)


def test_what_tools_leave_behind_is_no_weight(tmp_path, source_net):
    counted = {"total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)}
    torch.save(source_net.state_dict() | counted, tmp_path / "thop.pt")
    torch.save(torch.optim.swa_utils.AveragedModel(source_net).state_dict(), tmp_path / "averaged.pt")
    for name in ("thop.pt", "averaged.pt"):
        model = net()
        load_weights(model, tmp_path / name)
        assert equal(model, source_net)


@pytest.mark.parametrize("value", [argparse.Namespace(lr=0.1), np.float64(98.1), np.float32(1), np.int64(3)])
def test_options_and_numbers_of_numpy_are_plain_values(tmp_path, source_net, value):
    torch.save({"state_dict": source_net.state_dict(), "args": value}, tmp_path / "w.pt")
    model = net()
    load_weights(model, tmp_path / "w.pt")
    assert equal(model, source_net)


@pytest.mark.parametrize(
    "text", ['{"^head[.]linear": "fc"}', r'{"^head\.linear": fc}', "'^head[.]linear': fc", None, "[1]", "{"]
)
def test_a_key_map_may_be_text(tmp_path, source_net, text):
    torch.save({k.replace("fc.", "head.linear."): v for k, v in source_net.state_dict().items()}, tmp_path / "w.pt")
    if text in (None, "[1]", "{"):
        with pytest.raises(QexpError, match="does not fit" if text is None else r"key_map="):
            load_weights(net(), tmp_path / "w.pt", text)
    else:
        model = net()
        load_weights(model, tmp_path / "w.pt", text)
        assert equal(model, source_net)


def test_the_versions_of_modules_reach_the_network(tmp_path):
    """MNASNet refuses a state without the version of its layout."""
    from torchvision.models import mnasnet0_5

    source = mnasnet0_5(weights=None)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    prefixed = nn.DataParallel(source).state_dict()
    torch.save(prefixed, tmp_path / "prefixed.pth")
    save_weights(source, tmp_path / "w.safetensors")
    for name in ("w.pth", "prefixed.pth", "w.safetensors"):
        model = mnasnet0_5(weights=None)
        load_weights(model, tmp_path / name)
        assert equal(model, source)


class Spy:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return os.system, ("false",)


def test_pickled_objects_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "spy": Spy()}, tmp_path / "w.pt")
    with pytest.raises(QexpError, match=r"refused, for it holds Python objects besides tensors"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.11
def test_programs_are_told_from_weights(tmp_path, source_net):
    torch.jit.save(torch.jit.script(source_net.conv), tmp_path / "scripted.pt")
    with pytest.raises(QexpError, match="is a TorchScript program, not a file of weights"):
        load_weights(net(), tmp_path / "scripted.pt")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "exported.pt2")
    with pytest.raises(QexpError, match=r"is a program written by torch.export"):
        load_weights(net(), tmp_path / "exported.pt2")


FOREIGN = {
    "w.pt.gz": (b"\x1f\x8b" + b"x" * 40, "compressed with gzip; unpack it"),
    "w.h5": (b"\x89HDF\r\n\x1a\n" + b"x" * 40, "is an HDF5 file"),
    "w.npy": (b"\x93NUMPY" + b"x" * 40, "is a single NumPy array"),
    "w.pth": (b"version https://git-lfs.github.com/spec/v1\noid", "only a pointer to the file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_are_told(tmp_path, name):
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QexpError, match=message):
        load_weights(net(), tmp_path / name)


def test_archives_pipes_and_names_too_long_are_told(tmp_path):
    with tarfile.open(tmp_path / "w.pth.tar", "w") as archive:
        archive.add(__file__)
    with pytest.raises(QexpError, match="is a tar archive"):
        load_weights(net(), tmp_path / "w.pth.tar")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(QexpError, match="not a regular file"):
        load_weights(net(), tmp_path / "pipe.pt")
    with pytest.raises(QexpError, match="cannot be read"):
        load_weights(net(), "x" * 5000)


def altered(key, change):
    state = net().state_dict()
    state[key] = change(state[key])
    return state


KINDS = {
    "integers": ("conv.weight", lambda t: (t * 100).int(), "conv.weight holds int32 values; the network has float32"),
    "booleans": ("fc.bias", lambda t: t > 0, "fc.bias holds bool values"),
    "complex": ("fc.weight", lambda t: t * 1j, "fc.weight holds complex64 values"),
    "nan": ("fc.weight", lambda t: t * float("nan"), "32 of 32 values that are not finite"),
    "inf where it matters not": ("bn.running_mean", lambda t: t + float("inf"), "bn.running_mean holds 8 of 8"),
    "too large for its type": ("fc.weight", lambda t: t.double() + 1e300, "not finite"),
    "negative variance": ("bn.running_var", lambda t: t - 2, "bn.running_var holds negative variances"),
    "half a step": (
        "bn.num_batches_tracked",
        lambda t: t + 0.5,
        "bn.num_batches_tracked holds float32 values that are not whole",
    ),
    "sparse": ("fc.weight", lambda t: t.to_sparse(), "fc.weight is a sparse tensor"),
    "quantized": (
        "fc.weight",
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "fc.weight is a quantized tensor",
    ),
    "meta": ("fc.weight", lambda t: t.to("meta"), "fc.weight has no values"),
}


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantiz:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_kind_are_refused(tmp_path, kind):
    key, change, message = KINDS[kind]
    torch.save(altered(key, change), tmp_path / "w.pt")
    with pytest.raises(QexpError) as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert message in str(caught.value), caught.value


def test_kinds_the_network_can_take_load(tmp_path):
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
            self.register_buffer("count", torch.tensor(3))

    source = Masked()
    state = source.state_dict() | {"count": torch.tensor(5.0), "weight": source.weight.detach().double()}
    torch.save(state, tmp_path / "w.pt")
    model = Masked()
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.weight, source.weight) and model.count == 5 and model.mask[1] == float("-inf")
    torch.save(state | {"mask": torch.tensor([float("-inf"), 0.0])}, tmp_path / "w.pt")
    with pytest.raises(QexpError, match="mask holds 1 of 2 values that are not finite"):
        load_weights(Masked(), tmp_path / "w.pt")


def test_keys_that_are_no_names_are_no_weights(tmp_path, source_net):
    state = source_net.state_dict()
    torch.save({0: torch.ones(2), ("a", 1): torch.ones(2), "inner": {**state, 5: torch.ones(1)}}, tmp_path / "w.pt")
    model = net()
    load_weights(model, tmp_path / "w.pt")
    assert equal(model, source_net)
    torch.save({0: torch.ones(2), 1: torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(QexpError, match="no weights in it; got the keys 0, 1"):
        load_weights(net(), tmp_path / "w.pt")


def test_what_a_file_claims_is_looked_at_before_it_is_unpacked(tmp_path):
    torch.save({"w": torch.zeros(30_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "w.pt").stat().st_size < 1_000_000
    with pytest.raises(QexpError, match=r"claims to unpack to 120,.* bytes"):
        load_weights(net(), tmp_path / "w.pt")


def test_weights_that_cannot_be_written_leave_no_part(tmp_path, source_net):
    (tmp_path / "w.safetensors").mkdir()  # in the way
    with pytest.raises(QexpError, match="the weights cannot be written"):
        save_weights(source_net, tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


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
