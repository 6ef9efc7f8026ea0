"""An entry of the zoo gives its run's network back to the bit, proves itself, and no file of it can change unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import qexp
from qexp.command import check as command
from qexp.data.digits import Digits
from qexp.errors import QexpError
from qexp.layers.swap import quantizers_off
from qexp.models.digits_cnn import DigitsCNN
from qexp.models.weights import load_weights
from qexp.results import zoo
from qexp.run import zoo_check, zoo_pack
from qexp.run.settings import read
from tests.loaded import evaluated

QAT = ("schedule=qat", "schedule.epochs=1", "trainer.limit_train_batches=3")
BINARY = ("quant=one_bit", "bits=w1a2", "schedule=qat_scratch", *QAT[1:])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty zoo, which `zoo:NAME` names."""
    monkeypatch.setenv("QEXP_ZOO", str(tmp_path / "zoo"))
    return tmp_path / "zoo"


@pytest.fixture
def added(run, monkeypatch, tmp_path, folder) -> Callable[..., tuple[zoo.Entry, torch.Tensor, torch.Tensor]]:
    """Call with overrides; returns the entry of such a run, test images, and what the run's network made of them."""
    images = next(iter(Digits(max_samples=64).test_dataloader()))[0]

    def one(*overrides: str, name: str = "tiny", **options) -> tuple[zoo.Entry, torch.Tensor, torch.Tensor]:
        metrics, outputs = evaluated(monkeypatch, images, lambda: run("study=s", *overrides))
        made = tmp_path / "runs" / "s" / metrics["point"]
        return zoo_pack.add(made, name, folder, sample=100, command="python run.py", **options), images, outputs

    return one


@pytest.mark.parametrize(
    "overrides",
    [
        ("quant=mse", "bits=w4a4"),
        ("quant=minmax", "bits=w8a8", "bn=keep", "deploy=integer"),
        ("quant=ladder/aciq/full", "bits=w4a4"),
        ("quant=minmax", "bits=w3a8", "passes=[equalize,bias_correction]"),
        ("quant=lsq", "bits=w2a2", *QAT),
        ("quant=dorefa", "bits=w4a4", *QAT),
        BINARY,
        ("quant=irnet", "bits=w1a1", *QAT),
        ("quant=xnor", "bits=w1a1", *QAT),
        ("quant=apot", "bits=w3a3", *QAT),
        ("quant=caq_shift", "bits=w8a8"),
        ("quant=kmeans", "bits=w4a8"),
        ("quant=adaround", "bits=w3a8", "quant.passes.reconstruct.iterations=5", "quant.passes.reconstruct.batch=4"),
    ],
    ids=lambda o: " ".join(o),
)
def test_an_entry_gives_its_network_back_to_the_bit(added, overrides):
    entry, images, outputs = added(*overrides)
    with torch.no_grad():
        assert torch.equal(qexp.load(entry.name)(images), outputs)
    report = zoo_check.check(entry.name, whole=True)
    assert report.holds, report.text()
    bits = entry.card["mean_wbit"]
    packed = sum(a.nbytes for name, a in entry.network()[1].items() if name.endswith("#codes"))
    # w8a8 affine weights reach 9 bits; the ends have 8
    assert packed <= (bits + 1) / 8 * entry.card["params"], "weights are not at their own bits"


def test_the_card_says_how_it_was_made(added):
    published = {"value": 99.0, "source": "someone"}
    entry, *_ = added("quant=mse", "bits=w4a4", published=published)
    card = entry.card
    assert card["published"] == published and (card["quant"], card["layer_wbit"], card["seed"]) == ("mse", 4, 0)
    assert card["score"]["ci_low"] < card["score"]["value"] < card["score"]["ci_high"] and card["score"]["n"] == 200
    assert card["score"]["integer"]["n"] == 200 and card["sample"]["n"] == 100 and card["quantized_macs"] == 100.0
    texts = [(entry.folder / file).read_text() for file in (zoo.CARD, zoo.CONFIG)]
    assert not any(place in text for text in texts for place in ("/tmp/", "/root", "/home")), "a place of this machine"


def test_a_published_row_is_written_beside_an_entry(added, folder, capsys):
    from experiments.zoo import main

    entry, *_ = added("quant=mse", "bits=w4a4")
    assert main(["publish", "tiny", "--published", "90.2", "--source", "someone 2020"]) == 0
    card = zoo.read("tiny").card
    assert card == {**entry.card, "published": {"value": 90.2, "source": "someone 2020"}}
    assert main(["publish", "tinny"]) == 1 and "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["publish", "tiny", "--published", "90.2"])


