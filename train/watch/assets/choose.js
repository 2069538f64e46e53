import {h} from "./dom.js";

export async function chooseTab(place) {
  place.append(h("p", {}, "…"));
}
