"use strict";

/* Tables: a click on a heading sorts, a second one turns the order round, a third brings the first order back. */
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  heads.forEach((head, place) => {
    const numeric = head.classList.contains("number");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    const first = numeric ? "descending" : "ascending";
    const second = numeric ? "ascending" : "descending";
    const next = { none: first, [first]: second, [second]: "none" };
    button.addEventListener("click", () => {
      const order = next[head.getAttribute("aria-sort")];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order);
      body.append(...(order === "none" ? original : sorted(original, place, numeric, order === "ascending" ? 1 : -1)));
    });
  });
}

function sorted(rows, place, numeric, sign) {
  const value = (row) => {
    const cell = row.cells[place];
    if (!numeric) return cell.textContent.trim();
    const text = cell.dataset.number;
    return text === "" ? NaN : Number(text.replace("inf", "Infinity"));
  };
  const keyed = rows.map((row) => [value(row), row]);
  keyed.sort(([a], [b]) => {
    if (!numeric) return sign * a.localeCompare(b, undefined, { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  });
  return keyed.map(([, row]) => row);
}

/* Tables of many rows: a box that keeps the rows whose name has the words. */
for (const holder of document.querySelectorAll("[data-filter]")) {
  const rows = [...holder.querySelector("tbody").rows];
  const bar = document.createElement("div");
  const label = document.createElement("label");
  const input = document.createElement("input");
  const status = document.createElement("span");
  bar.className = "filter";
  label.htmlFor = input.id = "filter";
  label.textContent = holder.dataset.filter;
  input.type = "search";
  status.setAttribute("role", "status");
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    const shown = rows.filter((row) => !row.hidden).length;
    status.textContent = wanted ? `${shown} of ${rows.length}` : "";
  });
  bar.append(label, input, status);
  holder.prepend(bar);
}

/* A link to the page of a layer unfolds it. */
function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  const page = target && target.closest("details");
  if (page && !page.open) {
    page.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", unfold);
unfold();

/* Paper shows what is folded. */
addEventListener("beforeprint", () => {
  for (const page of document.querySelectorAll("details:not([open])")) {
    page.open = true;
    page.dataset.folded = "";
  }
});
addEventListener("afterprint", () => {
  for (const page of document.querySelectorAll("details[data-folded]")) {
    page.open = false;
    delete page.dataset.folded;
  }
});

/* Light or dark: as the system has it, until the button says otherwise. */
const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const say = () => { theme.textContent = dark() ? "Light colours" : "Dark colours"; };
theme.hidden = false;
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  say();
});
system.addEventListener("change", say);
say();

/* The navigation shows where the reader is. */
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id).setAttribute("aria-current", "true");
  }
}, { rootMargin: "-10% 0px -80% 0px" });
for (const section of document.querySelectorAll("main > section")) watcher.observe(section);
