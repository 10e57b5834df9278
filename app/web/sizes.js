// The size: shapes and areas to choose from, or any sides; with references, as the first is.

import { $, el, show } from "./dom.js";

const MULTIPLE = 16;
const LARGEST = 2048;
const RATIOS = [
  ["reference", "As reference"],
  ["1:1", "Square"],
  ["4:3", "Landscape"],
  ["3:4", "Portrait"],
  ["16:9", "Wide"],
  ["9:16", "Tall"],
];
const AREAS = [1, 1.5, 2];

export class Sizes {
  #width = $("width");
  #height = $("height");
  #side = null;
  #reference = null;
  #isMasked = false;

  constructor() {
    $("ratios").append(...RATIOS.map(ratioChoice));
    this.#ratio = "1:1";
    show($("ratios").querySelector("[data-ratio=reference]"), false);
    $("ratios").addEventListener("change", () => this.#fill());
    $("areas").addEventListener("change", () => this.#fill());
    for (const input of [this.#width, this.#height]) input.addEventListener("input", () => this.#mark());
    $("swap").addEventListener("click", () => {
      [this.#width.value, this.#height.value] = [this.#height.value, this.#width.value];
      this.#mark();
    });
  }

  /** The model's own size is known now. */
  setDefaults({ width, height }) {
    const side = Math.sqrt(width * height);
    if (side === this.#side) return;
    const isFirst = this.#side === null;
    this.#side = side;
    const areas = AREAS.filter((factor) => side * factor <= LARGEST);
    $("areas").replaceChildren(...areas.map((factor) => areaChoice(round(side * factor))));
    if (isFirst) this.#begin(round(side));
    this.#mark();
  }

  /** Give the model's own size, but not over sides that somebody typed before it came, or is about to. */
  #begin(side) {
    if (this.#ratio === "reference") return;
    const inputs = [this.#width, this.#height];
    if (inputs.some((input) => input.value || input === document.activeElement)) return;
    this.#area = side;
    this.#fill();
  }

  /** What references say: the size of the first, and whether a part of it is marked. */
  setReference(size, isMasked) {
    const isNew = size !== null && this.#reference === null;
    this.#reference = size;
    this.#isMasked = isMasked;
    show($("ratios").querySelector("[data-ratio=reference]"), size !== null);
    if (isNew || isMasked) this.#ratio = "reference";
    if (size === null && this.#ratio === "reference") this.#ratio = "1:1";
    this.#fill();
  }

  /** What to ask for; nothing where it is the service's to decide. */
  value() {
    const ratio = this.#ratio;
    if (ratio === "reference") return {};
    if (this.#width.value && this.#height.value) {
      return { width: Number(this.#width.value), height: Number(this.#height.value) };
    }
    return ratio && ratio !== "1:1" ? { aspect_ratio: ratio } : {};
  }

  /** Ask for what was asked before. */
  set(request) {
    const { width, height, aspect_ratio: ratio } = request;
    this.#ratio = width ? null : this.#reference ? "reference" : (ratio ?? "1:1");
    this.#width.value = width ?? "";
    this.#height.value = height ?? "";
    if (width) this.#mark();
    else this.#fill();
  }

  get #ratio() {
    return $("ratios").querySelector("input:checked")?.value ?? null;
  }

  set #ratio(value) {
    for (const input of $("ratios").querySelectorAll("input")) input.checked = input.value === value;
  }

  get #area() {
    return Number($("areas").querySelector("input:checked")?.value ?? this.#side);
  }

  set #area(value) {
    for (const input of $("areas").querySelectorAll("input")) input.checked = Number(input.value) === value;
  }

  /** Sides from shape and area. */
  #fill() {
    const isReference = this.#ratio === "reference";
    for (const element of [this.#width, this.#height, $("swap"), ...$("areas").querySelectorAll("input")]) {
      element.disabled = isReference;
    }
    for (const input of $("ratios").querySelectorAll("input")) {
      input.disabled = this.#isMasked && input.value !== "reference";
    }
    show($("size-note"), this.#isMasked);
    $("size-note").textContent = this.#isMasked ? "A picture of which a part is marked keeps its size." : "";
    if (isReference) {
      this.#width.value = this.#reference?.width ?? "";
      this.#height.value = this.#reference?.height ?? "";
      this.#area = null;
    } else if (this.#side !== null) {
      const [width, height] = sides(this.#ratio ?? "1:1", this.#area || this.#side);
      this.#width.value = width;
      this.#height.value = height;
      this.#mark();
    }
  }

  /** Show which shape and area the sides are, if they are any. */
  #mark() {
    if (this.#ratio === "reference" || this.#side === null) return;
    const asked = `${this.#width.value}x${this.#height.value}`;
    for (const [ratio] of RATIOS.slice(1)) {
      for (const input of $("areas").querySelectorAll("input")) {
        if (sides(ratio, Number(input.value)).join("x") === asked) {
          this.#ratio = ratio;
          this.#area = Number(input.value);
          return;
        }
      }
    }
    this.#ratio = null;
    this.#area = null;
  }
}

function ratioChoice([value, words]) {
  const input = el("input", { type: "radio", name: "ratio", value, class: "sr" });
  const glyph = el("span", { class: "glyph", "data-glyph": value, "aria-hidden": "true" });
  const shape = value === "reference" ? null : el("span", { class: "sr" }, ` ${value}`);
  return el("label", { class: "ratio", "data-ratio": value, title: words }, input, glyph, el("span", {}, words), shape);
}

function areaChoice(side) {
  const words = el("span", { class: "sr" }, " pixels a side, as a square");
  return el("label", {}, el("input", { type: "radio", name: "area", value: side, class: "sr" }), el("span", {}, String(side)), words);
}

const round = (side) => Math.min(Math.max(Math.round(side / MULTIPLE) * MULTIPLE, 64), LARGEST);

function sides(ratio, side) {
  const [across, down] = ratio.split(":").map(Number);
  return [round(side * Math.sqrt(across / down)), round(side * Math.sqrt(down / across))];
}
