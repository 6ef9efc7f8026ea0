"""The plan as a table: written, read back, applied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qexp.errors import QexpError
from qexp.layers import quantizers
from qexp.network.facts import facts
from qexp.recipe import Recipe, apply, resolve
from tests.networks import Residual

UNIFORM = "qexp.quantizers.uniform.Uniform"
SITES = {"input": {"_target_": UNIFORM, "symmetric": False}, "weight": {"_target_": UNIFORM, "signed": True}}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ENDS = {"layers": "@ends", "input": {"bits": 8}, "weight": {"bits": 8}}
ADDS = {"layers": "add", "output": {"_target_": UNIFORM, "bits": 6}}


@pytest.fixture
def file(tmp_path):
    """Call with lines; returns a plan file that holds them under the usual head."""

    def written(*lines: str):
        path = tmp_path / "layers.csv"
        path.write_text("\n".join(["layer,site,bits", *lines]) + "\n")
        return path

    return written


def test_round_trip_through_layers_csv(plan, tmp_path):
    first = plan(3, 5, rules={"ends": ENDS, "adds": ADDS, "off": {"layers": "grouped", "input": None}})
    first.frame().to_csv(tmp_path / "layers.csv", index=False)
    rules = {"adds": {"layers": "add", "output": {"_target_": UNIFORM}, "optional": True}}
    again = plan(8, 8, rules=rules, plan=tmp_path / "layers.csv")
    assert [(e.layer, e.site, e.bits, e.spec is None) for e in again] == [
        (e.layer, e.site, e.bits, e.spec is None) for e in first
    ]


def test_a_plan_names_widths_and_has_the_last_word(plan, file):
    found = plan(4, [8, 8, 8, 8], rules={"ends": ENDS}, plan=file("stem,weight,3", "conv,input,32", "fc,input,5.0"))
    assert found["stem", "weight"].bits == 3 and found["stem", "weight"].by == "plan"
    assert found["conv", "input"].spec is None and found["fc", "input"].bits == 5
    assert found["conv", "weight"].bits == 4, "what the plan leaves out is as it was"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["cnov,weight,4"], r"the model has no layer 'cnov' \(did you mean 'conv'"),
        (
            ["conv,weight,0"],
            r"layers.csv: conv \(weight\), bits: got 0; allowed are whole numbers of bits 1..16, or 32 for float",
        ),
        (["conv,weight,4.5"], r"layers.csv: conv \(weight\), bits: got '4.5'; allowed are"),
        (["conv,weight,many"], r"layers.csv: conv \(weight\), bits: got 'many'; allowed are"),
        (
            ["conv,weight,17"],
            r"layers.csv: conv \(weight\), bits: got 17; allowed are whole numbers of bits 1..16, or 32",
        ),
        (["conv,weight,"], r"layers.csv: conv \(weight\), bits: got ''; allowed are"),
        (["conv,gradient,4"], "conv has no site 'gradient'"),
        (["add,output,4"], r"add \(output\) has 4 bits, but the recipe has no quantizer for it"),
    ],
)
def test_plans_that_do_not_fit(plan, file, lines, message):
    with pytest.raises(QexpError, match=message):
        plan(plan=file(*lines))


def test_files_that_are_no_plan(plan, tmp_path):
    with pytest.raises(QexpError, match=r"plan=.*nowhere.csv: cannot be read"):
        plan(plan=tmp_path / "nowhere.csv")
    other = tmp_path / "other.csv"
    other.write_text("layer,width\nconv,4\n")
    with pytest.raises(QexpError, match="columns bits, site are missing"):
        plan(plan=other)
    other.write_text("")
    with pytest.raises(QexpError, match="cannot be read"):
        plan(plan=other)


ROW = "layer,site,bits\nconv,weight,4\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW.encode("utf-16"), "it is text in UTF-16; save it as UTF-8"),
        (b"\x80\x02\x8a" * 40, "byte 0 is not UTF-8"),
        (ROW.encode() + b"\0\0", "it is binary"),
        (b"PK\x03\x04" + b"x" * 90, "it is compressed; unpack it first"),
        ((ROW + "conv,input,4,5\n").encode(), "line 3: 4 cells; the table has 3 columns"),
        ((ROW + "conv,input\n").encode(), "line 3: 2 cells; the table has 3 columns"),
        ((ROW + '"conv,input,4\n').encode(), "cannot be read as a table"),
        (ROW.replace(",", ";").encode(), "its cells are separated by ';'"),
        (ROW.replace("bits", "bits,bits").encode(), "column 'bits' occurs twice"),
        ((ROW + "conv,weight,5\n").encode(), r"conv \(weight\) is on lines 2 and 3; keep one row per tensor"),
        ((ROW + "conv,weight,4\n").encode(), "is on lines 2 and 3"),
        ((ROW + f"conv,input,{'9' * 5000}\n").encode(), "allowed are whole numbers"),
        ((ROW + "conv,input,\u00b2\n").encode(), "allowed are whole numbers"),
        (b"   \n", "it is empty"),
    ],
)
def test_a_plan_that_no_table_can_be_read_from(plan, tmp_path, content, message):
    path = tmp_path / "layers.csv"
    path.write_bytes(content)
    with pytest.raises(QexpError, match=message):
        plan(plan=path)


def test_pipes_devices_and_folders_are_no_plans(plan, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")  # reading it would wait for ever
    for path in (tmp_path / "pipe.csv", Path("/dev/zero")):
        with pytest.raises(QexpError, match="it is not a regular file"):
            plan(plan=path)
    with pytest.raises(QexpError, match="it is a folder; name the layers"):
        plan(plan=tmp_path)


def test_a_byte_order_mark_and_spaces_are_no_mistake(plan, tmp_path):
    path = tmp_path / "layers.csv"
    path.write_bytes("\ufefflayer, site, bits\r\nconv, weight, 3\r\n".encode())
    assert plan(8, 8, plan=path)["conv", "weight"].bits == 3


def test_columns_the_run_does_not_follow_are_told(plan, tmp_path, caplog):
    path = tmp_path / "layers.csv"
    path.write_text(
        "layer,site,bits,quantizer,granularity\nconv,weight,3,lsq,channel\nfc,weight,4,float,\nstem,weight,5,uniform,\n"
    )
    with caplog.at_level("INFO"):
        plan(8, 8, plan=path)
    (line,) = [r.getMessage() for r in caplog.records if "only its bits are read" in r.getMessage()]
    assert "conv (weight) quantizer: file lsq, run uniform" in line and "fc (weight) quantizer: file float" in line
    assert "stem" not in line and "granularity" not in line, line


def test_a_width_of_a_tensor_that_arrives_quantized_is_told(plan, tmp_path, caplog):
    path = tmp_path / "layers.csv"
    first = plan(3, 5, rules={"adds": ADDS})
    table = first.frame()
    arrives = table[table["rule"].str.startswith("quantized at add")]
    assert len(arrives)
    table.loc[(table["layer"] == "add") & (table["site"] == "output"), "bits"] = 4
    table.to_csv(path, index=False)
    with caplog.at_level("INFO"):
        again = plan(3, 5, rules={"adds": ADDS | {"optional": True}}, plan=path)
    assert again["add", "output"].bits == 4
    assert "6 bits, which arrives with the 4 of add (output)" in caplog.text


def model_with(rules: dict, sites: dict = SITES, **bits):
    torch.manual_seed(0)
    model = Residual().eval()
    structure = facts(model, X)
    apply(model, resolve(model, structure, Recipe(sites, rules, **bits)), structure)
    return model


def test_apply_attaches_what_the_plan_says():
    model = model_with({"ends": ENDS, "adds": ADDS}, wbit=3, abit=5)
    found = {(name, site): q for name, site, q in quantizers(model)}
    assert found["stem", "weight"].bits == 8 and found["depthwise", "weight"].bits == 3
    assert found["add", "output"].bits == 6 and ("conv", "input") not in found
    assert found["conv", "weight"].name == "conv (weight)"


def test_shapes_and_channels_follow_the_tensor():
    sites = {
        "input": SITES["input"] | {"granularity": "channel"},
        "weight": SITES["weight"] | {"granularity": "channel"},
    }
    model = model_with({}, sites, wbit=4, abit=4)
    assert model.conv.weight_quantizer.scale.shape == (12, 1, 1, 1)
    assert model.conv.input_quantizer.scale.shape == (1, 8, 1, 1)
    assert model.fc.input_quantizer.scale.shape == (1, 12)


def test_sites_with_one_share_name_carry_one_quantizer():
    spec = {"_target_": UNIFORM, "bits": 6, "share": "sum"}
    model = model_with(
        {"adds": {"layers": "add", "input": spec}, "pool": {"layers": "pool", "output": spec}}, wbit=4, abit=4
    )
    assert model.add.input_0_quantizer is model.add.input_1_quantizer is model.pool.output_quantizer


def test_what_is_nested_in_a_specification_is_each_quantizers_own():
    spec = SITES["weight"] | {"range": {"_target_": "qexp.ranges.Percentile", "percentile": 0.9}}
    model = model_with({}, {"weight": spec}, wbit=4, abit=32)
    one, other = model.stem.weight_quantizer.range, model.conv.weight_quantizer.range
    assert one == other and one is not other


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"bits": 9, "_target_": "qexp.quantizers.kmeans.KMeans"}, r"conv \(weight\): .*bits=9.*allowed are 1..8"),
        ({"granularity": "row"}, r"conv \(weight\): granularity: got 'row'; allowed are tensor, channel, group:N"),
        ({"granularity": "group:7"}, r"conv \(weight\): granularity=group:7 does not divide"),
        ({"signed": "maybe"}, r"conv \(weight\): .*signed='maybe'; allowed are true, false, auto"),
        ({"_target_": "qexp.quantizers.pact.PACT"}, "conv: PACT cannot sit on 'weight'"),
        ({"_target_": "qexp.quantizers.unifrom.Uniform"}, r"conv \(weight\): .*unifrom"),
        ({"roundign": "floor"}, r"conv \(weight\): .*roundign"),
    ],
)
def test_what_a_method_refuses_names_layer_and_site(spec, message):
    with pytest.raises(QexpError, match=message):
        model_with({"r": {"layers": "conv", "weight": spec}}, wbit=4, abit=4)
