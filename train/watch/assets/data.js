// A folder's pictures with their captions, which are changed in place and changed back.
import {get, h, note, post, say, select, tried} from "./dom.js";

export async function dataView(place, [chosen]) {
  const {folders} = await get("form");
  place.append(h("h1", {}, "Data"));
  if (!folders.length) {
    place.append(h("p", {}, "No folder of pictures is here. Put one into runs/, or start the page with its path:"), note("python train/page.py 'folders=[my_pictures]'"));
    return {};
  }
  const folder = folders.includes(chosen) ? chosen : folders[0];
  const pick = select("folder", folders.map((name) => [name, name]), folder);
  pick.addEventListener("change", () => { location.hash = `#/data/${encodeURIComponent(pick.value)}`; });
  const search = h("input", {type: "search", placeholder: "name or caption", ariaLabel: "Search pictures", oninput: () => draw()});
  const undo = h("button", {className: "button", type: "button", onclick: () => tried(async () => {
    say(`${(await post("undo", {folder})).undone} is as it was`);
    await load();
  })}, "Undo the last change");
  const count = h("p", {role: "status"}), broken = h("div", {}), grid = h("div", {className: "grid"});
  const more = h("button", {className: "button more", type: "button", onclick: () => { seen += 120; draw(); }}, "Show more");
  let found, seen = 60;
  const card = (one) => {
    const text = h("textarea", {rows: 3, value: one.captions.join("\n"), ariaLabel: `caption of ${one.name}`, oninput: () => { save.disabled = text.value === one.captions.join("\n"); }});
    const save = h("button", {className: "button", type: "button", disabled: true, onclick: () => tried(async () => {
      const captions = text.value.split("\n").map((each) => each.trim()).filter(Boolean);
      try { await post("caption", {folder, name: one.name, was: one.captions, captions}); say(`${one.name} is written`); } finally { await load(); }
    })}, "Write");
    return h("div", {className: "shot"}, h("img", {loading: "lazy", alt: one.name, src: `/picture?${new URLSearchParams({folder, name: one.name})}`}),
      h("div", {}, h("strong", {}, one.name), text, save));
  };
  const draw = () => {
    const wanted = search.value.trim().toLowerCase();
    const pictures = found.pictures.filter((one) => `${one.name} ${one.captions.join(" ")}`.toLowerCase().includes(wanted));
    count.textContent = `${pictures.length} of ${found.pictures.length} pictures`;
    more.hidden = pictures.length <= seen;
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
  place.append(h("div", {className: "line"}, h("label", {className: "set"}, "Folder", pick), search, undo),
    h("p", {}, "Duplicates, broken pictures, buckets and every crop as trained: “Look at the data first” in the form of a run."), count, broken, grid, more);
  await load();
  return {};
}
