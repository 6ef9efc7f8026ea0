"""The page in a real browser: no console errors, plots drawn, clicks answered, names still text."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qexp.report.dashboard import write_dashboard
from tests.report.browser import ask

pytestmark = pytest.mark.browser

# What every test may use: the drawn pixels of a figure, a click on a dot, all text in shadow roots too.
HELPERS = r"""
const view = (name) => [...Bokeh.index.roots].find((view) => view.model.name === name);
const inked = (name) => {
  const { canvas } = view(name).canvas.primary;
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let n = 0;
  for (let i = 3; i < data.length; i += 4) n += data[i] > 0;
  return n;
};
const tap = (source, i) => { qexp.model(source).selected.indices = [i]; };
const hover = (name, source, i) => {
  const v = view(name), el = v.canvas.events_el, box = el.getBoundingClientRect();
  const { x, y } = qexp.model(source).data;
  const at = { clientX: box.left + v.frame.x_scale.compute(x[i]), clientY: box.top + v.frame.y_scale.compute(y[i]) };
  // with no view an event's pageY leaves out how far the page is scrolled
  const mouse = { view: window, bubbles: true, composed: true, pointerType: "mouse", pointerId: 1, isPrimary: true, ...at };
  for (const type of ["pointerover", "pointerenter", "pointermove"]) el.dispatchEvent(new PointerEvent(type, mouse));
};
const words = (tip) => [...tip.shadowRoot.querySelectorAll("div")].map((line) => line.textContent).join(" ");
const tooltip = () => [...document.querySelectorAll(".bk-Tooltip")].map(words).join(" ");
// moves until the tooltip has the expected text
const linger = (word, ...at) => until(() => { hover(...at); return tooltip().replace(/\s+/g, " ").includes(word); });
const rowOf = (point) => qexp.rows.findIndex((row) => row.point === point);
const text = (id) => document.getElementById(id).textContent;
"""


@pytest.fixture
def visit(chromium: str) -> Callable[..., dict[str, Any]]:
    """Returns a function that opens a page, runs a script in it once it is ready, and returns what that returned."""

    def run(page: Path, script: str, *flags: str) -> dict[str, Any]:
        whole = f"{HELPERS} const found = await (async () => {{ {script} }})(); return {{ problems: text('problems'), ...found }};"
        report, console = ask(chromium, page, whole, *flags)
        said = [
            line for line in console if not re.search(r"setting log level|ResizeObserver loop|willReadFrequently", line)
        ]
        assert not said, "\n".join(said)
        assert "thrown" not in report, report["thrown"]
        assert report["problems"] == ""
        return report

    return run


def test_all_figures_are_drawn(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    names = [
        "bits",
        "size",
        "time",
        "grid",
        "methods",
        "seeds",
        "sqnr",
        "saturation",
        "depth",
        "histogram",
        "history",
        "loss",
        "score",
    ]
    script = f"""
    qexp.choose(rowOf("lsq-w4a4-s0"), true);
    await until(() => {names}.every((name) => inked(name) > 2000));  // drawn one after another
    const counts = (name) => (qexp.model(name) ? Object.values(qexp.model(name).data)[0].length : null);
    return {{
      ink: Object.fromEntries({names}.map((name) => [name, inked(name)])),
      dots: counts("bits-dots"), tiles: counts("grid-tiles"), seeds: counts("seeds-dots"),
      rows: document.querySelectorAll("#board tbody tr").length, stats: text("stats"), hint: text("hint-board"),
    }};"""
    report = visit(write_dashboard(study), script)
    assert all(pixels > 2000 for pixels in report["ink"].values()), report["ink"]
    assert (report["dots"], report["rows"], report["tiles"], report["seeds"]) == (33, 34, 9, 9)
    assert "91.73 %" in report["stats"]
    assert "33 ok, 1 failed" in report["stats"]
    assert "within noise of the best" in report["hint"]


def test_a_click_on_a_dot_shows_its_layers(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    script = """
    const at = qexp.model("bits-dots").data.row.indexOf(rowOf("mse-w2a8-s0"));
    tap("bits-dots", at);
    await wait(500);
    const marked = [...document.querySelectorAll('#board tr[aria-selected="true"]')].map((row) => Number(row.dataset.row));
    const clicked = { title: text("h-point"), plan: document.querySelectorAll("#plan tbody tr").length, marked,
      pill: text("pill"), ring: qexp.model("bits-ring").data.x.length, hash: location.hash,
      dots: qexp.model("sqnr-dots").data.x.length, curves: document.getElementById("box-curves").hidden };
    tap("sqnr-dots", 4);
    await wait(300);
    const line = document.querySelector('#plan tr[aria-selected="true"]');
    const head = [...document.querySelectorAll("#plan th")].map((cell) => cell.textContent);
    const texts = ["0.00128941..0.00240994", "78", "input * weight", "-3..3", ""].map(qexp.numbers);
    return { ...clicked, head, texts, row: rowOf("mse-w2a8-s0"), layer: line.dataset.layer, range: text("hint-histogram"),
      bins: qexp.model("histogram-bins").data.top.length, whole: (qexp.chooseLayer("conv1", "input"), text("hint-histogram")) };"""
    report = visit(write_dashboard(study), script)
    assert report["title"] == "mse · ptq W2A8"
    assert report["pill"].startswith("mse · ptq  W2A8")
    assert (report["plan"], report["dots"], report["ring"]) == (44, 44, 1)
    assert report["marked"] == [report["row"]]
    assert report["hash"] == "#mse-w2a8-s0"
    assert report["curves"] is True
    assert (
        report["head"].index("SQNR (dB)") == report["head"].index("bits") + 1 and report["head"].count("SQNR (dB)") == 1
    )
    assert report["texts"] == ["0.00129..0.00241", "78", "input * weight", "-3..3", ""]
    assert report["layer"] == "layer1.0.conv2 weight"
    assert ", 4 levels (green)" in report["range"]
    assert report["range"].startswith("Ranges of all channels within ")
    assert "each channel has its own, and saturates outside that" in report["range"]
    assert report["whole"].startswith("Range 0 to ") and "; what lies outside saturates." in report["whole"]
    assert report["bins"] > 20


def test_errors_by_depth_and_histories(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    script = """
    const shown = (id) => !document.getElementById(id).hidden;
    qexp.choose(rowOf("mse-w4a4-s0"), true); await wait(300);
    const ptq = { depth: shown("box-depth"), history: shown("box-history"), hint: text("hint-depth"),
      dots: qexp.model("depth-total").data.x.length, top: qexp.model("depth").y_range.factors.at(-1) };
    qexp.choose(rowOf("lsq-w4a4-s0"), true); await wait(300);
    const scale = { lines: qexp.model("history-lines").data.xs.length, hint: text("hint-history") };
    [...document.querySelectorAll("#c-history button")].find((b) => b.textContent === "oscillating").click();
    await wait(300);
    return { ptq, scale, lines: qexp.model("history-lines").data.xs.length, end: qexp.model("history-lines").data.ys[0].at(-1),
      label: qexp.model("history").left[0].axis_label, hint: text("hint-history") };"""
    report = visit(write_dashboard(study), script)
    ptq = report["ptq"]
    assert (ptq["depth"], ptq["history"], ptq["dots"], ptq["top"]) == (True, False, 22, "conv1")
    assert (
        "The largest error is made in layer3.2.conv2" in ptq["hint"]
        and "Of the batch norms bn3 is furthest" in ptq["hint"]
    )
    assert report["scale"]["lines"] == 44 and "greatest in linear" in report["scale"]["hint"]
    assert (report["lines"], report["end"]) == (22, 10)
    assert report["label"] == "weights that oscillate (%)" and "greatest in" in report["hint"]


def test_what_searches_and_proofs_found(
    study: Path, write_findings: Callable[[Path], None], visit: Callable[..., dict[str, Any]]
) -> None:
    write_findings(study / "mse-w4a4-s0")
    script = """
    const shown = (id) => !document.getElementById(id).hidden;
    const size = (name) => qexp.model(name).data.x.length;
    const boxes = ["box-sensitivity", "box-trials", "box-accumulator"];
    qexp.choose(rowOf("mse-w2a2-s0"), true); await wait(300);
    const without = boxes.map(shown);
    qexp.choose(rowOf("mse-w4a4-s0"), true);
    for (const name of ["sensitivity", "trials", "accumulator"]) view(name).el.scrollIntoView(), await wait(200);
    await until(() => ["sensitivity", "trials", "accumulator"].every((name) => inked(name) > 2000));
    const first = { bars: size("sensitivity-bars"), top: qexp.model("sensitivity").y_range.factors.at(-1),
      longest: qexp.model("sensitivity-bars").data.x[0],
      note: qexp.model("sensitivity-bars").data.note[0], hint: text("hint-sensitivity"), front: size("trials-front"),
      others: size("trials-others"),
      wrap: qexp.model("accumulator-wrap").data.y, ink: ["sensitivity", "trials", "accumulator"].map(inked) };
    const pick = document.querySelector("#c-sensitivity select");
    pick.value = "2"; pick.dispatchEvent(new Event("change"));
    [...document.querySelectorAll("#c-trials button")].find((b) => b.textContent === "bit operations").click();
    [...document.querySelectorAll("#c-saturation button")].find((b) => b.textContent === "codes used").click();
    await wait(300);
    return { without, shown: boxes.map(shown), first, at2: qexp.model("sensitivity-bars").data.x[0],
      cost: qexp.model("trials-front").data.x[0],
      used: qexp.model("saturation-dots").data.x, axis: qexp.model("saturation").below[0].axis_label };"""
    report = visit(write_dashboard(study), script)
    first = report["first"]
    assert (report["without"], report["shown"]) == ([False] * 3, [True] * 3)
    assert (first["bars"], first["top"], first["longest"]) == (
        40,
        "layer3.2.conv2 · weight",
        pytest.approx(20 / 4**4, rel=1e-3),
    )
    assert first["note"] == "4 bits" and "at 4 bits" in first["hint"]
    assert (first["front"], first["others"], first["wrap"]) == (9, 31, [60, 80, 90, 90])
    assert all(pixels > 2000 for pixels in first["ink"]), first["ink"]
    assert (report["at2"], report["cost"]) == (pytest.approx(20 / 16, rel=1e-3), 1e8)
    assert all(0 < share <= 100 for share in report["used"]) and report["axis"] == "codes that occur (%)"


def test_the_time_of_a_point_includes_its_search(
    tmp_path: Path, write_point: Callable[..., Path], visit: Callable[..., dict[str, Any]]
) -> None:
    study = tmp_path / "runs" / "s"
    seconds = {"seconds_calibrate": 2.0, "seconds_train": 0.0, "seconds_evaluate": 1.0}
    write_point(study, "mse", 4, 4, point="plain", **seconds)
    script = """
    const table = [...document.querySelectorAll("#costs tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    return { table, total: qexp.total(qexp.rows[rowOf("found")] ?? {}), stats: text("stats") };"""
    report = visit(write_dashboard(study), script)
    assert "search" not in report["table"][0] and "search" not in report["stats"]
    write_point(study, "allocate", 4, 4, point="found", seconds_search=60.0, **seconds)
    report = visit(write_dashboard(study), script)
    head, *lines = report["table"]
    assert head[2:] == ["calibrate", "search", "train", "evaluate", "all points"] and report["total"] == 63
    searched = {line[0].strip(): line[head.index("search")] for line in lines}
    assert (
        sorted(searched) == ["allocate", "mse"]
        and searched["mse"] == "–"
        and searched["allocate"].startswith(("1 min", "60"))
    )


def test_rows_filters_and_sorting_work(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    script = """
    const order = () => [...document.querySelectorAll("#board tbody tr")].map((row) => qexp.rows[Number(row.dataset.row)]);
    const press = (name) => [...document.querySelectorAll("#board th button")].find((b) => b.textContent.startsWith(name)).click();
    press("below float");
    const drops = order().map((row) => row.drop ?? null);
    document.querySelectorAll("#board tbody tr")[3].click();
    const chosen = [text("h-point"), order()[3].width];
    [...document.querySelectorAll("#methods .chip")].find((chip) => chip.textContent.startsWith("lsq")).click();
    const methods = [...new Set(order().map((row) => row.quant))];
    const search = document.querySelector('#filters input');
    search.value = "w4a8 mse";
    search.dispatchEvent(new Event("input"));
    return { drops, chosen, methods, found: order().map((row) => row.point), dots: qexp.model("size-dots").data.x.length };"""
    report = visit(write_dashboard(study), script)
    assert report["drops"][:-1] == sorted(report["drops"][:-1])
    assert report["drops"][-1] is None  # the failed point, last whichever way
    assert report["chosen"][1] in report["chosen"][0]
    assert report["methods"] == ["mse", "minmax", "pact"]
    assert (report["found"], report["dots"]) == (["mse-w4a8-s0"], 1)


def test_a_failed_point_shows_its_error(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    script = """qexp.choose(rowOf("pact-w2a2-s0"), true); await wait(300);
    return { failure: text("failure"), title: text("h-point") };"""
    report = visit(write_dashboard(study), script)
    assert "scale is not finite (inf) in batch 3" in report["failure"]
    assert report["title"] == "pact · qat W2A2failed"


def test_hovering_names_the_point(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    script = """view("bits").el.scrollIntoView(); await wait(200);
    await linger("W2A2", "bits", "bits-dots", qexp.model("bits-dots").data.row.indexOf(rowOf("minmax-w2a2-s0")));
    return { tip: tooltip() };"""
    tip = visit(write_dashboard(study), script)["tip"]
    assert "minmax · ptq W2A2" in re.sub(r"\s+", " ", tip)
    assert "seed 0" in tip


def test_dots_stand_at_their_bits(
    study: Path, write_point: Callable[..., Path], visit: Callable[..., dict[str, Any]]
) -> None:
    write_point(study, "mse", 4, 4, point="alone", layer_wbit="[4,3]", mean_wbit=3.1228)
    script = """
    const { x, row } = qexp.model("bits-dots").data;
    const at = row.indexOf(rowOf("alone"));
    await linger("3.123", "bits", "bits-dots", at);
    const pixel = (bits) => view("bits").frame.x_scale.compute(bits);
    const off = row.map((i, k) => Math.abs(pixel(x[k]) - pixel(qexp.rows[i].mean_wbit)));
    return { tip: tooltip(), alone: x[at], most: Math.max(...off), page: document.body.textContent };"""
    report = visit(write_dashboard(study), script)
    assert re.search(r"mean bits\W*weights 3.123, inputs 4", report["tip"]) and report["alone"] == 3.1228
    assert 1 < report["most"] < 10, "pixels"
    assert "dots at one width are drawn side by side" in report["page"]


def test_the_pareto_front_keeps_what_nothing_beats(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    script = "return { front: qexp.front([[3, 90], [1, 50], [2, 80], [2, 85], [4, 90], [5, 91]].map(([x, y]) => ({ x, y }))) };"
    front = visit(write_dashboard(study), script)["front"]
    assert [(dot["x"], dot["y"]) for dot in front] == [(1, 50), (2, 85), (3, 90), (5, 91)]


def test_evil_names_stay_text(
    tmp_path: Path, write_point: Callable[..., Path], visit: Callable[..., dict[str, Any]]
) -> None:
    evil = "<script>window.hit=1</script><img src=x onerror='window.hit=2'>"
    tex = r"$$\frac{1}{2}$$ \(x\)"
    folder = tmp_path / "s"
    for seed in (0, 1):
        point = write_point(
            folder, "mse", 4, 4, seed, model=evil, quant=evil, dataset=tex, diagnosis=[evil], error=evil
        )
        table = (point / "layers.csv").read_text().replace("layer1.0.conv1", f'"{evil}"').replace("layer1.1.conv1", tex)
        (point / "layers.csv").write_text(table)
    write_point(folder, tex, 8, 8, model=tex, quant=tex)
    script = """qexp.choose(rowOf("mse-w4a4-s0"), true); view("bits").el.scrollIntoView(); await wait(200);
    await linger("<img", "bits", "bits-dots", qexp.model("bits-dots").data.row.indexOf(rowOf("mse-w4a4-s1")));
    return { hit: window.hit ?? null, subtitle: text("subtitle"), images: document.images.length, tip: tooltip(),
      title: text("h-point"), plan: text("plan") };"""
    report = visit(write_dashboard(folder), script)
    assert (report["hit"], report["images"]) == (None, 0)
    assert evil in report["subtitle"]
    assert evil in report["plan"]
    assert "<img" in report["tip"]


def test_a_study_of_failures_only(
    tmp_path: Path, write_point: Callable[..., Path], visit: Callable[..., dict[str, Any]]
) -> None:
    nothing = dict.fromkeys(("value", "value_float", "drop", "ci_low", "ci_high", "metric", "mean_wbit", "bops"))
    write_point(tmp_path / "s", "mse", 4, 4, plain=True, status="failed", error="no data folder", **nothing)
    report = visit(write_dashboard(tmp_path / "s"), "return { failure: text('failure'), hint: text('hint-grid') };")
    assert "no data folder" in report["failure"]
    assert report["hint"] == "Nothing to show."


def test_dark_and_light_colour_the_axes(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    page = write_dashboard(study)
    script = """return { axis: qexp.model("bits").below[0].major_label_text_color,
      body: getComputedStyle(document.body).backgroundColor };"""
    light = visit(page, script, "--blink-settings=preferredColorScheme=1")
    dark = visit(page, script, "--blink-settings=preferredColorScheme=0")
    assert light["body"] != dark["body"]
    assert light["axis"] != dark["axis"]


def test_a_phone_shows_everything_without_sideways_scrolling(study: Path, visit: Callable[..., dict[str, Any]]) -> None:
    script = "return { page: document.documentElement.scrollWidth, window: innerWidth };"
    report = visit(write_dashboard(study), script, "--window-size=500,900")
    assert report["page"] <= report["window"] <= 500
