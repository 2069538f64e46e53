// one prompt at a time: chosen in the bar or by the address (#prompt-3, #all)
const prompts = [...document.querySelectorAll(".prompt")];
const bar = Object.fromEntries(["prompt", "previous", "next", "position"].map((id) => [id, document.getElementById(id)]));
let current = 0;
const turn = (index, scroll) => {
  current = index;
  prompts.forEach((section, i) => { section.hidden = index >= 0 && i !== index; });
  if (!bar.prompt) return;
  bar.prompt.value = index < 0 ? "all" : index + 1;
  bar.previous.disabled = index === 0;
  bar.next.disabled = index === prompts.length - 1;
  bar.position.textContent = index < 0 ? `${prompts.length} prompts` : `${index + 1} of ${prompts.length}`;
  if (scroll) prompts[Math.max(index, 0)].scrollIntoView();
};
const keep = () => history.replaceState(null, "", current < 0 ? "#all" : `#prompt-${current + 1}`);
const route = (scroll) => {
  const [, number] = location.hash.match(/^#prompt-(\d+)$/) ?? [];
  if (location.hash === "#all") turn(-1, scroll);
  else if (number >= 1 && number <= prompts.length) turn(number - 1, scroll);
  else if (!number) return false;
  return true;
};
if (bar.prompt) {
  bar.prompt.addEventListener("change", () => {
    turn(bar.prompt.value === "all" ? -1 : bar.prompt.value - 1);
    keep();
  });
  bar.previous.addEventListener("click", () => { turn(current < 0 ? prompts.length - 1 : current - 1); keep(); });
  bar.next.addEventListener("click", () => { turn(current + 1); keep(); });
}
turn(0);
route(true);
addEventListener("hashchange", () => route(true));

// the viewer: pictures a (left, below) and b (right, above) share one zoom and one place
const viewer = document.getElementById("viewer"), stage = viewer.querySelector(".stage");
const [lower, upper] = stage.querySelectorAll("img");
const control = (id) => document.getElementById(id);
const [at, gain, originals] = ["at", "gain", "originals"].map(control);
const pictures = [...document.querySelectorAll(".picture")];
const place = new Map(pictures.map((picture, i) => [picture, i]));
const view = {a: null, b: null, mode: "slide", z: 1, x: 0, y: 0};
const section = (picture) => picture.closest(".prompt");
const text = (picture) => `${picture.dataset.short} · seed ${picture.dataset.seed}`;

const lay = () => {  // sizes and places, in CSS pixels
  const half = view.mode === "beside" ? 2 : 1, room = [stage.clientWidth / half - (half - 1) * 3, stage.clientHeight];
  const full = [view.a.dataset.width, view.a.dataset.height].map(Number);
  let fit = Math.min(room[0] / full[0], room[1] / full[1]);
  if (fit >= 2) fit = Math.floor(fit);  // pixel for pixel
  const size = full.map((side) => side * fit);
  view.z = Math.min(Math.max(view.z, 1), Math.max(32 / fit, 4));
  const shown = size.map((side, i) => Math.min(side * view.z, room[i]));
  ["x", "y"].forEach((axis, i) => {
    const most = (size[i] * view.z - shown[i]) / 2;
    view[axis] = Math.min(Math.max(view[axis], -most), most);
  });
  view.edge = (room[0] - shown[0]) / 2; view.span = shown[0];
  for (const image of [lower, upper]) {
    image.classList.toggle("pixels", fit * view.z * full[0] / (image.naturalWidth || full[0]) >= 2);
  }
  const set = (name, value) => stage.style.setProperty(name, value);
  set("--w", `${size[0]}px`); set("--h", `${size[1]}px`); set("--z", view.z);
  set("--x", `${view.x}px`); set("--y", `${view.y}px`);
  set("--at", `${view.edge + view.span * at.value / 100}px`); set("--gain", gain.value);
  stage.className = `stage ${view.mode}${view.z > 1 ? " zoomed" : ""}`;
  control("scale").value = `${Math.round(100 * fit * view.z)} %`;
  control("times").value = gain.value;
  control("slide-label").hidden = view.mode !== "slide";
  control("gain-label").hidden = view.mode !== "difference";
};
const describe = (paragraph, picture) => {
  const name = document.createElement("strong");
  name.textContent = text(picture);
  const {caption, scores} = picture.dataset;
  paragraph.replaceChildren(name, [caption, scores].filter(Boolean).join(" · "));
};
const fill = (image, picture) => {
  const source = picture.querySelector("img"), {link} = picture.dataset;
  const wanted = originals.checked && link ? link : source.src;
  image.onerror = () => { image.onerror = null; image.src = source.src; };  // the page was moved away from them
  if (image.getAttribute("src") !== wanted) image.src = wanted;
  image.alt = text(picture);
};
const show = () => {
  fill(lower, view.a); fill(upper, view.b);
  control("a").value = place.get(view.a); control("b").value = place.get(view.b);
  describe(control("about-a"), view.a); describe(control("about-b"), view.b);
  const number = Number(section(view.b).dataset.number);
  control("which").textContent = prompts.length > 1 ? `Prompt ${number} of ${prompts.length}` : "";
  control("back").hidden = control("forth").hidden = prompts.length < 2;
  control("back").disabled = number === 1; control("forth").disabled = number === prompts.length;
  lay();
};
const list = () => {  // this prompt's pictures first, then all others
  const first = section(view.b), order = [first, ...prompts.filter((other) => other !== first)];
  const groups = () => order.map((of) => {
    const group = document.createElement("optgroup");
    group.label = `Prompt ${of.dataset.number}`;
    group.append(...[...of.querySelectorAll(".picture")].map((picture) => new Option(text(picture), place.get(picture))));
    return group;
  });
  control("a").replaceChildren(...groups()); control("b").replaceChildren(...groups());
};
const partner = (picture) => {  // what a picture is compared with: the reference of its row and seed
  const all = [...picture.closest("table").querySelectorAll(".picture")].filter((other) => other !== picture);
  const row = all.filter((other) => other.dataset.line === picture.dataset.line);
  return row.find((other) => "reference" in other.dataset) ?? row[0] ?? all[0] ?? picture;
};
const open = (picture) => {
  const other = partner(picture), first = "reference" in picture.dataset;
  [view.a, view.b] = first ? [picture, other] : [other, picture];
  Object.assign(view, {z: 1, x: 0, y: 0});
  at.value = 50;
  list();
  viewer.showModal();
  show();
  at.focus();
};
const swap = () => { [view.a, view.b] = [view.b, view.a]; show(); };
const zoom = (factor, px = 0, py = 0) => {  // about a point, from the middle of the picture's half
  const before = view.z;
  view.z *= factor; lay();
  const grown = view.z / before;
  view.x = px - (px - view.x) * grown; view.y = py - (py - view.y) * grown;
  lay();
};
const whole = () => { Object.assign(view, {z: 1, x: 0, y: 0}); lay(); };
const step = (by) => {  // the same pair of the next prompt
  const next = prompts[section(view.b).dataset.number - 1 + by];
  if (!next) return;
  const same = (picture) => {
    const all = [...next.querySelectorAll(".picture")], {name, seed} = picture.dataset;
    return all.find((other) => other.dataset.name === name && other.dataset.seed === seed)
      ?? all.find((other) => other.dataset.name === name) ?? all[0];
  };
  [view.a, view.b] = [same(view.a), same(view.b)];
  if (current >= 0) { turn(next.dataset.number - 1); keep(); }
  list(); show();
};
const change = (mode) => { view.mode = mode; lay(); };

for (const picture of pictures) picture.addEventListener("click", () => open(picture));
for (const side of ["a", "b"]) {
  control(side).addEventListener("change", () => { view[side] = pictures[control(side).value]; show(); });
}
for (const radio of viewer.querySelectorAll("[name=mode]")) radio.addEventListener("change", () => change(radio.value));
at.addEventListener("input", lay);
gain.addEventListener("input", lay);
originals.addEventListener("change", show);
control("originals-label").hidden = !pictures.some((picture) => picture.dataset.link);
const actions = {swap, in: () => zoom(1.5), out: () => zoom(1 / 1.5), fit: whole, close: () => viewer.close(),
  back: () => step(-1), forth: () => step(1)};
for (const [id, act] of Object.entries(actions)) control(id).addEventListener("click", act);
for (const image of [lower, upper]) image.addEventListener("load", () => viewer.open && lay());
addEventListener("resize", () => viewer.open && lay());

const keys = {"+": actions.in, "=": actions.in, "-": actions.out, "0": whole, x: swap, n: actions.forth, p: actions.back};
const moves = {ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
addEventListener("keydown", (event) => {  // of the whole page: a control that is hidden loses the focus to its body
  if (!viewer.open || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const move = moves[event.key], free = !event.target.matches("input");
  if (keys[event.key]) keys[event.key]();
  else if (move && free && view.z > 1) { view.x += 60 * move[0]; view.y += 60 * move[1]; lay(); }
  else if (move && free && view.mode === "slide") { at.value = Number(at.value) - move[0]; lay(); }
  else return;
  event.preventDefault();
});

// pointers: one moves the line (or both pictures once they are zoomed), two zoom
const pointers = new Map();
let gesture = null;
const middle = (x, y) => {  // from the middle of the picture that the point is on
  const box = stage.getBoundingClientRect(), half = view.mode === "beside" ? box.width / 2 : box.width;
  return [((x - box.left) % half) - half / 2, y - box.top - box.height / 2];
};
const slide = (event) => {
  at.value = 100 * (event.clientX - stage.getBoundingClientRect().left - view.edge) / view.span;
  lay();
};
stage.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  stage.setPointerCapture(event.pointerId);
  const held = event.target.matches(".handle");
  gesture = view.mode === "slide" && (held || view.z === 1) ? "slide" : "pan";
  if (pointers.size === 2) gesture = "pinch";
  if (gesture === "slide") slide(event);
});
stage.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const now = [event.clientX, event.clientY];
  if (gesture === "pinch") {
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
    const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
    if (other) zoom(distance(now) / Math.max(distance(before), 1), ...middle((now[0] + other[0]) / 2, (now[1] + other[1]) / 2));
  } else if (gesture === "slide") slide(event);
  else { view.x += now[0] - before[0]; view.y += now[1] - before[1]; lay(); }
  pointers.set(event.pointerId, now);
});
for (const name of ["pointerup", "pointercancel"]) {
  stage.addEventListener(name, (event) => { pointers.delete(event.pointerId); if (!pointers.size) gesture = null; });
}
stage.addEventListener("dblclick", (event) => {
  if (view.mode !== "slide" || view.z > 1) view.z > 1 ? whole() : zoom(3, ...middle(event.clientX, event.clientY));
});
stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY / (event.deltaMode ? 20 : 400)), ...middle(event.clientX, event.clientY));
}, {passive: false});
