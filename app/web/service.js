// How the service stands: there or not, loading, which model, what it takes.

import { ApiError, ask, askJson } from "./api.js";
import { $, announce, show } from "./dom.js";

const READY_LOOK_MS = 20000;
const LOADING_LOOK_MS = 400;
const LOST_LOOK_MS = 1500;
const NOTICES = {
  lost: "The service does not answer. This page tries again until it does.",
  failed: "The service cannot draw any more and must be restarted.",
};

/** Tells "change" whenever anything of it is news. */
export class Service extends EventTarget {
  state = "connecting";
  model = null;
  isBundled = false;
  defaults = null;
  /** Whether jobs are kept by the service; unknown until it was asked. */
  keepsJobs = null;
  /** Whether it wants an API key. */
  hasKeys = false;
  #timer = null;
  // Whether to ask about keys and jobs; without a key once is enough.
  #isToLearn = true;

  get isReady() {
    return this.state === "ready";
  }

  /** Begin to look; never ends. */
  watch() {
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.look();
    });
    return this.look();
  }

  /** Look now. */
  async look() {
    clearTimeout(this.#timer);
    let wait = READY_LOOK_MS;
    try {
      const health = await askJson("health");
      const isBack = this.state === "lost" || this.state === "connecting";
      this.model = health.model;
      this.isBundled = health.bundled === true;
      this.defaults = health.defaults;
      if (isBack || this.#isToLearn) await this.#learn();
      this.#tell(health);
      if (health.state !== "ready") {
        wait = LOADING_LOOK_MS;
        $("loading").value = health.progress;
      }
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      wait = LOST_LOOK_MS;
      // Only the service itself knows that it is past help; a proxy's error passes.
      this.#tell({ state: error.body?.state ? "failed" : "lost" });
    }
    // Two looks may have overlapped; only one goes on.
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.look(), wait);
  }

  /** Ask for the first page of jobs: the answer tells of keys and of what is kept. */
  async #learn() {
    try {
      await ask("v1/jobs?limit=1");
      this.keepsJobs = true;
    } catch (error) {
      if (error.code === "jobs_off") this.keepsJobs = false;
      else if (error.needsKey) this.hasKeys = true;
      else throw error;
    }
    this.#isToLearn = false;
  }

  /** A key was given: ask again what could not be asked without. */
  async learnWithKey() {
    this.#isToLearn = true;
    await this.look();
  }

  #tell({ state, stage, device }) {
    const isNews = state !== this.state;
    this.state = state;
    show($("loading"), state === "loading" || state === "warming_up");
    $("model-dot").dataset.state = state;
    put($("model-text"), this.#words(state, stage, device));
    show($("notice"), state in NOTICES);
    put($("notice"), NOTICES[state] ?? "");
    if (isNews && state === "ready") announce(`${this.model} is ready`);
    this.dispatchEvent(new Event("change"));
  }

  #words(state, stage, device) {
    switch (state) {
      case "ready":
        return `${this.model} on ${device.chip || device.device}`;
      case "loading":
        return stage ? `Loading the model: ${stage}` : "Loading the model";
      case "warming_up":
        return "Warming up";
      case "draining":
        return "Shutting down";
      case "lost":
        return "Not connected";
      default:
        return "Must be restarted";
    }
  }
}

/** Only what is new, so that screen readers do not read it again. */
function put(place, words) {
  if (place.textContent !== words) place.textContent = words;
}
