// A run: its curves, previews, pictures, settings, log and reports; what it can be asked for; drawing and choosing.
import {chart} from "./chart.js";
import {ago, copyable, duration, fileUrl, get, h, note, number, post, runLink, say, select, state, tile, tried} from "./dom.js";
import {chooseTab} from "./choose.js";
import {drawTab} from "./draw.js";

const TABS = {watch: ["Curves", watchTab], previews: ["Previews", previewTab], pictures: ["Pictures", pictureTab], draw: ["Draw", drawTab],
  choose: ["Choose", chooseTab], settings: ["Settings", settingsTab], log: ["Log", logTab], reports: ["Reports", reportTab]};

export async function runView(place, [name, chosen]) {
  const tab = TABS[chosen] ? chosen : "watch";
  const top = h("div", {}), body = h("div", {});
  const tabs = h("nav", {className: "tabs", ariaLabel: "Views of the run"}, Object.entries(TABS).map(([key, [title]]) => {
    const link = h("a", {href: runLink(name, key)}, title);
    if (key === tab) link.ariaCurrent = "page";
    return link;
  }));
  place.append(top, tabs, body);
  let run, last = "";
  const buttons = steering(name, () => run, () => live());
  top.append(h("p", {}, h("a", {href: "#/runs"}, "All runs")), h("div", {className: "line apart"}, h("h1", {}, name), buttons.box), buttons.facts);
  let part = null;
  const live = async () => {
    run = await get("run", {name});
    const about = await get("jobs", {run: name});
    run.jobs = about.jobs;
    run.resident = about.resident;
    const text = JSON.stringify({...run, now: 0, resident: null});
    if (text !== last) { last = text; buttons.draw(); }
    await part?.live?.(run);
  };
  await live();
  part = await TABS[tab][1](body, name, run);
  return {live, stop: () => part?.stop?.()};
}

const gib = (value) => number(value, value < 1 ? 2 : 3);

function steering(name, of, again) {
  const box = h("div", {className: "line"}), facts = h("div", {});
  const ask = (what, said) => () => tried(async () => { await post("steer", {run: name, do: what}); say(said); });
  const button = (text, work, kind = "") => h("button", {className: `button ${kind}`, type: "button", onclick: work}, text);
  const goOn = () => tried(async () => {
    const {command} = await post("start", {what: "go on", run: name, when: "queue"});
    say(`in the queue: ${command}`);
    await again();
  });
  const draw = () => {
    const run = of(), going = run.state === "training" || run.state === "encoding";
    const waits = run.state === "waiting";
    const focused = box.contains(document.activeElement) ? document.activeElement.textContent : null;
    box.replaceChildren(...(going ? [
      run.state === "training" ? button("Sample now", ask("sample", "previews are drawn after this step")) : null,
      run.state === "training" ? button("Save now", ask("save", "a checkpoint is written after this step")) : null,
      button("Stop gently", ask("stop", "the run ends after this step, with its state saved"), "bad"),
    ] : waits ? [h("span", {className: "small"}, "starts when its turn comes: ", h("a", {href: "#/queue"}, "queue"))]
      : run.state === "done" ? [] : [button("Go on", goOn, "main")]).filter(Boolean));
    if (focused) [...box.children].find((one) => one.textContent === focused)?.focus();
    const plan = run.plan?.peak_memory_bytes;
    facts.replaceChildren(
      h("div", {className: "line"}, state(run.state), run.reason ? h("span", {}, run.reason) : null,
        run.began ? h("span", {className: "small"}, `begun ${ago(run.began)}`) : null),
      ...(run.config_broken ? [note("config.yaml cannot be read: it is half written, or of another version.", "bad")] : []),
      ...run.jobs.filter((job) => job.state === "failed" && job.id === run.jobs[0]?.id && run.state !== "training")
        .map((job) => note(`${job.words[0]}: ${job.reason}`, "bad")),
      h("div", {className: "tiles"}, tile("Step", run.steps ? `${run.step} of ${run.steps}` : `${run.step}`),
        run.state === "done" ? "" : tile("Time left", run.left === null ? "–" : duration(run.left)), tile("Loss", number(run.loss)), tile("Validation", number(run.validation)),
        tile("Seconds a step", number(run.pace, 3)),
        tile(plan ? "Memory, of the plan" : "Memory, peak", `${gib(run.memory_gib)}${plan ? ` of ${gib(plan / 2 ** 30)}` : ""} GiB`,
          "peak of the training, as measured and as planned")),
      run.steps ? h("progress", {max: run.steps, value: run.step, ariaLabel: "progress"}) : "");
  };
  return {box, facts, draw};
}

