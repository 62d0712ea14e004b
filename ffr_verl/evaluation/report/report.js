"use strict";
// Everything that comes from data is set as text or as an attribute of a fixed name; nothing is parsed as HTML.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  const { rows, dialogues, images, faults, worstBelow, mostReward, components } = data;
  // Pictures are the largest part of the page: each batch of them is read when one of it is shown.
  const batches = [...document.getElementsByClassName("report-pictures")];
  const opened = new Map();
  function picture(at) {
    const batch = Math.floor(at / data.picturesInBatch);
    if (!opened.has(batch)) opened.set(batch, JSON.parse(batches[batch].textContent));
    return opened.get(batch)[at % data.picturesInBatch];
  }

  const SVG = "http://www.w3.org/2000/svg";
  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const icon = (name) =>
    draw("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, draw("use", { href: `#icon-${name}` }));
  const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

  const LABELS = { hit: "Found", missed: "Missed", wrong: "Wrong" };
  const MEANINGS = {
    hit: "in the gold fragment and in the answer",
    missed: "in the gold fragment, not in the answer",
    wrong: "in the answer, not in the gold fragment",
  };
  const mark = (kind) => make("span", { class: `mark ${kind}`, title: MEANINGS[kind] }, icon(kind), LABELS[kind]);
  const markOf = (id, gold, predicted) =>
    gold.has(id) ? (predicted.has(id) ? "hit" : "missed") : predicted.has(id) ? "wrong" : null;

  // ---- what the list and the filters need to know of a row
  const searched = new Array(rows.length);
  const textOfDialogue = new Array(dialogues.length);
  function searchText(index) {
    if (searched[index] === undefined) {
      const row = rows[index];
      const dialogue = dialogues[row.dialogue];
      textOfDialogue[row.dialogue] ??= (dialogue.text ?? dialogue.turns.map((turn) => turn.text).join("\n")).toLowerCase();
      searched[index] = `#${row.line}\n${row.id}\n${row.query}\n${row.answer}`.toLowerCase();
    }
    return searched[index];
  }
  const matchesText = (index, text) =>
    searchText(index).includes(text) || textOfDialogue[rows[index].dialogue].includes(text);
  const turnsOf = (row) => dialogues[row.dialogue].turns.length;
  const isEmpty = (fragment) => !fragment.utterances.length && !fragment.images.length;
  const isOutside = (row) => !isEmpty(row.outside);
  const TRAITS = {
    worst: (row) => row.rewards.f1 < worstBelow,
    malformed: (row) => row.malformed,
    empty: (row) => isEmpty(row.gold),
    outside: isOutside,
    unanswered: (row) => row.error !== null,
    worse: (row) => row.other !== null && row.rewards.f1 < row.other.f1,
  };

  // ---- the list
  function meterOf(share) {
    const inner = make("i");
    inner.style.setProperty("--share", Math.min(1, Math.max(0, share)));
    return make("span", { class: "meter", "aria-hidden": "true" }, inner);
  }
  const list = byId("rows");
  const links = rows.map((row, index) => {
    const imageCount = dialogues[row.dialogue].turns.reduce((sum, turn) => sum + (turn.images?.length ?? 0), 0);
    const badges = [];
    if (row.fault) badges.push(make("span", { class: "badge bad" }, icon("warning"), faults[row.fault].label));
    if (isEmpty(row.gold)) badges.push(make("span", { class: "badge" }, "empty gold"));
    if (row.rewards.exact_match === 1) badges.push(make("span", { class: "badge" }, icon("hit"), "exact"));
    const link = make(
      "a",
      { href: `#row-${row.line}`, tabindex: "-1" },
      make("span", { class: "query", dir: "auto" }, row.query || "(no query)"),
      make("span", { class: "f1" }, make("small", null, "F1 "), row.rewards.f1.toFixed(2), meterOf(row.rewards.f1)),
      make("span", { class: "meta" },
        `#${row.line} · ${row.id} · ${plural(turnsOf(row), "turn")}, ${plural(imageCount, "image")}`),
      badges.length ? make("span", { class: "badges" }, ...badges) : null,
    );
    link.dataset.index = index;
    return link;
  });
  const items = links.map((link) => make("li", null, link));
  const indexOfLine = new Map(rows.map((row, index) => [String(row.line), index]));

  // ---- filters
  const form = byId("filters");
  let shown = [];
  let current = -1;
  const gain = (row) => (row.other === null ? 0 : row.rewards.f1 - row.other.f1);
  const ORDERS = {
    file: (a, b) => a - b,
    worst: (a, b) => rows[a].rewards.f1 - rows[b].rewards.f1 || a - b,
    best: (a, b) => rows[b].rewards.f1 - rows[a].rewards.f1 || a - b,
    worse: (a, b) => gain(rows[a]) - gain(rows[b]) || a - b,
    longest: (a, b) => turnsOf(rows[b]) - turnsOf(rows[a]) || a - b,
  };
  const traitNames = Object.keys(TRAITS).filter((name) => form.elements[name]);
  for (const name of traitNames) {
    byId(`count-${name}`).textContent = rows.filter(TRAITS[name]).length.toLocaleString("en");
  }
  function applyFilters() {
    const text = form.elements.text.value.trim().toLowerCase();
    const least = form.elements.least.value === "" ? 0 : Number(form.elements.least.value);
    const most = form.elements.most.value === "" ? Infinity : Number(form.elements.most.value);
    const traits = traitNames.filter((name) => form.elements[name].checked).map((name) => TRAITS[name]);
    shown = [];
    for (let index = 0; index < rows.length; index += 1) {
      const turns = turnsOf(rows[index]);
      if (turns >= least && turns <= most && traits.every((has) => has(rows[index])) && (!text || matchesText(index, text)))
        shown.push(index);
    }
    if (form.elements.order.value !== "file") shown.sort(ORDERS[form.elements.order.value]);
    list.replaceChildren(...shown.map((index) => items[index]));
    byId("none").hidden = shown.length > 0;
    const all = plural(rows.length, "row");
    byId("count").textContent = shown.length === rows.length ? all : `${shown.length.toLocaleString("en")} of ${all}`;
    byId("reset").hidden = !(text || traits.length || form.elements.least.value || form.elements.most.value);
    list.scrollTop = 0;
    if (shown.length && !shown.includes(current)) select(shown[0], { announce: false });
    setTabStop();
    updateNeighbours();
    showInList();
  }
  // One row of the list is in the tab order; arrow keys go from there.
  function setTabStop() {
    for (const link of list.querySelectorAll('a[tabindex="0"]')) link.tabIndex = -1;
    const at = shown.includes(current) ? current : shown[0];
    if (at !== undefined) links[at].tabIndex = 0;
  }
  let waiting = 0;
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    if (["worst", "worse"].includes(event.target.name) && event.target.checked && form.elements.order.value === "file")
      form.elements.order.value = event.target.name;
    if (event.target.name === "text") waiting = setTimeout(applyFilters, 60);
    else applyFilters();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    event.preventDefault();
    clearTimeout(waiting);
    applyFilters();
    if (shown.length) select(shown[0], { focusList: true });
  });
  byId("reset").addEventListener("click", () => {
    form.reset();
    applyFilters();
    form.elements.text.focus();
  });

  // ---- one dialogue
  const panel = byId("dialogue");
  const narrow = matchMedia("(max-width: 900px)");
  function ranges(ids) {
    const parts = [];
    for (let at = 0; at < ids.length; ) {
      let end = at;
      while (end + 1 < ids.length && ids[end + 1] === ids[end] + 1) end += 1;
      parts.push(end > at + 1 ? `${ids[at]}–${ids[end]}` : ids.slice(at, end + 1).join(", "));
      at = end + 1;
    }
    return parts.length ? `${parts.join(", ")} (${ids.length})` : "none";
  }
  const REWARDS = [
    ["score", "Reward"], ["f1", "F1"], ["f1_utterances", "F1 utterances"], ["f1_images", "F1 images"],
    ["coherence", "Coherence"], ["format", "Format"], ["exact_match", "Exact match"], ["mcc", "MCC"],
  ];
  function rewardList(row) {
    const boxes = [...REWARDS, ...components.map((name) => [name, name])].map(([name, label]) => {
      const isLeftOut = row.rewards[name] === undefined;
      const value = row.rewards[name];
      return make("div", null,
        make("dt", null, label),
        make("dd", isLeftOut ? { class: "quiet", title: name === "coherence" ? "give --embeddings" : "the dialogue could not be read" } : null,
          isLeftOut ? "–" : value.toFixed(3)),
        isLeftOut ? null : meterOf(value / (name === "score" ? mostReward : 1)));
    });
    return make("dl", { class: "rewards" }, ...boxes);
  }
  function tally(kind, gold, predicted) {
    const hits = [...gold].filter((id) => predicted.has(id)).length;
    return { hit: hits, missed: gold.size - hits, wrong: predicted.size - hits, kind };
  }
  function fragmentTable(row) {
    const line = (label, fragment) =>
      make("tr", null, make("th", { scope: "row" }, label), make("td", null, ranges(fragment.utterances)), make("td", null, ranges(fragment.images)));
    return make("table", { class: "fragments" },
      make("thead", null, make("tr", null, make("th", null, make("span", { class: "unseen" }, "fragment")),
        make("th", { scope: "col" }, "utterances"), make("th", { scope: "col" }, "images"))),
      make("tbody", null, line("Gold", row.gold), line("Answer", row.predicted),
        row.other ? line(`${data.other}, F1 ${row.other.f1.toFixed(2)}`, row.other.predicted) : null));
  }
  // Gold above, answer below, one column a turn.
  function fragmentMap(turns, marks, gold, predicted) {
    const step = 1000 / turns.length;
    const svg = draw("svg", { class: "map", viewBox: "0 0 1000 40", preserveAspectRatio: "none" });
    turns.forEach((turn, at) => {
      const place = { x: at * step, width: Math.max(1, step - Math.min(3, step / 4)), height: 18 };
      const column = draw("g", null,
        draw("title", null, `turn ${turn.id}${marks[at] ? `: ${LABELS[marks[at]].toLowerCase()}` : ""}`),
        draw("rect", { ...place, y: 0, class: gold.has(turn.id) ? "gold" : "cell" }),
        draw("rect", { ...place, y: 22, class: predicted.has(turn.id) ? `answer ${marks[at]}` : "cell" }));
      column.addEventListener("click", () => showTurn(at));
      svg.append(column);
    });
    return make("div", { class: "overview", "aria-hidden": "true" }, make("span", null, "gold"), make("span", null, "answer"), svg);
  }
  function figureOf(image, kind) {
    const found = image.at === null ? { name: "", problem: "the row has no path for it" } : images[image.at];
    let shownAs;
    if (found.problem) {
      shownAs = make("div", { class: "absent" }, make("b", null, "No picture"), make("span", null, found.problem), make("span", null, found.name));
    } else {
      const { src, width, height } = picture(found.picture);
      shownAs = make("img", { src, width, height, alt: image.caption || `image ${image.id}`, title: found.name });
    }
    return make("figure", { class: `picture ${kind ?? ""}` }, shownAs,
      make("figcaption", null, `image ${image.id}`, kind ? mark(kind) : null,
        image.caption ? make("span", { dir: "auto" }, image.caption) : null));
  }
  function spoken(row, tallies) {
    const counts = tallies.map((one) => `${one.missed} ${one.kind} missed, ${one.wrong} wrong`).join("; ");
    return `Row ${row.line}, F1 ${row.rewards.f1.toFixed(2)}${row.fault ? `, ${faults[row.fault].label}` : ""}. ${counts}. Query: ${row.query}`;
  }
  let marked = [];
  function render(index) {
    const row = rows[index];
    const dialogue = dialogues[row.dialogue];
    const gold = { utterances: new Set(row.gold.utterances), images: new Set(row.gold.images) };
    const predicted = { utterances: new Set(row.predicted.utterances), images: new Set(row.predicted.images) };
    const marks = dialogue.turns.map((turn) => markOf(turn.id, gold.utterances, predicted.utterances));
    const speakers = [...new Set(dialogue.turns.map((turn) => turn.speaker))];
    marked = [];
    let before = null;
    const turns = dialogue.turns.map((turn, at) => {
      const kinds = (turn.images ?? []).map((image) => markOf(image.id, gold.images, predicted.images));
      const hasMark = marks[at] !== null || kinds.some((kind) => kind !== null);
      if (hasMark) marked.push(at);
      const showsSpeaker = turn.speaker !== before || marks[at] !== null;
      before = turn.speaker;
      const classes = ["turn", speakers.indexOf(turn.speaker) === 1 ? "right" : "", marks[at] ?? "", hasMark ? "has-mark" : ""];
      return make("li", { class: classes.join(" "), tabindex: "-1" },
        make("span", { class: "id", title: `utterance ${turn.id}` }, String(turn.id)),
        make("div", { class: "bubble" },
          showsSpeaker ? make("div", { class: "who" }, turn.speaker, marks[at] ? mark(marks[at]) : null) : null,
          turn.text ? make("p", { dir: "auto" }, turn.text) : null,
          turn.images ? make("div", { class: "pictures" }, ...turn.images.map((image, number) => figureOf(image, kinds[number]))) : null));
    });

    const notes = [];
    if (row.fault) notes.push(make("p", { class: "fault" }, icon("warning"), make("span", null, make("b", null, `${faults[row.fault].label}: `),
      faults[row.fault].meaning, row.error === null ? "" : ` ${row.error}`, row.malformed ? " The rewards count the answer as nothing; the marks below show what can be read in it." : "")));
    if (isOutside(row)) notes.push(make("p", { class: "fault" }, icon("wrong"), make("span", null, make("b", null, "Outside the dialogue: "),
      [["utterances", row.outside.utterances], ["images", row.outside.images]].filter(([, ids]) => ids.length).map(([name, ids]) => `${name} ${ids.join(", ")}`).join("; "))));
    if (dialogue.problem) notes.push(make("p", { class: "fault" }, icon("warning"), make("span", null, make("b", null, "The dialogue cannot be read: "), dialogue.problem)));

    const tallies = [tally("utterances", gold.utterances, predicted.utterances), tally("images", gold.images, predicted.images)];
    const legend = make("p", { class: "keys-of-marks" }, ...["hit", "missed", "wrong"].flatMap((kind) => [mark(kind),
      make("span", { class: "quiet" }, tallies.map((one) => plural(one[kind], one.kind.slice(0, -1))).join(", "))]));
    byId("inside").replaceChildren(...[
      make("h2", { id: "query" }, make("small", null, "Query"), row.query || "(no query)"),
      ...notes,
      rewardList(row),
      fragmentTable(row),
      make("details", { class: "raw", open: row.malformed }, make("summary", null, "The answer as written"),
        make("pre", { tabindex: "0", dir: "auto" }, row.answer || "(nothing)"), make("pre", { tabindex: "0" }, `gold: ${row.goldAnswer}`),
        row.other ? make("pre", { tabindex: "0", dir: "auto" }, `${data.other}: ${row.other.answer || "(nothing)"}`) : null),
      legend,
      turns.length ? fragmentMap(dialogue.turns, marks, gold.utterances, predicted.utterances) : null,
      turns.length ? make("ol", { class: "chat", id: "chat", "aria-label": "The dialogue" }, ...turns) : make("pre", null, dialogue.text),
    ].filter((part) => part !== null));
    byId("where").replaceChildren(make("a", { href: `#row-${row.line}`, title: "link to this row" }, `Row ${row.line}`), ` · ${row.id}`);
    return tallies;
  }
  function showTurn(at) {
    const turn = byId("chat").children[at];
    turn.scrollIntoView({ block: "center" });
    turn.focus({ preventScroll: true });
  }
  function nextMarked(direction) {
    if (!marked.length) return;
    const turns = [...byId("chat").children];
    const at = turns.indexOf(document.activeElement?.closest?.(".turn"));
    const ahead = direction > 0 ? marked.find((one) => one > at) : marked.findLast((one) => one < at);
    showTurn(ahead ?? (direction > 0 ? marked[0] : marked.at(-1)));
  }

  function updateNeighbours() {
    const at = shown.indexOf(current);
    byId("previous").disabled = at <= 0;
    byId("next").disabled = !shown.length || at === shown.length - 1;
  }
  // Scrolls the list alone; scrollIntoView would move the page too. Rows have their true heights some frames after they
  // came into view, so it is done again.
  function showInList(frames = 4) {
    const item = items[current];
    if (!item?.isConnected) return;
    const above = item.offsetTop - list.offsetTop;
    if (above < list.scrollTop) list.scrollTop = above;
    else if (above + item.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = above + item.offsetHeight - list.clientHeight;
    if (frames > 0) requestAnimationFrame(() => showInList(frames - 1));
  }
  function select(index, { focusList = false, remember = true, reveal = false, announce = true } = {}) {
    if (current >= 0) links[current].removeAttribute("aria-current");
    current = index;
    links[index].setAttribute("aria-current", "true");
    const tallies = render(index);
    if (announce) byId("said").textContent = spoken(rows[index], tallies);
    panel.scrollTop = 0;
    setTabStop();
    updateNeighbours();
    if (remember && location.hash !== `#row-${rows[index].line}`) history.replaceState(null, "", `#row-${rows[index].line}`);
    showInList();
    if (focusList) links[index].focus({ preventScroll: true });
    if (reveal && narrow.matches) panel.scrollIntoView({ block: "start" });
  }
  function step(direction) {
    if (!shown.length) return;
    const at = shown.indexOf(current);
    const next = at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + direction));
    select(shown[next], { focusList: list.contains(document.activeElement) });
  }
  list.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault(); // the browser would scroll the page to the row in the list
    select(Number(link.dataset.index), { focusList: true, reveal: true });
  });
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -shown.length, End: shown.length };
    if (event.key in moves) {
      event.preventDefault();
      step(moves[event.key]);
    } else if (event.key === "Enter") {
      event.preventDefault();
      panel.focus();
      if (narrow.matches) panel.scrollIntoView({ block: "start" });
    }
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("next-marked").addEventListener("click", () => nextMarked(1));
  byId("only-marked").addEventListener("change", (event) => panel.classList.toggle("only-marked", event.target.checked));

  // ---- keys, theme, links
  const keys = byId("keys");
  const root = document.documentElement;
  const stored = { get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
    set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* a browser may keep nothing for files */ } } };
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme ?? (prefersDark.matches ? "dark" : "light");
  function nameTheme() {
    byId("theme-name").textContent = theme() === "dark" ? "Light" : "Dark";
  }
  function toggleTheme() {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    stored.set("ffr-theme", root.dataset.theme);
    nameTheme();
  }
  if (["light", "dark"].includes(stored.get("ffr-theme"))) root.dataset.theme = stored.get("ffr-theme");
  nameTheme();
  prefersDark.addEventListener("change", nameTheme);
  byId("theme").addEventListener("click", toggleTheme);
  byId("show-keys").addEventListener("click", () => keys.showModal());
  const single = byId("single-keys");
  single.checked = stored.get("ffr-single-keys") !== "off";
  single.addEventListener("change", () => stored.set("ffr-single-keys", single.checked ? "on" : "off"));

  const ACTIONS = {
    j: () => step(1),
    k: () => step(-1),
    n: () => nextMarked(1),
    p: () => nextMarked(-1),
    o: () => byId("only-marked").click(),
    "/": () => form.elements.text.focus(),
    l: () => list.querySelector('a[tabindex="0"]')?.focus(),
    d: () => panel.focus(),
    t: toggleTheme,
    "?": () => keys.showModal(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || keys.open) return;
    const isTyping = event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.key === "Escape" && isTyping) list.querySelector('a[tabindex="0"]')?.focus();
    if (isTyping || !single.checked || !Object.hasOwn(ACTIONS, event.key)) return;
    event.preventDefault();
    ACTIONS[event.key]();
  });
  for (const link of document.querySelectorAll("a.skip")) {
    link.addEventListener("click", (event) => {
      event.preventDefault(); // keeps the row's address
      const target = link.hash === "#rows" ? list.querySelector('a[tabindex="0"]') : byId(link.hash.slice(1));
      target?.focus();
    });
  }
  function fromAddress() {
    const index = indexOfLine.get(location.hash.replace("#row-", ""));
    if (location.hash.startsWith("#row-") && index !== undefined) {
      select(index, { remember: false });
      byId("dialogues").scrollIntoView({ block: "start" });
      if (narrow.matches) panel.scrollIntoView({ block: "start" });
      return true;
    }
    return false;
  }
  addEventListener("hashchange", fromAddress);

  if (!fromAddress()) select(0, { remember: false, announce: false });
  applyFilters();
  byId("needs-script").remove();
  root.dataset.ready = "true";
})();
