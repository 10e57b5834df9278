// A job from its sending to its pictures, through lost connections, reloads and restarts.
//
// An entry is kept before it is sent and carries its own name as the request's
// Idempotency-Key: whoever reloads in the middle sends it again and draws once.

import { ApiError, ask, askJson, events, read } from "./api.js";
import { blobOf, bodyOf, forget, isUnfinished } from "./entries.js";

// A browser has six connections to one address, for all its windows together.
const MOST_STREAMS = 2;
const MOST_DRAWINGS = 3;
const POLL_MS = 2000;
const HIDDEN_POLL_MS = 8000;
const LONGEST_PAUSE_MS = 8000;
const FINAL = new Set(["completed", "failed", "cancelled"]);

const LOST = "the page was closed while this was drawn, and this service keeps no jobs";
const GONE = "the service no longer knows this job";

/** Tells "change" with the entry, "refused" with the entry and why, "keyneeded" with why. */
export class Jobs extends EventTarget {
  #store;
  #service;
  // Those that the service has accepted, by id.
  #accepted = new Map();
  #streams = new Map();
  #isPolling = false;
  #drawings = 0;

  constructor(store, service) {
    super();
    this.#store = store;
    this.#service = service;
    document.addEventListener("visibilitychange", () => this.#attend());
  }

  /** Draw what a new entry asks for. */
  async draw(entry) {
    this.#tell("change", { entry });
    await this.#save(entry);
    await this.#send(entry);
  }

  /** Take up an entry that an earlier visit of the page left unfinished. */
  resume(entry) {
    if (entry.job) this.#follow(entry);
    else if (entry.status === "sending") this.#send(entry);
    else this.#fail(entry, { message: LOST });
  }

  /** A waiting job never runs; a running one stops at its next step. */
  async cancel(entry) {
    if (!entry.job) {
      // If the service has it by now, its answer is followed by the cancelling.
      entry.status = "cancelled";
      entry.live.stop?.abort();
      await this.#end(entry);
      return;
    }
    try {
      await this.#absorb(entry, await askJson(`v1/jobs/${entry.job}`, { method: "DELETE" }));
    } catch (error) {
      if (error.status !== 404) throw error;
      entry.status = "cancelled";
      await this.#end(entry);
    }
  }

  /** Remove a job and its pictures from the service, too. */
  forget(entry) {
    if (!entry.job) return;
    ask(`v1/jobs/${entry.job}?forget=true`, { method: "DELETE" }).catch(() => {
      // It goes by itself when its time is over.
    });
  }

  async #send(entry) {
    let body;
    try {
      body = await bodyOf(entry);
    } catch {
      // The file that was chosen has been changed or moved since.
      const error = new ApiError("a reference cannot be read any more; choose it again", { param: "images" });
      return void (await this.#refuse(entry, error));
    }
    for (let attempt = 0; entry.status === "sending"; attempt += 1) {
      try {
        if (this.#service.keepsJobs === false) return await this.#drawAtOnce(entry, body);
        const headers = { "Idempotency-Key": entry.id };
        const job = await askJson("v1/jobs", { method: "POST", body, headers });
        entry.job = job.id;
        if (entry.status === "cancelled") return void (await this.cancel(entry));
        entry.live = {};
        entry.status = job.status;
        await this.#save(entry);
        return this.#follow(entry);
      } catch (error) {
        if (entry.status === "cancelled") return;
        if (error.code === "jobs_off") this.#service.keepsJobs = false;
        else if (!(await this.#pause(entry, error, attempt))) return void (await this.#refuse(entry, error));
      }
    }
  }

  /** Where the service keeps no jobs: draw while this page waits. */
  async #drawAtOnce(entry, body) {
    while (this.#drawings >= MOST_DRAWINGS) {
      entry.live.waiting = "Waiting for this page's other pictures";
      this.#tell("change", { entry });
      await this.#sleep(entry, 300);
      if (entry.status === "cancelled") return;
    }
    this.#drawings += 1;
    entry.live = { stop: new AbortController() };
    try {
      const signal = entry.live.stop.signal;
      const asked = { ...body, stream: true };
      const answer = await ask("v1/generate", { method: "POST", body: asked, signal });
      entry.status = "queued";
      await this.#save(entry);
      for await (const { name, data } of events(answer)) {
        if (name === "completed") {
          const pictures = data.images.map((image) => ({ ...image, blob: blobOf(image.b64, image.format) }));
          return await this.#complete(entry, data, pictures);
        }
        if (name === "error") return await this.#fail(entry, data.error);
        this.#hear(entry, name, data);
      }
      await this.#fail(entry, { message: "the connection was lost while this was drawn" });
    } finally {
      this.#drawings -= 1;
    }
  }

  #follow(entry) {
    this.#accepted.set(entry.id, entry);
    this.#tell("change", { entry });
    this.#attend();
  }

  /** Streams for the oldest while somebody looks; the others are asked for now and then. */
  #attend() {
    if (document.hidden) {
      for (const stop of this.#streams.values()) stop.abort();
    } else {
      for (const entry of this.#accepted.values()) {
        if (this.#streams.size < MOST_STREAMS && !this.#streams.has(entry.id)) this.#listen(entry);
      }
    }
    if (!this.#isPolling) this.#poll();
  }

  async #listen(entry) {
    const stop = new AbortController();
    this.#streams.set(entry.id, stop);
    for (let attempt = 0; this.#accepted.has(entry.id) && !stop.signal.aborted; attempt += 1) {
      try {
        const answer = await ask(`v1/jobs/${entry.job}/events`, { signal: stop.signal });
        entry.live.waiting = null;
        for await (const { name, data } of events(answer)) {
          attempt = 0;
          if (FINAL.has(name)) await this.#absorb(entry, data);
          else this.#hear(entry, name, data);
        }
        if (this.#accepted.has(entry.id)) await this.#sleep(entry, 300);
      } catch (error) {
        if (error.name !== "AbortError") await this.#trouble(entry, error, attempt);
      }
    }
    this.#streams.delete(entry.id);
    this.#attend();
  }

  async #poll() {
    this.#isPolling = true;
    while ([...this.#accepted.keys()].some((id) => !this.#streams.has(id))) {
      for (const entry of [...this.#accepted.values()]) {
        if (this.#streams.has(entry.id)) continue;
        try {
          await this.#absorb(entry, await askJson(`v1/jobs/${entry.job}`));
        } catch (error) {
          await this.#trouble(entry, error, 2);
        }
      }
      await new Promise((go) => setTimeout(go, document.hidden ? HIDDEN_POLL_MS : POLL_MS));
    }
    this.#isPolling = false;
  }

  /** What an accepted job meets on its way; most of it passes. */
  async #trouble(entry, error, attempt) {
    if (error.status === 404) await this.#fail(entry, { message: GONE });
    else if (!(await this.#pause(entry, error, attempt))) await this.#fail(entry, error);
  }

  #hear(entry, name, data) {
    const live = entry.live;
    if (name === "queued") {
      entry.status = "queued";
      Object.assign(live, { position: data.position, eta: data.eta_s, at: Date.now() });
    } else if (name === "started") {
      entry.status = "running";
      Object.assign(live, { eta: null });
    } else if (name === "step") {
      entry.status = "running";
      Object.assign(live, { image: data.image_index, step: data.step, steps: data.steps });
      Object.assign(live, { percent: data.percent, eta: data.eta_s, at: Date.now() });
    } else if (name === "preview") {
      const old = live.preview;
      live.preview = blobOf(data.b64, data.format);
      if (old) setTimeout(() => forget(old), 2000);
    } else return;
    this.#tell("change", { entry });
  }

  /** A job as the service describes it. */
  async #absorb(entry, job) {
    if (!isUnfinished(entry) || entry.live.isEnding) return;
    if (job.status === "completed") {
      entry.live.isEnding = true;
      try {
        const found = await Promise.all(
          job.images.map(async (image, index) => {
            const answer = await ask(`v1/jobs/${entry.job}/images/${index}`);
            return { ...image, blob: await read(answer, "blob") };
          }),
        );
        await this.#complete(entry, job, found);
      } finally {
        entry.live.isEnding = false;
      }
    } else if (job.status === "failed") await this.#fail(entry, job.error);
    else if (job.status === "cancelled") {
      entry.status = "cancelled";
      await this.#end(entry);
    } else {
      if (job.progress) this.#hear(entry, "step", job.progress);
      else if (job.status === "queued") this.#hear(entry, "queued", job);
      else this.#hear(entry, "started", job);
    }
  }

  async #complete(entry, answer, pictures) {
    entry.status = "completed";
    entry.pictures = pictures.map(({ seed, width, height, blob }) => ({ seed, width, height, blob }));
    entry.params = answer.params;
    entry.timings = answer.timings;
    entry.warnings = answer.warnings;
    entry.model = answer.model;
    await this.#end(entry);
  }

  async #fail(entry, error) {
    entry.status = "failed";
    entry.error = error.message;
    await this.#end(entry);
  }

  async #end(entry) {
    this.#accepted.delete(entry.id);
    this.#streams.get(entry.id)?.abort();
    entry.live.stop?.abort();
    if (entry.live.preview) forget(entry.live.preview);
    entry.live = {};
    if (entry.status === "cancelled") await this.#store.remove(entry.id);
    else await this.#save(entry);
    this.#tell("change", { entry });
  }

  /** The service does not take it: whoever asked is told by the form, next to the field. */
  async #refuse(entry, error) {
    entry.status = "cancelled";
    await this.#end(entry);
    this.#tell("refused", { entry, error });
  }

  /** Wait where waiting helps. Returns whether it does. */
  async #pause(entry, error, attempt) {
    if (!(error instanceof ApiError)) throw error;
    if (error.needsKey) {
      entry.live.waiting = "Waiting for the API key";
      this.#tell("change", { entry });
      this.#tell("keyneeded", { error });
      await this.#until(entry, this, "keygiven");
    } else if (error.isUnreachable || error.isPassing) {
      entry.live.waiting = error.code === "loading" ? "Waiting for the model" : "Waiting for the service";
      this.#tell("change", { entry });
      this.#service.look();
      const pause = this.#sleep(entry, Math.min(500 * 2 ** attempt, LONGEST_PAUSE_MS));
      await Promise.race([pause, this.#until(entry, this.#service, "change", () => this.#service.isReady)]);
    } else return false;
    entry.live.waiting = null;
    return true;
  }

  /** A key was given: go on with what waits for it. */
  keyGiven() {
    this.dispatchEvent(new Event("keygiven"));
  }

  #sleep(entry, ms) {
    const { signal } = this.#stopOf(entry);
    return new Promise((go) => {
      const leave = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", leave);
        go();
      };
      const timer = setTimeout(leave, ms);
      signal.addEventListener("abort", leave);
    });
  }

  #until(entry, target, name, isSo = () => true) {
    const { signal } = this.#stopOf(entry);
    return new Promise((go) => {
      const hear = () => isSo() && leave();
      const leave = () => {
        target.removeEventListener(name, hear);
        signal.removeEventListener("abort", leave);
        go();
      };
      target.addEventListener(name, hear);
      signal.addEventListener("abort", leave);
    });
  }

  /** What ends an entry's waiting. */
  #stopOf(entry) {
    entry.live.stop ??= new AbortController();
    return entry.live.stop;
  }

  async #save(entry) {
    try {
      await this.#store.put(entry);
    } catch (error) {
      this.#tell("full", { error });
    }
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