async function watchTab(place, name, run) {
  const charts = h("div", {className: "charts"});
  const smooth = h("input", {type: "range", min: 0, max: 0.98, step: 0.02, value: 0.9, oninput: () => draw()});
  const log = h("input", {type: "checkbox", onchange: () => draw()}), clip = h("input", {type: "checkbox", checked: true, onchange: () => draw()});
  place.append(h("div", {className: "line"}, h("label", {className: "set"}, "Smoothing", smooth), h("label", {className: "set"}, log, "logarithmic"),
    h("label", {className: "set"}, clip, "without outliers")), h("br"), charts);
  let found, last = "", events = run.events;
  const draw = () => {
    const options = {smooth: Number(smooth.value), log: log.checked, clip: clip.checked, steps: run.steps};
    const {loss, lr, seconds, gradient_norm: norm} = found.training;
    const validated = (key) => found.validations.filter((one) => one[key] !== null && one[key] !== undefined);
    const held = validated("loss"), ema = validated("ema"), levelled = held.filter((one) => one.levels?.length);
    const latest = levelled.at(-1), first = levelled[0];
    const points = (list, key) => ({step: list.map((one) => one.step), mean: list.map((one) => one[key]), smooth: false, marks: true});
    const levels = latest ? [...new Set([0, Math.floor(latest.levels.length / 2), latest.levels.length - 1])] : [];
    const name = (i) => `noise ${number((i + .5) / latest.levels.length, 2)}`;
    charts.replaceChildren(
      chart([{name: "training", colour: 0, ...loss}], {...options, title: "Loss of the training", wide: true, events, height: 260}),
      chart([{name: "held-out pictures", colour: 1, ...points(held, "loss")}, {name: "their averaged adapter", colour: 3, ...points(ema, "ema")}],
        {...options, clip: false, title: "Validation, with fixed noise: what counts"}),
      chart(levels.map((level, i) => ({name: name(level), colour: i, step: levelled.map((one) => one.step),
        mean: levelled.map((one) => one.levels[level]), smooth: false, marks: true})), {...options, clip: false, title: "Validation by noise level"}),
      found.scores?.length ? chart(["likeness", "copying", "change", "drift"].map((what, i) => ({name: what, colour: i,
        ...points(found.scores.filter((one) => typeof one[`score_${what}`] === "number"), `score_${what}`)})),
        {...options, clip: false, log: false, title: "Scores of drawn pictures"}) : "",
      chart([{name: "lr", colour: 2, ...lr, smooth: false, low: null}], {title: "Learning rate", steps: run.steps}),
      chart([{name: "seconds", colour: 4, ...seconds}], {...options, title: "Seconds a step"}),
      chart([{name: "norm", colour: 5, ...norm}], {...options, title: "Norm of the gradient"}),
      latest && first !== latest ? h("div", {className: "card"}, h("strong", {}, `Validation by noise level, step ${first.step} and ${latest.step}`),
        h("table", {className: "plain"}, h("thead", {}, h("tr", {}, ["noise", "then", "now", "change"].map((text) => h("th", {}, text)))),
          h("tbody", {}, latest.levels.map((value, i) => h("tr", {}, h("td", {}, number((i + .5) / latest.levels.length, 3)), h("td", {}, number(first.levels[i])),
            h("td", {}, number(value)), h("td", {}, `${((value / first.levels[i] - 1) * 100).toFixed(0)} %`)))))) : "",
      eventList(events));
  };
  const live = async (now) => {
    events = now.events;
    const said = await get("curves", {name}), text = JSON.stringify([said, events]);
    if (text === last || charts.contains(document.activeElement)) return;
    last = text;
    found = said;
    draw();
  };
  await live(run);
  return {live};
}

