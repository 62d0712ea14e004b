"use strict";
// What every page has: its elements, light and dark, single keys, and following a run. Everything that comes from data
// is set as text or as an attribute of a fixed name; nothing is parsed as HTML.
const ffr = (() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const data = JSON.parse(byId("report-data").textContent);
  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // A browser may keep nothing for files.
  const stored = {
    get: (name, storage = "localStorage") => { try { return window[storage].getItem(name); } catch { return null; } },
    set: (name, value, storage = "localStorage") => { try { window[storage].setItem(name, value); } catch { /* gone */ } },
  };

  const onTheme = [];
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme ?? (prefersDark.matches ? "dark" : "light");
  function nameTheme() {
    byId("theme-name").textContent = theme() === "dark" ? "Light" : "Dark";
    onTheme.forEach((tell) => tell());
  }
  function toggleTheme() {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    stored.set("ffr-theme", root.dataset.theme);
    nameTheme();
  }
  if (["light", "dark"].includes(stored.get("ffr-theme"))) root.dataset.theme = stored.get("ffr-theme");
  prefersDark.addEventListener("change", nameTheme);
  byId("theme").addEventListener("click", toggleTheme);

  const actions = { t: toggleTheme };
  const keys = byId("keys");
  const single = byId("single-keys");
  if (keys) {
    single.checked = stored.get("ffr-single-keys") !== "off";
    single.addEventListener("change", () => stored.set("ffr-single-keys", single.checked ? "on" : "off"));
    byId("show-keys").addEventListener("click", () => keys.showModal());
    actions["?"] = () => keys.showModal();
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || keys?.open) return;
    if (event.target.matches("input:not([type=checkbox]), select, textarea")) return;
    if (single?.checked === false || !Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });

  // What is folded stays so when the page is loaded again.
  for (const fold of document.querySelectorAll("details[data-fold]")) {
    const name = `ffr-fold-${fold.dataset.fold}`;
    fold.open = stored.get(name, "sessionStorage") === "open";
    fold.addEventListener("toggle", () => stored.set(name, fold.open ? "open" : "", "sessionStorage"));
  }
  const follow = byId("follow");
  if (follow) {
    follow.addEventListener("click", () => {
      const isOn = follow.getAttribute("aria-pressed") !== "true";
      follow.setAttribute("aria-pressed", isOn);
      stored.set("ffr-follow", isOn ? "" : "off", "sessionStorage");
    });
    if (stored.get("ffr-follow", "sessionStorage") === "off") follow.setAttribute("aria-pressed", "false");
    setInterval(() => follow.getAttribute("aria-pressed") === "true" && location.reload(), 1000 * root.dataset.follow);
  }
  const parts = []; // of the page; each sets itself up
  function start() {
    parts.forEach((part) => part());
    nameTheme();
    byId("needs-script").remove();
    root.dataset.ready = "true";
  }
  return { byId, data, make, draw, stored, actions, onTheme, parts, start };
})();
