// Comforts only: every page can be read and used without this file.
"use strict";

const root = document.documentElement;

// Theme: the server already wrote the chosen one into <html>; choosing another needs no reload.
document.querySelector("[data-theme-form]")?.addEventListener("submit", (event) => {
  const theme = event.submitter?.value;
  if (!theme) return;
  event.preventDefault();
  const life = theme === "system" ? 0 : 31536000;
  document.cookie = `bursar_theme=${theme}; path=/; max-age=${life}; samesite=lax`;
  if (theme === "system") delete root.dataset.theme;
  else root.dataset.theme = theme;
  const scheme = document.querySelector('meta[name="color-scheme"]');
  if (scheme) scheme.content = theme === "system" ? "light dark" : theme;
  for (const button of event.currentTarget.querySelectorAll("button")) {
    if (button.value === theme) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  event.currentTarget.closest("details").open = false;
});

// Menus close on Escape, on a click elsewhere, and when another opens.
const menus = document.querySelectorAll("details.menu");
const closeMenus = (except) => menus.forEach((menu) => { if (menu !== except) menu.open = false; });
document.addEventListener("click", (event) => closeMenus(event.target.closest("details.menu")));
document.addEventListener("keydown", (event) => {
  const open = document.querySelector("details.menu[open]");
  if (event.key === "Escape" && open) {
    open.open = false;
    open.querySelector("summary").focus();
  }
});

for (const button of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  });
}

// The chart: arrow keys or the pointer choose a day, whose row of the table is read out below.
const columns = document.querySelector("svg.columns");
const twin = document.querySelector("details.twin");
if (columns && twin) {
  const days = [...columns.querySelectorAll(".day")];
  const rows = [...twin.querySelectorAll("tbody tr")].reverse();
  const names = [...twin.querySelectorAll("thead th bdi")].map((name) => name.textContent);
  const sign = twin.querySelector("table").dataset.unit;
  const withUnit = (text) => sign === "$" ? text.replace(/\d/, "$$$&") : `${text} ${sign}`;
  const readout = document.querySelector(".readout");
  const words = (row) => {
    const cells = [...row.cells].map((cell) => cell.textContent.trim());
    const parts = cells.slice(3).map((text, at) => [names[at], text]).filter(([, text]) => text !== "–");
    const models = parts.map(([name, text]) => `${name} ${withUnit(text)}`).join(", ");
    return [`${cells[0]}: ${withUnit(cells[1])}`, `${cells[2]} requests${models && ": "}${models}`];
  };
  let chosen = -1;
  const choose = (at) => {
    chosen = Math.max(0, Math.min(days.length - 1, at));
    days.forEach((day, index) => day.classList.toggle("chosen", index === chosen));
    const [day, rest] = words(rows[chosen]);
    readout.querySelector("strong").textContent = day;
    readout.querySelector("span").textContent = rest;
    columns.setAttribute("aria-valuenow", chosen + 1);
    columns.setAttribute("aria-valuetext", `${day}, ${rest}`);
  };
  const attributes = { role: "slider", tabindex: "0", "aria-label": "Day", "aria-valuemin": "1", "aria-valuemax": days.length };
  for (const [name, value] of Object.entries(attributes)) columns.setAttribute(name, value);
  columns.querySelectorAll("title").forEach((title) => title.remove());
  readout.hidden = false;
  choose(days.length - 1);
  columns.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -7, PageUp: 7 }[event.key];
    const target = { Home: 0, End: days.length - 1 }[event.key] ?? (step && chosen + step);
    if (target === undefined) return;
    event.preventDefault();
    choose(target);
  });
  columns.addEventListener("pointermove", (event) => {
    const at = days.indexOf(event.target.closest(".day"));
    if (at >= 0 && at !== chosen) choose(at);
  });
  // Single keys count only while the chart's card has the focus, so that they disturb nobody's typing or speech.
  columns.closest(".trend").addEventListener("keydown", (event) => {
    if (event.key === "v" && !event.ctrlKey && !event.metaKey && !event.altKey) {
      twin.open = !twin.open;
      if (twin.open) twin.querySelector(".scroll").focus();
    }
  });
}
