// A run's checkpoints side by side, with their scores; the best marked with the reason; one taken.
import {commandLine, enlarge, field, fileUrl, formOf, h, note, number, post, residentNote, say, select, tried} from "./dom.js";

const SCORES = [["validation", "held-out loss ↓"], ["drift", "drift ↓"], ["change", "change"], ["nearest", "nearest"], ["likeness", "likeness ↑"]];
const COPIED = .5;  // of the usual distance between training pictures, as infer/choosing/best.py has it

export async function chooseTab(place, name, run) {
  const result = h("div", {}), resident = residentNote(), again = h("h2", {hidden: true}, "Draw and score again");
  const names = run.checkpoints.map((step) => String(step));
  const form = h("form", {className: "form card", oninput: () => command.soon(), onsubmit: (event) => { event.preventDefault(); launch(); }},
    h("label", {className: "all"}, "Prompts, one a line", h("textarea", {name: "prompts", rows: 2, placeholder: "empty: those of the last previews"})),
    field("Checkpoints", h("input", {name: "checkpoints", placeholder: names.join(" ") || "none are kept yet"}), "Empty: all that the run has kept."),
    field("Strengths", h("input", {name: "weights", placeholder: "1, or 0.7 1"})), field("Seed", h("input", {name: "seed", placeholder: "0"})),
    field("Steps", h("input", {name: "steps", inputMode: "numeric", placeholder: "the model's own"})),
    field("Weights", select("average", [["", "averaged, if it keeps them"], ["false", "as they are"], ["true", "averaged (ema)"]], "")),
    field("Likeness to the training pictures", select("networks", [["", "not judged"], ["hub", "by networks of the Hub"]], ""), "Copies are found without them."),
    h("div", {className: "line all"}, h("button", {className: "button main"}, "Draw and score, after what waits")));
  const asked = () => ({...formOf(form), what: "choose", run: name});
  const command = commandLine(asked);
  const launch = () => tried(async () => {
    if (!await command.check()) return;
    await post("start", {...asked(), when: "queue"});
    say("the choice is in the queue");
  });
  const take = (entry) => tried(async () => {
    const written = await post("start", {what: "choose", run: name, take: String(entry.step), average: String(Boolean(run.choice.average)), when: "now"});
    say(`written to runs/${name}/chosen: ${written.command}`);
  });
  const cell = (file, what) => h("td", {}, h("button", {className: "picture", type: "button", ariaLabel: `${what}, larger`,
    onclick: () => enlarge(fileUrl(name, `choose/${file}`), what, what)}, h("img", {loading: "lazy", alt: what, src: `${fileUrl(name, `choose/${file}`)}?small=1`})));
  const grid = (found) => {
    const row = (title, images, extra, best) => h("tr", {className: best ? "best" : ""}, h("th", {scope: "row"}, title, extra),
      images.map((file, i) => cell(file, `${title}: ${found.prompts[i]}`)));
    return h("div", {className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Table"}, h("table", {className: "choice"}, h("thead", {}, h("tr", {}, h("td", {}), found.prompts.map((prompt) => h("th", {scope: "col"}, prompt)))),
      h("tbody", {}, row("base", found.base, h("p", {className: "small"}, "without adapter")), found.entries.map((entry) => {
        const best = entry.name === found.best.name && entry.weight === found.best.weight;
        const scores = SCORES.filter(([key]) => entry[key] !== null).map(([key, title]) => h("div", {className: "small num"}, `${title} ${number(entry[key], 3)}`));
        return row(`step ${entry.step}${entry.weight === 1 ? "" : ` at ${number(entry.weight)}`}`, entry.images,
          [best ? h("div", {className: "best"}, "★ best") : null, scores,
            found.usual && entry.nearest !== null && entry.nearest < COPIED * found.usual ? h("div", {className: "small copied"}, "a near copy of a training picture") : null, entry.weight === 1 ? h("button", {className: `button ${best ? "main" : ""}`, type: "button",
            onclick: () => take(entry), disabled: !run.checkpoints.includes(entry.step)}, "Take this one") : null], best);
      }))));
  };
  let last = "";
  const live = async (now) => {
    run = now;
    resident.live(now.resident);
    const busy = now.jobs.filter((job) => job.words[0] === "infer/choose.py" && (job.state === "waiting" || job.state === "running"));
    const text = JSON.stringify([now.choice, now.chosen, busy.map((job) => job.state), now.checkpoints]);
    if (text === last) return;
    last = text;
    const found = now.choice;
    again.hidden = !found;
    result.replaceChildren(...busy.map((job) => note(job.state === "waiting" ? "A choice waits for its turn." : "Checkpoints are drawn and scored …")),
      ...(now.chosen ? [note(`Taken: step ${now.chosen.step}${now.chosen.average ? ", averaged weights" : ""}, runs/${name}/chosen/pytorch_lora_weights.safetensors`, "good")] : []),
      ...(found ? [h("h2", {className: "flush"}, "The last choice"), note(`Best: ${found.best.name}: ${found.best.reason}.`, "good"), grid(found),
        h("p", {}, found.average ? "Drawn and judged: the averaged weights of each checkpoint. " : "Drawn and judged: the weights of each checkpoint. ", "Held-out loss: of pictures that were not trained on. Drift: how far prompts that have nothing to do with it move from the base’s. Change: the same of these prompts. "
          + "Nearest: distance to the nearest training picture", found.usual ? ` (among themselves ${number(found.usual, 3)}; below half of that it is a copy).` : ".",
          found.absent.dino ? " Likeness is not measured: choose the networks in the form, which are downloaded." : "")] : []));
  };
  place.append(result, again, form, command.answer, command.line, resident.box);
  if (!run.checkpoints.length) place.prepend(note("No checkpoint is kept yet: they are written while it trains (keep=5 or keep_best=3 keeps more)."));
  await live(run);
  return {live, stop: command.stop};
}