def test_a_run_that_rounds_as_integers_is_recorded_by_them(added):
    entry, *_ = added("quant=minmax", "bits=w3a8", "rounding=integer")
    assert entry.card["row"]["value"] == entry.card["score"]["integer"]["value"]


def test_a_flipped_bit_is_refused_by_file(added, folder, capsys):
    entry, *_ = added("quant=mse", "bits=w4a4")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 2):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert command.main([entry.name]) == 1
            assert path.name in capsys.readouterr().out
        path.write_bytes(content)
    assert command.main([entry.name]) == 0


def test_an_edited_file_with_its_hash_on_the_card_is_refused_by_the_list(added, folder):
    entry, *_ = added("quant=mse", "bits=w4a4")
    config = entry.folder / zoo.CONFIG
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    card = {**entry.card, "files": {**entry.card["files"], zoo.CONFIG: zoo.sha256(config)}}
    (entry.folder / zoo.CARD).write_text(json.dumps(card))
    with pytest.raises(QexpError, match=r"card\.json was changed"):
        zoo.read("tiny")


@pytest.mark.parametrize("file", ["more.txt", zoo.NETWORK])
def test_a_file_too_many_or_too_few_is_refused(added, file):
    entry, *_ = added("quant=mse", "bits=w4a4")
    path = entry.folder / file
    path.unlink() if path.exists() else path.write_text("more")
    with pytest.raises(QexpError, match=f"{file} is (not listed|missing)"):
        zoo.read("tiny")


def test_a_changed_network_is_told_from_the_recorded_one(added, folder):
    """The hashes of a zoo can be written anew; its golden vectors and scores still tell another network."""
    entry, *_ = added("quant=mse", "bits=w4a4")
    from safetensors.numpy import save

    arrays = entry.arrays(zoo.NETWORK)
    arrays["conv2.weight#step"] = arrays["conv2.weight#step"] * 2
    (entry.folder / zoo.NETWORK).write_bytes(zoo.compressed(save(arrays)))
    files = {**entry.card["files"], zoo.NETWORK: zoo.sha256(entry.folder / zoo.NETWORK)}
    (entry.folder / zoo.CARD).write_text(json.dumps({**entry.card, "files": files}))
    zoo_pack.list_files(folder)
    report = zoo_check.check("zoo:tiny")
    wrong = {what for what, holds, _ in report.rows if holds is False}
    assert {"golden, simulation", "program", "simulation"} <= wrong, report.text()


def test_an_entry_is_written_whole_or_not_at_all(added, folder, monkeypatch):
    entry, *_ = added("quant=mse", "bits=w4a4")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with monkeypatch.context() as inside:
        inside.setattr(zoo_check.Report, "holds", False)
        with pytest.raises(QexpError, match="does not give what its card says"):
            added("quant=mse", "bits=w3a3")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.iterdir() if p.is_dir()] == [entry.card["name"]]


def test_a_run_whose_record_says_another_score_is_refused(run, folder, tmp_path):
    metrics = run("quant=mse", "bits=w4a4", "study=s")
    made = tmp_path / "runs" / "s" / metrics["point"]
    (made / "metrics.json").write_text(json.dumps({**metrics, "value": metrics["value"] - 0.5}))
    with pytest.raises(QexpError, match=r"the record has top1 .* its network gives"):
        zoo_pack.add(made, "tiny", folder, command="python run.py")
    assert not zoo.names()
    with pytest.raises(QexpError, match="not finished"):
        zoo_pack.add(tmp_path, "tiny", folder)
    with pytest.raises(QexpError, match="not allowed as a name"):
        zoo_pack.add(made, "../tiny", folder)


def test_its_weights_start_another_run(added, run):
    entry, images, _ = added("quant=mse", "bits=w8a8")
    model = DigitsCNN(width=8).eval()
    assert load_weights(model, entry.name).kind == "zoo"
    stored = qexp.load(entry.name)
    with torch.no_grad(), quantizers_off(stored):
        assert torch.allclose(model(images), stored(images), atol=1e-4)
    again = run(f"weights={entry.name}", "quant=mse", "bits=w8a8", "study=s")
    assert again["status"] == "ok" and abs(again["value"] - entry.card["score"]["value"]) <= 1
    assert again["weights"] == entry.name and again["reference"] == f"{entry.name} in float"


def test_other_entries_under_its_name_are_another_point(added, run, folder):
    added("quant=mse", "bits=w8a8")
    first = run("weights=zoo:tiny", "quant=minmax", "bits=w4a4", "study=s")
    added("quant=minmax", "bits=w2a8")
    assert run("weights=zoo:tiny", "quant=minmax", "bits=w4a4", "study=s")["point"] != first["point"]


