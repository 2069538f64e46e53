// A curve: smoothed, with the range of its bins; logarithmic or clipped; read by pointer or arrow keys.
import {h, number, s} from "./dom.js";

const LEFT = 58, RIGHT = 14, TOP = 10, BOTTOM = 28;

// a moving average that does not lag at its begin
export function smoothed(values, share) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = share * sum + (1 - share) * value;
    weight = share * weight + (1 - share);
    return sum / weight;
  });
}
export function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))];
}
function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      for (const m of high / low > 1000 ? [1] : [1, 2, 5]) if (m * 10 ** p >= low && m * 10 ** p <= high) found.push(m * 10 ** p);
    return found;
  }
  const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= rough * .999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// series: [{name, colour, step, mean, low?, high?, marks?, smooth?}]; options: {title, log, clip, smooth, events, height, steps}
export function chart(series, options) {
  const {title, events = [], height = 230} = options;
  const W = innerWidth < 760 ? 400 : options.wide ? 1180 : 580;  // as wide as it is shown, so that letters have their size
  const drawn = series.filter((one) => one.step.length);
  const keys = drawn.map((one) => h("span", {className: `key c${one.colour}`}, h("span", {}, one.name)));
  const head = h("figcaption", {}, h("strong", {}, title), keys);
  const reading = h("p", {className: "read"});
  if (!drawn.length) return h("figure", {className: "chart card"}, head, h("p", {}, "Nothing was measured yet."));
  const lines = drawn.map((one) => ({...one, y: one.smooth === false ? one.mean : smoothed(one.mean, options.smooth ?? 0)}));
  const all = lines.flatMap((one) => [...one.y, ...(options.clip || !one.low ? [] : [...one.low, ...one.high])]);
  const log = Boolean(options.log) && all.some((value) => value > 0);
  let kept = log ? all.filter((value) => value > 0) : all;
  if (options.clip && kept.length > 20) kept = kept.filter((v) => v >= quantile(kept, .01) && v <= quantile(kept, .98));
  let low = kept.reduce((a, b) => Math.min(a, b)), high = kept.reduce((a, b) => Math.max(a, b));
  const span = high - low > 1e-6 * Math.abs(high) ? high - low : Math.abs(high) || 1;  // a sum's rounding is no range
  const pad = log ? 1.06 : span * .04;
  [low, high] = log ? [low / pad, high * pad] : [low - pad, high + pad];
  const xs = lines.flatMap((one) => [one.step[0], one.step.at(-1)]);
  const first = Math.min(...xs), last = Math.max(options.steps ?? 0, ...xs, first + 1);
  const toX = (step) => LEFT + (step - first) / (last - first) * (W - LEFT - RIGHT);
  const scale = log ? Math.log : (v) => v;
  const toY = (value) => {
    const share = (scale(Math.max(value, log ? low : -Infinity)) - scale(low)) / (scale(high) - scale(low));
    return TOP + (1 - Math.min(1.02, Math.max(-.02, share))) * (height - TOP - BOTTOM);
  };
  const path = (x, y) => y.map((value, i) => `${i ? "L" : "M"}${toX(x[i]).toFixed(1)} ${toY(value).toFixed(1)}`).join("");
  const svg = s("svg", {viewBox: `0 0 ${W} ${height}`, role: "img", tabindex: 0,
    "aria-label": `${title}: ${lines.map((one) => `${one.name} from ${number(one.y[0])} to ${number(one.y.at(-1))}`).join("; ")}`});
  for (const value of ticks(low, high, log)) {
    const y = toY(value);
    svg.append(s("line", {class: "rule", x1: LEFT, x2: W - RIGHT, y1: y, y2: y}),
      s("text", {x: LEFT - 8, y: y + 4, "text-anchor": "end"}, number(value)));
  }
  for (const value of ticks(first, last, false)) svg.append(s("text", {x: toX(value), y: height - 8, "text-anchor": "middle"}, number(value, 7)));
  for (const one of lines) {
    const group = s("g", {class: `c${one.colour}`});
    if (one.low && one.step.length > 1) {
      const back = [...one.step.keys()].reverse().map((i) => `L${toX(one.step[i]).toFixed(1)} ${toY(one.low[i]).toFixed(1)}`).join("");
      group.append(s("path", {class: "band", d: `${path(one.step, one.high)}${back}Z`}));
    }
    if (one.smooth !== false && options.smooth > 0 && one.step.length > 2) group.append(s("path", {class: "raw", d: path(one.step, one.mean)}));
    group.append(s("path", {d: path(one.step, one.y)}));
    if (one.marks || one.step.length === 1) one.y.forEach((value, i) => group.append(s("circle", {cx: toX(one.step[i]), cy: toY(value), r: 3})));
    svg.append(group);
  }
  for (const event of events) {
    const x = toX(event.step), y = height - BOTTOM;
    svg.append(s("path", {class: event.event, d: `M${x - 5} ${y}h10l-5 -9z`, stroke: "none"},
      s("title", {}, `${event.event} at step ${event.step}`)));
  }
  const cross = s("line", {class: "cross", y1: TOP, y2: height - BOTTOM, visibility: "hidden"});
  svg.append(cross);
  const longest = lines.reduce((a, b) => (b.step.length > a.step.length ? b : a));
  let at = longest.step.length - 1;
  const read = (index) => {
    at = Math.max(0, Math.min(longest.step.length - 1, index));
    const step = longest.step[at], x = toX(step);
    cross.setAttribute("x1", x); cross.setAttribute("x2", x); cross.setAttribute("visibility", "visible");
    const said = lines.map((one) => {
      let i = one.step.findIndex((other) => other >= step);
      if (i < 0) i = one.step.length - 1;
      return `${one.name} ${number(one.y[i])}`;
    });
    const near = events.filter((event) => Math.abs(event.step - step) <= (last - first) / 150);
    const names = near.slice(-1).map((event) => `${event.event} at ${event.step}: ${(event.samples ?? []).slice(0, 2).map((one) => one.sample).join(", ")}`);
    reading.textContent = [`step ${step}`, ...said, ...names].join(" · ");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), step = first + ((event.clientX - box.x) / box.width * W - LEFT) / (W - LEFT - RIGHT) * (last - first);
    const i = longest.step.findIndex((other) => other >= step);
    read(i < 0 ? longest.step.length - 1 : i);
  });
  svg.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -1e9, End: 1e9}[event.key];
    if (move === undefined) return;
    event.preventDefault();
    read(at + move);
  });
  return h("figure", {className: `chart card ${options.wide ? "wide" : ""}`}, head, svg, reading);
}