function eventList(events) {
  if (!events.length) return "";
  return h("details", {className: "card wide", open: events.length < 6}, h("summary", {}, `${events.length} spikes and skipped updates`),
    h("table", {className: "plain"}, h("thead", {}, h("tr", {}, ["step", "what", "loss", "pictures"].map((text) => h("th", {}, text)))),
      h("tbody", {}, events.slice(-50).reverse().map((event) => h("tr", {}, h("td", {}, String(event.step)), h("td", {}, event.event),
        h("td", {}, typeof event.loss === "number" ? number(event.loss) : "–"),
        h("td", {}, (event.samples ?? []).slice(0, 4).map((one) => one.sample).join(", ")))))));
}

async function previewTab(place, name, run) {
  const picture = h("img", {className: "sheet", alt: ""}), label = h("output", {});
  const range = h("input", {type: "range", min: 0, step: 1, ariaLabel: "Step of the previews", oninput: () => draw()});
  const empty = h("p", {}, "No preview was drawn yet.");
  let steps = [];
  const draw = () => {
    const step = steps[Number(range.value)];
    label.textContent = `step ${step}`;
    picture.alt = `previews of step ${step}: each prompt without and with the adapter`;
    picture.src = fileUrl(name, `previews/step-${String(step).padStart(6, "0")}.png`);
  };
  const live = async (now) => {
    if (JSON.stringify(now.previews) === JSON.stringify(steps) && steps.length) return;
    const end = !steps.length || Number(range.value) === steps.length - 1;
    steps = now.previews;
    empty.hidden = steps.length > 0;
    slider.hidden = picture.hidden = !steps.length;
    range.max = steps.length - 1;
    if (end) range.value = steps.length - 1;
    if (steps.length) draw();
  };
  const slider = h("div", {className: "slider"}, range, label);
  place.append(empty, slider, picture);
  await live(run);
  return {live};
}

async function pictureTab(place, name, run) {
  const orders = {relative: ["stand out most", (a, b) => b.relative - a.relative], left: ["least learned", (a, b) => b.left - a.left],
    learned: ["most learned", (a, b) => a.left - b.left], name: ["name", (a, b) => a.name.localeCompare(b.name, undefined, {numeric: true})]};
  const grid = h("div", {className: "grid"}), known = (await get("form")).folders;
  const order = select("order", Object.entries(orders).map(([key, [title]]) => [key, title]), "relative");
  let seen = 60, pictures = await get("losses", {name});
  const more = h("button", {className: "button more", type: "button", onclick: () => { seen += 120; draw(); }}, "Show more");
  order.addEventListener("change", () => draw());
  place.append(h("p", {}, "Losses against those of other pictures at the same noise level. “Beside others” above 1.5 stands out: look at the picture and its caption. "
    + "“Of the beginning” is what is left of the loss that was usual when the run began."),
    h("label", {className: "set"}, "Order", order), h("br"), h("br"), grid, more);
  const draw = () => {
    more.hidden = pictures.length <= seen;
    grid.replaceChildren(...[...pictures].sort(orders[order.value][1]).slice(0, seen).map((one) => {
      const file = run.data && one.name.startsWith(`${run.data}/`) ? one.name.slice(run.data.length + 1) : one.name;
      const shown = known.includes(run.data);
      return h("div", {className: "shot"}, shown ? h("img", {loading: "lazy", alt: file, src: `/picture?${new URLSearchParams({folder: run.data, name: file})}`}) : h("div", {className: "none"}),
        h("div", {}, h("strong", {}, file), h("span", {}, `${number(one.relative, 2)} beside others`), h("span", {}, `${number(one.left * 100, 2)} % of the beginning`),
          h("span", {className: "small"}, `${one.visits} visits`)));
    }));
    if (!pictures.length) grid.replaceChildren(h("p", {}, "No losses by picture yet: they are written at each validation and checkpoint."));
  };
  draw();
  let was = run.validation;
  return {live: async (now) => {
    if (now.validation === was) return;
    was = now.validation;
    pictures = await get("losses", {name});
    draw();
  }};
}

