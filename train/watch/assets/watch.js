// Which view is shown, by the address's fragment; views that are live are drawn again while the page is seen.
import {Failed, h, note, tried} from "./dom.js";
import {dataView} from "./data.js";
import {queueView, runsView} from "./runs.js";
import {reportsView, runView} from "./run.js";
import {startView} from "./start.js";

const VIEWS = {runs: runsView, start: startView, data: dataView, queue: queueView, run: runView, reports: reportsView};
const main = document.querySelector("#main");
let shown = null;  // {live, stop} of the view on the page
let turn = 0;

async function show(focus) {
  const mine = ++turn;
  const parts = location.hash.replace(/^#\/?/, "").split("/");
  let words;
  try { words = parts.map(decodeURIComponent); } catch { words = ["runs"]; }
  const view = VIEWS[words[0]] ? words[0] : "runs";
  shown?.stop?.();
  shown = null;
  for (const link of document.querySelectorAll("#pages a"))
    if (link.hash === `#/${view === "run" || view === "reports" ? "runs" : view}`) link.ariaCurrent = "page"; else link.removeAttribute("aria-current");
  const place = h("div", {});
  let made;
  try { made = await VIEWS[view](place, words.slice(1)); } catch (error) {
    if (!(error instanceof Failed)) throw error;
    place.replaceChildren(h("h1", {}, "Not there"), note(error.message, "bad"), h("p", {}, h("a", {href: "#/runs"}, "To all runs")));
  }
  if (mine !== turn) { made?.stop?.(); return; }
  shown = made ?? null;
  main.replaceChildren(place);
  const tab = place.querySelector(".tabs [aria-current]");  // a narrow window shows some of the tabs
  if (tab) tab.parentElement.scrollLeft = tab.offsetLeft - tab.parentElement.offsetLeft - 40;
  document.title = `${place.querySelector("h1")?.textContent ?? "Runs"} · flux-lora`;
  if (focus) { main.focus({preventScroll: true}); scrollTo(0, 0); }
}

// a live view is asked again after a second and a half, or after fifty times what the last answer took: two percent of a core
async function beat() {
  let took = 0;
  if (shown?.live && !document.hidden) {
    const begun = performance.now();
    await tried(shown.live);
    took = performance.now() - begun;
  }
  setTimeout(beat, Math.max(1500, 50 * took));
}

const theme = document.querySelector("#theme");
const kept = (work) => { try { return work(localStorage); } catch { return null; } };
const paint = () => {
  if (theme.value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
};
theme.value = kept((store) => store.getItem("flux-lora-theme")) ?? "system";
theme.addEventListener("change", () => { paint(); kept((store) => store.setItem("flux-lora-theme", theme.value)); });
paint();
addEventListener("hashchange", () => show(true));
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
await show(false);
beat();
