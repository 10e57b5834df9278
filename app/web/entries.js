// One request of this browser and what came of it: the shape of what is kept.

export const UNFINISHED = new Set(["sending", "queued", "running"]);

/** A name that nobody else gives; also where the page came over plain HTTP. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A new entry.
 *  @param request what is asked, without pictures
 *  @param references blobs, in order
 *  @param mask a blob, or null */
export function newEntry(request, references, mask) {
  return {
    id: newId(),
    created: Date.now(),
    status: "sending",
    // The service's name for it, once it is known.
    job: null,
    request,
    references,
    mask,
    // Each {seed, width, height, blob}; one that was deleted is gone.
    pictures: [],
    params: null,
    timings: null,
    warnings: [],
    model: null,
    error: null,
    live: {},
  };
}

export const isUnfinished = (entry) => UNFINISHED.has(entry.status);

/** What was asked, as a body for the service; pictures as data URLs. */
export async function bodyOf(entry) {
  const body = { ...entry.request };
  if (entry.references.length) body.images = await Promise.all(entry.references.map(dataUrl));
  if (entry.mask) body.mask = await dataUrl(entry.mask);
  return body;
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Base64 to a picture. */
export function blobOf(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

const urls = new WeakMap();

/** An address under which the page shows a blob; one for as long as the blob lives. */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

export function forget(blob) {
  if (urls.has(blob)) URL.revokeObjectURL(urls.get(blob));
  urls.delete(blob);
}
