"use strict";
// The page can be read without this: it makes charts answer to the pointer, tables sort and images filter.
document.documentElement.classList.add("js");

for (const chart of document.querySelectorAll(".chart")) {
  const picture = chart.querySelector(".picture");
  const drawn = picture.innerHTML;
  const spec = JSON.parse(chart.querySelector("script").textContent);
  vegaEmbed(picture, spec, { renderer: "svg", actions: false }).catch((error) => {
    picture.innerHTML = drawn;
    console.error(error);
  });
}

function sortBy(table, column, direction) {
  const value = (row) => row.cells[column].textContent.trim();
  const number = (text) => parseFloat(text.replaceAll(",", "").replace("−", "-"));
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    const [m, n] = [number(x), number(y)];
    return direction * (isNaN(m) || isNaN(n) ? x.localeCompare(y) : m - n);
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : head.matches(".number");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sortBy(table, column, down ? -1 : 1);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}

for (const section of document.querySelectorAll("section")) {
  const cards = [...section.querySelectorAll(".card")];
  if (!cards.length) continue;
  const bar = document.createElement("p");
  bar.className = "filter";
  const choices = { class: "true class", predicted: "predicted class" };
  for (const [key, text] of Object.entries(choices)) {
    const select = document.createElement("select");
    select.dataset.key = key;
    const names = [...new Set(cards.map((card) => card.dataset[key]))].sort();
    select.append(new Option("all", ""), ...names.map((name) => new Option(name)));
    const label = document.createElement("label");
    label.append(`${text} `, select);
    bar.append(label);
  }
  bar.addEventListener("change", () => {
    const wanted = [...bar.querySelectorAll("select")].filter((select) => select.value);
    for (const card of cards) card.hidden = wanted.some((select) => card.dataset[select.dataset.key] !== select.value);
  });
  section.querySelector(".cards").previousElementSibling.before(bar);
}