def test_names_that_come_near_are_named(added, run):
    added("quant=mse", "bits=w4a4")
    with pytest.raises(QexpError, match=r"did you mean 'zoo:tiny'"):
        qexp.load("zoo:tinny")
    assert "did you mean 'zoo:tiny'" in run("weights=zoo:tinny", "quant=mse", "study=s")["error"]
    with pytest.raises(QexpError, match=r"does not fit .* it is digits_cnn on digits"):
        load_weights(DigitsCNN(width=4), "zoo:tiny")


def test_an_entry_is_exported_as_a_finished_run(added, compose, tmp_path):
    from qexp.run import pipeline

    added("quant=mse", "bits=w4a4")
    asked = compose("export=package", "weights=zoo:tiny", f"runs_dir={tmp_path / 'other'}", "verify=50")
    metrics = pipeline.run(read(asked))
    assert metrics["verify"] == "equal" and (tmp_path / "other" / "zoo" / "tiny" / "package" / "c" / "main.c").exists()


def test_without_the_images_the_rest_is_checked(added, folder):
    entry, *_ = added("quant=mse", "bits=w4a4")
    config = yaml.safe_load((entry.folder / zoo.CONFIG).read_text())
    config["dataset"]["data"] = {"_target_": "qexp.data.cifar.CIFAR10", "root": f"{zoo.DATA}/nowhere"}
    config["dataset"]["data"] |= {"batch_size": 8, "eval_batch_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}
    (entry.folder / zoo.CONFIG).write_text(yaml.safe_dump(config))
    files = {**entry.card["files"], zoo.CONFIG: zoo.sha256(entry.folder / zoo.CONFIG)}
    (entry.folder / zoo.CARD).write_text(json.dumps({**entry.card, "files": files}))
    zoo_pack.list_files(folder)
    report = zoo_check.check("zoo:tiny")
    said = {what: (holds, text) for what, holds, text in report.rows}
    assert report.holds and said["score"][0] is None and "not at hand" in said["score"][1]
    assert said["golden, reference"][0] and said["program"][0]


@pytest.mark.parametrize(
    ("typed", "words"),
    [(["tiny"], "name an entry of the zoo"), (["zoo:all"], "holds no entries"), (["zoo:x"], "no such entry")],
)
def test_what_is_no_entry_is_said(folder, capsys, typed, words):
    assert command.main(typed) == 1
    assert words in capsys.readouterr().err


def test_every_entry_is_checked_also_after_one_that_fails(added, folder, capsys):
    added("quant=mse", "bits=w4a4", name="a")
    shutil.copytree(folder / "a", folder / "b")
    card = json.loads((folder / "b" / zoo.CARD).read_text())
    (folder / "b" / zoo.CARD).write_text(json.dumps({**card, "name": "b"}))
    zoo_pack.list_files(folder)
    (folder / "a" / zoo.GOLDEN).write_bytes(b"")
    assert command.main(["zoo:all", "--images", "20"]) == 1
    said = capsys.readouterr().out
    assert f"{zoo.GOLDEN} was changed" in said and "zoo:b" in said and "20 samples" in said


def test_places_of_the_machine_leave_the_command(tmp_path):
    from qexp.run.zoo_places import portable, typed

    words = "/x/run.py -m model=resnet20 weights=/data/net.th runs_dir=/tmp/x 'quant.rules.a={bits: 4}' verify=10"
    assert typed(words) == "python run.py -m model=resnet20 weights=net.th 'quant.rules.a={bits: 4}'"
    network = tmp_path / "net.cfg"
    network.write_text("[net]")
    model = {"cfg": str(network), "net": {"cfg": str(network), "start": str(tmp_path / "w.pt"), "depth": 20}}
    (tmp_path / "w.pt").write_bytes(b"0")
    config, files = portable({"model": model, "dataset": {"data": {"root": "data/x"}}, "weights": "/data/net.th"})
    assert config["model"]["net"] == {"cfg": "$ZOO/files/net.cfg", "start": None, "depth": 20}
    assert config["dataset"]["data"]["root"] == "$QEXP_DATA_DIR/x" and files == {"net.cfg": network}
    with pytest.raises(QexpError, match="outside QEXP_DATA_DIR"):
        portable({"model": {}, "dataset": {"data": {"root": "/elsewhere"}}})


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    path = Path(tmp_path) / "x.xz"
    path.write_bytes(zoo.compressed(bytes(10_000)))
    assert len(zoo.unpacked(path)) == 10_000
    monkeypatch.setattr(zoo, "LARGEST", 5_000)
    with pytest.raises(QexpError, match="unpacks to more than"):
        zoo.unpacked(path)
