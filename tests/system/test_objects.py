"""Specifications make objects; every mistake in one is a sentence that names its key."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from qexp.errors import QexpError
from qexp.ranges import MSE
from qexp.system.objects import make


def test_arguments_that_are_specifications_are_made_first():
    made = make(
        {"_target_": "builtins.dict", "range": {"_target_": "qexp.ranges.MSE"}, "many": [{"_target_": "builtins.list"}]}
    )
    assert isinstance(made["range"], MSE) and made["many"] == [[]]


def test_partial_and_more_arguments():
    conv = make({"_target_": "torch.nn.Conv2d", "_partial_": True, "in_channels": 3}, out_channels=4)(kernel_size=1)
    assert isinstance(conv, nn.Conv2d) and conv.weight.shape == (4, 3, 1, 1)
    assert make({"_target_": "torch.nn.Linear", "in_features": 2}, as_partial=True)(out_features=5).weight.shape == (
        5,
        2,
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (8, "net=8 is not allowed"),
        ({"width": 3}, "mapping with _target_"),
        ({"_target_": "nowhere_at_all.Net"}, "no module 'nowhere_at_all'"),
        ({"_target_": "torch.nn.Conv3000"}, "has no 'Conv3000'"),
        (
            {"_target_": "torch.nn.ReLU", "inplac": True},
            "takes no argument 'inplac' (did you mean 'inplace'?); allowed are inplace",
        ),
        ({"_target_": "torch.nn.Linear", "in_features": "abc", "out_features": 2}, "torch.nn.Linear raises TypeError"),
        (
            {"_target_": "builtins.dict", "deep": {"_target_": "torch.nn.Nothing"}},
            "net.deep: _target_=torch.nn.Nothing",
        ),
    ],
)
def test_mistakes_name_their_key(spec, words):
    with pytest.raises(QexpError) as caught:
        make(spec, where="net")
    assert words in str(caught.value) and str(caught.value).startswith("net")


def test_a_module_that_fails_to_import_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "raising_net.py").write_text("raise ValueError('half written')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(QexpError, match=r"broken_net cannot be imported.*a_package_nobody_has"):
        make({"_target_": "broken_net.Net"})
    with pytest.raises(QexpError, match="importing raising_net raises ValueError: half written"):
        make({"_target_": "raising_net.Net"})
    assert "broken_net" not in sys.modules