async function settingsTab(place, name, run) {
  const others = (await get("runs")).runs.map((one) => one.name).filter((other) => other !== name);
  const against = select("other", [["", "another run …"], ...others.map((other) => [other, other])], "");
  const body = h("div", {});
  const rows = (heads, lines) => h("div", {className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Table"}, h("table", {className: "plain"}, h("thead", {}, h("tr", {}, heads.map((text) => h("th", {}, text)))),
    h("tbody", {}, lines.map((line) => h("tr", {}, line.map((text, i) => i ? h("td", {}, text ?? "absent") : h("th", {scope: "row"}, text)))))));
  const draw = () => tried(async () => {
    if (!against.value) { body.replaceChildren(rows(["setting", "value"], Object.entries(run.settings))); return; }
    const found = await get("diff", {name, other: against.value});
    body.replaceChildren(found.length ? rows(["setting", name, against.value], found.map((one) => [one.name, one.one, one.other])) : h("p", {}, "All settings are the same."));
  });
  against.addEventListener("change", draw);
  if (run.words) place.append(copyable(["python", "train/train.py", ...run.words.map(quoted)].join(" ")));
  place.append(h("label", {className: "set"}, "Compare with", against), h("br"), h("br"), body);
  if (!Object.keys(run.settings).length) place.append(note("This run has no settings that can be read."));
  await draw();
}
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

async function logTab(place, name, run) {
  const box = h("pre", {className: "log", tabIndex: 0, ariaLabel: "Log"});
  let jobs = [];
  const which = h("select", {name: "job", onchange: () => draw()});
  const course = h("pre", {className: "log", tabIndex: 0, ariaLabel: "Course"});
  const draw = () => tried(async () => {
    const lines = (await get("story", {name})).join("\n");
    if (lines !== course.textContent) course.textContent = lines;
    printed.hidden = !jobs.length;
    if (!jobs.length) return;
    const end = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    const said = await get("job", {id: which.value});
    const text = said.log || "It has said nothing yet.";
    if (text !== box.textContent) box.textContent = text;
    if (end) box.scrollTop = box.scrollHeight;
  });
  const live = async (now) => {
    if (now.jobs.map((job) => job.id).join() !== jobs.map((job) => job.id).join()) {
      jobs = now.jobs;
      which.replaceChildren(...jobs.map((job) => h("option", {value: job.id}, `${job.words[0]}, ${ago(job.made)}`)));
    }
    await draw();
  };
  const printed = h("div", {}, h("h3", {}, "What the command printed"), h("label", {className: "set"}, "Of", which), box);
  place.append(printed, h("h3", {}, "What the run’s files say"), course);
  await live(run);
  return {live};
}

// the reports of a folder that is no run: a sweep over its runs, a comparison by itself
export async function reportsView(place, [name]) {
  const run = await get("run", {name});
  place.append(h("p", {}, h("a", {href: "#/runs"}, "All runs")), h("h1", {}, name));
  await reportTab(place, name, run);
}

async function reportTab(place, name, run) {
  const titles = {"report.html": "Sweep", "compare/report.html": "Comparison", "gap/report.html": "Precision gap", "data.html": "Data"};
  const pages = run.files.filter((file) => titles[file]), pictures = run.files.filter((file) => file.endsWith(".png"));
  const frame = h("iframe", {className: "frame", title: "report", sandbox: "allow-scripts"});
  const open = (file) => { frame.src = fileUrl(name, file); frame.title = titles[file]; link.href = fileUrl(name, file); };
  const link = h("a", {className: "button", target: "_blank", rel: "noopener"}, "In a window of its own");
  if (!pages.length && !pictures.length) { place.append(h("p", {}, "No report yet. A comparison at several precisions is made by:"),
    copyable(`python infer/compare.py run=${name} adapter.path=runs/${name}/adapter`)); return; }
  if (pages.length) {
    place.append(h("div", {className: "line"}, pages.map((file) => h("button", {className: "button", type: "button", onclick: () => open(file)}, titles[file])), link), h("br"), frame);
    open(pages[0]);
  }
  for (const file of pictures) place.append(h("h3", {}, file), h("img", {className: "sheet", src: fileUrl(name, file), alt: file, loading: "lazy"}));
}
