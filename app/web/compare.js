// Two pictures: one over the other with a line to move, or side by side; and what differs.

import { $, closeOnBackdrop, dialogHead, el, fit } from "./dom.js";
import { urlOf } from "./entries.js";
import { facts } from "./words.js";

const NOT_COMPARED = new Set(["Drawn", "Took"]);

export class Compare {
  #dialog = $("compare");

  constructor() {
    closeOnBackdrop(this.#dialog);
  }

  open(first, second) {
    const isSameShape = first.picture.width * second.picture.height === second.picture.width * first.picture.height;
    const stage = isSameShape ? overlaid(first, second) : beside(first, second);
    this.#dialog.replaceChildren(
      dialogHead(this.#dialog, "compare-title", "Two pictures"),
      el("div", { class: "dialog-body" }, stage, differences(first, second)),
    );
    this.#dialog.showModal();
    this.#dialog.querySelector("input")?.focus();
  }
}

const picture = ({ entry, picture: shown }, name) =>
  el("img", { src: urlOf(shown.blob), alt: `${name}: ${entry.request.prompt}`, draggable: "false" });

function overlaid(first, second) {
  const above = picture(second, "Second");
  const line = el("span", { class: "compare-line", "aria-hidden": "true" });
  const slider = el("input", { type: "range", min: "0", max: "100", value: "50", "aria-label": "How much of the first picture is shown" });
  const move = () => {
    above.style.clipPath = `inset(0 0 0 ${slider.value}%)`;
    line.style.left = `${slider.value}%`;
  };
  slider.addEventListener("input", move);
  move();
  const over = el("div", { class: "compare-over" }, picture(first, "First"), above, line, slider);
  fit(over, first.picture);
  return el("div", { class: "compare-stage" }, over);
}

function beside(first, second) {
  return el("div", { class: "compare-stage compare-beside" }, picture(first, "First"), picture(second, "Second"));
}

function differences(first, second) {
  const facing = [first, second].map((shown) => new Map([["Prompt", shown.entry.request.prompt], ...facts(shown.entry, shown.picture)]));
  const names = [...new Set([...facing[0].keys(), ...facing[1].keys()])];
  const differing = names.filter((name) => !NOT_COMPARED.has(name) && String(facing[0].get(name)) !== String(facing[1].get(name)));
  if (!differing.length) return el("p", { class: "note" }, "Both were drawn with the same settings.");
  const cell = (facts, name) => el("td", {}, String(facts.get(name) ?? "none"));
  return el(
    "table",
    { class: "differences" },
    el("caption", {}, "What differs"),
    el("thead", {}, el("tr", {}, el("td"), el("th", { scope: "col" }, "First"), el("th", { scope: "col" }, "Second"))),
    el("tbody", {}, ...differing.map((name) => el("tr", {}, el("th", { scope: "row" }, name), ...facing.map((facts) => cell(facts, name))))),
  );
}
