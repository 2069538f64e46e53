// Pictures from prompts with a run's adapter; each can be drawn again with its settings.
import {commandLine, enlarge, field, fileUrl, formOf, get, h, note, number, post, residentNote, say, select, tried} from "./dom.js";

export async function drawTab(place, name, run) {
  const which = [["adapter", "its adapter", run.adapter], ["adapter-ema", "its averaged adapter", run.averaged], ["chosen", "the chosen checkpoint", run.chosen !== null], ["base", "none: the base alone", true]].filter((one) => one[2]);
  const results = h("div", {}), resident = residentNote();
  const form = h("form", {className: "form card", oninput: () => command.soon(), onsubmit: (event) => { event.preventDefault(); launch("queue"); }},
    h("label", {className: "all"}, "Prompts, one a line", h("textarea", {name: "prompts", rows: 2, required: true, placeholder: run.trigger ? `${run.trigger}, a cup on a table` : "a cup on a table"})),
    field("Adapter", select("adapter", which.map(([value, text]) => [value, text]), which[0][0])),
    field("Strengths", h("input", {name: "weights", placeholder: "1, or 0 0.5 1"})),
    field("Seeds", h("input", {name: "seeds", placeholder: "0"})),
    field("Steps", h("input", {name: "steps", inputMode: "numeric", placeholder: "the model's own"})),
    field("Guidance", h("input", {name: "guidance", inputMode: "decimal", placeholder: "the model's own"})),
    field("Height", h("input", {name: "height", inputMode: "numeric", placeholder: "the model's own"})),
    field("Width", h("input", {name: "width", inputMode: "numeric", placeholder: "the model's own"})),
    h("div", {className: "line all"}, h("button", {className: "button main"}, "Draw, after what waits"),
      h("button", {className: "button", type: "button", onclick: () => launch("now")}, "Draw now, beside what runs")));
  const asked = () => ({...formOf(form), what: "draw", run: name});
  const command = commandLine(asked);
  const launch = (when) => tried(async () => {
    if (!await command.check()) return;
    await post("start", {...asked(), when});
    say(when === "now" ? "drawing starts" : "drawing is in the queue");
  });
  const again = (picture) => tried(async () => {
    const said = await get("record", {name: `${name}/${picture}`});
    const fields = {prompts: said.prompt, seeds: said.seeds.join(" "), weights: said["adapter.path"] ? number(said["adapter.weight"] ?? 1) : "", steps: said["sampling.steps"],
      guidance: said["sampling.guidance"], height: said["sampling.height"], width: said["sampling.width"]};
    for (const [key, value] of Object.entries(fields)) form.elements[key].value = value ?? "";
    form.elements.adapter.value = said["adapter.path"] ? which.find(([key]) => said["adapter.path"].endsWith(`/${key}`))?.[0] ?? which[0][0] : "base";
    form.scrollIntoView({block: "start"});
    form.elements.prompts.focus();
    await command.check();
  });
  let last = "";
  const live = async (now) => {
    resident.live(now.resident);
    const busy = now.jobs.filter((job) => job.words[0] === "infer/draw.py" && (job.state === "waiting" || job.state === "running"));
    const broken = now.jobs.find((job) => job.words[0] === "infer/draw.py"), text = JSON.stringify([now.drawings, busy.map((job) => job.state), broken]);
    if (text === last) return;
    last = text;
    results.replaceChildren(...(broken?.state === "failed" ? [note(`The last drawing failed: ${broken.reason}`, "bad")] : []), ...busy.map((job) => note(job.state === "waiting" ? "A drawing waits for its turn." : "A drawing is made …")),
      ...now.drawings.flatMap((drawing) => [h("h3", {}, drawing.name), h("div", {className: "grid"}, drawing.pictures.filter((file) => file !== "sheet.png").map((file) =>
        h("div", {className: "shot"},
          h("button", {className: "picture", type: "button", ariaLabel: `${file}, larger`, onclick: () => enlarge(fileUrl(name, `${drawing.name}/${file}`), file, file)},
            h("img", {loading: "lazy", alt: "", src: `${fileUrl(name, `${drawing.name}/${file}`)}?small=1`})),
          h("div", {}, h("span", {}, file), h("button", {className: "button", type: "button", onclick: () => again(`${drawing.name}/${file}`)}, "Same settings")))))]));
  };
  place.append(form, command.answer, command.line, resident.box, results);
  await live(run);
  return {live, stop: command.stop};
}
