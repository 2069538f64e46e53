// A folder's pictures with their captions, which are changed in place and changed back; duplicates, broken ones, buckets
// and crops as trained, once somebody has looked.
import {commandLine, enlarge, field, fileUrl, formOf, get, h, note, number, post, say, select, tried} from "./dom.js";

const percent = (share) => `${(share * 100).toFixed(share < .1 ? 1 : 0)} %`;

export async function dataView(place, [chosen]) {
  const known = await get("form"), folders = known.folders;
  place.append(h("h1", {}, "Data"));
  if (!folders.length) {
    place.append(h("p", {}, "No folder of pictures is here. Put one into runs/, or start the page with its path:"), note("python train/page.py 'folders=[my_pictures]'"));
    return {};
  }
  const folder = folders.includes(chosen) ? chosen : folders[0];
  const pick = select("folder", folders.map((name) => [name, name]), folder);
  pick.addEventListener("change", () => { location.hash = `#/data/${encodeURIComponent(pick.value)}`; });
  const search = h("input", {type: "search", placeholder: "name, caption or note", ariaLabel: "Search pictures", oninput: () => draw()});
  const filter = h("select", {name: "filter", onchange: () => draw()}, [["", "all pictures"], ["notes", "with a note"], ["twice", "duplicates"], ["cut", "cut by more than a tenth"]]
    .map(([value, text]) => h("option", {value}, text)));
  const undo = h("button", {className: "button", type: "button", onclick: () => tried(async () => {
    say(`${(await post("undo", {folder})).undone} is as it was`);
    await load();
  })}, "Undo the last change");
  const count = h("p", {role: "status"}), broken = h("div", {}), grid = h("div", {className: "grid"}), seenBy = surveyPart(folder, known.models, () => draw(true));
  const more = h("button", {className: "button more", type: "button", onclick: () => { seen += 120; draw(); }}, "Show more");
  let found, seen = 60;
  const shown = (name) => `/picture?${new URLSearchParams({folder, name})}`;
  const card = (one) => {
    const looked = seenBy.of(one.name);
    const text = h("textarea", {rows: 3, defaultValue: one.captions.join("\n"), ariaLabel: `caption of ${one.name}`, oninput: () => { save.disabled = text.value === one.captions.join("\n"); }});
    const save = h("button", {className: "button", type: "button", disabled: true, onclick: () => tried(async () => {
      const captions = text.value.split("\n").map((each) => each.trim()).filter(Boolean);
      try { await post("caption", {folder, name: one.name, was: one.captions, captions}); say(`${one.name} is written`); } finally { await load(); }
    })}, "Write");
    return h("div", {className: "shot"}, h("img", {loading: "lazy", alt: one.name, src: shown(one.name)}),
      h("div", {}, h("strong", {}, one.name), looked ? h("span", {className: "small num"}, looked.size.join(" x ")) : null,
        looked?.notes.length ? h("div", {className: "marks"}, looked.notes.map((text) => h("span", {}, text))) : null,
        looked ? h("div", {className: "crops"}, looked.views.map((view) => crop(folder, one.name, view))) : null, text, save));
  };
  const draw = (unasked) => {
    if (!found) return;
    const wanted = search.value.trim().toLowerCase();
    const fits = {notes: (looked) => looked?.notes.length, twice: (looked) => looked?.notes.some((text) => /^(same pixels as|nearly) /.test(text)), cut: (looked) => looked?.cut > .1}[filter.value] ?? (() => true);
    const pictures = found.pictures.filter((one) => {
      const looked = seenBy.of(one.name);
      return fits(looked) && `${one.name} ${one.captions.join(" ")} ${looked?.notes.join(" ") ?? ""}`.toLowerCase().includes(wanted);
    });
    count.textContent = `${pictures.length} of ${found.pictures.length} pictures`;
    more.hidden = pictures.length <= seen;
    if (unasked && [...grid.querySelectorAll("textarea")].some((text) => text.value !== text.defaultValue)) return;  // somebody writes
    grid.replaceChildren(...pictures.slice(0, seen).map(card));
  };
  const load = async () => {
    found = await get("data", {folder});
    undo.disabled = !found.undo.length;
    undo.textContent = found.undo.length ? `Undo the last change (${found.undo.at(-1)})` : "Undo the last change";
    const bare = found.broken.filter((one) => one.picture && /caption|no line/.test(one.reason));
    broken.replaceChildren(...found.broken.filter((one) => !bare.includes(one)).map((one) => note(`${one.name}: ${one.reason}`, "bad")),
      ...(bare.length ? [h("h3", {}, `Without a caption: ${bare.length}`), h("div", {className: "grid"}, bare.slice(0, 30).map((one) => card({name: one.name, captions: []})))] : []));
    draw();
  };
  place.append(h("div", {className: "line"}, h("label", {className: "set"}, "Folder", pick), search, h("label", {className: "set"}, "Show", filter), undo), seenBy.box, count, broken, grid, more);
  await seenBy.live();
  await load();
  return {live: seenBy.live, stop: seenBy.stop};
}

