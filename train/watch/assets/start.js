// The form of a training: its command line is shown while it is filled in.
import {commandLine, field, formOf, get, h, note, post, runLink, say, select, tried} from "./dom.js";

export async function startView(place) {
  const known = await get("form");
  const first = known.folders[0] ?? "";
  const form = h("form", {className: "form card", onsubmit: (event) => { event.preventDefault(); launch("queue"); }, oninput: () => command.soon()},
    field("Name of the run", h("input", {name: "run", required: true, autocomplete: "off", placeholder: "mine"}), "Its folder is runs/<name>."),
    field("Model", select("model", [["", "of the preset, or tiny"], ...known.models.map((name) => [name, name])], "")),
    field("Card's preset", select("preset", [["", "none"], ...known.presets.map((name) => [name, name])], ""), "Settings that fit a card of so many GB."),
    field("Folder of pictures", select("data", [["", "of the preset"], ...known.folders.map((name) => [name, name])], first), "Folders in runs/, and those that page.py was started with."),
    field("What is taught", select("kind", [["", "no matter"], ...Object.entries(known.kinds)], "")),
    field("Trigger word", h("input", {name: "trigger", autocomplete: "off", placeholder: "sks"})),
    field("Steps", h("input", {name: "steps", inputMode: "numeric", placeholder: "1000"})),
    field("Resolution", h("input", {name: "resolution", inputMode: "numeric", placeholder: "512"})),
    h("label", {className: "all"}, "Previews, a prompt a line", h("textarea", {name: "previews", rows: 2, placeholder: "sks, a cup on a table"})),
    h("label", {className: "all"}, "Further settings, one a line", h("textarea", {name: "more", rows: 2, placeholder: "optim.lr=2e-4"}),
      h("small", {}, "As on the command line; docs/settings.md has all of them.")),
    h("div", {className: "line all"}, h("button", {className: "button main"}, "Start, after what waits"),
      h("button", {className: "button", type: "button", onclick: () => launch("now")}, "Start now"),
      h("button", {className: "button", type: "button", onclick: () => look()}, "Look at the data first")));
  const command = commandLine(() => ({...formOf(form), what: "train"}),
    () => form.elements.run.value.trim() ? "" : "Give the run a name.");
  const launch = (when) => tried(async () => {
    if (!await command.check()) return;
    const run = form.elements.run.value.trim();
    await post("start", {...formOf(form), what: "train", when});
    say(`run ${run} ${when === "now" ? "starts" : "is in the queue"}`);
    location.hash = runLink(run);
  });
  const look = () => tried(async () => {
    if (!await command.check()) return;
    const run = form.elements.run.value.trim(), {job} = await post("start", {...formOf(form), what: "look", when: "now"});
    const wait = note("The pictures are being read …");
    command.answer.replaceChildren(wait);
    for (;;) {
      await new Promise((done) => setTimeout(done, 400));
      const said = await get("job", {id: job});
      if (said.state === "waiting" || said.state === "running") continue;
      wait.replaceChildren(said.reason ? `Training could not start on this: ${said.reason} ` : "Training can start on this data. ",
        h("a", {href: `/files/${run.split("/").map(encodeURIComponent).join("/")}/data.html`, target: "_blank"}, "Every picture, as it is trained"));
      if (!said.reason) wait.classList.add("good"); else wait.classList.add("bad");
      return;
    }
  });
  place.append(h("h1", {}, "Start a run"), form, command.answer, command.line,
    h("p", {}, "The command can be typed in a terminal instead. The same run started again goes on where it was."));
  return {stop: command.stop};
}
