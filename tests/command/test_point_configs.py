"""The configurations of a sweep's points, composed from kept ones, are Hydra's own."""

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from qexp.command.folders import CONF
from qexp.command.point_configs import PointConfigs
from qexp.command.root import register

POINTS = (
    ["quant=mse", "layer_wbit=4", "layer_abit=6"],
    ["layer_wbit=2", "quant=mse", "seed=3"],  # the same choices in another order
    ["quant=lsq", "schedule.epochs=2", "+callbacks.mine={_target_: a.b}"],
    ["bits=w4a4", "quant=minmax", "runs_dir=elsewhere", "seed=3"],
    ["bits=w2a4", "layer_wbit=[8,2,2,8]", "passes=[equalize,bias_correction]"],
    ["quant=mse", "n_calibrate=17", "++model.net.width=8", "~trainer.deterministic", "~callbacks"],
    ["quant=mse", "hydra.job.chdir=true", "seed=1"],
    ["trainer={devices: 2}", "seed=2"],  # a value in the place of a choice
    [],
)
WRONG = (["quant=msee"], ["layer_wbitt=4"], ["+layer_wbit=4"], ["~nothing"], ["+quant=mse"], ["seed=[1"])


@pytest.fixture
def loader():
    register()
    held = GlobalHydra.instance().hydra if GlobalHydra.instance().is_initialized() else None
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()
    GlobalHydra.instance().hydra = held


def test_kept_files_give_the_configuration_that_hydra_composes(loader):
    master = loader.load_configuration("config", ["quant=minmax,mse", "seed=1,2"], RunMode.MULTIRUN)
    compose = loader.load_sweep_config
    PointConfigs.install(loader)
    for words in POINTS:
        loader.load_sweep_config(master, words)  # its files are kept from now on
        ours, hydras = loader.load_sweep_config(master, words), compose(master, words)
        assert OmegaConf.to_yaml(ours) == OmegaConf.to_yaml(hydras), words  # the order of keys too
        assert OmegaConf.is_struct(ours) and not OmegaConf.is_readonly(ours.hydra)
        for key in ("dataset", "study", "weights", "bn"):  # references
            assert ours.get(key) == hydras.get(key), words
        assert OmegaConf.get_type(ours, "hydra") is OmegaConf.get_type(hydras, "hydra")


def test_points_do_not_share_their_configuration(loader):
    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    PointConfigs.install(loader)
    first = loader.load_sweep_config(master, ["quant=mse", "seed=1"])
    first.trainer.devices = 7
    second = loader.load_sweep_config(master, ["quant=mse", "seed=2"])
    assert (first.seed, second.seed, second.trainer.devices) == (1, 2, 1)


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_mistake_raises_hydras_own_error(loader, words):
    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    with pytest.raises((HydraException, ValueError)) as hydras:
        loader.load_sweep_config(master, words)
    PointConfigs.install(loader)
    loader.load_sweep_config(master, ["seed=1"])
    with pytest.raises(type(hydras.value)) as ours:
        loader.load_sweep_config(master, words)
    assert str(ours.value) == str(hydras.value)


def test_a_sweep_reads_its_files_once_per_set_of_choices(loader, monkeypatch):
    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    read = []
    load = loader.load_configuration
    monkeypatch.setattr(loader, "load_configuration", lambda *a, **k: read.append(k) or load(*a, **k))
    PointConfigs.install(loader)
    for _ in range(3):  # checked, validated, run
        for quant in ("mse", "minmax"):
            for seed in range(5):
                loader.load_sweep_config(master, [f"quant={quant}", f"seed={seed}"])
    assert len(read) == 2
