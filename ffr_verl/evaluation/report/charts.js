// The curves, drawn by uPlot. One cursor goes through all charts, by the pointer or by the arrow keys.
ffr.parts.push(() => {
  const { data, make } = ffr;
  const probe = make("i", { hidden: true });
  document.body.append(probe);
  function colour(name) {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  }
  const told = (value) => {
    if (value === null || value === undefined) return "–";
    return value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4) ? String(Number(value.toFixed(4))) : value.toPrecision(3);
  };
  // The value at a step, or the last one before it: not every step is validated, and not every run is as long.
  function known(plot, value, at, index) {
    let before = index;
    while (before > 0 && plot.data[at][before] === null) before -= 1;
    return told(index === null ? null : plot.data[at][before]);
  }
  const drawn = new Map();
  const seen = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const plot = drawn.get(target);
      if (plot && contentRect.width && plot.width !== contentRect.width) plot.setSize({ width: contentRect.width, height: plot.height });
    }
  });
  function show(place) {
    const chart = data.charts[place.dataset.chart];
    const columns = [chart.x];
    const series = [{ label: "step", value: (plot, value) => told(value) }];
    const bands = [];
    const dots = (values) => ({ show: values.filter((value) => value !== null).length < 40, size: 5 });
    for (const one of chart.series) {
      const ink = colour(`c${one.colour}`);
      columns.push(one.y);
      series.push({ label: one.name, stroke: ink, width: 2, spanGaps: true, dash: one.heldOut ? [7, 4] : undefined,
        points: dots(one.y), value: known });
      if (one.band) {
        columns.push(...one.band);
        for (const name of ["low", "high"]) series.push({ label: name, class: "edge", width: 0, spanGaps: true, points: { show: false } });
        bands.push({ series: [series.length - 1, series.length - 2], fill: ink.replace("rgb(", "rgba(").replace(")", ", 0.16)") });
      }
    }
    const axis = { stroke: colour("quiet"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1 },
      font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 20, labelGap: 2 };
    const caption = place.nextElementSibling;
    caption.replaceChildren();
    place.replaceChildren();
    const last = (plot) => { if (plot.cursor.idx === null || plot.cursor.idx === undefined) plot.setLegend({ idx: chart.x.length - 1 }, false); };
    const plot = new uPlot({
      width: place.clientWidth, height: 220, series, bands,
      scales: { x: { time: false } },
      axes: [{ ...axis, label: "step", size: 34, space: 36, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5] },
        { ...axis, label: chart.axis, size: 52, space: 36, values: (self, ticks) => ticks.map((tick) => (Math.abs(tick) >= 1e4 || (tick && Math.abs(tick) < 1e-3) ? tick.toExponential(0) : String(tick))) }],
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, y: false },
      legend: { live: true, mount: (self, legend) => caption.append(legend), markers: { width: 0, fill: (self, at) => (at ? series[at].stroke : null), } },
      hooks: { ready: [last], setCursor: [last] },
    }, columns, place);
    drawn.set(place, plot);
    seen.observe(place);
  }
  const places = [...document.getElementsByClassName("plot")];
  const isShown = (place) => place.closest("details:not([open])") === null;
  for (const place of places) {
    for (const [name, value] of [["role", "img"], ["tabindex", "0"], ["aria-label", `${data.charts[place.dataset.chart].title}. ${place.textContent}`]]) place.setAttribute(name, value);
    place.addEventListener("keydown", (event) => {
      const plot = drawn.get(place);
      const x = plot.data[0];
      const at = plot.cursor.idx ?? x.length - 1;
      const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: x.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      plot.setCursor({ left: plot.valToPos(x[Math.min(x.length - 1, Math.max(0, next))], "x"), top: 10 }, true, true);
    });
  }
  for (const fold of document.querySelectorAll("details[data-fold]")) {
    fold.addEventListener("toggle", () => places.filter((place) => fold.contains(place) && isShown(place) && !drawn.has(place)).forEach(show));
  }
  // Colours are the theme's.
  ffr.onTheme.push(() => {
    for (const place of places) {
      drawn.get(place)?.destroy();
      drawn.delete(place);
      if (isShown(place)) show(place);
    }
  });
});