function crop(folder, name, view) {
  const query = new URLSearchParams({folder, name, view: [view.width, view.height, ...view.box, view.flip ? 1 : 0].join(",")});
  const what = `${view.width} x ${view.height} at ${view.resolution}${view.flip ? ", mirrored" : ""}`;
  return h("figure", {}, h("button", {className: "picture", type: "button", ariaLabel: `${name} as trained, ${what}, larger`, onclick: () => enlarge(`/crop?${query}`, `${name}, ${what}`, what)},
    h("img", {loading: "lazy", alt: `${name} as trained`, src: `/crop?${query}`})), h("figcaption", {className: "small num"}, what));
}

// what a look at all pictures found: it is a command, which is started here and goes on when the page is closed
function surveyPart(folder, models, changed) {
  const result = h("div", {}), wait = h("div", {role: "status"});
  const form = h("form", {className: "form", oninput: () => command.soon(), onsubmit: (event) => { event.preventDefault(); look(); }},
    field("Resolution", h("input", {name: "resolution", inputMode: "numeric", placeholder: "512"})), field("Crops of a picture", h("input", {name: "crops", inputMode: "numeric", placeholder: "1"})),
    field("Trigger word", h("input", {name: "trigger", autocomplete: "off", placeholder: "sks"})), field("Model, for its text tokens", select("model", [["", "the bundled tiny one"], ...models.map((name) => [name, name])], "")),
    h("label", {className: "set"}, h("input", {type: "checkbox", name: "flip", value: "yes"}), "mirrored too"),
    h("div", {className: "line all"}, h("button", {className: "button main"}, "Look at every picture")));
  const asked = () => ({...formOf(form), what: "survey", folder});
  const command = commandLine(asked);
  const look = () => tried(async () => {
    if (!await command.check()) return;
    await post("start", {...asked(), when: "now"});
    await live();
  });
  const panel = h("details", {className: "card look"}, h("summary", {}, "Duplicates, broken pictures, buckets and crops as trained"), form, command.answer, command.line);
  const box = h("div", {}, panel, wait, result);
  let last = "", by = new Map();
  const group = (title, groups) => groups.length ? h("details", {className: "card", open: groups.length < 5}, h("summary", {}, `${title}: ${groups.length} ${groups.length > 1 ? "groups" : "group"}`),
    groups.slice(0, 50).map((names) => h("div", {className: "alike"}, names.slice(0, 12).map((name) => h("figure", {}, h("img", {loading: "lazy", alt: name, src: `/picture?${new URLSearchParams({folder, name})}`}), h("figcaption", {className: "small"}, name)))))) : "";
  const paint = (said) => {
    const found = said.found;
    by = new Map((found?.pictures ?? []).map((one) => [one.name, one]));
    if (!found) { result.replaceChildren(); return; }
    result.replaceChildren(...[note(found.refusal ? `Training cannot start on this: ${found.refusal}` : `Training can start on these ${found.counts.samples} pictures.`, found.refusal ? "bad" : "good"),
      found.skipped.length ? h("details", {className: "card", open: found.skipped.length < 6}, h("summary", {}, `Left out: ${found.skipped.length}`), found.skipped.slice(0, 100).map((one) => h("p", {}, h("strong", {}, one.name), " ", one.reason))) : "",
      group("The same pixels", found.copies), group("Nearly the same", found.near),
      h("details", {className: "card", open: found.buckets.length < 12}, h("summary", {}, `Buckets: ${found.buckets.length}`), h("div", {className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Table"}, h("table", {className: "plain"},
        h("thead", {}, h("tr", {}, ["width x height", "at", "pictures", "cut away"].map((text) => h("th", {}, text)))),
        h("tbody", {}, found.buckets.map((one) => h("tr", {}, h("td", {}, `${one.width} x ${one.height}`), h("td", {}, String(one.resolution)), h("td", {}, String(one.count)), h("td", {}, percent(one.cut)))))))),
      h("p", {className: "small"}, `Copies: ${number(found.counts.exact_duplicates)}. Nearly copies: ${number(found.counts.near_duplicates)}. Captions cut short: ${number(found.counts.truncated)}. Smaller than asked: ${number(found.counts.smaller)}. `,
        h("a", {href: fileUrl(said.page.split("/").slice(0, -1).join("/"), "data.html"), target: "_blank", rel: "noopener"}, "The same as a page of its own"))].filter(Boolean));
  };
  const live = async () => {
    const said = await get("survey", {folder});
    const text = JSON.stringify([said.job?.id, said.job?.state, said.found?.counts, said.found?.pictures.length]);
    if (text === last) return;
    last = text;
    const busy = said.job?.state === "waiting" || said.job?.state === "running";
    wait.replaceChildren(...(busy ? [note("The pictures are being read …")] : said.job?.state === "failed" && !said.found ? [note(`The look failed: ${said.job.reason}`, "bad")] : []));
    if (!said.found) panel.open = true;
    paint(said);
    changed();
  };
  return {box, live, of: (name) => by.get(name), stop: command.stop};
}
