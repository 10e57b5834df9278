// Prompts that were drawn, the latest first: to choose from, and to step through with keys.

import { $, el, popover } from "./dom.js";

const KEY = "fluxd.prompts";
const MOST = 100;

export class History {
  #prompts = kept();
  // Where in the history the prompt stands; -1: it is new.
  #at = -1;
  #written = "";

  constructor(prompt) {
    popover($("history-button"), $("history"), (close) => this.#items(prompt, close));
    prompt.addEventListener("keydown", (event) => {
      if (!event.altKey || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
      event.preventDefault();
      this.#step(prompt, event.key === "ArrowUp" ? 1 : -1);
    });
    prompt.addEventListener("input", () => {
      this.#at = -1;
    });
  }

  add(text) {
    this.#prompts = [text, ...this.#prompts.filter((other) => other !== text)].slice(0, MOST);
    this.#at = -1;
    this.#keep();
  }

  #step(prompt, by) {
    if (this.#at === -1) this.#written = prompt.value;
    this.#at = Math.max(-1, Math.min(this.#at + by, this.#prompts.length - 1));
    put(prompt, this.#at === -1 ? this.#written : this.#prompts[this.#at]);
  }

  #items(prompt, close) {
    if (!this.#prompts.length) return [el("p", { class: "note" }, "Prompts that you draw are kept here.")];
    const items = this.#prompts.map((text) =>
      el("button", { type: "button", class: "item", onclick: () => (close(), put(prompt, text), prompt.focus()) }, text),
    );
    const clear = () => {
      this.#prompts = [];
      this.#keep();
      close();
      $("history-button").focus();
    };
    return [...items, el("button", { type: "button", class: "item clear", onclick: clear }, "Clear the history")];
  }

  #keep() {
    try {
      localStorage.setItem(KEY, JSON.stringify(this.#prompts));
    } catch {
      // It lasts until the page is closed.
    }
  }
}

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter((text) => typeof text === "string") : [];
  } catch {
    return [];
  }
}

function put(prompt, text) {
  prompt.value = text;
  prompt.setSelectionRange(text.length, text.length);
  // As if it had been typed, for those who listen.
  prompt.dispatchEvent(new CustomEvent("put"));
}
