// The form: what is to be drawn, as one request; errors in words, next to their field.

import { $, el, popover, show } from "./dom.js";
import { BUNDLED_EDITS, examplesFor } from "./examples.js";
import { History } from "./history.js";
import { Sizes } from "./sizes.js";

const NUMBERS = ["steps", "seed", "n", "power_alpha", "guidance", "strength"];
const FIELDS = new Set(["prompt", "images", "size", "steps", "seed", "n", "schedule", "power_alpha", "guidance", "negative_prompt", "strength"]);

/** Pictures of what is coming, per picture. Each takes about as long as a step. */
const previewsFor = (steps) => Math.min(Math.max(Math.floor(steps / 5), 2), 6);

/** Tells "draw" when the form is sent. */
export class Composer extends EventTarget {
  #form = $("composer");
  #prompt = $("prompt");
  #sizes = new Sizes();
  #history = new History(this.#prompt);
  #service;
  #references;
  #lastSeed = null;

  constructor(service, references) {
    super();
    this.#service = service;
    this.#references = references;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.dispatchEvent(new Event("draw"));
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      if (document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.dispatchEvent(new Event("draw"));
    });
    if (/Mac|iPhone|iPad/.test(navigator.platform)) $("draw-key").textContent = "⌘ ↵";
    for (const name of ["input", "put"]) this.#prompt.addEventListener(name, () => this.#grow());
    this.#form.addEventListener("input", (event) => this.#clear(event.target));
    this.#form.addEventListener("change", (event) => this.#check(event.target));
    $("seed-lock").addEventListener("click", () => this.#toggleSeed());
    $("seed").addEventListener("input", () => this.#showLock());
    $("schedule").addEventListener("change", () => show($("power-field"), $("schedule").value === "power"));
    popover($("examples-button"), $("examples"), (close) => this.#examples(close));
    references.addEventListener("change", () => {
      this.#say("images", "");
      this.#sizes.setReference(references.size, references.mask !== null);
    });
    references.addEventListener("error", ({ detail }) => this.#say("images", detail));
  }

  /** The service has news: its model, what that takes and does by itself. */
  update() {
    const defaults = this.#service.defaults;
    if (!defaults) return;
    this.#sizes.setDefaults(defaults);
    $("steps").placeholder = String(defaults.steps);
    const takesGuidance = defaults.guidance !== null;
    show($("guidance-field"), takesGuidance);
    show($("negative-field"), takesGuidance);
    if (takesGuidance) $("guidance").placeholder = String(defaults.guidance);
  }

  /** What the form asks for, without pictures; null where something is wrong, which is said. */
  request() {
    for (const field of FIELDS) this.#say(field, "");
    this.#say("form", "");
    const wrong = [...this.#form.elements].filter((input) => !this.#check(input));
    if (!this.#prompt.value.trim()) {
      this.#say("prompt", "Say what should be drawn.");
      wrong.unshift(this.#prompt);
    }
    if (wrong.length) {
      if (wrong[0].closest("details")) $("more").open = true;
      wrong[0].focus();
      return null;
    }
    const asked = { prompt: this.#prompt.value.trim(), ...this.#sizes.value(), priority: "interactive" };
    for (const name of NUMBERS) {
      const input = $(name);
      if (input.value !== "" && !input.closest("[hidden]")) asked[name] = Number(input.value);
    }
    if ($("schedule").value !== "flux") asked.schedule = $("schedule").value;
    const negative = $("negative_prompt").value.trim();
    if (negative && !$("negative-field").hidden) asked.negative_prompt = negative;
    if ($("previews").checked) asked.previews = previewsFor(asked.steps ?? this.#service.defaults?.steps ?? 4);
    this.#history.add(asked.prompt);
    return asked;
  }

  /** Ask again for what an entry asked, with the seed of one of its pictures. */
  async fill(entry, picture) {
    const { request } = entry;
    await this.#references.set(entry.references, entry.mask);
    this.setPrompt(request.prompt);
    for (const name of NUMBERS) $(name).value = request[name] ?? "";
    $("n").value = 1;
    $("seed").value = picture?.seed ?? request.seed ?? "";
    $("schedule").value = request.schedule ?? "flux";
    $("negative_prompt").value = request.negative_prompt ?? "";
    show($("power-field"), request.schedule === "power");
    this.#sizes.set(request);
    this.#showLock();
    this.focus();
  }

  setPrompt(text) {
    this.#prompt.value = text;
    this.#grow();
    this.#say("prompt", "");
  }

  focus() {
    this.#prompt.focus();
    this.#prompt.scrollIntoView({ block: "nearest" });
  }

  /** A picture has come: its seed can be kept. */
  drawn(seed) {
    this.#lastSeed = seed;
  }

  /** Say what is wrong, where it is wrong.
   *  @param param the field's name in the API; null for what concerns none */
  showError(param, message) {
    const name = fieldOf(param);
    this.#say(name, message.charAt(0).toUpperCase() + message.slice(1));
    if (name === "form") return;
    const field = this.#form.querySelector(`[data-field=${name}]`);
    if (field.closest("details")) $("more").open = true;
    field.querySelector("input:not([type=file], [type=radio]), textarea, select")?.focus();
    field.scrollIntoView({ block: "nearest" });
  }

  #examples(close) {
    const { words, prompts } = examplesFor(this.#service.isBundled);
    const edits = this.#service.isBundled && this.#references.size ? BUNDLED_EDITS : [];
    const choose = (text) => {
      close();
      this.setPrompt(text);
      this.focus();
    };
    const item = (text) => el("button", { type: "button", class: "item", onclick: () => choose(text) }, text);
    return [el("p", { class: "note" }, words), ...edits.map(item), ...prompts.map(item)];
  }

  #grow() {
    this.#prompt.style.height = "auto";
    this.#prompt.style.height = `${this.#prompt.scrollHeight + 2}px`;
  }

  #toggleSeed() {
    const seed = $("seed");
    if (seed.value === "") seed.value = this.#lastSeed ?? Math.floor(Math.random() * 2 ** 32);
    else seed.value = "";
    this.#showLock();
    this.#say("seed", "");
  }

  /** A seed that stands in the field is kept; an empty field draws a new one each time. */
  #showLock() {
    const isKept = $("seed").value !== "";
    const lock = $("seed-lock");
    lock.setAttribute("aria-pressed", String(isKept));
    lock.querySelector("use").setAttribute("href", isKept ? "#i-lock" : "#i-unlock");
    lock.title = isKept ? "Draw a new seed each time" : "Keep the seed";
  }

  #clear(input) {
    const name = input.closest("[data-field]")?.dataset.field;
    if (name) this.#say(name, "");
    this.#say("form", "");
  }

  /** Whether a field's value can be; if not, it is said. */
  #check(input) {
    if (!input.matches?.("input[type=number]") || input.disabled || input.closest("[hidden]")) return true;
    const words = wordsFor(input);
    const name = input.closest("[data-field]").dataset.field;
    if (words) this.#say(name, words);
    return !words;
  }

  #say(name, words) {
    const error = $(`${name}-error`);
    error.textContent = words;
    show(error, words !== "");
    for (const input of error.closest("[data-field]").querySelectorAll("input[type=number], textarea, select")) {
      if (words) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    }
    // Read out where it does not get the focus.
    if (words && name === "form") error.setAttribute("role", "alert");
  }
}

/** Which field of the form an error of the API belongs to. */
function fieldOf(param) {
  if (!param) return "form";
  const name = param.replace(/\[\d+\]$/, "");
  if (["width", "height", "aspect_ratio", "megapixels"].includes(name)) return "size";
  if (name === "mask") return "images";
  return FIELDS.has(name) ? name : "form";
}

/** What is wrong with a number, and what would do; empty if nothing is. */
function wordsFor(input) {
  const { validity, value, min, max, step, labels } = input;
  const name = labels[0].firstChild.textContent.trim().replace(" in pixels", "");
  if (validity.badInput) return `${name} must be a number from ${min} to ${max}.`;
  if (validity.rangeUnderflow || validity.rangeOverflow) return `${name} must be from ${min} to ${max}; got ${value}.`;
  if (!validity.stepMismatch || !Number.isInteger(Number(step))) return "";
  if (step === "1") return `${name} must be a whole number; got ${value}.`;
  const below = Math.floor(Number(value) / step) * step;
  return `${name} must be a multiple of ${step}; got ${value} (nearest: ${below}, ${below + Number(step)}).`;
}
