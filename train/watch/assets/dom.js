// What all views share: elements from text alone (nothing is ever parsed as markup), requests, messages, numbers.

const SVG = "http://www.w3.org/2000/svg";

function build(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !(element instanceof SVGElement) && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
export const h = (tag, properties = {}, ...children) => build(document.createElement(tag), properties, children);
export const s = (tag, properties = {}, ...children) => build(document.createElementNS(SVG, tag), properties, children);

export class Failed extends Error {}

async function answer(request) {
  let response;
  try { response = await request; } catch { throw new Failed("the page's server does not answer; it was closed, or is busy"); }
  const text = await response.text();
  let said;
  try { said = JSON.parse(text); } catch { throw new Failed(text || `status ${response.status}`); }
  if (!response.ok) throw new Failed(said.error ?? `status ${response.status}`);
  return said;
}
export const get = (path, query = {}) => answer(fetch(`/api/${path}?${new URLSearchParams(query)}`));
export const post = (path, form) => answer(fetch(`/api/${path}`,
  {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(form)}));

export function say(text, bad = false) {
  const box = h("div", {className: bad ? "bad" : ""}, text);
  document.querySelector("#said").append(box);
  setTimeout(() => box.remove(), bad ? 12000 : 5000);
}
// does something that may be refused; what is refused is said
export async function tried(work) {
  try { return await work(); } catch (error) {
    if (!(error instanceof Failed)) throw error;
    say(error.message, true);
    return undefined;
  }
}

export const fileUrl = (run, name) => "/files/" + `${run}/${name}`.split("/").map(encodeURIComponent).join("/");
export const runLink = (name, view = "watch") => `#/run/${encodeURIComponent(name)}/${view}`;
export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  return Number(value.toPrecision(digits)).toString();
}
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${String(Math.round(seconds % 3600 / 60)).padStart(2, "0")} min`;
}
export function ago(seconds) {
  const passed = Date.now() / 1000 - seconds;
  return passed < 5 ? "now" : passed < 172800 ? `${duration(passed)} ago` : new Date(seconds * 1000).toLocaleDateString();
}
export const state = (name) => h("span", {className: `state ${name}`}, name);
export const tile = (name, value, title) => h("div", {className: "tile", title: title ?? ""}, h("span", {}, name), h("b", {}, value));
export const note = (text, kind = "") => h("p", {className: `note ${kind}`}, text);

export function copyable(command) {
  const code = h("code", {tabIndex: 0}, command);
  const button = h("button", {className: "button", type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(code.textContent); say("copied"); } catch {
      getSelection().selectAllChildren(code);
      say("selected: copy it with the keyboard");
    }
  }}, "Copy");
  const box = h("div", {className: "command"}, code, button);
  box.set = (text) => { code.textContent = text; };
  return box;
}
export function field(label, input, small) {
  return h("label", {}, label, input, small ? h("small", {}, small) : null);
}
export const select = (name, options, chosen) => h("select", {name},
  options.map(([value, text]) => h("option", {value, selected: value === chosen}, text)));
export const formOf = (form) => Object.fromEntries(new FormData(form).entries());

// the command line of a form, shown while it is filled in. asked: what the server is asked for; lacking: what is to be
// said before it can be asked, or nothing
export function commandLine(asked, lacking = () => "") {
  const answer = h("div", {}), line = copyable("");
  let timer;
  const refuse = (said) => { line.hidden = true; answer.replaceChildren(said); return false; };
  const check = async () => {
    clearTimeout(timer);
    if (lacking()) return refuse(note(lacking()));
    try {
      line.set((await post("command", asked())).command);
      line.hidden = false;
      answer.replaceChildren();
      return true;
    } catch (error) {
      if (!(error instanceof Failed)) throw error;
      return refuse(note(error.message, "bad"));
    }
  };
  line.hidden = true;
  return {answer, line, check, soon: () => { clearTimeout(timer); timer = setTimeout(check, 250); }, stop: () => clearTimeout(timer)};
}

// what the process does that draws, and how it is ended; the note is drawn again where it has changed
export function residentNote() {
  const box = h("div", {className: "line", role: "status"});
  let last;
  const end = () => tried(async () => { say(`it ends: ${(await post("giveback", {})).command}`); });
  const live = (found) => {
    const text = JSON.stringify([found?.state, found?.model, found?.reason, Math.round((found?.bytes ?? 0) / 2 ** 28)]);
    if (text === last) return;
    last = text;
    if (!found || (found.state === "ended" && found.reason === "it was asked to end")) { box.replaceChildren(); return; }
    const held = found.bytes ? `, ${number(found.bytes / 2 ** 30, 3)} GiB of ${found.device}` : "";
    const words = {drawing: `The drawing process draws (${found.model ?? "a model is loaded first"}${held}).`,
      waiting: found.model ? `The drawing process keeps ${found.model}${held}: the next drawing with it takes no loading. It leaves when a training begins, and after ${duration(found.idle)} without a request.`
        : "The drawing process is there, with nothing loaded.", ended: `The drawing process has given its memory back: ${found.reason}.`, gone: `${found.reason}.`};
    box.replaceChildren(note(words[found.state] ?? found.state, {gone: "bad", waiting: "good", drawing: "good"}[found.state]),
      ...(found.state === "waiting" || found.state === "drawing" ? [h("button", {className: "button", type: "button", onclick: end}, "Give its memory back")] : []));
  };
  return {box, live};
}

// a picture as large as the window, with what is said of it; Escape closes it
export function enlarge(src, text, alt) {
  const box = h("dialog", {ariaLabel: alt}, h("img", {src, alt}), h("p", {}, text),
    h("form", {method: "dialog"}, h("button", {className: "button"}, "Close")));
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
}
