// The rows: of predictions, or of groups of answers to one prompt.
ffr.parts.push(() => {
  const { byId, data, make, draw, actions } = ffr;
  const { rows, dialogues, images, faults, worstBelow, mostReward, components, areGroups } = data;
  const noun = areGroups ? "group" : "row";
  const Noun = areGroups ? "Group" : "Row";
  // What the list tells of a row, and of a group which answer is looked at.
  const measure = areGroups ? "score" : "f1";
  const chosen = new Map();
  const answersOf = (row) => row.group ?? [row];
  const answerOf = (row) => answersOf(row)[chosen.get(row) ?? 0];
  // Pictures are the largest part of the page: each batch of them is read when one of it is shown.
  const batches = [...document.getElementsByClassName("report-pictures")];
  const opened = new Map();
  function picture(at) {
    const batch = Math.floor(at / data.picturesInBatch);
    if (!opened.has(batch)) opened.set(batch, JSON.parse(batches[batch].textContent));
    return opened.get(batch)[at % data.picturesInBatch];
  }

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
      searched[index] = `#${row.line}\n${row.id}\n${row.query}\n${answersOf(row).map((one) => one.answer).join("\n")}`.toLowerCase();
    }
    return searched[index];
  }
  const matchesText = (index, text) =>
    searchText(index).includes(text) || textOfDialogue[rows[index].dialogue].includes(text);
  const turnsOf = (row) => dialogues[row.dialogue].turns.length;
  const isEmpty = (fragment) => !fragment.utterances.length && !fragment.images.length;
  const isOutside = (answer) => !isEmpty(answer.outside);
  const some = (has) => (row) => answersOf(row).some(has);
  const spread = (row) => {
    const scores = answersOf(row).map((one) => one.rewards.score ?? 0);
    return Math.max(...scores) - Math.min(...scores);
  };
  const TRAITS = {
    worst: (row) => row.rewards.f1 < worstBelow,
    malformed: some((answer) => answer.malformed),
    flat: (row) => answersOf(row).length > 1 && spread(row) === 0,
    empty: (row) => isEmpty(row.gold),
    outside: some(isOutside),
    unanswered: some((answer) => answer.error !== null),
    worse: (row) => row.other !== null && row.rewards.f1 < row.other.f1,
  };

  // ---- the list
  const meterOf = (share) => make("progress", { value: Math.min(1, Math.max(0, share)), "aria-hidden": "true" });
  const LABEL = areGroups ? "score " : "F1 ";
  const list = byId("rows");
  const links = rows.map((row, index) => {
    const imageCount = dialogues[row.dialogue].turns.reduce((sum, turn) => sum + (turn.images?.length ?? 0), 0);
    const badges = [];
    const bad = answersOf(row).filter((answer) => answer.fault);
    if (bad.length) badges.push(make("span", { class: "badge bad" }, icon("warning"), areGroups ? plural(bad.length, "fault") : faults[bad[0].fault].label));
    if (isEmpty(row.gold)) badges.push(make("span", { class: "badge" }, "empty gold"));
    if (areGroups && TRAITS.flat(row)) badges.push(make("span", { class: "badge" }, "no spread"));
    if (row.rewards.exact_match === 1) badges.push(make("span", { class: "badge" }, icon("hit"), "exact"));
    const link = make(
      "a",
      { href: `#row-${row.line}`, tabindex: "-1" },
      make("span", { class: "query", dir: "auto" }, row.query || "(no query)"),
      make("span", { class: "f1" }, make("small", null, LABEL), row.rewards[measure]?.toFixed(2) ?? "–", meterOf(row.rewards[measure] / (areGroups ? mostReward : 1) || 0)),
      make("span", { class: "meta" },
        [`#${row.line}`, row.id, `${plural(turnsOf(row), "turn")}, ${plural(imageCount, "image")}`].filter(Boolean).join(" · ")),
      badges.length ? make("span", { class: "badges" }, ...badges) : null,
    );
    link.dataset.index = index;
    return link;
  });
  const items = links.map((link) => make("li", null, link));
  const indexOfLine = new Map(rows.map((row, index) => [encodeURIComponent(row.line), index])); // as in an address

  // ---- filters
  const form = byId("filters");
  let shown = [];
  let current = -1;
  const gain = (row) => (row.other === null ? 0 : row.rewards.f1 - row.other.f1);
  const ORDERS = {
    file: (a, b) => a - b,
    worst: (a, b) => rows[a].rewards[measure] - rows[b].rewards[measure] || a - b,
    best: (a, b) => rows[b].rewards[measure] - rows[a].rewards[measure] || a - b,
    spread: (a, b) => spread(rows[b]) - spread(rows[a]) || a - b,
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
    const step = form.elements.step?.value ?? "";
    const traits = traitNames.filter((name) => form.elements[name].checked).map((name) => TRAITS[name]);
    shown = [];
    for (let index = 0; index < rows.length; index += 1) {
      const turns = turnsOf(rows[index]);
      if (step && rows[index].step !== step) continue;
      if (turns >= least && turns <= most && traits.every((has) => has(rows[index])) && (!text || matchesText(index, text)))
        shown.push(index);
    }
    if (form.elements.order.value !== "file") shown.sort(ORDERS[form.elements.order.value]);
    list.replaceChildren(...shown.map((index) => items[index]));
    byId("none").hidden = shown.length > 0;
    const all = plural(rows.length, noun);
    byId("count").textContent = shown.length === rows.length ? all : `${shown.length.toLocaleString("en")} of ${all}`;
    byId("reset").hidden = !(text || step || traits.length || form.elements.least.value || form.elements.most.value);
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
    if (areGroups) return answerTable(row);
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
  // The answers of a group, one below the other: what verl gave for each, and what it names.
  const NAMES = { ...Object.fromEntries(REWARDS), score: "Score", advantage: "Advantage" };
  function answerTable(row) {
    const names = Object.keys(row.group[0].rewards).filter((name) => row.group.some((answer) => name in answer.rewards));
    const own = names.findLastIndex((name) => name === "score" || name === "advantage") + 1;
    const values = (answer, some) => some.map((name) => make("td", null, answer.rewards[name]?.toFixed(3) ?? "–"));
    const ids = (fragment) => [fragment.utterances, fragment.images].map((some) => make("td", { class: "ids" }, ranges(some)));
    const lines = row.group.map((answer, at) => {
      const choose = make("button", { type: "button", "aria-pressed": answer === answerOf(row) ? "true" : "false" }, `Answer ${at + 1}`);
      choose.addEventListener("click", () => chooseAnswer(at));
      return make("tr", { class: answer === answerOf(row) ? "chosen" : null }, make("th", { scope: "row" }, choose),
        ...values(answer, names.slice(0, own)), ...ids(answer.predicted),
        make("td", { class: "ids" }, answer.fault ? make("span", { class: "badge bad" }, icon("warning"), faults[answer.fault]?.label ?? answer.fault) : ""),
        ...values(answer, names.slice(own)));
    });
    const told = names.map((name) => NAMES[name] ?? name.replaceAll("_", " "));
    const heads = [...told.slice(0, own), "Utterances", "Images", "Fault", ...told.slice(own)];
    const gold = make("tr", null, make("th", { scope: "row" }, "Gold"), ...names.slice(0, own).map(() => make("td")), ...ids(row.gold),
      make("td"), ...names.slice(own).map(() => make("td")));
    return make("div", { class: "scroll answers", tabindex: "0", role: "region", "aria-label": "Answers to this prompt" }, make("table", null,
      make("thead", null, make("tr", null, make("td"), ...heads.map((head) => make("th", { scope: "col", class: ["Utterances", "Images", "Fault"].includes(head) ? "ids" : null }, head)))), make("tbody", null, gold, ...lines)));
  }
  function chooseAnswer(at) {
    const row = rows[current];
    chosen.set(row, at % row.group.length);
    const isFocused = byId("inside").contains(document.activeElement);
    render(current);
    if (isFocused) byId("inside").querySelector(".answers .chosen button").focus();
  }
  function tally(kind, gold, predicted) {
    const hits = [...gold].filter((id) => predicted.has(id)).length;
    return { hit: hits, missed: gold.size - hits, wrong: predicted.size - hits, kind };
  }
  function fragmentTable(row) {
    if (areGroups) return null;
    const line = (label, fragment) =>
      make("tr", null, make("th", { scope: "row" }, label), make("td", null, ranges(fragment.utterances)), make("td", null, ranges(fragment.images)));
    return make("table", { class: "fragments" },
      make("thead", null, make("tr", null, make("th", null, make("span", { class: "unseen" }, "fragment")),
        make("th", { scope: "col" }, "utterances"), make("th", { scope: "col" }, "images"))),
      make("tbody", null, line("Gold", row.gold), line("Answer", row.predicted),
        row.other ? line(`${data.other}, F1 ${row.other.f1.toFixed(2)}`, row.other.predicted) : null));
  }
  // Gold above, an answer below, or each of a group's; one column a turn.
  function fragmentMap(turns, row, gold) {
    const step = 1000 / turns.length;
    const lanes = answersOf(row).map((answer) => new Set(answer.predicted.utterances));
    const height = 22 * (lanes.length + 1) - 4;
    const svg = draw("svg", { class: "map", viewBox: `0 0 1000 ${height}`, height, preserveAspectRatio: "none" });
    turns.forEach((turn, at) => {
      const place = { x: at * step, width: Math.max(1, step - Math.min(3, step / 4)), height: 18 };
      const marks = lanes.map((predicted) => markOf(turn.id, gold, predicted));
      const title = lanes.length > 1 ? ` in ${marks.filter((one) => one === "hit" || one === "wrong").length} of ${lanes.length} answers` : marks[0] ? `: ${LABELS[marks[0]].toLowerCase()}` : "";
      const column = draw("g", null, draw("title", null, `turn ${turn.id}${title}`),
        draw("rect", { ...place, y: 0, class: gold.has(turn.id) ? "gold" : "cell" }),
        ...lanes.map((predicted, lane) => draw("rect", { ...place, y: 22 * (lane + 1), class: predicted.has(turn.id) ? `answer ${marks[lane]}` : "cell" })));
      column.addEventListener("click", () => showTurn(at));
      svg.append(column);
    });
    const labels = ["gold", ...lanes.map((lane, at) => (lanes.length > 1 ? `answer ${at + 1}` : "answer"))];
    return make("div", { class: "overview", "aria-hidden": "true" }, make("div", { class: "lanes" }, ...labels.map((label) => make("span", null, label))), svg);
  }
  function figureOf(image, kind) {
    const found = image.at === null ? { name: "", problem: "the row has no path for it" } : images[image.at];
    let shownAs = null;
    if (areGroups && image.at === null) {
      // verl's dumps name no images
    } else if (found.problem) {
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
    const { fault } = answerOf(row);
    return `${Noun} ${row.line}, ${LABEL}${row.rewards[measure]?.toFixed(2)}${fault ? `, ${faults[fault]?.label ?? fault}` : ""}. ${counts}. Query: ${row.query}`;
  }
  let marked = [];
  function named(row, id, kind) {
    if (!areGroups || row.group.length < 2 || !kind) return null;
    return make("span", null, `in ${row.group.filter((answer) => answer.predicted.utterances.includes(id)).length} of ${row.group.length} answers`);
  }
  function render(index) {
    const row = rows[index];
    const answer = answerOf(row);
    const dialogue = dialogues[row.dialogue];
    const gold = { utterances: new Set(row.gold.utterances), images: new Set(row.gold.images) };
    const predicted = { utterances: new Set(answer.predicted.utterances), images: new Set(answer.predicted.images) };
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
          showsSpeaker ? make("div", { class: "who" }, turn.speaker, marks[at] ? mark(marks[at]) : null, named(row, turn.id, marks[at])) : null,
          turn.text ? make("p", { dir: "auto" }, turn.text) : null,
          turn.images ? make("div", { class: "pictures" }, ...turn.images.map((image, number) => figureOf(image, kinds[number]))) : null));
    });

    const notes = [];
    if (answer.fault) notes.push(make("p", { class: "fault" }, icon("warning"), make("span", null, make("b", null, `${faults[answer.fault]?.label ?? answer.fault}: `),
      faults[answer.fault]?.meaning, answer.error === null ? "" : ` ${answer.error}`, answer.malformed && !areGroups ? " The rewards count the answer as nothing; the marks below show what can be read in it." : "")));
    if (isOutside(answer)) notes.push(make("p", { class: "fault" }, icon("wrong"), make("span", null, make("b", null, "Outside the dialogue: "),
      [["utterances", answer.outside.utterances], ["images", answer.outside.images]].filter(([, ids]) => ids.length).map(([name, ids]) => `${name} ${ids.join(", ")}`).join("; "))));
    if (dialogue.problem) notes.push(make("p", { class: "fault" }, icon("warning"), make("span", null, make("b", null, "The dialogue cannot be read: "), dialogue.problem)));

    const tallies = [tally("utterances", gold.utterances, predicted.utterances), tally("images", gold.images, predicted.images)];
    const legend = make("p", { class: "keys-of-marks" }, ...["hit", "missed", "wrong"].flatMap((kind) => [mark(kind),
      make("span", { class: "quiet" }, tallies.map((one) => plural(one[kind], one.kind.slice(0, -1))).join(", "))]));
    byId("inside").replaceChildren(...[
      make("h2", { id: "query" }, make("small", null, "Query"), row.query || "(no query)"),
      ...notes,
      rewardList(row),
      fragmentTable(row),
      make("details", { class: "raw", open: answer.malformed }, make("summary", null, areGroups ? `Answer ${answersOf(row).indexOf(answer) + 1} as written` : "The answer as written"),
        make("pre", { tabindex: "0", dir: "auto" }, answer.answer || "(nothing)"), make("pre", { tabindex: "0" }, `gold: ${row.goldAnswer}`),
        row.other ? make("pre", { tabindex: "0", dir: "auto" }, `${data.other}: ${row.other.answer || "(nothing)"}`) : null),
      legend,
      turns.length ? fragmentMap(dialogue.turns, row, gold.utterances) : null,
      turns.length ? make("ol", { class: "chat", id: "chat", "aria-label": "The dialogue" }, ...turns) : make("pre", null, dialogue.text),
    ].filter((part) => part !== null));
    byId("where").replaceChildren(make("a", { href: `#row-${row.line}`, title: "link to this row" }, `${Noun} ${row.line}`), row.id ? ` · ${row.id}` : "");
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

  // ---- keys, links
  Object.assign(actions, {
    j: () => step(1),
    k: () => step(-1),
    n: () => nextMarked(1),
    p: () => nextMarked(-1),
    o: () => byId("only-marked").click(),
    "/": () => form.elements.text.focus(),
    l: () => list.querySelector('a[tabindex="0"]')?.focus(),
    d: () => panel.focus(),
  });
  if (areGroups) actions.a = () => chooseAnswer((chosen.get(rows[current]) ?? 0) + 1);
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.key === "Escape" && isTyping && !byId("keys").open) list.querySelector('a[tabindex="0"]')?.focus();
  });
  for (const link of document.querySelectorAll("a.skip")) {
    link.addEventListener("click", (event) => {
      event.preventDefault(); // keeps the row's address
      const target = link.hash === "#rows" ? list.querySelector('a[tabindex="0"]') : byId(link.hash.slice(1));
      target?.focus();
    });
  }
  function fromAddress(isReloaded = false) {
    const index = indexOfLine.get(location.hash.replace("#row-", ""));
    if (location.hash.startsWith("#row-") && index !== undefined) {
      select(index, { remember: false, announce: !isReloaded });
      if (isReloaded) return true; // the browser goes back to where it was
      byId("dialogues").scrollIntoView({ block: "start" });
      if (narrow.matches) panel.scrollIntoView({ block: "start" });
      return true;
    }
    return false;
  }
  addEventListener("hashchange", () => fromAddress());

  if (!fromAddress(performance.getEntriesByType("navigation")[0]?.type === "reload")) select(0, { remember: false, announce: false });
  applyFilters();
});
