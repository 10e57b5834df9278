// The page: puts its parts together. Everything it does, any client of the API can do.

import { ApiError } from "./api.js";
import { Compare } from "./compare.js";
import { Composer } from "./composer.js";
import { $, announce, el, show, toast } from "./dom.js";
import { forget, isUnfinished, newEntry } from "./entries.js";
import { examplesFor } from "./examples.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { KeyDialog } from "./key.js";
import { MaskEditor } from "./mask.js";
import { References } from "./references.js";
import { Service } from "./service.js";
import { Store, askToKeep } from "./store.js";
import { Viewer } from "./viewer.js";

const store = new Store();
const service = new Service();
const key = new KeyDialog();
const mask = new MaskEditor($("mask"));
const compare = new Compare();
const jobs = new Jobs(store, service);

const actions = { open, reuse, reference, mark, compare: compareWith, remove, cancel, retry, dismiss };
const gallery = new Gallery(actions);
const viewer = new Viewer(gallery, actions);
const references = new References((dragged) => gallery.find(dragged)?.picture.blob);
const composer = new Composer(service, references);
let chosen = null;

function draw() {
  const request = composer.request();
  if (request === null) return;
  const entry = newEntry(request, references.blobs, references.mask);
  askToKeep();
  jobs.draw(entry);
  if (matchMedia("(max-width: 60rem)").matches) $("pictures").scrollIntoView({ behavior: "smooth" });
}

function open(shown) {
  if (chosen && chosen.key !== shown.key) compareWith(shown);
  else viewer.open(shown);
}

function reuse({ entry, picture }) {
  composer.fill(entry, picture);
  announce("The form has the picture's settings");
}

async function reference({ picture }) {
  await references.add([picture.blob]);
  composer.focus();
  announce("The picture is a reference now");
}

async function mark({ picture }) {
  await references.set([picture.blob], null);
  await markPart();
}

async function markPart() {
  const made = await mask.open(references.blobs[0], references.mask);
  if (made !== undefined) references.setMask(made);
  composer.focus();
}

/** The first picture waits for the second. */
function compareWith(shown) {
  if (chosen === null) {
    chosen = shown;
    announce("Choose another picture to compare with");
  } else {
    const first = chosen;
    chosen = null;
    if (first.key !== shown.key) compare.open(first, shown);
  }
  gallery.choose(chosen?.key ?? null);
  show($("choosing"), chosen !== null);
}

async function cancel(entry) {
  try {
    await jobs.cancel(entry);
    announce("Cancelled");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    toast(`It could not be cancelled: ${error.message}`);
  }
}

async function retry(entry) {
  await dismiss(entry);
  jobs.draw(newEntry(entry.request, entry.references, entry.mask));
}

async function dismiss(entry) {
  await store.remove(entry.id);
  gallery.drop(entry);
  jobs.forget(entry);
}

/** Delete a picture; for a moment it can be had back. */
async function remove({ entry, picture }) {
  const before = entry.pictures;
  entry.pictures = before.filter((other) => other !== picture);
  await keep(entry);
  if (chosen?.picture === picture) compareWith(chosen);
  const undo = async () => {
    entry.pictures = before.filter((other) => other === picture || entry.pictures.includes(other));
    await keep(entry);
  };
  const forgetAll = () => {
    forget(picture.blob);
    if (!entry.pictures.length) jobs.forget(entry);
  };
  announce("Deleted");
  toast("Picture deleted", "Undo", undo, forgetAll);
}

async function keep(entry) {
  if (entry.pictures.length) {
    await store.put(entry);
    gallery.put(entry);
  } else {
    await store.remove(entry.id);
    gallery.drop(entry);
  }
}

function welcome() {
  if (!service.defaults) return;
  const { words, prompts } = examplesFor(service.isBundled);
  const choose = (text) => {
    composer.setPrompt(text);
    draw();
  };
  const items = prompts.map((text) => el("li", {}, el("button", { type: "button", class: "example", onclick: () => choose(text) }, text)));
  $("welcome").replaceChildren(
    el("p", { class: "welcome-title" }, "Nothing drawn yet."),
    el("p", { class: "welcome-words" }, words),
    el("p", { class: "welcome-try", id: "welcome-try" }, "Click one to draw it:"),
    el("ul", { class: "welcome-list", "aria-labelledby": "welcome-try" }, ...items),
  );
}

function changed({ detail: { entry } }) {
  if (entry.status === "cancelled") gallery.drop(entry);
  else gallery.put(entry);
  if (entry.status === "completed") {
    composer.drawn(entry.pictures[0].seed);
    announce(`Drawn: ${entry.request.prompt}`);
  } else if (entry.status === "failed") announce(`Not drawn: ${entry.error}`);
}

function refused({ detail: { error } }) {
  const again = error.retryS && error.status === 429 ? `. Room is expected in ${Math.ceil(error.retryS)} s.` : "";
  composer.showError(error.param, error.message + again);
}

async function start() {
  let model = "";
  service.addEventListener("change", () => {
    composer.update();
    if (service.hasKeys) show($("key-button"), true);
    const now = JSON.stringify([service.model, service.defaults]);
    if (now !== model) welcome();
    model = now;
  });
  composer.addEventListener("draw", draw);
  references.addEventListener("mark", markPart);
  jobs.addEventListener("change", changed);
  jobs.addEventListener("refused", refused);
  jobs.addEventListener("keyneeded", ({ detail }) => key.open(detail.error.message));
  jobs.addEventListener("full", () => toast("The browser keeps no more pictures; delete some to make room."));
  key.addEventListener("given", async () => {
    await service.learnWithKey();
    jobs.keyGiven();
    announce("The key works");
  });
  $("choosing-end").addEventListener("click", () => compareWith(chosen));
  const looked = service.watch();
  await store.open();
  if (!store.isKept) toast("This browser keeps nothing for this page: pictures go when it is closed.");
  const entries = (await store.all()).map((entry) => ({ ...entry, live: {} }));
  gallery.put(...entries);
  for (const entry of entries.filter(isUnfinished).reverse()) jobs.resume(entry);
  await looked;
}

start();
