// Starts the page once the figures are loaded; handles every change of filter or selection.

qexp.refresh = () => {
  qexp.drawOverview();
  qexp.drawGrid();
  qexp.drawMethods();
  qexp.drawSeeds();
  qexp.drawCosts();
  qexp.drawBoard();
};

qexp.choose = (index, jump) => {
  qexp.selected = index;
  const row = qexp.rows[index];
  qexp.markBoard();
  qexp.drawRing();
  qexp.drawPoint();
  const pill = qexp.byId("pill");
  pill.hidden = Boolean(jump);
  pill.replaceChildren(`${qexp.title(row)}${qexp.finite(row.value) ? `  ${qexp.percent(row.value)}` : ""}  – see its layers ↓`);
  if (jump) qexp.byId("point").scrollIntoView();
  history.replaceState(null, "", `#${encodeURIComponent(row.point)}`);
};

// A click on a glyph of a figure.
qexp.tapped = (action, source, indices) => {
  const at = indices[0];
  source.selected.indices = [];
  if (action === "layer") return qexp.chooseRow(source.data.index[at]);
  const row = qexp.rows[source.data.row[at]];
  if (action === "tile") { qexp.view.width = row.width; qexp.drawMethods(); }
  return qexp.choose(row.index, false);
};

qexp.start = () => {
  const metric = qexp.metricName();
  for (const head of document.querySelectorAll(".metric")) head.textContent = metric[0].toUpperCase() + metric.slice(1);
  qexp.model("score").left[0].axis_label = metric;
  qexp.buildHead();
  qexp.buildFilters();
  qexp.buildOverview();
  qexp.buildCells();
  qexp.buildBoard();
  qexp.theme();
  qexp.refresh();
  qexp.dark.addEventListener("change", () => {
    qexp.theme();
    qexp.buildFilters();
    qexp.refresh();
    qexp.drawPoint();
  });
  const pill = qexp.byId("pill");
  pill.addEventListener("click", () => { pill.hidden = true; qexp.byId("point").scrollIntoView(); });
  const wanted = decodeURIComponent(location.hash.slice(1));
  const linked = qexp.rows.find((row) => row.point === wanted);
  const first = linked || qexp.rows[qexp.order[0]];
  if (first) { qexp.choose(first.index, Boolean(linked)); pill.hidden = true; }
  const left = qexp.rows.length - qexp.about.histograms;
  const about = qexp.about.layers < qexp.rows.length ? ` Layers are embedded for ${qexp.about.layers} of ${qexp.rows.length} points.` : "";
  qexp.fill("foot", `Made ${qexp.about.made} from the run folders.${about}${left > 0 && qexp.about.histograms ? ` Histograms are embedded for ${qexp.about.histograms} of ${qexp.rows.length} points.` : ""} Intervals are 95 %; shares in percent, their differences in percentage points, other scores in their own unit.`);
  document.documentElement.dataset.ready = "yes";
};
