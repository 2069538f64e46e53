// The list of runs, and the queue of commands.
import {ago, copyable, duration, fileUrl, get, h, note, number, post, residentNote, runLink, say, state, tried} from "./dom.js";

const SHOWN = 100;

function card(run) {
  const going = run.state === "training" || run.state === "encoding";
  const share = run.steps ? run.step / run.steps : 0;
  const what = run.reason ?? (run.state === "encoding" ? "encoding pictures and loading the model" : "");
  return h("a", {className: "run", href: runLink(run.name)},
    run.preview ? h("img", {className: "pic", loading: "lazy", alt: "", src: `${fileUrl(run.name, run.preview)}?small=${run.step}`})
      : h("div", {className: "pic"}),
    h("div", {}, h("h2", {}, run.name), state(run.state), what ? h("p", {className: "small"}, what) : null),
    h("div", {className: "going small num"}, run.steps ? h("progress", {max: 1, value: share, ariaLabel: `progress of ${run.name}`}) : null,
      `step ${run.step}${run.steps ? ` of ${run.steps}` : ""}${going && run.left !== null ? `, ${duration(run.left)} left` : ""}`),
    h("div", {className: "figures"}, "loss ", h("b", {}, number(run.loss)), h("br"), "validation ", h("b", {}, number(run.validation)),
      h("br"), ago(run.changed)));
}

export async function runsView(place) {
  let seen = SHOWN, last = "";
  const search = h("input", {type: "search", placeholder: "name or state", ariaLabel: "Search runs", oninput: () => draw()});
  const list = h("div", {className: "runs"}), notes = h("div", {}), count = h("p", {role: "status"}), reports = h("div", {});
  const more = h("button", {className: "button more", type: "button", hidden: true, onclick: () => { seen += 200; draw(); }}, "Show more");
  place.append(h("div", {className: "line apart"}, h("h1", {}, "Runs"), h("a", {className: "button main", href: "#/start"}, "Start a run")), notes,
    h("div", {className: "line"}, search), count, list, more, reports);
  let found = {runs: [], jobs: [], notes: []};
  const draw = () => {
    const wanted = search.value.trim().toLowerCase();
    const waiting = found.jobs.filter((job) => job.state === "waiting" && job.words[0] === "train/train.py" && !found.runs.some((run) => run.name === job.run))
      .map((job) => ({name: job.run, state: "waiting", reason: "in the queue", step: 0, steps: null, loss: null, validation: null, changed: job.made, preview: null}));
    const runs = [...waiting, ...found.runs].filter((run) => `${run.name} ${run.state}`.toLowerCase().includes(wanted));
    const all = found.runs.length + waiting.length;
    count.textContent = all ? `${wanted ? `${runs.length} of ` : ""}${all} ${all === 1 ? "run" : "runs"}` : "";
    notes.replaceChildren(...found.notes.map((text) => note(text, "bad")));
    list.replaceChildren(...runs.slice(0, seen).map(card));
    if (!found.runs.length && !waiting.length)
      list.replaceChildren(h("p", {}, "There is no run in runs/ yet. ", h("a", {href: "#/start"}, "Start one"), ", or type the command in a terminal: it appears here."));
    more.hidden = runs.length <= seen;
    reports.replaceChildren(...(found.reports?.length ? [h("h2", {}, "Sweeps and comparisons"), h("div", {className: "line"}, found.reports.map((one) =>
      h("a", {className: "button", href: `#/reports/${encodeURIComponent(one.name)}`}, `${one.name}, ${one.kind}`)))] : []));
  };
  const live = async () => {
    const said = await get("runs");
    said.resident = null;
    const text = JSON.stringify(said);
    if (text === last) return;  // nothing moves: what has the focus keeps it
    last = text;
    found = said;
    const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    draw();
    if (focused) list.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  };
  await live();
  return {live};
}

export async function queueView(place) {
  const list = h("div", {className: "runs"}), notes = h("div", {}), resident = residentNote();
  place.append(h("h1", {}, "Queue"),
    h("p", {}, "Commands run one after another, in a process of their own: closing this page stops nothing."), resident.box, notes, list);
  let last = "";
  const open = new Set();
  const line = (job) => {
    const log = h("pre", {className: "log", tabIndex: 0}, "…");
    const details = h("details", {open: open.has(job.id), ontoggle: async (event) => {
      if (!event.target.open) { open.delete(job.id); return; }
      open.add(job.id);
      const said = await tried(() => get("job", {id: job.id}));
      if (said) { log.textContent = said.log || "It has said nothing yet."; log.scrollTop = log.scrollHeight; }
    }}, h("summary", {}, "Command and log"), copyable(`python ${job.words.map(quoted).join(" ")}`), log);
    return h("div", {className: "card", id: `job-${job.id}`},
      h("div", {className: "line apart"}, h("div", {className: "line"}, state(job.state), h("strong", {}, job.words[0].split("/")[1]),
        job.run ? h("a", {href: runLink(job.run)}, job.run) : null, h("span", {className: "small"}, ago(job.made))),
      job.state === "waiting" && job.queued ? h("button", {className: "button", type: "button", onclick: () => tried(async () => {
        await post("cancel", {job: job.id});
        say("taken out of the queue");
        await live();
      })}, "Take out") : null),
      job.reason ? note(job.reason, "bad") : null, details);
  };
  const live = async () => {
    const said = await get("runs");
    resident.live(said.resident);
    const text = JSON.stringify([said.jobs, said.standstill]);
    if (text === last) return;
    last = text;
    notes.replaceChildren(...(said.standstill ? [h("div", {className: "line"}, note("What waits does not run: the machine or the queue was stopped."),
      h("button", {className: "button main", type: "button", onclick: () => tried(async () => { await post("resume", {}); say("the queue goes on"); })}, "Go on"))] : []));
    list.replaceChildren(...said.jobs.map(line));
    if (!said.jobs.length) list.replaceChildren(h("p", {}, "Nothing was started from this page yet."));
  };
  await live();
  return {live};
}
export const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);
