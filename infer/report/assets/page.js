"use strict";
// the theme: the system's, unless another one was chosen; kept for the next time where the browser allows it
const theme = document.querySelector("#theme");
const store = (write) => { try { return write(localStorage); } catch { return null; } };
const paint = () => {
  if (theme.value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
};
theme.value = store((kept) => kept.getItem("flux-lora-theme")) ?? "system";
if (!theme.value) theme.value = "system";
theme.addEventListener("change", () => { paint(); store((kept) => kept.setItem("flux-lora-theme", theme.value)); });
paint();
for (const element of document.querySelectorAll(".scripted")) element.hidden = false;

// tables: a click on a title sorts by it, another one the other way round
const valueOf = (row, i) => row.cells[i].dataset.value;
for (const button of document.querySelectorAll(".summary th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, i = head.cellIndex, body = head.closest("table").tBodies[0];
    const sign = head.ariaSort === "ascending" ? -1 : 1, words = "text" in head.dataset;
    for (const other of head.parentElement.cells) other.ariaSort = "none";
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const compare = (a, b) => {
      const x = valueOf(a, i), y = valueOf(b, i);
      if (x === "" || y === "") return (x === "") - (y === "");  // what is not defined stays last
      return sign * (words ? x.localeCompare(y, undefined, {numeric: true}) : x - y);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
